"""A training that begins with the UNet of a saved model: new input channels change nothing at first."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from ldm_edu import LatentDiffusion, LDMError, Recipe, RunOptions, train
from ldm_edu.conditioning import Condition
from ldm_edu.data.toy.captions import VOCABULARY
from ldm_edu.training import ConditionerRecipe, DiffusionRecipe, Training, find_recipe
from ldm_edu.training.recipes import recipe_to_dict
from ldm_edu.training.state import _is_same_recipe
from ldm_edu.training.tasks import DiffusionTask, begin_with, build_conditioner, pretrained_unet

OPTIONS = RunOptions(device="cpu", precision="fp32", every=100, sample_every=0)
HOW = Training(steps=2, batch_size=4, lr=3e-3, warmup=1, images=8, held_out=4)
PLAIN = Recipe(
    "small",
    "no condition",
    "toy",
    16,
    replace(find_recipe("toy-vq-f4").first_stage, training=HOW),
    DiffusionRecipe(HOW, 32, (1,), 1, (1,), T=4),
    pretrained="toy-vq-f4",
)
HOLE = (ConditionerRecipe("InpaintingConditioner", {"first_stage": "toy-vq-f4"}),)
TEXT = (
    ConditionerRecipe("TextConditioner", {"vocabulary": VOCABULARY, "length": 24, "dim": 32, "depth": 1, "heads": 4}),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """A folder with an unconditional model."""
    folder = tmp_path_factory.mktemp("plain")
    train(PLAIN, folder, OPTIONS)
    return str(folder / "model")


def after(saved: str, recipe: Recipe = PLAIN, **diffusion) -> Recipe:
    return replace(recipe, diffusion=replace(recipe.diffusion, pretrained=saved, **diffusion))


def test_a_wider_unet_predicts_at_first_what_the_saved_one_does(saved):
    recipe = after(saved, conditioners=HOLE)
    task = DiffusionTask(recipe, build_conditioner(recipe.diffusion))
    old = pretrained_unet(recipe)
    assert old is not None
    begin_with(task.unet, old)
    x, t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3])
    concat = torch.randn(2, 4, 4, 4)
    task.unet.eval()
    torch.testing.assert_close(task.unet(x, t, Condition(concat=concat)), old(x, t))


def test_it_is_trained_from_there(saved, tmp_path):
    whole = train(after(saved, conditioners=HOLE), tmp_path, OPTIONS)
    first = next(iter(whole.unet.input_blocks[0].parameters()))
    assert first.shape[1] == 3 + 4 and first[:, 3:].abs().max() > 0
    old = LatentDiffusion.from_pretrained(saved).unet.state_dict()
    new = whole.unet.state_dict()
    near = max((new[k] - v).abs().max().item() for k, v in old.items() if new[k].shape == v.shape)
    assert 0 < near < 0.05  # two steps away from the saved weights, not from random ones
    assert whole.provenance["recipe"]["diffusion"]["pretrained"] == saved


def test_a_run_goes_on_where_the_saved_model_is_gone(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    train(after(str(copy)), tmp_path / "run", OPTIONS)
    shutil.rmtree(copy)
    longer = train(after(str(copy)), tmp_path / "run", replace(OPTIONS, extend=4))
    assert longer.provenance["diffusion"]["steps"] == 4


def test_a_recipe_of_before_the_field_is_the_same_recipe():
    now = json.dumps(recipe_to_dict(PLAIN))
    values = json.loads(now)
    del values["diffusion"]["pretrained"]
    assert _is_same_recipe(json.dumps(values), now)
    values["diffusion"]["channels"] = 64
    assert not _is_same_recipe(json.dumps(values), now)
    assert not _is_same_recipe("{", now) and not _is_same_recipe(None, now)


@pytest.mark.parametrize(
    ("diffusion", "word"),
    [
        ({"channels": 64}, "has channels=32, but the recipe says 64"),
        ({"multipliers": (1, 1)}, "has multipliers=(1,)"),
        ({"schedule": "cosine", "prediction": "v"}, "has schedule=scaled_linear"),
        ({"prediction": "v"}, "has prediction=epsilon"),
        ({"T": 8}, "has T=4"),
        ({"conditioners": TEXT}, "and no others"),
    ],
)
def test_a_model_of_another_form_is_refused(saved, tmp_path, diffusion, word):
    with pytest.raises(LDMError) as refused:
        train(after(saved, **diffusion), tmp_path, OPTIONS)
    assert "diffusion.pretrained" in str(refused.value) and word in str(refused.value)


def test_a_model_that_is_not_there_is_named_before_data_are_prepared(tmp_path):
    with pytest.raises(LDMError, match="diffusion.pretrained: .*nowhere"):
        train(after(str(tmp_path / "nowhere")), tmp_path / "run", OPTIONS)
    assert not (tmp_path / "run" / "latents").exists()


def test_only_an_unconditional_model_with_the_same_first_stage_is_taken(saved, tmp_path):
    with pytest.raises(LDMError, match="reads caption, but a training begins with the UNet of an unconditional model"):
        train(after("toy-text2image"), tmp_path, OPTIONS)
    other = replace(PLAIN, first_stage=replace(find_recipe("toy-kl-f4").first_stage, training=HOW))
    for pretrained in (None, "toy-kl-f4"):
        with pytest.raises(LDMError, match=f"pretrained should name that one, not {pretrained}"):
            train(after(saved, replace(other, pretrained=pretrained)), tmp_path, OPTIONS)
    assert not list(tmp_path.glob("*.safetensors"))
