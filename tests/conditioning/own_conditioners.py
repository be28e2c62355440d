"""Conditioners of somebody who uses the package: nothing in `ldm_edu` knows them."""

import torch
from torch import nn
from torch.nn import functional as F

from ldm_edu import Condition, Conditioner, TextConditioner


class ThingCount(Conditioner):
    """How many things there are, as a class index through cross-attention: one token."""

    keys = ("boxes",)

    def __init__(self, most: int = 3, dim: int = 32):
        super().__init__()
        self.most, self.context_dim = most, dim
        self.tokens = nn.Embedding(most + 2, dim)  # 0 to `most` things; the last row is the null

    def forward(self, batch):
        counts = torch.tensor([min(len(boxes), self.most) for boxes in batch["boxes"]])
        return Condition(context=self.tokens(counts.to(self.tokens.weight.device))[:, None])

    def null(self, b=1):
        return Condition(context=self.tokens.weight[-1:].expand(b, 1, -1))


class ClassMap(Conditioner):
    """The segmentation, one channel a class, in the size of the latent, stacked on it; dropped, it is zero."""

    keys = ("segmentation",)

    def __init__(self, classes: int = 4, side: int = 8):
        super().__init__()
        self.classes, self.side, self.concat_channels = classes, side, classes

    def forward(self, batch):
        maps = F.one_hot(batch["segmentation"].long().clamp(max=self.classes - 1), self.classes).movedim(-1, 1)
        return Condition(concat=F.interpolate(maps.float(), size=(self.side, self.side)))

    def null(self, b=1):
        return Condition(concat=torch.zeros(b, self.classes, 1, 1))


class KeptMap(ClassMap):
    """The same, never dropped."""

    def null(self, b=1):
        return Condition()


class Brightness(Conditioner):
    """The mean of the image, as a vector: it has no weights."""

    keys = ("image",)
    vector_dim = 3

    def forward(self, batch):
        return Condition(vector=batch["image"].mean((2, 3)))

    def null(self, b=1):
        return Condition(vector=torch.zeros(b, 3))


class ChosenMap(Conditioner):
    """A map under a key that is an argument, such as `depth`."""

    def __init__(self, key: str, side: int = 8):
        super().__init__()
        self.keys, self.side, self.concat_channels = (key,), side, 1

    def forward(self, batch):
        return Condition(concat=F.adaptive_avg_pool2d(batch[self.keys[0]], self.side))

    def null(self, b=1):
        return Condition(concat=torch.zeros(b, 1, 1, 1))


class Scaled(TextConditioner):
    """Text, scaled; whatever else it is given goes to its base."""

    def __init__(self, gain: float = 2.0, **text):
        super().__init__(**text)
        self.gain = gain

    def forward(self, batch):
        return super().forward(batch).map(lambda v: self.gain * v)


class Frozen(ThingCount):
    """Weights that are not trained, and a buffer."""

    def __init__(self, dim: int = 32):
        super().__init__(dim=dim)
        self.tokens.requires_grad_(False)
        self.register_buffer("shift", torch.full((dim,), 0.5))

    def forward(self, batch):
        return super().forward(batch).map(lambda v: v + self.shift)
