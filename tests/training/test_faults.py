"""Numbers that are not finite, disks that are full, files that are cut short: what is said, and what is kept."""

import json
import math
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from small_runs import Child, differences, of_stages, tiny, train_tiny
from small_stages import Small, SmallStage, batch_at, held_out, small_run, stopping_at, train_small
from torch import nn

import ldm_edu.training.loop as loop
from ldm_edu.errors import CheckpointError, DataError, LDMError
from ldm_edu.files import load_notes, load_tensors
from ldm_edu.training.resume import run_stage
from ldm_edu.training.run import Run, RunOptions, make_accelerator
from ldm_edu.training.state import state_file

# Numbers that are not finite -----------------------------------------------------------------------------------------


def broken_at(step: int, value: float = math.nan):
    """`batch_at`, but at one step the term `far` of the loss is not finite."""
    return lambda k: batch_at(k) | ({"weight": torch.full((4,), value)} if k == step else {})


def all_finite(file: Path) -> bool:
    """Whether every tensor of a checkpoint is; the best loss so far is infinite while nothing was measured."""
    return all(value.isfinite().all() for name, value in load_tensors(file).items() if name != "best")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_names_term_and_step(value, tmp_path):
    straight = train_small(tmp_path / "straight")
    with pytest.raises(LDMError, match=r"at step 7 the loss is (nan|inf): far is to blame \(near 0?\.?\d.*, far "):
        train_small(tmp_path / "run", broken_at(7, value))
    assert load_notes(tmp_path / "run" / "small.safetensors")["step"] == "7"
    assert all_finite(tmp_path / "run" / "small.safetensors")
    assert not differences(straight, train_small(tmp_path / "run"))


def test_the_next_line_of_the_log_names_the_first_bad_step(tmp_path):
    """No checkpoint is due in between: the steps after the bad one are done in vain, and not kept."""
    straight = train_small(tmp_path / "straight", batch_at, held_out(1.0))
    done, run = [], small_run(tmp_path / "run", save_every=1e9)

    def noted(step):
        done.append(step)
        return broken_at(7)(step)

    with pytest.raises(LDMError, match=r"at step 7 the loss is nan: far is to blame \(near 0?\.?\d.*, far nan\)"):
        train_small(tmp_path / "run", noted, held_out(1.0), run=run)
    assert max(done) in (10, 11)  # made ahead: the tenth step was the last one that was done
    assert [line["step"] for line in run.read_log()] == [5]
    for name in ("small.safetensors", "small.best.safetensors"):
        assert load_notes(tmp_path / "run" / name)["step"] == "5" and all_finite(tmp_path / "run" / name)
    again = train_small(tmp_path / "run", batch_at, held_out(1.0), run=run)
    assert not differences(straight, again) and [line["step"] for line in run.read_log()] == [5, 10, 15, 20]
    assert all(math.isfinite(line["loss"]) for line in run.read_log())


def test_a_save_before_the_next_line_notices_it_too(tmp_path):
    """And so does a signal, which saves."""
    run, done = small_run(tmp_path / "run", every=100), []

    def noted(step):
        done.append(step)
        return broken_at(7)(step)

    with pytest.raises(LDMError, match="at step 7 the loss is nan: far is to blame"):
        train_small(tmp_path / "run", noted, run=run)
    assert max(done) in (8, 9) and not run.read_log()
    assert load_notes(tmp_path / "run" / "small.safetensors")["step"] == "7"

    class Stopped(Small):
        def forward(self, batch):
            if not batch["weight"].isfinite().all():
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(batch)

    run = small_run(tmp_path / "stopped", every=100, save_every=1e9)
    with pytest.raises(LDMError, match="at step 7 the loss is nan"):
        run_stage(run, SmallStage(broken_at(7), task=Stopped))
    assert not state_file(run, "small").exists()


def test_a_sample_before_the_next_line_notices_it_too(tmp_path):
    class Sampled(SmallStage):
        def sample(self, task):
            return task.net(torch.zeros(1, 3, 8, 8))[0].clamp(-1, 1)

    run = small_run(tmp_path, every=100, sample_every=4, save_every=1e9)
    with pytest.raises(LDMError, match="at step 5 the loss is nan: far is to blame"):
        run_stage(run, Sampled(broken_at(5)))
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["small-000004.png"]


def test_of_several_bad_steps_the_first_is_named(tmp_path):
    """The others are its consequence: after it, no weight is a number."""
    run = small_run(tmp_path, every=20, save_every=1e9)
    with pytest.raises(LDMError, match=r"at step 12 the loss is inf: far is to blame \(near \d.*, far inf\)"):
        train_small(tmp_path, broken_at(12, math.inf), run=run)


def test_a_gradient_that_is_not_finite_is_named(tmp_path):
    class Steep(Small):
        def forward(self, batch):
            loss, terms = super().forward(batch)
            return loss + (self.net[0].bias.sum() * 0).sqrt(), terms  # the root's slope at 0 is infinite

    run = small_run(tmp_path)
    with pytest.raises(LDMError, match=r"at step 0 .*near .*gradient's norm is (nan|inf)"):
        run_stage(run, SmallStage(task=Steep, steps=3))
    assert not state_file(run, "small").exists()


def test_a_stage_of_a_recipe_names_its_term(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "learning_rate", lambda training, step: 1e30 if step == 2 else 1e-3)
    with pytest.raises(LDMError, match="at step 3 the loss is .*l1"):
        train_tiny(tmp_path / "run")


@pytest.mark.parametrize("steps, save_every", [(9, 0.0), (1, 1e9)], ids=["at a save", "at the end"])
def test_weights_that_overflow_are_never_saved(steps, save_every, tmp_path):
    """Loss and gradient of the step are finite, but the step itself is longer than float32 can count."""
    run = small_run(tmp_path, every=100, save_every=save_every)
    stage = SmallStage(batch_at, held_out(1.0), steps=steps, lr=1e39, warmup=0, decay=False)
    with pytest.raises(LDMError, match=r"after step 0 of small some weights are not finite: they are not saved"):
        run_stage(run, stage)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_last_finite_weights_stay_where_later_ones_overflow(tmp_path, monkeypatch):
    """A learning rate that jumps at step 4: its checkpoint is refused, the one of the step before is gone on from."""
    straight, whole = train_small(tmp_path / "straight"), loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda how, step: 1e39 if step == 4 else whole(how, step))
    with pytest.raises(LDMError, match="after step 4 of small some weights are not finite"):
        train_small(tmp_path / "run", run=small_run(tmp_path / "run", every=100))
    path = tmp_path / "run" / "small.safetensors"
    assert load_notes(path)["step"] == "4" and all_finite(path) and not list(path.parent.glob(".*"))
    monkeypatch.setattr(loop, "learning_rate", whole)
    assert not differences(straight, train_small(tmp_path / "run"))


def test_a_recipe_with_a_huge_learning_rate_leaves_no_bad_file(tmp_path):
    """Whatever is in the folder afterwards is finite, for every moment of a save."""
    for k, save_every in enumerate((0.0, 1e9)):
        folder = tmp_path / str(k)
        with pytest.raises(LDMError, match="not finite|the loss is"):
            train_tiny(folder, of_stages(tiny(), lr=1e38, warmup=0), save_every=save_every)
        assert all(all_finite(path) for path in folder.glob("*.safetensors"))
        assert not (folder / "model").exists()


# Files ---------------------------------------------------------------------------------------------------------------


def fill_disk(folder: Path, limit: int) -> None:
    """Train on where no file can become longer than `limit` bytes: what a full disk says, without filling one."""

    class Sampled(SmallStage):
        def sample(self, task):
            return torch.rand(3, 64, 64)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    import torch._dynamo  # noqa: F401  some releases of torch import it for AdamW, and write files while they do

    run = small_run(folder, sample_every=4, save_every=1e9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        run_stage(run, Sampled())
    except LDMError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        (folder.parent / "message").write_text(str(error))


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on the size of files on this system")
@pytest.mark.parametrize(
    "limit, file", [(150, "log.jsonl"), (5000, "samples"), (14_000, "loss.png"), (40_000, "small.safetensors")]
)
def test_a_full_disk_keeps_the_last_checkpoint(limit, file, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(DataError):
        train_small(folder, stopping_at(8))
    before = (folder / "small.safetensors").read_bytes()
    assert len(before) > 40_000
    child = Child(fill_disk, folder, limit, output=tmp_path / "output")
    assert child.wait() == 0, child.text()
    message = (tmp_path / "message").read_text()
    assert str(folder / file) in message and "\n" not in message
    assert (folder / "small.safetensors").read_bytes() == before
    assert not [path for path in folder.rglob(".*")]
    assert not differences(train_small(tmp_path / "straight"), train_small(folder))


def test_a_checkpoint_cut_short_is_named(tmp_path):
    """At any length; and the message tells what could be done."""
    train_small(tmp_path, batch_at, held_out(1.0, 2.0))
    path, spare = tmp_path / "small.safetensors", tmp_path / "small.best.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    lengths = [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"small\.safetensors is not a whole .*put small\.best\.safetensors"):
            train_small(tmp_path)
        assert path.read_bytes() == whole[:length]
    spare.unlink()
    with pytest.raises(CheckpointError, match=r"To go on, remove small\.safetensors: small then begins again"):
        train_small(tmp_path)
    path.write_bytes(whole)
    train_small(tmp_path)


def test_the_best_can_take_the_place_of_the_newest(tmp_path):
    """As the message advises."""
    straight = train_small(tmp_path, batch_at, held_out(1.0, 2.0))
    os.replace(tmp_path / "small.best.safetensors", tmp_path / "small.safetensors")
    assert not differences(straight, train_small(tmp_path, batch_at, held_out(2.0)))


def test_a_checkpoint_of_another_recipe_other_images_or_another_network_is_refused(tmp_path):
    """The run's notes say which recipe, the stage's which images."""
    train_small(tmp_path)
    before = (tmp_path / "small.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"small\.safetensors was made with another recipe"):
        train_small(tmp_path, run=small_run(tmp_path, notes={"recipe": "another"}))
    stage = SmallStage()
    stage.notes = {"images": "others"}
    with pytest.raises(CheckpointError, match=r"small\.safetensors was made with other images"):
        run_stage(small_run(tmp_path), stage)

    class Linear(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)

    with pytest.raises(CheckpointError, match=r"small\.safetensors does not fit"):
        run_stage(small_run(tmp_path), SmallStage(task=Linear))
    assert (tmp_path / "small.safetensors").read_bytes() == before


def test_a_log_that_was_cut_short_can_be_gone_on_with(tmp_path):
    run = small_run(tmp_path)
    path = tmp_path / "log.jsonl"
    path.write_text('{"stage": "small", "st')
    train_small(tmp_path)
    assert [line["step"] for line in run.read_log()] == [5, 10, 15, 20]
    path.write_text(path.read_text()[:-20])
    train_small(tmp_path)
    assert [line["step"] for line in map(json.loads, path.read_text().splitlines())] == [5, 10, 15]


def test_no_line_of_the_log_is_there_twice(tmp_path):
    """The lines after the last checkpoint are written again; those of other stages stay."""
    run = small_run(tmp_path, every=1, save_every=1e9)
    run.log(stage="other", step=50)
    with pytest.raises(DataError):  # only the second step was saved, as the best one
        train_small(tmp_path, stopping_at(11), held_out(2.0, 1.0, 3.0), run=run)
    assert load_notes(tmp_path / "small.safetensors")["step"] == "2" and len(run.read_log()) == 12
    train_small(tmp_path, run=run)
    assert [line["step"] for line in run.read_log()] == [50, *range(1, 21)]


# Precisions ----------------------------------------------------------------------------------------------------------


def test_unknown_precision_and_device():
    with pytest.raises(LDMError, match="bf16"):
        make_accelerator("cpu", "fp8")
    with pytest.raises(LDMError, match="cuda"):
        make_accelerator("tpu")
    with pytest.raises(LDMError, match="GPU"):
        make_accelerator("cpu", "fp16")


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_other_precisions_train(precision, tmp_path):
    """Weights stay in float32 where computation is in bfloat16; all is in float64 where that is asked for."""
    expected = train_small(tmp_path / "fp32")
    got = train_small(tmp_path / precision, run=small_run(tmp_path / precision, precision=precision))
    assert all(value.dtype == (torch.float64 if precision == "fp64" else torch.float32) for value in got.values())
    assert differences(expected, got)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].float(), value, rtol=0, atol=2e-2 if precision == "bf16" else 1e-4)


def test_a_run_needs_no_more_than_a_folder_and_an_accelerator(tmp_path):
    """Options and notes have defaults: a stage of one's own is trained in three lines."""
    run = Run(tmp_path, make_accelerator("cpu", "fp32"))
    assert run.options == RunOptions() and not run.notes
    _, how = run_stage(run, SmallStage(steps=3))
    assert how["steps"] == 3 and how["precision"] == "fp32" and (tmp_path / "loss.png").exists()
