"""Image files as tensors: read whole, in sRGB, turned upright, cropped to a square and resized."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm_edu.data.batches import data_count
from ldm_edu.errors import DataError
from ldm_edu.files import brief, reason

__all__ = ["read_image", "load_image", "to_tensor"]

READING_VERSION = 2  # goes up whenever a file is read in another way than before: caches of it are made again
MAX_ENLARGEMENT = 8  # an image whose shorter side would have to be enlarged more than this is refused

# What cameras, phones and the web write, and Pillow decodes by itself. Others would start programs: for a PostScript
# file Pillow runs Ghostscript, whatever the file's name says. (JPEG includes the MPO of cameras with two lenses.)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF") + ("AVIF",) * bool(find_spec("PIL.AvifImagePlugin"))


def from_uint8(pixels: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    "Bytes 0 to 255 as numbers in [-1, 1]; the inverse of `to_uint8`."
    return pixels.float().div_(127.5).sub_(1)


def to_tensor(image: Image.Image) -> Float[Tensor, "3 h w"]:
    "An 8-bit RGB image as a tensor in [-1, 1]."
    return from_uint8(torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1))


# ---- Opening


def _describe_size(error: Exception) -> str:
    "What is wrong with an image of which Pillow says that it has too many pixels, and what to do."
    numbers = re.findall(r"\d+", str(error))[:2]
    told = f": {int(numbers[0]):,} pixels, and the limit is {int(numbers[1]):,}" if len(numbers) == 2 else ""
    return (
        f"is too large{told}; save it with fewer pixels, or raise PIL.Image.MAX_IMAGE_PIXELS, of which the limit is "
        "twice, if the file comes from somebody you trust"
    )


def _describe_error(path: Path, error: Exception) -> str:
    "A sentence that says what is wrong with an image file and what to do."
    if isinstance(error, DataError):
        return f"{path} {error}"
    if isinstance(error, FileNotFoundError):
        return f"{path}: " + ("a link that leads nowhere" if path.is_symlink() else "there is no such file")
    if isinstance(error, UnidentifiedImageError):
        what = "is empty" if not path.stat().st_size else "is no image, or of a kind that cannot be read here"
        return f"{path} {what}; copy it again, save it as JPEG or PNG, or remove it"
    if isinstance(error, OSError) and error.errno:
        return f"{path} cannot be read: {reason(error)}; an image file should stand here"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"{path} {_describe_size(error)}"
    if isinstance(error, MemoryError):
        return f"{path} needs more memory than there is; save it with fewer pixels"
    return f"{path} is not a whole image ({brief(error)}); copy it again or remove it"


@contextmanager
def opened_image(path: str | Path) -> Iterator[Image.Image]:
    "An image file, open; whatever goes wrong with it inside the block becomes a DataError that names the file."
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except Exception as error:  # Pillow reports broken files by many kinds of error
        raise DataError(_describe_error(Path(path), error)) from error


# ---- Depth

_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257  # tags: pixels as they are stored
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_MOST = 258, 262, 281  # tags: bits a sample, is white 0?, the largest value
_UNKNOWN_WHITE = 4096  # cameras and scanners keep 10 or 12 bits in 16: what stays below may have any white


def _unknown_depth(most: int, bits: int) -> DataError:
    "The error for an image of which nobody knows which value is white."
    return DataError(
        f"has values only up to {most} in {bits} bits a channel, and nothing says which value is white: "
        "save it with 8 bits a channel"
    )


def _white(
    image: Image.Image,  # as it was opened
    most: int,  # the largest value in it
) -> int:
    "The value of white in a grey image with more than 8 bits a pixel; DataError where nothing tells it."
    if image.format != "TIFF":
        return 65535  # a PNG with 16 bits uses all of them
    tags = getattr(image, "tag_v2", {})
    bits, told = int(np.max(tags.get(_TIFF_BITS, 16))), int(np.max(tags.get(_TIFF_MOST, 0)))
    if bits < 16:
        return 2**bits - 1
    # The tag may also be what it is called, the largest value that occurs: then it is no full number of bits.
    if told >= max(most, 255) and told < 65536 and (told & (told + 1)) == 0:
        return told
    if 0 < most < _UNKNOWN_WHITE:
        raise _unknown_depth(most, bits)
    return 65535


def _to_8_bits(
    upright: Image.Image,  # a grey image with more than 8 bits a pixel: Pillow keeps it as large whole numbers
    image: Image.Image,  # as it was opened, with what its file says of it
) -> Image.Image:
    "A grey image with 8 bits a pixel; DataError where nothing says which of its values is white."
    values = np.asarray(upright)
    if upright.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DataError("has values outside of 8 and 16 bits: save it with 8 bits a channel")
    white = _white(image, int(values.max()))
    shares = values / (white / 255)
    hole = upright.info.get("transparency")  # the one value that a PNG calls transparent
    if getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == 0:  # white is zero; Pillow turns only 8 bits round
        shares = 255 - shares
    if isinstance(hole, int):
        shares[values == hole] = 255
    return Image.fromarray(shares.round().astype(np.uint8))


def _check_colours(image: Image.Image) -> None:
    "DataError for a TIFF with 16 bits a colour that holds fewer: Pillow keeps the upper 8 of 16, which are black then."
    bits = int(np.max(getattr(image, "tag_v2", {}).get(_TIFF_BITS, 8)))
    if bits == 16 and image.mode in ("RGB", "RGBA", "RGBX"):
        most = int(np.asarray(image.convert("RGB")).max())
        if most < _UNKNOWN_WHITE // 256:
            raise _unknown_depth(256 * most + 255, bits)


def _shorten_transparency(image: Image.Image) -> None:
    "Let the colour that a PNG with 16 bits calls transparent have 8, as Pillow reads its pixels."
    hole = image.info.get("transparency")
    tiles = getattr(image, "tile", None)  # how Pillow reads the pixels
    if isinstance(hole, tuple) and tiles and tiles[0][3] == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in hole)


# ---- Colours

_MODES = {  # by the colour space of a profile: the mode that it is for, and the modes that go there without a loss
    "GRAY": ("L", ("1", "L", "LA")),
    "RGB ": ("RGB", ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")),
    "CMYK": ("CMYK", ("CMYK",)),
}
_LEVELS = np.arange(0, 256, 15, dtype=np.uint8)  # 18 of each colour, from 0 to 255


def _probe(mode: str) -> Image.Image:
    "An image with colours from all over a mode: all greys, or 18 levels of red by 18 of green by 18 of blue."
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    return Image.fromarray(np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS), -1).reshape(1, -1, 3))


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    "The space of a colour profile, and the way from there to sRGB; None where it is broken, or changes nothing."
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
        mode, _ = _MODES[space]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "CMYK":
            before = np.asarray(_probe(mode).convert("RGB"), dtype=int)
            if np.abs(np.asarray(transform.apply(_probe(mode)), dtype=int) - before).max() <= 1:
                return None  # sRGB by whatever name, but for rounding
    except Exception:  # a profile may be broken in many ways, and the image is sound without it
        return None
    return space, transform


def _to_rgb(
    image: Image.Image,  # of any mode with 8 bits a channel
    profile: bytes | None,  # of its colours; None: sRGB
) -> Image.Image:
    "An image as 8-bit RGB, its colours in sRGB; transparent parts become white."
    transparent = image.has_transparency_data
    colours = image.convert("RGBA") if transparent else image
    space, transform = (_to_srgb(profile) if profile else None) or ("", None)
    if transform is not None and image.mode in _MODES[space][1]:
        converted = transform.apply(colours.convert(_MODES[space][0]))
        if transparent:
            converted.putalpha(colours.getchannel("A"))
        colours = converted
    if transparent:
        colours = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    rgb = colours if colours.mode == "RGB" else colours.convert("RGB")
    rgb.info.pop("icc_profile", None)  # it would be saved with the image, which is in sRGB now
    return rgb


def read_image(
    path: str | Path,  # of one of FORMATS, whatever the file's name says
) -> Image.Image:  # 8-bit RGB
    """An image file, read whole, turned upright as its EXIF orientation says, in sRGB; transparent parts become white.

    A colour profile in the file is followed, a broken one is ignored. DataError names a file that is missing, cut off,
    empty, too large or no image, or with values of which nothing says which is white.
    """
    with opened_image(path) as image:
        _shorten_transparency(image)
        _check_colours(image)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I", "F")):
            upright = _to_8_bits(upright, image)
        profile = image.info.get("icc_profile")
        return _to_rgb(upright, profile if isinstance(profile, bytes) else None)


def image_size(path: str | Path) -> tuple[int, int]:
    "Width and height of the image that `read_image` would give, from the beginning of the file."
    with opened_image(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
        tags = getattr(image, "tag_v2", {})  # Pillow has turned the size of a TIFF already, but not these
        width, height = (tags.get(_TIFF_WIDTH, image.width), tags.get(_TIFF_HEIGHT, image.height))
        return (height, width) if turned else (width, height)


def center_box(width: int, height: int) -> tuple[int, int, int]:
    "Left edge, top edge and side, in pixels, of the largest square in the middle of an image."
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def center_crop(
    image: Image.Image,
    size: int,  # pixels along each side of the result
) -> Image.Image:
    "The largest square in the middle of an image, resized by an antialiased bicubic filter."
    left, top, side = center_box(*image.size)
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def square_tensor(
    image: Image.Image,  # 8-bit RGB
    size: int,  # pixels along each side of the result
    path: str | Path,  # of the file, for the message
) -> Float[Tensor, "3 size size"]:
    "`center_crop` as a tensor in [-1, 1]; DataError where the image is too small."
    if MAX_ENLARGEMENT * min(image.size) < size:
        raise DataError(
            f"{path} has only {image.width} x {image.height} pixels, too few for {size} x {size}; "
            "ask for a smaller size or remove it"
        )
    return to_tensor(center_crop(image, size))


def load_image(
    path: str | Path,
    size: int,  # pixels along each side of the result
) -> Float[Tensor, "3 size size"]:
    """The square in the middle of an image file, resized, as a tensor in [-1, 1].

    DataError names a file that `read_image` refuses, or one that would have to be enlarged more than eight times.
    """
    return square_tensor(read_image(path), data_count("size", size), path)
