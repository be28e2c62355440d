"""Image files to tensors: opened, turned upright, cut square, resized."""

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from jaxtyping import Float, UInt8
from pathlib import Path
from torch import Tensor
from ldm_edu.errors import DataError

def from_uint8(pixels: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    "Bytes 0 to 255 as numbers in [-1, 1]; the inverse of `to_uint8`."
    return pixels.float() / 127.5 - 1


def to_rgb(image: Image.Image) -> Image.Image:
    "Any kind of image as 8-bit RGB; transparent parts become white. DataError for numbers with no known white."
    if image.mode.startswith(("I", "F")):  # grey in 16 bits is kept as large whole numbers
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise DataError("has values outside of 8 and 16 bits: save it with 8 bits a channel")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _complaint(path: Path, error: Exception) -> str:
    "What is wrong with an image file, in words."
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
    path: str | Path,  # any format that Pillow reads, whatever its name says
) -> Image.Image:  # RGB
    "An image file, read whole, the right way up; DataError names a file that is missing, cut off or no image."
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow reports broken files by many kinds of error
        raise DataError(_complaint(Path(path), error)) from error


def middle(width: int, height: int) -> tuple[int, int, int]:
    "Left edge, top edge and side of the largest square in the middle of an image, in pixels."
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def square(
    image: Image.Image,
    size: int,  # pixels along each side of the result
) -> Image.Image:
    "The square in the middle, resized by an antialiased bicubic filter."
    left, top, side = middle(*image.size)
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Float[Tensor, "3 h w"]:
    "An 8-bit RGB image as a tensor in [-1, 1]."
    return from_uint8(torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1))


ENLARGE = 8  # the most that an image is enlarged


def _fit(image: Image.Image, size: int, path: str | Path) -> Float[Tensor, "3 size size"]:
    if ENLARGE * min(image.size) < size:
        raise DataError(f"{path} has only {image.width} x {image.height} pixels, too few for {size} x {size}; "
                        "ask for a smaller size or remove it")
    return to_tensor(square(image, size))


def load_image(
    path: str | Path,
    size: int,  # pixels along each side of the result
) -> Float[Tensor, "3 size size"]:
    "An image file as a square tensor in [-1, 1]; DataError where it is broken, or ENLARGE times too small."
    return _fit(read_image(path), size, path)
