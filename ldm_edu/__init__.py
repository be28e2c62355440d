"""Latent diffusion, rebuilt from the paper up (Rombach et al. 2022): the parts of the course as a package."""

__version__ = "0.1.0"

from ldm_edu.errors import CheckpointError, DataError, DownloadError, LDMError
from ldm_edu.basics import pick_device, set_seed
from ldm_edu.settings import load_settings
from ldm_edu.data import COCO, CelebA, ImageFolder, ToyCOCO, ToyCelebA, cached, collate, open_dataset
from ldm_edu.first_stage import (
    Adversary,
    AutoencoderKL,
    AutoencoderVQ,
    DiagonalGaussian,
    FirstStage,
    FirstStageLoss,
    IdentityFirstStage,
    PatchDiscriminator,
    VectorQuantizer,
    decode_tiled,
    encode_tiled,
    estimate_scale,
    load_first_stage,
    load_published,
    save_diffusers,
)
from ldm_edu.diffusion import (
    SAMPLERS,
    GaussianMixture,
    NoiseSchedule,
    SeededNoise,
    Step,
    ddim,
    ddpm,
    diffusion_loss,
    last,
)
from ldm_edu.denoiser import UNet
from ldm_edu.conditioning import Condition, Guidance, TextConditioner, TextTransformer, WordTokenizer, drop
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.evaluation import LPIPS, SceneReader, ToyFeatures, prompt_accuracy, psnr, score_first_stage, ssim
from ldm_edu.training import RECIPES, Recipe, find_recipe, train, train_autoencoder

__all__ = [
    "COCO",
    "LPIPS",
    "RECIPES",
    "SAMPLERS",
    "Adversary",
    "AutoencoderKL",
    "AutoencoderVQ",
    "CelebA",
    "CheckpointError",
    "Condition",
    "DataError",
    "DiagonalGaussian",
    "DownloadError",
    "FirstStage",
    "FirstStageLoss",
    "GaussianMixture",
    "Guidance",
    "IdentityFirstStage",
    "ImageFolder",
    "LDMError",
    "LatentDiffusion",
    "NoiseSchedule",
    "PatchDiscriminator",
    "Recipe",
    "SceneReader",
    "SeededNoise",
    "Step",
    "TextConditioner",
    "TextTransformer",
    "ToyCOCO",
    "ToyCelebA",
    "ToyFeatures",
    "UNet",
    "VectorQuantizer",
    "WordTokenizer",
    "cached",
    "collate",
    "ddim",
    "ddpm",
    "decode_tiled",
    "diffusion_loss",
    "drop",
    "encode_tiled",
    "estimate_scale",
    "find_recipe",
    "last",
    "load_first_stage",
    "load_published",
    "load_settings",
    "open_dataset",
    "pick_device",
    "prompt_accuracy",
    "psnr",
    "save_diffusers",
    "score_first_stage",
    "set_seed",
    "ssim",
    "train",
    "train_autoencoder",
]
