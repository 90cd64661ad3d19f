"""Pictures as a user has them, to RGB: phones turn them, editors make them transparent, cameras store 16 bits, or a film.

Test: pytest tests/data/test_stills.py
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from toolkit.data.sources import SOURCE_EXTENSIONS
from toolkit.data.video import VideoError, probe, read_frames
from toolkit.errors import UserError, in_one_line

VIDEOS = {*SOURCE_EXTENSIONS} - {".gif"}  # which is a picture to most


def read_stills(paths: Sequence[str]) -> np.ndarray:
    """Read pictures of one size as uint8 (N, H, W, 3).

    A video in the first place gives its last frame, one in the last place its first: what is between goes from where one
    stops to where the other starts.
    """
    stills = []
    for number, path in enumerate(paths):
        if Path(path).suffix.lower() not in VIDEOS:
            stills.append(read_still(path))
        elif number in (0, len(paths) - 1):
            stills.append(read_end(path, number == 0))
        else:
            raise UserError(
                f"{path} is a video between other stills; only the first and the last may be one, so give a picture"
            )
    sizes = {f"{s.shape[1]}x{s.shape[0]}": None for s in stills}
    if len(sizes) > 1:
        raise UserError(f"the stills have different sizes, {' and '.join(sizes)}; give pictures of one size")
    return np.stack(stills)


def read_still(path: str) -> np.ndarray:
    """Read a picture as uint8 (H, W, 3)."""
    try:
        with Image.open(os.path.expanduser(path)) as image:
            return to_rgb(image)
    # Pillow's readers of damaged files raise what they like
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {path} as a picture: {in_one_line(error)}; give an 8-bit picture") from None


def read_end(path: str, last: bool) -> np.ndarray:
    """Read the last frame of a video, or the first, as uint8 (H, W, 3)."""
    try:
        place = os.path.expanduser(path)
        return read_frames(place, [probe(place).frames - 1 if last else 0])[0]
    except (OSError, VideoError) as error:
        end = "last" if last else "first"
        raise UserError(f"cannot read the {end} frame of {path}: {in_one_line(error)}; give it as a picture") from None


def to_rgb(image: Image.Image) -> np.ndarray:
    """A picture upright, on white where it is transparent, uint8 (H, W, 3); ValueError where it has more than 8 bits."""
    if image.mode.startswith(("I", "F")):  # converted, these are cut off at 255, not scaled
        raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return np.asarray(upright.convert("RGB"))
