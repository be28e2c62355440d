"""Which noise schedule suits latents of 8 × 8? toy-text2image with each, trained briefly and judged.

    python benchmarks/noise_schedules.py --steps 2000

Every variant is the recipe of toy-text2image with another schedule and fewer steps, so its learning rate falls to 0 at
the end of them. All have the first stage that ships with the package and the same samples in the same order. The
judge then counts which captions of the validation split each draws, from the same noise. Losses are not compared:
each schedule asks about other noise levels. Writes ldm_edu/results/noise_schedules.json and, as a table,
benchmarks/noise_schedules.md. A run that was cut off goes on where it stopped, and a variant that is there already is
not trained again.
"""

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm_edu import LatentDiffusion, SceneReader, load_first_stage
from ldm_edu.diffusion.schedule import NoiseLevels
from ldm_edu.evaluation.prompts import captions_of, score_prompts
from ldm_edu.files import load_json, save_json
from ldm_edu.measurements import Measurement, measured_here
from ldm_edu.training.recipes import TOY_TEXT2IMAGE, Recipe
from ldm_edu.training.resume import run_stage
from ldm_edu.training.run import RunOptions, open_run, settings_of_the_run
from ldm_edu.training.stages import DiffusionStage
from ldm_edu.training.text import TextStage

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "ldm_edu" / "results" / "noise_schedules.json"
ABOUT = (
    "toy-text2image with other noise levels, its UNet trained in bf16 with batches of 64, learning rate falling to 0. "
    "*Half way*: the first of the 1,000 levels at which the noise is as strong as the signal. *Drawn exactly*: every "
    "thing of a validation caption and nothing else, 50 DDIM steps, read by the judge, with Wilson's interval. One "
    "seed each: what another one would change is in no interval."
)
VARIANTS: dict[str, dict[str, Any]] = {  # name: fields of the recipe's diffusion part
    "scaled linear, 0.0015 to 0.0195 (the paper's images)": {"schedule": "scaled_linear"},
    "scaled linear, 0.00085 to 0.012 (its text model)": {
        "schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "scaled linear, 0.00001 to 0.026": {"schedule": "scaled_linear", "beta_start": 1e-5, "beta_end": 0.026},
    "cosine": {"schedule": "cosine"},
}


def variant(fields: Mapping[str, Any], steps: int) -> Recipe:
    """The recipe with these fields in its diffusion part, for fewer steps."""
    diffusion = TOY_TEXT2IMAGE.diffusion
    return replace(
        TOY_TEXT2IMAGE,
        diffusion=replace(diffusion, training=replace(diffusion.training, steps=steps), **fields),
    )


def learn(recipe: Recipe, folder: Path) -> LatentDiffusion:
    """Train text conditioner and UNet of a recipe on the shipped first stage."""
    made: dict[str, Any] = {"first_stage": load_first_stage("toy-text2image")}
    options = RunOptions(
        cache_dir=folder.parent / "cache", precision="bf16", sample_every=0, resume=(folder / "recipe.json").exists()
    )
    run, latents = open_run(recipe, folder, options), folder.parent / "latents"
    if latents.is_dir():  # of another variant: the same first stage has encoded the same images
        shutil.copytree(latents, folder / "latents", dirs_exist_ok=True)
    try:
        with settings_of_the_run(run.accelerator):
            for kind in (TextStage, DiffusionStage):
                stage = kind(recipe, run, made)
                made[stage.name] = stage.finish(run_stage(run, stage)[0])
        shutil.copytree(folder / "latents", latents, dirs_exist_ok=True)
        return made["diffusion"].eval().float()
    finally:
        run.close()


def half_way(fields: Mapping[str, Any]) -> int:
    """The first level at which the noise is at least as strong as the signal."""
    ends = {name: value for name, value in fields.items() if name.startswith("beta")}
    return int((NoiseLevels(kind=fields["schedule"], **ends).snr <= 1).nonzero()[0])


def main() -> None:
    """Train and judge what is not there yet, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of each variant's UNet")
    parser.add_argument("--captions", type=int, default=512, help="of the validation split")
    parser.add_argument("--scale", type=float, default=3.0, help="of the guidance")
    parser.add_argument("--threads", type=int, default=2, help="that torch computes with")
    parser.add_argument("--runs", type=Path, default=Path("runs/noise_schedules"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=HERE / "noise_schedules.md", help="the table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the numbers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    captions, reader = captions_of("validation", args.captions), SceneReader.from_pretrained("scene-reader")
    numbers: list[Measurement] = []
    for k, (name, fields) in enumerate(VARIANTS.items()):
        folder, of = args.runs / f"variant-{k}", {"schedule": name}
        asked = {"variant": name, "steps": args.steps, "captions": args.captions, "scale": args.scale}
        if not (folder / "score.json").exists():
            print(name, flush=True)
            exact = score_prompts(learn(variant(fields, args.steps), folder), reader, captions, args.scale).exact
            save_json(asked | {"right": exact.right, "n": exact.n}, folder / "score.json")
        if asked.items() - (found := load_json(folder / "score.json")).items():
            raise SystemExit(f"{folder} is of other settings: give another folder as --runs, or remove it")
        numbers.append(Measurement("half way", float(half_way(fields)), of=of))
        numbers.append(Measurement.share("drawn exactly", found["right"], found["n"], of=of))
        print(*numbers[-2:], sep="\n", flush=True)
    measured = measured_here("Which noise schedule?", numbers, ABOUT, seed=TOY_TEXT2IMAGE.seed)
    measured.save(args.results)
    page = f"# {measured.title}\n\n{measured.about}\n\n{measured.table()}\n\n{measured.source()}\n"
    args.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
