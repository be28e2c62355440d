"""Which f? The models of 66_compression, trained for equal times and judged at several moments.

    python benchmarks/compression.py train --minutes 15
    python benchmarks/compression.py score

`train` trains the first stages, then each UNet for as many steps as fit into the time, by the processor time of its
first steps. `score` draws images with every kept model and measures them. Runs lie in --runs, and nothing that is
there is done again; two processes may share the work: `train --share 0 2` and `train --share 1 2`. Writes
ldm_edu/results/compression.json, where numbers of runs that are not in --runs stay, and for each f a picture
ldm_edu/results/compression_fF.png: eight captions, a row for each moment.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_edu import LatentDiffusion, SceneReader, load_first_stage
from ldm_edu.data.batches import collate
from ldm_edu.data.registry import open_dataset
from ldm_edu.data.toy.captions import read_caption
from ldm_edu.display import grid, save
from ldm_edu.evaluation.distances import frechet_distance
from ldm_edu.evaluation.extractors import extract, find_extractor
from ldm_edu.evaluation.judge import prompt_accuracy
from ldm_edu.evaluation.metrics import psnr
from ldm_edu.files import load_json, save_json
from ldm_edu.measurements import Measurement, load_measurements, measured_here
from ldm_edu.training.dispatch import train
from ldm_edu.training.recipes import AutoencoderRecipe, Recipe, find_recipe
from ldm_edu.training.run import RunOptions

RESULTS = Path(__file__).resolve().parent.parent / "ldm_edu" / "results" / "compression.json"
SLOWEST = "toy32-f1"
PACED = 48  # steps by which the time of a step is measured first; two thirds of them count
MOMENTS = 8  # models that are kept of the slowest run, at equal distances
SHOWN = 8  # captions of a picture
JUDGED = (1, 2, 4, 8)  # eighths of each run, and of the steps of the slowest one, after which images are judged
COMMAND = "python benchmarks/compression.py train --minutes 15 && python benchmarks/compression.py score"
TITLE = "Which f? Models of a million parameters, trained for equal times on scenes of 32²"
ABOUT = (
    "Recipes toy32-f1 to toy32-f8, on one thread in fp32. *Minutes* are processor time of the UNet's training: steps, "
    "times the mean of a step over all runs of that f and batch. First stages are trained before, 2,500 steps of 16 "
    "each; their time is apart. Every seed draws other initial weights, batches and noise of the UNet; the first stage "
    "is the same. Images: {steps} DDIM steps, unguided, {n} captions of the test split a set, {sets} sets; they are "
    "enlarged to 64² by bicubic interpolation, as the real ones they are compared with, since judge and features read "
    "64². The excess is of Fréchet distances in toy-features. Intervals: over sets and seeds (excess, Student's t), "
    "Wilson's of all captions together (shares; they contain no difference between seeds)."
)


@dataclass(frozen=True)
class Variant:
    """One run."""

    name: str  # of the recipe
    seed: int = 0
    batch: int | None = None  # None: that of the recipe

    @property
    def folder(self) -> str:
        """Of the run."""
        return f"{self.name}{f'-batch{self.batch}' if self.batch else ''}-seed{self.seed}"

    @property
    def recipe(self) -> Recipe:
        """Without the number of steps, which the time decides."""
        recipe = find_recipe(self.name)
        assert isinstance(recipe, Recipe)
        training = replace(recipe.diffusion.training, batch_size=self.batch or recipe.diffusion.training.batch_size)
        return replace(recipe, seed=self.seed, diffusion=replace(recipe.diffusion, training=training))

    @property
    def of(self) -> dict[str, Any]:
        """What a number says of the run."""
        recipe = self.recipe
        kind = recipe.first_stage.regulariser.upper()
        batch = recipe.diffusion.training.batch_size
        return {"f": recipe.first_stage.f, "regulariser": "–" if kind == "NONE" else kind, "batch": batch}


VARIANTS = (
    *(Variant(f"toy32-f{f}", seed) for seed in range(3) for f in (1, 4, 8)),
    Variant("toy32-f2"),
    Variant("toy32-vq-f4"),
    Variant("toy32-f1", batch=7),  # batch sizes of table 13: what fits on one A100
    Variant("toy32-f4", batch=40),
)
PICTURED = tuple(Variant(f"toy32-f{f}") for f in (1, 2, 4, 8))


# --- Training ---


def options(runs: Path, **more: Any) -> RunOptions:
    """How all runs are done."""
    return RunOptions(**{"cache_dir": runs / "cache", "precision": "fp32", "sample_every": 0, "device": "cpu"} | more)


def train_first_stage(name: str, runs: Path) -> Path:
    """The folder of the first stage of a recipe, trained where it is not there."""
    recipe, folder = find_recipe(name), runs / f"first-stage-{name}"
    assert isinstance(recipe, Recipe)
    if not (folder / "model" / "config.json").exists():
        alone = AutoencoderRecipe(f"{name}-first-stage", f"of {name}", recipe.dataset, 32, recipe.first_stage)
        began, resumed = time.process_time(), (folder / "recipe.json").exists()
        train(
            alone, folder, options(runs, resume=resumed, every=200, log_fn=lambda line: print(name, line, flush=True))
        )
        save_json({"seconds": time.process_time() - began, "whole": not resumed}, folder / "time.json")
    return folder / "model"


class Clock:
    """Processor time at each line of the log, for the seconds of a step."""

    def __init__(self, folder: Path):
        self.path, self.last = folder / "clock.jsonl", (0, 0.0)

    def __call__(self, line: str) -> None:
        print(self.path.parent.name, line, flush=True)
        lines = (self.path.parent / "log.jsonl").read_text(encoding="utf-8").splitlines()
        told, now = json.loads(lines[-1]), time.process_time()
        if told["stage"] == "diffusion":
            step, then = self.last
            if 0 < step < told["step"]:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"steps": told["step"] - step, "seconds": now - then}) + "\n")
            self.last = told["step"], now


def run(recipe: Recipe, folder: Path, runs: Path, **more: Any) -> None:
    """Train one model, or go on with it."""
    resumed = (folder / "recipe.json").exists()
    folder.mkdir(parents=True, exist_ok=True)
    train(recipe, folder, options(runs, resume=resumed, log_fn=Clock(folder), **more))


def pace(folder: Path) -> float:
    """Seconds of a step, the mean over a run."""
    lines = [json.loads(line) for line in (folder / "clock.jsonl").read_text(encoding="utf-8").splitlines()]
    return sum(line["seconds"] for line in lines) / sum(line["steps"] for line in lines)


def plan(variant: Variant, recipe: Recipe, runs: Path, minutes: float) -> tuple[int, int]:
    """How many steps fit into the time, by `PACED` first steps, and steps between kept models.

    The slowest run keeps a model of each eighth of its steps, and all others keep one after as many steps as it does.
    """
    path = runs / "plan.json"
    known = load_json(path) if path.exists() else {}
    key = variant.folder.partition("-seed")[0]
    if key not in known:
        folder = runs / f"pace-{key}"
        run(recipe.shortened(PACED), folder, runs, every=PACED // 3)
        stride = known[SLOWEST] // MOMENTS if SLOWEST in known else 1
        steps = stride * round(60 * minutes / pace(folder) / stride)
        steps -= steps % (MOMENTS if key == SLOWEST else stride)
        known = (load_json(path) if path.exists() else {}) | {key: max(MOMENTS, steps)}
        save_json(known, path)
    return int(known[key]), int(known[SLOWEST]) // MOMENTS


def train_all(runs: Path, minutes: float, share: tuple[int, int]) -> None:
    """Train what is not there yet; the slowest one first, since the plan of the others goes by it."""
    slowest = Variant(SLOWEST)
    plan(slowest, slowest.recipe, runs, minutes)
    for i, variant in enumerate(VARIANTS):
        folder, recipe = runs / variant.folder, variant.recipe
        if i % share[1] != share[0] or (folder / "model" / "config.json").exists():
            continue
        if recipe.first_stage.training is not None:
            recipe = replace(recipe, pretrained=str(train_first_stage(variant.name, runs)))
        steps, stride = plan(variant, recipe, runs, minutes)
        training = replace(recipe.diffusion.training, steps=steps)
        recipe = replace(recipe, diffusion=replace(recipe.diffusion, training=training))
        run(recipe, folder, runs, every=steps // (2 * MOMENTS) or 1, snapshot_every=stride)


# --- Scores ---


def enlarged(images: Tensor) -> Tensor:
    """To 64², which judge and features read."""
    return torch.nn.functional.interpolate(images, scale_factor=2.0, mode="bicubic").clamp(-1, 1)


def scenes(split: str, rows: Sequence[int]) -> dict[str, Any]:
    """Images of 32² and their captions."""
    data = open_dataset("toy", None, split, 32, keys=("image", "caption"))
    return collate([data[i] for i in rows])


class Judges:
    """What scores a set of images, and the real ones beside it."""

    def __init__(self, n: int, sets: int):
        self.features, self.reader = find_extractor("toy-features"), SceneReader.from_pretrained("scene-reader")
        self.real = [scenes("test", range(k * n, (k + 1) * n)) for k in range(2 * sets)]
        vectors = [extract(self.features, enlarged(batch["image"])) for batch in self.real]
        self.others = vectors[sets:]
        self.floors = [frechet_distance(a, b) for a, b in zip(vectors, self.others)]

    def score(self, images: Tensor, k: int) -> dict[str, Any]:
        """Of images that were drawn for set k: Fréchet excess; right answers to captions of one thing, and how many."""
        large, captions = enlarged(images), self.real[k]["caption"]
        one = [i for i, caption in enumerate(captions) if len(read_caption(caption).things) == 1]
        judged = prompt_accuracy(large[one], [captions[i] for i in one], self.reader)
        shares = {"colour": judged.words["colour"], "shape": judged.words["shape"], "exact": judged.exact}
        excess = frechet_distance(extract(self.features, large), self.others[k]) - self.floors[k]
        return {"excess": excess, **{name: [share.right, share.n] for name, share in shares.items()}}


def eighths(steps: int, slowest: int) -> list[int]:
    """The kept models that are nearest to `JUDGED` eighths of a run."""
    stride = slowest // MOMENTS
    return sorted({stride * max(1, round(steps * part / MOMENTS / stride)) for part in JUDGED})


def moments(steps: int, slowest: int) -> list[int]:
    """The steps after which a run is judged: eighths of its own steps and of the slowest run's."""
    return sorted({*eighths(steps, slowest), *(step for step in eighths(slowest, slowest) if step <= steps)})


def kept_model(folder: Path, step: int) -> LatentDiffusion:
    """The model of a run after some steps."""
    return LatentDiffusion.from_pretrained(folder / "snapshots" / f"diffusion-{step:06d}")


def picture(variant: Variant, captions: Sequence[str], given: argparse.Namespace) -> None:
    """The same captions and noise after each eighth of a run, as the score's first images."""
    plans, rows = load_json(given.runs / "plan.json"), []
    for step in eighths(plans[variant.name], plans[SLOWEST]):
        model = kept_model(given.runs / variant.folder, step)
        rows.append(model.sample(list(captions[:SHOWN]), steps=given.steps, scale=1.0, seed=0))
    save(grid(torch.cat(rows), columns=SHOWN, pad=0), RESULTS.parent / f"compression_f{variant.of['f']}.png")


def score_run(folder: Path, judges: Judges, sets: int, given: argparse.Namespace) -> dict[str, Any]:
    """Score the kept models of one run; what is in its scores.json is not done again."""
    path = folder / "scores.json"
    asked = {"n": given.n, "steps": given.steps}
    known = load_json(path) if path.exists() else asked
    if any(known.get(name) != value for name, value in asked.items()):
        raise SystemExit(f"{path} is of other settings: remove it, or ask for them again")
    plans = load_json(given.runs / "plan.json")
    for step in moments(plans[folder.name.partition("-seed")[0]], plans[SLOWEST]):
        for k in range(sets):
            if (key := f"{step}/{k}") in known:
                continue
            model = kept_model(folder, step)
            captions = judges.real[k]["caption"]
            images = model.sample(captions, steps=given.steps, scale=1.0, seed=k * given.n, batch_size=64)
            known[key] = judges.score(images, k)
            save_json(known, path)
            print(folder.name, key, known[key], flush=True)
    return known


def score_first_stage(name: str, folder: Path, judges: Judges, sets: int) -> list[Measurement]:
    """How well a first stage gives held-out scenes back, and the time that it took."""
    recipe = find_recipe(name)
    assert isinstance(recipe, Recipe)
    of = {"f": recipe.first_stage.f, "regulariser": recipe.first_stage.regulariser.upper()}
    stage, images = load_first_stage(folder / "model"), torch.cat([judges.real[k]["image"] for k in range(sets)])
    with torch.no_grad():
        back = torch.cat([stage.reconstruct(x) for x in images.split(64)])
    found = [judges.score(part, k) for k, part in enumerate(back.split(len(images) // sets))]
    decibels = psnr(back, images)
    numbers = [
        Measurement.mean("PSNR", decibels.mean().item(), (decibels.var() / len(back)).sqrt().item(), len(back), of=of),
        Measurement.repeated("Fréchet excess of reconstructions", [each["excess"] for each in found], of=of),
        *shares_of(found, of, " of reconstructions"),
    ]
    return [*numbers, Measurement("training time", load_json(folder / "time.json")["seconds"], of=of, unit="s")]


def shares_of(found: Sequence[Mapping[str, Any]], of: Mapping[str, Any], what: str = "") -> list[Measurement]:
    """The shares of several sets together."""
    totals = {name: [sum(each[name][i] for each in found) for i in (0, 1)] for name in ("colour", "shape", "exact")}
    return [Measurement.share(name + what, right, n, of=of) for name, (right, n) in totals.items()]


def score_all(given: argparse.Namespace) -> None:
    """Score what is there, write the results."""
    judges, runs, sets = Judges(given.n, given.sets), given.runs, given.sets
    own = [judges.score(judges.real[k]["image"], k) for k in range(sets)]
    numbers = shares_of(own, {"set": "real"})
    for name in dict.fromkeys(variant.name for variant in VARIANTS):
        if (runs / f"first-stage-{name}" / "model").exists():
            numbers += score_first_stage(name, runs / f"first-stage-{name}", judges, sets)
    groups: dict[str, list[Variant]] = {}
    for i, variant in enumerate(VARIANTS):
        if (runs / variant.folder / "model").exists():
            groups.setdefault(variant.folder.partition("-seed")[0], []).append(variant)
            if i % given.share[1] == given.share[0]:
                score_run(runs / variant.folder, judges, sets, given)
    if given.share[1] > 1:
        return
    plans = load_json(runs / "plan.json")
    for key, variants in groups.items():
        of = variants[0].of
        seconds = [pace(runs / variant.folder) for variant in variants]
        numbers.append(Measurement("seconds of a step", sum(seconds) / len(seconds), of=of, unit="s", n=len(seconds)))
        scored = {variant.seed: score_run(runs / variant.folder, judges, sets, given) for variant in variants}
        for step in moments(plans[key], plans[SLOWEST]):
            at = {**of, "steps": step, "minutes": round(step * sum(seconds) / len(seconds) / 60, 2)}
            found = [scores[f"{step}/{k}"] for scores in scored.values() for k in range(sets)]
            numbers.append(Measurement.repeated("Fréchet excess", [each["excess"] for each in found], of=at, n=given.n))
            numbers += shares_of(found, at)
            for seed, scores in scored.items():
                for k in range(sets):
                    single = {**at, "training seed": seed, "set": k}
                    numbers.append(Measurement("Fréchet excess of a set", scores[f"{step}/{k}"]["excess"], of=single))
        if variants[0] in PICTURED:
            picture(variants[0], judges.real[0]["caption"], given)
    about = ABOUT.format(steps=given.steps, n=given.n, sets=sets)
    numbers = sorted([*numbers, *numbers_of_others(numbers)], key=which)
    measured_here(TITLE, numbers, about, seed=0, command=COMMAND).save(RESULTS)


def which(number: Measurement) -> tuple[int, str, int]:
    """Which run or first stage a number is of; real images come first."""
    return int(number.of.get("f", 0)), str(number.of.get("regulariser", "")), int(number.of.get("batch", 0))


def numbers_of_others(numbers: Sequence[Measurement]) -> list[Measurement]:
    """What was measured earlier of runs that these numbers are not of."""
    here = {which(number) for number in numbers}
    old = load_measurements(RESULTS) if RESULTS.exists() else ()
    return [number for number in old if which(number) not in here]


def main() -> None:
    """Train or score."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("train", "score"))
    parser.add_argument("--minutes", type=float, default=15, help="of each UNet's training")
    parser.add_argument("--n", type=int, default=256, help="images of a set")
    parser.add_argument("--sets", type=int, default=3, help="sets of images")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th run, from I")
    parser.add_argument("--runs", type=Path, default=Path("runs/compression"), help="where the runs are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "train":
        train_all(args.runs, args.minutes, tuple(args.share))
    else:
        score_all(args)


if __name__ == "__main__":
    main()
