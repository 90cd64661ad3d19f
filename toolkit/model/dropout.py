"""Dropout before an adapter's A matrices, with masks that depend on the sample alone.

Test: pytest tests/model/test_lora.py. PEFT's own dropout draws from the global generator, so its masks would follow the
order of layers, the grouping into micro-batches and every recomputation of gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from toolkit.rng import rng


class KeyedDropout(nn.Module):
    """Drops each element with probability p inside adapter_dropout, and is the identity elsewhere."""

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.keep = 1 - p
        self.purpose = f"lora_dropout/{name}"
        self.key: tuple[int, Sequence[int]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x  (B * anything, ..., D), batch-major: rows of one sample lie together."""
        if self.key is None:
            return x
        seed, positions = self.key
        assert len(x) % len(positions) == 0, (x.shape, len(positions))
        shape = (len(x) // len(positions), *x.shape[1:])
        masks = [
            # drawn where it is used: on the CPU the masks of a full-size step would take longer than the step
            torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(
                self.keep, generator=rng(seed, self.purpose, position, x.device)
            )
            for position in positions
        ]
        return x * torch.cat(masks) / self.keep


@contextmanager
def adapter_dropout(unet: nn.Module, seed: int, positions: Sequence[int]) -> Iterator[None]:
    """Switch the adapter's dropout on for one micro-batch, forward and backward.

    positions  (B,) of the samples: sample b's masks depend on seed, layer and positions[b] only. The backward pass belongs
               inside, because gradient checkpointing recomputes there; outside, torch reports a CheckpointError.
    """
    layers = [module for module in unet.modules() if isinstance(module, KeyedDropout)]
    for layer in layers:
        layer.key = (seed, tuple(positions))
    try:
        yield
    finally:
        for layer in layers:
            layer.key = None
