"""Every data set by its name."""

from pathlib import Path
from typing import Any

from ldm_edu.data.batches import SampleDataset
from ldm_edu.data.celeba import CelebA
from ldm_edu.data.coco import COCO
from ldm_edu.data.derived import Derived
from ldm_edu.data.folders import DATA_HELP, ImageFolder
from ldm_edu.data.toy.datasets import ToyCelebA, ToyCOCO
from ldm_edu.errors import DataError

__all__ = ["known_keys", "open_dataset"]

_TOY = {"toy": ToyCOCO, "toy-faces": ToyCelebA}
_ON_DISK = {"celeba": CelebA, "coco": COCO, "folder": ImageFolder}


def known_keys(
    name: str,  # "toy", "toy-faces", "celeba", "coco", or "folder"
) -> tuple[str, ...]:
    "The keys that a data set's samples can have: `keys` of `open_dataset` asks for some. DataError for unknown names."
    known = {**_TOY, **_ON_DISK}
    if name not in known:
        raise DataError(f"data set {name!r} does not exist; known: {', '.join(known)}")
    own = tuple(known[name].known_keys)
    return (*own, *(key for key in Derived.known_keys if key not in own))


def open_dataset(
    name: str,  # "toy", "toy-faces", "celeba", "coco", or "folder"
    data_dir: str | Path | None = None,  # where the data lie; the toy data sets need none
    split: str = "train",
    size: int = 64,  # pixels along each side
    **options: Any,  # other arguments of the data set's class, such as `keys`
) -> SampleDataset:
    """A data set by its name; "folder" stands for all images in `data_dir`.

    DataError where there is no data set of that name, where `data_dir` is lacking, or where the data set refuses.
    """
    known_keys(name)  # refuses a name that does not exist
    wanted = options.get("keys", ())
    wanted = () if isinstance(wanted, str) else tuple(wanted)
    if set(wanted) & set(Derived.known_keys):
        own = dict.fromkeys(["image", *(key for key in wanted if key not in Derived.known_keys)])
        return Derived(open_dataset(name, data_dir, split, size, **{**options, "keys": tuple(own)}), wanted)
    if name in _TOY:
        return _TOY[name](split=split, size=size, **options)
    if data_dir is None:
        raise DataError(f"data_dir should say where {name!r} lies; {DATA_HELP}")
    return _ON_DISK[name](data_dir, split=split, size=size, **options)
