"""A data set kept on disk: drawn or decoded once, and read from then on."""

# A cache is a folder with three files. `images.npy` has the images as bytes and `texts.jsonl` a line of captions and
# attributes for each sample. `cache.json` says of which data set the cache is, how many samples are written, and has a
# checksum of every block of samples. The first two grow block by block, and `cache.json` is written after every block:
# whatever stands behind that mark, because a program was interrupted, is cut off and written again.

import io
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from ldm_edu.basics import progress
from ldm_edu.checkpoints import atomic
from ldm_edu.data.batches import SampleDataset
from ldm_edu.data.images import from_uint8
from ldm_edu.display import to_uint8
from ldm_edu.errors import DataError

__all__ = ["cached", "ImageCache"]

IMAGES_FILE = "images.npy"
TEXTS_FILE = "texts.jsonl"
STATE_FILE = "cache.json"

_State = dict[str, Any]  # the content of `cache.json`

# ---- The state of a cache


def _check_state(folder: Path, state: Any) -> None:
    "ValueError, TypeError or AttributeError where this is no state, or where the files are shorter than it says."
    lacking = {"dataset", "block", "done", "bytes", "sums", "attribute_names"} - set(state)
    if lacking:
        raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    for name, size in state["bytes"].items():
        if size and size > (folder / name).stat().st_size:
            raise ValueError(f"{name} should have {size} bytes")


def _read_state(folder: Path) -> _State | None:
    "The state of the cache in a folder; None where there is none yet; DataError where it does not fit the files."
    path = folder / STATE_FILE
    has_only_images = (folder / IMAGES_FILE).exists() and not path.exists()
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        _check_state(folder, state)
    except (FileNotFoundError, NotADirectoryError) as error:
        if has_only_images or error.filename != str(path):
            raise DataError(f"{folder} has only a part of a cache: delete it and it will be made again") from None
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged or does not fit the files beside it ({error}): "
            "delete the folder and it will be made again"
        ) from error
    return state


def _open_state(dataset: SampleDataset, folder: Path, n: int, block: int) -> _State:
    "The state of the cache of these samples: the one in the folder, or a new one. DataError where it is of others."
    asked = {"samples": n, **json.loads(json.dumps(dataset.identity()))}
    state = _read_state(folder)
    if state is None:
        return {
            "dataset": asked,
            "block": block,
            "done": 0,
            "bytes": {IMAGES_FILE: 0, TEXTS_FILE: 0},
            "sums": {IMAGES_FILE: [], TEXTS_FILE: []},
            "attribute_names": getattr(dataset, "attribute_names", None),
        }
    there = state["dataset"]
    if there != asked:
        differing = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
        told = "; ".join(f"{key} {there.get(key)}, not {asked.get(key)}" for key in differing)
        raise DataError(
            f"{folder} is a cache of something else ({told}): "
            "choose another folder, or delete this one and it will be made again"
        )
    return state


# ---- Writing


def _write_at(path: Path, content: bytes, at: int) -> None:
    "Cut a file off at byte `at` and append `content`; it is on the disk when this returns."
    with open(path, "r+b" if at else "wb") as file:
        file.seek(at)
        file.truncate()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write_state(folder: Path, state: _State) -> None:
    "Replace the state in a folder, whole or not at all."
    with atomic(folder / STATE_FILE) as path:
        _write_at(path, json.dumps(state).encode(), 0)


def _npy_header(shape: Sequence[int]) -> bytes:
    "The beginning of a .npy file of bytes in this shape."
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    return header.getvalue()


def _text_line(sample: dict[str, Any]) -> str:
    "Everything in a sample but its image, as a line of JSON; DataError for keys that a cache does not keep."
    others = set(sample) - {"image", "caption", "captions", "attributes"}
    if others:
        raise DataError(f"a cache keeps images, captions and attributes, not {', '.join(sorted(others))}: see `keys`")
    captions = sample.get("captions")
    if not captions and "caption" in sample:
        captions = [sample["caption"]]
    attributes = [int(value) for value in sample.get("attributes", [])]
    return json.dumps({"captions": captions, "attributes": attributes}) + "\n"


def _write_block(folder: Path, state: _State, samples: list[dict[str, Any]]) -> None:
    "Append a block of samples to the files, and say so in the state afterwards."
    pixels = to_uint8(torch.stack([sample["image"] for sample in samples])).numpy()
    texts = "".join(_text_line(sample) for sample in samples).encode()
    header = b""
    if not state["done"]:
        # The state comes first, so that whatever is in the folder is known to belong to this cache.
        header = _npy_header([state["dataset"]["samples"], *pixels.shape[1:]])
        _write_state(folder, state)
    for name, start, content in ((IMAGES_FILE, header, pixels.tobytes()), (TEXTS_FILE, b"", texts)):
        written = start + content
        _write_at(folder / name, written, state["bytes"][name])
        state["bytes"][name] += len(written)
        state["sums"][name].append(zlib.crc32(content))
    state["keys"] = list(samples[0])
    state["done"] += len(samples)
    _write_state(folder, state)


def _fill(dataset: SampleDataset, folder: Path, state: _State, word: str) -> None:
    "Write the samples that are still lacking, block by block."
    n = state["dataset"]["samples"]
    block = state["block"]
    # The toy data sets draw several samples together faster than one by one.
    get_samples = getattr(dataset, "__getitems__", lambda indices: [dataset[i] for i in indices])
    for start in progress(range(state["done"], n, block), word):
        _write_block(folder, state, get_samples(range(start, min(start + block, n))))


# ---- Reading


class ImageCache(Dataset[dict[str, Any]]):
    """Samples that `cached` has written to a folder. Their images stay on the disk until they are asked for.

    When a block of images is read for the first time, its checksum is compared. DataError where the cache is not
    complete, or where a file is damaged.
    """

    def __init__(
        self,
        folder: str | Path,  # that `cached` has filled
    ):
        self.folder = Path(folder)
        self._state: _State = _read_state(self.folder) or {"done": 0, "dataset": {"samples": 1}}
        if self._state["done"] < self._state["dataset"]["samples"]:
            raise DataError(f"{folder} holds no complete cache: `cached(dataset, folder, ...)` makes or finishes it")
        self.attribute_names: list[str] | None = self._state["attribute_names"]
        self._checked_blocks: set[int] = set()
        self._pixels: np.ndarray | None = self._map()
        texts = self._read_texts()
        self.captions = [text["captions"] for text in texts] if texts[0]["captions"] else None
        attributes = [text["attributes"] for text in texts]
        self.attributes = torch.tensor(attributes, dtype=torch.float32) if attributes[0] else None  # (n, a)

    def __len__(self) -> int:
        return self._state["dataset"]["samples"]

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the file by itself.
        return {**self.__dict__, "_pixels": None}

    def identity(self) -> dict[str, Any]:
        "Of which data set the cache is, and how many of its samples."
        return self._state["dataset"]

    def _damaged(self, name: str, reason: object) -> DataError:
        "The error for a damaged file."
        return DataError(f"{self.folder / name} is damaged ({reason}): delete the folder and it will be made again")

    def _map(self) -> np.ndarray:
        "All images as an array of bytes that is read from the disk where it is touched."
        try:
            pixels = np.load(self.folder / IMAGES_FILE, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise self._damaged(IMAGES_FILE, error) from error
        if pixels.dtype != np.uint8 or len(pixels) != len(self):
            raise self._damaged(IMAGES_FILE, f"{len(pixels)} times {pixels.dtype}")
        return pixels

    def _check_block(self, name: str, block: int, content: bytes) -> None:
        "DataError where a block of a file has another checksum than when it was written."
        if zlib.crc32(content) != self._state["sums"][name][block]:
            raise self._damaged(name, f"block {block} has another checksum")

    def _read_texts(self) -> list[dict[str, Any]]:
        "Captions and attributes of all samples."
        lines = (self.folder / TEXTS_FILE).read_bytes().splitlines(keepends=True)
        step = self._state["block"]
        for block, start in enumerate(range(0, len(self), step)):
            self._check_block(TEXTS_FILE, block, b"".join(lines[start : start + step]))
        return [json.loads(line) for line in lines[: len(self)]]

    def images(self, indices: Sequence[int] | np.ndarray | Int[Tensor, "b"]) -> Float[Tensor, "b 3 h w"]:
        "The images at these indices, in [-1, 1]; IndexError for an index that does not exist."
        indices = np.asarray(indices, dtype=np.int64)
        step = self._state["block"]
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices {indices.min()} to {indices.max()}: there are samples 0 to {len(self) - 1}")
        if self._pixels is None:
            self._pixels = self._map()
        for block in set((indices // step).tolist()) - self._checked_blocks:
            self._check_block(IMAGES_FILE, block, self._pixels[block * step : (block + 1) * step].tobytes())
            self._checked_blocks.add(block)
        return from_uint8(torch.from_numpy(self._pixels[indices]))

    def _sample(self, index: int, image: Tensor) -> dict[str, Any]:
        "One sample, with the keys that it had."
        parts: dict[str, Any] = {"image": image}
        if self.captions:
            parts |= {"caption": self.captions[index][0], "captions": list(self.captions[index])}
        if self.attributes is not None:
            parts["attributes"] = self.attributes[index]
        return {key: parts[key] for key in self._state["keys"]}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self._sample(int(i), image) for i, image in zip(indices, self.images(indices))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]


def cached(
    dataset: SampleDataset,
    folder: str | Path,  # for the files; made where it is missing
    n: int | None = None,  # how many samples, from the first on; None: all
    word: str = "drawing",  # beside the progress bar
    block: int = 256,  # samples that are written together
) -> ImageCache:
    """The first samples of a data set from a folder, to which those that are not there yet are written.

    After an interruption, the next call writes what is still lacking. Several processes may call this at the same
    time: one of them writes, the others wait. A cache keeps `image`, `caption`, `captions` and `attributes`.
    DataError where the folder has a cache of other samples or a damaged one, or cannot be written.
    """
    n = len(dataset) if n is None else n
    folder = Path(folder)
    if not 1 <= n <= len(dataset):
        raise DataError(f"n should be 1 to {len(dataset)}, the number of samples, not {n}")
    if _open_state(dataset, folder, n, block)["done"] < n:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "writing.lock"):
                # Read once more: another process may have written while this one waited for the lock.
                state = _open_state(dataset, folder, n, block)
                _fill(dataset, folder, state, word)
        except OSError as error:
            raise DataError(
                f"{folder} cannot be written ({error}): make room or choose another folder; "
                "a further call goes on from where this one stopped"
            ) from error
    return ImageCache(folder)
