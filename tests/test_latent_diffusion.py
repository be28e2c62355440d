"""The whole model: seeds, files, and the questions that it refuses."""

import copy
import itertools
import json

import pytest
import torch
from jaxtyping import TypeCheckError

from ldm_edu import AutoencoderKL, CheckpointError, LatentDiffusion, LDMError, NoiseSchedule, TextConditioner, UNet
from ldm_edu.conditioning import Condition, Conditioner, Guidance, MergedConditioner
from ldm_edu.diffusion.sampling import SAMPLERS, SeededNoise, ddim, last
from ldm_edu.first_stage.quantization import AutoencoderVQ, IdentityFirstStage, load_first_stage


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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_equals_its_pictures_one_by_one(sampler):
    model, prompts = small(), ["red ball", "blue ball", ""]
    together = model.sample(prompts, steps=3, seed=5, sampler=sampler)
    alone = [model.sample([prompt], steps=3, seed=5 + i, sampler=sampler) for i, prompt in enumerate(prompts)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_a_batch_size_an_image_is_the_same_to_the_bit_in_any_company(sampler, text, dtype):
    model, prompts = small(text).to(dtype), ["red ball", "blue ball", "", "ball"]

    def draw(rows: list[int], batch_size: int) -> torch.Tensor:
        question = dict(prompts=[prompts[i] for i in rows]) if text else dict(n=len(rows))
        return model.sample(**question, steps=2, seed=5 + rows[0], sampler=sampler, batch_size=batch_size)

    for batch_size in (1, 3):
        whole = draw([0, 1, 2, 3], batch_size)
        assert torch.equal(torch.cat([draw([i], batch_size) for i in range(4)]), whole)
        assert torch.equal(torch.cat([draw([0, 1], batch_size), draw([2, 3], batch_size)]), whole)
        assert len({image.numpy().tobytes() for image in whole.float()}) == 4
    assert torch.equal(draw([0, 1, 2, 3], 4)[:3], draw([0, 1, 2], 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_batch_size_a_shipped_model_draws_the_same_to_the_bit(dtype):
    model = LatentDiffusion.from_pretrained("toy-text2image").to(dtype)
    prompts, how = (
        ["a red ball", "a blue cube", "a big green ball"],
        dict(steps=3, scale=10.0, sampler="ddpm", batch_size=2),
    )
    whole = model.sample(prompts, seed=3, **how)
    alone = [model.sample([prompt], seed=3 + i, **how) for i, prompt in enumerate(prompts)]
    assert torch.equal(torch.cat(alone), whole)
    assert torch.equal(model.sample(prompts[1:], seed=4, **how), whole[1:])


def test_every_forward_pass_has_the_batch_size_that_was_asked_for():
    model, batches = small(), []
    model.unet.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    model.first_stage.decoder.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    for count in (1, 3, 4):
        batches.clear()
        assert model.sample(["red"] * count, steps=2, batch_size=3).shape[0] == count
        assert batches == [6, 6, 3] * (1 if count <= 3 else 2)  # guided: each image with and without its caption


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True])
def test_what_is_no_batch_size_is_refused(wrong):
    import jaxtyping

    with pytest.raises((LDMError, jaxtyping.TypeCheckError), match="batch_size"):
        small().sample("red", steps=1, batch_size=wrong)


FORMATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("of_unet", FORMATS)
def test_parts_in_any_formats_draw_in_that_of_the_unet(of_unet):
    model = small()
    expected = model.sample(["red ball", "blue"], steps=2)
    for of_stage, of_conditioner in itertools.product(FORMATS, FORMATS):
        model.unet.to(of_unet), model.first_stage.to(of_stage), model.conditioner.to(of_conditioner)
        images = model.sample(["red ball", "blue"], steps=2)
        assert images.dtype == of_unet and images.isfinite().all()
        torch.testing.assert_close(images.float(), expected, rtol=0, atol=0.1)  # rounded more than once on the way


# --- What to go away from, and where ---


def by_hand(model: LatentDiffusion, prompts: list[str], away: Condition, seed: int, **options) -> torch.Tensor:
    "Guidance whose null is another condition."
    noise = SeededNoise([seed + i for i in range(len(prompts))])
    guided, cond = Guidance(model.unet, away, 4.0, **options), model.conditioner({"caption": prompts})
    with torch.no_grad():
        z = last(ddim(guided, noise.noise(model.latent_shape), model.schedule, 3, cond))
        return model.first_stage.decode(z).clamp(-1, 1)


def test_negative_is_a_guidance_whose_null_is_that_caption():
    model, prompts, how = small(), ["red ball", "blue ball"], dict(steps=3, scale=4.0, seed=5)
    plain = model.sample(prompts, **how)
    torch.testing.assert_close(plain, by_hand(model, prompts, model.conditioner.null(), 5), rtol=0, atol=1e-5)
    for negative, captions in (
        ("blue", ["blue", "blue"]),
        ({"caption": ["blue", "blue"]}, ["blue", "blue"]),
        (["ball", "red"], ["ball", "red"]),
        ({"caption": ["ball", "red"]}, ["ball", "red"]),
    ):
        with torch.no_grad():
            away = model.conditioner({"caption": captions})
        found = model.sample(prompts, negative=negative, **how)
        torch.testing.assert_close(found, by_hand(model, prompts, away, 5), rtol=0, atol=1e-5)
        assert not torch.equal(found, plain)
    in_parts = model.sample(prompts, negative={"caption": ["ball", "red"]}, batch_size=1, **how)
    torch.testing.assert_close(in_parts, found, rtol=0, atol=1e-5)


def test_away_from_itself_is_unguided():
    model = small()
    found, plain = model.sample("red ball", steps=3, negative="red ball"), model.sample("red ball", steps=3, scale=1.0)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "negative, said",
    [
        ({"image": ["a", "b"]}, "negative: this model does not read image, only caption"),
        ({}, "negative should be a caption, a list of them, or a batch"),
        ({"caption": "blue"}, "negative: caption should have an entry for each image"),
        ("greenish", "greenish"),
        ({"caption": ["red", "bluish"]}, "bluish"),
    ],
)
def test_a_negative_that_says_nothing_is_refused(negative, said):
    with pytest.raises(LDMError, match=said):
        small().sample(["red", "blue"], steps=1, negative=negative)


@pytest.mark.parametrize("captions", [["red"], ["red", "ball", "blue"], []])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_a_negative_of_another_length_is_refused(captions, batch_size):
    with pytest.raises(LDMError, match=f"negative: {len(captions)} entries for 2 images"):
        small().sample(["red", "blue"], steps=1, negative={"caption": captions}, batch_size=batch_size)


def test_an_unconditional_model_has_nothing_to_go_away_from():
    with pytest.raises(LDMError, match="this model is unconditional"):
        small(text=False).sample(n=2, steps=1, negative="red")


def test_guided_in_an_interval():
    model, prompts, how = small(), ["red ball", "blue"], dict(steps=3, scale=4.0, seed=5)  # levels 999, 666, 332
    guided, plain = model.sample(prompts, **how), model.sample(prompts, **(how | {"scale": 1.0}))
    assert torch.equal(model.sample(prompts, interval=(0, 999), **how), guided)
    assert torch.equal(model.sample(prompts, interval=(400, 500), **how), plain)
    middle = model.sample(prompts, interval=(600, 700), **how)
    expected = by_hand(model, prompts, model.conditioner.null(), 5, interval=(600, 700))
    torch.testing.assert_close(middle, expected, rtol=0, atol=1e-5)
    assert not torch.equal(middle, guided) and not torch.equal(middle, plain)
    for model in (model, small(text=False)):
        for interval in ((5, 2), (0, 1000), "all"):
            with pytest.raises((LDMError, TypeCheckError), match="interval"):
                model.sample("red" if model.conditioner else None, interval=interval)


def test_no_part_keeps_a_gradient_while_it_draws():
    model, seen = small(), []
    for part in (model.conditioner, model.unet, model.first_stage.decoder):
        part.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    model.sample(["red"], steps=2, negative="blue")
    model.sample(["red", "blue"], steps=2, batch_size=1)
    assert len(seen) > 8 and not any(seen)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch_size", [3, 5, 6])
def test_an_image_lies_at_the_same_place_of_its_batch(threads, batch_size):
    """With two threads, torch adds up the last rows of some matrix products in another way than the first ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, prompts = small(), ["red ball", "blue", "ball", "red", "blue ball"]
        how = dict(steps=2, batch_size=batch_size)
        whole = model.sample(prompts, seed=7, **how)
        alone = torch.cat([model.sample(prompt, seed=7 + i, **how) for i, prompt in enumerate(prompts)])
        assert torch.equal(whole, alone)
        assert torch.equal(whole[1:4], model.sample(prompts[1:4], seed=8, **how))
    finally:
        torch.set_num_threads(before)


def test_a_batch_goes_to_the_conditioner_as_it_is_unless_it_is_cut():
    model, seen = small(), []
    model.conditioner.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0]["caption"]) if isinstance(inputs[0], dict) else None  # not the null's
    )
    captions = ("red ball", "blue", "ball")
    plain = model.sample({"caption": captions}, steps=1)
    assert seen[0] is captions
    torch.testing.assert_close(model.sample({"caption": captions}, steps=1, batch_size=2), plain, rtol=0, atol=1e-5)
    for wrong in ("red ball", b"red", torch.tensor(3), 7):
        with pytest.raises(LDMError, match="prompts: caption should have an entry for each image"):
            model.sample({"caption": wrong}, steps=1)


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
    [
        ("num_inference_steps", "steps"),
        ("guidance_scale", "scale"),
        ("prompt", "prompts"),
        ("generator", "seed"),
        ("negative_prompt", "negative"),
    ],
)
def test_words_of_diffusers_are_answered_by_ours(word, ours):
    with pytest.raises(LDMError, match=f"{word}: our word is {ours}"):
        small().sample("red", **{word: 4})


def test_other_words_are_answered_by_those_of_the_sampler():
    with pytest.raises(LDMError, match="clip: no argument of `sample`, nor of ddim, whose own are eta"):
        small().sample("red", clip=True)
    with pytest.raises(LDMError, match="height: our word is size"):
        small().sample("red", height=64)
    with pytest.raises((LDMError, TypeError), match="prompts"):  # TypeError: from beartype, where types are checked
        small().sample(4)
    with pytest.raises(LDMError, match="reads caption: give a batch, a dict, with caption"):
        small().sample({"segmentation": torch.zeros(2, 16, 16)})


# --- Sizes ---


@pytest.mark.parametrize("kind", ["kl", "vq", "identity"])
@pytest.mark.parametrize("size, sides", [(16, (16, 16)), (32, (32, 32)), ((16, 48), (16, 48)), ((48, 16), (48, 16))])
def test_an_image_has_the_size_that_is_asked_for(kind, size, sides):
    model = small(kind=kind)
    images = model.sample("red", n=2, steps=2, size=size)
    assert images.shape == (2, 3, *sides) and images.isfinite().all()
    assert model.size == 16
    if sides == (16, 16):
        assert torch.equal(images, model.sample("red", n=2, steps=2))


@pytest.mark.parametrize("size, said", [(17, "multiple of 2"), (0, "size=0"), ((16, 15), "multiple of 2")])
def test_a_size_that_the_networks_cannot_divide_is_refused(size, said):
    with pytest.raises(LDMError, match=said):
        small().sample("red", size=size)


@pytest.mark.parametrize("size", [(16,), (16, 16, 16), "16", 16.5, True, 10**9])
def test_what_is_no_size_is_refused(size):
    with pytest.raises((LDMError, TypeCheckError), match="size"):
        small().sample("red", size=size)


def test_the_levels_of_the_unet_count_for_the_size():
    model = small()
    deep = UNet(2, 2, 32, (1, 1), 1, (), 32, context_dim=32)
    model = LatentDiffusion(model.first_stage, deep, model.schedule, model.conditioner, size=16)
    with pytest.raises(LDMError, match="size=18 should be a multiple of 4"):
        model.sample("red", size=18)


# --- What is never dropped cannot be left ---


class Kept(Conditioner):
    """A map that is never dropped."""

    keys = ("map",)
    concat_channels = 1

    def forward(self, batch):
        return Condition(concat=batch["map"])

    def null(self, b=1):
        return Condition()


def test_going_away_from_what_is_never_dropped_is_refused():
    model = small()
    unet = UNet(2, 2, 32, (1,), 1, (1,), 32, context_dim=32, concat_channels=1)
    merged = MergedConditioner([model.conditioner, Kept()])
    model = LatentDiffusion(model.first_stage, unet, model.schedule, merged, size=16).eval()
    batch = {"caption": ["red"], "map": torch.zeros(1, 1, 8, 8)}
    assert model.sample(batch, steps=1, negative="blue").shape == (1, 3, 16, 16)
    with pytest.raises(LDMError, match="negative: this model's map is never dropped"):
        model.sample(batch, steps=1, negative={"map": torch.ones(1, 1, 8, 8)})


# --- A first stage that others have, too ---


def shared(tmp_path) -> LatentDiffusion:
    """A model on the first stage of toy-vq-f4."""
    stage = load_first_stage("toy-vq-f4")
    unet = UNet(3, 3, 32, (1,), 1, (1,), 32)
    return LatentDiffusion(stage, unet, NoiseSchedule(), size=16).eval()


def test_a_shipped_first_stage_is_named_in_place_of_a_copy(tmp_path):
    model = shared(tmp_path)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "named", first_stage="toy-vq-f4")
    assert not (tmp_path / "named" / "first_stage").exists()
    for again in (LatentDiffusion.from_pretrained(tmp_path / folder) for folder in ("whole", "named")):
        assert torch.equal(again.sample(n=2, steps=2), model.sample(n=2, steps=2))
    stage = load_first_stage(tmp_path / "named")
    assert all(torch.equal(v, model.first_stage.state_dict()[k]) for k, v in stage.state_dict().items())


def test_only_an_equal_first_stage_is_named(tmp_path):
    model = shared(tmp_path)
    with torch.no_grad():
        model.first_stage.decoder.conv_out.bias.add_(1e-3)
    for name, said in (("toy-vq-f4", "other weights"), ("toy-kl-f4", "another config"), ("nobody", "no shipped")):
        with pytest.raises(LDMError, match=said):
            model.save_pretrained(tmp_path / "new", first_stage=name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../secret", "", 3, ["toy-vq-f4"], "/tmp", "toy-vq-f4/../toy-vq-f4"])
def test_a_config_can_name_no_first_stage_but_a_shipped_one(name, tmp_path, monkeypatch):
    shared(tmp_path).save_pretrained(tmp_path / "model", first_stage="toy-vq-f4")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    monkeypatch.chdir(tmp_path)
    for said in (name, config["first_stage"] | {"name": name}):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"first_stage": said}))
        for load in (LatentDiffusion.from_pretrained, load_first_stage):
            with pytest.raises(CheckpointError, match="no shipped checkpoint|should be an object with 'name'"):
                load(tmp_path / "model")


def test_a_shipped_first_stage_that_has_changed_is_noticed(tmp_path):
    shared(tmp_path).save_pretrained(tmp_path / "model", first_stage="toy-vq-f4")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["first_stage"]["checksum"] = "0" * 16
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for load in (LatentDiffusion.from_pretrained, load_first_stage):
        with pytest.raises(CheckpointError, match="'toy-vq-f4' is not the one that this model was saved with"):
            load(tmp_path / "model")
