"""A stage of one small network that doubles images of noise: twenty steps take less than a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm_edu.errors import DataError
from ldm_edu.training.loop import Stage, batch_indices, step_randomness
from ldm_edu.training.recipes import Training
from ldm_edu.training.resume import run_stage
from ldm_edu.training.run import Run, RunOptions, make_accelerator


class Small(nn.Module):
    """Learns to double an image, with dropout on the way; a loss of two terms."""

    channels, dropout = 64, 0.1

    def __init__(self):
        super().__init__()
        convolutions = nn.Conv2d(3, self.channels, 3, padding=1), nn.Conv2d(self.channels, 3, 3, padding=1)
        self.net = nn.Sequential(convolutions[0], nn.Dropout(self.dropout), convolutions[1])

    def forward(self, batch):
        error = self.net(batch["noise"]) - 2 * batch["noise"]
        terms = {"near": error.square().mean(), "far": batch["weight"].mean() * error.abs().mean()}
        return terms["near"] + terms["far"], {name: term.detach() for name, term in terms.items()}


def batch_at(step: int) -> dict[str, torch.Tensor]:
    """Four images of noise."""
    return step_randomness(0, step, batch_indices(0, step, 4, 20), (3, 6, 6)) | {"weight": torch.full((4,), 0.1)}


def stopping_at(step: int) -> Callable[[int], dict[str, torch.Tensor]]:
    """`batch_at` until a step at which there are no more data."""

    def broken(k):
        if k == step:
            raise DataError(f"no image for step {k}")
        return batch_at(k)

    return broken


class SmallStage(Stage):
    """`Small` for 20 steps, always from the same first weights."""

    def __init__(
        self,
        make: Callable[[int], Any] = batch_at,
        scores: Callable[[nn.Module], dict[str, float]] = lambda task: {},
        task: type[nn.Module] = Small,
        **training: Any,
    ):
        torch.manual_seed(0)
        how = {"steps": 20, "batch_size": 4, "lr": 1e-2, "warmup": 2} | training
        super().__init__("small", task(), Training(**how))
        self.make, self.scores = make, scores

    def batch(self, step):
        return self.make(step)

    def validate(self, task):
        return self.scores(task)


def small_run(folder: Path, notes: dict[str, str] | None = None, **options: Any) -> Run:
    """A run in a folder: a line in the log every fifth step, a checkpoint after each step, no images."""
    folder.mkdir(exist_ok=True)
    how = {"device": "cpu", "precision": "fp32", "every": 5, "save_every": 0.0, "sample_every": 0} | options
    chosen = RunOptions(**how)
    accelerator = make_accelerator(chosen.device, chosen.precision, chosen.trackers, folder)
    return Run(folder, accelerator, chosen, {"recipe": "small"} if notes is None else notes)


def train_small(
    folder: Path, make: Callable[[int], Any] = batch_at, *stage: Any, run: Run | None = None, **training: Any
) -> dict[str, torch.Tensor]:
    """The averaged weights after 20 steps of a `SmallStage`, from wherever the folder is at."""
    return run_stage(run or small_run(folder), SmallStage(make, *stage, **training))[0].state_dict()


def held_out(*losses: float) -> Callable[[nn.Module], dict[str, float]]:
    """Scores as if these were the losses on held-out data, one after the other; then the last of them for ever."""
    left = list(losses)
    return lambda task: {"held_out": left.pop(0) if len(left) > 1 else left[0]}


def skip_unless_compiled() -> None:
    """Skip a test where `torch.compile` does not work: it needs a compiler."""
    try:
        torch.compile(torch.sin)(torch.ones(3))
    except Exception as error:  # whatever is missing here
        pytest.skip(f"torch.compile does not work here: {str(error)[:200]}")
