"""The contenders of a timed step do the same work. Run: pytest tests/run/test_bench_step.py"""

import pytest

from toolkit.run.bench_step import bench_step, find_mfu


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


def test_mfu_by_hand() -> None:
    """The model's arithmetic over what the card could have done in that time; none for what is not known."""
    assert find_mfu("framer_5_576", 0.05, "NVIDIA H100 80GB HBM3") == pytest.approx(18.02 / 0.05 / 989)
    assert (
        find_mfu("framer_5_576", 0.05, "NVIDIA L4") is find_mfu("framer_14_576", 0.05, "NVIDIA A100-SXM4-40GB") is None
    )
