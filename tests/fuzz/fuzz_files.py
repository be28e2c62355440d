"""Files of every layout that the package reads, changed at random: configs, weights, data sets, settings, runs."""

import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from small_model import SMALL, Refused, anything, changed, ends_well, is_right, paths

from ldm_edu import LatentDiffusion, load_first_stage
from ldm_edu.data import COCO, CelebA, ImageFolder, cached, decode_outline, read_image
from ldm_edu.data.cache import SampleCache
from ldm_edu.files import load_json, load_notes, load_tensors, save_json, save_tensors
from ldm_edu.first_stage.published import load_published, save_diffusers
from ldm_edu.settings import load_settings
from ldm_edu.training.recipes import RECIPES, recipe_from_dict, recipe_to_dict

WORK = Path(tempfile.mkdtemp(prefix="fuzz-"))

# Values as they may stand in a JSON file: of other kinds, too large, nested, or no JSON at all.
json_values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63, 10**30, 0.5, -0.5, 1e300, 1e-300, 10**7]),
    st.text(max_size=6),
    st.sampled_from([[], {}, [[]], [1] * 50, {"class": "UNet"}, {"a": 1}, "64", "ddpm", "é" * 300, "../x", "\x00"]),
    st.floats(allow_nan=True, allow_infinity=True),
)


@pytest.fixture(scope="module", autouse=True)
def clean():
    yield
    shutil.rmtree(WORK, ignore_errors=True)


def fresh(name: str, source: Path) -> Path:
    """A new copy of a folder."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    return folder


def saved_model() -> Path:
    folder = WORK / "model"
    SMALL.save_pretrained(folder)
    return folder


MODEL = saved_model()
CONFIGS = sorted(path.relative_to(MODEL) for path in MODEL.rglob("config.json"))
WEIGHTS = sorted(path.relative_to(MODEL) for path in MODEL.rglob("*.safetensors"))
CONFIG_PATHS = [(file, path) for file in CONFIGS for path in paths(json.loads((MODEL / file).read_text()))]


def draws_well(model: Any) -> None:
    """What could be loaded is finite, and draws or says why not."""
    assert all(bool(v.isfinite().all()) for v in model.state_dict().values() if v.is_floating_point())
    if model.conditioner is None or model.size > 64:
        return
    got = ends_well(model.sample, ["a red ball"], steps=1)
    assert isinstance(got, Refused) or is_right(got, 1, model.size)


@given(where=st.sampled_from(CONFIG_PATHS), value=json_values)
def test_a_changed_config(where, value):
    folder, (file, path) = fresh("changed", MODEL), where
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(changed(config, list(path), value)))
    model = ends_well(LatentDiffusion.from_pretrained, folder)
    if not isinstance(model, Refused):
        draws_well(model)


def damage(data: bytes, seed: int) -> bytes:
    """Bytes with some of them changed, left out or repeated."""
    rng, data = random.Random(seed), bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if not data:
            break
        i = rng.randrange(min(len(data), rng.choice([64, 2000, 10**9])))
        kind = rng.randrange(5)
        if kind == 0:
            data[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[i] = rng.choice(b'\x00\xff"{}[]:,0919-e.\n')
        elif kind == 2:
            del data[i : i + rng.choice([1, 4, 100, 10**6])]
        elif kind == 3:
            data[i:i] = data[i : i + rng.choice([1, 8, 100])]
        else:
            data = data[:i]
    return bytes(data)


@given(file=st.sampled_from([*CONFIGS, *WEIGHTS]), seed=st.integers(0, 10**6))
def test_damaged_bytes_of_a_model(file, seed):
    folder = fresh("damaged", MODEL)
    before = (folder / file).read_bytes()
    (folder / file).write_bytes(damage(before, seed))
    model = ends_well(LatentDiffusion.from_pretrained, folder)
    if not isinstance(model, Refused):
        draws_well(model)
        if file in WEIGHTS:  # the checksum in the header has seen every change of a number
            for (name, a), b in zip(SMALL.state_dict().items(), model.state_dict().values()):
                assert torch.equal(a, b), name


@given(file=st.sampled_from(WEIGHTS), seed=st.integers(0, 10**6), half=st.booleans())
def test_weights_of_other_kinds(file, seed, half):
    folder, rng = fresh("kinds", MODEL), random.Random(seed)
    tensors = load_file(folder / file)
    name = rng.choice(sorted(tensors))
    kinds = {
        "nan": lambda v: v * float("nan"),
        "int": lambda v: v.to(torch.int8),
        "bool": lambda v: v > 0,
        "complex": lambda v: v.to(torch.complex64),
        "double": lambda v: v.double(),
        "half": lambda v: v.half(),
        "flat": lambda v: v.flatten(),
        "more": lambda v: torch.cat([v, v]),
        "one": lambda v: v.sum(),
    }
    kind = rng.choice(sorted(kinds))
    tensors[name] = kinds[kind](tensors[name]).contiguous()
    if rng.random() < 0.2:
        del tensors[name]
        kind = "gone"
    save_file(tensors, folder / file)
    model = ends_well(LatentDiffusion.from_pretrained, folder)
    if not isinstance(model, Refused):
        assert kind in ("double", "half") or (kind == "flat" and load_file(MODEL / file)[name].ndim == 1)
        draws_well(model)


NAMES = st.one_of(
    st.text(max_size=20), anything, st.sampled_from(["~nobody", "a/b", "a" * 5000, "/", ".", "..", "/dev/null"])
)


@given(name=NAMES)
def test_names_of_checkpoints(name):
    if isinstance(name, str) and name.count("/") == 1:
        os.environ["HF_HUB_OFFLINE"] = "1"
    for load in (LatentDiffusion.from_pretrained, load_first_stage):
        assert isinstance(ends_well(load, name), Refused)


# --- Published first stages ---


@given(seed=st.integers(0, 10**6), which=st.sampled_from(["config", "weights"]), value=json_values)
def test_diffusers_folders(seed, which, value):
    source = WORK / "diffusers"
    if not source.exists():
        save_diffusers(SMALL.first_stage, source)
    folder = fresh("diffusers-changed", source)
    if which == "weights":
        file = next(folder.rglob("*.safetensors"))
        file.write_bytes(damage(file.read_bytes(), seed))
    else:
        config = json.loads((folder / "config.json").read_text())
        path = random.Random(seed).choice(paths(config))
        (folder / "config.json").write_text(json.dumps(changed(config, list(path), value)))
    stage = ends_well(load_published, folder)
    if not isinstance(stage, Refused):
        with torch.no_grad():
            back = stage.reconstruct(torch.zeros(1, 3, 16, 16))
        assert back.shape == (1, 3, 16, 16)


@given(seed=st.integers(0, 10**6))
def test_pickles(seed):
    file = WORK / "first_stage.ckpt"
    torch.save({"state_dict": SMALL.first_stage.state_dict()}, file)
    file.write_bytes(damage(file.read_bytes(), seed))
    stage = ends_well(load_published, file, scale_factor=0.7, groups=4)
    assert isinstance(stage, Refused) or stage.latent_channels == 3


# --- JSON, text and tensors ---


@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace"))))
def test_any_bytes_as_a_file(data):
    file = WORK / "any"
    file.write_bytes(data)
    for load in (load_json, load_tensors, load_notes):
        ends_well(load, file)


@given(values=st.dictionaries(st.text(max_size=5), st.one_of(json_values, anything), max_size=3))
def test_json_comes_back(values):
    file = WORK / "values.json"
    file.unlink(missing_ok=True)
    got = ends_well(save_json, values, file)
    if isinstance(got, Refused):
        assert not file.exists()
    else:
        assert ends_well(load_json, file) == json.loads(json.dumps(values))


@given(
    lines=st.lists(
        st.one_of(
            st.text(max_size=30),
            st.sampled_from(
                [
                    "[ldm_edu]",
                    "[ci]",
                    "seed = 3",
                    "seed = 99999999999999",
                    "device = cuda:9",
                    "data_dir = ~nobody",
                    "max_steps = 0",
                    "profile = ci",
                ]
            ),
        ),
        max_size=6,
    ),
    bom=st.booleans(),
)
def test_settings(lines, bom):
    folder = WORK / "settings"
    folder.mkdir(exist_ok=True)
    text = ("\ufeff" * bom) + "\n".join(lines)
    (folder / "settings.ini").write_bytes(text.encode("utf-8", "surrogatepass"))
    got = ends_well(load_settings, folder, {})
    assert isinstance(got, Refused) or got.profile in ("ci", "laptop", "gpu")


RECIPE = json.loads(json.dumps(recipe_to_dict(RECIPES["toy-text2image"])))


@given(path=st.sampled_from(paths(RECIPE)), value=json_values)
def test_recipes(path, value):
    got = ends_well(recipe_from_dict, changed(RECIPE, list(path), value))
    if not isinstance(got, Refused):
        ends_well(recipe_to_dict, got)


@given(value=anything)
def test_what_is_no_recipe(value):
    assert isinstance(ends_well(recipe_from_dict, value), Refused)


# --- Pictures and data sets ---


def picture(kind: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A picture of noise in one of several modes."""
    rng = np.random.default_rng(kind)
    modes = ["RGB", "L", "RGBA", "CMYK", "P", "1", "I;16", "YCbCr", "LA"]
    mode = modes[kind % len(modes)]
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, size[::-1]).astype(np.uint16))
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


@given(
    kind=st.integers(0, 8),
    form=st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"]),
    seed=st.integers(0, 10**6),
    name=st.sampled_from(["a.jpg", "a.png"]),
)
def test_pictures(kind, form, seed, name):
    file = WORK / name
    try:
        picture(kind).save(file, form)
    except (OSError, ValueError):  # a form that has no such mode
        return
    whole = ends_well(read_image, file)
    assert isinstance(whole, Refused) or (whole.mode == "RGB" and whole.size == (24, 20))
    file.write_bytes(damage(file.read_bytes(), seed))
    ends_well(read_image, file)


def coco_source() -> Path:
    """Four pictures of noise with all kinds of annotations."""
    root = WORK / "coco"
    (root / "val2017").mkdir(parents=True)
    (root / "annotations" / "panoptic_val2017").mkdir(parents=True)
    images, captions, things, segments = [], [], [], []
    for i in range(1, 5):
        name = f"{i:012d}"
        picture(0).save(root / "val2017" / f"{name}.jpg", "JPEG")
        Image.new("RGB", (24, 20), (7, 0, 0)).save(root / "annotations" / "panoptic_val2017" / f"{name}.png")
        images.append({"id": i, "file_name": f"{name}.jpg", "width": 24, "height": 20})
        captions.append({"id": i, "image_id": i, "caption": "a red ball"})
        outline = [[2, 2, 12, 2, 12, 12]] if i % 2 else {"counts": [100, 20, 360], "size": [20, 24]}
        things.append(
            {"id": i, "image_id": i, "category_id": 5, "bbox": [2, 2, 10, 10], "segmentation": outline, "iscrowd": 0}
        )
        about = [{"id": 7, "category_id": 5}]
        segments.append({"image_id": i, "file_name": f"{name}.png", "segments_info": about})
    categories = [{"id": 5, "name": "ball"}]
    for kind, notes in (("captions", captions), ("instances", things), ("panoptic", segments)):
        text = json.dumps({"images": images, "annotations": notes, "categories": categories})
        (root / "annotations" / f"{kind}_val2017.json").write_text(text)
    return root


COCO_ROOT = coco_source()
KEYS = {"captions": "captions", "instances": "instances", "panoptic": "segmentation"}
NOTES = {kind: json.loads((COCO_ROOT / "annotations" / f"{kind}_val2017.json").read_text()) for kind in KEYS}
NOTE_PATHS = [(kind, path) for kind, notes in NOTES.items() for path in paths(notes)]


def look_through(dataset: Any) -> None:
    """Every sample is right or refused, and iteration does not end before the end."""
    count = 0
    for i in range(len(dataset)):
        sample = ends_well(lambda i=i: dataset[i])
        count += 1
        if not isinstance(sample, Refused):
            assert set(sample) == set(dataset.keys)
            image = sample.get("image")
            assert image is None or (image.shape == (3, 16, 16) and image.abs().max() <= 1)
    assert count == len(dataset)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@given(where=st.sampled_from(NOTE_PATHS), value=json_values)
def test_coco_with_a_changed_annotation(where, value):
    root, (kind, path) = fresh("coco-changed", COCO_ROOT), where
    text = json.dumps(changed(NOTES[kind], list(path), value))
    (root / "annotations" / f"{kind}_val2017.json").write_text(text)
    dataset = ends_well(COCO, root, None, 16, ("image", KEYS[kind]))
    if not isinstance(dataset, Refused):
        look_through(dataset)


corners = st.one_of(
    st.floats(-1e3, 1e3), st.sampled_from([0, 1e5, -1e8, 1e10, 1e18, 1e300, float("nan"), float("inf"), 2**63])
)
outlines = st.one_of(
    st.lists(st.lists(corners, max_size=9), max_size=3),
    st.fixed_dictionaries(
        {
            "counts": st.one_of(st.lists(st.integers(-5, 700), max_size=5), st.text(max_size=8), anything),
            "size": st.sampled_from([[20, 24], [24, 20], [20], "x", [1e9, 1e9]]),
        }
    ),
    anything,
)


@given(outline=outlines, width=st.sampled_from([24, 0, -1, 1, 10**5, 10**9]), height=st.sampled_from([20, 0, 1]))
def test_outlines(outline, width, height):
    try:
        mask = decode_outline(outline, width, height)
    except (ValueError, TypeError, KeyError):  # the data set names the file and the record
        return
    assert mask.shape == (height, width) and mask.dtype == bool


def celeba_source() -> Path:
    root = WORK / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, 7)]
    for name in names:
        picture(0, (178, 218)).save(root / "img_align_celeba" / name, "JPEG")
    rows = "".join(f"{name} 1 -1 1\n" for name in names)
    (root / "list_attr_celeba.txt").write_text(f"{len(names)}\nSmiling Young Male\n{rows}")
    (root / "list_eval_partition.txt").write_text("".join(f"{name} {i % 3}\n" for i, name in enumerate(names)))
    return root


CELEBA_ROOT = celeba_source()


@given(
    file=st.sampled_from(["list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba/000001.jpg"]),
    seed=st.integers(0, 10**6),
)
def test_damaged_celeba(file, seed):
    root = fresh("celeba-damaged", CELEBA_ROOT)
    (root / file).write_bytes(damage((root / file).read_bytes(), seed))
    dataset = ends_well(CelebA, root, "train", 16)
    if not isinstance(dataset, Refused):
        look_through(dataset)


@given(
    size=anything,
    split=st.one_of(st.sampled_from(["train", "test", None]), anything),
    keys=st.one_of(st.just(("image",)), anything),
    which=st.integers(0, 2),
)
def test_how_a_data_set_is_asked_for(size, split, keys, which):
    calls = [
        lambda: ImageFolder(COCO_ROOT / "val2017", size, split, keys),
        lambda: COCO(COCO_ROOT, split, size, keys),
        lambda: CelebA(CELEBA_ROOT, split, size, keys),
    ]
    try:
        dataset = ends_well(calls[which])
    except TypeError:  # Python's own answer to what is no list
        return
    if not isinstance(dataset, Refused):
        ends_well(lambda: dataset[0])


@given(seed=st.integers(0, 10**6), file=st.sampled_from(["cache.json", "block-000000.safetensors"]))
def test_damaged_caches(seed, file):
    source = WORK / "cache"
    if not source.exists():
        cached(ImageFolder(COCO_ROOT / "val2017", 16), source, block=2)
    folder = fresh("cache-damaged", source)
    whole = SampleCache(source).images(range(4))
    (folder / file).write_bytes(damage((folder / file).read_bytes(), seed))
    cache = ends_well(SampleCache, folder)
    if not isinstance(cache, Refused):
        images = ends_well(lambda: cache.images(range(len(cache))))
        assert isinstance(images, Refused) or torch.equal(images, whole[: len(cache)])


@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.sampled_from(
            [
                torch.zeros(2),
                torch.ones(1, 3, dtype=torch.int64),
                torch.empty(0),
                torch.tensor(2.0),
                torch.ones(3, 4).T,
                torch.zeros(2, dtype=torch.bfloat16),
            ]
        ),
        max_size=3,
    ),
    half=st.booleans(),
)
def test_tensors_come_back(tensors, half):
    file = WORK / "tensors.safetensors"
    got = ends_well(save_tensors, tensors, file, half)
    if not isinstance(got, Refused):
        back = load_tensors(file)
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name].to(t.dtype), t) for name, t in tensors.items())
