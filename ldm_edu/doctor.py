"""Ten usual faults of a training run or of a model: what each check measures, and for a fault its cause and remedy."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ldm_edu.checkpoints import find_checkpoint, plainly, weights_checksum
from ldm_edu.checks import MOST_SEED, check_count, shown
from ldm_edu.conditioning.condition import Condition, Conditioner, MergedConditioner
from ldm_edu.data.batches import SampleDataset, collate
from ldm_edu.devices import pick_device
from ldm_edu.diffusion.sampling import SAMPLERS, SeededNoise, ddim, last
from ldm_edu.diffusion.schedule import NoiseSchedule
from ldm_edu.errors import CheckpointError, DataError, LDMError
from ldm_edu.files import brief, load_json, load_notes, load_tensors, place
from ldm_edu.first_stage.autoencoder import AutoencoderKL, DiagonalGaussian, FirstStage
from ldm_edu.first_stage.quantization import Quantized, load_first_stage
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.training.data import open_split
from ldm_edu.training.loop import learning_rate
from ldm_edu.training.recipes import AutoencoderRecipe, Recipe, Training, recipe_from_dict
from ldm_edu.training.run import RunOptions, extended_plans, kept_extensions, kept_recipe, stage_plans
from ldm_edu.training.state import check_fit
from ldm_edu.training.tasks import (
    DiffusionTask,
    FirstStageTask,
    begin_with,
    build_conditioner,
    perceptual_distance,
    pretrained_unet,
)
from ldm_edu.training.text import RiddleTask, check_reader

__all__ = ["Finding", "examine"]

BINS = 8  # ranges of noise levels in which a loss is measured
CHUNK = 64  # images at a time in a network
STEPS = 20  # of the sampler, for samples that are compared with training images
YOUNG = 200  # steps of the diffusion model before which it need not have learned anything
EARLY = 10  # steps after which every weight has moved: layers that begin with zeros pass no gradient at first
CERTAIN = 4.0  # standard errors that a difference must be away from 0: by chance one in 30,000 is


# --- What is found ---


@dataclass(frozen=True)
class Finding:
    "What one check says."

    check: str  # its name
    verdict: str  # "passed", "failed", "not applicable" or "not done"
    measured: str  # one line with numbers; for the last two verdicts the reason
    cause: str = ""  # of a failure: what is wrong
    remedy: str = ""  # of a failure: what to do

    @property
    def failed(self) -> bool:
        "Is this a fault?"
        return self.verdict == "failed"

    def __str__(self) -> str:
        mark = {"passed": "ok", "failed": "FAULT", "not applicable": "-"}.get(self.verdict, "?")
        lines = [f"{mark:6s} {self.check:24s} {self.measured}"]
        if self.failed:
            lines += [f"         cause:  {self.cause}", f"         remedy: {self.remedy}"]
        return "\n".join(lines)


class _Skipped(Exception):
    "A check that gives no verdict on the run, with the reason."

    verdict = "not done"


class _NotApplicable(_Skipped):
    "A check of something that this run or model does not have."

    verdict = "not applicable"


class _Fault(NamedTuple):
    "What a check returns for a failure; for a success it returns the measurement alone."

    measured: str
    cause: str
    remedy: str


# --- A run or a model, as the checks read it ---


@dataclass
class _Stage:
    "The newest state of one stage of a run, or the weights of a model."

    name: str  # first_stage, text or diffusion
    plans: dict[int, Training]  # how it is trained from which step on: a run may be extended
    step: int  # steps done
    task: nn.Module  # the network with its loss, with the raw weights
    raw: dict[str, Tensor]  # weights of `task`
    average: dict[str, Tensor] | None  # averaged weights; None: a model has one set of weights only
    moments: dict[str, Tensor] | None  # what AdamW remembers, as `number.entry`; None for a model
    initial: dict[str, Tensor]  # weights before the first step, as far as the recipe's seed says them

    @property
    def training(self) -> Training:
        "How it is trained to its end."
        return list(self.plans.values())[-1]

    @cached_property
    def trained(self) -> list[tuple[int, str]]:
        "Number and name of each parameter that is trained."
        return [(i, name) for i, (name, p) in enumerate(self.task.named_parameters()) if p.requires_grad]

    def gradients(self, number: int) -> Tensor | None:
        "The running mean of the squared gradient of a parameter; None where the optimiser remembers none."
        return None if self.moments is None else self.moments.get(f"{number}.exp_avg_sq")

    def with_weights(self, weights: Mapping[str, Tensor]) -> nn.Module:
        "A copy of the task with other weights, ready to be used."
        task = copy.deepcopy(self.task)
        task.load_state_dict(weights)
        return task.eval().requires_grad_(False)


@dataclass
class _Subject:
    "What is examined."

    recipe: Recipe | AutoencoderRecipe | None
    folder: Path | None  # of a run; None: a model
    saved: LatentDiffusion | FirstStage | None  # the finished model
    options: RunOptions  # where the data lie
    n: int  # held-out images, at the most
    device: torch.device
    seed: int  # of noise and samples

    # Data

    def split(self, name: str) -> SampleDataset:
        "A split of the recipe's data set; `_Skipped` where it cannot be had."
        if self.recipe is None:
            raise _Skipped("the model does not say with which data it was trained: its provenance has no recipe")
        try:
            return open_split(self.recipe, self.options, name)
        except DataError as error:
            raise _Skipped(f"without the data: {brief(error)}") from error

    def batch(self, split: str, n: int) -> dict[str, Any]:
        "The first samples of a split, on the CPU; of several captions the first."
        dataset = self.split(split)
        try:
            found = collate(_samples_of(dataset, min(n, len(dataset))))
        except DataError as error:
            raise _Skipped(f"without the data: {brief(error)}") from error
        if "captions" in found:
            found["caption"] = [texts[0] for texts in found["captions"]]
        return found

    @cached_property
    def held_out(self) -> dict[str, Any]:
        "Samples that nothing was trained on; at least 2."
        found = self.batch("validation", self.n)
        if len(found["image"]) < 2:
            raise _Skipped("the validation split has a single image, but errors of means need at least 2")
        return found

    @cached_property
    def train(self) -> dict[str, Any]:
        "The first training samples, four times as many."
        return self.batch("train", min(4 * self.n, self.num_train))

    @cached_property
    def num_train(self) -> int:
        "How many images the last stage was trained on."
        n, images = len(self.split("train")), _training(self.recipe).images if self.recipe else None
        return n if images is None else min(n, images)

    def column(self, key: str) -> Any:
        "All values of a key in the training data, for a vocabulary."
        dataset = self.split("train")
        samples = _samples_of(dataset, self.num_train)
        kept = "captions" if key == "caption" and "captions" in samples[0] else key
        values = collate([{kept: sample[kept]} for sample in samples])[kept]
        return [text for texts in values for text in texts] if kept == "captions" else values

    # Networks

    @cached_property
    def stages(self) -> dict[str, _Stage]:
        "The stages of a run that have begun, or what a model was trained as; `CheckpointError` for a damaged file."
        if self.recipe is None:
            return {}
        return _run_stages(self) if self.folder else _model_stages(self)

    def stage(self, name: str) -> _Stage:
        "A stage; `_Skipped` where there is none."
        if name not in self.stages:
            raise _Skipped(self.lacking or f"there is no checkpoint of the stage {name} yet")
        return self.stages[name]

    lacking: str = ""  # why the stages of a run cannot be read, where that is so

    @cached_property
    def first_stage(self) -> FirstStage:
        "The first stage, on the device."
        return self.find_first_stage().to(self.device).eval().requires_grad_(False)

    def find_first_stage(self) -> FirstStage:
        "The first stage of the model, or else of the run."
        saved = self.saved
        if saved is not None and self.weights("first_stage") != "raw" and not self.is_older("first_stage"):
            return saved.first_stage if isinstance(saved, LatentDiffusion) else saved
        if isinstance(self.recipe, Recipe) and self.recipe.pretrained is not None:
            return load_first_stage(self.recipe.pretrained)
        stage = self.stage("first_stage")
        if stage.step < stage.training.steps and saved is None:
            raise _Skipped(f"the first stage is not finished: {stage.step} of {stage.training.steps} steps")
        found = cast(FirstStageTask, self.used(stage)).model
        if isinstance(found, AutoencoderKL):
            found.scale_factor = _scale_of_run(self, found)
        return found

    def is_older(self, stage: str) -> bool:
        "Is the finished model of a run not that of the stage's newest state, nor of the best one where that is kept?"
        found = self.stages.get(stage)
        if self.folder is None or self.saved is None or found is None or found.average is None:
            return False
        saved, averages = _saved_weights(self.saved, stage), [found.average]
        best = self.folder / f"{stage}.best.safetensors"
        if found.training.keep == "best" and best.exists():
            averages.append(_averages(load_tensors(best)))
        return not any(_are_equal(saved, average) for average in averages)

    @cached_property
    def older(self) -> str:
        "What is said of a measurement where the finished model is not the one that is measured; empty where it is."
        names = [name for name in ("first_stage", "diffusion") if self.weights(name) != "raw" and self.is_older(name)]
        stages = [self.stages[name] for name in names]
        at = " and ".join(f"{stage.name} of step {stage.step}" for stage in stages)
        return f"; model/ is older: measured is the checkpoint, {at}" if stages else ""

    def weights(self, stage: str) -> str:
        "Which weights of a stage are looked at: the average, or the raw ones where the average is at fault."
        found = self.stages.get(stage)
        return "raw" if found and _average_fault(found) else "average"

    def used(self, stage: _Stage) -> nn.Module:
        "The task of a stage with the weights that are looked at."
        average = stage.average if self.weights(stage.name) == "average" else None
        return stage.with_weights(stage.raw if average is None else average)

    @cached_property
    def model(self) -> LatentDiffusion:
        "The diffusion model, on the device: the finished one, or one of the newest weights."
        if isinstance(self.recipe, AutoencoderRecipe) or isinstance(self.saved, FirstStage):
            raise _NotApplicable("a first stage alone has no diffusion model")
        return self.find_model().to(self.device).eval().requires_grad_(False)

    def find_model(self) -> LatentDiffusion:
        "The finished model, or one of a stage's weights."
        is_used = self.weights("diffusion") != "raw" and not self.is_older("diffusion")
        if isinstance(self.saved, LatentDiffusion) and is_used:
            return self.saved
        task = cast(DiffusionTask, self.used(self.stage("diffusion")))
        return LatentDiffusion(self.first_stage, task.unet, task.schedule, task.conditioner, self.recipe_size)

    @property
    def recipe_size(self) -> int:
        "Height and width of the images."
        return self.recipe.size if self.recipe else 64

    @property
    def schedule(self) -> NoiseSchedule:
        "The noise levels, which need no checkpoint."
        if isinstance(self.saved, LatentDiffusion):
            return self.saved.schedule
        if not isinstance(self.recipe, Recipe):
            raise _NotApplicable("a first stage alone has no noise levels")
        return self.recipe.diffusion.noise_schedule()

    # Latents

    @cached_property
    def z(self) -> Float[Tensor, "n c h w"]:
        "Latents of the held-out images, drawn and rescaled as in training."
        return self.encode(self.held_out["image"])

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c h2 w2"]:
        "Latents of images; image i has its noise from a seed of its own."
        shape = (self.first_stage.latent_channels, *(side // self.first_stage.f for side in images.shape[2:]))
        noise = SeededNoise(range(self.seed, self.seed + len(images))).noise(shape)
        parts = zip(images.split(CHUNK), noise.split(CHUNK))
        return torch.cat([self.first_stage.encode(x.to(self.device), e.to(self.device)) for x, e in parts])

    def cached(self, name: str) -> tuple[DiagonalGaussian, int] | None:
        "The run's own latents of the split train or held_out, not rescaled, and how many; None where they do not fit."
        path = self.folder / "latents" / f"{name}.safetensors" if self.folder else None
        if path is None or not path.exists():
            return None
        notes, tensors = load_notes(path), load_tensors(path)
        if not {"mean", "logvar"} <= tensors.keys() or notes.get("n") != str(len(tensors["mean"])):
            raise CheckpointError(f"{path} holds no latents: remove it, and a resumed run makes it again")
        wanted = _latent_shape(cast(Recipe | AutoencoderRecipe, self.recipe))
        for found in (tensors["mean"], tensors["logvar"]):
            if len(found) != len(tensors["mean"]) or found.shape[1:] != wanted:
                raise CheckpointError(
                    f"{path} holds latents of shape {tuple(found.shape)}, but recipe.json says (…, {str(wanted)[1:]}:"
                    " put the recipe back that the run began with, or remove the latents, and a resumed run makes them"
                )
        return DiagonalGaussian(tensors["mean"], tensors["logvar"]), len(tensors["mean"])

    # Losses

    @cached_property
    def conditions(self) -> dict[str, Condition | None]:
        "The held-out images' own conditions, those with a part exchanged, and the null."
        return {"own": None} if self.model.conditioner is None else _conditions(self.model, self.held_out)

    @cached_property
    def losses(self) -> dict[str, Float[Tensor, "bins n"]]:
        "The loss of eq. 3 of each held-out image at each range of levels, by condition, and that of a 0 as answer."
        return _level_losses(self.model, self.z, self.conditions, self.seed)

    @cached_property
    def train_losses(self) -> dict[str, Float[Tensor, "bins m"]] | None:
        "The same of training images with their own conditions; None where there are no data, or a single image."
        try:
            batch = {key: value[: self.n] for key, value in self.train.items()}
        except _Skipped:
            return None
        if len(batch["image"]) < 2:
            return None
        cond = None if self.model.conditioner is None else _read(self.model.conditioner, batch)
        return _level_losses(self.model, self.encode(batch["image"]), {"own": cond}, self.seed)


def _samples_of(dataset: SampleDataset, n: int) -> list[dict[str, Any]]:
    "The first samples of a data set; the toy data sets draw several together faster than one by one."
    several = getattr(dataset, "__getitems__", lambda rows: [dataset[i] for i in rows])
    return [sample for i in range(0, n, CHUNK) for sample in several(range(i, min(i + CHUNK, n)))]


def _training(recipe: Recipe | AutoencoderRecipe) -> Training:
    "How the last stage of a recipe is trained."
    return cast(Training, (recipe.diffusion if isinstance(recipe, Recipe) else recipe.first_stage).training)


def _latent_shape(recipe: Recipe | AutoencoderRecipe) -> tuple[int, int, int]:
    "Channels, height and width of a latent."
    side = recipe.size // recipe.first_stage.f
    return (recipe.first_stage.latent_channels, side, side)


def _saved_weights(model: LatentDiffusion | FirstStage, stage: str) -> dict[str, Tensor]:
    "The weights of a finished model that one stage has trained, under their names in that stage's task."
    parts: dict[str, nn.Module | None] = {"model": model.first_stage if isinstance(model, LatentDiffusion) else model}
    if stage == "diffusion" and isinstance(model, LatentDiffusion):
        parts = {"unet": model.unet, "conditioner": model.conditioner}
    found = {part: module.state_dict() for part, module in parts.items() if module is not None}
    return {f"{part}.{name}": value for part, weights in found.items() for name, value in weights.items()}


def _are_equal(saved: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> bool:
    "Are the weights of a finished model those of a state?"
    return all(name in average and torch.equal(v.float(), average[name].float()) for name, v in saved.items())


# --- Opening ---


def _open(target: Any, options: RunOptions, n: int, device: torch.device, seed: int) -> _Subject:
    "A run's folder, a model's folder, a name, or a model, to be examined."
    rest = (options, n, device, seed)
    if isinstance(target, LatentDiffusion | FirstStage):
        target = copy.deepcopy(target)
        return _Subject(_recipe_of(target), None, target, *rest)
    if not isinstance(target, str | Path) or not str(target):
        raise LDMError(f"run_or_model={shown(target)} should be a folder, the name of a model, or a model")
    folder = place(target)
    if folder.is_dir() and ((recipe := kept_recipe(folder)) is not None):
        if not isinstance(recipe, Recipe | AutoencoderRecipe):
            raise LDMError(f"{folder} is a run of '{recipe.name}': only first stages and diffusion models are examined")
        saved = _load(folder / "model") if (folder / "model").is_dir() else None
        return _Subject(recipe, folder, saved, *rest)
    try:
        found = find_checkpoint(target)
    except CheckpointError as error:
        raise LDMError(f"{error}. A run is given by its folder, in which recipe.json lies") from error
    if not (found / "config.json").exists():
        raise LDMError(f"{found} holds neither a run (recipe.json) nor a model (config.json)")
    model = _load(found)
    return _Subject(_recipe_of(model), None, model, *rest)


def _load(folder: Path) -> LatentDiffusion | FirstStage:
    "The model in a folder; `CheckpointError` names a file that is no good."
    kind = load_json(folder / "config.json").get("class", "LatentDiffusion")
    if kind == "LatentDiffusion":
        return LatentDiffusion.from_pretrained(folder)
    return load_first_stage(folder)


def _recipe_of(model: LatentDiffusion | FirstStage) -> Recipe | AutoencoderRecipe | None:
    "The recipe in a model's provenance; None where there is none that is known."
    try:
        recipe = recipe_from_dict((model.provenance or {})["recipe"])
    except (LDMError, KeyError):
        return None
    wanted = Recipe if isinstance(model, LatentDiffusion) else AutoencoderRecipe
    return recipe if isinstance(recipe, wanted) else None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    "Within the block, torch's random stream begins at a seed; the caller's stays as it was."
    with plainly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _new_first_stage(recipe: Recipe | AutoencoderRecipe, options: RunOptions) -> FirstStageTask:
    "The first stage of a recipe as it is before the first step."
    with _seeded(recipe.seed):
        try:  # to build it may use random numbers
            perceptual_distance(recipe.first_stage.perceptual, options.weights_dir)
        except LDMError:
            pass
        return FirstStageTask(recipe.first_stage)


def _new_text(recipe: Recipe) -> RiddleTask:
    "The text conditioner of a recipe, with its answers, as it is before the first step."
    with _seeded(recipe.seed + 1):
        return RiddleTask(check_reader(recipe, build_conditioner(recipe.diffusion)))


def _new_diffusion(subject: _Subject, recipe: Recipe, text: Mapping[str, Tensor] | None) -> DiffusionTask:
    "UNet and conditioner as they are before the first step; the conditioner may have had a warm start."
    if recipe.text is None:
        with _seeded(recipe.seed + 1):
            task = DiffusionTask(recipe, build_conditioner(recipe.diffusion, subject.column))
        if (saved := pretrained_unet(recipe)) is not None:
            begin_with(task.unet, saved)
        return task
    warm = _new_text(recipe)
    if text is not None:
        warm.load_state_dict(text)
    with _seeded(recipe.seed + 1):
        return DiffusionTask(recipe, warm.conditioner)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    "The tensors whose names begin with a prefix, under the rest of their names."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _averages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    "The averaged weights of a state."
    return _under("ema.", tensors)


def _run_stages(subject: _Subject) -> dict[str, _Stage]:
    "The stages of a run that have a checkpoint."
    recipe, folder = cast(Any, subject.recipe), cast(Path, subject.folder)
    trainings = stage_plans(recipe)
    extensions = kept_extensions(folder, list(trainings))
    stages: dict[str, _Stage] = {}
    for name, training in trainings.items():
        if not (path := folder / f"{name}.safetensors").exists():
            continue
        tensors = load_tensors(path)
        try:
            task, initial = _begun(subject, name, stages)
        except _Skipped as skipped:
            subject.lacking = str(skipped)
            continue
        plans = extended_plans(name, training, extensions)
        stages[name] = _read_state(path, name, plans, task, initial, tensors)
    return stages


def _begun(subject: _Subject, name: str, stages: Mapping[str, _Stage]) -> tuple[nn.Module, dict[str, Tensor]]:
    "The task of a stage of a run, and its first weights as far as they are known."
    recipe = cast(Any, subject.recipe)
    if name == "first_stage":
        task: nn.Module = _new_first_stage(recipe, subject.options)
        if recipe.first_stage.regulariser == "vq" and recipe.first_stage.from_data:
            return task, {k: v.clone() for k, v in task.state_dict().items() if "quantize" not in k}
    elif name == "text":
        task = _new_text(recipe)
    else:
        warm = stages["text"].average if "text" in stages else None
        try:
            task = _new_diffusion(subject, recipe, warm)
        except (_Skipped, LDMError) as error:
            if not isinstance(subject.saved, LatentDiffusion):
                raise _Skipped(str(error)) from error
            return DiffusionTask(recipe, copy.deepcopy(subject.saved.conditioner)), {}
        if recipe.text is not None and warm is None:
            return task, {k: v.clone() for k, v in task.state_dict().items() if not k.startswith("conditioner.")}
    return task, {k: v.clone() for k, v in task.state_dict().items()}


def _read_state(
    path: Path,
    name: str,
    plans: dict[int, Training],
    task: nn.Module,
    initial: dict[str, Tensor],
    tensors: dict[str, Tensor],
) -> _Stage:
    "The state in a file; `CheckpointError` names the file where it is none of this task."
    raw, average, moments = _under("task.", tensors), _averages(tensors), _under("optimizer.", tensors)
    try:
        for found in (raw, average):
            check_fit({k: v.to(torch.float32) if v.is_floating_point() else v for k, v in found.items()},
                      task.state_dict(), "the weights")  # fmt: skip
        step = int(tensors["step"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no state of this recipe's {name}: {brief(error)}") from error
    raw, average = ({k: v.float() if v.is_floating_point() else v for k, v in x.items()} for x in (raw, average))
    task.load_state_dict(raw)
    return _Stage(name, plans, step, task, raw, average, moments, initial)


def _model_stages(subject: _Subject) -> dict[str, _Stage]:
    "The weights of a model beside those that its recipe began with; empty where they do not fit the recipe."
    recipe, model = cast(Any, subject.recipe), subject.saved
    try:
        if isinstance(model, LatentDiffusion):
            name, training, task = "diffusion", recipe.diffusion.training, _new_diffusion(subject, recipe, None)
            parts: dict[str, nn.Module | None] = {"unet": model.unet, "conditioner": model.conditioner}
        else:
            name, training = "first_stage", recipe.first_stage.training
            task = _new_first_stage(recipe, subject.options)
            parts = {"model": cast(nn.Module, model)}
        initial = {k: v.clone() for k, v in task.state_dict().items()}
        raw = {f"{part}.{k}": v for part, module in parts.items() if module for k, v in module.state_dict().items()}
        kept = {k: v for k, v in initial.items() if k.partition(".")[0] in parts and "quantize" not in k}
        if isinstance(recipe, Recipe) and recipe.text is not None:
            kept = {k: v for k, v in kept.items() if not k.startswith("conditioner.")}
        task.load_state_dict(initial | raw)
    except (_Skipped, LDMError, RuntimeError) as error:
        subject.lacking = brief(error)
        return {}
    steps = _model_steps(model) or training.steps
    return {name: _Stage(name, {0: training}, steps, task, {**initial, **raw}, None, None, kept)}


def _model_steps(model: Any) -> int | None:
    "The steps that a model's last stage has done, as its provenance says; None where it does not."
    made = getattr(model, "provenance", None)
    if isinstance(model, LatentDiffusion) and isinstance(made, Mapping):
        made = made.get("diffusion")
    steps = made.get("steps") if isinstance(made, Mapping) else None
    return steps if type(steps) is int else None


@torch.no_grad()
def _scale_of_run(subject: _Subject, model: AutoencoderKL) -> float:
    "The scale factor of a finished first stage, which no checkpoint holds: 1 / standard deviation of drawn latents."
    if (cached := subject.cached("train")) is not None:
        posterior = cached[0]
        mean, logvar = posterior.mean[:512], posterior.logvar[:512]
        z = DiagonalGaussian(mean, logvar).sample(SeededNoise([subject.seed]).noise(mean.shape)[0])
        return 1 / z.std(correction=0).item()
    images = subject.train["image"]
    noise = SeededNoise(range(len(images)))
    model = model.to(subject.device)
    posteriors = [model.posterior(x.to(subject.device)) for x in images.split(CHUNK)]
    drawn = torch.cat([p.mean for p in posteriors]).cpu(), torch.cat([p.logvar for p in posteriors]).cpu()
    return 1 / DiagonalGaussian(*drawn).sample(noise.noise(drawn[0].shape[1:])).std(correction=0).item()


# --- Numbers ---


def _mean(values: Float[Tensor, "..."]) -> tuple[float, float]:
    "The mean of numbers, one an image, and its standard error."
    values = values.double().flatten()
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.inf
    return values.mean().item(), error


def _excess(values: Float[Tensor, "..."]) -> float:
    "How many standard errors the mean of numbers lies above 0; 0 where all are 0."
    mean, error = _mean(values)
    return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0


def _listed(names: Sequence[str], most: int = 4) -> str:
    "Some names, and how many there are besides."
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _rolled(values: Any) -> Any:
    "Each image gets what belongs to another one."
    return values.roll(1, 0) if isinstance(values, Tensor) else [*values[-1:], *values[:-1]]


def _read(conditioner: Conditioner, batch: Mapping[str, Any]) -> Condition:
    "The condition of a batch, in chunks."
    keys, size = conditioner.keys, len(batch["image"])
    parts = [{key: batch[key][i : i + CHUNK] for key in keys} for i in range(0, size, CHUNK)]
    return Condition.cat([conditioner(part) for part in parts])


def _parts(conditioner: Conditioner) -> dict[str, Conditioner]:
    "The conditioners of which one is made, by name."
    parts = conditioner.parts if isinstance(conditioner, MergedConditioner) else [conditioner]
    return {f"{type(part).__name__} ({', '.join(part.keys)})": part for part in parts}


@torch.no_grad()
def _conditions(model: LatentDiffusion, batch: Mapping[str, Any]) -> dict[str, Condition | None]:
    "Own conditions, those in which one part is another image's, all parts another image's, and the null."
    conditioner = cast(Conditioner, model.conditioner)
    found: dict[str, Condition | None] = {"own": _read(conditioner, batch)}
    parts = _parts(conditioner)
    for name, part in parts.items():
        found[name] = _read(conditioner, {**batch, **{key: _rolled(batch[key]) for key in part.keys}})
    rolled = {**batch, **{key: _rolled(batch[key]) for key in conditioner.keys}}
    found["other"] = found[next(iter(parts))] if len(parts) == 1 else _read(conditioner, rolled)
    null = conditioner.null()
    if null.slots():
        found["null"] = cast(Condition, found["own"]).dropped(null)
    return found


def _differ(a: Condition, b: Condition) -> Bool[Tensor, "n"]:
    "In which rows two conditions differ."
    rows = [(v != b.slots()[name]).flatten(1).any(1) for name, v in a.slots().items()]
    return torch.stack(rows).any(0).cpu()


@torch.no_grad()
def _level_losses(
    model: LatentDiffusion,
    z: Float[Tensor, "n c h w"],  # latents
    conditions: Mapping[str, Condition | None],
    seed: int,
) -> dict[str, Float[Tensor, "bins n"]]:
    "The loss of each latent in each range of levels under each condition; `zero` is that of a network that says 0."
    schedule, n = model.schedule, len(z)
    bins, noise = min(BINS, schedule.T), SeededNoise(range(seed, seed + n))
    losses = {name: torch.zeros(bins, n) for name in (*conditions, "zero")}
    asked: dict[int, str] = {}  # the same condition is asked once
    for k in range(bins):
        low, high = k * schedule.T // bins, (k + 1) * schedule.T // bins - 1
        t = torch.linspace(low, high, n).round().long().to(z.device)
        eps = noise.noise(z.shape[1:]).to(z)
        x_t, target = schedule.q_sample(z, t, eps), schedule.target(z, eps, t)
        losses["zero"][k] = target.square().flatten(1).mean(1).cpu()
        asked.clear()
        for name, cond in conditions.items():
            if (before := asked.get(id(cond))) is not None:
                losses[name][k] = losses[before][k]
                continue
            asked[id(cond)] = name
            for i in range(0, n, CHUNK):
                rows = slice(i, i + CHUNK)
                said = model.unet(x_t[rows], t[rows], None if cond is None else cond[rows]).float()
                losses[name][k, rows] = (said - target[rows]).square().flatten(1).mean(1).cpu()
    return losses


# --- 1 and 2: latents ---


class _Spread(NamedTuple):
    "Standard deviations of drawn latents, as the encoder gives them and as the UNet is given them."

    raw: float
    std: float
    error: float  # standard error of `std`
    n: int  # images
    source: str  # of which latents


def _std(z: Float[Tensor, "n c h w"]) -> tuple[float, float]:
    "The standard deviation of latents around their common mean, and its standard error."
    centred = (z - z.mean()).square().flatten(1).mean(1)
    mean, error = _mean(centred)
    std = mean**0.5
    return std, error / (2 * std) if std else math.inf


@torch.no_grad()
def _spread(subject: _Subject) -> _Spread:
    "How far latents spread: of the run's own ones where it has kept any, else of held-out images."
    stage, cached = subject.first_stage, None
    for name in ("held_out", "train"):  # an unfinished run has its factor from latents of `train`
        cached = cached or subject.cached(name)
    if cached is not None:
        posterior, n = cached
        noise = SeededNoise([subject.seed]).noise(posterior.mean.shape)[0]
        raw = posterior.sample(noise)
        if not isinstance(stage, AutoencoderKL):
            raw = posterior.mean
        std, error = _std(stage.scale_factor * raw)
        return _Spread(_std(raw)[0], std, error, n, "of the run's latents")
    images = subject.held_out["image"]
    posteriors = [stage.posterior(x.to(subject.device)) for x in images.split(CHUNK)]
    z = subject.z
    noise = SeededNoise(range(subject.seed, subject.seed + len(z))).noise(z.shape[1:]).to(z)
    raw = torch.cat([p.sample(e) for p, e in zip(posteriors, noise.split(CHUNK))])
    std, error = _std(z)
    return _Spread(_std(raw)[0], std, error, len(z), "of held-out latents")


def _is_inverted(spread: _Spread) -> bool:
    "Are latents multiplied by their standard deviation instead of divided by it, so that it comes out squared?"
    if not 0 < spread.raw < math.inf or not 0 < spread.std < math.inf:
        return False
    raw, factor = math.log(spread.raw), math.log(spread.std / spread.raw)
    return abs(raw) > 0.2 and abs(factor - raw) < 0.2


def check_spread(subject: _Subject) -> str | _Fault:
    "The standard deviation of the latents that the UNet is trained on."
    spread, stage = _spread(subject), subject.first_stage
    told = f"standard deviation {spread.std:.3f} ± {spread.error:.3f} {spread.source} ({spread.n} images)"
    if not isinstance(stage, AutoencoderKL):
        if 0.3 <= spread.std <= 3:
            return f"{told}; {type(stage).__name__} does not rescale them, and 0.3 to 3 is near enough to 1"
        cause = "this first stage does not rescale its latents, and they are far from unit standard deviation"
        remedy = "the noise levels fit latents of standard deviation 1: take a KL-regularised stage, or other levels"
        return _Fault(told, cause, remedy)
    if _is_inverted(spread):
        raise _Skipped(f"{told}; the encoder's own is {spread.raw:.3f}: see 'scale factor'")
    # A fifth moves every noise level by 0.4 in the logarithm of its signal-to-noise ratio, which does no harm.
    if abs(spread.std - 1) <= 0.2 + 3 * spread.error:
        return told
    cause = f"scale_factor is {stage.scale_factor:.4g}, but 1 / (standard deviation of the latents) is"
    cause = f"{cause} {1 / spread.raw:.4g}" if spread.raw else "the latents are all alike"
    remedy = "set scale_factor to estimate_scale(first_stage, images) and train the diffusion model on those latents"
    return _Fault(told, cause, remedy)


@torch.no_grad()
def check_scale(subject: _Subject) -> str | _Fault:
    "Whether the scale factor multiplies in the encoder and divides in the decoder."
    stage = subject.first_stage
    if not isinstance(stage, AutoencoderKL):
        raise _NotApplicable(f"{type(stage).__name__} does not rescale its latents")
    spread, told = _spread(subject), f"scale_factor {stage.scale_factor:.4g}"
    told = f"{told}, standard deviation {spread.raw:.3f} before and {spread.std:.3f} after it"
    if _is_inverted(spread):
        cause = f"latents are multiplied by their standard deviation: it comes out squared, {spread.std:.3g}"
        remedy = "scale_factor is 1 / (standard deviation): the encoder multiplies by it, the decoder divides by it"
        return _Fault(told, cause, remedy)
    errors = _decoding_errors(subject)
    said = {name: _mean(values)[0] for name, values in errors.items()}
    told = f"{told}; squared error of decode(encode(x)) {said['own']:.4g}"
    for name, how in {"times": "divides where it should multiply", "by": "multiplies where it should divide"}.items():
        if said[name] < 0.8 * said["own"] and _excess(errors["own"] - errors[name]) > CERTAIN:
            other = f"{said[name]:.4g} with the latent {'multiplied' if name == 'times' else 'divided'} by its square"
            cause = f"the decoder {how}: it does not undo what the encoder does with scale_factor"
            remedy = "encode: scale_factor * z; decode: z / scale_factor (FirstStage.latent, from_latent)"
            return _Fault(f"{told}, {other}", cause, remedy)
    return told


def _decoding_errors(subject: _Subject) -> dict[str, Float[Tensor, "n"]]:
    "The squared error of held-out images' reconstructions, and of those with the latent off by the factor's square."
    stage, square = subject.first_stage, subject.first_stage.scale_factor**2
    errors: dict[str, list[Tensor]] = {"own": [], "times": [], "by": []}
    for x in subject.held_out["image"][:CHUNK].split(CHUNK // 2):
        x = x.to(subject.device)
        z = stage.encode(x)
        for name, factor in {"own": 1.0, "times": square, "by": 1 / square}.items():
            back = stage.decode(z * factor).clamp(-1, 1)
            errors[name].append((back - x).square().flatten(1).mean(1).cpu())
    return {name: torch.cat(parts) for name, parts in errors.items()}


# --- 3 and 4: conditions ---


def _steps_done(subject: _Subject) -> int:
    "The steps of the diffusion model: of its checkpoint, or else of the model's provenance or its recipe."
    if (stage := subject.stages.get("diffusion")) is not None:
        return stage.step
    planned = subject.recipe.diffusion.training.steps if isinstance(subject.recipe, Recipe) else YOUNG
    return _model_steps(subject.saved) or planned


def _need_steps(subject: _Subject, told: str) -> None:
    "`_Skipped` where the diffusion model is too young for a verdict on what it has not learned."
    if (steps := _steps_done(subject)) < YOUNG:
        raise _Skipped(f"{told}: nothing is learned yet, after {steps} steps")


def _need_condition(subject: _Subject) -> Conditioner:
    "The conditioner; `_NotApplicable` where there is none, `_Skipped` where no loss can be measured."
    if (conditioner := subject.model.conditioner) is None:
        raise _NotApplicable("the model is unconditional")
    if not subject.losses["own"].isfinite().all():
        raise _Skipped("the loss is not finite: see 'loss by level'")
    return conditioner


def _rise(subject: _Subject, name: str, other: str = "own") -> Float[Tensor, "bins n"]:
    "How much the loss is higher under one condition than under another, where the two differ."
    a, b = (cast(Condition, subject.conditions[each]) for each in (name, other))
    return (subject.losses[name] - subject.losses[other])[:, _differ(a, b)]


def _is_heard(rise: Float[Tensor, "bins n"]) -> bool:
    "Is a loss certainly higher with the condition of another image, at some levels or over all?"
    return max(_excess(rise.mean(0)), *(_excess(each) for each in rise)) > CERTAIN


def check_heard(subject: _Subject) -> str | _Fault:
    "Whether each condition changes the loss."
    conditioner, told, unheard, unsure = _need_condition(subject), [], [], []
    own = subject.losses["own"].mean().item()
    for name, part in _parts(conditioner).items():
        rise = _rise(subject, name)
        if rise.shape[1] < 2:
            if all(_same(subject.held_out[key]) for key in part.keys):
                raise _Skipped(f"all held-out samples have the same {', '.join(part.keys)}")
            measured = f"{name} gives the same output for different inputs"
            cause = f"the output of {name} does not depend on what it reads"
            return _Fault(measured, cause, "look at its forward: does it read the batch, and is its output not masked?")
        mean, error = _mean(rise.mean(0))
        told.append(f"{name} {mean / own:+.1%} ± {error / own:.1%}")
        if not _is_heard(rise):
            (unheard if mean + 3 * error < 0.01 * own else unsure).append(name)
    measured = f"loss with another image's condition, against {own:.4f}: {'; '.join(told)}"
    if unheard:
        _need_steps(subject, measured)
        cause = f"the model does not hear {_listed(unheard)}: its loss is the same with a wrong condition"
        remedy = (
            "check that the condition of image i is image i's, that it reaches the UNet, and that it varies in the data;"
            " then train longer, or the text with a warm start"
        )
        return _Fault(measured, cause, remedy)
    if unsure:
        raise _Skipped(f"{measured}: too few images to tell whether {_listed(unsure)} is heard")
    return measured


def _same(values: Any) -> bool:
    "Are the entries of all samples equal?"
    first = values[0]
    if isinstance(first, Tensor):
        return all(v.shape == first.shape and torch.equal(v, first) for v in values)
    return all(v == first for v in values)


def check_dropped(subject: _Subject) -> str | _Fault:
    "Whether the condition was dropped in training, as guidance needs it."
    conditioner, recipe = _need_condition(subject), subject.recipe
    if not any(part.null().slots() for part in _parts(conditioner).values()):
        raise _NotApplicable("this conditioner has no null, so there is no guidance")
    remedy = "train with drop=0.1, or sample with scale=1"
    told = ""
    if isinstance(recipe, Recipe):
        drop, apart = recipe.diffusion.drop, recipe.diffusion.drop_apart
        told = f"drop={drop:g}" + f", drop_apart={apart:g}" * (apart > 0)
        if not drop and not apart:
            cause = "the condition was never dropped, so guidance extrapolates from a prediction that was never trained"
            return _Fault(told, cause, remedy)
        told += ", "
        if (fault := _unmoved_null(subject, recipe, told, remedy)) is not None:
            return fault
    if "null" not in subject.conditions:
        return f"{told}each condition is dropped by itself, the whole never"
    return _null_loss(subject, told, remedy)


def _null_loss(subject: _Subject, told: str, remedy: str) -> str | _Fault:
    """The loss without condition, which lies between those with the right and with a wrong one.

    For the best predictions m(c), a wrong condition costs twice the variance of m(c), and none costs it once.
    """
    other, null = _rise(subject, "other").mean(0), _rise(subject, "null").mean(0)
    if not _is_heard(_rise(subject, "other")):
        raise _Skipped("a condition that is not heard says nothing about its null")
    own = subject.losses["own"].mean().item()
    none, wrong = _mean(null)[0], _mean(other)[0]
    told = f"{told}loss without condition {none / own:+.1%}, with a wrong one {wrong / own:+.1%} (near half is right)"
    worse = (subject.losses["null"] - subject.losses["other"]).mean(0)
    if none > 1.5 * wrong and _excess(worse) > CERTAIN:
        cause = "no condition is worse for the loss than a wrong condition, so the null was never trained"
        return _Fault(told, cause, remedy)
    return told


def _unmoved_null(subject: _Subject, recipe: Recipe, told: str, remedy: str) -> _Fault | None:
    "A fault where the weights that the null alone reads had no gradient; None where they had, or are not known."
    stage = subject.stages.get("diffusion")
    share, training = max(recipe.diffusion.drop, recipe.diffusion.drop_apart), recipe.diffusion.training
    if stage is None or stage.moments is None or share * training.batch_size * stage.step < 20:
        return None
    found = _null_weights(stage, subject.held_out)
    if not found or any((seen[only] > 0).any() for _, only, seen in found):
        return None
    names = _listed([name for name, _, _ in found])
    cause = f"the weights of the null, in {names}, had no gradient in {stage.step} steps: it was never used"
    return _Fault(f"{told}but the null's own weights were never trained", cause, f"{remedy}; is drop() called?")


@torch.enable_grad()
def _null_weights(stage: _Stage, batch: Mapping[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
    "Parameters that the null reads: the name, where the null alone reads them, and what AdamW has seen of them."
    task = cast(DiffusionTask, copy.deepcopy(stage.task).eval())
    conditioner = cast(Conditioner, task.conditioner)
    numbers = {name: number for number, name in stage.trained}
    wanted = {name: p for name, p in conditioner.named_parameters() if f"conditioner.{name}" in numbers}
    if not wanted:
        return []
    used = [_gradients(cond, wanted) for cond in (conditioner.null(), _read(conditioner, batch))]
    found = []
    for name, of_null, of_others in zip(wanted, *used):
        only = of_null.ne(0) & of_others.eq(0)
        seen = stage.gradients(numbers[f"conditioner.{name}"])
        if only.any() and seen is not None:
            found.append((f"conditioner.{name}", only, seen))
    return found


def _gradients(cond: Condition, weights: Mapping[str, Tensor]) -> list[Tensor]:
    "The gradient of a mixture of all numbers of a condition by weights."
    generator = torch.Generator().manual_seed(0)
    mixture = [(v * torch.randn(v.shape, generator=generator)).sum() for v in cond.slots().values()]
    total = sum(mixture, torch.zeros(()))
    if not total.requires_grad:
        return [torch.zeros_like(weight) for weight in weights.values()]
    found = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights.values(), found)]


# --- 5, 6 and 7: weights ---


def _expected_lag(stage: _Stage) -> float:
    "The share of the way from the first weights that an average has still to go, if weights move as the learning rate."
    now, average, training = 0.0, 0.0, stage.training
    for k in range(stage.step):
        training = stage.plans.get(k, training)
        now += learning_rate(training, k)
        average += (1 - min(training.ema, (1 + k) / (10 + k))) * (now - average)
    return (now - average) / now if now else 0.0


def _flat(stage: _Stage, weights: Mapping[str, Tensor]) -> Tensor:
    "The parameters that are trained, whose first values are known, as one vector."
    return torch.cat([weights[name].double().flatten() for _, name in stage.trained if name in stage.initial])


def _lag(stage: _Stage) -> tuple[float, float] | None:
    """How far the average is behind, along the way from the first weights to the present ones, and in all directions.

    Both are shares of that way. None where the first weights are not known.
    """
    known = [name for _, name in stage.trained if name in stage.initial]
    if not known or stage.average is None:
        return None
    first, now, average = (_flat(stage, each) for each in (stage.initial, stage.raw, stage.average))
    way, behind = now - first, now - average
    length = way.norm().item()
    # Weights that were drawn from another seed point elsewhere.
    same = (now @ first / (now.norm() * first.norm()).clamp(min=1e-30)).item() > 0.1
    if not same or not 0 < length < math.inf:
        return None
    return (behind @ way).item() / length**2, behind.norm().item() / length


def _average_fault(stage: _Stage) -> _Fault | None:
    "A fault of a stage's averaged weights."
    if stage.average is None or not stage.step or (lag := _lag(stage)) is None:
        return None
    along, away = lag
    expected = _expected_lag(stage)
    if along <= expected + 0.25 and away <= 1:
        return None
    told = f"{stage.name}, step {stage.step}: {along:.0%} of the way from the first weights is missing in the average"
    told = f"{told}, {expected:.0%} expected for ema={stage.training.ema:g}"
    if away > 1.5:
        cause = "the average is farther from the trained weights than these are from the first ones"
        return _Fault(told, cause, "the average belongs to other weights: begin it as a copy of the network")
    if along > 0.999:
        cause = "the average still holds the first weights: it is never updated"
        return _Fault(told, cause, "call ema.update(task, step) after every optimizer.step()")
    cause = (
        f"the average remembers the first weights: its decay does not begin low, or it misses updates of {stage.step}"
    )
    remedy = "let the decay begin low, min(decay, (1 + step) / (10 + step)), and update after every step"
    return _Fault(told, cause, remedy)


def check_average(subject: _Subject) -> str | _Fault:
    "Whether the averaged weights follow the trained ones."
    if subject.folder is None:
        raise _NotApplicable("a model holds one set of weights: averages are examined in a run")
    stages = [stage for stage in subject.stages.values() if stage.step]
    if not stages:
        raise _Skipped(subject.lacking or "there is no checkpoint yet")
    told = []
    for stage in stages:
        if (fault := _average_fault(stage)) is not None:
            return fault
        if (lag := _lag(stage)) is not None:
            expected = _expected_lag(stage)
            told.append(f"{stage.name} {lag[0]:.1%} of the way behind ({expected:.1%} expected)")
        elif (worse := _worse_average(subject, stage)) is not None:
            if isinstance(worse, _Fault):
                return worse
            told.append(worse)
    if not told:
        raise _Skipped("the first weights do not follow from the recipe's seed, and no loss could be compared")
    return ", ".join(told)


def _worse_average(subject: _Subject, stage: _Stage) -> str | _Fault | None:
    "The loss of averaged and raw weights, for a diffusion model whose first weights are not known."
    if stage.name != "diffusion" or stage.average is None:
        return None
    losses = []
    for weights in (stage.average, stage.raw):
        task = cast(DiffusionTask, stage.with_weights(weights)).to(subject.device)
        model = LatentDiffusion(subject.first_stage, task.unet, task.schedule, task.conditioner, subject.recipe_size)
        cond = None if model.conditioner is None else _read(model.conditioner, subject.held_out)
        losses.append(_level_losses(model, subject.z, {"own": cond}, subject.seed)["own"].mean(0))
    average, raw = (_mean(each)[0] for each in losses)
    told = f"held-out loss {average:.4f} with the average, {raw:.4f} with the raw weights"
    if average > 1.5 * raw and _excess(losses[0] - losses[1]) > CERTAIN:
        remedy = "update it after every step, with a decay that begins low: min(decay, (1 + step) / (10 + step))"
        return _Fault(told, "the averaged weights do not follow the trained ones", remedy)
    return told


def _is_first(name: str, stage: _Stage) -> bool:
    "Does a parameter still have its first value, perhaps rounded to 16 bits?"
    if name not in stage.initial:
        return False
    now, first = stage.raw[name], stage.initial[name]
    return torch.equal(now, first) or (stage.moments is None and torch.equal(now, first.half().float()))


def _unmoved(stage: _Stage) -> list[str]:
    "The trained parameters that had no gradient or have not moved, without those of the discriminator."
    found = []
    for number, name in stage.trained:
        if name.startswith("adversary."):
            continue
        if stage.moments is None and name not in stage.initial:
            continue
        seen = stage.gradients(number)
        still = stage.moments is not None and (seen is None or not seen.any())
        if still or _is_first(name, stage):
            found.append(name)
    return found


@torch.no_grad()
def _outputs(stage: _Stage, task: nn.Module, batch: Any) -> Tensor:
    "All that the loss of a stage looks at, as one vector."
    if stage.name == "first_stage":
        back, middle = cast(FirstStageTask, task).model(*batch)
        parts = [middle.z, middle.loss] if isinstance(middle, Quantized) else [middle.mean, middle.logvar]
        return torch.cat([part.flatten() for part in (back, *parts)])
    if stage.name == "text":
        return torch.cat([part.flatten() for part in cast(RiddleTask, task).logits(batch).values()])
    z, t, samples = batch
    diffusion = cast(DiffusionTask, task)
    cond = None if diffusion.conditioner is None else diffusion.conditioner(samples)
    return diffusion.unet(z, t, cond).flatten()


def _inputs(subject: _Subject, stage: _Stage) -> Any:
    "A few inputs of a stage's network; they need no images."
    generator = torch.Generator().manual_seed(subject.seed)
    recipe = cast(Any, subject.recipe)
    z = torch.randn((4, *_latent_shape(recipe)), generator=generator)
    if stage.name == "first_stage":
        return torch.rand(4, 3, recipe.size, recipe.size, generator=generator) * 2 - 1, z
    if stage.name == "text":
        return subject.held_out["caption"][:4]
    conditioner = cast(DiffusionTask, stage.task).conditioner
    samples = {key: subject.held_out[key][:4] for key in conditioner.keys} if conditioner is not None else {}
    rows = len(next(iter(samples.values()))) if samples else 4
    return z[:rows], torch.linspace(0, recipe.diffusion.T - 1, rows).long(), samples


def _matter(subject: _Subject, stage: _Stage, names: Sequence[str]) -> list[str]:
    """Those parameters on which the network's output depends.

    All of them are changed first, so that none is hidden behind another one that is still zero.
    """
    batch, task = _inputs(subject, stage), stage.with_weights(stage.raw)
    generator, weights = torch.Generator().manual_seed(0), dict(task.named_parameters())

    def change(name: str) -> None:
        value = weights[name]
        value.add_(torch.randn(value.shape, generator=generator) * value.std(correction=0).clamp(min=0.02))

    for name in names:
        change(name)
    before, found = _outputs(stage, task, batch), []
    for name in names:
        kept = weights[name].clone()
        change(name)
        after = _outputs(stage, task, batch)
        if (after - before).norm() > 1e-4 * before.norm():
            found.append(name)
        weights[name].copy_(kept)
    return found


def check_moved(subject: _Subject) -> str | _Fault:
    "Whether every parameter that is trained has moved."
    if not subject.stages:
        reason = "the model does not say by which recipe it was trained" if subject.recipe is None else ""
        raise _Skipped(subject.lacking or reason or "there is no checkpoint yet")
    told, early = [], []
    for stage in subject.stages.values():
        if stage.step < EARLY:
            early.append(f"{stage.name}: {stage.step} steps are too few to tell")
            continue
        names = _unmoved(stage)
        moved = _matter(subject, stage, names) if names else []
        count = len([1 for _, name in stage.trained if stage.moments is not None or name in stage.initial])
        told.append(f"{stage.name}: {count - len(names)} of {count} tensors have moved")
        if moved:
            cause = f"the prediction depends on {_listed(moved)}, but {'they are' if len(moved) > 1 else 'it is'}"
            cause = f"{cause} as before the first step, or had no gradient"
            remedy = "are they in the optimiser, do they require a gradient, is their learning rate above 0, is nothing detached?"
            return _Fault(f"{told[-1]}, {len(moved)} have not", cause, remedy)
        if names:
            told[-1] += f"; the prediction does not depend on the other {len(names)}, as on keys of a single token"
    if not told:
        raise _Skipped("; ".join(early))
    return "; ".join([*told, *early])


def check_discriminator(subject: _Subject) -> str | _Fault:
    "Whether the discriminator is trained from the step on that the recipe says."
    recipe = subject.recipe
    how = None if recipe is None else recipe.first_stage.adversarial
    if how is None or (isinstance(recipe, Recipe) and recipe.pretrained is not None):
        raise _NotApplicable("no discriminator is trained")
    if subject.folder is None:
        raise _NotApplicable("a model holds no discriminator: it is examined in a run")
    stage = subject.stage("first_stage")
    if stage.step <= how.start:
        raise _NotApplicable(f"it is used from step {how.start} on, and {stage.step} are done")
    rows = [(number, name) for number, name in stage.trained if name.startswith("adversary.")]
    without = [name for i, name in rows if (seen := stage.gradients(i)) is None or not seen.any()]
    still = [name for _, name in rows if _is_first(name, stage)]
    told = f"used since step {how.start} of {stage.step}: {len(rows) - len({*without, *still})} of {len(rows)} tensors"
    told = f"{told} have moved"
    if len(without) == len(rows) or len(still) == len(rows):
        cause = "the discriminator is never stepped: its weights are those before the first step, or had no gradient"
        remedy = "give the optimiser its parameters, and add its own loss d_loss to the one that is differentiated"
        return _Fault(told, cause, remedy)
    if left := [name for _, name in rows if name in {*without, *still}]:
        return _Fault(told, f"a part of the discriminator does not move: {_listed(left)}", "is anything detached?")
    return told


# --- 8 and 9: noise levels ---


def _exact_denoiser(schedule: NoiseSchedule) -> Callable[..., Tensor]:
    "The best prediction for data that are standard normal: a multiple of x_t."

    def denoise(x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        shape = (-1, *[1] * (x_t.ndim - 1))
        alpha, sigma = (table[t.cpu()].to(x_t).reshape(shape) for table in (schedule.alpha, schedule.sigma))
        return {"epsilon": sigma, "x0": alpha}.get(schedule.prediction, 0 * alpha) * x_t

    return denoise


def _broken_tables(schedule: NoiseSchedule) -> list[str]:
    "Tables and conversions that are not finite at some level, with the level."
    found, T = [], schedule.T
    tables = {name: getattr(schedule, name) for name in ("betas", "alphas_cumprod", "alpha", "sigma", "snr")}
    for name, table in tables.items():
        if bad := (~table.isfinite()).nonzero().flatten().tolist():
            found.append(f"{name} at t = {_listed([str(t) for t in bad], 2)}")
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, T - 1])
    x0, noise = schedule.x0_and_noise(_exact_denoiser(schedule)(x, t), x, t)
    for row, level in enumerate((0, T - 1)):
        if not (x0[row].isfinite().all() and noise[row].isfinite().all()):
            found.append(f"x0_and_noise at t = {level}")
    return found


def _broken_samplers(schedule: NoiseSchedule) -> list[str]:
    "Samplers whose samples are not finite on a walk from the last level over some to level 0."
    levels = sorted({0, schedule.T - 1, *(k * (schedule.T - 1) // 8 for k in range(9))}, reverse=True)
    found = []
    for name, sampler in SAMPLERS.items():
        noise = SeededNoise([0, 1])
        try:
            steps = sampler(_exact_denoiser(schedule), noise.noise((1, 4, 4)), schedule, steps=levels, noise=noise)
            fine = last(steps).isfinite().all()
        except (ArithmeticError, ValueError):
            fine = False
        if not fine:
            found.append(name)
    return found


def check_ends(subject: _Subject) -> str | _Fault:
    "Whether everything is finite at the first and the last noise level."
    schedule = subject.schedule
    ends = [f"{value:.3g}" for table in (schedule.alpha, schedule.sigma) for value in table[[0, -1]].tolist()]
    told = f"{schedule.kind}, {schedule.prediction}: signal {ends[0]} to {ends[1]}, noise {ends[2]} to {ends[3]}"
    remedy = "take beta_start above 0 and beta_end below 1, such as 0.0015 and 0.0195"
    if broken := _broken_tables(schedule):
        cause = "level 0 has no noise at all" if schedule.sigma[0] == 0 else "the noise levels are no numbers there"
        return _Fault(f"{told}; not finite: {_listed(broken)}", f"{cause}: a division by 0 follows", remedy)
    if broken := _broken_samplers(schedule):
        return _Fault(f"{told}; not finite: {_listed(broken)}", "these samplers divide by 0 at an end", remedy)
    factor = schedule.sigma[-1].item() / schedule.alpha[-1].item() if schedule.prediction == "epsilon" else 1.0
    if factor > 1000:
        told = f"{told}; an error in the noise is multiplied by {factor:.3g} on the way to x0"
        cause = "hardly any signal is left at the last level, so no x0 follows from the noise"
        return _Fault(told, cause, "train with prediction='v' (or 'x0'), or end at more signal")
    return f"{told}; finite at both ends, with {', '.join(SAMPLERS)}"


def _curve(losses: Float[Tensor, "bins n"]) -> str:
    "A loss by range of levels, as text."
    return " ".join(f"{value:.3g}" for value in losses.mean(1).tolist())


def _gap(subject: _Subject) -> str:
    "The loss on training images beside that on held-out ones, as text; empty where there are no training images."
    if (found := subject.train_losses) is None:
        return ""
    held_out, train = (losses["own"].mean(0) for losses in (subject.losses, found))
    (a, error_a), (b, error_b) = _mean(held_out), _mean(train)
    overfits = a - b > max(3 * (error_a**2 + error_b**2) ** 0.5, 0.05 * a)
    return f"; mean {a:.4f}, {b:.4f} on training images" + ": it overfits" * overfits


def check_levels(subject: _Subject) -> str | _Fault:
    "The loss on held-out images by noise level."
    own, zero = subject.losses["own"], subject.losses["zero"]
    told = f"{subject.model.schedule.prediction}, from low to high noise: {_curve(own)}"
    if not own.isfinite().all():
        told = f"{told}, of {len(own.T)} held-out images"
        cause = (
            "the network's prediction is not finite; that is not overfitting, in which a loss rises and stays finite"
        )
        remedy = "go back to a checkpoint before it, with a smaller learning rate, and in bf16 or fp32 rather than fp16"
        return _Fault(told, cause, remedy)
    ranges, train = _ranges(subject.model.schedule.T, len(own)), None
    for k in range(len(own)):
        if (cause := _bad_level(own, zero, k)) is None:
            continue
        if train is None:
            train = subject.train_losses
        if train is not None and _bad_level(train["own"], train["zero"], k) is None:
            continue  # the same level is fine on training images: that is overfitting
        _need_steps(subject, f"{told}; at levels {ranges[k]} {cause}")
        return _Fault(told, f"at levels {ranges[k]} {cause}", _SPIKE)
    return _learned(subject, told)


_SPIKE = (
    "are these levels drawn in training, do t and noise of a sample belong together, is the schedule the training's?"
)


def _bad_level(own: Float[Tensor, "bins n"], zero: Float[Tensor, "bins n"], k: int) -> str | None:
    "What is wrong with the loss in one range of levels; None where nothing is."
    if own[k].mean() > 1.05 * zero[k].mean() and _excess(own[k] - zero[k]) > CERTAIN:
        return f"the prediction is worse than 0, whose loss is {zero[k].mean().item():.3g}"
    if not k:  # where there is hardly any noise, it is hard to tell
        return None
    near = max(own[j].mean().item() for j in (k - 1, k + 1) if j < len(own))
    if _excess(own[k] - 5 * near) > CERTAIN:
        return f"the loss is {own[k].mean().item() / near:.0f} times that of the levels beside"
    return None


def _ranges(T: int, bins: int) -> list[str]:
    "The levels of each range, as text."
    return [f"{k * T // bins} to {(k + 1) * T // bins - 1}" for k in range(bins)]


def _learned(subject: _Subject, told: str) -> str | _Fault:
    "Whether the network is better than 0 where that is easy: for the noise where nearly all is noise."
    own, zero = subject.losses["own"], subject.losses["zero"]
    if subject.model.schedule.prediction == "epsilon":
        own, zero = own[-1:], zero[-1:]
    if own.mean() > 0.98 * zero.mean():
        told = f"{told}, {own.mean().item():.3g} where 0 has {zero.mean().item():.3g}"
        _need_steps(subject, told)
        cause = (
            f"after {_steps_done(subject)} steps the network is not better than the answer 0, even where that is easy"
        )
        return _Fault(
            told, cause, "is the learning rate above 0, is the target the noise that was added, are weights loaded?"
        )
    return told + _gap(subject)


# --- 10: memorised images ---


@torch.no_grad()
def _samples(subject: _Subject) -> Float[Tensor, "n c h w"]:
    "A sample for the condition of each held-out image, unguided."
    model, n = subject.model, len(subject.z)
    noise = SeededNoise(range(subject.seed, subject.seed + n)).noise(subject.z.shape[1:]).to(subject.z)
    cond, found = subject.conditions["own"], []
    for i in range(0, n, CHUNK):
        rows = slice(i, i + CHUNK)
        own = None if cond is None else cond[rows]
        found.append(last(ddim(model.unet, noise[rows], model.schedule, min(STEPS, model.schedule.T), own)))
    return torch.cat(found)


def _train_latents(subject: _Subject) -> Float[Tensor, "m c h w"]:
    "Latents of training images, rescaled: the run's own, else of the first images."
    if (cached := subject.cached("train")) is not None:
        notes = load_notes(cast(Path, subject.folder) / "latents" / "train.safetensors")
        if notes.get("first_stage") == weights_checksum(subject.first_stage):
            return (subject.first_stage.scale_factor * cached[0].mean).to(subject.device)
    return subject.encode(subject.train["image"])


def check_memorised(subject: _Subject) -> str | _Fault:
    """Whether samples are copies of training images.

    A sample counts as one where its nearest training latent is less than half as far as is usual for a held-out image.
    Blurred samples are nearer to everything, but not by half: an image without details is 0.7 times as far.
    """
    if not subject.losses["own"].isfinite().all():
        raise _Skipped("the loss is not finite: see 'loss by level'")
    train, drawn = _train_latents(subject).flatten(1), _samples(subject).flatten(1)
    if not drawn.isfinite().all():
        raise _Skipped("the samples are not finite: see 'loss by level'")
    mine, real = (torch.cdist(z, train).amin(1).cpu() for z in (drawn, subject.z.flatten(1)))
    usual, distinct = real.median().item(), len(train.round(decimals=4).unique(dim=0))
    copies, chance = ((each < 0.5 * usual).float() for each in (mine, real))
    told = f"nearest of {len(train)} training images ({distinct} distinct): {mine.median().item() / usual:.2f} times as far"
    told = f"{told} as for held-out ones; less than half as far: {int(copies.sum())} of {len(mine)} samples,"
    told = f"{told} {int(chance.sum())} of the held-out ones"
    more = copies.mean().item() - chance.mean().item()
    if more >= 0.2 and _excess(copies - chance) > CERTAIN:
        cause = (
            f"the model has memorised training images: {distinct} distinct ones are few for so many weights or steps"
        )
        remedy = "more images (or mirrored and cropped ones), fewer steps (keep='best'), a smaller UNet"
        return _Fault(told, cause, remedy)
    return told


# --- All checks ---

CHECKS: dict[str, Callable[[_Subject], str | _Fault]] = {
    "latents": check_spread,
    "scale factor": check_scale,
    "condition heard": check_heard,
    "condition dropped": check_dropped,
    "averaged weights": check_average,
    "weights move": check_moved,
    "discriminator": check_discriminator,
    "ends of the schedule": check_ends,
    "loss by level": check_levels,
    "memorised images": check_memorised,
}


# Those that measure the finished model of a run, if that is not older than its checkpoints.
OF_THE_MODEL = ("latents", "scale factor", "condition heard", "condition dropped", "loss by level", "memorised images")


def _finding(name: str, check: Callable[[_Subject], str | _Fault], subject: _Subject) -> Finding:
    "What a check says."
    try:
        said = check(subject)
    except _Skipped as skipped:
        return Finding(name, skipped.verdict, str(skipped))
    fault = _Fault(said, "", "") if isinstance(said, str) else said
    told = fault.measured + subject.older * (name in OF_THE_MODEL)
    return Finding(name, "passed" if isinstance(said, str) else "failed", told, fault.cause, fault.remedy)


@torch.no_grad()
def examine(
    run_or_model: str | Path | LatentDiffusion | FirstStage,  # a run's folder, a model's folder or name, or a model
    data_dir: str | Path | None = None,  # where the data of the recipe lie; toy data need none
    weights_dir: str | Path | None = None,  # where the weights of LPIPS lie, if the recipe wants it
    n: int = 64,  # held-out images to measure on; fewer where there are fewer
    device: str | torch.device | None = None,  # None: the best one there is
    seed: int = 0,  # of noise and samples
) -> list[Finding]:
    """Look for ten usual faults of a training run or a model; nothing is written.

    LDMError where there is no run or model, or names a file that is damaged. A run may be unfinished: what its
    checkpoints and data do not allow is not done, and the finding says why.
    """
    n = check_count("n", n, 2, 4096)
    seed = check_count("seed", seed, 0, MOST_SEED + 1 - 4 * n)
    where = device if isinstance(device, torch.device) else pick_device(device or "auto")
    options = RunOptions(data_dir=data_dir, weights_dir=weights_dir)
    with plainly():
        subject = _open(run_or_model, options, n, where, seed)
        subject.stages  # a damaged file is an error, not a finding
        return [_finding(name, check, subject) for name, check in CHECKS.items()]
