"""The loss on held-out clips while a run goes on: the same clips, windows and noise each time, so only the weights differ.

Test: pytest tests/run/test_validate.py. Draws are keyed by a seed of their own and by the clip's place, never by what
training drew: a run computes the same with and without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from toolkit.config import RunConfig
from toolkit.data.clips import ClipSettings
from toolkit.data.index import DatasetIndex
from toolkit.data.latents import Encoded
from toolkit.data.loader import Batch, MicroBatches
from toolkit.data.order import InSequence
from toolkit.engine.world import World
from toolkit.errors import UserError
from toolkit.model.encoders import embed_stills, encode_frames
from toolkit.rng import derive_seed
from toolkit.run.framer import Framer, to_signed


class Validator:
    """Scores the first clips of the validation split, the ranks sharing them out.

    held_out  index of that split
    windows   how training cuts its clips; here the centre is cut
    """

    def __init__(
        self, config: RunConfig, held_out: DatasetIndex, windows: ClipSettings, framer: Framer, world: World
    ) -> None:
        self.world = world
        self.clips = min(config.validation.clips, len(held_out))
        seed = derive_seed(config.seed, "validation")
        settings = framer.settings.model_copy(update={"conditioning_dropout": 0.0})
        self.framer = Framer(
            framer.base, settings, config.data.frames, seed, framer.controlnet, framer.device, framer.before
        )
        order = InSequence(len(held_out), seed)
        centred = replace(windows, window="centre")
        batches = MicroBatches(held_out, order, centred, world.size, 1, world.rank, world.size)
        self.batches: MicroBatches | list[Batch | UserError] = batches

    @property
    def ordinals(self) -> range:
        """Of the batches; as many on each rank, because an engine may gather weights."""
        return range(math.ceil(self.clips / self.world.size))

    def encode(self, vae: Any, image_encoder: Any) -> None:
        """Replace the clips' frames, once, by what the encoders make of them, so that these are needed no more."""

        def encoded(batch: Batch | UserError) -> Batch | UserError:
            if isinstance(batch, UserError):
                return batch
            assert batch.frames_BTHWC is not None
            frames_BTCHW = to_signed(batch.frames_BTHWC.to(self.world.device))
            latents = Encoded(*encode_frames(vae, frames_BTCHW), embed_stills(image_encoder, frames_BTCHW[:, [0, -1]]))
            return replace(batch, frames_BTHWC=None, encoded=latents)

        self.batches = [encoded(self.batches[ordinal]) for ordinal in self.ordinals]

    @torch.no_grad()
    def loss(self, beat: Callable[[], None]) -> float:
        """The mean loss over the clips, the same on every rank; beat is called before each, to say that the run goes on."""
        total = torch.zeros(1, dtype=torch.float64, device=self.world.device)
        for ordinal in self.ordinals:
            beat()
            batch = self.batches[ordinal]
            if isinstance(batch, UserError):
                raise batch
            loss_B = self.framer.compute_loss(batch).loss_B
            total += loss_B.sum() if batch.positions[0] < self.clips else 0
        return self.world.all_reduce_sum(total)[0] / self.clips
