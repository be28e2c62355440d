"""CelebA (Liu et al., 2015), in the layout of its official files."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool
from torch.utils.data import Dataset

from ldm_edu.data.batches import _check_keys, _check_size, _check_split, reading_sample
from ldm_edu.data.folders import DATA_HELP, SPLIT_SHARES, find_folder, listing_checksum, names_in_folder, split_by_name
from ldm_edu.data.images import READING_VERSION, load_image
from ldm_edu.errors import DataError
from ldm_edu.files import read_text

__all__ = ["CelebA"]


def _lines(path: Path) -> list[str]:
    "The lines of a text file in which something stands; DataError where it is missing or no text."
    return [line for line in read_text(path, DataError, f"; {DATA_HELP}").splitlines() if line.strip()]


def _check_unique(path: Path, names: Sequence[str], first_line: int) -> None:
    "DataError where a file name stands in a list twice."
    seen: set[str] = set()
    for number, name in enumerate(names, start=first_line):
        if name in seen:
            raise DataError(f"{path}, line {number}: {name} stands here a second time")
        seen.add(name)


def _read_attributes(
    path: Path,  # a file in the form of CelebA's list_attr_celeba.txt
) -> tuple[list[str], list[str], Bool[np.ndarray, "n a"]]:  # attribute names, file names, which attributes are true
    """CelebA's list of attributes: a line with the count, one with the names, then one for each file.

    DataError names the line that is wrong. A list that was cut off is found by the count in its first line.
    """
    lines = _lines(path)
    if len(lines) < 2 or not re.fullmatch("[0-9]{1,9}", lines[0].strip()):
        raise DataError(f"{path} should begin with a line with the number of files and one with the attributes' names")
    count = int(lines[0])
    if count != len(lines) - 2:
        raise DataError(f"{path} announces {count} files but lists {len(lines) - 2}: it is cut off or was changed")
    names = lines[1].split()
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise DataError(f"{path}, line 2: the attribute {twice[0]} stands here a second time")
    files: list[str] = []
    values = bytearray()
    for number, line in enumerate(lines[2:], start=3):
        file, *words = line.split()
        if len(words) != len(names) or not {"1", "-1"}.issuperset(words):
            raise DataError(f"{path}, line {number}: a file name and {len(names)} times 1 or -1 should stand here")
        files.append(file)
        values += bytes(word == "1" for word in words)
    _check_unique(path, files, 3)
    return names, files, np.frombuffer(bytes(values), dtype=bool).reshape(count, len(names))


def _read_partition(
    path: Path,  # a file in the form of CelebA's list_eval_partition.txt
) -> dict[str, str]:
    "CelebA's official split of every file; DataError names the line that is wrong."
    rows = [line.split() for line in _lines(path)]
    splits = dict(zip("012", SPLIT_SHARES))
    for number, row in enumerate(rows, start=1):
        if len(row) != 2 or row[1] not in splits:
            raise DataError(f"{path}, line {number}: a file name and 0, 1 or 2 should stand here")
    _check_unique(path, [name for name, _ in rows], 1)
    return {name: splits[part] for name, part in rows}


def _present(folder: Path, listed: Iterable[str]) -> tuple[list[str], int]:
    "The listed files that are in the folder, and how many are not. DataError where none of them is."
    there = names_in_folder(folder)
    listed = list(listed)
    names = [name for name in listed if name in there]
    if not names:
        deeper = f"; should {folder / folder.name} be one folder higher?" if folder.name in there else ""
        raise DataError(f"{folder} contains none of the {len(listed)} images that are listed{deeper}; {DATA_HELP}")
    return names, len(listed) - len(names)


class CelebA(Dataset[dict[str, Any]]):
    """Photographs of faces with their attributes, from the official folder or any subset of its images.

    A sample has those of the `known_keys` that were asked for: `image` (3, size, size) in [-1, 1], and `attributes`
    (a,) of zeros and ones, in the order of `attribute_names`. Images that the list names and that are not there are
    left out and counted in `missing`. DataError names a file that is missing or damaged.
    """

    known_keys: ClassVar[tuple[str, ...]] = ("image", "attributes")

    def __init__(
        self,
        root: str | Path,  # the folder with img_align_celeba/ in it, or the one above, where it is called celeba
        split: str = "train",  # "train", "validation", "test": by the partition file, by name where there is none
        size: int = 64,  # pixels along each side, of the square of 178 around the face
        keys: Sequence[str] = ("image", "attributes"),  # some of `known_keys`
    ):
        _check_split(split, SPLIT_SHARES)
        self.root = find_folder(root, "img_align_celeba", "celeba")
        self.split = split
        self.size = _check_size(size)
        self.keys = _check_keys(keys, self.known_keys)
        self._list = self.root / "list_attr_celeba.txt"
        self.attribute_names, listed, attributes = _read_attributes(self._list)
        present, self.missing = _present(self.root / "img_align_celeba", listed)
        names = [name for name, part in zip(present, self._splits_of(present)) if part == split]
        if not names:
            raise DataError(
                f"{self.root}: none of the {len(present)} images that are there falls into split {split!r}; "
                "a larger subset has images of every split"
            )
        row = {name: i for i, name in enumerate(listed)}
        self.files = [self.root / "img_align_celeba" / name for name in names]
        self.attributes = torch.from_numpy(attributes[[row[name] for name in names]]).float()  # (n, a)

    def _splits_of(self, names: list[str]) -> list[str]:
        "The split of each of these images."
        partition = self.root / "list_eval_partition.txt"
        if not os.path.lexists(partition):  # a link that leads nowhere is no missing file: another split would be taken
            return [split_by_name(name) for name in names]
        splits = _read_partition(partition)
        unassigned = [name for name in names if name not in splits]
        if unassigned:
            raise DataError(f"{partition} has no line for {len(unassigned)} of the images, first {unassigned[0]}")
        return [splits[name] for name in names]

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> dict[str, Any]:
        "What decides the samples: the split, the size, the keys, and names, sizes and modification times of the files."
        return {
            "data": "CelebA",
            "version": READING_VERSION,
            "split": self.split,
            "size": self.size,
            "keys": list(self.keys),
            "files": listing_checksum(self.root, [self._list, *self.files]),
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, parts = self.files[index], {"attributes": self.attributes[index]}
        with reading_sample(file):
            if "image" in self.keys:
                parts["image"] = load_image(file, self.size)
            return {key: parts[key] for key in self.keys}
