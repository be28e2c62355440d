"""Inpainting beside the mean colour and RePaint: how far the content of the hole is from the true one, by kind of hole.

    python benchmarks/inpainting.py inpainting toy-inpainting --unconditional toy-faces runs/toy-unconditional/model
    python benchmarks/inpainting.py celeba_inpainting runs/celeba64-inpainting/model

The images are held-out ones of the model's data set, the same holes and the same noise for every method. The scores are
those of the hole alone; the excess is that of whole images, with what is known in its place. RePaint uses a model
that knows nothing of holes: --levels noise levels, each --resamplings times. Writes ldm_edu/results/NAME.json. Data
and weights lie where settings.ini says.
"""

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from restoration import CHUNK, RESULTS, Scores, backbones, bytes_of, gain, samples
from torch import Tensor

from ldm_edu import LatentDiffusion
from ldm_edu.applications import inpaint
from ldm_edu.data.degradation import MASKS, mask_to_latent, random_mask
from ldm_edu.diffusion.inpainting import repaint
from ldm_edu.diffusion.sampling import SeededNoise, last
from ldm_edu.evaluation.agreement import image_agreement, mean_fill
from ldm_edu.evaluation.metrics import psnr
from ldm_edu.evaluation.report import TOY, recipe_dataset
from ldm_edu.measurements import Measurement, measured_here
from ldm_edu.settings import load_settings

STREAM = 64  # of the random numbers that make the holes
WAYS, VARIED = 4, 32  # fillings of a hole, images whose holes are filled in several ways


def holes(kind: str, n: int) -> Tensor:
    """A hole for each image, (n, 1, 64, 64)."""
    return random_mask(64, [np.random.default_rng([STREAM, i]) for i in range(n)], (kind,)) == 1


@torch.no_grad()
def repainted(model: LatentDiffusion, images: Tensor, hole: Tensor, levels: int, resamplings: int) -> Tensor:
    """The images with their holes filled by a model that knows nothing of holes; what is known is kept."""
    found = []
    for i, (some, hidden) in enumerate(zip(images.split(CHUNK), hole.split(CHUNK))):
        known = model.first_stage.encode(mean_fill(some, hidden))
        missing = mask_to_latent(hidden.float(), model.first_stage.f) == 1
        noise = SeededNoise(range(CHUNK * i, CHUNK * i + len(some)))
        x_T = noise.noise(model.latent_shape)
        walk = repaint(model.unet, x_T, model.schedule, known, missing, levels, resamplings=resamplings, noise=noise)
        found.append(torch.where(hidden, model.first_stage.decode(last(walk)), some))
    return bytes_of(torch.cat(found))


def filled(model: LatentDiffusion, images: Tensor, hole: Tensor, steps: int) -> Tensor:
    """The images with their holes filled by a model that reads them."""
    pairs = enumerate(zip(images.split(CHUNK), hole.split(CHUNK)))
    return bytes_of(torch.cat([inpaint(model, x, hidden, steps=steps, seed=CHUNK * i) for i, (x, hidden) in pairs]))


@torch.no_grad()
def before_pasting(model: LatentDiffusion, images: Tensor, hole: Tensor, steps: int) -> Tensor:
    """PSNR of the known pixels, as the decoder gives them, before the true ones take their place; (n,)."""
    drawn = model.sample({"image": images, "mask": hole.float()}, steps=steps, scale=1.0, batch_size=CHUNK)
    known = torch.where(hole, images, drawn)  # wrong nowhere but where it is known
    share = (~hole).double().mean((1, 2, 3))
    return psnr(bytes_of(known), images).double() + 10 * share.log10()


def variety(model: LatentDiffusion, scores: Scores, hole: Tensor, steps: int, of: dict[str, Any]) -> Measurement:
    """How far apart several fillings of one hole are, in it."""
    images = scores.real[: min(VARIED, len(scores.real))]
    hidden = hole[: len(images)]
    ways = [bytes_of(inpaint(model, images, hidden, steps=steps, seed=1000 * (k + 1))) for k in range(WAYS)]
    apart = [image_agreement(a, b, scores.distance, hidden)[scores.lpips] for a, b in combinations(ways, 2)]
    each = torch.stack(apart).mean(0).double()
    error = (each.std() / len(each) ** 0.5).item()
    return Measurement.mean(f"{scores.lpips} between fillings", each.mean().item(), error, len(each), of=of)


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the results")
    parser.add_argument("model", help="a shipped one, or a folder")
    parser.add_argument("--unconditional", nargs="*", default=[], help="models that know nothing of holes, for RePaint")
    parser.add_argument("--levels", type=int, default=25, help="noise levels of RePaint")
    parser.add_argument("--resamplings", type=int, nargs="+", default=[1, 10], help="of RePaint, at each level")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of the model")
    parser.add_argument("--n", type=int, default=512, help="held-out images")
    parser.add_argument("--repainted", type=int, default=128, help="the first of them, for RePaint, which is slow")
    parser.add_argument("--sets", type=int, default=4, help="parts of them, for the interval of the excess")
    return parser.parse_args()


def main() -> None:
    """Measure, and write the results."""
    given, settings = arguments(), load_settings()
    torch.set_num_threads(1)
    model = LatentDiffusion.from_pretrained(given.model)
    others = {name: LatentDiffusion.from_pretrained(name) for name in given.unconditional}
    dataset, toy = recipe_dataset(model), recipe_dataset(model) in TOY
    splits = ("test",) if toy else ("validation", "test")
    real = samples(dataset, settings.data_dir, splits, given.n, ("image",))["image"]
    n = len(real)
    further = samples(dataset, settings.data_dir, ("test" if toy else "train",), 2 * n, ("image",))["image"][-n:]
    scores = Scores.of(real, further, given.sets, *backbones(dataset), settings.weights_dir)
    numbers: list[Measurement] = []

    def look(images: Tensor, where: Tensor, **of: Any) -> dict[str, Tensor]:
        each = scores.of_images(images, where)
        new = list(scores.told(each, scores.excess(images), of))
        numbers.extend(new)
        print(*new, sep="\n", flush=True)
        return each

    few = real[: given.repainted]
    for kind in MASKS:
        hole = holes(kind, n)
        share = hole.double().mean((1, 2, 3))
        numbers.append(Measurement("missing", 100 * share.mean().item(), {"hole": kind}, unit="%", n=n))
        look(mean_fill(real, hole), hole, hole=kind, method="mean colour")
        with torch.no_grad():
            back = torch.cat([model.first_stage.reconstruct(some) for some in real.split(CHUNK)])
        look(torch.where(hole, bytes_of(back), real), hole, hole=kind, method="first stage alone")
        look(filled(model, real, hole, given.steps), hole, hole=kind, method="model that reads the hole")
        rivals: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        for name, other in others.items():
            for resamplings in given.resamplings:
                of = {"method": "RePaint", "model": Path(name).parent.name if "/" in name else name}
                images = repainted(other, few, hole[: len(few)], given.levels, resamplings)
                of |= {"hole": kind, "resamplings": resamplings}
                rivals.append((of, look(images, hole, **of)))
        if others:  # on the same images
            drawn = filled(model, few, hole[: len(few)], given.steps)
            ours = look(drawn, hole, hole=kind, method="the same, fewer images")
            for of, theirs in rivals:
                numbers += [gain(f"{score}, RePaint less model", theirs[score], ours[score], of) for score in ours]
        known = before_pasting(model, few, hole[: len(few)], given.steps)
        error = (known.std() / len(known) ** 0.5).item()
        of = {"hole": kind, "method": "model that reads the hole"}
        name = "PSNR of known pixels before pasting"
        numbers.append(Measurement.mean(name, known.mean().item(), error, len(known), of=of, unit="dB"))
        numbers.append(variety(model, scores, hole, given.steps, of))
        print(*numbers[-2:], sep="\n", flush=True)
    about = (
        f"{n} held-out images of {dataset}, as bytes, {given.steps} DDIM steps; RePaint on {len(few)} of them, "
        f"{given.levels} levels. PSNR, SSIM and {scores.lpips} of the hole: means over images, with 1.96 standard "
        f"errors. The Fréchet excess of whole images: over {given.sets} parts, Student's t. Between fillings: "
        f"{WAYS} of each of {min(VARIED, n)} holes, all pairs."
    )
    title = f"{model.provenance['recipe']['name']}: filled holes beside the true content"
    measured_here(title, numbers, about, seed=0).save(RESULTS / f"{given.name}.json")


if __name__ == "__main__":
    main()
