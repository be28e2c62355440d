"""Where a run lives and what it runs on: options, folder, log, device, signals."""

import errno
import json
import math
import os
import platform
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from filelock import BaseFileLock, FileLock, Timeout
from torch import Tensor

from ldm_edu.basics import pick_device, pick_dtype
from ldm_edu.checks import check_count, check_number, shown
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import (
    NO_LOCKS,
    appending,
    atomic,
    brief,
    folder_for,
    load_json,
    load_notes,
    parse_json,
    place,
    probe,
    reading,
    reason,
    remove_leftovers,
    save_json,
    write_text,
    writing,
)
from ldm_edu.training.recipes import AnyRecipe, Training, flatten, recipe_differences
from ldm_edu.training.recipes import recipe_from_dict, recipe_to_dict

__all__ = ["Run", "RunOptions", "SignalGuard", "open_run"]

PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
MOST_STEPS = 10**9  # of a stage that is extended


# Options -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunOptions:
    "How a run is done. What is learned is decided by the recipe, and by no other option than `extend`."

    data_dir: str | Path | None = None  # where the data set lies; toy data needs none
    cache_dir: str | Path | None = None  # where prepared samples are kept, shared by runs; None: in the run's folder
    weights_dir: str | Path | None = None  # where the weights of LPIPS lie, if the recipe wants it
    device: str = "auto"  # see `pick_device`
    precision: str | None = None  # one of PRECISIONS; None: bf16 where the device computes faster in it, else fp32
    resume: bool = False  # go on with the run in the folder
    extend: int | None = None  # go on with it until its last stage has done this many steps in all; see `Extension`
    every: int = 100  # steps between lines of the log
    save_every: float = 60.0  # seconds between checkpoints
    sample_every: int | None = None  # steps between samples drawn into the folder; None: a tenth of the stage; 0: never
    snapshot_every: int | None = None  # steps between models that are kept in the folder's `snapshots`; None: never
    compile: bool = False  # torch.compile the network?
    channels_last: bool = False  # keep the channels of a pixel side by side in memory? Faster convolutions on many GPUs
    trackers: Sequence[str | GeneralTracker] = ()  # of accelerate, beside log.jsonl: "tensorboard", "wandb", …
    log_fn: Callable[[str], None] | None = None  # called with each log line when no progress bar is shown

    def __post_init__(self):
        if self.precision not in (None, *PRECISIONS):
            raise LDMError(f"unknown precision {shown(self.precision)}; known: {', '.join(PRECISIONS)}")
        kept: dict[str, Any] = {"every": check_count("every", self.every)}
        if self.extend is not None:
            kept["extend"] = check_count("extend", self.extend, most=MOST_STEPS)
        kept["save_every"] = check_number("save_every", self.save_every, 0.0)
        if self.sample_every is not None:
            kept["sample_every"] = check_count("sample_every", self.sample_every, 0)
        if self.snapshot_every is not None:
            kept["snapshot_every"] = check_count("snapshot_every", self.snapshot_every)
        for name in ("data_dir", "cache_dir", "weights_dir"):
            folder = getattr(self, name)
            if not isinstance(folder, str | Path | None) or folder == "":
                raise LDMError(f"{name}={shown(folder)} should be a folder")
            kept[name] = None if folder is None else place(folder)
        for name, value in kept.items():
            object.__setattr__(self, name, value)  # the one way into a frozen dataclass
        if not isinstance(self.device, str):
            raise LDMError(f"device={shown(self.device)} should be a name, such as 'auto' or 'cpu'")
        if isinstance(self.trackers, str) or not isinstance(self.trackers, Sequence):
            raise LDMError(f"trackers are a list of names: [{self.trackers!r}] rather than {self.trackers!r}")
        for tracker in self.trackers:
            known = sorted(str(name) for name in get_available_trackers())  # those whose packages are installed
            if isinstance(tracker, str) and tracker not in known:
                raise LDMError(f"tracker '{tracker}' is unknown or not installed; here: {', '.join(known) or 'none'}")

    @property
    def goes_on(self) -> bool:
        "Whether the run in the folder goes on, as it was planned or longer."
        return self.resume or self.extend is not None


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


def num_processes() -> int:
    "How many processes train together, as their launcher says; `LDMError` where it says something without sense."
    start = "start the processes with `accelerate launch`, or unset WORLD_SIZE for a single one"
    told = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch("[0-9]{1,6}", told) or not int(told):
        raise LDMError(f"the environment variable WORLD_SIZE={told!r} should be a number of processes: {start}")
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if int(told) > 1 and lacking:
        raise LDMError(f"WORLD_SIZE={told} speaks of {told} processes, but {', '.join(lacking)} is not set: {start}")
    return int(told)


def make_accelerator(
    device: str = "auto",  # see `pick_device`
    precision: str | None = None,  # one of PRECISIONS; None: bf16 where the device computes faster in it, else fp32
    trackers: Sequence[str | GeneralTracker] = (),  # see `RunOptions`
    folder: str | Path | None = None,  # where trackers write
) -> RunAccelerator:
    "The accelerator for a device; `LDMError` for a precision that is unknown or that the device does not have."
    where = pick_device(device)
    processes = num_processes()
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
    try:
        accelerator = RunAccelerator(
            cpu=where.type == "cpu",
            mixed_precision=mixed,
            log_with=list(trackers) or None,
            project_dir=folder,
            # Recipe and options decide these two, and no environment variable.
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except Exception as error:  # of whatever these variables ask for
        named = sorted(name for name in os.environ if name.startswith("ACCELERATE_"))
        if not named and not isinstance(error, ValueError):
            raise
        told = f" ({', '.join(named)})" if named else ""
        raise LDMError(f"accelerate refuses what the environment variables say{told}: {brief(error)}") from error
    accelerator.precision = precision
    accelerator.dtype = torch.float64 if precision == "fp64" else torch.float32
    return accelerator


@contextmanager
def settings_of_the_run(accelerator: RunAccelerator) -> Iterator[None]:
    "Gradients are on and the caller's autocast is off: the run decides the number format, and accelerate sees to it."
    kind = accelerator.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    # Without a cache: weights that an inner autocast has cast would be kept as they were until the outer one ends.
    with torch.enable_grad(), torch.autocast(kind, enabled=False, cache_enabled=False) if is_on else nullcontext():
        yield


# A run and its log ---------------------------------------------------------------------------------------------------


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk says that takes no more


def read_line(text: str) -> dict[str, Any] | None:
    "What a line of the log holds; None where the line is damaged."
    try:
        line = parse_json(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("stage"), str) or type(line.get("step")) is not int:
        return None
    return line if all(isinstance(line.get(name), int | float | None) for name in ("loss", "held_out")) else None


@dataclass(frozen=True)
class Extension:
    """A stage goes on for longer than its recipe says; run.json and every later checkpoint keep this.

    From step `begin` on, the learning rate is that of a stage planned with `steps` from its beginning. So a constant
    rate stays what it is, and the cosine of a rate that decays begins anew at the height that the longer plan has
    there, and reaches 0 at its end. The optimiser's memory and the averaged weights are kept, and there is no second
    warm-up: the rate of the longer plan is below the peak. All this is a function of the step alone.
    """

    stage: str
    begin: int  # steps that were done when the stage was extended
    steps: int  # of the whole stage, from its beginning

    def to_dict(self) -> dict[str, Any]:
        "As JSON holds it."
        return {"stage": self.stage, "from": self.begin, "steps": self.steps}

    @classmethod
    def from_dict(cls, values: Any) -> "Extension":
        "The extension that `to_dict` was given; ValueError where it is none."
        if not isinstance(values, dict) or not isinstance(values.get("stage"), str):
            raise ValueError(f"{shown(values)} is no extension of a stage")
        begin = check_count("from", values.get("from"), 0, MOST_STEPS)
        steps = check_count("steps", values.get("steps"), begin)
        return cls(values["stage"], begin, min(steps, MOST_STEPS))  # no run gets that far, and each can be taken back


def extended_plans(stage: str, training: Training, extensions: Sequence[Extension]) -> dict[int, Training]:
    "How a stage is trained from which step on: as its recipe says, then as these extensions do."
    plans = {0: training}
    for each in extensions:
        if each.stage == stage:
            before = {begin: plan for begin, plan in plans.items() if begin < each.begin}
            plans = before | {each.begin: replace(training, steps=each.steps)}
    return plans


@dataclass
class Run:
    "Where a run lives, what it runs on, and what it has written so far."

    folder: Path
    accelerator: RunAccelerator
    options: RunOptions = RunOptions()
    notes: Mapping[str, str] = field(default_factory=dict)  # texts for every checkpoint: recipe and versions
    steps_before: int = 0  # of stages that are finished: a tracker counts all stages in one row
    extensions: list[Extension] = field(default_factory=list)  # of stages that go on for longer than planned
    extended: str | None = None  # the stage that goes on to `options.extend` steps
    lock: BaseFileLock | None = None  # keeps other processes out of the folder; see `lock_run`
    warned: set[Path] = field(default_factory=set)  # files of which a warning was given

    @property
    def is_main(self) -> bool:
        "Is this the process that writes?"
        return self.accelerator.is_main_process

    @property
    def cache(self) -> Path:
        "Where prepared samples are kept."
        return Path(self.options.cache_dir or self.folder / "cache")

    def plans(self, stage: str, training: Training) -> dict[int, Training]:
        "How a stage is trained from which step on: as its recipe says, then as its extensions do."
        return extended_plans(stage, training, self.extensions)

    def extend(self, stage: str, begin: int, steps: int) -> None:
        "Write down that a stage goes on to more steps; the checkpoints from now on say it, too."
        self.extensions.append(Extension(stage, begin, steps))
        self.notes = {**self.notes, "extensions": json.dumps([each.to_dict() for each in self.extensions])}
        if self.is_main:
            save_run(self.folder, self.accelerator.precision, self.extensions)

    def close(self) -> None:
        "Let other processes into the folder."
        if self.lock is not None:
            self.lock.release()

    def warn(self, path: Path, text: str) -> None:
        "A warning about a file, the first time only."
        if path not in self.warned:
            warnings.warn(f"{text}; the training goes on", stacklevel=3)
        self.warned.add(path)

    @contextmanager
    def beside(self, path: Path) -> Iterator[None]:
        """What only tells of a run does not end it: a warning, once, where it cannot be drawn or written.

        A full disk is the exception, for the next checkpoint would not fit on it either.
        """
        try:
            with writing(path):
                yield
        except Exception as error:  # of whatever draws
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL:
                raise
            self.warn(path, str(error) if isinstance(error, LDMError) else f"{path} was not written ({brief(error)})")

    def log(self, stage: str, step: int, **values: Any) -> None:
        "Append one line to log.jsonl, and tell the trackers."
        if self.is_main:
            path = self.folder / "log.jsonl"
            # JSON knows neither infinity nor what is no number.
            finite = {name: value if _is_finite(value) else None for name, value in values.items()}
            line = json.dumps({"stage": stage, "step": step} | finite)
            with self.beside(path), appending(path, LDMError) as append:
                append(f"{line}\n".encode())
        if self.options.trackers:
            named = {f"{stage}/{name}": value for name, value in ({"step": step} | values).items()}
            try:
                self.accelerator.log(named, step=self.steps_before + step)
            except Exception as error:  # of whatever the tracker is
                self.warn(Path("trackers"), f"the trackers were not told ({brief(error)})")

    def read_log(self) -> list[dict[str, Any]]:
        "The lines of the log; a damaged one is left out, with a warning."
        path = self.folder / "log.jsonl"
        if not os.path.lexists(path):
            return []
        try:
            with reading(path, LDMError):
                text = path.read_bytes().decode("utf-8", errors="replace")
        except LDMError as error:
            self.warn(path, str(error))
            return []
        lines = [line for line in text.split("\n") if line.strip()]
        kept = [line for line in map(read_line, lines) if line is not None]
        if len(kept) < len(lines):
            self.warn(path, f"{path}: {len(lines) - len(kept)} of {len(lines)} lines are damaged and left out")
        return kept

    def cut_log(self, stage: str, step: int) -> None:
        "Drop a stage's lines from after `step`: those steps will be done again."
        path = self.folder / "log.jsonl"
        if self.is_main and os.path.lexists(path):
            kept = [line for line in self.read_log() if line["stage"] != stage or line["step"] <= step]
            with self.beside(path):
                write_text("".join(json.dumps(line) + "\n" for line in kept), path, LDMError)

    def shard(self, indices: Sequence[int]) -> list[int]:
        "This process's share of a batch."
        return list(indices[self.accelerator.process_index :: self.accelerator.num_processes])


def _is_finite(value: Any) -> bool:
    "Is this anything but an infinite number, or one that is none?"
    return not isinstance(value, float) or math.isfinite(value)


def plot_log(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    "Draw every stage's loss, and its loss on held-out data where there is one, over the steps."
    from ldm_edu.display import new_figure

    stages = list(dict.fromkeys(line["stage"] for line in lines))
    figure = new_figure(figsize=(5 * max(1, len(stages)), 3), dpi=100, layout="constrained")
    for i, stage in enumerate(stages):
        axes = figure.add_subplot(1, len(stages), i + 1, title=stage, xlabel="step", yscale="log")
        for name in ("loss", "held_out"):
            if rows := [line for line in lines if line["stage"] == stage and (line.get(name) or 0) > 0]:
                axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
        axes.legend(frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


# Signals -------------------------------------------------------------------------------------------------------------


class SignalGuard:
    """Within `with SignalGuard() as guard`, a signal to stop only sets `guard.requested`; a second one stops at once.

    These signals are Ctrl-C, SIGTERM, and what a terminal sends when its window is closed.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last one is Windows' own, which has no SIGHUP
    SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))

    def __init__(self):
        self.requested = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "SignalGuard":
        if threading.current_thread() is threading.main_thread():  # other threads cannot catch signals
            caught = [number for number in self.SIGNALS if not self.is_ignored(number)]
            self.before = {number: signal.signal(number, self.note) for number in caught}
        return self

    @staticmethod
    def is_ignored(number: int) -> bool:
        "Was the process started so that this signal does not stop it, as `nohup` does?"
        return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN

    def note(self, number: int, frame: Any) -> None:
        "The handler: the first signal is noted, the second one raises KeyboardInterrupt."
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's own

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


def checkpoint_notes(folder: Path) -> dict[str, str]:
    "The notes of the first checkpoint in a run's folder that can be read; empty where there is none."
    for path in sorted(folder.glob("*.safetensors")):
        try:
            return load_notes(path)
        except CheckpointError:  # whoever needs this one will say so
            pass
    return {}


def kept_recipe(folder: Path) -> AnyRecipe | None:
    "The recipe of the run in a folder: of recipe.json, or else of a checkpoint; None where neither is there."
    path, notes = folder / "recipe.json", checkpoint_notes(folder)
    if os.path.lexists(path):
        then = "it is restored from a checkpoint" if "recipe" in notes else "the run then begins again"
        try:
            return recipe_from_dict(load_json(path))
        except LDMError as error:
            raise LDMError(f"{path} is no recipe ({error}): remove it; {then}") from error
    try:
        return recipe_from_dict(parse_json(notes["recipe"])) if "recipe" in notes else None
    except ValueError:  # a checkpoint of something else
        return None


def kept_precision(folder: Path) -> str | None:
    "The precision of the run in a folder: of run.json, or else of a checkpoint; None where neither says it."
    path = folder / "run.json"
    if not os.path.lexists(path):
        return checkpoint_notes(folder).get("precision")
    anew = "remove it; the precision is then that of the checkpoints"
    try:
        precision = load_json(path).get("precision")
    except CheckpointError as error:
        raise LDMError(f"{error}, or {anew}") from error
    if precision not in PRECISIONS:
        raise LDMError(f"{path} names no precision; known: {', '.join(PRECISIONS)}: {anew}")
    return precision


def kept_extensions(
    folder: Path,
    stages: Sequence[str],  # of the run's recipe, in their order
) -> list[Extension]:
    "What the last stage of the run in a folder was extended to: of run.json, or else of the checkpoints."
    path, found = folder / "run.json", []
    if os.path.lexists(path):
        found = load_json(path).get("extensions", [])
    else:
        for stage in stages:
            with suppress(CheckpointError, ValueError):  # whoever needs this checkpoint will say what is wrong with it
                found = parse_json(load_notes(folder / f"{stage}.safetensors").get("extensions", "[]")) or found
    try:
        extensions = [Extension.from_dict(each) for each in found]
        for each in extensions:
            if each.stage != stages[-1]:
                raise ValueError(f"the stage {shown(each.stage)} is not {stages[-1]}, which alone can be extended")
        return extensions
    except (TypeError, ValueError) as error:
        then = "the extensions are then those of the checkpoints"
        raise LDMError(f"{path}: extensions={shown(found)} cannot be read ({error}): remove it; {then}") from error


def save_run(folder: Path, precision: str, extensions: Sequence[Extension]) -> None:
    "Write down in run.json what a run that goes on has to know beside its recipe."
    longer = {"extensions": [each.to_dict() for each in extensions]} if extensions else {}
    save_json({"precision": precision} | longer, folder / "run.json")


def chosen_precision(folder: Path, options: RunOptions) -> str | None:
    "The precision of the options; of a run that goes on the one that it began with, perhaps on a less busy day."
    kept = kept_precision(folder) if options.goes_on else None
    if kept is not None and options.precision not in (None, kept):
        raise LDMError(
            f"the run in {folder} began in {kept}, and goes on in it: leave the precision out, or ask for {kept};"
            f" a run in {options.precision} needs another folder"
        )
    return kept or options.precision


def is_only_begun(folder: Path) -> bool:
    "Does the folder hold a recipe of ours? Of a run, that is, without a log, samples, latents or checkpoints yet."
    try:
        return (folder / "recipe.json").exists() and kept_recipe(folder) is not None
    except LDMError:
        return False


def refuse_other_run(folder: Path, recipe: AnyRecipe, resume: bool) -> None:
    "`LDMError` where the folder holds a run that must not be overwritten, another run, or none that could go on."
    path = folder / "recipe.json"
    done = [
        name for name in ("log.jsonl", "samples", "latents", "snapshots", "model") if os.path.lexists(folder / name)
    ]
    done += sorted(file.name for file in folder.glob("*.safetensors"))
    if not resume and (done or (os.path.lexists(path) and not is_only_begun(folder))):
        found = [path.name] * os.path.lexists(path) + done
        can_go_on = os.path.lexists(path) or "recipe" in checkpoint_notes(folder)
        advice = "go on with it (--resume; in Python resume=True)" if can_go_on else "remove these"
        raise LDMError(f"{folder} already holds a run ({', '.join(found)}): {advice}, or take another folder")
    if not resume:
        return
    before = kept_recipe(folder)
    if before is None:
        raise LDMError(f"{folder} holds no run to go on with: neither recipe.json nor a checkpoint says its recipe")
    now = recipe_from_dict(parse_json(json.dumps(recipe_to_dict(recipe))))
    changed = [f"{name} was {was!r} and is {new!r}" for name, (was, new) in recipe_differences(before, now).items()
               if name != "about"]  # fmt: skip
    if changed:
        listed = ", ".join(changed[:5]) + f" and {len(changed) - 5} more" * (len(changed) > 5)
        again = "take that one again (in Python also train(recipe_from_dict(…)) of what recipe.json holds)"
        raise LDMError(
            f"{path} is not the recipe as it is now ({listed}): a run goes on with the recipe that it began with: {again}"
        )


def check_places(folder: Path, options: RunOptions) -> None:
    "`LDMError` where something that a run writes could not be written. The folder of the run is made."
    for name in ("model", "samples", "latents", "snapshots", "cache"):
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise LDMError(f"{folder / name} is no folder, but a run writes one there: move it away")
    probe(folder / "recipe.json")
    if options.snapshot_every is not None and os.path.lexists(folder / "snapshots"):
        probe(folder / "snapshots" / "config.json")
    folder_for(Path(options.cache_dir or folder / "cache") / "any")  # a full cache need not be written to


def lock_run(folder: Path) -> BaseFileLock | None:
    "The lock on a run's folder, taken; `LDMError` where another process has it. None where no file can be locked."
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LDMError(
            f"{folder}: another process is training in this folder, or a run of this one was not closed: wait, or take another"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise LDMError(f"{folder / '.lock'} cannot be written: {reason(error)}") from error
        warnings.warn(
            f"{folder} lies where files cannot be locked: start no second process that trains in it", stacklevel=2
        )
        return None
    return lock


def write_recipe(folder: Path, recipe: AnyRecipe) -> None:
    "Write recipe.json into the folder; the folder is made if it is not there."
    folder_for(folder / "recipe.json")
    save_json(recipe_to_dict(recipe), folder / "recipe.json")


def stage_plans(recipe: AnyRecipe) -> dict[str, Training]:
    "How each stage of a recipe is trained, by its name, in their order."
    parts = recipe.trained_parts()
    found = {name: part for name in ("first_stage", "text", "diffusion") if (part := parts.get(name)) is not None}
    found = found or {recipe_to_dict(recipe)["kind"].replace(" ", "-"): recipe}  # "scene-reader", "toy-features"
    return {name: cast(Training, getattr(part, "training", part)) for name, part in found.items()}


def stage_trainings(recipe: AnyRecipe) -> list[Training]:
    "How each stage of a recipe is trained."
    return list(stage_plans(recipe).values())


def steps_saved(folder: Path, stage: str) -> int | None:
    "The steps of a stage that its newest checkpoint holds; None where there is none."
    path = folder / f"{stage}.safetensors"
    if not os.path.lexists(path):
        return None
    done = load_notes(path).get("step", "")
    if not re.fullmatch("[0-9]{1,18}", done):
        raise CheckpointError(f"{path} does not say after which step it was written: put another checkpoint there")
    return int(done)


def check_extension(folder: Path, recipe: AnyRecipe, steps: int, extensions: Sequence[Extension]) -> None:
    "`LDMError` where the last stage of the run in a folder cannot go on to so many steps."
    *before, (last, training) = stage_plans(recipe).items()
    go_on = "go on with the run first (--resume; in Python resume=True)"
    for name, plan in before:
        if (done := steps_saved(folder, name) or 0) < plan.steps:
            raise LDMError(f"extend: {name} has done {done} of {plan.steps} steps, and {last} comes after it: {go_on}")
    if not steps_saved(folder, last):
        raise LDMError(f"extend: {last} has not begun, so that nothing can be extended: {go_on}")
    planned = list(extended_plans(last, training, extensions).values())[-1].steps
    known = steps == planned and planned > training.steps  # the same command once more
    done = steps_saved(folder, last) or 0
    least = max(training.steps, done)
    if steps <= least and not known:
        raise LDMError(
            f"extend={steps} should be the steps of {last} in all, those that are done among them: more than the"
            f" {least} that are {'done' if done > training.steps else 'planned'} already"
        )


def taken_back(folder: Path, recipe: AnyRecipe, steps: int | None, extensions: Sequence[Extension]) -> list[Extension]:
    "The extensions of the run in a folder, with one more where the last stage is to end earlier than the others say."
    last, training = list(stage_plans(recipe).items())[-1]
    planned = list(extended_plans(last, training, extensions).values())[-1].steps
    if steps is None or not training.steps < steps < planned or steps <= (done := steps_saved(folder, last) or 0):
        return list(extensions)
    return [*(each for each in extensions if each.begin < done), Extension(last, done, steps)]


def claim_folder(
    folder: Path, recipe: AnyRecipe, options: RunOptions, precision: str, extensions: Sequence[Extension] = ()
) -> BaseFileLock | None:
    "Take a folder for a run, for the process that writes: the lock on it. Recipe and precision are written down."
    refuse_other_run(folder, recipe, options.goes_on)
    if options.extend is not None:
        check_extension(folder, recipe, options.extend, extensions)
    check_places(folder, options)
    lock = lock_run(folder)
    try:
        if options.goes_on:
            remove_leftovers(folder)
        write_recipe(folder, recipe)
        save_run(folder, precision, extensions)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return lock


def together(accelerator: RunAccelerator, do: Callable[[], Any]) -> Any:
    "What `do` gives in the main process, None in others; where it raises an LDMError, all processes do."
    done, refused = None, None
    try:
        done = do() if accelerator.is_main_process else None
    except LDMError as error:
        if accelerator.num_processes == 1:
            raise
        refused = str(error)
    if accelerator.num_processes > 1:
        (refused,) = broadcast_object_list([refused])
    if refused is not None:
        raise LDMError(refused)
    return done


def open_run(
    recipe: AnyRecipe,
    folder: str | Path,  # of the run; made if it is not there
    options: RunOptions = RunOptions(),
) -> Run:
    """Open the folder of a new run, or of one that goes on. What recipe, options and folder decide is refused at once.

    No other process can open it until the run is closed, or its process ends.
    """
    if folder == "":
        raise LDMError("folder is an empty text: give the folder of the run a name")
    if torch.is_inference_mode_enabled():  # weights that are made in it can never be trained
        raise LDMError("training needs gradients, and torch.inference_mode() forbids them: train outside of it")
    folder = place(folder)
    precision = chosen_precision(folder, options)
    accelerator = make_accelerator(options.device, precision, options.trackers, folder)
    plans = stage_plans(recipe)
    for training in plans.values():
        check_batch_size(training, accelerator.num_processes)
    extensions: list[Extension] = []
    if options.goes_on:
        before = kept_recipe(folder) or recipe
        recipe = replace(recipe, about=before.about)  # it says nothing of what is learned
        extensions = kept_extensions(folder, list(stage_plans(before)))
        extensions = taken_back(folder, recipe, options.extend, extensions)
    lock = together(accelerator, lambda: claim_folder(folder, recipe, options, accelerator.precision, extensions))
    notes = {"recipe": json.dumps(recipe_to_dict(recipe), sort_keys=True), "precision": accelerator.precision}
    notes |= {"python": platform.python_version()}
    notes |= {package: version(package) for package in ("ldm_edu", "torch", "accelerate")}
    if extensions:
        notes["extensions"] = json.dumps([each.to_dict() for each in extensions])
    extended = list(plans)[-1] if options.extend is not None else None
    run = Run(folder, accelerator, options, notes, extensions=extensions, extended=extended, lock=lock)
    if options.trackers:
        try:
            accelerator.init_trackers("ldm_edu", config=tracked(recipe))
        except BaseException:
            run.close()
            raise
    return run


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
    finite = {key: value if _is_finite(value) else None for key, value in scores.items()}  # as JSON can hold them
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in finite.items()}
    how = {"steps": training.steps, "seconds": round(seconds), "device": where}
    return how | {"precision": run.accelerator.precision} | rounded
