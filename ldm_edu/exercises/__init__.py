"""What the exercise notebooks use: a variant for each student, comparisons that say what is wrong, and a closed book."""

import hashlib
import os
import pkgutil
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from types import CodeType, FunctionType
from typing import Any, TypeVar

import numpy as np
import torch

from ldm_edu.checks import MOST_SEED
from ldm_edu.errors import LDMError

__all__ = ["Variant", "close", "closed_book"]

T = TypeVar("T")


class Variant:
    """What differs from student to student in one exercise: a shape, a parameterisation, a planted bug.

    The choices depend on `student`, `exercise` and the name of the choice alone: on no machine, and on no other choice.
    The random numbers of PyTorch and NumPy begin anew, also by student and exercise: who is graded twice gets the same
    points twice.
    """

    def __init__(
        self,
        student: str,  # the student's id, as the course's list has it
        exercise: str,  # name of the exercise: "21_diffusion"
    ):
        if not isinstance(student, str) or not student.strip():
            raise LDMError(f'STUDENT={student!r} should be your id as a text, such as "ann"')
        self.student = unicodedata.normalize(
            "NFC", os.environ.get("LDM_EDU_STUDENT") or student.strip()
        )  # who grades decides
        self.exercise = exercise
        torch.manual_seed(self.integer("random numbers", 0, MOST_SEED))
        np.random.seed(self.integer("random numbers of NumPy", 0, MOST_SEED))

    def integer(
        self,
        name: str,  # what is chosen; another name is another choice
        low: int,
        high: int,
    ) -> int:
        "An integer from low to high, both included."
        digest = hashlib.sha256("/".join((self.student, self.exercise, name)).encode()).digest()
        return low + int.from_bytes(digest[:8], "big") % (high - low + 1)

    def pick(
        self,
        name: str,  # what is chosen; another name is another choice
        options: Sequence[T],
    ) -> T:
        "One of the options."
        return options[self.integer(name, 0, len(options) - 1)]


def close(
    yours: Any,  # the answer: a tensor, an array of NumPy, or a number
    right: Any,  # what it should be
    tolerance: float = 1e-3,  # largest difference, as a share of the largest absolute value of `right`
) -> bool:
    """Is `yours` a tensor or a number of the shape of `right`, and nowhere further from it than the tolerance?

    Raises AssertionError where the two cannot be compared: another type, another shape (nothing is broadcast), or a
    value that is not finite. A dtype of another precision is accepted.
    """
    assert isinstance(yours, torch.Tensor | np.ndarray | Real), (
        f"a {type(yours).__name__} came back: a tensor is expected"
    )
    a, b = (torch.as_tensor(v).detach().cpu().double() for v in (yours, right))
    assert a.shape == b.shape, f"the shape is {tuple(a.shape)}: {tuple(b.shape)} is expected"
    assert a.isfinite().all(), "a value is infinite or not a number"
    scale = b.abs().max().item() if b.numel() else 0.0
    return a.numel() == 0 or (a - b).abs().max().item() <= tolerance * (scale or 1.0)


def _functions(obj: Any) -> list[FunctionType]:
    "The Python functions behind a function, or those of a class's own methods and properties."
    if isinstance(obj, type):
        return [f for member in vars(obj).values() for f in _functions(member)]
    if isinstance(obj, property):
        return [f for part in (obj.fget, obj.fset) for f in _functions(part)]
    if isinstance(obj, staticmethod | classmethod):
        obj = obj.__func__
    obj, found = getattr(obj, "func", obj), []  # functools.cached_property has a `func`
    while obj is not None:  # a decorated function, and what it wraps
        found += [obj] if isinstance(obj, FunctionType) else []
        obj = getattr(obj, "__wrapped__", None)
    return found


def _refusing(name: str, free: int) -> CodeType:
    "The code of a function that raises for `name`, with as many free variables as the function that it stands in for."
    message = f"{name} was called: that is the package's answer, and this one is yours to write"
    names = ", ".join(f"v{i}" for i in range(free))
    source = f"def outer({names}):\n def refuse(*a, **k):\n  {names or None}\n  raise AssertionError({message!r})\n"
    scope: dict[str, Callable] = {}
    exec(source + " return refuse", scope)  # noqa: S102  the text is ours
    return scope["outer"](*range(free)).__code__


@contextmanager
def closed_book(
    *names: str,  # functions or classes with their modules: "ldm_edu.diffusion.sampling.ddim"
) -> Iterator[None]:
    """While this is open, the named parts of the package raise AssertionError: an answer has to do without them.

    However a function was imported, and under whatever name, it is closed: its code is exchanged and put back. Of a
    class, all methods that it defines are closed, so that objects made before are closed as well.
    """
    kept: list[tuple[FunctionType, CodeType]] = []
    try:
        for name in names:
            functions = _functions(pkgutil.resolve_name(name))
            if not functions:
                raise LDMError(f"closed_book: {name} is no function or class of Python code")
            for function in functions:
                kept.append((function, function.__code__))
                function.__code__ = _refusing(name, len(function.__code__.co_freevars))
        yield
    finally:
        for function, code in reversed(kept):
            function.__code__ = code
