"""What `LatentDiffusion.sample` is given, checked and cut into batches: prompts, seeds, what to go away from, a size."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_edu.checks import MOST_SEED, check_count, check_number, shown
from ldm_edu.conditioning.condition import Condition, Conditioner, MergedConditioner
from ldm_edu.conditioning.guidance import check_interval
from ldm_edu.diffusion.sampling import SAMPLERS
from ldm_edu.errors import LDMError
from ldm_edu.first_stage.autoencoder import FirstStage

__all__ = ["requests"]

MOST_AT_ONCE = 2**16  # images in a batch
MOST_SIDE = 2**14  # pixels along a side of an image

DIFFUSERS = {  # words of diffusers, and ours
    "prompt": "prompts",
    "num_inference_steps": "steps",
    "guidance_scale": "scale",
    "num_images_per_prompt": "n",
    "generator": "seed",
    "scheduler": "sampler",
    "negative_prompt": "negative",
    "height": "size",
    "width": "size",
}

# Anything that says what a picture should be of, or should not be: captions, or a batch that the conditioner reads.
Prompts = Mapping[str, Any] | Sequence[str] | str | None


@dataclass(frozen=True)
class Request:
    "A batch that is drawn at once."

    batch: dict[str, Any] | None  # what the conditioner reads; None: an unconditional model
    negative: Any  # what to go away from, for the same images, or None
    seeds: list[int]  # one for each image
    kept: slice  # the images that were asked for; others fill the batch up


def count_images(batch: Mapping[str, Any], keys: Sequence[str], name: str = "prompts") -> int | None:
    "How many images the entries under these keys are for; None where there is no such key, `LDMError` if they differ."
    counts = {}
    for key in keys:
        if key in batch:
            value = batch[key]
            try:
                counts[key] = None if isinstance(value, str | bytes) else len(value)
            except TypeError:
                counts[key] = None
            if counts[key] is None:
                raise LDMError(f"{name}: {key} should have an entry for each image, not {shown(value)}")
    if len({*counts.values()}) > 1:
        raise LDMError(f"{name}: of different lengths, {counts}: each image needs one of each")
    return next(iter(counts.values()), None)


def read_negative(negative: Any, keys: Sequence[str], count: int | None) -> dict[str, Any]:
    "What to go away from, as a batch with an entry for each of `count` images."
    if isinstance(negative, str):
        negative = {"caption": [negative] * (count or 1)}
    elif isinstance(negative, list | tuple):
        negative = {"caption": list(negative)}
    if not isinstance(negative, Mapping) or not negative:
        raise LDMError(f"negative should be a caption, a list of them, or a batch, not {shown(negative)}")
    if unknown := [key for key in negative if key not in keys]:
        raise LDMError(f"negative: this model does not read {unknown[0]}, only {', '.join(keys) or 'nothing'}")
    if (found := count_images(negative, keys, "negative")) != count:
        raise LDMError(f"negative: {found} entries for {count} images: one for each is needed")
    return dict(negative)


def read_prompts(
    prompts: Prompts,
    n: int | None,
    keys: Sequence[str] = ("caption",),  # that the conditioner reads: these say how many images are asked for
) -> tuple[dict[str, Any] | None, int]:
    "What is asked for as a batch, or None, and the number of images; `LDMError` if the two do not fit."
    if prompts is None or isinstance(prompts, str):
        count = 1 if n is None else check_count("n", n)
        return (None if prompts is None else {"caption": [prompts] * count}), count
    if not isinstance(prompts, Mapping | Sequence) or isinstance(prompts, bytes):
        raise LDMError(f"prompts: {prompts!r} is neither captions nor a batch; n is the number of images")
    batch = dict(prompts) if isinstance(prompts, Mapping) else {"caption": list(prompts)}
    counted = count_images(batch, keys)
    count = (n or 1) if counted is None else counted
    if not count:
        raise LDMError("prompts: an empty list; ask for at least one image")
    if n is not None and check_count("n", n) != count:
        raise LDMError(f"n={n}, but there are {count} prompts: n goes with one prompt, or with none")
    return batch, count


def take_rows(batch: Mapping[str, Any], keys: Sequence[str], rows: Sequence[int]) -> dict[str, Any]:
    "The entries of some images, under the keys that a conditioner reads."
    picked: dict[str, Any] = {}
    for key in keys:
        if key in batch:
            value = batch[key]
            if not isinstance(value, Sequence | Tensor | np.ndarray):
                raise LDMError(f"prompts: {key} should be a list, a tensor or an array where batch_size is given")
            picked[key] = [value[row] for row in rows] if isinstance(value, Sequence) else value[list(rows)]
    return {**batch, **picked}


def requests(
    prompts: Prompts,
    n: int | None,
    seed: int,
    negative: Prompts = None,
    batch_size: int | None = None,
    keys: Sequence[str] = (),  # that the conditioner reads
) -> list[Request]:
    """What is asked for, as batches; `LDMError` where that makes no sense.

    Without `batch_size` there is one. With it all are of this size, and an image's place in its batch is its seed
    modulo the size: so its sums are always added up in the same order, and it is the same to the bit.
    """
    batch, count = read_prompts(prompts, n, keys)
    seed = check_count("seed", seed, 0, MOST_SEED + 1 - count)
    if batch_size is None:
        return [Request(batch, negative, list(range(seed, seed + count)), slice(None))]
    away = None if negative is None else read_negative(negative, keys, count)
    size, found = check_count("batch_size", batch_size, 1, MOST_AT_ONCE), []
    for start in range(seed - seed % size, seed + count, size):
        rows = [min(max(start + i - seed, 0), count - 1) for i in range(size)]
        some, other = (None if b is None else take_rows(b, keys, rows) for b in (batch, away))
        kept = slice(max(seed - start, 0), seed + count - start)
        found.append(Request(some, other, [seed + row for row in rows], kept))
    return found


def check_words(words: Mapping[str, Any], sampler: str) -> None:
    "`LDMError` for a sampler that does not exist, or for a word that it does not know."
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise LDMError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    arguments = inspect.signature(SAMPLERS[sampler]).parameters.values()
    known = [p.name for p in arguments if p.kind is p.KEYWORD_ONLY and p.name != "noise"]
    for word in words:
        if word in DIFFUSERS:
            raise LDMError(f"{word}: our word is {DIFFUSERS[word]}")
        if word not in known:
            more = f"whose own are {', '.join(known)}" if known else "which has none of its own"
            raise LDMError(f"{word}: no argument of `sample`, nor of {sampler}, {more}")


def check_sampling(T: int, steps: int, scale: float, interval: Any, sampler: str, words: Mapping[str, Any]) -> None:
    "`LDMError` for the first argument of `sample` that makes no sense, of those that belong to no image."
    check_words(words, sampler)
    check_count("steps", steps, 1, T)
    check_number("scale", scale, -1e4, 1e4)
    check_interval(interval, T - 1)


def latent_shape(
    size: int | Sequence[int],  # pixels of both sides, or (height, width)
    first_stage: FirstStage,
    factor: int = 1,  # by which the UNet must be able to divide a latent's sides
) -> tuple[int, int, int]:
    "(c, h/f, w/f) of one image's latent; `LDMError` where the networks cannot divide the sides so often."
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2:
        raise LDMError(f"size={shown(size)} should be a number of pixels, or (height, width)")
    height, width = (check_count("size", side, 1, MOST_SIDE) for side in sides)
    multiple = first_stage.f * factor
    if height % multiple or width % multiple:
        raise LDMError(f"size={shown(size)} should be a multiple of {multiple}, by which the networks divide it")
    return first_stage.latent_channels, height // first_stage.f, width // first_stage.f


def conditions(
    conditioner: Conditioner,
    batch: Prompts,
    negative: Prompts,
    check: bool,
    device: torch.device,
) -> tuple[Condition, Condition]:
    "The condition of a batch, and what guidance leads away from: the null, or the condition of `negative`."
    if batch is None:
        raise LDMError(f"prompts: this model needs prompts, or a batch with {', '.join(conditioner.keys)}")
    batch = dict(batch) if isinstance(batch, Mapping) else {"caption": batch}
    cond, null = read_condition(conditioner, batch, device), conditioner.null()
    if null.slots() and negative is not None:
        return cond, away_from(conditioner, negative, batch, null, device)
    if not null.slots() and (check or negative is not None):
        told = "check" if check else "negative"
        raise LDMError(f"{told}: this model's condition is never dropped, so there is no prediction without it")
    return cond, null


def read_condition(conditioner: Conditioner, batch: Mapping[str, Any], device: torch.device) -> Condition:
    "What a conditioner makes of a batch; `LDMError` where it has not all that is read."
    if missing := [key for key in conditioner.keys if key not in batch]:
        read, lacking = ", ".join(conditioner.keys), ", ".join(missing)
        raise LDMError(f"prompts: this model reads {read}: give a batch, a dict, with {lacking}")
    return conditioner({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})


def away_from(
    conditioner: Conditioner, negative: Any, batch: Mapping[str, Any], null: Condition, device: torch.device
) -> Condition:
    """The condition of `negative`, in the slots of the null.

    What it does not name is as in the batch. A condition that is never dropped is never left, either: `LDMError`
    where `negative` names nothing else.
    """
    other = read_negative(negative, conditioner.keys, count_images(batch, conditioner.keys))
    kept = {key for part in parts_of(conditioner) if not part.null().slots() for key in part.keys}
    kept -= {key for part in parts_of(conditioner) if part.null().slots() for key in part.keys}
    if never := [key for key in other if key in kept]:
        raise LDMError(f"negative: this model's {never[0]} is never dropped, so there is no going away from it")
    away = read_condition(conditioner, {**batch, **other}, device).slots()
    return Condition(**{name: away[name] for name in null.slots()})


def parts_of(conditioner: Conditioner) -> list[Conditioner]:
    "The conditioners that were merged into one, or the one."
    return conditioner.parts if isinstance(conditioner, MergedConditioner) else [conditioner]
