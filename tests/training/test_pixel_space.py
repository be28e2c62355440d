"""A model on pixels, f = 1, without a first stage; fields of a recipe that reach the UNet; a condition on latents."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import HOW, differences, of_stages, text, tiny, train_and_draw, train_tiny, weights

from ldm_edu import LatentDiffusion, LDMError, collate, load_first_stage, open_dataset, train
from ldm_edu.conditioning.condition import MergedConditioner
from ldm_edu.conditioning.spatial import InpaintingConditioner
from ldm_edu.files import load_tensors
from ldm_edu.first_stage.quantization import IdentityFirstStage
from ldm_edu.training.recipes import (
    AutoencoderRecipe,
    ConditionerRecipe,
    DiffusionRecipe,
    FirstStageRecipe,
    Recipe,
    Training,
    find_recipe,
    recipe_differences,
    recipe_from_dict,
    recipe_to_dict,
)
from ldm_edu.training.run import RunOptions
from ldm_edu.training.stages import DiffusionStage
from ldm_edu.training.tasks import DiffusionTask, build_conditioner, build_first_stage

PIXELS = FirstStageRecipe(None, multipliers=(1,), latent_channels=3, regulariser="none")
TRAINING = Training(steps=4, batch_size=4, lr=3e-3, warmup=2, images=8, held_out=4)
INPAINTING = ConditionerRecipe("InpaintingConditioner")


def pixels(*conditioners: ConditionerRecipe, **diffusion: Any) -> Recipe:
    """A UNet of two levels on images of 8 × 8."""
    shape = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_factors": (2,)} | diffusion
    what = DiffusionRecipe(TRAINING, conditioners=conditioners, **shape)
    return Recipe("pixels", "a model on pixels", "toy", 8, PIXELS, what)


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run of `pixels`, and its model."""
    folder = tmp_path_factory.mktemp("pixels") / "run"
    return folder, train_and_draw(folder, pixels())


# A run ----------------------------------------------------------------------------------------------------------------


def test_it_has_one_stage(trained):
    folder, model = trained
    lines = logged(folder)
    assert {line["stage"] for line in lines} == {"diffusion"} and lines[-1]["step"] == 4
    assert all(0 < line["loss"] < 10 for line in lines)
    assert not list(folder.glob("first_stage*")) and (folder / "diffusion.safetensors").exists()
    assert model.provenance.keys() == {"recipe", "torch", "diffusion"} and model.provenance["diffusion"]["steps"] == 4
    assert pixels().steps == 4 and pixels().trained_parts().keys() == {"diffusion"}
    assert (folder / "samples" / "diffusion-000004.png").exists()


def test_its_weights_have_moved(trained):
    assert trained[1].unet.out[2].weight.abs().max() > 0  # zero before the first step


def test_it_is_saved_and_loaded_with_a_first_stage_that_does_nothing(trained):
    folder, model = trained
    again = LatentDiffusion.from_pretrained(folder / "model")
    for stage in (model.first_stage, again.first_stage, load_first_stage(folder / "model")):
        assert type(stage) is IdentityFirstStage and stage.f == 1 and stage.scale_factor == 1
        x = torch.rand(2, 3, 8, 8) * 2 - 1
        assert torch.equal(stage.encode(x), x) and torch.equal(stage.decode(x), x)
    assert again.latent_shape == (3, 8, 8) and again.provenance["recipe"]["first_stage"]["training"] is None
    images = again.sample(n=3, steps=3, seed=5)
    assert images.shape == (3, 3, 8, 8) and images.std() > 0.05
    assert torch.equal(images, model.sample(n=3, steps=3, seed=5))


def test_it_learns_on_the_images_themselves(trained):
    """The latents that it is trained on are the pixels of the data set."""
    folder, _ = trained
    kept = (folder / "latents").glob("train*.safetensors")
    data = open_dataset("toy", split="train", size=8)
    images = torch.stack([data[i]["image"] for i in range(8)])
    found = [value for path in kept for value in load_tensors(path).values()]
    assert any(value.shape == images.shape and torch.allclose(value, images, atol=0.01) for value in found)


def test_a_run_that_is_cut_short_ends_with_the_same_bits(trained, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    class Cut(Exception):
        pass

    def stop(self, step):
        if step == 2:
            raise Cut
        return whole(self, step)

    whole = DiffusionStage.batch
    with monkeypatch.context() as patched:
        patched.setattr(DiffusionStage, "batch", stop)
        with pytest.raises(Cut):
            train_tiny(folder, pixels())
    assert not (folder / "model").exists()
    train_tiny(folder, pixels())
    assert not differences(weights(trained[0]), weights(folder))


def test_pixels_can_have_a_condition(tmp_path):
    model = train_tiny(tmp_path / "run", pixels(text()))
    again = LatentDiffusion.from_pretrained(tmp_path / "run" / "model")
    images = again.sample(["a red sphere"], steps=2)
    assert images.shape == (1, 3, 8, 8) and torch.equal(images, model.sample(["a red sphere"], steps=2))


def test_a_warm_start_of_the_text_needs_no_first_stage(tmp_path):
    recipe = replace(pixels(text()), text=replace(TRAINING, steps=2))
    model = train_tiny(tmp_path / "run", recipe)
    assert [*model.provenance] == ["recipe", "torch", "text", "diffusion"]


# What is refused ------------------------------------------------------------------------------------------------------


def test_training_of_nothing_is_refused():
    with pytest.raises(LDMError, match="regulariser='none' stands for pixels: .*training is None"):
        replace(PIXELS, training=TRAINING)


@pytest.mark.parametrize("regulariser", ["kl", "vq"])
def test_a_first_stage_without_training_is_refused(regulariser):
    with pytest.raises(LDMError, match="training is None"):
        FirstStageRecipe(None, regulariser=regulariser)


@pytest.mark.parametrize("field", [{"latent_channels": 4}, {"multipliers": (1, 2)}])
def test_pixels_have_three_channels_and_one_level(field):
    with pytest.raises(LDMError, match=r"multipliers=\(1,\) and latent_channels=3"):
        replace(PIXELS, **field)


def test_pixels_and_a_saved_first_stage_exclude_each_other():
    with pytest.raises(LDMError, match="pretrained='toy-kl-f4' names a first stage, but regulariser='none'"):
        replace(pixels(), pretrained="toy-kl-f4")


def test_pixels_alone_are_nothing_to_train(tmp_path):
    """Where the recipe is made, or at the latest where it is trained, and before anything is written."""
    with pytest.raises(LDMError, match="none"):
        train(AutoencoderRecipe("x", "nothing", "toy", 8, PIXELS), tmp_path / "run", RunOptions(**HOW))
    assert not (tmp_path / "run").exists()


def test_an_unknown_regulariser_lists_none_among_the_known():
    with pytest.raises(LDMError, match="unknown regulariser 'pixels'; known: kl, vq, none"):
        replace(PIXELS, regulariser="pixels")


@pytest.mark.parametrize("name, value", [("adversarial", {"start": 0}), ("perceptual", "toy-features")])
def test_a_loss_for_pixels_that_nothing_learns_from_does_not_stop_the_run(name, value, tmp_path):
    """Nothing reads the fields of a loss there: they change nothing."""
    values = recipe_to_dict(pixels())
    values["first_stage"][name] = value
    train_tiny(tmp_path / "run", recipe_from_dict(values))


def test_pixels_survive_json():
    for recipe in (pixels(), pixels(text(), heads=2), replace(pixels(), seed=3)):
        assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe
    values = json.loads(json.dumps(recipe_to_dict(pixels())))
    with pytest.raises(LDMError, match="first_stage: .*training is None"):
        recipe_from_dict(values | {"first_stage": values["first_stage"] | {"regulariser": "kl"}})
    changed = recipe_differences(pixels(), of_pixels(channels=64))
    assert changed == {"diffusion.channels": (32, 64)}


def of_pixels(**diffusion: Any) -> Recipe:
    return replace(pixels(), diffusion=replace(pixels().diffusion, **diffusion))


def test_a_recipe_of_before_these_fields_is_read():
    """What earlier versions wrote has none of them, and means the defaults."""
    values = recipe_to_dict(tiny())
    fields = ("heads", "transformer_depth", "dropout", "scale_shift_norm", "resblock_updown", "linear_projection")
    for name in fields:
        del values["diffusion"][name]
    assert recipe_from_dict(values) == tiny()


@pytest.mark.parametrize("size, levels", [(6, (1, 1, 1)), (9, (1, 1))])
def test_a_size_that_cannot_be_halved_is_refused(size, levels, tmp_path):
    recipe = replace(of_pixels(multipliers=levels, attention_factors=()), size=size)
    with pytest.raises(LDMError, match=f"size={size} cannot be halved"):
        train(recipe, tmp_path / "run", RunOptions(**HOW))
    assert not (tmp_path / "run").exists()


# Fields of the UNet ---------------------------------------------------------------------------------------------------

FIELDS = {
    "channels": 64,
    "multipliers": (1, 1),
    "blocks": 2,
    "attention_factors": (1, 2),
    "head_channels": 16,
    "heads": 2,
    "transformer_depth": 2,
    "dropout": 0.25,
    "scale_shift_norm": True,
    "resblock_updown": True,
    "linear_projection": True,
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("conditioners", [(), (text(),)])
def test_a_field_reaches_the_unet(name, conditioners):
    plain, other = pixels(*conditioners), pixels(*conditioners, **{name: FIELDS[name]})
    with torch.device("meta"):
        before, after = (DiffusionTask(recipe).unet.config for recipe in (plain, other))
    assert {key for key in after if after[key] != before[key]} == {name} and after[name] == FIELDS[name]


def test_a_field_changes_the_network():
    """Not only its config."""
    kinds = {"dropout": 0.25, "transformer_depth": 2, "scale_shift_norm": True, "resblock_updown": True}
    kinds |= {"linear_projection": True, "heads": 2}
    with torch.device("meta"):
        plain = str(DiffusionTask(pixels(text())).unet)
        shapes = {name: str(DiffusionTask(pixels(text(), **{name: value})).unet) for name, value in kinds.items()}
        unet = DiffusionTask(pixels(text(), heads=2)).unet
    del shapes["heads"]  # they have no weights of their own
    assert len({plain, *shapes.values()}) == 6
    assert {m.heads for m in unet.modules() if hasattr(m, "heads")} == {2}


def test_dropout_is_on_in_training_and_off_in_the_model(tmp_path):
    recipe = of_pixels(dropout=0.5)
    model = train_tiny(tmp_path / "run", recipe)
    rates = {m.p for m in model.unet.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.5} and not model.training
    again = LatentDiffusion.from_pretrained(tmp_path / "run" / "model")
    assert again.unet.config["dropout"] == 0.5
    assert torch.equal(again.sample(n=1, steps=2), again.sample(n=1, steps=2))
    assert logged(tmp_path / "run")[-1]["loss"] > 0


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"heads": 5}, "heads=5 does not divide the 64 channels"),
        ({"heads": 0}, "heads=0"),
        ({"head_channels": 48}, "head_channels=48 does not divide"),
        ({"transformer_depth": 0}, "transformer_depth=0"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"channels": 33}, "channels=33"),
        ({"attention_factors": (4,)}, "attention_factors"),
        ({"blocks": 0}, "blocks=0"),
        ({"multipliers": (1, 0)}, "multipliers"),
    ],
)
@pytest.mark.parametrize("conditioners", [(), (text(),)], ids=["unconditional", "text"])
def test_a_unet_that_cannot_be_is_refused_before_data_are_prepared(wrong, told, conditioners, tmp_path):
    with pytest.raises(LDMError, match=told):
        train(pixels(*conditioners, **wrong), tmp_path / "run", RunOptions(**HOW, cache_dir=tmp_path / "cache"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["scale_shift_norm", "resblock_updown", "linear_projection", "heads", "dropout"])
def test_a_field_of_another_type_is_refused(name):
    values = recipe_to_dict(pixels())
    values["diffusion"][name] = "yes"
    with pytest.raises(LDMError, match=f"^diffusion: .*{name}='yes' should be"):
        recipe_from_dict(values)


# A condition on latents -----------------------------------------------------------------------------------------------


def holes(n: int = 3, size: int = 16) -> dict:
    data = open_dataset("toy", split="validation", size=size, keys=("image", "mask"))
    return collate([data[i] for i in range(n)])


def inpainting(*others: ConditionerRecipe) -> Recipe:
    """`tiny`, with the hole of an image as its condition, read by its own first stage."""
    recipe = of_stages(tiny(steps=3), images=8, held_out=4)
    return replace(recipe, diffusion=replace(recipe.diffusion, conditioners=(INPAINTING, *others), drop=0.0))


@pytest.fixture(scope="module", params=["f = 2", "pixels", "with text"])
def inpainter(request, tmp_path_factory):
    """Recipe, folder and model of an inpainting run."""
    size_and_recipe = {"f = 2": inpainting(), "pixels": pixels(INPAINTING), "with text": inpainting(text())}
    recipe, folder = size_and_recipe[request.param], tmp_path_factory.mktemp("inpainting") / "run"
    return recipe, folder, train_tiny(folder, recipe)


def reader(model: LatentDiffusion) -> InpaintingConditioner:
    """The conditioner that reads the hole."""
    parts = model.conditioner.parts if isinstance(model.conditioner, MergedConditioner) else [model.conditioner]
    (found,) = [part for part in parts if isinstance(part, InpaintingConditioner)]
    return found


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_conditioner_has_the_models_own_first_stage(inpainter):
    recipe, _, model = inpainter
    found = reader(model).first_stage
    assert type(found) is type(model.first_stage) and same(found, model.first_stage)
    assert found.scale_factor == model.first_stage.scale_factor
    assert model.unet.concat_channels == recipe.first_stage.latent_channels + 1


def test_it_is_the_trained_one_and_not_a_fresh_one(inpainter):
    recipe, _, model = inpainter
    torch.manual_seed(recipe.seed)
    assert recipe.first_stage.training is None or not same(
        reader(model).first_stage, build_first_stage(recipe.first_stage)
    )


def test_it_stays_frozen(inpainter):
    """The optimiser has none of its weights, and it is in eval mode while the rest trains."""
    _, _, model = inpainter
    found = reader(model).first_stage
    assert not any(p.requires_grad for p in found.parameters())
    reader(model).train()
    assert not found.training
    model.eval()


def test_it_is_saved_and_loaded_and_draws_the_same(inpainter):
    recipe, folder, model = inpainter
    again = LatentDiffusion.from_pretrained(folder / "model")
    assert same(reader(again).first_stage, again.first_stage) and same(again.conditioner, model.conditioner)
    batch = holes(size=recipe.size) | ({"caption": ["a red cube"] * 3} if "caption" in model.conditioner.keys else {})
    images = model.sample(batch, steps=2)
    assert images.shape == (3, 3, recipe.size, recipe.size) and torch.equal(again.sample(batch, steps=2), images)
    assert all("first_stage" not in line.arguments for line in recipe.diffusion.conditioners)
    again.save_pretrained(folder / "again")
    assert same(LatentDiffusion.from_pretrained(folder / "again"), again)


def test_the_condition_is_heard(inpainter):
    """What the mask hides does not change the condition, and what it does not hide does."""
    recipe, _, model = inpainter
    batch = holes(size=recipe.size)
    hidden = batch["mask"].bool().expand_as(batch["image"])
    other = batch | {"image": torch.where(hidden, 0.3, batch["image"])}
    cond, same_cond = (reader(model)(x).concat for x in (batch, other))
    assert torch.equal(cond, same_cond)
    changed = reader(model)(batch | {"image": torch.where(hidden, batch["image"], -batch["image"])}).concat
    assert not torch.equal(cond, changed)


def test_an_inpainting_run_that_is_cut_short_ends_with_the_same_bits(tmp_path):
    """A run that goes on builds the conditioner anew, from the first stage that it has trained."""
    recipe = inpainting()
    whole = train_tiny(tmp_path / "whole", recipe)
    short = replace(recipe, diffusion=replace(recipe.diffusion, training=replace(recipe.diffusion.training, steps=3)))
    train_tiny(tmp_path / "again", short)
    (tmp_path / "again" / "diffusion.safetensors").unlink()  # as if it had been killed in between
    again = train_tiny(tmp_path / "again", recipe)
    assert same(whole, again) and same(reader(again).first_stage, whole.first_stage)


def test_a_first_stage_that_the_line_names_is_taken():
    """An argument of the recipe's line comes before the model's own."""
    line = ConditionerRecipe("InpaintingConditioner", {"first_stage": "toy-vq-f4"})
    what = replace(pixels().diffusion, conditioners=(line,))
    found = build_conditioner(what, first_stage=lambda: build_first_stage(PIXELS))
    assert same(found.first_stage, load_first_stage("toy-vq-f4"))


def test_without_a_first_stage_it_says_what_is_missing():
    with pytest.raises(LDMError, match="InpaintingConditioner.*first_stage"):
        build_conditioner(pixels(INPAINTING).diffusion)


def test_a_saved_first_stage_is_the_conditioners_too(tmp_path):
    """`pretrained` names the model's first stage; the conditioner gets the same one."""
    stage = replace(load_recipe_of("toy-vq-f4"), training=TRAINING)
    what = DiffusionRecipe(TRAINING, 32, (1,), 1, (), conditioners=(INPAINTING,), drop=0.0)
    recipe = Recipe("saved", "a saved stage", "toy", 16, stage, what, pretrained="toy-vq-f4")
    model = train_tiny(tmp_path / "run", recipe)
    assert same(reader(model).first_stage, load_first_stage("toy-vq-f4")) and same(
        reader(model).first_stage, model.first_stage
    )


def load_recipe_of(name: str) -> FirstStageRecipe:
    return find_recipe(name).first_stage
