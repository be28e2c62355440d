"""The cache of samples: exact, resumable at any moment, shared by processes, and never of something else."""

import errno
import inspect
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image

from ldm_edu.data import blocks
from ldm_edu.data import cache as data
from ldm_edu.data.batches import batches, collate
from ldm_edu.data.cache import SampleCache, cached
from ldm_edu.data.celeba import CelebA
from ldm_edu.data.coco import COCO
from ldm_edu.data.folders import ImageFolder
from ldm_edu.data.images import from_uint8
from ldm_edu.data.toy import datasets as drawn
from ldm_edu.data.toy.datasets import ToyCelebA, ToyCOCO
from ldm_edu.display import to_uint8
from ldm_edu.errors import DataError
from ldm_edu.files import save_json, save_tensors

SMALL = {"size": 8, "length": 50, "keys": ("image", "captions")}
FORK = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None


def contents(folder) -> dict[str, bytes]:
    "The files of a cache that should be the same whenever and however it was written."
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "writing.lock"}
    assert {"cache.json", "block-000000.safetensors"} <= files.keys()
    return files


def same(a, b) -> bool:
    "Are two values, samples or batches the same in type, dtype, shape and every bit?"
    if isinstance(a, torch.Tensor):
        bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def through_bytes(sample: dict) -> dict:
    "A sample as a cache gives it back: only its image has changed."
    return sample | {"image": from_uint8(to_uint8(sample["image"]))} if "image" in sample else sample


class Listed:
    "A data set of the samples in a list."

    def __init__(self, samples: list[dict]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.samples[index]

    def identity(self) -> dict:
        return {"data": "listed"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    "The files of a cache that was written without interruption, in blocks of 20."
    folder = tmp_path_factory.mktemp("whole")
    cached(ToyCOCO(**SMALL), folder, block=20)
    return contents(folder)


# ---- what comes back


KEYS = [("image",), ("image", "caption"), ("captions", "image"), ("segmentation",), ("boxes", "depth", "image")]


@pytest.mark.parametrize("keys", [*KEYS, ToyCOCO.known_keys])
def test_samples_come_back(tmp_path, keys):
    dataset = ToyCOCO(size=8, length=20, keys=keys)
    cache = cached(dataset, tmp_path / "cache", n=12, block=5)
    assert len(cache) == 12 and cache.identity() == {"format": 2, "samples": 12, **dataset.identity()}
    assert cache.keys == keys and cache.attributes is None and cache.attribute_names is None
    known = [through_bytes(dataset[i]) for i in range(12)]
    assert same(list(cache), known) and same(cache.__getitems__([7, 3, 7]), [known[7], known[3], known[7]])
    assert same(cache.batch(range(12)), collate(known)) and same(
        cache.batch([11, 0], keys[-1:])[keys[-1]],
        collate([{keys[-1]: known[11][keys[-1]]}, {keys[-1]: known[0][keys[-1]]}])[keys[-1]],
    )
    assert all(same(cache.column(key), collate(known)[key]) for key in keys)


def test_captions_are_all_of_them_or_the_only_one(tmp_path):
    for keys in (("image",), ("caption",), ("captions", "caption")):
        dataset = ToyCOCO(size=8, length=9, keys=keys)
        captions = cached(dataset, tmp_path / "-".join(keys), block=4).captions
        if "captions" in keys:
            assert captions == [sample["captions"] for sample in dataset]
        else:
            assert captions == ([[sample["caption"]] for sample in dataset] if "caption" in keys else None)


def strange_samples(n: int) -> list[dict]:
    "Samples with values of all kinds, and with bits that a conversion would lose."
    rng = np.random.default_rng(0)
    dtypes = (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64)
    nan = torch.tensor([-0.0, float("nan"), float("-inf"), 2**-140], dtype=torch.float32)
    samples = []
    for i in range(n):
        k = int(rng.integers(0, 3)) if i else 0  # the first sample has none of anything
        sample = {str(dtype): torch.from_numpy(rng.integers(0, 2, (2, 3))).to(dtype) for dtype in dtypes}
        sample |= {"boxes": torch.rand(k, 5), "instances": torch.rand(k, 4, 4) > 0.5, "bits": nan}
        sample |= {"largest": torch.tensor(2**63 - 1 - i), "empty": torch.zeros(0, 3), "turned": torch.rand(3, 2).T}
        sample |= {"differs": torch.rand(2, i, 1 + k), "class": i, "height": i / 7, "odd": float("nan"), "is": i > 2}
        sample |= {"text": f"\ud800 \n\0 é {i}", "words": ["a"] * k, "lists": [[1, [2.5, True]], []], "none": None}
        sample |= {"key: with / all\nof it": {"a": [k]}, "image": torch.rand(3, 4, 4) * 2 - 1}
        samples.append(sample)
    return samples


def test_any_key_and_any_tensor_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    samples = strange_samples(11)
    cache = cached(Listed(samples), tmp_path, block=4)
    assert cache.keys == tuple(samples[0]) and same(list(cache), [through_bytes(sample) for sample in samples])
    keys = [key for key in cache.keys if key != "differs"]
    assert same(cache.batch(range(11), keys), collate([{k: through_bytes(s)[k] for k in keys} for s in samples]))
    with pytest.raises(DataError, match="'differs' has several shapes"):
        cache.column("differs")
    assert cache.column("class").dtype == torch.int64 and cache.column("is").dtype == torch.bool
    for key, value in cache.batch([], keys).items():
        assert len(value) == 0 and (not torch.is_tensor(value) or value.shape[1:] == cache.column(key).shape[1:])


def test_who_changes_a_sample_or_batch_does_not_change_the_cache(tmp_path):
    cache = cached(ToyCOCO(size=8, length=6, keys=ToyCOCO.known_keys), tmp_path)
    before = list(cache)
    for changed in (cache[0], cache.batch(range(6)), cache.batch([2])):
        for value in changed.values():
            for part in value if isinstance(value, list) else [value]:
                part.zero_() if torch.is_tensor(part) else part.clear() if isinstance(part, list) else None
    assert same(list(cache), before) and same(list(SampleCache(tmp_path)), before)
    alike = cached(Listed([{"boxes": torch.ones(2, 5), "depth": torch.ones(2)}] * 4), tmp_path / "alike")
    for part in (*alike.batch([0, 1])["boxes"], alike[0]["boxes"], alike.batch([0])["depth"], alike[0]["depth"]):
        part.zero_()
    assert all(torch.equal(boxes, torch.ones(2, 5)) for boxes in alike.column("boxes"))
    assert alike.column("depth").min() == 1


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    cached(ToyCOCO(size=8, length=30, keys=ToyCOCO.known_keys), tmp_path, block=10)
    cache, read, checksum = SampleCache(tmp_path), [], blocks.tensor_checksum
    monkeypatch.setattr(blocks, "tensor_checksum", lambda tensor: read.append(tensor.dtype) or checksum(tensor))
    assert len(cache.column("captions")) == 30 and set(read) == {torch.uint8, torch.int64}  # texts, and their lengths
    read.clear()
    assert cache.batch([3, 4, 25], ("depth",)).keys() == {"depth"} and read == [torch.float32] * 2  # two blocks
    read.clear()
    cache.batch([5, 20], ("depth", "captions"))
    assert not read  # checked only once
    for wrong in ("words", (), ("image", "words")):
        with pytest.raises(DataError, match="keys should be a list of some of image, caption"):
            cache.batch([1], wrong)
    with pytest.raises(DataError, match="not words"):
        cache.column("words")


def test_the_checksum_follows_from_the_contents(tmp_path):
    sets = [{}, {"seed": 1}, {"keys": ("image",)}, {"size": 9}]
    sums = [cached(ToyCOCO(**(SMALL | other)), tmp_path / str(i)).checksum for i, other in enumerate(sets)]
    assert len(set(sums)) == 4 and all(len(text) == 16 and int(text, 16) >= 0 for text in sums)
    assert cached(ToyCOCO(**SMALL), tmp_path / "again").checksum == SampleCache(tmp_path / "again").checksum == sums[0]


def test_files_do_not_stay_open(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    samples = [{"number": torch.tensor([i])} for i in range(300)]
    cache, before = cached(Listed(samples), tmp_path, block=1), len(os.listdir("/proc/self/fd"))
    assert cache.column("number").flatten().tolist() == list(range(300))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_attributes_come_back(tmp_path):
    faces = ToyCelebA(size=8, length=9)
    cache = cached(faces, tmp_path, block=4)
    assert torch.equal(cache.attributes, torch.stack([face["attributes"] for face in faces]))
    assert cache.captions is None and cache.attribute_names == faces.attribute_names
    assert torch.equal(cache[8]["attributes"], faces[8]["attributes"])
    everything = ToyCelebA(size=8, length=9, keys=ToyCelebA.known_keys)
    assert same(list(cached(everything, tmp_path / "all", block=4)), [through_bytes(face) for face in everything])


def test_pictures_from_files_come_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    folder = ImageFolder(tmp_path, 9)
    cache = cached(folder, tmp_path / ".cache", block=4)
    assert torch.equal(cache.images(range(6)), torch.stack([sample["image"] for sample in folder]))


def test_classes_of_folders_come_back(tmp_path):
    for name in ("b/1.png", "a/x/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    cache = cached(ImageFolder(tmp_path, 9, keys=("class", "image")), tmp_path / ".cache")
    assert cache.column("class").tolist() == [0, 1, 1] and list(cache[2]) == ["class", "image"]


def test_real_data_in_a_cache(tmp_path, real_data):
    if (real_data / "celeba").is_dir():
        faces = CelebA(real_data, size=16)
        cache = cached(faces, tmp_path / "faces", n=20, block=7)
        assert same(list(cache), [through_bytes(faces[i]) for i in range(20)]) and len(cache.attribute_names) == 40
        assert torch.equal(cache[7]["image"], faces[7]["image"])
        assert torch.equal(cache.attributes, faces.attributes[:20])
    if (real_data / "coco").is_dir():
        kinds = (("image", "caption", "captions"), ("image", "boxes", "instances"), ("segmentation", "image"))
        for keys in (*kinds, tuple(COCO.known_keys)):
            photographs = COCO(real_data, size=16, keys=keys)
            n = min(20, len(photographs))
            cache = cached(photographs, tmp_path / "-".join(keys), n=n, block=7)
            known = [through_bytes(photographs[i]) for i in range(n)]
            assert same(list(cache), known) and same(cache.batch(range(n)), collate(known))
            assert same(cache[n - 1]["image"], photographs[n - 1]["image"])  # from files: bytes lose nothing
        assert cache.captions == [sample["captions"] for sample in known] and cache.captions[0]


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
    assert len(packed) < 1000  # where it lies, no contents
    assert torch.equal(pickle.loads(packed).images([7]), cache.images([7]))
    alone, helped = batches(cache, 4, seed=1), batches(cache, 4, seed=1, workers=2)
    assert all(same(next(alone), next(helped)) for _ in range(15))


def test_pictures_stay_on_the_disk(tmp_path):
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc")
    cache = cached(ToyCOCO(**SMALL), tmp_path, block=20)
    cache.images([1, 45])
    with open("/proc/self/maps") as maps:
        mapped = {line.split()[-1] for line in maps if str(tmp_path) in line}
    assert {os.path.basename(file) for file in mapped} == {f"block-{i:06}.safetensors" for i in (0, 2)}


def test_a_whole_cache_is_opened_without_drawing_or_writing(tmp_path, whole, monkeypatch):
    cached(ToyCOCO(**SMALL), tmp_path, block=20)

    def never(*args, **kwargs):
        raise AssertionError("drawn or written again")

    monkeypatch.setattr(ToyCOCO, "__getitems__", never)
    for name in ("write_block", "save_json", "FileLock"):
        monkeypatch.setattr(data, name, never)
    assert len(cached(ToyCOCO(**SMALL), tmp_path)) == 50 and contents(tmp_path) == whole


# ---- interruptions


class Cut(BaseException):
    "The power fails."


def interrupted(monkeypatch, write: int, error: BaseException) -> list[int]:
    "From now on, the write of this number, counted from 0, stops halfway; the list returned grows with each write."
    count = []

    def stop(path) -> None:
        count.append(1)
        if len(count) == write + 1:
            path.with_name(f".{path.name}.999999999-a1b2c3").write_bytes(b"half of")
            raise error

    monkeypatch.setattr(blocks, "save_tensors", lambda t, path, **how: (stop(path), save_tensors(t, path, **how)))
    monkeypatch.setattr(data, "save_json", lambda values, path: (stop(path), save_json(values, path)))
    return count


def test_whatever_moment_it_is_interrupted_at_the_end_is_the_same(tmp_path, whole, monkeypatch):
    """The machine stops in the middle of the k-th write, with half of it on the disk, for every k."""
    writes = 1 + 2 * 3  # the state, and for each block the block and the state
    for k in range(writes):
        folder = tmp_path / str(k)
        with monkeypatch.context() as patched:
            interrupted(patched, k, Cut())
            with pytest.raises(Cut):
                cached(ToyCOCO(**SMALL), folder, block=20)
        with pytest.raises(DataError, match=f"{k} holds no complete cache"):
            SampleCache(folder)
        with monkeypatch.context() as patched:
            count = interrupted(patched, -1, Cut())
            cached(ToyCOCO(**SMALL), folder, block=20)
        assert contents(folder) == whole, k
        # Blocks that were counted are not written again; without any, the state comes first once more.
        left = 3 - max(k - 1, 0) // 2
        assert len(count) == 2 * left + (left == 3), k


@pytest.mark.parametrize("seed", range(6))
def test_with_any_keys_it_goes_on_after_the_last_whole_block(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    keys, block = rng.sample(ToyCOCO.known_keys, rng.randint(1, 7)), rng.randint(1, 9)
    dataset = ToyCOCO(size=8, length=25, keys=keys)
    expected = cached(dataset, tmp_path / "whole", block=block)
    done, drawn_again = rng.randrange(-(-25 // block)), []
    with monkeypatch.context() as patched:
        interrupted(patched, 1 + 2 * done, Cut())
        with pytest.raises(Cut):
            cached(dataset, tmp_path / "cut", block=block)
    draw = ToyCOCO.__getitems__
    monkeypatch.setattr(ToyCOCO, "__getitems__", lambda self, rows: drawn_again.extend(rows) or draw(self, rows))
    cache = cached(dataset, tmp_path / "cut", block=3)  # its blocks stay as they were begun
    assert drawn_again == list(range(done * block, 25)) and cache.checksum == expected.checksum
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert same(list(cache), [through_bytes(dataset[i]) for i in range(25)])


def write_slowly(folder, pause: float, log) -> None:
    "In a process of its own: fill the cache, with a pause for each block and a line in a file for each sample."
    torch.set_num_threads(1)

    class Slow(ToyCOCO):
        def identity(self) -> dict:
            return {**super().identity(), "data": "ToyCOCO"}

        def __getitems__(self, indices):
            time.sleep(pause)
            with open(log, "a") as file:
                file.writelines(f"{i}\n" for i in indices)
            return super().__getitems__(indices)

    cached(Slow(**SMALL), folder, block=20)


@pytest.mark.skipif(FORK is None, reason="needs fork")
def test_a_killed_process_leaves_a_cache_that_can_be_finished(tmp_path, whole):
    rng = np.random.default_rng(0)
    for _ in range(3):
        process = FORK.Process(target=write_slowly, args=(tmp_path / "cache", 0.1, tmp_path / "log"))
        process.start()
        time.sleep(float(rng.uniform(0.05, 0.3)))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    cached(ToyCOCO(**SMALL), tmp_path / "cache", block=20)
    assert contents(tmp_path / "cache") == whole


@pytest.mark.skipif(FORK is None, reason="needs fork")
def test_processes_that_start_together_do_no_harm(tmp_path, whole):
    together = [FORK.Process(target=write_slowly, args=(tmp_path / "cache", 0.1, tmp_path / "log")) for _ in range(3)]
    for process in together:
        process.start()
    for process in together:
        process.join(120)
    assert [process.exitcode for process in together] == [0, 0, 0]
    assert contents(tmp_path / "cache") == whole
    assert (tmp_path / "log").read_text().split() == [str(i) for i in range(50)]  # nothing was drawn twice


@pytest.mark.parametrize("write", range(7))
def test_a_full_disk_is_told_and_survived(tmp_path, whole, monkeypatch, write):
    with monkeypatch.context() as patched:
        interrupted(patched, write, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(DataError, match=f"{tmp_path.name}.*No space left.*room"):
            cached(ToyCOCO(**SMALL), tmp_path, block=20)
    cached(ToyCOCO(**SMALL), tmp_path, block=20)
    assert contents(tmp_path) == whole


def test_a_file_that_may_not_grow_is_told_and_survived(tmp_path):
    resource = pytest.importorskip("resource")
    samples = [{"noise": torch.rand(1000 if i < 8 else 9000)} for i in range(10)]
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        with pytest.raises(DataError, match=f"{tmp_path.name}.*larger than a file may be.*another folder"):
            cached(Listed(samples), tmp_path, block=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert len(json.loads((tmp_path / "cache.json").read_text())["sums"]) == 4
    assert same(list(cached(Listed(samples), tmp_path)), samples)


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


BLOCK = "block-000001.safetensors"
DAMAGE = {
    "block cut": lambda folder: os.truncate(folder / BLOCK, 3000),
    "block empty": lambda folder: os.truncate(folder / BLOCK, 0),
    "block gone": lambda folder: (folder / BLOCK).unlink(),
    "block is a folder": lambda folder: ((folder / BLOCK).unlink(), (folder / BLOCK).mkdir()),
    "another block": lambda folder: (folder / BLOCK).write_bytes((folder / "block-000000.safetensors").read_bytes()),
    "length of the head": lambda folder: flip(folder / BLOCK, 1),
    "one bit of the head": lambda folder: flip(folder / BLOCK, 40),
    "other numbers": lambda folder: replace(folder / BLOCK, b'"dtype":"I64"', b'"dtype":"U64"'),
    "another shape": lambda folder: replace(folder / BLOCK, b"[20,3,8,8]", b"[20,8,3,8]"),
    "one bit of images": lambda folder: flip(folder / BLOCK, (folder / BLOCK).read_bytes().index(to_bytes(20))),
    "one bit of texts": lambda folder: flip(folder / BLOCK, (folder / BLOCK).read_bytes().index(b" sphere")),
    "about cut": lambda folder: os.truncate(folder / "cache.json", 100),
    "about empty": lambda folder: os.truncate(folder / "cache.json", 0),
    "about gone": lambda folder: (folder / "cache.json").unlink(),
    "about of another kind": lambda folder: (folder / "cache.json").write_text("[]"),
    "about without its parts": lambda folder: (folder / "cache.json").write_text('{"dataset": {"format": 2}}'),
    "about without names": lambda folder: rewrite(folder, lambda state: state.pop("attribute_names")),
    "about with no blocks": lambda folder: rewrite(folder, lambda state: state.update(block=0)),
    "about with half blocks": lambda folder: rewrite(folder, lambda state: state.update(block=20.5)),
    "about with blocks without end": lambda folder: rewrite(
        folder, lambda state: (state.update(block=2**70, sums=[1]), state["dataset"].update(samples=2**70))
    ),
    "about with minus blocks": lambda folder: rewrite(folder, lambda state: state.update(block=-20)),
    "about with a block of true": lambda folder: rewrite(folder, lambda state: state.update(block=True)),
    "about without sums": lambda folder: rewrite(folder, lambda state: state.pop("sums")),
    "about with sums in words": lambda folder: rewrite(folder, lambda state: state.update(sums="abc")),
    "about with sums in a dict": lambda folder: rewrite(folder, lambda state: state.update(sums={"0": 1})),
    "about with nothing in sums": lambda folder: rewrite(folder, lambda state: state.update(sums=[None] * 3)),
    "about with no keys": lambda folder: rewrite(folder, lambda state: state.update(keys=[])),
    "about with keys of numbers": lambda folder: rewrite(folder, lambda state: state.update(keys=[1, 2])),
    "about with a key for keys": lambda folder: rewrite(folder, lambda state: state.update(keys="image")),
    "about with one key": lambda folder: rewrite(folder, lambda state: state.update(keys=5)),
    "about with names of numbers": lambda folder: rewrite(folder, lambda state: state.update(attribute_names=[1])),
    "about nested without end": lambda folder: (folder / "cache.json").write_text("[" * 10**5),
    "about that is a dead link": lambda folder: (
        (folder / "cache.json").unlink(),
        (folder / "cache.json").symlink_to("gone"),
    ),
    "about with NaN": lambda folder: rewrite(folder, lambda state: state.update(block=float("nan"))),
    "about with longer blocks": lambda folder: rewrite(folder, lambda state: state.update(block=21)),
    "about with too many blocks": lambda folder: rewrite(folder, lambda state: state["sums"].append(1)),
    "about with other blocks": lambda folder: rewrite(folder, lambda state: state["sums"].reverse()),
}


def to_bytes(index: int) -> bytes:
    "The beginning of the image at an index, as the block has it."
    return to_uint8(ToyCOCO(**SMALL)[index]["image"]).numpy().tobytes()[:64]


def replace(file, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, new))


def rewrite(folder, change) -> None:
    state = json.loads((folder / "cache.json").read_text())
    change(state)
    (folder / "cache.json").write_text(json.dumps(state))


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named_and_the_way_out(tmp_path, how):
    cached(ToyCOCO(**SMALL), tmp_path, block=20)
    DAMAGE[how](tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path.name}.*delete.*made again"):
        cached(ToyCOCO(**SMALL), tmp_path).batch(range(50))


@pytest.mark.parametrize("change, index", [({"block": 21}, 21), ({"block": 19}, 0), ({"samples": 49}, 45)])
def test_no_sample_is_taken_for_another(tmp_path, change, index):
    cached(ToyCOCO(**SMALL), tmp_path, block=20)
    rewrite(tmp_path, lambda state: (state if "block" in change else state["dataset"]).update(change))
    with pytest.raises(DataError, match="20 samples, not|10 samples, not"):
        SampleCache(tmp_path)[index]


def test_a_missing_block_is_noticed_at_once(tmp_path):
    cached(ToyCOCO(**SMALL), tmp_path, block=20)
    (tmp_path / BLOCK).unlink()
    with pytest.raises(DataError, match=f"cache.json.*{BLOCK} is missing.*delete"):
        SampleCache(tmp_path)


def test_caches_of_the_older_format_are_refused(tmp_path):
    """They had images.npy and texts.jsonl."""
    old = {"dataset": {"samples": 50, **ToyCOCO(**SMALL).identity()}, "block": 256, "done": 50, "sums": {}, "bytes": {}}
    (tmp_path / "cache.json").write_text(json.dumps(old | {"keys": ["image", "captions"], "attribute_names": None}))
    for opened in (SampleCache, lambda folder: cached(ToyCOCO(**SMALL), folder)):
        with pytest.raises(DataError, match="another format.*delete.*made again"):
            opened(tmp_path)


HOSTILE = """
import json, random, resource, sys
from pathlib import Path
import torch
from ldm_edu.data.cache import SampleCache
from ldm_edu.errors import DataError
sys.path.insert(0, "tests/data")  # some packages install a top-level `tests` of their own
from test_cache import same

folder, rng, refused = Path(sys.argv[1]), random.Random(0), 0
known = list(SampleCache(folder))
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 300_000_000,) * 2)
files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
for trial in range(400):
    file = rng.choice(files)
    whole = file.read_bytes()
    broken = bytearray(whole)
    kind = trial % 5
    at = rng.randrange(len(whole))
    if kind == 0:
        broken = broken[:at]
    elif kind == 1:
        broken[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        broken[at : at + 30] = rng.randbytes(30)
    elif kind == 3 and file.suffix == ".safetensors":
        broken[:8] = rng.choice([2**63 - 1, 2**40, len(whole), 0, 99_999_999]).to_bytes(8, "little")
    else:
        digits = [i for i, byte in enumerate(whole[:1500]) if chr(byte).isdigit()]
        broken[rng.choice(digits)] = ord(rng.choice("0123456789"))
        i = rng.choice(digits)
        broken[i : i + 1] = b"9" * rng.choice([1, 9, 30])
    file.write_bytes(broken)
    try:
        cache = SampleCache(folder)
        wrong = 0
        for i in rng.sample(range(len(cache)), min(len(cache), len(known))):
            try:
                assert same(cache[i], known[i]), (trial, kind, file, i)
            except DataError:
                wrong = 1
        refused += wrong
    except DataError:
        refused += 1
    file.write_bytes(whole)
print(refused)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_broken_files_take_no_memory_and_give_no_wrong_samples(tmp_path, root):
    """Cut, overwritten, with lengths that lie: 400 times, in a process that may hardly take more memory."""
    cached(ToyCOCO(size=8, length=14, keys=ToyCOCO.known_keys), tmp_path, block=5)
    command = [sys.executable, "-c", HOSTILE, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300


UNKEPT = {
    "tuple": (1, 2),
    "ndarray": np.zeros(3),
    "set": {1},
    "object": object(),
    "list": [torch.zeros(2)],
    "dict": {1: 2},
    "float64": np.float64(1.5),
    "complex": torch.zeros(2, dtype=torch.complex64),
    "sparse": torch.zeros(2).to_sparse(),
    "meta": torch.zeros(2, device="meta"),
}


@pytest.mark.parametrize("kind", UNKEPT)
def test_what_a_cache_cannot_keep_is_named(tmp_path, kind):
    samples = [{"fine": 1, "thing": UNKEPT[kind]}]
    name = "Tensor" if torch.is_tensor(UNKEPT[kind]) else kind
    with pytest.raises(DataError, match=f"cannot keep 'thing', a {name} .*keeps"):
        cached(Listed(samples), tmp_path)
    assert not list(tmp_path.glob("*.*json")) + list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("image", [torch.zeros(3, 2, 2, dtype=torch.uint8), torch.full((3, 2, 2), float("nan"))])
def test_images_that_are_none_are_refused(tmp_path, image):
    with pytest.raises(DataError, match="cannot keep 'image', a Tensor .*(uint8|nan)"):
        cached(Listed([{"image": image}]), tmp_path)


@pytest.mark.parametrize("beyond", [1.01, -1.5, 255.0, float("inf")])
def test_images_beyond_their_range_are_refused_and_not_cut_off(tmp_path, beyond):
    image = torch.zeros(3, 2, 2)
    image[0, 0, 0] = beyond
    with pytest.raises(DataError, match="cannot keep 'image', a Tensor .with values up to .*images in .-1, 1."):
        cached(Listed([{"image": image}]), tmp_path)
    image[0, 0, 0] = 1.001  # rounding, as of a filter: bytes change more
    assert cached(Listed([{"image": image}]), tmp_path / "b")[0]["image"].max() == 1


@pytest.mark.parametrize("number", [2**63, -(2**70), 10**400])
def test_numbers_beyond_a_tensor_come_back_alone_and_make_no_column(tmp_path, number):
    cache = cached(Listed([{"a": number}, {"a": 1}]), tmp_path)
    assert cache[0]["a"] == number
    with pytest.raises(DataError, match="'a' holds a whole number of .* bits"):
        cache.column("a")


def test_halves_of_letters_are_kept_in_texts_and_refused_in_keys(tmp_path):
    samples = [{"text": "\ud83d \udce9", "list": ["\udcff", {"\ud83d": 1}]}]
    assert same(list(cached(Listed(samples), tmp_path / "a")), samples)
    with pytest.raises(DataError, match=r"keys of samples should be texts without halves.*'\\ud83d'"):
        cached(Listed([{"\ud83d": 1}]), tmp_path / "b")
    assert not (tmp_path / "b" / "cache.json").exists()


@pytest.mark.parametrize("identity", [{"a": {1, 2}}, {"a": float("nan")}, {"a": object()}, {(1, 2): 3}])
def test_an_identity_that_cannot_be_written_is_named(tmp_path, identity):
    class Strange(Listed):
        def identity(self) -> dict:
            return identity

    with pytest.raises(DataError, match=r"identity\(\) of Strange as JSON"):
        cached(Strange([{"a": 1}]), tmp_path)


@pytest.mark.parametrize(
    "first, second, says",
    [
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int64)}, "same kind of 'a'.*float32.*int64"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2, 1)}, "same kind of 'a'.*1 dimensions.*2 dimensions"),
        ({"a": torch.zeros(2)}, {"a": [0, 0]}, "same kind of 'a'.*Tensor.*list"),
        ({"a": 1}, {"b": 1}, r"same keys.*\['a'\].*\['b'\]"),
        ({"a": 1}, {"a": 1, "b": 1}, "same keys"),
    ],
)
@pytest.mark.parametrize("block", [1, 2])
def test_samples_that_do_not_go_together_are_refused(tmp_path, first, second, says, block):
    if block == 1 and first.keys() == second.keys():
        assert same(list(cached(Listed([first, second]), tmp_path, block=1)), [first, second])
        return
    with pytest.raises(DataError, match=says):
        cached(Listed([first, second]), tmp_path, block=block)


def test_what_cannot_be_cached_is_refused_at_once(tmp_path):
    for n in (0, -1, 51):
        with pytest.raises(DataError, match="n=.* should be a whole number, 1 to 50"):
            cached(ToyCOCO(**SMALL), tmp_path / "a", n)
    with pytest.raises(DataError, match="block=0 should be"):
        cached(ToyCOCO(**SMALL), tmp_path / "a", block=0)
    assert not (tmp_path / "a").exists()
    with pytest.raises(DataError, match="cannot keep 'thing'"):
        cached(Listed([{"thing": object()}] * 50), tmp_path / "b")
    cached(ToyCOCO(**SMALL), tmp_path / "b")  # nothing was left there
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file cannot be written"):
        cached(ToyCOCO(**SMALL), tmp_path / "file")
    with pytest.raises(DataError, match="nowhere holds no complete cache"):
        SampleCache(tmp_path / "nowhere")


def test_about_is_readable_by_people(tmp_path):
    about = json.loads(contents(cached(ToyCOCO(**SMALL), tmp_path).folder)["cache.json"])
    assert about["dataset"]["samples"] == 50 and about["dataset"]["split"] == "train" and len(about["sums"]) == 1
    assert about["block"] == 256 and about["keys"] == ["image", "captions"]


@pytest.mark.parametrize("indices", [np.array([True, False]), np.array([0.7, 1.9])])
def test_indices_that_are_no_whole_numbers_are_refused(indices, tmp_path):
    cache = cached(ToyCOCO(size=16, length=3), tmp_path)
    with pytest.raises(IndexError, match="whole numbers"):
        cache.batch(indices)


def test_whole_numbers_of_numpy_make_a_cache_that_opens_again(tmp_path):
    made = inspect.unwrap(cached)(ToyCOCO("test", 16), tmp_path, np.int64(3), block=np.int64(2))
    assert len(made) == len(SampleCache(tmp_path)) == 3


@pytest.mark.parametrize("wrong", [{"n": True}, {"n": 1.5}, {"n": 0}, {"block": True}, {"block": 1.5}, {"block": 0}])
def test_a_cache_names_the_number_that_is_wrong(tmp_path, wrong):
    with pytest.raises((DataError, TypeError, TypeCheckError), match=next(iter(wrong))):
        cached(ToyCOCO("test", 16), tmp_path / "cache", **wrong)
    assert not (tmp_path / "cache").exists()


def test_the_folder_of_a_cache_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cached(ToyCOCO("test", 16), "~/cache", 1)
    assert len(SampleCache("~/cache")) == 1 and (tmp_path / "cache" / "cache.json").exists()
