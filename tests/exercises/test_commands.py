"""`ldm-edu exercises`, `generate`, `grade` and `challenge`: what they write, and what they refuse. Grading itself is
tested by test_by_nbgrader.py."""

import csv
import json
import shutil

import pytest
from exercise import COURSE, NAMES, Exercise
from typer.testing import CliRunner

from ldm_edu.cli import app


def run(*words) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, " ".join(result.output.split())


def test_a_student_gets_the_exercises(tmp_path):
    code, said = run("exercises", tmp_path / "mine")
    assert code == 0 and f"{len(NAMES) + 1} files written" in said
    assert sorted(p.stem for p in (tmp_path / "mine").glob("*.ipynb")) == NAMES
    code, said = run("exercises", tmp_path / "mine", "--only", "21_diffusion")
    assert code == 0 and "kept as they were: 21_diffusion.ipynb, pyproject.toml" in said


def test_an_instructor_generates_and_grades(tmp_path):
    """The whole way of an exercise: handed out by one command, handed in, graded by another."""
    course = tmp_path / "course"
    shutil.copytree(COURSE / "source" / "21_diffusion", course / "source" / "21_diffusion")
    shutil.copy(COURSE / "nbgrader_config.py", course)
    code, said = run("generate", course, "--students", tmp_path / "students")
    assert code == 0 and "1 exercise in" in said
    exercise = Exercise("21_diffusion")
    notebook = json.loads((tmp_path / "students" / "21_diffusion.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = exercise.answers.get(cell["id"], "".join(cell["source"]))
    place = tmp_path / "inbox" / "ann" / "21_diffusion" / "21_diffusion.ipynb"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(notebook), encoding="utf-8")
    (tmp_path / "inbox" / "bob" / "21_diffusion").mkdir(parents=True)
    out = tmp_path / "grades.csv"
    code, said = run(
        "grade", course, "--submitted", tmp_path / "inbox", "--out", out, "--feedback", tmp_path / "feedback"
    )
    assert code == 0 and "ann 21_diffusion 8 of 8" in said and "bob 21_diffusion 0 of 8" in said
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["score"] for row in rows] == ["8", "0"] and rows[1]["reason"] == "21_diffusion.ipynb is missing"
    assert "8 of 8 points" in (tmp_path / "feedback" / "ann" / "21_diffusion.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["exercises", "mine", "--only", "99_nothing"],
            "exercise '99_nothing' is not known; it can be 11_autoencoder,",
        ),
        (["generate", "nowhere"], "nowhere is no course folder of nbgrader"),
        (["grade", "nowhere"], "nowhere is no course folder of nbgrader"),
        (
            ["grade", COURSE, "--submitted", "nowhere"],
            "nowhere is no folder: it should hold STUDENT/EXERCISE/EXERCISE.ipynb",
        ),
        (["grade", COURSE, "--submitted", "."], "holds no submission"),
        (["grade", COURSE, "--only", "99_nothing"], "exercise '99_nothing' is not known"),
        (["challenge", "nowhere"], "nowhere should hold a model's folder for each student"),
        (["challenge", ".", "--split", "train"], "--split"),
    ],
)
def test_nonsense_is_refused(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = run(*words)
    assert code == 1 and says in said.replace(f"{tmp_path}/", "") and not list(tmp_path.rglob("*.csv"))
