"""Does a model use its condition? Its loss with the right condition, with another image's, and with none."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_edu.basics import progress
from ldm_edu.checks import MOST_SEED, check_count
from ldm_edu.conditioning.condition import Condition, read_key
from ldm_edu.diffusion.sampling import SeededNoise
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.reconstruction import Mean
from ldm_edu.latent_diffusion import LatentDiffusion

__all__ = ["ConditionScores", "score_condition"]


@dataclass(frozen=True)
class ConditionScores:
    "The diffusion loss of the same noisy latents under three conditions; differences are paired, image by image."

    own: Mean  # with the image's own condition
    other: Mean  # how much higher it is with the condition of another image: near 0, the model does not use it
    null: Mean | None  # how much higher it is without; None: the condition is never dropped
    images: int

    def __str__(self) -> str:
        null = "never dropped" if self.null is None else f"+ {self.null}"
        lines = {"loss": self.own, "with another image's condition": f"+ {self.other}", "without condition": null}
        return "\n".join(f"{name:32s} {value}" for name, value in lines.items())


def _losses(model: LatentDiffusion, z: Tensor, t: Tensor, noise: Tensor, cond: Condition) -> Tensor:
    "The squared error of each image (b,), averaged over its numbers."
    x_t = model.schedule.q_sample(z, t, noise)
    error = model.unet(x_t, t, cond) - model.schedule.target(z, noise, t)
    return error.square().flatten(1).mean(1)


@torch.no_grad()
def score_condition(
    model: LatentDiffusion,
    batch: Mapping[str, Any],  # `image` (b, 3, h, w) in [−1, 1], and what the conditioner reads; b is at least 2
    levels: int = 8,  # noise levels at which each image is asked, spread evenly over all
    seed: int = 0,  # image i has its noise from seed + i
) -> ConditionScores:
    "How much the loss of eq. 3 depends on the condition, for a conditioner of any kind; LDMError where there is none."
    if model.conditioner is None:
        raise LDMError("model: it is unconditional, so there is no condition that it could use")
    levels = check_count("levels", levels, 1, model.schedule.T)
    image = read_key(batch, "image").to(model.device)
    if (b := len(image)) < 2:
        raise LDMError(f"batch: has {b} image, but the condition of another image is needed: give at least 2")
    seed = check_count("seed", seed, 0, MOST_SEED + 1 - b)
    z = model.first_stage.encode(image)
    _, own = model.denoiser(batch, 1.0)
    if own is None or len(own) != b:
        raise LDMError(f"batch: {b} images, but the conditioner reads {len(own or Condition())} conditions of it")
    null = model.conditioner.null()
    conditions = {"own": own, "other": own[torch.arange(b).roll(1)]}
    if null.slots():
        conditions["null"] = own.dropped(null)

    noise, losses = SeededNoise(range(seed, seed + b)), {name: torch.zeros(b) for name in conditions}
    for k in progress(range(levels), "noise levels"):
        t = torch.full((b,), int((k + 0.5) * model.schedule.T / levels), device=image.device)
        eps = noise.noise(z.shape[1:]).to(z)
        for name, cond in conditions.items():
            losses[name] += _losses(model, z, t, eps, cond).float().cpu() / levels
    more = {name: Mean.of(values - losses["own"], digits=5) for name, values in losses.items()}
    return ConditionScores(Mean.of(losses["own"], digits=5), more["other"], more.get("null"), b)
