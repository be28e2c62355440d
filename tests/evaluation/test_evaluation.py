"""Scores over many captions: what is compared with what, and what is refused."""

import copy
import inspect

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

import ldm_edu.evaluation.prompts as evaluation
from ldm_edu import LatentDiffusion, ToyCOCO, UNet, collate, diffusion_loss
from ldm_edu.data.toy.captions import read_caption, relation
from ldm_edu.denoiser.attention import CrossAttention
from ldm_edu.diffusion.sampling import SeededNoise
from ldm_edu.diffusion.schedule import NoiseSchedule
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.conditions import ConditionScores, score_condition
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.judge import PromptAccuracy, SceneReader, Share, prompt_accuracy, what
from ldm_edu.evaluation.prompts import (
    captions_of,
    choose_scale,
    diversity,
    draw_captions,
    score_prompts,
    score_reconstructions,
)
from ldm_edu.evaluation.reconstruction import Mean, score_first_stage
from ldm_edu.first_stage.autoencoder import AutoencoderKL
from ldm_edu.first_stage.quantization import AutoencoderVQ, IdentityFirstStage


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return LatentDiffusion.from_pretrained("toy-text2image")


@pytest.fixture(scope="module")
def reader() -> SceneReader:
    return SceneReader.from_pretrained("scene-reader")


def test_splits_do_not_share_captions_in_order():
    first = {split: captions_of(split, 20) for split in ("train", "validation", "test", "unseen_pairs")}
    assert len({tuple(texts) for texts in first.values()}) == 4
    assert first["test"] == [ToyCOCO("test").describe(i)[1][0] for i in range(20)]


@pytest.mark.parametrize("n", [0, -1, 10**9])
def test_too_many_captions_are_refused(n):
    with pytest.raises(LDMError, match="n="):
        captions_of("test", n)


def test_a_picture_does_not_depend_on_the_chunk(model):
    texts = captions_of("validation", 5)
    whole = draw_captions(model, texts, steps=3, chunk=5)
    torch.testing.assert_close(draw_captions(model, texts, steps=3, chunk=2), whole, atol=2e-3, rtol=0)
    torch.testing.assert_close(draw_captions(model, texts[3:], steps=3, seed=3), whole[3:], atol=2e-3, rtol=0)


def test_a_model_without_text_has_no_prompt_score(model, reader):
    silent = LatentDiffusion(model.first_stage, UNet(4, 4, 64, (1,), 1, (1,)), model.schedule, None, model.size)
    with pytest.raises(LDMError, match="without captions"):
        score_prompts(silent, reader, ["a small red ball"])


def test_the_scale_with_most_captions_wins_and_the_lower_one_of_equals(model, reader, monkeypatch):
    right = {1.0: 3, 2.0: 7, 3.0: 7, 4.0: 5}

    def pretend(model, reader, captions, scale, steps):
        share = Share(right[scale], 10)
        return PromptAccuracy(Share(10, 10), share, share, share, (), {})

    monkeypatch.setattr(evaluation, "score_prompts", pretend)
    best, scores = choose_scale(model, reader, (4.0, 3.0, 2.0, 1.0), n=10)
    assert best == 2.0 and list(scores) == [1.0, 2.0, 3.0, 4.0]


def test_nothing_is_chosen_on_test(model, reader):
    with pytest.raises(LDMError, match="validation"):
        choose_scale(model, reader, split="test")
    with pytest.raises(LDMError, match="unseen_pairs"):
        choose_scale(model, reader, split="unseen_pairs")
    with pytest.raises(LDMError, match="scales should be a list"):
        inspect.unwrap(choose_scale)(model, reader, scales=3.0)
    with pytest.raises(LDMError, match="scales"):
        choose_scale(model, reader, scales=())


# First stages --------------------------------------------------------------------------------------------------------


def first_stage(kind):
    torch.manual_seed(0)
    shape = dict(channels=8, multipliers=(1, 2, 2), blocks=1, latent_channels=3, attention=False, groups=4)
    stage = kind(**shape, **({"num_codes": 32} if kind is AutoencoderVQ else {"scale_factor": 0.5})).eval()
    torch.nn.init.normal_(stage.decoder.conv_out.weight, std=0.3)  # some values come back beyond the range
    if kind is AutoencoderVQ:
        torch.nn.init.normal_(stage.quantize.embedding.weight, std=0.3)
    return stage


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    data = ToyCOCO("validation", size=32)
    return torch.stack([data[i]["image"] for i in range(7)])


@pytest.fixture(scope="module")
def distance():
    return ToyFeatures.from_pretrained("toy-features").distance


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderVQ])
def test_a_first_stage_is_scored_picture_by_picture(kind, images, distance):
    """Against one image at a time, with other people's PSNR and SSIM, and standard errors written out."""
    from torchmetrics.functional.image import structural_similarity_index_measure as their_ssim

    stage, rows, chosen = first_stage(kind), [], []
    with torch.no_grad():
        for x in images[:, None]:
            z = stage.posterior(x).mean
            if kind is AutoencoderVQ:
                quantized = stage.quantize(z)
                chosen += quantized.indices.flatten().tolist()
                z = quantized.z
            back = stage.decoder(stage.post_quant_conv(z))
            assert back.abs().max() > 1
            back = back.clamp(-1, 1)
            error = (back - x).double().square().mean()
            similar = their_ssim((back + 1) / 2, (x + 1) / 2, data_range=1.0)
            rows.append([10 * (4 / error).log10().item(), similar.item(), distance(back, x).item()])
    scores = score_first_stage(stage, images, distance, chunk=3)
    rows = torch.tensor(rows, dtype=torch.float64)
    for mean, column in zip((scores.psnr, scores.ssim, scores.distance), rows.T):
        assert mean.value == pytest.approx(column.mean().item(), rel=1e-3, abs=1e-4)
        error = ((column - column.mean()).square().sum() / 6 / 7).sqrt()
        assert mean.error == pytest.approx(error.item(), rel=1e-2, abs=1e-5)
    assert scores.images == 7 and scores.fewer == 3 * 4**2 / 3
    if kind is AutoencoderKL:
        assert scores.usage is None and "entries used" not in str(scores)
        return
    shares = torch.bincount(torch.tensor(chosen)).double() / len(chosen)
    shares = shares[shares > 0]
    assert scores.usage.used == len(set(chosen)) > 1 and scores.usage.num_codes == 32
    assert scores.usage.perplexity == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-4)
    assert f"{scores.usage.used} of 32" in str(scores)


def test_the_chunk_does_not_matter(images, distance):
    whole, parts = (score_first_stage(first_stage(AutoencoderVQ), images, distance, chunk=n) for n in (64, 2))
    assert parts.usage == whole.usage and parts.fewer == whole.fewer
    for name in ("psnr", "ssim", "distance"):
        assert getattr(parts, name).value == pytest.approx(getattr(whole, name).value, rel=1e-4)


def test_the_identity_gives_everything_back(images, distance):
    scores = score_first_stage(IdentityFirstStage(), images, distance)
    assert scores.psnr.value > 60 and scores.ssim.value == pytest.approx(1) and scores.fewer == 1
    assert scores.distance.value == pytest.approx(0, abs=1e-6) and scores.usage is None


def test_a_mean_is_printed_with_its_error():
    mean = Mean.of(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean.value == 3.0 and mean.error == pytest.approx((14 / 3) ** 0.5 / 2)
    assert str(mean) == "3.00 ± 1.08" and str(Mean(0.5, 0.0123, 3)) == "0.500 ± 0.012"


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_pictures_are_refused(n, images, distance):
    with pytest.raises(LDMError, match=f"images: {n} are too few .*at least 2"):
        score_first_stage(IdentityFirstStage(), images[:n], distance)


def test_pictures_of_no_size_for_it_are_refused(distance):
    with pytest.raises(LDMError, match="30×32 pixels.*multiples of f = 4"):
        score_first_stage(first_stage(AutoencoderKL), torch.zeros(2, 3, 30, 32), distance)


def test_the_loss_under_three_conditions_is_the_loss_of_eq_3(model):
    """Against loops over images and levels; the differences are paired."""
    data = ToyCOCO("validation", length=3)
    batch = collate([data[i] for i in range(3)])
    scores = score_condition(model, batch, levels=2, seed=5)
    texts = {"own": batch["caption"], "other": batch["caption"][-1:] + batch["caption"][:-1], "null": [""] * 3}
    losses = {name: torch.zeros(3, 2) for name in texts}
    with torch.no_grad():
        for i in range(3):
            z, noise = model.first_stage.encode(batch["image"][i : i + 1]), SeededNoise([5 + i])
            for k, t in enumerate((250, 750)):
                eps, level = noise.noise(z.shape[1:]), torch.tensor([t])
                for name, captions in texts.items():
                    cond = model.conditioner(captions[i : i + 1])
                    losses[name][i, k] = diffusion_loss(model.unet, model.schedule, z, level, eps, cond)
    each = {name: values.mean(1) for name, values in losses.items()}
    assert scores.own.value == pytest.approx(each["own"].mean().item(), rel=1e-4)
    for name, found in (("other", scores.other), ("null", scores.null)):
        difference = each[name] - each["own"]
        assert found.value == pytest.approx(difference.mean().item(), rel=1e-3)
        assert found.error == pytest.approx((difference.std() / 3**0.5).item(), rel=1e-3)
    assert scores.images == 3 and "without condition" in str(scores)


def test_a_model_that_ignores_its_condition_has_no_difference(model):
    deaf = copy.deepcopy(model)
    for block in deaf.unet.modules():
        if isinstance(block, CrossAttention):
            torch.nn.init.zeros_(block.to_out[0].weight)
    data = ToyCOCO("validation", length=4)
    batch = collate([data[i] for i in range(4)])
    scores = score_condition(deaf, batch, levels=2)
    assert abs(scores.other.value) < 1e-6 and abs(scores.null.value) < 1e-6
    with pytest.raises(LDMError, match="the same with its condition and without"):
        deaf.sample(batch, steps=2, check=True)
    model.sample(batch, steps=1, check=True)


def test_two_conditions_are_compared_as_they_are_given(model):
    """Against loops; the same condition twice costs nothing and moves nothing."""
    data = ToyCOCO("validation", length=3)
    batch = collate([data[i] for i in range(3)])
    other = {"caption": ["a big red ball", "a tiny white can", "there is a small blue box"]}
    same, scores = (score_condition(model, batch, 2, 5, other=o) for o in ({"caption": batch["caption"]}, other))
    assert same.other.value == same.moved.value == 0
    assert (same.own, same.null) == (scores.own, scores.null)
    losses, moved = torch.zeros(3), torch.zeros(3)
    with torch.no_grad():
        for i in range(3):
            z, noise = model.first_stage.encode(batch["image"][i : i + 1]), SeededNoise([5 + i])
            for t in (250, 750):
                eps, level = noise.noise(z.shape[1:]), torch.tensor([t])
                own, theirs = (
                    model.unet(model.schedule.q_sample(z, level, eps), level, model.conditioner(captions[i : i + 1]))
                    for captions in (batch["caption"], other["caption"])
                )
                target = model.schedule.target(z, eps, level)
                losses[i] += ((theirs - target) ** 2).mean() / 2 - ((own - target) ** 2).mean() / 2
                moved[i] += ((theirs - own) ** 2).mean() / 2
    assert scores.other.value == pytest.approx(losses.mean().item(), rel=1e-3)
    assert scores.moved.value == pytest.approx(moved.sqrt().mean().item(), rel=1e-3)
    assert "the prediction moves by" in str(scores) and "+ " in str(scores)
    for wrong, message in (
        ({"caption": other["caption"][:2]}, "other: 3 images, but the conditioner reads 2 conditions"),
        ({}, "other: this model reads caption"),
        ({"caption": ["an elephant"] * 3}, "other: not in the vocabulary"),
        (7, "other should be a batch, a dict"),
    ):
        with pytest.raises((LDMError, TypeCheckError), match=message if wrong != 7 else "other"):
            score_condition(model, batch, other=wrong)
    with pytest.raises(LDMError, match="batch: this model reads caption"):
        score_condition(model, {"image": batch["image"]})
    with pytest.raises(LDMError, match="batch should be a dict with 'image'"):
        score_condition(model, {"image": [1, 2], "caption": batch["caption"]})


def test_a_loss_that_falls_has_a_minus_sign():
    scores = ConditionScores(*(Mean(v, 0.001, 5) for v in (0.03, -0.002, -0.01, 0.1)), images=8)
    assert "- 0.00200 ± 0.00100" in str(scores) and "- 0.01000" in str(scores) and "-0" not in str(scores)


@pytest.mark.parametrize("split", ["test", "unseen_pairs"])
def test_the_ceiling_is_that_of_the_true_scenes(model, reader, split):
    """Against the same by hand; and with a perfect first stage next to nothing is lost."""
    n = 70  # more than a chunk
    ceiling = score_reconstructions(model, reader, split, n)
    data = ToyCOCO(split)
    images = collate([data[i] for i in range(n)])["image"]
    with torch.no_grad():
        back = model.first_stage.reconstruct(images).clamp(-1, 1)
    by_hand = prompt_accuracy(back, captions_of(split, n), reader)
    assert ceiling.exact == by_hand.exact and ceiling.words == by_hand.words
    assert ceiling.words["left"].share > 0.9 and ceiling.words["number"].n == n
    perfect = copy.deepcopy(model)
    perfect.first_stage = IdentityFirstStage()
    assert score_reconstructions(perfect, reader, split, n).exact.right >= max(n - 2, ceiling.exact.right)


def test_scenes_that_fit_a_caption_are_what_it_says():
    rng = np.random.default_rng(0)
    for text in captions_of("unseen_pairs", 40):
        said = read_caption(text)
        for scene in evaluation._fitting_scenes(text, 3, rng):
            assert [what(thing) for thing in scene.things] == [(t.size, t.colour, t.shape) for t in said.things]
            assert all(relation(scene.things[i], scene.things[j]) == word for i, word, j in said.relations)
    crowd = " and ".join(["a big red ball"] * 12)
    with pytest.raises(LDMError, match="only 0 of 1 scenes were found that fit 'a big red ball and"):
        evaluation._fitting_scenes(crowd, 1, rng, tries=20)


def test_diversity_is_the_mean_distance_of_pairs(model, monkeypatch):
    """Of images whose distance is known: image j of caption i has the brightness that its seed says."""
    texts = ["a big red ball", "a tiny white can"]

    def pretend(model, captions, scale, steps, seed):
        assert captions == [texts[0]] * 3 + [texts[1]] * 3
        return torch.arange(6.0)[:, None, None, None].expand(6, 3, 64, 64) ** 2

    def apart(x, y):
        return (x - y).abs().mean((1, 2, 3))

    monkeypatch.setattr(evaluation, "draw_captions", pretend)
    drawn, true = diversity(model, texts, apart, n=3)
    each = (1 + 4 + 3) / 3, (7 + 16 + 9) / 3  # of 0, 1, 4 and of 9, 16, 25
    assert drawn.value == pytest.approx(sum(each) / 2) and drawn.error == pytest.approx((each[1] - each[0]) / 2)
    assert true.value > 0
    for n in (0, 1):
        with pytest.raises(LDMError, match=f"n={n} "):
            diversity(model, texts, apart, n=n)
    with pytest.raises(LDMError, match="captions should be a list of at least 2"):
        diversity(model, texts[:1], apart)
    with pytest.raises(LDMError, match="seed=-1"):
        diversity(model, texts, apart, seed=-1)
    with pytest.raises(LDMError, match="distance should give one number for each pair"):
        diversity(model, texts, lambda x, y: (x - y).abs().mean(), n=3)


def test_a_condition_needs_two_images_and_a_model_that_has_one(model):
    data = ToyCOCO("validation", length=1)
    with pytest.raises(LDMError, match="need at least 2"):
        score_condition(model, collate([data[0]]))
    unet = UNet(4, 4, 64, (1, 2), 1, (1, 2), 32)
    unconditional = LatentDiffusion(model.first_stage, unet, model.schedule, None, 64)
    with pytest.raises(LDMError, match="unconditional"):
        score_condition(unconditional, collate([data[0], data[0]]))


@pytest.mark.parametrize("levels", [0, -1, 1001])
def test_levels_that_do_not_exist_are_refused(levels, model):
    data = ToyCOCO("validation", length=2)
    with pytest.raises(LDMError, match=f"levels={levels} should be a whole number, 1 to 1000"):
        score_condition(model, collate([data[0], data[1]]), levels=levels)
    with pytest.raises(LDMError, match="batch should be a dict with 'image'"):
        score_condition(model, {"caption": ["a red ball", "a can"]})


def test_every_noise_level_is_asked_once_where_as_many_are_asked_for(model, monkeypatch):
    asked = []
    small = LatentDiffusion(model.first_stage, model.unet, NoiseSchedule(T=4), model.conditioner, model.size)
    real = type(small.schedule).q_sample
    monkeypatch.setattr(
        NoiseSchedule, "q_sample", lambda self, z, t, e: asked.append(t[0].item()) or real(self, z, t, e)
    )
    data = ToyCOCO("validation")
    score_condition(small, collate([data[i] for i in range(2)]), levels=4)
    assert sorted(set(asked)) == [0, 1, 2, 3]


def test_a_seed_of_a_narrow_kind_does_not_wrap(model):
    batch = collate([ToyCOCO("validation")[i] for i in range(2)])
    narrow = inspect.unwrap(score_condition)(model, batch, np.int64(1), np.uint8(255))
    assert narrow == score_condition(model, batch, 1, 255)


@pytest.mark.parametrize("chunk", [0, -1, 1.5, True])
def test_a_chunk_is_a_number_of_pictures(chunk, model, reader, images, distance):
    refused = pytest.raises((LDMError, TypeError, TypeCheckError), match="chunk")
    with refused:
        reader.read(torch.zeros(2, 3, 64, 64), chunk)
    with refused:
        draw_captions(model, ["a large red sphere"], chunk=chunk)
    with refused:
        score_first_stage(IdentityFirstStage(), images, distance, chunk)


def test_a_chunk_of_numpy_is_a_chunk(reader, images, distance):
    assert len(inspect.unwrap(SceneReader.read)(reader, torch.zeros(2, 3, 64, 64), np.int64(1))) == 2
    assert inspect.unwrap(score_first_stage)(IdentityFirstStage(), images, distance, np.int64(3)).images == 7


def test_no_captions_and_no_scales_are_nothing_to_draw(model, reader):
    with pytest.raises(LDMError, match="captions is empty"):
        draw_captions(model, [])
    with pytest.raises(LDMError, match="scales is empty"):
        inspect.unwrap(choose_scale)(model, reader, (scale for scale in ()), n=1)


@pytest.mark.parametrize("far", [torch.tensor(0.5), torch.zeros(7, 2), torch.zeros(6), 0.5], ids=str)
def test_a_perceptual_distance_is_one_number_for_each_picture(far, images):
    with pytest.raises((LDMError, TypeError, TypeCheckError), match="perceptual"):
        inspect.unwrap(score_first_stage)(IdentityFirstStage(), images, lambda x, y: far)


def test_infinities_of_both_signs_have_no_mean():
    with pytest.raises(LDMError, match="have a mean"):
        Mean.of(torch.tensor([float("inf"), -float("inf")]))


def test_what_cannot_be_judged_is_refused_before_anything_is_drawn(model, reader, monkeypatch):
    monkeypatch.setattr(model, "sample", None)  # a call would be an error
    for captions, said in ((["a red sphere"], "red sphere"), ("a small red sphere", "list of captions")):
        with pytest.raises(LDMError, match=said):
            score_prompts(model, reader, captions)
    monkeypatch.setattr(model, "size", 32)
    with pytest.raises(LDMError, match="32², but the judge reads those of 64²"):
        score_prompts(model, reader, ["a small red sphere"])


def test_a_condition_of_no_length_is_refused(model):
    with pytest.raises(LDMError, match="prompts: caption should have an entry"):
        model.sample({"caption": None})
    with pytest.raises(LDMError, match="image"):
        score_condition(model, {"image": torch.tensor(1.0), "caption": ["a small red sphere"]})
