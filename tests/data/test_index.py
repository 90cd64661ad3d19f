"""Sources are opened as one list of samples, or refused before any work. Run: pytest tests/data/test_index.py"""

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.authoring.pack import pack
from toolkit.config import DataConfig
from toolkit.data.format import ClipInfo, SampleRow, index_path
from toolkit.data.index import DatasetIndex, open_shards, open_sources
from toolkit.data.latents import pack_latents
from toolkit.data.order import Source
from toolkit.errors import UserError


@pytest.fixture(scope="module")
def halves(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of shards of different videos: one with val shards, one without; read only."""
    folder = tmp_path_factory.mktemp("halves")
    for name, numbers, holdout in (("a", range(4), 0.5), ("b", range(4, 6), 0.0)):
        (folder / f"videos-{name}").mkdir()
        for i in numbers:
            shutil.copy(videos / f"v{i}.mp4", folder / f"videos-{name}")
        pack(folder / f"videos-{name}", folder / name, clip_seconds=0.8, shard_mb=0.008, holdout=holdout)
    return folder / "a", folder / "b"


def mix(*sources: tuple[Path, int], split: Any = "train") -> DatasetIndex:
    return open_sources(DataConfig(mix={str(folder): weight for folder, weight in sources}), split)


def test_mix_joins_its_sources(halves: tuple[Path, Path]) -> None:
    """Samples run over the sources one after another; each reads its own bytes."""
    a, b = (open_shards(folder, "train") for folder in halves)
    both = mix((halves[0], 3), (halves[1], 1))
    assert both.rows == a.rows + b.rows and both.shards == a.shards + b.shards
    assert both.shard_sizes == a.shard_sizes + b.shard_sizes
    assert [source.weight for source in both.sources] == [3, 1]
    for sample in (0, len(a), len(both) - 1):
        alone, i = (a, sample) if sample < len(a) else (b, sample - len(a))
        assert both.read(sample, "mp4") == alone.read(i, "mp4")


def test_fingerprint_covers_sources_weights_and_their_order(halves: tuple[Path, Path]) -> None:
    """Whatever changes what a run draws changes it; the folder's name, or a mix of one, does not."""
    a, b = halves
    prints = [mix(*sources).fingerprint for sources in (
        [(a, 1), (b, 1)], [(a, 3), (b, 1)], [(a, 1), (b, 3)], [(b, 1), (a, 1)], [(a, 1)], [(b, 1)],
    )]  # fmt: skip
    assert len(set(prints)) == 6
    assert mix((a, 7)).fingerprint == open_shards(a, "train").fingerprint


def test_val_shards_of_those_that_have_any(halves: tuple[Path, Path]) -> None:
    """A source that holds no clips out is passed over for validation, unless none does."""
    a, b = halves
    assert mix((a, 1), (b, 1), split="val").rows == open_shards(a, "val").rows
    with pytest.raises(UserError, match="b holds no val shards .*--holdout"):
        mix((b, 1), split="val")


def test_same_data_twice_is_refused(halves: tuple[Path, Path], tmp_path: Path) -> None:
    """By content, so another spelling, a link or a copy is seen too."""
    folder = halves[0]
    (tmp_path / "link").symlink_to(folder)
    shutil.copytree(folder, tmp_path / "copy")
    for other in (tmp_path / "link", tmp_path / "copy", folder / ".." / "a"):
        with pytest.raises(UserError, match="data.mix: .* and .* hold the same shard; name it once"):
            open_sources(DataConfig(mix={str(folder): 1, str(other): 2}), "train")


def test_what_did_not_change_is_opened_once(packed: Path, tmp_path: Path) -> None:
    """A recipe's clips are given again, until an index or a tar is another, whichever way it was made so."""
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    data = DataConfig(shards=str(folder))
    train, val = open_sources(data, "train"), open_sources(data, "val")
    assert open_sources(data, "train") is train and open_sources(data, "val") is val
    tar = next(folder.glob("val-*.tar"))
    text = index_path(tar).read_text()
    index_path(tar).write_text(text.replace('"fps": 25.0', '"fps": 24.0'))  # in place, of the same length
    assert {row.clip.fps for row in open_sources(data, "val").rows} >= {24.0}
    index_path(tar).unlink()
    assert open_sources(data, "val") == open_sources(data, "val") == val and index_path(tar).exists()
    (tmp_path / "other").write_bytes(bytes(tar.stat().st_size))
    os.replace(tmp_path / "other", tar)
    with pytest.raises(UserError, match="is not what its index was made for"):
        open_sources(data, "val")


def test_a_shard_that_is_gone_is_missed(packed: Path, tmp_path: Path) -> None:
    """As after a copy that was cut short: fewer clips are not taken for all, until the index says so too."""
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    lost = sorted(folder.glob("train-*.tar"))[-1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost} is gone, but its index is there; restore it, or delete"):
        open_shards(folder, "train")
    index_path(lost).unlink()
    assert 0 < len(open_shards(folder, "train")) < len(open_shards(packed, "train"))


@pytest.mark.parametrize(
    ("name", "program"), [(".packing", "pack"), (".publishing", "pack"), (".caching", "cache")]
)  # fmt: skip
def test_unfinished_folder_is_refused(packed: Path, tmp_path: Path, name: str, program: str) -> None:
    """What a stopped packing or caching leaves is named, with what finishes it."""
    folder = Path(shutil.copytree(packed, tmp_path / "shards"))
    (folder / name).mkdir()
    with pytest.raises(UserError, match=f"holds {name}; run the same python shards/{program}.py command again"):
        open_shards(folder, "train")


def test_another_tar_of_the_same_size_is_seen_at_start(packed: Path, tmp_path: Path) -> None:
    """Size alone would not tell; the first and the last header are compared with the index."""
    folder = Path(shutil.copytree(packed, tmp_path / "shards"))
    tar = folder / "train-000000.tar"
    whole = tar.read_bytes()
    last = max(m.offset for row in open_shards(folder, "train").rows[:2] for m in row.members.values())
    for offset in (0, last - 512):
        for damage in (bytes(512), whole[offset + 512 : offset + 1024]):
            tar.write_bytes(whole[:offset] + damage + whole[offset + 512 :])
            with pytest.raises(UserError, match=f"train-000000.tar .* at offset {offset + 512} is another member"):
                open_shards(folder, "train")
    tar.write_bytes(whole)
    assert len(open_shards(folder, "train")) == len(open_shards(packed, "train"))


def make_cached(folder: Path) -> Path:
    """A folder with one cached clip of four frames."""
    folder.mkdir()
    latents_VTCHW, tokens_VTD = torch.ones(1, 4, 4, 2, 2), torch.ones(1, 4, 8)
    facts = {"fps": 25, "frames": 4, "height": 16, "width": 16}
    with tarfile.open(folder / "train-000000.tar", "w") as archive:
        for extension, data in (
            ("safetensors", pack_latents(latents_VTCHW, latents_VTCHW.clone(), tokens_VTD)),
            ("json", json.dumps(facts).encode()),
        ):
            info = tarfile.TarInfo(f"clip.{extension}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return folder


def test_latents_and_videos_do_not_mix(packed: Path, tmp_path: Path) -> None:
    """A run reads one kind; a cache alone opens."""
    cached = make_cached(tmp_path / "cached")
    assert mix((cached, 1)).cached and not mix((packed, 1)).cached
    with pytest.raises(UserError, match="cached/train-000000.tar holds latents and .* videos; train from one kind"):
        mix((packed, 1), (cached, 1))


def test_cut_shard_is_seen_at_start(packed: Path, tmp_path: Path) -> None:
    """Cut anywhere, with an index from before, it is refused by its size alone: nothing of it is read."""
    folder = Path(shutil.copytree(packed, tmp_path / "shards"))
    tar = folder / "train-000001.tar"
    whole = tar.read_bytes()
    assert index_path(tar).exists()
    for size_bytes in [0, 1, 511, *range(512, len(whole), 1024), len(whole) - 512, len(whole) - 1]:
        os.truncate(tar, size_bytes)
        with pytest.raises(UserError, match=rf"train-000001.tar has {size_bytes} bytes .* the tar was cut"):
            open_shards(folder, "train")
        tar.write_bytes(whole)


def make_index(lengths: list[list[int]], short: int = 1) -> DatasetIndex:
    """Clips of each video of each source, which have 1 to `short` frames, in turn."""
    rows = [
        SampleRow(key=f"{s}-{v}", members={}, clip=ClipInfo(fps=25, frames=1 + i % short, height=8, width=8, source=f"{v}"))
        for s, videos in enumerate(lengths) for v, count in enumerate(videos) for i in range(count)
    ]  # fmt: skip
    sources = tuple(Source((sum(videos),)) for videos in lengths)
    return DatasetIndex((Path("a.tar"),) * len(rows), tuple(rows), sources, "")


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3),
    clips=st.integers(1, 30), short=st.integers(1, 4), least=st.integers(1, 4),
)  # fmt: skip
def test_clips_to_look_at_are_of_all_that_there_is(
    lengths: list[list[int]], clips: int, short: int, least: int
) -> None:
    """Each usable one once, in order, the spare ones behind; no video gives two more than another that has some left."""
    index = make_index(lengths, short)
    usable = [i for i, row in enumerate(index.rows) if row.clip.frames >= least]
    found = index.choose(least, clips)
    looked, spare = found[:clips], found[clips:]
    assert sorted(found) == usable and looked == sorted(looked) and spare == sorted(spare)
    shown, left = (Counter(index.rows[i].key for i in part) for part in (looked, spare))
    assert all(max(shown.values()) <= shown[video] + 1 for video in left)


@pytest.mark.parametrize(
    ("lengths", "clips", "chosen"),
    [
        ([[1] * 9], 4, [0, 1, 2, 3]),  # videos of one clip: the first
        ([[90]], 1, [45]),
        ([[90]], 3, [15, 45, 75]),
        ([[30, 30, 30]], 3, [15, 45, 75]),
        ([[5, 1, 4]], 5, [1, 3, 5, 7, 9]),
        ([[1] * 9, [1] * 9], 4, [0, 1, 9, 10]),  # of a mix
    ],
)
def test_clips_to_look_at_lie_evenly(lengths: list[list[int]], clips: int, chosen: list[int]) -> None:
    """One of a video is its middle, three are the middles of its thirds; each source gives as many."""
    assert make_index(lengths).choose(1, clips)[:clips] == chosen
