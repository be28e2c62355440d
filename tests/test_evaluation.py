"""Scores over many captions: what is compared with what, and what is refused."""

import pytest
import torch

import ldm_edu.evaluation as evaluation
from ldm_edu import LatentDiffusion, ToyCOCO, UNet
from ldm_edu.evaluation import EvaluationError, captions_of, choose_scale, draw_captions, score_prompts
from ldm_edu.judge import PromptAccuracy, SceneReader, Share


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return LatentDiffusion.from_pretrained("toy-text2image")


@pytest.fixture(scope="module")
def reader() -> SceneReader:
    return SceneReader.from_pretrained("scene-reader")


def test_splits_do_not_share_captions_in_order():
    first = {split: captions_of(split, 20) for split in ("train", "validation", "test", "unseen")}
    assert len({tuple(texts) for texts in first.values()}) == 4
    assert first["test"] == [ToyCOCO("test").describe(i)[1][0] for i in range(20)]


@pytest.mark.parametrize("n", [0, -1, 10**9])
def test_too_many_captions_are_refused(n):
    with pytest.raises(EvaluationError, match="n="):
        captions_of("test", n)


def test_a_picture_does_not_depend_on_the_chunk(model):
    texts = captions_of("validation", 5)
    whole = draw_captions(model, texts, steps=3, chunk=5)
    torch.testing.assert_close(draw_captions(model, texts, steps=3, chunk=2), whole, atol=2e-3, rtol=0)
    torch.testing.assert_close(draw_captions(model, texts[3:], steps=3, seed=3), whole[3:], atol=2e-3, rtol=0)


def test_a_model_without_text_has_no_prompt_score(model, reader):
    silent = LatentDiffusion(model.first_stage, UNet(4, 4, 64, (1,), 1, (1,)), model.schedule, None, model.size)
    with pytest.raises(EvaluationError, match="without captions"):
        score_prompts(silent, reader, ["a small red ball"])


def test_the_scale_with_most_captions_wins_and_the_lower_one_of_equals(model, reader, monkeypatch):
    right = {1.0: 3, 2.0: 7, 3.0: 7, 4.0: 5}

    def pretend(model, reader, captions, scale, steps):
        share = Share(right[scale], 10)
        return PromptAccuracy(share, share, share, share, (), {})

    monkeypatch.setattr(evaluation, "score_prompts", pretend)
    best, scores = choose_scale(model, reader, (4.0, 3.0, 2.0, 1.0), n=10)
    assert best == 2.0 and list(scores) == [1.0, 2.0, 3.0, 4.0]


def test_nothing_is_chosen_on_test(model, reader):
    with pytest.raises(EvaluationError, match="validation"):
        choose_scale(model, reader, split="test")
    with pytest.raises(EvaluationError, match="scales"):
        choose_scale(model, reader, scales=())
