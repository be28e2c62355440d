"""A Gaussian mixture, whose perfect denoiser is known at every noise level."""

import torch
from collections.abc import Callable
from jaxtyping import Float
from torch import Tensor
from ldm_edu.diffusion.schedule import NoiseLevels, NoiseSchedule, _like, per_sample
from ldm_edu.errors import LDMError

def log_joint(
    x: Float[Tensor, "b d"],  # where
    means: Float[Tensor, "*#b k d"],  # centre of each Gaussian
    variances: Float[Tensor, "*#b k"],  # variance of each, the same in all directions
    weights: Float[Tensor, "*#b k"],  # share of each
) -> Float[Tensor, "b k"]:
    "log of (weight k times the density of Gaussian k) at each sample."
    squared = (x[:, None] - means).square().sum(-1)  # (b, k)
    return weights.log() - 0.5 * (squared / variances + x.shape[1] * (2 * torch.pi * variances).log())


def posterior_mean(
    x: Float[Tensor, "b d"],  # noisy samples, alpha x0 + sigma eps
    alpha: Float[Tensor, "b 1"],  # amplitude of the signal in each
    sigma: Float[Tensor, "b 1"],  # amplitude of the noise in each
    means: Float[Tensor, "k d"],  # the mixture that x0 comes from
    stds: Float[Tensor, "k"],
    weights: Float[Tensor, "*#b k"],
) -> Float[Tensor, "b d"]:
    "E[x0 | x]: the mean of all clean samples that could have become `x`, each as likely as it is."
    variances = alpha**2 * stds**2 + sigma**2  # (b, k)
    centres = alpha[..., None] * means  # (b, k, d)
    share = log_joint(x, centres, variances, weights).softmax(-1)  # (b, k)
    slope = alpha * stds**2 / variances  # (b, k)
    guesses = means + slope[..., None] * (x[:, None] - centres)  # (b, k, d)
    return torch.einsum("bk,bkd->bd", share, guesses)


class GaussianMixture:
    "Isotropic Gaussians with weights, in any number of dimensions: data whose perfect denoiser is known."

    def __init__(
        self,
        means: Float[Tensor, "k *shape"],  # centre of each Gaussian
        stds: Float[Tensor, "k"],  # standard deviation of each, the same in all directions; 0 is a point
        weights: Float[Tensor, "k"] | None = None,  # share of each; equal shares where not given
    ):
        weights = torch.ones_like(stds) if weights is None else weights
        if not len(means) == len(stds) == len(weights):
            lengths = f"{len(means)} means, {len(stds)} stds and {len(weights)} weights"
            raise LDMError(f"{lengths}: each Gaussian needs one of each")
        if (stds < 0).any() or (weights < 0).any() or weights.sum() <= 0:
            raise LDMError("stds and weights must not be negative, and some weight must be positive")
        self.means, self.stds, self.weights = means, stds, weights / weights.sum()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n *shape"]:
        "`n` samples."
        k = self.weights.multinomial(n, replacement=True, generator=generator)  # (n,)
        z = torch.randn(n, *self.means.shape[1:], generator=generator, dtype=self.means.dtype)
        return self.means[k] + per_sample(self.stds, k, z) * z

    @property
    def mean(self) -> Float[Tensor, "*shape"]:
        "Mean of the mixture."
        return torch.tensordot(self.weights, self.means, dims=1)

    @property
    def cov(self) -> Float[Tensor, "d d"]:
        "Covariance of the mixture, over its dimensions laid flat."
        apart = (self.means - self.mean).reshape(len(self.means), -1)  # (k, d)
        within = (self.weights @ self.stds**2) * torch.eye(apart.shape[1]).to(apart)
        return apart.T @ (self.weights[:, None] * apart) + within

    def log_prob(self, x: Float[Tensor, "b *shape"]) -> Float[Tensor, "b"]:
        "Natural logarithm of the density at each sample."
        means, stds, weights = (_like(v, x) for v in (self.means, self.stds, self.weights))
        return log_joint(x.reshape(len(x), -1), means.reshape(len(means), -1), stds**2, weights).logsumexp(-1)

    def noised(self, schedule: NoiseLevels, t: int) -> "GaussianMixture":
        "Where these samples are at level t: a mixture again, of means alpha m and variances alpha² s² + sigma²."
        alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
        return GaussianMixture(alpha * self.means, (alpha**2 * self.stds**2 + sigma**2).sqrt(), self.weights)

    def denoiser(self, schedule: NoiseSchedule) -> Callable[..., Tensor]:
        "The perfect denoiser f(x_t, t, cond); `cond.vector` (b, k), where given, replaces the weights."

        def denoise(x_t, t, cond=None):
            alpha, sigma = per_sample(schedule.alpha, t, x_t), per_sample(schedule.sigma, t, x_t)
            told = getattr(cond, "vector", None)
            mixture = self.means, self.stds, self.weights if told is None else told
            means, stds, weights = (_like(v, x_t) for v in mixture)
            flat = (v.reshape(len(v), -1) for v in (x_t, alpha, sigma, means))
            x0 = posterior_mean(*flat, stds, weights).reshape(x_t.shape)
            return schedule.target(x0, (x_t - alpha * x0) / sigma, t)

        return denoise
