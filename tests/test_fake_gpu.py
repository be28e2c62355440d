"""No forward pass, loss or sampler makes the host wait for the device, or leaves a tensor on the CPU."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from fake_gpu import WITH_BACKWARD, FakeGPU, HostSync, needs_cuda_build
from torch import Tensor, nn

from ldm_edu import LPIPS, AutoencoderKL, LatentDiffusion, NoiseSchedule, TextConditioner, ToyFeatures, UNet
from ldm_edu.conditioning import (
    AttributesConditioner,
    ClassConditioner,
    CLIPConditioner,
    Condition,
    Conditioner,
    Guidance,
    InpaintingConditioner,
    LayoutConditioner,
    MapConditioner,
    drop,
)
from ldm_edu.data.toy.scenes import draw_scene
from ldm_edu.diffusion import SAMPLERS, GaussianMixture, SeededNoise, ddim, diffusion_loss, last
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.judge import SceneReader, augment, reader_loss, reader_targets
from ldm_edu.evaluation.metrics import psnr, ssim
from ldm_edu.first_stage.adversarial import Adversary, PatchDiscriminator
from ldm_edu.first_stage.autoencoder import DiagonalGaussian, FirstStage, Quantized
from ldm_edu.first_stage.losses import FirstStageLoss
from ldm_edu.first_stage.quantization import AutoencoderVQ, IdentityFirstStage
from ldm_edu.first_stage.tiling import decode_tiled, encode_tiled

pytestmark = needs_cuda_build


@pytest.fixture
def gpu() -> Iterator[FakeGPU]:
    with FakeGPU() as device:
        yield device


@pytest.fixture(params=["cuda", WITH_BACKWARD])
def any_gpu(request) -> Iterator[FakeGPU]:
    """The device without and with backward passes."""
    with FakeGPU(request.param) as device:
        yield device


def check(out: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> None:
    """A tensor on the device, of this shape and dtype."""
    assert (out.device.type, tuple(out.shape), out.dtype) == ("cuda", shape, dtype)


def check_backward(loss: Tensor, *modules: nn.Module) -> None:
    """A number on the device; its backward pass gives every weight a gradient and does not wait either."""
    assert loss.device.type != "cpu" and loss.shape == ()
    if loss.device.type == WITH_BACKWARD:
        weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
        assert weights
        for gradient, weight in zip(torch.autograd.grad(loss, weights), weights):
            assert (gradient.device, gradient.shape) == (weight.device, weight.shape)


# --- The harness ---


SYNCS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "int": lambda x: int(x[0, 0]),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", torch.float64),
    "copy_": lambda x: torch.zeros(2, 3).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "index": lambda x: x[:, : x[0, 0].long()],
    "equal": lambda x: torch.equal(x, x),
    "bincount": lambda x: torch.bincount(x.flatten().long()),
}


@pytest.mark.parametrize("sync", SYNCS)
def test_a_number_that_is_read_is_caught(any_gpu, sync):
    with pytest.raises(HostSync):
        SYNCS[sync](any_gpu.randn(2, 3))


def test_a_tensor_on_the_cpu_is_caught(any_gpu):
    with pytest.raises(RuntimeError, match="device"):
        any_gpu.randn(2, 3) + torch.ones(3)
    layer = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="device"):
        layer(any_gpu.randn(2, 3))
    assert any_gpu.holds(any_gpu.put(layer)(any_gpu.randn(2, 3)))


UPLOADS: dict[str, Callable[[FakeGPU], object]] = {
    "to": lambda gpu: torch.ones(3).to(gpu.device),
    "as": lambda gpu: torch.arange(3).to(gpu.randn(1)),
    "tensor": lambda gpu: torch.tensor([1.0, 2.0, 3.0], device=gpu.device),
    "copy_": lambda gpu: gpu.randn(3).copy_(torch.ones(3)),
    "index": lambda gpu: gpu.randn(4)[[0, 1, 3]],
}


@pytest.mark.parametrize("upload", UPLOADS)
def test_a_copy_to_the_device_is_noted(any_gpu, upload):
    UPLOADS[upload](any_gpu)
    assert [copy.shape for copy in any_gpu.uploads] == [(3,)]


def test_what_is_made_on_the_device_is_no_copy(any_gpu):
    x = any_gpu.randn(4) * 2 + torch.arange(4, device=any_gpu.device)
    x[1:3] = 0
    x.masked_fill_(x > 0, 1.0)
    torch.where(x > 0, x, 0.5).clamp(min=1)
    assert any_gpu.uploads == []


def test_the_cpu_still_computes(gpu):
    assert torch.arange(4).sum().item() == 6 and torch.ones(3).tolist() == [1, 1, 1]
    a, b = (torch.randn(3, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(a, b)


# --- The denoiser ---

LEVELS = NoiseSchedule().T
SLOTS = {
    "unconditional": {},
    "context": {"context_dim": 24},
    "context, linear": {"context_dim": 24, "linear_projection": True},
    "concat": {"concat_channels": 2},
    "vector": {"vector_dim": 5},
    "all": {"context_dim": 24, "concat_channels": 2, "vector_dim": 5},
}


def small_unet(gpu: FakeGPU, channels: int = 4, dtype: torch.dtype = torch.float32, **slots) -> UNet:
    size = dict(channels=32, multipliers=(1, 2), blocks=1, attention_factors=(2,))
    return gpu.put(UNet(channels, channels, **size, **slots).to(dtype))


def condition(gpu: FakeGPU, unet: UNet, b: int = 2, dtype: torch.dtype = torch.float32) -> Condition | None:
    """What this UNet needs."""
    shapes = {
        "context": unet.context_dim and (b, 3, unet.context_dim),
        "concat": unet.concat_channels and (b, unet.concat_channels, 8, 8),
        "vector": unet.vector_dim and (b, unet.vector_dim),
    }
    slots = {name: gpu.randn(*shape, dtype=dtype) for name, shape in shapes.items() if shape}
    return Condition(**slots) if slots else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", SLOTS)
def test_unet(gpu, slots, dtype):
    unet = small_unet(gpu, dtype=dtype, **SLOTS[slots])
    x, t = gpu.randn(2, 4, 8, 8, dtype=dtype), gpu.integers(2, below=LEVELS)
    check(unet(x, t, condition(gpu, unet, dtype=dtype)), 2, 4, 8, 8, dtype=dtype)
    assert gpu.uploads == []


@pytest.mark.parametrize("slots", SLOTS)
def test_diffusion_loss(any_gpu, slots):
    unet, schedule = small_unet(any_gpu, **SLOTS[slots]), NoiseSchedule()
    x0, t, cond = any_gpu.randn(2, 4, 8, 8), any_gpu.integers(2, below=LEVELS), condition(any_gpu, unet)
    loss = diffusion_loss(unet, schedule, x0, t, any_gpu.randn(2, 4, 8, 8), cond)
    check_backward(loss, unet)
    any_gpu.uploads.clear()  # of the schedule's tables
    diffusion_loss(unet, schedule, x0, t, any_gpu.randn(2, 4, 8, 8), cond)
    assert any_gpu.uploads == []


def test_the_exact_denoiser(gpu):
    mixture, schedule = GaussianMixture(torch.randn(3, 2), torch.ones(3)), NoiseSchedule()
    denoise = mixture.denoiser(schedule)
    x = gpu.randn(5, 2)
    check(denoise(x, gpu.integers(5, below=LEVELS)), 5, 2)
    check(denoise(x, gpu.integers(5, below=LEVELS), Condition(vector=gpu.randn(5, 3))), 5, 2)
    check(mixture.log_prob(x), 5)


# --- First stages ---


def first_stage(gpu: FakeGPU, kind: str) -> FirstStage:
    size = dict(channels=32, multipliers=(1, 2), blocks=1)
    stages: dict[str, Callable[[], FirstStage]] = {
        "kl": lambda: AutoencoderKL(**size, scale_factor=0.7),
        "kl, attention": lambda: AutoencoderKL(**size, attention_factors=(2,)),
        "vq": lambda: AutoencoderVQ(**size, num_codes=16),
        "vq, legacy": lambda: AutoencoderVQ(**size, num_codes=16, legacy=True),
        "identity": IdentityFirstStage,
    }
    return gpu.put(stages[kind]())


STAGES = ("kl", "kl, attention", "vq", "vq, legacy", "identity")


@pytest.mark.parametrize("kind", STAGES)
def test_encode_and_decode(gpu, kind):
    stage, x = first_stage(gpu, kind), gpu.randn(2, 3, 32, 32)
    latent = (2, stage.latent_channels, 32 // stage.f, 32 // stage.f)
    check(stage.encode(x), *latent)
    check(stage.encode(x, gpu.randn(*latent)), *latent)
    check(stage.posterior(x).kl(), 2)
    check(stage.decode(gpu.randn(*latent)), 2, 3, 32, 32)
    check(stage.reconstruct(x), 2, 3, 32, 32)
    assert gpu.uploads == []


@pytest.mark.parametrize("norms", ["thumbnail", "tile"])
@pytest.mark.parametrize("kind", STAGES)
def test_tiles(gpu, kind, norms):
    stage = first_stage(gpu, kind)
    latent = (1, stage.latent_channels, 96 // stage.f, 64 // stage.f)
    z = encode_tiled(stage, gpu.randn(1, 3, 96, 64), gpu.randn(*latent), tile=32, norms=norms)
    check(z, *latent)
    check(decode_tiled(stage, z, tile=32, norms=norms), 1, 3, 96, 64)
    # the shares of the tiles, once for each side
    assert len(gpu.uploads) == 4


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", STAGES[:-1])
def test_forward_for_training(any_gpu, kind, given):
    stage = first_stage(any_gpu, kind)
    noise = any_gpu.randn(2, stage.latent_channels, 16, 16) if given else None
    reconstruction, regulariser = stage(any_gpu.randn(2, 3, 32, 32), noise)
    assert any_gpu.holds(reconstruction) and reconstruction.shape == (2, 3, 32, 32)
    assert isinstance(regulariser, Quantized if kind.startswith("vq") else DiagonalGaussian)
    loss, terms = FirstStageLoss(l2_weight=0.5)(any_gpu.randn(2, 3, 32, 32), reconstruction, regulariser)
    check_backward(loss, stage)
    assert all(map(any_gpu.holds, terms.values()))
    assert any_gpu.uploads == []


@pytest.fixture(params=["toy", "alex", "vgg"])
def network(request) -> ToyFeatures | LPIPS:
    """A perceptual distance, on the CPU."""
    if request.param == "toy":
        return ToyFeatures().requires_grad_(False)
    return LPIPS(request.param, request.getfixturevalue("lpips_weights"))


def test_perceptual_loss(any_gpu, network):
    stage, x = first_stage(any_gpu, "kl"), any_gpu.randn(2, 3, 64, 64)
    loss, terms = FirstStageLoss(perceptual=any_gpu.put(network).distance)(x, *stage(x))
    check_backward(loss, stage)
    assert any_gpu.holds(terms["perceptual"]) and any_gpu.uploads == []


def test_perceptual_distance(gpu, network):
    check(gpu.put(network).distance(gpu.randn(2, 3, 64, 64), gpu.randn(2, 3, 64, 64)), 2)
    assert gpu.uploads == []


def test_toy_features(gpu):
    network = gpu.put(ToyFeatures())
    logits = network(gpu.randn(2, 3, 64, 64))
    check(logits["things"], 2, 48)
    check(network.embed(gpu.randn(2, 3, 64, 64)), 2, 128)
    assert gpu.uploads == []


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_discriminator(gpu, norm):
    discriminator = gpu.put(PatchDiscriminator(16, layers=2, norm=norm))
    check(discriminator(gpu.randn(2, 3, 32, 32)), 2, 1, 6, 6)
    assert gpu.uploads == []


def test_adversary_with_its_adaptive_weight():
    with FakeGPU(WITH_BACKWARD) as gpu:
        stage = first_stage(gpu, "kl")
        adversary = gpu.put(Adversary(PatchDiscriminator(16, layers=2)))
        x = gpu.randn(2, 3, 32, 32)
        loss, terms = FirstStageLoss()(x, *stage(x), lambda *args: adversary(*args, stage.last_layer))
        check_backward(loss, stage, adversary)
        assert {"g_loss", "d_loss", "d_weight"} <= terms.keys()
        assert all(map(gpu.holds, terms.values())) and gpu.uploads == []


# --- Conditions ---


def text_conditioner(gpu: FakeGPU) -> TextConditioner:
    return gpu.put(TextConditioner(["a", "cube"], length=6, dim=24, depth=1, heads=2))


def test_text(gpu):
    conditioner = text_conditioner(gpu)
    check(conditioner(["a cube", "cube"]).context, 2, 6, 24)
    check(conditioner.null(3).context, 3, 6, 24)
    assert [copy.shape for copy in gpu.uploads] == [(2, 6), (1, 6)]  # the ids


def clip() -> CLIPConditioner:
    """With random weights, and a tokenizer of one letter."""
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = dict(vocab_size=3, max_position_embeddings=6, bos_token_id=0, eos_token_id=1, **size)
    pieces = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    tokenizer = {"model": {"vocab": pieces, "merges": []}, "padding": {"pad_id": 1, "pad_token": "<|endoftext|>"}}
    return CLIPConditioner(text_config=config, tokenizer=tokenizer, length=6)


BOXES = [torch.tensor([[1.0, 0, 0, 1, 1]]), torch.zeros(0, 5)]
# what makes a conditioner, a batch on the device, the shape of what it says, and what is copied to the device
CONDITIONERS: dict[str, tuple[Callable[[], Conditioner], Callable[[FakeGPU], dict], tuple, list]] = {
    "class": (lambda: ClassConditioner(5, 8), lambda gpu: {"class": gpu.integers(2, below=5)}, (2, 1, 8), []),
    "class, vector": (
        lambda: ClassConditioner(5, 8, slot="vector"),
        lambda gpu: {"class": gpu.integers(2, below=5)},
        (2, 8),
        [],
    ),
    "class, a list": (lambda: ClassConditioner(5, 8), lambda gpu: {"class": [1, 4]}, (2, 1, 8), [(2,)]),
    "attributes": (
        lambda: AttributesConditioner(3, 8),
        lambda gpu: {"attributes": gpu.randn(2, 3)},
        (2, 3, 8),
        [],
    ),
    "layout": (lambda: LayoutConditioner(4, 3, 4, 16, 1), lambda gpu: {"boxes": BOXES}, (2, 9, 16), [(2, 9)]),
    "clip": (clip, lambda gpu: {"caption": ["a", "b c"]}, (2, 6, 16), [(2, 6)]),
    "low resolution": (
        lambda: MapConditioner("low_resolution", factor=2, has_null=True),
        lambda gpu: {"low_resolution": gpu.randn(2, 3, 8, 8)},
        (2, 3, 4, 4),
        [],
    ),
    "segmentation": (
        lambda: MapConditioner("segmentation", classes=4, factor=2, out_channels=3),
        lambda gpu: {"segmentation": gpu.integers(2, 8, 8, below=4)},
        (2, 3, 4, 4),
        [],
    ),
    "depth": (
        lambda: MapConditioner("depth", channels=1, per_image=True),
        lambda gpu: {"depth": gpu.randn(2, 1, 8, 8)},
        (2, 1, 8, 8),
        [],
    ),
    "inpainting": (
        lambda: InpaintingConditioner(AutoencoderVQ(channels=32, multipliers=(1, 2), blocks=1, num_codes=16)),
        lambda gpu: {"image": gpu.randn(2, 3, 16, 16), "mask": gpu.randn(2, 1, 16, 16)},
        (2, 4, 8, 8),
        [],
    ),
}


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_conditioner(gpu, kind):
    make, batch, shape, copies = CONDITIONERS[kind]
    conditioner = gpu.put(make())
    given = batch(gpu)
    gpu.uploads.clear()
    cond = conditioner(given)
    (slot,) = cond.slots().values()
    check(slot, *shape)
    assert [copy.shape for copy in gpu.uploads] == copies
    if null := conditioner.null(2).slots():
        (slot,) = drop(cond, Condition(**null), 0.1, gpu.randn(2)).slots().values()
        check(slot, *shape)


def test_drop(gpu):
    conditioner, u = text_conditioner(gpu), gpu.randn(2)
    cond, null = conditioner(["a cube", "cube"]), conditioner.null()
    gpu.uploads.clear()
    check(drop(cond, null, 0.1, u).context, 2, 6, 24)
    assert gpu.uploads == []


@pytest.mark.parametrize("interval", [None, (200, 600)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance(gpu, scale, interval):
    unet = small_unet(gpu, context_dim=24)
    guided = Guidance(unet, condition(gpu, unet, 1), scale, interval=interval)
    check(guided(gpu.randn(2, 4, 8, 8), gpu.integers(2, below=LEVELS), condition(gpu, unet)), 2, 4, 8, 8)
    assert gpu.uploads == []


# --- Samplers ---

WALKS = {name: (sampler, {}) for name, sampler in SAMPLERS.items()} | {"ddim, eta": (ddim, {"eta": 1.0})}


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("walk", WALKS)
def test_sampler(gpu, walk, seeded):
    unet, schedule = small_unet(gpu), NoiseSchedule()
    sampler, options = WALKS[walk]
    noise = SeededNoise([1, 2]) if seeded else None
    steps = list(sampler(unet, gpu.randn(2, 4, 8, 8), schedule, steps=3, noise=noise, **options))
    assert len(steps) == 3
    for step in steps:
        check(step.x, 2, 4, 8, 8)
        check(step.x0, 2, 4, 8, 8)
    # two tables of the schedule, and the noise of every step but the last, where there is any
    draws = 2 if seeded and walk in ("ddpm", "ddim, eta") else 0
    assert sorted(copy.shape for copy in gpu.uploads) == draws * [(2, 4, 8, 8)] + 2 * [(LEVELS,)]
    assert {copy.dtype for copy in gpu.uploads} == {torch.float32}, "MPS has no float64, so a table is cast first"


def test_a_denoiser_that_reads_a_number_is_caught(gpu):
    def denoise(x: Tensor, t: Tensor, cond: object) -> Tensor:
        return x * x.abs().max().item()

    with pytest.raises(HostSync):
        last(ddim(denoise, gpu.randn(2, 4, 8, 8), NoiseSchedule(), steps=3))
    with pytest.raises(HostSync):
        diffusion_loss(denoise, NoiseSchedule(), gpu.randn(2, 3), gpu.integers(2, below=LEVELS), gpu.randn(2, 3))


def test_a_table_that_stays_on_the_cpu_is_caught(gpu):
    schedule, t = NoiseSchedule(), gpu.integers(2, below=LEVELS)
    with pytest.raises(RuntimeError, match="device"):
        schedule.alpha.float().index_select(0, t) * gpu.randn(2)
    with pytest.raises(LDMError, match="t is on cpu, but x on cuda:0"):
        small_unet(gpu)(gpu.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["kl", "vq", "identity"])
def test_a_whole_model_draws(gpu, kind, sampler):
    stage = first_stage(gpu, kind)
    conditioner = text_conditioner(gpu)
    unet = small_unet(gpu, stage.latent_channels, context_dim=24)
    model = LatentDiffusion(stage, unet, NoiseSchedule(), conditioner, size=16)
    check(model.sample(["a cube", "cube"], steps=3, sampler=sampler), 2, 3, 16, 16)
    more = dict(steps=2, sampler=sampler, batch_size=2, interval=(200, 600), negative="a", spacing="leading", end=0)
    check(model.sample(["a cube", "cube", "a"], **more), 3, 3, 16, 16)


def test_an_unconditional_model_draws(gpu):
    model = LatentDiffusion(first_stage(gpu, "kl"), small_unet(gpu), NoiseSchedule(), size=16)
    check(model.sample(n=2, steps=3, eta=0.5), 2, 3, 16, 16)


# --- Evaluation ---


@pytest.mark.parametrize(("metric", "copies"), [(psnr, []), (ssim, [(11,)])])
def test_metric(gpu, metric, copies):
    check(metric(gpu.randn(2, 3, 16, 16), gpu.randn(2, 3, 16, 16)), 2)
    assert [copy.shape for copy in gpu.uploads] == copies  # ssim's window


def test_reader(any_gpu):
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(3)]
    targets = {name: any_gpu.put(value) for name, value in reader_targets(scenes).items()}
    reader, images = any_gpu.put(SceneReader((16, 16, 16))), any_gpu.randn(3, 3, 64, 64)
    spoiled = augment(images, any_gpu.randn(3, 2), any_gpu.randn(3, 3, 64, 64))
    reading = reader(spoiled)
    assert any_gpu.holds(reading.segmentation) and reading.segmentation.shape == (3, 4, 64, 64)
    loss, terms = reader_loss(reading, targets)
    check_backward(loss, reader)
    assert all(map(any_gpu.holds, terms.values())) and any_gpu.uploads == []
