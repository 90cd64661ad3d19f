"""A network's passes captured once as CUDA graphs and replayed: its thousands of kernels cost one launch.

Test: pytest tests/model/test_graphs.py. A graph reads and writes the same memory each time, so all that changes between
micro-steps goes in as a tensor: the trainable parameter too, of which the passes make their matrices and tables inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Passes = Callable[..., Tensor]  # (flat, input, time, tokens, ids) to the raw output, differentiable
Capture = Callable[..., Any]  # torch.cuda.make_graphed_callables, where there is a GPU


class Replayed:
    """Forward passes of a UNet with gradients, which are captured at the first and replayed from then on.

    What is given must have the first pass's shapes. Passes without gradients stay the network's own.
    """

    def __init__(
        self,
        forward: Callable[..., tuple[Tensor]],
        make_ready: Callable[[Tensor, Tensor], None],
        read_flat: Callable[[], Tensor],
        capture: Capture = torch.cuda.make_graphed_callables,
    ) -> None:
        """
        forward     of the UNet
        make_ready  what must be done before it, with what trains (as read_flat gives it) and the tokens
        """
        self.forward, self.make_ready, self.read_flat, self.capture = forward, make_ready, read_flat, capture
        self.passes: Passes | None = None
        self.shapes: list[torch.Size] = []

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """As diffusers' UNetSpatioTemporalConditionModel is called."""
        inputs = (sample, timestep, encoder_hidden_states, added_time_ids)
        if not torch.is_grad_enabled():
            return self.forward(*inputs, return_dict=False)
        shapes = [x.shape for x in inputs]
        if self.passes is None:
            # of their own: a tensor that was part of a backward pass before would tie the captured one to its stream
            given = (self.read_flat(), *inputs)
            examples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in given)
            self.passes, self.shapes = self.capture(self._pass, examples), shapes
        assert shapes == self.shapes, f"captured for {self.shapes}, given {shapes}"
        flat = self.read_flat()
        flat.register_hook(torch.clone)  # its gradient lies in the graph's memory, which the next replay overwrites
        return (self.passes(flat, *inputs),)

    def _pass(self, flat: Tensor, sample: Tensor, timestep: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
        self.make_ready(flat, tokens)
        return self.forward(sample, timestep, tokens, ids, return_dict=False)[0]
