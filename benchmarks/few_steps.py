"""How many calls of the denoiser does a sampler need? toy-text2image with each sampler, read by the judge.

    python benchmarks/few_steps.py

Every sampler draws the same captions of the test split, caption i from the noise of seed i, with few and with many
steps and at three guidance scales. The judge says of each picture whether its caption was drawn exactly. A difference
to DDIM with 50 steps is paired, caption by caption, and has its 95 % interval from a bootstrap over captions. Writes
ldm_edu/results/few_steps.json and, as a table, benchmarks/few_steps.md. A run that was cut off goes on where it
stopped.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap

from ldm_edu import LatentDiffusion, SceneReader, prompt_accuracy
from ldm_edu.basics import progress
from ldm_edu.evaluation.prompts import captions_of
from ldm_edu.files import load_json, save_json
from ldm_edu.measurements import Measurement, measured_here

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "ldm_edu" / "results" / "few_steps.json"
REFERENCE = ("ddim", 50)
ABOUT = (
    "toy-text2image (v-prediction, cosine schedule), float32, captions of the test split, caption i from the noise of "
    "seed i. *Calls*: of the denoiser. *Drawn exactly*: every thing of the caption and nothing else, read by the "
    "judge, with Wilson's interval. *Against DDIM* with 50 steps at the same scale: difference in points, paired by "
    "caption, with its interval from a bootstrap over captions. No interval contains what another training of the "
    "model or the judge's own errors would change. The scale that was chosen on validation captions is 6; `sample` "
    "takes 3 where none is given. *Guided at* some levels: at the others the scale is 1."
)
# Name in the table: steps, and the levels that are guided. Heun's method asks twice a step, but for the last one: 2,
# 4, 8, 13 and 25 steps are 3, 7, 15, 25 and 49 calls.
RUNS: dict[str, tuple[tuple[int, ...], tuple[int, int] | None]] = {
    "ddim": ((4, 8, 15, 25, 50), None),
    "dpm_solver_pp": ((4, 8, 15, 25, 50), None),
    "heun": ((2, 4, 8, 13, 25), None),
    "ddpm": ((8, 15, 25, 50), None),
    "ddim, guided at 300 to 999": ((8,), (300, 999)),
    "dpm_solver_pp, guided at 300 to 999": ((8,), (300, 999)),
    "dpm_solver_pp, guided at 500 to 999": ((8,), (500, 999)),
}


def drawn_exactly(
    model: LatentDiffusion, reader: SceneReader, captions: Sequence[str], name: str, steps: int, scale: float
) -> list[bool]:
    """For each caption: did the model draw all of its things, and nothing else?"""
    found: list[bool] = []
    sampler, interval = name.split(",")[0], RUNS[name][1]
    for start in progress(range(0, len(captions), 64), f"{name}, {steps} steps, scale {scale:g}"):
        some = list(captions[start : start + 64])
        images = model.sample(some, steps=steps, scale=scale, seed=start, sampler=sampler, interval=interval)
        found += [not v.missing and not v.extra for v in prompt_accuracy(images, some, reader).verdicts]
    return found


def difference(one: Sequence[bool], other: Sequence[bool]) -> tuple[float, float, float]:
    """The mean difference in points, and its 95 % interval over captions."""
    apart = 100 * (np.array(one, float) - np.array(other, float))
    if not apart.any():
        return 0.0, 0.0, 0.0
    low, high = bootstrap((apart,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(apart.mean()), float(low), float(high)


def numbers_of(found: Mapping[tuple[str, int], Sequence[bool]], scale: float) -> list[Measurement]:
    """What each sampler draws with each number of steps, and how far that is from the reference."""
    numbers = []
    for (name, steps), right in found.items():
        of = {"scale": scale, "sampler": name, "steps": steps, "calls": 2 * steps - 1 if name == "heun" else steps}
        numbers.append(Measurement.share("drawn exactly", sum(right), len(right), of=of))
        if (name, steps) != REFERENCE:
            apart, low, high = difference(right, found[REFERENCE])
            numbers.append(Measurement("against DDIM", apart, of, "points", low, high, len(right)))
    return numbers


def main() -> None:
    """Draw and judge what is not there yet, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=512, help="of the test split, at least 2")
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0, 3.0, 6.0], help="of the guidance")
    parser.add_argument("--threads", type=int, default=2, help="that torch computes with")
    parser.add_argument("--runs", type=Path, default=Path("runs/few_steps.json"), help="where the answers are kept")
    parser.add_argument("--out", type=Path, default=HERE / "few_steps.md", help="the table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the numbers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, reader = LatentDiffusion.from_pretrained("toy-text2image"), SceneReader.from_pretrained("scene-reader")
    captions = captions_of("test", args.captions)
    args.runs.parent.mkdir(parents=True, exist_ok=True)
    answers = load_json(args.runs) if args.runs.exists() else {}
    numbers: list[Measurement] = []
    for scale in args.scales:
        found: dict[tuple[str, int], list[bool]] = {}
        for name, steps in [(name, n) for name, (counts, _) in RUNS.items() for n in counts]:
            key = f"{name}, {steps} steps, scale {scale:g}, {args.captions} captions"
            if key not in answers:
                print(key, flush=True)
                answers[key] = drawn_exactly(model, reader, captions, name, steps, scale)
                save_json(answers, args.runs)
            found[name, steps] = answers[key]
        numbers += numbers_of(found, scale)
    measured = measured_here("How few steps? toy-text2image with each sampler", numbers, ABOUT, seed=0)
    measured.save(args.results)
    page = f"# {measured.title}\n\n{measured.about}\n\n{measured.table(digits=1)}\n\n{measured.source()}\n"
    args.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
