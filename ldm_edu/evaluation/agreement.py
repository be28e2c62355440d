"""How well images agree with what they were drawn for: a real image, the rest of it, a segmentation, depth or boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional as F

from ldm_edu.checks import check_count, check_device, check_images, check_like, check_map, is_finite, shown
from ldm_edu.conditioning.spatial import one_hot
from ldm_edu.conditioning.tokens import check_boxes
from ldm_edu.data.toy.scenes import HEIGHT, SEGMENTS, SHAPES, Scene, Thing, project, truth
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.backbones import BACKBONES
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.judge import READER_SIZE, SceneReader, decide
from ldm_edu.evaluation.metrics import LPIPS, psnr, ssim, ssim_map, unit

__all__: list[str] = []

NETWORKS = {"alex": "AlexNet", "vgg": "VGG16"}  # of LPIPS, as tables name them
MAPS = ("segmentation", "depth", "boxes")  # of a batch, which the judge can read in an image


# --- Images and the real ones ---


def _named(distance: Any) -> tuple[str, int]:
    "What a perceptual distance is called, and how many pixels it needs along each side; LDMError where it is none."
    if isinstance(distance, ToyFeatures):
        return "toy features", distance.smallest
    for net, name in NETWORKS.items():
        if isinstance(distance, LPIPS) and distance.backbone is BACKBONES[net]:
            return f"LPIPS ({name})", distance.backbone.smallest
    raise LDMError(f"distance should be an LPIPS or a ToyFeatures, the module itself, not {shown(distance)}")


def distance_name(distance: LPIPS | ToyFeatures) -> str:
    "What a perceptual distance is called in tables; LDMError where it is none."
    return _named(distance)[0]


def _check_pair(images: Any, references: Any, least: int = 1) -> None:
    "LDMError where these are no two batches of images of one shape and device, with `least` pixels along each side."
    check_images("references", check_like("references", references, "images", check_images("images", images)))
    check_device("references", references, images.device, "images")
    if not len(images) or min(images.shape[2:]) < least:
        wanted = f"at least one image, with at least {least} pixels along each side"
        raise LDMError(f"images should be {wanted}, not {tuple(images.shape)}")


def _check_hole(hole: Any, images: Tensor) -> Bool[Tensor, "b 1 h w"]:
    "Where pixels are missing; LDMError where that is no mask of the images, or where an image lacks no pixel."
    shape = (len(images), 1, *images.shape[2:])
    if not isinstance(hole, Tensor) or hole.shape != shape:
        told = tuple(hole.shape) if isinstance(hole, Tensor) else shown(hole)
        raise LDMError(f"hole should have the shape {shape}, as the images have it, not {told}")
    check_device("hole", hole, images.device, "images")
    if not ((hole == 0) | (hole == 1)).all():
        raise LDMError("hole should be 1 where a pixel is missing and 0 where it is known, nothing else")
    hidden = hole == 1
    if whole := (~hidden.flatten(1).any(1)).nonzero().flatten().tolist():
        raise LDMError(f"hole: image {whole[0]} has no missing pixel, so there is nothing to compare")
    return hidden


def _over_hole(values: Float[Tensor, "b c h w"], hidden: Bool[Tensor, "b 1 h w"]) -> Float[Tensor, "b"]:
    "The mean over the channels and the missing pixels of every image, on the CPU, in float64."
    values, hidden = values.cpu().double(), hidden.cpu()
    inside = torch.where(hidden, values, 0.0).sum((1, 2, 3))
    return inside / (values.shape[1] * hidden.sum((1, 2, 3)))


def masked_psnr(
    images: Float[Tensor, "b 3 h w"],  # in [-1, 1]
    references: Float[Tensor, "b 3 h w"],  # in [-1, 1]
    hole: Bool[Tensor, "b 1 h w"] | Float[Tensor, "b 1 h w"],  # 1 where a pixel is missing; at least one of each image
) -> Float[Tensor, "b"]:  # dB, higher is better; inf where images and references are identical in the hole
    "Peak signal-to-noise ratio over the pixels of a hole alone."
    _check_pair(images, references)
    square = _over_hole((images.cpu().double() - references.cpu().double()).square(), _check_hole(hole, images))
    return (10 * torch.log10(2**2 / square)).float().to(images.device)


@torch.no_grad()
def lpips_map(
    distance: LPIPS | ToyFeatures,
    images: Float[Tensor, "b 3 h w"],  # in [-1, 1], on the device of the distance
    references: Float[Tensor, "b 3 h w"],  # in [-1, 1]
) -> Float[Tensor, "b 1 h w"]:  # 0 where they look alike; lower is better
    """The perceptual distance at every pixel (Zhang et al. 2018): that of each tap, enlarged to the images' size.

    The taps of LPIPS are summed, those of ToyFeatures averaged, as in their distances of whole images.
    """
    _check_pair(images, references, _named(distance)[1])
    pairs = list(zip(distance.features(images), distance.features(references)))
    squares = [(unit(x) - unit(y)).square() for x, y in pairs]
    if isinstance(distance, LPIPS):
        squares = [w.view(-1, 1, 1) * square for w, square in zip(distance.weights, squares, strict=True)]
    size = (images.shape[2], images.shape[3])
    large = [F.interpolate(x.sum(1, keepdim=True), size=size, mode="bilinear", align_corners=False) for x in squares]
    total = torch.stack(large).sum(0)
    return total / len(large) if isinstance(distance, ToyFeatures) else total


def _agreement(
    images: Tensor, references: Tensor, distance: LPIPS | ToyFeatures | None, hidden: Tensor | None
) -> dict[str, Tensor]:
    "`image_agreement` of images that are compared at once, on the CPU."
    if hidden is not None:  # what is known is that of the reference, also where a window or a filter looks beyond
        images = torch.where(hidden, images, references)
        scores = {"PSNR": masked_psnr(images, references, hidden)}
        scores["SSIM"] = _over_hole(ssim_map(images, references), hidden)
    else:
        scores = {"PSNR": psnr(images, references), "SSIM": ssim(images, references)}
    if distance is not None:
        where = next(distance.parameters()).device
        x, y = images.to(where), references.to(where)
        far = distance.distance(x, y) if hidden is None else _over_hole(lpips_map(distance, x, y), hidden)
        scores[distance_name(distance)] = far
    return {name: score.float().cpu() for name, score in scores.items()}


@torch.no_grad()
def image_agreement(
    images: Float[Tensor, "b 3 h w"],  # in [-1, 1]; at least 6 pixels along each side
    references: Float[Tensor, "b 3 h w"],  # in [-1, 1]
    distance: LPIPS | ToyFeatures | None = None,  # a third score; None: PSNR and SSIM alone
    hole: Bool[Tensor, "b 1 h w"] | Float[Tensor, "b 1 h w"] | None = None,  # 1 where a pixel is missing; None: all
    chunk: int = 64,  # images at once
) -> dict[str, Float[Tensor, "b"]]:  # on the CPU
    """PSNR (dB), SSIM and the perceptual distance of every image from its reference, by their names in tables.

    With a hole, each is a mean over its pixels alone; outside of it, the references stand in for the images.
    """
    chunk = check_count("chunk", chunk)
    _check_pair(images, references, 6 if distance is None else max(6, _named(distance)[1]))
    hidden = [None] * len(images) if hole is None else _check_hole(hole, images).split(chunk)
    pairs = zip(images.split(chunk), references.split(chunk), hidden)
    parts = [_agreement(x, y, distance, part) for x, y, part in pairs]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def mean_fill(
    images: Float[Tensor, "b 3 h w"],  # in [-1, 1]
    hole: Bool[Tensor, "b 1 h w"] | Float[Tensor, "b 1 h w"],  # 1 where a pixel is missing; at least one of each image
) -> Float[Tensor, "b 3 h w"]:
    "Every hole filled with the mean colour of the image's known pixels; grey, 0, where none is known."
    hidden = _check_hole(hole, check_images("images", images))
    known = (~hidden).sum((2, 3), keepdim=True).clamp(min=1)
    mean = torch.where(hidden, 0.0, images).sum((2, 3), keepdim=True) / known  # (b, 3, 1, 1)
    return torch.where(hidden, mean, images)


# --- Maps ---


def _overlap(predicted: Bool[Tensor, "b c h w"], wanted: Bool[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
    "The pixels of every class in both of two segmentations, and in either of them."
    return (predicted & wanted).sum((2, 3)), (predicted | wanted).sum((2, 3))


def class_overlap(
    predicted: Integer[Tensor, "b h w"],  # class ids, from 0
    wanted: Integer[Tensor, "b h w"],  # class ids
    classes: int,  # how many there are
) -> tuple[Integer[Tensor, "b classes"], Integer[Tensor, "b classes"]]:
    "The intersection and the union of every class in two segmentations, in pixels, for every image."
    classes = check_count("classes", classes)
    a, b = (one_hot(name, x, classes).bool() for name, x in (("predicted", predicted), ("wanted", wanted)))
    if a.shape != b.shape:
        raise LDMError(f"predicted has the shape {tuple(predicted.shape)}, but wanted has {tuple(wanted.shape)}")
    check_device("wanted", wanted, predicted.device, "predicted")
    return _overlap(a, b)


def mean_iou(
    intersection: Integer[Tensor, "b classes"],  # pixels, see `class_overlap`
    union: Integer[Tensor, "b classes"],  # pixels
) -> float:  # from 0 to 1, higher is better
    """The mean intersection over union of a data set (Everingham et al. 2010): pixels of all images are counted first.

    The mean is over the classes that occur in either segmentation of any image; LDMError where there are none.
    """
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else shown(x) for x in (intersection, union)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or isinstance(shapes[0], str):
        raise LDMError(f"intersection and union should be two tensors (b, classes), not {shapes[0]} and {shapes[1]}")
    if not ((intersection >= 0) & (intersection <= union)).all():
        raise LDMError("intersection should be at least 0 and nowhere larger than union")
    both, either = intersection.double().sum(0), union.double().sum(0)
    if not (either > 0).any():
        raise LDMError("union is 0 for every class, so no class occurs in any image")
    return (both / either)[either > 0].mean().item()


def _depths(name: str, depth: Any) -> Float[Tensor, "b n"]:
    "Depth maps as rows on the CPU in float64; LDMError where they are none, or not finite."
    values = check_map(name, depth, 1).detach().cpu().double().flatten(1)
    if not is_finite(values):
        raise LDMError(f"{name} should hold finite numbers")
    return values


def _correlation(predicted: Any, wanted: Any, name: str) -> Float[Tensor, "b"]:
    "`depth_correlation`, with another name for `wanted` in the errors."
    a, b = _depths("predicted", predicted), _depths(name, wanted)
    if predicted.shape != wanted.shape:
        raise LDMError(f"predicted has the shape {tuple(predicted.shape)}, but {name} has {tuple(wanted.shape)}")
    flat_a, flat_b = (x.amax(1) == x.amin(1) for x in (a, b))
    if flat_b.any():
        raise LDMError(f"{name}: the depth of image {flat_b.nonzero()[0].item()} is the same everywhere")
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    size = a.norm(dim=1) * b.norm(dim=1)
    r = ((a * b).sum(1) / torch.where(flat_a, 1.0, size)).clamp(-1, 1)
    return torch.where(flat_a, 0.0, r).float()


def depth_correlation(
    predicted: Float[Tensor, "b 1 h w"],  # in any unit
    wanted: Float[Tensor, "b 1 h w"],  # in any unit, not the same everywhere in an image
) -> Float[Tensor, "b"]:  # from -1 to 1, higher is better; on the CPU
    """Pearson's correlation of two depths over the pixels of every image.

    It is 0 where the predicted depth is the same everywhere, since that says nothing of the wanted one. LDMError where
    the wanted depth is: there is nothing that a prediction could agree with.
    """
    return _correlation(predicted, wanted, "wanted")


@lru_cache(maxsize=1)
def empty_floor() -> Float[Tensor, "1 1 64 64"]:
    "The depth of a toy scene without things: it makes the depths of any two scenes alike (a correlation of 0.96)."
    return cast(Tensor, truth([Scene(())], READER_SIZE)["depth"])


def _middles(things: Sequence[Thing]) -> Float[Tensor, "k 2"]:
    "Where the middles of things are seen, as fractions of the image's sides, to the right and down."
    centres = [[thing.x, thing.y, HEIGHT[thing.shape] * thing.radius] for thing in things]
    return project(torch.tensor(centres, dtype=torch.float64).view(-1, 3))[:, :2]


def _hits(things: Sequence[Thing], boxes: Any) -> list[bool]:
    "Which boxes of one image have a thing of their own."
    boxes = check_boxes(boxes, len(SEGMENTS))  # float64, without those of no area
    if (boxes[:, 0] == 0).any():
        raise LDMError(f"boxes: class 0 is the {SEGMENTS[0]}, but a box is of a {', a '.join(SHAPES)}: 1 to 3")
    shapes = torch.tensor([SEGMENTS.index(thing.shape) for thing in things])
    middle = _middles(things)[None]  # (1, k, 2)
    inside = ((boxes[:, None, 1:3] <= middle) & (middle <= boxes[:, None, 3:])).all(2)  # (boxes, things)
    fits = inside & (boxes[:, None, 0] == shapes)
    if not fits.any():
        return [False] * len(boxes)
    from scipy.optimize import linear_sum_assignment  # loaded here, since it takes a second

    chosen = dict(zip(*map(list, linear_sum_assignment(fits.int().numpy(), maximize=True))))
    return [i in chosen and bool(fits[i, chosen[i]]) for i in range(len(boxes))]


def boxes_hit(
    found: Sequence[Sequence[Thing]],  # in every image, as `SceneReader.read` gives them
    boxes: Sequence[Float[Tensor, "_ 5"]],  # of every image: index into SEGMENTS; left, top, right, bottom as fractions
) -> list[list[bool]]:
    """For every box: has it a thing of its shape, with the middle inside? A thing serves one box at most.

    As many boxes as possible are served. Boxes without area, of things that are hidden, are left out.
    """
    things = [thing for each in found for thing in each] if isinstance(found, list | tuple) else [found]
    if not all(isinstance(thing, Thing) for thing in things):
        raise LDMError(f"found should be a list of things for each image, not {shown(found)}")
    if isinstance(boxes, Tensor) or not isinstance(boxes, Sequence) or len(boxes) != len(found):
        told = f"{len(boxes)} of them" if isinstance(boxes, list | tuple) else shown(boxes)
        raise LDMError(f"boxes should be a list with a tensor (k, 5) for each of {len(found)} images, not {told}")
    return [_hits(some, each) for some, each in zip(found, boxes)]


@dataclass(frozen=True)
class MapAgreement:
    "What the judge reads in images, beside the maps that were given; None for a map that was not."

    intersection: Integer[Tensor, "b 4"] | None  # pixels of every class in both segmentations; see `mean_iou`
    union: Integer[Tensor, "b 4"] | None  # pixels of every class in either
    depth: Float[Tensor, "b"] | None  # correlations; see `depth_correlation`
    without_floor: Float[Tensor, "b"] | None  # the same of what both depths are nearer than an empty floor
    boxes: list[list[bool]] | None  # see `boxes_hit`


def _check_maps(batch: Any, b: int) -> dict[str, Any]:
    "The maps of a batch; LDMError where it has none, or others than of b images of the judge's size."
    found = {key: batch[key] for key in MAPS if key in batch} if isinstance(batch, Mapping) else {}
    if not found:
        raise LDMError(f"batch should be a dict with some of {', '.join(MAPS)}, not {shown(batch)}")
    shapes = {"segmentation": (b, READER_SIZE, READER_SIZE), "depth": (b, 1, READER_SIZE, READER_SIZE)}
    for key, value in found.items():
        if key in shapes and (not isinstance(value, Tensor) or value.shape != shapes[key]):
            told = tuple(value.shape) if isinstance(value, Tensor) else shown(value)
            raise LDMError(f"{key} should have the shape {shapes[key]}, not {told}")
        if key == "boxes" and (not isinstance(value, list | tuple) or len(value) != b):
            raise LDMError(f"boxes should be a list with a tensor (k, 5) for each of {b} images, not {shown(value)}")
    return found


def _read_part(reader: SceneReader, images: Tensor, maps: Mapping[str, Any]) -> MapAgreement:
    "`map_agreement` of images that are read at once."
    reading = reader(images.to(next(reader.parameters())))
    overlap, depth, without_floor, boxes = (None, None), None, None, None
    if "segmentation" in maps:
        wanted = one_hot("segmentation", maps["segmentation"].cpu(), len(SEGMENTS)).bool()
        overlap = _overlap(one_hot("predicted", reading.segmentation.argmax(1).cpu(), len(SEGMENTS)).bool(), wanted)
    if "depth" in maps:
        depth = _correlation(reading.depth, maps["depth"], "depth")
        floor, wanted = empty_floor(), maps["depth"].cpu()
        without_floor = _correlation(reading.depth.cpu() - floor, wanted - floor, "depth, without the floor,")
    if "boxes" in maps:
        boxes = boxes_hit(decide(reading), maps["boxes"])
    return MapAgreement(*overlap, depth, without_floor, boxes)


@torch.no_grad()
def map_agreement(
    reader: SceneReader,
    images: Float[Tensor, "b 3 64 64"],  # in [-1, 1]
    batch: Mapping[str, Any],  # `segmentation` (b, 64, 64), `depth` (b, 1, 64, 64), `boxes` b · (k, 5), or some of them
    chunk: int = 64,  # images at once
) -> MapAgreement:  # on the CPU
    "What the judge reads in images, compared with the maps that they were drawn for."
    if check_images("images", images).shape[2:] != (READER_SIZE, READER_SIZE) or not len(images):
        wanted = f"images (b, 3, {READER_SIZE}, {READER_SIZE}), at least one"
        raise LDMError(f"the judge reads {wanted}, not {tuple(images.shape)}")
    maps, chunk = _check_maps(batch, len(images)), check_count("chunk", chunk)
    starts = range(0, len(images), chunk)
    cut = [{key: value[i : i + chunk] for key, value in maps.items()} for i in starts]
    parts = [_read_part(reader, images[i : i + chunk], part) for i, part in zip(starts, cut)]

    def joined(name: str) -> Tensor | None:
        values = [value for part in parts if (value := getattr(part, name)) is not None]
        return torch.cat(values) if values else None

    boxes = [hits for part in parts for hits in part.boxes or []] if "boxes" in maps else None
    return MapAgreement(joined("intersection"), joined("union"), joined("depth"), joined("without_floor"), boxes)
