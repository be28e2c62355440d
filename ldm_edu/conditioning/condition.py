"""What a batch of images is conditioned on: three slots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ldm_edu.errors import LDMError

__all__ = ["Condition"]


@dataclass(frozen=True, eq=False)
class Condition:
    "What a batch of images is conditioned on: up to three slots that a denoiser may read. An empty slot is None."

    context: Float[Tensor, "b l d"] | None = None  # tokens, read by cross-attention
    concat: Float[Tensor, "b c h w"] | None = None  # maps, stacked on the latent
    vector: Float[Tensor, "b v"] | None = None  # one vector an image, added to the time embedding

    def __post_init__(self):
        if len(sizes := {len(v) for v in self.slots().values()}) > 1:
            raise LDMError(f"the slots of a Condition hold different batch sizes: {sorted(sizes)}")

    def slots(self) -> dict[str, Tensor]:
        "The slots that are filled, by name."
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        "The same slots, each tensor changed by `change`."
        return Condition(**{name: change(v) for name, v in self.slots().items()})

    def to(self, *args, **kwargs) -> "Condition":
        "Every slot moved or cast, as `Tensor.to` does."
        return self.map(lambda v: v.to(*args, **kwargs))

    def __len__(self) -> int:
        "The batch size; 0 if no slot is filled."
        return next((len(v) for v in self.slots().values()), 0)

    def __getitem__(self, index: int | slice | list | Tensor) -> "Condition":
        "Some rows of the batch. A single number is an `LDMError`: a condition keeps its batch dimension."
        if isinstance(index, int):
            raise LDMError(f"a Condition is indexed by a slice: [{index}:{index + 1}] rather than [{index}]")
        return self.map(lambda v: v[index])

    def expand(self, b: int) -> "Condition":
        "A condition of one image as a batch of `b`, without a copy; one of `b` images stays as it is."
        if len(self) not in (1, b):
            raise LDMError(f"expand: a condition of {len(self)} images cannot become one of {b}")
        return self.map(lambda v: v.expand(b, *v.shape[1:]))

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        "Several conditions as one batch; all must fill the same slots with the same shapes."
        first, *others = conditions
        for other in others:
            _check_alike(first, other)
        return Condition(**{name: torch.cat([c.slots()[name] for c in conditions]) for name in first.slots()})

    def where(self, keep: Bool[Tensor, "b"], null: "Condition") -> "Condition":
        "This condition in the rows where `keep` is true, `null` in the others (one row, or as many as this has)."
        _check_alike(self, null)
        others = null.expand(len(self)).slots()
        mixed = {}
        for name, v in self.slots().items():
            mask = keep.to(v.device).view(-1, *[1] * (v.ndim - 1))
            mixed[name] = torch.where(mask, v, others[name].to(v))
        return Condition(**mixed)


def _check_alike(a: Condition, b: Condition) -> None:
    "LDMError unless both fill the same slots with the same shapes, whatever their batch sizes."
    if a.slots().keys() != b.slots().keys():
        raise LDMError(f"the conditions fill different slots: {sorted(a.slots())} and {sorted(b.slots())}")
    for name, v in a.slots().items():
        if v.shape[1:] != b.slots()[name].shape[1:]:
            shapes = f"{tuple(v.shape)} and {tuple(b.slots()[name].shape)}"
            raise LDMError(f"slot {name}: shapes {shapes} differ in more than the first dimension")
