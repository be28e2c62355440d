"""The whole model: seeds, files, and the questions that it refuses."""

import json

import pytest
import torch

from ldm_edu import AutoencoderKL, CheckpointError, LatentDiffusion, LDMError, NoiseSchedule, TextConditioner, UNet
from ldm_edu.conditioning import PromptError


def small(text: bool = True) -> LatentDiffusion:
    torch.manual_seed(0)
    vae = AutoencoderKL(16, (1, 2), 1, 2, attention=False, groups=8, scale_factor=0.5)
    unet = UNet(2, 2, 32, (1,), 1, (1,), 32, context_dim=32 if text else None)
    for parameter in unet.parameters():  # a fresh one passes its input on and predicts zero
        torch.nn.init.normal_(parameter, std=0.1)
    conditioner = TextConditioner(["red", "blue", "ball"], 4, 32, 1, 2) if text else None
    return LatentDiffusion(vae, unet, NoiseSchedule(), conditioner, size=16).eval()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_batch_equals_its_pictures_one_by_one(sampler):
    model, prompts = small(), ["red ball", "blue ball", ""]
    together = model.sample(prompts, steps=3, seed=5, sampler=sampler)
    alone = [model.sample([prompt], steps=3, seed=5 + i, sampler=sampler) for i, prompt in enumerate(prompts)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_seeds_decide():
    model = small()
    assert torch.equal(model.sample("red", steps=2, seed=3), model.sample("red", steps=2, seed=3))
    assert not torch.equal(model.sample("red", steps=2, seed=3), model.sample("red", steps=2, seed=4))


def test_the_prompt_and_the_scale_matter():
    model = small()
    assert not torch.equal(model.sample("red", steps=2), model.sample("blue", steps=2))
    assert not torch.equal(model.sample("red", steps=2, scale=1.0), model.sample("red", steps=2, scale=5.0))


@pytest.mark.parametrize("text", [True, False])
def test_saved_and_loaded(text, tmp_path):
    model = small(text)
    model.made = {"recipe": "none"}
    model.save_pretrained(tmp_path)
    again = LatentDiffusion.from_pretrained(tmp_path)
    question = dict(prompts="red ball") if text else dict(n=2)
    assert torch.equal(model.sample(**question, steps=2), again.sample(**question, steps=2))
    assert again.made == model.made and again.schedule == model.schedule and again.first_stage.scale_factor == 0.5


def test_half_precision_on_disk_is_close(tmp_path):
    model = small()
    model.save_pretrained(tmp_path, half=True)
    again = LatentDiffusion.from_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    torch.testing.assert_close(again.sample("red", steps=2), model.sample("red", steps=2), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "question, word",
    [
        (dict(), "needs prompts"),
        (dict(prompts=[]), "at least one"),
        (dict(prompts=["red"], n=2), "n=2"),
        (dict(prompts="red", steps=0), "steps"),
        (dict(prompts="red", steps=1001), "steps"),
        (dict(prompts="red", sampler="euler"), "ddim"),
        (dict(prompts="red", n=0), "at least one"),
    ],
)
def test_refuses_questions_without_sense(question, word):
    with pytest.raises(LDMError, match=word):
        small().sample(**question)


def test_an_unknown_word_is_named_with_known_ones():
    with pytest.raises(PromptError, match="rde.*red"):
        small().sample("rde ball")


def test_an_unconditional_model_takes_no_prompts():
    with pytest.raises(LDMError, match="unconditional"):
        small(text=False).sample("red")


def test_parts_must_fit_each_other():
    model = small()
    with pytest.raises(LDMError, match="channels"):
        LatentDiffusion(model.first_stage, UNet(3, 3, 32, (1,), 1, (1,)), NoiseSchedule())


FILES = (
    "config.json",
    "unet/config.json",
    "unet/model.safetensors",
    "first_stage/model.safetensors",
    "conditioner/config.json",
)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_damaged_checkpoint_is_named(file, damage, tmp_path):
    small().save_pretrained(tmp_path)
    path = tmp_path / file
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text(json.dumps({"model_type": "something else"}))
    with pytest.raises(CheckpointError) as caught:
        LatentDiffusion.from_pretrained(tmp_path)
    assert path.name in str(caught.value) and path.parent.name in str(caught.value)


def test_an_unknown_checkpoint_lists_the_shipped_ones():
    with pytest.raises(CheckpointError, match="toy-text2image"):
        LatentDiffusion.from_pretrained("toy-text2img")
