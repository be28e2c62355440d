"""Bring the configs of shipped checkpoints to today's names; weights are not touched.

    python .ci/rewrite_configs.py

A config keeps the recipe that its network was trained with. Where the names of arguments, of the provenance's entries
or a recipe's `about` change, the copies have to follow. Anything else that differs is a mistake and ends the script.
"""

import json
from dataclasses import replace
from pathlib import Path

from ldm_edu.checkpoints import CLASS, PRETRAINED
from ldm_edu.files import load_json, save_json
from ldm_edu.training.recipes import RECIPES, recipe_from_dict, recipe_to_dict

NAMES = {"made": "provenance", "codes": "num_codes"}  # of a config's entries
SCORES = {"unseen": "held_out"}  # of a provenance's entries: a loss


CLASSES = {  # of the networks that are no first stages, by the folder's name
    "unet": "UNet",
    "conditioner": "TextConditioner",
    "scene-reader": "SceneReader",
    "toy-features": "ToyFeatures",
    "toy-text2image": "LatentDiffusion",
}


def class_of(config: dict, path: Path) -> str:
    """The class that a config without one describes."""
    return CLASSES.get(path.parent.name, "AutoencoderVQ" if "num_codes" in config else "AutoencoderKL")


def rewritten(config: dict, path: Path) -> dict:
    """The config under today's names, with its class and with its recipe as `RECIPES` has it."""
    config = {NAMES.get(name, name): value for name, value in config.items()}
    config = {CLASS: config.get(CLASS, class_of(config, path))} | config
    if (provenance := config.get("provenance")) is None:
        return config
    provenance = {SCORES.get(name, name): value for name, value in provenance.items()}
    for stage in ("first_stage", "diffusion"):
        if stage in provenance:
            provenance[stage] = {SCORES.get(name, name): value for name, value in provenance[stage].items()}
    if "recipe" in provenance:
        then = recipe_from_dict(provenance["recipe"])
        now = RECIPES[then.name]
        assert replace(then, about=now.about) == now, f"{path}: its recipe is not what it was trained with"
        provenance["recipe"] = json.loads(json.dumps(recipe_to_dict(now)))
    return config | {"provenance": provenance}


if __name__ == "__main__":
    for path in sorted(PRETRAINED.rglob("config.json")):
        config = load_json(path)
        if (new := rewritten(config, path)) != config:
            save_json(new, path)
            print(f"rewritten: {path.relative_to(PRETRAINED)}")
