"""Reads pictures as users have them into upright sRGB: rotated, of wide gamut, transparent, or the end of a video.

Test: pytest tests/data/test_stills.py
"""

import io
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from toolkit.data.clips import resize_cover
from toolkit.data.shots import find_breaks, rate_of
from toolkit.data.sources import SOURCE_EXTENSIONS
from toolkit.data.video import VideoError, iter_frames, probe
from toolkit.errors import UserError, in_one_line

VIDEOS = {*SOURCE_EXTENSIONS} - {".gif"}  # which is a picture to most
CUT_OFF = 25  # frames that a video which was cut off may lack
MOST_FRAMES = 5000  # of a video that is filled: they are kept in memory, and take hours


class Stills(NamedTuple):
    """Stills as the network sees them, and what they were."""

    cut_NHWC: np.ndarray  # uint8
    source_px: tuple[int, int]  # height and width
    fps: float | None = None  # of the video that they are all frames of
    uneven: int = 0  # frames of it that do not follow the one before as those before did


def read_stills(paths: Sequence[str], height_px: int, width_px: int) -> Stills:
    """Read pictures of one size, scaled and cropped to height x width.

    A video in the first place gives its last frame, one in the last place its first: what is between goes from where one
    stops to where the other starts. A video alone gives all its frames.
    """
    if len(paths) == 1 and is_video(paths[0]):
        return read_all(paths[0], height_px, width_px)
    cut, sizes = [], {}
    for number, path in enumerate(paths):
        if not is_video(path):
            still_HWC = read_still(path)
        elif number in (0, len(paths) - 1):
            still_HWC = read_end(path, last=number == 0)
        else:
            raise UserError(
                f"{path} is a video between other stills; only the first and the last may be one, so give a picture"
            )
        cut.append(resize_cover(still_HWC[None], height_px, width_px)[0])
        sizes[size_of(still_HWC)] = f"{still_HWC.shape[1]}x{still_HWC.shape[0]}"
    if len(sizes) > 1:
        raise UserError(f"the stills have different sizes, {' and '.join(sizes.values())}; give pictures of one size")
    return Stills(np.stack(cut), next(iter(sizes)))


def size_of(frame_HWC: np.ndarray) -> tuple[int, int]:
    height, width, _ = frame_HWC.shape
    return height, width


def is_video(path: str) -> bool:
    return Path(path).suffix.lower() in VIDEOS


def read_all(path: str, height_px: int, width_px: int) -> Stills:
    """Read all frames of a video, scaled and cropped as they come."""
    place, cut, sizes = os.path.expanduser(path), [], []
    try:
        facts = probe(place)
        if not 2 <= facts.frames <= MOST_FRAMES:
            raise UserError(
                f"{path} has {facts.frames:,} frames; a video to be filled has 2 to {MOST_FRAMES:,}, so cut it"
            )
        for frame_HWC in iter_frames(place):
            sizes.append(size_of(frame_HWC))
            cut.append(resize_cover(frame_HWC[None], height_px, width_px)[0])
        if len(cut) < facts.frames:
            raise VideoError(f"{len(cut)} of {facts.frames} frames decode")
    except (OSError, VideoError) as error:
        raise UserError(f"cannot read {path}: {in_one_line(error)}; give a video that plays from end to end") from None
    times_s = np.array(facts.times_s)
    fps = rate_of(times_s, facts.fps, facts.tick_s)  # what a file says of itself may be that of a part
    return Stills(np.stack(cut), sizes[0], fps, len(find_breaks(times_s, facts.tick_s)))


def read_still(path: str) -> np.ndarray:
    """Read a picture as uint8 (H, W, 3)."""
    try:
        with Image.open(os.path.expanduser(path)) as image:
            return to_rgb(image)
    # Pillow's readers of damaged files raise what they like
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise UserError(
            f"cannot read {path} as a picture: {in_one_line(error)}; give a PNG or JPEG of 8 bits"
        ) from None


def read_end(path: str, last: bool) -> np.ndarray:
    """Read the last frame of a video, or the first, as uint8 (H, W, 3)."""
    place = os.path.expanduser(path)
    try:
        count = probe(place).frames
        # some before the last one too, for where that one does not decode; not all, since to convert them takes longest
        ends = deque(iter_frames(place, range(count)[-CUT_OFF:]), 1) if last else [next(iter_frames(place))]
        if not ends:
            raise VideoError(f"its last {CUT_OFF} frames do not decode")
        return ends[0]
    except (OSError, VideoError) as error:
        end = "last" if last else "first"
        raise UserError(f"cannot read the {end} frame of {path}: {in_one_line(error)}; give it as a picture") from None


def to_rgb(image: Image.Image) -> np.ndarray:
    """A picture upright, in sRGB, on white where it is transparent, uint8 (H, W, 3).

    raises  ValueError where it has more than 8 bits
    """
    if image.mode.startswith(("I", "F")):  # converted, these are cut off at 255, not scaled
        raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
    upright = ImageOps.exif_transpose(image)
    seen = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    if profile := image.info.get("icc_profile"):
        # one of grey or print colours, or a damaged one, most viewers pass over too
        with suppress(ImageCms.PyCMSError, OSError):
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            ImageCms.profileToProfile(seen, own, ImageCms.createProfile("sRGB"), inPlace=True)
    if seen.mode == "RGBA":
        seen = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return np.asarray(seen.convert("RGB"))
