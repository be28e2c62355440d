"""The training engine: randomness by step, exact resume, checkpoints, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.recipes import RECIPES, Training, find_recipe, recipe_from_dict, recipe_to_dict
from ldm_edu.settings import CheckpointError, LDMError, load_tensors
from ldm_edu.training import DiffusionTask, draws, make_accelerator, order, train


def tiny(steps: int = 6):
    """`toy-demo`, with as little of everything as there can be."""
    recipe = find_recipe("toy-demo").shortened(steps)
    text = replace(recipe.diffusion.text, dim=32, depth=1)
    second = replace(recipe.diffusion, channels=32, multipliers=(1,), attention_factors=(1,), text=text)
    return replace(recipe, images=40, diffusion=second)


@pytest.mark.parametrize("n, batch_size", [(7, 3), (10, 10), (5, 8), (1, 4)])
def test_every_epoch_is_a_permutation(n, batch_size):
    drawn = [i for step in range(3 * n) for i in order(3, step, batch_size, n)]
    for epoch in range(len(drawn) // n):
        assert sorted(drawn[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_draws_do_not_depend_on_the_batch():
    whole = draws(1, 5, [4, 9, 2], (2, 3, 3))
    for k, index in enumerate([4, 9, 2]):
        alone = draws(1, 5, [index], (2, 3, 3))
        assert all(torch.equal(whole[key][k : k + 1], alone[key]) for key in whole)
    other = draws(1, 6, [4], (2, 3, 3))
    assert not torch.equal(other["noise"], whole["noise"][:1])


def weights(folder) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value
        for part in ("first_stage", "unet", "conditioner")
        for name, value in load_tensors(folder / "model" / part / "model.safetensors").items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    model = train(tiny(), folder, device="cpu", precision="fp32", every=2)
    return folder, model


@pytest.mark.parametrize("stage, step", [("first_stage", 3), ("diffusion", 1), ("diffusion", 5)])
def test_a_run_that_died_ends_with_the_same_weights(stage, step, finished, tmp_path, monkeypatch):
    import ldm_edu.training as training

    whole = training.run_stage

    def mortal(run, name, task, how, batch_at, validate):
        def fragile(k):
            if name == stage and k == step:
                raise KeyboardInterrupt
            return batch_at(k)

        run.save_every = 0.0
        return whole(run, name, task, how, fragile, validate)

    monkeypatch.setattr(training, "run_stage", mortal)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run", device="cpu", precision="fp32", every=2)
    monkeypatch.setattr(training, "run_stage", whole)
    train(tiny(), tmp_path / "run", device="cpu", precision="fp32", every=2, resume=True)
    straight, again = weights(finished[0]), weights(tmp_path / "run")
    assert straight.keys() == again.keys() and all(torch.equal(straight[name], again[name]) for name in straight)


def test_a_killed_process_goes_on(finished, tmp_path):
    """SIGKILL, which no code of ours sees, at a step of the second stage."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import ldm_edu.training as training
        from test_training import tiny
        whole = training.run_stage
        def mortal(run, name, task, how, batch_at, validate):
            def fragile(k):
                if name == "diffusion" and k == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                return batch_at(k)
            run.save_every = 0.0
            return whole(run, name, task, how, fragile, validate)
        training.run_stage = mortal
        training.train(tiny(), {str(tmp_path / "run")!r}, device="cpu", precision="fp32", every=2)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    train(tiny(), tmp_path / "run", device="cpu", precision="fp32", every=2, resume=True)
    straight, again = weights(finished[0]), weights(tmp_path / "run")
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_the_run_folder_tells_what_was_done(finished):
    folder, model = finished
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["first_stage"] * 3 + ["diffusion"] * 3
    assert all({"step", "loss", "images_per_second", "seconds"} <= set(line) for line in lines)
    assert recipe_from_dict(json.loads((folder / "recipe.json").read_text())) == tiny()
    loaded = LatentDiffusion.from_pretrained(folder / "model")
    assert torch.equal(loaded.sample("a big red ball", steps=2), model.sample("a big red ball", steps=2))
    assert loaded.made["diffusion"]["steps"] == 6


def test_a_folder_with_a_run_is_not_overwritten(finished):
    folder, _ = finished
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(LDMError, match="already holds a run"):
        train(tiny(), folder, device="cpu", precision="fp32")
    with pytest.raises(LDMError, match="recipe"):
        train(tiny(7), folder, device="cpu", precision="fp32", resume=True)
    assert (folder / "log.jsonl").read_bytes() == before


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(LDMError, match="no run"):
        train(tiny(), tmp_path / "none", resume=True)


def test_a_cut_checkpoint_is_named(finished, tmp_path):
    import shutil

    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "diffusion.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="diffusion.safetensors"):
        train(tiny(), tmp_path / "run", device="cpu", precision="fp32", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    import ldm_edu.training as training

    monkeypatch.setattr(training, "learning_rate", lambda training, step: 1e30 if step == 2 else 1e-3)
    with pytest.raises(LDMError, match="at step 3 the loss is .*l1"):
        train(tiny(), tmp_path / "run", device="cpu", precision="fp32")


def test_unknown_precision_and_device():
    with pytest.raises(LDMError, match="bf16"):
        make_accelerator("cpu", "fp8")
    with pytest.raises(LDMError, match="cuda"):
        make_accelerator("tpu")
    with pytest.raises(LDMError, match="GPU"):
        make_accelerator("cpu", "fp16")


def test_dropped_captions_are_the_null_condition():
    """With drop = 1 the loss does not know the captions; with drop = 0 it does."""
    recipe = tiny()
    captions, shape = ["a big red ball", "a small blue cube"], (4, 8, 8)
    torch.manual_seed(0)
    batch = draws(0, 0, [0, 1], shape) | {"z": torch.randn(2, *shape)}
    losses = {}
    for p in (0.0, 1.0):
        task = DiffusionTask(replace(recipe, diffusion=replace(recipe.diffusion, drop=p)))
        torch.manual_seed(1)
        for parameter in task.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        with torch.no_grad():
            losses[p] = [task(batch | {"caption": c})[0].item() for c in (captions, captions[::-1])]
    assert losses[1.0][0] == losses[1.0][1] and losses[0.0][0] != losses[0.0][1]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    recipe = find_recipe(name)
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe
    with pytest.raises(LDMError, match="no field colour"):
        recipe_from_dict(recipe_to_dict(recipe) | {"colour": 1})


def test_nonsense_in_a_recipe_is_refused():
    for bad in (dict(steps=0), dict(batch_size=0), dict(ema=1.0), dict(warmup=-1)):
        with pytest.raises(LDMError, match=next(iter(bad))):
            Training(**(dict(steps=1, batch_size=1, lr=1e-3) | bad))
