"""The attention kernel of a run: as the recipe says, or the fastest on its card, measured once and remembered.

Test: pytest tests/run/test_attention.py
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Mapping

import torch

from toolkit.config import RunConfig
from toolkit.engine.world import World
from toolkit.model.attention import KERNELS, Attend, choose_attention
from toolkit.model.kernels import CANDIDATES, Size, attend_triton, measure
from toolkit.model.unet import SVD_CONFIG
from toolkit.run.memory import find_shape
from toolkit.run.recall import recall

_LATENT_PX, _HEADS = 8, SVD_CONFIG["num_attention_heads"][0]  # of SVD, before it is read
_HEAD_DIM = SVD_CONFIG["block_out_channels"][0] // _HEADS


def choose_kernel(choice: str, config: RunConfig, world: World, dtype: torch.dtype) -> str:
    """A name in KERNELS, the same on every rank.

    choice  the recipe's model.attention, or what stands for it
    raises  UserError as choose_attention does
    """
    if choice != "auto" or world.device.type != "cuda":
        return choose_attention(choice, world.device, dtype)
    shape = find_shape(config, _LATENT_PX)
    pixels = shape.height * shape.width
    in_space = (shape.clips * shape.frames, pixels, _HEADS, _HEAD_DIM)
    along_frames = (shape.clips * pixels, shape.frames, _HEADS, _HEAD_DIM)

    def find() -> str:
        rows = recall_fastest(CANDIDATES, in_space, dtype, world.device) or "sdpa"
        triton = recall_fastest({"triton": attend_triton}, along_frames, dtype, world.device)
        return f"{rows} + triton" if triton else rows

    return agree(world, find)


def agree(world: World, find: Callable[[], str]) -> str:
    """What the main rank finds, on every rank: two kernels round differently, and one of them may be slower."""
    names = list(KERNELS)
    return names[world.broadcast_int(names.index(find()) if world.is_main else 0)]


def recall_fastest(
    candidates: Mapping[str, Attend], size: Size, dtype: torch.dtype, device: torch.device
) -> str | None:
    """The fastest candidate for a size, as it was found when it was asked for first; None where none runs."""

    def find() -> str | None:
        seconds = measure(candidates, size, dtype, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # else the memory plan would find less free than in a run that remembers
        return min(seconds, key=seconds.__getitem__) if seconds else None

    return recall({"attention": [*sorted(candidates), str(dtype), *size], "machine": _describe(device)}, find)


def _describe(device: torch.device) -> list[str]:
    """Card and versions, on which it depends who is the fastest."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = [f"torch {torch.__version__}", f"cuda {torch.version.cuda}", f"cudnn {torch.backends.cudnn.version()}"]
    for package in ("xformers", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return [card, *versions]
