"""Train whatever a recipe is for."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ldm_edu.checks import check_count, shown
from ldm_edu.errors import LDMError
from ldm_edu.files import brief, parse_json
from ldm_edu.first_stage.autoencoder import FirstStage
from ldm_edu.first_stage.quantization import load_first_stage
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.training.data import check_fit
from ldm_edu.training.judge import FeaturesStage, FeaturesTask, ReaderStage
from ldm_edu.training.recipes import AnyRecipe, AutoencoderRecipe, FeaturesRecipe, ReaderRecipe, Recipe
from ldm_edu.training.recipes import Trained, Training, recipe_from_dict, recipe_to_dict
from ldm_edu.training.resume import run_stage
from ldm_edu.training.run import Run, RunOptions, open_run, settings_of_the_run
from ldm_edu.training.stages import DiffusionStage, FirstStageStage
from ldm_edu.training.tasks import build_conditioner, build_first_stage, perceptual_distance, pretrained_unet
from ldm_edu.training.text import TextStage, check_reader

__all__ = ["train", "train_briefly"]

STAGES: dict[type, tuple[Any, ...]] = {  # what is trained for each kind of recipe, one after the other
    Recipe: (FirstStageStage, TextStage, DiffusionStage),
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
        raise LDMError(f"recipe should be a recipe, such as find_recipe('toy-demo'), not {shown(recipe)}")
    if not isinstance(options, RunOptions):
        raise LDMError(f"options should be RunOptions(...), not {shown(options)}")
    recipe = recipe_from_dict(recipe_to_dict(recipe))  # refuses fields of other types
    check_parts(recipe, options)
    if isinstance(recipe, Recipe | AutoencoderRecipe):
        check_fit(recipe, options)
    run = open_run(recipe, folder, options)
    try:
        with settings_of_the_run(run.accelerator):
            return train_stages(recipe, run)
    except RuntimeError as error:
        if run.accelerator.num_processes == 1 or not LOST.search(str(error)):
            raise
        raise LDMError(f"another process of this run has ended ({brief(error)}): {AGAIN}") from error
    finally:
        run.close()


P = TypeVar("P", bound=Training | Trained)


def _in_brief(part: P, images: int) -> P:
    "The same with at most so many training images in each stage, and a tenth as many held-out ones."
    if isinstance(part, Trained):
        return replace(part, **{name: _in_brief(each, images) for name, each in part.trained_parts().items()})
    return replace(part, images=min(images, part.images or images), held_out=min(part.held_out, max(1, images // 10)))


def train_briefly(
    recipe: Recipe,
    steps: int,  # at most so many in each stage
    images: int,  # at most so many training images in each stage, and a tenth as many held-out ones
    options: RunOptions = RunOptions(),  # `every` is a twelfth of the steps, whatever stands there
) -> tuple[LatentDiffusion, list[dict[str, Any]]]:
    "A recipe within a small budget, in a temporary folder: the model, on the CPU, and the log of its diffusion stage."
    steps, images = check_count("steps", steps), check_count("images", images)
    short = _in_brief(recipe, images).shortened(steps)
    training = replace(short.diffusion.training, warmup=min(short.diffusion.training.warmup, 30))
    short = replace(short, diffusion=replace(short.diffusion, training=training))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        model = train(short, run, replace(options, every=max(1, steps // 12), sample_every=0))
        lines = [parse_json(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return cast(LatentDiffusion, model.to("cpu")), [line for line in lines if line["stage"] == "diffusion"]


# What torch says where a process has lost another one, and what can be done then.
LOST = re.compile("closed by peer|reset by peer|Broken pipe|Timed out waiting", re.IGNORECASE)
AGAIN = "start all of them again, with --resume (in Python resume=True), and the run goes on from its last checkpoint"


def check_parts(recipe: AnyRecipe, options: RunOptions) -> None:
    "`LDMError` where a network that a training begins with cannot be had: that is known before data are prepared."
    if isinstance(recipe, Recipe) and not options.goes_on:  # a run that goes on has its weights
        pretrained_unet(recipe)
    if isinstance(recipe, Recipe) and recipe.pretrained is not None:
        saved_first_stage(recipe)
    elif isinstance(recipe, Recipe | AutoencoderRecipe):
        perceptual_distance(recipe.first_stage.perceptual, options.weights_dir)
    if isinstance(recipe, Recipe | AutoencoderRecipe):
        if isinstance(recipe, Recipe) and recipe.text is not None:
            check_reader(recipe, build_conditioner(recipe.diffusion))
    elif isinstance(recipe, ReaderRecipe):
        for name in recipe.first_stages:
            load_first_stage(name)
    else:
        with torch.device("meta"):
            FeaturesTask(recipe)


def saved_first_stage(recipe: Recipe) -> FirstStage:
    "The saved first stage that a recipe names; `LDMError` where it is not what the recipe describes."
    found = load_first_stage(cast(str, recipe.pretrained))
    with torch.device("meta"):
        described = build_first_stage(recipe.first_stage)
    if type(found) is not type(described):
        kinds = f"is a {type(found).__name__}, but first_stage describes a {type(described).__name__}"
        raise LDMError(f"pretrained: '{recipe.pretrained}' {kinds}")
    for name, here in described.config.items():
        if name not in described.follow and here != (there := found.config[name]):  # those are known after training
            raise LDMError(f"pretrained: '{recipe.pretrained}' has {name}={there}, but first_stage says {here}")
    return found.requires_grad_(False)


def train_stages(recipe: AnyRecipe, run: Run) -> nn.Module:
    "Train the stages of a recipe, one after the other, and save the result."
    made: dict[str, nn.Module] = {}
    history: dict[str, Any] = {}
    if isinstance(recipe, Recipe) and recipe.pretrained is not None:
        made["first_stage"] = saved_first_stage(recipe).to(run.accelerator.device)
    elif isinstance(recipe, Recipe) and recipe.first_stage.training is None:
        made["first_stage"] = build_first_stage(recipe.first_stage)
    for kind in STAGES[type(recipe)]:
        if kind is TextStage and cast(Recipe, recipe).text is None:
            continue
        if kind is FirstStageStage and "first_stage" in made:
            continue
        stage = cast(Any, kind)(recipe, run, made)
        average, history[stage.name] = run_stage(run, stage)
        made[stage.name] = stage.finish(average)
        history[stage.name] |= stage.about
    if len(STAGES[type(recipe)]) == 1:
        (history,) = history.values()

    *_, done = cast(dict[str, Any], made).values()  # all of them have a provenance
    done.provenance = {"recipe": recipe_to_dict(recipe), "torch": torch.__version__} | history
    done.eval().float()
    if run.is_main:
        done.save_pretrained(run.folder / "model")
    run.accelerator.end_training()
    return done
