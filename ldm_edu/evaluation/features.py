"""A small network that compares toy images, where the weights of LPIPS are not available."""

from collections.abc import Sequence
from itertools import pairwise, product

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm_edu import checks
from ldm_edu.checkpoints import Part
from ldm_edu.checks import like_weights
from ldm_edu.data.toy.faces import FACE_ATTRIBUTES
from ldm_edu.data.toy.scenes import COLOURS, SHAPES, SIZES, Scene
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.metrics import check_images, layer_distances

__all__ = ["THINGS", "ToyFeatures"]

THINGS = tuple(product(SIZES, COLOURS, SHAPES))  # every kind of thing: ("small", "red", "sphere"), ...


def thing_targets(
    scenes: Sequence[Scene],
) -> Float[Tensor, "b 48"]:
    "Which of THINGS stand in every scene: 1 or 0."
    targets = torch.zeros(len(scenes), len(THINGS))
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            targets[i, THINGS.index((thing.size, thing.colour, thing.shape))] = 1
    return targets


def _convolution(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    "A 3 × 3 convolution, GroupNorm in 8 groups, SiLU."
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.GroupNorm(8, c_out), nn.SiLU())


def _head(channels: int, questions: int) -> nn.Conv2d:
    "A 1 × 1 convolution to one logit a question; untrained, it answers no to nearly every one."
    head = nn.Conv2d(channels, questions, 1)
    assert head.bias is not None
    nn.init.constant_(head.bias, -3.0)
    return head


class ToyFeatures(Part, nn.Module):
    "A classifier of toy images whose feature maps give a perceptual distance, in place of LPIPS on toy data only."

    smallest = 16  # pixels along a side, so that every level has something to halve
    follow = ("provenance",)  # arguments that may change later: see `Part`

    def __init__(
        self,
        channels: tuple[int, ...] = (32, 64, 96, 128),  # of the levels, multiples of 8
        things: int = len(THINGS),  # how many kinds of things it classifies in a scene
        attributes: int = len(FACE_ATTRIBUTES),  # how many attributes it classifies in a face
        provenance: dict | None = None,  # with which recipe, steps and scores it was trained
    ):
        super().__init__()
        self.provenance = provenance
        if not channels or any(c < 8 or c % 8 for c in channels):
            raise LDMError(f"channels should be one or more multiples of 8, not {channels}")
        levels = [_convolution(3, channels[0], stride=2)]
        for c_in, c_out in pairwise(channels):
            levels.append(nn.Sequential(_convolution(c_in, c_in), _convolution(c_in, c_out, stride=2)))
        self.levels = nn.ModuleList(levels)
        self.things = _head(channels[-1], things)
        self.attributes = _head(channels[-1], attributes)

    def features(self, x: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _c _h _w"]]:
        "The feature maps after every level: sides of h/2, h/4, h/8, h/16, rounded up."
        x, maps = like_weights("x", checks.check_images("x", x), self), []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps

    def embed(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        "The last level's mean over positions: one vector an image, for distances between sets of images."
        return self.features(x)[-1].mean((2, 3))

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b _"]]:
        "Logits: `things` (b, 48), one for each of THINGS; `attributes` (b, a), one for each of FACE_ATTRIBUTES."
        last = self.features(x)[-1]
        return {"things": self.things(last).amax((2, 3)), "attributes": self.attributes(last).amax((2, 3))}

    def distance(
        self,
        x: Float[Tensor, "b 3 h w"],  # images in [-1, 1]
        y: Float[Tensor, "..."],  # images of the same shape
    ) -> Float[Tensor, "b"]:  # from 0, which identical images have, to 4; lower is better
        "The distance of LPIPS with equal weights for all channels and the mean over levels."
        check_images("ToyFeatures", x, y, self.smallest, 3)
        return layer_distances(self.features(x), self.features(y)).mean(1)
