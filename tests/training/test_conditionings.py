"""A line of a recipe trains any conditioner of the package: four steps, on the latents of a saved first stage."""

import json
from dataclasses import replace

import pytest
import torch

from ldm_edu import (
    LatentDiffusion,
    LDMError,
    Recipe,
    RunOptions,
    collate,
    load_first_stage,
    open_dataset,
    train,
)
from ldm_edu.data.toy.captions import VOCABULARY
from ldm_edu.files import load_tensors
from ldm_edu.training import (
    ConditionerRecipe,
    DiffusionRecipe,
    DiffusionStage,
    Training,
    find_recipe,
    open_run,
    run_stage,
)

OPTIONS = RunOptions(device="cpu", precision="fp32", every=100, sample_every=100)
HOW = Training(steps=4, batch_size=4, lr=3e-3, warmup=1, images=8, held_out=4)
VQ_F4, KL_F4 = (replace(find_recipe(name).first_stage, training=HOW) for name in ("toy-vq-f4", "toy-kl-f4"))


def recipe(*lines: ConditionerRecipe, dataset: str = "toy", pretrained: str = "toy-vq-f4", **diffusion) -> Recipe:
    """As small as can be: latents of 4 × 4 from images of 16 × 16, and one level."""
    what = DiffusionRecipe(HOW, 32, (1,), 1, (1,), conditioners=lines, T=4, **{"drop": 0.5} | diffusion)
    first_stage = VQ_F4 if pretrained == "toy-vq-f4" else KL_F4
    return Recipe("small", "one condition", dataset, 16, first_stage, what, pretrained=pretrained)


def line(name: str, **arguments) -> ConditionerRecipe:
    return ConditionerRecipe(name, arguments)


DEPTH = line("MapConditioner", key="depth", channels=1, factor=4, per_image=True, has_null=True)
TEXT = line("TextConditioner", vocabulary=VOCABULARY, length=24, dim=32, depth=1, heads=4)
RECIPES = {
    "class": recipe(line("ClassConditioner", classes=24, dim=32)),
    "class, vector": recipe(line("ClassConditioner", classes=24, dim=32, slot="vector")),
    "layout": recipe(line("LayoutConditioner", max_boxes=3, bins=4, dim=32, depth=1)),
    "attributes": recipe(line("AttributesConditioner", attributes=16, dim=32), dataset="toy-faces"),
    "segmentation": recipe(line("MapConditioner", key="segmentation", classes=8, factor=4, out_channels=3)),
    "low resolution": recipe(line("MapConditioner", key="low_resolution")),
    "inpainting": recipe(line("InpaintingConditioner", first_stage="toy-vq-f4")),
    "depth and text": recipe(DEPTH, TEXT, drop=0.05, drop_apart=0.3),
}


def batch_for(made: Recipe, n: int = 4) -> dict:
    data = open_dataset(made.dataset, split="validation", size=16, keys=conditioner_keys(made))
    return collate([data[i] for i in range(n)])


def conditioner_keys(made: Recipe) -> tuple[str, ...]:
    keys = {"ClassConditioner": ("class",), "LayoutConditioner": ("boxes",), "AttributesConditioner": ("attributes",)}
    keys |= {"InpaintingConditioner": ("image", "mask"), "TextConditioner": ("caption",)}
    lines = made.diffusion.conditioners
    return tuple(key for each in lines for key in keys.get(each.name) or (each.arguments["key"],))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What the run of a kind has made, and its folder; each is trained once."""
    found = {}

    def run_of(kind: str):
        if kind not in found:
            folder = tmp_path_factory.mktemp("run") / "run"
            found[kind] = train(RECIPES[kind], folder, OPTIONS), folder
        return found[kind]

    return run_of


@pytest.fixture(params=RECIPES)
def trained(request, runs):
    return RECIPES[request.param], *runs(request.param)


def test_it_trains_is_saved_and_draws_the_same_when_it_is_loaded(trained):
    made, model, folder = trained
    again, batch = LatentDiffusion.from_pretrained(folder / "model"), batch_for(made)
    assert type(again.conditioner) is type(model.conditioner) and again.conditioner.keys == conditioner_keys(made)
    images = model.sample(batch, steps=2)
    assert images.shape == (4, 3, 16, 16) and torch.equal(again.sample(batch, steps=2), images)
    assert (folder / "samples" / "diffusion-000004.png").exists()
    assert [each["name"] for each in again.provenance["recipe"]["diffusion"]["conditioners"]] == [
        each.name for each in made.diffusion.conditioners
    ]


def test_its_weights_are_trained_from_the_third_step_on(trained):
    """Before, layers that begin at zero let nothing through. Frozen weights stay as they are."""
    made, model, _ = trained
    torch.manual_seed(made.seed + 1)
    parts = getattr(model.conditioner, "parts", [model.conditioner])
    for part in parts:
        fresh = dict(type(part)(**part.config).named_parameters())
        moved = [name for name, p in part.named_parameters() if not torch.equal(p, fresh[name])]
        assert bool(moved) == any(p.requires_grad for p in part.parameters())


def test_the_first_stage_is_the_saved_one_to_the_bit(trained):
    made, model, folder = trained
    saved = load_first_stage("toy-vq-f4").state_dict()
    for found in (model.first_stage, load_first_stage(folder / "model")):
        assert found.state_dict().keys() == saved.keys()
        assert all(torch.equal(value, saved[name]) for name, value in found.state_dict().items())
    assert not (folder / "first_stage.safetensors").exists()
    assert model.provenance["recipe"]["pretrained"] == "toy-vq-f4"
    assert "first_stage" not in model.provenance and model.provenance["diffusion"]["steps"] == 4
    assert made.steps == 4 and json.loads((folder / "recipe.json").read_text())["pretrained"] == "toy-vq-f4"


def test_classes_of_boxes_are_counted_in_the_data(runs):
    model, folder = runs("layout")
    data = open_dataset("toy", split="train", size=16, keys=("boxes",))
    most = max(int(data[i]["boxes"][:, 0].max()) for i in range(8))
    config = LatentDiffusion.from_pretrained(folder / "model").conditioner.config
    assert model.conditioner.config["classes"] == config["classes"] == 1 + most


@pytest.mark.parametrize(
    "each, dataset",
    [
        (line("ClassConditioner", dim=32), "toy"),
        (line("AttributesConditioner", dim=32), "toy-faces"),
        (line("MapConditioner", key="segmentation", classes=0, factor=4), "toy"),
    ],
)
def test_classes_that_the_recipe_leaves_out_are_counted(each, dataset, tmp_path):
    model = train(recipe(each, dataset=dataset), tmp_path / "run", OPTIONS)
    assert model.conditioner(batch_for(recipe(each, dataset=dataset))).slots()


def test_a_kl_stage_from_a_folder_keeps_its_scale(tmp_path):
    saved, where = load_first_stage("toy-kl-f4"), str(tmp_path / "stage")
    saved.save_pretrained(where)
    model = train(recipe(pretrained=where), tmp_path / "run", OPTIONS)
    assert model.first_stage.scale_factor == saved.scale_factor != 1
    assert all(torch.equal(v, saved.state_dict()[name]) for name, v in model.first_stage.state_dict().items())
    again = LatentDiffusion.from_pretrained(tmp_path / "run" / "model")
    assert again.provenance["recipe"]["pretrained"] == where
    assert again.first_stage.scale_factor == saved.scale_factor
    assert torch.equal(again.sample(n=2, steps=2), model.sample(n=2, steps=2))


@pytest.mark.parametrize(
    "stage, pretrained, message",
    [
        (
            replace(KL_F4, multipliers=(1, 2)),
            "toy-kl-f4",
            r"'toy-kl-f4' has multipliers=\(1, 2, 4\), but .* says \(1, 2\)",
        ),
        (replace(VQ_F4, latent_channels=4), "toy-vq-f4", "'toy-vq-f4' has latent_channels=3, but first_stage says 4"),
        (KL_F4, "toy-features", "toy-features"),
        (KL_F4, "no-such-stage", "'no-such-stage'; shipped: .*toy-kl-f4"),
    ],
)
def test_a_recipe_that_does_not_describe_its_first_stage_is_refused_before_anything_is_written(
    stage, pretrained, message, tmp_path
):
    with pytest.raises(LDMError, match=message):
        train(replace(recipe(), first_stage=stage, pretrained=pretrained), tmp_path / "run", OPTIONS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("other", [dict(regulariser="vq"), dict(channels=128), dict(blocks=2), dict(groups=1)])
def test_a_recipe_that_describes_another_network_of_this_size_is_refused(other, tmp_path):
    """There are no such data: another error, but a later one."""
    with pytest.raises(LDMError, match="pretrained"):
        made = replace(recipe(dataset="celeba"), first_stage=replace(KL_F4, **other), pretrained="toy-kl-f4")
        train(made, tmp_path / "run", OPTIONS)


def test_parts_that_are_dropped_apart_resume_exactly(runs, tmp_path):
    """The run stops in its third step; resumed, it has the weights of the straight one."""
    made, often = RECIPES["depth and text"], replace(OPTIONS, save_every=0.0)

    class Mortal(DiffusionStage):
        def batch(self, step):
            if step == 2:
                raise RuntimeError("the power goes")
            return super().batch(step)

    run = open_run(made, tmp_path / "broken", often)
    with pytest.raises(RuntimeError, match="power"):
        run_stage(run, Mortal(made, run, {"first_stage": load_first_stage("toy-vq-f4")}))
    run.close()
    assert load_tensors(tmp_path / "broken" / "diffusion.safetensors")["step"] == 2
    resumed = train(made, tmp_path / "broken", replace(often, resume=True))
    a, b = runs("depth and text")[0].state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_parts_are_dropped_apart_while_training(tmp_path):
    run = open_run(RECIPES["depth and text"], tmp_path / "run", OPTIONS)
    stage = DiffusionStage(RECIPES["depth and text"], run, {"first_stage": load_first_stage("toy-vq-f4")})
    batch = stage.batch(1)
    assert batch["u_apart"].shape == (4, 2) and (batch["u_apart"][:, 0] != batch["u_apart"][:, 1]).all()
    assert torch.equal(stage.batch(1)["u_apart"], batch["u_apart"])
    assert not torch.equal(stage.batch(2)["u_apart"], batch["u_apart"])
    run.close()


@pytest.mark.parametrize(
    "diffusion, message",
    [
        (dict(drop_apart=0.1), "drop_apart=0.1 needs several conditioners"),
        (dict(drop_apart=1.1), "drop_apart=1.1 should be a finite number"),
        (dict(drop=-0.1), "drop=-0.1 should be a finite number"),
    ],
)
def test_shares_that_cannot_be_are_refused(diffusion, message):
    with pytest.raises(LDMError, match=message):
        recipe(TEXT, **diffusion)


@pytest.mark.parametrize(
    "each, dataset, message",
    [
        (line("ClassConditioner", classes=3, dim=32), "toy", r"ClassConditioner: class should lie in \[0, 3\)"),
        (line("AttributesConditioner", attributes=5), "toy-faces", r"attributes should be \(b, 5\)"),
        (line("AttributesConditioner", attributes=16), "toy", "read attributes, but data set 'toy' has no attributes"),
        (line("ClassConditioner", classes=3), "toy-faces", "read class, but data set 'toy-faces' has no class"),
        (line("LayoutConditioner", classes=4, max_boxes=1), "toy", "LayoutConditioner: boxes: an image has"),
        (line("MapConditioner", key="segmentation", classes=8), "toy", "MapConditioner: cond.concat has shape"),
        (line("MapConditioner", key="depth"), "toy", r"depth should have the shape \(b, 3, h, w\)"),
        (line("InpaintingConditioner", first_stage="toy-text2image"), "toy", "InpaintingConditioner: cond.concat has"),
        (line("InpaintingConditioner", first_stage="nothing"), "toy", "'nothing'; shipped"),
    ],
)
def test_a_line_that_does_not_fit_is_refused_before_anything_is_written(each, dataset, message, tmp_path):
    with pytest.raises(LDMError, match=message):
        train(replace(recipe(each, dataset=dataset), pretrained=None), tmp_path / "run", OPTIONS)
    assert not (tmp_path / "run").exists()
