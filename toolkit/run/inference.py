"""A trained run in use: load it, interpolate between two stills, score it on held-out clips.

Test: pytest tests/run. The recipe in the run folder says how the network is fed, so inference cannot disagree with training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from toolkit import metrics
from toolkit.config import RunConfig, load_config
from toolkit.data.clips import Clip, ClipSettings, load_clip, resize_cover
from toolkit.data.format import BadSample
from toolkit.data.index import open_shards
from toolkit.data.video import write_video
from toolkit.engine.world import init_world
from toolkit.errors import UserError
from toolkit.model.attention import choose_attention, set_attention
from toolkit.model.base import PRECISIONS, load_base
from toolkit.model.lora import enable_adapter, load_adapter
from toolkit.run.folder import newest_adapter
from toolkit.run.framer import Framer, to_signed, to_uint8
from toolkit.run.pretrain import find_base

TILE_PX = 192  # height of one picture in a strip


def read_run(run: str | Path) -> tuple[Path, RunConfig]:
    """Find a run's newest good checkpoint and its recipe."""
    return newest_adapter(Path(run)), load_config(Path(run) / "config.yaml")


def load_framer(checkpoint: Path, config: RunConfig, lora_scale: float = 1.0, base: str | None = None) -> Framer:
    """Load a recipe's base with an adapter in it.

    lora_scale  multiplies alpha / rank
    base        another folder of the same base, UNet included, when the recipe's is not on this machine
    """
    world = init_world(join=False)
    folder, unet = find_base(base or config.model.base, world), None if base else config.model.unet
    loaded = load_base(folder, unet, config.model.revision, world.device, config.engine.precision)
    dtype = PRECISIONS[config.engine.precision]
    set_attention(loaded.unet, choose_attention(config.model.attention, world.device, dtype))
    load_adapter(loaded.unet, checkpoint, loaded.fingerprint, lora_scale)
    return Framer(loaded, config)


def interpolate_stills(
    run: str, first: str, last: str, out: str, frames: int, lora_scale: float, fps: float, motion: float,
    steps: int | None, base: str | None,
) -> Path:  # fmt: skip
    """Write the frames between two pictures to out: .mp4, .gif, or a folder of PNG."""
    stills = [read_still(first), read_still(last)]
    if stills[0].shape != stills[1].shape:
        sizes = " and ".join(f"{s.shape[1]}x{s.shape[0]}" for s in stills)
        raise UserError(f"the two stills have different sizes, {sizes}; give two pictures of one size")
    checkpoint, config = read_run(run)
    refuse_frames(frames, config)
    refuse_ending(Path(out))
    framer = load_framer(checkpoint, config, lora_scale, base)
    if stills[0].shape[:2] != (config.data.height, config.data.width):
        print(
            f"the stills are scaled and cropped from {stills[0].shape[1]}x{stills[0].shape[0]} "
            f"to {config.data.width}x{config.data.height}, the size the run was trained at"
        )
    cut = resize_cover(np.stack(stills), config.data.height, config.data.width)
    first_CHW, last_CHW = to_signed(torch.from_numpy(cut))
    steps = steps or config.validation.sampler_steps
    return write_frames(Path(out), to_uint8(framer.interpolate(first_CHW, last_CHW, frames, fps, motion, steps)), fps)


def refuse_frames(frames: int, config: RunConfig) -> None:
    """Refuse a number of frames that neither halving nor the recipe's own window gives."""
    whole_window = config.data.frames if config.diffusion.layout != "spec_middle" else None
    if frames != whole_window and (frames < 3 or (frames - 1) & (frames - 2)):
        own = f", and this run's window {whole_window}" if whole_window else ""
        raise UserError(f"frames is {frames}: halving gives 3, 5, 9, 17, ...{own}; take one of these")


def refuse_ending(out: Path) -> None:
    """Refuse a file that could not be written at the end of the work."""
    if out.is_dir() if out.suffix else out.is_file():
        raise UserError(f"{out} is there already, as a {'folder' if out.suffix else 'file'}; choose another --out")
    if out.suffix not in (".mp4", ".gif", ""):
        raise UserError(f"cannot write {out}: the ending must be .mp4 or .gif, or none for a folder of PNG")


def read_still(path: str) -> np.ndarray:
    """Read a picture as uint8 (H, W, 3)."""
    try:
        return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))  # phones store pictures turned
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {path} as a picture: {error}") from None


def write_frames(out: Path, frames_THWC: Tensor, fps: float) -> Path:
    """Write uint8 frames as a video, an animation, or numbered pictures, by the ending of out."""
    pictures = frames_THWC.numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".mp4":
        write_video(out, pictures, fps)
    elif out.suffix == ".gif":
        images = [Image.fromarray(p) for p in pictures]
        images[0].save(out, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    else:
        out.mkdir(exist_ok=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(out / f"{i:03d}.png")
    return out


def evaluate_run(
    run: str, clips: int | None = None, steps: int | None = None, base: str | None = None
) -> dict[str, Any]:
    """Score the middle frame of held-out windows: linear blend, untuned base and tuned, against the true one.

    Writes evaluation.json and samples/strip.png (first | generated | true | last) into the run folder.
    returns  {clips, psnr_linear, psnr_base, psnr_tuned, ssim_linear, ssim_base, ssim_tuned, strip}
    """
    checkpoint, config = read_run(run)
    held_out = load_held_out(config, clips or config.validation.clips)
    framer = load_framer(checkpoint, config, base=base)
    frames_BTCHW = torch.stack([to_signed(torch.from_numpy(c.frames_THWC)) for c in held_out])
    stills_B2CHW, true_BCHW = frames_BTCHW[:, [0, -1]], frames_BTCHW[:, config.data.frames // 2]
    fps_B = torch.tensor([c.fps for c in held_out])
    motion_B = torch.tensor([c.motion for c in held_out])
    made = {"linear": stills_B2CHW.mean(1)}
    for name in ("base", "tuned"):
        enable_adapter(framer.base.unet, name == "tuned")
        made[name] = torch.cat([
            framer.generate_middle(
                stills_B2CHW[i : i + 1], fps_B[i : i + 1], motion_B[i : i + 1],
                steps or config.validation.sampler_steps, [i],
            ).cpu()
            for i in _with_bar(range(len(held_out)), f"{name} model")
        ])  # fmt: skip
    report: dict[str, Any] = {"clips": len(held_out)}
    for metric, score in (("psnr", metrics.psnr_db), ("ssim", metrics.ssim)):
        report |= {f"{metric}_{name}": round(score(made[name], true_BCHW).mean().item(), 4) for name in made}
    columns = {"first": stills_B2CHW[:, 0], "generated": made["tuned"], "true": true_BCHW, "last": stills_B2CHW[:, 1]}
    report["strip"] = str(draw_strip(Path(run) / "samples/strip.png", columns))
    (Path(run) / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def load_held_out(config: RunConfig, clips: int) -> list[Clip]:
    """Load the centre window of the first clips of the validation split; unusable ones are passed over."""
    index = open_shards(config.data.shards, "val")
    data = config.data
    settings = ClipSettings(data.frames, data.height, data.width, (data.stride,), window="centre")
    loaded = []
    for sample in range(len(index)):
        try:
            loaded.append(load_clip(index, sample, settings, config.seed, sample))
        except BadSample as error:
            print(f"passed over: {error}")
        if len(loaded) == clips:
            break
    if not loaded:
        raise UserError(f"{config.data.shards} has no usable validation clip; pack more videos, or lower data.stride")
    return loaded


def draw_strip(path: Path, columns: dict[str, Tensor]) -> Path:
    """Draw labelled columns of pictures, a row per clip.

    columns  {label: (B, 3, H, W) in [-1, 1]}
    """
    heading_px, gap_px = 20, 4
    rows, _, height_px, width_px = next(iter(columns.values())).shape
    tile_width_px = round(TILE_PX * width_px / height_px)
    sheet = Image.new("RGB", (len(columns) * (tile_width_px + gap_px), heading_px + rows * (TILE_PX + gap_px)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, images_BCHW) in enumerate(columns.items()):
        left = i * (tile_width_px + gap_px)
        draw.text((left + 4, 4), label, fill="black")
        for row, picture in enumerate(to_uint8(images_BCHW).numpy()):
            tile = Image.fromarray(picture).resize((tile_width_px, TILE_PX), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left, heading_px + row * (TILE_PX + gap_px)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _with_bar(items: range, label: str) -> Iterable[int]:
    from tqdm import tqdm

    return tqdm(items, desc=label, unit="clip")
