"""Files appear whole or not at all, and tars hold content only. Run: pytest tests/data/test_files.py"""

import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from toolkit.data.files import add_member, appearing, link_or_copy, share, written_aside
from toolkit.errors import UserError


def test_nothing_is_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who could tell the name it is written under, and put a link there, would choose the file that is written."""
    (tmp_path / "precious").write_bytes(b"precious")
    monkeypatch.setattr(os, "urandom", bytes)  # so that it can be told
    with written_aside(tmp_path / "a") as file:
        os.rename(file.name, tmp_path / "name")
        os.symlink(tmp_path / "precious", file.name)
        link = Path(file.name)
        with pytest.raises(FileExistsError), written_aside(tmp_path / "a"):
            pass
        os.rename(tmp_path / "name", link)
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("first_stays", [False, True])
def test_nobody_sees_half_a_file(tmp_path: Path, first_stays: bool) -> None:
    """Until it is whole there is no file, or the old one; of a write that fails nothing stays."""
    path = tmp_path / "a.bin"
    for before in (None, b"old"):
        if before:
            path.write_bytes(before)
        with pytest.raises(ZeroDivisionError), written_aside(path, first_stays) as file:
            file.write(b"half")
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
            raise ZeroDivisionError
        assert [found.read_bytes() for found in tmp_path.iterdir()] == ([before] if before else [])


def test_the_last_or_the_first_of_two_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may be read already is not replaced; on a disk without links the last wins, and is whole."""
    path = tmp_path / "a.bin"
    for first_stays, expected in ((False, b"outer"), (True, b"inner")):
        path.unlink(missing_ok=True)
        with written_aside(path, first_stays) as file:
            file.write(b"outer")
            path.write_bytes(b"inner")
        assert path.read_bytes() == expected and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, "link", _refuse_link)
    with written_aside(path, first_stays=True) as file:
        file.write(b"again")
    assert path.read_bytes() == b"again" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("folder", [False, True])
def test_what_is_ended_leaves_nothing(tmp_path: Path, number: int, folder: bool) -> None:
    """As a batch system or a closed terminal ends it: no half of a network or a film stays beside its place."""
    code = (
        "import os, signal, sys, time; from pathlib import Path; from toolkit.data.files import appearing\n"
        "signal.signal(int(sys.argv[3]), signal.SIG_DFL)\n"  # nohup ignores one of them
        "with appearing(Path(sys.argv[1]), sys.argv[2] == 'True') as aside:\n"
        "    (aside / 'half' if aside.is_dir() else aside).write_text('half')\n"
        "    os.kill(os.getpid(), int(sys.argv[3])); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out", str(folder), str(int(number))])
    assert done.returncode and not [*tmp_path.iterdir()]


def test_two_folders_are_not_mixed(tmp_path: Path) -> None:
    """Both were empty when their work began: the first to end is there, and the other's is kept."""
    (tmp_path / ".begun").touch()  # of a command that was killed
    says = pytest.raises(UserError, match="has come there meanwhile, and stays; what was made is")
    with says, appearing(tmp_path, folder=True) as late:
        (late / "0").write_text("late")
        with appearing(tmp_path, folder=True) as early:
            (early / "0").write_text("early")
    (kept,) = tmp_path.glob("*/")
    assert (tmp_path / "0").read_text() == "early" and (kept / "0").read_text() == "late"


def _refuse_link(*paths: Path) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_the_same_members_are_the_same_bytes() -> None:
    """A member has its name and content, and neither date nor owner."""
    archives = []
    for _ in range(2):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            add_member(archive, "a.json", b"{}")
        archives.append(buffer.getvalue())
    assert archives[0] == archives[1]
    with tarfile.open(fileobj=io.BytesIO(archives[0])) as archive:
        [member] = archive.getmembers()
        assert (member.name, member.size, member.mtime, member.uid, member.uname) == ("a.json", 2, 0, 0, "")
        assert archive.extractfile(member).read() == b"{}"  # type: ignore[union-attr]


def test_a_file_is_shared_where_the_disk_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linked, or copied where links are not to be had; what stood there before is replaced, not written into."""
    source, target, other = (tmp_path / name for name in ("source", "target", "other"))
    source.write_bytes(b"new")
    other.write_bytes(b"old")
    os.link(other, target)
    link_or_copy(source, target)
    assert target.samefile(source) and other.read_bytes() == b"old"
    (tmp_path / "link").symlink_to("source")
    link_or_copy(tmp_path / "link", target)
    assert target.samefile(source) and not target.is_symlink()
    link_or_copy(source, target)  # again
    monkeypatch.setattr(os, "link", _refuse_link)
    link_or_copy(source, target)
    assert target.read_bytes() == b"new" and not target.samefile(source)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target", "other", "link"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_is_up_to_the_user(tmp_path: Path, umask: int, mode: int) -> None:
    """Files that a library made for their owner alone, in folders below too, are as the umask would have made them."""
    for name in ("a.safetensors", "unet/b.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch(0o600)
    before = os.umask(umask)
    try:
        share(tmp_path)
    finally:
        os.umask(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "chmod", _refuse_link)  # a disk with modes of its own
        share(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2 and {path.stat().st_mode & 0o777 for path in files} == {mode}


@pytest.mark.parametrize("linking", [True, False])
def test_two_may_share_a_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linking: bool) -> None:
    """Another one that shares it, begun and done in the middle of this, is no error; the file is never gone or half."""
    source, target, link = tmp_path / "source", tmp_path / "target", os.link
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    others = [b"the other"]

    def link_late(one: Path, two: Path) -> None:
        assert target.read_bytes() in (b"old", b"new")
        if others.pop() if others else None:
            link_or_copy(source, target)
        link(one, two) if linking else _refuse_link()

    monkeypatch.setattr(os, "link", link_late)
    link_or_copy(source, target)
    assert target.read_bytes() == b"new" and target.samefile(source) is linking and not others
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}
