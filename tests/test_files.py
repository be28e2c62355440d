"""Files: their permissions, what the system refuses, other systems than Linux, and saves that are cut short."""

import errno
import json
import os
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from ldm_edu import AutoencoderKL, LatentDiffusion, NoiseSchedule, TextConditioner, UNet, files, load_first_stage
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import (
    atomic,
    brief,
    load_json,
    load_notes,
    load_tensors,
    probe,
    read_text,
    save_json,
    save_tensors,
    whole_folder,
    write_text,
)

TENSORS = {"a": torch.arange(1000.0)}


def save_two(folder) -> None:
    """A folder with two files that belong together."""
    with whole_folder(folder) as new:
        save_json({"a": 1}, new / "config.json")
        (new / "part").mkdir()
        save_tensors(TENSORS, new / "part/model.safetensors")


WRITERS = {
    "save_tensors": lambda folder: save_tensors(TENSORS, folder / "f.safetensors"),
    "save_json": lambda folder: save_json({"a": 1}, folder / "f.json"),
    "write_text": lambda folder: write_text("text", folder / "f.txt"),
    "whole_folder": lambda folder: save_two(folder / "model"),
    "save_pretrained": lambda folder: UNet(1, 1, 32, (1,), 1, (1,), 32).save_pretrained(folder / "unet"),
}


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------ permissions


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o027, 0o077])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_gets_the_permissions_of_any_new_file(tmp_path, writer, umask):
    old = os.umask(umask)
    try:
        (tmp_path / "any").mkdir()
        (tmp_path / "any/file").write_text("")
        wanted = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "any", tmp_path / "any/file")]
        (tmp_path / "ours").mkdir()
        for _ in range(2):  # also where it replaces a file
            WRITERS[writer](tmp_path / "ours")
            for path in (tmp_path / "ours").rglob("*"):
                assert stat.S_IMODE(path.stat().st_mode) == wanted[path.is_file()], path
            for path in files_in(tmp_path / "ours"):
                path.chmod(0o700)  # what is replaced has other permissions
    finally:
        os.umask(old)


# ------------------------------------------------------- what the system refuses

REFUSED = [
    (PermissionError(errno.EACCES, "Permission denied"), "cannot be read: no permission"),
    (OSError(errno.EIO, "Input/output error"), "cannot be read: Input/output error"),
    (OSError(errno.ELOOP, "Too many levels"), "cannot be read: a link leads back to itself"),
]


@pytest.mark.parametrize("error, said", REFUSED, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("read", [load_tensors, load_notes, load_json, read_text], ids=lambda read: read.__name__)
def test_what_cannot_be_read_is_not_called_missing(tmp_path, monkeypatch, read, error, said):
    """safetensors calls everything missing that it cannot open: here as the system refuses it to another user."""
    path = tmp_path / "f"
    path.write_text("{}")

    def refuse(*_, **__):
        raise error

    def not_found(*_, **__):
        raise FileNotFoundError(f"No such file or directory: {path}")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    monkeypatch.setattr(files, "safe_open", not_found)
    with pytest.raises(CheckpointError, match=f"f {said}"):
        read(path)


@pytest.mark.parametrize("read", [load_tensors, load_notes, load_json, read_text], ids=lambda read: read.__name__)
def test_what_stands_in_a_files_place_is_said(tmp_path, read):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for name, said in {
        "nothing": "nothing is missing$",
        "folder": "folder cannot be read: a folder stands in its place; a .* file should stand here",
        "link": "link is a link that leads nowhere",
        "loop": "loop cannot be read: a link leads back to itself",
        "file/below": "below cannot be read: a file stands where a folder is needed",
        "n" * 300: "cannot be read: the name is too long",
        "zero\0byte": "is no name that a file can have",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            read(tmp_path / name)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_where_nothing_can_be_written_is_named(tmp_path, writer):
    (tmp_path / "file").write_text("")
    for folder, said in ((tmp_path / "file", "a file stands where"), (tmp_path / "zero\0byte", "zero byte")):
        with pytest.raises(CheckpointError, match=said):
            WRITERS[writer](folder)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    for name in ("f.safetensors", "f.json", "f.txt"):
        (tmp_path / name).mkdir()
    for writer in ("save_tensors", "save_json", "write_text"):
        with pytest.raises(CheckpointError, match="cannot be written: a folder stands in its place"):
            WRITERS[writer](tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # and no temporary file


@pytest.mark.parametrize("number, said", [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "no permission")])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_the_disk_refuses_is_said_and_the_old_files_stay(tmp_path, monkeypatch, writer, number, said):
    WRITERS[writer](tmp_path)
    before = {path: path.read_bytes() for path in files_in(tmp_path)}

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=f"cannot be written: {said}"):
        WRITERS[writer](tmp_path)
    assert {path: path.read_bytes() for path in files_in(tmp_path)} == before


# ------------------------------------------------- a safetensors file by somebody


def by_hand(path: Path, header: dict, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "dtype, shape, size",
    [
        ("F32", [2**63, 0], 0),
        ("F32", [2**62, 4, 0], 0),
        ("F6_E2M3", [4], 3),
        ("F32", [10**12], 4),
        ("F32", [-1], 4),
        ("F99", [1], 4),
    ],
)
def test_a_header_that_torch_cannot_follow(tmp_path, dtype, shape, size):
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    with pytest.raises(CheckpointError, match="f is not a whole safetensors file .*copy it again$") as caught:
        load_tensors(by_hand(tmp_path / "f", header, bytes(size)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_message_is_one_line_and_does_not_steer_the_terminal():
    assert brief(ValueError("a\n  b\tc \x1b[31mred\x07")) == "a b c \\x1b[31mred\\x07"
    assert brief(ValueError()) == "ValueError"
    assert brief(ValueError("x" * 5000)) == "x" * 297 + "..."
    assert brief(ValueError("ä" * 300)) == "ä" * 300


# ----------------------------------------------------------- Windows, simulated


def mapped_files() -> str:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells which files are mapped")
    return maps.read_text()


@pytest.mark.parametrize("writer", [*WRITERS, "probe"])
def test_only_what_is_open_for_writing_is_flushed(tmp_path, monkeypatch, writer):
    """As Windows wants it."""
    fcntl = pytest.importorskip("fcntl")
    flush, flushed = os.fsync, []

    def fsync(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(number)
        flush(number)

    monkeypatch.setattr(os, "fsync", fsync)
    for _ in range(2):
        if writer == "probe":
            assert probe(tmp_path / "new/f.png") == tmp_path / "new/f.png"
        else:
            WRITERS[writer](tmp_path)
    assert flushed or writer == "probe"


def test_nothing_stays_mapped_after_loading(tmp_path):
    save_tensors(TENSORS, tmp_path / "f.safetensors", notes={"a": "b"})
    tensors, notes = load_tensors(tmp_path / "f.safetensors"), load_notes(tmp_path / "f.safetensors")
    assert str(tmp_path) not in mapped_files() and notes == {"a": "b"} and torch.equal(tensors["a"], TENSORS["a"])
    mapped = load_tensors(tmp_path / "f.safetensors", mapped=True)
    assert str(tmp_path) in mapped_files()  # the check sees what it looks for
    del mapped


def test_a_model_is_saved_over_the_one_it_was_loaded_from(tmp_path, monkeypatch):
    """Windows replaces no file that is mapped into memory."""
    replace = os.replace

    def refuse_mapped(old, new):
        if str(new) in mapped_files():
            raise PermissionError(errno.EACCES, "Access is denied", str(new))
        replace(old, new)

    monkeypatch.setattr(os, "replace", refuse_mapped)
    WRITERS["save_pretrained"](tmp_path)
    unet = UNet.from_pretrained(tmp_path / "unet")
    torch.nn.init.ones_(unet.out[-1].bias)
    unet.save_pretrained(tmp_path / "unet")
    assert UNet.from_pretrained(tmp_path / "unet").out[-1].bias.eq(1).all()


# --------------------------------------------------------------- cut short


@pytest.fixture
def old_model(tmp_path):
    torch.manual_seed(0)
    first_stage = AutoencoderKL(8, (1, 2), 1, 2, attention=False, groups=4, scale_factor=0.5)
    unet = UNet(2, 2, 32, (1,), 1, (1,), 32)
    model = LatentDiffusion(first_stage, unet, NoiseSchedule(), size=16, provenance={"model": "old"})
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def age(module: torch.nn.Module) -> str:
    """Which of the two models the weights are of: the new one has nothing but ones."""
    ones = [bool(weight.eq(1).all()) for weight in module.parameters()]
    assert all(ones) or not all(ones[:-2]), "a mixture"
    return "new" if all(ones) else "old"


def renewed(folder: Path) -> LatentDiffusion:
    """The same model with other weights, another scale factor and another provenance."""
    model = LatentDiffusion.from_pretrained(folder)
    for weight in model.parameters():
        torch.nn.init.ones_(weight)
    model.first_stage.scale_factor, model.provenance = 0.25, {"model": "new"}
    return model


class Killed(BaseException):
    """What ends a save without being an error that it could answer."""


def kill_at(monkeypatch, k: int) -> None:
    """Let the k-th renaming of a file, from 0, be the end of the process."""
    replace, left = os.replace, [k]

    def replace_or_die(*paths):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_or_die)


def ages(folder: Path, whole: bool) -> set[str]:
    """Which of the two models every part of the folder is of; "refused" for one that is not read."""
    try:
        model = LatentDiffusion.from_pretrained(folder) if whole else load_first_stage(folder)
    except CheckpointError as error:
        assert "config.json is not there yet: a save was cut short" in str(error)
        return {"refused"}
    first_stage = model.first_stage if whole else model
    found = {age(first_stage), {0.5: "old", 0.25: "new"}[first_stage.scale_factor]}
    return found | ({model.provenance["model"], age(model.unet)} if whole else set())


@pytest.mark.parametrize("part", [None, "first_stage"])
def test_a_save_that_is_cut_short_anywhere_leaves_no_mixture_that_loads(old_model, monkeypatch, part):
    new, seen = renewed(old_model), []
    saved = getattr(new, part) if part else new
    backup = {path: path.read_bytes() for path in files_in(old_model)}
    for k in range(100):
        for path, content in backup.items():
            path.write_bytes(content)
        with monkeypatch.context() as patched:
            kill_at(patched, k)
            try:
                saved.save_pretrained(old_model / (part or ""))
            except Killed:
                pass
        found = [ages(old_model, whole) for whole in (False, True)]
        assert all(len(each) == 1 for each in (found[:1] if part else found)), f"a mixture, where it ends at {k}"
        seen.append(*found[0 if part else 1])
        if seen[-1] == "new":
            break
    # As long as new files are written, while they are moved, and behind that.
    old, refused = seen.count("old"), seen.count("refused")
    assert seen == ["old"] * old + ["refused"] * refused + ["new"] and old >= 2 and refused >= 2
    saved.save_pretrained(old_model / (part or ""))


def test_a_process_that_is_killed_while_it_saves(old_model):
    script = """if True:
        import os, sys
        from ldm_edu import UNet
        unet = UNet.from_pretrained(sys.argv[1])
        os.replace = lambda old, new: os._exit(9)
        unet.save_pretrained(sys.argv[1])
    """
    unet = str(old_model / "unet")
    assert subprocess.run([sys.executable, "-c", script, unet], check=False).returncode == 9
    assert age(UNet.from_pretrained(unet)) == "old"
    assert [path.name[:12] for path in files.leftovers(unet)] == [".unfinished-", ".config.json"]


def test_a_folder_that_was_cut_short_can_be_saved_again(old_model):
    save_json(files._CUT_SHORT, old_model / "config.json")
    with pytest.raises(CheckpointError, match="model/config.json is not there yet"):
        LatentDiffusion.from_pretrained(old_model)
    unet = UNet.from_pretrained(old_model, part="unet")
    LatentDiffusion(load_first_stage(old_model), unet, NoiseSchedule(), size=16).save_pretrained(old_model)
    assert LatentDiffusion.from_pretrained(old_model).size == 16


def test_an_error_inside_leaves_the_old_file(tmp_path):
    write_text("old", tmp_path / "f")
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "f") as temporary:
        temporary.write_text("new")
        1 / 0
    assert read_text(tmp_path / "f") == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name, said", [("", "empty"), ("zero\0byte", "zero byte"), ("~nosuchuser/x", "no name that a")]
)
def test_names_that_no_folder_can_have(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LDMError, match=said), whole_folder(name):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["another file system", "a file", "a folder", "the disk"])
def test_a_save_that_is_refused_leaves_the_old_model(old_model, tmp_path, monkeypatch, what):
    new, replace = renewed(old_model), os.replace
    before = {path: path.read_bytes() for path in files_in(old_model)}
    with monkeypatch.context() as patched:
        if what == "another file system":
            stat, unet = Path.stat, old_model / "unet"
            there = stat(unet)
            other = os.stat_result((*there[:2], there.st_dev + 1, *there[3:]))
            patched.setattr(Path, "stat", lambda path, **how: other if path == unet else stat(path, **how))
        elif what == "a file":
            new.conditioner = TextConditioner(["red"], 4, 32, 1, 2)
            (old_model / "conditioner").write_text("notes of mine")
        elif what == "a folder":
            new.conditioner = TextConditioner(["red"], 4, 32, 1, 2)
            (old_model / "conditioner" / "model.safetensors").mkdir(parents=True)
        else:

            def refuse(old, path):
                if Path(path) == old_model / "unet" / "model.safetensors" and "/new/" in str(old):
                    raise OSError(errno.EIO, "broken")
                replace(old, path)

            patched.setattr(os, "replace", refuse)
        with pytest.raises(CheckpointError, match="cannot be written"):
            new.save_pretrained(old_model)
    assert {path: path.read_bytes() for path in before} == before
    assert age(LatentDiffusion.from_pretrained(old_model).unet) == "old"


def test_a_save_sweeps_what_a_killed_one_left_and_leaves_no_lock(old_model):
    dead, alive = old_model / ".unfinished-999999999-abc", old_model / f".unfinished-{os.getpid()}-abc"
    for folder in (dead, alive):
        (folder / "unet").mkdir(parents=True)
        (folder / ".tmpabcdef").write_text("of safetensors")
    (old_model / "unet" / ".config.json.999999999-a1b2c3").write_text("")
    renewed(old_model).save_pretrained(old_model)
    assert not dead.exists() and (alive / ".tmpabcdef").exists()
    hidden = [path.name for path in old_model.rglob(".*") if alive not in path.parents]
    assert hidden == [alive.name]


def test_two_saves_into_one_folder_move_their_files_in_turn(old_model, monkeypatch):
    new, old, moving = renewed(old_model), LatentDiffusion.from_pretrained(old_model), []
    move = files._move

    def watched(*args):
        moving.append("in")
        time.sleep(0.2)
        move(*args)
        moving.append("out")

    threads = [threading.Thread(target=model.unet.save_pretrained, args=[old_model / "unet"]) for model in (new, old)]
    monkeypatch.setattr(files, "_move", watched)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert moving == ["in", "out", "in", "out"]


def test_a_folder_where_no_file_can_be_locked_is_saved_to_all_the_same(old_model, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    renewed(old_model).save_pretrained(old_model)
    assert age(LatentDiffusion.from_pretrained(old_model).unet) == "new"


def test_a_model_that_is_saved_anew_while_it_is_loaded_is_refused(old_model, monkeypatch):
    new, load = renewed(old_model), load_tensors

    def save_then_load(path):
        tensors = load(path)
        with monkeypatch.context() as patched:
            patched.setattr("ldm_edu.checkpoints.load_tensors", load)
            (new if saved == "whole" else new.unet).save_pretrained(old_model / ("" if saved == "whole" else "unet"))
        return tensors

    for saved in ("whole", "unet"):
        with monkeypatch.context() as patched:
            patched.setattr("ldm_edu.checkpoints.load_tensors", save_then_load)
            with pytest.raises(CheckpointError, match="config.json was written anew while .* load it again"):
                (LatentDiffusion if saved == "whole" else UNet).from_pretrained(
                    old_model / ("" if saved == "whole" else "unet")
                )


def test_a_full_disk_is_said_as_such_when_safetensors_meets_it(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", refuse)
    with pytest.raises(CheckpointError, match="cannot be written: the disk is full: make room"):
        save_tensors({"a": torch.ones(1)}, tmp_path / "a.safetensors")


def test_half_keeps_what_its_description_promises(tmp_path):
    x = torch.tensor([1.0, -0.1, 3e4, 6.2e-5, 1e-5, 7e-8, 3e-8, 2e-8, 1e-12], dtype=torch.float64)
    save_tensors({"x": x}, tmp_path / "x.safetensors", half=True)
    wrong = (load_tensors(tmp_path / "x.safetensors")["x"].double() - x).abs()
    assert (wrong <= (x.abs() * 2**-11).clamp_min(2**-25)).all() and (wrong > x.abs() * 2**-11).any()
