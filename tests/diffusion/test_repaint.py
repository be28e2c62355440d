"""ldm_edu.diffusion.inpainting: against plain loops, against exact answers on the plane, and what it refuses."""

import pytest
import torch

from ldm_edu.diffusion import GaussianMixture, NoiseSchedule, SeededNoise, last, repaint
from ldm_edu.diffusion.sampling import timesteps
from ldm_edu.errors import LDMError

SCHEDULE = NoiseSchedule(kind="cosine", prediction="v")


def denoise(x, t, cond=None):
    """Some smooth function of the sample and its level."""
    return torch.tanh(x * (1 + t.view(-1, *[1] * (x.ndim - 1)) / 1000)) + 0.1


def start(b: int, *shape: int) -> torch.Tensor:
    return torch.randn(b, *shape, generator=torch.Generator().manual_seed(1))


def plain(x, schedule, known, missing, levels, times, noise):
    """Algorithm 1 of RePaint in loops, from variances, with the same order of noises."""
    alpha, sigma = schedule.alpha.double(), schedule.sigma.double()
    levels = [*levels, -1]
    fresh = lambda: noise.noise(tuple(x.shape[1:])).double()  # noqa: E731
    x = x.double()
    for t, s in zip(levels, levels[1:]):
        a_t, s_t = alpha[t], sigma[t]
        a_s, s_s = (alpha[s], sigma[s]) if s >= 0 else (torch.tensor(1.0), torch.tensor(0.0))
        forward = (a_t / a_s, (s_t**2 - (a_t / a_s) ** 2 * s_s**2).clamp(min=0).sqrt())
        for k in range(times if s >= 0 else 1):
            if k:
                x = forward[0] * x + forward[1] * fresh()
            v = denoise(x.float(), torch.full((len(x),), t)).double()
            x0 = a_t * x - s_t * v
            var_ts = s_t**2 - (a_t / a_s) ** 2 * s_s**2
            mean = (a_t / a_s) * s_s**2 / s_t**2 * x + a_s * var_ts / s_t**2 * x0
            std = (var_ts.clamp(min=0) * s_s**2 / s_t**2).sqrt()
            drawn = mean + std * fresh() if std > 0 else mean
            given = a_s * known.double() + (s_s * fresh() if s_s > 0 else 0)
            x = missing * drawn + (1 - missing) * given
    return x


@pytest.mark.parametrize("times", [1, 4])
def test_it_is_algorithm_1(times):
    x_T, known = start(3, 2, 4, 4), start(3, 2, 4, 4).flip(0)
    missing = (start(3, 1, 4, 4) > 0).float()
    levels = timesteps(SCHEDULE, 6)
    ours = last(repaint(denoise, x_T, SCHEDULE, known, missing, 6, resamplings=times, noise=SeededNoise([4, 5, 6])))
    theirs = plain(x_T, SCHEDULE, known, missing, levels, times, SeededNoise([4, 5, 6]))
    torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-4)


def test_what_is_known_is_kept_to_the_bit_and_what_is_not_has_no_influence():
    x_T, known = start(2, 3, 4, 4), start(2, 3, 4, 4).flip(1)
    missing = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    missing[:, :, 1:3] = True

    def filled(known):
        noise = SeededNoise([1, 2])
        return last(repaint(denoise, x_T, SCHEDULE, known, missing, 5, resamplings=2, noise=noise))

    x = filled(known)
    hidden = missing.expand_as(x)
    assert torch.equal(x[~hidden], known[~hidden])
    assert torch.equal(x, filled(torch.where(hidden, 7.0, known)))
    assert not torch.equal(x, filled(torch.where(hidden, known, known + 1)))


def test_a_sample_does_not_depend_on_its_company():
    x_T, known = start(3, 2), torch.zeros(3, 2)
    missing = torch.tensor([[0.0, 1.0]])

    def filled(rows):
        noise = SeededNoise(rows)
        return last(repaint(denoise, x_T[rows], SCHEDULE, known[rows], missing, 5, resamplings=3, noise=noise))

    assert torch.equal(filled([0, 1, 2])[1:2], filled([1]))


def test_more_repetitions_come_nearer_to_the_exact_answer():
    plane = GaussianMixture(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), torch.tensor([0.6, 0.6]))
    known = torch.tensor([[0.5, 0.0]]).expand(1500, 2)
    odds = torch.exp(-((0.5 - plane.means[:, 0]) ** 2) / (2 * 0.6**2))
    exact = ((odds / odds.sum()) @ plane.means[:, 1]).item()
    found = {}
    for times in (1, 10):
        noise = SeededNoise(range(1500))
        missing = torch.tensor([[0.0, 1.0]])
        walk = repaint(
            plane.denoiser(SCHEDULE), noise.noise((2,)), SCHEDULE, known, missing, 25, resamplings=times, noise=noise
        )
        found[times] = last(walk)[:, 1].mean().item()
    assert abs(found[10] - exact) < 0.15 < 0.4 < abs(found[1] - exact)


def test_it_yields_a_step_for_each_level_and_may_end_on_the_way():
    x_T, known = start(2, 3), torch.full((2, 3), 2.0)
    steps = list(repaint(denoise, x_T, SCHEDULE, known, torch.zeros(1, 1), [900, 500, 100], end=50, resamplings=2))
    assert [step.t for step in steps] == [900, 500, 100]
    assert not torch.equal(steps[-1].x, known)  # it is noisy still
    x = torch.stack([s.x for s in repaint(denoise, x_T, SCHEDULE, known, torch.zeros(1, 1), [900], end=50)])
    assert (x - SCHEDULE.alpha[50] * known).abs().max() < 6 * SCHEDULE.sigma[50]


def test_every_step_but_the_one_to_the_clean_end_is_repeated():
    asked = []

    def watched(x, t, cond=None):
        asked.append((int(t[0]), cond))
        return denoise(x, t)

    x_T, missing = start(2, 3), torch.ones(1, 1)
    last(repaint(watched, x_T, SCHEDULE, x_T, missing, [900, 500], "cond", resamplings=3, end=100))
    assert asked == [(900, "cond")] * 3 + [(500, "cond")] * 3
    asked.clear()
    last(repaint(watched, x_T, SCHEDULE, x_T, missing, [900, 500], resamplings=3))
    assert [t for t, _ in asked] == [900] * 3 + [500]
    asked.clear()
    last(repaint(watched, x_T, SCHEDULE, x_T, missing, 4, resamplings=1, spacing="leading"))
    assert [t for t, _ in asked] == [751, 501, 251, 1]


def test_what_is_known_may_be_changed_by_the_caller_meanwhile():
    x_T, known = start(2, 3), torch.zeros(2, 3)
    walk = repaint(denoise, x_T, SCHEDULE, known, torch.zeros(1, 1), 3)
    next(walk)
    known += 7
    assert torch.equal(last(walk), torch.zeros(2, 3))


def test_half_precision_comes_back_as_it_was_given():
    x_T = start(2, 3).half()
    found = last(repaint(denoise, x_T, SCHEDULE, x_T, torch.ones(1, 3), 3))
    assert found.dtype == torch.float16 and found.isfinite().all()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"known": torch.full((2, 3), torch.nan)}, "known should hold finite"),
        ({"missing": torch.zeros(5, 5)}, "missing is (5, 5)"),
        ({"missing": torch.ones(3)}, "missing should have as many sides"),
        ({"missing": torch.full((2, 3), 0.5)}, "missing should be 1"),
        ({"resamplings": 0}, "resamplings"),
        ({"steps": 0}, "steps"),
        ({"noise": SeededNoise([1])}, "noise"),
        ({"end": 999}, "end"),
    ],
)
def test_nonsense_is_refused_when_it_is_called(change, word):
    given = {"known": torch.zeros(2, 3), "missing": torch.ones(2, 3), "steps": 5} | change
    with pytest.raises(LDMError) as refused:
        repaint(denoise, start(2, 3), SCHEDULE, **given)
    assert word in str(refused.value)
