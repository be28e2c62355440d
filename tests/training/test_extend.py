"""A run that goes on for longer than planned: exactly, whenever it is killed, and with a record of it."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import Child, differences, tiny, tiny_autoencoder, train_tiny, weights
from test_runs import draw_faces, of_faces

import ldm_edu.training.loop as loop
import ldm_edu.training.resume as resume
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import load_notes
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.training.loop import learning_rate
from ldm_edu.training.recipes import FeaturesRecipe, Recipe, Training, find_recipe, recipe_from_dict
from ldm_edu.training.run import RunOptions, stage_plans

PLANNED, LONGER, LONGEST = 4, 7, 9  # steps of the diffusion stage


def short(steps: int = PLANNED, **training) -> Recipe:
    """A first stage of two steps, and a diffusion stage of a few."""
    recipe = tiny(2)
    plan = {"steps": steps, "batch_size": 4, "lr": 3e-3, "warmup": 2, "images": 24, "held_out": 16} | training
    return replace(recipe, diffusion=replace(recipe.diffusion, training=Training(**plan)))


def train_short(folder: Path, recipe: Recipe | None = None, **how):
    return train_tiny(folder, recipe or short(), every=2, **how)


def log(folder: Path) -> list[dict]:
    """The log's lines without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("stage", "step", "held_out")} for line in lines]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stopped_at(folder: Path, stage: str, step: int, **how) -> None:
    """Train, and end as soon as this step of a stage is in a checkpoint."""
    whole = resume.save_state

    def save_and_end(run, trained, state, *best):
        whole(run, trained, state, *best)
        if (trained.name, state.step) == (stage, step):
            raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "save_state", save_and_end)
        with pytest.raises(ZeroDivisionError):
            train_short(folder, **how)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run as it was planned."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_short(folder)
    return folder


@pytest.fixture(scope="module")
def extended(finished, tmp_path_factory):
    """The same run, extended without a disturbance."""
    folder = tmp_path_factory.mktemp("extended") / "run"
    shutil.copytree(finished, folder)
    train_short(folder, extend=LONGER)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A finished run of one's own."""
    return shutil.copytree(finished, tmp_path / "run")


# What an extension is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [short, lambda steps, **how: tiny_autoencoder(steps, start=3, **how)])
def test_at_a_constant_rate_an_extended_run_is_one_that_was_planned_so(recipe, tmp_path):
    """To the last bit: weights, averages, what the optimiser remembers, and the log."""
    plans = [recipe(steps, decay=False) for steps in (PLANNED, LONGER)]
    train_tiny(tmp_path / "straight", plans[1], every=2)
    train_tiny(tmp_path / "extended", plans[0], every=2)
    train_tiny(tmp_path / "extended", plans[0], every=2, extend=LONGER)
    assert not differences(weights(tmp_path / "straight"), weights(tmp_path / "extended"))
    assert log(tmp_path / "extended") == log(tmp_path / "straight")


def test_a_rate_that_decays_follows_the_longer_plan_from_there_on(run, monkeypatch):
    rates, whole = {}, learning_rate

    def noted(training, step):
        rates[step] = whole(training, step)
        return rates[step]

    monkeypatch.setattr(loop, "learning_rate", noted)
    train_short(run, extend=LONGER)
    plan = short().diffusion.training
    assert rates == {step: whole(replace(plan, steps=LONGER), step) for step in range(PLANNED, LONGER)}
    assert whole(plan, PLANNED) == 0 < rates[LONGER - 1] < rates[PLANNED] < plan.lr


def test_the_record_says_what_was_planned_and_what_was_done(extended):
    assert recipe_from_dict(json.loads((extended / "recipe.json").read_text())) == short()
    extensions = [{"stage": "diffusion", "from": PLANNED, "steps": LONGER}]
    assert json.loads((extended / "run.json").read_text()) == {"precision": "fp32", "extensions": extensions}
    made = LatentDiffusion.from_pretrained(extended / "model").provenance
    assert recipe_from_dict(made["recipe"]) == short()
    assert made["diffusion"]["steps"] == LONGER and made["first_stage"]["steps"] == 2
    assert made["diffusion"]["extensions"] == [{"from": PLANNED, "steps": LONGER}]
    assert "extensions" not in made["first_stage"]


def test_the_log_goes_on(finished, extended):
    assert log(extended)[: len(log(finished))] == log(finished)
    assert [line["step"] for line in log(extended) if line["stage"] == "diffusion"] == [2, 4, 6, 7]


def test_the_model_is_replaced_when_the_extension_has_ended(run, extended):
    before = contents(run / "model")
    stopped_at(run, "diffusion", LONGER - 1, extend=LONGER)
    assert contents(run / "model") == before
    train_short(run)
    assert contents(run / "model") != before
    assert not differences(weights(run), weights(extended))


def test_the_same_command_again_changes_nothing(extended, tmp_path):
    """A job that a cluster starts anew, for instance, when the training has ended already."""
    folder = shutil.copytree(extended, tmp_path / "run")
    train_short(folder, extend=LONGER)
    assert not differences(weights(folder), weights(extended)) and log(folder) == log(extended)
    assert (folder / "run.json").read_bytes() == (extended / "run.json").read_bytes()


def test_a_run_can_be_extended_again(extended, tmp_path):
    folder = shutil.copytree(extended, tmp_path / "run")
    model = train_short(folder, extend=LONGEST)
    steps = [{"from": PLANNED, "steps": LONGER}, {"from": LONGER, "steps": LONGEST}]
    assert model.provenance["diffusion"]["extensions"] == steps and model.provenance["diffusion"]["steps"] == LONGEST
    assert load_notes(folder / "diffusion.safetensors")["step"] == str(LONGEST)
    with pytest.raises(LDMError, match=f"more than the {LONGEST} that are done"):
        train_short(folder, extend=LONGER)


def test_an_extension_that_is_too_long_can_be_taken_back(run):
    """The record still says that the steps before were done by the longer plan."""
    stopped_at(run, "diffusion", PLANNED + 1, extend=60)
    kept = json.loads((run / "run.json").read_text())["extensions"]
    assert kept == [{"stage": "diffusion", "from": PLANNED, "steps": 60}]
    for steps in (PLANNED, PLANNED + 1):
        with pytest.raises(LDMError, match=f"more than the {PLANNED + 1} that are done"):
            train_short(run, extend=steps)
    model = train_short(run, extend=LONGER)
    later = {"stage": "diffusion", "from": PLANNED + 1, "steps": LONGER}
    assert json.loads((run / "run.json").read_text())["extensions"] == [*kept, later]
    assert model.provenance["diffusion"]["steps"] == LONGER
    assert load_notes(run / "diffusion.safetensors")["step"] == str(LONGER)
    assert json.loads(load_notes(run / "diffusion.safetensors")["extensions"]) == [*kept, later]
    train_short(run, extend=LONGER)
    with pytest.raises(LDMError, match=f"more than the {LONGER} that are done"):
        train_short(run, extend=LONGER - 1)


def test_an_extension_that_has_not_begun_is_taken_back_without_a_trace(run, extended):
    record = [{"stage": "diffusion", "from": PLANNED, "steps": 10**22}]  # beyond the limit that there is now
    (run / "run.json").write_text(json.dumps({"precision": "fp32", "extensions": record}))
    train_short(run, extend=LONGER)
    assert not differences(weights(run), weights(extended)) and log(run) == log(extended)
    assert (run / "run.json").read_bytes() == (extended / "run.json").read_bytes()


def test_another_line_about_the_recipe_does_not_end_a_run(run, extended):
    """The run keeps the line that it began with."""
    before = (run / "recipe.json").read_bytes()
    train_short(run, replace(short(), about="the same in other words"), extend=LONGER)
    assert (run / "recipe.json").read_bytes() == before
    assert not differences(weights(run), weights(extended))
    train_short(run)


def test_at_most_five_differences_are_listed_and_what_to_do_is_said(run):
    other = short(lr=1e-3, warmup=1, ema=0.5, clip=2.0, weight_decay=0.1, images=8, held_out=8)
    with pytest.raises(LDMError) as error:
        train_short(run, replace(other, about="another"))
    said = str(error.value)
    assert said.count(" was ") == 5 and "and 2 more)" in said and "about" not in said
    assert "train(recipe_from_dict(…))" in said and "recipe.json" in said


def test_the_judge_and_the_features_have_stages_of_their_names(tmp_path):
    assert list(stage_plans(find_recipe("scene-reader"))) == ["scene-reader"]
    assert list(stage_plans(find_recipe("toy-text2image"))) == ["first_stage", "text", "diffusion"]
    recipe = find_recipe("toy-features")
    assert isinstance(recipe, FeaturesRecipe)
    recipe = replace(recipe, channels=(8, 16), training=replace(recipe.training, steps=2, batch_size=4, images=16))
    train_tiny(tmp_path / "run", recipe)
    assert train_tiny(tmp_path / "run", recipe, extend=3).provenance["steps"] == 3


# Interruptions -------------------------------------------------------------------------------------------------------


def die_after_a_step(folder: Path, extend: int | None) -> None:
    """Train, and die as soon as one more step is in a checkpoint."""
    whole = resume.save_state

    def once(run, stage, *args):
        whole(run, stage, *args)
        os.kill(os.getpid(), signal.SIGKILL)

    resume.save_state = once
    train_short(folder, extend=extend)


def test_killed_after_every_step_of_an_extension(run, extended, tmp_path):
    """The extension need not be asked for again."""
    for step in range(PLANNED + 1, LONGER + 1):
        extend = LONGER if step == PLANNED + 1 else None
        child = Child(die_after_a_step, run, extend, output=tmp_path / "output")
        assert child.wait() == -signal.SIGKILL, child.text()
        assert load_notes(run / "diffusion.safetensors")["step"] == str(step)
    train_short(run)
    assert not differences(weights(run), weights(extended))
    assert log(run) == log(extended)


def die_at_rename(folder: Path, k: int) -> None:
    """Extend, and die between the k-th temporary file and its new name."""
    whole, done = os.replace, []

    def never(source, target):
        done.append(target)
        if len(done) == k:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(source, target)

    os.replace = never
    train_short(folder, extend=LONGER)


def test_killed_while_the_files_of_an_extension_are_written(run, extended, tmp_path):
    """Recipe, record, log and checkpoint among them; the same command goes on."""
    for k in (2, 4, 5, 7):
        child = Child(die_at_rename, run, k, output=tmp_path / "output")
        assert child.wait() == -signal.SIGKILL, child.text()
    train_short(run, extend=LONGER)
    assert not differences(weights(run), weights(extended))
    assert (run / "run.json").read_bytes() == (extended / "run.json").read_bytes()


def test_a_run_that_was_stopped_early_is_extended_from_there(tmp_path, monkeypatch):
    """Its rate does not fall to 0 at the planned end first; with an older checkpoint in its place all is as it was."""
    folder, plan = tmp_path / "run", short().diffusion.training
    stopped_at(folder, "diffusion", 1)
    shutil.copy(folder / "diffusion.safetensors", tmp_path / "older")
    stopped_at(folder, "diffusion", 3)
    train_short(folder, extend=LONGER)
    kept = weights(folder)

    rates, whole = {}, learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda *at: rates.setdefault(at[1], whole(*at)))
    shutil.copy(tmp_path / "older", folder / "diffusion.safetensors")
    train_short(folder)
    at = {step: PLANNED if step < 3 else LONGER for step in range(1, LONGER)}
    assert rates == {step: whole(replace(plan, steps=steps), step) for step, steps in at.items()}
    assert not differences(weights(folder), kept)


def test_the_record_of_an_extension_survives_the_loss_of_its_file(run, extended):
    stopped_at(run, "diffusion", LONGER - 1, extend=LONGER)
    (run / "run.json").unlink()
    train_short(run)
    assert not differences(weights(run), weights(extended))
    assert (run / "run.json").read_bytes() == (extended / "run.json").read_bytes()


# What is refused before anything is written --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, recipe, message",
    [
        (PLANNED, short(), "extend=4 should be the steps of diffusion in all, .* more than the 4 that are planned"),
        (3, short(), "extend=3 should be the steps of diffusion in all"),
        (LONGER, short(lr=0.001), "is not the recipe as it is now .diffusion.training.lr was 0.003 and is 0.001"),
        (LONGER, find_recipe("toy-features"), "is not the recipe as it is now .kind was"),
    ],
    ids=["as planned", "less", "another recipe", "another kind"],
)
def test_an_extension_that_cannot_be_is_refused(steps, recipe, message, run):
    before = contents(run)
    with pytest.raises(LDMError, match=message):
        train_tiny(run, recipe, extend=steps)
    assert contents(run) == before


def test_without_a_run_there_is_nothing_to_extend(tmp_path):
    with pytest.raises(LDMError, match="holds no run to go on with"):
        train_short(tmp_path / "run", extend=LONGER)
    assert not (tmp_path / "run").exists()
    with pytest.raises(LDMError, match="extend=0 should be a whole number, 1 to 1000000000"):
        RunOptions(extend=0)
    with pytest.raises(LDMError, match="extend=1000000001 should be a whole number, 1 to 1000000000"):
        RunOptions(extend=10**9 + 1)


def test_an_unfinished_stage_before_the_last_is_finished_first(tmp_path):
    folder = tmp_path / "run"
    stopped_at(folder, "first_stage", 1)
    for said in ("first_stage has done 1 of 2 steps, and diffusion comes after it", "diffusion has not begun"):
        before = contents(folder)
        with pytest.raises(LDMError, match=f"extend: {said}.*--resume"):
            train_short(folder, extend=LONGER)
        assert contents(folder) == before
        if said.startswith("first"):
            stopped_at(folder, "first_stage", 2)


def test_a_run_is_not_extended_on_other_pictures(tmp_path):
    data, folder = draw_faces(tmp_path / "data"), tmp_path / "run"
    train_tiny(folder, of_faces(), data_dir=data)
    kept = [folder / "run.json", folder / "diffusion.safetensors", folder / "log.jsonl"]
    before = [path.read_bytes() for path in kept]
    (data / "celeba" / "img_align_celeba" / "000003.jpg").unlink()
    with pytest.raises(CheckpointError, match="was made with other images"):
        train_tiny(folder, of_faces(), data_dir=data, extend=2)
    assert [path.read_bytes() for path in kept] == before


@pytest.mark.parametrize(
    "extensions",
    [
        5,
        [5],
        {"a": 1},
        [{"stage": "diffusion", "from": 4}],
        [{"stage": "diffusion", "from": 9, "steps": 3}],
        [{"stage": "first_stage", "from": 2, "steps": 3}],
        [{"stage": "cake", "from": 2, "steps": 3}],
    ],
)
def test_a_damaged_record_is_named_with_its_file(extensions, run):
    (run / "run.json").write_text(json.dumps({"precision": "fp32", "extensions": extensions}))
    with pytest.raises(
        LDMError, match=r"run\.json: extensions=.* cannot be read .*: remove it; the extensions are then"
    ):
        train_short(run)
