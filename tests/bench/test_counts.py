"""What a step of the full-size network costs. Run: pytest tests/bench/test_counts.py"""

import itertools
import re

import pytest

from tests.launching import ROOT
from toolkit.bench.counts import CASES, bench_counts, count_stock
from toolkit.run.memory import Shape

# of ours to stock, in the case framer_5_576: what a change may not lose again
LABELS = {  # of README's rows
    "diffusers + PEFT": "stock",
    "`memory: fast`": "ours_fast", "`memory: balanced`": "ours_balanced", "`memory: small`": "ours_small",
    "diffusers + PEFT, a sampling step": "stock_sampling", "a sampling step": "ours_sampling",
}  # fmt: skip
MOST = {
    "ours_fast": {"ops": 0.42, "tflop": 0.76, "gb_moved": 0.65},
    "ours_balanced": {"ops": 0.465, "tflop": 0.88, "gb_moved": 0.77, "peak_gb": 0.80},
    "ours_small": {"ops": 0.59, "tflop": 1.09, "gb_moved": 0.92, "peak_gb": 0.22},
}


@pytest.mark.parametrize(
    ("tokens", "channels", "ops", "gb_moved", "tflop", "peak_gb"),
    [
        (2, 9, [3143, 2948], [55.5, 81.3], 18.60, [11.71, 6.68]),
        (1, 8, [3111, 2948], [54.5, 80.7], 18.51, [11.37, 6.33]),
    ],
)
def test_stock_costs_what_was_counted_elsewhere(
    tokens: int,
    channels: int,
    ops: list[int],
    gb_moved: list[float],
    tflop: float,
    peak_gb: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five frames of 576x576, as Framer and as plain SVD: an independent count of the same networks, within one percent."""
    monkeypatch.setattr("toolkit.bench.counts.CHANNELS", channels)
    shape = Shape(1, 5, 72, 72, tokens)
    plain, checkpointed = count_stock(shape, checkpointing=False), count_stock(shape)
    phases = plain["forward"], plain["backward"]
    assert [phase.ops for phase in phases] == pytest.approx(ops, rel=0.01)
    assert [phase.moved_bytes / 1e9 for phase in phases] == pytest.approx(gb_moved, rel=0.01)
    assert sum(phase.flop for phase in phases) / 1e12 == pytest.approx(tflop, rel=0.01)
    assert [it["backward"].peak_bytes / 1e9 for it in (plain, checkpointed)] == pytest.approx(peak_gb, rel=0.01)


def test_ours_against_stock() -> None:
    """Every case is counted, and README says so; from `fast` to `small` each plan takes less memory and more operations."""
    report = bench_counts(parts=True)
    assert report.keys() == CASES.keys()
    for rows in report.values():
        stock, fast, balanced, small = (rows[name] for name in ("stock", "ours_fast", "ours_balanced", "ours_small"))
        assert small["peak_gb"] < balanced["peak_gb"] < stock["peak_gb"] < fast["peak_gb"]
        assert fast["ops"] < balanced["ops"] < small["ops"] and fast["tflop"] < balanced["tflop"] < small["tflop"]
        assert fast["ops"] < stock["ops"] and fast["tflop"] < stock["tflop"] and fast["gb_moved"] < stock["gb_moved"]
    shown = re.findall(
        r"^\| (\w+) \| (.+?) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    assert len(shown) == 18
    for case, name, *figures in shown:
        row = report[case][LABELS[name]]
        assert [float(figure.replace(",", "")) for figure in figures] == pytest.approx([*row.values()], rel=0.02), case
    rows = report["framer_5_576"]
    ladder = [rows[f"ours_fast{parts}"]["ops"] for parts in ("_stock", "_cross", "_cross_projections", "")]
    assert ladder[0] < rows["stock"]["ops"] and all(more > 1.2 * less for more, less in itertools.pairwise(ladder))
    assert rows["ours_small"]["peak_gb"] <= 1.7 and rows["ours_fast"]["ops"] <= 3300
    for plan, limits in MOST.items():
        for name, most in limits.items():
            assert rows[plan][name] <= most * rows["stock"][name], (plan, name, rows)
    assert rows["ours_sampling"]["ops"] <= 0.41 * rows["stock_sampling"]["ops"]
    assert rows["ours_sampling"]["gb_moved"] <= 0.66 * rows["stock_sampling"]["gb_moved"]
