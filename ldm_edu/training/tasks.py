"""Networks with their losses, as the training loop takes them."""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm_edu.checkpoints import find_class, weights_checksum
from ldm_edu.conditioning.condition import Conditioner, MergedConditioner
from ldm_edu.conditioning.guidance import drop, drop_apart
from ldm_edu.denoiser.unet import UNet
from ldm_edu.diffusion.schedule import NoiseSchedule, diffusion_loss
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.metrics import LPIPS
from ldm_edu.first_stage.adversarial import Adversary, PatchDiscriminator
from ldm_edu.first_stage.autoencoder import AutoencoderKL, FirstStage
from ldm_edu.first_stage.losses import FirstStageLoss
from ldm_edu.first_stage.quantization import AutoencoderVQ, IdentityFirstStage, load_first_stage
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.training.recipes import ConditionerRecipe, DiffusionRecipe, FirstStageRecipe, Recipe

__all__ = ["DiffusionTask", "FirstStageTask"]

# The UNet's arguments for the slots of a condition, where there is none.
EMPTY: dict[str, Any] = {"context_dim": None, "concat_channels": 0, "vector_dim": None}

# The fields of a diffusion recipe that are arguments of its UNet; the others follow from the parts around it.
UNET = ("channels", "multipliers", "blocks", "attention_factors", "head_channels", "heads", "transformer_depth")
UNET += ("dropout", "scale_shift_norm", "resblock_updown", "linear_projection")

# The fields of a first stage's recipe that are arguments of its network, whatever its regulariser.
SHAPE = ("channels", "multipliers", "blocks", "latent_channels", "attention", "attention_factors", "groups")


def build_first_stage(recipe: FirstStageRecipe) -> FirstStage:
    "The untrained first stage of a recipe."
    if recipe.regulariser == "none":
        return IdentityFirstStage()
    shape = {name: getattr(recipe, name) for name in SHAPE}
    if recipe.regulariser == "kl":
        model = AutoencoderKL(**shape)
        bias = cast(Tensor, model.quant_conv.bias)
        with torch.no_grad():
            bias[recipe.latent_channels :] += recipe.first_logvar  # the second half of its outputs
        return model
    return AutoencoderVQ(**shape, num_codes=recipe.num_codes, commitment=recipe.commitment, legacy=recipe.legacy)


def perceptual_distance(
    name: str | None,  # one of PERCEPTUAL, or None
    weights_dir: str | Path | None = None,  # where the weights of LPIPS lie; see 13_metrics
) -> ToyFeatures | LPIPS | None:
    "The network whose `distance` a first stage is trained with; its own weights are not trained."
    if name is None:
        return None
    if name == "toy-features":
        found = ToyFeatures.from_pretrained(name)
    else:
        found = LPIPS(name.removeprefix("lpips-"), weights_dir)
    return found.eval().requires_grad_(False)


class FirstStageTask(nn.Module):
    "A first stage with its loss: batch `image` (b, 3, h, w), `latent_noise` and the number `step` to a loss (eq. 25)."

    def __init__(
        self,
        recipe: FirstStageRecipe,
        perceptual: ToyFeatures | LPIPS | None = None,  # see `perceptual_distance`
        average: Callable[[Tensor], Tensor] = lambda gradient: gradient,  # over processes, for the adaptive weight
    ):
        super().__init__()
        self.model = build_first_stage(recipe)
        self.criterion = FirstStageLoss(
            kl_weight=recipe.kl_weight,
            l2_weight=recipe.l2_weight,
            l1_weight=recipe.l1_weight,
            perceptual=None if perceptual is None else perceptual.distance,
            perceptual_weight=recipe.perceptual_weight,
            codebook_weight=recipe.codebook_weight,
            means=recipe.regulariser == "vq",
        )
        self.average = average
        self.adversary: Adversary | None = None
        self.start = 0
        if (how := recipe.adversarial) is not None:
            self.adversary = Adversary(PatchDiscriminator(how.channels, how.layers, how.norm), how.weight)
            self.start = how.start

    def clip_groups(self) -> list[nn.Module]:
        "Networks whose gradients are clipped apart."
        return [self.model] if self.adversary is None else [self.model, self.adversary]

    def uses_adversary(self, step: int) -> bool:
        "The discriminator is used from step `start` on, and only while training."
        return self.adversary is not None and torch.is_grad_enabled() and step >= self.start

    def forward(self, batch: Mapping[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        "Encode, draw or quantise, decode, compare; the loss and its terms."
        x = batch["image"]
        reconstruction, regulariser = self.model(x, batch["latent_noise"])
        adversary = None
        if self.adversary is not None and self.uses_adversary(batch["step"]):
            adversary = partial(self.adversary, last_layer=self.model.last_layer, average=self.average)
        loss, terms = self.criterion(x, reconstruction.to(x.dtype), regulariser, adversary)

        # Several processes wait for a gradient of every weight: an unused discriminator gets zeros.
        if self.adversary is not None and adversary is None:
            loss = loss + 0.0 * sum(weight.sum() for weight in self.adversary.parameters())
        return loss, terms


def no_column(key: str) -> Any:
    "The column of a data set that is not there."
    raise LDMError(
        f"the training data decide a part of this conditioner, their '{key}': it cannot be built without them"
    )


def conditioner_class(name: str) -> type[Conditioner]:
    "The class of that name; `CheckpointError` where no imported module defines it."
    return find_class(Conditioner, name)


def _build_line(
    line: ConditionerRecipe, column: Callable[[str], Any], first_stage: Callable[[], FirstStage] | None = None
) -> Conditioner:
    "The untrained conditioner of one line of a recipe; one that asks for a first stage gets the model's own."
    cls = conditioner_class(line.name)
    try:
        arguments = dict(cls.complete(line.arguments, column))
        if first_stage is not None and "first_stage" in signature(cls).parameters:
            arguments.setdefault("first_stage", first_stage())
        return cls(**arguments)
    except TypeError as error:
        raise LDMError(f"conditioner {line.name}: {error}") from error


def conditioner_keys(recipe: DiffusionRecipe) -> tuple[str, ...]:
    "The keys of a batch that a recipe's conditioners read."
    found: list[str] = []
    for line in recipe.conditioners:
        keys = conditioner_class(line.name).keys_of(line.arguments)
        try:  # they may depend on the arguments
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                keys = _build_line(line, no_column).keys
        except Exception:  # it needs the data, or cannot be built on "meta": its class has to say
            pass
        if isinstance(keys, str):
            raise LDMError(f"{line.name}.keys should be a tuple of keys, ({keys!r},) rather than {keys!r}")
        found += keys
    return tuple(dict.fromkeys(found))


def build_conditioner(
    recipe: DiffusionRecipe,
    column: Callable[[str], Any] = no_column,  # key -> all values of the training data, for a vocabulary
    first_stage: Callable[[], FirstStage] | None = None,  # gives the model's, to a conditioner that reads latents
) -> Conditioner | None:
    "The untrained conditioner of a recipe: several are merged, None where there is none."
    parts = [_build_line(line, column, first_stage) for line in recipe.conditioners]
    if len(parts) < 2:
        return parts[0] if parts else None
    return MergedConditioner(parts)


def _check_saved(recipe: Recipe, found: LatentDiffusion) -> None:
    "LDMError where a saved model is not one with whose UNet the training of a recipe can begin."
    what, name = recipe.diffusion, recipe.diffusion.pretrained
    if found.conditioner is not None:
        told = f"'{name}' reads {', '.join(found.conditioner.keys)}"
        raise LDMError(f"diffusion.pretrained: {told}, but a training begins with the UNet of an unconditional model")
    own = recipe.pretrained is not None and weights_checksum(load_first_stage(recipe.pretrained))
    if own != weights_checksum(found.first_stage):
        told = f"the UNet of '{name}' knows the latents of its own first stage"
        raise LDMError(f"diffusion.pretrained: {told}, so pretrained should name that one, not {recipe.pretrained}")
    for field in UNET:
        there, here = found.unet.config.get(field), getattr(what, field)
        same = set(there) == set(here) if field == "attention_factors" and there else there == here
        if field != "dropout" and not same:  # it has no weights
            raise LDMError(f"diffusion.pretrained: '{name}' has {field}={there}, but the recipe says {here}")
    ours = what.noise_schedule()
    for field, here in ours.config.items():
        if (there := found.schedule.config[field]) != here and not (field != "prediction" and same_levels(found, ours)):
            field = {"kind": "schedule"}.get(field, field)
            raise LDMError(f"diffusion.pretrained: '{name}' has {field}={there}, but the recipe says {here}")


def same_levels(model: LatentDiffusion, schedule: NoiseSchedule) -> bool:
    "Has a model the noise levels of a schedule?"
    return model.schedule.T == schedule.T and torch.equal(model.schedule.alpha, schedule.alpha)


def pretrained_unet(recipe: Recipe) -> UNet | None:
    "The saved UNet with which a recipe's training begins; `LDMError` where it is not what the recipe describes."
    if recipe.diffusion.pretrained is None:
        return None
    try:
        found = LatentDiffusion.from_pretrained(recipe.diffusion.pretrained)
    except LDMError as error:
        raise type(error)(f"diffusion.pretrained: {error}") from error
    _check_saved(recipe, found)
    return found.unet


@torch.no_grad()
def begin_with(unet: UNet, saved: UNet) -> None:
    """Copy the weights of a saved UNet; input channels that it lacks begin at zero, so at first they change nothing.

    LDMError where anything else differs, such as cross-attention.
    """
    old, new = saved.state_dict(), unet.state_dict()
    if other := [*(name for name in new if name not in old), *(name for name in old if name not in new)]:
        whose = "this one has" if other[0] in new else "the saved one has"
        told = f"only {whose} '{other[0]}': conditions can be added that are stacked on the latent, and no others"
        raise LDMError(f"diffusion.pretrained: {told}")
    for name, here in new.items():
        there = old[name]
        if here.ndim == 4 and here.shape[1] > there.shape[1]:
            here.zero_()[:, : there.shape[1]].copy_(there)
        else:
            here.copy_(there)


class DiffusionTask(nn.Module):
    "UNet and conditioner, trained jointly on latents `z` (eq. 2; with a condition eq. 3)."

    def __init__(
        self,
        recipe: Recipe,
        conditioner: Conditioner | None = None,  # None: the one of the recipe
    ):
        super().__init__()
        what, c = recipe.diffusion, recipe.first_stage.latent_channels
        self.conditioner = build_conditioner(what) if conditioner is None else conditioner
        slots = {name: getattr(self.conditioner, name, default) for name, default in EMPTY.items()}
        self.unet = UNet(in_channels=c, out_channels=c, **{name: getattr(what, name) for name in UNET}, **slots)
        self.schedule = what.noise_schedule()
        self.drop, self.drop_apart = what.drop, what.drop_apart

    def forward(self, batch: Mapping[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        "Make the condition, drop it for some of the images, predict what the schedule says."
        cond = None
        if self.conditioner is not None:
            apart = isinstance(self.conditioner, MergedConditioner) and self.drop_apart > 0
            cond = (
                drop_apart(cast(MergedConditioner, self.conditioner), batch, self.drop_apart, batch["u_apart"])
                if apart
                else self.conditioner(batch)
            )
            if (null := self.conditioner.null()).slots():
                cond = drop(cond, null, self.drop, batch["u"])
        loss = diffusion_loss(self.unet, self.schedule, batch["z"], batch["t"], batch["noise"], cond)
        return loss, {"mse": loss.detach()}
