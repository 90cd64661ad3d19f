"""Which look at held-out clips was the best one, and when to wait no longer for a better.

Test: pytest tests/run/test_validate.py. A look is a loss on them (validate.py), or figures of generated frames (gallery.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.config import FED_BY, NETWORK_FIELDS, RunConfig, ValidationConfig, flatten_config
from toolkit.data.index import CHOICE_VERSION, open_sources
from toolkit.run.judge import own_gaps

Look = dict[str, Any]  # what a score depends on beside the weights, as state.json keeps it
# fields that bear on it; those other than validation.* change in the middle of a run with --allow_change alone
_BEAR_ON_BOTH = ("validation.clips", "engine.precision", "seed", "data.frames", "data.height", "data.width",
                 "diffusion.control", *(f"model.{name}" for name in NETWORK_FIELDS),
                 *(f"diffusion.{name}" for name in FED_BY))  # fmt: skip
_BEAR_ON_LOSS = ("data.stride", "diffusion.noise_sampler", "diffusion.lognormal_mean", "diffusion.lognormal_std",
                 "diffusion.loss_space")  # fmt: skip
_BEAR_ON_FRAMES = ("validation.sampler", "validation.sampler_steps", "validation.min_guidance",
                   "validation.max_guidance")  # fmt: skip


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


def look_of(config: RunConfig) -> Look:
    """All that the score of a look depends on and that may change from the start of a run to its end."""
    by = config.validation.best_by
    return {"by": by} | (losses_of(config) if by == "loss" else frames_of(config))


def losses_of(config: RunConfig) -> Look:
    """All that the losses of a look depend on."""
    return _pick(config, _BEAR_ON_LOSS)


def frames_of(config: RunConfig) -> Look:
    """All that the frames which a look generates depend on, those of its first gap, and their figures."""
    gaps = own_gaps(config)  # the longest chooses which clips are long enough
    return _pick(config, _BEAR_ON_FRAMES) | {"gap": gaps[0], "longest_gap": max(gaps)}


def _pick(config: RunConfig, names: Sequence[str]) -> Look:
    fields = flatten_config(config)
    look = {name: fields[name] for name in (*_BEAR_ON_BOTH, *names)}
    if config.validation.every_steps is not None or config.validation.figures_every_steps is not None:
        look["held_out"] = f"{open_sources(config.data, 'val').fingerprint}/{CHOICE_VERSION}"
    return look


def read_look(state: Mapping[str, Any]) -> Look:
    """What a checkpoint's state.json says of its look; older ones say the kind of score and how many clips."""
    older = {"by": state.get("validation_by"), "validation.clips": state.get("validation_clips")}
    return state.get("validation_look", older)


def digest(look: Look) -> str:
    """A short name of a look, the same for what is alike in all."""
    return hashlib.sha256(json.dumps(look, sort_keys=True).encode()).hexdigest()[:8]


def are_alike(look: Look, other: Look) -> bool:
    """Whether two looks agree in all that both say, so that their scores can be compared."""
    return all(look[name] == other[name] for name in look.keys() & other.keys())


def count_misses(state: Mapping[str, Any], look: Look) -> int:
    """Looks since the best one at a checkpoint, by its state.json; none where its looks were other ones than this."""
    return state.get("validation_misses", 0) if are_alike(read_look(state), look) else 0


def is_better(by: str, score: float, than: float) -> bool:
    """Compare two scores: of a loss less is better, of the figures that can be chosen more."""
    return score < than if by == "loss" else score > than
