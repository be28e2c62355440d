"""What can a few hundred photographs teach? coco64, made shorter, on the COCO pictures at hand.

    python benchmarks/coco64_hour.py path/to/data --hours 2

Trains the recipe coco64 with smaller batches and fewer steps on whatever captioned images lie in the folder, stops
after some hours, and writes what the log says of held-out images to ldm_edu/results/coco64_hour.json. Numbers only: no
image of a data set, and no weights trained on one, belong into the project.
"""

import argparse
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm_edu import LDMError, open_dataset
from ldm_edu.files import parse_json, save_json
from ldm_edu.training import Recipe, RunOptions, find_recipe, train

RESULTS = Path(__file__).resolve().parent.parent / "ldm_edu" / "results" / "coco64_hour.json"


def shorter() -> Recipe:
    """coco64 for hours on a CPU: an average that looks back less far, batches of half the size."""
    recipe = find_recipe("coco64")
    assert isinstance(recipe, Recipe)
    first, diffusion = recipe.first_stage, recipe.diffusion
    return replace(
        recipe,
        name="coco64-hour",
        first_stage=replace(first, training=replace(first.training, steps=1500, warmup=100, ema=0.99)),
        diffusion=replace(
            diffusion, training=replace(diffusion.training, steps=2600, warmup=200, ema=0.995, batch_size=32)
        ),
    )


def read_log(path: Path) -> dict[str, list[dict[str, float]]]:
    """The lines of a log, stage by stage, with the numbers that are kept."""
    found: dict[str, list[dict[str, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry: dict[str, Any] = parse_json(line)
        kept = {name: round(entry[name], 4) for name in ("loss", "held_out", "psnr") if name in entry}
        found.setdefault(entry["stage"], []).append({"step": entry["step"], "seconds": round(entry["seconds"]), **kept})
    return found


def main() -> None:
    """Train for some hours, then write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with coco/ in it")
    parser.add_argument("--hours", type=float, default=1.0, help="stop after so many")
    parser.add_argument("--out", type=Path, default=Path("runs/coco64-hour"), help="folder of the run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    timer = threading.Timer(3600 * arguments.hours, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    options = RunOptions(
        data_dir=arguments.data, device="cpu", every=50, resume=(arguments.out / "recipe.json").exists()
    )
    try:
        train(shorter(), arguments.out, options)
    except (KeyboardInterrupt, LDMError) as stopped:
        print(f"stopped: {stopped}")
    about = {split: len(open_dataset("coco", arguments.data, split)) for split in ("train", "validation")}
    about |= {"machine": f"one thread of a CPU, torch {torch.__version__}"}
    save_json({**about, **read_log(arguments.out / "log.jsonl")}, RESULTS)


if __name__ == "__main__":
    main()
