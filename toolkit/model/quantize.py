"""Frozen weights in int8, with a scale for each output channel: half the memory of bf16, at some cost in quality.

Test: pytest tests/model/test_quantize.py. It is computed in the network's precision, with weights made whole for each use;
where modules are recomputed (memory: small) no activation keeps one of them. torchao's int8 weights are for linear layers
alone, which hold 826 of SVD's 1,524 million; torch's own parametrization serves convolutions too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Int8(nn.Module):
    """A weight as round(w / scale), scale = the largest |w| of its output channel / 127."""

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype  in which the network computes"""
        super().__init__()
        self.dtype = dtype

    def forward(self, rounded: Tensor, scale: Tensor) -> Tensor:
        return rounded.to(self.dtype) * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        channels = weight.float()
        scale = channels.abs().amax(tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-12) / 127
        return (channels / scale).round().to(torch.int8), scale.to(self.dtype)


def quantize_weights(network: nn.Module) -> None:
    """Round the weights of a network's frozen linear and convolution layers."""
    for layer in list(network.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d) and "weight" in layer._parameters:
            parametrize.register_parametrization(layer, "weight", Int8(layer.weight.dtype))
