"""The shard format: a plain tar and, beside it, an index of where each member lies (shards/FORMAT.md).

Test: pytest tests/data/test_format.py

Nothing is ever extracted: a member is read by offset and length, and its crc32 is checked before anything parses it.
"""

import errno
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from toolkit.data.video import CONTAINER_FORMATS, MAX_FPS, VideoError, probe
from toolkit.errors import UserError

INDEX_VERSION = 1
VIDEO_EXTENSIONS = tuple(CONTAINER_FORMATS)
MEMBER_EXTENSIONS = (*VIDEO_EXTENSIONS, "json", "safetensors", "txt")
MAX_MEMBER_BYTES = 1 << 30
_BLOCK_BYTES = 512  # a tar is made of these, and ends in two zero ones


class BadSample(Exception):
    """One sample that cannot be used, with the reason: the loader puts another in its place."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ClipInfo(_Model):
    """The facts of one clip, and the content of its <key>.json. Unknown fields are ignored."""

    fps: float = Field(gt=0, le=MAX_FPS)
    frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    source: str = ""
    start_s: float = Field(default=0.0, ge=0)
    motion: float = Field(default=127.0, ge=0, le=255)
    caption: str | None = None


class Member(_Model):
    """Where the bytes of one member lie in its tar."""

    offset: NonNegativeInt
    size_bytes: NonNegativeInt
    crc32: NonNegativeInt


class SampleRow(_Model):
    """One sample: its members by extension, and what decoding it will give."""

    key: str
    members: dict[str, Member]
    clip: ClipInfo

    @property
    def video_extension(self) -> str | None:
        return next((extension for extension in VIDEO_EXTENSIONS if extension in self.members), None)


class ShardIndex(_Model):
    """The content of x.index.json beside x.tar."""

    format_version: int
    tar_sha256: str
    tar_size_bytes: int
    samples: tuple[SampleRow, ...]


def index_path(tar: Path) -> Path:
    """Name the index of a shard: train-000000.tar -> train-000000.index.json."""
    return tar.with_suffix(".index.json")


def fingerprint(indexes: Iterable[ShardIndex]) -> str:
    """Hash the content of a dataset: sha256 over those of its shards in the order of their names, as a run follows it."""
    return hashlib.sha256("\n".join(index.tar_sha256 for index in indexes).encode()).hexdigest()


def load_index(tar: Path) -> ShardIndex:
    """Read a shard's index, or build and write it at first sight. Raises UserError for a bad tar or a stale index."""
    path = index_path(tar)
    if not path.exists():
        index = build_index(tar)
        try:
            write_index(tar, index)
        except OSError as error:  # shards on a read-only disk are indexed anew by each run
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
        return index
    remedy = f"delete {path} and it is built anew"
    try:
        index = ShardIndex.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path} is not a shard index ({error.errors()[0]['msg']}); {remedy}") from error
    if index.format_version != INDEX_VERSION:
        raise UserError(f"{path} has format version {index.format_version}, this code reads {INDEX_VERSION}; {remedy}")
    if (size_bytes := tar.stat().st_size) != index.tar_size_bytes:
        raise UserError(
            f"{tar} has {size_bytes} bytes but its index was made for {index.tar_size_bytes}: the tar was cut, or "
            f"changed since; restore it, or if the change is meant, {remedy}"
        )
    return index


def write_index(tar: Path, index: ShardIndex) -> None:
    """Write the index aside, sync and rename it, so that a reader sees all of it or none."""
    temporary = index_path(tar).with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(index.model_dump_json(indent=1, exclude_none=True).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, index_path(tar))


def build_index(tar: Path) -> ShardIndex:
    """Index a tar from its headers and bytes. Raises UserError naming the shard, the member and what is wrong."""
    members: dict[str, dict[str, Member]] = {}
    last_key = None
    for name, member in scan_tar(tar):
        key, extension = split_name(name)
        if key in members and key != last_key:
            raise UserError(f"{tar}: the members of {key} are not adjacent; pack with sorted names (tar --sort=name)")
        if extension in members.setdefault(key, {}):
            raise UserError(f"{tar}: {name} is there twice; a key and extension may appear once")
        members[key][extension] = member
        last_key = key
    samples = tuple(_sample_row(tar, key, parts) for key, parts in members.items())
    return ShardIndex(
        format_version=INDEX_VERSION,
        tar_sha256=file_sha256(tar),
        tar_size_bytes=tar.stat().st_size,
        samples=samples,
    )


def file_sha256(path: Path) -> str:
    """Hash a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scan_tar(tar: Path) -> Iterator[tuple[str, Member]]:
    """Yield the name and place of each member of a plain tar; directories are passed over.

    raises  UserError for a compressed or foreign file; a member that is not a regular file, has an absolute or `..`
            name, an extension outside MEMBER_EXTENSIONS or over MAX_MEMBER_BYTES; a tar without its end blocks
    """
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                end = info.offset_data
                if info.isdir():
                    continue
                _refuse_member(tar, info)
                yield info.name, Member(offset=end, size_bytes=info.size, crc32=_crc32(tar, end, info.size))
                end += -(-info.size // _BLOCK_BYTES) * _BLOCK_BYTES
    except tarfile.TarError as error:
        raise UserError(
            f"{tar} is not a plain tar ({error}); shards are uncompressed tars: pack with `tar cf`"
        ) from error
    # tarfile takes a damaged header for the end of the archive and drops the rest in silence; only zeros are the end.
    with open(tar, "rb") as file:
        file.seek(end)
        tail_bytes = 0
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                raise UserError(f"{tar}: damaged at offset {end + tail_bytes}: neither a member nor the end of the tar")
            tail_bytes += len(chunk)
    if tail_bytes < 2 * _BLOCK_BYTES:
        raise UserError(f"{tar}: cut off after offset {end}: the two zero blocks that end a tar are missing")


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension at the first dot of its last part, as webdataset does."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension


def read_member(tar: Path, row: SampleRow, extension: str) -> bytes:
    """Read one member by offset and check its crc32. Raises BadSample naming the offset."""
    member = row.members[extension]
    try:
        data = _pread(tar, member.offset, member.size_bytes)
    except OSError as error:
        raise BadSample(f"{row.key}.{extension} at offset {member.offset}: {error.strerror}") from error
    if zlib.crc32(data) != member.crc32:
        raise BadSample(f"{row.key}.{extension} at offset {member.offset}: checksum differs from the index")
    return data


def _refuse_member(tar: Path, info: tarfile.TarInfo) -> None:
    fault = None
    extension = split_name(info.name)[1]
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
        fault = "not a regular file"
    elif info.name.startswith("/") or ".." in info.name.split("/") or "\0" in info.name:
        fault = "an absolute or climbing name"
    elif extension not in MEMBER_EXTENSIONS:
        fault = f"extension {extension!r}; allowed are {', '.join(MEMBER_EXTENSIONS)}"
    elif info.size > MAX_MEMBER_BYTES:
        fault = f"{info.size} bytes; allowed are {MAX_MEMBER_BYTES}"
    if fault:
        raise UserError(f"{tar}: member {info.name!r} is refused: {fault}")


def _sample_row(tar: Path, key: str, members: dict[str, Member]) -> SampleRow:
    """Take the facts from the sidecar where it has them; otherwise ask the video itself, as for foreign shards."""
    row = SampleRow.model_construct(key=key, members=members)  # type: ignore[call-arg]  # its facts come below
    extension = row.video_extension
    try:
        sidecar = json.loads(read_member(tar, row, "json")) if "json" in members else {}
        if not isinstance(sidecar, dict):
            raise BadSample(f"{key}.json is not an object")
        if extension and not sidecar.keys() >= {"fps", "frames", "height", "width"}:
            facts = probe(read_member(tar, row, extension), extension)
            sidecar |= {"fps": facts.fps, "frames": facts.frames, "height": facts.height_px, "width": facts.width_px}
        return SampleRow(key=key, members=members, clip=ClipInfo.model_validate(sidecar))
    except (BadSample, VideoError, ValidationError, ValueError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            fault = error.errors()[0]
            reason = f"{key}.json, field {fault['loc'][0]}: {fault['msg']}"
        raise UserError(f"{tar}: sample {key} cannot be indexed: {reason}") from error


def _crc32(tar: Path, offset: int, size_bytes: int) -> int:
    return zlib.crc32(_pread(tar, offset, size_bytes))


def _pread(tar: Path, offset: int, size_bytes: int) -> bytes:
    # Opened per read: no descriptor to share across forks or to leak, for some microseconds.
    with open(tar, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size_bytes, offset)
