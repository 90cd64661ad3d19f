"""All that trains as one fp32 parameter; the network computes with views of it, cast once a micro-step.

Test: pytest tests/model/test_flat.py. Hundreds of small parameters cost an engine a hook and a slice each in every backward
pass; and fp32 matrices beside a bf16 base make every activation that they touch an fp32 one. In files the
matrices keep their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, dict[str, Tensor]]  # {parameter name: {what is kept of it: tensor}}, as engines gather it
NAME = "flat"  # of the one parameter, here and for an engine


class Stack:
    """Parameters of one shape that lie side by side."""

    value: Tensor  # (n, ...), as it was spread last

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)


class FlatAdapter(nn.Module):
    """The trainable parameters of a network, taken out of it, end to end in `flat`."""

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        dtypes: Mapping[str, torch.dtype],
        stacks: Sequence[Stack] = (),
    ) -> None:
        """
        parameters  of the network, by the names it has for them; from here on it holds plain tensors in their places
        dtypes      in which the network computes with each
        stacks      of some of them, to be filled at each spread as well
        """
        super().__init__()
        stacked = {name for stack in stacks for name in stack.names}
        self._stacks = [*stacks, *(Stack([name]) for name in parameters if name not in stacked)]
        self.shapes = {name: parameters[name].shape for stack in self._stacks for name in stack.names}
        self.dtype = dtypes[next(iter(self.shapes))] if len({*dtypes.values()}) == 1 else torch.float32
        self.flat = nn.Parameter(torch.cat([parameters[name].detach().float().flatten() for name in self.shapes]))
        self._sizes = [torch.Size((len(s.names), *self.shapes[s.names[0]])) for s in self._stacks]
        # a module's own way to set an attribute looks into five dictionaries first
        self._places = [[_take_out(network, name, dtypes[name]) for name in stack.names] for stack in self._stacks]
        self.spread()

    def spread(self) -> None:
        """Give the network its weights as they are now; before each forward pass."""
        parts = self().split([size.numel() for size in self._sizes])
        for stack, size, part, places in zip(self._stacks, self._sizes, parts, self._places, strict=True):
            stack.value = part.view(size)
            # one alone not by unbind, whose gradient is a copy
            values = stack.value.unbind() if len(places) > 1 else (part.view(size[1:]),)
            for (attributes, attribute, dtype), value in zip(places, values, strict=True):
                attributes[attribute] = value if value.dtype == dtype else value.to(dtype)

    def forward(self) -> Tensor:
        """The parameter in the network's precision, (n,); a call, because an engine that shards it fetches it for a call."""
        return self.flat.to(self.dtype, copy=True)  # always another tensor: engines hang hooks on what a call returns

    def split(self, state: State) -> State:
        """What an engine gathered of the one parameter, by the names of those it is made of."""
        names, sizes = list(self.shapes), [math.prod(shape) for shape in self.shapes.values()]
        parts = {key: tensor.split(sizes) for key, tensor in state[NAME].items()}
        return {n: {key: parts[key][i].view(self.shapes[n]) for key in parts} for i, n in enumerate(names)}

    def join(self, state: State) -> State:
        """The reverse of split."""
        keys = next(iter(state.values())).keys()
        return {NAME: {key: torch.cat([state[name][key].flatten() for name in self.shapes]) for key in keys}}


def _take_out(network: nn.Module, name: str, dtype: torch.dtype) -> tuple[dict[str, Any], str, torch.dtype]:
    """Remove a parameter; returns the attributes of its module, its name there, and its dtype."""
    path, _, attribute = name.rpartition(".")
    module = network.get_submodule(path)
    delattr(module, attribute)
    return module.__dict__, attribute, dtype
