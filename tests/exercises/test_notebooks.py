"""The form of the exercise notebooks, the student version of them, and what keeps the two apart."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from exercise import COURSE, NAMES, REGION, ROOT, Exercise

from ldm_edu.exercises.student import COLAB, exercise_names, write_exercises

EXERCISES = {name: Exercise(name) for name in NAMES}
SOME = pytest.mark.parametrize("name", NAMES)
HIDDEN = re.compile(r"^### BEGIN HIDDEN TESTS\n.*?^### END HIDDEN TESTS\n?", re.M | re.S)
YOUR_CODE = "# YOUR CODE HERE\nraise NotImplementedError()"  # what nbgrader puts in place of a solution


def student_notebook(name: str) -> dict:
    folder = ROOT / "ldm_edu" / "exercises" / "notebooks"
    return json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8"))


def cleared(source: str) -> str:
    """The source of a cell without its solution and its hidden tests."""
    lines = YOUR_CODE.split("\n")
    source = REGION.sub(lambda m: "\n".join(m[1] + line for line in lines), source)
    return HIDDEN.sub("", source).rstrip("\n")


# --- The notebooks with the solutions ---


@SOME
def test_the_notebook_is_valid_and_its_ids_agree(name: str):
    exercise = EXERCISES[name]
    notebook = nbformat.read(exercise.path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if (meta := cell.metadata.get("nbgrader")) is not None:
            assert meta["grade_id"] == cell.id and meta["schema_version"] == 3
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert all(text.count("### BEGIN SOLUTION") == 1 for text in exercise.answers.values())
    assert list(exercise.tests)[-1] == "test-picture"


@SOME
def test_every_answer_is_the_body_of_a_documented_function(name: str):
    for cell, source in EXERCISES[name].answers.items():
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        assert functions and all(ast.get_docstring(f) or f.name.startswith("__") for f in functions), cell
        assert re.search(r"^[ \t]+### BEGIN SOLUTION$", source, re.M), f"{cell}: would raise as handed out"


@SOME
def test_every_test_speaks_and_gives_no_partial_credit(name: str):
    for cell in EXERCISES[name].cells:
        if not cell["metadata"].get("nbgrader", {}).get("grade"):
            continue
        tree = ast.parse(cell["source"])
        asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        assert asserts and all(node.msg is not None for node in asserts), f"{cell['id']}: an assert without a message"
        last = tree.body[-1]
        if isinstance(last, ast.Expr):  # nbgrader takes a number that a cell ends with for points
            assert isinstance(last.value, ast.Call) and ast.unparse(last.value.func) in (
                "show",
                "show_rows",
                "plt.show",
                "print",
                "draw",  # of the notebook: it draws and returns nothing
            ), f"{cell['id']} ends in an expression"


@SOME
def test_there_are_no_widgets_and_no_magics(name: str):
    text = "\n".join(cell["source"] for cell in EXERCISES[name].cells if cell["cell_type"] == "code")
    assert not re.search(r"ipywidgets|anywidget|\bexplore\(|^\s*[%!]|get_ipython", text, re.M)


@SOME
def test_the_lesson_and_the_exercise_know_each_other(name: str):
    first = EXERCISES[name].cells[0]["source"]
    link = re.search(r"\| lesson \| \[(\w+)\]\(([^)]+)\) \|", first)
    assert link and link[1] == name
    lesson = (EXERCISES[name].path.parent / link[2]).resolve()
    assert lesson.is_file() and lesson.stem == name
    back = f"](../../ldm_edu/exercises/notebooks/{name}.ipynb)"
    assert back in lesson.read_text(encoding="utf-8"), "the lesson has no link to its exercise"
    points = re.search(r"\| points \| (\d+) \|", first)
    assert points and int(points[1]) == sum(EXERCISES[name].tests.values())
    assert re.search(r"\| time \| \d+ minutes \|", first)


def test_nbdev_keeps_what_makes_a_notebook_an_exercise(tmp_path):
    source = COURSE / "source" / "21_diffusion" / "21_diffusion.ipynb"
    copy = tmp_path / source.name
    copy.write_text(source.read_text(encoding="utf-8").replace('"outputs": []', '"outputs": []', 1), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("nbdev-clean")), "--fname", str(copy)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
    before, after = (json.loads(path.read_text(encoding="utf-8"))["cells"] for path in (source, copy))
    kept = [cell["metadata"].get("nbgrader") for cell in after]
    assert kept == [cell["metadata"].get("nbgrader") for cell in before] and sum(map(bool, kept)) >= 8


# --- What is handed out ---


def test_every_exercise_ships():
    assert exercise_names() == NAMES and len(NAMES) >= 15


@SOME
def test_the_student_version_is_the_notebook_without_its_answers(name: str):
    shipped = {cell["id"]: cell for cell in student_notebook(name)["cells"]}
    assert "".join(shipped.pop("colab")["source"]) == COLAB
    assert list(shipped) == [cell["id"] for cell in EXERCISES[name].cells]
    for cell in EXERCISES[name].cells:
        expected = cleared(cell["source"]).replace("](../../../", "](../")
        assert "".join(shipped[cell["id"]]["source"]).rstrip("\n") == expected, f"{cell['id']}: run `make exercises`"
        graded = bool(cell["metadata"].get("nbgrader", {}).get("grade"))
        assert (shipped[cell["id"]]["metadata"].get("tags") == ["raises-exception"]) == graded


@SOME
def test_the_student_version_gives_nothing_away(name: str):
    shipped = json.dumps(student_notebook(name), ensure_ascii=False)
    assert "HIDDEN TESTS" not in shipped and "SOLUTION" not in shipped
    exercise = EXERCISES[name]
    solved = [
        line.strip() for text in exercise.answers.values() for m in REGION.finditer(text) for line in m[2].split("\n")
    ]
    hidden = [
        line.strip() for cell in exercise.cells for text in HIDDEN.findall(cell["source"]) for line in text.split("\n")
    ]
    given = {line.strip() for cell in exercise.cells for line in cleared(cell["source"]).split("\n")}
    secret = {line for line in solved + hidden if len(line) >= 20 and line not in given}
    assert len(secret) >= 10
    lines = {line.strip() for cell in student_notebook(name)["cells"] for line in "".join(cell["source"]).split("\n")}
    assert not secret & lines
    whole = "\n".join("".join(cell["source"]) for cell in student_notebook(name)["cells"])
    assert not [line for line in secret if line in whole]


def test_exercises_are_written_and_never_overwritten(tmp_path):
    new, kept = write_exercises(tmp_path / "mine", ["21_diffusion"])
    assert [path.name for path in new] == ["21_diffusion.ipynb", "pyproject.toml"] and not kept
    (tmp_path / "mine" / "21_diffusion.ipynb").write_text("my answers", encoding="utf-8")
    new, kept = write_exercises(tmp_path / "mine")
    assert [path.name for path in kept] == ["21_diffusion.ipynb", "pyproject.toml"] and len(new) == len(NAMES) - 1
    assert (tmp_path / "mine" / "21_diffusion.ipynb").read_text(encoding="utf-8") == "my answers"


def test_nbdev_works_in_the_folder_of_a_student(tmp_path):
    write_exercises(tmp_path, ["21_diffusion"])
    shutil.copy(ROOT / "settings.ini", tmp_path)
    command = [str(Path(sys.executable).with_name("nbdev-clean")), "--fname", "21_diffusion.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["release", "submitted", "repaired", "autograded", "feedback", "gradebook.db"])
def test_git_ignores_what_grading_writes(name: str):
    done = subprocess.run(["git", "check-ignore", "-q", f"nbs/exercises/{name}/x.ipynb"], cwd=ROOT)
    assert done.returncode == 0, "nothing that a student handed in may be committed"


def test_git_keeps_the_sources():
    for path in ("source/21_diffusion/21_diffusion.ipynb", "nbgrader_config.py"):
        assert subprocess.run(["git", "check-ignore", "-q", f"nbs/exercises/{path}"], cwd=ROOT).returncode == 1


def test_pytest_runs_no_exercise():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "nbs/exercises"]
    done = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert "no tests" in done.stdout or "no tests" in done.stderr


def test_the_index_and_the_page_for_instructors_show_every_exercise():
    index = (ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")
    instructors = (ROOT / "INSTRUCTORS.md").read_text(encoding="utf-8")
    for name in NAMES:
        first = EXERCISES[name].cells[0]["source"]
        about = {key: re.search(rf"\| {key} \| (.*?)(?: minutes)? \|", first) for key in ("you will practise", "time")}
        practise, minutes = (match[1] for match in about.values() if match)
        points = f"{sum(EXERCISES[name].tests.values()):g}"
        assert f"| [{name}](../ldm_edu/exercises/notebooks/{name}.ipynb) | {practise} | {minutes} |" in index
        assert f"| {name} | {minutes} | {points} |" in instructors
        assert re.search(rf"\| \d \|.*\b{name}\b.*\|", instructors), f"{name} is in no week"
