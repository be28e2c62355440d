"""Table 8 in miniature: first stages of f = 2 to 16, KL and VQ, trained for equal short budgets on real faces.

    python benchmarks/first_stages.py --data-dir DATA --weights-dir WEIGHTS --steps 1200

DATA holds CelebA (or any subset of its files) in a folder celeba/, WEIGHTS the backbones of LPIPS. Trained are pixels
and AlexNet's LPIPS. Scored are images that no stage was trained on, by PSNR, SSIM and VGG's LPIPS, a network that no
stage was trained with. Writes ldm_edu/results/first_stages.json and, as a table, benchmarks/first_stages.md. A run that
was cut off goes on where it stopped.
"""

import argparse
import time
from pathlib import Path

from ldm_edu import LPIPS
from ldm_edu.data.batches import collate
from ldm_edu.data.registry import open_dataset
from ldm_edu.evaluation.reconstruction import ReconstructionScores, score_first_stage
from ldm_edu.first_stage.quantization import load_first_stage
from ldm_edu.measurements import Measurement, measured_here
from ldm_edu.training.dispatch import train
from ldm_edu.training.recipes import AutoencoderRecipe, FirstStageRecipe, Training
from ldm_edu.training.run import RunOptions

LEVELS = {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 5), 16: (1, 2, 4, 5, 5)}  # f: widths
HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "ldm_edu" / "results" / "first_stages.json"
ABOUT = (
    "Each stage is trained on {faces:,} faces of CelebA for {steps:,} steps of 8, in {precision}, with L1, 5 × the "
    "squared error and AlexNet's LPIPS (weight 1), without a discriminator; the regulariser is KL with weight 1e-6, or "
    "a codebook of 1,024 entries. All is measured on {images} other faces, and the intervals are those of means over "
    "them. No row was trained twice: what another seed would change is in no interval."
)
CHANNELS = {2: 2, 4: 3, 8: 4, 16: 8}  # f: latent channels, as in table 8


def recipe(f: int, regulariser: str, steps: int) -> AutoencoderRecipe:
    """The recipe of one row: everything but f, c and the regulariser is the same."""
    return AutoencoderRecipe(
        name=f"{regulariser}-f{f}",
        about="a row of results/first_stages.json",
        dataset="celeba",
        size=64,
        first_stage=FirstStageRecipe(
            training=Training(steps=steps, batch_size=8, lr=2e-3, ema=0.99, held_out=64),
            multipliers=LEVELS[f],
            latent_channels=CHANNELS[f],
            regulariser=regulariser,
            num_codes=1024,
            perceptual="lpips-alex",
        ),
    )


def numbers_of(f: int, kind: str, scores: ReconstructionScores, seconds: float) -> list[Measurement]:
    """What is measured of one first stage."""
    c, n = CHANNELS[f], scores.images
    of = {"f": f, "c": c, "numbers": c * (64 // f) ** 2, "regulariser": kind.upper()}  # numbers: of a latent
    numbers = [
        Measurement.mean("PSNR", scores.psnr.value, scores.psnr.error, n, unit="dB", of=of),
        Measurement.mean("SSIM", scores.ssim.value, scores.ssim.error, n, of=of),
        Measurement.mean("LPIPS (VGG)", scores.distance.value, scores.distance.error, n, of=of),
    ]
    if scores.usage:
        numbers.append(Measurement("entries used", float(scores.usage.used), of=of, n=n))
    return [*numbers, Measurement("training time", seconds, unit="s", of=of)]


def main() -> None:
    """Train what is not there yet, score all, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="holds celeba/")
    parser.add_argument("--weights-dir", type=Path, required=True, help="holds the backbones of LPIPS")
    parser.add_argument("--steps", type=int, default=1500, help="of each first stage")
    parser.add_argument("--images", type=int, default=256, help="held-out faces")
    parser.add_argument("--runs", type=Path, default=Path("runs/first_stages"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=HERE / "first_stages.md", help="the table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the numbers")
    args = parser.parse_args()

    known, held_out = (open_dataset("celeba", args.data_dir, split, 64) for split in ("train", "test"))
    images = collate([held_out[i] for i in range(min(args.images, len(held_out)))])["image"]
    lpips = LPIPS("vgg", args.weights_dir)
    numbers, trained = [], {}
    for f in LEVELS:
        for kind in ("kl", "vq"):
            folder, began = args.runs / f"{kind}-f{f}", time.monotonic()
            if not (folder / "model" / "config.json").exists():
                resume = (folder / "recipe.json").exists()
                places = {"data_dir": args.data_dir, "cache_dir": args.runs / "cache", "weights_dir": args.weights_dir}
                options = RunOptions(**places, resume=resume, log_fn=print, every=250, sample_every=0)
                train(recipe(f, kind, args.steps), folder, options)
            first_stage = load_first_stage(folder / "model")
            scores, trained = score_first_stage(first_stage, images, lpips), first_stage.provenance or {}
            numbers += numbers_of(f, kind, scores, float(trained["seconds"]))
            print(f"{kind} f = {f}: {scores} ({time.monotonic() - began:.0f} s)", flush=True)
    about = ABOUT.format(faces=len(known), steps=args.steps, precision=trained["precision"], images=len(images))
    command = f"python benchmarks/first_stages.py --data-dir DATA --weights-dir WEIGHTS --steps {args.steps}"
    seed = recipe(2, "kl", args.steps).seed
    measured = measured_here("First stages on faces, 64²", numbers, about, seed, command=command)
    measured.save(args.results)
    page = f"# {measured.title}\n\n{measured.about}\n\n{measured.table()}\n\n{measured.source()}\n"
    args.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
