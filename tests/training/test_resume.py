"""A run that is interrupted, however and whenever, ends with the bits of one that is not; so do log and folder."""

import json
import os
import random
import re
import signal
import time

import pytest
from small_runs import Child, differences, tiny_autoencoder, train_and_draw, weights
from small_stages import SmallStage, small_run

import ldm_edu.files as file_tools
import ldm_edu.training.resume as training
from ldm_edu.errors import CheckpointError
from ldm_edu.files import load_notes
from ldm_edu.training.resume import run_stage

SEED = int(os.environ.get("LDM_EDU_TEST_SEED", random.SystemRandom().randrange(10**6)))  # of the moments of death


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    child = Child(train_and_draw, folder, output=folder.parent / "output")
    assert child.wait() == 0, child.text()
    return folder


def log(folder):
    """The log's lines, with what does not depend on the clock, or on when the mean of the loss was begun anew."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = ("stage", "step", "held_out", "psnr", "codes_used", "perplexity")
    return [{k: line[k] for k in kept if k in line} for line in lines]


def files(folder):
    """All files of a run but the images' cache, hidden ones too."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("cache")}


def assert_same_run(folder, straight):
    """Weights, averages, optimiser, log, images and list of files are those of the undisturbed run."""
    assert not differences(weights(straight), weights(folder))
    assert log(folder) == log(straight)
    assert files(folder) == files(straight)
    for picture in sorted((straight / "samples").iterdir()):
        assert (folder / "samples" / picture.name).read_bytes() == picture.read_bytes()


# Deaths ------------------------------------------------------------------------------------------------------------


def die() -> None:
    """Now, without a word to anybody."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_write(folder, k: int) -> None:
    """Train, and die when half of the k-th safetensors file is written."""
    whole, written = file_tools.save_file, []

    def half(tensors, path, metadata=None):
        whole(tensors, path, metadata=metadata)
        written.append(path)
        if len(written) == k:
            os.truncate(path, path.stat().st_size // 2)
            die()

    file_tools.save_file = half
    train_and_draw(folder)


def die_at_rename(folder, k: int) -> None:
    """Train, and die between the k-th temporary file and its new name."""
    whole, done = os.replace, []

    def never(source, target):
        done.append(target)
        if len(done) == k:
            die()
        whole(source, target)

    os.replace = never
    train_and_draw(folder)


def steps_done(folder) -> int:
    """The steps of both stages that are in checkpoints."""
    done = 0
    for stage in ("first_stage", "diffusion"):
        try:
            done += int(load_notes(folder / f"{stage}.safetensors")["step"])
        except CheckpointError:  # not there yet
            pass
    return done


def test_killed_at_ten_random_moments(straight, tmp_path):
    """SIGKILL: six times from outside at any moment, four times in the middle of a save, two of them half-way through
    the file and two before it takes its name."""
    print(f"LDM_EDU_TEST_SEED={SEED}")
    rng, folder, output = random.Random(SEED), tmp_path / "run", tmp_path / "output"
    plan = [None] * 6 + [die_at_write] * 2 + [die_at_rename] * 2
    rng.shuffle(plan)
    marks = sorted(rng.uniform(0, 9.5) for _ in plan)  # of the twelve steps
    for mark, death in zip(marks, plan):
        if death is None:
            child = Child(train_and_draw, folder, output=output)
            child.wait_until(lambda: steps_done(folder) >= int(mark) and rng.random() < 0.3)
            time.sleep(rng.uniform(0, 0.1))
            child.signal(signal.SIGKILL)
        else:
            child = Child(death, folder, rng.randint(1, 4), output=output)
        assert child.wait() == -signal.SIGKILL, child.text()
        print(f"{death.__name__ if death else 'killed'} with {steps_done(folder)} steps saved")
    child = Child(train_and_draw, folder, output=output)
    assert child.wait() == 0, child.text()
    assert_same_run(folder, straight)


def one_step_a_life(folder, recipe) -> None:
    """Train, and die as soon as one more step is in a checkpoint."""
    whole, lived = training.save_state, []

    def once(*args):
        if lived:
            die()
        whole(*args)
        lived.append(True)

    training.save_state = once
    train_and_draw(folder, recipe)


def test_a_first_stage_with_a_discriminator_killed_after_every_step(tmp_path):
    """With the codebook and what the optimiser remembers of both networks; the discriminator begins in the middle."""
    recipe, output = tiny_autoencoder(steps=6, start=3), tmp_path / "output"
    child = Child(train_and_draw, tmp_path / "straight", recipe, output=output)
    assert child.wait() == 0, child.text()
    folder = tmp_path / "run"
    for step in range(1, 6):
        child = Child(one_step_a_life, folder, recipe, output=output)
        assert child.wait() == -signal.SIGKILL, child.text()
        assert load_notes(folder / "first_stage.safetensors")["step"] == str(step)
    child = Child(train_and_draw, folder, recipe, output=output)
    assert child.wait() == 0, child.text()
    assert_same_run(folder, tmp_path / "straight")
    kept = weights(folder)
    assert any(name.startswith("first_stage.safetensors: task.adversary") for name in kept)
    assert any(name.startswith("model/model.safetensors: quantize.embedding") for name in kept)


# Signals that are handled -------------------------------------------------------------------------------------------


def train_until_signalled(folder, stage: str, sent) -> None:
    """Train without a checkpoint at each step; after a line of the log of a stage, wait until the file `sent` is there.

    So the signal comes while the stage is trained, however busy the machine is."""
    whole = training.log_scores

    def patient(run, trained, *args):
        whole(run, trained, *args)
        end = time.monotonic() + 120
        while trained.name == stage and not sent.exists() and time.monotonic() < end:
            time.sleep(0.01)

    training.log_scores = patient
    train_and_draw(folder, save_every=1e9)


def lines_written(folder) -> int:
    return (folder / "log.jsonl").read_text().count("\n") if (folder / "log.jsonl").exists() else 0


@pytest.mark.parametrize("number, stage", [(signal.SIGINT, "first_stage"), (signal.SIGTERM, "diffusion")])
def test_stopped_by_a_signal(number, stage, straight, tmp_path):
    """Ctrl-C, and what a cluster sends: the step is finished, saved, and gone on from."""
    folder, output, sent = tmp_path / "run", tmp_path / "output", tmp_path / "sent"
    child = Child(train_until_signalled, folder, stage, sent, output=output)
    child.wait_until(lambda: lines_written(folder) >= (1 if stage == "first_stage" else 3))
    child.signal(number)
    sent.touch()
    assert child.wait() == 1, child.text()
    stopped = re.search(r"KeyboardInterrupt: (\w+) stopped after step (\d), and saved", child.text())
    assert stopped, child.text()
    assert stopped[1] == stage and stopped[2] == load_notes(folder / f"{stage}.safetensors")["step"]
    child = Child(train_until_signalled, folder, stage, sent, output=output)
    assert child.wait() == 0, child.text()
    assert_same_run(folder, straight)


def train_and_interrupt_twice(folder) -> None:
    """A second Ctrl-C while the first is still waiting for the end of the step."""

    def impatient(run, stage, state):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    training.save_samples = impatient
    train_and_draw(folder)


def test_a_second_signal_stops_at_once(tmp_path):
    child = Child(train_and_interrupt_twice, tmp_path / "run", output=tmp_path / "output")
    assert child.wait() == 1 and "and saved" not in child.text()
    assert steps_done(tmp_path / "run") == 5  # the sixth is where it happened


@pytest.mark.parametrize("doing", ["validate", "sample"])
def test_a_signal_while_the_last_step_is_looked_at_is_not_lost(doing, tmp_path):
    """Or Ctrl-C would do nothing, and the next stage begin."""

    class Interrupted(SmallStage):
        def look(self, task):
            if self.last.exists() and not self.sent:
                self.sent = True
                os.kill(os.getpid(), signal.SIGINT)

        def validate(self, task):
            if doing == "validate":
                self.look(task)
            return {}

        def sample(self, task):
            if doing == "sample":
                self.look(task)

        def batch(self, step):
            if step == 4:
                self.last.touch()
            return super().batch(step)

    stage = Interrupted(steps=5)
    stage.last, stage.sent = tmp_path / "last", False
    with pytest.raises(KeyboardInterrupt, match="small stopped after step 5, and saved"):
        run_stage(small_run(tmp_path / "run", sample_every=5), stage)
    assert load_notes(tmp_path / "run" / "small.safetensors")["step"] == "5"
