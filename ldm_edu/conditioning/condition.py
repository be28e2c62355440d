"""What a batch of images is conditioned on: three slots, and the conditioners that fill them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ldm_edu.checkpoints import Part
from ldm_edu.checks import check_count, shown
from ldm_edu.errors import LDMError

__all__ = ["Condition", "Conditioner", "MergedConditioner"]


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
        check_count("b", b, 0)
        if len(self) not in (1, b):
            raise LDMError(f"expand: a condition of {len(self)} images cannot become one of {b}")
        return self.map(lambda v: v.expand(b, *v.shape[1:]))

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        "Several conditions as one batch; all must fill the same slots with the same shapes."
        if not conditions:
            raise LDMError("conditions is empty: at least one is needed")
        first, *others = conditions
        for other in others:
            _check_alike(first, other)
        return Condition(**{name: torch.cat([c.slots()[name] for c in conditions]) for name in first.slots()})

    @staticmethod
    def merge(conditions: Sequence["Condition"]) -> "Condition":
        """Conditions of the same images side by side in every slot.

        Contexts are joined along the tokens (they need one width d), maps along the channels, vectors along v. A map of
        one pixel stands for all.
        """
        if not conditions:
            raise LDMError("conditions is empty: at least one is needed")
        slots: dict[str, list[Tensor]] = {}
        for condition in conditions:
            for name, v in condition.slots().items():
                slots.setdefault(name, []).append(v)
        if maps := slots.get("concat"):
            size = max(tuple(v.shape[2:]) for v in maps)
            slots["concat"] = [v.expand(-1, -1, *size) if v.shape[2:] == (1, 1) else v for v in maps]
        for name, tensors in slots.items():
            if len({(len(v), *v.shape[2:]) for v in tensors}) > 1:
                shapes = " and ".join(str(tuple(v.shape)) for v in tensors)
                raise LDMError(f"slot {name}: shapes {shapes} differ in more than the second dimension: cannot merge")
        return Condition(**{name: torch.cat(tensors, dim=1) for name, tensors in slots.items()})

    def dropped(self, null: "Condition") -> "Condition":
        """The same images without their condition: every slot that `null` fills is replaced by the one of `null`.

        `null` has one row, or as many as this has; its maps may have one pixel, which stands for all. A slot that `null`
        leaves empty is kept: it is never dropped.
        """
        mine = self.slots()
        if not null.slots() or null.slots().keys() - mine.keys():
            raise LDMError(f"the conditions fill different slots: {sorted(mine)}, and the null {sorted(null.slots())}")
        others = null.expand(len(self)).slots()
        if "concat" in others and others["concat"].shape[2:] == (1, 1):
            others["concat"] = others["concat"].expand(-1, -1, *mine["concat"].shape[2:])
        for name, v in others.items():
            if v.shape != mine[name].shape:
                shapes = f"{tuple(mine[name].shape)} and {tuple(v.shape)}"
                raise LDMError(f"slot {name}: the shapes of condition and null, {shapes}, differ")
        return Condition(**mine | {name: v.to(mine[name]) for name, v in others.items()})

    def where(self, keep: Bool[Tensor, "b"], null: "Condition") -> "Condition":
        "This condition in the rows where `keep` is true, and `dropped(null)` in the others."
        others, mixed = self.dropped(null).slots(), {}
        for name, v in self.slots().items():
            mask = keep.to(v.device).view(-1, *[1] * (v.ndim - 1))
            mixed[name] = torch.where(mask, v, others[name])
        return Condition(**mixed)


def _check_alike(a: Condition, b: Condition) -> None:
    "LDMError unless both fill the same slots with the same shapes, whatever their batch sizes."
    if a.slots().keys() != b.slots().keys():
        raise LDMError(f"the conditions fill different slots: {sorted(a.slots())} and {sorted(b.slots())}")
    for name, v in a.slots().items():
        if v.shape[1:] != b.slots()[name].shape[1:]:
            shapes = f"{tuple(v.shape)} and {tuple(b.slots()[name].shape)}"
            raise LDMError(f"slot {name}: shapes {shapes} differ in more than the first dimension")


def check_key(key: Any) -> str:
    "`key` as it is; LDMError where it is no name of an entry of a batch."
    if not isinstance(key, str) or not key:
        raise LDMError(f"key={shown(key)} should be the name of an entry of a batch, such as 'class'")
    return key


def read_key(batch: Mapping[str, Any], key: str) -> Any:
    "What a batch holds under a key; LDMError where it has no such key."
    if not isinstance(batch, Mapping):
        raise LDMError(f"batch should be a dict with '{key}', not {shown(batch)}")
    if key not in batch:
        raise LDMError(f"batch: has no '{key}', only {', '.join(map(str, batch)) or 'nothing'}")
    return batch[key]


class Conditioner(Part):
    """Base class of a module that turns a batch into a `Condition` (the tau_theta of § 3.3).

    A conditioner of your own derives from this class. It says which `keys` of a batch it reads and which slots it
    fills, under the names of the UNet's arguments; it defines `forward` and `null`. It never drops anything: `drop`
    does. A recipe names it by the name of its class.
    """

    unnamed = "TextConditioner"  # version 0.1.0 had no other
    keys: tuple[str, ...] = ()  # of the batch; where they depend on the arguments, set them in the constructor
    context_dim: int | None = None  # d of the context (b, l, d); None: no context
    concat_channels: int = 0  # c of the maps (b, c, h, w), in the size of the latent; 0: no maps
    vector_dim: int | None = None  # v of the vector (b, v); None: no vector

    def forward(self, batch: Mapping[str, Any]) -> Condition:
        "The condition of a batch that has all of `keys`, on the module's device."
        raise NotImplementedError(f"{type(self).__name__} defines no `forward`")

    def null(
        self,
        b: int = 1,  # number of images
    ) -> Condition:
        """What stands for "no condition".

        A slot that is left out is never dropped. A map may have one pixel, which stands for all; a context has as many
        tokens as a condition's.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no `null`")

    @classmethod
    def keys_of(cls, arguments: Mapping[str, Any]) -> Sequence[str]:
        "The keys that a conditioner with these arguments reads, also where only the data can complete them."
        return cls.keys

    @classmethod
    def complete(
        cls,
        arguments: Mapping[str, Any],  # of the constructor, from a recipe
        column: Callable[[str], Any],  # key -> all values of the training data under that key
    ) -> dict[str, Any]:
        "The arguments, with what only the training data can say, such as a vocabulary. Here: nothing is added."
        return dict(arguments)


class MergedConditioner(Conditioner):
    "Several conditioners as one: their conditions side by side in every slot (`Condition.merge`)."

    def __init__(self, conditioners: Sequence[Conditioner]):
        super().__init__()
        if not isinstance(conditioners, Sequence) or not all(isinstance(part, Conditioner) for part in conditioners):
            raise LDMError(f"conditioners should be a list of them, not {shown(conditioners)}")
        if not conditioners:
            raise LDMError("conditioners is empty: at least one is needed")
        self.conditioners = nn.ModuleList(conditioners)
        self.keys = tuple(dict.fromkeys(key for part in conditioners for key in part.keys))
        widths = {part.context_dim for part in conditioners if part.context_dim}
        if len(widths) > 1:
            raise LDMError(f"conditioners: their contexts have different widths, context_dim={sorted(widths)}")
        self.context_dim = max(widths, default=None)
        self.concat_channels = sum(part.concat_channels for part in conditioners)
        self.vector_dim = sum(part.vector_dim or 0 for part in conditioners) or None

    def forward(self, batch: Mapping[str, Any]) -> Condition:
        "The conditions of all conditioners, merged."
        return Condition.merge([part(batch) for part in self.parts])

    @property
    def parts(self) -> list[Conditioner]:
        "The conditioners, in their order."
        return [cast(Conditioner, part) for part in self.conditioners]

    def null(self, b: int = 1) -> Condition:
        "The nulls of all conditioners, merged; a slot that one of them never drops is left out."
        nulls = [part.null(b) for part in self.parts]
        kept = {slot for part, null in zip(self.parts, nulls) for slot in _filled(part) - null.slots().keys()}
        return Condition.merge(
            [Condition(**{k: v for k, v in null.slots().items() if k not in kept}) for null in nulls]
        )


def _filled(conditioner: Conditioner) -> set[str]:
    "The names of the slots that a conditioner says it fills."
    widths = (conditioner.context_dim, conditioner.concat_channels, conditioner.vector_dim)
    return {name for name, width in zip(("context", "concat", "vector"), widths) if width}
