"""The command line, as a user types it."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ldm_edu import LatentDiffusion
from ldm_edu.checkpoints import PRETRAINED
from ldm_edu.cli import _demo_score, app
from ldm_edu.evaluation.report import last_evaluation
from ldm_edu.files import load_notes
from ldm_edu.measurements import Measurement, Measurements, load_measurements

PROMPT = "a small red sphere left of a big blue cube"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_same_seed_gives_the_same_file(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        seed = 2 if name == "c.png" else 1
        result = run("sample", PROMPT, "--seed", seed, "--steps", 3, "--device", "cpu", "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


@pytest.mark.parametrize(
    "words, said",
    [
        (["train", "toy-text2img"], "toy-text2image"),
        (["train", "toy-demo", "--device", "tpu"], "cuda"),
        (["train", "celeba64", "--data-dir", "nowhere/at/all"], "nowhere"),
        (["sample", PROMPT, "--steps", "0"], "steps"),
        (["sample", PROMPT, "--device", "tpu"], "cpu"),
        (["sample", PROMPT, "--model", "nothing"], "toy-text2image"),
        (["sample", PROMPT, "--sampler", "euler"], "ddim"),
        (["sample", "a small red dgo"], "dgo"),
        (["lab", "nowhere"], "nowhere"),
        (["data", "imagenet"], "celeba, coco"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == 1
    assert said in result.output and "Traceback" not in result.output
    assert result.output.startswith("ldm-edu: ") and len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.safetensors"))


def test_an_unknown_profile_is_one_line(monkeypatch):
    monkeypatch.setenv("LDM_EDU_PROFILE", "supercomputer")
    result = run("sample", PROMPT)
    assert result.exit_code == 1 and "laptop" in result.output


def test_an_unconditional_run_on_real_faces(real_data, tmp_path):
    """`celeba64` in miniature: both stages on 100 faces of the real subset, then samples without text."""
    faces = tmp_path / "celeba" / "img_align_celeba"
    faces.mkdir(parents=True)
    names, *rows = (real_data / "celeba" / "list_attr_celeba.txt").read_text().splitlines()[1:102]
    (faces.parent / "list_attr_celeba.txt").write_text("\n".join([str(len(rows)), names, *rows]))
    for row in rows:
        shutil.copy(real_data / "celeba" / "img_align_celeba" / row.split()[0], faces)
    out = tmp_path / "run"
    result = run("train", "celeba64", "--data-dir", tmp_path, "--out", out, "--max-steps", 2, "--every", 1)
    assert result.exit_code == 0, result.output
    log = (out / "log.jsonl").read_text()
    assert '"psnr"' in log and '"held_out"' in log
    result = run("sample", "--model", out / "model", "--n", 2, "--steps", 2, "--out", tmp_path / "x.png")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_every_command_explains_itself(command):
    result = run(command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


@pytest.fixture
def quick_demo(monkeypatch):
    """The demonstration without its training, at one scale, scored on two images of each kind."""
    monkeypatch.setattr("ldm_edu.cli._SCALES", (1.0,))
    monkeypatch.setattr("ldm_edu.cli._demo_score", partial(_demo_score, n=2))
    monkeypatch.setattr("ldm_edu.cli.train_recipe", lambda *_, **__: LatentDiffusion.from_pretrained("toy-text2image"))


def test_the_demonstration_says_where_to_go_on(tmp_path, quick_demo):
    """The pages that it names exist."""
    result = run("demo", "--steps", 1, "--device", "cpu", "--out", tmp_path / "demo.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "demo.png").is_file()
    pages = [path.stem for path in Path(__file__).parents[1].glob("nbs/*/*.ipynb")]
    named = re.findall(r"\d\d_\w+", result.output)
    assert len(named) == 3 and set(named) <= set(pages)


def test_scores_become_a_part_of_the_model(tmp_path):
    shutil.copytree(PRETRAINED / "toy-text2image", tmp_path / "model")
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    out = tmp_path / "scores.json"
    words = ["evaluate", tmp_path / "model", "--n", 4, "--steps", 2, "--choose", "--write", "--device", "cpu"]
    result = run(*words, "--out", out)
    assert result.exit_code == 0, result.output
    assert "every thing of the caption" in result.output and "judge, rendered" in result.output
    assert [path.name for path in tmp_path.iterdir() if path.name != "model"] == ["scores.json"]
    after = json.loads((tmp_path / "model" / "config.json").read_text())
    scores = after["provenance"].pop("scores")
    before["provenance"].pop("scores", None)
    assert after == before
    assert scores["steps"] == 2 and str(scores["scale"]) in scores["choice"] and len(scores["choice"]) == 7
    for split in ("test", "unseen_pairs"):
        drawn, ceiling = scores[split]["drawn"], scores[split]["ceiling"]
        assert drawn.keys() == ceiling.keys() >= {"every thing of the caption", "number", "colour", "left", "behind"}
        for name in ("every thing of the caption", "shape", "right"):
            assert any(
                drawn[name] in line and ceiling[name] in line
                for line in result.output.splitlines()
                if line.startswith(name)
            ), name
    assert scores["diversity"]["captions"] == 4 and scores["diversity"]["drawn"] in result.output
    once = run(*words[:4], "--steps", 1, "--split", "validation", "--varied", 0, "--device", "cpu", "--out", out)
    assert "validation, 4 images of each set" in once.output
    assert "unseen" not in once.output.replace("unseen pairs", "") and "diversity" not in once.output
    refused = run("evaluate", "toy-text2image", "--write")
    assert refused.exit_code == 1 and "no folder" in refused.output


def test_an_evaluation_is_printed_and_written_as_measured_numbers(tmp_path, monkeypatch):
    """Of a model without captions, from another folder; the newest file is found again."""
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "toy-class", "--n", 4, "--steps", 2, "--sampler", "heun", "--device", "cpu"]
    result = run(*words, "--keep-samples")
    assert result.exit_code == 0, result.output
    measured = last_evaluation()
    assert measured == load_measurements("runs/evaluation/toy-class.json")
    assert measured.keys("set") == ["drawn", "reconstructed", "real halves"] and measured.keys("sampler") == ["heun"]
    for m in measured:
        line = next(line for line in result.output.splitlines() if line.startswith(m.name))
        assert any(m.text(digits) in line for digits in (2, 3, 4)), line
    for told in ("test, 4 images of each set", "2 steps of heun, scale 3", "features: ToyFeatures, images as they are"):
        assert told in result.output
    assert len(list(tmp_path.glob("runs/evaluation/toy-class.samples/*/batch-*.safetensors"))) == 1
    assert run(*words).exit_code == 0 and [path.name for path in (tmp_path / "runs" / "evaluation").iterdir()] == [
        "toy-class.json"
    ]


def test_a_file_of_another_kind_is_not_replaced_by_numbers(no_work, tmp_path):
    shutil.copytree(PRETRAINED / "toy-class", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    before = config.read_bytes()
    told = one_line(run("evaluate", tmp_path / "model", "--out", config))
    assert "what stands there is no evaluation, and is not replaced" in told and config.read_bytes() == before


def test_numbers_of_another_kind_are_not_replaced_by_an_evaluation(no_work, tmp_path):
    numbers = [Measurement("Fréchet distance", 1.0, {"set": "real halves"}), Measurement("loss", 1.0, {"set": "drawn"})]
    for i, measured in enumerate([*([m] for m in numbers), []]):
        out = tmp_path / f"{i}.json"
        Measurements("of a benchmark", "python x.py", tuple(measured)).save(out)
        before = out.read_bytes()
        told = one_line(run("evaluate", "toy-class", "--out", out))
        assert f"{out}: what stands there is no evaluation, and is not replaced" in told
        assert out.read_bytes() == before


QUICK = ("--n", 2, "--split", "test", "--device", "cpu")


def test_an_evaluation_with_another_title_is_not_replaced(tmp_path, monkeypatch):
    out = tmp_path / "x.json"
    assert run("evaluate", "toy-class", *QUICK, "--steps", 1, "--out", out).exit_code == 0
    assert run("evaluate", "toy-class", *QUICK, "--steps", 2, "--out", out).exit_code == 0
    before = out.read_bytes()
    monkeypatch.setattr("ldm_edu.cli.evaluate_model", lambda *_: pytest.fail("measured before"))
    shutil.copytree(PRETRAINED / "toy-class", tmp_path / "mine")
    told = one_line(run("evaluate", tmp_path / "mine", *QUICK, "--out", out))
    assert f"{out}: what stands there is the evaluation 'toy-class: images of " in told
    assert out.read_bytes() == before


def test_two_models_of_one_name_have_files_of_their_own(tmp_path, monkeypatch):
    """A number is added to the default name unless the same was measured in the same way; other files stay as well."""
    monkeypatch.chdir(tmp_path)
    for parent in "ab":
        shutil.copytree(PRETRAINED / "toy-class", tmp_path / parent / "r1" / "model")
    folder = tmp_path / "runs" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "r1-2.json").write_text("mine")

    def evaluated(model: str, *words, name: str):
        result = run("evaluate", tmp_path / model / "r1" / "model", *QUICK, *words)
        assert result.exit_code == 0 and f"all numbers: {Path('runs', 'evaluation', name)}\n" in result.output

    evaluated("a", "--steps", 1, name="r1.json")
    first = (folder / "r1.json").read_bytes()
    others = [("--steps", 2), ("--steps", 1, "--n", 3), ("--steps", 1, "--scale", 2), ("--steps", 1, "--seed", 1)]
    others += [("--steps", 1, "--split", "validation"), ("--steps", 1, "--sampler", "ddpm")]
    others += [("--steps", 1, "--dataset", "toy", "--n", 4)]
    for i, words in enumerate(others, 3):
        evaluated("b", *words, name=f"r1-{i}.json")
    evaluated("b", *others[0], name="r1-3.json")
    assert (folder / "r1.json").read_bytes() == first and (folder / "r1-2.json").read_text() == "mine"
    assert len(list(folder.iterdir())) == 2 + len(others)
    evaluated("a", "--steps", 1, name="r1.json")


def test_the_folder_of_a_run_is_no_model_to_evaluate(no_work, tmp_path):
    shutil.copytree(PRETRAINED / "toy-class", tmp_path / "r1" / "model")
    (tmp_path / "r1" / "recipe.json").write_text("{}")
    told = one_line(run("evaluate", tmp_path / "r1"))
    assert f"that is a run: give {tmp_path / 'r1' / 'model'}" in told


@pytest.mark.skipif(sys.platform == "win32", reason="no signals as on Unix")
def test_ctrl_c_keeps_what_was_drawn_and_the_same_command_goes_on(tmp_path, monkeypatch):
    """A real process and a real Ctrl-C; the numbers are those of an evaluation that was not interrupted."""
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "toy-class", "--n", "12", "--steps", "20", "--batch-size", "3", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ldm_edu", *words, "--out", "x.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end and not list(tmp_path.glob("x.samples/*/batch-*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in told, told
    assert f"the same command goes on from here:\n  ldm-edu {shlex.join(words)} --out x.json" in told
    assert 1 <= len(list(tmp_path.glob("x.samples/*/batch-*"))) < 4 and not (tmp_path / "x.json").exists()
    for out in ("x.json", "whole.json"):
        assert run(*words, "--out", out).exit_code == 0
    interrupted, whole = (load_measurements(tmp_path / out) for out in ("x.json", "whole.json"))
    assert interrupted.numbers == whole.numbers and not (tmp_path / "x.samples").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """A real process, as a user starts it, and a real Ctrl-C."""
    out, cache = tmp_path / "run", tmp_path / "cache"
    words = ["train", "toy-demo", "--out", str(out), "--cache-dir", str(cache), "--every", "1", "--device", "cpu"]
    for stage in ("first_stage.training", "diffusion.training", "text"):
        words += ["--set", f"{stage}.images=64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ldm_edu", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("first_stage 3/"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130, "".join(lines)
    told = "".join(lines)
    assert "stopped after step" in told and shlex.join(["ldm-edu", *words, "--resume"]) in told
    step = int(load_notes(out / "first_stage.safetensors")["step"])
    assert f"first_stage stopped after step {step}" in told
    again = subprocess.Popen(
        [sys.executable, "-m", "ldm_edu", *words, "--resume"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first = next(line for line in again.stdout if line.startswith("first_stage"))
    again.kill()
    again.stdout.close()
    again.wait()
    assert first.startswith(f"first_stage {step + 1}/")


def test_reconstruct_says_what_comes_back_and_what_the_judge_still_reads(tmp_path):
    done = run("reconstruct", "toy-vq-f4", "--n", 8, "--out", tmp_path / "a.png")
    assert done.exit_code == 0, done.output
    for words in ("PSNR in dB", "SSIM", "entries used", "of 512", "read without an error", "(before: "):
        assert words in done.output
    assert (tmp_path / "a.png").is_file()
    faces = run("reconstruct", "toy-kl-f4", "--dataset", "toy-faces", "--n", 4)
    assert faces.exit_code == 0 and "read without" not in faces.output, "the judge reads scenes only"


OWN = """
from dataclasses import replace
from ldm_edu import RECIPES, TextConditioner
from ldm_edu.training import ConditionerRecipe

class Shouted(TextConditioner):
    "Text in capitals, which the tokenizer makes small again."
    def forward(self, batch):
        return super().forward([text.upper() for text in (batch["caption"] if isinstance(batch, dict) else batch)])

demo = RECIPES["toy-demo"].shortened(1)
(captions,) = demo.diffusion.conditioners
diffusion = replace(demo.diffusion, conditioners=(replace(captions, name="Shouted"),), training=replace(
    demo.diffusion.training, images=8, batch_size=4))
first = replace(demo.first_stage, training=replace(demo.first_stage.training, images=8, batch_size=4))
text = replace(demo.text, images=8, batch_size=4)
RECIPES["shouted"] = replace(demo, name="shouted", diffusion=diffusion, first_stage=first, text=text)
"""


def test_a_module_of_ones_own_is_imported_first(tmp_path):
    """In processes of their own, as a user does it: trained, and asked for an image."""
    (tmp_path / "own_module.py").write_text(OWN)
    command = [sys.executable, "-m", "ldm_edu"]

    def typed(*words):
        return subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)

    own, how = ("--import", "own_module"), ("--device", "cpu", "--precision", "fp32", "--cache-dir", "cache")
    done = typed(*own, "train", "shouted", *how, "--out", "run")
    assert done.returncode == 0, done.stderr
    done = typed(*own, "sample", "a red ball", "--model", "run/model", "--steps", "2", "--device", "cpu")
    assert done.returncode == 0 and (tmp_path / "sample.png").exists(), done.stderr
    done = typed("sample", "a red ball", "--model", "run/model")
    assert done.returncode == 1 and "class 'Shouted' is not known" in done.stderr and "Traceback" not in done.stderr
    done = typed("--import", "nowhere", "recipes")
    assert done.returncode == 1 and "--import nowhere: No module named 'nowhere'" in done.stderr


# What is refused before the work -------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    """Nothing is loaded, drawn or trained: whoever tries fails."""

    def work(*_, **__):
        raise AssertionError("worked before it was known where the result goes")

    for name in ("load_first_stage", "train_recipe", "evaluate_model", "ToyFeatures.from_pretrained"):
        monkeypatch.setattr(f"ldm_edu.cli.{name}", work)
    monkeypatch.setattr("ldm_edu.cli.LatentDiffusion.from_pretrained", work)


def one_line(result) -> str:
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert result.output.startswith("ldm-edu: ") and len(result.output.strip().splitlines()) == 1, result.output
    return result.output.strip()


@pytest.mark.parametrize(
    "command", [("sample", PROMPT), ("demo",), ("reconstruct",), ("evaluate",)], ids=lambda words: words[0]
)
@pytest.mark.parametrize(
    "out, said",
    [
        ("folder.png", "a folder stands in its place"),
        ("file/x.png", "a file stands where a folder is needed"),
        ("/proc/x.png", "cannot be written"),
        ("/dev/null/x.png", "a file stands where a folder is needed"),
        ("x" * 300 + ".png", "the name is too long"),
        ("loop/x.png", "cannot be written"),
        ("~no such user/x.png", "is no name that a file can have"),
        ("x.jpg", "should end in .png"),
    ],
    ids=["folder", "in a file", "proc", "null", "long", "loop", "home", "jpg"],
)
def test_a_place_that_cannot_be_written_is_found_before_the_work(command, out, said, no_work, tmp_path, monkeypatch):
    if sys.platform == "win32" and out.startswith("/"):
        pytest.skip("an ordinary folder on this system")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("something")
    (tmp_path / "loop").symlink_to("loop")
    if command == ("evaluate",):
        (tmp_path / "folder.json").mkdir()
        out, said = out.replace(".png", ".json"), said.replace(".png", ".json")
    assert said in one_line(run(*command, "--device", "cpu", "--out", out))


@pytest.mark.parametrize(
    "words, said",
    [
        *((["sample", PROMPT, "--scale", x], f"--scale={x} should be a finite number") for x in ("nan", "inf", "-inf")),
        (["sample", PROMPT, "--scale", "1e39"], "--scale=1e+39 should be a finite number, at least -1000"),
        (["sample", PROMPT, "--steps", "0"], "--steps=0 should be a whole number, at least 1"),
        (["sample", PROMPT, "--n", "0"], "--n=0 should be a whole number"),
        (["sample", PROMPT, "--n", "1000000000"], "--n=1000000000 should be a whole number, 1 to 10000"),
        (["sample", PROMPT, "--seed", "-1"], "--seed=-1 should be a whole number, 0 to 4294967295"),
        (["sample", PROMPT, "--seed", str(2**64)], "--seed=18446744073709551616 should be"),
        (["sample", PROMPT, "--seed", str(2**32 - 1), "--n", "2"], "--seed=4294967295 should be"),
        (["evaluate", "--scale", "nan", "--write"], "--scale=nan should be a finite number"),
        (["evaluate", "--n", "1000000000"], "--n=1000000000 should be a whole number, 2 to 100000"),
        (["evaluate", "--sampler", "euler"], "--sampler='euler' is not known; it can be 'ddim', "),
        (["evaluate", "--features", "vgg"], "--features='vgg' is not known; it can be 'toy-features', "),
        (["evaluate", "--seed", str(2**32 - 2), "--n", "3"], "--seed=4294967294 should be a whole number, 0 to"),
        (["evaluate", "--out", "scores.png"], "--out scores.png: numbers are saved as JSON"),
        (["evaluate", "--varied", "1"], "--varied 1: diversity is a mean over captions, so it needs at least 2"),
        (["evaluate", "--sets", "1000000000"], "--sets=1000000000 should be a whole number, 1 to 195"),
        (["evaluate", "--sets", "51", "--n", "2000"], "--sets=51 should be a whole number, 1 to 50"),
        (["evaluate", "--seed", "4294967290", "--n", "3", "--sets", "3"], "--seed=4294967290 should be a whole number"),
        (["evaluate", "--clip", ""], "--clip '': give the folder of a CLIP model"),
        (["evaluate", "--steps", "-3"], "--steps=-3 should be a whole number"),
        (["evaluate", "--split", "train"], "--split train: a model is judged by what it has not seen: validation, "),
        (["evaluate", "--write"], "--write: toy-text2image is no folder of a model"),
        (["evaluate", str(PRETRAINED / "toy-text2image"), "--write"], "ships with the package"),
        (["evaluate", "--choose", "--split", "validation"], "--split validation would measure on the same ones"),
        (["reconstruct", "--split", "train"], "--split train: a model is judged by what it has not seen"),
        (["reconstruct", "--size", "100000"], "--size=100000 should be a whole number, 1 to 2048"),
        (["reconstruct", "--size", "2048"], "--n 256, --size 2048: so many images of that size need more than 4 GiB"),
        (["reconstruct", "--dataset", "folder", "--data-dir", "~no such user"], "is no name that a file can have"),
        (["demo", "--steps", "0"], "--steps=0 should be a whole number"),
        (["train", "toy-demo", "--out", "~no such user/a"], "is no name that a file can have"),
        (["train", "toy-demo", "--out", "x" * 300], "the name is too long"),
        (["--import", ".relative", "recipes"], "--import .relative: this is no name of a module"),
        (["--import", "", "recipes"], "this is no name of a module"),
    ],
)
def test_a_number_or_name_without_sense_is_refused_before_the_work(words, said, no_work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in one_line(run(*words))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
@pytest.mark.parametrize("words", [("evaluate", "--sets"), ("train", "toy-demo", "--snapshot-every")])
def test_a_count_below_one_is_refused_with_the_name_of_its_option(words, value, no_work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*words, value)
    assert result.exit_code == 2 and f"Invalid value for '{words[-1]}'" in result.output
    assert not list(tmp_path.iterdir())


def test_the_numbers_of_sets_and_of_steps_between_snapshots_are_passed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("ldm_edu.cli.evaluate_model", lambda _, options, *more: asked.append(options.sets) or 1 / 0)
    monkeypatch.setattr("ldm_edu.cli.train_recipe", lambda *given: asked.append(given[-1].snapshot_every) or 1 / 0)
    for words in (["evaluate", "toy-class"], ["evaluate", "toy-class", "--sets", 3], ["train", "toy-demo"]):
        assert isinstance(run(*words, "--device", "cpu").exception, ZeroDivisionError)
    assert isinstance(run("train", "toy-demo", "--snapshot-every", 500).exception, ZeroDivisionError)
    assert asked == [1, 3, None, 500]


def test_samples_on_the_way_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("ldm_edu.cli.train_recipe", lambda *given: asked.append(given[-1].sample_every) or 1 / 0)
    for words in ([], ["--sample-every", 0], ["--sample-every", 50]):
        assert isinstance(run("train", "toy-demo", "--device", "cpu", *words).exception, ZeroDivisionError)
    assert asked == [None, 0, 50]
    result = run("train", "toy-demo", "--sample-every", -1)
    assert result.exit_code == 2 and "Invalid value for '--sample-every'" in result.output


def test_scores_that_could_not_be_written_are_not_measured(no_work, tmp_path, monkeypatch):
    shutil.copytree(PRETRAINED / "toy-text2image", tmp_path / "model")
    monkeypatch.setattr("ldm_edu.files.atomic", refuse_to_write)
    words = "evaluate", tmp_path / "model", "--write", "--n", 2
    assert f"{tmp_path / 'model' / 'config.json'} cannot be written: no permission" in one_line(run(*words))


def refuse_to_write(*_, **__):
    """What a folder of somebody else's says."""
    raise PermissionError(13, "Permission denied")


def test_the_home_folder_is_found_where_no_shell_has_done_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = run("sample", PROMPT, "--steps", 1, "--device", "cpu", "--out", "~/a/x.png")
    assert result.exit_code == 0 and (tmp_path / "a" / "x.png").is_file() and not (tmp_path / "~").exists()


def test_a_result_that_is_there_stays_whole_where_a_new_one_cannot_be_written(tmp_path, monkeypatch, quick_demo):
    out = tmp_path / "demo.png"
    out.write_bytes(b"yesterday's")

    def half(self, path, **_):
        Path(path).write_bytes(b"to")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    result = run("demo", "--steps", 1, "--device", "cpu", "--out", out)
    assert result.exit_code == 1 and "demo.png cannot be written: the disk is full: make room" in result.output
    assert out.read_bytes() == b"yesterday's" and [path.name for path in tmp_path.iterdir()] == ["demo.png"]


# Errors of the system, and bugs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(28, "No space left on device", "a/b.bin"), "a/b.bin cannot be read or written: the disk is full"),
        (PermissionError(13, "Permission denied", "a"), "a cannot be read or written: no permission"),
        (OSError(28, "No space left on device"), "the output cannot be read or written: the disk is full"),
        (MemoryError(), "there is not enough memory for this: ask for fewer or smaller images at a time"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "there is not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "there is not enough memory"),
    ],
    ids=["disk", "permission", "output", "memory", "torch", "cuda"],
)
def test_what_the_system_refuses_is_one_line(error, said, monkeypatch):
    monkeypatch.setattr("ldm_edu.cli.find_recipe", raising(error))
    assert said in one_line(run("train", "toy-demo"))


@pytest.mark.parametrize("bug", [RuntimeError("shapes"), KeyError("a"), TypeError("b"), ValueError("c")], ids=repr)
def test_a_bug_is_not_hidden(bug, monkeypatch):
    monkeypatch.setattr("ldm_edu.cli.find_recipe", raising(bug))
    assert run("train", "toy-demo").exception is bug


def raising(error):
    def broken(*_, **__):
        raise error

    return broken


# What is printed, and where it goes ----------------------------------------------------------------------------------


def test_the_version_is_told():
    assert run("--version").output == f"ldm-edu {version('ldm_edu')}\n"


@pytest.mark.parametrize("charset", ["gbk", "cp1252", "ascii", "shift_jis", "koi8-r"])
def test_no_output_dies_of_a_code_page(charset, tmp_path, monkeypatch, quick_demo):
    """As Windows gives it to a file or a pipe; plainer characters are printed instead."""
    monkeypatch.chdir(tmp_path)
    quick = ["--device", "cpu", "--steps", 1]
    commands = [
        ["--help"],
        *(
            [name, "--help"]
            for name in ("sample", "train", "evaluate", "reconstruct", "demo", "data", "lab", "recipes")
        ),
        ["recipes"],
        ["sample", "그림 ±", *quick],
        ["train", "±²…"],
    ]
    if charset in ("ascii", "gbk"):  # what these print does not depend on the page any further, and takes long
        commands += [
            ["sample", PROMPT, *quick, "--out", "그림 ² ± – ….png"],
            ["evaluate", "--n", 2, *quick],
            ["reconstruct", "--n", 2, "--device", "cpu", "--out", "그림.png"],
            ["demo", *quick],
            ["train", "toy-demo", "--out", "그림"],
        ]
    for words in commands:
        result = CliRunner(charset=charset).invoke(app, [str(word) for word in words])
        assert isinstance(result.exception, SystemExit | None), (words, result.exception)
        assert result.output.strip(), words
    told = CliRunner(charset="gbk").invoke(app, ["recipes"]).output  # in ASCII, click prints UTF-8
    assert "drawn scenes to images of 64^2, the" in told


def small_command(folder: Path, *words: str) -> list[str]:
    """What trains `OWN` in a process of its own, in a second."""
    (folder / "own_module.py").write_text(OWN)
    command = [sys.executable, "-m", "ldm_edu", "--import", "own_module", "train", "shouted", "--device", "cpu"]
    return [*command, "--precision", "fp32", "--out", "run", "--cache-dir", "cache", "--every", "1", *words]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of Unix closes the streams")
@pytest.mark.parametrize(
    "streams", ["2>&-", ">&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full", "| true", "2>&1 | true"]
)
def test_a_training_does_not_end_because_nobody_reads_its_output(streams, tmp_path):
    if "/dev/full" in streams and not Path("/dev/full").exists():
        pytest.skip("no disk that is always full on this system")
    line = f"set -o pipefail; {shlex.join(small_command(tmp_path))} {streams}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "run" / "model" / "config.json").exists(), done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if streams in ("> /dev/full", "| true"):
        assert done.stderr.count("ldm-edu: nothing more can be printed") == 1 and "training goes on" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full on this system")
def test_a_full_disk_under_the_output_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "ldm_edu", "recipes"], stdout=open("/dev/full", "w"), stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "ldm-edu: the output cannot be read or written: the disk is full: make room\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no signals as on Unix")
def test_ctrl_c_while_the_package_is_imported_leaves_no_traceback():
    """A second at most has passed, and torch alone takes longer to be imported."""
    command = [sys.executable, "-X", "importtime", "-m", "ldm_edu", "recipes"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = []
    for line in process.stderr:  # each module, when it has been imported
        seen.append(line)
        if line.rstrip().endswith("ldm_edu.start"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and not out and "Traceback" not in err


def test_only_the_command_lets_ctrl_c_end_at_once():
    code = "import signal, ldm_edu; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("def f(:", "SyntaxError: "),
        ("raise RuntimeError('boom')", r"RuntimeError: boom \(.*broken_module.py, line 1\)"),
        ("x = 1/0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import nowhere_else", "No module named 'nowhere_else'"),
    ],
)
def test_a_module_of_ones_own_that_is_broken_is_named_in_one_line(content, said, tmp_path):
    (tmp_path / "broken_module.py").write_text(content)
    command = [sys.executable, "-m", "ldm_edu", "--import", "broken_module", "recipes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.match(f"ldm-edu: --import broken_module: {said}", done.stderr), done.stderr
