"""Pictures as a user has them, to RGB: phones turn them, editors make them transparent, cameras store 16 bits.

Test: pytest tests/data/test_stills.py
"""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from toolkit.errors import UserError, in_one_line


def read_stills(paths: Sequence[str]) -> np.ndarray:
    """Read pictures of one size as uint8 (N, H, W, 3)."""
    stills = [read_still(path) for path in paths]
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


def to_rgb(image: Image.Image) -> np.ndarray:
    """A picture upright, on white where it is transparent, uint8 (H, W, 3); ValueError where it has more than 8 bits."""
    if image.mode.startswith(("I", "F")):  # converted, these are cut off at 255, not scaled
        raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return np.asarray(upright.convert("RGB"))
