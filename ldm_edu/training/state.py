"""All that changes while a stage is trained, and how it is kept in one file."""

import math
import operator
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import atomic, brief, load_notes, load_tensors, parse_json, save_tensors, writing
from ldm_edu.training.loop import EMA, Stage
from ldm_edu.training.recipes import recipe_from_dict
from ldm_edu.training.run import Run

__all__ = ["State"]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    "The tensors whose names begin with `prefix`, under the rest of their names."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    "ValueError, in one line, where named tensors have other names, shapes or number formats than those of a network."
    for names, how in ((wanted.keys() - found.keys(), "missing"), (found.keys() - wanted.keys(), "unknown")):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"of {what}, '{min(names)}'{others} {'are' if others else 'is'} {how}")
    for name, value in wanted.items():
        got = found[name]
        if (got.shape, got.dtype) != (value.shape, value.dtype):
            have, want = (f"{tuple(tensor.shape)}, {tensor.dtype}" for tensor in (got, value))
            raise ValueError(f"of {what}, '{name}' is ({have}), not ({want})")


def check_number(found: Mapping[str, Tensor], name: str, most: float) -> float:
    "The number of that name; ValueError where there is none from 0 to `most`."
    if name not in found or found[name].numel() != 1 or not 0 <= found[name].item() <= most:
        got = "missing" if name not in found else found[name].flatten()[:3].tolist()
        raise ValueError(f"'{name}' is {got}, and should be a number from 0 to {most:g}")
    return float(found[name])


MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW remembers of a weight that was trained


def check_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],  # as `optimizer_tensors` names them
    step: float,  # steps done
    may_be_empty: bool,  # has perhaps no weight been trained yet?
) -> None:
    "ValueError where these are not what an AdamW remembers of these weights."
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = {name.partition(".")[0] for name in tensors}
    if unknown := numbers - {str(i) for i in range(len(weights))}:
        raise ValueError(f"the optimiser has no weight number {min(unknown)}")
    if not numbers and not may_be_empty:
        raise ValueError("the optimiser's memory is missing")
    for number in sorted(numbers, key=int):
        shape = weights[int(number)]
        wanted = {f"{number}.{entry}": torch.zeros(()) if entry == "step" else shape for entry in MOMENTS}
        found = _under(f"{number}.", tensors)
        check_number({f"{number}.{name}": value for name, value in found.items()}, f"{number}.step", step)
        check_fit({f"{number}.{name}": value for name, value in found.items()}, wanted, "the optimiser's memory")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    "What an optimiser remembers of each parameter, as tensors named `number.entry`: `0.exp_avg`, `0.step`, …"
    remembered = optimizer.state_dict()["state"]
    return {f"{i}.{entry}": value for i, entries in remembered.items() for entry, value in entries.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    "Give an optimiser back what `optimizer_tensors` took from one like it."
    remembered: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        i, _, entry = name.partition(".")
        remembered.setdefault(int(i), {})[entry] = value
    optimizer.load_state_dict({"state": remembered, "param_groups": optimizer.state_dict()["param_groups"]})

    # Fused Adam pairs numbers as they lie in memory: an entry in the shape of its weight takes the weight's layout.
    for weight, entries in optimizer.state.items():
        for entry, value in entries.items():
            if value.shape == weight.shape:
                entries[entry] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def restore_scaler(scaler: Any, tensors: Mapping[str, Tensor]) -> None:
    "Give a gradient scaler back its numbers; two of them count, so they are whole numbers."
    counts = ("growth_interval", "_growth_tracker")
    scaler.load_state_dict({k: int(v) if k in counts else float(v) for k, v in tensors.items()})


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
        "Everything that a run needs to go on, as named tensors."
        tensors = {f"task.{name}": value for name, value in self.task.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.module.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        numbers = {"step": self.step, "seconds": self.seconds, "best": self.best}
        if self.scaler:
            numbers |= {f"scaler.{name}": value for name, value in self.scaler.state_dict().items()}
        return tensors | {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}

    def check(
        self,
        tensors: Mapping[str, Tensor],
        steps: int,  # of the whole stage
    ) -> None:
        "ValueError, in one line, where these are not what `tensors` of a state like this one gives."
        step = check_number(tensors, "step", float(steps))
        if step != int(step):
            raise ValueError(f"'step' is {step:g}, and should be a whole number")
        check_number(tensors, "seconds", 1e12)
        if "best" not in tensors or tensors["best"].isnan().any() or tensors["best"].numel() != 1:
            raise ValueError("'best' is no loss on held-out data")
        check_fit(_under("task.", tensors), self.task.state_dict(), "the weights")
        check_fit(_under("ema.", tensors), self.ema.module.state_dict(), "the averaged weights")
        check_optimizer(self.optimizer, _under("optimizer.", tensors), step, step == 0 or bool(self.scaler))

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        "Put everything back in its place."
        self.task.load_state_dict(_under("task.", tensors))
        self.ema.module.load_state_dict(_under("ema.", tensors))
        restore_optimizer(self.optimizer, _under("optimizer.", tensors))
        if self.scaler and (numbers := _under("scaler.", tensors)):
            restore_scaler(self.scaler, numbers)
        self.step = int(tensors["step"])
        self.seconds = float(tensors["seconds"])
        self.best = float(tensors["best"])


def state_file(run: Run, stage: str, best: bool = False) -> Path:
    "Where the newest state of a stage is kept, or the best one."
    return run.folder / f"{stage}{'.best' if best else ''}.safetensors"


def save_state(run: Run, stage: Stage, state: State, best: bool = False) -> None:
    "Write the newest state; with `best`, as the best one too. LDMError, and the old files stay, if it is not finite."
    if not run.is_main:
        return
    newest, tensors = state_file(run, stage.name), state.tensors()
    floats = [value for name, value in tensors.items() if value.is_floating_point() and name != "best"]
    if not all(torch.stack([value.isfinite().all().cpu() for value in floats])):
        raise LDMError(f"after step {state.step - 1} of {stage.name} some weights are not finite: they are not saved")
    notes = {**run.notes, **stage.notes, "stage": stage.name, "step": str(state.step)}
    if not best:
        save_tensors(tensors, newest, notes=notes)
        return

    # The best state is written first. The newest is a file of its own: a bad spot on the disk spoils only one.
    kept = state_file(run, stage.name, best=True)
    save_tensors(tensors, kept, notes=notes)
    with writing(newest), atomic(newest) as temporary:
        shutil.copyfile(kept, temporary)


def _is_same_recipe(before: str | None, now: str | None) -> bool:
    "Are these the same recipe as JSON? A field that did not exist has its default."
    if before is None or now is None or before == now:
        return before == now
    try:
        a, b = (replace(recipe_from_dict(parse_json(text)), about="") for text in (before, now))
    except (LDMError, ValueError):
        return False
    return a == b


def load_state(run: Run, stage: Stage, state: State) -> None:
    "Restore the newest state of a stage, if there is one; `CheckpointError` says what to do where it is no good."
    path, best = state_file(run, stage.name), state_file(run, stage.name, best=True)
    if not path.exists():
        return
    anew = f"remove {path.name}: {stage.name} then begins again"
    try:
        notes, tensors = load_notes(path), load_tensors(path)
    except CheckpointError as error:
        spare = f"put {best.name} in its place, or " if best.exists() else ""
        raise CheckpointError(f"{error}. To go on, {spare}{anew}") from error
    wanted = {**run.notes, **stage.notes}
    kinds = {"recipe": "another recipe", "images": "other images", "first_stage": "another first stage"}
    for name, what in kinds.items():
        same = _is_same_recipe if name == "recipe" else operator.eq
        if not same(notes.get(name), wanted.get(name)):
            raise CheckpointError(f"{path} was made with {what}: put those back, or {anew}")
    try:
        state.check(tensors, stage.training.steps)
        state.restore(tensors)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit this network ({brief(error)}). To go on, {anew}") from error


def make_state(run: Run, stage: Stage) -> tuple[State, nn.Module, Any]:
    "The state of a stage that begins, and network and optimiser as accelerate wraps them."
    accelerator, training = run.accelerator, stage.training
    layout = torch.channels_last if run.options.channels_last else torch.preserve_format
    # PyTorch's stubs do not know that a module can be given a memory format.
    task = stage.task.to(accelerator.device, accelerator.dtype, memory_format=layout)  # type: ignore[call-overload]
    ema = EMA(task, training.ema)
    if run.options.compile:
        task.compile()
    optimizer = torch.optim.AdamW(
        task.parameters(), training.lr, betas=training.betas, weight_decay=training.weight_decay, fused=True
    )
    wrapped, prepared = accelerator.prepare(task, optimizer)
    return State(task, ema, optimizer, accelerator.scaler), wrapped, prepared
