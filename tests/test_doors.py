"""What a public function is given: the commonest slips are named, and nothing wrong is taken without a word.

tests/fuzz tries arguments of all kinds; these are the ones that users met.
"""

import copy
import math

import pytest
import torch

from ldm_edu import AutoencoderKL, LatentDiffusion, LDMError, NoiseSchedule, TextConditioner, UNet
from ldm_edu.conditioning import Condition, Guidance, drop
from ldm_edu.conditioning.text import WordTokenizer
from ldm_edu.diffusion import SAMPLERS, SeededNoise, diffusion_loss, last
from ldm_edu.evaluation.metrics import psnr, ssim
from ldm_edu.evaluation.reconstruction import Mean, score_first_stage
from ldm_edu.first_stage import AutoencoderVQ, IdentityFirstStage
from ldm_edu.first_stage.quantization import nearest
from ldm_edu.first_stage.tiling import decode_tiled, encode_tiled
from ldm_edu.training.loop import step_randomness

REFUSED = (LDMError, TypeError)  # in these tests a wrong type is stopped by the checks of the signatures already
SCHEDULE = NoiseSchedule()


def small_stage(kind: str = "kl"):
    torch.manual_seed(0)
    shape = dict(channels=8, multipliers=(1, 2), blocks=1, latent_channels=3, groups=4)
    if kind == "identity":
        return IdentityFirstStage()
    return (AutoencoderKL(**shape, scale_factor=0.5) if kind == "kl" else AutoencoderVQ(**shape, num_codes=16)).eval()


def small_unet(**arguments) -> UNet:
    torch.manual_seed(0)
    unet = UNet(3, 3, 32, (1, 2), 1, (2,), **arguments)
    with torch.no_grad():
        for p in unet.parameters():
            if not p.any():
                p.normal_(std=0.05)
    return unet.eval()


def small_model() -> LatentDiffusion:
    text = TextConditioner(["red", "ball"], length=4, dim=16, depth=1, heads=2)
    return LatentDiffusion(small_stage(), small_unet(context_dim=16), NoiseSchedule(T=50), text, size=16).eval()


# --- Images and latents ---


@pytest.mark.parametrize("kind", ["kl", "vq", "identity"])
@pytest.mark.parametrize(
    "slip, said",
    [
        (lambda x: x[0], r"x should have the shape \(b, 3, h, w\), not \(3, 16, 16\); one of them alone is x\[None\]"),
        (lambda x: x[:, :1], r"x should have the shape \(b, 3, h, w\), not \(2, 1, 16, 16\)"),
        (lambda x: x.to(torch.uint8), r"floating-point numbers, not torch\.uint8; .*x\.float\(\) / 127\.5 - 1"),
        (lambda x: 255 * x.abs(), r"x should be images in \[-1, 1\], but holds values from"),
        (lambda x: x * math.nan, "but holds values from nan"),
    ],
)
def test_the_commonest_slips_with_images_are_named(kind, slip, said):
    stage, x = small_stage(kind), torch.rand(2, 3, 16, 16)
    for use in (stage.encode, stage.posterior, stage.reconstruct, lambda x: encode_tiled(stage, x, tile=8)):
        with pytest.raises(REFUSED) as error:
            use(slip(x))
        if isinstance(error.value, LDMError):
            assert error.match(said)


@pytest.mark.parametrize("kind", ["kl", "vq", "identity"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_answer_in_the_number_format_that_they_are_given(kind, dtype):
    stage, x = small_stage(kind), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        z, back = stage.encode(x), stage.reconstruct(x)
        for model, image in ((stage, x.to(dtype)), (copy.deepcopy(stage).to(dtype), x)):
            assert model.encode(image).dtype == model.decode(z.to(image.dtype)).dtype == image.dtype
            torch.testing.assert_close(model.encode(image).float(), z, rtol=0.1, atol=0.1)
            assert (model.reconstruct(image).float() - back).abs().mean() < 0.05
            assert encode_tiled(model, image, tile=8).dtype == decode_tiled(model, z.to(image.dtype), tile=8).dtype
        unet, t = small_unet(), torch.tensor([3, 40])
        want = unet(z, t)
        for model, latent in ((unet, z.to(dtype)), (copy.deepcopy(unet).to(dtype), z)):
            got = model(latent, t)
            assert got.dtype == latent.dtype
            torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)


def test_a_noise_of_another_batch_is_not_broadcast():
    stage, x = small_stage(), torch.rand(2, 3, 16, 16)
    with pytest.raises(REFUSED, match=r"noise has the shape \(1, 3, 8, 8\), but the latent has \(2, 3, 8, 8\)|noise"):
        stage.encode(x, torch.randn(1, 3, 8, 8))


def test_a_latent_of_other_channels_is_named():
    with pytest.raises(REFUSED, match=r"z should have the shape \(b, 3, h, w\), not \(2, 4, 8, 8\)|z"):
        small_stage().decode(torch.randn(2, 4, 8, 8))


# --- UNet ---


@pytest.mark.parametrize(
    "t",
    [torch.tensor([-1, 3]), torch.tensor([1.0, 2.0]), torch.tensor([math.nan, 1]), torch.tensor([3]), torch.tensor(3)],
)
def test_timesteps_that_are_none_are_refused(t):
    with pytest.raises(REFUSED, match="t "):
        small_unet()(torch.randn(2, 3, 8, 8), t)


@pytest.mark.parametrize("argument", ["in_channels", "out_channels", "channels", "blocks", "head_channels", "heads"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_unet_of_impossible_numbers_is_refused(argument, value):
    with pytest.raises(LDMError, match=f"{argument}={value} should be a whole number, "):
        UNet(**{"channels": 32, "multipliers": (1, 2), argument: value})


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(concat_channels=-1), "concat_channels=-1 should be"),
        (dict(multipliers=(1, 0)), "multipliers=0 should be a whole number"),
        (dict(multipliers=()), "list of 1 to 12 whole numbers"),
        (dict(multipliers=(1,) * 13), "list of 1 to 12 whole numbers"),
        (dict(dropout=math.nan), "dropout=nan should be a finite number, at least 0 and at most 1"),
        (dict(transformer_depth=-1), "transformer_depth=-1"),
    ],
)
def test_impossible_arguments_of_a_unet_are_named(arguments, said):
    with pytest.raises(LDMError, match=said):
        UNet(**{"channels": 32, "multipliers": (1, 2)} | arguments)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(channels=0), "channels=0"),
        (dict(blocks=0), "blocks=0"),
        (dict(groups=-8), "groups=-8"),
        (dict(latent_channels=-1), "latent_channels=-1"),
        (dict(scale_factor=0.0), "scale_factor=0.0 should be a finite number"),
        (dict(scale_factor=math.nan), "scale_factor=nan"),
        (dict(scale_factor=-1.0), "scale_factor=-1.0"),
        (dict(scale_factor=1e-300), "scale_factor=1e-300"),
        (dict(multipliers=(1,) * 40), "list of 1 to 12 whole numbers"),
    ],
)
def test_impossible_arguments_of_a_first_stage_are_named(arguments, said):
    with pytest.raises(REFUSED, match=said):
        AutoencoderKL(**{"channels": 8, "groups": 4, "blocks": 1} | arguments)


@pytest.mark.parametrize("argument", ["length", "dim", "heads", "depth"])
def test_a_text_conditioner_of_impossible_numbers_is_refused(argument):
    with pytest.raises(LDMError, match=f"{argument}=-1 should be a whole number"):
        TextConditioner(["red"], **{"dim": 16, "heads": 2, argument: -1})


# --- Prompts ---


@pytest.mark.parametrize("prompt", ["!!! ???", "...", "a red ball 🎈", "red \udcea", "\u200b red", "☃"])
def test_a_prompt_that_would_not_be_heard_is_refused(prompt):
    with pytest.raises(LDMError, match="the prompt .* has (no words|symbols that are no words)"):
        small_model().sample(prompt, steps=1)


def test_punctuation_between_words_and_the_empty_prompt_are_heard():
    tokenizer = WordTokenizer(["red", "ball"], length=3)
    assert tokenizer(["Red, ball!", "", " \n"]).tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("prompts", [[None], [3], ["red", None], [["red"]]])
def test_a_prompt_that_is_no_text_is_refused(prompts):
    with pytest.raises(REFUSED, match="prompt|caption"):
        small_model().sample(prompts, steps=1)


# --- Diffusion ---


def test_bytes_are_not_noised_to_zeros():
    x = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    with pytest.raises(REFUSED, match=r"x0 should hold floating-point numbers, not torch\.uint8|x0"):
        SCHEDULE.q_sample(x, torch.tensor([1, 2]), torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("wrong", [lambda x: x[:, :1], lambda x: x[:1], lambda x: x.mean(), lambda x: x.long()])
def test_a_prediction_of_another_kind_never_becomes_a_loss_or_a_sample(wrong):
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([1, 2])
    with pytest.raises(LDMError, match="the prediction of denoise"):
        diffusion_loss(lambda x_t, t, cond: wrong(x_t), SCHEDULE, x, t, torch.randn_like(x))
    for sampler in SAMPLERS.values():
        with pytest.raises(LDMError, match="the prediction of denoise"):
            last(sampler(lambda x_t, t, cond: wrong(x_t), x, SCHEDULE, 2))
    guided = Guidance(lambda x_t, t, cond: wrong(x_t), Condition(vector=torch.zeros(1, 2)), 2.0)
    with pytest.raises(LDMError, match="the prediction of denoise"):
        guided(x, t, Condition(vector=torch.ones(2, 2)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_is_refused_at_the_call_not_at_its_first_step(sampler):
    ask, x = SAMPLERS[sampler], torch.randn(2, 4)
    for start, steps, said in ((x, 0, "steps=0"), (x, 1001, "steps=1001"), (x.long(), 5, "x_T"), (x / 0, 5, "x_T")):
        with pytest.raises(REFUSED, match=said):
            ask(lambda x, t, c: x, start, SCHEDULE, steps)
    with pytest.raises(LDMError, match="noise has 3 seeds for 2 samples"):
        ask(lambda x, t, c: x, x, SCHEDULE, 5, noise=SeededNoise([1, 2, 3]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_kept_in_float32_where_the_denoiser_has_16_bits(sampler):
    """A thousand small moves in bfloat16 would lead elsewhere."""
    truth = torch.tensor([[0.3, -0.7]])

    def denoise(x, t, cond):
        assert x.dtype == torch.bfloat16
        return ((x.double() - SCHEDULE.alpha[t, None] * truth) / SCHEDULE.sigma[t, None]).to(x.dtype)

    got = last(SAMPLERS[sampler](denoise, torch.randn(1, 2).bfloat16(), SCHEDULE, 1000))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), truth, atol=0.02, rtol=0)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_seeds_that_draw_what_another_draws_are_refused(seed):
    with pytest.raises(LDMError, match=f"seed={seed} should be a whole number, 0 to 4294967295"):
        SeededNoise([seed])
    with pytest.raises(LDMError, match=f"seed={seed}"):
        small_model().sample("red", seed=seed, steps=1)
    with pytest.raises(LDMError, match="seed=4294967295 should be a whole number, 0 to 4294967294"):
        small_model().sample("red", n=2, seed=2**32 - 1, steps=1)


def test_a_schedule_that_leaves_no_signal_is_refused():
    assert NoiseSchedule(T=4000).alpha[-1] > 0
    with pytest.raises(LDMError, match="leave no signal"):
        NoiseSchedule(T=100_000)
    for T in (0, 10**7):
        with pytest.raises(LDMError, match=f"T={T} should be a whole number, 1 to 1000000"):
            NoiseSchedule(T=T)


def test_a_sample_that_is_twice_in_a_batch_has_two_noises():
    drawn = step_randomness(0, 7, [3, 1, 3], (2, 2, 2))
    assert not torch.equal(drawn["noise"][0], drawn["noise"][2])
    alone = step_randomness(0, 7, [3], (2, 2, 2))
    assert all(torch.equal(drawn[key][:1], alone[key]) for key in drawn)


# --- Guidance ---


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1e39])
def test_a_scale_that_is_no_number_is_refused_before_anything_is_drawn(scale):
    with pytest.raises(LDMError, match="scale=.* should be a finite number"):
        small_model().sample("red", scale=scale)
    with pytest.raises(LDMError, match="scale="):
        Guidance(lambda x, t, c: x, Condition(vector=torch.zeros(1, 2)), scale)


def test_u_and_condition_must_be_of_as_many_images():
    cond, null = Condition(vector=torch.ones(3, 2)), Condition(vector=torch.zeros(1, 2))
    with pytest.raises(REFUSED, match=r"u has the shape \(1,\), but should be \(3,\)|u"):
        drop(cond, null, 0.5, torch.rand(1))
    with pytest.raises(LDMError, match="cond is of 3 images, but x_t of 2"):
        Guidance(lambda x, t, c: x, null, 2.0)(torch.randn(2, 4), torch.tensor([1, 2]), cond)


def test_a_null_of_a_wider_type_than_the_condition_guides():
    cond, null = Condition(vector=torch.ones(2, 2).bfloat16()), Condition(vector=torch.zeros(1, 2).double())
    got = Guidance(lambda x, t, c: x + c.vector[:, :1].to(x), null, 2.0)(torch.zeros(2, 2), torch.tensor([1, 2]), cond)
    assert torch.equal(got, torch.full((2, 2), 2.0))


def test_no_conditions_cannot_be_joined():
    for join in (Condition.cat, Condition.merge):
        with pytest.raises(LDMError, match="conditions is empty"):
            join([])


# --- Whole models ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_number_format_draws_nearly_the_same(dtype):
    model = small_model()
    want = model.sample("red ball", steps=4, seed=1)
    whole = copy.deepcopy(model).to(dtype).sample("red ball", steps=4, seed=1)
    part = copy.deepcopy(model)
    part.unet.to(dtype)
    for got in (whole, part.sample("red ball", steps=4, seed=1)):
        assert got.dtype == dtype and bool(got.isfinite().all())
        assert (got.float() - want).abs().mean() < 0.02


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(steps=0), "steps=0"),
        (dict(steps=51), "steps=51 should be a whole number, 1 to 50"),
        (dict(steps=1.5), "steps=1.5|steps"),
        (dict(n="2"), "n='2' should be|n"),
        (dict(seed=None), "seed=None should be|seed"),
        (dict(sampler=["ddim"]), "unknown sampler|sampler"),
        (dict(prompts=b"red"), "neither captions nor a batch|prompts"),
    ],
)
def test_what_sample_cannot_do_is_named(arguments, said):
    with pytest.raises(REFUSED, match=said):
        small_model().sample(**{"prompts": "red"} | arguments)


# --- Measures ---


@pytest.mark.parametrize("level", [1.0, 0.999, -1.0, 0.0])
def test_ssim_is_at_most_one_and_exact_on_flat_pictures(level):
    x = torch.full((1, 3, 64, 64), level)
    y = x - 1e-3
    assert ssim(x, x).item() == 1.0 and ssim(x, y).item() <= 1.0
    a, b = x.double().mean() / 2 + 0.5, y.double().mean() / 2 + 0.5
    assert abs(ssim(x, y).item() - ((2 * a * b + 1e-4) / (a * a + b * b + 1e-4)).item()) < 1e-7


def test_psnr_keeps_double_precision():
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    assert psnr(x, x + 1e-9).dtype == torch.float64
    torch.testing.assert_close(psnr(x, x + 1e-9).item(), 10 * math.log10(4e18), rtol=1e-9, atol=0)


def test_scores_of_a_lossless_first_stage_are_numbers():
    scores = score_first_stage(IdentityFirstStage(), torch.rand(4, 3, 32, 32) * 2 - 1, lambda a, b: torch.zeros(len(a)))
    assert str(scores.psnr) == "inf" and scores.psnr.error == 0.0 and "nan" not in str(scores)
    with pytest.raises(LDMError, match="values should be at least 2 numbers"):
        Mean.of(torch.tensor([1.0, math.nan]))


@pytest.mark.parametrize("offset", [0.0, 30.0, -300.0])
def test_the_nearest_entry_is_found_far_from_zero(offset):
    generator = torch.Generator().manual_seed(0)
    z, entries = (torch.randn(n, 3, generator=generator) + offset for n in (500, 256))
    want = (z[:, None].double() - entries.double()).square().sum(2).argmin(1)
    assert torch.equal(nearest(z, entries), want)
    assert torch.equal(
        nearest(z.bfloat16(), entries.bfloat16()), nearest(z.bfloat16().float(), entries.bfloat16().float())
    )
