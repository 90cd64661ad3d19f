"""Times training steps, ours beside diffusers and PEFT as they come, on random weights and cached clips.

Test: pytest tests/bench/test_step.py. On a GPU the network of published size; on a CPU a tiny one, for ratios alone.
"""

from __future__ import annotations

import copy
import gc
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from toolkit.bench.counts import CASES, LORA, name_rung
from toolkit.bench.full import make_random_base, make_tiny_base, stopwatch
from toolkit.bench.loader import write_cached
from toolkit.config import LEAN, DataConfig, DiffusionConfig, EngineConfig, RunConfig
from toolkit.data.clips import ClipSettings
from toolkit.data.index import open_shards
from toolkit.data.loader import Batch, make_loader
from toolkit.engine.plain import PlainEngine
from toolkit.engine.world import init_world
from toolkit.errors import UserError, in_one_line
from toolkit.model.base import PRECISIONS, Base
from toolkit.model.flat import NAME
from toolkit.model.lora import inject_lora
from toolkit.model.prepare import Plan
from toolkit.run.attention import choose_kernel
from toolkit.run.framer import Framer
from toolkit.run.job import adam_settings, make_framer
from toolkit.run.memory import PLANS

ACCUMULATION = 8
# The arithmetic of framer_5_576 without recomputation, with one token: what MFU is a share of, whatever is computed
MODEL_TFLOP = {"framer_5_576": 18.02}
ATTENTION = re.compile("atten|flash|fmha|sdpa", re.IGNORECASE)
# bf16 without sparsity, by NVIDIA's data sheets
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989,
}  # fmt: skip

Maker = Callable[[Base], tuple[Framer, dict[str, Any]]]  # prepares a network; returns what trains too, by name


@dataclass
class Contender:
    """One way to train, ready to take steps."""

    framer: Framer
    engine: PlainEngine
    lr: float

    def score(self, clip: Batch) -> Tensor:
        """One micro-step; returns its loss."""
        loss = self.framer.compute_loss(clip).loss_B.mean()
        self.engine.backward(loss)
        return loss.detach()

    def take_step(self, clips: list[Batch]) -> Tensor:
        """One optimizer step of ACCUMULATION clips; returns its loss."""
        losses = [self.score(clip) for clip in clips]
        self.engine.step(self.lr)
        return torch.stack(losses).mean()


def bench_step(
    case: str = "framer_5_576", rounds: PositiveInt = 10, parts: bool = False, only: str | tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Time optimizer steps of 8 clips, all contenders on the same clips: in turns, or on a GPU one after another.

    case     of bench.py counts, by its name: layout, frames and pixels; a CPU takes layout and frames at 16 latents a side
    parts    `fast` with the first parts of model.blocks alone too, from none on
    only     these contenders; compiling one takes a minute and more
    returns  {device, case, kernel, data_wait_ms, loss: {contender: of its last step}, contenders: {stock, ours_fast,
             ours_balanced, ours_small: {ratio, attention}}}: kernel is what model.attention resolved to, data_wait_ms how
             long a clip was waited for, ratio a contender's time beside stock's, attention the names of the kernels that
             computed it. On a GPU a contender has {clip_s, mfu, launches, kernels_s, peak_allocated_gb, peak_reserved_gb}
             too: median seconds a clip, model FLOPs utilization, kernels of a micro-step and the seconds in which they
             ran, and peaks with its weights and state, in 1e9 bytes. What is allocated is that of steps launched kernel by
             kernel: what a replayed graph works in does not count as that. One that fails has {error} alone
    """
    if case not in CASES:
        raise UserError(f"case {case} is not known; give --case {', '.join(CASES)}")
    world = init_world(join=False)
    config = make_config(case, world.device)
    on_card = world.device.type == "cuda"
    names = [*list_makers(config, "sdpa", on_card, parts)]
    chosen = names if only is None else [only] if isinstance(only, str) else only
    if unknown := [name for name in chosen if name not in names]:
        raise UserError(f"--only {unknown[0]} is no contender here; give some of {', '.join(names)}")
    precision = PRECISIONS[config.engine.precision]
    attention = choose_kernel(config.model.attention, config, world, precision, LEAN)
    base = (make_random_base if on_card else make_tiny_base)(world.device, precision)
    base = replace(base, vae=None, image_encoder=None)  # cached clips need neither
    base.unet.cpu()  # what contenders are copies of takes none of their room
    makers = list_makers(config, attention, on_card, parts)
    makers = {name: makers[name] for name in chosen}
    launched = list_makers(with_model(config, cuda_graphs=False), attention, on_card, parts)
    # A card may have room for one alone, and keeps its speed; a CPU's drifts, so there they take turns
    groups = [{name: make} for name, make in makers.items()] if on_card else [makers]
    rows: dict[str, dict[str, Any]] = {}
    wait_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        write_clips(config, base, Path(folder))
        for group in groups:
            batches = read_clips(config, Path(folder))
            own_rows, own_wait_s = measure(group, config, base, batches, rounds, world.device)
            for name in group if on_card else ():
                if "error" not in own_rows[name]:
                    failed: dict[str, dict[str, Any]] = {}
                    with leaving_out_failed(name, {}, failed):
                        own_rows[name] |= measure_allocated(launched[name], config, base, Path(folder), world.device)
                    if failed:  # it may fit as graphs alone
                        own_rows[name]["peak_allocated_gb"] = None
            rows |= own_rows
            wait_s += own_wait_s
    card = torch.cuda.get_device_name() if on_card else "cpu"
    times_s = {name: row.pop("times_s") for name, row in rows.items() if "error" not in row}
    for name, own_s in times_s.items():
        if "stock" in times_s:
            rows[name]["ratio"] = statistics.median(a / b for a, b in zip(own_s, times_s["stock"], strict=True))
        if on_card:
            clip_s = statistics.median(own_s) / ACCUMULATION
            rows[name] |= {"clip_s": clip_s, "mfu": find_mfu(case, clip_s, card)}
    return {
        "device": card,
        "case": case,
        "kernel": attention,
        "data_wait_ms": wait_s / (len(groups) * rounds * ACCUMULATION) * 1e3,
        "loss": {name: rows[name].pop("loss") for name in times_s},
        "contenders": rows,
    }


def make_config(case: str, device: torch.device) -> RunConfig:
    """A recipe of a case's shape."""
    shape = CASES[case]
    layout: Any = "framer_clip" if case.startswith("framer") else "spec_middle"
    frames, factor = max(shape.frames, 3), 8 if device.type == "cuda" else 2
    height, width = (shape.height, shape.width) if device.type == "cuda" else (16, 16)
    return RunConfig(
        name="bench",
        lora=LORA if device.type == "cuda" else LORA.model_copy(update={"rank": 16, "alpha": 16}),
        data=DataConfig(shards="", frames=frames, height=height * factor, width=width * factor),
        diffusion=DiffusionConfig(layout=layout, clip_tokens="first_last" if shape.tokens == 2 else "first"),
        engine=EngineConfig(kind="plain", global_batch=ACCUMULATION),
    )


def list_makers(config: RunConfig, attention: str, on_card: bool, parts: bool = False) -> dict[str, Maker]:
    """Stock, ours with each memory plan, on a GPU the fastest compiled too, and if wanted with some parts alone."""
    makers: dict[str, Maker] = {"stock": partial(make_stock, config)}
    makers |= {f"ours_{plan}": partial(make_ours, config, attention, plan) for plan in PLANS}
    if on_card:
        compiled = with_model(config, compile=True)
        makers |= {f"ours_{PLANS[0]}_compiled": partial(make_ours, compiled, attention, PLANS[0])}
    rows = attention.removesuffix(" + triton")  # which is the last part
    for own in (LEAN[:i] for i in range(len(LEAN)) if parts):
        fewer = with_model(config, blocks=list(own))
        makers[name_rung(own)] = partial(make_ours, fewer, rows, PLANS[0])
    return makers


def with_model(config: RunConfig, **changes: Any) -> RunConfig:
    """The recipe with other fields of its model."""
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def make_contender(config: RunConfig, base: Base, make: Maker, device: torch.device) -> Contender:
    """One with a network of its own."""
    framer, parameters = make(replace(base, unet=copy.deepcopy(base.unet).to(device)))
    return Contender(framer, PlainEngine(parameters, adam_settings(config), ACCUMULATION), config.optimizer.lr)


def make_stock(config: RunConfig, base: Base) -> tuple[Framer, dict[str, Any]]:
    """diffusers' network with its own gradient checkpointing, and adapters in its precision injected by PEFT."""
    unet = base.unet
    parameters = inject_lora(unet, config.lora, config.seed)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(base.dtype)
    unet.enable_gradient_checkpointing()
    unet.train()
    return Framer(base, config.diffusion, config.data.frames, before=lambda tokens: None), parameters  # of one type


def make_ours(config: RunConfig, attention: str, plan: Plan, base: Base) -> tuple[Framer, dict[str, Any]]:
    """As a run prepares the network."""
    framer, adapter = make_framer(config, base, attention, plan)
    return framer, {NAME: adapter.flat}


def write_clips(config: RunConfig, base: Base, folder: Path) -> None:
    """Cached clips of noise, as shards."""
    data = config.data
    size = (data.frames, data.height // base.latent_px, data.width // base.latent_px)
    write_cached(folder / "shards", 4 * ACCUMULATION, size, base.unet.config.cross_attention_dim, base.latent_px)


def read_clips(config: RunConfig, folder: Path) -> Iterator[Batch]:
    """One clip at a time, as a run reads them, always in the same order."""
    data = config.data
    index = open_shards(folder / "shards", "train")
    settings = ClipSettings(data.frames, data.height, data.width)
    return make_loader(
        index, index.order(0), settings, start_step=0, stop_step=10**9, global_batch=ACCUMULATION, micro_batch=1
    )


def measure(
    makers: dict[str, Maker], config: RunConfig, base: Base, batches: Iterator[Batch], rounds: int, device: torch.device
) -> tuple[dict[str, dict[str, Any]], float]:
    """Make contenders and have them take turns: two rounds to warm up, then timed ones.

    returns  rows of what is measured, of all steps' seconds (times_s) and of the last one's loss; {error} alone of one that
             fails. And the seconds waited for clips
    """
    contenders: dict[str, Contender] = {}
    rows: dict[str, dict[str, Any]] = {}
    wait_s = 0.0
    clips = list(itertools.islice(batches, ACCUMULATION))
    for name, make in makers.items():
        with leaving_out_failed(name, contenders, rows):
            with measuring_memory(device) as row:
                contenders[name] = make_contender(config, base, make, device)
                for _ in range(2):
                    contenders[name].take_step(clips)
            rows[name] = row | trace(contenders[name], clips[0], device) | {"times_s": []}
    for number in tqdm(range(2 + rounds), desc=f"bench step, {', '.join(makers)}", unit="round"):
        began_s = time.perf_counter()
        clips = list(itertools.islice(batches, ACCUMULATION))
        wait_s += (time.perf_counter() - began_s) * (number > 1)
        for name, contender in [*contenders.items()]:
            with leaving_out_failed(name, contenders, rows):
                seconds, loss = stopwatch(partial(contender.take_step, clips), device)
                rows[name]["times_s"] += [seconds] * (number > 1)
                rows[name]["loss"] = loss.item()
    print(rows, file=sys.stderr)
    return rows, wait_s


def measure_allocated(
    make: Maker, config: RunConfig, base: Base, folder: Path, device: torch.device
) -> dict[str, float]:
    """On a GPU, the peak of what is allocated in two steps, in the second of which all of its state is there."""
    clips = list(itertools.islice(read_clips(config, folder), ACCUMULATION))
    with measuring_memory(device) as row:
        contender = make_contender(config, base, make, device)
        for _ in range(2):
            contender.take_step(clips)
    return {"peak_allocated_gb": row["peak_allocated_gb"]}


@contextmanager
def leaving_out_failed(name: str, contenders: dict[str, Contender], rows: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Whatever fails inside, of memory, a compiler, a kernel, ends one contender: what the others measure is not lost."""
    try:
        yield
    except Exception as error:
        rows[name] = {"error": in_one_line(error)}
        contenders.pop(name, None)


@contextmanager
def measuring_memory(device: torch.device) -> Iterator[dict[str, Any]]:
    """On a GPU, peaks of what is done inside, without what was there before."""
    row: dict[str, Any] = {}
    gc.collect()  # a contender of before, which refers to itself
    if device.type != "cuda":
        yield row
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    yield row
    row["peak_allocated_gb"] = (torch.cuda.max_memory_allocated() - allocated) / 1e9
    row["peak_reserved_gb"] = (torch.cuda.max_memory_reserved() - reserved) / 1e9


def trace(contender: Contender, clip: Batch, device: torch.device) -> dict[str, Any]:
    """What the profiler sees of one micro-step, but for what a compiler notes there of its own regions."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        stopwatch(lambda: contender.score(clip), device)
    events = [event for event in profiler.events() if not event.is_user_annotation]
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith(("Memcpy", "Memset"))]
    names = {event.name for event in kernels} or {e.name for e in events if e.name.startswith("aten::_")}
    row: dict[str, Any] = {"attention": sorted(name for name in names if ATTENTION.search(name))}
    if device.type == "cuda":
        row |= {"launches": len(kernels), "kernels_s": sum(k.time_range.elapsed_us() for k in kernels) / 1e6}
    return row


def find_mfu(case: str, clip_s: float, card: str) -> float | None:
    """Share of the card's peak that the arithmetic of the model takes; None where either is not known."""
    if case not in MODEL_TFLOP or card not in PEAK_TFLOPS:
        return None
    return MODEL_TFLOP[case] / clip_s / PEAK_TFLOPS[card]
