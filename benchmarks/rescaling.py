"""Does the scale of the latents decide what happens beyond the training size (§ 4.3.2, app. D.1)?

    python benchmarks/rescaling.py train
    python benchmarks/rescaling.py score

Two models draw scenes of 64² from a segmentation. One learns latents that are divided by their standard deviation, as
the paper does it for KL; the other learns them as the first stage gives them, with a standard deviation above 3. Both
have the same first stage, recipe and seeds. Then both draw mosaics: the segmentations of k² scenes side by side, in one
piece of 64·k pixels, and the judge reads every tile. Writes ldm_edu/results/rescaling.json.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm_edu import LatentDiffusion, SceneReader, load_first_stage
from ldm_edu.applications import draw
from ldm_edu.data.batches import collate
from ldm_edu.data.toy.datasets import ToyCOCO
from ldm_edu.evaluation.agreement import map_agreement, mean_iou
from ldm_edu.files import load_json, save_json
from ldm_edu.measurements import Measurement, measured_here
from ldm_edu.training.dispatch import train
from ldm_edu.training.recipes import Recipe, find_recipe
from ldm_edu.training.run import RunOptions

RESULTS = Path(__file__).resolve().parent.parent / "ldm_edu" / "results" / "rescaling.json"
STAGE = "toy-text2image"
SCALES = {"rescaled": None, "as they come": 1.0}  # the scale factor; None: the one that was measured
TITLE = "Latents with and without rescaling, beyond the training size"
ABOUT = (
    "Two models of toy scenes of 64² from a segmentation, {steps:,} steps of 64 each, ε-prediction and the paper's "
    "scaled linear schedule; one with the scale factor {factor:.3f} of its first stage, one with 1. {n} test scenes "
    "are drawn in mosaics of across² tiles, in one piece, {drawn} DDIM steps, unguided, and the judge reads each tile. "
    "The interval is that over {parts} parts of the scenes, Student's t. One training each: what another "
    "seed would change is in no interval."
)


def first_stage(name: str, runs: Path) -> str:
    """A folder with the first stage, with the scale factor of that model."""
    folder = runs / f"first-stage-{name.replace(' ', '-')}"
    if not (folder / "config.json").exists():
        stage = load_first_stage(STAGE)
        if (factor := SCALES[name]) is not None:
            stage.scale_factor = factor
        stage.save_pretrained(folder)
    return str(folder)


def recipe(name: str, runs: Path, steps: int) -> Recipe:
    """toy-maps with the segmentation alone, as the paper's levels and targets are."""
    like = find_recipe("toy-maps")
    assert isinstance(like, Recipe)
    training = replace(like.diffusion.training, steps=steps, images=20_000)
    fields = {"schedule": "scaled_linear", "prediction": "epsilon", "drop": 0.0, "drop_apart": 0.0}
    seen = like.diffusion.conditioners[0]
    seen = replace(seen, arguments={k: v for k, v in seen.arguments.items() if k != "has_null"})
    diffusion = replace(like.diffusion, training=training, conditioners=(seen,), **fields)
    return replace(like, name=f"maps-{name.replace(' ', '-')}", diffusion=diffusion, pretrained=first_stage(name, runs))


def mosaic(maps: Tensor, across: int) -> Tensor:
    """(n, h, w) as (n / across², across · h, across · w)."""
    n, h, w = maps.shape
    tiles = maps.reshape(n // across**2, across, across, h, w)
    return tiles.permute(0, 1, 3, 2, 4).reshape(-1, across * h, across * w)


def tiles_of(images: Tensor, across: int) -> Tensor:
    """The other way round, for images (b, 3, across · 64, across · 64)."""
    return images.unfold(2, 64, 64).unfold(3, 64, 64).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 64, 64)


def score(model: LatentDiffusion, across: int, n: int, parts: int, steps: int) -> list[float]:
    """Mean IoU of each part of the scenes."""
    reader, found = SceneReader.from_pretrained("scene-reader"), []
    data = ToyCOCO("test", keys=("image", "segmentation", "depth"))
    for part in range(parts):
        batch = collate([data[i] for i in range(part * n // parts, (part + 1) * n // parts)])
        images = draw(
            model, {"segmentation": mosaic(batch["segmentation"], across)}, steps=steps, scale=1.0, seed=part * n
        )
        agreement = map_agreement(reader, tiles_of(images, across), batch)
        assert agreement.intersection is not None and agreement.union is not None
        found.append(mean_iou(agreement.intersection, agreement.union))
    return found


def main() -> None:
    """Train or score."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("train", "score"))
    parser.add_argument("--training-steps", type=int, default=3000, help="of each model")
    parser.add_argument("--across", type=int, nargs="+", default=(1, 2, 4), help="tiles along a side")
    parser.add_argument("--n", type=int, default=256, help="scenes")
    parser.add_argument("--parts", type=int, default=4, help="of them, for the interval")
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    parser.add_argument("--only", choices=tuple(SCALES), default=None, help="one of the models")
    parser.add_argument("--runs", type=Path, default=Path("runs/rescaling"), help="where the runs are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    numbers = []
    for name in [args.only] if args.only else SCALES:
        chosen, folder = recipe(name, args.runs, args.training_steps), args.runs / name.replace(" ", "-")
        if args.what == "train":
            if not (folder / "model" / "config.json").exists():
                resumed, say = (folder / "recipe.json").exists(), lambda line: print(line, flush=True)
                places = {"cache_dir": args.runs.parent / "cache", "precision": "fp32", "sample_every": 0}
                train(chosen, folder, RunOptions(**places, resume=resumed, log_fn=say))
            continue
        model = LatentDiffusion.from_pretrained(folder / "model")
        path = folder / "scores.json"
        known = load_json(path) if path.exists() else {}
        for across in args.across:
            if (key := f"{across}/{args.n}/{args.parts}/{args.steps}") not in known:
                known[key] = score(model, across, args.n, args.parts, args.steps)
                save_json(known, path)
            of = {"latents": name, "across": across, "size": 64 * across}
            numbers.append(Measurement.repeated("mean IoU", known[key], of=of, n=args.n))
            print(numbers[-1], flush=True)
    if args.what == "score":
        factor = float(load_first_stage(STAGE).scale_factor)
        about = ABOUT.format(steps=args.training_steps, factor=factor, n=args.n, drawn=args.steps, parts=args.parts)
        measured_here(TITLE, numbers, about, seed=0, command="python benchmarks/rescaling.py").save(RESULTS)


if __name__ == "__main__":
    main()
