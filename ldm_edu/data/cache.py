"""A data set kept on disk, with any keys: drawn or decoded once, and read from then on."""

# A cache is a folder with a file for each block of samples (see `blocks`). `cache.json` says of which data set the
# cache is, and has a checksum of every block that is written. It is replaced after every block. A block that it does
# not count yet, because a program was interrupted, is written again.

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from ldm_edu.basics import progress
from ldm_edu.files import brief, parse_json, place, read_json, remove_leftovers, save_json
from ldm_edu.data.batches import SampleDataset, _check_keys, collate, data_count
from ldm_edu.data.blocks import BROKEN, Block, pack, write_block
from ldm_edu.data.images import from_uint8
from ldm_edu.errors import CheckpointError, DataError

__all__ = ["cached", "SampleCache"]

FORMAT = 2  # goes up whenever the files change; format 1 had images.npy and texts.jsonl
STATE_FILE = "cache.json"
AGAIN = "delete the folder and it will be made again"

_State = dict[str, Any]  # the content of `cache.json`


def _block_file(block: int) -> str:
    "The name of a block's file."
    return f"block-{block:06}.safetensors"


def _are_texts(values: Any) -> bool:
    "Is this a list of texts, no two of them the same?"
    return isinstance(values, list) and all(isinstance(v, str) for v in values) and len(set(values)) == len(values)


def _check_state(state: Any, folder: Path) -> None:
    "An error of `BROKEN` where a state is of another form, or does not fit the files beside it."
    if state["dataset"].get("format") != FORMAT:
        raise ValueError("another version of ldm_edu wrote it, in another format")
    if lacking := {"block", "keys", "attribute_names", "sums"} - set(state):
        raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    n, block, sums, names = state["dataset"]["samples"], state["block"], state["sums"], state["attribute_names"]
    is_list = isinstance(sums, list) and all(type(value) is int for value in sums)
    if not is_list or not _are_texts(state["keys"]) or not (names is None or _are_texts(names)):
        raise ValueError("sums should be a list of numbers, and keys and attribute_names lists of texts that differ")
    is_right = type(n) is type(block) is int and 1 <= n < 2**63 and 1 <= block < 2**63
    if not is_right or (len(sums) - 1) * block >= n or (sums and not state["keys"]):
        raise ValueError(f"{len(sums)} blocks of {block} are no part of {n} samples")
    if gone := {_block_file(i) for i in range(len(sums))} - set(os.listdir(folder)):
        raise ValueError(f"{min(gone)} is missing")


def _read_state(folder: Path) -> _State | None:
    "The state of the cache in a folder; None where there is none yet; DataError where it does not fit the files."
    path = folder / STATE_FILE
    if not os.path.lexists(path):
        if (folder / _block_file(0)).exists():
            raise DataError(f"{folder} has only a part of a cache: delete it and it will be made again")
        return None
    try:
        state = read_json(path, DataError)
        _check_state(state, folder)
        return state
    except BROKEN as error:
        raise DataError(f"{path} is damaged or does not fit the files beside it ({brief(error)}): {AGAIN}") from error


def _identity(dataset: SampleDataset) -> dict[str, Any]:
    "The identity of a data set as it is written; DataError where JSON cannot hold it."
    try:
        return parse_json(json.dumps(dataset.identity()))
    except (TypeError, ValueError) as error:
        raise DataError(f"a cache cannot keep the identity() of {type(dataset).__name__} as JSON: {error}") from error


def _open_state(dataset: SampleDataset, folder: Path, n: int, block: int) -> _State:
    "The state of the cache of these samples: the one in the folder, or a new one. DataError where it is of others."
    asked = {"format": FORMAT, "samples": n, **_identity(dataset)}
    names = getattr(dataset, "attribute_names", None)
    new = {"dataset": asked, "block": block, "keys": [], "attribute_names": names, "sums": []}
    state = _read_state(folder) or new
    if (there := state["dataset"]) != asked:
        differing = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
        told = "; ".join(f"{key} {there.get(key)}, not {asked.get(key)}" for key in differing)
        raise DataError(
            f"{folder} is a cache of something else ({told}): "
            "choose another folder, or delete this one and it will be made again"
        )
    return state


def _is_complete(state: _State) -> bool:
    "Are all blocks written?"
    return len(state["sums"]) * state["block"] >= state["dataset"]["samples"]


def _fill(dataset: SampleDataset, folder: Path, state: _State, word: str) -> None:
    "Write the samples that are still lacking, block by block, and say so in the state after each."
    remove_leftovers(folder)
    n, block = state["dataset"]["samples"], state["block"]
    # The toy data sets draw several samples together faster than one by one.
    get_samples = getattr(dataset, "__getitems__", lambda indices: [dataset[i] for i in indices])
    for start in progress(range(len(state["sums"]) * block, n, block), word):
        samples = get_samples(range(start, min(start + block, n)))
        state["keys"] = state["keys"] or list(samples[0])
        tensors = pack(samples, state["keys"])
        if not start:
            # The state comes first, so that whatever is in the folder is known to belong to this cache.
            save_json(state, folder / STATE_FILE)
        state["sums"].append(write_block(tensors, folder / _block_file(start // block)))
        save_json(state, folder / STATE_FILE)


def _with_floats(parts: dict[str, Any]) -> dict[str, Any]:
    "A sample or a batch whose images, which a block keeps as bytes, are in [-1, 1]."
    return {**parts, "image": from_uint8(parts["image"])} if isinstance(parts.get("image"), Tensor) else parts


class SampleCache(Dataset[dict[str, Any]]):
    """Samples that `cached` has written to a folder. They stay on the disk until they are asked for.

    When a key of a block is read for the first time, its checksum is compared. DataError where the cache is not
    complete, or where a file is damaged.
    """

    def __init__(
        self,
        folder: str | Path,  # that `cached` has filled
    ):
        self.folder = place(folder)
        state = _read_state(self.folder)
        if state is None or not _is_complete(state):
            raise DataError(f"{folder} holds no complete cache: `cached(dataset, folder, ...)` makes or finishes it")
        self._state: _State = state
        self._blocks: dict[int, Block] = {}  # those that were read from
        self.keys: tuple[str, ...] = tuple(state["keys"])
        self.attribute_names: list[str] | None = state["attribute_names"]

    def __len__(self) -> int:
        return self._state["dataset"]["samples"]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder,)  # another process opens the files by itself

    def identity(self) -> dict[str, Any]:
        "Of which data set the cache is, how many of its samples, and the format of the files."
        return self._state["dataset"]

    @property
    def checksum(self) -> str:
        "16 hexadecimal digits that follow from all contents and the number of samples in a block."
        return hashlib.sha256(json.dumps(self._state["sums"]).encode()).hexdigest()[:16]

    def _value(self, key: str, block: int, row: int) -> Any:
        "What the sample in a row of a block has under a key, as `Block.value` gives it."
        try:
            if block not in self._blocks:
                length = min(self._state["block"], len(self) - block * self._state["block"])
                self._blocks[block] = Block(self.folder / _block_file(block), self._state["sums"][block], length)
            return self._blocks[block].value(key, row)
        except BROKEN as error:
            raise DataError(f"{self.folder / _block_file(block)} is damaged ({brief(error)}): {AGAIN}") from error

    def _samples(self, indices: Sequence[int] | np.ndarray | Int[Tensor, "b"], keys: Sequence[str]) -> list[dict]:
        "Samples with some of their keys, with images as bytes."
        numbers = np.asarray(indices)
        if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
            raise IndexError(f"indices should be whole numbers, not {numbers.dtype}")
        rows: list[int] = numbers.astype(np.int64).tolist()
        if rows and not 0 <= min(rows) <= max(rows) < len(self):
            raise IndexError(f"indices {min(rows)} to {max(rows)}: there are samples 0 to {len(self) - 1}")
        places = (divmod(i, self._state["block"]) for i in rows)
        return [{key: self._value(key, *place) for key in keys} for place in places]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        samples = self._samples(indices, self.keys)
        # Copies: whoever changes a sample does not change the cache.
        own = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in sample.items()} for sample in samples]
        return [_with_floats(sample) for sample in own]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def batch(
        self,
        indices: Sequence[int] | np.ndarray | Int[Tensor, "b"],
        keys: Sequence[str] | None = None,  # only these are read; None: all
    ) -> dict[str, Any]:
        "Samples as `collate` joins them; IndexError for an index that does not exist. No indices make an empty batch."
        keys = self.keys if keys is None else _check_keys(keys, self.keys)
        if not len(indices):
            return {key: values[:0] for key, values in self.batch([0], keys).items()}
        return _with_floats(collate(self._samples(indices, keys)))

    def images(self, indices: Sequence[int] | np.ndarray | Int[Tensor, "b"]) -> Float[Tensor, "b 3 h w"]:
        "The images at these indices, in [-1, 1]."
        return self.batch(indices, ("image",))["image"]

    def column(self, key: str) -> Any:
        "What all samples have under a key, as `collate` joins it. No other key is read."
        return self.batch(range(len(self)), (key,))[key]

    @cached_property
    def captions(self) -> list[list[str]] | None:
        "All captions of each sample; None where there are none."
        if "captions" in self.keys:
            return self.column("captions")
        return [[caption] for caption in self.column("caption")] if "caption" in self.keys else None

    @cached_property
    def attributes(self) -> Float[Tensor, "n a"] | None:
        "The attributes of each sample; None where there are none."
        return self.column("attributes") if "attributes" in self.keys else None


def cached(
    dataset: SampleDataset,
    folder: str | Path,  # for the files; made where it is missing
    n: int | None = None,  # how many samples, from the first on; None: all
    word: str = "drawing",  # beside the progress bar
    block: int = 256,  # samples that are written together
) -> SampleCache:
    """The first samples of a data set from a folder, to which those that are not there yet are written.

    A cache keeps any keys: tensors, numbers, strings and lists. Only images change: they are kept as bytes.
    After an interruption, the next call writes what is still lacking. Several processes may call this at the same
    time: one of them writes, the others wait. DataError where a value cannot be kept, or where the folder has a cache
    of other samples or a damaged one, or cannot be written.
    """
    length = len(dataset)
    if not length:
        raise DataError("the data set is empty: there is nothing to keep")
    n = length if n is None else data_count("n", n, 1, length)
    block = data_count("block", block)
    folder = place(folder)
    if not _is_complete(_open_state(dataset, folder, n, block)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "writing.lock"):
                # Read once more: another process may have written while this one waited for the lock.
                _fill(dataset, folder, _open_state(dataset, folder, n, block), word)
        except (OSError, CheckpointError) as error:
            raise DataError(
                f"{folder} cannot be written ({error}): make room or choose another folder; "
                "a further call goes on from where this one stopped"
            ) from error
    return SampleCache(folder)
