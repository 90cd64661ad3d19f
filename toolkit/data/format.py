"""The shard format: a plain tar and, beside it, an index of where each member lies (shards/FORMAT.md).

Test: pytest tests/data/test_format.py

Nothing is ever extracted: a member is read by offset and length, and its crc32 is checked before anything parses it.
"""

import errno
import hashlib
import json
import os
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from toolkit.data.files import refuse_irregular, written_aside
from toolkit.data.latents import NAMES, LatentsInfo, describe
from toolkit.data.remote import MAKE_INDEX, MAX_INDEX_BYTES, RemoteShard, Shard
from toolkit.data.tar import BLOCK_BYTES, Entry, TarFault, walk_tar
from toolkit.data.video import CONTAINER_FORMATS, MAX_FPS, MAX_FRAMES, probe
from toolkit.errors import UserError, in_one_line

INDEX_VERSION = 1
VIDEO_EXTENSIONS = tuple(CONTAINER_FORMATS)
# What a shard may hold, by extension, and up to how many bytes.
MEMBER_BYTES = dict.fromkeys(VIDEO_EXTENSIONS, 1 << 27) | {"json": 1 << 20, "safetensors": 1 << 30, "txt": 1 << 20}
MIN_FPS = 0.01


class BadSample(Exception):
    """One sample that cannot be used, with the reason: the loader puts another in its place."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class ClipInfo(_Model):
    """The facts of one clip, and the content of its <key>.json. Unknown fields are ignored."""

    fps: float = Field(ge=MIN_FPS, le=MAX_FPS)
    frames: int = Field(gt=0, le=MAX_FRAMES)
    height: PositiveInt
    width: PositiveInt
    source: str = ""
    start_s: float = Field(default=0.0, ge=0)
    motion: float = Field(default=127.0, ge=0, le=255)
    caption: str | None = None
    label: str | None = None


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
    latents: LatentsInfo | None = None  # of a cached clip

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


def indexed_tars(folder: Path) -> set[Path]:
    """The tars that a folder holds indexes of, whether they are there or not."""
    return {path.with_name(f"{path.name.removesuffix('.index.json')}.tar") for path in folder.glob("*.index.json")}


def fingerprint(indexes: Iterable[ShardIndex]) -> str:
    """Hash what a run reads: each shard's bytes and the rows of its index, shard by shard in the order of their names."""
    lines = (f"{index.tar_sha256} {hashlib.sha256(_rows_json(index)).hexdigest()}" for index in indexes)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _rows_json(index: ShardIndex) -> bytes:
    return index.model_dump_json(include={"samples"}, exclude_none=True).encode()


def load_index(tar: Shard) -> ShardIndex:
    """Read a shard's index, or build and write it at first sight. Raises UserError for a bad tar or a stale index."""
    if isinstance(tar, RemoteShard):
        index = _parse_index(
            tar.read_index(), f"the index of {tar}", f"make it anew where the shards are: {MAKE_INDEX}"
        )
        if (size_bytes := tar.size_bytes()) != index.tar_size_bytes:
            raise UserError(
                f"{tar} has {size_bytes} bytes, its index was made for {index.tar_size_bytes}; {MAKE_INDEX}"
            )
        return index
    path = index_path(tar)
    if not path.exists():
        index = build_index(tar)
        try:
            write_index(tar, index)
        except OSError as error:  # shards on a read-only disk are indexed anew by each run
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
        return index
    index = read_index(tar)
    fault = None
    if (size_bytes := tar.stat().st_size) != index.tar_size_bytes:
        fault = f"has {size_bytes} bytes but its index was made for {index.tar_size_bytes}"
    elif (offset := _find_moved(tar, index)) is not None:
        fault = f"is not what its index was made for: at offset {offset} is another member than it says"
    if fault:
        raise UserError(
            f"{tar} {fault}: the tar was cut, or changed since; restore it, or if the change is meant, {_rebuild(path)}"
        )
    return index


def read_index(tar: Path) -> ShardIndex:
    """Read what stands in the index beside a tar, whether it fits the tar or not. Raises UserError."""
    path = index_path(tar)
    refuse_irregular(path, _rebuild(path))
    with _naming(path), open(path, "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        text = file.read(MAX_INDEX_BYTES + 1) if size_bytes <= MAX_INDEX_BYTES else b""
    if max(size_bytes, len(text)) > MAX_INDEX_BYTES:
        raise UserError(f"{path} has over {MAX_INDEX_BYTES} bytes; {_rebuild(path)}")
    return _parse_index(text, str(path), _rebuild(path))


def is_whole(tar: Path) -> bool:
    """Whether a tar and the index beside it are there, and the tar has the size that the index says."""
    try:
        return tar.stat().st_size == read_index(tar).tar_size_bytes
    except (OSError, UserError):
        return False


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file that a failing disk could not read; its error says why, but not where."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; restore it, or take it out of the folder") from error


def _rebuild(path: Path) -> str:
    return f"delete {path} and it is built anew"


def _parse_index(text: bytes, where: str, remedy: str) -> ShardIndex:
    try:
        index = ShardIndex.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{where} is not a shard index ({error.errors()[0]['msg']}); {remedy}") from error
    if index.format_version != INDEX_VERSION:
        raise UserError(f"{where} has format version {index.format_version}, this code reads {INDEX_VERSION}; {remedy}")
    if fault := _misplaced(index):
        raise UserError(f"{where} does not fit a tar: {fault}; {remedy}")
    return index


def _misplaced(index: ShardIndex) -> str | None:
    """Name the first member that cannot lie in the tar as the index says: in order, each behind a header of its own."""
    end, keys = 0, set()
    for row in index.samples:
        if row.key in keys:
            return f"{row.key!r} is there twice"
        keys.add(row.key)
        if not row.members:
            return f"{row.key!r} has no members"
        for extension, member in row.members.items():
            if fault := name_fault(f"{row.key}.{extension}"):
                return f"{row.key!r} is {fault}"
            if split_name(f"{row.key}.{extension}")[0] != row.key:
                return f"{row.key!r} is no key, which ends before the first dot"
            if member.size_bytes > MEMBER_BYTES.get(extension, -1):
                return f"{row.key}.{extension} of {member.size_bytes} bytes"
            if member.offset < end + BLOCK_BYTES or member.offset % BLOCK_BYTES:
                return f"{row.key}.{extension} at offset {member.offset}"
            end = member.offset + member.size_bytes
        if row.latents and not (
            row.latents.frames == row.clip.frames and _fits(row.latents, row.members.get("safetensors"))
        ):
            return f"{row.key}.safetensors holds other tensors"
    return f"members up to offset {end} in {index.tar_size_bytes} bytes" if end > index.tar_size_bytes else None


def _fits(latents: LatentsInfo, member: Member | None) -> bool:
    rows = latents.variants * latents.frames
    if member is None or len(latents.frame_crc32) != 8 * rows or set(latents.offsets) != set(NAMES):
        return False
    return all(latents.offsets[name] + rows * latents.frame_bytes[name] <= member.size_bytes for name in NAMES)


def _find_moved(tar: Path, index: ShardIndex) -> int | None:
    """Compare the first and the last header with the index, so that another tar of the same size is seen at start."""
    members = [member for row in index.samples for member in row.members.values()]
    for member in members and (members[0], members[-1]):
        try:
            header = tarfile.TarInfo.frombuf(_pread(tar, member.offset - BLOCK_BYTES, BLOCK_BYTES), "utf-8", "replace")
        except (tarfile.HeaderError, OSError):
            return member.offset
        if header.size != member.size_bytes:
            return member.offset
    return None


def write_index(tar: Path, index: ShardIndex) -> None:
    """Write the index aside, sync and rename it, so that a reader sees all of it or none."""
    with written_aside(index_path(tar)) as file:
        file.write(_index_json(index))


def _index_json(index: ShardIndex) -> bytes:
    return index.model_dump_json(indent=1, exclude_none=True).encode()


def build_index(tar: Path) -> ShardIndex:
    """Index a tar from its headers and bytes. Raises UserError naming the shard, the member and what is wrong."""
    members: dict[str, dict[str, Member]] = {}
    last_key = None
    with _naming(tar):
        for name, member in scan_tar(tar):
            key, extension = split_name(name)
            if key in members and key != last_key:
                raise UserError(
                    f"{tar}: the members of {key} are not adjacent; pack with sorted names (tar --sort=name)"
                )
            if extension in members.setdefault(key, {}):
                raise UserError(f"{tar}: {name} is there twice; a key and extension may appear once")
            members[key][extension] = member
            last_key = key
        samples = tuple(sample_row(tar, key, parts) for key, parts in members.items())
        index = ShardIndex(
            format_version=INDEX_VERSION,
            tar_sha256=file_sha256(tar),
            tar_size_bytes=tar.stat().st_size,
            samples=samples,
        )
    if (size_bytes := len(_index_json(index))) > MAX_INDEX_BYTES:
        raise UserError(
            f"the index of {tar} would have {size_bytes} bytes, read are {MAX_INDEX_BYTES}; pack smaller shards"
        )
    return index


def file_sha256(path: Path) -> str:
    """Hash a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scan_tar(tar: Path) -> Iterator[tuple[str, Member]]:
    """Yield the name and place of each member of a plain tar; directories are passed over.

    raises  UserError for a compressed, damaged or cut tar, and for a member that `refusal` refuses
    """
    try:
        for entry in walk_tar(tar):
            if entry.kind == tarfile.DIRTYPE:
                continue
            if fault := refusal(entry):
                raise UserError(
                    f"{tar}: member {entry.name!r} at offset {entry.header_offset} is refused: {fault}; a copy without such "
                    f"members is made by python shards/check.py {tar.parent} --repair OUT"
                )
            crc32 = crc32_of(tar, entry.offset, entry.size_bytes)
            yield entry.name, Member(offset=entry.offset, size_bytes=entry.size_bytes, crc32=crc32)
    except TarFault as fault:
        if fault.offset == 0:
            remedy = "shards are uncompressed tars: pack with `tar cf`"
            raise UserError(f"{tar} is not a plain tar ({fault}); {remedy}") from None
        raise UserError(f"{tar}: damaged at offset {fault.offset}: {fault}") from None


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension at the first dot of its last part, as webdataset does."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension


def read_member(tar: Shard, row: SampleRow, extension: str) -> bytes:
    """Read one member by offset and check its crc32. Raises BadSample naming the offset."""
    member = row.members[extension]
    try:
        if isinstance(tar, RemoteShard):
            data = tar.read(member.offset, member.size_bytes, member.crc32)
        else:
            data = _pread(tar, member.offset, member.size_bytes)
    except OSError as error:
        raise BadSample(f"{row.key}.{extension} at offset {member.offset}: {error.strerror}") from error
    if zlib.crc32(data) != member.crc32:
        raise BadSample(f"{row.key}.{extension} at offset {member.offset}: checksum differs from the index")
    return data


def crc32_of(tar: Path, offset: int, size_bytes: int) -> int:
    """Sum a part of a file, whatever its size."""
    crc32 = 0
    with open(tar, "rb") as file:
        file.seek(offset)
        while size_bytes and (chunk := file.read(min(size_bytes, 1 << 20))):
            crc32 = zlib.crc32(chunk, crc32)
            size_bytes -= len(chunk)
    return crc32


def refusal(entry: Entry) -> str | None:
    """Say why a member of a tar has no place in a shard."""
    if entry.kind not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return "not a regular file"
    if fault := name_fault(entry.name):
        return fault
    extension = split_name(entry.name)[1]
    if extension.lower() in MEMBER_BYTES and extension not in MEMBER_BYTES:
        return f"extension {extension!r}; name it {extension.lower()!r} and pack again"
    if extension not in MEMBER_BYTES:
        return f"extension {extension!r}; allowed are {', '.join(MEMBER_BYTES)}"
    if entry.size_bytes > MEMBER_BYTES[extension]:
        return f"{entry.size_bytes} bytes; allowed are {MEMBER_BYTES[extension]}"
    return None


def name_fault(name: str) -> str | None:
    """Say what is wrong with the name of a member, whether a tar or an index gives it."""
    if name.startswith("/") or ".." in name.split("/"):
        return "an absolute or climbing name"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "a name with control characters, or that is not UTF-8"
    return None


def sample_row(tar: Path, key: str, members: dict[str, Member]) -> SampleRow:
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
        clip = ClipInfo.model_validate(sidecar)
        latents = describe(read_member(tar, row, "safetensors")) if "safetensors" in members else None
        if latents and latents.frames != clip.frames:
            raise BadSample(f"{key}.safetensors has {latents.frames} frames, {key}.json says {clip.frames}")
        return SampleRow(key=key, members=members, clip=clip, latents=latents)
    except (BadSample, ValueError, RecursionError) as error:
        reason = in_one_line(error)
        if isinstance(error, ValidationError):
            fault = error.errors()[0]
            reason = f"{key}.json, field {fault['loc'][0]}: {fault['msg']}"
        raise UserError(f"{tar}: sample {key} cannot be indexed: {reason}") from error


def _pread(tar: Path, offset: int, size_bytes: int) -> bytes:
    # Opened per read: no descriptor to share across forks or to leak, for some microseconds.
    with open(tar, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size_bytes, offset)
