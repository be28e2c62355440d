"""A submitted notebook, made fit for grading: nothing that a student wrote is changed, what was lost is put back."""

import re
import secrets
import unicodedata
from pathlib import Path
from typing import Any

from ldm_edu.errors import DataError
from ldm_edu.files import parse_json

__all__ = ["read_submission", "repair"]

Cell = dict[str, Any]


def _source(cell: Cell) -> str:
    "The source of a cell as one string."
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def grade_id(cell: Cell) -> str | None:
    "The id that nbgrader gave a cell; None where it gave none, or what stands there is broken."
    meta = cell["metadata"].get("nbgrader")
    name = meta.get("grade_id") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else None


def read_submission(path: Path) -> dict[str, Any]:
    "The notebook in a file, with cells that have all their parts; DataError, which says why, where there is none."
    try:
        notebook = parse_json(path.read_text(encoding="utf-8-sig"), nan=True)
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path.name} is no notebook: it is empty, or holds no JSON") from error
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise DataError(f"{path.name} is no notebook of format 4: it has no list of cells")
    if not cells:
        raise DataError(f"{path.name} is empty: it has no cells")
    found = []
    for cell in cells:
        kind = cell.get("cell_type")
        if kind not in ("code", "markdown", "raw"):
            raise DataError(f"{path.name} is no notebook of format 4: it has a cell of type {kind!r}")
        meta = cell["metadata"] if isinstance(cell.get("metadata"), dict) else {}
        new = {"cell_type": kind, "id": cell.get("id"), "metadata": meta, "source": _source(cell)}
        found.append(new | {"outputs": [], "execution_count": None} if kind == "code" else new)
    return {"cells": found, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def _recognised(cell: Cell, released: dict[str, Cell]) -> str | None:
    "Which released cell a cell without nbgrader's metadata is: that of its own id, or of its very text."
    for name, other in released.items():
        if cell.get("id") is not None and cell["id"] == other.get("id"):
            return name
    alike = [name for name, other in released.items() if _source(other) == cell["source"]]
    return alike[0] if len(alike) == 1 else None


def _claim(cells: list[Cell], released: dict[str, Cell]) -> list[str]:
    "Give every released cell's metadata to one cell at the most; return what was done, in words."
    claimed: dict[str, Cell] = {}
    copied, restored = [], []
    for with_metadata in (True, False):  # a cell that still has its metadata goes before one that looks like it
        for cell in cells:
            name = grade_id(cell)
            if (name is not None) != with_metadata or any(cell is other for other in claimed.values()):
                continue
            if not with_metadata:
                name = _recognised(cell, released)
            if name in released and name not in claimed and cell["cell_type"] == "code":
                claimed[name] = cell
                restored += [] if with_metadata else [name]
            elif with_metadata:
                copied += [name] if name in claimed else []
                cell["metadata"] = {}
    for cell in cells:
        cell["metadata"] = {}
    for name, cell in claimed.items():
        cell["metadata"] = {"nbgrader": dict(released[name]["metadata"]["nbgrader"])}
    tests = [name for name, cell in claimed.items() if cell["metadata"]["nbgrader"]["locked"]]
    edited = [name for name in tests if claimed[name]["source"] != _source(released[name])]
    return [
        *_told(copied, "stands more than once", "stand more than once"),
        *_told(restored, "had lost its metadata, which are restored", "had lost their metadata, which are restored"),
        *_told(
            edited,
            "differs from what is handed out now, and was replaced",
            "differ from what is handed out now, and were replaced",
        ),
    ]


def _told(names: list[str], one: str, many: str) -> list[str]:
    "No line for no name; else one, which names them."
    names = list(dict.fromkeys(names))
    if not names:
        return []
    return [f"the cell {names[0]} {one}" if len(names) == 1 else f"the cells {', '.join(names)} {many}"]


def _put_back(cells: list[Cell], released: dict[str, Cell]) -> list[str]:
    "Insert each released cell that is missing behind the one that precedes it there; return which, in words."
    missing, before = [], None
    for name, cell in released.items():
        if not any(grade_id(other) == name for other in cells):
            at = 0 if before is None else 1 + [grade_id(other) for other in cells].index(before)
            meta = {"nbgrader": dict(cell["metadata"]["nbgrader"])}
            cells.insert(at, {**cell, "metadata": meta, "source": _source(cell)})
            missing.append(name)
        before = name
    return _told(missing, "was missing and is put back", "were missing and are put back")


def _renamed(cells: list[Cell]) -> None:
    "Give a new id to each cell that has none of its own."
    seen: set[str] = set()
    for cell in cells:
        if not isinstance(cell["id"], str) or not re.fullmatch(r"[\w-]{1,64}", cell["id"], re.A) or cell["id"] in seen:
            cell["id"] = secrets.token_hex(4)
        seen.add(cell["id"])


def _other_student(cells: list[Cell], student: str) -> list[str]:
    "A note where the notebook names another student than the folder it lies in."
    texts = [re.search(r"^STUDENT\s*=\s*(['\"])(.*?)\1", c["source"], re.M) for c in cells if c["cell_type"] == "code"]
    named = [match[2].strip() for match in texts if match]
    if named and unicodedata.normalize("NFC", named[0]) != unicodedata.normalize("NFC", student):
        return [
            f"STUDENT is {named[0]!r}, the folder is {student!r}: graded as the folder's variant, and the notebook may have shown another"
        ]
    return []


def repair(
    notebook: dict[str, Any],  # of `read_submission`; changed in place
    released: dict[str, Any],  # the notebook that was handed out
    student: str,  # whose folder it lay in
) -> list[str]:
    """Put back what nbgrader needs, and say what was missing: one line for each thing.

    nbgrader gives no points for a test cell that was deleted or whose metadata were lost, and ends on one that was
    copied. Here metadata are restored by the cell's id or text, copies become ordinary cells, missing cells are
    inserted where they stood. What a student wrote stays where it is.
    """
    ours = {name: cell for cell in released["cells"] if (name := grade_id(cell)) is not None}
    cells = notebook["cells"]
    notes = [*_claim(cells, ours), *_put_back(cells, ours), *_other_student(cells, student)]
    if not any(re.search(r"^STUDENT\s*=", cell["source"], re.M) for cell in cells if cell["cell_type"] == "code"):
        code = {"cell_type": "code", "id": "student", "metadata": {}, "outputs": [], "execution_count": None}
        cells.insert(0, code | {"source": f"STUDENT = {student!r}"})
    _renamed(cells)
    notebook["metadata"] = released["metadata"]
    return notes
