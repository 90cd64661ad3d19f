"""How long the fault tests run, and what each of them counted. Run: pytest tests/faults --long

Short by default, as a part of all tests. Long, one line is printed per test, and the rows stand in runs/faults.json, beside
those of tests that ran another time.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forked import Warm

REPORT = Path(__file__).resolve().parents[2] / "runs/faults.json"


@dataclass(frozen=True)
class Row:
    """One test: passed of trials, and how long all of them took."""

    name: str
    trials: int
    passed: int
    seconds: float


ROWS = pytest.StashKey[list[Row]]()


@dataclass
class Faults:
    """What a test asks for its number of trials, and tells how many passed; one that fails in between passed none."""

    long: bool
    name: str = ""
    trials: int = 0
    passed: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def choose(self, short: int, long: int) -> int:
        return long if self.long else short

    def begin(self, name: str, trials: int) -> None:
        self.name, self.trials = name, trials

    def end(self, passed: int, why: object = None) -> None:
        self.passed = passed
        assert passed == self.trials, why

    def row(self) -> Row:
        return Row(self.name, self.trials, self.passed, round(time.monotonic() - self.started_s, 1))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the fault tests in full, as `make faults` runs them")


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Iterator[Faults]:
    # Without this folder on the command line pytest reads this file too late to know the option.
    faults = Faults(request.config.getoption("--long", False))
    yield faults
    if faults.name:
        request.config.stash.setdefault(ROWS, []).append(faults.row())


@pytest.fixture(scope="session")
def small_run(tiny_run: dict[str, Any]) -> dict[str, Any]:
    """Overrides of eight steps of two clips, a micro-batch for each of two ranks; an epoch is five steps."""
    return tiny_run | {
        "engine.global_batch": 2, "model.memory": "fast", "schedule.steps": 8, "checkpoint.every_steps": 2,
    }  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(forked: Warm, small_run: dict[str, Any]) -> Path:
    """The run folder of that recipe on two ranks that nothing happened to; read only. NAME.ids is what was trained on."""
    folder = Path(small_run["runs_dir"]) / "undisturbed"
    forked.run(small_run | {"name": folder.name}, wounds=[("trace", {"path": str(folder) + ".ids"})])
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows or not config.getoption("--long", False):
        return
    terminalreporter.section("name, trials, passed")
    for row in rows:
        terminalreporter.line(f"{row.name:48} {row.trials:6} {row.passed:6}")
    keep_rows(REPORT, rows)


def keep_rows(report: Path, rows: list[Row]) -> None:
    """Write the rows of these tests, and leave those of others as they were."""
    report.parent.mkdir(exist_ok=True)
    before = json.loads(report.read_text()) if report.exists() else []
    named = {row["name"]: row for row in [*before, *map(asdict, rows)]}
    report.write_text(json.dumps([named[name] for name in sorted(named)], indent=1) + "\n")
