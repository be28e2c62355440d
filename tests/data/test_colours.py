"""Colour profiles in image files: followed, skipped where they change nothing, ignored where they are broken."""

import struct
import zlib
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm_edu.data import images
from ldm_edu.data.images import read_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
# X, Y and Z of red, green and blue, seen under the light of all profiles (D50).
PRIMARIES = {
    "sRGB": ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)),
    "Display P3": ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)),
    "Adobe RGB": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)),
}
COLOURS = [(200, 40, 40), (40, 160, 60), (60, 80, 200), (230, 170, 140), (128, 128, 128), (255, 255, 255), (0, 0, 0)]


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    """A colour profile (ICC, version 2) with these tags, byte by byte."""
    tags = {b"wtpt": xyz((0.9642, 1.0, 0.8249)), b"cprt": b"text\0\0\0\0none\0", **tags}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    table, content, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += name + struct.pack(">II", start + len(content), len(tag))
        content += tag
    head = struct.pack(">I4sI4s4s4s", start + len(content), b"lcms", 0x02100000, kind, space, pcs)
    head += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + xyz((0.9642, 1.0, 0.8249))[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


def xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * v) for v in values))


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma))


def rgb_profile(name: str, gamma: float = 2.2) -> bytes:
    red, green, blue = map(xyz, PRIMARIES[name])
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma))
    return profile(b"RGB ", {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, **curves})


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": curve(gamma)})


@cache
def cmyk_profile() -> bytes:
    """Inks whose overprints have colours between the paper and black, as a table of 2 x 2 x 2 x 2 entries."""
    corners = []
    for c, m, y, k in np.ndindex(2, 2, 2, 2):
        lightness = 100 - 30 * c - 40 * m - 8 * y - 90 * k
        corners += [max(lightness, 0), (-30 * c + 60 * m) * (1 - k), (-40 * c + 70 * y) * (1 - k)]
    lab = np.array(corners).reshape(16, 3) * (2.55, 1, 1) + (0, 128, 128)
    head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *np.eye(3, dtype=int).reshape(-1) * 65536)
    ramp = bytes(range(256))
    table = head + 4 * ramp + lab.round().clip(0, 255).astype(np.uint8).tobytes() + 3 * ramp
    return profile(b"CMYK", {b"A2B0": table}, kind=b"prtr", pcs=b"Lab ")


def palette(*colours: tuple[int, int, int]) -> Image.Image:
    """Fields of 8 x 8 pixels side by side."""
    picture = Image.new("RGB", (8 * len(colours), 8))
    for i, colour in enumerate(colours):
        picture.paste(colour, (8 * i, 0, 8 * i + 8, 8))
    return picture


def converted(picture: Image.Image, to: bytes, mode: str = "RGB") -> Image.Image:
    """The picture's colours in the numbers of another profile, for a file that carries the profile."""
    return ImageCms.profileToProfile(picture, SRGB, profile_of(to), outputMode=mode)


def profile_of(content: bytes) -> ImageCms.ImageCmsProfile:
    import io

    return ImageCms.ImageCmsProfile(io.BytesIO(content))


def seen(path) -> np.ndarray:
    """The colour in the middle of each field."""
    return np.asarray(read_image(path))[4, 4::8].astype(int)


@pytest.mark.parametrize("name", ["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("suffix, options", [
    ("png", {}), ("jpg", {"quality": 98, "subsampling": 0}), ("webp", {"lossless": True}), ("tif", {}),
])  # fmt: skip
def test_wide_colours_become_those_that_were_meant(tmp_path, name, suffix, options):
    icc = rgb_profile(name)
    picture = converted(palette(*COLOURS), icc)
    assert np.abs(np.asarray(picture).astype(int) - palette(*COLOURS)).max() > 10  # other numbers for the same colours
    picture.save(tmp_path / f"a.{suffix}", icc_profile=icc, **options)
    assert np.abs(seen(tmp_path / f"a.{suffix}") - COLOURS).max() <= 3


def test_profiles_of_transparent_pictures_and_palettes(tmp_path):
    icc = rgb_profile("Display P3")
    picture = converted(palette(*COLOURS), icc)
    indexed = picture.quantize(16)
    indexed.save(tmp_path / "palette.png", icc_profile=icc)
    assert np.abs(seen(tmp_path / "palette.png") - COLOURS).max() <= 3
    clear = picture.convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 255))
    clear.paste((9, 9, 9, 0), (0, 0, 8, 8))
    clear.save(tmp_path / "clear.png", icc_profile=icc)
    assert np.abs(seen(tmp_path / "clear.png") - [(255, 255, 255), *COLOURS[1:]]).max() <= 3


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
def test_grey_profiles(tmp_path, mode):
    """A grey of gamma 1 says how much light there is: a half of it looks as the value 188 does."""
    values = (0, 255) if mode == "1" else (0, 55, 128, 255)
    meant = [
        round(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in np.array(values) / 255
    ]
    picture = palette(*((v, v, v) for v in values)).convert("L")
    deep = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    (deep if mode == "I;16" else picture.convert(mode)).save(tmp_path / "a.png", icc_profile=grey_profile(1.0))
    found = seen(tmp_path / "a.png")
    assert np.abs(found - np.array(meant)[:, None]).max() <= 1


def test_a_grey_picture_with_a_profile_of_colours_takes_its_greys(tmp_path):
    palette((64,) * 3, (128,) * 3).convert("L").save(tmp_path / "a.jpg", icc_profile=rgb_profile("Adobe RGB", 1.0))
    assert np.abs(seen(tmp_path / "a.jpg") - [[137] * 3, [188] * 3]).max() <= 2


def test_inks_by_their_profile(tmp_path):
    inks = [(0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 0), (0, 255, 255, 0)]
    picture = Image.new("CMYK", (32, 8))
    for i, ink in enumerate(inks):
        picture.paste(ink, (8 * i, 0, 8 * i + 8, 8))
    picture.save(tmp_path / "a.tif", icc_profile=cmyk_profile())
    paper, black, cyan, red = seen(tmp_path / "a.tif").tolist()
    assert min(paper) >= 250 and max(black) <= 40
    assert cyan[0] < cyan[1] < cyan[2] and cyan[2] > 200 and red[0] > 150 > red[1] and red[2] < 60
    picture.save(tmp_path / "plain.tif")
    assert seen(tmp_path / "plain.tif").tolist() == [[255] * 3, [0] * 3, [0, 255, 255], [255, 0, 0]]


@pytest.mark.parametrize("icc", [SRGB.tobytes(), None], ids=["sRGB", "none"])
def test_pictures_in_srgb_stay_as_they_are(tmp_path, icc, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.png", icc_profile=icc)
    assert np.array_equal(read_image(tmp_path / "a.png"), noise)
    if icc is None:
        monkeypatch.setattr(images, "_to_srgb", None)  # nobody asks
        assert np.array_equal(read_image(tmp_path / "a.png"), noise)
    else:
        assert images._to_srgb(icc) is None  # nothing is converted


BROKEN = {
    "garbage": b"no profile",
    "nothing": b"",
    "cut off": rgb_profile("Display P3")[:200],
    "of another kind of picture": grey_profile(1.0),
    "of inks": cmyk_profile(),
    "without its tables": profile(b"RGB ", {}),
    "of an unknown space": rgb_profile("Display P3").replace(b"RGB ", b"HUH "),
    "zeros": bytes(5000),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_broken_profile_is_ignored(tmp_path, kind, suffix):
    palette(*COLOURS).save(tmp_path / f"a.{suffix}", icc_profile=BROKEN[kind])
    assert np.array_equal(seen(tmp_path / f"a.{suffix}"), COLOURS)


def test_damaged_profiles_never_lose_a_picture(tmp_path):
    rng, icc = np.random.default_rng(0), rgb_profile("Display P3")
    for i in range(100):
        damaged = bytearray(icc)
        for place in rng.integers(0, len(icc), 4):
            damaged[place] = rng.integers(256)
        palette(*COLOURS).save(tmp_path / "a.png", icc_profile=bytes(damaged))
        assert read_image(tmp_path / "a.png").size == (56, 8), i


def test_a_picture_that_was_read_does_not_carry_its_old_profile(tmp_path):
    """It would be converted a second time, whenever it is saved and read again."""
    icc = rgb_profile("Adobe RGB")
    converted(palette(*COLOURS), icc).save(tmp_path / "a.png", icc_profile=icc)
    for i in range(3):
        read_image(tmp_path / "a.png").save(tmp_path / "a.png")
        assert np.abs(seen(tmp_path / "a.png") - COLOURS).max() <= 3, i
    palette(*COLOURS).save(tmp_path / "b.png", icc_profile=grey_profile(1.0))
    assert "icc_profile" not in read_image(tmp_path / "b.png").info


def test_a_turned_picture_keeps_its_profile_until_it_is_read(tmp_path):
    icc, note = rgb_profile("Display P3"), Image.Exif()
    note[0x0112] = 3
    converted(palette(*COLOURS), icc).save(tmp_path / "a.png", icc_profile=icc, exif=note)
    assert np.abs(seen(tmp_path / "a.png")[::-1] - COLOURS).max() <= 3


def png16(kind, values, hole):
    """A PNG of one row with 16 bits a channel, grey (0) or RGB (2), with a value that is called transparent."""

    def part(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    channels = len(hole)
    head = struct.pack(">IIBBBBB", len(values) // channels, 1, 16, kind, 0, 0, 0)
    row = b"\0" + struct.pack(f">{len(values)}H", *values)
    hole = part(b"tRNS", struct.pack(f">{channels}H", *hole))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + hole + part(b"IDAT", zlib.compress(row)) + part(b"IEND", b"")


def test_the_transparent_grey_of_a_png_with_16_bits_becomes_white(tmp_path):
    (tmp_path / "grey.png").write_bytes(png16(0, [0, 30000, 60000, 65535], [0]))
    assert np.asarray(read_image(tmp_path / "grey.png"))[0, :, 0].tolist() == [255, 117, 233, 255]


@pytest.mark.parametrize("hole", [(0, 0, 0), (40000, 300, 7)])
def test_the_transparent_colour_of_a_png_with_16_bits_becomes_white(tmp_path, hole):
    (tmp_path / "colour.png").write_bytes(png16(2, [*hole, 65535, 0, 0], hole))
    assert np.asarray(read_image(tmp_path / "colour.png"))[0].tolist() == [[255, 255, 255], [255, 0, 0]]


@pytest.mark.parametrize("kind", ["tif", "jpg", "png"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
def test_the_size_of_a_turned_image_is_that_of_the_image_that_is_read(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (20, 12)).save(tmp_path / f"a.{kind}", exif=exif)
    assert images.image_size(tmp_path / f"a.{kind}") == read_image(tmp_path / f"a.{kind}").size
