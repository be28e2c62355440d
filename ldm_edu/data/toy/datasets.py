"""Data sets that are drawn when they are asked for: `ToyCOCO` and `ToyCelebA`."""

import operator
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm_edu.data.batches import _check_keys, _check_size, _check_split, data_count
from ldm_edu.data.toy.captions import captions
from ldm_edu.data.toy.faces import FACE_ATTRIBUTES, FACE_SEGMENTS, Face, draw_face, face_truth, render_faces
from ldm_edu.data.toy.scenes import PAIRS, SPLITS, Scene, draw_scene, render, truth

__all__ = ["ToyCOCO", "ToyCelebA"]

DRAWING_VERSION = 1  # goes up whenever a sample is drawn or read in another way than before


class Drawn(Dataset):
    "Samples that are drawn when they are asked for, and depend on nothing but (seed, split, index)."

    splits: ClassVar[tuple[str, ...]] = ()
    known_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, split: str, size: int, length: int, seed: int, keys: Sequence[str]):
        _check_split(split, self.splits)
        self.split = split
        self.size = _check_size(size)
        self.length = data_count("length", length, 0)
        self.seed = data_count("seed", seed, 0)
        self.keys = _check_keys(keys, self.known_keys)

    def __len__(self) -> int:
        return self.length

    def identity(self) -> dict:
        "Everything that decides the samples: equal identities mean equal samples."
        return {
            "data": type(self).__name__,
            "version": DRAWING_VERSION,
            "split": self.split,
            "size": self.size,
            "seed": self.seed,
            "keys": list(self.keys),
        }

    def rng(self, index: int) -> np.random.Generator:
        "The random stream that sample `index` is drawn from."
        if not 0 <= index < self.length:
            raise IndexError(f"index {index}: there are samples 0 to {self.length - 1}")
        return np.random.default_rng([self.seed, self.splits.index(self.split), index])

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        "Several samples, drawn together: torch's DataLoader calls this once for a batch."
        raise NotImplementedError


class ToyCOCO(Drawn):
    """Scenes of one to three things on a floor, with captions and with the truth about every pixel.

    A sample is a dict of the `keys` that were asked for: `image` (3, size, size) in [-1, 1], `caption`, `captions` (a
    list of five, the first of them `caption`), `class`, the index in `class_names` of the thing nearest to the camera,
    and `segmentation`, `depth`, `boxes`, `instances` as in `scenes.truth`.
    """

    splits = SPLITS
    truths = ("segmentation", "depth", "boxes", "instances")  # see `scenes.truth`
    known_keys = ("image", "caption", "captions", "class", *truths)
    class_names: ClassVar[list[str]] = [f"{colour} {shape}" for colour, shape in PAIRS]

    def __init__(
        self,
        split: str = "train",  # "train", "validation", "test", or "unseen_pairs": colour-shape pairs that train lacks
        size: int = 64,  # pixels along each side
        length: int = 50_000,  # how many samples
        seed: int = 0,  # another seed, another data set
        keys: Sequence[str] = ("image", "caption"),  # some of `known_keys`; `caption` is the first of `captions`
    ):
        super().__init__(split, size, length, seed, keys)

    def _draw(self, index: int, n: int) -> tuple[Scene, list[str]]:
        rng = self.rng(index)
        scene = draw_scene(rng, unseen=self.split == "unseen_pairs")
        return scene, captions(scene, rng, n)

    def describe(self, index: int) -> tuple[Scene, list[str]]:
        "The scene at `index` and its five captions."
        return self._draw(index, 5)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        if not len(indices):
            return []
        needed = {"caption": 1, "captions": 5}
        n = max(needed.get(key, 0) for key in self.keys)
        scenes, texts = zip(*(self._draw(operator.index(index), n) for index in indices))
        parts = {"captions": texts, "caption": [text[0] for text in texts if text]}
        if "class" in self.keys:
            nearest = [min(scene.things, key=lambda thing: thing.y) for scene in scenes]
            parts["class"] = [PAIRS.index((thing.colour, thing.shape)) for thing in nearest]
        if "image" in self.keys:
            parts["image"] = render(scenes, self.size)
        if set(self.truths) & set(self.keys):
            parts |= truth(scenes, self.size)
        return [{key: parts[key][i] for key in self.keys} for i in range(len(scenes))]


class ToyCelebA(Drawn):
    """Drawn faces, with attributes that are true of the image.

    A sample is a dict of the `keys` that were asked for: `image` (3, size, size) in [-1, 1], `attributes` (16,), 0 or 1
    for each of `attribute_names`, and `segmentation` (size, size), indices into `segment_names`.
    """

    splits = ("train", "validation", "test")
    known_keys = ("image", "attributes", "segmentation")
    attribute_names = list(FACE_ATTRIBUTES)
    segment_names = FACE_SEGMENTS

    def __init__(
        self,
        split: str = "train",  # "train", "validation" or "test"
        size: int = 64,  # pixels along each side
        length: int = 50_000,  # how many samples
        seed: int = 0,  # another seed, other faces
        keys: Sequence[str] = ("image", "attributes"),  # some of `known_keys`
    ):
        super().__init__(split, size, length, seed, keys)

    def describe(self, index: int) -> Face:
        "The face at `index`."
        return draw_face(self.rng(index))

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        if not len(indices):
            return []
        faces = [self.describe(operator.index(index)) for index in indices]
        parts = {"attributes": torch.tensor([face.attributes for face in faces], dtype=torch.float32)}
        if "image" in self.keys:
            parts["image"] = render_faces(faces, self.size)
        if "segmentation" in self.keys:
            parts |= face_truth(faces, self.size)
        return [{key: parts[key][i] for key in self.keys} for i in range(len(faces))]
