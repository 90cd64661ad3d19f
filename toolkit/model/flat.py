"""All that trains as one fp32 parameter; the network computes with views of it, cast once a micro-step.

Test: pytest tests/model/test_flat.py. Hundreds of small parameters cost an engine a hook and a slice each in every backward
pass; and fp32 matrices beside a bf16 base make every activation that they touch an fp32 one. In files the
matrices keep their names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
        grouped = dict.fromkeys(name for names in groups for name in names)
        parameters = {name: parameters[name] for name in grouped} | dict(parameters)
        self.groups, self.stacks = groups, {} if stacks is None else stacks
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._dtypes = [dtypes[name] for name in parameters]
        self.dtype = self._dtypes[0] if len({*self._dtypes}) == 1 else torch.float32
        self.flat = nn.Parameter(torch.cat([p.detach().float().flatten() for p in parameters.values()]))
        # a list, whose modules are not this one's own
        self._places = [
            (network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in parameters
        ]
        for module, attribute in self._places:
            delattr(module, attribute)
        self.spread()

    def spread(self) -> None:
        """Give the network its weights as they are now; before each forward pass."""
        sizes = {names: math.prod(self.shapes[names[0]]) for names in self.groups}
        grouped = {name for names in self.groups for name in names}
        single = {name: math.prod(shape) for name, shape in self.shapes.items() if name not in grouped}
        parts = iter(self().split([*(size * len(names) for names, size in sizes.items()), *single.values()]))
        values: dict[str, Tensor] = {}
        for names in self.groups:
            self.stacks[names] = next(parts).view(len(names), *self.shapes[names[0]])
            values |= dict(zip(names, self.stacks[names].unbind(0), strict=True))
        values |= {name: part.view(self.shapes[name]) for name, part in zip(single, parts, strict=True)}
        for name, (module, attribute), dtype in zip(self.shapes, self._places, self._dtypes, strict=True):
            setattr(module, attribute, values[name].to(dtype))

    def forward(self) -> Tensor:
        """The parameter in the network's precision, (n,); a call, because an engine that shards it fetches it for a call."""
        return self.flat.to(self.dtype, copy=True)

    def split(self, state: State) -> State:
        """What an engine gathered of the one parameter, by the names of those it is made of."""
        names, sizes = list(self.shapes), [math.prod(shape) for shape in self.shapes.values()]
        parts = {key: tensor.split(sizes) for key, tensor in state[NAME].items()}
        return {n: {key: parts[key][i].view(self.shapes[n]) for key in parts} for i, n in enumerate(names)}

    def join(self, state: State) -> State:
        """The reverse of split."""
        keys = next(iter(state.values())).keys()
        return {NAME: {key: torch.cat([state[name][key].flatten() for name in self.shapes]) for key in keys}}
