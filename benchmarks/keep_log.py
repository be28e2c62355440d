"""What the log of a run says, as results that a page can print.

    ldm-edu train celeba64 --data-dir path/to/data --max-steps 1000
    python benchmarks/keep_log.py runs/celeba64 celeba64_short \\
        --command "ldm-edu train celeba64 --data-dir path/to/data --max-steps 1000"

Writes ldm_edu/results/NAME.json. Numbers only: no image of a data set, and no weights trained on one, belong into the
project.
"""

import argparse
from pathlib import Path

from ldm_edu.files import load_json, parse_json
from ldm_edu.measurements import Measurement, measured_here
from ldm_edu.training.recipes import recipe_from_dict

RESULTS = Path(__file__).resolve().parent.parent / "ldm_edu" / "results"
NAMES = {"loss": ("loss", ""), "held_out": ("loss on held-out images", ""), "psnr": ("PSNR", "dB")}


def numbers(log: Path, every: int) -> list[Measurement]:
    """The numbers of every so many lines of each stage, and of its last one."""
    lines = [parse_json(line) for line in log.read_text(encoding="utf-8").splitlines()]
    last = {line["stage"]: line["step"] for line in lines}
    found = []
    for line in lines:
        if line["step"] % every == 0 or line["step"] == last[line["stage"]]:
            of = {"stage": line["stage"], "step": line["step"]}
            found.append(Measurement("time", round(line["seconds"]), of=of, unit="s"))
            found += [Measurement(NAMES[k][0], line[k], of=of, unit=NAMES[k][1]) for k in NAMES if k in line]
    return found


def main() -> None:
    """Read a log and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("name", help="of the results")
    parser.add_argument("--command", required=True, help="that made the run")
    parser.add_argument("--about", default="", help="what a reader should know")
    parser.add_argument("--every", type=int, default=200, help="steps between lines that are kept")
    parser.add_argument("--threads", type=int, default=1, help="that the run used")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)  # is a part of the machine's name
    recipe = recipe_from_dict(load_json(arguments.run / "recipe.json"))
    measured_here(
        f"{recipe.name}: {recipe.about}",
        numbers(arguments.run / "log.jsonl", arguments.every),
        about=arguments.about,
        seed=recipe.seed,
        command=arguments.command,
    ).save(RESULTS / f"{arguments.name}.json")


if __name__ == "__main__":
    main()
