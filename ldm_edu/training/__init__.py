"""Recipes, the loop that trains them, and what a run keeps in its folder."""

from ldm_edu.training.dispatch import train
from ldm_edu.training.loop import EMA, batch_indices, learning_rate, optimise, step_randomness
from ldm_edu.training.recipes import (
    RECIPES,
    AdversarialRecipe,
    AutoencoderRecipe,
    DiffusionRecipe,
    FeaturesRecipe,
    FirstStageRecipe,
    ReaderRecipe,
    Recipe,
    TextRecipe,
    Training,
    find_recipe,
)
from ldm_edu.training.run import Run, open_run
from ldm_edu.training.stages import run_stage, train_autoencoder
from ldm_edu.training.state import State

__all__ = [
    "EMA",
    "RECIPES",
    "AdversarialRecipe",
    "AutoencoderRecipe",
    "DiffusionRecipe",
    "FeaturesRecipe",
    "FirstStageRecipe",
    "ReaderRecipe",
    "Recipe",
    "Run",
    "State",
    "TextRecipe",
    "Training",
    "batch_indices",
    "find_recipe",
    "learning_rate",
    "open_run",
    "optimise",
    "run_stage",
    "step_randomness",
    "train",
    "train_autoencoder",
]
