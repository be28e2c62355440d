"""Broken data, kind by kind: converted where that is right, else one DataError that names the file and what is right.

Every case breaks one thing in a sound folder. Those in READS_... must give a sample all the same; those in REFUSED_...
must end in a DataError with a message that matches, when the data set is opened or, at the latest, the sample is read.
"""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torch.utils.data import Dataset

from ldm_edu.data import celeba, coco, folders
from ldm_edu.data.celeba import CelebA
from ldm_edu.data.coco import COCO, decode_outline
from ldm_edu.data.folders import ImageFolder
from ldm_edu.data.images import image_size, load_image, to_tensor
from ldm_edu.errors import DataError

EVERYTHING = tuple(COCO.known_keys)
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)
GREY = PICTURE.convert("L")
RED = Image.new("RGB", (32, 32), (200, 0, 0))


def png_with_header(width: int, height: int) -> bytes:
    "A PNG whose header promises a size that its pixels do not have."
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"


def packed(picture: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noted(orientation: int) -> bytes:
    "An image that says how to turn it."
    note = Image.Exif()
    note[0x0112] = orientation
    return packed(PICTURE, "PNG", exif=note)


# ---- one image file


def grey(image: torch.Tensor) -> bool:
    return bool((image[0] == image[1]).all() and (image[1] == image[2]).all() and image.std() > 0.1)


def noise(image: torch.Tensor) -> bool:
    return torch.equal(image, to_tensor(PICTURE))


def same_grey(image: torch.Tensor) -> bool:
    return torch.equal(image, to_tensor(GREY.convert("RGB")))


def deep(picture: Image.Image, factor: int, dtype: type = np.uint16) -> Image.Image:
    "A grey image with more than 8 bits, its values multiplied."
    return Image.fromarray(np.asarray(picture).astype(dtype) * factor)


def tiff(pixels: bytes, bits: int, is_white_zero: bool) -> bytes:
    "A grey TIFF of 32 x 32 pixels, byte by byte: Pillow writes neither 12 bits nor a white of zero."
    tags = [(256, 32), (257, 32), (258, bits), (259, 1), (262, int(not is_white_zero)), (273, 134), (277, 1)]
    tags += [(278, 32), (279, len(pixels)), (284, 1)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def packed_12_bits() -> bytes:
    "Two values in three bytes; 4095 is white."
    values = (np.asarray(GREY).astype(int) * 4095 / 255).round().astype(int).reshape(-1, 2)
    return tiff(b"".join((a << 12 | b).to_bytes(3, "big") for a, b in values.tolist()), 12, False)


def colour_tiff(pixels: np.ndarray) -> bytes:
    "A TIFF of 32 x 32 pixels with 16 bits for each of three colours."
    raw = pixels.tobytes()
    tags = [(256, 4, 32), (257, 4, 32), (258, 3, 146), (259, 3, 1), (262, 3, 2), (273, 4, 152), (277, 3, 3)]
    tags += [(278, 4, 32), (279, 4, len(raw)), (284, 3, 1)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 3 if tag == 258 else 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    assert len(head) == 134
    return head + bytes(12) + struct.pack("<HHH", 16, 16, 16) + raw


def white_is_zero() -> bytes:
    return tiff((65535 - np.asarray(GREY).astype("<u2") * 257).tobytes(), 16, True)


def red(image: torch.Tensor) -> bool:
    return bool((image[0] > 0.4).all() and (image[1:] < -0.8).all())


def with_bad_exif() -> bytes:
    return packed(RED, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0")


READS_PICTURE: dict[str, tuple[str, Callable[[], bytes], Callable[[torch.Tensor], bool]]] = {
    "wrong extension: a PNG called .jpg": ("a.jpg", lambda: packed(PICTURE, "PNG"), noise),
    "wrong extension: a JPEG called .png": ("a.png", lambda: packed(RED), red),
    "greyscale": ("a.jpg", lambda: packed(GREY), grey),
    "black and white": ("a.png", lambda: packed(PICTURE.convert("1"), "PNG"), grey),
    "CMYK": ("a.jpg", lambda: packed(RED.convert("CMYK")), red),
    "palette": ("a.gif", lambda: packed(RED.quantize(4), "GIF"), red),
    "transparent": (
        "a.png",
        lambda: packed(Image.new("RGBA", (32, 32), (9, 9, 9, 0)), "PNG"),
        lambda x: (x == 1).all(),
    ),
    "grey with transparency": ("a.png", lambda: packed(GREY.convert("LA"), "PNG"), grey),
    "16 bits": ("a.png", lambda: packed(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"), grey),
    "32-bit file with 16-bit values": ("a.tif", lambda: packed(deep(GREY, 257, np.int32), "TIFF"), same_grey),
    "16-bit TIFF": ("a.tif", lambda: packed(deep(GREY, 257), "TIFF"), same_grey),
    "12 bits in 16, and a tag that says so": (
        "a.tif",
        lambda: packed(deep(GREY, 16), "TIFF", tiffinfo={281: 4095}),
        grey,
    ),
    "12 bits, packed": ("a.tif", packed_12_bits, same_grey),
    "16 bits whose white is zero": ("a.tif", white_is_zero, same_grey),
    "16 bits of nothing but black": ("a.tif", lambda: packed(deep(GREY, 0), "TIFF"), lambda x: (x == -1).all()),
    "a camera with two lenses": ("a.jpg", lambda: packed(RED, "MPO", save_all=True, append_images=[RED]), red),
    "lying on its side, with a note": (
        "a.png",
        lambda: noted(6),
        lambda x: torch.equal(x.rot90(1, (1, 2)), to_tensor(PICTURE)),
    ),
    "a note that is garbage": ("a.jpg", with_bad_exif, red),
    "something behind the end": ("a.jpg", lambda: packed(RED) + b"garbage" * 99, red),
    "several images in one file": ("a.gif", lambda: packed(RED, "GIF", save_all=True, append_images=[PICTURE]), red),
    "progressive": ("a.jpg", lambda: packed(RED, progressive=True), red),
    "very wide": ("a.png", lambda: packed(RED.resize((900, 5)), "PNG"), red),
}


@pytest.mark.parametrize("kind", READS_PICTURE)
def test_odd_pictures_are_converted(tmp_path, kind):
    name, content, right = READS_PICTURE[kind]
    (tmp_path / name).write_bytes(content())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Corrupt EXIF data")  # Pillow may say so: it is true
        image = load_image(tmp_path / name, 32)
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and image.abs().max() <= 1 and right(image)


REFUSED_PICTURE: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (lambda p: p.write_bytes(b""), "is empty.*copy it again"),
    "truncated JPEG": (lambda p: p.write_bytes(packed(PICTURE)[:700]), "not a whole image.*copy it again"),
    "truncated PNG": (lambda p: p.write_bytes(packed(PICTURE, "PNG")[:700]), "not a whole image.*copy it again"),
    "head only": (lambda p: p.write_bytes(packed(PICTURE)[:20]), "copy it again"),
    "broken inside": (lambda p: p.write_bytes(packed(PICTURE, "PNG").replace(b"IDAT", b"IDOT")), "copy it again"),
    "a text": (lambda p: p.write_text("no image"), "no image.*JPEG or PNG"),
    "a page of a web server": (lambda p: p.write_text("<html>404 Not Found</html>"), "no image.*JPEG or PNG"),
    "a kind that is not known": (
        lambda p: p.write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 99),
        "no image.*JPEG or PNG",
    ),
    "one pixel wide": (lambda p: RED.resize((1, 300)).save(p, "PNG"), "1 x 300 pixels, too few for 32 x 32"),
    "numbers without a white": (
        lambda p: Image.fromarray(np.eye(32, dtype=np.float32)).save(p, "TIFF"),
        "8 bits a channel",
    ),
    "values above 16 bits": (
        lambda p: Image.fromarray(np.full((32, 32), 70_000, np.int32)).save(p, "TIFF"),
        "8 bits a channel",
    ),
    "32 bits with 8-bit values": (
        lambda p: GREY.convert("I").save(p, "TIFF"),
        "only up to 2[45].* in 32 bits.*which value is white.*8 bits a channel",
    ),
    "12 bits in 16": (lambda p: deep(GREY, 16).save(p, "TIFF"), "only up to .* in 16 bits.*which value is white"),
    "12 bits in 16 and a statistic": (
        lambda p: deep(GREY, 16).save(p, "TIFF", tiffinfo={281: 4000}),
        "only up to .* in 16 bits.*which value is white",
    ),
    "12 bits in 16, in colours": (
        lambda p: p.write_bytes(colour_tiff(np.asarray(PICTURE).astype("<u2") * 16)),
        "only up to .* in 16 bits.*which value is white",
    ),
    "enormous": (
        lambda p: p.write_bytes(png_with_header(100_000, 100_000)),
        "is too large: 10,000,000,000 pixels, and the limit is 178,956,970; save it with fewer pixels",
    ),
    "PostScript": (lambda p: p.write_bytes(POSTSCRIPT), "no image.*JPEG or PNG"),
    "too few rows": (lambda p: p.write_bytes(png_with_header(32, 32)), "not a whole image"),
    "not there": (lambda p: None, "there is no such file"),
    "a folder": (lambda p: p.mkdir(), "a folder stands in its place.*image file should stand here"),
    "a link to nothing": (lambda p: p.symlink_to("gone.jpg"), "link that leads nowhere"),
    "a link to itself": (lambda p: p.symlink_to(p.name), "link leads back to itself.*image file should stand here"),
}


@pytest.mark.parametrize("kind", REFUSED_PICTURE)
def test_broken_pictures_are_refused(tmp_path, kind):
    make, says = REFUSED_PICTURE[kind]
    make(tmp_path / "the image.jpg")
    with pytest.raises(DataError, match=f"the image.jpg.*{says}"):
        load_image(tmp_path / "the image.jpg", 32)


# ---- folders


def folder_of_pictures(root: Path) -> None:
    for name in ("a.png", "deep/b.png", "deep/er/c.png"):
        (root / name).parent.mkdir(exist_ok=True)
        PICTURE.save(root / name)


def stranger(root: Path) -> None:
    PICTURE.save(os.fsencode(root) + b"/caf\xe9.png", "PNG")


READS_FOLDER: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a circle of linked folders": (lambda r: (r / "deep" / "er" / "round").symlink_to(r), ["a", "b", "c"]),
    "a folder linked twice": (lambda r: (r / "again").symlink_to(r / "deep"), ["a", "b", "c"]),
    "hidden files and folders": (lambda r: shutil.copytree(r / "deep", r / ".cache"), ["a", "b", "c"]),
    "other files beside the images": (lambda r: (r / "deep" / "notes.txt").write_text("x"), ["a", "b", "c"]),
    "a name in capitals": (lambda r: (r / "a.png").rename(r / "A.PNG"), ["A", "b", "c"]),
    "a folder that is called like an image": (lambda r: (r / "d.png").mkdir(), ["a", "b", "c"]),
    "a name that is no UTF-8": (stranger, ["a", "b", "caf\udce9", "c"]),
}


@pytest.mark.parametrize("kind", READS_FOLDER)
def test_odd_folders_are_read(tmp_path, kind):
    folder_of_pictures(tmp_path)
    change, stems = READS_FOLDER[kind]
    try:
        change(tmp_path)
    except OSError as error:
        pytest.skip(f"this file system cannot have that: {error}")
    dataset = ImageFolder(tmp_path, 32)
    assert sorted(file.stem for file in dataset.files) == sorted(stems)
    assert all(noise(sample["image"]) for sample in dataset) and json.dumps(dataset.identity())


REFUSED_FOLDER: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing in it": (lambda r: [shutil.rmtree(r), r.mkdir()], "contains no images"),
    "not there": (lambda r: shutil.rmtree(r), "no such folder"),
    "a file in its place": (lambda r: [shutil.rmtree(r), r.write_text("")], "no such folder"),
    "an image that is a dead link": (lambda r: (r / "b.jpg").symlink_to("gone"), "b.jpg.*link that leads nowhere"),
    "an image that vanished after opening": (None, "a.png.*no such file"),
}


@pytest.mark.parametrize("kind", REFUSED_FOLDER)
def test_broken_folders_are_refused(tmp_path, kind):
    root = tmp_path / "images"
    root.mkdir()
    folder_of_pictures(root)
    change, says = REFUSED_FOLDER[kind]
    if change:
        change(root)
    with pytest.raises(DataError, match=f"images.*{says}"):
        dataset = ImageFolder(root, 32)
        if not change:
            dataset.files[0].unlink()
        for i in range(len(dataset)):
            dataset[i]


# ---- CelebA


def celeba_folder(root: Path) -> None:
    "Six images with two attributes, all in the training split."
    (root / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06}.jpg" for i in range(1, 7)]
    for name in names:
        RED.save(root / "img_align_celeba" / name)
    (root / "list_attr_celeba.txt").write_text("6\nBald Smiling\n" + "".join(f"{n} 1 -1\n" for n in names))
    (root / "list_eval_partition.txt").write_text("".join(f"{n} 0\n" for n in names))


def rewrite(name: str, old: str, new: str, **options) -> Callable[[Path], object]:
    "A change that replaces a part of a text file."

    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1), **options)

    return change


ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"

READS_CELEBA: dict[str, Callable[[Path], object]] = {
    "line ends of Windows": rewrite(ATTRIBUTES, "", "", newline="\r\n"),
    "a mark in front of the text": rewrite(ATTRIBUTES, "6\n", "\ufeff6\n", encoding="utf-8"),
    "more spaces, and empty lines": rewrite(ATTRIBUTES, "000003.jpg 1 -1\n", "000003.jpg   1  -1 \n\n\n"),
    "no partition": lambda r: (r / PARTITION).unlink(),
    "an image that no list names": lambda r: RED.save(r / "img_align_celeba" / "999999.jpg"),
    "a partition of more images": rewrite(PARTITION, "000001.jpg 0\n", "000001.jpg 0\n999999.jpg 0\n"),
}


@pytest.mark.parametrize("kind", READS_CELEBA)
def test_odd_celeba_is_read(tmp_path, kind):
    celeba_folder(tmp_path)
    READS_CELEBA[kind](tmp_path)
    dataset = CelebA(tmp_path, size=16)
    assert len(dataset) >= 3 and dataset.missing == 0
    assert all(red(s["image"]) and s["attributes"].tolist() == [1, 0] for s in dataset)


def nest(root: Path) -> None:
    "Unpacked one level too deep."
    (root / "img_align_celeba").rename(root / "inner")
    (root / "img_align_celeba").mkdir()
    (root / "inner").rename(root / "img_align_celeba" / "img_align_celeba")


REFUSED_CELEBA: dict[str, tuple[Callable[[Path], object], str]] = {
    "a count of 5000 digits": (rewrite(ATTRIBUTES, "6\n", "6" * 5000 + "\n"), f"{ATTRIBUTES}.*should begin"),
    "an attribute named twice": (
        rewrite(ATTRIBUTES, "Bald Smiling", "Bald Bald"),
        f"{ATTRIBUTES}, line 2: the attribute Bald .*second time",
    ),
    "a partition that is a dead link": (
        lambda r: [(r / PARTITION).unlink(), (r / PARTITION).symlink_to("gone.txt")],
        f"{PARTITION} is a link that leads nowhere",
    ),
    "count too large": (rewrite(ATTRIBUTES, "6\n", "60\n"), f"{ATTRIBUTES}.*announces 60 files but lists 6"),
    "count too small": (rewrite(ATTRIBUTES, "6\n", "5\n"), f"{ATTRIBUTES}.*announces 5 files but lists 6"),
    "no count": (rewrite(ATTRIBUTES, "6\n", ""), f"{ATTRIBUTES}.*should begin"),
    "the form of another site": (rewrite(ATTRIBUTES, "6\nBald", "image_id,Bald"), f"{ATTRIBUTES}.*should begin"),
    "empty list": (lambda r: (r / ATTRIBUTES).write_text(""), f"{ATTRIBUTES}.*should begin"),
    "no list": (lambda r: (r / ATTRIBUTES).unlink(), f"{ATTRIBUTES} is missing.*README"),
    "a line cut short": (
        rewrite(ATTRIBUTES, "000003.jpg 1 -1", "000003.jpg 1"),
        f"{ATTRIBUTES}, line 5.*2 times 1 or -1",
    ),
    "a zero for no": (
        rewrite(ATTRIBUTES, "000003.jpg 1 -1", "000003.jpg 1 0"),
        f"{ATTRIBUTES}, line 5.*2 times 1 or -1",
    ),
    "an image listed twice": (rewrite(ATTRIBUTES, "000004", "000003"), f"{ATTRIBUTES}, line 6.*second time"),
    "a list that is no UTF-8": (
        lambda r: (r / ATTRIBUTES).write_bytes(b"6\n\xff\xfe"),
        f"{ATTRIBUTES}.*not text in UTF-8",
    ),
    "a folder for a list": (
        lambda r: [(r / ATTRIBUTES).unlink(), (r / ATTRIBUTES).mkdir()],
        f"{ATTRIBUTES}.*text file",
    ),
    "partition with a fourth split": (
        rewrite(PARTITION, "000002.jpg 0", "000002.jpg 3"),
        f"{PARTITION}, line 2.*0, 1 or 2",
    ),
    "partition with an image twice": (rewrite(PARTITION, "000002", "000001"), f"{PARTITION}, line 2.*second time"),
    "partition of too few images": (
        rewrite(PARTITION, "000002.jpg 0\n", ""),
        f"{PARTITION}.*1 of the images.*000002.jpg",
    ),
    "no image of this split": (
        lambda r: (r / PARTITION).write_text("".join(f"00000{i}.jpg 1\n" for i in range(1, 7))),
        "'train'",
    ),
    "no image at all": (
        lambda r: [p.unlink() for p in r.rglob("*.jpg")],
        "img_align_celeba contains none of the 6.*README",
    ),
    "unpacked too deep": (nest, "img_align_celeba contains none.*one folder higher"),
    "another folder": (lambda r: (r / "img_align_celeba").rename(r / "images"), "neither img_align_celeba/.*README"),
    "a broken image": (lambda r: (r / "img_align_celeba" / "000003.jpg").write_bytes(b""), "000003.jpg is empty"),
}


@pytest.mark.parametrize("kind", REFUSED_CELEBA)
def test_broken_celeba_is_refused(tmp_path, kind):
    celeba_folder(tmp_path)
    change, says = REFUSED_CELEBA[kind]
    change(tmp_path)
    refused(lambda: CelebA(tmp_path, size=16), says)


def refused(opened: Callable[[], Dataset], says: str) -> None:
    "Opening the data set or reading its samples ends in a DataError that says so."
    with pytest.raises(DataError, match=f"(?s){says}"):
        for sample in opened():
            assert sample


# ---- COCO


def coco_folder(root: Path) -> None:
    "Three images with two captions, a box and a segment each."
    (root / "val2017").mkdir(parents=True)
    (root / "annotations" / "panoptic_val2017").mkdir(parents=True)
    images, captions, instances, panoptic = [], [], [], []
    for i in range(3):
        name = f"{i:012}"
        images.append({"id": i, "file_name": f"{name}.jpg", "width": 32, "height": 32})
        captions += [{"id": 2 * i + k, "image_id": i, "caption": f"red {k}"} for k in range(2)]
        corners = [4, 4, 20, 4, 20, 12, 4, 12]
        box = {"bbox": [4, 4, 16, 8], "segmentation": [corners], "iscrowd": 0}
        instances.append({"id": i, "image_id": i, "category_id": 7, **box})
        panoptic.append({"image_id": i, "file_name": f"{name}.png", "segments_info": [{"id": 9, "category_id": 7}]})
        RED.save(root / "val2017" / f"{name}.jpg")
        Image.new("RGB", (32, 32), (9, 0, 0)).save(root / "annotations" / "panoptic_val2017" / f"{name}.png")
    kinds = [{"id": 7, "name": "thing"}]
    for kind, notes in (("captions", captions), ("instances", instances), ("panoptic", panoptic)):
        content = {"images": images, "annotations": notes, "categories": kinds}
        (root / "annotations" / f"{kind}_val2017.json").write_text(json.dumps(content))


def file(kind: str) -> str:
    return f"annotations/{kind}_val2017.json"


def edit(kind: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    "A change in an annotation file."

    def changed(root: Path) -> None:
        path = root / file(kind)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return changed


def note(kind: str, **parts) -> Callable[[Path], object]:
    "A change of the second image's first annotation; `None` removes a part."

    def change(content: dict) -> None:
        found = next(note for note in content["annotations"] if note["image_id"] == 1)
        for key, value in parts.items():
            found.pop(key) if value is None else found.update({key: value})

    return edit(kind, change)


def null_outline(root: Path) -> None:
    edit("instances", lambda content: content["annotations"][1].update(segmentation=None))(root)


def drop_notes(content: dict) -> None:
    content["annotations"] = [note for note in content["annotations"] if note["image_id"] != 1]


def write_map(picture: Image.Image | bytes) -> Callable[[Path], object]:
    content = picture if isinstance(picture, bytes) else packed(picture, "PNG")
    return lambda root: (root / MAP).write_bytes(content)


ONE = f"{1:012}"
NOTE = r"`annotations`\[1\] \(id 1, image_id 1\)"
RECORD = rf"instances.*`images`\[1\] \(id 1, file_name '{ONE}.jpg'\)"
JPG, MAP = f"val2017/{ONE}.jpg", f"annotations/panoptic_val2017/{ONE}.png"
RUNS = {"counts": [32 * 4 + 4, 8, 32 * 27 + 20], "size": [32, 32]}
ORPHAN = {
    "id": 99,
    "image_id": 99,
    "caption": "x",
    "category_id": 7,
    "bbox": [0, 0, 9, 9],
    "segmentation": [],
    "file_name": "x.png",
    "segments_info": [],
}


def rename_all(prefix: str) -> Callable[[Path], object]:
    "Folders in front of every file name."

    def change(root: Path) -> None:
        for kind in ("captions", "instances", "panoptic"):
            edit(kind, lambda c: [image.update(file_name=prefix + image["file_name"]) for image in c["images"]])(root)

    return change


def texts_for_ids(content: dict) -> None:
    for image in content["images"]:
        image["id"] = str(image["id"])
    for annotation in content["annotations"]:
        annotation |= {"id": str(annotation["id"]), "image_id": str(annotation["image_id"])}


DEGENERATE = {
    "a polygon of two corners",
    "a polygon of no corners",
    "no outline",
    "a polygon that is a line",
    "empty run lengths",
    "run lengths of nothing",
    "empty packed run lengths",
    "packed run lengths of nothing",
}
READS_COCO: dict[str, tuple[Callable[[Path], object], int]] = {
    "an image without captions": (edit("captions", drop_notes), 2),
    "a caption of nothing but spaces": (
        edit("captions", lambda c: [n.update(caption=" \n") for n in c["annotations"][2:4]]),
        2,
    ),
    "an image without boxes": (edit("instances", drop_notes), 2),
    "an image without segments": (edit("panoptic", drop_notes), 2),
    "a map that is not there": (lambda r: (r / MAP).unlink(), 2),
    "an annotation of an image that is not there": (lambda r: (r / JPG).unlink(), 2),
    "annotations without image": (
        lambda r: [
            edit(k, lambda c: c["annotations"].append(ORPHAN))(r) for k in ("captions", "instances", "panoptic")
        ],
        3,
    ),
    "an image that no file names": (lambda r: RED.save(r / "val2017" / "stranger.jpg"), 3),
    "line ends in captions": (note("captions", caption=" red\n 0 \r\n"), 3),
    "a box that leaves the image": (note("instances", bbox=[-10, -10, 100, 100]), 3),
    "a box beside the image": (note("instances", bbox=[40, 4, 10, 10]), 3),
    "a box of no width": (note("instances", bbox=[4, 4, 0, 10]), 3),
    "run lengths for a polygon": (note("instances", segmentation=RUNS), 3),
    "a folder in front of the name": (rename_all("val2017/"), 3),
    "folders in front, as Windows writes them": (rename_all("images\\val2017\\"), 3),
    "ids that are texts": (edit("captions", texts_for_ids), 3),
    "a polygon of two corners": (note("instances", segmentation=[[1, 1, 2, 2]]), 3),
    "a polygon of no corners": (note("instances", segmentation=[[]]), 3),
    "no outline": (note("instances", segmentation=[]), 3),
    "a polygon that is a line": (note("instances", segmentation=[[1, 1, 1, 9, 1, 20]]), 3),
    "two corners beside a polygon": (note("instances", segmentation=[[1, 1, 2, 2], [4, 4, 20, 4, 20, 12]]), 3),
    "empty run lengths": (note("instances", segmentation={"counts": [], "size": [32, 32]}), 3),
    "run lengths of nothing": (note("instances", segmentation={"counts": [1024], "size": [32, 32]}), 3),
    "empty packed run lengths": (note("instances", segmentation={"counts": "", "size": [32, 32]}), 3),
    "packed run lengths of nothing": (note("instances", segmentation={"counts": "PP1", "size": [32, 32]}), 3),
    "a crowd": (note("instances", iscrowd=1, segmentation=RUNS), 3),
    "a part of a map without label": (write_map(Image.new("RGB", (32, 32))), 3),
}


@pytest.mark.parametrize("kind", READS_COCO)
def test_odd_coco_is_read(tmp_path, kind):
    coco_folder(tmp_path)
    change, left = READS_COCO[kind]
    change(tmp_path)
    dataset = COCO(tmp_path, size=16, keys=EVERYTHING)
    assert len(dataset) == left
    assert dataset.degenerate == (kind in DEGENERATE)
    counted = dataset.missing + sum(dataset.without.values())
    assert counted == 3 - left or kind == "an image that no file names" and counted == 3
    for sample in dataset:
        assert red(sample["image"]) and sample["captions"] == ["red 0", "red 1"][: len(sample["captions"])]
        assert len(sample["boxes"]) == len(sample["instances"]) <= 1 and sample["segmentation"].max() <= 1
        assert ((sample["boxes"][:, 1:] >= 0) & (sample["boxes"][:, 1:] <= 1)).all()


REFUSED_COCO: dict[str, tuple[Callable[[Path], object], str]] = {
    "malformed JSON": (
        lambda r: (r / file("captions")).write_text('{"images": ['),
        "captions.*is not JSON.*copy it again",
    ),
    "empty JSON": (lambda r: (r / file("instances")).write_text(""), "instances.*is not JSON.*copy it again"),
    "JSON of another kind": (lambda r: (r / file("captions")).write_text("[]"), "captions.*`images`"),
    "JSON that is no UTF-8": (lambda r: (r / file("captions")).write_bytes(b'{"\xff'), "captions.*UTF-8"),
    "no annotation file": (lambda r: (r / file("panoptic")).unlink(), "panoptic_val2017.json is missing.*README"),
    "no folder of maps": (
        lambda r: shutil.rmtree(r / "annotations" / "panoptic_val2017"),
        "panoptic_val2017 cannot be read.*README",
    ),
    "no folder of images": (lambda r: shutil.rmtree(r / "val2017"), "no folder train2017 or val2017.*README"),
    "no images": (lambda r: [p.unlink() for p in r.rglob("*.jpg")], "val2017 contains none of the 3.*README"),
    "annotations of other images": (
        edit("captions", lambda c: [i.update(file_name=f"{i['id']}.jpg") for i in c["images"]]),
        "no image is left.*'captions': 3",
    ),
    "an image listed twice": (
        edit("instances", lambda c: c["images"].append(c["images"][0])),
        "instances.*image twice",
    ),
    "images without names": (edit("captions", lambda c: c["images"][0].pop("file_name")), "captions.*file_name"),
    "a caption that is no text": (note("captions", caption=3), "captions.*caption"),
    "an annotation without number": (note("captions", id=None), "captions.*id, image_id and caption"),
    "a category that is not explained": (note("instances", category_id=8), "instances.*`categories`"),
    "a box of three numbers": (note("instances", bbox=[1, 2, 3]), "instances.*bbox.*four numbers"),
    "a box of negative size": (note("instances", bbox=[9, 9, -3, 4]), "instances.*no proper size"),
    "a box that is no number": (note("instances", bbox=[9, 9, float("nan"), 4]), "instances.*NaN is no number"),
    "a box without an end": (note("instances", bbox=[9, 9, 10**400, 4]), f"instances.*{NOTE}.*no proper size"),
    "a box of texts": (note("instances", bbox=["1", "2", "3", "4"]), f"instances.*{NOTE}.*four numbers"),
    "half a corner": (note("instances", segmentation=[[1, 1, 9, 1, 9, 9, 4]]), f"instances.*{NOTE}.*corners"),
    "corners of texts": (
        note("instances", segmentation=[["1", "1", "9", "1", "9", "9"]]),
        f"instances.*{NOTE}.*corners",
    ),
    "an outline that is a number": (note("instances", segmentation=3), f"instances.*{NOTE}.*polygons or run lengths"),
    "an outline that is null": (null_outline, f"instances.*{NOTE}.*polygons or run lengths, not None"),
    "run lengths without a size": (note("instances", segmentation={"counts": [9]}), f"instances.*{NOTE}.*lacks 'size'"),
    "an annotation that is a list": (
        edit("instances", lambda c: c["annotations"].append([1])),
        r"instances.*`annotations`\[3\] should have id",
    ),
    "an image that is a text": (edit("captions", lambda c: c["images"].append("x")), r"captions.*`images`\[3\] should"),
    "an image without a width": (edit("instances", lambda c: c["images"][1].pop("width")), f"{RECORD}.*lacks 'width'"),
    "a width of zero": (
        edit("instances", lambda c: c["images"][1].update(width=0)),
        f"{RECORD}.*width.*at least 1, not 0",
    ),
    "a negative height": (edit("instances", lambda c: c["images"][1].update(height=-32)), f"{RECORD}.*height.*not -32"),
    "half a pixel": (edit("instances", lambda c: c["images"][1].update(width=32.5)), f"{RECORD}.*width.*not 32.5"),
    "a width of true": (edit("instances", lambda c: c["images"][1].update(width=True)), f"{RECORD}.*width.*not True"),
    "a width in words": (edit("instances", lambda c: c["images"][1].update(width="32")), f"{RECORD}.*width.*not '32'"),
    "a width of 10,000 digits": (
        lambda r: (r / file("instances")).write_text(
            (r / file("instances")).read_text().replace('"width": 32', '"width": ' + "3" * 4000, 1)
        ),
        r"instances.*`images`\[0\].*width",
    ),
    "a category twice": (edit("instances", lambda c: c["categories"].append(c["categories"][0])), "category twice"),
    "an image above its folder": (
        edit("captions", lambda c: c["images"][1].update(file_name="../../x.jpg")),
        r"captions.*`images`\[1\].*leads out",
    ),
    "an image at the root": (
        edit("captions", lambda c: c["images"][1].update(file_name="/etc/x.jpg")),
        r"captions.*`images`\[1\].*leads out",
    ),
    "an image on a drive": (
        edit("captions", lambda c: c["images"][1].update(file_name="C:\\x.jpg")),
        r"captions.*`images`\[1\].*leads out",
    ),
    "an image without letters": (
        edit("captions", lambda c: c["images"][1].update(file_name="")),
        r"captions.*`images`\[1\].*leads out",
    ),
    "a map above its folder": (note("panoptic", file_name="../x.png"), "panoptic.*`annotations`.*leads out"),
    "a list that is a number": (
        edit("captions", lambda c: c.update(images=3)),
        "captions.*should have a list `images`",
    ),
    "lists without end": (lambda r: (r / file("captions")).write_text("[" * 10**5), "captions.*nested too deeply"),
    "run lengths of another image": (
        note("instances", segmentation=RUNS | {"size": [9, 9]}),
        f"instances.*{ONE}.jpg.*32 x 32",
    ),
    "run lengths that do not add up": (
        note("instances", segmentation=RUNS | {"counts": [5]}),
        f"instances.*{ONE}.jpg.*add up",
    ),
    "run lengths that are garbage": (
        note("instances", segmentation=RUNS | {"counts": "garbage"}),
        f"instances.*{ONE}.jpg",
    ),
    "run lengths of too few pixels": (
        note("instances", segmentation=RUNS | {"counts": "T44b0"}),
        f"instances.*{ONE}.jpg.*add up",
    ),
    "run lengths of no pixels": (
        note("instances", segmentation=RUNS | {"counts": "0"}),
        f"instances.*{ONE}.jpg.*add up",
    ),
    "run lengths that end midway": (
        note("instances", segmentation=RUNS | {"counts": "0oo"}),
        f"instances.*{ONE}.jpg.*add up",
    ),
    "a negative run length": (
        note("instances", segmentation=RUNS | {"counts": [-1, 1025]}),
        f"instances.*{ONE}.jpg.*add up",
    ),
    "a corner far away": (
        note("instances", segmentation=[[1, 1, 1e10, 1, 9, 9]]),
        f"instances.*{ONE}.jpg.*lie in the image",
    ),
    "a corner nowhere": (
        lambda r: rewrite(file("instances"), "[[4, 4, 20, 4", "[[4, 4, 1e999, 4")(r),
        f"instances.*{0:012}.jpg.*lie in the image",
    ),
    "a polygon without end": (
        note("instances", segmentation=[[0, 0, 300, 300] * 5000]),
        f"instances.*{ONE}.jpg.*lie in the image",
    ),
    "an image too large for masks": (
        edit("instances", lambda c: [i.update(width=10**9, height=10**9) for i in c["images"]]),
        "instances_val2017.json .1000000000 x 1000000000 pixels.*original",
    ),
    "an image of another size": (lambda r: RED.resize((16, 16)).save(r / JPG), f"{ONE}.jpg.*16 x 16.*original"),
    "a map of another size": (write_map(Image.new("RGB", (16, 16), (9, 0, 0))), f"{ONE}.png .16 x 16 pixels.*original"),
    "a map in grey": (write_map(Image.new("L", (32, 32), 9)), f"{ONE}.png.*three colours"),
    "a map cut off": (write_map(packed(PICTURE, "PNG")[:700]), f"{ONE}.png.*copy it again"),
    "a map with other colours": (write_map(Image.new("RGB", (32, 32), (8, 0, 0))), f"{ONE}.png.*does not explain"),
    "segments without numbers": (note("panoptic", segments_info=[{"category_id": 7}]), "panoptic.*segments_info"),
    "a broken image": (lambda r: (r / JPG).write_bytes(packed(RED)[:300]), f"{ONE}.jpg"),
}


@pytest.mark.parametrize("kind", REFUSED_COCO)
def test_broken_coco_is_refused(tmp_path, kind):
    coco_folder(tmp_path)
    change, says = REFUSED_COCO[kind]
    change(tmp_path)
    refused(lambda: COCO(tmp_path, size=16, keys=EVERYTHING), says)


def test_the_sound_folders_are_sound(tmp_path):
    for make, opened in ((folder_of_pictures, ImageFolder), (celeba_folder, CelebA), (coco_folder, COCO)):
        root = tmp_path / make.__name__
        root.mkdir()
        make(root)
        dataset = opened(root, size=16)
        assert len(dataset) == len(list(dataset)) > 2 and getattr(dataset, "missing", 0) == 0
    sample = COCO(tmp_path / "coco_folder", size=16, keys=EVERYTHING)[1]
    torch.testing.assert_close(sample["boxes"], torch.tensor([[1, 4 / 32, 4 / 32, 20 / 32, 12 / 32]]))
    assert sample["instances"][0].sum() == 8 * 4 and (sample["segmentation"] == 1).all()


# ---- what hostile files could do


def test_postscript_called_jpg_starts_no_program(tmp_path, monkeypatch):
    """Pillow would run Ghostscript, which then reads and writes what the file tells it to."""
    script = tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\n[ $1 = --version ] || touch '{tmp_path}/started'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for anew
    (tmp_path / "a.jpg").write_bytes(POSTSCRIPT)
    with pytest.raises(OSError), Image.open(tmp_path / "a.jpg") as image:
        image.load()
    assert (tmp_path / "started").exists()  # the stand-in is found: what follows tests something
    (tmp_path / "started").unlink()
    coco_folder(tmp_path / "coco")
    shutil.copy(tmp_path / "a.jpg", tmp_path / "coco" / MAP)
    maps = COCO(tmp_path / "coco", keys=("segmentation",))
    for read in (
        lambda: load_image(tmp_path / "a.jpg", 32),
        lambda: image_size(tmp_path / "a.jpg"),
        lambda: list(maps),
    ):
        with pytest.raises(DataError, match="is no image, or of a kind that cannot be read here"):
            read()
    assert not (tmp_path / "started").exists()


def test_masks_of_large_images_are_drawn_one_at_a_time_and_within_a_bound(tmp_path, monkeypatch):
    coco_folder(tmp_path)
    dataset, drawn = COCO(tmp_path, keys=("boxes", "instances")), []
    monkeypatch.setattr(coco, "decode_outline", lambda *args: drawn.append(args) or decode_outline(*args))
    edit("instances", lambda content: content["images"][1].update(width=10**5, height=10**5))(tmp_path)
    wrong = COCO(tmp_path, keys=("boxes", "instances"))
    with pytest.raises(DataError, match=f"{ONE}.jpg .32 x 32 pixels.*100000 x 100000 pixels.*do not fit"):
        wrong[1]
    assert not drawn and len(dataset[1]["instances"]) == len(drawn) == 1
    monkeypatch.setattr(coco, "MOST_PIXELS", 1000)
    with pytest.raises(DataError, match=f"instances.*id 1, of {ONE}.jpg: an image should have less than 1,000 pixels"):
        dataset[1]


def test_an_index_error_from_reading_does_not_end_a_loop_in_silence(tmp_path, monkeypatch):
    """Python takes an IndexError of an indexable for its end, and a StopIteration for that of a loop."""
    for make, opened in ((folder_of_pictures, ImageFolder), (celeba_folder, CelebA), (coco_folder, COCO)):
        root = tmp_path / make.__name__
        root.mkdir()
        make(root)
        dataset = opened(root, size=16)
        with pytest.raises(IndexError):
            dataset[len(dataset)]
        for error in (IndexError("list index out of range"), StopIteration()):

            def fail(*_, error=error):
                raise error

            for module in (folders, celeba, coco):
                monkeypatch.setattr(module, "load_image" if module is not coco else "read_image", fail)
            with pytest.raises(
                DataError, match=f"{re.escape(str(dataset.files[0]))} cannot be read .{type(error).__name__}"
            ):
                list(dataset)


HOSTILE_OUTLINES = """
import resource, sys
from ldm_edu.data import DataError, decode_outline
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 6 * 2**30,) * 2)
refused = 0
for far in (1e5, 1e6, 1e7, 1e8, -5e8, 1e9, 3e9, 1e10, 1e12, 1e18, 1e300, float("inf"), float("nan")):
    for x in (far, -far):
        for outline in ([[x, 0, 0, x, 5, 5]], [[0, 0, x, 1, 1, 5]], [[1, x, 9, 9, x, 2]]):
            try:
                decode_outline(outline, 32, 32)
            except DataError:
                refused += 1
for width, height in ((10**5, 10**5), (20_000, 20_000), (1, 10**12), (0, 32), (-32, 32), (2**63, 2**63)):
    for outline in ([[0, 0, 9, 0, 9, 9]], {"counts": [width * height], "size": [height, width]}):
        try:
            decode_outline(outline, width, height)
        except ValueError:
            refused += 1
print(refused)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_corners_far_away_and_sides_without_end_take_no_memory():
    done = subprocess.run([sys.executable, "-c", HOSTILE_OUTLINES], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, str(13 * 2 * 3 + 6 * 2)), done.stderr


@pytest.mark.parametrize(
    "outline",
    [3, None, "x", [3], [["a"] * 6], [[None] * 6], [[[1, 2], [3, 4], [5, 6]]], {}, {"counts": [1]}, {"size": [9, 9]},
     {"counts": None, "size": [9, 9]}, {"counts": [1, "2"], "size": [9, 9]}, {"counts": [81], "size": 9},
     {"counts": [[81]], "size": [9, 9]}, {"counts": [2**80], "size": [9, 9]}, [[1, float("nan"), 9, 1, 9, 9]]],
)  # fmt: skip
def test_outlines_of_another_form_are_refused_with_our_error(outline):
    with pytest.raises((DataError, TypeError), match="outline|run lengths|parameter"):
        decode_outline(outline, 9, 9)
