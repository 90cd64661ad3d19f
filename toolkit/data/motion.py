"""How much a clip moves, as one number from 1 to 255: what SVD calls its motion bucket.

Test: pytest tests/data/test_pack.py
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image


class Motion:
    """Scores how much a clip moves while its frames pass: 4 x the mean absolute luma change per second, 1 to 255.

    Luma is 0 to 255 on frames scaled to 64 px of height, where camera noise is averaged away. Signing measures 18 to
    50 a second, so a typical clip scores about 127, the value SVD was trained around.
    """

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.changes: list[float] = []

    def watch(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        before_HW = None
        for frame_HWC in frames:
            size_px = (max(1, round(64 * frame_HWC.shape[1] / frame_HWC.shape[0])), 64)
            small = Image.fromarray(frame_HWC).resize(size_px, Image.Resampling.BOX).convert("L")
            luma_HW = np.asarray(small, dtype=np.int16)
            if before_HW is not None:
                self.changes.append(float(np.abs(luma_HW - before_HW).mean()))
            before_HW = luma_HW
            yield frame_HWC

    @property
    def score(self) -> float:
        return float(min(255, max(1, round(4 * float(np.mean(self.changes)) * self.fps))))
