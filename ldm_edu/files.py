"""Every file goes through here: written whole or not at all, read with an error that names the file and the remedy."""

import errno
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_edu.errors import CheckpointError, LDMError

__all__ = ["atomic", "load_json", "load_notes", "load_tensors", "save_json", "save_tensors"]


# --- What the system says, and what to do about it ---

_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT): "the disk is full: make room",
    (errno.EFBIG,): "it is larger than a file may be here",
    (errno.EACCES, errno.EPERM, errno.EROFS): "no permission: change the permissions, or take another place",
    (errno.EISDIR,): "a folder stands in its place",
    (errno.ENOTDIR, errno.EEXIST): "a file stands where a folder is needed",
    (errno.ENAMETOOLONG,): "the name is too long",
    (errno.ENOENT,): "there is no such file or folder",
    (errno.ELOOP,): "a link leads back to itself",
}


def reason(error: Exception) -> str:
    "What an error of the operating system means, and what to do about it, in one line."
    if isinstance(error, SafetensorError) and (number := re.search(r"\(os error (\d+)\)", str(error))):
        error = OSError(int(number[1]), os.strerror(int(number[1])))
    for numbers, text in _REMEDIES.items():
        if isinstance(error, OSError) and error.errno in numbers:
            return text
    return brief(error) if not isinstance(error, OSError) or error.strerror is None else error.strerror


def printable(text: str) -> str:
    "A text from elsewhere for a message: what a terminal would obey, such as an escape sequence, as backslash codes."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def brief(error: Exception) -> str:
    "The message of an error in one line of at most 300 characters, without what a terminal would obey."
    line = printable(" ".join((str(error) or type(error).__name__).split())[:301])
    return line if len(line) <= 300 else f"{line[:297]}..."


BROKEN_NAME = (ValueError, RuntimeError)  # a name with a zero byte; ~nobody


def _check_name(path: str | Path, error: type[LDMError]) -> None:
    "An error for a name that no file can have: the system refuses a zero byte with another kind of error."
    if "\0" in str(path):
        raise error(f"{str(path)!r} is no name that a file can have: it holds a zero byte")


@contextmanager
def writing(
    path: str | Path,  # a file or a folder
    error: type[LDMError] = LDMError,  # what is raised
    advice: str = "",  # behind the reason
) -> Iterator[None]:
    "Turns what the operating system refuses inside the block into an error that names `path` and the remedy."
    _check_name(path, error)
    try:
        yield
    except (OSError, SafetensorError) as refused:
        raise error(f"{path} cannot be written: {reason(refused)}{advice}") from refused


@contextmanager
def reading(
    path: str | Path,
    error: type[LDMError] = CheckpointError,  # what is raised
    kind: str = "file",  # what should be there, for the message
    advice: str = "",  # behind "is missing"
) -> Iterator[None]:
    "Turns what the operating system refuses inside the block into an error that names `path` and the remedy."
    _check_name(path, error)
    try:
        yield
    except OSError as refused:
        if isinstance(refused, FileNotFoundError):
            what = "is a link that leads nowhere" if os.path.islink(path) else f"is missing{advice}"
            raise error(f"{path} {what}") from refused
        raise error(f"{path} cannot be read: {reason(refused)}; a {kind} should stand here") from refused


def folder_for(
    path: str | Path,  # of a file
    error: type[LDMError] = LDMError,
) -> None:
    "Create the folder that a file will lie in; LDMError where that cannot be."
    with writing(Path(path).parent, error):
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def place(path: str | Path) -> Path:
    "`path` as a Path, with `~` as the home folder; LDMError where no file or folder can have that name."
    try:
        path = Path(path).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):  # nothing lies there yet
        pass
    except BROKEN_NAME as error:
        raise LDMError(f"{str(path)!r} is no name that a file can have ({error})") from error
    except OSError as error:
        raise LDMError(f"{path} cannot be written: {reason(error)}") from error
    return Path(path)


def probe(path: str | Path) -> Path:
    """`path` as a Path, where a file can be written; else LDMError, before the work whose result it is for.

    `~` is the home folder. The folder is created where it is missing, and what lies there stays as it was.
    """
    path = place(path)
    folder_for(path)
    with writing(path):
        if path.exists() and not path.is_file():
            raise IsADirectoryError(errno.EISDIR, "a folder, or something else that is no file")
        with atomic(path, replace=False):
            pass
    return path


# --- Whole, or not at all ---


@contextmanager
def atomic(
    path: str | Path,
    replace: bool = True,  # False: only try whether it could be written
    sync: bool = True,  # wait for the disk? Without, thousands of small files are fast, and a power cut may empty one
) -> Iterator[Path]:
    """A temporary file beside `path`; it replaces `path` only if the block ends without an error.

    A reader of `path` therefore finds the old file or the new one, never a part of it, even if the machine stops in the
    middle of writing: renaming a file is one single step of the operating system. The new file has the permissions that
    any new file gets, whatever the block writes it with.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[-60:]}.{os.getpid()}-{secrets.token_hex(3)}")
    with open(temporary, "xb"):  # "x": never through a link that somebody has put there
        mode = temporary.stat().st_mode
    try:
        yield temporary
        if not replace:
            return
        if temporary.stat().st_mode != mode:  # safetensors makes files for their owner alone
            temporary.chmod(mode)
        if sync:
            with open(temporary, "r+b") as file:  # "+": Windows refuses to flush what is open for reading
                os.fsync(file.fileno())  # on the disk, not in some cache, before it takes the name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_UNFINISHED = ".unfinished-"  # how the temporary folders of `whole_folder` begin
_CUT_SHORT = {"unfinished": "some files here are old and some are new"}  # a config.json while the others are moved


# Errors of file systems that have no locks: some network drives.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_PATIENCE = 60  # seconds to wait for another process that moves its files into the same folder


def _acquired(lock: FileLock) -> bool:
    "Take a lock; False where no file can be locked."
    while True:
        try:
            lock.acquire(timeout=_PATIENCE)
            held = os.stat(lock.lock_file)
        except FileNotFoundError:  # the one that had it before has removed the file
            lock.release()
            continue
        except Timeout:
            raise TimeoutError(errno.ETIMEDOUT, "another process is saving into it: save it again later") from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            return False
        file = getattr(lock, "_context").lock_file_fd
        if os.name == "nt" or os.path.samestat(held, os.fstat(file)):
            return True
        lock.release()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    "Within the block, no other process moves files into a folder; where no file can be locked, that is not known."
    lock = FileLock(folder / ".saving.lock")
    is_locked = _acquired(lock)
    try:
        yield
    finally:
        if is_locked:
            with suppress(OSError):  # Windows removes no file that is open, and filelock removes it there
                os.unlink(lock.lock_file)
            lock.release()


def _check_places(new: Path, folder: Path, names: list[Path]) -> None:
    "Make the folders of files that will be moved into `folder`; CheckpointError where one could not be moved there."
    for name in names:
        place = folder / name
        with writing(place, CheckpointError):
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.parent.stat().st_dev != new.stat().st_dev:
                raise OSError(errno.EXDEV, f"{place.parent} lies on another file system: save to another folder")
            if not os.access(place.parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "no permission")
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder")


def _move(new: Path, folder: Path, old: Path) -> None:
    "Move the files under `new` into `folder`, and what they replace to `old`: all of them, or none; see `whole_folder`."
    names = [path.relative_to(new) for path in sorted(new.rglob("*")) if path.is_file()]
    configs = sorted((name for name in names if name.name == "config.json"), key=lambda name: -len(name.parts))
    names = [name for name in names if name not in configs] + configs
    _check_places(new, folder, names)
    for name in names:
        (old / name).parent.mkdir(parents=True, exist_ok=True)
    there = [name for name in names if (folder / name).exists()]
    for name in configs:
        if name in there:
            shutil.copy2(folder / name, old / name)
    try:
        for name in configs[::-1]:
            if name in there:
                save_json(_CUT_SHORT, folder / name)
        for name in names:
            if name in there and name not in configs:
                os.replace(folder / name, old / name)
            os.replace(new / name, folder / name)
    except BaseException:
        for name in names:  # in the order in which they were moved: a config.json comes back behind its weights
            if (old / name).exists():
                os.replace(old / name, folder / name)
            elif not (new / name).exists():
                (folder / name).unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder; if the block ends without an error, what it wrote there takes its place in `folder`.

    The files belong together, but are moved one by one. So every config.json comes last, the topmost behind the others,
    and until then what stands in its place is refused by `load_json`: a process that is killed leaves the old files, the
    new ones, or a folder that is not read. An error leaves the old files. Two processes move their files in turn.
    """
    if not str(folder):
        raise CheckpointError("folder is an empty text: give the folder a name")
    try:
        folder = Path(folder).expanduser()
    except RuntimeError as error:  # ~nobody
        raise CheckpointError(f"{str(folder)!r} is no name that a folder can have ({error})") from error
    with writing(folder, CheckpointError):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, deep=False)
        with TemporaryDirectory(dir=folder, prefix=f"{_UNFINISHED}{os.getpid()}-") as made:
            new, old = Path(made) / "new", Path(made) / "old"
            new.mkdir()
            yield new
            with _locked(folder):
                _move(new, folder, old)


@contextmanager
def unchanged(path: str | Path) -> Iterator[None]:
    "`CheckpointError` if a file is written anew while the block reads what belongs to it."
    with reading(path):
        before = os.stat(path)
    yield
    with reading(path):
        after = os.stat(path)
    if (before.st_ino, before.st_mtime_ns, before.st_size) != (after.st_ino, after.st_mtime_ns, after.st_size):
        raise CheckpointError(f"{path} was written anew while the files beside it were read: load it again")


# Temporary names of `atomic` and `whole_folder`, with the number of the process, and those of safetensors.
_TEMPORARY = re.compile(r"\..+\.(\d+)-\w{6}|\.unfinished-(\d+)-\w+|\.tmp\w{6}")


def _is_running(process: int) -> bool:
    "Does a process of that number exist on this machine?"
    if os.name == "nt":  # there, os.kill would end it
        return process == os.getpid()
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def leftovers(
    folder: str | Path,
    deep: bool = True,  # False: only there and one level below, and only what carries the number of its process
) -> list[Path]:
    "Temporary files and folders under `folder` of processes that were killed while they wrote."
    found = []
    for path in Path(folder).rglob(".*") if deep else [*Path(folder).glob(".*"), *Path(folder).glob("*/.*")]:
        named = _TEMPORARY.fullmatch(path.name)
        number = named and (named[1] or named[2])
        if named and (not _is_running(int(number)) if number else deep):
            found.append(path)
    return found


def remove_leftovers(folder: str | Path, deep: bool = True) -> None:
    "Remove what `leftovers` finds; what cannot be removed stays."
    for path in leftovers(folder, deep):
        if path.is_dir() and path.name.startswith(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)
        elif not path.is_dir():
            with suppress(OSError):
                path.unlink()


# --- Tensors ---

_CHECKSUM = "checksum"  # entry of a safetensors file's header: of all its tensors together


def tensor_checksum(
    tensor: Tensor,
    name: str = "",  # in front of the dtype
    start: int = 0,  # the checksum of what comes before
) -> int:
    "A checksum of a tensor's dtype, shape and bytes."
    total = zlib.crc32(f"{name}{tensor.dtype} {tuple(tensor.shape)}".encode(), start)
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    "A checksum of names, dtypes, shapes and bytes of tensors."
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = tensor_checksum(tensor, f"{name} ", total)
    return f"{total:08x}"


@contextmanager
def _reading_tensors(path: str | Path) -> Iterator[None]:
    "`CheckpointError`, with the file's name, where a safetensors file cannot be read."
    with reading(path, kind="safetensors file"), open(path, "rb"):
        pass  # Python says why a file cannot be opened; safetensors calls every such file missing
    try:
        with reading(path, kind="safetensors file"):
            yield
    except (SafetensorError, TypeError, RuntimeError) as error:  # the last two: of torch, for a shape it cannot have
        raise CheckpointError(f"{path} is not a whole safetensors file ({brief(error)}): copy it again") from error


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    half: bool = False,  # save floating-point tensors as float16
    notes: Mapping[str, str] | None = None,  # texts for the file's header
    checksum: bool = True,  # add a checksum of all tensors to them
) -> None:
    """Write named tensors to a safetensors file, whole or not at all.

    With `half` the relative error of a number is at most 2⁻¹¹ from 2⁻¹⁴ on; below, its absolute error is at most 2⁻²⁵,
    so that the smallest numbers become 0. A finite number beyond float16's 65504 raises CheckpointError. So does a file
    that cannot be written, for instance because the disk is full.
    """
    kept = {}
    for name, tensor in tensors.items():
        dtype = torch.float16 if half and tensor.is_floating_point() else tensor.dtype
        kept[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if half and not torch.equal(kept[name].isfinite(), tensor.detach().cpu().isfinite()):
            raise CheckpointError(f"'{name}' has values beyond float16's 65504: save it with half=False")
    with writing(path, CheckpointError), atomic(path) as temporary:
        save_file(kept, temporary, metadata={**(notes or {}), **({_CHECKSUM: _checksum(kept)} if checksum else {})})


def load_tensors(
    path: str | Path,
    mapped: bool = False,  # leave the numbers on the disk until they are touched, and do not compare the checksum
) -> dict[str, Tensor]:
    """The named tensors of a safetensors file, on the CPU.

    CheckpointError where the file is missing, truncated, of another kind, or changed since `save_tensors` wrote it.
    """
    with _reading_tensors(path), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if mapped:
            return tensors
        # Copies: Windows replaces no file that is mapped into memory.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        written = (file.metadata() or {}).get(_CHECKSUM)
    if written is not None and written != _checksum(tensors):
        raise CheckpointError(f"{path} is damaged: its checksum is not the one that was written; copy it again")
    return tensors


def load_notes(path: str | Path) -> dict[str, str]:
    "The texts in a safetensors file's header, without reading its tensors; CheckpointError as for `load_tensors`."
    with _reading_tensors(path), safe_open(path, "pt") as file:
        return {name: text for name, text in (file.metadata() or {}).items() if name != _CHECKSUM}


# --- Text and JSON ---


def read_text(
    path: str | Path,
    error: type[LDMError] = CheckpointError,  # what is raised
    advice: str = "",  # behind "is missing"
) -> str:
    "A text in UTF-8, without the invisible mark that some editors put in front; an error that names the file."
    try:
        with reading(path, error, "text file", advice):
            return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as wrong:
        raise error(f"{path} is not text in UTF-8 ({wrong}); copy it again") from wrong


def write_text(text: str, path: str | Path, error: type[LDMError] = CheckpointError, sync: bool = True) -> None:
    "Write a text in UTF-8, whole or not at all (see `atomic` for `sync`); an error that names the file."
    with writing(path, error), atomic(path, sync=sync) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(content: bytes, path: str | Path, error: type[LDMError] = CheckpointError) -> None:
    "Write bytes, whole or not at all; an error that names the file."
    with writing(path, error), atomic(path) as temporary:
        temporary.write_bytes(content)


def copy_whole(
    source: Any,  # open for reading bytes
    path: str | Path,
    sync: bool = True,  # see `atomic`
) -> None:
    "Write what is left of an open file to `path`, whole or not at all; OSError where that cannot be."
    with atomic(path, sync=sync) as temporary, open(temporary, "wb") as sink:
        shutil.copyfileobj(source, sink)


@contextmanager
def appending(
    path: str | Path,
    error: type[LDMError] = CheckpointError,  # what is raised
    advice: str = "",  # behind the reason
) -> Iterator[Callable[[bytes], None]]:
    "A function that writes a block behind the end of a file, at once; an error that names the file."
    with writing(path, error, advice):
        file = open(path, "ab")

    def append(block: bytes) -> None:
        with writing(path, error, advice):
            file.write(block)
            file.flush()

    try:
        yield append
    finally:
        with writing(path, error, advice):
            file.close()


def _no_number(name: str) -> None:
    "What `json` calls for the words NaN and Infinity, which are no JSON."
    raise ValueError(f"{name} is no number that JSON knows")


def parse_json(
    text: str | bytes,  # bytes are in UTF-8
    nan: bool = False,  # also the words NaN and Infinity, which are no JSON, but which Python writes
) -> Any:
    "What JSON text holds; ValueError where it is none, or nested too deeply to be read."
    try:
        return json.loads(text, parse_constant=None if nan else _no_number)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None


def read_json(
    path: str | Path,
    error: type[LDMError] = CheckpointError,  # what is raised
    advice: str = "",  # behind "is missing"
) -> Any:
    "What a JSON file holds; an error that names the file."
    text = read_text(path, error, advice)
    try:
        return parse_json(text)
    except ValueError as wrong:
        raise error(f"{path} is not JSON ({brief(wrong)}); copy it again") from wrong


def load_json(path: str | Path) -> dict[str, Any]:
    "The dict in a JSON file; CheckpointError where the file is missing or holds something else."
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(values).__name__}")
    if values == _CUT_SHORT:
        raise CheckpointError(f"{path} is not there yet: a save was cut short, or is going on; save the model again")
    return values


def save_json(values: Mapping[str, Any], path: str | Path) -> None:
    "Write a dict as indented JSON, whole or not at all; CheckpointError names an entry that JSON cannot hold."
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"`{name}` cannot be written as JSON: {error}") from error
    write_text(json.dumps(values, indent=2) + "\n", path)
