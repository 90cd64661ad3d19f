"""Whole tensors out of the pieces that the ranks hold, and pieces out of whole tensors: gather and scatter of sharded state.

Test: pytest tests/engine. What a piece shares with its engine is memory: writing into one writes the engine's state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.engine.plain import Saved

AT_ONCE = 1 << 22  # elements of a reduction: 16 MiB on each rank


@dataclass(frozen=True)
class Piece:
    """One rank's part of one parameter, or of one of its moments."""

    name: str
    start: int  # where it begins in the parameter's elements, row by row
    values: Tensor  # (n,) fp32


def join(
    pieces: Iterable[Piece], shapes: Mapping[str, torch.Size], device: torch.device, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Put all ranks' pieces together: {name: fp32 tensor on the CPU} on the main rank, nothing on the others.

    group  the ranks whose pieces make one whole, each element in one piece; None for all ranks
    """
    if 0 not in dist.get_process_group_ranks(group):  # of several copies the main rank's is taken
        return {}
    is_main = dist.get_rank() == 0
    sizes = [math.prod(shape) for shape in shapes.values()]
    total = sum(sizes)
    begins = dict(zip(shapes, accumulate(sizes, initial=0), strict=False))
    placed = [(begins[piece.name] + piece.start, piece.values) for piece in pieces]
    whole = torch.empty(total if is_main else 0)
    # a little at a time: a network's own weights, whole, have no room beside them on a card, nor on a host for every rank
    for begin in range(0, total, AT_ONCE):
        chunk = torch.zeros(min(AT_ONCE, total - begin), device=device)
        for start, values in placed:
            first, end = max(begin, start), min(begin + len(chunk), start + len(values))
            if first < end:
                chunk[first - begin : end - begin] = values[first - start : end - start]
        # as integers, of which all ranks but one add 0: as floats, -0.0 would come back as 0.0
        dist.reduce(chunk.view(torch.int32), 0, group=group)
        if is_main:
            whole[begin : begin + len(chunk)] = chunk
    parts = zip(shapes.items(), whole.split(sizes), strict=True) if is_main else ()
    return {name: part.view(shape) for (name, shape), part in parts}


def cut(state: Saved, key: str, pieces: Iterable[Piece]) -> None:
    """Fill this rank's pieces from whole tensors."""
    for piece in pieces:
        piece.values.copy_(state[piece.name][key].flatten()[piece.start :][: len(piece.values)])
