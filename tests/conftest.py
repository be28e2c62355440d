"""Fixtures for tests/. Nothing here imports ldm_edu at the top: jaxtyping's hook must be in place first."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ["pytester"]


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


@pytest.fixture(scope="session")
def lpips_weights() -> Path:
    """The folder with the backbones of LPIPS (`alexnet_features.safetensors`, `vgg16_...`); skips where it has none."""
    named = os.environ.get("LDM_EDU_WEIGHTS_DIR")
    folder = Path(named) if named else ROOT.parent / "shared" / "weights"
    if not all((folder / f"{net}_features.safetensors").is_file() for net in ("alexnet", "vgg16")):
        pytest.skip(f"no backbones of LPIPS in {folder}: set LDM_EDU_WEIGHTS_DIR to where they lie")
    return folder
