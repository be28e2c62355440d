"""The paper's tables 12 to 15 as recipes: what the tables print, the sizes, and a small version of each that trains."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from ldm_edu import LatentDiffusion, collate, load_first_stage, open_dataset, train
from ldm_edu.conditioning.condition import Conditioner
from ldm_edu.data.registry import known_keys
from ldm_edu.first_stage.autoencoder import FirstStage
from ldm_edu.training.data import needed_keys
from ldm_edu.training.paper_recipes import PAPER_RECIPES
from ldm_edu.training.recipes import (
    RECIPES,
    AutoencoderRecipe,
    ConditionerRecipe,
    DiffusionRecipe,
    FirstStageRecipe,
    Recipe,
    Training,
    find_recipe,
    recipe_from_dict,
    recipe_to_dict,
)
from ldm_edu.training.run import RunOptions
from ldm_edu.training.tasks import DiffusionTask, build_conditioner, build_first_stage

MODELS = {name: recipe for name, recipe in PAPER_RECIPES.items() if isinstance(recipe, Recipe)}
FIRST_STAGES = {name: recipe for name, recipe in PAPER_RECIPES.items() if isinstance(recipe, AutoencoderRecipe)}

# The tables, as they are printed --------------------------------------------------------------------------------------

# A row that a table does not have is not here; "–" is printed. "88×8×32" is printed, too: 8×8 is meant.
TABLE_12 = """
recipe                | paper-celeba256 | paper-ffhq256 | paper-churches256 | paper-bedrooms256
f                     | 4               | 4             | 8                 | 4
z-shape               | 64×64×3         | 64×64×3       | –                 | 64×64×3
|Z|                   | 8192            | 8192          | –                 | 8192
diffusion steps       | 1000            | 1000          | 1000              | 1000
noise schedule        | linear          | linear        | linear            | linear
model size            | 274M            | 274M          | 294M              | 274M
channels              | 224             | 224           | 192               | 224
depth                 | 2               | 2             | 2                 | 2
channel multiplier    | 1,2,3,4         | 1,2,3,4       | 1,2,2,4,4         | 1,2,3,4
attention resolutions | 32,16,8         | 32,16,8       | 32,16,8,4         | 32,16,8
head channels         | 32              | 32            | 24                | 32
batch size            | 48              | 42            | 96                | 48
iterations            | 410k            | 635k          | 500k              | 1.9M
learning rate         | 9.6e-5          | 8.4e-5        | 5.e-5             | 9.6e-5
"""
TABLE_13 = """
recipe                | paper-imagenet-f1 | paper-imagenet-f2 | paper-imagenet-f4 | paper-imagenet-f8 | paper-imagenet-f16 | paper-imagenet-f32
f                     | 1                 | 2                 | 4                 | 8                 | 16                 | 32
z-shape               | 256×256×3         | 128×128×2         | 64×64×3           | 32×32×4           | 16×16×8            | 88×8×32
|Z|                   | –                 | 2048              | 8192              | 16384             | 16384              | 16384
diffusion steps       | 1000              | 1000              | 1000              | 1000              | 1000               | 1000
noise schedule        | linear            | linear            | linear            | linear            | linear             | linear
model size            | 396M              | 391M              | 391M              | 395M              | 395M               | 395M
channels              | 192               | 192               | 192               | 256               | 256                | 256
depth                 | 2                 | 2                 | 2                 | 2                 | 2                  | 2
channel multiplier    | 1,1,2,2,4,4       | 1,2,2,4,4         | 1,2,3,5           | 1,2,4             | 1,2,4              | 1,2,4
number of heads       | 1                 | 1                 | 1                 | 1                 | 1                  | 1
batch size            | 7                 | 9                 | 40                | 64                | 112                | 112
iterations            | 2M                | 2M                | 2M                | 2M                | 2M                 | 2M
learning rate         | 4.9e-5            | 6.3e-5            | 8e-5              | 6.4e-5            | 4.5e-5             | 4.5e-5
conditioning          | CA                | CA                | CA                | CA                | CA                 | CA
attention resolutions | 32,16,8           | 32,16,8           | 32,16,8           | 32,16,8           | 16,8,4             | 8,4,2
embedding dimension   | 512               | 512               | 512               | 512               | 512                | 512
transformer depth     | 1                 | 1                 | 1                 | 1                 | 1                  | 1
"""  # noqa: E501
TABLE_14 = """
recipe                | paper-celeba-f1 | paper-celeba-f2 | paper-celeba-f4 | paper-celeba-f8 | paper-celeba-f16 | paper-celeba-f32
f                     | 1               | 2               | 4               | 8               | 16               | 32
z-shape               | 256×256×3       | 128×128×2       | 64×64×3         | 32×32×4         | 16×16×8          | 88×8×32
|Z|                   | –               | 2048            | 8192            | 16384           | 16384            | 16384
diffusion steps       | 1000            | 1000            | 1000            | 1000            | 1000             | 1000
noise schedule        | linear          | linear          | linear          | linear          | linear           | linear
model size            | 270M            | 265M            | 274M            | 258M            | 260M             | 258M
channels              | 192             | 192             | 224             | 256             | 256              | 256
depth                 | 2               | 2               | 2               | 2               | 2                | 2
channel multiplier    | 1,1,2,2,4,4     | 1,2,2,4,4       | 1,2,3,4         | 1,2,4           | 1,2,4            | 1,2,4
attention resolutions | 32,16,8         | 32,16,8         | 32,16,8         | 32,16,8         | 16,8,4           | 8,4,2
head channels         | 32              | 32              | 32              | 32              | 32               | 32
batch size            | 9               | 11              | 48              | 96              | 128              | 128
iterations            | 500k            | 500k            | 500k            | 500k            | 500k             | 500k
learning rate         | 9e-5            | 1.1e-4          | 9.6e-5          | 9.6e-5          | 1.3e-4           | 1.3e-4
"""  # noqa: E501
TABLE_15 = """
recipe                | paper-coco-text256 | paper-coco-layout256 | paper-imagenet256 | paper-superres256 | paper-inpainting256 | paper-coco-semantic256
f                     | 8                  | 8                    | 4                 | 4                 | 4                   | 8
z-shape               | 32×32×4            | 32×32×4              | 64×64×3           | 64×64×3           | 64×64×3             | 32×32×4
|Z|                   | –                  | 16384                | 8192              | 8192              | 8192                | 16384
diffusion steps       | 1000               | 1000                 | 1000              | 1000              | 1000                | 1000
noise schedule        | linear             | linear               | linear            | linear            | linear              | linear
model size            | 1.45B              | 345M                 | 395M              | 169M              | 215M                | 215M
channels              | 320                | 192                  | 192               | 160               | 128                 | 128
depth                 | 2                  | 2                    | 2                 | 2                 | 2                   | 2
channel multiplier    | 1,2,4,4            | 1,2,4                | 1,2,3,5           | 1,2,2,4           | 1,4,8               | 1,4,8
number of heads       | 8                  | 1                    | 1                 | 1                 | 1                   | 1
dropout               | –                  | 0.1                  | –                 | –                 | –                   | –
batch size            | 680                | 48                   | 1200              | 64                | 128                 | 48
iterations            | 390K               | 170K                 | 178K              | 860K              | 360K                | 360K
learning rate         | 1.0e-4             | 4.8e-5               | 1.0e-4            | 6.4e-5            | 1.0e-6              | 4.8e-5
conditioning          | CA                 | CA                   | CA                | concat            | concat              | concat
attention resolutions | 32,16,8            | 32,16,8              | 32,16,8           | –                 | –                   | –
embedding dimension   | 1280               | 512                  | 512               | –                 | –                   | –
transformer depth     | 1                  | 2                    | 1                 | –                 | –                   | –
"""  # noqa: E501

# Where a recipe has another value than its table, in the table's form, and why.
OTHERWISE = {
    ("paper-churches256", "z-shape"): "32×32×4",  # left blank; the KL stage of f = 8 in table 8 has c = 4
    ("paper-churches256", "head channels"): "8 heads",  # 24 channels on the first level only; as released
    ("paper-imagenet-f32", "z-shape"): "8×8×16",  # c of table 8: no stage of f = 32 there has 32 channels
    ("paper-celeba-f32", "z-shape"): "8×8×16",
    ("paper-superres256", "number of heads"): "32 channels a head",  # as released
    ("paper-superres256", "attention resolutions"): "8",  # as released
    ("paper-inpainting256", "learning rate"): "1.28e-4",  # 1.0e-6 is the released base rate, for one image of 128
    ("paper-coco-semantic256", "f"): "4",  # § 4.3.2 and the released model
    ("paper-coco-semantic256", "z-shape"): "64×64×3",
    ("paper-coco-semantic256", "|Z|"): "8192",
}


def columns(table: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The name of each recipe of a table, and what its column prints, by the name of the row."""
    rows = [[cell.strip() for cell in line.split(" | ")] for line in table.strip().splitlines()]
    names, *rest = rows
    assert all(len(row) == len(names) for row in rest)
    for i, name in enumerate(names[1:], 1):
        yield name, {row[0]: row[i] for row in rest}


PRINTED = {name: column for table in (TABLE_12, TABLE_13, TABLE_14, TABLE_15) for name, column in columns(table)}


def number(text: str) -> float:
    """What a table prints as "1.9M", "410k" or "9.6e-5"."""
    powers = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}
    return float(text[:-1]) * powers[text[-1]] if text[-1] in powers else float(text)


class Built(NamedTuple):
    """The networks of a recipe on the meta device."""

    first_stage: FirstStage
    unet: nn.Module
    conditioner: Conditioner | None


def column(key: str) -> Any:
    """A column of data that has more words than any vocabulary, and COCO's class ids."""
    return [f"word{i}" for i in range(31_000)] if key == "caption" else [torch.full((1, 1), 182, device="cpu")]


@cache
def built(name: str) -> Built:
    """The networks of a recipe; on the meta device they cost no memory."""
    recipe = MODELS[name]
    with torch.device("meta"):
        first_stage = build_first_stage(recipe.first_stage)
        conditioner = build_conditioner(recipe.diffusion, column, lambda: first_stage)
        return Built(first_stage, DiffusionTask(recipe, conditioner).unet, conditioner)


def size_of(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def found(name: str) -> dict[str, str | float]:
    """What a recipe has in the rows of the tables, as they would print it, numbers as numbers."""
    recipe, networks = MODELS[name], built(name)
    stage, what = recipe.first_stage, recipe.diffusion
    side = recipe.size // stage.f
    how = "CA" if networks.unet.context_dim else "concat" if networks.unet.concat_channels else "none"
    heads = {"head channels": f"{what.heads} heads" if what.heads else str(what.head_channels)}
    heads["number of heads"] = str(what.heads) if what.heads else f"{what.head_channels} channels a head"
    return heads | {
        "f": str(stage.f),
        "z-shape": f"{side}×{side}×{stage.latent_channels}",
        "|Z|": str(stage.num_codes) if stage.regulariser == "vq" else "–",
        "diffusion steps": str(what.T),
        "noise schedule": {"scaled_linear": "linear"}.get(what.schedule, what.schedule),  # linear in the root of β
        "channels": str(what.channels),
        "depth": str(what.blocks),
        "channel multiplier": ",".join(map(str, what.multipliers)),
        "attention resolutions": ",".join(str(side // factor) for factor in what.attention_factors) or "–",
        "dropout": str(what.dropout) if what.dropout else "–",
        "batch size": str(what.training.batch_size),
        "iterations": what.training.steps,
        "learning rate": what.training.lr,
        "conditioning": how,
        "embedding dimension": str(networks.unet.context_dim or "–"),
        "transformer depth": str(what.transformer_depth) if networks.unet.context_dim else "–",
    }


def test_every_model_stands_in_a_table_or_is_the_large_one_of_inpainting():
    assert set(MODELS) == {*PRINTED, "paper-inpainting256-big"} and len(PRINTED) == 22


@pytest.mark.parametrize("name", PRINTED)
def test_a_recipe_has_what_its_table_prints(name):
    have = found(name)
    for row, printed in PRINTED[name].items():
        want = OTHERWISE.get((name, row), printed)
        if row == "model size":
            continue
        if row in ("iterations", "learning rate"):
            assert have[row] == pytest.approx(number(want), rel=1e-9), row
        else:
            assert have[row] == want, row


def test_what_is_otherwise_than_printed_is_in_a_table():
    """An exception for a row that has gone, or that now agrees, would hide a mistake."""
    assert all(PRINTED[name][row] != value for (name, row), value in OTHERWISE.items())


@pytest.mark.parametrize("row, arguments", [("text", (77, 32, 1280)), ("layout", (90, 16, 512))])
def test_the_encoders_are_those_of_table_17(row, arguments):
    """A layout has 92 tokens there: 30 boxes of three, and two for the crop, which we leave out."""
    conditioner = built(f"paper-coco-{row}256").conditioner
    net = conditioner.transformer
    assert (len(net.positions.weight), len(net.layers), net.tokens.weight.shape[1]) == arguments


def test_the_codes_of_a_layout_are_as_many_as_released():
    assert len(built("paper-coco-layout256").conditioner.transformer.tokens.weight) == 8192
    assert len(built("paper-coco-text256").conditioner.transformer.tokens.weight) == 30_522  # BERT's


# Sizes ----------------------------------------------------------------------------------------------------------------

COUNTED_IN = {"paper-superres256"}  # 169M is the UNet's 114M with the first stage's 55M

# Where the size is more than 1 % off, and what it is; in millions.
OTHER_SIZES = {
    "paper-imagenet-f4": 401,  # 391M is printed, LDM-2's size; tables 3, 10 and 18 have 400M
    "paper-imagenet256": 401,  # 395M is printed, that of LDM-8
    "paper-coco-layout256": 367,  # 345M would be half of table 17's layers; with the release's unused logits 371M
}


@pytest.mark.parametrize("name", PRINTED)
def test_a_model_has_the_size_that_is_printed(name):
    """Within 1 %: LDM-16 of table 14 is printed with 260M and has 257.8M, LDM-1 of table 13 has 397.3M of 396M."""
    networks = built(name)
    counted = size_of(networks.unet, networks.conditioner if name != "paper-inpainting256" else None)
    counted += size_of(networks.first_stage) if name in COUNTED_IN else 0
    if name == "paper-coco-text256":  # the release has a layer of logits behind the encoder, and never uses it
        counted += 30_522 * 1280 + 30_522
    printed = number(PRINTED[name]["model size"])
    if name in OTHER_SIZES:
        assert round(counted / 1e6) == OTHER_SIZES[name] and abs(counted / printed - 1) > 0.01
    else:
        assert counted == pytest.approx(printed, rel=0.01)


def test_the_large_inpainting_model_has_387_million():
    """§ 4.5, table 7: attention on three levels, blocks that change the size."""
    what = MODELS["paper-inpainting256-big"].diffusion
    assert round(size_of(built("paper-inpainting256-big").unet) / 1e6) == 387
    assert len(what.attention_factors) == 3 and what.resblock_updown
    assert what.training == MODELS["paper-inpainting256"].diffusion.training


# f, regulariser, codes, channels of the latent
TABLE_8 = {
    "paper-kl-f4": (4, "kl", None, 3),
    "sd-kl-f8": (8, "kl", None, 4),
    "paper-vq-f2": (2, "vq", 2048, 2),
    "paper-vq-f4": (4, "vq", 8192, 3),
    "paper-vq-f8": (8, "vq", 16384, 4),
    "paper-vq-f16": (16, "vq", 16384, 8),
    "paper-vq-f32": (32, "vq", 16384, 16),
}


def test_every_first_stage_is_a_row_of_table_8():
    assert FIRST_STAGES.keys() == TABLE_8.keys()
    for name, (f, regulariser, codes, channels) in TABLE_8.items():
        stage = FIRST_STAGES[name].first_stage
        assert (stage.f, stage.regulariser, stage.latent_channels) == (f, regulariser, channels)
        assert codes is None or stage.num_codes == codes
        assert stage.adversarial is not None and stage.perceptual == "lpips-vgg"  # eq. 25


def test_every_first_stage_can_be_built_in_the_size_of_table_18():
    with torch.device("meta"):
        sizes = {name: size_of(build_first_stage(recipe.first_stage)) for name, recipe in FIRST_STAGES.items()}
    assert round(sizes["paper-vq-f4"] / 1e6) == 55 and round(sizes["paper-vq-f8"] / 1e6) == 68
    assert sizes["sd-kl-f8"] == 83_653_863  # Stable Diffusion's
    assert sizes["paper-vq-f2"] < sizes["paper-vq-f4"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_a_first_stage_of_table_8_or_none(name):
    stage = MODELS[name].first_stage
    assert stage in [recipe.first_stage for recipe in FIRST_STAGES.values()] or (stage.f, stage.training) == (1, None)


# Among the other recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_it_is_found_listed_and_survives_json(name):
    recipe = PAPER_RECIPES[name]
    assert recipe.name == name and find_recipe(name) is recipe and RECIPES[name] is recipe
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe
    assert recipe.about and recipe.size == 256


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_its_data_set_has_the_keys_that_its_conditioners_read(name):
    recipe = PAPER_RECIPES[name]
    assert set(needed_keys(recipe)) <= set(known_keys(recipe.dataset))


# Small versions -------------------------------------------------------------------------------------------------------

TOY = {"celeba": "toy-faces", "coco": "toy", "folder": "toy"}
SMALLER = {"dim": 32, "depth": 1, "length": 16, "head_channels": 8, "bins": 8, "max_boxes": 4}  # of a conditioner


def small_training(training: Training, steps: int) -> Training:
    """A few steps with two images each, at a rate that shows; optimiser, average and clipping are kept."""
    how = {"lr": 1e-3, "warmup": min(training.warmup, 1), "images": 4, "held_out": 2}
    return replace(training, steps=steps, batch_size=2, accumulate=min(training.accumulate, 2), **how)


def small_first_stage(stage: FirstStageRecipe) -> FirstStageRecipe:
    """Eight channels, three levels at the most; the discriminator takes part from the second step on at the latest."""
    if stage.training is None:
        return stage
    levels = min(3, len(stage.multipliers))
    factors = tuple(factor * 2**levels // 2 ** len(stage.multipliers) for factor in stage.attention_factors)
    adversarial = replace(stage.adversarial, start=min(stage.adversarial.start, 1), channels=8, layers=1)
    shape = {"channels": 8, "groups": 8, "blocks": 1, "multipliers": (1,) * levels, "attention_factors": factors}
    how = {"training": small_training(stage.training, 2), "num_codes": 32, "perceptual": None}
    return replace(stage, adversarial=adversarial, **shape, **how)


def small_conditioner(line: ConditionerRecipe) -> ConditionerRecipe:
    return replace(line, arguments={k: SMALLER.get(k, v) for k, v in line.arguments.items()})


def small_diffusion(what: DiffusionRecipe) -> DiffusionRecipe:
    """32 and 64 channels on as many levels. From the third step on all weights learn: many layers begin at zero."""
    return replace(
        what,
        training=small_training(what.training, 3),
        channels=32,
        multipliers=tuple(min(m, 2) for m in what.multipliers),
        blocks=1,
        conditioners=tuple(map(small_conditioner, what.conditioners)),
    )


def small(recipe: Recipe | AutoencoderRecipe) -> Recipe | AutoencoderRecipe:
    """A recipe of the same kind that trains in seconds, on drawn data with the same keys."""
    stage = small_first_stage(recipe.first_stage)
    if isinstance(recipe, AutoencoderRecipe):
        return replace(recipe, dataset=TOY[recipe.dataset], size=16, first_stage=stage)
    what = small_diffusion(recipe.diffusion)
    side = max(4, 2 ** (len(what.multipliers) - 1))
    return replace(recipe, dataset=TOY[recipe.dataset], size=stage.f * side, first_stage=stage, diffusion=what)


@pytest.fixture(scope="session")
def run_options(tmp_path_factory) -> RunOptions:
    """All runs share the drawn images."""
    cache_dir = tmp_path_factory.mktemp("drawn")
    return RunOptions(cache_dir=cache_dir, device="cpu", precision="fp32", sample_every=0, every=1)


def losses(folder) -> dict[str, list[float]]:
    """The losses that were logged, by stage."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {stage: [each["loss"] for each in lines if each["stage"] == stage] for stage in {x["stage"] for x in lines}}


def has_learned(after: torch.Tensor, before: torch.Tensor) -> bool:
    """Did a weight change in another way than weight decay does, which shrinks all numbers by one factor?"""
    if not before.any():
        return bool(after.any())
    shrunk = before * (after * before).sum() / before.square().sum()
    return bool((after - shrunk).abs().max() > 2e-6 * before.abs().max())


def learned(trained: nn.Module, fresh: nn.Module, zeros: bool = False) -> float:
    """The share of a network's tensors that have learned; with `zeros`, of those that began as zeros."""
    before, after = dict(fresh.named_parameters()), dict(trained.named_parameters())
    assert before.keys() == after.keys()
    names = [name for name, weight in before.items() if not (zeros and weight.any())]
    assert names
    return sum(has_learned(after[name].detach(), before[name].detach()) for name in names) / len(names)


def fresh_networks(recipe: Recipe, model: LatentDiffusion) -> tuple[nn.Module, Conditioner | None]:
    """UNet and conditioner as they were before the first step."""
    torch.manual_seed(recipe.seed + 1)
    conditioner = None if model.conditioner is None else type(model.conditioner)(**model.conditioner.config)
    return DiffusionTask(recipe, conditioner).unet, conditioner


def check_model(recipe: Recipe, folder) -> None:
    """The saved model has learned and draws what its condition asks for."""
    model = LatentDiffusion.from_pretrained(folder / "model")
    assert model.size == recipe.size and model.provenance["recipe"]["name"] == recipe.name
    unet, conditioner = fresh_networks(recipe, model)
    assert learned(model.unet, unet, zeros=True) > 0.95  # with one token, a query has no gradient
    if conditioner is not None and any(p.requires_grad for p in conditioner.parameters()):
        assert learned(model.conditioner, conditioner) == 1
    batch, n = None, 2
    if model.conditioner is not None:
        data = open_dataset(recipe.dataset, split="validation", size=recipe.size, keys=model.conditioner.keys)
        batch, n = collate([data[i] for i in range(2)]), None
    images = model.sample(batch, n, steps=2, scale=1.5)
    assert images.shape == (2, 3, recipe.size, recipe.size) and images.isfinite().all() and images.std() > 0.05


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_its_small_version_trains_and_draws(name, tmp_path, run_options):
    torch.set_num_threads(1)
    recipe = small(PAPER_RECIPES[name])
    assert type(recipe) is type(PAPER_RECIPES[name])
    done = train(recipe, tmp_path / "run", run_options)
    logged = losses(tmp_path / "run")
    wanted = {part: each.training.steps for part, each in recipe.trained_parts().items()}
    assert {stage: len(each) for stage, each in logged.items()} == wanted
    assert all(torch.tensor(each).isfinite().all() for each in logged.values())
    if recipe.first_stage.training is not None:
        torch.manual_seed(recipe.seed)
        stage = load_first_stage(tmp_path / "run" / "model")
        assert learned(stage, build_first_stage(recipe.first_stage)) > 0.9
        assert isinstance(done, LatentDiffusion) or stage.reconstruct(torch.zeros(1, 3, 16, 16)).shape[-1] == 16
    if isinstance(recipe, Recipe):
        check_model(recipe, tmp_path / "run")


def test_a_small_version_keeps_the_kind_of_everything():
    """What makes a row a row is still there."""
    for name, recipe in MODELS.items():
        less, what = small(recipe), recipe.diffusion
        assert less.first_stage.regulariser == recipe.first_stage.regulariser
        assert [c.name for c in less.diffusion.conditioners] == [c.name for c in what.conditioners]
        kept = ("attention_factors", "heads", "head_channels", "dropout", "transformer_depth", "drop", "beta_start")
        kept += ("beta_end", "scale_shift_norm", "resblock_updown", "linear_projection", "T", "schedule")
        assert all(getattr(less.diffusion, field) == getattr(what, field) for field in kept), name
        assert len(less.diffusion.multipliers) == len(what.multipliers)
