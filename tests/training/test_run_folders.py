"""What else may lie in a run's folder, or have happened to it: other processes, damaged files, files that are lost."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import Child, differences, tiny, tiny_autoencoder, train_tiny, weights
from small_stages import SmallStage, batch_at, held_out, small_run, train_small

import ldm_edu.training.run as runs
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import load_notes, load_tensors, save_tensors
from ldm_edu.training.dispatch import train
from ldm_edu.training.recipes import find_recipe, recipe_to_dict
from ldm_edu.training.resume import run_stage
from ldm_edu.training.run import RunOptions, SignalGuard, make_accelerator, open_run

CPU = RunOptions(device="cpu", precision="fp32", sample_every=0)
RESUMED = replace(CPU, resume=True)

# Two processes in one folder -----------------------------------------------------------------------------------------


def hold_run(folder: Path) -> None:
    """Open a run, and stay."""
    run = open_run(tiny(), folder, RunOptions(device="cpu", precision="fp32"))
    (folder.parent / "open").touch()
    time.sleep(600)
    run.close()


def test_a_second_process_is_kept_out_until_the_first_is_gone(tmp_path):
    folder = tmp_path / "run"
    child = Child(hold_run, folder, output=tmp_path / "output")
    child.wait_until((tmp_path / "open").exists)
    (folder / f".loss.png.{child.process.pid}-a1b2c3").write_text("half")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(LDMError, match=f"{folder}: another process is training in this folder"):
        train_tiny(folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    child.signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert open_run(tiny(), folder, RESUMED).lock.is_locked


def test_a_run_that_ends_lets_others_in(tmp_path):
    """Whether it has ended well or not; and the lock alone makes no run of a folder."""
    folder = tmp_path / "run"
    broken = replace(tiny(1), dataset="toy", size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm_edu.training.dispatch.run_stage", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) as error:
            train(broken, folder, CPU)
    assert (folder / ".lock").exists() and error.tb  # the traceback keeps the run alive
    for name in ("recipe.json", "run.json"):
        (folder / name).unlink()
    with open_run(tiny(), folder, CPU).lock as lock:
        assert lock.is_locked


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError("no flock")])
def test_where_files_cannot_be_locked_there_is_a_warning(error, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(runs.FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match="run lies where files cannot be locked: start no second process"):
        run = open_run(tiny(), tmp_path / "run", CPU)
    run.close()


# Places that cannot be written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        (".", "file stands where a folder is needed"),
        ("model", r"already holds a run \(model\)"),
        ("cache", "cache is no folder, but a run writes one there"),
        ("recipe.json/inside", "already holds a run"),
        (".lock/inside", r"\.lock cannot be written"),
    ],
)
def test_what_stands_in_the_way_of_the_result_is_found_before_the_work(name, message, tmp_path):
    folder = tmp_path / "run"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("something") if name != "." else folder.write_text("something")
    with pytest.raises(LDMError, match=message):
        open_run(tiny(), folder, CPU)
    assert not (folder / "run.json").exists() and not (folder / "recipe.json").is_file()


def test_a_file_in_the_place_of_the_model_is_found_before_the_run_goes_on(tmp_path):
    """And not after hours, when the model is saved."""
    open_run(tiny(), tmp_path, CPU)
    (tmp_path / "model").write_text("something")
    with pytest.raises(LDMError, match="model is no folder, but a run writes one there: move it away"):
        open_run(tiny(), tmp_path, RESUMED)


@pytest.mark.parametrize(
    "folder", ["/proc/nothing/here", "/dev/null/run", "x" * 300, "loop/run", "a\0b", "~no such user/a"]
)
def test_a_folder_that_cannot_be_is_named_in_one_line(folder, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    place = folder if folder.startswith("~") else tmp_path / folder
    with pytest.raises(LDMError, match="cannot be written: |is no name that a file can have") as error:
        open_run(tiny(), place, CPU)
    assert len(str(error.value).splitlines()) == 1


def test_a_cache_that_is_a_file_leaves_no_recipe_behind(tmp_path):
    (tmp_path / "file").write_text("something")
    with pytest.raises(LDMError, match="file cannot be written: a file stands where a folder is needed"):
        train_tiny(tmp_path / "run", cache_dir=tmp_path / "file")
    assert not (tmp_path / "run" / "recipe.json").exists()
    train_tiny(tmp_path / "run", tiny(1), cache_dir=tmp_path / "cache")


def test_weights_that_are_missing_are_noticed_before_pictures_are_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    recipe = tiny_autoencoder()
    recipe = replace(recipe, first_stage=replace(recipe.first_stage, perceptual="lpips-vgg"))
    with pytest.raises(LDMError, match="LPIPS has no weights for 'vgg'"):
        train_tiny(tmp_path / "run", recipe, weights_dir=tmp_path)
    judge = replace(find_recipe("scene-reader"), first_stages=("toy-text2img",))
    with pytest.raises(LDMError, match="toy-text2img"):
        train_tiny(tmp_path / "run", judge)
    assert not (tmp_path / "run").exists()


# Runs of which only a part is there ----------------------------------------------------------------------------------


def test_a_run_that_was_stopped_before_its_first_step_does_not_bar_the_way(tmp_path):
    """Recipe, precision and lock are no work that could be lost."""
    folder = tmp_path / "run"
    open_run(tiny(7), folder, CPU)
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"recipe.json", "run.json", ".lock"}
    assert open_run(tiny(), folder, CPU).folder == folder
    assert json.loads((folder / "recipe.json").read_text())["diffusion"]["training"]["steps"] == 6
    (folder / "recipe.json").write_text('{"flour": "500 g"}')  # somebody else's
    with pytest.raises(LDMError, match=r"already holds a run \(recipe.json\)"):
        open_run(tiny(), folder, CPU)


def test_a_lost_recipe_is_restored_from_a_checkpoint(tmp_path):
    straight, folder = tmp_path / "straight", tmp_path / "run"
    train_tiny(straight)
    train_tiny(folder)
    for name in ("recipe.json", "run.json"):
        (folder / name).unlink()
    with pytest.raises(LDMError, match=r"already holds a run \(log.jsonl, .*: go on with it \(--resume; "):
        train_tiny(folder, resume=False)
    with pytest.raises(LDMError, match=r"is not the recipe as it is now \(first_stage.training.steps was 6 and is 7"):
        train_tiny(folder, tiny(7), resume=True)
    with pytest.raises(LDMError, match="began in fp32, and goes on in it"):
        train_tiny(folder, resume=True, precision="bf16")
    train_tiny(folder, resume=True)
    assert (folder / "recipe.json").read_bytes() == (straight / "recipe.json").read_bytes()
    assert (folder / "run.json").read_bytes() == (straight / "run.json").read_bytes()
    assert not differences(weights(straight), weights(folder))


def test_a_folder_of_which_nothing_can_go_on_says_so(tmp_path):
    (tmp_path / "log.jsonl").write_text("{}")
    with pytest.raises(LDMError, match=r"already holds a run \(log.jsonl\): remove these, or take another folder"):
        open_run(tiny(), tmp_path, CPU)
    with pytest.raises(LDMError, match="holds no run to go on with: neither recipe.json nor a checkpoint says its"):
        open_run(tiny(), tmp_path, RESUMED)


DEEP, LARGE = "[" * 100_000, '{"size": ' + "9" * 5000 + "}"
DAMAGED = ["", "[1]", '{"kind": []}', '{"kind": "diffusion model"', "\xff", DEEP, LARGE]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_recipe_or_precision_is_one_clear_error(text, tmp_path):
    folder = open_run(tiny(), tmp_path / "run", CPU).folder
    whole = (folder / "recipe.json").read_bytes()
    (folder / "recipe.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(LDMError, match="recipe.json is no recipe .*remove it; the run then begins again") as error:
        open_run(tiny(), folder, RESUMED)
    assert len(str(error.value)) < 1000 and len(str(error.value).splitlines()) == 1
    (folder / "recipe.json").write_bytes(whole)
    (folder / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(LDMError, match="run.json .*remove it; the precision is then that of the checkpoints"):
        open_run(tiny(), folder, RESUMED)


# The log -------------------------------------------------------------------------------------------------------------


GOOD = '{"stage": "other", "step": 3, "loss": 0.5}\n'
BAD = [
    '{"stage": "small", "step": 1}{"stage": "small", "step": 2}\n',
    '{"stage": "small", "st\n',
    '{"step": 5}\n',
    '{"stage": "small"}\n',
    '{"stage": "small", "step": "five"}\n',
    '{"stage": ["small"], "step": 5}\n',
    '{"stage": "small", "step": 5, "loss": "low"}\n',
    '["small", 5]\n',
    '"small"\n',
    "null\n",
    "\xff\xfe\n",
    "\0" * 512 + "\n",
    "[" * 100_000 + "\n",
    '{"stage": "small", "step": ' + "9" * 5000 + "}\n",
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_damaged_line_of_the_log_is_left_out_and_the_run_goes_on(bad, tmp_path):
    (tmp_path / "log.jsonl").write_bytes((GOOD + bad + GOOD).encode("latin-1"))
    run = small_run(tmp_path, sample_every=10)
    with pytest.warns(UserWarning, match=r"log\.jsonl: 1 of 3 lines are damaged and left out") as warned:
        train_small(tmp_path, run=run)
    assert len(warned) == 1 and (tmp_path / "loss.png").exists()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 3, 5, 10, 15, 20]


@pytest.mark.parametrize("name", ["log.jsonl", "loss.png", "samples/small-000010.png"])
def test_a_folder_in_the_place_of_what_only_tells_of_a_run_does_not_end_it(name, tmp_path):
    class Sampled(SmallStage):
        def sample(self, task):
            return torch.zeros(3, 8, 8)

    (tmp_path / name).mkdir(parents=True)
    with pytest.warns(UserWarning, match=f"{name} cannot be .*; the training goes on") as warned:
        average, _ = run_stage(small_run(tmp_path, sample_every=10), Sampled(batch_at))
    assert len(warned) == 1
    assert not differences(average.state_dict(), train_small(tmp_path / "straight"))


def test_numbers_that_json_does_not_know_do_not_damage_the_log(tmp_path):
    run = small_run(tmp_path)
    run.log("small", 1, psnr=float("inf"), held_out=float("nan"), loss=0.5)
    assert run.read_log() == [{"stage": "small", "step": 1, "psnr": None, "held_out": None, "loss": 0.5}]
    runs.plot_log(run.read_log(), tmp_path / "loss.png")


def test_a_backend_that_does_not_exist_draws_all_the_same(tmp_path):
    """As an environment variable that is left over from somewhere names it."""
    program = f"""
import warnings; warnings.simplefilter("error")
from pathlib import Path
from ldm_edu.training.run import plot_log
plot_log([{{"stage": "a", "step": 1, "loss": 0.5}}], Path({str(tmp_path / "loss.png")!r}))
import os; assert os.environ["MPLBACKEND"] == "junk"
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"MPLBACKEND": "junk"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_score_that_json_does_not_know_does_not_end_a_run_at_its_end(tmp_path):
    """Nothing named wrongly, a reconstruction without any error: after all steps, the provenance has to be written."""

    class Lossless(SmallStage):
        def validate(self, task):
            return {"psnr": float("inf"), "accuracy": float("nan"), "held_out": 1.0}

    _, how = run_stage(small_run(tmp_path), Lossless(batch_at))
    assert (how["psnr"], how["accuracy"], how["held_out"]) == (None, None, 1.0)
    json.dumps(how, allow_nan=False)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_newest_and_best_are_two_files(tmp_path):
    """One bad spot on the disk must not take both."""
    straight = train_small(tmp_path, batch_at, held_out(1.0))
    newest, best = tmp_path / "small.safetensors", tmp_path / "small.best.safetensors"
    train_small(tmp_path / "run", batch_at, held_out(4.0, 3.0, 2.0, 1.0))
    assert (tmp_path / "run" / newest.name).read_bytes() == (tmp_path / "run" / best.name).read_bytes()
    for folder in (tmp_path, tmp_path / "run"):
        assert (folder / newest.name).stat().st_ino != (folder / best.name).stat().st_ino
    rotten = bytearray(newest.read_bytes())
    rotten[-100] ^= 1
    newest.write_bytes(rotten)
    with pytest.raises(CheckpointError, match=r"small\.safetensors is damaged.*put small\.best\.safetensors in its"):
        train_small(tmp_path, batch_at, held_out(1.0))
    os.replace(best, newest)  # as it says
    assert not differences(straight, train_small(tmp_path, batch_at, held_out(1.0)))


def changed(name, value):
    return lambda tensors: tensors | {name: value}


def without(*names):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def number(value):
    return torch.tensor(value, dtype=torch.float64)


WRONG = {
    "a weight is missing": (without("task.net.0.bias"), "of the weights, 'net.0.bias' is missing"),
    "all weights are": (without(*(f"task.net.{i}.{n}" for i in (0, 2) for n in ("weight", "bias"))), "and 3 more are"),
    "a weight too many": (changed("ema.net.9.bias", torch.zeros(1)), "averaged weights, 'net.9.bias' is unknown"),
    "its shape": (changed("task.net.0.bias", torch.zeros(3)), r"'net.0.bias' is \(\(3,\), torch.float32\), not \(\(64"),
    "its dtype": (changed("task.net.0.bias", torch.zeros(64).int()), r"torch.int32\), not \(\(64,\), torch.float32"),
    "a stranger": (changed("optimizer.77.step", torch.zeros(())), "the optimiser has no weight number 77"),
    "no number": (changed("optimizer.x.step", torch.zeros(())), "the optimiser has no weight number x"),
    "a moment is missing": (without("optimizer.0.exp_avg"), "optimiser's memory, '0.exp_avg' is missing"),
    "a moment's shape": (changed("optimizer.0.exp_avg", torch.zeros(3)), r"'0.exp_avg' is \(\(3,\)"),
    "its step": (changed("optimizer.0.step", torch.tensor(1e9)), r"'0.step' is \[1000000000.0\]"),
    "another entry": (changed("optimizer.0.max_exp", torch.zeros(3)), "'0.max_exp' is unknown"),
    "no step": (without("step"), "'step' is missing"),
    "a negative step": (changed("step", number(-5)), r"'step' is \[-5.0\], and should be a number from 0 to 20"),
    "a step too far": (changed("step", number(10**9)), r"'step' is \[1000000000.0\]"),
    "half a step": (changed("step", number(2.5)), "'step' is 2.5, and should be a whole number"),
    "many steps": (changed("step", number([1.0, 2.0])), r"'step' is \[1.0, 2.0\]"),
    "nan seconds": (changed("seconds", number(float("nan"))), r"'seconds' is \[nan\]"),
    "nan as the best": (changed("best", number(float("nan"))), "'best' is no loss"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_a_state_that_does_not_fit_is_refused_in_one_line_before_anything_is_changed(change, message, tmp_path):
    train_small(tmp_path)
    path = tmp_path / "small.safetensors"
    save_tensors(change(load_tensors(path)), path, notes=load_notes(path))
    stage = SmallStage()
    before = {name: value.clone() for name, value in stage.task.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"small\.safetensors does not fit this network \(.*{message}") as error:
        run_stage(small_run(tmp_path), stage)
    told = str(error.value)
    assert len(told) < 600 and told.endswith("remove small.safetensors: small then begins again")
    assert not differences(before, stage.task.state_dict())


def test_a_state_without_its_optimiser_is_refused(tmp_path):
    train_small(tmp_path)
    path = tmp_path / "small.safetensors"
    kept = {name: value for name, value in load_tensors(path).items() if not name.startswith("optimizer.")}
    save_tensors(kept, path, notes=load_notes(path))
    with pytest.raises(CheckpointError, match="the optimiser's memory is missing"):
        train_small(tmp_path)
    save_tensors(kept | {"step": number(0)}, path, notes=load_notes(path))
    train_small(tmp_path)


def test_a_best_state_that_does_not_fit_is_named(tmp_path):
    train_small(tmp_path, batch_at, held_out(1.0, 2.0), keep="best")
    path = tmp_path / "small.best.safetensors"
    save_tensors(changed("ema.net.0.bias", torch.zeros(3))(load_tensors(path)), path)
    with pytest.raises(CheckpointError, match=r"small\.best\.safetensors does not fit .*remove it: then the last step"):
        train_small(tmp_path, batch_at, held_out(2.0), keep="best")
    path.unlink()
    train_small(tmp_path, batch_at, held_out(2.0), keep="best")


# Processes and signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told, message",
    [
        ("abc", "WORLD_SIZE='abc' should be a number of processes: start the processes with `accelerate launch`"),
        ("", "WORLD_SIZE='' should be a number"),
        ("0", "WORLD_SIZE='0' should be a number"),
        ("-2", "WORLD_SIZE='-2' should be a number"),
        ("2", "WORLD_SIZE=2 speaks of 2 processes, but RANK, MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_a_launcher_that_says_something_without_sense_is_named(told, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", told)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LDMError, match=message):
        make_accelerator("cpu", "fp32")
    with pytest.raises(LDMError, match=message):
        train_tiny(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, value",
    [
        ("ACCELERATE_DYNAMO_BACKEND", "junk"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "junk"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "junk"),
    ],
)
def test_what_recipe_and_options_decide_no_environment_variable_does(name, value, tmp_path, monkeypatch):
    """Four steps of accumulation would divide every loss by four."""
    straight = train_small(tmp_path / "straight")
    monkeypatch.setenv(name, value)
    assert not differences(straight, train_small(tmp_path / "run"))


def test_an_environment_that_accelerate_refuses_is_named(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "abc")
    with pytest.raises(LDMError, match="accelerate refuses what the environment variables say: invalid literal"):
        make_accelerator("cpu", "fp32")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals that hang up on this system")
def test_a_terminal_that_is_closed_stops_a_run_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGHUP)
    with SignalGuard() as guard:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
        assert guard.requested
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:  # as `nohup` starts it
        with SignalGuard() as guard:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert not guard.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_recipe_that_is_written_can_be_read_by_eye(tmp_path):
    open_run(tiny(), tmp_path / "run", CPU)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["kind"] == recipe_to_dict(tiny())["kind"]
