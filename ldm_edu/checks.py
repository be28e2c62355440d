"""What the public functions ask of their arguments: numbers, seeds and tensors, each with an error that names it."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm_edu.errors import LDMError

__all__: list[str] = []

MOST_SEED = 2**32 - 1  # torch's generator on the CPU uses 32 bits of a seed: one more would draw what 0 draws


def check_count(
    name: str,  # of the argument
    value: Any,
    least: int = 1,
    most: int | None = None,
) -> int:
    "`value` as an int; LDMError where it is no whole number from `least` to `most`."
    wanted = f"at least {least}" if most is None else f"{least} to {most}"
    try:
        number = operator.index(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise LDMError(f"{name}={_shown(value)} should be a whole number, {wanted}")
    return number


def check_seed(name: str, value: Any) -> int:
    "`value` as an int; LDMError where it is no seed, a whole number from 0 to 2³² - 1."
    return check_count(name, value, 0, MOST_SEED)


def check_number(
    name: str,  # of the argument
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    above: float | None = None,  # the number should be larger than this, not equal to it
) -> float:
    "`value` as it is; LDMError where it is no finite number from `least` to `most`."
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most or (above is not None and value <= above):
        bounds = [f"above {above:g}"] if above is not None else [f"at least {least:g}"] * (least > -math.inf)
        bounds += [f"at most {most:g}"] * (most < math.inf)
        raise LDMError(f"{name}={_shown(value)} should be a finite number{', ' * bool(bounds)}{' and '.join(bounds)}")
    return value


def _shown(value: Any) -> str:
    "A value for a message, at most 60 characters long."
    text = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.ndim else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_tensor(
    name: str,  # of the argument
    value: Any,
    shape: Sequence[int | str],  # a length, or a letter for any; ("b", "...") for any number of axes after the first
) -> Tensor:
    "`value` as it is; LDMError where it is no tensor of real floating-point numbers with that shape."
    told = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
    if not isinstance(value, Tensor):
        raise LDMError(f"{name} should be a tensor {told}, not a {type(value).__name__}")
    axes, open_end = list(shape), "..." in shape
    axes = axes[:-1] if open_end else axes
    fits = value.ndim >= len(axes) if open_end else value.ndim == len(axes)
    if not fits or any(isinstance(want, int) and want != got for want, got in zip(axes, value.shape)):
        hint = f"; one of them alone is {name}[None]" if not fits and value.ndim == len(axes) - 1 else ""
        raise LDMError(f"{name} should have the shape {told}, not {tuple(value.shape)}{hint}")
    if not value.is_floating_point():
        hint = "; bytes 0 to 255 become an image in [-1, 1] by x.float() / 127.5 - 1" * (value.dtype == torch.uint8)
        raise LDMError(f"{name} should hold floating-point numbers, not {value.dtype}{hint}")
    return value


def check_images(
    name: str,  # of the argument
    value: Any,
    channels: int = 3,
) -> Tensor:
    "`value` as it is; LDMError where it is no batch of images (b, c, h, w) in [-1, 1]. On the CPU the range is checked."
    images = check_tensor(name, value, ("b", channels, "h", "w"))
    if images.device.type == "cpu" and images.numel() and not torch.compiler.is_compiling():
        most = images.detach().abs().amax().item()
        if not most <= MOST_VALUE:
            raise LDMError(f"{name} should be images in [-1, 1], but holds values up to {most:g}")
    return images


MOST_VALUE = 16.0  # far outside of [-1, 1], where noise or an overshooting filter does not lead; bytes do


def check_like(
    name: str,  # of the argument
    value: Any,
    other: str,  # the name of the argument that it should be like
    like: Tensor,
) -> Tensor:
    "`value` as it is; LDMError where it is no tensor of floating-point numbers with the shape of another argument."
    if isinstance(value, Tensor) and value.shape != like.shape:
        raise LDMError(f"{name} has the shape {tuple(value.shape)}, but {other} has {tuple(like.shape)}")
    return check_tensor(name, value, tuple(like.shape))


def check_device(name: str, value: Tensor, device: torch.device, what: str = "the weights") -> None:
    "LDMError where a tensor lies on another device than what it meets."
    if value.device != device:
        raise LDMError(f"{name} is on {value.device}, but {what} on {device}: move it by .to({str(device)!r})")
