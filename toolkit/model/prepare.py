"""A UNet made ready: one that is frozen, or one with an adapter in it, to train: kernel, memory plan, one flat parameter.

Test: pytest tests/model/test_prepare.py (against diffusers and PEFT as they come)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from toolkit.config import LEAN, NEEDS, Part
from toolkit.model.attention import KERNELS, set_attention
from toolkit.model.blocks import SelfAttention, install_blocks
from toolkit.model.cross import CollapsedAttention, CrossTables, group_layers
from toolkit.model.flat import FlatAdapter, Stack
from toolkit.model.graphs import Capture, Replayed
from toolkit.model.lora import compute_dtypes
from toolkit.model.quantize import quantize_weights
from toolkit.model.recompute import find_top_level, recompute_feed_forwards, recompute_whole_modules

# the fastest first
#   fast      keeps every activation for the backward pass
#   balanced  keeps the inputs of whole modules on the top level, and computes the others there a second time
#   small     does so on all levels, and once more in the top level's feed-forward layers
Plan = Literal["fast", "balanced", "small"]


def tell_parts(parts: Collection[Part]) -> str:
    """The parts of lean blocks that are on, in a word where they are all or none."""
    return {0: "stock", len(LEAN): "lean"}.get(len(parts), " + ".join(parts))


class Trainable:
    """What trains in a UNet, and what must be done before each of its forward passes."""

    def __init__(self, adapter: FlatAdapter, tables: list[CrossTables]) -> None:
        self.adapter, self.tables = adapter, tables
        self.replayed: Replayed | None = None

    def begin(self, tokens_BLE: Tensor) -> None:
        """Before each forward pass; tokens_BLE  what the UNet attends to, in its precision."""
        if self.replayed is None or not torch.is_grad_enabled():  # else the pass itself begins with this
            self._make_ready(self.adapter(), tokens_BLE)

    def _make_ready(self, flat: Tensor, tokens_BLE: Tensor) -> None:
        self.adapter.spread(flat)
        build_tables(self.tables, tokens_BLE)

    def replay(self, unet: nn.Module, capture: Capture = torch.cuda.make_graphed_callables) -> None:
        """Have the UNet's training passes captured at the first and replayed; nothing that trains may be read outside."""
        self.replayed = Replayed(unet.forward, self._make_ready, self.adapter, capture)
        unet.forward = self.replayed


def prepare_unet(
    unet: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    dtype: torch.dtype,
    attention: str,
    plan: Plan,
    parts: Collection[Part],
    quantize: str | None = None,
) -> Trainable:
    """Once for each UNet.

    parameters  those of inject_lora
    dtype       in which the UNet computes
    parts       of lean blocks; none for quantized weights
    quantize    int8 or None: how its frozen weights are kept
    """
    set_attention(unet, attention)
    stacks, tables = install_parts(unet, attention, parts)
    if plan != "fast":
        top = find_top_level(unet)
        recompute_whole_modules(unet if plan == "small" else top)
        if plan == "small":
            recompute_feed_forwards(top)
    adapter = FlatAdapter(unet, parameters, compute_dtypes(unet, parameters, dtype), stacks)
    if quantize is not None:
        quantize_weights(unet)  # now that what trains is no longer among its parameters
    return Trainable(adapter, tables)


def prepare_frozen(unet: nn.Module, attention: str, parts: Collection[Part]) -> Callable[[Tensor], None]:
    """Once for each UNet without an adapter; returns what to call before its forward passes on other tokens, with them."""
    set_attention(unet, attention)
    return partial(build_tables, install_parts(unet, attention, parts)[1])


def build_tables(tables: Sequence[CrossTables], tokens_BLE: Tensor) -> None:
    """Build all tables of a network."""
    for table in tables:
        table.build(tokens_BLE)


def install_parts(unet: Any, attention: str, parts: Collection[Part]) -> tuple[list[Stack], list[CrossTables]]:
    """Give a frozen network forward passes of fewer operations.

    returns  what a FlatAdapter must fill for its layers, and the tables of its cross-attention
    raises   ValueError where it is adapted by something else than plain LoRA
    """
    assert all(NEEDS.get(part, set()) <= set(parts) for part in parts)
    kernel, stacks = KERNELS[attention], []
    tables = [CrossTables(layers) for layers in group_layers(unet)] if "cross" in parts else []
    attending = {name: module for name, module in unet.named_modules() if name.endswith(".attn1")}
    fused = "passes" in parts and install_blocks(unet, "fused" in parts)
    for name, layer in attending.items() if "projections" in parts else ():
        processor = SelfAttention(name, layer, kernel)
        stacks += processor.stacks
        layer.set_processor(processor)
    for table in tables:
        stacks += table.stacks
        for layer in table.layers.values():
            layer.set_processor(CollapsedAttention(fused))
    return stacks, tables
