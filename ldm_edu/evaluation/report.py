"""How good are the images of a whole model? Distances between sets of images, prompt accuracy, and their ceilings."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from ldm_edu.basics import progress
from ldm_edu.checkpoints import weights_checksum
from ldm_edu.checks import MOST_SEED, check_count
from ldm_edu.data.batches import SampleDataset, collate
from ldm_edu.data.degradation import upsample
from ldm_edu.data.registry import known_keys, open_dataset
from ldm_edu.data.toy.captions import RELATIONS
from ldm_edu.data.toy.scenes import render
from ldm_edu.display import to_uint8
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.evaluation.agreement import (
    MAPS,
    NETWORKS,
    MapAgreement,
    image_agreement,
    map_agreement,
    mean_fill,
    mean_iou,
)
from ldm_edu.evaluation.backbones import BACKBONES
from ldm_edu.evaluation.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from ldm_edu.evaluation.extractors import Extractor, clip_score, extract, find_extractor
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.judge import READER_SIZE, PromptAccuracy, SceneReader, Share, prompt_accuracy
from ldm_edu.evaluation.metrics import LPIPS
from ldm_edu.evaluation.prompts import _fitting_scenes
from ldm_edu.evaluation.reconstruction import Mean
from ldm_edu.files import (
    folder_for,
    load_notes,
    load_tensors,
    parse_json,
    place,
    remove_leftovers,
    save_json,
    save_tensors,
    writing,
)
from ldm_edu.inputs import check_sampling
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.measurements import Measurement, Measurements, load_measurements, measured_here

__all__ = [
    "Drawing",
    "Evaluation",
    "KeptSamples",
    "evaluate",
    "last_evaluation",
    "scores",
    "table",
]

TOY = ("toy", "toy-faces")  # data sets whose images the toy features were trained on
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # of the guidance, tried where one is chosen
MOST_BYTES = 2**34  # of the images of one set, which are held at once
LEAST = 2  # images of a set, for a covariance
NEIGHBOURS = 3  # k of precision and recall
PART = 50  # images in each of the ten parts of an inception score, or more; smaller sets have fewer parts
VARIED, TIMES = 64, 4  # captions of which several images are drawn, and how many of each
REAL, BACK, DRAWN, FITTING = "real halves", "reconstructed", "drawn", "fitting scenes"  # the sets, in `of`
BICUBIC, FILL = "bicubic", "mean fill"  # sets without a model: what an image can be made of its condition alone
SMALL = ("low_resolution", "degraded")  # keys of an image that is smaller than the drawn one, and fixes it
BY_SET = "Fréchet excess of a set"  # one of several: two models are compared set by set
WITHOUT_FLOOR = "... without the floor"  # a depth correlation
CHOICE = "captions drawn exactly, to choose the scale"
WORDS = ("number", "size", "colour", "shape", *RELATIONS)
PROMPTS = ("every thing of the caption", "... and nothing else", "things", "relations", *WORDS)  # of `PromptAccuracy`


# --- What is asked for ---


@dataclass(frozen=True)
class Drawing:
    "How images are drawn: image i of a set has seed + i."

    steps: int = 50  # denoising steps
    scale: float = 3.0  # of the guidance; 1 is unguided
    sampler: str = "ddim"  # a key of SAMPLERS
    seed: int = 0  # of the first image
    batch_size: int = 64  # images at a time

    def of(self, model: LatentDiffusion) -> dict[str, str | int | float]:
        "What a number says of how images were drawn; a model without guidance has no scale."
        null = None if model.conditioner is None else model.conditioner.null().slots()
        return {**({"scale": self.scale} if null else {}), "steps": self.steps, "sampler": self.sampler}


@dataclass(frozen=True)
class Evaluation:
    "What is measured, on which images, and of how many."

    drawing: Drawing = field(default_factory=Drawing)
    dataset: str | None = None  # real images and conditions; None: the one of the model's recipe
    data_dir: str | Path | None = None  # where the data sets lie; the toy data sets need none
    splits: tuple[str, ...] = ()  # of the data set; empty: test, with captions of toy scenes also unseen_pairs
    n: int = 512  # images of each set
    sets: int = 1  # how often all of it is done, each time with other images; intervals of distances want two or more
    features: str | None = None  # toy-features, vgg16 or inception; None: see `pick_extractor`
    weights_dir: str | Path | None = None  # where the weights of vgg16 and inception lie
    clip: str | Path | None = None  # folder of a CLIP model; None: no CLIP score
    choose: bool = False  # choose the scale first, on half as many captions of the validation split
    varied: int | None = None  # captions to measure diversity with; None: 64 where it can be measured


@dataclass(frozen=True)
class Split:
    "A split of the data set: real images, and what a model draws for."

    name: str
    images: SampleDataset  # of the model's size
    conditions: SampleDataset | None  # with the keys that the conditioner reads; None: an unconditional model
    n: int  # images of each set
    sets: int = 1  # of each kind; the split has 2 · n · sets images, or more

    def texts(self, rows: Sequence[int]) -> list[str]:
        "The captions of these samples."
        assert self.conditions is not None
        return _rows(self.conditions, rows)["caption"]


def recipe_dataset(model: LatentDiffusion) -> str:
    "The data set that a model was trained on, as its recipe says; LDMError where there is no recipe."
    recipe = model.provenance.get("recipe")
    found = recipe.get("dataset") if isinstance(recipe, Mapping) else None
    if not isinstance(found, str):
        raise LDMError("dataset: the model does not say on which data set it was trained, so one has to be named")
    return found


def chosen_dataset(model: LatentDiffusion, options: Evaluation) -> str:
    "The data set that a model is compared with: the one that is asked for, else that of its recipe."
    return recipe_dataset(model) if options.dataset is None else options.dataset


def evaluation_title(
    model: LatentDiffusion,
    options: Evaluation,
    name: str,  # of the model
) -> str:
    "The title of an evaluation, which is known before anything is measured."
    return f"{name}: images of {model.size}² beside real ones of {chosen_dataset(model, options)}"


def model_keys(model: LatentDiffusion) -> tuple[str, ...]:
    "What the model reads of a sample."
    return () if model.conditioner is None else tuple(model.conditioner.keys)


def _is_judged(model: LatentDiffusion, dataset: str) -> bool:
    "Can the judge read the model's images, and compare them with the captions that they were drawn for?"
    return dataset == "toy" and "caption" in model_keys(model) and model.size == READER_SIZE


def _is_stacked(model: LatentDiffusion) -> bool:
    "Does the model see its condition, or a part of it, position by position?"
    return model.conditioner is not None and model.conditioner.concat_channels > 0


def _small_key(model: LatentDiffusion) -> str | None:
    "The key of the small image that a super-resolution model enlarges; None for other models."
    return next((key for key in SMALL if key in model_keys(model)), None) if _is_stacked(model) else None


def _is_inpainting(model: LatentDiffusion) -> bool:
    "Is the model given an image with a hole?"
    return _is_stacked(model) and {"image", "mask"} <= set(model_keys(model))


def _judged_maps(model: LatentDiffusion, dataset: str) -> tuple[str, ...]:
    "The maps that the model reads, and that the judge can compare with what it reads in the model's images."
    keys = model_keys(model) if dataset == "toy" and model.size == READER_SIZE else ()
    return tuple(key for key in MAPS if key in keys)


def default_splits(model: LatentDiffusion, dataset: str) -> tuple[str, ...]:
    "The held-out split, and for captions of toy scenes also the one with pairs that no training has."
    return ("test", "unseen_pairs") if dataset == "toy" and "caption" in model_keys(model) else ("test",)


def open_split(
    model: LatentDiffusion,
    dataset: str,  # its name
    data_dir: str | Path | None,
    split: str,
    n: int,  # images of each set; fewer where the split has not enough
    sets: int = 1,  # of each kind
) -> Split:
    "A split of a data set for a model; LDMError where it has not what the model reads, or too few images."
    keys, known = model_keys(model), known_keys(dataset)
    if missing := [key for key in keys if key not in known]:
        listed = ", ".join(missing)
        raise LDMError(f"dataset: the model reads {', '.join(keys)}, but the samples of '{dataset}' have no {listed}")

    def opened(*keys: str) -> SampleDataset:
        return open_dataset(dataset, data_dir, split, model.size, keys=keys)

    images, conditions = opened("image"), opened(*keys) if keys else None
    if conditions is not None and len(conditions) != len(images):  # samples without a caption, for instance
        images = opened(*dict.fromkeys(("image", *keys)))
    if (n := min(n, len(images) // (2 * sets))) < LEAST:
        halves = "two halves" if sets == 1 else f"for sets={sets}, {2 * sets} parts"
        told = f"dataset: split '{split}' of '{dataset}' has {len(images)} images that fit, but {halves} of at least"
        raise LDMError(f"{told} {LEAST} are needed")
    if n * 3 * model.size**2 > MOST_BYTES:
        raise LDMError(f"n={n}: so many images of {model.size}² need more than 16 GiB: take fewer")
    return Split(split, images, conditions, n, sets)


@torch.no_grad()
def _check_conditions(model: LatentDiffusion, split: Split, dataset: str) -> None:
    "LDMError where the model cannot read the first condition of a split."
    if split.conditions is None:
        return
    try:
        model.denoiser(_rows(split.conditions, [0]), 1.0)
    except LDMError as error:
        told = str(error).removeprefix("prompts: ")
        raise LDMError(f"dataset: '{dataset}' does not fit the model: {told}") from error


def pick_extractor(
    name: str | None,  # toy-features, vgg16 or inception; None: what suits the data set
    dataset: str,  # its name
    weights_dir: str | Path | None,
    device: torch.device,
) -> Extractor:
    "The features: of the toy data sets toy-features, of others inception, else vgg16, where their weights are at hand."
    if name is not None or dataset in TOY:
        return find_extractor(name or "toy-features", weights_dir, device)
    refused: list[str] = []
    for each in ("inception", "vgg16"):
        try:
            return find_extractor(each, weights_dir, device)
        except CheckpointError:  # its file is there, but damaged
            raise
        except LDMError as error:
            refused.append(str(error))
    raise LDMError(f"features: '{dataset}' needs those of a network for photographs. {'. '.join(refused)}")


# --- Sets of images, as bytes ---


def from_bytes(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    "Bytes as numbers in [-1, 1]."
    return images.float() / 127.5 - 1


def _rows(dataset: SampleDataset, rows: Sequence[int]) -> dict[str, Any]:
    "Samples of a data set as a batch; drawn together where the data set can."
    several = getattr(dataset, "__getitems__", None)
    return collate(several(list(rows)) if several else [dataset[row] for row in rows])


def _parts(rows: range, size: int) -> list[range]:
    "Rows, so many at a time."
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def real_set(
    dataset: SampleDataset,  # gives `image`
    rows: range,  # which samples
    chunk: int = 64,  # images at once
) -> UInt8[Tensor, "n 3 h w"]:
    "Images of a data set."
    parts = progress(_parts(rows, check_count("chunk", chunk)), "reading images")
    return torch.cat([to_uint8(_rows(dataset, part)["image"]).cpu() for part in parts])


@torch.no_grad()
def reconstructed_set(
    model: LatentDiffusion,
    images: UInt8[Tensor, "n 3 h w"],
    chunk: int = 64,  # images at once
) -> UInt8[Tensor, "n 3 h w"]:
    "Images through the model's first stage: no image that the model draws can be better."
    parts = progress(images.split(check_count("chunk", chunk)), "reconstructing")
    return torch.cat([to_uint8(model.first_stage.reconstruct(from_bytes(x).to(model.device))).cpu() for x in parts])


@dataclass(frozen=True)
class Given:
    "What the images of a set are drawn for, as far as it can be compared with images."

    hole: Bool[Tensor, "n 1 h w"] | None = None  # where the image was missing
    enlarged: UInt8[Tensor, "n 3 h w"] | None = None  # the small images, by bicubic interpolation
    maps: Mapping[str, Any] = field(default_factory=dict)  # those of MAPS that the judge reads, all n of each

    def pasted(self, images: UInt8[Tensor, "n 3 h w"], real: UInt8[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n 3 h w"]:
        "Images with what was known of the real ones in its place."
        return images if self.hole is None else torch.where(self.hole, images, real)

    def baselines(self, real: UInt8[Tensor, "n 3 h w"], chunk: int = 64) -> dict[str, UInt8[Tensor, "n 3 h w"]]:
        "Sets of images that need no model, by name."
        found = {} if self.enlarged is None else {BICUBIC: self.enlarged}
        if self.hole is not None:
            parts = zip(real.split(chunk), self.hole.split(chunk))
            found[FILL] = torch.cat([to_uint8(mean_fill(from_bytes(x), hole)) for x, hole in parts])
        return found


def _given_part(model: LatentDiffusion, batch: Mapping[str, Any], maps: Sequence[str]) -> dict[str, Any]:
    "What is kept of the conditions of a batch: the fields of `Given`, and maps by their keys."
    found: dict[str, Any] = {key: batch[key] for key in maps}
    if _is_inpainting(model):
        found["hole"] = batch["mask"] >= 0.5  # as `InpaintingConditioner` reads it
    if (key := _small_key(model)) is not None:
        small = batch[key].float()
        found["enlarged"] = to_uint8(upsample(small, model.size // small.shape[-1]))
    return found


def read_given(
    model: LatentDiffusion,
    split: Split,
    rows: range,  # which samples
    maps: Sequence[str] = (),  # keys of maps that the judge reads
    chunk: int = 64,  # samples at once
) -> Given:
    "What a model is given for these samples; empty for a model that is given nothing that fixes an image."
    if split.conditions is None or not (maps or _is_inpainting(model) or _small_key(model)):
        return Given()
    conditions, cut = split.conditions, progress(_parts(rows, check_count("chunk", chunk)), "reading conditions")
    parts = [_given_part(model, _rows(conditions, part), maps) for part in cut]

    def joined(name: str) -> Any:
        values = [part[name] for part in parts]
        return torch.cat(values) if isinstance(values[0], Tensor) else [each for value in values for each in value]

    found = {name: joined(name) for name in parts[0]}
    return Given(found.get("hole"), found.get("enlarged"), {key: found[key] for key in maps})


class KeptSamples:
    "Finished batches of drawn images in a folder, so that a drawing that was interrupted goes on."

    def __init__(self, folder: str | Path):
        self.folder = place(folder)
        self.used: list[Path] = []

    def start(self, about: Mapping[str, Any]) -> Path:
        "The folder of the batches that are drawn in exactly this way."
        told = json.dumps(about, sort_keys=True, default=str)
        folder = self.folder / hashlib.sha256(told.encode()).hexdigest()[:16]
        if not (file := folder / "description.json").exists():
            folder_for(file)
            save_json(parse_json(told), file)
        self.used.append(folder)
        return folder

    def remove(self) -> None:
        "Remove the batches that were used; those that are drawn in another way stay."
        for folder in dict.fromkeys(self.used):
            remove_leftovers(folder)
            for path in [*folder.glob("batch-*.safetensors"), folder / "description.json"]:
                with writing(path):
                    path.unlink(missing_ok=True)
            with suppress(OSError):  # something else lies there
                folder.rmdir()
        with suppress(OSError):
            self.folder.rmdir()


def _kept_batch(path: Path, rows: str, shape: tuple[int, ...]) -> Tensor | None:
    "The images of a kept batch; None where there is none, or where it is damaged: it is drawn again then."
    with suppress(CheckpointError):
        images = load_tensors(path).get("images")
        if images is not None and images.dtype == torch.uint8 and images.shape == shape:
            return images if load_notes(path).get("rows") == rows else None
    return None


def _description(
    model: LatentDiffusion, drawing: Drawing, conditions: SampleDataset | None, size: int, name: str
) -> dict[str, Any]:
    "All that decides the drawn images, but which of them."
    parts = {"first_stage": model.first_stage, "unet": model.unet, "conditioner": model.conditioner}
    return {
        "set": name,
        "weights": weights_checksum(model),
        "parts": {name: getattr(part, "config", None) for name, part in parts.items()},
        "schedule": model.schedule.config,
        "size": model.size,
        "drawing": {**asdict(drawing), "batch_size": size},
        "conditions": None if conditions is None else conditions.identity(),
        "device": model.device.type,
        "versions": {name: version(name) for name in ("ldm_edu", "torch")},
    }


def _batches(seed: int, n: int, size: int) -> list[range]:
    "Images 0 to n - 1 in batches of those whose seeds `LatentDiffusion.sample` draws together."
    ends = [0, *range(size - seed % size, n, size), n]
    return [range(start, end) for start, end in zip(ends, ends[1:])]


@torch.no_grad()
def draw_set(
    model: LatentDiffusion,
    drawing: Drawing,
    rows: Sequence[int],  # image i is drawn for the condition of this sample; a model without any counts them
    conditions: SampleDataset | None = None,  # gives what the conditioner reads; None: an unconditional model
    kept: KeptSamples | None = None,  # where finished batches are kept, and found again; None: nowhere
    name: str = DRAWN,  # of the set, beside the progress bar
) -> UInt8[Tensor, "n 3 h w"]:
    "Draw an image for each of the rows; an image is the same to the bit wherever an earlier drawing was interrupted."
    n = check_count("the number of rows", len(rows))
    size = min(check_count("batch_size", drawing.batch_size), n)
    check_count("seed", drawing.seed, 0, MOST_SEED + 1 - n)
    folder = None if kept is None else kept.start(_description(model, drawing, conditions, size, name))

    def drawn(part: range) -> Tensor:
        first, some = drawing.seed + part.start, [rows[i] for i in part]
        path = None if folder is None else folder / f"batch-{first:010d}-{len(part)}.safetensors"
        shape = len(part), 3, model.size, model.size
        if path is not None and (found := _kept_batch(path, str(some), shape)) is not None:
            return found
        batch = None if conditions is None else _rows(conditions, some)
        how = {"steps": drawing.steps, "scale": drawing.scale, "sampler": drawing.sampler, "batch_size": size}
        images = to_uint8(model.sample(batch, len(part), seed=first, **how)).cpu()
        if path is not None:
            save_tensors({"images": images}, path, notes={"rows": str(some)})
        return images

    return torch.cat([drawn(part) for part in progress(_batches(drawing.seed, n, size), f"drawing: {name}")])


# --- Numbers ---


@dataclass(frozen=True)
class SetFeatures:
    "What an extractor says of a set of images."

    vectors: Float[Tensor, "n d"]
    probabilities: Float[Tensor, "n k"] | None  # of the extractor's classes; None: it has none


def set_features(extractor: Extractor, images: UInt8[Tensor, "n 3 h w"], chunk: int = 64) -> SetFeatures:
    "The features of a set of images, on the CPU."
    vectors = extract(extractor, map(from_bytes, images.split(chunk)), chunk)
    found = [extractor.probabilities(from_bytes(x).to(extractor.device)) for x in images.split(chunk)]
    known = [p.float().cpu() for p in found if p is not None]
    return SetFeatures(vectors, torch.cat(known) if known else None)


def _mean(name: str, mean: Mean, n: int, of: Mapping[str, Any]) -> Measurement:
    "A mean with its standard error as a measurement."
    return Measurement.mean(name, mean.value, mean.error, n, of=of)


def compare(reference: SetFeatures, found: SetFeatures, of: Mapping[str, Any], floor: float) -> list[Measurement]:
    """How far a set of images is from the reference, how much of each the other covers, and its inception score.

    `floor` is the Fréchet distance of other real images from the reference; what is above it is the excess.
    """
    x, y = reference.vectors, found.vectors
    n, far = len(y), frechet_distance(x, y)
    excess = [] if of["set"] == REAL else [Measurement("Fréchet excess", far - floor, of, n=n)]
    numbers = [Measurement("Fréchet distance", far, of, n=n), *excess]
    numbers.append(_mean("kernel distance", kernel_distance(x, y), n, of))
    if n > NEIGHBOURS:
        both = zip(("precision", "recall"), precision_recall(x, y, NEIGHBOURS))
        numbers += [Measurement(name, value, of, n=n) for name, value in both]
    if found.probabilities is not None:
        splits = min(10, max(2, n // PART))
        score = inception_score(found.probabilities, splits)
        error = score.error / (splits - 1) ** 0.5  # of the mean over the parts, whose deviation is given
        numbers.append(_mean("inception score", replace(score, error=error), n, of))
    return numbers


def _shares(accuracy: PromptAccuracy, of: Mapping[str, Any]) -> list[Measurement]:
    "A prompt accuracy as measurements; a class of words that no caption has is left out."
    shares = [accuracy.prompts, accuracy.exact, accuracy.things, accuracy.relations]
    named = zip(PROMPTS, [*shares, *(accuracy.words[word] for word in WORDS)])
    return [Measurement.share(name, share.right, share.n, of=of) for name, share in named if share.n]


def _scored_images(
    images: UInt8[Tensor, "n 3 h w"],
    real: UInt8[Tensor, "n 3 h w"],
    hole: Bool[Tensor, "n 1 h w"] | None,
    distance: LPIPS | None,
    of: Mapping[str, Any],
    chunk: int = 64,  # images at once
) -> list[Measurement]:
    "How well images agree with the real ones that their conditions were made of, in a hole or everywhere."
    holes = [None] * len(images) if hole is None else hole.split(chunk)
    trios, where = zip(images.split(chunk), real.split(chunk), holes), {} if hole is None else {"pixels": "hole"}
    parts = [image_agreement(from_bytes(x), from_bytes(y), distance, part, chunk) for x, y, part in trios]
    numbers = []
    for name in parts[0]:
        mean, unit = Mean.of(torch.cat([part[name] for part in parts]).double()), "dB" if name == "PSNR" else ""
        numbers.append(Measurement.mean(name, mean.value, mean.error, len(images), of={**of, **where}, unit=unit))
    return numbers


def _scored_maps(found: MapAgreement, of: Mapping[str, Any]) -> list[Measurement]:
    "What the judge read of maps; a mean IoU of one set has no interval."
    numbers = []
    if found.intersection is not None and found.union is not None:
        n = len(found.union)
        numbers.append(Measurement("segmentation, mean IoU", mean_iou(found.intersection, found.union), of, n=n))
    if found.depth is not None:
        numbers.append(_mean("depth correlation", Mean.of(found.depth.double()), len(found.depth), of))
    if found.without_floor is not None:
        numbers.append(_mean(WITHOUT_FLOOR, Mean.of(found.without_floor.double()), len(found.without_floor), of))
    if hits := [hit for each in found.boxes or [] for hit in each]:
        numbers.append(Measurement.share("boxes hit", sum(hits), len(hits), of=of))
    return numbers


def try_scales(
    model: LatentDiffusion, split: Split, drawing: Drawing, reader: SceneReader, kept: KeptSamples | None
) -> tuple[float, list[Measurement]]:
    "The scale at which most captions are drawn exactly (the lowest of equals), and the shares at all of them."
    texts, numbers = split.texts(range(split.n)), []
    for scale in SCALES:
        how = replace(drawing, scale=scale)
        images = draw_set(model, how, range(split.n), split.conditions, kept, f"scale {scale:g}")
        exact = prompt_accuracy(from_bytes(images), texts, reader).exact
        of = {"set": DRAWN, "split": split.name, **how.of(model)}
        numbers.append(Measurement.share(CHOICE, exact.right, exact.n, of=of))
    best = max(numbers, key=lambda m: (m.value, -float(m.of["scale"])))
    return float(best.of["scale"]), numbers


@torch.no_grad()
def score_diversity(
    model: LatentDiffusion, split: Split, drawing: Drawing, n: int, kept: KeptSamples | None
) -> list[Measurement]:
    "Mean distance of two images of one caption: of four drawn ones, and of four random scenes that fit it."
    rows = [row for row in range(n) for _ in range(TIMES)]
    drawn = draw_set(model, drawing, rows, split.conditions, kept, "diversity")
    rng = np.random.default_rng(drawing.seed)
    scenes = [scene for text in split.texts(range(n)) for scene in _fitting_scenes(text, TIMES, rng)]
    distance = ToyFeatures.from_pretrained("toy-features").to(model.device).distance
    i, j = torch.triu_indices(TIMES, TIMES, offset=1)  # every pair once

    def spread(name: str, images: Tensor, **how: Any) -> Measurement:
        groups = [from_bytes(some).to(model.device) for some in images.split(TIMES)]
        far = torch.stack([distance(some[i], some[j]).float().mean().cpu() for some in groups])
        of = {"set": name, "split": split.name, **how, "features": "ToyFeatures"}
        return _mean("diversity", Mean.of(far, digits=3), n, of)

    true = torch.cat([to_uint8(render(some, model.size)) for some in zip(*[iter(scenes)] * TIMES)])
    return [spread(DRAWN, drawn, **drawing.of(model)), spread(FITTING, true)]


@dataclass(frozen=True)
class Judges:
    "What the sets of images are judged by."

    extractor: Extractor
    reader: SceneReader | None  # of toy scenes with captions
    clip: str | Path | None  # folder of a CLIP model
    maps: SceneReader | None = None  # of toy scenes with maps
    keys: tuple[str, ...] = ()  # of these maps
    distance: LPIPS | None = None  # of an image that is fixed by its condition from the real one
    about: str = ""  # the sentence about this distance


def _loss_network(model: LatentDiffusion) -> Any:
    "The perceptual distance in the loss of the model's first stage, as the recipe names it; None: it names none."
    found: Any = model.provenance
    for name in ("recipe", "first_stage", "perceptual"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _pick_distance(model: LatentDiffusion, weights_dir: str | Path | None) -> tuple[LPIPS | None, str]:
    "LPIPS through a network that the first stage's loss does not use, or None; and a sentence about it."
    net = "vgg" if _loss_network(model) == "lpips-alex" else "alex"
    least, name = BACKBONES[net].smallest, f"LPIPS ({NETWORKS[net]})"
    if model.size < least:
        return None, f"{name} is left out: it needs images of at least {least} pixels along each side."
    try:
        found = LPIPS(net, weights_dir, download=False).to(model.device)
    except CheckpointError:  # its file is there, but damaged
        raise
    except LDMError:
        return None, f"{name} is left out: its weights, or the package lpips, are not at hand."
    return found, f"No loss in the model's recipe uses the network of {name}."


def _judges(model: LatentDiffusion, options: Evaluation, dataset: str, is_judged: bool) -> Judges:
    "What an evaluation needs to judge images; LDMError where one of them cannot, before anything is drawn."
    extractor = pick_extractor(options.features, dataset, options.weights_dir, model.device)
    blank = torch.zeros(2, 3, model.size, model.size, device=extractor.device)
    extractor(blank)
    if options.clip is not None:
        if "caption" not in model_keys(model):
            raise LDMError("clip: a CLIP score compares images with captions, but the model reads none")
        clip_score(blank, ["nothing", "grey"], options.clip, model.device)
    keys, is_fixed = _judged_maps(model, dataset), _is_inpainting(model) or _small_key(model) is not None
    reader = SceneReader.from_pretrained("scene-reader").to(model.device) if is_judged or keys else None
    distance, about = _pick_distance(model, options.weights_dir) if is_fixed else (None, "")
    captions, maps = reader if is_judged else None, reader if keys else None
    return Judges(extractor, captions, options.clip, maps, keys, distance, about)


def _score_given(
    given: Given, name: str, images: Tensor, real: Tensor, judges: Judges, of: Mapping[str, Any]
) -> list[Measurement]:
    "How well a set of images agrees with what was given; real ones only where the judge reads them."
    numbers: list[Measurement] = []
    if name != REAL and (given.hole is not None or given.enlarged is not None):
        numbers += _scored_images(images, real, given.hole, judges.distance, of)
    if judges.maps and name not in (BICUBIC, FILL):
        numbers += _scored_maps(map_agreement(judges.maps, from_bytes(images), given.maps), of)
    return numbers


def score_set(
    model: LatentDiffusion, split: Split, number: int, drawing: Drawing, judges: Judges, kept: KeptSamples | None
) -> list[Measurement]:
    "All numbers of one set of each kind: drawn images, reconstructions and real ones, each against other real images."
    n, first = split.n, split.n * number
    rows, others_rows = range(first, first + n), range(first + n * split.sets, first + n * split.sets + n)
    drawn = draw_set(model, replace(drawing, seed=drawing.seed + first), rows, split.conditions, kept)
    others, given = real_set(split.images, rows), read_given(model, split, rows, judges.keys)
    back = reconstructed_set(model, others, drawing.batch_size)
    sets = {DRAWN: given.pasted(drawn, others), BACK: given.pasted(back, others), REAL: others}
    reference = set_features(judges.extractor, real_set(split.images, others_rows))
    features = {name: set_features(judges.extractor, images) for name, images in sets.items()}
    floor = frechet_distance(reference.vectors, features[REAL].vectors)
    texts = split.texts(rows) if judges.reader or judges.clip is not None else []
    seen = {"features": judges.extractor.name, "resize": judges.extractor.resize}
    numbers: list[Measurement] = []
    for name, images in sets.items():
        of = {"set": name, "split": split.name, **(drawing.of(model) if name == DRAWN else {})}
        numbers += compare(reference, features[name], {**of, **seen}, floor)
        if judges.clip is not None:
            score = clip_score(from_bytes(images), texts, judges.clip, model.device)
            numbers.append(_mean("CLIP score", score, n, {**of, "features": f"CLIP {Path(judges.clip).name}"}))
        if judges.reader and name != REAL:
            numbers += _shares(prompt_accuracy(from_bytes(images), texts, judges.reader), of)
        numbers += _score_given(given, name, images, others, judges, of)
    for name, images in given.baselines(others).items():
        numbers += _score_given(given, name, images, others, judges, {"set": name, "split": split.name})
    return numbers


def _over_sets(numbers: Sequence[Measurement]) -> Measurement:
    "One number of several sets as one: of shares that of all images, of others the mean, with Student's t interval."
    first = numbers[0]
    if first.unit == "%":
        right, n = sum(round(m.value * (m.n or 0) / 100) for m in numbers), sum(m.n or 0 for m in numbers)
        return Measurement.share(first.name, right, n, of=first.of)
    of, values = {**first.of, "sets": len(numbers)}, [m.value for m in numbers]
    if math.inf in values:  # the PSNR of a set with two equal images: it has no interval
        return Measurement(first.name, math.inf, of, first.unit, n=first.n)
    return Measurement.repeated(first.name, values, of=of, n=first.n, unit=first.unit)


def score_split(
    model: LatentDiffusion, split: Split, drawing: Drawing, judges: Judges, kept: KeptSamples | None
) -> list[Measurement]:
    "All numbers of a split: of its only set of each kind, or of several sets together."
    found = [score_set(model, split, k, drawing, judges, kept) for k in range(split.sets)]
    if split.sets == 1:
        return found[0]
    groups: dict[tuple[Any, ...], list[Measurement]] = {}
    for number in (number for numbers in found for number in numbers):
        groups.setdefault((number.name, *sorted(number.of.items())), []).append(number)
    singly = [
        replace(number, name=BY_SET, of={**number.of, "number": k})
        for k, numbers in enumerate(found)
        for number in numbers
        if number.name == "Fréchet excess"
    ]
    return [*map(_over_sets, groups.values()), *singly]


# --- A whole evaluation ---


def _check_choice(model: LatentDiffusion, is_judged: bool, splits: Sequence[str]) -> None:
    "LDMError where no scale can be chosen."
    if not is_judged:
        wanted = f"captions of toy scenes and draws images of {READER_SIZE}²"
        raise LDMError(f"choose: a scale is chosen only for a model that reads {wanted}")
    if "scale" not in Drawing().of(model):
        raise LDMError("choose: the model's condition is never dropped, so it has no scale")
    if "validation" in splits:
        raise LDMError("choose looks at captions of validation, so split validation would measure on the same ones")


def _captions_varied(options: Evaluation, model: LatentDiffusion, is_judged: bool) -> int:
    "Of how many captions several images are drawn; LDMError where diversity is asked for, and cannot be measured."
    is_text = is_judged and model_keys(model) == ("caption",)  # another condition would fix the image as well
    if options.varied is None:
        return min(VARIED, options.n) if is_text else 0
    if check_count("varied", options.varied, 0) == 1:
        raise LDMError("varied=1: diversity is a mean over captions, so it needs at least 2; 0 leaves it out")
    if options.varied and not is_text:
        wanted = f"captions of toy scenes, and nothing else, and draws images of {READER_SIZE}²"
        raise LDMError(f"varied: diversity is measured only of a model that reads {wanted}")
    return min(options.varied, options.n)


def _about_intervals(
    sets: int,
    varied: int,  # captions that diversity is measured with
) -> list[str]:
    "What the intervals are."
    if sets == 1:
        return ["An interval is of 95 %: of a share Wilson's, of a mean 1.96 standard errors to either side."]
    once = ["Diversity is measured once; its interval is 1.96 standard errors to either side."]
    return [
        f"There are {sets} sets of each kind, all of other images, drawn and real: a number is the mean of {sets},",
        "and its interval of 95 % is Student's t. A share is of all images together, and its interval Wilson's.",
        *(once if varied else []),
    ]


def _about_given(model: LatentDiffusion, judges: Judges) -> list[str]:
    "How images are compared with what they were drawn for; nothing for a model that is given nothing that fixes them."
    lines, key = [], _small_key(model)
    if _is_inpainting(model):
        lines += [
            "What is known of an image is pasted into the drawn one and into the reconstruction, as in use, so that",
            "the ceiling is comparable: every number is of these images. PSNR, SSIM and LPIPS compare holes with the",
            f"real image, pixels outside are not counted. '{FILL}': the hole has the mean colour of what is known.",
        ]
    elif key is not None:
        lines.append("PSNR, SSIM and LPIPS compare each image with the real one that its condition was made of.")
    if key is not None:
        lines.append(f"'{BICUBIC}': {key} enlarged by bicubic interpolation.")
    lines += [judges.about] if judges.about else []
    if judges.keys:
        lines.append(f"What the judge reads in images is compared with the given {' and '.join(judges.keys)}.")
        lines.append("Of other real images, that is the judge's own score.")
    if "segmentation" in judges.keys:
        lines.append("For the mean IoU, the pixels of all images are counted first.")
    if "depth" in judges.keys:
        lines.append("A depth correlation of 0.96 says nothing: so alike is the floor in the depths of any two scenes.")
        lines.append("Without the floor it is that of how much nearer than an empty floor both are: 0.2 says nothing.")
    return lines


def _about(model: LatentDiffusion, splits: Sequence[Split], dataset: str, n: int, varied: int, judges: Judges) -> str:
    "How all was measured, line by line."
    what = "Image i is drawn with seed + i"
    if model_keys(model):
        what += f", for {' and '.join(model_keys(model))} of sample i of the split"
    sets = splits[0].sets
    lines = [
        f"{what}.",
        "The reconstructions are of the real images of the same samples, and these images are the other real ones.",
        "Each set is compared with the same number of real images behind them in the split; all images as bytes.",
        *_about_intervals(sets, varied),
        "Fréchet distance, precision, recall and inception score depend on the number of images: compare equal ones.",
        "The Fréchet excess is what the distance is above that of the other real images.",
        *_about_given(model, judges),
    ]
    for split in splits:
        if split.n < n:
            told = f"Split '{split.name}' of '{dataset}' has {len(split.images)} images"
            lines.append(f"{told}, so each set has {split.n} in place of {n}.")
    reader = judges.reader or judges.maps
    judge = {} if reader is None else (reader.provenance or {}).get("scores", {"itself": "not measured"})
    return "\n".join([*lines, *(f"{f'judge, {name}':28s} {value}" for name, value in judge.items())])


def evaluate(
    model: LatentDiffusion,
    options: Evaluation | None = None,  # None: as they are by default
    name: str = "a model",  # for the title
    kept: KeptSamples | None = None,  # where drawn images are kept, so that an evaluation that was interrupted goes on
    command: str | None = None,  # that measures this; None: the one that runs
) -> Measurements:
    """Distances of drawn images from real ones, beside those of reconstructions and of other real images.

    For a model that draws captions of toy scenes, also how many are drawn correctly, word by word, and how diverse.
    For one that is given a small image, a hole or a map, also how well its images agree with that.
    """
    options = options or Evaluation()
    drawing, n = options.drawing, check_count("n", options.n, LEAST)
    check_sampling(model.schedule.T, drawing.steps, drawing.scale, None, drawing.sampler, {})
    dataset = chosen_dataset(model, options)
    is_judged = _is_judged(model, dataset)
    wanted = tuple(dict.fromkeys(options.splits)) or default_splits(model, dataset)
    varied = _captions_varied(options, model, is_judged)
    sets = check_count("sets", options.sets, 1, max(1, MOST_SEED // n))  # each image has a seed of its own
    check_count("seed", drawing.seed, 0, MOST_SEED + 1 - max(n * sets, TIMES * varied))
    if options.choose:
        _check_choice(model, is_judged, wanted)

    def opened(split: str, n: int, sets: int = 1) -> Split:
        return open_split(model, dataset, options.data_dir, split, n, sets)

    splits = [opened(split, n, sets) for split in wanted]
    _check_conditions(model, splits[0], dataset)
    judges = _judges(model, options, dataset, is_judged)
    numbers: list[Measurement] = []
    if options.choose and judges.reader:
        scale, numbers = try_scales(model, opened("validation", max(LEAST, n // 2)), drawing, judges.reader, kept)
        drawing = replace(drawing, scale=scale)
    for split in splits:
        numbers += score_split(model, split, drawing, judges, kept)
    if varied:
        numbers += score_diversity(model, splits[0], drawing, min(varied, splits[0].n), kept)
    about = _about(model, splits, dataset, n, varied, judges)
    packages = ["torch-fidelity"] if judges.extractor.name.startswith("Inception") else []
    title = evaluation_title(model, options, name)
    return measured_here(title, numbers, about, drawing.seed, model.device, packages, command)


# --- In print, in a model's config, and in a file ---

_DIGITS = {
    "Fréchet distance": 3,
    "Fréchet excess": 3,
    "kernel distance": 4,
    "precision": 3,
    "recall": 3,
    "inception score": 2,
    "PSNR": 2,
    "SSIM": 3,
    **{f"LPIPS ({name})": 3 for name in NETWORKS.values()},
    "segmentation, mean IoU": 3,
    "depth correlation": 3,
    WITHOUT_FLOOR: 3,
}  # in print
_HEADS = {DRAWN: "drawn", BACK: "reconstructed (the ceiling)", REAL: "other real images"}
_BASELINES = {BICUBIC: "bicubic interpolation", FILL: "mean colour of what is known"}  # only where there is such a set


def _told(number: Measurement) -> str:
    "A number with its interval; a share as the judge prints it."
    if number.unit != "%":
        return number.text(_DIGITS.get(number.name))
    return f"{number.value:.1f} % ({number.low:.1f} to {number.high:.1f}, n = {number.n})"


def _rows_of(numbers: Measurements) -> dict[str, dict[str, str]]:
    "The numbers of a split as text: by name, and by set."
    names = dict.fromkeys(m.name for m in numbers)
    rows = {name: {str(m.of["set"]): _told(m) for m in numbers.of(name)} for name in names if name not in PROMPTS}
    if names.keys() & set(PROMPTS):
        none = dict.fromkeys((DRAWN, BACK), str(Share(0, 0)))
        rows |= {name: none | {str(m.of["set"]): _told(m) for m in numbers.of(name)} for name in PROMPTS}
    return rows


def _how(of: Mapping[str, Any]) -> str:
    "How images were drawn."
    scale = f", scale {of['scale']:g}" if "scale" in of else ""
    return f"{of['steps']} steps of {of['sampler']}{scale}"


def _baselines(numbers: Measurements) -> dict[str, str]:
    "The sets that need no model, and the heads of their columns; only those that were measured."
    return {name: head for name, head in _BASELINES.items() if numbers.of(set=name)}


def _block(split: str, numbers: Measurements) -> str:
    "The numbers of a split as a table: a row for each name, a column for each set."
    first = numbers.one("Fréchet distance", set=DRAWN)
    seen = first.of["features"]
    sets = f", {first.of['sets']} sets of each kind" if "sets" in first.of else ""
    head = f"{split}, {first.n} images of each set{sets}; drawn by {_how(first.of)}; features: {seen}, images {first.of['resize']}"
    holes = {m.name for m in numbers.of(pixels="hole")}
    heads = {**_HEADS, **_baselines(numbers)}
    rows = {"": heads, **_rows_of(numbers)}
    lines = []
    for name, row in rows.items():
        label = f"{name} of {seen}" if name == "inception score" else f"{name} of the hole" if name in holes else name
        lines.append(" ".join([f"{label:30s}", *(f"{row.get(key, ''):36s}" for key in heads)]).rstrip())
    return "\n".join([head, *lines])


def _parted(measured: Measurements) -> tuple[Measurements, Measurements, dict[str, Measurements]]:
    "The numbers that a scale was chosen by, those of diversity, and the others by split."
    names = [m.name for m in measured if m.name not in (CHOICE, BY_SET, "diversity")]
    others = measured.of(*names)
    splits = {str(split): others.of(split=split) for split in others.keys("split")}
    return measured.of(CHOICE), measured.of("diversity"), splits


def table(measured: Measurements) -> str:
    "An evaluation as text: a table for each split, and how it was measured."
    choice, diversity, splits = _parted(measured)
    lines = [f"{m.of['split']}, scale {m.of['scale']:g}: {_told(m)} of the captions drawn exactly" for m in choice]
    blocks = [*(["\n".join(lines)] if lines else []), *(_block(split, numbers) for split, numbers in splits.items())]
    if diversity:
        drawn, true = diversity.one("diversity", set=DRAWN), diversity.one("diversity", set=FITTING)
        told = f"diversity of {drawn.n} captions of {drawn.of['split']}, drawn by {_how(drawn.of)}: {drawn.text(3)}"
        blocks.append(
            f"{told}; of scenes that fit them: {true.text(3)}\n"
            f"(mean distance of {TIMES} images of a caption by {drawn.of['features']})"
        )
    return "\n\n".join([measured.title, *blocks, measured.about])


def scores(measured: Measurements) -> dict[str, Any]:
    "An evaluation for the provenance in a model's config.json: texts by split, set and name."
    choice, diversity, splits = _parted(measured)
    found: dict[str, Any] = {}
    if choice:
        found["choice"] = {str(m.of["scale"]): m.value / 100 for m in choice}
    for split, numbers in splits.items():
        first = numbers.one("Fréchet distance", set=DRAWN).of
        told = ("steps", "sampler", "scale", "features", "resize", "sets")
        found |= {name: first[name] for name in told if name in first}
        rows, heads = _rows_of(numbers), {"drawn": DRAWN, "ceiling": BACK, "real halves": REAL}
        heads |= {name: name for name in _baselines(numbers)}
        found[split] = {head: {k: row[key] for k, row in rows.items() if key in row} for head, key in heads.items()}
    if diversity:
        drawn, true = diversity.one("diversity", set=DRAWN), diversity.one("diversity", set=FITTING)
        found["diversity"] = {"captions": drawn.n, "drawn": drawn.text(3), "fitting scenes": true.text(3)}
    return {**found, "about": measured.about}


def find_evaluation(
    path: str | Path,  # of a JSON file
) -> Measurements | None:
    "The evaluation in a file; None where there is no file, or where it holds something else."
    with suppress(LDMError):
        found = load_measurements(path)
        return found if found.of("Fréchet distance", set=DRAWN).numbers else None
    return None


def is_alike(one: Measurements, other: Measurements) -> bool:
    "Do two evaluations have one title and seed, and the same quantities, all measured in the same way?"

    def told(measured: Measurements) -> tuple[Any, ...]:
        counts = {m.of.get("split"): m.n for m in measured.of("Fréchet distance", set=DRAWN)}
        quantities = {(m.name, *sorted(m.of.items())) for m in measured}
        return measured.title, measured.seed, counts, quantities

    return told(one) == told(other)


def last_evaluation(
    folder: str | Path | None = None,  # None: the nearest runs/evaluation, from the working folder upwards
) -> Measurements | None:
    "The newest evaluation in a folder; None where there is none. CheckpointError where its file cannot be read."
    here = Path.cwd()
    places = [parent / "runs" / "evaluation" for parent in (here, *here.parents)] if folder is None else [place(folder)]
    for where in places:
        files = sorted(where.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        if files:
            return load_measurements(files[-1])
    return None
