"""The ledger of a run's bad clips, substituted.jsonl: what was replaced by what, why, and whether it is too much.

Test: pytest tests/run/test_ledger.py

The file is all there is to know: every rank appends to it, a resumed run cuts it back to where it starts, and the bound is
on the different bad clips in it. So a run stops at the same step whatever its ranks, and however often it was resumed.
"""

import json
import os
import sys
from pathlib import Path

from toolkit.data.loader import Substitution, list_some
from toolkit.engine.world import World
from toolkit.errors import UserError
from toolkit.run.checkpoint import replace_text

NAME = "substituted.jsonl"


def bad_limit(max_bad_fraction: float, clips: int) -> int:
    """Count the bad clips that a run puts up with."""
    return max(1, int(max_bad_fraction * clips))


def cut_ledger(run: Path, position: int) -> None:
    """Keep the rows before a position; for the main rank, before any other appends."""
    path = run / NAME
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        rows = (line for line in lines if line.endswith(b"\n"))  # a kill tears the last
        kept = [row.decode() for row in rows if _parse(path, row).position < position]
        replace_text(path, "".join(kept))


def _parse(path: Path, line: bytes) -> Substitution:
    try:
        return Substitution(**json.loads(line))
    except (ValueError, TypeError):
        raise UserError(
            f"{path} holds a torn line, {line[:200]!r}; remove that line and start the same command again"
        ) from None


class Ledger:
    """The ledger of a run over so many clips, as one rank sees it."""

    def __init__(self, run: Path, clips: int, max_bad_fraction: float) -> None:
        self.path = run / NAME
        self.clips = clips
        self.allowed = bad_limit(max_bad_fraction, clips)
        self._bad: dict[tuple[str, str], str] = {}  # (shard, key) -> reason
        self._read_bytes = 0

    def note(self, substitutes: list[Substitution]) -> None:
        """Append a batch's bad clips, each by one write, so that the rows of several ranks do not mix."""
        if not substitutes:
            return
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            for row in substitutes:
                os.write(descriptor, (json.dumps(row._asdict()) + "\n").encode())
        finally:
            os.close(descriptor)
        print(f"{len(substitutes)} bad clips replaced, see {self.path}", file=sys.stderr)

    def refuse_too_many(self, world: World) -> None:
        """Stop every rank where the ledger lists too many clips. All ranks call it, when all have noted a step's clips.

        raises  UserError naming some of them
        """
        found = world.broadcast_int(len(self._read()) if world.is_main else 0)
        if found > self.allowed:
            faults = [f"{key} in {shard}: {reason}" for (shard, key), reason in sorted(self._read().items())]
            raise UserError(
                f"{found} of {self.clips} clips are bad, allowed are {self.allowed} ({list_some(faults)}), see {self.path}; "
                "run python shards/check.py on the folder, ask for fewer frames or a smaller stride, or raise "
                "data.max_bad_fraction"
            )

    def _read(self) -> dict[tuple[str, str], str]:
        """Read on from where the last call ended."""
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            for line in file:
                row = _parse(self.path, line)
                self._bad[row.shard, row.key] = row.reason
                self._read_bytes += len(line)
        return self._bad
