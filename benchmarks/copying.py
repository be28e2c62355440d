"""When does a model copy its training images? The same training on few and on many of them.

    for n in 16 128 1024 50000; do
        ldm-edu train toy-faces --out runs/faces-$n \\
            --set diffusion.training.steps=1500 --set diffusion.training.images=$n --snapshot-every 500
    done
    python benchmarks/copying.py copying runs/faces-16 runs/faces-128 runs/faces-1024 runs/faces-50000

Writes ldm_edu/results/NAME.json and, where the images are drawn ones, NAME.png: for every run two rows, six drawn by
the model (the seeds 0 to 5) above the training image that is nearest to each. Real data lie where settings.ini says.
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
from ldm_edu.evaluation.report import TOY, from_bytes, real_set
from ldm_edu.files import parse_json
from ldm_edu.measurements import Measurement, measured_here
from ldm_edu.settings import load_settings
from ldm_edu.training.recipes import Recipe, recipe_from_dict

RESULTS = Path(__file__).resolve().parent.parent / "ldm_edu" / "results"
DRAWN, SHOWN, STEPS = 512, 6, 50  # images, those in the picture, denoising steps


def real_images(recipe: Recipe, split: str, n: int | None) -> Tensor:
    """The first images of a split as bytes, (n, 3, h, w); None: all."""
    data = open_dataset(recipe.dataset, load_settings().data_dir, split, recipe.size, keys=("image",))
    return real_set(data, range(min(n or len(data), len(data))))


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


def look(
    folder: Path,  # of a model
    line: dict,  # of the log, at the step of that model
    training: Tensor,  # its training images as bytes
    others: Tensor,  # thumbnails of images that it was not trained on
) -> tuple[list[Measurement], Tensor]:
    """Numbers of one model, and its rows of the picture."""
    model = LatentDiffusion.from_pretrained(folder)
    images = model.sample(n=DRAWN, steps=STEPS, seed=0, batch_size=64)
    known, drawn = smaller(training), thumbnails(images)
    far, near = nearest_neighbours(drawn, known)
    of = {"training images": len(training), "training steps": line["step"]}
    print(of, copied(drawn, known).float().mean(), line, flush=True)
    numbers = [
        share("copies among drawn images", copied(drawn, known), of),
        share("copies among other images", copied(others, known), of),
        Measurement("distance to the nearest training image", far.median().item(), of, n=len(drawn)),
        Measurement("loss", line["loss"], of),
        Measurement("loss on held-out images", line["held_out"], of),
    ]
    return numbers, torch.cat([images[:SHOWN], from_bytes(training[near[:SHOWN, 0]])])


def main() -> None:
    """Look at each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the results")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, all on one data set")
    given = parser.parse_args()
    torch.set_num_threads(1)
    numbers, rows, names = [], [], set()
    for run in given.runs:
        recipe = recipe_from_dict(parse_json((run / "recipe.json").read_text(encoding="utf-8")))
        assert isinstance(recipe, Recipe)
        names.add(recipe.dataset)
        training = real_images(recipe, "train", recipe.diffusion.training.images)
        others, log = smaller(real_images(recipe, "test", DRAWN)), losses(run)
        early = {int(path.name.rpartition("-")[2]): path for path in sorted((run / "snapshots").glob("diffusion-*"))}
        models, pictures = early | {max(log): run / "model"}, torch.empty(0)
        for step, folder in models.items():
            found, pictures = look(folder, log[step], training, others)
            numbers += found
        rows.append(pictures)
    if names <= set(TOY):  # no picture of a real person
        save(grid(torch.cat(rows), columns=SHOWN, pad=0), RESULTS / f"{given.name}.png")
    about = (
        "An image is a copy where its nearest training image is less than a third as far as the second nearest, by "
        f"thumbnails of 16². {DRAWN} drawn images ({STEPS} DDIM steps, seeds from 0), and as many of the test split, "
        "or all there are, for comparison. One run for each number of training images."
    )
    title = f"{', '.join(sorted(names))}: are drawn images copies of training images?"
    measured_here(title, numbers, about, seed=0).save(RESULTS / f"{given.name}.json")


if __name__ == "__main__":
    main()
