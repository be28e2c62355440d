"""Where a run lives and what it runs on: options, folder, log, device, signals."""

import json
import os
import platform
import shutil
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, get_available_trackers
from torch import Tensor

from ldm_edu.basics import pick_device, pick_dtype
from ldm_edu.files import atomic, leftovers, load_json, save_json, writing
from ldm_edu.errors import LDMError
from ldm_edu.training.recipes import AnyRecipe, Training, flatten, recipe_differences
from ldm_edu.training.recipes import recipe_from_dict, recipe_to_dict

__all__ = ["Run", "RunOptions", "SignalGuard", "open_run"]

PRECISIONS = ("fp32", "bf16", "fp16", "fp64")


# Options -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunOptions:
    "How a run is done. None of these decides what is learned: that is the recipe's."

    data_dir: str | Path | None = None  # where the data set lies; toy data needs none
    cache_dir: str | Path | None = None  # where prepared samples are kept, shared by runs; None: in the run's folder
    weights_dir: str | Path | None = None  # where the weights of LPIPS lie, if the recipe wants it
    device: str = "auto"  # see `pick_device`
    precision: str | None = None  # one of PRECISIONS; None: bf16 where the device computes faster in it, else fp32
    resume: bool = False  # go on with the run in the folder
    every: int = 100  # steps between lines of the log
    save_every: float = 60.0  # seconds between checkpoints
    sample_every: int | None = None  # steps between samples drawn into the folder; None: a tenth of the stage; 0: never
    compile: bool = False  # torch.compile the network?
    channels_last: bool = False  # keep the channels of a pixel side by side in memory? Faster convolutions on many GPUs
    trackers: Sequence[str | GeneralTracker] = ()  # of accelerate, beside log.jsonl: "tensorboard", "wandb", …
    log_fn: Callable[[str], None] | None = None  # called with each log line when no progress bar is shown

    def __post_init__(self):
        if self.precision not in (None, *PRECISIONS):
            raise LDMError(f"unknown precision '{self.precision}'; known: {', '.join(PRECISIONS)}")
        if self.every < 1:
            raise LDMError(f"every={self.every} must be at least 1, the steps between two lines of the log")
        if self.sample_every is not None and self.sample_every < 0:
            raise LDMError(f"sample_every={self.sample_every} must be a number of steps, 0 for never, or None")
        if isinstance(self.trackers, str):
            raise LDMError(f"trackers are a list of names: [{self.trackers!r}] rather than {self.trackers!r}")
        for tracker in self.trackers:
            known = sorted(str(name) for name in get_available_trackers())  # those whose packages are installed
            if isinstance(tracker, str) and tracker not in known:
                raise LDMError(f"tracker '{tracker}' is unknown or not installed; here: {', '.join(known) or 'none'}")


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
    precision: str | None = None,  # one of PRECISIONS; None: bf16 where the device computes faster in it, else fp32
    trackers: Sequence[str | GeneralTracker] = (),  # see `RunOptions`
    folder: str | Path | None = None,  # where trackers write
) -> RunAccelerator:
    "The accelerator for a device; `LDMError` for a precision that is unknown or that the device does not have."
    where = pick_device(device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if precision is None:
        # On a CPU this is decided by timing, in which several processes might disagree.
        timed = processes == 1 or where.type != "cpu"
        precision = "bf16" if timed and pick_dtype(where) == torch.bfloat16 else "fp32"
    if precision not in PRECISIONS:
        raise LDMError(f"unknown precision '{precision}'; known: {', '.join(PRECISIONS)}")
    if precision == "fp16" and where.type == "cpu":
        raise LDMError("precision 'fp16' needs a GPU; on a CPU take bf16 or fp32")
    if precision == "fp64" and where.type == "mps":
        raise LDMError("precision 'fp64' does not exist on mps; take fp32")

    # accelerate keeps the precision for the whole process; a second run in the same process may choose anew.
    if processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)
    mixed = precision if precision in ("bf16", "fp16") else "no"
    accelerator = RunAccelerator(
        cpu=where.type == "cpu", mixed_precision=mixed, log_with=list(trackers) or None, project_dir=folder
    )
    accelerator.precision = precision
    accelerator.dtype = torch.float64 if precision == "fp64" else torch.float32
    return accelerator


# A run and its log ---------------------------------------------------------------------------------------------------


@dataclass
class Run:
    "Where a run lives, what it runs on, and what it has written so far."

    folder: Path
    accelerator: RunAccelerator
    options: RunOptions = RunOptions()
    notes: Mapping[str, str] = field(default_factory=dict)  # texts for every checkpoint: recipe and versions
    steps_before: int = 0  # of stages that are finished: a tracker counts all stages in one row

    @property
    def is_main(self) -> bool:
        "Is this the process that writes?"
        return self.accelerator.is_main_process

    @property
    def cache(self) -> Path:
        "Where prepared samples are kept."
        return Path(self.options.cache_dir or self.folder / "cache")

    def log(self, stage: str, step: int, **values: Any) -> None:
        "Append one line to log.jsonl, and tell the trackers."
        if self.is_main:
            path = self.folder / "log.jsonl"
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage, "step": step} | values) + "\n")
        if self.options.trackers:
            named = {f"{stage}/{name}": value for name, value in ({"step": step} | values).items()}
            self.accelerator.log(named, step=self.steps_before + step)

    def read_log(self) -> list[dict[str, Any]]:
        "The lines of the log; a line that was cut short is left out."
        path = self.folder / "log.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def cut_log(self, stage: str, step: int) -> None:
        "Drop a stage's lines from after `step`: those steps will be done again."
        path = self.folder / "log.jsonl"
        if self.is_main and path.exists():
            kept = [line for line in self.read_log() if line["stage"] != stage or line["step"] <= step]
            with writing(path), atomic(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def shard(self, indices: Sequence[int]) -> list[int]:
        "This process's share of a batch."
        return list(indices[self.accelerator.process_index :: self.accelerator.num_processes])


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

    def any_process(self, accelerator: RunAccelerator, step: int = 0) -> bool:
        "Has any of the processes been asked to stop? Several processes ask each other at every tenth step only."
        if accelerator.num_processes == 1:
            return self.requested
        if step % 10:  # to ask means to wait for the device
            return False
        if self.requested:
            accelerator.set_trigger()
        return accelerator.check_trigger()


# Opening a run -------------------------------------------------------------------------------------------------------


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
    now = recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe))))
    if resume and (changed := recipe_differences(recipe_from_dict(load_json(path)), now)):
        listed = ", ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in changed.items())
        raise LDMError(
            f"{path} is not the recipe as it is now ({listed}): a run goes on with the recipe that it began with"
        )


def sweep_leftovers(folder: Path) -> None:
    "Remove the temporary files of a save in which the run was killed."
    for path in leftovers(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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
    options: RunOptions = RunOptions(),
) -> Run:
    "Open the folder of a new run, or of one that goes on. Whatever is refused is refused before anything is written."
    folder = Path(folder)
    known = folder / "run.json"
    precision = options.precision
    if options.resume and precision is None and known.exists():
        precision = load_json(known).get("precision")  # it was chosen by timing, perhaps on a busier day
        if precision not in PRECISIONS:
            raise LDMError(f"{known} names no precision; known: {', '.join(PRECISIONS)}")
    accelerator = make_accelerator(options.device, precision, options.trackers, folder)
    for training in stage_trainings(recipe):
        check_batch_size(training, accelerator.num_processes)

    if accelerator.is_main_process:
        refuse_other_run(folder, recipe, options.resume)
        if options.resume:
            sweep_leftovers(folder)
        write_recipe(folder, recipe)
        with writing(known):
            save_json({"precision": accelerator.precision}, known)
    accelerator.wait_for_everyone()
    if options.trackers:
        accelerator.init_trackers("ldm_edu", config=tracked(recipe))

    notes = {"recipe": json.dumps(recipe_to_dict(recipe), sort_keys=True), "python": platform.python_version()}
    notes |= {package: version(package) for package in ("ldm_edu", "torch", "accelerate")}
    return Run(folder, accelerator, options, notes)


def tracked(recipe: AnyRecipe) -> dict[str, str | int | float | bool]:
    "The recipe as trackers keep it: numbers and texts under dotted names."
    flat = flatten(recipe_to_dict(recipe))
    return {name: value if isinstance(value, str | int | float) else str(value) for name, value in flat.items()}


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
