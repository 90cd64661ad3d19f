"""The loss on held-out clips while a run goes on: the same clips, windows, noise and noise levels each time.

Test: pytest tests/run/test_validate.py. Only the weights differ from one look to the next. Draws are keyed by a seed of
their own and by the clip's place, never by what training drew: a run computes the same with and without it. As many clips
that are trained on are scored alike: where their loss falls and that of held-out clips does not, clips are learned by heart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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
from toolkit.run.scores import SIGMA_BINS, name_bins

PATIENCE = 3  # looks without a better one, before a gap that widens is given its name


@dataclass(frozen=True)
class Losses:
    """Mean losses at the middles of equally likely ranges of noise, each as likely in training as the others."""

    held_out: float
    seen: float  # of clips that are trained on
    by_sigma: dict[str, float]  # of held-out clips
    zero_by_sigma: dict[str, float]  # what a prediction of zero scores there


class Validator:
    """Scores some clips of the validation split, and as many of the training split, the ranks sharing them out.

    held_out, seen  indexes of the two
    windows         how training cuts its clips; here the centre is cut
    """

    def __init__(
        self,
        config: RunConfig,
        held_out: DatasetIndex,
        seen: DatasetIndex,
        windows: ClipSettings,
        framer: Framer,
        world: World,
    ) -> None:
        self.world = world
        seed = derive_seed(config.seed, "validation")
        settings = framer.settings.model_copy(update={"conditioning_dropout": 0.0})
        self.framer = Framer(
            framer.base, settings, config.data.frames, seed, framer.controlnet, framer.device, framer.before
        )
        edges, middles = (torch.arange(n, SIGMA_BINS, dtype=torch.float64) for n in (1, 0.5))
        self.bins = name_bins(framer.sigma_quantiles((edges / SIGMA_BINS).float()).tolist())
        self.sigmas = framer.sigma_quantiles((middles / SIGMA_BINS).float()).tolist()
        centred = replace(windows, window="centre")
        usable = [index.choose(windows.least_frames, config.validation.clips) for index in (held_out, seen)]
        self.clips = [min(config.validation.clips, len(own)) for own in usable]
        self.batches: list[MicroBatches | list[Batch | UserError]] = [
            MicroBatches(index, InSequence(own, clips, seed), centred, world.size, 1, world.rank, world.size)
            for index, own, clips in zip((held_out, seen), usable, self.clips, strict=True)
        ]

    def ordinals(self, clips: int) -> range:
        """Of a split's batches; as many on each rank, because an engine may gather weights."""
        return range(math.ceil(clips / self.world.size))

    @torch.no_grad()
    def encode(self, vae: Any, image_encoder: Any, beat: Callable[[], None] = lambda: None) -> None:
        """Replace the clips' frames, once, by what the encoders make of them, so that these are needed no more."""

        def encoded(batch: Batch | UserError) -> Batch | UserError:
            if isinstance(batch, UserError) or batch.frames_BTHWC is None:
                return batch
            beat()
            frames_BTCHW = to_signed(batch.frames_BTHWC.to(self.world.device))
            latents = Encoded(*encode_frames(vae, frames_BTCHW), embed_stills(image_encoder, frames_BTCHW[:, [0, -1]]))
            return replace(batch, frames_BTHWC=None, encoded=latents)

        self.batches = [
            [encoded(own[ordinal]) for ordinal in self.ordinals(clips)]
            for own, clips in zip(self.batches, self.clips, strict=True)
        ]
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()  # the framer reads them in a stream of its own

    @torch.no_grad()
    def measure(self, beat: Callable[[], None]) -> Losses:
        """Score the clips, the same on every rank; beat is called before each, to say that the run goes on."""
        base = self.framer.base
        if base.vae is not None and not self.framer.settings.noise_augmentation:  # which is laid on the frames
            self.encode(base.vae, base.image_encoder, beat)
        held_out, seen = (
            self._sum(own, clips, beat) / clips for own, clips in zip(self.batches, self.clips, strict=True)
        )
        of_both = self.world.all_reduce_sum(torch.stack([held_out, seen]).flatten())
        (loss, zero), (seen_loss, _) = torch.tensor(of_both, dtype=torch.float64).view(2, 2, -1)
        by_sigma, zero_by_sigma = (dict(zip(self.bins, values.tolist(), strict=True)) for values in (loss, zero))
        return Losses(loss.mean().item(), seen_loss.mean().item(), by_sigma, zero_by_sigma)

    def _sum(self, batches: MicroBatches | list[Batch | UserError], clips: int, beat: Callable[[], None]) -> Tensor:
        """Losses and zero baselines of this rank's clips at each noise level, summed over the clips: (2, levels) fp64."""
        total = torch.zeros(2, len(self.sigmas), dtype=torch.float64, device=self.world.device)
        for ordinal in self.ordinals(clips):
            beat()
            batch = batches[ordinal]
            if isinstance(batch, UserError):
                raise batch
            counts = batch.positions[0] < clips  # else it is there to keep step with the other ranks
            for level, sigma in enumerate(self.sigmas):
                scores = self.framer.compute_loss(batch, sigma_B=torch.full((1,), sigma))
                total[:, level] += torch.cat([scores.loss_B, scores.zero_B]) * counts
        return total


def name_overfitting(looks: Sequence[tuple[int, float, float]]) -> str | None:
    """Say so where held-out clips have not become better for some looks, while those trained on have.

    looks  (step, held-out loss, loss on clips trained on) of the run until now
    """
    looks = [look for look in looks if math.isfinite(look[1]) and math.isfinite(look[2])]
    best = min(looks, key=lambda look: look[1], default=None)
    if best is None or len(later := [look for look in looks if look[0] > best[0]]) < PATIENCE:
        return None
    step, held_out, seen = later[-1]
    if seen >= best[2]:
        return None
    return (
        f"overfitting: since step {best[0]:,} the loss on clips trained on fell from {best[2]:.4f} to {seen:.4f}, and on "
        f"held-out clips it rose from {best[1]:.4f} to {held_out:.4f}. More clips, a lower lora.rank or optimizer.lr, or "
        "fewer steps help"
    )
