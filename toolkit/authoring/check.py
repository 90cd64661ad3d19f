"""Does a folder of shards keep every promise of shards/FORMAT.md? Each fault with its shard, key and offset.

Test: pytest tests/authoring/test_check.py
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from tarfile import DIRTYPE
from typing import Any, NamedTuple

from safetensors.torch import load
from tqdm import tqdm

from toolkit.authoring.staging import RECORD, load_record
from toolkit.data.files import local_folder, refuse_irregular
from toolkit.data.format import (
    BadSample,
    ClipInfo,
    SampleRow,
    ShardIndex,
    build_index,
    file_sha256,
    index_path,
    indexed_tars,
    load_index,
    read_index,
    read_member,
    refusal,
    sample_row,
    split_name,
)
from toolkit.data.index import UNFINISHED
from toolkit.data.latents import CACHE_FILE, LatentsError
from toolkit.data.tar import TarFault, walk_tar
from toolkit.data.video import VideoError, iter_frames, probe
from toolkit.errors import UserError, printable
from toolkit.parallel import Workers, cores

_BLOCK_SAMPLES = 16  # checked by one process at a time
_POOL_BYTES = 64_000_000  # below this, processes take longer to start than to check
_FPS_TOLERANCE = 0.02
_CHANGED = "sha256 differs from the index although every member is intact: headers or padding changed"


@dataclass(frozen=True)
class Fault:
    """One thing wrong, and where: offset in bytes in the tar, key None when it is the shard as a whole.

    repairable  a copy made by --repair is without it; what is damaged is left out of that copy
    """

    shard: str
    key: str | None
    offset: int | None
    fault: str
    repairable: bool = True

    def __str__(self) -> str:
        text = f"{self.shard}, {self.key or 'whole shard'}, offset {self.offset or 0}: {self.fault}"
        return printable(text)


@dataclass
class CheckReport:
    """What a folder holds and what is wrong with it; clips and seconds count what the indexes list."""

    shards: int = 0
    train: int = 0
    val: int = 0
    seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)

    @property
    def clips(self) -> int:
        return self.train + self.val

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong, as the exit code says."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        return {"clips": self.clips} | asdict(self)

    def summary(self) -> str:
        clips = f"{self.clips} clips ({self.train} train, {self.val} val), {self.seconds:.1f} s"
        return "\n".join([*map(str, self.faults), f"{self.shards} shards, {clips}, {len(self.faults)} faults"])


@dataclass(frozen=True)
class _Block:
    """What one process checks at a time: some samples of a shard, or, if there are none, its layout."""

    tar: Path
    index: ShardIndex
    samples: tuple[SampleRow, ...] = ()

    @property
    def size_bytes(self) -> int:
        members = [member.size_bytes for row in self.samples for member in row.members.values()]
        return sum(members) if self.samples else self.index.tar_size_bytes


def check(folder: str | Path, deep: bool = False) -> CheckReport:
    """Verify every shard of a folder against its index, and every clip against its facts, on all cores.

    A shard without an index gets one, as from a run that opens it.

    deep    decode every frame and look at every number of cached clips
    raises  UserError if the folder holds no shards
    """
    folder = local_folder(folder)
    tars = find_tars(folder)
    report = CheckReport(shards=len(tars))
    indexes: dict[Path, ShardIndex] = {}
    jobs = cores() if sum(tar.stat().st_size for tar in tars if tar.is_file()) > _POOL_BYTES else 1
    with Workers(jobs, remedy="end other programs and start the same command again") as workers:
        opened = workers.run(_open, tars)
        for tar, (index, faults) in tqdm(opened, "indexes", len(tars), unit="shard"):
            report.faults += faults
            if index is not None:
                indexes[tar] = index
        blocks = [block for tar, index in indexes.items() for block in _blocks(tar, index)]
        with tqdm(desc="check", total=sum(block.size_bytes for block in blocks), unit="B", unit_scale=True) as bar:
            for block, faults in workers.run(partial(_check_block, deep=deep), blocks):
                report.faults += faults
                bar.update(block.size_bytes)
    indexes = dict(sorted(indexes.items()))
    for tar, index in indexes.items():
        report.train += 0 if _is_val(tar) else len(index.samples)
        report.val += len(index.samples) if _is_val(tar) else 0
        report.seconds += sum(row.clip.frames / row.clip.fps for row in index.samples)
    explained = {fault.shard for fault in report.faults if fault.fault != _CHANGED}
    report.faults = [fault for fault in report.faults if fault.fault != _CHANGED or fault.shard not in explained]
    report.faults += [*faults_between(indexes), *_faults_beside(folder, tars)]
    report.faults.sort(key=lambda fault: (fault.shard, fault.offset or 0, fault.key or ""))
    return report


def find_tars(folder: Path) -> list[Path]:
    """List the shards of a folder by name. Raises UserError if there are none."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder that holds the shards")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"no .tar shards in {folder}; pack videos into it: python shards/pack.py VIDEOS {folder}")
    return tars


def lost_tars(folder: Path, tars: Sequence[Path]) -> dict[Path, str]:
    """Name the shards that are not there, with what tells of them: an index, or the record of the packing."""
    record = load_record(folder)
    listed = {folder / name: f"the tar is gone, but {RECORD} lists it" for name in (record.shards if record else ())}
    told = listed | dict.fromkeys(indexed_tars(folder), "the tar is gone, but its index is there")
    return {tar: told[tar] for tar in sorted(told.keys() - set(tars))}


def sample_faults(tar: Path, row: SampleRow, deep: bool = False) -> Iterator[Fault]:
    """Yield each member of a sample that changed, and what in it is not as the index says."""
    found = False
    for extension, member in row.members.items():
        try:
            data = read_member(tar, row, extension)
            if extension == row.video_extension:
                _compare_video(data, extension, row.clip, deep)
            elif extension == "safetensors" and deep:  # which sample_row describes below
                _refuse_values(data)
        except (BadSample, VideoError, LatentsError) as error:
            found = True
            yield Fault(tar.name, row.key, member.offset, str(error))
    offset = min(member.offset for member in row.members.values())
    try:
        if not found and sample_row(tar, row.key, row.members) != row:
            yield Fault(tar.name, row.key, offset, "the index says other facts than the sample itself")
    except UserError as error:
        yield Fault(tar.name, row.key, offset, str(error))


def without_clip(tar: Path, rows: Sequence[SampleRow]) -> list[SampleRow]:
    """List the samples that hold no video; in a cache, that is how a clip stands that did not decode."""
    is_cache = any(row.latents for row in rows) or (tar.parent / CACHE_FILE).exists()
    return [] if is_cache else [row for row in rows if row.video_extension is None]


def shard_faults(tar: Path, index: ShardIndex, deep: bool = False) -> list[Fault]:
    """List all that is wrong within one shard, in this process."""
    return [fault for block in _blocks(tar, index) for fault in _check_block(block, deep)]


def _open(tar: Path) -> tuple[ShardIndex | None, list[Fault]]:
    """Find the index of a shard; if it does not fit, what stands in it still tells which samples are lost."""
    faults: list[Fault] = []
    try:
        refuse_irregular(tar)
    except UserError as error:
        return None, [Fault(tar.name, None, None, str(error))]
    if index_path(tar).exists():
        try:
            return load_index(tar), faults
        except UserError as error:
            faults.append(Fault(tar.name, None, None, str(error)))
        try:
            return read_index(tar), faults
        except UserError:
            pass
    try:
        return (build_index if faults else load_index)(tar), faults  # what is there is not replaced
    except UserError as error:
        return None, faults + ([*_layout_faults(tar)] or [Fault(tar.name, None, None, str(error))])


def _blocks(tar: Path, index: ShardIndex) -> Iterator[_Block]:
    yield _Block(tar, index)
    for start in range(0, len(index.samples), _BLOCK_SAMPLES):
        yield _Block(tar, index.model_copy(update={"samples": ()}), index.samples[start : start + _BLOCK_SAMPLES])


def _check_block(block: _Block, deep: bool) -> list[Fault]:
    if block.samples:
        return [fault for row in block.samples for fault in sample_faults(block.tar, row, deep)]
    try:
        changed = file_sha256(block.tar) != block.index.tar_sha256
        return [*_layout_faults(block.tar, block.index)] + [Fault(block.tar.name, None, None, _CHANGED)] * changed
    except OSError as error:
        return [Fault(block.tar.name, None, None, str(error))]


def _layout_faults(tar: Path, index: ShardIndex | None = None) -> Iterator[Fault]:
    """Yield what the headers of a tar say against the format, or against its index."""
    rows = index.samples if index else ()
    listed = {(f"{row.key}.{ext}", m.offset, m.size_bytes): row for row in rows for ext, m in row.members.items()}
    unseen = dict(listed)
    try:
        for entry in walk_tar(tar):
            place = (entry.name, entry.offset, entry.size_bytes)
            key = split_name(entry.name)[0]
            if entry.kind == DIRTYPE:
                continue
            if fault := refusal(entry):
                yield Fault(tar.name, key, entry.header_offset, f"{entry.name!r} is refused: {fault}")
            elif index and place not in listed:
                yield Fault(tar.name, key, entry.offset, f"{entry.name!r} is not in the index, or elsewhere")
            unseen.pop(place, None)
    except TarFault as fault:
        yield Fault(tar.name, None, fault.offset, str(fault))
    except OSError as error:
        yield Fault(tar.name, None, None, str(error))
    else:
        for (name, offset, _), row in unseen.items():
            yield Fault(tar.name, row.key, offset, f"{name!r} of the index has no header in the tar")
    if index and not rows:
        yield Fault(tar.name, None, None, "holds no samples")
    for row in without_clip(tar, rows):
        yield Fault(tar.name, row.key, min(m.offset for m in row.members.values()), "holds no video")


def _compare_video(data: bytes, extension: str, clip: ClipInfo, deep: bool) -> None:
    """Raise VideoError if a video is not what its facts say."""
    facts = probe(data, extension)
    said, seen = (clip.frames, clip.height, clip.width), (facts.frames, facts.height_px, facts.width_px)
    if said != seen:
        raise VideoError(f"frames, height, width are {seen}, index says {said}")
    if abs(facts.fps / clip.fps - 1) > _FPS_TOLERANCE:
        raise VideoError(f"{facts.fps:.3f} frames/s, index says {clip.fps:.3f}")
    if deep:
        shapes = [frame_HWC.shape for frame_HWC in iter_frames(data, extension=extension)]
        if len(shapes) != clip.frames or len(set(shapes)) > 1:
            raise VideoError(f"{len(shapes)} of {clip.frames} frames decode, in {len(set(shapes))} sizes")


def _refuse_values(data: bytes) -> None:
    """Raise LatentsError for a number that no encoder makes."""
    for name, tensor in load(data).items():
        if not tensor.isfinite().all() or (name == "std" and (tensor < 0).any()):
            raise LatentsError(f"{name} holds numbers that are not finite, or below 0")


def faults_between(indexes: dict[Path, ShardIndex]) -> Iterator[Fault]:
    """Yield keys that two shards share, and clips that are held out of a stretch of a video that is trained on."""
    keys: dict[str, str] = {}
    shown: dict[str, list[_Shown]] = {}
    for tar, row in ((tar, row) for tar, index in indexes.items() for row in index.samples):
        offset = min(member.offset for member in row.members.values())
        if row.key in keys:
            yield Fault(tar.name, row.key, offset, f"{keys[row.key]} has that key too; pack again", False)
        keys.setdefault(row.key, tar.name)
        if row.clip.source:
            end_s = row.clip.start_s + (row.clip.frames - 0.5) / row.clip.fps
            shown.setdefault(row.clip.source, []).append(_Shown(row.clip.start_s, end_s, tar, row.key, offset))
    for source, clips in shown.items():
        train = sorted(clip for clip in clips if not _is_val(clip.tar))
        begins_s = [clip.begin_s for clip in train]
        ends_s = [*accumulate((clip.end_s for clip in train), max)]  # of all up to each, the last end
        for clip in clips:
            before = bisect_left(begins_s, clip.end_s)
            if _is_val(clip.tar) and before and ends_s[before - 1] > clip.begin_s:
                fault = f"what it shows of {source} is in train too; pack again"
                yield Fault(clip.tar.name, clip.key, clip.offset, fault, False)


class _Shown(NamedTuple):
    """A clip, and from when to when of its source it is, up to the middle of its last frame."""

    begin_s: float
    end_s: float
    tar: Path
    key: str
    offset: int


def _faults_beside(folder: Path, tars: list[Path]) -> Iterator[Fault]:
    """Yield what lies beside the shards and does not belong there, and the shards that do not."""
    for name, program in UNFINISHED.items():
        if (folder / name).exists():
            fault = f"not finished; run the same python {program} command again, which goes on where it was stopped"
            yield Fault(name, None, None, fault, False)
    for tar, fault in lost_tars(folder, tars).items():
        yield Fault(tar.name, None, None, fault)


def _is_val(tar: Path) -> bool:
    return tar.name.startswith("val-")
