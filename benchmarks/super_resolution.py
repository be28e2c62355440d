"""Super-resolution beside bicubic enlargement and plain regression: fidelity, look, steps, inputs.

    python benchmarks/super_resolution.py super_resolution toy-super-resolution --regression runs/toy-regression \\
        --features vgg16
    python benchmarks/super_resolution.py degraded toy-super-resolution --others-trained runs/toy-blind/model \\
        --inputs degraded low_resolution --steps 50
    python benchmarks/super_resolution.py celeba_super_resolution runs/celeba64-super-resolution/model \\
        --regression runs/celeba64-regression --steps 1 4 10 50

The images are held-out ones of the model's data set; the same noise is used for every number of steps. Writes
ldm_edu/results/NAME.json, and for drawn images with a regression also NAME.png: its images of the first eight.
LPIPS takes a network that is not in the loss of the first stage. Data and weights lie where settings.ini says.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from regression import load_regression
from restoration import CHUNK, RESULTS, Scores, backbones, bytes_of, gain, samples
from torch import Tensor

from ldm_edu import LatentDiffusion
from ldm_edu.applications import upscale
from ldm_edu.data.degradation import upsample
from ldm_edu.display import grid, save
from ldm_edu.evaluation.report import TOY, recipe_dataset
from ldm_edu.first_stage.autoencoder import FirstStage
from ldm_edu.measurements import Measurement, measured_here
from ldm_edu.settings import load_settings

FACTOR, SHOWN = 4, 8


def drawn(model: LatentDiffusion, small: Tensor, steps: int) -> Tensor:
    """The model's images for small ones."""
    parts = [upscale(model, some, steps=steps, seed=CHUNK * i) for i, some in enumerate(small.split(CHUNK))]
    return bytes_of(torch.cat(parts))


@torch.no_grad()
def regressed(folder: Path, small: Tensor) -> Tensor:
    """The images of a network that was trained by plain regression."""
    network = load_regression(folder)
    return bytes_of(torch.cat([network(some) for some in small.split(CHUNK)]))


@torch.no_grad()
def reconstructed(stage: FirstStage, real: Tensor) -> Tensor:
    """The images through the first stage."""
    return bytes_of(torch.cat([stage.reconstruct(some) for some in real.split(CHUNK)]))


def differences(
    more: tuple[dict[str, Tensor], list[float]],
    less: tuple[dict[str, Tensor], list[float]],
    of: dict[str, Any],
    size: int,
) -> list[Measurement]:
    """One set's scores less another's, image by image and part by part."""
    told = [gain(f"{score}, difference", more[0][score], less[0][score], of) for score in more[0]]
    apart = [a - b for a, b in zip(more[1], less[1])]
    return [*told, Measurement.repeated("Fréchet excess, difference", apart, of=of, n=size)]


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the results")
    parser.add_argument("model", help="a shipped one, or a folder")
    parser.add_argument("--others-trained", nargs="*", default=[], help="further models, to be compared")
    parser.add_argument("--regression", type=Path, help="a folder that regression.py wrote")
    parser.add_argument("--inputs", nargs="+", default=["low_resolution"], help="keys of the data set")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 10, 25, 50, 100], help="denoising steps")
    parser.add_argument("--n", type=int, default=512, help="held-out images")
    parser.add_argument("--features", help="of the Fréchet excess; default: by the data set")
    parser.add_argument("--sets", type=int, default=4, help="parts of them, for the interval of the excess")
    return parser.parse_args()


def main() -> None:
    """Measure, and write the results."""
    given, settings = arguments(), load_settings()
    torch.set_num_threads(1)
    models = {name: LatentDiffusion.from_pretrained(name) for name in (given.model, *given.others_trained)}
    model = models[given.model]
    dataset, toy = recipe_dataset(model), recipe_dataset(model) in TOY
    batch = samples(
        dataset, settings.data_dir, ("test",) if toy else ("validation", "test"), given.n, ("image", *given.inputs)
    )
    real, n = batch["image"], len(batch["image"])
    others = samples(dataset, settings.data_dir, ("test" if toy else "train",), 2 * n, ("image",))["image"][-n:]
    net, features = backbones(dataset)
    scores = Scores.of(real, others, given.sets, net, given.features or features, settings.weights_dir)
    numbers: list[Measurement] = []
    regression: tuple[dict[str, Tensor], list[float]] | None = None
    enlarged: Tensor | None = None

    def look(images: Tensor, **of: Any) -> tuple[dict[str, Tensor], list[float]]:
        each, excess = scores.of_images(images), scores.excess(images)
        new = list(scores.told(each, excess, of))
        numbers.extend(new)
        print(*new, sep="\n", flush=True)
        return each, excess

    look(reconstructed(model.first_stage, real), set="first stage alone")
    for key in given.inputs:
        small, of = batch[key], {"input": key} if len(given.inputs) > 1 else {}
        look(bytes_of(upsample(small, FACTOR)), set="bicubic", **of)
        if given.regression:
            enlarged = regressed(given.regression, small)
            regression = look(enlarged, set="regression", **of)
        for name, each in models.items():
            trained = {"model": each.provenance["recipe"]["name"]} if len(models) > 1 else {}
            for steps in given.steps:
                ours = look(drawn(each, small, steps), set="drawn", steps=steps, **trained, **of)
                if regression:
                    between = {"set": "regression", "against": "drawn", "steps": steps, **trained, **of}
                    numbers += differences(regression, ours, between, len(scores.others[0]))
    if enlarged is not None and toy:
        save(grid(enlarged[:SHOWN], columns=SHOWN, pad=0), RESULTS / f"{given.name}.png")
    about = (
        f"{n} held-out images of {dataset}, as bytes. PSNR, SSIM and {scores.lpips}: means over images, with 1.96 "
        f"standard errors. The Fréchet excess: {scores.extractor.name} features, over {given.sets} parts of them, "
        f"Student's t."
    )
    title = f"{model.provenance['recipe']['name']}: enlarged images beside the true ones"
    measured_here(title, numbers, about, seed=0).save(RESULTS / f"{given.name}.json")


if __name__ == "__main__":
    main()
