"""First stages: codebook, perceptual distance and discriminator; and the latents that are kept of them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from small_runs import differences, tiny, tiny_autoencoder, train_and_draw, train_tiny
from small_stages import SmallStage, small_run

import ldm_edu.training.latents as latents
from ldm_edu.data.cache import cached
from ldm_edu.data.toy.datasets import ToyCOCO
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.metrics import LPIPS
from ldm_edu.files import load_notes, load_tensors
from ldm_edu.first_stage.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm_edu.first_stage.quantization import AutoencoderVQ, load_first_stage
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.training.data import check_fit
from ldm_edu.training.latents import cached_latents
from ldm_edu.training.loop import clip_gradients, step_randomness
from ldm_edu.training.recipes import recipe_from_dict
from ldm_edu.training.run import RunOptions, open_run
from ldm_edu.training.stages import FirstStageStage
from ldm_edu.training.state import make_state
from ldm_edu.training.tasks import FirstStageTask, build_first_stage, perceptual_distance

# First stages, and their discriminators -------------------------------------------------------------------------------


def first_stage_task(regulariser: str = "vq", adversarial: bool = True) -> FirstStageTask:
    """The same weights at each call; the discriminator's first step is 3."""
    torch.manual_seed(0)
    recipe = replace(tiny_autoencoder(start=3).first_stage, regulariser=regulariser)
    perceptual = perceptual_distance(recipe.perceptual)
    return FirstStageTask(recipe if adversarial else replace(recipe, adversarial=None), perceptual)


def pictures_at(step: int) -> dict[str, torch.Tensor]:
    """Four images of noise, at a step."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1, torch.randn(4, 4, 8, 8, generator=generator)
    return {"image": x, "latent_noise": noise, "step": step}


@pytest.mark.parametrize("regulariser", ["kl", "vq"])
def test_the_discriminator_is_used_from_its_first_step_on_and_only_with_gradients(regulariser):
    task, without = first_stage_task(regulariser), first_stage_task(regulariser, adversarial=False)
    assert not differences(task.model.state_dict(), without.model.state_dict())
    expected, terms = without(pictures_at(0))
    assert set(terms) == {"l1", "perceptual", {"kl": "kl", "vq": "codebook"}[regulariser]}
    for step in (0, 2):
        loss, found = task(pictures_at(step))
        assert loss == expected and found == terms
        loss.backward()
        assert all(weight.grad is not None and not weight.grad.any() for weight in task.adversary.parameters())
    for step in (3, 1000):
        task.zero_grad()
        loss, found = task(pictures_at(step))
        assert set(found) == {*terms, "g_loss", "d_loss", "d_weight"}
        share = 0.5 * found["d_weight"] * found["g_loss"] + found["d_loss"]
        torch.testing.assert_close(loss, expected + share)
        loss.backward()
        assert all(weight.grad.any() for weight in task.parameters() if weight.dim() > 1)
        with torch.no_grad():
            loss, found = task(pictures_at(step))
        assert loss == expected and found == terms


def test_clip_groups_are_clipped_apart(tmp_path):
    """A long gradient is cut to 1, a short one is left alone; what is returned is the norm of all together."""
    task, run = first_stage_task(), small_run(tmp_path)
    gradients = {}
    for part, size in ((task.model, 50.0), (task.adversary, 0.5)):
        random = [torch.randn_like(weight) for weight in part.parameters()]
        length = torch.cat([g.flatten() for g in random]).norm()
        gradients[part] = [g * size / length for g in random]
        for weight, gradient in zip(part.parameters(), gradients[part]):
            weight.grad = gradient.clone()
    assert clip_gradients(run.accelerator, task, 1.0).item() == pytest.approx(math.hypot(50.0, 0.5), rel=1e-5)
    for part, factor in ((task.model, 1 / 50), (task.adversary, 1.0)):
        for weight, gradient in zip(part.parameters(), gradients[part]):
            torch.testing.assert_close(weight.grad, gradient * factor, rtol=1e-4, atol=1e-8)
    assert set(task.parameters()) == {w for part in task.clip_groups() for w in part.parameters()}
    assert first_stage_task(adversarial=False).clip_groups() != []


def test_adam_is_given_the_betas(tmp_path):
    _, _, optimizer = make_state(small_run(tmp_path), SmallStage(betas=(0.5, 0.9)))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.9)]


def test_a_recipe_says_which_first_stage_is_built():
    recipe = replace(tiny_autoencoder().first_stage, commitment=0.5, legacy=True, attention_factors=(2,))
    vq, kl = build_first_stage(recipe), build_first_stage(replace(recipe, regulariser="kl"))
    assert type(vq) is AutoencoderVQ and type(kl) is AutoencoderKL and vq.f == kl.f == 2
    quantize = vq.quantize
    assert (quantize.embedding.num_embeddings, quantize.commitment, quantize.legacy) == (32, 0.5, True)
    assert [len(level.attn) for level in kl.encoder.down] == [len(level.attn) for level in vq.encoder.down] == [0, 1]


def test_a_recipe_says_which_distance_is_asked(lpips_weights):
    assert perceptual_distance(None) is None
    for name, kind in (("toy-features", ToyFeatures), ("lpips-alex", LPIPS), ("lpips-vgg", LPIPS)):
        found = perceptual_distance(name, lpips_weights)
        assert isinstance(found, kind) and getattr(found, "net", "") in name and not found.training
        assert not any(weight.requires_grad for weight in found.parameters())
        task = FirstStageTask(replace(tiny_autoencoder().first_stage, perceptual=name), found)
        assert not {id(w) for w in found.parameters()} & {id(w) for w in task.parameters()}  # it is not trained


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Images that runs share."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("from_data", [True, False])
def test_entries_begin_on_latents_or_near_zero(from_data, cache, tmp_path):
    recipe = tiny_autoencoder()
    recipe = replace(recipe, first_stage=replace(recipe.first_stage, from_data=from_data))
    run = open_run(recipe, tmp_path / "run", RunOptions(device="cpu", precision="fp32", cache_dir=cache))
    model = FirstStageStage(recipe, run).task.model.eval()
    entries = model.quantize.embedding.weight.detach()
    if not from_data:
        assert entries.abs().max() <= 1 / 32 and entries.unique().numel() == 32 * 4
        return
    with torch.no_grad():
        z = model.encode(through_bytes(ToyCOCO("train", size=16), 24)).permute(0, 2, 3, 1).reshape(-1, 4)
    assert (entries[:, None] - z).norm(dim=2).amin(1).max() < 1e-5
    assert len(entries.unique(dim=0)) > 24


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory, cache):
    """A run of a first stage with all that it can have, and a line in the log for each of its six steps."""
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    return folder, train_and_draw(folder, tiny_autoencoder(start=3), every=1, save_every=1e9, cache_dir=cache)


def through_bytes(dataset, n: int) -> torch.Tensor:
    """The first n images, as they come back from a cache."""
    return ((torch.stack([dataset[i]["image"] for i in range(n)]) + 1) * 127.5).round() / 127.5 - 1


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_first_stage_is_kept_with_how_it_was_made(autoencoder):
    folder, model = autoencoder
    loaded, kept = load_first_stage(folder / "model"), load_tensors(folder / "first_stage.safetensors")
    assert type(loaded) is AutoencoderVQ and not loaded.training
    assert not differences(loaded.state_dict(), model.state_dict())
    average = {k.removeprefix("ema.model."): v for k, v in kept.items() if k.startswith("ema.model.")}
    assert not differences(loaded.state_dict(), average)
    assert all(weight.requires_grad for weight in model.parameters())
    assert loaded.provenance == json.loads(json.dumps(model.provenance))
    assert recipe_from_dict(loaded.provenance["recipe"]) == tiny_autoencoder(start=3)
    last = log_of(folder)[-1]
    assert loaded.provenance["steps"] == last["step"] == 6 and loaded.provenance["precision"] == "fp32"
    for name in ("held_out", "psnr", "codes_used", "perplexity"):
        assert loaded.provenance[name] == pytest.approx(last[name], abs=1e-4)
    assert 1 <= last["codes_used"] <= 32 and 1 <= last["perplexity"] <= last["codes_used"] + 1e-3
    Image.open(folder / "samples" / "first_stage-000006.png").verify()


def test_the_loss_on_held_out_images_has_no_discriminator(autoencoder):
    """It is the sum of the paper's other terms, written out, on the first 16 images of the validation split."""
    folder, model = autoencoder
    x = through_bytes(ToyCOCO("validation", size=16), 16)
    with torch.no_grad():
        y, quantized = model(x)
        distance = ToyFeatures.from_pretrained("toy-features").distance(x, y).mean()
    expected = (x - y).abs().mean() + 5.0 * (x - y).square().mean() + 0.1 * distance + quantized.loss
    assert model.provenance["held_out"] == pytest.approx(expected.item(), abs=2e-4)


def test_the_best_is_chosen_without_the_discriminator(cache, tmp_path):
    """A discriminator with a huge weight spoils the images from step 4 on; weights of before that step are kept."""
    recipe = tiny_autoencoder(start=3, keep="best")
    game = replace(recipe.first_stage.adversarial, weight=1000.0)
    recipe = replace(recipe, first_stage=replace(recipe.first_stage, adversarial=game))
    model, lines = train_tiny(tmp_path / "run", recipe, every=1, cache_dir=cache), log_of(tmp_path / "run")
    held_out = {line["step"]: line["held_out"] for line in lines}
    best = min(held_out, key=held_out.get)
    assert load_notes(tmp_path / "run" / "first_stage.best.safetensors")["step"] == str(best) and best < 6
    assert model.provenance["held_out"] == pytest.approx(held_out[best], abs=1e-4)


@pytest.mark.parametrize("precision, furthest", [("fp64", 1e-5), ("bf16", 2e-2)])
def test_other_precisions_train_a_first_stage(precision, furthest, autoencoder, cache, tmp_path):
    """The losses are those of float32, about; the model is kept in float32."""
    folder = tmp_path / "run"
    model = train_and_draw(folder, tiny_autoencoder(start=3), every=1, precision=precision, cache_dir=cache)
    for ours, theirs in zip(log_of(folder), log_of(autoencoder[0]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=furthest)
    inside = torch.float64 if precision == "fp64" else torch.float32
    kept = load_tensors(folder / "first_stage.safetensors")
    assert {v.dtype for k, v in kept.items() if k.startswith(("task.", "ema.")) and v.dim()} == {inside}
    assert {v.dtype for v in load_tensors(folder / "model" / "model.safetensors").values()} == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32} and model.provenance[
        "precision"
    ] == precision


def test_micro_batches_with_a_discriminator_run(cache, tmp_path):
    """λ is taken for each micro-batch, so the weights are not those of whole batches; they are finite."""
    model = train_tiny(tmp_path / "run", tiny_autoencoder(4, start=2, accumulate=2), cache_dir=cache)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_compiled_discriminator_is_refused_before_anything_is_written(tmp_path):
    """Alone, and as the first stage of a diffusion model; without a discriminator there is nothing to refuse."""
    alone = tiny_autoencoder(3, start=1)
    both = replace(tiny(3), first_stage=alone.first_stage)
    for recipe in (alone, both):
        with pytest.raises(LDMError, match="compile: the adaptive weight needs a gradient in mid-step"):
            train_tiny(tmp_path / "run", recipe, compile=True)
    assert not (tmp_path / "run").exists()
    check_fit(replace(both, first_stage=replace(alone.first_stage, adversarial=None)), RunOptions(compile=True))


COMPARED = {"every": 1, "sample_every": 0, "save_every": 1e9}


def test_the_latents_of_a_kl_first_stage_for_itself_have_unit_deviation(cache, tmp_path):
    recipe = tiny_autoencoder()
    kl = replace(recipe.first_stage, regulariser="kl", perceptual=None, adversarial=None)
    train_tiny(tmp_path / "run", replace(recipe, first_stage=kl), cache_dir=cache)
    model, x = load_first_stage(tmp_path / "run" / "model"), through_bytes(ToyCOCO("train", size=16), 24)
    noise = step_randomness(1, 0, range(24), (4, 8, 8))["latent_noise"]
    assert type(model) is AutoencoderKL and model.scale_factor != 1.0
    with torch.no_grad():
        assert model.encode(x, noise).std().item() == pytest.approx(1.0, abs=0.05)


def test_both_stages_with_a_codebook(cache, tmp_path):
    """The diffusion model learns the latents before quantisation; what is saved can be loaded and asked."""
    recipe = replace(tiny(2), first_stage=tiny_autoencoder(2, start=1).first_stage)
    model = train_tiny(tmp_path / "run", recipe, cache_dir=cache)
    loaded = LatentDiffusion.from_pretrained(tmp_path / "run" / "model")
    assert type(loaded.first_stage) is AutoencoderVQ and loaded.first_stage.scale_factor == 1.0
    assert torch.equal(loaded.sample("a big red ball", steps=2), model.sample("a big red ball", steps=2))
    kept = load_tensors(tmp_path / "run" / "latents" / "train.safetensors")
    with torch.no_grad():
        z = model.first_stage.encode(through_bytes(ToyCOCO("train", size=16), 24))
    torch.testing.assert_close(kept["mean"], z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"norm": "layer"}, "unknown norm 'layer'"),
        ({"weight": -1.0}, "weight"),
        ({"layers": 3}, "16×16 pixels are too few"),
    ],
    ids=["norm", "weight", "size"],
)
def test_a_discriminator_without_sense_is_refused_before_anything_is_done(changed, message, tmp_path):
    """Its first step may come after hours."""
    recipe = tiny_autoencoder(start=1000)
    game = replace(recipe.first_stage.adversarial, **changed)
    with pytest.raises(LDMError, match=message):
        train_tiny(tmp_path / "run", replace(recipe, first_stage=replace(recipe.first_stage, adversarial=game)))
    assert not (tmp_path / "run").exists()


# Latents -------------------------------------------------------------------------------------------------------------


def test_latents_are_made_once_for_each_first_stage_and_pictures(tmp_path, monkeypatch):
    made, whole = [], latents.encode_all
    monkeypatch.setattr(latents, "encode_all", lambda *args: made.append(args[3]) or whole(*args))
    run, path = small_run(tmp_path), tmp_path / "latents" / "train.safetensors"
    pictures = cached(ToyCOCO(size=16, keys=("image", "captions")), tmp_path / "a", 70)
    others = cached(ToyCOCO(size=16, seed=1, keys=("image", "captions")), tmp_path / "b", 70)
    torch.manual_seed(0)
    first_stage = AutoencoderKL(8, (1, 2), 1, 4, True, 4).eval()
    mean, logvar = cached_latents(path, first_stage, pictures, run)
    assert mean.shape == logvar.shape == (70, 4, 8, 8) and made == [70]
    with torch.no_grad():
        posterior = first_stage.posterior(pictures.images([69, 3]))
    torch.testing.assert_close(mean[[69, 3]], posterior.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).std[[69, 3]], posterior.std, rtol=1e-4, atol=1e-5)

    again = cached_latents(path, first_stage, pictures, run)
    assert torch.equal(again[0], mean) and torch.equal(again[1], logvar) and made == [70]
    assert len(cached_latents(path, first_stage, pictures, run, 5)[0]) == 5 and made == [70, 5]
    assert torch.equal(cached_latents(path, first_stage, pictures, run)[0], mean) and made == [70, 5, 70]
    assert not torch.equal(cached_latents(path, first_stage, others, run)[0], mean) and made == [70, 5, 70, 70]
    cached_latents(path, first_stage, others, run)
    assert len(made) == 4
    first_stage.encoder.conv_in.weight.data[0, 0, 0, 0] += 0.1
    cached_latents(path, first_stage, others, run)
    assert len(made) == 5
    path.write_bytes(path.read_bytes()[:-7])  # damaged: it can be made again, so it is
    cached_latents(path, first_stage, others, run)
    cached_latents(path, first_stage, others, run)
    assert len(made) == 6


def test_the_latents_of_a_codebook_are_those_before_it(tmp_path):
    """What is kept, and what is drawn from it, equals `encode`: a point, without a width to speak of."""
    run, pictures = small_run(tmp_path), cached(ToyCOCO(size=16), tmp_path / "images", 10)
    torch.manual_seed(0)
    first_stage = AutoencoderVQ(8, (1, 2), 1, 4, num_codes=8, groups=4).eval()
    mean, logvar = cached_latents(tmp_path / "latents.safetensors", first_stage, pictures, run)
    with torch.no_grad():
        z = first_stage.encode(pictures.images(range(10)))
        on_entries = first_stage.quantize(z).z
    torch.testing.assert_close(mean, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).sample(), z, rtol=1e-4, atol=1e-5)
    assert (on_entries - z).abs().max() > 1e-2
    again = cached_latents(tmp_path / "latents.safetensors", first_stage, pictures, run)
    assert torch.equal(again[0], mean) and torch.equal(again[1], logvar)
    with torch.no_grad():
        first_stage.quantize.embedding.weight.add_(1.0)  # other weights: it does not matter which
    assert load_notes(tmp_path / "latents.safetensors")["first_stage"] != latents.weights_checksum(first_stage)
