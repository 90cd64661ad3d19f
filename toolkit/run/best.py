"""Which look at held-out clips was the best one, and when to wait no longer for a better.

Test: pytest tests/run/test_validate.py. A look is a loss on them (validate.py), or figures of generated frames (gallery.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.config import ValidationConfig


@dataclass
class Best:
    """The best look of a run until now, by the recipe's validation.best_by."""

    settings: ValidationConfig
    score: float | None = None
    step: int = 0
    misses: int = 0  # looks since then, none of them better

    def note(self, step: int, score: float | None) -> bool:
        """Take a look's score, or None where there was no look; returns whether it is the best until now."""
        if score is None:
            return False
        if not math.isfinite(score) or (
            self.score is not None and not is_better(self.settings.best_by, score, self.score)
        ):
            self.misses += 1
            return False
        self.score, self.step, self.misses = score, step, 0
        return True

    @property
    def is_over(self) -> bool:
        """Whether validation.patience looks in a row were no better."""
        return self.settings.patience is not None and self.misses >= self.settings.patience


def count_misses(state: Mapping[str, Any], settings: ValidationConfig) -> int:
    """Looks since the best one at a checkpoint, by its state.json; none where its looks were other ones."""
    alike = (state.get("validation_by"), state.get("validation_clips")) == (settings.best_by, settings.clips)
    return state.get("validation_misses", 0) if alike else 0


def is_better(by: str, score: float, than: float) -> bool:
    """Compare two scores: of a loss less is better, of the figures that can be chosen more."""
    return score < than if by == "loss" else score > than
