"""The contenders of a timed step do the same work. Run: pytest tests/bench/test_step.py"""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.bench.counts import name_rung
from toolkit.bench.full import make_tiny_base
from toolkit.bench.step import (
    Contender,
    Maker,
    bench_step,
    find_mfu,
    list_makers,
    make_config,
    make_contender,
    make_stock,
    measure,
    read_clips,
    write_clips,
)
from toolkit.cli import main
from toolkit.config import LEAN, RunConfig
from toolkit.data.loader import Batch
from toolkit.engine.plain import PlainEngine
from toolkit.errors import UserError
from toolkit.model.base import Base

CPU = torch.device("cpu")


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[RunConfig, Base]:
    """The tiny base, and clips for it in the test's folder."""
    config, base = make_config("framer_5_576", CPU), make_tiny_base(CPU, torch.bfloat16)
    write_clips(config, base, tmp_path)
    return config, base


def test_all_contenders_take_the_same_steps() -> None:
    """On the tiny network: every figure promised, a named kernel for attention, and losses alike after three steps."""
    report = bench_step(rounds=1, parts=True)
    assert report["device"] == "cpu" and report["kernel"] == "sdpa" and report["data_wait_ms"] > 0
    rows, losses = report["contenders"], report["loss"]
    fewer = {name_rung(LEAN[:i]) for i in range(len(LEAN))}
    assert rows.keys() == losses.keys() == {"stock", "ours_fast", "ours_balanced", "ours_small"} | fewer
    assert all(row.keys() == {"ratio", "attention"} and row["ratio"] > 0 and row["attention"] for row in rows.values())
    assert rows["stock"]["ratio"] == 1
    # stock's adapters are bf16, so their small updates are rounded away
    assert losses["ours_fast"] == pytest.approx(losses["ours_balanced"], rel=1e-3)
    assert [losses[name] for name in ("ours_small", *fewer)] == pytest.approx([losses["ours_fast"]] * 6, rel=1e-3)
    assert losses["ours_fast"] == pytest.approx(losses["stock"], rel=2e-2)


def test_a_step_trains(tmp_path: Path, prepared: tuple[RunConfig, Base]) -> None:
    """Each contender's own adapter moves."""
    config, base = prepared
    clips = list(islice(read_clips(config, tmp_path), 2))
    for name, make in list_makers(config, "sdpa", on_card=False).items():
        contender = make_contender(config, base, make, CPU)
        before = [parameter.detach().clone() for parameter in contender.engine.parameters.values()]
        contender.take_step(clips)
        after = contender.engine.parameters.values()
        assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True)), name


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Nothing that refers to itself goes by chance."""
    gc.disable()
    yield
    gc.enable()


def test_alone_or_in_turns(
    tmp_path: Path, prepared: tuple[RunConfig, Base], uncollected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, as on a GPU, contenders find the others gone, but see the same clips: their losses are the same."""
    monkeypatch.setattr("toolkit.bench.step.ACCUMULATION", 1)
    config, base = prepared
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watched(make: Maker, base: Base) -> Any:
        alive.append(sum(part() is not None for part in made))
        made.append(weakref.ref(base.unet.mid_block.resnets[0]))  # which refers to itself where it is recomputed
        return make(base)

    def find_losses(group: dict[str, Maker]) -> dict[str, float]:
        rows, wait_s = measure(group, config, base, read_clips(config, tmp_path), 1, CPU)
        assert wait_s > 0 and all(len(row["times_s"]) == 1 for row in rows.values())
        return {name: row["loss"] for name, row in rows.items()}

    makers = list_makers(config, "sdpa", on_card=False)
    makers = {name: partial(watched, makers[name]) for name in ("ours_small", "stock")}
    alone = [find_losses({name: make}) for name, make in makers.items()]
    assert alive == [0, 0]
    assert find_losses(makers) == {name: loss for losses in alone for name, loss in losses.items()}


def test_one_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, or in its third step, the first that is timed: it has an error for a row, and all others keep theirs."""

    def list_more(config: RunConfig, *given: Any) -> dict[str, Maker]:
        failing: dict[str, Maker] = {"never": fail, "late": partial(make_stock, config)}
        return failing | list_makers(config, *given)

    def fail(*given: Any) -> Any:
        raise RuntimeError("out of\nmemory")

    def take_step(self: Contender, clips: list[Batch]) -> torch.Tensor:
        steps[self.engine] += 1
        return fail() if [*steps.items()][0] == (self.engine, 3) else take(self, clips)

    steps: Counter[PlainEngine] = Counter()
    take = Contender.take_step
    monkeypatch.setattr(Contender, "take_step", take_step)
    monkeypatch.setattr("toolkit.bench.step.list_makers", list_more)
    monkeypatch.setattr("toolkit.bench.step.ACCUMULATION", 1)
    report = bench_step(rounds=1)
    rows = report["contenders"]
    assert rows.pop("never") == rows.pop("late") == {"error": "out of memory"}
    assert [*steps.values()] == [3, 5, 5, 5, 5]
    assert rows.keys() == report["loss"].keys() == {"stock", "ours_fast", "ours_balanced", "ours_small"}
    assert all(row.keys() == {"ratio", "attention"} for row in rows.values())


def test_some_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is named is measured, in that order; a name nobody has is told before anything is made."""
    monkeypatch.setattr("toolkit.bench.step.ACCUMULATION", 1)
    assert [*bench_step(rounds=1, only=("ours_fast", "stock"))["contenders"]] == ["ours_fast", "stock"]
    assert [*bench_step(rounds=1, only="ours_small")["contenders"]] == ["ours_small"]
    monkeypatch.delattr("toolkit.bench.step.make_tiny_base")
    with pytest.raises(UserError, match="--only ours_quick is no contender here; give some of stock, ours_fast,"):
        bench_step(only="ours_quick")


def test_each_contender_can_be_named_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of --parts as well, all of them in one list with commas between."""
    names = [*list_makers(make_config("framer_5_576", CPU), "sdpa", on_card=True, parts=True)]
    given: list[Any] = []
    monkeypatch.setattr("sys.argv", ["bench.py", "--only", ",".join(names)])
    main(lambda only: given.append(only))
    assert [*map(tuple, given)] == [tuple(names)] and "ours_fast_cross_projections" in names


def test_mfu_by_hand() -> None:
    """The model's arithmetic over what the card could have done in that time; none for what is not known."""
    assert find_mfu("framer_5_576", 0.05, "NVIDIA H100 80GB HBM3") == pytest.approx(18.02 / 0.05 / 989)
    assert (
        find_mfu("framer_5_576", 0.05, "NVIDIA L4") is find_mfu("framer_14_576", 0.05, "NVIDIA A100-SXM4-40GB") is None
    )
