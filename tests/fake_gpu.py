"""A GPU without a GPU: tensors on it have a shape, a dtype and a device, but no numbers that the host could read.

    with FakeGPU() as gpu:
        unet = gpu.put(UNet(...))
        out = unet(gpu.randn(2, 4, 8, 8), gpu.integers(2, below=1000))

Tensors on the CPU stay real. Reading a number on the device (`.item()`, `if x > 0:`, `.cpu()`, `x[mask]`) raises
`HostSync`, mixing devices raises RuntimeError, and each copy from the host to the device is noted in `gpu.uploads`.
"""

from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves

needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch is built without CUDA, so it cannot make fake tensors on it"
)
# The autograd engine refuses a CUDA device that is not there, and runs backward passes of this device on the CPU.
WITH_BACKWARD = "lazy"
T = TypeVar("T", Tensor, nn.Module)


class HostSync(RuntimeError):
    """The host would have waited for the device."""


@dataclass(frozen=True)
class Upload:
    """A copy from the host to the device."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # on the device
    waits: bool  # does the host wait until it is done? Not with `non_blocking=True`


class FakeGPU(FakeTensorMode):
    """Within the `with` block, tensors on the CPU are real, and tensors on the device have no numbers."""

    def __init__(self, device: str = "cuda"):
        super().__init__(allow_non_fake_inputs=True)
        self.device = torch.device(device)
        self.uploads: list[Upload] = []

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers on the device."""
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def integers(self, *shape: int, below: int) -> Tensor:
        """Integers on the device."""
        return torch.randint(0, below, shape, device=self.device)

    def put(self, what: T) -> T:
        """A tensor, or a module's weights in place, on the device, without a note in `uploads`."""
        noted = len(self.uploads)
        if isinstance(what, Tensor):
            what = what.to(self.device)
        else:  # `Module.to` cannot put a fake tensor in place of a real one
            for part in what.modules():
                for name, weight in part.named_parameters(recurse=False):
                    setattr(part, name, nn.Parameter(weight.detach().to(self.device), weight.requires_grad))
                for name, buffer in part.named_buffers(recurse=False):
                    setattr(part, name, buffer.to(self.device))
        del self.uploads[noted:]
        return what

    def holds(self, x: Tensor) -> bool:
        """Is the tensor on this device?"""
        return x.device.type == self.device.type

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        fake = any(isinstance(x, FakeTensor) for x in leaves)
        if not fake and not any(isinstance(x, torch.device) and x.type == self.device.type for x in leaves):
            return func(*args, **kwargs)  # nothing but tensors on the CPU
        self.note_copy(func, args, kwargs)
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostSync(f"{func} waits for a number on the device") from error

    def note_copy(self, func, args: tuple, kwargs: dict) -> None:
        """HostSync for a copy from the device to the host; a copy the other way is noted."""
        if func is torch.ops.aten._to_copy.default:
            source = args[0]
            to, dtype = (kwargs.get(name) or getattr(source, name) for name in ("device", "dtype"))
        elif func is torch.ops.aten.copy_.default:
            source, to, dtype = args[1], args[0].device, args[0].dtype
        else:
            return
        if self.holds(source) and to.type != self.device.type:
            raise HostSync(f"{func} copies {tuple(source.shape)} from the device to the host")
        if not self.holds(source) and to.type == self.device.type:
            waits = not (kwargs.get("non_blocking") or func is torch.ops.aten.copy_.default and args[2:3] == (True,))
            self.uploads.append(Upload(tuple(source.shape), dtype, waits))
