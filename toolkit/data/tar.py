"""Walk a plain tar header by header, or find where its headers go on behind damage; nothing is extracted.

Test: pytest tests/data/test_security.py

Our own, because tarfile takes a damaged header for the end of the archive, and reads extension headers of any size
into memory.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 512  # a tar is made of these, and ends in two zero ones
# Long names and pax headers before one member, which are read into memory: more of them, or larger ones, would only
# make a small tar long to read.
_MAX_EXTENSIONS, _MAX_EXTENSION_BYTES = 8, 1 << 16
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_CHUNK_BYTES = 1 << 20
_LONG_NAME, _PAX, _PAX_GLOBAL = tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE


class TarFault(ValueError):
    """What is wrong with a tar, and at which offset in bytes."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset


@dataclass(frozen=True)
class Entry:
    """One member: its header, which begins with its extension headers if it has some, and its data, in bytes."""

    name: str
    kind: bytes  # the tar's type flag
    header_offset: int
    offset: int
    size_bytes: int

    @property
    def end(self) -> int:
        return self.offset + -(-self.size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def walk_tar(tar: Path, start: int = 0) -> Iterator[Entry]:
    """Yield the members of a tar from a header on, directories and links too. Raises TarFault, also at its end.

    Only zeros are the end of a tar, and they are two blocks at least.
    """
    with open(tar, "rb") as file:
        total_bytes, offset = os.fstat(file.fileno()).st_size, start
        while (entry := _read_entry(file, offset, total_bytes)) is not None:
            yield entry
            offset = entry.end
        _refuse_tail(file, offset, total_bytes)


def find_header(tar: Path, start: int) -> int | None:
    """Find the next block from `start` on that is a header by its mark and its checksum."""
    with open(tar, "rb") as file:
        offset = -(-start // BLOCK_BYTES) * BLOCK_BYTES
        file.seek(offset)
        while chunk := file.read(_CHUNK_BYTES):
            at = chunk.find(b"ustar")
            while at >= 0:
                block = at // BLOCK_BYTES * BLOCK_BYTES
                if at - block == 257 and _is_header(chunk[block : block + BLOCK_BYTES]):
                    return offset + block
                at = chunk.find(b"ustar", at + 1)
            offset += len(chunk)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _read_entry(file: BinaryIO, start: int, total_bytes: int) -> Entry | None:
    """Read the member whose header begins at `start`; None at the zeros that end a tar."""
    offset, long_name, extensions, extension_bytes = start, None, 0, 0
    while True:
        file.seek(offset)
        block = file.read(BLOCK_BYTES)
        if offset == start and not block.strip(b"\0"):
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise TarFault(offset, _no_header(block, offset, error)) from None
        offset += BLOCK_BYTES
        if info.size < 0:
            raise TarFault(offset - BLOCK_BYTES, f"a member of {info.size} bytes")
        if info.type not in (_LONG_NAME, _PAX, _PAX_GLOBAL):
            break
        extensions, extension_bytes = extensions + 1, extension_bytes + info.size
        if extensions > _MAX_EXTENSIONS or extension_bytes > _MAX_EXTENSION_BYTES:
            raise TarFault(
                offset - BLOCK_BYTES,
                f"{extensions} extension headers of {extension_bytes} bytes before one member; up to {_MAX_EXTENSIONS} of "
                f"{_MAX_EXTENSION_BYTES} bytes together are read",
            )
        data = file.read(info.size)
        offset += -(-info.size // BLOCK_BYTES) * BLOCK_BYTES
        if info.type == _LONG_NAME:
            long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        else:
            path = _pax_path(data, start)
            long_name = path if info.type == _PAX and path is not None else long_name
    # Links and devices have no data, whatever their size says; tarfile and GNU tar agree on that.
    has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    entry = Entry(long_name or info.name, info.type, start, offset, info.size if has_data else 0)
    if entry.offset + entry.size_bytes > total_bytes:
        raise TarFault(start, f"cut off within {entry.name!r}, which would end at {entry.offset + entry.size_bytes}")
    return entry


def _no_header(block: bytes, offset: int, error: Exception) -> str:
    if offset == 0:
        for mark, name in _COMPRESSED.items():
            if block.startswith(mark):
                return f"it is compressed with {name}"
    return "cut off within a header" if len(block) < BLOCK_BYTES else f"no tar header ({error})"


def _pax_path(data: bytes, offset: int) -> str | None:
    """Read the path of a pax header; one that overrides a size or describes a sparse file is refused."""
    path = None
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or len(length) > 5 or not len(length) < int(length) <= len(data):
            raise TarFault(offset, "a pax header that is not made of records")
        key, _, value = data[len(length) + 1 : int(length) - 1].decode("utf-8", "surrogateescape").partition("=")
        if key == "size" or key.startswith("GNU.sparse"):
            raise TarFault(offset, f"a pax header that sets {key}")
        path = value if key == "path" else path
        data = data[int(length) :]
    return path


def _refuse_tail(file: BinaryIO, end: int, total_bytes: int) -> None:
    file.seek(end)
    while chunk := file.read(_CHUNK_BYTES):
        if chunk.strip(b"\0"):
            raise TarFault(file.tell() - len(chunk.lstrip(b"\0")), "neither a member nor the end of the tar")
    if total_bytes - end < 2 * BLOCK_BYTES:
        raise TarFault(end, "cut off: the two zero blocks that end a tar are missing")
