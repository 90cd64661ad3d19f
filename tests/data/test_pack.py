"""Videos in, shards out: split by source, nothing lost in silence, same bytes. Run: pytest tests/data/test_pack.py"""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.data.conftest import frame_numbers, numbered_frames
from toolkit.data.check import check
from toolkit.data.index import open_shards
from toolkit.data.pack import pack
from toolkit.data.parallel import Workers
from toolkit.data.plan import name_hash
from toolkit.data.staging import load_record
from toolkit.data.video import read_frames, write_video
from toolkit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {"clip_seconds": 0.8, "shard_mb": 0.008}  # those of the fixture `packed`


def pack_command(videos: Path, out: Path, *arguments: str) -> list[str]:
    settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
    return [sys.executable, "shards/pack.py", str(videos), str(out), *settings, *arguments]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder: Path) -> list[Any]:
    tars = [tar.name.split("-")[0] for tar in folder.glob("*.tar")]
    return [row for split in ("train", "val") if split in tars for row in open_shards(folder, split).rows]


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
    """Packing again, in two processes, gives the same files, bit for bit, report and all; and they check clean."""
    pack(videos, tmp_path / "again", **SETTINGS, jobs=2)
    assert content(tmp_path / "again") == content(packed)
    assert "report.html" in content(packed) and check(packed).faults == []


@pytest.mark.parametrize("order", [("1/2", "2/2"), ("2/2", "1/2"), ("3/3",)])
def test_parts_in_any_order_give_the_same_and_wait_for_none(
    videos: Path, packed: Path, tmp_path: Path, order: tuple[str, ...]
) -> None:
    """Whichever part comes first does all that is missing; the others find it done and report the same."""
    reports = [pack(videos, tmp_path / "out", **SETTINGS, part=part) for part in order]
    assert content(tmp_path / "out") == content(packed)
    assert len({report.summary() for report in reports}) == 1


def test_parts_at_the_same_time_give_the_same(videos: Path, packed: Path, tmp_path: Path) -> None:
    """Two machines that start together publish once, and each ends well."""
    commands = [pack_command(videos, tmp_path / "out", f"--part={i}/2") for i in (1, 2)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate(timeout=120)[0].splitlines()[-1] for process in running]
    assert [process.returncode for process in running] == [0, 0] and len(set(said)) == 1
    assert content(tmp_path / "out") == content(packed)


def test_a_killed_packing_goes_on_without_redoing(videos: Path, packed: Path, tmp_path: Path) -> None:
    """SIGKILL leaves no process behind; what was encoded is not read again, and in the end all is the same."""
    mine, out = Path(shutil.copytree(videos, tmp_path / videos.name)), tmp_path / "out"
    process = subprocess.Popen(pack_command(mine, out, "--jobs=2"), cwd=ROOT, start_new_session=True)
    clips = out / ".packing" / "clips"
    while process.poll() is None and len(list(clips.glob("*.tar"))) < 2:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    while any(_group_and_state(stat) == (process.pid, True) for stat in Path("/proc").glob("[0-9]*/stat")):
        time.sleep(0.05)  # until every process of its group has ended
    finished = {path.stem for path in clips.glob("*.tar")}
    assert finished and not out.joinpath("pack.json").exists()
    for video in mine.iterdir():
        if name_hash(video.name) in finished:
            video.write_bytes(bytes(video.stat().st_size))
    pack(mine, out, **SETTINGS)
    assert content(out) == content(packed)


def _group_and_state(stat: Path) -> tuple[int, bool]:
    """The process group of a process, and whether it lives; of one that is gone, nobody's."""
    try:
        state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return 0, False
    return int(group), state not in "ZX"


@pytest.mark.parametrize("overwrite", [False, True])
def test_stopped_at_any_write_it_goes_on(
    videos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Whichever file is the last to appear, the same command ends with the same folder; old shards go only at the end."""
    out, real, count = tmp_path / "out", os.replace, 0
    if overwrite:
        pack(videos, out, short_side=24, holdout=0)
    before = content(out) if overwrite else {}

    def stop_at(limit: int, *paths: Path) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise KeyboardInterrupt
        real(*paths)

    for limit in (0, 3, 5, 4, 3, 9, 1, 9, 3, 2, 4, 1):  # each starts where the last stopped
        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", partial(stop_at, limit))
            with pytest.raises(KeyboardInterrupt):
                pack(videos, out, **SETTINGS, overwrite=overwrite)
        if (out / ".packing").exists():
            assert {name: data for name, data in content(out).items() if not name.startswith(".packing")} == before
    assert (out / ".publishing").exists()
    pack(videos, out, **SETTINGS, overwrite=overwrite)
    assert content(out) == content(packed)


def test_half_done_work_of_another_command_is_not_mixed(videos: Path, tmp_path: Path) -> None:
    """Other settings, videos or captions: refused, saying which; --overwrite starts anew, but not beside other machines."""
    mine, out = Path(shutil.copytree(videos, tmp_path / videos.name)), tmp_path / "out"
    _begin(mine, out)
    with pytest.raises(UserError, match=r"clip_seconds 0\.5 instead of 0\.8.*--overwrite to start anew"):
        pack(mine, out, **SETTINGS | {"clip_seconds": 0.5})
    with pytest.raises(UserError, match="delete .*packing to start anew"):
        pack(mine, out, **SETTINGS | {"clip_seconds": 0.5}, part="1/2", overwrite=True)
    (mine / "v0.txt").write_text("a caption")
    with pytest.raises(UserError, match="other captions"):
        pack(mine, out, **SETTINGS)
    (mine / "v9.mp4").write_bytes((mine / "v1.mp4").read_bytes())
    with pytest.raises(UserError, match=r"other videos \(v9\.mp4\)"):
        pack(mine, out, **SETTINGS)
    assert pack(mine, out, clip_seconds=0.5, overwrite=True).record.sources == 7
    assert sorted(path.name for path in out.iterdir() if path.suffix not in (".tar", ".json")) == ["report.html"]


def test_a_video_that_changes_in_between_is_noticed(videos: Path, tmp_path: Path) -> None:
    """One byte of a video surveyed before: what was seen of it is not what would be encoded."""
    mine, out = Path(shutil.copytree(videos, tmp_path / videos.name)), tmp_path / "out"
    _begin(mine, out)
    for video in mine.iterdir():
        data = bytearray(video.read_bytes())
        data[-1] ^= 1
        video.write_bytes(data)
    with pytest.raises(UserError, match="changed while it was packed"):
        pack(mine, out, **SETTINGS)


def _begin(videos: Path, out: Path) -> None:
    """Survey all and encode nothing: the folder for clips is in the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.data.pack.encode_source", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(videos, out, **SETTINGS)


def _interrupted(work: object) -> None:
    raise KeyboardInterrupt


def test_overwrite_replaces_only_when_done(videos: Path, packed: Path, tmp_path: Path) -> None:
    """A failed packing leaves the old shards; one that ends well replaces all of them; the same again does nothing."""
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("no video")
    with pytest.raises(UserError, match="none of the 1 videos"):
        pack(tmp_path / "bad", out, overwrite=True)
    assert content(out) == content(packed)
    report = pack(videos, out, short_side=24, overwrite=True)
    assert open_shards(out, "train").rows[0].clip.height == 24
    assert (
        {path.name for path in out.glob("*.tar")} == {*report.record.shards} < {path.name for path in packed.iterdir()}
    )
    shutil.rmtree(out / "report.html", ignore_errors=True)
    assert pack(videos, out, short_side=24).summary() == report.summary() and load_record(out) == report.record


def test_unreadable_videos_are_skipped_and_listed(tmp_path: Path) -> None:
    """A text file, a cut video and one of two frames are named with reasons, and the rest is packed."""
    videos = tmp_path / "videos"
    (videos / "deep").mkdir(parents=True)
    write_video(videos / "deep" / "Good Clip!.mp4", numbered_frames(range(12)), 25)
    write_video(videos / "short.mp4", numbered_frames(range(2)), 25)
    (videos / "text.mkv").write_text("no video")
    (videos / "cut.mp4").write_bytes((videos / "deep" / "Good Clip!.mp4").read_bytes()[:900])
    (videos / "notes.txt").write_text("not looked at")
    os.mkfifo(videos / "pipe.mp4")
    result = run(sys.executable, "shards/pack.py", videos, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("packing 4 videos") and "the same command goes on" in result.stdout
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
        with pytest.raises(UserError) as refused:
            pack(*arguments)
        assert message in str(refused.value) and "\n" not in str(refused.value)
    result = run(sys.executable, "shards/pack.py", *cases["none of the 1 videos"])
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith("survey:")]
    assert result.returncode == 2 and len(lines) == 1 and "none of the 1 videos" in lines[0], result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_seconds": 0}, "clip_seconds is 0"),
        ({"stride_seconds": -1}, "stride_seconds is -1"),
        ({"gop": 13}, "gop is 13"),
        ({"short_side": 8}, "short_side is 8"),
        ({"holdout": 1}, "holdout is 1"),
        ({"aspects": "wide"}, "16:9,1:1,9:16"),
        ({"aspects": "0:1"}, "16:9,1:1,9:16"),
        ({"part": "0/2"}, "part is 0/2"),
        ({"part": "3/2"}, "like 3/8"),
        ({"jobs": 0}, "jobs is 0"),
        ({"captions": "nowhere.csv"}, "cannot read nowhere.csv"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    videos: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    """The option, what it was, what is allowed; nothing is written."""
    with pytest.raises(UserError, match=message):
        pack(videos, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_overlapping_clips_hold_the_frames_of_their_place(videos: Path, tmp_path: Path) -> None:
    """A stride shorter than the clips gives full clips that share frames; a longer one leaves frames out."""
    for stride_seconds, stride in ((0.2, 5), (1.0, 25)):
        out = tmp_path / f"{stride}"
        pack(videos, out, clip_seconds=0.4, stride_seconds=stride_seconds, duplicate_distance=0, holdout=0)
        index, seen = open_shards(out, "train"), 0
        for i, row in enumerate(index.rows):
            start = round(25 * row.clip.start_s)
            assert start % stride == 0 or int(row.clip.source[1]) >= 3  # number 31 to 32 is a cut
            assert frame_numbers(read_frames(index.read(i, "mp4"))) == list(range(start, start + row.clip.frames))
            seen += row.clip.frames == 10
        assert seen >= {5: 20, 25: 6}[stride]


def test_words_aspect_and_gop_reach_the_shard(videos: Path, tmp_path: Path) -> None:
    """Caption and label stand in the sidecar, the middle is cut out, and gop 1 makes every frame a keyframe."""
    (tmp_path / "words.csv").write_text('video,caption,label\nv2.mp4,"a, b",c\n')
    pack(videos, tmp_path / "out", captions=tmp_path / "words.csv", aspects="1:1", gop=1, holdout=0)
    index = open_shards(tmp_path / "out", "train")
    assert {(row.clip.height, row.clip.width) for row in index.rows} == {(48, 48)}
    for i, row in enumerate(index.rows):
        said = (row.clip.caption, row.clip.label)
        assert said == (("a, b", "c") if row.clip.source == "v2.mp4" else (None, None))
        (tmp_path / "clip.mp4").write_bytes(data := index.read(i, "mp4"))
        with av.open(str(tmp_path / "clip.mp4")) as container:
            assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
    bits = read_frames(data)[-1, :24].mean((0, 2)) > 128  # columns 8 to 55 of 64: numbers 1 to 6 of 8
    number = row.clip.frames - 1 + round(25 * row.clip.start_s)
    assert [bool(number >> bit & 1) for bit in range(1, 7)] == bits.reshape(6, 8)[:, 4].tolist()


def test_a_killed_process_is_a_sentence() -> None:
    """Where the kernel kills a process for want of memory, the command says so instead of hanging."""
    with pytest.raises(UserError, match="fewer --jobs"), Workers(2) as workers:
        list(workers.run(os._exit, [9, 9]))


def test_real_signing_videos(real_videos: Path, tmp_path: Path) -> None:
    """Sixteen signing videos pack, check clean, and score a motion around 127."""
    report = pack(real_videos / "asl", tmp_path / "asl", short_side=64)
    assert report.clips == {"train": 13, "val": 3} and report.skipped == [] and report.record.dropped == {}
    assert check(tmp_path / "asl").faults == []
    train = open_shards(tmp_path / "asl", "train").rows
    assert all(row.clip.fps == 30 and row.clip.height == 64 for row in train)
    assert 90 < np.median([row.clip.motion for row in train]) < 190
