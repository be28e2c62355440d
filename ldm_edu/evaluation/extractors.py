"""Networks that turn images into feature vectors, for distances between sets of images; and the CLIP score."""

import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_edu.basics import progress
from ldm_edu.checks import check_captions, check_choice, check_count, check_images, like_weights, shown
from ldm_edu.conditioning.clip_text import reading_clip
from ldm_edu.devices import pick_device
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.evaluation.backbones import BACKBONES, load_backbone
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.reconstruction import Mean
from ldm_edu.files import brief, place
from ldm_edu.first_stage.published import read_tensors

__all__ = ["Extractor", "clip_score", "extract", "find_extractor"]


def as_bytes(images: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
    "Images in [-1, 1] as bytes, as a file would hold them: rounded, and clipped beyond the range."
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Extractor:
    """A network that turns images into feature vectors, one for each image.

    For another network, write a subclass that sets `name` and has `features`; `probabilities` where it is a classifier.
    """

    name: str = ""  # for a report
    size: int | None = None  # images are resized to this many pixels along each side; None: they stay as they are
    resize: str = "as they are"  # how, in words for a report
    smallest: int = 1  # pixels that an image needs along each side

    def __init__(self, network: nn.Module):
        self.network = network.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        "Where the weights lie; the CPU where there are none."
        weight = next(self.network.parameters(), None)
        return torch.device("cpu") if weight is None else weight.device

    def to(self, device: str | torch.device) -> "Extractor":
        "Move the network, in place."
        self.network.to(device)
        return self

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        "The feature vectors of prepared images."
        raise NotImplementedError

    def prepared(self, images: Any) -> Tensor:
        "Checked images as the network takes them; LDMError for anything but a batch of images in [-1, 1]."
        images = like_weights("images", check_images("images", images), self.network)
        if min(images.shape[2:]) < self.smallest:
            wanted = f"at least {self.smallest} pixels along each side"
            raise LDMError(f"images: {self.name} needs {wanted}, not {tuple(images.shape[2:])}")
        if self.size is None or images.shape[2:] == (self.size, self.size):
            return images
        return F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)

    @torch.no_grad()
    def __call__(
        self,
        images: Float[Tensor, "..."],  # (b, 3, h, w) in [-1, 1]
    ) -> Float[Tensor, "b d"]:
        "One feature vector for each image."
        return self.features(self.prepared(images))

    def probabilities(
        self,
        images: Float[Tensor, "..."],  # (b, 3, h, w) in [-1, 1]
    ) -> Float[Tensor, "b k"] | None:
        "The class probabilities of each image; None where the network is no classifier."
        return None


class ToyExtractor(Extractor):
    "The last level of `ToyFeatures`, mean over positions: 128 features. For toy images only."

    name = "ToyFeatures"
    smallest = ToyFeatures.smallest
    network: ToyFeatures

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        "The mean of the last level over positions."
        return self.network.embed(images)

    @torch.no_grad()
    def probabilities(self, images: Float[Tensor, "..."]) -> Float[Tensor, "b k"]:
        """Softmax over the 48 logits of kinds of things, such as "small red sphere".

        The network was trained to answer yes or no to each of them, since a scene has up to three: so this shares one
        among the things that it sees.
        """
        return self.network(self.prepared(images))["things"].softmax(1)


class VGGExtractor(Extractor):
    "The last convolution of VGG-16 after its ReLU, mean over positions: 512 features."

    name = "VGG16"
    smallest = BACKBONES["vgg"].smallest

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        "Channels brought to ImageNet's mean and deviation, as for LPIPS; then the mean of the last layer."
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return self.network(((images + 1) / 2 - mean) / std).mean((2, 3))


class InceptionExtractor(Extractor):
    """The Inception-v3 of published FIDs, as torch-fidelity has it: 2,048 features, 1,008 classes.

    Images are rounded to bytes before, since it takes nothing else, and torch-fidelity resizes them.
    """

    name = "Inception-v3"
    size = 299
    resize = "rounded to bytes; bilinear as in TensorFlow 1, not antialiased, to 299²"

    def prepared(self, images: Any) -> Tensor:
        "Checked images as bytes."
        return as_bytes(like_weights("images", check_images("images", images), self.network).float())

    def features(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        "The last pooling layer."
        return self.network(images)[0]

    @torch.no_grad()
    def probabilities(self, images: Float[Tensor, "..."]) -> Float[Tensor, "b k"]:
        "Softmax over the logits without their bias, as every published Inception score takes them."
        return self.network(self.prepared(images))[1].softmax(1)


# --- Finding the weights ---

INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")


def _toy(weights_dir: Path | None) -> Extractor:
    "The shipped network."
    return ToyExtractor(ToyFeatures.from_pretrained("toy-features"))


def _vgg16(weights_dir: Path | None) -> Extractor:
    "VGG-16 with the weights that LPIPS takes, which have to be at hand."
    try:
        return VGGExtractor(load_backbone("vgg", weights_dir, download=False))
    except CheckpointError:
        raise
    except LDMError as error:
        raise LDMError(f"vgg16 takes the same file of weights as LPIPS: {error}") from error


def _their_inception() -> Any:
    "torch-fidelity's module with Inception-v3; LDMError where it is not installed."
    try:
        from torch_fidelity import feature_extractor_inceptionv3
    except ImportError as error:
        told = "inception: the network comes from the package torch-fidelity"
        raise LDMError(f"{told}, which cannot be imported ({brief(error)}): pip install torch-fidelity") from error
    return feature_extractor_inceptionv3


def _inception_tensors(path: Path) -> dict[str, Tensor]:
    "The weights of Inception-v3, with the counters of BatchNorm, which some files lack and nothing reads."
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: '{name}' holds numbers that are not finite")
    norms = [name.removesuffix("running_mean") for name in tensors if name.endswith(".bn.running_mean")]
    return {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms} | tensors


def _inception(weights_dir: Path | None) -> Extractor:
    "torch-fidelity's Inception-v3 with its file of weights, read without running what a pickle may hold."
    theirs = _their_inception()
    found = [path for file in INCEPTION_FILES if weights_dir and (path := weights_dir / file).is_file()]
    if not found:
        where = f"in weights_dir ({weights_dir})" if weights_dir else "since no weights_dir was given"
        raise LDMError(
            f"inception: {' or '.join(INCEPTION_FILES)} was not found {where}. "
            f"Put the first there from {theirs.URL_INCEPTION_V3}"
        )
    # torch-fidelity would unpickle the file as it is: so it is given the checked tensors, in a file in memory
    checked = io.BytesIO()
    torch.save(_inception_tensors(found[0]), checked)
    checked.seek(0)
    layers = ["2048", "logits_unbiased"]
    try:
        with torch.random.fork_rng(devices=[]):  # it draws random weights first
            network = theirs.FeatureExtractorInceptionV3(
                "inception-v3-compat", layers, feature_extractor_weights_path=checked
            )
    except RuntimeError as error:
        raise CheckpointError(f"{found[0]} does not hold the weights of Inception-v3: {brief(error)}") from error
    return InceptionExtractor(network)


EXTRACTORS = {"toy-features": _toy, "vgg16": _vgg16, "inception": _inception}


def find_extractor(
    name: str,  # one of EXTRACTORS: "toy-features" (shipped, toy images only), "vgg16" or "inception"
    weights_dir: str | Path | None = None,  # the folder that holds the file of weights of the last two
    device: str | torch.device | None = None,  # None: the CPU
) -> Extractor:
    "The extractor of that name; LDMError lists the names, or says which file is missing and where it can be had."
    make = EXTRACTORS[check_choice("name", name, EXTRACTORS)]
    where = pick_device("cpu" if device is None else str(device))
    return make(None if weights_dir is None else place(weights_dir)).to(where)


# --- Features of many images ---


def _batches(images: Any) -> Iterator[Tensor]:
    "Batches (b, 3, h, w) of a tensor, or of an iterable of images and batches."
    if isinstance(images, Tensor):
        yield images
        return
    if not isinstance(images, Iterable) or isinstance(images, str | bytes | dict):
        raise LDMError(f"images should be a tensor (n, 3, h, w) or an iterable of such, not {shown(images)}")
    for image in images:
        yield image[None] if isinstance(image, Tensor) and image.ndim == 3 else image


def _chunks(images: Any, chunk: int) -> Iterator[Tensor]:
    "The images in batches of at most `chunk`, each of one size, in their order."
    kept: Tensor | None = None
    for batch in _batches(images):
        check_images("images", batch)
        if kept is not None and kept.shape[1:] != batch.shape[1:]:
            yield kept
            kept = None
        parts = list((batch if kept is None else torch.cat([kept, batch.to(kept)])).split(chunk))
        kept = parts.pop() if parts and len(parts[-1]) < chunk else None
        yield from parts
    if kept is not None and len(kept):
        yield kept


def extract(
    extractor: Extractor,
    images: Float[Tensor, "..."] | Iterable[Tensor],  # (n, 3, h, w) in [-1, 1], or images and batches one by one
    chunk: int = 64,  # images at once
) -> Float[Tensor, "n d"]:
    """The feature vectors of many images, on the CPU, whatever the chunk.

    Bytes, and values that cannot be in [-1, 1], are refused. Images in [0, 1] can be told from others only in a set:
    where none of several holds a negative value, a warning says so.
    """
    chunk, parts, least = check_count("chunk", chunk), [], []
    for batch in progress(_chunks(images, chunk), f"features of {extractor.name}"):
        least.append(batch.amin().cpu())
        parts.append(extractor(batch.to(extractor.device)).float().cpu())
    if not parts:
        raise LDMError("images holds no image")
    found = torch.cat(parts)
    if len(found) > 1 and min(least) >= 0:
        told = f"none of the {len(found)} images holds a negative value, but images should be in [-1, 1]"
        warnings.warn(f"{told}: those in [0, 1] become so by 2 * x - 1", stacklevel=2)
    return found


# --- Images and captions ---


def _clip(name: str | Path) -> tuple[Any, Any]:
    "A CLIP model and its processor, from a folder or the hub; CheckpointError where either is not there."
    from transformers import CLIPModel, CLIPProcessor

    with reading_clip(name, "CLIP model with model.safetensors"):
        model = CLIPModel.from_pretrained(str(name), use_safetensors=True)
    with reading_clip(name, "CLIP processor"):
        return model.float().requires_grad_(False).eval(), CLIPProcessor.from_pretrained(str(name))


def _vectors(found: Any) -> Tensor:
    "CLIP's vectors: transformers 5 has them in `pooler_output`, older versions return them."
    vectors = found if isinstance(found, Tensor) else found.pooler_output
    return vectors / vectors.norm(dim=1, keepdim=True)


def clip_score(
    images: Float[Tensor, "..."],  # (n, 3, h, w) in [-1, 1]
    captions: Sequence[str],  # one for each image, at least 2
    clip: str | Path,  # a CLIPModel with its processor: a folder, or a name on the hub
    device: str | torch.device | None = None,  # None: the CPU
) -> Mean:
    """The mean of 100 · max(cos, 0) between CLIP's vectors of an image and of its caption, with its standard error.

    This is the formula of Hessel et al. (2021) with 100 in place of 2.5. torchmetrics' CLIPScore takes the maximum with
    0 once, after the mean: the two are equal where no cosine is negative. Captions are cut at CLIP's own length.
    """
    check_images("images", images)
    if len(check_captions("captions", captions)) != len(images) or len(images) < 2:
        told = f"{len(captions)} captions for {len(images)} images"
        raise LDMError(f"captions should be one for each image, for at least 2 images, not {told}")
    where = pick_device("cpu" if device is None else str(device))
    model, processor = _clip(clip)
    model, scores = model.to(where), []
    for start in progress(range(0, len(images), 32), "CLIP score"):
        stop = min(start + 32, len(images))
        pixels = processor.image_processor(list(as_bytes(images[start:stop].float()).cpu()), return_tensors="pt")
        words = processor.tokenizer(
            list(captions[start:stop]),
            padding=True,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        with torch.no_grad():
            seen = _vectors(model.get_image_features(pixels["pixel_values"].to(where)))
            said = _vectors(model.get_text_features(words["input_ids"].to(where), words["attention_mask"].to(where)))
        scores.append(100 * (seen * said).sum(1).clamp(min=0).cpu())
    return Mean.of(torch.cat(scores))
