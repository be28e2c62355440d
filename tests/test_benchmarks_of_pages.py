"""The benchmarks behind 66_compression and 67_efficiency, with small recipes and networks: what they do and write."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm_edu.data.images import read_image
from ldm_edu.measurements import load_measurements
from ldm_edu.training.recipes import find_recipe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts import what lies beside them

import compression  # type: ignore[import-not-found]  # noqa: E402
import efficiency  # type: ignore[import-not-found]  # noqa: E402
import rescaling  # type: ignore[import-not-found]  # noqa: E402

# ---- compression.py


def small(name: str):
    """A recipe of the study on 24 scenes."""
    recipe = find_recipe(name)

    def cut(training):
        return None if training is None else replace(training, images=24, held_out=4, steps=min(training.steps, 2))

    first = replace(recipe.first_stage, training=cut(recipe.first_stage.training))
    diffusion = replace(
        recipe.diffusion, training=replace(recipe.diffusion.training, images=24, held_out=4, batch_size=4)
    )
    return replace(recipe, first_stage=first, diffusion=diffusion, text=cut(recipe.text))


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study of two models with two seeds of the second: its folder and what is in it after a second call."""
    folder = tmp_path_factory.mktemp("study")
    variants = tuple(compression.Variant(*v) for v in (("toy32-f1",), ("toy32-f8",), ("toy32-f8", 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "find_recipe", small)
        patch.setattr(compression, "VARIANTS", variants)
        patch.setattr(compression, "RESULTS", folder / "results.json")
        patch.setattr(compression, "pace", lambda _: 0.5)
        patch.setattr(compression, "PACED", 3)
        patch.setattr(compression, "JUDGED", (2, 8))
        for words in (["train", "--minutes", "0.07"], ["score", "--n", "16", "--sets", "2", "--steps", "2"]):
            patch.setattr(sys, "argv", ["compression.py", *words, "--runs", str(folder / "runs")])
            compression.main()
            there = sorted(path for path in folder.rglob("*") if path.is_file())
            compression.main()  # nothing is done again
            assert sorted(path for path in folder.rglob("*") if path.is_file()) == there
    return folder


def test_all_models_are_kept_after_as_many_steps(studied):
    plan = json.loads((studied / "runs" / "plan.json").read_text())
    assert plan == {"toy32-f1": 8, "toy32-f8": 8}  # 4.2 s of half a second are eight steps
    for run in ("toy32-f1-seed0", "toy32-f8-seed0", "toy32-f8-seed1"):
        kept = [path.name for path in sorted((studied / "runs" / run / "snapshots").glob("diffusion-*"))]
        assert kept == [f"diffusion-{step:06d}" for step in range(1, 9)]


def test_seeds_share_the_first_stage_and_nothing_else(studied):
    one, other = (
        torch.cat([p.flatten() for p in compression.LatentDiffusion.from_pretrained(path).unet.parameters()])
        for path in (studied / "runs" / f"toy32-f8-seed{seed}" / "model" for seed in (0, 1))
    )
    assert not torch.equal(one, other)
    stages = [studied / "runs" / f"toy32-f8-seed{seed}" / "model" / "first_stage" for seed in (0, 1)]
    assert len({(path / "model.safetensors").read_bytes() for path in stages}) == 1


def test_every_kept_model_has_its_numbers(studied):
    found = load_measurements(studied / "results.json")
    for f, values in ((1, 2), (8, 4)):
        judged = found.of("Fréchet excess", f=f)
        assert judged.keys("steps") == [2, 8] and all(m.low < m.value < m.high for m in judged)
        assert judged.keys("minutes") == [round(steps / 120, 2) for steps in (2, 8)]
        single = found.of("Fréchet excess of a set", f=f, steps=8)
        assert len(single) == values
        assert sum(m.value for m in single) / values == pytest.approx(found.one("Fréchet excess", f=f, steps=8).value)
    real = found.one("colour", set="real")
    assert real.value > 90  # scenes of 32², enlarged, can be read
    assert found.one("PSNR", f=8).value > 5 and not found.of("PSNR", f=1)


def test_pictures_show_the_moments_of_each_f(studied):
    for f, rows in ((1, 2), (8, 2)):
        shown = read_image(studied / f"compression_f{f}.png")
        assert shown.size == (32 * compression.SHOWN, 32 * rows)


def test_numbers_of_runs_that_are_elsewhere_stay(studied, monkeypatch):
    found = list(load_measurements(studied / "results.json"))
    monkeypatch.setattr(compression, "RESULTS", studied / "results.json")
    of_f1 = [m for m in found if m.of.get("f") == 1]
    assert of_f1 and compression.numbers_of_others([m for m in found if m.of.get("f") != 1]) == of_f1


def test_moments_are_eighths_of_the_run_and_of_the_slowest_one():
    assert compression.moments(808, 808) == [101, 202, 404, 808]
    found = compression.moments(5454, 808)
    assert found == [101, 202, 404, 707, 808, 1414, 2727, 5454] and all(step % 101 == 0 for step in found)


# ---- efficiency.py


def test_ratios_are_those_of_the_seconds_and_costs_those_of_the_networks(monkeypatch, tmp_path):
    pair = tuple(efficiency.Network("alike", f, (1,), (), channels=32) for f in (1, 4))
    monkeypatch.setattr(efficiency, "ALIKE", pair)
    monkeypatch.setattr(efficiency, "batch_of", lambda _: 1)
    words = ["--smallest", "--only", "alike", "--sizes", "32", "--results", str(tmp_path / "r.json")]
    assert efficiency.main(words) == 0
    found = load_measurements(tmp_path / "r.json")
    assert found.values("positions") == [32**2, 8**2]
    one, four = found.values("FLOPs of a prediction")
    assert 16 < one / four < 256  # 16 positions for one, and 256 pairs of them in the attention of the middle block
    assert found.of("seconds", f=4).keys("step") == ["training step", "prediction", "update", "encoding", "decoding"]
    ratio = found.one("ratio to f = 1", f=4, step="training step")
    seconds = {f: found.one("seconds", f=f, step="training step").value for f in (1, 4)}
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value == pytest.approx(seconds[1] / seconds[4], rel=1.0)  # a median of ratios, not a ratio of medians


def test_the_same_faces_are_compared_alone_and_in_a_mosaic():
    found = efficiency.large([64, 128], steps=2)
    assert [(m.of["size"], m.n) for m in found if m.name == "seconds"] == [(64, 4), (128, 1)]
    assert [m.n for m in found if m.name == "PSNR of a face"] == [4, 4]
    alone, together = (m.value for m in found if m.name == "PSNR of a face")
    assert [m.value for m in found if m.name == "PSNR lost in the mosaic"] == [0, pytest.approx(alone - together)]
    x = torch.arange(4.0)[:, None, None, None].expand(4, 3, 64, 64)
    whole = efficiency.mosaic(x, 2)
    assert whole[0, 0, ::64, ::64].tolist() == [[0, 1], [2, 3]] and torch.equal(efficiency.faces_in(whole), x)


# ---- rescaling.py


def test_a_mosaic_is_taken_apart_again():
    maps = torch.arange(8).reshape(8, 1, 1).expand(8, 64, 64)
    together = rescaling.mosaic(maps, 2)
    assert together.shape == (2, 128, 128) and together[1, 0, [0, 127]].tolist() == [4, 5]
    tiles = rescaling.tiles_of(together[:, None].expand(-1, 3, -1, -1), 2)
    assert torch.equal(tiles[:, 0], maps)


def test_two_models_differ_in_the_scale_factor_alone(tmp_path):
    made = {name: rescaling.recipe(name, tmp_path, 4) for name in rescaling.SCALES}
    one, other = made.values()
    assert replace(one, name=other.name, pretrained=other.pretrained) == other
    factors = [float(rescaling.load_first_stage(recipe.pretrained).scale_factor) for recipe in made.values()]
    assert factors == [pytest.approx(0.3141, abs=1e-4), 1.0]
