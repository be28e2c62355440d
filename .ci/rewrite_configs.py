"""Bring the recipes in the configs of shipped checkpoints to what `RECIPES` says now; weights are not touched.

    python .ci/rewrite_configs.py

A config keeps the recipe that its network was trained with. Where a recipe's `about` changes (a page has another
name, say), the copies have to follow. Anything else that differs is a mistake and ends the script.
"""

import json
from dataclasses import replace
from pathlib import Path

from ldm_edu.checkpoints import PRETRAINED, load_json, save_json
from ldm_edu.training.recipes import RECIPES, recipe_from_dict, recipe_to_dict


def rewritten(config: dict, path: Path) -> dict:
    """The config with its recipe as it is now."""
    provenance = config.get("made") or {}
    if "recipe" not in provenance:
        return config
    then = recipe_from_dict(provenance["recipe"])
    now = RECIPES[then.name]
    assert replace(then, about=now.about) == now, f"{path}: its recipe is not what it was trained with"
    return {**config, "made": {**provenance, "recipe": json.loads(json.dumps(recipe_to_dict(now)))}}


if __name__ == "__main__":
    for path in sorted(PRETRAINED.rglob("config.json")):
        config = load_json(path)
        if (new := rewritten(config, path)) != config:
            save_json(new, path)
            print(f"rewritten: {path.relative_to(PRETRAINED)}")
