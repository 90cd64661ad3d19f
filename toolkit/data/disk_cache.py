"""A bounded folder of byte strings fetched from elsewhere, shared by all workers, ranks and runs of a machine.

Test: pytest tests/data/test_remote.py

A file's name is the hash of what it is a copy of, so no two can collide. Nothing here is trusted or needed: a file is
checked against its crc32 whenever it is read, and any file may be deleted at any time. What else lies in the folder is the
user's: it is neither counted nor touched.
"""

import contextlib
import hashlib
import os
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.errors import UserError

# A process measures the folder after writing this share of the bound, and then frees a quarter of it: so the bound
# holds for as many as 64 processes that write at once.
_LOOK_SHARE, _KEEP_SHARE = 1 / 256, 3 / 4
_OWN_NAME = re.compile(r"[0-9a-f]{64}(\.[^.]+\.tmp)?")  # a copy, or one that is, or was never, finished


@dataclass(eq=False)
class DiskCache:
    """Keeps the copies used last, up to about limit_bytes."""

    folder: Path
    limit_bytes: int
    # what others left there is not known yet
    _unmeasured_bytes: float = field(default=float("inf"), init=False, repr=False)

    def read(self, name: str, crc32: int) -> bytes | None:
        """Read a copy, and note that it was used; None where there is none, or one that was torn or edited."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if zlib.crc32(data) != crc32:
            return None
        with contextlib.suppress(OSError):  # another user's, or removed since
            os.utime(path)
        return data

    def write(self, name: str, data: bytes) -> None:
        """Keep a copy, aside and renamed, so that a reader sees all of it or none. Raises UserError for a full disk."""
        if len(data) > self.limit_bytes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self._path(name)
            aside = f"{path}.{os.urandom(8).hex()}.tmp"
            try:
                with open(aside, "xb") as file:  # readable by whom this user's files are; tempfile's are not
                    file.write(data)
                with contextlib.suppress(FileNotFoundError):  # another process, over the bound, removed it already
                    os.replace(aside, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(aside)
                raise
        except OSError as error:
            raise UserError(
                f"data.cache_dir {self.folder} cannot be written: {error.strerror}; free space, lower data.cache_gb, or "
                "name another folder"
            ) from error
        self._unmeasured_bytes += len(data)
        if self._unmeasured_bytes > _LOOK_SHARE * self.limit_bytes:
            self._unmeasured_bytes = 0
            self._shrink()

    def _shrink(self) -> None:
        """Remove the copies unused for longest where all together are over the bound; readers keep what they opened."""
        files = []
        for entry in os.scandir(self.folder):
            if not _OWN_NAME.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process removes them too
                status = entry.stat()
                files.append((status.st_mtime_ns, status.st_size, entry.path))
        total_bytes = sum(size_bytes for _, size_bytes, _ in files)
        if total_bytes <= self.limit_bytes:
            return
        for _, size_bytes, path in sorted(files):
            if total_bytes <= _KEEP_SHARE * self.limit_bytes:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total_bytes -= size_bytes

    def _path(self, name: str) -> Path:
        return self.folder / hashlib.sha256(name.encode()).hexdigest()
