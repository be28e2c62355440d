"""Text to image on captions that people wrote: words are counted in the training data and saved with the model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import HOW

from ldm_edu import COCO, LatentDiffusion, LDMError, RunOptions, find_recipe, train
from ldm_edu.conditioning import frequent_words
from ldm_edu.files import load_json
from ldm_edu.training import Recipe

CAPTIONS = (
    "A man riding a wave on a surfboard.",
    "Two dogs, one of them wet, run along the beach!",
    "the man's red kite over a beach",
    "A very long caption that goes on and on with many more words than anyone would need to say so little about it",
)


def small_coco(folder: Path, n: int = 40) -> Path:
    """Official folders with pictures of noise and two captions each."""
    (folder / "coco" / "val2017").mkdir(parents=True)
    (folder / "coco" / "annotations").mkdir()
    rng, images, annotations = np.random.default_rng(0), [], []
    for i in range(n):
        name = f"{i:012d}.jpg"
        pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "coco" / "val2017" / name)
        images.append({"id": i, "file_name": name, "width": 50, "height": 40})
        for k in range(2):
            caption = CAPTIONS[(i + k) % len(CAPTIONS)]
            annotations.append({"id": 2 * i + k, "image_id": i, "caption": caption})
    text = json.dumps({"images": images, "annotations": annotations})
    (folder / "coco" / "annotations" / "captions_val2017.json").write_text(text)
    return folder


def small(words: int = 12) -> Recipe:
    """`coco64` with little of everything, two steps and this many words."""
    recipe = find_recipe("coco64").shortened(2)
    first, second = recipe.first_stage, recipe.diffusion
    (text,) = second.conditioners
    text = replace(text, arguments={**text.arguments, "vocabulary": words, "dim": 32, "depth": 1, "heads": 4})
    return replace(
        recipe,
        size=32,
        first_stage=replace(first, channels=8, groups=4, training=replace(first.training, batch_size=4)),
        diffusion=replace(
            second,
            channels=32,
            multipliers=(1,),
            blocks=1,
            attention_factors=(1,),
            conditioners=(text,),
            training=replace(second.training, batch_size=4, warmup=1),
        ),
    )


def check_run(data_dir: Path, folder: Path, words: int) -> LatentDiffusion:
    """Train, and see that the words are those of the training split, in the run, on disk and in a loaded model."""
    train(small(words), folder, RunOptions(**HOW | {"data_dir": data_dir}))
    model = LatentDiffusion.from_pretrained(folder / "model")
    texts = [text for several in COCO(data_dir, "train", keys=("captions",)).captions for text in several]
    expected = frequent_words(texts, words)
    config = load_json(folder / "model" / "conditioner" / "config.json")
    assert tuple(config["vocabulary"]) == expected and config["strict"] is False and len(expected) <= words
    assert model.conditioner.tokenizer.words == ["", *expected, "<unk>"]
    held_out = COCO(data_dir, "validation", keys=("captions",)).captions
    ids = model.conditioner.tokenizer([several[0] for several in held_out])
    assert ids.shape == (len(held_out), 24) and ids.max() <= len(expected) + 1
    images = model.sample([f"a {expected[-1]}", "an aardvark plays the bassoon"], steps=2)
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()
    return model


def test_captions_of_a_small_coco(tmp_path):
    model = check_run(small_coco(tmp_path / "data"), tmp_path / "run", words=12)
    assert model.conditioner.tokenizer.words[1] == "a" and len(model.conditioner.tokenizer) == 14
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines) and len(lines) == 2


def test_captions_of_coco(real_data, tmp_path):
    model = check_run(real_data, tmp_path / "run", words=300)
    assert {"a", "man", "on", "the"} <= set(model.conditioner.tokenizer.words)


def test_a_resumed_run_has_the_same_words(tmp_path):
    data = small_coco(tmp_path / "data")
    options = RunOptions(**HOW | {"data_dir": data})
    a = train(small(), tmp_path / "run", options)
    b = train(small(), tmp_path / "run", replace(options, resume=True))
    assert a.conditioner.config == b.conditioner.config
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_toy_words_do_not_read_coco(tmp_path):
    """A strict tokenizer says which words it lacks, before anything is written."""
    recipe = replace(find_recipe("toy-text2image"), dataset="coco", size=64, text=None)
    with pytest.raises(LDMError, match="not in the vocabulary: .*man"):
        train(recipe, tmp_path / "run", RunOptions(data_dir=small_coco(tmp_path / "data")))
    assert not (tmp_path / "run").exists()
