"""Draw latent diffusion as a whole, architecture.svg, and once for each part of the course, with the others in grey.

    python images/architecture.py

The pictures in it are a rendered scene, its latent (three of four channels as colours), the same with noise; and what
the shipped model draws for a caption of another scene.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch, Polygon
from torch import Tensor

from ldm_edu import LatentDiffusion, ToyCOCO

HERE = Path(__file__).resolve().parent
COLOURS = {1: "#1b9e77", 2: "#d95f02", 3: "#2c6fbb", 4: "#8e5ea2"}  # of the parts of the course
GREY, INK = "#b8b8b8", "#222222"
INDEX = 39  # of the split test
CAPTION, SEED = "a small yellow sphere behind a large blue cube", 4  # of what is drawn


@torch.no_grad()
def thumbnails() -> dict[str, Tensor]:
    """What stands in the drawing by name, each (3, h, w) in [0, 1]."""
    model = LatentDiffusion.from_pretrained("toy-text2image")
    x = ToyCOCO("test")[INDEX]["image"][None]
    z = model.first_stage.encode(x)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    levels = {f"z{t}": model.schedule.q_sample(z, torch.tensor([t]), noise) for t in (200, 500, 999)}
    drawn = model.sample([CAPTION], scale=6.0, seed=SEED)
    latents = {"z": z, **levels, "z0": model.first_stage.encode(drawn)}
    colours = {name: (value[0, :3] / 4 + 0.5).clamp(0, 1) for name, value in latents.items()}
    return colours | {"x": x[0] / 2 + 0.5, "x0": drawn[0] / 2 + 0.5}


class Drawing:
    """An empty sheet of 720 × 470 units, and what can be put on it."""

    def __init__(self, here: int | None):
        self.here = here  # the part that keeps its colour; None: all do
        self.figure = plt.figure(figsize=(7.2, 4.7), dpi=100)
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, 720), ylim=(0, 470))
        self.axis.axis("off")

    def colour(self, part: int) -> str:
        return COLOURS[part] if self.here in (None, part) else GREY

    def band(self, x: float, y: float, w: float, h: float, label: str) -> None:
        shape = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=12", fc="#f3f3f1", ec="none")
        self.axis.add_patch(shape)
        self.axis.text(x + 12, y + h - 20, label, fontsize=12, color="#777777", style="italic")

    def picture(self, part: int, image: Tensor, x: float, y: float, side: float, label: str) -> None:
        pixels, alpha = image.movedim(0, -1).numpy(), 1 if self.here in (None, part) else 0.35
        extent = (x, x + side, y, y + side)
        self.axis.imshow(pixels, extent=extent, interpolation="nearest", zorder=2, aspect="auto", alpha=alpha)
        self.axis.text(x + side / 2, y - 6, label, ha="center", va="top", fontsize=14, color=INK)

    def box(self, part: int, x: float, y: float, w: float, h: float, label: str) -> None:
        round_ = "round,pad=0,rounding_size=8"
        self.axis.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=round_, fc=self.colour(part), ec="none", zorder=2))
        self.axis.text(x + w / 2, y + h / 2 + 10, label, ha="center", va="center", fontsize=14, color="white")
        self.axis.text(x + w / 2, y + h / 2 - 18, f"part {part}", ha="center", va="center", fontsize=11, color="white")

    def funnel(self, x: float, y: float, w: float, left: float, right: float, label: str) -> None:
        corners = [(x, y - left / 2), (x, y + left / 2), (x + w, y + right / 2), (x + w, y - right / 2)]
        self.axis.add_patch(Polygon(corners, fc=self.colour(1), ec="none", zorder=2))
        self.axis.text(x + w / 2, y, label, ha="center", va="center", fontsize=17, color="white", zorder=3)
        self.text(1, x + w / 2, y - 58, "part 1", 11)

    def arrow(self, part: int, start: tuple[float, float], end: tuple[float, float], way: str = "arc3") -> None:
        style = {"arrowstyle": "-|>,head_width=0.35,head_length=0.6", "lw": 2.2, "color": self.colour(part)}
        style |= {"shrinkA": 0, "shrinkB": 0, "connectionstyle": way}
        self.axis.annotate("", end, start, arrowprops=style, zorder=3)

    def text(self, part: int, x: float, y: float, label: str, size: float = 13) -> None:
        self.axis.text(x, y, label, ha="center", va="center", fontsize=size, color=self.colour(part))


def draw(images: dict[str, Tensor], here: int | None) -> plt.Figure:
    """The drawing; `here` is the part that keeps its colours, None: all do."""
    d = Drawing(here)
    d.band(6, 148, 216, 316, "pixels")
    d.band(232, 148, 482, 316, "latents")
    d.band(6, 6, 708, 128, "words")
    # above: a picture becomes noise
    d.picture(1, images["x"], 20, 338, 92, r"$x$")
    d.arrow(1, (116, 384), (140, 384))
    d.funnel(142, 384, 52, 96, 48, r"$\mathcal{E}$")
    d.arrow(1, (196, 384), (246, 384))
    d.picture(1, images["z"], 250, 348, 72, r"$z$")
    for name, x, label in (("z200", 380, ""), ("z500", 500, r"$z_t$"), ("z999", 620, r"$z_T$")):
        d.picture(2, images[name], x, 348, 72, label)
        d.arrow(2, (x - 54, 384), (x - 4, 384))
    d.text(2, 505, 440, "add noise (part 2)")
    # below: noise becomes a picture
    d.arrow(2, (656, 320), (600, 234), "angle,angleA=-90,angleB=0,rad=12")
    d.box(3, 440, 196, 156, 76, "UNet")
    d.arrow(2, (472, 276), (564, 276), "arc3,rad=-0.75")
    d.text(2, 385, 304, "remove noise,\nstep by step\n(part 2)", 12)
    d.arrow(2, (436, 234), (330, 234))
    d.picture(2, images["z0"], 250, 198, 72, r"$z_0$")
    d.arrow(1, (246, 234), (198, 234))
    d.funnel(142, 234, 52, 96, 48, r"$\mathcal{D}$")
    d.arrow(1, (140, 234), (116, 234))
    d.picture(1, images["x0"], 20, 188, 92, r"$\hat{x}$")
    # what is asked for
    words = textwrap.fill(f"“{CAPTION}”", 26)
    d.axis.text(172, 62, words, ha="center", va="center", fontsize=13, color=INK, linespacing=1.5)
    d.arrow(4, (312, 62), (392, 62))
    d.box(4, 396, 26, 240, 72, r"text transformer $\tau_\theta$")
    d.arrow(4, (518, 100), (518, 192))
    d.text(4, 616, 166, "cross-attention")
    return d.figure


def main() -> None:
    """Write the drawings."""
    plt.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "ldm_edu", "font.family": "DejaVu Sans"}
    images = thumbnails()
    for here in (None, 1, 2, 3, 4):
        figure = draw(images, here)
        name = "architecture" if here is None else f"part_{here}"
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
