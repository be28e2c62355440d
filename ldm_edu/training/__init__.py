"""Recipes, the loop that trains them, and what a run keeps in its folder."""

from ldm_edu.training.costs import Costs, recipe_costs
from ldm_edu.training.dispatch import train
from ldm_edu.training.loop import EMA, Stage, StepResult, batch_indices, learning_rate, optimise, step_randomness
from ldm_edu.training.recipes import (
    RECIPES,
    AdversarialRecipe,
    AutoencoderRecipe,
    ConditionerRecipe,
    DiffusionRecipe,
    FeaturesRecipe,
    FirstStageRecipe,
    ReaderRecipe,
    Recipe,
    Training,
    find_recipe,
)
from ldm_edu.training.overrides import with_overrides
from ldm_edu.training import paper_recipes  # noqa: F401  puts the paper's recipes among the others
from ldm_edu.training.resume import run_stage
from ldm_edu.training.run import Run, RunOptions, open_run
from ldm_edu.training.stages import DiffusionStage, FirstStageStage
from ldm_edu.training.state import State
from ldm_edu.training.text import TextStage

__all__ = [
    "EMA",
    "RECIPES",
    "AdversarialRecipe",
    "AutoencoderRecipe",
    "ConditionerRecipe",
    "Costs",
    "DiffusionRecipe",
    "DiffusionStage",
    "FeaturesRecipe",
    "FirstStageRecipe",
    "FirstStageStage",
    "ReaderRecipe",
    "Recipe",
    "Run",
    "RunOptions",
    "Stage",
    "State",
    "StepResult",
    "TextStage",
    "Training",
    "batch_indices",
    "find_recipe",
    "learning_rate",
    "open_run",
    "optimise",
    "recipe_costs",
    "run_stage",
    "step_randomness",
    "train",
    "with_overrides",
]
