"""Folders of images: what lies in them, their splits, and `ImageFolder`."""

import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from torch.utils.data import Dataset
from ldm_edu.data.batches import _check_size, _check_split
from ldm_edu.data.images import _complaint, load_image
from ldm_edu.data.toy.datasets import DRAWING_VERSION
from ldm_edu.errors import DataError

SHARES = {"train": 8, "validation": 1, "test": 1}  # tenths of a data set that comes without a partition of its own


def split_by_name(name: str) -> str:
    "The split of a file for which nobody has chosen one: tenths by a checksum of its name, so that no file ever moves."
    tenth = zlib.crc32(name.encode("utf-8", "surrogateescape")) % 10
    return "train" if tenth < 8 else ("validation", "test")[tenth - 8]


HOW = "data/README.md in the project's repository says how to get the data and where it goes"


def find_folder(
    root: str | Path,  # given by the user
    inside: str,  # what the data set's folder contains
    name: str,  # what the data set's folder is usually called
) -> Path:
    "The folder that contains `inside`: `root` itself, or `name` in it."
    root = Path(root)
    for folder in (root, root / name):
        if (folder / inside).is_dir():
            return folder
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; {HOW}")
    raise DataError(f"{root} contains neither {inside}/ nor {name}/{inside}/; {HOW}")


def _listing(folder: Path) -> set[str]:
    "Names of everything in a folder."
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder} cannot be read as a folder ({error.strerror}); {HOW}") from error


def listing_checksum(
    root: Path,  # the folder that names are counted from
    files: Iterable[Path],  # somewhere under `root`
) -> str:
    "A checksum of the names, sizes and dates of files, without reading them."
    digest, start = hashlib.sha256(), len(str(root))
    for file in files:
        try:
            facts = os.stat(file)
        except OSError as error:
            raise DataError(_complaint(file, error)) from error
        digest.update(f"{str(file)[start:]} {facts.st_size} {facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def image_files(root: Path) -> list[Path]:
    "All image files under a folder, sorted; hidden ones are left out, linked folders visited, each once."
    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); a folder of images should stand here")

    files, been = [], set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        here = os.path.realpath(folder)
        folders[:] = [] if here in been else sorted(name for name in folders if not name.startswith("."))
        found = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        files += [] if here in been else [Path(folder, name) for name in found]
        been.add(here)
    return sorted(files)


class ImageFolder(Dataset):
    "All images in a folder and the folders in it, in the order of their names; samples have `image` only."

    def __init__(
        self,
        root: str | Path,
        size: int = 64,  # pixels along each side
        split: str | None = None,  # "train", "validation", "test" by `split_by_name`; None: everything
    ):
        self.root, self.size, self.split = Path(root), size, split
        _check_size(size)
        if split is not None:
            _check_split(split, SHARES)
        if not self.root.is_dir():
            raise DataError(f"{root}: there is no such folder; {HOW}")
        files = image_files(self.root)
        if not files:
            raise DataError(f"{root} contains no images ({', '.join(SUFFIXES)})")
        self.files = [f for f in files if split in (None, split_by_name(f.relative_to(self.root).as_posix()))]
        if not self.files:
            raise DataError(f"{root}: none of its {len(files)} images is in split {split!r}; split=None takes all")

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> dict:
        "What decides the samples."
        return {"data": "ImageFolder", "version": DRAWING_VERSION, "split": self.split, "size": self.size,
                "files": listing_checksum(self.root, self.files)}

    def __getitem__(self, index: int) -> dict:
        return {"image": load_image(self.files[index], self.size)}
