"""What does a diffusion model draw on its way? The run behind `toy-class`, looked at again and again.

    python benchmarks/watch_learning.py

Trains the recipe toy-class from its seed, as `ldm-edu train toy-class` does, and stops at some steps to draw the same
classes from the same noise, once with the weights of that step and once with their moving average. Writes
ldm_edu/results/watch_learning.png (a column for each of those steps; each class has two rows, raw above averaged) and,
in ldm_edu/results/watch_learning.json, the losses and how often the judge finds the class that was asked for.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_edu import LatentDiffusion, SceneReader, ToyCOCO
from ldm_edu.display import grid, save
from ldm_edu.measurements import Measurement, measured_here
from ldm_edu.training import DiffusionStage, Recipe, RunOptions, find_recipe, open_run, optimise
from ldm_edu.training.dispatch import saved_first_stage
from ldm_edu.training.state import make_state

RESULTS = Path(__file__).resolve().parent.parent / "ldm_edu" / "results"
LOOKS = (100, 250, 500, 1000, 2000, 3000, 4000, 5000, 6000)
SHOWN = 4  # classes in the picture, the first ones that the held-out scenes have
SCALE = 6.0  # of the guidance, as on the page 42_tokens


def learned_classes() -> list[int]:
    """The classes that occur in the training split, so that their rows are trained."""
    data = ToyCOCO("train", length=2000, keys=("class",))
    return sorted({int(data[i]["class"]) for i in range(len(data))})


def share_right(model: LatentDiffusion, reader: SceneReader, classes: Tensor) -> tuple[int, int]:
    """How often the nearest thing of a picture is of its class, as the judge reads it, and of how many."""
    images = model.sample({"class": classes}, steps=25, scale=SCALE, seed=1000, batch_size=64)
    hits = 0
    for things, k in zip(reader.read(images), classes.tolist(), strict=True):
        nearest = min(things, key=lambda thing: thing.y, default=None)  # y: away from the camera
        hits += nearest is not None and f"{nearest.colour} {nearest.shape}" == ToyCOCO.class_names[k]
    return hits, len(classes)


@torch.no_grad()
def look(stage: DiffusionStage, task: nn.Module, reader: SceneReader, step: int, weights: str):
    """Pictures of some classes, and numbers about them."""
    known, training = learned_classes(), task.training
    shown = torch.tensor([int(stage.held_out.batch([i], ["class"])["class"][0]) for i in range(SHOWN)])
    model = stage.finish(task.eval())
    images = model.sample({"class": shown}, steps=50, scale=SCALE, seed=0)
    hits, n = share_right(model, reader, torch.tensor([known[i % len(known)] for i in range(6 * len(known))]))
    held_out = stage.validate(task)["held_out"]
    task.train(training)
    of = {"weights": weights, "step": step}
    return images, [
        Measurement("loss on held-out scenes", held_out, of=of, n=len(stage.rows)),
        Measurement.share("class as asked", hits, n, of=of),
    ]


def main() -> None:
    """Train, and look on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/watch_learning"), help="a new folder for the run")
    parser.add_argument("--steps", type=int, default=max(LOOKS), help="stop after so many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe, reader = find_recipe("toy-class"), SceneReader.from_pretrained("scene-reader")
    assert isinstance(recipe, Recipe)
    run = open_run(recipe, arguments.out, RunOptions(device="cpu", precision="bf16"))
    stage = DiffusionStage(recipe, run, {"first_stage": saved_first_stage(recipe)})
    state, task, optimizer = make_state(run, stage)
    columns, numbers, losses = [], [], []
    for result in optimise(stage, run.accelerator, task, optimizer, state.ema):
        losses.append(result.loss)
        if result.step not in LOOKS or result.step > arguments.steps:
            continue
        numbers.append(
            Measurement("loss", torch.stack(losses[-100:]).mean().item(), of={"step": result.step}, n=100 * 64)
        )
        raw, some = look(stage, stage.task, reader, result.step, "raw")
        average, more = look(stage, state.ema.module, reader, result.step, "averaged")
        numbers += some + more
        columns.append(torch.stack([raw, average], 1).flatten(0, 1))  # (2 classes, 3, h, w): raw above averaged
        print(*map(str, numbers[-5:]), sep="\n", flush=True)
        save(grid(torch.stack(columns, 1).flatten(0, 1), columns=len(columns), pad=0), RESULTS / "watch_learning.png")
        measured_here(
            "toy-class on its way: what its raw and its averaged weights draw",
            numbers,
            about=(
                "`class as asked`: of 126 pictures (25 DDIM steps, guidance 6, six of each class that occurs in "
                "training) those whose nearest thing has the class that was asked for, as the judge reads them. "
                "One run: another seed would move every row by an amount that the intervals do not contain."
            ),
            seed=recipe.seed,
        ).save(RESULTS / "watch_learning.json")
        if result.step >= arguments.steps:
            break
    run.close()


if __name__ == "__main__":
    main()
