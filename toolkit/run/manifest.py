"""A checkpoint folder's manifest: any flipped bit, lost file or added file is noticed, in the manifest itself as well.

Test: pytest tests/run/test_checkpoint.py, tests/faults/test_checkpoints.py. manifest.json is canonical JSON: its text is a
function of its content, and the content holds the sha256 of the rest of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import platform
import re
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from toolkit.data.format import file_sha256
from toolkit.errors import UserError, in_one_line

_OF_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # other errors pass, such as a server that is away
FORMAT_VERSION = 2  # of the checkpoint folder
MANIFEST = "manifest.json"
PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "numpy", "av")  # on which a run's numbers depend


def write_manifest(folder: Path, run: str, step: int) -> None:
    """Describe the files that lie in a folder; whoever adds or changes one afterwards makes it a damaged one."""
    content = {
        "format_version": FORMAT_VERSION, "run": run, "step": step, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "files": {p.name: {"sha256": file_sha256(p), "size_bytes": p.stat().st_size} for p in folder.iterdir()},
    }  # fmt: skip
    (folder / MANIFEST).write_bytes(_dump(content | {"sha256": _hash(content)}))


def find_fault(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint, by its manifest; None when every byte is as it was written.

    raises  UserError for a whole one in a format that this version does not read
    """
    try:
        if not (folder / MANIFEST).is_file():
            return f"it has no {MANIFEST}"
        text = (folder / MANIFEST).read_bytes()
        manifest = json.loads(text)
        if manifest["format_version"] == 1 and "sha256" not in manifest:
            raise UserError(_other_format(folder, 1))
        content = {key: value for key, value in manifest.items() if key != "sha256"}
        if text != _dump(manifest) or manifest["sha256"] != _hash(content):
            return f"{MANIFEST} differs from what was written"
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(_other_format(folder, manifest["format_version"]))
        named = re.fullmatch(r"step_(\d+)", folder.name)
        if named and int(named[1]) != manifest["step"]:
            return f"it is that of step {manifest['step']} under another name"
        present, listed = {p.name for p in folder.iterdir()} - {MANIFEST}, manifest["files"]
        if present != listed.keys():
            name = min(present ^ listed.keys())
            return f"{name} is {'missing' if name in listed else 'no part of it'}"
        changed = (name for name, wanted in listed.items() if not _is_same(folder / name, wanted))
        return next((f"{name} differs from what was written" for name in changed), None)
    except UserError:
        raise
    except OSError as error:
        if error.errno not in _OF_DAMAGE:
            raise UserError(
                f"{folder} cannot be read now ({error.strerror}); nothing was changed, so look at the disk and start the "
                "same command again"
            ) from None
        return f"{MANIFEST} or a file cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} or a file cannot be read ({in_one_line(error)})"


def find_changed(folder: Path, names: Iterable[str]) -> str | None:
    """Name one of some files that is not as a checkpoint's manifest says; None where nothing says so of them.

    For what uses these alone: others may lack or have come, as in a copy that somebody shares.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())["files"]
        return next((name for name in names if name in listed and not _is_same(folder / name, listed[name])), None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_same(file: Path, wanted: dict[str, Any]) -> bool:
    size_bytes = file.stat().st_size if file.is_file() else None  # a pipe under its name would be waited for
    return size_bytes == wanted["size_bytes"] and file_sha256(file) == wanted["sha256"]


def _other_format(folder: Path, version: Any) -> str:
    return (
        f"{folder} is a checkpoint of format {version}, and this version of the toolkit goes on from format "
        f"{FORMAT_VERSION}; use the version that wrote it, or start anew from its adapter: --fresh --lora.init_from, and a "
        "copy of that folder"
    )


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()
