"""Image files as tensors: read whole, turned upright, cropped to a square and resized."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm_edu.errors import DataError

__all__ = ["read_image", "load_image", "to_tensor"]

MAX_ENLARGEMENT = 8  # an image whose shorter side would have to be enlarged more than this is refused


def from_uint8(pixels: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    "Bytes 0 to 255 as numbers in [-1, 1]; the inverse of `to_uint8`."
    return pixels.float().div_(127.5).sub_(1)


def to_tensor(image: Image.Image) -> Float[Tensor, "3 h w"]:
    "An 8-bit RGB image as a tensor in [-1, 1]."
    return from_uint8(torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1))


def _to_8_bits(image: Image.Image) -> Image.Image:
    "A grey image with 16 bits a pixel (Pillow keeps it as large whole numbers) with 8 bits a pixel."
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DataError("has values outside of 8 and 16 bits: save it with 8 bits a channel")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB; transparent parts become white.

    DataError for floating-point images and values beyond 16 bits: nothing says which of their values is white.
    """
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
        return f"{path} cannot be read ({error.strerror}); an image file should stand here"
    return f"{path} is not a whole image ({error}); copy it again or remove it"


def read_image(
    path: str | Path,  # any format that Pillow reads, whatever the file's name says
) -> Image.Image:  # 8-bit RGB
    """An image file, read whole and turned upright as its EXIF orientation says; transparent parts become white.

    DataError names a file that is missing, cut off, empty or no image.
    """
    try:
        with Image.open(path) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow reports broken files by many kinds of error
        raise DataError(_describe_error(Path(path), error)) from error


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
    return square_tensor(read_image(path), size, path)
