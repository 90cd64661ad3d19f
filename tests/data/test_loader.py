"""Batches depend on (seed, step) alone; bad samples are replaced and listed. Run: pytest tests/data/test_loader.py"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toolkit.config import DataConfig
from toolkit.data.clips import ClipSettings
from toolkit.data.index import DatasetIndex, open_shards, open_sources
from toolkit.data.loader import Batch, make_loader
from toolkit.data.order import Order
from toolkit.data.trajectory import match_stills
from toolkit.errors import UserError

SETTINGS = ClipSettings(frames=3, height_px=24, width_px=32, strides=(1, 2), flip=True)


def run(index: DatasetIndex, start: int = 0, stop: int = 6, world: int = 1, **options: Any) -> list[list[Batch]]:
    """Collect the micro-batches of each rank: global batch 4, micro-batch 1."""
    order = index.order(5)
    settings = options.pop("settings", SETTINGS)
    return [
        list(
            make_loader(
                index,
                order,
                settings,
                start_step=start,
                stop_step=stop,
                global_batch=4,
                micro_batch=1,
                rank=rank,
                world=world,
                **options,
            )
        )  # fmt: skip
        for rank in range(world)
    ]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.frames_BTHWC, y.frames_BTHWC)
        and torch.equal(x.fps_B, y.fps_B)
        and torch.equal(x.motion_B, y.motion_B)
        and (x.positions, x.keys, x.substitutes) == (y.positions, y.keys, y.substitutes)
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture
def damaged(packed: Path, tmp_path: Path) -> DatasetIndex:
    """The packed shards with one bit flipped in the third clip's video."""
    folder = Path(shutil.copytree(packed, tmp_path / "damaged"))
    index = open_shards(folder, "train")
    with open(index.shards[2], "r+b") as file:
        file.seek(index.rows[2].members["mp4"].offset + 100)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return index


def test_batch_types(packed: Path) -> None:
    """Shapes, dtypes and provenance of one batch."""
    batch = run(open_shards(packed, "train"), stop=1)[0][0]
    assert batch.frames_BTHWC.shape == (1, 3, 24, 32, 3) and batch.frames_BTHWC.dtype == torch.uint8
    assert batch.fps_B.dtype == batch.motion_B.dtype == torch.float32
    assert batch.positions == [0] and len(batch.keys) == 1 and batch.substitutes == []


def test_workers_change_nothing(packed: Path) -> None:
    """0 and 2 workers give bit-equal batches, and neither touches the global generator."""
    index = open_shards(packed, "train")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert same(run(index, workers=0)[0], run(index, workers=2)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_resume_equals_the_tail(packed: Path) -> None:
    """Starting at step 4 gives the last steps of an uninterrupted run, across an epoch's end."""
    index = open_shards(packed, "train")
    assert len(index) < 24
    assert same(run(index, start=4)[0], run(index)[0][16:])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_batches(packed: Path, world: int) -> None:
    """Interleaving the ranks' micro-batches gives those of one process, bit for bit."""
    index = open_shards(packed, "train")
    ranks = run(index, world=world)
    interleaved = [batch for together in zip(*ranks, strict=True) for batch in together]
    assert same(interleaved, run(index)[0])


def test_bad_sample_is_replaced_alike_everywhere(damaged: DatasetIndex) -> None:
    """One substitute, the same for worlds 1 and 2 and workers 0 and 2, listed with its reason."""
    alone = run(damaged)[0]
    ranks = run(damaged, world=2, workers=2)
    assert same([batch for pair in zip(*ranks, strict=True) for batch in pair], alone)
    rows = [row for batch in alone for row in batch.substitutes]
    bad = damaged.rows[2].key
    assert rows and {row.key for row in rows} == {bad} and all("checksum" in row.reason for row in rows)
    assert bad not in [key for batch in alone for key in batch.keys]
    order = Order(damaged.shard_sizes, 5)
    drawn = [order[k] for k in range(24)] + [order.substitute(row.position, 1) for row in rows]
    assert len(rows) == drawn.count(2)
    for batch in alone:
        assert [row.substitute_key for row in batch.substitutes] == batch.keys[: len(batch.substitutes)]


def test_nothing_usable_stops_the_run(packed: Path) -> None:
    """With no good substitute, one sentence names clips and reasons, from a worker too."""
    index = open_shards(packed, "train")
    for workers in (0, 2):
        with pytest.raises(
            UserError, match=r"train-.*\.tar: .*; \.\.\.\); run python shards/check.py.* smaller stride"
        ) as caught:
            run(index, settings=ClipSettings(99, 24, 32), workers=workers)
        assert "position 0" in str(caught.value) and "need 99" in str(caught.value)


def test_mix_replaces_from_the_same_source(damaged: DatasetIndex, packed: Path, tmp_path: Path) -> None:
    """In a mix a bad clip's substitute comes from its own source, and the ledger names the shard with its folder."""
    other = tmp_path / "other"
    other.mkdir()
    for path in packed.glob("val-*"):
        shutil.copy(path, other / path.name.replace("val-", "train-"))
    folder = Path(damaged.shards[0]).parent
    index = open_sources(DataConfig(mix={str(other): 1, str(folder): 3}), "train")
    rows = [row for batch in run(index, stop=12)[0] for row in batch.substitutes]
    assert rows and {row.shard for row in rows} == {str(folder / Path(damaged.shards[2]).name)}
    own = {row.key for row in damaged.rows}
    assert all(row.substitute_key in own for row in rows)


def test_workers_look_for_what_moved(packed: Path) -> None:
    """Of each clip the points that its two ends match in, as they are cut; none where nobody asks."""
    index, settings = open_shards(packed, "train"), replace(SETTINGS, height_px=48, width_px=64, matched=True)
    (batches,) = run(index, stop=1, settings=settings, workers=2)
    for batch in batches:
        ((first, _, last),) = batch.frames_BTHWC.numpy()
        (points,) = batch.points
        assert np.array_equal(points, match_stills(first, last))
    assert any(len(batch.points[0]) for batch in batches)
    assert run(index, stop=1)[0][0].points is None
