"""Faces drawn from formulas: distances, soft edges, layers and light, with every attribute known."""

# How a face is drawn:
#
# 1. A shape is a function that gives the *signed distance* of every pixel's centre from the outline: negative inside,
#    positive outside (`disc`, `box`, `ellipse`, `under`). Shapes are combined by minimum and maximum (`union`,
#    `intersection`, `smooth_union`, `stroke`), and the complement of a shape is its negative.
# 2. `coverage` turns a distance into the share of the pixel that the shape covers, so that edges are antialiased without
#    drawing a larger image first. A larger width gives a soft edge; shadows are painted with one.
# 3. Layers are painted from the back to the front (`LAYERS`), each over what is there: C' = (1 - alpha) C + alpha c.
#    `Drawing.paint` does this, and keeps the map of segments.
# 4. A surface is a *relief*: a height over the image plane. Its slopes give the normals, and `shade` computes the light.
# 5. Hair and cloth are sums of sines. `pixel_sine` averages a sine over the pixel, so that no image size shows aliasing.
# 6. A head is painted on an egg. Turning the head moves the points of the face sideways by their depth (`turn_egg`).
#
# Lengths are counted in half the height of a head: a head reaches from about -1 (chin) to 1 (crown), and the eyes are at
# y = 0. Numbers inside the `paint_...` functions were chosen by eye. A batch is drawn at once: a number at every pixel is
# (b, 1, h, w), a trait (b, 1, 1, 1), a colour (b, 3, 1, 1).

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from math import pi
from numbers import Real
from types import SimpleNamespace
from typing import overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldm_edu.errors import LDMError

__all__ = ["FACE_ATTRIBUTES", "FACE_SEGMENTS", "Face", "draw_face", "face_truth", "render_faces"]

Field = Float[Tensor, "..."]  # a number at every place; shapes broadcast
Number = float | int | Field


# ---- shapes as signed distances


def pixel_centres(
    size: int,  # pixels along each side
) -> tuple[Float[Tensor, "size size"], Float[Tensor, "size size"]]:
    "Coordinates of the pixels' centres: x to the right, y upwards; the image reaches from -1 to 1."
    s = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(-s, s, indexing="ij")
    return x.contiguous(), y.contiguous()


def disc(x: Field, y: Field, r: Number) -> Field:
    "Signed distance to a disc about the origin."
    return (x * x + y * y).sqrt() - r


def box(
    x: Field,
    y: Field,
    half_x: Number,  # half the width
    half_y: Number,  # half the height
    r: float = 0.0,  # radius of the corners
) -> Field:
    """Signed distance to a rectangle about the origin, with rounded corners.

    With q = (|x| - half_x, |y| - half_y) it is |max(q, 0)| + min(max(q_x, q_y), 0). Corners of radius r: the distance
    to the rectangle that is smaller by r on every side, minus r.
    """
    qx, qy = x.abs() - half_x + r, y.abs() - half_y + r
    beyond = (qx.clamp(min=0) ** 2 + qy.clamp(min=0) ** 2).sqrt()
    return beyond + torch.maximum(qx, qy).clamp(max=0) - r


def ellipse(x: Field, y: Field, rx: Number, ry: Number) -> Field:
    """Signed distance to an ellipse about the origin, to first order near its outline.

    A function f that is negative inside becomes a distance near the outline when it is divided by the length of its
    gradient. Here f = k - 1 with k^2 = (x / rx)^2 + (y / ry)^2.
    """
    u, v = x / rx, y / ry
    k = (u * u + v * v).clamp(min=1e-12).sqrt()
    return k * (k - 1) / ((u / rx) ** 2 + (v / ry) ** 2).clamp(min=1e-12).sqrt()


def under(y: Field, height: Number, slope: Number = 0.0) -> Field:
    "Signed distance to the region under a curve, from its height and slope at the same x; to first order."
    return (y - height) * (1 + torch.as_tensor(slope) ** 2) ** -0.5


def intersection(first: Field, *others: Field) -> Field:
    "The part that all shapes have in common: the maximum of their distances."
    for other in others:
        first = torch.maximum(first, other)
    return first


def union(first: Field, *others: Field) -> Field:
    "All shapes together: the minimum of their distances. Inside the union this is only a bound on the distance."
    for other in others:
        first = torch.minimum(first, other)
    return first


def stroke(d: Field, half: Number) -> Field:
    "A line along an outline that reaches `half` to each side."
    return d.abs() - half


def smooth_union(
    a: Field,
    b: Field,
    k: float,  # where the distances differ by less than this, the crease is filled
) -> Field:
    "Union with a rounded crease: min(a, b) - k h^2 / 4 with h = max(0, 1 - |a - b| / k)."
    h = (1 - (a - b).abs() / k).clamp(min=0)
    return torch.minimum(a, b) - h * h * (k / 4)


def coverage(
    d: Field,  # signed distance at the pixel's centre
    width: Number,  # of a pixel, or of a softer edge
) -> Field:
    "Share of a pixel that a shape covers, 0 to 1; exact for a straight edge that is parallel to the pixel's sides."
    return (0.5 - d / width).clamp(0, 1)


@overload
def mix(a: float, b: float, share: float) -> float: ...
@overload
def mix(a: Field, b: Number, share: Number) -> Field: ...
def mix(a: Number, b: Number, share: Number) -> Number:
    "Linear interpolation: `a` where share is 0, `b` where it is 1."
    return a + (b - a) * share


def smoothstep(v: Field, low: float, high: float) -> Field:
    "A step from 0 at `low` to 1 at `high` whose slope is 0 at both ends: t^2 (3 - 2 t)."
    t = ((v - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def rgb(r: float | int, g: float | int, b: float | int) -> Float[Tensor, "3 1 1"]:
    "A colour, 0 to 1, that broadcasts over an image."
    return torch.tensor([r, g, b], dtype=torch.float32)[:, None, None]


# ---- light on a relief


def slopes(
    height: Float[Tensor, "b 1 h w"],
    pixel: Number,  # width of a pixel, in the unit of the height
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, "b 1 h w"]]:
    "Slopes of a height to the right and upwards: central differences, one-sided along the border."
    down, right = torch.gradient(height, dim=(-2, -1))
    return right / pixel, -down / pixel


@dataclass
class Light:
    "The lights of b images: one directed key light, and fill light from all directions."

    sun: Float[Tensor, "b 3 1 1"]  # unit vectors towards the key light; z points at the eye
    key: Float[Tensor, "b 3 1 1"]  # its colour
    fill: Float[Tensor, "b 3 1 1"]  # colour of the undirected light


def shade(
    colour: Field,  # the surface's own
    height: Float[Tensor, "b 1 h w"],  # its relief
    pixel: Number,  # width of a pixel, in the unit of the height
    light: Light,
    gloss: float = 0.0,  # how strong the highlight is
) -> Float[Tensor, "b 3 h w"]:
    """Colour of a lit relief: fill light, Lambert's diffuse term and Blinn's highlight.

    With the normal n, the direction s of the key light and m halfway between s and the eye (the z axis), the colour is
    colour * (fill + key * max(0, n.s)) + gloss * key * max(0, n.m)^16.
    """
    hx, hy = slopes(height, pixel)
    sx, sy, sz = light.sun.split(1, dim=1)
    upright = (1 + hx * hx + hy * hy).rsqrt()
    seen = colour * (light.fill + light.key * ((sz - hx * sx - hy * sy) * upright).clamp(min=0))
    if not gloss:
        return seen
    half = (sx * sx + sy * sy + (sz + 1) ** 2).sqrt()
    return seen + gloss * light.key * ((sz + 1 - hx * sx - hy * sy) * upright / half).clamp(min=0) ** 16


def dome(x: Field, y: Number, rx: Number, ry: Number) -> Field:
    "Height of half an ellipsoid, level outside of it; never quite vertical, so that slopes stay finite."
    return (1 - (x / rx) ** 2 - (y / ry) ** 2).clamp(min=0.02).sqrt()


def bump(x: Field, y: Field, rx: Number, ry: Number) -> Field:
    "Height of a Gaussian hill: exp(-(x / rx)^2 - (y / ry)^2)."
    return torch.exp(-((x / rx) ** 2 + (y / ry) ** 2))


def inflate(d: Field, r: float) -> Field:
    "Height of a cushion: a shape whose edge is rounded by a quarter circle of radius r, and which is flat further in."
    t = 1 + d.clamp(-r, 0) / r
    return r * (1 - t * t).clamp(min=1e-3).sqrt()


# ---- texture, and a head that turns


def pixel_sine(
    phase: Field,  # at the pixel's centre, radians
    frequency: Number,  # radians per unit of length
    pixel: Number,  # width of a pixel, in units of length
) -> Field:
    """A sine, averaged over a pixel.

    The mean over the width w of sin(phase + frequency u) is sin(phase) sinc(frequency w / 2) with sinc(z) = sin(z) / z.
    From the first zero of sinc on, where a pixel holds a whole wave or more, the result is 0.
    """
    z = torch.as_tensor(frequency * pixel / 2)
    return torch.sin(phase) * torch.sinc(z / pi) * (z < pi)  # torch's sinc(t) is sin(pi t) / (pi t)


def turn_egg(
    x: Field,  # in the image of the head
    y: Field,
    turn: Number,  # how far the centre of the face moves to the right
    nod: Number,  # and how far upwards
) -> tuple[Field, Field]:
    """The point of a face, seen from the front, that appears at (x, y) of a turned head.

    A point moves by its depth z on an egg: most in the centre, not at all on the outline. For a turn by a small angle
    this equals the rotation about the vertical axis up to the square of the angle.
    """
    z = (1 - (x / 0.85) ** 2 - (y / 1.05) ** 2).clamp(min=0)
    return x - turn * z, y - nod * z


# ---- the traits of a face

SKIN = (  # from the palest to the deepest, evenly spaced
    (0.99, 0.91, 0.87),
    (0.96, 0.79, 0.67),
    (0.87, 0.65, 0.49),
    (0.69, 0.46, 0.31),
    (0.49, 0.30, 0.20),
    (0.35, 0.21, 0.15),
)
HAIR_COLOURS = {
    "black": (0.10, 0.09, 0.11),
    "brown": (0.42, 0.24, 0.13),
    "blond": (0.93, 0.76, 0.42),
    "gray": (0.72, 0.73, 0.76),
    "red": (0.70, 0.27, 0.09),
}
EYE_COLOURS = {
    "brown": (0.36, 0.20, 0.09),
    "hazel": (0.52, 0.38, 0.14),
    "green": (0.25, 0.50, 0.27),
    "blue": (0.22, 0.46, 0.74),
    "gray": (0.44, 0.50, 0.55),
}
FABRICS = {
    "navy": (0.14, 0.20, 0.40),
    "teal": (0.08, 0.45, 0.46),
    "wine": (0.55, 0.11, 0.20),
    "mustard": (0.85, 0.62, 0.16),
    "olive": (0.42, 0.45, 0.22),
    "coral": (0.92, 0.44, 0.36),
    "cream": (0.94, 0.90, 0.82),
    "sky": (0.47, 0.69, 0.87),
    "violet": (0.45, 0.31, 0.60),
    "charcoal": (0.24, 0.25, 0.28),
}
BACKDROPS = {
    "sand": (0.86, 0.78, 0.66),
    "mint": (0.66, 0.82, 0.74),
    "dusk": (0.48, 0.46, 0.64),
    "slate": (0.44, 0.53, 0.62),
    "rose": (0.90, 0.72, 0.72),
    "sea": (0.40, 0.66, 0.77),
    "forest": (0.36, 0.52, 0.43),
    "lilac": (0.76, 0.72, 0.88),
    "amber": (0.91, 0.71, 0.45),
    "paper": (0.92, 0.91, 0.89),
}
JEWELS = {
    "gold": (0.98, 0.78, 0.25),
    "silver": (0.88, 0.91, 0.96),
    "ruby": (0.90, 0.10, 0.22),
    "jade": (0.10, 0.75, 0.50),
}
FRAMES = {
    "black": (0.07, 0.07, 0.09),
    "tortoise": (0.62, 0.35, 0.12),
    "wine": (0.50, 0.05, 0.12),
    "blue": (0.08, 0.18, 0.50),
}


def skin_colour(
    tone: float,  # 0 the palest, 1 the deepest
) -> tuple[float, ...]:
    "A colour on the scale SKIN, linear between its tones."
    place = tone * (len(SKIN) - 1)
    i = min(int(place), len(SKIN) - 2)
    return tuple(mix(a, b, place - i) for a, b in zip(SKIN[i], SKIN[i + 1]))


# Volume above the skull and length below the eyes, in half the height of a head.
HAIR_STYLES = {
    "bald": (0.0, 0.0),
    "buzz": (0.03, 0.0),
    "short": (0.14, 0.0),
    "curly": (0.28, 0.0),
    "bun": (0.06, 0.0),
    "bob": (0.13, 0.85),
    "long": (0.13, 1.75),
    "tucked": (0.11, 1.70),  # long, behind the ears
}
PATTERNS = ("plain", "bokeh", "beam", "stripes")  # of the backdrop
COLLARS = ("crew", "vee", "turtleneck", "shirt")
GLASSES = ("none", "round", "square", "cat", "shades")
EARRINGS = ("none", "hoops", "drops")
HATS = ("none", "beanie", "cap", "brim")
CHOICES = {  # the traits that take one of several names
    "hair": HAIR_COLOURS,
    "style": HAIR_STYLES,
    "eyes": EYE_COLOURS,
    "glasses": GLASSES,
    "frame": FRAMES,
    "hat": HATS,
    "hat_colour": FABRICS,
    "earrings": EARRINGS,
    "jewel": JEWELS,
    "collar": COLLARS,
    "cloth": FABRICS,
    "backdrop": BACKDROPS,
    "pattern": PATTERNS,
}
RANGES = {  # the traits that are numbers, with the smallest and the largest value
    "skin": (0, 1),
    "jaw": (0, 1),
    "nose": (0, 1),
    "part": (-1, 1),
    "wave": (0, 1),
    "strand": (0, 6.3),
    "gaze": (-1, 1),
    "lids": (0.7, 1.2),
    "brows": (0, 1),
    "brow_lift": (-1, 1),
    "smile": (-1, 1),
    "mouth": (0, 1),
    "blush": (0, 1),
    "turn": (-1, 1),
    "nod": (-1, 1),
    "tilt": (-0.3, 0.3),
    "zoom": (0.8, 1.2),
    "light": (-1, 1),
    "warmth": (0, 1),
}
# Sixteen of CelebA's forty attributes, in CelebA's order: those that are facts of a drawing.
FACE_ATTRIBUTES = (
    "Bald",
    "Bangs",
    "Black_Hair",
    "Blond_Hair",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Eyeglasses",
    "Goatee",
    "Gray_Hair",
    "Mouth_Slightly_Open",
    "Mustache",
    "Pale_Skin",
    "Rosy_Cheeks",
    "Smiling",
    "Wearing_Earrings",
    "Wearing_Hat",
)


@dataclass(frozen=True)
class Face:
    """Everything that decides a drawn face; raises LDMError for a value outside of CHOICES and RANGES.

    A trait may be there and not be seen: a hat covers a fringe, long hair covers earrings. `attributes` tells only what
    is seen in the image.
    """

    skin: float = 0.3  # 0 the palest, 1 the deepest
    jaw: float = 0.5  # narrow to wide
    nose: float = 0.5  # small to large
    hair: str = "brown"
    style: str = "short"  # of the hair
    fringe: bool = False
    part: float = 0.5  # where the hair is parted, left to right
    wave: float = 0.3  # straight to wavy
    strand: float = 1.0  # phase of strands, folds and the lights in the backdrop, radians
    eyes: str = "brown"
    gaze: float = 0.0  # left to right
    lids: float = 1.0  # how far the eyes are open
    brows: float = 0.2  # thin to bushy
    brow_lift: float = 0.0
    smile: float = 0.0  # -1 corners down, 1 a broad smile
    mouth: float = 0.0  # 0 closed, 1 open
    blush: float = 0.0
    mustache: bool = False
    goatee: bool = False
    glasses: str = "none"
    frame: str = "black"  # colour of the glasses
    hat: str = "none"
    hat_colour: str = "navy"
    earrings: str = "none"
    jewel: str = "gold"  # colour of the earrings
    collar: str = "crew"
    cloth: str = "teal"  # colour of the clothes
    turn: float = 0.0  # of the head, left to right as we see it
    nod: float = 0.0  # down to up
    tilt: float = 0.0  # radians, clockwise
    zoom: float = 1.0
    light: float = -0.6  # where it comes from, left to right
    warmth: float = 0.5  # its colour, cool to warm
    backdrop: str = "sand"
    pattern: str = "plain"  # of the backdrop

    def __post_init__(self):
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in tuple(known):
                raise LDMError(f"`{name}` cannot be {value!r}; known: {', '.join(known)}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not (isinstance(value, Real) and low <= value <= high):
                raise LDMError(f"`{name}` should be a number from {low} to {high}, not {value!r}")

    @property
    def hair_shown(self) -> bool:
        "Whether hair is seen: there is some, and not all of it is under a hat."
        return self.style != "bald" and (self.hat == "none" or self.style not in ("buzz", "bun"))

    @property
    def fringe_shown(self) -> bool:
        "Whether hair falls over the forehead."
        return self.fringe and self.hat == "none" and self.style not in ("bald", "buzz")

    @property
    def ears_shown(self) -> bool:
        "Whether the ears, and earrings, are free of hair."
        return self.style not in ("bob", "long")

    @property
    def attributes(self) -> tuple[bool, ...]:
        "What is true of the image: one value for each of FACE_ATTRIBUTES."
        bare = self.hat == "none"
        hair = self.hair if self.hair_shown else "hidden"
        return (
            bare and self.style == "bald",
            self.fringe_shown,
            hair == "black",
            hair == "blond",
            hair == "brown",
            self.brows > 0.55,
            self.glasses != "none",
            self.goatee,
            hair == "gray",
            self.mouth > 0.25,
            self.mustache,
            self.skin < 0.12,
            self.blush > 0.35,
            self.smile > 0.35,
            self.ears_shown and self.earrings != "none",
            not bare,
        )


# ---- a batch of drawings

PALETTES = {name: known for name, known in CHOICES.items() if isinstance(known, dict) and name != "style"}


def pack_faces(faces: Sequence[Face]) -> SimpleNamespace:
    "Traits as tensors: numbers (b, 1, 1, 1), colours (b, 3, 1, 1); also `volume` and `length` of the hair."
    packed = {}
    for name in (field.name for field in fields(Face)):
        values = [getattr(face, name) for face in faces]
        if name in PALETTES:
            packed[name] = torch.tensor([PALETTES[name][value] for value in values])[..., None, None]
        elif name not in CHOICES:
            packed[name] = torch.tensor([float(value) for value in values])[:, None, None, None]
    packed["skin"] = torch.tensor([skin_colour(face.skin) for face in faces])[..., None, None]
    hair = torch.tensor([HAIR_STYLES[face.style] for face in faces])[..., None, None, None]
    return SimpleNamespace(**packed, volume=hair[:, 0], length=hair[:, 1])


def light_of(traits: SimpleNamespace) -> Light:
    "The lights of the faces; the fill light has a little of the backdrop's colour, as light from a wall has."
    x, y, z = 0.8 * traits.light, torch.tensor(0.5), torch.tensor(1.0)
    length = (x * x + y * y + z * z).sqrt()
    sun = torch.cat([v / length for v in (x, y, z)], 1)
    key = mix(rgb(0.70, 0.71, 0.73), rgb(0.80, 0.71, 0.60), traits.warmth)
    return Light(sun, key, 0.14 * traits.backdrop + rgb(0.37, 0.34, 0.34))


FACE_SEGMENTS = (
    "background",
    "clothes",
    "skin",
    "hair",
    "brows",
    "eyes",
    "mouth",
    "beard",
    "glasses",
    "hat",
    "earrings",
)


@dataclass
class Drawing:
    """b images that are being drawn.

    It holds the coordinates of the pixels in three frames: of the *body*, which stands upright, of the *head*, which is
    tilted about the neck, and of the *face*, which is painted on the turned egg.
    """

    faces: list[Face]
    traits: SimpleNamespace  # from `pack_faces`
    light: Light
    body: tuple[Field, Field]  # x and y of the pixels, (b, 1, h, w): upright
    head: tuple[Field, Field]  # tilted about the neck
    face: tuple[Field, Field]  # and turned on the egg
    pixel: Float[Tensor, "b 1 1 1"]  # width of a pixel in these units
    colour: Float[Tensor, "b 3 h w"]  # 0 to 1
    segment: Int[Tensor, "b 1 h w"]  # index into FACE_SEGMENTS

    def paint(
        self,
        d: Field,  # signed distance
        colour: Field,
        segment: str | None = None,  # the new segment of the pixels whose centre lies inside; None: they keep theirs
        soft: float = 0.0,  # how much wider than a pixel the edge is
        opacity: Number = 1.0,
    ) -> None:
        "Paint a colour over the images, inside of a shape."
        share = coverage(d, self.pixel + soft)
        share = share * share * (3 - 2 * share) if soft else share
        self.colour = mix(self.colour, colour, share * opacity)
        if segment:
            self.segment = torch.where(d < 0, FACE_SEGMENTS.index(segment), self.segment)

    def lit(self, colour: Field, height: Field, gloss: float = 0.0) -> Field:
        "A colour on a relief, in the lights of the images."
        return shade(colour, height, self.pixel, self.light, gloss)

    def flag(self, keep: Callable[[Face], bool]) -> Float[Tensor, "b 1 1 1"]:
        "1 for the faces that `keep` accepts, 0 for the others."
        return torch.tensor([float(keep(face)) for face in self.faces])[:, None, None, None]

    def take(self, index: list[int]) -> "Drawing":
        "The images at some places, as a `Drawing` of their own."
        body, head, face = ((x[index], y[index]) for x, y in (self.body, self.head, self.face))
        return Drawing(
            faces=[self.faces[i] for i in index],
            traits=SimpleNamespace(**{name: values[index] for name, values in vars(self.traits).items()}),
            light=Light(**{name: values[index] for name, values in vars(self.light).items()}),
            body=body,
            head=head,
            face=face,
            pixel=self.pixel[index],
            colour=self.colour[index],
            segment=self.segment[index],
        )

    def only(self, keep: Callable[[Face], bool], brush: Callable[["Drawing"], None]) -> None:
        "Call `brush` with the images whose face `keep` accepts; the other images stay as they are."
        if index := [i for i, face in enumerate(self.faces) if keep(face)]:
            brush(part := self.take(index))
            self.colour[index], self.segment[index] = part.colour, part.segment


SCALE = 0.65  # half the height of a head, in an image that reaches from -1 to 1


def blank(
    faces: Sequence[Face],
    size: int,  # pixels along each side
) -> Drawing:
    "A `Drawing` of these faces before the first layer: black, and all of it background."
    t = pack_faces(faces)
    scale = SCALE * t.zoom
    u, v = pixel_centres(size)
    x, y = u / scale, (v - 0.03) / scale
    c, s = t.tilt.cos(), t.tilt.sin()
    head = c * x - s * (y + 1.1), s * x + c * (y + 1.1) - 1.1  # about the neck, at (0, -1.1)
    shape = len(faces), 1, size, size
    return Drawing(
        faces=list(faces),
        traits=t,
        light=light_of(t),
        body=(x, y.expand(shape)),
        head=head,
        face=turn_egg(*head, 0.22 * t.turn, 0.09 * t.nod),
        pixel=2 / size / scale,
        colour=torch.zeros(len(faces), 3, size, size),
        segment=torch.zeros(shape, dtype=torch.long),
    )


# ---- the layers, from the back to the front


def paint_background(d: Drawing) -> None:
    "A wall that is brightest towards the light; some have lights out of focus, a beam of sun, or stripes."
    t = d.traits
    x, y = d.body
    d.colour = t.backdrop * (0.72 + 0.38 * bump(x - 0.6 * t.light, y - 0.5, 3**0.5, 3**0.5))
    for pattern, brush in {"bokeh": _bokeh, "beam": _beam, "stripes": _stripes}.items():
        d.only(lambda face: face.pattern == pattern, brush)


def _bokeh(d: Drawing) -> None:
    t = d.traits
    x, y = d.body
    for k in range(7):
        cx, cy = 1.6 * torch.sin(t.strand * (k + 2) + 2.4 * k), 0.4 + 1.1 * torch.cos(t.strand * (k + 3) + 1.7 * k)
        d.paint(disc(x - cx, y - cy, 0.16 + 0.05 * k), mix(t.backdrop, 1.0, 0.55), soft=0.06, opacity=0.28)


def _beam(d: Drawing) -> None:
    t = d.traits
    x, y = d.body
    across = 0.8 * x - 0.6 * y * t.light.sign()
    for k in (-0.55, 0.45):
        d.paint(stroke(across - k, 0.28), mix(t.backdrop, 1.0, 0.6), soft=0.1, opacity=0.4)


def _stripes(d: Drawing) -> None:
    t = d.traits
    x, _ = d.body
    d.colour = d.colour * (1 + 0.07 * (4 * pixel_sine(9 * x + t.strand, 9, d.pixel)).clamp(-1, 1))


def head_outline(d: Drawing, dx: Number = 0.0, dy: Number = 0.0) -> Field:
    "Signed distance to the outline of the head, moved by (dx, dy): an egg for the skull and one for the jaw."
    x, y = d.head
    skull = ellipse(x - dx, y - dy - 0.24, 0.76, 0.78)
    return smooth_union(skull, ellipse(x - dx, y - dy + 0.36, 0.50 + 0.12 * d.traits.jaw, 0.64), 0.25)


def skin_shadow(d: Drawing) -> Field:
    "Colour of skin without the key light, a little redder: light that enters skin comes out red."
    return d.traits.skin * (0.35 + 0.6 * d.light.fill) * rgb(1.05, 0.86, 0.82)


def paint_body(d: Drawing) -> None:
    "Neck and clothes; a collar is the shoulders without a hole, with a stroke along the hole."
    t = d.traits
    x, y = d.body
    width = 0.34 + 0.06 * t.jaw
    neck = box(x, y + 1.2, width + 0.5 * (-1.1 - y).clamp(min=0) ** 2, 0.7, 0.05)
    d.paint(neck, d.lit(t.skin, 0.3 * dome(x, y, width + 0.1, 9)), "skin")
    d.paint(intersection(head_outline(d, -0.10 * t.light, -0.20), neck), skin_shadow(d), soft=0.3, opacity=0.75)
    for collar, brush in {"crew": _crew, "vee": _vee, "turtleneck": _turtleneck, "shirt": _shirt}.items():
        d.only(lambda face: face.collar == collar, brush)


def _shoulders(d: Drawing) -> Field:
    x, y = d.body
    return smooth_union(ellipse(x, y + 2.22, 1.42, 1.02), box(x, y + 1.70, 0.46, 0.47, 0.1), 0.35)


def _cloth(d: Drawing, shape: Field) -> None:
    t = d.traits
    x, y = d.body
    fold = 0.02 * torch.sin(6 * x.abs() + 4 * y + t.strand) * smoothstep(-y, 1.3, 1.8)
    d.paint(shape, d.lit(t.cloth, 0.8 * dome(x, y + 2.2, 1.7, 1.3) + fold + 0.5 * inflate(shape, 0.12)), "clothes")


def _neckline(d: Drawing, hole: Field, half: float, trim: Field) -> None:
    shoulders = _shoulders(d)
    d.paint(intersection(shoulders, stroke(hole, 0.06)), skin_shadow(d), soft=0.1, opacity=0.5)
    _cloth(d, intersection(shoulders, -hole))
    shape = intersection(shoulders, stroke(hole - half, half))
    d.paint(shape, d.lit(trim, inflate(shape, 0.04)), "clothes")


def _crew(d: Drawing) -> None:
    x, y = d.body
    _neckline(d, ellipse(x, y + 1.10, 0.46, 0.34), 0.04, 0.8 * d.traits.cloth)


def _vee(d: Drawing) -> None:
    x, y = d.body
    hole = intersection(0.82 * x.abs() - 0.57 * (y + 1.72), -1.72 - y)
    _neckline(d, hole, 0.035, mix(d.traits.cloth, 1.0, 0.45))


def _turtleneck(d: Drawing) -> None:
    t = d.traits
    x, y = d.body
    _cloth(d, _shoulders(d))
    roll = box(x, y + 1.16 - 0.12 * x * x, 0.47, 0.19, 0.12)
    d.paint(roll - 0.02, 0.4 * t.cloth, soft=0.08, opacity=0.5)
    knit = 1 + 0.1 * pixel_sine(26 * x, 26, d.pixel)
    d.paint(roll, d.lit(t.cloth, 0.35 * dome(x, y, 0.55, 9) + inflate(roll, 0.16)) * knit, "clothes")


def _shirt(d: Drawing) -> None:
    t = d.traits
    x, y = d.body
    ax = x.abs()
    shoulders = _shoulders(d)
    hole = intersection(0.80 * ax - 0.60 * (y + 1.42), -1.42 - y)
    _cloth(d, intersection(shoulders, -hole))
    buttons = intersection(stroke(x, 0.012), y + 1.42)
    d.paint(buttons, 0.5 * t.cloth, opacity=0.8)
    flap = intersection(hole - 0.22, -hole, -0.316 * ax - 0.949 * (y + 1.42), shoulders - 0.08)
    d.paint(intersection(flap - 0.03, shoulders - 0.08), 0.35 * t.cloth, soft=0.1, opacity=0.6)
    d.paint(flap, d.lit(mix(t.cloth, 1.0, 0.6), 0.5 * dome(x, y + 1.4, 1.0, 1.0) + inflate(flap, 0.06)), "clothes")


def relief(d: Drawing) -> Field:
    "Height of a face: a dome with nose, cheeks, lips and chin added and the eye sockets taken away."
    t = d.traits
    x, y = d.face
    ax = x.abs()
    # The nose stands out, so it moves further than the egg when the head turns: its ridge, then its tip.
    nx = x - 0.07 * t.turn * smoothstep(-y, -0.1, 0.35)
    ridge = torch.exp(-((nx / (0.085 + 0.02 * t.nose)) ** 2))
    ridge = ridge * smoothstep(-y, -0.30, 0.34) * smoothstep(y, -0.50, -0.36)
    h = 0.85 * dome(x, y - 0.05, 0.98, 1.25) + (0.09 + 0.05 * t.nose) * ridge
    h = h + 0.065 * bump(nx, y + 0.37, 0.14 + 0.05 * t.nose, 0.09)
    # Cheeks, eye sockets with the brow above them, chin and lips.
    h = h + (0.03 + 0.03 * t.smile.clamp(min=0)) * bump(ax - 0.41, y + 0.28, 0.18, 0.16)
    h = h - 0.06 * bump(ax - 0.29, y - 0.02, 0.19, 0.13) + 0.025 * bump(ax - 0.30, y - 0.26, 0.30, 0.10)
    return h + 0.04 * bump(x, y + 0.87, 0.20, 0.12) + 0.03 * bump(x, y + 0.63, 0.24, 0.12)


def paint_head(d: Drawing) -> None:
    "Skin of the head, lit, with its blush; the shadow beside the nose comes from `relief` and the light."
    t = d.traits
    x, y = d.face
    outline = head_outline(d)
    d.paint(outline, d.lit(t.skin, relief(d), gloss=0.1), "skin")
    d.paint(intersection(outline, -outline - 0.08), skin_shadow(d), soft=0.14, opacity=0.35)
    rose = mix(t.skin, rgb(0.95, 0.20, 0.22), 0.62)
    d.paint(disc(x.abs() - 0.43, 1.15 * (y + 0.30), 0.13), rose, soft=0.22, opacity=0.9 * t.blush)


def _from_ear(d: Drawing) -> Field:
    x, _ = d.head
    return x.abs() + 0.16 * (d.traits.turn * x.sign()).clamp(min=0)


def paint_ears(d: Drawing) -> None:
    "Ears and earrings, both sides at once in |x|; on a turned head the far ear moves inwards."
    ax, y = _from_ear(d), d.head[1]
    ear = ellipse(ax - 0.775, y + 0.05 + 0.15 * (ax - 0.775), 0.115, 0.20)
    d.paint(ear, d.lit(d.traits.skin, inflate(ear, 0.12)), "skin")
    d.paint(ellipse(ax - 0.79, y + 0.03, 0.05, 0.11), skin_shadow(d), soft=0.08, opacity=0.7)
    d.only(lambda face: face.earrings == "hoops" and face.ears_shown, _hoops)
    d.only(lambda face: face.earrings == "drops" and face.ears_shown, _drops)


def _hoops(d: Drawing) -> None:
    hoop = stroke(disc(_from_ear(d) - 0.83, d.head[1] + 0.36, 0.115), 0.034)
    d.paint(hoop, d.lit(1.1 * d.traits.jewel, inflate(hoop, 0.04), gloss=0.7), "earrings")


def _drops(d: Drawing) -> None:
    ax, y = _from_ear(d) - 0.83, d.head[1]
    drop = smooth_union(disc(ax, y + 0.41, 0.09), disc(ax, y + 0.26, 0.03), 0.12)
    d.paint(drop, d.lit(1.1 * d.traits.jewel, inflate(drop, 0.09), gloss=1.0), "earrings")


def paint_nose(d: Drawing) -> None:
    "Nostrils, wings, the shadow below the nose and the light on its tip."
    t = d.traits
    x, y = d.face
    x = x - 0.08 * t.turn
    ax = x.abs()
    w = 0.105 + 0.04 * t.nose  # half the width of the nose
    d.paint(ellipse(x + 0.05 * t.light, y + 0.475, w + 0.02, 0.035), skin_shadow(d), soft=0.10, opacity=0.6)
    d.paint(ellipse(ax - 0.6 * w, y + 0.43, 0.034, 0.020), 0.35 * t.skin, soft=0.02, opacity=0.85)
    wing = intersection(stroke(disc(ax - 0.85 * w, y + 0.39, 0.065), 0.010), 0.95 * w - ax)
    d.paint(wing, skin_shadow(d), soft=0.04, opacity=0.6)
    d.paint(ellipse(x - 0.03 * t.light, y + 0.335, 0.03, 0.028), mix(t.skin, 1.0, 0.5), soft=0.08, opacity=0.45)


def paint_brows(d: Drawing) -> None:
    "Eyebrows, thin or bushy."
    t = d.traits
    x, y = d.face
    ax = x.abs()
    s = ((ax - 0.11) / 0.42).clamp(0, 1)  # along the brow
    curve = 0.245 + 0.03 * t.brow_lift + 0.17 * s - 0.19 * s * s
    slope = (0.17 - 0.38 * s) / 0.42
    thick = (0.018 + 0.075 * t.brows) * (1.1 - 0.7 * s * s)
    brow = intersection(stroke(under(y, curve, slope), thick), stroke(ax - 0.32, 0.21))
    # Brows are darker than the hair, but never like the skin.
    lighter = (t.hair - t.skin).mean(1, keepdim=True) > 0.2
    hair = mix(t.hair, rgb(0.10, 0.06, 0.05), torch.where(lighter, 0.1, 0.65))
    d.paint(brow - 0.02, skin_shadow(d), soft=0.08, opacity=0.5 * t.brows)
    d.paint(brow, hair * (1 + 0.3 * strands(d, 1.4 * (y - curve) + 0.8 * ax, y, 0.0)), "brows", soft=0.012)


def paint_eyes(d: Drawing) -> None:
    "Whites, irises, pupils, reflections and lashes; an eye is what lies between two parabolas, its lids."
    t = d.traits
    x, y = d.face
    ex, ey = x.abs() - 0.31, y - 0.02 - 0.10 * (x.abs() - 0.31)
    w = 0.205  # half the width of an eye
    up, low = 0.135 * t.lids, 0.085 - 0.03 * t.smile.clamp(min=0)  # how far the lids are from the middle
    arch, bend = 1 - (ex / w) ** 2, 2 * ex / w**2
    upper, lower = under(ey, up * arch, up * bend), -under(ey, -low * arch, low * bend)
    eye = intersection(upper, lower)
    d.paint(eye - 0.03, skin_shadow(d), soft=0.12, opacity=0.45)
    d.paint(eye, rgb(0.98, 0.97, 0.96) * (0.78 + 0.22 * smoothstep(-upper, 0.0, 0.09)), "eyes")
    _iris(d, eye, x.sign() * ex - 0.05 * t.gaze - 0.02 * t.turn, ey - 0.015)
    lash = intersection(stroke(upper, 0.014 + 0.06 * (ex + 0.1).clamp(min=0)), stroke(ex, w + 0.01))
    d.paint(lash, rgb(0.10, 0.06, 0.06), "eyes", opacity=0.95)
    d.paint(intersection(stroke(upper - 0.06, 0.007), stroke(ex, w)), skin_shadow(d), soft=0.03, opacity=0.9)


def _iris(d: Drawing, eye: Field, x: Field, y: Field) -> None:
    t = d.traits
    r = disc(x, y, 0.0)
    rays = 0.70 + 0.45 * smoothstep(r, 0.03, 0.08) - 0.65 * smoothstep(r, 0.08, 0.105)
    d.paint(intersection(eye, r - 0.105), t.eyes * rays * (1.15 - 4 * y))
    d.paint(intersection(eye, r - 0.047), rgb(0.03, 0.02, 0.03))
    d.paint(intersection(eye, disc(x - 0.04 * t.light.sign(), y - 0.04, 0.026)), rgb(1, 1, 1), opacity=0.95)


def paint_mouth(d: Drawing) -> None:
    "Lips, teeth and dimples, bounded by four curves over (x / half width)^2; a smile bends all of them."
    t = d.traits
    x, y = d.face
    x, y = x - 0.02 * t.turn, y + 0.66
    w = 0.235 + 0.075 * t.smile  # half the width
    s = (x / w) ** 2
    beyond = x.abs() - w
    opened = (t.mouth > 0).float()
    arch = (1 - s).clamp(min=0)

    # The line between the lips, the edges of the opening, and the edges of the lips.
    bent = 0.13 * t.smile + 0.012
    middle, slope = bent * (s - 0.45), 2 * bent * x / w**2
    top, bottom = middle + 0.035 * t.mouth * arch, middle - 0.135 * t.mouth * arch
    upper = top + 0.065 * arch.sqrt() * (1 - 0.35 * torch.exp(-((x / 0.05) ** 2)))
    lips = intersection(under(y, upper, slope), -under(y, bottom - 0.085 * arch.sqrt(), slope), beyond)
    d.paint(lips - 0.02, skin_shadow(d), soft=0.10, opacity=0.35)
    d.paint(lips, d.lit(mix(t.skin, rgb(0.74, 0.20, 0.24), 0.55), 0.8 * inflate(lips, 0.06), gloss=0.15), "mouth")

    # An open mouth shows its inside and, with a smile, the teeth; a closed one shows a line.
    inside = intersection(under(y, top, slope), -under(y, bottom, slope), beyond + 0.015)
    d.paint(inside, rgb(0.25, 0.05, 0.07), opacity=opened)
    teeth = intersection(inside, top - 0.085 * t.mouth * arch.sqrt() - y)
    d.paint(teeth, rgb(0.98, 0.96, 0.94), opacity=opened * (0.3 + 0.7 * t.smile.clamp(0, 1)))
    line = intersection(stroke(under(y, middle, slope), 0.012), beyond - 0.015)
    d.paint(line, 0.28 * t.skin, soft=0.015, opacity=0.9 * (1 - opened))
    dimple = intersection(stroke(disc(beyond - 0.03, y - middle, 0.045), 0.010), -beyond)
    d.paint(dimple, skin_shadow(d), soft=0.04, opacity=0.6 * t.smile.clamp(min=0))


def strands(
    d: Drawing,
    u: Field,  # across the strands
    v: Field,  # along them
    wave: Number,  # straight 0 to wavy 1
) -> Field:
    """Texture of hair, about -1 to 1: three waves of different width across the strands, bent by slow waves along them.

    Where the strands crowd together `u` grows faster, and a pixel is wider when it is measured in `u`, by the length of
    the gradient of `u`. Therefore fine strands fade first as images become smaller, and nothing flickers.
    """
    g = d.traits.strand
    u = u + 0.035 * wave * torch.sin(7 * v + 9 * u + g)
    ux, uy = slopes(u, d.pixel)
    pixel = d.pixel * (ux * ux + uy * uy).sqrt()  # its width, counted in u
    broad = pixel_sine(17 * u + 3 * g + 1.2 * torch.sin(3 * v + g), 17, pixel)
    middle = pixel_sine(39 * u + 7 * g + 2 * v, 39, pixel)
    fine = pixel_sine(83 * u + 13 * g - 3 * v, 83, pixel)
    return 0.5 * broad + 0.35 * middle + 0.3 * fine


def paint_beard(d: Drawing) -> None:
    "A goatee, a mustache, or both."
    d.only(lambda face: face.goatee, _goatee)
    d.only(lambda face: face.mustache, _mustache)


def _bristles(d: Drawing, u: Field, v: Field, height: Field) -> Field:
    return d.lit(mix(d.traits.hair, rgb(0.16, 0.10, 0.07), 0.35), height) * (1.05 + 0.35 * strands(d, u, v, 0.3))


def _goatee(d: Drawing) -> None:
    x, y = d.face
    drop = 0.12 * d.traits.mouth  # an open mouth lowers the beard
    chin = ellipse(x, y + 0.94 + 0.3 * drop, 0.21, 0.17)
    shape = smooth_union(chin, ellipse(x, y + 0.83 + drop, 0.07, 0.08), 0.08)
    d.paint(shape, _bristles(d, 1.5 * x, y, inflate(shape, 0.15)), "beard", soft=0.03)


def _mustache(d: Drawing) -> None:
    t = d.traits
    x, y = d.face
    x = x - 0.05 * t.turn
    ax = x.abs()
    middle = -0.535 - 0.55 * ax**2 + 0.13 * t.smile * (ax / 0.3) ** 2 + 0.03 * t.mouth
    thick = 0.064 * (1 - (ax / 0.33) ** 2).clamp(min=0).sqrt() * (1 - 0.35 * torch.exp(-((x / 0.04) ** 2)))
    shape = intersection(stroke(y - middle, thick), ax - 0.33)
    d.paint(shape, _bristles(d, x + 0.5 * y * x.sign(), y, inflate(shape, 0.06)), "beard", soft=0.02)


def hair_outline(d: Drawing) -> Field:
    "Signed distance to the outer edge of the hair: the skull with volume; for long hair, a box down to the shoulders."
    t = d.traits
    x, y = d.head
    curly = d.flag(lambda face: face.style == "curly")
    loose = (t.length > 0).float()
    # Short hair has no volume left at the ears.
    volume = t.volume * (1 - (1 - torch.maximum(curly, loose)) * smoothstep(-y, -0.55, 0.05))
    rough = 0.03 * curly * torch.sin(15 * torch.atan2(x, y - 0.2) + t.strand)
    x = x + 0.04 * t.turn
    cap = ellipse(x, y - 0.25, 0.77 + volume, 0.80 + volume) + rough
    half = 0.70 + 0.9 * t.volume + 0.13 * (0.3 - y).clamp(min=0) + 0.035 * t.wave * torch.sin(6 * y + t.strand)
    tips = 0.02 * torch.sin(19 * x + t.strand) + 0.015 * torch.sin(43 * x + 2 * t.strand)
    fall = box(x, y - 0.25 + t.length / 2 + tips * smoothstep(-y, 0.2, 0.8), half, t.length / 2 + 0.05, 0.3)
    return torch.where(loose > 0, smooth_union(cap, fall, 0.15), cap)


def hairline(d: Drawing) -> Field:
    "Signed distance to the opening of the hair, negative on the face: parabolas from the parting to the temples."
    t = d.traits
    x, y = d.face
    part = 0.42 * t.part
    across = (x - part) / torch.where(x > part, 0.74 - part, 0.74 + part)  # 0 at the parting, 1 at a temple
    arch = under(y, 0.68 - 0.80 * across**2, 1.6 * across / 0.74)
    temple = ellipse(x, (y + 0.30).clamp(min=0), 0.70 - 0.06 * d.flag(lambda face: not face.ears_shown), 1.05)
    ends = 0.022 * torch.sin(21 * x + 2 * t.strand) + 0.015 * torch.sin(47 * x + t.strand)
    fringe = torch.where(d.flag(lambda face: face.fringe_shown) > 0, y - 0.38 - ends, -9.0)
    return intersection(arch, temple, fringe)


def _hair_colour(d: Drawing, shape: Field, u: Field, v: Field) -> Field:
    t = d.traits
    x, y = d.head
    texture = strands(d, u, v, t.wave)
    shine = torch.exp(-(((y - 0.80 - 0.10 * t.light * x + 0.25 * x * x) / 0.13) ** 2)) * (0.55 + 0.45 * texture)
    height = 0.6 * dome(x, y - 0.1, 1.3, 2.6) + inflate(shape, 0.08) + 0.012 * texture
    return d.lit(t.hair, height) * (1 + 0.30 * texture) + shine * (0.08 + 0.22 * t.hair) * d.light.key


def _under_hat(d: Drawing, shape: Field) -> Field:
    return torch.where(d.flag(lambda face: face.hat != "none") > 0, intersection(shape, d.head[1] - 0.6), shape)


def paint_back_hair(d: Drawing) -> None:
    "Hair behind the neck, painted before the body, and a bun."
    d.only(lambda face: face.hair_shown and face.style in ("bob", "long", "tucked", "curly"), _back_hair)
    d.only(lambda face: face.hair_shown and face.style == "bun", _bun)


def _back_hair(d: Drawing) -> None:
    shape = _under_hat(d, hair_outline(d))
    texture = 1 + 0.30 * strands(d, *d.head, d.traits.wave)
    d.paint(shape, d.lit(0.62 * d.traits.hair, inflate(shape, 0.3)) * texture, "hair")


def _bun(d: Drawing) -> None:
    x, y = d.head
    knot = disc(x + 0.1 * d.traits.turn, y - 1.15, 0.24)
    d.paint(knot, _hair_colour(d, knot, 1.2 * disc(x, y - 1.15, 0.0) + 0.5 * x, y), "hair")


def paint_hair(d: Drawing) -> None:
    "Hair on and around the face: inside of `hair_outline` and outside of `hairline`."
    d.only(lambda face: face.hair_shown, _front_hair)


def _front_hair(d: Drawing) -> None:
    t = d.traits
    x, y = d.head
    buzz = d.flag(lambda face: face.style == "buzz")
    shape = _under_hat(d, intersection(hair_outline(d), -hairline(d)))
    above_ears = intersection(shape, 0.02 - y + 0.03 * torch.sin(23 * x + t.strand))
    shape = torch.where(d.flag(lambda face: face.ears_shown) > 0, above_ears, shape)
    d.paint(intersection(shape - 0.05, head_outline(d)), skin_shadow(d), soft=0.16, opacity=0.7 * (1 - buzz))
    # Strands lie around the face, or, in a fringe, fall over the forehead.
    across = x - 0.12 * t.turn
    around = ((across / 0.76) ** 2 + ((y - 0.1).clamp(min=0) / 0.9) ** 2).sqrt()
    u = torch.where(d.flag(lambda face: face.fringe_shown) > 0, across / (0.5 + y.clamp(min=0)), around)
    u = u + 0.1 * d.flag(lambda face: face.style == "curly") * torch.sin(14 * x + t.strand) * torch.sin(14 * y)
    d.paint(shape, mix(_hair_colour(d, shape, u, y), skin_shadow(d), 0.25 * buzz), "hair", soft=0.03)


def paint_glasses(d: Drawing) -> None:
    "Glasses with their shadow: clear ones in three shapes, or dark ones."
    d.only(lambda face: face.glasses != "none", _glasses)


def _lens(d: Drawing, x: Field, y: Field) -> Field:
    shapes = {
        "round": disc(x, y, 0.225),
        "square": box(x, y, 0.235, 0.175, 0.06),
        "shades": box(x, y, 0.25, 0.19, 0.12),
        "cat": box(x, y - 0.35 * x * smoothstep(y, -0.1, 0.1), 0.235, 0.165, 0.10),
    }
    return sum((d.flag(lambda face: face.glasses == kind) * shape for kind, shape in shapes.items()), torch.zeros(()))


def _glasses(d: Drawing) -> None:
    t = d.traits
    x, y = d.face
    x = x - 0.02 * t.turn
    ax = x.abs()
    lens = _lens(d, ax - 0.315, y)
    d.paint(stroke(lens + 0.02, 0.045), skin_shadow(d), soft=0.10, opacity=0.45)
    d.paint(lens, rgb(0.85, 0.93, 1.0), opacity=0.10)
    d.only(lambda face: face.glasses == "shades", _dark_lens)
    streak = stroke(0.8 * (x - 0.31 * x.sign()) + 0.6 * y - 0.04, 0.045)
    d.paint(intersection(lens + 0.03, streak), rgb(1, 1, 1), soft=0.02, opacity=0.2)
    bridge = intersection(stroke(y - 0.05 + 0.3 * x * x, 0.026), ax - 0.10)
    arm = intersection(stroke(y - 0.06, 0.024), 0.52 - ax, head_outline(d) - 0.02)
    d.paint(union(stroke(lens, 0.030), bridge, arm), t.frame * (0.8 + 0.5 * smoothstep(y, 0.0, 0.25)), "glasses")


def _dark_lens(d: Drawing) -> None:
    x, y = d.face
    d.paint(_lens(d, (x - 0.02 * d.traits.turn).abs() - 0.315, y), rgb(0.09, 0.08, 0.10), "glasses", opacity=0.88)


def paint_hat(d: Drawing) -> None:
    "A beanie, a cap, or a hat with a brim, and its shadow on the forehead."
    d.only(lambda face: face.hat == "beanie", _beanie)
    d.only(lambda face: face.hat == "cap", _cap)
    d.only(lambda face: face.hat == "brim", _brim)


def _cast_shadow(d: Drawing, above: float) -> None:
    shape = intersection(above - d.face[1], head_outline(d) - 0.02)
    d.paint(shape, 0.7 * skin_shadow(d), soft=0.18, opacity=0.65)


def _knitted(d: Drawing, shape: Field, x: Field, frequency: Number, colour: Field, height: Field) -> None:
    ribs = 1 + 0.13 * pixel_sine(frequency * x, frequency, d.pixel)
    d.paint(shape, d.lit(colour, height + inflate(shape, 0.14)) * ribs, "hat")


def _beanie(d: Drawing) -> None:
    t = d.traits
    x, y = d.head
    across = d.face[0]
    _cast_shadow(d, 0.42)
    pompom = disc(x, y - 1.24, 0.15) + 0.012 * torch.sin(9 * torch.atan2(x, y - 1.24))
    d.paint(pompom, d.lit(mix(t.hat_colour, 1.0, 0.5), inflate(pompom, 0.2)), "hat")
    crown = intersection(ellipse(x, y - 0.40, 0.88, 0.78), 0.50 - y)
    _knitted(d, crown, across / (1.5 - 0.5 * y), 30, t.hat_colour, 0.6 * dome(x, y - 0.4, 1.0, 1.0))
    fold = box(x, y - 0.58 + 0.03 * x * x, 0.91, 0.16, 0.10)
    d.paint(fold - 0.02, 0.35 * t.hat_colour, soft=0.06, opacity=0.5)
    _knitted(d, fold, across, 40, mix(t.hat_colour, 1.0, 0.12), 0.4 * dome(x, y, 1.05, 9))


def _cap(d: Drawing) -> None:
    t = d.traits
    x, y = d.head
    bx = x - 0.25 * t.turn
    height = 0.7 * dome(x, y - 0.4, 1.0, 1.0)
    _cast_shadow(d, 0.34)
    crown = intersection(ellipse(x, y - 0.42, 0.85, 0.82), 0.46 - y)
    d.paint(crown, d.lit(t.hat_colour, height + inflate(crown, 0.1), gloss=0.05), "hat")
    seams = intersection(crown, stroke(bx.abs() - 0.30 * (1.24 - y), 0.008))
    d.paint(seams, 0.5 * t.hat_colour, soft=0.01, opacity=0.6)
    d.paint(intersection(crown, disc(bx, y - 0.84, 0.15)), d.lit(mix(t.cloth, 1.0, 0.3), height))
    bill = intersection(ellipse(bx, y - 0.42, 0.76, 0.22), 0.42 - 0.16 * (bx / 0.7) ** 2 - y)
    d.paint(bill - 0.03, 0.3 * t.hat_colour, soft=0.08, opacity=0.5)
    d.paint(bill, d.lit(0.85 * t.hat_colour, 0.5 * dome(bx, y - 0.3, 0.9, 0.5) + inflate(bill, 0.08)), "hat")
    d.paint(disc(x, y - 1.24, 0.05), 0.7 * t.hat_colour, "hat")


def _brim(d: Drawing) -> None:
    t = d.traits
    x, y = d.head
    _cast_shadow(d, 0.34)
    crown = intersection(box(x, y - 0.82 - 0.03 * torch.cos(7 * x), 0.73 - 0.12 * y, 0.44, 0.22), 0.5 - y)
    height = 0.6 * dome(x, y, 0.85, 9)
    felt = 1 + 0.04 * pixel_sine(50 * y + 9 * x, 50, d.pixel)
    d.paint(crown, d.lit(t.hat_colour, height + inflate(crown, 0.15)) * felt, "hat")
    d.paint(intersection(crown, stroke(y - 0.74 + 0.06 * x * x, 0.09)), d.lit(0.8 * t.cloth, height))
    brim = ellipse(x, y - 0.56 + 0.10 * x * x, 1.25, 0.14)
    d.paint(intersection(brim - 0.04, crown), 0.3 * t.hat_colour, soft=0.08, opacity=0.5)
    d.paint(brim, d.lit(t.hat_colour, 0.4 * dome(x, y, 1.5, 9) + inflate(brim, 0.14)) * felt, "hat")


LAYERS = (
    paint_background,
    paint_back_hair,
    paint_body,
    paint_ears,
    paint_head,
    paint_nose,
    paint_eyes,
    paint_brows,
    paint_mouth,
    paint_beard,
    paint_glasses,
    paint_hair,
    paint_hat,
)


# ---- images and maps


def draw_layers(
    faces: Sequence[Face],
    size: int,  # pixels along each side
) -> Drawing:
    "All layers, painted from the back to the front: colours and segments."
    d = blank(faces, size)
    for layer in LAYERS:
        layer(d)
    return d


def _in_chunks(faces: Sequence[Face], size: int, chunk: int) -> Iterator[tuple[slice, Drawing]]:
    "Slices of a batch, each with the finished drawing of its faces."
    if size < 2 or chunk < 1:
        raise LDMError(f"`size` should be at least 2 pixels and `chunk` at least 1 face, not {size} and {chunk}")
    for i in range(0, len(faces), chunk):
        yield slice(i, i + chunk), draw_layers(faces[i : i + chunk], size)


def render_faces(
    faces: Sequence[Face],
    size: int = 64,  # pixels along each side
    chunk: int = 16,  # faces drawn at once: changes the speed, not the image
) -> Float[Tensor, "b 3 size size"]:
    "Images of faces, in [-1, 1]; a face gives the same image alone and in any batch. LDMError for a size below 2."
    images = torch.empty(len(faces), 3, size, size)
    for places, drawing in _in_chunks(faces, size, chunk):
        images[places] = drawing.colour.clamp(0, 1) * 2 - 1
    return images


def face_truth(
    faces: Sequence[Face],
    size: int = 64,  # pixels along each side
    chunk: int = 16,  # faces drawn at once
) -> dict[str, Int[Tensor, "b size size"]]:
    "`segmentation`: what is seen at the centre of each pixel, as an index into FACE_SEGMENTS."
    segmentation = torch.empty(len(faces), size, size, dtype=torch.long)
    for places, drawing in _in_chunks(faces, size, chunk):
        segmentation[places] = drawing.segment[:, 0]
    return {"segmentation": segmentation}


def draw_face(
    rng: np.random.Generator,
) -> Face:
    """A random face. Values that decide an attribute keep well away from its threshold.

    Traits are drawn independently of each other, so that no attribute tells anything about another one, except for what
    the image excludes: hair has one colour, and a hat hides a fringe.
    """

    def pick(options, weights=None):
        return tuple(options)[int(rng.choice(len(options), p=weights))]

    def chance(p):
        return bool(rng.random() < p)

    def between(low, high):
        return float(rng.uniform(low, high))

    return Face(
        skin=between(0, 0.05) if chance(0.18) else 0.22 + 0.78 * between(0, 1) ** 1.3,
        jaw=between(0, 1),
        nose=between(0, 1),
        eyes=pick(EYE_COLOURS),
        gaze=between(-1, 1),
        lids=between(0.8, 1.1),
        hair=pick(HAIR_COLOURS, (0.24, 0.22, 0.21, 0.19, 0.14)),
        style=pick(HAIR_STYLES, (0.10, 0.09, 0.21, 0.12, 0.09, 0.13, 0.14, 0.12)),
        fringe=chance(0.35),
        part=between(-1, 1),
        wave=between(0, 1),
        strand=between(0, 2 * pi),
        brows=between(0.8, 1) if chance(0.3) else between(0, 0.3),
        brow_lift=between(-1, 1),
        smile=between(0.65, 1) if chance(0.5) else between(-0.4, 0),
        mouth=between(0.5, 1) if chance(0.45) else 0.0,
        blush=between(0.7, 1) if chance(0.25) else 0.0,
        mustache=chance(0.2),
        goatee=chance(0.18),
        glasses=pick(GLASSES, (0.68, 0.09, 0.09, 0.07, 0.07)),
        frame=pick(FRAMES),
        hat=pick(HATS, (0.76, 0.08, 0.08, 0.08)),
        hat_colour=pick(FABRICS),
        earrings=pick(EARRINGS, (0.6, 0.2, 0.2)),
        jewel=pick(JEWELS),
        collar=pick(COLLARS),
        cloth=pick(FABRICS),
        turn=between(-1, 1),
        nod=between(-1, 1),
        tilt=between(-0.16, 0.16),
        zoom=between(0.94, 1.06),
        light=between(-1, 1),
        warmth=between(0, 1),
        backdrop=pick(BACKDROPS),
        pattern=pick(PATTERNS),
    )
