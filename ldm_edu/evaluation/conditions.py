"""Does a model use its condition? Its loss with the right condition, with another one, and with none."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm_edu.basics import progress
from ldm_edu.checks import MOST_SEED, check_count, check_images, shown
from ldm_edu.conditioning.condition import Condition
from ldm_edu.diffusion.sampling import SeededNoise
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.reconstruction import Mean
from ldm_edu.latent_diffusion import LatentDiffusion

__all__ = ["ConditionScores", "score_condition"]


@dataclass(frozen=True)
class ConditionScores:
    "The diffusion loss of the same noisy latents under three conditions; differences are paired, image by image."

    own: Mean  # with the image's own condition
    other: Mean  # how much higher it is with the other condition: near 0, the model does not hear the difference
    null: Mean | None  # how much higher it is without; None: the condition is never dropped
    moved: Mean  # how far the other condition moves the prediction: the root mean square of its change
    images: int

    def __str__(self) -> str:
        def more(value: Mean) -> str:
            return f"{'-' if value.value < 0 else '+'} {replace(value, value=abs(value.value))}"

        null = "never dropped" if self.null is None else more(self.null)
        lines = {"loss": self.own, "with the other condition": more(self.other), "without condition": null}
        lines |= {"the prediction moves by": self.moved}
        return "\n".join(f"{name:32s} {value}" for name, value in lines.items())


def _conditions(model: LatentDiffusion, batch: Mapping[str, Any], other: Mapping[str, Any] | None) -> dict[str, Any]:
    "The conditions that are compared, by name, each with a row for every image of the batch."
    assert model.conditioner is not None
    b, null = len(batch["image"]), model.conditioner.null()
    own = _read(model, "batch", batch, b)
    conditions = {
        "own": own,
        "other": own[torch.arange(b).roll(1)] if other is None else _read(model, "other", other, b),
    }
    if null.slots():
        conditions["null"] = own.dropped(null)
    return conditions


def _read(model: LatentDiffusion, name: str, batch: Mapping[str, Any], b: int) -> Condition:
    "The conditions that the model reads of a batch; LDMError names the argument where there are not b of them."
    if not isinstance(batch, Mapping):
        raise LDMError(f"{name} should be a batch, a dict, not {shown(batch)}")
    try:
        cond = model.denoiser(batch, 1.0)[1]
    except LDMError as error:
        raise LDMError(f"{name}: {str(error).removeprefix('prompts: ')}") from error
    if cond is None or len(cond) != b:
        raise LDMError(f"{name}: {b} images, but the conditioner reads {len(cond or Condition())} conditions of it")
    return cond


@torch.no_grad()
def score_condition(
    model: LatentDiffusion,
    batch: Mapping[str, Any],  # `image` (b, 3, h, w) in [−1, 1], and what the conditioner reads; b is at least 2
    levels: int = 8,  # noise levels at which each image is asked, spread evenly over all
    seed: int = 0,  # image i has its noise from seed + i
    other: Mapping[str, Any] | None = None,  # b other conditions, as a batch; None: each image gets that of another
) -> ConditionScores:
    "How much the loss of eq. 3 depends on the condition, for a conditioner of any kind; LDMError where there is none."
    if model.conditioner is None:
        raise LDMError("model: it is unconditional, so there is no condition that it could use")
    levels = check_count("levels", levels, 1, model.schedule.T)
    image = batch.get("image") if isinstance(batch, Mapping) else None
    if not isinstance(image, Tensor):
        raise LDMError(f"batch should be a dict with 'image' (b, 3, h, w), not {shown(batch)}")
    check_images("batch['image']", image)
    if (b := len(image)) < 2:
        raise LDMError(f"batch: has {b} image, but errors of means and the condition of another image need at least 2")
    image = image.to(model.device)
    seed = check_count("seed", seed, 0, MOST_SEED + 1 - b)
    z, conditions = model.first_stage.encode(image), _conditions(model, batch, other)
    noise, moved = SeededNoise(range(seed, seed + b)), torch.zeros(b)
    losses = {name: torch.zeros(b) for name in conditions}
    for k in progress(range(levels), "noise levels"):
        t = torch.full((b,), int((k + 0.5) * model.schedule.T / levels), device=image.device)
        eps = noise.noise(z.shape[1:]).to(z)
        x_t, target = model.schedule.q_sample(z, t, eps), model.schedule.target(z, eps, t)
        # In float32: in bf16, small changes round to 0.
        said = {name: model.unet(x_t, t, cond).float() for name, cond in conditions.items()}
        for name, prediction in said.items():
            losses[name] += (prediction - target).square().flatten(1).mean(1).cpu() / levels
        moved += (said["other"] - said["own"]).square().flatten(1).mean(1).cpu() / levels
    more = {name: Mean.of(values - losses["own"], digits=5) for name, values in losses.items()}
    own, change = Mean.of(losses["own"], digits=5), Mean.of(moved.sqrt(), digits=5)
    return ConditionScores(own, more["other"], more.get("null"), change, b)
