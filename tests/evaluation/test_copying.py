"""Copies among drawn images: by their definition in loops, and at its edges; thumbnails against averages by hand."""

import math

import jaxtyping
import numpy as np
import pytest
import torch
from fake_gpu import FakeGPU, needs_cuda_build
from torch import Tensor

from ldm_edu.errors import LDMError
from ldm_edu.evaluation.copying import copied, thumbnails


@pytest.fixture
def unchecked(monkeypatch):
    """Past the signatures, which are checked in the tests only."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def vectors(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(b: int, h: int, w: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed)) - 1


def mixed(n: int, m: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Drawn vectors, at all distances from training vectors, and those."""
    training = vectors(m, d, seed + 1)
    steps = torch.logspace(-3, 1, n, dtype=torch.float64)[:, None]
    return training[torch.arange(n) % m] + steps * vectors(n, d, seed), training


# --- Copies ---

SHAPES = [(40, 50, 1), (30, 2, 3), (60, 20, 8), (25, 300, 12), (1, 3, 2), (20, 40, 768)]


def in_loops(drawn: Tensor, training: Tensor, ratio: float) -> list[bool]:
    """The definition, one pair after the other, in Python's own numbers."""
    found = []
    for x in drawn.tolist():
        near, next_ = sorted(math.dist(x, y) for y in training.tolist())[:2]
        found.append(near < ratio * next_)
    return found


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_copies_are_their_definition_in_loops(n, m, d, ratio):
    drawn, training = mixed(n, m, d)
    found = copied(drawn, training, ratio)
    assert found.dtype == torch.bool and found.shape == (n,)
    assert found.tolist() == in_loops(drawn, training, ratio)
    assert n == 1 or ratio in (0, 1) or 0 < found.sum() < n


def test_the_ratio_is_a_third_unless_given():
    training = torch.tensor([[0.0], [3.0], [300.0]])
    drawn = torch.tensor([[0.74], [0.76], [2.24], [2.26], [-1.0], [-1.6]])
    assert copied(drawn, training).tolist() == [True, False, False, True, True, False]
    assert torch.equal(copied(drawn, training), copied(drawn, training, 1 / 3))


def test_at_the_ratio_itself_is_no_copy():
    training = torch.tensor([[0.0], [3.0]])
    drawn = torch.tensor([[1.0], [0.999], [1.5]])
    assert copied(drawn, training, 0.5).tolist() == [False, True, False]
    assert copied(drawn, training, 1.0).tolist() == [True, True, False]  # the last is as far from both
    assert copied(drawn, training, 0.0).tolist() == [False, False, False]


def test_more_is_a_copy_at_a_larger_ratio():
    drawn, training = mixed(200, 60, 5)
    before = torch.zeros(200, dtype=torch.bool)
    for ratio in (0.05, 0.2, 0.5, 0.8, 1.0):
        found = copied(drawn, training, ratio)
        assert (found | ~before).all() and found.sum() > before.sum()
        before = found


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_what_stands_in_the_training_set_is_a_copy(scale):
    training = scale * vectors(300, 20)
    assert copied(training, training).all()
    assert copied(training[17:18], training, 1e-9).all()
    assert copied(training + 1e-9 * scale, training).all()
    assert copied(training.float(), training).all()  # although it was rounded
    assert not copied(scale * vectors(300, 20, 1), training).any()


def test_neither_scale_nor_place_matters():
    drawn, training = mixed(100, 40, 6)
    found = copied(drawn, training)
    for scale, shift in [(1e-3, 0), (1e3, 0), (1, 1e4), (50, -300)]:
        assert torch.equal(copied(scale * drawn + shift, scale * training + shift), found)
    turned = torch.linalg.qr(vectors(6, 6, 5)).Q
    assert torch.equal(copied(drawn @ turned, training @ turned), found)


def test_what_stands_twice_in_the_training_set_has_no_copies():
    training = vectors(30, 5)
    assert not copied(training, torch.cat([training, training])).any()
    assert not copied(training + 1e-3, torch.cat([training, training]), 0.9).any()
    once = copied(training, torch.cat([training, training[:10]]))
    assert once.tolist() == [False] * 10 + [True] * 20
    assert not copied(training, training[:1].repeat(2, 1)).any()  # two training images, both the same


def test_a_nearly_equal_pair_in_the_training_set_hides_both():
    training = vectors(30, 5)
    pair = torch.cat([training, training[:1] + 1e-6])
    assert copied(training[:1], pair).all()  # equal to one, so still nearer to it than to the other
    assert not copied(training[:1] + 1e-4 * vectors(1, 5, 3), pair).any()


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_rows_does_not_matter(seed):
    drawn, training = mixed(70, 90, 4)
    generator = torch.Generator().manual_seed(seed)
    rows, others = torch.randperm(70, generator=generator), torch.randperm(90, generator=generator)
    found = copied(drawn, training)
    assert torch.equal(copied(drawn, training[others]), found)
    assert torch.equal(copied(drawn[rows], training), found[rows])
    columns = torch.randperm(4, generator=generator)
    assert torch.equal(copied(drawn[:, columns], training[:, columns]), found)


def test_every_image_is_judged_by_itself():
    drawn, training = mixed(33, 2**15, 3)  # so many that the search goes in pieces
    found = copied(drawn, training, 0.5)
    assert 0 < found.sum() < 33
    for i in range(33):
        assert copied(drawn[i : i + 1], training, 0.5).item() == found[i]


def test_the_nearest_may_be_added_or_taken_away():
    drawn, training = mixed(50, 40, 6)
    assert copied(drawn, torch.cat([training, drawn])).all()
    near = torch.cdist(drawn, training).argmin(1)
    for i in copied(drawn, training).nonzero().flatten().tolist()[:5]:
        without = torch.cat([training[: near[i]], training[near[i] + 1 :]])
        assert not copied(drawn[i : i + 1], without).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_number_formats_are_compared_without_further_rounding(dtype):
    drawn, training = (x.to(dtype) for x in mixed(40, 30, 6))
    found = copied(drawn, training)
    assert found.tolist() == in_loops(drawn.double(), training.double(), 1 / 3)
    assert torch.equal(copied(drawn.double(), training), found) and torch.equal(copied(drawn, training.double()), found)
    assert copied(training, training).all()


def test_nothing_is_changed_and_no_gradient_is_kept():
    drawn, training = (x.requires_grad_() for x in mixed(9, 8, 3))
    before = drawn.detach().clone(), training.detach().clone()
    assert not copied(drawn, training).requires_grad
    assert torch.equal(drawn, before[0]) and torch.equal(training, before[1]) and drawn.requires_grad


@pytest.mark.parametrize("ratio", [0.5, np.float64(0.5), np.float32(0.5), torch.tensor(0.5)])
def test_a_ratio_may_be_any_real_number(unchecked, ratio):
    drawn, training = mixed(30, 20, 4)
    assert copied(drawn, training, ratio).tolist() == in_loops(drawn, training, 0.5)


@pytest.mark.parametrize("ratio", [-1e-9, 1.001, 3, math.nan, math.inf, -math.inf, "a", None, True, [0.5], 1j])
def test_a_ratio_that_cannot_be_is_refused(unchecked, ratio):
    with pytest.raises(LDMError, match="ratio.* should be a finite number, at least 0 and at most 1"):
        copied(*mixed(3, 3, 2), ratio)


@pytest.mark.parametrize("name", ["drawn", "training"])
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (torch.zeros(9, 3), "features"),
        (torch.zeros(9, 0), "features|shape"),
        (torch.zeros(9), "shape"),
        (torch.zeros(9, 4, 1), "shape"),
        (torch.zeros(0, 4), "at least"),
        (torch.full((9, 4), math.nan), "finite"),
        (torch.full((9, 4), -math.inf), "finite"),
        (torch.zeros(9, 4, dtype=torch.int64), "floating-point"),
        (torch.zeros(9, 4, dtype=torch.uint8), "floating-point"),
        (torch.zeros(9, 4, dtype=torch.bool), "floating-point"),
        (torch.zeros(9, 4, dtype=torch.complex64), "floating-point"),
        (torch.zeros(9, 4).to_sparse(), "dense"),
        (torch.zeros(9, 4, device="meta"), "meta"),
        (np.zeros((9, 4)), "tensor"),
        ([[0.0] * 4] * 9, "tensor"),
        (None, "tensor"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_its_name(unchecked, name, wrong, told):
    sets = {"drawn": vectors(9, 4), "training": vectors(9, 4)} | {name: wrong}
    with pytest.raises(LDMError, match=told) as refused:
        copied(**sets)
    assert name in str(refused.value) and " x " not in f" {refused.value}" and "y has" not in str(refused.value)


def test_one_value_that_is_no_number_is_enough():
    for place in range(8):
        spoilt = vectors(8, 4)
        spoilt[place, place % 4] = math.nan
        for sets in ((spoilt, vectors(8, 4, 1)), (vectors(8, 4, 1), spoilt)):
            with pytest.raises(LDMError, match="finite"):
                copied(*sets)


def test_one_training_image_has_no_second_nearest():
    with pytest.raises(LDMError, match="training holds one image: at least two"):
        copied(vectors(5, 4), vectors(1, 4))
    assert copied(vectors(5, 4), vectors(2, 4, 1)).shape == (5,)


def test_no_training_image_is_not_called_one(unchecked):
    with pytest.raises(LDMError, match="training") as refused:
        copied(vectors(5, 4), vectors(0, 4))
    assert "one image" not in str(refused.value)


# --- Thumbnails ---


def by_hand(images: Tensor, size: int) -> Tensor:
    """The mean over all pixels that a cell of a size × size grid touches, in float64."""
    b, _, h, w = images.shape
    out = torch.empty(b, 3, size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            rows = slice(i * h // size, -(-(i + 1) * h // size))
            columns = slice(j * w // size, -(-(j + 1) * w // size))
            out[:, :, i, j] = images[:, :, rows, columns].double().mean((2, 3))
    return out.flatten(1)


@pytest.mark.parametrize(("h", "w"), [(16, 16), (32, 32), (64, 64), (48, 112), (16, 80)])
def test_a_thumbnail_is_made_of_block_averages(h, w):
    images = pictures(3, h, w)
    blocks = images.reshape(3, 3, 16, h // 16, 16, w // 16).mean((3, 5))
    found = thumbnails(images)
    assert found.shape == (3, 768) and found.dtype == torch.float32
    torch.testing.assert_close(found, blocks.flatten(1))
    torch.testing.assert_close(found.double(), by_hand(images, 16), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("h", "w"), [(17, 17), (40, 40), (178, 218), (16, 31), (33, 16)])
@pytest.mark.parametrize("size", [16, 5])
def test_sizes_that_are_no_multiples_are_averages_over_the_pixels_of_a_cell(h, w, size):
    images = pictures(2, h, w)
    torch.testing.assert_close(thumbnails(images, size).double(), by_hand(images, size), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 24])
def test_any_size_up_to_that_of_the_image(size):
    images = pictures(2, 24, 30)
    assert thumbnails(images, size).shape == (2, 3 * size**2)
    torch.testing.assert_close(thumbnails(images, size).double(), by_hand(images, size), atol=1e-6, rtol=0)
    torch.testing.assert_close(thumbnails(images, 1), images.mean((2, 3)))
    assert torch.equal(thumbnails(images[..., :24], 24), images[..., :24].flatten(1))


@pytest.mark.parametrize(("h", "w"), [(64, 64), (17, 40), (178, 218)])
def test_an_image_of_one_colour_stays_so(h, w):
    colours = torch.tensor([[-1.0, 0.25, 1.0], [0.1, -0.3, 0.7]])
    found = thumbnails(colours[:, :, None, None].expand(2, 3, h, w))
    torch.testing.assert_close(found.view(2, 3, 256), colours[:, :, None].expand(2, 3, 256))


def test_channels_rows_and_columns_keep_their_order():
    images = torch.zeros(1, 3, 32, 64)
    images[0, 1, 2:4, 12:16] = 1  # the second row of blocks, the fourth block in it
    assert thumbnails(images).nonzero().tolist() == [[0, 256 + 16 + 3]]


def test_thumbnails_of_a_part_of_the_batch():
    images = pictures(6, 40, 40)
    found = thumbnails(images)
    assert torch.equal(torch.cat([thumbnails(part) for part in images.split([1, 3, 2])]), found)
    strided = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(thumbnails(strided), found)
    assert thumbnails(images[:0]).shape == (0, 768)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_thumbnails_of_other_number_formats_are_averaged_in_single_precision(dtype):
    images = pictures(2, 64, 64).to(dtype)
    assert thumbnails(images).dtype == torch.float32
    torch.testing.assert_close(thumbnails(images).double(), by_hand(images, 16), atol=1e-6, rtol=0)


def test_a_shifted_edge_costs_less_than_another_picture():
    edge = torch.ones(1, 3, 64, 64)
    edge[..., :31] = -1
    shifted = edge.clone()
    shifted[..., 31] = -1
    pixels = [(edge - x).norm().item() / 64 for x in (shifted, -edge)]
    small = [(thumbnails(edge) - thumbnails(x)).norm().item() / 16 for x in (shifted, -edge)]
    assert small[1] > 0.95 * pixels[1] and small[0] < 0.6 * pixels[0]


def test_a_drawn_image_that_is_a_training_image_is_found_among_others():
    training, others = pictures(40, 64, 64), pictures(5, 64, 64, 1)
    noisy = training[[3, 30]] + 0.05 * pictures(2, 64, 64, 2)
    drawn = torch.cat([others, training[[7]], noisy])
    assert copied(thumbnails(drawn), thumbnails(training)).tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "bytes"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "floating-point"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.complex64), "floating-point"),
        (torch.full((2, 3, 32, 32), 255.0), r"in \[-1, 1\]"),
        (torch.full((2, 3, 32, 32), math.nan), r"in \[-1, 1\]"),
        (torch.full((2, 3, 32, 32), -math.inf), r"in \[-1, 1\]"),
        (torch.zeros(3, 32, 32), r"images\[None\]"),
        (torch.zeros(2, 1, 32, 32), "shape"),
        (torch.zeros(2, 32, 32, 3), "shape"),
        (torch.zeros(2, 3, 0, 32), "at least 1"),
        (torch.zeros(2, 3, 15, 32), r"\(15, 32\): each side should have at least"),
        (torch.zeros(2, 3, 32, 15), r"\(32, 15\): each side should have at least"),
        (np.zeros((2, 3, 32, 32)), "tensor"),
        (None, "tensor"),
    ],
)
def test_what_are_no_images_is_refused(unchecked, wrong, told):
    with pytest.raises(LDMError, match=told):
        thumbnails(wrong)


@pytest.mark.parametrize("size", [0, -1, 1.5, 8.0, "a", "8", None, True, (8, 8), [8], math.nan, torch.ones(2), 2j])
def test_a_size_that_cannot_be_is_refused(unchecked, size):
    with pytest.raises(LDMError, match="size=.* should be a whole number, at least 1"):
        thumbnails(torch.zeros(2, 3, 32, 32), size)


LARGE = [33, 2**31, 2**63, 2**64, 10**30, 10**5000]


@pytest.mark.parametrize("size", LARGE, ids=lambda size: f"{size.bit_length()} bits")
def test_a_size_beyond_that_of_the_image_is_refused(unchecked, size):
    with pytest.raises(LDMError, match="size|at least") as refused:
        thumbnails(torch.zeros(2, 3, 32, 32), size)
    assert len(str(refused.value)) < 200


def test_a_size_may_be_any_whole_number(unchecked):
    images = pictures(2, 32, 32)
    for size in (np.int64(8), np.uint8(8), torch.tensor(8)):
        assert torch.equal(thumbnails(images, size), thumbnails(images, 8))


@needs_cuda_build
def test_thumbnails_do_not_wait_for_the_device():
    with FakeGPU() as gpu:
        found = thumbnails(gpu.randn(2, 3, 40, 64))
        assert (found.device.type, found.shape, found.dtype) == ("cuda", (2, 768), torch.float32)
        assert gpu.uploads == []
