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
from ldm_edu.files import parse_json
from ldm_edu.measurements import Measurement, measured_here
from ldm_edu.training import Recipe, RunOptions, find_recipe, train

RESULTS = Path(__file__).resolve().parent.parent / "ldm_edu" / "results" / "coco64_hour.json"
NAMES = {"loss": "loss", "held_out": "loss on held-out pictures", "psnr": "PSNR of held-out pictures"}
ABOUT = (
    "The recipe coco64 with fewer steps, and for the diffusion model with batches of half the size; the run stops "
    "after some hours. *Loss*: of training. *Training time*: of a stage, up to a step. No row has an interval: how "
    "far another seed or other pictures would move it was not measured."
)


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


def read_log(path: Path, held_out: int) -> list[Measurement]:
    """What a log says, step by step."""
    numbers = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry: dict[str, Any] = parse_json(line)
        of = {"stage": entry["stage"], "step": entry["step"]}
        numbers.append(Measurement("training time", float(entry["seconds"]), of=of, unit="s"))
        for key, name in NAMES.items():
            if key in entry:
                n, unit = held_out if key != "loss" else None, "dB" if key == "psnr" else ""
                numbers.append(Measurement(name, float(entry[key]), of=of, n=n, unit=unit))
    return numbers


def main() -> None:
    """Train for some hours, then write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with coco/ in it")
    parser.add_argument("--hours", type=float, default=1.0, help="stop after so many")
    parser.add_argument("--out", type=Path, default=Path("runs/coco64-hour"), help="folder of the run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the numbers")
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
    counts = {split: len(open_dataset("coco", arguments.data, split)) for split in ("train", "validation")}
    numbers = [Measurement("pictures", float(count), of={"split": split}) for split, count in counts.items()]
    numbers += read_log(arguments.out / "log.jsonl", counts["validation"])
    command = f"python benchmarks/coco64_hour.py DATA --hours {arguments.hours:g}"
    title = "coco64 on a few hundred photographs"
    measured_here(title, numbers, ABOUT, shorter().seed, command=command).save(arguments.results)


if __name__ == "__main__":
    main()
