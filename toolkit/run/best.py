"""Which look at held-out clips was the best one, and when to wait no longer for a better.

Test: pytest tests/run/test_validate.py. A look is a loss on them (validate.py), or figures of generated frames (gallery.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from toolkit.config import ValidationConfig


@dataclass
class Best:
    """The best look of a run until now, by the recipe's validation.best_by."""

    settings: ValidationConfig
    score: float | None = None
    step: int = 0

    def note(self, step: int, score: float | None) -> bool:
        """Take a look's score, or None where there was no look; returns whether it is the best until now."""
        if score is None or not math.isfinite(score):
            return False
        if self.score is not None and not is_better(self.settings.best_by, score, self.score):
            return False
        self.score, self.step = score, step
        return True

    def is_over(self, step: int) -> bool:
        """Whether validation.patience looks in a row were no better."""
        patience, every = self.settings.patience, self.settings.best_every_steps
        return patience is not None and every is not None and step - self.step >= patience * every


def is_better(by: str, score: float, than: float) -> bool:
    """Compare two scores: of a loss less is better, of the figures that can be chosen more."""
    return score < than if by == "loss" else score > than
