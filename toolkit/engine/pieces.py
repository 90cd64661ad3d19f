"""Whole tensors out of the pieces that the ranks hold, and pieces out of whole tensors: gather and scatter of sharded state.

Test: pytest tests/engine. What a piece shares with its engine is memory: writing into one writes the engine's state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.engine.plain import State


@dataclass(frozen=True)
class Piece:
    """One rank's part of one parameter, or of one of its moments."""

    name: str
    start: int  # where it begins in the parameter's elements, row by row
    values: Tensor  # (n,) fp32


def join(
    pieces: Iterable[Piece], shapes: Mapping[str, torch.Size], device: torch.device, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Put all ranks' pieces together: {name: fp32 tensor on the CPU of every rank}, by one reduction for all of them.

    group  the ranks whose pieces make one whole, each element in one piece; None for all ranks
    """
    whole = torch.zeros(sum(map(math.prod, shapes.values())), device=device)
    parts = dict(zip(shapes, whole.split([math.prod(shape) for shape in shapes.values()]), strict=True))
    for piece in pieces:
        parts[piece.name][piece.start :][: len(piece.values)] = piece.values
    # as integers, of which all ranks but one add 0: as floats, -0.0 would come back as 0.0
    dist.all_reduce(whole.view(torch.int32), group=group)
    parts = dict(zip(shapes, whole.cpu().split([math.prod(shape) for shape in shapes.values()]), strict=True))
    return {name: part.view(shapes[name]) for name, part in parts.items()}


def cut(state: State, key: str, pieces: Iterable[Piece]) -> None:
    """Fill this rank's pieces from whole tensors."""
    for piece in pieces:
        piece.values.copy_(state[piece.name][key].flatten()[piece.start :][: len(piece.values)])
