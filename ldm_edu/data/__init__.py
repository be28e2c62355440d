"""Data sets: drawn ones, CelebA, COCO and folders of images; batches, a cache on disk, downloads.

Degradations for super-resolution and inpainting are in `ldm_edu.data.degradation`.
"""

from ldm_edu.data.batches import batches, collate
from ldm_edu.data.cache import SampleCache, cached
from ldm_edu.data.celeba import CelebA
from ldm_edu.data.coco import COCO, decode_outline
from ldm_edu.data.download import download_celeba, download_coco
from ldm_edu.data.folders import ImageFolder
from ldm_edu.data.images import load_image, read_image, to_tensor
from ldm_edu.data.registry import known_keys, open_dataset
from ldm_edu.data.toy.captions import read_caption, relation
from ldm_edu.data.toy.datasets import ToyCelebA, ToyCOCO
from ldm_edu.errors import DataError, DownloadError

__all__ = [
    "COCO",
    "CelebA",
    "DataError",
    "DownloadError",
    "ImageFolder",
    "SampleCache",
    "ToyCOCO",
    "ToyCelebA",
    "batches",
    "cached",
    "collate",
    "decode_outline",
    "download_celeba",
    "download_coco",
    "known_keys",
    "load_image",
    "open_dataset",
    "read_caption",
    "read_image",
    "relation",
    "to_tensor",
]
