"""Latent diffusion, rebuilt from the paper up (Rombach et al. 2022): the parts of the course as a package."""

__version__ = "0.1.0"

from ldm_edu.first_stage.adversarial import Adversary, PatchDiscriminator
from ldm_edu.first_stage.autoencoder import AutoencoderKL, DiagonalGaussian, FirstStage, estimate_scale
from ldm_edu.conditioning.condition import Condition
from ldm_edu.conditioning.text import TextConditioner
from ldm_edu.data.cache import cached
from ldm_edu.data.celeba import CelebA
from ldm_edu.data.coco import COCO
from ldm_edu.data.folders import ImageFolder
from ldm_edu.data.registry import open_dataset
from ldm_edu.data.toy.datasets import ToyCOCO, ToyCelebA
from ldm_edu.diffusion.mixture import GaussianMixture
from ldm_edu.diffusion.schedule import NoiseSchedule, diffusion_loss
from ldm_edu.conditioning.guidance import Guidance, drop
from ldm_edu.evaluation.judge import SceneReader, prompt_accuracy
from ldm_edu.latent_diffusion import LatentDiffusion
from ldm_edu.first_stage.losses import FirstStageLoss
from ldm_edu.evaluation.features import ToyFeatures
from ldm_edu.evaluation.metrics import LPIPS, psnr, ssim
from ldm_edu.first_stage.published import load_published, save_diffusers
from ldm_edu.first_stage.quantization import AutoencoderVQ, IdentityFirstStage, VectorQuantizer, load_first_stage
from ldm_edu.training.dispatch import train
from ldm_edu.training.recipes import RECIPES, Recipe, find_recipe
from ldm_edu.diffusion.sampling import SeededNoise, Step, ddim, ddpm
from ldm_edu.basics import pick_device
from ldm_edu.errors import CheckpointError, LDMError
from ldm_edu.settings import load_settings
from ldm_edu.first_stage.tiling import decode_tiled, encode_tiled
from ldm_edu.training.stages import train_autoencoder
from ldm_edu.denoiser.unet import UNet

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
