"""The data sets: drawn ones and their promises; real layouts whole, in part and broken; real subsets where they lie."""

import inspect
import itertools
import json
import os
import re
import shutil
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image
from pycocotools import mask

from ldm_edu.data.batches import _check_keys, batches, collate
from ldm_edu.data.celeba import CelebA
from ldm_edu.data.coco import COCO, coco_split, crop_map, decode_outline
from ldm_edu.data.folders import ImageFolder, split_by_name
from ldm_edu.data.images import load_image, read_image, to_tensor
from ldm_edu.data.registry import known_keys, open_dataset
from ldm_edu.data.toy import datasets as module
from ldm_edu.data.toy.captions import VOCABULARY
from ldm_edu.data.toy.datasets import ToyCelebA, ToyCOCO
from ldm_edu.data.toy.scenes import PAIRS, SEEN, SEGMENTS, SPLITS, UNSEEN
from ldm_edu.errors import DataError

COURSE = ("train", "validation", "test")


def equal(a: dict, b: dict) -> bool:
    "Are two samples the same to the last bit?"
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


# ---- ToyCOCO


@pytest.mark.parametrize("split", SPLITS)
def test_a_toy_sample_depends_on_seed_split_and_index_only(split):
    data, order = ToyCOCO(split, 32), [7, 0, 3, 11, 3, 5]
    together = data.__getitems__(order)
    assert all(equal(sample, data[i]) for sample, i in zip(together, order))
    assert all(equal(sample, ToyCOCO(split, 32, length=12)[i]) for sample, i in zip(together, order))
    assert not equal(data[0], ToyCOCO(split, 32, seed=1)[0])


def test_toy_samples_do_not_touch_the_global_random_streams():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    next(batches(ToyCOCO(size=8), 2))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_the_toy_data_set_is_the_one_that_shipped_checkpoints_know():
    """Other words or scenes at these indices would be another data set under the same name."""
    assert [ToyCOCO("train").describe(i)[1][0] for i in range(3)] == [
        "a big orange cylinder in front of a small green can and in front of a little blue sphere",
        "a big red ball behind a big green ball and behind a big green cube",
        "a small blue ball",
    ]
    assert len(VOCABULARY) == 31 and VOCABULARY == tuple(sorted(VOCABULARY))
    sample = ToyCOCO("train")[0]["image"]
    torch.testing.assert_close(sample.mean(), torch.tensor(0.23329), atol=1e-4, rtol=0)
    torch.testing.assert_close(sample[:, 40, 30], torch.tensor([0.3601, -0.2633, -0.8867]), atol=2e-3, rtol=0)


def test_toy_splits_are_disjoint():
    scenes = {split: {ToyCOCO(split).describe(i)[0] for i in range(150)} for split in SPLITS}
    assert all(len(found) == 150 for found in scenes.values())
    assert not any(a & b for a, b in itertools.combinations(scenes.values(), 2))


def test_unseen_pairs_are_in_unseen_only_and_always_there():
    def pairs(split: str, index: int) -> set:
        return {(t.colour, t.shape) for t in ToyCOCO(split).describe(index)[0].things}

    for split in COURSE:
        found = set().union(*(pairs(split, i) for i in range(400)))
        assert found == set(SEEN)
    assert all(pairs("unseen_pairs", i) & set(UNSEEN) for i in range(300))
    assert set(SEEN) | set(UNSEEN) == set(PAIRS) and not set(SEEN) & set(UNSEEN)


@pytest.mark.parametrize("size", [1, 17, 64])
def test_toy_images_at_any_size(size):
    image = ToyCOCO(size=size)[0]["image"]
    assert image.shape == (3, size, size) and image.dtype == torch.float32 and image.abs().max() <= 1


def test_toy_indices_end():
    data = ToyCOCO(size=8, length=3)
    assert len(data) == len(list(data)) == 3
    for index in (-1, 3):
        with pytest.raises(IndexError):
            data[index]
        with pytest.raises(IndexError):
            data.__getitems__([index])


@pytest.mark.parametrize("world", [ToyCOCO, ToyCelebA])
def test_toy_indices_are_whole_numbers(world):
    data = world(size=8, length=3)
    assert data.__getitems__([]) == []
    for index in (1.7, "1", None):
        with pytest.raises(TypeError):
            data[index]


BAD_ARGUMENTS = [
    {"split": "val"},
    {"size": 0},
    {"length": -1},
    {"seed": -1},
    {"keys": ["image", "words"]},
    {"keys": ()},
]


@pytest.mark.parametrize("bad", [*BAD_ARGUMENTS, {"keys": "image"}])
@pytest.mark.parametrize("world", [ToyCOCO, ToyCelebA])
def test_toy_arguments_are_checked(world, bad):
    with pytest.raises(DataError, match=next(iter(bad))):
        world(**bad)


def test_every_key_alone_is_what_it_is_among_all():
    for world in (ToyCOCO, ToyCelebA):
        whole = world(size=24, keys=world.known_keys).__getitems__([4, 1, 9])
        for key in world.known_keys:
            parts = world(size=24, keys=[key]).__getitems__([4, 1, 9])
            assert all(part.keys() == {key} for part in parts)
            assert all(equal(part, {key: sample[key]}) for part, sample in zip(parts, whole))


def test_only_what_is_asked_for_is_worked_out(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("nobody asked for this")

    monkeypatch.setattr(module, "render", never)
    assert ToyCOCO(keys=["captions", "depth"])[0].keys() == {"captions", "depth"}
    monkeypatch.setattr(module, "truth", never)
    assert len(ToyCOCO(keys=["captions"])[0]["captions"]) == 5
    monkeypatch.setattr(module, "render_faces", never)
    monkeypatch.setattr(module, "face_truth", never)
    assert ToyCelebA(keys=["attributes"])[3].keys() == {"attributes"}


def test_what_is_known_of_a_scene_agrees():
    dataset = ToyCOCO(keys=ToyCOCO.known_keys)
    for i, sample in enumerate(dataset.__getitems__(range(20))):
        scene, said = dataset.describe(i)
        assert sample["captions"] == said and sample["caption"] == said[0]
        assert len(sample["boxes"]) == len(sample["instances"]) == len(scene.things)
        assert sample["depth"].shape == (1, 64, 64) and sample["depth"].min() > 0
        for thing, box, seen in zip(scene.things, sample["boxes"], sample["instances"]):
            assert SEGMENTS[int(box[0])] == thing.shape and (sample["segmentation"][seen] == int(box[0])).all()
        assert torch.equal(sample["instances"].any(0), sample["segmentation"] > 0)


@pytest.mark.parametrize("split", COURSE)
def test_a_face_depends_on_seed_split_and_index_only(split):
    faces, order = ToyCelebA(split, 32), [7, 0, 3, 11, 3, 5, 1, 2, 4, 6]
    together = faces.__getitems__(order)
    assert all(equal(sample, faces[i]) for sample, i in zip(together, order))
    assert not equal(faces[0], ToyCelebA(split, 32, seed=1)[0])
    assert all(tuple(s["attributes"].bool().tolist()) == faces.describe(i).attributes for s, i in zip(together, order))


def test_faces_of_the_splits_differ():
    shown = [{ToyCelebA(split).describe(i) for i in range(60)} for split in COURSE]
    assert all(len(found) == 60 for found in shown)
    assert not any(a & b for a, b in itertools.combinations(shown, 2))
    assert len(ToyCelebA.attribute_names) == len(set(ToyCelebA.attribute_names)) >= 12
    with pytest.raises(DataError, match="unseen"):
        ToyCelebA("unseen")


def test_identities_tell_data_sets_apart():
    sets = [ToyCOCO(), ToyCOCO("test"), ToyCOCO(size=32), ToyCOCO(seed=1), ToyCOCO(keys=["image"]), ToyCelebA()]
    told = [json.dumps(dataset.identity(), sort_keys=True) for dataset in sets]
    assert len(set(told)) == len(told) and ToyCOCO().identity() == ToyCOCO(length=7).identity()


# ---- batches


def test_batches_are_decided_by_the_seed_and_cover_a_pass():
    data = [{"number": i} for i in range(10)]

    def take(n: int, **kwargs) -> list:
        return [batch["number"].tolist() for batch in itertools.islice(batches(data, **kwargs), n)]

    assert take(7, batch_size=3, seed=5) == take(7, batch_size=3, seed=5) != take(7, batch_size=3, seed=6)
    passes = take(8, batch_size=3, drop_last=False)
    assert [len(batch) for batch in passes] == [3, 3, 3, 1] * 2
    assert sorted(sum(passes[:4], [])) == sorted(sum(passes[4:], [])) == list(range(10)) and passes[:4] != passes[4:]
    torch.manual_seed(1)
    other = take(4, batch_size=3)
    torch.manual_seed(2)
    assert take(4, batch_size=3) == other


def test_other_processes_read_the_same_batches():
    data = ToyCOCO(size=8, length=8)
    alone, helped = batches(data, 4, seed=1), batches(data, 4, seed=1, workers=1)
    assert all(equal(next(alone), next(helped)) for _ in range(3))


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_batch_sizes_that_do_not_fit(batch_size):
    with pytest.raises(DataError, match="batch_size"):
        batches([{"number": i} for i in range(10)], batch_size)


def test_batches_of_nothing():
    with pytest.raises(DataError, match="empty"):
        batches([], 4, drop_last=False)


def test_collate_keeps_what_cannot_be_stacked_and_refuses_what_does_not_fit():
    first = {"a": torch.zeros(2), "b": "x", "c": 1.5, "d": ["p"]}
    batch = collate([first, {"a": torch.ones(2), "b": "y", "c": 2.5, "d": []}])
    assert batch["a"].shape == (2, 2) and batch["b"] == ["x", "y"] and batch["c"].tolist() == [1.5, 2.5]
    assert batch["d"] == [["p"], []]
    assert collate([{"a": 1}, {"a": None}]) == {"a": [1, None]} and collate([{"a": None}, {"a": 1}])["a"] == [None, 1]
    numbers = collate([{"a": 1, "b": True, "c": 1}, {"a": 2**62 + 1, "b": False, "c": 0.5}])
    assert [numbers[key].dtype for key in "abc"] == [torch.int64, torch.bool, torch.float32]
    assert numbers["a"][1] == 2**62 + 1
    with pytest.raises(DataError, match="'a'.*shapes"):
        collate([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}])
    with pytest.raises(DataError, match="different keys"):
        collate([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}])
    with pytest.raises(DataError, match="no samples"):
        collate([])
    for number in (2**63, -(2**63) - 1):
        with pytest.raises(DataError, match="'a' holds a whole number of 64 bits, and a tensor has 63"):
            collate([{"a": 1}, {"a": number}])


def test_what_differs_in_number_stays_in_lists_also_where_it_happens_not_to():
    keys = ("boxes", "instances", "captions")
    dataset = ToyCOCO(size=8, keys=keys)
    batch = collate([dataset[2], dataset[4]])  # one thing each
    assert all(isinstance(batch[key], list) and len(batch[key]) == 2 for key in keys)
    assert [len(boxes) for boxes in batch["boxes"]] == [1, 1]


# ---- image files


def noise_picture(width: int = 20, height: int = 14) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "suffix, mode",
    [("png", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    + [("jpg", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")]
    + [("tif", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")],
)
def test_all_kinds_of_pictures(tmp_path, mode, suffix):
    grey = noise_picture().convert("L")
    fine = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    picture = fine if mode == "I;16" else noise_picture().convert(mode)
    file = tmp_path / f"image.{suffix}"
    picture.save(file)
    image = load_image(file, 10)
    assert image.shape == (3, 10, 10) and image.dtype == torch.float32 and -1 <= image.min() < image.max() <= 1
    if mode == "I;16":
        torch.testing.assert_close(to_tensor(read_image(file)), to_tensor(grey.convert("RGB")))


def test_transparent_palette_entries_become_white(tmp_path):
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "p.png", transparency=0)
    assert (load_image(tmp_path / "p.png", 4) == 1).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_notes_are_followed(tmp_path, orientation):
    """Write the image as a camera held that way would, and read it back."""
    held = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270")
    picture = noise_picture()
    stored = picture.transpose(Image.Transpose[held[orientation - 2]]) if orientation > 1 else picture
    note = Image.Exif()
    note[0x0112] = orientation
    stored.save(tmp_path / "note.png", exif=note)
    assert torch.equal(to_tensor(read_image(tmp_path / "note.png")), to_tensor(picture))


def test_the_square_is_cut_from_the_middle(tmp_path):
    picture = Image.new("RGB", (178, 218), "black")
    picture.paste((255, 255, 255), (0, 20, 178, 198))
    picture.save(tmp_path / "face.png")
    assert (load_image(tmp_path / "face.png", 64) == 1).all()


def break_file(file, how: str) -> None:
    whole = file.read_bytes()
    broken = {"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"no image", "header": whole[:20]}
    file.write_bytes(broken[how])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("how", ["empty", "truncated", "text", "header"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_broken_pictures_are_named(tmp_path, how, suffix):
    file = tmp_path / f"broken.{suffix}"
    noise_picture(64, 64).save(file)
    break_file(file, how)
    with pytest.raises(DataError, match=f"broken.{suffix}"):
        read_image(file)


def test_missing_pictures_and_folders_in_their_place_are_named(tmp_path):
    with pytest.raises(DataError, match="gone.jpg"):
        read_image(tmp_path / "gone.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(DataError, match="folder.jpg"):
        read_image(tmp_path / "folder.jpg")


# ---- layouts, written from noise


@pytest.fixture
def celeba(tmp_path):
    """A folder `data` with 30 CelebA-like images in `celeba`."""
    root = tmp_path / "data" / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    rows = ["30", "Smiling Young"]
    for i in range(1, 31):
        noise_picture(18, 22).save(root / "img_align_celeba" / f"{i:06}.jpg")
        rows.append(f"{i:06}.jpg {1 if i % 2 else -1:2} {1 if i % 3 else -1:2}")
    (root / "list_attr_celeba.txt").write_text("\n".join(rows) + "\n")
    return root.parent


@pytest.fixture
def coco(tmp_path):
    """A folder `data` with 30 COCO-like images in `coco/val2017`."""
    root = tmp_path / "data" / "coco"
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    content = {"images": [], "annotations": []}
    for i in range(30):
        noise_picture().save(root / "val2017" / f"{i:012}.jpg")
        content["images"].append({"id": i, "file_name": f"{i:012}.jpg"})
        said = [f" image {i},\n caption {k} " for k in range(5)]
        content["annotations"] += [{"id": 100 - i + k, "image_id": i, "caption": said[k]} for k in range(5)]
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    return root.parent


def edit_json(file, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_celeba(celeba):
    data = {split: CelebA(celeba, split, 16) for split in COURSE}
    names = [file.name for d in data.values() for file in d.files]
    assert len(names) == len(set(names)) == 30 and len(data["train"]) > 15
    assert data["train"].attribute_names == ["Smiling", "Young"] and data["train"].missing == 0
    for i, file in enumerate(data["train"].files):
        number = int(file.stem)
        assert data["train"][i]["attributes"].tolist() == [number % 2, number % 3 > 0]
    assert data["train"][0]["image"].shape == (3, 16, 16)
    assert CelebA(celeba / "celeba", "train").files == data["train"].files


def test_celeba_reads_only_what_is_asked_for(celeba, monkeypatch):
    both = CelebA(celeba, "test", 8)[0]
    assert CelebA(celeba, "test", 8, keys=["attributes", "image"]).identity() != CelebA(celeba, "test", 8).identity()
    for key in CelebA.known_keys:
        assert equal(CelebA(celeba, "test", 8, keys=[key])[0], {key: both[key]})
    assert list(CelebA(celeba, "test", 8, keys=["attributes", "image"])[0]) == ["attributes", "image"]
    monkeypatch.setattr(Image, "open", None)
    assert CelebA(celeba, "test", keys=["attributes"])[0].keys() == {"attributes"}
    for bad in ("image", (), ["caption"]):
        with pytest.raises(DataError, match="keys should be a list of some of image, attributes"):
            CelebA(celeba, keys=bad)


def test_celeba_by_its_own_partition(celeba):
    lines = [f"{i:06}.jpg {0 if i <= 10 else 1 if i <= 18 else 2}" for i in range(1, 31)]
    partition = celeba / "celeba" / "list_eval_partition.txt"
    partition.write_text("\n".join(lines) + "\n")
    assert [len(CelebA(celeba, split)) for split in COURSE] == [10, 8, 12]
    partition.write_text("\n".join(lines[:-2]) + "\n")
    with pytest.raises(DataError, match="000029.jpg"):
        CelebA(celeba)
    partition.write_text("\n".join(lines).replace("000002.jpg 0", "000002.jpg 3"))
    with pytest.raises(DataError, match="list_eval_partition.txt, line 2"):
        CelebA(celeba)


def test_a_subset_of_celeba_moves_no_picture(celeba):
    before = {split: CelebA(celeba, split).files for split in COURSE}
    for i in range(1, 31, 4):
        (celeba / "celeba" / "img_align_celeba" / f"{i:06}.jpg").unlink()
    (celeba / "celeba" / "img_align_celeba" / "stranger.jpg").write_bytes(b"")
    for split in COURSE:
        data = CelebA(celeba, split)
        assert data.files == [file for file in before[split] if file.exists()] and data.missing == 8


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "should begin"),
        ("thirty\nA B\n", "should begin"),
        ("2\nA B\n1.jpg 1 1\n", "announces 2 files but lists 1"),
        ("1\nA B\n1.jpg 1 1\n2.jpg 1 1\n", "announces 1 files but lists 2"),
        ("1\nA B\n1.jpg 1\n", "line 3"),
        ("2\nA B\n1.jpg 1 1\n2.jpg 1 0\n", "line 4"),
        ("2\nA B\n1.jpg 1 1\n2.jpg 1 1 1\n", "line 4"),
    ],
)
def test_broken_attribute_lists_are_named(celeba, text, says):
    (celeba / "celeba" / "list_attr_celeba.txt").write_text(text)
    with pytest.raises(DataError, match=f"list_attr_celeba.txt.*{says}"):
        CelebA(celeba)


def test_what_celeba_lacks_is_named(celeba):
    root = celeba / "celeba"
    with pytest.raises(DataError, match="unseen.*train, validation, test"):
        CelebA(celeba, "unseen")
    with pytest.raises(DataError, match="size"):
        CelebA(celeba, size=0)
    with pytest.raises(DataError, match="nowhere.*no such folder.*README"):
        CelebA(celeba / "nowhere")
    (root / "list_attr_celeba.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="list_attr_celeba.txt"):
        CelebA(celeba)
    (root / "list_attr_celeba.txt").unlink()
    with pytest.raises(DataError, match="list_attr_celeba.txt.*README"):
        CelebA(celeba)
    shutil.rmtree(root / "img_align_celeba")
    with pytest.raises(DataError, match="neither img_align_celeba/ nor celeba/img_align_celeba/.*README"):
        CelebA(celeba)


def test_no_picture_at_all_is_an_error(celeba, coco):
    for folder in (celeba / "celeba" / "img_align_celeba", coco / "coco" / "val2017"):
        shutil.rmtree(folder)
        folder.mkdir()
    with pytest.raises(DataError, match="img_align_celeba contains none of the 30"):
        CelebA(celeba)
    with pytest.raises(DataError, match="val2017 contains none of the 30"):
        COCO(coco)


def test_a_broken_picture_is_named_when_it_is_read(celeba, coco):
    for data in (CelebA(celeba), COCO(coco)):
        break_file(data.files[2], "truncated")
        data[1]
        with pytest.raises(DataError, match=data.files[2].name):
            data[2]


def test_coco(coco):
    data = COCO(coco, size=16)
    assert len(data) == 30 and data.missing == 0 and data.without == {"captions": 0}
    sample = data[3]
    assert sample["captions"] == [f"image 3, caption {k}" for k in range(5)]
    assert sample["caption"] == sample["captions"][0]
    assert equal(sample, data[3]) and sample["image"].shape == (3, 16, 16)
    assert COCO(coco / "coco", "val2017").files == data.files
    parts = [COCO(coco, split).files for split in COURSE]
    assert sorted(sum(parts, [])) == data.files and all(parts)


def test_coco_with_both_folders(coco):
    root = coco / "coco"
    shutil.copytree(root / "val2017", root / "train2017")
    shutil.copy(root / "annotations" / "captions_val2017.json", root / "annotations" / "captions_train2017.json")
    assert {file.parent.name for file in COCO(coco, "train").files} == {"train2017"}
    held = [COCO(coco, split).files for split in ("validation", "test")]
    assert sorted(sum(held, [])) == COCO(coco, "val2017").files
    assert len(COCO(coco)) == 60 and len(COCO(coco, "train2017")) == 30


def test_coco_leaves_out_and_counts(coco):
    root = coco / "coco"
    (root / "val2017" / f"{0:012}.jpg").unlink()

    def drop(content):
        content["annotations"] = [note for note in content["annotations"] if note["image_id"] != 1]

    edit_json(root / "annotations" / "captions_val2017.json", drop)
    data = COCO(coco)
    assert (len(data), data.missing, data.without) == (28, 1, {"captions": 1})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"images": [], "annotations": 3}',
        '{"images": [{"id": 1}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, "image_id": 1}]}',
        '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": 3}]}',
    ],
)
def test_broken_captions_are_named(coco, text):
    (coco / "coco" / "annotations" / "captions_val2017.json").write_text(text)
    with pytest.raises(DataError, match="captions_val2017.json"):
        COCO(coco)


def test_what_coco_lacks_is_named(coco):
    root = coco / "coco"
    with pytest.raises(DataError, match="no folder train2017"):
        COCO(coco, "train2017")
    with pytest.raises(DataError, match="unseen.*val2017"):
        COCO(coco, "unseen")
    (root / "annotations" / "captions_val2017.json").unlink()
    with pytest.raises(DataError, match="captions_val2017.json.*README"):
        COCO(coco)
    shutil.rmtree(root / "val2017")
    with pytest.raises(DataError, match="no folder train2017 or val2017"):
        COCO(coco)
    shutil.rmtree(root)
    with pytest.raises(DataError, match="neither annotations/ nor coco/annotations/"):
        COCO(coco)


def test_splits_by_name_are_fixed_for_ever():
    """These lots were cast once; other ones would move images between training and test."""
    assert [split_by_name(f"{i:06}.jpg") for i in (1, 2, 11)] == ["train", "validation", "test"]
    both = ("train2017", "val2017")
    assert [coco_split(f"{i:012}.jpg", "val2017", both) for i in (139, 285)] == ["test", "validation"]


def test_names_that_are_no_text_have_a_split():
    """Odd bytes, as Linux gives them, and halves of letters, as Windows does; other names keep theirs."""
    assert split_by_name("caf\udce9.jpg") == "train" and split_by_name("caf\ud83d.jpg") in COURSE
    both = ("train2017", "val2017")
    assert {coco_split(f"{letter}.jpg", "val2017", both) for letter in "ab\udce9\ud83dé"} == {"validation", "test"}


def test_image_folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("b.JPG", "a.png", "deep/c.webp", "deep/er/d.jpeg", ".hidden/e.png", ".f.png", "text.txt"):
        noise_picture().save(tmp_path / name, format="PNG")
    data = ImageFolder(tmp_path, 8)
    assert [file.name for file in data.files] == ["a.png", "b.JPG", "c.webp", "d.jpeg"]
    assert data[3].keys() == {"image"} and data[3]["image"].shape == (3, 8, 8) and len(list(data)) == 4


def test_image_folder_splits(tmp_path):
    for i in range(40):
        noise_picture().save(tmp_path / f"{i}.png")
    parts = [ImageFolder(tmp_path, split=split).files for split in COURSE]
    assert sorted(sum(parts, [])) == ImageFolder(tmp_path).files and all(parts)
    with pytest.raises(DataError, match="val.*known"):
        ImageFolder(tmp_path, split="val")


def test_classes_are_the_first_subfolders(tmp_path, monkeypatch):
    for name in ("cat/deep/er/1.png", "cat/2.png", "ant/3.png", ".hidden/4.png", "bee/5.png", "dog/6.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_picture().save(tmp_path / name, format="PNG")
    data = ImageFolder(tmp_path, 8, keys=["image", "class"])
    assert data.class_names == ["ant", "bee", "cat"] and data[0].keys() == {"image", "class"}
    assert [data.class_names[sample["class"]] for sample in data] == [
        file.relative_to(tmp_path).parts[0] for file in data.files
    ]
    numbers = collate([data[i] for i in range(4)])["class"]
    assert numbers.tolist() == [0, 1, 2, 2] and numbers.dtype == torch.int64
    monkeypatch.setattr(Image, "open", None)
    assert ImageFolder(tmp_path, keys=["class"])[3] == {"class": 2}
    for bad in ("class", (), ["caption"]):
        with pytest.raises(DataError, match="keys should be a list of some of image, class"):
            ImageFolder(tmp_path, keys=bad)


def test_a_class_has_the_same_number_in_every_split(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}").mkdir()
        noise_picture().save(tmp_path / f"{i:02}" / f"{i}.png")
    parts = [ImageFolder(tmp_path, split=split, keys=("class",)) for split in COURSE]
    assert all(len(part.class_names) == 20 and 0 < len(part) < 20 for part in parts)
    assert all(part[i]["class"] == int(part.files[i].parent.name) for part in parts for i in range(len(part)))
    before = [part.identity() for part in parts]
    (tmp_path / "0").mkdir()
    noise_picture().save(tmp_path / "0" / "0.png")
    after = [ImageFolder(tmp_path, split=split, keys=("class",)).identity() for split in COURSE]
    assert all(old != new for old, new in zip(before, after))  # one more class moves the numbers of the others


def test_an_image_without_a_class_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "stray.png"):
        noise_picture().save(tmp_path / name)
    assert len(ImageFolder(tmp_path)) == 2 and ImageFolder(tmp_path).class_names == []
    for split in (None, split_by_name("a/1.png")):
        with pytest.raises(DataError, match="stray.png lies in no subfolder.*move it.*or leave"):
            ImageFolder(tmp_path, split=split, keys=("image", "class"))


def test_what_a_folder_lacks_is_named(tmp_path):
    with pytest.raises(DataError, match="contains no images"):
        ImageFolder(tmp_path)
    with pytest.raises(DataError, match="gone.*no such folder"):
        ImageFolder(tmp_path / "gone")
    noise_picture().save(tmp_path / "a.png")
    other = next(split for split in COURSE if split != split_by_name("a.png"))
    with pytest.raises(DataError, match=f"none of its 1 images is in split '{other}'"):
        ImageFolder(tmp_path, split=other)


def test_open_dataset(celeba, coco):
    assert isinstance(open_dataset("toy", None, "unseen_pairs", 8), ToyCOCO)
    assert open_dataset("toy-faces", None, "test", 8, keys=["segmentation"])[0]["segmentation"].shape == (8, 8)
    assert open_dataset("coco", coco, "train", 8, keys=["caption"])[0].keys() == {"caption"}
    assert open_dataset("celeba", celeba, "test", 8)[0]["image"].shape == (3, 8, 8)
    assert open_dataset("coco", str(coco), "validation", 8)[0].keys() == {"image", "caption", "captions"}
    assert open_dataset("folder", celeba / "celeba", "train", 8)[0].keys() == {"image"}
    with pytest.raises(DataError, match="'imagenet'.*toy, toy-faces, celeba, coco, folder"):
        open_dataset("imagenet")
    for name in ("celeba", "coco", "folder"):
        with pytest.raises(DataError, match="data_dir"):
            open_dataset(name)


def test_every_data_set_takes_keys_and_says_so(celeba, coco):
    roots = {"toy": None, "toy-faces": None, "celeba": celeba, "coco": coco, "folder": coco}
    for name, root in roots.items():
        for key in set(known_keys(name)) & {"image", "caption", "captions", "attributes", "class", "depth"}:
            dataset = open_dataset(name, root, "train", 8, keys=[key])
            assert dataset[0].keys() == {key} and dataset.identity()["keys"] == [key] == list(dataset.keys)
        with pytest.raises(DataError, match="keys.*not words"):
            open_dataset(name, root, "train", 8, keys=["words"])
    derived = ("low_resolution", "degraded", "mask")  # any data set has these, made of its images
    assert known_keys("coco") == (*COCO.known_keys, *derived) and known_keys("folder") == ("image", "class", *derived)
    with pytest.raises(DataError, match="'imagenet'.*toy, toy-faces, celeba, coco, folder"):
        known_keys("imagenet")


# ---- the real subsets, where they are


def real(real_data, name: str):
    if not (real_data / name).is_dir():
        pytest.skip(f"no {name}/ in {real_data}")
    return real_data


def test_real_celeba(real_data):
    folder = real(real_data, "celeba")
    data = {split: CelebA(folder, split) for split in COURSE}
    files = [file for d in data.values() for file in d.files]
    assert len(files) == len(set(files)) > 0
    train = data["train"]
    assert len(train.attribute_names) == 40 and {"Eyeglasses", "Smiling", "Male"} <= set(train.attribute_names)
    batch = next(batches(train, 8))
    assert batch["image"].shape == (8, 3, 64, 64) and batch["image"].abs().max() <= 1 and batch["image"].std() > 0.1
    assert batch["attributes"].shape == (8, 40) and set(train.attributes.unique().tolist()) == {0, 1}
    beards = train.attributes[:, train.attribute_names.index("No_Beard")].mean()
    assert 0.5 < beards < 1  # most faces have none: the signs are the right way round


def test_real_coco(real_data):
    folder = real(real_data, "coco")
    data = COCO(folder)
    assert len(data) > 0 and all(len(captions) >= 5 and all(captions) for captions in data.captions)
    parts = [COCO(folder, split).files for split in COURSE]
    assert sorted(sum(parts, [])) == sorted(data.files)
    batch = next(batches(data, 4))
    assert batch["image"].shape == (4, 3, 64, 64) and all(isinstance(text, str) for text in batch["caption"])
    assert not any("\n" in text for captions in data.captions for text in captions)


def test_every_real_picture_can_be_read(real_data):
    for dataset in (CelebA(real_data, "test", 16),) if (real_data / "celeba").is_dir() else ():
        assert all(torch.isfinite(dataset[i]["image"]).all() for i in range(min(50, len(dataset))))
    if (real_data / "coco").is_dir():
        assert all(sample["image"].shape == (3, 16, 16) for sample in itertools.islice(COCO(real_data, size=16), 50))


# ---- COCO's boxes and maps


def test_crop_map_takes_the_centre_of_every_pixel():
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width, size = (int(n) for n in rng.integers(1, 90, 3))
        labels = rng.integers(0, 99, (height, width))
        side = min(width, height)
        at = [int(Fraction(2 * i + 1, 2 * size) * side) for i in range(size)]
        left, top = (width - side) // 2, (height - side) // 2
        assert (crop_map(labels, size) == labels[[[top + y] for y in at], [left + x for x in at]]).all()


def random_polygon(rng: np.random.Generator, width: int, height: int) -> list[float]:
    corners = rng.uniform((-5, -5), (width + 5, height + 5), (int(rng.integers(3, 9)), 2))
    return corners.round(2).reshape(-1).tolist()


def test_outlines_are_decoded_as_pycocotools_does():
    """Polygons, run lengths as lists and as text, against its own reading of an annotation."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        width, height = (int(n) for n in rng.integers(1, 60, 2))
        polygons = [random_polygon(rng, width, height) for _ in range(int(rng.integers(1, 4)))]
        packed = mask.merge(mask.frPyObjects(polygons, height, width))
        expected = masks_of(packed)
        flat = np.concatenate([[0], expected.T.reshape(-1), [0]])
        runs = np.diff([0, *np.flatnonzero(np.diff(flat)), expected.size]).tolist()
        text = {"counts": packed["counts"].decode(), "size": [height, width]}
        for outline in (polygons, text, {"counts": runs, "size": [height, width]}):
            assert (decode_outline(outline, width, height) == expected).all()


def test_damaged_run_lengths_are_refused():
    """A text with a character changed, left out or put in is another whole mask, or it is refused."""
    rng, refused = np.random.default_rng(0), 0
    for _ in range(3000):
        width, height = (int(n) for n in rng.integers(1, 9, 2))
        whole = mask.encode(np.asfortranarray(rng.integers(0, 2, (height, width), dtype=np.uint8)))["counts"].decode()
        place, new = int(rng.integers(len(whole))), chr(rng.integers(40, 120)) * int(rng.integers(3))
        text = whole[:place] + new + whole[place + 1 :]
        try:
            seen = decode_outline({"counts": text, "size": [height, width]}, width, height)
        except ValueError:
            refused += 1
            continue
        again = mask.encode(np.asfortranarray(seen.astype(np.uint8)))
        assert mask.area(again) == mask.area({"counts": text, "size": [height, width]}) == seen.sum()
    assert 1000 < refused < 3000
    with pytest.raises(ValueError, match="less than"):
        decode_outline([[1, 1, 9, 1, 9, 9]], 10**9, 10**9)


def masks_of(packed: dict) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools and NumPy 2
        return mask.decode(packed).astype(bool)


def test_maps_and_boxes_lie_where_the_picture_is(tmp_path):
    """A white rectangle in a black image, with its box, its polygon and its segment: all fall on the same pixels."""
    root, rng = tmp_path / "coco", np.random.default_rng(0)
    maps = root / "annotations" / "panoptic_val2017"
    maps.mkdir(parents=True)
    (root / "val2017").mkdir()
    kinds = {"categories": [{"id": 5, "name": "rectangle"}]}
    images, things, segments = [], [], []
    for i in range(40):
        width, height = (int(n) for n in rng.integers(40, 200, 2))
        x, y = int(rng.integers(0, width - 20)), int(rng.integers(0, height - 20))
        w, h = int(rng.integers(10, width - x)), int(rng.integers(10, height - y))
        name, corners = f"{i:012}", [x, y, x + w, y, x + w, y + h, x, y + h]
        images.append({"id": i, "file_name": f"{name}.jpg", "width": width, "height": height})
        things.append({"id": i, "image_id": i, "category_id": 5, "bbox": [x, y, w, h], "segmentation": [corners]})
        segments.append({"image_id": i, "file_name": f"{name}.png", "segments_info": [{"id": 258, "category_id": 5}]})
        for file, colour in ((root / "val2017" / f"{name}.jpg", "white"), (maps / f"{name}.png", (2, 1, 0))):
            picture = Image.new("RGB", (width, height))
            picture.paste(colour, (x, y, x + w, y + h))
            picture.save(file, **({"quality": 95} if file.suffix == ".jpg" else {}))
    for kind, notes in (("instances", things), ("panoptic", segments)):
        content = json.dumps({"images": images, "annotations": notes, **kinds})
        (root / "annotations" / f"{kind}_val2017.json").write_text(content)
    dataset = COCO(tmp_path, size=32, keys=("image", "boxes", "instances", "segmentation"))
    assert len(dataset) == 40 and dataset.categories == ["rectangle"]
    assert dataset.segment_names == ["unlabelled", "rectangle"]
    for sample in dataset:
        segment = sample["segmentation"] == 1
        clear = sample["image"].mean(0).abs() > 0.9  # pixels on the edge are grey and may go either way
        assert torch.equal(segment[clear], sample["image"].mean(0)[clear] > 0)
        assert len(sample["boxes"]) == len(sample["instances"]) <= 1
        for (kind, left, top, right, bottom), seen in zip((32 * sample["boxes"]).tolist(), sample["instances"]):
            assert kind == 32 and torch.equal(seen, segment)
            rows, columns = seen.nonzero().unbind(1)
            found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (found - torch.tensor([left, top, right, bottom])).abs().max() <= 1


def test_a_sliver_of_a_box_is_dropped_with_its_mask(coco):
    notes = [
        {"id": i, "image_id": 0, "category_id": 9, "bbox": box, "segmentation": [[x, y, x + w, y, x + w, y + h]]}
        for i, box in enumerate([[3, 0, 10, 10], [0, 0, 3.5, 10], [5, 5, 0.4, 3]])
        for x, y, w, h in [box]
    ]
    crowd = {"id": 9, "image_id": 0, "category_id": 9, "bbox": [3, 0, 14, 14], "iscrowd": 1, "segmentation": {}}
    content = {
        "images": [{"id": 0, "file_name": f"{0:012}.jpg", "width": 20, "height": 14}],
        "categories": [{"id": 9, "name": "x"}],
        "annotations": [*notes, crowd],
    }
    (coco / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    dataset = COCO(coco, size=14, keys=["boxes", "instances"])
    sample = dataset[0]
    assert dataset.without == {"instances": 29} and len(dataset) == 1
    torch.testing.assert_close(sample["boxes"], torch.tensor([[1, 0, 0, 10 / 14, 10 / 14]]))
    assert sample["instances"].shape == (1, 14, 14) and sample["instances"].dtype == torch.bool


# ---- opening


def test_opening_reads_no_picture(celeba, coco, monkeypatch):
    for file in [*(celeba / "celeba").rglob("*.jpg"), *(coco / "coco").rglob("*.jpg")]:
        file.write_bytes(b"")

    def never(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", never)
    opened = [CelebA(celeba), COCO(coco), ImageFolder(celeba)]
    assert all(len(dataset) and dataset.identity() for dataset in opened)


def test_identities_of_files_change_with_the_files(celeba, coco):
    def told() -> list[str]:
        opened = [CelebA(celeba), CelebA(celeba, size=32), COCO(coco), COCO(coco, keys=["image"]), ImageFolder(celeba)]
        return [json.dumps(dataset.identity(), sort_keys=True) for dataset in opened]

    before = told()
    assert len(set(before)) == 5 and told() == before
    for file in (CelebA(celeba).files[0], COCO(coco).files[0]):
        os.utime(file, ns=(0, 0))
    assert not set(before) & set(told())


def test_a_moved_data_set_is_still_the_same(celeba):
    before = CelebA(celeba).identity()
    (celeba / "celeba").rename(celeba / "moved")
    assert CelebA(celeba / "moved").identity() == before


# ---- real boxes, outlines and segments


def test_real_coco_with_everything(real_data):
    folder = real(real_data, "coco")
    dataset = COCO(folder, size=64, keys=tuple(COCO.known_keys))
    if "instances" not in dataset.kinds or not len(dataset):
        pytest.skip("no image there has all annotations")
    assert len(dataset.categories) == 80 and len(dataset.segment_names) == 134
    agree, total = 0, 0
    for sample in itertools.islice(dataset, 60):
        boxes, seen, segments = sample["boxes"], sample["instances"], sample["segmentation"]
        assert len(boxes) == len(seen) and segments.shape == (64, 64) and 0 <= segments.min() <= segments.max() <= 133
        for (kind, left, top, right, bottom), one in zip(boxes.tolist(), seen):
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1 and 1 <= kind <= 80
            rows, columns = one.nonzero().unbind(1)
            if len(rows):  # no pixel of a mask lies outside of its box, but for rounding
                assert columns.min() > left * 64 - 1.5 and rows.min() > top * 64 - 1.5
                assert columns.max() < right * 64 + 0.5 and rows.max() < bottom * 64 + 0.5
            names = [dataset.segment_names[n] for n in segments[one].tolist()]
            agree, total = agree + names.count(dataset.categories[int(kind) - 1]), total + len(names)
    assert agree / total > 0.9  # two annotations of the same things, made years apart


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "4"])
def test_an_image_is_read_at_a_whole_number_of_pixels_only(tmp_path, size):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises((DataError, TypeError, TypeCheckError), match="size"):
        load_image(tmp_path / "a.png", size)


@pytest.mark.parametrize(
    "wrong",
    [{"seed": 2**64}, {"seed": -1}, {"workers": -1}, {"batch_size": True}, {"batch_size": 1.5}, {"batch_size": 0}],
)
def test_batches_name_the_number_that_is_wrong(wrong):
    data = ToyCOCO("test", size=16, length=4)
    with pytest.raises((DataError, TypeError, TypeCheckError), match=next(iter(wrong))):
        next(batches(data, **({"batch_size": 2} | wrong)))


def test_whole_numbers_of_numpy_make_the_same_batches():
    data = ToyCOCO("test", 16, 4)
    one = next(inspect.unwrap(batches)(data, np.int64(2), seed=np.int64(3), workers=np.int64(0)))
    assert torch.equal(one["image"], next(batches(data, 2, seed=3))["image"])


def test_keys_may_come_from_a_generator():
    keys = (key for key in ["image", "caption"])
    assert inspect.unwrap(_check_keys)(keys, ToyCOCO.known_keys) == ("image", "caption")


def test_an_unknown_word_of_a_million_letters_is_not_repeated():
    with pytest.raises(DataError) as refused:
        ToyCOCO("x" * 10**6)
    assert len(str(refused.value)) < 300


def test_the_folder_of_a_data_set_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    assert len(ImageFolder("~/pictures", 8)) == 1
    for kind in (CelebA, COCO):
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'pictures'} contains neither")):
            kind("~/pictures")
