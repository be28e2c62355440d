"""Runs so small that one is trained in seconds, and faults that are planted in copies of them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_edu.files import load_notes, load_tensors, save_tensors
from ldm_edu.training.dispatch import train
from ldm_edu.training.recipes import (
    AdversarialRecipe,
    AnyRecipe,
    AutoencoderRecipe,
    ConditionerRecipe,
    DiffusionRecipe,
    FirstStageRecipe,
    Recipe,
    Training,
)
from ldm_edu.training.run import RunOptions

KL = FirstStageRecipe(
    Training(150, 8, 5e-3, warmup=10, ema=0.98, images=256, held_out=32), channels=8, multipliers=(1, 2, 2), groups=4
)


def small(steps: int = 250, images: int = 256, **diffusion: Any) -> Recipe:
    """Drawn faces of 16² with their attributes: heard after a few seconds of training."""
    training = Training(steps, 16, 4e-3, warmup=10, ema=0.98, images=images, held_out=32)
    attributes = ConditionerRecipe("AttributesConditioner", {"attributes": 16, "dim": 32})
    shape = {"channels": 32, "multipliers": (1,), "blocks": 1, "attention_factors": (1,)}
    what = DiffusionRecipe(**{"training": training, "conditioners": (attributes,), **shape, **diffusion})
    return Recipe("small", "faces of 16² with attributes", "toy-faces", 16, KL, what)


def adversarial(steps: int = 30, start: int = 5) -> AutoencoderRecipe:
    """A first stage with a discriminator from step `start` on."""
    how = AdversarialRecipe(start, channels=8, layers=1, norm="group")
    first_stage = replace(KL, adversarial=how, training=KL.training.shortened(steps))
    return AutoencoderRecipe("small-adversarial", "a first stage against a discriminator", "toy-faces", 16, first_stage)


def train_here(folder: Path, recipe: AnyRecipe) -> Path:
    """The folder of a finished run on one thread."""
    torch.set_num_threads(1)
    train(recipe, folder, RunOptions(device="cpu", precision="fp32", every=50, sample_every=0, save_every=1e6))
    return folder


def copied(run: Path, folder: Path) -> Path:
    """A copy of a run that may be broken."""
    return shutil.copytree(run, folder, ignore=shutil.ignore_patterns("cache", "*.best.safetensors"))


def changed(run: Path, stage: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The run, with the tensors of a stage's state changed."""
    path = run / f"{stage}.safetensors"
    notes, tensors = load_notes(path), load_tensors(path)
    change(tensors)
    save_tensors(tensors, path, notes=notes)
    return run
