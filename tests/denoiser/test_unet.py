"""The UNet against diffusers' with the same weights, in numbers and gradients; its contract, on random sizes."""

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ldm_edu.denoiser import unet as U
from ldm_edu.denoiser.attention import AttentionBlock, SpatialTransformer
from ldm_edu.errors import CheckpointError, LDMError

SEEDS = range(6)
MANY = range(20)  # four by four through scale_shift_norm and resblock_updown


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for every parameter, the zero-initialised ones too."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        z = torch.randn(p.shape, generator=g)
        p.data = z * p[0].numel() ** -0.5 if p.ndim > 1 else p.data + 0.1 * z  # the norms' scales stay near one
    return module.eval()


def configuration(seed: int, context: bool) -> dict:
    """The arguments of a random UNet, those that diffusers knows as well."""
    r = random.Random(seed)
    multipliers = (1, *(r.choice([1, 2, 3]) for _ in range(r.randint(0, 2))))  # diffusers knows no other beginning
    config = dict(
        in_channels=r.randint(1, 5),
        out_channels=r.randint(1, 5),
        channels=r.choice([32, 64]),
        multipliers=multipliers,
        blocks=r.randint(1, 2),
        attention_factors=tuple(2**i for i in range(len(multipliers)) if r.random() < 0.5),
        head_channels=r.choice([8, 16, 32]),
        vector_dim=r.choice([None, 6]),
    )
    if context:
        more = dict(context_dim=r.choice([16, 24]), transformer_depth=r.randint(1, 2), heads=r.choice([None, 2, 4]))
        config |= more | dict(linear_projection=r.random() < 0.5, concat_channels=r.choice([0, 3]))
    return config


def adm(seed: int) -> dict:
    """Every pair of these two options in turn."""
    return dict(scale_shift_norm=seed % 2 == 1, resblock_updown=seed % 4 > 1)


def given(unet: U.UNet, b: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, SimpleNamespace]:
    """Random x, t, and a condition with all that the UNet wants."""
    g = torch.Generator().manual_seed(seed)
    h, w = 2 * unet.factor, 4 * unet.factor
    cond = SimpleNamespace(context=None, concat=None, vector=None)
    if unet.context_dim:
        cond.context = torch.randn(b, 5, unet.context_dim, generator=g)
    if unet.concat_channels:
        cond.concat = torch.randn(b, unet.concat_channels, h, w, generator=g)
    if unet.vector_dim:
        cond.vector = torch.randn(b, unet.vector_dim, generator=g)
    return torch.randn(b, unet.in_channels, h, w, generator=g), torch.randint(1000, (b,), generator=g), cond


FULL = dict(in_channels=3, out_channels=2, channels=64, multipliers=(1, 2), blocks=1, attention_factors=(2,))
FULL |= dict(context_dim=16, vector_dim=6, concat_channels=2)


# ---- the same weights, the same answer as diffusers

RES_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def plain_attention(layer: AttentionBlock) -> nn.ModuleDict:
    """An AttentionBlock as diffusers lays it out: one linear layer for each of q, k, v."""
    c = layer.proj_out.in_channels
    w, b = layer.qkv.weight.reshape(layer.heads, 3, -1, c), layer.qkv.bias.reshape(layer.heads, 3, -1)
    parts = {"group_norm": layer.norm, "to_out": nn.ModuleList([nn.Linear(c, c, dtype=w.dtype)])}
    parts["to_out"][0].load_state_dict({"weight": layer.proj_out.weight[..., 0], "bias": layer.proj_out.bias})
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        parts[name] = nn.Linear(c, c, dtype=w.dtype)
        parts[name].load_state_dict({"weight": w[:, i].reshape(c, c), "bias": b[:, i].reshape(c)})
    return nn.ModuleDict(parts)


def layer_names(layer: nn.Module, block: str, k: int) -> dict[str, nn.Module]:
    """The k-th layer of its kind in a block of diffusers: names there, modules here."""
    if isinstance(layer, U.ResBlock):
        where = {nn.AvgPool2d: "downsamplers.0", nn.Upsample: "upsamplers.0"}.get(type(layer.resample), f"resnets.{k}")
        return {f"{block}.{where}.{theirs}": layer.get_submodule(ours) for ours, theirs in RES_NAMES.items()}
    if isinstance(layer, SpatialTransformer):
        return {f"{block}.attentions.{k}": layer}
    if isinstance(layer, AttentionBlock):
        return {f"{block}.attentions.{k}": plain_attention(layer)}
    if isinstance(layer, U.Downsample):
        return {f"{block}.downsamplers.0.conv": layer.op}
    return {f"{block}.upsamplers.0.conv": layer.conv}


def diffusers_weights(unet: U.UNet, blocks: int) -> dict[str, Tensor]:
    """All weights under diffusers' names."""
    parts = {"conv_in": unet.input_blocks[0][0], "conv_norm_out": unet.out[0], "conv_out": unet.out[2]}
    for name, mlp in {"time_embedding": unet.time_embed, "class_embedding": unet.label_emb}.items():
        if mlp is not None:
            parts |= {f"{name}.linear_1": mlp[0], f"{name}.linear_2": mlp[2]}
    for way, stages in {"down": unet.input_blocks[1:], "up": unet.output_blocks}.items():
        for i, stage in enumerate(stages):
            for layer in stage:
                parts |= layer_names(layer, f"{way}_blocks.{i // (blocks + 1)}", i % (blocks + 1))
    for k, layer in zip((0, 0, 1), unet.middle_block, strict=True):
        parts |= layer_names(layer, "mid_block", k)
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


RESNETS = {"DownBlock2D": "ResnetDownsampleBlock2D", "UpBlock2D": "ResnetUpsampleBlock2D"}


def kinds(config: dict, attention: str) -> dict:
    """The block types of diffusers for a configuration of ours, and its options of ADM."""
    at = [2**i in config["attention_factors"] for i in range(len(config["multipliers"]))]
    blocks = {
        "down_block_types": tuple(f"{attention * here}DownBlock2D" for here in at),
        "up_block_types": tuple(f"{attention * here}UpBlock2D" for here in reversed(at)),
    }
    if config["resblock_updown"]:
        blocks = {name: tuple(RESNETS.get(kind, kind) for kind in types) for name, types in blocks.items()}
    return blocks | {
        "block_out_channels": tuple(config["channels"] * m for m in config["multipliers"]),
        "layers_per_block": config["blocks"],
        "resnet_time_scale_shift": "scale_shift" if config["scale_shift_norm"] else "default",
    }


def assert_equal(ours: U.UNet, theirs: nn.Module, config: dict, seed: int) -> None:
    """The same prediction and the same gradients, of what goes in and of every weight, in float64."""
    ours, theirs = ours.double(), theirs.double().eval()
    theirs.load_state_dict(diffusers_weights(ours, config["blocks"]))
    x, t, cond = given(ours, seed=seed)
    given_to = []
    for _ in range(2):
        slots = {name: v if v is None else v.double().requires_grad_() for name, v in vars(cond).items()}
        given_to.append((x.double().requires_grad_(), SimpleNamespace(**slots)))
    (x, cond), (theirs_x, c) = given_to
    stacked = theirs_x if c.concat is None else torch.cat([theirs_x, c.concat], 1)
    more = {} if ours.context_dim is None else {"encoder_hidden_states": c.context, "class_labels": c.vector}
    found, expected = ours(x, t, cond), theirs(stacked, t, **more).sample
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    assert expected.std() > 0.1  # else equal would mean nothing
    found.square().sum().backward(), expected.square().sum().backward()
    pairs = {name: (getattr(cond, name), getattr(c, name)) for name in vars(cond)} | {"x": (x, theirs_x)}
    gradients = {name: (a.grad, b.grad) for name, (a, b) in pairs.items() if a is not None}
    slopes = copy.deepcopy(ours)
    for slope, p in zip(slopes.parameters(), ours.parameters(), strict=True):
        slope.data = p.grad
    named = diffusers_weights(slopes, config["blocks"])
    gradients |= {name: (named[name], p.grad) for name, p in theirs.named_parameters()}
    largest = max(p.grad.abs().max().item() for p in theirs.parameters())
    for name, (a, b) in gradients.items():
        torch.testing.assert_close(a, b, atol=1e-10 * largest, rtol=1e-8, msg=lambda told, name=name: f"{name}: {told}")


@pytest.mark.parametrize("seed", MANY)
def test_with_context_equals_diffusers(seed):
    from diffusers import UNet2DConditionModel

    config = configuration(seed, context=True) | adm(seed)
    if config["resblock_updown"]:  # diffusers has no such level with a transformer: only the middle has one
        config["attention_factors"] = ()
    ours = randomise(U.UNet(**config), seed)
    widths = [config["channels"] * m for m in config["multipliers"]]
    theirs = UNet2DConditionModel(
        in_channels=ours.in_channels + ours.concat_channels,
        out_channels=ours.out_channels,
        cross_attention_dim=ours.context_dim,
        attention_head_dim=[config["heads"] or c // config["head_channels"] for c in widths],  # their name for heads
        transformer_layers_per_block=config["transformer_depth"],
        use_linear_projection=config["linear_projection"],
        class_embed_type="projection" if ours.vector_dim else None,
        projection_class_embeddings_input_dim=ours.vector_dim,
        **kinds(config, "CrossAttn"),
    )
    assert_equal(ours, theirs, config, seed)


@pytest.mark.parametrize("seed", MANY)
def test_without_context_equals_diffusers(seed):
    from diffusers import UNet2DModel

    config = configuration(seed, context=False) | dict(vector_dim=None, concat_channels=2 * (seed % 3)) | adm(seed)
    if seed % 5 == 0:  # diffusers has one width of a head for all levels: so all levels are as wide
        config |= dict(multipliers=(1,) * len(config["multipliers"]), heads=4, head_channels=config["channels"] // 4)
    ours = randomise(U.UNet(**config), seed)
    theirs = UNet2DModel(
        in_channels=ours.in_channels + ours.concat_channels,
        out_channels=ours.out_channels,
        attention_head_dim=config["head_channels"],
        freq_shift=0,
        downsample_padding=1,
        attn_norm_num_groups=32,
        downsample_type="resnet" if config["resblock_updown"] else "conv",
        upsample_type="resnet" if config["resblock_updown"] else "conv",
        **kinds(config, "Attn"),
    )
    assert_equal(ours, theirs, config, seed)


def test_timestep_embedding_is_that_of_diffusers_to_the_bit():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.arange(1000)
    for dim in range(2, 513, 2):
        expected = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        assert torch.equal(U.timestep_embedding(t, dim), expected), dim


# ---- the contract of a denoiser


def test_names_are_those_of_the_released_code():
    names = set(U.UNet(**FULL).state_dict())
    assert {
        "time_embed.0.weight",
        "time_embed.2.bias",
        "input_blocks.0.0.weight",
        "input_blocks.1.0.in_layers.2.weight",
        "input_blocks.1.0.emb_layers.1.weight",
        "input_blocks.2.0.op.weight",
        "input_blocks.3.0.skip_connection.weight",
        "input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight",
        "input_blocks.3.1.transformer_blocks.0.ff.net.0.proj.weight",
        "middle_block.1.proj_in.weight",
        "middle_block.2.out_layers.3.weight",
        "output_blocks.1.2.conv.weight",
        "out.2.weight",
    } <= names


@pytest.mark.parametrize("seed", SEEDS)
def test_plan_is_consistent(seed):
    r = random.Random(seed)
    multipliers, blocks = [r.randint(1, 4) for _ in range(r.randint(1, 5))], r.randint(1, 3)
    down = U.down_plan(3, 32, multipliers, blocks, [1, 4])
    up = U.up_plan(down, blocks)
    stack, c, factor = list(down), down[-1].c_out, down[-1].factor
    for stage in up:
        skip = stack.pop()
        assert stage.c_in == c + skip.c_out and stage.factor == skip.factor == factor
        c, factor = stage.c_out, factor // 2 if stage.up else factor
        assert stage.attention == (stage.factor in (1, 4))
    assert not stack and factor == 1 and c == 32 * multipliers[0]


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_shapes_and_batch_independence(seed, context):
    unet = randomise(U.UNet(**configuration(seed, context)), seed)
    x, t, cond = given(unet, b=3, seed=seed)
    with torch.no_grad():
        together = unet(x, t, cond)
        assert together.shape == (3, unet.out_channels, *x.shape[2:])
        for i in range(3):
            one = SimpleNamespace(**{k: v if v is None else v[i : i + 1] for k, v in vars(cond).items()})
            torch.testing.assert_close(unet(x[i : i + 1], t[i : i + 1], one), together[i : i + 1], atol=1e-4, rtol=1e-4)


def test_predicts_nothing_at_the_start():
    unet = U.UNet(**FULL)
    assert not unet(*given(unet)).any()


def test_gradients_reach_every_parameter():
    unet = randomise(U.UNet(**FULL)).train()
    unet(*given(unet)).square().sum().backward()
    assert not [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(dtype):
    unet = randomise(U.UNet(**FULL))
    x, t, cond = given(unet)
    with torch.no_grad():
        expected = unet(x, t, cond)
        low = SimpleNamespace(**{name: value.to(dtype) for name, value in vars(cond).items()})
        out = unet.to(dtype)(x.to(dtype), t, low)
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (out.double() - expected.double()).abs().max() < tolerance * expected.abs().max()


def test_autocast_trains():
    unet = randomise(U.UNet(**FULL)).train()
    x, t, cond = given(unet)
    exact = torch.autograd.grad(unet(x, t, cond).square().mean(), unet.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = unet(x, t, cond).float().square().mean()
    rough = torch.autograd.grad(loss, unet.parameters())
    a, b = (torch.cat([g.flatten() for g in gradient]) for gradient in (exact, rough))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


@pytest.mark.parametrize("slot", ["context", "concat", "vector"])
def test_every_slot_matters_and_only_to_its_own_picture(slot):
    unet = randomise(U.UNet(**FULL))
    x, t, cond = given(unet)
    with torch.no_grad():
        before = unet(x, t, cond)
        getattr(cond, slot)[1] += 1.0
        after = unet(x, t, cond)
    torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after[1], before[1], atol=1e-3)


def test_time_matters_and_narrow_blocks_are_deaf():
    def change(channels: int) -> float:
        block = randomise(U.ResBlock(channels, channels, 16))
        x = torch.randn(1, channels, 4, 4)
        return (block(x, torch.randn(1, 16)) - block(x, torch.randn(1, 16))).abs().max().item()

    assert change(32) < 1e-4 < 1e-2 < change(64)  # one channel a group: the norm removes what was added
    unet = randomise(U.UNet(**FULL))
    x, t, cond = given(unet)
    assert not torch.allclose(unet(x, t, cond), unet(x, (t + 500) % 1000, cond), atol=1e-3)


def test_dropout_only_while_training():
    unet = randomise(U.UNet(**FULL, dropout=0.5))
    x, t, cond = given(unet)
    assert torch.equal(unet(x, t, cond), unet(x, t, cond))
    unet.train()
    assert not torch.equal(unet(x, t, cond), unet(x, t, cond))


# ---- what does not fit


@pytest.mark.parametrize(
    "slot, value",
    [
        ("context", None),
        ("concat", None),
        ("vector", None),
        ("context", torch.zeros(2, 5, 17)),
        ("context", torch.zeros(1, 5, 16)),
        ("context", torch.zeros(2, 16)),
        ("concat", torch.zeros(2, 3, 4, 8)),
        ("concat", torch.zeros(2, 2, 8, 8)),
        ("vector", torch.zeros(2, 7)),
        ("vector", torch.zeros(3, 6)),
    ],
)
def test_a_slot_that_does_not_fit_is_named(slot, value):
    unet = U.UNet(**FULL)
    x, t, cond = given(unet)
    setattr(cond, slot, value)
    with pytest.raises(LDMError, match=rf"cond\.{slot}"):
        unet(x, t, cond)


@pytest.mark.parametrize("slot", ["context", "concat", "vector"])
def test_a_slot_that_is_not_wanted_is_named(slot):
    unet = U.UNet(3, 3, 64, (1,), 1, ())
    x, t, cond = given(unet)
    setattr(cond, slot, torch.zeros(2, 5))
    with pytest.raises(LDMError, match=rf"cond\.{slot} was given"):
        unet(x, t, cond)


def test_a_bare_tensor_is_no_condition():
    unet = U.UNet(3, 3, 64, (1,), 1, ())
    x, t, _ = given(unet)
    with pytest.raises(LDMError, match="cond is a Tensor"):
        unet(x, t, torch.zeros(2, 5, 16))
    assert unet(x, t, SimpleNamespace(context=None)).shape == x.shape


@pytest.mark.parametrize(
    "x, word", [(torch.zeros(1, 4, 8, 8), "in_channels"), (torch.zeros(1, 3, 8, 9), "divisible by 2")]
)
def test_an_input_that_does_not_fit_is_named(x, word):
    unet = U.UNet(3, 3, 64, (1, 1), 1, ())
    with pytest.raises(LDMError, match=word):
        unet(x, torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(attention_factors=(8,)), "attention_factors"),
        (dict(attention_factors=(32, 16)), "not sizes of the map"),
        (dict(head_channels=48), "head_channels=48"),
        (dict(heads=3), "heads=3"),
        (dict(channels=48), "channels=48"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, word):
    with pytest.raises(LDMError, match=word):
        U.UNet(**{"channels": 64, "multipliers": (1, 2), "attention_factors": (2,)} | options)


# ---- keeping it


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("config", [FULL, configuration(0, False), configuration(3, True)])
def test_saved_and_made_again(tmp_path, config, half):
    unet = randomise(U.UNet(**config))
    unet.save_pretrained(tmp_path / "unet", half=half)
    again = U.UNet.from_pretrained(tmp_path, part="unet")
    assert again.config == unet.config and not again.training
    assert all(p.dtype == torch.float32 for p in again.parameters())
    if half:
        unet = unet.half().float()
    with torch.no_grad():
        torch.testing.assert_close(again(*given(again)), unet(*given(unet)))


def test_another_network_s_weights_are_refused(tmp_path):
    U.UNet(3, 3, 64, (1,), 1, ()).save_pretrained(tmp_path / "a")
    U.UNet(3, 3, 64, (1, 2), 1, ()).save_pretrained(tmp_path / "b")
    (tmp_path / "a" / "config.json").write_text((tmp_path / "b" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="model.safetensors"):
        U.UNet.from_pretrained(tmp_path / "a")


def test_a_small_unet_learns_one_batch():
    from ldm_edu.basics import fit
    from ldm_edu.diffusion.schedule import NoiseSchedule, diffusion_loss

    torch.manual_seed(0)
    unet = U.UNet(3, 3, 64, (1,), 1, ())
    x, t, noise = torch.rand(4, 3, 4, 4) * 2 - 1, torch.tensor([10, 300, 600, 900]), torch.randn(4, 3, 4, 4)
    losses = fit(unet, lambda b: diffusion_loss(unet, NoiseSchedule(), *b), [(x, t, noise)], steps=60, lr=2e-3)
    assert math.isclose(losses[0], noise.square().mean().item(), rel_tol=1e-5) and losses[-1] < 0.1 * losses[0]
