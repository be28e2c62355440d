"""One form of sample: its checks, and batches of any keys."""

import torch
from collections.abc import Iterable, Iterator, Sequence
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing import Any
from ldm_edu.errors import DataError

def _check_split(split: str, known: Iterable[str]) -> None:
    if split not in (known := tuple(known)):
        raise DataError(f"split {split!r} does not exist; known: {', '.join(known)}")


def _check_size(size: int) -> None:
    if size < 1:
        raise DataError(f"size should be a number of pixels of at least 1, not {size}")


def _check_keys(keys: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    unknown = [keys] if isinstance(keys, str) else [key for key in keys if key not in known]
    if unknown or not keys:
        raise DataError(f"keys should be a list of some of {', '.join(known)}; not {', '.join(unknown) or 'empty'}")
    return tuple(keys)


RAGGED = ("boxes", "instances", "captions")  # as many as there are things in the image, or things to say


def _join(key: str, values: list) -> Any:
    "The values of one key of all samples, as one."
    if isinstance(values[0], (int, float)):
        return torch.tensor(values)
    if key in RAGGED or not isinstance(values[0], Tensor):
        return values
    if len(shapes := {tuple(value.shape) for value in values}) > 1:
        raise DataError(f"{key!r} has several shapes in one batch, {sorted(shapes)}: all samples need the same")
    return torch.stack(values)


def collate(
    samples: Sequence[dict],
) -> dict:  # the same keys: tensors and numbers stacked along a new first dimension, all else in lists
    "Samples as one batch."
    if not samples:
        raise DataError("a batch of no samples cannot be made")
    if len(keys := {tuple(sorted(sample)) for sample in samples}) > 1:
        raise DataError(f"samples of one batch have different keys: {sorted(keys)}")
    return {key: _join(key, [sample[key] for sample in samples]) for key in samples[0]}


def index_batches(
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
        yield from (order[i:i + batch_size] for i in range(0, end, batch_size))


def batches(
    dataset: Dataset | Sequence[dict],
    batch_size: int,
    seed: int = 0,  # of the shuffling
    drop_last: bool = True,  # leave out the smaller batch at the end of a pass?
    workers: int = 0,  # processes that read ahead
) -> Iterator[dict]:
    "Shuffled batches without end, decided by `seed` alone."
    length = len(dataset)
    if not length:
        raise DataError("the data set is empty: there is nothing to make batches of")
    if batch_size < 1 or drop_last and batch_size > length:
        raise DataError(f"batch_size should be 1 to {length}, the number of samples, not {batch_size}")
    order = index_batches(length, batch_size, seed, drop_last)
    generator = torch.Generator().manual_seed(seed)  # else the loader would draw from the global stream
    return iter(DataLoader(dataset, batch_sampler=order, collate_fn=collate, num_workers=workers, generator=generator))
