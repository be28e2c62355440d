"""The latents of a data set, encoded once and kept."""

import json
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ldm_edu.basics import progress
from ldm_edu.checkpoints import weights_checksum
from ldm_edu.files import folder_for, load_notes, load_tensors, save_tensors
from ldm_edu.data.cache import SampleCache
from ldm_edu.errors import CheckpointError
from ldm_edu.first_stage.autoencoder import FirstStage
from ldm_edu.training.run import Run, RunAccelerator

__all__ = ["cached_latents"]


@torch.no_grad()
def encode_all(
    first_stage: FirstStage,
    dataset: SampleCache,
    accelerator: RunAccelerator,
    n: int | None = None,  # the first n images; None: all
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
    "Mean and log-variance of the images' latents, not rescaled (CPU)."
    n = len(dataset) if n is None else n
    parts = []
    for start in progress(range(0, n, 64), "encoding"):
        x = dataset.images(range(start, min(start + 64, n))).to(accelerator.device, accelerator.dtype)
        with accelerator.autocast():
            posterior = first_stage.posterior(x)
        parts.append((posterior.mean.float().cpu(), posterior.logvar.float().cpu()))
    means, logvars = zip(*parts)
    return torch.cat(means), torch.cat(logvars)


def cached_latents(
    path: Path,
    first_stage: FirstStage,
    dataset: SampleCache,
    run: Run,
    n: int | None = None,  # the first n images; None: all
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
    "What `encode_all` gives: read from the file `path` where that fits weights and images, else made and written there."
    n = len(dataset) if n is None else n
    notes = {"first_stage": weights_checksum(first_stage), "images": json.dumps(dataset.identity()), "n": str(n)}
    try:
        if load_notes(path) == notes:
            tensors = load_tensors(path)
            return tensors["mean"], tensors["logvar"]
    except (CheckpointError, KeyError):  # missing or damaged: it can be made again
        pass
    mean, logvar = encode_all(first_stage, dataset, run.accelerator, n)
    if run.is_main:
        folder_for(path)
        save_tensors({"mean": mean, "logvar": logvar}, path, notes=notes)
    return mean, logvar
