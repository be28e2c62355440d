"""MS-COCO, in the layout of its official files: captions, boxes, outlines and panoptic maps."""

import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from ldm_edu.checks import check_count, shown
from ldm_edu.data.batches import _check_keys, _check_size, _check_split, reading_sample
from ldm_edu.data.folders import DATA_HELP, IMAGE_SUFFIXES, SPLIT_SHARES
from ldm_edu.data.folders import find_folder, listing_checksum, name_bytes, names_in_folder, split_by_name
from ldm_edu.data.images import READING_VERSION, center_box, image_size, opened_image, read_image, square_tensor
from ldm_edu.errors import DataError
from ldm_edu.files import brief, read_json

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


def _polygon(corners: Any) -> Float[np.ndarray, "n"]:
    "The corners of a polygon, x and y in turn, as an array; ValueError where they are something else."
    polygon = np.array(corners)
    if polygon.ndim != 1 or polygon.dtype.kind not in "iuf" or len(polygon) % 2:
        raise ValueError("a polygon should have two numbers for each of its three or more corners")
    return polygon.astype(float)


def _is_flat(polygon: Float[np.ndarray, "n"]) -> bool:
    "Has a polygon fewer than three corners, or is it a line along a side of the image? Nothing can be inside of it."
    corners = polygon.reshape(-1, 2)
    return len(corners) < 3 or bool((corners == corners[0]).all(0).any())


def _are_empty(outline: dict[str, Any]) -> bool:
    "Are there no run lengths, or only one, of zeros?"
    counts, (height, width) = outline["counts"], outline["size"]
    if not isinstance(counts, str | list) or not isinstance(height, int) or not isinstance(width, int):
        raise TypeError("run lengths should have counts, a list or a text, and size, [height, width]")
    if isinstance(counts, list):
        return not counts or (not any(counts[1::2]) and sum(counts) == height * width)
    if not re.fullmatch("[P-o]{0,6}[0-O]", counts) or not 0 < height * width < MOST_PIXELS:
        return not counts
    zeros = _pycocotools().frPyObjects({"counts": [height * width], "size": [height, width]}, height, width)
    return counts == zeros["counts"].decode()


def _decode_polygons(outline: list[Any], width: int, height: int) -> Bool[np.ndarray, "h w"]:
    "The pixels inside any of the polygons."
    polygons = [_polygon(corners) for corners in outline]
    if not polygons or any(len(polygon) < 6 for polygon in polygons):
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
    """The mask of a thing from its outline in COCO's form. DataError where the outline makes no sense.

    Polygons are lists x1, y1, x2, y2, ... of corners. Run lengths are a list of numbers, or the text into which
    pycocotools packs them.
    """
    width, height = check_count("width", width), check_count("height", height)
    if width * height >= MOST_PIXELS:
        raise DataError(f"an image should have less than {MOST_PIXELS:,} pixels, not {width} x {height}")
    try:
        if isinstance(outline, dict):
            return _decode_runs(outline, width, height)
        return _decode_polygons(outline, width, height)
    except KeyError as error:
        raise DataError(f"outline: run lengths should have counts and size, and it lacks {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"outline: {error}") from error


# ---- Annotation files

_FORMS = {  # of each kind of file, the lists that it should have, and what every entry of them
    "captions": {
        "images": "id and file_name",
        "annotations": "id, image_id and caption (a text)",
    },
    "instances": {
        "categories": "id and name",
        "images": "id, file_name, width and height",
        "annotations": "id, image_id, category_id (one of `categories`), bbox (four numbers) and segmentation",
    },
    "panoptic": {
        "categories": "id and name",
        "images": "id and file_name",
        "annotations": "image_id, file_name and segments_info (each with id and category_id, one of `categories`)",
    },
}
_WRONG_FORM = (LookupError, TypeError, ValueError, AttributeError, OverflowError)
MOST_COORDINATE = 10**9  # of a box, in pixels


class _Things(NamedTuple):
    "The things in an image, in pixels of the whole image."

    width: int
    height: int
    boxes: Float[np.ndarray, "k 5"]  # class from 1, left, top, right, bottom
    outlines: list[Any]  # see `decode_outline`; None for each where nobody asked for them
    numbers: list[Any]  # the id of each annotation
    degenerate: int  # how many were left out, because nothing can be inside of their outlines


class _Segments(NamedTuple):
    "Where the segments of an image are drawn, and the class of each."

    file: Path  # the PNG
    classes: dict[int, int]  # of each id: 0 for unlabelled, categories from 1


class _Listed(NamedTuple):
    "An entry of `images`."

    number: Any
    name: str
    width: int  # 0 where the kind of file needs none
    height: int


class _Thing(NamedTuple):
    "An entry of `annotations` in a file of instances."

    image: Any
    number: Any
    box: tuple[float, ...]  # class, left, top, width, height
    outline: Any
    is_crowd: bool


def _record_name(record: Any) -> str:
    "The ids by which a person finds an entry of a list in a file again."
    ids = {key: record.get(key) for key in ("id", "image_id", "file_name")} if isinstance(record, dict) else {}
    told = ", ".join(f"{key} {shown(value)}" for key, value in ids.items() if value is not None)
    return f" ({told})" if told else ""


def _read_records(
    path: Path,
    content: Any,  # of the file
    kind: str,  # one of _FORMS
    name: str,  # of the list in it
    read: Callable[[dict[str, Any]], Any],
) -> list[Any]:
    "Every entry of a list in a JSON file, as `read` returns it; DataError names the file, and the entry that is wrong."
    form = _FORMS[kind][name]
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise DataError(f"{path} should have a list `{name}`, with {form} in every entry")
    found = []
    for i, record in enumerate(content[name]):
        try:
            found.append(read(record))
        except _WRONG_FORM as error:
            told = f"it lacks {error}" if isinstance(error, KeyError) else brief(error)
            raise DataError(f"{path}: `{name}`[{i}]{_record_name(record)} should have {form}: {told}") from error
    return found


def _plain_name(name: Any) -> str:
    "The last part of a file name, in front of which some programs write folders; ValueError where it leads elsewhere."
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or not parts[0] or re.match("[A-Za-z]:", name) or parts[-1] in ("", "."):
        raise ValueError(f"the file name {shown(name)} leads out of the folder of images")
    return parts[-1]


def _side(image: dict[str, Any], key: str) -> int:
    "The width or height of an image."
    side = image[key]
    if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= MOST_COORDINATE:
        raise ValueError(f"{key} should be a whole number of pixels of at least 1, not {shown(side)}")
    return side


def _id(record: dict[str, Any], key: str) -> Any:
    "An id, which some programs write as a text."
    if not isinstance(record[key], int | float | str):
        raise TypeError(f"{key} should be a number or a text, not {shown(record[key])}")
    return record[key]


def _category_of(record: dict[str, Any], classes: dict[Any, int]) -> int:
    "The class of an annotation or segment."
    number = _id(record, "category_id")
    if number not in classes:
        raise ValueError(f"no category has the id {shown(number)}")
    return classes[number]


def _caption_of(note: dict[str, Any]) -> tuple[Any, Any, str]:
    "The image, the number and the text of an annotation, without line ends and repeated spaces."
    if not isinstance(note["caption"], str):
        raise TypeError(f"a caption should be a text, not {shown(note['caption'])}")
    return _id(note, "image_id"), _id(note, "id"), " ".join(note["caption"].split())


def _box_of(note: dict[str, Any]) -> tuple[float, ...]:
    "Left edge, top edge, width and height of an annotation's box."
    box = note["bbox"]
    if len(box) != 4 or not {int, float}.issuperset(map(type, box)):
        raise ValueError("a box should have four numbers")
    if max(map(abs, box)) > MOST_COORDINATE or min(box[2:]) < 0:
        raise ValueError("the box has no proper size")
    return tuple(map(float, box))


def _outline_of(note: dict[str, Any]) -> list[np.ndarray] | dict[str, Any]:
    "The outline of a thing, polygons as arrays, which take less memory than lists; [] where nothing can be inside."
    outline = note["segmentation"]
    if isinstance(outline, list):
        return [polygon for polygon in map(_polygon, outline) if not _is_flat(polygon)]
    if not isinstance(outline, dict):
        raise TypeError(f"segmentation should be a list of polygons or run lengths, not {shown(outline)}")
    return [] if _are_empty(outline) else outline


def _thing_of(note: dict[str, Any], classes: dict[Any, int], outlines: bool) -> _Thing:
    "An annotation of a thing."
    is_crowd = bool(note.get("iscrowd"))
    outline = _outline_of(note) if outlines and not is_crowd else None
    box = (_category_of(note, classes), *_box_of(note))
    return _Thing(_id(note, "image_id"), _id(note, "id"), box, outline, is_crowd)


def _segments_of(note: dict[str, Any], classes: dict[Any, int]) -> tuple[Any, _Segments]:
    "The image of an annotation, and its segments, which are drawn in one PNG."
    table = {int(_id(segment, "id")): _category_of(segment, classes) for segment in note["segments_info"]}
    return _id(note, "image_id"), _Segments(Path(_plain_name(note["file_name"])), table | {0: 0})


def _things_in(image: _Listed, things: list[_Thing]) -> _Things | None:
    "The things of one image. Regions that stand for a whole crowd are left out: a box should mean one thing."
    if not things:
        return None
    singles = [thing for thing in things if not thing.is_crowd]
    kept = [thing for thing in singles if thing.outline is None or len(thing.outline)]
    boxes = np.array([thing.box for thing in kept], dtype=np.float32).reshape(len(kept), 5)
    boxes[:, 3:] += boxes[:, 1:3]
    outlines, numbers = [thing.outline for thing in kept], [thing.number for thing in kept]
    return _Things(image.width, image.height, boxes, outlines, numbers, len(singles) - len(kept))


def _by_image(notes: Iterable[tuple[Any, ...]]) -> dict[Any, list[Any]]:
    "Annotations by the image that they begin with."
    found = defaultdict(list)
    for note in notes:
        found[note[0]].append(note)
    return found


def _read_categories(path: Path, content: Any, kind: str) -> tuple[list[str], dict[Any, int]]:
    "The names of the categories, and the class of each id, from 1: COCO's own ids have gaps."
    if kind == "captions":
        return [], {}
    categories = _read_records(path, content, kind, "categories", lambda entry: (_id(entry, "id"), str(entry["name"])))
    classes = {number: i for i, (number, _) in enumerate(categories, start=1)}
    if len(classes) < len(categories):
        raise DataError(f"{path} has a category twice in `categories`: their ids should all differ")
    return [name for _, name in categories], classes


def _read_annotations(
    path: Path,
    kind: str,  # one of _FORMS
    outlines: bool,  # keep the outlines of things, too? They are most of the file
) -> tuple[list[str], dict[str, Any]]:
    "The names of the categories, and for every file name in `images` its annotations, empty or None without any."
    content = read_json(path, DataError, f"; {DATA_HELP}")
    sized = kind == "instances"

    def listed(entry: dict[str, Any]) -> _Listed:
        sides = (_side(entry, "width"), _side(entry, "height")) if sized else (0, 0)
        return _Listed(_id(entry, "id"), _plain_name(entry["file_name"]), *sides)

    images = _read_records(path, content, kind, "images", listed)
    names, classes = _read_categories(path, content, kind)
    readers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "captions": _caption_of,
        "instances": lambda note: _thing_of(note, classes, outlines),
        "panoptic": lambda note: _segments_of(note, classes),
    }
    notes = _by_image(_read_records(path, content, kind, "annotations", readers[kind]))
    found = {image.name: _annotations_of(kind, image, notes.get(image.number, [])) for image in images}
    if not len(found) == len({image.number for image in images}) == len(images):
        raise DataError(f"{path} has an image twice in `images`: numbers and file names should all differ")
    return names, found


def _annotations_of(kind: str, image: _Listed, notes: list[Any]) -> Any:
    "What one image has of a kind: captions in the order of their ids, things, or segments; empty or None without any."
    if kind == "captions":
        return [text for _, _, text in sorted(notes, key=lambda note: (isinstance(note[1], str), note[1])) if text]
    if kind == "instances":
        return _things_in(image, notes)
    return notes[0][1] if notes else None


def _read_segmentation(
    segments: _Segments,
    size: int,  # pixels along each side of the result
) -> Int[np.ndarray, "size size"]:
    "The classes in the square in the middle of a map."
    with opened_image(segments.file) as image:
        if image.mode != "RGB":
            raise DataError(f"should be a PNG in three colours, not in mode {image.mode}")
        red, green, blue = crop_map(np.moveaxis(np.asarray(image), -1, 0), size).astype(np.int64)
    known, places = np.unique(red + 256 * green + 256**2 * blue, return_inverse=True)
    if not set(known.tolist()) <= set(segments.classes):
        raise DataError(f"{segments.file} has colours that its JSON does not explain; take both from one release")
    classes = np.array([segments.classes[number] for number in known.tolist()])
    return classes[places.reshape(size, size)]


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
    return "train" if folder == "train2017" else ("validation", "test")[zlib.crc32(name_bytes(name)) % 2]


class COCO(Dataset[dict[str, Any]]):
    """Photographs with captions, things and segments, from the official folders or any subset of their images.

    Of the `known_keys`, a sample has those that `keys` asks for:

    - `image` (3, size, size) in [-1, 1]: the square in the middle, resized
    - `captions`: all captions; `caption`: the first of them
    - `boxes` (k, 5): class (from 1, in the order of `categories`), left, top, right, bottom as fractions of the side
    - `instances` (k, size, size): masks of the things in `boxes`
    - `segmentation` (size, size): classes in the order of `segment_names`, 0 for unlabelled

    Images that are not there are counted in `missing`, those without an annotation that is asked for in `without`.
    A box of which less than a pixel is left in the square is dropped, with its mask. Where `instances` are asked for, a
    thing whose outline encloses nothing (fewer than three corners, a line along a side, run lengths of zeros only) is left out with its box, and
    counted in `degenerate`. DataError names a file that is missing or damaged, or that does not belong to the image,
    and the entry of a JSON file that is wrong.
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
        self.root = find_folder(root, "annotations", "coco")
        self.split = split
        self.size = _check_size(size)
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
            hint = "; a larger subset has images of every split" * (split in SPLIT_SHARES)
            raise DataError(f"{self.root}: no image is left for split {split!r} with {needs}{hint}")
        self.degenerate = sum(things.degenerate for things in self._annotations.get("instances", []))

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
            "version": READING_VERSION,
            "split": self.split,
            "size": self.size,
            "keys": list(self.keys),
            "files": listing_checksum(self.root, [*sorted(sources), *self.files, *maps]),
        }

    @property
    def captions(self) -> list[list[str]] | None:
        "All captions of each image; None where `keys` do not ask for captions."
        return self._annotations.get("captions")

    def _mask(self, file: Path, things: _Things, i: int) -> Bool[np.ndarray, "size size"]:
        "The mask of a thing in the square. One at a time: a mask of the whole image is large."
        try:
            return crop_map(decode_outline(things.outlines[i], things.width, things.height), self.size)
        except DataError as error:
            source = self._source("instances", file.parent.name)
            number = shown(things.numbers[i])
            raise DataError(f"{source}: the annotation with id {number}, of {file.name}: {error}") from error

    def _boxes_and_instances(self, file: Path, things: _Things) -> dict[str, Tensor]:
        "The boxes and masks in the square, of all things of which at least a pixel is left there."
        edges = crop_boxes(torch.from_numpy(things.boxes[:, 1:]), things.width, things.height)
        sides = (edges[:, 2:] - edges[:, :2]) * self.size  # pixels
        is_kept = (sides >= 1 - 1e-4).all(1)
        boxes = torch.cat([torch.from_numpy(things.boxes[:, :1]), edges], 1)[is_kept]
        if "instances" not in self.keys:
            return {"boxes": boxes}
        masks = [self._mask(file, things, i) for i in is_kept.nonzero()[:, 0].tolist()]
        empty = np.zeros((0, self.size, self.size), dtype=bool)
        return {"boxes": boxes, "instances": torch.from_numpy(np.stack(masks) if masks else empty)}

    def _check_sizes(self, file: Path, image: tuple[int, int] | None, annotations: dict[str, Any]) -> None:
        "DataError where the files of an image do not agree in its width and height, before anything is drawn."
        sizes = {} if image is None else {file.name: image}
        if "instances" in annotations:
            things = annotations["instances"]
            sizes[self._source("instances", file.parent.name).name] = (things.width, things.height)
        if "panoptic" in annotations:
            sizes[annotations["panoptic"].file.name] = image_size(annotations["panoptic"].file)
        if len(set(sizes.values())) > 1:
            told = " and ".join(f"{name} ({width} x {height} pixels)" for name, (width, height) in sizes.items())
            raise DataError(f"{file}: {told} do not fit; annotations go with the original image only")

    def _sample(self, file: Path, annotations: dict[str, Any]) -> dict[str, Any]:
        "What a sample has of the keys that are asked for, and more."
        image = read_image(file) if "image" in self.keys else None
        is_masked = "instances" in self.keys
        self._check_sizes(file, image.size if image else image_size(file) if is_masked else None, annotations)
        parts: dict[str, Any] = {}
        if image:
            parts["image"] = square_tensor(image, self.size, file)
        if "captions" in annotations:
            parts["caption"] = annotations["captions"][0]
            parts["captions"] = list(annotations["captions"])
        if "instances" in annotations:
            parts |= self._boxes_and_instances(file, annotations["instances"])
        if "panoptic" in annotations:
            parts["segmentation"] = torch.from_numpy(_read_segmentation(annotations["panoptic"], self.size))
        return parts

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        annotations = {kind: self._annotations[kind][index] for kind in self.kinds}
        with reading_sample(file):
            parts = self._sample(file, annotations)
            return {key: parts[key] for key in self.keys}
