"""What the clips of a step score, of all ranks, and how it depends on the noise level.

Test: pytest tests/run/test_scores.py. Legend: B clip of a micro-batch, N clip of a step, in the order of their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.engine.world import World

SIGMA_BINS = 6  # by which the loss is told apart; in training each is as likely as the others


class Scores(NamedTuple):
    """Of each clip, (B,): its loss, what a prediction of zero scores on the same noise, and that noise's level."""

    loss_B: Tensor
    zero_B: Tensor
    sigma_B: Tensor

    def detach(self) -> Scores:
        return Scores(*(tensor.detach() for tensor in self))


def gather_scores(own: Sequence[Scores], counts: Sequence[float], world: World) -> tuple[Scores, list[float]]:
    """Bring the scores of all ranks' clips of a step to every rank, and the sums of what each counted, by one reduction.

    own      of this rank's micro-batches, as rank_micro_batches deals them out
    counts   numbers of this rank, to be summed over all
    returns  Scores (N,) fp64 on the CPU, and the sums
    """
    own_M3B = torch.stack([torch.stack(scores) for scores in own]).double()
    all_MR3B = own_M3B.new_zeros(
        len(own), world.size, *own_M3B.shape[1:]
    )  # micro-batch m of rank r is the step's m R + r
    all_MR3B[:, world.rank] = own_M3B
    values = world.all_reduce_sum(torch.cat([all_MR3B.flatten(), own_M3B.new_tensor(counts)]))
    scores_MR3B = torch.tensor(values[: all_MR3B.numel()], dtype=torch.float64).view(all_MR3B.shape)
    return Scores(*scores_MR3B.movedim(2, 0).flatten(1)), values[all_MR3B.numel() :]


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of several steps end to end, without those that are not finite."""
    loss_N, zero_N, sigma_N = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    finite_N = (loss_N + zero_N + sigma_N).isfinite()
    return Scores(loss_N[finite_N], zero_N[finite_N], sigma_N[finite_N])


def name_bins(edges: Sequence[float]) -> list[str]:
    """Name the bins between rising edges of sigma, and the two beyond them, in an order that sorting keeps."""
    marks = [f"{edge:.2g}" for edge in edges]
    ranges = [
        f"below_{marks[0]}",
        *(f"{a}_to_{b}" for a, b in zip(marks, marks[1:], strict=False)),
        f"above_{marks[-1]}",
    ]
    return [f"{place}_{name}" for place, name in enumerate(ranges, start=1)]


def split_by_sigma(scores: Scores, edges: Sequence[float]) -> dict[str, Scores]:
    """The scores of each bin that holds a clip, by the bin's name.

    edges  E, rising, of E + 1 bins; a sigma at an edge is in the bin above it
    """
    bin_N = torch.bucketize(scores.sigma_B, torch.tensor(edges, dtype=scores.sigma_B.dtype), right=True)
    inside = {name: bin_N == place for place, name in enumerate(name_bins(edges))}
    return {name: Scores(*(tensor[own_N] for tensor in scores)) for name, own_N in inside.items() if own_N.any()}
