"""Every data set by its name."""

from pathlib import Path
from torch.utils.data import Dataset
from ldm_edu.data.celeba import CelebA
from ldm_edu.data.coco import COCO
from ldm_edu.data.folders import HOW, ImageFolder
from ldm_edu.data.toy.datasets import ToyCOCO, ToyCelebA
from ldm_edu.errors import DataError

DRAWN = {"toy": ToyCOCO, "toy-faces": ToyCelebA}
ON_DISK = {"celeba": CelebA, "coco": COCO, "folder": ImageFolder}


def open_dataset(
    name: str,  # one of DRAWN or ON_DISK
    data_dir: str | Path | None = None,  # where the data lie; drawn ones need none
    split: str = "train",
    size: int = 64,  # pixels along each side
    **options,  # what else the data set takes, such as `keys`
) -> Dataset:
    "A data set by name: `toy`, `toy-faces`, `celeba`, `coco`, or `folder` for the images in `data_dir`."
    if name in DRAWN:
        return DRAWN[name](split=split, size=size, **options)
    if name not in ON_DISK:
        raise DataError(f"data set {name!r} does not exist; known: {', '.join([*DRAWN, *ON_DISK])}")
    if data_dir is None:
        raise DataError(f"data_dir should say where {name!r} lies; {HOW}")
    return ON_DISK[name](data_dir, split=split, size=size, **options)
