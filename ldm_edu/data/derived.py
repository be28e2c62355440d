"""Keys that any data set with images has: a low-resolution image, a degraded one, and a mask with a hole."""

import operator
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm_edu.data.batches import SampleDataset
from ldm_edu.data.degradation import degrade, downsample, random_mask
from ldm_edu.errors import DataError, LDMError

__all__ = ["Derived"]

FACTOR = 4  # between an image and its low-resolution image (§ 4.4)
DERIVED_VERSION = 1  # goes up whenever a derived key is made in another way than before


def low_resolution(image: Tensor, stream: Sequence[int]) -> Tensor:
    "The image (3, h, w), four times smaller, by bicubic interpolation with antialiasing (§ 4.4)."
    try:
        return downsample(image[None], FACTOR)[0]
    except LDMError as error:
        raise DataError(f"low_resolution: {error}") from error


def degraded(image: Tensor, stream: Sequence[int]) -> Tensor:
    "The image (3, h, w), four times smaller, with blur, noise and JPEG, the same every time for a sample (D.6.1)."
    try:
        return degrade(image[None], FACTOR, [np.random.default_rng([DERIVED_VERSION, *stream])])[0]
    except LDMError as error:
        raise DataError(f"degraded: {error}") from error


def mask(image: Tensor, stream: Sequence[int]) -> Tensor:
    "(1, h, w), 1 where something is missing: a box, brush strokes or a half, the same every time for a sample."
    if image.shape[1] != image.shape[2]:
        raise DataError(f"mask: masks are square, but the image has {image.shape[1]} × {image.shape[2]} pixels")
    return random_mask(image.shape[1], [np.random.default_rng([DERIVED_VERSION, *stream])])[0]


DERIVED: dict[str, Callable[[Tensor, Sequence[int]], Tensor]] = {
    "low_resolution": low_resolution,
    "degraded": degraded,
    "mask": mask,
}


class Derived(Dataset):
    "A data set with `low_resolution` and `degraded` (3, size/4, size/4), `mask` (1, size, size), made of its images."

    known_keys = tuple(DERIVED)

    def __init__(
        self,
        dataset: SampleDataset,  # gives `image`, and whatever else is asked for
        keys: Sequence[str],  # all that a sample shall have
    ):
        self.dataset, self.keys = dataset, tuple(keys)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        "What else the data set knows, such as the names of its attributes."
        if name.startswith("_") or name == "dataset":  # asked for before there is one, by copy and pickle
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def identity(self) -> dict[str, Any]:
        "That of the data set, with the keys that are derived."
        return {**self.dataset.identity(), "derived": DERIVED_VERSION, "keys": list(self.keys)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        "Several samples at once, if the data set can give several."
        numbers = [operator.index(index) for index in indices]
        several = getattr(self.dataset, "__getitems__", None)
        samples = several(numbers) if several else [self.dataset[index] for index in numbers]
        return [self._with_derived(sample, index) for sample, index in zip(samples, numbers)]

    def _with_derived(self, sample: dict[str, Any], index: int) -> dict[str, Any]:
        # another split, or another seed of a drawn data set, has other holes
        split, seed = str(getattr(self.dataset, "split", "")), int(getattr(self.dataset, "seed", 0))
        stream = (zlib.crc32(split.encode()), seed, index % len(self))
        made = {key: DERIVED[key](torch.as_tensor(sample["image"]), stream) for key in self.keys if key in DERIVED}
        return {key: made[key] if key in made else sample[key] for key in self.keys}
