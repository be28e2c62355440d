"""PSNR, SSIM, LPIPS and ToyFeatures against their definitions, against torchmetrics and lpips, and at their edges."""

import importlib.util
import math
import subprocess
import sys
import warnings
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn

from ldm_edu.data.toy.scenes import Scene, Thing
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.evaluation import backbones
from ldm_edu.evaluation.backbones import BACKBONES, backbone_weights, linear_weights
from ldm_edu.evaluation.features import THINGS, ToyFeatures, thing_targets
from ldm_edu.evaluation.metrics import LPIPS, gaussian_window, layer_distances, psnr, ssim, ssim_map, unit
from ldm_edu.files import load_tensors, save_tensors

# --- PSNR ---


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
    with pytest.raises(LDMError, match=r"\(2, 3, 8, 8\)"):
        psnr(pictures(2, 3, 8, 8), pictures(*other))


def test_bytes_are_refused():
    x = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(Exception):  # by the annotation where shapes are checked, else by LDMError
        psnr(x, x)


# --- SSIM ---


def damaged(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Another contrast, another brightness, some noise."""
    generator = torch.Generator().manual_seed(seed)
    contrast, light, strength = torch.rand(3, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    return (x * (0.3 + contrast) + 0.4 * (light - 0.5) + 0.4 * strength * noise).clamp(-1, 1)


def window_by_window(x: torch.Tensor, y: torch.Tensor) -> float:
    """SSIM of two planes (h, w) by its definition: mirrored border, weighted moments of every window, in float64."""
    planes = nn.functional.pad(torch.stack([x, y])[:, None].double() / 2 + 0.5, [5] * 4, mode="reflect")[:, 0]
    g = gaussian_window().double()
    w = torch.outer(g, g) / torch.outer(g, g).sum()
    total = 0.0
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            a, b = planes[:, i : i + 11, j : j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
            total += (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    return float(total / x.numel())


@pytest.mark.parametrize("seed", range(3))
def test_ssim_definition(seed):
    x = pictures(1, 2, 12, 9, seed=seed)
    y = damaged(x, seed)
    expected = sum(window_by_window(x[0, k], y[0, k]) for k in range(2)) / 2
    assert ssim(x, y).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_ssim_equals_torchmetrics(seed):
    image = pytest.importorskip("torchmetrics.functional.image")
    generator = torch.Generator().manual_seed(seed)
    b, c = torch.randint(1, 5, (2,), generator=generator).tolist()
    h, w = torch.randint(6, 70, (2,), generator=generator).tolist()
    smooth = nn.functional.interpolate(pictures(b, c, 4, 4, seed=seed), size=(h, w), mode="bilinear")
    x = smooth if seed % 2 else pictures(b, c, h, w, seed=seed)
    y = damaged(x, seed)
    theirs = image.structural_similarity_index_measure(
        y.double() / 2 + 0.5, x.double() / 2 + 0.5, data_range=1.0, reduction="none"
    )
    torch.testing.assert_close(ssim(y, x).double(), theirs.reshape(b), atol=2e-5, rtol=0)


def test_ssim_is_one_exactly_for_identical_pictures_and_never_more():
    x = pictures(3, 3, 20, 20)
    assert torch.equal(ssim(x, x), torch.ones(3))
    assert torch.equal(ssim(0 * x, 0 * x), torch.ones(3))
    assert (ssim_map(x, damaged(x, 0)) <= 1).all() and ssim(x, -x).max() < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("left, right", [(1.0, 1.0), (1.0, 0.9921875), (0.99609375, 0.98828125), (1.0, -1.0)])
def test_ssim_of_flat_bright_pictures_is_that_of_their_two_values(left, right, dtype):
    """Every variance is 0, so only the means are left; sums of squares in float32 would leave noise of 1e-4 here."""
    a, b, c1 = left / 2 + 0.5, right / 2 + 0.5, 0.01**2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    x, y = (torch.full((2, 3, 32, 40), value, dtype=dtype) for value in (left, right))
    found = ssim(x, y)
    assert (found.double() - expected).abs().max() < 1e-6 and (found <= 1).all()


def test_ssim_symmetric_one_by_one_and_the_same_in_a_mirror():
    x = pictures(4, 3, 16, 24)
    y = damaged(x, 1)
    torch.testing.assert_close(ssim(x, y), ssim(y, x))
    torch.testing.assert_close(ssim(x, y), torch.cat([ssim(x[i : i + 1], y[i : i + 1]) for i in range(4)]))
    torch.testing.assert_close(ssim(x.flip(3), y.flip(3)), ssim(x, y))
    torch.testing.assert_close(ssim(x.mT, y.mT), ssim(x, y))


def test_ssim_takes_zero_for_middle_grey_not_for_black():
    light = torch.full((1, 3, 16, 16), 0.04)
    assert ssim(light, -light) > 0.99


def test_ssim_of_half_precision_and_of_nan():
    x = pictures(2, 3, 16, 16)
    y = damaged(x, 2)
    torch.testing.assert_close(ssim(x.half(), y.half()), ssim(x.half().float(), y.half().float()))
    y[0, 0, 0, 0] = math.nan
    assert ssim(x, y)[0].isnan() and ssim(x, y)[1].isfinite()


def test_ssim_has_a_gradient_everywhere():
    for x in (pictures(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)):
        y = x.clone().requires_grad_()
        ssim(x, y).sum().backward()
        assert y.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3, 5, 16), (1, 3, 16, 5)])
def test_ssim_refuses_pictures_smaller_than_half_a_window(shape):
    with pytest.raises(LDMError, match="at least 6 pixels"):
        ssim(pictures(*shape), pictures(*shape))
    assert ssim(pictures(1, 3, 6, 6), pictures(1, 3, 6, 6)).item() == 1


@pytest.mark.parametrize("other", [(1, 3, 8, 8), (2, 3, 8, 9), (2, 1, 8, 8), (3, 8, 8)])
def test_ssim_refuses_shapes_that_do_not_fit(other):
    with pytest.raises(LDMError, match=r"\(2, 3, 8, 8\)"):
        ssim(pictures(2, 3, 8, 8), pictures(*other))


# --- Distances between features ---


def test_unit_has_length_one_and_a_finite_gradient_at_zero():
    x = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = 0
    x.requires_grad_()
    length = unit(x).norm(dim=1)
    assert length[0, 0, 0] == 0
    torch.testing.assert_close(length.flatten()[1:], torch.ones(17))
    unit(x.relu()).sum().backward()
    assert x.grad.isfinite().all()


def test_layer_distances_want_as_many_layers_on_both_sides():
    x = torch.ones(1, 2, 3, 3)
    with pytest.raises(ValueError):
        layer_distances([x, x], [x])
    with pytest.raises(ValueError):
        layer_distances([x, x], [x, x], [torch.ones(2)])


# --- LPIPS ---


def random_backbone(net: str, folder: Path, half: bool = False) -> Path:
    """A weights_dir with a backbone of random numbers; scaled so that the features do not fade out on the way."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        layers = BACKBONES[net].build()
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        tensors = {f"features.{name}": value for name, value in layers.state_dict().items()}
        save_tensors(tensors, folder / BACKBONES[net].file, half)
    return folder


def package(net: str, weights_dir: Path) -> nn.Module:
    """`lpips.LPIPS` of the lpips package, with the backbone of `weights_dir`."""
    lpips = pytest.importorskip("lpips")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # of torchvision, about an argument that lpips still uses
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    tensors = backbone_weights(net, weights_dir, download=False)
    for number in range(1, 6):
        for name, layer in getattr(theirs.net, f"slice{number}").named_children():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = tensors[f"features.{name}.weight"].float()
                layer.bias.data = tensors[f"features.{name}.bias"].float()
    return theirs.eval()


def assert_equal_to_the_package(net: str, weights_dir: Path) -> None:
    """Values and gradients on random pairs of random shapes.

    In float64: a sum in another order may switch a ReLU or choose another pixel of a max-pooling, and a gradient jumps
    there. In float32 this happens on some processors. For the same reason both get the same digits of the constants.
    """
    ours, theirs = LPIPS(net, weights_dir, download=False).double(), package(net, weights_dir).double()
    for name in ("shift", "scale"):
        mine, other = getattr(ours, name), getattr(theirs.scaling_layer, name)
        torch.testing.assert_close(mine, other[0], rtol=1e-6, atol=1e-7)
        other.copy_(mine)
    for seed, (b, h, w) in enumerate([(2, 64, 64), (1, 35, 80), (3, 97, 50)]):
        x = pictures(b, 3, h, w, seed=seed)
        y = damaged(x, seed) if seed else pictures(b, 3, h, w, seed=99)
        x, y = x.double(), y.double()
        values, grads = [], []
        for metric in (ours, theirs):
            guess = y.clone().requires_grad_()
            value = metric(guess, x).flatten()
            value.sum().backward()
            values.append(value.detach())
            grads.append(guess.grad)
        torch.testing.assert_close(*values, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6 * grads[1].abs().max().item())
        assert values[0].min() > 1e-3


@pytest.mark.parametrize("net", BACKBONES)
def test_lpips_equals_the_package_with_a_random_backbone(net, tmp_path):
    assert_equal_to_the_package(net, random_backbone(net, tmp_path))


@pytest.mark.parametrize("net", BACKBONES)
def test_lpips_equals_the_package_with_the_published_backbone(net, lpips_weights):
    assert_equal_to_the_package(net, lpips_weights)


def test_lpips_sees_what_the_eye_sees_with_the_published_backbone(lpips_weights):
    from ldm_edu.data.toy.scenes import render

    x = render([Scene((Thing("sphere", "red", "large", 0.0, 0.0),))])
    blurred = nn.functional.avg_pool2d(nn.functional.pad(x, [2] * 4, mode="replicate"), 5, stride=1)
    metric = LPIPS("alex", lpips_weights, download=False)
    assert psnr(x, blurred) > psnr(x, x.roll(1, 3)) and metric(x, blurred) > 4 * metric(x, x.roll(1, 3))


@pytest.fixture(scope="module")
def alex(tmp_path_factory) -> LPIPS:
    """LPIPS through a random AlexNet."""
    return LPIPS("alex", random_backbone("alex", tmp_path_factory.mktemp("weights")), download=False)


def test_lpips_is_zero_for_identical_pictures_symmetric_and_one_by_one(alex):
    x, y = pictures(3, 3, 48, 40), pictures(3, 3, 48, 40, seed=1)
    assert torch.equal(alex(x, x), torch.zeros(3)) and torch.equal(alex(x, y), alex.distance(x, y))
    torch.testing.assert_close(alex(x, y), alex(y, x))
    torch.testing.assert_close(alex(x, y), torch.cat([alex(x[i : i + 1], y[i : i + 1]) for i in range(3)]))


def test_lpips_learns_nothing_and_leaves_the_random_stream_alone(tmp_path):
    folder = random_backbone("alex", tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    metric = LPIPS("alex", folder, download=False)
    assert torch.equal(torch.rand(3), expected)
    assert not metric.training and not any(p.requires_grad for p in metric.parameters())
    x, y = pictures(1, 3, 40, 40), pictures(1, 3, 40, 40, seed=1)
    assert torch.equal(metric.train()(x, y), metric.eval()(x, y))


def test_lpips_gradient_is_finite_where_features_are_all_zero(tmp_path):
    silent = {
        name: torch.full_like(value, -1.0) if name.endswith("bias") else 0 * value
        for name, value in backbone_weights("alex", random_backbone("alex", tmp_path)).items()
    }
    save_tensors(silent, tmp_path / BACKBONES["alex"].file)
    guess = pictures(1, 3, 40, 40).requires_grad_()
    LPIPS("alex", tmp_path)(guess, pictures(1, 3, 40, 40, seed=1)).sum().backward()
    assert torch.equal(guess.grad, torch.zeros_like(guess))


@pytest.mark.parametrize("net", BACKBONES)
def test_lpips_refuses_pictures_that_are_too_small(net, tmp_path):
    metric, least = LPIPS(net, random_backbone(net, tmp_path), download=False), BACKBONES[net].smallest
    assert metric(pictures(1, 3, least, least), pictures(1, 3, least, least, seed=1)).isfinite().all()
    with pytest.raises(LDMError, match=f"at least {least} pixels"):
        metric(pictures(1, 3, 64, least - 1), pictures(1, 3, 64, least - 1))


def test_lpips_refuses_shapes_that_do_not_fit(alex):
    with pytest.raises(LDMError, match="one shape"):
        alex(pictures(2, 3, 40, 40), pictures(1, 3, 40, 40))


def test_networks_refuse_grey_pictures(alex, toy):
    for distance in (alex, toy.distance):
        with pytest.raises(Exception):  # by the annotation where shapes are checked, else by LDMError
            distance(pictures(1, 1, 40, 40), pictures(1, 1, 40, 40))


def test_lpips_knows_its_networks():
    with pytest.raises(LDMError, match="alex or vgg, not 'squeeze'"):
        LPIPS("squeeze")


# --- Where the weights come from ---


@pytest.fixture
def no_cache(tmp_path, monkeypatch) -> Path:
    """torchvision has never downloaded anything; returns where it would put it."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_channel_weights_are_non_negative_and_fit_their_layers():
    for net, backbone in BACKBONES.items():
        widths = [backbone.build()[i - 1].out_channels for i in backbone.taps]
        weights = linear_weights(net)
        assert [len(w) for w in weights] == widths and all((w >= 0).all() for w in weights)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LDMError, match="pip install lpips"):
        linear_weights("alex")


def test_damaged_channel_weights_are_named(monkeypatch, tmp_path):
    (tmp_path / "weights" / "v0.1").mkdir(parents=True)
    (tmp_path / "weights" / "v0.1" / "alex.pth").write_bytes(b"not a pickle")
    spec = importlib.util.spec_from_file_location("lpips", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    for net in BACKBONES:  # one is damaged, the other missing
        with pytest.raises(LDMError, match=rf"{net}\.pth"):
            linear_weights(net)


def test_weights_dir_comes_before_torchvision(tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError("torchvision was asked")

    monkeypatch.setattr(backbones, "_from_torchvision", never)
    folder = random_backbone("alex", tmp_path)
    assert backbone_weights("alex", folder).keys() == backbone_weights("alex", str(folder)).keys()


@pytest.mark.parametrize("download", [True, False])
def test_what_torchvision_has_downloaded_is_found(download, no_cache, tmp_path):
    from torchvision.models import AlexNet_Weights

    weights = backbone_weights("alex", random_backbone("alex", tmp_path))
    url = AlexNet_Weights.IMAGENET1K_V1.url
    no_cache.mkdir(parents=True)
    torch.save(weights | {"classifier.1.weight": torch.zeros(2, 2)}, no_cache / url.rsplit("/", 1)[1])

    found = LPIPS("alex", tmp_path / "elsewhere", download=download)
    x, y = pictures(1, 3, 40, 40), pictures(1, 3, 40, 40, seed=1)
    torch.testing.assert_close(found(x, y), LPIPS("alex", tmp_path)(x, y))


@pytest.mark.parametrize("weights_dir", [True, False])
def test_without_weights_the_error_names_both_places(weights_dir, no_cache, tmp_path):
    with pytest.raises(LDMError) as caught:
        LPIPS("vgg", tmp_path if weights_dir else None, download=False)
    message = str(caught.value)
    url = "https://download.pytorch.org/models/vgg16"
    for part in ("vgg16_features.safetensors", url, str(no_cache), "weights_dir"):
        assert part in message


@pytest.mark.parametrize("failure", [URLError("no network"), RuntimeError("invalid hash"), ConnectionResetError("cut")])
def test_a_download_that_fails_is_told_with_its_reason(failure, no_cache, tmp_path, monkeypatch):
    from torchvision.models import _api

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(_api, "load_state_dict_from_url", fail)
    with pytest.raises(LDMError, match="alexnet_features.safetensors") as caught:
        LPIPS("alex", tmp_path)
    assert str(failure) in str(caught.value)


def test_a_damaged_file_in_weights_dir_is_named_and_not_passed_over(tmp_path):
    path = random_backbone("alex", tmp_path) / BACKBONES["alex"].file
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="alexnet_features.safetensors"):
        LPIPS("alex", tmp_path)


def test_a_backbone_under_the_wrong_name_is_refused(tmp_path):
    random_backbone("vgg", tmp_path)
    (tmp_path / BACKBONES["vgg"].file).rename(tmp_path / BACKBONES["alex"].file)
    with pytest.raises(CheckpointError, match="does not hold 'alex'"):
        LPIPS("alex", tmp_path)


def test_half_precision_weights_become_single(tmp_path):
    half = LPIPS("alex", random_backbone("alex", tmp_path, half=True))
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_importing_the_room_loads_neither_lpips_nor_torchvision(root):
    heavy = ["lpips", "torchvision", "torchmetrics", "transformers", "matplotlib.pyplot"]
    code = f"import sys, ldm_edu.evaluation; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- ToyFeatures ---


@pytest.fixture(scope="module")
def toy() -> ToyFeatures:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ToyFeatures().eval()


@pytest.mark.parametrize("h, w", [(64, 64), (16, 16), (33, 50)])
def test_toy_features_shapes(toy, h, w):
    x = pictures(2, 3, h, w)
    sides = [(math.ceil(h / f), math.ceil(w / f)) for f in (2, 4, 8, 16)]
    assert [tuple(f.shape) for f in toy.features(x)] == [(2, c, *side) for c, side in zip((32, 64, 96, 128), sides)]
    assert toy.embed(x).shape == (2, 128) and toy.distance(x, x).tolist() == [0, 0]
    assert {name: tuple(logits.shape) for name, logits in toy(x).items()} == {"things": (2, 48), "attributes": (2, 16)}


def test_toy_features_are_small(toy):
    assert 0.25e6 < sum(p.numel() for p in toy.parameters()) < 0.35e6


def test_toy_distance_is_symmetric_bounded_and_one_by_one(toy):
    x, y = pictures(3, 3, 32, 32), pictures(3, 3, 32, 32, seed=1)
    d = toy.distance(x, y)
    assert (d > 0).all() and (d <= 4).all()
    torch.testing.assert_close(toy.distance(y, x), d)
    torch.testing.assert_close(torch.cat([toy.distance(x[i : i + 1], y[i : i + 1]) for i in range(3)]), d)


def test_toy_distance_has_a_gradient_that_leads_to_the_picture(toy):
    x = pictures(1, 3, 32, 32)
    y = pictures(1, 3, 32, 32, seed=1).requires_grad_()
    toy.distance(x, y).sum().backward()
    with torch.no_grad():
        assert toy.distance(x, y - 0.1 * y.grad / y.grad.norm()) < toy.distance(x, y)


def test_toy_features_refuse_what_does_not_fit(toy):
    with pytest.raises(LDMError, match="at least 16 pixels"):
        toy.distance(pictures(1, 3, 15, 32), pictures(1, 3, 15, 32))
    with pytest.raises(LDMError, match="one shape"):
        toy.distance(pictures(1, 3, 32, 32), pictures(2, 3, 32, 32))
    for channels in ((), (12,), (0,)):
        with pytest.raises(LDMError, match="multiples of 8"):
            ToyFeatures(channels)


def test_toy_features_are_saved_and_made_again(tmp_path):
    made = ToyFeatures(channels=(8, 16), attributes=3).eval()
    made.save_pretrained(tmp_path / "toy")
    again = ToyFeatures.from_pretrained(tmp_path / "toy")
    x = pictures(2, 3, 32, 32)
    assert again.config == made.config and torch.equal(again.embed(x), made.embed(x))


def test_thing_targets_name_what_stands_there():
    things = Thing("cube", "blue", "large", 0.0, 0.0), Thing("sphere", "red", "small", 1.0, 1.0)
    targets = thing_targets([Scene(things), Scene(()), Scene(things[:1])])
    named = [[THINGS[i] for i in row.nonzero().flatten()] for row in targets]
    assert named == [[("small", "red", "sphere"), ("large", "blue", "cube")], [], [("large", "blue", "cube")]]
    assert len(set(THINGS)) == len(THINGS) == targets.shape[1] == 48


# --- Files of backbones that cannot be used ---


def spoilt(net: str, folder: Path, change) -> Path:
    """The file of a random backbone, one tensor of which is changed."""
    path = random_backbone(net, folder) / BACKBONES[net].file
    tensors = load_tensors(path)
    save_tensors(tensors | {"features.0.weight": change(tensors["features.0.weight"])}, path)
    return folder


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda x: x[:, :2].contiguous(),
            r"'0\.weight' has the shape \(64, 2, 11, 11\), should have \(64, 3, 11, 11\)",
        ),
        (lambda x: x.to(torch.int8), r"'0\.weight' holds torch\.int8"),
        (lambda x: x * float("nan"), "holds numbers that are not finite"),
    ],
)
def test_a_backbone_of_other_numbers_is_named(tmp_path, change, said):
    with pytest.raises(CheckpointError, match=f"alexnet_features.safetensors does not hold 'alex'.*{said}"):
        backbones.load_backbone("alex", spoilt("alex", tmp_path, change))


def test_a_backbone_without_a_tensor_is_named(tmp_path):
    save_tensors({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / BACKBONES["alex"].file)
    with pytest.raises(CheckpointError, match=r"does not hold 'alex'.*'0\.bias' is missing"):
        backbones.load_backbone("alex", tmp_path)


def test_a_file_in_weights_dir_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "_from_torchvision", lambda *_: pytest.fail("torchvision was asked"))
    file = tmp_path / BACKBONES["alex"].file
    file.symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="alexnet_features.safetensors is a link that leads nowhere"):
        backbone_weights("alex", tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: a folder stands in its place"):
        backbone_weights("alex", tmp_path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: no permission"):
        backbone_weights("alex", tmp_path)


def test_a_backbone_that_torchvision_has_and_that_is_a_giant_takes_no_memory(no_cache, tmp_path):
    from torchvision.models import AlexNet_Weights

    no_cache.mkdir(parents=True)
    weights = backbone_weights("alex", random_backbone("alex", tmp_path))
    weights["features.0.weight"] = torch.zeros(1).expand(10**9, 3, 11, 11)
    torch.save(weights, no_cache / AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1])
    with pytest.raises(CheckpointError, match=r"'0\.weight' has the shape \(1000000000, 3, 11, 11\)"):
        backbones.load_backbone("alex", download=False)


@pytest.mark.parametrize("net", ["", "resnet", None, 3, ["alex"]])
def test_a_backbone_that_is_not_known(net):
    for fn in (backbone_weights, linear_weights, backbones.load_backbone):
        with pytest.raises((LDMError, TypeError), match="net"):  # TypeError: from beartype, where types are checked
            fn(net)


@pytest.fixture
def lpips_folder(tmp_path, monkeypatch) -> Path:
    """Where the channel weights of the lpips package are looked for."""
    origin = tmp_path / "lpips/__init__.py"
    (origin.parent / "weights/v0.1").mkdir(parents=True)
    spec = importlib.util.spec_from_file_location("lpips", origin)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return origin.parent / "weights/v0.1"


def test_channel_weights_that_cannot_be_used_are_named(lpips_folder):
    path, widths = lpips_folder / "alex.pth", (64, 192, 384, 256, 256)
    right = {f"lin{i}.model.1.weight": torch.ones(1, c, 1, 1) for i, c in enumerate(widths)}
    with pytest.raises(LDMError, match="alex.pth is missing: install lpips again"):
        linear_weights("alex")
    torch.save(right, path)
    assert [len(weight) for weight in linear_weights("alex")] == list(widths)
    name = "lin1.model.1.weight"
    for wrong, said in (
        ({name: torch.ones(1, 64, 1, 1)}, r"\(1, 64, 1, 1\) should be \(1, 192, 1, 1\)"),
        ({name: torch.ones(1).expand(1, 10**9, 1, 1)}, "should be"),
        ({name: torch.full((1, 192, 1, 1), float("nan"))}, "of finite numbers"),
        ({name: [1.0]}, "no attribute 'shape'"),
    ):
        torch.save(right | wrong, path)
        with pytest.raises(LDMError, match=f"alex.pth does not hold the channel weights of LPIPS .*{said}"):
            linear_weights("alex")
    for content in (b"", b"hello", b"cos\nsystem\n(S'true'\ntR."):
        path.write_bytes(content)
        with pytest.raises(LDMError, match="alex.pth does not hold the channel weights of LPIPS"):
            linear_weights("alex")
    path.unlink()
    path.mkdir()
    with pytest.raises(LDMError, match="alex.pth cannot be read: a folder stands in its place"):
        linear_weights("alex")


@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("metric", ["psnr", "ssim", "LPIPS"])
def test_bytes_as_floats_are_refused(metric, side, alex):
    measure = {"psnr": psnr, "ssim": ssim, "LPIPS": alex}[metric]
    x = {name: torch.zeros(2, 3, 32, 32) for name in ("x", "y")}
    x[side] = torch.full_like(x[side], 255.0)
    with pytest.raises(LDMError, match=rf"{metric}: {side} should be in \[-1, 1\], but holds values from 255 to 255"):
        measure(x["x"], x["y"])


@pytest.mark.parametrize("shape", [(2, 0), (2, 3, 0, 8)])
def test_pictures_without_pixels_are_refused(shape):
    with pytest.raises(LDMError, match="with pixels"):
        psnr(torch.zeros(shape), torch.zeros(shape))


def test_a_backbone_is_loaded_as_it_is_whatever_the_caller_has_set(tmp_path, monkeypatch):
    weights = {f"features.{name}": x for name, x in backbones._alexnet().state_dict().items()}
    name = next(iter(weights))
    monkeypatch.setattr(backbones, "backbone_weights", lambda *_: weights)
    for surroundings in (torch.device("meta"), torch.inference_mode()):
        with surroundings:
            loaded = backbones.load_backbone("alex")
        assert all(x.device.type == "cpu" and not x.is_inference() for x in loaded.parameters())
    weights[name] = torch.full_like(weights[name], 1e300, dtype=torch.float64)
    with pytest.raises(CheckpointError, match="too large for torch.float32"):
        backbones.load_backbone("alex")
