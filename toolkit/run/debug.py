"""Draws a batch as the network is fed it: what it is shown, what is hidden, and under how much noise.

Test: pytest tests/run/test_debug.py
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from toolkit.data.loader import Batch
from toolkit.run.framer import Framer, to_signed
from toolkit.run.strip import draw_strip

ROWS = 8


@torch.no_grad()
def draw_batches(path: Path, framer: Framer, batches: Iterable[Batch]) -> Path:
    """Draw a row for each clip of up to ROWS batches: its window, then each frame as the UNet's channels hold it.

    window  the frames after cutting, scaling and mirroring; of cached clips, their latents decoded
    known   conditioning latents, channels 4 to 7, decoded, and the mask of the frame, channel 8
    noised  channels 0 to 3, decoded with the noise on them
    caption clip, position, time ids (fps - 1, motion, noise augmentation) and sigma
    """
    columns: dict[str, list[Tensor]] = {}
    captions: list[str] = []
    for batch in islice(batches, ROWS):
        task = framer.prepare(batch)
        channels_BTCHW = framer.join_channels(task.x_BTCHW, task.condition)
        for i, frame_BCHW in enumerate(show_window(framer, batch).unbind(1)):
            columns.setdefault(f"window {i}", []).append(frame_BCHW)
        sigma_B111 = task.sigma_B.view(-1, 1, 1, 1)
        for i, frame_BCHW in enumerate(channels_BTCHW.unbind(1)):
            noised, known, mask = frame_BCHW.split([4, 4, 1], dim=1)
            name = f"{framer.layout.in_window[i]}, mask {mask.mean().item():.0f}"
            unscaled = known / framer.scaling if framer.settings.scale_conditioning else known
            columns.setdefault(f"known {name}", []).append(framer.decode(unscaled[:, None] * framer.scaling)[:, 0])
            noisy = noised * (1 + sigma_B111**2).sqrt()
            columns.setdefault(f"noised {name}", []).append(framer.decode(noisy[:, None])[:, 0])
        for key, position, ids, sigma in zip(
            batch.keys, batch.positions, task.condition.ids_B3.tolist(), task.sigma_B.tolist(), strict=True
        ):
            fps, motion, augmentation = ids
            captions.append(
                f"{key}, position {position}: ids {fps:.2f}, {motion:.0f}, {augmentation:.2f}; sigma {sigma:.3f}"
            )
    return draw_strip(path, {name: torch.cat(parts) for name, parts in columns.items()}, captions)


def show_window(framer: Framer, batch: Batch) -> Tensor:
    """The window's frames, (B, T, 3, H, W) in [-1, 1]."""
    if batch.encoded is not None:
        mean_BTCHW = batch.encoded.mean_BTCHW.to(framer.device).float()
        return torch.stack([framer.decode(frame[:, None] * framer.scaling)[:, 0] for frame in mean_BTCHW.unbind(1)], 1)
    assert batch.frames_BTHWC is not None
    return to_signed(batch.frames_BTHWC)
