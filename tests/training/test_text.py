"""The warm start of a text conditioner: riddles about captions."""

from dataclasses import replace

import pytest
import torch
from small_runs import differences, of_stages, tiny, train_tiny, weights

from ldm_edu.conditioning.text import TextConditioner, split_words
from ldm_edu.data.toy.captions import RELATIONS, VOCABULARY, relation
from ldm_edu.data.toy.datasets import ToyCOCO
from ldm_edu.data.toy.scenes import COLOURS, SHAPES, SIZES
from ldm_edu.errors import LDMError
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.training.dispatch import train
from ldm_edu.training.recipes import ConditionerRecipe, Training, recipe_from_dict, recipe_to_dict
from ldm_edu.training.run import RunOptions
from ldm_edu.training.text import RiddleTask, riddles, share_answered

LOOKS = {"size": tuple(SIZES), "colour": tuple(COLOURS), "shape": SHAPES}


def small_conditioner() -> TextConditioner:
    torch.manual_seed(0)
    return TextConditioner(VOCABULARY, 24, 32, 1, 4)


def with_text(steps: int = 6):
    """`tiny` with a warm start."""
    recipe = tiny()
    return replace(recipe, text=replace(recipe.diffusion.training, steps=steps))


def test_the_answers_are_true_of_the_scenes():
    """Not only of the captions: looks are those of the things, and sides follow from where they stand."""
    data, told = ToyCOCO("train"), 0
    for i in range(200):
        scene, texts = data.describe(i)
        for text in texts:
            answers = riddles([text], 24)
            tokens = (answers["shape"][0] >= 0).nonzero()[:, 0].tolist()
            assert len(tokens) == len(scene.things)
            words = split_words(text)
            named = []
            for k in tokens:
                looks = tuple(LOOKS[name][answers[name][0, k]] for name in LOOKS)
                assert looks[1] in words[k - 2 : k]
                named.append(next(t for t in scene.things if (t.size, t.colour, t.shape) == looks))
            for k, thing in zip(tokens, named):
                sides = {RELATIONS[j] for j in answers["sides"][0, k].nonzero()[:, 0].tolist()}
                assert sides <= {relation(thing, other) for other in named if other is not thing}
                told += len(sides)
            others = [k for k in range(24) if k not in tokens]
            assert not answers["sides"][0, others].any()
    assert told > 1000


def test_left_and_right_give_opposite_answers():
    left, right = (
        riddles([f"a small red ball {side} of a big blue box"], 24)["sides"][0] for side in ("left", "right")
    )
    assert left[3].tolist() == right[9].tolist() == [1, 0, 0, 0]
    assert left[9].tolist() == right[3].tolist() == [0, 1, 0, 0]


def test_only_nouns_count_and_right_answers_cost_nothing(monkeypatch):
    texts = ["a small red ball left of a big blue box", "there is a tiny white can"]
    task, answers = RiddleTask(small_conditioner()), riddles(texts, 24)
    right = {name: 30.0 * torch.nn.functional.one_hot(answers[name].clamp(min=0), len(LOOKS[name])) for name in LOOKS}
    right["sides"] = 60.0 * answers["sides"] - 30
    noise = {name: torch.where((answers["shape"] >= 0)[..., None], x, torch.randn_like(x)) for name, x in right.items()}
    monkeypatch.setattr(task, "logits", lambda captions: noise)
    loss, terms = task({"caption": texts, **answers})
    assert loss < 1e-4 and set(terms) == {"size", "colour", "shape", "sides"}
    assert share_answered(task, {"caption": texts, **answers}) == 1.0
    noise["sides"][0, 3] *= -1  # of two captions one is misunderstood
    assert share_answered(task, {"caption": texts, **answers}) == 0.5


def test_a_small_transformer_learns_the_riddles(tmp_path):
    """In a few hundred steps it knows left from right; a conditioner without a warm start does not."""
    recipe = of_stages(with_text(400), steps=2)
    recipe = replace(recipe, text=Training(steps=400, batch_size=32, lr=3e-3, ema=0.9, images=256, held_out=64))
    model = train(recipe, tmp_path / "run", RunOptions(device="cpu", precision="fp32", sample_every=0))
    made = model.provenance["text"]
    assert made["steps"] == 400 and made["understood"] > 0.3 and made["held_out"] < 1.0
    assert list(model.provenance)[2:] == ["first_stage", "text", "diffusion"]
    again = LatentDiffusion.from_pretrained(tmp_path / "run" / "model")
    assert recipe_from_dict(again.provenance["recipe"]) == recipe


def test_a_run_with_a_warm_start_goes_on_exactly(tmp_path):
    """Stopped in the middle of it, and at its end."""
    recipe = with_text()
    train_tiny(tmp_path / "straight", recipe)
    import ldm_edu.training.resume as resume

    real, folder = resume.save_state, tmp_path / "broken"
    for name, step in (("text", 3), ("text", 6), ("diffusion", 2)):

        def once(run, stage, state, *more):
            real(run, stage, state, *more)
            if (stage.name, state.step) == (name, step):
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resume, "save_state", once)
            with pytest.raises(KeyboardInterrupt):
                train_tiny(folder, recipe)
    train_tiny(folder, recipe)
    assert not differences(weights(tmp_path / "straight"), weights(folder))
    assert any(name.startswith("text.safetensors") for name in weights(folder))


def test_the_diffusion_model_begins_with_the_trained_text(tmp_path):
    """With a learning rate of nearly 0 in the second stage, its conditioner is the one of the warm start."""
    recipe = with_text(20)
    recipe = replace(recipe, diffusion=replace(recipe.diffusion, training=replace(recipe.diffusion.training, lr=1e-12)))
    model, bare = train_tiny(tmp_path / "a", recipe), train_tiny(tmp_path / "b", replace(recipe, text=None))
    state = {
        k.removeprefix("ema.conditioner."): v for k, v in weights(tmp_path / "a").items() if "text.safetensors: " in k
    }
    trained, untrained = (m.conditioner.transformer.tokens.weight for m in (model, bare))
    kept = next(v for k, v in state.items() if k.endswith("tokens.weight") and torch.allclose(v, trained, atol=1e-6))
    assert kept is not None and (trained - untrained).abs().max() > 1e-3


@pytest.mark.parametrize(
    "conditioners",
    [
        (),
        (ConditionerRecipe("TextConditioner", {"vocabulary": VOCABULARY, "length": 24, "dim": 32, "strict": False}),),
    ],
)
def test_riddles_need_toy_captions(conditioners, tmp_path):
    recipe = with_text()
    recipe = replace(recipe, diffusion=replace(recipe.diffusion, conditioners=conditioners))
    with pytest.raises(LDMError, match="text: riddles are about"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_recipes_without_a_warm_start_are_read_as_before():
    values = recipe_to_dict(tiny())
    del values["text"]
    assert recipe_from_dict(values) == tiny()
    assert recipe_from_dict(recipe_to_dict(with_text())) == with_text()
    with pytest.raises(LDMError):
        recipe_from_dict(recipe_to_dict(tiny()) | {"text": {"steps": 3}})
