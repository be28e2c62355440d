"""Degradations against Pillow and torchvision, one generator for each image, and masks at their edges."""

import inspect
import math
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from PIL import Image

from ldm_edu.data.degradation import (
    MASKS,
    SHRINKERS,
    add_noise,
    blur,
    box_mask,
    degradation_steps,
    degrade,
    downsample,
    erase,
    gaussian_kernel,
    half_mask,
    jpeg,
    mask_to_latent,
    random_mask,
    segment_distance,
    stroke_mask,
    upsample,
)
from ldm_edu.display import to_uint8
from ldm_edu.errors import LDMError


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def streams(*indices: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, index]) for index in indices]


# --- Smaller and larger ---


def pillow(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(c, h, w) through Pillow's bicubic filter, channel by channel in floats."""
    channels = [Image.fromarray(c.numpy()).resize(size[::-1], Image.Resampling.BICUBIC) for c in image]
    return torch.stack([torch.from_numpy(np.array(channel)) for channel in channels])


@pytest.mark.parametrize("trial", range(8))
def test_sizes_are_changed_as_pillow_does(trial):
    rng = np.random.default_rng(trial)
    factor, h, w, c = (int(rng.integers(low, high)) for low, high in ((1, 9), (3, 20), (3, 20), (1, 5)))
    large, few = pictures(2, c, h * factor, w * factor, seed=trial), pictures(2, c, h, w, seed=trial)
    cases = ((downsample, large, (h, w)), (upsample, few, (h * factor, w * factor)))
    for resize, images, size in cases:
        theirs = torch.stack([pillow(x, size) for x in images]).clamp(-1, 1)
        torch.testing.assert_close(resize(images.double(), factor).float(), theirs, atol=1e-6, rtol=0)
        torch.testing.assert_close(resize(images, factor), theirs, atol=1e-5, rtol=0)  # weights in 32 bits


def test_downsample_of_bytes_is_within_rounding_of_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    theirs = np.array(Image.fromarray(pixels).resize((12, 16), Image.Resampling.BICUBIC)).astype(int)
    ours = to_uint8(downsample(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1, 4))
    # Pillow rounds twice: after the columns and after the rows.
    assert np.abs(ours[0].permute(1, 2, 0).numpy() - theirs).max() <= 1


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_grey_wall_stays_as_grey_as_it_is(factor):
    wall = torch.full((1, 3, 16, 24), 0.3)
    torch.testing.assert_close(downsample(wall, factor), wall[..., : 16 // factor, : 24 // factor])
    torch.testing.assert_close(upsample(wall, factor), torch.full((1, 3, 16 * factor, 24 * factor), 0.3))


def test_a_turned_picture_is_shrunk_to_a_turned_picture():
    x = pictures(2, 3, 32, 64)
    torch.testing.assert_close(downsample(x.flip(3), 4), downsample(x, 4).flip(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(downsample(x.mT, 4), downsample(x, 4).mT, atol=1e-6, rtol=0)


def test_what_shrinks_can_be_trained_through():
    x = (0.5 * pictures(1, 3, 16, 16)).requires_grad_()
    downsample(x, 4).sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(48.0))  # the weights of each new pixel add up to one


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_number_format_stays(dtype):
    x = pictures(2, 3, 16, 16).to(dtype)
    results = (downsample(x, 4), upsample(x, 2), blur(x, gaussian_kernel((1.0, 2.0))), jpeg(x, 50),
               add_noise(x, 0.1, streams(0, 1)), degrade(x, 4, streams(0, 1)))  # fmt: skip
    assert {result.dtype for result in results} == {dtype}


@pytest.mark.parametrize("factor", [0, -2, 3, 32])
def test_a_factor_that_does_not_divide_is_refused(factor):
    with pytest.raises(LDMError, match=f"factor.*{factor}"):
        downsample(pictures(1, 3, 16, 16), factor)
    with pytest.raises(LDMError, match=f"factor.*{factor}"):
        degrade(pictures(1, 3, 16, 16), factor, streams(0))


def test_a_factor_below_one_cannot_enlarge():
    with pytest.raises(LDMError, match="factor=0 should be a whole number, at least 1"):
        upsample(pictures(1, 3, 16, 16), 0)


def test_a_single_picture_is_no_batch():
    for spoil in (lambda x: downsample(x, 2), lambda x: upsample(x, 2), lambda x: jpeg(x, 50)):
        with pytest.raises((LDMError, TypeCheckError)):
            spoil(pictures(3, 16, 16))


# --- Blur, noise, JPEG ---


@pytest.mark.parametrize("trial", range(6))
def test_kernels_have_the_covariance_that_was_asked_for(trial):
    rng = np.random.default_rng(trial)
    (s1, s2), angle = rng.uniform(0.9, 4, 2).tolist(), rng.uniform(0, math.pi)
    kernel = gaussian_kernel((s1, s2), angle).double()
    y, x = torch.meshgrid(*[torch.arange(len(kernel)) - len(kernel) // 2] * 2, indexing="ij")
    moments = torch.stack([(kernel * a * b).sum() for a, b in ((x, x), (x, y), (y, y))])
    c, s = math.cos(angle), math.sin(angle)
    wanted = [s1**2 * c * c + s2**2 * s * s, (s1**2 - s2**2) * c * s, s1**2 * s * s + s2**2 * c * c]
    torch.testing.assert_close(moments, torch.tensor(wanted).double(), atol=0.03 * max(s1, s2) ** 2, rtol=0)
    torch.testing.assert_close(kernel.sum(), torch.ones(()).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("width", [0.7, 1.5, 3.0])
def test_round_blur_equals_torchvision(width):
    gaussian_blur = pytest.importorskip("torchvision.transforms.v2.functional").gaussian_blur
    x, kernel = pictures(2, 3, 40, 40), gaussian_kernel((width, width))
    r = len(kernel) // 2
    theirs = gaussian_blur(x, [len(kernel)] * 2, [width] * 2)  # reflects at the borders, we repeat
    torch.testing.assert_close(blur(x, kernel)[..., r:-r, r:-r], theirs[..., r:-r, r:-r], atol=1e-5, rtol=0)


def test_no_width_is_no_blur():
    x = pictures(1, 3, 8, 8)
    torch.testing.assert_close(blur(x, gaussian_kernel((0, 0.0))), x)


def test_a_kernel_may_be_wider_than_the_picture():
    assert blur(pictures(1, 3, 4, 4), gaussian_kernel((6.0, 6.0))).std() < 0.2


def test_noise_stays_in_range_and_has_its_strength():
    noisy = add_noise(torch.zeros(1, 3, 200, 200), 0.1, streams(0))
    assert abs(noisy.std() - 0.1) < 1e-3 and abs(noisy.mean()) < 1e-3
    assert add_noise(torch.ones(1, 3, 64, 64), 1.0, streams(0)).abs().max() == 1
    x = pictures(1, 3, 8, 8)
    assert torch.equal(add_noise(x, 0, streams(0)), x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (16, 16)])
def test_jpeg_is_pillows(channels, size):
    x = pictures(2, channels, *size)
    for image, result in zip(x, jpeg(x, 60)):
        pixels, file = to_uint8(image).permute(1, 2, 0).numpy(), BytesIO()
        Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(file, "JPEG", quality=60)
        theirs = np.array(Image.open(file)).reshape(*size, channels)
        assert np.array_equal(to_uint8(result).permute(1, 2, 0).numpy(), theirs)


def test_jpeg_keeps_smooth_pictures_at_high_quality():
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    assert (jpeg(ramp, 100) - ramp).abs().max() < 0.03 < (jpeg(ramp, 5) - ramp).abs().max()


@pytest.mark.parametrize("quality", [0, 101, -5])
def test_qualities_that_do_not_exist_are_refused(quality):
    with pytest.raises(LDMError, match=f"quality={quality} should be a whole number, 1 to 100"):
        jpeg(pictures(1, 3, 8, 8), quality)


# --- The chain ---


@pytest.mark.parametrize("strength", [0.3, 1, 4.0])
def test_a_picture_is_degraded_alike_in_every_company(strength):
    x = pictures(5, 3, 32, 32)
    together = degrade(x, 4, streams(*range(5)), strength)
    for i in range(5):
        assert torch.equal(degrade(x[i : i + 1], 4, streams(i), strength), together[i : i + 1])
    order = [3, 0, 4]
    assert torch.equal(degrade(x[order], 4, streams(*order), strength), together[order])
    assert not torch.equal(degrade(x, 4, streams(*range(5), seed=1), strength), together)


def test_the_given_picture_is_not_touched():
    x, mask = pictures(2, 3, 16, 16), half_mask(16, streams(0, 1))
    before = x.clone()
    degrade(x, 4, streams(0, 1), 4.0), erase(x, mask), add_noise(x, 0.1, streams(0, 1)), downsample(x, 2)
    assert torch.equal(x, before)


def test_the_end_is_a_file_of_the_right_size():
    x = pictures(20, 3, 24, 40)
    small = degrade(x, 4, streams(*range(20)))
    assert small.shape == (20, 3, 6, 10) and small.abs().max() <= 1
    torch.testing.assert_close(to_uint8(small).float() / 127.5 - 1, small, atol=1e-6, rtol=0)  # whole bytes


def test_every_order_and_every_shrinker_occurs():
    x, orders, ways = pictures(1, 3, 16, 16), set(), set()
    for rng in streams(*range(400)):
        told = [what for what, _ in degradation_steps(x, 4, rng)]
        orders.add(tuple(next(k for k in ("blur", "shrink", "noise", "JPEG") if k in what) for what in told[:-1]))
        ways |= {what.removeprefix("shrink, ") for what in told if what.startswith("shrink")}
        assert len(told) == 5 and told[-1].startswith("JPEG")
    assert len(orders) == 24 and ways == set(SHRINKERS)


def test_more_strength_does_more_damage():
    x = upsample(pictures(16, 3, 8, 8), 4)
    clean = downsample(x, 4)
    damage = [(degrade(x, 4, streams(*range(16)), s) - clean).square().mean() for s in (0.1, 0.5, 1, 2, 4)]
    assert damage == sorted(damage)


def test_extreme_strength_still_gives_a_picture():
    assert degrade(pictures(2, 3, 16, 16), 4, streams(0, 1), 40.0).isfinite().all()


@pytest.mark.parametrize("strength", [0, -1.0, math.nan])
def test_strength_has_to_be_positive(strength):
    with pytest.raises(LDMError, match="strength=.* should be a finite number, above 0"):
        degrade(pictures(1, 3, 8, 8), 2, streams(0), strength)


def test_each_picture_needs_a_generator_of_its_own():
    x, rng = pictures(2, 3, 8, 8), np.random.default_rng(0)
    for spoil in (lambda r: degrade(x, 2, r), lambda r: add_noise(x, 0.1, r)):
        with pytest.raises(LDMError, match="there are 1 for 2 images"):
            spoil(streams(0))
        with pytest.raises(LDMError, match="twice"):
            spoil([rng, rng])
    with pytest.raises(LDMError, match="`rngs`"):
        random_mask(8, [])
    with pytest.raises((LDMError, TypeCheckError)):
        random_mask(8, rng)


# --- Masks ---


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [2, 3, 17, 64])
def test_masks_are_masks(kind, size):
    masks = random_mask(size, streams(*range(30)), kinds=[kind])
    assert masks.shape == (30, 1, size, size) and masks.dtype == torch.float32
    assert ((masks == 0) | (masks == 1)).all() and (masks.sum((1, 2, 3)) > 0).all()
    assert torch.equal(random_mask(size, streams(7), kinds=[kind]), masks[7:8])


def test_the_single_kinds_are_those_of_random_mask():
    rngs = lambda: streams(*range(9))  # noqa: E731
    assert torch.equal(box_mask(32, rngs(), (0.2, 0.3)), random_mask(32, rngs(), ("box",), (0.2, 0.3)))
    assert torch.equal(stroke_mask(32, rngs(), (0.2, 0.3)), random_mask(32, rngs(), ("stroke",), (0.2, 0.3)))
    assert torch.equal(half_mask(32, rngs()), random_mask(32, rngs(), ("half",)))


@pytest.mark.parametrize("share", [(0.01, 0.02), (0.1, 0.5), (0.4, 0.5), (0.9, 0.9)])
def test_shares_are_met(share):
    rngs = streams(*range(40))
    strokes = stroke_mask(48, rngs, share).mean((1, 2, 3))
    boxes = box_mask(48, rngs, share).mean((1, 2, 3))
    pixel = 0.5 / 48**2 + 1e-6
    assert share[0] - pixel <= strokes.min() and strokes.max() <= share[1] + pixel
    side = 2 * 0.5 / 48  # half a pixel along each of two sides that are at most as long as the image
    assert share[0] - side <= boxes.min() and boxes.max() <= share[1] + side


def test_a_box_is_one_rectangle():
    for mask in box_mask(40, streams(*range(100)), (0.05, 0.8))[:, 0]:
        assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()


def test_boxes_go_everywhere():
    assert (box_mask(32, streams(*range(800)), (0.1, 0.2)).mean(0) > 0).all()


def test_halves_are_the_four_halves():
    halves = {tuple(map(tuple, mask[0].tolist())) for mask in half_mask(4, streams(*range(64)))}
    left = torch.tensor([1.0, 1, 0, 0]).expand(4, 4)
    wanted = (left, left.mT, left.flip(1), left.mT.flip(0))
    assert halves == {tuple(map(tuple, half.tolist())) for half in wanted}
    assert (half_mask(5, streams(*range(9))).sum((1, 2, 3)) == 10).all()


def test_all_kinds_occur_and_only_those_asked_for():
    rngs = lambda: streams(*range(300))  # noqa: E731
    singles = {kind: random_mask(16, rngs(), [kind], (0.3, 0.3)) for kind in MASKS}
    assert len({kind for kind, masks in singles.items() if (masks.mean((1, 2, 3)) == 0.5).all()}) == 1
    shares = random_mask(16, rngs(), ["box", "stroke"], (0.2, 0.3)).mean((1, 2, 3))
    assert not (shares == 0.5).any()
    often = (random_mask(16, rngs(), ["half", "half", "stroke"], (0.2, 0.3)).mean((1, 2, 3)) == 0.5).float().mean()
    assert abs(often - 2 / 3) < 0.1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (dict(size=1), "size=1 should be a whole number, 2 to"),
        (dict(kinds=["circle"]), "kinds should be out of box, stroke, half, not circle"),
        (dict(kinds=[]), "not none"),
        (dict(share=(0.5, 0.1)), "share"),
        (dict(share=(0.0, 0.5)), "share"),
        (dict(share=(0.5, 0.95)), "share"),
        (dict(share=(math.nan, 0.5)), "share"),
    ],
)
def test_masks_that_cannot_be_are_refused(bad, words):
    with pytest.raises(LDMError, match=words):
        random_mask(**{"size": 16, "rngs": streams(0), **bad})


@pytest.mark.parametrize("trial", range(5))
def test_distance_is_the_least_over_all_points_of_the_way(trial):
    p, q = np.random.default_rng(trial).uniform(-3, 23, (2, 2))
    y, x = np.mgrid[:20, :20] + 0.5
    points = p + np.linspace(0, 1, 4001)[:, None] * (q - p)
    least = np.min([np.hypot(x - a, y - b) for a, b in points], axis=0)
    np.testing.assert_allclose(segment_distance(x, y, p, q), least, atol=0.01)
    np.testing.assert_allclose(segment_distance(x, y, p, p), np.hypot(x - p[0], y - p[1]))


# --- Erasing, and the latent ---


@pytest.mark.parametrize("fill", [0.0, -1, 1.0])
def test_erased_is_filled_and_the_rest_is_kept(fill):
    x, mask = pictures(6, 3, 16, 16), random_mask(16, streams(*range(6)))
    torn, missing = erase(x, mask, fill), mask.expand_as(x) == 1
    assert (torn[missing] == fill).all() and torch.equal(torn[~missing], x[~missing])


def test_nothing_leaks_from_a_hole():
    mask = box_mask(8, streams(0))
    x = torch.where(mask == 1, math.nan, torch.zeros(1, 3, 8, 8))
    assert torch.equal(erase(x, mask), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("value", [0.5, -1.0, 255.0, math.nan])
def test_a_mask_is_0_or_1(value):
    mask = torch.full((2, 1, 8, 8), value)
    with pytest.raises(LDMError, match="mask should be 1 where"):
        erase(pictures(2, 3, 8, 8), mask)
    with pytest.raises(LDMError, match="mask should be 1 where"):
        mask_to_latent(mask, 4)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 1, 4, 4), (2, 1, 1, 1), (2, 1, 8, 1)])
def test_a_mask_fits_its_pictures(shape):
    with pytest.raises(LDMError, match=r"mask should be \(2, 1, 8, 8\)"):
        erase(pictures(2, 3, 8, 8), torch.zeros(shape))


@pytest.mark.parametrize("f", [1, 2, 4, 8, 16])
def test_any_missing_pixel_makes_a_missing_cell(f):
    masks = random_mask(32, streams(*range(20)), share=(0.02, 0.5))
    latent = mask_to_latent(masks, f)
    assert latent.shape == (20, 1, 32 // f, 32 // f)
    assert torch.equal(latent, F.adaptive_max_pool2d(masks, 32 // f))
    assert (F.interpolate(latent, scale_factor=f) >= masks).all()  # what is called known is known
    assert torch.equal(mask_to_latent(masks, f, "nearest"), F.interpolate(masks, size=(32 // f, 32 // f)))


def test_one_pixel_is_enough():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 15, 8] = 1
    assert mask_to_latent(mask, 8).tolist() == [[[[0, 0], [0, 1]]]]
    assert mask_to_latent(mask, 8, "nearest").sum() == 0


def test_cells_that_do_not_fit_are_refused():
    with pytest.raises(LDMError, match="f should divide .* 16 and 16; 5 does not"):
        mask_to_latent(torch.zeros(1, 1, 16, 16), 5)
    with pytest.raises(LDMError, match="rule should be 'any' or 'nearest', not 'mean'"):
        mask_to_latent(torch.zeros(1, 1, 16, 16), 4, "mean")


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("factor", lambda x: downsample(x, 2.5)),
        ("factor", lambda x: upsample(x, 1.5)),
        ("factor", lambda x: upsample(x, 10**9)),
        ("kernel", lambda x: blur(x, torch.ones(2, 2) / 4)),
        ("kernel", lambda x: blur(x, torch.zeros(0, 0))),
        ("kernel", lambda x: blur(x, torch.ones(3, 5) / 15)),
        ("width", lambda x: gaussian_kernel((math.inf, 1))),
        ("width", lambda x: gaussian_kernel((math.nan, 1))),
        ("width", lambda x: gaussian_kernel((-1, 1))),
        ("width", lambda x: gaussian_kernel((1e6, 1))),
        ("angle", lambda x: gaussian_kernel((1, 2), math.nan)),
        ("std", lambda x: add_noise(x, math.nan, streams(0))),
        ("std", lambda x: add_noise(x, math.inf, streams(0))),
        ("std", lambda x: add_noise(x, -1.0, streams(0))),
        ("quality", lambda x: jpeg(x, 50.5)),
        ("images", lambda x: jpeg(torch.zeros(1, 3, 1, 70_000), 50)),
        ("images", lambda x: jpeg(x[:0], 50)),
        ("images", lambda x: downsample(x[:0], 2)),
        ("images", lambda x: degrade(x[:0], 2, [])),
        ("strength", lambda x: degrade(x, 2, streams(0), math.inf)),
        ("strength", lambda x: degrade(x, 2, streams(0), 3e4)),
        ("size", lambda x: random_mask(2.5, streams(0))),
        ("kinds", lambda x: random_mask(8, streams(0), kinds="box")),
        ("fill", lambda x: erase(x, torch.zeros(1, 1, 8, 8), math.nan)),
    ],
)
def test_what_is_wrong_with_a_degradation_is_named(name, spoil):
    """TypeCheckError where the annotation says it already."""
    with pytest.raises((LDMError, TypeCheckError), match=name):
        spoil(pictures(1, 3, 8, 8))


def test_a_degradation_takes_numbers_of_numpy():
    x = pictures(1, 3, 8, 8)
    assert torch.equal(inspect.unwrap(upsample)(x, np.int64(2)), upsample(x, 2))
    assert torch.equal(inspect.unwrap(jpeg)(x, np.int64(50)), jpeg(x, 50))
