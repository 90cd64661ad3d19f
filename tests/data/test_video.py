"""Frames come back exactly, upright and by number. Run: pytest tests/data/test_video.py"""

import io
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from tests.data.conftest import encode, frame_numbers, numbered_frames
from toolkit.authoring.small import iter_small
from toolkit.data import video
from toolkit.data.video import VideoError, iter_frames, probe, read_frames, write_gif, write_video


@pytest.mark.parametrize("gop", [1, 2, 3, 12, 250])
def test_seek_is_frame_exact(gop: int) -> None:
    """Any window of any stride returns the frames of those numbers, for short and long GOPs with B-frames."""
    data = encode(numbered_frames(range(80)), gop=gop)
    draws = np.random.default_rng(gop)
    for _ in range(12):
        stride = int(draws.integers(1, 5))
        start = int(draws.integers(0, 80 - 4 * stride))
        wanted = list(range(start, start + 4 * stride, stride))
        assert frame_numbers(read_frames(data, wanted, "mp4")) == wanted
    assert frame_numbers(read_frames(data, [79], "mp4")) == [79]


def test_variable_rate_is_frame_exact() -> None:
    """Frames are numbered in display order even where their spacing varies."""
    buffer, frames_THWC = io.BytesIO(), numbered_frames(range(40))
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=30, options={"threads": "1"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame_HWC in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            frame.pts, frame.time_base = 500 + 33 * i + 7 * (i % 3), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert frame_numbers(read_frames(buffer.getvalue(), [3, 17, 18, 39], "mkv")) == [3, 17, 18, 39]


def test_colours_survive() -> None:
    """A flat colour comes back within 2 of 255 in each channel."""
    for colour in ([255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128], [255, 255, 255], [200, 120, 40]):
        frames_THWC = np.zeros((3, 32, 32, 3), np.uint8) + np.array(colour, np.uint8)
        assert np.abs(read_frames(encode(frames_THWC)).astype(int) - colour).max() <= 2


@pytest.mark.parametrize("transfer", ["hlg", "pq", "sdr"])
def test_wide_colours_come_out_as_the_standards_say(tmp_path: Path, transfer: str) -> None:
    """BT.2020 in HLG, PQ or SDR: what BT.709 can show is the light of BT.2100 in float64, what is brighter is white."""
    ladder = np.linspace(0.3, 0.57, 7) if transfer == "pq" else np.linspace(0.1, 0.7, 7)
    grid_NC = np.stack(np.meshgrid(ladder, ladder, ladder), -1).reshape(-1, 3)
    whites_NC = np.repeat(np.linspace(0.8, 1, 7), 3).reshape(-1, 3)
    planes_CHW, signal_HWC = as_ten_bits(np.concatenate([grid_NC, whites_NC]).reshape(14, 25, 3))
    path, side_px = tmp_path / "wide.mkv", 16
    tags = {"color_trc": {"hlg": 18, "pq": 16, "sdr": 14}[transfer], "color_primaries": 9, "colorspace": 9}
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx265", rate=25, options={"x265-params": "lossless=1:log-level=none"})
        stream.height, stream.width, stream.pix_fmt = 14 * side_px, 25 * side_px, "yuv420p10le"
        for _ in range(3):
            frame = av.VideoFrame(stream.width, stream.height, stream.pix_fmt)
            for plane, values_HW in zip(frame.planes, planes_CHW, strict=True):
                times = plane.height // 14
                rows_HW = values_HW.repeat(times, 0).repeat(times, 1)
                padded_HW = np.pad(rows_HW, ((0, 0), (0, plane.line_size // 2 - plane.width)))
                plane.update(padded_HW.astype("<u2").tobytes())
            for name, value in (tags | {"color_range": 1}).items():
                setattr(frame, name, value)
                setattr(stream.codec_context, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    shown_HWC = read_frames(path)[0]
    light_HWC = light_in_bt709(signal_HWC, transfer)
    blocks_HWC = shown_HWC[side_px // 2 :: side_px, side_px // 2 :: side_px]
    is_inside_HW = ((light_HWC > 0.01) & (light_HWC < 1)).all(2)
    gaps_NC = np.abs(blocks_HWC[is_inside_HW] - 255 * light_HWC[is_inside_HW] ** (1 / 2.4))
    assert len(gaps_NC) > 100 and gaps_NC.mean() < 1 and np.percentile(gaps_NC, 98) < 5
    if transfer != "sdr":
        assert blocks_HWC.reshape(-1, 3)[-7:].min() >= 253
    small = next(iter_small(path))  # what is judged is the same picture
    planes = [small.luma_HW, *(plane_HW.repeat(2, 0).repeat(2, 1) for plane_HW in small.chroma_CHW)]
    judged_HWC = np.asarray(Image.merge("YCbCr", [Image.fromarray(plane_HW) for plane_HW in planes]).convert("RGB"))
    assert np.abs(judged_HWC.mean((0, 1)) - shown_HWC.mean((0, 1))).max() < 2


@pytest.mark.parametrize(
    ("size_px", "matrix"), [((576, 1024), 5), ((720, 1280), 1), ((1280, 720), 1), ((480, 1280), 1), ((578, 64), 1)]
)
def test_where_no_matrix_is_said_the_size_decides_as_in_players(
    tmp_path: Path, size_px: tuple[int, int], matrix: int
) -> None:
    """Colours written by BT.709 from 1280 x 720 on, by BT.601 below, and not tagged, come back; a tag counts for more."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 40]], np.uint8)
    frame_HWC = colours.repeat(size_px[1] // 4, 0)[None].repeat(size_px[0], 0)
    for tag in (2, 1, 5):
        path = tmp_path / f"{tag}.mkv"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "1"})
            stream.height, stream.width, stream.pix_fmt = *size_px, "yuv444p"
            stream.codec_context.colorspace = tag
            source = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            container.mux(stream.encode(source.reformat(format="yuv444p", dst_colorspace=matrix if tag == 2 else tag)))
            container.mux(stream.encode(None))
        with av.open(str(path)) as container:
            assert next(container.decode(video=0)).colorspace == tag
        shown_HWC = read_frames(path)[0][size_px[0] // 2, size_px[1] // 8 :: size_px[1] // 4]
        assert np.abs(shown_HWC.astype(int) - colours).max() <= 3


def as_ten_bits(colours_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours of 0 to 1 as BT.2020's luma and chromas in 10 bits, and what these say exactly."""
    red, blue = 0.2627, 0.0593
    luma = colours_HWC @ [red, 1 - red - blue, blue]
    chromas = (colours_HWC[..., 2] - luma) / (2 - 2 * blue), (colours_HWC[..., 0] - luma) / (2 - 2 * red)
    planes_CHW = np.stack([876 * luma + 64, *(896 * chroma + 512 for chroma in chromas)]).round()
    luma, u, v = (planes_CHW[0] - 64) / 876, (planes_CHW[1] - 512) / 896, (planes_CHW[2] - 512) / 896
    r, b = luma + (2 - 2 * red) * v, luma + (2 - 2 * blue) * u
    return planes_CHW, np.stack([r, (luma - red * r - blue * b) / (1 - red - blue), b], -1).clip(0, 1)


def light_in_bt709(signal_HWC: np.ndarray, transfer: str) -> np.ndarray:
    """Light of BT.2020 signals by BT.2100's tables 4 and 5 (or BT.1886), in BT.709's primaries (BT.2087); 1 is white."""
    if transfer == "hlg":
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(signal_HWC <= 0.5, signal_HWC**2 / 3, (np.exp((signal_HWC - c) / a) + b) / 12)
        light = 1000 / 203 * (scene @ [0.2627, 0.678, 0.0593])[..., None] ** 0.2 * scene
    elif transfer == "pq":
        power = signal_HWC ** (32 / 2523)
        light = 10000 / 203 * (np.maximum(power - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * power)) ** (8192 / 1305)
    else:
        light = signal_HWC**2.4
    to_bt709 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    return light @ np.array(to_bt709).T


def test_same_frames_give_same_bytes_and_odd_sides_lose_one() -> None:
    """Encoding is deterministic, and 4:2:0 drops an odd last row and column."""
    frames_THWC = numbered_frames(range(5))[:, :47, :63]
    assert encode(frames_THWC) == encode(frames_THWC)
    assert read_frames(encode(frames_THWC)).shape == (5, 46, 62, 3)


def test_rotation_is_applied(tmp_path: Path) -> None:
    """A video marked as turned, as phones do, comes out upright, and the probe tells the upright size."""
    frames_THWC = np.zeros((3, 32, 64, 3), np.uint8)
    frames_THWC[:, :, :32] = 255  # left half white
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        stream.set_display_rotation(-90)  # clockwise
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    facts, upright_THWC = probe(path), read_frames(path)
    assert (facts.height_px, facts.width_px) == upright_THWC.shape[1:3] == (64, 32)
    assert upright_THWC[0, :30].min() > 200 and upright_THWC[0, 34:].max() < 50  # left became top


@pytest.mark.parametrize(
    ("matrix", "place"),
    [
        ((1, 0, 0, 1), lambda a: a),
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
        ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda a: np.rot90(a, 2).swapaxes(0, 1)),
    ],
)
def test_every_display_matrix_is_applied(
    tmp_path: Path, matrix: tuple[int, ...], place: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Turned, mirrored or both, a frame is what numpy makes of it, and what is judged is the same picture."""
    frame_HWC = np.zeros((64, 128, 3), np.uint8)
    frame_HWC[:32, :64], frame_HWC[:32, 64:], frame_HWC[32:, :64] = (200, 20, 20), (20, 200, 20), (20, 20, 200)
    data = bytearray(encode(frame_HWC[None].repeat(3, 0)))
    at = data.find(b"tkhd") + 44
    assert struct.unpack_from(">9i", data, at) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    wanted_HWC = place(frame_HWC)
    shown_HWC = read_frames(path)[0]
    assert shown_HWC.shape == wanted_HWC.shape
    assert np.abs(shown_HWC.astype(int) - wanted_HWC).mean() < 3
    small = next(iter_small(path))
    planes = [small.luma_HW, *(plane_HW.repeat(2, 0).repeat(2, 1) for plane_HW in small.chroma_CHW)]
    small_image = Image.merge("YCbCr", [Image.fromarray(np.ascontiguousarray(plane_HW)) for plane_HW in planes])
    judged_HWC = np.asarray(small_image.convert("RGB").resize(wanted_HWC.shape[1::-1]))
    assert np.abs(judged_HWC.astype(int) - wanted_HWC).mean() < 15


def test_streaming_equals_reading_and_avi_reads(tmp_path: Path) -> None:
    """iter_frames yields what read_frames returns; an AVI, which has no display times, streams too."""
    path = tmp_path / "a.mp4"
    assert write_video(path, (frame_HWC for frame_HWC in numbered_frames(range(9))), 25) == 9
    assert np.array_equal(np.stack(list(iter_frames(path))), read_frames(path))
    with av.open(str(tmp_path / "b.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame_HWC in numbered_frames(range(9)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    assert probe(tmp_path / "b.avi").frames == 9
    assert frame_numbers(np.stack(list(iter_frames(tmp_path / "b.avi")))) == list(range(9))


def test_errors_name_the_file(tmp_path: Path) -> None:
    """A file that is no video, is missing, or is cut is a VideoError naming it."""
    text, cut = tmp_path / "text.mp4", tmp_path / "cut.mp4"
    text.write_text("no video at all")
    cut.write_bytes(encode(numbered_frames(range(30)))[:1000])
    for path in (text, cut, tmp_path / "missing.mp4"):
        with pytest.raises(VideoError, match=path.name):
            probe(path)
    with pytest.raises(VideoError, match="of a video of 5"):
        read_frames(encode(numbered_frames(range(5))), [3, 7])


def test_limits_hold_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many pixels or frames, a codec outside the list, or another container in a shard's bytes are refused."""
    data = encode(numbered_frames(range(30)))
    with pytest.raises(VideoError):
        read_frames(data, [0], "mkv")
    monkeypatch.setattr(video, "CODECS", ("ffv1",))
    with pytest.raises(VideoError, match="codec h264"):
        read_frames(data, [0], "mp4")
    monkeypatch.setattr(video, "MAX_FRAMES", 29)
    with pytest.raises(VideoError, match="over 29 frames"):
        read_frames(data, [0], "mp4")
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(VideoError, match="64 x 48"):
        read_frames(data, [0])


@pytest.mark.parametrize("fps", [7, 24, 29.97, 40, 50])
def test_an_animation_lasts_as_long_as_its_frames(fps: float) -> None:
    """To a hundredth of a second, which is what a GIF counts in: at 40 frames a second they last 2 and 3 of them."""
    target = io.BytesIO()
    write_gif(target, np.random.default_rng(0).integers(0, 256, (81, 4, 4, 3), np.uint8), fps)
    with Image.open(target) as image:
        lasts_ms = [shown.info["duration"] for shown in ImageSequence.Iterator(image)]
    assert len(lasts_ms) == 81 and abs(sum(lasts_ms) - 81_000 / fps) <= 5 and min(lasts_ms) >= 20
