"""Finds a learning rate: a short run whose rate rises until the loss does, scored at each step on the same clips and noise.

Test: pytest tests/commands/test_find_lr.py. What a step's own clips score says little: their noise levels change it by half,
a step by a hundredth. So other clips are scored beside them, always the same ones, with the same noise, at levels spread
over those of training: from one step to the next only the weights differ, and no smoothing is needed.
source  Smith 2017, "Cyclical learning rates for training neural networks", section 3.3; the rate rises by a factor each step
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

import torch

from toolkit.commands.curves import Point, chart, stack_charts
from toolkit.commands.doctor import examine
from toolkit.commands.launcher import program
from toolkit.config import RunConfig, load_config
from toolkit.data.files import try_place
from toolkit.data.index import DatasetIndex, open_sources
from toolkit.data.loader import Batch, MicroBatches
from toolkit.data.order import accumulation
from toolkit.engine.world import init_world
from toolkit.errors import UserError
from toolkit.model.base import PRECISIONS, load_base
from toolkit.model.dropout import adapter_dropout
from toolkit.run.attention import choose_kernel
from toolkit.run.cache import check_cache
from toolkit.run.checkpoint import replace_text
from toolkit.run.folder import RATE_FILES, find_adapter
from toolkit.run.framer import Framer
from toolkit.run.job import clip_settings, make_engine, make_framer
from toolkit.run.memory import choose_parts, choose_plan

LOWEST, HIGHEST = 1e-6, 1.0
WORSE = 4.0  # times the lowest loss so far: there it ends
BELOW = 10.0  # the suggested rate is so many times lower than the one at which the loss was lowest
LEAST_CLIPS = 8  # scored after each step
ROOM_BYTES = 1 << 20  # more than the two files take
SLIGHT = 1e-3  # a loss that falls by less than this share has not fallen


class Trial(NamedTuple):
    """A rate, and the loss on the scored clips after its step."""

    rate: float
    loss: float


def find_lr(recipe: str, steps: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Let a recipe's rate rise over fresh steps, and suggest one; only two small files are kept, in its run folder.

    returns  what find_lr.json holds: {suggested, lowest: {rate, loss}, start_loss, trials: [[rate, loss], ...], command}
    raises   UserError for what a run would refuse, where the files cannot be written, and where no rate lowers the loss
    """
    asked = load_config(recipe, dict(overrides))
    alone = {"kind": "plain", "deepspeed": None, "shard_ranks": None}
    config = asked.model_copy(update={"engine": asked.engine.model_copy(update=alone)})
    examine(config, 1)
    index = open_sources(config.data, "train")
    if index.cached:
        check_cache(config)
    try_place(config.folder, ROOM_BYTES, "free some space, or choose another --runs_dir")
    start, *trials = show_trials(try_rates(config, index, steps), steps)
    found, drawn = (config.folder / name for name in RATE_FILES)
    replace_text(drawn, stack_charts([draw(start.loss, trials)]))
    lowest = min(trials, key=lambda trial: trial.loss)
    learns = lowest.loss < (1 - SLIGHT) * start.loss
    suggested = float(f"{lowest.rate / BELOW:.1e}")
    flags = [part for name, value in overrides.items() if name != "optimizer.lr" for part in (f"--{name}", str(value))]
    command = [
        "python" if asked.engine.kind == "plain" else "deepspeed",  # which would start one process for each GPU
        program("launch/train.py"),
        "--config",
        recipe,
        *flags,
        "--optimizer.lr",
        f"{suggested:.1e}",
    ]
    if (config.folder / "config.yaml").exists():  # a run, which at another rate would be refused
        command.append("--fresh")
    report = {
        "suggested": suggested if learns else None,
        "lowest": lowest._asdict(),
        "start_loss": start.loss,
        "trials": trials,
        "command": shlex.join(command),
    }
    replace_text(found, json.dumps(report, indent=2) + "\n")
    if not learns:
        raise UserError(
            f"no rate from {LOWEST:g} to {trials[-1].rate:.2g} lowered the loss, {start.loss:.5f} before the first step, by "
            f"{SLIGHT:.1%} (see {drawn}); look by launch/doctor.py at what trains, or give it more --steps"
        )
    return report


def try_rates(config: RunConfig, index: DatasetIndex, steps: int) -> Iterator[Trial]:
    """Train as the recipe says but for its schedule, the rate rising from LOWEST to HIGHEST; yields what each step led to.

    The first, of rate 0, is before any step. It ends early where the loss is WORSE times the lowest, or no number.
    """
    world, engine, model = init_world(join=False), config.engine, config.model
    attention = choose_kernel(model.attention, config, world, PRECISIONS[engine.precision], choose_parts(config))
    base = load_base(model, world.device, engine.precision, encoders=not index.cached)
    plan = choose_plan(config, base.unet.config, base.latent_px, world, None if index.cached else base.vae_config)
    start = None if config.lora.init_from is None else find_adapter(config.lora.init_from)
    framer, adapter = make_framer(config, base, attention, plan, start)
    per_step = accumulation(engine.global_batch, engine.micro_batch, 1)
    trainer = make_engine(config, base.unet, adapter, per_step)
    settings = clip_settings(config)
    batches = MicroBatches(index, index.order(config.seed), settings, engine.global_batch, engine.micro_batch, 0, 1)
    scored = math.ceil(LEAST_CLIPS / engine.global_batch) * per_step
    fixed = [read(batches, steps * per_step + ordinal) for ordinal in range(scored)]  # those after the last step's
    lowest = score(framer, fixed)
    yield Trial(0.0, lowest)
    for step in range(steps):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (steps - 1))
        for ordinal in range(step * per_step, (step + 1) * per_step):
            batch = read(batches, ordinal)
            with adapter_dropout(base.unet, config.seed, batch.positions):
                trainer.backward(framer.weigh(framer.compute_loss(batch)))
        trainer.step(rate)
        loss = score(framer, fixed)
        if not math.isfinite(loss):
            return
        yield Trial(rate, loss)
        lowest = min(lowest, loss)
        if loss > WORSE * lowest:
            return


def read(batches: MicroBatches, ordinal: int) -> Batch:
    """Load a micro-batch. Raises UserError where its clips cannot be read."""
    batch = batches[ordinal]
    if isinstance(batch, UserError):
        raise batch
    return batch


@torch.no_grad()
def score(framer: Framer, batches: list[Batch]) -> float:
    """The mean loss of clips at as many noise levels, the middles of equally likely ranges; noise by their positions."""
    clips = sum(len(batch.positions) for batch in batches)
    sigma_N = framer.sigma_quantiles((torch.arange(clips) + 0.5) / clips)
    sizes = [len(batch.positions) for batch in batches]
    losses = [
        framer.compute_loss(batch, sigma_B=sigma_B).loss_B
        for batch, sigma_B in zip(batches, sigma_N.split(sizes), strict=True)
    ]
    return torch.cat(losses).double().mean().item()


def show_trials(trials: Iterator[Trial], steps: int) -> list[Trial]:
    """Collect them, with a bar that tells rate, loss and the time left."""
    from tqdm import tqdm

    made = []
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for trial in trials:
            made.append(trial)
            bar.set_postfix_str(f"rate {trial.rate:.1e}, loss {trial.loss:.5f}")
            bar.update(trial.rate > 0)
    if len(made) < 2:
        raise UserError(
            f"the first step, at a rate of {LOWEST:g}, made the loss no number; look the recipe over by doctor.py"
        )
    return made


def draw(start_loss: float, trials: list[Trial]) -> str:
    """The loss over the rate, until its rise would flatten its fall; and where it began."""
    losses = [trial.loss for trial in trials]
    lowest = losses.index(min(losses))
    most = start_loss + max(start_loss - losses[lowest], SLIGHT * start_loss)
    seen = [*trials[: lowest + 1], *takewhile(lambda trial: trial.loss <= most, trials[lowest + 1 :])]
    first, last = (round(math.log10(rate)) for rate in (LOWEST, HIGHEST))
    lines = {
        "after a step": [Point(math.log10(trial.rate), trial.loss) for trial in seen],
        "before the first": [Point(first, start_loss), Point(last, start_loss)],
    }
    return chart(
        "loss on the same clips and noise", lines, "learning rate", {n: f"1e{n}" for n in range(first, last + 1)}
    )


def tell(report: Mapping[str, Any]) -> str:
    """What to make of it, and the command that does."""
    rate, loss = report["lowest"].values()
    lines = [
        f"the loss fell from {report['start_loss']:.5f} to {loss:.5f} ({loss / report['start_loss'] - 1:.1%}), on the same "
        f"clips and noise; it was lowest at a rate of {rate:.1e}",
        f"suggested: optimizer.lr {report['suggested']:.1e}, a tenth of that: at that rate itself the loss is about to "
        "rise, and a run stays at its rate for longer",
    ]
    if rate == report["trials"][-1][0] and math.isclose(rate, HIGHEST):
        lines.append("the loss was still falling at the highest rate, so a higher one may do")
    return "\n".join([*lines, report["command"]])
