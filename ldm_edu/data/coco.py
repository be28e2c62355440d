"""MS-COCO, in the layout of its official files: captions, boxes, outlines and panoptic maps."""

import io
import json
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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

# The C code of pycocotools writes beyond its buffers, or asks for all memory, where an outline makes no sense. Within
# these limits, and with the checks below, its buffers suffice.
MOST_PIXELS = 2**26  # of an image
MOST_SIDES = 10  # how many sides of the image a corner may lie away from it
LONGEST = 1_000_000  # pixels along a polygon

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


# ---- Outlines, by pycocotools


def _pycocotools() -> Any:  # the types that are published for it do not know all forms of an outline
    "`pycocotools.mask`, loaded when it is asked for."
    from pycocotools import mask

    return mask


def _decode(packed: list[dict[str, Any]]) -> Bool[np.ndarray, "h w k"]:
    "Masks from their run lengths in the form of pycocotools; ValueError where these have too many pixels."
    with warnings.catch_warnings():
        # pycocotools 2.0.11 calls numpy in a way that numpy 2 warns of.
        warnings.simplefilter("ignore", DeprecationWarning)
        return _pycocotools().decode(packed).astype(bool)


def _decode_polygons(outline: list[Any], width: int, height: int) -> Bool[np.ndarray, "h w"]:
    "The pixels inside any of the polygons."
    polygons = [np.asarray(polygon, dtype=float) for polygon in outline]
    if not polygons or any(polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise ValueError("a polygon should have two numbers for each of its three or more corners")
    for polygon in polygons:
        corners = polygon.reshape(-1, 2)
        is_near = bool((np.abs(corners) <= MOST_SIDES * max(width, height)).all())  # False for nan, too
        if not is_near or np.abs(corners - np.roll(corners, 1, axis=0)).sum() > LONGEST:
            raise ValueError(f"the corners of a polygon should lie in the image of {width} x {height} pixels")
    parts = _pycocotools().frPyObjects([polygon.tolist() for polygon in polygons], height, width)
    return _decode([_pycocotools().merge(parts)])[..., 0]


def _decode_runs(outline: dict[str, Any], width: int, height: int) -> Bool[np.ndarray, "h w"]:
    "A mask from its run lengths: zeros and ones in turn, down the columns, zeros first."
    counts, size, n = outline["counts"], [height, width], width * height
    wrong = ValueError(f"run lengths should add up to {height} x {width} pixels")
    if isinstance(counts, str):
        # A character holds five bits of a number; those from P to o say that more follow.
        is_right = bool(re.fullmatch("([P-o]{0,6}[0-O])+", counts))
    else:
        runs = np.asarray(counts)
        is_right = runs.dtype.kind == "i" and runs.ndim == 1 and 0 <= runs.min() <= runs.max() <= n == runs.sum()
    if list(outline["size"]) != size or not is_right:
        raise wrong
    packed = {"counts": counts, "size": size}
    if not isinstance(counts, str):
        return _decode([_pycocotools().frPyObjects(packed, height, width)])[..., 0]
    # Too few pixels go unnoticed. But masks are written one behind the other, so that a second one, of ones only, fills
    # what the first lacks, and the first has more ones than its run lengths say.
    ones = _pycocotools().frPyObjects({"counts": [0, n], "size": size}, height, width)
    masks = _decode([packed, ones])
    if masks[..., 0].sum() != _pycocotools().area(packed):
        raise wrong
    return masks[..., 0]


def decode_outline(
    outline: list[Any] | dict[str, Any],  # polygons, or run lengths {"counts": ..., "size": [height, width]}
    width: int,  # of the whole image
    height: int,
) -> Bool[np.ndarray, "h w"]:
    """The mask of a thing from its outline in COCO's form. ValueError where the outline makes no sense.

    Polygons are lists x1, y1, x2, y2, ... of corners. Run lengths are a list of numbers, or the text into which
    pycocotools packs them.
    """
    if min(width, height) < 1 or width * height >= MOST_PIXELS:
        raise ValueError(f"an image should have less than {MOST_PIXELS} pixels, not {width} x {height}")
    if isinstance(outline, dict):
        return _decode_runs(outline, width, height)
    return _decode_polygons(outline, width, height)


# ---- Annotation files

_FORMS = {  # what each kind of file should have
    "captions": "`images` with id and file_name, and `annotations` with id, image_id and caption",
    "instances": "`categories` with id and name, `images` with id, file_name, width and height, and `annotations` "
    "with id, image_id, category_id, bbox (four numbers) and segmentation",
    "panoptic": "`categories` with id and name, `images` with id and file_name, and `annotations` with image_id, "
    "file_name and segments_info (each with id and category_id)",
}


@contextmanager
def _expected_form(path: Path, form: str) -> Iterator[None]:
    "Turns what goes wrong inside, because a file has another form, into a DataError that names the expected form."
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path} should have {form} ({type(error).__name__}: {error})") from error


class _Things(NamedTuple):
    "The things in an image, in pixels of the whole image."

    width: int
    height: int
    boxes: Float[np.ndarray, "k 5"]  # class from 1, left, top, right, bottom
    outlines: list[Any]  # see `decode_outline`; None for each where nobody asked for them


class _Segments(NamedTuple):
    "Where the segments of an image are drawn, and the class of each."

    file: Path  # the PNG
    classes: dict[int, int]  # of each id: 0 for unlabelled, categories from 1


def _captions_of(image: dict, annotations: list[dict], classes: dict[int, int]) -> list[str]:
    "The captions of one image, in the order of their ids, without line ends and repeated spaces."
    in_order = sorted(annotations, key=lambda annotation: annotation["id"])
    texts = [" ".join(annotation["caption"].split()) for annotation in in_order]
    return [text for text in texts if text]


def _things_of(image: dict, annotations: list[dict], classes: dict[int, int]) -> _Things | None:
    "The things of one image. Regions that stand for a whole crowd are left out: a box should mean one thing."
    if not annotations:
        return None
    singles = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    rows = [(classes[annotation["category_id"]], *annotation["bbox"]) for annotation in singles]
    boxes = np.array(rows, dtype=np.float32).reshape(len(rows), 5)
    if not (boxes[:, 3:] >= 0).all() or not np.isfinite(boxes).all():
        raise ValueError(f"a box of {image['file_name']} has no proper size")
    boxes[:, 3:] += boxes[:, 1:3]
    shapes = [annotation["segmentation"] for annotation in singles]
    # Arrays take less memory than lists of numbers.
    shapes = [[np.array(part, float) for part in shape] if isinstance(shape, list) else shape for shape in shapes]
    return _Things(int(image["width"]), int(image["height"]), boxes, shapes)


def _segments_of(image: dict, annotations: list[dict], classes: dict[int, int]) -> _Segments | None:
    "The segments of one image, which are drawn in one PNG."
    if not annotations:
        return None
    table = {segment["id"]: classes[segment["category_id"]] for segment in annotations[0]["segments_info"]}
    return _Segments(Path(annotations[0]["file_name"]), table | {0: 0})


_READERS = {"captions": _captions_of, "instances": _things_of, "panoptic": _segments_of}


def _read_annotations(
    path: Path,
    kind: str,  # one of _FORMS
    outlines: bool,  # keep the outlines of things, too? They are most of the file
) -> tuple[list[str], dict[str, Any]]:
    "The names of the categories, and for every file name in `images` its annotations, empty or None without any."
    from pycocotools.coco import COCO as Index

    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not whole JSON ({error}); copy it again") from error
    with _expected_form(path, _FORMS[kind]):
        categories = [] if kind == "captions" else content["categories"]
        classes = {category["id"]: i for i, category in enumerate(categories, start=1)}  # COCO's own ids have gaps
        if kind == "panoptic":  # the index asks for ids; here an image has one annotation
            content["annotations"] = [{"id": note["image_id"], **note} for note in content["annotations"]]
        for note in content["annotations"] if kind == "instances" and not outlines else ():
            note["segmentation"] = None
        index: Any = Index()
        index.dataset = {"images": content["images"], "annotations": content["annotations"]}
        with redirect_stdout(io.StringIO()):  # it prints what it does
            index.createIndex()
        found = {
            image["file_name"]: _READERS[kind](image, index.imgToAnns.get(number, []), classes)
            for number, image in index.imgs.items()
        }
        names = [category["name"] for category in categories]
    if not len(found) == len(index.imgs) == len(content["images"]):
        raise DataError(f"{path} has an image twice in `images`: numbers and file names should all differ")
    return names, found


def _read_segmentation(
    segments: _Segments,
    size: int,  # pixels along each side of the result
) -> tuple[Int[np.ndarray, "size size"], tuple[int, int]]:
    "The classes in the square in the middle, and width and height of the whole map."
    try:
        with Image.open(segments.file) as image:
            if image.mode != "RGB":
                raise DataError(f"should be a PNG in three colours, not in mode {image.mode}")
            colours = np.asarray(image).astype(np.int64)
    except Exception as error:  # Pillow reports broken files by many kinds of error
        raise DataError(_describe_error(segments.file, error)) from error
    ids = crop_map(colours @ (1, 256, 256**2), size)  # red + 256 green + 256^2 blue
    known, places = np.unique(ids, return_inverse=True)
    if not set(known.tolist()) <= set(segments.classes):
        raise DataError(f"{segments.file} has colours that its JSON does not explain; take both from one release")
    classes = np.array([segments.classes[number] for number in known.tolist()])
    return classes[places.reshape(ids.shape)], (colours.shape[1], colours.shape[0])


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
        present = [folder for folder in COCO_FOLDERS if (self.root / folder).is_dir()]
        wanted = [split] if split in COCO_FOLDERS else present
        if not wanted or not set(wanted) <= set(present):
            raise DataError(f"{self.root} contains no folder {' or '.join(wanted or COCO_FOLDERS)}; {DATA_HELP}")
        for folder in wanted:
            self._add_folder(folder, present)
        if not self.files:
            needs = f"{', '.join(self.keys)}; without what these need: {self.without}"
            raise DataError(f"{self.root}: no image is left for split {split!r} with {needs}")

    def _source(self, kind: str, folder: str) -> Path:
        "The annotation file of a kind for a folder of images."
        return self.root / "annotations" / f"{kind}_{folder}.json"

    def _read(self, kind: str, folder: str) -> dict[str, Any]:
        "What one annotation file says of each image."
        path = self._source(kind, folder)
        names, found = _read_annotations(path, kind, "instances" in self.keys)
        known = self.categories
        if kind == "panoptic":
            # Its PNGs lie in the folder that is called like the file. An image whose PNG is not there has no segments.
            place = path.with_suffix("")
            maps, known, names = names_in_folder(place), self.segment_names, ["unlabelled", *names]
            for name, segments in found.items():
                is_there = segments and str(segments.file) in maps
                found[name] = segments._replace(file=place / segments.file) if is_there else None
        if known and names and known != names:
            raise DataError(f"{path} has other categories than the file of {COCO_FOLDERS[0]}: they should be the same")
        known[:] = names or known
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
            if not lacking:
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

    def _boxes_and_instances(self, file: Path, things: _Things) -> dict[str, Tensor]:
        "The boxes and masks in the square, of all things of which at least a pixel is left there."
        edges = crop_boxes(torch.from_numpy(things.boxes[:, 1:]), things.width, things.height)
        sides = (edges[:, 2:] - edges[:, :2]) * self.size  # pixels
        is_kept = (sides >= 1 - 1e-4).all(1)
        boxes = torch.cat([torch.from_numpy(things.boxes[:, :1]), edges], 1)
        masks = np.zeros((0, things.height, things.width), dtype=bool)
        wanted = [outline for outline, keep in zip(things.outlines, is_kept) if keep and "instances" in self.keys]
        source = self._source("instances", file.parent.name)
        with _expected_form(source, f"a proper outline for all things in {file.name}"):
            if wanted:
                masks = np.stack([decode_outline(outline, things.width, things.height) for outline in wanted])
        return {"boxes": boxes[is_kept], "instances": torch.from_numpy(crop_map(masks, self.size))}

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        annotations = {kind: self._annotations[kind][index] for kind in self.kinds}
        parts: dict[str, Any] = {}
        sizes: dict[str, tuple[int, int]] = {}  # width and height, as each file gives them
        if "image" in self.keys:
            image = read_image(file)
            parts["image"] = square_tensor(image, self.size, file)
            sizes[file.name] = image.size
        if "captions" in annotations:
            parts["caption"] = annotations["captions"][0]
            parts["captions"] = list(annotations["captions"])
        if "instances" in annotations:
            things = annotations["instances"]
            parts |= self._boxes_and_instances(file, things)
            sizes[self._source("instances", file.parent.name).name] = (things.width, things.height)
        if "panoptic" in annotations:
            segments = annotations["panoptic"]
            classes, sizes[segments.file.name] = _read_segmentation(segments, self.size)
            parts["segmentation"] = torch.from_numpy(classes)
        if len(set(sizes.values())) > 1:
            told = " and ".join(f"{name} ({width} x {height} pixels)" for name, (width, height) in sizes.items())
            raise DataError(f"{file}: {told} do not fit; annotations go with the original image only")
        return {key: parts[key] for key in self.keys}
