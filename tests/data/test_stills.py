"""Every picture a user may have is read as it is seen, or refused in a sentence. Run: pytest tests/data/test_stills.py"""

import struct
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.data.conftest import frame_numbers, numbered_frames
from toolkit.data.clips import resize_cover
from toolkit.data.stills import read_still, read_stills, to_rgb
from toolkit.errors import UserError

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
RGB = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
def test_opaque_pictures_are_what_pillow_shows(tmp_path: Path, mode: str) -> None:
    """Colour, grey, palette, black and white, print colours."""
    image = Image.fromarray(RGB).convert(mode)
    image.save(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    file = next(tmp_path.iterdir())
    assert np.array_equal(read_still(str(file)), np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_lie_on_white(tmp_path: Path, mode: str) -> None:
    """What is hidden by transparency stays hidden, as every viewer shows it; half of it is half seen."""
    alpha = np.full((16, 16), 255, np.uint8)
    alpha[:8], alpha[8:12] = 0, 128
    if mode == "P":
        image = Image.fromarray(np.where(GREY < 128, 0, 1).astype(np.uint8), "P")
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.save(tmp_path / "x.png", transparency=0)
        assert (read_still(str(tmp_path / "x.png"))[GREY < 128] == 255).all()
        return
    Image.fromarray(np.dstack([RGB, alpha])).convert(mode).save(tmp_path / "x.png")
    still, opaque = read_still(str(tmp_path / "x.png")), Image.fromarray(RGB).convert(mode[:-1]).convert("RGB")
    assert (still[:8] == 255).all() and np.array_equal(still[12:], np.asarray(opaque)[12:])
    half = (np.asarray(opaque)[8:12].astype(int) * 128 + 255 * 127) / 255
    assert np.abs(still[8:12] - half).max() <= 1


@pytest.mark.parametrize("image", [Image.fromarray(GREY.astype(np.uint16) * 257), Image.fromarray(GREY / 255)], ids=str)
def test_deep_pictures_are_refused(tmp_path: Path, image: Image.Image) -> None:
    """16 bits and floats: Pillow would cut them off at 255, which makes them white or black."""
    image = image if image.mode != "F" else image.convert("F")
    image.save(tmp_path / "x.tif")
    with pytest.raises(
        UserError, match=r"cannot read .*x\.tif as a picture: its pixels have more than 8 bits .mode [IF]"
    ):
        read_still(str(tmp_path / "x.tif"))
    with pytest.raises(ValueError, match="more than 8 bits"):
        to_rgb(image)


def test_turned_pictures_are_upright(tmp_path: Path) -> None:
    """Phones store how they were held."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise
    Image.fromarray(RGB[:8]).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_still(str(tmp_path / "x.png")), np.rot90(RGB[:8], -1))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_a_phone_are_shown_as_a_film_shows_them(tmp_path: Path, mode: str) -> None:
    """Display P3 has its red further out: what it calls (200, 60, 50) is (219, 37, 34) in sRGB; no profile is sRGB."""
    profiles = {"p3": display_p3(), "none": None, "other": b"words"}
    for name, profile in profiles.items():
        Image.new(mode, (4, 4), (200, 60, 50)).save(tmp_path / f"{name}.png", icc_profile=profile)
    made = {name: read_still(str(tmp_path / f"{name}.png"))[0, 0].tolist() for name in profiles}
    assert made == {"p3": [219, 37, 34], "none": [200, 60, 50], "other": [200, 60, 50]}


def display_p3() -> bytes:
    """The smallest ICC profile of it: its primaries adapted to D50, and a gamma of 2.2."""

    def number(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(65536 * value)) for value in values)

    white = 0.9642, 1.0, 0.8249
    places = {b"rXYZ": (0.5151, 0.2412, -0.0011), b"gXYZ": (0.292, 0.6922, 0.0419), b"bXYZ": (0.1571, 0.0666, 0.7841)}
    tags = {name: b"XYZ \0\0\0\0" + number(*place) for name, place in (places | {b"wtpt": white}).items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), struct.pack(">4s4xIHxx", b"curv", 1, round(2.2 * 256)))
    tags |= {b"desc": struct.pack(">4s4xI11s79x", b"desc", 11, b"Display P3"), b"cprt": b"text\0\0\0\0none"}
    table, data, begin = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        padded = tag.ljust(-(-len(tag) // 4) * 4, b"\0")
        table += struct.pack(">4sII", name, begin + len(data), len(tag))
        data += padded
    kinds = b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"acsp"
    head = struct.pack(">I4sI4s4s4s12x4s28x", begin + len(data), *kinds) + number(*white)
    return head.ljust(128, b"\0") + table + data


STRANGE = struct.pack("<4s19II44x", b"DDS ", 124, 0, 4, 4, *[0] * 14, 32, 131)  # a pixel format that nobody has


@pytest.mark.parametrize(
    "content", [b"", b"words", b"P6 x y 255\n", STRANGE, None], ids=["empty", "text", "bare", "strange", "folder"]
)
def test_what_is_no_picture_is_a_sentence(tmp_path: Path, content: bytes | None) -> None:
    """An empty file, text, headers without numbers and of no known kind, a folder, and nothing at all."""
    path = tmp_path / "x.ppm"
    path.mkdir() if content is None else path.write_bytes(content)
    for place in (path, tmp_path / "nowhere.png"):
        with pytest.raises(UserError, match=f"cannot read {place} as a picture: .+; give a PNG or JPEG of 8 bits"):
            read_still(str(place))


@given(st.sampled_from(["PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM"]), st.data())
def test_damaged_pictures_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, kind: str, data: Any) -> None:
    """Cut or with a wrong byte anywhere: a picture or a UserError, never another exception."""
    path = tmp_path_factory.getbasetemp() / "damaged"
    Image.fromarray(RGB).save(path, kind)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert read_still(str(path)).shape[2] == 3
    except UserError as error:
        assert "as a picture" in str(error)


def test_stills_of_one_video_have_one_size(tmp_path: Path) -> None:
    """Two sizes are both named."""
    for i, height in enumerate((16, 16, 8)):
        Image.fromarray(RGB[:height]).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    assert np.array_equal(read_stills(paths[:2], 16, 16).cut_NHWC, [RGB, RGB])
    wide = read_stills(paths[:2], 8, 16)
    assert wide.cut_NHWC.shape == (2, 8, 16, 3) and wide[1:3] == ((16, 16), None)
    with pytest.raises(UserError, match="different sizes, 16x16 and 16x8"):
        read_stills(paths, 16, 16)


def film(
    path: Path, frames_THWC: np.ndarray, aspect: Fraction = Fraction(1), times: Iterable[int] | None = None
) -> str:
    """Write a video with what its kind of file usually holds, B-frames in most.

    aspect  width of a pixel to its height
    times   of the frames, in 25ths of a second
    """
    codec = {".webm": "libvpx-vp9", ".avi": "mpeg4", ".mpg": "mpeg1video"}.get(path.suffix, "libx264")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options={"bf": "2"} if codec == "mpeg4" else {})
        stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for time, frame_HWC in zip(times or range(len(frames_THWC)), frames_THWC, strict=True):
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


@pytest.mark.parametrize("extension", ["mp4", "mkv", "webm", "avi", "mpg", "ts"])
def test_a_video_at_an_end_gives_its_frame_beside_the_gap(tmp_path: Path, extension: str) -> None:
    """The last frame of the one before, the first of the one after; a picture between them is itself."""
    before, after = (film(tmp_path / f"{n}.{extension}", numbered_frames(range(n, n + 40))) for n in (3, 90))
    Image.fromarray(numbered_frames([7])[0]).save(tmp_path / "between.png")
    stills = read_stills([before, str(tmp_path / "between.png"), after], 48, 64)
    assert frame_numbers(stills.cut_NHWC) == [42, 7, 90] and stills.fps is None


@pytest.mark.parametrize("extension", ["mp4", "avi"])
def test_a_video_alone_gives_all_its_frames(tmp_path: Path, extension: str) -> None:
    """In order, cut as pictures are, with its rate."""
    path = film(tmp_path / f"a.{extension}", numbered_frames(range(5, 25)))
    stills = read_stills([path], 48, 64)
    assert frame_numbers(stills.cut_NHWC) == list(range(5, 25)) and stills[1:] == ((48, 64), 25, 0)
    square = read_stills([path], 24, 24)
    assert np.array_equal(square.cut_NHWC, resize_cover(stills.cut_NHWC, 24, 24)) and square[1:] == ((48, 64), 25, 0)


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_a_video_of_uneven_frames_is_as_long_as_it_was(tmp_path: Path, extension: str) -> None:
    """A recording of a screen, which waits where nothing changes: an MKV says 25 frames a second of it all the same."""
    times = [0, 1, 2, 3, 40, 41, 42, 43, 44, 100]
    stills = read_stills([film(tmp_path / f"a.{extension}", numbered_frames(range(10)), times=times)], 48, 64)
    assert frame_numbers(stills.cut_NHWC) == list(range(10)) and stills.uneven > 1
    assert stills.fps == pytest.approx(9 / (100 / 25), rel=1e-3)


def test_videos_are_seen_as_players_show_them(tmp_path: Path) -> None:
    """Pixels that are twice as wide as high, in a frame at an end and in all."""
    path = film(tmp_path / "wide.mp4", numbered_frames(range(5)), Fraction(2))
    ends = read_stills([path, path], 48, 128)
    assert ends.source_px == read_stills([path], 48, 128).source_px == (24, 64)
    assert frame_numbers(ends.cut_NHWC) == [4, 0]


def test_a_video_with_a_hole_is_not_filled(tmp_path: Path) -> None:
    """As if nothing were missing; the frames at its ends are there all the same."""
    path = Path(film(tmp_path / "a.mp4", numbered_frames(range(60))))
    content = bytearray(path.read_bytes())
    hole = int(len(content) * 0.3)
    path.write_bytes(content[:hole] + b"\xff" * 100 + content[hole + 100 :])
    with pytest.raises(UserError, match=r"cannot read .*a\.mp4: \d+ of 60 frames decode; give a video that plays"):
        read_stills([str(path)], 48, 64)
    assert frame_numbers(read_stills([str(path), str(path)], 48, 64).cut_NHWC) == [59, 0]
