"""The complete proof, by nbgrader's own `generate_assignment` and `autograde`: `make test-exercises`.

All cases of an exercise are handed in as submissions of one class, and graded by `ldm_edu.grading.grade`. A submission
has one case in each of its answers: `test_graders.py`, which runs every case alone, shows that none costs another task.
"""

import copy
import csv
import functools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from exercise import COURSE, NAMES, ROOT, STUB, Case, Exercise

from ldm_edu.grading import Graded, generate, grade, write_feedback, write_grades

EXERCISES = {name: Exercise(name) for name in NAMES}
SECONDS = 5  # how long a cell may run where one never ends


@dataclass(frozen=True)
class Class:
    """A course folder in which one exercise was handed out, handed in and graded."""

    folder: Path
    results: dict[str, Graded]  # what was handed in, by the name of a case
    together: dict[str, list[str]]  # the names of the cases that were handed in with it


def course_folder(folder: Path, name: str, seconds: int | None = None) -> Path:
    """A course with one exercise."""
    shutil.copytree(COURSE / "source" / name, folder / "source" / name)
    config = (COURSE / "nbgrader_config.py").read_text(encoding="utf-8")
    if seconds is not None:
        assert "timeout = 120" in config
        config = config.replace("timeout = 120", f"timeout = {seconds}")
    (folder / "nbgrader_config.py").write_text(config, encoding="utf-8")
    generate(folder)
    return folder


def released(folder: Path, name: str) -> dict:
    return json.loads((folder / "release" / name / f"{name}.ipynb").read_text(encoding="utf-8"))


def hand_in(folder: Path, student: str, name: str, notebook: dict | str) -> None:
    place = folder / student / name / f"{name}.ipynb"
    place.parent.mkdir(parents=True)
    place.write_text(notebook if isinstance(notebook, str) else json.dumps(notebook), encoding="utf-8")


def answered(folder: Path, exercise: Exercise, changed: dict[str, str] | None = None) -> dict:
    """What was handed out, with every answer of the solution, or a changed one, filled in."""
    notebook = released(folder, exercise.name)
    for cell in notebook["cells"]:
        if cell["id"] in exercise.answers:
            cell["source"] = (changed or {}).get(cell["id"], exercise.answers[cell["id"]])
    return notebook


def bundles(cases: list[Case]) -> list[list[Case]]:
    """Cases that can be handed in together: of different answers, and of the same student."""
    found: list[list[Case]] = []
    for case in cases:
        fitting = (b for b in found if b[0].student == case.student and case.answer not in {c.answer for c in b})
        if (bundle := next(fitting, None)) is None:
            found.append([case])
        else:
            bundle.append(case)
    return found


def submissions(exercise: Exercise) -> list[tuple[list[str], str, dict[str, str] | None]]:
    """Names, student ("": one of their own) and changed answers of everything that a class hands in."""
    found = [(["solution"], "", {}), (["as handed out"], "", None), (["stub"], "", exercise.every_answer(STUB))]
    for kind in ("misconceptions", "right_answers"):
        for bundle in bundles(getattr(exercise, kind)):
            changed = {cell: source for case in bundle for cell, source in exercise.patched(case).items()}
            found.append(([f"{kind}/{case.name}" for case in bundle], bundle[0].student, changed))
    return found


@pytest.fixture(scope="session")
def graded(tmp_path_factory):
    """A function that grades everything of an exercise, once."""

    @functools.cache
    def graded(name: str) -> Class:
        exercise = EXERCISES[name]
        folder = course_folder(tmp_path_factory.mktemp(name), name)
        rounds: list[dict[str, list[str]]] = []  # of each: student to the names of what is handed in
        for i, (what, student, changed) in enumerate(submissions(exercise)):
            student = student or f"student-{i:02d}"
            free = next((k for k, taken in enumerate(rounds) if student not in taken), len(rounds))
            if free == len(rounds):
                rounds.append({})
            rounds[free][student] = what
            notebook = released(folder, name) if changed is None else answered(folder, exercise, changed)
            hand_in(folder / f"submitted-{free}", student, name, notebook)
        results, together = {}, {}
        for k, taken in enumerate(rounds):
            for one in grade(folder, folder / f"submitted-{k}"):
                results |= dict.fromkeys(taken[one.student], one)
                together |= dict.fromkeys(taken[one.student], taken[one.student])
        return Class(folder, results, together)

    return graded


# --- What goes wrong in a class ---


def odd_submissions(folder: Path) -> dict[str, dict | str]:
    """By the name of the student, what is handed in."""
    exercise = EXERCISES["21_diffusion"]

    def with_body(body: str) -> dict:
        return answered(folder, exercise, {"diffuse": f"def diffuse(x0, t, alpha, sigma):\n{body}"})

    def changed(change) -> dict:
        notebook = answered(folder, exercise)
        change(notebook["cells"], [cell["id"] for cell in notebook["cells"]].index("test-diffuse"))
        return notebook

    swallow = "    while True:\n        try:\n            while True: pass\n        except KeyboardInterrupt: pass"
    return {
        "allocates": with_body("    return bytearray(200 * 2**30)"),
        "ann": answered(folder, exercise),
        "copied": changed(lambda cells, i: cells.insert(i, copy.deepcopy(cells[i]))),
        "deleted": changed(lambda cells, i: cells.pop(i)),
        "edited": changed(lambda cells, i: cells[i].update(source="pass")),
        "empty": {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5},
        "exits": with_body("    import os; os._exit(0)"),
        "loops": with_body("    while True: pass"),
        "metadata": changed(lambda cells, i: [cell.update(metadata={}) for cell in cells]),
        "no-json": "This is my answer.",
        "swallows": with_body(swallow),
        "syntax": with_body("    return x0,, t"),
        "warns": answered(
            folder,
            exercise,
            {
                "diffuse": exercise.answers["diffuse"].replace(
                    "noise =", "import warnings; warnings.warn('careful'); noise ="
                )
            },
        ),
        "zoe": answered(folder, exercise),
    }


@pytest.fixture(scope="session")
def odd(tmp_path_factory) -> Class:
    """A class in which everything goes wrong."""
    folder = course_folder(tmp_path_factory.mktemp("odd"), "21_diffusion", seconds=SECONDS)
    for student, notebook in odd_submissions(folder).items():
        hand_in(folder / "submitted", student, "21_diffusion", notebook)
    (folder / "submitted" / "nothing" / "21_diffusion").mkdir(parents=True)
    (folder / "submitted" / "links" / "21_diffusion").mkdir(parents=True)
    link = folder / "submitted" / "links" / "21_diffusion" / "21_diffusion.ipynb"
    link.symlink_to(folder / "submitted" / "ann" / "21_diffusion" / "21_diffusion.ipynb")
    (folder / "submitted" / "elsewhere").mkdir()
    (folder / "submitted" / "elsewhere" / "21_diffusion.ipynb").write_text("{}", encoding="utf-8")
    before = {p: p.read_bytes() for p in (folder / "submitted").rglob("*.ipynb")}
    results = {one.student: one for one in grade(folder)}
    assert before == {p: p.read_bytes() for p in (folder / "submitted").rglob("*.ipynb")}, (
        "what was handed in has changed"
    )
    return Class(folder, results, {})


@pytest.mark.parametrize(
    ("student", "score", "reason"),
    [
        ("ann", 8, None),
        ("zoe", 8, None),
        ("warns", 8, None),
        ("copied", 8, "test-diffuse stands more than once"),
        ("deleted", 8, "test-diffuse was missing and is put back"),
        ("edited", 8, "test-diffuse differs from what is handed out now"),
        ("metadata", 8, "had lost their metadata"),
        ("allocates", 5, "test-diffuse failed: MemoryError"),
        ("loops", 5, "test-diffuse failed: it ran longer than a cell may"),
        ("syntax", 5, "the cell diffuse failed: SyntaxError"),
        ("exits", 0, "the kernel died"),
        ("swallows", 5, "test-diffuse failed: it ran longer than a cell may"),
        ("empty", 0, "it has no cells"),
        ("no-json", 0, "holds no JSON"),
        ("nothing", 0, "21_diffusion.ipynb is missing"),
        ("links", 0, "is a link to another file"),
    ],
)
def test_an_odd_submission_is_graded_or_refused_with_its_reason(odd, student: str, score: float, reason: str | None):
    one = odd.results[student]
    assert one.score == score and one.most == 8, one
    ours = [text for text in one.reasons if not text.startswith("STUDENT is")]
    assert (reason in "; ".join(ours)) if reason else not ours, one.reasons


def test_all_that_was_handed_in_is_in_the_table(odd, tmp_path):
    write_grades(list(odd.results.values()), tmp_path / "grades.csv")
    with open(tmp_path / "grades.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["student"] for row in rows) == sorted(p.name for p in (odd.folder / "submitted").iterdir())
    assert {row["max_score"] for row in rows if row["exercise"]} == {"8"}
    (stray,) = [row for row in rows if not row["exercise"]]
    assert stray["student"] == "elsewhere" and "not graded: 21_diffusion.ipynb" in stray["reason"]
    assert all(row["reason"] for row in rows if row["score"] == "0")


def test_feedback_tells_what_is_wrong_and_shows_no_test(odd, tmp_path):
    files = write_feedback(list(odd.results.values()), tmp_path)
    assert len(files) == len(odd.results) - 1  # not of what belongs to no exercise
    page = (tmp_path / "syntax" / "21_diffusion.md").read_text(encoding="utf-8")
    assert "5 of 8 points" in page and "SyntaxError" in page and "assert " not in page and "closed_book" not in page


def test_no_kernel_is_left_over(odd):
    import psutil

    (server,) = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    gone, alive = psutil.wait_procs(server.children(), timeout=20)
    assert odd.results and not alive


def test_nbgrader_goes_on_from_here(odd):
    """The gradebook and the folders are nbgrader's own: formgrader and `nbgrader export` see the same points."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{odd.folder / 'gradebook.db'}", "ldm_edu") as book:
        scores = {s.student.id: s.score for s in book.assignment_submissions("21_diffusion")}
    assert scores["ann"] == scores["zoe"] == 8 and scores["syntax"] == 5
    assert scores["exits"] == scores["empty"] == scores["links"] == 0
    assert (odd.folder / "autograded" / "ann" / "21_diffusion" / "21_diffusion.ipynb").is_file()


def test_the_extension_of_nbgrader_fits_this_jupyterlab():
    import subprocess
    import sys

    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    listed = subprocess.run(
        [sys.executable, "-m", "jupyter", "labextension", "list"], capture_output=True, text=True, timeout=120, env=env
    )
    text = listed.stdout + listed.stderr
    assert "@jupyter/nbgrader" in text and "OK" in text[text.index("@jupyter/nbgrader") :].split("\n")[0], text


def test_a_later_submission_replaces_the_earlier_one_everywhere(tmp_path):
    from nbgrader.api import Gradebook

    folder = course_folder(tmp_path / "course", "21_diffusion")
    hand_in(folder / "first", "ann", "21_diffusion", answered(folder, EXERCISES["21_diffusion"]))
    hand_in(folder / "second", "ann", "21_diffusion", "nothing any more")
    assert [one.score for one in grade(folder, folder / "first")] == [8]
    assert [one.score for one in grade(folder, folder / "second")] == [0]
    with Gradebook(f"sqlite:///{folder / 'gradebook.db'}", "ldm_edu") as book:
        assert book.find_submission("21_diffusion", "ann").score == 0
    assert not (folder / "autograded" / "ann" / "21_diffusion").exists()


def test_a_broken_exercise_is_the_reason_and_ends_nothing(tmp_path):
    folder = course_folder(tmp_path / "course", "21_diffusion")
    hand_in(folder / "submitted", "ann", "21_diffusion", released(folder, "21_diffusion"))
    source = folder / "source" / "21_diffusion" / "21_diffusion.ipynb"
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace("### END SOLUTION", "### END", 1), encoding="utf-8")
    (one,) = grade(folder)
    assert "cannot be handed out" in one.reasons[0] and "no end solution statement found" in one.reasons[0]


# --- Every case of every exercise ---


def lost(one: Graded) -> set[str]:
    return {task.name for task in one.tasks if task.points < task.most}


def everything(kind: str) -> list:
    return [
        pytest.param(name, case, id=f"{name}-{kind[:-1]}-{case.name}")
        for name, exercise in EXERCISES.items()
        for case in getattr(exercise, kind)
    ]


SOME = pytest.mark.parametrize("name", NAMES)


@SOME
def test_the_solution_gets_full_marks(graded, name: str):
    one = graded(name).results["solution"]
    assert one.score == one.most == sum(EXERCISES[name].tests.values()), one.tasks


@SOME
@pytest.mark.parametrize("what", ["as handed out", "stub"])
def test_no_answer_gets_no_points(graded, name: str, what: str):
    one = graded(name).results[what]
    assert one.score == 0 and one.most == sum(EXERCISES[name].tests.values())
    assert not [reason for reason in one.reasons if "failed" in reason], "a cell without points raises"


@pytest.mark.parametrize(("name", "case"), everything("misconceptions"))
def test_a_misconception_loses_its_points(graded, name: str, case: Case):
    everybody, which = graded(name), f"misconceptions/{case.name}"
    one, handed_in = everybody.results[which], everybody.together[which]
    task = next(task for task in one.tasks if task.name == case.loses)
    assert task.points == 0 and case.says in task.message, task
    meant = {other.loses for other in EXERCISES[name].misconceptions if f"misconceptions/{other.name}" in handed_in}
    assert lost(one) <= meant | {"test-picture"}, one.tasks
    assert not [reason for reason in one.reasons if "failed" in reason], one.reasons


@pytest.mark.parametrize(("name", "case"), everything("right_answers"))
def test_another_right_answer_gets_full_marks(graded, name: str, case: Case):
    one = graded(name).results[f"right_answers/{case.name}"]
    assert one.score == one.most, one.tasks


@SOME
def test_what_ships_is_what_nbgrader_hands_out(graded, name: str, tmp_path):
    from ldm_edu.exercises.student import save_student_version

    save_student_version(graded(name).folder / "release" / name / f"{name}.ipynb", tmp_path / "new.ipynb")
    shipped = ROOT / "ldm_edu" / "exercises" / "notebooks" / f"{name}.ipynb"
    assert shipped.read_text(encoding="utf-8") == (tmp_path / "new.ipynb").read_text(encoding="utf-8"), "make exercises"
