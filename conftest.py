"""What every pytest run needs before anything else is imported: the notebooks under nbs/ and the tests under tests/."""

import os
import re
from pathlib import Path

import pytest

EXERCISES = Path(__file__).parent / "nbs" / "exercises"

# The notebooks' kernels and the commands that tests start inherit these; whoever sets one has the last word.
DEFAULTS = {
    "LDM_EDU_PROFILE": "ci",  # a few steps of everything
    "LDM_EDU_DATASET": "toy",  # whatever settings.ini says: tests need no download
    "LDM_EDU_STATIC": "1",  # no widgets, no progress bars
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded behind our back
    "TOKENIZERS_PARALLELISM": "false",
}
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # pytest -n: workers that share the cores must not fight over them
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collect_file(file_path):
    """Never collect an exercise, not even one that is named: it has holes to fill in, and graders of its own."""
    collected = yield
    return [] if EXERCISES in file_path.parents else collected


def pytest_addoption(parser):
    parser.addoption("--no-compare", action="store_true", help="run the notebooks, compare no output (real data)")


def pytest_collection_modifyitems(config, items):
    """Give every code cell of a notebook an execution count, in memory: nbdev-clean drops them, and nbval takes a cell
    without one for a cell that was never run, refuses the outputs that it has, and compares none."""
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None or not hasattr(item, "cell_num"):  # not a notebook cell
            continue
        cell.execution_count = item.cell_num + 1
        if config.getoption("--no-compare"):
            item.options["check"] = False


def overlooked(cell) -> str | None:
    """What went wrong in a cell of a notebook although nbval lets it pass; None where nothing did."""
    outputs = cell.test_outputs or []
    for output in outputs:
        # IPython prints this, and does not run what stands below: no assertion there has been made.
        if output.output_type == "stream" and output.name == "stderr" and re.search("^UsageError:", output.text, re.M):
            return output.text.strip()
    if cell.options["check_exception"] and not any(output.output_type == "error" for output in outputs):
        return "the cell is marked as one that raises an exception, and raised none"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Make a cell fail in which something was overlooked."""
    done = yield
    if hasattr(item, "raise_cell_error") and (complaint := overlooked(item)) is not None:
        item.raise_cell_error(complaint)
    return done


@pytest.fixture(scope="session", autouse=True)
def _no_windows():
    """Draw into memory, also where a screen is; notebooks draw in kernels of their own and are not concerned."""
    import matplotlib

    matplotlib.use("Agg")
