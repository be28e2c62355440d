"""A recipe so small that a run can be killed ten times in one test, and processes that train it and can be killed."""

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm_edu.data.toy.captions import VOCABULARY
from ldm_edu.files import load_tensors
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


def tiny(steps: int = 6, batch_size: int = 4, **training: Any) -> Recipe:
    """Both stages and text, with as little of everything as there can be; `training` is for both stages."""
    usual = {"steps": steps, "batch_size": batch_size, "lr": 3e-3, "warmup": 2, "images": 24, "held_out": 16}
    how = Training(**(usual | training))
    return Recipe(
        name="tiny",
        about="as little of everything as there can be",
        dataset="toy",
        size=16,
        first_stage=FirstStageRecipe(how, channels=8, multipliers=(1, 2), groups=4),
        diffusion=small_diffusion(how, text()),
    )


def text(dim: int = 32) -> ConditionerRecipe:
    """The toy captions, for a transformer of one layer."""
    arguments = {"vocabulary": VOCABULARY, "length": 24, "dim": dim, "depth": 1, "heads": 4}
    return ConditionerRecipe("TextConditioner", arguments)


def small_diffusion(how: Training, *conditioners: ConditionerRecipe) -> DiffusionRecipe:
    """A UNet of one level."""
    shape = {"channels": 32, "multipliers": (1,), "blocks": 1, "attention_factors": (1,)}
    return DiffusionRecipe(how, **shape, conditioners=conditioners)


def tiny_autoencoder(steps: int = 6, start: int = 3, **training: Any) -> AutoencoderRecipe:
    """A first stage with a codebook, a perceptual distance, and a discriminator from step `start` on."""
    first_stage = replace(
        tiny(steps, **training).first_stage,
        regulariser="vq",
        num_codes=32,
        perceptual="toy-features",
        perceptual_weight=0.1,
        adversarial=AdversarialRecipe(start, channels=8, layers=1, norm="group"),
    )
    return AutoencoderRecipe("tiny-autoencoder", "all that a first stage can have", "toy", 16, first_stage)


def of_stages(recipe: Recipe, **training: Any) -> Recipe:
    """The recipe with some fields of both stages' training replaced."""
    stages = (recipe.first_stage, recipe.diffusion)
    first, second = (replace(stage, training=replace(stage.training, **training)) for stage in stages)
    return replace(recipe, first_stage=first, diffusion=second)


# How the small runs are done: a line in the log every third step, a checkpoint after each step, no images.
HOW = {"device": "cpu", "precision": "fp32", "every": 3, "sample_every": 0, "save_every": 0.0}


def train_tiny(folder: Path, recipe: AnyRecipe | None = None, **how: Any):
    """`tiny`, or another recipe, on one thread; goes on with what the folder holds, if it holds a run."""
    torch.set_num_threads(1)
    resume = (folder / "recipe.json").exists()
    return train(recipe or tiny(), folder, RunOptions(**(HOW | {"resume": resume} | how)))


def train_and_draw(folder: Path, recipe: AnyRecipe | None = None, **how: Any):
    """The same, with images at the end of each stage."""
    return train_tiny(folder, recipe, **{"sample_every": 100} | how)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a run's folder that must not depend on interruptions: model, both checkpoints of each stage."""
    paths = [*folder.glob("model/**/*.safetensors"), *folder.glob("*.safetensors")]
    found = {str(path.relative_to(folder)): load_tensors(path) for path in paths}
    named = {f"{file}: {name}": value for file, tensors in found.items() for name, value in tensors.items()}
    return {name: value for name, value in named.items() if not name.endswith(": seconds")}


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same to the last bit."""
    return [name for name in sorted(a | b) if not (name in a and name in b and torch.equal(a[name], b[name]))]


class Child:
    """A process of its own that runs `target(*args)`; what it writes goes to `output`.

    It is forked from a server that has imported the package already, so that starting one costs little."""

    def __init__(self, target: Callable[..., Any], *args: Any, output: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ldm_edu.training.dispatch"])
        self.output = output
        self.process = context.Process(target=run_here, args=(output, target, args), daemon=True)
        self.process.start()

    def signal(self, number: int) -> None:
        """Send the process a signal, if it still runs."""
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait(self, timeout: float = 300.0) -> int:
        """The exit code of the process; negative: the signal that ended it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s; its output: {self.text()}")
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], bool], timeout: float = 300.0) -> None:
        """Wait until the condition holds, or the process has ended."""
        end = time.monotonic() + timeout
        while self.process.is_alive() and not condition():
            assert time.monotonic() < end, f"waited {timeout} s in vain; its output: {self.text()}"
            time.sleep(0.005)

    def text(self) -> str:
        """What the process has written to stdout and stderr so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def run_here(output: Path, target: Callable[..., Any], args: tuple) -> None:
    """In the new process: send the output to a file and call the target."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    target(*args)
