"""COCO, in the layout of its official files: captions, boxes, outlines, panoptic maps."""

import gc
import json
import numpy as np
import re
import torch
import warnings
import zlib
from PIL import Image
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from jaxtyping import Bool, Float, Int
from pathlib import Path
from torch import Tensor
from torch.utils.data import Dataset
from typing import Any, ClassVar
from ldm_edu.data.batches import _check_keys, _check_size, _check_split
from ldm_edu.data.celeba import _read_text
from ldm_edu.data.folders import HOW, SHARES, SUFFIXES, _listing, find_folder, listing_checksum, split_by_name
from ldm_edu.data.images import _complaint, _fit, middle, read_image
from ldm_edu.data.toy.datasets import DRAWING_VERSION
from ldm_edu.errors import DataError

@contextmanager
def _form(path: Path, should: str) -> Iterator[None]:
    "Turns what goes wrong inside, where a file has another form, into a DataError that says what the form should be."
    collecting = gc.isenabled()
    gc.disable()  # millions of small objects are made inside, none of them garbage: looking for some takes longest
    try:
        yield
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path} should have {should} ({type(error).__name__}: {error})") from error
    finally:
        if collecting:
            gc.enable()


_POLYGONS = re.compile(r'"segmentation":\s*\[[^a-zA-Z{}"]*\]')  # nine tenths of a file of instances


def _read_json(path: Path, polygons: bool = True) -> dict[str, Any]:
    "A JSON file with an object in it; without polygons it is read several times faster."
    text = _read_text(path)
    try:
        content = json.loads(text if polygons else _POLYGONS.sub('"segmentation": null', text))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not whole JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} should have `images` and `annotations`, not a {type(content).__name__}")
    return content


def _joined(path: Path, content: dict) -> list[tuple[dict, list[dict]]]:
    "Every entry of `images`, by number, with its annotations; those that point to no entry are left out."
    images, notes = {image["id"]: image for image in content["images"]}, defaultdict(list)
    names = {image["file_name"] for image in images.values()}
    if not len(names) == len(images) == len(content["images"]):
        raise DataError(f"{path} has an image twice in `images`: numbers and file names should all differ")
    for note in content["annotations"]:
        notes[note["image_id"]].append(note)
    return [(images[number], notes[number]) for number in sorted(images)]


def read_captions(
    path: str | Path,  # a file in the form of COCO's captions_val2017.json
) -> dict[str, list[str]]:  # for every image's file name, its captions; empty where it has none
    "COCO's captions, in the order of their numbers."
    path, captions = Path(path), {}
    with _form(path, "`images` with id and file_name, and `annotations` with id, image_id and caption"):
        for image, notes in _joined(path, _read_json(path)):
            texts = [" ".join(note["caption"].split()) for note in sorted(notes, key=lambda note: note["id"])]
            captions[image["file_name"]] = [text for text in texts if text]
    return captions


def square_boxes(
    boxes: Float[Tensor, "k 4"],  # left, top, right, bottom, in pixels of the whole image
    width: int,  # of the whole image
    height: int,
) -> Float[Tensor, "k 4"]:
    "The same boxes as fractions of the side of the square in the middle, clipped to it."
    left, top, side = middle(width, height)
    return ((boxes - torch.tensor([left, top, left, top])) / side).clamp(0, 1)


def square_map(
    values: np.ndarray,  # (..., h, w) labels or masks of the whole image
    size: int,  # pixels along each side of the result
) -> np.ndarray:  # (..., size, size)
    "The square in the middle of a map, every pixel what stands at its centre."
    left, top, side = middle(values.shape[-1], values.shape[-2])
    steps = (2 * np.arange(size) + 1) * side // (2 * size)
    return values[..., (top + steps)[:, None], left + steps]


def _unpack_runs(counts: str) -> list[int]:
    "Run lengths from the text that pycocotools makes of them: 5 bits a character, differences to the last but one."
    runs, value, shift = [], 0, 0
    for code in (ord(character) - 48 for character in counts):
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:  # the last character of this number; its highest bit is the sign
            value -= (1 << shift) if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def decode_outline(
    outline: list | dict,  # polygons, or run lengths {"counts": ..., "size": [height, width]}
    width: int,  # of the whole image
    height: int,
) -> Bool[np.ndarray, "h w"]:
    "Which pixels belong to a thing; ValueError where the outline makes no sense."
    if isinstance(outline, dict):
        runs = _unpack_runs(outline["counts"]) if isinstance(outline["counts"], str) else outline["counts"]
        if list(outline["size"]) != [height, width] or min(runs) < 0 or sum(runs) != height * width:
            raise ValueError(f"run lengths should add up to {height} x {width} pixels")
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    polygons = [np.asarray(polygon, dtype=float) for polygon in outline]
    if not polygons or any(p.ndim != 1 or len(p) < 6 or len(p) % 2 or not np.isfinite(p).all() for p in polygons):
        raise ValueError("a polygon should have two numbers for each of its three or more corners")
    from pycocotools import mask

    parts = mask.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 has not heard of NumPy 2
        return mask.decode(mask.merge(parts)).astype(bool)


@dataclass
class Outlined:
    "The things in an image, in pixels of the whole image."
    width: int
    height: int
    boxes: Float[np.ndarray, "k 5"]  # class from 1, left, top, right, bottom
    outlines: list  # see `decode_outline`; empty where nobody asked for them


def _outlined(image: dict, notes: list[dict], classes: dict[int, int], outlines: bool) -> Outlined:
    notes = [note for note in notes if not note.get("iscrowd")]
    rows = [(classes[note["category_id"]], x, y, w, h) for note in notes for x, y, w, h in (note["bbox"],)]
    boxes = np.array(rows, dtype=np.float32).reshape(-1, 5)
    if not (boxes[:, 3:] >= 0).all() or not np.isfinite(boxes).all():
        raise ValueError(f"a box of {image['file_name']} has no proper size")
    boxes[:, 3:] += boxes[:, 1:3]
    shapes = [note["segmentation"] for note in notes] if outlines else []
    packed = [[np.array(p, dtype=float) for p in shape] if isinstance(shape, list) else shape for shape in shapes]
    return Outlined(int(image["width"]), int(image["height"]), boxes, packed)


def read_instances(
    path: str | Path,  # a file in the form of COCO's instances_val2017.json
    outlines: bool = True,  # also the outlines? They are most of the file
) -> tuple[list[str], dict[str, Outlined | None]]:  # the categories; for every file name its things, None where none is
    "COCO's things: which, where, and with what outline."
    path = Path(path)
    with _form(path, "`categories` with id and name, `images` with id, file_name, width and height, and `annotations` "
               "with image_id, category_id, bbox (four numbers) and segmentation"):
        content = _read_json(path, outlines)
        classes = {category["id"]: i for i, category in enumerate(content["categories"], start=1)}
        found = {image["file_name"]: _outlined(image, notes, classes, outlines) if notes else None
                 for image, notes in _joined(path, content)}
        return [category["name"] for category in content["categories"]], found


@dataclass
class Segmented:
    "Where the segments of an image are drawn, and what each is."
    file: Path  # the PNG
    numbers: Int[np.ndarray, "k"]  # that occur in it, sorted, 0 first
    classes: Int[np.ndarray, "k"]  # what each stands for: 0 for unlabelled, categories from 1


def read_panoptic(
    path: str | Path,  # a file in the form of COCO's panoptic_val2017.json; its PNGs lie in the folder of that name
) -> tuple[list[str], dict[str, Segmented | None]]:  # names of the classes; for every file name its segments, or None
    "COCO's segments."
    path, found = Path(path), {}
    with _form(path, "`categories` with id and name, `images` with id and file_name, and `annotations` with image_id, "
               "file_name and segments_info (each with id and category_id)"):
        content, folder = _read_json(path), path.with_suffix("")
        there = _listing(folder)
        classes = {category["id"]: i for i, category in enumerate(content["categories"], start=1)}
        for image, notes in _joined(path, content):
            note = notes[0] if notes and notes[0]["file_name"] in there else None
            table = sorted((s["id"], classes[s["category_id"]]) for s in note["segments_info"]) if note else []
            numbers, kinds = np.array([(0, 0), *table]).T
            found[image["file_name"]] = Segmented(folder / note["file_name"], numbers, kinds) if note else None
        return ["unlabelled", *(category["name"] for category in content["categories"])], found


def read_segmentation(
    segmented: Segmented,
    size: int,  # pixels along each side of the result
) -> tuple[Int[np.ndarray, "size size"], tuple[int, int]]:
    "The classes in the middle square, and width and height of the whole map."
    try:
        with Image.open(segmented.file) as image:
            if image.mode != "RGB":
                raise DataError(f"should be a PNG in three colours, not in mode {image.mode}")
            colours = np.asarray(image).astype(np.int64)
    except Exception as error:
        raise DataError(_complaint(segmented.file, error)) from error
    numbers = square_map(colours @ (1, 256, 256**2), size)
    places = np.searchsorted(segmented.numbers, numbers).clip(max=len(segmented.numbers) - 1)
    if (segmented.numbers[places] != numbers).any():
        raise DataError(f"{segmented.file} has colours that its JSON does not explain; take both from one release")
    return segmented.classes[places], (colours.shape[1], colours.shape[0])


COCO_FOLDERS = ("train2017", "val2017")


def coco_split(
    name: str,  # of the file
    folder: str,  # it lies in
    folders: Sequence[str],  # those of COCO_FOLDERS that are there
) -> str:
    "The course's split of a COCO image."
    if len(folders) == 1:
        return split_by_name(name)
    return "train" if folder == "train2017" else ("validation", "test")[zlib.crc32(name.encode()) % 2]


class COCO(Dataset):
    """Photographs with captions, things and segments, from the official folders or any subset of their images.

    `caption` is the first of `captions`. `boxes` (k, 5): class (from 1, in the order of `categories`), left, top,
    right, bottom as fractions; `instances` (k, h, w) belong to them. `segmentation` (h, w) counts in `segment_names`.
    """

    known_keys: ClassVar[dict[str, str]] = {  # what a sample can have, and the kind of file that says so
        "image": "", "caption": "captions", "captions": "captions", "boxes": "instances", "instances": "instances",
        "segmentation": "panoptic"}

    def __init__(
        self,
        root: str | Path,  # the folder with annotations/ in it, or the one above, where it is called coco
        split: str | None = None,  # a folder, or "train", "validation", "test" (see `coco_split`); None: everything
        size: int = 64,  # pixels along each side
        keys: Sequence[str] = ("image", "caption", "captions"),  # some of `known_keys`
    ):
        if split is not None:
            _check_split(split, (*SHARES, *COCO_FOLDERS))
        _check_size(size)
        self.root, self.split, self.size = find_folder(root, "annotations", "coco"), split, size
        self.keys = _check_keys(keys, tuple(self.known_keys))
        self.kinds = sorted({self.known_keys[key] for key in self.keys} - {""})
        self.categories, self.segment_names, self.files = [], [], []
        self._notes = {kind: [] for kind in self.kinds}  # what is known of each file
        self.missing, self.without = 0, dict.fromkeys(self.kinds, 0)  # images that are left out
        folders = [folder for folder in COCO_FOLDERS if (self.root / folder).is_dir()]
        wanted = [split] if split in COCO_FOLDERS else folders
        if not wanted or not set(wanted) <= set(folders):
            raise DataError(f"{self.root} contains no folder {' or '.join(wanted or COCO_FOLDERS)}; {HOW}")
        for folder in wanted:
            self._add(folder, folders)
        if not self.files:
            raise DataError(f"{self.root}: no image is left for split {split!r} with {', '.join(self.keys)}; "
                            f"without what these need: {self.without}")

    def _source(self, kind: str, folder: str) -> Path:
        return self.root / "annotations" / f"{kind}_{folder}.json"

    def _read(self, kind: str, folder: str) -> dict:
        "What one annotation file says of each image."
        path = self._source(kind, folder)
        if kind == "captions":
            return read_captions(path)
        if kind == "instances":
            (names, found), known = read_instances(path, "instances" in self.keys), self.categories
        else:
            (names, found), known = read_panoptic(path), self.segment_names
        if known and known != names:
            raise DataError(f"{path} has other categories than the file of {COCO_FOLDERS[0]}: they should be the same")
        known[:] = names
        return found

    def _add(self, folder: str, folders: list[str]) -> None:
        "Add the images of one folder that are in the split and have what is asked for."
        there = {name for name in _listing(self.root / folder) if name.lower().endswith(SUFFIXES)}
        found = {kind: self._read(kind, folder) for kind in self.kinds}
        listed = set().union(*found.values()) if found else there
        if not listed & there:
            raise DataError(f"{self.root / folder} contains none of the {len(listed)} images that are listed; {HOW}")
        self.missing += len(listed - there)
        for name in sorted(there):
            if self.split in SHARES and coco_split(name, folder, folders) != self.split:
                continue
            lacking = [kind for kind in self.kinds if not found[kind].get(name)]
            for kind in lacking:
                self.without[kind] += 1
            if not lacking:
                self.files.append(self.root / folder / name)
                for kind in self.kinds:
                    self._notes[kind].append(found[kind][name])

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> dict:
        "What decides the samples."
        sources = {self._source(kind, file.parent.name) for file in self.files for kind in self.kinds}
        maps = [segmented.file for segmented in self._notes.get("panoptic", [])]
        return {"data": "COCO", "version": DRAWING_VERSION, "split": self.split, "size": self.size,
                "keys": list(self.keys), "files": listing_checksum(self.root, [*sorted(sources), *self.files, *maps])}

    @property
    def captions(self) -> list[list[str]] | None:
        "All captions of each image; None where `keys` do not ask for captions."
        return self._notes.get("captions")

    def _things(self, file: Path, known: Outlined) -> dict[str, Tensor]:
        "Boxes and instances in the square."
        edges = square_boxes(torch.from_numpy(known.boxes[:, 1:]), known.width, known.height)
        kept = ((edges[:, 2:] - edges[:, :2]) * self.size >= 1 - 1e-4).all(1)
        masks = np.zeros((0, known.height, known.width), dtype=bool)
        if known.outlines and kept.any():
            with _form(self._source("instances", file.parent.name), f"a proper outline for all things in {file.name}"):
                outlines = [outline for outline, keep in zip(known.outlines, kept) if keep]
                masks = np.stack([decode_outline(outline, known.width, known.height) for outline in outlines])
        return {"boxes": torch.cat([torch.from_numpy(known.boxes[:, :1]), edges], 1)[kept],
                "instances": torch.from_numpy(square_map(masks, self.size))}

    def __getitem__(self, index: int) -> dict:
        file, parts, extents = self.files[index], {}, {}
        notes = {kind: self._notes[kind][index] for kind in self.kinds}
        if "image" in self.keys:
            image = read_image(file)
            parts["image"], extents[file] = _fit(image, self.size, file), image.size
        if "captions" in notes:
            parts |= {"caption": notes["captions"][0], "captions": list(notes["captions"])}
        if known := notes.get("instances"):
            parts |= self._things(file, known)
            extents[self._source("instances", file.parent.name)] = known.width, known.height
        if segmented := notes.get("panoptic"):
            classes, extents[segmented.file] = read_segmentation(segmented, self.size)
            parts["segmentation"] = torch.from_numpy(classes)
        first = next(iter(extents), file)
        if unlike := [path for path in extents if extents[path] != extents[first]]:
            sizes = ["{} ({} x {} pixels)".format(path.name, *extents[path]) for path in (first, unlike[0])]
            raise DataError(f"{file}: {' and '.join(sizes)} do not fit; annotations go with the original image only")
        return {key: parts[key] for key in self.keys}
