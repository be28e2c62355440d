"""ldm_edu.conditioning.spatial: maps stacked on the latent, holes, parts that are dropped apart; keys of the data."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_edu import (
    AttributesConditioner,
    AutoencoderKL,
    CheckpointError,
    ClassConditioner,
    Condition,
    Conditioner,
    DataError,
    IdentityFirstStage,
    InpaintingConditioner,
    LatentDiffusion,
    LDMError,
    MapConditioner,
    MergedConditioner,
    NoiseSchedule,
    UNet,
    cached,
    drop,
    load_first_stage,
    open_dataset,
)
from ldm_edu.checkpoints import weights_checksum
from ldm_edu.conditioning.guidance import drop_apart
from ldm_edu.conditioning.spatial import shrink
from ldm_edu.data.registry import known_keys
from ldm_edu.files import load_json, save_json


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def classes(*shape: int, most: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(a: Condition, b: Condition) -> None:
    assert a.slots().keys() == b.slots().keys() and a.slots()
    assert all(torch.equal(v, b.slots()[name]) for name, v in a.slots().items())


# ---- shrink


@pytest.mark.parametrize("seed", range(6))
def test_factor_4_is_two_bilinear_halvings(seed):
    """The released code's SpatialRescaler halves its map by bilinear interpolation, as often as it is told."""
    x = numbers(2, 3, 8 * (1 + seed), 16, seed=seed).double()
    half = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="bilinear"), scale_factor=0.5, mode="bilinear")
    torch.testing.assert_close(shrink(x, 4), half, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(shrink(x, 2), F.interpolate(x, scale_factor=0.5, mode="bilinear"), atol=1e-12, rtol=0)


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
def test_it_is_the_mean_of_every_block(factor):
    x = numbers(2, 3, 2 * factor, 3 * factor).double()
    means = [
        [x[..., i : i + factor, j : j + factor].mean((2, 3)) for j in range(0, 3 * factor, factor)] for i in (0, factor)
    ]
    torch.testing.assert_close(shrink(x, factor), torch.stack([torch.stack(row, -1) for row in means], -2))


@pytest.mark.parametrize("h, w", [(6, 8), (8, 6), (2, 2)])
def test_blocks_that_do_not_cover_the_map_are_refused(h, w):
    with pytest.raises(LDMError, match=f"the map is {h} × {w}, but both sides should be multiples of 4"):
        shrink(numbers(1, 3, h, w), 4)


# ---- maps

MAPS = {
    "low resolution": (dict(key="low_resolution"), dict(low_resolution=numbers(3, 3, 8, 8)), 3, 8),
    "segmentation": (dict(key="segmentation", classes=4, factor=4), dict(segmentation=classes(3, 16, 16)), 4, 4),
    "projected": (
        dict(key="segmentation", classes=4, factor=2, out_channels=3),
        dict(segmentation=classes(3, 16, 16)),
        3,
        8,
    ),
    "depth": (
        dict(key="depth", channels=1, factor=2, per_image=True, has_null=True),
        dict(depth=numbers(3, 1, 16, 16)),
        1,
        8,
    ),
    "all": (
        dict(key="depth", channels=2, factor=4, out_channels=5, per_image=True, has_null=True),
        dict(depth=numbers(3, 2, 16, 16)),
        5,
        4,
    ),
}


@pytest.fixture(params=MAPS)
def made(request) -> SimpleNamespace:
    arguments, batch, channels, side = MAPS[request.param]
    torch.manual_seed(0)
    part = MapConditioner(**arguments)
    if part.none is not None:
        torch.nn.init.normal_(part.none)
    return SimpleNamespace(part=part, batch=batch, channels=channels, side=side)


def test_shapes_are_those_it_declares(made):
    cond = made.part(made.batch)
    assert cond.concat.shape == (3, made.channels, made.side, made.side) and cond.slots().keys() == {"concat"}
    assert made.part.concat_channels == made.channels and made.part.keys == tuple(made.batch)
    assert made.part.context_dim is None and made.part.vector_dim is None


def test_a_batch_of_n_equals_n_batches_of_one(made):
    together = made.part(made.batch).concat
    for i in range(3):
        alone = made.part({key: value[i : i + 1] for key, value in made.batch.items()}).concat
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=1e-6)


def test_saved_and_loaded_it_gives_the_same_condition(made, tmp_path):
    made.part.save_pretrained(tmp_path)
    again = Conditioner.from_pretrained(tmp_path)
    assert type(again) is MapConditioner and again.keys == made.part.keys
    assert_same(again(made.batch), made.part(made.batch))
    assert again.null().slots().keys() == made.part.null().slots().keys()


def test_the_null_is_one_pixel_for_all_or_no_slot(made):
    part, cond, u = made.part, made.part(made.batch), torch.tensor([0.0, 0.4, 0.9])
    if part.none is None:
        assert part.null(2).slots() == {}
        return
    assert part.null(2).concat.shape == (2, made.channels, 1, 1) and part.null(1).concat.requires_grad
    dropped = drop(cond, part.null(), 1, u)
    assert torch.equal(dropped.concat, part.none.expand(3, -1, made.side, made.side))
    assert torch.equal(drop(cond, part.null(), 0.5, u).concat[2], cond.concat[2])
    dropped.concat.sum().backward()
    assert (part.none.grad == 3 * made.side**2).all()


def test_a_batch_without_its_key_is_refused(made):
    with pytest.raises(LDMError, match=f"has no '{made.part.keys[0]}', only image"):
        made.part({"image": numbers(1, 3, 8, 8)})


def test_a_low_resolution_image_is_stacked_as_it_is():
    x = numbers(2, 3, 8, 8)
    assert torch.equal(MapConditioner("low_resolution")({"low_resolution": x}).concat, x)


def test_a_segmentation_becomes_shares_of_its_classes():
    ids = classes(2, 8, 8)
    cond = MapConditioner("segmentation", classes=5, factor=4)({"segmentation": ids})
    for kind in range(5):
        share = (ids == kind).float().unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4))
        assert torch.equal(cond.concat[:, kind], share)
    assert torch.equal(cond.concat.sum(1), torch.ones(2, 2, 2))


def test_a_projection_is_a_1x1_convolution_without_bias():
    part, ids = MapConditioner("segmentation", classes=4, factor=2, out_channels=3), classes(2, 8, 8)
    plain = MapConditioner("segmentation", classes=4, factor=2)({"segmentation": ids}).concat
    by_hand = torch.einsum("bchw,oc->bohw", plain, part.project.weight[..., 0, 0])
    torch.testing.assert_close(part({"segmentation": ids}).concat, by_hand)
    assert [*dict(part.named_parameters())] == ["project.weight"]
    part({"segmentation": ids}).concat.sum().backward()
    torch.testing.assert_close(part.project.weight.grad[0, :, 0, 0], plain.sum((0, 2, 3)))


@pytest.mark.parametrize("gain, shift", [(1.0, 0.0), (7.0, 3.0), (0.01, -5.0)])
def test_a_depth_means_nothing_across_images(gain, shift):
    part, depth = MapConditioner("depth", channels=1, per_image=True), numbers(3, 1, 8, 8).double()
    found = part({"depth": depth}).concat
    assert (found.amin((1, 2, 3)) == -1).all() and (found.amax((1, 2, 3)) == 1).all()
    torch.testing.assert_close(part({"depth": gain * depth + shift}).concat, found)
    assert not part({"depth": torch.full((2, 1, 8, 8), shift)}).concat.any()  # a wall in front of the camera


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_a_segmentation_may_have_any_whole_numbers(dtype):
    part, ids = MapConditioner("segmentation", classes=4), classes(2, 8, 8)
    assert_same(part({"segmentation": ids.to(dtype)}), part({"segmentation": ids}))


NO_MAPS = {
    "no batch": (dict(key="depth", channels=1), numbers(1, 8, 8), r"depth should have the shape \(b, 1, h, w\)"),
    "channels": (dict(key="depth", channels=1), numbers(2, 3, 8, 8), r"depth should have the shape \(b, 1, h, w\)"),
    "bytes": (
        dict(key="low_resolution"),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        "low_resolution should hold float",
    ),
    "a list": (dict(key="low_resolution"), [numbers(3, 8, 8)], "low_resolution should be a tensor"),
    "numpy": (dict(key="low_resolution"), numbers(2, 3, 8, 8).numpy(), "low_resolution should be a tensor"),
    "a text": (dict(key="low_resolution"), "small.png", "low_resolution should be a tensor"),
    "nothing": (dict(key="low_resolution"), None, "low_resolution should be a tensor"),
    "no pixels": (dict(key="low_resolution"), numbers(2, 3, 0, 8), "low_resolution has the shape .* at least 1"),
    "class 4": (dict(key="segmentation", classes=4), 1 + classes(1, 8, 8), r"segmentation should lie in \[0, 4\)"),
    "class -1": (dict(key="segmentation", classes=4), classes(1, 8, 8) - 1, "segmentation should lie in"),
    "no ids": (dict(key="segmentation", classes=4), numbers(1, 8, 8), "segmentation should be whole numbers"),
    "nan": (
        dict(key="segmentation", classes=4),
        torch.full((1, 8, 8), torch.nan),
        "segmentation should be whole numbers",
    ),
    "one hot": (dict(key="segmentation", classes=4), classes(1, 4, 8, 8), "segmentation should be whole numbers"),
    "a name": (dict(key="segmentation", classes=4), "sky", "segmentation should be whole numbers"),
}


@pytest.mark.parametrize("case", NO_MAPS)
def test_what_is_no_map_is_refused(case):
    arguments, value, message = NO_MAPS[case]
    with pytest.raises(LDMError, match=message):
        MapConditioner(**arguments)({arguments["key"]: value})


SIDES = [(dict(key="depth", channels=1), numbers(1, 1, 6, 8)), (dict(key="segmentation", classes=4), classes(1, 8, 6))]


@pytest.mark.parametrize("arguments, value", SIDES)
def test_sides_that_are_no_multiple_of_the_factor_are_refused_by_name(arguments, value):
    with pytest.raises(LDMError, match=arguments["key"]):
        MapConditioner(**arguments, factor=4)({arguments["key"]: value})


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_map_that_is_not_finite_is_refused(value, per_image):
    x = numbers(1, 1, 8, 8)
    x[0, 0, 0, 0] = value
    with pytest.raises(LDMError, match="depth"):
        MapConditioner("depth", channels=1, per_image=per_image)({"depth": x})


def test_a_depth_in_half_precision_is_scaled_to_the_ends():
    x = torch.tensor([[[[-60_000.0, 60_000.0]]]], dtype=torch.float16)
    found = MapConditioner("depth", channels=1, per_image=True)({"depth": x}).concat
    assert found.flatten().tolist() == [-1, 1]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(channels=0), "channels=0"),
        (dict(classes=0), "classes=0"),
        (dict(factor=0), "factor=0"),
        (dict(factor=1.5), "factor"),
        (dict(out_channels=0), "out_channels=0"),
        (dict(per_image=1), "per_image"),
        (dict(has_null="yes"), "has_null"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments, named):
    with pytest.raises((LDMError, TypeError), match=named):  # TypeError: from beartype, where types are checked
        MapConditioner("depth", **arguments)


def test_classes_of_a_map_are_counted_where_the_recipe_says_0():
    column = {"segmentation": [classes(8, 8, most=3), torch.full((8, 8), 6)]}.get
    counted = MapConditioner.complete({"key": "segmentation", "classes": 0}, column)
    assert counted == {"key": "segmentation", "classes": 7}
    assert MapConditioner.complete({"key": "depth"}, column) == {"key": "depth"}
    assert MapConditioner.complete({"key": "segmentation", "classes": 9}, column)["classes"] == 9


# ---- holes


def stage(**more) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(channels=8, multipliers=(1, 2, 2), blocks=1, latent_channels=3, groups=4, **more).eval()


def hole(b: int = 2, size: int = 16) -> dict[str, Tensor]:
    mask = torch.zeros(b, 1, size, size)
    mask[:, :, 3:9, 2:14] = 1
    return {"image": numbers(b, 3, size, size), "mask": mask}


@pytest.mark.parametrize("seed", range(4))
def test_what_the_mask_hides_has_no_influence(seed):
    part, batch = InpaintingConditioner(stage()), hole()
    changed = torch.where(batch["mask"] > 0, 16 * numbers(2, 3, 16, 16, seed=9 + seed), batch["image"])
    assert_same(part(batch | {"image": changed}), part(batch))
    seen = batch["image"].clone()
    seen[:, :, 0, 0] += 0.5
    assert not torch.equal(part(batch | {"image": seen}).concat, part(batch).concat)


def test_it_is_the_latent_of_what_is_known_and_the_mask():
    first_stage, batch = stage(scale_factor=0.7), hole()
    part = InpaintingConditioner(first_stage)
    black = torch.where(batch["mask"].bool(), torch.tensor(-1.0), batch["image"])
    with torch.no_grad():
        known = first_stage.encode(black)
    mask = 2 * batch["mask"][:, :, ::4, ::4] - 1  # the nearest pixel of each cell of 4 × 4
    assert torch.equal(part(batch).concat, torch.cat([known, mask], 1))
    assert part.concat_channels == 4 and part.keys == ("image", "mask") and part.null(2).slots() == {}


def test_the_mask_says_what_is_hidden_wherever_it_lies():
    part = InpaintingConditioner(IdentityFirstStage())
    batch = {"image": numbers(2, 3, 8, 8), "mask": torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    cond = part(batch).concat
    assert torch.equal(cond[:, 3:] == 1, batch["mask"] >= 0.5) and set(cond[:, 3:].unique().tolist()) == {-1, 1}
    assert torch.equal(cond[:, :3] == -1, (batch["mask"] >= 0.5).expand(-1, 3, -1, -1))


def test_a_batch_of_holes_equals_batches_of_one():
    part, batch = InpaintingConditioner(stage()), hole(3)
    for i in range(3):
        alone = part({key: value[i : i + 1] for key, value in batch.items()}).concat
        torch.testing.assert_close(part(batch).concat[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_the_first_stage_is_frozen_and_saved_with_it(tmp_path):
    part = InpaintingConditioner("toy-vq-f4")
    part.train()
    assert part.training and not any(m.training for m in part.first_stage.modules())
    assert not any(p.requires_grad for p in part.parameters()) and not part(hole()).concat.requires_grad
    part.save_pretrained(tmp_path)
    again = Conditioner.from_pretrained(tmp_path)
    assert type(again.first_stage) is type(load_first_stage("toy-vq-f4"))
    assert_same(again(hole()), part(hole()))
    assert not any(p.requires_grad for p in again.parameters())


def test_a_thin_scratch_is_a_hole_where_any_pixel_counts():
    scratch = {"image": numbers(1, 3, 16, 16), "mask": torch.zeros(1, 1, 16, 16)}
    scratch["mask"][..., 6] = 1
    nearest, every = InpaintingConditioner(stage()), InpaintingConditioner(stage(), rule="any")
    assert (nearest(scratch).concat[:, -1] == -1).all()
    assert torch.equal(every(scratch).concat[0, -1] == 1, torch.tensor([False, True, False, False]).expand(4, 4))
    with pytest.raises(LDMError, match="rule='both' is not known; it can be 'nearest', 'any'"):
        InpaintingConditioner(stage(), rule="both")


def named(name: str) -> tuple[InpaintingConditioner, dict[str, str]]:
    """A conditioner with the first stage of a shipped checkpoint, and how that is named."""
    found = load_first_stage(name)
    return InpaintingConditioner(found, rule="any"), {"name": name, "checksum": weights_checksum(found)}


def test_a_shared_first_stage_is_named_and_not_saved(tmp_path):
    part, shared = named("toy-kl-f4")
    batch = {"image": numbers(2, 3, 32, 32), "mask": torch.zeros(2, 1, 32, 32)}
    batch["mask"][..., :9] = 1
    before = part(batch)
    part.share_first_stage(shared)
    assert part.state_dict() == {} and part.config == {"first_stage": shared, "rule": "any"}
    part.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1000
    again = Conditioner.from_pretrained(tmp_path)
    assert_same(again(batch), before)
    again.share_first_stage(None)
    again.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size > 1e6
    assert_same(Conditioner.from_pretrained(tmp_path / "whole")(batch), before)


def test_another_first_stage_is_not_taken_for_the_named_one(tmp_path):
    part, shared = named("toy-kl-f4")
    part.share_first_stage({**shared, "checksum": "0" * 16})
    assert part.shared is None and part.state_dict()
    part.share_first_stage(shared)
    part.save_pretrained(tmp_path)
    config = load_json(tmp_path / "config.json")
    save_json({**config, "first_stage": {**shared, "checksum": "0" * 16}}, tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="the first stage of 'toy-kl-f4' is not the one"):
        Conditioner.from_pretrained(tmp_path)
    save_json({**config, "first_stage": {"name": "toy-kl-f4"}}, tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="'name' and 'checksum'"):
        Conditioner.from_pretrained(tmp_path)


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_that_names_its_first_stage_names_it_in_the_conditioner(tmp_path, merged):
    part, shared = named("toy-kl-f4")
    conditioner = MergedConditioner([part, MapConditioner("low_resolution")]) if merged else part
    unet = UNet(3, 3, 32, (1,), 1, (), concat_channels=conditioner.concat_channels)
    schedule = NoiseSchedule(kind="cosine", prediction="v")
    model = LatentDiffusion(load_first_stage("toy-kl-f4"), unet, schedule, conditioner, 32).eval()
    batch = {"image": numbers(1, 3, 32, 32), "mask": torch.ones(1, 1, 32, 32), "low_resolution": numbers(1, 3, 8, 8)}
    batch = {key: batch[key] for key in conditioner.keys}
    drawn = model.sample(batch, steps=2)
    for first_stage in ("toy-kl-f4", None):
        model.save_pretrained(tmp_path / str(first_stage), first_stage=first_stage)
        size = (tmp_path / str(first_stage) / "conditioner" / "model.safetensors").stat().st_size
        assert (size < 1000) == (first_stage is not None)
        assert torch.equal(LatentDiffusion.from_pretrained(tmp_path / str(first_stage)).sample(batch, steps=2), drawn)


IMAGE, MASK = hole()["image"], hole()["mask"]
NO_HOLES = {
    "another size": (
        IMAGE,
        MASK[..., :8, :8],
        r"mask should have the shape \(2, 1, 16, 16\), as the image has it, not \(2, 1, 8, 8\)",
    ),
    "one mask for two": (IMAGE, MASK[:1], r"mask should have the shape .* not \(1, 1, 16, 16\)"),
    "three channels": (IMAGE, MASK.expand(-1, 3, -1, -1), "mask should have the shape"),
    "no channel": (IMAGE, MASK[:, 0], "mask should have the shape"),
    "no mask": (IMAGE, None, "mask should have the shape"),
    "no image": (None, MASK, "image should be a tensor"),
    "bytes": (IMAGE.to(torch.uint8), MASK, "image should hold floating-point numbers"),
    "0 to 255": (IMAGE * 255, MASK, r"image should be images in \[-1, 1\]"),
    "nan": (IMAGE * torch.nan, MASK, r"image should be images in \[-1, 1\]"),
    "grey": (IMAGE[:, :1], MASK, "image should have the shape"),
}


@pytest.mark.parametrize("case", NO_HOLES)
def test_what_is_no_picture_with_a_hole_is_refused(case):
    image, mask, message = NO_HOLES[case]
    with pytest.raises(LDMError, match=message):
        InpaintingConditioner(IdentityFirstStage())({"image": image, "mask": mask})


@pytest.mark.parametrize("key", ["image", "mask"])
def test_a_picture_or_a_mask_that_is_missing_is_named(key):
    batch = hole()
    del batch[key]
    with pytest.raises(LDMError, match=f"has no '{key}', only"):
        InpaintingConditioner(IdentityFirstStage())(batch)


def test_a_picture_that_the_first_stage_cannot_halve_is_named():
    with pytest.raises(LDMError, match="image"):
        InpaintingConditioner(stage())({"image": numbers(1, 3, 14, 16), "mask": torch.zeros(1, 1, 14, 16)})


@pytest.mark.parametrize("value", [torch.nan, -7.0, 255.0])
def test_a_mask_that_is_neither_0_nor_1_is_refused(value):
    with pytest.raises(LDMError, match="mask"):
        InpaintingConditioner(IdentityFirstStage())({"image": IMAGE, "mask": MASK * 0 + value})


def test_a_first_stage_that_does_not_exist_is_named():
    with pytest.raises(LDMError, match="'no-such-stage'; shipped: .*toy-vq-f4"):
        InpaintingConditioner("no-such-stage")


# ---- several, dropped apart


def pair(null: bool = True) -> MergedConditioner:
    torch.manual_seed(0)
    depth = MapConditioner("depth", channels=1, factor=2, has_null=null)
    if null:
        torch.nn.init.normal_(depth.none)
    return MergedConditioner([depth, ClassConditioner(5, 8)])


def two_keys(b: int) -> dict[str, Tensor]:
    return {"depth": numbers(b, 1, 8, 8), "class": classes(b, most=5)}


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropped_apart_equals_dropped_by_hand(p):
    both, batch = pair(), two_keys(9)
    u = torch.rand(9, 2, generator=torch.Generator().manual_seed(0))
    mixed = drop_apart(both, batch, p, u)
    alone = [drop(part(batch), part.null(), p, u[:, k]) for k, part in enumerate(both.parts)]
    assert torch.equal(mixed.concat, alone[0].concat) and torch.equal(mixed.context, alone[1].context)
    if p == 0:
        assert_same(mixed, both(batch))


def test_each_part_is_dropped_as_often_as_it_should():
    both, batch, n, p = pair(), two_keys(4000), 4000, 0.2
    mixed = drop_apart(both, batch, p, torch.rand(n, 2, generator=torch.Generator().manual_seed(0)))
    maps = (mixed.concat == both.parts[0].none).flatten(1).all(1)
    tokens = (mixed.context == both.parts[1].embedding.weight[-1]).flatten(1).all(1)
    for lost, share in {maps: p, tokens: p, maps & tokens: p * p, maps & ~tokens: p * (1 - p)}.items():
        assert abs(lost.float().mean().item() - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_a_part_that_is_never_dropped_stays():
    both, batch = pair(null=False), two_keys(5)
    mixed = drop_apart(both, batch, 1.0, torch.zeros(5, 2))
    assert torch.equal(mixed.concat, both(batch).concat)
    assert torch.equal(mixed.context, both.parts[1].null(5).context)


def test_contexts_of_both_stand_side_by_side_when_one_is_dropped():
    both = MergedConditioner([ClassConditioner(5, 8), AttributesConditioner(3, 8)])
    batch = {"class": classes(2, most=5), "attributes": torch.ones(2, 3)}
    mixed = drop_apart(both, batch, 0.5, torch.tensor([[0.0, 0.9], [0.9, 0.0]]))
    whole, null = both(batch).context, both.null(2).context
    assert torch.equal(mixed.context[0], torch.cat([null[0, :1], whole[0, 1:]]))
    assert torch.equal(mixed.context[1], torch.cat([whole[1, :1], null[1, 1:]]))


# ---- keys of the data


@pytest.mark.parametrize("name", ["toy", "toy-faces", "celeba", "coco", "folder"])
def test_every_data_set_has_a_low_resolution_and_a_mask(name):
    assert {"image", "low_resolution", "mask"} <= set(known_keys(name))
    assert len(set(known_keys(name))) == len(known_keys(name))


@pytest.mark.parametrize("name", ["toy", "toy-faces"])
def test_they_are_made_of_the_image_and_the_same_every_time(name):
    keys = ("mask", "image", "low_resolution")
    data, again = (open_dataset(name, size=32, keys=keys) for _ in range(2))
    samples = data.__getitems__([3, 0, 7])
    for i, sample in zip([3, 0, 7], samples, strict=True):
        assert tuple(sample) == keys and all(torch.equal(sample[key], again[i][key]) for key in keys)
        assert sample["low_resolution"].shape == (3, 8, 8) and sample["mask"].shape == (1, 32, 32)
        assert set(sample["mask"].unique().tolist()) <= {0, 1} and 0 < sample["mask"].mean() < 1
        small = F.interpolate(sample["image"][None], scale_factor=0.25, mode="bicubic", antialias=True)[0]
        torch.testing.assert_close(sample["low_resolution"], small.clamp(-1, 1), atol=0.01, rtol=0)
        plain = open_dataset(name, size=32, keys=("image",))[i]["image"]
        assert torch.equal(sample["image"], plain)
    assert not torch.equal(samples[0]["mask"], samples[1]["mask"])


def test_the_image_itself_need_not_be_asked_for():
    assert [*open_dataset("toy", size=32, keys=("mask", "caption"))[0]] == ["mask", "caption"]


def test_splits_and_seeds_have_other_masks():
    train, validation = (
        open_dataset("toy", split=split, size=32, keys=("image", "mask")) for split in ("train", "validation")
    )
    other = open_dataset("toy", split="train", size=32, seed=9, keys=("mask",))
    for data in (validation, other):
        assert not any(torch.equal(train[i]["mask"], data[i]["mask"]) for i in range(3))


def test_their_identity_says_which_keys():
    plain = open_dataset("toy", size=32, keys=("image",)).identity()
    one, two = (open_dataset("toy", size=32, keys=("image", *more)) for more in (("mask",), ("mask", "low_resolution")))
    assert one.identity() != two.identity() != plain != one.identity()
    assert two.identity()["keys"] == ["image", "mask", "low_resolution"] and "derived" not in plain
    assert one.identity() == open_dataset("toy", size=32, keys=["image", "mask"]).identity()


def test_they_are_cached(tmp_path):
    data = open_dataset("toy", size=32, length=6, keys=("image", "mask", "low_resolution"))
    cache = cached(data, tmp_path / "cache", 5, block=2)
    batch = cache.batch([4, 1])
    for row, i in enumerate((4, 1)):
        assert all(torch.equal(batch[key][row], data[i][key]) for key in ("mask", "low_resolution"))
    assert cached(data, tmp_path / "cache", 5, block=2).checksum == cache.checksum
    with pytest.raises(DataError, match="cache of something else .*keys"):
        cached(open_dataset("toy", size=32, length=6, keys=("image", "mask")), tmp_path / "cache", 5)


def test_attributes_keep_their_names_beside_a_mask(tmp_path):
    data = open_dataset("toy-faces", size=32, length=4, keys=("attributes", "mask"))
    assert len(cached(data, tmp_path / "cache").attribute_names) == 16


@pytest.mark.parametrize("size, key", [(30, "low_resolution"), (2, "low_resolution")])
def test_an_image_that_cannot_be_made_smaller_is_named(size, key):
    with pytest.raises(DataError, match=key):
        open_dataset("toy", size=size, keys=(key,))[0]


def test_unknown_keys_and_samples_are_refused():
    with pytest.raises(DataError, match="keys should be a list of some of .*not masks"):
        open_dataset("toy", keys=("mask", "masks"))
    with pytest.raises(IndexError, match="index 5"):
        open_dataset("toy", length=5, size=16, keys=("mask",))[5]
    assert len(open_dataset("toy", length=5, keys=("mask",))) == 5
