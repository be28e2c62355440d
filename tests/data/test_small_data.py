"""A subset of 24 pictures is enough: every page that reads the data set of the settings runs on it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_edu.data.folders import split_by_name
from ldm_edu.data.registry import open_dataset
from ldm_edu.errors import DataError


def names(pattern: str, **shares: int) -> list[str]:
    """The first names of a form that fall into each split, so many of each."""
    found, i = [], 0
    while sum(shares.values()):
        name, i = pattern.format(i), i + 1
        if shares[split := split_by_name(name)]:
            shares[split] -= 1
            found.append(name)
    return found


def photograph(path: Path, seed: int) -> None:
    """Waves of colour and a bright spot, unlike every other one."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:96j, 0:1:80j]
    waves = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
    pixels = 110 + 90 * np.stack(waves, -1) + 50 * (np.hypot(x - rng.random(), y - rng.random()) < 0.2)[..., None]
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def small_coco(root: Path, **shares: int) -> None:
    (root / "coco" / "val2017").mkdir(parents=True)
    (root / "coco" / "annotations").mkdir()
    content: dict[str, list] = {"images": [], "annotations": []}
    for i, name in enumerate(names("{:012}.jpg", **shares)):
        photograph(root / "coco" / "val2017" / name, i)
        content["images"].append({"id": i, "file_name": name})
        content["annotations"] += [{"id": 5 * i + k, "image_id": i, "caption": f"waves {k}"} for k in range(5)]
    (root / "coco" / "annotations" / "captions_val2017.json").write_text(json.dumps(content))


def small_celeba(root: Path, **shares: int) -> None:
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    files = names("{:06}.jpg", **shares)
    for i, name in enumerate(files):
        photograph(folder / name, i)
    rows = [f"{name} 1 -1\n" for name in files]
    (root / "celeba" / "list_attr_celeba.txt").write_text(f"{len(files)}\nSmiling Hat\n" + "".join(rows))


def pages(root: Path) -> dict[Path, str]:
    """The text of every page."""
    found = [path for path in sorted((root / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    return {path: path.read_text(encoding="utf-8") for path in found}


def pages_with_data(root: Path) -> list[Path]:
    """The pages that open the data set of the settings; `make test-real` runs them on real data."""
    return [path for path, text in pages(root).items() if re.search(r"settings\.data_dir", text)]


def test_the_other_pages_open_toy_data_only(root):
    others = {path: text for path, text in pages(root).items() if path not in pages_with_data(root)}
    assert len(others) >= 20
    for path, text in others.items():
        assert not re.search(r"\b(open_dataset\((?!\\\"toy)|CelebA\(|COCO\(|ImageFolder\()", text), path.name


def test_pages_run_on_24_pictures_of_which_one_is_held_out(tmp_path, root):
    small_coco(tmp_path, train=22, validation=1, test=1)
    with_data = pages_with_data(root)
    assert len(with_data) >= 8
    chosen = {"LDM_EDU_DATASET": "coco", "LDM_EDU_DATA_DIR": str(tmp_path), "LDM_EDU_PROFILE": "ci"}
    chosen["OMP_NUM_THREADS"] = "1"  # many small steps: threads would only wait for each other
    command = [sys.executable, "-m", "pytest", *map(str, with_data), "--no-compare", "-q", "-p", "no:cacheprovider"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=root, env=inherited | chosen, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name, make", [("coco", small_coco), ("celeba", small_celeba)])
def test_a_split_without_pictures_says_that_more_are_needed(tmp_path, name, make):
    make(tmp_path, train=23, validation=0, test=1)
    assert len(open_dataset(name, tmp_path, "train")) == 23
    with pytest.raises(DataError, match="split 'validation'.*larger subset has images of every split"):
        open_dataset(name, tmp_path, "validation")
