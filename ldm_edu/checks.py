"""What the public functions ask of their arguments: numbers, seeds and tensors, each with an error that names it."""

import math
import numbers
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from inspect import formatannotation
from types import UnionType
from typing import Any, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

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
        number = None if _is_yes_or_no(value) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise LDMError(f"{name}={shown(value)} should be a whole number, {wanted}")
    return number


def check_seed(name: str, value: Any) -> int:
    "`value` as an int; LDMError where it is no seed, a whole number from 0 to 2³² - 1."
    return check_count(name, value, 0, MOST_SEED)


def check_choice(
    name: str,  # of the argument
    value: Any,
    known: Collection[str],
) -> str:
    "`value` as it is; LDMError where it is none of the known values, which it lists."
    if not isinstance(value, str) or value not in known:
        raise LDMError(f"{name}={shown(value)} is not known; it can be {', '.join(map(repr, known))}")
    return value


def _is_yes_or_no(value: Any) -> bool:
    "Is a value True or False, in Python, NumPy or torch?"
    return isinstance(value, bool | np.bool_) or (isinstance(value, Tensor) and value.dtype == torch.bool)


def _python_number(value: Any) -> float | int | None:
    "A real number of Python, NumPy or torch as Python's own float or int; None for anything else."
    if type(value) in (int, float):
        return value
    try:
        if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
            value = value.item()
        if _is_yes_or_no(value) or not isinstance(value, numbers.Real):
            return None
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    except (OverflowError, RuntimeError, ValueError):  # beyond all floats; a tensor without values
        return None


def check_number(
    name: str,  # of the argument
    value: Any,
    least: float | int = -math.inf,
    most: float | int = math.inf,
    above: float | int | None = None,  # the number should be larger than this, not equal to it
) -> float | int:
    "`value` as a float or an int; LDMError where it is no finite real number from `least` to `most`."
    number = _python_number(value)
    try:
        is_number = number is not None and math.isfinite(number)
    except OverflowError:  # a whole number beyond all floats
        is_number = False
    if number is None or not is_number or not least <= number <= most or (above is not None and number <= above):
        bounds = [f"above {above:g}"] if above is not None else [f"at least {least:g}"] * (least > -math.inf)
        bounds += [f"at most {most:g}"] * (most < math.inf)
        raise LDMError(f"{name}={shown(value)} should be a finite number{', ' * bool(bounds)}{' and '.join(bounds)}")
    return number


def shown(value: Any) -> str:
    "A value for a message, at most 60 characters long."
    if isinstance(value, int) and abs(value) >= 10**60:
        return f"{'-' * (value < 0)}(a number of {value.bit_length()} bits)"  # Python may refuse to write it out
    try:
        text = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.ndim else repr(value)
    except Exception:  # of whatever class, or a list with a number that Python refuses to write out
        text = f"a {type(value).__name__}"
    text = "".join(letter if letter.isprintable() else " " for letter in text[:100])
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


def known_range(value: Tensor) -> tuple[float | int, float | int] | None:
    "Smallest and largest value of a tensor on the CPU; None on other devices, where to ask would mean to wait for them."
    if value.device.type != "cpu" or isinstance(value, FakeTensor) or torch.compiler.is_compiling():
        return None
    if not value.numel() or value.dtype == torch.bool:
        return None
    plain = value.detach().as_subclass(Tensor)
    try:
        least, most = plain.aminmax()
    except (NotImplementedError, RuntimeError):  # for formats that are only kept, such as eight bits with a point
        least, most = plain.to_dense().to(torch.float64).aminmax()
    return least.item(), most.item()


def is_finite(value: Tensor) -> bool:
    "Are all values finite, as far as they are known? See `known_range`."
    return all(map(math.isfinite, known_range(value) or ()))


def check_map(
    name: str,  # of the argument
    value: Any,
    channels: int | str = "c",  # any number of them, or that many
) -> Tensor:
    "`value` as it is; LDMError where it is no batch (b, c, h, w) of floating-point numbers, at least a pixel each."
    tensor = check_tensor(name, value, ("b", channels, "h", "w"))
    if 0 in tensor.shape[2:]:
        raise LDMError(f"{name} has the shape {tuple(tensor.shape)}, but height and width should be at least 1")
    return tensor


def check_images(
    name: str,  # of the argument
    value: Any,
    channels: int = 3,
) -> Tensor:
    """`value` as it is; LDMError where it is no batch (b, c, h, w) of floating-point numbers.

    On the CPU, values beyond ±16 are refused, too: noise or an overshooting filter does not lead there, bytes do.
    """
    images = check_map(name, value, channels)
    least, most = known_range(images) or (0, 0)
    if not -MOST_VALUE <= least <= most <= MOST_VALUE:
        raise LDMError(f"{name} should be images in [-1, 1], but holds values from {least:g} to {most:g}")
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


def check_counts(least: int = 1, most: int | None = None, or_none: bool = False, **values: Any) -> None:
    "`check_count` of several arguments by their names; with `or_none`, each may also be None."
    for name, value in values.items():
        if not (or_none and value is None):
            check_count(name, value, least, most)


MOST_LEVELS = 12  # of a network: at the smallest one, an image would have shrunk by 2048


def check_levels(name: str, values: Any) -> None:
    "LDMError where `values` are no whole numbers of at least 1, one for each of 1 to 12 levels."
    if not isinstance(values, Sequence) or isinstance(values, str) or not 1 <= len(values) <= MOST_LEVELS:
        raise LDMError(
            f"{name}={shown(values)} should be a list of 1 to {MOST_LEVELS} whole numbers, one for each level"
        )
    for value in values:
        check_count(f"each of {name}: {name}", value)


def check_captions(name: str, value: Any) -> Sequence[str]:
    "`value` as it is; LDMError where it is no list of captions, or an empty one."
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise LDMError(f"{name} should be a list of captions, not {shown(value)}")
    if not value:
        raise LDMError(f"{name} is empty: at least one caption is needed")
    if wrong := [caption for caption in value if not isinstance(caption, str)]:
        raise LDMError(f"each of {name} should be a text, not {shown(wrong[0])}")
    return value


def check_factors(
    attention_factors: Sequence[int],  # levels with attention, as downsampling factors
    multipliers: Sequence[int],  # one for each level
) -> None:
    "LDMError where attention is asked for on a level that does not exist."
    factors = [2**level for level in range(len(multipliers))]
    if not set(attention_factors) <= set(factors):
        raise LDMError(
            f"attention_factors={tuple(attention_factors)} must be among {factors}, the downsampling factors of the "
            f"{len(factors)} levels of multipliers={tuple(multipliers)} (factors, not sizes of the map)"
        )


def like_weights(
    name: str,  # of the argument
    value: Tensor,
    module: torch.nn.Module,
) -> Tensor:
    "`value` in the number format of a module's weights; LDMError where it lies on another device than they."
    weight = next(module.parameters(), None)
    if weight is None:
        return value
    check_device(name, value, weight.device)
    return value.to(weight.dtype)


WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # dtypes of whole numbers


def check_timesteps(
    name: str,  # of the argument
    value: Any,
    length: int,  # samples
    levels: int | None = None,  # timesteps lie below this; None: any
) -> Tensor:
    "`value` as it is; LDMError where it is no tensor of whole numbers from 0 on, one for each sample."
    if not isinstance(value, Tensor) or value.shape != (length,) or value.dtype not in WHOLE:
        told = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise LDMError(f"{name} should be a tensor of whole numbers ({length},), one for each sample, not {told}")
    least, most = known_range(value) or (0, 0)
    if least < 0 or (levels is not None and most >= levels):
        bounds = "be at least 0" if levels is None else f"lie in [0, {levels})"
        raise LDMError(f"{name} must {bounds}, but runs from {least} to {most}")
    return value


def _is_of(value: Any, kind: Any) -> bool:
    "Is a value of a type, as annotations name it? A float has to be finite, and a list will do for a tuple."
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, each) for each in inner)
    if get_origin(kind) is tuple:
        each = inner[:1] * len(value) if isinstance(value, list | tuple) and inner[-1] is ... else inner
        return isinstance(value, list | tuple) and len(value) == len(each) and all(map(_is_of, value, each))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and -1e308 < value < 1e308
    if kind is Any:
        return True
    return isinstance(value, get_origin(kind) or kind) and (kind is not int or not isinstance(value, bool))


def check_fields(
    cls: type,  # a dataclass
    values: Mapping[str, Any],  # the fields that are given, by name
) -> None:
    "LDMError where these are no fields of a dataclass, or where one of them is not of the type that it should have."
    kinds = {field.name: field.type for field in fields(cls)}
    for name, value in values.items():
        if name not in kinds:
            raise LDMError(f"{cls.__name__} has no field {name}")
        if not _is_of(value, kinds[name]):
            raise LDMError(f"{cls.__name__}: {name}={shown(value)} should be {formatannotation(kinds[name])}")
