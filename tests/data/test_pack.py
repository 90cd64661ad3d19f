"""Videos in, shards out: split by source, nothing lost in silence, same bytes. Run: pytest tests/data/test_pack.py"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import frame_numbers, numbered_frames
from toolkit.data.check import check
from toolkit.data.index import open_shards
from toolkit.data.motion import Motion
from toolkit.data.pack import pack, split_sources
from toolkit.data.video import read_frames, write_video
from toolkit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def shards_py(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"shards/{program}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_frame_is_packed_once_and_sources_are_not_shared(videos: Path, packed: Path) -> None:
    """The clips of each video, in order, hold its frames 0 .. n-1; train and val share no video."""
    sources: dict[str, dict[str, list[int]]] = {}
    for split in ("train", "val"):
        index = open_shards(packed, split)
        for i, row in sorted(enumerate(index.rows), key=lambda pair: pair[1].key):
            assert row.clip.frames <= 20 and row.clip.fps == 25 and (row.clip.height, row.clip.width) == (48, 64)
            numbers = frame_numbers(read_frames(index.read(i, "mp4")))
            assert numbers[0] == round(25 * row.clip.start_s)
            sources.setdefault(split, {}).setdefault(row.clip.source, []).extend(numbers)
    assert sources["train"].keys() | sources["val"].keys() == {path.name for path in videos.iterdir()}
    assert not sources["train"].keys() & sources["val"].keys() and len(sources["val"]) == 1
    for name, numbers in (sources["train"] | sources["val"]).items():
        assert numbers == list(range(20 + 5 * int(name[1])))


def test_same_videos_give_same_bytes(videos: Path, packed: Path, tmp_path: Path) -> None:
    """Packing again gives the same files, bit for bit."""
    pack(videos, tmp_path / "again", clip_seconds=0.8, shard_mb=0.008)
    names = sorted(path.name for path in packed.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((packed / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_split_is_stable_and_leaves_some_to_each() -> None:
    """About the share asked for, at least one and never all; more videos keep most of the earlier choice."""
    names = [f"{i}.mp4" for i in range(50)]
    assert len(split_sources(names, 0.2)) == 10 and split_sources(names, 0.2) == split_sources(names[::-1], 0.2)
    assert len(split_sources(names[:2], 0.01)) == len(split_sources(names[:2], 0.99)) == 1
    assert split_sources(names[:1], 0.5) == split_sources(names, 0) == set()
    assert len(split_sources(names[:45], 0.2) & split_sources(names, 0.2)) >= 8


def test_unreadable_videos_are_skipped_and_listed(tmp_path: Path) -> None:
    """A text file, a cut video and one of two frames are named with reasons, and the rest is packed."""
    videos = tmp_path / "videos"
    (videos / "deep").mkdir(parents=True)
    write_video(videos / "deep" / "Good Clip!.mp4", numbered_frames(range(12)), 25)
    write_video(videos / "short.mp4", numbered_frames(range(2)), 25)
    (videos / "text.mkv").write_text("no video")
    (videos / "cut.mp4").write_bytes((videos / "deep" / "Good Clip!.mp4").read_bytes()[:900])
    (videos / "notes.txt").write_text("not looked at")
    result = shards_py("pack", videos, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    for name in ("short.mp4: has 2 frames", "text.mkv: Invalid data", "cut.mp4: "):
        assert f"skipped {name}" in result.stdout
    assert "1 clips (1 train, 0 val), 0.5 s, from 1 videos, 3 skipped" in result.stdout
    row = open_shards(tmp_path / "out", "train").rows[0]
    assert row.key.startswith("good-clip_") and row.clip.source == "deep/Good Clip!.mp4"


def test_errors_are_one_sentence_and_exit_2(tmp_path: Path, packed: Path) -> None:
    """No folder, no videos, nothing readable, an output that is taken: one line on stderr, exit code 2."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("no video")
    cases = {
        "there is no folder": (tmp_path / "none", tmp_path / "out"),
        ".mp4 .mkv": (tmp_path / "empty", tmp_path / "out"),
        "none of the 1 videos": (tmp_path / "bad", tmp_path / "out"),
        "already holds shards": (tmp_path / "bad", packed),
        "not shards (a.mp4)": (tmp_path / "bad", tmp_path / "bad"),
    }
    for message, arguments in cases.items():
        result = shards_py("pack", *arguments)
        lines = [line for line in result.stderr.splitlines() if line and not line.startswith("pack:")]
        assert result.returncode == 2 and len(lines) == 1 and message in lines[0], result.stderr


def test_overwrite_replaces_only_when_done(videos: Path, tmp_path: Path) -> None:
    """--overwrite swaps the shards; a failed packing leaves the old ones; what an interrupted one left is cleared."""
    out = tmp_path / "out"
    pack(videos, out)
    (out / ".packing").mkdir()
    (out / ".packing" / "half.tar").write_text("x")
    before = (out / "train-000000.tar").read_bytes()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("no video")
    with pytest.raises(UserError):
        pack(tmp_path / "bad", out, overwrite=True)
    assert (out / "train-000000.tar").read_bytes() == before
    pack(videos, out, short_side=24, overwrite=True)
    assert open_shards(out, "train").rows[0].clip.height == 24
    assert not (out / ".packing").exists()


def test_check_finds_what_changed(packed: Path, tmp_path: Path) -> None:
    """Whole shards pass; a flipped bit, a cut tar and a lying index are found with shard, key and offset."""
    report = check(packed)
    assert report.faults == [] and report.train == len(open_shards(packed, "train").rows) and report.seconds > 5
    folder = tmp_path / "s"
    subprocess.run(["cp", "-r", packed, folder], check=True)
    index = open_shards(folder, "train")
    tars = sorted(folder.glob("train-*.tar"))
    row = index.rows[0]
    data = bytearray(tars[0].read_bytes())
    data[row.members["mp4"].offset + 50] ^= 1
    tars[0].write_bytes(data)
    tars[1].write_bytes(tars[1].read_bytes()[:-2000])
    lying = tars[2].with_suffix(".index.json")
    lying.write_text(lying.read_text().replace('"height": 48', '"height": 50'))
    padded = bytearray(tars[3].read_bytes())
    padded[-1] ^= 1  # beyond the members
    tars[3].write_bytes(padded)
    tars[4].unlink()
    result = shards_py("check", folder, "--json")
    found = json.loads(result.stdout)
    assert result.returncode == 1 and found["shards"] == report.shards - 1
    faults = {fault["shard"]: fault for fault in found["faults"]}
    assert faults[tars[0].name]["key"] == row.key and faults[tars[0].name]["offset"] == row.members["mp4"].offset
    assert "index was made for" in faults[tars[1].name]["fault"]
    assert "index says (" in faults[tars[2].name]["fault"]
    assert "damaged at offset" in faults[tars[3].name]["fault"]
    assert faults[tars[4].with_suffix(".index.json").name]["fault"] == "an index without its tar"
    assert len(faults) == 5


def test_motion_score_is_its_formula() -> None:
    """4 x the mean absolute luma change per second, between 1 and 255, and the frames pass unchanged."""
    frames = [np.full((64, 64, 3), value, np.uint8) for value in (100, 102, 100, 102)]
    motion = Motion(fps=10)
    assert all(a is b for a, b in zip(motion.watch(iter(frames)), frames, strict=True))
    assert motion.score == 4 * 2 * 10
    still = Motion(fps=10)
    list(still.watch(iter(frames[:1] * 3)))
    assert still.score == 1


def test_real_signing_videos(real_videos: Path, tmp_path: Path) -> None:
    """Sixteen signing videos pack, check clean, and score a motion around 127."""
    report = pack(real_videos / "asl", tmp_path / "asl", short_side=64)
    assert report.clips == {"train": 13, "val": 3} and report.skipped == []
    assert check(tmp_path / "asl").faults == []
    rows = open_shards(tmp_path / "asl", "train").rows
    assert all(row.clip.fps == 30 and row.clip.height == 64 for row in rows)
    assert 90 < np.median([row.clip.motion for row in rows]) < 190
