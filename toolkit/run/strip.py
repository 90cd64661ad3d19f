"""Strips: frames beside each other under their names, a row per clip.

Test: pytest tests/commands/test_evaluate.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from toolkit.run.framer import to_uint8

TILE_PX = 192  # height of one picture


def draw_strip(path: Path, columns: dict[str, Tensor], captions: Sequence[str] = ()) -> Path:
    """Write labelled columns of pictures to a file; see compose_strip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compose_strip(columns, captions).save(path)
    return path


def compose_strip(columns: dict[str, Tensor], captions: Sequence[str] = ()) -> Image.Image:
    """Draw labelled columns of pictures, a row per clip.

    columns   {label: (B, 3, H, W) in [-1, 1]}
    captions  a line above each row
    """
    heading_px, gap_px, caption_px = 20, 4, 16 if captions else 0
    rows, _, height_px, width_px = next(iter(columns.values())).shape
    tile_width_px, row_px = round(TILE_PX * width_px / height_px), TILE_PX + gap_px + caption_px
    sheet = Image.new("RGB", (len(columns) * (tile_width_px + gap_px), heading_px + rows * row_px), "white")
    draw = ImageDraw.Draw(sheet)
    for row, caption in enumerate(captions):
        draw.text((4, heading_px + row * row_px), caption, fill="black")
    for i, (label, images_BCHW) in enumerate(columns.items()):
        left = i * (tile_width_px + gap_px)
        draw.text((left + 4, 4), label, fill="black")
        for row, picture in enumerate(to_uint8(images_BCHW).numpy()):
            tile = Image.fromarray(picture).resize((tile_width_px, TILE_PX), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left, heading_px + row * row_px + caption_px))
    return sheet
