"""The loop of one stage that survives being killed, and the stages of a recipe, trained one after the other."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm_edu.basics import progress
from ldm_edu.checkpoints import load_json, load_tensors
from ldm_edu.data.cache import STATE_FILE, ImageCache, cached
from ldm_edu.data.registry import open_dataset
from ldm_edu.display import grid, save
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.metrics import psnr
from ldm_edu.first_stage.autoencoder import DiagonalGaussian, FirstStage, estimate_scale
from ldm_edu.first_stage.quantization import AutoencoderVQ, codebook_usage
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.training.latents import cached_latents
from ldm_edu.training.loop import batch_indices, optimise, prefetch, step_randomness, step_seed, to_device
from ldm_edu.training.recipes import AutoencoderRecipe, Recipe, Training, recipe_to_dict
from ldm_edu.training.run import Meter, Run, SignalGuard, open_run, plot_log, provenance, stage_trainings, writing
from ldm_edu.training.state import State, load_state, make_state, save_state, state_file
from ldm_edu.training.tasks import DiffusionTask, FirstStageTask, perceptual_distance

__all__ = ["run_stage", "train_autoencoder"]

T = TypeVar("T", bound=nn.Module)  # the task that is trained
HELD_OUT = 256  # images of the validation split on which a recipe's stages are measured


# One stage -----------------------------------------------------------------------------------------------------------


def log_scores(run: Run, stage: str, state: State, training: Training, scores: Mapping[str, float]) -> None:
    "A line in log.jsonl, and one for the reader where there is no progress bar."
    run.log(stage=stage, step=state.step, seconds=round(state.seconds, 1), **scores)
    if run.log_fn and run.accelerator.is_main_process:
        listed = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        left = state.seconds / state.step * (training.steps - state.step)
        run.log_fn(f"{stage} {state.step}/{training.steps}: {listed}, {left / 60:.1f} min left")


def mean_over_processes(run: Run, measured: Mapping[str, float]) -> dict[str, float]:
    "What this process has measured, but with the loss of whole batches: the mean over all processes."
    loss = torch.tensor(measured["loss"], dtype=run.accelerator.dtype, device=run.accelerator.device)
    return {**measured, "loss": run.accelerator.over_processes(loss, "mean").item()}


def measure(
    run: Run,
    state: State,
    validate: Callable[[Any], dict[str, float]] | None,
) -> tuple[dict[str, float], bool]:
    "Scores of the averaged weights, and whether their loss on held-out data is the lowest so far (main process only)."
    if validate is None or not run.accelerator.is_main_process:
        return {}, False
    with torch.no_grad(), run.accelerator.autocast():
        scores = validate(state.ema.module)
    improved = scores.get("held_out", math.inf) < state.best
    state.best = min(state.best, scores.get("held_out", math.inf))
    return scores, improved


def save_samples(run: Run, stage: str, state: State, sample: Callable[[Any], Tensor]) -> None:
    "Samples of the averaged weights, and the losses so far, as images in the run's folder."
    if not run.accelerator.is_main_process:
        return
    if run.accelerator.dtype == torch.float32:
        path = run.folder / "samples" / f"{stage}-{state.step:06d}.png"
        with torch.no_grad():
            image = sample(state.ema.module).float().cpu()
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            save(image, path)
    with writing(run.folder / "loss.png"):
        plot_log(run.read_log(), run.folder / "loss.png")


def kept_average(run: Run, stage: str, state: State, training: Training) -> nn.Module:
    "The averaged task that is kept, on all processes."
    run.accelerator.wait_for_everyone()
    best = state_file(run, stage, best=True)
    if training.keep == "best" and best.exists():
        averaged = {k.removeprefix("ema."): v for k, v in load_tensors(best).items() if k.startswith("ema.")}
        state.ema.module.load_state_dict(averaged)
    return state.ema.module


def run_stage(
    run: Run,
    stage: str,  # a word for the log and the checkpoint's name
    task: T,  # forward(batch) -> (loss, terms)
    training: Training,
    batch_at: Callable[[int], Mapping[str, Any]],  # step -> batch
    validate: Callable[[T], dict[str, float]] | None = None,  # scores of the average; `held_out` is a loss
    sample: Callable[[T], Tensor] | None = None,  # an image (3, h, w) of what the averaged task can do
    seed: int = 0,  # of dropout inside the network
) -> tuple[T, float]:
    "Train a task, from its checkpoint in the run's folder if there is one: the averaged task, the seconds spent."
    state, wrapped, optimizer = make_state(run, task, training)
    load_state(run, stage, state)
    run.cut_log(stage, state.step)
    sample_every = max(1, training.steps // 10) if run.sample_every is None else run.sample_every
    seconds_before, began = state.seconds, time.monotonic()
    saved = began

    meter = Meter(training.batch_size)
    bar = progress(prefetch(batch_at, state.step, training.steps), stage, training.steps - state.step)
    with SignalGuard() as guard:
        for step, batch in bar:
            meter.receive()
            torch.manual_seed(step_seed(seed, step, run.accelerator.process_index))
            loss = optimise(run.accelerator, wrapped, optimizer, training, batch, step)
            state.ema.update(state.task, step)
            state.step = step + 1
            state.seconds = seconds_before + time.monotonic() - began
            speed = meter.finish(loss)
            if postfix := getattr(bar, "set_postfix_str", None):  # a progress bar, not a bare iterator
                postfix(f"loss {loss:.4g}, {speed:.0f} images/s")

            end, improved = state.step == training.steps, False
            if state.step % run.every == 0 or end:
                measured = mean_over_processes(run, meter.read())
                scores, improved = measure(run, state, validate)
                log_scores(run, stage, state, training, measured | scores)
            if sample and sample_every and (state.step % sample_every == 0 or end):
                save_samples(run, stage, state, sample)

            stop = guard.any_process(run.accelerator)
            if improved or end or stop or time.monotonic() - saved > run.save_every:
                save_state(run, stage, state, improved)
                saved = time.monotonic()
            if stop:
                where = f"{stage} stopped after step {state.step}"
                raise KeyboardInterrupt(f"{where}, and saved: a resumed run goes on from there")
            meter.ask()
    return cast(T, kept_average(run, stage, state, training)), state.seconds


def final_scores(run: Run, task: T, validate: Callable[[T], dict[str, float]]) -> dict[str, float]:
    "The scores of a finished task."
    with torch.no_grad(), run.accelerator.autocast():
        return validate(task)


# Data ----------------------------------------------------------------------------------------------------------------


def num_train_images(training: Training, dataset: ImageCache) -> int:
    "How many of the images a stage is trained on."
    return len(dataset) if training.images is None else min(training.images, len(dataset))


def pick_captions(
    captions: Sequence[Sequence[str]] | None,  # of every image
    indices: Sequence[int],
    phrase: Float[Tensor, "b"],  # uniform in [0, 1): which of them
) -> dict[str, list[str]]:
    "One caption for each of the images; nothing where they have none."
    if captions is None:
        return {}
    return {"caption": [captions[i][int(u * len(captions[i]))] for i, u in zip(indices, phrase.tolist())]}


def cached_split(
    recipe: Recipe | AutoencoderRecipe,
    split: str,
    cache_dir: Path,
    data_dir: str | Path | None,
    n: int | None,
    run: Run,
) -> ImageCache:
    "The images of a split, from the cache; made there the first time, by one process."
    phrasings = {"keys": ("image", "captions")} if recipe.dataset == "toy" else {}  # all five captions of a scene
    dataset = open_dataset(recipe.dataset, data_dir, split, recipe.size, **phrasings)
    n = len(dataset) if n is None else min(n, len(dataset))
    mark = hashlib.sha256(json.dumps(dataset.identity(), sort_keys=True).encode()).hexdigest()[:8]
    with run.accelerator.main_process_first():
        return cached(dataset, cache_dir / f"{recipe.dataset}-{split}-{recipe.size}-{n}-{mark}", n)


def data_checksum(*caches: ImageCache) -> str:
    "A checksum of what caches hold, images and texts, so that a run does not go on with others."
    sums = [load_json(cache.folder / STATE_FILE)["sums"] for cache in caches]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def check_fit(recipe: Recipe | AutoencoderRecipe, sample: Mapping[str, Any]) -> None:
    "`LDMError` where the parts of a recipe do not fit each other, or one sample of its data; costs no memory."
    diffusion = recipe.diffusion if isinstance(recipe, Recipe) else None
    halvings = 2 ** (len(diffusion.multipliers) - 1) if diffusion else 1
    if recipe.size % (recipe.first_stage.f * halvings):
        raise LDMError(f"size={recipe.size} cannot be halved as often as the networks do; try a power of two")
    with torch.device("meta"):
        FirstStageTask(recipe.first_stage)
        task = DiffusionTask(recipe) if isinstance(recipe, Recipe) else None
    if diffusion and diffusion.text and "caption" not in sample:
        raise LDMError(f"the recipe has text, but the data set '{recipe.dataset}' has no captions")
    if task and task.conditioner is not None:
        task.conditioner.tokenizer.encode(sample["caption"])


def load_data(
    recipe: Recipe | AutoencoderRecipe,
    folder: str | Path,
    data_dir: str | Path | None,
    cache_dir: str | Path | None,
    **how: Any,
) -> tuple[Run, ImageCache, ImageCache]:
    "Check that recipe and data fit, open the run, put the images into the cache: those of training, and held-out ones."
    check_fit(recipe, open_dataset(recipe.dataset, data_dir, "train", recipe.size)[0])
    run = open_run(recipe, folder, **how)
    cache = Path(cache_dir) if cache_dir else run.folder / "cache"
    wanted = [training.images for training in stage_trainings(recipe)]
    most = None if None in wanted else max(n for n in wanted if n is not None)
    dataset = cached_split(recipe, "train", cache, data_dir, most, run)
    held_out = cached_split(recipe, "validation", cache, data_dir, HELD_OUT, run)
    run.notes = {**run.notes, "images": data_checksum(dataset, held_out)}
    return run, dataset, held_out


# The first stage -----------------------------------------------------------------------------------------------------


def train_first_stage(
    recipe: Recipe | AutoencoderRecipe,
    run: Run,
    dataset: ImageCache,
    held_out: ImageCache,
    weights_dir: str | Path | None = None,  # where the weights of LPIPS lie, if the recipe wants it
) -> tuple[FirstStage, dict[str, Any]]:
    "The first stage of a recipe, with its scale factor; and how it was made."
    if run.compile and recipe.first_stage.adversarial:
        raise LDMError(
            "compile: the adaptive weight needs a gradient in mid-step, which a compiled network cannot give"
        )
    torch.manual_seed(recipe.seed)
    what, accelerator = recipe.first_stage, run.accelerator
    perceptual = perceptual_distance(what.perceptual, weights_dir)
    perceptual = perceptual and perceptual.to(accelerator.device, accelerator.dtype)
    task = FirstStageTask(what, perceptual, lambda gradient: accelerator.over_processes(gradient, "mean"))
    n = num_train_images(what.training, dataset)
    side = recipe.size // what.f
    shape = (what.latent_channels, side, side)
    rows = range(min(64, len(held_out)))

    def batch(source: ImageCache, step: int, indices: Sequence[int]) -> dict[str, Any]:
        times = {"step": torch.full((len(indices),), step)}
        return step_randomness(recipe.seed, step, indices, shape) | times | {"image": source.images(indices)}

    def batch_at(step: int) -> dict[str, Any]:
        return batch(dataset, step, run.shard(batch_indices(recipe.seed, step, what.training.batch_size, n)))

    def validate(task: FirstStageTask) -> dict[str, float]:
        seen = to_device(batch(held_out, 0, rows), accelerator)
        back = task.model.reconstruct(seen["image"]).float().clamp(-1, 1)
        scores = {"held_out": task(seen)[0].item(), "psnr": psnr(back, seen["image"].float()).mean().item()}
        if isinstance(task.model, AutoencoderVQ):
            usage = codebook_usage(task.model.quantize(task.model.encode(seen["image"])).indices, what.num_codes)
            scores |= {"codes_used": usage.used, "perplexity": usage.perplexity}
        return scores

    def sample(task: FirstStageTask) -> Tensor:
        x = held_out.images(rows[:8]).to(accelerator.device)
        return grid(torch.cat([x, task.model.reconstruct(x)]), columns=len(x))

    some = dataset.images(range(min(512, n)))
    if isinstance(task.model, AutoencoderVQ) and what.from_data:
        with torch.no_grad():
            task.model.quantize.init_from_data(task.model.encode(some))
    task, seconds = run_stage(run, "first_stage", task, what.training, batch_at, validate, sample, recipe.seed)
    if what.regulariser == "kl":
        torch.manual_seed(recipe.seed)  # the scale is estimated from draws
        task.model.scale_factor = estimate_scale(task.model, some.to(accelerator.device, accelerator.dtype))
    return task.model, provenance(run, what.training, seconds, final_scores(run, task, validate))


# The diffusion model -------------------------------------------------------------------------------------------------


def train_diffusion(
    recipe: Recipe, run: Run, first_stage: FirstStage, dataset: ImageCache, held_out: ImageCache
) -> tuple[DiffusionTask, dict[str, Any]]:
    "UNet and conditioner of a recipe, on the latents of `first_stage`; and how they were made."
    seed, training = recipe.seed + 1, recipe.diffusion.training
    torch.manual_seed(seed)
    task = DiffusionTask(recipe)
    n = num_train_images(training, dataset)
    scale = first_stage.scale_factor
    latents = {
        name: cached_latents(run.folder / "latents" / f"{name}.safetensors", first_stage, source, run.accelerator, k)
        for name, source, k in (("train", dataset, n), ("held_out", held_out, None))
    }
    captions = {"train": dataset.captions, "held_out": held_out.captions}
    rows = range(len(held_out))

    def batch(name: str, step: int, indices: Sequence[int]) -> dict[str, Any]:
        mean, logvar = (part[list(indices)] for part in latents[name])
        random = step_randomness(seed, step, indices, mean.shape[1:], recipe.diffusion.T)
        z = scale * DiagonalGaussian(mean, logvar).sample(random["latent_noise"])
        return random | {"z": z} | pick_captions(captions[name], indices, random["phrase"])

    def batch_at(step: int) -> dict[str, Any]:
        return batch("train", step, run.shard(batch_indices(seed, step, training.batch_size, n)))

    def validate(task: DiffusionTask) -> dict[str, float]:
        return {"held_out": task(to_device(batch("held_out", 0, rows), run.accelerator))[0].item()}

    def sample(task: DiffusionTask) -> Tensor:
        model = LatentDiffusion(first_stage, task.unet, task.schedule, task.conditioner, recipe.size)
        prompts = [texts[0] for texts in (held_out.captions or [])[:8]] if task.conditioner else None
        return grid(model.sample(prompts, None if prompts else 8, steps=25), columns=4)

    task, seconds = run_stage(run, "diffusion", task, training, batch_at, validate, sample, seed)
    return task, provenance(run, training, seconds, final_scores(run, task, validate))


# Whole recipes -------------------------------------------------------------------------------------------------------


def train_latent_diffusion(
    recipe: Recipe,
    folder: str | Path,  # of the run; made if it is not there
    data_dir: str | Path | None = None,  # where the data set lies; toy scenes need none
    cache_dir: str | Path | None = None,  # where images are kept; runs may share it. None: in the run's folder
    weights_dir: str | Path | None = None,  # where the weights of LPIPS lie, if the recipe wants it
    **how: Any,  # device, precision, resume, every, …: see `open_run`
) -> LatentDiffusion:
    "Train both stages of a recipe. The model is also saved to `folder`/model."
    run, dataset, held_out = load_data(recipe, folder, data_dir, cache_dir, **how)
    first_stage, about_first = train_first_stage(recipe, run, dataset, held_out, weights_dir)
    task, about_second = train_diffusion(recipe, run, first_stage, dataset, held_out)
    history = {
        "recipe": recipe_to_dict(recipe),
        "first_stage": about_first,
        "diffusion": about_second,
        "torch": torch.__version__,
    }
    model = LatentDiffusion(first_stage, task.unet, task.schedule, task.conditioner, recipe.size, history)
    model.eval().float().requires_grad_(True)  # a moving average is not trained, but the model may be
    if run.accelerator.is_main_process:
        model.save_pretrained(run.folder / "model")
    return model


def train_autoencoder(
    recipe: AutoencoderRecipe,
    folder: str | Path,  # of the run; made if it is not there
    data_dir: str | Path | None = None,  # where the data set lies; toy scenes need none
    cache_dir: str | Path | None = None,  # where images are kept; runs may share it. None: in the run's folder
    weights_dir: str | Path | None = None,  # where the weights of LPIPS lie, if the recipe wants it
    **how: Any,  # device, precision, resume, every, …: see `open_run`
) -> FirstStage:
    "Train a first stage for itself. It is also saved to `folder`/model."
    run, dataset, held_out = load_data(recipe, folder, data_dir, cache_dir, **how)
    first_stage, about = train_first_stage(recipe, run, dataset, held_out, weights_dir)
    first_stage.provenance = {"recipe": recipe_to_dict(recipe), "torch": torch.__version__, **about}
    if run.accelerator.is_main_process:
        first_stage.eval().float().requires_grad_(True).save_pretrained(run.folder / "model")
    return first_stage
