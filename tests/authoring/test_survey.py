"""Any video people have is cut into clips that are whole and even, or skipped with the reason.

Run: pytest tests/authoring/test_survey.py
"""

import errno
import io
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import av
import numpy as np
import pytest
from PIL import Image

import toolkit.authoring.survey
from tests.data.conftest import HEIGHT_PX, WIDTH_PX, frame_numbers, numbered_frames
from toolkit.authoring.motion import motion_score
from toolkit.authoring.pack import pack
from toolkit.authoring.small import SmallFrame, iter_small
from toolkit.authoring.survey import Watch, survey
from toolkit.data.index import open_shards
from toolkit.data.video import VideoError, iter_frames, read_frames, write_video
from toolkit.errors import UserError

COUNT = 30
# File, encoder, pixel format: what cameras, phones, browsers and editors write.
KINDS = [
    ("h264.mp4", "libx264", "yuv420p"),
    ("full range.mov", "libx264", "yuvj420p"),
    ("ten bit.mkv", "libx265", "yuv420p10le"),
    ("hevc.mp4", "libx265", "yuv420p"),
    ("vp9.webm", "libvpx-vp9", "yuv420p"),
    ("av1.mkv", "libsvtav1", "yuv420p"),
    ("old.avi", "mpeg4", "yuv420p"),
    ("frames.avi", "mjpeg", "yuvj420p"),
    ("lossless.mkv", "ffv1", "yuv444p"),
    ("moving picture.gif", "gif", "rgb8"),
]


def mux(path: Path, frames: Iterable[np.ndarray], codec: str = "libx264", pixels: str = "yuv420p", **more: Any) -> None:
    """Encode with everything a real file may have: sound, a second picture, its own times in ms, any tag."""
    with av.open(str(path), "w") as container:
        quality = {"crf": "12"} if codec.startswith("lib") else {"qscale": "2"}
        quality |= more.get("quality", {})
        stream: Any = container.add_stream(codec, rate=25, options=quality | {"x265-params": "log-level=none"})
        sound: Any = container.add_stream("aac", rate=16000) if more.get("sound") else None
        second: Any = container.add_stream("libx264", rate=25) if more.get("second") else None
        if second is not None:
            second.height, second.width, second.pix_fmt = 32, 32, "yuv420p"
        for i, frame_HWC in enumerate(frames):
            if i == 0:
                stream.height, stream.width, stream.pix_fmt = *frame_HWC.shape[:2], pixels
                stream.codec_context.color_trc = more.get("transfer", 2)
                if pixels.startswith("yuvj"):
                    stream.codec_context.color_range = 2
                if "times_ms" in more:
                    stream.codec_context.time_base = Fraction(1, 1000)
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24").reformat(
                format=pixels, dst_color_range=2 if pixels.startswith("yuvj") else None
            )
            if "times_ms" in more:
                frame.pts, frame.time_base = more["times_ms"][i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
            if second is not None:
                small = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                container.mux(second.encode(small))
        for other in filter(None, (stream, second)):
            container.mux(other.encode(None))
        if sound is not None:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 16000
            container.mux([*sound.encode(samples), *sound.encode(None)])


def clips_of(path: Path, clip_seconds: float = 1e6) -> list[tuple[int, int, float]]:
    found = survey(path, path.name, clip_seconds, None)
    assert found.fault is None, found
    return [(clip.first, clip.frames, clip.fps) for clip in found.clips]


def test_every_kind_of_file_is_packed_frame_by_frame(tmp_path: Path) -> None:
    """All containers, codecs, depths and ranges, with sound, odd names and links: each frame once, its colours kept."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, codec, pixels in KINDS:
        mux(videos / name, numbered_frames(range(COUNT), 3), codec, pixels)
    mux(videos / "sound.mp4", numbered_frames(range(COUNT), 3), sound=True)
    mux(videos / "two pictures.mkv", numbered_frames(range(COUNT), 3), second=True)
    mux(videos / 'it\'s "1.5" $(x); \N{WAVING HAND SIGN}.mkv', numbered_frames(range(COUNT), 3))
    odd_THWC = np.pad(numbered_frames(range(COUNT), 3), ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    mux(videos / "odd sides.mkv", odd_THWC, "ffv1", "yuv444p")
    elsewhere = tmp_path / "elsewhere.mp4"
    mux(elsewhere, numbered_frames(range(COUNT), 3))
    (videos / "link.mp4").symlink_to(elsewhere)
    report = pack(videos, tmp_path / "out", duplicate_distance=0)
    assert report.skipped == [] and report.record.dropped == {}
    packed = {}
    for split in ("train", "val"):
        index = open_shards(tmp_path / "out", split)
        for i, row in enumerate(index.rows):
            frames_THWC = read_frames(index.read(i, "mp4"))
            assert frame_numbers(frames_THWC) == list(range(COUNT)), row.clip.source
            assert frames_THWC.shape[1:3] == (row.clip.height, row.clip.width) == (HEIGHT_PX, WIDTH_PX)
            stripe = frames_THWC[:, 36:44].mean((1, 2))  # the mean, for GIF paints grey in dots of its few colours
            assert abs(stripe - 100).max() <= 5, (row.clip.source, stripe)
            packed[row.clip.source] = row.clip.fps
    assert packed == dict.fromkeys((path.name for path in videos.iterdir()), 25.0)


def test_turned_and_wide_pixels_are_packed_as_displayed(tmp_path: Path) -> None:
    """A phone's turned video comes upright, and pixels that are twice as wide as high come square, by halving the height."""
    frames_THWC = np.zeros((5, 64, 128, 3), np.uint8)
    frames_THWC[:, :, :64] = np.arange(100, 200, 20, dtype=np.uint8)[:, None, None, None]
    for name, shape in (("turned.mp4", (128, 64)), ("wide.mp4", (32, 128))):
        with av.open(str(tmp_path / name), "w") as container:
            stream: Any = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 64, 128, "yuv420p"
            if name == "turned.mp4":
                stream.set_display_rotation(-90)
            else:
                stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
            for frame_HWC in frames_THWC:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
            container.mux(stream.encode(None))
        clip = survey(tmp_path / name, name, 4.0, None).clips[0]
        assert (clip.height_px, clip.width_px) == shape
        small = next(iter_small(tmp_path / name))
        assert abs(small.luma_HW.shape[1] / small.luma_HW.shape[0] - shape[1] / shape[0]) < 0.1
        upper, lower = small.luma_HW[:48].mean(), small.luma_HW[-48:].mean()
        assert (upper > 80 > 10 > lower) if name == "turned.mp4" else abs(upper - lower) < 5


def test_time_is_even_inside_every_clip(tmp_path: Path) -> None:
    """Where frames are missing the clip ends; each part keeps its own rate, and no frame is made up or lost."""
    steps_ms = [40] * 10 + [200] + [40] * 9 + [120] + [41, 39] * 5
    times_ms = np.cumsum([500, *steps_ms]).tolist()
    path = tmp_path / "gaps.mkv"
    mux(path, numbered_frames(range(len(times_ms))), times_ms=times_ms)
    assert clips_of(path) == [(0, 11, 25.0), (11, 10, 25.0), (21, 11, 25.0)]
    assert [clip.start_s for clip in survey(path, "", 1e6, None).clips] == [0, 0.6, 1.08]
    for first_ms, then_ms in ((20, 50), (50, 20)):  # as where a phone goes to slow motion, and a quarter is dropped
        both = tmp_path / f"{first_ms}.mkv"
        mux(both, numbered_frames(range(30)), times_ms=np.cumsum([0, *[first_ms] * 15, *[then_ms] * 14]).tolist())
        assert clips_of(both) == [(0, 16, 1000 / first_ms), (16, 14, 1000 / then_ms)]
    slow = tmp_path / "slow.mkv"
    mux(slow, numbered_frames(range(12)), times_ms=list(range(0, 1200, 100)))  # though 25 frames/s are announced
    assert clips_of(slow) == [(0, 12, 10.0)]


@pytest.mark.parametrize("codec", ["mjpeg", "mpeg4", "libx264"])
def test_an_avi_keeps_its_order_and_its_gaps(tmp_path: Path, codec: str) -> None:
    """Though it has no display times, B-frames come evenly and in order, and where frames were dropped the clip ends."""
    path, times_25ths = tmp_path / "a.avi", [*range(12), *range(20, 32)]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options={} if codec == "mjpeg" else {"bf": "3"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT_PX, WIDTH_PX, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.color_range = 2 if codec == "mjpeg" else 1
        for frame_HWC, time_25ths in zip(numbered_frames(range(24)), times_25ths, strict=True):
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = time_25ths, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert frame_numbers(np.stack(list(iter_frames(path)))) == list(range(24))
    clips = survey(path, "", 1e6, None).clips
    assert all(clip.fps == 25 for clip in clips) and len(clips) == 2
    if codec == "mjpeg":
        assert [(clip.first, clip.frames, clip.start_s) for clip in clips] == [(0, 12, 0), (12, 12, 0.8)]


def test_every_part_has_the_rate_of_its_own_times(tmp_path: Path) -> None:
    """Where the rate changes too slowly for a break, each clip still says how fast its frames come."""
    steps_ms = [20 + i // 4 for i in range(119)]
    times_s = np.cumsum([0, *steps_ms]) / 1000
    mux(tmp_path / "slower.mkv", numbered_frames(range(120)), times_ms=(1000 * times_s).round().astype(int).tolist())
    clips = survey(tmp_path / "slower.mkv", "", 0.5, None).clips
    assert len(clips) > 5 and clips[0].fps > 1.5 * clips[-1].fps
    for clip in clips:
        part_s = times_s[clip.first : clip.first + clip.frames]
        assert clip.fps == pytest.approx((len(part_s) - 1) / (part_s[-1] - part_s[0]), rel=0.03)


def test_frames_that_lie_in_no_clip_are_counted(tmp_path: Path) -> None:
    """A screen recording whose frames come as they please: each is in a clip or in the count that is shown."""
    videos = tmp_path / "videos"
    videos.mkdir()
    steps_ms = np.random.default_rng(0).choice([17, 33, 50, 67, 83], 79, p=[0.35, 0.25, 0.15, 0.15, 0.1])
    mux(videos / "screen.mkv", numbered_frames(range(80)), times_ms=np.cumsum([0, *steps_ms]).tolist())
    found = survey(videos / "screen.mkv", "", 4.0, None)
    left_out = 80 - sum(clip.frames for clip in found.clips)
    assert 0 < left_out < 80 and f"{left_out} of 80 frames lie in no clip" in (found.fault or "")
    report = pack(videos, tmp_path / "out", min_motion=0, min_sharpness=0)
    assert f"used in part screen.mkv: {left_out} of 80 frames lie in no clip" in report.summary()
    assert "1 used in part, 0 skipped" in report.summary() and report.skipped == []
    assert f"{left_out} of 80 frames lie in no clip" in (tmp_path / "out" / "report.html").read_text()


def test_an_error_that_may_pass_is_not_held_against_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not answer stops the survey; FFmpeg's error is looked at again; a cut file is a fault."""
    path = tmp_path / "a.mkv"
    mux(path, numbered_frames(range(COUNT)))
    whole = survey(path, "", 4.0, None)
    for number in (errno.EIO, errno.ESTALE, errno.ENOMEM):
        with monkeypatch.context() as patch:
            patch.setattr("toolkit.authoring.survey.file_sha256", partial(fail, OSError(number, os.strerror(number))))
            with pytest.raises(UserError, match=rf"a\.mkv: {os.strerror(number)}; .*the same command goes on"):
                survey(path, "", 4.0, None)
        for name in ("probe", "iter_small"):
            real, failures = getattr(toolkit.authoring.survey, name), [VideoError("once")]
            failures[0].__cause__ = av.error.OSError(number, os.strerror(number))
            with monkeypatch.context() as patch:
                patch.setattr(
                    toolkit.authoring.survey, name, lambda path, r=real, f=failures: fail(f.pop()) if f else r(path)
                )
                assert survey(path, "", 4.0, None) == whole and not failures
    cut, faults = tmp_path / "cut.mkv", []
    for keep in range(300, path.stat().st_size, 97):
        cut.write_bytes(path.read_bytes()[:keep])
        faults.append(survey(cut, "", 4.0, None).fault or "")
    assert any("Input/output error" in fault for fault in faults)  # which FFmpeg says though the disk is well
    (tmp_path / "folder.mkv").mkdir()
    assert survey(tmp_path / "folder.mkv", "", 4.0, None).fault == "Is a directory"


def fail(error: Exception, *_: object) -> NoReturn:
    raise error


def test_what_cannot_be_used_is_skipped_with_its_reason(tmp_path: Path) -> None:
    """Nothing, text, a still, one frame, a cut file, a link to nowhere, interlaced: a fault each, and no clip."""
    good = tmp_path / "good.mp4"
    mux(good, numbered_frames(range(COUNT)))
    Image.new("RGB", (64, 64)).save(tmp_path / "still.png")
    os.rename(tmp_path / "still.png", tmp_path / "still.mp4")
    mux(tmp_path / "one.mp4", numbered_frames(range(1)))
    for name, tff in (("woven.ts", 1), ("plain.ts", 0)):
        mux(tmp_path / name, numbered_frames(range(9)), quality={"x264-params": f"tff={tff}"})
    (tmp_path / "both.ts").write_bytes(2 * (tmp_path / "plain.ts").read_bytes() + (tmp_path / "woven.ts").read_bytes())
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mkv").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:900])
    (tmp_path / "nowhere.mp4").symlink_to(tmp_path / "gone.mp4")
    faults = {
        "empty.mp4": "Invalid data", "text.mkv": "Invalid data", "still.mp4": "1 frames", "one.mp4": "has 1 frames",
        "cut.mp4": "", "nowhere.mp4": "No such file", "woven.ts": "is marked as interlaced",
    }  # fmt: skip
    for name, fault in faults.items():
        found = survey(tmp_path / name, name, 4.0, None)
        assert found.clips == () and found.fault is not None and fault in found.fault, (name, found)
        assert str(tmp_path) not in found.fault
    for name in ("plain.ts", "both.ts"):
        assert survey(tmp_path / name, "", 4.0, None).fault is None


@pytest.mark.parametrize("step_px", [(0, 3), (2, 5), (2, 0)])
def test_combs_are_seen_where_nothing_marks_them(tmp_path: Path, step_px: tuple[int, int]) -> None:
    """A moving picture whose odd rows are those of the next frame is passed over.

    Left whole it is not, nor is noise, nor one of fewer rows than interlaced video has, where a few pixels could decide.
    """
    draws = np.random.default_rng(0)
    small_HWC = draws.integers(0, 256, (120, 60, 3), np.uint8)
    texture_HWC = np.asarray(Image.fromarray(small_HWC).resize((240, 480), Image.Resampling.BICUBIC))
    moments = [np.roll(texture_HWC, (i * step_px[0], i * step_px[1]), (0, 1)) for i in range(64)]
    woven = [np.where(np.arange(480)[:, None, None] % 2, second, first) for first, second in pairwise(moments)]
    mux(tmp_path / "whole.mp4", moments)
    mux(tmp_path / "noise.mp4", draws.integers(0, 256, (33, 480, 240, 3), np.uint8))
    mux(tmp_path / "woven.mp4", woven)
    mux(tmp_path / "small.mp4", [frame_HWC[:478] for frame_HWC in woven])
    assert survey(tmp_path / "whole.mp4", "", 4.0, None).fault is None
    assert survey(tmp_path / "noise.mp4", "", 4.0, None).fault is None
    assert survey(tmp_path / "small.mp4", "", 4.0, None).fault is None
    found = survey(tmp_path / "woven.mp4", "", 4.0, None)
    assert (found.fault or "").startswith("shows combs") and found.clips == ()


def test_a_damaged_video_gives_what_stands_before_the_damage(tmp_path: Path) -> None:
    """The clips before it are kept and numbered as ever, and the fault says where it stopped."""
    path = tmp_path / "damaged.mkv"
    mux(path, numbered_frames(range(28)), "mjpeg", "yuvj420p")
    whole = clips_of(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = b"\0" * (len(data) - len(data) // 2)
    path.write_bytes(data)
    found = survey(path, path.name, 1e6, None)
    assert whole[0][:2] == (0, 28) and found.clips[0].first == 0 and 8 < found.clips[0].frames < 20


@pytest.mark.parametrize("name", ["b.mp4", "b.mkv", "b.avi"])
def test_one_damaged_packet_costs_what_refers_to_it(tmp_path: Path, name: str) -> None:
    """Decoding goes on at the next keyframe; no clip spans the loss, no frame is wrong, and the loss is counted."""
    videos = tmp_path / "videos"
    videos.mkdir()
    path = videos / name
    mux(path, numbered_frames(range(100)), "mpeg4" if name == "b.avi" else "libx264", quality={"g": "20", "bf": "2"})
    damage(path, 30)
    pack(videos, tmp_path / "out", clip_seconds=10, holdout=0, min_motion=0, min_sharpness=0, duplicate_distance=0)
    index = open_shards(tmp_path / "out", "train")
    parts = [frame_numbers(read_frames(index.read(i, "mp4"))) for i in range(len(index.rows))]
    assert all(part == list(range(part[0], part[-1] + 1)) for part in parts)
    lost = sorted(set(range(100)) - set(sum(parts, [])))
    assert lost == list(range(lost[0], lost[-1] + 1)) and 25 <= lost[0] <= 31 and lost[-1] < 40
    for part, row in zip(parts, index.rows, strict=True):
        # The B-frames before the next keyframe are lost too, which an AVI's times do not show.
        assert row.clip.start_s == pytest.approx(part[0] / 25, abs=0.1 if name == "b.avi" else 0.001)
    assert survey(path, "", 10, None).fault == f"{len(lost)} of 100 frames do not decode"


@pytest.mark.parametrize(("codec", "damaged"), [("libx264", 47), ("libx264", 48), ("libx264", 60), ("mpeg4", 47)])
def test_damage_that_the_decoder_conceals_is_in_no_clip(tmp_path: Path, codec: str, damaged: int) -> None:
    """A packet of which the last quarter is lost decodes with made-up blocks: each frame that shows them is left out, and
    counted, those before and after are kept."""
    path = tmp_path / "a.mkv"
    noise_HWC = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    texture_HWC = np.asarray(Image.fromarray(noise_HWC).resize((240, 160), Image.Resampling.BICUBIC))
    frames = (np.roll(texture_HWC, (2 * i, 3 * i), (0, 1)) for i in range(100))
    mux(path, frames, codec, quality={"g": "20", "bf": "2", "sc_threshold": "0"})
    whole_THWC = np.stack(list(iter_frames(path))).astype(int)
    assert clips_of(path) == [(0, 100, 25.0)]
    damage(path, damaged, part=0.25)
    changes = np.abs(np.stack(list(iter_frames(path))) - whole_THWC).mean((1, 2, 3))
    found = survey(path, "", 1e6, None)
    kept = {clip.first + i for clip in found.clips for i in range(clip.frames)}
    assert changes.max() > 2 and max(changes[list(kept)]) < 0.5
    assert kept >= {*range(40), *range(80, 100)} and len(found.clips) == 2
    assert found.fault == f"{100 - len(kept)} of 100 frames are damaged, or refer to ones that are"


def test_a_loss_that_time_does_not_show_or_that_never_ends_is_said(tmp_path: Path) -> None:
    """A clip ends where one frame is lost, also where times are too coarse to tell; without a keyframe it is the end."""
    one, rest = tmp_path / "one.avi", tmp_path / "rest.mkv"
    mux(one, numbered_frames(range(20)), "mjpeg", "yuvj420p")
    mux(rest, numbered_frames(range(30)), quality={"g": "99", "bf": "0", "sc_threshold": "0"})
    for path in (one, rest):
        damage(path, 10)
    found = survey(one, "", 10, None)
    assert [(clip.first, clip.frames) for clip in found.clips] == [(0, 10), (10, 9)]
    assert found.fault == "1 of 20 frames do not decode"
    found = survey(rest, "", 10, None)
    assert [(clip.first, clip.frames) for clip in found.clips] == [(0, 10)]
    assert (
        found.fault == "stopped after 0.4 of 1.2 s, where it does not decode: Invalid data found when processing input"
    )


def test_a_shard_is_not_read_past_damage(tmp_path: Path) -> None:
    """Frames that a file without one packet has give an error where a shard's bytes are read."""
    path = tmp_path / "a.mkv"
    mux(path, numbered_frames(range(9)), quality={"g": "1"})
    damage(path, 4)
    assert frame_numbers(np.stack(list(iter_frames(path)))) == [0, 1, 2, 3, 5, 6, 7, 8]
    with pytest.raises(VideoError, match="Invalid data"):
        list(iter_frames(path.read_bytes(), extension="mkv"))


def damage(path: Path, number: int, part: float = 1) -> None:
    """Overwrite the last part of one packet, counted as they decode."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
    data = bytearray(path.read_bytes())
    end = data.index(bytes(packet), packet.pos) + packet.size
    size_bytes = int(part * packet.size)
    data[end - size_bytes : end] = b"\xff" * size_bytes
    path.write_bytes(data)


def test_scores_are_their_formulas(tmp_path: Path) -> None:
    """Motion is 4 x the mean luma change per second, between 1 and 255; brightness the mean luma."""
    assert motion_score([2, 2, 2], 10) == 80 and motion_score([0, 0], 25) == 1 and motion_score([99], 25) == 255
    levels = [100, 102, 100, 102, 104, 102]
    frames_THWC = np.stack([np.full((64, 96, 3), level, np.uint8) for level in levels])
    write_video(tmp_path / "grey.mp4", frames_THWC, 10, crf=1)
    clip = survey(tmp_path / "grey.mp4", "", 4.0, None).clips[0]
    assert clip.motion == pytest.approx(80, abs=8) and clip.brightness == pytest.approx(np.mean(levels), abs=1)


def test_a_clip_of_a_long_video_is_judged_by_itself() -> None:
    """What is kept of each frame is read where the clip lies, and not from end to end for each of thousands of clips."""

    def seconds(frames: int) -> float:
        watch = Watch(io.BytesIO())
        picture = SmallFrame(0.0, False, False, True, False, False, 8, 8, np.zeros((128, 128), np.uint8),
                             np.zeros((2, 64, 64), np.uint8), np.eye(8, dtype=np.uint8), None)  # fmt: skip
        for number in range(64):
            watch.add(replace(picture, time_s=number / 30, detail_HW=picture.detail_HW if number % 8 == 0 else None))
        expected = watch.clip(30, 40, 30.0, None)
        for name in ("times_s", "sizes_px", "jumps", "changes", "brightness", "blocks"):
            setattr(watch, name, getattr(watch, name) * (frames // 64))
        watch.sharpness = dict.fromkeys(range(0, frames, 8), watch.sharpness[0])
        start_s = time.process_time()
        assert all(watch.clip(30, 40, 30.0, None) == expected for _ in range(20))
        return time.process_time() - start_s

    assert seconds(640_000) < 4 * seconds(64) + 0.05


def test_pictures_show_first_middle_and_last(tmp_path: Path) -> None:
    """One JPEG, 96 px high, whose three parts show the frames of those numbers, in colour."""
    colours = np.zeros((21, 48, 64, 3), np.uint8)
    colours[:10, ..., 0], colours[10, ..., 1], colours[11:, ..., 2] = 200, 200, 200
    write_video(tmp_path / "colours.mp4", colours, 25)
    (clip,) = survey(tmp_path / "colours.mp4", "", 1e6, None).clips  # one, for a flash is no cut
    strip_HWC = np.asarray(Image.open(io.BytesIO(clip.picture)))
    assert strip_HWC.shape[0] == 96 and abs(strip_HWC.shape[1] - 3 * 128) <= 6
    shown = [part.mean((0, 1)) for part in np.array_split(strip_HWC, 3, axis=1)]
    assert [part.argmax() for part in shown] == [0, 1, 2] and all(part.max() > 150 for part in shown)


def test_a_survey_depends_on_nothing_but_the_video(tmp_path: Path) -> None:
    """Twice the same, under any path."""
    mux(tmp_path / "a.mp4", numbered_frames(range(COUNT)))
    os.link(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert survey(tmp_path / "a.mp4", "x", 0.5, 0.2) == survey(tmp_path / "b.mp4", "x", 0.5, 0.2)
