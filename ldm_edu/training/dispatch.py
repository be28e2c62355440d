"""Train whatever a recipe is for."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_edu.errors import LDMError
from ldm_edu.training.data import check_fit
from ldm_edu.training.judge import FeaturesStage, ReaderStage
from ldm_edu.training.recipes import AnyRecipe, AutoencoderRecipe, FeaturesRecipe, ReaderRecipe, Recipe, recipe_to_dict
from ldm_edu.training.resume import run_stage
from ldm_edu.training.run import RunOptions, open_run
from ldm_edu.training.stages import DiffusionStage, FirstStageStage

__all__ = ["train"]

STAGES: dict[type, tuple[Any, ...]] = {  # what is trained for each kind of recipe, one after the other
    Recipe: (FirstStageStage, DiffusionStage),
    AutoencoderRecipe: (FirstStageStage,),
    ReaderRecipe: (ReaderStage,),
    FeaturesRecipe: (FeaturesStage,),
}


def train(
    recipe: AnyRecipe,
    folder: str | Path,  # of the run; made if it is not there
    options: RunOptions = RunOptions(),
) -> nn.Module:
    """Train whatever a recipe is for: a latent diffusion model, a first stage, the judge, or the features.

    The result is also saved to `folder`/model. LDMError, before anything is written, where recipe, options, data and
    folder do not fit each other.
    """
    if not isinstance(recipe, AnyRecipe):
        raise LDMError(f"recipe should be a recipe, such as find_recipe('toy-demo'), not {recipe!r}")
    if isinstance(recipe, Recipe | AutoencoderRecipe):
        check_fit(recipe, options)
    run = open_run(recipe, folder, options)

    model, history = None, {}
    for kind in STAGES[type(recipe)]:
        stage = kind(recipe, run, model)
        average, history[stage.name] = run_stage(run, stage)
        model = stage.finish(average)
        history[stage.name] |= stage.about
    if len(history) == 1:
        (history,) = history.values()

    done: Any = model  # all of them have a provenance
    done.provenance = {"recipe": recipe_to_dict(recipe), "torch": torch.__version__} | history
    done.eval().float()
    if run.is_main:
        done.save_pretrained(run.folder / "model")
    run.accelerator.end_training()
    return done
