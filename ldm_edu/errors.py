"""The errors that the package raises on purpose."""

from collections.abc import Callable
from typing import Any

__all__ = ["CheckpointError", "DataError", "DownloadError", "LDMError", "refusal"]


class LDMError(ValueError):
    """Base class of every error that the package raises on purpose.

    The message says what was wrong and what would be right. It is a ValueError: an argument, a setting or a file has
    a value that cannot be used. A bug in the package raises something else.
    """


class CheckpointError(LDMError):
    "A checkpoint file that is missing, truncated, or of another kind."


class DataError(LDMError):
    "Data that is missing, empty or broken, or a request for data that does not exist."


class DownloadError(LDMError):
    "A file that could not be downloaded, or whose content is not what was published; the message says what to do."


def refusal(fn: Callable, *args: Any, **kwargs: Any) -> str:
    """The message of the LDMError that `fn(*args, **kwargs)` raises.

    Raises AssertionError where `fn` accepts the arguments, so that a lesson cannot promise an error that never comes.
    Any other exception passes through.
    """
    try:
        fn(*args, **kwargs)
    except LDMError as error:
        return str(error)
    raise AssertionError(f"{fn.__name__} accepted what it should have refused")
