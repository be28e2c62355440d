"""Models that are kept on the way: what they hold, when they are written, and that a run does not notice them."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from small_runs import HOW, differences, tiny, tiny_autoencoder, train_tiny, weights
from torch import nn

import ldm_edu.files as files
import ldm_edu.training.resume as resume
from ldm_edu.conditioning.text import TextConditioner
from ldm_edu.errors import LDMError
from ldm_edu.files import load_tensors
from ldm_edu.first_stage.quantization import load_first_stage
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.training.recipes import AnyRecipe, AutoencoderRecipe, Recipe, recipe_from_dict
from ldm_edu.training.run import RunOptions, open_run

STAGES = ("first_stage", "text", "diffusion")


def with_text(**training: Any) -> Recipe:
    """`tiny` with a warm start of its text conditioner: all three stages, of six steps each."""
    recipe = tiny(**training)
    return replace(recipe, text=recipe.diffusion.training)


def kl(steps: int = 6) -> AutoencoderRecipe:
    """A first stage whose scale factor is estimated from draws when it is finished; a constant learning rate."""
    recipe = tiny_autoencoder(steps, decay=False)
    return replace(recipe, first_stage=replace(recipe.first_stage, regulariser="kl", adversarial=None))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Images that all runs share, no pictures, and a checkpoint at the end only: they take longer than the training."""
    how = {"cache_dir": tmp_path_factory.mktemp("cache"), "sample_every": 0, "save_every": 1000.0}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in how.items():
            patch.setitem(HOW, name, value)
        yield


def snapshots(folder: Path) -> list[str]:
    """The names of the models in a run's folder that were kept on the way."""
    return sorted(path.name for path in (folder / "snapshots").iterdir())


def tensors(model: Path) -> dict[str, torch.Tensor]:
    """All weights of a saved model."""
    found = {path.relative_to(model): load_tensors(path) for path in model.rglob("*.safetensors")}
    assert found
    return {f"{path}: {name}": value for path, values in found.items() for name, value in values.items()}


def configs(model: Path) -> dict[str, Any]:
    """What a saved model says of itself, but how it was made."""
    found = {str(path.relative_to(model)): json.loads(path.read_text()) for path in model.rglob("config.json")}
    return {path: {k: v for k, v in values.items() if k != "provenance"} for path, values in found.items()}


def assert_same_model(one: Path, other: Path) -> None:
    """Two folders hold the same weights, to the bit, and the same settings."""
    assert not differences(tensors(one), tensors(other)) and configs(one) == configs(other)


def log(folder: Path) -> list[dict[str, Any]]:
    """The log's lines without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "waiting")} for line in lines]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a run without snapshots."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train_tiny(folder, with_text(), sample_every=6)
    return folder


@pytest.fixture(scope="module")
def snapped(tmp_path_factory):
    """The folder of the same run with a snapshot at every second step."""
    folder = tmp_path_factory.mktemp("snapped") / "run"
    train_tiny(folder, with_text(), sample_every=6, snapshot_every=2)
    return folder


# What is kept, and when ----------------------------------------------------------------------------------------------


def test_a_model_is_kept_at_every_nth_step_of_each_stage(plain, snapped):
    assert snapshots(snapped) == sorted(f"{stage}-{step:06d}" for stage in STAGES for step in (2, 4, 6))
    assert not (plain / "snapshots").exists() and RunOptions().snapshot_every is None


def test_the_last_step_is_kept_only_where_its_turn_comes(tmp_path):
    train_tiny(tmp_path / "run", kl(), snapshot_every=4)
    train_tiny(tmp_path / "longer", kl(), snapshot_every=7)
    assert snapshots(tmp_path / "run") == ["first_stage-000004"] and not (tmp_path / "longer" / "snapshots").exists()


def test_the_snapshot_of_the_last_step_is_the_model_of_the_run(snapped):
    assert_same_model(snapped / "snapshots" / "diffusion-000006", snapped / "model")
    assert_same_model(snapped / "snapshots" / "first_stage-000006", snapped / "model" / "first_stage")
    early = tensors(snapped / "snapshots" / "diffusion-000002")
    changed = differences(early, tensors(snapped / "model"))
    assert {name.split("/")[0] for name in changed} == {"unet", "conditioner"}, "the first stage was finished before"


def test_a_snapshot_is_what_a_shorter_run_would_have_ended_with(tmp_path):
    """With a constant learning rate, the plan of a shorter run is the beginning of that of a longer one."""
    train_tiny(tmp_path / "first stage", kl(4))
    train_tiny(tmp_path / "longer first stage", kl(), snapshot_every=4)
    kept = tmp_path / "longer first stage" / "snapshots" / "first_stage-000004"
    assert_same_model(kept, tmp_path / "first stage" / "model")

    recipe = tiny(decay=False)
    training = replace(recipe.diffusion.training, steps=4)
    train_tiny(tmp_path / "run", replace(recipe, diffusion=replace(recipe.diffusion, training=training)))
    train_tiny(tmp_path / "longer", recipe, snapshot_every=4)
    assert_same_model(tmp_path / "longer" / "snapshots" / "diffusion-000004", tmp_path / "run" / "model")


def test_snapshots_are_loaded_like_the_model_of_a_run(snapped):
    folder = snapped / "snapshots"
    last, done = (LatentDiffusion.from_pretrained(path) for path in (folder / "diffusion-000006", snapped / "model"))
    early = LatentDiffusion.from_pretrained(folder / "diffusion-000002")
    drawn, same, other = (model.sample("a big red ball", steps=2, seed=1) for model in (done, last, early))
    assert torch.equal(drawn, same) and not torch.equal(drawn, other)
    stages = [load_first_stage(folder / f"first_stage-{step:06d}") for step in (2, 4, 6)]
    scales = [stage.scale_factor for stage in stages]
    assert len(set(scales)) == 3 and 1.0 not in scales and scales[-1] == done.first_stage.scale_factor
    assert load_first_stage(folder / "diffusion-000002").scale_factor == scales[-1]
    assert isinstance(TextConditioner.from_pretrained(folder / "text-000004"), TextConditioner)


@pytest.mark.parametrize("name, steps", [("diffusion-000004", 4), ("diffusion-000006", 6), ("first_stage-000002", 2)])
def test_a_snapshot_says_from_which_recipe_and_step_it_is(name, steps, snapped):
    made = json.loads((snapped / "snapshots" / name / "config.json").read_text())["provenance"]
    assert recipe_from_dict(made["recipe"]) == with_text() and made["torch"] == torch.__version__
    how = made[name.split("-")[0]]
    assert how["steps"] == steps and how["precision"] == "fp32" and how["device"] == "cpu (1 thread)"
    assert isinstance(how["seconds"], int)


# The run does not notice ---------------------------------------------------------------------------------------------


def test_a_run_with_snapshots_ends_with_the_same_bits(plain, snapped):
    assert not differences(weights(plain), weights(snapped)) and log(plain) == log(snapped)
    for picture in (plain / "samples").iterdir():
        assert (snapped / "samples" / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    "recipe, precision",
    [(kl(), "fp32"), (kl(), "bf16"), (kl(), "fp64"), (tiny_autoencoder(), "fp32")],
    ids=["kl", "kl in bf16", "kl in fp64", "vq with a discriminator"],
)
def test_a_first_stage_with_snapshots_ends_with_the_same_bits(recipe, precision, tmp_path):
    """In each number format: the run goes on in its own, and what is kept is in float32."""
    train_tiny(tmp_path / "plain", recipe, precision=precision)
    train_tiny(tmp_path / "run", recipe, precision=precision, snapshot_every=1)
    assert not differences(weights(tmp_path / "plain"), weights(tmp_path / "run"))
    assert log(tmp_path / "plain") == log(tmp_path / "run")
    assert_same_model(tmp_path / "run" / "snapshots" / "first_stage-000006", tmp_path / "run" / "model")
    wanted = torch.float64 if precision == "fp64" else torch.float32
    kept = load_tensors(tmp_path / "run" / "first_stage.safetensors")
    assert {v.dtype for k, v in kept.items() if k.startswith(("task.", "ema.")) and v.is_floating_point()} == {wanted}
    halfway = tensors(tmp_path / "run" / "snapshots" / "first_stage-000003")
    assert {v.dtype for v in halfway.values() if v.is_floating_point()} == {torch.float32}


def test_a_whole_run_in_float64_stays_in_it(tmp_path):
    """Also its first stage, which each snapshot of the diffusion stage holds."""
    train_tiny(tmp_path / "plain", tiny(3), precision="fp64", sample_every=3)
    train_tiny(tmp_path / "run", tiny(3), precision="fp64", sample_every=3, snapshot_every=1)
    for picture in ("first_stage-000003.png", "diffusion-000003.png"):
        drawn = [(tmp_path / run / "samples" / picture).read_bytes() for run in ("plain", "run")]
        assert drawn[0] == drawn[1]
    assert not differences(weights(tmp_path / "plain"), weights(tmp_path / "run"))
    assert log(tmp_path / "plain") == log(tmp_path / "run")
    assert_same_model(tmp_path / "run" / "snapshots" / "diffusion-000003", tmp_path / "run" / "model")


def test_the_average_of_the_step_is_kept_where_the_model_is_the_best_one(tmp_path, monkeypatch):
    """The loss on held-out data is made to rise, so that the first logged step stays the best."""
    losses = iter(range(1, 100))
    monkeypatch.setattr(resume, "validate", lambda *_: {"held_out": float(next(losses))})
    recipe = kl()
    assert recipe.first_stage.training is not None
    best = replace(recipe.first_stage.training, keep="best")
    recipe = replace(recipe, first_stage=replace(recipe.first_stage, training=best))
    train_tiny(tmp_path / "run", recipe, snapshot_every=3)
    third, last = (tmp_path / "run" / "snapshots" / f"first_stage-{step:06d}" for step in (3, 6))
    assert_same_model(third, tmp_path / "run" / "model")
    assert differences(tensors(last), tensors(third))


# Interruptions -------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """In place of a process that ends."""


def stop_in(name: str, stage: str, step: int, folder: Path, recipe: AnyRecipe) -> None:
    """Train, and end in place of this function of the training, at a step of a stage."""
    whole = getattr(resume, name)

    def stop(run, trained, state, *more):
        if (trained.name, state.step) == (stage, step):
            raise Stopped
        return whole(run, trained, state, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, name, stop)
        with pytest.raises(Stopped):
            train_tiny(folder, recipe, snapshot_every=2, save_every=0.0)


@pytest.mark.parametrize(
    "name, stage, step",
    [("save_snapshot", "first_stage", 4), ("save_state", "first_stage", 4), ("save_state", "diffusion", 5)],
    ids=["before the snapshot", "behind it, before its checkpoint", "between two"],
)
def test_a_resumed_run_writes_the_same_snapshots(name, stage, step, snapped, tmp_path):
    recipe, straight = (with_text(), snapped) if stage == "diffusion" else (kl(), tmp_path / "straight")
    if straight != snapped:
        train_tiny(straight, recipe, snapshot_every=2)
    stop_in(name, stage, step, tmp_path / "run", recipe)
    train_tiny(tmp_path / "run", recipe, snapshot_every=2)
    assert not differences(weights(tmp_path / "run"), weights(straight))
    for kept in snapshots(straight):
        assert_same_model(tmp_path / "run" / "snapshots" / kept, straight / "snapshots" / kept)
    runs = straight, tmp_path / "run"
    written = [sorted(path.relative_to(run) for path in run.glob("snapshots/**/*")) for run in runs]
    assert written[0] == written[1], "no file more, and none that is half written"


def test_snapshots_that_are_whole_stay_where_one_cannot_be_written(tmp_path, monkeypatch):
    """A full disk ends the run with one clear error; it goes on where there is room again."""
    save, recipe, full = files.save_file, tiny_autoencoder(), True

    def save_or_refuse(values, path, metadata=None):
        if full and "first_stage-000004" in str(path):
            raise OSError(28, "No space left on device")
        save(values, path, metadata=metadata)

    monkeypatch.setattr(files, "save_file", save_or_refuse)
    with pytest.raises(LDMError, match=r"first_stage-000004.*cannot be written: the disk is full"):
        train_tiny(tmp_path / "run", recipe, snapshot_every=2, save_every=0.0)
    before = tensors(tmp_path / "run" / "snapshots" / "first_stage-000002")
    full = False
    train_tiny(tmp_path / "run", recipe, snapshot_every=2)
    train_tiny(tmp_path / "plain", recipe)
    assert snapshots(tmp_path / "run") == [f"first_stage-{step:06d}" for step in (2, 4, 6)]
    assert not differences(before, tensors(tmp_path / "run" / "snapshots" / "first_stage-000002"))
    assert not differences(weights(tmp_path / "run"), weights(tmp_path / "plain"))


def test_an_extended_stage_has_further_snapshots(tmp_path):
    train_tiny(tmp_path / "run", kl(), snapshot_every=3)
    train_tiny(tmp_path / "run", kl(), snapshot_every=3, extend=9)
    assert snapshots(tmp_path / "run") == [f"first_stage-{step:06d}" for step in (3, 6, 9)]
    assert_same_model(tmp_path / "run" / "snapshots" / "first_stage-000009", tmp_path / "run" / "model")
    made = load_first_stage(tmp_path / "run" / "snapshots" / "first_stage-000009").provenance
    assert made is not None and made["steps"] == 9


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "3"])
def test_what_is_no_number_of_steps_between_snapshots_is_refused(wrong):
    with pytest.raises((LDMError, TypeCheckError), match="snapshot_every"):  # the latter where types are checked
        RunOptions(snapshot_every=wrong)


def no_folder(path: Path) -> None:
    path.write_text("something")


def nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def not_ours(path: Path) -> None:
    """A folder in which nobody can write a file."""
    path.symlink_to("/proc/self")


@pytest.mark.parametrize("put, said", [(no_folder, "is no folder"), (nowhere, "is no folder"), (not_ours, "cannot be")])
def test_a_place_that_takes_no_snapshots_is_found_before_a_run_goes_on(put, said, tmp_path):
    if put is not_ours and not os.path.isdir("/proc/self"):
        pytest.skip("no such folder on this system")
    options = RunOptions(**(HOW | {"resume": True, "snapshot_every": 2}))
    open_run(tiny(), tmp_path, replace(options, resume=False)).close()
    put(tmp_path / "snapshots")
    with pytest.raises(LDMError, match=f"snapshots(/config.json)? {said}"):
        open_run(tiny(), tmp_path, options)


def test_snapshots_alone_are_work_that_is_not_overwritten(tmp_path):
    (tmp_path / "snapshots").mkdir()
    with pytest.raises(LDMError, match=r"already holds a run \(snapshots\): remove these, or take another folder"):
        open_run(tiny(), tmp_path, RunOptions(device="cpu", precision="fp32"))


def test_weights_that_are_not_finite_are_not_kept(tmp_path, monkeypatch):
    """Even where the loss does not tell."""
    whole = resume.save_snapshot

    def spoilt(run, stage, state):
        with torch.no_grad():
            nn.init.constant_(next(state.ema.module.parameters()), float("nan"))
        whole(run, stage, state)

    monkeypatch.setattr(resume, "save_snapshot", spoilt)
    with pytest.raises(LDMError, match="not finite"):
        train_tiny(tmp_path / "run", tiny_autoencoder(), snapshot_every=2)
    assert not list((tmp_path / "run" / "snapshots").rglob("config.json"))
