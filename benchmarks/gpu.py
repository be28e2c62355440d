"""What one NVIDIA GPU makes of our steps in bf16: FLOP/s, images a second, memory, and whether the host ever waits.

    python benchmarks/gpu.py                                        # at most 8 minutes; writes $OUT/gpu.json
    python benchmarks/gpu.py --device cpu --smallest --out gpu.json  # the same code on a CPU, tiny: a test of it

The model is CelebA at 256² pixels of table 12: the UNet of 274M weights on latents 64×64×3, in batches of 48, or of
what fits. A step is one of our training loop, with all that belongs to it: noise drawn on the CPU by a thread, copies
to the device, bf16, clipping, fused AdamW, the moving average. FLOPs are counted by PyTorch for the forward and
backward pass alone, and held against a large bf16 matrix product of the same run. At the end the tests that are marked
`gpu` run. It needs no package that only the course or the tests need; what is compared with diffusers is left out where
that is missing. With no GPU it ends with status 2.
"""

import argparse
import os
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from common import (
    Given,
    Pace,
    again_and_again,
    equal,
    given,
    is_installed,
    median,
    our_walk,
    ours_predicts,
    randomised,
    ratios,
    side_by_side,
    their_walk,
    theirs_predicts,
    training_step,
    twin,
)

from ldm_edu.denoiser.unet import UNet
from ldm_edu.measurements import Measurement, Measurements, measured_here
from ldm_edu.training.loop import Stage, optimise, step_randomness, to_device
from ldm_edu.training.recipes import DiffusionRecipe, FirstStageRecipe, Recipe, Training
from ldm_edu.training.run import Run, RunOptions, make_accelerator
from ldm_edu.training.state import make_state
from ldm_edu.training.tasks import DiffusionTask

ROOT = Path(__file__).resolve().parents[1]
CELEBA = dict(channels=224, multipliers=(1, 2, 3, 4), blocks=2, attention_factors=(2, 4, 8), head_channels=32)
TEXT = dict(channels=320, multipliers=(1, 2, 4, 4), blocks=2, attention_factors=(1, 2, 4), heads=8, context_dim=768)
TINY: dict[str, Any] = dict(channels=32, multipliers=(1, 2), blocks=1, attention_factors=(2,), head_channels=16)
BATCHES = (48, 32, 24, 16, 8, 4)  # the first that fits; 48 in table 12
MODEL = "CelebA 256², f = 4"  # of table 12


class LeftOut(Exception):
    """Why something is not measured."""


@dataclass
class Options:
    """On what, how large, how long, and what earlier sections have found."""

    device: torch.device
    smallest: bool
    ends: float  # on time.monotonic()
    tests: str = "tests"
    product: float | None = None  # FLOP/s of the matrix product
    per_image: int | None = None  # operations of a training step for one image
    numbers: list[Measurement] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.ends - time.monotonic()

    @property
    def is_gpu(self) -> bool:
        """Is it a GPU?"""
        return self.device.type == "cuda"

    @property
    def side(self) -> int:
        """Height and width of the latents."""
        return 8 if self.smallest else 64


# Timing on a device --------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], Any], options: Options, groups: int = 12, each: int = 4, warmup: int = 4) -> np.ndarray:
    """Seconds of a step, a mean for each group of steps in a row; the host waits between groups alone."""
    groups, each, warmup = (3, 1, 1) if options.smallest else (groups, each, warmup)
    for _ in range(warmup):
        step()
    found = []
    for _ in range(groups):
        wait(options.device)
        start = time.perf_counter()
        for _ in range(each):
            step()
        wait(options.device)
        found.append((time.perf_counter() - start) / each)
    return np.array(found)


def host_waits(step: Callable[[], Any], steps: int) -> float:
    """How often a step makes the host wait for the GPU, by PyTorch's own watch over synchronising operations."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(steps):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message).lower() for warning in seen) / steps


def waits_of(step: Callable[[], Any], options: Options, of: Mapping[str, Any]) -> Iterator[Measurement]:
    """The host's waits in a step, on a GPU; before, whether the watch sees one that was put there."""
    if not options.is_gpu:
        return
    number = torch.ones((), device=options.device)
    if host_waits(number.item, 3) != 1:
        raise LeftOut("the watch over host synchronisations does not see `.item()`, so it counts nothing")
    yield Measurement("host synchronisations", host_waits(step, 10), of=of, n=10)


def flops_of(run: Callable[[], Any]) -> int:
    """Floating point operations of convolutions, matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def speed_of(
    seconds: np.ndarray,
    batch: int,
    flops: float,
    options: Options,
    of: Mapping[str, Any],
    rate: str = "images a second",  # what a step does `batch` of
) -> Iterator[Measurement]:
    """Numbers of a step: its time, images a second, FLOP/s, and their share of the matrix product's."""
    yield median("time of a step", 1000 * seconds, of, "ms")
    yield median(rate, batch / seconds, of)
    yield Measurement("operations of a step", flops / 1e12, of=of, unit="TFLOP")
    yield median("operations a second", flops / seconds / 1e12, of, "TFLOP/s")
    if options.product:
        yield median("share of the matrix product", 100 * flops / seconds / options.product, of, "%")


def matrix_product(options: Options) -> Iterator[Measurement]:
    """FLOP/s of a large bf16 matrix product: what everything else is held against."""
    n = 128 if options.smallest else 8192
    a, b = (torch.randn(n, n, device=options.device).bfloat16() for _ in range(2))
    rates = 2 * n**3 / timed(lambda: a @ b, options, groups=20, each=10, warmup=10)
    options.product = float(np.median(rates))
    yield median("operations a second", rates / 1e12, {"step": f"bf16 matrix product {n}×{n}"}, "TFLOP/s")


# Training ------------------------------------------------------------------------------------------------------------


def recipe_of(options: Options, batch: int) -> Recipe:
    """The unconditional model of table 12, so far as a training step needs it."""
    training = Training(steps=10**6, batch_size=batch, lr=9.6e-5, warmup=0)
    first = FirstStageRecipe(training, multipliers=(1, 2, 4), latent_channels=3)
    size: dict[str, Any] = TINY if options.smallest else CELEBA
    diffusion = DiffusionRecipe(training, **size)
    return Recipe(MODEL, "table 12", "celeba", 4 * options.side, first, diffusion)


class RandomLatents(Stage):
    """A stage whose latents are noise, since what they show costs no time; all else is as in a training."""

    def __init__(self, recipe: Recipe, side: int):
        super().__init__("diffusion", DiffusionTask(recipe), recipe.diffusion.training)
        self.shape = (recipe.first_stage.latent_channels, side, side)

    def batch(self, step: int) -> dict[str, Any]:
        """Latents and what is random about a step, on the CPU."""
        indices = range(step * self.training.batch_size, (step + 1) * self.training.batch_size)
        random = step_randomness(self.seed, step, indices, self.shape)
        return random | {"z": random.pop("latent_noise")}


@contextmanager
def training_of(options: Options, batch: int, **how: Any) -> Iterator[tuple[Callable[[], Any], Stage, Run]]:
    """A step of our training loop with each call; `how` are fields of RunOptions."""
    with TemporaryDirectory() as folder:
        named = RunOptions(device=str(options.device), precision="bf16", **how)
        run = Run(Path(folder), make_accelerator(named.device, named.precision), named)
        stage = RandomLatents(recipe_of(options, batch), options.side)
        state, task, optimizer = make_state(run, stage)
        walk = optimise(stage, run.accelerator, task, optimizer, state.ema)
        try:
            yield lambda: next(walk), stage, run
        finally:
            walk.close()  # type: ignore[attr-defined]


def flops_of_training(options: Options, stage: Stage, run: Run) -> int:
    """Operations of the forward and backward pass for one image; a compiled network's cannot be counted."""
    if options.per_image is None and run.options.compile:
        with training_of(options, 1) as (_, plain, other):
            return flops_of_training(options, plain, other)
    if options.per_image is None:
        options.per_image = counted(stage, run)
    return options.per_image


def counted(stage: Stage, run: Run) -> int:
    """Operations of the forward and backward pass for the first image of a stage."""
    batch = {name: value[:1] for name, value in to_device(stage.batch(0), run.accelerator).items()}
    flops = flops_of(lambda: stage.task(batch)[0].backward())
    stage.task.zero_grad()
    return flops


def train(options: Options, batch: int, how: str, **fields: Any) -> Iterator[Measurement]:
    """A training step at one batch size."""
    if options.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    with training_of(options, batch, **fields) as (step, stage, run):
        of = {"model": MODEL, "step": "training", "how": how, "batch": batch}
        weights = float(sum(p.numel() for p in stage.task.parameters()))
        yield Measurement("weights", weights, of=of)
        flops = batch * flops_of_training(options, stage, run)
        seconds = timed(step, options)
        yield from speed_of(seconds, batch, flops, options, of)
        yield from waits_of(step, options, of)
        if options.is_gpu:
            yield Measurement("peak memory", torch.cuda.max_memory_allocated() / 2**30, of=of, unit="GiB")


def train_what_fits(options: Options, how: str, **fields: Any) -> list[Measurement]:
    """A training step with 48 images, or with as many as fit."""
    sizes = (2,) if options.smallest else BATCHES
    for batch in sizes:
        try:
            return list(train(options, batch, how, **fields))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
    raise LeftOut(f"not even {sizes[-1]} images fit into the GPU's memory")


def training(options: Options) -> list[Measurement]:
    """As `ldm-edu train` does it."""
    return train_what_fits(options, "eager")


def channels_last(options: Options) -> list[Measurement]:
    """With `--channels-last`."""
    return train_what_fits(options, "eager, channels last", channels_last=True)


def compiled(options: Options) -> list[Measurement]:
    """With `--compile`; how long the compilation takes does not count."""
    if not options.is_gpu:
        raise LeftOut("only on a GPU")
    return train_what_fits(options, "compiled, channels last", channels_last=True, compile=True)


# Sampling ------------------------------------------------------------------------------------------------------------


def network(options: Options, text: bool) -> tuple[str, UNet, Given]:
    """A UNet in bf16 and what it is given: the CelebA model, or one with text, as large as that of Stable Diffusion."""
    shape: dict[str, Any] = TEXT if text else CELEBA
    if options.smallest:
        shape = TINY | ({"context_dim": 16} if text else {})
    batch, channels = (2 if options.smallest else 4 if text else 16), (4 if text else 3)
    with options.device:
        unet = UNet(channels, channels, **shape).bfloat16().eval()
    g = given(unet, batch, options.side, 77, options.device)
    half = {name: None if value is None else value.bfloat16() for name, value in vars(g).items() if name != "t"}
    return ("text, 64×64×4" if text else MODEL), unet, replace(g, **half)


def sampling(options: Options) -> Iterator[Measurement]:
    """A step of DDIM with bf16 weights; with text it is guided, in a doubled batch."""
    for text in (False, True):
        name, unet, g = network(options, text)
        of = {"model": name, "step": "sampling, guided" if text else "sampling", "how": "eager", "batch": len(g.x)}
        one = replace(g, x=g.x[:1], t=g.t[:1], context=None if g.context is None else g.context[:1])
        with torch.no_grad():  # one image, and where it is guided the same without its text
            flops = (1 + text) * len(g.x) * flops_of(ours_predicts(unet, one))
        yield Measurement("weights", float(sum(p.numel() for p in unet.parameters())), of=of)
        step = again_and_again(lambda unet=unet, g=g: our_walk(unet, g))
        yield from speed_of(timed(step, options), len(g.x), flops, options, of, "steps of an image a second")
        yield from waits_of(step, options, of)


# Diffusers, where it is ----------------------------------------------------------------------------------------------


def then_wait(step: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """The step, and until the device has done it."""

    def both() -> None:
        step()
        wait(device)

    return both


def against_diffusers(options: Options) -> Iterator[Measurement]:
    """Training and sampling steps of equal UNets under autocast, side by side."""
    if not is_installed("diffusers"):
        raise LeftOut("diffusers is not installed")
    pace = Pace(seconds=0.0 if options.smallest else 15.0, least=3, unit=0.0, warmup=1 if options.smallest else 3)
    for text in (False, True):
        name, unet, g = network(options, text)
        ours = randomised(unet.float().cpu()).to(options.device)
        theirs, g = twin(ours.cpu()).to(options.device), given(ours, len(g.x), options.side, 77, options.device)
        ours.to(options.device)
        of = {"model": name, "how": "eager, autocast"}
        with torch.no_grad():
            yield equal(ours_predicts(ours, g)(), theirs_predicts(theirs, g)(), of | {"step": "prediction"}, most=1e-2)
        with torch.autocast(options.device.type, torch.bfloat16):
            for step, pair in {
                "sampling": (
                    again_and_again(lambda: our_walk(ours, g)),
                    again_and_again(lambda: their_walk(theirs, g)),
                ),
                "training": (
                    training_step(ours, ours_predicts(ours, g), g.noise),
                    training_step(theirs, theirs_predicts(theirs, g), g.noise),
                ),
            }.items():
                steps = {"ours": then_wait(pair[0], options.device), "diffusers": then_wait(pair[1], options.device)}
                yield from ratios(side_by_side(steps, pace), "diffusers", of | {"step": step, "batch": len(g.x)})


# The tests -----------------------------------------------------------------------------------------------------------


def tests(options: Options) -> Iterator[Measurement]:
    """The tests that are marked `gpu`, with no plugin that may be missing."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
        command += ["-o", "markers=gpu: needs a GPU", "--continue-on-collection-errors", f"--junitxml={report}"]
        try:
            done = subprocess.run(
                [*command, options.tests], cwd=ROOT, capture_output=True, text=True, timeout=max(20.0, options.left)
            )
        except subprocess.TimeoutExpired as error:
            raise LeftOut(f"the tests were not done after {error.timeout:.0f} s") from error
        print(done.stdout[-3000:], done.stderr[-1000:], flush=True)
        if not report.exists():
            raise LeftOut(f"pytest ended with status {done.returncode}")
        suite = next(ElementTree.parse(report).getroot().iter("testsuite")).attrib
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        counts["passed"] = 2 * counts["tests"] - sum(counts.values())
        for name in ("passed", "skipped", "failures", "errors"):
            yield Measurement("tests marked gpu", float(counts[name]), of={"outcome": name})


# The command ---------------------------------------------------------------------------------------------------------

# Name: what is measured, and how many seconds should be left before it is begun.
SECTIONS: dict[str, tuple[Callable[[Options], Any], float]] = {
    "matrix product": (matrix_product, 0),
    "training": (training, 0),
    "sampling": (sampling, 160),
    "training, channels last": (channels_last, 160),
    "against diffusers": (against_diffusers, 180),
    "training, compiled": (compiled, 270),
    "tests": (tests, 20),
}
ABOUT = (
    "Medians over groups of steps in a row, with the 95 % interval of the median from a bootstrap over groups; the "
    "host waits for the GPU between groups alone. Operations are those of convolutions, matrix products and attention "
    "in the forward and backward pass, a product and a sum counted as two; AdamW, clipping and the moving average take "
    "time but count as none. Their share is of the matrix product that was measured in the same run."
)


def written(options: Options, skipped: Mapping[str, str], out: Path, command: str) -> Measurements:
    """Write what was found so far, and why the rest was left out."""
    about = ABOUT + "".join(f" Left out: {name} ({why})." for name, why in skipped.items())
    found = measured_here(
        title="Our steps on a GPU" if options.is_gpu else "A test of benchmarks/gpu.py on a CPU",
        numbers=options.numbers,
        about=about,
        seed=0,
        device=options.device,
        packages=("accelerate", "transformers", "diffusers"),
        command=command,
    )
    found.save(out)
    return found


def measure(options: Options, out: Path, only: Sequence[str], command: str) -> int:
    """Every section that there is time for; a file after each. The status of the command."""
    skipped: dict[str, str] = {}
    for name in only:
        section, least = SECTIONS[name]
        began = time.monotonic()
        try:
            if options.left < least and not options.smallest:
                raise LeftOut(f"{options.left:.0f} s are left, and it may need {least}")
            new = list(section(options))
        except LeftOut as reason:
            skipped[name] = str(reason)
            print(f"{name}: left out, {reason}", flush=True)
            new = []
        options.numbers += new
        for number in new:
            print(f"  {number}")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        if options.is_gpu:
            torch.cuda.empty_cache()
        written(options, skipped, out, command)
    failed = [m for m in options.numbers if m.of.get("outcome") in ("failures", "errors") and m.value]
    return 1 if failed else 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a test of this script")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which nothing is begun any more")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="these sections")
    parser.add_argument("--smallest", action="store_true", help="tiny networks and few steps")
    parser.add_argument("--tests", default="tests", help="file or folder of the tests that are marked gpu")
    folder = Path(os.environ.get("OUT", "runs"))
    parser.add_argument("--out", type=Path, default=folder / "gpu.json", help="the numbers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on the device; 2 where there is none, 1 where a test marked `gpu` fails."""
    args = parsed(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs an NVIDIA GPU that this PyTorch can use; there is none", file=sys.stderr)
        print("its code can be tried on a CPU: --device cpu --smallest", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    options = Options(device, args.smallest, time.monotonic() + 60 * args.minutes, args.tests)
    command = f"python benchmarks/gpu.py{' --device cpu' * (device.type == 'cpu')}{' --smallest' * args.smallest}"
    return measure(options, args.out, args.only, command)


if __name__ == "__main__":
    sys.exit(main())
