"""Micro-batches of clips in the run's order, from any step on.

Test: pytest tests/data/test_loader.py

The state of the loader is one integer, the step it starts at: everything else follows from (seed, position). So
there is nothing to save from workers, and prefetching changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from toolkit.data.clips import Clip, ClipSettings, load_clip
from toolkit.data.format import BadSample
from toolkit.data.index import DatasetIndex
from toolkit.data.order import Order, accumulation, rank_micro_batches
from toolkit.errors import UserError

MAX_ATTEMPTS = 16  # bad substitutes in a row; with a tenth of the clips bad, that is one position in 10^16


class Substitution(NamedTuple):
    """A row of the ledger: at this position this clip was bad, and another took its place."""

    position: int
    key: str
    shard: str
    reason: str
    substitute_key: str


@dataclass(frozen=True)
class Batch:
    """One micro-batch: frames uint8, fps and motion fp32."""

    frames_BTHWC: Tensor
    fps_B: Tensor
    motion_B: Tensor
    positions: list[int]
    keys: list[str]
    substitutes: list[Substitution]


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """Map the ordinal of a rank's micro-batch, counted from step 0, to its Batch."""

    index: DatasetIndex
    order: Order
    settings: ClipSettings
    global_batch: int
    micro_batch: int
    rank: int
    world: int

    def __getitem__(self, ordinal: int) -> Batch | UserError:
        per_step = accumulation(self.global_batch, self.micro_batch, self.world)
        step, m = divmod(ordinal, per_step)
        positions = rank_micro_batches(step, self.global_batch, self.micro_batch, self.rank, self.world)[m]
        substitutes: list[Substitution] = []
        try:
            clips = [self._load(k, substitutes) for k in positions]
        except UserError as error:
            return error  # raised in the main process: torch would wrap a worker's exception in its traceback
        return Batch(
            frames_BTHWC=torch.from_numpy(np.stack([clip.frames_THWC for clip in clips])),
            fps_B=torch.tensor([clip.fps for clip in clips], dtype=torch.float32),
            motion_B=torch.tensor([clip.motion for clip in clips], dtype=torch.float32),
            positions=positions,
            keys=[clip.key for clip in clips],
            substitutes=substitutes,
        )

    def _load(self, k: int, substitutes: list[Substitution]) -> Clip:
        """Load the clip at position k, or the first good substitute, noting each bad one."""
        bad: dict[int, str] = {}
        for attempt in range(MAX_ATTEMPTS):
            sample = self.order[k] if attempt == 0 else self.order.substitute(k, attempt)
            if sample in bad:
                continue
            try:
                clip = load_clip(self.index, sample, self.settings, self.order.seed, k)
            except BadSample as error:
                bad[sample] = str(error)
                continue
            substitutes += [Substitution(k, *self._place(i), reason, clip.key) for i, reason in bad.items()]
            return clip
        faults = [f"{key} in {shard}: {bad[i]}" for i in bad for key, shard in [self._place(i)]]
        raise UserError(f"position {k}: {len(bad)} clips in a row are unusable ({_some(faults)}); {_REMEDY}")

    def _place(self, sample: int) -> tuple[str, str]:
        return self.index.rows[sample].key, self.index.shards[sample].name


def make_loader(
    index: DatasetIndex,
    order: Order,
    settings: ClipSettings,
    *,
    start_step: int,
    stop_step: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    max_bad_fraction: float = 0.01,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of steps [start_step, stop_step), accumulation by accumulation.

    raises  UserError when more than max_bad_fraction of the dataset's clips (and more than one) proved bad
    """
    per_step = accumulation(global_batch, micro_batch, world)
    loader = DataLoader(
        MicroBatches(index, order, settings, global_batch, micro_batch, rank, world),
        sampler=range(start_step * per_step, stop_step * per_step),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        # torch seeds its workers from here; without one it would draw from, and so disturb, the global generator.
        generator=torch.Generator(),
    )
    return _watch_bad(loader, max(1, int(max_bad_fraction * len(index))), len(index))


def _watch_bad(loader: DataLoader, allowed: int, n: int) -> Iterator[Batch]:
    """Pass batches on until more than `allowed` different clips proved bad."""
    bad: dict[tuple[str, str], str] = {}
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        bad |= {(row.shard, row.key): row.reason for row in batch.substitutes}
        if len(bad) > allowed:
            faults = [f"{key} in {shard}: {reason}" for (shard, key), reason in bad.items()]
            raise UserError(f"{len(bad)} of {n} clips are bad, allowed are {allowed} ({_some(faults)}); {_REMEDY}")
        yield batch


_REMEDY = "run python shards/check.py on the folder, or ask for fewer frames or a smaller stride"


def _some(faults: list[str]) -> str:
    return "; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")


def _as_is(batch: Any) -> Any:
    return batch
