"""Train whatever a recipe is for."""

from pathlib import Path
from torch import nn
from typing import Any
from ldm_edu.training.judge import train_features, train_reader
from ldm_edu.training.recipes import AnyRecipe, AutoencoderRecipe, FeaturesRecipe, ReaderRecipe, Recipe
from ldm_edu.training.stages import train_latent_diffusion, train_autoencoder

def train(recipe: AnyRecipe, folder: str | Path, data_dir: str | Path | None = None, **how: Any) -> nn.Module:
    "Train whatever a recipe is for; `how` is what the function for it takes."
    if isinstance(recipe, Recipe | AutoencoderRecipe):
        return (train_latent_diffusion if isinstance(recipe, Recipe) else train_autoencoder)(recipe, folder, data_dir, **how)
    how.pop("weights_dir", None)  # these two have no use for it
    return {ReaderRecipe: train_reader, FeaturesRecipe: train_features}[type(recipe)](recipe, folder, **how)
