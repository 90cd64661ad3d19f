"""The contenders of a timed step do the same work. Run: pytest tests/run/test_bench_step.py"""

from itertools import islice
from pathlib import Path

import pytest
import torch

from toolkit.run.bench import make_tiny_base
from toolkit.run.bench_step import bench_step, find_mfu, list_makers, make_batches, make_config, make_contender


def test_all_contenders_take_the_same_steps() -> None:
    """On the tiny network: every figure promised, a named kernel for attention, and losses alike after three steps."""
    report = bench_step(rounds=1)
    assert report["device"] == "cpu" and report["kernel"] == "sdpa" and report["data_wait_ms"] > 0
    rows, losses = report["contenders"], report["loss"]
    assert rows.keys() == losses.keys() == {"stock", "ours_fast", "ours_small"}
    assert all(row.keys() == {"ratio", "attention"} and row["ratio"] > 0 and row["attention"] for row in rows.values())
    assert rows["stock"]["ratio"] == 1
    # stock's adapters are bf16, so their small updates are rounded away
    assert losses["ours_fast"] == pytest.approx(losses["ours_small"], rel=1e-3)
    assert losses["ours_fast"] == pytest.approx(losses["stock"], rel=2e-2)


def test_a_step_trains(tmp_path: Path) -> None:
    """Each contender's own adapter moves."""
    cpu = torch.device("cpu")
    config, base = make_config("framer_5_576", cpu), make_tiny_base(cpu, torch.bfloat16)
    clips = list(islice(make_batches(config, base, tmp_path), 2))
    for name, make in list_makers(config, "sdpa", on_card=False).items():
        contender = make_contender(config, base, make)
        before = [parameter.detach().clone() for parameter in contender.engine.parameters.values()]
        contender.take_step(clips)
        after = contender.engine.parameters.values()
        assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True)), name


def test_mfu_by_hand() -> None:
    """The model's arithmetic over what the card could have done in that time; none for what is not known."""
    assert find_mfu("framer_5_576", 0.05, "NVIDIA H100 80GB HBM3") == pytest.approx(18.02 / 0.05 / 989)
    assert (
        find_mfu("framer_5_576", 0.05, "NVIDIA L4") is find_mfu("framer_14_576", 0.05, "NVIDIA A100-SXM4-40GB") is None
    )
