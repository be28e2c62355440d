"""The cache of images: exact, resumable at any moment, shared by processes, and never of something else."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_edu.data import cache as data
from ldm_edu.data.batches import batches
from ldm_edu.data.cache import ImageCache, cached
from ldm_edu.data.celeba import CelebA
from ldm_edu.data.coco import COCO
from ldm_edu.data.folders import ImageFolder
from ldm_edu.data.images import from_uint8
from ldm_edu.data.toy import datasets as drawn
from ldm_edu.data.toy.datasets import ToyCelebA, ToyCOCO
from ldm_edu.display import to_uint8
from ldm_edu.errors import DataError

SMALL = {"size": 8, "length": 50, "keys": ("image", "captions")}
FORK = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None


def contents(folder) -> dict[str, bytes]:
    "The files of a cache that should be the same whenever and however it was written."
    return {name: (folder / name).read_bytes() for name in ("images.npy", "texts.jsonl", "cache.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    "The files of a cache that was written without interruption, in blocks of 20."
    folder = tmp_path_factory.mktemp("whole")
    cached(ToyCOCO(**SMALL), folder, block=20)
    return contents(folder)


# ---- what comes back


@pytest.mark.parametrize("keys", [("image",), ("image", "caption"), ("captions", "image"), ToyCOCO.known_keys[:3]])
def test_samples_come_back(tmp_path, keys):
    dataset = ToyCOCO(size=8, length=20, keys=keys)
    cache = cached(dataset, tmp_path / "cache", n=12, block=5)
    assert len(cache) == 12 and cache.identity() == {"samples": 12, **dataset.identity()}
    for sample, known in zip(cache, dataset):
        assert list(sample) == list(known)
        assert torch.equal(sample["image"], from_uint8(to_uint8(known["image"])))
        assert all(sample[key] == known[key] for key in keys if key != "image")
    assert (cache.captions is None) == (keys == ("image",)) and cache.attributes is None


def test_attributes_come_back(tmp_path):
    faces = ToyCelebA(size=8, length=9)
    cache = cached(faces, tmp_path, block=4)
    assert torch.equal(cache.attributes, torch.stack([face["attributes"] for face in faces]))
    assert cache.captions is None and cache.attribute_names == faces.attribute_names
    assert torch.equal(cache[8]["attributes"], faces[8]["attributes"])


def test_pictures_from_files_come_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    folder = ImageFolder(tmp_path, 9)
    cache = cached(folder, tmp_path / ".cache")
    assert torch.equal(cache.images(range(6)), torch.stack([sample["image"] for sample in folder]))


def test_real_data_in_a_cache(tmp_path, real_data):
    if (real_data / "celeba").is_dir():
        faces = CelebA(real_data, size=16)
        cache = cached(faces, tmp_path / "faces", n=20)
        assert torch.equal(cache[7]["image"], faces[7]["image"]) and len(cache.attribute_names) == 40
        assert torch.equal(cache.attributes, faces.attributes[:20])
    if (real_data / "coco").is_dir():
        photographs = COCO(real_data, size=16)
        cache = cached(photographs, tmp_path / "photographs", n=20, block=7)
        assert cache.captions == photographs.captions[:20] and cache[3]["caption"] == photographs[3]["caption"]
        assert torch.equal(cache[19]["image"], photographs[19]["image"])


@pytest.mark.parametrize("indices", [[3, 3, 49], range(10), np.array([8, 1]), torch.tensor([8, 1]), []])
def test_images_by_all_kinds_of_indices(tmp_path, indices):
    cache = cached(ToyCOCO(**SMALL), tmp_path, block=20)
    assert cache.images(indices).shape == (len(indices), 3, 8, 8)
    for i, image in zip(indices, cache.images(indices)):
        assert torch.equal(image, cache[int(i)]["image"])
    for beyond in (-1, 50):
        with pytest.raises(IndexError, match="0 to 49"):
            cache.images([0, beyond])


def test_another_process_reads_for_itself(tmp_path):
    cache = cached(ToyCOCO(**SMALL), tmp_path, block=20)
    cache.images([1])
    packed = pickle.dumps(cache)
    assert len(packed) < 50_000  # captions, no images
    assert torch.equal(pickle.loads(packed).images([7]), cache.images([7]))
    alone, helped = batches(cache, 4, seed=1), batches(cache, 4, seed=1, workers=1)
    assert all(torch.equal(next(alone)["image"], next(helped)["image"]) for _ in range(3))


def test_pictures_stay_on_the_disk(tmp_path):
    cache = cached(ToyCOCO(**SMALL), tmp_path)
    assert isinstance(cache._pixels, np.memmap) and not cache._pixels.flags.writeable


def test_a_whole_cache_is_opened_without_drawing_or_writing(tmp_path, whole, monkeypatch):
    cached(ToyCOCO(**SMALL), tmp_path, block=20)

    def never(*args, **kwargs):
        raise AssertionError("drawn or written again")

    monkeypatch.setattr(ToyCOCO, "__getitems__", never)
    monkeypatch.setattr(data, "_write_at", never)
    monkeypatch.setattr(data, "FileLock", never)
    assert len(cached(ToyCOCO(**SMALL), tmp_path)) == 50 and contents(tmp_path) == whole


# ---- interruptions


class Cut(BaseException):
    "The power fails."


def test_whatever_moment_it_is_interrupted_at_the_end_is_the_same(tmp_path, whole, monkeypatch):
    """The machine stops in the middle of the k-th write, with half of it on the disk, for every k."""
    write, count = data._write_at, len(range(0, 50, 20)) * 3 + 1
    for k in range(count):
        folder, left = tmp_path / str(k), iter(range(k))

        def half(path, content, at):
            if next(left, None) is None:
                write(path, content[: len(content) // 2], at)
                raise Cut
            write(path, content, at)

        monkeypatch.setattr(data, "_write_at", half)
        with pytest.raises(Cut):
            cached(ToyCOCO(**SMALL), folder, block=20)
        with pytest.raises(DataError, match=f"{k} holds no complete cache"):
            ImageCache(folder)
        monkeypatch.setattr(data, "_write_at", write)
        cached(ToyCOCO(**SMALL), folder, block=20)
        assert contents(folder) == whole, k
    monkeypatch.setattr(data, "_write_at", half)
    assert k == count - 1 and next(left, None) is None  # and there is no further write


def write_slowly(folder, pause: float = 0.0) -> None:
    "In a process of its own: fill the cache, with a pause for each block."
    torch.set_num_threads(1)

    class Slow(ToyCOCO):
        def identity(self) -> dict:
            return {**super().identity(), "data": "ToyCOCO"}

        def __getitems__(self, indices):
            time.sleep(pause)
            return super().__getitems__(indices)

    cached(Slow(**SMALL), folder, block=20)


@pytest.mark.skipif(FORK is None, reason="needs fork")
def test_a_killed_process_leaves_a_cache_that_can_be_finished(tmp_path, whole):
    rng = np.random.default_rng(0)
    for _ in range(3):
        process = FORK.Process(target=write_slowly, args=(tmp_path, 0.1))
        process.start()
        time.sleep(float(rng.uniform(0.05, 0.3)))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    cached(ToyCOCO(**SMALL), tmp_path, block=20)
    assert contents(tmp_path) == whole


@pytest.mark.skipif(FORK is None, reason="needs fork")
def test_processes_that_start_together_do_no_harm(tmp_path, whole):
    together = [FORK.Process(target=write_slowly, args=(tmp_path / "cache", 0.02)) for _ in range(3)]
    for process in together:
        process.start()
    for process in together:
        process.join(120)
    assert [process.exitcode for process in together] == [0, 0, 0]
    assert contents(tmp_path / "cache") == whole


def test_a_full_disk_is_told_and_survived(tmp_path, whole, monkeypatch):
    write, left = data._write_at, iter(range(9))

    def full(path, content, at):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content, at)

    monkeypatch.setattr(data, "_write_at", full)
    with pytest.raises(DataError, match=f"{tmp_path.name}.*No space left.*room"):
        cached(ToyCOCO(**SMALL), tmp_path, block=20)
    monkeypatch.setattr(data, "_write_at", write)
    cached(ToyCOCO(**SMALL), tmp_path)
    assert contents(tmp_path) == whole


# ---- something else, or broken


@pytest.mark.parametrize(
    "other, says",
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"size": 16}, "size 8, not 16"),
        ({"split": "test"}, "split train, not test"),
        ({"keys": ("image",)}, "keys"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path, other, says):
    cached(ToyCOCO(**SMALL), tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path.name}.*something else.*{says}.*choose another folder"):
        cached(ToyCOCO(**(SMALL | other)), tmp_path)


def test_another_number_or_version_or_data_set_is_refused(tmp_path, monkeypatch):
    cached(ToyCOCO(**SMALL), tmp_path)
    with pytest.raises(DataError, match="samples 50, not 30"):
        cached(ToyCOCO(**SMALL), tmp_path, n=30)
    with pytest.raises(DataError, match="data ToyCOCO, not ToyCelebA"):
        cached(ToyCelebA(size=8, length=50), tmp_path)
    monkeypatch.setattr(drawn, "DRAWING_VERSION", drawn.DRAWING_VERSION + 1)
    with pytest.raises(DataError, match="version"):
        cached(ToyCOCO(**SMALL), tmp_path)


def test_a_changed_picture_file_makes_another_cache(tmp_path):
    for i in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{i}.png")
    cached(ImageFolder(tmp_path, 9), tmp_path / ".cache")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "1.png")
    with pytest.raises(DataError, match="something else.*files"):
        cached(ImageFolder(tmp_path, 9), tmp_path / ".cache")


def flip(file, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "images cut": lambda folder: os.truncate(folder / "images.npy", 3000),
    "images gone": lambda folder: (folder / "images.npy").unlink(),
    "texts cut": lambda folder: os.truncate(folder / "texts.jsonl", 300),
    "texts gone": lambda folder: (folder / "texts.jsonl").unlink(),
    "head of images": lambda folder: flip(folder / "images.npy", 3),
    "one bit of images": lambda folder: flip(folder / "images.npy", 5000),
    "one bit of texts": lambda folder: flip(folder / "texts.jsonl", 700),
    "about cut": lambda folder: os.truncate(folder / "cache.json", 100),
    "about empty": lambda folder: os.truncate(folder / "cache.json", 0),
    "about gone": lambda folder: (folder / "cache.json").unlink(),
    "about of another kind": lambda folder: (folder / "cache.json").write_text("[]"),
    "about without its parts": lambda folder: (folder / "cache.json").write_text('{"bytes": {}}'),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named_and_the_way_out(tmp_path, how):
    cached(ToyCOCO(**SMALL), tmp_path, block=20)
    DAMAGE[how](tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path.name}.*delete.*made again"):
        cached(ToyCOCO(**SMALL), tmp_path).images(range(50))


def test_what_cannot_be_cached_is_refused_at_once(tmp_path):
    for n in (0, -1, 51):
        with pytest.raises(DataError, match="n should be 1 to 50"):
            cached(ToyCOCO(**SMALL), tmp_path / "a", n)
    with pytest.raises(DataError, match="not depth"):
        cached(ToyCOCO(size=8, length=50, keys=["image", "depth"]), tmp_path / "b")
    cached(ToyCOCO(**SMALL), tmp_path / "b")  # nothing was left there
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file cannot be written"):
        cached(ToyCOCO(**SMALL), tmp_path / "file")
    with pytest.raises(DataError, match="nowhere holds no complete cache"):
        ImageCache(tmp_path / "nowhere")


def test_about_is_readable_by_people(tmp_path):
    about = json.loads(contents(cached(ToyCOCO(**SMALL), tmp_path).folder)["cache.json"])
    assert about["done"] == 50 and about["dataset"]["split"] == "train" and about["keys"] == ["image", "captions"]
