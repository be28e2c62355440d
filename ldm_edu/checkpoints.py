"""Modules that are saved to a folder and built again from it."""

# A checkpoint is a folder with config.json (the arguments of the constructor) and model.safetensors (the weights).
# Neither file is a pickle, so opening a checkpoint runs no code of its author.

import hashlib
import inspect
import itertools
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ldm_edu.checks import shown
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import brief, load_json, load_tensors, save_json, save_tensors, unchanged, whole_folder

__all__ = ["Part", "checkpoint_path", "find_checkpoint", "find_class"]

C = TypeVar("C")  # the class that is looked for
P = TypeVar("P", bound="Part")  # the class whose module is loaded


# --- Where a checkpoint is found ---

PRETRAINED = Path(str(files("ldm_edu"))) / "pretrained"  # the checkpoints that come with the package


def checkpoint_path(name: str | Path) -> Path:
    """The folder `name`, else the shipped checkpoint of that name; CheckpointError lists the shipped ones.

    A folder without a config.json gives way to a shipped checkpoint of its name.
    """
    if not isinstance(name, str | Path):
        raise CheckpointError(f"name={name!r} should be a folder or the name of a checkpoint")
    folder, shipped = os.path.expanduser(name), PRETRAINED / name
    is_inside = bool(str(name)) and PRETRAINED in shipped.parents and ".." not in shipped.parts
    is_shipped = is_inside and os.path.isdir(shipped)  # False, and no error, for a name that no file can have
    if str(name) and os.path.isdir(folder) and not (is_shipped and not os.path.exists(Path(folder, "config.json"))):
        return Path(folder)
    if is_shipped:
        return shipped
    known = sorted(path.name for path in PRETRAINED.glob("*") if path.is_dir())
    told = str(name) if len(str(name)) <= 200 else f"{str(name)[:200]}..."
    raise CheckpointError(f"no folder and no shipped checkpoint {told!r}; shipped: {', '.join(known) or 'none'}")


def shipped_checkpoint(name: Any) -> Path:
    "The folder of the shipped checkpoint of that name, whatever other folders there are; CheckpointError for no name."
    known = {path.name: path for path in PRETRAINED.glob("*") if path.is_dir()}
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"{shown(name)} is no shipped checkpoint; shipped: {', '.join(known)}")
    return known[name]


def weights_checksum(module: nn.Module) -> str:
    "A checksum of a module's weights."
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # "user/model"


def _download(name: str, part: str | None) -> Path:
    "The local copy of a checkpoint on the Hugging Face hub, or of one part of it."
    from huggingface_hub import snapshot_download

    wanted = [f"{part}/*" if part else "*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*.bin", "*.pt", "*.ckpt"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no folder '{name}', and it cannot be had from the hub: {brief(error)}") from error


def find_checkpoint(
    name: str | Path,  # a folder, a shipped checkpoint, or "user/model" on the Hugging Face hub
    part: str | None = None,  # subfolder; of a checkpoint on the hub, nothing else is downloaded then
) -> Path:
    "The local folder of a checkpoint, or of a part of it; CheckpointError where it is found nowhere."
    try:
        folder = checkpoint_path(name)
    except CheckpointError:
        if not isinstance(name, str) or not _HUB_NAME.fullmatch(name):
            raise
        folder = _download(name, part)
    return folder / part if part else folder


class Saved:
    "Base class of what is saved to a folder: with `save_pretrained(folder)`, it has `push_to_hub`, too."

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        "Write everything into `folder`."
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,  # "user/model"; the repository is created where it does not exist
        *,
        half: bool = False,  # upload the weights as float16
        commit_message: str = "Push model using huggingface_hub.",
        private: bool | None = None,  # of a new repository; None: as the account has it
        token: str | None = None,  # None: the one that `hf auth login` has stored
        branch: str | None = None,  # None: main
        **upload: Any,  # further arguments of `HfApi.upload_folder`, such as create_pr=True
    ) -> str:  # address of the commit
        "Upload what `save_pretrained` writes to the Hugging Face hub."
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, half=half)
            repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
            how = {"commit_message": commit_message, "revision": branch} | upload
            return api.upload_folder(repo_id=repo_id, repo_type="model", folder_path=folder, **how)


# --- A module from its two files ---

_OLD_NAMES = {"made": "provenance", "codes": "num_codes"}  # arguments as version 0.1.0 wrote them into config.json
_numbers = itertools.count(1)
CLASS = "class"  # entry of a config that names the class; a Python keyword, so no argument can have this name


def check_plain(value: Any) -> None:
    "TypeError where JSON could not hold a value, or would give another one back."
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"the key {odd[0]!r} of a dict is no text")
        if CLASS in value:
            raise TypeError(f"'{CLASS}' as a key of a dict stands for a part")
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            check_plain(each)
    elif not isinstance(value, str | int | float | None):
        raise TypeError(f"{value!r} is a {type(value).__name__}")


def _plain(value: Any) -> Any:
    "An argument as JSON can hold it: a part, also in a list, becomes its class's name and its arguments."
    if isinstance(value, Part):
        return value.description
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _kept(value: Any) -> Any:
    "An argument as it is now: lists and dicts are copied, at any depth, since the caller may change them later."
    try:
        if type(value) is dict:
            return {key: _kept(each) for key, each in value.items()}
        return type(value)(map(_kept, value)) if type(value) in (list, tuple) else value
    except RecursionError:  # refused when it is saved
        return value


def _check_argument(name: str, value: Any) -> None:
    "CheckpointError where an argument, apart from the parts in it, would not come back from JSON as it is."
    parts = value if isinstance(value, list | tuple) else [value]
    try:
        check_plain([part for part in parts if not isinstance(part, Part)])
    except TypeError as error:
        raise CheckpointError(f"`{name}` cannot be written as JSON: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"`{name}` cannot be written as JSON: it is nested too deeply") from error


def _from_json(value: Any) -> Any:
    "The inverse of `_plain`, with every list, at any depth, as a tuple: JSON has lists only."
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    if isinstance(value, dict) and CLASS in value:
        return _build(Part, value)
    return value


def _subclasses(base: type) -> Iterator[type]:
    "A class and all that are derived from it and have been imported."
    yield base
    for cls in base.__subclasses__():
        yield from _subclasses(cls)


def _precedence(cls: type) -> tuple[int, int]:
    """Of classes of one name, the last in this order is taken: those of other modules, of the package, of a notebook.

    A page of the course defines classes of the package anew, and a cell that is run again defines its class again.
    """
    place = {"ldm_edu": 1, "__main__": 2}.get(cls.__module__.split(".")[0], 0)
    return place, getattr(cls, "_number", 0)


def find_class(
    base: type[C],  # the class itself, or one that it is derived from
    name: str,
) -> type[C]:
    "The class of that name; CheckpointError where no imported module defines it, or where it is of another kind."
    if base.__name__ == name:
        return base
    found = {cls.__name__: cls for cls in sorted(_subclasses(base), key=_precedence)}
    if name in found:
        return found[name]
    name = name if len(name) <= 60 else f"{name[:57]}..."
    if name in {cls.__name__ for cls in _subclasses(Part)}:
        raise CheckpointError(f"{name} is no {base.__name__}")
    known = ", ".join(sorted(cls for cls in found if not cls.startswith("_")))
    raise CheckpointError(
        f"class '{name}' is not known: import the module that defines it first; known {base.__name__}s: {known}"
    )


def _arguments(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    "`config` as arguments of `cls`: old names replaced, and tuples where the annotation does not ask for a list."
    wanted = inspect.signature(cls.__init__).parameters
    config = {name if name in wanted else _OLD_NAMES.get(name, name): value for name, value in config.items()}
    for name, value in config.items():
        if name in wanted and wanted[name].annotation in (bool, "bool") and not isinstance(value, bool):
            raise CheckpointError(f"`{name}` should be true or false, not {brief(ValueError(repr(value)))}")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in wanted.values())
    if not takes_any and (unknown := [name for name in config if name not in wanted]):
        raise CheckpointError(f"{cls.__name__} has no argument {', '.join(unknown)}")
    lists = {name for name in config if name in wanted and "list" in str(wanted[name].annotation).lower()}
    return {
        name: [*map(_from_json, value)] if name in lists and isinstance(value, list) else _from_json(value)
        for name, value in config.items()
    }


def _class_name(base: type, config: Mapping[str, Any]) -> str:
    "The class that a config names, `base` where it names none; CheckpointError where it is no name."
    name = config.get(CLASS, getattr(base, "unnamed", None) or base.__name__)
    if not isinstance(name, str):
        raise CheckpointError(f"'{CLASS}' should be the name of a class, not {brief(ValueError(repr(name)))}")
    return name


def _build(base: type[C], config: Mapping[str, Any]) -> C:
    "A new object of the class that a config names, of `base` where it names none."
    arguments = dict(config)
    cls = find_class(base, _class_name(base, config))
    arguments.pop(CLASS, None)
    return cls(**_arguments(cls, arguments))


MOST = 4096  # what every number in a config may be, however small the weights are: heads, factors and counts are small


def _is_of_the_package(cls: type) -> bool:
    return cls.__module__.startswith("ldm_edu.")


def _check_sizes(name: str, value: Any, most: int) -> None:
    """CheckpointError where an argument of a class of the package asks for more than `most`, before anything is made.

    Channels, lengths and counts cannot exceed what the weights have, and a loop over 10⁹ levels or blocks would take all
    memory before it makes the first weight. A class of one's own may have arguments of any size.
    """
    if isinstance(value, dict) and CLASS in value and _is_of_the_package(find_class(Part, _class_name(Part, value))):
        for inner, argument in value.items():
            _check_sizes(inner, argument, most)
    if isinstance(value, list):
        if len(value) > most:
            raise CheckpointError(f"`{name}` has {len(value)} entries, more than these weights can have")
        for each in value:
            _check_sizes(name, each, most)
    if isinstance(value, int) and abs(value) > most:
        raise CheckpointError(f"`{name}` is {brief(ValueError(value))[:20]}, more than these weights can have")
    if isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"`{name}` is {value}, but should be a finite number")


class _TooLarge(Exception):
    "A module has more weights, or more modules in it, than the tensors of the file can be for."


class _Misfit(CheckpointError):
    "Tensors are not those of a module."


_OPEN = threading.local()  # `blocks`: those of `_at_most` in which this thread is, the innermost last


@contextmanager
def _at_most(
    count: int,  # of parameters and modules
    numbers: int,  # in all parameters together
) -> Iterator[None]:
    """Within the block, this thread makes at most so many parameters and modules; one more raises `_TooLarge`.

    A block inside of it has its own limits: there another file is read, such as a first stage that is shared.
    """
    made, total, blocks = itertools.count(1), 0, vars(_OPEN).setdefault("blocks", [])
    this = object()

    def see(module: nn.Module, name: str, inner: nn.Module | nn.Parameter | None) -> None:
        nonlocal total
        if getattr(_OPEN, "blocks", [None])[-1:] != [this]:  # another thread, or a block inside of this one
            return
        if isinstance(inner, nn.Parameter) and not is_lazy(inner):
            total += inner.numel()
        if next(made) > count or total > numbers:
            raise _TooLarge

    handles = [register_module_parameter_registration_hook(see), register_module_module_registration_hook(see)]
    blocks.append(this)
    try:
        yield
    finally:
        blocks.remove(this)
        for handle in handles:
            handle.remove()


def check_fit(
    model: nn.Module,  # may be on the meta device
    tensors: Mapping[str, Tensor],
) -> None:
    """CheckpointError for the first tensor that is missing, too many, of another shape or kind, or not finite.

    A buffer may hold ±inf, as the mask of an attention does.
    """
    wanted, buffers = model.state_dict(), {name for name, _ in model.named_buffers()}
    for name in [*wanted, *tensors]:
        if name not in tensors:
            raise _Misfit(f"'{name}' is missing; it should be there, of shape {tuple(wanted[name].shape)}")
        if name not in wanted:
            raise _Misfit(f"'{name}' is there, but {type(model).__name__} has no such tensor")
        there, here = tensors[name], wanted[name]
        if there.shape != here.shape:
            raise _Misfit(f"'{name}' has the shape {tuple(there.shape)}, should have {tuple(here.shape)}")
        if here.is_floating_point():
            if there.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                raise _Misfit(f"'{name}' holds {there.dtype}, but should hold floating-point numbers")
            if there.isnan().any() or (name not in buffers and there.isinf().any()):
                raise _Misfit(f"'{name}' holds numbers that are not finite")
            if there.dtype != here.dtype and not torch.equal(there.to(here.dtype).isinf(), there.isinf()):
                raise _Misfit(f"'{name}' holds numbers that are too large for {here.dtype}")
        elif there.dtype != here.dtype:
            raise _Misfit(f"'{name}' holds {there.dtype}, but should hold {here.dtype}")


@contextmanager
def plainly() -> Iterator[None]:
    "Within the block, a new tensor is of float32, on the CPU, and can be trained, whatever the caller has set."
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode(False):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _on_meta(cls: type[C], arguments: Mapping[str, Any]) -> C | None:
    """The module that a config describes, without memory for its weights.

    None for a class of the user's own that cannot be made on the meta device.
    """
    try:
        with torch.device("meta"):
            return _build(cls, arguments)
    except (LDMError, _TooLarge):
        raise
    except Exception:
        if _is_of_the_package(find_class(cls, _class_name(cls, arguments))):
            raise
        return None


_SOME = 10**6  # numbers that a module may have in other weights than those that are saved


@contextmanager
def _bounded(cls: type, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    "Within the block, nothing is made from a config that is much larger than its tensors; else CheckpointError."
    of_cls = find_class(cls, _class_name(cls, arguments)).__name__
    longest = max((max(tensor.shape) for tensor in tensors.values() if tensor.numel() and tensor.ndim), default=0)
    _check_sizes("arguments", {**arguments, CLASS: of_cls}, max(MOST, len(tensors), longest))
    numbers = sum(tensor.numel() for tensor in tensors.values())
    try:
        # A module may register a weight twice, and hold some modules that have none.
        with _at_most(10 * len(tensors) + 1000, 2 * numbers + _SOME):
            yield
    except _TooLarge:
        raise _Misfit(f"the config asks for more weights than the {len(tensors)} that are there") from None


def _checked_build(cls: type[C], arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> C:
    "The module that a config describes, into which tensors fit; it is made without memory first."
    with _bounded(cls, arguments, tensors):
        shapes = _on_meta(cls, arguments)
    if shapes is not None:
        check_fit(cast(nn.Module, shapes), tensors)
    with _bounded(cls, arguments, tensors):
        model = _build(cls, arguments)
    check_fit(cast(nn.Module, model), tensors)
    return model


def _check_loads(part: "Part", arguments: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    "CheckpointError where `from_pretrained` would refuse what a part is saved as."
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"'{name}' is a {type(tensor).__name__}, but only tensors can be saved")
        if is_lazy(tensor):
            raise CheckpointError(f"'{name}' has no shape yet: call the module once, then save it")
    try:
        with plainly(), torch.random.fork_rng(devices=[]):
            with _bounded(type(part), arguments, tensors):
                shapes = _on_meta(type(part), arguments)
            check_fit(part if shapes is None else shapes, tensors)
    except Exception as error:  # the constructor may raise anything
        raise CheckpointError(f"{type(part).__name__} could not be loaded again: {brief(error)}") from error


def _load(cls: type[C], config: Path, weights: Path) -> C:
    "The module that two files describe; building it leaves the global random stream where it was."
    with plainly(), unchanged(config):
        return _read(cls, config, weights)


def _read(cls: type[C], config: Path, weights: Path) -> C:
    "The module that two files describe."
    arguments = load_json(config)
    tensors = load_tensors(weights)
    named = arguments.get(CLASS)
    name = brief(ValueError(named))[:60] if isinstance(named, str) else cls.__name__
    try:
        with torch.random.fork_rng(devices=[]):
            model = _checked_build(cls, arguments, tensors)
    except _Misfit as error:
        raise CheckpointError(f"{weights} does not fit {name}: {brief(error)}") from error
    except RecursionError as error:
        raise CheckpointError(f"{config} describes no {name}: its parts are nested too deeply") from error
    except Exception as error:  # a foreign config may make the constructor raise anything
        raise CheckpointError(f"{config} describes no {name}: {brief(error)}") from error
    cast(nn.Module, model).load_state_dict(tensors)
    return model


class Part(nn.Module, Saved):
    """Base class of a module that is saved to a folder and built again from it: `class UNet(Part)`.

    The method names are those of `transformers` and `diffusers`: `save_pretrained`, `from_pretrained`, `push_to_hub`.
    The arguments of the constructor are recorded when an object is made. Each must be something that JSON can hold, or
    another part, or a list of parts. JSON has no tuples: what comes back as a list becomes a tuple, unless the argument
    is annotated as a list. Some arguments are known only after training, such as the scale factor of a first stage.
    `follow` names these; each needs an attribute of the same name, whose present value is saved.
    config.json names the class, so `from_pretrained` of a base class gives the derived class that was saved. A class of
    your own is found by its name once its module is imported.
    """

    follow: ClassVar[tuple[str, ...]] = ()  # arguments whose present value, an attribute of that name, is saved
    unnamed: ClassVar[str | None] = None  # the class of a config that names none, as version 0.1.0 wrote it
    _made_with: dict[str, Any]
    _number: ClassVar[int] = 0  # the classes in the order in which they were defined

    def __new__(cls, *args: Any, **kwargs: Any):
        "Record the arguments of the constructor, the defaults among them."
        part = super().__new__(cls)
        call = inspect.signature(cls.__init__).bind_partial(part, *args, **kwargs)
        call.apply_defaults()
        part._made_with = {}
        for name, value in list(call.arguments.items())[1:]:  # without self
            kind = call.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL and value:
                raise TypeError(f"{cls.__name__}(*{name}): arguments without a name cannot be saved; give them names")
            value = _kept(value)
            if kind is not inspect.Parameter.VAR_POSITIONAL:
                part._made_with |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        return part

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls._number = next(_numbers)

    @property
    def config(self) -> dict[str, Any]:
        "The arguments that make a module like this one; those in `follow` with their present value."
        return self._made_with | {name: getattr(self, name) for name in self.follow}

    @property
    def description(self) -> dict[str, Any]:
        "What config.json says: the name of the class under `class`, and the arguments."
        return {CLASS: type(self).__name__} | {name: _plain(value) for name, value in self.config.items()}

    def save_pretrained(
        self,
        folder: str | Path,  # created where it does not exist
        half: bool = False,  # save the weights as float16
    ) -> None:
        """Write config.json and model.safetensors, which belong together: a save that fails leaves the old files.

        Raises CheckpointError, and leaves the old files as they were, where an argument cannot be written as JSON, a
        weight is not finite or does not fit float16, `from_pretrained` would refuse the files, or the disk is full.
        """
        for name, value in self.config.items():
            _check_argument(name, value)
        with whole_folder(folder) as new:
            tensors = self.state_dict()
            save_json(self.description, new / "config.json")
            _check_loads(self, load_json(new / "config.json"), tensors)
            save_tensors(tensors, new / "model.safetensors", half)

    @classmethod
    def from_pretrained(
        cls: type[P],
        name: str | Path,  # a folder, a shipped checkpoint, or "user/model" on the Hugging Face hub
        part: str | None = None,  # subfolder, such as "first_stage", "unet", "conditioner"
    ) -> P:
        """The module saved under `name`, on the CPU and in eval mode: of this class or of one derived from it.

        Loading is strict: CheckpointError names the file where a class or an argument is unknown, a weight is missing,
        superfluous or of another shape, or a file is not whole.
        """
        folder = find_checkpoint(name, part)
        return _load(cls, folder / "config.json", folder / "model.safetensors").eval()
