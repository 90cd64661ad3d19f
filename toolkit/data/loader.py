"""Micro-batches of clips in the run's order, from any step on.

Test: pytest tests/data/test_loader.py

The state of the loader is one integer, the step it starts at: everything else follows from (seed, position). So
there is nothing to save from workers, and prefetching changes nothing.
"""

import contextlib
import errno
import multiprocessing.connection
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from torch.utils.data import DataLoader, Dataset

from toolkit.data.clips import CachedClip, Clip, ClipSettings, load_cached, load_clip
from toolkit.data.format import BadSample
from toolkit.data.index import DatasetIndex
from toolkit.data.latents import Encoded, LatentsReader, stack
from toolkit.data.order import InSequence, MixedOrder, Order, accumulation, rank_micro_batches
from toolkit.data.trajectory import match_stills
from toolkit.errors import UserError, in_one_line, list_some

PREFETCH = 2  # micro-batches that each worker holds ready
MAX_ATTEMPTS = 16  # bad substitutes in a row; with a tenth of the clips bad, that is one position in 10^16
# Another clip in place of one that is whole would make the run another run.
_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


class Substitution(NamedTuple):
    """A row of the ledger: at this position this clip was bad, and another took its place."""

    position: int
    key: str
    shard: str
    reason: str
    substitute_key: str


@dataclass(frozen=True)
class Batch:
    """One micro-batch: frames uint8, or what the encoders made of them; fps and motion fp32.

    points  of each clip, points_PK2 as trajectory.match_stills finds them between its ends, where that is asked for
    """

    frames_BTHWC: Tensor | None
    fps_B: Tensor
    motion_B: Tensor
    positions: list[int]
    keys: list[str]
    substitutes: list[Substitution]
    encoded: Encoded | None = None
    points: list[np.ndarray] | None = None


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """Map the ordinal of a rank's micro-batch, counted from step 0, to its Batch."""

    index: DatasetIndex
    order: Order | MixedOrder | InSequence
    settings: ClipSettings
    global_batch: int
    micro_batch: int
    rank: int
    world: int
    origin: int = 0  # the position that step 0 would begin at; not 0 after a change of the global batch
    reader: LatentsReader = field(default_factory=LatentsReader)

    def __getitem__(self, ordinal: int) -> Batch | UserError:
        per_step = accumulation(self.global_batch, self.micro_batch, self.world)
        step, m = divmod(ordinal, per_step)
        micro_batches = rank_micro_batches(step, self.global_batch, self.micro_batch, self.rank, self.world)
        positions = [self.origin + k for k in micro_batches[m]]
        substitutes: list[Substitution] = []
        try:
            clips = [self._load(k, substitutes) for k in positions]
            frames = [clip.frames_THWC for clip in clips if isinstance(clip, Clip)]
            # here, where workers share it out: it takes seconds a clip
            points = [match_stills(own[0], own[-1]) for own in frames] if self.settings.matched else None
        except UserError as error:
            return error  # raised in the main process: torch would wrap a worker's exception in its traceback
        windows = [clip.latents for clip in clips if isinstance(clip, CachedClip)]
        return Batch(
            frames_BTHWC=torch.from_numpy(np.stack(frames)) if frames else None,
            encoded=stack(windows) if windows else None,
            fps_B=torch.tensor([clip.fps for clip in clips], dtype=torch.float32),
            motion_B=torch.tensor([clip.motion for clip in clips], dtype=torch.float32),
            positions=positions,
            keys=[clip.key for clip in clips],
            substitutes=substitutes,
            points=points,
        )

    def _load(self, k: int, substitutes: list[Substitution]) -> Clip | CachedClip:
        """Load the clip at position k, or the first good substitute, noting each bad one."""
        bad: dict[int, str] = {}
        for attempt in range(MAX_ATTEMPTS):
            sample = self.order[k] if attempt == 0 else self.order.substitute(k, attempt)
            if sample in bad:
                continue
            try:
                clip = self._read(sample, k)
            except BadSample as error:
                if getattr(error.__cause__, "errno", None) in _OF_THE_MACHINE:
                    raise UserError(f"{error}; free what ran out, and start the same command again") from error
                bad[sample] = str(error)
                continue
            substitutes += [Substitution(k, *self._place(i), reason, clip.key) for i, reason in bad.items()]
            return clip
        faults = [f"{key} in {shard}: {bad[i]}" for i in bad for key, shard in [self._place(i)]]
        raise UserError(
            f"position {k}: {len(bad)} clips in a row are unusable ({list_some(faults)}); run python shards/check.py on the "
            "folder, or ask for fewer frames or a smaller stride"
        )

    def _read(self, sample: int, k: int) -> Clip | CachedClip:
        if self.index.cached:
            return load_cached(self.index, sample, self.settings, self.order.seed, k, self.reader)
        return load_clip(self.index, sample, self.settings, self.order.seed, k)

    def _place(self, sample: int) -> tuple[str, str]:
        return self.index.rows[sample].key, str(self.index.shards[sample])


def make_loader(
    index: DatasetIndex,
    order: Order | MixedOrder,
    settings: ClipSettings,
    *,
    start_step: int,
    stop_step: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    origin: int = 0,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of steps [start_step, stop_step), accumulation by accumulation.

    raises  UserError when a position has no usable substitute, a network fails, or a worker dies
    """
    per_step = accumulation(global_batch, micro_batch, world)
    dataset = MicroBatches(index, order, settings, global_batch, micro_batch, rank, world, origin)
    ordinals = range(start_step * per_step, stop_step * per_step)
    if not workers:
        return _raise_errors(map(dataset.__getitem__, ordinals))
    loader = DataLoader(
        dataset,
        sampler=ordinals,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        collate_fn=_as_is,
        worker_init_fn=_follow_main_process,
        # torch seeds its workers from here; without one it would draw from, and so disturb, the global generator.
        generator=torch.Generator(),
    )
    return _raise_errors(loader)


def _raise_errors(loader: Iterable[Batch | UserError]) -> Iterator[Batch]:
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    workers = {process.sentinel: process for process in set(multiprocessing.active_children()) - others}
    with naming_dead_workers():
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except (EOFError, OSError) as error:  # a batch that a killed worker had ready is lost with it
            dead = workers and multiprocessing.connection.wait(list(workers), timeout=5)
            if not dead:
                raise
            time.sleep(0.1)  # torch's word for it, a signal, is on its way: better raised here than in a destructor
            pids = ", ".join(str(workers[sentinel].pid) for sentinel in workers if sentinel in dead)
            raise RuntimeError(f"{_DEATH} (pid {pids}) was killed") from error
        finally:
            del batches  # dropped, it ends its workers at once; left to the garbage collector, it waits 5 s for each
            for process in workers.values():
                process.kill()  # one that is stuck in a read; none hears SIGTERM


@contextlib.contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turn torch's word for a worker that was killed into a UserError; torch raises it wherever the main process is."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_DEATH):
            raise
        raise UserError(
            f"{in_one_line(error)}; most often memory ran out: lower data.workers, and start the same command again, "
            "which without --fresh goes on from the last checkpoint"
        ) from error


_DEATH = "DataLoader worker"  # how torch's sentence begins


def _follow_main_process(worker: int) -> None:
    """Leave signals to the main process: sent to the whole group, they would take the batches that it needs to finish.

    And die with it: stuck in a read, a worker would hold its connections and the run folder's lock, so that the other ranks
    wait, and a new start is refused.
    """
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch
