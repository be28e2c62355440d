"""The Python of the README, block after block, as a reader pastes it; only the training is cut to two steps."""

import re

import torch


def test_the_readmes_python_runs(root, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.S)
    blocks = [block for block in blocks if "from ldm_edu import" in block and "load_published" not in block]
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)  # a run writes into its folder
    names: dict = {"__name__": "__main__"}
    sizes = []
    for block in blocks:
        exec(block.replace('find_recipe("toy-demo")', 'find_recipe("toy-demo").shortened(2)'), names)
        sizes.append(tuple(names["images"].shape))
    assert sizes == [(1, 3, 64, 64), (3, 3, 64, 64), (1, 3, 32, 32)]
    assert all(torch.isfinite(names["images"]).flatten())
    assert (tmp_path / "runs" / "maps" / "model" / "conditioner" / "config.json").exists()
