"""All that trains as one fp32 parameter; the network computes with views of it, cast once a micro-step.

Test: pytest tests/model/test_flat.py. Hundreds of small parameters cost an engine a hook and a slice each in every backward
pass; and fp32 matrices beside a bf16 base make every activation that they touch an fp32 one. In files the
matrices keep their names.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Place:
    """Where a network looks for a tensor: a module's own way to set an attribute looks into five dictionaries first."""

    attributes: dict[str, Any]
    name: str
    dtype: torch.dtype

    def put(self, value: Tensor) -> None:
        self.attributes[self.name] = value if value.dtype == self.dtype else value.to(self.dtype)


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
        # the others by shape: one view of many costs the host least
        alike: dict[torch.Size, list[str]] = defaultdict(list)
        for name, parameter in parameters.items():
            if name not in stacked:
                alike[parameter.shape].append(name)
        stacks = [*stacks, *map(Stack, alike.values())]
        self.shapes = {name: parameters[name].shape for stack in stacks for name in stack.names}
        self.dtype = dtypes[next(iter(self.shapes))] if len({*dtypes.values()}) == 1 else torch.float32
        self.flat = nn.Parameter(torch.cat([parameters[name].detach().float().flatten() for name in self.shapes]))
        places = {name: _take_out(network, name, dtypes[name]) for name in self.shapes}
        self._stacks = [
            (
                stack,
                torch.Size((len(stack.names), *self.shapes[stack.names[0]])),
                [places[name] for name in stack.names],
            )
            for stack in stacks
        ]
        self._lengths = [size.numel() for _, size, _ in self._stacks]
        self.spread(self())

    def spread(self, flat: Tensor) -> None:
        """Give the network the weights in what a call returned; before each forward pass."""
        parts = iter(flat.split(self._lengths))
        for stack, size, places in self._stacks:
            stack.value = next(parts).view(size)
            for place, value in zip(places, stack.value.unbind(), strict=True):
                place.put(value)

    def forward(self) -> Tensor:
        """The parameter in the network's precision, (n,); a call, because an engine that shards it fetches it for a call."""
        return self.flat.to(self.dtype, copy=True)  # always another tensor: engines hang hooks on what a call returns

    def split(self, state: State) -> State:
        """What an engine gathered of the one parameter, by the names of those it is made of."""
        names, sizes = list(self.shapes), [math.prod(shape) for shape in self.shapes.values()]
        parts = {key: tensor.split(sizes) for key, tensor in state[NAME].items()}
        return {n: {key: parts[key][i].view(self.shapes[n]) for key in parts} for i, n in enumerate(names)}

    def join(self, state: State) -> Mapping[str, Mapping[str, Tensor]]:
        """The reverse of split; each tensor is put together when it is asked for, and held by who asked."""
        return {NAME: _Joined([state[name] for name in self.shapes])}


class _Joined(Mapping[str, Tensor]):
    """What is kept of the one parameter, a tensor at a time: the ranks of a host might not have room for all of them."""

    def __init__(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        self.parts = parts

    def __getitem__(self, key: str) -> Tensor:
        return torch.cat([part[key].flatten() for part in self.parts])

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts[0])

    def __len__(self) -> int:
        return len(self.parts[0])


def _take_out(network: nn.Module, name: str, dtype: torch.dtype) -> _Place:
    """Remove a parameter from a network; returns where it was."""
    path, _, attribute = name.rpartition(".")
    module = network.get_submodule(path)
    delattr(module, attribute)
    return _Place(module.__dict__, attribute, dtype)
