"""Whole models and UNets under other names: held against diffusers, there and back, from every file; refusals."""

import copy
import inspect
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ldm_edu import published
from ldm_edu.conditioning.clip_text import read_clip_tokenizer
from ldm_edu.conditioning.text import TextConditioner
from ldm_edu.conditioning.tokens import CLIPConditioner
from ldm_edu.denoiser.unet import UNet
from ldm_edu.diffusion.sampling import ddim, last
from ldm_edu.diffusion.schedule import NoiseSchedule
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.files import load_json, load_tensors, save_json, save_tensors
from ldm_edu.first_stage.autoencoder import AutoencoderKL
from ldm_edu.first_stage.published import from_diffusers, load_published, to_diffusers
from ldm_edu.first_stage.quantization import AutoencoderVQ, IdentityFirstStage
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.published import (
    load_published_model,
    load_published_unet,
    save_diffusers_pipeline,
    unet_from_diffusers,
    unet_from_released,
    unet_to_diffusers,
)

UNET, STAGE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
WEIGHTS = "diffusion_pytorch_model.safetensors"


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for every parameter: layers that begin as zero would hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        z = torch.randn(p.shape, generator=g)
        p.data = z * p[0].numel() ** -0.5 if p.ndim > 1 else p.data + 0.1 * z
    return module.eval()


def configuration(seed: int) -> dict:
    """The arguments of a random UNet that diffusers has as well: every second one with a context."""
    r, cross = random.Random(seed), seed % 2 == 0
    multipliers = (1, *(r.choice([1, 2, 3]) for _ in range(r.randint(0, 2))))
    config = dict(
        in_channels=(out := r.randint(1, 4)),
        out_channels=out,
        concat_channels=r.choice([0, 0, 3]),
        channels=r.choice([32, 64]),
        multipliers=multipliers,
        blocks=r.randint(1, 2),
        attention_factors=tuple(2**i for i in range(len(multipliers)) if r.random() < 0.5),
        scale_shift_norm=r.random() < 0.5,
        resblock_updown=len(multipliers) > 1 and r.random() < 0.5,
    )
    config |= r.choice([dict(head_channels=16), dict(heads=1), dict(head_channels=8)])
    if cross:
        config |= dict(
            context_dim=r.choice([16, 24]), transformer_depth=r.randint(1, 2), linear_projection=seed % 4 == 0
        )
        config |= dict(vector_dim=r.choice([None, 6]))
        if config["attention_factors"]:
            config |= dict(resblock_updown=False)
    return config


CONFIGS = [configuration(seed) for seed in range(36)]
assert sum(c["resblock_updown"] for c in CONFIGS) >= 6
assert sum(c["scale_shift_norm"] for c in CONFIGS) >= 10 and sum(bool(c.get("vector_dim")) for c in CONFIGS) >= 5


def given(unet: UNet, seed: int = 0) -> tuple[Tensor, Tensor, SimpleNamespace]:
    """Random x, t, and a condition with all that the UNet wants, in float64."""
    g = torch.Generator().manual_seed(seed)
    h, w = 2 * unet.factor, unet.factor
    cond = SimpleNamespace(context=None, concat=None, vector=None)
    if unet.context_dim:
        cond.context = torch.randn(2, 5, unet.context_dim, generator=g).double()
    if unet.concat_channels:
        cond.concat = torch.randn(2, unet.concat_channels, h, w, generator=g).double()
    if unet.vector_dim:
        cond.vector = torch.randn(2, unet.vector_dim, generator=g).double()
    x = torch.randn(2, unet.in_channels, h, w, generator=g).double()
    return x, torch.randint(1000, (2,), generator=g), cond


@torch.no_grad()
def apart(ours: UNet, theirs: nn.Module, seed: int = 0) -> float:
    """The largest difference of two predictions in float64, as a part of the largest number."""
    x, t, cond = given(ours, seed)
    stacked = x if cond.concat is None else torch.cat([x, cond.concat], 1)
    args = () if cond.context is None else (cond.context,)
    found = copy.deepcopy(ours).double()(x, t, cond)
    expected = copy.deepcopy(theirs).double()(stacked, t, *args, class_labels=cond.vector).sample
    assert found.shape == expected.shape and expected.std() > 0.05
    return ((found - expected).abs().max() / expected.abs().max()).item()


def their_class(unet: UNet):
    import diffusers

    return diffusers.UNet2DConditionModel if unet.context_dim else diffusers.UNet2DModel


# ---- the names of a UNet


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_names_there_and_back(config):
    unet = UNet(**config)
    tensors = unet.state_dict()
    theirs = unet_to_diffusers(tensors, unet.config)
    back = unet_from_diffusers(theirs, config)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], x) for name, x in tensors.items())
    again = unet_to_diffusers(back, config)
    assert again.keys() == theirs.keys() and all(torch.equal(again[name], x) for name, x in theirs.items())
    aged = {re.sub(r"(.*attentions\.\d\.)to_([qkv])\.", old_name, name): x for name, x in theirs.items()}
    if unet.context_dim is None:
        assert aged.keys() != theirs.keys()
        assert unet_from_diffusers(aged, config).keys() == tensors.keys()


def old_name(m: re.Match) -> str:
    return m[1] + {"q": "query", "k": "key", "v": "value"}[m[2]] + "."


@pytest.mark.parametrize("config", CONFIGS[:14], ids=str)
def test_predictions_equal_diffusers_both_ways_in_float64(config, tmp_path):
    ours = randomise(UNet(**config))
    save_diffusers_pipeline(ours, tmp_path / "ours")
    theirs, told = their_class(ours).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert apart(ours, theirs) < 1e-10
    randomise(theirs, seed=1).save_pretrained(tmp_path / "theirs")
    back = load_published_unet(tmp_path / "theirs")
    assert not back.training and apart(back, theirs, seed=1) < 1e-10
    assert apart(back, randomise(theirs, seed=2)) > 1e-3
    assert {k: v for k, v in back.config.items() if "head" not in k and k != "transformer_depth"} == {
        k: v for k, v in ours.config.items() if "head" not in k and k != "transformer_depth"
    }


@pytest.mark.parametrize("config", CONFIGS[:20], ids=str)
def test_a_released_file_gives_the_arguments_back(config, tmp_path):
    ours = randomise(UNet(**config))
    heads = {name: config[name] for name in ("heads", "head_channels") if name in config}
    prefix = UNET * (config["blocks"] - 1)  # a whole model's names, or a UNet's alone
    save_tensors({prefix + name: x for name, x in ours.state_dict().items()}, file := tmp_path / "unet.safetensors")
    loaded = load_published_unet(file, **heads)
    defaults = {} if ours.context_dim else {"linear_projection": False, "transformer_depth": 1}
    assert loaded.config == ours.config | defaults | {name: loaded.config[name] for name in ("head_channels", "heads")}
    x, t, cond = given(ours)
    assert torch.equal(loaded.double()(x, t, cond), ours.double()(x, t, cond))


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_diffusers_own_conversion_of_released_names(seed):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = dict(channels=32, multipliers=[(1, 2), (1, 2, 4)][seed % 2], blocks=1 + seed // 2, context_dim=16)
    config |= dict(attention_factors=(1, 2), head_channels=16, vector_dim=[None, 6][seed % 2])
    tensors = UNet(**config).state_dict()
    released = {re.sub(r"^label_emb\.", "label_emb.0.", UNET + name): x for name, x in tensors.items()}
    released = {name.replace(UNET + "label_emb.", UNET + "label_emb.0."): x for name, x in released.items()}
    known = dict(layers_per_block=config["blocks"], class_embed_type="projection" if seed % 2 else None)
    theirs = convert_ldm_unet_checkpoint(dict(released), known | dict(addition_embed_type=None))
    ours = unet_to_diffusers(*unet_from_released(released, head_channels=16))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], x) for name, x in theirs.items())


@pytest.mark.parametrize(
    "arguments, count",
    [
        (dict(context_dim=768, heads=8), 859_520_964),
        (dict(context_dim=1024, head_channels=64, linear_projection=True), 865_910_724),
    ],
)
def test_stable_diffusions_shapes(arguments, count):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet(4, 4, 320, (1, 2, 4, 4), 2, (1, 2, 4), **arguments)
        second = arguments["context_dim"] == 1024
        theirs = UNet2DConditionModel(
            cross_attention_dim=arguments["context_dim"],
            attention_head_dim=[5, 10, 20, 20] if second else 8,
            use_linear_projection=second,
        )
    tensors, config = unet_from_released({UNET + name: x for name, x in unet.state_dict().items()})
    assert sum(x.numel() for x in tensors.values()) == count
    assert all(unet.config[name] == value for name, value in config.items())
    named = unet_to_diffusers(tensors, config)
    assert {n: x.shape for n, x in named.items()} == {n: x.shape for n, x in theirs.state_dict().items()}
    if second:
        assert config["head_channels"] == 64 and config["linear_projection"]
    else:
        assert config["heads"] == 8


def test_an_inpainting_unet_opens_alone(tmp_path):
    ours = randomise(UNet(4, 4, 32, (1, 2), 1, (2,), context_dim=16, heads=2, concat_channels=5))
    save_diffusers_pipeline(ours, tmp_path)
    assert load_json(tmp_path / "config.json")["in_channels"] == 9
    assert load_published_unet(tmp_path).config["concat_channels"] == 5
    whole = load_published_unet(tmp_path, concat_channels=0)
    assert whole.in_channels == 9 and whole.concat_channels == 0
    with pytest.raises(CheckpointError, match="concat_channels=9"):
        load_published_unet(tmp_path, concat_channels=9)


# ---- whole models


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> Path:
    """A CLIP tokenizer of single letters with some merges."""
    letters = [*"abcdefghijklmnopqrstuvwxyz!,."]
    tokens = ["!", *letters[:26], *(f"{a}</w>" for a in letters), "ca", "do", "dog</w>"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nd o\ndo g</w>\n")
    words = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token=pad)
    (folder / "special_tokens_map.json").write_text(json.dumps(words))
    words |= dict(tokenizer_class="CLIPTokenizer", model_max_length=77)
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


VOCABULARY = 1 + 26 + 29 + 3 + 2


def text_words(**more) -> dict:
    """Arguments of a small CLIPTextConfig."""
    words = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    words |= dict(num_attention_heads=1, max_position_embeddings=77, hidden_act="quick_gelu")
    return words | dict(bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1, pad_token_id=0) | more


def their_pipeline(folder: Path, pad="<|endoftext|>", text=None, unet=None, schedule=None):
    """A small StableDiffusionPipeline with random weights, written by diffusers and transformers."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(str(write_tokenizer(folder.parent / f"{folder.name}-words", pad)))
    first_stage = diffusers.AutoencoderKL(
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        latent_channels=4,
    )
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[32, 64],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=1,
        cross_attention_dim=32,
        **(dict(attention_head_dim=2) | (unet or {})),
    )
    schedule = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012) | (schedule or {})
    pipeline = diffusers.StableDiffusionPipeline(
        vae=randomise(first_stage),
        text_encoder=randomise(CLIPTextModel(CLIPTextConfig(**text_words(**(text or {}))))),
        tokenizer=tokenizer,
        unet=randomise(network),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **schedule)
        if "rescale_betas_zero_snr" not in schedule
        else diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, **schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


PROMPTS = ["a cat, and a dog", "no dog"]
NEGATIVE = ["a zebra", ""]
SIZE, STEPS, SCALE = 16, 5, 4.0


def noise(shape=(4, 8, 8)) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))


def their_picture(pipeline, spacing: str = "trailing") -> Tensor:
    """Two pictures by diffusers, with DDIM."""
    from diffusers import DDIMScheduler

    more = dict(timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=spacing == "trailing")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **more)
    words = dict(num_inference_steps=STEPS, guidance_scale=SCALE, negative_prompt=NEGATIVE)
    drawn = pipeline(PROMPTS, SIZE, SIZE, **words, latents=noise(), output_type="pt").images
    assert drawn.std() > 0.05
    return drawn


@torch.no_grad()
def our_picture(model: LatentDiffusion, spacing: str = "trailing") -> Tensor:
    """The same two by ours."""
    denoise, cond = model.denoiser(PROMPTS, SCALE, negative=NEGATIVE)
    end = -1 if spacing == "trailing" else 0
    z = last(ddim(denoise, noise(), model.schedule, STEPS, cond, spacing=spacing, end=end))
    return (model.first_stage.decode(z) / 2 + 0.5).clamp(0, 1)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-3


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """A folder of diffusers and its pipeline."""
    folder = tmp_path_factory.mktemp("published") / "stable"
    return folder, their_pipeline(folder)


@pytest.fixture
def folder(stable, tmp_path) -> Path:
    """A copy of that folder, to be changed."""
    return Path(shutil.copytree(stable[0], tmp_path / "model"))


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_a_folder_of_diffusers_draws_the_same_picture(stable, spacing):
    model = load_published_model(stable[0])
    assert not model.training and model.size == SIZE and model.first_stage.scale_factor == 0.18215
    assert model.schedule == NoiseSchedule(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert all(x.dtype == torch.float32 for x in model.state_dict().values())
    assert_same(our_picture(model, spacing), their_picture(stable[1], spacing))


def test_stable_diffusion_2s_choices(tmp_path):
    pipeline = their_pipeline(
        tmp_path / "two",
        pad="!",
        text=dict(hidden_act="gelu", num_attention_heads=4, eos_token_id=2),
        unet=dict(attention_head_dim=[2, 4], use_linear_projection=True, upcast_attention=True),
        schedule=dict(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    )
    model = load_published_model(tmp_path / "two")
    assert model.schedule.prediction == "v" and model.schedule.zero_terminal_snr
    assert model.unet.config["head_channels"] == 16 and model.unet.config["linear_projection"]
    padded = pipeline.tokenizer(["a"], padding="max_length", max_length=77).input_ids
    assert model.conditioner.ids(["a"]).tolist() == padded and padded[0][-1] == 0
    assert_same(our_picture(model), their_picture(pipeline))


def test_variants_shards_and_pickles(stable, tmp_path):
    pipeline = copy.deepcopy(stable[1]).to(torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    pipeline.to(torch.float32)
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert (tmp_path / "shards" / "unet" / f"{WEIGHTS}.index.json").is_file()
    assert not (tmp_path / "shards" / "unet" / WEIGHTS).exists()
    pickles = Path(shutil.copytree(tmp_path / "half", tmp_path / "pickles"))
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = pickles / part / f"{name}.fp16.safetensors"
        torch.save(load_tensors(file), file.with_name(f"{'pytorch_' * (name == 'model')}{name}.bin"))
        file.unlink()
    expected = their_picture(pipeline)
    for name in ("half", "shards", "pickles"):
        assert_same(our_picture(load_published_model(tmp_path / name)), expected)


def test_defaults_of_a_config_that_says_little(folder, stable):
    config = load_json(folder / "unet" / "config.json")
    said = "_class_name block_out_channels down_block_types up_block_types layers_per_block cross_attention_dim".split()
    said += ["attention_head_dim", "sample_size"]
    save_json({name: config[name] for name in said}, folder / "unet" / "config.json")
    said = dict(_class_name="PNDMScheduler", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    save_json(said, folder / "scheduler" / "scheduler_config.json")
    (folder / "model_index.json").unlink()
    assert_same(our_picture(load_published_model(folder)), their_picture(stable[1]))


def released(model: LatentDiffusion, text: str = "text_model.") -> dict[str, Tensor]:
    """A model under the released names."""
    tensors = {UNET + name: x for name, x in model.unet.state_dict().items()}
    tensors |= {STAGE + name: x for name, x in model.first_stage.state_dict().items()}
    named = {} if model.conditioner is None else model.conditioner.state_dict()
    tensors |= {TEXT + text + name.removeprefix("encoder."): x for name, x in named.items()}
    if named:
        tensors[f"{TEXT}{text}embeddings.position_ids"] = torch.arange(77)[None]
    return {name: x.clone() for name, x in tensors.items()}


WITH = dict(heads=2, scale_factor=0.18215, size=SIZE)


@pytest.mark.parametrize(
    "dtype, kind",
    [
        (torch.float32, "safetensors"),
        (torch.float16, "safetensors"),
        (torch.float32, "old.ckpt"),
        (torch.float16, "ckpt"),
        (torch.bfloat16, "safetensors"),
    ],
    ids=str,
)
def test_a_single_file_draws_the_same_picture(stable, tmp_path, dtype, kind):
    pipeline, model = copy.deepcopy(stable[1]), load_published_model(stable[0])
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in released(model).items()}
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.diffusion_modelout2weight"] = torch.zeros(3)
    tensors |= {name: getattr(model.schedule, name).to(dtype) for name in ("betas", "alphas_cumprod")}
    file = tmp_path / f"model.{kind}"
    if kind == "safetensors":
        save_tensors(tensors, file)
    else:
        torch.save({"state_dict": tensors}, file, _use_new_zipfile_serialization=kind == "ckpt")
    words = stable[0] / "tokenizer"
    loaded = load_published_model(file, **WITH, tokenizer=words)
    assert loaded.schedule == model.schedule and loaded.size == SIZE and not loaded.training
    pipeline = pipeline.to(dtype).to(torch.float32)
    assert_same(our_picture(loaded), their_picture(pipeline))
    loaded.save_pretrained(tmp_path / "ours")
    assert torch.equal(our_picture(LatentDiffusion.from_pretrained(tmp_path / "ours")), our_picture(loaded))


@pytest.mark.parametrize(
    "kind, prediction, zero",
    [
        ("scaled_linear", "epsilon", False),
        ("scaled_linear", "v", True),
        ("linear", "x0", False),
        ("cosine", "v", False),
        ("cosine", "epsilon", False),
    ],
)
def test_ours_draws_the_same_picture_in_diffusers(stable, tmp_path, kind, prediction, zero):
    from diffusers import StableDiffusionPipeline

    model = load_published_model(stable[0])
    schedule = NoiseSchedule(500, kind, 0.001, 0.02, prediction, zero_terminal_snr=zero)
    model = LatentDiffusion(model.first_stage, model.unet, schedule, model.conditioner, SIZE).eval()
    save_diffusers_pipeline(model, tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.tokenizer(PROMPTS, padding="max_length").input_ids == model.conditioner.ids(PROMPTS).tolist()
    words = dict(num_inference_steps=STEPS, guidance_scale=SCALE, negative_prompt=NEGATIVE)  # the size is ours
    drawn = pipeline(PROMPTS, **words, latents=noise(), output_type="pt").images
    if (kind, prediction) != (
        "cosine",
        "epsilon",
    ):  # its first level has no signal: float32 is not enough for diffusers
        assert_same(our_picture(model), drawn)
    back = load_published_model(tmp_path)
    ends = {} if kind != "cosine" else dict(beta_start=back.schedule.beta_start, beta_end=back.schedule.beta_end)
    assert back.schedule.config == schedule.config | ends
    assert torch.equal(our_picture(back), our_picture(model))


def test_the_cosine_curve_of_diffusers_is_ours():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=300)
    torch.testing.assert_close(NoiseSchedule(300, "cosine").betas.float(), theirs.betas, atol=1e-6, rtol=1e-5)


def test_the_defaults_of_schedulers_are_those_of_diffusers():
    import diffusers

    for name, ours in published._SCHEDULERS.items():
        wanted = inspect.signature(getattr(diffusers, f"{name}Scheduler").__init__).parameters
        if "beta_start" not in wanted:  # a stand-in, where a library that it needs is not installed
            assert name == "DPMSolverSDE"
            continue
        assert {word: wanted[word].default for word in ours} == ours, name
        assert wanted["num_train_timesteps"].default == 1000 and wanted["prediction_type"].default == "epsilon"
    assert len(published._SCHEDULERS) >= 15


@pytest.mark.parametrize("name, table", [("UNet2DConditionModel", "_CROSS"), ("UNet2DModel", "_PLAIN")])
def test_the_defaults_of_unets_are_those_of_diffusers(name, table):
    import diffusers

    wanted = inspect.signature(getattr(diffusers, name).__init__).parameters
    supported = {**published._BOTH, **getattr(published, table)}
    assumed = {word: values[0] for word, values in supported.items()} | published._DEFAULTS[name]
    assumed |= {word: value for word, value in published._SHARED.items() if word in wanted}
    plain = {word: list(p.default) if isinstance(p.default, tuple) else p.default for word, p in wanted.items()}
    assert {word: plain[word] for word in assumed} == assumed and len(assumed) >= 25
    assert not plain.keys() - assumed.keys() - published._WITHOUT_EFFECT - {"self"}  # every word is thought of


# ---- without a condition


def unconditional(vq: bool, seed: int = 0) -> LatentDiffusion:
    config = dict(channels=32, multipliers=(1, 1), blocks=1, latent_channels=3)
    first_stage = randomise(AutoencoderVQ(**config, num_codes=50) if vq else AutoencoderKL(**config, scale_factor=0.7))
    unet = randomise(UNet(3, 3, 32, (1, 2), 1, (2,), head_channels=16))
    return LatentDiffusion(first_stage, unet, NoiseSchedule(beta_start=0.0015, beta_end=0.0195), None, SIZE).eval()


@pytest.mark.parametrize("vq", [True, False])
def test_an_unconditional_model_draws_the_same_picture(vq, tmp_path):
    from diffusers import LDMPipeline

    model = unconditional(vq)
    save_diffusers_pipeline(model, tmp_path / "ours")
    pipeline = LDMPipeline.from_pretrained(tmp_path / "ours")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, torch.Generator().manual_seed(5), num_inference_steps=STEPS, output_type="np").images
    with torch.no_grad():
        z = last(ddim(model.unet, noise((3, 8, 8)), model.schedule, STEPS))
        ours = (model.first_stage.decode(z) / 2 + 0.5).clamp(0, 1)
    assert_same(ours, torch.from_numpy(drawn).permute(0, 3, 1, 2))
    pipeline.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        back = load_published_model(tmp_path / name)
        assert back.conditioner is None and back.schedule == model.schedule
        assert torch.equal(back.sample(n=2, steps=3), model.sample(n=2, steps=3))


@pytest.mark.parametrize("vq", [True, False])
def test_an_unconditional_single_file(vq, tmp_path):
    model = unconditional(vq)
    tensors = released(model) | {"alphas_cumprod": model.schedule.alphas_cumprod.float()}
    tensors |= {} if vq else {"scale_factor": torch.tensor(0.7)}
    torch.save(tensors, file := tmp_path / "model.ckpt")
    loaded = load_published_model(file, head_channels=16, size=SIZE)
    assert loaded.schedule == model.schedule
    torch.testing.assert_close(loaded.sample(n=2, steps=3), model.sample(n=2, steps=3))
    with pytest.raises(CheckpointError, match="model.ckpt: heads: no shape tells"):
        load_published_model(file)


def test_a_codebook_whose_latents_diffusers_would_rescale(tmp_path):
    save_diffusers_pipeline(unconditional(True), tmp_path)
    config = load_json(tmp_path / "vqvae" / "config.json")
    save_json(config | {"scaling_factor": 0.18215}, tmp_path / "vqvae" / "config.json")
    with pytest.raises(CheckpointError, match=r"vqvae.config.json says scaling_factor=0.18215"):
        load_published_model(tmp_path)
    load_published_model(tmp_path, scale_factor=1.0)
    save_json(
        {name: value for name, value in config.items() if name != "scaling_factor"}, tmp_path / "vqvae" / "config.json"
    )
    load_published_model(tmp_path)  # the authors' own folder is older than that word


# ---- schedules in a file


@pytest.mark.parametrize("names", [("alphas_cumprod",), ("betas", "alphas_cumprod")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule(kind="scaled_linear", beta_start=0.00085, beta_end=0.012),
        NoiseSchedule(kind="scaled_linear", beta_start=0.0015, beta_end=0.0195),
        NoiseSchedule(kind="scaled_linear", beta_start=0.0015, beta_end=0.0205),
        NoiseSchedule(kind="linear", beta_start=0.0001, beta_end=0.02),
    ],
    ids=str,
)
def test_a_schedule_is_found_again(schedule, dtype, names, tmp_path):
    tensors = released(unconditional(True)) | {name: getattr(schedule, name).to(dtype) for name in names}
    save_tensors(tensors, file := tmp_path / "model.safetensors")
    assert load_published_model(file, head_channels=16).schedule == schedule


@pytest.mark.parametrize(
    "curve",
    [
        torch.linspace(1, 0.01, 1000),
        torch.zeros(1000),
        torch.ones(3, 4),
        torch.arange(1000),
        torch.full((1000,), float("nan")),
        NoiseSchedule(kind="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod ** 1.01,
    ],
    ids=range(6),
)
def test_another_curve_is_refused(curve, tmp_path):
    save_tensors(released(unconditional(True)) | {"alphas_cumprod": curve}, file := tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors: .*alphas_cumprod"):
        load_published_model(file, head_channels=16)
    own = NoiseSchedule(prediction="v")
    assert load_published_model(file, head_channels=16, schedule=own).schedule == own


# ---- refusals of folders


def change(folder: Path, part: str, **words) -> None:
    """Change words of a config, or of model_index.json."""
    name = {"scheduler": "scheduler/scheduler_config.json", "": "model_index.json"}.get(part, f"{part}/config.json")
    save_json(load_json(folder / name) | words, folder / name)


@pytest.mark.parametrize(
    "part, words, told",
    [
        ("", dict(text_encoder_2=["transformers", "CLIPTextModelWithProjection"]), "second text encoder, as SDXL"),
        ("", dict(transformer=["diffusers", "SD3Transformer2DModel"]), "a transformer in the place of the UNet"),
        ("", dict(low_res_scheduler=["diffusers", "DDPMScheduler"]), "a part 'low_res_scheduler'"),
        ("", dict(image_encoder=["transformers", "CLIPVisionModelWithProjection"]), "a part 'image_encoder'"),
        ("unet", dict(addition_embed_type="text_time"), "addition_embed_type='text_time'"),
        ("unet", dict(in_channels=9), r"conv_in|input_blocks.0.0.weight"),
        ("unet", dict(act_fn="gelu"), "act_fn='gelu'"),
        ("unet", dict(norm_eps=1e-6), "norm_eps=1e-06"),
        ("unet", dict(flip_sin_to_cos=False), "flip_sin_to_cos=False"),
        ("unet", dict(time_cond_proj_dim=256), "time_cond_proj_dim=256"),
        ("unet", dict(num_class_embeds=10), "num_class_embeds=10"),
        ("unet", dict(class_embed_type="timestep"), "class_embed_type='timestep'"),
        ("unet", dict(attention_type="gated"), "attention_type='gated'"),
        ("unet", dict(a_new_word=3), "a_new_word=3, a word that this package does not know"),
        ("unet", dict(down_block_types=["SimpleCrossAttnDownBlock2D", "DownBlock2D"]), "'SimpleCrossAttnDownBlock2D'"),
        ("unet", dict(down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"]), "other levels with attention"),
        ("unet", dict(block_out_channels=[32, 48]), "48 channels"),
        ("unet", dict(block_out_channels=32), "block_out_channels"),
        ("unet", dict(layers_per_block=[1, 2]), "one for all levels"),
        ("unet", dict(layers_per_block=10**9), "layers_per_block|blocks"),
        ("unet", dict(layers_per_block=60), "but there are only"),
        ("unet", dict(transformer_layers_per_block=[1, 2]), "one for all levels"),
        ("unet", dict(attention_head_dim=[2, 3]), "attention_head_dim"),
        ("unet", dict(attention_head_dim=5), "heads=5 does not divide"),
        ("unet", dict(cross_attention_dim=48), "attn2.to_k.weight"),
        ("unet", dict(sample_size=[8, 16]), "sample_size"),
        ("unet", dict(_class_name="UNetSpatioTemporalConditionModel"), "UNetSpatioTemporalConditionModel"),
        ("unet", dict(_class_name=["a", "list"]), "unet is of a"),
        ("vae", dict(_class_name="AutoencoderTiny"), "AutoencoderTiny"),
        ("vae", dict(shift_factor=0.0609), "shift_factor=0.0609"),
        ("text_encoder", dict(architectures=["T5EncoderModel"]), "T5EncoderModel"),
        ("text_encoder", dict(hidden_size=64), "hidden_size=64, but the weights have 32"),
        ("text_encoder", dict(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
        ("text_encoder", dict(num_attention_heads=3), "num_attention_heads=3"),
        ("text_encoder", dict(hidden_act="relu"), "hidden_act='relu'"),
        ("scheduler", dict(_class_name="FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler"),
        ("scheduler", dict(trained_betas=[0.1, 0.2]), "trained_betas"),
        ("scheduler", dict(beta_schedule="sigmoid"), "beta_schedule='sigmoid'"),
        ("scheduler", dict(prediction_type="flow_prediction"), "prediction_type='flow_prediction'"),
        ("scheduler", dict(beta_end="much"), "beta_end='much'"),
        ("scheduler", dict(num_train_timesteps=10**9), "num_train_timesteps"),
        ("scheduler", dict(rescale_betas_zero_snr=True), "zero_terminal_snr"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_folder_of_another_kind_is_refused(folder, part, words, told):
    change(folder, part, **words)
    with pytest.raises(CheckpointError, match=told) as error:
        load_published_model(folder)
    assert str(folder) in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    "taken, told", [(9, "inpainting"), (5, "depths"), (7, "enlarges"), (8, "edits"), (6, "takes 6")]
)
def test_a_unet_that_takes_more_than_a_latent_is_refused(folder, taken, told):
    config = load_json(folder / "unet" / "config.json") | dict(in_channels=taken)
    file = folder / "unet" / WEIGHTS
    tensors = load_tensors(file)
    weight = tensors["conv_in.weight"]
    save_tensors(tensors | {"conv_in.weight": torch.zeros(len(weight), taken, 3, 3)}, file)
    save_json(config, folder / "unet" / "config.json")
    with pytest.raises(CheckpointError, match=f"takes {taken} channels and gives 4.*") as error:
        load_published_model(folder)
    assert told in str(error.value) and str(folder) in str(error.value)
    assert load_published_unet(folder).concat_channels == taken - 4


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=f"{'first stage' if part == 'vae' else part} is missing") as error:
        load_published_model(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_missing_file_of_weights_is_named(folder, part):
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=f"{part}.*safetensors is missing"):
        load_published_model(folder)


def test_a_folder_without_its_tokenizer_takes_another(folder, stable):
    shutil.rmtree(folder / "tokenizer")
    change(folder, "", tokenizer=[None, None])
    model = load_published_model(folder, tokenizer=stable[0] / "tokenizer")
    assert_same(our_picture(model), their_picture(stable[1]))
    with pytest.raises(CheckpointError, match="tokenizer='.*nowhere'"):
        load_published_model(folder, tokenizer=folder / "nowhere")


def test_other_folders(folder, tmp_path, stable):
    with pytest.raises(CheckpointError, match="UNet2DConditionModel' alone"):
        load_published_model(folder / "unet")
    load_published_model(stable[0]).save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="`LatentDiffusion.from_pretrained` reads it"):
        load_published_model(tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    for load in (load_published_model, load_published_unet):
        with pytest.raises(CheckpointError, match="empty"):
            load(tmp_path / "empty")
        with pytest.raises(LDMError, match="config.json says them"):
            load(folder, heads=2)
    with pytest.raises(CheckpointError, match="diffusers' names"):
        load_published_unet(folder / "unet" / WEIGHTS)


@pytest.mark.parametrize("seed", range(2))
def test_no_config_raises_anything_else(folder, seed):
    """Words of every config at random: a refusal or a model, never another error, and never much memory."""
    r = random.Random(seed)
    values = [None, True, -1, 0, 3, 10**30, 1e308, "x", "", [], [1], [[2], [2]], {}, {"a": 1}, ["a", None], [10**9] * 2]
    for name in ("unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        whole = load_json(folder / name)
        for word in r.sample([*whole], min(12, len(whole))):
            save_json(whole | {word: r.choice(values)}, folder / name)
            try:
                load_published_model(folder)
            except CheckpointError as error:
                assert str(folder) in str(error)
        save_json(whole, folder / name)
    load_published_model(folder)


# ---- refusals of single files


@pytest.mark.parametrize(
    "name, told",
    [
        ("conditioner.embedders.1.model.ln_final.bias", "two text encoders, as SDXL"),
        (
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
            "take the same model's diffusers folder",
        ),
        ("cond_stage_model.model.ln_final.bias", "open_clip's .*take its diffusers folder"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "as Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "as Flux"),
        ("control_model.out.0.bias", "a ControlNet"),
        ("cond_stage_model.transformer.attn_layers.layers.0.0.weight", "the paper's own text encoder"),
        ("cond_stage_model.embedding.weight", "the number of a class"),
        ("cond_stage_model.something.weight", "no CLIP text encoder"),
        ("lora_unet_down_blocks.alpha", "LoRA"),
    ],
)
def test_a_file_of_another_kind_is_refused(name, told, tmp_path):
    save_tensors(released(unconditional(True)) | {name: torch.zeros(2)}, file := tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=told) as error:
        load_published_model(file, head_channels=16)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("prefix, part", [(UNET, "UNet"), (STAGE, "first stage"), (TEXT, "text encoder")])
def test_a_file_without_a_part(stable, tmp_path, prefix, part):
    tensors = {n: x for n, x in released(load_published_model(stable[0])).items() if not n.startswith(prefix)}
    save_tensors(tensors, file := tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=part) as error:
        load_published_model(file, **WITH, tokenizer=stable[0] / "tokenizer")
    assert str(file) in str(error.value)


def test_what_a_file_does_not_say(stable, tmp_path):
    tensors = released(load_published_model(stable[0]), text="")
    save_tensors(tensors, file := tmp_path / "model.safetensors")
    words = stable[0] / "tokenizer"
    with pytest.raises(CheckpointError, match="model.safetensors: scale_factor: the file does not say"):
        load_published_model(file, heads=2, tokenizer=words)
    with pytest.raises(CheckpointError, match="model.safetensors: heads: no shape tells"):
        load_published_model(file, scale_factor=0.5, tokenizer=words)
    with pytest.raises(CheckpointError, match="heads and head_channels are both given"):
        load_published_model(file, scale_factor=0.5, heads=2, head_channels=16, tokenizer=words)
    with pytest.raises(CheckpointError, match="model.safetensors: heads=5 does not divide"):
        load_published_model(file, scale_factor=0.5, heads=5, tokenizer=words)
    with pytest.raises(CheckpointError, match="tokenizer='.*nowhere' cannot be had"):
        load_published_model(file, **WITH, tokenizer=tmp_path / "nowhere")
    with pytest.raises(LDMError, match="scale_factor=-1.0"):
        load_published_model(file, scale_factor=-1.0)
    with pytest.raises(CheckpointError, match="size=7"):
        load_published_model(file, **WITH | dict(size=7), tokenizer=words)
    save_tensors(tensors | {"scale_factor": torch.tensor(0.25)}, file)
    model = load_published_model(file, heads=2, tokenizer=words)
    assert model.first_stage.scale_factor == 0.25 and model.size == 128
    with pytest.raises(CheckpointError, match="is missing"):
        load_published_model(tmp_path / "another.safetensors")
    save_tensors(load_tensors(stable[0] / "vae" / WEIGHTS), file)
    with pytest.raises(CheckpointError, match="its UNet is missing"):
        load_published_model(file)


def test_the_default_tokenizer_is_named_where_it_cannot_be_had(stable, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_tensors(released(load_published_model(stable[0])), file := tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tokenizer='openai/clip-vit-large-patch14' cannot be had"):
        load_published_model(file, **WITH)


def test_only_stable_diffusion_1_has_its_scale_factor_by_default(tmp_path):
    small = randomise(UNet(4, 4, 32, (1,), 1, (1,), context_dim=768, heads=8))
    stage = AutoencoderKL(channels=32, multipliers=(1, 1), blocks=1, latent_channels=4).eval()
    tokens = read_clip_tokenizer(write_tokenizer(tmp_path / "words"))
    words = text_words(hidden_size=768, num_attention_heads=12, num_hidden_layers=1)
    clip = CLIPConditioner(text_config=words, tokenizer=tokens).eval()
    model = LatentDiffusion(stage, small, NoiseSchedule(), clip, SIZE)
    save_tensors(released(model), file := tmp_path / "model.safetensors")
    loaded = load_published_model(file, tokenizer=tmp_path / "words")
    assert loaded.first_stage.scale_factor == 0.18215 and loaded.unet.config["heads"] == 8
    assert loaded.schedule == NoiseSchedule(1000, "scaled_linear", 0.00085, 0.012)
    assert loaded.conditioner.text_config["num_attention_heads"] == 12
    assert torch.equal(loaded.conditioner(PROMPTS).context, clip(PROMPTS).context)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_a_text_encoder_of_other_numbers_is_refused(stable, tmp_path, dtype):
    tensors, name = released(load_published_model(stable[0])), f"{TEXT}text_model.final_layer_norm.bias"
    save_tensors(tensors | {name: tensors[name].to(dtype)}, file := tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors: .*{dtype}"):
        load_published_model(file, **WITH, tokenizer=stable[0] / "tokenizer")


def test_a_tokenizer_of_another_encoder_is_refused(folder):
    words = load_json(folder / "tokenizer" / "tokenizer.json")
    words["model"]["vocab"] |= {f"more{i}": 100 + i for i in range(3)}
    save_json(words, folder / "tokenizer" / "tokenizer.json")
    with pytest.raises(CheckpointError, match="103 tokens, but the text encoder has 61"):
        load_published_model(folder)


def one_more(tensors: dict) -> dict:
    return tensors | {f"{UNET}output_blocks.9.0.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda t: t | {f"{UNET}out.2.weight": torch.zeros(3, 32, 3, 3, 1)}, "out.2.weight"),
        (lambda t: t | {f"{UNET}input_blocks.0.0.weight": torch.zeros(0, 3, 3, 3)}, "input_blocks.0.0.weight"),
        (lambda t: t | {f"{UNET}middle_block.0.emb_layers.1.bias": torch.full((64,), float("nan"))}, "not finite"),
        (lambda t: t | {f"{UNET}middle_block.0.emb_layers.1.bias": torch.zeros(1)}, "middle_block.0.emb_layers.1.bias"),
        (lambda t: t | {f"{UNET}something.bias": torch.zeros(1)}, "something.bias"),
        (lambda t: {n: x for n, x in t.items() if "middle_block.1." not in n}, "middle_block.1.qkv.weight"),
        (lambda t: {n: x for n, x in t.items() if "output_blocks.1.0" not in n}, "output_blocks.1"),
        (lambda t: t | {f"{UNET}label_emb.weight": torch.zeros(10, 128)}, "the number of a class"),
        (lambda t: t | {f"{UNET}output_blocks.999.0.bias": torch.zeros(1)}, "input_blocks.501"),
        (one_more, "input_blocks.6"),
    ],
    ids=range(10),
)
def test_a_spoiled_unet_is_refused(spoil, told, tmp_path):
    save_tensors(spoil(released(unconditional(True))), file := tmp_path / "model.safetensors")
    for load in (load_published_model, load_published_unet):
        with pytest.raises(CheckpointError, match=told) as error:
            load(file, head_channels=16)
        assert str(file) in str(error.value)


def test_transformers_of_several_depths_are_refused(tmp_path):
    tensors = UNet(4, 4, 32, (1, 2), 1, (1, 2), context_dim=16, heads=2).state_dict()
    deeper = {
        n.replace("blocks.0.attn", "blocks.1.attn"): x for n, x in tensors.items() if n.startswith("input_blocks.3.1")
    }
    save_tensors({**tensors, **{n: x.clone() for n, x in deeper.items()}}, file := tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match="transformers have 1 and 2 blocks, as SDXL's"):
        load_published_unet(file, heads=2)


class Surprise:
    """Reading it would run something."""

    def __reduce__(self):
        return Path.touch, (Path("surprise"),)


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": released(unconditional(True)), "note": Surprise()}, file := tmp_path / "model.ckpt")
    for load in (load_published_model, load_published_unet):
        with pytest.raises(CheckpointError, match="take the same weights as .safetensors"):
            load(file, head_channels=16)
    assert not Path("surprise").exists()


# ---- the way out


def test_what_diffusers_does_not_have_is_refused_before_anything_is_written(stable, tmp_path):
    model, free = load_published_model(stable[0]), unconditional(True)
    parts = model.first_stage, model.unet, model.schedule
    words = TextConditioner(["cat"], dim=32)
    by_codes = AutoencoderVQ(channels=32, multipliers=(1, 1), blocks=1, latent_channels=4, num_codes=9)

    def unet(**more) -> UNet:
        return UNet(**dict(in_channels=3, out_channels=3, channels=32, multipliers=(1, 2), attention_factors=()) | more)

    def wide(network: UNet) -> LatentDiffusion:
        return LatentDiffusion(free.first_stage, network, model.schedule, None, SIZE)

    pixels = LatentDiffusion(IdentityFirstStage(), unet(), model.schedule, None, SIZE)
    cases = {
        "conditioner: diffusers has no TextConditioner.*save the parts apart": LatentDiffusion(*parts, words, SIZE),
        "first_stage: diffusers' StableDiffusionPipeline": LatentDiffusion(
            by_codes, *parts[1:], model.conditioner, SIZE
        ),
        "first_stage: diffusers has no IdentityFirstStage": pixels,
        "multipliers=.*no first level wider": wide(unet(multipliers=(2, 2))),
        "heads=4 makes heads": wide(unet(heads=4, attention_factors=(1, 2))),
        "vector_dim=6": unet(vector_dim=6),
        "resblock_updown=True": unet(context_dim=8, resblock_updown=True, attention_factors=(2,)),
    }
    for told, model in cases.items():
        with pytest.raises(LDMError, match=told):
            save_diffusers_pipeline(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_parts_can_be_saved_apart(tmp_path):
    model = LatentDiffusion(
        AutoencoderKL(channels=32, multipliers=(1, 1), blocks=1, latent_channels=4),
        randomise(UNet(4, 4, 32, (1, 2), 1, (2,), context_dim=32, heads=2)),
        NoiseSchedule(),
        TextConditioner(["cat"], dim=32),
        SIZE,
    )
    save_diffusers_pipeline(model.unet, tmp_path / "unet")
    back = load_published_unet(tmp_path / "unet").state_dict()
    assert all(torch.equal(back[name], x) for name, x in model.unet.state_dict().items())
    assert load_published_unet(tmp_path).state_dict().keys() == back.keys()


def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    save_diffusers_pipeline(model := unconditional(True), tmp_path / "model")
    before = {file: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()}
    monkeypatch.setattr(published, "_scheduler_config", lambda schedule: {"a": object()})
    with pytest.raises(LDMError):
        save_diffusers_pipeline(randomise(model, 3), tmp_path / "model")
    assert before == {file: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()}


def test_names_that_do_not_fit_the_config():
    unet = UNet(4, 4, 32, (1, 2), 1, (2,), head_channels=16)
    tensors = unet.state_dict()
    theirs = unet_to_diffusers(tensors, unet.config)
    attention = "mid_block.attentions.0"
    for function, given_, config, told in [
        (
            unet_to_diffusers,
            tensors | {"a.b": torch.zeros(1)},
            unet.config,
            "a.b: no such name in a UNet of this package",
        ),
        (
            unet_from_diffusers,
            theirs | {"a.b": torch.zeros(1)},
            unet.config,
            "a.b: no such name in a UNet of diffusers",
        ),
        (unet_to_diffusers, tensors, {"wings": 2}, "UNet has no argument 'wings'"),
        (unet_to_diffusers, tensors, unet.config | {"blocks": 60}, "but there are only"),
        (unet_to_diffusers, tensors, unet.config | {"context_dim": 8}, "middle_block.1.qkv"),
        (unet_to_diffusers, tensors | {"middle_block.1.qkv.bias": torch.zeros(5)}, unet.config, "no qkv of 4 heads"),
        (unet_from_diffusers, theirs | {f"{attention}.to_q.bias": torch.zeros(5)}, unet.config, "cannot be made of"),
        (unet_from_diffusers, {n: x for n, x in theirs.items() if "to_v" not in n}, unet.config, "to_v is missing"),
    ]:
        with pytest.raises(LDMError, match=told):
            function(given_, config)


def test_a_first_stage_of_the_folder_is_the_same_as_by_itself(stable):
    whole, alone = load_published_model(stable[0]).first_stage, load_published(stable[0])
    assert whole.config == alone.config
    mapped = to_diffusers(whole.state_dict())
    assert from_diffusers(mapped).keys() == alone.state_dict().keys()


def test_the_package_loads_neither_diffusers_nor_transformers():
    code = "import sys, ldm_edu, ldm_edu.published; assert not {'diffusers', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert len(published.__all__) <= 6
