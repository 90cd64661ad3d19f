"""Many videos, each between two stills of a table's row: what launch/interpolate.py --pairs does.

Test: pytest tests/commands/test_pairs.py. A video is there once it is whole, so the same command goes on where one stopped,
and the rows can be cut among GPUs and machines.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from toolkit.commands.interpolate import Filling, count_steps, fill_gaps, note_unguided, plan_film, write_frames
from toolkit.data.files import appearing
from toolkit.data.table import read_rows
from toolkit.errors import UserError, list_some
from toolkit.parallel import parse_part
from toolkit.run.inference import Source, load_framer

MAX_NAME_BYTES = 200  # of the 255 that a disk takes, with what is put beside it


class Pair(NamedTuple):
    """A row: where it stands, for people, its two stills, and the video between them."""

    where: str
    first: str
    last: str
    place: Path


def interpolate_pairs(
    source: Source, table: str, out: str, filling: Filling, part: str = "1/1", compiled: bool = False
) -> str:
    """Write an MP4 for each row of a table into the folder `out`, but for those that are there.

    part     i/N: this process makes rows i, i + N, i + 2N and so on
    returns  what was done, for people
    raises   UserError for a table that names what is not there; at the end, where a row gave no video
    """
    number, parts = parse_part(part)
    folder = Path(os.path.expanduser(out)).resolve()
    if folder.suffix in (".mp4", ".gif") or folder.is_file():
        raise UserError(f"--out is {out}; for --pairs give a folder, where each row's video is written")
    if len(filling.seeds) > 1 or filling.trajectories not in (None, "auto"):
        raise UserError(
            "--pairs takes one --seed for all, and no trajectories but auto; leave out what speaks of one pair"
        )
    pairs = read_pairs(Path(os.path.expanduser(table)), folder)[number - 1 :: parts]
    missing = [pair for pair in pairs if not pair.place.exists()]
    print(f"{len(missing):,} of {len(pairs):,} videos are to be made in {folder}; the same command goes on", flush=True)
    if not missing:
        return f"all {len(pairs):,} videos are in {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --out") from None
    framer = load_framer(source, filling.trajectories is not None, compiled)
    note_unguided(filling.sampling, source.config)
    bad = []
    with tqdm(total=count_steps(framer, filling) * len(missing), unit="step", desc="sampling") as bar:
        for number, pair in enumerate(missing, 1):
            try:
                film = plan_film(source, [pair.first, pair.last], pair.place, filling)
                with appearing(pair.place) as aside:
                    write_frames(aside, fill_gaps(framer, film, bar), film.count, film.fps)
            except UserError as error:
                bad.append(pair.where)
                bar.write(f"{pair.where}: {error}", file=sys.stderr)
            bar.n = count_steps(framer, filling) * number
    if bad:
        raise UserError(
            f"{len(bad):,} of {len(missing):,} rows gave no video, for what is said above; mend these, and start the same "
            "command again"
        )
    return f"wrote {len(missing):,} videos to {folder}"


def read_pairs(table: Path, folder: Path) -> list[Pair]:
    """Read the rows of a CSV: stills by their paths within its folder, and perhaps what the video is called.

    folder  where the videos will be
    raises  UserError for a still that is not there, and for two videos of one name
    """
    pairs: dict[Path, Pair] = {}
    gone = []
    for where, row in read_rows(table, ({"first", "last"}, {"first", "last", "name"}), "first,last or first,last,name"):
        if not row["first"] or not row["last"]:
            raise UserError(f"{where}: a pair has two stills; give first and last")
        first, last = (table.parent / os.path.expanduser(row[end]) for end in ("first", "last"))
        gone += [f"{where}: there is no {still}" for still in (first, last) if not still.is_file()]
        name = row.get("name") or f"{first.stem}-{last.stem}"
        if "/" in name or name.startswith(".") or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:
            raise UserError(
                f"{where}: no video can be called {name!r}; give a name of {MAX_NAME_BYTES} bytes at most, without / and "
                "without a dot in front"
            )
        place = folder / f"{name.removesuffix('.mp4')}.mp4"
        if place in pairs:
            raise UserError(f"{where}: {name} comes twice, before in {pairs[place].where}; give each a name of its own")
        pairs[place] = Pair(where, str(first), str(last), place)
    if gone:
        raise UserError(f"{list_some(gone)}; give paths within {table.parent}, or whole ones")
    if not pairs:
        raise UserError(f"{table} has no rows; give a pair in each")
    return list(pairs.values())
