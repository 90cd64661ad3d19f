"""How much a clip moves, as one number from 1 to 255: what SVD calls its motion bucket.

Test: pytest tests/authoring/test_survey.py
"""

from collections.abc import Sequence

import numpy as np


def motion_score(changes: Sequence[float] | np.ndarray, fps: float) -> float:
    """Score a clip by its mean absolute luma changes from frame to frame: 4 x their mean per second, 1 to 255.

    Luma is 0 to 255 on frames scaled to 64 px of height, where camera noise is averaged away. Signing measures 18 to
    50 a second, so a typical clip scores about 127, the value SVD was trained around.
    """
    return float(min(255, max(1, round(4 * float(np.mean(changes)) * fps))))
