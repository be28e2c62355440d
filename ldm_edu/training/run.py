"""Where a run lives and what it runs on: folder, log, device, signals."""

import difflib
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from ldm_edu.basics import pick_device, pick_dtype
from ldm_edu.checkpoints import atomic, leftovers, load_json, save_json
from ldm_edu.errors import LDMError
from ldm_edu.training.recipes import AnyRecipe, Training, recipe_differences, recipe_from_dict, recipe_to_dict

__all__ = ["Run", "SignalGuard", "open_run"]

PRECISIONS = ("fp32", "bf16", "fp16", "fp64")


# Device and precision ------------------------------------------------------------------------------------------------


class RunAccelerator(Accelerator):
    "accelerate's Accelerator, which also knows the run's precision and the number format of its weights and batches."

    precision: str = "fp32"  # one of PRECISIONS
    dtype: torch.dtype = torch.float32  # of weights and batches; in bf16 and fp16 only the computation is in less

    def over_processes(
        self,
        value: Tensor,
        how: str,  # "sum" or "mean"
    ) -> Tensor:
        "The sum or mean of every process's tensor; all processes get it."
        return cast(Tensor, self.reduce(value, how))


def make_accelerator(
    device: str = "auto",  # see `pick_device`
    precision: str | None = None,  # one of PRECISIONS; None: bf16 where the device computes in it, else fp32
) -> RunAccelerator:
    "The accelerator for a device; `LDMError` for a precision that is unknown or that the device does not have."
    where = pick_device(device)
    precision = precision or ("bf16" if pick_dtype(where) == torch.bfloat16 else "fp32")
    if precision not in PRECISIONS:
        raise LDMError(f"unknown precision '{precision}'; known: {', '.join(PRECISIONS)}")
    if precision == "fp16" and where.type == "cpu":
        raise LDMError("precision 'fp16' needs a GPU; on a CPU take bf16 or fp32")
    if precision == "fp64" and where.type == "mps":
        raise LDMError("precision 'fp64' does not exist on mps; take fp32")

    # accelerate keeps the precision for the whole process; a second run in the same process may choose anew.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)
    mixed = precision if precision in ("bf16", "fp16") else "no"
    accelerator = RunAccelerator(cpu=where.type == "cpu", mixed_precision=mixed)
    accelerator.precision = precision
    accelerator.dtype = torch.float64 if precision == "fp64" else torch.float32
    return accelerator


# A run and its log ---------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    "`LDMError` that names `path` where writing it fails: a full disk, say, or a folder that may not be written."
    try:
        yield
    except OSError as error:
        raise LDMError(f"{path} cannot be written ({error}): make room, then go on with the run") from error


@dataclass
class Run:
    "Where a run lives, what it runs on, and what it has written so far."

    folder: Path
    accelerator: RunAccelerator
    every: int = 100  # steps between lines of the log
    save_every: float = 60.0  # seconds between checkpoints
    sample_every: int | None = None  # steps between samples drawn into the folder; None: a tenth of the stage; 0: never
    compile: bool = False  # torch.compile the network?
    channels_last: bool = False  # keep the channels of a pixel side by side in memory? faster convolutions on many GPUs
    notes: Mapping[str, str] = field(default_factory=dict)  # texts for every checkpoint: recipe and versions
    log_fn: Callable[[str], None] | None = None  # called with each log line when no progress bar is shown

    def log(self, **values: Any) -> None:
        "Append one line to log.jsonl."
        if not self.accelerator.is_main_process:
            return
        path = self.folder / "log.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        "The lines of the log; a line that was cut short is left out."
        path = self.folder / "log.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def cut_log(self, stage: str, step: int) -> None:
        "Drop a stage's lines from after `step`: those steps will be done again."
        path = self.folder / "log.jsonl"
        if self.accelerator.is_main_process and path.exists():
            kept = [line for line in self.read_log() if line["stage"] != stage or line["step"] <= step]
            with writing(path), atomic(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def shard(self, indices: Sequence[int]) -> list[int]:
        "This process's share of a batch."
        return list(indices[self.accelerator.process_index :: self.accelerator.num_processes])


# What may be changed in a run: the fields of `Run` that `open_run` does not set itself.
OPTIONS = tuple(f.name for f in fields(Run) if f.name not in ("folder", "accelerator", "notes"))


def plot_log(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    "Draw every stage's loss, and its loss on held-out data where there is one, over the steps."
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(line["stage"] for line in lines))
    figure = Figure(figsize=(5 * max(1, len(stages)), 3), dpi=100, layout="constrained")
    for i, stage in enumerate(stages):
        axes = figure.add_subplot(1, len(stages), i + 1, title=stage, xlabel="step", yscale="log")
        for name in ("loss", "held_out"):
            if rows := [line for line in lines if line["stage"] == stage and line.get(name, 0) > 0]:
                axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
        axes.legend(frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


class Meter:
    "Mean loss, images a second, and the share of time spent waiting for data, since the meter was last read."

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.asked = time.monotonic()
        self._reset()

    def _reset(self) -> None:
        self.losses: list[float] = []
        self.waited = 0.0
        self.spent = 0.0

    def ask(self) -> None:
        "The loop asks for its next batch: a step begins. What lies between two steps is not counted."
        self.asked = time.monotonic()

    def receive(self) -> None:
        "The loop has its batch."
        self.waited += time.monotonic() - self.asked

    def finish(self, loss: float) -> float:
        "The step is done; returns its images a second."
        seconds = time.monotonic() - self.asked
        self.spent += seconds
        self.losses.append(loss)
        return self.batch_size / max(seconds, 1e-9)

    def read(self) -> dict[str, float]:
        "What was measured, and begin anew; empty if there was no step."
        if not (n := len(self.losses)):
            return {}
        spent = max(self.spent, 1e-9)
        scores = {
            "loss": sum(self.losses) / n,
            "images_per_second": round(n * self.batch_size / spent, 1),
            "waiting": round(self.waited / spent, 4),
        }
        self._reset()
        return scores


# Signals -------------------------------------------------------------------------------------------------------------


class SignalGuard:
    "Within `with SignalGuard() as guard`, Ctrl-C and SIGTERM only set `guard.requested`; a second one stops at once."

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "SignalGuard":
        if threading.current_thread() is threading.main_thread():  # other threads cannot catch signals
            self.before = {number: signal.signal(number, self.note) for number in self.SIGNALS}
        return self

    def note(self, number: int, frame: Any) -> None:
        "The handler: the first signal is noted, the second one raises KeyboardInterrupt."
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def any_process(self, accelerator: RunAccelerator) -> bool:
        "Has any of the processes been asked to stop? All get the same answer, so that none waits for another."
        if accelerator.num_processes == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=accelerator.device)
        return bool(accelerator.over_processes(flag, "sum") > 0)


# Opening a run -------------------------------------------------------------------------------------------------------


def check_options(options: Mapping[str, Any]) -> None:
    "TypeError for a keyword that is no option of a run; it lists the known ones, or names the nearest."
    for name in options:
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(OPTIONS)}"
            raise TypeError(f"a run has no option '{name}'; {hint}")


def check_batch_size(
    training: Training,
    n: int,  # processes
) -> None:
    "`LDMError` where a batch cannot be shared equally by the processes, and each share cut into equal micro-batches."
    if training.batch_size % (n * training.accumulate):
        pieces = f", in accumulate={training.accumulate} micro-batches each" if training.accumulate > 1 else ""
        raise LDMError(
            f"batch_size={training.batch_size} cannot be shared by {n} processes{pieces};"
            f" choose a multiple of {n * training.accumulate}"
        )


def refuse_other_run(folder: Path, recipe: AnyRecipe, resume: bool) -> None:
    "`LDMError` where the folder holds a run that must not be overwritten, another run, or none that could go on."
    path = folder / "recipe.json"
    found = [name for name in (path.name, "log.jsonl", "samples", "latents", "model") if (folder / name).exists()]
    found += sorted(file.name for file in folder.glob("*.safetensors"))
    if found and not resume:
        raise LDMError(
            f"{folder} already holds a run ({', '.join(found)}): go on with it (resume), or take another folder"
        )
    if resume and not path.exists():
        raise LDMError(f"{folder} holds no run to go on with: there is no recipe.json in it")
    if resume and (changed := recipe_differences(recipe_from_dict(load_json(path)), recipe)):
        listed = ", ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in changed.items())
        raise LDMError(
            f"{path} is not the recipe as it is now ({listed}): a run goes on with the recipe that it began with"
        )


def sweep_leftovers(folder: Path) -> None:
    "Remove the temporary files of a save in which the run was killed."
    for path in leftovers(folder):
        path.unlink()


def write_recipe(folder: Path, recipe: AnyRecipe) -> None:
    "Write recipe.json into the folder; the folder is made if it is not there."
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_json(recipe_to_dict(recipe), folder / "recipe.json")


def stage_trainings(recipe: AnyRecipe) -> list[Training]:
    "How each stage of a recipe is trained."
    parts = [getattr(recipe, name) for name in ("first_stage", "diffusion") if hasattr(recipe, name)]
    return [part.training for part in parts or [recipe]]


def open_run(
    recipe: AnyRecipe,
    folder: str | Path,  # of the run; made if it is not there
    device: str = "auto",  # see `pick_device`
    precision: str | None = None,  # see `make_accelerator`
    resume: bool = False,  # go on with the run in `folder`
    **options: Any,  # fields of `Run`: every, save_every, sample_every, compile, channels_last, log_fn
) -> Run:
    "Open the folder of a new run, or of one that goes on. Whatever is refused is refused before anything is written."
    check_options(options)
    accelerator = make_accelerator(device, precision)
    for training in stage_trainings(recipe):
        check_batch_size(training, accelerator.num_processes)

    folder = Path(folder)
    if accelerator.is_main_process:
        refuse_other_run(folder, recipe, resume)
        if resume:
            sweep_leftovers(folder)
        write_recipe(folder, recipe)
    accelerator.wait_for_everyone()

    notes = {"recipe": json.dumps(recipe_to_dict(recipe)), "python": platform.python_version()}
    notes |= {package: version(package) for package in ("ldm_edu", "torch", "accelerate")}
    return Run(folder, accelerator, notes=notes, **options)


def provenance(run: Run, training: Training, seconds: float, scores: Mapping[str, Any]) -> dict[str, Any]:
    "How a network was made, for its checkpoint's config."
    device, threads = run.accelerator.device, torch.get_num_threads()
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{device.type} ({threads} thread{'s' * (threads > 1)})"
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in scores.items()}
    how = {"steps": training.steps, "seconds": round(seconds), "device": where}
    return how | {"precision": run.accelerator.precision} | rounded
