"""ldm_edu.conditioning.image_guiding: against gradients by hand, on a line where all is known, and what it refuses."""

import pytest
import torch

from ldm_edu.conditioning import Condition, ImageGuiding
from ldm_edu.conditioning.image_guiding import squares
from ldm_edu.diffusion import GaussianMixture, NoiseSchedule, SeededNoise, ddim, ddpm, last
from ldm_edu.errors import LDMError

DIM = 3
RNG = torch.Generator().manual_seed(0)
NETWORK, DECODER = torch.randn(DIM, DIM, generator=RNG), torch.randn(2, DIM, generator=RNG)
TARGET = torch.tensor([[0.5, -1.0]])


def schedule(prediction: str) -> NoiseSchedule:
    return NoiseSchedule(kind="cosine", prediction=prediction)


def linear(x, t, cond=None):
    return x @ NETWORK.T


def decode(z):
    return z @ DECODER.T


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_the_shift_is_the_gradient_by_hand(prediction):
    levels = schedule(prediction) if prediction != "epsilon" else NoiseSchedule()
    x, t, s = torch.randn(4, DIM, generator=RNG), torch.tensor([10, 200, 500, 700]), 0.3
    guide = ImageGuiding(linear, levels, decode, TARGET, scale=s)
    x0, eps = levels.x0_and_noise(guide(x, t), x, t)
    for i in range(4):
        a, sigma = levels.alpha[t[i]], levels.sigma[t[i]]
        eye = torch.eye(DIM)
        guess = {"epsilon": (eye - sigma * NETWORK) / a, "x0": NETWORK, "v": a * eye - sigma * NETWORK}[prediction]
        plain = guess @ x[i]
        gradient = guess.T @ DECODER.T @ (DECODER @ plain - TARGET[0])  # of half the squares
        noise = (x[i] - a * plain) / sigma + s * sigma * gradient
        torch.testing.assert_close(eps[i], noise, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(x0[i], (x[i] - sigma * noise) / a, atol=1e-3, rtol=1e-3)


def test_no_scale_and_levels_outside_of_the_interval_are_plain_calls():
    x, t = torch.randn(2, DIM, generator=RNG), torch.tensor([100, 800])
    asked = []

    def watched(x, t, cond=None):
        asked.append(x.requires_grad)
        return linear(x, t)

    levels = schedule("v")
    for more in ({"scale": 0}, {"interval": (0, 50)}):
        assert torch.equal(ImageGuiding(watched, levels, decode, TARGET, **more)(x, t), linear(x, t))
    assert asked == [False, False]
    some = ImageGuiding(linear, levels, decode, TARGET, interval=(0, 500))(x, t)
    assert torch.equal(some[1], linear(x, t)[1]) and not torch.equal(some[0], linear(x, t)[0])


def test_it_goes_towards_the_target_with_every_sampler_and_a_sample_does_not_depend_on_its_company():
    levels = schedule("v")
    line = GaussianMixture(torch.zeros(1, 1), torch.ones(1))
    exact = line.denoiser(levels)
    guide = ImageGuiding(exact, levels, lambda z: z, torch.full((1, 1), 1.5))
    x_T = torch.randn(500, 1, generator=RNG)
    noise = SeededNoise(range(500))
    x = last(ddpm(guide, x_T, levels, 50, noise=noise))
    assert 0.5 < x.mean() < 1.3 and x.var() < 0.8  # exact: 0.75 and 0.5
    walked = last(ddim(guide, x_T, levels, 20))
    assert walked.mean() > 0.5 and not walked.requires_grad
    torch.testing.assert_close(walked[:1], last(ddim(guide, x_T[:1], levels, 20)))


def test_a_transform_another_distance_and_a_target_for_each():
    levels, x, t = schedule("v"), torch.randn(2, DIM, generator=RNG), torch.tensor([300, 300])
    target = torch.randn(2, 1, generator=RNG)

    def first(images):
        return images[:, :1]

    both = ImageGuiding(linear, levels, decode, target, transform=first)(x, t)
    for i in range(2):
        alone = ImageGuiding(linear, levels, decode, target[i : i + 1], transform=first)(x[i : i + 1], t[:1])
        torch.testing.assert_close(both[i : i + 1], alone)
    double = ImageGuiding(linear, levels, decode, target, first, distance=lambda a, b: 2 * squares(a, b), scale=0.5)
    torch.testing.assert_close(double(x, t), both)


def test_the_condition_is_handed_on():
    levels, x, t = schedule("v"), torch.randn(2, DIM, generator=RNG), torch.tensor([300, 300])
    guide = ImageGuiding(lambda x, t, cond: x * cond.vector, levels, lambda z: z, torch.zeros(1, DIM))
    one, two = (Condition(vector=torch.full((2, DIM), value)) for value in (1.0, 2.0))
    assert not torch.equal(guide(x, t, one), guide(x, t, two))


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_a_level_without_signal_is_not_guided(prediction):
    closed = NoiseSchedule(prediction=prediction, zero_terminal_snr=True)
    x, t = torch.randn(2, DIM, generator=RNG), torch.tensor([999, 500])
    found = ImageGuiding(linear, closed, decode, TARGET, scale=0.1)(x, t)
    assert torch.equal(found[0], linear(x, t)[0]) and not torch.equal(found[1], linear(x, t)[1])
    assert last(ddim(ImageGuiding(linear, closed, decode, TARGET, scale=1e-3), x, closed, 10)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    levels, x, t = schedule("v"), torch.randn(2, DIM, generator=RNG), torch.tensor([300, 950])

    def network(x, t, cond=None):
        assert x.dtype == dtype
        return linear(x.float(), t).to(dtype)

    def widened(z):
        assert z.dtype == dtype
        return decode(z.float())

    found = ImageGuiding(network, levels, widened, TARGET, scale=0.1)(x.to(dtype), t)
    assert found.dtype == dtype
    exact = ImageGuiding(linear, levels, decode, TARGET, scale=0.1)(x.to(dtype).float(), t)
    torch.testing.assert_close(found.float(), exact, atol=0.1, rtol=0.1)


def test_a_denoiser_may_change_its_input_and_inference_mode_is_named():
    def changing(x, t, cond=None):
        return linear(x.mul_(1.0), t)

    x, t = torch.randn(2, DIM, generator=RNG), torch.tensor([300, 300])
    guide = ImageGuiding(changing, schedule("v"), decode, TARGET)
    torch.testing.assert_close(guide(x, t), ImageGuiding(linear, schedule("v"), decode, TARGET)(x, t))
    with torch.inference_mode(), pytest.raises(LDMError, match="inference_mode"):
        guide(x, t)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"denoise": torch.no_grad()(linear)}, "no gradient flows through denoise"),
        ({"decode": lambda z: decode(z).detach()}, "no gradient flows through distance, transform or decode"),
        ({"decode": lambda z: torch.nn.Parameter(torch.zeros(2, 2))}, "does not depend on x_t"),
        ({"transform": lambda images: images.mean(0, keepdim=True)}, "transform: what comes out should be one tensor"),
        ({"transform": lambda images: (images,)}, "transform: what comes out should be one tensor"),
        ({"distance": lambda a, b: (a - b).square().sum(1) * torch.nan}, "not finite"),
        ({"target": torch.full((1, 2), torch.nan)}, "target should hold finite numbers"),
        ({"interval": (5000, 6000)}, "interval"),
        ({"target": torch.zeros(3, 2)}, "target is (3, 2)"),
        ({"target": torch.zeros(1, 5)}, "target is (1, 5)"),
        ({"distance": lambda a, b: (a - b).square().sum()}, "distance should give one number"),
        ({"scale": -1}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"interval": (5, 1)}, "interval"),
    ],
)
def test_nonsense_is_refused(change, word):
    given = {"denoise": linear, "schedule": schedule("v"), "decode": decode, "target": TARGET} | change
    with pytest.raises(LDMError) as refused:
        ImageGuiding(**given)(torch.zeros(2, DIM), torch.tensor([1, 2]))
    assert word in str(refused.value)
