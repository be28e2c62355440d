"""Table 8 in miniature: first stages of f = 2 to 16, KL and VQ, trained for equal short budgets on real faces.

    python benchmarks/first_stages.py --data-dir DATA --weights-dir WEIGHTS --steps 1200

DATA holds CelebA (or any subset of its files) in a folder celeba/, WEIGHTS the backbones of LPIPS. Trained are pixels
and AlexNet's LPIPS. Scored are images that no stage was trained on, by PSNR, SSIM and VGG's LPIPS, a network that no
stage was trained with. Writes ldm_edu/results/first_stages.md. A run that was cut off goes on where it stopped.
"""

import argparse
import time
from pathlib import Path

import torch

from ldm_edu import LPIPS
from ldm_edu.data.batches import collate
from ldm_edu.data.registry import open_dataset
from ldm_edu.evaluation.reconstruction import ReconstructionScores, score_first_stage
from ldm_edu.first_stage.quantization import load_first_stage
from ldm_edu.training.dispatch import train
from ldm_edu.training.recipes import AutoencoderRecipe, FirstStageRecipe, Training
from ldm_edu.training.run import RunOptions

LEVELS = {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 5), 16: (1, 2, 4, 5, 5)}  # f: widths
OUT = Path(__file__).resolve().parents[1] / "ldm_edu" / "results" / "first_stages.md"
CHANNELS = {2: 2, 4: 3, 8: 4, 16: 8}  # f: latent channels, as in table 8


def recipe(f: int, regulariser: str, steps: int) -> AutoencoderRecipe:
    """The recipe of one row: everything but f, c and the regulariser is the same."""
    return AutoencoderRecipe(
        name=f"{regulariser}-f{f}",
        about="a row of results/first_stages.md",
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


def table(
    rows: dict[tuple[int, str], tuple[ReconstructionScores, dict]],
    training: Training,
    faces: int,  # that were trained on
) -> str:
    """Markdown, a line for each first stage."""
    scores, provenance = next(iter(rows.values()))
    lines = [
        "# First stages on faces, 64²",
        "",
        f"`python benchmarks/first_stages.py --data-dir DATA --weights-dir WEIGHTS --steps {training.steps}`, "
        f"{provenance['device']}, {provenance['precision']}, torch {torch.__version__}.",
        "",
        f"Each stage is trained on {faces:,} faces of CelebA for {training.steps:,} steps of {training.batch_size}, "
        "with L1, 5 × the squared error and AlexNet's LPIPS (weight 1), without a discriminator; the regulariser is KL "
        f"with weight 1e-6, or a codebook of 1,024 entries. All is measured on {scores.images} other faces; ± is the "
        "standard error of a mean over them. No row was trained twice: what another seed would change is not in it.",
        "",
        "| f | regulariser | latent | numbers | PSNR in dB | SSIM | LPIPS (VGG) | entries used | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (f, kind), (scores, provenance) in rows.items():
        c, side = CHANNELS[f], 64 // f
        used = f"{scores.usage.used} of {scores.usage.num_codes}" if scores.usage else "–"
        lines.append(
            f"| {f} | {kind.upper()} | {side}×{side}×{c} | {c * side * side:,} | {scores.psnr} | {scores.ssim} |"
            f" {scores.distance} | {used} | {provenance['seconds']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is not there yet, score all, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="holds celeba/")
    parser.add_argument("--weights-dir", type=Path, required=True, help="holds the backbones of LPIPS")
    parser.add_argument("--steps", type=int, default=1500, help="of each first stage")
    parser.add_argument("--images", type=int, default=256, help="held-out faces")
    parser.add_argument("--runs", type=Path, default=Path("runs/first_stages"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=OUT, help="the table")
    args = parser.parse_args()

    known, held_out = (open_dataset("celeba", args.data_dir, split, 64) for split in ("train", "test"))
    images = collate([held_out[i] for i in range(min(args.images, len(held_out)))])["image"]
    lpips = LPIPS("vgg", args.weights_dir)
    rows = {}
    for f in LEVELS:
        for kind in ("kl", "vq"):
            folder, began = args.runs / f"{kind}-f{f}", time.monotonic()
            if not (folder / "model" / "config.json").exists():
                resume = (folder / "recipe.json").exists()
                places = {"data_dir": args.data_dir, "cache_dir": args.runs / "cache", "weights_dir": args.weights_dir}
                options = RunOptions(**places, resume=resume, log_fn=print, every=250, sample_every=0)
                train(recipe(f, kind, args.steps), folder, options)
            first_stage = load_first_stage(folder / "model")
            rows[f, kind] = score_first_stage(first_stage, images, lpips), first_stage.provenance
            print(f"{kind} f = {f}: {rows[f, kind][0]} ({time.monotonic() - began:.0f} s)", flush=True)
    training = recipe(2, "kl", args.steps).first_stage.training
    args.out.write_text(table(rows, training, len(known)), encoding="utf-8")


if __name__ == "__main__":
    main()
