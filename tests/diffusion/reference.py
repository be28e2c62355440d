"""A plain reference for ldm_edu.diffusion, in float64 and NumPy, written from the papers, without the package.

`bar` is the share of the signal's variance at each level (alphas_cumprod), and level -1 is the clean end. A denoiser is
a function f(x, t) of an array and one level. Each walk gives a list of (t, x after the step, guess of x0).
"""

import numpy as np


def betas(kind: str, T: int, start: float, end: float, zero_terminal_snr: bool = False) -> np.ndarray:
    t = np.arange(T)
    share = t / max(T - 1, 1)
    if kind == "linear":
        values = start + (end - start) * share
    elif kind == "scaled_linear":
        values = (np.sqrt(start) + (np.sqrt(end) - np.sqrt(start)) * share) ** 2
    else:  # cosine
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        values = np.minimum(1 - f[1:] / f[:-1], 0.999)
    if zero_terminal_snr:  # Lin et al. 2023, algorithm 1
        root = np.sqrt(np.cumprod(1 - values))
        first, last = root[0], root[-1]
        bar = ((root - last) * first / (first - last)) ** 2
        values = 1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    return values


def levels(T: int, steps: int, spacing: str) -> list[int]:
    if spacing == "leading":
        return [int(t) for t in (np.arange(steps) * T // steps + 1)[::-1]]
    return [int(t) - 1 for t in np.round(np.arange(steps, 0, -1) * T / steps)]


def guesses(prediction: str, said: np.ndarray, x: np.ndarray, bar_t: float) -> tuple[np.ndarray, np.ndarray]:
    "(x0, noise) from what the denoiser said."
    alpha, sigma = np.sqrt(bar_t), np.sqrt(1 - bar_t)
    if prediction == "epsilon":
        return (x - sigma * said) / alpha, said
    if prediction == "x0":
        return said, (x - alpha * said) / sigma
    return alpha * x - sigma * said, sigma * x + alpha * said


def share(bar: np.ndarray, t: int) -> float:
    return 1.0 if t < 0 else float(bar[t])


def ddpm(denoise, x, bar, prediction, pairs, noise):
    "Ho et al. 2020, eq. 7, from t to any s. `noise()` draws; it is not called where nothing is added."
    walk = []
    for t, s in pairs:
        bar_t, bar_s = share(bar, t), share(bar, s)
        x0, _ = guesses(prediction, denoise(x, t), x, bar_t)
        beta = 1 - bar_t / bar_s
        x = np.sqrt(bar_s) * beta / (1 - bar_t) * x0 + np.sqrt(bar_t / bar_s) * (1 - bar_s) / (1 - bar_t) * x
        variance = (1 - bar_s) / (1 - bar_t) * beta
        if variance > 0:
            x = x + np.sqrt(variance) * noise()
        walk.append((t, x, x0))
    return walk


def ddim(denoise, x, bar, prediction, pairs, noise=None, eta=0.0):
    "Song et al. 2021, eq. 12 and 16."
    walk = []
    for t, s in pairs:
        bar_t, bar_s = share(bar, t), share(bar, s)
        x0, eps = guesses(prediction, denoise(x, t), x, bar_t)
        std = eta * np.sqrt((1 - bar_s) / (1 - bar_t)) * np.sqrt(1 - bar_t / bar_s)
        x = np.sqrt(bar_s) * x0 + np.sqrt(1 - bar_s - std**2) * eps
        if std > 0:
            x = x + std * noise()
        walk.append((t, x, x0))
    return walk


def heun(denoise, x, bar, prediction, pairs):
    "The mean of two guesses of x0, at t and where a step of DDIM leads; a step to the clean end is one of DDIM."
    walk = []
    for t, s in pairs:
        bar_t, bar_s = share(bar, t), share(bar, s)
        x0, eps = guesses(prediction, denoise(x, t), x, bar_t)
        mean = x0
        if s >= 0:
            trial = np.sqrt(bar_s) * x0 + np.sqrt(1 - bar_s) * eps
            mean = (x0 + guesses(prediction, denoise(trial, s), trial, bar_s)[0]) / 2
        ratio = np.sqrt((1 - bar_s) / (1 - bar_t))
        x = ratio * x + (np.sqrt(bar_s) - np.sqrt(bar_t) * ratio) * mean
        walk.append((t, x, x0))
    return walk


def dpm_solver_pp(denoise, x, bar, prediction, pairs):
    "Lu et al. 2022, algorithm 2, in the half logarithms of the SNR; first order at the start and to the clean end."

    def half_log_snr(share_left):
        with np.errstate(divide="ignore"):
            return np.log(np.sqrt(share_left)) - np.log(np.sqrt(1 - share_left))

    walk, before, h_before = [], None, None
    for t, s in pairs:
        bar_t, bar_s = share(bar, t), share(bar, s)
        x0, _ = guesses(prediction, denoise(x, t), x, bar_t)
        h = half_log_snr(bar_s) - half_log_snr(bar_t)
        D = x0
        if before is not None and s >= 0 and np.isfinite(h_before):  # infinite after a level without signal: r is, too
            r = h_before / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x = np.sqrt((1 - bar_s) / (1 - bar_t)) * x - np.sqrt(bar_s) * (np.exp(-h) - 1) * D
        before, h_before = x0, h
        walk.append((t, x, x0))
    return walk


def plms(denoise, x, bar, prediction, pairs):
    "Liu et al. 2022, as the released code has it: Adams and Bashforth on the noise, and a trial step at the start."

    def step(x, eps, bar_t, bar_s):
        x0 = (x - np.sqrt(1 - bar_t) * eps) / np.sqrt(bar_t)
        return np.sqrt(bar_s) * x0 + np.sqrt(1 - bar_s) * eps, x0

    walk, old = [], []
    for i, (t, s) in enumerate(pairs):
        bar_t, bar_s = share(bar, t), share(bar, s)
        eps = guesses(prediction, denoise(x, t), x, bar_t)[1]
        if not old:
            trial, _ = step(x, eps, bar_t, bar_s)
            following = pairs[min(i + 1, len(pairs) - 1)][0]  # the next level that is visited
            mix = (eps + guesses(prediction, denoise(trial, following), trial, share(bar, following))[1]) / 2
        elif len(old) == 1:
            mix = (3 * eps - old[-1]) / 2
        elif len(old) == 2:
            mix = (23 * eps - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            mix = (55 * eps - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x, x0 = step(x, mix, bar_t, bar_s)
        old = [*old, eps][-3:]
        walk.append((t, x, x0))
    return walk
