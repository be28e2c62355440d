"""The codebook against diffusers' quantiser, its properties on random codebooks, and the three kinds of first stage."""

import math
import random

import pytest
import torch

from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import save_json
from ldm_edu.first_stage import AutoencoderKL, AutoencoderVQ, IdentityFirstStage
from ldm_edu.first_stage.quantization import VectorQuantizer, codebook_usage, load_first_stage, nearest


def random_case(seed: int) -> tuple[VectorQuantizer, torch.Tensor]:
    """A codebook with entries all over the place, and latents to quantise."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    quantize = VectorQuantizer(rng.randint(1, 500), rng.randint(1, 8), commitment=rng.choice([0.25, 0.5, 2.0]))
    torch.nn.init.normal_(quantize.embedding.weight)
    shape = rng.randint(1, 3), quantize.embedding.embedding_dim, rng.randint(1, 9), rng.randint(1, 9)
    return quantize, torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_equals_diffusers(seed, legacy):
    from diffusers.models.autoencoders.vae import VectorQuantizer as Theirs

    ours, z = random_case(seed)
    ours.legacy = legacy
    num_codes, channels = ours.embedding.weight.shape
    theirs = Theirs(num_codes, channels, beta=ours.commitment, legacy=legacy, sane_index_shape=True)
    theirs.load_state_dict(ours.state_dict())
    mine = ours(z)
    z_q, loss, (_, _, indices) = theirs(z)
    assert torch.equal(mine.indices, indices)
    torch.testing.assert_close(mine.z, z_q)
    torch.testing.assert_close(mine.loss, loss)
    weight = torch.randn_like(z_q)  # a decoder's gradient, which goes straight through
    for one, other in zip(
        torch.autograd.grad((mine.z * weight).sum() + mine.loss, (z, ours.embedding.weight)),
        torch.autograd.grad((z_q * weight).sum() + loss, (z, theirs.embedding.weight)),
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seed", range(8))
def test_no_entry_is_nearer_than_the_chosen_one(seed):
    quantize, z = random_case(seed)
    vectors = z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1]).double()
    entries = quantize.embedding.weight.detach().double()
    distances = (vectors[:, None] - entries).square().sum(-1)
    chosen = distances.gather(1, quantize(z).indices.reshape(-1, 1))[:, 0]
    assert (chosen <= distances.amin(1) * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("rows", [1, 7, 999, 1000, 1001, 10**9])
def test_nearest_does_not_depend_on_how_many_are_looked_at_together(rows):
    generator = torch.Generator().manual_seed(0)
    vectors, entries = torch.randn(1000, 4, generator=generator), torch.randn(50, 4, generator=generator)
    assert torch.equal(nearest(vectors, entries, rows=rows), nearest(vectors, entries))
    assert torch.equal(nearest(entries, entries, rows=rows), torch.arange(50))


@pytest.mark.parametrize("seed", range(4))
def test_quantising_twice_changes_nothing(seed):
    quantize, z = random_case(seed)
    once = quantize(z)
    twice = quantize(once.z)
    assert torch.equal(once.indices, twice.indices) and twice.loss < 1e-10
    torch.testing.assert_close(quantize.entries(once.indices), once.z)


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_goes_straight_through(seed):
    quantize, z = random_case(seed)
    weight = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((quantize(z).z * weight).sum(), z)
    torch.testing.assert_close(gradient, weight)


def test_half_precision_latents_choose_as_float32_does():
    quantize, z = random_case(1)
    half = z.detach().half()
    assert torch.equal(quantize(half).indices, quantize(half.float()).indices)
    assert quantize(half).z.dtype == quantize(half).loss.dtype == torch.float32


@pytest.mark.parametrize("num_codes", [1, 2, 17, 400])
def test_usage_counts_what_numpy_counts(num_codes):
    indices = torch.randint(num_codes, (3, 5, 7), generator=torch.Generator().manual_seed(num_codes))
    usage, values = codebook_usage(indices, num_codes), indices.flatten().tolist()
    shares = [values.count(value) / len(values) for value in set(values)]
    assert usage.used == len(shares) and usage.num_codes == num_codes
    assert math.isclose(usage.perplexity, math.exp(-sum(p * math.log(p) for p in shares)), rel_tol=1e-4)
    assert 1 - 1e-5 <= usage.perplexity <= usage.used * (1 + 1e-5)


@pytest.mark.parametrize("num_codes", [3, 60])  # fewer than there are vectors, and more
def test_init_from_data_puts_every_entry_on_a_vector(num_codes):
    torch.manual_seed(0)
    quantize, z = VectorQuantizer(num_codes, 4), torch.randn(2, 4, 5, 4)
    quantize.init_from_data(z)
    vectors = set(map(tuple, z.permute(0, 2, 3, 1).reshape(-1, 4).tolist()))
    entries = list(map(tuple, quantize.embedding.weight.tolist()))
    assert len(entries) == num_codes and set(entries) <= vectors
    assert quantize.embedding.weight.requires_grad
    assert codebook_usage(quantize(z).indices, num_codes).used == len(set(entries))


def test_a_codebook_has_an_entry():
    with pytest.raises(LDMError, match="num_codes=0"):
        VectorQuantizer(0, 3)


# the first stage with a codebook


@pytest.fixture
def small() -> AutoencoderVQ:
    torch.manual_seed(0)
    return AutoencoderVQ(8, (1, 2), 1, 3, num_codes=16, groups=4).eval()


def test_latents_are_taken_before_quantisation_and_decoding_quantises(small):
    x = torch.randn(1, 3, 12, 8)
    with torch.no_grad():
        z = small.encode(x)
        torch.testing.assert_close(z, small.quant_conv(small.encoder(x)))
        rounded = small.quantize(z).z
        assert not torch.allclose(rounded, z)
        torch.testing.assert_close(small.decode(z), small.decode(rounded))
        torch.testing.assert_close(small(x)[0], small.decode(z))


def test_gradients_reach_encoder_decoder_and_codebook(small):
    back, quantized = small(torch.randn(2, 3, 8, 8))
    (back.square().mean() + quantized.loss).backward()
    assert not [name for name, p in small.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert small.encoder.conv_in.weight.grad.abs().sum() > 0 and small.quantize.embedding.weight.grad.abs().sum() > 0


def test_noise_does_not_matter_where_the_latent_is_a_point(small):
    x = torch.randn(1, 3, 8, 8)
    z = small.encode(x)
    torch.testing.assert_close(small.encode(x, torch.randn_like(z)), z)
    assert small.posterior(x).std.max() < 1e-6 and small.scale_factor == 1.0


def test_sizes_that_cannot_be_halved_are_refused(small):
    for method in (small.posterior, small.encode, small.forward, small.reconstruct):
        with pytest.raises(LDMError, match="multiples of f = 2"):
            method(torch.randn(1, 3, 9, 8))


# no compression at all, and finding out which kind was saved


def test_the_identity_is_one():
    pixels, x = IdentityFirstStage(), torch.randn(2, 3, 7, 5)
    assert torch.equal(pixels.encode(x), x) and torch.equal(pixels.decode(x), x)
    assert torch.equal(pixels.reconstruct(3 * x), (3 * x).clamp(-1, 1))
    torch.testing.assert_close(pixels.posterior(x).sample(), x, rtol=0, atol=1e-5)
    assert pixels.f == 1 and pixels.latent_channels == 3 and pixels.scale_factor == 1.0


KINDS = {
    "KL": lambda: AutoencoderKL(8, (1, 2), 1, 2, groups=4, scale_factor=0.3, attention_factors=(2,)),
    "VQ": lambda: AutoencoderVQ(8, (1, 2), 1, 2, num_codes=5, groups=4, legacy=True),
    "identity": IdentityFirstStage,
}


@pytest.mark.parametrize("inside", ["", "first_stage"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_saved_and_found_again(tmp_path, kind, inside):
    torch.manual_seed(0)
    model, x = KINDS[kind]().eval(), torch.rand(1, 3, 8, 8)
    model.provenance = {"steps": 3}
    model.save_pretrained(tmp_path / inside)
    if inside:  # a whole model: its own config beside the part
        save_json({"size": 64}, tmp_path / "config.json")
    loaded = load_first_stage(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
    with torch.no_grad():
        torch.testing.assert_close(loaded.reconstruct(x), model.reconstruct(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_of_version_0_1_0_is_read(tmp_path, kind):
    """It says `codes` and `made` where later ones say `num_codes` and `provenance`."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    model.provenance = {"steps": 3}
    model.save_pretrained(tmp_path)
    old = {"num_codes": "codes", "provenance": "made"}
    (tmp_path / "config.json").unlink()
    save_json({old.get(name, name): value for name, value in model.config.items()}, tmp_path / "config.json")
    loaded = load_first_stage(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config


def test_the_shipped_first_stage_is_found_by_the_models_name():
    assert load_first_stage("toy-text2image").f == load_first_stage("toy-text2image", part="first_stage").f > 1


def test_a_part_may_be_named(tmp_path):
    IdentityFirstStage().save_pretrained(tmp_path / "other")
    assert isinstance(load_first_stage(tmp_path, part="other"), IdentityFirstStage)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "config.json is missing"),
        ({"config.json": "{"}, "config.json is not JSON"),
        ({"config.json": '{"num_codes": 5, "colour": 1}', "model.safetensors": ""}, "model.safetensors"),
        ({"config.json": '{"channels": 8, "multipliers": [1], "groups": 4}'}, "model.safetensors is missing"),
    ],
)
def test_a_folder_that_holds_no_first_stage(tmp_path, files, match):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=match):
        load_first_stage(tmp_path)


def test_weights_of_another_first_stage_are_refused(tmp_path, small):
    small.save_pretrained(tmp_path)
    config = small.config | {"num_codes": 17}
    (tmp_path / "config.json").unlink()
    save_json(config, tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit AutoencoderVQ"):
        load_first_stage(tmp_path)


def test_an_unknown_name_lists_what_is_shipped():
    with pytest.raises(CheckpointError, match="toy-text2image"):
        load_first_stage("no-such-model")
