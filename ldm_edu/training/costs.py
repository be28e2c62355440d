"""What a recipe costs: parameters, operations and memory, computed on PyTorch's meta device, where no number exists."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_edu.conditioning.condition import Condition, Conditioner
from ldm_edu.denoiser.unet import UNet
from ldm_edu.first_stage.autoencoder import FirstStage
from ldm_edu.training.recipes import Recipe
from ldm_edu.training.tasks import DiffusionTask, build_conditioner, build_first_stage

__all__ = ["Costs", "num_parameters", "recipe_costs"]

STATE = 5 * 4  # bytes for each trained number: weight, gradient, AdamW's two averages, EMA, in float32


@dataclass(frozen=True)
class Costs:
    "What a recipe costs; of the networks that are trained, operations and memory are those of the diffusion model."

    first_stage: int  # parameters
    conditioner: int  # parameters, without those of a first stage in it
    unet: int  # parameters
    flops: int  # operations of one pass of the UNet over one latent; a multiplication and an addition are two
    state_bytes: int  # weights, gradients, AdamW's averages and the EMA of what is trained, in float32
    sample_bytes: int  # what the UNet keeps of one sample for the backward pass, in float32; see `recipe_costs`

    def training_flops(self, recipe: Recipe) -> float:
        "Operations of all UNet steps: a backward pass costs two forward passes."
        training = recipe.diffusion.training
        return 3.0 * self.flops * training.batch_size * training.steps

    def training_bytes(self, recipe: Recipe) -> int:
        "Memory of a step of the UNet in float32: the state, and what is kept of every sample of a micro-batch."
        training = recipe.diffusion.training
        return self.state_bytes + self.sample_bytes * training.batch_size // training.accumulate


def num_parameters(module: nn.Module | None) -> int:
    "How many numbers a module has."
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _column(key: str) -> Any:
    "A column of training data that nobody has read: more words than any vocabulary takes, and one class."
    if key == "caption":
        return [f"word{i}" for i in range(50_000)]
    if key == "boxes":
        return [torch.zeros(1, 5, device="cpu")]
    return torch.zeros((1, 40) if key == "attributes" else 1, dtype=torch.long, device="cpu")


def _own_parameters(conditioner: Conditioner | None) -> list[nn.Parameter]:
    "The parameters of a conditioner, without those of a first stage that it reads latents with."
    if conditioner is None:
        return []
    stages = [module for module in conditioner.modules() if isinstance(module, FirstStage)]
    other = {id(p) for stage in stages for p in stage.parameters()}
    return [p for p in conditioner.parameters() if id(p) not in other]


def _untrained(recipe: Recipe, first_stage: FirstStage) -> Conditioner | None:
    "The conditioner of a recipe, in shapes."
    try:
        return build_conditioner(recipe.diffusion, _column, lambda: first_stage)
    except RuntimeError:  # it looks at numbers of the data, and on "meta" there are none
        with torch.device("cpu"):
            found = build_conditioner(recipe.diffusion, _column, lambda: build_first_stage(recipe.first_stage))
        return None if found is None else found.to("meta")


def _null(recipe: Recipe, conditioner: Conditioner) -> Condition:
    "The null of a conditioner, in shapes."
    try:
        return conditioner.null()
    except NotImplementedError:  # it looks at numbers on the way, and on "meta" there are none
        with torch.device("cpu"):
            real = build_conditioner(recipe.diffusion, _column)
            assert real is not None
            return real.null().to("meta")


def _condition(recipe: Recipe, conditioner: Conditioner | None, unet: UNet, side: int) -> Condition | None:
    "A condition of one sample, in shapes."
    if conditioner is None:
        return None
    null = _null(recipe, conditioner)
    if unet.concat_channels:
        return Condition(null.context, torch.empty(1, unet.concat_channels, side, side), null.vector)
    return null


class _Kept:
    "Adds up the bytes of what autograd keeps for the backward pass; each storage once, and no parameters."

    def __init__(self, module: nn.Module):
        self.known = {p.untyped_storage()._cdata for p in module.parameters()}
        self.alive: list[Tensor] = []  # a storage that is gone could give its place to another one
        self.bytes = 0

    def __call__(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.alive.append(x)
            self.bytes += storage.nbytes()
        return x


def recipe_costs(recipe: Recipe) -> Costs:
    """Parameters, operations and memory of a recipe's networks; `LDMError` where they cannot be built.

    `sample_bytes` counts attention with all of its weights kept. A fused kernel keeps less, so it is an upper bound.
    What only the data decide is assumed: one class, and as many words as a vocabulary takes.
    """
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        first_stage = build_first_stage(recipe.first_stage)
        conditioner = _untrained(recipe, first_stage)
        unet = DiffusionTask(recipe, conditioner).unet
        side = recipe.size // recipe.first_stage.f
        x, t = torch.empty(1, unet.in_channels, side, side), torch.zeros(1, dtype=torch.long)
        cond = _condition(recipe, conditioner, unet, side)
        kept = _Kept(unet)
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x), FlopCounterMode(display=False) as counter:
            unet(x, t, cond)
    own = _own_parameters(conditioner)
    return Costs(
        first_stage=num_parameters(first_stage),
        conditioner=sum(p.numel() for p in own),
        unet=num_parameters(unet),
        flops=counter.get_total_flops(),
        state_bytes=STATE * sum(p.numel() for p in [*unet.parameters(), *own] if p.requires_grad),
        sample_bytes=kept.bytes,
    )
