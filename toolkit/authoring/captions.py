"""What people wrote about videos: a text file beside a video, or a CSV about many.

Test: pytest tests/authoring/test_captions.py
"""

import math
import unicodedata
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

from toolkit.data.table import read_rows, read_text
from toolkit.errors import UserError

_MAX_CHARACTERS = 10_000
_MAX_SECONDS = 1e6  # eleven days
_SAID = ("caption", "label", "split")
_SPLITS = ("train", "val")
_WANTED = "video,caption,label,split, or video and some of the others; for parts of videos with start_s,end_s too"


class Words(NamedTuple):
    """What is said about one video, or about a part of it.

    split   train or val, where it is not left to the packing
    """

    caption: str | None = None
    label: str | None = None
    split: str | None = None


class Part(NamedTuple):
    """A part of a video, in seconds from its first frame, the end not included, and what is said about it."""

    begin_s: float
    end_s: float
    words: Words


class Said(NamedTuple):
    """What is said, by the path of a video within its folder; what nothing is said about is left out.

    of_parts  a video of which parts are named, in order, is nothing but these
    absent    videos that are spoken of and are not there
    """

    of_videos: dict[str, Words]
    of_parts: dict[str, list[Part]]
    absent: list[str]


def read_words(folder: Path, names: Sequence[str], table: Path | None) -> Said:
    """Find what is said about videos.

    table   CSV of video and caption, label or split, which replaces the text file beside a video; with start_s and end_s of
            a part of it, and a video may have several
    raises  UserError for a text that is not UTF-8 or too long, other columns, or a table about none of the videos
    """
    words: dict[str, Words] = {}
    parts: dict[str, list[Part]] = {}
    absent: list[str] = []
    for name in names:
        path = (folder / name).with_suffix(".txt")
        if path.is_file():
            words[name] = Words(caption=_clean(read_text(path), str(path)))
    if table is not None:
        rows, parts = _read_table(table, names)
        named = {*rows, *parts}
        absent = sorted(named - set(names))
        if absent and len(absent) == len(named):
            raise UserError(
                f"{table}: {absent[0]} is no video in {folder}, nor is any other; give videos by their path within it"
            )
        words |= {name: rows[name] for name in names if name in rows}
    said = {name: said for name, said in words.items() if any(said) and name not in parts}
    return Said(said, {name: parts[name] for name in names if name in parts}, absent)


def _read_table(table: Path, names: Sequence[str]) -> tuple[dict[str, Words], dict[str, list[Part]]]:
    """Read the rows by the names they give, or by that of the one video whose name only looks the same (of NFC and NFD)."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    words: dict[str, Words] = {}
    parts: dict[str, list[Part]] = {}
    said = [{"video", *own} for count in range(len(_SAID) + 1) for own in combinations(_SAID, count)]
    columns = [*said[1:], *({"start_s", "end_s", *own} for own in said)]
    for where, row in read_rows(table, columns, _WANTED):
        name = row["video"]
        if not name:
            raise UserError(f"{where}: names no video; give its path within the folder of the videos")
        fits = alike.get(unicodedata.normalize("NFC", name), [])
        name = fits[0] if len(fits) == 1 else name
        own = Words(*(_clean(row.get(column) or "", where) for column in _SAID))
        if own.split not in (None, *_SPLITS):
            raise UserError(f"{where}: split is {own.split!r}; give train, val, or nothing where either will do")
        times = row.get("start_s"), row.get("end_s")
        if name in words or (name in parts and not any(times)):
            raise UserError(
                f"{where}: {name} comes twice; give each video once, or parts of it, each with start_s and end_s"
            )
        if any(times):
            begin_s, end_s = (_read_time(time, where) for time in times)
            if begin_s >= end_s:
                raise UserError(f"{where}: a part from {begin_s:g} to {end_s:g} s; give an end_s above start_s")
            parts.setdefault(name, []).append(Part(begin_s, end_s, own))
        else:
            words[name] = own
    for name, own_parts in parts.items():
        own_parts.sort(key=lambda part: part[:2])
        for before, after in pairwise(own_parts):
            if after.begin_s < before.end_s:
                raise UserError(
                    f"{table}: parts of {name} overlap, {before.begin_s:g} to {before.end_s:g} s and {after.begin_s:g} to "
                    f"{after.end_s:g} s; give what one person signs, one after another"
                )
    return words, parts


def _read_time(text: str | None, where: str) -> float:
    try:
        time_s = float(text or "")
    except ValueError:
        time_s = math.nan
    if not 0 <= time_s <= _MAX_SECONDS:
        raise UserError(
            f"{where}: start_s or end_s is {text!r}; give seconds from the beginning of the video, such as 12.48"
        )
    return time_s


def _clean(text: str, where: str) -> str | None:
    text = " ".join(text.split())
    if len(text) > _MAX_CHARACTERS:
        raise UserError(f"{where}: a caption of {len(text)} characters; up to {_MAX_CHARACTERS} are allowed")
    return text or None
