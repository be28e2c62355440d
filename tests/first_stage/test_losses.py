"""What a first stage is asked to do: every term of its loss against the formula, in sums and in means."""

import math

import pytest
import torch
from torch import Tensor

from ldm_edu.errors import LDMError
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.metrics import LPIPS
from ldm_edu.first_stage import AutoencoderKL, AutoencoderVQ, DiagonalGaussian, FirstStageLoss, VectorQuantizer
from ldm_edu.first_stage.losses import PerceptualDistance, kl_loss, reconstruction_loss


def pair(b: int = 3, side: int = 16) -> tuple[Tensor, Tensor]:
    """Images and bad reconstructions of them, in float64."""
    generator = torch.Generator().manual_seed(0)
    x, wrong = (torch.rand(b, 3, side, side, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return x, 0.7 * x + 0.3 * wrong


def gaussian(b: int = 3) -> DiagonalGaussian:
    generator = torch.Generator().manual_seed(1)
    mean, logvar = (torch.randn(b, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return DiagonalGaussian(mean, logvar)


def codebook(b: int = 3, **options):
    """A quantised latent, and what stands in its formula: vectors and entries."""
    torch.manual_seed(2)
    quantizer, z = VectorQuantizer(16, 2, **options), torch.randn(b, 2, 4, 4)
    torch.nn.init.normal_(quantizer.embedding.weight)
    quantized = quantizer(z)
    return quantized, z, quantizer.entries(quantized.indices).detach()


def far(x: Tensor, y: Tensor) -> Tensor:
    """A distance (b,) that is easy to tell from the others."""
    return (x.mean((2, 3)) - y.mean((2, 3))).square().sum(1) + 0.3 * (x - y)[:, 0].square().mean((1, 2))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=0)


# Terms, one by one ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2_weight", [0.0, 1.0, 5.0])
def test_reconstruction_is_a_sum_over_an_image_and_a_mean_over_the_batch(l2_weight):
    x, y = pair()
    by_hand = 0.0
    for one, other in zip(x.flatten(1).tolist(), y.flatten(1).tolist()):
        by_hand += sum(abs(a - b) + l2_weight * (a - b) ** 2 for a, b in zip(one, other)) / len(x)
    assert reconstruction_loss(x, y, l2_weight).item() == pytest.approx(by_hand, rel=1e-12)


def test_kl_is_the_integral_that_it_stands_for():
    """∫ q log(q / p) for one number of one latent, on a fine grid, and the sum over independent numbers."""
    grid = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    expected = []
    for mean, logvar in ((0.0, 0.0), (1.5, 0.3), (-0.4, -2.0)):
        q = torch.distributions.Normal(mean, math.exp(logvar / 2)).log_prob(grid)
        p = torch.distributions.Normal(0.0, 1.0).log_prob(grid)
        expected.append(torch.trapezoid(q.exp() * (q - p), grid).item())
        one = DiagonalGaussian(torch.full((1, 1, 1, 1), mean).double(), torch.full((1, 1, 1, 1), logvar).double())
        assert kl_loss(one).item() == pytest.approx(expected[-1], abs=1e-7)
    numbers = torch.tensor([[0.0, 0.0], [1.5, 0.3], [-0.4, -2.0]], dtype=torch.float64).T.reshape(2, 1, 3, 1, 1)
    assert kl_loss(DiagonalGaussian(*numbers)).item() == pytest.approx(sum(expected), abs=1e-6)


# The convention of the released code ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_kl_is_what_the_released_code_computes(weight):
    """Errors of all values, the perceptual distance spread over every one of them; sums divided by the batch."""
    (x, y), posterior = pair(), gaussian()
    every = (x - y).abs() + weight * far(x, y)[:, None, None, None]
    kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum((1, 2, 3))
    expected = every.sum() / len(x) + 1e-6 * kl.sum() / len(x)
    loss, _ = FirstStageLoss(1e-6, perceptual=far, perceptual_weight=weight)(x, y, posterior)
    same(loss, expected)
    assert kl.sum() > 1  # or 1e-6 times it would be lost in rounding
    heavy, _ = FirstStageLoss(1.0, perceptual=far, perceptual_weight=weight)(x, y, posterior)
    same(heavy - loss, (1 - 1e-6) * kl.sum() / len(x))


@pytest.mark.parametrize("legacy", [False, True])
def test_vq_is_what_the_released_code_computes(legacy):
    """Means over everything; β = 0.25 on one of codebook loss and commitment loss, which are equal in value."""
    (x, y), (quantized, z, entries) = pair(), codebook(legacy=legacy)
    every = (x - y).abs() + far(x, y)[:, None, None, None]
    expected = every.mean() + 1.25 * ((entries - z) ** 2).mean()
    loss, _ = FirstStageLoss(perceptual=far, means=True)(x, y, quantized)
    same(loss, expected)


@pytest.mark.parametrize("means", [False, True])
def test_all_terms_together(means):
    """Every weight at once, with sums and with means, for both regularisers."""
    (x, y), posterior, (quantized, z, entries) = pair(), gaussian(), codebook()
    loss = FirstStageLoss(0.03, 2.0, far, 0.4, 0.7, means)
    over = (lambda value: value.mean()) if means else (lambda value: value.sum() / len(x))
    rec_loss = over((x - y).abs() + 2.0 * (x - y) ** 2 + 0.4 * far(x, y)[:, None, None, None])
    kl = over(0.5 * (posterior.mean**2 + posterior.std**2 - 1 - 2 * posterior.std.log()))
    same(loss(x, y, posterior)[0], rec_loss + 0.03 * kl)
    same(loss(x, y, quantized)[0], rec_loss + 0.7 * over(1.25 * (entries - z) ** 2))


@pytest.mark.parametrize("means", [False, True])
def test_a_batch_costs_what_its_images_cost_on_average(means):
    """Or the same λ would say something else at another batch size."""
    (x, y), posterior, loss = pair(), gaussian(), FirstStageLoss(0.1, 1.0, far, 0.5, means=means)
    alone = [
        loss(x[i : i + 1], y[i : i + 1], DiagonalGaussian(posterior.mean[i : i + 1], posterior.logvar[i : i + 1]))[0]
        for i in range(len(x))
    ]
    same(loss(x, y, posterior)[0], torch.stack(alone).mean())


# The log, and what is asked for -------------------------------------------------------------------------------------


def test_terms_are_detached_and_what_they_say():
    (x, y), posterior, (quantized, z, entries) = pair(), gaussian(), codebook()
    y.requires_grad_(True)
    posterior.mean.requires_grad_(True)
    for means in (False, True):
        loss, terms = FirstStageLoss(1e-6, 5.0, far, 2.0, means=means)(x, y, posterior)
        assert list(terms) == ["l1", "perceptual", "kl"] and loss.requires_grad
        same(terms["l1"], (x - y).abs().mean())
        same(terms["perceptual"], far(x, y).mean())  # neither is weighted
        same(terms["kl"], posterior.kl().mean())
        assert not any(term.requires_grad or term.dim() for term in terms.values())
        terms = FirstStageLoss(means=means)(x, y, quantized)[1]
        assert list(terms) == ["l1", "codebook"] and not any(term.requires_grad for term in terms.values())
        same(terms["codebook"], 1.25 * ((entries - z) ** 2).mean())


@pytest.mark.parametrize("name", ["kl_weight", "l2_weight", "perceptual_weight", "codebook_weight"])
def test_negative_weights_are_refused_by_name(name):
    with pytest.raises(LDMError, match=f"{name}=-0.5"):
        FirstStageLoss(**{name: -0.5})
    FirstStageLoss(**{name: 0.0})


@pytest.mark.parametrize("means", [False, True])
def test_an_adversary_is_given_rec_loss_and_its_terms_are_added(means):
    (x, y), posterior, calls = pair(), gaussian(), []

    def adversary(*args):
        calls.append(args)
        return torch.tensor(7.0), {"d_loss": torch.tensor(2.0)}

    loss = FirstStageLoss(0.1, 1.0, far, means=means)
    without, terms = loss(x, y, posterior)
    with_one, more = loss(x, y, posterior, adversary)
    same(with_one, without + 7.0)
    assert list(more) == [*terms, "d_loss"] and more["d_loss"] == 2.0
    ((rec_loss, images, reconstruction),) = calls
    same(rec_loss, loss.rec_loss(x, y)[0])
    assert images is x and reconstruction is y


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["toy-features", "alex", "vgg"])
def perceptual(request):
    """A distance that a first stage may be trained with."""
    if request.param == "toy-features":
        return ToyFeatures.from_pretrained("toy-features").requires_grad_(False).distance
    return LPIPS(request.param, request.getfixturevalue("lpips_weights"), download=False).distance


def small(kind):
    torch.manual_seed(0)
    shape = dict(channels=8, multipliers=(1, 2), blocks=1, latent_channels=2, attention=False, groups=4)
    return kind(**shape, **({"num_codes": 16} if kind is AutoencoderVQ else {})).eval()


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderVQ])
def test_the_perceptual_term_alone_reaches_the_decoder_and_the_encoder(perceptual, kind):
    """What the term adds to the gradients is the distance's own gradient, weight × values times, and not nothing."""
    model, x = small(kind), pair(2, 32)[0].float()
    first = [model.decoder.conv_in.weight, model.decoder.conv_out.weight, model.encoder.conv_in.weight]
    noise = torch.zeros(2, 2, 16, 16)

    def gradients(loss):
        return torch.autograd.grad(loss(*model(x, noise)), first)

    unused, used = (FirstStageLoss(perceptual=perceptual, perceptual_weight=w) for w in (0.0, 20.0))
    without, together = (gradients(lambda y, r, loss=loss: loss(x, y, r)[0]) for loss in (unused, used))
    alone = gradients(lambda y, _: 20.0 * 3 * 32 * 32 * perceptual(x, y).mean())
    for a, b, c in zip(without, together, alone):
        assert c.norm() > 0.1 * a.norm() > 0
        torch.testing.assert_close(b - a, c, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_the_features_are_not_trained(perceptual):
    x, y = (value[:1].float().repeat(1, 1, 2, 2) for value in pair())
    y.requires_grad_(True)
    FirstStageLoss(perceptual=perceptual)(x, y, gaussian(1))[0].backward()
    assert y.grad.norm() > 0
    assert not any(weight.requires_grad for weight in perceptual.__self__.parameters())
    assert isinstance(perceptual, PerceptualDistance)
