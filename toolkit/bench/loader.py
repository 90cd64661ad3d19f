"""Measures how fast clips are read, beside what people would use instead: one thread, warm cache, taking turns.

Test: pytest tests/bench/test_full.py (small). Everything is made in a temporary folder; figures go to docs/LEDGER.md.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import webdataset
from safetensors.torch import load
from tqdm import tqdm

from toolkit.authoring.synth import render_clip
from toolkit.data.clips import ClipSettings, draw_window
from toolkit.data.files import add_member
from toolkit.data.format import ClipInfo
from toolkit.data.index import DatasetIndex, open_shards
from toolkit.data.latents import pack_latents
from toolkit.data.loader import Batch, make_loader
from toolkit.data.video import write_video
from toolkit.rng import rng

BATCH = 8
FRAMES, STRIDE = 5, 4


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    cached_clips: int = 1000
    latent_px: int = 72
    video_px: int = 576
    video_frames: int = 120
    videos: int = 16
    order_clips: int = 100_000
    leak_clips: int = 5000
    rounds: int = 5


def bench_loader(scale: Scale = Scale()) -> dict[str, Any]:  # noqa: B008
    """Measure reading.

    returns  {cached_clips_per_s: {ours, webdataset, tarfile, ram}, decode_clips_per_s: {gop12, gop250: {ours, webdataset,
             naive}}, resume_ms, rss_growth_kb_per_clip}; medians over rounds in which all take turns
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name, tqdm(total=5, desc="bench loader", unit="part") as bar:
            folder = Path(name)
            report: dict[str, Any] = {"cached_clips_per_s": bench_cached(folder / "cached", scale)}
            bar.update()
            report["decode_clips_per_s"] = {}
            for gop in (12, 250):
                report["decode_clips_per_s"][f"gop{gop}"] = bench_decode(folder / f"gop{gop}", gop, scale)
                bar.update()
            report["resume_ms"] = bench_resume(folder / "cached", scale)
            bar.update()
            report["rss_growth_kb_per_clip"] = bench_growth(folder / "small", scale)
            bar.update()
            return report
    finally:
        torch.set_num_threads(threads)


# ---- cached clips


def bench_cached(folder: Path, scale: Scale) -> dict[str, float]:
    """Clips per second, in batches of BATCH with their fps and motion, of windows of 5 frames as the encoders left them.

    ours and ram come in random order; webdataset and tarfile read straight on, which is the best they can do
    """
    write_cached(folder, scale.cached_clips, (FRAMES, scale.latent_px, scale.latent_px))
    tar = folder / "train-000000.tar"
    rows = [load(data["safetensors"]) for data in read_tar(tar)]
    means, stds = (torch.stack([row[name][0] for row in rows]) for name in ("mean", "std"))
    embeds = torch.stack([row["tokens"][0, [0, -1]] for row in rows])
    numbers = torch.tensor([[7.5, 127.0]]).expand(len(rows), 2).tolist()
    shuffled = torch.randperm(len(rows), generator=rng(0, "bench")).tolist()

    def ram() -> Iterator[Any]:
        for picks in batched(shuffled):
            fps_B, motion_B = (torch.tensor([numbers[i][side] for i in picks]) for side in (0, 1))
            yield [torch.stack([part[i] for i in picks]) for part in (means, stds, embeds)], fps_B, motion_B

    def stream(samples: Iterable[dict[str, Any]]) -> Iterator[Any]:
        for group in batched(samples):
            tensors = [load(sample["safetensors"]) for sample in group]
            facts = [json.loads(sample["json"]) for sample in group]
            parts = [torch.stack([t["mean"][0] for t in tensors]), torch.stack([t["std"][0] for t in tensors])]
            parts.append(torch.stack([t["tokens"][0, [0, -1]] for t in tensors]))
            yield parts, torch.tensor([f["fps"] for f in facts]), torch.tensor([f["motion"] for f in facts])

    index = open_shards(folder, "train")
    ours = endless(index, ClipSettings(FRAMES, scale.latent_px * 8, scale.latent_px * 8))
    batches = scale.cached_clips // BATCH
    contenders: dict[str, Callable[[], Iterable[Any]]] = {
        "ours": lambda: itertools.islice(ours, batches),
        "webdataset": lambda: stream(webdataset.WebDataset(str(tar), shardshuffle=False)),
        "tarfile": lambda: stream(read_tar(tar)),
        "ram": ram,
    }
    return race(contenders, 5 * scale.rounds)  # a round of ours takes a twentieth of a second


def write_cached(folder: Path, clips: int, size: tuple[int, int, int], embed: int = 1024, latent_px: int = 8) -> None:
    """One shard of clips of random latents, as shards/cache.py writes them.

    size       frames, and height and width of their latents
    embed      numbers of a frame's CLIP token
    latent_px  pixels to a latent, along a side
    """
    folder.mkdir()
    generator = rng(0, "bench")
    frames, height, width = size
    shape = (1, frames, 4, height, width)
    clip = ClipInfo(fps=7.5, frames=frames, height=height * latent_px, width=width * latent_px)
    with tarfile.open(folder / "train-000000.tar", "w") as archive:
        for number in range(clips):
            mean, std, tokens = (
                torch.randn(size, generator=generator).bfloat16() for size in (shape, shape, (1, frames, embed))
            )
            add_member(archive, f"{number:06d}.safetensors", pack_latents(mean, std, tokens))
            add_member(archive, f"{number:06d}.json", clip.model_dump_json().encode())


# ---- videos


def bench_decode(folder: Path, gop: int, scale: Scale) -> dict[str, float]:
    """Clips per second, decoded to RGB, of the same windows of 5 frames, every 4th, from videos of that GOP length.

    webdataset decodes with PyAV up to the last wanted frame and converts those wanted, the best that a stock route does;
    naive decodes and converts whole videos, as torchvision's read_video
    """
    write_videos(folder, gop, scale)
    index = open_shards(folder, "train")
    settings, order = ClipSettings(FRAMES, scale.video_px, scale.video_px, strides=(STRIDE,)), index.order(0)
    tar, positions = folder / "train-000000.tar", range(len(index) // BATCH * BATCH)
    windows = {index.rows[order[k]].key: draw_window(index.rows[order[k]].clip, settings, 0, k)[0] for k in positions}

    def stream(whole: bool) -> Iterator[Any]:
        samples = webdataset.WebDataset(str(tar), shardshuffle=False)
        for group in batched(sample for sample in samples if sample["__key__"] in windows):
            clips = []
            for sample in group:
                window = windows[sample["__key__"]]
                with av.open(io.BytesIO(sample["mp4"]), "r") as container:
                    container.streams.video[0].thread_count = 1
                    decoded = itertools.islice(container.decode(video=0), None if whole else window[-1] + 1)
                    frames = {
                        i: frame.to_ndarray(format="rgb24") for i, frame in enumerate(decoded) if whole or i in window
                    }
                clips.append(np.stack([frames[i] for i in window]))
            yield torch.from_numpy(np.stack(clips))

    contenders: dict[str, Callable[[], Iterable[Any]]] = {
        "ours": lambda: itertools.islice(endless(index, settings), len(positions) // BATCH),
        "webdataset": lambda: stream(whole=False),
        "naive": lambda: stream(whole=True),
    }
    return race(contenders, scale.rounds)


def write_videos(folder: Path, gop: int, scale: Scale) -> None:
    """One shard of rendered people signing."""
    folder.mkdir()
    size = scale.video_px
    clip = ClipInfo(fps=30, frames=scale.video_frames, height=size, width=size)
    with tarfile.open(folder / "train-000000.tar", "w") as archive:
        for number in range(scale.videos):
            video = io.BytesIO()
            write_video(video, render_clip(0, number, scale.video_frames, size), 30, gop=gop)
            add_member(archive, f"{number:06d}.mp4", video.getvalue())
            add_member(archive, f"{number:06d}.json", clip.model_dump_json().encode())


# ---- starting again, and leaks


def bench_resume(folder: Path, scale: Scale) -> float:
    """Milliseconds from an open index to the first batch at 90 % of an epoch, less what a batch takes anyway."""
    few = open_shards(folder, "train")
    times = -(-scale.order_clips // len(few))
    index = replace(
        few,
        shards=few.shards * times,
        rows=few.rows * times,
        sources=tuple(replace(source, shard_sizes=source.shard_sizes * times) for source in few.sources),
    )
    settings = ClipSettings(FRAMES, scale.latent_px * 8, scale.latent_px * 8)
    start = len(index) * 9 // 10 // BATCH
    taken: list[float] = []
    for _ in range(scale.rounds):
        began_s = time.perf_counter()
        batches = endless(index, settings, start)
        next(batches)
        first_s = time.perf_counter() - began_s
        began_s = time.perf_counter()
        next(batches)
        taken.append(first_s - (time.perf_counter() - began_s))
    return round(1000 * statistics.median(taken), 3)


def bench_growth(folder: Path, scale: Scale) -> float:
    """Kilobytes by which the process grows per decoded clip, after a tenth of them as warm-up: slope of its own memory."""
    write_videos(folder, 12, replace(scale, video_px=64, video_frames=24))
    batches = endless(open_shards(folder, "train"), ClipSettings(FRAMES, 64, 64, strides=(STRIDE,)))
    seen: list[tuple[int, int]] = []
    for number, _ in enumerate(itertools.islice(batches, scale.leak_clips // BATCH)):
        if number * BATCH >= scale.leak_clips // 10:
            seen.append((number * BATCH, own_memory_kb()))
    clips, memory_kb = np.array(seen).T
    return round(float(np.polyfit(clips, memory_kb, 1)[0]), 4)


def own_memory_kb() -> int:
    """Resident memory without mapped files, which are the page cache's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


# ---- common


def endless(index: DatasetIndex, settings: ClipSettings, start: int = 0) -> Iterator[Batch]:
    """Our own batches from a step on, as training takes them."""
    return make_loader(
        index, index.order(0), settings, start_step=start, stop_step=10**9, global_batch=BATCH, micro_batch=BATCH
    )


def race(contenders: dict[str, Callable[[], Iterable[Any]]], rounds: int) -> dict[str, float]:
    """Clips per second of each: the median over rounds in which all take turns, after one round to warm up."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, make in contenders.items():
            began_s = time.perf_counter()
            count = sum(BATCH for _ in make())
            if number:
                speeds[name].append(count / (time.perf_counter() - began_s))
    return {name: round(statistics.median(found), 1) for name, found in speeds.items()}


def batched(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Whole groups of BATCH."""
    iterator = iter(items)
    while len(group := list(itertools.islice(iterator, BATCH))) == BATCH:
        yield group


def read_tar(tar: Path) -> Iterator[dict[str, bytes]]:
    """The samples of a shard as tarfile reads them on."""
    with tarfile.open(tar, "r:") as archive:
        sample: dict[str, bytes] = {}
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            sample[member.name.partition(".")[2]] = file.read()
            if "json" in sample:
                yield sample
                sample = {}
