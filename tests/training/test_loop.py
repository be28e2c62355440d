"""The loop: what is random about a step, what a step does, that it goes on exactly, and that it never waits."""

import threading
import traceback
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from small_runs import differences, tiny, tiny_autoencoder
from small_stages import (
    Small,
    SmallStage,
    batch_at,
    held_out,
    skip_unless_compiled,
    small_run,
    stopping_at,
    train_small,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_edu.data.toy.datasets import ToyCOCO
from ldm_edu.errors import DataError, LDMError
from ldm_edu.files import load_notes, load_tensors
from ldm_edu.training.data import pick_captions
from ldm_edu.training.loop import (
    EMA,
    batch_indices,
    learning_rate,
    micro_batches,
    optimise,
    prefetch,
    step_randomness,
    step_seed,
)
from ldm_edu.training.recipes import Training
from ldm_edu.training.resume import run_stage
from ldm_edu.training.run import RunOptions, open_run
from ldm_edu.training.stages import DiffusionStage, FirstStageStage
from ldm_edu.training.state import make_state
from ldm_edu.training.tasks import DiffusionTask

# What is random about a step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, batch_size", [(7, 3), (10, 10), (5, 8), (1, 4)])
def test_every_epoch_is_a_permutation(n, batch_size):
    drawn = [i for step in range(3 * n) for i in batch_indices(3, step, batch_size, n)]
    for epoch in range(len(drawn) // n):
        assert sorted(drawn[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_draws_do_not_depend_on_the_batch():
    whole = step_randomness(1, 5, [4, 9, 2], (2, 3, 3))
    for k, index in enumerate([4, 9, 2]):
        alone = step_randomness(1, 5, [index], (2, 3, 3))
        assert all(torch.equal(whole[key][k : k + 1], alone[key]) for key in whole)
    for seed, step in ((1, 6), (2, 5)):
        other = step_randomness(seed, step, [4], (2, 3, 3))
        assert not any(torch.equal(other[key], whole[key][:1]) for key in whole)


def test_noises_are_independent_of_each_other():
    many = step_randomness(0, 0, range(4000), (1,))
    columns = torch.stack([many[key].flatten().double() for key in ("t", "u", "phrase", "noise", "latent_noise")])
    assert (torch.corrcoef(columns) - torch.eye(5)).abs().max() < 4 / 4000**0.5


def test_dropped_captions_are_the_null_condition():
    """With drop = 1 the loss does not know the captions; with drop = 0 it does."""
    recipe = tiny()
    captions, shape = ["a big red ball", "a small blue cube"], (4, 8, 8)
    torch.manual_seed(0)
    batch = step_randomness(0, 0, [0, 1], shape) | {"z": torch.randn(2, *shape)}
    losses = {}
    for p in (0.0, 1.0):
        task = DiffusionTask(replace(recipe, diffusion=replace(recipe.diffusion, drop=p)))
        torch.manual_seed(1)
        for parameter in task.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        with torch.no_grad():
            losses[p] = [task(batch | {"caption": c})[0].item() for c in (captions, captions[::-1])]
    assert losses[1.0][0] == losses[1.0][1] and losses[0.0][0] != losses[0.0][1]


def test_every_phrasing_is_read_as_often():
    texts, phrase = [["a", "b", "c"], ["x"]], torch.rand(3000, generator=torch.Generator().manual_seed(0))
    read = pick_captions([texts[0]] * 3000, phrase)
    assert all(abs(read.count(text) / 3000 - 1 / 3) < 0.04 for text in texts[0])
    assert pick_captions([texts[1]] * 2, phrase[:2]) == ["x", "x"]
    assert pick_captions(texts, torch.tensor([0.99, 0.99])) == ["c", "x"]


def test_batches_are_pictures_latents_and_captions_that_belong_together(tmp_path):
    """What both stages hand to the loop, against the data set itself."""
    recipe, data = tiny(), ToyCOCO("train", size=16, keys=("image", "captions"))
    run = open_run(recipe, tmp_path / "run", RunOptions(device="cpu", precision="fp32"))
    stage = FirstStageStage(recipe, run)
    seen, shape, first = batch_indices(recipe.seed, 3, 4, 24), (4, 8, 8), stage.batch(3)
    bytes_of_pictures = ((torch.stack([data[i]["image"] for i in seen]) + 1) * 127.5).round() / 127.5 - 1
    torch.testing.assert_close(first["image"], bytes_of_pictures)
    assert torch.equal(first["latent_noise"], step_randomness(recipe.seed, 3, seen, shape)["latent_noise"])
    assert first["step"] == 3

    first_stage = stage.finish(stage.task.eval())
    second = DiffusionStage(recipe, run, {"first_stage": first_stage}).batch(3)
    seen = batch_indices(recipe.seed + 1, 3, 4, 24)
    random = step_randomness(recipe.seed + 1, 3, seen, shape)
    assert len(second["caption"]) == 4
    for i, u, caption in zip(seen, random["phrase"].tolist(), second["caption"], strict=True):
        assert caption == data[i]["captions"][int(u * len(data[i]["captions"]))]
    with torch.no_grad():
        posterior = first_stage.posterior(torch.stack([data[i]["image"] for i in seen]))
    z = posterior.sample(random["latent_noise"]) * first_stage.scale_factor
    torch.testing.assert_close(second["z"], z, rtol=1e-2, atol=1e-2)  # images are kept in bytes
    assert all(torch.equal(second[key], random[key]) for key in random)


def test_an_error_while_a_batch_is_made_comes_out_of_the_loop():
    def broken(step):
        raise DataError(f"nothing to read at step {step}")

    with pytest.raises(DataError, match="nothing to read at step 0"):
        list(prefetch(broken, 0, 3))


def test_batches_come_in_their_order_with_the_seconds_waited():
    got = list(prefetch(lambda step: step * step, 3, 8))
    assert [(step, batch) for step, batch, _ in got] == [(step, step * step) for step in range(3, 8)]
    assert all(waited >= 0 for *_, waited in got)


def test_micro_batches_cut_rows_and_keep_single_numbers():
    batch = {"z": torch.arange(8.0).view(4, 2), "caption": ["a", "b", "c", "d"], "step": 5}
    first, second = micro_batches(batch, 2)
    assert torch.equal(torch.cat([first["z"], second["z"]]), batch["z"]) and len(first["z"]) == 2
    assert (first["caption"], second["caption"]) == (["a", "b"], ["c", "d"]) and first["step"] == second["step"] == 5
    with pytest.raises(LDMError, match="4 samples, cannot be cut into accumulate=3"):
        micro_batches(batch, 3)


# The loop, on a small network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"channels_last": True}], ids=["contiguous", "channels last"])
def test_a_stage_goes_on_exactly(options, tmp_path):
    """Dropout, the optimiser's memory and the average included; and in both orders in memory."""
    straight = train_small(tmp_path / "a", run=small_run(tmp_path / "a", **options))
    with pytest.raises(DataError, match="step 11"):
        train_small(tmp_path / "b", stopping_at(11), run=small_run(tmp_path / "b", **options))
    assert load_notes(tmp_path / "b" / "small.safetensors")["step"] == "11"
    torch.randn(5)  # whoever else draws from PyTorch's stream must not matter
    assert not differences(straight, train_small(tmp_path / "b", run=small_run(tmp_path / "b", **options)))
    kept = [load_tensors(tmp_path / name / "small.safetensors") for name in "ab"]
    assert set(differences(*kept)) <= {"seconds"}


def losses(folder, **options) -> torch.Tensor:
    """The losses in the log of 20 steps."""
    run = small_run(folder, **({"every": 1} | options))
    train_small(folder, run=run)
    return torch.tensor([line["loss"] for line in run.read_log()])


def test_channels_last_changes_no_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(Small, "dropout", 0.0)  # it goes through the numbers as they lie in memory
    expected = losses(tmp_path / "a")
    assert len(expected) == 20 and expected[-1] < 0.8 * expected[0]
    torch.testing.assert_close(losses(tmp_path / "b", channels_last=True), expected, rtol=1e-5, atol=0)


def test_compiled_changes_no_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(Small, "dropout", 0.0)  # a compiled network draws other random numbers
    skip_unless_compiled()
    expected = losses(tmp_path / "a")
    compiled = []
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, *a, **k: compiled.append(self) or whole(self, *a, **k))
    torch.testing.assert_close(losses(tmp_path / "b", compile=True), expected, rtol=1e-4, atol=0)
    assert [type(module) for module in compiled] == [Small]


def test_newest_and_best_are_kept(tmp_path):
    """Losses on held-out data of 3, 1, 2 and 5: the second line of the log is the best; a fifth look is at the end."""
    values, averages = iter([3.0, 1.0, 2.0, 5.0, 0.0] * 2), []

    def scores(task):
        averages.append({name: value.clone() for name, value in task.state_dict().items()})
        return {"held_out": next(values)}

    last = train_small(tmp_path / "last", batch_at, scores)
    best = train_small(tmp_path / "best", batch_at, scores, keep="best")
    assert len(averages) == 10
    assert not differences(last, averages[3]) and not differences(best, averages[6])
    assert not differences(last, averages[4]) and not differences(best, averages[9])  # what is kept is measured again
    assert differences(last, best)
    for folder in (tmp_path / "last", tmp_path / "best"):
        assert load_notes(folder / "small.safetensors")["step"] == "20"
        assert load_notes(folder / "small.best.safetensors")["step"] == "10"
        kept = load_tensors(folder / "small.best.safetensors")
        assert not differences({k.removeprefix("ema."): v for k, v in kept.items() if k.startswith("ema.")}, best)
        assert kept["best"] == 1.0 == load_tensors(folder / "small.safetensors")["best"]


def test_best_survives_an_interruption(tmp_path):
    """The best of before the interruption stays the best after it."""
    with pytest.raises(DataError):
        train_small(tmp_path, stopping_at(8), held_out(1.0), keep="best")
    best = train_small(tmp_path, batch_at, held_out(2.0, 3.0, 4.0), keep="best")
    assert load_notes(tmp_path / "small.best.safetensors")["step"] == "5"
    assert not differences(best, train_small(tmp_path / "five", batch_at, held_out(1.0, 2.0), keep="best"))


def test_clipping_warm_up_and_average_are_what_they_say(tmp_path):
    """Three steps against a loop in which everything is written out."""
    how = Training(steps=3, batch_size=4, lr=1e-2, warmup=2, clip=0.1, ema=0.9, weight_decay=0.1)
    chosen = {name: value for name, value in asdict(how).items() if name in ("steps", "clip", "ema", "weight_decay")}
    averaged = train_small(tmp_path, **chosen)
    torch.manual_seed(0)
    net = Small()
    mean = {name: value.clone() for name, value in net.state_dict().items()}
    adam = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(3):
        torch.manual_seed(step_seed(0, step, 0))
        loss, _ = net(batch_at(step))
        grads = torch.autograd.grad(loss, list(net.parameters()))
        size = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        assert size > 0.1  # or clipping would not be tested
        for p, g in zip(net.parameters(), grads):
            p.grad = g * 0.1 / size
        adam.param_groups[0]["lr"] = learning_rate(how, step)
        adam.step()
        d = min(0.9, (1 + step) / (10 + step))
        mean = {name: d * mean[name] + (1 - d) * value for name, value in net.state_dict().items()}
    torch.testing.assert_close(dict(averaged), mean, rtol=1e-4, atol=1e-6)


def walk(run, stage):
    """The steps of a stage, without anything beside them."""
    state, task, optimizer = make_state(run, stage)
    return state, optimise(stage, run.accelerator, task, optimizer, state.ema)


def test_the_loop_alone_gives_the_weights_of_the_durable_one(tmp_path):
    """`optimise` is the whole training, `run_stage` only looks at it."""
    durable = train_small(tmp_path / "durable")
    state, steps = walk(small_run(tmp_path / "bare"), SmallStage())
    results = list(steps)
    assert [result.step for result in results] == list(range(1, 21))
    assert not differences(durable, state.ema.module.state_dict())
    assert not list((tmp_path / "bare").iterdir())
    for result in results:
        torch.testing.assert_close(result.loss, result.terms["near"] + result.terms["far"])
        assert result.norm > 0 and 0 <= result.waiting <= result.seconds
        assert not any(value.requires_grad for value in (result.loss, result.norm, *result.terms.values()))


def test_a_line_of_the_log_is_the_mean_of_its_steps(tmp_path):
    """Also where a run went on in the middle: then of the steps since."""
    _, steps = walk(small_run(tmp_path / "bare"), SmallStage())
    each = torch.stack([result.loss for result in steps])
    run = small_run(tmp_path / "run")
    with pytest.raises(DataError):
        train_small(tmp_path / "run", stopping_at(8), run=run)
    train_small(tmp_path / "run", run=run)
    logged = torch.tensor([line["loss"] for line in run.read_log()])
    expected = torch.stack([each[a:b].mean() for a, b in ((0, 5), (8, 10), (10, 15), (15, 20))])
    torch.testing.assert_close(logged, expected)


# Nothing in a step waits for the device ------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device, by the step at which it happens.

    That is whatever needs a value of a tensor: `item`, `bool`, `float` and so on; and every way of a whole tensor to
    the host. Only the thread that takes the steps is watched: the one that makes the batches works on the CPU."""

    NEEDS_VALUES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "item")
    TO_HOST = ("item", "tolist", "numpy", "cpu", "__float__", "__bool__", "__int__", "__index__", "__contains__")

    def __init__(self, monkeypatch):
        super().__init__()
        self.watching, self.step, self.places = None, 0, Counter()
        for name in self.TO_HOST:
            monkeypatch.setattr(torch.Tensor, name, self.noted(getattr(torch.Tensor, name)))

    def noted(self, whole):
        def asked(tensor, *args, **kwargs):
            self.note()
            return whole(tensor, *args, **kwargs)

        return asked

    def note(self):
        """Count, under the innermost function of the package."""
        if self.watching is not threading.current_thread():
            return
        place = next((f.name for f in traceback.extract_stack()[::-1] if "/ldm_edu/" in f.filename), "elsewhere")
        if place != "known_range":  # it looks at what lies on the CPU, and only there
            self.places[self.step, place] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NEEDS_VALUES:
            self.note()
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.watching = threading.current_thread()
        return super().__enter__()

    def __exit__(self, *error):
        self.watching = None
        return super().__exit__(*error)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The cache of the runs below."""
    return tmp_path_factory.mktemp("images")


def stage_of(kind: str, folder, cache_dir, **options):
    """A run, and a stage of it: the diffusion model with text; a first stage with discriminator, KL or codebook."""
    recipe = tiny(6) if kind == "diffusion" else tiny_autoencoder(6, start=2)
    if kind == "kl":
        recipe = replace(recipe, first_stage=replace(recipe.first_stage, regulariser="kl"))
    how = {"device": "cpu", "precision": "fp32", "cache_dir": cache_dir, "sample_every": 0, "save_every": 1e9}
    run = open_run(recipe, folder, RunOptions(**how, **options))
    first = FirstStageStage(recipe, run)
    if kind != "diffusion":
        return run, first
    return run, DiffusionStage(recipe, run, {"first_stage": first.finish(first.task.eval())})


KINDS = ("diffusion", "kl", "vq")


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(kind, images, tmp_path, monkeypatch):
    """The discriminator is used from the third step on."""
    run, stage = stage_of(kind, tmp_path / "run", images)
    _, steps = walk(run, stage)
    waits, results = Waits(monkeypatch), []
    with waits:
        for result in steps:
            results.append(result)
    assert not waits.places
    assert len(results) == 6 and all(result.loss.isfinite() for result in results)
    assert kind == "diffusion" or ["d_weight" in result.terms for result in results] == [False] * 2 + [True] * 4


@pytest.mark.parametrize(
    "ask", [bool, float, int, lambda x: x.item(), lambda x: x.tolist(), lambda x: x.cpu(), torch.nonzero]
)
def test_a_wait_would_be_seen(ask, tmp_path, monkeypatch):
    """Or the test above could not fail: here a network asks for a value in each step."""

    class Curious(Small):
        def forward(self, batch):
            loss, terms = super().forward(batch)
            ask(loss.detach().abs() + 1)
            return loss, terms

    _, steps = walk(small_run(tmp_path), SmallStage(task=Curious, steps=3))
    with Waits(monkeypatch) as waits:
        assert len(list(steps)) == 3
    assert waits.places.total() >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_durable_stage_waits_only_where_a_line_is_due(kind, images, tmp_path, monkeypatch):
    """For a line after each second step of six; nothing is saved before the end but what is the best so far."""
    run, stage = stage_of(kind, tmp_path / "run", images, every=2)
    waits = Waits(monkeypatch)

    def begin(task, args):
        waits.step += torch.is_grad_enabled()  # averaged weights are looked at without gradients

    stage.task.register_forward_pre_hook(begin)
    with waits:
        run_stage(run, stage)
    assert waits.step == 6
    assert {step for step, _ in waits.places} == {2, 4, 6}
    assert {"measure", "check_finite", "validate"} <= {place for _, place in waits.places}


# Stages of one's own -------------------------------------------------------------------------------------------------


class Odd(SmallStage):
    """A sample that cannot be drawn, and scores as tensors."""

    def sample(self, task):
        raise ValueError("no such picture")

    def validate(self, task):
        return {"held_out": torch.tensor(2.0), "count": np.int64(3)}


def test_a_sample_that_cannot_be_drawn_ends_no_training(tmp_path):
    run = small_run(tmp_path, sample_every=10)
    with pytest.warns(UserWarning, match=r"small: no sample could be drawn at step (10|20) \(no such picture\)"):
        _, history = run_stage(run, Odd())
    assert history["held_out"] == 2.0 and history["count"] == 3
    assert [line["count"] for line in run.read_log()] == [3] * 4


def test_a_stage_without_scores_trains(tmp_path):
    class Silent(SmallStage):
        def validate(self, task):
            return None

    run = small_run(tmp_path)
    run_stage(run, Silent())
    assert len(run.read_log()) == 4 and "held_out" not in run.read_log()[0]


def test_the_average_follows_names_and_not_places():
    """A buffer that comes later, in the first forward pass, would shift all that stand behind it."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average = EMA(module, 0.5)
    module[0].register_buffer("late", torch.ones(2))
    torch.nn.init.ones_(module[1].weight)
    before = average.module[1].weight.clone()
    average.update(module, step=0)
    torch.testing.assert_close(average.module[1].weight, before + 0.9 * (1 - before))
