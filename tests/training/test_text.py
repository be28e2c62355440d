"""The warm start of a text conditioner: riddles about captions."""

from dataclasses import replace

import pytest
import torch
from small_runs import HOW, differences, of_stages, tiny, train_tiny, weights

from ldm_edu.conditioning.text import TextConditioner, split_words
from ldm_edu.data.toy.captions import RELATIONS, VOCABULARY, relation
from ldm_edu.data.toy.datasets import ToyCOCO
from ldm_edu.data.toy.scenes import COLOURS, SHAPES, SIZES
from ldm_edu.errors import LDMError
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.training.dispatch import train
from ldm_edu.training.loop import micro_batches
from ldm_edu.training.recipes import ConditionerRecipe, Training, recipe_from_dict, recipe_to_dict
from ldm_edu.training.resume import run_stage
from ldm_edu.training.run import RunOptions, open_run
from ldm_edu.training.text import RiddleTask, TextStage, riddles, share_answered

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
    kept = [v for k, v in state.items() if k.endswith("tokens.weight")]
    assert any(torch.allclose(v, trained, atol=1e-6) for v in kept) and (trained - untrained).abs().max() > 1e-3


def test_micro_batches_have_the_gradient_of_the_whole_batch():
    """Although captions have one to three nouns."""
    texts = [ToyCOCO("train").describe(i)[1][0] for i in range(16)]
    task, batch = RiddleTask(small_conditioner()).double(), {"caption": texts, **riddles(texts, 24)}

    def gradient(batches):
        loss = sum(task(part)[0] for part in batches) / len(batches)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(task.parameters()))])

    for n in (2, 4, 16):
        torch.testing.assert_close(gradient(micro_batches(batch, n)), gradient([batch]), rtol=1e-9, atol=1e-12)


def test_after_the_warm_start_the_conditioner_is_trained_as_without_it(tmp_path):
    """With its dropout, and what is frozen stays frozen."""

    class Frozen(TextConditioner):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.transformer.tokens.requires_grad_(False)
            self.modes = []

        def forward(self, batch):
            self.modes.append(self.training)
            return super().forward(batch)

    recipe = with_text(2)
    (line,) = recipe.diffusion.conditioners
    recipe = replace(recipe, diffusion=replace(recipe.diffusion, conditioners=(replace(line, name="Frozen"),)))
    run = open_run(recipe, tmp_path / "run", RunOptions(**HOW))
    stage = TextStage(recipe, run, {})
    before = stage.task.conditioner.transformer.tokens.weight.clone()
    conditioner = stage.finish(run_stage(run, stage)[0])
    run.close()
    assert conditioner.training and not conditioner.transformer.tokens.weight.requires_grad
    assert conditioner.transformer.positions.weight.requires_grad
    assert torch.equal(conditioner.transformer.tokens.weight, before)


def test_a_caption_that_is_too_long_is_named():
    with pytest.raises(LDMError, match="at most 5 words, this one has 9: 'a small red ball"):
        riddles(["a small red ball and a big blue box"], 5)


def test_a_recipe_of_photographs_has_no_riddles(tmp_path):
    with pytest.raises(LDMError, match="dataset should be 'toy'"):
        train(replace(with_text(), dataset="folder"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
