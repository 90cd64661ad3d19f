"""Cached clips are read back bit for bit, and no changed byte passes. Run: pytest tests/data/test_latents.py"""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset
from torch import Tensor

from toolkit.data.clips import ClipSettings, load_cached
from toolkit.data.format import BadSample, build_index
from toolkit.data.index import DatasetIndex, open_shards
from toolkit.data.latents import MAX_HEADER_BYTES, MAX_OPEN, LatentsError, LatentsReader, describe, pack_latents, stack
from toolkit.errors import UserError

V, T, CHW, D = 2, 9, (4, 3, 5), 6


def make_tensors(number: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    shapes = {"mean": (V, T, *CHW), "std": (V, T, *CHW), "tokens": (V, T, D)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_shard(folder: Path, members: list[tuple[str, bytes]]) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "train-000000.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


def sidecar(frames: int = T) -> bytes:
    return json.dumps({"fps": 30, "frames": frames, "height": 24, "width": 40, "motion": 99}).encode()


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[DatasetIndex, list[dict[str, Tensor]]]:
    """Three cached clips in a shard, and their tensors."""
    clips = [make_tensors(number, request.param) for number in range(3)]
    members = []
    for number, tensors in enumerate(clips):
        data = pack_latents(tensors["mean"], tensors["std"], tensors["tokens"])
        members += [(f"{number}.safetensors", data), (f"{number}.json", sidecar())]
    return open_shards(write_shard(tmp_path / "shards", members), "train"), clips


def test_any_window_is_a_slice_of_the_tensors(shards: tuple[DatasetIndex, list[dict[str, Tensor]]]) -> None:
    """Every variant, start and stride, in one batch of all clips, is what indexing the tensors gives."""
    index, clips = shards
    reader = LatentsReader()
    for step in (1, 2, 4):
        for start in range(T - 2 * step):
            frames = range(start, start + 2 * step + 1, step)
            for variant in range(V):
                windows = [
                    reader.read(index.shards[i], row.members["safetensors"].offset, row.latents, variant, frames)
                    for i, row in enumerate(index.rows)
                ]
                found = stack(windows)
                for b, tensors in enumerate(clips):
                    assert torch.equal(found.mean_BTCHW[b], tensors["mean"][variant, list(frames)])
                    assert torch.equal(found.std_BTCHW[b], tensors["std"][variant, list(frames)])
                    assert torch.equal(found.embeds_B2D[b], tensors["tokens"][variant, [frames[0], frames[-1]]])


def test_stock_libraries_read_them(shards: tuple[DatasetIndex, list[dict[str, Tensor]]]) -> None:
    """safetensors and webdataset see the same tensors, and those begin on a cache line."""
    index, clips = shards
    tar = index.shards[0]
    for sample, tensors in zip(webdataset.WebDataset(str(tar), shardshuffle=False), clips, strict=True):
        found = safetensors.torch.load(sample["safetensors"])
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
    for row in index.rows:
        assert row.latents is not None and (row.latents.variants, row.latents.frames) == (V, T)
        assert (row.members["safetensors"].offset + row.latents.offsets["mean"]) % 64 == 0


def test_a_changed_byte_is_seen_in_its_frame_only(shards: tuple[DatasetIndex, list[dict[str, Tensor]]]) -> None:
    """A flipped bit in any frame's mean, std or token spoils the windows that hold it, and no other."""
    index, _ = shards
    row = index.rows[1]
    info, offset = row.latents, row.members["safetensors"].offset
    assert info is not None
    pristine = bytearray(index.shards[0].read_bytes())
    for name in info.frame_bytes:
        for frame in range(T):
            damaged = bytearray(pristine)
            damaged[offset + info.offsets[name] + (T + frame) * info.frame_bytes[name] + 1] ^= 4
            index.shards[0].write_bytes(damaged)
            for start in range(T - 2):
                reader, frames = LatentsReader(), range(start, start + 3)
                if frame in frames:
                    with pytest.raises(LatentsError, match=f"frame {frame}: checksum"):
                        reader.read(index.shards[0], offset, info, 1, frames)
                else:
                    reader.read(index.shards[0], offset, info, 1, frames)
                reader.read(index.shards[0], offset, info, 0, frames)


def test_a_bad_frame_is_a_bad_sample(shards: tuple[DatasetIndex, list[dict[str, Tensor]]]) -> None:
    """The loader hears of key and offset, as for a video."""
    index, _ = shards
    row = index.rows[2]
    with open(index.shards[2], "r+b") as file:
        file.seek(row.members["safetensors"].offset + row.latents.offsets["std"] + 3)
        file.write(b"\xff")
    settings = ClipSettings(T, 24, 40)
    load_cached(index, 0, settings, 0, 0, LatentsReader())
    with pytest.raises(BadSample, match=rf"2.safetensors at offset {row.members['safetensors'].offset}: frame 0"):
        load_cached(index, 2, settings, 0, 0, LatentsReader())


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


GOOD = make_tensors(0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        with_header(b"{}"),
        with_header(b"[" * 5000),
        with_header(b" " * (MAX_HEADER_BYTES + 1)),
        (1 << 62).to_bytes(8, "little") + b"{}",
        safetensors.torch.save({name: GOOD[name] for name in ("mean", "std")}),
        safetensors.torch.save({**GOOD, "std": GOOD["std"][:, 1:].contiguous()}),
        safetensors.torch.save({**GOOD, "std": GOOD["std"].float()}),
        safetensors.torch.save({name: tensor.half() for name, tensor in GOOD.items()}),
        safetensors.torch.save({**GOOD, "tokens": GOOD["tokens"][..., None]}),
        safetensors.torch.save({**GOOD, "mean": torch.tensor(1.0).bfloat16()}),
        safetensors.torch.save(GOOD)[:-1],
        safetensors.torch.save(GOOD) + b"\0",
    ],
)
def test_what_is_no_cached_clip_is_refused(data: bytes, tmp_path: Path) -> None:
    """Cut, bloated, nested or misshapen members give one sentence, alone and while a shard is indexed."""
    with pytest.raises(LatentsError):
        describe(data)
    folder = write_shard(tmp_path / "s", [("a.safetensors", data), ("a.json", sidecar())])
    with pytest.raises(UserError, match="sample a cannot be indexed"):
        build_index(folder / "train-000000.tar")


def test_frames_must_agree_with_the_sidecar(tmp_path: Path) -> None:
    """A clip that says it has more frames than are cached would be read beyond its end."""
    data = pack_latents(GOOD["mean"], GOOD["std"], GOOD["tokens"])
    folder = write_shard(tmp_path / "s", [("a.safetensors", data), ("a.json", sidecar(T + 1))])
    with pytest.raises(UserError, match=f"has {T} frames, a.json says {T + 1}"):
        build_index(folder / "train-000000.tar")


def test_clips_of_several_shapes_do_not_mix(tmp_path: Path) -> None:
    """A batch takes its shape from its first clip, so all of a run's must be alike."""
    for number, part in enumerate(({}, {"mean": (V, T, 4, 5, 3), "std": (V, T, 4, 5, 3)})):
        tensors = make_tensors(number)
        tensors |= {name: tensors[name].reshape(shape) for name, shape in part.items()}
        data = pack_latents(tensors["mean"], tensors["std"], tensors["tokens"])
        folder = write_shard(tmp_path / str(number), [("a.safetensors", data), ("a.json", sidecar())])
        (folder / "train-000000.tar").rename(tmp_path / f"train-{number}.tar")
    with pytest.raises(
        UserError, match=r"train-0.tar holds latents \('BF16', \(4, 3, 5\), 6\).*cache all sources alike"
    ):
        open_shards(tmp_path, "train")


def test_a_shard_that_is_cut_in_a_run_holds_bad_samples(shards: tuple[DatasetIndex, list[dict[str, Tensor]]]) -> None:
    """Wherever it is cut within a clip, down to nothing, for a reader that has not opened it yet."""
    index, _ = shards
    tar, row = index.shards[0], index.rows[0]
    begin = row.members["safetensors"].offset + row.latents.offsets["mean"]
    end = row.members["safetensors"].offset + row.members["safetensors"].size_bytes
    data = tar.read_bytes()
    for size_bytes in (0, 1, begin, begin + 1, *range(begin + 100, end, 97), end - 1):
        tar.write_bytes(data[:size_bytes])
        with pytest.raises(BadSample, match=r"0\.safetensors at offset \d+: (its shard was cut|frame \d: checksum)"):
            load_cached(index, 0, ClipSettings(T, 24, 40), 0, 0, LatentsReader())
    tar.write_bytes(data)
    load_cached(index, 0, ClipSettings(T, 24, 40), 0, 0, LatentsReader())


def test_many_shards_need_few_descriptors(tmp_path: Path) -> None:
    """Over 200 shards the reader keeps MAX_OPEN of them open, and reads each as well the second time."""
    data = pack_latents(GOOD["mean"], GOOD["std"], GOOD["tokens"])
    folder = write_shard(tmp_path / "s", [("a.safetensors", data), ("a.json", sidecar())])
    for number in range(1, 200):
        shutil.copy(folder / "train-000000.tar", folder / f"train-{number:06d}.tar")
    index, reader = open_shards(folder, "train"), LatentsReader()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for sample in range(len(index)):
            load_cached(index, sample, ClipSettings(3, 24, 40), 0, sample, reader)
            assert len(os.listdir("/proc/self/fd")) <= before + MAX_OPEN + 1
