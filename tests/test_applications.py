"""upscale, inpaint and draw: sizes, padding, seeds, what is kept to the bit, what is left out, what is refused."""

import copy

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.nn import functional as F

from ldm_edu import (
    AutoencoderKL,
    ClassConditioner,
    Conditioner,
    Guidance,
    IdentityFirstStage,
    InpaintingConditioner,
    LatentDiffusion,
    LDMError,
    MapConditioner,
    MergedConditioner,
    NoiseSchedule,
    SeededNoise,
    TextConditioner,
    UNet,
    ddim,
    draw,
    inpaint,
    last,
    upscale,
)
from ldm_edu.conditioning.guidance import drop_apart

REFUSED = (LDMError, TypeCheckError)  # here the checks of the signatures stop some wrong shapes already
FEW = dict(steps=2, seed=5)


def images(b: int, h: int, w: int, seed: int = 0) -> Tensor:
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def classes(b: int, h: int, w: int, most: int = 4) -> Tensor:
    return torch.randint(most, (b, h, w), generator=torch.Generator().manual_seed(1))


def depths(b: int, h: int, w: int) -> Tensor:
    return 5 + 10 * torch.rand(b, 1, h, w, generator=torch.Generator().manual_seed(2))


def first_stage(f: int = 4) -> AutoencoderKL:
    levels = (1,) * f.bit_length()
    return AutoencoderKL(channels=8, multipliers=levels, blocks=1, latent_channels=2, attention=False, groups=4)


def small(conditioner: Conditioner | None, f: int = 4) -> LatentDiffusion:
    """An untrained model of images of 16², whose UNet halves the latent once and reads all of its input."""
    torch.manual_seed(0)
    stage = first_stage(f)
    slots = dict.fromkeys(("context_dim", "concat_channels", "vector_dim"))
    slots = {name: getattr(conditioner, name, None) for name in slots}
    unet = UNet(2, 2, 32, (1, 2), 1, (2,), 32, **slots | {"concat_channels": slots["concat_channels"] or 0})
    with torch.no_grad():
        for p in [*unet.parameters(), *(conditioner.parameters() if conditioner else ())]:
            if not p.any():
                p.normal_(std=0.1)
    return LatentDiffusion(stage, unet, NoiseSchedule(T=50), conditioner, size=16).eval()


def segmentation_part(has_null: bool = True, f: int = 4) -> MapConditioner:
    return MapConditioner("segmentation", classes=4, factor=f, has_null=has_null)


def depth_part() -> MapConditioner:
    return MapConditioner("depth", channels=1, factor=4, per_image=True, has_null=True)


def text_part() -> TextConditioner:
    return TextConditioner(["red", "blue", "ball"], length=4, dim=16, depth=1, heads=2)


@pytest.fixture(scope="module")
def larger() -> LatentDiffusion:
    return small(MapConditioner("low_resolution"))


@pytest.fixture(scope="module")
def filler() -> LatentDiffusion:
    torch.manual_seed(1)
    model = small(InpaintingConditioner(first_stage()))
    model.conditioner.first_stage.load_state_dict(model.first_stage.state_dict())
    return model


@pytest.fixture(scope="module")
def drawer() -> LatentDiffusion:
    torch.manual_seed(2)
    return small(MergedConditioner([segmentation_part(), depth_part(), text_part()]))


def hole(h: int, w: int, b: int = 1) -> Tensor:
    mask = torch.zeros(b, 1, h, w)
    mask[:, :, h // 4 : h // 2, w // 4 : 3 * w // 4] = 1
    return mask


# ---- upscale


@pytest.mark.parametrize("h, w", [(4, 4), (13, 22), (1, 1), (7, 2), (5, 16)])
def test_an_image_of_any_size_becomes_four_times_larger(larger, h, w):
    found = upscale(larger, images(2, h, w), **FEW)
    assert found.shape == (2, 3, 4 * h, 4 * w) and found.dtype == torch.float32
    assert found.abs().max() <= 1 and found.abs().mean() < 0.95 and found.std() > 0.01  # not all cut off


def test_the_result_is_that_of_sample_where_nothing_is_padded(larger):
    x = images(2, 4, 6)
    assert torch.equal(upscale(larger, x, **FEW), larger.sample({"low_resolution": x}, size=(16, 24), **FEW))


def test_the_last_row_and_column_are_repeated_and_the_result_cropped(larger):
    x = images(2, 3, 5)
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    whole = larger.sample({"low_resolution": padded}, size=(16, 24), **FEW)
    assert torch.equal(upscale(larger, x, **FEW), whole[..., :12, :20])


@pytest.mark.parametrize("f, factor, k", [(4, 2, 2), (8, 1, 8), (4, 4, 1)])
def test_the_enlargement_is_that_of_first_stage_and_conditioner(f, factor, k):
    model = small(MapConditioner("degraded", factor=factor), f)
    assert upscale(model, images(1, 5, 9), **FEW).shape == (1, 3, 5 * k, 9 * k)


def test_every_number_of_the_low_resolution_image_counts(larger):
    x = images(1, 3, 3)
    before = upscale(larger, x, **FEW)
    for i, j in ((0, 0), (2, 2)):
        other = x.clone()
        other[..., i, j] *= -1
        assert not torch.equal(upscale(larger, other, **FEW), before)


# ---- inpaint


@pytest.mark.parametrize("h, w", [(16, 16), (65, 47), (5, 3), (8, 21)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.int64, torch.uint8])
def test_the_known_pixels_are_kept_to_the_bit(filler, h, w, kind):
    x, mask = images(2, h, w), hole(h, w)
    mask[..., 0] = 1
    found = inpaint(filler, x, mask.to(kind), **FEW)
    known = mask.expand(2, 3, h, w) == 0
    assert found.shape == x.shape and torch.equal(found[known], x[known]) and known.any()
    assert (found[~known] != x[~known]).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_number_format_keeps_them_too(filler, dtype):
    x, mask = images(1, 9, 16), hole(9, 16)
    found = inpaint(copy.deepcopy(filler).to(dtype), x, mask, **FEW)
    assert found.dtype == torch.float32 and torch.equal(found[:, :, mask[0, 0] == 0], x[:, :, mask[0, 0] == 0])


def hidden_border(mask: Tensor) -> None:
    mask[..., -3:, :] = 1
    mask[..., :, -2:] = 1


def hidden_corner(mask: Tensor) -> None:
    mask[..., -1, -1] = 1


def hidden_middle(mask: Tensor) -> None:
    mask[..., 3:9, 5:6] = 1


def hidden_all(mask: Tensor) -> None:
    mask[:] = 1


@pytest.mark.parametrize("h, w", [(16, 16), (17, 13)])
@pytest.mark.parametrize("hide", [hidden_border, hidden_corner, hidden_middle, hidden_all])
def test_what_the_mask_hides_has_no_influence(filler, h, w, hide):
    mask = torch.zeros(1, 1, h, w)
    hide(mask)
    x = images(2, h, w)
    other = torch.where(mask > 0, 7 * images(2, h, w, seed=9), x)
    assert torch.equal(inpaint(filler, x, mask, **FEW), inpaint(filler, other, mask, **FEW))
    assert not torch.equal(x, other)


def test_what_is_known_has_an_influence(filler):
    x, mask = images(1, 16, 16), hole(16, 16)
    other = x.clone()
    other[..., -1, -1] *= -1
    assert not torch.equal(
        inpaint(filler, x, mask, **FEW)[..., 4:8, 4:12], inpaint(filler, other, mask, **FEW)[..., 4:8, 4:12]
    )


def test_a_hole_is_filled_as_sample_fills_it(filler):
    x, mask = images(2, 16, 24), hole(16, 24)
    drawn = filler.sample({"image": x, "mask": mask.expand(2, -1, -1, -1)}, size=(16, 24), **FEW)
    assert torch.equal(inpaint(filler, x, mask, **FEW), torch.where(mask > 0, drawn, x))


def test_image_and_mask_are_padded_alike_and_the_result_is_cropped(filler):
    x, mask = images(1, 13, 16), hole(13, 16)
    mask[..., 12, 5] = 1
    whole, larger_mask = (F.pad(each, (0, 0, 0, 3), mode="replicate") for each in (x, mask))
    drawn = filler.sample({"image": whole, "mask": larger_mask}, size=(16, 16), **FEW)[..., :13, :]
    assert torch.equal(inpaint(filler, x, mask, **FEW), torch.where(mask > 0, drawn, x))


def test_each_image_has_its_own_mask_or_all_have_one(filler):
    x, masks = images(2, 16, 8), torch.cat([hole(16, 8), hole(16, 8).flip(-2)])
    both = inpaint(filler, x, masks, **FEW)
    for i in range(2):
        one = inpaint(filler, x[i : i + 1], masks[i : i + 1], steps=2, seed=5 + i)
        torch.testing.assert_close(both[i : i + 1], one, atol=1e-4, rtol=0)


def test_nothing_that_was_given_is_changed(filler):
    x, mask = images(1, 13, 16), hole(13, 16)
    before = x.clone(), mask.clone()
    inpaint(filler, x, mask, **FEW)
    assert torch.equal(x, before[0]) and torch.equal(mask, before[1])


# ---- draw


def by_hand(model: LatentDiffusion, batch: dict, left_out: set[str], scale: float, seed: int) -> Tensor:
    """Sampling with the condition that training makes: each part that is named is dropped by itself."""
    b, keys = len(batch["depth"]), [part.keys[0] for part in model.conditioner.parts]
    u = torch.tensor([[0.0 if key in left_out else 0.9 for key in keys]] * b)
    with torch.no_grad():
        cond = drop_apart(model.conditioner, batch, 0.5, u)
        shape = (2, batch["depth"].shape[2] // 4, batch["depth"].shape[3] // 4)
        noise = SeededNoise(range(seed, seed + b))
        guided = Guidance(model.unet, model.conditioner.null(), scale)
        z = last(ddim(guided, noise.noise(shape), model.schedule, 2, cond))
        return model.first_stage.decode(z).clamp(-1, 1)


KEYS = {"segmentation", "depth", "caption"}
CHOICES = [{"segmentation"}, {"depth"}, {"caption"}, {"segmentation", "depth"}, {"depth", "caption"}, KEYS]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("given", CHOICES, ids=lambda keys: " and ".join(sorted(keys)))
def test_what_is_not_given_is_left_out_as_in_training(drawer, given, scale):
    batch = {"segmentation": classes(2, 16, 16), "depth": depths(2, 16, 16), "caption": ["red ball", "blue"]}
    maps = {key: batch[key] for key in given - {"caption"}}
    captions = batch["caption"] if "caption" in given else None
    found = draw(drawer, maps, captions, scale=scale, **FEW)
    expected = by_hand(drawer, batch, KEYS - given, scale, 5)[: len(found)]
    assert len(found) == 2 and found.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_each_choice_of_conditions_is_another_image(drawer):
    maps = {"segmentation": classes(1, 16, 16), "depth": depths(1, 16, 16)}
    found = []
    for given in CHOICES:
        chosen = {key: maps[key] for key in given - {"caption"}}
        found.append(draw(drawer, chosen, "red ball" if "caption" in given else None, **FEW))
    assert len({image.numpy().tobytes() for image in found}) == len(CHOICES)


def test_everything_given_is_what_sample_does(drawer):
    batch = {"segmentation": classes(2, 16, 24), "depth": depths(2, 16, 24), "caption": ["red ball", "blue"]}
    maps = {key: batch[key] for key in ("segmentation", "depth")}
    assert torch.equal(draw(drawer, maps, batch["caption"], **FEW), drawer.sample(batch, size=(16, 24), **FEW))


@pytest.mark.parametrize("h, w", [(13, 22), (3, 1), (16, 17)])
def test_maps_of_any_size_are_padded_and_the_images_cropped(drawer, h, w):
    maps = {"segmentation": classes(1, h, w), "depth": depths(1, h, w)}
    found = draw(drawer, maps, "red", **FEW)
    assert found.shape == (1, 3, h, w)
    more = (0, -w % 8, 0, -h % 8)
    padded = {"depth": F.pad(maps["depth"], more, mode="replicate"), "caption": ["red"]}
    padded["segmentation"] = F.pad(maps["segmentation"][:, None].float(), more, mode="replicate")[:, 0].long()
    whole = drawer.sample(padded, size=tuple(padded["depth"].shape[2:]), **FEW)
    assert torch.equal(found, whole[..., :h, :w])


def test_without_maps_the_size_is_that_of_training(drawer):
    assert (
        draw(drawer, None, ["red", "blue"], **FEW).shape == draw(drawer, {}, "red", n=2, **FEW).shape == (2, 3, 16, 16)
    )


def test_one_map_or_one_caption_is_for_all(drawer):
    maps, captions = {"depth": depths(1, 16, 16)}, ["red", "blue"]
    together = draw(drawer, maps, captions, **FEW)
    alone = [draw(drawer, maps, captions[i], steps=2, seed=5 + i) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)
    maps = {"depth": depths(2, 16, 16), "segmentation": classes(1, 16, 16)}
    assert len(draw(drawer, maps, "red", **FEW)) == 2


def test_n_images_of_one_map_have_seeds_of_their_own(drawer):
    maps = {"segmentation": classes(1, 16, 16)}
    several = draw(drawer, maps, n=3, **FEW)
    alone = [draw(drawer, maps, steps=2, seed=5 + i) for i in range(3)]
    torch.testing.assert_close(several, torch.cat(alone), atol=1e-4, rtol=0)
    assert not torch.equal(several[0], several[1])


def test_a_map_in_the_latents_size_says_the_size_of_the_image():
    model = small(MapConditioner("depth", channels=1, factor=1))
    assert draw(model, {"depth": depths(1, 3, 5)}, **FEW).shape == (1, 3, 12, 20)


def test_a_model_of_one_condition_draws_too():
    assert draw(small(segmentation_part()), {"segmentation": classes(1, 9, 9)}, **FEW).shape == (1, 3, 9, 9)
    assert draw(small(text_part()), captions="red", **FEW).shape == (1, 3, 16, 16)


def test_the_model_is_as_it_was(drawer):
    before = copy.deepcopy(drawer.state_dict())
    conditioner, modes = drawer.conditioner, [module.training for module in drawer.modules()]
    draw(drawer, {"depth": depths(1, 9, 9)}, **FEW)
    assert drawer.conditioner is conditioner and [module.training for module in drawer.modules()] == modes
    assert before.keys() == drawer.state_dict().keys()


# ---- seeds and batches, for all three


def ask(task: str, models: dict[str, LatentDiffusion], rows: slice, **how) -> Tensor:
    if task == "upscale":
        return upscale(models[task], images(3, 3, 5)[rows], **how)
    if task == "inpaint":
        return inpaint(models[task], images(3, 9, 16)[rows], hole(9, 16), **how)
    maps = {"segmentation": classes(3, 9, 16)[rows]}
    return draw(models[task], maps, ["red", "blue", "ball"][rows], **how)


@pytest.fixture(scope="module")
def models(larger, filler, drawer) -> dict[str, LatentDiffusion]:
    return {"upscale": larger, "inpaint": filler, "draw": drawer}


TASKS = ["upscale", "inpaint", "draw"]


@pytest.mark.parametrize("task", TASKS)
def test_image_i_is_that_of_seed_plus_i(task, models):
    together = ask(task, models, slice(None), **FEW)
    alone = [ask(task, models, slice(i, i + 1), steps=2, seed=5 + i) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)
    assert not torch.equal(together[1:2], ask(task, models, slice(1, 2), steps=2, seed=5))


@pytest.mark.parametrize("task", TASKS)
def test_with_a_batch_size_an_image_is_the_same_to_the_bit(task, models):
    whole = ask(task, models, slice(None), batch_size=2, **FEW)
    alone = [ask(task, models, slice(i, i + 1), batch_size=2, steps=2, seed=5 + i) for i in range(3)]
    assert torch.equal(whole, torch.cat(alone))
    torch.testing.assert_close(whole, ask(task, models, slice(None), **FEW), atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_steps_sampler_and_seed_are_passed_on(task, models):
    found = [
        ask(task, models, slice(0, 1), **FEW | more) for more in ({}, {"steps": 3}, {"sampler": "ddpm"}, {"seed": 6})
    ]
    assert len({image.numpy().tobytes() for image in found}) == 4


def test_the_scale_is_passed_on(models):
    found = [ask("draw", models, slice(0, 1), scale=scale, **FEW) for scale in (1.0, 3.0)]
    assert not torch.equal(*found)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "how, said",
    [
        (dict(steps=0), "steps=0"),
        (dict(steps=51), "steps=51"),
        (dict(seed=-1), "seed=-1"),
        (dict(seed=2**32 - 1), "seed=4294967295"),
        (dict(sampler="euler"), "unknown sampler 'euler'; known: ddim"),
        (dict(batch_size=0), "batch_size=0"),
    ],
)
def test_numbers_without_sense_are_named(task, models, how, said):
    with pytest.raises(REFUSED, match=said):
        ask(task, models, slice(None), **how)


# ---- what is refused

NOT_ONE_PICTURE = {
    "unconditional": None,
    "captions": text_part(),
    "class ids": segmentation_part(),
    "three classes": MapConditioner("segmentation", classes=3),
    "one channel": depth_part(),
    "two maps": MergedConditioner([MapConditioner("low_resolution"), depth_part()]),
    "with captions": MergedConditioner([MapConditioner("low_resolution"), text_part()]),
    "a hole": InpaintingConditioner(first_stage()),
}


@pytest.mark.parametrize("kind", NOT_ONE_PICTURE)
def test_a_model_that_reads_no_small_picture_does_not_upscale(kind):
    conditioner = NOT_ONE_PICTURE[kind]
    reads = "nothing" if conditioner is None else ", ".join(conditioner.keys)
    said = f"model: `upscale` needs one that reads a single map of three channels.*this one reads {reads}"
    with pytest.raises(LDMError, match=said):
        upscale(small(conditioner), images(1, 4, 4))


def test_a_map_whose_factor_does_not_divide_f_is_named():
    with pytest.raises(LDMError, match="model: its map is 3 times as large as the latent, which does not divide f = 4"):
        upscale(small(MapConditioner("low_resolution", factor=3)), images(1, 6, 6))


@pytest.mark.parametrize("kind", [None, "low_resolution", "merged"])
def test_a_model_that_reads_no_hole_does_not_inpaint(kind):
    parts = {None: None, "low_resolution": MapConditioner("low_resolution")}
    parts["merged"] = MergedConditioner([InpaintingConditioner(first_stage()), text_part()])
    with pytest.raises(LDMError, match="model: `inpaint` needs one with an InpaintingConditioner alone.*reads"):
        inpaint(small(parts[kind]), images(1, 8, 8), hole(8, 8))


@pytest.mark.parametrize(
    "x, said",
    [
        (images(1, 4, 4)[0], r"images should have the shape \(b, 3, h, w\).*images\[None\]|images"),
        (images(1, 4, 4)[:, :1], "images"),
        (127 + images(1, 4, 4) * 127, r"images should be images in \[-1, 1\], but holds values from"),
        (images(1, 4, 4) * torch.nan, "but holds values from nan"),
        (images(1, 4, 4)[:0], "images is empty: at least one is needed"),
        (images(1, 4, 4)[:, :, :0], "height and width should be at least 1"),
    ],
)
@pytest.mark.parametrize("task", ["upscale", "inpaint"])
def test_what_are_no_images_is_refused(models, task, x, said):
    with pytest.raises(REFUSED, match=said):
        upscale(models[task], x) if task == "upscale" else inpaint(models[task], x, hole(4, 4))


def test_an_image_that_would_be_too_large_is_refused_before_it_is_drawn(larger, drawer):
    wide = torch.zeros(1, 3, 1, 4097)
    with pytest.raises(
        LDMError, match="images is 1 × 4097, for which the image would have a side of 16392 pixels; 16384"
    ):
        upscale(larger, wide)
    with pytest.raises(LDMError, match="depth is 1 × 16385"):
        draw(drawer, {"depth": torch.zeros(1, 1, 1, 16385)})


@pytest.mark.parametrize(
    "mask, said",
    [
        (torch.zeros(1, 1, 8, 8), "mask: number 0 hides no pixel, so nothing is missing"),
        (torch.cat([hole(8, 8), torch.zeros(1, 1, 8, 8)]), "mask: number 1 hides no pixel"),
        (hole(8, 9), "mask is 8 × 9, but images are 8 × 8"),
        (hole(4, 4), "mask is 4 × 4, but images are 8 × 8"),
        (hole(8, 8, b=3), "mask: there are 3 for 2 images"),
        (2 * hole(8, 8), r"mask should hold 0 \(known\) and 1 \(missing\), but runs from 0.0 to 2.0"),
        (-hole(8, 8), "mask should hold 0"),
        (hole(8, 8) * torch.nan, "mask should hold 0"),
        (hole(8, 8)[0], "mask"),
        (hole(8, 8).expand(-1, 3, -1, -1), "mask"),
        ("mask.png", "mask"),
    ],
)
def test_a_mask_that_is_none_is_refused(filler, mask, said):
    with pytest.raises(REFUSED, match=said):
        inpaint(filler, images(2, 8, 8), mask, **FEW)


@pytest.mark.parametrize(
    "maps, captions, more, said",
    [
        (None, None, {}, "maps, captions: neither is given; this model reads segmentation, depth, caption"),
        ({}, None, {}, "maps, captions: neither is given"),
        ([classes(1, 8, 8)], None, {}, "maps should be a dict|maps"),
        ({"edges": images(1, 8, 8)}, None, {}, "maps: 'edges' is no map that this model reads; it reads segmentation"),
        ({"caption": ["red"]}, None, {}, "maps: a caption is no map: give it as `captions`"),
        ({"segmentation": classes(1, 8, 8).float()}, None, {}, "segmentation should be whole numbers"),
        ({"segmentation": classes(1, 8, 8)[0]}, None, {}, "segmentation should be whole numbers"),
        ({"segmentation": classes(1, 8, 8)[:, :0]}, None, {}, "segmentation has the shape"),
        ({"segmentation": "map.png"}, None, {}, "segmentation should be whole numbers"),
        ({"segmentation": classes(1, 8, 8, 5)}, None, {}, "segmentation holds the class 4, but .* 4 classes, 0 to 3"),
        ({"segmentation": -classes(1, 8, 8)}, None, {}, "segmentation holds the class -3, but .* 4 classes, 0 to 3"),
        ({"depth": depths(1, 8, 8)[0]}, None, {}, r"depth should have the shape \(b, 1, h, w\)"),
        ({"depth": images(1, 8, 8)}, None, {}, r"depth should have the shape \(b, 1, h, w\)"),
        ({"depth": depths(1, 8, 8).long()}, None, {}, "depth should hold floating-point numbers"),
        ({"depth": depths(1, 8, 8) * torch.nan}, None, {}, "depth should hold numbers"),
        ({"depth": depths(1, 8, 8)[:0]}, None, {}, "depth is empty"),
        (
            {"depth": depths(1, 8, 8), "segmentation": classes(1, 8, 16)},
            None,
            {},
            "depth is 8 × 8, segmentation is 8 × 16",
        ),
        ({"depth": depths(2, 8, 8)}, ["red"] * 3, {}, "2 of depth, 3 of caption"),
        ({"depth": depths(2, 8, 8)}, None, dict(n=3), "n=3, but 2 images"),
        ({"depth": depths(1, 8, 8)}, None, dict(n=0), "n=0 should be a whole number"),
        (None, [], {}, "captions is empty"),
        (None, [3], {}, "each of captions should be a text|captions"),
        (None, "a red dgo", {}, "not in the vocabulary: a, dgo"),
        (None, "red", dict(scale=float("nan")), "scale=nan"),
    ],
)
def test_what_cannot_be_drawn_is_named(drawer, maps, captions, more, said):
    with pytest.raises(REFUSED, match=said):
        draw(drawer, maps, captions, **FEW | more)


def test_a_condition_without_a_null_has_to_be_given():
    model = small(MergedConditioner([segmentation_part(has_null=False), depth_part(), text_part()]))
    with pytest.raises(LDMError, match="segmentation is not given, but this model cannot leave it out"):
        draw(model, {"depth": depths(1, 8, 8)}, "red", **FEW)
    assert draw(model, {"segmentation": classes(1, 8, 8)}, **FEW).shape == (1, 3, 8, 8)


def test_a_condition_that_is_no_map_is_left_out_or_missed():
    kind = ClassConditioner(classes=3, dim=16)
    model = small(MergedConditioner([segmentation_part(), kind]))
    assert draw(model, {"segmentation": classes(1, 8, 8)}, **FEW).shape == (1, 3, 8, 8)
    hole_part = InpaintingConditioner(first_stage())
    model = small(MergedConditioner([hole_part, text_part()]))
    with pytest.raises(LDMError, match="image, mask is not given, but this model cannot leave it out"):
        draw(model, captions="red", **FEW)


def test_captions_for_a_model_that_reads_none_are_refused():
    with pytest.raises(LDMError, match="captions: this model reads segmentation, but no captions"):
        draw(small(segmentation_part()), {"segmentation": classes(1, 8, 8)}, "red")
    with pytest.raises(LDMError, match="captions: this model reads nothing"):
        draw(small(None), captions="red")


@pytest.mark.parametrize("ask", [lambda m: upscale(m, images(1, 4, 4)), lambda m: draw(m, captions="red")])
def test_the_name_of_a_model_is_no_model(ask):
    with pytest.raises(REFUSED, match="model"):
        ask("toy-maps")


def test_a_model_without_a_first_stage_keeps_the_size():
    part = MapConditioner("low_resolution")
    unet = UNet(3, 3, 32, (1,), 1, (), 32, concat_channels=3)
    model = LatentDiffusion(IdentityFirstStage(), unet, NoiseSchedule(T=50), part, size=8)
    assert upscale(model, images(1, 5, 7), **FEW).shape == (1, 3, 5, 7)
