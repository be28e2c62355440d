"""The denoiser: attention and the UNet (§ 3.2 and 3.3, app. E)."""

from ldm_edu.denoiser.attention import (
    GEGLU,
    AttentionBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
    TransformerBlock,
)
from ldm_edu.denoiser.unet import Downsample, ResBlock, UNet, timestep_embedding

__all__ = [
    "GEGLU",
    "AttentionBlock",
    "CrossAttention",
    "Downsample",
    "FeedForward",
    "ResBlock",
    "SpatialTransformer",
    "TransformerBlock",
    "UNet",
    "timestep_embedding",
]
