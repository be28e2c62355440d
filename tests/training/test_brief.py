"""A recipe within a small budget, as pages train it."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from ldm_edu import LatentDiffusion, LDMError, RunOptions, find_recipe
from ldm_edu.training.dispatch import _in_brief, train_briefly
from ldm_edu.training.run import stage_trainings

RECIPE = replace(find_recipe("toy-class"), seed=3)


def test_a_brief_training_gives_a_model_and_its_log_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, log = train_briefly(RECIPE, 24, 8, RunOptions(device="cpu", cache_dir=tmp_path / "cache"))
    assert isinstance(model, LatentDiffusion) and model.device.type == "cpu"
    assert [line["step"] for line in log] == list(range(2, 25, 2)) and {line["stage"] for line in log} == {"diffusion"}
    assert all({"loss", "held_out"} <= line.keys() for line in log)
    made = model.provenance["recipe"]["diffusion"]["training"]
    assert (made["steps"], made["images"], made["held_out"], made["warmup"]) == (24, 8, 1, 30)
    assert not list(Path(tmp_path).glob("tmp*"))


def test_it_never_trains_longer_or_on_more_images_than_the_recipe(tmp_path):
    training = replace(RECIPE.diffusion.training, steps=1, images=4, warmup=5, held_out=4)
    small = replace(RECIPE, diffusion=replace(RECIPE.diffusion, training=training))
    model, log = train_briefly(small, 10, 100, RunOptions(device="cpu", cache_dir=tmp_path))
    made = model.provenance["recipe"]["diffusion"]["training"]
    assert (made["steps"], made["images"], made["warmup"]) == (1, 4, 5) and len(log) == 1


def test_the_first_stage_and_the_text_have_no_more_images_either():
    recipe = find_recipe("toy-demo")
    assert recipe.text is not None and recipe.first_stage.training is not None
    brief = _in_brief(recipe, 100)
    for before, after in zip(stage_trainings(recipe), stage_trainings(brief), strict=True):
        assert before.images == 4000 and (after.images, after.held_out) == (100, 10)
    assert _in_brief(recipe, 10**6) == recipe


@pytest.mark.parametrize("counts", [(0, 8), (2, 0)])
def test_a_training_of_nothing_is_refused(counts):
    with pytest.raises(LDMError, match="steps|images"):
        train_briefly(RECIPE, *counts)
