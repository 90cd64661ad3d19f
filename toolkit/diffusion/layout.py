"""Which frames the network sees, which of them are known, and which count in the loss.

Test: pytest tests/diffusion. A window of T frames has two known ends; a layout says what of it enters the UNet:

    spec_middle      one frame, the middle; both ends only through conditioning latents and tokens (the spec's)
    framer_clip      all T frames, ends known; every frame is scored, since inference denoises every frame (Framer's)
    middle_in_clip   as framer_clip, scored on the middle frame only (the spec's task in Framer's form)
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A layout at a window length: boolean masks over the frames that enter the UNet, and where they stand in the window."""

    name: str
    window: int  # frames of the window
    in_window: tuple[int, ...]  # window index of each frame that enters the UNet
    known_T: Tensor  # (T,) bool: True where the frame is given
    scored_T: Tensor  # (T,) bool: True where the frame counts in the loss

    @property
    def frames(self) -> int:
        """T: frames that enter the UNet."""
        return len(self.in_window)


def make_layout(name: str, window: int) -> Layout:
    """Describe a layout for windows of 3 frames or more; an odd number where one middle frame is what counts."""
    if window < 3 or (window % 2 == 0 and name != "framer_clip"):
        raise ValueError(
            f"window of {window} frames: it must be at least 3, and odd but in framer_clip, so that a middle frame exists"
        )
    middle = window // 2
    if name == "spec_middle":
        one = torch.ones(1, dtype=torch.bool)
        return Layout(name, window, (middle,), known_T=~one, scored_T=one)
    known_T = torch.zeros(window, dtype=torch.bool)
    known_T[[0, -1]] = True
    scored_T = torch.ones(window, dtype=torch.bool)
    if name == "middle_in_clip":
        scored_T = torch.arange(window) == middle
    elif name != "framer_clip":
        raise ValueError(f"layout {name!r}: it must be spec_middle, framer_clip or middle_in_clip")
    return Layout(name, window, tuple(range(window)), known_T, scored_T)
