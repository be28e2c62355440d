"""A small network that compares toy images, where the weights of LPIPS cannot be had."""

import torch
from collections.abc import Sequence
from itertools import product
from jaxtyping import Float
from torch import Tensor, nn
from ldm_edu.checkpoints import Part
from ldm_edu.data.toy.faces import FACE_ATTRIBUTES
from ldm_edu.data.toy.scenes import COLOURS, SHAPES, SIZES, Scene
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.metrics import _check_images, layer_distances

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


class ToyFeatures(Part, nn.Module):
    "A small network that names what is in toy images, and compares images by what it sees on the way."

    smallest = 16  # pixels along a side, so that every level has something to halve
    follow = ("provenance",)  # arguments that may change later: see `Part`

    def __init__(
        self,
        channels: tuple[int, ...] = (32, 64, 96, 128),  # of the levels, multiples of 8
        things: int = len(THINGS),  # how many kinds of things it names in a scene
        attributes: int = len(FACE_ATTRIBUTES),  # how many attributes it names in a face
        provenance: dict | None = None,  # with which recipe, steps and scores it was trained
    ):
        super().__init__()
        self.provenance = provenance
        if not channels or any(c < 8 or c % 8 for c in channels):
            raise LDMError(f"channels should be one or more multiples of 8, not {channels}")
        levels = [_convolution(3, channels[0], stride=2)]
        for c_in, c_out in zip(channels, channels[1:]):
            levels.append(nn.Sequential(_convolution(c_in, c_in), _convolution(c_in, c_out, stride=2)))
        self.levels = nn.ModuleList(levels)
        self.things, self.attributes = (nn.Conv2d(channels[-1], n, 1) for n in (things, attributes))
        for head in (self.things, self.attributes):
            nn.init.constant_(head.bias, -3.0)  # before it has learned anything, it says no to everything

    def features(self, x: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _c _h _w"]]:
        "What every level says: sides of h/2, h/4, h/8, h/16, rounded up."
        said = []
        for level in self.levels:
            x = level(x)
            said.append(x)
        return said

    def embed(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        "The last level's mean over positions: one vector an image, for distances between sets of images."
        return self.features(x)[-1].mean((2, 3))

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b _"]]:
        "Logits: `things` (b, 48), is one of THINGS there; `attributes` (b, a), is one of FACE_ATTRIBUTES true."
        last = self.features(x)[-1]
        return {"things": self.things(last).amax((2, 3)), "attributes": self.attributes(last).amax((2, 3))}

    def distance(
        self,
        x: Float[Tensor, "b 3 h w"],  # images in [-1, 1]
        y: Float[Tensor, "..."],  # images of the same shape
    ) -> Float[Tensor, "b"]:  # from 0, which identical images have, to 4; lower is better
        "As LPIPS, with equal weights for all channels and the mean over levels."
        _check_images("ToyFeatures", x, y, self.smallest, 3)
        return layer_distances(self.features(x), self.features(y)).mean(1)
