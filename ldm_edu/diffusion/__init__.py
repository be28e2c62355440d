"""Forward diffusion and sampling (§ 3.2, app. B)."""

from ldm_edu.diffusion.mixture import GaussianMixture
from ldm_edu.diffusion.sampling import SAMPLERS, SeededNoise, Step, ddim, ddpm, last, posterior, timesteps
from ldm_edu.diffusion.schedule import NoiseLevels, NoiseSchedule, diffusion_loss

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
    "last",
    "posterior",
    "timesteps",
]
