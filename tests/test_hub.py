"""Every part, and the whole, to the hub and back: uploads go to a stand-in, downloads come from the hub's own cache."""

import shutil
from pathlib import Path

import pytest
import torch

from ldm_edu import (
    AutoencoderKL,
    AutoencoderVQ,
    CheckpointError,
    Conditioner,
    FirstStage,
    IdentityFirstStage,
    LatentDiffusion,
    MergedConditioner,
    NoiseSchedule,
    SceneReader,
    TextConditioner,
    ToyFeatures,
    UNet,
    load_first_stage,
)
from ldm_edu.checkpoints import Part
from ldm_edu.files import load_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What `HfApi` does when something is uploaded, into the folder where huggingface_hub keeps its downloads."""

    cache: Path
    calls: list

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append(("create", repo_id, private, self.token))
        assert exist_ok and "/" in repo_id
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, repo_type, folder_path, commit_message, revision, **more):
        assert repo_type == "model" and commit_message
        self.calls.append(("upload", repo_id, revision, more))
        where = self.cache / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(folder_path, where / "snapshots" / COMMIT, dirs_exist_ok=True)
        (where / "refs").mkdir(exist_ok=True)
        (where / "refs" / "main").write_text(COMMIT)
        return f"https://hub/{repo_id}/commit/{COMMIT}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in; there is no network."""
    Hub.cache, Hub.calls = tmp_path / "hub", []
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Hub.cache))
    return Hub


SHAPE = dict(channels=8, multipliers=(1, 2), blocks=1, latent_channels=2, attention=False, groups=4)
PARTS = {
    "UNet": lambda: UNet(2, 2, 32, (1,), 1, (1,), 32, context_dim=32),
    "AutoencoderKL": lambda: AutoencoderKL(**SHAPE, scale_factor=0.5),
    "AutoencoderVQ": lambda: AutoencoderVQ(**SHAPE, num_codes=16),
    "IdentityFirstStage": IdentityFirstStage,
    "TextConditioner": lambda: TextConditioner(["red", "ball"], 4, 32, 1, 2),
    "MergedConditioner": lambda: MergedConditioner(
        [TextConditioner(["red"], 4, 32, 1, 2), TextConditioner(["a"], 3, 32)]
    ),
    "SceneReader": lambda: SceneReader((8, 8, 8)),
    "ToyFeatures": lambda: ToyFeatures((8, 8)),
}


def model() -> LatentDiffusion:
    torch.manual_seed(0)
    unet = PARTS["UNet"]()
    torch.nn.init.normal_(unet.out[-1].weight, std=0.1)
    parts = PARTS["AutoencoderVQ"](), unet, NoiseSchedule(), PARTS["TextConditioner"]()
    return LatentDiffusion(*parts, size=16, provenance={"made": "by a test"}).eval()


@pytest.mark.parametrize("name", PARTS)
def test_a_part_comes_back(name, hub):
    """Also by the base class, which finds the class in config.json."""
    part = PARTS[name]()
    assert part.push_to_hub("user/part", private=True, token="t").endswith(COMMIT)
    assert hub.calls == [("create", "user/part", True, "t"), ("upload", "user/part", None, {})]
    for cls in (type(part), Part):
        again = cls.from_pretrained("user/part")
        assert type(again) is type(part) and not again.training and again.description == part.description
        assert all(torch.equal(again.state_dict()[k], v) for k, v in part.state_dict().items())
    base = next((cls for cls in (FirstStage, Conditioner) if isinstance(part, cls)), None)
    if base is FirstStage:
        assert type(load_first_stage("user/part")) is type(part)
    if base:
        assert type(base.from_pretrained("user/part")) is type(part)


def test_the_whole_comes_back(hub):
    ours = model()
    ours.push_to_hub("user/whole", branch="next", create_pr=True)
    assert hub.calls[-1] == ("upload", "user/whole", "next", {"create_pr": True})
    again = LatentDiffusion.from_pretrained("user/whole")
    assert torch.equal(again.sample("red ball", steps=2), ours.sample("red ball", steps=2))
    assert again.provenance == ours.provenance
    assert type(load_first_stage("user/whole")) is AutoencoderVQ
    assert UNet.from_pretrained("user/whole", part="unet").config == ours.unet.config
    assert type(Conditioner.from_pretrained("user/whole", part="conditioner")) is TextConditioner


def test_half_precision_goes_to_the_hub(hub):
    model().push_to_hub("user/half", half=True)
    (weights,) = hub.cache.glob("**/unet/model.safetensors")
    ours = model().unet
    assert weights.stat().st_size < 0.6 * sum(4 * p.numel() for p in ours.parameters())
    LatentDiffusion.from_pretrained("user/half")


def test_what_cannot_be_saved_is_not_uploaded(hub):
    part = PARTS["UNet"]()
    part._made_with["channels"] = {1, 2}
    with pytest.raises(CheckpointError, match="channels"):
        part.push_to_hub("user/part")
    assert hub.calls == []


def test_a_part_is_no_whole_and_another_class_is_named(hub):
    PARTS["AutoencoderKL"]().push_to_hub("user/part")
    with pytest.raises(CheckpointError, match="describes AutoencoderKL, which is a part"):
        LatentDiffusion.from_pretrained("user/part")
    with pytest.raises(CheckpointError, match="AutoencoderKL is no UNet"):
        UNet.from_pretrained("user/part")
    with pytest.raises(CheckpointError, match="AutoencoderKL is no AutoencoderVQ"):
        AutoencoderVQ.from_pretrained("user/part")


def test_what_the_hub_does_not_have_is_named(hub):
    for load in (LatentDiffusion.from_pretrained, load_first_stage, UNet.from_pretrained):
        with pytest.raises(CheckpointError, match="no folder 'user/none', and it cannot be had from the hub"):
            load("user/none")


def test_configs_name_their_classes(tmp_path):
    model().save_pretrained(tmp_path)
    named = {str(path.parent.relative_to(tmp_path)): load_json(path)["class"] for path in tmp_path.rglob("config.json")}
    assert named == {
        ".": "LatentDiffusion",
        "first_stage": "AutoencoderVQ",
        "unet": "UNet",
        "conditioner": "TextConditioner",
    }
