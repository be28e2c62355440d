"""What all tries share: how one must end, a small model, and values of all kinds."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from ldm_edu import AutoencoderKL, LatentDiffusion, LDMError, NoiseSchedule, TextConditioner, UNet
from ldm_edu.checkpoints import Part


def small_model() -> LatentDiffusion:
    torch.manual_seed(0)
    stage = AutoencoderKL(channels=8, multipliers=(1, 2), blocks=1, latent_channels=3, groups=4, scale_factor=0.7)
    unet = UNet(3, 3, 32, (1, 2), 1, (2,), context_dim=16)
    with torch.no_grad():
        for p in unet.parameters():
            if not p.any():
                p.normal_(std=0.05)
    text = TextConditioner(["a", "red", "blue", "ball", "cube"], length=6, dim=16, depth=1, heads=2)
    return LatentDiffusion(stage, unet, NoiseSchedule(T=100), text, size=16).eval()


SMALL = small_model()


class Refused:
    """What `ends_well` returns for one clear error."""

    def __init__(self, message: str):
        self.message = message


def ends_well(fn: Callable, *args: Any, **kwargs: Any) -> Any:
    """The result, or `Refused` with the message of an LDMError; whatever else is raised fails the test.

    The message is one line that a reader can take in, not a dump of tensors or a list of hundreds of names.
    """
    try:
        return fn(*args, **kwargs)
    except LDMError as error:
        message = str(error)
        assert message.strip() and len(message) < 1500, f"no message to read: {message[:3000]!r}"
        return Refused(message)


def names(refused: Refused, *words: str) -> bool:
    """Does the message have one of these words?"""
    return any(word in refused.message for word in words)


# Whole numbers, other numbers, and what is no number at all.
odd_ints = st.one_of(
    st.integers(-3, 120),
    st.sampled_from([0, -1, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**30, True, False]),
)
odd_numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e-300, 1e300, 1e39, -1.0, 0.5, 1, 3, 10**400]),
)
not_numbers = st.sampled_from([None, "2", "", b"2", [], [2], {}, 2j, object(), torch.ones(2), np.ones(2), float])
anything = st.one_of(odd_ints, odd_numbers, not_numbers, st.text(max_size=8))

dtypes = st.sampled_from(
    [torch.float32] * 6
    + [torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64]
)


@st.composite
def tensors(draw, shapes: st.SearchStrategy[tuple[int, ...]]):
    """Tensors of any kind and shape; some hold bytes, NaN or infinity."""
    shape, dtype, seed = draw(shapes), draw(dtypes), draw(st.integers(0, 3))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    kind = draw(st.sampled_from(["normal"] * 6 + ["bytes", "nan", "inf", "zero", "far", "strided"]))
    if values.numel():
        values = {
            "bytes": lambda v: v.abs() * 255,
            "nan": lambda v: v.index_fill(0, torch.tensor(0), float("nan")) if v.ndim else v * float("nan"),
            "inf": lambda v: v / 0,
            "zero": torch.zeros_like,
            "far": lambda v: v + 1e4,
            "strided": lambda v: v.transpose(0, -1).contiguous().transpose(0, -1) if v.ndim else v,
        }.get(kind, lambda v: v)(values)
    if dtype == torch.bool:
        return values > 0
    if not dtype.is_floating_point and not dtype.is_complex:
        values = values.nan_to_num(0, 0, 0).clamp(-100, 200)
        values = values.abs() if dtype == torch.uint8 else values
    return values.to(dtype)


def near(*shape: int) -> st.SearchStrategy[tuple[int, ...]]:
    """The shape itself, most of the time, and shapes that are nearly it."""
    others = [shape[1:], (1, *shape), shape[:-1], (*shape[:-1], shape[-1] + 1), (0, *shape[1:]), shape[::-1]]
    others += [(shape[0] + 1, *shape[1:]), (shape[0], 1, *shape[2:]), (shape[0], *(n + 1 for n in shape[1:])), ()]
    return st.one_of(st.just(shape), st.sampled_from(others))


def is_right(images: torch.Tensor, count: int, side: int) -> bool:
    """Finite images in [-1, 1] of the right size."""
    fits = images.shape == (count, 3, side, side) and images.is_floating_point()
    return fits and bool(images.isfinite().all()) and images.abs().max().item() <= 1 if count else fits


def changed(config: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    """A copy of nested dicts and lists with one entry changed."""
    import copy

    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


def paths(config: Any, prefix: tuple = ()) -> list[tuple]:
    """The way to every entry of nested dicts and lists."""
    found = [prefix] if prefix else []
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        found += paths(value, (*prefix, key))
    return found


__all__ = ["Part"]
