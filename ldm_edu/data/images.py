"""Picture files to tensors: opened, turned upright, cut square, resized."""

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


def to_rgb(picture: Image.Image) -> Image.Image:
    "Any kind of picture as 8-bit RGB; transparent parts become white. DataError for numbers with no known white."
    if picture.mode.startswith(("I", "F")):  # grey in 16 bits is kept as large whole numbers
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise DataError("has values outside of 8 and 16 bits: save it with 8 bits a channel")
        picture = Image.fromarray((values / 257).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _complaint(path: Path, error: Exception) -> str:
    "What is wrong with a picture file, in words."
    if isinstance(error, DataError):
        return f"{path} {error}"
    if isinstance(error, FileNotFoundError):
        return f"{path}: " + ("a link that leads nowhere" if path.is_symlink() else "there is no such file")
    if isinstance(error, UnidentifiedImageError):
        what = "is empty" if not path.stat().st_size else "is no picture, or of a kind that cannot be read here"
        return f"{path} {what}; copy it again, save it as JPEG or PNG, or remove it"
    if isinstance(error, OSError) and error.errno:
        return f"{path} cannot be read ({error.strerror}); a picture file should stand here"
    return f"{path} is not a whole picture ({error}); copy it again or remove it"


def read_image(
    path: str | Path,  # any format that Pillow reads, whatever its name says
) -> Image.Image:  # RGB
    "A picture file, read whole, the right way up; DataError names a file that is missing, cut off or no picture."
    try:
        with Image.open(path) as picture:
            return to_rgb(ImageOps.exif_transpose(picture))
    except Exception as error:  # Pillow reports broken files by many kinds of error
        raise DataError(_complaint(Path(path), error)) from error


def middle(width: int, height: int) -> tuple[int, int, int]:
    "Left edge, top edge and side of the largest square in the middle of a picture, in pixels."
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def square(
    picture: Image.Image,
    size: int,  # pixels along each side of the result
) -> Image.Image:
    "The square in the middle, resized by an antialiased bicubic filter."
    left, top, side = middle(*picture.size)
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


def to_tensor(picture: Image.Image) -> Float[Tensor, "3 h w"]:
    "An 8-bit RGB picture as a tensor in [-1, 1]."
    return from_uint8(torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1))


ENLARGE = 8  # the most that a picture is enlarged


def _fit(picture: Image.Image, size: int, path: str | Path) -> Float[Tensor, "3 size size"]:
    if ENLARGE * min(picture.size) < size:
        raise DataError(f"{path} has only {picture.width} x {picture.height} pixels, too few for {size} x {size}; "
                        "ask for a smaller size or remove it")
    return to_tensor(square(picture, size))


def load_image(
    path: str | Path,
    size: int,  # pixels along each side of the result
) -> Float[Tensor, "3 size size"]:
    "A picture file as a square tensor in [-1, 1]; DataError where it is broken, or ENLARGE times too small."
    return _fit(read_image(path), size, path)
