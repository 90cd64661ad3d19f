"""The attention kernel of a run: as the recipe says, or the fastest on its card, measured once and remembered.

Test: pytest tests/run/test_attention.py
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from toolkit.config import Part, RunConfig
from toolkit.engine.world import World
from toolkit.model.attention import KERNELS, choose_attention
from toolkit.model.kernels import CANDIDATES, Packed, Size, attend_triton, by_rows, measure
from toolkit.model.unet import SVD_CONFIG
from toolkit.run.memory import find_shape
from toolkit.run.recall import recall

_LATENT_PX, _HEADS = 8, SVD_CONFIG["num_attention_heads"]  # of SVD, before it is read
_HEAD_DIM = SVD_CONFIG["block_out_channels"][0] // _HEADS[0]
_TRITON = " + triton"  # in the names of KERNELS, after that of the rows' kernel
_FEW = 64  # positions that a kernel is tried on


def choose_kernel(choice: str, config: RunConfig, world: World, dtype: torch.dtype, parts: Collection[Part]) -> str:
    """A name in KERNELS, the same on every rank.

    choice  the recipe's model.attention, or what stands for it
    parts   of lean blocks: one of them is a kernel of its own along the frames
    raises  UserError as choose_attention does
    """
    if choice != "auto" or world.device.type != "cuda":
        return choose_attention(choice, world.device, dtype)
    shape = find_shape(config, _LATENT_PX)
    levels = [(shape.height * shape.width // 4**level, heads) for level, heads in enumerate(_HEADS)]
    in_space = [(shape.clips * shape.frames, pixels, heads, _HEAD_DIM) for pixels, heads in levels]
    along_frames = [(shape.clips * pixels, shape.frames, heads, _HEAD_DIM) for pixels, heads in levels]

    def find() -> str:
        everywhere = {name: by_rows(attend) for name, attend in CANDIDATES.items()}
        rows = recall_fastest(everywhere, in_space, dtype, world.device) or "sdpa"
        if "frames" not in parts:
            return rows
        along = {"triton": attend_triton, rows: by_rows(KERNELS[rows].rows)}
        fastest = recall_fastest(along, along_frames, dtype, world.device, frames=True)
        return f"{rows}{_TRITON}" if fastest == "triton" else rows

    kernel = agree(world, find)
    few = (_FEW, *along_frames[0][1:])
    if kernel.endswith(_TRITON) and not runs_everywhere(attend_triton, few, dtype, world, frames=True):
        return kernel.removesuffix(_TRITON)
    return kernel


def agree(world: World, find: Callable[[], str]) -> str:
    """What the main rank finds, on every rank: two kernels round differently, and one of them may be slower."""
    names = list(KERNELS)
    return names[world.broadcast_int(names.index(find()) if world.is_main else 0)]


def runs_everywhere(candidate: Packed, size: Size, dtype: torch.dtype, world: World, frames: bool = False) -> bool:
    """Whether a kernel runs now on every rank, which all ask; Triton's needs a compiler, and stands back for no other.

    What is remembered, or was found by the main rank, says nothing of this start, or of another machine.
    """
    runs = torch.tensor(
        [float(len(_measure({"": candidate}, [size], dtype, world.device, frames)))], device=world.device
    )
    return world.all_reduce_sum(runs) == [world.size]


def recall_fastest(
    candidates: Mapping[str, Packed],
    sizes: Sequence[Size],
    dtype: torch.dtype,
    device: torch.device,
    frames: bool = False,
) -> str | None:
    """The fastest candidate, as it was found when it was asked for first; None where none runs now. See measure."""

    def find() -> str:
        seconds = _measure(candidates, sizes, dtype, device, frames)
        if not seconds:
            raise LookupError
        return min(seconds, key=seconds.__getitem__)

    question = {"attention": [*sorted(candidates), str(dtype), *sizes, frames], "machine": _describe(device)}
    try:
        return recall(question, find)
    except (LookupError, torch.OutOfMemoryError):  # not kept: the next start may find a compiler, or room
        return None


def _measure(
    candidates: Mapping[str, Packed], sizes: Sequence[Size], dtype: torch.dtype, device: torch.device, frames: bool
) -> dict[str, float]:
    seconds = measure(candidates, sizes, dtype, device, frames)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else the memory plan would find less free than in a run that remembers
    return seconds


def _describe(device: torch.device) -> list[str]:
    """Card and versions, on which it depends who is the fastest."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = [f"torch {torch.__version__}", f"cuda {torch.version.cuda}", f"cudnn {torch.backends.cudnn.version()}"]
    for package in ("xformers", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return [card, *versions]
