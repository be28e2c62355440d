"""Distances between sets of features: by definition, against torchmetrics and torch-fidelity, and at their edges."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_edu.errors import LDMError
from ldm_edu.evaluation.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_neighbours,
    precision_recall,
)

PAIRWISE = (frechet_distance, kernel_distance, precision_recall, nearest_neighbours)


def cloud(n: int, d: int, seed: int = 0, mix: bool = True) -> Tensor:
    """n vectors whose features have different scales and are correlated."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x @ torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5 + 0.3 if mix else x


class AsTheyAre(nn.Module):
    """Takes feature vectors in place of images, so that torchmetrics compares what we compare."""

    def __init__(self, d: int):
        super().__init__()
        self.num_features = d

    def forward(self, x: Tensor) -> Tensor:
        return x


def by_torchmetrics(metric, x: Tensor, y: Tensor):
    metric.update(x, real=True)
    metric.update(y, real=False)
    return metric.compute()


# --- Fréchet distance ---

SIZES = [(40, 40, 6), (200, 50, 16), (30, 25, 64), (2, 2, 5), (3, 90, 32), (64, 64, 1)]


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_frechet_is_that_of_torchmetrics(n, m, d):
    image = pytest.importorskip("torchmetrics.image")
    x, y = cloud(n, d), cloud(m, d, 1)
    theirs = by_torchmetrics(image.FrechetInceptionDistance(AsTheyAre(d), normalize=True), x, y)
    assert theirs.dtype == torch.float64
    assert math.isclose(frechet_distance(x, y), theirs.item(), rel_tol=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [size for size in SIZES if size[2] > 1])
def test_frechet_is_that_of_torch_fidelity(n, m, d):
    theirs = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = cloud(n, d), cloud(m, d, 1)
    fid = theirs.fid_statistics_to_metric(*map(theirs.fid_features_to_statistics, (x, y)), verbose=False)
    assert math.isclose(frechet_distance(x, y), fid["frechet_inception_distance"], rel_tol=1e-6)


@pytest.mark.parametrize(("n", "d"), [(2, 3), (20, 5), (20, 300), (300, 20)])
def test_a_set_has_no_distance_to_itself(n, d):
    x = 100 * cloud(n, d)
    assert 0 <= frechet_distance(x, x) < 1e-6
    assert 0 <= frechet_distance(x, x[torch.randperm(n, generator=torch.Generator().manual_seed(0))]) < 1e-6
    assert precision_recall(torch.cat([x, x]), torch.cat([x, x])) == (1, 1)
    assert nearest_neighbours(x, x)[0].max() == 0


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_large_samples_of_two_gaussians_are_as_far_apart_as_the_exact_answer(shift):
    scales = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.5, 1.0, 0.5])
    x, y = (cloud(n, 3, seed, mix=False) * s for n, seed, s in zip((100_000, 60_000), (0, 1), scales))
    exact = 3 * shift**2 + (scales[0] - scales[1]).square().sum().item()
    assert math.isclose(frechet_distance(x, y + shift), exact, rel_tol=0.02)


def test_one_feature_is_the_formula_on_a_line():
    x, y = cloud(50, 1), 3 * cloud(70, 1, 1) + 1
    exact = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert math.isclose(frechet_distance(x, y), exact.item(), rel_tol=1e-9)


@pytest.mark.parametrize("distance", [frechet_distance, lambda x, y: kernel_distance(x, y, subset_size=10**6).value])
def test_neither_order_nor_rotation_nor_the_sides_matter(distance):
    x, y = cloud(50, 8), cloud(50, 8, 1)
    turn = torch.linalg.qr(cloud(8, 8, 2)).Q
    value = distance(x, y)
    assert math.isclose(distance(x.flip(0), y.roll(3, 0)), value, rel_tol=1e-9)
    assert math.isclose(distance(x @ turn, y @ turn), value, rel_tol=1e-9)
    assert math.isclose(distance(y, x), value, rel_tol=1e-9)


def test_the_bias_of_frechet_falls_like_one_over_n_and_that_of_the_kernel_distance_is_none():
    found = {}
    for n in (100, 400):
        draws = [(cloud(n, 12, 2 * i, mix=False), cloud(n, 12, 2 * i + 1, mix=False)) for i in range(40)]
        found[n] = sum(frechet_distance(x, y) for x, y in draws) / 40
        kernels = torch.tensor([kernel_distance(x, y).value for x, y in draws])
        assert abs(kernels.mean()) < 4 * kernels.std() / 40**0.5
        assert math.isclose(found[n] * n, 2 * 12 + 12 * 13 / 2, rel_tol=0.1)
    assert math.isclose(found[100] / found[400], 4, rel_tol=0.15)


def test_single_precision_is_compared_in_double():
    x, y = cloud(30, 6).float(), cloud(30, 6, 1).float()
    assert frechet_distance(x, y) == frechet_distance(x.double(), y.double())
    assert nearest_neighbours(x, y)[0].dtype == torch.float64
    far = 1e4  # float32 would lose the small differences beside it
    assert math.isclose(
        frechet_distance(x.double() + far, y.double() + far), frechet_distance(x, y), rel_tol=1e-6, abs_tol=1e-6
    )


# --- Kernel distance ---


@pytest.mark.parametrize(("n", "d"), [(30, 6), (20, 64), (2, 3), (100, 1)])
def test_kernel_is_that_of_torchmetrics_and_torch_fidelity(n, d):
    image, theirs = pytest.importorskip("torchmetrics.image"), pytest.importorskip("torch_fidelity.metric_kid")
    x, y = cloud(n, d), cloud(n, d, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features in memory
        metric = image.KernelInceptionDistance(AsTheyAre(d), subsets=1, subset_size=n)
    ours = kernel_distance(x, y).value
    assert math.isclose(ours, by_torchmetrics(metric, x, y)[0].item(), rel_tol=1e-5, abs_tol=1e-6)
    kid = theirs.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=n, verbose=False)
    assert math.isclose(ours, kid["kernel_inception_distance_mean"], rel_tol=1e-9, abs_tol=1e-12)


def test_kernel_is_its_definition_in_loops():
    x, y = cloud(7, 3), cloud(7, 3, 1)

    def k(a: Tensor, b: Tensor) -> float:
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist())) / 3 + 1) ** 3

    within = [sum(k(s[i], s[j]) for i in range(7) for j in range(7) if i != j) / 42 for s in (x, y)]
    between = sum(k(a, b) for a in x for b in y) / 49
    assert math.isclose(kernel_distance(x, y).value, sum(within) - 2 * between, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("n", "m", "size", "subsets"), [(100, 100, 1000, 1), (150, 150, 60, 30), (150, 150, 60, 1), (80, 300, 60, 40)]
)
def test_the_error_is_the_spread_over_other_samples(n, m, size, subsets):
    found = []
    for i in range(120):
        x, y = cloud(n, 8, 2 * i, mix=False), cloud(m, 8, 2 * i + 1, mix=False) + 0.6
        found.append(kernel_distance(x, y, subsets, size, seed=i))
    spread = torch.tensor([score.value for score in found]).std().item()
    assert 0.8 < sum(score.error for score in found) / 120 / spread < 1.25


def test_the_error_is_not_too_small_where_the_sets_are_alike():
    found = [kernel_distance(cloud(100, 8, 2 * i, False), cloud(100, 8, 2 * i + 1, False)) for i in range(60)]
    assert torch.tensor([score.value for score in found]).std() < sum(score.error for score in found) / 60


def test_the_largest_features_that_are_taken_give_a_number_with_an_error():
    x, y = (1e24 * cloud(50, 4, seed, mix=False).sign() for seed in (0, 1))
    for distance in (kernel_distance(x, y.abs()), kernel_distance(x, -x.abs(), subsets=5, subset_size=9)):
        assert math.isfinite(distance.value) and math.isfinite(distance.error)


def test_subsets_are_lowered_to_the_smaller_set_and_drawn_by_the_seed():
    x, y = cloud(40, 5), cloud(25, 5, 1)
    assert kernel_distance(x, y) == kernel_distance(x, y, subset_size=25)
    assert kernel_distance(x, y, seed=1) != kernel_distance(x, y)
    assert kernel_distance(x[:25], y, seed=1).value == pytest.approx(kernel_distance(x[:25], y).value, rel=1e-12)
    whole = kernel_distance(x, y[:40], subsets=3000, subset_size=10).value
    assert math.isclose(whole, kernel_distance(x, y, subsets=3000).value, abs_tol=0.03)


def test_the_global_random_stream_is_left_alone():
    torch.manual_seed(0)
    kernel_distance(cloud(20, 3), cloud(30, 3, 1))
    inception_score(cloud(20, 3).softmax(1))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


# --- Neighbours, precision and recall ---


@pytest.mark.parametrize(("n", "m", "d", "k"), [(20, 30, 4, 1), (5, 7, 100, 7), (1, 1, 2, 1), (2100, 2100, 2, 3)])
def test_neighbours_are_those_of_all_distances_sorted(n, m, d, k):
    x, y = cloud(n, d), cloud(m, d, 1)
    far, near = nearest_neighbours(x, y, k)
    every = (x[:, None] - y).norm(dim=2)
    torch.testing.assert_close(far, every.sort(1).values[:, :k])
    torch.testing.assert_close(every.gather(1, near), far)
    assert far.shape == near.shape == (n, k)


def test_a_copy_is_found_at_distance_zero_far_from_the_origin():
    y = cloud(50, 20) + 1e6
    far, near = nearest_neighbours(y[[7, 3]], y)
    assert far.tolist() == [[0.0], [0.0]] and near.tolist() == [[7], [3]]


def test_a_part_that_all_vectors_share_changes_no_neighbour():
    x, y = ((64 * cloud(60, 8, seed)).round() / 64 for seed in (0, 1))  # so that an offset rounds nothing
    outlier = torch.full((1, 8), 1e9, dtype=torch.float64)
    far, near = nearest_neighbours(x, y, 3)
    for moved, among in ((x + 1e9, y + 1e9), (x, torch.cat([y, outlier]))):
        found = nearest_neighbours(moved, among, 3)
        assert torch.equal(found[1], near) and torch.equal(found[0], far)
    assert precision_recall(x + 1e9, y + 1e9) == precision_recall(x, y)


def test_sets_that_are_apart_cover_nothing_of_each_other_beside_a_large_constant_feature():
    x, y = cloud(50, 8, mix=False), cloud(50, 8, 1, mix=False) + 6
    constant = torch.full((50, 1), 3e7, dtype=torch.float64)
    assert precision_recall(torch.cat([x, constant], 1), torch.cat([y, constant], 1)) == (0, 0)


def in_loops(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    def share(points: Tensor, centres: Tensor) -> float:
        inside = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = sorted((centre - other).norm().item() for j, other in enumerate(centres) if j != i)
                if (point - centre).norm().item() <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize(("n", "m", "d", "k"), [(30, 20, 3, 3), (12, 40, 8, 1), (6, 5, 2, 4), (25, 25, 40, 2)])
def test_precision_and_recall_are_their_definition_in_loops(n, m, d, k):
    real, fake = cloud(n, d), 1.2 * cloud(m, d, 1) + 0.2
    found = precision_recall(real, fake, k)
    assert found == in_loops(real, fake, k) and found[::-1] == precision_recall(fake, real, k)


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [4.0, 0.0], [5.0, 0.0]])
    fake = torch.tensor([[0.5, 0.0], [0.4, 0.6], [2.5, 3.0]])
    assert precision_recall(real, fake, 1) == (2 / 3, 3 / 5)
    assert precision_recall(real, real + 100) == (0, 0)
    assert precision_recall(torch.arange(4.0)[:, None], torch.tensor([[-1.5], [-1.0], [4.5], [6.5]]), 1) == (0.25, 0.25)


def test_a_point_on_the_edge_is_inside_and_doubles_have_balls_of_no_size():
    real = torch.tensor([[0.0], [0.0], [0.0], [0.0], [10.0], [11.0], [12.0], [13.0]])
    assert precision_recall(real, torch.tensor([[0.0], [0.1], [0.2], [0.3], [7.0], [6.9]]))[0] == 2 / 6


def test_precision_and_recall_are_those_of_torch_fidelity():
    theirs = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = cloud(300, 10), 1.1 * cloud(250, 10, 1)
    assert precision_recall(real, fake) == pytest.approx(theirs.calculate_precision_recall_full(fake, real), abs=1e-6)


def test_a_missing_mode_costs_recall_and_noise_costs_precision():
    real = cloud(400, 4) + 20 * (torch.arange(400) % 2)[:, None]
    other = cloud(400, 4, 1) + 20 * (torch.arange(400) % 2)[:, None]
    base, half = precision_recall(real, other), precision_recall(real, other[::2].repeat(2, 1)[:200])
    assert half[1] < 0.6 * base[1] and half[0] > base[0] - 0.1
    assert precision_recall(real, other + 3 * cloud(400, 4, 2, mix=False))[0] < 0.5 * base[0]


# --- Inception score ---


@pytest.mark.parametrize(("n", "k", "splits"), [(40, 5, 4), (30, 48, 1), (47, 7, 10)])
def test_inception_score_is_that_of_torch_fidelity(n, k, splits):
    theirs = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * cloud(n, k)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))  # ours, so that the parts are the same
    found = theirs.isc_features_to_metric(logits[order], splits, shuffle=False)
    ours = inception_score(logits.softmax(1), splits)
    assert math.isclose(ours.value, found["inception_score_mean"], rel_tol=1e-9)
    assert math.isclose(ours.error, found["inception_score_std"], rel_tol=1e-9, abs_tol=1e-9)


def test_inception_score_is_that_of_torchmetrics():
    image = pytest.importorskip("torchmetrics.image")
    logits = 3 * cloud(60, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = image.InceptionScore(AsTheyAre(9), splits=1)
    metric.update(logits)
    assert math.isclose(inception_score(logits.softmax(1), 1).value, metric.compute()[0].item(), rel_tol=1e-6)


def test_inception_score_at_its_ends():
    assert inception_score(torch.eye(6), 1).value == pytest.approx(6)  # with zeros, whose logarithm is not taken
    assert inception_score(torch.full((20, 4), 0.25)).value == 1
    assert inception_score(torch.eye(3)[:1].repeat(9, 1), 3).value == 1


@pytest.mark.parametrize(
    "wrong", [torch.eye(4) - 0.1, 2 * torch.eye(4), cloud(4, 4), torch.tensor([[1.5, -0.5], [0.5, 0.5]])]
)
def test_what_are_no_probabilities_is_refused(wrong):
    with pytest.raises(LDMError, match="sum 1"):
        inception_score(wrong, 1)


# --- Refusals ---


@pytest.mark.parametrize("distance", PAIRWISE)
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (torch.zeros(5, 3), "x has 4"),
        (torch.zeros(0, 4), "at least"),
        (torch.full((9, 4), math.nan), "finite"),
        (torch.full((9, 4), -math.inf), "finite"),
        (torch.full((9, 4), 1e200, dtype=torch.float64), "finite"),
        (torch.full((9, 4), 1.1e24, dtype=torch.float64), "finite"),
        (torch.zeros(9, 4).to_sparse(), "dense"),
        (torch.zeros(9, 4, device="meta"), "meta device"),
        (torch.zeros(9, 4, dtype=torch.int64), "floating-point"),
        (torch.zeros(9, 4, dtype=torch.complex64), "floating-point"),
        (torch.zeros(9), "shape"),
        (torch.zeros(9, 0), "shape"),
    ],
)
def test_what_cannot_be_compared_is_refused(distance, wrong, told):
    """Past the signature, which is checked in the tests only."""
    distance = getattr(distance, "__wrapped__", distance)
    told = told.replace("x has", "real has") if distance.__name__ == "precision_recall" else told
    with pytest.raises(LDMError, match=told):
        distance(cloud(9, 4), wrong)


@pytest.mark.parametrize(("distance", "least"), [(frechet_distance, 2), (kernel_distance, 2), (precision_recall, 4)])
def test_too_few_vectors_are_refused(distance, least):
    distance(cloud(least, 3), cloud(9, 3))
    with pytest.raises(LDMError, match=f"at least {least}"):
        distance(cloud(9, 3), cloud(least - 1, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: kernel_distance(x, x[:5], subsets=0),
        lambda x: kernel_distance(x, x, subset_size=1),
        lambda x: kernel_distance(x, x, seed=-1),
        lambda x: precision_recall(x, x, 0),
        lambda x: precision_recall(x, x, 9),
        lambda x: nearest_neighbours(x, x, 10),
        lambda x: inception_score(x.softmax(1)),
        lambda x: inception_score(x.softmax(1), splits=0),
    ],
)
def test_counts_that_cannot_be_are_refused(call):
    with pytest.raises(LDMError):
        call(cloud(9, 4))


def test_numpy_and_torch_agree_on_the_covariance():
    x = cloud(30, 5)
    assert math.isclose(frechet_distance(x, 0 * x), x.mean(0).square().sum() + np.trace(np.cov(x.T)), rel_tol=1e-9)
