"""Files that are written whole or not at all, and modules that are saved to a folder and made again from it."""

import inspect
import json
import os
import re
import textwrap
import torch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from huggingface_hub import PyTorchModelHubMixin
from importlib.resources import files
from pathlib import Path
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing import Any, ClassVar
from ldm_edu.errors import CheckpointError

@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    "A temporary path beside `path`; it takes `path`'s place only if the block ends without an error."
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # on the disk, not in some cache, before it takes the name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _brief(error: Exception) -> str:
    "The gist of an error in one line."
    return textwrap.shorten(str(error), 300)


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    half: bool = False,  # floats as float16
    notes: Mapping[str, str] | None = None,  # texts for the file's header
) -> None:
    "Write named tensors to a safetensors file, whole or not at all; CheckpointError where that fails (a full disk)."
    kept = {}
    for name, tensor in tensors.items():
        dtype = torch.float16 if half and tensor.is_floating_point() else tensor.dtype
        kept[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if half and not torch.equal(kept[name].isfinite(), tensor.detach().cpu().isfinite()):
            raise CheckpointError(f"'{name}' has values beyond float16's 65504: save it with half=False")
    try:
        with atomic(path) as temporary:
            save_file(kept, temporary, metadata=dict(notes) if notes else None)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written ({_brief(error)}): is there space left?") from error


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    "The named tensors of a safetensors file, on the CPU; CheckpointError where it is missing, cut off or another kind."
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({_brief(error)}): copy it again") from error


def load_notes(path: str | Path) -> dict[str, str]:
    "The texts in a safetensors file's header, without reading its tensors; CheckpointError as for `load_tensors`."
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({_brief(error)}): copy it again") from error


def save_json(values: Mapping[str, Any], path: str | Path) -> None:
    "Write a dict as readable JSON, whole or not at all."
    for name, value in values.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise CheckpointError(f"`{name}` cannot be written as JSON: {error}") from error
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_json(path: str | Path) -> dict[str, Any]:
    "The dict in a JSON file; CheckpointError where it is missing or something else."
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON ({_brief(error)})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(values).__name__}")
    return values


PRETRAINED = Path(str(files("ldm_edu"))) / "pretrained"  # the checkpoints that come with the package


def checkpoint_path(name: str | Path) -> Path:
    "The folder `name`, or the shipped checkpoint of that name; CheckpointError lists what is shipped."
    for folder in (Path(name).expanduser(), PRETRAINED / name):
        if str(name) and folder.is_dir():
            return folder
    shipped = sorted(path.name for path in PRETRAINED.glob("*") if path.is_dir())
    raise CheckpointError(f"no folder and no shipped checkpoint '{name}'; shipped: {', '.join(shipped) or 'none'}")


def _download(name: str, part: str | None) -> Path:
    "The local copy of a checkpoint on the Hugging Face hub, or of one part of it."
    from huggingface_hub import snapshot_download

    wanted = [f"{part}/*" if part else "*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*.bin", "*.pt", "*.ckpt"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no folder '{name}', and it cannot be had from the hub: {_brief(error)}") from error


def _find(name: str | Path, part: str | None) -> Path:
    "The folder that `from_pretrained` reads: a local one, a shipped one, or for 'user/model' one from the hub."
    try:
        folder = checkpoint_path(name)
    except CheckpointError:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            raise
        folder = _download(name, part)
    return folder / part if part else folder


def _tuples(value: Any) -> Any:
    "`value` with every list in it made a tuple."
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


_OLD_NAMES = {"made": "provenance", "codes": "num_codes"}  # arguments as version 0.1.0 wrote them into config.json


def _arguments(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    "`config` as arguments of `cls`, with tuples where `cls` does not ask for a list."
    wanted = inspect.signature(cls.__init__).parameters
    config = {_OLD_NAMES.get(name, name) if name not in wanted else name: value for name, value in config.items()}
    if unknown := [name for name in config if name not in wanted]:
        raise CheckpointError(f"{cls.__name__} has no argument {', '.join(unknown)}")
    lists = {name for name in config if "list" in str(wanted[name].annotation).lower()}
    return {name: value if name in lists else _tuples(value) for name, value in config.items()}


def _load(cls: type, config: Path, weights: Path) -> nn.Module:
    "The module of class `cls` that two files describe."
    arguments, tensors = load_json(config), load_tensors(weights)
    try:
        with torch.random.fork_rng(devices=[]):
            model = cls(**_arguments(cls, arguments))
    except Exception as error:  # whatever a foreign config makes the constructor do
        raise CheckpointError(f"{config} describes no {cls.__name__}: {_brief(error)}") from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{weights} does not fit {cls.__name__}: {_brief(error)}") from error
    return model


class Part(PyTorchModelHubMixin, library_name="ldm_edu"):
    "Mixin for an nn.Module that is saved to a folder and made again from it: `class UNet(Part, nn.Module)`."

    follow: ClassVar[tuple[str, ...]] = ()  # arguments that may change later: see the attributes so named

    def __new__(cls, *args: Any, **kwargs: Any):
        "Note the arguments, all of them (the library would put a default in place of what is no JSON)."
        part = super().__new__(cls, *args, **kwargs)
        call = inspect.signature(cls.__init__).bind_partial(part, *args, **kwargs)
        call.apply_defaults()
        part._hub_mixin_config = dict(list(call.arguments.items())[1:])  # without self
        return part

    @property
    def config(self) -> dict[str, Any]:
        "The arguments that make a module like this one; those in `follow` as they are now."
        return self._hub_mixin_config | {name: getattr(self, name) for name in self.follow}

    def save_pretrained(
        self,
        folder: str | Path,  # made where it does not exist
        half: bool = False,  # weights as float16
        *,
        config: Any = None,  # `push_to_hub` passes these two, which we do not need
        model_card_kwargs: dict | None = None,
    ) -> None:
        "Write config.json and model.safetensors: both whole, or an error and the old ones."
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / "config.json") as temporary:
            save_json(self.config, temporary)
            save_tensors(self.state_dict(), folder / "model.safetensors", half)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,  # a folder, a shipped checkpoint, or "user/model" on the Hugging Face hub
        part: str | None = None,  # subfolder, such as "first_stage", "unet", "conditioner"
    ):
        "The module saved under `name`, on the CPU in eval mode; CheckpointError names the file that does not fit."
        folder = _find(name, part)
        return _load(cls, folder / "config.json", folder / "model.safetensors").eval()
