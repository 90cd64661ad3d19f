"""Held-out windows filled while a run goes on: figures beside blending and the network that it began with, and pictures.

Test: pytest tests/run/test_gallery.py. The same windows and noise each time, those of launch/evaluate.py: only the weights
differ, and a run computes the same with and without it. Of several gaps, the pictures and the figures named as evaluate
names them are of the first; those of the others end in _gap_8 and so on. What a run began with is shown beside what the same
sampler made of the same windows alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from toolkit.config import RunConfig
from toolkit.engine.world import World
from toolkit.run.best import are_alike, frames_of
from toolkit.run.framer import Framer, NotFinite, to_signed, to_uint8
from toolkit.run.inference import recipe_sampling
from toolkit.run.judge import DRIFTS, Windows, blend_window, load_windows, make_window, own_gaps, read_lpips, score
from toolkit.run.monitor import FIGURES_LOG, Monitor
from toolkit.run.rows import read_rows
from toolkit.run.strip import draw_strip

SHOWN = 4  # windows in a strip


class Gallery:
    """Judges the network in training on the first held-out windows, the ranks sharing them out."""

    def __init__(self, config: RunConfig, framer: Framer, world: World) -> None:
        self.by_gap = load_windows(config, own_gaps(config), config.validation.clips)
        self.windows = self.by_gap[own_gaps(config)[0]]
        self.framer, self.world, self.sampling = framer, world, recipe_sampling(config)
        self.lpips = read_lpips(config, config.validation.lpips)
        self.folder, self.look = config.folder, frames_of(config)
        shown = self.windows.frames_BTHWC.shape[1]
        self.rate_share = (shown - 1) / (config.data.frames - 1)  # fewer frames than the window's last as long
        self.baselines: dict[str, dict[str, float]] = {}  # {figure: {contender: its mean}} that no weight changes
        for own in self.by_gap.values() if world.is_main else ():  # which reports them
            for contender, make, figures in (("linear", blend_window, None), ("true", Windows.true, DRIFTS)):
                scored = [score(make(own, i), own.true(i), self.lpips) for i in range(len(own))]
                for name in figures or scored[0]:
                    mean = _mean(torch.cat([one[name] for one in scored]))
                    self.baselines.setdefault(self._name(own, name), {})[contender] = mean

    def _name(self, windows: Windows, figure: str) -> str:
        return figure if windows is self.windows else f"{figure}_gap_{windows.gap}"

    @property
    def _kept(self) -> Path:
        return self.folder / "samples/start.safetensors"  # the main rank's frames, before the first step

    def show(self, monitor: Monitor, step: int, beat: Callable[[], None]) -> dict[str, float]:
        """Fill, judge and report; every rank calls it, and all are given the means of the figures.

        Step 0, before the first, is what later ones are compared with.
        """
        made, figures = self._fill(beat)
        means = {name: _mean(values_B) for name, values_B in figures.items()}
        if not self.world.is_main:
            return means
        if step == 0:
            frames = {str(i): to_uint8(frames_TCHW).contiguous() for i, frames_TCHW in made.items()}
            save_file(frames, self._kept, {"look": json.dumps(self.look)})
        kept, begun = self._read_start()
        monitor.report_figures(step, {
            name: {"linear": self.baselines[name]["linear"]}
            | ({"start": mean} if step == 0 else {"start": begun[name]["start"]} if name in begun else {})
            | {"tuned": mean}
            | self.baselines[name]
            for name, mean in means.items()
        })  # fmt: skip
        if step:
            self._draw(monitor, step, made, kept)
        return means

    def _read_start(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The main rank's frames before the first step, and all figures then; none where the run looked otherwise then."""
        frames, look = {}, "{}"  # older runs did not say
        if self._kept.exists():
            with safe_open(self._kept, "pt") as file:
                frames = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                look = (file.metadata() or {}).get("look", look)
        if not are_alike(json.loads(look), self.look):
            return {}, {}
        return frames, {row["step"]: row for row in read_rows(self.folder / FIGURES_LOG)}.get(0, {})

    @torch.no_grad()
    def _fill(self, beat: Callable[[], None]) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """The first gap's frames of this rank, {window: (T, 3, H, W)}, and figures of all, {name: (B,)}, on every rank."""
        made: dict[int, Tensor] = {}
        places = [(own, i) for own in self.by_gap.values() for i in range(len(own))]
        columns: list[Tensor] = []
        names: list[str] = []
        turns = math.ceil(len(places) / self.world.size)  # as many on each rank: an engine may gather weights
        for turn in range(turns):
            beat()
            place = turn * self.world.size + self.world.rank
            windows, i = places[min(place, len(places) - 1)]
            true_BTCHW = windows.true(i)
            try:
                window_BTCHW = make_window(self.framer, windows, i, self.sampling)
            except NotFinite:  # a figure that is no number, and no reason to end a run before it has saved
                window_BTCHW = torch.full_like(true_BTCHW, torch.nan)
            if place < len(self.windows):
                made[i] = window_BTCHW[0]
            figures = score(window_BTCHW, true_BTCHW, self.lpips)
            names = list(figures)
            columns.append(torch.stack([figures[name][0] for name in names]).double())
        own_FTR = torch.zeros(len(names), len(columns), self.world.size, dtype=torch.float64)
        own_FTR[:, :, self.world.rank] = torch.stack(columns, 1)
        summed = self.world.all_reduce_sum(own_FTR.flatten().to(self.world.device))
        all_FN = torch.tensor(summed, dtype=torch.float64).view(len(names), -1)[:, : len(places)]
        of_gaps = zip(self.by_gap.values(), all_FN.split(len(self.windows), 1), strict=True)
        figures_B: dict[str, Tensor] = {}
        for own, all_FB in of_gaps:
            # else a network that breaks on some windows would be judged by the others
            if all_FB[names.index("psnr")].isnan().any():
                all_FB.fill_(torch.nan)
            figures_B |= {self._name(own, name): values_B for name, values_B in zip(names, all_FB, strict=True)}
        return made, figures_B

    def _draw(self, monitor: Monitor, step: int, made: dict[int, Tensor], kept: dict[str, Tensor]) -> None:
        shown = sorted(made)[:SHOWN]
        sides = {
            "linear": {i: blend_window(self.windows, i)[0] for i in shown},
            "start": {i: to_signed(kept[str(i)]) for i in shown if str(i) in kept},
            "tuned": made,
            "true": {i: self.windows.true(i)[0] for i in shown},
        }
        sides = {label: frames for label, frames in sides.items() if len(frames) >= len(shown)}
        middle = self.windows.frames_BTHWC.shape[1] // 2

        def stack(frames: dict[int, Tensor], t: int) -> Tensor:
            return torch.stack([frames[i][t] for i in shown])

        columns: dict[str, Any] = {"first": stack(sides["true"], 0)}
        columns |= {label: stack(frames, middle) for label, frames in sides.items()}
        columns["last"] = stack(sides["true"], -1)
        monitor.show_strip(step, draw_strip(self.folder / f"samples/step_{step:06d}.png", columns))
        beside_TCHW = torch.cat([frames[shown[0]] for frames in sides.values()], 3)
        rate = self.windows.fps_B[shown[0]].item() * self.rate_share
        monitor.show_video(step, f"samples/{'_'.join(sides)}", to_uint8(beside_TCHW).movedim(3, 1), rate)


def _mean(values_B: Tensor) -> float:
    """Over the clips where a figure is finite; NaN for none."""
    return values_B[values_B.isfinite()].double().mean().item()
