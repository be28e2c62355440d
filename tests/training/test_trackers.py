"""Trackers of accelerate get what log.jsonl gets; without any, none is begun."""

import json

import pytest
from small_runs import tiny, train_tiny

from ldm_edu.errors import LDMError
from ldm_edu.training.run import RunOptions


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_tensorboard_gets_the_log_and_the_recipe(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    train_tiny(folder, tiny(4), every=2, sample_every=0, trackers=["tensorboard"])
    found = {}
    for path in (folder / "ldm_edu").rglob("events.*"):
        events = accumulator.EventAccumulator(str(path))
        events.Reload()
        found |= {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for stage in ("first_stage", "diffusion"):
        expected = [(line["step"], line["loss"]) for line in lines(folder) if line["stage"] == stage]
        assert [step for step, _ in expected] == [2, 4]
        before = {"first_stage": 0, "diffusion": 4}[stage]  # a tracker's steps never fall: some drop what comes late
        assert found[f"{stage}/loss"] == [(before + step, pytest.approx(loss, rel=1e-5)) for step, loss in expected]
        assert [value for _, value in found[f"{stage}/step"]] == [2, 4]
        assert {f"{stage}/held_out", f"{stage}/images_per_second"} <= set(found)
    (recipe,) = (folder / "ldm_edu").rglob("hparams.yml")
    assert "first_stage.training.lr: 0.003" in recipe.read_text()


def test_without_trackers_nothing_is_written_for_them(tmp_path):
    train_tiny(tmp_path / "run", tiny(1), sample_every=0)
    assert not (tmp_path / "run" / "ldm_edu").exists()


def test_a_tracker_that_is_not_there_is_refused():
    with pytest.raises(LDMError, match="tracker 'tensorbord' is unknown or not installed"):
        RunOptions(trackers=["tensorbord"])
    with pytest.raises(LDMError, match=r"trackers are a list of names: \['wandb'\]"):
        RunOptions(trackers="wandb")
