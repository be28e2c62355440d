"""A data set kept on disk, as bytes that are read when they are asked for."""

import io
import json
import numpy as np
import os
import torch
import zlib
from collections.abc import Sequence
from filelock import FileLock
from jaxtyping import Float, Int
from pathlib import Path
from torch import Tensor
from torch.utils.data import Dataset
from ldm_edu.basics import progress
from ldm_edu.checkpoints import atomic
from ldm_edu.data.images import from_uint8
from ldm_edu.display import to_uint8
from ldm_edu.errors import DataError

IMAGES, TEXTS, ABOUT = "images.npy", "texts.jsonl", "cache.json"  # the files of a cache


def _npy_head(shape: Sequence[int]) -> bytes:
    "How a .npy file of bytes in this shape begins."
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    return head.getvalue()


def _text_line(sample: dict) -> str:
    "Everything of a sample but its image, as a line of JSON."
    if others := set(sample) - {"image", "caption", "captions", "attributes"}:
        raise DataError(f"a cache keeps images, captions and attributes, not {', '.join(sorted(others))}: see `keys`")
    captions = sample.get("captions") or [sample["caption"]] if "caption" in sample or "captions" in sample else None
    return json.dumps({"captions": captions, "attributes": [int(a) for a in sample.get("attributes", [])]}) + "\n"


def _write_at(path: Path, content: bytes, at: int) -> None:
    "Cut a file off at byte `at` and go on with `content`; it is on the disk when this returns."
    with open(path, "r+b" if at else "wb") as file:
        file.seek(at)
        file.truncate()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read_about(folder: Path) -> dict | None:
    "What a cache says about itself; `None` where there is none yet."
    headless = (folder / IMAGES).exists() and not (folder / ABOUT).exists()
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if lacking := {"dataset", "block", "done", "bytes", "sums", "attribute_names"} - set(about):
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        for name, size in about["bytes"].items():
            if size and size > (folder / name).stat().st_size:
                raise ValueError(f"{name} should have {size} bytes")
    except (FileNotFoundError, NotADirectoryError) as error:
        if headless or error.filename != str(folder / ABOUT):
            raise DataError(f"{folder} has only a part of a cache: delete it and it will be made again") from None
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / ABOUT} is damaged or does not fit the files beside it ({error}): "
                        "delete the folder and it will be made again") from error
    return about


def _open_about(dataset: Dataset, folder: Path, n: int, block: int) -> dict:
    "The state of the cache for these samples: as it stands in the folder, or new."
    asked = {"samples": n, **json.loads(json.dumps(dataset.identity()))}
    about = _read_about(folder)
    if about is None:
        return {"dataset": asked, "block": block, "done": 0, "bytes": {IMAGES: 0, TEXTS: 0},
                "sums": {IMAGES: [], TEXTS: []}, "attribute_names": getattr(dataset, "attribute_names", None)}
    there = about["dataset"]
    if there != asked:
        unlike = [f"{k} {there.get(k)}, not {asked.get(k)}" for k in {**there, **asked} if there.get(k) != asked.get(k)]
        raise DataError(f"{folder} is a cache of something else ({'; '.join(unlike)}): "
                        "choose another folder, or delete this one and it will be made again")
    return about


def _write_about(folder: Path, about: dict) -> None:
    with atomic(folder / ABOUT) as path:
        _write_at(path, json.dumps(about).encode(), 0)


def _write_block(folder: Path, about: dict, samples: list[dict]) -> None:
    "Append a block of samples to the files, and then move the mark."
    pixels = to_uint8(torch.stack([sample["image"] for sample in samples])).numpy()
    contents = {IMAGES: pixels.tobytes(), TEXTS: "".join(map(_text_line, samples)).encode()}
    head = b"" if about["done"] else _npy_head([about["dataset"]["samples"], *pixels.shape[1:]])
    if not about["done"]:
        _write_about(folder, about)  # first of all: whose files these are
    for name, content in contents.items():
        written = head + content if name == IMAGES else content
        _write_at(folder / name, written, about["bytes"][name])
        about["bytes"][name] += len(written)
        about["sums"][name].append(zlib.crc32(content))
    about["keys"], about["done"] = list(samples[0]), about["done"] + len(samples)
    _write_about(folder, about)


def _fill(dataset: Dataset, folder: Path, about: dict, word: str) -> None:
    "Write what is still missing, block by block."
    n, block = about["dataset"]["samples"], about["block"]
    several = getattr(dataset, "__getitems__", lambda indices: [dataset[i] for i in indices])  # drawn faster together
    for start in progress(range(about["done"], n, block), word):
        _write_block(folder, about, several(range(start, min(start + block, n))))


class ImageCache(Dataset):
    "Samples that `cached` has written to a folder; their images are read when they are asked for."

    def __init__(
        self,
        folder: str | Path,  # that `cached` has filled
    ):
        self.folder = Path(folder)
        self._about = _read_about(self.folder) or {"done": 0, "dataset": {"samples": 1}}
        if self._about["done"] < self._about["dataset"]["samples"]:
            raise DataError(f"{folder} holds no complete cache: `cached(dataset, folder, ...)` makes or finishes it")
        self.attribute_names = self._about["attribute_names"]
        self._sound, self._pixels = set(), self._map()  # blocks whose checksum was compared; all images
        texts = self._read_texts()
        self.captions = [text["captions"] for text in texts] if texts[0]["captions"] else None
        attributes = [text["attributes"] for text in texts]
        self.attributes = torch.tensor(attributes, dtype=torch.float32) if attributes[0] else None  # (n, a)

    def __len__(self) -> int:
        return self._about["dataset"]["samples"]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": None}  # another process maps the file by itself

    def identity(self) -> dict:
        "What the cache is of."
        return self._about["dataset"]

    def _broken(self, name: str, why: object) -> DataError:
        return DataError(f"{self.folder / name} is damaged ({why}): delete the folder and it will be made again")

    def _map(self) -> np.ndarray:
        try:
            pixels = np.load(self.folder / IMAGES, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise self._broken(IMAGES, error) from error
        if pixels.dtype != np.uint8 or len(pixels) != len(self):
            raise self._broken(IMAGES, f"{len(pixels)} times {pixels.dtype}")
        return pixels

    def _compare(self, name: str, block: int, content: bytes) -> None:
        if zlib.crc32(content) != self._about["sums"][name][block]:
            raise self._broken(name, f"block {block} has another checksum")

    def _read_texts(self) -> list[dict]:
        lines, step = (self.folder / TEXTS).read_bytes().splitlines(keepends=True), self._about["block"]
        for block, start in enumerate(range(0, len(self), step)):
            self._compare(TEXTS, block, b"".join(lines[start:start + step]))
        return [json.loads(line) for line in lines[:len(self)]]

    def images(self, indices: Sequence[int] | np.ndarray | Int[Tensor, "b"]) -> Float[Tensor, "b 3 h w"]:
        "The images at these indices, in [-1, 1]."
        indices, step = np.asarray(indices, dtype=np.int64), self._about["block"]
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices {indices.min()} to {indices.max()}: there are samples 0 to {len(self) - 1}")
        if self._pixels is None:
            self._pixels = self._map()
        for block in set((indices // step).tolist()) - self._sound:
            self._compare(IMAGES, block, self._pixels[block * step:(block + 1) * step].tobytes())
            self._sound.add(block)
        return from_uint8(torch.from_numpy(self._pixels[indices]))

    def _sample(self, index: int, image: Tensor) -> dict:
        parts = {"image": image}
        if self.captions:
            parts |= {"caption": self.captions[index][0], "captions": list(self.captions[index])}
        if self.attributes is not None:
            parts["attributes"] = self.attributes[index]
        return {key: parts[key] for key in self._about["keys"]}

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        return [self._sample(int(i), image) for i, image in zip(indices, self.images(indices))]

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]


def cached(
    dataset: Dataset,
    folder: str | Path,  # for the files; made where it is missing
    n: int | None = None,  # how many samples, from the first on; None: all
    word: str = "drawing",  # beside the progress bar
    block: int = 256,  # samples that are written together
) -> ImageCache:
    "The first samples of a data set, from a folder; what is not there yet is written, also after an interruption."
    n, folder = len(dataset) if n is None else n, Path(folder)
    if not 1 <= n <= len(dataset):
        raise DataError(f"n should be 1 to {len(dataset)}, the number of samples, not {n}")
    if _open_about(dataset, folder, n, block)["done"] < n:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "writing.lock"):
                about = _open_about(dataset, folder, n, block)  # as whoever had the lock before left it
                _fill(dataset, folder, about, word)
        except OSError as error:
            raise DataError(f"{folder} cannot be written ({error}): make room or choose another folder; "
                            "a further call goes on from where this one stopped") from error
    return ImageCache(folder)
