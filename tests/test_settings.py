"""Settings, devices, `fit` and checkpoints: what is refused, and what must survive."""

import copy
import json
import math
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm_edu import LatentDiffusion, SceneReader, ToyFeatures, basics, checkpoints, devices, files, load_first_stage
from ldm_edu.basics import fit, is_static, pace, pick_device, pick_dtype, progress, set_seed
from ldm_edu.checkpoints import Part, checkpoint_path
from ldm_edu.errors import CheckpointError, LDMError, refusal
from ldm_edu.files import atomic, load_json, load_tensors, save_json, save_tensors
from ldm_edu.first_stage.quantization import AutoencoderVQ
from ldm_edu.settings import PROFILES, Settings, find_settings, load_settings

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------- settings.ini


@pytest.fixture
def ini(tmp_path):
    """Write a settings.ini and read it back as settings."""

    def load(text, **env):
        (tmp_path / "settings.ini").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_settings(tmp_path, {f"LDM_EDU_{key.upper()}": value for key, value in env.items()})

    return load


def test_the_file_of_the_repository_says_what_the_built_in_defaults_say(tmp_path):
    ours, bare = load_settings(ROOT / "nbs", env={}), load_settings(tmp_path, env={})
    assert ours.data_dir == ROOT / "data" and ours.weights_dir == ROOT / "data/weights"
    assert bare.data_dir == tmp_path.resolve() / "data"
    plain = Settings(max_steps=300, max_images=256, max_sampling_steps=50)
    for name in ("profile", "dataset", "device", "seed", "max_steps", "max_images", "max_sampling_steps"):
        assert getattr(ours, name) == getattr(bare, name) == getattr(plain, name)
    for profile in PROFILES:
        settings = [load_settings(start, {"LDM_EDU_PROFILE": profile}) for start in (ROOT, tmp_path)]
        assert settings[0].max_steps == settings[1].max_steps == PROFILES[profile]["max_steps"]
        assert settings[0].max_images == settings[1].max_images == PROFILES[profile]["max_images"]


def test_the_nearest_file_upwards_is_read_and_a_foreign_one_passed_by(ini, tmp_path):
    ini("[ldm_edu]\nseed = 3\n")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "a" / "settings.ini").write_text("[DEFAULT]\nlib_name = somebody_else\n")
    assert load_settings(deep, env={}).seed == 3
    assert find_settings(deep)[0] == tmp_path.resolve()


def test_environment_over_file_over_defaults(ini, tmp_path):
    settings = ini("[ldm_edu]\nprofile = gpu\nseed = 3\ndata_dir = ../there\n", seed="4", data_dir="", device="cpu")
    assert (settings.profile, settings.seed, settings.device) == ("gpu", 4, "cpu")
    assert settings.data_dir == (tmp_path.parent / "there").resolve()  # an empty variable is none
    assert ini("[ldm_edu]\ndata_dir = " + str(ROOT)).data_dir == ROOT  # absolute stays absolute


@pytest.mark.parametrize(
    "text, said",
    [
        ("profile = laptop\n", "ini file"),  # no section at all
        ("[ldm_edu]\nseed\n", "ini file"),
        ("[ldm_edu]\nseed = 1\nseed = 2\n", "ini file"),
        ("[ldm_edu\nseed = 1\n", "ini file"),
        (b"[ldm_edu]\nprofile = \xff\xfe\n", "not text in UTF-8"),
        ("[ldm_edu]\nprofile = labtop\n", "ci, laptop, gpu"),
        ("[ldm_edu]\ndataset = Toy\n", "toy, celeba, coco"),
        ("[ldm_edu]\ndevice = gpu\n", "auto, cuda, mps, cpu"),
        ("[ldm_edu]\ndevice = cuda:\n", "auto, cuda, mps, cpu"),
        ("[ldm_edu]\ndatset = toy\n", "datset"),
        ("[ldm_edu]\nseed = 1.5\n", "seed"),
        ("[ldm_edu]\nseed = -1\n", "seed"),
        ("[ldm_edu]\nseed =\n", "seed"),
        ("[ldm_edu]\nseed = ١\n", "seed"),
        ("[ldm_edu]\n[labtop]\nmax_steps = 3\n", "labtop"),
        ("[ldm_edu]\n[laptop]\nmax_step = 3\n", "max_step"),
        ("[ldm_edu]\n[laptop]\nmax_steps = many\n", "max_steps"),
        ("[ldm_edu]\n[laptop]\nmax_images = 0\n", "max_images"),
        ("[ldm_edu]\nseed = 4294967296\n", "seed should be a whole number from 0 to 4294967295, not '4294967296'"),
        ("[ldm_edu]\nseed = " + "9" * 5000 + "\n", "seed should be a whole number from 0 to 4294967295, not '9{40}'"),
        (
            "[ldm_edu]\n[laptop]\nmax_steps = " + "9" * 5000 + "\n",
            "max_steps .* should be a whole number of at least 1",
        ),
        ("[ldm_edu]\ndevice = cuda:" + "9" * 5000 + "\n", "auto, cuda, mps, cpu"),
        ("[ldm_edu]\ndata_dir = ~no such user/data\n", "data_dir='~no such user/data' is no name of a folder"),
        ("[ldm_edu]\nweights_dir = ~no such user\n", "weights_dir='~no such user' is no name of a folder"),
        ("[ldm_edu]\ndata_dir = a\0b\n", "data_dir='a.x00b' is no name of a folder"),
    ],
)
def test_a_faulty_file_is_refused_and_the_fault_named(ini, text, said):
    with pytest.raises(LDMError, match=said):
        ini(text)


def test_the_mark_that_some_editors_put_in_front_is_no_fault(ini):
    assert ini(b"\xef\xbb\xbf[ldm_edu]\nseed = 3\n").seed == 3


@pytest.mark.parametrize("text", ["profile = laptop\n", "[ldm_edu\nseed = 1\n", "[ldm_edu]\nseed\n"])
def test_a_faulty_file_is_one_line(ini, text):
    with pytest.raises(LDMError) as error:
        ini(text)
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_or_a_loop_in_the_place_of_the_file_is_reported(tmp_path):
    (tmp_path / "a" / "settings.ini").mkdir(parents=True)
    with pytest.raises(LDMError, match=r"settings.ini cannot be read: a folder stands in its place"):
        load_settings(tmp_path / "a", env={})
    (tmp_path / "settings.ini").symlink_to("settings.ini")
    with pytest.raises(LDMError, match=r"settings.ini cannot be read: a link leads back to itself"):
        load_settings(tmp_path, env={})


@pytest.mark.parametrize(
    "name, value",
    [("PROFILE", "CI"), ("DATASET", "x"), ("DEVICE", "tpu"), ("SEED", "one"), ("DATA_DIR", "~no such user")],
)
def test_a_faulty_variable_is_refused(name, value, tmp_path):
    with pytest.raises(LDMError, match=value):
        load_settings(tmp_path, {f"LDM_EDU_{name}": value})


def test_percent_signs_and_comments_are_just_that(ini):
    assert ini("; old\n[ldm_edu]\ndata_dir = 100%done  # mine\n").data_dir.name == "100%done"


@pytest.mark.parametrize("none", ["none", "None", ""])
def test_no_cap(ini, none):
    assert ini(f"[ldm_edu]\n[laptop]\nmax_steps = {none}\n").steps(10**6) == 10**6


@pytest.mark.parametrize("n", [0, 1, 3, 4, 16, 17, 300, 10**6])
@pytest.mark.parametrize("profile", PROFILES)
def test_caps_only_lower(profile, n):
    settings, caps = Settings(profile, **PROFILES[profile]), PROFILES[profile]
    assert settings.images(n, range(5)) == min(settings.images(n), 5)  # no more than a data set has
    got = settings.steps(n), settings.images(n), settings.sampling_steps(n)
    assert got == tuple(min(n, cap if cap is not None else math.inf) for cap in caps.values())


# -------------------------------------------------- devices, seeds, front ends


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:999", "", "CPU", "cpu:0"])
def test_devices_that_are_not_there(name):
    with pytest.raises(LDMError, match="device"):
        pick_device(name)


@pytest.mark.parametrize("cuda, mps, best", [(0, 0, "cpu"), (0, 1, "mps"), (2, 0, "cuda"), (1, 1, "cuda")])
def test_auto_takes_the_best(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert pick_device("auto").type == best
    for n in range(3):
        assert (pick_device(f"cuda:{n}").index == n) if n < cuda else "available" in refusal(pick_device, f"cuda:{n}")


@pytest.mark.parametrize("times_faster, dtype", [(0.01, torch.float32), (1.0, torch.float32), (1.19, torch.float32),
                                                 (1.21, torch.bfloat16), (8.0, torch.bfloat16)])  # fmt: skip
def test_bfloat16_on_a_cpu_only_where_it_is_clearly_faster(monkeypatch, times_faster, dtype):
    seconds = {torch.float32: 2e-3 * times_faster, torch.bfloat16: 2e-3}
    monkeypatch.setattr(devices, "_cpu_seconds", lambda: seconds)
    assert pick_dtype("cpu") == pick_dtype(torch.device("cpu")) == dtype
    assert pick_dtype("mps") == torch.float32


@pytest.mark.parametrize("native", [False, True])
def test_a_gpu_is_asked_and_not_timed(monkeypatch, native):
    def never():
        raise AssertionError("the CPU was timed")

    monkeypatch.setattr(devices, "_cpu_seconds", never)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert pick_dtype("cuda:1") == (torch.bfloat16 if native else torch.float32)


def test_the_least_of_several_times_counts(monkeypatch):
    times = {torch.float32: iter([9, 5, 3, 7] * 9), torch.bfloat16: iter([1, 6, 4, 8] * 9)}
    monkeypatch.setattr(devices, "_seconds", lambda dtype, side: float(next(times[dtype])))
    assert devices._cpu_seconds.__wrapped__() == {torch.float32: 3.0, torch.bfloat16: 1.0}


def test_the_cpu_is_measured_once_and_leaves_no_trace():
    torch.manual_seed(0)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    devices._cpu_seconds.cache_clear()
    with torch.inference_mode():  # as it may be where images are drawn
        first = devices._cpu_seconds()
    assert devices._cpu_seconds() is first and set(first) == {torch.float32, torch.bfloat16}
    assert all(0 < seconds < float("inf") for seconds in first.values())
    assert torch.equal(torch.get_rng_state(), state) and not torch.is_autocast_enabled("cpu")
    assert torch.get_num_threads() == threads


def test_set_seed_starts_every_stream():
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for seed in (0, 1, 2**32 - 1):
        set_seed(seed)
        first = draw()
        set_seed(seed)
        assert draw() == first


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40, 1.5, "1", None, True])
def test_a_seed_that_some_generator_could_not_take_is_refused(seed):
    """2⁴⁰ would draw what 0 draws, on a CPU."""
    state = torch.get_rng_state()
    with pytest.raises((LDMError, TypeError), match="seed"):
        set_seed(seed)
    assert torch.equal(torch.get_rng_state(), state)


def test_static_unless_there_is_a_kernel(monkeypatch):
    monkeypatch.delenv("LDM_EDU_STATIC", raising=False)
    for shell, static in ((None, True), (SimpleNamespace(), True), (SimpleNamespace(kernel=1), False)):
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert is_static() == static
    monkeypatch.setenv("LDM_EDU_STATIC", "1")
    assert is_static()


def test_progress_is_silent_or_a_bar(monkeypatch, capsys):
    things = [1, 2, 3]
    assert progress(things) is things
    monkeypatch.setattr(basics, "is_static", lambda: False)
    assert list(progress(things, "counting")) == things
    assert "counting" in capsys.readouterr().err


# ------------------------------------------------------------------------- fit


def regression():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, lambda batch: (model(batch) ** 2).mean()


def test_a_list_begins_again_and_a_callable_is_asked_for_each_step():
    model, loss = regression()
    seen = []
    batches = [torch.full((2, 3), i) for i in (1.0, 2.0)]
    fit(model, lambda batch: seen.append(batch[0, 0].item()) or loss(batch), batches, 5)
    assert seen == [1, 2, 1, 2, 1]
    asked = []
    losses = fit(model, loss, lambda step: asked.append(step) or torch.ones(2, 3), 4)
    assert asked == [0, 1, 2, 3] and len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(bad):
    model, loss = regression()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LDMError, match="step 0"):
        fit(model, lambda batch: loss(batch) * bad, [torch.ones(2, 3)], 3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()) and not model.training


@pytest.mark.parametrize("batches", [[], (), iter([torch.ones(2, 3)])])
def test_batches_that_run_out_are_named(batches):
    model, loss = regression()
    with pytest.raises(LDMError, match="batches"):
        fit(model, loss, batches, 3)


def test_modes_and_frozen_parameters_stay():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    fit(model, lambda batch: (model(batch) ** 2).mean(), [torch.ones(2, 3)], 3)
    after = model.state_dict()
    assert [part.training for part in model] == [True, False, True]
    assert torch.equal(before["0.weight"], after["0.weight"]) and not torch.equal(before["2.weight"], after["2.weight"])


@pytest.mark.parametrize(
    "wrong, message", [({"steps": -1}, "steps=-1"), ({"lr": -1.0}, "lr=-1.0"), ({"lr": math.nan}, "lr=nan")]
)
def test_numbers_that_nothing_can_be_trained_with_are_named(wrong, message):
    model = nn.Linear(3, 1)
    with pytest.raises(LDMError, match=message):
        fit(model, lambda x: model(x).mean(), [torch.ones(2, 3)], **wrong)


def test_no_steps_are_no_steps():
    model, loss = regression()
    assert fit(model, loss, [torch.ones(2, 3)], 0) == []


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 11, 300])
def test_pace_rises_once_and_falls_towards_zero(steps):
    shares = [pace(step, steps) for step in range(steps)]
    top = shares.index(max(shares))
    assert all(0 < share <= 1 for share in shares) and shares[top] == 1
    assert shares[: top + 1] == sorted(shares[: top + 1]) and shares[top:] == sorted(shares[top:], reverse=True)
    assert top == max(1, steps // 10) - 1


def test_fit_follows_the_pace_where_it_is_asked_to():
    """With a gradient that never changes, AdamW's steps are as long as the learning rate (but for its weight decay)."""
    went = {}
    for decay in (False, True):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        fit(model, lambda _: model.weight.sum(), [None], steps=30, lr=1e-3, decay=decay)
        went[decay] = -model.weight.item()
    assert went[False] == pytest.approx(30e-3, rel=1e-2)
    assert went[True] == pytest.approx(1e-3 * sum(pace(step, 30) for step in range(30)), rel=1e-2)


# ----------------------------------------------------------------------- files


def test_atomic_leaves_the_old_file_and_no_crumbs(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    for error in (KeyboardInterrupt, OSError, SystemExit):
        with pytest.raises(error), atomic(path) as temporary:
            temporary.write_text("half")
            raise error
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("seed", range(5))
def test_tensors_survive_whole_and_half(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randint(1, 9, (3,), generator=generator).tolist()
    tensors = {
        "floats": torch.randn(shape, generator=generator) * 10.0 ** (seed - 2),
        "turned": torch.randn(shape, generator=generator).transpose(0, 2),  # not contiguous
        "brain": torch.randn(shape, generator=generator).bfloat16(),
        "whole": torch.randint(-(2**40), 2**40, shape, generator=generator),
        "yes": torch.rand(shape, generator=generator) < 0.5,
        "none": torch.zeros(0, 3),
        "one": torch.tensor(1.5),
    }
    tensors["tied"] = tensors["floats"]
    save_tensors(tensors, tmp_path / "f")
    for name, tensor in load_tensors(tmp_path / "f").items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
    save_tensors(tensors, tmp_path / "f", half=True)
    for name, tensor in load_tensors(tmp_path / "f").items():
        if tensors[name].is_floating_point():
            assert tensor.dtype == torch.float16
            torch.testing.assert_close(tensor.float(), tensors[name].float(), rtol=2**-11, atol=2**-25)
        else:
            assert torch.equal(tensor, tensors[name])


def test_half_refuses_what_would_become_infinite(tmp_path):
    with pytest.raises(CheckpointError, match="'w'.*65504"):
        save_tensors({"w": torch.tensor([65520.0])}, tmp_path / "f", half=True)
    save_tensors({"w": torch.tensor([65504.0, float("inf")])}, tmp_path / "f", half=True)  # it was infinite before
    assert load_tensors(tmp_path / "f")["w"].tolist() == [65504.0, float("inf")]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "3", b"\xff\xfe"])
def test_json_that_is_none(tmp_path, text):
    (tmp_path / "f.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match="f.json"):
        load_json(tmp_path / "f.json")


def test_json_that_cannot_be_written(tmp_path):
    save_json({"a": 1}, tmp_path / "f.json")
    with pytest.raises(CheckpointError, match="`a`"):
        save_json({"a": torch.ones(1)}, tmp_path / "f.json")
    assert load_json(tmp_path / "f.json") == {"a": 1}


# ------------------------------------------------------------------------ Part


class Toy(Part, nn.Module):
    follow = ("scale",)

    def __init__(
        self,
        width: int = 4,
        multipliers: tuple[int, ...] = (1, 2),
        pairs: tuple[tuple[int, int], ...] = ((1, 2),),
        words: list[str] | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        self.width, self.multipliers, self.pairs, self.words, self.scale = width, multipliers, pairs, words, scale
        self.layer = nn.Linear(width, width)
        self.register_buffer("count", torch.tensor(7))


class Other(Part, nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))


@pytest.fixture
def saved(tmp_path):
    toy = Toy(5, multipliers=(1, 2, 4), pairs=((3, 4), (5, 6)), words=["a", "b"])
    toy.scale = 0.25
    toy.save_pretrained(tmp_path / "toy")
    return tmp_path / "toy", toy


def test_a_part_comes_back_as_it_was(saved):
    folder, toy = saved
    again = Toy.from_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert again.config == toy.config and again.scale == 0.25
    assert (again.multipliers, again.pairs, again.words) == ((1, 2, 4), ((3, 4), (5, 6)), ["a", "b"])
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in toy.state_dict().items())
    assert not again.training
    assert Toy.from_pretrained(str(folder)).config == again.config
    assert Toy.from_pretrained(folder.parent, part="toy").config == again.config


def test_config_follows_only_what_is_named_and_survives_a_copy():
    toy = Toy(3)
    toy.scale, toy.width = 2.0, 99
    assert toy.config == {"width": 3, "multipliers": (1, 2), "pairs": ((1, 2),), "words": None, "scale": 2.0}
    assert copy.deepcopy(toy).config == toy.config
    assert Toy(4).config["scale"] == 1.0


def test_half_precision_round_trip(saved):
    folder, toy = saved
    toy.save_pretrained(folder, half=True)
    assert load_tensors(folder / "model.safetensors")["layer.weight"].dtype == torch.float16
    again = Toy.from_pretrained(folder)
    assert again.layer.weight.dtype == torch.float32 and again.count.dtype == torch.int64
    torch.testing.assert_close(again.layer.weight, toy.layer.weight, rtol=2**-11, atol=2**-25)


def test_loading_leaves_the_random_stream_alone(saved):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Toy.from_pretrained(saved[0])
    assert torch.equal(torch.rand(3), expected)


def test_an_interrupted_save_leaves_the_old_checkpoint(saved, monkeypatch):
    folder, toy = saved
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    toy.scale = 3.0
    nn.init.zeros_(toy.layer.weight)

    def half_written(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", half_written)
    with pytest.raises(CheckpointError, match="cannot be written.*no space"):
        toy.save_pretrained(folder)
    toy.scale = torch.tensor(3.0)  # and what JSON cannot hold
    with pytest.raises(CheckpointError, match="`scale`"):
        toy.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old


def test_an_argument_that_json_cannot_hold_is_named(tmp_path):
    class Odd(Part, nn.Module):
        def __init__(self, activation=None):
            super().__init__()

    with pytest.raises(CheckpointError, match="`activation`"):
        Odd(nn.SiLU()).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 40, 200, -1])
def test_truncated_weights(saved, keep):
    path = saved[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors is not a whole"):
        Toy.from_pretrained(saved[0])


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"layer.weight": [1.0]}),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 400\n",
        b"<html>404</html>" * 100,
        bytes(range(256)) * 4,
    ],
    ids=["pickle", "lfs pointer", "html", "bytes"],
)
def test_weights_that_are_something_else(saved, content):
    (saved[0] / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        Toy.from_pretrained(saved[0])


def test_a_torch_file_is_never_opened(saved):
    (saved[0] / "model.safetensors").unlink()
    torch.save(saved[1].state_dict(), saved[0] / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        Toy.from_pretrained(saved[0])


def test_a_folder_where_a_file_should_be(saved):
    for name in ("model.safetensors", "config.json"):
        (saved[0] / name).unlink()
        (saved[0] / name).mkdir()
        with pytest.raises(CheckpointError, match=name):
            Toy.from_pretrained(saved[0])


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda weights: weights.pop("layer.bias"), "layer.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "extra"),
        (lambda weights: weights.update({"layer.bias": torch.zeros(6)}), r"layer.bias. has the shape \(6,\)"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_that_do_not_fit(saved, change, said):
    path = saved[0] / "model.safetensors"
    weights = load_tensors(path)
    change(weights)
    save_tensors(weights, path)
    with pytest.raises(CheckpointError, match=f"model.safetensors does not fit Toy.*{said}"):
        Toy.from_pretrained(saved[0])


@pytest.mark.parametrize("config", [{"depth": 2}, {"width": "wide"}, {"width": -3}, {"width": None}, {"self": 1}])
def test_a_config_of_something_else(saved, config):
    (saved[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json"):
        Toy.from_pretrained(saved[0])


def test_a_config_without_a_necessary_argument(tmp_path):
    Other(2).save_pretrained(tmp_path)
    assert len(Other.from_pretrained(tmp_path).layers) == 2
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="config.json.*depth"):
        Other.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_class(saved, tmp_path):
    Other(2).save_pretrained(tmp_path / "other")
    for cls, folder in ((Toy, tmp_path / "other"), (Other, saved[0])):
        with pytest.raises(CheckpointError, match="config.json describes no"):
            cls.from_pretrained(folder)


# ------------------------------------------------ checkpoints of version 0.1.0

OLD = {"provenance": "made", "num_codes": "codes"}  # present name -> the name in a config.json of version 0.1.0


def as_in_0_1_0(folder, *renamed):
    """Rename keys of a config.json back to what version 0.1.0 wrote."""
    config = load_json(folder / "config.json")
    assert set(renamed) <= config.keys()
    save_json({OLD[key] if key in renamed else key: value for key, value in config.items()}, folder / "config.json")


def test_an_old_vq_first_stage_opens(tmp_path):
    model = AutoencoderVQ(8, (1, 2), 1, 3, num_codes=10, groups=4, provenance={"steps": 7}).eval()
    model.save_pretrained(tmp_path)
    as_in_0_1_0(tmp_path, "provenance", "num_codes")
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    for again in (AutoencoderVQ.from_pretrained(tmp_path), load_first_stage(tmp_path)):
        assert isinstance(again, AutoencoderVQ) and again.config == model.config
        assert again.provenance == {"steps": 7} and again.config["num_codes"] == 10
        assert torch.equal(again.reconstruct(image), model.reconstruct(image))


@pytest.mark.parametrize("cls, name", [(SceneReader, "scene-reader"), (ToyFeatures, "toy-features")])
def test_old_networks_for_evaluation_open(cls, name, tmp_path):
    shutil.copytree(checkpoints.PRETRAINED / name, tmp_path / name)
    as_in_0_1_0(tmp_path / name, "provenance")
    new = cls.from_pretrained(name)
    assert new.provenance and cls.from_pretrained(tmp_path / name).config == new.config


def test_an_old_latent_diffusion_folder_opens(tmp_path):
    new, folder = LatentDiffusion.from_pretrained("toy-text2image"), tmp_path / "model"
    new.save_pretrained(folder)
    as_in_0_1_0(folder, "provenance")
    as_in_0_1_0(folder / "first_stage", "provenance")
    old = LatentDiffusion.from_pretrained(folder)
    assert new.provenance and old.provenance == new.provenance
    assert old.first_stage.config == new.first_stage.config == load_first_stage(folder).config
    assert torch.equal(*(model.sample("a big yellow cylinder", steps=2) for model in (old, new)))
    old.save_pretrained(tmp_path / "again")  # what is saved has the present names
    for config in (tmp_path / "again/config.json", tmp_path / "again/first_stage/config.json"):
        assert "provenance" in load_json(config) and "made" not in load_json(config)


def test_an_old_name_gives_way_to_an_argument_that_has_it(tmp_path):
    class Codes(Part, nn.Module):
        def __init__(self, codes: int = 1):
            super().__init__()

    Codes(5).save_pretrained(tmp_path)
    assert Codes.from_pretrained(tmp_path).config == {"codes": 5}
    save_json({"made": {}}, tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="no argument provenance"):
        Codes.from_pretrained(tmp_path)


# ------------------------------------------------------ where it is looked for


def test_folders_first_then_what_is_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PRETRAINED", tmp_path / "pretrained")
    (tmp_path / "pretrained" / "toy-model").mkdir(parents=True)
    assert checkpoint_path("toy-model") == tmp_path / "pretrained" / "toy-model"
    with pytest.raises(CheckpointError, match="shipped: toy-model"):
        checkpoint_path("toy-modle")
    with pytest.raises(CheckpointError):
        checkpoint_path("")
    (tmp_path / "here" / "toy-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert checkpoint_path("toy-model") == tmp_path / "pretrained" / "toy-model"  # no checkpoint is in the one here
    (tmp_path / "here" / "toy-model" / "config.json").write_text("{}")
    assert checkpoint_path("toy-model") == Path("toy-model")


def test_everything_shipped_is_found():
    folders = [path for path in checkpoints.PRETRAINED.glob("*") if path.is_dir()]
    assert len(folders) >= 5
    for folder in folders:
        assert checkpoint_path(folder.name) == folder


@pytest.mark.parametrize("name", ["model", "a/b/c", "/user/model", "./model", "../model", "user/", Path("user/model")])
def test_only_a_hub_name_goes_to_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises(CheckpointError, match="no folder"):
        Toy.from_pretrained(name)


@pytest.mark.parametrize("part", [None, "unet"])
def test_a_hub_name_is_loaded_from_what_the_hub_gives(saved, monkeypatch, part, tmp_path):
    asked = []
    if part:
        saved[0].rename(tmp_path / part)
    where = tmp_path if part else saved[0]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: asked.append((name, kw)) or str(where))
    assert Toy.from_pretrained("user/model", part=part).config == saved[1].config
    assert asked[0][0] == "user/model" and asked[0][1]["allow_patterns"] == [f"{part}/*" if part else "*"]


def test_without_a_network_the_hub_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="no folder 'user/no-such-model'.*hub"):
        Toy.from_pretrained("user/no-such-model")


def test_push_to_hub_sends_our_two_files(saved, monkeypatch):
    sent = []

    class Hub:
        def __init__(self, token=None): ...

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, **how):
            sent.append((sorted(path.name for path in Path(folder_path).iterdir()), how))
            return "where it is"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert saved[1].push_to_hub("user/toy") == "where it is"
    saved[1].push_to_hub("user/toy", branch="next", create_pr=True)
    assert [names for names, _ in sent] == [["config.json", "model.safetensors"]] * 2
    assert sent[0][1]["repo_id"] == "user/toy" and sent[0][1]["revision"] is None
    assert sent[1][1]["revision"] == "next" and sent[1][1]["create_pr"] is True


def test_push_to_hub_passes_arguments_that_the_hub_knows():
    from inspect import signature

    from huggingface_hub import HfApi

    api = SimpleNamespace(create_repo=signature(HfApi.create_repo), upload_folder=signature(HfApi.upload_folder))
    api.create_repo.bind(None, repo_id="", private=None, exist_ok=True)
    api.upload_folder.bind(None, repo_id="", repo_type="model", folder_path="", commit_message="", revision=None)


def test_refusal_complains_where_nothing_is_refused():
    with pytest.raises(AssertionError, match="pick_device"):
        refusal(pick_device, "cpu")
    with pytest.raises(TypeError):  # a bug is not a refusal
        refusal(pick_device, 1, 2, 3)
