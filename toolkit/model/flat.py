"""All that trains as one fp32 parameter; the network computes with views of it, cast once a micro-step.

Test: pytest tests/model/test_flat.py. Hundreds of small parameters cost an engine a hook and a slice each in every backward
pass; and fp32 matrices beside a bf16 base make every activation that they touch an fp32 one. In files the
matrices keep their names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, dict[str, Tensor]]  # {parameter name: {what is kept of it: tensor}}, as engines gather it
NAME = "flat"  # of the one parameter, here and for an engine


class FlatAdapter(nn.Module):
    """The trainable parameters of a network, taken out of it, end to end in `flat`."""

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        dtypes: Mapping[str, torch.dtype],
        groups: Sequence[tuple[str, ...]] = (),
        stacks: dict[tuple[str, ...], Tensor] | None = None,
    ) -> None:
        """
        parameters  of the network, by the names it has for them; from here on it holds plain tensors in their places
        dtypes      in which the network computes with each
        groups      names of some of one shape, which are laid side by side
        stacks      where these are put at each spread as well, (n, ...) by their names
        """
        super().__init__()
        self.stacks = {} if stacks is None else stacks
        grouped = {name for names in groups for name in names}
        self._groups = [*groups, *((name,) for name in parameters if name not in grouped)]
        self.shapes = {name: parameters[name].shape for names in self._groups for name in names}
        self.dtype = dtypes[next(iter(self.shapes))] if len({*dtypes.values()}) == 1 else torch.float32
        self.flat = nn.Parameter(torch.cat([parameters[name].detach().float().flatten() for name in self.shapes]))
        self._stacked = [torch.Size((len(names), *self.shapes[names[0]])) for names in self._groups]
        self._places: list[list[tuple[dict[str, Any], str, torch.dtype]]] = []
        for names in self._groups:
            paths = [name.rpartition(".") for name in names]
            modules = [network.get_submodule(path) for path, _, _ in paths]
            for module, (_, _, attribute) in zip(modules, paths, strict=True):
                delattr(module, attribute)
            # written to directly: a module's own way to set an attribute looks into five dictionaries first
            self._places.append(
                [(m.__dict__, path[2], dtypes[n]) for m, path, n in zip(modules, paths, names, strict=True)]
            )
        self.spread()

    def spread(self) -> None:
        """Give the network its weights as they are now; before each forward pass."""
        parts = self().split([shape.numel() for shape in self._stacked])
        for names, shape, part, places in zip(self._groups, self._stacked, parts, self._places, strict=True):
            self.stacks[names] = part.view(shape)
            # one alone not by unbind, whose gradient is a copy
            values = self.stacks[names].unbind() if len(names) > 1 else (part.view(shape[1:]),)
            for (attributes, attribute, dtype), value in zip(places, values, strict=True):
                attributes[attribute] = value if value.dtype == dtype else value.to(dtype)

    def forward(self) -> Tensor:
        """The parameter in the network's precision, (n,); a call, because an engine that shards it fetches it for a call."""
        return self.flat.to(self.dtype)

    def split(self, state: State) -> State:
        """What an engine gathered of the one parameter, by the names of those it is made of."""
        names, sizes = list(self.shapes), [math.prod(shape) for shape in self.shapes.values()]
        parts = {key: tensor.split(sizes) for key, tensor in state[NAME].items()}
        return {n: {key: parts[key][i].view(self.shapes[n]) for key in parts} for i, n in enumerate(names)}

    def join(self, state: State) -> State:
        """The reverse of split."""
        keys = next(iter(state.values())).keys()
        return {NAME: {key: torch.cat([state[name][key].flatten() for name in self.shapes]) for key in keys}}
