"""The whole model: seeds, files, and the questions that it refuses."""

import copy
import json

import pytest
import torch

from ldm_edu import AutoencoderKL, CheckpointError, LatentDiffusion, LDMError, NoiseSchedule, TextConditioner, UNet
from ldm_edu.diffusion.sampling import SeededNoise, ddim, last
from ldm_edu.first_stage.quantization import AutoencoderVQ, IdentityFirstStage


def first_stage(kind: str):
    if kind == "identity":
        return IdentityFirstStage()
    shape = dict(channels=16, multipliers=(1, 2), blocks=1, latent_channels=2, attention=False, groups=8)
    if kind == "kl":
        return AutoencoderKL(**shape, scale_factor=0.5)
    vq = AutoencoderVQ(**shape, num_codes=32)
    torch.nn.init.normal_(vq.quantize.embedding.weight)  # as far apart as the latents that are sampled
    return vq


def small(text: bool = True, kind: str = "kl") -> LatentDiffusion:
    torch.manual_seed(0)
    vae = first_stage(kind)
    c = vae.latent_channels
    unet = UNet(c, c, 32, (1,), 1, (1,), 32, context_dim=32 if text else None)
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


@pytest.mark.parametrize("kind", ["kl", "vq", "identity"])
@pytest.mark.parametrize("text", [True, False])
def test_saved_and_loaded(text, kind, tmp_path):
    model = small(text, kind)
    model.provenance = {"recipe": "none"}
    model.save_pretrained(tmp_path)
    again = LatentDiffusion.from_pretrained(tmp_path)
    question = dict(prompts="red ball") if text else dict(n=2)
    assert torch.equal(model.sample(**question, steps=2), again.sample(**question, steps=2))
    assert again.provenance == model.provenance and again.schedule == model.schedule
    assert type(again.first_stage) is type(model.first_stage) and not again.first_stage.training
    assert again.first_stage.scale_factor == {"kl": 0.5, "vq": 1.0, "identity": 1.0}[kind]


@pytest.mark.parametrize("kind", ["kl", "vq", "identity"])
def test_what_is_sampled_is_a_latent_that_is_decoded(kind):
    """The sampler by itself, from the same noise, and then what each kind of first stage does with a latent."""
    model = small(False, kind)
    c, side = {"kl": (2, 8), "vq": (2, 8), "identity": (3, 16)}[kind]
    assert model.latent_shape == (c, side, side)
    with torch.no_grad():
        z = last(ddim(model.unet, SeededNoise([4, 5]).noise((c, side, side)), model.schedule, steps=3))
        if kind == "kl":
            expected = model.first_stage.decoder(model.first_stage.post_quant_conv(z / 0.5))
        elif kind == "vq":
            entries = model.first_stage.quantize.embedding.weight
            near = (z[:, :, None] - entries.T[None, :, :, None, None]).square().sum(1).argmin(1)
            expected = entries[near].movedim(-1, 1)
            assert len(near.unique()) > 5 and (expected - z).abs().max() > 0.1
            expected = model.first_stage.decoder(model.first_stage.post_quant_conv(expected))
        else:
            expected = z
    images = model.sample(n=2, steps=3, seed=4)
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images, expected.clamp(-1, 1), rtol=0, atol=1e-4)


def test_a_model_saved_by_version_0_1_0_opens(tmp_path):
    """It wrote the provenance under another name."""
    model = small()
    model.provenance = {"recipe": "none"}
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["made"] = config.pop("provenance")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert LatentDiffusion.from_pretrained(tmp_path).provenance == {"recipe": "none"}


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
        (dict(prompts="red", n=0), "n=0 should be"),
    ],
)
def test_refuses_questions_without_sense(question, word):
    with pytest.raises(LDMError, match=word):
        small().sample(**question)


def test_an_unknown_word_is_named_with_known_ones():
    with pytest.raises(LDMError, match="rde.*red"):
        small().sample("rde ball")


def test_an_unconditional_model_takes_no_prompts():
    with pytest.raises(LDMError, match="unconditional"):
        small(text=False).sample("red")


def test_parts_must_fit_each_other():
    model = small()
    with pytest.raises(LDMError, match="channels"):
        LatentDiffusion(model.first_stage, UNet(3, 3, 32, (1,), 1, (1,)), NoiseSchedule())
    with pytest.raises(LDMError, match="unet takes 2 channels, but first_stage's latents have 3"):
        LatentDiffusion(IdentityFirstStage(), small(False).unet, NoiseSchedule(), size=16)
    with pytest.raises(LDMError, match="size=17 is no multiple of first_stage's f = 2"):
        LatentDiffusion(first_stage("vq"), small(False).unet, NoiseSchedule(), size=17)


FILES = (
    "config.json",
    "unet/config.json",
    "unet/model.safetensors",
    "first_stage/config.json",
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


def test_a_model_that_cannot_be_saved_leaves_the_old_one_whole(tmp_path):
    """The parts of a folder belong together: all are replaced, or none."""
    small().save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = small()
    torch.nn.init.normal_(other.first_stage.decoder.conv_out.weight)
    for spoil in (lambda m: m.provenance.update(odd={1, 2}), lambda m: m.conditioner._made_with.update(length={1})):
        spoilt = copy.deepcopy(other)
        spoil(spoilt)
        with pytest.raises(CheckpointError, match="cannot be written as JSON"):
            spoilt.save_pretrained(tmp_path)
    with torch.no_grad():
        other.unet.out[-1].weight[:] = 1e6
    with pytest.raises(CheckpointError, match="float16"):
        other.save_pretrained(tmp_path, half=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    other.save_pretrained(tmp_path)
    again = LatentDiffusion.from_pretrained(tmp_path)
    assert torch.equal(again.unet.out[-1].weight, other.unet.out[-1].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_number_format_samples(dtype):
    model = small()
    expected = model.sample("red ball", steps=2)
    images = model.to(dtype).sample("red ball", steps=2)
    assert images.dtype == dtype
    torch.testing.assert_close(images.float(), expected, rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-5)


def test_what_the_conditioner_does_not_read_does_not_count():
    model = small()
    batch = {"split": "validation", "image": torch.zeros(5, 3, 16, 16), "caption": ["red ball", "ball"]}
    assert torch.equal(model.sample(batch, steps=1), model.sample(["red ball", "ball"], steps=1))
    with pytest.raises(LDMError, match="n=3"):
        model.sample(batch, n=3, steps=1)


@pytest.mark.parametrize(
    "word, ours",
    [("num_inference_steps", "steps"), ("guidance_scale", "scale"), ("prompt", "prompts"), ("generator", "seed")],
)
def test_words_of_diffusers_are_answered_by_ours(word, ours):
    with pytest.raises(LDMError, match=f"{word}: our word is {ours}"):
        small().sample("red", **{word: 4})


def test_other_words_are_answered_by_those_of_the_sampler():
    with pytest.raises(LDMError, match="height: no argument of `sample`, nor of ddim, whose own are eta"):
        small().sample("red", height=64)
    with pytest.raises((LDMError, TypeError), match="prompts"):  # TypeError: from beartype, where types are checked
        small().sample(4)
    with pytest.raises(LDMError, match="reads caption: give a batch, a dict, with caption"):
        small().sample({"segmentation": torch.zeros(2, 16, 16)})
