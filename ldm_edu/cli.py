"""`ldm-edu`: demonstration, recipes, training, sampling, evaluation and downloads without a notebook."""

import codecs
import errno
import importlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from typer.core import TyperGroup

from ldm_edu.start import let_ctrl_c_end
from ldm_edu.applications import (
    check_classes,
    class_numbers,
    map_parts,
    read_depth,
    read_mask,
    read_picture,
    read_segmentation,
    upscaling,
)
from ldm_edu.applications import draw as draw_maps
from ldm_edu.applications import inpaint as fill_holes
from ldm_edu.applications import upscale as upscale_images
from ldm_edu.basics import pick_device
from ldm_edu.checkpoints import PRETRAINED, checkpoint_path
from ldm_edu.checks import MOST_SEED, check_choice, check_count, check_number, shown
from ldm_edu.data.images import image_size
from ldm_edu.data.download import TERMS, accept_terms, check_request, download_celeba, download_coco, terms_accepted
from ldm_edu.data.registry import open_dataset
from ldm_edu.data.toy.captions import read_caption
from ldm_edu.data.toy.scenes import SEGMENTS
from ldm_edu.diffusion.sampling import SAMPLERS
from ldm_edu.display import grid, new_figure, save, to_pil
from ldm_edu.doctor import examine
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.report import (
    TIMES,
    VARIED,
    Drawing,
    Evaluation,
    KeptSamples,
    evaluation_title,
    find_evaluation,
    is_alike,
    scores,
    table,
)
from ldm_edu.evaluation.report import evaluate as evaluate_model
from ldm_edu.evaluation.extractors import EXTRACTORS
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.judge import READER_SIZE, SceneReader, Share, prompt_accuracy, reader_accuracy
from ldm_edu.evaluation.metrics import LPIPS
from ldm_edu.evaluation.prompts import captions_of, draw_captions
from ldm_edu.evaluation.reconstruction import score_first_stage
from ldm_edu.files import atomic, brief, load_json, place, printable, probe, reason, save_json, writing
from ldm_edu.first_stage.quantization import load_first_stage
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.measurements import Measurements
from ldm_edu.settings import load_settings
from ldm_edu.training.dispatch import train as train_recipe
from ldm_edu.training.overrides import as_overrides, with_overrides
from ldm_edu.training.recipes import RECIPES, AnyRecipe, Recipe, find_recipe, recipe_differences
from ldm_edu.training.run import RunOptions

__all__ = ["app"]


# --- What is printed, and where ---

# What is printed for a character that the output's code page lacks: one of Windows, for instance, into a file.
_PLAINER = {"²": "^2", "±": "+-", "…": "...", "–": "-", "−": "-", "×": "x", "’": "'"}


def _plainer(error: UnicodeError) -> tuple[str, int]:
    "The handler of characters that cannot be encoded: plainer ones, and where to go on."
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAINER.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error("ldm-edu", _plainer)


def _prepare_streams() -> None:
    "Streams that were closed become empty ones, and no character ends a command because it cannot be printed."
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ldm-edu")


def _mute(stream: Any) -> None:
    "What is still to be written to a stream goes nowhere, so that Python can end without an error."
    with suppress(OSError, ValueError):  # a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(text: str) -> None:
    "Print a line of a training, which does not end because nobody reads it or because the disk is full there."
    try:
        typer.echo(text)
    except OSError as error:
        _mute(sys.stdout)
        with suppress(OSError):
            typer.echo(f"ldm-edu: nothing more can be printed ({reason(error)}); the training goes on", err=True)


def _is_out_of_memory(error: Exception) -> bool:
    "Is this what Python, NumPy or torch raises where there is not enough memory?"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = "not enough memory|allocate memory|out of memory|bad_alloc"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE) is not None


def _explained(error: Exception) -> str | None:
    "What went wrong, in one line; None for an error that nobody expected, whose traceback is wanted."
    if isinstance(error, LDMError):
        return str(error)
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        return f"{error.filename or 'the output'} cannot be read or written: {reason(error)}"
    if _is_out_of_memory(error):
        return f"there is not enough memory for this: ask for fewer or smaller images at a time ({brief(error)})"
    return None


class _Commands(TyperGroup):
    "The commands; what a user can mend is printed as one line, with exit status 1, instead of a traceback."

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _prepare_streams()
        let_ctrl_c_end(at_once=False)
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> None:
        try:
            super().invoke(ctx)
        except Exception as error:
            told = _explained(error)
            if told is None:
                raise
            if isinstance(error, OSError) and error.filename is None:
                _mute(sys.stdout)
            with suppress(OSError):
                typer.secho(f"ldm-edu: {told}", fg="red", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(cls=_Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_show_locals=False)


def _show_version(wanted: bool) -> bool:
    "Print the version and stop, if that was asked for."
    if wanted:
        typer.echo(f"ldm-edu {version('ldm_edu')}")
        raise typer.Exit
    return wanted


def _import_error(error: BaseException) -> str:
    "Why a module could not be imported, in one line, with the place where that is not in the message itself."
    if isinstance(error, ImportError):
        return brief(error)
    told = f"{type(error).__name__}: {printable(str(error))[:300]}"
    if isinstance(error, SyntaxError):
        return told
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{told} ({last.filename}, line {last.lineno})"


@app.callback()
def about(
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import", help="module of your own to import first: its conditioners and recipes are known then"
        ),
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", help="print the version and stop", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    "Latent diffusion, rebuilt from the paper up: sample, train, evaluate, learn."
    if modules:
        sys.path.insert(0, "")  # a module in this folder
    for name in modules or ():
        if not all(part.isidentifier() for part in name.split(".")):
            raise LDMError(f"--import {name}: this is no name of a module; in Python it would follow `import`")
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # of whatever the module does
            raise LDMError(f"--import {name}: {_import_error(error)}") from error


Device = Annotated[str | None, typer.Option(help="auto, cuda, mps or cpu; default: `device` in settings.ini")]
DataDir = Annotated[Path | None, typer.Option(help="folder of the data sets; default: `data_dir` in settings.ini")]
Out = Annotated[Path, typer.Option(help="PNG file to write")]


def _chosen_device(name: str | None) -> torch.device:
    "The device of the option, else the one of the settings."
    return pick_device(name or load_settings().device)


def _png(out: Path) -> Path:
    "`out`, with its folder created; LDMError where the name does not end in .png, or where no file can be written."
    if out.suffix.lower() != ".png":
        raise LDMError(f"--out {out}: images are saved as PNG, so the name should end in .png")
    return probe(out)


# Upper limits. Beyond the first two, memory would run out before anything could be refused.
_MOST_IMAGES, _MOST_SIZE, _MOST_SCALE = 10_000, 2048, 1e4
_MOST_NUMBERS = 2**30  # of all images that are held at once: 4 GiB
_FRESH_SPLITS = ("validation", "test", "unseen_pairs")  # those that nothing is trained on


def _check_sampling(steps: int, scale: float = 1.0) -> None:
    "LDMError where these are no numbers to sample with."
    check_count("--steps", steps)
    check_number("--scale", scale, -_MOST_SCALE, _MOST_SCALE)


def _check_split(split: str) -> None:
    "LDMError for a split on which a model was trained, or that does not exist."
    if split not in _FRESH_SPLITS:
        raise LDMError(f"--split {split}: a model is judged by what it has not seen: {', '.join(_FRESH_SPLITS)}")


# --- Sampling ---


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="a recipe; all of its fields are then listed, as `ldm-edu train --set` takes them"),
    ] = None,
) -> None:
    "List the recipes that `ldm-edu train` accepts, or every field of one of them."
    if name is not None:
        typer.echo("\n".join(as_overrides(find_recipe(name))))
        return
    width = max(map(len, RECIPES))
    for recipe in RECIPES.values():
        typer.echo(f"{recipe.name:{width}s}  {recipe.about} ({recipe.steps:,} steps)")


@app.command()
def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="captions, each in quotes; none for a model without text")
    ] = None,
    model: Annotated[str, typer.Option(help="name of a shipped checkpoint, or a folder")] = "toy-text2image",
    n: Annotated[int | None, typer.Option(help="number of images, for one caption or for none")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
    scale: Annotated[float, typer.Option(help="guidance scale; 1 means no guidance")] = 3.0,
    seed: Annotated[int, typer.Option(help="seed of the first image; each further image has the next one")] = 0,
    sampler: Annotated[str, typer.Option(help=", ".join(SAMPLERS))] = "ddim",
    negative: Annotated[str | None, typer.Option(help="caption of what the images should go away from")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="images at a time; then each is the same to the bit in any company")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="pixels along each side; default: as in training")] = None,
    device: Device = None,
    out: Out = Path("sample.png"),
) -> None:
    "Sample images from a trained model, for captions where it takes any, and save them as one PNG."
    _check_sampling(steps, scale)
    count = len(prompts or ()) or 1 if n is None else check_count("--n", n, 1, _MOST_IMAGES)
    check_count("--seed", seed, 0, MOST_SEED + 1 - count)
    out = _png(out)
    diffusion = LatentDiffusion.from_pretrained(model).to(_chosen_device(device))
    captions = prompts[0] if prompts and len(prompts) == 1 else prompts or None
    more = {"negative": negative, "batch_size": batch_size, "size": size}
    images = diffusion.sample(captions, n, steps, scale, seed, sampler, show_progress=True, **more)
    save(images[0] if len(images) == 1 else grid(images), out)
    typer.echo(f"{len(images)} image{'s' * (len(images) > 1)} in {out}")


# --- Pictures of one's own ---

Model = Annotated[str, typer.Option(help="name of a shipped checkpoint, or a folder")]
Steps = Annotated[int, typer.Option(help="denoising steps")]
FirstSeed = Annotated[int, typer.Option(help="seed of the first image; each further image has the next one")]
Sampler = Annotated[str, typer.Option(help=", ".join(SAMPLERS))]
AtATime = Annotated[
    int | None, typer.Option(min=1, help="images at a time; then each is the same to the bit in any company")
]
_DRAWN_ONLY = (
    "the shipped models know only the drawn faces and scenes of the course; photographs need your own, --model FOLDER"
)


def _is_shipped(model: str) -> bool:
    "Is this one of the checkpoints that come with the package?"
    with suppress(LDMError):
        return checkpoint_path(model).resolve().is_relative_to(PRETRAINED.resolve())
    return False


_MOST_PIXELS = 2**20  # of a result: attention between all positions of its latent takes gigabytes then


def _check_result(file: Path, width: int, height: int, k: int = 1) -> None:
    "LDMError where the result for a picture, k times larger, would have too many pixels."
    if k * max(width, height) > _MOST_SIZE or k**2 * width * height > _MOST_PIXELS:
        larger = f", and would have {k * width} × {k * height}" * (k > 1)
        limit = f"the limit is {_MOST_SIZE} along a side and {_MOST_PIXELS:,} in all"
        raise LDMError(f"{file} has {width} × {height} pixels{larger}; {limit}: make it smaller, or cut it into parts")


def _readable_size(file: Path, out: Path) -> tuple[int, int]:
    "Width and height of a picture; LDMError where it is larger than any result, or where `out` would replace it."
    width, height = image_size(os.path.expanduser(file))
    _check_result(file, width, height)
    there = place(out)
    if there.exists() and there.samefile(os.path.expanduser(file)):
        raise LDMError(f"--out {out}: that is {file} itself, which would be replaced: choose another name")
    return width, height


def _check_drawing(steps: int, sampler: str, seed: int, n: int = 1, pixels: int = 1, scale: float = 1.0) -> None:
    "LDMError where these are no numbers to draw n images of so many pixels with."
    _check_sampling(steps, scale)
    check_choice("--sampler", sampler, SAMPLERS)
    check_count("--n", n, 1, min(_MOST_IMAGES, _MOST_NUMBERS // (3 * pixels)))
    check_count("--seed", seed, 0, MOST_SEED + 1 - n)


def _keep(images: Float[Tensor, "b 3 h w"], out: Path, model: str) -> None:
    "Save images as one PNG and say so."
    save(images[0] if len(images) == 1 else grid(images), out)
    height, width = images.shape[2:]
    typer.echo(f"{len(images)} image{'s' * (len(images) > 1)} of {width} × {height} pixels in {out}")
    if _is_shipped(model):
        typer.echo(_DRAWN_ONLY)


@app.command()
def upscale(
    file: Annotated[Path, typer.Argument(help="a small picture")],
    model: Model = "toy-super-resolution",
    steps: Steps = 50,
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    sampler: Sampler = "ddim",
    device: Device = None,
    out: Out = Path("upscaled.png"),
) -> None:
    """Make a picture larger, by a model that was trained for it, and save it as a PNG: the shipped model by 4.

    The shipped models know only the drawn faces and scenes of the course; photographs need your own, --model FOLDER.
    """
    _check_drawing(steps, sampler, seed)
    sides = _readable_size(file, out)
    out, picture = _png(out), read_picture(file)
    diffusion = LatentDiffusion.from_pretrained(model).to(_chosen_device(device))
    _, k = upscaling(diffusion)
    _check_result(file, *sides, k)
    how = {"steps": steps, "seed": seed, "sampler": sampler}
    _keep(upscale_images(diffusion, picture.to(diffusion.device), **how, show_progress=True), out, model)


@app.command()
def inpaint(
    file: Annotated[Path, typer.Argument(help="a picture")],
    mask: Annotated[Path, typer.Option(help="image file of the same size, black and white: white is filled anew")],
    model: Model = "toy-inpainting",
    n: Annotated[int, typer.Option("-n", "--n", help="number of fillings")] = 1,
    steps: Steps = 50,
    seed: FirstSeed = 0,
    sampler: Sampler = "ddim",
    batch_size: AtATime = None,
    device: Device = None,
    out: Out = Path("inpainted.png"),
) -> None:
    """Fill a part of a picture anew and save the result, or a grid of several, as one PNG; the rest stays as it is.

    The shipped models know only the drawn faces and scenes of the course; photographs need your own, --model FOLDER.
    """
    sides, others = _readable_size(file, out), _readable_size(mask, out)
    if sides != others:
        told = " and ".join(f"{path} has {w} × {h} pixels" for path, (w, h) in ((file, sides), (mask, others)))
        raise LDMError(f"--mask: {told}: a mask is as large as its picture")
    _check_drawing(steps, sampler, seed, n, sides[0] * sides[1])
    out, picture, hidden = _png(out), read_picture(file), read_mask(mask)
    diffusion = LatentDiffusion.from_pretrained(model).to(_chosen_device(device))
    how: dict[str, Any] = {"steps": steps, "seed": seed, "sampler": sampler, "batch_size": batch_size}
    _keep(fill_holes(diffusion, picture.expand(n, -1, -1, -1), hidden, **how, show_progress=True), out, model)


def _read_maps(diffusion: LatentDiffusion, segmentation: Path | None, depth: Path | None, shipped: bool) -> Any:
    "The maps in files, by their keys; LDMError names a file that the model cannot read."
    maps, part = {}, map_parts(diffusion).get("segmentation")
    if segmentation is not None:
        classes = part.classes if part is not None else None
        names = SEGMENTS if shipped and classes == len(SEGMENTS) else ()
        ids = read_segmentation(segmentation, "" if classes is None else class_numbers(classes, names))
        if classes is not None:
            check_classes(str(segmentation), ids, classes, names)
        maps["segmentation"] = ids.to(diffusion.device)
    if depth is not None:
        maps["depth"] = read_depth(depth).to(diffusion.device)
    return maps


@app.command()
def draw(
    caption: Annotated[str | None, typer.Argument(help="what the picture should show, in quotes")] = None,
    segmentation: Annotated[
        Path | None, typer.Option(help="image file, grey or with a palette, whose values are class ids")
    ] = None,
    depth: Annotated[
        Path | None, typer.Option(help="grey image file of 8 or 16 bits, or a TIFF of fractions: larger is farther")
    ] = None,
    model: Model = "toy-maps",
    n: Annotated[int, typer.Option("-n", "--n", help="number of images")] = 1,
    steps: Steps = 50,
    scale: Annotated[float, typer.Option(help="guidance scale; 1 means no guidance")] = 3.0,
    seed: FirstSeed = 0,
    sampler: Sampler = "ddim",
    batch_size: AtATime = None,
    device: Device = None,
    out: Out = Path("drawn.png"),
) -> None:
    """Draw from a segmentation, a depth map, a caption, or any of them together, and save the images as one PNG.

    The shipped models know only the drawn faces and scenes of the course; photographs need your own, --model FOLDER.
    """
    files = [file for file in (segmentation, depth) if file is not None]
    if caption is None and not files:
        raise LDMError("nothing says what to draw: give a caption, --segmentation FILE, --depth FILE, or several")
    pixels = [width * height for width, height in (_readable_size(file, out) for file in files)]
    _check_drawing(steps, sampler, seed, n, max(pixels, default=1), scale)
    out = _png(out)
    diffusion = LatentDiffusion.from_pretrained(model).to(_chosen_device(device))
    maps = _read_maps(diffusion, segmentation, depth, _is_shipped(model))
    how: dict[str, Any] = {"steps": steps, "scale": scale, "seed": seed, "sampler": sampler, "batch_size": batch_size}
    _keep(draw_maps(diffusion, maps, caption, n=n, **how, show_progress=True), out, model)


# --- Data ---


def _ask_for_terms(name: str, data_dir: Path, yes: bool) -> None:
    "Show the terms of a data set and ask, unless they were accepted before; LDMError where they are not accepted."
    if terms_accepted(name, data_dir):
        return
    typer.echo(TERMS[name])
    try:
        if not yes and not typer.confirm("Do you accept them?"):
            raise LDMError("nothing was downloaded")
    except typer.Abort:  # nobody is there to answer
        raise LDMError("nothing was downloaded: the terms need an answer; --yes accepts them") from None
    accept_terms(name, data_dir)


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="celeba or coco")],
    data_dir: DataDir = None,
    subset: Annotated[int | None, typer.Option(min=1, help="keep only this many images; default: all")] = None,
    split: Annotated[str | None, typer.Option(help="coco only: val2017 (the default) or train2017")] = None,
    panoptic: Annotated[bool, typer.Option(help="coco only: also the panoptic segmentation maps")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="accept the terms without being asked")] = False,
) -> None:
    "Download CelebA or COCO, or continue an interrupted download; then check and unpack it, whole or as a subset."
    check_request(name, split, panoptic)
    where = data_dir or load_settings().data_dir
    _ask_for_terms(name, where, yes)
    try:
        if name == "celeba":
            root = download_celeba(where, subset)
        else:
            root = download_coco(where, split or "val2017", subset, panoptic)
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on from here")
        raise typer.Exit(130) from None
    typer.echo(f"{name} is in {root}; `dataset = {name}` in settings.ini makes the notebooks use it")
    typer.echo(f"{root / 'downloads'} holds the downloaded files; a larger subset needs them, otherwise delete them")


# --- Training ---


def _typed(words: list[str]) -> list[str]:
    "The command that was typed, without `--resume`."
    return ["ldm-edu", *(word for word in words if word != "--resume")]


def _changes(named: AnyRecipe, chosen: AnyRecipe) -> list[str]:
    "The fields in which a recipe differs from the one that was named, a line each."
    changed = recipe_differences(named, chosen)
    width = max(map(len, changed), default=0)
    lines = [f"  {name:{width}s}  {shown(was)} -> {shown(now)}" for name, (was, now) in changed.items()]
    told = "with these changes:" if lines else "as it is: what is set has the same values there"
    return [f"recipe {named.name}, {told}", *lines]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a name that `ldm-edu recipes` lists")],
    out: Annotated[Path | None, typer.Option(help="folder of the run; default: runs/RECIPE")] = None,
    data_dir: DataDir = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="folder for prepared images, shared by all runs; default: DATA_DIR/cache")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="change a field of the recipe, such as diffusion.training.lr=1e-4; `ldm-edu recipes RECIPE` lists them;"
            " values are YAML: null, true, '[1,2,4]'; again for several, the last one of a field counts",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="continue the run in that folder")] = False,
    extend: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="continue the run in that folder, finished or not, until its last stage has done STEPS steps in all,"
            " more than planned; from here on, its learning rate is that of a stage planned with STEPS",
        ),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="upper limit of steps for each stage")] = None,
    device: Device = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16 or fp64; default: bf16 where the device is faster in it")
    ] = None,
    compile: Annotated[
        bool, typer.Option(help="compile the networks: a slower start, then often faster steps")
    ] = False,
    channels_last: Annotated[
        bool, typer.Option(help="keep images and weights in channels-last memory order: often faster on NVIDIA GPUs")
    ] = False,
    every: Annotated[int, typer.Option(min=1, help="steps between lines of the log")] = 100,
    sample_every: Annotated[
        int | None,
        typer.Option(min=0, help="steps between samples drawn into the folder's samples/; 0: never; default: a tenth"),
    ] = None,
    snapshot_every: Annotated[
        int | None,
        typer.Option(min=1, help="steps between models that are kept on the way, in the folder's snapshots/"),
    ] = None,
    tracker: Annotated[
        list[str] | None, typer.Option(help="log to this tracker too, if it is installed: tensorboard, wandb, …")
    ] = None,
) -> None:
    "Train a recipe: a diffusion model with its first stage, a first stage alone, the judge, or the toy features."
    named = find_recipe(recipe)
    chosen = with_overrides(named, set_ or [])
    if max_steps is not None:
        chosen = chosen.shortened(max_steps)
    settings = load_settings()
    out = place(out or Path("runs") / recipe)
    options = RunOptions(
        data_dir=place(data_dir or settings.data_dir),
        cache_dir=place(cache_dir or settings.data_dir / "cache"),
        weights_dir=settings.weights_dir,
        device=device or settings.device,
        precision=precision,
        resume=resume,
        extend=extend,
        every=every,
        sample_every=sample_every,
        snapshot_every=snapshot_every,
        compile=compile,
        channels_last=channels_last,
        trackers=tracker or (),
        log_fn=None if sys.stderr.isatty() else _say,
    )
    for line in _changes(named, chosen) if set_ else ():
        _say(line)
    began = time.monotonic()
    try:
        train_recipe(chosen, out, options)
    except KeyboardInterrupt as stopped:
        line = shlex.join([*_typed(sys.argv[1:]), "--resume"])
        _say(f"\n{stopped or 'stopped'}\nThis command continues the run:\n  {line}")
        raise typer.Exit(130) from None
    use = f": `ldm-edu sample --model {out / 'model'}` samples from it" if isinstance(chosen, Recipe) else ""
    _say(f"trained in {time.monotonic() - began:.0f} s, {out / 'model'}{use}")


# --- Evaluation ---


def _write_scores(folder: Path, found: Mapping[str, Any]) -> None:
    "Put scores into the provenance in a model's config.json, in place of earlier ones."
    config = load_json(folder / "config.json")
    before = config.get("provenance", config.pop("made", None)) or {}  # version 0.1.0 wrote it under the name "made"
    config["provenance"] = before | {"scores": dict(found)}
    save_json(config, folder / "config.json")


def _check_written(model: str) -> None:
    "LDMError where scores cannot be written into a model's config.json."
    config = place(model) / "config.json"
    if not config.is_file():
        raise LDMError(f"--write: {model} is no folder of a model on this machine")
    if place(model).resolve().is_relative_to(PRETRAINED.resolve()):
        raise LDMError(
            f"--write: {model} ships with the package, and shipped checkpoints are not changed: copy it first"
        )
    probe(config)


def _numbers_file(out: Path) -> Path:
    "`out`, with its folder created; LDMError where numbers cannot be written, or would replace what is no evaluation."
    if out.suffix.lower() != ".json":
        raise LDMError(f"--out {out}: numbers are saved as JSON, so the name should end in .json")
    if place(out).is_file() and find_evaluation(out) is None:
        raise LDMError(f"--out {out}: what stands there is no evaluation, and is not replaced: choose another name")
    return probe(out)


def _check_title(out: Path, title: str) -> None:
    "LDMError where an evaluation with another title stands at `out`."
    found = find_evaluation(out)
    if found is not None and found.title != title:
        told = f"--out {out}: what stands there is the evaluation '{printable(found.title)}', and is not replaced"
        raise LDMError(f"{told}: choose another name")


def _free_file(first: Path, measured: Measurements) -> Path:
    "`first`, or else the same name with the first number at which no file stands or only an evaluation of this kind."

    def is_free(path: Path) -> bool:
        found = find_evaluation(path)
        return is_alike(found, measured) if found is not None else not os.path.lexists(path)

    others = (first.with_stem(f"{first.stem}-{number}") for number in itertools.count(2))
    return next(filter(is_free, itertools.chain([first], others)))


def _check_no_run(model: str) -> None:
    "LDMError for the folder of a run in place of that of the model in it."
    path = place(model)
    if (path / "recipe.json").is_file() and (path / "model").is_dir():
        raise LDMError(f"{model}: that is a run: give {path / 'model'}")


def _model_name(model: str) -> str:
    "A short name: the last part of the path; that of a run's folder, where the model stands in it."
    path = place(model).resolve()
    return (path.parent if path.name == "model" else path).name or "model"


def _check_evaluation(options: Evaluation) -> None:
    "LDMError for what is no sensible evaluation of any model."
    drawing, varied = options.drawing, VARIED if options.varied is None else options.varied
    _check_sampling(drawing.steps, drawing.scale)
    check_choice("--sampler", drawing.sampler, SAMPLERS)
    if options.features is not None:
        check_choice("--features", options.features, EXTRACTORS)
    n = check_count("--n", options.n, 2, _MOST_EVALUATED)
    most = max(1, _MOST_EVALUATED // n)
    sets = check_count("--sets", options.sets, 1, most)
    check_count("--seed", drawing.seed, 0, MOST_SEED + 1 - max(n * sets, TIMES * min(varied, n)))
    if varied == 1:
        raise LDMError("--varied 1: diversity is a mean over captions, so it needs at least 2; 0 leaves it out")
    if options.clip is not None and not str(options.clip).strip():
        raise LDMError(f"--clip {str(options.clip)!r}: give the folder of a CLIP model")
    for name in options.splits:
        _check_split(name)
    if options.choose and "validation" in options.splits:
        raise LDMError("--choose looks at captions of validation, so --split validation would measure on the same ones")


_MOST_EVALUATED = 100_000  # images; published distances are of 50,000


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="name of a shipped checkpoint, or a folder")] = "toy-text2image",
    dataset: Annotated[
        str | None,
        typer.Option(help="toy, toy-faces, celeba, coco or folder; default: the one that the model was trained on"),
    ] = None,
    data_dir: DataDir = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="split of the data set: validation, test or unseen_pairs; again for several; "
            "default: test, and for captions of toy scenes also unseen_pairs"
        ),
    ] = None,
    n: Annotated[int, typer.Option(min=2, help="images of each set; the split should have twice as many")] = 512,
    sets: Annotated[
        int,
        typer.Option(
            min=1,
            help="measure this often, each time with other images, for a mean with an interval; "
            "the split should have 2 · N · SETS images",
        ),
    ] = 1,
    scale: Annotated[float, typer.Option(help="guidance scale; 1 means no guidance")] = 3.0,
    choose: Annotated[
        bool,
        typer.Option(
            help="first choose the scale, on half as many captions of toy scenes of the validation split; "
            "--scale is not used then",
        ),
    ] = False,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
    sampler: Annotated[str, typer.Option(help=", ".join(SAMPLERS))] = "ddim",
    seed: Annotated[int, typer.Option(help="seed of the first image; each further image has the next one")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="images at a time")] = 64,
    features: Annotated[
        str | None,
        typer.Option(
            help=f"what the distances compare: {', '.join(EXTRACTORS)}; default: toy-features for toy images, "
            "else inception, else vgg16, where weights_dir has the weights"
        ),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="folder of a CLIP model: then also the CLIP score, for a model of captions")
    ] = None,
    varied: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="of how many captions of toy scenes four images are drawn, to measure diversity: at least 2; "
            "0: of none; default: 64, for a model of captions alone",
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option(help="write the scores into the model's config.json; MODEL must be a folder")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file for all numbers; default: runs/evaluation/NAME-OF-MODEL.json, "
            "with a number behind the name where another evaluation stands there"
        ),
    ] = None,
    keep_samples: Annotated[bool, typer.Option(help="keep the drawn images, in a folder beside that file")] = False,
    device: Device = None,
) -> None:
    """Measure how close drawn images are to real ones: Fréchet and kernel distance, precision, recall, inception score.

    Beside each number stands that of reconstructions and of other real images: no better one can be expected.

    Where a model draws captions of toy scenes, the judge also says how many of them are right, word by word.

    Where it is given a small image, a hole or a map, scores such as PSNR or IoU say how well its images agree with that.

    After an interruption, the same command goes on where it was.
    """
    settings = load_settings()
    options = Evaluation(
        drawing=Drawing(steps, scale, sampler, seed, batch_size),
        dataset=dataset,
        data_dir=data_dir and place(data_dir) or settings.data_dir,
        splits=tuple(dict.fromkeys(split or ())),
        n=n,
        sets=sets,
        features=features,
        weights_dir=settings.weights_dir,
        clip=clip,
        choose=choose,
        varied=varied,
    )
    _check_evaluation(options)
    _check_no_run(model)
    name = _model_name(model)
    if write:
        _check_written(model)
    file = probe(Path("runs") / "evaluation" / f"{name}.json") if out is None else _numbers_file(out)
    kept = KeptSamples(file.with_suffix(".samples"))
    diffusion = LatentDiffusion.from_pretrained(model).to(_chosen_device(device))
    if out is not None:
        _check_title(file, evaluation_title(diffusion, options, name))
    try:
        measured = evaluate_model(diffusion, options, name, kept)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; the same command goes on from here:\n  {shlex.join(_typed(sys.argv[1:]))}")
        raise typer.Exit(130) from None
    file = _free_file(file, measured) if out is None else file
    measured.save(file)
    if write:
        _write_scores(place(model), scores(measured))
    typer.echo(f"{table(measured)}\n\nall numbers: {file}")
    if not keep_samples:
        kept.remove()


def _perceptual_distance(weights_dir: Path, device: torch.device) -> tuple[Any, str]:
    "LPIPS where its weights are at hand, else the distance of ToyFeatures; with its name."
    try:
        return LPIPS("alex", weights_dir, download=False).to(device), "LPIPS (AlexNet)"
    except LDMError:
        return ToyFeatures.from_pretrained("toy-features").to(device).distance, "ToyFeatures"


@app.command()
def reconstruct(
    model: Annotated[
        str, typer.Argument(help="a first stage, or a model that has one: name of a shipped checkpoint, or a folder")
    ] = "toy-kl-f4",
    dataset: Annotated[str, typer.Option(help="toy, toy-faces, celeba, coco or folder")] = "toy",
    data_dir: DataDir = None,
    split: Annotated[
        str, typer.Option(help="split of the images: validation or test; for toy scenes also unseen_pairs")
    ] = "test",
    n: Annotated[int, typer.Option(min=2, help="number of images")] = 256,
    size: Annotated[int, typer.Option(min=1, help="height and width of the images, in pixels")] = 64,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="PNG file for eight images and their reconstructions")] = None,
) -> None:
    "Measure how well a first stage reconstructs images that it was not trained on."
    _check_split(split)
    check_count("--size", size, 1, _MOST_SIZE)
    settings = load_settings()
    where = _chosen_device(device)
    out = out and _png(out)
    data: Any = open_dataset(dataset, data_dir and place(data_dir) or settings.data_dir, split, size)
    if min(n, len(data)) * 3 * size**2 > _MOST_NUMBERS:
        raise LDMError(f"--n {n}, --size {size}: so many images of that size need more than 4 GiB: take fewer")
    first_stage = load_first_stage(model).to(where)
    images = torch.stack([data[i]["image"] for i in range(min(n, len(data)))]).to(where)
    distance, name = _perceptual_distance(settings.weights_dir, where)
    scores = score_first_stage(first_stage, images, distance)
    typer.echo(f"{dataset}, {split}, {scores.images} images of {size}², perceptual distance: {name}\n{scores}")
    with torch.no_grad():
        reconstructions = torch.cat([first_stage.reconstruct(some) for some in images.split(64)])
    if (dataset, size) == ("toy", 64):  # the judge was trained for these images
        reader = SceneReader.from_pretrained("scene-reader").to(where)
        scenes = [data.describe(i)[0] for i in range(len(images))]
        before, after = (reader_accuracy(reader, some, scenes) for some in (images, reconstructions))
        typer.echo(f"{'read without an error':28s} {after} (before: {before})")
    if out:
        save(grid(torch.cat([images[:8], reconstructions[:8]]), columns=min(8, len(images))), out)
        typer.echo(f"images above, their reconstructions below: {out}")


@app.command()
def doctor(
    run: Annotated[str, typer.Argument(help="folder of a run, or a model: name of a shipped checkpoint, or a folder")],
    data_dir: DataDir = None,
    n: Annotated[int, typer.Option(min=2, help="number of held-out images to measure on")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="seed of noise and samples")] = 0,
    device: Device = None,
) -> None:
    "Look for ten usual faults of a run or a model: a line for each, below a fault its cause and remedy; then status 1."
    settings = load_settings()
    where = place(data_dir or settings.data_dir)
    findings = examine(run, where, settings.weights_dir, n, _chosen_device(device), seed)
    for finding in findings:
        typer.echo(str(finding))
    if any(finding.failed for finding in findings):
        raise typer.Exit(1)


# --- Exercises, for students and for who grades them ---

Course = Annotated[Path, typer.Argument(help="nbgrader's course folder: source/EXERCISE/EXERCISE.ipynb lies in it")]
Chosen = Annotated[list[str] | None, typer.Option("--only", help="an exercise; again for several; default: all")]


@app.command()
def exercises(
    folder: Annotated[Path, typer.Argument(help="folder to write them to; created where it is missing")],
    only: Chosen = None,
) -> None:
    "Write the exercise notebooks for students: no solutions in them, and no file overwritten that is there."
    from ldm_edu.exercises.student import write_exercises

    new, kept = write_exercises(place(folder), only or ())
    typer.echo(f"{len(new)} files written to {folder}")
    if kept:
        typer.echo(f"kept as they were: {', '.join(path.name for path in kept)}")


@app.command()
def generate(
    course: Course = Path("nbs/exercises"),
    only: Chosen = None,
    students: Annotated[
        Path | None,
        typer.Option(help="folder for what students work on without nbgrader, as `ldm-edu exercises` writes it"),
    ] = None,
) -> None:
    "For instructors: write the exercises to hand out, without solutions, to release/ of a course folder (nbgrader)."
    from ldm_edu.exercises.student import save_student_version
    from ldm_edu.grading.course import generate as hand_out

    files = hand_out(place(course), only or ())
    typer.echo(f"{len(files)} exercise{'s' * (len(files) > 1)} in {files[0].parents[1]}")
    if students is not None:
        for file in files:
            save_student_version(file, place(students) / file.name)
        typer.echo(f"versions for students: {students}")


@app.command()
def grade(
    course: Course = Path("nbs/exercises"),
    submitted: Annotated[
        Path | None,
        typer.Option(help="folder with STUDENT/EXERCISE/EXERCISE.ipynb; default: submitted/ of the course folder"),
    ] = None,
    only: Chosen = None,
    out: Annotated[Path, typer.Option(help="CSV file: one line for each submission")] = Path("grades.csv"),
    feedback: Annotated[
        Path | None,
        typer.Option(help="folder for a page for each submission: points and messages, no test and no solution"),
    ] = None,
    memory: Annotated[float, typer.Option(min=4, help="address space that a submission may take, in GiB")] = 12.0,
) -> None:
    """For instructors: grade what was handed in by nbgrader, one submission at a time, with a reason for each oddity.

    Code of students runs as you: use a machine, a container or a user that has nothing to lose.
    """
    from ldm_edu.grading.course import Graded, write_feedback, write_grades
    from ldm_edu.grading.course import grade as grade_all

    out, so_far = probe(out), []

    def say(one: Graded) -> None:
        reasons = f"   {'; '.join(one.reasons)}" if one.reasons else ""
        typer.echo(f"{one.student}  {one.exercise}  {one.score:g} of {one.most:g}{reasons}")
        so_far.append(one)
        write_grades(so_far, out)  # an interruption loses no grade

    graded = grade_all(place(course), submitted and place(submitted), only or (), memory, say)
    typer.echo(f"{len(graded)} submissions: {out}")
    if feedback is not None:
        write_feedback(graded, place(feedback))
        typer.echo(f"feedback: {feedback}")


@app.command()
def challenge(
    folder: Annotated[Path, typer.Argument(help="folder with the folder of a model for each student: STUDENT/")],
    n: Annotated[int, typer.Option(min=1, help="captions that every model draws")] = 256,
    first: Annotated[int, typer.Option(min=0, help="index of the first caption in the split")] = 0,
    split: Annotated[str, typer.Option(help="split of the captions: test or unseen_pairs")] = "test",
    parameters: Annotated[
        int, typer.Option(min=1, help="most parameters of UNet and conditioner together")
    ] = 5_000_000,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="most seconds of training, as the model says; default: any")
    ] = None,
    most_steps: Annotated[
        int | None, typer.Option(min=1, help="most steps of training, as the model says; default: any")
    ] = None,
    scale: Annotated[float, typer.Option(help="guidance scale; 1 means no guidance")] = 3.0,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 25,
    seed: Annotated[int, typer.Option(help="seed of the first image; each further image has the next one")] = 0,
    out: Annotated[Path, typer.Option(help="CSV file of the table")] = Path("challenge.csv"),
) -> None:
    "Rank the models of a class by how many held-out captions of toy scenes they draw, each with its interval."
    from ldm_edu.grading.challenge import Budget, Entry, write_table
    from ldm_edu.grading.challenge import challenge as compare

    def say(one: Entry) -> None:
        typer.echo(f"{one.student}  {one.reason or one.prompts}")

    _check_sampling(steps, scale)
    check_choice("--split", split, ("test", "unseen_pairs"))
    out = probe(out)
    budget = Budget(parameters, seconds, most_steps)
    write_table(compare(place(folder), n, first, split, budget, scale, steps, seed, say), out)
    typer.echo(f"the table: {out}")


# --- The course, and a demonstration ---


@app.command()
def lab(folder: Annotated[Path, typer.Argument(help="folder of the notebooks")] = Path("nbs")) -> None:
    "Open the notebooks in JupyterLab."
    if not folder.is_dir():
        raise LDMError(f"{folder} is no folder: start this in the folder of the course, or say where its notebooks are")
    try:
        import jupyterlab  # noqa: F401
    except ImportError as error:
        raise LDMError('JupyterLab is not installed: pip install "ldm_edu[course]"') from error
    raise typer.Exit(subprocess.call([sys.executable, "-m", "jupyterlab", str(folder)]))


_CAPTIONS = (
    "a small red sphere left of a big blue cube",
    "a big yellow cylinder",
    "a big green ball and a small purple can",
)
_SCALES = (1.0, 2.0, 4.0, 8.0)
_DEMO_SCALE = 4.0  # for the small model


def _demo_figure(
    shipped: dict[float, Float[Tensor, "b 3 h w"]],  # guidance scale to images, one for each caption
    scratch: Float[Tensor, "b 3 h2 w2"],  # the small model's images
    title: str,  # above the small model's images
    score: str,  # below all
    out: Path,
) -> None:
    "Save a table of images: a row for each caption, a column for each guidance scale, and one for the small model."
    columns = {f"scale {scale:g}": images for scale, images in shipped.items()} | {title: scratch}
    rows = len(_CAPTIONS)
    figure = new_figure(figsize=(2 * len(columns), 2.15 * rows), dpi=80, layout="constrained")
    for i, caption in enumerate(_CAPTIONS):
        for j, (name, images) in enumerate(columns.items()):
            axes = figure.add_subplot(rows, len(columns), i * len(columns) + j + 1, xticks=[], yticks=[])
            axes.imshow(to_pil(images[i]))
            axes.set_title(name if i == 0 else "", fontsize=9)
            if j == 0:
                axes.set_ylabel(textwrap.fill(caption, 22), fontsize=8)
    figure.supxlabel(textwrap.fill(score, 26 * len(columns)), fontsize=9)
    with writing(out), atomic(out) as temporary:
        figure.savefig(temporary, format="png")


def _colours_right(model: LatentDiffusion, captions: Sequence[str]) -> Share:
    "The share of the things in captions that the model draws in their colour, as the judge reads its images."
    reader = SceneReader.from_pretrained("scene-reader")
    images = draw_captions(model, captions, _DEMO_SCALE, steps=25)
    larger = F.interpolate(images, size=READER_SIZE, mode="bicubic").clamp(-1, 1)  # it reads no other size
    return prompt_accuracy(larger, captions, reader).words["colour"]


def _demo_score(model: LatentDiffusion, n: int = 64) -> str:
    "How often a model draws the colours of captions of scenes that it was not trained on, those of one thing apart."
    captions = captions_of("validation", 4 * n)
    single = [text for text in captions if len(read_caption(text).things) == 1][:n]
    told = {"captions of one thing": single, "all captions": captions[:n]}
    shares = [f"{_colours_right(model, texts)} in {name}" for name, texts in told.items()]
    return f"things in the colour that was asked for, by the judge (chance: 12.5 %): {'; '.join(shares)}"


@app.command()
def demo(
    out: Out = Path("demo.png"),
    device: Device = None,
    steps: Annotated[int, typer.Option(help="denoising steps of each image")] = 50,
    train_steps: Annotated[int | None, typer.Option(min=1, help="upper limit of training steps for each stage")] = None,
) -> None:
    "Sample from the shipped model, train a small one from nothing in a minute or so, and save both with its score."
    _check_sampling(steps)
    where = _chosen_device(device)
    out = _png(out)
    scales = ", ".join(f"{scale:g}" for scale in _SCALES)
    typer.echo(f"1. the shipped model draws {len(_CAPTIONS)} captions at guidance scales {scales}")
    shipped = LatentDiffusion.from_pretrained("toy-text2image").to(where)
    drawn = {}
    for scale in _SCALES:
        drawn[scale] = shipped.sample(_CAPTIONS, steps=steps, scale=scale, seed=1, show_progress=True).cpu()
    if where.type == "cpu" and (os.cpu_count() or 1) <= 2:
        torch.set_num_threads(1)  # networks so small are slower on two threads, at least where these share a core
    recipe = find_recipe("toy-demo")
    if train_steps is not None:
        recipe = recipe.shortened(train_steps)
    typer.echo("2. a small model is trained from nothing: scenes are drawn, then first stage and UNet are trained")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        small: Any = train_recipe(recipe, Path(folder) / "run", RunOptions(device=str(where), sample_every=0))
    seconds = time.monotonic() - began
    scratch = small.to(where).sample(_CAPTIONS, steps=steps, scale=_DEMO_SCALE, seed=1).cpu()
    score = _demo_score(small)
    _demo_figure(drawn, scratch, f"from nothing, {seconds:.0f} s", score, out)
    typer.echo(f"the small model, trained in {seconds:.0f} s: {score}")
    typer.echo(f"both results are in {out}")
    typer.echo("next: `make lab` (or `ldm-edu lab`), then open index.ipynb;")
    typer.echo("11_autoencoder, 21_diffusion and 44_guidance are the heart of the course")
