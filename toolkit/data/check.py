"""Is every byte of a folder of shards still what was packed, and does every clip decode as its index says?

Test: pytest tests/data/test_pack.py
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from toolkit.data.format import (
    BadSample,
    SampleRow,
    ShardIndex,
    file_sha256,
    index_path,
    load_index,
    read_member,
    scan_tar,
)
from toolkit.data.video import VideoError, probe
from toolkit.errors import UserError


@dataclass(frozen=True)
class Fault:
    """One thing wrong, and where: offset in bytes in the tar, key None when it is the shard as a whole."""

    shard: str
    key: str | None
    offset: int | None
    fault: str

    def __str__(self) -> str:
        return f"{self.shard}, {self.key or 'whole shard'}, offset {self.offset or 0}: {self.fault}"


@dataclass
class CheckReport:
    """What a folder holds and what is wrong with it; clips and seconds count what the indexes list."""

    shards: int = 0
    train: int = 0
    val: int = 0
    seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"clips": self.train + self.val} | asdict(self)

    def summary(self) -> str:
        clips = f"{self.train + self.val} clips ({self.train} train, {self.val} val), {self.seconds:.1f} s"
        return "\n".join([*map(str, self.faults), f"{self.shards} shards, {clips}, {len(self.faults)} faults"])


def check(folder: str | Path) -> CheckReport:
    """Verify every shard of a folder against its index, and every clip against its facts."""
    folder = Path(str(folder))
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise UserError(f"no .tar shards in {folder}; pack videos into it: python shards/pack.py VIDEOS {folder}")
    report = CheckReport(shards=len(tars))
    with tqdm(tars, desc="check", unit="shard") as bar:
        for tar in bar:
            try:
                index = load_index(tar)
            except UserError as error:
                report.faults.append(Fault(tar.name, None, None, str(error)))
                continue
            if tar.name.startswith("val-"):
                report.val += len(index.samples)
            else:
                report.train += len(index.samples)
            report.seconds += sum(row.clip.frames / row.clip.fps for row in index.samples)
            report.faults += _shard_faults(tar, index)
    orphans = {path.name for path in folder.glob("*.index.json")} - {index_path(tar).name for tar in tars}
    report.faults += [Fault(name, None, None, "an index without its tar") for name in sorted(orphans)]
    return report


def _shard_faults(tar: Path, index: ShardIndex) -> Iterator[Fault]:
    """Yield what is wrong in one shard, sample by sample first, since that names the place."""
    found = False
    for row in index.samples:
        for fault in _sample_faults(tar, row):
            found = True
            yield fault
    try:
        # The layout is read anew, so that a header damaged between two good members is seen too.
        listed = {member.offset for row in index.samples for member in row.members.values()}
        stray = [(name, member) for name, member in scan_tar(tar) if member.offset not in listed]
        if not found and stray:
            yield Fault(tar.name, None, stray[0][1].offset, f"{stray[0][0]} is not in the index")
        elif not found and file_sha256(tar) != index.tar_sha256:
            yield Fault(tar.name, None, None, "sha256 differs from the index although every listed member is intact")
    except UserError as error:
        yield Fault(tar.name, None, None, str(error))


def _sample_faults(tar: Path, row: SampleRow) -> Iterator[Fault]:
    """Yield each member of a sample that changed, or a video that is not what the index says."""
    for extension, member in row.members.items():
        try:
            data = read_member(tar, row, extension)
            if extension == row.video_extension:
                facts = probe(data, extension)
                said = (row.clip.frames, row.clip.height, row.clip.width)
                seen = (facts.frames, facts.height_px, facts.width_px)
                if said != seen:
                    yield Fault(
                        tar.name, row.key, member.offset, f"frames, height, width are {seen}, index says {said}"
                    )
        except (BadSample, VideoError) as error:
            yield Fault(tar.name, row.key, member.offset, str(error))
