"""Every video of a tree is found by its path, or said to be passed over. Run: pytest tests/data/test_sources.py"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from toolkit.data.sources import find_videos
from toolkit.errors import UserError

RECORDING = "Screen Recording 2024-05-01 at 3.45.12\u202fPM.mov"  # as macOS names them


def test_videos_are_found_at_any_depth_under_any_name(tmp_path: Path) -> None:
    """In capitals or not, links to files and to nowhere too; pipes and folders do not count; other files are listed."""
    names = [
        "a.mp4",
        "deep/er/B.MKV",
        "deep/AVCHD/0.M2TS",
        "VIDEO_TS/VTS_01_1.VOB",
        f"deep/{RECORDING}",
        "deep/x.mp4/\u65e5\u00a0\u202e.webm",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "deep" / "notes.txt").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    (tmp_path / "same.mp4").symlink_to("a.mp4")
    assert find_videos(tmp_path) == (sorted([*names, "gone.mp4", "same.mp4"]), [], ["deep/notes.txt"])


def test_links_to_folders_are_listed_not_followed(tmp_path: Path) -> None:
    """Not even one that leads back to where it lies."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.mp4").touch()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "more").symlink_to(tmp_path / "deep")
    links = [str(tmp_path / "deep" / "loop"), str(tmp_path / "more")]
    assert find_videos(tmp_path) == (["a.mp4"], links, [])
    assert find_videos(tmp_path / "more" / "loop")[0] == ["a.mp4"]  # the folder that is given may be a link


@pytest.mark.parametrize("name", [".Trash", ".Trash-1000", ".Trashes", "$RECYCLE.BIN", "lost+found"])
def test_of_a_whole_drive_what_was_deleted_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Such a folder is not even opened, wherever it lies; the ._ files of macOS are no videos; all else still is."""
    for path in (f"{name}/files/deleted.mkv", f"deep/{name}/b.mp4", "deep/a.mp4", "deep/._a.mp4", ".trash.mkv"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    _close(name, monkeypatch)
    assert find_videos(tmp_path) == ([".trash.mkv", "deep/a.mp4"], [], [])


@pytest.mark.parametrize("name", ["line\nbreak.mp4", "bell\x07.mp4", "del\x7f.mp4", "not utf-8 \udcff.mp4"])
def test_names_that_a_shard_could_not_hold_are_refused(tmp_path: Path, name: str) -> None:
    """Control characters and bytes that are no text, with the name in one line."""
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="cannot be written as text") as refused:
        find_videos(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named instead, whether it may not be read or the disk does not answer."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.mp4").touch()
    _close("closed", monkeypatch)
    with pytest.raises(UserError, match=r"closed cannot be read \(Permission denied\)"):
        find_videos(tmp_path)


def _close(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith(name):  # the tests may run as root, who may read all
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
