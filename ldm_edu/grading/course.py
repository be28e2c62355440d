"""A folder of submissions, graded by nbgrader one at a time: points, reasons and feedback, whatever was handed in."""

import csv
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

from ldm_edu.errors import DataError, LDMError
from ldm_edu.files import folder_for, load_json, printable, save_json, write_bytes, write_text
from ldm_edu.grading.repair import grade_id, read_submission, repair

__all__ = ["Graded", "Task", "generate", "grade", "write_feedback", "write_grades"]

TOO_LONG = "it ran longer than a cell may"
REPAIRED = "repaired"  # copies of the submissions that nbgrader reads; what was handed in is never changed


@dataclass(frozen=True)
class Task:
    "One test cell of a submission: what it is worth, what it earned, and what it said."

    name: str  # grade_id of the test cell
    points: float  # what the submission earned
    most: float  # what the test is worth
    message: str = ""  # of the exception that the test raised


@dataclass(frozen=True)
class Graded:
    "One submission and what it earned."

    student: str
    exercise: str
    tasks: list[Task] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # what an instructor should know: repairs, errors, refusals

    @property
    def score(self) -> float:
        "The points that were earned."
        return float(sum(task.points for task in self.tasks))

    @property
    def most(self) -> float:
        "The points that could be earned."
        return float(sum(task.most for task in self.tasks))


def _nbgrader(course: Path, submitted: str | None = None) -> Any:
    "nbgrader's API for a course, with the settings of the course's own nbgrader_config.py."
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # alembic
    try:
        from nbgrader.apps import NbGraderAPI
    except ImportError as error:
        raise LDMError('nbgrader is not installed: pip install "ldm_edu[grading]"') from error
    from traitlets.config.loader import Config, PyFileConfigLoader

    if not (course / "source").is_dir():
        raise DataError(f"{course} is no course folder of nbgrader: it has no folder source/ with the exercises")
    config = Config()
    if (course / "nbgrader_config.py").is_file():
        config = PyFileConfigLoader("nbgrader_config.py", path=str(course)).load_config()
    config.CourseDirectory.root = str(course)
    if submitted is not None:
        config.CourseDirectory.submitted_directory = submitted
    api = NbGraderAPI(config=config)
    api.log_level = "WARN"
    return api


@contextmanager
def _quiet() -> Iterator[None]:
    "Without the warnings of nbgrader's database layer and of Jupyter's event loop, which mean nothing here."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _last_error(result: dict[str, Any]) -> str:
    "The last line of what nbgrader logged or raised that names an error."
    if re.search(r"\bDeadKernelError\b", f"{result.get('log', '')}{result.get('error', '')}"):
        return "the kernel died: a cell ended the process, or took more memory than there is"
    lines = [line.strip() for line in f"{result.get('log', '')}\n{result.get('error', '')}".splitlines()]
    lines = [line for line in lines if "Please see the the above traceback" not in line]  # which is not shown
    told = [line for line in lines if re.match(r"(\[ERROR\] )?[\w.]*(Error|Exception|Exit|Kernel\w+)\b.*:", line)]
    return printable((told or [line for line in lines if line] or ["nbgrader gave no reason"])[-1])[:300]


def exercises_of(course: Path) -> list[str]:
    "The names of a course's exercises."
    names = sorted(p.name for p in (course / "source").glob("*") if (p / f"{p.name}.ipynb").is_file())
    if not names:
        raise DataError(f"{course / 'source'} holds no exercise: NAME/NAME.ipynb is expected")
    return names


def _chosen(names: Sequence[str], course: Path) -> list[str]:
    "The exercises that are meant: those named, or all."
    known = exercises_of(course)
    for name in names:
        if name not in known:
            raise LDMError(f"exercise {name!r} is not known; it can be {', '.join(known)}")
    return list(names) or known


def generate(
    course: str | Path,  # nbgrader's course folder, with source/NAME/NAME.ipynb
    names: Sequence[str] = (),  # exercises; default: all
) -> list[Path]:
    "Write the version to hand out of each exercise, without solutions and hidden tests, to release/ of the course."
    course = Path(course).resolve()
    api, written = _nbgrader(course), []
    for name in _chosen(names, course):
        with _quiet():
            result = api.generate_assignment(name)
        file = Path(api.coursedir.format_path(api.coursedir.release_directory, ".", name)) / f"{name}.ipynb"
        if not result["success"] or not file.is_file():
            raise DataError(f"the exercise {name} cannot be handed out: {_last_error(result)}")
        written.append(file)
    return written


def _error_of(cell: dict[str, Any]) -> str:
    "The exception that a cell raised, in one line; empty where it raised none."
    for output in cell.get("outputs", []):
        if output["output_type"] == "error":
            if output["ename"] in ("CellTimeoutError", "KeyboardInterrupt"):  # nbclient interrupts at the limit
                return TOO_LONG
            if output["ename"] == "NotImplementedError":
                return "not answered yet"
            text = " ".join(str(output["evalue"]).split())
            told = text if output["ename"] == "AssertionError" else f"{output['ename']}: {text}".rstrip(": ")
            return printable(told or "AssertionError")[:400]
    return ""


def _tasks(released: dict[str, Any], autograded: dict[str, Any] | None, scores: dict[str, float | None]) -> list[Task]:
    "The test cells of an exercise with what they earned and said."
    said = {} if autograded is None else {grade_id(cell): _error_of(cell) for cell in autograded["cells"]}
    found = []
    for cell in released["cells"]:
        meta = cell["metadata"].get("nbgrader", {})
        if meta.get("grade"):
            name = meta["grade_id"]
            found.append(Task(name, scores.get(name) or 0.0, float(meta["points"]), said.get(name, "")))
    return found


def _crashes(autograded: dict[str, Any]) -> list[str]:
    "One line for each cell that ran too long or too large, and for each without points that raised an exception."
    lines = []
    for cell in autograded["cells"]:
        meta = cell["metadata"].get("nbgrader", {})
        error = _error_of(cell)
        if error and (not meta.get("grade") or error == TOO_LONG or error.startswith("MemoryError")):
            lines.append(f"the cell {meta.get('grade_id', cell.get('id'))} failed: {error}")
    return lines


def _notebook(folder: Path, name: str) -> Path:
    "The notebook of a submission; DataError where there is none, or a link to a file of somebody else."
    file = folder / f"{name}.ipynb"
    if file.is_symlink() or folder.is_symlink():
        raise DataError(f"{name}.ipynb is a link to another file: the notebook itself should be handed in")
    if file.is_file():
        return file
    others = sorted(p.name for p in folder.iterdir())
    raise DataError(f"{name}.ipynb is missing" + (f"; there is {', '.join(others)}" if others else ""))


def _copy_the_rest(submission: Path, place: Path) -> list[str]:
    "Copy what lies beside the notebook of a submission, such as its time; a note where there are more notebooks."
    rest = sorted(p for p in submission.iterdir() if p.is_file() and not p.is_symlink() and p.name != place.name)
    for file in rest:
        if file.suffix != ".ipynb":
            write_bytes(file.read_bytes(), place.with_name(file.name))
    more = [file.name for file in rest if file.suffix == ".ipynb"]
    return [f"not graded: {', '.join(more)}"] if more else []


def _refused(api: Any, course: Path, student: str, name: str, released: dict[str, Any], reasons: list[str]) -> Graded:
    "A submission without points, also in nbgrader's gradebook, where an earlier one may have had some."
    from nbgrader.api import Gradebook

    rmtree(course / "autograded" / student / name, ignore_errors=True)
    with Gradebook(api.coursedir.db_url, api.coursedir.course_id) as book:
        book.update_or_create_student(student)
        for notebook in book.update_or_create_submission(name, student).notebooks:
            for given in notebook.grades:
                given.auto_score, given.needs_manual_grade = 0, False
        book.db.commit()
    return Graded(student, name, _tasks(released, None, {}), reasons)


def _grade_one(api: Any, course: Path, submission: Path, student: str, name: str, memory: float | None) -> Graded:
    "Grade one submission; whatever goes wrong becomes its reason."
    from nbgrader.api import Gradebook

    from ldm_edu.grading.warm import kernels

    released = load_json(course / "release" / name / f"{name}.ipynb")
    try:
        notebook = read_submission(_notebook(submission, name))
        notes = repair(notebook, released, student)
    except DataError as error:
        with _quiet():
            return _refused(api, course, student, name, released, [str(error)])
    place = course / REPAIRED / student / name / f"{name}.ipynb"
    folder_for(place)
    save_json(notebook, place)
    notes += _copy_the_rest(submission, place)
    with _quiet(), kernels(memory, student):
        result = api.autograde(name, student)
    file = course / "autograded" / student / name / f"{name}.ipynb"
    if not result["success"] or not file.is_file():
        with _quiet():
            return _refused(api, course, student, name, released, [*notes, f"not graded: {_last_error(result)}"])
    autograded = load_json(file)
    with Gradebook(api.coursedir.db_url, api.coursedir.course_id) as book:
        grades = book.find_submission_notebook(name, name, student).grades
        scores = {grade.name: grade.auto_score for grade in grades}
    return Graded(student, name, _tasks(released, autograded, scores), [*notes, *_crashes(autograded)])


def _handed_in(folder: Path, chosen: Sequence[str], known: Sequence[str]) -> tuple[list[Path], list[Graded]]:
    "The submissions of the chosen exercises; and one line for each student, or file, that holds something else."
    found, elsewhere = [], []
    for student in sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__"))):
        inside = sorted(p for p in student.iterdir() if not p.name.startswith(".")) if student.is_dir() else []
        found += [place for place in inside if place.is_dir() and place.name in chosen]
        odd = [p.name for p in inside if not (p.is_dir() and p.name in known)] if student.is_dir() else [student.name]
        if odd:
            reason = f"not graded: {', '.join(odd)}; STUDENT/EXERCISE/EXERCISE.ipynb is expected"
            elsewhere.append(Graded(student.name, "", [], [reason]))
    return found, elsewhere


def grade(
    course: str | Path,  # nbgrader's course folder, with source/NAME/NAME.ipynb
    submitted: str | Path | None = None,  # folder with STUDENT/NAME/NAME.ipynb; default: submitted/ of the course
    names: Sequence[str] = (),  # exercises; default: every one that was handed in
    memory: float | None = 12.0,  # GiB of address space that a submission may take; None: any
    after_each: Callable[[Graded], Any] | None = None,  # called with each result as it comes
) -> list[Graded]:
    """Grade what was handed in, one submission at a time, by nbgrader's own `autograde`.

    A submission that cannot be graded earns no points, its reason says why, and the others are graded all the same.
    nbgrader's gradebook and its folders in the course are brought up to date, so that its other tools go on from here.
    Code of students runs as you, with a limit of memory and of time, and nothing else between it and your files.
    """
    course = Path(course).resolve()
    folder = Path(submitted).resolve() if submitted is not None else course / "submitted"
    api = _nbgrader(course, REPAIRED)
    chosen = _chosen(names, course)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: it should hold STUDENT/EXERCISE/EXERCISE.ipynb")
    found, elsewhere = _handed_in(folder, chosen, exercises_of(course))
    if not found:
        raise DataError(f"{folder} holds no submission: STUDENT/EXERCISE/EXERCISE.ipynb is expected")
    broken: dict[str, str] = {}  # exercises that cannot be handed out any more, and why
    for name in sorted({place.name for place in found}):
        try:
            generate(course, [name])
        except DataError as error:
            broken[name] = str(error)
    graded = []
    for place in found:
        student, name = place.parent.name, place.name
        if name in broken:
            graded.append(Graded(student, name, [], [broken[name]]))
        else:
            graded.append(_grade_one(api, course, place, student, name, memory))
        if after_each is not None:
            after_each(graded[-1])
    for one in elsewhere:
        graded.append(one)
        if after_each is not None:
            after_each(one)
    return graded


def write_grades(graded: Sequence[Graded], file: str | Path) -> None:
    "A table in CSV: one line for each submission."
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["student", "exercise", "score", "max_score", "reason"])
    for one in graded:
        writer.writerow([one.student, one.exercise, f"{one.score:g}", f"{one.most:g}", "; ".join(one.reasons)])
    write_text(text.getvalue(), file, DataError)


def _cell_text(text: str) -> str:
    "A text that stands in one cell of a table in Markdown."
    return re.sub(r"([\\|`*<])", r"\\\1", text)


def _feedback(one: Graded) -> str:
    "What a student reads: points and messages, and no test."
    lines = [f"# {one.exercise}: {one.score:g} of {one.most:g} points", ""]
    lines += ["| task | points | what the check says |", "|---|---|---|"]
    for task in one.tasks:
        told = _cell_text(task.message) if task.message else "right" if task.points == task.most else "not graded"
        lines.append(f"| {task.name.removeprefix('test-')} | {task.points:g} of {task.most:g} | {told} |")
    if one.reasons:
        lines += ["", "Besides:", "", *(f"- {_cell_text(reason)}" for reason in one.reasons)]
    return "\n".join(lines) + "\n"


def write_feedback(graded: Sequence[Graded], folder: str | Path) -> list[Path]:
    "One page for each submission, FOLDER/STUDENT/EXERCISE.md: points and messages; solutions and tests stay with you."
    files = []
    for one in graded:
        if not one.exercise:  # what belongs to no exercise
            continue
        file = Path(folder) / one.student / f"{one.exercise}.md"
        folder_for(file)
        write_text(_feedback(one), file, DataError)
        files.append(file)
    return files
