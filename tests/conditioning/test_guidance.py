"""ldm_edu.conditioning.guidance: both halves, against the formula, on random conditions, mixtures and a UNet."""

import random
from dataclasses import replace

import pytest
import torch

from ldm_edu.conditioning.condition import Condition
from ldm_edu.conditioning.guidance import Guidance, drop
from ldm_edu.denoiser.unet import UNet
from ldm_edu.diffusion.mixture import GaussianMixture
from ldm_edu.diffusion.sampling import ddim, last
from ldm_edu.diffusion.schedule import NoiseSchedule
from ldm_edu.errors import LDMError

SLOTS = {"context": (3, 4), "concat": (2, 5, 5), "vector": (6,)}


def conditions(names, b: int, seed: int) -> Condition:
    g = torch.Generator().manual_seed(seed)
    return Condition(**{name: torch.randn(b, *SLOTS[name], generator=g) for name in names})


def listen(x_t, t, cond):
    "A denoiser that is not linear in anything and mixes all slots of an image, and only of that image."
    said = sum(torch.sin(v.flatten(1)).sum(dim=1) for v in cond.slots().values())  # (b,)
    factor = (1 + said * torch.cos(t.float())).view(-1, *[1] * (x_t.ndim - 1))
    return torch.tanh(x_t * factor)


def some_slots(seed: int) -> list[str]:
    rng = random.Random(seed)
    return rng.sample(sorted(SLOTS), rng.randint(1, 3))


# ---- drop
@pytest.mark.parametrize("seed", range(6))
def test_drop_depends_on_u_alone(seed):
    names, b, p = some_slots(seed), 9, 0.1 * (1 + seed)
    cond, null, u = conditions(names, b, seed), conditions(names, 1, seed + 50), torch.rand(b)
    dropped = drop(cond, null, p, u)
    for name, v in dropped.slots().items():
        for i in range(b):
            assert torch.equal(v[i], null.slots()[name][0] if u[i] < p else cond.slots()[name][i])
    order = torch.randperm(b)
    shuffled, parts = (
        drop(cond[order], null, p, u[order]),
        [drop(cond[s], null, p, u[s]) for s in (slice(0, 4), slice(4, 9))],
    )
    for name, v in dropped.slots().items():
        assert torch.equal(shuffled.slots()[name], v[order])
        assert torch.equal(Condition.cat(parts).slots()[name], v)


def test_drop_never_and_always():
    cond, null = conditions(SLOTS, 4, 0), conditions(SLOTS, 1, 1)
    u = torch.tensor([0.0, 0.3, 0.9, 1 - 2**-24])  # all that uniform numbers can be
    assert torch.equal(drop(cond, null, 0, u).context, cond.context)
    assert torch.equal(drop(cond, null, 1.0, u).context, null.expand(4).context)


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_drop_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match="p="):
        drop(conditions(SLOTS, 2, 0), conditions(SLOTS, 1, 1), p, torch.rand(2))


# ---- Guidance
@pytest.mark.parametrize("seed", range(12))
def test_guidance_is_the_formula(seed):
    rng, names = random.Random(seed), some_slots(seed)
    torch.manual_seed(seed)
    b, scale = rng.randint(1, 5), rng.choice([0, 0.5, 1, 1.5, 3, 7.5, -1.0])
    x_t, t = torch.randn(b, *rng.choice([(2,), (3, 4), (4, 5, 5)])), torch.randint(1000, (b,))
    cond, null = conditions(names, b, seed), conditions(names, rng.choice([1, b]), seed + 50)
    eps_u, eps_c = listen(x_t, t, null.expand(b)), listen(x_t, t, cond)
    torch.testing.assert_close(
        Guidance(listen, null, scale)(x_t, t, cond), eps_u + scale * (eps_c - eps_u), atol=1e-5, rtol=1e-5
    )


def test_one_doubled_call_and_at_scale_one_a_plain_one():
    calls = []

    def counting(x_t, t, cond):
        calls.append((len(x_t), len(t), len(cond)))
        return listen(x_t, t, cond)

    x_t, t, cond, null = torch.randn(3, 2), torch.tensor([1, 2, 3]), conditions(SLOTS, 3, 0), conditions(SLOTS, 1, 1)
    Guidance(counting, null, 2.0)(x_t, t, cond)
    plain = Guidance(counting, null, 1.0)(x_t, t, cond)
    assert calls == [(6, 6, 6), (3, 3, 3)] and torch.equal(plain, listen(x_t, t, cond))


def test_guidance_without_a_condition_is_refused():
    with pytest.raises(ValueError, match="cond"):
        Guidance(listen, conditions(SLOTS, 1, 1), 2.0)(torch.randn(3, 2), torch.tensor([1, 2, 3]))


def test_guidance_with_a_null_of_other_slots_is_refused():
    for null in (conditions(SLOTS, 1, 1), Condition()):
        with pytest.raises(ValueError, match="different slots"):
            Guidance(listen, null, 2.0)(torch.randn(3, 2), torch.tensor([1, 2, 3]), conditions(["context"], 3, 0))


def test_a_slot_that_the_null_leaves_out_is_kept():
    """As a mask is, where text is guided: it stands in both halves."""
    x_t, t, cond, null = torch.randn(3, 4), torch.tensor([1, 2, 3]), conditions(SLOTS, 3, 0), conditions(SLOTS, 1, 1)
    partly = Condition(context=null.context)
    without = Condition(**cond.slots() | {"context": null.context.expand(3, -1, -1)})
    eps_u, eps_c = listen(x_t, t, without), listen(x_t, t, cond)
    torch.testing.assert_close(Guidance(listen, partly, 2.0)(x_t, t, cond), eps_u + 2.0 * (eps_c - eps_u))
    assert not torch.equal(eps_u, listen(x_t, t, null.expand(3)))
    dropped = drop(cond, partly, 0.5, torch.tensor([0.1, 0.9, 0.2]))
    assert torch.equal(dropped.concat, cond.concat) and torch.equal(dropped.vector, cond.vector)
    assert torch.equal(dropped.context[0], null.context[0]) and torch.equal(dropped.context[1], cond.context[1])


def test_a_network_that_ignores_its_condition_is_refused_when_asked():
    x_t, t, cond, null = torch.randn(3, 4), torch.tensor([1, 2, 3]), conditions(SLOTS, 3, 0), conditions(SLOTS, 1, 1)

    def ignoring(x_t, t, cond):
        return 0.5 * x_t

    for scale in (0.0, 1.0, 3.0):
        with pytest.raises(LDMError, match="the same with its condition and without"):
            Guidance(ignoring, null, scale, check=True)(x_t, t, cond)
        assert torch.equal(Guidance(ignoring, null, scale)(x_t, t, cond), 0.5 * x_t)
        checked = Guidance(listen, null, scale, check=True)
        expected = Guidance(listen, null, scale)(x_t, t, cond)
        for _ in range(2):
            torch.testing.assert_close(checked(x_t, t, cond), expected, atol=1e-5, rtol=1e-5)
        # Where the condition is the null itself, there is nothing to hear.
        assert torch.equal(Guidance(ignoring, null, scale, check=True)(x_t, t, null.expand(3)), 0.5 * x_t)


def test_the_order_of_a_batch_does_not_matter():
    x_t, t, cond, null = torch.randn(6, 4), torch.randint(1000, (6,)), conditions(SLOTS, 6, 2), conditions(SLOTS, 1, 3)
    guided, order = Guidance(listen, null, 3.0), torch.randperm(6)
    torch.testing.assert_close(guided(x_t[order], t[order], cond[order]), guided(x_t, t, cond)[order])
    alone = torch.cat([guided(x_t[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, guided(x_t, t, cond), atol=1e-5, rtol=1e-5)


def test_guidance_of_a_unet_keeping_a_map_and_dropping_the_text():
    torch.manual_seed(0)
    unet = UNet(
        in_channels=2,
        out_channels=2,
        channels=32,
        multipliers=(1,),
        blocks=1,
        attention_factors=(1,),
        context_dim=4,
        concat_channels=2,
    )
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x_t, t, cond = torch.randn(2, 2, 5, 5), torch.tensor([10, 900]), conditions(["context", "concat"], 2, 4)
    null = replace(cond, context=torch.zeros(2, 3, 4))
    eps_u, eps_c = unet(x_t, t, null), unet(x_t, t, cond)
    assert not torch.allclose(eps_u, eps_c)
    torch.testing.assert_close(
        Guidance(unet, null, 5.0)(x_t, t, cond), eps_u + 5 * (eps_c - eps_u), atol=1e-4, rtol=1e-4
    )


# ---- on mixtures, where everything is known
def random_mixture(seed: int, k: int = 3, d: int = 2) -> GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    return GaussianMixture(
        torch.randn(k, d, generator=g), 0.3 + torch.rand(k, generator=g), 0.1 + torch.rand(k, generator=g)
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale", [0, 1, 2.5])
def test_the_guided_prediction_is_the_slope_of_the_tilted_density(seed, scale):
    schedule, mixture = NoiseSchedule(), random_mixture(seed)
    t = [5, 100, 300, 500, 800, 999][seed]
    x, y = torch.randn(20, 2, generator=torch.Generator().manual_seed(seed), requires_grad=True), seed % 3
    alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
    spread = (alpha**2 * mixture.stds**2 + sigma**2).sqrt()
    parts = (
        torch.distributions.Normal((alpha * mixture.means)[None], spread[None, :, None]).log_prob(x[:, None]).sum(-1)
    )
    joint = mixture.weights.log() + parts  # (20, k)
    tilted = joint.logsumexp(-1) + scale * joint.log_softmax(-1)[:, y]
    slope = torch.autograd.grad(tilted.sum(), x)[0]
    null, cond = Condition(vector=mixture.weights[None]), Condition(vector=torch.eye(3)[[y] * 20])
    guided = Guidance(mixture.denoiser(schedule), null, scale)(x.detach(), torch.full((20,), t), cond)
    torch.testing.assert_close(guided, -sigma * slope, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_guided_sampling(seed):
    "Scale 1 samples as the plain denoiser does, scale 0 as without condition, and a batch as one image at a time."
    schedule, mixture = NoiseSchedule(), random_mixture(seed)
    denoise, x_T = mixture.denoiser(schedule), torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))
    null, cond = Condition(vector=mixture.weights[None]), Condition(vector=torch.eye(3)[torch.arange(8) % 3])

    def sample(denoise, x=x_T, cond=cond):
        return last(ddim(denoise, x, schedule, 20, cond))

    assert torch.equal(sample(Guidance(denoise, null, 1)), sample(denoise))
    torch.testing.assert_close(sample(Guidance(denoise, null, 0)), sample(denoise, cond=None), atol=1e-4, rtol=1e-4)
    guided = Guidance(denoise, null, 3.0)
    alone = torch.cat([sample(guided, x_T[i : i + 1], cond[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(sample(guided), alone, atol=1e-4, rtol=1e-4)


def test_guidance_moves_a_class_outward_and_shrinks_it():
    schedule = NoiseSchedule()
    mixture = GaussianMixture(torch.tensor([[1.0], [-1.0]]), torch.tensor([0.5, 0.5]))
    x_T = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    null, cond = Condition(vector=mixture.weights[None]), Condition(vector=torch.tensor([[1.0, 0.0]])).expand(500)
    runs = [last(ddim(Guidance(mixture.denoiser(schedule), null, s), x_T, schedule, 50, cond)) for s in (1, 2, 4, 8)]
    means, spreads = [x.mean().item() for x in runs], [x.std().item() for x in runs]
    assert means == sorted(means) and spreads == sorted(spreads, reverse=True) and means[-1] > 1.8
