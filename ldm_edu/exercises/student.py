"""The student version of the exercises: it ships with the package, without solutions and hidden tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm_edu.errors import DataError, LDMError
from ldm_edu.files import folder_for, load_json, read_text, write_text

__all__ = ["exercise_names", "save_student_version", "student_version", "write_exercises"]

SHIPPED = Path(__file__).parent / "notebooks"
PYPROJECT = "# nbdev refuses a folder that has a settings.ini and no such file.\n[tool.nbdev]\n"
COLAB = """import sys

if "google.colab" in sys.modules:  # there, the package is not installed yet
    get_ipython().run_line_magic("pip", "install -q ldm_edu")"""


def exercise_names() -> list[str]:
    "The exercises that ship with the package, in the order of their lessons."
    return sorted(path.stem for path in SHIPPED.glob("*.ipynb"))


def student_version(released: dict[str, Any]) -> dict[str, Any]:
    """What a student works on, from the notebook that nbgrader hands out.

    Running all cells goes on after a check that fails. The lesson's link leads from a folder beside the lessons' own.
    A first cell installs the package on Colab. nbgrader's metadata stay, so that the notebook can be graded.
    """
    first = {"cell_type": "code", "id": "colab", "metadata": {}, "outputs": [], "execution_count": None}
    cells = []
    for cell in released["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = source.replace("](../../../", "](../")
        meta = dict(cell["metadata"])
        if meta.get("nbgrader", {}).get("grade"):
            meta["tags"] = ["raises-exception"]
        cells.append({**cell, "metadata": meta, "source": source.splitlines(keepends=True)})
    at = next((i for i, cell in enumerate(cells) if cell["cell_type"] == "code"), len(cells))
    cells.insert(at, first | {"source": COLAB.splitlines(keepends=True)})
    return {**released, "cells": cells}


def save_student_version(
    released: str | Path,  # a notebook that nbgrader hands out
    file: str | Path,  # where the student version goes; what stands there is replaced
) -> None:
    "Write the student version of a released notebook (see `student_version`)."
    notebook = student_version(load_json(released))
    folder_for(file)
    write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", file, DataError)


def write_exercises(
    folder: str | Path,  # where they go; created where it is missing
    names: Sequence[str] = (),  # default: all
) -> tuple[list[Path], list[Path]]:
    """Write the student version of exercises as FOLDER/NAME.ipynb; return the files that are new, and those kept.

    A file that is there already is never overwritten: it may hold answers. Beside them goes a small pyproject.toml.
    """
    known = exercise_names()
    if not known:
        raise DataError(f"{SHIPPED} holds no exercise: install the package again")
    for name in names:
        if name not in known:
            raise LDMError(f"exercise {name!r} is not known; it can be {', '.join(known)}")
    folder = Path(folder).expanduser()
    texts = {f"{name}.ipynb": read_text(SHIPPED / f"{name}.ipynb", DataError) for name in names or known}
    new, kept = [], []
    for name, text in {**texts, "pyproject.toml": PYPROJECT}.items():
        file = folder / name
        folder_for(file)
        if file.exists():
            kept.append(file)
        else:
            write_text(text, file, DataError)
            new.append(file)
    return new, kept
