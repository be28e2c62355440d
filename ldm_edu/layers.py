"""What the first stage and the UNet share: GroupNorm, upsampling, and PyTorch's attention."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm_edu.checks import check_counts
from ldm_edu.errors import LDMError

__all__ = ["Upsample", "fused_attention", "group_norm"]


def group_norm(
    channels: int,  # channels of the input
    groups: int = 32,  # groups that are normalised together; must divide `channels`
    eps: float = 1e-5,  # 1e-5 in the UNet's blocks, 1e-6 in the first stage and in transformers over maps
) -> nn.GroupNorm:
    "GroupNorm as in the released code; `LDMError` where `groups` does not divide `channels`."
    check_counts(channels=channels, groups=groups)
    if channels % groups:
        raise LDMError(f"channels={channels} cannot be split into groups={groups}: choose a multiple of {groups}")
    return nn.GroupNorm(groups, channels, eps=eps)


class Upsample(nn.Module):
    "Twice the height and width: nearest neighbour, then a 3×3 convolution."

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        "(b, c, h, w) -> (b, c, 2h, 2w)."
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def fused_attention(
    q: Float[Tensor, "*b n d"],  # queries
    k: Float[Tensor, "*b m d"],  # keys
    v: Float[Tensor, "*b m c"],  # values
) -> Float[Tensor, "*b n c"]:
    "PyTorch's `scaled_dot_product_attention`, with contiguous arguments on MPS."
    if q.device.type == "mps":
        # torch 2.8 and some later versions are silently wrong there otherwise (PyTorch issues 163597 and 181133)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v)
