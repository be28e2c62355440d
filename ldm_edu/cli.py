"""`ldm-edu`: the demo, recipes, training and sampling without a notebook."""

import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
import torch
import typer
from jaxtyping import Float
from pathlib import Path
from torch import Tensor
from typing import Annotated
from ldm_edu.basics import pick_device
from ldm_edu.checkpoints import load_json, save_json
from ldm_edu.data.download import TERMS, accept, accepted, download_celeba, download_coco, home
from ldm_edu.data.registry import open_dataset
from ldm_edu.display import grid, save, to_pil
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.judge import SceneReader, reader_accuracy
from ldm_edu.evaluation.metrics import LPIPS
from ldm_edu.evaluation.prompts import captions_of, choose_scale, score_prompts
from ldm_edu.evaluation.reconstruction import score_first_stage
from ldm_edu.first_stage.quantization import load_first_stage
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.settings import load_settings
from ldm_edu.training.dispatch import train as train_recipe
from ldm_edu.training.recipes import RECIPES, Recipe, find_recipe

"""`ldm-edu`: the demo, recipes, training and sampling without a notebook"""


class Commands(typer.core.TyperGroup):
    "The commands; an error meant for people is printed as one line, with exit status 1."

    def invoke(self, ctx):
        try:
            super().invoke(ctx)
        except LDMError as error:
            typer.secho(f"ldm-edu: {error}", fg="red", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_show_locals=False,
)  # fmt: skip


@app.callback()
def about() -> None:
    "Latent diffusion, rebuilt from the paper up: draw, train, learn."


Device = Annotated[str | None, typer.Option(help="auto, cuda, mps or cpu; default: settings.ini")]
Out = Annotated[Path, typer.Option(help="where the image goes")]


def chosen_device(name: str | None) -> torch.device:
    "The device of the option, else of the settings."
    return pick_device(name or load_settings().device)


def writable(out: Path) -> Path:
    "`out`, its folder made; `LDMError` where it is no PNG."
    if out.suffix.lower() != ".png":
        raise LDMError(f"--out {out}: images are saved as PNG, so the name should end in .png")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


@app.command()
def recipes() -> None:
    "List the recipes that `train` knows."
    for recipe in RECIPES.values():
        typer.echo(f"{recipe.name:16s} {recipe.about} ({recipe.steps:,} steps)")


@app.command()
def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="captions, each in quotes; none for a model without text")
    ] = None,
    model: Annotated[str, typer.Option(help="a shipped checkpoint, or a folder")] = "toy-text2image",
    n: Annotated[int | None, typer.Option(help="how many images of one caption, or without captions")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
    scale: Annotated[float, typer.Option(help="guidance scale; 1 is unguided")] = 3.0,
    seed: Annotated[int, typer.Option(help="the first image's seed; the next ones count up")] = 0,
    sampler: Annotated[str, typer.Option(help="ddim or ddpm")] = "ddim",
    device: Device = None,
    out: Out = Path("sample.png"),
) -> None:
    "Draw captions with a trained model and save the images as one PNG."
    out, diffusion = writable(out), LatentDiffusion.from_pretrained(model).to(chosen_device(device))
    prompts = prompts or None
    if prompts is not None and len(prompts) == 1:
        prompts = prompts[0]
    images = diffusion.sample(prompts, n, steps, scale, seed, sampler, show_progress=True)
    save(images[0] if len(images) == 1 else grid(images), out)
    typer.echo(f"{len(images)} image{'s' * (len(images) > 1)} in {out}")


def consent(name: str, data_dir: Path, yes: bool) -> None:
    "Show the terms of a data set and ask, unless they were accepted before; LDMError where they are not."
    if accepted(name, data_dir):
        return
    typer.echo(TERMS[name])
    try:
        if not yes and not typer.confirm("Do you accept them?"):
            raise LDMError("nothing was downloaded")
    except typer.Abort:  # nobody there to answer
        raise LDMError("nothing was downloaded: the terms want an answer; --yes accepts them") from None
    accept(name, data_dir)


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="celeba or coco")],
    data_dir: Annotated[Path | None, typer.Option(help="it gets a folder in there; default: settings.ini")] = None,
    subset: Annotated[int | None, typer.Option(min=1, help="only so many images; default: all")] = None,
    split: Annotated[str, typer.Option(help="coco only: val2017 or train2017")] = "val2017",
    panoptic: Annotated[bool, typer.Option(help="coco only: maps of what each pixel shows, too")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="accept the terms without being asked")] = False,
) -> None:
    "Download CelebA or COCO, or go on with it: checked, unpacked, and cut down to a subset where one is asked for."
    where = data_dir or load_settings().data_dir
    home(name, where)  # is there such a data set?
    consent(name, where, yes)
    try:
        root = download_celeba(where, subset) if name == "celeba" else download_coco(where, split, subset, panoptic)
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on from here")
        raise typer.Exit(130) from None
    typer.echo(f"{name} is in {root}; `dataset = {name}` in settings.ini makes the notebooks use it")
    typer.echo(f"{root / 'downloads'} holds what was fetched: a larger subset can be made from it, else it may go")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="one of `ldm-edu recipes`")],
    out: Annotated[Path | None, typer.Option(help="folder of the run; default: runs/RECIPE")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="where the data set lies; default: settings.ini")] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="where images are kept for all runs; default: cache/ in settings.ini's data_dir"),
    ] = None,
    resume: Annotated[bool, typer.Option(help="go on with the run in that folder")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="at most so many steps in each stage")] = None,
    device: Device = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; default: bf16 where the device has it")
    ] = None,
    compile: Annotated[
        bool, typer.Option(help="compile the networks first: slower to start, often faster then")
    ] = False,
    channels_last: Annotated[bool, typer.Option(help="another memory layout: often faster on NVIDIA GPUs")] = False,
    every: Annotated[int, typer.Option(min=1, help="steps between lines of the log")] = 100,
) -> None:
    "Train a recipe: the two stages of a diffusion model, a first stage for itself, the judge, or the features."
    chosen, settings = find_recipe(recipe), load_settings()
    chosen = chosen if max_steps is None else chosen.shortened(max_steps)
    out = out or Path("runs") / recipe
    how = {
        "device": device or settings.device,
        "precision": precision,
        "compile": compile,
        "channels_last": channels_last,
    }
    terminal = sys.stderr.isatty()
    began = time.monotonic()
    try:
        train_recipe(
            chosen, out, data_dir or settings.data_dir, cache_dir=cache_dir or settings.data_dir / "cache",
            weights_dir=settings.weights_dir, resume=resume, every=every, log_fn=None if terminal else typer.echo, **how,
        )  # fmt: skip
    except KeyboardInterrupt as stopped:
        line = shlex.join([*again(sys.argv[1:]), "--resume"])
        typer.echo(f"\n{stopped or 'stopped'}\nThis goes on with it:\n  {line}")
        raise typer.Exit(130) from None
    use = f": `ldm-edu sample --model {out / 'model'}` draws with it" if isinstance(chosen, Recipe) else ""
    typer.echo(f"trained in {time.monotonic() - began:.0f} s, {out / 'model'}{use}")


def again(words: list[str]) -> list[str]:
    "The command that was typed, without `--resume`."
    return ["ldm-edu", *(word for word in words if word != "--resume")]


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a shipped checkpoint, or a folder")] = "toy-text2image",
    n: Annotated[int, typer.Option(min=1, help="how many captions")] = 512,
    split: Annotated[str, typer.Option(help="of which split: validation, test or unseen_pairs")] = "test",
    scale: Annotated[float, typer.Option(help="guidance scale")] = 3.0,
    choose: Annotated[
        bool, typer.Option(help="choose the scale on the validation split first, on half as many captions")
    ] = False,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
    write: Annotated[bool, typer.Option(help="write the scores into the model's config.json (a folder's)")] = False,
    device: Device = None,
) -> None:
    "Have the judge say how many captions of drawn scenes a model draws."
    diffusion, reader = (
        LatentDiffusion.from_pretrained(model).to(chosen_device(device)),
        SceneReader.from_pretrained("scene-reader"),
    )
    if write and not Path(model).is_dir():
        raise LDMError(f"--write: {model} is no folder, and the shipped checkpoints are not changed")
    tried = {}
    if choose:
        scale, tried = choose_scale(diffusion, reader, n=max(1, n // 2), steps=steps)
        for value, accuracy in tried.items():
            typer.echo(f"validation, scale {value:g}: {accuracy.prompts}")
    score = score_prompts(diffusion, reader, captions_of(split, n), scale, steps)
    typer.echo(f"{split}, {n} captions, scale {scale:g}, {steps} DDIM steps\n{score}")
    if write:
        path = Path(model) / "config.json"
        config = load_json(path)
        scores = {"scale": scale, "steps": steps, "validation": {str(k): v.prompts.share for k, v in tried.items()}}
        config["provenance"] = (config.get("provenance") or {}) | {"scores": scores | {split: score.rows()}}
        save_json(config, path)


@app.command()
def reconstruct(
    model: Annotated[
        str, typer.Argument(help="a first stage, or a model that has one: shipped, or a folder")
    ] = "toy-kl-f4",
    dataset: Annotated[str, typer.Option(help="toy, toy-faces, celeba, coco or folder")] = "toy",
    data_dir: Annotated[Path | None, typer.Option(help="where the data set lies; default: settings.ini")] = None,
    split: Annotated[str, typer.Option(help="of which split: validation or test, of toy scenes also unseen_pairs")] = "test",
    n: Annotated[int, typer.Option(min=2, help="how many images")] = 256,
    size: Annotated[int, typer.Option(min=1, help="height and width")] = 64,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="where an image of eight of them goes, if wanted")] = None,
) -> None:
    "Say what a first stage gives back of images that it has not seen."
    settings, where = load_settings(), chosen_device(device)
    first_stage, out = load_first_stage(model).to(where), out and writable(out)
    data = open_dataset(dataset, data_dir or settings.data_dir, split, size)
    images = torch.stack([data[i]["image"] for i in range(min(n, len(data)))]).to(where)
    try:
        distance, name = LPIPS("alex", settings.weights_dir, download=False).to(where), "LPIPS (AlexNet)"
    except LDMError:
        distance, name = ToyFeatures.from_pretrained("toy-features").to(where).distance, "ToyFeatures"
    scores = score_first_stage(first_stage, images, distance)
    typer.echo(f"{dataset}, {split}, {scores.images} images of {size}², perceptual distance: {name}\n{scores}")
    with torch.no_grad():
        back = torch.cat([first_stage.reconstruct(some) for some in images.split(64)])
    if (dataset, size) == ("toy", 64):  # what the judge was trained for
        reader = SceneReader.from_pretrained("scene-reader").to(where)
        scenes = [data.describe(i)[0] for i in range(len(images))]
        before, after = (reader_accuracy(reader, some, scenes) for some in (images, back))
        typer.echo(f"{'read without an error':28s} {after} (before: {before})")
    if out:
        save(grid(torch.cat([images[:8], back[:8]]), columns=min(8, len(images))), out)
        typer.echo(f"images above, what came back below: {out}")


@app.command()
def lab(folder: Annotated[Path, typer.Argument(help="the notebooks")] = Path("nbs")) -> None:
    "Open the notebooks in JupyterLab."
    if not folder.is_dir():
        raise LDMError(f"{folder} is no folder: start this where the course lies, or say where its notebooks are")
    try:
        import jupyterlab  # noqa: F401
    except ImportError as error:
        raise LDMError('JupyterLab is not installed: pip install "ldm_edu[course]"') from error
    raise typer.Exit(subprocess.call([sys.executable, "-m", "jupyterlab", str(folder)]))


CAPTIONS = (
    "a small red sphere left of a big blue cube",
    "a big yellow cylinder",
    "a big green ball and a small purple can",
)
SCALES = (1.0, 2.0, 4.0, 8.0)


def demo_figure(
    shipped: dict[float, Float[Tensor, "b 3 h w"]],  # guidance scale to images, one for each caption
    scratch: Float[Tensor, "b 3 h2 w2"],  # the small model's images
    title: str,  # above the small model's images
    out: Path,
) -> None:
    "Captions down, guidance scales across, the small model's images in the last column; saved as `out`."
    from matplotlib.figure import Figure

    columns = {f"scale {scale:g}": images for scale, images in shipped.items()} | {title: scratch}
    figure = Figure(figsize=(2 * len(columns), 2.15 * len(CAPTIONS)), dpi=80, layout="constrained")
    for i, caption in enumerate(CAPTIONS):
        for j, (name, images) in enumerate(columns.items()):
            axes = figure.add_subplot(len(CAPTIONS), len(columns), i * len(columns) + j + 1, xticks=[], yticks=[])
            axes.imshow(to_pil(images[i]))
            axes.set_title(name if i == 0 else "", fontsize=9)
            if j == 0:
                axes.set_ylabel(textwrap.fill(caption, 22), fontsize=8)
    figure.savefig(out)


@app.command()
def demo(
    out: Out = Path("demo.png"),
    device: Device = None,
    steps: Annotated[int, typer.Option(help="denoising steps of each image")] = 50,
    train_steps: Annotated[int | None, typer.Option(min=1, help="at most so many training steps in each stage")] = None,
) -> None:
    "Draw with the shipped model, train a small one from nothing in a minute or two, and put both in an image."
    where, out = chosen_device(device), writable(out)
    typer.echo(
        f"1. the shipped model draws {len(CAPTIONS)} captions at guidance scales {', '.join(f'{s:g}' for s in SCALES)}"
    )
    shipped = LatentDiffusion.from_pretrained("toy-text2image").to(where)
    drawn = {
        scale: shipped.sample(CAPTIONS, steps=steps, scale=scale, seed=1, show_progress=True).cpu() for scale in SCALES
    }
    recipe = find_recipe("toy-demo")
    recipe = recipe if train_steps is None else recipe.shortened(train_steps)
    typer.echo("2. a small one is trained from nothing: scenes are drawn, then first stage and UNet learn")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        small = train_recipe(recipe, Path(folder) / "run", device=str(where), sample_every=0)
    seconds = time.monotonic() - began
    scratch = small.to(where).sample(CAPTIONS, steps=steps, scale=3.0, seed=1).cpu()
    demo_figure(drawn, scratch, f"from nothing, {seconds:.0f} s", out)
    typer.echo(
        f"both are in {out}. Next: `make lab` (or `ldm-edu lab`), then open index.ipynb; 04, 06 and 12 are the heart"
    )
