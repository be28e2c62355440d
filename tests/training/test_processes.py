"""Several processes: the weights of one, a batch that is shared out, and one signal that stops all."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from small_runs import Child, of_stages, tiny, tiny_autoencoder, train_tiny, weights

import ldm_edu.training.stages as training
from ldm_edu.files import load_notes
from ldm_edu.training.loop import batch_indices

# What each of the processes runs: as a script, since that is what `accelerate launch` starts.
SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import test_processes

if __name__ == "__main__":
    test_processes.{do}({folder!r})
"""


def train_and_record(folder: str, **training_options) -> None:
    """Twenty steps of both stages in float64; writes down which samples this process has drawn noise for."""
    from pathlib import Path

    whole, seen, rank = training.step_randomness, [], os.environ.get("RANK", "0")

    def recorded(seed, step, indices, *args, **kwargs):
        seen.append([seed, step, list(indices)])
        return whole(seed, step, indices, *args, **kwargs)

    training.step_randomness = recorded
    train_tiny(
        Path(folder),
        of_stages(tiny(20), **training_options),
        precision="fp64",
        every=20,
        sample_every=0,
        save_every=1e9,
    )
    Path(f"{folder}.{rank}.json").write_text(json.dumps(seen))


def train_in_micro_batches(folder: str) -> None:
    train_and_record(folder, accumulate=4)


def train_tiny_autoencoder(folder: str) -> None:
    """Ten steps of a first stage with codebook and discriminator, in float64; the latter from step 4 on."""
    from pathlib import Path

    train_tiny(Path(folder), tiny_autoencoder(10, start=4), precision="fp64", every=10, sample_every=0, save_every=1e9)


def in_one(do, folder) -> None:
    """In a process of its own."""
    child = Child(do, str(folder), output=folder.parent / "output")
    assert child.wait(600) == 0, child.text()


def in_two(do, folder) -> None:
    """In two processes, as `accelerate launch` starts them."""
    script = folder.parent / "script.py"
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__), do=do.__name__, folder=str(folder)))
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines=1"]
    launch += ["--num_processes=2", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    done = subprocess.run(
        [*launch, str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    in_one(train_and_record, folder)
    return folder


def furthest(a, b) -> float:
    """The largest difference of any number in two runs' folders."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys() and any(name.startswith("model/") for name in left)
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def test_two_processes_give_the_weights_of_one(alone, tmp_path):
    """Both stages, their averages and the optimiser's memory; each process has computed half of every batch."""
    folder = tmp_path / "run"
    in_two(train_and_record, folder)
    assert furthest(alone, folder) < 1e-8 and (folder / "diffusion.safetensors").exists()
    shares = [json.loads((tmp_path / f"run.{rank}.json").read_text()) for rank in (0, 1)]
    for seed in (0, 1):  # of the first stage and of the diffusion model
        for step in range(20):
            (ours,), (theirs,) = (
                [i for s, k, i in share if (s, k) == (seed, step) and len(i) == 2] for share in shares
            )
            batch = batch_indices(seed, step, 4, 24)
            assert sorted(ours + theirs) == sorted(batch) and ours == batch[::2]
    (a, b) = ([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (alone, folder))
    for one, other in zip(a, b, strict=True):  # the log has the loss of whole batches, too
        assert one["step"] == other["step"] and one["loss"] == pytest.approx(other["loss"], rel=1e-10)


def test_two_processes_agree_on_a_discriminator(tmp_path):
    """λ is that of the whole batch, so the weights of both clip_groups are those of one process. Half of the batch has
    another λ: that is seen where the gradients are not averaged."""
    in_one(train_tiny_autoencoder, tmp_path / "one")
    in_two(train_tiny_autoencoder, tmp_path / "two")
    assert furthest(tmp_path / "one", tmp_path / "two") < 1e-8


def test_a_batch_in_micro_batches_gives_the_same_weights(alone, tmp_path):
    folder = tmp_path / "run"
    in_one(train_in_micro_batches, folder)
    assert furthest(alone, folder) < 1e-10


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train_as_one_of_two(folder, rank: int, port: int, recipe) -> None:
    """What `accelerate launch` would tell a process, and then a run of far too many steps."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train_tiny(folder, recipe, save_every=1e9)


def test_one_signal_stops_both(tmp_path):
    """Ctrl-C, to the one that does not save; the other one saves."""
    folder, port = tmp_path / "run", free_port()
    pair = [
        Child(train_as_one_of_two, folder, rank, port, tiny(2000), output=tmp_path / f"output{rank}") for rank in (0, 1)
    ]
    pair[0].wait_until(lambda: (folder / "log.jsonl").exists())
    pair[1].signal(signal.SIGINT)
    for child in pair:
        assert child.wait() == 1 and "first_stage stopped after step" in child.text(), child.text()
    assert int(load_notes(folder / "first_stage.safetensors")["step"]) >= 3


def test_two_processes_refuse_a_batch_that_they_cannot_share(tmp_path):
    folder, port = tmp_path / "run", free_port()
    recipe = tiny(batch_size=3)
    pair = [
        Child(train_as_one_of_two, folder, rank, port, recipe, output=tmp_path / f"output{rank}") for rank in (0, 1)
    ]
    assert [child.wait() for child in pair] == [1, 1]
    told = [child.text() for child in pair]  # one may refuse and end before the other has reached it
    assert any("batch_size=3 cannot be shared by 2 processes" in text for text in told), told
    assert not folder.exists()


def test_two_processes_refuse_a_folder_together(tmp_path):
    """The one that looks says why, and the other one says the same instead of waiting."""
    folder, port = tmp_path / "run", free_port()
    folder.mkdir()
    (folder / "log.jsonl").write_text("something")
    pair = [
        Child(train_as_one_of_two, folder, rank, port, tiny(), output=tmp_path / f"output{rank}") for rank in (0, 1)
    ]
    for child in pair:
        assert child.wait(120) == 1 and "LDMError: " in child.text() and "already holds a run" in child.text()
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl"]


def test_a_process_that_has_lost_the_other_says_so(tmp_path):
    folder, port = tmp_path / "run", free_port()
    pair = [
        Child(train_as_one_of_two, folder, rank, port, tiny(2000), output=tmp_path / f"output{rank}") for rank in (0, 1)
    ]
    pair[0].wait_until(lambda: (folder / "log.jsonl").exists())
    pair[1].signal(signal.SIGKILL)
    assert pair[0].wait(120) == 1
    told = pair[0].text().strip().splitlines()[-1]
    assert "LDMError: another process of this run has ended" in told and "--resume" in told, pair[0].text()
