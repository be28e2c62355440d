"""PSNR against the definition, against torchmetrics and at its edges."""

import math

import pytest
import torch

from ldm_edu.metrics import MetricError, psnr


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 3, 17, 9), (2, 1, 64, 64), (3, 4, 2, 5, 6)])
def test_definition(shape):
    x, y = pictures(*shape), pictures(*shape, seed=1)
    expected = [20 * math.log10(2 / (a - b).double().square().mean().sqrt()) for a, b in zip(x, y)]
    torch.testing.assert_close(psnr(x, y), torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 3, 17, 9), (4, 1, 32, 32)])
def test_equals_torchmetrics(shape):
    image = pytest.importorskip("torchmetrics.functional.image")
    x, y = pictures(*shape), pictures(*shape, seed=1)
    theirs = image.peak_signal_noise_ratio(x, y, data_range=2.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(x, y), theirs)


def test_identical_pictures_are_infinitely_good_and_the_others_keep_their_value():
    x = pictures(3, 3, 8, 8)
    y = x.clone()
    y[1] += 0.2
    assert psnr(x, y)[[0, 2]].tolist() == [math.inf, math.inf]
    torch.testing.assert_close(psnr(x, y)[1], torch.tensor(20.0), atol=1e-4, rtol=0)


def test_symmetric_and_one_by_one():
    x, y = pictures(4, 3, 8, 8), pictures(4, 3, 8, 8, seed=1)
    torch.testing.assert_close(psnr(x, y), psnr(y, x))
    torch.testing.assert_close(psnr(x, y), torch.cat([psnr(x[i : i + 1], y[i : i + 1]) for i in range(4)]))


def test_half_precision_is_compared_in_full():
    x = pictures(2, 3, 64, 64)
    y = x + 1e-3
    expected = psnr(x.half().float(), y.half().float())
    torch.testing.assert_close(psnr(x.half(), y.half()), expected)
    x = x.bfloat16()
    torch.testing.assert_close(psnr(x, x + 1), torch.full((2,), 20 * math.log10(2)), atol=0.1, rtol=0)


def test_what_is_not_a_number_stays_visible():
    x = pictures(2, 3, 8, 8)
    y = x.clone()
    y[0, 0, 0, 0] = math.nan
    assert psnr(x, y)[0].isnan() and psnr(x, y)[1] == math.inf


@pytest.mark.parametrize("other", [(1, 3, 8, 8), (2, 3, 8, 9), (2, 1, 8, 8), (3, 8, 8)])
def test_shapes_that_do_not_fit_are_refused(other):
    with pytest.raises(MetricError, match=r"\(2, 3, 8, 8\)"):
        psnr(pictures(2, 3, 8, 8), pictures(*other))


def test_bytes_are_refused():
    x = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(Exception):  # by the annotation where shapes are checked, else by MetricError
        psnr(x, x)
