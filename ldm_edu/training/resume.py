"""A stage that survives being killed: the loop with its log, its samples and its checkpoints."""

import copy
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ldm_edu.basics import progress
from ldm_edu.display import save
from ldm_edu.errors import CheckpointError
from ldm_edu.files import brief, load_tensors, parse_json
from ldm_edu.training.loop import Stage, StepResult, check_finite, optimise
from ldm_edu.training.recipes import Recipe, Training, recipe_from_dict
from ldm_edu.training.run import Run, SignalGuard, plot_log, provenance
from ldm_edu.training.state import State, check_fit, load_state, make_state, save_state, state_file

__all__ = ["run_stage"]


def measure(run: Run, stage: Stage, results: Sequence[StepResult]) -> dict[str, float]:
    "Mean loss over all processes, images a second, share of the time spent waiting for data. Waits for the device."
    began = time.monotonic()
    check_finite(results, norms=run.accelerator.scaler is None)
    spent = sum(result.seconds for result in results) + time.monotonic() - began
    loss = run.accelerator.over_processes(torch.stack([result.loss for result in results]).mean(), "mean")
    return {
        "loss": loss.item(),
        "images_per_second": round(len(results) * stage.training.batch_size / max(spent, 1e-9), 1),
        "waiting": round(sum(result.waiting for result in results) / max(spent, 1e-9), 4),
    }


@torch.no_grad()
def validate(run: Run, stage: Stage, task: nn.Module) -> dict[str, float]:
    "The scores of a task, in the run's precision."
    with run.accelerator.autocast():
        scores = stage.validate(task) or {}
    return {
        name: value.item() if isinstance(value, torch.Tensor | np.generic) else value for name, value in scores.items()
    }


def log_scores(run: Run, stage: Stage, state: State, scores: Mapping[str, float]) -> None:
    "A line in log.jsonl, and one for the reader where there is no progress bar."
    run.log(stage.name, state.step, seconds=round(state.seconds, 1), **scores)
    if run.options.log_fn and run.is_main:
        listed = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        left = state.seconds / state.step * (stage.training.steps - state.step)
        run.options.log_fn(f"{stage.name} {state.step}/{stage.training.steps}: {listed}, {left / 60:.1f} min left")


@torch.no_grad()
def save_samples(run: Run, stage: Stage, state: State) -> None:
    "Samples of the averaged weights, and the losses so far, as images in the run's folder."
    if not run.is_main:
        return
    path = run.folder / "samples" / f"{stage.name}-{state.step:06d}.png"
    image = None
    try:
        image = stage.sample(state.ema.module)
    except Exception as error:  # a training of hours is not ended by a picture
        warnings.warn(f"{stage.name}: no sample could be drawn at step {state.step} ({error})", stacklevel=2)
    if image is not None:
        with run.beside(path):
            save(image.float().cpu(), path)
    with run.beside(run.folder / "loss.png"):
        plot_log(run.read_log(), run.folder / "loss.png")


@torch.no_grad()
def save_snapshot(run: Run, stage: Stage, state: State) -> None:
    "What the averaged weights of this step would be as a finished stage, in the run's folder `snapshots`."
    if not run.is_main:
        return
    done: Any = copy.deepcopy(stage.finish(copy.deepcopy(state.ema.module))).eval().float()
    made = provenance(run, replace(stage.training, steps=state.step), state.seconds, {})
    recipe = parse_json(run.notes["recipe"])
    several = isinstance(recipe_from_dict(recipe), Recipe)  # then each stage has an entry of its own
    done.provenance = {"recipe": recipe, "torch": torch.__version__} | ({stage.name: made} if several else made)
    done.save_pretrained(run.folder / "snapshots" / f"{stage.name}-{state.step:06d}")


def kept_average(run: Run, stage: Stage, state: State) -> nn.Module:
    "The averaged task that is kept, on all processes."
    run.accelerator.wait_for_everyone()
    best = state_file(run, stage.name, best=True)
    if stage.training.keep == "best" and best.exists():
        instead = "To go on, remove it: then the last step's weights become the model"
        try:
            averaged = {k.removeprefix("ema."): v for k, v in load_tensors(best).items() if k.startswith("ema.")}
            check_fit(averaged, state.ema.module.state_dict(), "the averaged weights")
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {instead}") from error
        except ValueError as error:
            raise CheckpointError(f"{best} does not fit this network ({brief(error)}). {instead}") from error
        state.ema.module.load_state_dict(averaged)
    for average, trained in zip(state.ema.module.parameters(), stage.task.parameters()):
        average.requires_grad_(trained.requires_grad)  # an average is not trained, but what is made of it may be
    return state.ema.module


class Watcher:
    "What is done beside the steps of a stage: log, samples, checkpoints."

    def __init__(self, run: Run, stage: Stage, state: State):
        self.run, self.stage, self.state = run, stage, state
        self.results: list[StepResult] = []  # since the last line of the log
        self.began = time.monotonic() - state.seconds
        self.saved = time.monotonic()
        tenth = max(1, stage.training.steps // 10)
        self.sample_every = tenth if run.options.sample_every is None else run.options.sample_every

    def log(self) -> dict[str, float]:
        "Log what has been measured since the last line, with scores of the averaged weights; returns all of it."
        scores = measure(self.run, self.stage, self.results)
        self.results.clear()
        if self.run.is_main:
            scores |= validate(self.run, self.stage, self.state.ema.module)
        log_scores(self.run, self.stage, self.state, scores)
        return scores

    def see(self, result: StepResult, guard: SignalGuard) -> tuple[dict[str, float], bool]:
        "Do what is due after a step; returns what was logged, if anything was, and whether to stop."
        state, options = self.state, self.run.options
        state.step, state.seconds = result.step, time.monotonic() - self.began
        self.results.append(result)
        end, scores = state.step == self.stage.training.steps, {}
        if state.step % options.every == 0 or end:
            scores = self.log()
        if self.sample_every and (state.step % self.sample_every == 0 or end):
            check_finite(self.results, norms=state.scaler is None)
            save_samples(self.run, self.stage, state)
        if options.snapshot_every and state.step % options.snapshot_every == 0:
            check_finite(self.results, norms=state.scaler is None)
            save_snapshot(self.run, self.stage, state)

        stop = guard.any_process(self.run.accelerator, state.step)
        improved = scores.get("held_out", math.inf) < state.best
        if improved or end or stop or time.monotonic() - self.saved > options.save_every:
            check_finite(self.results, norms=state.scaler is None)
            state.best = min(state.best, scores.get("held_out", math.inf))
            save_state(self.run, self.stage, state, improved)
            self.saved = time.monotonic()
        return scores, stop


def walk(
    run: Run,
    stage: Stage,
    plans: Mapping[int, Training],  # how it is trained from which step on
    state: State,
    task: nn.Module,  # as accelerate wraps it, and the optimiser
    optimizer: torch.optim.Optimizer,
) -> Iterator[StepResult]:
    "The steps of a stage that are left, each one as the plan says that holds there."
    start, ends = state.step, [*list(plans)[1:], stage.training.steps]
    for (begin, training), end in zip(plans.items(), ends, strict=True):
        if start >= end:
            continue
        planned = stage if training is stage.training else copy.copy(stage)
        planned.training = training
        with closing(cast(Any, optimise(planned, run.accelerator, task, optimizer, state.ema, start))) as steps:
            for result in steps:
                yield result
                if result.step == end:  # where a stage was extended before its planned end, the plan goes on
                    break
        start = end


def load_stage(run: Run, stage: Stage, state: State) -> dict[int, Training]:
    "Restore a stage, and extend it if that is asked for: how it is trained, from which step on."
    planned = stage.training
    stage.training = list(run.plans(stage.name, planned).values())[-1]
    load_state(run, stage, state)
    more = run.options.extend if run.extended == stage.name else None
    if more is not None and more > stage.training.steps:
        run.extend(stage.name, state.step, more)
    plans = run.plans(stage.name, planned)
    stage.training = list(plans.values())[-1]
    return plans


def run_stage(run: Run, stage: Stage) -> tuple[nn.Module, dict[str, Any]]:
    "Train a stage, from its checkpoint in the run's folder if there is one: the averaged task, and how it was made."
    state, task, optimizer = make_state(run, stage)
    plans = load_stage(run, stage, state)
    run.cut_log(stage.name, state.step)
    watcher, accelerator, steps = Watcher(run, stage, state), run.accelerator, stage.training.steps
    bar = progress(walk(run, stage, plans, state, task, optimizer), stage.name, steps - state.step)
    with SignalGuard() as guard:
        for result in bar:
            scores, stop = watcher.see(result, guard)
            if scores and (postfix := getattr(bar, "set_postfix_str", None)):  # a progress bar, not a bare iterator
                postfix(f"loss {scores['loss']:.4g}, {scores['images_per_second']:.0f} images/s")
            if stop:
                break
        if guard.any_process(accelerator):  # perhaps during the last save
            where = f"{stage.name} stopped after step {state.step}"
            raise KeyboardInterrupt(f"{where}, and saved: a resumed run goes on from there")
    average = kept_average(run, stage, state)
    run.steps_before += steps
    made = provenance(run, stage.training, state.seconds, validate(run, stage, average))
    longer = [{"from": each.begin, "steps": each.steps} for each in run.extensions if each.stage == stage.name]
    return average, made | ({"extensions": longer} if longer else {})
