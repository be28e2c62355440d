"""What arguments may be: numbers, seeds, tensors and images, and the exact words for what they may not be."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from ldm_edu.checks import (
    check_count,
    check_device,
    check_images,
    check_like,
    check_number,
    check_seed,
    check_tensor,
    shown,
)
from ldm_edu.errors import LDMError


def refused(said: str):
    """The whole message, word by word."""
    return pytest.raises((LDMError, TypeError), match=f"^{re.escape(said)}$")


@pytest.mark.parametrize("value", [1, 7, np.int64(7), np.uint8(255), torch.tensor(3), 10**100])
def test_whole_numbers_of_every_kind_are_counts(value):
    count = check_count("n", value)
    assert type(count) is int and count == int(value)


@pytest.mark.parametrize(
    "value, shown",
    [
        (0, "0"),
        (-1, "-1"),
        (1.0, "1.0"),
        (math.nan, "nan"),
        ("3", "'3'"),
        (None, "None"),
        (True, "True"),
        ([1], "[1]"),
        (torch.tensor([1, 2]), "a tensor of shape (2,)"),
        (torch.tensor(1.0), "tensor(1.)"),
        ("x" * 100, "'" + "x" * 56 + "..."),
        pytest.param(-(10**5000), "-(a number of 16610 bits)", id="of 5000 digits"),
    ],
)
def test_what_is_no_count(value, shown):
    with refused(f"n={shown} should be a whole number, at least 1"):
        check_count("n", value)


def test_a_count_has_bounds_on_both_sides():
    assert check_count("n", 0, 0) == 0 and check_count("n", 5, 1, 5) == 5
    with refused("n=6 should be a whole number, 1 to 5"):
        check_count("n", 6, 1, 5)
    with refused("n=(a number of 16610 bits) should be a whole number, 1 to 5"):
        check_count("n", 10**5000, 1, 5)


@pytest.mark.parametrize("value", [0, 1, 2**32 - 1])
def test_seeds(value):
    assert check_seed("seed", value) == value


@pytest.mark.parametrize("value", [-1, 2**32, 2**64, 1.5, "1", True])
def test_what_is_no_seed(value):
    with refused(f"seed={value!r} should be a whole number, 0 to 4294967295"):
        check_seed("seed", value)


@pytest.mark.parametrize("value", [0, -1.5, 1e300, 5e-324])
def test_numbers_come_back_as_they_are(value):
    assert check_number("x", value) is value


@pytest.mark.parametrize(
    "value, number",
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (np.array(1.5), 1.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(3), 3),
        (Fraction(1, 2), 0.5),
    ],
)
def test_numbers_of_every_kind_come_back_as_pythons_own(value, number):
    got = check_number("x", value, 0, 3)
    assert got == number and type(got) is type(number)


@pytest.mark.parametrize("value", [torch.tensor(True), np.bool_(True), torch.tensor(1j), np.complex64(1), "1"])
def test_what_is_true_or_complex_or_a_text_is_no_number(value):
    with pytest.raises((LDMError, TypeError), match="should be a finite number"):
        check_number("x", value)
    with pytest.raises((LDMError, TypeError), match="should be a whole number"):
        check_count("n", value)


@pytest.mark.parametrize("value", ["x" * 10**6, ["word"] * 10**5, [10**5000], {"a": "\x1b" * 1000}])
def test_a_message_shows_at_most_60_characters_of_a_value(value):
    assert len(shown(value)) <= 60 and shown(value).isprintable()


@pytest.mark.parametrize("value, shown", [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (True, "True")])
def test_what_is_no_number(value, shown):
    with refused(f"x={shown} should be a finite number"):
        check_number("x", value)
    with refused(f"x={shown} should be a finite number, at least 0 and at most 1"):
        check_number("x", value, 0.0, 1.0)


@pytest.mark.parametrize("value", ["1", None, 1j, [1.0]])
def test_what_is_no_number_at_all(value):
    with refused(f"x={value!r} should be a finite number"):
        check_number("x", value)


def test_the_bounds_of_a_number():
    assert check_number("x", 0.0, 0.0) == 0.0 and check_number("x", 1.0, 0.0, 1.0) == 1.0
    with refused("x=-0.1 should be a finite number, at least 0"):
        check_number("x", -0.1, 0.0)
    with refused("x=0.0 should be a finite number, above 0"):
        check_number("x", 0.0, above=0.0)
    with refused("x=2.0 should be a finite number, above 0 and at most 1"):
        check_number("x", 2.0, most=1.0, above=0.0)
    with refused("x=(a number of 1329 bits) should be a finite number, at most 1"):
        check_number("x", 10**400, most=1.0)


@pytest.mark.parametrize("shape", [(2, 3), ("b", 3), ("b", "c"), ("b", "..."), ("...",)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_comes_back_as_it_is(shape, dtype):
    x = torch.zeros(2, 3, dtype=dtype)
    assert check_tensor("x", x, shape) is x


@pytest.mark.parametrize(
    "value, said",
    [
        ([1.0], "x should be a tensor (b, 3), not a list"),
        (None, "x should be a tensor (b, 3), not a NoneType"),
        (torch.zeros(3), "x should have the shape (b, 3), not (3,); one of them alone is x[None]"),
        (torch.zeros(2, 2), "x should have the shape (b, 3), not (2, 2)"),
        (torch.zeros(2, 3, 1), "x should have the shape (b, 3), not (2, 3, 1)"),
        (torch.zeros(2, 3, dtype=torch.int64), "x should hold floating-point numbers, not torch.int64"),
        (torch.zeros(2, 3, dtype=torch.complex64), "x should hold floating-point numbers, not torch.complex64"),
        (
            torch.zeros(2, 3, dtype=torch.uint8),
            "x should hold floating-point numbers, not torch.uint8; bytes 0 to 255 become an image in [-1, 1] by "
            "x.float() / 127.5 - 1",
        ),
    ],
)
def test_what_is_no_such_tensor(value, said):
    with refused(said):
        check_tensor("x", value, ("b", 3))


def test_a_shape_of_one_axis_and_an_open_one():
    with refused("x should have the shape (4,), not (5,)"):
        check_tensor("x", torch.zeros(5), (4,))
    with refused("x should have the shape (b, 3, ...), not (2, 4, 5)"):
        check_tensor("x", torch.zeros(2, 4, 5), ("b", 3, "..."))
    with refused("x should have the shape (b, 3, ...), not (2,); one of them alone is x[None]"):
        check_tensor("x", torch.zeros(2), ("b", 3, "..."))


def test_images():
    for value in (-1.0, 1.0, 16.0, -16.0):  # an overshooting filter leads outside of [-1, 1]
        images = torch.full((2, 3, 4, 4), value)
        assert check_images("images", images) is images
    assert check_images("images", torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert check_images("images", torch.zeros(1, 1, 4, 4), channels=1).shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    "value, shown", [(255.0, "0 to 255"), (-20.0, "-20 to 0"), (math.nan, "nan to nan"), (math.inf, "0 to inf")]
)
def test_what_is_no_image(value, shown):
    images = torch.zeros(1, 3, 2, 2)
    images[0, 0, 0, 0] = value
    with refused(f"images should be images in [-1, 1], but holds values from {shown}"):
        check_images("images", images)


def test_images_of_other_shapes():
    with refused("images should have the shape (b, 3, h, w), not (3, 2, 2); one of them alone is images[None]"):
        check_images("images", torch.zeros(3, 2, 2))
    with refused("images should have the shape (b, 3, h, w), not (1, 4, 2, 2)"):
        check_images("images", torch.zeros(1, 4, 2, 2))


def test_a_tensor_like_another():
    x = torch.zeros(2, 3)
    assert check_like("y", x, "x", torch.ones(2, 3)) is x
    with refused("y has the shape (2, 1), but x has (2, 3)"):  # it would be broadcast
        check_like("y", torch.zeros(2, 1), "x", x)
    with refused("y should hold floating-point numbers, not torch.int64"):
        check_like("y", torch.zeros(2, 3, dtype=torch.int64), "x", x)
    with refused("y should be a tensor (2, 3), not a float"):
        check_like("y", 1.0, "x", x)


def test_a_tensor_on_another_device():
    check_device("x", torch.zeros(1), torch.device("cpu"))
    with refused("x is on meta, but the weights on cpu: move it by .to('cpu')"):
        check_device("x", torch.zeros(1, device="meta"), torch.device("cpu"))
    with refused("x is on meta, but y on cpu: move it by .to('cpu')"):
        check_device("x", torch.zeros(1, device="meta"), torch.device("cpu"), "y")
