"""A short round of tests/fuzz, in processes of their own: without the type checks of these tests, in bounded memory."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("part", ["networks", "files", "cli"])
def test_arguments_of_all_kinds_end_well_or_clearly(root, part):
    folder = root / "tests" / "fuzz"
    command = [sys.executable, "-m", "pytest", "-q", "-c", folder / "pytest.ini", f"--rootdir={folder}"]
    env = {k: v for k, v in os.environ.items() if k != "LDM_EDU_FUZZ_EXAMPLES"} | {"PYTHONPATH": str(root)}
    done = subprocess.run([*command, folder / f"fuzz_{part}.py"], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
