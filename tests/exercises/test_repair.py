"""What students do to notebooks, put right: nothing of theirs is changed, nothing of ours is missing."""

import copy
import json

import pytest
from exercise import Exercise

from ldm_edu.errors import DataError
from ldm_edu.grading.repair import grade_id, read_submission, repair

EXERCISE = Exercise("21_diffusion")


@pytest.fixture
def released() -> dict:
    return copy.deepcopy(EXERCISE.notebook)


def handed_in(tmp_path, notebook: dict | str) -> dict:
    """A notebook as it is read from a file."""
    path = tmp_path / "21_diffusion.ipynb"
    path.write_text(notebook if isinstance(notebook, str) else json.dumps(notebook), encoding="utf-8")
    return read_submission(path)


def ids(notebook: dict) -> list[str | None]:
    return [grade_id(cell) for cell in notebook["cells"]]


def at(notebook: dict, name: str) -> int:
    return [cell["id"] for cell in notebook["cells"]].index(name)


def test_a_whole_notebook_stays_as_it_is(tmp_path, released):
    found = handed_in(tmp_path, released)
    before = copy.deepcopy(found["cells"])
    assert repair(found, released, "your-id") == [] and found["cells"] == before


def test_a_deleted_test_is_put_back_where_it_stood(tmp_path, released):
    notebook = copy.deepcopy(released)
    del notebook["cells"][at(notebook, "test-diffuse")]
    found = handed_in(tmp_path, notebook)
    assert repair(found, released, "your-id") == ["the cell test-diffuse was missing and is put back"]
    assert ids(found) == ids(released)


def test_every_cell_of_ours_is_put_back(tmp_path, released):
    notebook = {**released, "cells": [cell for cell in released["cells"] if cell["cell_type"] == "markdown"]}
    found = handed_in(tmp_path, notebook)
    repair(found, released, "your-id")
    assert [i for i in ids(found) if i] == [i for i in ids(released) if i]


def test_lost_metadata_are_restored_by_id(tmp_path, released):
    notebook = copy.deepcopy(released)
    notebook["cells"][at(notebook, "diffuse")]["source"] = "def diffuse(*args): return 1"
    for cell in notebook["cells"]:
        cell["metadata"] = {}
    found = handed_in(tmp_path, notebook)
    (note,) = repair(found, released, "your-id")
    assert "had lost their metadata" in note and ids(found) == ids(released)
    assert found["cells"][at(found, "diffuse")]["source"] == "def diffuse(*args): return 1"


def test_without_ids_and_metadata_tests_are_known_by_their_text(tmp_path, released):
    notebook = copy.deepcopy(released)
    notebook["cells"][at(notebook, "diffuse")]["source"] = "def diffuse(*args): return 1"
    for i, cell in enumerate(notebook["cells"]):
        cell["metadata"], cell["id"] = {}, f"other-{i}"
    found = handed_in(tmp_path, notebook)
    repair(found, released, "your-id")
    assert sorted(filter(None, ids(found))) == sorted(filter(None, ids(released)))
    texts = [cell["source"] for cell in found["cells"]]
    mine = texts.index("def diffuse(*args): return 1")
    theirs = ids(found).index("diffuse")
    assert theirs < mine < ids(found).index("test-diffuse"), "the stub must not hide what the student wrote"


def test_a_copied_cell_counts_once(tmp_path, released):
    notebook = copy.deepcopy(released)
    twice = copy.deepcopy(notebook["cells"][at(notebook, "test-diffuse")])
    notebook["cells"].insert(at(notebook, "test-diffuse"), twice)
    found = handed_in(tmp_path, notebook)
    assert repair(found, released, "your-id") == ["the cell test-diffuse stands more than once"]
    assert ids(found).count("test-diffuse") == 1
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])


def test_an_edited_test_is_told(tmp_path, released):
    notebook = copy.deepcopy(released)
    notebook["cells"][at(notebook, "test-diffuse")]["source"] = "pass"
    assert (
        "test-diffuse differs from what is handed out now"
        in repair(handed_in(tmp_path, notebook), released, "your-id")[0]
    )


def test_foreign_metadata_are_dropped(tmp_path, released):
    notebook = copy.deepcopy(released)
    mine = {"cell_type": "code", "id": "more", "outputs": [], "execution_count": 1, "source": "x = 1"}
    notebook["cells"].insert(5, mine | {"metadata": {"nbgrader": {"grade_id": "bonus", "grade": True, "points": 99}}})
    found = handed_in(tmp_path, notebook)
    repair(found, released, "your-id")
    assert found["cells"][5]["source"] == "x = 1" and found["cells"][5]["metadata"] == {}
    assert ids(found)[:5] + ids(found)[6:] == ids(released)


def test_points_are_those_that_were_handed_out(tmp_path, released):
    notebook = copy.deepcopy(released)
    notebook["cells"][at(notebook, "test-diffuse")]["metadata"]["nbgrader"]["points"] = 1000
    found = handed_in(tmp_path, notebook)
    repair(found, released, "your-id")
    assert (
        found["cells"][at(found, "test-diffuse")]["metadata"]
        == released["cells"][at(released, "test-diffuse")]["metadata"]
    )


def test_another_students_name_is_told(tmp_path, released):
    notes = repair(handed_in(tmp_path, released), released, "bob")
    assert notes == [
        "STUDENT is 'your-id', the folder is 'bob': graded as the folder's variant, "
        "and the notebook may have shown another"
    ]


def test_one_name_in_two_codings_is_one_student(tmp_path, released):
    notebook = copy.deepcopy(released)
    notebook["cells"][at(notebook, "student")]["source"] = 'STUDENT = "j\u00f6rg"'
    assert repair(handed_in(tmp_path, notebook), released, "jo\u0308rg") == []  # as macOS writes it


def test_a_deleted_student_cell_stops_nothing(tmp_path, released):
    notebook = copy.deepcopy(released)
    del notebook["cells"][at(notebook, "student")]
    found = handed_in(tmp_path, notebook)
    repair(found, released, "bob")
    assert found["cells"][0]["source"] == "STUDENT = 'bob'"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no JSON"),
        ("print('hello')", "holds no JSON"),
        ("[1, 2]", "no list of cells"),
        ('{"worksheets": []}', "no list of cells"),
        ('{"cells": []}', "it has no cells"),
        ('{"cells": [1]}', "no list of cells"),
        ('{"cells": [{"cell_type": "heading"}]}', "a cell of type 'heading'"),
        ("[" * 100_000, "holds no JSON"),
    ],
)
def test_what_is_no_notebook_is_refused_with_the_reason(tmp_path, text, says):
    with pytest.raises(DataError, match=says):
        handed_in(tmp_path, text)


@pytest.mark.parametrize(
    "bad", [{"metadata": 3}, {"id": 7}, {"id": "a b"}, {"source": ["a\n", "b"]}, {"metadata": {"nbgrader": 5}}]
)
def test_odd_cells_become_ordinary_ones(tmp_path, released, bad):
    notebook = copy.deepcopy(released)
    notebook["cells"].insert(4, {"cell_type": "code", "id": "odd", "source": "1", "metadata": {}} | bad)
    found = handed_in(tmp_path, notebook)
    assert repair(found, released, "your-id") == []
    assert found["cells"][4]["metadata"] == {} and isinstance(found["cells"][4]["source"], str)
