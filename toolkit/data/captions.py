"""What people wrote about videos: a text file beside a video, or a CSV about many.

Test: pytest tests/data/test_captions.py
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from toolkit.data.table import read_rows, read_text
from toolkit.errors import UserError

_SAID = ("caption", "label")
_MAX_CHARACTERS = 10_000


class Words(NamedTuple):
    """What is said about one video."""

    caption: str | None = None
    label: str | None = None


def read_words(folder: Path, names: Sequence[str], table: Path | None) -> tuple[dict[str, Words], list[str]]:
    """Find the words about videos, by the path within their folder; a video nothing is said about is left out.

    Returns also the videos of the table that are not there.

    table   CSV with a header of video and caption, label or both; its row replaces the text file beside a video
    raises  UserError for a text that is not UTF-8 or too long, another header, or a table about none of the videos
    """
    words: dict[str, Words] = {}
    absent: list[str] = []
    for name in names:
        path = (folder / name).with_suffix(".txt")
        if path.is_file():
            words[name] = Words(caption=_clean(read_text(path), str(path)))
    if table is not None:
        rows = _read_table(table, names)
        absent = sorted(rows.keys() - set(names))
        if absent and len(absent) == len(rows):
            raise UserError(
                f"{table}: {absent[0]} is no video in {folder}, nor is any other; give videos by their path within it"
            )
        words |= {name: rows[name] for name in names if name in rows}
    return {name: said for name, said in words.items() if any(said)}, absent


def _read_table(table: Path, names: Sequence[str]) -> dict[str, Words]:
    """Read the rows by the names they give, or by that of the one video whose name only looks the same (of NFC and NFD)."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    words: dict[str, Words] = {}
    columns = [{"video", *others} for others in (_SAID, _SAID[:1], _SAID[1:])]
    for where, row in read_rows(table, columns, "video,caption,label, or video and one of the others"):
        name = row["video"]
        if not name:
            raise UserError(f"{where}: names no video; give its path within the folder of the videos")
        fits = alike.get(unicodedata.normalize("NFC", name), [])
        name = fits[0] if len(fits) == 1 else name
        if name in words:
            raise UserError(f"{where}: {name} comes twice; give each video once")
        words[name] = Words(*(_clean(row.get(column) or "", where) for column in _SAID))
    return words


def _clean(text: str, where: str) -> str | None:
    text = " ".join(text.split())
    if len(text) > _MAX_CHARACTERS:
        raise UserError(
            f"{where}: a caption of {len(text)} characters; up to {_MAX_CHARACTERS} are allowed; shorten it, or take it out"
        )
    return text or None
