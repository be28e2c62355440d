"""Super-resolution by plain regression, with a network of the size of a diffusion recipe's, trained as that is.

    python benchmarks/regression.py toy-super-resolution runs/toy-regression
    python benchmarks/regression.py celeba64-super-resolution runs/celeba64-regression

The UNet of the recipe reads the low-resolution image and says, for each of its pixels, the 4 × 4 pixels that are to
be added to the bicubic enlargement. Its loss is the squared error of pixels. Batches, steps, learning rate and average
are those of the recipe; it keeps the weights that are best on held-out images, since with few images it overfits early.
Writes RUN/network.safetensors, and goes on after an interruption with --resume. Data lie where settings.ini says.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_edu.data.cache import SampleCache
from ldm_edu.data.degradation import upsample
from ldm_edu.denoiser.unet import UNet
from ldm_edu.evaluation.metrics import psnr
from ldm_edu.files import load_tensors, parse_json, save_tensors
from ldm_edu.settings import load_settings
from ldm_edu.training.recipes import Recipe, find_recipe, recipe_from_dict
from ldm_edu.training.resume import run_stage
from ldm_edu.training.run import Run, RunOptions, open_run, settings_of_the_run
from ldm_edu.training.stages import ImageStage
from ldm_edu.training.tasks import UNET

FACTOR, FILE = 4, "network.safetensors"


class Regression(nn.Module):
    """Low-resolution images (b, 3, h, w) to images (b, 3, 4 h, 4 w), by the UNet of a diffusion recipe."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        plan = {name: getattr(recipe.diffusion, name) for name in UNET}
        self.unet = UNet(in_channels=3, out_channels=3 * FACTOR**2, **plan)

    def forward(self, low: Tensor) -> Tensor:
        """The bicubic enlargement, and what the network adds to it."""
        t = torch.zeros(len(low), dtype=torch.long, device=low.device)
        return upsample(low, FACTOR) + F.pixel_shuffle(self.unet(low, t), FACTOR)


class RegressionTask(Regression):
    """The same with its loss."""

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared error of pixels."""
        loss = (super().forward(batch["low_resolution"]) - batch["image"]).square().mean()
        return loss, {"mse": loss.detach()}


class RegressionStage(ImageStage):
    """The training of a `Regression`, on the batches of a diffusion recipe."""

    def __init__(self, recipe: Recipe, run: Run):
        torch.manual_seed(recipe.seed + 1)
        super().__init__("regression", RegressionTask(recipe), run, recipe, recipe.diffusion.training, 1)

    def samples(
        self, dataset: SampleCache, step: int, indices: Sequence[int], repeats: Sequence[int] | None = None
    ) -> dict[str, Any]:
        return {"image": dataset.images(indices), **dataset.batch(indices, ["low_resolution"])}

    def validate(self, task: nn.Module) -> dict[str, float]:
        batch = self.held_out_batch()
        enlarged = Regression.forward(task, batch["low_resolution"])  # type: ignore[arg-type]
        scores = psnr(enlarged.float().clamp(-1, 1), batch["image"].float())
        return {"held_out": task(batch)[0].item(), "psnr": scores.mean().item()}

    def sample(self, task: nn.Module) -> Tensor:
        return Regression.forward(task, self.held_out_batch()["low_resolution"][:8])[0]  # type: ignore[arg-type]


def load_regression(folder: Path) -> Regression:
    """The network that was trained in a folder."""
    recipe = recipe_from_dict(parse_json((folder / "recipe.json").read_text(encoding="utf-8")))
    assert isinstance(recipe, Recipe)
    found = Regression(recipe)
    found.load_state_dict(load_tensors(folder / FILE))
    return found.eval()


def main() -> None:
    """Train one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe whose condition is a low-resolution image")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    parser.add_argument("--cache-dir", type=Path, help="folder for prepared images")
    parser.add_argument("--steps", type=int, help="fewer steps, to try it")
    given, settings = parser.parse_args(), load_settings()
    recipe = find_recipe(given.recipe)
    assert isinstance(recipe, Recipe)
    if given.steps:
        recipe = replace(recipe, diffusion=recipe.diffusion.shortened(given.steps))
    training = replace(recipe.diffusion.training, keep="best")
    recipe = replace(recipe, diffusion=replace(recipe.diffusion, training=training))
    options = RunOptions(
        data_dir=settings.data_dir,
        weights_dir=settings.weights_dir,
        cache_dir=given.cache_dir,
        device=settings.device,
        resume=given.resume,
        sample_every=0,
        log_fn=lambda line: print(line, flush=True),
    )
    run = open_run(recipe, given.run, options)
    try:
        with settings_of_the_run(run.accelerator):
            average, _ = run_stage(run, RegressionStage(recipe, run))
            save_tensors({name: v.cpu() for name, v in average.state_dict().items()}, run.folder / FILE)
    finally:
        run.close()


if __name__ == "__main__":
    main()
