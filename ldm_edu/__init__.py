"""Latent diffusion, rebuilt from the paper up (Rombach et al. 2022): the parts of the course as a package."""

__version__ = "0.1.0"

from ldm_edu.adversarial import Adversary, PatchDiscriminator
from ldm_edu.autoencoder import AutoencoderKL, DiagonalGaussian, FirstStage, estimate_scale
from ldm_edu.conditioning import Condition, TextConditioner
from ldm_edu.data import COCO, CelebA, ImageFolder, ToyCelebA, ToyCOCO, cached, open_dataset
from ldm_edu.diffusion import GaussianMixture, NoiseSchedule, diffusion_loss
from ldm_edu.guidance import Guidance, drop
from ldm_edu.judge import SceneReader, prompt_accuracy
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.losses import FirstStageLoss
from ldm_edu.metrics import LPIPS, ToyFeatures, psnr, ssim
from ldm_edu.published import load_published, save_diffusers
from ldm_edu.quantization import AutoencoderVQ, IdentityFirstStage, VectorQuantizer, load_first_stage
from ldm_edu.recipes import RECIPES, Recipe, find_recipe
from ldm_edu.sampling import SeededNoise, Step, ddim, ddpm
from ldm_edu.settings import CheckpointError, LDMError, load_settings, pick_device
from ldm_edu.tiling import decode_tiled, encode_tiled
from ldm_edu.training import train, train_autoencoder
from ldm_edu.unet import UNet

__all__ = [
    "COCO",
    "LPIPS",
    "RECIPES",
    "Adversary",
    "AutoencoderKL",
    "AutoencoderVQ",
    "CelebA",
    "CheckpointError",
    "Condition",
    "DiagonalGaussian",
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
    "ToyCOCO",
    "ToyCelebA",
    "ToyFeatures",
    "UNet",
    "VectorQuantizer",
    "cached",
    "ddim",
    "ddpm",
    "decode_tiled",
    "diffusion_loss",
    "drop",
    "encode_tiled",
    "estimate_scale",
    "find_recipe",
    "load_first_stage",
    "load_published",
    "load_settings",
    "open_dataset",
    "pick_device",
    "prompt_accuracy",
    "psnr",
    "save_diffusers",
    "ssim",
    "train",
    "train_autoencoder",
]
