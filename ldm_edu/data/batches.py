"""The one form of sample and batch of all data sets: `collate`, `batches`, and checks that the data sets share."""

# A sample is a dict. A data set has a length, gives a sample for every index, and has an `identity()` that says what
# decides its samples.

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm_edu.checks import MOST_SEED, check_count, shown
from ldm_edu.errors import DataError, LDMError

__all__ = ["collate", "batches"]

RAGGED_KEYS = ("boxes", "instances", "captions")  # samples differ in how many they have, so a batch keeps lists


@runtime_checkable
class Samples(Protocol):
    "Anything with a length that gives a sample for an index: a data set, or a list of dicts."

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@runtime_checkable
class SampleDataset(Samples, Protocol):
    "A data set that can say what decides its samples."

    def identity(self) -> dict[str, Any]: ...


def _check_split(split: str, known: Iterable[str]) -> None:
    "DataError where `split` is none of the known ones."
    known = tuple(known)
    if split not in known:
        raise DataError(f"split {shown(split)} does not exist; known: {', '.join(known)}")


def data_count(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    "`value` as an int; DataError where it is no whole number from `least` to `most`."
    try:
        return check_count(name, value, least, most)
    except LDMError as error:
        raise DataError(str(error)) from error


def _check_size(size: Any) -> int:
    "`size` as an int; DataError where it is no number of pixels."
    try:
        return check_count("size", size)
    except LDMError as error:
        raise DataError(f"size should be a number of pixels of at least 1, not {shown(size)}") from error


@contextmanager
def reading_sample(file: object) -> Iterator[None]:
    "DataError in place of an error that would end a loop over a data set without a word, as if it had no more samples."
    try:
        yield
    except (IndexError, StopIteration) as error:
        raise DataError(f"{file} cannot be read ({type(error).__name__}: {error})") from error


def _check_keys(keys: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    "`keys` as a tuple; DataError where they are no list of known keys, or an empty one."
    listed = () if isinstance(keys, str) else tuple(keys)  # a generator gives its keys only once
    unknown = [keys] if isinstance(keys, str) else [key for key in listed if key not in known]
    if unknown or not listed:
        told = ", ".join(map(str, unknown[:5])) or "empty"
        raise DataError(f"keys should be a list of some of {', '.join(known)}; not {told}")
    return listed


def _join(key: str, values: list[Any]) -> Any:
    "What all samples have under one key: one tensor where it can be stacked, else the list."
    if all(isinstance(value, (int, float)) for value in values):
        if too_large := [value for value in values if isinstance(value, int) and not -(2**63) <= value < 2**63]:
            bits = too_large[0].bit_length()
            raise DataError(
                f"{key!r} holds a whole number of {bits} bits, and a tensor has 63 for it: keep it as a text"
            )
        return torch.tensor(values)
    if key in RAGGED_KEYS or not all(isinstance(value, Tensor) for value in values):
        return values
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        raise DataError(f"{key!r} has several shapes in one batch, {sorted(shapes)}: all samples need the same")
    return torch.stack(values)


def collate(
    samples: Sequence[dict[str, Any]],  # with the same keys
) -> dict[str, Any]:
    """Samples as one batch with the same keys.

    Tensors and numbers are stacked along a new first dimension. Everything else becomes a list, and so do `boxes`,
    `instances` and `captions`, of which one image has more than another. DataError where samples have different
    keys, or tensors of one key different shapes.
    """
    if not samples:
        raise DataError("a batch of no samples cannot be made")
    keys = {tuple(sorted(sample)) for sample in samples}
    if len(keys) > 1:
        raise DataError(f"samples of one batch have different keys: {sorted(keys)}")
    return {key: _join(key, [sample[key] for sample in samples]) for key in samples[0]}


def _index_batches(
    length: int,  # of the data set
    batch_size: int,
    seed: int = 0,  # of the shuffling
    drop_last: bool = True,  # leave out the smaller batch at the end of a pass?
) -> Iterator[list[int]]:
    "Shuffled indices in batches without end: pass after pass over the data set, each in another order."
    generator = torch.Generator().manual_seed(seed)
    end = length - batch_size + 1 if drop_last else length
    while True:
        order = torch.randperm(length, generator=generator).tolist()
        yield from (order[i : i + batch_size] for i in range(0, end, batch_size))


def batches(
    dataset: Samples,
    batch_size: int,
    seed: int = 0,  # of the shuffling
    drop_last: bool = True,  # leave out the smaller batch at the end of a pass?
    workers: int = 0,  # processes that read samples in advance
) -> Iterator[dict[str, Any]]:
    "Shuffled batches without end. Their order depends on `seed` alone, not on `workers` or on torch's global seed."
    length = len(dataset)
    if not length:
        raise DataError("the data set is empty: there is nothing to make batches of")
    batch_size = data_count("batch_size", batch_size, 1, length if drop_last else None)
    seed, workers = data_count("seed", seed, 0, MOST_SEED), data_count("workers", workers, 0)
    # Without a generator of its own, the loader would draw from torch's global random stream.
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        cast(Dataset[dict[str, Any]], dataset),
        batch_sampler=_index_batches(length, batch_size, seed, drop_last),
        collate_fn=collate,
        num_workers=workers,
        generator=generator,
    )
    return iter(loader)
