"""Every command of the command line with options of all kinds: it does what was asked, or says why not in one line."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_model import SMALL
from typer.testing import CliRunner

from ldm_edu.cli import app
from ldm_edu.training.recipes import RECIPES, AutoencoderRecipe, FirstStageRecipe, Training

WORK = Path(tempfile.mkdtemp(prefix="fuzz-cli-"))
SMALL.save_pretrained(WORK / "model")
SMALL.first_stage.save_pretrained(WORK / "stage")
(WORK / "a file").write_text("not a folder")
(WORK / "a folder.png").mkdir()
(WORK / "empty").mkdir()


@pytest.fixture(scope="module", autouse=True)
def work():
    before = os.getcwd()
    os.chdir(WORK)
    yield
    os.chdir(before)
    shutil.rmtree(WORK, ignore_errors=True)


def run(*words: str) -> tuple[int, str]:
    """The exit status and what was said; a traceback, or an error of many lines, fails the test."""
    result = CliRunner().invoke(app, [word for word in words if "\x00" not in word], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2), (words, result.output)  # 2: typer's own words about an option
    if result.exit_code == 1:
        _, found, said = result.output.partition("ldm-edu: ")
        assert found and len(said.strip().splitlines()) == 1, (words, result.output)
    return result.exit_code, result.output


def options(**choices: st.SearchStrategy) -> st.SearchStrategy[list[str]]:
    """Some of the options, each with one of its values."""
    chosen = st.fixed_dictionaries({}, optional=choices)
    return chosen.map(lambda found: [w for name, v in found.items() for w in (f"--{name.replace('_', '-')}", str(v))])


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
INTS = st.one_of(st.integers(1, 3), st.sampled_from([0, -1, 2**31, 2**32, 2**64, "two", "", "1.5"]))
FLOATS = st.one_of(st.floats(-5, 5), st.sampled_from(["nan", "inf", "-inf", "1e39", "1e400", "", "much", "0"]))
PLACES = st.sampled_from(
    [
        "new.png",
        "deep/er/new.png",
        "a file/new.png",
        "a folder.png",
        "new.jpg",
        "",
        "n" * 300 + ".png",
        "/proc/new.png",
        "/dev/null/new.png",
        "~nobody/new.png",
        "한국.png",
    ]
)
FOLDERS = st.sampled_from(
    ["model", "stage", "a file", "empty", "nowhere", "", "toy-nothing", "~nobody", "m" * 5000, "."]
)
DEVICES = st.sampled_from(["cpu", "cpu", "auto", "cuda", "cuda:99", "tpu", ""])


@given(
    prompts=st.lists(st.one_of(st.sampled_from(["a red ball", "blue cube"]), TEXT), max_size=2),
    words=options(
        n=INTS, steps=INTS, scale=FLOATS, seed=INTS, sampler=st.sampled_from(["ddim", "ddpm", "x"]), device=DEVICES
    ),
    out=PLACES,
    model=st.one_of(st.just("model"), FOLDERS),
)
def test_sample(prompts, words, out, model):
    Path("new.png").unlink(missing_ok=True)
    code, _ = run("sample", "--model", model, "--out", out, *words, "--", *prompts)
    if code == 0:
        with Image.open(os.path.expanduser(out)) as image:
            assert min(image.size) >= 16


@given(
    words=options(
        n=INTS, split=st.sampled_from(["test", "validation", "train", "x"]), scale=FLOATS, steps=INTS, device=DEVICES
    ),
    model=FOLDERS,
    flags=st.lists(st.sampled_from(["--write", "--choose"]), unique=True),
)
def test_evaluate(words, model, flags):
    big = {str(2**31), str(2**32), str(2**64)} & set(words)
    run("evaluate", model, *words, *flags, *(() if big or "--n" in words else ("--n", "2")))


@given(
    words=options(
        n=INTS,
        size=INTS,
        split=st.sampled_from(["test", "validation", "train", "x"]),
        dataset=st.sampled_from(["toy", "toy-faces", "coco", "folder", "x"]),
        data_dir=FOLDERS,
        device=DEVICES,
        out=PLACES,
    ),
    model=st.one_of(st.just("stage"), FOLDERS),
)
def test_reconstruct(words, model):
    big = {str(2**31), str(2**32), str(2**64)} & set(words)  # as many as there are would be drawn, for minutes
    words = [] if big else words
    asked = [] if "--n" in words else ["--n", "2"]
    run("reconstruct", model, *words, *asked, *([] if "--size" in words else ["--size", "16"]))


@given(
    name=st.sampled_from(["celeba", "coco", "x", ""]),
    words=options(subset=INTS, split=st.sampled_from(["val2017", "x"]), data_dir=FOLDERS),
)
def test_data_without_an_answer(name, words):
    run("data", name, *words)  # nobody accepts the terms, so nothing is downloaded


@pytest.fixture(scope="module")
def tiny():
    training = Training(steps=2, batch_size=2, lr=1e-3, images=4, held_out=2)
    stage = FirstStageRecipe(training=training, channels=32, multipliers=(1, 2), blocks=1, latent_channels=3)
    RECIPES["tiny"] = AutoencoderRecipe(name="tiny", about="", dataset="toy", size=16, first_stage=stage)
    yield
    del RECIPES["tiny"]


@settings(max_examples=max(5, settings.default.max_examples // 5))
@given(
    words=options(
        out=st.sampled_from(["run", "a file", "a file/run", "model", "/proc/run", "n" * 300]),
        max_steps=INTS,
        precision=st.sampled_from(["fp32", "fp64", "fp16", "fp8", ""]),
        every=INTS,
        cache_dir=st.sampled_from(["cache", "a file", "/proc/c"]),
        tracker=st.sampled_from(["x", ""]),
        device=DEVICES,
        data_dir=FOLDERS,
    ),
    flags=st.lists(st.sampled_from(["--resume", "--channels-last"]), unique=True),
    recipe=st.sampled_from(["tiny", "tiny", "tiny", "tinny", ""]),
)
def test_train(tiny, words, flags, recipe):
    shutil.rmtree("run", ignore_errors=True)
    code, _ = run("train", recipe, *words, *flags)
    if code == 0 and "--out" in words:
        assert (Path(words[words.index("--out") + 1]) / "model" / "config.json").exists()


@given(
    words=st.lists(
        st.sampled_from(
            ["--version", "--help", "--import", "os", "no_such_module", "recipes", "lab", "nowhere", "-x", ""]
        ),
        max_size=3,
    )
)
def test_other_words(words):
    if words[:1] != ["lab"] or "nowhere" in words:
        run(*words)


@given(
    words=options(
        out=PLACES, steps=st.sampled_from([0, -1, "x", 10**6]), train_steps=st.sampled_from([0, -1]), device=DEVICES
    )
)
def test_demo_that_cannot_begin(words):
    if not {"--steps", "--train-steps"} & set(words):
        words = [*words, "--train-steps", "0"]
    code, _ = run("demo", *words)
    assert code != 0
