"""Train whatever a recipe is for."""

from pathlib import Path
from typing import Any

from torch import nn

from ldm_edu.errors import LDMError
from ldm_edu.training.judge import train_features, train_reader
from ldm_edu.training.recipes import AnyRecipe, AutoencoderRecipe, FeaturesRecipe, ReaderRecipe, Recipe
from ldm_edu.training.stages import train_autoencoder, train_latent_diffusion

__all__ = ["train"]


def train(
    recipe: AnyRecipe,
    folder: str | Path,  # of the run; made if it is not there
    data_dir: str | Path | None = None,  # where the data set lies; toy data needs none
    **how: Any,  # cache_dir, weights_dir, device, precision, resume, every, …: see `train_autoencoder` and `open_run`
) -> nn.Module:
    "Train whatever a recipe is for: both stages of a diffusion model, a first stage, the judge, or the features."
    if isinstance(recipe, Recipe):
        return train_latent_diffusion(recipe, folder, data_dir, **how)
    if isinstance(recipe, AutoencoderRecipe):
        return train_autoencoder(recipe, folder, data_dir, **how)

    if not isinstance(recipe, ReaderRecipe | FeaturesRecipe):
        raise LDMError(f"recipe should be a recipe, such as find_recipe('toy-demo'), not {recipe!r}")

    # The judge and the features draw their own data and use no LPIPS.
    how.pop("weights_dir", None)
    if isinstance(recipe, ReaderRecipe):
        return train_reader(recipe, folder, **how)
    return train_features(recipe, folder, **how)
