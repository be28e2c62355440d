"""What models are used for whose conditions are stacked on the latent: upscale, fill a hole, draw from maps."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image, ImageOps
from torch import Tensor

from ldm_edu.checks import WHOLE, check_captions, check_count, check_images, check_map, shown
from ldm_edu.conditioning.condition import Condition, Conditioner
from ldm_edu.conditioning.spatial import InpaintingConditioner, MapConditioner, check_hole
from ldm_edu.data.images import opened_image, read_image, to_tensor
from ldm_edu.errors import DataError, LDMError
from ldm_edu.inputs import MOST_SIDE, parts_of
from ldm_edu.latent_diffusion import LatentDiffusion

__all__ = ["draw", "inpaint", "upscale"]


# --- What a model reads ---


def _parts(model: LatentDiffusion) -> list[Conditioner]:
    "The conditioners of a model, each by itself; none where it is unconditional."
    if not isinstance(model, LatentDiffusion):
        raise LDMError(f"model should be a LatentDiffusion, as `from_pretrained` loads it, not {shown(model)}")
    return [] if model.conditioner is None else parts_of(model.conditioner)


def _what_it_reads(model: LatentDiffusion) -> str:
    "The keys that a model's conditioner reads, for a message."
    keys = [key for part in _parts(model) for key in part.keys]
    return ", ".join(dict.fromkeys(keys)) or "nothing (it is unconditional)"


def map_parts(model: LatentDiffusion) -> dict[str, MapConditioner]:
    "The conditioners that read a map, by the map's key."
    return {part.keys[0]: part for part in _parts(model) if isinstance(part, MapConditioner)}


def upscaling(model: LatentDiffusion) -> tuple[MapConditioner, int]:
    "What reads a model's low-resolution image, and how many times larger its images are; LDMError where it has none."
    parts = _parts(model)
    part = parts[0] if len(parts) == 1 else None
    if not isinstance(part, MapConditioner) or part.classes is not None or part.channels != 3:
        raise LDMError(
            f"model: `upscale` needs one that reads a single map of three channels, such as toy-super-resolution; "
            f"this one reads {_what_it_reads(model)}"
        )
    f = model.first_stage.f
    if f % part.factor:
        raise LDMError(f"model: its map is {part.factor} times as large as the latent, which does not divide f = {f}")
    return part, f // part.factor


# --- Sizes ---


def _sides(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


def _shown_size(x: Tensor) -> str:
    return " × ".join(map(str, _sides(x)))


def _cover(
    model: LatentDiffusion,
    name: str,  # of the argument, for the message
    sides: tuple[int, int],  # height and width of a map
    factor: int,  # how many times larger the map is than the latent
) -> tuple[int, int]:
    "Height and width of the smallest latent that covers a map and that the UNet can divide."
    step = model.unet.factor
    height, width = (step * -(-side // (factor * step)) for side in sides)
    if (largest := max(height, width) * model.first_stage.f) > MOST_SIDE:
        told = f"{name} is {sides[0]} × {sides[1]}, for which the image would have a side of {largest} pixels"
        raise LDMError(f"{told}; {MOST_SIDE} is the limit: give a smaller one")
    return height, width


def _padded(
    x: Shaped[Tensor, "*b h w"],
    height: int,  # at least h
    width: int,  # at least w
) -> Shaped[Tensor, "*b {height} {width}"]:
    "A map made larger at the bottom and at the right, where its last row and column are repeated."
    rows, columns = (torch.arange(n, device=x.device).clamp(max=m - 1) for n, m in zip((height, width), _sides(x)))
    return x[..., rows, :][..., columns]


def _sampled(
    model: LatentDiffusion,
    batch: Mapping[str, Any],  # what the conditioner reads, maps already in the latent's size times their factor
    latent: tuple[int, int],  # height and width
    kept: tuple[int, int],  # height and width of the image without its padding
    **how: Any,  # further arguments of `sample`
) -> Float[Tensor, "b 3 h w"]:
    "The images for a batch, without their padding."
    f = model.first_stage.f
    images = model.sample(batch, size=(f * latent[0], f * latent[1]), **how)
    return images[..., : kept[0], : kept[1]].contiguous()


def _check_some(name: str, value: Tensor) -> None:
    "LDMError for an empty batch."
    if not len(value):
        raise LDMError(f"{name} is empty: at least one is needed")


# --- Super-resolution ---


def upscale(
    model: LatentDiffusion,  # its conditioner reads one map of three channels, such as `low_resolution`
    images: Float[Tensor, "b 3 h w"],  # low-resolution images in [−1, 1], of any size
    *,
    steps: int = 50,  # denoising steps
    seed: int = 0,  # of the first image; the next ones have seed + 1, seed + 2, …
    sampler: str = "ddim",  # a key of SAMPLERS
    batch_size: int | None = None,  # images at a time, see `sample`
    show_progress: bool = False,  # a bar, on a live terminal or notebook
) -> Float[Tensor, "b 3 H W"]:
    """The images k times larger, where k is the first stage's f divided by the conditioner's factor (§ 4.4).

    A size that the networks cannot divide is padded by repeating the last row and column; the result has no padding.
    """
    part, k = upscaling(model)
    _check_some("images", check_images("images", images))
    sides = _sides(images)
    latent = _cover(model, "images", sides, part.factor)
    batch = {part.keys[0]: _padded(images, *(part.factor * side for side in latent))}
    how = {"steps": steps, "seed": seed, "sampler": sampler, "batch_size": batch_size, "show_progress": show_progress}
    return _sampled(model, batch, latent, (k * sides[0], k * sides[1]), scale=1.0, **how)


# --- Inpainting ---


def _check_mask(mask: Any, images: Tensor) -> Bool[Tensor, "b 1 h w"]:
    "Where the images are hidden; LDMError where it is no mask of their size, or hides nothing of one of them."
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1] != 1:
        told = tuple(mask.shape) if isinstance(mask, Tensor) else shown(mask)
        raise LDMError(f"mask should have the shape (b, 1, h, w), 1 where the image is missing, not {told}")
    if _sides(mask) != _sides(images):
        raise LDMError(f"mask is {_shown_size(mask)}, but images are {_shown_size(images)}: both need one size")
    if len(mask) not in (1, len(images)):
        raise LDMError(f"mask: there are {len(mask)} for {len(images)} images: give one for each, or one for all")
    hidden = check_hole(mask, tuple(mask.shape))
    if empty := [i for i, some in enumerate(hidden.flatten(1).any(1).tolist()) if not some]:
        raise LDMError(f"mask: number {empty[0]} hides no pixel, so nothing is missing: it should be 1 somewhere")
    return hidden.expand(len(images), -1, -1, -1)


def inpaint(
    model: LatentDiffusion,  # with an `InpaintingConditioner`
    images: Float[Tensor, "b 3 h w"],  # in [−1, 1], of any size; the same one several times is filled in several ways
    mask: Shaped[Tensor, "m 1 h2 w2"],  # 1 or True where the image is missing; m = b, or 1: the same for all
    *,
    steps: int = 50,  # denoising steps
    seed: int = 0,  # of the first image; the next ones have seed + 1, seed + 2, …
    sampler: str = "ddim",  # a key of SAMPLERS
    batch_size: int | None = None,  # images at a time, see `sample`
    show_progress: bool = False,  # a bar, on a live terminal or notebook
) -> Float[Tensor, "b 3 h w"]:
    """The images with their holes filled (§ 4.5); the known pixels are those that were given, to the bit.

    What the mask hides has no influence. A size that the networks cannot divide is padded by repeating the last row and
    column, of the mask, too; the result has no padding.
    """
    parts = _parts(model)
    if len(parts) != 1 or not isinstance(parts[0], InpaintingConditioner):
        told = "model: `inpaint` needs one with an InpaintingConditioner alone, such as toy-inpainting"
        raise LDMError(f"{told}; this one reads {_what_it_reads(model)}")
    _check_some("images", check_images("images", images))
    hidden = _check_mask(mask, images).to(model.device)
    images = images.to(model.device)
    latent = _cover(model, "images", _sides(images), f := model.first_stage.f)
    whole = (f * latent[0], f * latent[1])
    batch = {"image": _padded(images, *whole), "mask": _padded(hidden, *whole)}
    how = {"steps": steps, "seed": seed, "sampler": sampler, "batch_size": batch_size, "show_progress": show_progress}
    filled = _sampled(model, batch, latent, _sides(images), scale=1.0, **how)
    return torch.where(hidden, filled.to(images.dtype), images)


# --- Maps, each of which may be left out ---


class _Given(Conditioner):
    "Some of the keys of a conditioner: a part that reads none of them gets its null, as where `drop_apart` drops it."

    def __init__(
        self,
        conditioner: Conditioner,
        keys: tuple[str, ...],  # those that a batch has
        latent: tuple[int, int],  # height and width, for the null of a map where no map is given
    ):
        super().__init__()
        self.conditioner, self.keys, self.latent = conditioner, keys, latent
        self.context_dim, self.vector_dim = conditioner.context_dim, conditioner.vector_dim
        self.concat_channels = conditioner.concat_channels
        self.given = [part for part in parts_of(conditioner) if set(part.keys) <= set(keys)]
        for part in parts_of(conditioner):
            if part not in self.given:
                _check_may_be_left_out(part)

    def forward(self, batch: Mapping[str, Any]) -> Condition:
        "The conditions of the parts that are given and the nulls of the others, merged."
        b = len(batch[self.keys[0]])
        found = [part(batch) if part in self.given else part.null(b) for part in parts_of(self.conditioner)]
        slots = Condition.merge(found).slots()
        if "concat" in slots and slots["concat"].shape[2:] == (1, 1):  # nulls alone
            slots["concat"] = slots["concat"].expand(-1, -1, *self.latent)
        return Condition(**slots)

    def null(self, b: int = 1) -> Condition:
        "The null of all parts."
        return self.conditioner.null(b)


def _check_may_be_left_out(part: Conditioner) -> None:
    "LDMError for a conditioner whose null does not fill all of its slots."
    widths = {"context": part.context_dim, "concat": part.concat_channels, "vector": part.vector_dim}
    if {name for name, width in widths.items() if width} - part.null().slots().keys():
        told = f"maps, captions: {', '.join(part.keys)} is not given, but this model cannot leave it out"
        raise LDMError(f"{told}: its {type(part).__name__} has no null")


def class_numbers(classes: int, names: Sequence[str] = ()) -> str:
    "How many classes a model knows, for a message, with their names where these are known."
    listed = ": " + ", ".join(f"{i} {name}" for i, name in enumerate(names)) if names else f", 0 to {classes - 1}"
    return f"{classes} classes{listed}"


def check_classes(
    name: str,  # of the argument or the file
    x: Int[Tensor, "b h w"],
    classes: int,
    names: Sequence[str] = (),  # of the classes
) -> None:
    "LDMError where a segmentation holds a class that a model does not know."
    least, most = int(x.min()), int(x.max())
    if least < 0 or most >= classes:
        found = least if least < 0 else most
        raise LDMError(f"{name} holds the class {found}, but this model knows {class_numbers(classes, names)}")


def _check_one_map(key: str, value: Any, part: MapConditioner) -> None:
    "LDMError where a value is no map that a conditioner reads."
    if part.classes is None:
        check_map(key, value, part.channels)
        return _check_some(key, value)
    if not isinstance(value, Tensor) or value.ndim != 3 or value.dtype not in WHOLE:
        told = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise LDMError(f"{key} should be whole numbers (b, h, w), a class for each pixel, not {told}")
    if not value.numel():
        raise LDMError(f"{key} has the shape {tuple(value.shape)}, but should have at least one pixel")
    check_classes(key, value, part.classes)


def _check_maps(model: LatentDiffusion, maps: Any) -> dict[str, Tensor]:
    "The maps, by their keys; LDMError for one that the model does not read, or not in this form."
    if maps is None:
        return {}
    if not isinstance(maps, Mapping):
        raise LDMError(f"maps should be a dict, such as {{'depth': …}}, not {shown(maps)}")
    parts = map_parts(model)
    for key, value in maps.items():
        if key == "caption":
            raise LDMError("maps: a caption is no map: give it as `captions`")
        if key not in parts:
            raise LDMError(f"maps: {shown(key)} is no map that this model reads; it reads {_what_it_reads(model)}")
        _check_one_map(key, value, parts[key])
    return dict(maps)


def _read_captions(model: LatentDiffusion, captions: Any) -> dict[str, list[str]]:
    "The captions under their key; LDMError where the model reads none."
    if captions is None:
        return {}
    if all("caption" not in part.keys for part in _parts(model)):
        raise LDMError(f"captions: this model reads {_what_it_reads(model)}, but no captions")
    return {"caption": [captions] if isinstance(captions, str) else list(check_captions("captions", captions))}


def _count(given: Mapping[str, Any], n: int | None) -> int:
    "How many images are asked for: as many as there are of each; what there is one of is for all."
    counts = {key: len(value) for key, value in given.items()}
    if len(several := {count for count in counts.values() if count > 1}) > 1:
        told = ", ".join(f"{count} of {key}" for key, count in counts.items())
        raise LDMError(f"maps, captions: different numbers, {told}: give as many of each, or one for all")
    count = max(several, default=1)
    if n is None:
        return count
    if count > 1 and check_count("n", n) != count:
        raise LDMError(f"n={n}, but {count} images are asked for already: n goes with one of each")
    return check_count("n", n)


def _layout(model: LatentDiffusion, maps: Mapping[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    "Height and width of the latent, and of the image without padding; LDMError where maps are of different sizes."
    f, parts = model.first_stage.f, map_parts(model)
    sizes = {key: tuple(side * f / parts[key].factor for side in _sides(x)) for key, x in maps.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{key} is {_shown_size(x)}" for key, x in maps.items())
        raise LDMError(f"maps: of different sizes: {told}; all should be of one size")
    if not maps:
        return _cover(model, "model's size", (model.size, model.size), f), (model.size, model.size)
    key, x = next(iter(maps.items()))
    factor = parts[key].factor
    height, width = (-(-side * f // factor) for side in _sides(x))
    return _cover(model, key, _sides(x), factor), (height, width)


def draw(
    model: LatentDiffusion,  # its conditioner has parts that read maps, captions, or both
    maps: Mapping[str, Any] | None = None,  # such as `segmentation` (b, h, w) of class ids, `depth` (b, 1, h, w)
    captions: str | Sequence[str] | None = None,  # one for each image, or one for all
    *,
    n: int | None = None,  # how many images, where there is one of each map and one caption
    steps: int = 50,  # denoising steps
    scale: float = 3.0,  # guidance scale, away from the null of all parts; 1 is unguided
    seed: int = 0,  # of the first image; the next ones have seed + 1, seed + 2, …
    sampler: str = "ddim",  # a key of SAMPLERS
    batch_size: int | None = None,  # images at a time, see `sample`
    show_progress: bool = False,  # a bar, on a live terminal or notebook
) -> Float[Tensor, "b 3 h w"]:
    """Images for the maps and captions that are given; what is not given is left out.

    Each part of the model's conditioner whose keys are not given has its null, as in training (`drop_apart`). The maps
    are of one size, which may be any, as `upscale` pads it; without maps, the size is that of training.
    """
    found = _check_maps(model, maps)
    texts = _read_captions(model, captions)
    if not found and not texts:
        raise LDMError(f"maps, captions: neither is given; this model reads {_what_it_reads(model)}")
    assert model.conditioner is not None
    count = _count({**found, **texts}, n)
    latent, kept = _layout(model, found)
    batch: dict[str, Any] = {key: value * count if len(value) == 1 else value for key, value in texts.items()}
    for key, x in found.items():
        factor = map_parts(model)[key].factor
        batch[key] = _padded(x, *(factor * side for side in latent)).expand(count, *[-1] * (x.ndim - 1))
    given = _Given(model.conditioner, tuple(batch), latent)
    partial = LatentDiffusion(model.first_stage, model.unet, model.schedule, given, model.size)
    how = {"steps": steps, "seed": seed, "sampler": sampler, "batch_size": batch_size, "show_progress": show_progress}
    return _sampled(partial, batch, latent, kept, scale=scale, **how)


# --- Files ---


def read_picture(path: str | Path) -> Float[Tensor, "1 3 h w"]:
    "An image file in [−1, 1], in its own size; see `read_image`."
    return to_tensor(read_image(os.path.expanduser(path)))[None]


_NEARLY_GREY = 8  # of 255, between the channels of one pixel: JPEG rounds
_NUMBERS = ("1", "L", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # modes of Pillow with a number for each pixel
_CLASSES = (*_NUMBERS[:-1], "P")  # whole numbers


def _values(image: Image.Image) -> np.ndarray:
    "What an image holds, upright, before any palette or colour profile."
    return np.asarray(ImageOps.exif_transpose(image))


def _check_opaque(image: Image.Image, kind: str) -> None:
    "DataError where some pixel is not opaque, or one of the values is said to be transparent."
    if not image.has_transparency_data:
        return
    if image.mode.startswith("I") or np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise DataError(f"has transparent parts, which say nothing in {kind}: save it without transparency")


def _grey(
    rgb: np.ndarray,  # (h, w, 3) of 8 bits
    right: str,  # what the file should hold, for the message
) -> np.ndarray:  # (h, w)
    "An image without colours; DataError where its channels differ."
    if int((rgb.max(-1) - rgb.min(-1)).max()) > _NEARLY_GREY:
        raise DataError(f"has colours, but {right}")
    return rgb[..., 1]


def read_mask(path: str | Path) -> Bool[Tensor, "1 1 h w"]:
    """An image file as a mask, True where it is white; grey is cut at half.

    DataError names a file with colours or with transparent parts, and one without a white pixel.
    """
    path, right = os.path.expanduser(path), "a mask is black and white, white where the picture is missing"
    rgb = np.asarray(read_image(path))
    with opened_image(path) as image:
        _check_opaque(image, "a mask")
        grey = _grey(rgb, right)
        if (most := int(grey.max())) < 128:
            raise DataError(f"hides nothing: {right}, but its largest value is {most} of 255")
    return torch.from_numpy(grey >= 128)[None, None]


def read_segmentation(
    path: str | Path,
    known: str = "",  # the classes of a model, for the message; see `class_numbers`
) -> Int[Tensor, "1 h w"]:
    "An image file whose values, or indices of a palette, are class ids; DataError names a file of another kind."
    right = "a segmentation is a PNG, grey or with a palette, whose values are class ids"
    right += f"; this model knows {known}" if known else ""
    with opened_image(os.path.expanduser(path)) as image:
        if image.mode not in _CLASSES:
            raise DataError(f"is of mode {image.mode}, but {right}")
        if image.format in ("JPEG", "MPO"):
            raise DataError(f"is a JPEG, which changes values a little, but {right}")
        ids = _values(image).astype(np.int64)
    return torch.from_numpy(ids)[None]


def read_depth(path: str | Path) -> Float[Tensor, "1 1 h w"]:
    "A grey image file as a depth map, larger values farther away; DataError names a file with colours."
    right = "a depth map is grey, with 8 or 16 bits or, in a TIFF, floating-point numbers"
    with opened_image(os.path.expanduser(path)) as image:
        _check_opaque(image, "a depth map")
        values = _values(image if image.mode in _NUMBERS else image.convert("RGB"))
        depth = (values if values.ndim == 2 else _grey(values, right)).astype(np.float32)
        if not np.isfinite(depth).all():
            raise DataError("holds values that are not finite numbers")
    return torch.from_numpy(depth)[None, None]
