"""How close to real images do models draw? `ldm-edu evaluate` for several models, numbers of steps and scales.

    ldm-edu train toy-faces --snapshot-every 1200
    python benchmarks/sweep.py faces_training --run runs/toy-faces --at 1200 3600 12000 --sets 8
    python benchmarks/sweep.py faces_steps toy-faces --steps 2 4 10 20 50 100 250 --sets 4

Writes ldm_edu/results/NAME.json, anew after every evaluation, and continues there after an interruption. Every number
says of how many training steps its model is. Data and weights lie where settings.ini says. No image is kept.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ldm_edu import LatentDiffusion
from ldm_edu.evaluation.report import Drawing, Evaluation, KeptSamples, evaluate
from ldm_edu.measurements import Measurement, Measurements, load_measurements, measured_here
from ldm_edu.settings import load_settings

RESULTS = Path(__file__).resolve().parent.parent / "ldm_edu" / "results"


def training_steps(model: LatentDiffusion) -> int:
    """The steps after which a model's diffusion stage was saved."""
    stage = model.provenance["diffusion"]
    assert isinstance(stage, Mapping)
    return int(stage["steps"])


def models_of(run: Path, at: list[int] | None) -> list[Path]:
    """The snapshots of a run after these steps, or all of them, and its model at the end."""
    found = {int(path.name.rpartition("-")[2]): path for path in sorted((run / "snapshots").glob("diffusion-*"))}
    if (run / "model").exists():
        ended = training_steps(LatentDiffusion.from_pretrained(run / "model"))
        found[ended] = run / "model"
    if missing := [step for step in at or [] if step not in found]:
        raise SystemExit(f"{run} has no model after {missing[0]} steps; it has some after {sorted(found)}")
    return [found[step] for step in at or sorted(found)]


def with_keys(numbers: Measurements, more: Mapping[str, str | int]) -> list[Measurement]:
    """The numbers, each with more that it was measured of."""
    return [replace(m, of={**more, **m.of}) for m in numbers]


def begun(path: Path, command: str) -> list[Measurement]:
    """The numbers that the same command has written."""
    if not path.exists() or (found := load_measurements(path)).command != command:
        return []
    return list(found.numbers)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the results")
    parser.add_argument("models", nargs="*", help="shipped names, or folders of models")
    parser.add_argument("--run", type=Path, help="folder of a run: its snapshots, and its model")
    parser.add_argument("--at", type=int, nargs="+", help="after these steps of the run; default: all that are there")
    parser.add_argument("--steps", type=int, nargs="+", default=[50], help="denoising steps")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="of the guidance")
    parser.add_argument("--n", type=int, default=512, help="images of each set")
    parser.add_argument("--sets", type=int, default=4, help="sets of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument("--split", nargs="+", default=["test"], help="of the data set")
    parser.add_argument("--features", default=None, help="toy-features, vgg16 or inception")
    parser.add_argument("--varied", type=int, default=0, help="captions to measure diversity with")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    """Evaluate each model at each number of steps and each scale."""
    given, settings = arguments(), load_settings()
    torch.set_num_threads(1)
    path = RESULTS / f"{given.name}.json"
    models = [*given.models, *(models_of(given.run, given.at) if given.run else [])]
    empty = measured_here("", seed=given.seed, device=given.device)
    numbers = begun(path, empty.command)
    for name in models:
        model = LatentDiffusion.from_pretrained(name).to(given.device)
        for steps in given.steps:
            for scale in given.scales:
                drawing = Drawing(steps, scale, seed=given.seed)
                key = {"training steps": training_steps(model)}
                if any(key.items() | drawing.of(model).items() <= m.of.items() for m in numbers):
                    continue
                options = Evaluation(
                    drawing,
                    data_dir=settings.data_dir,
                    splits=tuple(given.split),
                    n=given.n,
                    sets=given.sets,
                    features=given.features,
                    weights_dir=settings.weights_dir,
                    varied=given.varied,
                )
                recipe = str(model.provenance["recipe"]["name"])
                found = evaluate(model, options, recipe, KeptSamples(Path("runs") / "sweep" / given.name))
                numbers += with_keys(found, key)
                replace(found, numbers=tuple(numbers), command=empty.command).save(path)
                print(*map(str, found.of("Fréchet excess")), sep="\n", flush=True)


if __name__ == "__main__":
    main()
