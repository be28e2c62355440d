"""First stages, UNet, conditioners, guidance, schedules, samplers, metrics and whole models, called in all ways."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from small_model import SMALL, Refused, anything, ends_well, is_right, near, not_numbers, odd_ints, odd_numbers, tensors

from ldm_edu import LDMError, ToyFeatures
from ldm_edu.conditioning import Condition, Guidance, MergedConditioner, TextConditioner, drop
from ldm_edu.conditioning.text import WordTokenizer
from ldm_edu.denoiser import UNet
from ldm_edu.diffusion import SAMPLERS, NoiseSchedule, SeededNoise, diffusion_loss, last, timesteps
from ldm_edu.evaluation.judge import SceneReader
from ldm_edu.evaluation.metrics import psnr, ssim
from ldm_edu.evaluation.reconstruction import score_first_stage
from ldm_edu.first_stage import AutoencoderKL, AutoencoderVQ, IdentityFirstStage
from ldm_edu.first_stage.tiling import decode_tiled, encode_tiled

FEATURES, READER = ToyFeatures((8, 8, 8, 8)).eval(), SceneReader((8, 8, 8)).eval()
IMAGES = tensors(near(2, 3, 16, 16))
LATENTS = tensors(near(2, 3, 8, 8))


def make_stages():
    torch.manual_seed(1)
    vq = AutoencoderVQ(channels=8, multipliers=(1, 2), blocks=1, latent_channels=3, num_codes=16, groups=4)
    return [SMALL.first_stage, vq.eval(), IdentityFirstStage().eval()]


STAGES = make_stages()


# --- First stages ---


@given(x=IMAGES, which=st.integers(0, 2), way=st.sampled_from(["encode", "posterior", "reconstruct", "tiled", "score"]))
def test_encoding(x, which, way):
    stage = STAGES[which]
    calls = {
        "encode": lambda: stage.encode(x),
        "posterior": lambda: stage.posterior(x).mean,
        "reconstruct": lambda: stage.reconstruct(x),
        "tiled": lambda: encode_tiled(stage, x, tile=8),
        "score": lambda: score_first_stage(stage, x, lambda a, b: (a - b).abs().mean((1, 2, 3))),
    }
    with torch.no_grad():
        got = ends_well(calls[way])
    is_image = x.ndim == 4 and x.shape[1] == 3 and x.is_floating_point() and not any(n % stage.f for n in x.shape[2:])
    sane = is_image and x.numel() and bool(x.isfinite().all()) and x.abs().max() <= 5
    if sane and (way != "score" or len(x) > 1):
        assert not isinstance(got, Refused), got.message
    if way == "encode" and not isinstance(got, Refused):
        assert is_image and got.shape == (len(x), 3, x.shape[2] // stage.f, x.shape[3] // stage.f)
        assert got.dtype == x.dtype and bool(got.isfinite().all())


@given(z=LATENTS, which=st.integers(0, 2), tiled=st.booleans(), tile=anything, overlap=anything)
def test_decoding(z, which, tiled, tile, overlap):
    stage = STAGES[which]
    with torch.no_grad():
        got = ends_well(decode_tiled, stage, z, tile, overlap) if tiled else ends_well(stage.decode, z)
    if not isinstance(got, Refused):
        assert got.shape == (len(z), 3, z.shape[2] * stage.f, z.shape[3] * stage.f) and got.dtype == z.dtype


SIZES = st.one_of(st.integers(1, 3), st.sampled_from([0, -1, 8, 32, 2**20]), not_numbers)


@given(
    arguments=st.fixed_dictionaries(
        {},
        optional={
            "channels": st.one_of(st.sampled_from([8, 32, 0, -8, 7]), not_numbers),
            "multipliers": st.one_of(st.lists(st.integers(-1, 3), max_size=4), not_numbers, st.just([1] * 40)),
            "blocks": SIZES,
            "latent_channels": SIZES,
            "groups": st.one_of(st.sampled_from([1, 4, 0, -8]), not_numbers),
            "scale_factor": odd_numbers,
            "attention_factors": st.lists(st.integers(-1, 8), max_size=3),
        },
    )
)
def test_building_a_first_stage(arguments):
    sizes = (arguments.get("blocks", 1), arguments.get("latent_channels", 3))
    assume(not any(isinstance(n, int) and n > 100 for n in sizes))
    try:
        stage = ends_well(
            AutoencoderKL, **({"channels": 8, "groups": 4, "blocks": 1, "multipliers": (1, 2)} | arguments)
        )
    except TypeError:  # Python's own answer to what is no number or no list at all
        return
    if not isinstance(stage, Refused):
        side = 2 * stage.f
        with torch.no_grad():
            assert bool(stage.eval().reconstruct(torch.zeros(1, 3, side, side)).isfinite().all())


# --- UNet and conditions ---


@given(
    x=tensors(near(2, 3, 8, 8)),
    t=st.one_of(tensors(near(2)), st.lists(st.integers(-2, 10**7), max_size=3).map(torch.tensor), odd_ints),
    context=st.one_of(st.none(), tensors(near(2, 6, 16))),
    vector=st.one_of(st.none(), st.none(), tensors(near(2, 4))),
)
def test_the_unet(x, t, context, vector):
    try:
        cond = ends_well(Condition, context=context, vector=vector)
    except (TypeError, AttributeError):
        return
    if isinstance(cond, Refused):
        return
    with torch.no_grad():
        got = ends_well(SMALL.unet, x, t, cond)
    if not isinstance(got, Refused):
        assert got.shape == x.shape and got.dtype == x.dtype
        assert x.shape[1] == 3 and t.shape == x.shape[:1] and not t.is_floating_point() and (not len(t) or t.min() >= 0)
        assert vector is None and context.shape == (len(x), context.shape[1], 16)


@given(
    arguments=st.fixed_dictionaries(
        {},
        optional={
            "in_channels": SIZES,
            "out_channels": SIZES,
            "channels": st.one_of(st.sampled_from([32, 64, 0, -32, 48]), not_numbers),
            "multipliers": st.one_of(st.lists(st.integers(-1, 2), max_size=3), not_numbers, st.just([1] * 40)),
            "blocks": st.one_of(st.integers(-1, 2), not_numbers),
            "attention_factors": st.lists(st.integers(-1, 4), max_size=3),
            "head_channels": st.sampled_from([32, 16, 0, -1, 7]),
            "context_dim": st.sampled_from([None, 16, 0, -1]),
            "transformer_depth": st.sampled_from([1, 2, 0, -1]),
            "vector_dim": st.sampled_from([None, 4, 0, -1]),
            "concat_channels": st.sampled_from([0, 2, -1]),
            "dropout": odd_numbers,
            "heads": st.sampled_from([None, 1, 2, 0, -1, 5]),
        },
    )
)
def test_building_a_unet(arguments):
    assume(not any(n == 2**20 for n in arguments.values() if isinstance(n, int)))
    try:
        unet = ends_well(
            UNet, **({"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_factors": (2,)} | arguments)
        )
    except TypeError:
        return
    if isinstance(unet, Refused):
        return
    side = unet.factor * 2
    cond = Condition(
        context=torch.zeros(1, 2, unet.context_dim) if unet.context_dim else None,
        concat=torch.zeros(1, unet.concat_channels, side, side) if unet.concat_channels else None,
        vector=torch.zeros(1, unet.vector_dim) if unet.vector_dim else None,
    )
    with torch.no_grad():
        got = unet.eval()(torch.zeros(1, unet.in_channels, side, side), torch.tensor([3]), cond)
    assert got.shape == (1, unet.out_channels, side, side)


PROMPTS = st.one_of(
    st.lists(st.one_of(st.sampled_from(["a red ball", "a blue cube", ""]), st.text(max_size=12), anything), max_size=3),
    st.text(max_size=12),
    anything,
)


@given(prompts=PROMPTS, strict=st.booleans())
def test_the_text_conditioner(prompts, strict):
    conditioner = (
        SMALL.conditioner if strict else TextConditioner(["red"], length=4, dim=16, depth=1, heads=2, strict=False)
    )
    try:
        got = ends_well(conditioner, prompts)
    except TypeError:
        assert not isinstance(prompts, list | str)
        return
    if not isinstance(got, Refused):
        assert got.context.shape[::2] == (len(prompts), 16) and all(isinstance(prompt, str) for prompt in prompts)
        if strict:  # whatever was said was heard
            words = conditioner.tokenizer.decode(conditioner.tokenizer(prompts))
            assert all(words[i] or not prompt.strip() for i, prompt in enumerate(prompts))


@given(vocabulary=st.one_of(st.lists(st.one_of(st.text(max_size=5), anything), max_size=4), anything), length=anything)
def test_the_tokenizer(vocabulary, length):
    try:
        tokenizer = ends_well(WordTokenizer, vocabulary, length)
    except TypeError:
        return
    if not isinstance(tokenizer, Refused) and length < 1000:
        assert tokenizer([""]).shape == (1, length)


@given(
    scale=anything, x=tensors(near(2, 3, 8, 8)), prompts=st.sampled_from([["red"], ["red", "a"], ["red", "a", "ball"]])
)
def test_guidance(scale, x, prompts):
    with torch.no_grad():
        guided = ends_well(Guidance, SMALL.unet, SMALL.conditioner.null(), scale)
        if isinstance(guided, Refused):
            assert "scale" in guided.message
            return
        got = ends_well(guided, x, torch.full(x.shape[:1], 5), SMALL.conditioner(prompts))
    assert math.isfinite(scale)
    if not isinstance(got, Refused):
        assert got.shape == x.shape and len(prompts) == len(x)


@given(p=anything, u=tensors(near(2)))
def test_dropping_conditions(p, u):
    cond = SMALL.conditioner(["red", "a"])
    got = ends_well(drop, cond, SMALL.conditioner.null(), p, u)
    if not isinstance(got, Refused):
        assert len(got) == 2 and u.shape == (2,) and 0 <= p <= 1


@given(count=st.integers(0, 3))
def test_joining_conditions(count):
    conditions = [SMALL.conditioner(["red"]) for _ in range(count)]
    for join in (Condition.cat, Condition.merge):
        got = ends_well(join, conditions)
        assert isinstance(got, Refused) or count
    assert isinstance(ends_well(MergedConditioner, [SMALL.conditioner] * count), Refused) == (count == 0)


# --- Diffusion ---


@given(T=anything, beta_start=anything, beta_end=anything, kind=st.one_of(st.just("scaled_linear"), anything))
def test_schedules(T, beta_start, beta_end, kind):
    schedule = ends_well(NoiseSchedule, T, kind, beta_start, beta_end)
    if not isinstance(schedule, Refused):
        assert schedule.alpha.shape == (T,) and bool(schedule.alpha.isfinite().all()) and schedule.alpha.min() > 0


@given(
    T=st.integers(1, 1200),
    beta=st.tuples(st.floats(1e-5, 0.999), st.floats(1e-5, 0.999)).map(sorted),
    steps=st.integers(1, 12),
    sampler=st.sampled_from(sorted(SAMPLERS)),
)
def test_samplers_reach_the_truth(T, beta, steps, sampler):
    """A denoiser that knows the one and only sample leads to it, with any schedule and any number of steps."""
    schedule = ends_well(NoiseSchedule, T, "scaled_linear", *beta)
    assume(
        not isinstance(schedule, Refused) and steps <= T and schedule.alpha[-1] > 1e-6
    )  # else nothing is left to see
    truth = torch.tensor([[0.3, -0.7]], dtype=torch.float64)

    def denoise(x, t, cond):
        return (x - schedule.alpha[t, None] * truth) / schedule.sigma[t, None]

    x_T = torch.randn(1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = last(SAMPLERS[sampler](denoise, x_T, schedule, steps))
    torch.testing.assert_close(got, truth, atol=1e-4, rtol=0)


@given(
    x0=tensors(near(2, 3, 4, 4)),
    t=st.one_of(tensors(near(2)), st.lists(st.integers(-2, 120), max_size=3).map(torch.tensor)),
    noise=tensors(near(2, 3, 4, 4)),
    answer=tensors(near(2, 3, 4, 4)),
)
def test_noising_and_the_loss(x0, t, noise, answer):
    x_t = ends_well(SMALL.schedule.q_sample, x0, t, noise)
    loss = ends_well(diffusion_loss, lambda x, t, cond: answer, SMALL.schedule, x0, t, noise)
    if isinstance(x_t, Refused):
        assert isinstance(loss, Refused)
    else:
        assert x_t.shape == x0.shape == noise.shape and t.shape == x0.shape[:1]
        assert isinstance(loss, Refused) == (answer.shape != x0.shape or not answer.is_floating_point())


@given(
    x_T=tensors(near(2, 3, 4, 4)),
    steps=anything,
    eta=anything,
    seeds=st.one_of(st.just([1, 2]), st.lists(odd_ints, max_size=3), anything),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    wrong=st.booleans(),
)
def test_samplers(x_T, steps, eta, seeds, sampler, wrong):
    try:
        noise = ends_well(SeededNoise, seeds)
    except TypeError:
        return
    options = {"noise": noise if not isinstance(noise, Refused) else None} | ({"eta": eta} if sampler == "ddim" else {})
    walk = ends_well(
        SAMPLERS[sampler], lambda x, t, c: x[:1] if wrong else 0.1 * x, x_T, SMALL.schedule, steps, **options
    )
    if isinstance(walk, Refused):
        return
    got = ends_well(last, walk)  # what is wrong with the arguments was said above
    if isinstance(got, Refused):
        assert wrong and "prediction" in got.message
    elif x_T.numel():
        assert got.shape == x_T.shape and got.dtype == x_T.dtype and bool(got.isfinite().all())


@given(steps=anything)
def test_timesteps(steps):
    got = ends_well(timesteps, SMALL.schedule, steps)
    if not isinstance(got, Refused):
        assert len(got) == steps == len(set(got)) and got[0] == 99


# --- Whole models ---

FEW = st.one_of(st.integers(1, 3), anything)


@given(
    prompts=st.one_of(st.sampled_from([["a red ball"], ["a red ball", "blue"], "a cube"]), PROMPTS),
    n=st.one_of(st.none(), FEW),
    steps=FEW,
    scale=st.one_of(st.just(3.0), anything),
    seed=st.one_of(st.integers(0, 9), anything),
    sampler=st.one_of(st.sampled_from(sorted(SAMPLERS)), anything),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]),
)
def test_drawing(prompts, n, steps, scale, seed, sampler, dtype):
    assume(not (isinstance(n, int) and n > 50))
    model = SMALL if dtype == torch.float32 else copy.deepcopy(SMALL).to(dtype)
    got = ends_well(model.sample, prompts, n, steps, scale, seed, sampler)
    if not isinstance(got, Refused):
        count = (n or 1) if prompts is None or isinstance(prompts, str) else len(prompts)
        assert abs(scale) > 1e4 or is_right(got, count, 16), (got.shape, got.isfinite().all())
        assert got.dtype == dtype


# --- Measures ---


@given(x=tensors(near(2, 3, 16, 16)), y=tensors(near(2, 3, 16, 16)), which=st.sampled_from(["psnr", "ssim", "toy"]))
def test_metrics(x, y, which):
    got = ends_well({"psnr": psnr, "ssim": ssim, "toy": FEATURES.distance}[which], x, y)
    if isinstance(got, Refused):
        return
    assert got.shape == x.shape[:1] and x.shape == y.shape
    if x.numel() and bool(x.isfinite().all()) and bool(y.isfinite().all()) and max(x.abs().max(), y.abs().max()) < 10:
        assert not got.isnan().any()
        if which == "ssim":
            assert got.max() <= 1 and torch.equal(ssim(x, x), torch.ones(len(x), dtype=got.dtype))
            naive = np.array([float(a) for a in got])
            assert np.isfinite(naive).all()


@given(x=tensors(st.one_of(near(1, 3, 64, 64), near(2, 3, 16, 16))))
def test_the_judge(x):
    got = ends_well(READER.read, x)
    assert isinstance(got, Refused) or (len(got) == len(x) and x.shape[1:] == (3, 64, 64))


def test_a_try_that_ends_badly_would_be_seen():
    with pytest.raises(ZeroDivisionError):
        ends_well(lambda: 1 / 0)
    with pytest.raises(AssertionError):
        ends_well(lambda: (_ for _ in ()).throw(LDMError("")))
