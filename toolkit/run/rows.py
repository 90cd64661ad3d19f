"""Files of rows, a JSON object a line, which a run appends to, and cuts back to where it goes on from.

Test: pytest tests/run/test_rows.py. A kill tears the last line, and a power cut can leave bytes of zero in place of any.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from toolkit.run.checkpoint import replace_text


def read_lines(path: Path) -> list[bytes]:
    """The lines of a file that were written to their end; none where there is no file yet."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of rows; a line that is no row is passed over."""
    return [row for _, row in _parse(path)]


def cut_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows that are not to be kept, and what is no row; the others stay byte for byte."""
    if path.exists():
        replace_text(path, "".join(line.decode() for line, row in _parse(path) if keep(row)))


def _parse(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for line in read_lines(path):
        with contextlib.suppress(ValueError):
            row = json.loads(line.decode())
            if isinstance(row, dict):
                yield line, row
