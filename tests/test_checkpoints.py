"""Models from folders that somebody else wrote: configs that ask for too much, weights of another kind, and names."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm_edu import (
    AutoencoderKL,
    LatentDiffusion,
    NoiseSchedule,
    SceneReader,
    TextConditioner,
    ToyFeatures,
    UNet,
    load_first_stage,
)
from ldm_edu.checkpoints import Part
from ldm_edu.conditioning.condition import Conditioner, MergedConditioner
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import load_json, load_tensors, save_tensors
from ldm_edu.first_stage.autoencoder import FirstStage
from ldm_edu.first_stage.quantization import AutoencoderVQ, IdentityFirstStage


def first_stage() -> AutoencoderKL:
    return AutoencoderKL(8, (1, 2), 1, 2, attention=False, groups=4, scale_factor=0.5)


def text() -> TextConditioner:
    return TextConditioner(["red", "blue", "ball"], 4, 32, 1, 2)


PARTS = {
    "unet": lambda: UNet(2, 2, 32, (1,), 1, (1,), 32, context_dim=32),
    "kl": first_stage,
    "vq": lambda: AutoencoderVQ(8, (1, 2), 1, 3, num_codes=10, groups=4),
    "text": text,
    "merged": lambda: MergedConditioner([text()]),
    "reader": lambda: SceneReader((8, 8, 8)),
    "features": lambda: ToyFeatures((8, 16)),
}
CLASSES = {
    "unet": UNet,
    "kl": FirstStage,
    "vq": AutoencoderVQ,
    "text": Conditioner,
    "merged": Conditioner,
    "reader": SceneReader,
    "features": ToyFeatures,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder with every kind of part, and one with a whole model."""
    root = tmp_path_factory.mktemp("models")
    for name, make in PARTS.items():
        make().save_pretrained(root / name)
    model = LatentDiffusion(first_stage(), PARTS["unet"](), NoiseSchedule(), text(), size=16)
    model.save_pretrained(root / "whole")
    return {name: root / name for name in (*PARTS, "whole")}


@pytest.fixture
def model(folders, tmp_path) -> Path:
    shutil.copytree(folders["whole"], tmp_path / "whole")
    return tmp_path / "whole"


def one_line(error: Exception, *words: str) -> None:
    """The message is one line of moderate length that has the words in it."""
    message = str(error)
    assert "\n" not in message and len(message) < 700 and all(word in message for word in words), message


# ------------------------------------------------ configs that ask for too much

CHILD = """
import json, resource, sys, time, warnings
from pathlib import Path
import ldm_edu
from ldm_edu.checkpoints import Part
from ldm_edu.conditioning.condition import Conditioner
from ldm_edu.errors import CheckpointError

def memory():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

resource.setrlimit(resource.RLIMIT_AS, (memory() + 2**30,) * 2)  # one GiB more than it has with nothing loaded
for line in open(sys.argv[1]):
    folder, cls, change, whole = json.loads(line)
    folder = Path(folder)
    config = folder / "config.json"
    old = config.read_text()
    config.write_text(whole if whole is not None else json.dumps(json.loads(old) | change))
    start = time.monotonic()
    try:
        {"LatentDiffusion": ldm_edu.LatentDiffusion, "Part": Part}[cls].from_pretrained(folder)
        said = "accepted"
    except CheckpointError as error:
        said = str(error)
    except BaseException as error:
        said = f"raw {type(error).__name__}: {error}"
    config.write_text(old)
    print(json.dumps([time.monotonic() - start, said]), flush=True)
"""


def nested(depth: int) -> dict:
    """Conditioners inside one another."""
    config = {"class": "TextConditioner", "vocabulary": ["a"]}
    for _ in range(depth):
        config = {"class": "MergedConditioner", "conditioners": [config]}
    return config


HOSTILE = [  # part, what its config.json says instead, words of the message
    ("unet", {"channels": 1536}, "does not fit UNet: "),
    ("unet", {"channels": 960}, "does not fit UNet: "),
    ("unet", {"channels": 10**6}, "`channels` is 1000000, more than"),
    ("unet", {"channels": 10**400}, "`channels` is 10000000000000000000, more"),
    ("unet", {"channels": -32}, "describes no UNet"),
    ("unet", {"channels": 0}, "describes no UNet"),
    ("unet", {"multipliers": [1] * 10**6}, "`multipliers` has 1000000 entries, more than"),
    ("unet", {"multipliers": [10**9]}, "`multipliers` is 1000000000"),
    ("unet", {"multipliers": [1] * 900}, "unet"),
    ("unet", {"multipliers": []}, "describes no UNet"),
    ("unet", {"blocks": 10**7}, "`blocks` is 10000000"),
    ("unet", {"blocks": 900, "multipliers": [1] * 100}, "unet"),
    ("unet", {"transformer_depth": 10**7}, "`transformer_depth` is"),
    ("unet", {"transformer_depth": 900}, "unet"),
    ("unet", {"heads": 10**9}, "`heads` is"),
    ("unet", {"vector_dim": 10**9}, "`vector_dim` is"),
    ("unet", {"dropout": 5.0}, "describes no UNet"),
    ("unet", {"class": "LatentDiffusion"}, "class 'LatentDiffusion' is not known"),
    ("unet", {"class": "Conditioner"}, "describes no Conditioner"),
    ("unet", {"class": ["UNet"] * 10**5}, "'class' should be the name of a class, not ['UNet', "),
    ("unet", {"class": 3}, "'class' should be the name of a class, not 3"),
    ("unet", {"class": None}, "'class' should be the name of a class, not None"),
    ("unet", {"class": {}}, "'class' should be the name of a class, not {}"),
    ("unet", {"class": "x" * 10**6}, "is not known"),
    ("kl", {"blocks": 10**5}, "`blocks` is 100000"),
    ("kl", {"blocks": 10**12}, "`blocks` is"),
    ("kl", {"blocks": 900}, "kl"),
    ("kl", {"channels": 999 * 8}, "`channels` is"),
    ("kl", {"multipliers": [1] * 10**6}, "`multipliers` has"),
    ("kl", {"latent_channels": 10**12}, "`latent_channels` is"),
    *(("kl", {"scale_factor": value}, "scale_factor=") for value in (0, -1, "1", 1e-300, None, True)),
    ("kl", {"groups": -8}, "groups=-8"),
    ("unet", {"heads": -2}, "heads=-2"),
    ("unet", {"dropout": -0.5}, "dropout=-0.5"),
    ("vq", {"num_codes": 10**12}, "`num_codes` is"),
    ("vq", {"num_codes": 11}, "does not fit AutoencoderVQ"),
    ("text", {"length": 10**9}, "`length` is"),
    ("text", {"depth": 10**7}, "`depth` is"),
    ("text", {"depth": 900}, "TextConditioner: "),
    ("text", {"vocabulary": 10**9}, "`vocabulary` is"),
    ("text", {"vocabulary": [f"a{i}" for i in range(10**5)]}, "`vocabulary` has 100000 entries"),
    ("text", {"dim": 2**70}, "`dim` is"),
    ("merged", {"conditioners": []}, "conditioners is empty"),
    ("merged", {"conditioners": [nested(50)]}, "merged"),
    ("merged", {"conditioners": [{"class": "TextConditioner", "vocabulary": ["a"], "depth": 10**7}]}, "`depth` is"),
    ("merged", {"conditioners": [{"class": "UNet", "blocks": 10**7}]}, "`blocks` is"),
    ("merged", {"conditioners": [{"class": [1]}]}, "'class' should be the name of a class"),
    ("merged", {"conditioners": [{"class": "TextConditioner", "vocabulary": ["a"]}] * 900}, "merged"),
    ("reader", {"channels": [10**6] * 3}, "`channels` is"),
    ("features", {"channels": [10**6] * 3}, "`channels` is"),
    ("features", {"things": 10**12}, "`things` is"),
]
MERGED, TEXT = '{"class": "MergedConditioner", "conditioners": [', '{"class": "TextConditioner", "vocabulary": ["a"]}'
TEXTS = [  # the whole text of a config.json, words of the message
    ('{"class": "UNet", "dropout": NaN}', "is not JSON (NaN is no number that JSON knows)"),
    ('{"class": "UNet", "dropout": 1e999}', "`dropout` is inf, but should be a finite number"),
    ('{"class": "UNet", "channels": ' + "9" * 5000 + "}", "is not JSON"),
    ('{"class": "UNet", "channels": ' + "9" * 4000 + "}", "`channels` is 99999999999999999999, more"),
    ('{"a": ' * 10**5 + "1" + "}" * 10**5, "nested too deeply"),
    ('{"class": "UNet", "multipliers": ' + "[" * 10**5 + "]" * 10**5 + "}", "nested too deeply"),
    ('{"class": "UNet", "multipliers": ' + "[" * 900 + "]" * 900 + "}", "config.json"),
    *((MERGED * n + TEXT + "]}" * n, "nested too deeply") for n in (300, 480, 1000, 10**5)),
    ("[]", "should hold a JSON object, not a list"),
    ("{", "is not JSON"),
    ("", "is not JSON"),
]


def test_a_config_that_asks_for_too_much_is_refused_at_once_and_without_memory(folders, tmp_path):
    cases = [(part, change, None, said) for part, change, said in HOSTILE]
    cases += [("unet", {}, whole, said) for whole, said in TEXTS]
    lines = [json.dumps([str(folders[part]), "Part", change, whole]) for part, change, whole, _ in cases]
    (tmp_path / "cases").write_text("\n".join(lines))
    run = [sys.executable, "-c", CHILD, str(tmp_path / "cases")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=280)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = []
    for (part, change, whole, wanted), (seconds, said) in zip(cases, results):
        one_line = str(folders[part]) in said and "\n" not in said and len(said) < 700
        if not one_line or wanted not in said or seconds > 10:
            wrong.append(f"{part}: {str(change)[:80]} {(whole or '')[:80]} -> {seconds:.1f} s, {said[:300]}")
    assert not wrong, "\n".join(wrong)
    assert len(results) == len(cases), done.stderr[-2000:]


def test_parameters_within_bounds_are_accepted(folders):
    for name, cls in CLASSES.items():
        assert type(cls.from_pretrained(folders[name])) is type(PARTS[name]())
    assert LatentDiffusion.from_pretrained(folders["whole"]).size == 16


class OwnPart(Part, torch.nn.Module):
    def __init__(self, seed: int = 2**40, numbers: tuple[float, ...] = (0.5,) * 2000):
        super().__init__()
        self.seed, self.numbers = seed, numbers


def test_a_class_of_ones_own_may_have_large_numbers_and_long_lists(tmp_path):
    OwnPart().save_pretrained(tmp_path)
    assert OwnPart.from_pretrained(tmp_path).seed == 2**40


class OwnManyModules(Part, torch.nn.Module):
    def __init__(self, depth: int = 1):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(depth))


def test_modules_without_weights_are_counted_too(tmp_path):
    OwnManyModules(900).save_pretrained(tmp_path)
    assert len(OwnManyModules.from_pretrained(tmp_path).layers) == 900
    (tmp_path / "config.json").write_text('{"class": "OwnManyModules", "depth": 3000000}')
    with pytest.raises(CheckpointError, match="asks for more weights than the 0 that are there"):
        OwnManyModules.from_pretrained(tmp_path)


# --------------------------------------------------------- weights of another kind


def spoil(folder: Path, to: Path, change) -> Path:
    """A copy of a folder whose first floating-point tensor is changed."""
    shutil.copytree(folder, to)
    tensors = load_tensors(to / "model.safetensors")
    name = next(name for name, x in tensors.items() if x.is_floating_point() and x.ndim > 1)
    save_tensors(tensors | {name: change(tensors[name])}, to / "model.safetensors")
    return to


KINDS = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
SPOILT = {f"{kind}": (lambda x, kind=kind: x.to(kind), f"holds {kind}, but should hold floating") for kind in KINDS}
SPOILT |= {
    "NaN": (lambda x: x.clone().view(-1).index_fill(0, torch.tensor([0]), float("nan")).view_as(x), "not finite"),
    "inf": (lambda x: torch.full_like(x, float("inf")), "holds numbers that are not finite"),
    "turned": (lambda x: x.flatten(), "has the shape"),
    "larger": (lambda x: torch.zeros(x.shape[0] + 1, *x.shape[1:]), "has the shape"),
    "an axis more": (lambda x: x[None].contiguous(), "has the shape"),
    "empty": (lambda x: torch.zeros(0), r"has the shape \(0,\), should have"),
}


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("part", PARTS)
def test_weights_of_another_kind_are_named(folders, tmp_path, part, kind):
    change, said = SPOILT[kind]
    folder = spoil(folders[part], tmp_path / "spoilt", change)
    with pytest.raises(
        CheckpointError, match=f"model.safetensors does not fit {type(PARTS[part]()).__name__}: .*{said}"
    ):
        CLASSES[part].from_pretrained(folder)


@pytest.mark.parametrize("inner", ["unet", "first_stage", "conditioner"])
def test_weights_of_another_kind_in_a_whole_model_are_named(model, tmp_path, inner):
    shutil.move(spoil(model / inner, tmp_path / "spoilt", lambda x: x.to(torch.int8)), model / "new")
    shutil.rmtree(model / inner)
    (model / "new").rename(model / inner)
    with pytest.raises(CheckpointError, match=rf"whole/{inner}/model\.safetensors does not fit .* holds torch\.int8"):
        LatentDiffusion.from_pretrained(model)


@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_that_is_missing_or_too_many_is_named(folders, tmp_path, part):
    shutil.copytree(folders[part], tmp_path / "f")
    weights = tmp_path / "f/model.safetensors"
    tensors = load_tensors(weights)
    first = next(iter(tensors))
    for change, said in (
        ({"zz.extra": torch.zeros(1)}, "'zz.extra' is there, but .* has no such tensor"),
        (None, f"'{first}' is missing; it should be there, of shape"),
    ):
        changed = {k: v for k, v in tensors.items() if k != first} if change is None else tensors | change
        save_tensors(changed, weights)
        with pytest.raises(CheckpointError, match=f"model.safetensors does not fit .*{said}"):
            CLASSES[part].from_pretrained(tmp_path / "f")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("part", PARTS)
def test_other_floating_point_numbers_become_float32(folders, tmp_path, part, dtype):
    shutil.copytree(folders[part], tmp_path / "f")
    tensors = load_tensors(tmp_path / "f/model.safetensors")
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    save_tensors(cast, tmp_path / "f/model.safetensors")
    loaded = CLASSES[part].from_pretrained(tmp_path / "f")
    assert {x.dtype for x in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(x, cast[name].to(x.dtype)) for name, x in loaded.state_dict().items())


# ------------------------------------------------------- the config of a whole model

CONFIGS = [
    *(({"size": size}, "size") for size in (None, "64", [], {}, 0, -64, 1e300, 16.5, True, 2**70, 17, 10**9)),
    *(({"conditional": value}, "conditional") for value in ("yes", None, 1, [])),
    ({"conditional": False}, "context_dim"),
    *(({"schedule": schedule}, "schedule") for schedule in (None, [], 3, "linear", {"typo": 1})),
    *(({"schedule": {"T": t}}, "config.json") for t in (0, -1, 1000.5, "many", None)),
    *(({"schedule": {"kind": kind}}, "config.json") for kind in ("quadratic", "x" * 5000, 3)),
    ({"schedule": {"beta_start": "small"}}, "config.json"),
    ({"schedule": {"beta_start": 2.0}}, "beta_start"),
    *(({"provenance": value}, "provenance") for value in ("me", 3, [1], True)),
    *(({"class": value}, "class") for value in (3, [], {}, None)),
    ({"class": "UNet"}, "describes UNet, which is a part"),
    ({"class": "UNet\n" * 5000}, "describes UNet"),
]


@pytest.mark.parametrize("change, said", CONFIGS, ids=lambda value: str(value)[:40])
def test_the_config_of_a_whole_model_says_what_is_wrong_with_it(model, change, said):
    config = model / "config.json"
    config.write_text(json.dumps(load_json(config) | change))
    with pytest.raises(CheckpointError) as caught:
        LatentDiffusion.from_pretrained(model)
    one_line(caught.value, str(config), said)


@pytest.mark.parametrize("name", ["size", "conditional", "schedule"])
def test_an_entry_that_is_missing_is_named(model, name):
    config = model / "config.json"
    config.write_text(json.dumps({key: value for key, value in load_json(config).items() if key != name}))
    with pytest.raises(
        CheckpointError, match=f"config.json does not describe a LatentDiffusion: it has no entry '{name}'"
    ):
        LatentDiffusion.from_pretrained(model)


@pytest.mark.parametrize("text", ['{"size": 1e999}', '{"size": NaN}', '{"size": ' + "9" * 5000 + "}", "[" * 10**5])
def test_a_config_of_a_whole_model_that_no_program_reads(model, text):
    (model / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        LatentDiffusion.from_pretrained(model)
    one_line(caught.value, "whole/config.json")


def test_parts_that_do_not_fit_each_other_are_named_with_their_folder(model, folders):
    shutil.rmtree(model / "first_stage")
    shutil.copytree(folders["vq"], model / "first_stage")
    with pytest.raises(CheckpointError, match=r"whole.* unet takes 2 channels, but first_stage's latents have 3"):
        LatentDiffusion.from_pretrained(model)


def test_a_part_in_the_place_of_another_is_named(model):
    shutil.rmtree(model / "unet")
    shutil.copytree(model / "first_stage", model / "unet")
    with pytest.raises(
        CheckpointError, match=r"unet/config\.json describes no AutoencoderKL: AutoencoderKL is no UNet"
    ):
        LatentDiffusion.from_pretrained(model)


@pytest.mark.parametrize("config", ["{}", '{"class": 3}', '{"class": null}', '{"class": ["AutoencoderKL"]}', "[]"])
def test_a_first_stage_whose_config_names_no_class(model, config):
    (model / "first_stage/config.json").write_text(config)
    for load in (load_first_stage, LatentDiffusion.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            load(model)
        one_line(caught.value, "first_stage")


# ------------------------------------------------------------------------- names

LOADERS = [UNet.from_pretrained, LatentDiffusion.from_pretrained, load_first_stage]


@pytest.mark.parametrize(
    "name", ["", "~nosuch", "zero\0byte", "x" * 5000, "a/" * 2500, "file", "file/x", "../..", "a\nb"]
)
@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__qualname__)
def test_names_of_nothing(load, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught:
        load(name)
    one_line(caught.value)


@pytest.mark.parametrize("name", [None, 5, b"toy-text2image", ["toy-text2image"]])
@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__qualname__)
def test_what_is_no_name(load, name):
    with pytest.raises((CheckpointError, TypeError)):  # TypeError: from beartype, where types are checked
        load(name)


@pytest.mark.parametrize("part", ["", "zero\0byte", "x" * 5000, "nothing", "config.json", "../whole"])
def test_parts_of_nothing(model, part):
    if part == "../whole":
        part = "../nothing"
    with pytest.raises(CheckpointError) as caught:
        UNet.from_pretrained(model, part=part)
    assert "\n" not in str(caught.value)


def test_a_model_in_a_folder_that_may_not_be_read_is_not_called_missing(model, monkeypatch):
    """As the system answers another user: nothing below the folder can be opened."""
    real = open

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(model)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    for load in LOADERS:
        with pytest.raises(CheckpointError, match="config.json cannot be read: no permission"):
            load(model)


@pytest.mark.parametrize("what", ["unet", "whole"])
def test_places_where_no_model_can_be_saved(folders, tmp_path, monkeypatch, what):
    saved = (
        UNet.from_pretrained(folders["unet"]) if what == "unet" else LatentDiffusion.from_pretrained(folders["whole"])
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name, said in {
        "file": "a file stands where a folder is needed",
        "file/below": "a file stands where a folder is needed",
        "": "folder is an empty text",
        "zero\0byte": "zero byte",
        "~nosuchuser/model": "no name that a folder can have",
        "x" * 300: "the name is too long",
        "/proc/model": "cannot be written",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            saved.save_pretrained(name)
    assert os.listdir(tmp_path) == ["file"]


def test_a_home_folder_is_meant_where_it_is_written(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    IdentityFirstStage().save_pretrained("~/model")
    assert not os.listdir() and (tmp_path / "home/model/config.json").exists()
    assert isinstance(load_first_stage("~/model"), IdentityFirstStage)


# ------------------------------------------------ what is saved can be loaded


def peak(folder: Path) -> tuple[float, str]:
    """How many MB of memory loading a part takes in a process of its own, and what was said."""
    script = """if True:
        import resource, sys, ldm_edu
        from ldm_edu.checkpoints import Part
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            said = type(Part.from_pretrained(sys.argv[1])).__name__
        except ldm_edu.CheckpointError as error:
            said = str(error)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, said)
    """
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    memory, _, said = done.stdout.strip().partition(" ")
    return float(memory), said


def test_a_part_where_only_true_or_false_is_wanted_is_not_built(folders, tmp_path):
    shutil.copytree(folders["kl"], tmp_path / "kl")
    config = load_json(tmp_path / "kl" / "config.json")
    bomb = {"class": "UNet", "channels": 2048, "multipliers": [1], "blocks": 1, "attention_factors": []}
    for name in ("attention", "provenance"):
        changed = config | {name: bomb | {"head_channels": 2048}}
        (tmp_path / "kl" / "config.json").write_text(json.dumps(changed))
        memory, said = peak(tmp_path / "kl")
        assert memory < 500 and "config" in said, (memory, said)
    (tmp_path / "kl" / "config.json").write_text(json.dumps(config | {"attention": "no"}))
    with pytest.raises(CheckpointError, match="`attention` should be true or false, not 'no'"):
        AutoencoderKL.from_pretrained(tmp_path / "kl")


class OwnMask(Part):
    def __init__(self, n: int = 3):
        super().__init__()
        self.inner = torch.nn.Linear(n, n)
        self.register_buffer("mask", torch.full((n, n), float("-inf")).triu(1))


def test_a_buffer_may_hold_infinity_but_no_nan(tmp_path):
    part = OwnMask()
    part.save_pretrained(tmp_path)
    assert OwnMask.from_pretrained(tmp_path).mask.isinf().sum() == 3
    part.mask.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="'mask' holds numbers that are not finite"):
        part.save_pretrained(tmp_path)


def test_weights_that_could_not_be_loaded_replace_no_good_ones(tmp_path):
    good = first_stage()
    good.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad, unscaled = first_stage(), first_stage()
    torch.nn.init.constant_(next(bad.parameters()), float("nan"))
    unscaled.scale_factor = 0.0
    for stage, said in ((bad, "not finite"), (unscaled, "scale_factor")):
        with pytest.raises(CheckpointError, match=f"AutoencoderKL could not be loaded again: .*{said}"):
            stage.save_pretrained(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class OwnNote(Part):
    def __init__(self, n: int = 2):
        super().__init__()
        self.inner = torch.nn.Linear(n, n)

    @property
    def config(self):
        return {"n": 2, "note": "hello"}


class OwnState(OwnNote):
    config = Part.config

    def get_extra_state(self):
        return {"a": 1}


class OwnLazy(Part):
    def __init__(self, n: int = 2):
        super().__init__()
        self.inner = torch.nn.LazyLinear(n)


class OwnDeep(Part):
    def __init__(self, a: tuple = ()):
        super().__init__()


def deep(depth: int) -> tuple:
    value = ()
    for _ in range(depth):
        value = (value,)
    return value


@pytest.mark.parametrize(
    "make, said",
    [
        (OwnNote, "has no argument note"),
        (OwnState, "'_extra_state' is a dict, but only tensors can be saved"),
        (OwnLazy, "'inner.weight' has no shape yet: call the module once"),
        (lambda: OwnDeep(deep(3000)), "`a` cannot be written as JSON: it is nested too deeply"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, make, said):
    with pytest.raises(CheckpointError, match=said):
        make().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_provenance_that_is_no_dict_is_not_saved(model):
    whole = LatentDiffusion.from_pretrained(model)
    whole.provenance = [1]  # type: ignore[assignment]
    with pytest.raises(LDMError, match=r"^provenance=\[1\] should be an object"):
        whole.save_pretrained(model)
    assert LatentDiffusion.from_pretrained(model).provenance == {}


def test_a_list_that_is_changed_after_a_part_was_made_from_it_is_saved_as_it_was(tmp_path):
    words = ["red", "ball"]
    conditioner = TextConditioner(words, 4, 32, 1, 2)
    words.append("blue")
    conditioner.save_pretrained(tmp_path)
    assert list(TextConditioner.from_pretrained(tmp_path).config["vocabulary"]) == ["red", "ball"]


def test_numbers_too_large_for_the_weights_are_not_loaded_as_infinity(folders, tmp_path):
    folder = spoil(folders["unet"], tmp_path / "unet", lambda x: torch.full_like(x, 1e300, dtype=torch.float64))
    with pytest.raises(CheckpointError, match="holds numbers that are too large for torch.float32"):
        UNet.from_pretrained(folder)


def test_what_is_loaded_does_not_depend_on_what_the_caller_has_set(folders):
    def check() -> None:
        whole = LatentDiffusion.from_pretrained(folders["whole"])
        for weight in whole.parameters():
            assert weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.is_inference()
            assert weight.requires_grad or weight.sum().isfinite()
        for table in [value for value in vars(whole.schedule).values() if isinstance(value, torch.Tensor)]:
            assert table.device.type == "cpu" and not table.is_inference()

    with torch.device("meta"):
        check()
    with torch.inference_mode():
        check()
    torch.set_default_dtype(torch.float64)
    try:
        check()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
