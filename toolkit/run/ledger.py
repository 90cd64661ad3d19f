"""The ledger of a run's bad clips, substituted.jsonl: what was replaced by what, why, and whether it is too much.

Test: pytest tests/run/test_ledger.py

The main rank alone writes it, since appends from several machines overwrite each other on a network disk. The file is all
there is to know: a resumed run cuts it back to where it starts, and the bound is on the different bad clips in it. So a run
stops at the same step whatever its ranks, and however often it was resumed.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from toolkit.data.loader import Substitution
from toolkit.engine.world import World
from toolkit.errors import UserError, list_some
from toolkit.run.rows import cut_rows, read_lines

NAME = "substituted.jsonl"


def bad_limit(max_bad_fraction: float, clips: int) -> int:
    """Count the bad clips that a run puts up with: one at least, but where it shall be none."""
    return max(1, int(max_bad_fraction * clips)) if max_bad_fraction else 0


def cut_ledger(run: Path, position: int) -> None:
    """Keep the rows before a position; for the main rank, before the run's Ledger is made."""
    _read(run / NAME)  # first: the bound is on what is listed, so what is no row is not dropped in silence
    cut_rows(run / NAME, lambda row: row["position"] < position)


def _read(path: Path) -> list[Substitution]:
    rows = []
    for line in read_lines(path):
        try:
            rows.append(Substitution(**json.loads(line)))
        except (ValueError, TypeError):
            raise UserError(
                f"{path} holds a torn line, {line[:200]!r}; remove that line and start the same command again"
            ) from None
    return rows


class Ledger:
    """The ledger of a run over so many clips."""

    def __init__(self, run: Path, clips: int, max_bad_fraction: float, world: World) -> None:
        self.path = run / NAME
        self.clips = clips
        self.allowed = bad_limit(max_bad_fraction, clips)
        self.world = world
        # by the shard's own name and the clip's: data that was moved is the same data. The main rank's
        self._bad: dict[tuple[str, str], Substitution] = {}
        if world.is_main:
            self._count(_read(self.path))

    @property
    def bad(self) -> int:
        """How many different clips have been replaced until now; the main rank knows."""
        return len(self._bad)

    def note(self, substitutes: list[Substitution]) -> None:
        """List the bad clips of a step, of all ranks by position. All ranks call it, each with its own.

        raises  UserError on every rank where too many are listed, naming some of them
        """
        texts = self.world.gather_texts(json.dumps([row._asdict() for row in substitutes]))
        fault = ""
        if self.world.is_main:
            rows = sorted(Substitution(**row) for text in texts for row in json.loads(text))
            with self.path.open("a") as file:
                file.writelines(json.dumps(row._asdict()) + "\n" for row in rows)
            print(f"{len(rows)} bad clips replaced, see {self.path}", file=sys.stderr)
            self._count(rows)
            fault = self._describe_too_many()
        fault, *_ = self.world.gather_texts(fault)
        if fault:
            raise UserError(fault)

    def _count(self, rows: Iterable[Substitution]) -> None:
        self._bad |= {(Path(row.shard).name, row.key): row for row in rows}

    def _describe_too_many(self) -> str:
        if self.bad <= self.allowed:
            return ""
        faults = [f"{row.key} in {row.shard}: {row.reason}" for _, row in sorted(self._bad.items())]
        return (
            f"{self.bad} of {self.clips} clips are bad, allowed are {self.allowed} ({list_some(faults)}), see "
            f"{self.path}; run python shards/check.py on the folder, ask for fewer frames or a smaller stride, or raise "
            "data.max_bad_fraction"
        )
