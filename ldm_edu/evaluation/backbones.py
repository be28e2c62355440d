"""The networks whose features LPIPS compares, and where their weights are found."""

import importlib.util
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm_edu.checkpoints import check_fit, plainly
from ldm_edu.checks import is_finite
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import brief, load_tensors, reading

__all__ = ["BACKBONES", "backbone_weights"]


def _alexnet() -> nn.Sequential:
    "The convolutions of AlexNet, as torchvision numbers them."
    layers = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for c_in, c_out in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def _vgg16() -> nn.Sequential:
    "The convolutions of VGG-16, as torchvision numbers them."
    layers = []
    c_in = 3
    for c_out, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU()]
            c_in = c_out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Backbone:
    "A network whose features LPIPS can compare."

    build: Callable[[], nn.Sequential]  # makes its convolutions
    taps: tuple[int, ...]  # the layers whose outputs LPIPS compares
    smallest: int  # pixels that an image needs along each side
    file: str  # name of its weights in `weights_dir`
    torchvision: str  # name of its weights in torchvision.models


BACKBONES = {
    "alex": Backbone(_alexnet, (1, 4, 7, 9, 11), 31, "alexnet_features.safetensors", "AlexNet_Weights"),
    "vgg": Backbone(_vgg16, (3, 8, 15, 22, 29), 16, "vgg16_features.safetensors", "VGG16_Weights"),
}


def _known(net: str) -> str:
    "`net` as it is; LDMError where it is none of BACKBONES."
    if not isinstance(net, str) or net not in BACKBONES:
        raise LDMError(f"net={net!r} should be one of {', '.join(map(repr, BACKBONES))}")
    return net


@plainly()
def linear_weights(
    net: str,  # one of BACKBONES
) -> list[Float[Tensor, "_"]]:
    "LPIPS's non-negative weights of the channels, layer by layer, as the `lpips` package has them (version 0.1)."
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise LDMError("LPIPS reads its channel weights from the package lpips: pip install lpips")
    path = Path(package.origin).with_name("weights") / "v0.1" / f"{_known(net)}.pth"
    with torch.device("meta"):
        layers = BACKBONES[net].build()
    with reading(path, LDMError, "file of weights", ": install lpips again"), open(path, "rb"):
        pass
    try:
        # `weights_only` refuses a pickle that holds anything but tensors and plain containers
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        found = [tensors[f"lin{i}.model.1.weight"] for i in range(len(BACKBONES[net].taps))]
        for weight, tap in zip(found, BACKBONES[net].taps):
            shape, wanted = tuple(weight.shape), (1, cast(nn.Conv2d, layers[tap - 1]).out_channels, 1, 1)
            if shape != wanted or not weight.is_floating_point() or not is_finite(weight.float()):
                raise LDMError(f"{shape} should be {wanted}, of finite numbers")
    except Exception as error:  # a damaged pickle can raise anything
        told = f"{path} does not hold the channel weights of LPIPS ({brief(error)}): install lpips again"
        raise LDMError(told) from error
    return [weight.float().flatten() for weight in found]


def _from_torchvision(net: str, download: bool) -> dict[str, Tensor]:
    "torchvision's weights of a backbone, from its cache or its download."
    from torchvision import models

    weights = getattr(models, BACKBONES[net].torchvision).IMAGENET1K_V1
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not download and not cached.is_file():
        raise FileNotFoundError(f"it is not in {cached.parent}, and download=False")
    return weights.get_state_dict(check_hash=True, weights_only=True)


def _not_found(net: str, weights_dir: str | Path | None, reason: Exception) -> LDMError:
    "The error that says which file is missing, why, and where it may be put."
    from torchvision import models

    url = getattr(models, BACKBONES[net].torchvision).IMAGENET1K_V1.url
    place = f"in weights_dir ({weights_dir})" if weights_dir is not None else "since no weights_dir was given"
    return LDMError(
        f"LPIPS has no weights for '{net}': {BACKBONES[net].file} was not found {place}, and torchvision's {url} could "
        f"not be loaded ({brief(reason)}). Put the first into weights_dir, "
        f"or the second into {Path(torch.hub.get_dir()) / 'checkpoints'}"
    )


def backbone_weights(
    net: str,  # one of BACKBONES
    weights_dir: str | Path | None = None,  # the folder that may hold its file
    download: bool = True,  # whether torchvision may download it
) -> dict[str, Tensor]:
    "The weights of a backbone by torchvision's names: from `weights_dir`, else from torchvision, else LDMError."
    folder = None if weights_dir is None else Path(os.path.expanduser(weights_dir))
    file = BACKBONES[_known(net)].file
    if folder is not None and os.path.isdir(folder):
        with reading(folder, kind="folder"):
            names = os.listdir(folder)
        if file in names:  # also where it cannot be read: then that is said, and nothing else is taken for it
            return load_tensors(folder / file)
    try:
        return _from_torchvision(net, download)
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _not_found(net, weights_dir, error) from error


@plainly()
def load_backbone(
    net: str,  # one of BACKBONES
    weights_dir: str | Path | None = None,  # the folder that may hold its file
    download: bool = True,  # whether torchvision may download it
) -> nn.Sequential:
    "The convolutions of a backbone with their weights; CheckpointError where the weights are of another network."
    with torch.device("meta"):  # shapes only: the weights come from a file
        layers = BACKBONES[_known(net)].build()
    found = backbone_weights(net, weights_dir, download)
    start = "features."
    named = {name.removeprefix(start): w for name, w in found.items() if name.startswith(start)}
    try:
        check_fit(layers, named)
    except CheckpointError as error:
        file = BACKBONES[net].file
        raise CheckpointError(f"{file} does not hold '{net}' as torchvision has it: {brief(error)}") from error
    layers.load_state_dict({name: w.float() for name, w in named.items()}, assign=True)
    return layers
