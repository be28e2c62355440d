"""Whole runs: what their folder tells, what is refused, how they go on, and data that vanish."""

import inspect
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from PIL import Image
from small_runs import differences, of_stages, tiny, tiny_autoencoder, train_and_draw, train_tiny, weights

import ldm_edu.training.data as training_data
import ldm_edu.training.run as runs
from ldm_edu.errors import CheckpointError, DataError, LDMError
from ldm_edu.files import load_notes, load_tensors
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.training.dispatch import train
from ldm_edu.training.recipes import Training, find_recipe, recipe_from_dict, recipe_to_dict
from ldm_edu.training.run import RunOptions, check_batch_size, make_accelerator, open_run, stage_trainings

CPU = RunOptions(device="cpu", precision="fp32", sample_every=0)
RESUMED = replace(CPU, resume=True)

# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, train_and_draw(folder)


def test_the_run_folder_tells_what_was_done(finished):
    folder, model = finished
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage, step) for stage in ("first_stage", "diffusion") for step in (3, 6)
    ]
    assert all({"step", "loss", "images_per_second", "waiting", "seconds", "held_out"} <= set(line) for line in lines)
    assert recipe_from_dict(json.loads((folder / "recipe.json").read_text())) == tiny()
    for name in ("loss.png", "samples/first_stage-000006.png", "samples/diffusion-000006.png"):
        Image.open(folder / name).verify()
    notes = load_notes(folder / "diffusion.safetensors")
    assert {"recipe", "images", "torch", "ldm_edu", "python", "accelerate"} <= set(notes) and notes["step"] == "6"


def test_the_model_is_the_average(finished):
    folder, model = finished
    loaded = LatentDiffusion.from_pretrained(folder / "model")
    assert torch.equal(loaded.sample("a big red ball", steps=2), model.sample("a big red ball", steps=2))
    assert loaded.provenance["diffusion"]["steps"] == 6 and recipe_from_dict(loaded.provenance["recipe"]) == tiny()
    for stage, prefix, part in (
        ("first_stage", "ema.model.", "first_stage"),
        ("diffusion", "ema.unet.", "unet"),
        ("diffusion", "ema.conditioner.", "conditioner"),
    ):
        kept = load_tensors(folder / f"{stage}.safetensors")
        average = {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)}
        assert not differences(average, load_tensors(folder / "model" / part / "model.safetensors"))


def test_a_finished_run_can_be_resumed(finished, tmp_path):
    """It says the same again."""
    shutil.copytree(finished[0], tmp_path / "run")
    train_tiny(tmp_path / "run")
    assert not differences(weights(finished[0]), weights(tmp_path / "run"))


def test_a_folder_with_a_run_is_not_overwritten(finished):
    folder, _ = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(LDMError, match="already holds a run"):
        train_tiny(folder, resume=False)
    with pytest.raises(LDMError, match=r"\(first_stage\.training\.steps was 6 and is 7, diffusion\.training\.steps"):
        train_tiny(folder, tiny(7))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "changed, message",
    [
        (replace(tiny(), seed=1), "seed was 0 and is 1"),
        (of_stages(tiny(), lr=0.001), "first_stage.training.lr was 0.003 and is 0.001"),
        (replace(tiny(), diffusion=replace(tiny().diffusion, conditioners=())), "arguments.dim was 32 and is None"),
        (replace(tiny(), first_stage=replace(tiny().first_stage, multipliers=(1,))), r"was \(1, 2\) and is \(1,\)"),
        (find_recipe("scene-reader"), "kind was 'diffusion model' and is 'scene reader'"),
    ],
)
def test_a_recipe_that_changed_is_named(changed, message, tmp_path):
    open_run(tiny(), tmp_path / "run", CPU)
    with pytest.raises(LDMError, match=message):
        open_run(changed, tmp_path / "run", RESUMED)
    assert open_run(tiny(), tmp_path / "run", RESUMED).folder == tmp_path / "run"


@pytest.mark.parametrize(
    "found", ["log.jsonl", "recipe.json", "diffusion.safetensors", "scene-reader.best.safetensors"]
)
def test_any_sign_of_a_run_protects_its_folder(found, tmp_path):
    (tmp_path / found).write_text("something")
    with pytest.raises(LDMError, match=f"already holds a run .*{found}"):
        open_run(tiny(), tmp_path, CPU)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(LDMError, match="no run"):
        train_tiny(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    folder = open_run(tiny(), tmp_path / "run", CPU).folder
    leftovers = [folder / ".loss.png.999999999-a1b2c3", folder / "model" / ".model.safetensors.999999998-123456"]
    mine = folder / f".loss.png.{os.getpid()}-a1b2c3"  # of a process that is at work
    others = [mine, folder / ".keep", folder / ".notes.txt", folder / "model" / "v1.123"]
    for path in leftovers + others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("something")
    open_run(tiny(), folder, RESUMED)
    assert not any(path.exists() for path in leftovers) and all(path.exists() for path in others)


def test_batches_that_cannot_be_shared_are_refused_before_anything_is_done(tmp_path, monkeypatch):
    """All stages', since the second would come after hours."""
    check_batch_size(Training(steps=1, batch_size=12, lr=1e-3, accumulate=2), 3)
    for n, accumulate in ((5, 1), (3, 6), (4, 2)):
        with pytest.raises(LDMError, match=f"batch_size=12 .*multiple of {n * accumulate}"):
            check_batch_size(Training(steps=1, batch_size=12, lr=1e-3, accumulate=accumulate), n)
    whole = make_accelerator

    def of_three(*args):
        accelerator = whole(*args)
        monkeypatch.setattr(type(accelerator), "num_processes", 3)
        return accelerator

    monkeypatch.setattr(runs, "make_accelerator", of_three)
    recipe = tiny(batch_size=3)
    recipe = replace(recipe, diffusion=replace(recipe.diffusion, training=stage_trainings(tiny(batch_size=4))[1]))
    with pytest.raises(LDMError, match="batch_size=4 cannot be shared by 3 processes"):
        open_run(recipe, tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "recipe", [tiny(), tiny_autoencoder(), find_recipe("scene-reader"), find_recipe("toy-features")]
)
def test_a_misspelt_option_is_refused_before_anything_is_written(recipe, tmp_path):
    """Or the corrected call would find a folder that holds a run."""
    with pytest.raises(TypeError, match="sample_evry"):
        train(recipe, tmp_path / "run", RunOptions(device="cpu", sample_evry=0))
    with pytest.raises(TypeError, match="device"):  # options stand together
        train(recipe, tmp_path / "run", device="cpu")
    with pytest.raises(TypeError, match="lokks"):
        open_run(recipe, tmp_path / "run", replace(CPU, lokks=0))
    assert not (tmp_path / "run").exists()
    assert open_run(recipe, tmp_path / "run", replace(CPU, sample_every=7)).options.sample_every == 7


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"every": 0}, "every=0 should be a whole number, at least 1"),
        ({"every": 2.5}, "every=2.5 should be a whole number|type"),
        ({"save_every": math.nan}, "save_every=nan should be a finite number, at least 0"),
        ({"save_every": -1.0}, "save_every=-1.0 should be a finite number, at least 0"),
        ({"sample_every": -1}, "sample_every=-1 should be a whole number, at least 0"),
        ({"cache_dir": 5}, "cache_dir=5 should be a folder|type"),
        ({"device": 5}, "device=5 should be a name|type"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; known: fp32, bf16, fp16, fp64"),
        ({"trackers": ["tensorbored"]}, "tracker 'tensorbored' is unknown or not installed; here: "),
        ({"trackers": "tensorboard"}, r"trackers are a list of names: \['tensorboard'\] rather than 'tensorboard'"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_options_without_sense_are_refused_before_anything_is_done(wrong, message):
    with pytest.raises((LDMError, TypeError), match=message):
        RunOptions(**wrong)


def test_a_precision_that_the_device_lacks_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(LDMError, match="fp16' needs a GPU"):
        train_tiny(tmp_path / "run", precision="fp16")
    assert not (tmp_path / "run").exists()


def test_what_is_no_recipe_is_refused(tmp_path):
    """Also where nobody checks the types of arguments, as these tests do."""
    unchecked = inspect.unwrap(train)
    for wrong in ("toy-demo", recipe_to_dict(tiny()), None):
        with pytest.raises(LDMError, match=r"recipe should be a recipe, such as find_recipe\('toy-demo'\), not "):
            unchecked(wrong, tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_a_size_that_cannot_be_halved_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(LDMError, match="size=15 cannot be halved"):
        train_tiny(tmp_path / "run", replace(tiny(), size=15))
    assert not (tmp_path / "run").exists()


# Precision that is chosen by timing ----------------------------------------------------------------------------------


def never(device):
    raise AssertionError("timed once more")


@pytest.mark.parametrize("dtype, precision", [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_a_precision_that_was_chosen_by_timing_is_kept(dtype, precision, tmp_path, monkeypatch):
    """The machine may be busier, or less so, when a run goes on: the same numbers are wanted."""
    monkeypatch.setattr(runs, "pick_dtype", lambda device: dtype)
    by_timing, folder = RunOptions(device="cpu"), tmp_path / "run"
    assert open_run(tiny(), folder, by_timing).accelerator.precision == precision
    assert json.loads((folder / "run.json").read_text()) == {"precision": precision}

    monkeypatch.setattr(runs, "pick_dtype", never)
    assert open_run(tiny(), folder, replace(by_timing, resume=True)).accelerator.precision == precision
    with pytest.raises(AssertionError, match="once more"):  # another folder is another run
        open_run(tiny(), tmp_path / "other", by_timing)

    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    monkeypatch.setattr(runs, "pick_dtype", lambda device: other)  # as it would be chosen today
    model = train_tiny(folder, precision=None)
    assert {model.provenance[stage]["precision"] for stage in ("first_stage", "diffusion")} == {precision}


def test_a_run_does_not_go_on_in_another_precision(tmp_path, monkeypatch):
    """Thousands of its numbers would differ from those of the undisturbed run, and nobody would know."""
    monkeypatch.setattr(runs, "pick_dtype", never)
    assert open_run(tiny(), tmp_path, CPU).accelerator.precision == "fp32"
    with pytest.raises(LDMError, match="began in fp32, and goes on in it: .* a run in bf16 needs another folder"):
        open_run(tiny(), tmp_path, replace(RESUMED, precision="bf16"))
    assert open_run(tiny(), tmp_path, replace(RESUMED, precision=None)).accelerator.precision == "fp32"
    (tmp_path / "run.json").unlink()  # as in a folder of version 0.1.0
    monkeypatch.setattr(runs, "pick_dtype", lambda device: torch.float32)
    assert open_run(tiny(), tmp_path, replace(RESUMED, precision=None)).accelerator.precision == "fp32"
    assert json.loads((tmp_path / "run.json").read_text()) == {"precision": "fp32"}


# Trackers ------------------------------------------------------------------------------------------------------------


class Notebook(GeneralTracker):
    """A tracker of one's own: it keeps what it is told."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.config, self.lines, self.finished = {}, [], False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config |= values

    def log(self, values, step, **kwargs):
        self.lines.append((step, values))

    def finish(self):
        self.finished = True


def test_a_tracker_of_ones_own_gets_recipe_and_log(tmp_path):
    notebook, folder = Notebook(), tmp_path / "run"
    train_tiny(folder, trackers=[notebook])
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(lines) == len(notebook.lines) == 4 and notebook.finished
    for line, (step, values) in zip(lines, notebook.lines, strict=True):
        stage = line.pop("stage")
        before = {"first_stage": 0, "diffusion": 6}[stage]  # steps never fall: some trackers drop what comes late
        assert step == before + line["step"] and values == {f"{stage}/{name}": value for name, value in line.items()}
        assert {f"{stage}/loss", f"{stage}/held_out"} <= set(values)
    flat = notebook.config
    assert flat["first_stage.training.lr"] == 3e-3 and flat["diffusion.conditioners.0.arguments.dim"] == 32
    assert flat["first_stage.multipliers"] == "(1, 2)" and flat["name"] == "tiny"
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())


def test_a_tracker_that_fails_does_not_end_a_run(tmp_path):
    """Its network is gone, for instance; log.jsonl has it all."""

    class Offline(Notebook):
        def log(self, values, step, **kwargs):
            raise ConnectionError("no network")

    with pytest.warns(UserWarning, match="the trackers were not told .no network.; the training goes on") as warned:
        train_tiny(tmp_path / "run", trackers=[Offline()])
    assert len(warned) == 1 and len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 4


def test_a_tracker_that_does_not_begin_leaves_the_folder_free(tmp_path):
    class Nowhere(Notebook):
        def store_init_configuration(self, values):
            raise ConnectionError("no network")

    with pytest.raises(ConnectionError) as error:
        train_tiny(tmp_path / "run", trackers=[Nowhere()])
    assert error.tb  # the traceback keeps alive what was opened
    train_tiny(tmp_path / "run", resume=False)


def test_the_log_function_gets_each_line_where_no_bar_is_shown(tmp_path):
    told = []
    train_tiny(tmp_path / "run", log_fn=told.append)
    assert [text.partition(":")[0] for text in told] == [
        f"{stage} {step}/6" for stage in ("first_stage", "diffusion") for step in (3, 6)
    ]
    assert all("held_out" in text and text.endswith("min left") for text in told)


# Data that vanish ----------------------------------------------------------------------------------------------------


def draw_faces(folder: Path, n: int = 12) -> Path:
    """CelebA's folder, with noise for faces: two thirds for training, a third for validation."""
    pictures = folder / "celeba" / "img_align_celeba"
    pictures.mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, n + 1)]
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (218, 178, 3), dtype=np.uint8)).save(pictures / name)
    rows = "".join(f"{name} {1 if i % 2 else -1}\n" for i, name in enumerate(names))
    (pictures.parent / "list_attr_celeba.txt").write_text(f"{n}\nSmiling\n{rows}")
    parts = "".join(f"{name} {int(i >= 2 * n // 3)}\n" for i, name in enumerate(names))
    (pictures.parent / "list_eval_partition.txt").write_text(parts)
    return folder


def of_faces():
    recipe = tiny(1, images=None)
    return replace(recipe, dataset="celeba", diffusion=replace(recipe.diffusion, conditioners=()))


def test_a_picture_that_vanishes_before_it_is_read_is_named(tmp_path, monkeypatch):
    data, whole = draw_faces(tmp_path / "data"), training_data.cached

    def too_late(dataset, *args):
        dataset.files[5].unlink(missing_ok=True)
        return whole(dataset, *args)

    monkeypatch.setattr(training_data, "cached", too_late)
    with pytest.raises(DataError, match=r"000006\.jpg"):
        train_tiny(tmp_path / "run", of_faces(), data_dir=data)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A run on such faces, and their folder."""
    folder = tmp_path_factory.mktemp("faces")
    data = draw_faces(folder / "data")
    train_tiny(folder / "run", of_faces(), data_dir=data)
    return folder


def test_a_run_does_not_go_on_with_other_pictures(faces, tmp_path):
    shutil.copytree(faces, tmp_path / "here")
    run, data = tmp_path / "here" / "run", tmp_path / "here" / "data"
    before = (run / "diffusion.safetensors").read_bytes()
    (data / "celeba" / "img_align_celeba" / "000003.jpg").unlink()
    with pytest.raises(CheckpointError, match=r"first_stage\.safetensors was made with other images"):
        train_tiny(run, of_faces(), data_dir=data)
    assert (run / "diffusion.safetensors").read_bytes() == before


def test_the_same_pictures_copied_elsewhere_will_do(faces, tmp_path):
    """Times of files do not matter; what is in them does."""
    shutil.copytree(faces, tmp_path / "here", copy_function=shutil.copyfile)
    train_tiny(tmp_path / "here" / "run", of_faces(), data_dir=tmp_path / "here" / "data")


def test_data_that_are_gone_are_named(faces, tmp_path):
    shutil.copytree(faces, tmp_path / "here")
    run, data = tmp_path / "here" / "run", tmp_path / "here" / "data"
    (images,) = (run / "cache").glob("celeba-train-*/block-000000.safetensors")
    images.unlink()
    with pytest.raises(DataError, match=f"{images.parent}.*delete"):
        train_tiny(run, of_faces(), data_dir=data)
    shutil.rmtree(images.parent)  # as it says
    train_tiny(run, of_faces(), data_dir=data)
    shutil.rmtree(data)
    with pytest.raises(DataError, match=str(data)):
        train_tiny(run, of_faces(), data_dir=data)


def test_text_is_refused_where_the_data_have_none(tmp_path):
    recipe = replace(tiny(), dataset="celeba")
    with pytest.raises(LDMError, match="has no caption"):
        train_tiny(tmp_path / "run", recipe, data_dir=draw_faces(tmp_path / "data"))
    assert not (tmp_path / "run").exists()


# What a run goes on with ---------------------------------------------------------------------------------------------


def test_few_noise_levels_can_be_sampled(tmp_path):
    """The samples on the way take 25 steps, or as many as there are levels."""
    recipe = tiny(2)
    recipe = replace(recipe, diffusion=replace(recipe.diffusion, T=10, beta_start=0.1, beta_end=0.3))
    train_tiny(tmp_path / "run", recipe, sample_every=2)
    assert (tmp_path / "run" / "samples" / "diffusion-000002.png").exists()


def test_the_same_recipe_in_other_words_goes_on(tmp_path):
    """Lists for tuples inside arguments, arguments in another order."""
    recipe = tiny(2)
    train_tiny(tmp_path / "run", recipe)
    (line,) = recipe.diffusion.conditioners
    words = list(line.arguments["vocabulary"])
    backwards = replace(line, arguments=dict(reversed(line.arguments.items())) | {"vocabulary": words})
    diffusion = replace(recipe.diffusion, conditioners=(backwards,))
    train_tiny(tmp_path / "run", replace(recipe, diffusion=diffusion))


def test_a_diffusion_stage_does_not_go_on_with_another_first_stage(tmp_path):
    folder = tmp_path / "run"
    train_tiny(folder, tiny(2))
    for path in folder.glob("first_stage*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"diffusion\.safetensors was made with another first stage"):
        (folder / "run.json").write_text('{"precision": "bf16"}')
        train_tiny(folder, tiny(2), precision="bf16")


@pytest.mark.parametrize("text", ['{"precision": 5}', "{}", '{"precision": "fp8"}'])
def test_a_precision_that_is_none_is_named_with_its_file(text, tmp_path):
    folder = open_run(tiny(), tmp_path / "run", RunOptions(device="cpu")).folder
    (folder / "run.json").write_text(text)
    with pytest.raises(LDMError, match=r"run\.json names no precision; known: fp32"):
        open_run(tiny(), folder, RunOptions(device="cpu", resume=True))


def test_a_folder_without_validation_images_is_refused_before_anything_is_written(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (16, 16)).save(data / "one.png")
    recipe = replace(tiny(1), dataset="folder", diffusion=replace(tiny(1).diffusion, conditioners=()))
    with pytest.raises(DataError, match="none of its 1 images is in split '(train|validation)'"):
        train_tiny(tmp_path / "run", recipe, data_dir=data)
    assert not (tmp_path / "run").exists()


# What the caller has set ---------------------------------------------------------------------------------------------


def test_a_run_in_fp32_stays_in_fp32_inside_autocast_and_trains_inside_no_grad(tmp_path):
    plain = train_tiny(tmp_path / "plain", tiny(2))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        inside = train_tiny(tmp_path / "inside", tiny(2))
    assert not differences(weights(tmp_path / "plain"), weights(tmp_path / "inside"))
    assert type(plain) is type(inside)


def test_a_run_in_bf16_learns_the_same_inside_autocast(tmp_path):
    """An autocast that stays open would go on with the weights of the first step."""
    train_tiny(tmp_path / "alone", precision="bf16", every=1)
    with torch.autocast("cpu", torch.bfloat16):
        train_tiny(tmp_path / "inside", precision="bf16", every=1)
    logs = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("alone", "inside")]
    assert len(logs[0]) > 4
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02) and a["held_out"] == pytest.approx(
            b["held_out"], rel=0.02
        )


def test_inference_mode_is_refused_before_anything_is_written(tmp_path):
    with torch.inference_mode(), pytest.raises(LDMError, match="train outside of it"):
        train_tiny(tmp_path / "run", tiny(2))
    assert not (tmp_path / "run").exists()


def test_options_that_are_none_and_a_folder_without_a_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LDMError, match="options should be RunOptions"):
        inspect.unwrap(train)(tiny(), tmp_path / "run", None)
    with pytest.raises(LDMError, match="folder is an empty text"):
        train(tiny(), "", CPU)
    assert not list(tmp_path.iterdir())


def test_the_folders_of_options_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = RunOptions(data_dir="~/data", cache_dir=Path("~/cache"), weights_dir="~")
    assert (options.data_dir, options.cache_dir) == (tmp_path / "data", tmp_path / "cache")
    assert options.weights_dir == tmp_path
    with pytest.raises(LDMError, match="cache_dir='' should be a folder"):
        RunOptions(cache_dir="")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_USE_MEGATRON_LM", "true"), ("ACCELERATE_TORCH_DEVICE", "foo")],
)
def test_what_accelerate_makes_of_its_environment_is_told_in_one_line(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(LDMError, match=f"environment variables say .*{name}"):
        make_accelerator("cpu", "fp32")
    monkeypatch.delenv(name)
    assert make_accelerator("cpu", "fp32").device.type == "cpu"
