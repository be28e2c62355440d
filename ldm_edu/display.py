"""Looking at image tensors: one function for each way, and none that changes what it shows."""

# Images are float tensors in [-1, 1]: (c, h, w), (b, c, h, w), or a list of (c, h, w) of any sizes, with c = 1 (grey) or
# 3 channels. Anything else is refused by name, since the commonest mistake, (h, w, 3), would be drawn as thin stripes.
# Matplotlib, PIL, torchvision and ipywidgets are imported inside the functions that need them: training on a server
# loads none.

import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from ldm_edu.basics import is_static
from ldm_edu.checks import check_count, check_number
from ldm_edu.errors import LDMError
from ldm_edu.files import atomic, brief, folder_for, place, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image as PILImage

__all__ = ["curve", "explore", "grid", "save", "show", "show_rows", "to_pil", "to_uint8"]

Images = Tensor | Sequence[Tensor]  # one image, a batch, or a list of images

# --- Numbers to bytes ---


def to_uint8(
    images: Float[Tensor, "*shape"],  # in [-1, 1]; what lies outside is cut off
) -> UInt8[Tensor, "*shape"]:
    """The bytes 0 to 255 of images in [-1, 1]: u = round(127.5 (x + 1)), cut off at both ends.

    The way back is x' = u / 127.5 - 1, with |x' - x| ≤ 1/255 for an x in the range. Raises LDMError for integers, which
    are probably bytes already, and for nan, which has no colour.
    """
    if not images.is_floating_point():
        raise LDMError(f"`images` should be float in [-1, 1], not {images.dtype}")
    if images.isnan().any():
        raise LDMError("`images` holds nan: something has gone wrong before this image")
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _as_list(images: Images, name: str = "images") -> list[Tensor]:
    "Every image by itself, (1 or 3, h, w) on the CPU, from one image, a batch, or a list of them."
    batch = images[None] if isinstance(images, Tensor) and images.ndim == 3 else images
    tensors = [image.detach().cpu() for image in batch]
    if not tensors:
        raise LDMError(f"`{name}` is empty: there is nothing to show")
    for image in tensors:
        if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
            shape = tuple(images.shape) if isinstance(images, Tensor) else f"a list with {tuple(image.shape)}"
            raise LDMError(f"`{name}` should be (b, c, h, w) or (c, h, w) with 1 or 3 channels, not {shape}")
        if not image.is_floating_point():
            raise LDMError(f"`{name}` should be float in [-1, 1], not {image.dtype}")
    return tensors


def to_pil(
    image: Tensor,  # (c, h, w) or (1, c, h, w) in [-1, 1]; c = 1 or 3
) -> "PILImage":
    "The image for PIL: bytes, with the channels last; mode L for one channel, RGB for three."
    from PIL import Image

    tensors = _as_list(image, "image")
    if len(tensors) > 1:
        raise LDMError(f"`image` should be one image, not {len(tensors)}; `grid` makes one of many")
    pixels = to_uint8(tensors[0]).permute(1, 2, 0)  # (c, h, w) -> (h, w, c)
    return Image.fromarray(pixels.squeeze(2).numpy())


def _columns(columns: Any) -> int:
    "How many images stand in a row: 8, where nothing else is asked for."
    return 8 if columns is None else check_count("columns", columns)


def grid(
    images: Images,  # (b, c, h, w) in [-1, 1], all of one size
    columns: int | None = None,  # images a row; default: up to 8
    pad: int = 2,  # white pixels between and around
) -> Float[Tensor, "3 H W"]:
    """One image of many, row by row, on a white ground.

    The image in row r and column c, counted from 0, has its upper left corner at (p + r (h + p), p + c (w + p)) for
    images of (h, w) and p = `pad`.
    """
    tensors = [image.float().expand(3, -1, -1) for image in _as_list(images)]
    pad, columns = check_count("pad", pad, 0), _columns(columns)
    if len(sizes := {tuple(image.shape[1:]) for image in tensors}) > 1:
        raise LDMError(f"`images` should be of one size, not {sorted(sizes)}")
    if len(tensors) == 1:  # `make_grid` draws no ground around a single image
        return F.pad(tensors[0], [pad] * 4, value=1.0)
    from torchvision.utils import make_grid

    return make_grid(tensors, nrow=columns, padding=pad, pad_value=1.0)


# --- Figures of images ---

_DPI = 80  # pixels an inch: small files, still sharp
_LETTERS = 14  # letters an inch, in a text of 8 points
_MOST_INCHES = 100  # that an image may be asked to have
_LABEL = 1.2  # most inches for the label of a row


class _Panel(NamedTuple):
    "Rows of images with their texts, and the sizes that they are drawn in."

    rows: list[list[Tensor]]
    titles: list[list[str]]  # one above each image, wrapped; "" for none
    labels: list[str]  # one left of each row, wrapped; "" for none
    margin: float  # inches left of the images, for the labels
    inches: float  # width of an image
    heights: list[float]  # inches of each row without its titles: as high as its tallest image
    above: float  # inches of all titles together


def _wrap(text: Any, inches: float) -> str:
    "Text in lines that fit a width, at 8 points."
    return textwrap.fill(str(text), max(8, int(_LETTERS * inches)))


def _arrange(
    rows: list[list[Tensor]],  # images
    titles: list[list[Any]],  # one above each image; "" for none
    labels: list[str],  # one left of each row; "" for none
    scale: float | int | None,  # inches an image; None: what fits
) -> _Panel:
    "Decide how large everything is drawn."
    fits = min(1.5, 7.5 / max(map(len, rows)))
    inches = fits if scale is None else float(check_number("scale", scale, most=_MOST_INCHES, above=0))
    wrapped = [[_wrap(title, inches) for title in line] for line in titles]
    lines = [max(len(title.splitlines()) for title in line) for line in wrapped]
    above = sum(0.15 * n + 0.05 for n in lines if n)
    heights = [inches * max(image.shape[1] / image.shape[2] for image in row) for row in rows]
    beside = [_wrap(label, _LABEL) for label in labels]
    longest = max(len(line) for label in beside for line in [*label.splitlines(), ""])
    return _Panel(rows, wrapped, beside, longest / _LETTERS, inches, heights, above)


def _draw_image(axes: Any, image: Tensor, inches: float) -> None:
    """Draw one image, and nothing around it.

    A small image is enlarged with `nearest`, so every square that is seen is a pixel. An image with more pixels than
    there is room for is smoothed as it shrinks.
    """
    enlarged = image.shape[2] <= inches * _DPI
    axes.imshow(to_pil(grid(image, pad=0)), interpolation="nearest" if enlarged else "antialiased")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _finish(figure: Any, suptitle: str | None = None) -> None:
    "Put a line above everything, show the figure and close it."
    import matplotlib.pyplot as plt

    if suptitle:
        figure.suptitle(suptitle, fontsize=10)
    plt.show()
    plt.close(figure)


def _draw_panel(panel: _Panel, suptitle: str | None = None) -> None:
    "Draw rows of images as one figure."
    import matplotlib.pyplot as plt

    columns = max(map(len, panel.rows))
    height = sum(panel.heights) + panel.above + (0.25 if suptitle else 0)
    size = (panel.margin + columns * panel.inches, height)
    cells = {"squeeze": False, "layout": "constrained", "height_ratios": panel.heights}
    figure, axes = plt.subplots(len(panel.rows), columns, figsize=size, dpi=_DPI, **cells)
    for line, images, titles, label in zip(axes, panel.rows, panel.titles, panel.labels):
        for one, image, title in zip(line, images, titles):
            _draw_image(one, image, panel.inches)
            one.set_title(title, fontsize=8)
        for one in line[len(images) :]:
            one.axis("off")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    _finish(figure, suptitle)


def _titles(titles: Sequence[Any] | None, n: int, of: str) -> list[Any]:
    "One title for each of `n`, empty where none are given."
    if titles is None:
        return [""] * n
    if len(titles) != n:
        raise LDMError(f"`titles` should be one for each {of}: {n}, not {len(titles)}")
    return list(titles)


def show(
    images: Images,  # (b, c, h, w), (c, h, w) or a list of images of any sizes, in [-1, 1]
    titles: Sequence[Any] | None = None,  # one above each image
    columns: int | None = None,  # images a row; default: up to 8
    scale: float | int | None = None,  # inches an image; default: what fits
    suptitle: str | None = None,  # one line above all
) -> None:
    "Draw images side by side, every pixel of a small one as a square."
    tensors = _as_list(images)
    titles = _titles(titles, len(tensors), "image")
    beside = _columns(columns)
    starts = range(0, len(tensors), beside)
    rows, above = ([many[i : i + beside] for i in starts] for many in (tensors, titles))
    _draw_panel(_arrange(rows, above, [""] * len(rows), scale), suptitle)


def show_rows(
    rows: Mapping[str, Images],  # label -> images; rows may differ in length and size
    titles: Sequence[Any] | None = None,  # one above each column
    scale: float | int | None = None,  # inches an image; default: what fits
    suptitle: str | None = None,  # one line above all
) -> None:
    "Draw labelled rows of images under one another."
    tensors = [_as_list(images, f"rows['{label}']") for label, images in rows.items()]
    if not tensors:
        raise LDMError("`rows` is empty: there is nothing to show")
    columns = max(map(len, tensors))
    above = [_titles(titles, columns, "column")] + [[""] * columns] * (len(rows) - 1)
    _draw_panel(_arrange(tensors, above, list(rows), scale), suptitle)


# --- Curves ---


def running_mean(
    values: Sequence | Tensor,  # (n,)
    width: int,  # how many, k >= 1
) -> Float[Tensor, "n"]:
    """The mean of the last `width` values at every place; at the start, of the fewer values that there are.

    m_i = (1/k) Σ_{j = i-k+1..i} v_j, as the difference of two cumulative sums, so that the width costs nothing. Where
    the jumps of the values are independent, those of the mean are √k times smaller.
    """
    width = check_count("width", width)
    sums = torch.as_tensor(values, dtype=torch.float64).cumsum(0)
    sums = torch.cat([sums.new_zeros(1), sums])  # sums[i]: sum of the first i values
    end = torch.arange(1, len(sums))
    start = (end - width).clamp(min=0)
    return (sums[end] - sums[start]) / (end - start)


def _numbers(values: Iterable) -> list[float]:
    "The values as Python floats, whether a list, a tensor or an array holds them; LDMError where they are none."
    try:
        return [float(value.item() if isinstance(value, Tensor) else value) for value in values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise LDMError(f"a curve should be a list, a tensor or an array of numbers ({brief(error)})") from error


def curve(
    curves: Mapping[str, Iterable],  # label -> numbers: a list, a tensor, an array
    x: Iterable | None = None,  # where the values stand; default: 0, 1, 2, ...
    xlabel: str = "",
    ylabel: str = "",
    log: bool = False,  # logarithmic y axis
    smooth: int = 1,  # draw the running mean of so many values, and faintly the values themselves
    dashed: Collection[str] = (),  # labels of curves that lie on another one, which is seen through their gaps
) -> None:
    """Draw one or several curves over a common x axis.

    A smoothed curve is always drawn with the values themselves, since alone it would hide how much they scatter.
    """
    import matplotlib.pyplot as plt

    smooth = check_count("smooth", smooth)
    drawn = {label: _numbers(values) for label, values in curves.items()}
    shared = None if x is None else _numbers(x)
    figure, axes = plt.subplots(figsize=(6, 2.5), dpi=_DPI, layout="constrained")
    for label, values in drawn.items():
        places = range(len(values)) if shared is None else shared
        if len(values) != len(places):
            plt.close(figure)
            raise LDMError(f"curve '{label}' has {len(values)} values and `x` {len(places)}: one place for each value")
        drawn_values, style = running_mean(values, smooth) if smooth > 1 else values, "--" if label in dashed else "-"
        (line,) = axes.plot(places, drawn_values, style, label=label)
        if smooth > 1:
            axes.plot(places, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(frameon=False, fontsize=8)
    _finish(figure)


# --- Sliders ---


def _check_slider(name: str, slider: Any) -> None:
    "Refuse what is neither (low, high[, step]), [choices] nor True/False."
    if isinstance(slider, bool) or (isinstance(slider, list) and slider):
        return
    numbers = isinstance(slider, tuple) and all(isinstance(v, int | float) for v in slider)
    if not numbers or len(slider) not in (2, 3) or slider[0] >= slider[1]:
        kinds = "(low, high), (low, high, step), [choices] or True/False"
        raise LDMError(f"slider `{name}` should be {kinds}, not {slider}")


def stops(
    slider: tuple | list | bool,  # as `explore` takes it
    default: Any = None,  # a value that must be among them
    n: int = 5,  # how many at most
) -> list:
    "A few values along a slider, evenly spaced from end to end, with `default` among them."
    _check_slider("slider", slider)
    if isinstance(slider, bool):
        return [False, True]
    if isinstance(slider, list):
        place = slider.index(default) if default in slider else None
        return [slider[i] for i in stops((0, len(slider) - 1), place, n)] if len(slider) > 1 else slider
    low, high, step = (*slider, int(all(isinstance(v, int) for v in slider)))[:3]
    if step:
        high = low + (high - low) // step * step  # the last whole step
    values = [low + (high - low) * i / (n - 1) for i in range(n)]
    if step:
        values = [low + step * round((value - low) / step) for value in values]
    if default is not None:
        nearest = min(range(n), key=lambda i: abs(values[i] - default))
        values[nearest] = default
    return sorted({round(value, 6) for value in values})


def _defaults(fn: Callable, sliders: Mapping[str, Any]) -> dict[str, Any]:
    "Where each slider starts: at the default in the function's signature, else at its first stop."
    parameters = inspect.signature(fn).parameters
    starts = {}
    for name, slider in sliders.items():
        _check_slider(name, slider)
        if name not in parameters:
            raise LDMError(f"slider `{name}` is no argument of the function; it has {', '.join(parameters)}")
        own = parameters[name].default
        starts[name] = stops(slider)[0] if own in (None, inspect.Parameter.empty) else own
        inside = starts[name] in slider if isinstance(slider, list) else True
        if isinstance(slider, tuple):
            inside = slider[0] <= starts[name] <= slider[1]
        if not inside:
            raise LDMError(f"slider `{name}` does not reach the function's default, {starts[name]}")
    return starts


def _along(fn: Callable, sliders: Mapping[str, Any], starts: Mapping[str, Any]) -> None:
    "`explore` as a figure: a row of images for each slider, while the other sliders stay where they start."
    first = fn(**starts)
    if not isinstance(first, Tensor):  # `fn` has drawn its own figure
        return
    rows, titles = [], []
    for name, slider in sliders.items():
        values = stops(slider, starts[name])
        results = [fn(**{**starts, name: value}) for value in values]
        rows.append([r if r.ndim == 3 else grid(r) for r in results])
        titles.append([f"{name} = {round(v, 4) if isinstance(v, float) else v}" for v in values])
    _draw_panel(_arrange(rows, titles, [""] * len(rows), None))


def _control(name: str, slider: Any, start: Any):
    "The ipywidgets control of one slider; `fn` is called when the control is released."
    import ipywidgets

    if isinstance(slider, bool):
        return ipywidgets.Checkbox(value=start, description=name)
    if isinstance(slider, list):
        return ipywidgets.SelectionSlider(options=slider, value=start, description=name, continuous_update=False)
    whole = all(isinstance(value, int) for value in (*slider, start))
    low, high, step = (*slider, 1 if whole else (slider[1] - slider[0]) / 100)[:3]
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    return kind(value=start, min=low, max=high, step=step, description=name, continuous_update=False)


def explore(
    fn: Callable[..., Tensor | None],  # returns images, (c, h, w) or (b, c, h, w); or None, if it draws a figure itself
    /,
    **sliders: Any,  # argument = (low, high), (low, high, step), [choices] or True/False
) -> None:
    """Call `fn` whenever a slider moves, and show the images that it returns.

    (low, high) and (low, high, step) move in whole steps where all numbers are integers, else in fine ones; [choices]
    offers these; True or False is a checkbox. A slider starts at the default in the signature of `fn`. Where no slider
    can be moved (a page on the web, a test) the images at a few stops of each slider are drawn in one figure; a
    function that draws its own figure is called once. LDMError names a slider that does not fit `fn`.
    """
    starts = _defaults(fn, sliders)
    if is_static():
        return _along(fn, sliders, starts)
    import ipywidgets
    from IPython.display import display

    def draw(**values: Any) -> None:
        result = fn(**values)
        if isinstance(result, Tensor):
            show(result, scale=3 if result.ndim == 3 else None)  # a single image larger

    controls = {name: _control(name, slider, starts[name]) for name, slider in sliders.items()}
    display(*controls.values(), ipywidgets.interactive_output(draw, controls))


# --- Files ---


def save(
    images: Images,  # one image, or several, which become a grid
    path: str | Path,  # its ending names the format: .png keeps every byte, .jpg does not
) -> None:
    "Write images to a file, whole or not at all; missing folders are created."
    from PIL import Image

    path, tensors = place(path), _as_list(images)
    form = Image.registered_extensions().get(path.suffix.lower())
    if form not in Image.SAVE:  # Pillow can read more formats than it can write
        raise LDMError(f"`path` should end in .png or .jpg: '{path.name}'")
    folder_for(path)
    with writing(path), atomic(path) as temporary:
        to_pil(tensors[0] if len(tensors) == 1 else grid(tensors)).save(temporary, format=form)


def new_figure(**arguments: Any) -> "Figure":
    "A figure to be written into a file, which needs no screen: whatever backend the environment names, it is drawn."
    # Matplotlib refuses to be imported where this variable names no backend, so it is told afterwards.
    named = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    import matplotlib
    from matplotlib.figure import Figure

    if named is not None:
        os.environ["MPLBACKEND"] = named
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = named
    return Figure(**arguments)
