"""What training does to an adapter, by block of the network: how much it adds to the weights, how fast it still changes.

Test: pytest tests/run/test_health.py
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from toolkit.model.flat import NAME, FlatAdapter, State

_BLOCK = re.compile(r"(?:down|up)_blocks\.\d+|mid_block|[^.]+")
_B = ".lora_B."


def name_block(parameter: str) -> str:
    """down_blocks.1.spatial of a weight in there, up_blocks.2.temporal, mid_block.spatial; conv_in of one outside."""
    match = _BLOCK.match(parameter)
    assert match is not None
    if "_block" not in match[0]:
        return match[0]
    return f"{match[0]}.{'temporal' if 'temporal_' in parameter else 'spatial'}"


class AdapterHealth:
    """Measures an adapter that lies whole on this rank.

    scalings  the factor before B A by module; others than LoRA's matrices and DoRA's magnitudes, which add nothing of their
              own, count as they are
    """

    def __init__(self, adapter: FlatAdapter, scalings: Mapping[str, float]) -> None:
        self.adapter, self.scalings = adapter, scalings
        self.blocks = sorted({name_block(name) for name in adapter.shapes})
        self.last = adapter.flat.detach().clone()

    @torch.no_grad()
    def measure(self) -> dict[str, dict[str, float]]:
        """The host waits for the device once.

        returns  {"adapter_norm": {block: Frobenius norm of what is added to its weights, scaling B A, and of extra weights},
                 "update_ratio": {block: norm of what trains that changed since the last call, over its norm}}
        """
        now = self.adapter.flat.detach()
        parts = self.adapter.split({NAME: {"now": now, "change": self.last.sub_(now)}})
        squares: defaultdict[str, Tensor] = defaultdict(lambda: now.new_zeros(3))
        for name, part in parts.items():
            sums = [part["now"].square().sum(), part["change"].square().sum(), self._square_of_added(name, parts)]
            squares[name_block(name)] += torch.stack(sums)
        norms = dict(zip(squares, torch.stack([*squares.values()]).clamp(min=0).sqrt().tolist(), strict=True))
        self.last.copy_(now)
        return {
            "adapter_norm": {block: added for block, (_, _, added) in norms.items()},
            "update_ratio": {block: change / norm if norm else 0.0 for block, (norm, change, _) in norms.items()},
        }

    def _square_of_added(self, name: str, parts: State) -> Tensor:
        value = parts[name]["now"]
        if _B in name:
            A = parts[name.replace(_B, ".lora_A.")]["now"]
            return self.scalings[name.partition(_B)[0]] ** 2 * _square_of_product(value, A)
        return value.new_zeros(()) if ".lora_" in name else value.square().sum()


def _square_of_product(B: Tensor, A: Tensor) -> Tensor:
    """Squared Frobenius norm of B A, in products of rank x rank: that of B A is the trace of (B^T B)(A A^T)."""
    return ((B.mT @ B) * (A @ A.mT)).sum()
