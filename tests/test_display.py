"""Images, curves and sliders: what is drawn, and what is refused."""

import math
import subprocess
import sys
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from ldm_edu import display
from ldm_edu.display import curve, explore, grid, running_mean, save, show, show_rows, stops, to_pil, to_uint8
from ldm_edu.errors import LDMError


@pytest.fixture
def figures(monkeypatch):
    """The figures that were shown, kept open until the test is over."""
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    close = plt.close
    monkeypatch.setattr(plt, "close", lambda *_: None)
    yield shown
    close("all")


def images_of(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def titles_of(figure):
    return [axes.get_title() for axes in figure.axes if axes.images]


def some(b=6, c=3, h=5, w=7, seed=0):
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---------------------------------------------------------------------- pixels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_bytes_of_every_float(dtype):
    values = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, float("inf"), -float("inf")], dtype=dtype, requires_grad=True)
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 255, 0]


@pytest.mark.parametrize("images", [torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4).long()])
def test_integers_are_no_pictures(images):
    with pytest.raises((LDMError, TypeError)):  # TypeError: where shapes and types are checked at the call
        to_uint8(images)
    with pytest.raises((LDMError, TypeError)):
        show(images)


def test_nan_is_refused_everywhere(tmp_path):
    image = torch.full((3, 4, 4), float("nan"))
    for draw in (to_uint8, to_pil, show, lambda x: save(x, tmp_path / "x.png")):
        with pytest.raises(LDMError, match="nan"):
            draw(image)
    assert list(tmp_path.iterdir()) == []
    plt.close("all")


def test_every_byte_survives_a_file(tmp_path):
    values = (torch.arange(256) / 127.5 - 1).view(1, 16, 16).expand(3, -1, -1)
    save(values, tmp_path / "deep" / "x.png")
    read = np.array(Image.open(tmp_path / "deep" / "x.png"))
    assert read.shape == (16, 16, 3) and (read[..., 0].flatten() == np.arange(256)).all()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.png"]


def test_one_channel_is_grey_and_colours_come_last():
    assert to_pil(some(1, 1)).mode == "L" and to_pil(some(1, 3)).mode == "RGB"
    image = torch.stack([torch.full((2, 3), value) for value in (1.0, 0.0, -1.0)])
    assert to_pil(image).size == (3, 2) and to_pil(image).getpixel((2, 1)) == (255, 128, 0)


NO_PICTURES = [
    *(torch.zeros(shape) for shape in [(4, 4), (4, 4, 3), (2, 4, 4), (1, 4, 8, 8), (4,)]),
    *(torch.zeros(shape) for shape in [(0, 3, 4, 4), (1, 3, 0, 4), (1, 1, 3, 4, 4)]),
    [],
    [torch.zeros(1, 3, 4, 4)],
]


@pytest.mark.parametrize(
    "images",
    NO_PICTURES,
    ids=lambda images: str(tuple(images.shape)) if hasattr(images, "shape") else f"list of {len(images)}",
)
def test_what_is_no_picture_is_refused_by_name(images):
    for draw in (grid, show):
        with pytest.raises(LDMError, match="`images`"):
            draw(images)
    with pytest.raises(LDMError, match=r"rows\['here'\]"):
        show_rows({"fine": torch.zeros(3, 4, 4), "here": images})


def test_pil_wants_one():
    with pytest.raises(LDMError, match="`image` should be one image, not 2"):
        to_pil(some(2))


# ------------------------------------------------------------------------ grid


@pytest.mark.parametrize("seed", range(20))
def test_grid_puts_every_image_in_its_place(seed):
    b, c, h, w, columns, pad = torch.randint(1, 9, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
    images = some(b, 1 + 2 * (c % 2), h, w, seed)
    rows, across = -(-b // columns), min(b, columns)
    expected = torch.ones(3, pad + rows * (h + pad), pad + across * (w + pad))
    for i, image in enumerate(images):
        top, left = pad + i // columns * (h + pad), pad + i % columns * (w + pad)
        expected[:, top : top + h, left : left + w] = image
    assert torch.equal(grid(images, columns, pad), expected)
    assert torch.equal(grid(list(images.double()), columns, pad), expected)
    assert torch.equal(grid([image[:1] for image in images], columns, pad)[:1], expected[:1])


def test_grid_of_one_and_of_two_sizes():
    assert grid(some(1)).shape == (3, 5 + 4, 7 + 4) and torch.equal(grid(some(1)[0], pad=0), some(1)[0])
    with pytest.raises(LDMError, match="one size"):
        grid([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)])


@pytest.mark.parametrize(
    "name, said",
    [
        ("folder.png", "folder.png cannot be written: a folder stands in its place"),
        ("file/x.png", "file cannot be written: a file stands where a folder is needed"),
        ("x" * 300 + ".png", "cannot be written: the name is too long"),
        ("a\0b.png", "is no name that a file can have"),
    ],
    ids=["folder", "in a file", "long", "zero byte"],
)
def test_a_file_that_cannot_be_written_is_named(name, said, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("something")
    with pytest.raises(LDMError, match=said):
        save(torch.zeros(3, 8, 8), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_save_makes_a_grid_and_wants_a_known_format(tmp_path):
    save(some(6), tmp_path / "x.jpg")
    assert Image.open(tmp_path / "x.jpg").size == tuple(grid(some(6)).shape[:0:-1])
    for name in ("x", "x.docx", "png"):
        with pytest.raises(LDMError, match="`path`"):
            save(some(1), tmp_path / name)


# ------------------------------------------------------------------------ show


@pytest.mark.parametrize("columns, rows", [(None, 2), (4, 3), (1, 10), (99, 1)])
def test_show_lays_out_rows(figures, columns, rows):
    assert show(some(10), list("abcdefghij"), columns=columns) is None
    assert titles_of(figures[0]) == list("abcdefghij")
    assert figures[0].axes[0].get_gridspec().nrows == rows


def test_show_draws_the_bytes_themselves(figures):
    images = some(2)
    show(images)
    for drawn, image in zip(images_of(figures[0]), images):
        assert (np.asarray(drawn) == to_uint8(image).permute(1, 2, 0).numpy()).all()
    assert all(axes.images[0].get_interpolation() == "nearest" for axes in figures[0].axes)


def test_small_is_sharp_and_large_is_smoothed(figures):
    show([torch.zeros(3, 8, 8), torch.zeros(1, 999, 999)], scale=1)
    assert [axes.images[0].get_interpolation() for axes in figures[0].axes] == ["nearest", "antialiased"]


def test_titles_are_wrapped_and_counted(figures):
    show(some(1), ["a small red ball left of a big blue cube"], scale=1, suptitle="above")
    assert "\n" in titles_of(figures[0])[0] and figures[0]._suptitle.get_text() == "above"
    for titles in ([], ["one"], list("abc")):
        with pytest.raises(LDMError, match="`titles`"):
            show(some(2), titles)
        with pytest.raises(LDMError, match="`titles`"):
            show_rows({"a": some(2)}, titles)


def test_titles_of_any_kind(figures):
    show(some(2), torch.tensor([1, 2]).tolist())
    assert titles_of(figures[0]) == ["1", "2"]


def test_rows_of_different_length_and_size(figures):
    show_rows({"four": some(4), "one": torch.zeros(1, 16, 8), "": [torch.zeros(3, 2, 2)] * 2}, titles=list("abcd"))
    assert len(images_of(figures[0])) == 7
    assert [axes.get_ylabel() for axes in figures[0].axes if axes.get_ylabel()] == ["four", "one"]
    with pytest.raises(LDMError, match="`rows`"):
        show_rows({})


def drawn_sizes(figure):
    """Width and height of every image in inches, as it is drawn."""
    figure.canvas.draw()
    boxes = [axes.get_window_extent() for axes in figure.axes if axes.images]
    return [(box.width / figure.dpi, box.height / figure.dpi) for box in boxes]


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_labels_and_titles_take_no_room_from_the_images(figures, columns):
    """Rows of square images are equally large, whatever stands beside or above them, and no gap is between them."""
    rows = {
        "a": some(columns, h=8, w=8),
        "a label of some length": some(columns, h=8, w=8),
        "": some(columns, h=9, w=9),
    }
    show_rows(rows, ["a title of more than one line"] * columns)
    sizes = drawn_sizes(figures[0])
    widths = [width for width, _ in sizes]
    assert len(sizes) == 3 * columns and max(widths) - min(widths) < 0.03
    assert all(abs(width - height) < 0.03 for width, height in sizes)
    assert widths[0] > 0.85 * min(1.5, 7.5 / columns)


def test_nothing_stays_open():
    before = plt.get_fignums()
    show(some(2))
    show_rows({"a": some(2)})
    curve({"a": [1.0, 2.0]})
    assert plt.get_fignums() == before


def test_pictures_with_gradients_and_half_floats(figures):
    show(some(1).requires_grad_())
    show(some(1).half())
    show(some(1).bfloat16())
    assert len(figures) == 3


# ---------------------------------------------------------------------- curves


@pytest.mark.parametrize("width", [1, 2, 7, 50, 1000])
def test_running_mean_equals_the_obvious_one(width):
    values = torch.randn(100, generator=torch.Generator().manual_seed(width)).tolist()
    obvious = [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(100)]
    torch.testing.assert_close(running_mean(values, width), torch.tensor(obvious, dtype=torch.float64))


def test_running_mean_of_nothing():
    assert running_mean([], 3).shape == (0,)
    with pytest.raises(LDMError, match="width="):
        running_mean([1.0], 0)


def test_curves(figures):
    loss = [torch.tensor(1.0, requires_grad=True), torch.tensor(0.5)]
    two = {"loss": loss, "other": torch.tensor([3, 4])}
    curve(two, x=torch.tensor([0, 10]), xlabel="step", ylabel="loss", log=True)
    axes = figures[0].axes[0]
    assert [line.get_label() for line in axes.lines] == ["loss", "other"]
    assert axes.get_yscale() == "log" and (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    assert list(axes.lines[0].get_xdata()) == [0, 10] and list(axes.lines[0].get_ydata()) == [1.0, 0.5]


def test_smooth_draws_both(figures):
    curve({"a": [0.0, 2.0, 4.0]}, smooth=2)
    mean, raw = figures[0].axes[0].lines
    assert list(mean.get_ydata()) == [0, 1, 3] and list(raw.get_ydata()) == [0, 2, 4]


def test_curves_and_their_places_must_match():
    with pytest.raises(LDMError, match="curve 'a' has 2 values and `x` 3"):
        curve({"a": [1.0, 2.0]}, x=[1, 2, 3])
    assert not plt.get_fignums()


def test_gaps_and_empty_curves_are_no_error(figures):
    curve({"a": [1.0, math.nan, math.inf], "b": []})
    curve({})
    assert len(figures) == 2


# --------------------------------------------------------------------- sliders


@pytest.mark.parametrize(
    "slider, default, expected",
    [
        ((0, 100), None, [0, 25, 50, 75, 100]),
        ((0, 100), 99, [0, 25, 50, 75, 99]),
        ((0, 100, 30), None, [0, 30, 60, 90]),
        ((0, 14, 4), None, [0, 4, 8, 12]),
        ((0.0, 1.0), None, [0, 0.25, 0.5, 0.75, 1]),
        ((0.0, 1.0), 0.3, [0, 0.3, 0.5, 0.75, 1]),
        ((1, 2), None, [1, 2]),
        ([5], None, [5]),
        (list(range(10)), None, [0, 2, 4, 7, 9]),
        (list("abcdefgh"), "b", ["b", "c", "e", "f", "h"]),
        (True, None, [False, True]),
    ],
)
def test_stops(slider, default, expected):
    assert stops(slider, default) == expected


@pytest.mark.parametrize("slider", [(5, 1), (1, 1), (1,), (1, 2, 3, 4), ("a", "b"), [], "abc", None, 3])
def test_what_is_no_slider(slider):
    with pytest.raises(LDMError, match="slider `a`"):
        explore(lambda a=1: None, a=slider)


def test_a_static_explore_draws_a_row_for_each_slider(figures):
    calls = []

    def fn(f=2, on=False, gain=0.3):
        calls.append((f, on, gain))
        return some(2)[:, :, ::f, ::f] * gain

    assert explore(fn, f=[1, 2], on=True, gain=(0.0, 1.0)) is None
    expected = ["f = 1", "f = 2", "on = False", "on = True"] + [f"gain = {g}" for g in (0.0, 0.3, 0.5, 0.75, 1.0)]
    assert titles_of(figures[0]) == expected and len(figures) == 1
    assert (2, False, 0.75) in calls and (1, False, 0.3) in calls  # the others stay where they start


def test_a_function_that_draws_for_itself_is_called_once():
    calls = []
    explore(lambda t=3: calls.append(t), t=(0, 9))
    assert calls == [3]


def test_a_slider_may_be_called_anything(figures):
    explore(lambda fn, sliders: some(1)[0], fn=[1, 2], sliders=(0, 3))
    assert titles_of(figures[0])[:2] == ["fn = 1", "fn = 2"]


def test_sliders_must_fit_the_function():
    with pytest.raises(LDMError, match="`b` is no argument.*it has a"):
        explore(lambda a=1: None, b=(0, 1))
    for slider in ((2, 5), [2, 5]):
        with pytest.raises(LDMError, match="does not reach the function's default, 1"):
            explore(lambda a=1: None, a=slider)


def test_a_live_explore_has_sliders_that_call(monkeypatch, figures):
    import ipywidgets

    shown = []
    monkeypatch.setattr(display, "is_static", lambda: False)
    calls = []

    def fn(t=3, s=0.5, kind="a", on=False, k=0):
        calls.append((t, s, kind, on, k))
        return some(1)[0]

    with patch("IPython.display.display", lambda *widgets: shown.extend(widgets)):
        explore(fn, t=(0, 9), s=(0.0, 1.0), kind=["a", "b"], on=True, k=(0, 10, 5))
    kinds = [ipywidgets.IntSlider, ipywidgets.FloatSlider, ipywidgets.SelectionSlider, ipywidgets.Checkbox]
    assert [type(widget) for widget in shown[:4]] == kinds and shown[4].step == 5
    assert calls == [(3, 0.5, "a", False, 0)]
    assert [widget.description for widget in shown[:5]] == ["t", "s", "kind", "on", "k"]
    shown[0].value = 8
    shown[3].value = True
    assert calls[1:] == [(8, 0.5, "a", False, 0), (8, 0.5, "a", True, 0)] and len(figures) == 3


def test_nothing_heavy_is_imported():
    code = (
        "import sys, ldm_edu.settings, ldm_edu.display;"
        "heavy = {'matplotlib', 'IPython', 'ipywidgets', 'transformers', 'lpips', 'torchvision'};"
        "found = heavy & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("wrong", [{"columns": 0}, {"columns": -1}, {"columns": True}, {"pad": -1}, {"pad": 1.5}])
def test_a_grid_names_the_number_that_is_wrong(wrong):
    for many in (some(1), some(3)):
        with pytest.raises((LDMError, TypeError), match=next(iter(wrong))):
            grid(many, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"columns": 0}, {"columns": -1}, *({"scale": scale} for scale in (0, -1, math.nan, math.inf, 1e9))],
)
def test_a_figure_names_the_number_that_is_wrong(wrong, figures):
    with pytest.raises((LDMError, TypeError), match=next(iter(wrong))):
        show(some(3), **wrong)
    assert not figures


@pytest.mark.parametrize("values", [["x"], torch.zeros(2, 2), [None]], ids=str)
def test_a_curve_is_of_numbers(values, figures):
    with pytest.raises((LDMError, TypeError), match="numbers"):
        curve({"loss": values})
    assert not figures and not plt.get_fignums()


@pytest.mark.parametrize("smooth", [0, -1, 1.5, True])
def test_a_curve_is_smoothed_over_a_whole_number_of_values(smooth, figures):
    with pytest.raises((LDMError, TypeError), match="smooth"):
        curve({"loss": [1, 2]}, smooth=smooth)


def test_a_format_that_can_only_be_read_is_no_format_to_save_in(tmp_path):
    with pytest.raises(LDMError, match="should end in .png or .jpg: 'a.psd'"):
        save(some(1), tmp_path / "a.psd")
    assert not list(tmp_path.iterdir())
