"""Where the time of an optimizer step goes, and what bounds it: data, another rank, launching, or computing.

Test: pytest tests/run/test_timings.py. On a GPU a phase lasts from one CUDA event in the main stream to another: so long the
main work stands in it. A wait for a clip counts as far as nothing is left to compute meanwhile, and the encoders as far as
they do not run beside the step before. Events are read a step later, when the GPU has passed them: nothing waits for it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

# reduce: the ranks meet and sum up their gradients; zero3 and fsdp2 move weights in forward and backward as well, and
# fsdp2 its gradients in the last backward
PHASES = ("data", "encode", "forward", "backward", "reduce", "optimizer", "other")
PAUSE = "pause"  # a phase that is not the step's
DATA_SHARE = 0.1  # of a step spent waiting for clips, from which on it is data-bound
REDUCE_SHARE = 0.1  # of a step spent meeting other ranks, from which on it is bound by the slowest or by the way there
LAG_SHARE = 0.1  # of a micro-step: a GPU that is less behind the host has waited for work
ENCODE_SHARE = 0.1  # of a step spent encoding, from which on a cache is worth a word

Bound = Literal["data", "rank", "launch", "compute"]
ADVICE: dict[Bound, str] = {
    "data": "clips come too slowly: raise data.workers, or encode them once with shards/cache.py",
    "rank": "this rank waits for a slower one, or for the network between them: raise data.workers, look at what else runs "
    "there, or raise engine.global_batch to meet less often",
    "launch": "the GPU waits for the host to launch its work: keep model.cuda_graphs on, try model.compile, or raise "
    "engine.micro_batch",
    "compute": "nothing waits: a faster card, more ranks, or, where less memory is used than there is, model.memory fast",
}


class Moment(NamedTuple):
    """When the host was at a place in a step, and what a GPU notes when it gets there."""

    host_s: float
    event: torch.cuda.Event | None


Clock = Callable[[Moment, Moment], float]


def host_clock(began: Moment, ended: Moment) -> float:
    """Seconds of the host between two moments."""
    return ended.host_s - began.host_s


def gpu_clock(began: Moment, ended: Moment) -> float:
    """Seconds of the GPU between two moments, both of which it has passed."""
    assert began.event is not None and ended.event is not None
    return began.event.elapsed_time(ended.event) / 1e3


@dataclass
class Step:
    """The moments of one optimizer step."""

    began: Moment
    spans: list[tuple[str, Moment, Moment]] = field(default_factory=list)
    ended: Moment | None = None


@dataclass(frozen=True)
class Spent:
    """Seconds of optimizer steps by phase, pauses left out.

    lag_s   summed over the steps: how far the GPU was behind when the host had issued the last backward pass; inf on a CPU,
            which computes before it goes on
    passes  backward passes, one a micro-step
    """

    parts_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    lag_s: float = 0.0
    steps: int = 0
    passes: int = 0

    @property
    def total_s(self) -> float:
        return sum(self.parts_s.values())

    def __add__(self, other: Spent) -> Spent:
        parts_s = {phase: self.parts_s[phase] + other.parts_s[phase] for phase in PHASES}
        return Spent(parts_s, self.lag_s + other.lag_s, self.steps + other.steps, self.passes + other.passes)

    def find_bound(self) -> Bound | None:
        """What the steps waited for most that could be otherwise; None of no steps."""
        if not self.steps:
            return None
        if self.parts_s["data"] > DATA_SHARE * self.total_s:
            return "data"
        if self.parts_s["reduce"] > REDUCE_SHARE * self.total_s:
            return "rank"
        micro_step_s = sum(self.parts_s[phase] for phase in ("encode", "forward", "backward")) / max(1, self.passes)
        # a queue of kernels that the GPU is behind with holds a good part of a micro-step, or a captured one whole
        return "launch" if self.lag_s / self.steps < LAG_SHARE * micro_step_s else "compute"

    def describe(self) -> str:
        """One sentence on all steps: what bounds them, where their time goes, what to do."""
        bound = self.find_bound()
        if bound is None:
            return "no step was timed"
        shares = ", ".join(f"{phase} {self.parts_s[phase] / self.total_s:.0%}" for phase in PHASES)
        cache = self.parts_s["encode"] > ENCODE_SHARE * self.total_s
        return f"{bound}-bound, {self.total_s / self.steps:.3g} s a step ({shares}); {ADVICE[bound]}" + (
            "; shards/cache.py takes the encoding out" if cache and bound != "data" else ""
        )


class Timings:
    """Notes the phases of one step after the other."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._step = Step(self._now())
        self._unread: Step | None = None  # the step before, which a GPU may not have ended yet

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens in here is one of PHASES, or a PAUSE."""
        began = self._now()
        yield
        self._step.spans.append((name, began, self._now()))

    def end_step(self) -> tuple[Spent, Spent]:
        """End a step and begin the next, after the host has read something that the GPU computed in this one.

        returns  what the step took by the host's clock; and what the newest step took whose times are known: on a CPU this
                 one, on a GPU the one before by the GPU's clock, or nothing
        """
        ended = self._step
        ended.ended = self._now()
        self._step = Step(ended.ended)
        own = read_step(ended, host_clock)
        if not self.on_gpu:
            return own, own
        before, self._unread = self._unread, ended
        return own, read_step(before, gpu_clock) if before is not None else Spent()

    def _now(self) -> Moment:
        event = torch.cuda.Event(enable_timing=True) if self.on_gpu else None
        if event is not None:
            event.record()
        return Moment(time.monotonic(), event)


def read_step(step: Step, clock: Clock) -> Spent:
    """What a step took by a clock."""
    assert step.ended is not None
    spent_s = dict.fromkeys((*PHASES, PAUSE), 0.0)
    for phase, began, ended in step.spans:
        spent_s[phase] += clock(began, ended)
    spent_s["other"] = clock(step.began, step.ended) - sum(spent_s.values())
    parts_s = {phase: spent_s[phase] for phase in PHASES}
    issued = [ended for phase, _, ended in step.spans if phase == "backward"]
    lag_s = math.inf
    if clock is gpu_clock and issued:
        lag_s = clock(step.began, issued[-1]) - host_clock(step.began, issued[-1])
    return Spent(parts_s, lag_s, 1, len(issued))
