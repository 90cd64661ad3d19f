"""One training run, from a recipe to a finished run folder.

Test: pytest tests/run, tests/faults. Step s trains on positions [sG, (s+1)G) of the run's order with noise keyed by those
positions, so a killed run goes on exactly: the same command again loads the newest good checkpoint and its step.
"""

from __future__ import annotations

import itertools
import math
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch

from toolkit.config import RunConfig, ScheduleConfig, flatten_config
from toolkit.data.loader import Substitution, naming_dead_workers
from toolkit.engine.world import World, init_world, naming_lost_ranks
from toolkit.model.dropout import adapter_dropout
from toolkit.model.flat import NAME as FLAT
from toolkit.model.lora import adapted_layers
from toolkit.run.best import Best, losses_of
from toolkit.run.debug import draw_batches
from toolkit.run.folder import FREE_FIELDS, SOURCES
from toolkit.run.health import AdapterHealth
from toolkit.run.job import Job, build_job, make_batches
from toolkit.run.ledger import Ledger
from toolkit.run.monitor import Monitor
from toolkit.run.scores import SIGMA_BINS, Scores, gather_scores
from toolkit.run.signals import REQUEUE, REQUEUE_FILE, Requests, Wishes
from toolkit.run.skips import Skips
from toolkit.run.validate import Losses
from toolkit.run.watchdog import Watchdog
from toolkit.run.writer import Write

DEBUG_PICTURE = "samples/batch.png"
COMPILING_S = 1800  # what a slow host may take for all modules, beside engine.hang_timeout_s


def train(config: RunConfig, fresh: bool = False, allow_change: bool = False, requests: Requests | None = None) -> Path:
    """Train what a recipe names to the end, resuming where an earlier start of it stopped.

    fresh         start anew, and keep the old run folder aside
    allow_change  go on although the data or the recipe are not those that the run was begun with
    requests      what has noted signals since before this call, and goes on after it
    returns       the run folder
    raises        SystemExit(REQUEUE) where a signal asked for the end: all is saved, to be started again
    """
    # first: a signal that comes while all is loaded is obeyed too
    with nullcontext(requests) if requests is not None else Requests() as requests:
        world = init_world(hang_timeout_s=config.engine.hang_timeout_s + COMPILING_S * config.model.compile)
        with naming_lost_ranks(world):
            job = build_job(config, world, fresh, allow_change)
            if world.is_main:
                requests.drop_old(config.folder)
                print(f"loaded in {requests.age_s:.1f} s", flush=True)
            with Watchdog(config.folder, world.rank, world.size, config.engine.hang_timeout_s) as watchdog:
                if config.data.debug and world.is_main and job.resume.step < job.total:
                    picture = draw_batches(config.folder / DEBUG_PICTURE, job.framer, make_batches(config, job, world))
                    print(f"the first clips as the network is fed them: {picture}")
                yields = run_steps(config, job, world, requests, watchdog)
                if yields and world.is_main:
                    (config.folder / REQUEUE_FILE).touch()
                world.barrier()  # a launcher ends the others as soon as one has gone
        job.engine.close()
        world.close()
        if yields:
            raise SystemExit(REQUEUE)
        return config.folder


def run_steps(config: RunConfig, job: Job, world: World, requests: Requests, watchdog: Watchdog) -> bool:
    """Take the optimizer steps to the end, or until asked to stop; returns whether the run is to be started again."""
    ledger = Ledger(config.folder, len(job.index), config.data.max_bad_fraction, world)
    skips = Skips(config.folder, config.optimizer.max_skipped_steps, job.resume.skipped_in_a_row, world)
    best, wishes = Best(config.validation, job.resume.best, job.resume.best_step, job.resume.misses), Wishes(0, 0, 0)
    over = best.is_over
    with (
        closing(make_monitor(config, job, world)) as monitor,
        closing(job.writer) if job.writer is not None else nullcontext(),
        naming_dead_workers(),
    ):
        batches = monitor.timed(make_batches(config, job, world))
        if job.resume.step == 0:
            look(config, job, monitor, 0, watchdog)
        for step in range(job.resume.step, job.resume.step if over else job.total):
            watchdog.beat(COMPILING_S * (config.model.compile and step == job.resume.step))
            own: list[Scores] = []
            keys: list[list[str]] = []
            substitutes: list[Substitution] = []
            for batch in itertools.islice(batches, job.accumulation):
                with adapter_dropout(job.framer.base.unet, config.seed, batch.positions):
                    scores = job.framer.compute_loss(batch, monitor.timing)
                    with monitor.timing("backward"):
                        job.engine.backward(job.framer.weigh(scores))
                own.append(scores.detach())
                keys.append(batch.keys)
                substitutes += batch.substitutes
            asked = requests.read(config.folder if world.is_main else None)
            with monitor.timing("reduce"):
                step_scores, (replaced, *wished) = gather_scores(own, [len(substitutes), *asked], world)
            wishes = Wishes(*wished)
            if replaced:
                ledger.note(substitutes)
            loss = step_scores.loss_B.mean().item()
            lr = learning_rate(config.schedule, config.optimizer.lr, step, job.total)
            grad_norm = job.engine.step(lr, not math.isfinite(loss), monitor.timing)
            if job.averages is not None:
                with monitor.timing("optimizer"):
                    job.averages.follow(job.engine.updates)
            skips.note(step + 1, loss, grad_norm, [(k, one.loss_B) for k, one in zip(keys, own, strict=True)])
            losses, score = look(config, job, monitor, step + 1, watchdog)
            monitor.report(step + 1, step_scores, grad_norm, lr, step + 1 - job.engine.updates, ledger.bad, losses)
            better, over = best.note(step + 1, score), best.is_over
            ends = wishes.stop or wishes.yields or over or step + 1 == job.total
            if ends or wishes.save or better or is_due(config.checkpoint.every_steps, step + 1, job.total):
                with monitor.paused():
                    await_write(job, world, watchdog)
                    save(config, job, world, step + 1, skips.in_a_row, score, best.misses)
            if ends:
                break
        watchdog.beat()
        await_write(job, world, watchdog)
        if job.writer is not None:
            job.writer.wait()
        monitor.conclude(over)
    if over and world.is_main:
        found = (
            f"none better than step {best.step:,}, whose {config.validation.best_by} was {best.score}; it is kept: "
            "launch/export.py --checkpoint best"
            if best.score is not None
            else f"no {config.validation.best_by} that is a finite number"
        )
        print(f"ended early: {config.validation.patience} looks in a row gave {found}")
    if over or wishes == Wishes(0, 0, 0) or step + 1 == job.total:
        return False
    if world.is_main:
        print(f"ended after step {step + 1} as asked, saved; the same command again, without --fresh, goes on")
    return bool(wishes.yields) and not wishes.stop


def look(
    config: RunConfig, job: Job, monitor: Monitor, step: int, watchdog: Watchdog
) -> tuple[Losses | None, float | None]:
    """Validate what is due after a step, and show pictures; returns the losses and best_by's score, None where not due."""
    losses, figures, every = None, {}, config.validation
    beat = partial(watchdog.beat, COMPILING_S * config.model.compile)  # without gradients it is compiled anew
    with monitor.paused():
        if job.gallery is not None and is_due(every.figures_every_steps, step, job.total):
            figures = job.gallery.show(monitor, step, beat)
        if job.validator is not None and step and is_due(every.every_steps, step, job.total):
            losses = job.validator.measure(beat)
    if every.best_by == "loss":
        return losses, losses.held_out if losses is not None else None
    return losses, figures.get(every.best_by)


def make_monitor(config: RunConfig, job: Job, world: World) -> Monitor:
    """What reports the steps from the job's start to its end."""
    every, clips, at = config.log_every_steps, config.engine.global_batch, job.resume
    edges = job.framer.sigma_quantiles(torch.arange(1, SIGMA_BINS) / SIGMA_BINS).tolist()
    recipe = {
        name: value
        for name, value in flatten_config(config).items()
        if name in SOURCES or not name.startswith(FREE_FIELDS)
    }
    health = make_health(config, job) if world.is_main else None
    looks = losses_of(config)
    return Monitor(config.folder, at.step, at.k_next, job.total, every, clips, edges, health, recipe, looks, world)


def make_health(config: RunConfig, job: Job) -> AdapterHealth | None:
    """What watches the adapter's norms, where an engine leaves it whole on each rank."""
    if config.engine.kind in ("zero3", "fsdp2"):
        print(f"engine {config.engine.kind} shards the adapter, so its norms are not shown")
        return None
    layers = adapted_layers(job.framer.base.unet)
    return AdapterHealth(job.adapter, {name: layer.scaling["default"] for name, layer in layers.items()})


def is_due(every: int | None, step: int, total: int) -> bool:
    """Whether what happens every so many steps, and at the last one, happens after `step` of them."""
    return every is not None and (step % every == 0 or step == total)


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, total: int) -> float:
    """Rate of step 0, 1, ...: linear warmup to the peak, then a half cosine to zero, or constant."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.shape == "constant":
        return peak
    progress = (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def await_write(job: Job, world: World, watchdog: Watchdog) -> None:
    """Wait on every rank until the checkpoint before is written, however long that takes, as long as the write moves.

    Else the main rank alone would wait, and the others, at the next step, would take it for one that hangs.
    """
    while how := world.broadcast_int(job.writer.look() if job.writer is not None else Write.OVER):
        if how == Write.MOVES:
            watchdog.beat()


def save(
    config: RunConfig, job: Job, world: World, step: int, skipped_in_a_row: int, score: float | None, misses: int
) -> None:
    """Gather on the main rank, and hand over to its writer; every rank takes part.

    score   of a look at this step, if there was one
    misses  looks since the best, see best.py
    """
    finite = score is not None and math.isfinite(score)
    gathered = job.engine.gather()
    if job.writer is not None:
        state = job.identity | {
            "computed_by": job.computed_by,
            "updates": job.engine.updates, "skipped_in_a_row": skipped_in_a_row,
            "k_next": job.resume.k_next + (step - job.resume.step) * config.engine.global_batch, "seed": config.seed,
            "validation_look": job.look, "validation_score": score if finite else None,
            "validation_misses": misses,
            "ranks": world.size, "global_batch": config.engine.global_batch, "micro_batch": config.engine.micro_batch,
        }  # fmt: skip
        if job.averages is not None:
            gathered[FLAT] |= job.averages.copy()
        job.writer.submit(step, job.adapter.split(gathered), job.framer.base.unet, state, job.about)
