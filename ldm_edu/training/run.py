"""Where a run lives and what it runs on: folder, log, device, signals."""

import json
import os
import platform
import re
import signal
import threading
import time
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from ldm_edu.basics import pick_device, pick_dtype
from ldm_edu.checkpoints import atomic, load_json, save_json
from ldm_edu.errors import LDMError
from ldm_edu.training.recipes import AnyRecipe, Training, recipe_differences, recipe_from_dict, recipe_to_dict

PRECISIONS = ("fp32", "bf16", "fp16", "fp64")


def make_accelerator(
    device: str = "auto",  # see `pick_device`
    precision: str | None = None,  # one of PRECISIONS; None: bf16 where the device computes in it, else fp32
) -> Accelerator:
    "accelerate's Accelerator for a device of ours; `LDMError` for a precision that is unknown or not for this device."
    where = pick_device(device)
    precision = precision or ("bf16" if pick_dtype(where) == torch.bfloat16 else "fp32")
    if precision not in PRECISIONS:
        raise LDMError(f"unknown precision '{precision}'; known: {', '.join(PRECISIONS)}")
    if precision == "fp16" and where.type == "cpu":
        raise LDMError("precision 'fp16' needs a GPU; on a CPU take bf16 or fp32")
    if precision == "fp64" and where.type == "mps":
        raise LDMError("precision 'fp64' does not exist on mps; take fp32")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # a second run in the same process may choose anew
        AcceleratorState._reset_state(reset_partial_state=True)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)
    accelerator = Accelerator(
        cpu=where.type == "cpu", mixed_precision=precision if precision in ("bf16", "fp16") else "no"
    )
    accelerator.precision = precision
    accelerator.dtype = torch.float64 if precision == "fp64" else torch.float32  # of weights and batches
    return accelerator


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
    accelerator: Accelerator
    every: int = 100  # steps between lines of the log
    save_every: float = 60.0  # seconds between checkpoints
    sample_every: int | None = None  # steps between samples drawn into the folder; None: a tenth of the stage; 0: never
    compile: bool = False  # torch.compile the network?
    channels_last: bool = False  # keep the channels of a pixel side by side in memory? faster convolutions on many GPUs
    notes: Mapping[str, str] = field(default_factory=dict)  # texts for every checkpoint: recipe and versions
    log_fn: Callable[[str], None] | None = None  # called with each log line when no progress bar is shown

    def log(self, **values: Any) -> None:
        "One more line in log.jsonl."
        if not self.accelerator.is_main_process:
            return
        path = self.folder / "log.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        "The log; a line that was cut short is left out."
        path = self.folder / "log.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def cut_log(self, stage: str, step: int) -> None:
        "Drop the lines of a stage from after `step`, which will be done again."
        path = self.folder / "log.jsonl"
        if self.accelerator.is_main_process and path.exists():
            told = [line for line in self.read_log() if line["stage"] != stage or line["step"] <= step]
            with writing(path), atomic(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in told), encoding="utf-8")

    def shard(self, indices: Sequence[int]) -> list[int]:
        "This process's share of a batch."
        return list(indices[self.accelerator.process_index :: self.accelerator.num_processes])


def check_batch_size(
    training: Training,
    n: int,  # processes
) -> None:
    "`LDMError` where a batch cannot be shared equally by the processes, and each share cut into equal pieces."
    if training.batch_size % (n * training.accumulate):
        pieces = f", in accumulate={training.accumulate} pieces each" if training.accumulate > 1 else ""
        raise LDMError(
            f"batch_size={training.batch_size} cannot be shared by {n} processes{pieces};"
            f" choose a multiple of {n * training.accumulate}"
        )


def plot_log(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    "Every stage's loss, and its loss on held-out data where there is one, over the steps."
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


class SignalGuard:
    "Within `with SignalGuard() as guard`, Ctrl-C and SIGTERM only set `guard.requested`; a second one stops at once."

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested, self.before = False, {}

    def __enter__(self) -> "SignalGuard":
        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be caught
            self.before = {number: signal.signal(number, self.note) for number in self.SIGNALS}
        return self

    def note(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def any_process(self, accelerator: Accelerator) -> bool:
        "Has any of the processes been asked to stop? All get the same answer, so that none waits for another."
        if accelerator.num_processes == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum") > 0)


class Meter:
    "Mean loss, images a second, and the share of the time that was spent waiting for data, since it was last read."

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.read()

    def add(self, loss: float, waited: float) -> None:
        "One step's loss, and how many seconds it waited for its batch."
        self.losses.append(loss)
        self.waited += waited

    def read(self) -> dict[str, float]:
        "What was measured; begins anew."
        now, scores = time.monotonic(), {}
        if getattr(self, "losses", None):
            spent, n = now - self.began, len(self.losses)
            scores = {"loss": sum(self.losses) / n, "images_per_second": round(n * self.batch_size / spent, 1),
                      "waiting": round(self.waited / spent, 4)}  # fmt: skip
        self.losses, self.waited, self.began = [], 0.0, now
        return scores


def prepare_folder(folder: str | Path, recipe: AnyRecipe, resume: bool) -> Path:
    "The run's folder with its recipe in it; `LDMError` where it holds another run, or none that could go on."
    folder = Path(folder)
    path = folder / "recipe.json"
    left = [name for name in (path.name, "log.jsonl", "samples", "latents", "model") if (folder / name).exists()]
    left += sorted(file.name for file in folder.glob("*.safetensors"))
    if left and not resume:
        raise LDMError(
            f"{folder} already holds a run ({', '.join(left)}): go on with it (resume), or take another folder"
        )
    if resume and not path.exists():
        raise LDMError(f"{folder} holds no run to go on with: there is no recipe.json in it")
    if resume and (changed := recipe_differences(recipe_from_dict(load_json(path)), recipe)):
        told = ", ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in changed.items())
        raise LDMError(
            f"{path} is not the recipe as it is now ({told}): a run goes on with the recipe that it began with"
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file in folder.rglob(".*") if resume else ():  # of a save in which the run was killed: see `atomic`
        if file.is_file() and re.fullmatch(r"\..+\.(safetensors|jsonl|json|png)\.\d+|\.tmp\w{6}", file.name):
            file.unlink()
    with writing(folder):
        save_json(recipe_to_dict(recipe), path)
    return folder


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
    **options: Any,  # fields of `Run`: every, save_every, looks, compile, channels_last, log_fn
) -> Run:
    "Open the folder of a run, or go on with it, on a device."
    accelerator = make_accelerator(device, precision)
    for training in stage_trainings(recipe):
        check_batch_size(training, accelerator.num_processes)
    if accelerator.is_main_process:
        prepare_folder(folder, recipe, resume)
    accelerator.wait_for_everyone()
    notes = {"recipe": json.dumps(recipe_to_dict(recipe)), "python": platform.python_version()}
    notes |= {package: version(package) for package in ("ldm_edu", "torch", "accelerate")}
    return Run(Path(folder), accelerator, notes=notes, **options)


def provenance(run: Run, training: Training, seconds: float, scores: Mapping[str, Any]) -> dict[str, Any]:
    "How a network was made, for its checkpoint's config."
    device = run.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = torch.get_num_threads()
    where = name if device.type == "cuda" else f"{name} ({threads} thread{'s' * (threads > 1)})"
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in scores.items()}
    return {"steps": training.steps, "seconds": round(seconds), "device": where,
            "precision": run.accelerator.precision, **rounded}  # fmt: skip
