"""Random UNets of SVD's architecture, small enough to run by the dozen."""

from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit.model.unet import FramerUNet

SMALL: dict[str, Any] = {
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "num_attention_heads": (2, 4),
    "cross_attention_dim": 16,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "num_frames": 3,
}


def make_unet(seed: int = 0, dtype: torch.dtype = torch.float32) -> FramerUNet:
    """A frozen FramerUNet of random weights: unlike the tiny base's, no branch of it is silent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = FramerUNet(in_channels=9, **SMALL)
        torch.nn.init.normal_(unet.mask_token)
    return unet.to(dtype).requires_grad_(False).eval()


def make_inputs(channels: int = 9, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two clips of three frames of 8x8 latents, with everything the UNet reads."""
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 3, channels, 8, 8, generator=generator).to(dtype),
        "timestep": torch.tensor([0.3, -0.8]),
        "encoder_hidden_states": torch.randn(2, 2, 16, generator=generator).to(dtype),
        "added_time_ids": torch.tensor([[6.0, 127, 0], [3, 20, 0.1]]),
    }


def forward(unet: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return unet(**inputs, return_dict=False)[0]


def wake(parameters: dict[str, torch.nn.Parameter], std: float = 0.3) -> None:
    """Give the zero B matrices values, as training would."""
    for i, (name, parameter) in enumerate(parameters.items()):
        if ".lora_B." in name:
            # drawn by the CPU, so that every device is given the same
            parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * std)


@pytest.fixture
def unet() -> FramerUNet:
    return make_unet()
