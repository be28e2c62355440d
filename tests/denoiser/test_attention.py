"""Attention against diffusers with the same weights, against float64 by hand, and its properties, on random sizes."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm_edu.denoiser import attention as A
from ldm_edu.errors import LDMError
from ldm_edu.first_stage.autoencoder import MiddleAttention
from ldm_edu.layers import fused_attention, group_norm

SEEDS = range(6)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for every parameter, the zero-initialised ones too."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float32) * 0.1
    return module.eval()


def sizes(seed: int) -> dict[str, int]:
    """A random configuration."""
    r = random.Random(seed)
    heads = r.choice([1, 2, 3, 4])
    return dict(
        b=r.randint(1, 3),
        h=r.randint(1, 6),
        w=r.randint(1, 6),
        m=r.randint(1, 9),
        heads=heads,
        head_channels=r.choice([8, 16, 32]),
        channels=r.choice([32, 64, 96]),
        context_dim=r.choice([5, 24, 48]),
        depth=r.randint(1, 3),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_naive_attend_and_torch_agree(seed):
    torch.manual_seed(seed)
    r = random.Random(seed)
    batch = [r.randint(1, 3) for _ in range(r.randint(1, 2))]
    n, m, d, c = (r.randint(1, 12) for _ in range(4))
    q, k, v = torch.randn(*batch, n, d), torch.randn(*batch, m, d), torch.randn(*batch, m, c)
    by_loops = torch.empty(*batch, n, c, dtype=torch.float64).flatten(0, -3)
    flat = [x.flatten(0, -3).double() for x in (q, k, v)]
    for b, (qb, kb, vb) in enumerate(zip(*flat, strict=True)):
        for i in range(n):
            e = [math.exp(float(qb[i] @ kb[j]) / math.sqrt(d)) for j in range(m)]
            by_loops[b, i] = sum(e[j] * vb[j] for j in range(m)) / sum(e)
    expected = by_loops.reshape(*batch, n, c).float()
    torch.testing.assert_close(A.naive_attention(q, k, v), expected)
    torch.testing.assert_close(A.attend(q, k, v), expected)
    torch.testing.assert_close(A.attention_weights(q, k).sum(-1), torch.ones(*batch, n))


def test_scores_that_overflow_do_not():
    q = torch.full((1, 2, 4), 1000.0)
    v = torch.randn(1, 3, 4)
    for attention in (A.naive_attention, A.attend):
        assert attention(q, q[:, :1].expand(1, 3, 4), v).isfinite().all()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attend_in_every_dtype(dtype, grad):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16) for n in (20, 7, 7))
    expected = A.naive_attention(q, k, v)
    low = [x.to(dtype, copy=True).requires_grad_(grad) for x in (q, k, v)]
    out = A.attend(*low)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}[dtype]
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
    if grad:
        out.sum().backward()
        q64, k64, v64 = (x.double().requires_grad_() for x in (q, k, v))
        A.naive_attention(q64, k64, v64).sum().backward()
        for x, y in zip(low, (q64, k64, v64), strict=True):
            torch.testing.assert_close(x.grad.double(), y.grad, atol=5 * tolerance, rtol=5 * tolerance)


def test_large_maps_are_never_stored_whole(monkeypatch):
    def refuse(*_):
        raise AssertionError("the naive code was taken for a large map")

    monkeypatch.setattr(A, "naive_attention", refuse)
    q = torch.randn(1, 1, 1025, 2, dtype=torch.bfloat16, requires_grad=True)
    assert A.attend(q, q, q).shape == q.shape


class OnMPS(torch.Tensor):
    """A tensor that says it lies on Apple's GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("mps")


@pytest.fixture
def given(monkeypatch) -> list[torch.Tensor]:
    """All that PyTorch's attention was called with so far."""
    seen, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: seen.extend(qkv) or fused(*qkv))
    return seen


LAYERS = [
    lambda: A.SpatialTransformer(64, 2, 32),
    lambda: A.SpatialTransformer(64, 2, 32, linear=True),
    lambda: A.AttentionBlock(64, 2),
    lambda: MiddleAttention(64),
]


@pytest.mark.parametrize("make", LAYERS)
def test_arguments_are_contiguous_on_mps(given, make):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(2, 64, 3, 5)
    expected = layer(x)
    given.clear()
    out = layer(x.as_subclass(OnMPS))
    assert len(given) in (3, 6) and all(type(y) is OnMPS and y.is_contiguous() for y in given)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected)


def test_arguments_are_not_copied_elsewhere(given):
    views = [A.split_heads(torch.randn(2, n, 32), 4) for n in (6, 3, 3)]
    assert not any(x.is_contiguous() for x in views)
    out = A.attend(*views)
    assert all(x is y for x, y in zip(given, views, strict=True))
    torch.testing.assert_close(fused_attention(*(x.as_subclass(OnMPS) for x in views)).as_subclass(torch.Tensor), out)


@pytest.mark.parametrize("seed", SEEDS)
def test_heads_round_trip(seed):
    c = sizes(seed)
    x = torch.randn(c["b"], c["m"], c["heads"] * c["head_channels"])
    split = A.split_heads(x, c["heads"])
    assert split.shape == (c["b"], c["heads"], c["m"], c["head_channels"])
    assert torch.equal(A.merge_heads(split), x)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_cross_attention_equals_diffusers(seed, cross):
    from diffusers.models.attention_processor import Attention

    c = sizes(seed)
    context_dim = c["context_dim"] if cross else None
    ours = randomise(A.CrossAttention(c["channels"], context_dim, c["heads"], c["head_channels"]), seed)
    theirs = Attention(c["channels"], context_dim, heads=c["heads"], dim_head=c["head_channels"]).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(c["b"], c["h"] * c["w"], c["channels"])
    context = torch.randn(c["b"], c["m"], context_dim) if cross else None
    torch.testing.assert_close(ours(x, context), theirs(x, context))


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_maps_explain_the_answer(seed):
    c = sizes(seed)
    layer = randomise(A.CrossAttention(c["channels"], c["context_dim"], c["heads"], c["head_channels"]), seed)
    x, context = torch.randn(c["b"], 5, c["channels"]), torch.randn(c["b"], c["m"], c["context_dim"])
    maps = layer.weights(x, context)
    assert maps.shape == (c["b"], c["heads"], 5, c["m"])
    answer = layer.to_out(A.merge_heads(maps @ A.split_heads(layer.to_v(context), c["heads"])))
    torch.testing.assert_close(layer(x, context), answer)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_spatial_transformer_equals_diffusers(seed, linear):
    from diffusers import Transformer2DModel

    c = sizes(seed)
    channels = c["heads"] * c["head_channels"] if linear else c["channels"]
    channels = max(32, channels // 32 * 32)
    heads = (c["heads"], c["head_channels"])
    ours = A.SpatialTransformer(channels, *heads, c["depth"], c["context_dim"], linear)
    randomise(ours, seed)
    theirs = Transformer2DModel(
        *heads,
        in_channels=channels,
        num_layers=c["depth"],
        cross_attention_dim=c["context_dim"],
        use_linear_projection=linear,
        norm_num_groups=32,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(c["b"], channels, c["h"], c["w"])
    context = torch.randn(c["b"], c["m"], c["context_dim"])
    torch.testing.assert_close(ours(x, context), theirs(x, context, return_dict=False)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_block_equals_diffusers(seed):
    from diffusers.models.attention_processor import Attention

    c = sizes(seed)
    channels = 32 * c["heads"]
    ours = randomise(A.AttentionBlock(channels, c["heads"]), seed)
    theirs = Attention(
        channels, heads=c["heads"], dim_head=32, bias=True, norm_num_groups=32, eps=1e-5, residual_connection=True
    ).eval()
    theirs.load_state_dict(attention_block_weights(ours))
    x = torch.randn(c["b"], channels, c["h"], c["w"])
    torch.testing.assert_close(ours(x), theirs(x))


def attention_block_weights(block: A.AttentionBlock) -> dict[str, torch.Tensor]:
    """The weights of an AttentionBlock under the names of diffusers' `Attention`."""
    w, b = block.qkv.weight[..., 0], block.qkv.bias
    w = w.reshape(block.heads, 3, -1, w.shape[1])  # head by head: q, k, v
    b = b.reshape(block.heads, 3, -1)
    named = {"group_norm.weight": block.norm.weight, "group_norm.bias": block.norm.bias}
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        named |= {f"{name}.weight": w[:, i].flatten(0, 1), f"{name}.bias": b[:, i].flatten()}
    return named | {"to_out.0.weight": block.proj_out.weight[..., 0], "to_out.0.bias": block.proj_out.bias}


@pytest.mark.parametrize("seed", SEEDS)
def test_one_key_is_no_choice(seed):
    c = sizes(seed)
    layer = randomise(A.CrossAttention(c["channels"], c["context_dim"], c["heads"], c["head_channels"]), seed)
    x, token = torch.randn(c["b"], 6, c["channels"]), torch.randn(c["b"], 1, c["context_dim"])
    out = layer(x, token)
    torch.testing.assert_close(out, out[:, :1].expand_as(out))
    torch.testing.assert_close(out, layer(torch.randn_like(x), token))
    out.sum().backward()
    largest = {name: getattr(layer, name).weight.grad.abs().max() for name in ("to_q", "to_k", "to_v")}
    assert max(largest["to_q"], largest["to_k"]) < 1e-5 * largest["to_v"]  # nothing to learn but rounding


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_are_a_set_and_positions_are_equivariant(seed):
    c = sizes(seed)
    inner = c["heads"] * c["head_channels"]
    block = randomise(A.TransformerBlock(inner, c["heads"], c["head_channels"], c["context_dim"]), seed)
    x, context = torch.randn(c["b"], 8, inner), torch.randn(c["b"], c["m"], c["context_dim"])
    order, places = torch.randperm(c["m"]), torch.randperm(8)
    out = block(x, context)
    torch.testing.assert_close(block(x, context[:, order]), out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(block(x[:, places], context), out[:, places], atol=1e-5, rtol=1e-4)


def test_zero_at_the_start_and_gradients_everywhere():
    x, context = torch.randn(2, 64, 3, 5), torch.randn(2, 4, 24)
    layers = [
        (A.SpatialTransformer(64, 2, 32, 2, 24), (x, context)),
        (A.SpatialTransformer(64, 2, 32, 1, 24, True), (x, context)),
        (A.SpatialTransformer(64, 2, 32), (x,)),
        (A.AttentionBlock(64, 2), (x,)),
    ]
    for layer, given in layers:
        assert torch.equal(layer(*given), x)
        randomise(layer)(*given).square().sum().backward()
        silent = [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()]
        assert not silent


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_layers_run_in_every_dtype(dtype):
    x, context = torch.randn(2, 64, 4, 4), torch.randn(2, 5, 24)
    for layer, given in [
        (A.SpatialTransformer(64, 2, 32, 1, 24), (x, context)),
        (A.AttentionBlock(64, 2), (x,)),
    ]:
        randomise(layer)
        expected = layer(*given)
        out = layer.to(dtype)(*(y.to(dtype) for y in given))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.05)


def test_geglu_and_feed_forward_equal_diffusers():
    from diffusers.models.attention import FeedForward

    for dim, mult in [(8, 4), (24, 2)]:
        ours = randomise(A.FeedForward(dim, mult), dim)
        theirs = FeedForward(dim, mult=mult, activation_fn="geglu").eval()
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(3, 5, dim)
        torch.testing.assert_close(ours(x), theirs(x))
    value, gate = ours.net[0].proj(x).chunk(2, dim=-1)
    torch.testing.assert_close(ours.net[0](x), value * F.gelu(gate, approximate="none"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: group_norm(48),
        lambda: A.AttentionBlock(64, 3),
        lambda: A.SpatialTransformer(40, 2, 20),
        lambda: A.CrossAttention(8, 4, 1, 8)(torch.randn(1, 2, 8)),
        lambda: A.CrossAttention(8, 4, 1, 8)(torch.randn(1, 2, 8), torch.randn(1, 2, 5)),
        lambda: A.CrossAttention(8, None, 1, 8)(torch.randn(1, 2, 8), torch.randn(1, 2, 8)),
    ],
)
def test_what_does_not_fit_is_refused(make):
    with pytest.raises(LDMError, match="channels|context_dim"):
        make()
