"""Tiles against the whole: random configurations and sizes, each cause of a difference apart, memory, and diffusers."""

import random
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn

from ldm_edu.data.toy.datasets import ToyCOCO
from ldm_edu.errors import LDMError
from ldm_edu.first_stage.autoencoder import AutoencoderKL, FirstStage
from ldm_edu.first_stage.published import save_diffusers
from ldm_edu.first_stage.quantization import AutoencoderVQ, IdentityFirstStage, load_first_stage
from ldm_edu.first_stage.tiling import (
    NORMS,
    decode_tiled,
    encode_tiled,
    fixed_norms,
    recorded_norms,
    tile_starts,
    tile_weights,
)

LEVEL = 2 / 255  # one grey level, where images are in [-1, 1]


def small(kind: str = "kl", multipliers: tuple[int, ...] = (1, 2, 2), factors: tuple[int, ...] = ()) -> FirstStage:
    """A narrow first stage with weights large enough that far places matter."""
    torch.manual_seed(0)
    shape = dict(channels=8, multipliers=multipliers, blocks=1, groups=4, latent_channels=3, attention_factors=factors)
    model = AutoencoderVQ(num_codes=16, **shape) if kind == "vq" else AutoencoderKL(scale_factor=0.7, **shape)
    for parameter in model.parameters():
        parameter.data *= 1.5
    return model.eval()


def pictures(height: int, width: int, b: int = 1) -> torch.Tensor:
    return torch.rand(b, 3, height, width, generator=torch.Generator().manual_seed(height + width)) * 2 - 1


@contextmanager
def as_the_whole(model: nn.Module, *runs):
    """The statistics that the `runs` have, fixed; gives their results."""
    with torch.no_grad(), recorded_norms(model) as norms:
        results = [run() for run in runs]
    with fixed_norms(norms):
        yield results


# --- Where tiles lie and what they count ---


@pytest.mark.parametrize("seed", range(100))
def test_tiles_cover_everything_with_shares_that_add_up_to_one(seed):
    rng = random.Random(seed)
    tile, length, scale = rng.randint(1, 40), rng.randint(1, 150), rng.choice((1, 2, 8))
    overlap = rng.randint(0, tile - 1)
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and (len(starts) == 1 if length <= tile else starts[-1] + tile == length)
    assert all(0 < b - a <= tile - overlap for a, b in zip(starts, starts[1:]))
    assert len(starts) == 1 or (len(starts) - 1) * (tile - overlap) < length - overlap, "a tile less would do"
    weights = tile_weights([s * scale for s in starts], length * scale, tile * scale, overlap * scale)
    assert weights.isfinite().all() and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(length * scale))
    for start, row in zip(starts, weights):
        assert not row[: start * scale].any() and not row[(start + tile) * scale :].any()


def test_the_spoilt_part_of_an_overlap_counts_nothing():
    weights = tile_weights([0, 24, 48], 88, 40, 16)
    assert weights[0, :30].eq(1).all() and weights[0, 34:].eq(0).all()  # cut at 40: six thrown away, four blended
    torch.testing.assert_close(weights[0, 30:34], torch.tensor([7, 5, 3, 1]) / 8)
    assert weights[2, 58:].eq(1).all() and weights[2, :54].eq(0).all()


# --- Tiles against the whole ---


@pytest.mark.parametrize("seed", range(24))
def test_any_first_stage_any_size(seed):
    rng = random.Random(seed)
    multipliers = (1, 2, 2)[: rng.randint(1, 3)]
    factors = tuple(2**i for i in range(len(multipliers)) if rng.random() < 0.3)
    model = IdentityFirstStage() if seed % 3 == 2 else small(("kl", "vq")[seed % 3], multipliers, factors)
    f, norms = model.f, rng.choice(NORMS)
    tile, height, width = f * rng.randint(2, 8), f * rng.randint(1, 20), f * rng.randint(1, 20)
    overlap = f * rng.randint(0, tile // f - 1)
    x = pictures(height, width, b=2)
    z = encode_tiled(model, x, torch.randn(2, 3, height // f, width // f), tile=tile, overlap=overlap, norms=norms)
    back = decode_tiled(model, z, tile=tile, overlap=overlap, norms=norms)
    assert z.shape == (2, 3, height // f, width // f) and back.shape == x.shape
    assert z.isfinite().all() and back.isfinite().all()
    if f == 1 and isinstance(model, IdentityFirstStage):
        torch.testing.assert_close(back, x)


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("size", [(40, 64), (64, 48), (64, 64)])
def test_what_fits_one_tile_is_the_whole_to_the_last_bit(kind, size):
    model, x = small(kind), pictures(*size)
    noise = torch.randn(1, 3, size[0] // 4, size[1] // 4)
    with torch.no_grad():
        for eps in (None, noise):
            z = encode_tiled(model, x, eps, tile=64, overlap=16)
            assert torch.equal(z, model.encode(x, eps))
        assert torch.equal(decode_tiled(model, z, tile=64, overlap=16), model.decode(z))


@pytest.mark.parametrize("kind, factors", [("kl", ()), ("vq", ()), ("kl", (4,)), ("kl", (2, 4))])
@pytest.mark.parametrize("height, width", [(64, 300), (300, 96), (188, 180)])
def test_convolutions_and_attention_are_exact(kind, factors, height, width):
    """f = 4 with one block reaches 32 pixels at most; three eighths of 96 are 36."""
    model, x = small(kind, factors=factors), pictures(height, width, b=2)
    noise = torch.randn(2, 3, height // 4, width // 4)
    with as_the_whole(model, lambda: model.encode(x, noise), lambda: model.decode(noise)) as (z, back):
        tiled = encode_tiled(model, x, noise, tile=112, overlap=96, norms="tile")
        torch.testing.assert_close(tiled, z, rtol=1e-4, atol=1e-4)
        tiled = decode_tiled(model, noise, tile=112, overlap=96, norms="tile")
        torch.testing.assert_close(tiled, back, rtol=1e-4, atol=1e-4)


def test_attention_at_full_resolution_leaves_nothing_to_cut():
    model, x = small(factors=(1, 2)), pictures(48, 40)
    with torch.no_grad():
        z = model.encode(x)
        torch.testing.assert_close(encode_tiled(model, x, tile=16), z, rtol=1e-4, atol=1e-4)


SHIPPED = [("toy-text2image", 208, 176), ("toy-kl-f4", 160, 120), ("toy-vq-f4", 160, 120)]


@pytest.mark.parametrize("name, size, tile", SHIPPED)
def test_shipped_first_stages_are_within_a_grey_level_of_the_whole(name, size, tile):
    """An overlap of 16 f, which is the default, statistics of the whole."""
    model, scene = load_first_stage(name), ToyCOCO("test", size=size)[5]["image"][None]
    arguments = dict(tile=tile, overlap=16 * model.f, norms="tile")
    with torch.no_grad():
        z = model.encode(scene)
        with as_the_whole(model, lambda: model.encode(scene), lambda: model.decode(z)) as (latent, back):
            assert (encode_tiled(model, scene, **arguments) - latent).abs().max() < LEVEL
            assert (decode_tiled(model, z, **arguments) - back).abs().max() < LEVEL


def test_the_default_overlap_is_sixteen_f_and_at_most_half_a_tile():
    model, z = small(), torch.randn(1, 3, 60, 40)
    for tile, overlap in ((160, 64), (120, 60), (88, 44)):
        assert torch.equal(decode_tiled(model, z, tile=tile), decode_tiled(model, z, tile=tile, overlap=overlap))


def test_a_thumbnail_gives_what_the_whole_knows():
    """A bright and a dark half: a tile cannot know what the other half is like."""
    model = small()
    x = torch.cat([pictures(64, 128) * 0.1 - 0.8, pictures(64, 128) * 0.5 + 0.5], 3)
    with torch.no_grad():
        z = model.encode(x)
    tile, thumbnail = (encode_tiled(model, x, tile=64, overlap=32, norms=norms) for norms in ("tile", "thumbnail"))
    assert (thumbnail - z).abs().mean() < (tile - z).abs().mean()


def test_pictures_of_a_batch_do_not_meet():
    model, x = small(), pictures(64, 96, b=3)
    together = encode_tiled(model, x, tile=32, overlap=8)
    alone = torch.cat([encode_tiled(model, one[None], tile=32, overlap=8) for one in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_draw_is_a_draw_of_the_whole():
    model, x = small(), pictures(64, 96)
    noise = torch.randn(1, 3, 16, 24)
    mean, once, twice = (encode_tiled(model, x, eps, tile=32, overlap=16) for eps in (None, noise, 2 * noise))
    torch.testing.assert_close(twice - mean, 2 * (once - mean), rtol=1e-3, atol=1e-4)
    assert ((once - mean) * noise >= -1e-5).all(), "a standard deviation is not negative"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_is_kept(dtype):
    model, x = small().to(dtype), pictures(64, 96).to(dtype)
    z = encode_tiled(model, x, tile=32, overlap=16)
    back = decode_tiled(model, z, tile=32, overlap=16)
    assert z.dtype == back.dtype == dtype and back.isfinite().all()


def test_a_model_on_a_device_and_a_picture_on_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model, x = small(), pictures(64, 96)
    here = decode_tiled(model, encode_tiled(model, x, tile=32), tile=32)
    there = decode_tiled(model.cuda(), encode_tiled(model, x, tile=32), tile=32)
    assert there.device.type == "cpu"
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-2)


# --- Memory ---


def largest(model: nn.Module, run) -> int:
    """Elements of the largest output of any layer."""
    sizes = []
    with ExitStack() as stack:
        for layer in model.modules():
            stack.callback(layer.register_forward_hook(lambda _, args, out: sizes.append(out.numel())).remove)
        run()
    return max(sizes)


@pytest.mark.parametrize("norms", NORMS)
def test_activations_at_full_resolution_do_not_grow_with_the_picture(norms):
    """Of a tile 8 numbers a pixel (encoder) and 16 (decoder); of the image one: 16 channels at the latent's size."""
    model = small()
    for side in (64, 256, 512):
        x, z = pictures(side, side), torch.randn(1, 3, side // 4, side // 4)
        encoding = largest(model, lambda: encode_tiled(model, x, tile=64, overlap=16, norms=norms))
        decoding = largest(model, lambda: decode_tiled(model, z, tile=64, overlap=16, norms=norms))
        assert encoding == max(8 * 64**2, side**2) and decoding == max(16 * 64**2, side**2)


def test_nothing_is_kept_for_gradients():
    model, x = small(), pictures(32, 64).requires_grad_()
    z = encode_tiled(model, x, tile=32, overlap=8)
    assert not z.requires_grad and not decode_tiled(model, z, tile=32, overlap=8).requires_grad


# --- The switches ---


def test_switches_leave_no_trace():
    model, x = small(), pictures(32, 32)
    with torch.no_grad():
        before = model.encode(x)
        with pytest.raises(ZeroDivisionError), recorded_norms(model) as norms:
            model.encode(pictures(32, 48))
            1 / 0
        with pytest.raises(ZeroDivisionError), fixed_norms(norms):
            assert not torch.allclose(model.encode(x), before)
            1 / 0
        assert torch.equal(model.encode(x), before)
    assert not any(layer._forward_hooks for layer in model.modules())


@pytest.mark.parametrize("seed", range(5))
def test_own_statistics_change_nothing(seed):
    rng = random.Random(seed)
    groups = rng.choice((1, 2, 4))
    norm = nn.GroupNorm(groups, groups * rng.randint(1, 4), eps=1e-6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, norm.num_channels, 5, 7) * 3 + 1
    with recorded_norms(norm) as norms:
        expected = norm(x)
    with fixed_norms(norms):
        torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm(x[..., :3]), expected[..., :3], rtol=1e-4, atol=1e-5)


# --- Errors ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(tile=30), "tile: 30 pixels.*multiple of f = 4"),
        (dict(tile=0), "tile: 0 pixels.*at least 4"),
        (dict(tile=-4), "tile=-4 should be"),
        (dict(tile=32, overlap=6), "overlap: 6 pixels.*multiple of f = 4"),
        (dict(tile=32, overlap=-4), "overlap=-4 should be.*at least 0"),
        (dict(tile=32, overlap=32), "overlap: 32 pixels.*less than tile"),
        (dict(norms="whole"), "norms: 'whole'.*'thumbnail', 'tile'"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    model = small()
    with pytest.raises(LDMError, match=message):
        encode_tiled(model, pictures(32, 32), **arguments)
    with pytest.raises(LDMError, match=message):
        decode_tiled(model, torch.randn(1, 3, 8, 8), **arguments)


def test_refuses_odd_pictures_and_noise():
    model = small()
    with pytest.raises(LDMError, match="multiples of f = 4"):
        encode_tiled(model, pictures(32, 34), tile=32)
    with pytest.raises(LDMError, match=r"noise: shape \(1, 3, 8, 7\).*\(1, 3, 8, 8\)"):
        encode_tiled(model, pictures(32, 32), torch.randn(1, 3, 8, 7))


# --- diffusers ---


@pytest.mark.parametrize("name, tile", [("toy-text2image", 128), ("toy-kl-f4", 96)])
def test_closer_to_the_whole_than_diffusers_tiles(tmp_path, name, tile):
    """The same weights, tiles and overlap, each with its own statistics: less than 0.6 of the distance, either way."""
    from diffusers import AutoencoderKL as Theirs

    ours = load_first_stage(name)
    save_diffusers(ours, tmp_path)
    theirs = Theirs.from_pretrained(tmp_path).eval()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = tile, tile // ours.f
    overlap = int(tile * theirs.tile_overlap_factor)
    x = torch.stack([ToyCOCO("test", size=224)[i]["image"] for i in range(2)])
    with torch.no_grad():
        z = ours.encode(x)
        whole, raw = ours.decode(z), z / ours.scale_factor
        torch.testing.assert_close(theirs.decode(raw).sample, whole, rtol=1e-3, atol=1e-3)
        theirs.enable_tiling()
        theirs_z, theirs_x = theirs.encode(x).latent_dist.mean * ours.scale_factor, theirs.decode(raw).sample
    ours_z, ours_x = (run(ours, y, tile=tile, overlap=overlap) for run, y in ((encode_tiled, x), (decode_tiled, z)))
    assert theirs_z.shape == z.shape and theirs_x.shape == x.shape
    assert not torch.equal(theirs_x, whole), "diffusers did not cut"
    assert (ours_z - z).abs().mean() < 0.6 * (theirs_z - z).abs().mean()
    assert (ours_x - whole).abs().mean() < 0.6 * (theirs_x - whole).abs().mean()
