"""When does a model copy its training images? The same training on few and on many drawn faces.

    for n in 16 128 1024 50000; do
        ldm-edu train toy-faces --out runs/faces-$n \\
            --set diffusion.training.steps=3000 --set diffusion.training.images=$n --snapshot-every 1000
    done
    python benchmarks/copying.py runs/faces-16 runs/faces-128 runs/faces-1024 runs/faces-50000

Writes ldm_edu/results/copying.json, and copying.png: for every run two rows, six drawn faces (the seeds 0 to 5) above
the training face that is nearest to each.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ldm_edu import LatentDiffusion
from ldm_edu.data.registry import open_dataset
from ldm_edu.display import grid, save
from ldm_edu.evaluation.copying import copied, thumbnails
from ldm_edu.evaluation.distances import nearest_neighbours
from ldm_edu.evaluation.report import from_bytes, real_set
from ldm_edu.files import parse_json
from ldm_edu.measurements import Measurement, measured_here
from ldm_edu.training import Recipe, recipe_from_dict

RESULTS = Path(__file__).resolve().parent.parent / "ldm_edu" / "results"
DRAWN, SHOWN, STEPS = 512, 6, 50  # images, those in the picture, denoising steps


def faces(split: str, n: int) -> Tensor:
    """The first faces of a split as bytes, (n, 3, 64, 64)."""
    return real_set(open_dataset("toy-faces", None, split, 64, keys=("image",)), range(n))


def smaller(images: Tensor) -> Tensor:
    """Bytes as the vectors in which neighbours are sought, (n, 768)."""
    return torch.cat([thumbnails(from_bytes(some)) for some in images.split(1024)])


def share(name: str, copies: Tensor, of: dict) -> Measurement:
    """How many are copies."""
    return Measurement.share(name, int(copies.sum()), len(copies), of=of)


def losses(run: Path) -> dict[int, dict]:
    """The lines of a run's log, by step."""
    lines = [parse_json(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line for line in lines if line["stage"] == "diffusion"}


def look(folder: Path, step: int, n: int, training: Tensor, others: Tensor) -> tuple[list[Measurement], Tensor]:
    """Numbers of one model, and its rows of the picture."""
    model = LatentDiffusion.from_pretrained(folder)
    images = model.sample(n=DRAWN, steps=STEPS, seed=0, batch_size=64)
    known, drawn = smaller(training), thumbnails(images)
    far, near = nearest_neighbours(drawn, known)
    line, of = losses(folder.parents[folder.name != "model"])[step], {"training images": n, "training steps": step}
    print(of, copied(drawn, known).float().mean(), line, flush=True)
    numbers = [
        share("copies among drawn faces", copied(drawn, known), of),
        share("copies among other faces", copied(others, known), of),
        Measurement("distance to the nearest training face", far.median().item(), of, n=len(drawn)),
        Measurement("loss", line["loss"], of),
        Measurement("loss on held-out images", line["held_out"], of),
    ]
    return numbers, torch.cat([images[:SHOWN], from_bytes(training[near[:SHOWN, 0]])])


def main() -> None:
    """Look at each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipes = [recipe_from_dict(parse_json((run / "recipe.json").read_text(encoding="utf-8"))) for run in given.runs]
    counts = [int(recipe.diffusion.training.images or 0) for recipe in recipes if isinstance(recipe, Recipe)]
    everything, others = faces("train", max(counts)), smaller(faces("test", DRAWN))
    numbers, rows = [], []
    for run, n, recipe in zip(given.runs, counts, recipes, strict=True):
        last = recipe.steps
        early = [(path, int(path.name.rpartition("-")[2])) for path in sorted((run / "snapshots").glob("diffusion-*"))]
        for folder, step in [*(each for each in early if each[1] < last), (run / "model", last)]:
            found, pictures = look(folder, step, n, everything[:n], others)
            numbers += found
        rows.append(pictures)
    save(grid(torch.cat(rows), columns=SHOWN, pad=0), RESULTS / "copying.png")
    measured_here(
        "toy-faces trained on few and on many faces",
        numbers,
        about=(
            f"A face is a copy where its nearest training face is less than a third as far as the second nearest, by "
            f"thumbnails of 16². {DRAWN} drawn faces ({STEPS} DDIM steps, seeds from 0), and as many faces of the test "
            "split for comparison. One run for each number of training faces."
        ),
        seed=0,
    ).save(RESULTS / "copying.json")


if __name__ == "__main__":
    main()
