"""Does a model draw what its maps say? Every combination of segmentation, depth and caption, and boxes.

    python benchmarks/maps.py maps toy-maps --layout toy-layout

For each combination and each of --scales: how well the judge's segmentation, depth and boxes agree with those of the
true scene, how many words of the caption are drawn where there is one, and how far the images are from real ones. The
judge's scores of the true scenes, and of what the first stage makes of them, stand beside. Writes
ldm_edu/results/NAME.json. The same seeds for every combination.
"""

import argparse
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_edu import LatentDiffusion, SceneReader
from ldm_edu.applications import draw
from ldm_edu.data.batches import collate
from ldm_edu.data.toy.datasets import ToyCOCO
from ldm_edu.display import to_uint8
from ldm_edu.evaluation.agreement import map_agreement, mean_iou
from ldm_edu.evaluation.distances import frechet_distance
from ldm_edu.evaluation.extractors import Extractor, extract, find_extractor
from ldm_edu.evaluation.judge import prompt_accuracy
from ldm_edu.evaluation.report import WITHOUT_FLOOR, from_bytes
from ldm_edu.measurements import Measurement, measured_here

RESULTS = Path(__file__).resolve().parent.parent / "ldm_edu" / "results"
KEYS, CHUNK = ("segmentation", "depth", "caption"), 64
WORDS = ("number", "size", "colour", "shape", "left", "right", "front", "behind")


def bytes_of(images: Tensor) -> Tensor:
    """Images as they are after a way through bytes."""
    return from_bytes(to_uint8(images.clamp(-1, 1).cpu()))


def given_by(truth: Mapping[str, Any], keys: tuple[str, ...], rows: slice) -> tuple[dict[str, Any], list[str] | None]:
    """The maps and captions of a combination, of some rows."""
    maps = {key: truth[key][rows] for key in keys if key != "caption"}
    return maps, truth["caption"][rows] if "caption" in keys else None


def drawn(model: LatentDiffusion, truth: Mapping[str, Any], keys: tuple[str, ...], how: dict) -> Tensor:
    """An image for each scene, for a combination."""
    parts, n = [], len(truth["image"])
    for start in range(0, n, CHUNK):
        rows = slice(start, min(start + CHUNK, n))
        if keys == ("boxes",):
            parts.append(model.sample({"boxes": truth["boxes"][rows]}, seed=start, **how))
        else:
            maps, captions = given_by(truth, keys, rows)
            parts.append(draw(model, maps, captions, seed=start, **how))
    return bytes_of(torch.cat(parts))


def measured(
    images: Tensor, truth: Mapping[str, Any], of: dict, reader: SceneReader, extractor: Extractor, others: list[Tensor]
) -> Iterator[Measurement]:
    """What the judge reads in images, beside the truth."""
    found = map_agreement(reader, images, truth)
    assert found.intersection is not None and found.depth is not None and found.boxes is not None
    assert found.without_floor is not None
    n = len(images)
    yield Measurement("segmentation, mean IoU", mean_iou(found.intersection, found.union), of, n=n)
    depth = found.depth.double()
    yield Measurement.mean("depth correlation", depth.mean().item(), (depth.std() / n**0.5).item(), n, of=of)
    depth = found.without_floor.double()
    yield Measurement.mean(WITHOUT_FLOOR, depth.mean().item(), (depth.std() / n**0.5).item(), n, of=of)
    hits = [hit for each in found.boxes for hit in each]
    yield Measurement.share("boxes hit", sum(hits), len(hits), of=of)
    words = prompt_accuracy(images, truth["caption"], reader)
    yield Measurement.share("exactly", words.exact.right, words.exact.n, of=of)
    for word in WORDS:
        if (share := words.words[word]).n:  # a relation is counted only among things that are there
            yield Measurement.share(word, share.right, share.n, of=of)
    features = extract(extractor, images.split(CHUNK), CHUNK)
    parts = zip(features.chunk(len(others)), others)
    real = [extract(extractor, some.split(CHUNK), CHUNK) for some in truth["image"].chunk(len(others))]
    floor = [frechet_distance(b, a) for a, b in zip(real, others)]
    excess = [frechet_distance(b, a) - low for (a, b), low in zip(parts, floor)]
    if of["given"] not in ("the true scene", "a grey image", "another scene"):
        yield Measurement.repeated("Fréchet excess", excess, of={**of, "features": extractor.name}, n=n // len(others))


def scenes(rows: range) -> dict[str, Any]:
    """Test scenes with all that is known of them."""
    data = ToyCOCO("test", keys=("image", "segmentation", "depth", "boxes", "caption"))
    batch = collate(data.__getitems__(rows))
    return {**batch, "image": bytes_of(batch["image"])}


def main() -> None:
    """Measure every combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the results")
    parser.add_argument("model", help="reads segmentation, depth and caption, each of which may be left out")
    parser.add_argument("--layout", help="a model that reads boxes")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0], help="of the guidance")
    parser.add_argument("--n", type=int, default=512, help="scenes")
    parser.add_argument("--sets", type=int, default=4, help="parts of them, for the interval of the excess")
    given = parser.parse_args()
    torch.set_num_threads(1)
    truth, others = scenes(range(given.n)), scenes(range(given.n, 2 * given.n))["image"]
    reader, extractor = SceneReader.from_pretrained("scene-reader"), find_extractor("toy-features")
    reference = [extract(extractor, some.split(CHUNK), CHUNK) for some in others.chunk(given.sets)]
    model = LatentDiffusion.from_pretrained(given.model)
    numbers: list[Measurement] = []

    def look(images: Tensor, **of: Any) -> None:
        found = list(measured(images, truth, of, reader, extractor, reference))
        numbers.extend(found)
        print(*found[:4], sep="\n", flush=True)

    look(truth["image"], given="the true scene")
    with torch.no_grad():
        back = torch.cat([bytes_of(model.first_stage.reconstruct(some)) for some in truth["image"].split(CHUNK)])
    look(back, given="reconstructed")
    look(torch.zeros_like(back), given="a grey image")
    look(truth["image"].roll(1, 0), given="another scene")
    for scale in given.scales:
        how = {"steps": given.steps, "scale": scale, "batch_size": CHUNK}
        for count in (1, 2, 3):
            for keys in combinations(KEYS, count):
                look(drawn(model, truth, keys, how), given=" + ".join(keys), scale=scale)
        if given.layout:
            layout = LatentDiffusion.from_pretrained(given.layout)
            look(drawn(layout, truth, ("boxes",), how), given="boxes", scale=scale)
    about = (
        f"{given.n} test scenes, {given.steps} DDIM steps, as bytes. The judge's segmentation (mean IoU over classes, "
        "pixels of all images), depth (Pearson's correlation, mean over images with 1.96 standard errors; once more of "
        "what both depths are nearer than an empty floor), boxes with a thing of their shape (Wilson), and words of "
        f"the caption, whether it was given or not. The excess: over {given.sets} parts of the scenes, Student's t."
    )
    title = f"{Path(given.model).name}: does the judge find what the maps say?"
    measured_here(title, numbers, about, seed=0).save(RESULTS / f"{given.name}.json")


if __name__ == "__main__":
    main()
