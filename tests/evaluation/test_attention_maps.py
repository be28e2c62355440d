"""Attention maps against those computed by hand from queries and keys, on random UNets; nothing is left behind."""

import copy
import random
from collections.abc import Callable

import jaxtyping
import numpy as np
import pytest
import torch
from fake_gpu import FakeGPU, needs_cuda_build
from torch import Tensor, nn

from ldm_edu.conditioning import Condition
from ldm_edu.denoiser.attention import TransformerBlock
from ldm_edu.denoiser.unet import UNet
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.attention import attention_maps

SEEDS = range(12)


@pytest.fixture
def unchecked(monkeypatch):
    """Past the signatures, which are checked in the tests only."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for every parameter, the zero-initialised ones too, and queries and keys that are far from even."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        z = torch.randn(p.shape, generator=g)
        p.data = z * p[0].numel() ** -0.5 if p.ndim > 1 else p.data + 0.1 * z
        if name.endswith(("to_q.weight", "to_k.weight")):
            p.data *= 1.5
    return module.eval()


def small_unet(seed: int = 0, **more) -> UNet:
    size = dict(in_channels=3, out_channels=3, channels=32, multipliers=(1, 2), blocks=1, attention_factors=(1, 2))
    return randomise(UNet(**size | dict(context_dim=6, head_channels=16) | more), seed)


def random_unet(seed: int) -> UNet:
    """A UNet of random arguments."""
    r = random.Random(seed)
    multipliers = [(1,), (1, 2), (2, 1), (1, 1, 2), (1, 2, 3, 1)][seed % 5]
    return small_unet(
        seed,
        multipliers=multipliers,
        blocks=r.randint(1, 2),
        attention_factors=tuple(2**i for i in range(len(multipliers)) if r.random() < 0.5),  # the middle has it anyway
        head_channels=r.choice([4, 8, 32]),
        heads=r.choice([None, None, 2]),
        context_dim=r.choice([1, 5, 24]),
        transformer_depth=r.randint(1, 3),
        linear_projection=seed % 2 == 1,
        vector_dim=r.choice([None, 4]),
        concat_channels=r.choice([0, 2]),
        scale_shift_norm=seed % 4 > 1,
        resblock_updown=seed % 3 == 0,
    )


def given(unet: UNet, b: int = 2, tokens: int = 5, grid: tuple[int, int] = (2, 4), seed: int = 0):
    """Random x_t, t, and a condition with all that the UNet wants; `grid` is the size of its smallest map."""
    g = torch.Generator().manual_seed(seed)
    h, w = (n * unet.factor for n in grid)
    slots = {}
    if unet.context_dim:
        slots["context"] = torch.randn(b, tokens, unet.context_dim, generator=g)
    if unet.concat_channels:
        slots["concat"] = torch.randn(b, unet.concat_channels, h, w, generator=g)
    if unet.vector_dim:
        slots["vector"] = torch.randn(b, unet.vector_dim, generator=g)
    cond = Condition(**slots)
    return torch.randn(b, unet.in_channels, h, w, generator=g), torch.randint(1000, (b,), generator=g), cond


def blocks_of(unet: UNet) -> list[TransformerBlock]:
    return [part for part in unet.modules() if isinstance(part, TransformerBlock)]


def by_hand(unet: UNet, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """Place by place, in float64: queries and keys are caught on their way in a plain call of the UNet."""
    caught: list[tuple[int, Tensor, Tensor]] = []
    queries: list[Tensor] = []
    hooks = []
    for attention in (block.attn2 for block in blocks_of(unet)):
        hooks.append(attention.to_q.register_forward_hook(lambda _m, _i, out: queries.append(out)))
        hooks.append(
            attention.to_k.register_forward_hook(
                lambda _m, _i, out, heads=attention.heads: caught.append((heads, queries.pop(), out))
            )
        )
    with torch.no_grad():
        unet(x_t, t, cond)
    for hook in hooks:
        hook.remove()
    b, _, h, w = x_t.shape
    total = np.zeros((b, cond.context.shape[1], h, w))
    for heads, q, k in caught:
        d, f = q.shape[-1] // heads, round((h * w / q.shape[1]) ** 0.5)
        for head in range(heads):
            mine = slice(head * d, (head + 1) * d)
            scores = np.einsum("bnd,bld->bln", q[..., mine].double().numpy(), k[..., mine].double().numpy()) / d**0.5
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            for i in range(h):
                for j in range(w):
                    total[:, :, i, j] += weights[:, :, (i // f) * (w // f) + j // f] / heads
    assert len(caught) == len(blocks_of(unet)) > 0
    return torch.from_numpy(total / len(caught))


# --- The numbers ---


@pytest.mark.parametrize("seed", SEEDS)
def test_maps_are_those_computed_by_hand(seed):
    r = random.Random(100 + seed)
    unet = random_unet(seed)
    grid = [(1, 2), (1, 4), (4, 1), (2, 2), (3, 1), (2, 3)][seed % 6]
    x_t, t, cond = given(unet, r.randint(1, 3), r.choice([2, 3, 7]), grid, seed)
    maps = attention_maps(unet, x_t, t, cond)
    b, tokens = cond.context.shape[:2]
    assert maps.shape == (b, tokens, *x_t.shape[2:]) and maps.dtype == torch.float32
    assert maps.amin() >= 0
    torch.testing.assert_close(maps.sum(1), torch.ones(b, *x_t.shape[2:]))
    torch.testing.assert_close(maps.double(), by_hand(unet, x_t, t, cond), atol=2e-6, rtol=1e-5)


def test_the_random_unets_differ_in_what_matters():
    unets = [random_unet(seed) for seed in SEEDS]
    for name in ("vector_dim", "concat_channels", "context_dim", "factor"):
        assert len({getattr(unet, name) for unet in unets}) > 1
    for values in (
        {len(unet.middle_block[1].transformer_blocks) for unet in unets},
        {unet.middle_block[1].linear for unet in unets},
        {blocks_of(unet)[0].attn2.heads for unet in unets},
        {len(blocks_of(unet)) for unet in unets},
    ):
        assert len(values) > 1
    unet = random_unet(1)
    maps = attention_maps(unet, *given(unet, 1, 4))
    assert maps.amax() > 0.5 and maps.std() > 0.05  # far from even, so that a wrong order would be seen


@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (1, 3)])
def test_one_block_of_attention_is_enlarged_place_by_place(grid):
    """The middle alone attends, on a map of half the height and width."""
    unet = small_unet(attention_factors=())
    x_t, t, cond = given(unet, grid=grid)
    assert len(blocks_of(unet)) == 1 and unet.factor == 2
    seen: list[tuple] = []
    hook = blocks_of(unet)[0].attn2.register_forward_hook(lambda layer, inputs, _out: seen.append(inputs))
    maps = attention_maps(unet, x_t, t, cond)
    hook.remove()
    weights = blocks_of(unet)[0].attn2.weights(*seen[0]).detach()  # (b, heads, places, l)
    small = weights.mean(1).transpose(1, 2).reshape(2, 5, *grid)
    torch.testing.assert_close(maps, small.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert small.var((2, 3)).amin() > 0


def one_head_looks(block: TransformerBlock, wanted: Tensor) -> None:
    """The second head of a block looks everywhere for the tokens that lie in one direction."""
    attention, width = block.attn2, block.attn2.to_q.out_features // block.attn2.heads
    block.norm2.weight.data.zero_()
    block.norm2.bias.data.fill_(1)
    attention.to_q.weight.data.fill_(1)
    attention.to_k.weight.data[width : 2 * width] = 100 * wanted


@pytest.mark.parametrize("which", [0, 1, -1])
def test_every_block_and_head_counts_the_same(which):
    """One head of one block attends to a single token, and all others attend evenly: its share can be told."""
    unet = small_unet(attention_factors=(1,), head_channels=8, transformer_depth=2)
    x_t, t, cond = given(unet, tokens=4)
    blocks = blocks_of(unet)
    for block in blocks:
        block.attn2.to_k.weight.data.zero_()
    torch.testing.assert_close(attention_maps(unet, x_t, t, cond), torch.full((2, 4, *x_t.shape[2:]), 0.25))
    centred = cond.context[0] - cond.context[0].mean(0)
    one_head_looks(blocks[which], centred[2])
    share = 1 / (blocks[which].attn2.heads * len(blocks))
    expected = torch.full((4,), 0.25 * (1 - share))
    expected[(centred @ centred[2]).argmax()] += share
    maps = attention_maps(unet, x_t[:1], t[:1], cond[:1])[0]
    torch.testing.assert_close(maps, expected[:, None, None].expand_as(maps))


def test_a_single_token_gets_all_attention():
    unet = small_unet()
    x_t, t, cond = given(unet, tokens=1)
    assert attention_maps(unet, x_t, t, cond).eq(1).all()


def test_equal_tokens_share_attention_evenly():
    unet = small_unet()
    x_t, t, cond = given(unet, tokens=1)
    cond = Condition(context=cond.context.expand(2, 7, 6))
    torch.testing.assert_close(attention_maps(unet, x_t, t, cond), torch.full((2, 7, *x_t.shape[2:]), 1 / 7))


def test_maps_follow_their_tokens():
    unet = small_unet()
    x_t, t, cond = given(unet, tokens=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    maps = attention_maps(unet, x_t, t, cond)
    torch.testing.assert_close(attention_maps(unet, x_t, t, Condition(context=cond.context[:, order])), maps[:, order])


@pytest.mark.parametrize("tokens", [1, 3, 77, 101])
def test_any_number_of_tokens(tokens):
    unet = small_unet()
    x_t, t, cond = given(unet, tokens=tokens)
    maps = attention_maps(unet, x_t, t, cond)
    assert maps.shape == (2, tokens, *x_t.shape[2:])
    torch.testing.assert_close(maps.sum(1), torch.ones(2, *x_t.shape[2:]))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_every_image_is_looked_at_by_itself(seed):
    unet = random_unet(seed)
    x_t, t, cond = given(unet, b=4)
    maps = attention_maps(unet, x_t, t, cond)
    for rows in (slice(0, 1), slice(1, 4), slice(3, 4)):
        torch.testing.assert_close(attention_maps(unet, x_t[rows], t[rows], cond[rows]), maps[rows])
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(attention_maps(unet, x_t[order], t[order], cond[order]), maps[order])
    assert attention_maps(unet, x_t[:0], t[:0], cond[:0]).shape == (0, *maps.shape[1:])


@pytest.mark.parametrize("part", ["x_t", "t", "context", "concat", "vector"])
def test_maps_depend_on_all_that_the_unet_is_given(part):
    unet = small_unet(concat_channels=2, vector_dim=4)  # its first block gets no time, the deeper ones do
    x_t, t, cond = given(unet)
    maps = attention_maps(unet, x_t, t, cond)
    torch.testing.assert_close(maps.double(), by_hand(unet, x_t, t, cond), atol=2e-6, rtol=1e-5)
    if part in ("x_t", "t"):
        x_t, t = (x_t.flip(2), t) if part == "x_t" else (x_t, (t + 500) % 1000)
    else:
        cond = Condition(**cond.slots() | {part: cond.slots()[part] * -1.5})
    assert (attention_maps(unet, x_t, t, cond) - maps).abs().amax() > 1e-3


def test_the_layout_in_memory_does_not_matter():
    unet = small_unet()
    x_t, t, cond = given(unet)
    strided = x_t.to(memory_format=torch.channels_last)
    torch.testing.assert_close(attention_maps(unet, strided, t, cond), attention_maps(unet, x_t, t, cond))


@pytest.mark.parametrize("whole", [torch.int32, torch.int16])
def test_levels_may_be_any_whole_numbers(whole):
    unet = small_unet()
    x_t, t, cond = given(unet)
    assert torch.equal(attention_maps(unet, x_t, t.to(whole), cond), attention_maps(unet, x_t, t, cond))


# --- Number formats ---


@pytest.mark.parametrize("inputs", [torch.float64, torch.float32])
def test_a_unet_in_double_precision(inputs):
    unet = small_unet(transformer_depth=2).double()
    x_t, t, cond = given(unet)
    x_t, cond = x_t.to(inputs), cond.to(inputs)
    maps = attention_maps(unet, x_t, t, cond)
    torch.testing.assert_close(maps.double(), by_hand(unet, x_t, t, cond), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(maps, attention_maps(unet.float(), x_t, t, cond), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inputs", [torch.bfloat16, torch.float32])
def test_a_unet_in_bfloat16(inputs):
    unet = small_unet()
    x_t, t, cond = given(unet, tokens=9)
    exact = attention_maps(unet, x_t, t, cond)
    maps = attention_maps(unet.bfloat16(), x_t.to(inputs), t, cond.to(inputs))
    assert maps.dtype == torch.float32 and maps.shape == exact.shape
    torch.testing.assert_close(maps.sum(1), torch.ones(2, *x_t.shape[2:]), atol=5e-3, rtol=0)
    torch.testing.assert_close(maps, exact, atol=0.1, rtol=0)
    assert (maps - exact).abs().mean() < 0.01


def test_autocast_is_obeyed():
    unet = small_unet()
    x_t, t, cond = given(unet)
    exact = attention_maps(unet, x_t, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        maps = attention_maps(unet, x_t, t, cond)
    assert maps.dtype == torch.float32 and not torch.equal(maps, exact)
    torch.testing.assert_close(maps, exact, atol=0.1, rtol=0)


# --- What is left behind: nothing ---


def hooks_of(module: nn.Module) -> int:
    """All hooks of all parts of a module."""
    kinds = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)


def test_the_unet_stays_as_it_was():
    unet = small_unet()
    x_t, t, cond = given(unet)
    list(unet.parameters())[3].requires_grad_(False)
    unet.middle_block.train()
    given_before = [v.clone() for v in (x_t, t, cond.context)]
    flags = [part.training for part in unet.modules()]
    wanted = [p.requires_grad for p in unet.parameters()]
    state, attributes = copy.deepcopy(unet.state_dict()), [sorted(vars(part)) for part in unet.modules()]
    with torch.no_grad():
        before = unet(x_t, t, cond)
        attention_maps(unet, x_t, t, cond)
        assert torch.equal(unet(x_t, t, cond), before)
    assert hooks_of(unet) == 0
    assert [part.training for part in unet.modules()] == flags and True in flags and False in flags
    assert [p.requires_grad for p in unet.parameters()] == wanted and all(p.grad is None for p in unet.parameters())
    assert [sorted(vars(part)) for part in unet.modules()] == attributes
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip((x_t, t, cond.context), given_before, strict=True))


def test_a_second_look_sees_the_same():
    unet = small_unet()
    x_t, t, cond = given(unet)
    first = attention_maps(unet, x_t, t, cond)
    assert torch.equal(attention_maps(unet, x_t, t, cond), first)
    assert torch.equal(attention_maps(copy.deepcopy(unet), x_t, t, cond), first)


def test_no_gradient_is_kept_and_none_is_switched_off():
    unet = small_unet()
    x_t, t, cond = given(unet)
    x_t.requires_grad_()
    cond.context.requires_grad_()
    maps = attention_maps(unet, x_t, t, cond)
    assert not maps.requires_grad and torch.is_grad_enabled()
    unet(x_t, t, cond).sum().backward()
    assert x_t.grad is not None and cond.context.grad is not None
    with torch.inference_mode():
        torch.testing.assert_close(attention_maps(unet, x_t.detach(), t, cond), maps)


def test_chance_is_not_touched():
    unet = small_unet()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    attention_maps(unet, *given(unet))
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_of_others_stay_and_are_called():
    unet = small_unet()
    called = []
    for block in blocks_of(unet):
        block.attn2.register_forward_pre_hook(lambda layer, inputs: called.append("pre"))
        block.attn2.register_forward_hook(lambda layer, inputs, out: called.append("post"))
    attention_maps(unet, *given(unet))
    assert called == ["pre", "post"] * len(blocks_of(unet)) and hooks_of(unet) == 2 * len(blocks_of(unet))


class Stop(BaseException):
    """Like an interruption from the keyboard."""


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize(
    "where", [lambda unet: unet.input_blocks[0], lambda unet: unet.middle_block, lambda unet: unet.out]
)
def test_no_hook_is_left_after_an_error_inside(where, kind):
    unet = small_unet()
    x_t, t, cond = given(unet)
    before = attention_maps(unet, x_t, t, cond)

    def stop(*_) -> None:
        raise kind("on the way")

    trap = where(unet).register_forward_pre_hook(stop)
    with pytest.raises(kind, match="on the way"):
        attention_maps(unet, x_t, t, cond)
    assert hooks_of(unet) == 1
    trap.remove()
    assert hooks_of(unet) == 0 and torch.is_grad_enabled()
    assert torch.equal(attention_maps(unet, x_t, t, cond), before)


# --- What is refused ---

NEEDS = "attention_maps needs a UNet with cross-attention, and a condition with tokens"
WRONG: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], tuple], str]] = {
    "no condition": (lambda x, t, c: (x, t, None), NEEDS),
    "an empty condition": (lambda x, t, c: (x, t, Condition()), NEEDS),
    "only a vector": (lambda x, t, c: (x, t, Condition(vector=c[:, 0])), NEEDS),
    "only a map": (lambda x, t, c: (x, t, Condition(concat=x)), NEEDS),
    "no tokens": (lambda x, t, c: (x, t, Condition(context=c[:, :0])), "context.*token"),
    "tokens too wide": (lambda x, t, c: (x, t, Condition(context=c.repeat(1, 1, 2))), "context"),
    "tokens for one image": (lambda x, t, c: (x, t, Condition(context=c[:1])), "context"),
    "tokens for too many": (lambda x, t, c: (x, t, Condition(context=c.repeat(2, 1, 1))), "context"),
    "one token without its axis": (lambda x, t, c: (x, t, Condition(context=c[:, 0])), "context"),
    "ids in the place of tokens": (lambda x, t, c: (x, t, Condition(context=c[..., 0].long())), "context"),
    "a vector besides": (lambda x, t, c: (x, t, Condition(context=c, vector=c[:, 0])), "vector"),
    "a map besides": (lambda x, t, c: (x, t, Condition(context=c, concat=x)), "concat"),
    "a latent without its batch": (lambda x, t, c: (x[0], t, Condition(context=c)), r"x_t should.*x_t\[None\]"),
    "a latent too many axes": (lambda x, t, c: (x[None], t, Condition(context=c)), "x_t should"),
    "whole numbers": (lambda x, t, c: (x.long(), t, Condition(context=c)), "x_t should hold floating-point"),
    "no latent": (lambda x, t, c: (None, t, Condition(context=c)), "x_t should be a tensor"),
    "an array": (lambda x, t, c: (x.numpy(), t, Condition(context=c)), "x_t should be a tensor"),
    "too few channels": (lambda x, t, c: (x[:, :2], t, Condition(context=c)), "channels"),
    "a height that does not halve": (lambda x, t, c: (x[:, :, :3], t, Condition(context=c)), "divisible by 2"),
    "a width that does not halve": (lambda x, t, c: (x[..., :5], t, Condition(context=c)), "divisible by 2"),
    "no height": (lambda x, t, c: (x[:, :, :0], t, Condition(context=c)), "at least 1"),
    "one level": (lambda x, t, c: (x, t[:1], Condition(context=c)), "t should"),
    "levels in a column": (lambda x, t, c: (x, t[:, None], Condition(context=c)), "t should"),
    "levels with a point": (lambda x, t, c: (x, t.float(), Condition(context=c)), "t should"),
    "a level below 0": (lambda x, t, c: (x, t - 2000, Condition(context=c)), "t must be at least 0"),
    "a plain number": (lambda x, t, c: (x, 300, Condition(context=c)), "t should"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused_and_leaves_nothing(unchecked, wrong):
    unet = small_unet()
    x_t, t, cond = given(unet)
    make, told = WRONG[wrong]
    before = attention_maps(unet, x_t, t, cond)
    with pytest.raises(LDMError, match=told):
        attention_maps(unet, *make(x_t, t, cond.context))
    assert hooks_of(unet) == 0
    assert torch.equal(attention_maps(unet, x_t, t, cond), before)


@pytest.mark.parametrize("slots", [{}, {"vector_dim": 4}, {"concat_channels": 2}])
def test_a_unet_without_cross_attention_is_refused(slots):
    unet = small_unet(context_dim=None, **slots)
    x_t, t, cond = given(unet)
    for given_too in (cond, Condition(**cond.slots() | {"context": torch.randn(2, 3, 6)})):
        with pytest.raises(LDMError, match=NEEDS):
            attention_maps(unet, x_t, t, given_too)
    assert hooks_of(unet) == 0


# --- A device ---


@needs_cuda_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_stay_on_the_device(dtype):
    with FakeGPU() as gpu:
        unet = gpu.put(UNet(3, 3, 32, (1, 2), 1, (2,), context_dim=6, vector_dim=4, concat_channels=2).to(dtype))
        x, context = gpu.randn(2, 3, 4, 16, dtype=dtype), gpu.randn(2, 5, 6, dtype=dtype)
        cond = Condition(context, gpu.randn(2, 2, 4, 16, dtype=dtype), gpu.randn(2, 4, dtype=dtype))
        maps = attention_maps(unet, x, gpu.integers(2, below=1000), cond)
        assert (maps.device.type, maps.shape, maps.dtype) == ("cuda", (2, 5, 4, 16), torch.float32)
        assert gpu.uploads == [] and hooks_of(unet) == 0
