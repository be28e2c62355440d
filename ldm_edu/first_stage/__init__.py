"""The first stage (§ 3.1, app. G): autoencoders, their losses, published weights, and encoding in tiles."""

from ldm_edu.first_stage.adversarial import Adversary, PatchDiscriminator
from ldm_edu.first_stage.autoencoder import AutoencoderKL, DiagonalGaussian, FirstStage, Quantized, estimate_scale
from ldm_edu.first_stage.losses import FirstStageLoss, PerceptualDistance
from ldm_edu.first_stage.published import from_diffusers, load_published, save_diffusers, to_diffusers
from ldm_edu.first_stage.quantization import (
    AutoencoderVQ,
    IdentityFirstStage,
    VectorQuantizer,
    codebook_usage,
    load_first_stage,
    nearest,
)
from ldm_edu.first_stage.tiling import decode_tiled, encode_tiled

__all__ = [
    "Adversary",
    "AutoencoderKL",
    "AutoencoderVQ",
    "DiagonalGaussian",
    "FirstStage",
    "FirstStageLoss",
    "IdentityFirstStage",
    "PatchDiscriminator",
    "PerceptualDistance",
    "Quantized",
    "VectorQuantizer",
    "codebook_usage",
    "decode_tiled",
    "encode_tiled",
    "estimate_scale",
    "from_diffusers",
    "load_first_stage",
    "load_published",
    "nearest",
    "save_diffusers",
    "to_diffusers",
]
