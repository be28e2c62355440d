"""Properties of the KL first stage on random configurations (test_published.py holds it against diffusers)."""

import random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_edu.errors import LDMError
from ldm_edu.first_stage import AutoencoderKL, DiagonalGaussian, FirstStageLoss, estimate_scale
from ldm_edu.first_stage.autoencoder import Decoder, Encoder, MiddleAttention
from ldm_edu.first_stage.tiling import decode_global, decode_local, encode_local
from ldm_edu.layers import Upsample, group_norm


def random_config(seed: int) -> dict:
    rng = random.Random(seed)
    levels = rng.randint(1, 4)
    return dict(
        channels=8 * rng.randint(1, 3),
        multipliers=tuple(rng.randint(1, 3) for _ in range(levels)),
        blocks=rng.randint(1, 2),
        latent_channels=rng.randint(1, 5),
        attention=rng.random() < 0.7,
        attention_factors=tuple(2**i for i in range(levels) if rng.random() < 0.3),
        groups=8,
    )


@pytest.mark.parametrize("seed", range(8))
def test_shapes_follow_the_configuration(seed):
    config = random_config(seed)
    model = AutoencoderKL(**config)
    assert model.f == 2 ** (len(config["multipliers"]) - 1)
    x = torch.randn(2, 3, 2 * model.f, 3 * model.f)
    z = model.encode(x)
    assert z.shape == (2, config["latent_channels"], 2, 3) and model.decode(z).shape == x.shape


@pytest.mark.parametrize("seed", range(4))
def test_attention_stands_where_it_was_asked_for(seed):
    config = random_config(seed)
    model = AutoencoderKL(**config)
    for level, (down, up) in enumerate(zip(model.encoder.down, model.decoder.up)):
        wanted = 2**level in config["attention_factors"]
        assert (len(down.attn), len(up.attn)) == (config["blocks"] * wanted, (config["blocks"] + 1) * wanted)
    assert (len(list(model.encoder.mid.attn_1.parameters())) > 0) == config["attention"]


def test_gradients_reach_every_parameter():
    model = AutoencoderKL(32, (1, 2), 1, 3, attention_factors=(2,))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = model.posterior(x)
    loss, _ = FirstStageLoss(l2_weight=1.0)(x, model.decode(posterior.sample()), posterior)
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_scaled_latents_decode_to_the_same_image():
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
    with pytest.raises(LDMError, match=r"attention_factors=\(8,\)"):
        Encoder(4, channels=32, multipliers=(1, 2), attention_factors=(8,))
    with pytest.raises(LDMError, match="multipliers"):
        Decoder(4, channels=32, multipliers=())
    with pytest.raises(LDMError, match="kl_weight"):
        FirstStageLoss(kl_weight=-1.0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_attention_is_fused_and_equals_the_matrix_written_down(seed, layout):
    """With every other way forbidden it still runs: so the matrix of all places times all places is never made."""
    torch.manual_seed(seed)
    channels, (height, width) = 8 * (seed + 1), torch.randint(2, 12, (2,)).tolist()
    layer, x = MiddleAttention(channels, groups=8), torch.randn(2, channels, height, width)
    q, k, v = (part(layer.norm(x)).flatten(2).mT for part in (layer.q, layer.k, layer.v))
    written_down = torch.softmax(q @ k.mT / channels**0.5, -1) @ v
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = layer(x.to(memory_format=layout))
    torch.testing.assert_close(fused, x + layer.proj_out(written_down.mT.reshape(x.shape)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_the_half_that_may_be_cut_has_no_attention(seed):
    """`encode_local` and `decode_local` give the same whether or not there is attention: they run none of it."""
    config = random_config(seed) | dict(attention=True)
    model = AutoencoderKL(**config)
    x = torch.randn(1, 3, 2 * model.f, 3 * model.f)
    h = decode_global(model, model.encode(x))
    before, back = encode_local(model, x), decode_local(model, h)
    for layer in model.modules():
        if isinstance(layer, MiddleAttention):
            layer.forward = lambda x: x / 0  # would be seen
    assert torch.equal(encode_local(model, x), before) and torch.equal(decode_local(model, h), back)
    factors = config["attention_factors"]
    assert x.shape[-1] // before.shape[-1] == min(factors, default=model.f)
    assert x.shape[-1] // h.shape[-1] == max(1, min(factors, default=2 * model.f) // 2)


# What the first stage and the UNet share ------------------------------------------------------------------------------


def test_group_norm_is_the_first_stages_or_the_unets():
    x = 1e-2 * torch.randn(2, 12, 5, 7)  # so small that eps is seen
    grouped = x.unflatten(1, (3, 4))
    for eps in (1e-5, 1e-6):
        layer = group_norm(12, 3) if eps == 1e-5 else group_norm(12, 3, eps=eps)
        over = dict(dim=(2, 3, 4), keepdim=True)
        by_hand = (grouped - grouped.mean(**over)) / (grouped.var(**over, correction=0) + eps).sqrt()
        torch.testing.assert_close(layer(x), by_hand.flatten(1, 2))
    with pytest.raises(LDMError, match="channels=48 cannot be split into groups=32"):
        group_norm(48)


def test_upsampling_repeats_and_convolves():
    layer, x = Upsample(3), torch.randn(2, 3, 4, 5)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(layer(x), torch.conv2d(repeated, layer.conv.weight, layer.conv.bias, padding=1))
    assert set(layer.state_dict()) == {"conv.weight", "conv.bias"}
