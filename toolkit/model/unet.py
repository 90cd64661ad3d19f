"""Framer's UNet: diffusers' SVD UNet with nine input channels and a learned mask token.

Test: pytest tests/model. Sources: aim-uofa/Framer (what differs from SVD), huggingface/diffusers (everything else).
"""

import functools
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import nn

# Published configurations, so that a run can be inspected before anything is downloaded (stabilityai/
# stable-video-diffusion-img2vid-xt unet/config.json; Framer's differs in in_channels).
SVD_CONFIG: dict[str, Any] = {
    "addition_time_embed_dim": 256,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
    "in_channels": 8,
    "layers_per_block": 2,
    "num_attention_heads": (5, 10, 20, 20),
    "num_frames": 25,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 768,
    "sample_size": 96,
    "transformer_layers_per_block": 1,
    "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 3,
}
PUBLISHED_CONFIGS = {
    "stabilityai/stable-video-diffusion-img2vid": SVD_CONFIG | {"num_frames": 14},
    "stabilityai/stable-video-diffusion-img2vid-xt": SVD_CONFIG,
    "wwen1997/framer_512x320": SVD_CONFIG | {"in_channels": 9},
}


class FramerUNet(UNetSpatioTemporalConditionModel):
    """The stock UNet plus `mask_token` (1, 1, 4, 1, 1), which stands in for the latents of a frame to generate."""

    # diffusers reads the names of the config off the signature
    @functools.wraps(UNetSpatioTemporalConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4, 1, 1))


def widen_conv_in(unet: UNetSpatioTemporalConditionModel) -> FramerUNet:
    """Turn an 8-channel SVD UNet into a 9-channel one whose output is the same: zero ninth column, zero mask token."""
    with torch.device("meta"):
        framer = FramerUNet.from_config({**unet.config, "in_channels": 9})
    weights = unet.state_dict()
    column = torch.zeros_like(weights["conv_in.weight"][:, :1])
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], column], dim=1)
    weights["mask_token"] = torch.zeros(1, 1, 4, 1, 1, dtype=column.dtype)
    framer.load_state_dict(weights, assign=True)
    return framer
