"""Activation checkpointing of modules: only their inputs are kept for the backward pass, which computes them again.

Test: pytest tests/model/test_recompute.py. diffusers' own switch for this UNet leaves the temporal blocks, the projections
and the mixers outside (huggingface/diffusers, transformer_temporal.py), which hold most of the memory.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_whole_modules(part: nn.Module) -> None:
    """Checkpoint what in a network, or a part of one, takes and gives one activation: residual blocks and transformers."""
    from diffusers.models.resnet import SpatioTemporalResBlock
    from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel

    _checkpoint_each(part, SpatioTemporalResBlock | TransformerSpatioTemporalModel)


def recompute_feed_forwards(part: nn.Module) -> None:
    """Checkpoint feed-forward layers, whose activations are the widest; in a checkpointed module they run a third time."""
    from diffusers.models.attention import FeedForward

    _checkpoint_each(part, FeedForward)


def find_top_level(unet: Any) -> nn.ModuleList:
    """The first and the last block, where height and width are the latents' own: their activations are the largest."""
    return nn.ModuleList([unet.down_blocks[0], unet.up_blocks[-1]])


def _checkpoint_each(part: nn.Module, kinds: Any) -> None:
    for module in part.modules():
        if isinstance(module, kinds):
            module.forward = functools.partial(_checkpointed, module.forward)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # No random numbers to replay: dropout's masks are keyed. Not reentrant: that gives an adapter below a frozen input none
    # of its gradients.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
