"""Ten faults, each planted in a small run and found by its check alone, and silence about what is sound."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_runs import adversarial, changed, copied, small, train_here
from torch import Tensor, nn
from typer.testing import CliRunner

import ldm_edu.doctor as doctor
import ldm_edu.training.loop as loop
from ldm_edu import LatentDiffusion, ToyCelebA, ToyCOCO
from ldm_edu.cli import app
from ldm_edu.conditioning.condition import Condition
from ldm_edu.diffusion.levels import SCHEDULES, cosine
from ldm_edu.diffusion.schedule import NoiseSchedule
from ldm_edu.doctor import Finding, examine
from ldm_edu.errors import CheckpointError, LDMError, refusal
from ldm_edu.files import load_json, load_notes, load_tensors, save_json, save_tensors
from ldm_edu.first_stage.adversarial import Adversary
from ldm_edu.first_stage.autoencoder import AutoencoderKL, FirstStage
from ldm_edu.first_stage.quantization import load_first_stage
from ldm_edu.training.recipes import recipe_to_dict
from ldm_edu.training.tasks import DiffusionTask, FirstStageTask

CHECKS = (
    "latents",
    "scale factor",
    "condition heard",
    "condition dropped",
    "averaged weights",
    "weights move",
    "discriminator",
    "ends of the schedule",
    "loss by level",
    "memorised images",
)
V = {"schedule": "cosine", "prediction": "v"}  # with it the condition is heard soon
RECIPE = small(**V)


@pytest.fixture(scope="module", autouse=True)
def _drawn_once():
    """Samples of a toy data set are drawn once for all examinations, which else spend most of their time on them."""
    draw, drawn = doctor._samples_of, {}

    def samples_of(dataset, n: int) -> list[dict[str, Any]]:
        if not isinstance(dataset, ToyCOCO | ToyCelebA):
            return draw(dataset, n)
        what = json.dumps([dataset.identity(), n], sort_keys=True)
        if what not in drawn:
            drawn[what] = draw(dataset, n)
        return drawn[what]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "_samples_of", samples_of)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run without a fault, of a conditional model; it must not be changed."""
    return train_here(tmp_path_factory.mktemp("doctor") / "run", RECIPE)


@pytest.fixture(scope="module")
def first_stage_run(tmp_path_factory) -> Path:
    """A finished run of a first stage against a discriminator; it must not be changed."""
    return train_here(tmp_path_factory.mktemp("doctor") / "run", adversarial())


@pytest.fixture
def model(run) -> LatentDiffusion:
    return LatentDiffusion.from_pretrained(run / "model")


@pytest.fixture
def first_stage(run) -> AutoencoderKL:
    found = load_first_stage(run / "model")
    assert isinstance(found, AutoencoderKL)
    # The provenance of a first stage names its own recipe.
    found.provenance = {"recipe": recipe_to_dict(replace(adversarial(), first_stage=RECIPE.first_stage))}
    return found


def examined(target: Any, **options: Any) -> dict[str, Finding]:
    """All findings by the names of their checks."""
    found = examine(target, **{"device": "cpu"} | options)
    assert tuple(each.check for each in found) == CHECKS
    return {each.check: each for each in found}


def verdicts(target: Any, **options: Any) -> dict[str, str]:
    """All verdicts by the names of their checks."""
    return {name: each.verdict for name, each in examined(target, **options).items()}


def only_fault(target: Any, check: str) -> Finding:
    """The one failure that there is, of that check."""
    found = examined(target)
    assert [name for name, each in found.items() if each.failed] == [check], "\n".join(map(str, found.values()))
    assert found[check].cause and found[check].remedy
    return found[check]


# What is sound -------------------------------------------------------------------------------------------------------


def test_a_sound_run_passes_every_check_that_applies(run):
    said = examined(run)
    found = {name: each.verdict for name, each in said.items()}
    assert found.pop("discriminator") == "not applicable"
    assert set(found.values()) == {"passed"}
    assert "older" not in "".join(each.measured for each in said.values())


def test_a_sound_first_stage_passes_every_check_that_applies(first_stage_run):
    found = verdicts(first_stage_run)
    passed = ("latents", "scale factor", "averaged weights", "weights move", "discriminator")
    assert found == {name: "passed" if name in passed else "not applicable" for name in CHECKS}


def test_an_unfinished_run_is_examined_by_its_checkpoints(run, tmp_path):
    """The diffusion model of the newest averages is the finished one; the scale factor is estimated once more."""
    begun = copied(run, tmp_path / "run")
    shutil.rmtree(begun / "model")
    assert verdicts(begun) == verdicts(run)


def test_a_run_of_a_few_steps_need_not_have_learned_anything(run, tmp_path):
    """Neither the run nor its model is at fault, though the condition is not heard yet."""
    young = train_here(tmp_path / "run", replace(small(12, **V), pretrained=str(run / "model")))
    for target in (young, young / "model"):
        found = examined(target, n=16)
        assert not any(each.failed for each in found.values()), "\n".join(map(str, found.values()))
        assert "nothing is learned yet, after 12 steps" in found["condition heard"].measured


def test_a_model_says_in_its_provenance_how_many_steps_it_has_done(model):
    """The recipe has planned 250: the run was extended."""
    before = model.unet.forward
    model.unet.forward = lambda x, t, cond: before(x, t, cond.map(torch.zeros_like))
    for steps, failed in ((199, False), (200, True)):
        model.provenance["diffusion"]["steps"] = steps
        assert examined(model, n=16)["condition heard"].failed is failed


def zero_output(tensors: dict[str, Tensor]) -> None:
    """The UNet of a state says 0, with its trained and its averaged weights."""
    names = [name for name in tensors if name.startswith(("task.unet.out.", "ema.unet.out."))]
    assert len(names) >= 4
    for name in names:
        tensors[name].zero_()


def test_of_a_run_that_went_on_the_checkpoint_is_measured_and_not_the_older_model(run, tmp_path):
    longer = changed(copied(run, tmp_path / "run"), "diffusion", zero_output)
    found = examined(longer)
    assert "the answer 0" in found["loss by level"].cause
    said = "; model/ is older: measured is the checkpoint, diffusion of step 250"
    assert {name for name, each in found.items() if each.measured.endswith(said)} >= {"latents", "loss by level"}
    assert not examined(longer / "model")["loss by level"].failed


def test_a_model_of_the_best_weights_is_not_older_where_these_are_kept(run, tmp_path):
    for keep, failed in (("best", False), ("last", True)):
        folder = copied(run, tmp_path / keep)
        shutil.copyfile(folder / "diffusion.safetensors", folder / "diffusion.best.safetensors")
        changed(folder, "diffusion", zero_output)
        diffusion = replace(RECIPE.diffusion, training=replace(RECIPE.diffusion.training, keep=keep))
        save_json(recipe_to_dict(replace(RECIPE, diffusion=diffusion)), folder / "recipe.json")
        found = examined(folder)["loss by level"]
        assert found.failed is failed is ("model/ is older" in found.measured)


def test_an_older_first_stage_is_not_measured_either(first_stage_run, tmp_path):
    """And while an extension is under way, the steps are those of the longer plan."""

    def twice(tensors: dict[str, Tensor]) -> None:
        for name in ("task.model.quant_conv.weight", "ema.model.quant_conv.weight"):
            tensors[name] *= 1.01

    folder = changed(copied(first_stage_run, tmp_path / "run"), "first_stage", twice)
    extensions = [{"stage": "first_stage", "from": 30, "steps": 60}]
    save_json({"precision": "fp32", "extensions": extensions}, folder / "run.json")
    assert "model/ is older: measured is the checkpoint, first_stage of step 30" in examined(folder)["latents"].measured
    shutil.rmtree(folder / "model")
    assert "30 of 60 steps" in examined(folder)["latents"].measured


@pytest.mark.parametrize("name", ["toy-text2image", "toy-class", "toy-attributes", "toy-layout", "toy-maps"])
def test_no_fault_is_found_in_a_shipped_model(name):
    found = verdicts(name)
    kept_in_runs = ("averaged weights", "discriminator")
    assert found == {check: "not applicable" if check in kept_in_runs else "passed" for check in CHECKS}


FIRST_STAGES = ("toy-kl-f4", "toy-vq-f4", "toy-faces-l1", "toy-faces-l2", "toy-faces-features", "toy-faces-all")


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_no_fault_is_found_in_a_shipped_first_stage(name):
    found = verdicts(name)
    assert found["latents"] == found["weights move"] == "passed"
    assert found["scale factor"] == ("not applicable" if name == "toy-vq-f4" else "passed")
    assert set(found.values()) == {"passed", "not applicable"}


def test_queries_of_a_single_token_are_no_fault():
    """They have no gradient: the attention to one token is 1 whatever they are."""
    moved = examined("toy-class", n=8)["weights move"]
    assert moved.verdict == "passed" and "does not depend on the other 28" in moved.measured


def test_findings_do_not_depend_on_torchs_random_stream_and_leave_it_alone(first_stage_run):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = examine(first_stage_run, device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(4)
    assert examine(first_stage_run, device="cpu") == first


def test_nothing_is_written_into_the_run(run, tmp_path):
    def files(folder: Path) -> dict[str, tuple[int, float]]:
        return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}

    before = files(run)
    examine(run, device="cpu", n=8)
    assert files(run) == before and len(before) > 10


# 1 and 2: latents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [3.0, 0.3])
def test_another_scale_factor_is_found(first_stage, factor):
    right = first_stage.scale_factor
    first_stage.scale_factor = right * factor
    fault = only_fault(first_stage, "latents")
    assert float(fault.measured.split()[2]) == pytest.approx(factor, rel=0.1) and "estimate_scale" in fault.remedy


def test_latents_that_were_never_rescaled_are_found(first_stage):
    first_stage.scale_factor = 1.0
    assert "scale_factor is 1, but" in only_fault(first_stage, "latents").cause


def test_a_run_that_was_trained_on_latents_of_another_scale_is_found(run, tmp_path):
    """A small error of the scale factor is none; a large one is found in the run's own latents."""
    for factor, failed in ((1.1, False), (2.0, True)):
        broken = copied(run, tmp_path / str(factor))
        path = broken / "model" / "first_stage" / "config.json"
        config = load_json(path)
        save_json(config | {"scale_factor": config["scale_factor"] * factor}, path)
        assert examined(broken)["latents"].failed is failed


def test_a_factor_that_is_the_standard_deviation_is_found(first_stage):
    first_stage.scale_factor = 1 / first_stage.scale_factor
    assert "multiplied by their standard deviation" in only_fault(first_stage, "scale factor").cause


class MultipliesTwice(AutoencoderKL):
    """A first stage that multiplies in its decoder, too."""

    def from_latent(self, z: Tensor) -> Tensor:
        return self.post_quant_conv(z * self.scale_factor)


class DividesTwice(AutoencoderKL):
    """A first stage that divides where it encodes."""

    def latent(self, posterior: Any, noise: Tensor | None = None) -> Tensor:
        return (posterior.mean if noise is None else posterior.sample(noise)) / self.scale_factor


@pytest.mark.parametrize(
    ("cls", "cause"), [(MultipliesTwice, "multiplies where it should divide"), (DividesTwice, "comes out squared")]
)
def test_a_factor_on_the_wrong_side_is_found(first_stage, cls, cause):
    first_stage.__class__ = cls
    assert cause in only_fault(first_stage, "scale factor").cause


# 3 and 4: conditions -------------------------------------------------------------------------------------------------


def test_a_conditioner_with_a_constant_output_is_found(model):
    null = model.conditioner.null()
    model.conditioner.forward = lambda batch: null.expand(len(batch["attributes"]))
    fault = only_fault(model, "condition heard")
    assert "does not depend on what it reads" in fault.cause and "AttributesConditioner" in fault.cause


def replaced(module: nn.Module, change: Callable[..., Tensor]) -> None:
    """A module whose output is `change(its output, *its arguments)`."""
    before = module.forward
    module.forward = lambda *args: change(before(*args), *args)


def test_a_unet_that_ignores_its_condition_is_found(model):
    before = model.unet.forward
    model.unet.forward = lambda x, t, cond: before(x, t, cond.map(torch.zeros_like))
    fault = only_fault(model, "condition heard")
    assert "does not hear AttributesConditioner" in fault.cause and "0.0% ± 0.0%" in fault.measured


def test_of_two_conditions_the_one_that_is_not_heard_is_named():
    model = LatentDiffusion.from_pretrained("toy-maps")
    before = model.unet.forward

    def deaf(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return before(x, t, replace(cond, context=torch.zeros_like(cond.context)))

    model.unet.forward = deaf
    fault = examined(model, n=8)["condition heard"]
    assert fault.failed and "TextConditioner" in fault.cause and "MapConditioner" not in fault.cause


def test_a_few_images_do_not_convict(model):
    """Two images cannot say that a condition is not heard, nor that it is."""
    found = examined(model, n=2)["condition heard"]
    assert not found.failed


def test_a_recipe_that_never_drops_its_condition_is_found(run, tmp_path):
    broken = copied(run, tmp_path / "run")
    save_json(recipe_to_dict(small(**V, drop=0.0)), broken / "recipe.json")
    assert "never dropped" in only_fault(broken, "condition dropped").cause


def test_a_null_without_a_gradient_is_found(run, tmp_path):
    """What AdamW has seen of the rows of "not told", which the null alone reads, becomes 0."""
    task = DiffusionTask(RECIPE)
    number = [name for name, _ in task.named_parameters()].index("conditioner.embedding.weight")

    def forget(tensors: dict[str, Tensor]) -> None:
        rows = tensors[f"optimizer.{number}.exp_avg_sq"].view(16, 3, -1)
        assert rows[:, 2].any(), "the rows of the null should have been trained"
        rows[:, 2] = 0

    broken = changed(copied(run, tmp_path / "run"), "diffusion", forget)
    fault = only_fault(broken, "condition dropped")
    assert "conditioner.embedding.weight" in fault.cause and "never used" in fault.cause


def test_a_null_that_is_worse_than_a_wrong_condition_is_found(model):
    rows = model.conditioner.embedding.weight.data.view(16, 3, -1)
    rows[:, 2] = 10 * torch.randn(rows[:, 2].shape, generator=torch.Generator().manual_seed(0))
    assert "worse for the loss than a wrong condition" in only_fault(model, "condition dropped").cause


# 5, 6 and 7: weights -------------------------------------------------------------------------------------------------


def first_weights() -> dict[str, Tensor]:
    """The diffusion model of the run as it was before the first step."""
    torch.manual_seed(RECIPE.seed + 1)
    return DiffusionTask(RECIPE).state_dict()


def test_an_average_that_is_never_updated_is_found(run, tmp_path):
    """The other checks look at the trained weights then, and find nothing."""

    def begin_again(tensors: dict[str, Tensor]) -> None:
        tensors.update({f"ema.{name}": value.clone() for name, value in first_weights().items()})

    broken = changed(copied(run, tmp_path / "run"), "diffusion", begin_again)
    assert "never updated" in only_fault(broken, "averaged weights").cause


UPDATES = {
    "never": (lambda ema, module, step: None, "never updated"),
    "without a warm-up": (
        lambda ema, module, step: [
            a.lerp_(b, 0.02)
            for a, b in zip(ema.module.state_dict().values(), module.state_dict().values())
            if a.is_floating_point()
        ],
        "its decay does not begin low",
    ),
    "of something else": (
        lambda ema, module, step: [p.data.normal_(generator=torch.Generator()) for p in ema.module.parameters()],
        "belongs to other weights",
    ),
}


@pytest.mark.parametrize("how", UPDATES)
def test_an_average_that_does_not_follow_is_found(how, tmp_path, monkeypatch):
    update, cause = UPDATES[how]
    with monkeypatch.context() as patch:
        patch.setattr(loop.EMA, "update", torch.no_grad()(update))
        broken = train_here(tmp_path / "run", adversarial())
    fault = only_fault(broken, "averaged weights")
    assert cause in fault.cause + fault.remedy and "first_stage, step 30" in fault.measured


def test_weights_that_are_frozen_are_named(tmp_path, monkeypatch):
    """Twenty tensors in the middle of the decoder, of a run in which they were not to be trained."""
    before = FirstStageTask.__init__

    def frozen(task: FirstStageTask, *args: Any) -> None:
        before(task, *args)
        task.model.decoder.mid.requires_grad_(False)

    with monkeypatch.context() as patch:
        patch.setattr(FirstStageTask, "__init__", frozen)
        broken = train_here(tmp_path / "run", adversarial())
    fault = only_fault(broken, "weights move")
    assert "model.decoder.mid.block_1.norm1.weight" in fault.cause and "in the optimiser" in fault.remedy


@pytest.mark.parametrize("entry", ["moments", "weight"])
def test_a_single_tensor_that_does_not_move_is_named(run, tmp_path, entry):
    """Its gradient has always been 0, or its weights are those before the first step."""
    name, first = "unet.input_blocks.0.0.weight", first_weights()
    number = [each for each, _ in DiffusionTask(RECIPE).named_parameters()].index(name)

    def still(tensors: dict[str, Tensor]) -> None:
        if entry == "weight":
            tensors[f"task.{name}"] = first[name].clone()
        else:
            tensors[f"optimizer.{number}.exp_avg_sq"].zero_()

    broken = changed(copied(run, tmp_path / "run"), "diffusion", still)
    assert f"depends on {name}, but it is" in only_fault(broken, "weights move").cause


def test_a_discriminator_that_is_never_stepped_is_found(tmp_path, monkeypatch):
    """Its loss is computed, and left out of what is differentiated."""
    before = Adversary.forward

    def left_out(adversary: Adversary, *args: Any, **kwargs: Any) -> Any:
        _, terms = before(adversary, *args, **kwargs)
        return 0 * args[0], terms

    with monkeypatch.context() as patch:
        patch.setattr(Adversary, "forward", left_out)
        broken = train_here(tmp_path / "run", adversarial(start=0))
    assert "never stepped" in only_fault(broken, "discriminator").cause


def test_a_discriminator_with_its_first_weights_is_found(first_stage_run, tmp_path):
    recipe = adversarial()
    torch.manual_seed(recipe.seed)
    first = FirstStageTask(recipe.first_stage).state_dict()

    def restore(tensors: dict[str, Tensor]) -> None:
        names = [name for name in first if name.startswith("adversary.")]
        assert len(names) >= 4
        tensors.update({f"task.{name}": first[name].clone() for name in names})

    broken = changed(copied(first_stage_run, tmp_path / "run"), "first_stage", restore)
    assert "never stepped" in only_fault(broken, "discriminator").cause


def test_a_discriminator_before_its_first_step_is_no_fault(tmp_path):
    begun = train_here(tmp_path / "run", adversarial(steps=12, start=50))
    found = examined(begun)
    assert found["discriminator"].verdict == "not applicable" and not any(each.failed for each in found.values())


# 8 and 9: noise levels -----------------------------------------------------------------------------------------------


def clean_start(T: int, *_: float) -> Tensor:
    """The cosine schedule, with a first level that has no noise at all."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), cosine(T)[1:]])


def no_end(T: int, *_: float) -> Tensor:
    """The cosine schedule, with a last level that is no number."""
    return torch.cat([cosine(T)[:-1], torch.full((1,), math.nan, dtype=torch.float64)])


def test_a_first_level_without_noise_is_found(model, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "clean start", clean_start)
    model.schedule = NoiseSchedule(1000, "clean start", prediction="v")
    fault = only_fault(model, "ends of the schedule")
    assert "snr at t = 0" in fault.measured and "no noise at all" in fault.cause


def test_a_level_that_is_no_number_is_found_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "no end", no_end)
    save_json(recipe_to_dict(small(schedule="no end", prediction="v")), tmp_path / "recipe.json")
    fault = only_fault(tmp_path, "ends of the schedule")
    assert "alpha at t = 999" in fault.measured and "beta_start" in fault.remedy


def test_noise_as_the_prediction_without_signal_at_the_end_is_found(model):
    model.schedule = NoiseSchedule(1000, "cosine", prediction="epsilon")
    fault = examined(model)["ends of the schedule"]
    assert fault.failed and "multiplied by 2.03e+04" in fault.measured and "prediction='v'" in fault.remedy


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_the_levels_of_the_package_are_no_fault(model, kind, prediction):
    model.schedule = NoiseSchedule(1000, kind, 1e-4, 0.02, prediction=prediction)
    assert examined(model, n=2)["ends of the schedule"].verdict == "passed"


def test_an_absurd_prediction_where_nearly_all_is_noise_is_found(model):
    replaced(model.unet, lambda said, x, t, cond: said * torch.where(t > 900, 6.0, 1.0)[:, None, None, None])
    fault = only_fault(model, "loss by level")
    assert "at levels 875 to 999 the prediction is worse than 0" in fault.cause


def test_levels_that_were_never_drawn_are_found():
    """The prediction is worse there than a 0, or much worse than beside."""
    model = LatentDiffusion.from_pretrained("toy-layout")
    replaced(model.unet, lambda said, x, t, cond: said * ((t < 500) | (t > 624))[:, None, None, None])
    fault = examined(model, n=16)["loss by level"]
    assert fault.failed and "at levels 500 to 624 the loss is" in fault.cause and "times that" in fault.cause


def test_a_network_that_gives_no_numbers_is_told_from_one_that_overfits(model):
    replaced(model.unet, lambda said, x, t, cond: said * torch.where(t == 999, math.nan, 1.0)[:, None, None, None])
    fault = only_fault(model, "loss by level")
    assert "not finite" in fault.cause and "not overfitting" in fault.cause and "nan" in fault.measured


def test_a_network_that_has_learned_nothing_is_found(model):
    replaced(model.unet, lambda said, x, t, cond: 0 * said)
    assert "not better than the answer 0" in examined(model)["loss by level"].cause


# 10: memorised images ------------------------------------------------------------------------------------------------


def test_four_images_that_were_learned_by_heart_are_found(run, tmp_path):
    """The loss on held-out images is worse than that of a 0, but on training images it is fine: it overfits."""
    recipe = replace(small(400, images=4, conditioners=(), **V), pretrained=str(run / "model"))
    found = examined(train_here(tmp_path / "run", recipe))
    assert [name for name, each in found.items() if each.failed] == ["memorised images"]
    assert "4 distinct" in found["memorised images"].cause and "more images" in found["memorised images"].remedy
    assert "it overfits" in found["loss by level"].measured


# What is not there, or damaged ---------------------------------------------------------------------------------------


def test_a_run_without_its_data_says_so(run, tmp_path):
    """What weights and kept latents can say is said."""
    lonely = copied(run, tmp_path / "run")
    save_json(recipe_to_dict(replace(RECIPE, dataset="celeba")), lonely / "recipe.json")
    found = examined(lonely)
    done = {name for name, each in found.items() if each.verdict == "passed"}
    assert done == {"latents", "averaged weights", "weights move", "ends of the schedule"}
    assert all("data" in each.measured for each in found.values() if each.verdict == "not done")


def test_a_run_that_has_just_begun_gives_no_verdict(tmp_path):
    save_json(recipe_to_dict(RECIPE), tmp_path / "recipe.json")
    found = verdicts(tmp_path)
    assert found.pop("ends of the schedule") == "passed" and found.pop("discriminator") == "not applicable"
    assert set(found.values()) == {"not done"}


def damaged(folder: Path, name: str, text: bytes | None) -> Path:
    """The folder, with a file cut short, replaced, or (None) removed."""
    path = folder / name
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text or path.read_bytes()[:200])
    return folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.json", b"{"),
        ("recipe.json", b'{"kind": "cake"}'),
        ("diffusion.safetensors", b""),
        ("first_stage.safetensors", b"nonsense"),
        ("model/config.json", b"[]"),
        ("model/config.json", None),
        ("model/unet/model.safetensors", b""),
        ("latents/train.safetensors", b""),
    ],
)
def test_a_damaged_file_is_named(run, tmp_path, name, text):
    broken = damaged(copied(run, tmp_path / "run"), name, text)
    with pytest.raises(LDMError, match=Path(name).name):
        examine(broken, device="cpu", n=4)


def test_latents_of_another_shape_than_the_recipe_says_are_named(run, tmp_path):
    broken = copied(run, tmp_path / "size")
    save_json(recipe_to_dict(replace(RECIPE, size=32)), broken / "recipe.json")
    assert r"held_out.safetensors holds latents of shape (32, 4, 4, 4), but recipe.json says (…, 4, 8, 8)" in refusal(
        examine, broken, device="cpu", n=4
    )
    for name in ("mean", "logvar"):
        broken = copied(run, tmp_path / name)
        path = broken / "latents" / "train.safetensors"
        notes, tensors = load_notes(path), load_tensors(path)
        save_tensors(tensors | {name: tensors[name][..., :3].contiguous()}, path, notes=notes)
        assert "train.safetensors holds latents of shape (256, 4, 4, 3)" in refusal(examine, broken, device="cpu", n=4)


def test_an_extension_that_cannot_be_is_named_with_its_file(run, tmp_path):
    broken = copied(run, tmp_path / "run")
    extensions = [{"stage": "first_stage", "from": 150, "steps": 160}]
    save_json({"precision": "fp32", "extensions": extensions}, broken / "run.json")
    assert "run.json: extensions=" in refusal(examine, broken, device="cpu", n=4)


def test_a_state_of_another_recipe_is_refused(run, first_stage_run, tmp_path):
    broken = copied(run, tmp_path / "run")
    shutil.copyfile(first_stage_run / "first_stage.safetensors", broken / "diffusion.safetensors")
    with pytest.raises(CheckpointError, match="diffusion.safetensors is no state of this recipe's diffusion"):
        examine(broken, device="cpu")


def test_what_is_no_run_is_refused(tmp_path):
    assert "no folder and no shipped checkpoint" in refusal(examine, tmp_path / "nothing")
    assert "neither a run (recipe.json) nor a model (config.json)" in refusal(examine, tmp_path)
    assert "SceneReader" in refusal(examine, "scene-reader")
    assert refusal(examine, "toy-kl-f4", n=1).startswith("n=1")
    assert refusal(examine, "toy-kl-f4", seed=-1).startswith("seed=-1")
    assert "unknown device" in refusal(examine, "toy-kl-f4", device="tpu")


def test_a_model_that_does_not_say_how_it_was_made_is_examined_as_far_as_it_goes(first_stage):
    nameless: FirstStage = first_stage
    nameless.provenance = None
    found = examined(nameless)
    assert not any(each.failed for each in found.values())
    assert "provenance has no recipe" in found["latents"].measured


# The command ---------------------------------------------------------------------------------------------------------


def told(*words: str) -> tuple[int, str]:
    """Exit status and output of `ldm-edu doctor`."""
    result = CliRunner().invoke(app, ["doctor", *words, "--device", "cpu"])
    return result.exit_code, result.output


def test_the_command_prints_a_line_for_each_check(first_stage_run):
    code, text = told(str(first_stage_run), "--n", "16", "--seed", "1")
    assert code == 0 and [line[7:31].strip() for line in text.splitlines()] == list(CHECKS)


def test_the_command_names_cause_and_remedy_and_fails(first_stage, tmp_path):
    first_stage.scale_factor *= 4
    first_stage.save_pretrained(tmp_path / "model")
    code, text = told(str(tmp_path / "model"), "--n", "8")
    assert code == 1
    lines = text.splitlines()
    (row,) = [i for i, line in enumerate(lines) if line.startswith("FAULT")]
    assert "latents" in lines[row] and "cause:" in lines[row + 1] and "remedy:" in lines[row + 2]


def test_the_command_refuses_a_damaged_run_in_one_line(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"kind": "cake"}))
    code, text = told(str(tmp_path))
    assert code == 1 and "recipe.json" in text and "Traceback" not in text
