"""What people wrote about videos: a text file beside a video, or a CSV about many.

Test: pytest tests/data/test_captions.py
"""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from toolkit.errors import UserError

_COLUMNS = ("video", "caption", "label")
_MAX_CHARACTERS = 10_000


class Words(NamedTuple):
    """What is said about one video."""

    caption: str | None = None
    label: str | None = None


def read_words(folder: Path, names: Iterable[str], table: Path | None) -> dict[str, Words]:
    """Find the words about videos, by the path within their folder; a video nothing is said about is left out.

    table   CSV with a header of video and caption, label or both; its row replaces the text file beside a video
    raises  UserError for a text that is not UTF-8 or too long, another header, or a video that is not there
    """
    words = {}
    for name in names:
        path = (folder / name).with_suffix(".txt")
        if path.is_file():
            words[name] = Words(caption=_clean(_read(path), str(path)))
    if table is not None:
        words |= _read_table(table, set(names), folder)
    return {name: said for name, said in words.items() if any(said)}


def _read_table(table: Path, names: set[str], folder: Path) -> dict[str, Words]:
    rows = csv.DictReader(_read(table).splitlines(keepends=True), strict=True)
    words: dict[str, Words] = {}
    try:
        header = rows.fieldnames or []
        if "video" not in header or len(header) < 2 or len(set(header)) < len(header) or set(header) - set(_COLUMNS):
            raise UserError(
                f"{table} starts with {', '.join(header) or 'nothing'}; its first line must be video,caption,label, or "
                "video and one of the others"
            )
        for row in rows:
            where, name = f"{table}, line {rows.line_num}", row["video"]
            if None in row or None in row.values():
                raise UserError(f"{where}: not {len(header)} fields; put text that holds commas in double quotes")
            if name not in names or name in words:
                fault = "comes twice" if name in words else f"is no video in {folder}"
                raise UserError(f"{where}: {name} {fault}; give each video once, by its path within the folder")
            words[name] = Words(*(_clean(row.get(column) or "", where) for column in _COLUMNS[1:]))
    except csv.Error as error:
        raise UserError(f"{table}, line {rows.line_num}: {error}; save it as CSV with commas") from error
    return words


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _clean(text: str, where: str) -> str | None:
    text = " ".join(text.split())
    if len(text) > _MAX_CHARACTERS:
        raise UserError(f"{where}: a caption of {len(text)} characters; up to {_MAX_CHARACTERS} are allowed")
    return text or None
