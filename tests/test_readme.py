"""The Python of the README, block after block, as a reader pastes it; only the training is two steps on 64 scenes."""

import json
import re

import torch

from ldm_edu.checkpoints import PRETRAINED
from ldm_edu.training.dispatch import _in_brief
from ldm_edu.training.recipes import find_recipe


def test_the_readmes_python_runs(root, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.S)
    blocks = [block for block in blocks if "from ldm_edu import" in block and "load_published" not in block]
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)  # a run writes into its folder
    names: dict = {"__name__": "__main__", "brief": _in_brief(find_recipe("toy-demo"), 64).shortened(2)}
    sizes = []
    for block in blocks:
        exec(block.replace('find_recipe("toy-demo")', "brief"), names)
        sizes.append(tuple(names["images"].shape))
    assert sizes == [(1, 3, 64, 64), (3, 3, 64, 64), (1, 3, 32, 32)]
    assert all(torch.isfinite(names["images"]).flatten())
    assert (tmp_path / "runs" / "maps" / "model" / "conditioner" / "config.json").exists()


def test_the_table_of_scores_is_that_of_the_shipped_model(root):
    """Every number in it stands in the model's config."""
    names = {
        "every thing drawn, and nothing else": "... and nothing else",
        "right number of things": "number",
        "right size": "size",
        "right colour": "colour",
        "right shape": "shape",
        "*left of* holds, of things that are there": "left",
        "*right of*": "right",
        "*in front of*": "front",
        "*behind*": "behind",
    }
    scores = json.loads((PRETRAINED / "toy-text2image" / "config.json").read_text())["provenance"]["scores"]
    lines = [line for line in (root / "README.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = {row[0]: row[1:] for row in rows if row[0] in names}
    assert found.keys() == names.keys()
    for told, name in names.items():
        test, ceiling, unseen, its_ceiling = found[told]
        assert test == scores["test"]["drawn"][name].split(", n =")[0] + ")"
        assert unseen == scores["unseen_pairs"]["drawn"][name].split(", n =")[0] + ")"
        assert scores["test"]["ceiling"][name].startswith(ceiling)
        assert scores["unseen_pairs"]["ceiling"][name].startswith(its_ceiling)
