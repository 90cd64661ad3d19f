"""Activation checkpointing of whole modules: only their inputs are kept for the backward pass, which computes them again.

Test: pytest tests/model/test_recompute.py. diffusers' own switch for this UNet leaves the temporal blocks, the projections
and the mixers outside (huggingface/diffusers, transformer_temporal.py), which hold most of the memory.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_whole_modules(unet: nn.Module) -> None:
    """Checkpoint the parts that take and give one activation each: residual blocks and transformers, space with time."""
    from diffusers.models.resnet import SpatioTemporalResBlock
    from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel

    for module in unet.modules():
        if isinstance(module, SpatioTemporalResBlock | TransformerSpatioTemporalModel):
            module.forward = functools.partial(_checkpointed, module.forward)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # No random numbers to replay: dropout's masks are keyed. Not reentrant: that gives an adapter below a frozen input none
    # of its gradients.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
