"""ldm_edu.diffusion.sampling: against a plain reference, against diffusers' schedulers, and against exact solutions."""

import random
from math import log2
from types import SimpleNamespace

import diffusers.schedulers.scheduling_dpmsolver_multistep as multistep
import numpy as np
import pytest
import reference
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from ldm_edu.diffusion.levels import SCHEDULES, per_sample
from ldm_edu.diffusion.mixture import GaussianMixture
from ldm_edu.diffusion.sampling import (
    SAMPLERS,
    SPACINGS,
    SeededNoise,
    Step,
    amplitudes,
    ddim,
    ddpm,
    dpm_solver_pp,
    heun,
    last,
    posterior,
    timesteps,
)
from ldm_edu.diffusion.schedule import PREDICTIONS, NoiseSchedule
from ldm_edu.errors import LDMError

DETERMINISTIC = ["ddim", "heun", "dpm_solver_pp"]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dummy(x, t, cond=None):
    "A denoiser that is not linear, knows the level, and treats samples one by one."
    level = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x * torch.cos(level / 50)) + 0.3 * x


def random_schedule(g: random.Random, T: int, **given) -> NoiseSchedule:
    "Any kind, prediction and end that go together; the fewer levels, the more noise each adds."
    strength = 1000 / T * g.uniform(0.5, 1.0)
    words = dict(kind=g.choice(list(SCHEDULES)), zero_terminal_snr=g.random() < 0.5, prediction=g.choice(PREDICTIONS))
    words |= dict(beta_start=min(0.0015 * strength, 0.1), beta_end=min(0.0195 * strength, 0.4)) | given
    if words["prediction"] == "epsilon":
        words["zero_terminal_snr"] = False  # no x0 would follow
    return NoiseSchedule(T=T, **words)


def random_case(seed: int, **given) -> tuple[NoiseSchedule, int, torch.Tensor]:
    "A schedule, a number of steps that divides its levels, and a start."
    g = random.Random(seed)
    steps, factor = g.randint(2, 39), g.randint(3, 24)
    shape = [(3, 4, 4), (16,), (4, 8, 8), (1, 20)][seed % 4]
    x = torch.randn(3, *shape, generator=rng(seed), dtype=torch.float64)
    return random_schedule(g, steps * factor, **given), steps, x


def assert_close(ours, theirs, tolerance: float) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=tolerance, atol=tolerance)


# against the plain reference


def in_numpy(denoise):
    return lambda x, t: denoise(torch.from_numpy(x), torch.full((len(x),), t)).numpy()


def random_walk(g: random.Random, T: int, whole: bool) -> tuple[dict, list[tuple[int, int]]]:
    "Arguments of a sampler, and the pairs of levels that the reference makes of them."
    spacing = g.choice(SPACINGS) if T > 1 else "trailing"
    steps = T - (spacing == "leading") if whole else max(1, int(T ** g.random()))
    if spacing == "leading":
        steps = min(steps, T - 1)
    given, visited = dict(steps=steps, spacing=spacing), reference.levels(T, steps, spacing)
    if not whole and g.random() < 0.3:
        visited = sorted(g.sample(range(T), min(steps, T)), reverse=True)
        given = dict(steps=visited)
    end = g.choice([-1, 0]) if visited[-1] > 0 else -1
    return given | dict(end=end), list(zip(visited, [*visited[1:], end]))


@pytest.mark.parametrize("seed", range(64))
def test_every_step_is_that_of_the_plain_reference(seed):
    g = random.Random(seed)
    T = 1000 if seed % 16 == 0 else int(2 * 500 ** g.random())
    s = random_schedule(g, T)
    given, pairs = random_walk(g, T, whole=seed % 4 == 0 and T < 100)
    x, eta = (
        torch.randn(2, *g.choice([(5,), (3, 2), (1, 3, 3), ()]), generator=rng(seed), dtype=torch.float64),
        g.random(),
    )
    bar = np.cumprod(1 - reference.betas(s.kind, T, s.beta_start, s.beta_end, s.zero_terminal_snr))
    noise = [SeededNoise([seed, 7]) for _ in range(4)]

    def draw(stream):
        return lambda: stream.noise(x.shape[1:]).double().numpy()

    walks = {
        "ddpm": (dict(noise=noise[0]), dict(noise=draw(noise[1]))),
        "ddim": (dict(noise=noise[2], eta=eta), dict(noise=draw(noise[3]), eta=eta)),
        "heun": ({}, {}),
        "dpm_solver_pp": ({}, {}),
    }
    for name, (ours, theirs) in walks.items():
        expected = getattr(reference, name)(in_numpy(dummy), x.numpy(), bar, s.prediction, pairs, **theirs)
        for step, (t, after, x0) in zip(SAMPLERS[name](dummy, x, s, **given, **ours), expected, strict=True):
            assert step.t == t
            assert_close(step.x, after, 1e-10)
            assert_close(step.x0, x0, 1e-10)


def test_plms_with_many_steps_arrives_where_ddim_does():
    "The released code's sampler, which lives in the reference only: on a Gaussian both approach the exact end."
    s = NoiseSchedule()
    bell = GaussianMixture(torch.tensor([[0.7]]).double(), torch.tensor([0.6]).double())
    x = torch.linspace(-3, 3, 21, dtype=torch.float64)[:, None]
    exact, apart = bell.means + bell.stds * (x - bell.noised(s, 999).means) / bell.noised(s, 999).stds, []
    for n in (40, 400):
        visited = timesteps(s, n)
        pairs = list(zip(visited, [*visited[1:], -1]))
        walk = reference.plms(in_numpy(bell.denoiser(s)), x.numpy(), s.alphas_cumprod.numpy(), s.prediction, pairs)
        ends = torch.from_numpy(walk[-1][1]), last(ddim(bell.denoiser(s), x, s, n))
        apart.append([(ends[0] - ends[1]).abs().max(), *((end - exact).abs().max() for end in ends)])
    (first, plms_first, _), (then, plms_then, ddim_then) = apart
    assert then < first / 4 and then < 0.03 and plms_then < plms_first and plms_then < ddim_then < 0.03


# against diffusers, with our alphas_cumprod in float64 instead of their float32 ones
#
# Heun's method is compared with the plain reference only: that of diffusers walks on levels of its own and averages the
# slopes of the noise, not the guesses of x0. Left out, too: DDIM with "linspace", a spacing that we do not have (and
# whose step back diffusers computes as if the levels were evenly spaced), and diffusers' own trailing levels where the
# count does not divide T, of which there may be one too many.

WORDS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}  # of diffusers for our predictions
BY_STEP = 1e-9


def theirs(kind, s: NoiseSchedule, end: int = -1, **words):
    "A scheduler of diffusers that reads our tables."
    other = kind(num_train_timesteps=s.T, prediction_type=WORDS[s.prediction], **words)
    other.betas, other.alphas, other.alphas_cumprod = s.betas, 1 - s.betas, s.alphas_cumprod
    other.one = torch.ones((), dtype=torch.float64)
    other.final_alpha_cumprod = other.one if end < 0 else s.alphas_cumprod[0]
    return other


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("spacing, end", [("trailing", -1), ("leading", -1), ("leading", 0)])
def test_ddim_is_that_of_diffusers(seed, spacing, end, prediction):
    s, steps, x = random_case(seed, prediction=prediction)
    words = dict(clip_sample=False, set_alpha_to_one=end < 0, steps_offset=int(spacing == "leading"))
    other, after = theirs(DDIMScheduler, s, end, timestep_spacing=spacing, **words), x
    other.set_timesteps(steps)
    assert other.timesteps.tolist() == timesteps(s, steps, spacing)
    eta = 0.0 if seed % 3 == 0 else random.Random(seed).random()
    noise, same_noise = SeededNoise([5, 6, 7]), SeededNoise([5, 6, 7])
    ours = ddim(dummy, x, s, steps, eta=eta, noise=noise, spacing=spacing, end=end)
    for step, t in zip(ours, other.timesteps, strict=True):
        z = same_noise.noise(x.shape[1:]).double() if eta else None
        said = other.step(dummy(after, t.expand(len(x))), t, after, eta=eta, variance_noise=z)
        after = said.prev_sample
        assert step.t == t
        assert_close(step.x, after, BY_STEP)
        assert_close(step.x0, said.pred_original_sample, BY_STEP)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("seed", range(12))
def test_ddpm_is_that_of_diffusers(seed, prediction, monkeypatch):
    s, steps, x = random_case(seed, prediction=prediction)
    steps, whole = (None, s.T) if seed % 4 == 0 else (steps, steps)
    other, after, same_noise = theirs(DDPMScheduler, s, clip_sample=False), x, SeededNoise([5, 6, 7])
    other.set_timesteps(timesteps=timesteps(s, whole))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: same_noise.noise(shape[1:]).double()
    )
    ours = ddpm(dummy, x, s, steps, noise=SeededNoise([5, 6, 7]))
    for step, t in zip(ours, other.timesteps, strict=True):
        said = other.step(dummy(after, t.expand(len(x))), t, after)
        after = said.prev_sample
        assert_close(step.x, after, BY_STEP)
        assert_close(step.x0, said.pred_original_sample, BY_STEP)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # from diffusers
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("end", [-1, 0])
def test_dpm_solver_pp_is_that_of_diffusers(seed, end, prediction, monkeypatch):
    "Not where no signal is left at the last level: their table of sigma / alpha would be infinite there."
    s, steps, x = random_case(seed, prediction=prediction, zero_terminal_snr=False)
    # they round the state to float32 before each step: let that word mean float64 in their module
    monkeypatch.setattr(multistep, "torch", SimpleNamespace(**vars(torch) | {"float32": torch.float64}))
    words = dict(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", lower_order_final=False)
    other = theirs(DPMSolverMultistepScheduler, s, final_sigmas_type="zero" if end < 0 else "sigma_min", **words)
    spacing = "trailing" if end < 0 else "leading"
    visited, after = timesteps(s, steps, spacing), x
    other.set_timesteps(timesteps=visited)
    ratio = s.sigma / s.alpha
    other.sigmas = torch.cat([ratio[visited], ratio[[0]] if end == 0 else ratio.new_zeros(1)])
    ours = dpm_solver_pp(dummy, x, s, steps, spacing=spacing, end=end)
    for step, t in zip(ours, other.timesteps, strict=True):
        after = other.step(dummy(after, t.expand(len(x))), t, after).prev_sample
        assert step.t == t
        assert_close(step.x, after, BY_STEP)


@pytest.mark.parametrize("seed", range(6))
def test_ddpm_at_any_levels_is_that_of_diffusers(seed):
    "Levels that are not evenly spaced, fed to both: one step back from t to s, all numbers of it."
    s, _, x = random_case(seed, prediction="epsilon")
    levels = torch.randperm(s.T, generator=rng(seed))[:2].sort(descending=True).values.tolist()
    other = theirs(DDPMScheduler, s, clip_sample=False)
    other.set_timesteps(timesteps=levels)
    t, to = levels
    a, b, std = posterior(s, t, to)
    alpha, sigma = amplitudes(s, t)
    said = other.step(dummy(x, torch.full((3,), t)), t, x, generator=rng(1))
    x0 = (x - sigma * dummy(x, torch.full((3,), t))) / alpha
    z = torch.randn(x.shape, generator=rng(1), dtype=x.dtype)
    assert_close(a * x + b * x0 + std * z, said.prev_sample, BY_STEP)


@pytest.mark.parametrize("seed", range(10))
def test_timesteps_are_the_trailing_ones_of_diffusers(seed):
    g = rng(seed)
    T = int(torch.randint(1, 1500, (), generator=g))
    steps = int(torch.randint(1, T + 1, (), generator=g))
    other = DDIMScheduler(num_train_timesteps=T, timestep_spacing="trailing")
    other.set_timesteps(steps)
    apart = np.abs(np.array(timesteps(NoiseSchedule(T=T), steps)) - other.timesteps.numpy()[:steps])
    assert apart.max() <= (0 if T % steps == 0 else 1)  # halves may be rounded either way


# the levels


@pytest.mark.parametrize("T", [1, 2, 3, 10, 97, 1000])
def test_timesteps_are_different_levels_from_the_top(T):
    s = NoiseSchedule(T=T)
    for steps in range(1, T + 1):
        levels = timesteps(s, steps)
        assert len(levels) == steps and levels[0] == T - 1 and levels[-1] >= 0
        assert all(a > b for a, b in zip(levels, levels[1:]))


@pytest.mark.parametrize("T", [2, 3, 10, 97, 1000])
def test_leading_timesteps_are_different_levels_down_to_the_first(T):
    s = NoiseSchedule(T=T)
    for steps in range(1, T):
        levels = timesteps(s, steps, "leading")
        assert len(levels) == steps and levels[0] < T and levels[-1] == 1
        assert all(a > b for a, b in zip(levels, levels[1:]))
    assert timesteps(s, T - 1, "leading") == list(range(T - 1, 0, -1))


def test_impossible_spacings_are_named():
    for wrong in ("linspace", "Trailing", ""):
        with pytest.raises(LDMError, match=f"spacing='{wrong}' is not known; it can be 'trailing', 'leading'"):
            timesteps(NoiseSchedule(), 5, wrong)
    for steps, said in ((1000, "with spacing='leading' would need a level 1000"), (1001, "should be .* 1 to 1000")):
        with pytest.raises(LDMError, match=f"steps={steps} {said}"):
            timesteps(NoiseSchedule(), steps, "leading")


def never(x, t, cond=None):
    raise AssertionError("the denoiser should not be asked")


REFUSED = [
    (dict(spacing="linspace"), "spacing='linspace'"),
    (dict(spacing="leading", steps=20), "steps=20 with spacing='leading'"),
    (dict(steps=21), "steps=21"),
    (dict(steps=True), "steps=True"),
    (dict(steps=[]), r"steps=\[\]: the levels to visit should be at least one, and descend"),
    (dict(steps=()), r"steps=\[\]"),
    (dict(steps=[3, 7]), r"steps=\[3, 7\]"),
    (dict(steps=[7, 7, 3]), r"steps=\[7, 7, 3\]"),
    (dict(steps=range(20)), r"steps=\[0, 1, 2"),
    (dict(steps=[20, 3]), "level=20 should be a whole number, 0 to 19"),
    (dict(steps=[7, -1]), "level=-1"),
    (dict(steps=[True, False]), "level=True"),
    (dict(steps=[7, False]), "level=False"),
    (dict(end=-2), "end=-2"),
    (dict(end=20), "end=20"),
    (dict(end=True), "end=True"),
    (dict(steps=[7, 3], end=3), "end=3 should lie below the last level that is visited, 3"),
    (dict(steps=[7, 3], end=5), "end=5 should lie below"),
    (dict(steps=20, end=0), "end=0 should lie below the last level that is visited, 0"),
    (dict(steps=[0], end=0), "end=0 should lie below"),
]


@pytest.mark.parametrize("given, said", REFUSED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_cannot_be_walked_is_refused_at_the_call(name, given, said):
    with pytest.raises(LDMError, match=said):
        SAMPLERS[name](never, torch.zeros(1, 2), NoiseSchedule(T=20), **dict(steps=5) | given)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_impossible_spacing_is_named_beside_a_list_of_levels_too(name):
    with pytest.raises(LDMError, match="spacing='even'"):
        SAMPLERS[name](never, torch.zeros(1, 2), NoiseSchedule(T=20), [9, 3], spacing="even")


WRONG_TYPES = [dict(spacing=None), dict(end=0.0), dict(end=None), dict(end="-1")]
WRONG_TYPES += [dict(steps=steps) for steps in (2.0, "73", [7, None], [7.0], ["7"], {7, 3}, np.arange(5)[::-1])]


@pytest.mark.parametrize("given", WRONG_TYPES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_of_another_type_is_refused_at_the_call(name, given):
    import jaxtyping

    with pytest.raises((LDMError, jaxtyping.TypeCheckError)):  # the latter where types are checked, as here
        SAMPLERS[name](never, torch.zeros(1, 2), NoiseSchedule(T=20), **dict(steps=5) | given)


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_sequence_of_levels_will_do(name):
    x, s, levels = torch.randn(2, 3, generator=rng(0)), NoiseSchedule(T=20), [19, 12, 11, 4]
    ends = [last(SAMPLERS[name](dummy, x, s, kind, noise=SeededNoise([1, 2]))) for kind in (levels, tuple(levels))]
    assert torch.equal(*ends)
    by_count = last(SAMPLERS[name](dummy, x, s, 7, noise=SeededNoise([1, 2])))
    assert torch.equal(by_count, last(SAMPLERS[name](dummy, x, s, timesteps(s, 7), noise=SeededNoise([1, 2]))))
    down = last(SAMPLERS[name](dummy, x, s, range(19, -1, -3), noise=SeededNoise([1, 2])))
    assert torch.equal(down, last(SAMPLERS[name](dummy, x, s, [19, 16, 13, 10, 7, 4, 1], noise=SeededNoise([1, 2]))))


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("name", SAMPLERS)
def test_impossible_steps_are_named(steps, name):
    s = NoiseSchedule()
    with pytest.raises(LDMError, match=f"steps={steps}"):
        timesteps(s, steps)
    with pytest.raises(LDMError, match=f"steps={steps}"):
        last(SAMPLERS[name](dummy, torch.zeros(1, 2), s, steps))


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_impossible_eta_is_named(eta):
    with pytest.raises(LDMError, match="eta="):
        ddim(never, torch.zeros(1, 2), NoiseSchedule(), 5, eta=eta)


def test_last_of_nothing_says_so():
    with pytest.raises(LDMError, match="steps is empty"):
        last(iter([]))


# the contract


def asked(name: str, levels: list[int], end: int = -1) -> list[int]:
    "The levels that the denoiser is asked at: one a step; by Heun's method also where it leads, but for the end."
    if name != "heun":
        return levels
    return [level for t, s in zip(levels, [*levels[1:], end]) for level in (t, s) if level >= 0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_levels_are_asked_in_order_and_the_condition_goes_through(name):
    s, calls, told = NoiseSchedule(), [], object()

    def denoise(x, t, cond):
        calls.append((t, cond, torch.is_grad_enabled()))
        return dummy(x, t)

    x_T = torch.randn(3, 2, 4, generator=rng(0))
    before = x_T.clone()
    steps = list(SAMPLERS[name](denoise, x_T, s, 9, told))
    assert torch.equal(x_T, before)
    assert [step.t for step in steps] == timesteps(s, 9)
    assert [int(t[0]) for t, _, _ in calls] == asked(name, timesteps(s, 9))
    assert len(calls) == (17 if name == "heun" else 9)
    assert all(t.shape == (3,) and t.dtype == torch.int64 and cond is told and not grad for t, cond, grad in calls)
    assert all(isinstance(step, Step) and step.x.shape == step.x0.shape == x_T.shape for step in steps)
    assert torch.equal(steps[-1].x, steps[-1].x0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("outside", [True, False])
def test_gradients_between_steps_are_the_callers_business(name, outside):
    weight = torch.ones((), requires_grad=True)
    with torch.set_grad_enabled(outside):
        for step in SAMPLERS[name](lambda x, t, c: weight * dummy(x, t), torch.randn(1, 4), NoiseSchedule(), 5):
            assert torch.is_grad_enabled() == outside
            assert not step.x.requires_grad and not step.x0.requires_grad
        assert torch.is_grad_enabled() == outside


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_denoiser_may_switch_gradients_on(name):
    "As guiding by the gradient of an outside model must (app. C)."

    def guided(x, t, c):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(x.square().sum(), x)[0]

    assert not last(SAMPLERS[name](guided, torch.randn(2, 4), NoiseSchedule(), 3)).requires_grad


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_lazy(name):
    calls = []
    steps = SAMPLERS[name](lambda x, t, c: calls.append(t) or x, torch.randn(1, 4), NoiseSchedule(), 50)
    next(steps), next(steps)
    assert [int(t) for t in calls] == asked(name, timesteps(NoiseSchedule(), 50)[:2], 959)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_walk_may_end_at_a_level(name):
    "Of which it then is a sample, with what is left of the noise."
    s, bell = NoiseSchedule(), GaussianMixture(torch.zeros(1, 1).double(), torch.tensor([0.5]).double())
    x_T = bell.noised(s, 999).stds * torch.linspace(-1, 1, 5).double()[:, None]
    for end in (0, 400):
        *_, step = SAMPLERS[name](bell.denoiser(s), x_T, s, [t for t in timesteps(s, 100) if t > end], end=end)
        assert (step.x[-1] / bell.noised(s, end).stds).item() == pytest.approx(1, abs=0.05)
        assert not torch.equal(step.x, step.x0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_samples_keep_the_type_of_the_start(name, dtype):
    x = last(SAMPLERS[name](dummy, torch.randn(2, 3, 4).to(dtype), NoiseSchedule(), 5, noise=SeededNoise([0, 1])))
    assert x.dtype == dtype and x.isfinite().all()


@pytest.mark.parametrize("kwargs", [*({"name": name} for name in SAMPLERS), dict(name="ddim", eta=0.7)])
@pytest.mark.parametrize("shape", [(16,), (3, 8, 8), (2, 3)])
def test_a_batch_of_n_is_n_batches_of_one(kwargs, shape):
    sampler, rest = SAMPLERS[kwargs["name"]], {k: v for k, v in kwargs.items() if k != "name"}
    s, seeds = NoiseSchedule(), [8, 1, 5, 1]

    def make(seeds):
        noise = SeededNoise(seeds)
        return last(sampler(dummy, noise.noise(shape), s, 20, noise=noise, **rest))

    whole = make(seeds)
    for i, seed in enumerate(seeds):
        assert torch.equal(whole[i : i + 1], make([seed]))
    assert torch.equal(whole[1], whole[3]) and not torch.equal(whole[0], whole[1])
    assert torch.equal(torch.cat([make(seeds[:3]), make(seeds[3:])]), whole)


@pytest.mark.parametrize("kwargs", [*({"name": name} for name in SAMPLERS), dict(name="ddim", eta=0.5)])
def test_float32_follows_float64(kwargs):
    sampler, rest = SAMPLERS[kwargs["name"]], {k: v for k, v in kwargs.items() if k != "name"}
    g, s = rng(0), NoiseSchedule()
    m = GaussianMixture(torch.randn(3, 4, generator=g, dtype=torch.float64), torch.tensor([0.3, 0.5, 0.8]).double())
    x = torch.randn(50, 4, generator=g)
    single = last(sampler(m.denoiser(s), x, s, 40, noise=SeededNoise(range(50)), **rest))
    double = last(sampler(m.denoiser(s), x.double(), s, 40, noise=SeededNoise(range(50)), **rest))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seeds", [[1], [1, 2], [1, 2, 3, 4]])
@pytest.mark.parametrize("name", SAMPLERS)
def test_wrong_number_of_seeds_is_named(seeds, name):
    kwargs = dict(eta=0.5) if name == "ddim" else {}
    with pytest.raises(LDMError, match=f"noise has {len(seeds)} seeds for 3 samples"):
        last(SAMPLERS[name](dummy, torch.zeros(3, 5), NoiseSchedule(), 5, noise=SeededNoise(seeds), **kwargs))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_throw_no_dice(name):
    class Loaded(SeededNoise):
        def noise(self, shape):
            raise AssertionError("no noise is needed")

    x = torch.randn(2, 4, generator=rng(0))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one = last(SAMPLERS[name](dummy, x, NoiseSchedule(), 10))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, last(SAMPLERS[name](dummy, x, NoiseSchedule(), 10, noise=Loaded([1, 2]))))


@pytest.mark.parametrize("sampler, kwargs", [(ddpm, {}), (ddim, dict(eta=1.0))])
def test_without_seeds_the_global_generator_is_used(sampler, kwargs):
    def make(seed):
        torch.manual_seed(seed)
        return last(sampler(dummy, torch.ones(2, 4), NoiseSchedule(), 10, **kwargs))

    assert torch.equal(make(0), make(0)) and not torch.equal(make(0), make(1))


# the noise


def test_a_stream_depends_on_its_seed_only():
    whole, alone = SeededNoise([4, 9]), SeededNoise([9])
    for shape in ((3,), (4, 8, 8), (3,)):
        assert torch.equal(whole.noise(shape)[1:], alone.noise(torch.Size(shape)))


def test_start_and_steps_share_one_stream():
    "Drawn from one object the start and the fresh noise are independent; from two with the same seeds they are equal."
    noise = SeededNoise([3])
    start, first = noise.noise((1000,)), noise.noise((1000,))
    assert abs((start * first).mean()) < 0.1
    assert torch.equal(SeededNoise([3]).noise((1000,)), start)


def test_noise_is_standard_normal_and_float32():
    z = SeededNoise(range(64)).noise((3, 16, 16))
    assert z.shape == (64, 3, 16, 16) and z.dtype == torch.float32 and z.device.type == "cpu"
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    assert abs((z[:-1] * z[1:]).mean()) < 0.02  # neighbouring seeds are not alike


def test_one_seed_is_not_a_sequence():
    import jaxtyping

    with pytest.raises((LDMError, jaxtyping.TypeCheckError)):
        SeededNoise(3)


# eq. 11 and 12


@pytest.mark.parametrize("seed", range(20))
def test_posterior_is_bayes_rule(seed):
    s, _, _ = random_case(seed, zero_terminal_snr=False)
    t, to = torch.randperm(s.T, generator=rng(seed))[:2].sort(descending=True).values.tolist()
    a, b, std = posterior(s, t, to)
    grid = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    x0, x_t = 0.8, -0.4
    alpha_ts = s.alpha[t] / s.alpha[to]
    variance_ts = s.sigma[t] ** 2 - alpha_ts**2 * s.sigma[to] ** 2
    below = (grid - s.alpha[to] * x0) ** 2 / (2 * s.sigma[to] ** 2)
    above = (x_t - alpha_ts * grid) ** 2 / (2 * variance_ts)
    q = (-below - above).softmax(0)
    mean = (q * grid).sum()
    assert mean.item() == pytest.approx(a * x_t + b * x0, abs=1e-6)
    assert (q * (grid - mean) ** 2).sum().sqrt().item() == pytest.approx(std, rel=1e-3)


def test_posterior_of_neighbours_is_ddpms_formula():
    s = NoiseSchedule()
    bar, beta = s.alphas_cumprod, s.betas
    for t in (1, 10, 500, 999):
        a, b, std = posterior(s, t, t - 1)
        assert a == pytest.approx(((1 - beta[t]).sqrt() * (1 - bar[t - 1]) / (1 - bar[t])).item())
        assert b == pytest.approx((bar[t - 1].sqrt() * beta[t] / (1 - bar[t])).item())
        assert std**2 == pytest.approx((beta[t] * (1 - bar[t - 1]) / (1 - bar[t])).item())


@pytest.mark.parametrize("seed", range(8))
def test_ddim_with_eta_one_is_ddpm(seed):
    s, steps, x = random_case(seed, prediction="epsilon")
    pairs = zip(
        ddim(dummy, x, s, steps, eta=1.0, noise=SeededNoise([1, 2, 3])),
        ddpm(dummy, x, s, steps, noise=SeededNoise([1, 2, 3])),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one.x, other.x)
    few = last(ddim(dummy, x, s, steps, eta=0.9, noise=SeededNoise([1, 2, 3])))
    assert not torch.allclose(few, other.x)


# the order: is it the right differential equation?

COUNTS = [16, 32, 64, 128]  # all of them visit level 249 of 1000
EVEN = [timesteps(NoiseSchedule(), n) for n in COUNTS]
# gaps of one and of three parts in turn
UNEVEN = [[t for k, t in enumerate(timesteps(NoiseSchedule(), 2 * n)) if k % 4 < 2] for n in COUNTS]


def one_gaussian(seed: int):
    "A Gaussian in one dimension and its exact flow: whoever is u deviations from the mean stays so."
    g = rng(seed)
    mean, std = torch.randn((), generator=g).item(), 0.3 + torch.rand((), generator=g).item()
    bell = GaussianMixture(torch.tensor([[mean]]).double(), torch.tensor([std]).double())
    u = torch.linspace(-3, 3, 101).double()

    def exact(s, level):
        there = bell if level is None else bell.noised(s, level)
        return there.means + there.stds * u[:, None]

    return bell, exact


def errors(sampler, seed: int, level: int | None = 249, walks: list[list[int]] = EVEN) -> list[float]:
    "Root mean square error at a level (None: the clean end) for each walk."
    s = NoiseSchedule()
    bell, exact = one_gaussian(seed)
    found = []
    for walk in walks:
        for step, arrived in zip(sampler(bell.denoiser(s), exact(s, 999), s, walk), [*walk[1:], None]):
            if arrived == level:
                found.append((step.x - exact(s, level)).square().mean().sqrt().item())
                break
    assert len(found) == len(walks)
    return found


def orders(found: list[float]) -> list[float]:
    return [log2(a / b) for a, b in zip(found, found[1:])]


def second_order(found: list[float]) -> bool:
    return all(1.8 < order < 2.3 for order in orders(found)[1:])


@pytest.mark.parametrize("seed", range(5))
def test_ddim_is_of_first_order(seed):
    assert all(0.9 < order < 1.1 for order in orders(errors(ddim, seed)))
    assert all(0.6 < order < 1.1 for order in orders(errors(ddim, seed, None)))


@pytest.mark.parametrize("sampler", [heun, dpm_solver_pp])
@pytest.mark.parametrize("seed", range(5))
def test_heun_and_dpm_solver_pp_are_of_second_order(seed, sampler):
    found = errors(sampler, seed)
    assert second_order(found), orders(found)
    assert found[-1] < 0.1 * errors(ddim, seed, walks=EVEN[-1:])[0]


@pytest.mark.parametrize("sampler", [heun, dpm_solver_pp])
@pytest.mark.parametrize("seed", range(3))
def test_heun_and_dpm_solver_pp_are_of_second_order_on_uneven_levels(seed, sampler):
    assert second_order(found := errors(sampler, seed, walks=UNEVEN)), orders(found)


@pytest.mark.parametrize("sampler", [ddim, heun, dpm_solver_pp])
@pytest.mark.parametrize("seed", range(5))
def test_the_last_step_to_the_clean_end_makes_every_order_one(seed, sampler):
    "The last step is one of DDIM, and at the lowest level it does not shrink with the others."
    assert all(0.6 < order < 1.2 for order in orders(errors(sampler, seed, None))[1:])


def guess(denoise, x, s, t):
    level = torch.full((len(x),), t)
    return s.x0_and_noise(denoise(x, level), x, level)


def mutant(mix):
    "A sampler like DDIM with another last line: mix(amplitudes at t, amplitudes at s, x, x0, eps) -> x."

    def sampler(denoise, x, s, levels):
        for t, to in zip(levels, [*levels[1:], -1]):
            x0, eps = guess(denoise, x, s, t)
            x = mix(amplitudes(s, t), amplitudes(s, to), x, x0, eps)
            yield Step(t, x, x0)

    return sampler


def test_the_mutant_without_mutation_is_ddim():
    assert errors(mutant(lambda at, to, x, x0, eps: to[0] * x0 + to[1] * eps), 0) == pytest.approx(errors(ddim, 0))


WRONG = {
    "noise amplitude of the old level": lambda at, to, x, x0, eps: to[0] * x0 + at[1] * eps,
    "signal amplitude of the old level": lambda at, to, x, x0, eps: at[0] * x0 + to[1] * eps,
    "sign of the noise": lambda at, to, x, x0, eps: to[0] * x0 - to[1] * eps,
    "power for amplitude": lambda at, to, x, x0, eps: to[0] ** 2 * x0 + to[1] ** 2 * eps,
    "noise one percent too weak": lambda at, to, x, x0, eps: to[0] * x0 + 0.99 * to[1] * eps,
    "DDPM's mean without its noise": lambda at, to, x, x0, eps: (
        (at[0] / to[0] * to[1] ** 2 * x + to[0] * (at[1] ** 2 - (at[0] / to[0] * to[1]) ** 2) * x0) / at[1] ** 2
    ),
}


@pytest.mark.parametrize("slip", WRONG)
def test_the_order_test_can_fail(slip):
    found = errors(mutant(WRONG[slip]), 0)
    assert not all(0.9 < order < 1.1 for order in orders(found)), found


def like_heun(mean, there=lambda to: to):
    "Heun's method with another slope, mean(x0 at t, x0 at s), or asked at another level than s."

    def sampler(denoise, x, s, levels):
        for t, to in zip(levels, [*levels[1:], -1]):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = amplitudes(s, t), amplitudes(s, to)
            x0, eps = guess(denoise, x, s, t)
            trial = alpha_s * x0 + sigma_s * eps
            slope = x0 if to < 0 else mean(x0, guess(denoise, trial, s, there(to))[0])
            x = sigma_s / sigma_t * x + (alpha_s - alpha_t * sigma_s / sigma_t) * slope
            yield Step(t, x, x0)

    return sampler


def like_dpm_solver_pp(weight):
    "DPM-Solver++(2M) with another weight of the change of x0, weight(h, h of the step before)."

    def sampler(denoise, x, s, levels):
        before, h_before = None, None
        for t, to in zip(levels, [*levels[1:], -1]):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = amplitudes(s, t), amplitudes(s, to)
            x0, _ = guess(denoise, x, s, t)
            h = None if to < 0 else float(np.log(alpha_s / sigma_s) - np.log(alpha_t / sigma_t))
            slope = x0 if before is None or h is None else x0 + weight(h, h_before) * (x0 - before)
            x = sigma_s / sigma_t * x + (alpha_s - alpha_t * sigma_s / sigma_t) * slope
            before, h_before = x0, h
            yield Step(t, x, x0)

    return sampler


def test_the_mutants_of_second_order_without_mutation_are_ours():
    half = like_heun(lambda a, b: (a + b) / 2), like_dpm_solver_pp(lambda h, before: h / (2 * before))
    for copied, sampler in zip(half, (heun, dpm_solver_pp)):
        assert errors(copied, 0, walks=UNEVEN[:2]) == pytest.approx(errors(sampler, 0, walks=UNEVEN[:2]))


WRONG_HEUN = {
    "weights of 0.6 and 0.4": like_heun(lambda a, b: 0.6 * a + 0.4 * b),
    "weights of 0.4 and 0.6": like_heun(lambda a, b: 0.4 * a + 0.6 * b),
    "the first slope": like_heun(lambda a, b: a),
    "the second slope": like_heun(lambda a, b: b),
    "asked at another level": like_heun(lambda a, b: (a + b) / 2, lambda to: max(to - 5, 0)),
}
WRONG_DPM_SOLVER_PP = {
    "without the 2": like_dpm_solver_pp(lambda h, before: h / before),
    "with 3 for 2": like_dpm_solver_pp(lambda h, before: h / (3 * before)),
    "another sign": like_dpm_solver_pp(lambda h, before: -h / (2 * before)),
    "never a second guess": like_dpm_solver_pp(lambda h, before: 0),
}
WRONG_RATIO = {  # steps that are all alike hide these
    "as if all steps were alike": like_dpm_solver_pp(lambda h, before: 1 / 2),
    "the ratio upside down": like_dpm_solver_pp(lambda h, before: before / (2 * h)),
    "the step before counted twice": like_dpm_solver_pp(lambda h, before: h / (before + h)),
}


@pytest.mark.parametrize("slip", WRONG_HEUN)
def test_the_order_test_of_heun_can_fail(slip):
    assert not second_order(found := errors(WRONG_HEUN[slip], 0)), orders(found)


@pytest.mark.parametrize("slip", WRONG_DPM_SOLVER_PP)
def test_the_order_test_of_dpm_solver_pp_can_fail(slip):
    assert not second_order(found := errors(WRONG_DPM_SOLVER_PP[slip], 0)), orders(found)


@pytest.mark.parametrize("slip", WRONG_RATIO)
def test_the_order_test_of_dpm_solver_pp_on_uneven_levels_can_fail(slip):
    assert not second_order(found := errors(WRONG_RATIO[slip], 0, walks=UNEVEN)), orders(found)


def test_a_denoiser_asked_at_the_wrong_level_is_found_out():
    s = NoiseSchedule()

    def late(denoise, x, schedule, steps):
        return ddim(lambda x, t, c: denoise(x, (t + 5).clamp(max=s.T - 1)), x, schedule, steps)

    assert not all(0.9 < order < 1.1 for order in orders(errors(late, 0)))


# every combination


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_combination_samples_a_gaussian(kind, zero_terminal_snr, prediction, name):
    given = dict(kind=kind, zero_terminal_snr=zero_terminal_snr, prediction=prediction)
    if zero_terminal_snr and prediction == "epsilon":
        with pytest.raises(LDMError, match="from 'epsilon' no x0 follows: use 'v' or 'x0'"):
            NoiseSchedule(**given)
        return
    bell, x_T = GaussianMixture(torch.tensor([[0.5, -0.25]]).double(), torch.tensor([0.6]).double()), normal(4000)
    s = NoiseSchedule(T=25, beta_start=0.06, beta_end=0.78, **given)  # as noisy at the end as the usual 1000 levels
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for steps in (1, 2, 7, s.T):
            x = last(SAMPLERS[name](bell.denoiser(s), x_T[:16].to(dtype), s, steps))
            assert x.dtype == dtype and x.isfinite().all()
    torch.manual_seed(1)
    s = NoiseSchedule(T=160, beta_start=0.009375, beta_end=0.121875, **given)
    x = last(SAMPLERS[name](bell.denoiser(s), x_T, s, s.T))
    torch.testing.assert_close(x.mean(0), bell.mean, atol=0.05, rtol=0)
    assert (x - bell.mean).square().mean().sqrt().item() == pytest.approx(0.6, abs=0.05)


def normal(n: int) -> torch.Tensor:
    return torch.randn(n, 2, generator=rng(0), dtype=torch.float64)


# the precision of the state


def arithmetic_in_the_type_of_the_start(denoise, x, s):
    "DDPM whose state is of the type of the start, and so are the numbers that a step computes with."
    for t in range(s.T - 1, -1, -1):
        x0, _ = guess(denoise, x, s, t)
        a, b, std = posterior(s, t, t - 1)
        x = a * x + b * x0
        x = x + std * torch.randn_like(x)
        yield Step(t, x, x0)


def spread_after(sampler, kind: str, dtype: torch.dtype) -> float:
    "Of samples of a unit Gaussian after 1000 steps, with the exact denoiser in the type of what comes in."
    s = NoiseSchedule(kind=kind)
    x = torch.randn(20_000, 1, generator=rng(0)).to(dtype)
    torch.manual_seed(1)
    return last(sampler(lambda x, t, c=None: per_sample(s.sigma, t, x) * x, x, s)).float().std().item()


@pytest.mark.parametrize("kind", ["scaled_linear", "cosine"])
def test_a_denoiser_in_bfloat16_leaves_the_spread_as_it_is(kind):
    assert spread_after(ddpm, kind, torch.bfloat16) == pytest.approx(spread_after(ddpm, kind, torch.float32), rel=0.01)


def test_the_test_of_the_spread_can_fail():
    exact = spread_after(arithmetic_in_the_type_of_the_start, "cosine", torch.float32)
    assert exact == pytest.approx(spread_after(ddpm, "cosine", torch.float32), rel=1e-3)
    assert spread_after(arithmetic_in_the_type_of_the_start, "cosine", torch.bfloat16) < 0.95 * exact


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", SAMPLERS)
def test_guesses_beyond_float16_are_cut_to_its_range(name, steps):
    "On the cosine schedule an error of the noise is divided by 0.00005 at the last level."
    s = NoiseSchedule(kind="cosine")
    x_T = torch.linspace(-5, 5, 101)[:, None].half()
    torch.manual_seed(0)
    walk = list(SAMPLERS[name](lambda x, t, c: torch.zeros_like(x), x_T, s, steps))
    assert all(step.x0.isfinite().all() and step.x.isfinite().all() for step in walk)
    assert walk[0].x0.abs().max() == torch.finfo(torch.float16).max


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_denoiser_in_float16_is_asked_about_finite_samples_only(name):
    s, x_T, seen = NoiseSchedule(kind="cosine"), torch.full((1, 1), 4.9).half(), []
    last(SAMPLERS[name](lambda x, t, c: seen.append(x) or torch.zeros_like(x), x_T, s, 7, noise=SeededNoise([0])))
    assert all(x.isfinite().all() for x in seen)


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_of_a_mixture_are_preserved(seed):
    "The exact map of a mixture in one dimension is F_0^-1(F_T(x)): DDIM's F_0 of the end must equal F_T of the start."
    g, s = rng(seed), NoiseSchedule()
    m = GaussianMixture(torch.tensor([[-1.5], [1.0]]).double(), 0.4 + 0.3 * torch.rand(2, generator=g).double())

    def cdf(m, x):
        return (m.weights * torch.special.ndtr((x - m.means[:, 0]) / m.stds)).sum(1)

    x = m.noised(s, 999).sample(500, g)
    ends = [last(ddim(m.denoiser(s), x, s, n)) for n in (20, 80, 320)]
    apart = [(cdf(m, end) - cdf(m.noised(s, 999), x)).abs().mean() for end in ends]
    assert apart[0] > 2 * apart[1] > 4 * apart[2] and apart[2] < 0.01


def spread(s: NoiseSchedule, width: float, steps: int, eta: float) -> float:
    "Standard deviation of the samples for data N(0, width²), by propagating it through the linear steps."
    v = (s.alpha[-1].item() * width) ** 2 + s.sigma[-1].item() ** 2
    levels = timesteps(s, steps)
    for t, to in zip(levels, [*levels[1:], -1]):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = amplitudes(s, t), amplitudes(s, to)
        std = eta * posterior(s, t, to)[2]
        slope = alpha_t * width**2 / (alpha_t**2 * width**2 + sigma_t**2)
        c = alpha_s * slope + max(sigma_s**2 - std**2, 0) ** 0.5 * (1 - alpha_t * slope) / sigma_t
        v = c**2 * v + std**2
    return v**0.5


@pytest.mark.parametrize("steps", [3, 10, 60])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_spread_of_the_samples_is_as_computed(steps, eta):
    s, width = NoiseSchedule(), 0.8
    bell = GaussianMixture(torch.zeros(1, 1).double(), torch.tensor([width]).double())
    torch.manual_seed(1)  # not the seed of the start: fresh noise must be independent of it
    x = last(ddim(bell.denoiser(s), bell.noised(s, 999).sample(100_000, rng(0)), s, steps, eta=eta))
    assert x.std().item() == pytest.approx(spread(s, width, steps, eta), rel=0.015)


@pytest.mark.parametrize("steps", [5, 20, 100, 1000])
@pytest.mark.parametrize("width", [0.2, 0.5, 1.0])
def test_ddpm_loses_more_spread_than_ddim(steps, width):
    s = NoiseSchedule()
    assert spread(s, width, steps, 1.0) < spread(s, width, steps, 0.0) < width


@pytest.mark.parametrize("name", SAMPLERS)
def test_moments_of_a_mixture_are_reached(name):
    s, g = NoiseSchedule(), rng(0)
    means, stds, weights = [[1.0, 0.5], [-1.0, 0.0], [0.0, -1.0]], [0.3, 0.4, 0.5], [1.0, 2.0, 1.0]
    m = GaussianMixture(torch.tensor(means), torch.tensor(stds), torch.tensor(weights))
    torch.manual_seed(1)
    x = last(SAMPLERS[name](m.denoiser(s), torch.randn(20_000, 2, generator=g), s, 250))
    torch.testing.assert_close(x.mean(0), m.mean, atol=0.04, rtol=0)
    torch.testing.assert_close(x.T.cov(), m.cov, atol=0.04, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_condition_chooses_the_cluster(name):
    s = NoiseSchedule()
    m = GaussianMixture(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0]]), torch.tensor([0.2, 0.2, 0.2]))
    wanted = torch.arange(60) % 3
    cond = SimpleNamespace(vector=torch.eye(3)[wanted])
    x_T = torch.randn(60, 2, generator=rng(0))
    x = last(SAMPLERS[name](m.denoiser(s), x_T, s, 50, cond, noise=SeededNoise(range(60))))
    assert torch.equal(torch.cdist(x, m.means).argmin(1), wanted)


def test_a_perfect_memory_gives_its_pictures_back():
    s, pictures = NoiseSchedule(), torch.randn(5, 3, 8, 8, generator=rng(0))
    memory = GaussianMixture(pictures, torch.zeros(5)).denoiser(s)
    x = last(ddim(memory, SeededNoise(range(12)).noise((3, 8, 8)), s, 50))
    distance = torch.cdist(x.flatten(1), pictures.flatten(1))
    assert distance.min(1).values.max() < 0.02 and len(distance.argmin(1).unique()) > 1


# what denoisers do to what they are given


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_denoiser_may_change_its_input_and_use_its_output_again(name, prediction):
    s, x, buffer = NoiseSchedule(prediction=prediction), torch.randn(3, 4, generator=rng(0)), torch.zeros(3, 4)

    def rude(x, t, cond):
        buffer.copy_(dummy(x, t))
        x.zero_(), t.zero_()
        return buffer

    kept = x.clone()
    walks = [SAMPLERS[name](f, x, s, 6, noise=SeededNoise([1, 2, 3])) for f in (rude, lambda x, t, c: dummy(x, t))]
    for one, other in zip(*walks, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_prediction_with_a_graph_leaves_none(name, prediction):
    weight = torch.ones((), requires_grad=True)

    def denoise(x, t, cond):
        with torch.enable_grad():
            return weight * dummy(x, t)

    for step in SAMPLERS[name](denoise, torch.randn(2, 4), NoiseSchedule(prediction=prediction), 5):
        assert not step.x.requires_grad and not step.x0.requires_grad


@pytest.mark.parametrize("given", [dict(denoise=None), dict(schedule=None), dict(noise=3), dict(noise=[1, 2])])
def test_what_is_no_denoiser_schedule_or_noise_is_named_at_the_call(given):
    import jaxtyping

    arguments = dict(denoise=dummy, x_T=torch.zeros(2, 3), schedule=NoiseSchedule(), steps=3) | given
    with pytest.raises((LDMError, jaxtyping.TypeCheckError), match=next(iter(given))):
        ddim(**arguments)


@pytest.mark.parametrize(("t", "s"), [(10, 20), (-1, -1), (1000, 1), (5, -2)])
def test_a_posterior_that_does_not_exist_is_refused(t, s):
    with pytest.raises(LDMError, match="level|less noisy"):
        posterior(NoiseSchedule(), t, s)
