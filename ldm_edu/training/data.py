"""The data of a recipe: which keys are needed, where they are kept, and whether all parts fit each other."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm_edu.data.batches import SampleDataset, collate
from ldm_edu.data.cache import SampleCache, cached
from ldm_edu.data.registry import known_keys, open_dataset
from ldm_edu.errors import LDMError
from ldm_edu.training.recipes import AutoencoderRecipe, Recipe, Training
from ldm_edu.training.run import Run, RunOptions, stage_trainings
from ldm_edu.training.tasks import DiffusionTask, FirstStageTask, build_conditioner, conditioner_keys

AnyImageRecipe = Recipe | AutoencoderRecipe


def needed_keys(recipe: AnyImageRecipe) -> tuple[str, ...]:
    "The keys that a data set has to give; of several captions of an image all are kept, and one is picked at a time."
    wanted = conditioner_keys(recipe.diffusion) if isinstance(recipe, Recipe) else ()
    known = known_keys(recipe.dataset)
    if missing := [key for key in wanted if key not in known]:
        listed = ", ".join(missing)
        raise LDMError(f"the recipe's conditioners read {listed}, but data set '{recipe.dataset}' has no {listed}")
    captions = "captions" if "captions" in known else "caption"
    return tuple(dict.fromkeys(["image", *(captions if key == "caption" else key for key in wanted)]))


def open_split(recipe: AnyImageRecipe, options: RunOptions, split: str) -> SampleDataset:
    "A split of a recipe's data set, with the keys that are needed."
    return open_dataset(recipe.dataset, options.data_dir, split, recipe.size, keys=needed_keys(recipe))


def cached_dataset(run: Run, dataset: SampleDataset, n: int | None, name: str) -> SampleCache:
    "The first n samples of a data set from the cache; put there the first time, by one process."
    n = len(dataset) if n is None else min(n, len(dataset))
    mark = hashlib.sha256(json.dumps(dataset.identity(), sort_keys=True).encode()).hexdigest()[:8]
    with run.accelerator.main_process_first():
        return cached(dataset, run.cache / f"{name}-{n}-{mark}", n)


def cached_split(recipe: AnyImageRecipe, run: Run, split: str) -> SampleCache:
    "The samples of a split that any stage of a recipe needs, from the cache."
    trainings = stage_trainings(recipe)
    wanted = [t.images if split == "train" else t.held_out for t in trainings]
    most = None if None in wanted else max(n for n in wanted if n is not None)
    dataset = open_split(recipe, run.options, split)
    return cached_dataset(run, dataset, most, f"{recipe.dataset}-{split}-{recipe.size}")


def data_checksum(*caches: SampleCache) -> str:
    "A checksum of what caches hold, so that a run does not go on with other data."
    return hashlib.sha256("".join(cache.checksum for cache in caches).encode()).hexdigest()[:16]


def num_train_images(training: Training, dataset: SampleCache) -> int:
    "How many of the images a stage is trained on."
    return len(dataset) if training.images is None else min(training.images, len(dataset))


def pick_captions(
    captions: Sequence[Sequence[str]],  # of every image of a batch
    phrase: Tensor,  # (b,) uniform in [0, 1): which of them
) -> list[str]:
    "One caption for each image."
    return [texts[int(u * len(texts))] for texts, u in zip(captions, phrase.tolist())]


def condition_batch(
    dataset: SampleCache,
    keys: Sequence[str],  # that the conditioner reads; none: an empty batch
    indices: Sequence[int],
    phrase: Tensor | None = None,  # (b,) uniform in [0, 1); None: the first of several captions
) -> dict[str, Any]:
    "What a conditioner reads, of some samples."
    if not keys:
        return {}
    kept = "captions" if "captions" in dataset.keys else "caption"
    batch = dataset.batch(indices, [kept if key == "caption" else key for key in keys])
    if "caption" in keys and kept == "captions":
        batch["caption"] = pick_captions(batch.pop("captions"), torch.zeros(len(indices)) if phrase is None else phrase)
    return batch


def column_of(dataset: SampleCache, key: str) -> Any:
    "All values of a key, captions as one list of texts."
    if key == "caption" and "captions" in dataset.keys:
        return [text for texts in dataset.column("captions") for text in texts]
    return dataset.column(key)


# Whether all fits ----------------------------------------------------------------------------------------------------


def check_fit(recipe: AnyImageRecipe, options: RunOptions) -> None:
    "`LDMError` where the parts of a recipe do not fit each other, its options, or one sample of its data."
    diffusion = recipe.diffusion if isinstance(recipe, Recipe) else None
    halvings = 2 ** (len(diffusion.multipliers) - 1) if diffusion else 1
    if recipe.size % (recipe.first_stage.f * halvings):
        raise LDMError(f"size={recipe.size} cannot be halved as often as the networks do; try a power of two")
    if options.compile and recipe.first_stage.adversarial:
        raise LDMError(
            "compile: the adaptive weight needs a gradient in mid-step, which a compiled network does not reliably give"
        )
    sample = open_split(recipe, options, "train")[0]
    with torch.device("meta"):
        task = FirstStageTask(recipe.first_stage)
        if task.adversary is not None:
            task.adversary.discriminator(torch.empty(1, 3, recipe.size, recipe.size))
    if isinstance(recipe, Recipe):
        check_condition(recipe, sample)


def check_condition(recipe: Recipe, sample: Mapping[str, Any]) -> None:
    "`LDMError` where the conditioners cannot read a sample, or the UNet not what they make of it; costs no memory."
    if captions := sample.get("captions"):
        sample = {**sample, "caption": captions[0]}
    conditioner = build_conditioner(recipe.diffusion, lambda key: [sample[key]])
    cond = None if conditioner is None else conditioner(collate([dict(sample)])).to("meta")
    side = recipe.size // recipe.first_stage.f
    with torch.device("meta"):
        x = torch.empty(1, recipe.first_stage.latent_channels, side, side)
        task = DiffusionTask(replace(recipe, diffusion=replace(recipe.diffusion, conditioners=())), conditioner)
        task.unet(x, torch.zeros(1, dtype=torch.long), cond)
