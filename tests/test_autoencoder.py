"""The first stage against an independent implementation, and its properties on random configurations."""

import random

import pytest
import torch

from ldm_edu.autoencoder import AutoencoderKL, Decoder, DiagonalGaussian, Encoder, estimate_scale
from ldm_edu.losses import FirstStageLoss
from ldm_edu.settings import LDMError


def random_config(seed: int) -> dict:
    rng = random.Random(seed)
    return dict(
        channels=32 * rng.randint(1, 2),
        multipliers=(1, *(rng.randint(1, 3) for _ in range(rng.randint(0, 3)))),  # diffusers has no other first one
        blocks=rng.randint(1, 2),
        latent_channels=rng.randint(1, 5),
        attention=rng.random() < 0.7,
    )


def diffusers_name(name: str, levels: int) -> str:
    """A parameter of ours in diffusers' AutoencoderKL."""
    names = {
        "mid.block_1": "mid_block.resnets.0",
        "mid.block_2": "mid_block.resnets.1",
        "mid.attn_1": "mid_block.attentions.0",
        "nin_shortcut": "conv_shortcut",
        "norm_out": "conv_norm_out",
    }
    if "attn_1" in name:
        names |= {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", "proj_out": "to_out.0", ".norm.": ".group_norm."}
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    parts = name.split(".")
    if parts[1] in ("down", "up"):
        level = int(parts[2]) if parts[1] == "down" else levels - 1 - int(parts[2])
        resize = ["downsamplers" if parts[1] == "down" else "upsamplers", "0"]
        inner = ["resnets", *parts[4:]] if parts[3] == "block" else [*resize, *parts[4:]]
        parts = [parts[0], f"{parts[1]}_blocks", str(level), *inner]
    return ".".join(parts)


@pytest.mark.parametrize("seed", range(8))
def test_equals_diffusers(seed):
    from diffusers import AutoencoderKL as Theirs

    config = random_config(seed)
    torch.manual_seed(seed)
    ours, levels = AutoencoderKL(**config).eval(), len(config["multipliers"])
    widths = [config["channels"] * m for m in config["multipliers"]]
    theirs = Theirs(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=widths, layers_per_block=config["blocks"], latent_channels=config["latent_channels"],
        norm_num_groups=32, mid_block_add_attention=config["attention"],
    ).eval()  # fmt: skip
    flat = {k: v.flatten(1) if v.ndim == 4 and "attn_1" in k else v for k, v in ours.state_dict().items()}
    theirs.load_state_dict({diffusers_name(k, levels): v for k, v in flat.items()})
    x = torch.randn(2, 3, 8 * ours.f, 4 * ours.f)
    with torch.no_grad():
        mine, other = ours.posterior(x), theirs.encode(x).latent_dist
        torch.testing.assert_close(mine.mean, other.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.logvar, other.logvar, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.decode(mine.mean), theirs.decode(mine.mean).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_shapes_follow_the_configuration(seed):
    config = random_config(seed)
    model = AutoencoderKL(**config)
    assert model.f == 2 ** (len(config["multipliers"]) - 1)
    x = torch.randn(2, 3, 2 * model.f, 3 * model.f)
    z = model.encode(x)
    assert z.shape == (2, config["latent_channels"], 2, 3) and model.decode(z).shape == x.shape


def test_gradients_reach_every_parameter():
    model = AutoencoderKL(32, (1, 2), 1, 3)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = model.posterior(x)
    loss, _ = FirstStageLoss(l2_weight=1.0)(x, model.decode(posterior.sample()), posterior)
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_scaled_latents_decode_to_the_same_picture():
    model = AutoencoderKL(32, (1, 2), 1, 3)
    x = torch.rand(1, 3, 16, 16)
    before, z = model.reconstruct(x), model.encode(x)
    model.scale_factor = 0.25
    torch.testing.assert_close(model.reconstruct(x), before)
    torch.testing.assert_close(model.encode(x), 0.25 * z)


def test_estimated_scale_gives_unit_standard_deviation():
    torch.manual_seed(0)
    model, images = AutoencoderKL(32, (1, 2), 1, 3), torch.rand(100, 3, 32, 32)
    model.scale_factor = estimate_scale(model, images)
    noise = torch.randn(100, 3, 16, 16)
    with torch.no_grad():
        assert abs(model.encode(images, noise).std().item() - 1) < 0.02


def test_the_log_variance_is_kept_within_reach():
    wild = DiagonalGaussian(torch.zeros(1, 1, 1, 2), torch.tensor([[[[1e4, -1e4]]]]))
    assert wild.std.isfinite().all() and wild.kl().isfinite().all()


def test_refuses_what_does_not_fit():
    model = AutoencoderKL(32, (1, 2, 2), 1, 3)
    with pytest.raises(LDMError, match="multiples of f = 4"):
        model.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(LDMError, match="groups"):
        Encoder(4, channels=20)
    with pytest.raises(LDMError, match="groups"):
        Decoder(4, channels=20)
    with pytest.raises(LDMError, match="kl_weight"):
        FirstStageLoss(kl_weight=-1.0)
