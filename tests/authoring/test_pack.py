"""Videos in, shards out: split by source, nothing lost in silence, same bytes. Run: pytest tests/authoring/test_pack.py"""

import errno
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import av
import numpy as np
import pytest

from tests.data.conftest import frame_numbers, numbered_frames
from toolkit.authoring.check import check
from toolkit.authoring.encode import SourceWork, encode_source
from toolkit.authoring.pack import _Packing, pack
from toolkit.authoring.plan import name_hash
from toolkit.authoring.repair import repair
from toolkit.authoring.staging import load_record, publish
from toolkit.authoring.survey import Survey, survey
from toolkit.authoring.synth import synth
from toolkit.data.index import open_shards
from toolkit.data.video import VideoError, iter_frames, read_frames, write_video
from toolkit.errors import UserError
from toolkit.parallel import Workers

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
    out, count = tmp_path / "out", 0
    if overwrite:
        pack(videos, out, short_side=24, holdout=0)
    before = content(out) if overwrite else {}

    def stop_at(limit: int, real: Callable[[Path, Path], None], *paths: Path) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise KeyboardInterrupt
        real(*paths)

    for limit in (0, 3, 5, 4, 3, 9, 1, 9, 3, 2, 4, 1):  # each starts where the last stopped
        count = 0
        with monkeypatch.context() as patch:
            for name in ("replace", "link"):
                patch.setattr(os, name, partial(stop_at, limit, getattr(os, name)))
            with pytest.raises(KeyboardInterrupt):
                pack(videos, out, **SETTINGS, overwrite=overwrite)
        if (out / ".packing").exists():
            assert {name: data for name, data in content(out).items() if not name.startswith(".packing")} == before
    assert (out / ".publishing").exists()
    monkeypatch.setattr("toolkit.authoring.pack.encode_source", None)  # all is encoded: even --overwrite only goes on
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
    pack(mine, tmp_path / "fresh", clip_seconds=0.5)
    assert content(out) == content(tmp_path / "fresh")
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


def _begin(videos: Path, out: Path, **more: Any) -> None:
    """Survey all and encode nothing: the folder for clips is in the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.authoring.pack.encode_source", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(videos, out, **SETTINGS, **more)


def _interrupted(work: object) -> None:
    raise KeyboardInterrupt


def test_overwrite_replaces_only_when_done(videos: Path, packed: Path, tmp_path: Path) -> None:
    """A failed packing leaves the old shards; one that ends well replaces all of them; the same again does nothing."""
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("no video")
    with pytest.raises(UserError, match="none of the 1 videos"):
        pack(tmp_path / "bad", out, overwrite=True)
    with pytest.raises(UserError, match=r"\(v\d\.mp4: near-black: .*lower --min_brightness and give --over"):
        pack(videos, out, min_brightness=255, overwrite=True)
    assert {name: data for name, data in content(out).items() if not name.startswith(".packing")} == content(packed)
    report = pack(videos, out, short_side=24, overwrite=True)
    assert open_shards(out, "train").rows[0].clip.height == 24
    assert (
        {path.name for path in out.glob("*.tar")} == {*report.record.shards} < {path.name for path in packed.iterdir()}
    )
    assert f"look at them: {out / 'report.html'}" in (said := report.summary())
    assert pack(videos, out, short_side=24).summary() == said and load_record(out) == report.record
    (out / "report.html").unlink()
    assert "report.html" not in pack(videos, out, short_side=24).summary()


def test_what_is_dropped_is_counted_by_kind_with_the_option_that_decides(tmp_path: Path) -> None:
    """In the summary, the record and the report alike; what no option decides is told where it happens."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, frames_THWC in {
        "good": numbered_frames(range(20)),
        "twin": numbered_frames(range(20)),
        "static": np.repeat(numbered_frames([7], 3), 20, 0),
        "static2": np.repeat(numbered_frames([9], 4), 20, 0),
        "black": np.zeros((20, 48, 64, 3), np.uint8),
        "narrow": numbered_frames(range(20), 2)[:, :, :12],
    }.items():
        write_video(videos / f"{name}.mp4", frames_THWC, 25)
    report = pack(videos, tmp_path / "out")
    assert (
        "dropped clips: 0 too short (--min_frames 3), 1 near-black (--min_brightness 12), 2 near-static (--min_motion 8), "
        "0 blurred (--min_sharpness 0.35), 1 duplicate (--duplicate_distance 2.5), 1 too small\n"
    ) in report.summary()
    assert report.record.dropped == {"duplicate": 1, "near-black": 1, "near-static": 2, "too small": 1}
    page = (tmp_path / "out" / "report.html").read_text()
    for kind, count in report.record.dropped.items():
        assert f"<bdi>{kind}</bdi> <span>{count} of {count}</span>" in page
        assert page.count(f"<strong><bdi>{kind}: ") == count
    for path in videos.iterdir():
        if path.name != "narrow.mp4":
            path.unlink()
    with pytest.raises(
        UserError, match="too small: 12 x 48 px has a side below 16.; give larger pictures, or other --aspects"
    ):
        pack(videos, tmp_path / "other")


@pytest.mark.parametrize("name", ["backup.tar", "train-0.tar", "my-train-000000.tar", "notes.index.json"])
def test_overwrite_removes_only_shards_of_a_packing(videos: Path, packed: Path, tmp_path: Path, name: str) -> None:
    """Another tar or index is a file like any other: refused where it lies, and left alone where it comes later."""
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    (out / name).write_text("mine")
    before = content(out)
    with pytest.raises(UserError, match=re.escape(f"not shards of a packing ({name})")):
        pack(videos, out, short_side=24, overwrite=True)
    assert content(out) == before
    (out / name).unlink()

    def publish_late(staging: Path, out: Path) -> None:
        (out / name).write_text("mine")
        publish(staging, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.authoring.pack.publish", publish_late)
        pack(videos, out, short_side=24, overwrite=True)
    assert (out / name).read_text() == "mine"
    (out / name).unlink()  # to a reader, an index without its tar is a tar that is gone
    assert open_shards(out, "val").rows[0].clip.height == 24


def test_a_finished_packing_is_looked_at_before_it_is_believed(videos: Path, packed: Path, tmp_path: Path) -> None:
    """A shard or an index that is gone, cut or empty: refused with its name; --overwrite makes it anew, but not in parts."""
    for spoil in ("unlink *.tar", "cut *.tar", "unlink *.index.json", "cut *.index.json"):
        out = Path(shutil.copytree(packed, tmp_path / spoil.replace("*", "")))
        for path in sorted(out.glob(spoil.split()[1]))[:1]:
            path.unlink() if spoil.startswith("unlink") else path.write_bytes(path.read_bytes()[:-512])
            with pytest.raises(
                UserError, match=rf"but {path.name.split('.')[0]}\.tar or its index is gone.*--overwrite"
            ):
                pack(videos, out, **SETTINGS)
        pack(videos, out, **SETTINGS, overwrite=True)
        assert content(out) == content(packed)
    (out / "report.html").write_text("changed")
    pack(videos, out, **SETTINGS, part="1/2", overwrite=True)  # the other machine has just made it
    assert (out / "report.html").read_text() == "changed"
    pack(videos, out, **SETTINGS, overwrite=True)
    assert content(out) == content(packed)


def test_another_threshold_does_not_look_through_the_videos_again(
    videos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a packing that kept nothing, --overwrite surveys only what is new or changed, and gives the same."""
    mine, out, seen = Path(shutil.copytree(videos, tmp_path / videos.name)), tmp_path / "out", []
    (mine / "v0.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="none of the 6"):
        pack(mine, out, **SETTINGS, min_brightness=255)
    shutil.copy(videos / "v0.mp4", mine)
    (mine / "gone.mp4").symlink_to("nowhere")

    def look(path: Path, name: str, *more: Any, **options: Any) -> Survey:
        seen.append(name)
        return survey(path, name, *more, **options)

    monkeypatch.setattr("toolkit.authoring.pack.survey", look)
    with pytest.raises(UserError, match="none of the 7"):
        pack(mine, out, **SETTINGS, min_brightness=254.5, overwrite=True)
    (mine / "gone.mp4").unlink()
    (mine / "gone.mp4").touch()
    with pytest.raises(UserError, match="none of the 7"):
        pack(mine, out, **SETTINGS, min_brightness=254, overwrite=True)
    (mine / "gone.mp4").unlink()
    pack(mine, out, **SETTINGS, overwrite=True)
    assert seen == ["v0.mp4", "gone.mp4", "gone.mp4"] and content(out) == content(packed)


def test_of_two_commands_that_begin_at_once_one_is_refused(videos: Path, tmp_path: Path) -> None:
    """Who finds nothing, and then another's beginning, says so and changes nothing of it; the first of two files stays."""
    out = tmp_path / "out"

    def begin_between(*arguments: object) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr("toolkit.authoring.staging._refuse_foreign", lambda *_: None)
            _begin(videos, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.authoring.staging._refuse_foreign", begin_between)
        with pytest.raises(UserError, match=r"clip_seconds 0\.5 instead of 0\.8"):
            pack(videos, out, **SETTINGS | {"clip_seconds": 0.5})
    assert pack(videos, out, **SETTINGS).record.job.settings.clip_seconds == 0.8


def test_the_clips_of_the_first_to_finish_stay(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another part encoded the same video meanwhile, its tar is not replaced: somebody may be reading it by offset."""
    works: list[SourceWork] = []
    with monkeypatch.context() as patch:
        patch.setattr("toolkit.authoring.pack.encode_source", works.append)
        with pytest.raises(FileNotFoundError):
            pack(videos, tmp_path / "out", **SETTINGS)

    def slowly(*arguments: Any) -> Iterator[np.ndarray]:
        works[0].target.write_bytes(b"another's")
        yield from iter_frames(*arguments)

    monkeypatch.setattr("toolkit.authoring.encode.iter_frames", slowly)
    encode_source(works[0])
    assert works[0].target.read_bytes() == b"another's"


def test_the_record_of_another_command_is_not_reported(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who publishes and then finds what somebody else published says so."""

    def publish_twice(staging: Path, out: Path) -> None:
        monkeypatch.undo()
        publish(staging, out)
        pack(videos, out, short_side=24, overwrite=True)

    monkeypatch.setattr("toolkit.authoring.pack.publish", publish_twice)
    with pytest.raises(UserError, match="was changed while it was packed"):
        pack(videos, tmp_path / "out", **SETTINGS)


def test_an_error_of_the_disk_while_encoding_loses_nothing(
    videos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether Python or FFmpeg meets it: a sentence that names the video, and the same command goes on."""

    def ffmpeg(path: Path, *_: object) -> NoReturn:
        raise VideoError(f"{path}: Input/output error") from av.error.OSError(errno.EIO, "Input/output error")

    def python(path: Path) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    for name, fail in (("file_sha256", python), ("iter_frames", ffmpeg)):
        with monkeypatch.context() as patch:
            patch.setattr(f"toolkit.authoring.encode.{name}", fail)
            with pytest.raises(UserError, match=r"v\d\.mp4: Input/output error; .*the same command goes on"):
                pack(videos, tmp_path / "out", **SETTINGS)
    pack(videos, tmp_path / "out", **SETTINGS)
    assert content(tmp_path / "out") == content(packed)


def test_parts_that_are_done_begin_the_rest_at_places_of_their_own() -> None:
    """Each part does all items once, its share first; no two begin what is left with the same one."""
    orders: list[list[int]] = [[], [], [], []]
    for number, order in enumerate(orders, 1):
        nothing: Any = None
        part = _Packing(Path(), Path(), Path(), nothing, {}, Workers(1), number, 4)
        part._do("count", order.append, range(40), lambda item: item, "")
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert sorted(item for order in orders for item in order[:10]) == list(range(40))
    assert len({order[10] for order in orders}) == 4


def test_links_to_folders_and_rows_about_nothing_are_said(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is passed over, a link to a folder, a row of the table or other files, is a line each; what is used is not."""
    mine = Path(shutil.copytree(videos, tmp_path / videos.name))
    (mine / "more").symlink_to(videos)
    for name in ("a.PNG", "b.png", "c.png.zip", "README", "v9.txt", "v1.txt", os.fsdecode(b"x.\x1b\xff")):
        (mine / name).touch()
    (mine / "words.csv").write_text("video,caption\nv1.mp4,x\nv8.mp4,y\nv9.mp4,z\n")
    pack(mine, tmp_path / "out", captions=mine / "words.csv")
    said = capsys.readouterr().out
    assert "passed over 6 files: 2 .png, 1 without an ending, 1 .zip, 1 .txt, 1 .\\x1b\\udcff\n" in said
    assert f"not followed: {mine / 'more'}, a link to a folder" in said
    assert "about 2 videos that are not there: v8.mp4, v9.mp4" in said


@pytest.mark.parametrize("size_px", [(2160, 3840), (2728, 1534)], ids=["4K", "upright"])
def test_large_videos_come_back_from_the_shard(tmp_path: Path, size_px: tuple[int, int]) -> None:
    """Pictures near the largest that a shard may hold pack, check and decode to what they showed."""
    (tmp_path / "videos").mkdir()
    frames_THWC = numbered_frames(range(4)).repeat(size_px[0] // 48 + 1, 1).repeat(size_px[1] // 64 + 1, 2)
    write_video(tmp_path / "videos" / "large.mp4", frames_THWC[:, : size_px[0], : size_px[1]], 25)
    pack(tmp_path / "videos", tmp_path / "out", min_motion=0, jobs=1)
    index = open_shards(tmp_path / "out", "train")
    decoded_THWC = read_frames(index.read(0, "mp4"), extension="mp4")
    assert len(index.rows) == 1 and check(tmp_path / "out", deep=True).faults == []
    assert decoded_THWC.shape[1:3] == (index.rows[0].clip.height, index.rows[0].clip.width)
    assert 0.98 * 2048**2 < decoded_THWC[0, ..., 0].size <= 2048**2
    middle_THWC = decoded_THWC[:, decoded_THWC.shape[1] // 4]
    shown = middle_THWC.mean(2)[:, np.linspace(0, middle_THWC.shape[1], 17).astype(int)[1:-1:2]] > 128
    assert [int((row << np.arange(8)).sum()) for row in shown] == [0, 1, 2, 3]


def test_a_stopped_packing_does_not_finish_the_videos_it_is_at(tmp_path: Path) -> None:
    """Ctrl-C ends the command and its processes in the middle of long videos, which are not surveyed to their end."""
    (tmp_path / "videos").mkdir()
    for name in ("a.mkv", "b.mkv"):
        _write_long(tmp_path / "videos" / name, repeats=1500)
    command = pack_command(tmp_path / "videos", tmp_path / "out", "--jobs=2")
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    reads = partial(_reads, tmp_path / "videos" / "a.mkv")
    while process.poll() is None and not any(map(reads, Path("/proc").glob("[0-9]*/fd"))):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130 and "stopped; what was published so far is whole" in error, error
    assert list((tmp_path / "out" / ".packing" / "survey").glob("*.json")) == []


def _write_long(path: Path, repeats: int) -> None:
    """A second of video over and over, by copying its packets."""
    second = io.BytesIO()
    write_video(second, numbered_frames(range(25)).repeat(8, 1).repeat(8, 2), 25)
    second.seek(0)
    with av.open(second) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for i in range(repeats):
            source.seek(0)
            for packet in source.demux(video=0):
                if packet.size and packet.pts is not None and packet.dts is not None:
                    shift = round(i / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = stream
                    target.mux(packet)


def _reads(video: Path, descriptors: Path) -> bool:
    """Whether another process has a video open, by its folder in /proc."""
    try:
        return descriptors.parent.name != str(os.getpid()) and any(p.readlink() == video for p in descriptors.iterdir())
    except OSError:
        return False


def test_odd_times_and_sizes_do_not_stop_the_packing(tmp_path: Path) -> None:
    """Times that go back, too slow a rate and a side longer than x264 takes: packed or skipped, and the rest is packed."""
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "good.mp4", numbered_frames(range(12)), 25)
    for part, times in enumerate((range(900, 906), range(6))):
        _write_timed(tmp_path / f"{part}.ts", numbered_frames(range(6), part), times, "mpeg2video", "yuv420p")
    (videos / "back.ts").write_bytes((tmp_path / "0.ts").read_bytes() + (tmp_path / "1.ts").read_bytes())
    _write_timed(videos / "slides.mkv", numbered_frames(range(5), 2), [3750 * i for i in range(5)])
    _write_timed(videos / "wide.mkv", numbered_frames(range(5), 3).repeat(313, 2), range(5))
    report = pack(videos, tmp_path / "out", min_motion=0, min_sharpness=0, duplicate_distance=0)
    (skipped,) = report.skipped
    assert skipped[0] == "slides.mkv" and "at 0.01 to 1000 fps" in skipped[1]
    assert check(tmp_path / "out", deep=True).faults == []
    clips: dict[str, list[Any]] = {}
    for row in sorted(rows(tmp_path / "out"), key=lambda row: row.key):
        clips.setdefault(row.clip.source, []).append(row.clip)
    assert set(clips) == {"good.mp4", "back.ts", "wide.mkv"}
    assert [clip.start_s for clip in clips["back.ts"]] == [35.96, 0]
    assert [(clip.height, clip.width) for clip in clips["wide.mkv"]] == [(38, 16384)]


def _write_timed(
    path: Path, frames_THWC: np.ndarray, times: Sequence[int], codec: str = "ffv1", pixels: str = "bgr0"
) -> None:
    """Write frames at times in units of 1/25 s."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], pixels
        for frame_HWC, time_25ths in zip(frames_THWC, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = time_25ths, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_a_video_that_does_not_encode_is_a_sentence(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What x264 says names the video, and once that is away the rest is packed."""

    def refuse(*_: object) -> NoReturn:
        raise av.error.ExternalError(-542398533, "Generic error in an external library")

    with monkeypatch.context() as patch:
        patch.setattr("toolkit.authoring.encode.VideoWriter.add", refuse)
        with pytest.raises(
            UserError, match=r"v\d\.mp4 does not encode: Generic error .*; take it away and start again"
        ):
            pack(videos, tmp_path / "out", **SETTINGS)


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
    assert "\npacking 4 videos" in result.stdout and "the same command goes on" in result.stdout
    for name in ("short.mp4: has 2 frames", "text.mkv: Invalid data", "cut.mp4: "):
        assert f"skipped {name}" in result.stdout
    assert "1 clips (1 train, 0 val), 0.5 s, from 1 videos, 0 used in part, 3 skipped" in result.stdout
    row = open_shards(tmp_path / "out", "train").rows[0]
    assert row.key.startswith("good-clip_") and row.clip.source == "deep/Good Clip!.mp4"


def test_videos_of_cameras_and_discs_pack(tmp_path: Path) -> None:
    """Whatever container their ending stands for."""
    (tmp_path / "videos").mkdir()
    codecs = {
        "m2ts": "h264",
        "vob": "mpeg2video",
        "mxf": "mpeg2video",
        "asf": "wmv2",
        "m2v": "mpeg2video",
        "3g2": "mpeg4",
    }
    formats = {"m2ts": "mpegts", "m2v": "mpeg2video"}
    for i, (ending, codec) in enumerate(codecs.items()):
        path = str(tmp_path / "videos" / f"{ending}.{ending}")
        with av.open(path, "w", format=formats.get(ending, ending)) as container:
            stream: Any = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
            for frame_HWC in numbered_frames(range(12), i).repeat(10, 1).repeat(10, 2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
            container.mux(stream.encode())
    report = pack(tmp_path / "videos", tmp_path / "out")
    assert report.skipped == [] and report.record.sources == 6


def test_errors_are_one_sentence_and_exit_2(tmp_path: Path, packed: Path) -> None:
    """No folder, no videos, nothing readable, an output that is taken: one line on stderr, exit code 2."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("no video")
    cases = {
        "there is no folder": (tmp_path / "none", tmp_path / "out"),
        "a.mp4 is a file; give the folder": (tmp_path / "bad" / "a.mp4", tmp_path / "out"),
        ".mp4 .mkv": (tmp_path / "empty", tmp_path / "out"),
        "none of the 1 videos": (tmp_path / "bad", tmp_path / "out"),
        "already holds shards": (tmp_path / "bad", packed),
        "a.mp4 is a file, and shards lie in a folder; give": (tmp_path / "bad", tmp_path / "bad" / "a.mp4"),
        "a.mp4 is a file, and shards": (tmp_path / "bad", tmp_path / "bad" / "a.mp4" / "out"),
        "not shards of a packing (a.mp4)": (tmp_path / "bad", tmp_path / "bad"),
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
        ({"clip_seconds": 0}, "^--clip_seconds is 0; it should be greater than 0$"),
        ({"stride_seconds": -1}, "stride_seconds is -1"),
        ({"gop": 13}, "gop is 13"),
        ({"short_side": 8}, "short_side is 8"),
        ({"holdout": 1}, "holdout is 1"),
        ({"aspects": "wide"}, "^--aspects is 'wide'; it should be .*16:9,1:1,9:16"),
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


@pytest.mark.parametrize("place", ["s3://bucket/asl", "hf://datasets/a/b", ""])
def test_folders_are_of_this_machine(
    videos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """An address, or the nothing of an unset variable, is refused wherever a folder is read or written; no file appears."""
    monkeypatch.chdir(tmp_path)
    for command in (
        lambda: pack(place, "out"),
        lambda: pack(videos, place),
        lambda: check(place),
        lambda: repair(place, "out"),
        lambda: repair(packed, place),
        lambda: synth(place, clips=1),
    ):
        with pytest.raises(UserError, match=f"{place or 'an empty name'} is no folder of this machine; name one"):
            command()
    assert list(tmp_path.iterdir()) == []
    result = run(sys.executable, "shards/check.py", packed, "--repair", place)
    assert result.returncode == 2 and "is no folder of this machine" in result.stderr


def test_a_tilde_is_the_home_of_the_user(
    videos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every folder and file that is named to pack, check or repair, quoted from the shell or behind an =."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(videos, tmp_path / videos.name)
    (tmp_path / "words.csv").write_text("video,caption\n")
    pack(f"~/{videos.name}", "~/out", captions="~/words.csv", **SETTINGS)
    assert content(tmp_path / "out") == content(packed)
    assert check("~/out").shards and repair("~/out", "~/copy").is_whole and (tmp_path / "copy").is_dir()


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


def test_of_a_video_whose_parts_are_named_nothing_else_is_packed(videos: Path, tmp_path: Path) -> None:
    """From the frame at its start to the last before its end, cut as shots are, each clip with its own part's words."""
    table, out = tmp_path / "signs.csv", tmp_path / "out"
    table.write_text(
        "video,start_s,end_s,label,caption\nv2.mp4,0.8,1.0,bye,\nv2.mp4,0.2,0.6,hello,a greeting\nv4.mp4,0.32,0.36,short,\n"
        "v4.mp4,1,1.2,,\nv4.mp4,70,80,late,\nv3.mp4,,,whole,\nv5.mp4,9,10,gone,\n"
    )
    report = pack(videos, out, captions=table, clip_seconds=0.3, holdout=0, duplicate_distance=0)
    index = open_shards(out, "train")
    found: dict[str, list[tuple[str | None, list[int]]]] = {}
    for i, row in sorted(enumerate(index.rows), key=lambda pair: pair[1].key):
        numbers = frame_numbers(read_frames(index.read(i, "mp4")))
        assert numbers[0] == round(25 * row.clip.start_s)
        assert row.clip.caption == ("a greeting" if row.clip.label == "hello" else None)
        found.setdefault(row.clip.source, []).append((row.clip.label, numbers))
    assert found["v2.mp4"] == [("hello", [*range(5, 10)]), ("hello", [*range(10, 15)]), ("bye", [*range(20, 25)])]
    assert found["v4.mp4"] == [(None, [*range(25, 30)])]
    assert [number for label, numbers in found["v3.mp4"] for number in numbers if label == "whole"] == [*range(35)]
    assert sum(len(numbers) for _, numbers in found["v0.mp4"]) == 20 and "v5.mp4" not in found
    assert report.skipped == [("v5.mp4", "1 of its 1 parts give no clip")]
    (in_part,) = report.record.partly
    assert in_part[0] == "v4.mp4" and in_part[1].startswith(
        "2 of its 3 parts give no clip; 1 of 40 frames lie in no clip"
    )


def test_a_single_recording_is_trained_on_and_judged(videos: Path, tmp_path: Path) -> None:
    """Its last clips are held out, or the parts that the table names; no frame is in both, and check.py finds no fault."""
    folder, table = tmp_path / "one", tmp_path / "signs.csv"
    folder.mkdir()
    shutil.copy(videos / "v2.mp4", folder)

    def packed_numbers(**settings: Any) -> dict[str, set[int]]:
        pack(folder, out := tmp_path / str(len(settings)), duplicate_distance=0, min_motion=0, **settings)
        assert not check(out, deep=True).faults
        numbers = {}
        for split in ("train", "val"):
            index = open_shards(out, split)
            clips = [frame_numbers(read_frames(index.read(i, "mp4"))) for i in range(len(index))]
            numbers[split] = {number for clip in clips for number in clip}
        return numbers

    found = packed_numbers(clip_seconds=0.3)
    assert max(found["train"]) < min(found["val"]) and found["train"] | found["val"] == set(
        range(len(found["train"] | found["val"]))
    )
    found = packed_numbers(clip_seconds=0.3, stride_seconds=0.12)  # overlapping: what would be in both is dropped
    assert max(found["train"]) < min(found["val"])
    table.write_text("video,start_s,end_s,split\nv2.mp4,0.2,0.4,val\nv2.mp4,0.4,0.6,train\nv2.mp4,0,0.2,\n")
    found = packed_numbers(captions=table, clip_seconds=4, holdout=0.9)
    assert found == {"train": {*range(5), *range(10, 15)}, "val": {*range(5, 10)}}


def test_other_parts_are_another_packing(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose videos are looked through again; for other words of the same parts they are not."""
    table, out, seen = tmp_path / "signs.csv", tmp_path / "out", []

    def look(path: Path, name: str, *more: Any) -> Survey:
        seen.append(name)
        return survey(path, name, *more)

    def write(begin_s: float, label: str) -> None:
        table.write_text(f"video,start_s,end_s,label\nv2.mp4,{begin_s},1,{label}\n")

    monkeypatch.setattr("toolkit.authoring.pack.survey", look)
    for begin_s, label, looks in ((0.4, "a", 6), (0.4, "b", 0), (0.6, "b", 6)):
        write(begin_s, label)
        seen.clear()
        _begin(videos, out, captions=table, overwrite=True)
        assert len(seen) == looks
    write(0.8, "b")
    with pytest.raises(UserError, match="other captions, other parts of the videos"):
        pack(videos, out, **SETTINGS, captions=table)
    pack(videos, out, **SETTINGS, captions=table, overwrite=True)
    assert [(r.clip.start_s, r.clip.frames, r.clip.label) for r in rows(out) if r.clip.label] == [(0.8, 5, "b")]


def test_a_killed_process_is_a_sentence() -> None:
    """Where the kernel kills a process for want of memory, the command says so instead of hanging."""
    with pytest.raises(UserError, match="fewer --jobs"), Workers(2) as workers:
        list(workers.run(os._exit, [9, 9]))


def test_stopped_work_ends_its_own_processes_alone() -> None:
    """Those that were there before, as a loader's workers, live on."""
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt), Workers(2) as workers:
            for _ in workers.run(time.sleep, [0, 60]):
                raise KeyboardInterrupt
        assert multiprocessing.active_children() == [other]
    finally:
        other.kill()


def test_real_signing_videos(real_videos: Path, tmp_path: Path) -> None:
    """Sixteen signing videos pack, check clean, and score a motion around 127."""
    report = pack(real_videos / "asl", tmp_path / "asl", short_side=64)
    assert report.clips == {"train": 13, "val": 3} and report.skipped == [] and report.record.dropped == {}
    assert check(tmp_path / "asl").faults == []
    train = open_shards(tmp_path / "asl", "train").rows
    assert all(row.clip.fps == 30 and row.clip.height == 64 for row in train)
    assert 90 < np.median([row.clip.motion for row in train]) < 190
