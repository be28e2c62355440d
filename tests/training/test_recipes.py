"""Recipes: what they refuse, how they survive JSON, what version 0.1.0 wrote, and how they differ."""

import copy
import inspect
import json
from dataclasses import replace

import pytest
from small_runs import small_diffusion, text, tiny, tiny_autoencoder

from ldm_edu.data.toy.captions import VOCABULARY
from ldm_edu.diffusion.schedule import NoiseSchedule
from ldm_edu.errors import LDMError
from ldm_edu.training.dispatch import train
from ldm_edu.training.recipes import (
    RECIPES,
    AdversarialRecipe,
    ConditionerRecipe,
    FirstStageRecipe,
    Training,
    find_recipe,
    flatten,
    recipe_differences,
    recipe_from_dict,
    recipe_to_dict,
)
from ldm_edu.training.run import RunOptions


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    recipe = find_recipe(name)
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe
    with pytest.raises(LDMError, match="no field colour"):
        recipe_from_dict(recipe_to_dict(recipe) | {"colour": 1})


def test_the_cosine_schedule_wants_v():
    """Its last level has an α of 5e-5, by which an error in the noise would be divided."""
    with pytest.raises(LDMError, match="schedule='cosine' needs prediction='v' or 'x0'"):
        replace(find_recipe("toy-text2image").diffusion, prediction="epsilon")


def test_the_noise_of_a_recipe_is_that_of_its_fields():
    diffusion = replace(tiny().diffusion, T=50, schedule="linear", prediction="x0", zero_terminal_snr=True)
    expected = NoiseSchedule(50, "linear", diffusion.beta_start, diffusion.beta_end, "x0", zero_terminal_snr=True)
    assert diffusion.noise_schedule() == expected and expected.alpha[-1] == 0
    recipe = replace(tiny(), diffusion=diffusion)
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe
    with pytest.raises(LDMError, match="zero_terminal_snr=True: no signal is left .* use 'v' or 'x0'"):
        replace(diffusion, prediction="epsilon")


def test_nonsense_in_a_recipe_is_refused():
    nonsense = [
        {"steps": 0},
        {"held_out": 0},
        {"batch_size": 0},
        {"ema": 1.0},
        {"warmup": -1},
        {"images": 0},
        {"accumulate": 0},
    ]
    nonsense += [{"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}]
    for bad in [*nonsense, {"batch_size": 6, "accumulate": 4}, {"keep": "first"}]:
        with pytest.raises(LDMError, match=list(bad)[-1]):
            Training(**({"steps": 1, "batch_size": 1, "lr": 1e-3} | bad))


def test_unknown_words_in_a_first_stage_list_the_known_ones():
    how = Training(steps=1, batch_size=1, lr=1e-3)
    with pytest.raises(LDMError, match="unknown regulariser 'vae'; known: kl, vq"):
        FirstStageRecipe(how, regulariser="vae")
    with pytest.raises(LDMError, match="'lpips'; known: toy-features, lpips-alex, lpips-vgg"):
        FirstStageRecipe(how, perceptual="lpips")


def test_the_discriminator_of_a_recipe_survives_json():
    recipe = tiny_autoencoder()
    values = json.loads(json.dumps(recipe_to_dict(recipe)))
    again = recipe_from_dict(values)
    assert again == recipe and type(again.first_stage.adversarial) is AdversarialRecipe
    values["first_stage"]["adversarial"]["colour"] = "red"
    with pytest.raises(LDMError, match="AdversarialRecipe has no field colour"):
        recipe_from_dict(values)
    del values["first_stage"]["adversarial"]["colour"], values["first_stage"]["adversarial"]["start"]
    with pytest.raises(LDMError, match="not a whole recipe.*start"):
        recipe_from_dict(values)
    assert recipe_differences(recipe, tiny_autoencoder(start=4)) == {"first_stage.adversarial.start": (3, 4)}


def test_an_error_inside_a_recipe_says_where():
    values = recipe_to_dict(find_recipe("toy-text2image"))
    with pytest.raises(LDMError, match="^text: steps=0 must be"):
        recipe_from_dict(values | {"text": values["text"] | {"steps": 0}})
    with pytest.raises(LDMError, match="^not a whole recipe: text: .*missing.*'lr'"):
        recipe_from_dict(values | {"text": {"steps": 3, "batch_size": 2}})


def test_a_mistyped_recipe_gets_the_nearest_name():
    with pytest.raises(
        LDMError, match="unknown recipe 'toy-text2img'; known: toy-text2image.*did you mean 'toy-text2image'"
    ):
        find_recipe("toy-text2img")


# Recipes of version 0.1.0 ---------------------------------------------------------------------------------------------

# As version 0.1.0 wrote them into the configs of the models that ship with the package.
OLD_TRAINING = {"warmup": 100, "decay": True, "ema": 0.998, "clip": 1.0, "weight_decay": 0.0, "betas": [0.9, 0.99]}
OLD_TRAINING |= {"accumulate": 1, "images": 20_000, "keep": "last"}
OLD_LOSS = {"kl_weight": 1e-06, "l2_weight": 5.0, "attention_factors": [], "regulariser": "kl", "num_codes": 8192}
OLD_LOSS |= {"commitment": 0.25, "legacy": False, "from_data": True, "codebook_weight": 1.0}
OLD_TEXT2IMAGE = {
    "kind": "diffusion model",
    "name": "toy-text2image",
    "about": "captions of drawn scenes to images of 64\u00b2, the model that ships with the package",
    "dataset": "toy",
    "size": 64,
    "first_stage": {
        "training": {"steps": 8000, "batch_size": 8, "lr": 0.002, **OLD_TRAINING},
        "channels": 16,
        "multipliers": [1, 2, 4, 5],
        "blocks": 1,
        "latent_channels": 4,
        "attention": True,
        "groups": 8,
        **OLD_LOSS,
        "perceptual": None,
        "perceptual_weight": 1.0,
        "adversarial": None,
    },
    "diffusion": {
        "training": {
            **{"steps": 10000, "batch_size": 64, "lr": 0.001},
            **{**OLD_TRAINING, "warmup": 300, "ema": 0.999, "images": 50_000},
        },
        "channels": 64,
        "multipliers": [1, 2],
        "blocks": 1,
        "attention_factors": [1, 2],
        "head_channels": 32,
        "text": {"length": 24, "dim": 128, "depth": 2, "heads": 4},
        "drop": 0.1,
        "T": 1000,
        "beta_start": 0.0015,
        "beta_end": 0.0195,
    },
    "seed": 0,
}
OLD_KL_F4 = {
    "kind": "first stage",
    "name": "toy-kl-f4",
    "about": "a KL-regularised first stage of f = 4 for drawn scenes",
    "dataset": "toy",
    "size": 64,
    "first_stage": {
        "training": {"steps": 6000, "batch_size": 8, "lr": 0.002, **OLD_TRAINING},
        "channels": 16,
        "multipliers": [1, 2, 4],
        "blocks": 1,
        "latent_channels": 3,
        "attention": True,
        "groups": 8,
        **OLD_LOSS,
        "perceptual": "toy-features",
        "perceptual_weight": 0.1,
        "adversarial": {"start": 4000, "weight": 0.5, "channels": 32, "layers": 2, "norm": "group"},
    },
    "seed": 0,
}
OLD_READER = {
    "kind": "scene reader",
    "name": "scene-reader",
    "about": "the judge of 54_judge, which reads toy scenes back",
    "training": {
        **{"steps": 5000, "batch_size": 32, "lr": 0.002},
        **{**OLD_TRAINING, "weight_decay": 0.01, "images": 50_000},
    },
    "channels": [32, 64, 96],
    "unseen_pairs": 0.3,
    "first_stages": ["toy-text2image"],
    "reconstructed": 0.25,
    "latent_noise": 0.3,
    "seed": 0,
}
OLD_FEATURES = {
    "kind": "toy features",
    "name": "toy-features",
    "about": "the features of 13_metrics, for a perceptual distance without downloads",
    "training": {
        **{"steps": 2500, "batch_size": 32, "lr": 0.002},
        **{**OLD_TRAINING, "weight_decay": 0.01},
    },
    "channels": [32, 64, 96, 128],
    "presence": 10.0,
    "seed": 0,
}

# What such a dict did not say, since there was no choice: dotted name to value.
SILENT = {
    "toy-text2image": {
        "first_stage.training.held_out": 64,
        "diffusion.training.held_out": 256,
        "diffusion.schedule": "scaled_linear",
        "diffusion.zero_terminal_snr": False,
        "diffusion.drop_apart": 0.0,
        "diffusion.prediction": "epsilon",
        "diffusion.conditioners.0.name": "TextConditioner",
        "diffusion.conditioners.0.arguments.vocabulary": VOCABULARY,
        "first_stage.l1_weight": 1.0,
        "text": None,
        "pretrained": None,
        "first_stage.first_logvar": 0.0,
        "diffusion.heads": None,
        "diffusion.transformer_depth": 1,
        "diffusion.dropout": 0.0,
        "diffusion.scale_shift_norm": False,
        "diffusion.resblock_updown": False,
        "diffusion.linear_projection": False,
        "diffusion.pretrained": None,
    },
    "toy-kl-f4": {
        "first_stage.training.held_out": 64,
        "first_stage.l1_weight": 1.0,
        "first_stage.first_logvar": 0.0,
    },
    "scene-reader": {"training.held_out": 256, "judged_on": 1024},
    "toy-features": {"training.held_out": 256},
}


def as_tuples(value):
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("old", [OLD_TEXT2IMAGE, OLD_KL_F4, OLD_READER, OLD_FEATURES], ids=lambda old: old["name"])
def test_a_recipe_of_the_first_version_reads_as_todays(old):
    """With the same value in each field, and what it did not say as it was done then."""
    recipe = recipe_from_dict(json.loads(json.dumps(old)))
    said = {
        name.replace("diffusion.text.", "diffusion.conditioners.0.arguments."): as_tuples(value)
        for name, value in flatten(old).items()
    }
    assert flatten(recipe_to_dict(recipe)) == said | SILENT[old["name"]]
    today = recipe_to_dict(recipe)
    assert recipe_from_dict(json.loads(json.dumps(today))) == recipe_from_dict(today) == recipe


@pytest.mark.parametrize("old", [OLD_TEXT2IMAGE, OLD_KL_F4, OLD_READER, OLD_FEATURES], ids=lambda old: old["name"])
def test_a_model_of_the_first_version_was_trained_as_its_recipe_says_today(old):
    """So a run of it goes on with today's recipe: no field has another value, but for those that were changed since."""
    changed = recipe_differences(recipe_from_dict(old), find_recipe(old["name"]))
    if old["name"] == "toy-text2image":  # it did not hear left and right (51_latent_diffusion)
        assert changed.pop("diffusion.prediction") == ("epsilon", "v")
        assert changed.pop("diffusion.schedule") == ("scaled_linear", "cosine")
        assert changed.pop("diffusion.training.steps")[0] == 10_000
        warm = {name: changed.pop(name) for name in list(changed) if name.startswith("text.")}
        assert len(warm) > 10 and {before for before, _ in warm.values()} == {None}
        assert changed.pop("text", (None,))[0] is None
    assert changed == {}


def test_old_names_of_fields_are_read():
    """And a recipe without text is one without conditioners."""
    renamed = dict(OLD_KL_F4["first_stage"])
    renamed["codes"] = renamed.pop("num_codes") + 1
    assert recipe_from_dict(OLD_KL_F4 | {"first_stage": renamed}).first_stage.num_codes == 8193
    renamed = dict(OLD_READER)
    renamed["unseen"] = renamed.pop("unseen_pairs") / 2
    assert recipe_from_dict(renamed).unseen_pairs == 0.15
    silent = recipe_from_dict(OLD_TEXT2IMAGE | {"diffusion": OLD_TEXT2IMAGE["diffusion"] | {"text": None}})
    assert silent.diffusion.conditioners == ()
    assert recipe_from_dict({k: v for k, v in OLD_TEXT2IMAGE.items() if k != "kind"}) == recipe_from_dict(
        OLD_TEXT2IMAGE
    )


def test_reading_an_old_recipe_leaves_its_dict_alone():
    before = copy.deepcopy(OLD_TEXT2IMAGE)
    recipe_from_dict(OLD_TEXT2IMAGE)
    assert OLD_TEXT2IMAGE == before


# Differences ---------------------------------------------------------------------------------------------------------


def test_differences_reach_into_conditioners():
    """By the number of the conditioner, and the name of its argument."""
    how = Training(steps=1, batch_size=1, lr=1e-3)

    def of(*conditioners):
        return replace(tiny(), diffusion=small_diffusion(how, *conditioners))

    name = "diffusion.conditioners.0.arguments.dim"
    assert recipe_differences(of(text(32)), of(text(64))) == {name: (32, 64)}
    assert recipe_differences(of(text(), text(32)), of(text(), text(64))) == {name.replace("0", "1"): (32, 64)}
    without = recipe_differences(of(text()), of())
    assert without[name] == (32, None) and without["diffusion.conditioners.0.name"] == ("TextConditioner", None)
    assert recipe_differences(of(), of()) == {} and recipe_differences(of(text()), of(text())) == {}


def test_a_conditioners_arguments_survive_json():
    """Lists come back as tuples, however deep."""
    line = ConditionerRecipe("Mine", {"sizes": [[1, 2], [3]], "names": {"a": ["b"]}, "x": None})
    assert line.arguments == {"sizes": ((1, 2), (3,)), "names": {"a": ("b",)}, "x": None}
    recipe = replace(tiny(), diffusion=replace(tiny().diffusion, conditioners=(line, text())))
    again = recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe))))
    assert again == recipe and type(again.diffusion.conditioners[0]) is ConditionerRecipe
    values = recipe_to_dict(recipe)
    values["diffusion"]["conditioners"][0]["colour"] = "red"
    with pytest.raises(LDMError, match="ConditionerRecipe has no field colour"):
        recipe_from_dict(values)


def test_a_kind_that_is_unknown_lists_the_known_ones():
    with pytest.raises(LDMError, match="kind='vae' is no kind of recipe; known: diffusion model, first stage, scene"):
        recipe_from_dict({"kind": "vae"})


@pytest.mark.parametrize("bad", [{"clip": 0.0}, {"clip": -1.0}, {"lr": 0.0}, {"weight_decay": -0.1}])
def test_numbers_that_would_train_something_else_are_refused(bad):
    with pytest.raises(LDMError, match=f"{list(bad)[0]}="):
        Training(**({"steps": 1, "batch_size": 1, "lr": 1e-3} | bad))


@pytest.mark.parametrize(
    "bad, said",
    [
        ({"drop": 1.5}, "drop=1.5"),
        ({"drop": float("nan")}, "drop=nan"),
        ({"T": 0}, "T=0"),
        ({"schedule": "sine"}, "kind='sine'"),
        ({"prediction": "u"}, "prediction='u'"),
    ],
)
def test_a_diffusion_recipe_without_sense_is_refused(bad, said):
    with pytest.raises(LDMError, match=said):
        replace(tiny().diffusion, **bad)


NO_RECIPES = {
    "no dict": (5, "a recipe should be a dict, as `recipe_to_dict` makes it, not 5"),
    "a list": ([["kind", "first stage"]], "a recipe should be a dict"),
    "a list as its kind": ({"kind": []}, r"kind=\[\] is no kind of recipe"),
    "a text as its size": ({"size": "64"}, "Recipe: size='64' should be int"),
    "no whole size": ({"size": 64.5}, "Recipe: size=64.5 should be int"),
    "true as its seed": ({"seed": True}, "Recipe: seed=True should be int"),
    "a number as its stage": ({"first_stage": 5}, "Recipe: first_stage=5 should be .*FirstStageRecipe"),
    "no stage": ({"diffusion": None}, "Recipe: diffusion=None should be .*DiffusionRecipe"),
    "a list as its stage": ({"diffusion": []}, r"Recipe: diffusion=\(\) should be .*DiffusionRecipe"),
    "training": ({"first_stage": {"training": 5}}, "FirstStageRecipe: training=5 should be .*Training"),
    "rate": ({"first_stage": {"training": {"lr": "fast"}}}, "Training: lr='fast' should be float"),
    "rate that is no number": ({"first_stage": {"training": {"lr": float("nan")}}}, "Training: lr=nan should be float"),
    "betas": ({"first_stage": {"training": {"betas": 5}}}, r"betas=5 should be tuple\[float, float\]"),
    "three betas": ({"first_stage": {"training": {"betas": [0, 0, 0]}}}, r"betas=\(0, 0, 0\) should be tuple"),
    "widths": ({"diffusion": {"multipliers": ["a"]}}, r"multipliers=\('a',\) should be tuple\[int, \.\.\.\]"),
    "conditioners": ({"diffusion": {"conditioners": 5}}, "conditioners=5 should be tuple"),
    "a conditioner": (
        {"diffusion": {"conditioners": [5]}},
        r"conditioners=\(5,\) should be tuple\[.*ConditionerRecipe, ",
    ),
    "its arguments": ({"diffusion": {"conditioners": [{"name": "A", "arguments": 5}]}}, "arguments=5 should be "),
    "text of 0.1.0": ({"diffusion": {"text": 5}}, "not a whole recipe"),
    "an unknown field": ({"sise": 64}, "Recipe has no field sise"),
}


@pytest.mark.parametrize("given, message", NO_RECIPES.values(), ids=NO_RECIPES)
def test_what_is_no_recipe_is_refused_and_the_field_named(given, message):
    """Also where nobody checks the types of arguments, as these tests do."""
    if isinstance(given, dict):
        given = merged(recipe_to_dict(find_recipe("toy-demo")), given)
    with pytest.raises(LDMError, match=message):
        inspect.unwrap(recipe_from_dict)(given)


def merged(a: dict, b: dict) -> dict:
    """The first dict, with the values of the second in the places that that one has."""
    return a | {
        name: merged(a[name], value) if isinstance(value, dict) and isinstance(a.get(name), dict) else value
        for name, value in b.items()
    }


def test_a_recipe_of_wrong_types_is_refused_where_it_is_trained(tmp_path):
    recipe = replace(find_recipe("toy-demo"))
    object.__setattr__(recipe, "seed", "0")  # past the checks of these tests
    with pytest.raises(LDMError, match="Recipe: seed='0' should be int"):
        train(recipe, tmp_path / "run", RunOptions(device="cpu"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("scene-reader", {"first_stages": ()}, "first_stages is empty: name at least one"),
        ("scene-reader", {"unseen_pairs": 1.5}, "unseen_pairs=1.5 should be a finite number, at least 0 and at most 1"),
        ("scene-reader", {"reconstructed": -0.5}, "reconstructed=-0.5 should be a finite number"),
        ("scene-reader", {"latent_noise": float("nan")}, "latent_noise=nan should be a finite number"),
        ("scene-reader", {"judged_on": 0}, "judged_on=0 should be a whole number, at least 1"),
        ("scene-reader", {"channels": (32, 0, 96)}, "channels=0 should be a whole number, at least 1"),
        ("toy-features", {"presence": 0.0}, "presence=0.0 should be a finite number, above 0"),
        (
            "toy-features",
            {"training": Training(steps=1, batch_size=1, lr=1.0, images=1)},
            "training.images=1 should be",
        ),
    ],
)
def test_numbers_that_the_judges_cannot_be_trained_with_are_named(name, changes, message):
    with pytest.raises(LDMError, match=message):
        replace(find_recipe(name), **changes)


@pytest.mark.parametrize("recipe", [tiny(), tiny_autoencoder(), *map(find_recipe, ("scene-reader", "toy-features"))])
@pytest.mark.parametrize("seed", [-1, 2**32 - 1, 2**64])
def test_a_seed_that_some_generator_could_not_take_is_refused(seed, recipe, tmp_path):
    with pytest.raises(LDMError, match=f"seed={seed} should be a whole number, 0 to 4294967294"):
        train(replace(recipe, seed=seed), tmp_path / "run", RunOptions(device="cpu"))
    assert not (tmp_path / "run").exists()


def test_features_that_cannot_be_built_are_refused_before_data_are_drawn(tmp_path):
    with pytest.raises(LDMError, match="channels should be one or more multiples of 8"):
        train(replace(find_recipe("toy-features"), channels=()), tmp_path / "run", RunOptions(device="cpu"))
    assert not (tmp_path / "run").exists()
