"""How well a first stage reconstructs images."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ldm_edu.basics import progress
from ldm_edu.checks import check_count, check_images, shown
from ldm_edu.errors import LDMError
from ldm_edu.evaluation.metrics import psnr, ssim
from ldm_edu.first_stage.autoencoder import FirstStage
from ldm_edu.first_stage.quantization import AutoencoderVQ, Usage, codebook_usage

__all__ = ["Mean", "ReconstructionScores", "score_first_stage"]


@dataclass(frozen=True)
class Mean:
    "A mean over images, with its standard error."

    value: float
    error: float
    digits: int = 2  # in print

    @classmethod
    def of(cls, values: Float[Tensor, "n"], digits: int = 2) -> "Mean":
        """The mean of `values`, and the standard error from their standard deviation.

        Values may be infinite, as the PSNR of two equal images is; then there is no error. LDMError for NaN, and for
        infinities of both signs, which have no mean.
        """
        if len(values) < 2 or values.mean().isnan():
            raise LDMError(f"values should be at least 2 numbers that have a mean, not {values.tolist()[:5]}")
        error = values.std().item() / len(values) ** 0.5 if values.isfinite().all() else 0.0
        return cls(values.mean().item(), error, digits)

    def __str__(self) -> str:
        if math.isinf(self.value):
            return f"{self.value}"
        return f"{self.value:.{self.digits}f} ± {self.error:.{self.digits}f}"


@dataclass(frozen=True)
class ReconstructionScores:
    "Scores of a first stage: its reconstructions compared with the images."

    images: int  # how many
    psnr: Mean  # dB
    ssim: Mean
    distance: Mean  # perceptual, lower is better
    fewer: float  # how many times fewer numbers a latent has, 3f²/c
    usage: Usage | None  # of the codebook, if there is one

    def rows(self) -> dict[str, str]:
        "All scores as text, by name."
        rows = {
            "PSNR in dB": str(self.psnr),
            "SSIM": str(self.ssim),
            "perceptual distance": str(self.distance),
            "times fewer numbers": f"{self.fewer:g}",
        }
        if self.usage:
            rows["entries used"] = (
                f"{self.usage.used} of {self.usage.num_codes}, perplexity {self.usage.perplexity:.0f}"
            )
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{name:28s} {value}" for name, value in self.rows().items())


def _distances(perceptual: Callable[[Tensor, Tensor], Any], back: Tensor, x: Tensor) -> Tensor:
    "The perceptual distance of each image (b,); LDMError where that is not what `perceptual` gives."
    far = perceptual(back, x)
    if not isinstance(far, Tensor) or far.numel() != len(x) or far.shape[:1] != (len(x),):
        told = tuple(far.shape) if isinstance(far, Tensor) else shown(far)
        raise LDMError(f"perceptual should give one distance for each image, a tensor ({len(x)},), not {told}")
    return far.flatten()


@torch.no_grad()
def score_first_stage(
    first_stage: FirstStage,
    images: Float[Tensor, "n 3 h w"],  # held-out images in [−1, 1]
    perceptual: Callable[[Tensor, Tensor], Tensor],  # a distance (b,), such as LPIPS
    chunk: int = 64,  # images at once
) -> ReconstructionScores:
    "PSNR, SSIM and a perceptual distance between images and their reconstructions (as in table 8)."
    chunk = check_count("chunk", chunk)
    if len(check_images("images", images)) < 2:
        raise LDMError(f"images: {len(images)} are too few for a mean with an error; give at least 2")
    values, indices = [], []
    for x in progress(images.split(chunk), "reconstructing"):
        z = first_stage.encode(x)
        back = first_stage.decode(z).clamp(-1, 1)
        values.append(torch.stack([psnr(back, x), ssim(back, x), _distances(perceptual, back, x)]))
        if isinstance(first_stage, AutoencoderVQ):
            indices.append(first_stage.quantize(z).indices)
    decibels, similar, far = torch.cat(values, 1)
    usage = None
    if isinstance(first_stage, AutoencoderVQ):
        usage = codebook_usage(torch.cat(indices), first_stage.quantize.embedding.num_embeddings)
    fewer = images[0].numel() / first_stage.encode(images[:1]).numel()
    return ReconstructionScores(len(images), Mean.of(decibels), Mean.of(similar, 3), Mean.of(far, 3), fewer, usage)
