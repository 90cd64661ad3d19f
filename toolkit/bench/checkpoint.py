"""Times saving and resuming on two real ranks, beside DeepSpeed's own checkpoints of the same engine.

Test: pytest tests/bench/test_ranks.py. The published adapter without its network, through the run's own writer.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt

from toolkit.bench.ranks import AdapterAlone, answer, build_unet_on_meta, make_engine_of, run_on_ranks, take_step
from toolkit.config import CheckpointConfig, LoraConfig
from toolkit.engine.plain import State
from toolkit.engine.world import World
from toolkit.model.flat import FlatAdapter
from toolkit.model.lora import inject_lora
from toolkit.run.checkpoint import checkpoint_folder, checkpoint_step, load_checkpoint, newest_good
from toolkit.run.writer import CheckpointWriter

INTERVAL = 100


def bench_checkpoint(lora_rank: PositiveInt = 64, rounds: PositiveInt = 7) -> dict[str, Any]:
    """Save and resume both ways in turns, `rounds` times, on two ranks, with the engine that runs by default.

    returns  {trainable, step_s, interval, ours, deepspeed}. step_s is that of the adapter alone, the shortest a step can be.
             Each side {stall_s, stall_percent, background_s, slowed_s, size_mb, resume_s, exact}, medians: stall_s the loop
             stands still, which is stall_percent of `interval` such steps; background_s from then until the checkpoint is on
             disk, one step being taken meanwhile, and slowed_s what that step takes longer than step_s; resume_s from the
             search for a checkpoint to a fresh engine that stands at it; exact: that engine's masters and moments are those
             saved, to the bit
    raises   UserError when a rank fails
    """
    return run_on_ranks(__name__, 2, {"lora_rank": lora_rank, "rounds": rounds})


def measure(world: World, folder: Path, lora_rank: int, rounds: int) -> dict[str, Any]:
    """What bench_checkpoint returns, on this rank."""
    adapter = AdapterAlone(lora_rank, world.device)
    engine = make_engine_of("zero2", adapter)
    unet = build_unet_on_meta()
    inject_lora(unet, LoraConfig(rank=lora_rank, alpha=lora_rank), 0)
    writer = CheckpointWriter(folder / "ours", CheckpointConfig(keep=2)) if world.is_main else None
    times_s: dict[str, list[float]] = defaultdict(list)

    def clock(name: str, work: Callable[[], Any]) -> None:
        world.barrier()
        began_s = time.perf_counter()
        work()
        world.barrier()
        times_s[name].append(time.perf_counter() - began_s)

    def save(step: int) -> None:
        gathered = engine.gather()
        if writer is not None:
            writer.submit(step, adapter.flat.split(gathered), unet, {}, {})

    def finish(step: int) -> None:
        clock("step beside", partial(take_step, adapter, engine, step, world))
        if writer is not None:
            writer.wait()

    take_step(adapter, engine, 0, world)
    for step in range(1, rounds + 1):
        clock("step", partial(take_step, adapter, engine, 2 * step, world))
        saved = engine.gather()
        clock("save ours", partial(save, step))
        clock("write ours", partial(finish, 2 * step + 1))
        saved_after = engine.gather()
        clock("save deepspeed", partial(save_deepspeed, engine, folder))
    if writer is not None:
        writer.close()

    exact = {}
    for name, resume, wanted in (("ours", resume_ours, saved), ("deepspeed", resume_deepspeed, saved_after)):
        for _ in range(rounds):
            other = AdapterAlone(lora_rank, world.device)
            fresh = make_engine_of("zero2", other)
            clock(f"resume {name}", partial(resume, fresh, other.flat, folder, world))
            exact[name] = same(fresh.gather(), wanted)
            fresh.close()
    engine.close()

    medians_s = defaultdict(float, {name: statistics.median(values) for name, values in times_s.items()})
    step_s = medians_s["step"]
    return {
        "trainable": adapter.flat.flat.numel(),
        "step_s": step_s,
        "interval": INTERVAL,
    } | {
        name: {
            "stall_s": medians_s[f"save {name}"],
            "stall_percent": 100 * medians_s[f"save {name}"] / (INTERVAL * step_s),
            "background_s": medians_s[f"write {name}"],
            "slowed_s": medians_s["step beside"] - step_s if name == "ours" else 0.0,
            "size_mb": folder_mb(newest),
            "resume_s": medians_s[f"resume {name}"],
            "exact": exact[name],
        }
        for name, newest in (("ours", checkpoint_folder(folder / "ours", rounds)), ("deepspeed", folder / "theirs"))
    }


def save_deepspeed(engine: Any, folder: Path) -> None:
    """As its documentation saves an adapter: one folder, written over."""
    engine.engine.save_checkpoint(str(folder / "theirs"), tag="newest", exclude_frozen_parameters=True)


def resume_ours(engine: Any, flat: FlatAdapter, folder: Path, world: World) -> None:
    """The newest checkpoint whose hashes are right, chosen by the main rank, read by all."""
    newest = newest_good(folder / "ours", set_aside=True) if world.is_main else None
    step = world.broadcast_int(checkpoint_step(newest) if newest else 0)
    _, tensors = load_checkpoint(checkpoint_folder(folder / "ours", step))
    engine.scatter(flat.join(tensors), step)


def resume_deepspeed(engine: Any, flat: FlatAdapter, folder: Path, world: World) -> None:
    """What `latest` names, unverified."""
    engine.engine.load_checkpoint(str(folder / "theirs"), load_module_strict=False)


def same(a: State, b: State) -> bool:
    """Whether two states are equal to the bit."""
    return all(torch.equal(a[name][key], b[name][key]) for name in b for key in b[name])


def folder_mb(folder: Path) -> float:
    """Size of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    answer(measure)
