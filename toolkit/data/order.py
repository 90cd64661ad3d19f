"""Which sample stands at which position of a run: a pure function of (shard sizes, seed, position).

Test: pytest tests/data/test_order.py

Position k is epoch k // n, place k % n. An epoch shuffles the shards, cuts them into groups of GROUP_SHARDS and mixes
the samples inside each group, so every sample comes once an epoch and reading touches few files at a time. Optimizer
step s takes positions [s G, (s + 1) G), G the global batch, whatever the number of ranks; batches straddle epochs, so
nothing is dropped or padded.
"""

from collections.abc import Sequence

import numpy as np

from toolkit.errors import UserError
from toolkit.rng import derive_seed, permutation

# Bump when the same (sizes, seed, k) would give another sample; checkpoints store it.
ORDER_VERSION = 1
GROUP_SHARDS = 4


class Order:
    """The infinite order of a run: order[k] is the sample, an index into the dataset, at position k."""

    def __init__(self, shard_sizes: Sequence[int], seed: int) -> None:
        self.shard_sizes = tuple(shard_sizes)
        self.seed = seed
        self.n = sum(self.shard_sizes)
        if self.n == 0:
            raise ValueError("an order needs at least one sample")
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, k: int) -> int:
        epoch, place = divmod(k, self.n)
        if epoch not in self._epochs:
            # Two epochs are kept: a batch may straddle their boundary.
            self._epochs = {e: samples for e, samples in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs[epoch] = self._epoch(epoch)
        return int(self._epochs[epoch][place])

    def substitute(self, k: int, attempt: int) -> int:
        """Draw the sample to use when the one at position k, and attempt - 1 substitutes before, were bad."""
        return derive_seed(self.seed, f"substitute/{attempt}", k) % self.n

    def _epoch(self, epoch: int) -> np.ndarray:
        """Permute range(n) for one epoch: int64 (n,)."""
        starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        shards = permutation(len(self.shard_sizes), self.seed, "order/shards", epoch)
        mixed = []
        for first in range(0, len(shards), GROUP_SHARDS):
            group = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in shards[first : first + GROUP_SHARDS]])
            mixed.append(group[permutation(len(group), self.seed, f"order/group/{first // GROUP_SHARDS}", epoch)])
        return np.concatenate(mixed)


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
