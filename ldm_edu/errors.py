"""The errors that the package raises on purpose."""

from collections.abc import Callable
from typing import Any

class LDMError(ValueError):
    "Base of every error this package raises on purpose: its message says what was wrong and what would be right."


class CheckpointError(LDMError):
    "A checkpoint file that is missing, cut off, or made by something else."


def refusal(fn: Callable, *args: Any, **kwargs: Any) -> str:
    "The message of the LDMError with which `fn` refuses these arguments; an AssertionError where it accepts them."
    try:
        fn(*args, **kwargs)
    except LDMError as error:
        return str(error)
    raise AssertionError(f"{fn.__name__} accepted what it should have refused")


class DataError(LDMError):
    "Data that is missing, empty or broken, or a request for data that does not exist."


class DownloadError(LDMError):
    "A file that could not be had, or is not what it should be; the message says what to do."
