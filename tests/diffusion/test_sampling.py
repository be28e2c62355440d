"""ldm_edu.diffusion.sampling: against diffusers' schedulers on random configurations, and against exact solutions."""

from math import log2
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ldm_edu.diffusion.mixture import GaussianMixture
from ldm_edu.diffusion.sampling import SAMPLERS, SeededNoise, Step, amplitudes, ddim, ddpm, last, posterior, timesteps
from ldm_edu.diffusion.schedule import NoiseSchedule
from ldm_edu.errors import LDMError


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dummy(x, t, cond=None):
    "A denoiser that is not linear, knows the level, and treats samples one by one."
    level = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x * torch.cos(level / 50)) + 0.3 * x


def random_case(seed: int) -> tuple[NoiseSchedule, int, torch.Tensor]:
    "A schedule, a number of steps that divides its levels, and a start."
    g = rng(seed)
    steps, factor = (int(torch.randint(low, high, (), generator=g)) for low, high in ((2, 40), (3, 25)))
    strength = 1000 / (steps * factor) * (0.5 + 0.5 * torch.rand((), generator=g).item())
    s = NoiseSchedule(T=steps * factor, beta_start=min(0.0015 * strength, 0.1), beta_end=min(0.0195 * strength, 0.4))
    shape = [(3, 4, 4), (16,), (4, 8, 8), (1, 20)][seed % 4]
    return s, steps, torch.randn(3, *shape, generator=g, dtype=torch.float64)


def arguments(s: NoiseSchedule) -> dict:
    ends = dict(beta_start=s.beta_start, beta_end=s.beta_end, beta_schedule="scaled_linear")
    return dict(num_train_timesteps=s.T, clip_sample=False, timestep_spacing="trailing", **ends)


# against diffusers


@pytest.mark.parametrize("seed", range(12))
def test_ddim_is_that_of_diffusers(seed):
    s, steps, x = random_case(seed)
    other, theirs = DDIMScheduler(**arguments(s)), x
    other.set_timesteps(steps)
    assert other.timesteps.tolist() == timesteps(s, steps)
    for step, t in zip(ddim(dummy, x, s, steps), other.timesteps, strict=True):
        said = other.step(dummy(theirs, t.expand(len(x))), t, theirs)
        theirs = said.prev_sample
        assert step.t == t
        torch.testing.assert_close(step.x, theirs, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(step.x0, said.pred_original_sample, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seed", range(12))
def test_ddim_with_fresh_noise_is_that_of_diffusers(seed):
    s, steps, x = random_case(seed)
    eta = torch.rand((), generator=rng(seed)).item()
    other, theirs = DDIMScheduler(**arguments(s)), x
    other.set_timesteps(steps)
    noise, same_noise = SeededNoise([5, 6, 7]), SeededNoise([5, 6, 7])
    for step, t in zip(ddim(dummy, x, s, steps, eta=eta, noise=noise), other.timesteps, strict=True):
        z = same_noise.noise(x.shape[1:]).double()
        theirs = other.step(dummy(theirs, t.expand(len(x))), t, theirs, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(step.x, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("whole", [False, True])
def test_ddpm_is_that_of_diffusers(seed, whole, monkeypatch):
    s, steps, x = random_case(seed)
    steps = s.T if whole else steps
    other, theirs, same_noise = DDPMScheduler(**arguments(s)), x, SeededNoise([5, 6, 7])
    other.set_timesteps(timesteps=timesteps(s, steps))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: same_noise.noise(shape[1:]).double()
    )
    ours = ddpm(dummy, x, s, None if whole else steps, noise=SeededNoise([5, 6, 7]))
    for step, t in zip(ours, other.timesteps, strict=True):
        theirs = other.step(dummy(theirs, t.expand(len(x))), t, theirs).prev_sample
        torch.testing.assert_close(step.x, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seed", range(6))
def test_ddpm_at_any_levels_is_that_of_diffusers(seed):
    "Levels that are not evenly spaced, fed to both: one step back from t to s, all numbers of it."
    s, _, x = random_case(seed)
    levels = torch.randperm(s.T, generator=rng(seed))[:2].sort(descending=True).values.tolist()
    other = DDPMScheduler(**arguments(s))
    other.set_timesteps(timesteps=levels)
    t, to = levels
    a, b, std = posterior(s, t, to)
    alpha, sigma = amplitudes(s, t)
    said = other.step(dummy(x, torch.full((3,), t)), t, x, generator=rng(1))
    x0 = (x - sigma * dummy(x, torch.full((3,), t))) / alpha
    z = torch.randn(x.shape, generator=rng(1), dtype=x.dtype)
    torch.testing.assert_close(a * x + b * x0 + std * z, said.prev_sample, rtol=2e-3, atol=2e-3)


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
        last(ddim(dummy, torch.zeros(1, 2), NoiseSchedule(), 5, eta=eta))


def test_last_of_nothing_says_so():
    with pytest.raises(LDMError, match="steps is empty"):
        last(iter([]))


# the contract


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_call_a_step_and_the_condition_goes_through(name):
    s, calls, told = NoiseSchedule(), [], object()

    def denoise(x, t, cond):
        calls.append((t, cond, torch.is_grad_enabled()))
        return dummy(x, t)

    x_T = torch.randn(3, 2, 4, generator=rng(0))
    before = x_T.clone()
    steps = list(SAMPLERS[name](denoise, x_T, s, 9, told))
    assert torch.equal(x_T, before)
    assert [step.t for step in steps] == timesteps(s, 9) == [int(t[0]) for t, _, _ in calls]
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
    assert len(calls) == 2


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_samples_keep_the_type_of_the_start(name, dtype):
    x = last(SAMPLERS[name](dummy, torch.randn(2, 3, 4).to(dtype), NoiseSchedule(), 5, noise=SeededNoise([0, 1])))
    assert x.dtype == dtype and x.isfinite().all()


@pytest.mark.parametrize("kwargs", [dict(name="ddpm"), dict(name="ddim"), dict(name="ddim", eta=0.7)])
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


@pytest.mark.parametrize("kwargs", [dict(name="ddpm"), dict(name="ddim"), dict(name="ddim", eta=0.5)])
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


def test_deterministic_ddim_throws_no_dice():
    class Loaded:
        def noise(self, shape):
            raise AssertionError("no noise is needed")

    x = torch.randn(2, 4, generator=rng(0))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one = last(ddim(dummy, x, NoiseSchedule(), 10))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, last(ddim(dummy, x, NoiseSchedule(), 10)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_seeds_the_global_generator_is_used(name):
    kwargs = dict(eta=1.0) if name == "ddim" else {}

    def make(seed):
        torch.manual_seed(seed)
        return last(SAMPLERS[name](dummy, torch.ones(2, 4), NoiseSchedule(), 10, **kwargs))

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
    s, _, _ = random_case(seed)
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
    s, steps, x = random_case(seed)
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


def errors(sampler, seed: int, level: int | None = 249) -> list[float]:
    "Root mean square error at a level (None: the clean end) for each of COUNTS."
    s = NoiseSchedule()
    bell, exact = one_gaussian(seed)
    found = []
    for n in COUNTS:
        for step, arrived in zip(sampler(bell.denoiser(s), exact(s, 999), s, n), [*timesteps(s, n)[1:], None]):
            if arrived == level:
                found.append((step.x - exact(s, level)).square().mean().sqrt().item())
                break
    return found


def orders(found: list[float]) -> list[float]:
    return [log2(a / b) for a, b in zip(found, found[1:])]


@pytest.mark.parametrize("seed", range(5))
def test_ddim_is_of_first_order(seed):
    assert all(0.9 < order < 1.1 for order in orders(errors(ddim, seed)))
    assert all(0.6 < order < 1.1 for order in orders(errors(ddim, seed, None)))


def mutant(mix):
    "A sampler like DDIM with another last line: mix(amplitudes at t, amplitudes at s, x, x0, eps) -> x."

    def sampler(denoise, x, s, steps):
        levels = timesteps(s, steps)
        for t, to in zip(levels, [*levels[1:], -1]):
            level = torch.full((len(x),), t)
            x0, eps = s.x0_and_noise(denoise(x, level), x, level)
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


def test_a_denoiser_asked_at_the_wrong_level_is_found_out():
    s = NoiseSchedule()

    def late(denoise, x, schedule, steps):
        return ddim(lambda x, t, c: denoise(x, (t + 5).clamp(max=s.T - 1)), x, schedule, steps)

    assert not all(0.9 < order < 1.1 for order in orders(errors(late, 0)))


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
