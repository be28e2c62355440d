"""ldm_edu.diffusion, levels and predictions: against diffusers, torch.distributions, autograd and quadrature."""

import copy
import gc
import itertools
import json
import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ldm_edu.diffusion import levels as module
from ldm_edu.diffusion.levels import SCHEDULES, NoiseLevels, per_sample
from ldm_edu.diffusion.mixture import GaussianMixture, log_joint
from ldm_edu.diffusion.sampling import SAMPLERS, SeededNoise, last
from ldm_edu.diffusion.schedule import PREDICTIONS, NoiseSchedule, diffusion_loss
from ldm_edu.errors import LDMError

SHAPES = [(), (3,), (2, 5), (3, 4, 4), (1, 2, 3, 2)]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(low: float, high: float, g: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=g, dtype=torch.float64).item()


def random_schedule(seed: int) -> NoiseSchedule:
    "A schedule of 10 to 1000 levels, of usual strength: the shorter, the more noise a step adds."
    g = rng(seed)
    T = int(torch.randint(10, 1001, (), generator=g))
    start, end = uniform(0.0005, 0.003, g) * 1000 / T, uniform(0.008, 0.02, g) * 1000 / T
    return NoiseSchedule(T=T, beta_start=min(start, 0.2), beta_end=min(end, 0.6))


def theirs(schedule: NoiseSchedule) -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=schedule.T,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule="scaled_linear",
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[schedule.prediction],
        clip_sample=False,
    )


def random_mixture(seed: int, shape: tuple[int, ...] = (2,)) -> GaussianMixture:
    g = rng(seed)
    k = int(torch.randint(1, 5, (), generator=g))
    means = 1.5 * torch.randn(k, *shape, generator=g, dtype=torch.float64)
    stds, weights = (0.1 + torch.rand(k, generator=g, dtype=torch.float64) for _ in range(2))
    return GaussianMixture(means, stds, weights)


def noised_batch(mixture: GaussianMixture, schedule: NoiseSchedule, n: int, seed: int):
    g = rng(seed)
    x0 = mixture.sample(n, g)
    t = torch.randint(0, schedule.T, (n,), generator=g)
    return x0, t, torch.randn(x0.shape, generator=g, dtype=x0.dtype)


# the schedule


@pytest.mark.parametrize("seed", range(8))
def test_curves_are_those_of_diffusers(seed):
    ours = random_schedule(seed)
    other = theirs(ours)
    torch.testing.assert_close(ours.betas.float(), other.betas, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.alphas_cumprod.float(), other.alphas_cumprod, rtol=1e-4, atol=1e-7)


THEIR_NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}  # of diffusers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_kind_is_that_of_diffusers(kind, zero_terminal_snr, seed):
    ours = replace(random_schedule(seed), kind=kind, zero_terminal_snr=zero_terminal_snr, prediction="v")
    ends = dict(beta_start=ours.beta_start, beta_end=ours.beta_end, num_train_timesteps=ours.T)
    other = DDPMScheduler(beta_schedule=THEIR_NAMES[kind], rescale_betas_zero_snr=zero_terminal_snr, **ends)
    # theirs are float32: near the end the little signal that is left is all rounding
    torch.testing.assert_close(ours.betas.float(), other.betas, rtol=1e-4, atol=1e-4 if zero_terminal_snr else 1e-7)
    torch.testing.assert_close(ours.alphas_cumprod.float(), other.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("T", [2, 3, 50, 1000])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_zero_terminal_snr_leaves_nothing_at_the_end_and_the_first_level_as_it_was(kind, T):
    plain, closed = NoiseLevels(T=T, kind=kind), NoiseLevels(T=T, kind=kind, zero_terminal_snr=True)
    assert closed.alphas_cumprod[-1] == closed.alpha[-1] == closed.snr[-1] == 0
    assert closed.betas[-1] == closed.sigma[-1] == 1
    torch.testing.assert_close(closed.betas[0], plain.betas[0], rtol=1e-10, atol=0)
    assert (closed.alpha.diff() < 0).all() and (closed.alpha[1:] < plain.alpha[1:]).all()
    torch.testing.assert_close(closed.alpha[1:-1] - plain.alpha[1:-1], -plain.alpha[-1] * lost(plain)[1:-1])


def lost(levels: NoiseLevels) -> torch.Tensor:
    "The share of the last level's signal that is taken from each: all at the last, nothing at the first."
    first, last = levels.alpha[0], levels.alpha[-1]
    return (first - levels.alpha) / (first - last)


@pytest.mark.parametrize("cls", [NoiseLevels, NoiseSchedule])
@pytest.mark.parametrize("make", [torch.tensor, np.array, np.float32], ids=["torch", "array", "numpy"])
def test_numbers_of_numpy_and_torch_become_numbers_of_python(cls, make):
    given, levels = dict(T=50, beta_start=0.25, beta_end=0.5), object.__new__(cls)  # past the check of the types
    for name, value in given.items():
        object.__setattr__(levels, name, np.int64(value) if (name, make) == ("T", np.float32) else make(value))
    levels.__post_init__()
    assert levels == cls(**given) and levels.config == cls(**given).config
    assert cls(**json.loads(json.dumps(levels.config))) == levels
    assert [type(v) for v in (levels.T, levels.beta_start, levels.beta_end)] == [int, float, float]


def test_a_config_of_a_schedule_from_before_there_was_a_choice():
    old = dict(T=50, kind="scaled_linear", beta_start=0.0015, beta_end=0.0195, prediction="v")
    assert NoiseSchedule(**old) == NoiseSchedule(*old.values())  # the order of the arguments is as it was
    assert NoiseSchedule(**old).config == old | {"zero_terminal_snr": False}


@pytest.mark.parametrize("seed", range(6))
def test_curves_fit_each_other(seed):
    s = random_schedule(seed)
    for curve in (s.betas, s.alphas_cumprod, s.alpha, s.sigma, s.snr):
        assert curve.dtype == torch.float64 and curve.shape == (s.T,)
    torch.testing.assert_close(s.alpha**2 + s.sigma**2, torch.ones(s.T, dtype=torch.float64))
    torch.testing.assert_close(s.snr, s.alpha**2 / s.sigma**2)
    assert (s.snr.diff() < 0).all() and s.snr[-1] > 0


def test_defaults_are_the_papers():
    s = NoiseSchedule()
    assert (s.T, s.prediction) == (1000, "epsilon")
    assert s.betas[0].item() == pytest.approx(0.0015) and s.betas[-1].item() == pytest.approx(0.0195)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_q_sample_is_add_noise_of_diffusers(seed, shape):
    s, g = random_schedule(seed), rng(seed)
    x0, noise = torch.randn(2, 5, *shape, generator=g)
    t = torch.randint(0, s.T, (5,), generator=g)
    torch.testing.assert_close(s.q_sample(x0, t, noise), theirs(s).add_noise(x0, noise, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_x0_is_that_of_diffusers(seed):
    s, g = random_schedule(seed), rng(seed)
    x_t, prediction = torch.randn(2, 1, 3, 4, 4, generator=g)
    t = int(torch.randint(0, s.T, (), generator=g))
    expected = theirs(s).step(prediction, t, x_t, generator=g).pred_original_sample
    x0, noise = s.x0_and_noise(prediction, x_t, torch.tensor([t]))
    torch.testing.assert_close(x0, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(noise, prediction)


@pytest.mark.parametrize("seed", range(6))
def test_v_is_that_of_diffusers(seed):
    """Target, and the clean sample that follows; and an error in v is never made larger."""
    s, g = replace(random_schedule(seed), prediction="v"), rng(seed)
    x0, noise, wrong = torch.randn(3, 1, 3, 4, 4, generator=g)
    t = torch.randint(0, s.T, (1,), generator=g)
    target, x_t = s.target(x0, noise, t), s.q_sample(x0, t, noise)
    torch.testing.assert_close(target, theirs(s).get_velocity(x0, noise, t), rtol=1e-4, atol=1e-4)
    expected = theirs(s).step(target + wrong, int(t), x_t, generator=g).pred_original_sample
    found, its_noise = s.x0_and_noise(target + wrong, x_t, t)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for error in (found - x0, its_noise - noise):
        assert error.abs().max() <= wrong.abs().max() * 1.001
    torch.testing.assert_close(s.q_sample(found, t, its_noise), x_t, rtol=1e-4, atol=1e-4)


def test_what_is_no_pair_of_samples_has_no_target():
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([1, 2])
    for s in (NoiseSchedule(), NoiseSchedule(prediction="v")):
        with pytest.raises((LDMError, TypeError), match="noise"):
            s.target(x, x[:, :1], t)
        for wrong in (torch.ones(2, 3, dtype=torch.long), [1.0, 2.0], torch.zeros(())):
            with pytest.raises((LDMError, TypeError)):
                s.target(wrong, wrong, t)
            with pytest.raises((LDMError, TypeError)):
                s.x0_and_noise(wrong, wrong, t)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_walk_the_same_way_whatever_is_predicted(name):
    """The exact denoiser of a mixture, asked for ε, for x0 and for v."""
    m, schedules = random_mixture(4), [NoiseSchedule(T=50, prediction=prediction) for prediction in PREDICTIONS]
    x_T = torch.randn(8, 2, generator=rng(1), dtype=torch.float64)
    ends = [last(SAMPLERS[name](m.denoiser(s), x_T, s, 10, noise=SeededNoise(range(8)))) for s in schedules]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-8, atol=1e-8)


def every_schedule() -> list[NoiseSchedule]:
    "All kinds, predictions and ends that go together."
    given = itertools.product(SCHEDULES, PREDICTIONS, [False, True])
    return [
        NoiseSchedule(kind=kind, prediction=prediction, zero_terminal_snr=closed)
        for kind, prediction, closed in given
        if not (closed and prediction == "epsilon")
    ]


@pytest.mark.parametrize("s", every_schedule(), ids=lambda s: f"{s.kind}-{s.prediction}-{s.zero_terminal_snr}")
def test_every_prediction_leads_back_to_image_and_noise(s):
    t = torch.arange(s.T)
    x0, noise = torch.randn(2, s.T, 3, generator=rng(0), dtype=torch.float64)
    back = s.x0_and_noise(s.target(x0, noise, t), s.q_sample(x0, t, noise), t)
    torch.testing.assert_close(back, (x0, noise), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("s", every_schedule(), ids=lambda s: f"{s.kind}-{s.prediction}-{s.zero_terminal_snr}")
def test_the_losses_weigh_an_error_in_the_image(s):
    "By the SNR where the noise is predicted, by 1 where the image is, by 1 + SNR where v is."
    x0, noise, wrong = torch.randn(3, 4, 5, generator=rng(0), dtype=torch.float64)
    for level in (0, 200, 700, s.T - 1):
        t = torch.full((4,), level)

        def denoise(x_t, t, cond):
            guess = x0 + wrong
            return s.target(guess, (x_t - s.alpha[level] * guess) / s.sigma[level], t)

        weight = diffusion_loss(denoise, s, x0, t, noise) / wrong.square().mean()
        expected = {"epsilon": s.snr, "x0": torch.ones_like(s.snr), "v": 1 + s.snr}[s.prediction][level]
        torch.testing.assert_close(weight, expected, rtol=1e-8, atol=0)


def test_the_best_guess_is_the_same_whatever_is_predicted():
    "And needs no schedule but levels; where no signal is left it is the mean of the mixture."
    m, x = random_mixture(3), torch.randn(5, 2, generator=rng(0), dtype=torch.float64)
    t = torch.tensor([0, 9, 99, 500, 999])
    for s in every_schedule():
        levels = NoiseLevels(kind=s.kind, zero_terminal_snr=s.zero_terminal_snr)
        x0, noise = m.posterior_mean(levels, x, t)
        torch.testing.assert_close(levels.q_sample(x0, t, noise), x)
        torch.testing.assert_close(s.x0_and_noise(m.denoiser(s)(x, t), x, t), (x0, noise), rtol=1e-8, atol=1e-8)
        if s.zero_terminal_snr:
            torch.testing.assert_close(x0[-1], m.mean)
    cond = SimpleNamespace(vector=torch.eye(len(m.weights), dtype=torch.float64)[[0] * 5])
    assert not torch.equal(m.posterior_mean(levels, x, t, cond)[0], x0)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_at_every_level(shape):
    s, g = random_schedule(1), rng(0)
    x0, noise = torch.randn(2, s.T, *shape, generator=g, dtype=torch.float64)
    t = torch.arange(s.T)
    back = s.x0_and_noise(s.target(x0, noise, t), s.q_sample(x0, t, noise), t)
    torch.testing.assert_close(back, (x0, noise))


def test_two_levels_compose():
    "Eq. 5 to 7, exactly: coefficients of a walk over s equal those of the direct way."
    s = random_schedule(3)
    low, high = s.T // 4, s.T - 1
    alpha_ts = s.alpha[high] / s.alpha[low]
    by_products = (1 - s.betas[low + 1 :]).sqrt().prod()
    torch.testing.assert_close(alpha_ts, by_products)
    variance = torch.zeros((), dtype=torch.float64)
    for beta in s.betas[low + 1 :]:
        variance = (1 - beta) * variance + beta
    torch.testing.assert_close(s.sigma[high] ** 2 - alpha_ts**2 * s.sigma[low] ** 2, variance)


def test_float32_follows_float64():
    s = NoiseSchedule()
    x0, noise = torch.randn(2, 1000, 3, generator=rng(0), dtype=torch.float64)
    t = torch.arange(1000)
    single = s.q_sample(x0.float(), t, noise.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), s.q_sample(x0, t, noise), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_levels_may_be_of_either_integer_type(dtype):
    s = NoiseSchedule()
    t = torch.tensor([0, 999], dtype=dtype)
    assert per_sample(s.alpha, t, torch.zeros(2, 3, 4)).shape == (2, 1, 1)


def test_an_empty_batch_is_a_batch():
    x, t = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    assert NoiseSchedule().q_sample(x, t, x).shape == (0, 3)


@pytest.fixture
def casts(monkeypatch) -> list[torch.dtype]:
    "The dtypes that tables were cast to so far."
    done, like = [], module._like
    monkeypatch.setattr(module, "_like", lambda table, x: done.append(x.dtype) or like(table, x))
    return done


def test_a_table_is_cast_once_for_each_dtype(casts):
    s, t = NoiseSchedule(), torch.tensor([0, 999])
    for dtype in 3 * [torch.float32, torch.bfloat16]:
        x0, noise = torch.randn(2, 2, 3, dtype=dtype)
        s.q_sample(x0, t, noise)
        s.x0_and_noise(noise, x0, t)
    assert casts == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]  # alpha and sigma
    other = NoiseSchedule()
    other.q_sample(x0, t, noise)
    assert len(casts) == 6, "another schedule has tables of its own, though it is equal"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_cast_that_is_kept_has_the_same_numbers(dtype):
    s, t = random_schedule(2), torch.tensor([0, 9, 5])
    x = torch.zeros(3, 1, dtype=dtype)
    for table in 2 * [s.alpha, s.sigma, s.snr]:
        assert torch.equal(per_sample(table, t, x)[:, 0], table.to(dtype)[t])
    assert s.alpha.dtype == torch.float64


def test_a_copied_schedule_has_no_casts(casts):
    s, x, t = NoiseSchedule(), torch.zeros(1, 1), torch.tensor([3])
    before = len(pickle.dumps(s)), vars(s).keys()
    s.alpha, s.sigma
    size = len(pickle.dumps(s))
    s.q_sample(x, t, x)
    assert len(pickle.dumps(s)) == size > before[0] and vars(s).keys() == before[1] | {"alpha", "sigma"}
    for copied in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s)):
        casts.clear()
        torch.testing.assert_close(copied.q_sample(x + 1, t, x), s.q_sample(x + 1, t, x), rtol=0, atol=0)
        assert len(casts) == 2


def test_casts_go_with_their_schedule():
    gc.collect()
    before = len(module._CASTS)
    s, x, t = NoiseSchedule(), torch.zeros(1, 1), torch.tensor([3])
    for dtype in (torch.float32, torch.float64):
        s.q_sample(x.to(dtype), t, x.to(dtype))
    assert len(module._CASTS) == before + 2
    del s
    gc.collect()
    assert len(module._CASTS) == before


def test_a_table_that_was_changed_in_place_is_cast_anew():
    table, t, x = torch.ones(5, dtype=torch.float64), torch.tensor([3]), torch.ones(1)
    assert per_sample(table, t, x) == 1
    table.fill_(7)
    assert per_sample(table, t, x) == 7


def test_a_tensor_of_a_mode_that_pretends_is_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    s = NoiseSchedule()
    s.sigma  # made before
    with FakeTensorMode(allow_non_fake_inputs=True):
        s.q_sample(torch.ones(2, 3), torch.tensor([1, 2]), torch.ones(2, 3))
    x_t = s.q_sample(torch.ones(2, 3), torch.tensor([1, 2]), torch.ones(2, 3))
    assert type(x_t) is torch.Tensor and x_t.isfinite().all()


def test_a_cast_that_was_kept_in_inference_mode_serves_in_training():
    s, t = NoiseSchedule(), torch.tensor([3])
    x = torch.randn(1, 2, requires_grad=True)
    with torch.inference_mode():
        s.q_sample(torch.zeros(1, 2), t, torch.zeros(1, 2))
    s.x0_and_noise(x, s.q_sample(x, t, x), t)[0].sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_a_learned_table_is_cast_anew():
    table, t, x = torch.ones(5, dtype=torch.float64, requires_grad=True), torch.tensor([3]), torch.ones(1)
    for _ in range(2):
        per_sample(table, t, x).sum().backward()
    assert table.grad[3] == 2


def test_saved_and_copied_schedules_are_equal():
    s = random_schedule(0)
    s.alpha  # computed and kept: must not get in the way of comparing or pickling
    assert NoiseSchedule(**json.loads(json.dumps(s.config))) == s
    assert pickle.loads(pickle.dumps(s)) == s == copy.deepcopy(s)
    assert s != NoiseSchedule() and len({s, copy.copy(s)}) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(kind="quadratic"), "kind='quadratic'.*'linear', 'scaled_linear', 'cosine'"),
        (dict(kind=""), "kind"),
        (dict(prediction="noise"), "prediction='noise'.*'epsilon'"),
        (dict(T=0), "T=0"),
        (dict(T=-5), "T=-5"),
        (dict(beta_start=0.0), "beta_start=0.0"),
        (dict(beta_start=-0.1), "beta_start"),
        (dict(beta_end=1.0), "beta_end=1.0"),
        (dict(beta_start=0.02, beta_end=0.01), "beta_start=0.02"),
        (dict(beta_end=float("nan")), "beta_end"),
        (dict(T=True), "T=True"),
        (dict(T=1_000_001), "T=1000001"),
        (dict(beta_start=1e-15, beta_end=0.1), "beta_start=1e-15"),
        (dict(T=1, zero_terminal_snr=True, prediction="v"), "zero_terminal_snr needs T of at least 2"),
        (dict(zero_terminal_snr=True), "zero_terminal_snr=True: no signal is left .* use 'v' or 'x0'"),
        (dict(T=20_000), "T=20000, beta_end=0.0195: no signal is left at the last level"),
        (dict(T=100_000), "T=100000.* leave no signal"),
        (dict(T=10_000, beta_end=0.9, prediction="v"), "T=10000 .*leave no signal: the last levels are all alike"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(LDMError, match=named):
        NoiseSchedule(**arguments)


def test_levels_that_are_too_many_are_refused_without_a_prediction_too():
    with pytest.raises(LDMError, match="leave no signal: the last levels are all alike"):
        NoiseLevels(T=100_000)


@pytest.mark.parametrize("wrong", ["yes", 1, 0, None, np.bool_(True)])
def test_what_is_neither_true_nor_false_is_no_choice_of_the_end(wrong):
    levels = NoiseLevels()
    object.__setattr__(levels, "zero_terminal_snr", wrong)  # past the check of the types
    with pytest.raises(LDMError, match="zero_terminal_snr=.* should be True or False"):
        levels.__post_init__()


@pytest.mark.parametrize("t", [-1, 1000, 10_000])
def test_levels_out_of_range_are_refused(t):
    s, x = NoiseSchedule(), torch.zeros(2, 3)
    for call in (s.q_sample, lambda x0, t, noise: s.x0_and_noise(x0, noise, t)):
        with pytest.raises(LDMError, match=r"t must lie in \[0, 1000\)"):
            call(x, torch.tensor([0, t]), x)


@pytest.mark.parametrize(
    ("t", "noise"),
    [
        (torch.tensor([1]), torch.zeros(2, 3)),  # one level for two samples would broadcast
        (torch.tensor([1.0, 2.0]), torch.zeros(2, 3)),  # levels are integers
        (torch.tensor([1, 2]), torch.zeros(1, 3)),  # one noise for two samples would broadcast
        (torch.tensor([[1], [2]]), torch.zeros(2, 3)),
    ],
)
def test_shapes_in_the_signatures_are_true(t, noise):
    import jaxtyping

    with pytest.raises(jaxtyping.TypeCheckError):
        NoiseSchedule().q_sample(torch.zeros(2, 3), t, noise)


def test_levels_without_predictions_are_a_class_of_their_own():
    assert NoiseLevels(T=7).alpha.shape == (7,)
    torch.testing.assert_close(NoiseLevels().snr, NoiseSchedule().snr)


# the loss


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_the_mean_squared_error(seed, shape):
    s, g = random_schedule(seed), rng(seed)
    x0, noise = torch.randn(2, 6, *shape, generator=g)
    t, seen = torch.randint(0, s.T, (6,), generator=g), []

    def denoise(x_t, level, cond):
        seen.append((x_t, level, cond))
        return x_t.tanh()

    loss = diffusion_loss(denoise, s, x0, t, noise, cond="told")
    x_t = theirs(s).add_noise(x0, noise, t)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(x_t.tanh(), noise), rtol=1e-3, atol=1e-4)
    assert len(seen) == 1 and torch.equal(seen[0][1], t) and seen[0][2] == "told"


def test_loss_has_a_gradient():
    s, scale = NoiseSchedule(), torch.zeros((), requires_grad=True)
    x0, noise = torch.randn(2, 64, 3, generator=rng(0))
    diffusion_loss(lambda x, t, c: scale * x, s, x0, torch.full((64,), 900), noise).backward()
    assert scale.grad < -1  # at high levels the noise is nearly what is seen: a greater scale is better


# the mixture


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3)])
def test_density_is_that_of_torch_distributions(seed, shape):
    m = random_mixture(seed, shape)
    stds = m.stds.reshape(-1, *[1] * len(shape)).expand_as(m.means)
    other = MixtureSameFamily(Categorical(m.weights), Independent(Normal(m.means, stds), len(shape)))
    x = torch.randn(20, *shape, generator=rng(seed), dtype=torch.float64)
    torch.testing.assert_close(m.log_prob(x), other.log_prob(x))


@pytest.mark.parametrize("seed", range(3))
def test_moments_of_samples(seed):
    m = random_mixture(seed, (2, 2))
    x = m.sample(100_000, rng(seed))
    torch.testing.assert_close(x.mean(0), m.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(x.flatten(1).T.cov(), m.cov, atol=0.08, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_noised_mixture_is_what_q_sample_makes(seed):
    m, s = random_mixture(seed), random_schedule(seed)
    t, noise = s.T // 3, torch.randn(100_000, 2, generator=rng(1)).double()
    x = s.q_sample(m.sample(100_000, rng(0)), torch.full((100_000,), t), noise)
    there = m.noised(s, t)
    torch.testing.assert_close(x.mean(0), there.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(x.T.cov(), there.cov, atol=0.08, rtol=0)


def score_times_sigma(m, s, t, x):
    x = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(m.noised(s, t).log_prob(x).sum(), x)
    return -s.sigma[t] * score


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 2, 2)])
def test_perfect_denoiser_is_the_score(seed, shape):
    m, s = random_mixture(seed, shape), random_schedule(seed)
    for t in (0, s.T // 2, s.T - 1):
        x = m.noised(s, t).sample(30, rng(seed))
        torch.testing.assert_close(m.denoiser(s)(x, torch.full((30,), t)), score_times_sigma(m, s, t, x))


def test_the_score_test_can_fail():
    m, s = random_mixture(3), NoiseSchedule()
    x, t = m.noised(s, 200).sample(30, rng(0)), torch.full((30,), 200)
    for wrong in (-m.denoiser(s)(x, t), m.denoiser(s)(x, t + 20), GaussianMixture(m.means, m.stds).denoiser(s)(x, t)):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong, score_times_sigma(m, s, 200, x))


@pytest.mark.parametrize("seed", range(4))
def test_perfect_denoiser_by_quadrature(seed):
    "E[x0 | x_t] from Bayes' rule on a grid of x0: no formula of the Gaussian posterior in it."
    m, s = random_mixture(seed, (1,)), random_schedule(seed)
    grid = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    prior = m.log_prob(grid[:, None])
    for t in (s.T // 10, s.T // 2, s.T - 1):
        for x in (-1.5, 0.2, 2.0):
            share = (prior + Normal(s.alpha[t] * grid, s.sigma[t]).log_prob(torch.tensor(x))).softmax(0)
            x_t, level = torch.tensor([[x]], dtype=torch.float64), torch.tensor([t])
            x0, _ = s.x0_and_noise(m.denoiser(s)(x_t, level), x_t, level)
            assert x0.item() == pytest.approx((share * grid).sum().item(), abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_beats_the_perfect_denoiser(seed):
    m, s = random_mixture(seed), random_schedule(seed)
    batch, perfect = noised_batch(m, s, 50_000, seed), m.denoiser(s)
    best = diffusion_loss(perfect, s, *batch)
    others = [
        lambda x, t, c: 0.95 * perfect(x, t),
        lambda x, t, c: perfect(x, t) + 0.05,
        lambda x, t, c: perfect(x, (t + s.T // 20).clamp(max=s.T - 1)),
        GaussianMixture(m.means + 0.2, m.stds, m.weights).denoiser(s),
    ]
    for other in others:
        apart = diffusion_loss(other, s, *batch) - best
        assert apart > 0
        x_t = s.q_sample(batch[0], batch[1], batch[2])
        gap = (other(x_t, batch[1], None) - perfect(x_t, batch[1])).square().mean()
        torch.testing.assert_close(apart, gap, rtol=0.2, atol=2e-3)  # the loss is the floor plus the distance


@pytest.mark.parametrize("seed", range(4))
def test_condition_replaces_the_weights_sample_by_sample(seed):
    m, s, g = random_mixture(seed + 10), random_schedule(seed), rng(seed)
    k = len(m.weights)
    vector = torch.rand(12, k, generator=g, dtype=torch.float64)
    x, t, _ = noised_batch(m, s, 12, seed)
    together = m.denoiser(s)(x, t, SimpleNamespace(vector=vector))
    for i in range(12):
        alone = GaussianMixture(m.means, m.stds, vector[i]).denoiser(s)(x[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)
    for nothing in (None, SimpleNamespace(vector=None), SimpleNamespace(context=vector)):
        assert torch.equal(m.denoiser(s)(x, t, nothing), m.denoiser(s)(x, t))


def test_one_hot_condition_is_one_gaussian():
    "The regression line, and no nan from the logarithm of weight 0."
    m, s = random_mixture(12), NoiseSchedule()
    k = len(m.weights) - 1
    x, t = torch.randn(9, 2, generator=rng(0), dtype=torch.float64), torch.arange(100, 1000, 100)
    vector = torch.eye(k + 1, dtype=torch.float64)[[k]].expand(9, -1)
    said, _ = s.x0_and_noise(m.denoiser(s)(x, t, SimpleNamespace(vector=vector)), x, t)
    alpha, sigma = s.alpha[t][:, None], s.sigma[t][:, None]
    line = m.means[k] + alpha * m.stds[k] ** 2 / (alpha**2 * m.stds[k] ** 2 + sigma**2) * (x - alpha * m.means[k])
    torch.testing.assert_close(said, line)


def test_points_are_remembered():
    "Gaussians of width 0: at low levels the denoiser finds the very point."
    points, s = torch.randn(6, 3, 8, 8, generator=rng(0)), NoiseSchedule()
    t = torch.full((6,), 200)
    noise = torch.randn(points.shape, generator=rng(1))
    x_t = s.q_sample(points, t, noise)
    x0, eps = s.x0_and_noise(GaussianMixture(points, torch.zeros(6)).denoiser(s)(x_t, t), x_t, t)
    torch.testing.assert_close(x0, points, atol=1e-4, rtol=0)
    torch.testing.assert_close(eps, noise, atol=1e-4, rtol=0)


def test_far_away_and_nearly_clean_stays_finite():
    m, s = random_mixture(1), NoiseSchedule()
    far = torch.full((2, 2), 1e4)
    assert m.denoiser(s)(far, torch.tensor([0, 999])).isfinite().all()
    assert m.log_prob(far).isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_mixture_float32_follows_float64(seed):
    m, s = random_mixture(seed), NoiseSchedule()
    x, t, _ = noised_batch(m, s, 200, seed)
    single = m.denoiser(s)(x.float(), t)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), m.denoiser(s)(x, t), atol=1e-3, rtol=1e-3)


def test_sampling_repeats_with_its_generator():
    m = random_mixture(0)
    assert torch.equal(m.sample(5, rng(3)), m.sample(5, rng(3)))
    assert not torch.equal(m.sample(5, rng(3)), m.sample(5, rng(4)))


@pytest.mark.parametrize(
    ("stds", "weights", "named"),
    [
        ([1.0], None, "2 means, 1 stds"),
        ([1.0, 1.0], [1.0], "1 weights"),
        ([1.0, -1.0], None, "negative"),
        ([1.0, 1.0], [1.0, -1.0], "negative"),
        ([1.0, 1.0], [0.0, 0.0], "positive"),
    ],
)
def test_bad_mixtures_are_refused(stds, weights, named):
    import jaxtyping

    weights = None if weights is None else torch.tensor(weights)
    with pytest.raises((LDMError, jaxtyping.TypeCheckError)):  # with shapes checked, lengths are caught by them
        GaussianMixture(torch.zeros(2, 3), torch.tensor(stds), weights)


def test_weights_need_not_sum_to_one():
    m = GaussianMixture(torch.zeros(2, 1), torch.ones(2), torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(m.weights, torch.tensor([0.75, 0.25]))
    assert GaussianMixture(torch.zeros(4, 1), torch.ones(4)).weights.tolist() == [0.25] * 4


def test_log_joint_is_normalised():
    m = random_mixture(0, (1,))
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    area = log_joint(x, m.means, m.stds**2, m.weights).exp().sum() * (x[1, 0] - x[0, 0])
    assert area.item() == pytest.approx(1, abs=1e-6)


def test_floor_of_one_gaussian():
    s, width, t = NoiseSchedule(), 0.7, 400
    bell = GaussianMixture(torch.zeros(1, 2).double(), torch.tensor([width]).double())
    x0 = bell.sample(200_000, rng(0))
    noise = torch.randn(x0.shape, generator=rng(1)).double()
    floor = diffusion_loss(bell.denoiser(s), s, x0, torch.full((len(x0),), t), noise)
    power = (s.alpha[t].item() * width) ** 2
    assert floor.item() == pytest.approx(power / (power + s.sigma[t].item() ** 2), abs=0.01)
    assert math.isfinite(floor)


@pytest.mark.parametrize("T", [1, 7, 50, 1000])
def test_the_cosine_schedule_is_that_of_diffusers(T):
    theirs = DDPMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2").betas
    torch.testing.assert_close(NoiseLevels(T=T, kind="cosine").betas.float(), theirs)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_samplers_reach_a_known_image_on_the_cosine_schedule(name, prediction):
    schedule = NoiseSchedule(kind="cosine", prediction=prediction)
    x0 = torch.randn(2, 3, 4, 4, generator=rng(0), dtype=torch.float64)

    def oracle(x_t, t, cond=None):
        noise = (x_t - per_sample(schedule.alpha, t, x_t) * x0) / per_sample(schedule.sigma, t, x_t)
        return schedule.target(x0, noise, t)

    x_T = torch.randn(x0.shape, generator=rng(1), dtype=torch.float64)
    end = last(SAMPLERS[name](oracle, x_T, schedule, 10, noise=SeededNoise(range(2))))
    torch.testing.assert_close(end, x0, rtol=1e-4, atol=1e-4)
    assert NoiseSchedule(**schedule.config) == schedule
