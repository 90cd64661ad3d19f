"""One training run, from a recipe to a finished run folder.

Test: pytest tests/run, tests/faults. Step s trains on positions [sG, (s+1)G) of the run's order with noise keyed by those
positions, so a killed run goes on exactly: the same command again loads the newest good checkpoint and its step.
"""

from __future__ import annotations

import itertools
import math
from contextlib import closing
from pathlib import Path

import torch

from toolkit.config import RunConfig, ScheduleConfig
from toolkit.data.loader import naming_dead_workers
from toolkit.engine.world import World, init_world
from toolkit.errors import UserError
from toolkit.model.dropout import adapter_dropout
from toolkit.run.checkpoint import save_checkpoint
from toolkit.run.debug import draw_batches
from toolkit.run.job import Job, build_job, make_batches
from toolkit.run.ledger import Ledger
from toolkit.run.monitor import Monitor

DEBUG_PICTURE = "samples/batch.png"


def train(config: RunConfig, fresh: bool = False) -> Path:
    """Train a recipe's LoRA to the end, resuming where an earlier start of it stopped. Returns the run folder."""
    world = init_world()
    job = build_job(config, world, fresh)
    if config.data.debug and world.is_main:
        picture = draw_batches(config.folder / DEBUG_PICTURE, job.framer, make_batches(config, job, world))
        print(f"the first clips as the network is fed them: {picture}")
    ledger = Ledger(config.folder, len(job.index), config.data.max_bad_fraction)
    with closing(make_monitor(config, job, world)) as monitor, naming_dead_workers():
        batches = monitor.timed(make_batches(config, job, world))
        for step in range(job.start, job.total):
            sums = torch.zeros(3, dtype=torch.float64, device=world.device)
            keys: list[str] = []
            for batch in itertools.islice(batches, job.accumulation):
                with adapter_dropout(job.framer.base.unet, config.seed, batch.positions):
                    loss_B, zero_B = job.framer.compute_loss(batch)
                    job.engine.backward(loss_B.mean())
                sums += torch.stack([loss_B.detach().sum(), zero_B.sum(), loss_B.new_tensor(len(batch.substitutes))])
                keys += batch.keys
                ledger.note(batch.substitutes)
            loss, zero, replaced = (total / config.engine.global_batch for total in world.all_reduce_sum(sums))
            if replaced:
                ledger.refuse_too_many(world)
            refuse_non_finite("loss", loss, step, world, keys)
            lr = learning_rate(config.schedule, config.optimizer.lr, step, job.total)
            grad_norm = job.engine.step(lr)
            refuse_non_finite("gradient norm", grad_norm, step, world, keys)
            monitor.report(step + 1, loss, zero, grad_norm, lr)
            if (step + 1) % config.checkpoint.every_steps == 0 or step + 1 == job.total:
                save(config, job, world, step + 1)
    job.engine.close()
    world.close()
    return config.folder


def make_monitor(config: RunConfig, job: Job, world: World) -> Monitor:
    """What reports the steps from the job's start to its end."""
    every, clips = config.log_every_steps, config.engine.global_batch
    return Monitor(config.folder, job.start, job.total, every, clips, world.is_main)


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, total: int) -> float:
    """Rate of step 0, 1, ...: linear warmup to the peak, then a half cosine to zero, or constant."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.shape == "constant":
        return peak
    progress = (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def save(config: RunConfig, job: Job, world: World, step: int) -> None:
    """Gather on every rank, write on the main one."""
    tensors = job.engine.gather()
    if world.is_main:
        unet, keep = job.framer.base.unet, config.checkpoint.keep
        save_checkpoint(config.folder, step, tensors, unet, job.identity, job.about, keep)
    world.barrier()


def refuse_non_finite(what: str, value: float, step: int, world: World, keys: list[str]) -> None:
    """Stop before a broken number is saved; the loss is checked before the weights move, the engine skips by itself."""
    if not math.isfinite(value):
        raise UserError(
            f"step {step + 1}, rank {world.rank}: {what} is {value}; clips {', '.join(keys)}; the weights were not "
            "changed by this step, and the last checkpoint is whole; look at these clips, or lower optimizer.lr"
        )
