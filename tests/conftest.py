"""Fixtures for tests/. Nothing here imports ldm_edu at the top: jaxtyping's hook must be in place first."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real subsets (`celeba/`, `coco/`); skips where there is none."""
    named = os.environ.get("LDM_EDU_DATA_DIR")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not (folder / "celeba").is_dir() and not (folder / "coco").is_dir():
        pytest.skip(f"no celeba/ or coco/ in {folder}: set LDM_EDU_DATA_DIR to where the real data lies")
    return folder
