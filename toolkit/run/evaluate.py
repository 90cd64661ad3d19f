"""Scores a run on held-out clips: the generated middle frame against the true one, beside linear blending and the base.

Test: pytest tests/run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from toolkit import metrics
from toolkit.config import RunConfig
from toolkit.data.clips import Clip, ClipSettings, load_clip
from toolkit.data.format import BadSample
from toolkit.data.index import open_sources
from toolkit.data.trajectory import match_stills
from toolkit.errors import UserError
from toolkit.run.framer import FOUND_SCALE, Steering, to_signed, to_uint8
from toolkit.run.inference import load_framer, read_source, recipe_sampling

TILE_PX = 192  # height of one picture in a strip


def evaluate_run(
    run: str, clips: int | None = None, steps: int | None = None, base: str | None = None, compiled: bool = False
) -> dict[str, Any]:
    """Score the middle frame of held-out windows: linear blend, untuned base and tuned, against the true one.

    Writes evaluation.json and samples/strip.png (first | generated | true | last) into the run folder.
    returns  {clips, psnr_linear, psnr_base, psnr_tuned, ssim_linear, ssim_base, ssim_tuned, strip}
    """
    source = read_source(run).with_model(base=base)
    config = source.config
    held_out = load_held_out(config, clips or config.validation.clips)
    sampling = recipe_sampling(config)
    sampling = sampling if steps is None else replace(sampling, steps=steps)
    steering: list[Steering] | None = None
    if config.diffusion.control:  # as in training
        steering = [Steering(match_stills(c.frames_THWC[0], c.frames_THWC[-1]), FOUND_SCALE) for c in held_out]
    frames_BTCHW = torch.stack([to_signed(torch.from_numpy(c.frames_THWC)) for c in held_out])
    middle = config.data.frames // 2  # of an even window, the later of the two
    stills_B2CHW, true_BCHW = frames_BTCHW[:, [0, -1]], frames_BTCHW[:, middle]
    fps_B = torch.tensor([c.fps for c in held_out])
    motion_B = torch.tensor([c.motion for c in held_out])
    made = {"linear": torch.lerp(stills_B2CHW[:, 0], stills_B2CHW[:, 1], middle / (config.data.frames - 1))}

    def make(name: str, adapters: tuple[tuple[Path, float], ...]) -> Tensor:
        # read for each: once an adapter is folded in, the weights without it are gone
        framer = load_framer(replace(source, adapters=adapters), config.diffusion.control, compiled)
        return torch.cat([
            framer.generate_middle(
                stills_B2CHW[i : i + 1], fps_B[i : i + 1], motion_B[i : i + 1], sampling, [i],
                steering and steering[i : i + 1],
            ).cpu()
            for i in _with_bar(range(len(held_out)), f"{name} model")
        ])  # fmt: skip

    made["tuned"] = make("tuned", source.adapters)  # first: what is wrong with an adapter is told at once
    made["base"] = make("base", ())
    report: dict[str, Any] = {"clips": len(held_out)}
    for metric, score in (("psnr", metrics.psnr_db), ("ssim", metrics.ssim)):
        report |= {f"{metric}_{name}": round(score(made[name], true_BCHW).mean().item(), 4) for name in made}
    columns = {"first": stills_B2CHW[:, 0], "generated": made["tuned"], "true": true_BCHW, "last": stills_B2CHW[:, 1]}
    report["strip"] = str(draw_strip(Path(run) / "samples/strip.png", columns))
    (Path(run) / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def load_held_out(config: RunConfig, clips: int) -> list[Clip]:
    """Load the centre window of the first clips of the validation split; unusable ones are passed over."""
    index = open_sources(config.data, "val")
    data = config.data
    settings = ClipSettings(data.frames, data.height, data.width, data.strides, window="centre")
    loaded = []
    for sample in range(len(index)):
        try:
            loaded.append(load_clip(index, sample, settings, config.seed, sample))
        except BadSample as error:
            print(f"passed over: {error}")
        if len(loaded) == clips:
            break
    if not loaded:
        where = " + ".join(config.data.sources)
        raise UserError(f"{where} has no usable validation clip; pack more videos, or lower data.stride")
    return loaded


def draw_strip(path: Path, columns: dict[str, Tensor], captions: Sequence[str] = ()) -> Path:
    """Draw labelled columns of pictures, a row per clip.

    columns   {label: (B, 3, H, W) in [-1, 1]}
    captions  a line above each row
    """
    heading_px, gap_px, caption_px = 20, 4, 16 if captions else 0
    rows, _, height_px, width_px = next(iter(columns.values())).shape
    tile_width_px, row_px = round(TILE_PX * width_px / height_px), TILE_PX + gap_px + caption_px
    sheet = Image.new("RGB", (len(columns) * (tile_width_px + gap_px), heading_px + rows * row_px), "white")
    draw = ImageDraw.Draw(sheet)
    for row, caption in enumerate(captions):
        draw.text((4, heading_px + row * row_px), caption, fill="black")
    for i, (label, images_BCHW) in enumerate(columns.items()):
        left = i * (tile_width_px + gap_px)
        draw.text((left + 4, 4), label, fill="black")
        for row, picture in enumerate(to_uint8(images_BCHW).numpy()):
            tile = Image.fromarray(picture).resize((tile_width_px, TILE_PX), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left, heading_px + row * row_px + caption_px))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _with_bar(items: range, label: str) -> Iterable[int]:
    from tqdm import tqdm

    return tqdm(items, desc=label, unit="clip")
