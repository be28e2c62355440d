"""ldm-edu upscale, inpaint and draw: files of all kinds, what is written, what is refused and in which words."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ldm_edu import (
    AutoencoderKL,
    Conditioner,
    InpaintingConditioner,
    LatentDiffusion,
    MapConditioner,
    MergedConditioner,
    NoiseSchedule,
    TextConditioner,
    UNet,
    draw,
    upscale,
)
from ldm_edu.checkpoints import PRETRAINED
from ldm_edu.cli import app
from ldm_edu.data.images import from_uint8
from ldm_edu.display import to_pil

SENTENCE = "the shipped models know only the drawn faces and scenes of the course"
COMMANDS = ["upscale", "inpaint", "draw"]


def small(conditioner: Conditioner, stage: AutoencoderKL) -> LatentDiffusion:
    slots = {name: getattr(conditioner, name) for name in ("context_dim", "concat_channels", "vector_dim")}
    unet = UNet(2, 2, 32, (1,), 1, (1,), 32, **slots)
    with torch.no_grad():
        for p in [*unet.parameters(), *conditioner.parameters()]:
            if not p.any():
                p.normal_(std=0.1)
    return LatentDiffusion(stage, unet, NoiseSchedule(T=50), conditioner, size=16).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with three untrained models: upscale, inpaint, draw."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    shape = dict(multipliers=(1, 1, 1), blocks=1, latent_channels=2, attention=False, groups=4)
    stage = AutoencoderKL(channels=8, **shape)
    parts = [
        MapConditioner("segmentation", classes=4, factor=4, has_null=True),
        MapConditioner("depth", channels=1, factor=4, per_image=True, has_null=True),
        TextConditioner(["red", "ball"], length=4, dim=16, depth=1, heads=2),
    ]
    small(MapConditioner("low_resolution"), stage).save_pretrained(folder / "upscale")
    small(InpaintingConditioner(stage), stage).save_pretrained(folder / "inpaint")
    small(MergedConditioner(parts), stage).save_pretrained(folder / "draw")
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ask(models):
    """Run a command with its small model, as a user types it."""

    def run(command: str, *words, model: object = None, steps: int = 2, device: str = "cpu"):
        named = models / command if model is None else model
        typed = [command, *words, "--model", named, "--steps", steps, "--device", device]
        return CliRunner().invoke(app, [str(word) for word in typed])

    return run


@pytest.fixture
def no_model(monkeypatch):
    """No model is loaded: whoever tries fails."""

    def load(*_, **__):
        raise AssertionError("loaded a model before it was known whether there is anything to do")

    monkeypatch.setattr("ldm_edu.cli.LatentDiffusion.from_pretrained", load)


def done(result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def one_line(result) -> str:
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert result.output.startswith("ldm-edu: ") and len(result.output.strip().splitlines()) == 1, result.output
    assert not result.stdout
    return result.output.strip()


def bytes_of(*shape: int, most: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most, shape, dtype=np.uint8)


def photo(name: str = "photo.png", h: int = 12, w: int = 9, **how) -> np.ndarray:
    pixels = bytes_of(h, w, 3)
    Image.fromarray(pixels).save(name, **how)
    return pixels


def black_and_white(h: int = 12, w: int = 9) -> np.ndarray:
    mask = np.zeros((h, w), np.uint8)
    mask[2:7, 3:8] = 255
    return mask


def pixels_of(name: str) -> np.ndarray:
    with Image.open(name) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.array(image)


# ---- upscale


def test_a_picture_becomes_four_times_larger(ask, work, models):
    pixels = photo()
    assert done(ask("upscale", "photo.png", "--seed", 3)) == "1 image of 36 × 48 pixels in upscaled.png\n"
    x = from_uint8(torch.from_numpy(pixels).permute(2, 0, 1))[None]
    expected = upscale(LatentDiffusion.from_pretrained(models / "upscale"), x, steps=2, seed=3)
    assert np.array_equal(pixels_of("upscaled.png"), np.array(to_pil(expected)))


def test_seed_and_sampler_change_the_picture(ask, work):
    photo()
    for name, more in {"a": (), "b": (), "c": ("--seed", 1), "d": ("--sampler", "ddpm")}.items():
        done(ask("upscale", "photo.png", "--out", f"deep/er/{name}.png", *more))
    a, b, c, d = (Path(f"deep/er/{name}.png").read_bytes() for name in "abcd")
    assert a == b and len({a, c, d}) == 3


KINDS = {
    "1": lambda: Image.fromarray(bytes_of(12, 9) > 127),
    "L": lambda: Image.fromarray(bytes_of(12, 9)),
    "P": lambda: Image.fromarray(bytes_of(12, 9, 3)).convert("P", palette=Image.Palette.ADAPTIVE),
    "RGB": lambda: Image.fromarray(bytes_of(12, 9, 3)),
    "RGBA": lambda: Image.fromarray(bytes_of(12, 9, 4)),
    "LA": lambda: Image.fromarray(bytes_of(12, 9, 4)).convert("LA"),
    "I;16": lambda: Image.fromarray(bytes_of(12, 9).astype(np.uint16) * 257),
}


@pytest.mark.parametrize("mode", KINDS)
def test_a_picture_may_be_of_any_mode(ask, work, mode):
    image = KINDS[mode]()
    assert image.mode == mode
    image.save("photo.png")
    assert "36 × 48" in done(ask("upscale", "photo.png"))


def test_a_picture_is_turned_upright(ask, work):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo(exif=exif)
    assert "1 image of 48 × 36 pixels" in done(ask("upscale", "photo.png"))
    turned = pixels_of("upscaled.png")
    with Image.open("photo.png") as image:
        image.transpose(Image.Transpose.ROTATE_270).save("upright.png", exif=b"")
    done(ask("upscale", "upright.png", "--out", "other.png"))
    assert np.array_equal(turned, pixels_of("other.png"))


# ---- inpaint


@pytest.mark.parametrize("h, w", [(12, 9), (16, 16)])
def test_the_known_pixels_are_those_of_the_file(ask, work, h, w):
    pixels, mask = photo(h=h, w=w), black_and_white(h, w)
    Image.fromarray(mask).save("mask.png")
    assert f"1 image of {w} × {h} pixels in inpainted.png" in done(ask("inpaint", "photo.png", "--mask", "mask.png"))
    found = pixels_of("inpainted.png")
    assert np.array_equal(found[mask == 0], pixels[mask == 0]) and not np.array_equal(found, pixels)


def test_several_fillings_become_a_grid(ask, work):
    pixels, mask = photo(), black_and_white()
    Image.fromarray(mask).save("mask.png")
    assert "3 images of 9 × 12 pixels" in done(ask("inpaint", "photo.png", "--mask", "mask.png", "-n", 3, "--seed", 4))
    several = pixels_of("inpainted.png")
    found = [several[2:14, 2 + 11 * i : 11 + 11 * i] for i in range(3)]
    assert several.shape == (16, 35, 3) and all(np.array_equal(one[mask == 0], pixels[mask == 0]) for one in found)
    assert len({one.tobytes() for one in found}) == 3
    done(ask("inpaint", "photo.png", "--mask", "mask.png", "--seed", 5, "--out", "one.png"))
    assert np.abs(pixels_of("one.png").astype(int) - found[1]).max() <= 1


MASKS = {
    "1": lambda mask: Image.fromarray(mask > 0),
    "L": lambda mask: Image.fromarray(mask),
    "nearly": lambda mask: Image.fromarray(np.where(mask > 0, 128, 127).astype(np.uint8)),
    "P": lambda mask: Image.fromarray(mask).convert("RGB").convert("P"),
    "RGB": lambda mask: Image.fromarray(mask).convert("RGB"),
    "RGBA": lambda mask: Image.fromarray(mask).convert("RGBA"),
    "LA": lambda mask: Image.fromarray(mask).convert("LA"),
    "I;16": lambda mask: Image.fromarray(mask.astype(np.uint16) * 257),
}


@pytest.mark.parametrize("mode", MASKS)
def test_a_mask_may_be_of_any_mode_without_colours(ask, work, mode):
    photo()
    mask = black_and_white()
    Image.fromarray(mask).save("plain.png")
    MASKS[mode](mask).save("mask.png")
    done(ask("inpaint", "photo.png", "--mask", "plain.png", "--out", "plain_out.png"))
    done(ask("inpaint", "photo.png", "--mask", "mask.png"))
    assert np.array_equal(pixels_of("inpainted.png"), pixels_of("plain_out.png"))


def test_a_mask_saved_as_jpeg_is_read_and_one_all_white_too(ask, work):
    photo()
    Image.fromarray(black_and_white()).convert("RGB").save("mask.jpg")
    done(ask("inpaint", "photo.png", "--mask", "mask.jpg"))
    Image.new("L", (9, 12), 255).save("white.png")
    done(ask("inpaint", "photo.png", "--mask", "white.png"))


def test_a_mask_is_turned_upright_as_its_picture_is(ask, work):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels, mask = photo(exif=exif), black_and_white()
    Image.fromarray(mask).save("mask.png", exif=exif)
    done(ask("inpaint", "photo.png", "--mask", "mask.png"))
    found = np.rot90(pixels_of("inpainted.png"))  # back again
    assert found.shape == (12, 9, 3) and np.array_equal(found[mask == 0], pixels[mask == 0])


def coloured(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([mask, np.zeros_like(mask), mask], -1))


def seen_through(mask: np.ndarray) -> Image.Image:
    image = Image.new("RGBA", (9, 12), "white")
    image.putalpha(Image.fromarray(mask))
    return image


WRONG_MASKS = {
    "colours": (coloured, "mask.png has colours, but a mask is black and white, white where the picture is missing"),
    "transparent": (seen_through, "mask.png has transparent parts, which say nothing in a mask"),
    "black": (lambda mask: Image.fromarray(0 * mask), "mask.png hides nothing: a mask is black and white"),
    "dark": (lambda mask: Image.fromarray(mask // 255), "but its largest value is 1 of 255"),
    "smaller": (lambda mask: Image.fromarray(mask[:-1]), "photo.png has 9 × 12 pixels and mask.png has 9 × 11 pixels"),
    "turned": (lambda mask: Image.fromarray(mask.T), "mask.png has 12 × 9 pixels"),
}


@pytest.mark.parametrize("kind", WRONG_MASKS)
def test_a_mask_that_says_nothing_is_refused_before_a_model_is_loaded(ask, work, no_model, kind):
    made, said = WRONG_MASKS[kind]
    photo()
    made(black_and_white()).save("mask.png")
    assert said in one_line(ask("inpaint", "photo.png", "--mask", "mask.png"))
    assert sorted(path.name for path in work.iterdir()) == ["mask.png", "photo.png"]


def test_a_mask_of_fractions_is_refused(ask, work, no_model):
    photo()
    Image.fromarray(black_and_white().astype(np.float32)).save("mask.tiff")
    assert "mask.tiff has values outside of 8 and 16 bits" in one_line(
        ask("inpaint", "photo.png", "--mask", "mask.tiff")
    )


# ---- draw


def ids(h: int = 12, w: int = 9) -> np.ndarray:
    return bytes_of(h, w, most=4)


def palette(values: np.ndarray) -> Image.Image:
    image = Image.fromarray(values).copy()
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200, 90, 90, 90])  # turns L into P
    return image


SEGMENTATIONS = {
    "L": lambda x: Image.fromarray(x),
    "P": palette,
    "I;16": lambda x: Image.fromarray(x.astype(np.uint16)),
    "1": lambda x: Image.fromarray(x % 2 > 0),
}


@pytest.mark.parametrize("mode", SEGMENTATIONS)
def test_the_values_of_a_segmentation_are_class_ids(ask, work, models, mode):
    image = SEGMENTATIONS[mode](ids())
    assert image.mode == mode
    image.save("map.png")
    assert "1 image of 9 × 12 pixels in drawn.png" in done(ask("draw", "--segmentation", "map.png", "--seed", 2))
    x = torch.from_numpy(ids() % 2 if mode == "1" else ids()).long()[None]
    expected = draw(LatentDiffusion.from_pretrained(models / "draw"), {"segmentation": x}, steps=2, seed=2)
    assert np.array_equal(pixels_of("drawn.png"), np.array(to_pil(expected)))


DEPTHS = {
    "L.png": lambda x: Image.fromarray(x),
    "RGB.png": lambda x: Image.fromarray(x).convert("RGB"),
    "I16.png": lambda x: Image.fromarray(x.astype(np.uint16) * 200),
    "F.tiff": lambda x: Image.fromarray(x.astype(np.float32) * 0.01 + 3),
    "I.tiff": lambda x: Image.fromarray(x.astype(np.int32) * 70_000),
    "I16.tiff": lambda x: Image.fromarray(x.astype(np.uint16)),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_only_the_ratios_of_depths_count(ask, work, models, name):
    values = bytes_of(12, 9)
    DEPTHS[name](values).save(name)
    done(ask("draw", "red ball", "--depth", name, "--scale", 2))
    x = torch.from_numpy(values.astype(np.float32))[None, None]
    expected = draw(LatentDiffusion.from_pretrained(models / "draw"), {"depth": x}, "red ball", steps=2, scale=2.0)
    difference = pixels_of("drawn.png").astype(int) - np.array(to_pil(expected))
    assert np.abs(difference).max() <= 1
    done(ask("draw", "red ball", "--scale", 2, "--out", "without.png"))
    assert pixels_of("without.png").shape == (16, 16, 3)


def test_maps_are_turned_upright(ask, work):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ids()).save("map.png", exif=exif)
    Image.fromarray(bytes_of(12, 9)).convert("RGB").save("depth.png", exif=exif)
    assert "of 12 × 9 pixels" in done(ask("draw", "--segmentation", "map.png", "--depth", "depth.png"))
    Image.fromarray(np.rot90(ids(), -1).copy()).save("map2.png")
    Image.fromarray(np.rot90(bytes_of(12, 9), -1).copy()).save("depth2.png")
    done(ask("draw", "--segmentation", "map2.png", "--depth", "depth2.png", "--out", "upright.png"))
    assert np.array_equal(pixels_of("drawn.png"), pixels_of("upright.png"))


def test_everything_together_and_several_times(ask, work):
    Image.fromarray(ids()).save("map.png")
    Image.fromarray(bytes_of(12, 9)).save("depth.png")
    words = ("red", "--segmentation", "map.png", "--depth", "depth.png")
    assert "2 images of 9 × 12 pixels in drawn.png" in done(ask("draw", *words, "-n", 2, "--batch-size", 1))
    assert pixels_of("drawn.png").shape == (16, 24, 3)


WRONG_MAPS = {
    "colours": (
        "segmentation",
        lambda: Image.fromarray(bytes_of(12, 9, 3)),
        "map.png is of mode RGB, but a segmentation",
    ),
    "transparent": ("segmentation", lambda: Image.fromarray(bytes_of(12, 9, 4)), "is of mode RGBA, but a segmentation"),
    "classes": (
        "segmentation",
        lambda: Image.fromarray(ids() + 5),
        "map.png holds the class 8, but this model knows 4 cl",
    ),
    "coloured depth": (
        "depth",
        lambda: Image.fromarray(bytes_of(12, 9, 3)),
        "map.png has colours, but a depth map is grey",
    ),
    "depth in alpha": ("depth", lambda: seen_through(black_and_white()), "map.png has transparent parts"),
}


@pytest.mark.parametrize("kind", WRONG_MAPS)
def test_a_map_of_another_kind_is_refused(ask, work, kind):
    option, made, said = WRONG_MAPS[kind]
    made().save("map.png")
    line = one_line(ask("draw", "red", f"--{option}", "map.png"))
    assert said in line and (option == "depth" or "4 classes, 0 to 3" in line)
    assert [path.name for path in work.iterdir()] == ["map.png"]


def test_files_that_change_or_lack_values_are_refused(ask, work):
    Image.fromarray(ids()).save("map.jpg")
    assert "map.jpg is a JPEG, which changes values a little" in one_line(ask("draw", "--segmentation", "map.jpg"))
    Image.fromarray(ids().astype(np.float32)).save("map.tiff")
    assert "map.tiff is of mode F, but a segmentation" in one_line(ask("draw", "--segmentation", "map.tiff"))
    Image.fromarray(np.full((12, 9), np.nan, np.float32)).save("depth.tiff")
    assert "depth.tiff holds values that are not finite" in one_line(ask("draw", "--depth", "depth.tiff"))


def test_maps_of_two_sizes_are_refused(ask, work):
    Image.fromarray(ids()).save("map.png")
    Image.fromarray(bytes_of(9, 12)).save("depth.png")
    line = one_line(ask("draw", "--segmentation", "map.png", "--depth", "depth.png"))
    assert "segmentation is 12 × 9, depth is 9 × 12" in line


def test_nothing_to_draw_is_refused_before_a_model_is_loaded(ask, work, no_model):
    assert "nothing says what to draw: give a caption, --segmentation" in one_line(ask("draw"))


def test_a_map_or_a_word_that_the_model_does_not_know_is_named(ask, work, models):
    Image.fromarray(ids()).save("map.png")
    assert "not in the vocabulary: dgo" in one_line(ask("draw", "red dgo"))
    line = one_line(ask("draw", "--segmentation", "map.png", model=models / "upscale"))
    assert "maps: 'segmentation' is no map that this model reads; it reads low_resolution" in line


# ---- what all three refuse


def words_for(command: str) -> list[str]:
    """A request that is sound, with the files that it needs."""
    photo()
    Image.fromarray(black_and_white()).save("mask.png")
    Image.fromarray(ids()).save("map.png")
    return {
        "upscale": ["photo.png"],
        "inpaint": ["photo.png", "--mask", "mask.png"],
        "draw": ["red", "--segmentation", "map.png"],
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "more, said",
    [
        (("--seed", -1), "--seed=-1 should be a whole number"),
        (("--seed", 2**32), "--seed=4294967296 should be"),
        (("--sampler", "euler"), "--sampler='euler' is not known; it can be 'ddim'"),
        (("--out", "x.jpg"), "--out x.jpg: images are saved as PNG"),
        (("--out", "photo.png/x.png"), "a file stands where a folder is needed"),
    ],
)
def test_numbers_and_names_are_checked_before_a_model_is_loaded(ask, work, no_model, command, more, said):
    assert said in one_line(ask(command, *words_for(command), *more))
    assert "--steps=0 should be" in one_line(ask(command, *words_for(command), steps=0))


@pytest.mark.parametrize("command", ["inpaint", "draw"])
def test_the_number_of_images_is_checked_before_a_model_is_loaded(ask, work, no_model, command):
    for n in (0, 10**9):
        assert f"--n={n} should be a whole number, 1 to 10000" in one_line(ask(command, *words_for(command), "-n", n))
    for name in ("photo.png", "mask.png", "map.png"):
        Image.new("L", (1024, 1024), 255).save(name)
    words = {"inpaint": ["photo.png", "--mask", "mask.png"], "draw": ["--segmentation", "map.png"]}[command]
    assert "--n=342 should be a whole number, 1 to 341" in one_line(ask(command, *words, "-n", 342))


def test_the_scale_is_checked_before_a_model_is_loaded(ask, work, no_model):
    assert "--scale=nan should be a finite number" in one_line(ask("draw", "red", "--scale", "nan"))


SIZES = {"too long": (2049, 1), "too large": (1025, 1024)}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["missing", "no image", "empty", "cut off", "folder", "too long", "too large"])
def test_a_file_that_is_no_picture_is_named_before_a_model_is_loaded(ask, work, no_model, command, kind):
    words = words_for(command)
    name = words[-1]
    content = Path(name).read_bytes()
    Path(name).unlink()
    if kind == "folder":
        Path(name).mkdir()
    elif kind in SIZES:
        Image.new("L", SIZES[kind]).save(name)
    elif kind != "missing":
        Path(name).write_bytes({"no image": b"something", "empty": b"", "cut off": content[:30]}[kind])
    line = one_line(ask(command, *words))
    assert name in line and (kind not in SIZES or "the limit is 2048 along a side and 1,048,576 in all" in line)


def test_a_result_that_would_be_too_large_is_refused(ask, work):
    for w, h in ((513, 2), (257, 256)):
        Image.new("RGB", (w, h)).save("wide.png")
        line = one_line(ask("upscale", "wide.png"))
        assert (
            f"wide.png has {w} × {h} pixels, and would have {4 * w} × {4 * h}; the limit is 2048 along a side" in line
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_no_file_that_is_read_is_replaced(ask, work, no_model, command):
    words = words_for(command)
    for name in [word for word in words if word.endswith(".png")]:
        before = Path(name).read_bytes()
        assert f"--out {name}: that is {name} itself" in one_line(ask(command, *words, "--out", name))
        assert Path(name).read_bytes() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_an_older_result_survives_a_failure(ask, work, command, monkeypatch, models):
    words = words_for(command)
    Path("old.png").write_bytes(b"an older result")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    assert "euler" in one_line(ask(command, *words, "--out", "old.png", "--sampler", "euler"))
    assert "tpu" in one_line(ask(command, *words, "--out", "old.png", device="tpu"))
    assert "nowhere" in one_line(ask(command, *words, "--out", "old.png", model="nowhere"))
    other = models / ("draw" if command == "inpaint" else "inpaint")
    assert "reads" in one_line(ask(command, *words, "--out", "old.png", model=other))
    assert "steps=51" in one_line(ask(command, *words, "--out", "old.png", steps=51))
    with monkeypatch.context() as broken:
        broken.setattr(Image.Image, "save", fail)
        assert "old.png cannot be written" in one_line(ask(command, *words, "--out", "old.png"))
    assert Path("old.png").read_bytes() == b"an older result"
    assert not [path.name for path in work.iterdir() if path.name.startswith(".")]
    done(ask(command, *words, "--out", "old.png"))
    assert pixels_of("old.png").ndim == 3


# ---- words


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_says_what_the_shipped_models_know(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "250"})
    assert result.exit_code == 0 and SENTENCE in result.output.replace("The shipped", "the shipped")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_of_ones_own_is_not_taken_for_a_shipped_one(ask, work, command):
    assert SENTENCE not in done(ask(command, *words_for(command)))


def test_a_model_of_the_hub_or_in_a_folder_of_a_shipped_name_is_no_shipped_one(ask, work, models, monkeypatch):
    photo()
    model = LatentDiffusion.from_pretrained(models / "upscale")
    model.save_pretrained("toy-text2image")
    assert SENTENCE not in done(ask("upscale", "photo.png", model="toy-text2image"))
    monkeypatch.setattr("ldm_edu.cli.LatentDiffusion.from_pretrained", lambda name: model)
    assert SENTENCE not in done(ask("upscale", "photo.png", model="somebody/model"))


def test_a_shipped_model_is_told_from_others(ask, work):
    Image.fromarray(bytes_of(64, 64)).save("depth.png")
    for model in ("toy-maps", PRETRAINED / "toy-maps"):
        output = done(ask("draw", "--depth", "depth.png", model=model, steps=1))
        assert output.splitlines()[0] == "1 image of 64 × 64 pixels in drawn.png" and output.count(SENTENCE) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_the_shipped_model_is_the_default(work, command):
    typed = [command, *words_for(command), "--steps", "1", "--device", "cpu", "--out", "out.png"]
    typed = ["a red ball" if word == "red" else word for word in typed]
    assert SENTENCE in done(CliRunner().invoke(app, typed))
    assert pixels_of("out.png").shape == ((48, 36, 3) if command == "upscale" else (12, 9, 3))


def test_classes_of_the_shipped_model_are_told_by_name(work):
    if not (PRETRAINED / "toy-maps").is_dir():
        pytest.skip("toy-maps is not among the shipped checkpoints")
    Image.fromarray(ids() + 7).save("map.png")
    line = one_line(CliRunner().invoke(app, ["draw", "--segmentation", "map.png"]))
    assert "4 classes: 0 floor, 1 sphere, 2 cube, 3 cylinder" in line
