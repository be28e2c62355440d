"""The data of a recipe: which keys are needed, where they are kept, and whether all parts fit each other."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm_edu.conditioning.condition import MergedConditioner
from ldm_edu.conditioning.guidance import drop
from ldm_edu.data.batches import SampleDataset, collate
from ldm_edu.data.cache import SampleCache, cached
from ldm_edu.data.registry import known_keys, open_dataset
from ldm_edu.errors import LDMError
from ldm_edu.training.recipes import AutoencoderRecipe, Recipe, Training
from ldm_edu.training.run import Run, RunOptions, stage_trainings
from ldm_edu.training.tasks import DiffusionTask, FirstStageTask, build_conditioner, build_first_stage, conditioner_keys

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
        batch["caption"] = pick_captions(batch["captions"], torch.zeros(len(indices)) if phrase is None else phrase)
    return {key: batch[key] for key in keys}


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
    is_trained = recipe.first_stage.training is not None and getattr(recipe, "pretrained", None) is None
    if is_trained and options.compile and recipe.first_stage.adversarial:
        raise LDMError(
            "compile: the adaptive weight needs a gradient in mid-step, which a compiled network does not reliably give"
        )
    dataset, _ = (open_split(recipe, options, split) for split in ("train", "validation"))
    if is_trained:
        with torch.device("meta"):
            task = FirstStageTask(recipe.first_stage)
            if task.adversary is not None:
                task.adversary.discriminator(torch.empty(1, 3, recipe.size, recipe.size))
    if isinstance(recipe, Recipe):
        check_condition(recipe, [dataset[i] for i in range(min(2, len(dataset)))])


def check_condition(recipe: Recipe, samples: Sequence[dict[str, Any]]) -> None:
    "`LDMError` where the conditioners cannot read samples, or the UNet not what they make of them; costs no memory."
    if not recipe.diffusion.conditioners:
        with torch.device("meta"):
            DiffusionTask(recipe)  # refuses arguments that are none of a UNet
        return
    batch = collate([{**s, "caption": s["captions"][0]} if "captions" in s else s for s in samples])
    names, b = " and ".join(line.name for line in recipe.diffusion.conditioners), len(samples)
    side = recipe.size // recipe.first_stage.f
    try:
        with torch.no_grad():
            untrained = partial(build_first_stage, recipe.first_stage)
            conditioner = build_conditioner(recipe.diffusion, lambda key: batch[key], untrained)
            assert conditioner is not None
            parts = conditioner.parts if isinstance(conditioner, MergedConditioner) else []
            if recipe.diffusion.drop_apart and not any(part.null().slots() for part in parts):
                raise LDMError(f"drop_apart={recipe.diffusion.drop_apart}, but none of them has a null: all are kept")
            cond, null = conditioner.eval()(batch), conditioner.null()
            if null.slots():
                cond = drop(cond, null, 0.5, torch.tensor([0.0, 1.0])[:b])
        with torch.device("meta"):
            x = torch.empty(b, recipe.first_stage.latent_channels, side, side)
            DiffusionTask(recipe, conditioner).unet(x, torch.zeros(b, dtype=torch.long), cond.to("meta"))
    except LDMError as error:
        raise LDMError(f"{names}: {error}") from error
    except Exception as error:  # a conditioner of the user's own may raise anything
        raise LDMError(f"{names}: {type(error).__name__}: {error}") from error
