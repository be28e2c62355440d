"""Folders of images: how they are found, listed and split, and the data set `ImageFolder`."""

import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset

from ldm_edu.data.batches import _check_keys, _check_size, _check_split, reading_sample
from ldm_edu.data.images import READING_VERSION, _describe_error, load_image
from ldm_edu.errors import DataError
from ldm_edu.files import place, reason

__all__ = ["ImageFolder"]

SPLIT_SHARES = {"train": 8, "validation": 1, "test": 1}  # tenths, where a data set has no partition of its own
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
DATA_HELP = "data/README.md in the project's repository says how to get the data and where it goes"


def name_bytes(name: str) -> bytes:
    "A file name in UTF-8, also one that is no text: its odd bytes as they are, else (Windows) its halves of letters."
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")


def split_by_name(name: str) -> str:
    """The split of a file for which nobody has chosen one, by a checksum of its name.

    A file keeps its split whatever other files are added or removed.
    """
    tenth = zlib.crc32(name_bytes(name)) % 10
    return "train" if tenth < 8 else ("validation", "test")[tenth - 8]


def find_folder(
    root: str | Path,  # given by the user
    inside: str,  # a folder that the data set's folder contains
    name: str,  # what the data set's folder is usually called
) -> Path:
    "The data set's folder, which contains `inside`: `root` itself, or `name` in it. DataError where neither does."
    root = place(root)
    for folder in (root, root / name):
        if (folder / inside).is_dir():
            return folder
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; {DATA_HELP}")
    raise DataError(f"{root} contains neither {inside}/ nor {name}/{inside}/; {DATA_HELP}")


def names_in_folder(folder: Path) -> set[str]:
    "The names of everything in a folder; DataError where it cannot be read."
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder} cannot be read as a folder ({reason(error)}); {DATA_HELP}") from error


def listing_checksum(
    root: Path,  # the folder that names are counted from
    files: Iterable[Path],  # somewhere under `root`
) -> str:
    "A checksum of the names, sizes and modification times of files, without reading them."
    digest = hashlib.sha256()
    start = len(str(root))
    for file in files:
        try:
            facts = os.stat(file)
        except OSError as error:
            raise DataError(_describe_error(file, error)) from error
        line = f"{str(file)[start:]} {facts.st_size} {facts.st_mtime_ns}\n"
        digest.update(name_bytes(line))
    return digest.hexdigest()[:16]


def _raise_unreadable(error: OSError) -> None:
    "What `os.walk` calls for a folder that it cannot read."
    raise DataError(f"{error.filename} cannot be read ({reason(error)}); a folder of images should stand here")


def _is_image_name(name: str) -> bool:
    "Is this the name of an image file that is not hidden?"
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def image_files(root: Path) -> list[Path]:
    "All image files in a folder and its subfolders, sorted, without hidden ones. Links to folders are followed."
    files: list[Path] = []
    visited: set[str] = set()  # real paths: linked folders may form a circle
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise_unreadable):
        real_path = os.path.realpath(folder)
        if real_path in visited:
            subfolders.clear()  # `os.walk` goes no deeper
            continue
        visited.add(real_path)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(folder, name) for name in names if _is_image_name(name)]
    return sorted(files)


class ImageFolder(Dataset[dict[str, Any]]):
    """All images in a folder and its subfolders, in the order of their names.

    A sample has those of the `known_keys` that were asked for: `image` (3, size, size) in [-1, 1], and `class`, the index
    in `class_names` of the first subfolder on the way to the file. DataError where the folder does not exist, has no
    image, or has none in this split, and where `class` is asked for and an image lies in no subfolder.
    """

    known_keys: ClassVar[tuple[str, ...]] = ("image", "class")

    def __init__(
        self,
        root: str | Path,
        size: int = 64,  # pixels along each side
        split: str | None = None,  # "train", "validation", "test" by a checksum of the names; None: everything
        keys: Sequence[str] = ("image",),  # some of `known_keys`
    ):
        self.root = place(root)
        self.size = _check_size(size)
        self.split = split
        self.keys = _check_keys(keys, self.known_keys)
        if split is not None:
            _check_split(split, SPLIT_SHARES)
        if not self.root.is_dir():
            raise DataError(f"{root}: there is no such folder; {DATA_HELP}")
        files = image_files(self.root)
        if not files:
            raise DataError(f"{root} contains no images ({', '.join(IMAGE_SUFFIXES)})")
        self.files = [file for file in files if self._is_wanted(file)]
        if not self.files:
            raise DataError(f"{root}: none of its {len(files)} images is in split {split!r}; split=None takes all")
        # The classes are those of all splits: each has the same number in every split.
        self.class_names: list[str] = sorted({self._class_name(file) for file in files}) if "class" in self.keys else []

    def _class_name(self, file: Path) -> str:
        "The first subfolder on the way to a file."
        subfolder, *rest = file.relative_to(self.root).parts
        if not rest:
            raise DataError(
                f"{file} lies in no subfolder, so it has no `class`: move it into one, or leave `class` out"
            )
        return subfolder

    def _is_wanted(self, file: Path) -> bool:
        "Is this file in the split that was asked for?"
        return self.split is None or split_by_name(file.relative_to(self.root).as_posix()) == self.split

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> dict[str, Any]:
        "What decides the samples: split, size, keys, classes, and names, sizes and modification times of the files."
        return {
            "data": "ImageFolder",
            "version": READING_VERSION,
            "split": self.split,
            "size": self.size,
            "keys": list(self.keys),
            "classes": self.class_names,
            "files": listing_checksum(self.root, self.files),
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        parts: dict[str, Any] = {}
        with reading_sample(file):
            if "image" in self.keys:
                parts["image"] = load_image(file, self.size)
            if "class" in self.keys:
                parts["class"] = self.class_names.index(self._class_name(file))
            return {key: parts[key] for key in self.keys}
