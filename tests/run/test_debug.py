"""The picture of a batch shows what the network is fed. Run: pytest tests/run/test_debug.py"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.launching import train_here
from toolkit.run.strip import TILE_PX

HEADING_PX, CAPTION_PX, GAP_PX = 20, 16, 4


def tile(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    top = HEADING_PX + row * (TILE_PX + GAP_PX + CAPTION_PX) + CAPTION_PX
    left = column * (TILE_PX + GAP_PX)
    return picture[top : top + TILE_PX, left : left + TILE_PX].astype(int)


@pytest.mark.parametrize("layout", ["spec_middle", "middle_in_clip"])
def test_the_picture_of_a_batch(tiny_run: dict[str, Any], tmp_path: Path, layout: str) -> None:
    """A row a clip: its window, then each frame of the UNet as known and as noised; drawing it changes no loss."""
    overrides = tiny_run | {
        "diffusion.layout": layout,
        "schedule.steps": 2,
        "engine.kind": "plain",
        "runs_dir": str(tmp_path),
    }
    runs = {name: train_here(overrides | {"name": name, "data.debug": name == "drawn"}) for name in ("drawn", "plain")}
    steps = [[line.partition('"clips_per_s"')[0] for line in (run / "log.jsonl").open()] for run in runs.values()]
    assert steps[0] == steps[1]
    assert not (runs["plain"] / "samples/batch.png").exists()
    picture = np.asarray(Image.open(runs["drawn"] / "samples/batch.png"))
    frames = 1 if layout == "spec_middle" else 3
    columns, rows = 3 + 2 * frames, 8
    assert picture.shape == (
        HEADING_PX + rows * (TILE_PX + GAP_PX + CAPTION_PX), columns * (TILE_PX + GAP_PX), 3
    )  # fmt: skip
    for row in range(rows):
        first, last = (tile(picture, row, column) for column in (0, 2))
        if layout == "spec_middle":  # known is the mean of the two ends, as the codec gives it back
            known, noised = tile(picture, row, 3), tile(picture, row, 4)
            assert np.abs(known - (first + last) / 2).mean() < 16
            assert np.abs(noised - known).mean() > np.abs(known - (first + last) / 2).mean()
        else:  # the ends are known, the middle is the mask token's blank
            assert np.abs(tile(picture, row, 3) - first).mean() < 16
            assert np.abs(tile(picture, row, 7) - last).mean() < 16
            assert tile(picture, row, 5).std((0, 1)).max() < 8
    assert torch.is_grad_enabled()
