"""How fast is a step, held against diffusers? Everything that is compared takes turns in one run.

    python benchmarks/speed.py                     # all pieces, about 25 minutes
    python benchmarks/speed.py --only unet         # one piece, less than 9 minutes

unet, first_stage: our networks and diffusers' with the same weights, in fp32, after a check that they predict the same.
text, unconditional: our training loop with its defaults and the loops of two example scripts of diffusers with theirs,
on networks of the same shape. The way from one to the other is a ladder: each rung changes one thing.
pixels: the unconditional script at 64² pixels, and our loop on the latents of the same images.
shares: where the time of a training step goes, by PyTorch's profiler.

Writes ldm_edu/results/speed.json and benchmarks/speed.md. A piece replaces its own numbers; those of the others are
kept if machine, threads, versions, commit and settings are the same, for else they do not belong into one table.
"""

import argparse
import copy
import itertools
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.nn.functional as F
from common import (
    CLOCKS,
    QUICK,
    Pace,
    again_and_again,
    columns,
    equal,
    given,
    is_installed,
    merged,
    our_walk,
    ours_predicts,
    randomised,
    ratios,
    settled,
    side_by_side,
    their_walk,
    theirs_predicts,
    training_step,
    twin,
    without_key,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ldm_edu.conditioning.text import TextConditioner
from ldm_edu.denoiser.unet import UNet
from ldm_edu.first_stage.autoencoder import AutoencoderKL, FirstStage
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.measurements import Measurement, Measurements, load_measurements, measured_here
from ldm_edu.training import DiffusionStage, RunOptions, open_run, optimise
from ldm_edu.training.dispatch import saved_first_stage
from ldm_edu.training.loop import StepResult
from ldm_edu.training.recipes import TOY_TEXT2IMAGE, Recipe
from ldm_edu.training.run import RunAccelerator, make_accelerator
from ldm_edu.training.state import make_state

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "ldm_edu" / "results" / "speed.json"
SCRIPT = "the script"  # what the rungs of a ladder are divided by


@dataclass(frozen=True)
class Options:
    """How a piece is measured."""

    pace: Pace
    batch: int = 16  # of the training loops: the default of both scripts
    smallest: bool = False  # tiny networks, for a test


# Equal networks ------------------------------------------------------------------------------------------------------


def unets(smallest: bool) -> dict[str, tuple[UNet, int, int]]:
    """Name: network, batch, height and width of its latents."""
    if smallest:
        tiny: dict[str, Any] = dict(channels=32, multipliers=(1,), blocks=1, attention_factors=(1,))
        return {"text": (UNet(context_dim=8, **tiny), 2, 4), "without a condition": (UNet(**tiny), 2, 4)}
    return {
        "toy-text2image, 8×8×4": (LatentDiffusion.from_pretrained("toy-text2image").unet, 32, 8),
        "celeba64, 8×8×4": (UNet(4, 4, 64, (1, 2), 1, (1, 2)), 64, 8),
        "128 wide, three levels, 16×16×3": (UNet(3, 3, 128, (1, 2, 3), 2, (2, 4)), 4, 16),
    }


def unet(options: Options) -> Iterator[Measurement]:
    """A training step and a sampling step of equal UNets."""
    for name, (ours, batch, side) in unets(options.smallest).items():
        of = {"piece": "unet", "network": name}
        randomised(ours)
        theirs, g = twin(ours), given(ours, batch, side)
        with torch.no_grad():
            yield equal(ours_predicts(ours, g)(), theirs_predicts(theirs, g)(), of | {"step": "prediction"})
        some = given(ours, max(1, batch // 4), side)
        how = "sampling, guided" if ours.context_dim else "sampling"
        for network in (ours, theirs):
            network.eval()
        pairs = zip(itertools.islice(our_walk(ours, some), 3), their_walk(theirs, some))
        yield equal(*list(pairs)[-1], of | {"step": how})
        steps = {
            "ours": again_and_again(lambda: our_walk(ours, some)),
            "diffusers": again_and_again(lambda: their_walk(theirs, some)),
        }
        yield from ratios(side_by_side(steps, options.pace), "diffusers", of | {"step": how, "batch": len(some.x)})
        steps = {
            "ours": training_step(ours, ours_predicts(ours, g), g.noise),
            "diffusers": training_step(theirs, theirs_predicts(theirs, g), g.noise),
        }
        yield from ratios(side_by_side(steps, options.pace), "diffusers", of | {"step": "training", "batch": batch})


def first_stages(smallest: bool) -> dict[str, tuple[AutoencoderKL, int, int]]:
    """Name: network, batch, height and width of its images."""
    if smallest:
        return {"tiny": (AutoencoderKL(8, (1, 2), 1, 2, groups=4), 2, 8)}
    shipped = cast(AutoencoderKL, LatentDiffusion.from_pretrained("toy-text2image").first_stage)
    return {"toy-text2image, f = 8": (shipped, 16, 64), "128 wide, f = 8 (83.7M)": (AutoencoderKL(), 1, 64)}


@torch.no_grad()
def first_stage(options: Options) -> Iterator[Measurement]:
    """Encoding and decoding by equal first stages."""
    for name, (ours, batch, side) in first_stages(options.smallest).items():
        theirs, x = (
            twin(ours.eval()).eval(),
            torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)),
        )
        x, scale = 2 * x - 1, ours.scale_factor
        z = ours.encode(x)
        pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "encoding": (lambda: ours.encode(x), lambda: scale * theirs.encode(x).latent_dist.mode()),
            "decoding": (lambda: ours.decode(z), lambda: theirs.decode(z / scale, return_dict=False)[0]),
        }
        for step, (our, their) in pairs.items():
            of = {"piece": "first_stage", "network": name, "step": step}
            yield equal(our(), their(), of)
            times = side_by_side({"ours": our, "diffusers": their}, options.pace)
            yield from ratios(times, "diffusers", of | {"batch": batch})


# Training loops ------------------------------------------------------------------------------------------------------


def recipe_of(options: Options, text: bool) -> Recipe:
    """toy-text2image, or the same without text, on few images and with batches of another size."""
    what, size = TOY_TEXT2IMAGE.diffusion, {"channels": 32, "multipliers": (1, 1), "attention_factors": ()}
    n, batch = (16, 4) if options.smallest else (512, options.batch)
    training = replace(what.training, batch_size=batch, images=n, held_out=batch)
    diffusion = replace(what, training=training, **(size if options.smallest else {}))
    if not text:
        diffusion = replace(diffusion, conditioners=())
    return replace(TOY_TEXT2IMAGE, text=None, diffusion=diffusion, pretrained="toy-text2image")


class Encodes(nn.Module):
    """A task that encodes the images of a batch in every step."""

    def __init__(self, task: nn.Module, stage: FirstStage):
        super().__init__()
        self.task, self.hidden = task, (stage,)  # in a tuple: its weights are not trained

    def forward(self, batch: dict[str, Any]) -> Any:
        """The loss on the latents of the batch's images."""
        with torch.no_grad():
            stage = self.hidden[0]
            z = stage.latent(stage.posterior(batch["image"]), batch["latent_noise"]).float()
        return self.task({**batch, "z": z})


class EncodingStage(DiffusionStage):
    """Our stage, but images are encoded in every step, as if no latents were kept."""

    def __init__(self, recipe: Recipe, run: Any, made: Any):
        super().__init__(recipe, run, made)
        self.unwrapped, self.task = self.task, Encodes(self.task, self.first_stage)

    def samples(self, dataset: Any, step: int, indices: Sequence[int], repeats: Any = None) -> dict[str, Any]:
        """The batch with images."""
        return super().samples(dataset, step, indices, repeats) | {"image": dataset.images(list(indices))}


class Loop:
    """Our training loop, a step with each call. A step ends when the batch that it has ordered is there, too."""

    AHEAD = 2  # batches that `prefetch` makes ahead

    def __init__(self, stage: DiffusionStage, start: Callable[[], Iterator[StepResult]]):
        self.stage, self.made, make = stage, 0, stage.batch

        def counted(step: int) -> dict[str, Any]:
            batch = make(step)
            self.made += 1
            return batch

        stage.batch = counted  # type: ignore[method-assign]
        self.walk = start()

    def __call__(self) -> None:
        result = next(self.walk)
        while self.made < result.step + self.AHEAD:
            time.sleep(0.0002)


def number_format(network: nn.Module, run: Callable[[], Any]) -> str:
    """In which format the first convolution of a network computes during a step."""
    conv, seen = next(m for m in network.modules() if isinstance(m, nn.Conv2d)), []
    handle = conv.register_forward_hook(lambda layer, taken, out: seen.append(str(out.dtype).removeprefix("torch.")))
    run()
    handle.remove()
    return seen[0]


@contextmanager
def our_loop(
    recipe: Recipe,
    folder: Path,
    precision: str | None,  # None: our default
    encodes: bool,  # the images in every step?
    fused: bool,  # AdamW in one kernel?
) -> Iterator[tuple[Loop, DiffusionStage]]:
    """Our loop with all of its defaults but for these three."""
    name = f"{precision}-{encodes}-{fused}"
    options = RunOptions(device="cpu", precision=precision, cache_dir=folder / "cache", sample_every=0)
    run = open_run(recipe, folder / name, options)
    try:
        made = {"first_stage": saved_first_stage(recipe)}
        stage = (EncodingStage if encodes else DiffusionStage)(recipe, run, made)
        state, task, optimizer = make_state(run, stage)
        if not fused:
            how = recipe.diffusion.training
            plain = torch.optim.AdamW(
                stage.task.parameters(), how.lr, betas=how.betas, weight_decay=how.weight_decay, fused=False
            )
            optimizer = run.accelerator.prepare(plain)
        loop = Loop(stage, lambda: optimise(stage, run.accelerator, task, optimizer, state.ema))
        yield loop, stage
        cast(Any, loop.walk).close()
    finally:
        run.close()


@dataclass(frozen=True)
class Script:
    """The defaults of an example script of diffusers that cost time."""

    rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    schedule: str = "constant"  # of the learning rate


TEXT_SCRIPT = Script()  # train_text_to_image.py
UNCONDITIONAL_SCRIPT = Script(betas=(0.95, 0.999), weight_decay=1e-6, schedule="cosine")  # train_unconditional.py


def script_loop(
    accelerator: RunAccelerator,
    unet: nn.Module,
    data: Sequence[Tensor],
    batch_size: int,
    how: Script,
    loss_of: Callable[..., Tensor],  # (the prepared UNet, tensors of a batch) -> loss
) -> Iterator[float]:
    """The loop that both scripts share: accelerate, AdamW as PyTorch has it, clipping, the loss read in every step."""
    from diffusers.optimization import get_scheduler
    from torch.utils.data import DataLoader, TensorDataset

    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=how.rate, betas=how.betas, weight_decay=how.weight_decay, eps=1e-8
    )
    loader = DataLoader(TensorDataset(*data), batch_size=batch_size, shuffle=True)
    rates = get_scheduler(how.schedule, optimizer, num_warmup_steps=500, num_training_steps=100_000)
    network, stepper, batches, rates = accelerator.prepare(unet.train(), optimizer, loader, rates)
    while True:
        for tensors in batches:
            with accelerator.accumulate(network):
                loss = loss_of(network, *tensors)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
                stepper.step()
                rates.step()
                stepper.zero_grad()
            yield loss.detach().item()


def their_noise() -> Any:
    """The schedule of the recipe, as diffusers has it for training."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def noisy(noise_schedule: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the network is given, its timesteps, and what it should predict."""
    noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
    return noise_schedule.add_noise(x, noise, t), t, noise_schedule.get_velocity(x, noise, t)


def text_encoder(conditioner: TextConditioner) -> nn.Module:
    """A frozen CLIPTextModel of the width, depth and length of our text conditioner, as far as names allow."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ours = conditioner.transformer
    rows, dim = ours.tokens.weight.shape
    heads, depth = conditioner.config["heads"], conditioner.config["depth"]
    config = CLIPTextConfig(
        vocab_size=rows,
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=conditioner.config["length"],
        bos_token_id=None,
        eos_token_id=0,  # only where a caption is made one vector, which nobody asks for
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


def text_script(stage: DiffusionStage, unet: nn.Module, batch_size: int) -> Iterator[float]:
    """train_text_to_image.py: images and captions are encoded in every step, and the loss is read twice."""
    accelerator, conditioner = make_accelerator("cpu", "fp32"), cast(TextConditioner, stage_task(stage).conditioner)
    vae, text, noise = twin(stage.first_stage).eval().requires_grad_(False), text_encoder(conditioner), their_noise()
    captions = [texts[0] for texts in stage.train_data.column("captions")]
    images, ids = stage.train_data.images(range(len(captions))), conditioner.tokenizer(captions)

    def loss_of(network: nn.Module, pixels: Tensor, words: Tensor) -> Tensor:
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        x, t, target = noisy(noise, latents)
        tokens = text(words, return_dict=False)[0]
        loss = F.mse_loss(network(x, t, tokens, return_dict=False)[0].float(), target.float())
        cast(Tensor, accelerator.gather(loss.repeat(batch_size))).mean().item()
        return loss

    return script_loop(accelerator, unet, (images, ids), batch_size, TEXT_SCRIPT, loss_of)


def unconditional_script(x: Tensor, unet: nn.Module, batch_size: int) -> Iterator[float]:
    """train_unconditional.py on tensors: its loop is one over images, but asks for no number of channels or size."""
    accelerator, noise = make_accelerator("cpu", "fp32"), their_noise()

    def loss_of(network: nn.Module, clean: Tensor) -> Tensor:
        given_to, t, target = noisy(noise, clean)
        return F.mse_loss(network(given_to, t, return_dict=False)[0].float(), target.float())

    return script_loop(accelerator, unet, (x,), batch_size, UNCONDITIONAL_SCRIPT, loss_of)


def stage_task(stage: DiffusionStage) -> Any:
    """The task with UNet and conditioner, whatever is around it."""
    return getattr(stage, "unwrapped", stage.task)


Rung = tuple[str | None, bool, bool]  # precision, encodes in every step, fused AdamW: see `our_loop`
TEXT_RUNGS: dict[str, Rung] = {
    "1. as the script: fp32, encoding in every step, AdamW weight by weight": ("fp32", True, False),
    "2. and the precision that our loop picks": (None, True, False),
    "3. and latents encoded once": (None, False, False),
    "4. and fused AdamW: all of our defaults": (None, False, True),
}
UNCONDITIONAL_RUNGS: dict[str, Rung] = {
    "1. as the script: fp32, AdamW weight by weight": ("fp32", False, False),
    "2. and the precision that our loop picks": (None, False, False),
    "3. and fused AdamW: all of our defaults": (None, False, True),
}


def ladder(
    piece: str,
    options: Options,
    recipe: Recipe,
    rungs: dict[str, Rung],
    script: Callable[[DiffusionStage, nn.Module, int], Iterator[float]],
) -> Iterator[Measurement]:
    """Every rung of our loop, divided by the script's in the same round."""
    batch = recipe.diffusion.training.batch_size
    with TemporaryDirectory() as folder, ExitStack() as stack:
        made = {name: stack.enter_context(our_loop(recipe, Path(folder), *rung)) for name, rung in rungs.items()}
        loops: dict[str, Callable[[], Any]] = {}
        for name, (loop, stage) in made.items():
            found = number_format(stage_task(stage).unet, loop)
            loops[f"{name}, {found}" if name.endswith("picks") else name] = loop
        stage = next(iter(made.values()))[1]
        network: UNet = randomised(copy.deepcopy(stage_task(stage).unet))
        unet, g = twin(network), given(network, 2, recipe.size // recipe.first_stage.f)
        with torch.no_grad():
            same = ours_predicts(network, g)(), theirs_predicts(unet, g)()
        yield equal(*same, {"piece": piece, "network": "UNet"})
        loops[SCRIPT] = walk_of(script(stage, unet, batch))
        number_format_checked(unet, loops[SCRIPT])
        yield from ratios(side_by_side(loops, options.pace), SCRIPT, {"piece": piece, "batch": batch}, "loop")


def walk_of(walk: Iterator[Any]) -> Callable[[], Any]:
    """One item of an endless iterator with each call."""
    return lambda: next(walk)


def number_format_checked(network: nn.Module, run: Callable[[], Any]) -> None:
    """SystemExit where a script does not compute in fp32, although it should."""
    if (found := number_format(network, run)) != "float32":
        raise SystemExit(f"the script should compute in float32, not {found}")


def text(options: Options) -> Iterator[Measurement]:
    """Our loop and that of train_text_to_image.py, at 64² pixels."""
    yield from ladder("text", options, recipe_of(options, True), TEXT_RUNGS, text_script)


def latents_of(stage: DiffusionStage) -> Tensor:
    """The means of the training images' latents, scaled."""
    return stage.first_stage.scale_factor * stage.latents[stage.train_data][0]


def unconditional(options: Options) -> Iterator[Measurement]:
    """Our loop and that of train_unconditional.py, both on the same latents."""

    def script(stage: DiffusionStage, unet: nn.Module, batch: int) -> Iterator[float]:
        return unconditional_script(latents_of(stage), unet, batch)

    recipe = recipe_of(options, False)
    yield from ladder("unconditional", options, recipe, UNCONDITIONAL_RUNGS, script)


def pixels(options: Options) -> Iterator[Measurement]:
    """train_unconditional.py on pixels, our loop on latents of the same images: UNets of the same widths and depth."""
    recipe = recipe_of(options, False)
    batch, pace = recipe.diffusion.training.batch_size, replace(options.pace, least=3, warmup=1)
    with TemporaryDirectory() as folder, our_loop(recipe, Path(folder), None, False, True) as (loop, stage):
        network = stage_task(stage).unet
        unet = twin(UNet(**network.config | {"in_channels": 3, "out_channels": 3}))
        images = stage.train_data.images(range(len(stage.train_data)))
        loops = {"our defaults": loop, SCRIPT: walk_of(unconditional_script(images, unet, batch))}
        yield from ratios(side_by_side(loops, pace), SCRIPT, {"piece": "pixels", "batch": batch}, "loop")


# Where time goes -----------------------------------------------------------------------------------------------------

PARTS = {  # part: names of operators; the first that fits counts
    "convolutions": r"convolution|conv2d",
    "attention": r"scaled_dot_product|bmm|softmax",
    "linear layers": r"addmm|aten::mm$|linear|matmul",
    "norms": r"group_norm|layer_norm|GroupNorm|LayerNorm",
    "activations": r"silu|gelu",
    "optimiser": r"adamw|Optimizer",
    "copies": r"copy|aten::cat|clone|contiguous|aten::to$|fill_|zero|pad|upsample",
    "sums and products": r"aten::(add|sub|mul|div|sum|mean|pow|neg|rsub|square)_?$|mse_loss",
}


def part_of(operator: str) -> str:
    """The part of a step that an operator belongs to."""
    return next((part for part, names in PARTS.items() if re.search(names, operator)), "all else")


def shares_of(step: Callable[[], Any], steps: int) -> tuple[Counter, float]:
    """Milliseconds a step by part, and of all together."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    spent: Counter = Counter()
    for event in found.key_averages():
        spent[part_of(event.key)] += event.self_cpu_time_total / 1000 / steps
    return spent, spent.total()


def shares(options: Options) -> Iterator[Measurement]:
    """A training step of the UNet of toy-text2image, in fp32 and in bf16."""
    name, (network, batch, side) = next(iter(unets(options.smallest).items()))
    g = given(network, batch, side)
    steps = 2 if options.smallest else 20
    for precision in ("fp32", "bf16"):

        def predict() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return network(g.x, g.t, g.cond())

        spent, total = shares_of(training_step(network, predict, g.noise), steps)
        of = {"piece": "shares", "network": name, "batch": batch, "precision": precision}
        yield Measurement("time of a step", total, of=of | {"part": "all"}, unit="ms", n=steps)
        for part in (*PARTS, "all else"):
            yield Measurement("share", 100 * spent[part] / total, of=of | {"part": part}, unit="%", n=steps)


# The command ---------------------------------------------------------------------------------------------------------

PIECES: dict[str, Callable[[Options], Iterator[Measurement]]] = {
    "unet": unet,
    "first_stage": first_stage,
    "text": text,
    "unconditional": unconditional,
    "pixels": pixels,
    "shares": shares,
}
ABOUT = (
    "A ratio is ours / theirs; below 1 we are faster. In a round everything that is compared takes its turn, in an "
    "order that changes from round to round, and a ratio is taken within a round: its median, with the 95 % interval "
    "of the median from a bootstrap over n rounds, and the quartiles of all rounds. "
)
TOLD = {
    "unet": "Equal UNets with equal weights in fp32, which predict the same (`largest difference`, relative). "
    "*Training*: forward, mean squared error, backward, a step of fused AdamW for both. *Sampling*: a step of DDIM, "
    "where there is a condition with guidance in a doubled batch: our `ddim` and `Guidance`, and what the pipelines of "
    "diffusers do with their `DDIMScheduler`.",
    "first_stage": "Equal first stages with equal weights in fp32, without gradients, images of 64² pixels. *Encoding* "
    "is to the mean of the latent, *decoding* from it.",
    "text": "The loop of diffusers' `train_text_to_image.py` with its defaults, and ours. Equal: 64² pixels, batch, "
    "images, the UNet and the first stage with their weights, width and depth of the text encoder, the noise schedule. "
    "The script: fp32, since its `--mixed_precision` is unset; images and captions encoded in every step; a frozen "
    "text encoder; AdamW with PyTorch's default, which on a CPU goes weight by weight; no moving average. Ours, on "
    "every rung: the text encoder is trained, a moving average is kept, and noise is drawn for each sample by itself: "
    "work that the script does not do. Not counted: reading and resizing of image files, which the script does in "
    "every step and we once.",
    "unconditional": "The loop of diffusers' `train_unconditional.py` with its defaults (fp32, no moving average, "
    "AdamW weight by weight), and ours. To compare loops and nothing else, the script is given the same latents, "
    "8×8×4, that ours learns from; the UNets are equal. No rung encodes anything.",
    "pixels": "The same script as its authors meant it, on pixels, 64×64×3, and our loop with its defaults on latents, "
    "8×8×4, of the same images. The UNets have the same widths and depth, and so the same number of weights but for "
    "the first and the last convolution. What is seen here is the paper's saving, a map of 64 times fewer places, and "
    "not that of the loop; once for each image the first stage has encoded it, which is not counted.",
    "shares": "A training step (as in `unet`, ours alone) by PyTorch's profiler, which itself takes time. A share is "
    "of the time inside operators.",
}
SOURCES = (
    "The defaults of the scripts were read in public copies of them, the newest at hand: train_unconditional.py of "
    '0.36.0.dev0 (`--mixed_precision "no"`, `--use_ema` off, batch 16, 64² pixels, AdamW with betas 0.95 and 0.999), '
    "train_text_to_image.py of 0.30.0.dev0 (`--mixed_precision` unset, so accelerate's own, which is none; `--use_ema` "
    "and `--gradient_checkpointing` off; batch 16; AdamW with betas 0.9 and 0.999). Both clip gradients to norm 1 and "
    "read the loss in every step. Networks, schedules and `get_scheduler` are those of the diffusers that is named "
    "with the versions. Attention there is PyTorch's scaled_dot_product_attention, as it is here in fp32."
)
NAMES = ("ratio", "lower quartile", "upper quartile", "time of ours", "time of diffusers", f"time of {SCRIPT}")


def page(found: Measurements) -> str:
    """The tables as Markdown."""
    lines = ["# How fast is a step?", "", f"{found.source()}.", "", found.about, "", SOURCES]
    for piece in (name for name in PIECES if name in found.keys("piece")):
        some = without_key(found.of(piece=piece), "piece")
        timed = columns(some, (*NAMES, "share", "time of a step"))
        lines += ["", f"## {piece}", "", TOLD[piece], "", some.table(timed)]
        if far := [m.value for m in some.of("largest difference")]:
            lines += ["", f"Predictions differ by at most {max(far):.1g} of the largest number."]
    return "\n".join(lines) + "\n"


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PIECES), default=list(PIECES), help="these pieces")
    parser.add_argument("--seconds", type=float, default=45.0, help="of one comparison, about")
    parser.add_argument("--batch", type=int, default=16, help="of the training loops")
    parser.add_argument("--threads", type=int, default=1, help="that torch computes with, and processors")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="processor: where others compute, too")
    parser.add_argument("--smallest", action="store_true", help="tiny networks and three rounds: a test of this script")
    parser.add_argument("--out", type=Path, default=HERE / "speed.md", help="the tables")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the same numbers, for a page")
    return parser.parse_args(argv)


def command_of(options: argparse.Namespace) -> str:
    """The command that measures all pieces like this."""
    told = f"python benchmarks/speed.py --threads {options.threads} --seconds {options.seconds:g}"
    told += f" --batch {options.batch}" * (options.batch != 16) + " --smallest" * options.smallest
    return told + f" --clock {options.clock}" * (options.clock != "wall")


def keep(new: Measurements, results: Path, out: Path) -> Measurements:
    """Write a piece's numbers beside those of the others, and the tables of all."""
    found, order = merged(load_measurements(results) if results.exists() else None, new), list(PIECES)
    found = replace(found, numbers=tuple(sorted(found, key=lambda m: order.index(str(m.of["piece"])))))
    found.save(results)
    out.write_text(page(found), encoding="utf-8")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the pieces that are asked for, and write what there is."""
    args = parsed(argv)
    if not is_installed("diffusers"):
        print("benchmarks/speed.py needs diffusers: pip install diffusers", file=sys.stderr)
        return 2
    clock = CLOCKS[args.clock]
    pace = replace(QUICK, clock=clock) if args.smallest else Pace(seconds=args.seconds, clock=clock)
    options = Options(pace, args.batch, args.smallest)
    with settled(args.threads, pin=not args.smallest) as told:
        for name in args.only:
            began = time.monotonic()
            torch.manual_seed(0)
            new = measured_here(
                title="Seconds of a step, against diffusers",
                numbers=PIECES[name](options),
                about=f"{ABOUT}Clock: {args.clock} time. {told}.",
                seed=0,
                packages=("diffusers", "accelerate", "transformers"),
                command=command_of(args),
            )
            found = keep(new, args.results, args.out)
            there = ", ".join(map(str, found.keys("piece")))
            print(f"{name}: {time.monotonic() - began:.0f} s; {args.results} has {there}")
            for number in new.of("ratio", "share"):
                print(f"  {number}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
