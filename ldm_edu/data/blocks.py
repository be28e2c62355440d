"""Samples with any keys as the tensors of one safetensors file, and back: a block of a cache."""

# In a block, "stack:KEY" has the tensors of a key where all have one shape. Otherwise "flat:KEY" has their values in a
# row and "shapes:KEY" the shape of each. What is no tensor is JSON text: "json:KEY" has the bytes of all texts in a
# row. The file's header has a checksum of each of these, so one key can be read and checked without the others.

import json
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_edu.files import load_notes, load_tensors, parse_json, save_tensors, tensor_checksum
from ldm_edu.data.batches import RAGGED_KEYS
from ldm_edu.display import to_uint8
from ldm_edu.errors import DataError

__all__: list[str] = []

BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)  # what a broken file may raise


_TOLERANCE = 1 / 255  # how far an image may lie outside of [-1, 1]: no more than bytes change it by anyway


def _as_tensor(key: str, value: Any) -> Tensor:
    "A value as a block keeps it: images and JSON text as bytes. DataError for what cannot come back as it was."
    try:
        if not isinstance(value, Tensor):
            text = json.dumps(value)
            if repr(parse_json(text, nan=True)) != repr(value):
                raise TypeError("JSON would give back something else")
            return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise TypeError(f"{value.dtype}, {value.layout}")
        if key == "image" and value.is_floating_point() and value.numel() and value.abs().max() > 1 + _TOLERANCE:
            raise ValueError(f"with values up to {value.abs().max():g}")
        return to_uint8(value.cpu()) if key == "image" else value.detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"a cache cannot keep {key!r}, a {type(value).__name__} ({error}): it keeps images in [-1, 1], other "
            "tensors of real numbers, and numbers, strings and lists of them"
        ) from error


def _pack_column(key: str, values: list[Any]) -> dict[str, Tensor]:
    "The tensors of a block that keep the values of one key."
    kept = [_as_tensor(key, value) for value in values]
    kinds = {f"{type(value).__name__} of {part.dtype} in {part.ndim} dimensions" for value, part in zip(values, kept)}
    are_tensors = {isinstance(value, Tensor) for value in values}
    if True in are_tensors and len(kinds) > 1:
        raise DataError(f"all samples need the same kind of {key!r}, not {' and '.join(sorted(kinds))}")
    if True in are_tensors and key not in RAGGED_KEYS and len({part.shape for part in kept}) == 1:
        return {f"stack:{key}": torch.stack(kept)}
    row = torch.cat([part.reshape(-1) for part in kept])
    shapes = torch.tensor([list(part.shape) for part in kept])
    return {f"flat:{key}" if True in are_tensors else f"json:{key}": row, f"shapes:{key}": shapes}


def pack(
    samples: Sequence[dict[str, Any]],
    keys: Sequence[str],  # that every sample should have
) -> dict[str, Tensor]:
    "The tensors of a block that keep these samples. DataError where a value cannot be kept, or keys differ."
    if odd := [list(sample) for sample in samples if sample.keys() != set(keys)]:
        raise DataError(f"all samples need the same keys, but some have {list(keys)} and some {odd[0]}")
    if strange := [key for key in keys if not isinstance(key, str) or re.search("[\ud800-\udfff]", key)]:
        raise DataError(f"the keys of samples should be texts without halves of letters, not {strange[0]!r}")
    columns = [_pack_column(key, [sample[key] for sample in samples]) for key in keys]
    return {name: tensor for column in columns for name, tensor in column.items()}


def write_block(
    tensors: dict[str, Tensor],  # from `pack`
    path: Path,
) -> int:  # a checksum of everything
    "Write the tensors of a block to a file, whole or not at all."
    sums = json.dumps({name: tensor_checksum(tensor) for name, tensor in tensors.items()})
    save_tensors(tensors, path, notes={"sums": sums}, checksum=False)
    return zlib.crc32(sums.encode())


class Block:
    """A file that `write_block` has written, mapped into memory: only what is touched is read, and no file stays open.

    Any error of `BROKEN` may be raised where the file is damaged.
    """

    def __init__(
        self,
        path: Path,
        checksum: int,  # that `write_block` returned
        length: int,  # how many samples it should have
    ):
        sums = load_notes(path)["sums"]
        if zlib.crc32(sums.encode()) != checksum:
            raise ValueError("the header has another checksum")
        self._sums: dict[str, int] = parse_json(sums)
        self._tensors = load_tensors(path, mapped=True)
        self._length = length
        self._columns: dict[str, Any] = {}

    def _column(self, key: str) -> Any:
        "What the samples have under a key: stacked, or a list of tensors or JSON texts; its checksum is compared."
        names = {name.partition(":")[0]: name for name in self._sums if name.partition(":")[2] == key}
        if wrong := [name for name in names.values() if tensor_checksum(self._tensors[name]) != self._sums[name]]:
            raise ValueError(f"{wrong[0]} has another checksum")
        parts = {form: self._tensors[name] for form, name in names.items()}
        if "stack" in parts:
            return parts["stack"]
        shapes = parts.pop("shapes").tolist()
        ((form, flat),) = parts.items()
        rows = flat.split([math.prod(shape) for shape in shapes])
        if form == "json":
            return [row.numpy().tobytes() for row in rows]
        return [row.reshape(shape) for row, shape in zip(rows, shapes)]

    def value(self, key: str, row: int) -> Any:
        "What a sample has under a key: an image as bytes, and a tensor that was stacked as a view of the file."
        if key not in self._columns:
            column = self._column(key)
            if len(column) != self._length:
                raise ValueError(f"{len(column)} samples, not {self._length}")
            self._columns[key] = column
        value = self._columns[key][row]
        if isinstance(value, bytes):
            return parse_json(value, nan=True)
        return value.clone() if isinstance(self._columns[key], list) else value
