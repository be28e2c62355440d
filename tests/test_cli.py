"""The command line, as a user types it."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ldm_edu import LatentDiffusion
from ldm_edu.checkpoints import PRETRAINED
from ldm_edu.cli import app
from ldm_edu.files import load_notes

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
    """`celeba64` in miniature: both stages on the real subset, then samples without text."""
    out = tmp_path / "run"
    result = run("train", "celeba64", "--data-dir", real_data, "--out", out, "--max-steps", 2, "--every", 1)
    assert result.exit_code == 0, result.output
    log = (out / "log.jsonl").read_text()
    assert '"psnr"' in log and '"held_out"' in log
    result = run("sample", "--model", out / "model", "--n", 2, "--steps", 2, "--out", tmp_path / "x.png")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["demo", "lab", "data", "recipes", "train", "sample", "evaluate", "reconstruct"])
def test_every_command_explains_itself(command):
    result = run(command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_the_demonstration_says_where_to_go_on(tmp_path, monkeypatch):
    """Without its training, and at one scale; the pages that it names exist."""
    monkeypatch.setattr("ldm_edu.cli._SCALES", (1.0,))
    monkeypatch.setattr("ldm_edu.cli.train_recipe", lambda *_, **__: LatentDiffusion.from_pretrained("toy-text2image"))
    result = run("demo", "--steps", 1, "--device", "cpu", "--out", tmp_path / "demo.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "demo.png").is_file()
    pages = [path.stem for path in Path(__file__).parents[1].glob("nbs/*/*.ipynb")]
    named = re.findall(r"\d\d_\w+", result.output)
    assert len(named) == 3 and set(named) <= set(pages)


def test_scores_become_a_part_of_the_model(tmp_path):
    shutil.copytree(PRETRAINED / "toy-text2image", tmp_path / "model")
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    words = ["evaluate", tmp_path / "model", "--n", 4, "--steps", 2, "--choose", "--write", "--device", "cpu"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "every thing of the caption" in result.output and "judge, drawn" in result.output
    after = json.loads((tmp_path / "model" / "config.json").read_text())
    scores = after["provenance"].pop("scores")
    before["provenance"].pop("scores", None)
    assert after == before
    assert scores["steps"] == 2 and str(scores["scale"]) in scores["validation"] and len(scores["validation"]) == 6
    assert scores["test"]["every thing of the caption"] in result.output
    refused = run("evaluate", "toy-text2image", "--write")
    assert refused.exit_code == 1 and "no folder" in refused.output


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """A real process, as a user starts it, and a real Ctrl-C."""
    out, cache = tmp_path / "run", tmp_path / "cache"
    words = ["train", "toy-demo", "--out", str(out), "--cache-dir", str(cache), "--every", "1", "--device", "cpu"]
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
(text,) = demo.diffusion.conditioners
diffusion = replace(demo.diffusion, conditioners=(replace(text, name="Shouted"),), training=replace(
    demo.diffusion.training, images=8, batch_size=4))
first = replace(demo.first_stage, training=replace(demo.first_stage.training, images=8, batch_size=4))
RECIPES["shouted"] = replace(demo, name="shouted", diffusion=diffusion, first_stage=first)
"""


def test_a_module_of_ones_own_is_imported_first(tmp_path):
    """In processes of their own, as a user does it: trained, and asked for an image."""
    (tmp_path / "own_module.py").write_text(OWN)
    command = [sys.executable, "-m", "ldm_edu"]

    def typed(*words):
        return subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)

    own = ("--import", "own_module")
    done = typed(*own, "train", "shouted", "--device", "cpu", "--out", "run", "--cache-dir", "cache")
    assert done.returncode == 0, done.stderr
    done = typed(*own, "sample", "a red ball", "--model", "run/model", "--steps", "2", "--device", "cpu")
    assert done.returncode == 0 and (tmp_path / "sample.png").exists(), done.stderr
    done = typed("sample", "a red ball", "--model", "run/model")
    assert done.returncode == 1 and "class 'Shouted' is not known" in done.stderr and "Traceback" not in done.stderr
    done = typed("--import", "nowhere", "recipes")
    assert done.returncode == 1 and "--import nowhere: No module named 'nowhere'" in done.stderr
