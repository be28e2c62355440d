"""Training the judge and the features: data, randomness, resume, and what is written down."""

import json
from dataclasses import replace

import pytest
import torch

import ldm_edu.training.judge as module
from ldm_edu import LatentDiffusion, ToyCOCO
from ldm_edu.evaluation.features import ToyFeatures, thing_targets
from ldm_edu.evaluation.judge import SceneReader
from ldm_edu.files import load_notes, load_tensors
from ldm_edu.first_stage.autoencoder import AutoencoderKL
from ldm_edu.first_stage.quantization import AutoencoderVQ
from ldm_edu.training.dispatch import _in_brief, train
from ldm_edu.training.judge import (
    balanced_accuracy,
    pack_targets,
    reader_randomness,
    reader_scores,
    reconstruct_some,
    unpack_targets,
)
from ldm_edu.training.recipes import SCENE_READER, TOY_FEATURES, find_recipe
from ldm_edu.training.run import RunOptions


def tiny(recipe, steps: int = 4):
    narrow = {"scene-reader": (8, 8, 16), "toy-features": (8, 16)}[recipe.name]
    training = replace(recipe.training, steps=steps, batch_size=4, images=16)
    return replace(recipe, channels=narrow, training=training)


def test_randomness_belongs_to_the_sample():
    whole = reader_randomness(0, 3, [5, 2, 9], (4, 8, 8))
    alone = reader_randomness(0, 3, [2], (4, 8, 8))
    assert all(torch.equal(whole[name][1:2], alone[name]) for name in whole)
    assert not torch.equal(reader_randomness(0, 4, [2], (4, 8, 8))["noise"], alone["noise"])


def test_the_share_that_goes_through_a_first_stage_is_the_share_asked_for():
    stage = LatentDiffusion.from_pretrained("toy-text2image").first_stage
    images, noise = torch.rand(16, 3, 64, 64) * 2 - 1, torch.zeros(16, 4, 8, 8)
    u = torch.stack([torch.arange(16) / 16, torch.zeros(16), torch.zeros(16)], 1)
    out = reconstruct_some([stage], images, u, noise, share=0.25, most=0.0)
    changed = (out != images).flatten(1).any(1)
    assert changed.tolist() == [True] * 4 + [False] * 12
    with torch.no_grad():
        torch.testing.assert_close(out[:4], stage.reconstruct(images[:4]).clamp(-1, 1))


def two_first_stages() -> tuple[AutoencoderKL, AutoencoderVQ]:
    """Their latents have 2 × 16² and 3 × 32² numbers."""
    torch.manual_seed(0)
    kl = AutoencoderKL(8, (1, 1, 1), 1, 2, attention=False, groups=4, scale_factor=0.7)
    return kl.eval(), AutoencoderVQ(8, (1, 1), 1, 3, num_codes=64, attention=False, groups=4).eval()


@torch.no_grad()
def test_pictures_go_through_first_stages_of_different_shapes():
    """Each image through its own, with the first of its numbers as noise, whatever the batch holds besides."""
    kl, vq = two_first_stages()
    assert kl.latent_channels != vq.latent_channels and kl.f != vq.f
    torch.nn.init.normal_(vq.quantize.embedding.weight)
    images, u = torch.rand(6, 3, 64, 64) * 2 - 1, torch.tensor([0.0, 0.0, 0.5]).repeat(6, 1)
    u[:, 1] = torch.tensor([0.0, 0.99, 0.49, 0.51, 0.2, 0.8])  # under a half: the first of the two
    u[4:, 0] = 0.9  # not at all
    noise = reader_randomness(0, 0, range(6), (3 * 32 * 32,))["latent_noise"]
    out = reconstruct_some([kl, vq], images, u, noise, share=0.25, most=0.6)
    for i, (stage, shape) in enumerate([(kl, (2, 16, 16)), (vq, (3, 32, 32)), (kl, (2, 16, 16)), (vq, (3, 32, 32))]):
        own = noise[i, : shape[0] * shape[1] * shape[2]].reshape(1, *shape)
        expected = stage.decode(stage.encode(images[i : i + 1]) + 0.6 * 0.5 * own).clamp(-1, 1)
        torch.testing.assert_close(out[i : i + 1], expected, rtol=1e-4, atol=1e-5)
        assert (expected - stage.reconstruct(images[i : i + 1])).abs().max() > 1e-3  # the noise is seen
    assert torch.equal(out[4:], images[4:])


def test_targets_survive_being_kept_small():
    scenes = [ToyCOCO("test").describe(i)[0] for i in range(8)]
    kept = unpack_targets(pack_targets(scenes), [3, 0])
    assert kept["shape"].shape == (2, 3) and kept["segmentation"].dtype == torch.int64
    assert int((kept["shape"][0] >= 0).sum()) == len(scenes[3].things)


@pytest.mark.parametrize("recipe", [SCENE_READER, TOY_FEATURES], ids=lambda recipe: recipe.name)
def test_a_run_that_was_stopped_ends_with_the_same_weights(recipe, tmp_path, monkeypatch):
    how = RunOptions(device="cpu", precision="fp32", every=2, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(module, "reader_scores", lambda reader, stages, n=1024: {"rendered": "not asked here"})
    straight = train(tiny(recipe), tmp_path / "straight", how)
    whole = module.batch_indices

    def mortal(seed, step, batch_size, n):
        if step == 3:
            raise RuntimeError("the power goes")
        return whole(seed, step, batch_size, n)

    monkeypatch.setattr(module, "batch_indices", mortal)
    with pytest.raises(RuntimeError, match="power"):
        train(tiny(recipe), tmp_path / "broken", replace(how, save_every=0.0))
    monkeypatch.setattr(module, "batch_indices", whole)
    assert load_notes(tmp_path / "broken" / f"{recipe.name}.safetensors")["step"] == "3"
    resumed = train(tiny(recipe), tmp_path / "broken", replace(how, resume=True))
    a, b = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    on_disk = load_tensors(tmp_path / "broken" / "model" / "model.safetensors")
    assert all(torch.equal(on_disk[name], a[name]) for name in a)


def test_what_was_measured_is_in_the_config(tmp_path):
    names = [str(tmp_path / stage.__class__.__name__) for stage in two_first_stages()]
    for name, stage in zip(names, two_first_stages()):
        stage.save_pretrained(name)
    recipe = replace(tiny(SCENE_READER), first_stages=tuple(names), judged_on=8)
    reader = train(recipe, tmp_path / "run", RunOptions(device="cpu", every=2))
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert "n = 32" in config["provenance"]["scores"]["reconstructions"]  # 8 of each split, through each first stage
    assert config["provenance"]["steps"] == 4 and set(config["provenance"]["scores"]) == {
        "rendered",
        "unseen pairs",
        "reconstructions",
    }
    assert SceneReader.from_pretrained(tmp_path / "run" / "model").provenance["scores"] == reader.provenance["scores"]


def test_an_untrained_judge_reads_nothing_right():
    scores = reader_scores(SceneReader((8, 8, 8)).eval(), {}, n=8)
    assert scores["rendered"].startswith("0.0 %") and "n = 0" in scores["reconstructions"]


def test_naming_counts_presence_and_absence_apart():
    class Known(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, x):
            return self.logits

    scenes = [ToyCOCO("test").describe(i)[0] for i in range(30)]
    things = torch.cat([thing_targets(scenes), torch.zeros(30, 48)])
    attributes = torch.cat([torch.zeros(30, 4), (torch.rand(30, 4) > 0.5).float()])
    batch = {"image": torch.zeros(60, 3, 64, 64), "things": things, "attributes": attributes}
    batch["scene"] = torch.cat([torch.ones(30), torch.zeros(30)])
    right = {"things": things * 2 - 1, "attributes": attributes * 2 - 1}
    nothing = {"things": -torch.ones_like(things), "attributes": -torch.ones_like(attributes)}
    assert balanced_accuracy(Known(right), batch) == {"things": 1.0, "attributes": 1.0}
    assert balanced_accuracy(Known(nothing), batch) == {"things": 0.5, "attributes": 0.5}


def test_train_goes_by_the_kind_of_the_recipe(tmp_path):
    how = RunOptions(device="cpu", precision="fp32", sample_every=0)
    features = train(tiny(TOY_FEATURES, 1), tmp_path / "features", how)
    assert isinstance(features, ToyFeatures) and features.provenance["recipe"]["kind"] == "toy features"
    demo = _in_brief(find_recipe("toy-demo"), 16).shortened(1)
    assert isinstance(train(demo, tmp_path / "demo", how), LatentDiffusion)
