"""The networks that LPIPS looks through, and where their weights are found."""

import importlib.util
import pickle
import textwrap
import torch
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from jaxtyping import Float
from pathlib import Path
from torch import Tensor, nn
from ldm_edu.checkpoints import load_tensors
from ldm_edu.errors import CheckpointError, LDMError

def _alexnet() -> nn.Sequential:
    "The convolutions of AlexNet, as torchvision numbers them."
    conv, relu, pool = nn.Conv2d, nn.ReLU, nn.MaxPool2d
    return nn.Sequential(
        conv(3, 64, 11, stride=4, padding=2), relu(), pool(3, 2),
        conv(64, 192, 5, padding=2), relu(), pool(3, 2),
        conv(192, 384, 3, padding=1), relu(),
        conv(384, 256, 3, padding=1), relu(),
        conv(256, 256, 3, padding=1), relu(),
    )  # fmt: skip


def _vgg16() -> nn.Sequential:
    "The convolutions of VGG-16, as torchvision numbers them."
    layers, channels = [], 3
    for wider, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.ReLU()]
            channels = wider
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Backbone:
    "A network that LPIPS can look through."

    build: Callable[[], nn.Sequential]  # its convolutions
    heard: tuple[int, ...]  # after which of them LPIPS listens
    smallest: int  # pixels along a side that it needs
    file: str  # its weights in `weights_dir`
    torchvision: str  # its weights in torchvision.models


BACKBONES = {
    "alex": Backbone(_alexnet, (1, 4, 7, 9, 11), 31, "alexnet_features.safetensors", "AlexNet_Weights"),
    "vgg": Backbone(_vgg16, (3, 8, 15, 22, 29), 16, "vgg16_features.safetensors", "VGG16_Weights"),
}


def linear_weights(
    net: str,  # one of BACKBONES
) -> list[Float[Tensor, "_"]]:
    "LPIPS's non-negative weights of the channels, layer by layer, as the `lpips` package has them (version 0.1)."
    package = importlib.util.find_spec("lpips")
    if package is None:
        raise LDMError("LPIPS reads its channel weights from the package lpips: pip install lpips")
    path = Path(package.origin).with_name("weights") / "v0.1" / f"{net}.pth"
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return [tensors[f"lin{i}.model.1.weight"].flatten() for i in range(len(BACKBONES[net].heard))]
    except (OSError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise LDMError(f"{path} does not hold the channel weights of LPIPS: install lpips again") from error


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
        f"not be had ({textwrap.shorten(str(reason), 200)}). Put the first into weights_dir, "
        f"or the second into {Path(torch.hub.get_dir()) / 'checkpoints'}"
    )


def backbone_weights(
    net: str,  # one of BACKBONES
    weights_dir: str | Path | None = None,  # where its file may lie
    download: bool = True,  # whether torchvision may fetch it
) -> dict[str, Tensor]:
    "The weights of a backbone by torchvision's names: from `weights_dir`, else from torchvision, else LDMError."
    if weights_dir is not None and (path := Path(weights_dir) / BACKBONES[net].file).is_file():
        return load_tensors(path)
    try:
        return _from_torchvision(net, download)
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _not_found(net, weights_dir, error) from error


def _loaded(net: str, weights_dir: str | Path | None, download: bool) -> nn.Sequential:
    "A backbone with its weights."
    with torch.device("meta"):  # no numbers yet: they are about to be loaded
        layers = BACKBONES[net].build()
    found = backbone_weights(net, weights_dir, download)
    named = {name.removeprefix("features."): w.float() for name, w in found.items() if name.startswith("features.")}
    try:
        layers.load_state_dict(named, assign=True)
    except RuntimeError as error:
        file, reason = BACKBONES[net].file, textwrap.shorten(str(error), 200)
        raise CheckpointError(f"{file} does not hold '{net}' as torchvision has it: {reason}") from error
    return layers
