"""An exercise and the cases that prove its grader: notebooks with patched answers, each run in a process of its own."""

import json
import multiprocessing
import multiprocessing.connection
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ldm_edu.grading.warm import start

ROOT = Path(__file__).resolve().parents[2]
COURSE = ROOT / "nbs" / "exercises"
CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.name for path in (COURSE / "source").iterdir() if path.is_dir())

REGION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n(.*?)^[ \t]*### END SOLUTION$", re.M | re.S)
STUB = "raise NotImplementedError()"
SECONDS = 120  # the longest that one notebook may run


@dataclass(frozen=True)
class Case:
    """A patch of one answer of the solution, and what it must lead to; one table of `cases/EXERCISE.toml`."""

    name: str  # what is tried, in a few words
    answer: str  # id of the answer cell
    why: str = ""  # why people make this mistake, or what the source is
    old: str = ""  # text that stands exactly once in the solution of the answer,
    new: str = ""  # and what replaces it
    body: str = ""  # or: the whole solution of the answer, not indented
    loses: str = ""  # of a misconception: id of the test cell that must lose its points
    says: str = ""  # of a misconception: words of the message of the assertion that fails
    student: str = ""  # whose variant it is about; default: anyone's


@dataclass(frozen=True)
class Result:
    """What running one notebook came to."""

    earned: dict[str, float]  # id of the test cell to its points
    messages: dict[str, str]  # id of a test cell that failed to "Error: message"
    crashed: dict[str, str] = field(default_factory=dict)  # id of another cell that raised to "Error: message"

    @property
    def lost(self) -> set[str]:
        """The test cells that lost their points."""
        return set(self.messages)


class Exercise:
    """The notebook of an exercise with its solutions, and its cases."""

    def __init__(self, name: str):
        self.name = name
        self.path = COURSE / "source" / name / f"{name}.ipynb"
        self.notebook = json.loads(self.path.read_text(encoding="utf-8"))
        self.cells = [cell | {"source": "".join(cell["source"])} for cell in self.notebook["cells"]]
        for cell in self.cells:
            cell["id"] = cell["metadata"].get("nbgrader", {}).get("grade_id", cell["id"])

    @cached_property
    def tests(self) -> dict[str, float]:
        """Id of each test cell to its points."""
        metas = [cell["metadata"].get("nbgrader", {}) for cell in self.cells]
        return {meta["grade_id"]: float(meta["points"]) for meta in metas if meta.get("grade")}

    @cached_property
    def answers(self) -> dict[str, str]:
        """Id of each answer cell to its source."""
        return {
            cell["id"]: cell["source"] for cell in self.cells if cell["metadata"].get("nbgrader", {}).get("solution")
        }

    def _cases(self, kind: str) -> list[Case]:
        tables = tomllib.loads((CASES / f"{self.name}.toml").read_text(encoding="utf-8"))
        assert set(tables) == {"misconception", "right_answer"}, f"{self.name}.toml: tables {sorted(tables)}"
        return [Case(**table) for table in tables[kind]]

    @cached_property
    def misconceptions(self) -> list[Case]:
        return self._cases("misconception")

    @cached_property
    def right_answers(self) -> list[Case]:
        return self._cases("right_answer")

    def patched(self, case: Case) -> dict[str, str]:
        """The source of the answer cell of a case, by its id."""
        source = self.answers[case.answer]
        if case.body:
            assert not case.old and len(REGION.findall(source)) == 1, f"{case.name}: needs one solution, and no `old`"
            return {case.answer: REGION.sub(lambda m: indented(case.body, m[1]), source)}
        solutions = "".join(m[2] for m in REGION.finditer(source))
        assert solutions.count(case.old) == 1, f"{case.name}: {case.old!r} stands {solutions.count(case.old)} times"
        assert case.old != case.new, f"{case.name}: nothing is changed"
        return {case.answer: REGION.sub(lambda m: m[0].replace(case.old, case.new), source)}

    def every_answer(self, text: str) -> dict[str, str]:
        """Every answer replaced by a line."""
        return {i: REGION.sub(lambda m: m[1] + text, source) for i, source in self.answers.items()}

    def sources(self, changed: dict[str, str], student: str) -> list[tuple[str, str]]:
        """Id and source of every code cell as a student would hand it in."""
        found = []
        for cell in self.cells:
            if cell["cell_type"] == "code":
                source = changed.get(cell["id"], cell["source"])
                found.append((cell["id"], re.sub(r'^STUDENT = ".*"', f'STUDENT = "{student}"', source, flags=re.M)))
        return found

    def run(self, changed: dict[str, str] | None = None, student: str = "ann", picture: bool = True) -> Result:
        """Run the notebook with changed answers in a process of its own, and count its points.

        Without the picture, which costs most of the time, it ends with the test of the last task.
        """
        cells, tests = self.sources(changed or {}, student), dict(self.tests)
        if not picture:
            del tests["test-picture"]
            last = max(i for i, (cell, _) in enumerate(cells) if cell in tests)
            cells = cells[: last + 1]
        return run(cells, tests)


def indented(body: str, by: str) -> str:
    return "\n".join(by + line if line.strip() else line for line in body.strip("\n").split("\n"))


# --- Running cells ---


def _execute(cells: list[tuple[str, str]], send: Callable[[tuple[str, str]], None]) -> None:
    """Execute the cells as a kernel would, going on after an exception; send (id, "" or "Error: message") for each."""
    import contextlib
    import os
    import signal
    import sys
    import types
    import warnings

    import matplotlib
    import torch

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.alarm(SECONDS)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for cell, source in cells:
            try:
                exec(compile(source, f"<{cell}>", "exec"), main.__dict__)  # noqa: S102
                send((cell, ""))
            except BaseException as error:  # noqa: BLE001  whatever a submission raises
                send((cell, f"{type(error).__name__}: {error}"))


def _child(cells: list[tuple[str, str]], pipe: multiprocessing.connection.Connection) -> None:
    _execute(cells, pipe.send)
    pipe.send(None)


def run(cells: list[tuple[str, str]], tests: dict[str, float]) -> Result:
    """Execute cells in a process of their own; the points are those of the test cells that raised nothing.

    The process is forked from one that has imported the package: no trace of a run is left in the next one.
    """
    here, there = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    process = start(_child, cells, there)
    there.close()
    said: dict[str, str] = {}
    try:
        while (item := here.recv()) is not None:
            said[item[0]] = item[1]
    except EOFError:
        pass
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
    for cell, _ in cells:
        said.setdefault(cell, f"not reached: the process ended with status {process.exitcode}")
    return Result(
        earned={cell: 0.0 if said[cell] else points for cell, points in tests.items()},
        messages={cell: said[cell] for cell in tests if said[cell]},
        crashed={cell: text for cell, text in said.items() if text and cell not in tests},
    )
