"""Networks with their losses, as the training loop takes them."""

import torch
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from jaxtyping import Float
from pathlib import Path
from torch import Tensor, nn
from typing import Any
from ldm_edu.conditioning.guidance import drop
from ldm_edu.conditioning.text import TextConditioner
from ldm_edu.data.toy.captions import VOCABULARY
from ldm_edu.denoiser.unet import UNet
from ldm_edu.diffusion.schedule import NoiseSchedule, diffusion_loss
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.metrics import LPIPS
from ldm_edu.first_stage.adversarial import Adversary, PatchDiscriminator
from ldm_edu.first_stage.autoencoder import AutoencoderKL, FirstStage
from ldm_edu.first_stage.losses import FirstStageLoss
from ldm_edu.first_stage.quantization import AutoencoderVQ
from ldm_edu.training.recipes import FirstStageRecipe, Recipe

def build_first_stage(recipe: FirstStageRecipe) -> FirstStage:
    "The untrained first stage of a recipe."
    shape = {
        name: getattr(recipe, name)
        for name in ("channels", "multipliers", "blocks", "latent_channels", "attention", "attention_factors", "groups")
    }
    if recipe.regulariser == "kl":
        return AutoencoderKL(**shape)
    return AutoencoderVQ(**shape, num_codes=recipe.num_codes, commitment=recipe.commitment, legacy=recipe.legacy)


def perceptual_distance(
    name: str | None,  # one of PERCEPTUAL, or None
    weights_dir: str | Path | None = None,  # where the weights of LPIPS lie; see 13_metrics
) -> nn.Module | None:
    "The network whose distance a first stage is trained with; it is not trained itself."
    if name is None:
        return None
    net = name.removeprefix("lpips-")
    found = ToyFeatures.from_pretrained(name) if name == "toy-features" else LPIPS(net, weights_dir)
    return found.eval().requires_grad_(False)


class FirstStageTask(nn.Module):
    "A first stage with its loss: batch `image` (b, 3, h, w), `latent_noise` and `step` to a loss (§ 3.1, eq. 25)."

    def __init__(
        self,
        recipe: FirstStageRecipe,
        perceptual: nn.Module | None = None,  # see `perceptual_distance`
        average: Callable[[Tensor], Tensor] = lambda gradient: gradient,  # over processes, for the adaptive weight
    ):
        super().__init__()
        self.model, game = build_first_stage(recipe), recipe.adversarial
        self.criterion = FirstStageLoss(
            recipe.kl_weight, recipe.l2_weight, perceptual and getattr(perceptual, "distance", perceptual),
            recipe.perceptual_weight, recipe.codebook_weight, means=recipe.regulariser == "vq",
        )  # fmt: skip
        self.adversary, self.average, self.start = None, average, game and game.start
        if game is not None:
            self.adversary = Adversary(PatchDiscriminator(game.channels, game.layers, game.norm), game.weight)

    def clip_groups(self) -> list[nn.Module]:
        "Networks whose gradients are clipped apart."
        return [self.model] if self.adversary is None else [self.model, self.adversary]

    def forward(self, batch: Mapping[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        "Encode, draw or quantise, decode, compare; the discriminator speaks from its first step on, and in training only."
        x = batch["image"]
        reconstruction, regulariser = self.model(x, batch["latent_noise"])
        plays = self.adversary is not None and torch.is_grad_enabled() and int(batch["step"][0]) >= self.start
        game = partial(self.adversary, last_layer=self.model.last_layer, average=self.average) if plays else None
        loss, terms = self.criterion(x, reconstruction.to(x.dtype), regulariser, game)
        if self.adversary is not None and not plays:  # several processes wait for a gradient of every weight
            loss = loss + 0.0 * sum(weight.sum() for weight in self.adversary.parameters())
        return loss, terms


class DiffusionTask(nn.Module):
    "UNet and conditioner, trained jointly on latents `z` (eq. 2; with captions eq. 3)."

    def __init__(self, recipe: Recipe, vocabulary: Sequence[str] = VOCABULARY):
        super().__init__()
        what, c = recipe.diffusion, recipe.first_stage.latent_channels
        text = what.text
        self.conditioner = text and TextConditioner(vocabulary, text.length, text.dim, text.depth, text.heads)
        self.unet = UNet(
            c, c, what.channels, what.multipliers, what.blocks, what.attention_factors, what.head_channels,
            context_dim=text and text.dim,
        )  # fmt: skip
        self.schedule = NoiseSchedule(T=what.T, beta_start=what.beta_start, beta_end=what.beta_end)
        self.drop = what.drop

    def forward(self, batch: Mapping[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        "Condition, drop some conditions, predict the noise."
        cond = None
        if self.conditioner is not None:
            cond = drop(self.conditioner(batch), self.conditioner.null(), self.drop, batch["u"])
        loss = diffusion_loss(self.unet, self.schedule, batch["z"], batch["t"], batch["noise"], cond)
        return loss, {"mse": loss.detach()}
