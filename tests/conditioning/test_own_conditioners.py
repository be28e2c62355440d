"""A conditioning of one's own is one class and a line in a recipe: trained, resumed, sampled, saved, evaluated."""

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from own_conditioners import Brightness, ChosenMap, ClassMap, Frozen, KeptMap, Scaled, ThingCount

import ldm_edu
from ldm_edu import (
    CheckpointError,
    Condition,
    Conditioner,
    LatentDiffusion,
    LDMError,
    MergedConditioner,
    RunOptions,
    TextConditioner,
    ToyCOCO,
    collate,
    train,
)
from ldm_edu.checkpoints import Part, find_class
from ldm_edu.evaluation import score_condition
from ldm_edu.files import load_json, load_tensors
from ldm_edu.training import (
    ConditionerRecipe,
    DiffusionRecipe,
    DiffusionStage,
    FirstStageRecipe,
    Recipe,
    Training,
    open_run,
    run_stage,
)

COUNT, MAP = ConditionerRecipe("ThingCount", {"dim": 32}), ConditionerRecipe("ClassMap")
KEPT, BRIGHT = ConditionerRecipe("KeptMap"), ConditionerRecipe("Brightness")
KINDS = {
    "class index": (COUNT,),
    "map": (MAP,),
    "both": (COUNT, MAP),
    "never dropped": (KEPT,),
    "three slots": (COUNT, MAP, BRIGHT),
    "a key by argument": (ConditionerRecipe("ChosenMap", {"key": "depth"}),),
}


def recipe(*conditioners: ConditionerRecipe, steps: int = 2) -> Recipe:
    """Both stages, as small as can be, with these lines."""
    how = Training(steps=steps, batch_size=4, lr=3e-3, warmup=1, images=12, held_out=6)
    return Recipe(
        name="own",
        about="conditioners of one's own",
        dataset="toy",
        size=16,
        first_stage=FirstStageRecipe(how, channels=8, multipliers=(1, 2), groups=4),
        diffusion=DiffusionRecipe(how, 64, (1,), 1, (1,), conditioners=conditioners, drop=0.5),
    )


OPTIONS = RunOptions(device="cpu", precision="fp32", every=1, save_every=0.0, sample_every=0)


def toy_batch(n: int = 4) -> dict:
    data = ToyCOCO("validation", size=16, keys=("image", "boxes", "segmentation", "depth"))
    return collate([data[i] for i in range(n)])


def wake(model: LatentDiffusion) -> LatentDiffusion:
    """The same with random weights in the last layer: after two steps it hardly predicts anything yet."""
    torch.manual_seed(1)
    torch.nn.init.normal_(model.unet.out[-1].weight, std=0.3)
    for name, weight in model.unet.named_parameters():
        if weight.abs().max() == 0:
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """The lines of a recipe, the folder of its run, and the model."""
    folder = tmp_path_factory.mktemp("own") / "run"
    return KINDS[request.param], folder, train(recipe(*KINDS[request.param]), folder, replace(OPTIONS, sample_every=2))


def test_it_trains_and_is_saved_and_loaded(trained):
    lines, folder, model = trained
    again, batch = LatentDiffusion.from_pretrained(folder / "model"), toy_batch()
    assert type(again.conditioner) is type(model.conditioner) and again.conditioner.keys == model.conditioner.keys
    assert torch.equal(again.sample(batch, steps=2), model.sample(batch, steps=2))
    names = [part["name"] for part in again.provenance["recipe"]["diffusion"]["conditioners"]]
    config = load_json(folder / "model" / "conditioner" / "config.json")
    if len(lines) == 1:
        assert config["class"] == lines[0].name == names[0]
    else:
        assert config["class"] == "MergedConditioner"
        assert [part["class"] for part in config["conditioners"]] == [line.name for line in lines] == names
    assert (folder / "samples" / "diffusion-000002.png").exists()


def test_it_is_heard_in_samples_and_in_evaluation(trained):
    lines, _, model = trained
    model, batch = wake(model), toy_batch()
    other = {key: value[::-1] if isinstance(value, list) else value.flip(0) for key, value in batch.items()}
    assert not torch.equal(model.sample(batch, steps=2), model.sample(other, steps=2))
    scores = score_condition(model, batch, levels=2)
    assert scores.other.value != 0 and scores.images == 4
    assert (scores.null is None) == (lines == (KEPT,))
    if scores.null is not None:
        assert scores.null.value != 0
        guided = [model.sample(batch, steps=2, scale=scale, check=True) for scale in (1.0, 4.0)]
        assert not torch.equal(*guided)


def test_it_resumes_exactly(tmp_path):
    """The second stage stops after its first step; the resumed run has the weights of the straight one."""
    lines = KINDS["three slots"]
    straight = train(recipe(*lines, steps=3), tmp_path / "straight", OPTIONS)

    class Mortal(DiffusionStage):
        def batch(self, step):
            if step == 2:
                raise RuntimeError("the power goes")
            return super().batch(step)

    run = open_run(recipe(*lines, steps=3), tmp_path / "broken", OPTIONS)
    with pytest.raises(RuntimeError, match="power"):
        run_stage(run, Mortal(recipe(*lines, steps=3), run, {"first_stage": straight.first_stage}))
    run.close()
    assert load_tensors(tmp_path / "broken" / "diffusion.safetensors")["step"] == 2
    resumed = train(recipe(*lines, steps=3), tmp_path / "broken", replace(OPTIONS, resume=True))
    a, b = straight.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_its_weights_are_trained(tmp_path):
    model = train(recipe(COUNT, steps=3), tmp_path / "run", OPTIONS)
    torch.manual_seed(1)
    fresh = ThingCount(dim=32)
    assert not torch.equal(model.conditioner.tokens.weight, fresh.tokens.weight)


def test_a_loading_process_that_does_not_know_the_class_is_told_what_to_import(tmp_path):
    ThingCount().save_pretrained(tmp_path)
    code = f"from ldm_edu import Conditioner; Conditioner.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    assert "class 'ThingCount' is not known: import the module that defines it first" in done.stderr.splitlines()[-1]
    assert "TextConditioner" in done.stderr.splitlines()[-1]


def test_nothing_in_the_package_knows_these_conditioners():
    package = Path(__file__).parents[2] / "ldm_edu"
    sources = [path.read_text(encoding="utf-8") for path in package.rglob("*.py")]
    assert len(sources) > 40
    assert not [
        name for name in ("ThingCount", "ClassMap", "KeptMap", "Brightness", "ChosenMap") for s in sources if name in s
    ]


def test_arguments_that_go_to_a_base_class_are_saved(tmp_path):
    part = Scaled(gain=3.0, vocabulary=("red", "ball"), length=4, dim=32, depth=1)
    part.save_pretrained(tmp_path)
    again = Conditioner.from_pretrained(tmp_path)
    assert type(again) is Scaled and again.config == part.config and again.gain == 3.0
    with torch.no_grad():
        assert torch.equal(again(["red ball"]).context, part.eval()(["red ball"]).context)


def test_frozen_weights_stay_as_they_are_and_frozen(tmp_path):
    torch.manual_seed(1)  # the seed of the second stage
    expected = Frozen().tokens.weight
    model = train(recipe(ConditionerRecipe("Frozen")), tmp_path / "run", OPTIONS)
    assert torch.equal(model.conditioner.tokens.weight, expected)
    assert not model.conditioner.tokens.weight.requires_grad
    assert all(weight.requires_grad for weight in [*model.unet.parameters(), *model.first_stage.parameters()])


def test_the_newest_class_of_a_name_is_taken_and_never_for_one_of_the_package(tmp_path):
    """A cell that is run again defines its class again, perhaps with another base."""
    saved = {}
    for base in (TextConditioner, Conditioner):

        class Again(base):
            pass

        saved[base] = Again
    assert find_class(Conditioner, "Again") is saved[Conditioner]

    class UNet(ldm_edu.UNet):
        pass

    shipped = LatentDiffusion.from_pretrained("toy-text2image").unet
    assert type(shipped) is ldm_edu.UNet and type(UNet.from_pretrained("toy-text2image", part="unet")) is UNet
    assert type(Part.from_pretrained("toy-text2image", part="unet")) is ldm_edu.UNet


def test_a_class_of_the_package_that_a_notebook_defines_anew_is_taken_there():
    again = type("UNet", (ldm_edu.UNet,), {"__module__": "__main__"})
    assert find_class(Part, "UNet") is again
    del again
    gc.collect()  # classes are found as long as they live
    assert find_class(Part, "UNet") is ldm_edu.UNet


class Nameless(Conditioner):
    keys = ("boxes",)

    def __init__(self, *sizes):
        super().__init__()


class NoNull(ThingCount):
    null = Conditioner.null


class OneKey(ThingCount):
    keys = "boxes"


class Wrong(ThingCount):
    def forward(self, batch):
        return None


def test_arguments_without_names_are_refused_when_the_object_is_made():
    Nameless()
    with pytest.raises(TypeError, match=r"Nameless\(\*sizes\): arguments without a name cannot be saved"):
        Nameless(1, 2)


@pytest.mark.parametrize("value", [{1: 2.0}, {"class": "Vec"}, [{"class": 1}], {1, 2}, torch.ones(2)])
def test_an_argument_that_would_come_back_as_another_is_refused(value, tmp_path):
    with pytest.raises(LDMError, match="ThingCount: names cannot be written as JSON"):
        ConditionerRecipe("ThingCount", {"names": value})

    class Named(Conditioner):
        def __init__(self, names):
            super().__init__()

    with pytest.raises(CheckpointError, match="`names` cannot be written as JSON"):
        Named(value).save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, dataset, message",
    [
        (ConditionerRecipe("ThingCuont"), "toy", "class 'ThingCuont' is not known.*ThingCount"),
        (ConditionerRecipe("UNet"), "toy", "UNet is no Conditioner"),
        (ConditionerRecipe("ThingCount", {"width": 3}), "toy", "conditioner ThingCount: .*width"),
        (ConditionerRecipe("ThingCount"), "toy-faces", "read boxes, but data set 'toy-faces' has no boxes"),
        (ConditionerRecipe("ClassMap", {"side": 4}), "toy", "ClassMap: cond.concat has shape"),
        (ConditionerRecipe("NoNull"), "toy", "NoNull: NotImplementedError: NoNull defines no `null`"),
        (ConditionerRecipe("OneKey"), "toy", r"OneKey.keys should be a tuple of keys, \('boxes',\)"),
        (ConditionerRecipe("Wrong"), "toy", "(?s)Wrong: .*None"),
    ],
)
def test_a_line_that_does_not_fit_is_refused_before_anything_is_written(line, dataset, message, tmp_path):
    with pytest.raises(LDMError, match=message):
        train(replace(recipe(line), dataset=dataset), tmp_path / "run", OPTIONS)
    assert not (tmp_path / "run").exists()


def test_a_batch_without_the_key_is_refused(trained):
    lines, _, model = trained
    with pytest.raises(LDMError, match=f"reads {model.conditioner.keys[0]}.*: give a batch"):
        model.sample("a red ball")
    with pytest.raises(LDMError, match="needs prompts, or a batch with"):
        model.sample(n=2)


def test_parts_that_do_not_fit_each_other_are_refused(trained):
    lines, _, model = trained
    with pytest.raises(LDMError, match="unet was built with .*but conditioner gives"):
        LatentDiffusion(model.first_stage, model.unet, model.schedule, None, model.size)


def test_conditioners_that_are_no_tuple_of_lines_are_refused():
    how = Training(steps=1, batch_size=1, lr=1e-3)
    for wrong in (COUNT, ("ThingCount",), None):  # TypeError: from beartype, where types are checked
        with pytest.raises((LDMError, TypeError), match="conditioners"):
            DiffusionRecipe(how, conditioners=wrong)


def test_check_needs_a_condition_that_can_be_dropped(tmp_path):
    model = train(recipe(KEPT), tmp_path / "run", OPTIONS)
    with pytest.raises(LDMError, match="check: this model's condition is never dropped"):
        model.sample(toy_batch(), steps=1, check=True)


# Merging --------------------------------------------------------------------------------------------------------------


def test_merged_slots_lie_side_by_side():
    batch, count, maps = toy_batch(), ThingCount(dim=8), ClassMap()
    both = MergedConditioner([count, ThingCount(dim=8), maps, maps])
    cond = both(batch)
    assert (both.context_dim, both.concat_channels, both.vector_dim) == (8, 8, None)
    assert both.keys == ("boxes", "segmentation")
    assert torch.equal(cond.context[:, :1], count(batch).context) and cond.context.shape == (4, 2, 8)
    assert torch.equal(cond.concat, torch.cat([maps(batch).concat] * 2, 1))
    assert both.null(3).context.shape == (3, 2, 8) and both.null(3).concat.shape == (3, 8, 1, 1)
    wide = Condition.merge([Condition(concat=torch.ones(2, 1, 1, 1)), Condition(concat=torch.zeros(2, 3, 4, 4))])
    assert wide.concat.shape == (2, 4, 4, 4) and (wide.concat[:, 0] == 1).all()


def test_a_slot_that_one_never_drops_is_never_dropped():
    merged = MergedConditioner([ThingCount(), KeptMap(), ClassMap()])
    assert set(merged.null().slots()) == {"context"}
    batch = toy_batch()
    dropped = merged(batch).dropped(merged.null())
    assert torch.equal(dropped.concat, merged(batch).concat) and not torch.equal(dropped.context, merged(batch).context)


def test_contexts_of_different_widths_are_refused():
    with pytest.raises(LDMError, match=r"different widths, context_dim=\[8, 16\]"):
        MergedConditioner([ThingCount(dim=8), ThingCount(dim=16)])
    with pytest.raises(LDMError, match="cannot merge"):
        Condition.merge([Condition(context=torch.zeros(2, 3, 8)), Condition(context=torch.zeros(2, 3, 4))])
    with pytest.raises(LDMError, match="empty"):
        MergedConditioner([])
    assert Brightness().null(2).vector.shape == (2, 3) and ChosenMap("depth").keys == ("depth",)
