"""What the benchmarks of speed share: timing side by side, numbers from it, networks and one step of each kind."""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap
from torch import Tensor, nn

from ldm_edu.conditioning.condition import Condition
from ldm_edu.conditioning.guidance import Guidance
from ldm_edu.denoiser.unet import UNet
from ldm_edu.diffusion.sampling import ddim
from ldm_edu.diffusion.schedule import NoiseSchedule
from ldm_edu.first_stage.autoencoder import FirstStage
from ldm_edu.first_stage.published import save_diffusers
from ldm_edu.measurements import Measurement, Measurements
from ldm_edu.published import save_diffusers_pipeline

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}  # processor: of all threads of this process
SCALE, STEPS = 3.0, 50  # of the guidance; of DDIM
NOISE = NoiseSchedule()
Network = TypeVar("Network", bound=nn.Module)

# Timing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """How long something is timed."""

    seconds: float = 45.0  # of one comparison, about
    least: int = 12  # rounds, however long they take
    most: int = 400  # rounds
    unit: float = 0.2  # seconds that a timed piece lasts at least: a faster step is repeated
    warmup: int = 2  # rounds that are not counted
    clock: Callable[[], float] = field(default=time.perf_counter)


QUICK = Pace(seconds=0.0, least=3, unit=0.0, warmup=1)


def spent(step: Callable[[], Any], repeats: int, pace: Pace) -> float:
    """The seconds that a step takes, a mean of some in a row."""
    start = pace.clock()
    for _ in range(repeats):
        step()
    return max(pace.clock() - start, 1e-9) / repeats


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage collector waits until a round has been timed."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def side_by_side(steps: Mapping[str, Callable[[], Any]], pace: Pace) -> dict[str, np.ndarray]:
    """Seconds of each step in every round. In a round all take their turn; the order is another one in each."""
    names, seconds = list(steps), {name: [] for name in steps}
    once = min(max(spent(step, 1, pace) for _ in range(2)) for step in steps.values())
    repeats = max(1, math.ceil(pace.unit / once))
    stop = math.inf
    for i in range(-pace.warmup, pace.most):
        if i == 0:
            stop = time.perf_counter() + pace.seconds
        if i >= pace.least and time.perf_counter() > stop:
            break
        first = i // 2 % len(names)
        order = (names[first:] + names[:first])[:: 1 if i % 2 else -1]
        with no_collection():
            found = {name: spent(steps[name], repeats, pace) for name in order}
        gc.collect(1)
        if i >= 0:
            for name, value in found.items():
                seconds[name].append(value)
    return {name: np.array(values) for name, values in seconds.items()}


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the median, from a bootstrap over rounds."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.median(values)), float(np.median(values))
    found = bootstrap((values,), np.median, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(found.low), float(found.high)


def median(name: str, values: np.ndarray, of: Mapping[str, Any], unit: str = "") -> Measurement:
    """The median of some rounds with its interval."""
    low, high = interval(values)
    return Measurement(name, float(np.median(values)), of=of, unit=unit, low=low, high=high, n=len(values))


def ratios(
    times: Mapping[str, np.ndarray],  # of `side_by_side`
    to: str,  # what the others are divided by
    of: Mapping[str, Any],
    key: str | None = None,  # under which the others' names stand in `of`; None: there is one other
) -> list[Measurement]:
    """For each of the others its ratio in every round: the median with its interval, quartiles, and milliseconds."""
    numbers = []
    for name, seconds in times.items():
        if name == to:
            continue
        what, ratio = {**of, **({key: name} if key else {})}, seconds / times[to]
        numbers.append(median("ratio", ratio, what))
        for quartile, q in (("lower quartile", 0.25), ("upper quartile", 0.75)):
            numbers.append(Measurement(quartile, float(np.quantile(ratio, q)), of=what, n=len(ratio)))
        for whose, values in ((name if key is None else "ours", seconds), (to, times[to])):
            numbers.append(Measurement(f"time of {whose}", 1000 * float(np.median(values)), of=what, unit="ms"))
    return numbers


@contextmanager
def settled(threads: int, pin: bool = True) -> Iterator[str]:
    """Torch computes with so many threads, and this process runs on so many processors, where the system can say so."""
    before, stack = torch.get_num_threads(), ExitStack()
    torch.set_num_threads(threads)
    stack.callback(torch.set_num_threads, before)
    told = f"{threads} thread{'s' * (threads > 1)}"
    if pin and hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        stack.callback(os.sched_setaffinity, 0, allowed)
        os.sched_setaffinity(0, set(sorted(allowed)[:threads]))
        told += f" on {threads} processor{'s' * (threads > 1)}"
    with stack:
        yield told


# Networks ------------------------------------------------------------------------------------------------------------


def randomised(module: Network, seed: int = 0) -> Network:
    """Random values in every parameter: a layer that begins as zero would make all predictions equal."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        z = torch.randn(p.shape, generator=generator)
        p.data = z * p[0].numel() ** -0.5 if p.ndim > 1 else p.data + 0.1 * z
    return module


def is_installed(package: str) -> bool:
    """Can this package be imported?"""
    return find_spec(package) is not None


def twin(ours: UNet | FirstStage) -> Any:
    """Diffusers' network of the same shape with the same weights."""
    import diffusers

    is_unet = isinstance(ours, UNet)
    name = ("UNet2DConditionModel" if ours.context_dim else "UNet2DModel") if is_unet else "AutoencoderKL"
    with TemporaryDirectory() as folder:
        (save_diffusers_pipeline if is_unet else save_diffusers)(ours, Path(folder) / "twin")  # type: ignore[arg-type]
        return getattr(diffusers, name).from_pretrained(Path(folder) / "twin")


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two predictions, in parts of the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def equal(ours: Tensor, theirs: Tensor, of: Mapping[str, Any], most: float = 1e-4) -> Measurement:
    """How far two predictions lie apart; SystemExit where they are not of the same network."""
    far = apart(ours, theirs)
    if not far <= most or not theirs.float().std() > 0.01:
        raise SystemExit(f"{dict(of)}: the two predictions are {far:.2g} apart, so nothing is timed")
    return Measurement("largest difference", far, of=of)


@dataclass(frozen=True)
class Given:
    """What a UNet is given: noisy latents, timesteps, tokens or none, and noise."""

    x: Tensor  # (b, c, h, w)
    t: Tensor  # (b,)
    noise: Tensor  # (b, c, h, w)
    context: Tensor | None = None  # (b, l, d)

    def cond(self) -> Condition:
        """The tokens as our networks take them."""
        return Condition(context=self.context)

    def null(self) -> Condition:
        """What stands for "no condition": tokens of zeros, for one image."""
        return Condition(context=None if self.context is None else torch.zeros_like(self.context[:1]))


def given(unet: UNet, batch: int, side: int, tokens: int = 24, device: str | torch.device = "cpu") -> Given:
    """Random numbers for a UNet."""
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(batch, unet.in_channels, side, side, generator=generator) for _ in range(2))
    t = torch.randint(1000, (batch,), generator=generator)
    context = torch.randn(batch, tokens, unet.context_dim, generator=generator) if unet.context_dim else None
    return Given(x.to(device), t.to(device), noise.to(device), None if context is None else context.to(device))


# One step of each kind -----------------------------------------------------------------------------------------------


def ours_predicts(unet: UNet, g: Given) -> Callable[[], Tensor]:
    """Our prediction."""
    return lambda: unet(g.x, g.t, g.cond())


def theirs_predicts(unet: Any, g: Given) -> Callable[[], Tensor]:
    """Diffusers' prediction."""
    tokens = () if g.context is None else (g.context,)
    return lambda: unet(g.x, g.t, *tokens, return_dict=False)[0]


def training_step(network: nn.Module, predict: Callable[[], Tensor], target: Tensor) -> Callable[[], None]:
    """Forward, loss, backward, AdamW's step: the same code around either network."""
    optimizer = torch.optim.AdamW(network.train().parameters(), 1e-5, fused=True)

    def step() -> None:
        F.mse_loss(predict(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def again_and_again(walk: Callable[[], Iterator[Tensor]]) -> Callable[[], Tensor]:
    """One item of an iterator with each call; at its end it begins anew."""
    running: list[Iterator[Tensor]] = [iter(())]

    def step() -> Tensor:
        found = next(running[0], None)
        if found is None:
            running[0] = walk()
            found = next(running[0])
        return found

    return step


def our_walk(unet: UNet, g: Given, steps: int = STEPS) -> Iterator[Tensor]:
    """DDIM with our network, guided where it has tokens: the latents after every step."""
    denoise = unet if g.context is None else Guidance(unet, g.null(), SCALE)
    for step in ddim(denoise, g.x, NOISE, steps=steps, cond=None if g.context is None else g.cond()):
        yield step.x


def their_schedule(steps: int = STEPS) -> Any:
    """Diffusers' DDIM over the same levels."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    curve = dict(beta_start=NOISE.beta_start, beta_end=NOISE.beta_end, beta_schedule="scaled_linear")
    schedule = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **curve)  # type: ignore[arg-type]
    schedule.set_timesteps(steps)
    return schedule


@torch.no_grad()
def their_walk(unet: Any, g: Given, steps: int = STEPS) -> Iterator[Tensor]:
    """The loop of diffusers' pipelines: a doubled batch where there are tokens, guidance, a step of the schedule."""
    schedule, x, tokens = their_schedule(steps), g.x, g.context
    if tokens is not None:
        tokens = torch.cat([torch.zeros_like(tokens), tokens])
    for t in schedule.timesteps.to(x.device):
        taken = schedule.scale_model_input(x if tokens is None else torch.cat([x] * 2), t)
        if tokens is None:
            noise = unet(taken, t, return_dict=False)[0]
        else:
            without, with_tokens = unet(taken, t, tokens, return_dict=False)[0].chunk(2)
            noise = without + SCALE * (with_tokens - without)
        x = schedule.step(noise, t, x, return_dict=False)[0]
        yield x


# What is written -----------------------------------------------------------------------------------------------------

SETTING = ("command", "machine", "versions", "commit")  # pieces that differ in one of these are not of one table


def merged(old: Measurements | None, new: Measurements, key: str = "piece") -> Measurements:
    """The new numbers, and those of other pieces that were measured in the same setting."""
    if old is None or any(getattr(old, name) != getattr(new, name) for name in SETTING):
        return new
    measured = set(new.keys(key))
    return replace(new, numbers=(*(m for m in old if m.of.get(key) not in measured), *new.numbers))


def without_key(found: Measurements, key: str) -> Measurements:
    """The same without a key of `of`, for a table in which it is the same everywhere."""
    kept = (replace(m, of={k: v for k, v in m.of.items() if k != key}) for m in found)
    return replace(found, numbers=tuple(kept))


def columns(found: Measurements, names: Sequence[str]) -> list[str]:
    """Those of the names that occur."""
    there = {m.name for m in found}
    return [name for name in names if name in there]
