"""A sound copy of damaged shards: every whole sample, none of the rest; the originals are never touched.

Test: pytest tests/authoring/test_check.py
"""

import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from toolkit.authoring.check import (
    CheckReport,
    Fault,
    check,
    find_tars,
    lost_tars,
    sample_faults,
    shard_faults,
    without_clip,
)
from toolkit.data.files import add_member, link_or_copy, local_folder, refuse_files_above, refuse_irregular
from toolkit.data.format import (
    VIDEO_EXTENSIONS,
    BadSample,
    Member,
    SampleRow,
    ShardIndex,
    build_index,
    crc32_of,
    read_index,
    read_member,
    refusal,
    sample_row,
    split_name,
    write_index,
)
from toolkit.data.index import refuse_unfinished
from toolkit.data.latents import CACHE_FILE
from toolkit.data.tar import BLOCK_BYTES, Entry, TarFault, find_header, walk_tar
from toolkit.errors import UserError

_MARK = ".repairing"  # in a folder that a repair is writing, so that no other is taken for one


@dataclass
class RepairReport:
    """What the copy leaves out, with the place in the originals, and what a check of the copy found."""

    out: Path
    checked: CheckReport
    lost: list[Fault] = field(default_factory=list)

    @property
    def faults(self) -> list[Fault]:
        return self.checked.faults

    @property
    def is_whole(self) -> bool:
        """Whether the copy is all that there was, and sound, as the exit code says."""
        return not self.lost and not self.faults and self.checked.clips > 0

    def as_dict(self) -> dict[str, Any]:
        return self.checked.as_dict() | {"lost": [asdict(fault) for fault in self.lost]}

    def summary(self) -> str:
        lines = [f"left out {fault}" for fault in self.lost]
        return "\n".join([*lines, f"{len(self.lost)} left out; in {self.out}:", self.checked.summary()])


def repair(folder: str | Path, out: str | Path, deep: bool = False) -> RepairReport:
    """Write what is whole in a folder of shards to a new folder, with new indexes, and check that.

    Intact shards are hard-linked, or copied; the same folder gives the same bytes.
    raises  UserError if `out` is there already or lies within the folder, or the folder is not finished
    """
    folder, out = local_folder(folder), local_folder(out)
    tars = find_tars(folder)
    refuse_unfinished(folder)
    unfinished = _begin(folder, out)
    lost = []
    for tar in tqdm(tars, "repair", unit="shard"):
        target = unfinished / tar.name
        try:
            refuse_irregular(tar)
            index = _index_if_sound(tar, deep)
            rows, faults = _salvage(tar, deep) if index is None else ([], [])
        except (UserError, OSError) as error:
            lost.append(Fault(tar.name, None, None, str(error)))
            continue
        lost += faults
        if index is not None:
            link_or_copy(tar, target)
        elif rows:
            _write_tar(tar, rows, target)
            index = build_index(target)
        else:
            lost.append(Fault(tar.name, None, None, "no sample of it is whole"))
            continue
        write_index(target, index)
    for tar, fault in lost_tars(folder, tars).items():
        places = {row.key: min(member.offset for member in row.members.values()) for row in _old_rows(tar)}
        listed = [Fault(tar.name, key, offset, fault) for key, offset in places.items()]
        lost += listed or [Fault(tar.name, None, None, fault)]
    if (folder / CACHE_FILE).is_file():
        shutil.copyfile(folder / CACHE_FILE, unfinished / CACHE_FILE)
    checked = check(unfinished, deep) if any(unfinished.glob("*.tar")) else CheckReport()
    (unfinished / _MARK).unlink()
    os.replace(unfinished, out)
    return RepairReport(out, checked, lost)


def _begin(folder: Path, out: Path) -> Path:
    """Make the folder that is to become `out`; what an interrupted repair left in its place is removed, nothing else is."""
    unfinished = out.with_name(f".{out.name}.repairing")
    source = folder.resolve()
    if out.exists() or source in [out.resolve(), *out.resolve().parents]:
        raise UserError(f"--repair {out}: give a new folder outside {folder}; the shards themselves are not touched")
    if os.path.lexists(unfinished):
        is_own = (unfinished / _MARK).is_file() and not unfinished.is_symlink()
        if not is_own or unfinished.resolve() in [source, *source.parents]:
            raise UserError(
                f"--repair {out} would be written in {unfinished}, which is there already; give another name"
            )
        shutil.rmtree(unfinished)
    refuse_files_above(out)
    unfinished.mkdir(parents=True)
    (unfinished / _MARK).touch()
    return unfinished


def _index_if_sound(tar: Path, deep: bool) -> ShardIndex | None:
    """Index a tar anew, if all of its samples hold and none is damaged by the index it has."""
    try:
        index = build_index(tar)
    except UserError:
        return None
    places = {(m.offset, m.size_bytes): m.crc32 for row in _old_rows(tar) for m in row.members.values()}
    members = [member for row in index.samples for member in row.members.values()]
    if any(places.get((m.offset, m.size_bytes), m.crc32) != m.crc32 for m in members):
        return None
    return index if index.samples and not shard_faults(tar, index, deep) else None


def _old_rows(tar: Path) -> tuple[SampleRow, ...]:
    try:
        return read_index(tar).samples
    except UserError:
        return ()


def _salvage(tar: Path, deep: bool) -> tuple[list[SampleRow], list[Fault]]:
    """Find the whole samples of a tar, by its headers and by its index, and list what is lost."""
    entries, lost, torn = _find_entries(tar)
    members: dict[str, dict[str, Member]] = {}
    for entry in entries:
        key, extension = split_name(entry.name)
        if extension in members.setdefault(key, {}):
            lost.append(Fault(tar.name, key, entry.offset, f"{entry.name!r} is there twice; the first is kept"))
            continue
        crc32 = crc32_of(tar, entry.offset, entry.size_bytes)
        members[key][extension] = Member(offset=entry.offset, size_bytes=entry.size_bytes, crc32=crc32)
    damaged, known = _restore(tar, members), {row.key for row in _old_rows(tar)}
    kinds = Counter(_kinds(parts) for parts in members.values())
    usual = max(kinds, key=lambda kind: (kinds[kind], len(kind)), default=frozenset())
    rows = []
    for key, parts in sorted(members.items(), key=lambda item: min(part.offset for part in item[1].values())):
        offset = min(part.offset for part in parts.values())
        missing = usual - _kinds(parts) if key in torn and key not in known else set()
        if key in damaged or missing:
            lost.append(damaged.get(key) or Fault(tar.name, key, offset, f"its {', '.join(sorted(missing))} is gone"))
            continue
        try:
            row = sample_row(tar, key, parts)
            faults = [*sample_faults(tar, row, deep)]
        except UserError as error:
            faults = [Fault(tar.name, key, offset, str(error))]
        lost += faults
        rows += [] if faults else [row]
    lost += [fault for key, fault in damaged.items() if key not in members]
    for row in without_clip(tar, rows):
        rows.remove(row)
        lost.append(Fault(tar.name, row.key, min(m.offset for m in row.members.values()), "its video is gone"))
    return rows, lost


def _kinds(extensions: Iterable[str]) -> frozenset[str]:
    """What a sample consists of: a video is one, whatever its container, and a text may be missing."""
    return frozenset("video" if extension in VIDEO_EXTENSIONS else extension for extension in extensions) - {"txt"}


def _find_entries(tar: Path) -> tuple[list[Entry], list[Fault], set[str]]:
    """Walk all headers of a tar, and behind damage go on at the next one; the keys beside damage may miss a member."""
    entries: list[Entry] = []
    lost: list[Fault] = []
    torn: set[str] = set()
    start: int | None = 0
    last_key = ""
    while start is not None:
        behind_damage = start > 0
        try:
            for entry in walk_tar(tar, start):
                if entry.kind == tarfile.DIRTYPE:
                    continue
                last_key = split_name(entry.name)[0]
                if behind_damage:
                    torn.add(last_key)
                    behind_damage = False
                if fault := refusal(entry):
                    lost.append(Fault(tar.name, last_key, entry.header_offset, fault))
                else:
                    entries.append(entry)
            start = None
        except TarFault as fault:
            torn.add(last_key)
            start = find_header(tar, fault.offset + BLOCK_BYTES)
    return entries, lost, torn


def _restore(tar: Path, members: dict[str, dict[str, Member]]) -> dict[str, Fault]:
    """Add the members whose header is lost but whose bytes are as the index says; return the keys that are damaged.

    Bytes that differ at the place the index gives are damage; another place means that the index is of another tar.
    """
    damaged = {}
    for row in _old_rows(tar):
        for extension, member in row.members.items():
            found = members.get(row.key, {}).get(extension)
            if found is not None and (found.offset, found.size_bytes) != (member.offset, member.size_bytes):
                continue
            try:
                read_member(tar, row, extension)
                members.setdefault(row.key, {})[extension] = member
            except BadSample as error:
                damaged[row.key] = Fault(tar.name, row.key, member.offset, str(error))
    return damaged


def _write_tar(tar: Path, rows: list[SampleRow], target: Path) -> None:
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for row in rows:
            for extension in row.members:
                data = read_member(tar, row, extension)
                add_member(archive, f"{row.key}.{extension}", data)
