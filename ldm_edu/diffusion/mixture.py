"""A Gaussian mixture: data whose exact denoiser is known at every noise level (page 21_diffusion derives it)."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldm_edu.checks import check_count, check_tensor
from ldm_edu.diffusion.levels import NoiseLevels, _like, per_sample
from ldm_edu.diffusion.schedule import NoiseSchedule
from ldm_edu.errors import LDMError

__all__ = ["GaussianMixture"]


def log_joint(
    x: Float[Tensor, "b d"],  # points
    means: Float[Tensor, "*#b k d"],  # centre of each Gaussian
    variances: Float[Tensor, "*#b k"],  # variance of each Gaussian, the same in all directions
    weights: Float[Tensor, "*#b k"],  # share of each Gaussian
) -> Float[Tensor, "b k"]:
    "log(w_k N(x | m_k, v_k)) at each point, for each Gaussian."
    squared = (x[:, None] - means).square().sum(-1)  # (b, k)
    return weights.log() - 0.5 * (squared / variances + x.shape[1] * (2 * torch.pi * variances).log())


def _clean_mean(
    x: Float[Tensor, "b d"],  # noisy samples, alpha x0 + sigma eps
    alpha: Float[Tensor, "b 1"],  # amplitude of the signal in each sample
    sigma: Float[Tensor, "b 1"],  # amplitude of the noise in each sample
    means: Float[Tensor, "k d"],  # the mixture that x0 comes from
    stds: Float[Tensor, "k"],
    weights: Float[Tensor, "*#b k"],
) -> Float[Tensor, "b d"]:
    "E[x0 | x]: the mean of all clean samples that could have become `x`, weighted by their posterior probability."
    variances = alpha**2 * stds**2 + sigma**2  # (b, k)
    centres = alpha[..., None] * means  # (b, k, d)
    share = log_joint(x, centres, variances, weights).softmax(-1)  # (b, k)
    slope = alpha * stds**2 / variances  # (b, k)
    guesses = means + slope[..., None] * (x[:, None] - centres)  # (b, k, d)
    return torch.einsum("bk,bkd->bd", share, guesses)


def _flat(x: Tensor) -> Tensor:
    "(n, *shape) -> (n, d)."
    return x.reshape(len(x), -1)


class GaussianMixture:
    "Isotropic Gaussians with weights, in any number of dimensions: data whose exact denoiser is known."

    def __init__(
        self,
        means: Float[Tensor, "k *shape"],  # centre of each Gaussian
        stds: Float[Tensor, "k"],  # standard deviation of each, the same in all directions; 0 is a point
        weights: Float[Tensor, "k"] | None = None,  # share of each; equal shares where not given
    ):
        weights = torch.ones_like(stds) if weights is None else weights
        for name, values, shape in (
            ("means", means, ("k", "...")),
            ("stds", stds, ("k",)),
            ("weights", weights, ("k",)),
        ):
            if not check_tensor(name, values, shape).isfinite().all():
                raise LDMError(f"{name} should be finite numbers")
        if not len(means) == len(stds) == len(weights):
            lengths = f"{len(means)} means, {len(stds)} stds and {len(weights)} weights"
            raise LDMError(f"{lengths}: each Gaussian needs one of each")
        if (stds < 0).any() or (weights < 0).any() or weights.sum() <= 0:
            raise LDMError("stds and weights must not be negative, and some weight must be positive")
        self.means = means
        self.stds = stds
        self.weights = weights / weights.sum()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n *shape"]:
        "`n` samples."
        check_count("n", n)
        k = self.weights.multinomial(n, replacement=True, generator=generator)  # (n,)
        z = torch.randn(n, *self.means.shape[1:], generator=generator, dtype=self.means.dtype)
        return self.means[k] + per_sample(self.stds, k, z) * z

    @property
    def mean(self) -> Float[Tensor, "*shape"]:
        "Mean of the mixture."
        return torch.tensordot(self.weights, self.means, dims=1)

    @property
    def cov(self) -> Float[Tensor, "d d"]:
        "Covariance of the mixture, over its flattened dimensions."
        apart = _flat(self.means - self.mean)  # (k, d)
        within = (self.weights @ self.stds**2) * torch.eye(apart.shape[1]).to(apart)
        return apart.T @ (self.weights[:, None] * apart) + within

    def log_prob(self, x: Float[Tensor, "b *shape"]) -> Float[Tensor, "b"]:
        "Natural logarithm of the density at each sample; LDMError where a Gaussian is a point, which has no density."
        if check_tensor("x", x, ("b", "...")).shape[1:] != self.means.shape[1:]:
            raise LDMError(f"x should have the shape (b, *{tuple(self.means.shape[1:])}), not {tuple(x.shape)}")
        if not self.stds.all():
            raise LDMError("a Gaussian with the standard deviation 0 is a point, which has no density")
        means, stds, weights = (_like(v, x) for v in (self.means, self.stds, self.weights))
        return log_joint(_flat(x), _flat(means), stds**2, weights).logsumexp(-1)

    def noised(self, schedule: NoiseLevels, t: int) -> "GaussianMixture":
        "The distribution of x_t: again a mixture, of means alpha m and variances alpha² s² + sigma²."
        t = check_count("t", t, 0, len(schedule.alpha) - 1)
        alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
        return GaussianMixture(alpha * self.means, (alpha**2 * self.stds**2 + sigma**2).sqrt(), self.weights)

    def posterior_mean(
        self,
        levels: NoiseLevels,
        x_t: Float[Tensor, "b *shape"],  # noisy samples
        t: Int[Tensor, "b"],  # level of each
        cond: Any = None,  # `cond.vector` (b, k), where given, replaces the weights
    ) -> tuple[Float[Tensor, "b *shape"], Float[Tensor, "b *shape"]]:
        "E[x0 | x_t] and E[noise | x_t]: what a perfect denoiser answers, page 21_diffusion."
        alpha, sigma = per_sample(levels.alpha, t, x_t), per_sample(levels.sigma, t, x_t)
        vector = getattr(cond, "vector", None)
        weights = self.weights if vector is None else vector
        means, stds, weights = (_like(v, x_t) for v in (self.means, self.stds, weights))
        x0 = _clean_mean(_flat(x_t), _flat(alpha), _flat(sigma), _flat(means), stds, weights)
        x0 = x0.reshape(x_t.shape)
        return x0, (x_t - alpha * x0) / sigma

    def denoiser(self, schedule: NoiseSchedule) -> Callable[..., Tensor]:
        "The exact denoiser f(x_t, t, cond), in terms of what the schedule says a network predicts."

        def denoise(x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return schedule.target(*self.posterior_mean(schedule, x_t, t, cond), t)

        return denoise
