"""What the suite sees in a cell of a notebook, and nbval alone does not."""

import json

PRINT = "import sys\nprint('UsageError is a word', file=sys.stderr)"
GOOD = ["x = 1\nprint(x)", "# NBVAL_RAISES_EXCEPTION\nraise ValueError('as promised')", "assert x == 1", PRINT]
BAD = {  # cells, and what is said of them
    "%nosuchmagic\nassert False": "UsageError: Line magic function `%nosuchmagic` not found.",
    f"{PRINT}\n%othermagic\nassert False": "UsageError: Line magic function `%othermagic` not found.",
    "%%cellmagic\nassert False": "UsageError: Cell magic `%%cellmagic` not found.",
    "# NBVAL_RAISES_EXCEPTION\nx = 1": "marked as one that raises an exception, and raised none",
    "assert 1 == 2": "AssertionError",
}


def notebook(*cells: str) -> str:
    """A notebook of these cells."""
    kinds = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    described = [kinds | {"id": f"cell{i}", "source": text} for i, text in enumerate(cells)]
    return json.dumps({"cells": described, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def test_a_cell_in_which_something_was_overlooked_fails_and_the_others_pass(pytester, root):
    """For a misspelt magic IPython prints a line, and skips what stands below. A promised exception has to come."""
    pytester.makeconftest((root / "conftest.py").read_text(encoding="utf-8"))
    for name, cells in (("good", GOOD), ("bad", BAD)):
        (pytester.path / f"{name}.ipynb").write_text(notebook(*cells), encoding="utf-8")
    result = pytester.runpytest_subprocess("--nbval-lax", "--nbval-current-env", "-rA")
    result.assert_outcomes(passed=len(GOOD), failed=len(BAD))
    told = result.stdout.str()
    for said in BAD.values():
        assert said in told
    assert all(f"PASSED good.ipynb::Cell {i}" in told for i in range(len(GOOD)))
