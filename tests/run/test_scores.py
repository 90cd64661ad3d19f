"""What all ranks' clips score comes together, and is told apart by noise level. Run: pytest tests/run/test_scores.py"""

from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit.config import DiffusionConfig, ModelConfig
from toolkit.data.order import rank_micro_batches
from toolkit.engine.world import World
from toolkit.model.base import load_base
from toolkit.run.framer import Framer
from toolkit.run.scores import Scores, gather_scores, join_scores, name_bins, split_by_sigma


class Reduced(World):
    """One of some ranks: notes what it gives to the reduction, and gets what was summed before."""

    def all_reduce_sum(self, values: Tensor) -> list[float]:
        given.append(values)
        return torch.stack(given).sum(0).tolist()


given: list[Tensor] = []


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (1, 1), (2, 2), (4, 1), (8, 1)])
def test_scores_stand_in_the_order_of_their_positions(ranks: int, micro_batch: int) -> None:
    """However the clips of a step are dealt out to ranks and micro-batches; counts are sums, and no number loses a bit."""
    given.clear()
    losses = torch.randn(8, generator=torch.Generator().manual_seed(0)).exp()
    table = torch.stack([losses, losses * 3, losses / 7])
    for rank in range(ranks):
        dealt = rank_micro_batches(5, 8, micro_batch, rank, ranks)
        own = [Scores(*table[:, [k - 40 for k in positions]]) for positions in dealt]
        scores, counts = gather_scores(own, [rank, 1.0], Reduced(rank, ranks, torch.device("cpu")))
    assert torch.equal(torch.stack(scores), table.double())
    assert counts == [sum(range(ranks)), ranks]


@pytest.mark.parametrize("sampler", ["uniform_t", "lognormal"])
def test_each_bin_gets_its_share_of_the_draws(tiny_base: Any, sampler: Any) -> None:
    """Of training's own draws a sixth falls into each of six bins."""
    base = load_base(ModelConfig(base=str(tiny_base)), torch.device("cpu"), "fp32", encoders=False)
    framer = Framer(base, DiffusionConfig(noise_sampler=sampler, layout="spec_middle"), window=3)
    edges = framer.sigma_quantiles(torch.arange(1, 6) / 6)
    sigma_N = framer._draw_sigma(range(3000))
    counts = torch.bincount(torch.bucketize(sigma_N, edges, right=True), minlength=6)
    assert (counts - 500).abs().max() < 4 * (500 * 5 / 6) ** 0.5, counts


def test_split_by_sigma() -> None:
    """Each clip is in one bin, with its own three numbers; an empty bin is left out, a sigma at an edge is above it."""
    sigma_N = torch.tensor([0.1, 0.2, 1.0, 30.0, 4.0, 0.99], dtype=torch.float64)
    loss_N = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64)
    split = split_by_sigma(Scores(loss_N, 2 * loss_N, sigma_N), [0.5, 1.0, 2.0, 20.0, 100.0])
    found = {name: [tensor.tolist() for tensor in own] for name, own in split.items()}
    assert found == {
        "1_below_0.5": [[1, 2], [2, 4], [0.1, 0.2]], "2_0.5_to_1": [[32], [64], [0.99]], "3_1_to_2": [[4], [8], [1]],
        "4_2_to_20": [[16], [32], [4]], "5_20_to_1e+02": [[8], [16], [30]],
    }  # fmt: skip
    assert name_bins([0.5, 1.0, 2.0, 20.0, 100.0]) == [*found, "6_above_1e+02"]


def test_what_is_not_finite_is_in_no_mean() -> None:
    broken = Scores(torch.tensor([1.0, float("nan")]), torch.tensor([2.0, 2.0]), torch.tensor([3.0, 3.0]))
    joined = join_scores([broken, Scores(*(torch.tensor([value]) for value in (5.0, float("inf"), 1.0)))])
    assert [tensor.tolist() for tensor in joined] == [[1.0], [2.0], [3.0]]
