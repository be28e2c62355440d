"""Features of images: their preparation, their files of weights, and the CLIP score, on random weights only."""

import io
import math
import pickle
import re
import warnings
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.evaluation import backbones
from ldm_edu.evaluation.extractors import (
    EXTRACTORS,
    INCEPTION_FILES,
    Extractor,
    as_bytes,
    clip_score,
    extract,
    find_extractor,
)
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.files import save_tensors


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Means(Extractor):
    """The means of the colours: an extractor of a user's own."""

    name = "means"

    def features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.fixture(scope="module")
def means() -> Means:
    return Means(nn.Identity())


# --- Many images ---


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_features_depend_neither_on_the_chunk_nor_on_how_the_images_come(means, chunk):
    images = pictures(17, 3, 8, 8)
    expected = images.mean((2, 3))
    for given in (images, list(images), images.split(5), iter(images.split(4)), [images[:2], images[2], images[3:]]):
        torch.testing.assert_close(extract(means, given, chunk), expected)


def test_toy_features_do_not_depend_on_the_chunk():
    toy, images = find_extractor("toy-features"), pictures(9, 3, 32, 32)
    torch.testing.assert_close(extract(toy, images, 2), extract(toy, images, 9), atol=1e-5, rtol=1e-4)


def test_images_of_several_sizes_keep_their_order(means):
    images = [pictures(3, *side, seed=i) for i, side in enumerate([(8, 8), (8, 8), (9, 5), (8, 8), (4, 4)])]
    torch.testing.assert_close(extract(means, images, 2), torch.stack([image.mean((1, 2)) for image in images]))


def test_images_are_resized_where_an_extractor_says_so():
    class Corner(Extractor):
        size = 4

        def features(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    corner, images = Corner(nn.Identity()), pictures(2, 3, 16, 12)
    expected = F.interpolate(images, (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(extract(corner, images), expected.flatten(1))
    torch.testing.assert_close(extract(corner, images[:, :, :4, :4]), images[:, :, :4, :4].flatten(1))


def test_bytes_are_refused_with_what_to_do(means):
    for given in (as_bytes(pictures(2, 3, 8, 8)), list(as_bytes(pictures(2, 3, 8, 8)))):
        with pytest.raises(LDMError, match=re.escape("x.float() / 127.5 - 1")):
            extract(means, given)


@pytest.mark.parametrize(
    "wrong",
    [
        255 * torch.rand(2, 3, 8, 8),
        torch.full((2, 3, 8, 8), math.nan),
        torch.rand(2, 1, 8, 8),
        torch.rand(8, 8),
        torch.rand(2, 3, 0, 8),
        torch.rand(0, 3, 8, 8),
        [],
        {"image": torch.rand(2, 3, 8, 8)},
        ["a picture"],
        3,
        None,
    ],
)
def test_what_are_no_images_is_refused(means, wrong):
    with pytest.raises(LDMError, match="image"):
        getattr(extract, "__wrapped__", extract)(means, wrong)


def test_images_from_0_to_1_are_warned_of_in_a_set_only(means):
    with pytest.warns(UserWarning, match=re.escape("2 * x - 1")):
        extract(means, torch.rand(5, 3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(means, torch.rand(1, 3, 8, 8))
        extract(means, torch.cat([torch.rand(5, 3, 8, 8), -torch.rand(1, 3, 8, 8)]), chunk=2)


def test_a_chunk_of_no_images_is_refused(means):
    with pytest.raises(LDMError, match="chunk"):
        extract(means, pictures(2, 3, 8, 8), chunk=0)


# --- The extractors ---


def test_toy_features_are_those_of_the_network_and_share_one_among_its_things():
    toy, network, images = (
        find_extractor("toy-features"),
        ToyFeatures.from_pretrained("toy-features"),
        pictures(3, 3, 64, 64),
    )
    torch.testing.assert_close(toy(images), network.embed(images))
    torch.testing.assert_close(toy.probabilities(images), network(images)["things"].softmax(1))
    assert (toy.name, toy.size, toy.resize) == ("ToyFeatures", None, "as they are")
    assert not toy(images).requires_grad and toy(images).shape == (3, 128)


def test_vgg_is_the_last_layer_with_the_channels_as_torchvision_wants_them(lpips_weights):
    models = pytest.importorskip("torchvision.models")
    vgg, images = find_extractor("vgg16", lpips_weights), pictures(2, 3, 48, 32)
    network = models.vgg16(weights=None).features[:30].eval()
    network.load_state_dict(backbones.load_backbone("vgg", lpips_weights).state_dict())
    transform = models.VGG16_Weights.IMAGENET1K_V1.transforms()
    prepared = (images + 1) / 2
    prepared = (prepared - torch.tensor(transform.mean).view(3, 1, 1)) / torch.tensor(transform.std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(vgg(images), network(prepared).mean((2, 3)), atol=1e-4, rtol=1e-4)
    assert vgg(images).shape == (2, 512) and vgg.probabilities(images) is None
    with pytest.raises(LDMError, match="at least 16 pixels"):
        vgg(pictures(1, 3, 8, 64))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(LDMError, match=", ".join(map(repr, EXTRACTORS))):
        find_extractor("resnet")


def test_a_missing_file_of_vgg_is_named(tmp_path, monkeypatch):
    def refuse(net, download):
        raise URLError("no network")

    monkeypatch.setattr(backbones, "_from_torchvision", refuse)
    for where in (tmp_path, None):
        with pytest.raises(LDMError, match=r"vgg16 .*vgg16_features.safetensors was not found"):
            find_extractor("vgg16", where)


def test_weights_of_vgg_are_never_downloaded(tmp_path, monkeypatch):
    def download(*_, **__):
        raise AssertionError("a download was started")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    for where in (tmp_path, None):
        with pytest.raises(LDMError, match=r"vgg16_features.safetensors was not found .*weights_dir.*download=False"):
            find_extractor("vgg16", where)


# --- Inception ---


@pytest.fixture(scope="module")
def inception() -> dict[str, Tensor]:
    """Random weights under torch-fidelity's names, with statistics that keep the values in bounds."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: {})
        torch.manual_seed(0)
        network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    state = nn.Module.state_dict(network)
    return {
        name: x if x.ndim < 2 or "fc." in name else x * (6 / x[0].numel()) ** 0.5 / x.std() / 2
        for name, x in state.items()
    }


@pytest.mark.parametrize(("file", "old"), [(INCEPTION_FILES[0], False), (INCEPTION_FILES[1], True)])
def test_inception_is_that_of_torch_fidelity_on_the_same_bytes(tmp_path, inception, file, old):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kept = {name: x for name, x in inception.items() if not (old and name.endswith("num_batches_tracked"))}
    torch.save(kept, tmp_path / file, _use_new_zipfile_serialization=not old)
    reference = theirs.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=tmp_path / file
    )
    stream = torch.get_rng_state()
    ours, images = find_extractor("inception", tmp_path), pictures(3, 3, 64, 48)
    assert torch.equal(stream, torch.get_rng_state())
    features, logits = reference(as_bytes(images))
    assert features.std() > 1e-3 and (features[0] - features[1]).abs().max() > 1e-4
    torch.testing.assert_close(extract(ours, images), features)
    torch.testing.assert_close(extract(ours, images, chunk=1), features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.probabilities(images), logits.softmax(1))
    assert (ours.name, ours.size, features.shape) == ("Inception-v3", 299, (3, 2048)) and "299" in ours.resize


def test_a_missing_file_of_inception_is_named_with_its_place(tmp_path):
    pytest.importorskip("torch_fidelity")
    for where, told in ((tmp_path, str(tmp_path)), (None, "no weights_dir was given")):
        with pytest.raises(LDMError, match=f"{INCEPTION_FILES[0]}.*{re.escape(told)}.*https://"):
            find_extractor("inception", where)


def test_a_file_of_other_weights_is_refused(tmp_path, inception):
    for wrong in (
        {name: x for name, x in inception.items() if name != "fc.weight"},
        inception | {"fc.weight": torch.zeros(1000, 2048)},
        inception | {"fc.bias": torch.full((1008,), math.nan)},
        {"a": torch.zeros(3)},
    ):
        torch.save(wrong, tmp_path / INCEPTION_FILES[0])
        with pytest.raises(CheckpointError, match=INCEPTION_FILES[0]):
            find_extractor("inception", tmp_path)


class Runs:
    """An object that would write a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("bare", [True, False])
def test_a_pickle_is_not_run(tmp_path, bare):
    pytest.importorskip("torch_fidelity")
    held, target = {"fc.weight": torch.zeros(2), "x": Runs(tmp_path / "ran")}, tmp_path / INCEPTION_FILES[0]
    if bare:
        target.write_bytes(pickle.dumps(held, protocol=2))
    else:
        torch.save(held, target)
    with pytest.raises(CheckpointError):
        find_extractor("inception", tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.load(io.BytesIO(pickle.dumps(held)))
    assert (tmp_path / "ran").exists()  # it would have


def test_without_torch_fidelity_inception_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(LDMError, match="pip install torch-fidelity"):
        find_extractor("inception")


# --- CLIP score ---


def random_clip(folder: Path, seed: int) -> Path:
    """A CLIP of random weights with its processor, saved to a folder."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(i) for i in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters), "re", "red</w>"]
    merges = [("r", "e"), ("re", "d</w>")]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = size | {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=size | {"image_size": 32, "patch_size": 8}, projection_dim=16
    )
    torch.manual_seed(seed)
    model = transformers.CLIPModel(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True
    )
    transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return random_clip(tmp_path_factory.mktemp("clip"), 3)


CAPTIONS = ["red ball", "a red cube", "red", "ball and cube", "cube cube cube", "a b c d"]


def by_torchmetrics(clip: Path, images: Tensor, captions: list[str]) -> list[float]:
    """torchmetrics' score of each pair. Its model returns vectors as transformers 4 did, which it was written for."""
    functional = pytest.importorskip("torchmetrics.functional.multimodal")
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)

    class AsBefore(nn.Module):
        config = model.config

        def get_image_features(self, *args):
            found = model.get_image_features(*args)
            return found if isinstance(found, Tensor) else found.pooler_output

        def get_text_features(self, *args):
            found = model.get_text_features(*args)
            return found if isinstance(found, Tensor) else found.pooler_output

    with torch.no_grad():
        pairs = zip(as_bytes(images), captions)
        return [functional.clip_score(x, y, lambda: (AsBefore(), processor)).item() for x, y in pairs]


def test_clip_score_is_that_of_torchmetrics(clip):
    images = pictures(6, 3, 40, 32)
    each = by_torchmetrics(clip, images, CAPTIONS)
    score = clip_score(images, CAPTIONS, clip)
    assert max(each) - min(each) > 1 and min(each) >= 0
    assert score.value == pytest.approx(sum(each) / 6, abs=1e-3)
    assert score.error == pytest.approx(torch.tensor(each).std().item() / 6**0.5, abs=1e-3)


def test_a_negative_cosine_counts_as_zero_pair_by_pair(tmp_path):
    clip = random_clip(tmp_path, 1)
    images, captions = pictures(36, 3, 32, 32), [f"{a} {b}" for a in CAPTIONS for b in CAPTIONS]
    each = by_torchmetrics(clip, images, captions)
    assert 0 < sum(score == 0 for score in each) < 36 and max(each) > 1
    assert clip_score(images, captions, str(clip)).value == pytest.approx(sum(each) / 36, abs=1e-3)


def test_a_long_caption_is_cut(clip):
    long = ["red ball " * 60, "a red cube"]
    assert math.isfinite(clip_score(pictures(2, 3, 32, 32), long, clip).value)


@pytest.mark.parametrize(
    ("images", "captions", "told"),
    [
        (pictures(2, 3, 8, 8), ["one"], "1 captions for 2 images"),
        (pictures(1, 3, 8, 8), ["one"], "at least 2"),
        (pictures(2, 3, 8, 8), "ab", "list of captions"),
        (as_bytes(pictures(2, 3, 8, 8)), ["a", "b"], "floating-point"),
    ],
)
def test_pairs_that_cannot_be_scored_are_refused(images, captions, told, tmp_path):
    with pytest.raises(LDMError, match=told):
        getattr(clip_score, "__wrapped__", clip_score)(images, captions, tmp_path)


def test_a_folder_without_safetensors_is_refused(clip, tmp_path):
    for path in clip.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import load_file

    torch.save(load_file(clip / "model.safetensors"), tmp_path / "pytorch_model.bin")
    for where in (tmp_path, tmp_path / "nothing", "nobody/has-such-a-model"):
        with pytest.raises(CheckpointError, match=r"no CLIP model with model.safetensors can be loaded"):
            clip_score(pictures(2, 3, 8, 8), ["a", "b"], where)


def test_wrong_weights_are_refused_by_the_file_that_holds_them(tmp_path):
    save_tensors({"features.0.weight": torch.zeros(3)}, tmp_path / "vgg16_features.safetensors")
    with pytest.raises(CheckpointError, match="vgg16_features.safetensors"):
        find_extractor("vgg16", tmp_path)
