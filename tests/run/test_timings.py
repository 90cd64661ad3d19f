"""A step's time is told apart, and what bounds it is found. Run: pytest tests/run/test_timings.py"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from toolkit.run import timings
from toolkit.run.timings import PAUSE, PHASES, Moment, Spent, Step, Timings, gpu_clock, host_clock, read_step

QUEUE = 1024  # kernels that a host may be ahead of its GPU


@dataclass
class Event:
    """What a CUDA event tells once the GPU has passed it."""

    at_s: float

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at_s - self.at_s)


class Machine:
    """A host that issues kernels and a GPU that runs them in order, each in its own time."""

    def __init__(self, issue_s: float, kernel_s: float) -> None:
        self.issue_s, self.kernel_s = issue_s, kernel_s
        self.host_s = 0.0
        self.ends_s = [0.0]

    def compute(self, kernels: int) -> None:
        for _ in range(kernels):
            self.host_s += self.issue_s
            if len(self.ends_s) > QUEUE:
                self.host_s = max(self.host_s, self.ends_s[-QUEUE])
            self.ends_s.append(max(self.ends_s[-1], self.host_s) + self.kernel_s)

    def synchronise(self) -> None:
        self.host_s = max(self.host_s, self.ends_s[-1])

    def now(self) -> Moment:
        return Moment(self.host_s, Event(max(self.ends_s[-1], self.host_s)))  # type: ignore[arg-type]

    def take_step(self, micro_steps: int, kernels: int, wait_s: float) -> Step:
        step = Step(self.now())
        for _ in range(micro_steps):
            for phase, share in {"data": 0, "encode": 0.1, "forward": 0.3, "backward": 0.6}.items():
                began = self.now()
                self.host_s += wait_s if phase == "data" else 0
                self.compute(round(share * kernels))
                step.spans.append((phase, began, self.now()))
        self.synchronise()
        began = self.now()
        self.compute(5)
        self.synchronise()
        step.spans.append(("optimizer", began, self.now()))
        step.ended = self.now()
        return step


@pytest.mark.parametrize("micro_steps", [1, 8, 64])
@pytest.mark.parametrize(
    ("issue_us", "kernel_us", "kernels", "bound"),
    [
        (10, 5, 3000, "launch"),
        (10, 9, 3000, "launch"),
        (10, 20, 3000, "compute"),  # the queue is full, so the host is hardly ahead of a step of many micro-steps
        (10, 12, 3000, "compute"),
        (10, 20_000, 10, "compute"),  # captured as one
    ],
)
def test_bound_is_what_the_gpu_waits_for(
    micro_steps: int, issue_us: int, kernel_us: int, kernels: int, bound: str
) -> None:
    """Launch-bound where a kernel takes longer to issue than to run, for few micro-steps and many, short queues and full.

    A wait for clips counts as far as the GPU has nothing left to do meanwhile.
    """
    machine = Machine(issue_us / 1e6, kernel_us / 1e6)
    spent = read_step(machine.take_step(micro_steps, kernels, 0.0), gpu_clock)
    assert spent.find_bound() == bound, spent
    assert (spent.steps, spent.passes) == (1, micro_steps)
    late = machine.take_step(micro_steps, kernels, 2 * spent.total_s / micro_steps)
    assert read_step(late, gpu_clock).find_bound() == "data"
    if bound == "compute" and kernels == 10 and micro_steps > 1:  # a wait of half a micro-step, after all is queued
        hidden = machine.take_step(micro_steps, kernels, spent.total_s / micro_steps / 2)
        assert read_step(hidden, gpu_clock).parts_s["data"] < read_step(hidden, host_clock).parts_s["data"] / 2


def test_a_cpu_is_never_bound_by_launches() -> None:
    """It has computed what it goes on from; it waits for clips, or for nothing."""
    for wait_s, bound in ((0.0, "compute"), (1.0, "data")):
        step = Machine(0.001, 0.001).take_step(2, 100, wait_s)
        assert read_step(step, host_clock).find_bound() == bound
    assert Spent().find_bound() is None


def test_parts_make_up_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is of one phase; what is in none is other, what is in a pause is left out, and the next step begins there."""
    now_s = 0.0

    def spend(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr(timings.time, "monotonic", lambda: now_s)
    noted = Timings(torch.device("cpu"))
    for scale in (1, 10):
        for seconds, phase in (
            (1, "data"),
            (2, "forward"),
            (4, "backward"),
            (8, "data"),
            (16, "optimizer"),
            (32, PAUSE),
        ):
            with noted.phase(phase):
                spend(scale * seconds)
            spend(scale * 64)
        own, known = noted.end_step()
        wanted = dict.fromkeys(PHASES, 0) | {
            "data": 9, "forward": 2, "backward": 4, "optimizer": 16, "other": 6 * 64
        }  # fmt: skip
        assert own == known and own.parts_s == {phase: scale * value for phase, value in wanted.items()}
    both = own + known
    assert (both.steps, both.passes, both.total_s) == (2, 2, 2 * own.total_s)


def test_the_sentence_at_the_end() -> None:
    """One line: the bound, each share, and what to do about it; of encoders that take long as well."""

    def tell(**parts_s: float) -> str:
        return Spent(dict.fromkeys(PHASES, 0.0) | parts_s, lag_s=1.0, steps=10, passes=80).describe()

    assert tell(data=5, forward=5).startswith("data-bound, 1 s a step (data 50%, encode 0%, forward 50%, ")
    assert "data.workers" in tell(data=5, forward=5) and "launch" not in tell(data=5, forward=5)
    assert tell(reduce=5, forward=5).startswith("rank-bound") and "network" in tell(reduce=5, forward=5)
    assert tell(forward=10.0).startswith("compute-bound") and "cache" not in tell(forward=10.0)
    assert "shards/cache.py" in tell(forward=5, encode=5)
    assert "model.cuda_graphs" in tell(forward=100.0)
    assert "\n" not in tell(data=1)


@pytest.fixture
def card() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("CUDA events are a GPU's; make gpu runs this on one")
    torch.cuda.set_sync_debug_mode("error")
    yield torch.device("cuda")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_gpu_is_timed_and_not_waited_for(card: torch.device) -> None:
    """Steps of long kernels: told a step later, by the GPU's clock, and no step waits for what it has issued."""
    noted = Timings(card)
    with noted.phase("forward"):
        torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
    with noted.phase("backward"):
        torch.cuda._sleep(400_000_000)
    own, known = noted.end_step()
    assert not known.steps and own.total_s < 0.05
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    _, known = noted.end_step()
    assert known.parts_s["backward"] == pytest.approx(2 * known.parts_s["forward"], rel=0.1)
    assert known.parts_s["forward"] > 0.05 and known.find_bound() == "compute"
