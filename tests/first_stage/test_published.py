"""Weights under other names: held against diffusers, forwards and backwards, from every kind of file; and refusals."""

import argparse
import collections
import copy
import json
import os
import pickle
import random
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import load_tensors, save_json, save_tensors
from ldm_edu.first_stage import published
from ldm_edu.first_stage.autoencoder import AutoencoderKL
from ldm_edu.first_stage.published import (
    FILES,
    OLD_ATTENTION,
    PREFIX,
    build,
    config_of,
    from_diffusers,
    from_released,
    load_published,
    name_table,
    read_tensors,
    save_diffusers,
    to_diffusers,
)
from ldm_edu.first_stage.quantization import AutoencoderVQ, IdentityFirstStage

STABLE_DIFFUSION = dict(channels=128, multipliers=(1, 2, 4, 4), blocks=2, latent_channels=4)
PAPER = [  # of table 8, with the attention of the released configurations
    dict(channels=128, multipliers=(1, 2, 4), latent_channels=3),
    dict(channels=128, multipliers=(1, 2, 4), latent_channels=3, attention=False, num_codes=8192),
    dict(channels=128, multipliers=(1, 2, 2, 4), latent_channels=4, attention_factors=(8,), num_codes=16384),
    dict(channels=128, multipliers=(1, 1, 2, 2, 4), latent_channels=16, attention_factors=(16,)),
    dict(channels=128, multipliers=(1, 1, 2, 2, 4, 4), latent_channels=64, attention_factors=(16, 32)),
]


def random_config(seed: int, vq: bool = False) -> dict:
    """A small first stage that diffusers has, too: its first level is always as wide as `channels`."""
    rng = random.Random(seed)
    levels, groups = rng.randint(1, 4), rng.choice([2, 4, 8])
    config = dict(
        channels=groups * rng.randint(1, 3),
        multipliers=(1, *(rng.randint(1, 3) for _ in range(levels - 1))),
        blocks=rng.randint(1, 2),
        latent_channels=rng.randint(1, 6),
        attention=rng.random() < 0.7,
        attention_factors=tuple(2**i for i in range(levels) if rng.random() < 0.4),
        groups=groups,
    )
    return config | (dict(num_codes=rng.randint(2, 300)) if vq else {})


def pair(seed: int, vq: bool = False):
    """One of our first stages and diffusers' with the same weights: theirs is configured here, not by the package."""
    from diffusers import AutoencoderKL as TheirKL
    from diffusers import VQModel

    config = random_config(seed, vq)
    torch.manual_seed(seed)
    ours = (AutoencoderVQ if vq else AutoencoderKL)(**config).eval()
    for name, x in ours.named_parameters():  # biases and norms that do something
        torch.nn.init.normal_(
            x, float("norm" in name and "weight" in name), 0.2 if x.ndim == 1 else x[0].numel() ** -0.5
        )
    attention = ["Attn" * (2**i in config["attention_factors"]) for i in range(len(config["multipliers"]))]
    theirs = (VQModel if vq else TheirKL)(
        down_block_types=[f"{a}DownEncoderBlock2D" for a in attention],
        up_block_types=[f"{a}UpDecoderBlock2D" for a in attention[::-1]],
        block_out_channels=[config["channels"] * m for m in config["multipliers"]],
        layers_per_block=config["blocks"],
        latent_channels=config["latent_channels"],
        mid_block_add_attention=config["attention"],
        norm_num_groups=config["groups"],
        **(dict(num_vq_embeddings=config["num_codes"]) if vq else {}),
    ).eval()
    return ours, theirs


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    assert ours.shape == theirs.shape and theirs.isfinite().all()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}  # in double precision another epsilon shows, see below


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to the precision of the arithmetic."""
    assert ours.dtype == theirs.dtype and difference(ours, theirs) < TOLERANCE[theirs.dtype]


def sizes(seed: int, f: int) -> list[tuple[int, int]]:
    """Images whose latents are not square and have odd sides."""
    rng = random.Random(seed)
    return [(f * 5, f * 3), (f * rng.choice([1, 3]), f * rng.choice([2, 5]))]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(14))
@torch.no_grad()
def test_kl_equals_diffusers(seed, dtype):
    ours, theirs = (model.to(dtype) for model in pair(seed))
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    for size in sizes(seed, ours.f):
        x = torch.randn(2, 3, *size, dtype=dtype)
        mine, other = ours.posterior(x), theirs.encode(x).latent_dist
        assert_near(mine.mean, other.mean)
        assert_near(mine.logvar, other.logvar)
        z = torch.randn_like(mine.mean)
        assert_near(ours.decode(z), theirs.decode(z).sample)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(14))
@torch.no_grad()
def test_vq_equals_diffusers(seed, dtype):
    ours, theirs = (model.to(dtype) for model in pair(seed, vq=True))
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    for size in sizes(seed, ours.f):
        x = torch.randn(2, 3, *size, dtype=dtype)
        assert_near(ours.encode(x), theirs.encode(x).latents)
        z = torch.randn_like(ours.encode(x))
        assert_near(ours.decode(z), theirs.decode(z).sample)
        assert_near(ours(x)[0], theirs(x).sample)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(14))
@torch.no_grad()
def test_the_encoder_alone_on_sizes_that_are_no_multiples_of_f(seed, dtype):
    ours, theirs = (model.to(dtype) for model in pair(seed))
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    for height, width in sizes(seed, ours.f):
        x = torch.randn(1, 3, height + ours.f // 2 + 1, width + ours.f - 1, dtype=dtype)
        assert_near(ours.encoder(x), theirs.encoder(x))


@pytest.mark.parametrize("seed", range(14))
@torch.no_grad()
def test_another_epsilon_would_show(seed):
    ours = pair(seed)[0].double()
    x = torch.randn(2, 3, 5 * ours.f, 3 * ours.f, dtype=torch.float64)
    right = ours.posterior(x).mean, ours.decode(z := torch.randn_like(ours.encode(x)))
    for layer in ours.modules():
        if isinstance(layer, torch.nn.GroupNorm):
            layer.eps = 1e-5
    assert max(map(difference, (ours.posterior(x).mean, ours.decode(z)), right)) > TOLERANCE[torch.float64]


@pytest.mark.parametrize("vq", [False, True])
def test_stable_diffusions_own_configuration_maps_name_by_name_and_shape_by_shape(vq):
    from diffusers import AutoencoderKL as TheirKL
    from diffusers import VQModel

    shape = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    with torch.device("meta"):
        ours = (AutoencoderVQ if vq else AutoencoderKL)(**STABLE_DIFFUSION)
        theirs = (VQModel(num_vq_embeddings=8192, **shape, **blocks) if vq else TheirKL(**shape, **blocks)).state_dict()
    mapped = to_diffusers(ours.state_dict())
    assert {name: x.shape for name, x in mapped.items()} == {name: x.shape for name, x in theirs.items()}
    if not vq:
        assert sum(x.numel() for x in mapped.values()) == sum(x.numel() for x in theirs.values()) == 83_653_863


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_diffusers_own_conversion_of_released_names(seed):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = random_config(seed) | dict(attention=True, attention_factors=())  # theirs knows the middle's alone
    tensors = AutoencoderKL(**config).state_dict()
    levels = ["a block"] * len(config["multipliers"])
    known = {"down_block_types": levels, "up_block_types": levels}
    theirs = convert_ldm_vae_checkpoint({PREFIX + name: x for name, x in tensors.items()}, known)
    ours = to_diffusers(tensors)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name].reshape(x.shape)) for name, x in ours.items())


@pytest.mark.parametrize("config", [random_config(seed, seed % 2 == 1) for seed in range(20)] + PAPER, ids=str)
def test_there_and_back(config):
    with torch.device("meta"):
        tensors = (AutoencoderVQ if "num_codes" in config else AutoencoderKL)(**config).state_dict()
    back = from_diffusers(to_diffusers(tensors))
    assert {name: x.shape for name, x in back.items()} == {name: x.shape for name, x in tensors.items()}
    released = from_released(tensors)
    assert {name: x.shape for name, x in released.items()} == {name: x.shape for name, x in tensors.items()}
    read = config_of(tensors)
    assert read == {name: config[name] for name in read if name in config} | {
        "blocks": config.get("blocks", 2),
        "attention": config.get("attention", True),
        "attention_factors": config.get("attention_factors", ()),
    }
    assert ("num_codes" in read) == ("num_codes" in config)


def test_there_and_back_keeps_every_number():
    tensors = AutoencoderVQ(**random_config(3, vq=True)).state_dict()
    for back in (from_diffusers(to_diffusers(tensors)), from_released(tensors)):
        assert all(torch.equal(back[name], x) for name, x in tensors.items())


@pytest.mark.parametrize("levels", range(1, 7))
def test_no_two_names_share_a_translation(levels):
    table = name_table(levels, 3)
    assert len(set(table.values())) == len(table)
    assert table[f"decoder.up.{levels - 1}.block.0.conv1.weight"] == "decoder.up_blocks.0.resnets.0.conv1.weight"


def aged(tensors: dict) -> dict:
    """diffusers' names as they were before its attention was rewritten."""
    old = {new: name for name, new in OLD_ATTENTION.items()}
    return {re.sub(r"\.(to_[qkv]|to_out\.0)\.", lambda m: f".{old[m[1]]}.", name): x for name, x in tensors.items()}


@pytest.mark.parametrize("convolutions", [False, True])
def test_older_names_and_attention_as_convolutions(convolutions):
    tensors = AutoencoderKL(8, (1, 2), 1, 2, groups=4, attention_factors=(2,)).state_dict()
    theirs = aged(to_diffusers(tensors))
    assert "encoder.mid_block.attentions.0.query.weight" in theirs
    assert "decoder.up_blocks.0.attentions.1.proj_attn.bias" in theirs
    assert not [name for name in theirs if "to_" in name]
    if convolutions:
        heavy = re.compile(r"\.(query|key|value|proj_attn)\.weight$")
        theirs = {name: x[..., None, None] if heavy.search(name) else x for name, x in theirs.items()}
    back = from_diffusers(theirs)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], x) for name, x in tensors.items())


def test_diffusers_reads_older_names_as_we_do(tmp_path):
    from diffusers import AutoencoderKL as TheirKL

    ours, theirs = pair(0)
    theirs.save_pretrained(tmp_path)
    save_tensors(aged(to_diffusers(ours.state_dict())), tmp_path / FILES[0], notes={"format": "pt"})
    theirs, mine = TheirKL.from_pretrained(tmp_path).double(), load_published(tmp_path).double()
    x = torch.randn(1, 3, 3 * ours.f, ours.f, dtype=torch.float64)
    with torch.no_grad():
        assert_near(mine.posterior(x).mean, theirs.encode(x).latent_dist.mean)


def test_released_attention_may_be_linear():
    tensors = AutoencoderKL(8, (1, 2), 1, 2, groups=4, attention_factors=(2,)).state_dict()
    heavy = re.compile(r"attn[._]\d\.(q|k|v|proj_out)\.weight")
    flat = {name: x.flatten(1) if heavy.search(name) else x for name, x in tensors.items()}
    assert all(torch.equal(x, tensors[name]) for name, x in from_released(flat).items())


def test_of_a_whole_model_only_the_first_stage_is_taken():
    tensors = AutoencoderKL(8, (1, 2), 1, 2, groups=4).state_dict()
    whole = {PREFIX + name: x for name, x in tensors.items()}
    whole |= {PREFIX + "loss.logvar": torch.zeros(()), "model.diffusion_model.out.2.bias": torch.zeros(4)}
    whole |= {"betas": torch.zeros(1000), "cond_stage_model.transformer.x": torch.zeros(1)}
    assert from_released(whole).keys() == tensors.keys()


def test_losses_and_averages_are_left_out_and_nothing_else():
    tensors = AutoencoderKL(8, (1, 2), 1, 2, groups=4).state_dict()
    more = {"loss.discriminator.main.0.weight": torch.zeros(1), "model_ema.decay": torch.zeros(())}
    assert from_released(tensors | more).keys() == tensors.keys()
    with pytest.raises(CheckpointError, match=r"encoder\.mid\.block_3\.conv1\.weight, surprise"):
        from_released(tensors | {"encoder.mid.block_3.conv1.weight": torch.zeros(1), "surprise": torch.zeros(1)})
    for translate in (to_diffusers, from_diffusers):
        with pytest.raises(CheckpointError, match="surprise"):
            translate({"surprise": torch.zeros(1)})


# files


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("inner", ["", "vae", "vqvae"])
@torch.no_grad()
def test_reads_what_diffusers_writes(tmp_path, seed, inner):
    ours, theirs = pair(seed, vq=inner == "vqvae")
    theirs.register_to_config(scaling_factor=0.3)
    theirs.save_pretrained(tmp_path / inner)
    mine, x = load_published(tmp_path), torch.randn(1, 3, 5 * ours.f, 3 * ours.f, dtype=torch.float64)
    assert type(mine) is type(ours) and not mine.training
    assert mine.config == ours.config | ({} if inner == "vqvae" else {"scale_factor": 0.3})
    mine, theirs = mine.double(), theirs.double()
    z = theirs.encode(x).latents if inner == "vqvae" else 0.3 * theirs.encode(x).latent_dist.mean
    assert_near(mine.encode(x), z)
    assert_near(mine.decode(z), theirs.decode(z if inner == "vqvae" else z / 0.3).sample)


@pytest.mark.parametrize("vq", [False, True])
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_diffusers_reads_what_we_write(tmp_path, seed, vq):
    from diffusers import AutoencoderKL as TheirKL
    from diffusers import VQModel

    ours, _ = pair(seed, vq)
    if not vq:
        ours.scale_factor = 0.4
    save_diffusers(ours, tmp_path)
    theirs, said = (VQModel if vq else TheirKL).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()) and theirs.config.scaling_factor == ours.scale_factor
    x = torch.randn(1, 3, 3 * ours.f, ours.f, dtype=torch.float64)
    z = torch.randn(1, ours.latent_channels, 3, 1, dtype=torch.float64)
    precise, theirs = copy.deepcopy(ours).double(), theirs.double()
    encoded = theirs.encode(x)
    assert_near(precise.posterior(x).mean, encoded.latents if vq else encoded.latent_dist.mean)
    assert_near(precise.decode(z * ours.scale_factor), theirs.decode(z).sample)
    back = load_published(tmp_path)
    assert back.config == ours.config
    assert all(torch.equal(x, ours.state_dict()[name]) for name, x in back.state_dict().items())


@pytest.fixture
def small():
    torch.manual_seed(0)
    return AutoencoderKL(8, (1, 2), 1, 2, groups=4)


def write(tensors, path):
    if path.suffix == ".safetensors":
        save_tensors(tensors, path)
    else:
        torch.save({"state_dict": tensors, "epoch": 3, "global_step": 7}, path)


@pytest.mark.parametrize("kind", [".safetensors", ".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("naming", ["released", "whole model", "diffusers", "older diffusers"])
def test_every_naming_in_every_kind_of_file(tmp_path, small, kind, naming):
    tensors = small.state_dict()
    if naming == "whole model":
        tensors = {PREFIX + name: x for name, x in tensors.items()} | {"model.diffusion_model.x": torch.zeros(2)}
    elif "diffusers" in naming:
        tensors = to_diffusers(tensors) if naming == "diffusers" else aged(to_diffusers(tensors))
    path = tmp_path / f"weights{kind}"
    write(tensors, path)
    loaded = load_published(path, scale_factor=0.18215, groups=4)
    assert loaded.config == small.config | {"scale_factor": 0.18215}
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in small.state_dict().items())


def test_a_state_dict_without_anything_around_it_and_half_precision(tmp_path, small):
    torch.save({name: x.half() for name, x in small.state_dict().items()}, tmp_path / "half.pt")
    loaded = load_published(tmp_path / "half.pt", groups=4)
    assert {x.dtype for x in loaded.parameters()} == {torch.float32} and all(
        x.requires_grad for x in loaded.parameters()
    )
    for name, x in small.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], x.half().float(), rtol=0, atol=0)


def test_loading_leaves_the_random_streams_alone(tmp_path, small):
    save_diffusers(small, tmp_path)
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    load_published(tmp_path)
    assert torch.equal(torch.randn(3), expected)


def test_the_scale_that_a_whole_model_measured_is_read(tmp_path, small):
    whole = {PREFIX + name: x for name, x in small.state_dict().items()}
    save_tensors(whole | {"scale_factor": torch.tensor(0.25)}, tmp_path / "whole.safetensors")
    assert load_published(tmp_path / "whole.safetensors", groups=4).scale_factor == 0.25
    assert load_published(tmp_path / "whole.safetensors", scale_factor=2.0, groups=4).scale_factor == 2.0


def test_a_silent_diffusers_config_means_what_it_means_to_diffusers(tmp_path):
    from diffusers import AutoencoderKL as TheirKL

    save_diffusers(AutoencoderKL(32, (1, 2), 1, 2), tmp_path)
    config = {"_class_name": "AutoencoderKL"}
    (tmp_path / "config.json").unlink()
    save_json(config, tmp_path / "config.json")
    defaults, loaded = TheirKL().config, load_published(tmp_path)
    assert loaded.scale_factor == defaults.scaling_factor and loaded.config["groups"] == defaults.norm_num_groups


def test_legacy_is_kept_for_a_codebook(tmp_path):
    save_diffusers(AutoencoderVQ(8, (1, 2), 1, 2, num_codes=16, groups=4), tmp_path)
    assert load_published(tmp_path, legacy=True).quantize.legacy and not load_published(tmp_path).quantize.legacy
    with pytest.raises(CheckpointError, match=r"scale_factor=0\.18215.*not rescaled"):
        load_published(tmp_path, scale_factor=0.18215)


def test_legacy_is_refused_where_there_is_no_codebook(tmp_path, small):
    save_diffusers(small, tmp_path)
    with pytest.raises(CheckpointError, match="legacy: only a codebook has a commitment"):
        load_published(tmp_path, legacy=True)


def test_each_name_is_read_from_the_file_that_the_index_names_for_it(tmp_path, small):
    save_diffusers(small, tmp_path)
    (tmp_path / FILES[0]).unlink()
    tensors = to_diffusers(small.state_dict())
    sharded(tmp_path, tensors, ".safetensors", "safetensors.index.json")
    for i in range(3):
        file = tmp_path / f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors"
        others = {name: torch.zeros_like(x) for name, x in tensors.items()}
        save_tensors(others | load_tensors(file) | {"more": torch.ones(1)}, file)
    loaded = load_published(tmp_path)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in small.state_dict().items())


def test_numbers_beyond_float32_are_refused(tmp_path, small):
    tensors = {name: x.double() for name, x in small.state_dict().items()}
    tensors["decoder.conv_in.weight"] *= 1e300
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="'decoder.conv_in.weight' holds numbers that are too large"):
        load_published(tmp_path / "x.pt", 1.0, groups=4)


def test_a_published_first_stage_can_be_trained_whatever_the_caller_has_set(tmp_path, small):
    torch.save(small.state_dict(), tmp_path / "x.pt")
    for surroundings in (torch.device("meta"), torch.inference_mode()):
        with surroundings:
            loaded = load_published(tmp_path / "x.pt", 1.0, groups=4)
        assert all(x.device.type == "cpu" and not x.is_inference() for x in loaded.parameters())


@pytest.mark.parametrize("module", ["builtins", "__builtin__"])
@pytest.mark.parametrize("form", ["archive", "plain", "old format"])
def test_a_pickle_that_makes_bytes_by_their_number_is_refused_before_it_is_followed(tmp_path, form, module):
    number = (6 * 10**9).to_bytes(8, "little")
    program = b"\x80\x02c" + module.encode() + b"\nbytearray\n\x8a\x08" + number + b"\x85R."
    if form == "archive":
        with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
            for name, content in {"data.pkl": program, "version": b"3\n", "byteorder": b"little"}.items():
                archive.writestr(f"archive/{name}", content)
    else:
        before = [pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        (tmp_path / "x.ckpt").write_bytes(b"".join(before * (form == "old format")) + program)
    assert "x.ckpt is refused: beside tensors this pickle asks for" in read_alone([tmp_path / "x.ckpt"])
    with pytest.raises(CheckpointError, match="asks for .*bytearray, and a pickle that may build"):
        load_published(tmp_path / "x.ckpt")


# what is refused


class Foreign:
    """What a pickle should not contain."""


def broken(kind: str, folder, tensors: dict):
    """A path that cannot be read, in one of many ways, and what the message says of it."""
    file, weights = folder / "x.safetensors", "decoder.conv_in.weight"
    if kind == "nothing there":
        return folder / "none.safetensors", "none.safetensors is missing"
    if kind == "no pickle there":
        return folder / "none.ckpt", "none.ckpt is missing"
    if kind == "another ending":
        return folder / "x.onnx", r"ends in \.safetensors, \.ckpt"
    if kind == "an empty folder":
        return folder, "no folder of a diffusers AutoencoderKL or VQModel"
    if kind == "our own folder":
        AutoencoderKL(8, (1, 2), 1, 2, groups=4).save_pretrained(folder)
        return folder, "load_first_stage"
    if kind == "a folder without weights":
        save_json({"_class_name": "AutoencoderKL"}, folder / "config.json")
        return folder, "diffusion_pytorch_model.safetensors is missing"
    if kind == "config no JSON":
        (folder / "config.json").write_text("{")
        return folder, "config.json is not JSON"
    if kind == "a shift":
        save_diffusers(AutoencoderKL(32, (1, 2), 1, 2), folder)
        (folder / "config.json").write_text('{"_class_name": "AutoencoderKL", "shift_factor": 0.1}')
        return folder, r"shift_factor=0\.1"
    if kind in ("no scale", "no groups"):
        save_diffusers(AutoencoderKL(32, (1, 2), 1, 2), folder)
        said = {"scaling_factor": None} if kind == "no scale" else {"norm_num_groups": 0}
        (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"} | said))
        number, whole = "scaling_factor=None should be a finite number", "norm_num_groups=0 should be a whole number"
        return folder, number if kind == "no scale" else whole
    if kind == "cut off safetensors":
        save_tensors(tensors, file)
        file.write_bytes(file.read_bytes()[:5000])
        return file, "copy it again"
    pickle = folder / "x.ckpt"
    if kind == "pickle with an object":
        torch.save({"state_dict": tensors, "callbacks": Foreign()}, pickle)
        return pickle, r"refused: .*Foreign.*take the same weights as \.safetensors"
    if kind == "pickle with settings":
        torch.save({"state_dict": tensors, "args": argparse.Namespace(a=1)}, pickle)
        return pickle, r"refused: .*argparse\.Namespace"
    if kind in ("text as pickle", "empty pickle"):
        pickle.write_text("hello there" if kind == "text as pickle" else "")
        return pickle, "no whole PyTorch file"
    if kind == "cut off pickle":
        torch.save(tensors, pickle)
        pickle.write_bytes(pickle.read_bytes()[:5000])
        return pickle, "no whole PyTorch file"
    nothing = {"pickled list": [1, 2], "no tensors": {"state_dict": {"a": 1}}, "a list inside": {"state_dict": [1]}}
    if kind in nothing:
        torch.save(nothing[kind], pickle)
        return pickle, "no named tensors"
    tensors, match = {
        "another model": ({"conv.weight": torch.zeros(3)}, r"conv\.weight: no such name"),
        "an unknown name": (tensors | {"extra.bias": torch.zeros(3)}, r"extra\.bias: no such name.*released"),
        "encoder only": ({k: v for k, v in tensors.items() if k[0] != "d"}, r"no tensor 'decoder\.conv_in"),
        "decoder only": ({k: v for k, v in tensors.items() if k[0] == "d"}, "no whole first stage"),
        "no quant_conv": ({k: v for k, v in tensors.items() if "quant" not in k}, r"'quant_conv\.weight' is missing"),
        "a wrong shape": (
            tensors | {weights: torch.zeros(16, 2, 1, 1)},
            r"'decoder\.conv_in.*\(16, 2, 1, 1\).*\(16, 2",
        ),
        "a wrong rank": (tensors | {weights: torch.zeros(16)}, r"'decoder\.conv_in\.weight' has the shape \(16,\)"),
        "whole numbers": (
            tensors | {"quant_conv.bias": torch.zeros(4, dtype=torch.int8)},
            r"'quant_conv\.bias'.*int8",
        ),
        "attention on one side": (
            {k: v for k, v in tensors.items() if "encoder.mid.attn" not in k},
            r"'decoder\.mid\.attn_1.*is there, but",
        ),
        "one tensor of six": (
            {k: v for k, v in tensors.items() if k != "encoder.mid.attn_1.v.bias"},
            r"'encoder\.mid\.attn_1\.v\.bias' is missing",
        ),
        "widths that do not divide": (
            {
                k: torch.zeros(20, *v.shape[1:]) if k == "encoder.down.1.block.0.conv1.weight" else v
                for k, v in tensors.items()
            },
            "20 channels.*multiple of the first's 8",
        ),
    }[kind]
    save_tensors(tensors, file)
    return file, match


@pytest.mark.parametrize(
    "kind",
    [
        "nothing there",
        "no pickle there",
        "another ending",
        "an empty folder",
        "our own folder",
        "a folder without weights",
        "config no JSON",
        "a shift",
        "no scale",
        "no groups",
        "cut off safetensors",
        "pickle with an object",
        "pickle with settings",
        "text as pickle",
        "empty pickle",
        "cut off pickle",
        "pickled list",
        "no tensors",
        "a list inside",
        "another model",
        "an unknown name",
        "encoder only",
        "decoder only",
        "no quant_conv",
        "a wrong shape",
        "a wrong rank",
        "whole numbers",
        "attention on one side",
        "one tensor of six",
        "widths that do not divide",
    ],
)
def test_what_does_not_fit_is_named(tmp_path, small, kind):
    path, match = broken(kind, tmp_path, small.state_dict())
    with pytest.raises(CheckpointError, match=match) as caught:
        load_published(path, groups=None if path.is_dir() else 4)
    assert path.name in str(caught.value)


def test_groups_that_no_layer_can_have(tmp_path, small):
    save_tensors(small.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="channels=8 cannot be split into groups=32"):
        load_published(tmp_path / "x.safetensors")


def test_what_diffusers_has_not_is_not_written(tmp_path):
    with pytest.raises(LDMError, match="IdentityFirstStage"):
        save_diffusers(IdentityFirstStage(), tmp_path / "a")
    with pytest.raises(LDMError, match=r"multipliers=\(2, 4\)"):
        save_diffusers(AutoencoderKL(8, (2, 4), 1, 2, groups=4), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_first_level_wider_than_channels_is_read_all_the_same():
    wide = AutoencoderKL(8, (2, 4), 1, 2, groups=4).eval()
    loaded = build(from_released(wide.state_dict()), groups=4)
    x = torch.randn(1, 3, 8, 8)
    assert loaded.config == wide.config and torch.equal(loaded.encode(x), wide.encode(x))


def test_read_tensors_gives_tensors_and_nothing_else(tmp_path):
    torch.save({"a": torch.zeros(2), "epoch": 3, 5: torch.zeros(1)}, tmp_path / "x.pt")
    assert read_tensors(tmp_path / "x.pt").keys() == {"a"}


def test_diffusers_is_not_imported_by_the_package():
    source = Path(published.__file__).read_text(encoding="utf-8")
    imported = {name.split(".")[0] for name in re.findall(r"^\s*(?:from|import) ([\w.]+)", source, re.MULTILINE)}
    assert "torch" in imported and "diffusers" not in imported


@pytest.mark.parametrize(
    "stray",
    ["decoder.up.9.block.0.conv1.weight", "encoder.down.3.block.0.conv1.weight", "encoder.down.0.block.1.conv1.weight"],
)
def test_a_stray_number_in_a_name_does_not_turn_the_decoder_round(stray):
    """The table is made for as many levels and blocks as the names say: both sides must say the same."""
    ours = AutoencoderKL(8, (1, 2), blocks=1, latent_channels=3, groups=4).state_dict()
    for translate, names in ((to_diffusers, ours), (from_released, ours)):
        with pytest.raises(CheckpointError, match="levels of .* in its encoder and .* in its decoder"):
            translate(names | {stray: torch.zeros(1)})
    their_stray = re.sub(r"(down|up)\.", r"\1_blocks.", stray).replace(".block.", ".resnets.")
    with pytest.raises(CheckpointError, match="levels of"):
        from_diffusers(to_diffusers(ours) | {their_stray: torch.zeros(1)})


def test_one_side_alone_is_translated():
    ours = AutoencoderKL(8, (1, 2, 2), blocks=1, latent_channels=3, groups=4).state_dict()
    for side in ("encoder", "decoder"):
        half = {name: x for name, x in ours.items() if name.startswith(side)}
        assert from_diffusers(to_diffusers(half)).keys() == half.keys()


# released files, and hostile ones


@pytest.fixture
def lightning(monkeypatch):
    """The modules whose objects trainers left in released files, as far as writing such a file needs them."""
    made = {}
    for path, names in {
        "pytorch_lightning.callbacks.model_checkpoint": ["ModelCheckpoint"],
        "omegaconf.listconfig": ["ListConfig"],
        "omegaconf.base": ["ContainerMetadata"],
    }.items():
        for end in range(1, path.count(".") + 2):
            parent = ".".join(path.split(".")[:end])
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        for name in names:
            made[name] = type(name, (), {"__module__": path})
            setattr(sys.modules[path], name, made[name])
    return types.SimpleNamespace(**made)


def forget(monkeypatch):
    """Reading happens without these modules, and may not look for them."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("pytorch_lightning", "omegaconf")]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails


def test_a_released_checkpoint_is_read_without_the_library_that_wrote_it(tmp_path, small, lightning, monkeypatch):
    settings = lightning.ListConfig()
    metadata = lightning.ContainerMetadata()
    metadata.ref_type, metadata.resolver_cache, metadata.flags = int, collections.defaultdict(dict), {"a": bool}
    settings.__dict__ |= {"_metadata": metadata, "_content": [1, 2.5, "three"], "_parent": None}
    whole = {PREFIX + name: x for name, x in small.state_dict().items()}
    content = {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": whole | {"scale_factor": torch.tensor(0.25), "cond_stage_model.x": torch.zeros(2)},
        "callbacks": {lightning.ModelCheckpoint: {"monitor": None, "best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [{"state": {0: {"step": 4, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [{"base_lrs": [1.0], "last_epoch": 3, "lr_lambdas": [settings]}],
        "hyper_parameters": {"ignore_keys": settings},
    }
    torch.save(content, tmp_path / "model.ckpt")
    forget(monkeypatch)
    allowed = torch.serialization.get_safe_globals()
    loaded = load_published(tmp_path / "model.ckpt", groups=4)
    assert loaded.scale_factor == 0.25
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in small.state_dict().items())
    assert set(torch.serialization.get_safe_globals()) == set(allowed)  # nothing stays allowed


def raw_pickle(path: Path, program: bytes, tensors: dict) -> Path:
    """A file of torch.save in whose pickle a program of ours makes one of the objects."""
    torch.save({"state_dict": tensors, "note": "here"}, path)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    assert members[name].count(text("here")) == 1
    members[name] = members[name].replace(text("here"), program)
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    return path


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


RUN = "open('code-was-run', 'w')"
CALL = text(RUN) + b"\x85R"  # with one argument, of what lies on the stack
HOSTILE = {
    "builtins.eval": b"cbuiltins\neval\n" + CALL,
    "eval of Python 2": b"c__builtin__\neval\n" + CALL,
    "builtins.exec": b"cbuiltins\nexec\n" + CALL,
    "builtins.getattr": b"cbuiltins\ngetattr\n" + CALL,
    "builtins.__import__": b"cbuiltins\n__import__\n" + text("this") + b"\x85R",
    "os.system": b"cos\nsystem\n" + text("touch code-was-run") + b"\x85R",
    "posix.system": b"cposix\nsystem\n" + text("touch code-was-run") + b"\x85R",
    "subprocess.Popen": b"csubprocess\nPopen\n" + text("touch code-was-run") + b"\x85R",
    "runpy": b"crunpy\n_run_code\n" + CALL,
    "importlib": b"cimportlib\nimport_module\n" + text("this") + b"\x85R",
    "torch's own loader": b"ctorch\nload\n" + text("x") + b"\x85R",
    "torch.hub": b"ctorch.hub\nload\n" + text("x") + b"\x85R",
    "numpy.load": b"cnumpy\nload\n" + text("x") + b"\x85R",
    "object of a stranger": b"cstranger.module\nThing\n)\x81}b",
    "an instance": b"(" + text(RUN) + b"ibuiltins\neval\n",
    "an object by code": b"(cbuiltins\neval\n" + text(RUN) + b"o",
    "a global from the stack": text("builtins") + text("eval") + b"\x93" + CALL,
    "a stand-in that is called": b"comegaconf.base\nThing\n)\x81" + CALL,
    "entries of a stand-in": b"comegaconf.base\nThing\n)\x81(" + text("a") + text("b") + b"u",
    "extension": b"\x82\x01",
}
HARMLESS = {  # names of a training library, whatever they seem to be: nothing of that name is looked for
    "a function": b"comegaconf.os\nsystem\n" + text("touch code-was-run") + b"\x85R",
    "a dotted name": b"cpytorch_lightning\nos.system\n" + text("touch code-was-run") + b"\x85R",
    "a state": b"comegaconf.base\nThing\n)\x81}(" + text("__class__") + text("x") + b"ub",
    "a state of two": b"comegaconf.base\nThing\n)\x81}}\x86b",
    "arguments": b"comegaconf.base\nThing\n(" + text("a") + b"K\x01N}tR",
}


def read_alone(path: Path) -> str:
    """What a process of its own says of a file, with limits on its memory; there it would also crash alone."""
    script = """if True:
        import resource, sys
        from ldm_edu.errors import CheckpointError
        from ldm_edu.first_stage.published import load_published
        def trap(name, *_):
            assert not name.startswith(("pytorch_lightning", "omegaconf", "stranger")), name
        sys.addaudithook(lambda event, args: trap(*args) if event == "import" else None)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
        for path in sys.argv[1:]:
            try:
                load_published(path, groups=4, scale_factor=1.0)
                print("loaded")
            except CheckpointError as error:
                print(error)
    """
    run = [sys.executable, "-c", script, *map(str, path if isinstance(path, list) else [path])]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, cwd=path[0].parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_pickle_runs_code(tmp_path, small):
    """Whatever it asks for: it is refused, or, as a note of a training library, replaced by an empty object."""
    paths = [
        raw_pickle(tmp_path / f"{i}.ckpt", program, small.state_dict())
        for i, program in enumerate([*HOSTILE.values(), *HARMLESS.values()])
    ]
    said = read_alone(paths).splitlines()
    assert not (tmp_path / "code-was-run").exists() and len(said) == len(paths)
    for name, line in zip(HOSTILE, said):
        assert re.search(r"is refused: beside tensors this pickle asks for|is no whole PyTorch file", line), (
            name,
            line,
        )
    for asked, line in zip(("eval", "eval", "exec", "getattr", "__import__", "os.system", "posix.system"), said):
        assert f"asks for {asked}, and" in line
    assert said[len(HOSTILE) :] == ["loaded"] * len(HARMLESS)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_every_protocol_run_nothing(tmp_path, protocol, monkeypatch):
    class Trap:
        def __reduce__(self):
            return eval, (RUN,)

    monkeypatch.chdir(tmp_path)
    for ending in (".ckpt", ".pt", ".pth", ".bin"):
        (tmp_path / f"x{ending}").write_bytes(pickle.dumps({"state_dict": Trap()}, protocol))
        with pytest.raises(CheckpointError, match=f"x{ending} is (refused|no whole PyTorch file)"):
            load_published(tmp_path / f"x{ending}")
    assert not os.path.exists("code-was-run")


def test_a_program_for_torchscript_is_no_file_of_weights(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="x.pt is a TorchScript program"):
        load_published(tmp_path / "x.pt")


def rewritten(path: Path, compression: int) -> None:
    """The same archive, its members packed in another way."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in members.items():
            new.writestr(name, content)


def test_a_small_file_that_would_become_large_is_refused(tmp_path, small):
    paths, weight = [], "decoder.conv_in.weight"
    giants = {
        "stride 0": torch.zeros(1).expand(10**9, 2, 3, 3),
        "nearly 2^63": torch.zeros(1).expand(2**30, 2**29, 3, 3),
        "overlapping": torch.zeros(20000).as_strided((10000, 10000, 1, 1), (1, 1, 1, 1)),
        "meta": torch.zeros(10**6, 10**6, 3, 3, device="meta"),
        "sparse": torch.sparse_coo_tensor(torch.zeros(4, 1).long(), torch.ones(1), (10**9, 10**9, 3, 3)),
        "quantized": torch.quantize_per_tensor(torch.zeros(16, 2, 3, 3), 0.1, 0, torch.quint8),
    }
    for name, giant in giants.items():
        paths.append(tmp_path / f"{name}.pt")
        torch.save(small.state_dict() | {weight: giant}, paths[-1])
        paths.append(tmp_path / f"{name} first.pt")
        torch.save(small.state_dict() | {"encoder.conv_in.weight": giant}, paths[-1])
    shared = torch.zeros(10**6)
    paths.append(tmp_path / "shared.pt")
    torch.save({f"encoder.down.0.block.{i}.conv1.weight": shared.view(1000, 1000, 1, 1) for i in range(900)}, paths[-1])
    paths.append(tmp_path / "packed.pt")
    torch.save(small.state_dict() | {weight: torch.zeros(10**8)}, paths[-1])
    rewritten(paths[-1], zipfile.ZIP_DEFLATED)
    assert paths[-1].stat().st_size < 10**6
    lines = read_alone(paths).splitlines()
    assert len(lines) == len(paths)
    for path, said in zip(paths, lines):
        assert path.name in said and len(said) < 500
        assert re.search(
            "no number for each of its places|no plain array|would take|is no whole PyTorch file|is refused", said
        ), said


def test_a_storage_that_claims_more_than_the_file_holds_is_not_read_beyond_it(tmp_path, small):
    """Bytes behind the end of an array are somebody else's."""
    torch.save(small.state_dict(), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old:
        members = {name: old.read(name) for name in old.namelist()}
    data = next(name for name in members if re.search(r"/data/\d+$", name) and len(members[name]) > 1000)
    members[data] = members[data][:64]
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    said = read_alone([tmp_path / "x.pt"])
    assert "x.pt" in said or said == "loaded\n"  # refused, or what lies behind in the same file; no crash


@pytest.mark.parametrize("name", ["9" * 5000, "999999999", "9999", "1000"])
def test_numbers_in_names_do_not_decide_how_much_is_made(name):
    names = {f"{side}.{name}.block.0.conv1.weight": torch.zeros(1) for side in ("encoder.down", "decoder.up")}
    names |= {f"decoder.up.{name}.block.1.conv1.weight": torch.zeros(1)}
    for translate in (to_diffusers, from_diffusers, from_released):
        with pytest.raises(CheckpointError, match="no such name|but there are 3 names"):
            translate(names)


def test_tensors_may_share_their_numbers_and_be_bfloat16(tmp_path, small):
    tensors = {name: x.bfloat16() for name, x in small.state_dict().items()}
    tensors["encoder.mid.block_2.conv1.weight"] = tensors["encoder.mid.block_1.conv1.weight"]
    for name in ("tied.bin", "tied.safetensors"):
        write(tensors, tmp_path / name)
        loaded = load_published(tmp_path / name, 0.5, groups=4).state_dict()
        assert all(torch.equal(loaded[key], x.float()) for key, x in tensors.items())


def test_nothing_of_a_file_stays_mapped(tmp_path, small):
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("only Linux tells which files are mapped")
    for name in ("x.pt", "x.safetensors"):
        write(small.state_dict(), tmp_path / name)
        loaded = load_published(tmp_path / name, 0.5, groups=4)
        assert str(tmp_path) not in Path("/proc/self/maps").read_text() and loaded


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("kind", [".safetensors", ".ckpt"])
def test_the_names_of_wrappers_are_taken_off(tmp_path, small, prefix, kind):
    for i, outer in enumerate(("", PREFIX)):
        write({f"{outer}{prefix}{name}": x for name, x in small.state_dict().items()}, tmp_path / f"{i}{kind}")
        write({f"{prefix}{outer}{name}": x for name, x in small.state_dict().items()}, tmp_path / f"{i + 2}{kind}")
    for i in range(4):
        loaded = load_published(tmp_path / f"{i}{kind}", 0.5, groups=4)
        assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in small.state_dict().items())


def test_a_name_with_and_without_a_wrapper_is_ambiguous(tmp_path, small):
    write(small.state_dict() | {"module.quant_conv.bias": torch.zeros(4)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="some tensors are there twice, with and without `module.`"):
        load_published(tmp_path / "x.pt", 0.5, groups=4)


def test_a_state_dict_inside_a_state_dict(tmp_path, small):
    torch.save({"state_dict": {"state_dict": small.state_dict()}}, tmp_path / "x.pt")
    assert load_published(tmp_path / "x.pt", 0.5, groups=4).scale_factor == 0.5
    endless = {}
    endless["state_dict"] = endless
    torch.save(endless, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="x.pt holds no named tensors"):
        load_published(tmp_path / "x.pt")


# the scale factor


def test_a_kl_file_that_does_not_say_its_scale_does_not_silently_get_one(tmp_path, small):
    whole = {PREFIX + name: x for name, x in small.state_dict().items()}
    kinds = {
        "bare": (small.state_dict(), r"0\.18215 \(Stable Diffusion 1 and 2\) or 0\.13025 \(SDXL\)$"),
        "sd": (whole | {"cond_stage_model.transformer.x": torch.zeros(1)}, r"such as 0\.18215 \(Stable.* 1 and 2\)$"),
        "sdxl": (whole | {"conditioner.embedders.1.x": torch.zeros(1)}, r"such as 0\.13025 \(SDXL\)$"),
    }
    for name, (tensors, said) in kinds.items():
        save_tensors(tensors, tmp_path / f"{name}.safetensors")
        with pytest.warns(UserWarning, match=f"{name}.safetensors does not say its scale factor: 1 is taken.*{said}"):
            assert load_published(tmp_path / f"{name}.safetensors", groups=4).scale_factor == 1.0


@pytest.mark.filterwarnings("error")
def test_a_scale_that_is_said_or_not_needed_needs_no_warning(tmp_path, small):
    save_tensors(small.state_dict(), tmp_path / "x.safetensors")
    assert load_published(tmp_path / "x.safetensors", 1.0, groups=4).scale_factor == 1.0
    save_diffusers(small, tmp_path / "folder")
    assert load_published(tmp_path / "folder").scale_factor == 1.0
    vq = AutoencoderVQ(8, (1, 2), 1, 2, num_codes=16, groups=4)
    save_tensors(vq.state_dict(), tmp_path / "vq.safetensors")
    assert load_published(tmp_path / "vq.safetensors", groups=4).scale_factor == 1.0


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1", True])
def test_a_scale_or_a_number_of_groups_without_sense_is_refused(tmp_path, small, value):
    save_tensors(small.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises((LDMError, TypeError), match="scale_factor"):  # TypeError: from beartype
        load_published(tmp_path / "x.safetensors", scale_factor=value, groups=4)
    with pytest.raises((LDMError, TypeError), match="groups"):
        load_published(tmp_path / "x.safetensors", scale_factor=1.0, groups=value)


@pytest.mark.parametrize(
    "measured", [torch.tensor(0.0), torch.tensor(float("nan")), torch.zeros(3), torch.tensor(-1.0)]
)
def test_a_measured_scale_without_sense_is_refused(tmp_path, small, measured):
    whole = {PREFIX + name: x for name, x in small.state_dict().items()}
    save_tensors(whole | {"scale_factor": measured}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: scale_factor=.* should be a finite number, above 0"):
        load_published(tmp_path / "x.safetensors", groups=4)


@pytest.mark.parametrize(
    "said, message",
    [
        ('"scaling_factor": 1e999', "scaling_factor=inf should be a finite number"),
        ('"scaling_factor": NaN', "config.json is not JSON"),
        ('"scaling_factor": -1', "scaling_factor=-1 should be a finite number, above 0"),
        ('"scaling_factor": "0.2"', "scaling_factor='0.2' should be"),
        ('"norm_num_groups": 4.0', "norm_num_groups=4.0 should be a whole number"),
        ('"norm_num_groups": true', "norm_num_groups=True should be a whole number"),
        ('"norm_num_groups": null', "norm_num_groups=None should be a whole number"),
        ('"shift_factor": 0.1', r"shift_factor=0\.1, but this package has only None"),
        ('"latents_mean": [0.1]', r"latents_mean=\[0\.1\], but"),
        ('"act_fn": ["silu"]', "act_fn="),
    ],
)
def test_a_config_of_diffusers_without_sense(tmp_path, small, said, message):
    save_diffusers(small, tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", ' + said + "}")
    with pytest.raises(CheckpointError, match=message):
        load_published(tmp_path)


def test_no_shift_is_no_shift(tmp_path, small):
    save_diffusers(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"shift_factor": 0.0, "latents_mean": None, "latents_std": None, "act_fn": "swish"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_published(tmp_path).config == small.config


# folders


def sharded(folder: Path, tensors: dict, ending: str = ".safetensors", index: str = "safetensors.index.json") -> Path:
    """Tensors in three files with an index, as diffusers writes large weights."""
    names, places = sorted(tensors), {}
    for i in range(3):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00003{ending}"
        part = {name: tensors[name] for name in names[i::3]}
        save_tensors(part, folder / file) if ending == ".safetensors" else torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    save_json({"metadata": {"total_size": 1}, "weight_map": places}, folder / f"diffusion_pytorch_model.{index}")
    return folder / f"diffusion_pytorch_model.{index}"


@pytest.mark.parametrize(
    "ending, index",
    [
        (".safetensors", "safetensors.index.json"),
        (".safetensors", "safetensors.index.fp16.json"),
        (".bin", "bin.index.json"),
    ],
)
def test_weights_in_several_files(tmp_path, small, ending, index):
    save_diffusers(small, tmp_path)
    (tmp_path / FILES[0]).unlink()
    path = sharded(tmp_path, to_diffusers(small.state_dict()), ending, index)
    loaded = load_published(tmp_path)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in small.state_dict().items())
    assert load_published(path, 1.0, groups=4).config == small.config
    next(tmp_path.glob(f"*2-of*{ending}")).unlink()
    with pytest.raises(CheckpointError, match=f"00002-of-00003{ending} is missing"):
        load_published(tmp_path)


def test_an_index_that_leads_astray(tmp_path, small):
    save_diffusers(small, tmp_path)
    (tmp_path / FILES[0]).rename(tmp_path / "elsewhere.safetensors")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    for places in (
        None,
        {},
        [1],
        {"a": 3},
        {"a": "../x.safetensors"},
        {"a": "/x.safetensors"},
        {"a": index.name},
        {"a": ""},
    ):
        save_json({"weight_map": places}, index)
        with pytest.raises(CheckpointError, match="index.json should say in 'weight_map'|ends in|is missing"):
            load_published(tmp_path)
    save_json({"weight_map": {"promised": "elsewhere.safetensors"}}, index)
    with pytest.raises(
        CheckpointError, match="index.json promises 'promised', but elsewhere.safetensors does not hold"
    ):
        load_published(tmp_path)


@pytest.mark.parametrize("file", ["fp16.safetensors", "fp16.bin", "bin"])
def test_weights_in_half_precision_are_found_by_their_name(tmp_path, small, file):
    save_diffusers(small, tmp_path)
    (tmp_path / FILES[0]).unlink()
    half = {name: x.half() for name, x in to_diffusers(small.state_dict()).items()}
    path = tmp_path / f"diffusion_pytorch_model.{file}"
    save_tensors(half, path) if file.endswith("safetensors") else torch.save(half, path)
    loaded = load_published(tmp_path)
    assert all(torch.equal(x.half().float(), loaded.state_dict()[name]) for name, x in small.state_dict().items())


@pytest.mark.parametrize("file", ["diffusion_flax_model.msgpack", "model.onnx", "diffusion_pytorch_model.gguf"])
def test_weights_of_another_kind_are_named(tmp_path, small, file):
    save_diffusers(small, tmp_path)
    (tmp_path / FILES[0]).rename(tmp_path / file)
    with pytest.raises(CheckpointError, match=f"safetensors is missing; {file} cannot be read"):
        load_published(tmp_path)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "AutoencoderTiny", "AsymmetricAutoencoderKL", "x" * 5000])
@pytest.mark.parametrize("inner", ["", "vae"])
def test_the_class_of_another_folder_is_named(tmp_path, name, inner):
    (tmp_path / inner).mkdir(exist_ok=True)
    save_json({"_class_name": name}, tmp_path / inner / "config.json")
    with pytest.raises(
        CheckpointError, match=f"no folder of a diffusers AutoencoderKL.*: it is of {name[:60]};"
    ) as caught:
        load_published(tmp_path)
    assert len(str(caught.value)) < 500


def test_what_may_not_be_read_is_not_called_missing(tmp_path, small, monkeypatch):
    save_diffusers(small, tmp_path / "folder")
    torch.save(small.state_dict(), tmp_path / "x.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match="link.pt is a link that leads nowhere"):
        load_published(tmp_path / "link.pt")
    with pytest.raises(CheckpointError, match="no folder of a diffusers"):
        load_published(tmp_path / "folder.pt")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", refuse)
        with pytest.raises(CheckpointError, match="x.pt cannot be read: no permission"):
            load_published(tmp_path / "x.pt")
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(CheckpointError, match="folder cannot be read: no permission"):
        load_published(tmp_path / "folder")


@pytest.mark.parametrize(
    "name", ["", "~nosuchuser/x.pt", "zero\0byte.pt", "x" * 5000 + ".pt", "a\nb", "/dev/null/x.pt"]
)
def test_names_of_nothing(name):
    with pytest.raises(CheckpointError):
        load_published(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [".safetensors", ".pt"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, small, value, kind):
    write(small.state_dict() | {"quant_conv.bias": torch.full((4,), value)}, tmp_path / f"x{kind}")
    with pytest.raises(CheckpointError, match="'quant_conv.bias' holds numbers that are not finite"):
        load_published(tmp_path / f"x{kind}", 1.0, groups=4)


def test_what_cannot_be_saved_for_diffusers_is_said(tmp_path, small):
    (tmp_path / "file").write_text("")
    for place, said in (("file", "a file stands where"), ("file/x", "a file stands where"), ("x" * 300, "too long")):
        with pytest.raises(CheckpointError, match=said):
            save_diffusers(small, tmp_path / place)
