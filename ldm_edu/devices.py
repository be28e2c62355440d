"""Where a training runs, and in which number format it multiplies."""

import math
import re
import time
from functools import lru_cache

import torch
from torch.nn import functional as F

from ldm_edu.errors import LDMError

__all__ = ["pick_device", "pick_dtype"]

_DEVICES = ("auto", "cuda", "mps", "cpu")


def check_device_name(name: str) -> str:
    "`name`, if it could be a device: auto, cuda, mps, cpu, or a numbered GPU such as cuda:1; else LDMError."
    if not isinstance(name, str) or (name not in _DEVICES and not re.fullmatch(r"cuda:[0-9]{1,3}", name)):
        raise LDMError(f"unknown device '{name}'; known: {', '.join(_DEVICES)}")
    return name


def _available(kind: str) -> int:
    "The number of devices of a kind on this machine."
    if kind == "cuda":
        return torch.cuda.device_count()
    return int(torch.backends.mps.is_available()) if kind == "mps" else 1


def pick_device(name: str = "auto") -> torch.device:
    "The named device, or for 'auto' the first available of cuda, mps, cpu; LDMError for a device that is not there."
    if check_device_name(name) == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if _available(kind))
    kind, _, number = name.partition(":")
    if int(number or 0) >= _available(kind):
        raise LDMError(f"device '{name}' is not available on this machine; 'auto' takes the best one there is")
    return torch.device(name)


def _seconds(dtype: torch.dtype, side: int) -> float:
    "How long a convolution and a matrix product take on the CPU with autocast to `dtype`, forward and backward."
    with torch.inference_mode(False), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        images, kernel = torch.ones(2, 32, side, side, requires_grad=True), torch.ones(32, 32, 3, 3, requires_grad=True)
        matrix = torch.ones(8 * side, 8 * side, requires_grad=True)
        start = time.perf_counter()
        (F.conv2d(images, kernel).sum() + (matrix @ matrix).sum()).backward()
        return time.perf_counter() - start


@lru_cache
def _cpu_seconds() -> dict[torch.dtype, float]:
    "By number format the least of several times on one thread, measured for at most about 0.2 seconds."
    seconds, threads = dict.fromkeys((torch.float32, torch.bfloat16), math.inf), torch.get_num_threads()
    torch.set_num_threads(1)  # several threads wait for each other where other programs run
    try:
        for dtype in seconds:
            _seconds(dtype, side=4)  # small and not counted: torch loads what it needs
        stop = time.perf_counter() + 0.1
        for _ in range(20):
            for dtype in seconds:
                seconds[dtype] = min(seconds[dtype], _seconds(dtype, side=32))
            if time.perf_counter() > stop:
                break
    finally:
        torch.set_num_threads(threads)
    return seconds


def pick_dtype(device: torch.device | str) -> torch.dtype:
    "The number format for autocast: bfloat16 on a GPU that has it, and on a CPU that is faster in it; else float32."
    kind, is_fast = torch.device(device).type, False
    if kind == "cuda":
        is_fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        seconds = _cpu_seconds()
        is_fast = seconds[torch.float32] >= 1.2 * seconds[torch.bfloat16]
    return torch.bfloat16 if is_fast else torch.float32
