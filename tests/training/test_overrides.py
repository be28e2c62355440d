"""Fields of a recipe that are set by name, and the commands that set and list them."""

import json
import shlex
from dataclasses import replace

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from ldm_edu.cli import app
from ldm_edu.errors import LDMError
from ldm_edu.training.overrides import as_overrides, with_overrides
from ldm_edu.training.recipes import (
    RECIPES,
    AdversarialRecipe,
    ConditionerRecipe,
    Recipe,
    Training,
    find_recipe,
    recipe_differences,
    recipe_from_dict,
    recipe_to_dict,
)

SHIPPED, ALONE, TEXT = find_recipe("toy-demo"), find_recipe("toy-faces-l1"), find_recipe("toy-text2image")


def plain_demo():
    """toy-demo without a warm start of the text, and with the usual values in its diffusion."""
    (line,) = SHIPPED.diffusion.conditioners
    usual = {"schedule": "scaled_linear", "prediction": "epsilon", "drop": 0.1}
    line = replace(line, arguments={**line.arguments, "depth": 2})
    training = replace(SHIPPED.diffusion.training, lr=2e-3, steps=600)
    diffusion = replace(SHIPPED.diffusion, conditioners=(line,), training=training, **usual)
    return replace(SHIPPED, text=None, diffusion=diffusion)


DEMO = plain_demo()


def changes(*overrides: str, recipe=DEMO) -> dict:
    """The fields that differ afterwards, with their new values."""
    return {name: new for name, (_, new) in recipe_differences(recipe, with_overrides(recipe, overrides)).items()}


def refused(*overrides: str, recipe=DEMO) -> str:
    """The message of the error."""
    with pytest.raises(LDMError) as error:
        with_overrides(recipe, overrides)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and message.isprintable() and len(message) < 500
    return message


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, name, value",
    [
        ("diffusion.training.lr=1e-4", "diffusion.training.lr", 1e-4),
        ("diffusion.training.lr=1E-04", "diffusion.training.lr", 1e-4),
        ("diffusion.training.lr=1", "diffusion.training.lr", 1.0),
        ("diffusion.training.steps=40_000", "diffusion.training.steps", 40_000),
        ("diffusion.training.betas=[0, 0.5]", "diffusion.training.betas", (0.0, 0.5)),
        ("diffusion.training.images=null", "diffusion.training.images", None),
        ("diffusion.training.decay=false", "diffusion.training.decay", False),
        (" diffusion.multipliers = [1,2,4] ", "diffusion.multipliers", (1, 2, 4)),
        ("first_stage.attention_factors=[1]", "first_stage.attention_factors", (1,)),
        ("first_stage.perceptual=toy-features", "first_stage.perceptual", "toy-features"),
        ("diffusion.conditioners.0.arguments.dim=32", "diffusion.conditioners.0.arguments.dim", 32),
        ("diffusion.conditioners[0].arguments.dim=32", "diffusion.conditioners.0.arguments.dim", 32),
        (
            "diffusion.conditioners.0.arguments.vocabulary=[a,b]",
            "diffusion.conditioners.0.arguments.vocabulary",
            ("a", "b"),
        ),
        ("diffusion.conditioners.0.arguments.strict=false", "diffusion.conditioners.0.arguments.strict", False),
        ("diffusion.conditioners.0.arguments={depth: 1}", "diffusion.conditioners.0.arguments.depth", 1),
        ("seed=7", "seed", 7),
        ("name=mine", "name", "mine"),
        ("about='once more: longer'", "about", "once more: longer"),
        ("pretrained=/a/b=c", "pretrained", "/a/b=c"),
    ],
)
def test_a_field_is_set_to_the_value_in_its_type(override, name, value):
    assert changes(override) == {name: value}
    (new,) = changes(override).values()
    assert type(new) is type(value)


def test_a_changed_recipe_is_one_that_could_have_been_written_so():
    changed = with_overrides(DEMO, ["diffusion.training.lr=1", "first_stage.training.steps=5", "seed=3"])
    first, second = DEMO.first_stage, DEMO.diffusion
    first = replace(first, training=replace(first.training, steps=5))
    second = replace(second, training=replace(second.training, lr=1.0))
    assert changed == replace(DEMO, first_stage=first, diffusion=second, seed=3)
    assert json.dumps(recipe_to_dict(changed)) == json.dumps(recipe_to_dict(recipe_from_dict(recipe_to_dict(changed))))
    assert with_overrides(DEMO, []) == DEMO


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_every_field_of_every_recipe_is_listed_as_it_is_set(recipe):
    """All of them at once, and of one recipe each line alone."""
    listed = as_overrides(recipe)
    assert len(listed) >= 15 and not any(line.startswith("kind") for line in listed)
    assert recipe != DEMO or all(with_overrides(recipe, [line]) == recipe for line in listed)
    assert with_overrides(replace(recipe, name="other", about="none: [1", seed=9), listed) == recipe


def test_texts_that_look_like_something_else_are_listed_in_quotes():
    for text in ("null", "1e-4", "on", "a: b", "[1]", "it's", 'a "b"', " a", "ä², #1", "${b}"[1:], "x # y", "a,b"):
        assert with_overrides(DEMO, as_overrides(replace(DEMO, about=text))).about == text


def test_a_list_without_entries_is_listed_too():
    alone = replace(DEMO, diffusion=replace(DEMO.diffusion, conditioners=()))
    assert "diffusion.conditioners=[]" in as_overrides(alone)
    assert with_overrides(DEMO, as_overrides(alone)) == alone
    assert not any(line.startswith("diffusion.conditioners=") for line in as_overrides(DEMO))


def test_of_two_values_for_a_field_the_last_one_counts():
    assert changes("seed=1", "seed=2") == {"seed": 2}
    assert changes("text={steps: 3, batch_size: 4, lr: 1}", "text=null") == {}


def test_a_dict_sets_the_fields_that_it_names_and_leaves_the_others():
    assert changes("diffusion={T: 500, training: {lr: 1e-4}}") == {"diffusion.T": 500, "diffusion.training.lr": 1e-4}


# Parts that are not there yet ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ("first_stage.adversarial.start=100", "first_stage.adversarial.weight=1"),
        ("first_stage.adversarial={start: 100, weight: 1}",),
    ],
    ids=["fields", "dict"],
)
def test_a_part_that_is_none_is_built_when_it_is_complete(overrides):
    made = with_overrides(ALONE, overrides)
    assert made.first_stage.adversarial == AdversarialRecipe(100, weight=1.0)
    assert with_overrides(made, ["first_stage.adversarial=null"]) == ALONE


def test_a_part_that_is_not_complete_says_what_it_needs():
    said = refused("first_stage.adversarial.weight=0.75", "seed=1", recipe=ALONE)
    assert said == "first_stage.adversarial.weight=0.75: more is needed there: set first_stage.adversarial.start, too"
    assert "set text.steps and text.batch_size, too" in refused("text.lr=1e-3")
    text = with_overrides(DEMO, ["text.lr=1e-3", "text.batch_size=8", "text.steps=10"]).text
    assert text == Training(10, 8, 1e-3)


def test_conditioners_are_numbered_and_one_more_can_follow():
    line = "{name: ClassConditioner, arguments: {classes: 24, dim: 64}}"
    new = ConditionerRecipe("ClassConditioner", {"classes": 24, "dim": 64})
    (text,) = DEMO.diffusion.conditioners
    for overrides, conditioners in {
        (f"diffusion.conditioners=[{line}]",): (new,),
        (f"diffusion.conditioners.1={line}",): (text, new),
        ("diffusion.conditioners.1.name=ClassConditioner", "diffusion.conditioners.1.arguments.classes=24",
         "diffusion.conditioners.1.arguments.dim=64"): (text, new),
        ("diffusion.conditioners=[]",): (),
    }.items():  # fmt: skip
        assert with_overrides(DEMO, overrides).diffusion.conditioners == conditioners
    assert "one more would be diffusion.conditioners.1" in refused("diffusion.conditioners.2.name=a")
    assert "set diffusion.conditioners.1.name, too" in refused("diffusion.conditioners.1.arguments.dim=3")
    for wrong in ("3", "null", "[3]", "a", "[{arguments: {}}]"):
        assert refused(f"diffusion.conditioners={wrong}").startswith("diffusion.conditioners")


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, said",
    [
        ("diffusion.training.steps=many", "diffusion.training.steps=many should be int"),
        ("diffusion.training.steps=1e4", "diffusion.training.steps=10000.0 should be int, such as 10000"),
        ("diffusion.training.steps=null", "diffusion.training.steps=null should be int"),
        ("diffusion.training.steps=true", "diffusion.training.steps=true should be int"),
        ('diffusion.training.lr="1e-4"', "diffusion.training.lr=1e-4 should be float; without quotes it is a number"),
        ("diffusion.training.lr=.inf", "diffusion.training.lr=Infinity should be a finite number"),
        ("diffusion.training.lr=" + "9" * 400, "should be a finite number"),
        ("diffusion.training.decay=1", "diffusion.training.decay=1 should be bool"),
        ("diffusion.training.images=None", "should be int | None; in YAML, none is written null"),
        ("first_stage.perceptual=None", "first_stage.perceptual=None is a text; in YAML, none is written null"),
        ("diffusion.multipliers=(1,2)", "should be tuple[int, ...]; in YAML, a list is written [1, 2, 4]"),
        ("diffusion.multipliers=[1,two]", 'diffusion.multipliers=[1,"two"] should be tuple[int, ...]'),
        ("diffusion.training.betas=[0.9]", "diffusion.training.betas=[0.9] should be tuple[float, float]"),
        ("name=2026", "name=2026 should be str; in quotes inside the quotes of the shell it is a text"),
        ("diffusion.training={lr: fast}", "diffusion.training.lr=fast should be float"),
        ("diffusion=5", "diffusion=5 has fields of its own: set one, such as diffusion.training"),
        ("diffusion=null", "diffusion=null should be DiffusionRecipe"),
        ("first_stage.adversarial=5", "has fields of its own: set one, such as first_stage.adversarial.start"),
        ("diffusion.conditioners.0.arguments=5", "diffusion.conditioners.0.arguments=5 should be a dict"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_named_with_field_value_and_type(override, said):
    assert said in refused(override)


@pytest.mark.parametrize(
    "override, said",
    [
        ("lr=1e-4", "did you mean diffusion.training.lr or first_stage.training.lr?"),
        ("optim.lr=1e-4", "did you mean diffusion.training.lr or first_stage.training.lr?"),
        ("diffusion.trainnin.lr=1e-4", "did you mean diffusion.training.lr or first_stage.training.lr?"),
        ("zero_terminal=true", "did you mean diffusion.zero_terminal_snr?"),
        ("adversarial.start=5", "did you mean first_stage.adversarial.start?"),
        ("diffusion.training.rate=1", "diffusion.training has steps, batch_size, lr, "),
        ("first_stage.adversarial.x=1", "first_stage.adversarial has start, weight, "),
        (
            "diffusion={training: {rate: 1}}",
            "diffusion.training.rate is no field of recipe toy-demo; diffusion.training has",
        ),
        ("qqq=1", "qqq is no field of recipe toy-demo; `ldm-edu recipes toy-demo` lists its fields"),
        ("diffusion.T.x=1", "diffusion.T.x is no field"),
        ("diffusion.conditioners.first.name=a", "did you mean diffusion.conditioners.0.name"),
        ("diffusion.conditioners.0.arguments..=2", "is no field"),
        ("x\x1b[31m=1", "is no field"),
    ],
)
def test_an_unknown_name_brings_those_that_may_be_meant(override, said):
    assert said in refused(override)


def test_the_kind_cannot_be_set():
    assert "take another recipe" in refused("kind=first stage")


@pytest.mark.parametrize("override", ["seed", "seed=", "=5", "", "  = ", "name=  "])
def test_what_is_no_assignment_is_refused(override):
    assert "should be name=value, such as diffusion.training.lr=1e-4" in refused(override)


@pytest.mark.parametrize("value", ["017", "1:30", "0x10", "0b11", "-010"])
def test_numbers_that_yaml_reads_in_another_base_are_refused(value):
    said = refused(f"seed={value}")
    assert f"seed={value}: YAML reads this as " in said and "write decimal numbers" in said
    assert ("leading zeros" in said) is (value in ("017", "-010"))
    assert "YAML reads this as [" in refused(f"diffusion.multipliers=[1,{value}]")


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:HOME}",
        "a${oc.env:HOME}",
        "${seed}",
        "???",
        "[${oc.env:HOME}]",
        "{a: '${oc.env:HOME}'}",
        "${spy:}",
        "${",
        "a${b",
    ],
)
def test_nothing_is_looked_up_elsewhere(value):
    asked = []
    OmegaConf.register_resolver("spy", lambda *_: asked.append(1), replace=True)
    for name in ("name", "seed", "pretrained", "diffusion.conditioners.0.arguments.vocabulary"):
        said = refused(f"{name}={value}")
        assert "write the value itself" in said or "this is no YAML" in said
    assert not asked


@pytest.mark.parametrize(
    "value",
    [
        "[" * 100_000,
        "[" * 900 + "]" * 900,
        "- " * 999 + "1",
        "{a: " * 500 + "}" * 500,
        "{1: 2}",
        "{a: 1, a: 2}",
        "{a: 1",
    ]
    + ["!!python/object/apply:os.system [x]", "[&a [1], *a]", "*a", "\x1b[31m", "9" * 5000, "{[1]: 2}"],
    ids=lambda value: value[:12],
)
def test_hostile_values_are_refused_in_one_line(value):
    for name in ("seed", "diffusion.conditioners.0.arguments.vocabulary"):
        refused(f"{name}={value}")


def test_what_the_recipe_itself_refuses_is_prefixed_with_its_cause():
    assert refused("seed=1", "diffusion.training.lr=-1", "name=a").startswith("diffusion.training.lr=-1: ")
    assert refused("seed=1", "diffusion.schedule=cosine").startswith("diffusion.schedule=cosine: ")
    assert changes("diffusion.schedule=cosine", "diffusion.prediction=v")
    both = "diffusion.training.lr=-1, diffusion.training.clip=-1: "
    assert refused("diffusion.training.lr=-1", "diffusion.training.clip=-1").startswith(both)
    assert "known: toy-features" in refused("first_stage.perceptual=lpips")


def test_what_is_no_recipe_or_no_list_is_refused():
    for wrong in ({"recipe": "toy-demo", "overrides": []}, {"recipe": DEMO, "overrides": "seed=1"}):
        with pytest.raises((LDMError, TypeError)):
            with_overrides(**wrong)


# The command line ----------------------------------------------------------------------------------------------------


def typed(*words: str):
    return CliRunner().invoke(app, list(words))


def test_the_command_lists_the_fields_as_it_takes_them():
    done = typed("recipes", "toy-faces-l1")
    assert done.exit_code == 0 and done.output.splitlines() == as_overrides(ALONE)
    assert "first_stage.training.lr=0.002" in done.output.splitlines()
    assert typed("recipes").output.count("steps)") == len(RECIPES)
    wrong = typed("recipes", "toy-dmo")
    assert wrong.exit_code == 1 and "did you mean 'toy-demo'?" in wrong.output


def test_the_command_trains_the_changed_recipe_and_shows_the_changes(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr("ldm_edu.cli.train_recipe", lambda recipe, *_: taken.append(recipe))
    words = [
        "train",
        "toy-demo",
        "--out",
        str(tmp_path / "run"),
        "--set",
        "seed=5",
        "--set",
        "diffusion.training.lr=1e-4",
    ]
    done = typed(*words, "--max-steps", "20")
    assert done.exit_code == 0, done.output
    assert taken == [with_overrides(SHIPPED, ["seed=5", "diffusion.training.lr=1e-4"]).shortened(20)]
    lines = [line.split() for line in done.output.splitlines()]
    assert ["seed", "0", "->", "5"] in lines and ["diffusion.training.lr", "0.003", "->", "0.0001"] in lines
    steps = str(SHIPPED.diffusion.training.steps)
    assert ["diffusion.training.steps", steps, "->", "20"] in lines and len([x for x in lines if "->" in x]) == 5
    assert "->" not in typed("train", "toy-demo").output


def test_a_wrong_override_ends_the_command_with_one_line(tmp_path):
    done = typed("train", "toy-demo", "--out", str(tmp_path / "run"), "--set", "lr=1e-4")
    assert done.exit_code == 1 and len(done.output.splitlines()) == 1 and "did you mean" in done.output
    assert not (tmp_path / "run").exists()


def test_the_command_goes_on_with_the_same_overrides_only_and_extends(tmp_path):
    """A folder from its first step to its extension, as somebody types it."""
    line = f"train toy-faces-l1 --device cpu --out {tmp_path}/run --cache-dir {tmp_path}/cache --max-steps 1 --every 1 "
    line += "--set size=16 --set first_stage.channels=8 --set first_stage.multipliers=[1,2] --set first_stage.groups=4 "
    line += "--set 'first_stage.training={images: 8, held_out: 8, decay: false}'"
    words = shlex.split(line)
    done = typed(*words)
    assert done.exit_code == 0, done.output
    kept = recipe_from_dict(json.loads((tmp_path / "run" / "recipe.json").read_text()))
    assert not isinstance(kept, Recipe) and kept.first_stage.training.images == 8 and kept.steps == 1
    assert typed(*words, "--resume").exit_code == 0
    other = typed(*words, "--set", "seed=4", "--resume")
    assert other.exit_code == 1 and "(seed was 0 and is 4)" in other.output
    longer = typed(*words, "--extend", "3")
    assert longer.exit_code == 0 and "first_stage 3/3" in longer.output, longer.output
    refusal = typed(*words, "--extend", "2")
    assert refusal.exit_code == 1 and "extend=2 should be the steps of first_stage in all" in refusal.output
