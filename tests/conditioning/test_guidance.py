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


# ---- an interval of levels
LEVELS = torch.tensor([0, 199, 200, 201, 400, 599, 600, 601, 999])


def heard(calls: list):
    "`listen`, which notes what it was called with."

    def denoise(x_t, t, cond):
        calls.append((x_t, t, cond))
        return listen(x_t, t, cond)

    return denoise


@pytest.mark.parametrize("scale", [0, 0.5, 1, 3.0, -1.0])
@pytest.mark.parametrize("interval", [(200, 600), (0, 999), (400, 400), (201, 201), (0, 0), (999, 5000)])
def test_guided_are_the_levels_in_the_interval_both_ends_included(interval, scale):
    x_t, cond, null = torch.randn(9, 4), conditions(SLOTS, 9, 0), conditions(SLOTS, 1, 1)
    inside = torch.tensor([interval[0] <= t <= interval[1] for t in LEVELS.tolist()])
    everywhere, said = Guidance(listen, null, scale)(x_t, LEVELS, cond), listen(x_t, LEVELS, cond)
    guided = Guidance(listen, null, scale, interval=interval)
    mixed = guided(x_t, LEVELS, cond)
    assert torch.equal(mixed[~inside], said[~inside])
    torch.testing.assert_close(mixed[inside], everywhere[inside])
    for i, t in enumerate(LEVELS):  # and each level by itself
        alone = guided(x_t[[i]], t[None], cond[[i]])
        torch.testing.assert_close(alone, mixed[[i]])
        assert inside[i] or torch.equal(alone, listen(x_t[[i]], t[None], cond[[i]]))


def test_outside_of_the_interval_the_denoiser_is_called_once_and_plainly():
    x_t, cond, null, calls = torch.randn(3, 4), conditions(SLOTS, 3, 0), conditions(SLOTS, 1, 1), []
    guided = Guidance(heard(calls), null, 3.0, interval=(200, 600))
    for levels, batch in (([100, 0, 199], 3), ([601, 999, 700], 3), ([199, 601, 50], 6), ([100, 200, 50], 6)):
        t = torch.tensor(levels)
        found = guided(x_t, t, cond)
        assert [len(call[0]) for call in calls] == [batch]
        assert batch == 6 or (calls[0][0] is x_t and calls[0][1] is t and calls[0][2] is cond)
        assert levels == [100, 200, 50] or torch.equal(found, listen(x_t, t, cond))
        calls.clear()


def test_a_network_that_ignores_its_condition_is_refused_outside_of_the_interval_too():
    x_t, cond, null, calls = torch.randn(3, 4), conditions(SLOTS, 3, 0), conditions(SLOTS, 1, 1), []
    t = torch.tensor([900, 950, 999])
    with pytest.raises(LDMError, match="the same with its condition and without"):
        Guidance(lambda x_t, t, cond: 0.5 * x_t, null, 3.0, check=True, interval=(200, 600))(x_t, t, cond)
    checked = Guidance(heard(calls), null, 3.0, check=True, interval=(200, 600))
    for _ in range(2):
        assert torch.equal(checked(x_t, t, cond), listen(x_t, t, cond))
    assert [len(call[0]) for call in calls] == [6, 3]  # it is looked at once


@pytest.mark.parametrize(
    "interval", [(600, 200), (-1, 5), (-5, -1), (1,), (1, 2, 3), (), "ab", 5, (1.5, 2), (True, 5), (0, None), {1, 2}]
)
def test_what_is_no_interval_is_refused(interval):
    import jaxtyping

    with pytest.raises((LDMError, jaxtyping.TypeCheckError), match="interval"):
        Guidance(listen, conditions(SLOTS, 1, 1), 2.0, interval=interval)


def test_an_interval_that_is_upside_down_is_named():
    with pytest.raises(LDMError, match="interval: highest level=200 should be a whole number, 600 to 1000000"):
        Guidance(listen, conditions(SLOTS, 1, 1), 2.0, interval=(600, 200))


# ---- scales, formats, and what to go away from
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 1e5, -1e5, torch.tensor(float("nan"))])
def test_a_scale_that_is_no_number_is_refused(scale):
    import jaxtyping

    with pytest.raises((LDMError, jaxtyping.TypeCheckError), match="scale"):
        Guidance(listen, conditions(SLOTS, 1, 1), scale)


@pytest.mark.parametrize("interval", [None, (0, 999), (2, 2)])
def test_scale_one_is_the_condition_and_scale_zero_its_absence(interval):
    x_t, t, cond, null = torch.randn(3, 4), torch.tensor([1, 2, 3]), conditions(SLOTS, 3, 0), conditions(SLOTS, 1, 1)
    with_it, without = listen(x_t, t, cond), listen(x_t, t, null.expand(3))
    inside = torch.tensor([interval in (None, (0, 999)), True, interval in (None, (0, 999))])[:, None]
    assert torch.equal(Guidance(listen, null, 1, interval=interval)(x_t, t, cond), with_it)
    zero = Guidance(listen, null, 0, interval=interval)(x_t, t, cond)
    assert torch.equal(zero, torch.where(inside, without, with_it))


FORMATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("of_null", FORMATS)
@pytest.mark.parametrize("of_condition", FORMATS)
def test_the_null_takes_the_format_of_the_condition(of_condition, of_null):
    x_t, t, calls = torch.randn(3, 4), torch.tensor([1, 2, 3]), []
    cond, null = conditions(SLOTS, 3, 0).to(of_condition), conditions(SLOTS, 1, 1).to(of_null)
    guided = Guidance(heard(calls), null, 2.0, interval=(2, 9))(x_t, t, cond)
    assert all(v.dtype == of_condition for v in calls[0][2].slots().values())
    without, said = listen(x_t, t, null.to(of_condition).expand(3)), listen(x_t, t, cond)
    expected = torch.where((t >= 2)[:, None], without + 2.0 * (said - without), said)
    torch.testing.assert_close(guided, expected)
    dropped = drop(cond, null, 0.5, torch.tensor([0.1, 0.9, 0.2]))
    assert all(v.dtype == of_condition for v in dropped.slots().values())


def test_a_negative_condition_stands_where_the_null_does():
    "One for all images, or one for each."
    x_t, t, cond = torch.randn(3, 4), torch.tensor([1, 2, 3]), conditions(SLOTS, 3, 0)
    for b in (1, 3):
        negative = conditions(SLOTS, b, 7)
        away, to = listen(x_t, t, negative.expand(3)), listen(x_t, t, cond)
        guided = Guidance(listen, negative, 2.5)(x_t, t, cond)
        torch.testing.assert_close(guided, away + 2.5 * (to - away))
    with pytest.raises(LDMError, match="expand: a condition of 2 images cannot become one of 3"):
        Guidance(listen, conditions(SLOTS, 2, 7), 2.5)(x_t, t, cond)


def test_away_from_a_neighbour_is_further_than_away_from_all():
    "Of three classes in a row, the middle one is guided away from the left one: to the right."
    schedule, mixture = NoiseSchedule(), GaussianMixture(torch.tensor([[-1.0], [0.0], [1.0]]), torch.full((3,), 0.5))
    x_T = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
    classes = [Condition(vector=torch.eye(3)[[i]]) for i in range(3)]
    nulls = [Condition(vector=mixture.weights[None]), classes[0], classes[2]]
    guided = [Guidance(mixture.denoiser(schedule), null, 2.0) for null in nulls]
    all_three, left, right = (last(ddim(g, x_T, schedule, 20, classes[1].expand(300))).mean().item() for g in guided)
    assert right < -0.5 < all_three - 0.3 < all_three + 0.3 < 0.5 < left


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_an_interval_and_levels_of_any_whole_numbers(dtype):
    x_t, t = torch.randn(2, 3), torch.tensor([120, 5], dtype=dtype)
    cond, null = conditions(SLOTS, 2, 0), conditions(SLOTS, 1, 1)
    for interval in ((0, 999), (100, 300)):
        found = Guidance(listen, null, 3.0, interval=interval)(x_t, t, cond)
        assert torch.equal(found, Guidance(listen, null, 3.0, interval=interval)(x_t, t.long(), cond))
