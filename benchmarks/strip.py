"""What do the models of a run draw from the same noise? A picture with a column for each of them.

    ldm-edu train toy-faces --snapshot-every 1200
    python benchmarks/strip.py faces_training --run runs/toy-faces --at 1200 3600 12000

Writes ldm_edu/results/NAME.png: a row for each of the seeds 0 to 5, 50 DDIM steps. Only models of drawn data sets are
taken, since no picture of a real person belongs into the project.
"""

import argparse
from pathlib import Path

import torch
from sweep import RESULTS, models_of

from ldm_edu import LatentDiffusion
from ldm_edu.display import grid, save
from ldm_edu.evaluation.report import TOY, recipe_dataset

SHOWN, STEPS = 6, 50  # images of a model, denoising steps


def main() -> None:
    """Draw, and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the picture")
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--at", type=int, nargs="+", help="after these steps of the run; default: all that are there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    columns = []
    for folder in models_of(given.run, given.at):
        model = LatentDiffusion.from_pretrained(folder)
        if recipe_dataset(model) not in TOY:
            raise SystemExit(f"{folder}: a model of {recipe_dataset(model)} may draw real people, so nothing is kept")
        columns.append(model.sample(n=SHOWN, steps=STEPS, seed=0))
    save(grid(torch.stack(columns, 1).flatten(0, 1), columns=len(columns), pad=0), RESULTS / f"{given.name}.png")


if __name__ == "__main__":
    main()
