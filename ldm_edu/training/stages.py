"""The stages of a recipe: a first stage, and a diffusion model on its latents."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm_edu.checkpoints import weights_checksum
from ldm_edu.conditioning.condition import Conditioner
from ldm_edu.data.cache import SampleCache
from ldm_edu.display import grid
from ldm_edu.evaluation.metrics import psnr
from ldm_edu.first_stage.autoencoder import DiagonalGaussian, FirstStage, estimate_scale
from ldm_edu.first_stage.quantization import AutoencoderVQ, codebook_usage
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.training.data import (
    AnyImageRecipe,
    cached_split,
    column_of,
    condition_batch,
    data_checksum,
    num_train_images,
)
from ldm_edu.training.latents import cached_latents
from ldm_edu.training.loop import Stage, batch_indices, repetitions, step_randomness, to_device
from ldm_edu.training.recipes import Recipe, Training
from ldm_edu.training.run import Run
from ldm_edu.training.state import state_file
from ldm_edu.training.tasks import (
    DiffusionTask,
    FirstStageTask,
    begin_with,
    build_conditioner,
    perceptual_distance,
    pretrained_unet,
)

__all__ = ["DiffusionStage", "FirstStageStage"]


class ImageStage(Stage):
    "A stage that is trained on the images of a recipe's data set."

    def __init__(
        self,
        name: str,
        task: nn.Module,
        run: Run,
        recipe: AnyImageRecipe,
        training: Training,
        number: int,  # added to the recipe's seed
    ):
        super().__init__(name, task, training, recipe.seed + number)
        self.run, self.recipe = run, recipe
        self.train_data = cached_split(recipe, run, "train")
        self.held_out = cached_split(recipe, run, "validation")
        self.n = num_train_images(training, self.train_data)
        self.rows = range(min(training.held_out, len(self.held_out)))
        self.notes = {"images": data_checksum(self.train_data, self.held_out)}

    def samples(
        self,
        dataset: SampleCache,
        step: int,
        indices: Sequence[int],
        repeats: Sequence[int] | None = None,  # see `repetitions`
    ) -> dict[str, Any]:
        "A batch of these samples, with what is random about the step."
        raise NotImplementedError

    def batch(self, step: int) -> dict[str, Any]:
        "This process's share of the batch of a step."
        indices = batch_indices(self.seed, step, self.training.batch_size, self.n)
        return self.samples(self.train_data, step, self.run.shard(indices), self.run.shard(repetitions(indices)))

    def held_out_batch(self) -> dict[str, Any]:
        "The held-out samples on the device, with the randomness of step 0."
        return to_device(self.samples(self.held_out, 0, self.rows), self.run.accelerator)


class FirstStageStage(ImageStage):
    "The first stage of a recipe, with its scale factor (§ 3.1, eq. 25)."

    def __init__(
        self,
        recipe: AnyImageRecipe,
        run: Run,
        made: Mapping[str, nn.Module] = MappingProxyType({}),  # what earlier stages have made; here there is none
    ):
        what, accelerator = recipe.first_stage, run.accelerator
        torch.manual_seed(recipe.seed)
        perceptual = perceptual_distance(what.perceptual, run.options.weights_dir)
        perceptual = perceptual and perceptual.to(accelerator.device, accelerator.dtype)
        task = FirstStageTask(what, perceptual, lambda gradient: accelerator.over_processes(gradient, "mean"))
        super().__init__("first_stage", task, run, recipe, cast(Training, what.training), 0)
        self.some = self.train_data.images(range(min(512, self.n)))  # for codebook and scale factor
        if isinstance(task.model, AutoencoderVQ) and what.from_data:
            with torch.no_grad():
                task.model.quantize.init_from_data(task.model.encode(self.some))

    def samples(
        self, dataset: SampleCache, step: int, indices: Sequence[int], repeats: Sequence[int] | None = None
    ) -> dict[str, Any]:
        side = self.recipe.size // self.recipe.first_stage.f
        shape = (self.recipe.first_stage.latent_channels, side, side)
        random = step_randomness(self.seed, step, indices, shape, repeats=repeats)
        return random | {"step": step, "image": dataset.images(indices)}

    def validate(self, task: nn.Module) -> dict[str, float]:
        "The loss without a discriminator, PSNR in dB, and for a codebook how much of it is used."
        seen, model = self.held_out_batch(), cast(FirstStageTask, task).model
        back = model.reconstruct(seen["image"]).float().clamp(-1, 1)
        scores = {"held_out": task(seen)[0].item(), "psnr": psnr(back, seen["image"].float()).mean().item()}
        if isinstance(model, AutoencoderVQ):
            codes = model.quantize(model.encode(seen["image"])).indices
            usage = codebook_usage(codes, self.recipe.first_stage.num_codes)
            scores |= {"codes_used": usage.used, "perplexity": usage.perplexity}
        return scores

    def sample(self, task: nn.Module) -> Tensor:
        "Held-out images above, their reconstructions below."
        x = self.held_out.images(self.rows[:8]).to(self.run.accelerator.device)
        return grid(torch.cat([x, cast(FirstStageTask, task).model.reconstruct(x)]), columns=len(x))

    def finish(self, task: nn.Module) -> FirstStage:
        "The first stage; a KL stage with the scale factor of its latents."
        model, accelerator = cast(FirstStageTask, task).model, self.run.accelerator
        if self.recipe.first_stage.regulariser == "kl":
            torch.manual_seed(self.seed)  # the scale is estimated from draws
            model.scale_factor = estimate_scale(model, self.some.to(accelerator.device, accelerator.dtype))
        return model


class DiffusionStage(ImageStage):
    "UNet and conditioner of a recipe, on the latents of a first stage (eq. 2, eq. 3)."

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        made: Mapping[str, nn.Module],  # the trained `first_stage`, and `text`, the conditioner, if it had a warm start
    ):
        self.first_stage, self.what = cast(FirstStage, made["first_stage"]), recipe
        torch.manual_seed(recipe.seed + 1)
        dataset = cached_split(recipe, run, "train")
        conditioner = cast(Conditioner | None, made.get("text"))
        if conditioner is None:
            conditioner = build_conditioner(
                recipe.diffusion, lambda key: column_of(dataset, key), lambda: self.first_stage
            )
        task = DiffusionTask(recipe, conditioner)
        if not state_file(run, "diffusion").exists() and (saved := pretrained_unet(recipe)) is not None:
            begin_with(task.unet, saved)
        super().__init__("diffusion", task, run, recipe, recipe.diffusion.training, 1)
        self.keys = () if conditioner is None else conditioner.keys
        self.notes["first_stage"] = weights_checksum(self.first_stage)
        self.latents = {
            source: cached_latents(run.folder / "latents" / f"{name}.safetensors", self.first_stage, source, run, n)
            for name, source, n in (
                ("train", self.train_data, self.n),
                ("held_out", self.held_out, len(self.rows)),
            )
        }

    def samples(
        self, dataset: SampleCache, step: int, indices: Sequence[int], repeats: Sequence[int] | None = None
    ) -> dict[str, Any]:
        mean, logvar = (part[list(indices)] for part in self.latents[dataset])
        parts = len(self.what.diffusion.conditioners) if self.what.diffusion.drop_apart else 0
        random = step_randomness(self.seed, step, indices, mean.shape[1:], self.what.diffusion.T, repeats, parts)
        z = self.first_stage.scale_factor * DiagonalGaussian(mean, logvar).sample(random["latent_noise"])
        return random | {"z": z} | condition_batch(dataset, self.keys, indices, random["phrase"])

    def validate(self, task: nn.Module) -> dict[str, float]:
        "The loss of eq. 3."
        return {"held_out": task(self.held_out_batch())[0].item()}

    def finish(self, task: nn.Module) -> LatentDiffusion:
        "The model: first stage, UNet, schedule, conditioner."
        done = cast(DiffusionTask, task)
        return LatentDiffusion(self.first_stage, done.unet, done.schedule, done.conditioner, self.recipe.size)

    def sample(self, task: nn.Module) -> Tensor:
        "Eight samples, for the conditions of held-out samples if the model has any."
        model, rows = self.finish(task), self.rows[:8]
        batch = condition_batch(self.held_out, self.keys, rows)
        return grid(model.sample(batch or None, None if batch else 8, steps=min(25, self.what.diffusion.T)), columns=4)
