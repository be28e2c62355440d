"""The discriminator against a PatchGAN written here, its weight against finite differences, and where gradients go."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from ldm_edu.errors import LDMError
from ldm_edu.first_stage import Adversary, AutoencoderKL, FirstStageLoss, PatchDiscriminator
from ldm_edu.first_stage.adversarial import adaptive_weight, hinge_loss

# The discriminator ---------------------------------------------------------------------------------------------------

# (channels in, channels out, stride) of every 4 × 4 convolution, for a first layer of 8 channels
TABLES = {
    1: [(3, 8, 2), (8, 16, 1), (16, 1, 1)],
    2: [(3, 8, 2), (8, 16, 2), (16, 32, 1), (32, 1, 1)],
    3: [(3, 8, 2), (8, 16, 2), (16, 32, 2), (32, 64, 1), (64, 1, 1)],
    4: [(3, 8, 2), (8, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1), (64, 1, 1)],
}


class PatchGAN(nn.Module):
    """Layer by layer from a table; the first and the last convolution have a bias and no BatchNorm."""

    def __init__(self, table):
        super().__init__()
        layers = []
        for i, (c_in, c_out, stride) in enumerate(table):
            outer = i in (0, len(table) - 1)
            layers.append(nn.Conv2d(c_in, c_out, kernel_size=4, stride=stride, padding=1, bias=outer))
            if not outer:
                layers.append(nn.BatchNorm2d(c_out))
            if i < len(table) - 1:
                layers.append(nn.LeakyReLU(0.2))
        self.main = nn.Sequential(*layers)


@pytest.mark.parametrize("layers", TABLES)
def test_equals_a_patchgan(layers):
    """Names, logits in training and after it, and what BatchNorm has learned on the way."""
    torch.manual_seed(layers)
    ours, theirs, x = PatchDiscriminator(8, layers), PatchGAN(TABLES[layers]), torch.randn(3, 3, 64, 80)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs.main(x))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval().main(x))


@pytest.mark.parametrize("layers, side", [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_a_logit_sees_one_patch(layers, side):
    """How far the pixels lie apart on which a logit in the middle depends."""
    torch.manual_seed(0)
    discriminator, x = (
        PatchDiscriminator(4, layers).eval().double(),
        torch.randn(1, 3, 192, 192).double().requires_grad_(True),
    )
    logits = discriminator(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    for others in ((0, 1), (0, 2)):
        seen = x.grad[0].abs().sum(others).nonzero().flatten()
        assert seen.max() - seen.min() + 1 == side == discriminator.patch


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_begins_as_in_the_released_code(norm):
    """Normal around 0 or 1 with a deviation of 0.02; bounds are five standard errors."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(64, 3, norm)
    for layer in discriminator.main:
        if isinstance(layer, nn.LeakyReLU):
            continue
        weight, middle = layer.weight.detach(), float(not isinstance(layer, nn.Conv2d))
        n = weight.numel()
        assert abs(weight.mean().item() - middle) < 5 * 0.02 / n**0.5
        assert abs(weight.std().item() / 0.02 - 1) < 5 / (2 * n) ** 0.5
        if middle:
            assert not layer.bias.any()


def test_group_norm_does_not_depend_on_the_rest_of_the_batch_and_batch_norm_does():
    torch.manual_seed(0)
    x, mates = torch.randn(1, 3, 32, 32), torch.randn(3, 3, 32, 32) * 3
    for norm, alike in (("group", True), ("batch", False)):
        discriminator = PatchDiscriminator(16, 2, norm)
        alone, together = discriminator(x), discriminator(torch.cat([x, mates]))[:1]
        assert ((alone - together).abs().max() < 1e-6) == alike


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_too_small_images_are_refused(layers):
    discriminator, least = PatchDiscriminator(4, layers), 2 ** (layers + 2)
    assert discriminator(torch.zeros(2, 3, least, least)).numel() >= 2
    for h, w in ((least // 2, 256), (256, least // 2), (1, 1)):
        with pytest.raises(LDMError, match=f"{h}×{w} pixels are too few .*fewer layers"):
            discriminator(torch.zeros(2, 3, h, w))


def test_an_unknown_norm_lists_the_known_ones():
    with pytest.raises(LDMError, match="unknown norm 'layer'; known: batch, group"):
        PatchDiscriminator(norm="layer")


# Hinge loss and adaptive weight --------------------------------------------------------------------------------------


def test_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0]), torch.tensor([-2.0, -1.0, -0.5, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0 + 0 + 0.5 + 1 + 2) / 5 * 2)
    assert hinge_loss(torch.full((2, 1, 3, 3), 1.5), torch.full((2, 1, 3, 3), -1.0)) == 0
    assert hinge_loss(torch.zeros(4), torch.zeros(9)) == 1
    real.requires_grad_(True)
    fake.requires_grad_(True)
    hinge_loss(real + 1e-3, fake - 1e-3).backward()  # no longer on the hinge itself
    assert real.grad.tolist() == pytest.approx([0, 0, -0.1, -0.1, -0.1])
    assert fake.grad.tolist() == pytest.approx([0, 0, 0.1, 0.1, 0.1])


class Game:
    """A small decoder, a small discriminator, in float64; both losses as functions of the decoder's last weights."""

    def __init__(self, norm: str):
        torch.manual_seed(0)
        self.decoder = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1)).double()
        self.discriminator = PatchDiscriminator(8, 1, norm).double()
        for weight in self.discriminator.parameters():
            nn.init.normal_(weight, std=0.3)
        self.z, self.x = torch.randn(2, 2, 12, 12).double(), torch.rand(2, 3, 12, 12).double()
        self.last = self.decoder[2].weight

    def rec_loss(self) -> Tensor:
        return FirstStageLoss(l2_weight=1.0).rec_loss(self.x, self.decoder(self.z))[0]

    def g_loss(self) -> Tensor:
        return -self.discriminator(self.decoder(self.z)).mean()

    @torch.no_grad()
    def slope(self, loss) -> Tensor:
        """The gradient at the last weights by central differences."""
        slopes, flat, h = torch.zeros_like(self.last), self.last.view(-1), 1e-6
        for i in range(len(flat)):
            kept, ends = flat[i].item(), []
            for value in (kept + h, kept - h):
                flat[i] = value
                ends.append(loss())
            flat[i] = kept
            slopes.view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
        return slopes


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_adaptive_weight_equals_finite_differences(norm):
    game = Game(norm)
    rec_loss, g_loss = game.slope(game.rec_loss), game.slope(game.g_loss)
    for loss, slopes in ((game.rec_loss, rec_loss), (game.g_loss, g_loss)):  # the differences are good ones
        torch.testing.assert_close(torch.autograd.grad(loss(), game.last)[0], slopes, rtol=1e-5, atol=1e-7)
    expected = rec_loss.square().sum().sqrt() / (g_loss.square().sum().sqrt() + 1e-4)
    assert 1 < expected < 1e4  # or only the clamp would be seen
    found = adaptive_weight(game.rec_loss(), game.g_loss(), game.last)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert not found.requires_grad and game.last.grad is None


@pytest.mark.parametrize("length, d_weight", [(0.5, 5000.0), (3.0, 1e4), (0.0, 0.0)])
def test_without_a_gradient_of_g_loss_the_weight_is_bounded(length, d_weight):
    """λ = ‖rec_loss‖ / (0 + 1e-4), and never more than 1e4."""
    last = torch.zeros(2, 2, requires_grad=True)
    rec_loss, g_loss = (last * torch.tensor([[length, 0.0], [0.0, 0.0]])).sum(), (last * 0.0).sum()
    assert adaptive_weight(rec_loss, g_loss, last).item() == pytest.approx(d_weight)


def test_adaptive_weight_keeps_the_graph_and_takes_means_over_processes():
    """`average` is applied to gradients, before their lengths are taken: two that cancel have no length."""
    last, other = torch.ones(3, requires_grad=True), torch.tensor([-1.0, 1.0, 0.0])
    rec_loss, g_loss = (last * torch.tensor([1.0, 1.0, 0.0])).sum(), (last * 2).sum()
    theirs = iter([other, torch.zeros(3)])
    found = adaptive_weight(rec_loss, g_loss, last, lambda gradient: (gradient + next(theirs)) / 2)
    assert found.item() == pytest.approx(1.0 / (3**0.5 + 1e-4))  # (1, 1, 0) and (−1, 1, 0): (0, 1, 0)
    (rec_loss + g_loss).backward()


# Two losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_each_network_learns_from_its_own_loss(norm):
    """One backward pass through the sum gives what two passes give, each with the other one's weights frozen."""
    torch.manual_seed(0)
    model = AutoencoderKL(8, (1, 2), 1, 2, attention=False, groups=4).double()
    adversary = Adversary(PatchDiscriminator(8, 1, norm), weight=0.3).double()
    with torch.no_grad():
        for weight in adversary.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    before = copy.deepcopy(adversary.discriminator)
    x, noise = torch.rand(3, 3, 16, 16).double() * 2 - 1, torch.randn(3, 2, 8, 8).double()
    criterion = FirstStageLoss(1e-3, 1.0)

    y, posterior = model(x, noise)
    loss, terms = criterion(x, y, posterior, partial(adversary, last_layer=model.last_layer))
    loss.backward()
    together = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    grads = {name: weight.grad.clone() for name, weight in adversary.discriminator.named_parameters()}
    model.zero_grad()

    frozen, y = copy.deepcopy(before).requires_grad_(False), model(x, noise)[0]
    (rec_loss, _), (reg_loss, _), g_loss = criterion.rec_loss(x, y), criterion.reg_loss(posterior), -frozen(y).mean()
    lengths = [torch.autograd.grad(part, model.last_layer, retain_graph=True)[0].norm() for part in (rec_loss, g_loss)]
    d_weight = min((lengths[0] / (lengths[1] + 1e-4)).item(), 1e4)
    alone, posterior = rec_loss + 0.3 * d_weight * g_loss, model(x, noise)[1]
    (alone + criterion.reg_loss(posterior)[0]).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(together[name], weight.grad, msg=lambda said, name=name: f"{name}: {said}")

    with torch.no_grad():
        y = model(x, noise)[0]
    real, fake = before(x), before(y)
    d_loss = (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2
    d_loss.backward()
    for name, weight in before.named_parameters():
        torch.testing.assert_close(grads[name], weight.grad, msg=lambda said, name=name: f"{name}: {said}")
        assert weight.grad.any()

    torch.testing.assert_close(loss, rec_loss + reg_loss + 0.3 * d_weight * g_loss + d_loss)
    assert {"g_loss", "d_loss", "d_weight"} <= set(terms) and not any(term.requires_grad for term in terms.values())
    for name, value in {"g_loss": g_loss, "d_loss": d_loss, "d_weight": torch.tensor(d_weight).double()}.items():
        torch.testing.assert_close(terms[name], value.detach())


def test_a_weight_of_zero_leaves_the_autoencoder_alone():
    """The autoencoder gets no gradient from the discriminator, which still learns."""
    torch.manual_seed(0)
    layer, adversary, x = nn.Conv2d(3, 3, 1), Adversary(PatchDiscriminator(8, 1), weight=0.0), torch.randn(2, 3, 16, 16)
    y = layer(x)
    adversary((x - y).square().mean(), x, y, layer.weight)[0].backward()
    assert not layer.weight.grad.any() and all(w.grad.any() for w in adversary.parameters() if w.dim() > 1)


def test_a_negative_weight_is_refused():
    with pytest.raises(LDMError, match="weight=-0.5"):
        Adversary(PatchDiscriminator(8, 1), weight=-0.5)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_discriminator_learns_to_tell_sharp_from_blurred(norm):
    """Its loss falls from 1, that of logits of 0, to under a quarter."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 2, norm)
    x = torch.rand(16, 3, 32, 32) * 2 - 1
    y = nn.functional.avg_pool2d(x, 3, 1, padding=1)
    adam, losses = torch.optim.Adam(discriminator.parameters(), 1e-3), []
    for _ in range(40):
        adam.zero_grad()
        losses.append(hinge_loss(discriminator(x), discriminator(y)))
        losses[-1].backward()
        adam.step()
    assert 0.8 < losses[0] < 1.2 and losses[-1] < 0.25
