"""Files that are files, that appear whole or not at all, and tar members that hold nothing but their content.

Test: pytest tests/data/test_files.py
"""

import io
import os
import shutil
import signal
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from toolkit.data.remote import is_remote
from toolkit.errors import UserError


def local_folder(name: str | Path) -> Path:
    """The folder that a user names, ~ put in. Raises UserError for an address, and for the nothing of an unset variable."""
    if not str(name) or is_remote(str(name)):
        raise UserError(
            f"{name or 'an empty name'} is no folder of this machine; name one, and copy what is or shall be elsewhere"
        )
    return Path(os.path.expanduser(str(name)))


def refuse_files_above(folder: Path) -> None:
    """Raise UserError where a file has the name of a folder to be written, or of one above it."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, and shards lie in a folder; give a new or empty folder")


def try_place(folder: Path, room_bytes: int, remedy: str) -> None:
    """Make a folder; raises UserError where so much cannot be written to it, before what shall be in it is worked out."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # which is nowhere to be seen, and so never left behind
            file.write(bytes(room_bytes))
            file.flush()
            os.fsync(file.fileno())  # some disks say only then that they are full
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; {remedy}") from None


def refuse_irregular(path: Path, remedy: str = "take it out of the folder") -> None:
    """Raise UserError for what bears a file's name and is none: a pipe is waited for, and a device never ends."""
    if not path.is_file():
        raise UserError(f"{path} is no regular file, but a folder, a pipe, a device or a link to nothing; {remedy}")


@contextmanager
def written_aside(path: Path, first_stays: bool = False) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when all of it is written and synced, whoever else writes it too.

    first_stays  where the file has appeared meanwhile, it is not replaced
    """
    aside = _aside(path)
    try:
        with open(aside, "xb") as file:  # never through a link that somebody put there
            yield file
            file.flush()
            os.fsync(file.fileno())
        if first_stays:
            _link_first(aside, path)
        else:
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def is_free(out: Path, folder: bool) -> bool:
    """Whether nothing is at a place, or for a folder nothing but hidden files, such as a killed command leaves."""
    return not out.exists() or (folder and out.is_dir() and all(path.name.startswith(".") for path in out.iterdir()))


@contextmanager
def appearing(out: Path, folder: bool = False) -> Iterator[Path]:
    """Give a place for a file, or a folder, whose content is out's once all is done; what fails or is ended leaves nothing.

    raises  UserError where nothing can be written there, or something has come there meanwhile, which stays
    """
    beside = out if out.is_dir() else out.parent  # an empty folder may be where a disk is mounted, whose name stays
    name = f"{out.stem}.{os.urandom(4).hex()}{out.suffix}"
    aside = beside / f".{name}"
    with _ended_in_order():
        try:
            if not beside.exists():
                beside.mkdir(parents=True, exist_ok=True)
            aside.mkdir() if folder else aside.touch()
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from None
        try:
            yield aside
            if not is_free(out, folder):
                os.replace(aside, beside / name)
                raise UserError(f"{out} has come there meanwhile, and stays; what was made is {beside / name}")
            if out.is_dir():
                for path in aside.iterdir():
                    path.rename(out / path.name)
            else:
                os.replace(aside, out)
        finally:
            shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end this process as Ctrl-C does, which tidies up."""
    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]  # nohup ignores some
    for number in taken:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _aside(path: Path) -> Path:
    """A name that nobody else writes to."""
    return path.with_name(f"{path.name}.{os.urandom(8).hex()}.tmp")


def _link_first(aside: Path, path: Path) -> None:
    try:
        os.link(aside, path)
    except FileExistsError:
        pass
    except OSError:  # a disk without links, on which nobody can be sure to be the first
        os.replace(aside, path)


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file to a tar without date or owner, so that the same content gives the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def share(folder: Path) -> None:
    """Let others read the files below a folder as far as they may read what is written here; safetensors lets nobody."""
    probe = folder / f"{os.urandom(8).hex()}.tmp"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 != mode:
            with suppress(OSError):  # a disk that has modes of its own
                path.chmod(mode)


def link_or_copy(source: Path, target: Path) -> None:
    """Let another folder have a file too, whole whoever else does so, without its space twice where the disk allows that."""
    aside = _aside(target)
    try:
        try:
            os.link(
                source.resolve(), aside
            )  # of a link itself, as the hub's folders are full of, nothing would be kept
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)  # it stays where both names are of one file already
