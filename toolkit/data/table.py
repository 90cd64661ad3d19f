"""Tables that people write: CSV with a header, as a spreadsheet or an editor saves it.

Test: pytest tests/authoring/test_captions.py, tests/commands/test_pairs.py
"""

import csv
import io
from collections.abc import Collection, Iterator
from pathlib import Path

from toolkit.errors import UserError


def read_rows(table: Path, allowed: Collection[set[str]], wanted: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each row in which something stands: where that is, for people, and its fields by their columns.

    allowed  sets of columns, in any order
    wanted   the same in words
    raises   UserError for other columns, a row of more or fewer fields, and what is no CSV in UTF-8
    """
    rows = csv.DictReader(io.StringIO(read_text(table), newline=""), strict=True)
    try:
        header = rows.fieldnames or []
        if set(header) not in allowed or len(set(header)) < len(header):
            raise UserError(f"{table} starts with {', '.join(header) or 'nothing'}; its first line must be {wanted}")
        for row in rows:
            where = f"{table}, line {rows.reader.line_num}"
            if not any(row.values()):
                continue
            if None in row or None in row.values():
                raise UserError(f"{where}: not {len(header)} fields; put text that holds commas in double quotes")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{table}, line {rows.reader.line_num}: {error}; save it as CSV with commas") from error


def read_text(path: Path) -> str:
    """Read a file as UTF-8, line ends as they are written."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
