"""The videos under a folder: which files count, by what names, and what is passed over.

Test: pytest tests/data/test_sources.py
"""

import os
import unicodedata
from pathlib import Path
from typing import NoReturn

from toolkit.errors import UserError

SOURCE_EXTENSIONS = (
    *(".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv"),
    *(".3gp", ".gif", ".m2ts", ".vob", ".mxf", ".asf", ".m2v", ".ogg", ".3g2"),
)


def find_videos(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """List the videos of a tree, the links to folders, which are not followed, and the files of other endings; all sorted.

    Videos and other files are named by their path within the tree; links to files count under the names of the links,
    wherever they lead. The folders of what was deleted, and the ._ files of macOS, are nowhere listed.

    raises  UserError if there are no videos, or a folder or a name cannot be read
    """
    if not folder.is_dir():
        fault = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise UserError(f"{fault}; give the folder that holds the videos")
    names, links, others = [], [], []
    try:
        for parent, folders, files in os.walk(folder, onerror=_stop):
            folders[:] = [name for name in folders if not _holds_deleted(name)]
            links += [path for name in folders if (path := Path(parent, name)).is_symlink()]
            for path in (Path(parent, name) for name in files if not name.startswith("._")):
                if path.suffix.lower() not in SOURCE_EXTENSIONS:
                    others.append(path.relative_to(folder).as_posix())
                elif path.is_file() or not path.exists():
                    names.append(path.relative_to(folder).as_posix())
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); make it readable, or move it away"
        ) from error
    if not names:
        raise UserError(f"no videos in {folder}; files ending in {' '.join(SOURCE_EXTENSIONS)} are looked for")
    for name in names:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):  # as in a shard
            raise UserError(
                f"the name {name!r} in {folder} holds signs that cannot be written as text; rename the video"
            )
    return sorted(names), sorted(str(path) for path in links), sorted(others)


def _holds_deleted(folder: str) -> bool:
    return folder.startswith(".Trash") or folder in ("$RECYCLE.BIN", "lost+found")


def _stop(error: OSError) -> NoReturn:
    raise error
