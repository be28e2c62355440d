"""What the latent space buys: time and memory of a training step and of sampling, f = 1 against f = 4 and 8.

    python benchmarks/efficiency.py                          # all pieces, about an hour on one core
    python benchmarks/efficiency.py --only placement large   # some of them

alike: one network, on pixels and on latents of f = 4, with attention at a quarter of its input's side, and
with that of its middle block alone.
Its ratio is explained by counts: positions, operations, bytes that are kept for the backward pass.
placement: UNets with attention at maps of 32², 16² and 8², as in tables 13 and 14, for f = 1, 4 and 8.
memory: the peak of each of them above the same process before its first step, every one in a process of its own.
large: super-resolution by convolution from 64² to 1024²: the same drawn faces alone and in ever larger mosaics.

A batch has one image of 256² or 16 of 64². What is compared takes turns in one run. Writes
ldm_edu/results/efficiency.json.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import QUICK, Given, Pace, given, median, merged, randomised, settled, side_by_side, training_step
from torch import Tensor

from ldm_edu.applications import upscale
from ldm_edu.data.batches import collate
from ldm_edu.data.registry import open_dataset
from ldm_edu.denoiser.unet import UNet
from ldm_edu.evaluation.metrics import psnr
from ldm_edu.first_stage.autoencoder import FirstStage
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.measurements import Measurement, load_measurements, measured_here
from ldm_edu.training.costs import recipe_costs
from ldm_edu.training.recipes import DiffusionRecipe, FirstStageRecipe, Recipe, Training
from ldm_edu.training.tasks import DiffusionTask, build_first_stage

RESULTS = Path(__file__).resolve().parent.parent / "ldm_edu" / "results" / "efficiency.json"
TITLE = "What the latent space buys"
ABOUT = (
    "UNets of 14 to 16 million parameters without a condition, first stages of {stage} (random weights: time does not "
    "depend on them), fp32, AdamW, batches of one image of 256² or 16 of 64². A ratio is taken in every round, where "
    "all take their turn; given are the median and its 95 % interval over rounds. FLOPs are counted by PyTorch for one "
    "prediction of one image; *kept* is what autograd keeps of it. Memory is the peak of a process above what it held "
    "before its first training step."
)


# --- Networks ---


@dataclass(frozen=True)
class Network:
    """A UNet and the first stage that it works behind."""

    piece: str  # "alike" or "placement"
    f: int
    multipliers: tuple[int, ...]
    attention: tuple[int, ...]  # downsampling factors
    channels: int = 64

    @property
    def of(self) -> dict[str, Any]:
        """What a number says of it."""
        told = ", ".join(map(str, self.attention)) or "middle only"
        return {"piece": self.piece, "f": self.f, "attention factors": told}

    def recipe(self, size: int) -> Recipe:
        """As a recipe, which says what it costs."""
        training = Training(1, batch_size=1, lr=1e-4)
        levels, c = {1: ((1,), 3), 4: ((1, 2, 4), 3), 8: ((1, 2, 4, 4), 4)}[self.f]
        kind = "none" if self.f == 1 else "kl"
        first = FirstStageRecipe(
            None if self.f == 1 else training, 32, multipliers=levels, latent_channels=c, regulariser=kind
        )
        unet = DiffusionRecipe(training, self.channels, self.multipliers, blocks=1, attention_factors=self.attention)
        return Recipe(f"f{self.f}", "for its costs", "toy-faces", size, first, unet)

    def unet(self, size: int) -> UNet:
        """The network with random weights."""
        return randomised(DiffusionTask(self.recipe(size), None).unet)

    def first_stage(self, size: int) -> FirstStage:
        """What makes its latents; of f = 1 one that does nothing."""
        return build_first_stage(self.recipe(size).first_stage).eval()


WIDTHS = (1, 2, 3, 4)
ALIKE = tuple(Network("alike", f, WIDTHS, attention) for attention in ((4,), ()) for f in (1, 4))
PLACEMENT = (
    Network("placement", 1, (1, 1, 2, 3, 3, 3), (8, 16, 32)),
    Network("placement", 4, WIDTHS, (2, 4, 8)),
    Network("placement", 8, (2, 3, 4), (1, 2, 4)),
)


def costs(network: Network, size: int) -> list[Measurement]:
    """What is counted: nothing is run."""
    found, of = recipe_costs(network.recipe(size)), {**network.of, "size": size}
    return [
        Measurement("positions", (size // network.f) ** 2, of=of),
        Measurement("parameters", found.unet, of=of),
        Measurement("FLOPs of a prediction", float(found.flops), of=of),
        Measurement("kept of a prediction", found.sample_bytes / 2**20, of=of, unit="MiB"),
    ]


# --- Time ---


def batch_of(size: int) -> int:
    """Images of a batch: together they have at most the pixels of one of 256²."""
    return max(1, 256**2 // size**2)


def update_of(unet: UNet) -> Callable[[], None]:
    """AdamW's step alone, with gradients of zero."""
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in unet.parameters()]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    return torch.optim.AdamW(parameters, 1e-5, fused=True).step  # type: ignore[return-value]


def trained(unet: UNet, inputs: Given) -> Callable[[], Any]:
    """One training step."""
    return training_step(unet, lambda: unet(inputs.x, inputs.t), inputs.noise)


def steps_of(network: Network, size: int) -> dict[str, Callable[[], Any]]:
    """What a network does to a batch, by name: a training step and, of it, the update; a prediction; with a first stage
    also encoding and decoding."""
    unet, stage, batch = network.unet(size), network.first_stage(size), batch_of(size)
    inputs = given(unet, batch, size // network.f)
    image = torch.zeros(batch, 3, size, size)

    def predict() -> Tensor:
        with torch.no_grad():
            return unet(inputs.x, inputs.t)

    def encode() -> Tensor:
        with torch.no_grad():
            return stage.encode(image)

    def decode() -> Tensor:
        with torch.no_grad():
            return stage.decode(inputs.x)

    alone = {"training step": trained(unet, inputs), "prediction": predict, "update": update_of(unet)}
    return alone if network.f == 1 else {**alone, "encoding": encode, "decoding": decode}


def timed(networks: Sequence[Network], size: int, pace: Pace) -> list[Measurement]:
    """Seconds of every step, and how many times as long it takes at f = 1 as at another f."""
    steps = {(network, name): step for network in networks for name, step in steps_of(network, size).items()}
    keys = {f"{network.of} {name}": (network, name) for network, name in steps}
    seconds = side_by_side({key: steps[pair] for key, pair in keys.items()}, pace)
    found = {keys[key]: values for key, values in seconds.items()}
    numbers = []
    for (network, name), values in found.items():
        of = {**network.of, "size": size, "batch": batch_of(size), "step": name}
        numbers.append(median("seconds", values, of, "s"))
        for other in networks:
            if network.f > 1 == other.f and (other.attention == network.attention or network.piece == "placement"):
                if (pair := (other, name)) in found:
                    numbers.append(median("ratio to f = 1", found[pair] / values, of))
                if name == "training step":
                    with_encoder = found[pair] / (values + found[network, "encoding"])
                    numbers.append(median("ratio to f = 1", with_encoder, {**of, "step": "training step, encoding"}))
    return numbers


# --- Memory ---


def resident(name: str) -> int:
    """Bytes of this process, as Linux tells: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status does not tell {name}")


def peak(network: Network, size: int) -> None:
    """Print the peak of this process above what it holds before its first training step, in bytes."""
    unet = network.unet(size)
    step = trained(unet, given(unet, batch_of(size), size // network.f))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free, but not given back, would be used again unseen
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = resident("VmRSS")
    for _ in range(2):
        step()
    print(json.dumps(resident("VmHWM") - before))


def peaks(networks: Sequence[Network], size: int) -> list[Measurement]:
    """The peak of every network, each in a new process."""
    numbers = []
    for i, network in enumerate((*ALIKE, *PLACEMENT)):
        if network in networks:
            command = [sys.executable, __file__, "--peak-of", str(i), "--size", str(size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            of = {**network.of, "piece": "memory", "network": network.piece, "size": size}
            numbers.append(Measurement("peak above the start", json.loads(done.stdout) / 2**20, of=of, unit="MiB"))
            print(numbers[-1], flush=True)
    return numbers


# --- Large images ---


def mosaic(images: Tensor, across: int) -> Tensor:
    """across² images as one, (1, 3, across · h, across · w)."""
    rows = [torch.cat(list(images[i * across : (i + 1) * across]), -1) for i in range(across)]
    return torch.cat(rows, -2)[None]


def faces_in(images: Tensor) -> Tensor:
    """The other way round, for images (b, 3, h, w): their parts of 64²."""
    return images.unfold(2, 64, 64).unfold(3, 64, 64).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 64, 64)


def large(sides: Sequence[int], steps: int) -> list[Measurement]:
    """One model of 64² on mosaics of faces: seconds of drawing one, and how near each face is to the true one."""
    model = LatentDiffusion.from_pretrained("toy-super-resolution")
    data = open_dataset("toy-faces", None, "test", 64, keys=("image", "low_resolution"))
    faces = collate([data[i] for i in range((max(sides) // 64) ** 2)])
    numbers: list[Measurement] = []
    alone = None
    for side in sides:
        across, found, seconds = side // 64, [], []
        for some, small in zip(faces["image"].split(across**2), faces["low_resolution"].split(across**2)):
            began = time.perf_counter()
            drawn = upscale(model, mosaic(small, across), steps=steps, seed=0)
            seconds.append(time.perf_counter() - began)
            found.append(psnr(faces_in(drawn), some))
        decibels, of = torch.cat(found), {"piece": "large", "size": side, "steps": steps}
        alone = decibels if alone is None else alone
        numbers.append(Measurement("seconds", float(np.median(seconds)), of=of, unit="s", n=len(seconds)))
        for name, values in (("PSNR of a face", decibels), ("PSNR lost in the mosaic", alone - decibels)):
            error = (values.var() / len(values)).sqrt().item() if len(values) > 1 else 0.0
            numbers.append(Measurement.mean(name, values.mean().item(), error, len(values), of=of, unit="dB"))
        print(*numbers[-3:], sep="\n", flush=True)
    return numbers


# --- All of it ---

PIECES = ("alike", "placement", "memory", "large")


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """What the command is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PIECES, default=PIECES, help="pieces")
    parser.add_argument("--sizes", nargs="+", type=int, default=(64, 256), help="sides of images")
    parser.add_argument("--sides", nargs="+", type=int, default=(64, 128, 256, 512, 1024), help="of large")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM, in large")
    parser.add_argument("--smallest", action="store_true", help="as little as runs: a test")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the numbers")
    parser.add_argument("--peak-of", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=256, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def measure(piece: str, given: argparse.Namespace) -> list[Measurement]:
    """The numbers of a piece."""
    pace = QUICK if given.smallest else Pace(seconds=240, least=5, unit=0.0, warmup=1)
    networks = {"alike": ALIKE, "placement": PLACEMENT}
    if piece == "large":
        return large(given.sides, given.steps)
    if piece == "memory":
        return [m for size in given.sizes for m in peaks((*ALIKE, *PLACEMENT), size)]
    numbers = [m for size in given.sizes for network in networks[piece] for m in costs(network, size)]
    return numbers + [m for size in given.sizes for m in timed(networks[piece], size, pace)]


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and keep the pieces that were measured before in the same setting."""
    given = arguments(words)
    with settled(1):
        if given.peak_of is not None:
            peak((*ALIKE, *PLACEMENT)[given.peak_of], given.size)
            return 0
        for piece in given.only:
            numbers = measure(piece, given)
            print(*numbers, sep="\n", flush=True)
            size = sum(p.numel() for p in PLACEMENT[1].first_stage(64).parameters())
            command = "python benchmarks/efficiency.py"
            new = measured_here(TITLE, numbers, ABOUT.format(stage=f"{size / 1e6:.1f}M"), seed=0, command=command)
            old = load_measurements(given.results) if given.results.exists() else None
            merged(old, new).save(given.results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
