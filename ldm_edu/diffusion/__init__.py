"""Forward diffusion and sampling (§ 3.2, app. B)."""

from ldm_edu.diffusion.inpainting import repaint
from ldm_edu.diffusion.levels import NoiseLevels
from ldm_edu.diffusion.mixture import GaussianMixture
from ldm_edu.diffusion.sampling import (
    SAMPLERS,
    SeededNoise,
    Step,
    ddim,
    ddpm,
    dpm_solver_pp,
    heun,
    last,
    posterior,
    timesteps,
)
from ldm_edu.diffusion.schedule import NoiseSchedule, diffusion_loss

__all__ = [
    "SAMPLERS",
    "GaussianMixture",
    "NoiseLevels",
    "NoiseSchedule",
    "SeededNoise",
    "Step",
    "ddim",
    "ddpm",
    "diffusion_loss",
    "dpm_solver_pp",
    "heun",
    "last",
    "posterior",
    "repaint",
    "timesteps",
]
