"""All that changes while a stage is trained, and how it is kept in one file."""

import math
import os
import shutil
import torch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from torch import Tensor, nn
from typing import Any
from ldm_edu.checkpoints import atomic, load_notes, load_tensors, save_tensors
from ldm_edu.errors import CheckpointError
from ldm_edu.training.loop import EMA
from ldm_edu.training.recipes import Training
from ldm_edu.training.run import Run, writing

@dataclass
class State:
    "All that changes while a stage is trained."

    task: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: Any = None  # a torch.amp.GradScaler, in fp16
    step: int = 0  # steps done
    seconds: float = 0.0  # on the clock, over all pieces of the run, with judging and saving
    best: float = math.inf  # lowest loss on held-out data so far

    def tensors(self) -> dict[str, Tensor]:
        "Everything a run needs to go on, as named tensors."
        tensors = {f"task.{name}": value for name, value in self.task.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.module.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        numbers = {"step": self.step, "seconds": self.seconds, "best": self.best}
        numbers |= {f"scaler.{k}": v for k, v in (self.scaler.state_dict() if self.scaler else {}).items()}
        return tensors | {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        "Put everything back in its place."

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.task.load_state_dict(under("task."))
        self.ema.module.load_state_dict(under("ema."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in under("optimizer.").items():
            i, _, key = name.partition(".")
            state.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for weight, memory in self.optimizer.state.items():
            for key, value in memory.items():
                if (
                    value.shape == weight.shape
                ):  # in the weight's own order in memory: fused Adam pairs them as they lie
                    memory[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
        if self.scaler and (kept := under("scaler.")):
            whole = {"growth_interval", "_growth_tracker"}  # these count
            self.scaler.load_state_dict({k: int(v) if k in whole else float(v) for k, v in kept.items()})
        self.step, self.seconds, self.best = int(tensors["step"]), float(tensors["seconds"]), float(tensors["best"])


def state_file(run: Run, stage: str, best: bool = False) -> Path:
    "Where the newest state of a stage is kept, or the best one."
    return run.folder / f"{stage}{'.best' if best else ''}.safetensors"


def save_state(run: Run, stage: str, state: State, best: bool = False) -> None:
    "Write the newest state; with `best`, as the best one too."
    if not run.accelerator.is_main_process:
        return
    newest, notes = state_file(run, stage), {**run.notes, "stage": stage, "step": str(state.step)}
    if not best:
        save_tensors(state.tensors(), newest, notes=notes)
        return
    save_tensors(state.tensors(), state_file(run, stage, best=True), notes=notes)
    with writing(newest), atomic(newest) as temporary:
        try:
            os.link(state_file(run, stage, best=True), temporary)
        except OSError:  # a file system without links
            shutil.copyfile(state_file(run, stage, best=True), temporary)


def load_state(run: Run, stage: str, state: State) -> None:
    "Go on from the newest state of a stage, if there is one; `CheckpointError` says what to do where it is no good."
    path, best = state_file(run, stage), state_file(run, stage, best=True)
    anew = f"remove {path.name}: {stage} then begins again"
    if not path.exists():
        return
    try:
        notes, tensors = load_notes(path), load_tensors(path)
    except CheckpointError as error:
        spare = f"put {best.name} in its place, or " if best.exists() else ""
        raise CheckpointError(f"{error}. To go on, {spare}{anew}") from error
    for name, what in (("recipe", "another recipe"), ("images", "other images")):
        if notes.get(name) != run.notes.get(name):
            raise CheckpointError(f"{path} was made with {what}: put those back, or {anew}")
    try:
        state.restore(tensors)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit this network ({error}). To go on, {anew}") from error


def make_state(run: Run, task: nn.Module, training: Training) -> tuple[State, nn.Module, Any]:
    "The state of a stage that begins, and network and optimiser as accelerate wraps them."
    accelerator = run.accelerator
    layout = torch.channels_last if run.channels_last else torch.preserve_format
    task = task.to(accelerator.device, accelerator.dtype, memory_format=layout)
    ema = EMA(task, training.ema)
    if run.compile:
        task.compile()
    optimizer = torch.optim.AdamW(
        task.parameters(), training.lr, betas=training.betas, weight_decay=training.weight_decay, fused=True
    )
    wrapped, prepared = accelerator.prepare(task, optimizer)
    return State(task, ema, optimizer, accelerator.scaler), wrapped, prepared
