"""What the benchmarks of super-resolution and inpainting share: held-out images, and scores of images beside them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_edu.data.batches import collate
from ldm_edu.data.registry import open_dataset
from ldm_edu.display import to_uint8
from ldm_edu.evaluation.agreement import distance_name, image_agreement
from ldm_edu.evaluation.distances import frechet_distance
from ldm_edu.evaluation.extractors import Extractor, extract, find_extractor
from ldm_edu.evaluation.metrics import LPIPS
from ldm_edu.evaluation.report import TOY, from_bytes
from ldm_edu.measurements import Measurement

RESULTS = Path(__file__).resolve().parent.parent / "ldm_edu" / "results"
CHUNK = 64  # images at once
UNITS = {"PSNR": "dB"}


def bytes_of(images: Tensor) -> Tensor:
    """Images as they are after a way through bytes."""
    return from_bytes(to_uint8(images.clamp(-1, 1).cpu()))


def samples(name: str, data_dir: Path | None, splits: Sequence[str], n: int, keys: Sequence[str]) -> dict[str, Any]:
    """The first n samples of some splits, one split after the other, as a batch; fewer where there are not so many."""
    found: list[dict[str, Any]] = []
    for split in splits:
        data = open_dataset(name, data_dir, split, 64, keys=tuple(keys))
        rows = range(min(n - len(found), len(data)))
        several = getattr(data, "__getitems__", None)
        found += (several(list(rows)) if several else [data[row] for row in rows]) if rows else []
    return {**(batch := collate(found)), "image": bytes_of(batch["image"])}


@dataclass(frozen=True)
class Scores:
    """What images are compared with."""

    real: Tensor  # (n, 3, 64, 64)
    distance: LPIPS
    extractor: Extractor
    others: list[Tensor]  # features of other real images, a tensor for each set
    floor: list[float]  # the Fréchet distance of the real images of a set from the others of that set

    @classmethod
    def of(cls, real: Tensor, others: Tensor, sets: int, net: str, features: str, weights: Path | None) -> "Scores":
        """Sets of equal size of the real images, and as many others; what does not fill a set is left out."""
        n = min(len(real), len(others)) // sets
        if n < 2:
            raise SystemExit(f"{len(real)} images and {len(others)} others are too few for {sets} sets")
        extractor = find_extractor(features, weights)
        far = [extract(extractor, some.split(CHUNK), CHUNK) for some in others[: sets * n].split(n)]
        near = [extract(extractor, some.split(CHUNK), CHUNK) for some in real[: sets * n].split(n)]
        floor = [frechet_distance(a, b) for a, b in zip(near, far)]
        return cls(real, LPIPS(net, weights).eval(), extractor, far, floor)

    @property
    def lpips(self) -> str:
        """What the perceptual distance is called."""
        return distance_name(self.distance)

    def of_images(self, images: Tensor, hole: Tensor | None = None) -> dict[str, Tensor]:
        """PSNR, SSIM and LPIPS beside the first real images, in the hole where there is one; each (n,)."""
        n = len(images)
        return image_agreement(images, self.real[:n], self.distance, None if hole is None else hole[:n])

    def told(self, each: dict[str, Tensor], excess: list[float], of: dict[str, Any]) -> Iterator[Measurement]:
        """The means of the scores of images, and of the excess of sets where there is one."""
        for name, values in each.items():
            mean, error = values.double().mean().item(), (values.double().std() / len(values) ** 0.5).item()
            yield Measurement.mean(name, mean, error, len(values), of=of, unit=UNITS.get(name, ""))
        if excess:
            of = {**of, "features": self.extractor.name}
            yield Measurement.repeated("Fréchet excess", excess, of=of, n=len(self.others[0]))

    def excess(self, images: Tensor) -> list[float]:
        """By how much each set of images is farther from the others than the real ones are; none for too few images."""
        size = len(self.others[0])
        if len(images) < size * len(self.others):
            return []
        pieces = images[: size * len(self.others)].split(size)
        found = [extract(self.extractor, some.split(CHUNK), CHUNK) for some in pieces]
        return [frechet_distance(a, b) - floor for a, b, floor in zip(found, self.others, self.floor)]


def gain(name: str, more: Tensor, less: Tensor, of: dict[str, Any]) -> Measurement:
    """By how much one score of the same images is larger than another, image by image."""
    apart = (more - less).double()
    return Measurement.mean(name, apart.mean().item(), (apart.std() / len(apart) ** 0.5).item(), len(apart), of=of)


def backbones(dataset: str) -> tuple[str, str]:
    """The network of LPIPS that is in no loss of the recipes of this data set, and the features of the excess."""
    return ("alex", "toy-features") if dataset in TOY else ("vgg", "vgg16")
