"""What a recipe costs, against real modules, a count by hand, and what autograd keeps of real tensors."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import text, tiny
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_edu.conditioning.condition import Condition
from ldm_edu.denoiser.attention import AttentionBlock, CrossAttention
from ldm_edu.denoiser.unet import UNet
from ldm_edu.errors import LDMError
from ldm_edu.training.costs import Costs, num_parameters, recipe_costs
from ldm_edu.training.recipes import ConditionerRecipe, FirstStageRecipe, Recipe, find_recipe
from ldm_edu.training.tasks import DiffusionTask, build_conditioner, build_first_stage

sys.path.append(str(Path(__file__).parents[1] / "conditioning"))
importlib.import_module("own_conditioners")  # its classes can be named in a recipe

PIXELS = FirstStageRecipe(None, multipliers=(1,), latent_channels=3, regulariser="none")


def recipe(*conditioners: ConditionerRecipe, size: int = 16, first_stage: Any = None, **network: Any) -> Recipe:
    """A small model on pixels, or on the latents of a first stage."""
    shape = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_factors": (2,)} | network
    what = replace(tiny().diffusion, conditioners=conditioners, **shape)
    return replace(tiny(), size=size, first_stage=first_stage or PIXELS, diffusion=what)


def line(name: str, **arguments: Any) -> ConditionerRecipe:
    return ConditionerRecipe(name, arguments)


def unet_of(made: Recipe) -> UNet:
    """The real network."""
    return DiffusionTask(made, build_conditioner(made.diffusion)).unet


NETWORKS = {
    "plain": {},
    "attention everywhere": {"attention_factors": (1, 2), "heads": 4},
    "attention in the middle": {"attention_factors": ()},
    "two blocks": {"blocks": 2},
    "dropout": {"dropout": 0.1},
    "as churches": {"scale_shift_norm": True, "resblock_updown": True},
}
TEXT_NETWORKS = {"plain": {}, "deep": {"transformer_depth": 2}, "linear": {"linear_projection": True, "heads": 2}}
EVERY = [pytest.param((), network, id=name) for name, network in NETWORKS.items()]
EVERY += [pytest.param((text(),), network, id=f"text, {name}") for name, network in TEXT_NETWORKS.items()]


# Parameters and state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioners, network", EVERY)
def test_parameters_are_those_of_the_real_networks(conditioners, network):
    made = recipe(*conditioners, first_stage=tiny().first_stage, **network)
    conditioner, costs = build_conditioner(made.diffusion), recipe_costs(made)
    unet = DiffusionTask(made, conditioner).unet
    counted = [sum(p.numel() for p in module.parameters()) for module in (unet, build_first_stage(made.first_stage))]
    assert [costs.unet, costs.first_stage] == counted == [num_parameters(unet), costs.first_stage]
    assert costs.conditioner == sum(p.numel() for part in [conditioner] if part for p in part.parameters())
    assert costs.state_bytes == 20 * (costs.unet + costs.conditioner)


def test_nothing_has_no_parameters():
    assert num_parameters(None) == 0 and recipe_costs(recipe()).first_stage == 0 == recipe_costs(recipe()).conditioner


# Operations -----------------------------------------------------------------------------------------------------------


def by_hand(side: int, c: int = 32, d: int | None = None, tokens: int = 0) -> int:
    """Operations of a UNet of one level with one block and attention, for images of three channels.

    A line for each layer, multiplications; the sum is doubled. With d: a context of so many channels.
    """
    n, emb = side**2, 4 * c

    def res(c_in: int) -> int:
        convolutions = 9 * c_in * c * n + 9 * c * c * n + (c_in * c * n if c_in != c else 0)
        return convolutions + emb * c

    def attention() -> int:
        pairs = 2 * n * n * c  # queries times keys, weights times values
        if d is None:
            return 3 * c * c * n + pairs + c * c * n
        self_attention = 4 * c * c * n + pairs
        cross_attention = 2 * c * c * n + 2 * d * c * tokens + 2 * n * tokens * c
        feed_forward = c * 8 * c * n + 4 * c * c * n
        return 2 * c * c * n + self_attention + cross_attention + feed_forward

    time = c * emb + emb * emb
    down = 9 * 3 * c * n + res(c) + attention()
    middle = 2 * res(c) + attention()
    up = 2 * (res(2 * c) + attention())
    return 2 * (time + down + middle + up + 9 * c * 3 * n)


@pytest.mark.parametrize("side", [4, 8, 16])
def test_operations_are_those_that_are_counted_by_hand(side):
    one_level = {"multipliers": (1,), "attention_factors": (1,), "size": side}
    assert recipe_costs(recipe(**one_level)).flops == by_hand(side)
    assert recipe_costs(recipe(text(), **one_level)).flops == by_hand(side, d=32, tokens=24)


def counting(total: list[int]) -> Callable[[nn.Module, tuple, Tensor], None]:
    """A hook that adds up the multiplications of a layer, from the shapes that it sees."""

    def hook(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            positions = output.numel() // layer.weight.shape[0]
            total[0] += layer.weight.numel() * positions
        elif isinstance(layer, AttentionBlock | CrossAttention):
            x = inputs[0]
            n, c = (x.shape[2] * x.shape[3], x.shape[1]) if isinstance(layer, AttentionBlock) else x.shape[1:]
            context = inputs[1] if len(inputs) > 1 else None
            total[0] += 2 * n * (n if context is None else context.shape[1]) * c

    return hook


@pytest.mark.parametrize("conditioners, network", EVERY)
def test_operations_are_those_of_the_layers(conditioners, network):
    """Counted in hooks, in a real pass."""
    made = recipe(*conditioners, **network)
    unet, total = unet_of(made).eval(), [0]
    for layer in unet.modules():
        layer.register_forward_hook(counting(total))
    with torch.no_grad():
        unet(*real_input(unet, made.size))
    assert recipe_costs(made).flops == 2 * total[0]


def test_four_times_the_pixels_take_four_times_the_convolutions():
    """A little less, for the time is embedded once, and a little more, for the attention in the middle."""
    small, large = (recipe_costs(recipe(attention_factors=(), size=size)) for size in (16, 32))
    assert large.flops == pytest.approx(4 * small.flops, rel=0.06)
    assert large.sample_bytes == pytest.approx(4 * small.sample_bytes, rel=0.1)
    assert large.state_bytes == small.state_bytes


def test_the_latent_counts_and_not_the_image():
    on_latents = recipe_costs(recipe(first_stage=tiny().first_stage, size=32))
    on_pixels = recipe_costs(recipe(first_stage=replace(tiny().first_stage, multipliers=(1,)), size=16))
    assert (on_latents.flops, on_latents.sample_bytes) == (on_pixels.flops, on_pixels.sample_bytes)


# Memory ---------------------------------------------------------------------------------------------------------------


def real_input(unet: UNet, side: int, b: int = 1) -> tuple[Tensor, Tensor, Condition]:
    """Numbers for a UNet, 24 tokens among them where it reads some."""
    context = None if unet.context_dim is None else torch.randn(b, 24, unet.context_dim)
    return torch.randn(b, 3, side, side), torch.zeros(b, dtype=torch.long), Condition(context=context)


def kept_bytes(made: Recipe, b: int = 1, kernel: Any = SDPBackend.MATH) -> int:
    """What autograd keeps of a real pass of the UNet on the CPU, each storage once, without the weights."""
    unet = unet_of(made)
    weights = {p.data_ptr() for p in unet.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if (place := x.untyped_storage().data_ptr()) not in weights:
            kept[place] = x
        return x

    with sdpa_kernel(kernel) if kernel else nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            unet(*real_input(unet, made.size, b))
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("conditioners, network", EVERY)
def test_what_is_kept_of_a_sample_is_what_autograd_keeps(conditioners, network):
    """On the CPU, with PyTorch's plain attention; the input and the indices of the timesteps are a few bytes."""
    made = recipe(*conditioners, **network)
    assert recipe_costs(made).sample_bytes == pytest.approx(kept_bytes(made), rel=0.002)


def test_a_fused_attention_keeps_less():
    """The cost is an upper bound: it has the weights of every query for every key."""
    made = recipe(text(), attention_factors=(1, 2))
    assert kept_bytes(made, kernel=None) <= kept_bytes(made)


@pytest.mark.parametrize("conditioners", [(), (text(),)])
def test_two_samples_keep_twice_as_much(conditioners):
    made = recipe(*conditioners)
    assert kept_bytes(made, 2) == pytest.approx(2 * recipe_costs(made).sample_bytes, rel=0.01)


@pytest.mark.parametrize("conditioners, network", EVERY)
def test_the_inputs_of_all_convolutions_are_kept(conditioners, network):
    made = recipe(*conditioners, **network)
    unet, inputs = unet_of(made), {}
    for layer in unet.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, args, out: inputs.update({args[0].data_ptr(): args[0]}))
    unet(*real_input(unet, made.size))
    assert recipe_costs(made).sample_bytes >= sum(4 * x.numel() for x in inputs.values()) > 0


def test_a_training_costs_its_steps_and_a_step_its_micro_batch():
    made = recipe()
    costs, how = recipe_costs(made), made.diffusion.training
    assert costs.training_flops(made) == 3 * costs.flops * how.batch_size * how.steps
    assert costs.training_bytes(made) == costs.state_bytes + costs.sample_bytes * how.batch_size
    halved = replace(made, diffusion=replace(made.diffusion, training=replace(how, accumulate=2)))
    assert costs.training_bytes(halved) == costs.state_bytes + costs.sample_bytes * how.batch_size // 2
    assert costs.training_flops(halved) == costs.training_flops(made)


GROWTH = """
import json, resource, sys
from ldm_edu.training import find_recipe
from ldm_edu.training.costs import recipe_costs
from ldm_edu.training.tasks import DiffusionTask

unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
costs = recipe_costs(find_recipe(sys.argv[1]))
print(json.dumps([costs.state_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows tells no peak of the memory in this way")
@pytest.mark.parametrize("name", ["paper-coco-text256", "paper-coco-layout256"])
def test_a_large_model_is_counted_in_little_memory(name):
    """Weights of 1.4 billion numbers take 5.7 GB."""
    done = subprocess.run([sys.executable, "-c", GROWTH, name], capture_output=True, text=True, check=True)
    state, grown = json.loads(done.stdout)
    assert state > 7e9 and grown < 1e9


# Conditions -----------------------------------------------------------------------------------------------------------

CONDITIONERS = {
    "text": text(),
    "text, words counted": line("TextConditioner", vocabulary=100, dim=32, depth=1),
    "class": line("ClassConditioner", classes=24, dim=32),
    "class, vector": line("ClassConditioner", classes=24, dim=32, slot="vector"),
    "attributes": line("AttributesConditioner", attributes=16, dim=32),
    "layout": line("LayoutConditioner", classes=5, max_boxes=3, bins=4, dim=32, depth=1),
    "depth": line("MapConditioner", key="depth", channels=1, factor=4, per_image=True, has_null=True),
    "segmentation": line("MapConditioner", key="segmentation", classes=8, factor=4, out_channels=3),
    "low resolution": line("MapConditioner", key="low_resolution"),
    "inpainting": line("InpaintingConditioner"),
    "inpainting, named": line("InpaintingConditioner", first_stage="toy-vq-f4"),
    "own, tokens": line("ThingCount"),
    "own, map": line("ClassMap"),
    "own, map that is kept": line("KeptMap"),
    "own, vector": line("Brightness"),
    "own, key": line("ChosenMap", key="depth"),
    "own, text": line("Scaled", vocabulary=("red", "cube"), dim=32, heads=4),
    "own, frozen": line("Frozen"),
}
COUNTED = {  # what the data decide; the count is then that of the least data
    "class": line("ClassConditioner", dim=32),
    "attributes": line("AttributesConditioner", dim=32),
    "layout": line("LayoutConditioner", max_boxes=3, bins=4, dim=32, depth=1),
    "segmentation": line("MapConditioner", key="segmentation", classes=0, factor=4),
}


@pytest.mark.parametrize("name", CONDITIONERS)
def test_a_conditioner_of_any_kind_is_counted(name):
    made = recipe(CONDITIONERS[name], first_stage=tiny().first_stage)
    costs, first_stage = recipe_costs(made), build_first_stage(made.first_stage)
    words = lambda key: [f"word{i}" for i in range(200)]  # noqa: E731
    real = build_conditioner(made.diffusion, words, lambda: first_stage)
    own = sum(p.numel() for name, p in real.named_parameters() if not name.startswith("first_stage."))
    assert costs.conditioner == own and costs.unet == num_parameters(DiffusionTask(made, real).unet)
    assert costs.first_stage == num_parameters(first_stage) and costs.flops > 0 and costs.sample_bytes > 0


@pytest.mark.parametrize("name", COUNTED)
def test_what_only_the_data_decide_does_not_stop_the_count(name):
    costs = recipe_costs(recipe(COUNTED[name], first_stage=tiny().first_stage))
    assert costs.flops > 0 and costs.unet > 0


@pytest.mark.parametrize("second", ["depth", "inpainting", "class, vector", "class"])
def test_several_conditioners_are_counted_together(second):
    both = recipe(text(), CONDITIONERS[second], first_stage=tiny().first_stage)
    alone = [recipe_costs(recipe(each, first_stage=tiny().first_stage)) for each in both.diffusion.conditioners]
    assert recipe_costs(both).conditioner == sum(each.conditioner for each in alone)


def test_frozen_weights_have_no_state():
    """They have neither gradient nor averages of AdamW."""
    free, frozen = (recipe_costs(recipe(line(name, dim=32))) for name in ("ThingCount", "Frozen"))
    assert frozen.unet == free.unet and frozen.state_bytes < free.state_bytes


# Beside the count -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "layout", "inpainting, named", "own, tokens", "attributes"])
def test_a_count_draws_no_random_numbers(name):
    before = torch.get_rng_state(), str(np.random.get_state())
    made = recipe(CONDITIONERS[name], first_stage=tiny().first_stage, dropout=0.2)
    costs = recipe_costs(made)
    assert torch.equal(torch.get_rng_state(), before[0]) and str(np.random.get_state()) == before[1]
    assert recipe_costs(made) == costs and isinstance(costs, Costs)


def test_a_count_leaves_the_default_device_as_it_is():
    recipe_costs(recipe(text()))
    assert torch.empty(1).device.type == "cpu" and torch.is_grad_enabled()


def test_a_count_without_gradients_is_the_same():
    """The caller may have switched them off, as a page of tables does."""
    made = recipe(text())
    with torch.no_grad():
        costs = recipe_costs(made)
    assert costs == recipe_costs(made)


@pytest.mark.parametrize("wrong, told", [({"heads": 5}, "heads=5"), ({"channels": 33}, "channels=33")])
def test_a_network_that_cannot_be_built_is_refused(wrong, told):
    with pytest.raises(LDMError, match=told):
        recipe_costs(recipe(**wrong))


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(LDMError, match="divisible|halved"):
        recipe_costs(recipe(size=15))


def test_the_operations_of_a_recipe_of_the_paper():
    """LDM-8 of table 14 has 2⁴ times the pixels of LDM-32 on every level, and not quite as many more operations."""
    large, small = (recipe_costs(find_recipe(f"paper-celeba-f{f}")) for f in (8, 32))
    assert 15.9 < large.flops / small.flops < 18
