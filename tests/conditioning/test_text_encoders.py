"""ldm_edu.conditioning.text.TextTransformer against three others in float64, in what it says and in all gradients."""

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_edu import LDMError, TextConditioner, TextTransformer

SEEDS = range(12)


def encoder(seed: int, any_heads: bool = False) -> tuple[TextTransformer, Tensor]:
    """A transformer of random size with random weights, norms and biases too, and ids for it."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    heads, depth, length, vocabulary = r.choice([1, 2, 4]), r.randint(1, 4), r.randint(2, 12), r.randint(3, 50)
    dim = r.choice([6, 20, 32]) if any_heads else heads * r.choice([4, 6, 16])
    head_channels = r.choice([3, 5, 24]) if any_heads else r.choice([None, dim // heads])
    model = TextTransformer(vocabulary, length, dim, depth, heads, head_channels).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model, torch.randint(vocabulary, (r.randint(1, 5), r.randint(1, length)))


def embedded(model: TextTransformer, ids: Tensor) -> Tensor:
    """Eq. 18, by one-hot vectors, as a leaf."""
    x = F.one_hot(ids, len(model.tokens.weight)).double() @ model.tokens.weight + model.positions.weight[: ids.shape[1]]
    return x.detach().requires_grad_()


def assert_equal(model: TextTransformer, ids: Tensor, out: Tensor, start: Tensor, pairs: dict[str, Tensor]) -> None:
    """The result, and the gradients of a loss: of our weights by name, and of the tokens through those at the start."""
    found = model(ids)
    torch.testing.assert_close(found, out, atol=1e-10, rtol=1e-10)
    assert out.std() > 0.1
    for result in (found, out):
        (result**3).sum().backward()
    ours = {name: p.grad for name, p in model.named_parameters() if not name.startswith(("tokens", "positions"))}
    assert ours.keys() == pairs.keys()
    largest = max(g.abs().max() for g in ours.values())
    for name, theirs in pairs.items():
        torch.testing.assert_close(
            ours[name], theirs, atol=1e-11 * largest, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )
    positions = model.positions.weight.grad
    torch.testing.assert_close(positions[: ids.shape[1]], start.grad.sum(0), atol=1e-11 * largest, rtol=1e-8)
    assert not positions[ids.shape[1] :].any()
    rows = torch.zeros_like(model.tokens.weight).index_add_(0, ids.flatten(), start.grad.flatten(0, 1))
    torch.testing.assert_close(model.tokens.weight.grad, rows, atol=1e-11 * largest, rtol=1e-8)


# what ours is called in torch and in transformers, apart from q, k and v
IN_TORCH = {
    "attention.to_out.0": "self_attn.out_proj",
    "mlp.0": "linear1",
    "mlp.2": "linear2",
    "norm1": "norm1",
    "norm2": "norm2",
}
IN_VIT = {
    "attention.to_out.0": "attention.o_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
IN_CLIP = {
    "attention.to_out.0": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
}


def both(names: dict[str, str]) -> dict[str, str]:
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in names.items() for kind in ("weight", "bias")}


@pytest.mark.parametrize("seed", SEEDS)
def test_it_equals_torchs_transformer(seed):
    """torch has biases of q, k and v, which are zero here."""
    model, ids = encoder(seed)
    dim, heads = model.tokens.embedding_dim, model.layers[0].attention.heads
    how = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64)
    layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, **how)
    norm = nn.LayerNorm(dim, dtype=torch.float64)
    theirs = nn.TransformerEncoder(layer, len(model.layers), norm, enable_nested_tensor=False)
    norm.load_state_dict(model.norm.state_dict())
    for mine, other in zip(model.layers, theirs.layers, strict=True):
        ours = mine.state_dict()
        qkv = torch.cat([ours[f"attention.to_{x}.weight"] for x in "qkv"])
        named = {there: ours[here] for here, there in both(IN_TORCH).items()}
        in_proj = {"self_attn.in_proj_weight": qkv, "self_attn.in_proj_bias": torch.zeros(3 * dim)}
        other.load_state_dict(named | in_proj)
    x = embedded(model, ids)
    out, pairs = theirs(x), {f"norm.{kind}": getattr(theirs.norm, kind) for kind in ("weight", "bias")}
    qkvs = []
    for i, other in enumerate(theirs.layers):
        pairs |= {f"layers.{i}.{here}": other.get_parameter(there) for here, there in both(IN_TORCH).items()}
        qkvs.append(other.self_attn.in_proj_weight)
    gradients = torch.autograd.grad((out**3).sum(), [*pairs.values(), *qkvs], retain_graph=True)
    found = dict(zip(pairs, gradients))
    for i, gradient in enumerate(gradients[len(pairs) :]):
        found |= {f"layers.{i}.attention.to_{k}.weight": g for k, g in zip("qkv", gradient.chunk(3))}
    assert_equal(model, ids, out, x, found)


def vit_layers(model: TextTransformer) -> list[nn.Module]:
    """The layers of transformers' ViT, without biases of q, k and v."""
    from transformers import ViTConfig, ViTModel

    dim, heads = model.tokens.embedding_dim, model.layers[0].attention.heads
    size = dict(hidden_size=dim, num_attention_heads=heads, intermediate_size=4 * dim)
    config = ViTConfig(num_hidden_layers=len(model.layers), qkv_bias=False, layer_norm_eps=1e-5, **size)
    assert config.hidden_act == "gelu"
    return [*ViTModel(config, add_pooling_layer=False).double().eval().layers]


def clip_layers(model: TextTransformer) -> list[nn.Module]:
    """The layers of transformers' CLIP with the exact GELU; without a mask, if none is given."""
    from transformers import CLIPTextConfig, CLIPTextModel

    dim, heads = model.tokens.embedding_dim, model.layers[0].attention.heads
    size = dict(hidden_size=dim, num_attention_heads=heads, intermediate_size=4 * dim, vocab_size=4)
    config = CLIPTextConfig(
        num_hidden_layers=len(model.layers), hidden_act="gelu", **size, bos_token_id=0, eos_token_id=1
    )
    found = CLIPTextModel(config).double().eval()
    layers = [*getattr(found, "text_model", found).encoder.layers]
    for layer in layers:
        for x in "qkv":
            nn.init.zeros_(layer.get_parameter(f"self_attn.{x}_proj.bias"))
    return layers


@pytest.mark.parametrize("kind", ["vit", "clip"])
@pytest.mark.parametrize("seed", SEEDS)
def test_it_equals_the_layers_of_transformers(seed, kind):
    model, ids = encoder(seed)
    make, names, part = {"vit": (vit_layers, IN_VIT, "attention"), "clip": (clip_layers, IN_CLIP, "self_attn")}[kind]
    names = both(names) | {f"attention.to_{x}.weight": f"{part}.{x}_proj.weight" for x in "qkv"}
    layers = make(model)
    for mine, other in zip(model.layers, layers, strict=True):
        for here, there in names.items():
            other.get_parameter(there).data = mine.get_parameter(here).data.clone()
    norm = nn.LayerNorm(model.tokens.embedding_dim, dtype=torch.float64)
    norm.load_state_dict(model.norm.state_dict())
    x = out = embedded(model, ids)
    for layer in layers:
        out = layer(out, attention_mask=None)
        out = out[0] if isinstance(out, tuple) else out
    out = norm(out)
    pairs = {f"norm.{kind}": getattr(norm, kind) for kind in ("weight", "bias")}
    for i, other in enumerate(layers):
        pairs |= {f"layers.{i}.{here}": other.get_parameter(there) for here, there in names.items()}
    gradients = torch.autograd.grad((out**3).sum(), [*pairs.values()], retain_graph=True)
    assert_equal(model, ids, out, x, dict(zip(pairs, gradients)))


def by_hand(w: dict[str, Tensor], x: Tensor, depth: int, heads: int) -> Tensor:
    """Eq. 19 to 23, spelled out."""

    def normed(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * w[f"{name}.weight"] + w[f"{name}.bias"]

    for i in range(depth):
        at = f"layers.{i}"
        z = normed(x, f"{at}.norm1")
        q, k, v = (w[f"{at}.attention.to_{n}.weight"].unflatten(0, (heads, -1)) for n in "qkv")  # (h, c, d)
        q, k, v = (torch.einsum("bld,hcd->bhlc", z, each) for each in (q, k, v))
        attention = torch.einsum("bhlc,bhmc->bhlm", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        heard = torch.einsum("bhlm,bhmc->blhc", attention, v).flatten(2)
        x = x + heard @ w[f"{at}.attention.to_out.0.weight"].T + w[f"{at}.attention.to_out.0.bias"]
        z = normed(x, f"{at}.norm2") @ w[f"{at}.mlp.0.weight"].T + w[f"{at}.mlp.0.bias"]
        z = z * (1 + torch.erf(z / 2**0.5)) / 2
        x = x + z @ w[f"{at}.mlp.2.weight"].T + w[f"{at}.mlp.2.bias"]
    return normed(x, "norm")


@pytest.mark.parametrize("seed", SEEDS)
def test_heads_of_any_width_equal_the_equations(seed):
    model, ids = encoder(seed, any_heads=True)
    heads = model.layers[0].attention.heads
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    x = embedded(model, ids)
    out = by_hand(w, x, len(model.layers), heads)
    names = [name for name in w if not name.startswith(("tokens", "positions"))]
    gradients = torch.autograd.grad((out**3).sum(), [w[name] for name in names], retain_graph=True)
    assert_equal(model, ids, out, x, dict(zip(names, gradients)))


def test_the_width_of_a_head_shows_in_the_weights_and_is_saved(tmp_path):
    part = TextConditioner(("red", "ball"), length=4, dim=20, depth=1, heads=3, head_channels=8)
    assert part.transformer.layers[0].attention.to_q.weight.shape == (24, 20)
    part.save_pretrained(tmp_path)
    again = TextConditioner.from_pretrained(tmp_path)
    assert again.config["head_channels"] == 8
    assert torch.equal(again(["red ball"]).context, part(["red ball"]).context)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(heads=5), "heads=5"),
        (dict(head_channels=0), "head_channels=0"),
        (dict(head_channels=2.5), "head_channels=2.5"),
        (dict(depth=-1), "depth=-1"),
        (dict(dim=0), "dim=0"),
        (dict(length=0), "length=0"),
    ],
)
def test_sizes_that_make_no_transformer_are_named(arguments, named):
    with pytest.raises((LDMError, TypeError), match=named.split("=")[0]):
        TextTransformer(10, **{"dim": 16} | arguments)


@pytest.mark.parametrize(
    "ids", [torch.tensor([[10]]), torch.tensor([[-1]]), torch.zeros(1, 33, dtype=torch.long), torch.zeros(1, 2)]
)
def test_ids_that_it_has_no_row_for_are_refused(ids):
    with pytest.raises((LDMError, TypeError), match="ids"):
        TextTransformer(10, dim=16)(ids)
