"""Is it heard? With another condition, a UNet that hears predicts something else, and a deaf one does not."""

from collections.abc import Callable

import pytest
import torch
from small_clip import small_clip
from torch import nn

from ldm_edu import (
    AttributesConditioner,
    ClassConditioner,
    CLIPConditioner,
    Conditioner,
    Guidance,
    IdentityFirstStage,
    InpaintingConditioner,
    LayoutConditioner,
    LDMError,
    MapConditioner,
    MergedConditioner,
    TextConditioner,
    UNet,
    drop,
)


def boxes(*rows: tuple) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 5)


def text(dim: int = 16) -> TextConditioner:
    return TextConditioner(("red", "blue", "ball"), length=4, dim=dim, depth=1, heads=2)


def depth() -> MapConditioner:
    return MapConditioner("depth", channels=1, per_image=True, has_null=True)


def clip(folder) -> CLIPConditioner:
    small_clip(folder)
    return CLIPConditioner(str(folder), length=6)


G = torch.Generator().manual_seed(0)
CAPTIONS, OTHER_CAPTIONS = {"caption": ["red ball", "blue"]}, {"caption": ["blue ball", "ball red"]}
DEPTH, OTHER_DEPTH = ({"depth": torch.rand(2, 1, 8, 8, generator=G)} for _ in range(2))
IMAGE, OTHER_IMAGE = (torch.rand(2, 3, 8, 8, generator=G) for _ in range(2))
HALF = torch.arange(8).ge(4).float().expand(2, 1, 8, 8)
MAPS, OTHER_MAPS = ({"segmentation": torch.randint(4, (2, 8, 8), generator=G)} for _ in range(2))

# what makes a conditioner, a batch of two, another one of which both differ
KINDS: dict[str, tuple[Callable, dict, dict]] = {
    "class": (lambda _: ClassConditioner(5, 16), {"class": [1, 2]}, {"class": [3, 4]}),
    "class, vector": (lambda _: ClassConditioner(5, 16, slot="vector"), {"class": [1, 2]}, {"class": [3, 4]}),
    "attributes": (
        lambda _: AttributesConditioner(3, 16),
        {"attributes": torch.eye(3)[:2]},
        {"attributes": torch.eye(3)[1:]},
    ),
    "layout": (
        lambda _: LayoutConditioner(4, max_boxes=2, bins=4, dim=16, depth=1),
        {"boxes": [boxes((1, 0, 0, 1, 1)), boxes((2, 0, 0, 0.5, 0.5))]},
        {"boxes": [boxes((0, 0, 0, 1, 1)), boxes((2, 0, 0, 0.5, 1))]},
    ),
    "text": (lambda _: text(), CAPTIONS, OTHER_CAPTIONS),
    "clip": (clip, CAPTIONS, OTHER_CAPTIONS),
    "depth": (lambda _: depth(), DEPTH, OTHER_DEPTH),
    "segmentation": (
        lambda _: MapConditioner("segmentation", classes=4, out_channels=2, has_null=True),
        MAPS,
        OTHER_MAPS,
    ),
    "depth and text": (lambda _: MergedConditioner([depth(), text()]), DEPTH | CAPTIONS, OTHER_DEPTH | OTHER_CAPTIONS),
    "class and attributes": (
        lambda _: MergedConditioner([ClassConditioner(5, 16), AttributesConditioner(3, 16)]),
        {"class": [1, 2], "attributes": torch.eye(3)[:2]},
        {"class": [3, 4], "attributes": torch.eye(3)[1:]},
    ),
    "low resolution": (lambda _: MapConditioner("image"), {"image": IMAGE}, {"image": OTHER_IMAGE}),
    "inpainting": (
        lambda _: InpaintingConditioner(IdentityFirstStage()),
        {"image": IMAGE, "mask": HALF},
        {"image": OTHER_IMAGE, "mask": 1 - HALF},
    ),
}
DROPPED = [kind for kind in KINDS if kind not in ("low resolution", "inpainting")]


def made(kind: str, folder) -> tuple[Conditioner, UNet, dict, dict]:
    """A conditioner, a small UNet for it with no weights that are zero, and two batches."""
    make, batch, other = KINDS[kind]
    torch.manual_seed(0)
    part = make(folder / "clip").eval()
    slots = {name: getattr(part, name) for name in ("context_dim", "concat_channels", "vector_dim")}
    unet = UNet(3, 3, channels=64, multipliers=(1, 2), blocks=1, attention_factors=(2,), **slots).eval()
    for weight in unet.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.05)
    return part, unet, batch, other


X, T = torch.randn(2, 3, 8, 8, generator=G), torch.tensor([100, 700])


def deaf(unet: UNet) -> UNet:
    """The same with all weights zero through which a condition comes in."""
    for name, weight in unet.named_parameters():
        if ".attn2.to_out." in name or name.startswith("label_emb.2."):
            nn.init.zeros_(weight)
    nn.init.zeros_(unet.input_blocks[0][0].weight[:, 3:])
    return unet


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_another_condition_is_another_prediction(kind, tmp_path):
    part, unet, batch, other = made(kind, tmp_path)
    before, after = unet(X, T, part(batch)), unet(X, T, part(other))
    assert ((before - after).abs().amax((1, 2, 3)) > 1e-3).all()
    assert torch.equal(unet(X, T, part(batch)), before)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_image_hears_its_own_condition_alone(kind, tmp_path):
    part, unet, batch, other = made(kind, tmp_path)
    mixed = {key: [batch[key][0], other[key][1]] for key in batch}
    mixed = {key: torch.stack(v) if isinstance(batch[key], torch.Tensor) else v for key, v in mixed.items()}
    one = unet(X, T, part(mixed))
    torch.testing.assert_close(one[:1], unet(X, T, part(batch))[:1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one[1:], unet(X, T, part(other))[1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_deaf_network_says_the_same_to_all(kind, tmp_path):
    part, unet, batch, other = made(kind, tmp_path)
    deaf(unet)
    assert torch.equal(unet(X, T, part(batch)), unet(X, T, part(other)))


@pytest.mark.parametrize("kind", DROPPED)
@torch.no_grad()
def test_guidance_passes_a_network_that_hears_and_refuses_a_deaf_one(kind, tmp_path):
    part, unet, batch, _ = made(kind, tmp_path)
    cond, null = part(batch), part.null()
    guided = Guidance(unet, null, 3.0, check=True)(X, T, cond)
    e_u, e_c = unet(X, T, drop(cond, null, 1, torch.zeros(2))), unet(X, T, cond)
    torch.testing.assert_close(guided, e_u + 3 * (e_c - e_u), atol=1e-4, rtol=1e-3)
    assert (guided - e_c).abs().max() > 1e-3
    with pytest.raises(LDMError, match="the same with its condition and without"):
        Guidance(deaf(unet), null, 3.0, check=True)(X, T, cond)


@pytest.mark.parametrize("kind", DROPPED)
def test_the_loss_of_dropped_and_kept_reaches_every_trained_weight_of_the_conditioner(kind, tmp_path):
    part, unet, batch, other = made(kind, tmp_path)
    loss = sum(
        unet(X, T, drop(part(b), part.null(), 0.5, torch.tensor([0.0, 0.9]))).square().sum() for b in (batch, other)
    )
    loss.backward()
    trained = {name: p for name, p in part.named_parameters() if p.requires_grad}
    assert bool(trained) == (kind != "clip")
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]


def test_a_half_deaf_network_hears_the_other_condition(tmp_path):
    """Guidance cannot tell which of several conditions is heard: dropped alone, the deaf one changes nothing."""
    part, unet, batch, other = made("depth and text", tmp_path)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if ".attn2.to_out." in name:
                nn.init.zeros_(weight)
        Guidance(unet, part.null(), 3.0, check=True)(X, T, part(batch))
        said = unet(X, T, part(batch))
        assert torch.equal(unet(X, T, part(batch | OTHER_CAPTIONS)), said)
        assert not torch.allclose(unet(X, T, part(batch | OTHER_DEPTH)), said, atol=1e-3)
