"""Which sample stands at which position of a run: a pure function of (shard sizes, seed, position).

Test: pytest tests/data/test_order.py

Position k is epoch k // n, place k % n. An epoch shuffles the shards, cuts them into groups of GROUP_SHARDS and mixes
the samples inside each group, so every sample comes once an epoch and reading touches few files at a time. Optimizer
step s takes positions [s G, (s + 1) G), G the global batch, whatever the number of ranks; batches straddle epochs, so
nothing is dropped or padded.

With several sources of weights w, each block of sum(w) positions takes w clips of each, in an order drawn for the block;
the clips of one source follow that source's own order, so each of them comes once in every pass over it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.errors import UserError
from toolkit.rng import derive_seed, permutation

# Bump when the same (sizes, seed, k) would give another sample, or another window of it; checkpoints store it.
ORDER_VERSION = 2
GROUP_SHARDS = 4


class Order:
    """The infinite order of one source: order[k] is the sample, an index into the source, at position k."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, purpose: str = "order") -> None:
        self.shard_sizes = tuple(shard_sizes)
        self.seed = seed
        self.purpose = purpose
        self.n = sum(self.shard_sizes)
        if self.n == 0:
            raise ValueError("an order needs at least one sample")
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        # Only the group read last is kept: whoever starts in the middle of millions of samples opens some thousand.
        self._group: tuple[int, list[int]] = (0, [])

    def __getitem__(self, k: int) -> int:
        first, samples = self._group
        if not first <= k < first + len(samples):
            self._group = first, samples = self._open_group(k)
        return samples[k - first]

    def substitute(self, k: int, attempt: int) -> int:
        """Draw the sample to use when the one at position k, and attempt - 1 substitutes before, were bad."""
        return derive_seed(self.seed, f"substitute/{attempt}", k) % self.n

    def _open_group(self, k: int) -> tuple[int, list[int]]:
        """Mix the group of shards that position k falls into: the group's first position, and its samples in order."""
        epoch, place = divmod(k, self.n)
        shards = permutation(len(self.shard_sizes), self.seed, f"{self.purpose}/shards", epoch)
        ends = np.cumsum(np.diff(self._starts)[shards])  # place in the epoch after each shard
        group = int(np.searchsorted(ends, place, side="right")) // GROUP_SHARDS
        members = shards[group * GROUP_SHARDS : (group + 1) * GROUP_SHARDS]
        samples = np.concatenate([np.arange(self._starts[i], self._starts[i + 1]) for i in members])
        mixed = samples[permutation(len(samples), self.seed, f"{self.purpose}/group/{group}", epoch)]
        first = int(ends[group * GROUP_SHARDS - 1]) if group else 0
        return epoch * self.n + first, mixed.tolist()


@dataclass(frozen=True)
class InSequence:
    """Samples one after another, for looking at the first of them; in place of a bad one stands one behind these.

    samples  numbers of those that are looked at, and of spare ones
    first    how many are looked at
    """

    samples: Sequence[int]
    first: int
    seed: int

    def __getitem__(self, k: int) -> int:
        return self.samples[k % len(self.samples)]

    def substitute(self, k: int, attempt: int) -> int:
        return self.samples[(self.first + k + attempt - 1) % len(self.samples)]


@dataclass(frozen=True)
class Source:
    """One source of a mix: clips of each of its shards, and how many clips a block takes of it."""

    shard_sizes: tuple[int, ...]
    weight: int = 1


class MixedOrder:
    """The infinite order of several sources, whose samples are numbered one source after another; of one, its Order."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.seed = seed
        # The first is keyed as a run without a mix; other names keep sources of equal sizes from walking in step.
        purposes = ["order", *(f"order/source/{i}" for i in range(1, len(sources)))]
        self._orders = [Order(s.shard_sizes, seed, purpose) for s, purpose in zip(sources, purposes, strict=True)]
        self._weights = np.array([source.weight for source in sources])
        self._starts = np.cumsum([0, *(order.n for order in self._orders)]).tolist()
        self.n = self._starts[-1]
        self._block: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def __getitem__(self, k: int) -> int:
        source, ordinal = self._place(k)
        return self._starts[source] + self._orders[source][ordinal]

    def substitute(self, k: int, attempt: int) -> int:
        """Draw the sample to use when the one at position k was bad, as Order does, from the same source."""
        source, _ = self._place(k)
        return self._starts[source] + self._orders[source].substitute(k, attempt)

    def _place(self, k: int) -> tuple[int, int]:
        """Name the source at position k, and the position within that source's own order."""
        block, slot = divmod(k, int(self._weights.sum()))
        if self._block[0] != block:
            self._block = (block, *self._draw_block(block))
        _, sources, ranks = self._block
        source = int(sources[slot])
        return source, block * int(self._weights[source]) + int(ranks[slot])

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw which source stands at each place of a block, and its ordinal among that source's: int64 (sum(w),) each."""
        sources = np.repeat(np.arange(len(self._weights)), self._weights)
        sources = sources[permutation(len(sources), self.seed, "mix", block)]
        ranks = np.empty_like(sources)
        # A stable sort keeps the places of one source in their order.
        ranks[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(weight) for weight in self._weights])
        return sources, ranks


def step_positions(step: int, global_batch: int) -> range:
    """Name the positions that optimizer step `step` trains on."""
    return range(step * global_batch, (step + 1) * global_batch)


def accumulation(global_batch: int, micro_batch: int, world: int) -> int:
    """Count the micro-batches of one rank per step. Raises UserError if they do not divide the global batch."""
    if min(global_batch, micro_batch, world) < 1 or global_batch % (micro_batch * world):
        raise UserError(
            f"a global batch of {global_batch} cannot be cut into micro-batches of {micro_batch} on {world} ranks; "
            f"it must be a multiple of {micro_batch * world}"
        )
    return global_batch // (micro_batch * world)


def rank_micro_batches(step: int, global_batch: int, micro_batch: int, rank: int, world: int) -> list[list[int]]:
    """List the positions of a rank's micro-batches of one step, in order of accumulation.

    Micro-batch j of a step holds positions s G + j mb ... + mb - 1, and rank r takes j = m W + r at accumulation m:
    the micro-batches of a step are the same for every world size W, only who computes them changes.
    """
    positions = step_positions(step, global_batch)
    return [
        list(positions[j * micro_batch : (j + 1) * micro_batch])
        for j in range(rank, accumulation(global_batch, micro_batch, world) * world, world)
    ]
