"""CelebA, in the layout of its official files."""

import numpy as np
import torch
from collections.abc import Iterable, Sequence
from jaxtyping import Bool
from pathlib import Path
from torch.utils.data import Dataset
from ldm_edu.data.batches import _check_size, _check_split
from ldm_edu.data.folders import HOW, SHARES, _listing, find_folder, listing_checksum, split_by_name
from ldm_edu.data.images import load_image
from ldm_edu.data.toy.datasets import DRAWING_VERSION
from ldm_edu.errors import DataError

def _read_text(path: Path) -> str:
    "A text file; DataError where it is missing or no text."
    try:
        return path.read_text(encoding="utf-8-sig")  # "sig": some editors put an invisible mark in front
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; {HOW}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); a text file should stand here") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}); copy it again") from error


def _check_unique(path: Path, names: Sequence[str], first_line: int) -> None:
    if len(set(names)) < len(names):
        been = set()
        again = next(i for i, name in enumerate(names) if name in been or been.add(name))
        raise DataError(f"{path}, line {first_line + again}: {names[again]} stands here a second time")


def read_attributes(
    path: str | Path,  # a file in the form of CelebA's list_attr_celeba.txt
) -> tuple[list[str], list[str], Bool[np.ndarray, "n a"]]:  # names of attributes, names of files, what is true of which
    "CelebA's attributes: a line with the count, one with the names, then one for each file."
    lines = [line for line in _read_text(Path(path)).splitlines() if line.strip()]
    if len(lines) < 2 or not lines[0].strip().isdecimal():
        raise DataError(f"{path} should begin with a line with the number of files and one with the attributes' names")
    count, names, files, rows = int(lines[0]), lines[1].split(), [], bytearray()
    if count != len(lines) - 2:
        raise DataError(f"{path} announces {count} files but lists {len(lines) - 2}: it is cut off or was changed")
    for number, line in enumerate(lines[2:], start=3):
        file, *values = line.split()
        if len(values) != len(names) or not {"1", "-1"}.issuperset(values):
            raise DataError(f"{path}, line {number}: a file name and {len(names)} times 1 or -1 should stand here")
        files.append(file)
        rows += bytes(value == "1" for value in values)
    _check_unique(Path(path), files, 3)
    return names, files, np.frombuffer(bytes(rows), dtype=bool).reshape(count, len(names))


def read_partition(
    path: str | Path,  # a file in the form of CelebA's list_eval_partition.txt
) -> dict[str, str]:
    "CelebA's official split of every file."
    rows = [line.split() for line in _read_text(Path(path)).splitlines() if line.strip()]
    known = dict(zip("012", SHARES))
    for number, row in enumerate(rows, start=1):
        if len(row) != 2 or row[1] not in known:
            raise DataError(f"{path}, line {number}: a file name and 0, 1 or 2 should stand here")
    _check_unique(Path(path), [name for name, _ in rows], 1)
    return {name: known[part] for name, part in rows}


def _present(folder: Path, listed: Iterable[str]) -> tuple[list[str], int]:
    "Those of the listed files that are in the folder, and how many are not. None there at all: DataError."
    there, listed = _listing(folder), list(listed)
    names = [name for name in listed if name in there]
    if not names:
        deeper = f"; should {folder / folder.name} be one folder higher?" if folder.name in there else ""
        raise DataError(f"{folder} contains none of the {len(listed)} images that are listed{deeper}; {HOW}")
    return names, len(listed) - len(names)


class CelebA(Dataset):
    "Faces and their attributes, from the official folder or any subset of its images: `image` and `attributes` (a,)."

    def __init__(
        self,
        root: str | Path,  # the folder with img_align_celeba/ in it, or the one above, where it is called celeba
        split: str = "train",  # "train", "validation", "test": by the partition file, by name where there is none
        size: int = 64,  # pixels along each side, of the square of 178 around the face
    ):
        _check_split(split, SHARES)
        _check_size(size)
        self.root, self.split, self.size = find_folder(root, "img_align_celeba", "celeba"), split, size
        self._list = self.root / "list_attr_celeba.txt"
        self.attribute_names, listed, attributes = read_attributes(self._list)
        names, self.missing = _present(self.root / "img_align_celeba", listed)
        names = [name for name, part in zip(names, self._parts(names)) if part == split]
        if not names:
            raise DataError(f"{self.root}: none of the images that are there falls into split {split!r}")
        row = {name: i for i, name in enumerate(listed)}
        self.files = [self.root / "img_align_celeba" / name for name in names]
        self.attributes = torch.from_numpy(attributes[[row[name] for name in names]]).float()

    def _parts(self, names: list[str]) -> list[str]:
        "The split of each of these images."
        partition = self.root / "list_eval_partition.txt"
        if not partition.exists():
            return [split_by_name(name) for name in names]
        parts = read_partition(partition)
        if unassigned := [name for name in names if name not in parts]:
            raise DataError(f"{partition} has no line for {len(unassigned)} of the images, first {unassigned[0]}")
        return [parts[name] for name in names]

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> dict:
        "What decides the samples."
        return {"data": "CelebA", "version": DRAWING_VERSION, "split": self.split, "size": self.size,
                "files": listing_checksum(self.root, [self._list, *self.files])}

    def __getitem__(self, index: int) -> dict:
        return {"image": load_image(self.files[index], self.size), "attributes": self.attributes[index]}
