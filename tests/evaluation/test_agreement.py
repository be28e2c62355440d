"""How well images agree with what they were drawn for: against loops, against other libraries, and in a report."""

import inspect
import math
import warnings
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

import ldm_edu.evaluation.report as report
from ldm_edu import AutoencoderKL, LatentDiffusion, NoiseSchedule, ToyCOCO, UNet, collate
from ldm_edu.conditioning.condition import MergedConditioner
from ldm_edu.conditioning.spatial import InpaintingConditioner, MapConditioner
from ldm_edu.conditioning.tokens import ClassConditioner, LayoutConditioner
from ldm_edu.data.degradation import upsample
from ldm_edu.data.registry import open_dataset
from ldm_edu.data.toy.faces import FACE_SEGMENTS
from ldm_edu.data.toy.scenes import SHAPES, SIZES, Scene, Thing, truth
from ldm_edu.display import to_uint8
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.evaluation.agreement import (
    boxes_hit,
    class_overlap,
    depth_correlation,
    distance_name,
    image_agreement,
    lpips_map,
    map_agreement,
    masked_psnr,
    mean_fill,
    mean_iou,
)
from ldm_edu.evaluation.backbones import BACKBONES, backbone_weights
from ldm_edu.evaluation.distances import frechet_distance
from ldm_edu.evaluation.extractors import find_extractor
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.judge import Reading, SceneReader, reader_targets
from ldm_edu.evaluation.metrics import LPIPS, psnr, ssim, ssim_map
from ldm_edu.evaluation.report import Drawing, Evaluation, draw_set, evaluate, from_bytes, reconstructed_set, table
from ldm_edu.files import save_tensors
from ldm_edu.measurements import Measurement, load_measurements


def pictures(b: int, h: int = 32, w: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth random images in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(b, 3, h + 4, w + 4, generator=generator) * 2 - 1
    return (2 * F.avg_pool2d(noise, 5, stride=1)).clamp(-1, 1)


def holes(b: int, h: int = 32, w: int = 32, seed: int = 0) -> torch.Tensor:
    """Random holes, of another share of each image."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(b, 1, h, w, generator=generator) < torch.linspace(0.2, 0.7, b).view(b, 1, 1, 1)).float()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with random backbones of LPIPS."""
    folder = tmp_path_factory.mktemp("weights")
    for net, backbone in BACKBONES.items():
        torch.manual_seed(0)
        layers = backbone.build()
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        save_tensors({f"features.{name}": x for name, x in layers.state_dict().items()}, folder / backbone.file, True)
    return folder


@pytest.fixture(scope="module")
def alex(weights):
    return LPIPS("alex", weights, download=False)


@pytest.fixture(scope="module")
def toy_features():
    return ToyFeatures.from_pretrained("toy-features")


@pytest.fixture(scope="module")
def reader():
    return SceneReader.from_pretrained("scene-reader")


@pytest.fixture(scope="module")
def scenes():
    data = ToyCOCO("test", keys=("image", "segmentation", "depth", "boxes"))
    return collate(data.__getitems__(range(24)))


# --- Images and the real ones ---


def test_the_psnr_of_a_hole_is_that_of_its_pixels():
    x, y, hole = pictures(3), pictures(3, seed=1), holes(3)
    for i in range(3):
        squares = [(x[i, :, r, c] - y[i, :, r, c]).square() for r, c in hole[i, 0].nonzero().tolist()]
        wanted = 10 * math.log10(4 / torch.stack(squares).double().mean().item())
        assert masked_psnr(x, y, hole)[i].item() == pytest.approx(wanted, rel=1e-5)
        assert masked_psnr(x[i : i + 1], y[i : i + 1], hole[i : i + 1] == 1).item() == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(masked_psnr(x, y, torch.ones(3, 1, 32, 32)), psnr(x, y))
    assert masked_psnr(x, x, hole).tolist() == [math.inf] * 3


def package(net, weights_dir) -> nn.Module:
    """`lpips.LPIPS` with a map as its answer, and with the backbone of `weights_dir`."""
    lpips = pytest.importorskip("lpips")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # of torchvision, about an argument that lpips still uses
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False, spatial=True)
    tensors = backbone_weights(net, weights_dir, download=False)
    for number in range(1, 6):
        for name, layer in getattr(theirs.net, f"slice{number}").named_children():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = tensors[f"features.{name}.weight"].float()
                layer.bias.data = tensors[f"features.{name}.bias"].float()
    return theirs.eval()


def assert_equal_to_the_package(net, weights_dir) -> None:
    ours, theirs = LPIPS(net, weights_dir, download=False), package(net, weights_dir)
    for seed, (b, h, w) in enumerate([(2, 48, 48), (1, 35, 60)]):
        x, y = pictures(b, h, w, seed), pictures(b, h, w, seed + 10)
        found = lpips_map(ours, x, y)
        assert found.shape == (b, 1, h, w) and found.min() >= 0 and found.mean() > 1e-3
        with torch.no_grad():
            torch.testing.assert_close(found, theirs(x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", BACKBONES)
def test_the_map_of_lpips_equals_that_of_the_package(net, weights):
    assert_equal_to_the_package(net, weights)


@pytest.mark.parametrize("net", BACKBONES)
def test_the_map_of_lpips_equals_that_of_the_package_with_the_published_backbone(net, lpips_weights):
    assert_equal_to_the_package(net, lpips_weights)


def test_the_map_of_toy_features_is_the_mean_over_levels(toy_features):
    """Of unit vectors, the squared difference is 2 - 2 cos."""
    x, y = pictures(2), pictures(2, seed=1)
    with torch.no_grad():
        pairs = zip(toy_features.features(x), toy_features.features(y))
        levels = [2 - 2 * F.cosine_similarity(a, b, dim=1)[:, None] for a, b in pairs]
    large = [F.interpolate(level, size=(32, 32), mode="bilinear") for level in levels]
    found = lpips_map(toy_features, x, y)
    torch.testing.assert_close(found, torch.stack(large).mean(0), rtol=1e-3, atol=1e-4)
    assert found.shape == (2, 1, 32, 32) and not lpips_map(toy_features, x, x).any()


def test_whole_images_have_the_scores_of_the_metrics(alex, toy_features):
    x, y = pictures(3), pictures(3, seed=1)
    found = image_agreement(x, y, alex)
    assert list(found) == ["PSNR", "SSIM", "LPIPS (AlexNet)"]
    for name, metric in zip(found, (psnr, ssim, alex)):
        torch.testing.assert_close(found[name], metric(x, y))
    assert list(image_agreement(x, y)) == ["PSNR", "SSIM"]
    torch.testing.assert_close(image_agreement(x, y, toy_features)["toy features"], toy_features.distance(x, y))


def test_distances_have_the_names_of_their_networks(weights, alex, toy_features):
    vgg = LPIPS("vgg", weights, download=False)
    assert [distance_name(d) for d in (alex, vgg, toy_features)] == ["LPIPS (AlexNet)", "LPIPS (VGG16)", "toy features"]


def test_equal_images_agree_and_worse_ones_agree_less(alex):
    x, hole = pictures(2), holes(2)
    best = torch.tensor([[math.inf] * 2, [1.0] * 2, [0.0] * 2])
    for where in (None, hole):
        same = torch.stack(list(image_agreement(x, x, alex, where).values()))
        torch.testing.assert_close(same, best)
        near, far = (image_agreement(x.roll(k, 3), x, alex, where) for k in (1, 6))
        for name, sign in zip(near, (1, 1, -1)):
            assert (sign * (near[name] - far[name]) > 0).all() and near[name].isfinite().all()
            assert not torch.isclose(near[name], same[0]).any()


def test_a_hole_is_scored_over_its_pixels(alex, toy_features):
    """Against loops over the pixels of the maps, where what is known is that of the reference."""
    x, y, hole = pictures(3), pictures(3, seed=1), holes(3)
    pasted = torch.where(hole == 1, x, y)
    found = image_agreement(x, y, alex, hole) | image_agreement(x, y, toy_features, hole == 1)
    similar, far, toy = ssim_map(pasted, y), lpips_map(alex, pasted, y), lpips_map(toy_features, pasted, y)
    torch.testing.assert_close(found["PSNR"], masked_psnr(x, y, hole))
    for i in range(3):
        rows, columns = hole[i, 0].nonzero().unbind(1)
        for name, values in (("SSIM", similar), ("LPIPS (AlexNet)", far), ("toy features", toy)):
            assert found[name][i].item() == pytest.approx(values[i, :, rows, columns].mean().item(), abs=1e-5), name
    assert list(found) == ["PSNR", "SSIM", "LPIPS (AlexNet)", "toy features"]


def test_nothing_outside_of_a_hole_counts(alex):
    x, y, hole = pictures(2), pictures(2, seed=1), torch.zeros(2, 1, 32, 32)
    hole[:, :, 8:20, 5:15] = 1
    found = image_agreement(x, y, alex, hole)
    for outside in (torch.full_like(x, 1.0), pictures(2, seed=7), y):
        other = image_agreement(torch.where(hole == 1, x, outside), y, alex, hole)
        for name in found:
            assert torch.equal(found[name], other[name]), name
    inside = image_agreement(torch.where(hole == 1, 0.5 * x, x), y, alex, hole)
    assert not any(torch.isclose(inside[name], found[name]).any() for name in found)


@pytest.mark.parametrize("where", [None, holes(5)])
def test_scores_of_images_do_not_depend_on_the_chunk(where, alex):
    x, y = pictures(5), pictures(5, seed=1)
    whole = image_agreement(x, y, alex, where)
    for chunk in (1, 2, 5):
        parts = image_agreement(x, y, alex, where, chunk)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)
    alone = image_agreement(x[3:4], y[3:4], alex, None if where is None else where[3:4])
    for name in whole:
        torch.testing.assert_close(alone[name], whole[name][3:4], rtol=1e-5, atol=1e-6)


def test_a_hole_is_filled_with_the_mean_of_what_is_known():
    x, hole = pictures(3), holes(3)
    hole[2] = 1  # nothing is known
    filled = mean_fill(x, hole)
    for i in range(2):
        known = hole[i, 0] == 0
        for c in range(3):
            assert filled[i, c][~known].tolist() == pytest.approx([x[i, c][known].mean().item()] * int((~known).sum()))
            assert torch.equal(filled[i, c][known], x[i, c][known])
    assert not filled[2].any() and torch.equal(filled, mean_fill(x, hole == 1))


# --- Maps ---


def ids(b: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, (b, 9, 7), generator=torch.Generator().manual_seed(seed))


def test_overlaps_are_counts_of_pixels():
    a, b = ids(3, 4), ids(3, 4, 1)
    both, either = class_overlap(a, b, 5)
    assert both.shape == either.shape == (3, 5)
    for i in range(3):
        for k in range(5):
            pairs = [(p == k, q == k) for p, q in zip(a[i].flatten().tolist(), b[i].flatten().tolist())]
            assert both[i, k] == sum(p and q for p, q in pairs) and either[i, k] == sum(p or q for p, q in pairs)
    assert all(torch.equal(x, y) for x, y in zip(class_overlap(a.to(torch.uint8), b.int(), 5), (both, either)))


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 2), (3,)])
def test_the_mean_iou_equals_that_of_torchmetrics(present):
    """Also where classes occur in no image."""
    classification = pytest.importorskip("torchmetrics.classification")
    theirs = classification.MulticlassJaccardIndex(4, average="macro")
    a, b = (torch.tensor(present)[ids(4, len(present), seed)] for seed in (0, 1))
    found = mean_iou(*class_overlap(a, b, 4))
    assert found == pytest.approx(theirs(a, b).item(), rel=1e-5)
    assert mean_iou(*class_overlap(a, a, 4)) == 1


def test_pixels_of_all_images_are_counted_before_the_mean():
    """Class 1 has two pixels in the first image and eight in the second; class 3 occurs nowhere, class 2 in one map."""
    both, either = torch.tensor([[5, 1, 0, 0], [2, 8, 0, 0]]), torch.tensor([[6, 2, 3, 0], [4, 8, 0, 0]])
    assert mean_iou(both, either) == pytest.approx((7 / 10 + 9 / 10 + 0) / 3)
    whole, parts = ids(6, 4), ids(6, 4, 1)
    counts = class_overlap(whole, parts, 4)
    pooled = [
        torch.cat(some) for some in zip(class_overlap(whole[:2], parts[:2], 4), class_overlap(whole[2:], parts[2:], 4))
    ]
    assert mean_iou(*counts) == mean_iou(*pooled) == mean_iou(*(some.sum(0)[None] for some in counts))


def test_the_correlation_equals_that_of_numpy():
    x, y = pictures(4)[:, :1], pictures(4, seed=1)[:, :1]
    x = x + torch.linspace(-1, 1, 32)
    y = y + torch.linspace(-1, 1, 32)
    found = depth_correlation(x, y)
    for i in range(4):
        assert found[i].item() == pytest.approx(np.corrcoef(x[i].flatten(), y[i].flatten())[0, 1], abs=1e-6)
    torch.testing.assert_close(depth_correlation(3 * x + 1e4, y), found, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(depth_correlation(-x, y), -found)
    torch.testing.assert_close(depth_correlation(x, x), torch.ones(4))
    assert (depth_correlation(x, x.roll(5, 2)) < 1).all()


def test_a_flat_prediction_says_nothing_and_flat_truth_is_refused():
    x = 1e3 * pictures(3, 33, 31)[:, :1].double()  # where the mean of equal numbers is rounded
    flat = x.clone()
    flat[1] = 0.3
    found = depth_correlation(flat, x)
    assert found[1] == 0 and found[0] == found[2] == 1
    with pytest.raises(LDMError, match="wanted: the depth of image 1 is the same everywhere"):
        depth_correlation(x, flat)


CENTRE = [0.3, 0.3, 0.7, 0.7]  # around the middle of the image, where a thing at (0, 0.5) is seen


def box(kind: int, corners=CENTRE) -> list[float]:
    return [float(kind), *corners]


def sphere(x: float = 0.0, y: float = 0.5, shape: str = "sphere") -> Thing:
    return Thing(shape, "red", "small", x, y)


@pytest.mark.parametrize(
    ("things", "boxes", "wanted"),
    [
        ([sphere()], [box(1)], [True]),
        ([sphere()], [box(2)], [False]),
        ([sphere(shape="cube")], [box(2)], [True]),
        ([sphere(shape="cylinder")], [box(3)], [True]),
        ([sphere(shape="cylinder")], [box(1)], [False]),
        ([sphere()], [box(1, [0.0, 0.0, 0.2, 0.2])], [False]),
        ([sphere()], [box(1, [0.3, 0.0, 0.7, 0.2])], [False]),  # above
        ([sphere()], [box(1, [0.3, 0.8, 0.7, 1.0])], [False]),  # below
        ([sphere()], [box(1, [0.0, 0.0, 0.45, 1.0])], [False]),  # to the left
        ([sphere()], [box(1, [0.55, 0.0, 1.0, 1.0])], [False]),  # to the right
        ([sphere()], [box(1, [0.5, 0.0, 0.9, 1.0])], [True]),  # on the edge
        ([], [box(1)], [False]),
        ([], [], []),
        ([sphere()], [box(1, [0.0] * 4), box(1)], [True]),  # hidden
        ([sphere()], [box(1), box(1, [0.4, 0.4, 0.6, 0.6])], [True, False]),  # one thing, one box
        ([sphere(), sphere(0.05)], [box(1), box(1)], [True, True]),
        ([sphere(), sphere(), sphere()], [box(1)], [True]),
        ([sphere(), sphere(0.9)], [box(1, [0.0, 0.0, 1.0, 1.0]), box(1)], [True, True]),  # the second leaves the middle
        ([sphere(), sphere(0.9)], [box(1), box(1, [0.0, 0.0, 1.0, 1.0])], [True, True]),
    ],
)
def test_a_box_is_hit_by_a_thing_of_its_own(things, boxes, wanted):
    found = boxes_hit([things, [sphere()]], [torch.tensor(boxes).view(-1, 5), torch.tensor([box(1)])])
    assert sum(found[0]) == sum(wanted) and len(found[0]) == len(wanted) and found[1] == [True]
    if len(set(wanted)) == 1:
        assert found[0] == wanted


def test_as_many_boxes_are_hit_as_can_be():
    """Against all ways to give things to boxes."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        things = [sphere(*rng.uniform(-1, 1, 2), rng.choice(["sphere", "cube"])) for _ in range(3)]
        boxes = []
        for _ in range(3):
            corners = np.sort(rng.uniform(0, 1, (2, 2)), 0) * 0.5 + [[0, 0], [0.5, 0.5]]
            boxes.append(box(int(rng.integers(1, 3)), corners.flatten().tolist()))
        alone = [[boxes_hit([[t]], [torch.tensor([b])])[0][0] for t in things] for b in boxes]
        most = max(sum(alone[i][j] for i, j in enumerate(order)) for order in permutations(range(3)))
        found = boxes_hit([things], [torch.tensor(boxes)])[0]
        assert sum(found) == most and all(any(row) or not hit for row, hit in zip(alone, found))
        seen.add(most)
    assert seen >= {1, 2, 3}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_middle_of_a_thing_is_that_which_the_judge_learns(shape, size):
    thing = Thing(shape, "red", size, 0.7, -0.4)
    middle = reader_targets([Scene((thing,))])["middle"][0, 0]
    for far, wanted in ((0.0, True), (0.02, False), (-0.02, False)):
        corners = torch.cat([middle - 0.01, middle + 0.01]) + torch.tensor([0.0, far] * 2)
        kind = torch.tensor([1.0 + SHAPES.index(shape)])
        assert boxes_hit([[thing]], [torch.cat([kind, corners])[None]]) == [[wanted]]


def test_things_are_seen_in_their_own_boxes():
    """True things of true scenes, where none hides another by half."""
    data = ToyCOCO("test", keys=("boxes",))
    boxes = [sample["boxes"] for sample in data.__getitems__(range(60))]
    hits = boxes_hit([data.describe(i)[0].things for i in range(60)], boxes)
    assert [len(each) for each in hits] == [len(each) for each in boxes]
    assert sum(map(sum, hits)) >= 0.98 * sum(map(len, hits))


def test_the_judge_reads_true_scenes_as_they_are(reader, scenes):
    found = map_agreement(reader, scenes["image"], scenes)
    assert found.union.shape == found.intersection.shape == (24, 4) and found.depth.shape == (24,)
    assert mean_iou(found.intersection, found.union) > 0.95 and found.depth.min() > 0.99
    assert np.mean(sum(found.boxes, [])) > 0.95 and len(found.boxes) == 24
    shifted = map_agreement(reader, scenes["image"].roll(12, 3), scenes)
    assert mean_iou(shifted.intersection, shifted.union) < 0.6 and (shifted.depth < found.depth).all()
    assert np.mean(sum(shifted.boxes, [])) < 0.6


def test_the_floor_makes_all_depths_alike(reader, scenes):
    """What a report says of a depth correlation of 0.96."""
    others = map_agreement(reader, scenes["image"].roll(1, 0), {"depth": scenes["depth"]})
    assert others.depth.mean().item() == pytest.approx(0.96, abs=0.01)
    assert others.without_floor.mean().item() < 0.3
    same = map_agreement(reader, scenes["image"], {"depth": scenes["depth"]})
    assert same.without_floor.mean() > 0.95


def test_without_the_floor_is_the_correlation_of_what_is_nearer(reader, scenes):
    found = map_agreement(reader, scenes["image"], {"depth": scenes["depth"]})
    floor = truth([Scene(())], 64)["depth"]
    with torch.no_grad():
        read = reader(scenes["image"]).depth
    torch.testing.assert_close(found.without_floor, depth_correlation(read - floor, scenes["depth"] - floor))


def test_what_is_read_is_scored_by_the_functions_for_maps(reader, scenes):
    images = pictures(24, 64, 64)
    with torch.no_grad():
        reading = reader(images)
    found = map_agreement(reader, images, scenes)
    wanted = class_overlap(reading.segmentation.argmax(1), scenes["segmentation"], 4)
    assert torch.equal(found.intersection, wanted[0]) and torch.equal(found.union, wanted[1])
    torch.testing.assert_close(found.depth, depth_correlation(reading.depth, scenes["depth"]))
    assert found.boxes == boxes_hit(reader.read(images), scenes["boxes"])


def test_what_is_read_does_not_depend_on_the_chunk(reader, scenes):
    few = {key: scenes[key][:7] for key in scenes}
    whole = map_agreement(reader, few["image"], few)
    for chunk in (1, 3, 7):
        parts = map_agreement(reader, few["image"], few, chunk)
        assert torch.equal(parts.union, whole.union) and torch.equal(parts.intersection, whole.intersection)
        torch.testing.assert_close(parts.depth, whole.depth)
        assert parts.boxes == whole.boxes


@pytest.mark.parametrize("key", ["segmentation", "depth", "boxes"])
def test_only_what_was_given_is_compared(key, reader, scenes):
    found = map_agreement(reader, scenes["image"], {key: scenes[key], "caption": ["?"] * 24})
    assert (found.union is None) == (found.intersection is None) == (key != "segmentation")
    assert (found.depth is None) == (key != "depth") and (found.boxes is None) == (key != "boxes")


def exact_reader(scenes):
    """A judge that reads the truth, whatever it sees."""

    class Exact(SceneReader):
        def forward(self, images):
            empty = torch.zeros(len(images), 16, 16)
            maps = F.one_hot(scenes["segmentation"], 4).movedim(-1, 1).float(), scenes["depth"]
            return Reading(empty - 9, *[empty[:, None].expand(-1, k, -1, -1) for k in (3, 8, 2, 2)], *maps)

    return Exact((8, 8, 8))


def test_a_perfect_reading_has_perfect_scores(scenes):
    found = map_agreement(exact_reader(scenes), scenes["image"], scenes)
    assert mean_iou(found.intersection, found.union) == 1 and torch.equal(found.intersection, found.union)
    torch.testing.assert_close(found.depth, torch.ones(24))
    assert not any(sum(found.boxes, [])), "it sees no thing"


# --- What is refused ---

CALLED = (boxes_hit, class_overlap, depth_correlation, image_agreement, lpips_map, masked_psnr, mean_fill, mean_iou)
PLAIN = SimpleNamespace(**{f.__name__: inspect.unwrap(f) for f in CALLED})  # without the types that jaxtyping checks
X, HOLE, DEPTH, IDS = pictures(2), holes(2), pictures(2, 64, 64)[:, :1], ids(2, 3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: PLAIN.masked_psnr(X, X[:1], HOLE), r"references has the shape \(1, 3, 32, 32\), but images has"),
        (lambda: PLAIN.masked_psnr(X[0], X, HOLE), "images should have the shape"),
        (lambda: PLAIN.masked_psnr(X * 100, X, HOLE), r"images should be images in \[-1, 1\]"),
        (lambda: PLAIN.masked_psnr(X, X * 100, HOLE), r"references should be images in \[-1, 1\]"),
        (
            lambda: PLAIN.masked_psnr(X, X, HOLE[:, 0]),
            r"hole should have the shape \(2, 1, 32, 32\), .* not \(2, 32, 32\)",
        ),
        (lambda: PLAIN.masked_psnr(X, X, None), "hole should have the shape .* not None"),
        (lambda: PLAIN.masked_psnr(X, X, HOLE / 2), "hole should be 1 where a pixel is missing and 0 where"),
        (
            lambda: PLAIN.masked_psnr(X, X, HOLE * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)),
            "hole: image 1 has no missing",
        ),
        (lambda: PLAIN.image_agreement(X, X, None, HOLE * 0), "hole: image 0 has no missing pixel"),
        (lambda: PLAIN.image_agreement(X[:0], X[:0]), r"at least one image, .* not \(0, 3, 32, 32\)"),
        (lambda: PLAIN.image_agreement(X[..., :5], X[..., :5]), "at least 6 pixels along each side"),
        (lambda: PLAIN.image_agreement(X, X, chunk=0), "chunk=0 should be a whole number"),
        (lambda: PLAIN.image_agreement(X, X, psnr), "distance should be an LPIPS or a ToyFeatures, the module itself"),
        (lambda: PLAIN.lpips_map(None, X, X), "distance should be an LPIPS or a ToyFeatures"),
        (lambda: PLAIN.image_agreement(X[..., :15], X[..., :15], ToyFeatures()), "at least 16 pixels along each side"),
        (lambda: PLAIN.lpips_map(ToyFeatures(), X[..., :15], X[..., :15]), "at least 16 pixels along each side"),
        (lambda: PLAIN.lpips_map(ToyFeatures(), X, X[:1]), "references has the shape"),
        (lambda: PLAIN.mean_fill(X, HOLE[:1]), "hole should have the shape"),
        (lambda: PLAIN.mean_fill(X[:, :1], HOLE), "images should have the shape"),
        (
            lambda: PLAIN.class_overlap(IDS, IDS[:1], 3),
            r"predicted has the shape \(2, 9, 7\), but wanted has \(1, 9, 7\)",
        ),
        (lambda: PLAIN.class_overlap(IDS.float(), IDS, 3), "predicted should be whole numbers"),
        (lambda: PLAIN.class_overlap(IDS, IDS + 1, 3), r"wanted should lie in \[0, 3\)"),
        (lambda: PLAIN.class_overlap(IDS - 1, IDS, 3), r"predicted should lie in \[0, 3\)"),
        (lambda: PLAIN.class_overlap(IDS, IDS, 0), "classes=0 should be a whole number"),
        (
            lambda: PLAIN.mean_iou(torch.ones(2, 3), torch.ones(3, 2)),
            r"two tensors \(b, classes\), not \(2, 3\) and \(3, 2\)",
        ),
        (lambda: PLAIN.mean_iou(torch.ones(2), torch.ones(2)), "two tensors"),
        (lambda: PLAIN.mean_iou([1], [1]), "two tensors"),
        (lambda: PLAIN.mean_iou(torch.full((2, 3), 2), torch.ones(2, 3)), "nowhere larger than union"),
        (lambda: PLAIN.mean_iou(torch.full((2, 3), -1), torch.ones(2, 3)), "at least 0"),
        (lambda: PLAIN.mean_iou(torch.zeros(2, 3), torch.zeros(2, 3)), "union is 0 for every class"),
        (
            lambda: PLAIN.depth_correlation(DEPTH, DEPTH[:1]),
            r"predicted has the shape \(2, 1, 64, 64\), but wanted has",
        ),
        (lambda: PLAIN.depth_correlation(DEPTH[:, 0], DEPTH), "predicted should have the shape"),
        (lambda: PLAIN.depth_correlation(DEPTH, DEPTH * math.inf), "wanted should hold finite numbers"),
        (lambda: PLAIN.depth_correlation(DEPTH * math.nan, DEPTH), "predicted should hold finite numbers"),
        (
            lambda: PLAIN.boxes_hit([[]], []),
            "boxes should be a list with a tensor .* for each of 1 images, not 0 of them",
        ),
        (lambda: PLAIN.boxes_hit([[]], torch.zeros(1, 1, 5)), "boxes should be a list with a tensor"),
        (lambda: PLAIN.boxes_hit([["sphere"]], [torch.zeros(0, 5)]), "found should be a list of things for each image"),
        (lambda: PLAIN.boxes_hit(3, []), "found should be a list of things for each image, not 3"),
        (lambda: PLAIN.boxes_hit([[]], [torch.tensor([box(0)])]), "class 0 is the floor"),
        (lambda: PLAIN.boxes_hit([[]], [torch.tensor([box(4)])]), r"whole numbers in \[0, 4\)"),
        (lambda: PLAIN.boxes_hit([[]], [torch.tensor([box(1, [0.7, 0.3, 0.3, 0.7])])]), "left before right"),
    ],
)
def test_wrong_arguments_are_named(call, said):
    with pytest.raises(LDMError, match=said):
        call()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": pictures(24, 32, 32)}, r"the judge reads images \(b, 3, 64, 64\), at least one, not"),
        ({"images": pictures(24, 64, 64)[:0]}, "at least one"),
        ({"chunk": 0}, "chunk=0 should be"),
        ({"batch": {"caption": ["a"]}}, "batch should be a dict with some of segmentation, depth, boxes"),
        ({"batch": [1]}, "batch should be a dict"),
        ({"segmentation": torch.zeros(23, 64, 64).long()}, r"segmentation should have the shape \(24, 64, 64\), not"),
        ({"segmentation": torch.full((24, 64, 64), 4)}, r"segmentation should lie in \[0, 4\)"),
        ({"depth": torch.zeros(24, 64, 64)}, r"depth should have the shape \(24, 1, 64, 64\), not"),
        ({"depth": torch.zeros(24, 1, 64, 64)}, "depth: the depth of image 0 is the same everywhere"),
        ({"depth": [1]}, "depth should have the shape"),
        ({"boxes": [torch.zeros(0, 5)]}, r"boxes should be a list with a tensor \(k, 5\) for each of 24 images"),
        ({"boxes": torch.zeros(24, 1, 5)}, "boxes should be a list"),
    ],
)
def test_maps_that_do_not_fit_are_named(changes, said, reader, scenes):
    arguments = {"images": scenes["image"], "batch": {k: scenes[k] for k in ("segmentation", "depth", "boxes")}}
    for key, value in changes.items():
        (arguments if key in ("images", "batch", "chunk") else arguments["batch"])[key] = value
    with pytest.raises(LDMError, match=said):
        inspect.unwrap(map_agreement)(reader, **arguments)


# --- In a report ---

QUICK = Drawing(steps=1, batch_size=4)
SCORES = ["PSNR", "SSIM", "LPIPS (AlexNet)"]


def small(of=None, size: int = 32, f: int = 4, **provenance) -> LatentDiffusion:
    """An untrained model of any condition; `of` makes a conditioner, and is given the first stage."""
    torch.manual_seed(0)
    levels = (1,) * (f.bit_length())
    stage = AutoencoderKL(channels=8, multipliers=levels, blocks=1, latent_channels=3, groups=4, scale_factor=0.7)
    conditioner = None if of is None else of(stage)
    slots = ("context_dim", "vector_dim", "concat_channels")
    slot = {} if conditioner is None else {name: getattr(conditioner, name) for name in slots}
    unet = UNet(3, 3, 32, (1,), 1, (1,), **slot)
    with torch.no_grad():
        for p in unet.parameters():
            if not p.any():
                p.normal_(std=0.05)
    return LatentDiffusion(stage, unet, NoiseSchedule(T=50), conditioner, size, provenance).eval()


def mapped(key: str, **more):
    return lambda stage: MapConditioner(key, **more)


def numbers(measured) -> list[tuple]:
    return [(m.name, dict(m.of), m.value, m.low, m.high, m.n) for m in measured]


def sets_of(measured, name: str) -> list[str]:
    return [m.of["set"] for m in measured.of(name)]


def assert_means(measured, name: str, scored: dict[str, torch.Tensor], n: int) -> None:
    """The rows of a set are the means over its images, with 1.96 standard errors."""
    for score, values in scored.items():
        m = measured.one(score, set=name)
        assert m.value == pytest.approx(values.double().mean().item(), rel=1e-5), (name, score)
        assert m.high - m.value == pytest.approx(1.96 * values.double().std().item() / n**0.5, rel=1e-4)
        assert m.n == n and m.unit == ("dB" if score == "PSNR" else "")


@pytest.mark.parametrize("key", ["low_resolution", "degraded"])
def test_super_resolution_is_compared_with_the_real_images(key, weights, alex):
    model, n = small(mapped(key)), 6
    measured = evaluate(model, Evaluation(QUICK, dataset="toy", n=n, weights_dir=weights))
    batch = collate(open_dataset("toy", size=32, split="test", keys=("image", key)).__getitems__(range(n)))
    real = to_uint8(batch["image"])
    drawn = torch.cat([to_uint8(model.sample({key: batch[key][i : i + 1]}, steps=1, seed=i)) for i in range(n)])
    sets = {
        "drawn": drawn,
        "reconstructed": reconstructed_set(model, real),
        "bicubic": to_uint8(upsample(batch[key], 4)),
    }
    for name, images in sets.items():
        scored = image_agreement(from_bytes(images), from_bytes(real), alex)
        assert list(scored) == SCORES
        tolerance = name != "drawn"  # a batch of one and one of four may differ in the last bit of a byte
        if tolerance:
            assert_means(measured, name, scored, n)
        for score in SCORES:
            m = measured.one(score, set=name)
            assert m.value == pytest.approx(scored[score].mean().item(), rel=1e-3) and "pixels" not in m.of
            assert ("steps" in m.of) == (name == "drawn") and m.of["split"] == "test"
    assert [sets_of(measured, score) for score in SCORES] == [["drawn", "reconstructed", "bicubic"]] * 3
    assert measured.one("PSNR", set="bicubic").value > measured.one("PSNR", set="drawn").value
    assert f"'bicubic': {key} enlarged" in measured.about and "uses the network of LPIPS (AlexNet)" in measured.about


def test_inpainting_is_compared_in_the_hole(weights, alex, tmp_path):
    model, n = small(InpaintingConditioner), 6
    measured = evaluate(model, Evaluation(QUICK, dataset="toy", n=n, weights_dir=weights))
    data = open_dataset("toy", size=32, split="test", keys=("image", "mask"))
    batch = collate(data.__getitems__(range(n)))
    real, hole = to_uint8(batch["image"]), batch["mask"] == 1
    sets = {"drawn": draw_set(model, QUICK, range(n), data), "reconstructed": reconstructed_set(model, real, 4)}
    sets["mean fill"] = to_uint8(mean_fill(from_bytes(real), hole))
    for name, images in sets.items():
        assert_means(measured, name, image_agreement(from_bytes(images), from_bytes(real), alex, hole), n)
        assert all(measured.one(score, set=name).of["pixels"] == "hole" for score in SCORES)
    assert [sets_of(measured, score) for score in SCORES] == [list(sets)] * 3
    extractor = find_extractor("toy-features")
    behind = from_bytes(report.real_set(open_dataset("toy", size=32, split="test"), range(n, 2 * n)))
    for name in ("drawn", "reconstructed"):
        pasted = from_bytes(torch.where(hole, sets[name], real))
        wanted = frechet_distance(extractor(behind), extractor(pasted))
        assert measured.one("Fréchet distance", set=name).value == pytest.approx(wanted, rel=1e-3)
        assert frechet_distance(extractor(behind), extractor(from_bytes(sets[name]))) > 1.05 * wanted
    measured.save(tmp_path / "x.json")
    assert load_measurements(tmp_path / "x.json") == measured
    told = table(load_measurements(tmp_path / "x.json"))
    head = next(line for line in told.splitlines() if "other real images  " in line)
    assert head.split("  ")[-1].strip() == "mean colour of what is known"
    line = next(line for line in told.splitlines() if line.startswith("PSNR of the hole"))
    assert line.count(" dB (") == 3 and line.endswith(measured.one("PSNR", set="mean fill").text(2))
    assert line.index(measured.one("PSNR", set="mean fill").text(2)) == head.index("mean colour")
    assert "pasted into the drawn one and into the reconstruction" in told
    found = report.scores(measured)["test"]
    assert list(found) == ["drawn", "ceiling", "real halves", "mean fill"] and list(found["mean fill"]) == SCORES
    assert found["ceiling"]["SSIM"] == measured.one("SSIM", set="reconstructed").text(3)


MAP_ROWS = {"segmentation": "segmentation, mean IoU", "depth": "depth correlation", "boxes": "boxes hit"}


def all_maps(stage):
    depth = MapConditioner("depth", 1, factor=8, per_image=True)
    return MergedConditioner(
        [MapConditioner("segmentation", classes=4, factor=8), depth, LayoutConditioner(4, 3, 16, 32)]
    )


@pytest.mark.parametrize("sets", [1, 2])
def test_maps_are_compared_with_what_the_judge_reads(sets, reader):
    model, n = small(all_maps, 64, 8, recipe={"dataset": "toy"}), 4
    measured = evaluate(model, Evaluation(QUICK, n=n, sets=sets))
    keys = ("image", "segmentation", "depth", "boxes")
    data = ToyCOCO("test", keys=keys)
    batch = collate(data.__getitems__(range(n * sets)))
    real = to_uint8(batch["image"])
    drawn = [draw_set(model, replace(QUICK, seed=k), range(k, k + n), data) for k in range(0, n * sets, n)]
    images = {"drawn": torch.cat(drawn), "reconstructed": reconstructed_set(model, real, 4), "real halves": real}
    for name, some in images.items():
        starts = range(0, n * sets, n)
        found = [
            map_agreement(reader, from_bytes(some[k : k + n]), {key: batch[key][k : k + n] for key in keys})
            for k in starts
        ]
        overlaps, depths = [mean_iou(each.intersection, each.union) for each in found], [each.depth for each in found]
        hits = [hit for each in found for image in each.boxes for hit in image]
        overlap, depth, hit = (measured.one(row, set=name) for row in MAP_ROWS.values())
        assert overlap.value == pytest.approx(np.mean(overlaps), abs=1e-3) and overlap.n == depth.n == n
        assert depth.value == pytest.approx(torch.cat(depths).mean().item(), abs=1e-3)
        share = Measurement.share("boxes hit", sum(hits), len(hits))
        assert (hit.value, hit.low, hit.high, hit.n) == pytest.approx((share.value, share.low, share.high, share.n))
        if sets == 1:
            assert overlap.low is None
            error = depths[0].double().std().item() / n**0.5
            assert depth.high - depth.value == pytest.approx(1.96 * error, abs=1e-4)
        else:
            half = stats.t.ppf(0.975, 1) * np.std(overlaps, ddof=1) / 2**0.5
            assert overlap.high - overlap.value == pytest.approx(half, abs=1e-3)
            assert overlap.of["sets"] == depth.of["sets"] == 2 and "sets" not in hit.of
    assert {tuple(sets_of(measured, row)) for row in MAP_ROWS.values()} == {("drawn", "reconstructed", "real halves")}
    told = table(measured)
    assert all(any(line.startswith(row) for line in told.splitlines()) for row in MAP_ROWS.values())
    assert "with the given segmentation and depth and boxes" in told and "judge, rendered" in told
    assert "bicubic" not in told and "LPIPS" not in told
    assert report.scores(measured)["test"]["real halves"]["boxes hit"].endswith(f"n = {share.n})")


@pytest.mark.parametrize("key", MAP_ROWS)
def test_only_the_given_map_has_a_row(key):
    how = {"segmentation": {"classes": 4}, "depth": {"channels": 1, "per_image": True}}.get(key)
    of = (lambda stage: LayoutConditioner(4, 3, 16, 32)) if how is None else mapped(key, factor=8, **how)
    measured = evaluate(small(of, 64, 8), Evaluation(QUICK, dataset="toy", n=2))
    assert [row for row in MAP_ROWS.values() if measured.of(row)] == [MAP_ROWS[key]]
    assert ("a depth correlation of 0.96" in measured.about.lower()) == (key == "depth")
    assert ("pixels of all images are counted first" in measured.about) == (key == "segmentation")


def test_models_without_such_conditions_have_the_rows_that_they_had(monkeypatch):
    """Also where the judge cannot read the images: of other sizes, and of faces."""
    for name in ("image_agreement", "map_agreement", "_pick_distance"):
        monkeypatch.setattr(report, name, None)
    faces = mapped("segmentation", classes=len(FACE_SEGMENTS), factor=8)
    cases = [
        (small(), "toy"),
        (small(lambda stage: ClassConditioner(24, 32)), "toy"),
        (small(mapped("depth", channels=1, factor=4)), "toy"),
        (small(faces, 64, 8), "toy-faces"),
    ]
    for model, dataset in cases:
        measured = evaluate(model, Evaluation(QUICK, dataset=dataset, n=2))
        wanted = {"Fréchet distance", "Fréchet excess", "kernel distance", "inception score"}
        assert {m.name for m in measured} == wanted
        told = table(measured)
        head = told.splitlines()[3]
        assert head.endswith("other real images") and "judge" not in told and "LPIPS" not in told
        assert list(report.scores(measured)["test"]) == ["drawn", "ceiling", "real halves"]


def test_captions_and_maps_are_judged_side_by_side():
    model = LatentDiffusion.from_pretrained("toy-maps")
    measured = evaluate(model, Evaluation(replace(QUICK, steps=2), n=2, splits=("test",)))
    assert measured.one("depth correlation", set="real halves").value > 0.99
    assert measured.of("things", set="drawn") and not measured.of("things", set="real halves")


# --- Which network compares ---


@pytest.mark.parametrize(
    ("perceptual", "name"),
    [
        ("lpips-alex", "LPIPS (VGG16)"),
        ("lpips-vgg", "LPIPS (AlexNet)"),
        ("toy-features", "LPIPS (AlexNet)"),
        (None, ""),
    ],
)
def test_the_network_of_the_loss_does_not_judge(perceptual, name, weights):
    recipe = {"dataset": "toy-faces", "first_stage": {"perceptual": perceptual}} if name else {"dataset": "toy-faces"}
    model = small(mapped("low_resolution"), recipe=recipe)
    measured = evaluate(model, Evaluation(QUICK, n=2, weights_dir=weights))
    assert [m.name for m in measured if "LPIPS" in m.name] == [name or "LPIPS (AlexNet)"] * 3
    with pytest.raises(LDMError):  # no Fréchet distance of such a set: it has these rows alone
        measured.one("Fréchet distance", set="bicubic")


@pytest.mark.parametrize(
    ("size", "said"),
    [(32, "LPIPS (AlexNet) is left out: its weights"), (16, "it needs images of at least 31 pixels along each side")],
)
def test_without_its_network_lpips_is_left_out(size, said, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = small(mapped("low_resolution"), size)
    folder = tmp_path if size == 32 else weights
    measured = evaluate(model, Evaluation(QUICK, dataset="toy", n=2, weights_dir=folder))
    assert [m.name for m in measured if m.of["set"] == "bicubic"] == SCORES[:2] and said in measured.about
    assert str(tmp_path) not in measured.about


def test_a_damaged_network_is_an_error_before_the_work(tmp_path, monkeypatch):
    (tmp_path / BACKBONES["alex"].file).write_bytes(b"nothing")
    model = small(mapped("low_resolution"))
    monkeypatch.setattr(model, "sample", None)
    with pytest.raises(CheckpointError, match="alexnet"):
        evaluate(model, Evaluation(QUICK, dataset="toy", n=2, weights_dir=tmp_path))


# --- Several sets, and equal images ---


def test_sets_of_images_have_an_interval_of_students_t(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model, n = small(mapped("low_resolution")), 3
    both = evaluate(model, Evaluation(QUICK, dataset="toy", n=n, sets=2))
    data = open_dataset("toy", size=32, split="test", keys=("image", "low_resolution"))
    batch = collate(data.__getitems__(range(2 * n)))
    pair = from_bytes(to_uint8(upsample(batch["low_resolution"], 4))), from_bytes(to_uint8(batch["image"]))
    means = [image_agreement(*(x[k : k + n] for x in pair))["PSNR"].mean().item() for k in (0, n)]
    m = both.one("PSNR", set="bicubic")
    half = stats.t.ppf(0.975, 1) * np.std(means, ddof=1) / 2**0.5
    assert m.value == pytest.approx(np.mean(means), rel=1e-5) and m.high - m.value == pytest.approx(half, rel=1e-3)
    assert m.unit == "dB" and m.of["sets"] == 2 and m.n == n and m.text(2) in table(both)


@pytest.mark.parametrize("sets", [1, 2])
def test_equal_images_have_an_infinite_psnr_in_a_report(sets, tmp_path, monkeypatch):
    """As of a model whose first stage gives back every byte."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(report, "reconstructed_set", lambda model, images, chunk=64: images)
    measured = evaluate(small(mapped("low_resolution")), Evaluation(QUICK, dataset="toy", n=2, sets=sets))
    m = measured.one("PSNR", set="reconstructed")
    assert m.value == math.inf and m.low is None and m.high is None and m.unit == "dB"
    assert measured.one("SSIM", set="reconstructed").value == pytest.approx(1)
    measured.save(tmp_path / "x.json")
    assert numbers(load_measurements(tmp_path / "x.json")) == numbers(measured) and "inf dB" in table(measured)


def test_what_is_given_does_not_depend_on_the_chunk():
    model = small(InpaintingConditioner)
    split = report.open_split(model, "toy", None, "test", 5)
    whole, parts = (report.read_given(model, split, range(2, 7), chunk=chunk) for chunk in (64, 2))
    assert torch.equal(whole.hole, parts.hole) and whole.hole.shape == (5, 1, 32, 32)
    wanted = [split.conditions[i]["mask"] == 1 for i in range(2, 7)]
    assert torch.equal(whole.hole, torch.stack(wanted)) and whole.enlarged is None and not whole.maps
    real = report.real_set(split.images, range(2, 7))
    assert torch.equal(whole.baselines(real)["mean fill"], whole.baselines(real, 2)["mean fill"])
