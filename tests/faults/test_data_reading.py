"""Reading goes on through bad clips, dead workers, slow disks. Run: pytest tests/faults/test_data_reading.py

T12, T13, T14, T16 and T18; `make faults` runs the long form.
"""

import io
import json
import multiprocessing
import random
import shutil
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import encode, numbered_frames
from tests.data.test_loader import same
from tests.launching import launch, train_here
from toolkit.data import loader
from toolkit.data.clips import ClipSettings
from toolkit.data.index import DatasetIndex, open_shards
from toolkit.data.loader import Batch, make_loader, naming_dead_workers
from toolkit.data.order import MixedOrder, Source, rank_micro_batches
from toolkit.engine.world import World
from toolkit.errors import UserError
from toolkit.run.ledger import NAME, Ledger

SETTINGS = ClipSettings(frames=3, height_px=24, width_px=32, strides=(1, 2), flip=True)
GLOBAL_BATCH = 8
ALONE = World(0, 1, torch.device("cpu"))


def make_shards(folder: Path, clips: int, bad: set[int]) -> DatasetIndex:
    """Shards of 20 clips each; the videos numbered in `bad` are damaged after they were indexed."""
    folder.mkdir()
    video = encode(numbered_frames(range(9)))
    facts = json.dumps({"fps": 25, "frames": 9, "height": 48, "width": 64}).encode()
    for first in range(0, clips, 20):
        with tarfile.open(folder / f"train-{first // 20:06d}.tar", "w") as archive:
            for i in range(first, min(first + 20, clips)):
                for extension, data in (("mp4", video), ("json", facts)):
                    info = tarfile.TarInfo(f"clip{i:05d}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    index = open_shards(folder, "train")
    damage(index, bad)
    return index


def damage(index: DatasetIndex, samples: set[int]) -> None:
    for i in samples:
        with open(str(index.shards[i]), "r+b") as file:
            file.seek(index.rows[i].members["mp4"].offset + 50)
            file.write(bytes(20))


def read(
    index: DatasetIndex, start: int, stop: int, world: int = 1, rank: int = 0, workers: int = 0
) -> Iterator[Batch]:
    return make_loader(
        index, index.order(7), SETTINGS, start_step=start, stop_step=stop, global_batch=GLOBAL_BATCH, micro_batch=1,
        rank=rank, world=world, workers=workers,
    )  # fmt: skip


def train(index: DatasetIndex, run: Path, stop: int, world: int, max_bad_fraction: float) -> list[list[Batch]]:
    """Read as a run does, its ranks side by side: each rank's batches; raises UserError where the run would stop."""
    run.mkdir()
    ledger = Ledger(run, len(index), max_bad_fraction, ALONE)
    ranks = [read(index, 0, stop, world, rank) for rank in range(world)]
    batches: list[list[Batch]] = [[] for _ in range(world)]
    for _ in range(stop):
        substitutes = []
        for rank in range(world):
            for _ in range(GLOBAL_BATCH // world):
                batches[rank].append(next(ranks[rank]))
                substitutes += batches[rank][-1].substitutes
        if substitutes:
            ledger.note(substitutes)
    return batches


def test_t12_bad_samples(faults: Any, tmp_path: Path) -> None:
    """1 % of the clips damaged: worlds 1, 2 and 4 read the same, list each once, step alike, and stop alike above it."""
    trials, clips, passed = faults.choose(short=1, long=10), 200, 0
    faults.begin("T12 bad samples", trials)
    for trial in range(trials):
        bad = set(random.Random(trial).sample(range(clips), 2))
        index = make_shards(tmp_path / f"shards{trial}", clips, bad)
        steps = clips // GLOBAL_BATCH
        seen = []
        for world in (1, 2, 4):
            run = tmp_path / f"run{trial}-{world}"
            ranks = train(index, run, steps, world, 0.01)
            assert {len(batches) for batches in ranks} == {steps * GLOBAL_BATCH // world}
            interleaved = [batch for together in zip(*ranks, strict=True) for batch in together]
            ledger = (run / NAME).read_text().splitlines()
            stopped = tmp_path / f"stopped{trial}-{world}"
            with pytest.raises(UserError, match="2 of 200 clips are bad, allowed are 1") as caught:
                train(index, stopped, steps, world, 0.005)
            said = str(caught.value).replace(str(stopped), "")
            seen.append((interleaved, ledger, said, (stopped / NAME).read_text()))
        alone, *others = seen
        positions = Counter(json.loads(row)["position"] for row in alone[1])
        keys = {json.loads(row)["key"] for row in alone[1]}
        passed += (
            all(same(alone[0], other[0]) and alone[1:] == other[1:] for other in others)
            and set(positions.values()) == {1}
            and keys == {index.rows[i].key for i in bad}
        )
    faults.end(passed)


@pytest.mark.launch
def test_t12_real_ranks(faults: Any, tiny_run: dict[str, Any], tiny_shards: Path, tmp_path: Path) -> None:
    """Three of ten clips damaged, two allowed: one process and two DeepSpeed ranks end at one step, with one ledger."""
    trials = faults.choose(short=0, long=1)
    if trials == 0:
        pytest.skip("a launch of its own: make faults")
    faults.begin("T12 bad samples, two ranks", trials)
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    damage(open_shards(folder, "train"), {1, 4, 7})
    overrides = tiny_run | {"runs_dir": str(tmp_path), "data.shards": str(folder), "data.max_bad_fraction": 0.2}
    with pytest.raises(UserError) as caught:
        train_here(overrides | {"name": "one", "engine.kind": "plain"})
    done = launch("deepspeed", 2, overrides | {"name": "two"})
    ledgers = [(tmp_path / name / NAME).read_text() for name in ("one", "two")]
    said = str(caught.value).replace("/one/", "/two/")
    passed = done.returncode != 0 and ledgers[0] == ledgers[1] and done.stderr.count(said) == 2
    faults.end(passed, done.stderr)


@dataclass(frozen=True)
class Layout:
    """Sources of shards, how a step is cut, and the workers of a rank."""

    sources: list[Source]
    seed: int
    micro_batch: int
    accumulation: int
    world: int
    workers: int


layouts = st.builds(
    Layout,
    sources=st.lists(
        st.builds(Source, st.lists(st.integers(1, 7), min_size=1, max_size=6).map(tuple), st.integers(1, 3)),
        min_size=1, max_size=3,
    ),
    seed=st.integers(0, 2**31), micro_batch=st.integers(1, 3), accumulation=st.integers(1, 3),
    world=st.integers(1, 4), workers=st.integers(0, 3),
)  # fmt: skip


def draw(layout: Layout, steps: int) -> list[int]:
    """The samples of all steps in their canonical order, each drawn by the worker that torch would give it to."""
    global_batch, workers = layout.micro_batch * layout.accumulation * layout.world, max(1, layout.workers)
    orders = {
        (rank, worker): MixedOrder(layout.sources, layout.seed)
        for rank in range(layout.world)
        for worker in range(workers)
    }
    samples = []
    for step in range(steps):
        ranks = [
            rank_micro_batches(step, global_batch, layout.micro_batch, rank, layout.world)
            for rank in range(layout.world)
        ]
        for m in range(layout.accumulation):
            for rank in range(layout.world):
                order = orders[rank, (step * layout.accumulation + m) % workers]
                samples += [order[k] for k in ranks[rank][m]]
    return samples


def test_t13_accounting(faults: Any) -> None:
    """Random layouts: any ranks and workers draw the run's order, and in it each clip comes once in each of three passes."""
    trials = faults.choose(short=1000, long=5000)
    faults.begin("T13 accounting", trials)
    passed = 0

    @given(layouts)
    @settings(max_examples=trials, deadline=None, database=None)
    def account(layout: Layout) -> None:
        nonlocal passed
        global_batch = layout.micro_batch * layout.accumulation * layout.world
        block = sum(source.weight for source in layout.sources)
        sizes = [sum(source.shard_sizes) for source in layout.sources]
        # until the slowest source was passed three times, and the step after
        needed = block * max(-(-3 * size // source.weight) for size, source in zip(sizes, layout.sources, strict=True))
        steps = -(-needed // global_batch) + 1
        samples = draw(layout, steps)
        order = MixedOrder(layout.sources, layout.seed)
        assert samples == [order[k] for k in range(steps * global_batch)]
        first = 0
        for size in sizes:
            own = [sample for sample in samples if first <= sample < first + size]
            for epoch in range(3):
                assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(first, first + size))
            first += size
        passed += 1

    account()
    faults.end(min(passed, trials))


def test_t14_dead_worker(faults: Any, tmp_path: Path) -> None:
    """A killed worker is named in one sentence, in the long form within ten seconds; a new start goes on exactly."""
    trials, passed = faults.choose(short=2, long=20), 0
    faults.begin("T14 dead worker", trials)
    index = make_shards(tmp_path / "shards", 40, set())
    whole = list(read(index, 0, 6))
    for trial in range(trials):
        others = set(multiprocessing.active_children())  # of the trial before, not yet collected
        batches = read(index, 0, 1000, workers=2)
        victim, started_s = None, 0.0
        try:
            with naming_dead_workers():
                before = [next(batches) for _ in range(GLOBAL_BATCH * (1 + trial % 3))]
                victim = sorted(child.pid or 0 for child in set(multiprocessing.active_children()) - others)[trial % 2]
                psutil.Process(victim).send_signal(signal.SIGKILL)
                started_s = time.monotonic()
                for _ in batches:
                    pass
        except UserError as error:
            named = f"worker (pid {victim})" in str(error) or f"pid(s) {victim}" in str(error)
            in_time = not faults.long or time.monotonic() - started_s <= 10
            step = len(before) // GLOBAL_BATCH
            exact = same(before, whole[: len(before)]) and same(list(read(index, step, 6)), whole[len(before) :])
            passed += named and in_time and exact and "\n" not in str(error)
        batches.close()  # type: ignore[attr-defined]
    faults.end(passed)


@dataclass(frozen=True)
class SlowIndex(DatasetIndex):
    """Shards on a disk that takes 200 ms for every read."""

    def read(self, sample: int, extension: str) -> bytes:
        time.sleep(0.2)
        return super().read(sample, extension)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_t16_slow_shards(faults: Any, tmp_path: Path) -> None:
    """200 ms a read cost at most a tenth of the clips per second, where workers have a step's time to hide them in."""
    trials, passed = faults.choose(short=0, long=3), 0
    if trials == 0:
        pytest.skip("a timed test: make faults")
    faults.begin("T16 slow shards", trials)
    fast = make_shards(tmp_path / "shards", 40, set())
    slow = SlowIndex(*(getattr(fast, field.name) for field in fields(fast)))

    def seconds(index: DatasetIndex) -> float:
        batches = read(index, 0, 5, workers=4)
        next(batches)  # the workers' start is no part of the rate
        started_s = time.monotonic()
        for _ in batches:
            time.sleep(0.08)  # the step: four workers have 320 ms for each clip
        return time.monotonic() - started_s

    for _ in range(trials):
        passed += seconds(slow) <= seconds(fast) / 0.9
    faults.end(passed)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_t18_determinism(faults: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh starts, 0 and 3 workers, 1 and 8 micro-batches ahead: bit-equal batches, damaged clips among them."""
    trials, passed = faults.choose(short=1, long=10), 0
    faults.begin("T18 determinism", trials)
    for trial in range(trials):
        index = make_shards(tmp_path / f"shards{trial}", 40 + trial, {3, 17})
        whole = list(read(index, 0, 8))
        again = [list(read(index, 0, 8))]
        for prefetch in (1, 8):
            monkeypatch.setattr(loader, "PREFETCH", prefetch)
            again.append(list(read(index, 0, 8, workers=3)))
        passed += all(same(whole, other) for other in again) and any(batch.substitutes for batch in whole)
    faults.end(passed)
