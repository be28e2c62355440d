"""MS-COCO, in the layout of its official files: captions, boxes, outlines and panoptic maps."""

import gc
import json
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm_edu.data.batches import _check_keys, _check_size, _check_split
from ldm_edu.data.celeba import read_text
from ldm_edu.data.folders import DATA_HELP, IMAGE_SUFFIXES, SPLIT_SHARES
from ldm_edu.data.folders import find_folder, listing_checksum, names_in_folder, split_by_name
from ldm_edu.data.images import _describe_error, center_box, read_image, square_tensor
from ldm_edu.data.toy.datasets import DRAWING_VERSION
from ldm_edu.errors import DataError

__all__ = ["COCO", "decode_outline"]

COCO_FOLDERS = ("train2017", "val2017")

# ---- The square in the middle, for boxes and for maps


def crop_boxes(
    boxes: Float[Tensor, "k 4"],  # left, top, right, bottom, in pixels of the whole image
    width: int,  # of the whole image
    height: int,
) -> Float[Tensor, "k 4"]:
    "The same boxes as fractions of the side of the square in the middle of the image, clipped to it."
    left, top, side = center_box(width, height)
    return ((boxes - torch.tensor([left, top, left, top])) / side).clamp(0, 1)


def crop_map(
    values: np.ndarray,  # (..., h, w) labels or masks of the whole image
    size: int,  # pixels along each side of the result
) -> np.ndarray:  # (..., size, size)
    "The square in the middle of a map, resized: every new pixel takes the value at its centre."
    left, top, side = center_box(values.shape[-1], values.shape[-2])
    steps = (2 * np.arange(size) + 1) * side // (2 * size)
    return values[..., (top + steps)[:, None], left + steps]


# ---- Outlines


def _unpack_run_lengths(counts: str) -> list[int]:
    """Run lengths from the text into which pycocotools packs them.

    A character holds 5 bits of a number, lowest bits first, and a sixth bit that says whether more follow. From the
    fourth number on, a number is the difference from the last but one.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in counts:
        code = ord(character) - 48
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:  # the highest bit of the last character is the sign
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs


def _decode_run_lengths(outline: dict[str, Any], width: int, height: int) -> Bool[np.ndarray, "h w"]:
    "A mask from its run lengths: zeros and ones in turn, down the columns, zeros first."
    counts = outline["counts"]
    runs = _unpack_run_lengths(counts) if isinstance(counts, str) else counts
    if list(outline["size"]) != [height, width] or min(runs) < 0 or sum(runs) != height * width:
        raise ValueError(f"run lengths should add up to {height} x {width} pixels")
    is_inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_inside, runs).reshape(width, height).T


def _is_polygon(corners: np.ndarray) -> bool:
    "Is this a list x1, y1, x2, y2, ... of at least three corners?"
    return bool(corners.ndim == 1 and len(corners) >= 6 and len(corners) % 2 == 0 and np.isfinite(corners).all())


def _decode_polygons(outline: list[Any], width: int, height: int) -> Bool[np.ndarray, "h w"]:
    "The pixels inside any of the polygons, as pycocotools draws them."
    polygons = [np.asarray(polygon, dtype=float) for polygon in outline]
    if not polygons or not all(_is_polygon(polygon) for polygon in polygons):
        raise ValueError("a polygon should have two numbers for each of its three or more corners")
    from pycocotools import mask

    parts = mask.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
    with warnings.catch_warnings():
        # pycocotools 2.0.11 calls numpy in a way that numpy 2 warns of.
        warnings.simplefilter("ignore", DeprecationWarning)
        return mask.decode(mask.merge(parts)).astype(bool)


def decode_outline(
    outline: list[Any] | dict[str, Any],  # polygons, or run lengths {"counts": ..., "size": [height, width]}
    width: int,  # of the whole image
    height: int,
) -> Bool[np.ndarray, "h w"]:
    """The mask of a thing from its outline in COCO's form. ValueError where the outline makes no sense.

    Polygons are lists x1, y1, x2, y2, ... of corners. Run lengths are a list of numbers, or the text into which
    pycocotools packs them.
    """
    if isinstance(outline, dict):
        return _decode_run_lengths(outline, width, height)
    return _decode_polygons(outline, width, height)


# ---- The three kinds of annotation files


@contextmanager
def _expected_form(path: Path, form: str) -> Iterator[None]:
    "Turns what goes wrong inside, because a file has another form, into a DataError that names the expected form."
    # Millions of small objects are made inside and all of them are kept. To look for garbage among them would take
    # most of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path} should have {form} ({type(error).__name__}: {error})") from error
    finally:
        if was_enabled:
            gc.enable()


_POLYGONS = re.compile(r'"segmentation":\s*\[[^a-zA-Z{}"]*\]')  # nine tenths of a file of instances


def _read_json(path: Path, polygons: bool = True) -> dict[str, Any]:
    "A JSON file with an object in it. Without polygons it is read several times faster."
    text = read_text(path)
    try:
        content = json.loads(text if polygons else _POLYGONS.sub('"segmentation": null', text))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not whole JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} should have `images` and `annotations`, not a {type(content).__name__}")
    return content


def _with_annotations(path: Path, content: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    "Every entry of `images`, by its id, with its annotations; annotations of no image are left out."
    images = {image["id"]: image for image in content["images"]}
    names = {image["file_name"] for image in images.values()}
    if not len(names) == len(images) == len(content["images"]):
        raise DataError(f"{path} has an image twice in `images`: numbers and file names should all differ")
    annotations = defaultdict(list)
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    return [(images[number], annotations[number]) for number in sorted(images)]


def _class_numbers(content: dict[str, Any]) -> dict[int, int]:
    "For the id of every category its class: from 1, in the order of the file. COCO's own ids have gaps."
    return {category["id"]: i for i, category in enumerate(content["categories"], start=1)}


def _read_captions(
    path: Path,  # a file in the form of COCO's captions_val2017.json
) -> dict[
    str, list[str]
]:  # for every image's file name its captions, in the order of their ids; empty where it has none
    "COCO's captions, without line ends and repeated spaces."
    captions = {}
    with _expected_form(path, "`images` with id and file_name, and `annotations` with id, image_id and caption"):
        for image, annotations in _with_annotations(path, _read_json(path)):
            in_order = sorted(annotations, key=lambda annotation: annotation["id"])
            texts = [" ".join(annotation["caption"].split()) for annotation in in_order]
            captions[image["file_name"]] = [text for text in texts if text]
    return captions


@dataclass
class _Instances:
    "The things in an image, in pixels of the whole image."

    width: int
    height: int
    boxes: Float[np.ndarray, "k 5"]  # class from 1, left, top, right, bottom
    outlines: list[Any]  # see `decode_outline`; empty where nobody asked for them


def _packed(outline: Any) -> Any:
    "An outline that takes less memory: polygons as arrays; run lengths stay as they are."
    return [np.array(polygon, dtype=float) for polygon in outline] if isinstance(outline, list) else outline


def _instances_of(
    image: dict[str, Any], annotations: list[dict[str, Any]], classes: dict[int, int], outlines: bool
) -> _Instances:
    "The things of one image. Regions that stand for a whole crowd are left out: a box should mean one thing."
    singles = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    rows = []
    for annotation in singles:
        left, top, width, height = annotation["bbox"]
        rows.append((classes[annotation["category_id"]], left, top, width, height))
    boxes = np.array(rows, dtype=np.float32).reshape(-1, 5)
    if not (boxes[:, 3:] >= 0).all() or not np.isfinite(boxes).all():
        raise ValueError(f"a box of {image['file_name']} has no proper size")
    boxes[:, 3:] += boxes[:, 1:3]
    shapes = [_packed(annotation["segmentation"]) for annotation in singles] if outlines else []
    return _Instances(int(image["width"]), int(image["height"]), boxes, shapes)


def _read_instances(
    path: Path,  # a file in the form of COCO's instances_val2017.json
    outlines: bool = True,  # read the outlines, too? They are most of the file
) -> tuple[list[str], dict[str, _Instances | None]]:  # category names; for every file name its things, or None
    "COCO's things: their classes, boxes and outlines."
    form = (
        "`categories` with id and name, `images` with id, file_name, width and height, and `annotations` "
        "with image_id, category_id, bbox (four numbers) and segmentation"
    )
    with _expected_form(path, form):
        content = _read_json(path, outlines)
        classes = _class_numbers(content)
        found = {
            image["file_name"]: _instances_of(image, annotations, classes, outlines) if annotations else None
            for image, annotations in _with_annotations(path, content)
        }
        return [category["name"] for category in content["categories"]], found


@dataclass
class _Segments:
    "Where the segments of an image are drawn, and the class of each."

    file: Path  # the PNG
    ids: Int[np.ndarray, "k"]  # that occur in it, sorted, 0 first
    classes: Int[np.ndarray, "k"]  # of each id: 0 for unlabelled, categories from 1


def _segments_of(annotation: dict[str, Any], classes: dict[int, int], folder: Path) -> _Segments:
    "The segments of one image."
    table = sorted((segment["id"], classes[segment["category_id"]]) for segment in annotation["segments_info"])
    ids, kinds = np.array([(0, 0), *table]).T
    return _Segments(folder / annotation["file_name"], ids, kinds)


def _read_panoptic(
    path: Path,  # a file in the form of COCO's panoptic_val2017.json; its PNGs lie in the folder of that name
) -> tuple[list[str], dict[str, _Segments | None]]:  # names of the classes; for every file name its segments, or None
    "COCO's segments. An image whose PNG is not there has none."
    found: dict[str, _Segments | None] = {}
    form = (
        "`categories` with id and name, `images` with id and file_name, and `annotations` with image_id, "
        "file_name and segments_info (each with id and category_id)"
    )
    with _expected_form(path, form):
        content = _read_json(path)
        folder = path.with_suffix("")
        there = names_in_folder(folder)
        classes = _class_numbers(content)
        for image, annotations in _with_annotations(path, content):
            is_drawn = annotations and annotations[0]["file_name"] in there
            found[image["file_name"]] = _segments_of(annotations[0], classes, folder) if is_drawn else None
        return ["unlabelled", *(category["name"] for category in content["categories"])], found


def _read_map_ids(file: Path) -> Int[np.ndarray, "h w"]:
    "The segment ids that the colours of a panoptic PNG stand for: red + 256 green + 256^2 blue."
    try:
        with Image.open(file) as image:
            if image.mode != "RGB":
                raise DataError(f"should be a PNG in three colours, not in mode {image.mode}")
            colours = np.asarray(image).astype(np.int64)
    except Exception as error:  # Pillow reports broken files by many kinds of error
        raise DataError(_describe_error(file, error)) from error
    return colours @ (1, 256, 256**2)


def _read_segmentation(
    segments: _Segments,
    size: int,  # pixels along each side of the result
) -> tuple[Int[np.ndarray, "size size"], tuple[int, int]]:
    "The classes in the square in the middle, and width and height of the whole map."
    whole = _read_map_ids(segments.file)
    ids = crop_map(whole, size)
    places = np.searchsorted(segments.ids, ids).clip(max=len(segments.ids) - 1)
    if (segments.ids[places] != ids).any():
        raise DataError(f"{segments.file} has colours that its JSON does not explain; take both from one release")
    return segments.classes[places], (whole.shape[1], whole.shape[0])


# ---- The data set


def coco_split(
    name: str,  # of the file
    folder: str,  # it lies in
    folders: Sequence[str],  # those of COCO_FOLDERS that are there
) -> str:
    """The course's split of a COCO image; no image is in two splits.

    With both folders there, `train` is train2017, and validation and test share val2017 (COCO's own test images have
    no public captions). With one folder only, its files are split by their names.
    """
    if len(folders) == 1:
        return split_by_name(name)
    return "train" if folder == "train2017" else ("validation", "test")[zlib.crc32(name.encode()) % 2]


def _check_same_size(file: Path, sizes: dict[Path, tuple[int, int]]) -> None:
    "DataError where an image and its annotations speak of different sizes."
    if len(set(sizes.values())) <= 1:
        return
    first = next(iter(sizes))
    other = next(path for path in sizes if sizes[path] != sizes[first])
    told = ["{} ({} x {} pixels)".format(path.name, *sizes[path]) for path in (first, other)]
    raise DataError(f"{file}: {' and '.join(told)} do not fit; annotations go with the original image only")


class COCO(Dataset[dict[str, Any]]):
    """Photographs with captions, things and segments, from the official folders or any subset of their images.

    Of the `known_keys`, a sample has those that `keys` asks for:

    - `image` (3, size, size) in [-1, 1]: the square in the middle, resized
    - `captions`: all captions; `caption`: the first of them
    - `boxes` (k, 5): class (from 1, in the order of `categories`), left, top, right, bottom as fractions of the side
    - `instances` (k, size, size): masks of the things in `boxes`
    - `segmentation` (size, size): classes in the order of `segment_names`, 0 for unlabelled

    Images that are not there are counted in `missing`, those without an annotation that is asked for in `without`.
    A box of which less than a pixel is left in the square is dropped, with its mask.
    DataError names a file that is missing or damaged, or that does not belong to the image.
    """

    known_keys: ClassVar[dict[str, str]] = {  # for every key the kind of annotation file that it is read from
        "image": "",
        "caption": "captions",
        "captions": "captions",
        "boxes": "instances",
        "instances": "instances",
        "segmentation": "panoptic",
    }

    def __init__(
        self,
        root: str | Path,  # the folder with annotations/ in it, or the one above, where it is called coco
        split: str | None = None,  # a folder, or "train", "validation", "test" (see `coco_split`); None: everything
        size: int = 64,  # pixels along each side
        keys: Sequence[str] = ("image", "caption", "captions"),  # some of `known_keys`
    ):
        if split is not None:
            _check_split(split, (*SPLIT_SHARES, *COCO_FOLDERS))
        _check_size(size)
        self.root = find_folder(root, "annotations", "coco")
        self.split = split
        self.size = size
        self.keys = _check_keys(keys, tuple(self.known_keys))
        self.kinds = sorted({self.known_keys[key] for key in self.keys} - {""})  # of annotation files
        self.categories: list[str] = []
        self.segment_names: list[str] = []
        self.files: list[Path] = []
        self._annotations: dict[str, list[Any]] = {kind: [] for kind in self.kinds}  # of each kind, one for each file
        self.missing = 0
        self.without = dict.fromkeys(self.kinds, 0)
        self._add_folders()

    def _add_folders(self) -> None:
        "Add the images of all folders that are wanted; DataError where none is there, or no image is left."
        present = [folder for folder in COCO_FOLDERS if (self.root / folder).is_dir()]
        wanted = [self.split] if self.split in COCO_FOLDERS else present
        if not wanted or not set(wanted) <= set(present):
            raise DataError(f"{self.root} contains no folder {' or '.join(wanted or COCO_FOLDERS)}; {DATA_HELP}")
        for folder in wanted:
            self._add_folder(folder, present)
        if not self.files:
            raise DataError(
                f"{self.root}: no image is left for split {self.split!r} with {', '.join(self.keys)}; "
                f"without what these need: {self.without}"
            )

    def _source(self, kind: str, folder: str) -> Path:
        "The annotation file of a kind for a folder of images."
        return self.root / "annotations" / f"{kind}_{folder}.json"

    def _read(self, kind: str, folder: str) -> dict[str, Any]:
        "What one annotation file says of each image."
        path = self._source(kind, folder)
        if kind == "captions":
            return _read_captions(path)
        if kind == "instances":
            names, found = _read_instances(path, "instances" in self.keys)
            known = self.categories
        else:
            names, found = _read_panoptic(path)
            known = self.segment_names
        if known and known != names:
            raise DataError(f"{path} has other categories than the file of {COCO_FOLDERS[0]}: they should be the same")
        known[:] = names
        return found

    def _add_folder(self, folder: str, present: list[str]) -> None:
        "Add the images of one folder that are in the split and have what is asked for."
        there = {name for name in names_in_folder(self.root / folder) if name.lower().endswith(IMAGE_SUFFIXES)}
        found = {kind: self._read(kind, folder) for kind in self.kinds}
        listed: set[str] = set().union(*found.values()) if found else there
        if not listed & there:
            raise DataError(
                f"{self.root / folder} contains none of the {len(listed)} images that are listed; {DATA_HELP}"
            )
        self.missing += len(listed - there)
        for name in sorted(there):
            if self.split in SPLIT_SHARES and coco_split(name, folder, present) != self.split:
                continue
            lacking = [kind for kind in self.kinds if not found[kind].get(name)]
            for kind in lacking:
                self.without[kind] += 1
            if lacking:
                continue
            self.files.append(self.root / folder / name)
            for kind in self.kinds:
                self._annotations[kind].append(found[kind][name])

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> dict[str, Any]:
        "What decides the samples: the split, the size, the keys, and names, sizes and times of all files read."
        sources = {self._source(kind, file.parent.name) for file in self.files for kind in self.kinds}
        maps = [segments.file for segments in self._annotations.get("panoptic", [])]
        return {
            "data": "COCO",
            "version": DRAWING_VERSION,
            "split": self.split,
            "size": self.size,
            "keys": list(self.keys),
            "files": listing_checksum(self.root, [*sorted(sources), *self.files, *maps]),
        }

    @property
    def captions(self) -> list[list[str]] | None:
        "All captions of each image; None where `keys` do not ask for captions."
        return self._annotations.get("captions")

    def _masks(self, file: Path, things: _Instances, is_kept: Tensor) -> Bool[np.ndarray, "k h w"]:
        "The masks of the things that are kept, in the whole image."
        if not things.outlines or not is_kept.any():
            return np.zeros((0, things.height, things.width), dtype=bool)
        with _expected_form(
            self._source("instances", file.parent.name), f"a proper outline for all things in {file.name}"
        ):
            outlines = [outline for outline, keep in zip(things.outlines, is_kept) if keep]
            return np.stack([decode_outline(outline, things.width, things.height) for outline in outlines])

    def _boxes_and_instances(self, file: Path, things: _Instances) -> dict[str, Tensor]:
        "The boxes and masks in the square, of all things of which at least a pixel is left there."
        edges = crop_boxes(torch.from_numpy(things.boxes[:, 1:]), things.width, things.height)
        sides = (edges[:, 2:] - edges[:, :2]) * self.size  # pixels
        is_kept = (sides >= 1 - 1e-4).all(1)
        boxes = torch.cat([torch.from_numpy(things.boxes[:, :1]), edges], 1)
        masks = self._masks(file, things, is_kept)
        return {"boxes": boxes[is_kept], "instances": torch.from_numpy(crop_map(masks, self.size))}

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        annotations = {kind: self._annotations[kind][index] for kind in self.kinds}
        parts: dict[str, Any] = {}
        sizes: dict[Path, tuple[int, int]] = {}  # width and height, as each file gives them
        if "image" in self.keys:
            image = read_image(file)
            parts["image"] = square_tensor(image, self.size, file)
            sizes[file] = image.size
        if "captions" in annotations:
            parts["caption"] = annotations["captions"][0]
            parts["captions"] = list(annotations["captions"])
        if "instances" in annotations:
            things = annotations["instances"]
            parts |= self._boxes_and_instances(file, things)
            sizes[self._source("instances", file.parent.name)] = (things.width, things.height)
        if "panoptic" in annotations:
            segments = annotations["panoptic"]
            classes, sizes[segments.file] = _read_segmentation(segments, self.size)
            parts["segmentation"] = torch.from_numpy(classes)
        _check_same_size(file, sizes)
        return {key: parts[key] for key in self.keys}
