"""A fault test that fails is counted as such, and erases no other. Run: pytest tests/faults/test_rows.py"""

import json
from pathlib import Path

import pytest

from tests.faults.conftest import Faults, Row, keep_rows


def test_what_does_not_end_passed_nothing() -> None:
    """A test that raises before it has counted leaves a row all the same."""
    faults = Faults(long=False)
    faults.begin("T0", 3)
    assert (faults.row().trials, faults.row().passed) == (3, 0)
    with pytest.raises(AssertionError, match="of a reason"):
        faults.end(2, "of a reason")
    assert faults.row().passed == 2


def test_rows_of_other_tests_stay(tmp_path: Path) -> None:
    """A run of some tests renews their rows, and no others."""
    report = tmp_path / "runs/faults.json"
    keep_rows(report, [Row("T2", 5, 5, 1.0), Row("T1", 5, 5, 1.0)])
    keep_rows(report, [Row("T2", 5, 0, 2.0)])
    assert [(row["name"], row["passed"]) for row in json.loads(report.read_text())] == [("T1", 5), ("T2", 0)]
