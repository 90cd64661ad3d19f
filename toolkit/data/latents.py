"""Cached clips: the VAE's posterior and the CLIP embedding of every frame, in one safetensors member of a shard.

Test: pytest tests/data/test_latents.py

A member <key>.safetensors holds `mean` and `std` (V, T, C, H, W), unscaled, and `tokens` (V, T, D), all of one type. V are
variants of the clip's pixels, 0 the plain one; T are all its frames, so that any window is cut as from the video.
Each frame has a crc32 in the index, because reading the whole member to check five frames of it would be no cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

from toolkit.errors import UserError

CACHE_FILE = "cache.json"  # beside the shards of a cache
Name = Literal["mean", "std", "tokens"]
NAMES: tuple[Name, ...] = ("mean", "std", "tokens")
MAX_HEADER_BYTES = 1 << 16
MAX_OPEN = 64  # shards of one process
_ALIGNMENT_BYTES = 64  # a cache line: tensors copied from there take a third less time
_TORCH = {"BF16": torch.bfloat16, "F32": torch.float32}


class LatentsError(ValueError):
    """A cached clip that is not what the format says, with the reason."""


class LatentsInfo(BaseModel):
    """What one cached clip holds, and where its tensors begin, in bytes from the start of the member."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    dtype: Literal["BF16", "F32"]
    variants: PositiveInt
    frames: PositiveInt
    latent_CHW: tuple[PositiveInt, PositiveInt, PositiveInt]
    token_dim: PositiveInt
    offsets: dict[Name, NonNegativeInt]
    frame_crc32: str = Field(pattern=r"^([0-9a-f]{8})*$")  # of a frame's mean, std and token together, row after row

    @functools.cached_property
    def shapes(self) -> dict[Name, tuple[int, ...]]:
        """Shape of one frame of each tensor."""
        return {"mean": self.latent_CHW, "std": self.latent_CHW, "tokens": (self.token_dim,)}

    @functools.cached_property
    def frame_bytes(self) -> dict[Name, int]:
        """Bytes of one frame of each tensor."""
        return {name: math.prod(shape) * _TORCH[self.dtype].itemsize for name, shape in self.shapes.items()}


@dataclass(frozen=True)
class Encoded:
    """A batch of windows as the encoders saw them: posterior of each frame, unscaled, and embeddings of the two ends."""

    mean_BTCHW: Tensor
    std_BTCHW: Tensor
    embeds_B2D: Tensor


class CacheInfo(BaseModel):
    """All that the latents of a folder depend on, and the content of its cache.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    base: str  # as it was named, for people; the two hashes are what counts
    vae: str
    image_encoder: str
    source: str  # the folder's name, for people
    source_fingerprint: str
    height: int
    width: int
    variants: int
    flip: bool
    random_crop: float
    precision: Literal["bf16", "fp32"]

    @property
    def key(self) -> str:
        """Name a cache by what it depends on: 8 hex digits."""
        return hashlib.sha256(self.model_dump_json(exclude={"base", "source"}).encode()).hexdigest()[:8]


class Window(NamedTuple):
    """One clip's window, as bytes of its shard: nothing is copied before the batch is put together."""

    mean_TX: np.ndarray  # uint8, a row a frame, as the two below
    std_TX: np.ndarray
    embeds_2X: np.ndarray
    info: LatentsInfo


def read_cache_info(folder: Path) -> CacheInfo | None:
    """Read a folder's cache.json; None if there is none. Raises UserError if it is damaged."""
    path = folder / CACHE_FILE
    try:
        return CacheInfo.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(f"{path} cannot be read ({error.errors()[0]['msg']}); make the cache again") from None


def pack_latents(mean_VTCHW: Tensor, std_VTCHW: Tensor, tokens_VTD: Tensor) -> bytes:
    """Write a cached clip; the tensors are bf16 or fp32, all alike."""
    data = save({"mean": mean_VTCHW, "std": std_VTCHW, "tokens": tokens_VTD})
    begin = 8 + int.from_bytes(data[:8], "little")
    padding = -begin % _ALIGNMENT_BYTES  # spaces behind the header are its own, by the format
    return (begin - 8 + padding).to_bytes(8, "little") + data[8:begin] + b" " * padding + data[begin:]


def describe(data: bytes) -> LatentsInfo:
    """Read what a member holds and sum its frames. Raises LatentsError."""
    header_bytes = int.from_bytes(data[:8], "little")
    if not 0 < header_bytes <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise LatentsError(f"a header of {header_bytes} bytes; up to {MAX_HEADER_BYTES} are read")
    try:
        tensors = dict(deserialize(data))  # refuses holes, overlaps and shapes that do not fit their bytes
        header = json.loads(data[8 : 8 + header_bytes])
        info = LatentsInfo(
            dtype=tensors["mean"]["dtype"],
            variants=tensors["mean"]["shape"][0],
            frames=tensors["mean"]["shape"][1],
            latent_CHW=tuple(tensors["mean"]["shape"][2:]),
            token_dim=tensors["tokens"]["shape"][-1],
            offsets={name: 8 + header_bytes + header[name]["data_offsets"][0] for name in NAMES},
            frame_crc32="",
        )
    except (SafetensorError, ValueError, KeyError, IndexError, RecursionError) as error:
        raise LatentsError(f"not a cached clip ({type(error).__name__}: {error})") from None
    for name in NAMES:
        shape = (info.variants, info.frames, *info.shapes[name])
        if (tensors[name]["dtype"], tuple(tensors[name]["shape"])) != (info.dtype, shape):
            raise LatentsError(f"{name} is {tensors[name]['dtype']} {tensors[name]['shape']}, not {info.dtype} {shape}")
    view = memoryview(data)
    sums = [_crc32(view[begin:end] for begin, end in _places(info, row)) for row in range(info.variants * info.frames)]
    return info.model_copy(update={"frame_crc32": "".join(sums)})


def stack(windows: Sequence[Window]) -> Encoded:
    """Copy clips' windows out of their shards into one batch."""
    info, B, T = windows[0].info, len(windows), len(windows[0].mean_TX)

    def make(name: Name, rows: int) -> np.ndarray:
        return np.empty((B, rows, info.frame_bytes[name]), np.uint8)

    mean_BTX, std_BTX, embeds_B2X = make("mean", T), make("std", T), make("tokens", 2)
    for b, (mean_TX, std_TX, embeds_2X, _) in enumerate(windows):
        mean_BTX[b], std_BTX[b], embeds_B2X[b] = mean_TX, std_TX, embeds_2X

    def shape(part_BTX: np.ndarray, name: Name) -> Tensor:
        return torch.from_numpy(part_BTX).view(_TORCH[info.dtype]).view(B, -1, *info.shapes[name])

    return Encoded(shape(mean_BTX, "mean"), shape(std_BTX, "std"), shape(embeds_B2X, "tokens"))


@dataclass
class LatentsReader:
    """Reads windows of cached clips: checked against their crc32 at first sight, from the mapped file afterwards.

    A frame is read and summed once by each process while its shard stays open; from then on the page cache is trusted.
    """

    _shards: dict[Path, tuple[np.ndarray, dict[int, _Member]]] = field(default_factory=dict)

    def read(self, shard: Path, offset: int, info: LatentsInfo, variant: int, frames: range) -> Window:
        """Read the frames of one variant of the member at `offset`. Raises LatentsError for bytes that changed."""
        try:
            if shard not in self._shards:
                if len(self._shards) == MAX_OPEN:  # each holds a descriptor; the order reads a few shards at a time
                    del self._shards[next(iter(self._shards))]
                self._shards[shard] = np.asarray(np.memmap(shard, np.uint8, "r")), {}
            data, members = self._shards[shard]
            member = members.get(offset)
            if member is None:
                member = members[offset] = _Member(data[offset:], info)
        except ValueError:  # nothing to map, or too few bytes for its rows
            raise LatentsError("its shard was cut since the start") from None
        first, last, step = variant * info.frames + frames[0], variant * info.frames + frames[-1], frames.step
        wanted = _bits(len(frames), step) << first
        if wanted & ~member.good:
            _check(shard, offset, info, range(first, last + 1, step))
            member.good |= wanted
        rows, ends = slice(first, last + 1, step), slice(first, last + 1, max(1, last - first))
        return Window(member.mean[rows], member.std[rows], member.tokens[ends], info)


class _Member:
    """The tensors of a member as they lie in the mapped tar, a row of bytes a frame, and which rows are known good."""

    __slots__ = ("mean", "std", "tokens", "good")

    def __init__(self, data: np.ndarray, info: LatentsInfo) -> None:
        rows = info.variants * info.frames
        self.mean, self.std, self.tokens = (
            data[info.offsets[n] : info.offsets[n] + rows * info.frame_bytes[n]].reshape(rows, -1) for n in NAMES
        )
        self.good = 0  # bit r for row r


def _check(shard: Path, offset: int, info: LatentsInfo, rows: range) -> None:
    """Read rows and sum them; a first read is also faster than faulting the pages of a mapping in."""
    with open(shard, "rb", buffering=0) as file:
        for row in rows:
            parts = [os.pread(file.fileno(), end - begin, offset + begin) for begin, end in _places(info, row)]
            if _crc32(parts) != info.frame_crc32[8 * row : 8 * row + 8]:
                raise LatentsError(f"frame {row % info.frames}: checksum differs from the index")


@functools.cache
def _bits(count: int, step: int) -> int:
    """An integer of `count` bits, `step` apart."""
    return sum(1 << i * step for i in range(count))


def _places(info: LatentsInfo, row: int) -> Iterator[tuple[int, int]]:
    """Begin and end in the member of one frame's mean, std and token."""
    for name in NAMES:
        begin = info.offsets[name] + row * info.frame_bytes[name]
        yield begin, begin + info.frame_bytes[name]


def _crc32(parts: Iterable[bytes | memoryview]) -> str:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"
