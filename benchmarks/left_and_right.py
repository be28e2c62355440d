"""Why is "left" not heard? Variants of toy-text2image, trained for equal steps, asked how much a swapped word costs.

    python benchmarks/left_and_right.py --steps 1000

Every variant begins with the recipe of toy-text2image without its warm start, with ε-prediction and with the paper's
noise schedule, which is how the model was trained that could not tell left from right, and changes one thing or two.
All have the first stage that ships with the package, the learning rate of the whole run, and the same samples in the
same order. On the way each is asked about held-out captions in which left and right are swapped, and others with front
and behind. Writes ldm_edu/results/left_and_right.json and, as a table of the last step, benchmarks/left_and_right.md.
A variant that is there already is not trained again.
"""

import argparse
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm_edu import ToyCOCO, collate, load_first_stage
from ldm_edu.evaluation.conditions import score_condition
from ldm_edu.measurements import Measurement, load_measurements, measured_here
from ldm_edu.training.loop import optimise
from ldm_edu.training.recipes import TOY_TEXT2IMAGE, ConditionerRecipe, DiffusionRecipe, Recipe
from ldm_edu.training.resume import run_stage
from ldm_edu.training.run import Run, RunOptions, open_run, settings_of_the_run
from ldm_edu.training.stages import DiffusionStage
from ldm_edu.training.state import make_state
from ldm_edu.training.text import TextStage

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "ldm_edu" / "results" / "left_and_right.json"
PAIRS = {"left, right": ("left", "right"), "front, behind": ("in front of", "behind")}  # words that are swapped
ABOUT = (
    "Variants of toy-text2image, trained in bf16 with batches of 64, asked on the way about held-out captions with one "
    "of two words. *Loss*: with the caption as it is. *Rise with swapped words*, *rise without caption*: how much it "
    "rises when the two words are exchanged, and when there is no caption. *Cost*: the first rise in percent of the "
    "second. *Move*: how far the exchange moves the tokens of the text transformer, relative to their length. Losses "
    "of ε- and of v-prediction are of different targets and cannot be compared. One seed each: what another one would "
    "change is in no interval."
)


def changed(recipe: Recipe, **what: Any) -> Recipe:
    """The recipe with other values in its diffusion part."""
    return replace(recipe, diffusion=replace(recipe.diffusion, **what))


AFTER = changed(TOY_TEXT2IMAGE, schedule="scaled_linear")  # the paper's: another schedule is another question
BEFORE = replace(changed(AFTER, prediction="epsilon"), text=None)


def deeper(diffusion: DiffusionRecipe) -> tuple[ConditionerRecipe, ...]:
    """The recipe's text conditioner with a transformer of twice the depth."""
    (text,) = diffusion.conditioners
    return (replace(text, arguments={**text.arguments, "depth": 2 * text.arguments["depth"]}),)


VARIANTS = {  # name: recipe, and whether half of each batch has a caption with left or right
    "as it was: ε, untrained text": (BEFORE, False),
    "half of all captions with left or right": (BEFORE, True),
    "text transformer of 4 layers": (changed(BEFORE, conditioners=deeper(BEFORE.diffusion)), False),
    "UNet of width 96": (changed(BEFORE, channels=96), False),
    "v-prediction": (changed(BEFORE, prediction="v"), False),
    "v-prediction, half with left or right": (changed(BEFORE, prediction="v"), True),
    "text that has answered riddles": (replace(BEFORE, text=AFTER.text), False),
    "v-prediction, text that has answered riddles": (AFTER, False),
}


class Half(DiffusionStage):
    """A stage in which half of every batch has a caption with left or right."""

    def __init__(self, recipe: Recipe, run: Run, made: Mapping[str, Any]):
        super().__init__(recipe, run, made)
        captions = self.train_data.column("captions")[: self.n]
        self.told = [[text for text in texts if {"left", "right"} & {*text.split()}] for texts in captions]
        self.rows_told = [i for i, texts in enumerate(self.told) if texts]

    def samples(self, dataset: Any, step: int, indices: Any, repeats: Any = None) -> dict[str, Any]:
        """The batch with the first half of its samples replaced."""
        if dataset is not self.train_data:
            return super().samples(dataset, step, indices, repeats)
        half = len(indices) // 2
        picked = [self.rows_told[i % len(self.rows_told)] for i in indices[:half]]
        batch = super().samples(dataset, step, [*picked, *indices[half:]])
        for k, i in enumerate(picked):
            batch["caption"][k] = self.told[i][0]
        return batch


def swapped(caption: str, a: str, b: str) -> str:
    """The caption with two phrases exchanged."""
    return re.sub(rf"\b({a}|{b})\b", lambda found: b if found[0] == a else a, caption)


def questions(n: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """For each pair of words n held-out scenes with one of them in the caption, and the captions with the other one."""
    data, asked = ToyCOCO("validation"), {}
    for name, (a, b) in PAIRS.items():
        found = []
        for i in range(len(data)):
            if re.search(rf"\b({a}|{b})\b", data.describe(i)[1][0]):
                found.append(data[i])
            if len(found) == n:
                break
        batch = collate(found)
        asked[name] = batch, {"caption": [swapped(text, a, b) for text in batch["caption"]]}
    return asked


def ask(model: Any, asked: Mapping[str, Any], **of: str | int) -> list[Measurement]:
    """For each pair the loss, its rise with the words swapped and without a caption, and how far tokens move."""
    numbers = []
    for words, (batch, other) in asked.items():
        scores = score_condition(model.eval(), batch, other=other)
        assert scores.null is not None
        with torch.no_grad():
            own, moved = (model.conditioner(captions).context for captions in (batch["caption"], other["caption"]))
        what: dict[str, Any] = {"of": {**of, "words": words}, "n": len(batch["caption"])}
        means = {"loss": scores.own, "rise with swapped words": scores.other, "rise without caption": scores.null}
        numbers += [Measurement.mean(name, mean.value, mean.error, **what) for name, mean in means.items()]
        if scores.null.value:  # 0 where nothing has been learned yet
            numbers.append(Measurement("cost", 100 * scores.other.value / scores.null.value, unit="%", **what))
        numbers.append(Measurement("move", ((own - moved).norm() / own.norm()).item(), **what))
    return numbers


def learn(name: str, folder: Path, steps: int, asked: Mapping[str, Any]) -> list[Measurement]:
    """Train a variant for some steps of its recipe; what it answers on the way."""
    recipe, half = VARIANTS[name]
    made: dict[str, Any] = {"first_stage": load_first_stage("toy-text2image")}
    options = RunOptions(
        cache_dir=folder.parent / "cache", precision="bf16", sample_every=0, resume=(folder / "recipe.json").exists()
    )
    run, latents = open_run(recipe, folder, options), folder.parent / "latents"
    if latents.is_dir():  # of another variant: the same first stage has encoded the same images
        shutil.copytree(latents, folder / "latents", dirs_exist_ok=True)
    try:
        with settings_of_the_run(run.accelerator):
            if recipe.text is not None:
                text = TextStage(recipe, run, made)
                made["text"] = text.finish(run_stage(run, text)[0])
            stage = (Half if half else DiffusionStage)(recipe, run, made)
            shutil.copytree(folder / "latents", latents, dirs_exist_ok=True)
            state, task, optimizer = make_state(run, stage)
            numbers: list[Measurement] = []
            for result in optimise(stage, run.accelerator, task, optimizer, state.ema):
                if result.step % (steps // 8) == 0:
                    found = ask(stage.finish(state.ema.module), asked, variant=name, step=result.step)
                    print(*map(str, found), sep="\n", flush=True)
                    numbers += found
                if result.step == steps:
                    break
            return numbers
    finally:
        run.close()


def main() -> None:
    """Train what is not there yet, write table and curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of each variant")
    parser.add_argument("--captions", type=int, default=128, help="held-out captions for each pair of words")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/left_and_right"), help="where caches and curves are kept"
    )
    parser.add_argument("--out", type=Path, default=HERE / "left_and_right.md", help="the table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the numbers")
    args = parser.parse_args()
    if args.steps < 8 or args.steps % 8 or args.captions < 2:
        parser.error("--steps should be a multiple of 8, and --captions at least 2")
    torch.set_num_threads(1)

    numbers, asked = [], questions(args.captions)
    for k, name in enumerate(VARIANTS):
        kept = args.runs / f"variant-{k}" / "numbers.json"
        what = f"{args.steps} steps, {args.captions} captions"
        if not kept.exists():
            print(name, flush=True)
            measured_here(name, learn(name, kept.parent, args.steps, asked), what).save(kept)
        found = load_measurements(kept)
        if (found.title, found.about) != (name, what):
            raise SystemExit(f"{kept} is of other settings: give another folder as --runs, or remove it")
        numbers += found
    measured = measured_here('Why "left" was not heard', numbers, ABOUT, seed=TOY_TEXT2IMAGE.seed)
    measured.save(args.results)
    table = measured.of(step=args.steps).table(["loss", "cost", "move"])
    page = f"# {measured.title}\n\n{measured.about}\n\n{table}\n\n{measured.source()}\n"
    args.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
