"""Checkpoints: written aside, hashed, renamed, then pointed to; loading takes the newest that verifies.

Test: pytest tests/faults/test_kill.py. One folder per checkpoint, no pickle in it:
    adapter_model.safetensors, adapter_config.json   PEFT's files, fp32
    optimizer.safetensors                            fp32 masters and moments by parameter name, whole tensors
    state.json                                       optimizer step, fingerprints, versions
    manifest.json                                    sha256 and size of each of these
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from torch import nn

from toolkit.data.format import file_sha256
from toolkit.engine.plain import STATE_KEYS, State
from toolkit.errors import UserError
from toolkit.model.lora import save_adapter

FORMAT_VERSION = 1


def save_checkpoint(
    run: Path, step: int, tensors: State, unet: nn.Module, state: dict[str, Any], about: dict[str, Any], keep: int
) -> Path:
    """Publish checkpoints/step_NNNNNN and point LATEST to it; a crash at any moment leaves the older ones whole.

    tensors  what the engine gathered: {parameter name: {master, exp_avg, exp_avg_sq}}
    state    what goes into state.json beside the step
    about    what goes into the adapter's header beside the step
    keep     newest checkpoints to keep
    """
    from safetensors.torch import save_file

    folder = checkpoint_folder(run, step)
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    masters = {name: saved["master"] for name, saved in tensors.items()}
    save_adapter(aside, masters, unet, about | {"step": step})
    flat = {f"{name}/{key}": saved[key].contiguous() for name, saved in tensors.items() for key in STATE_KEYS}
    save_file(flat, aside / "optimizer.safetensors")
    _write_json(aside / "state.json", {"step": step, "format_version": FORMAT_VERSION, **state})
    files = {p.name: {"sha256": file_sha256(p), "size_bytes": p.stat().st_size} for p in sorted(aside.iterdir())}
    _write_json(aside / "manifest.json", {"format_version": FORMAT_VERSION, "files": files})
    for path in [*aside.iterdir(), aside]:
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)  # a bad one of the same step, left by an earlier attempt
    os.replace(aside, folder)
    _sync(folder.parent)
    replace_text(run / "LATEST", folder.name + "\n")
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run / "checkpoints" / f"step_{step:06d}"


def checkpoint_step(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(run: Path) -> list[Path]:
    """List published checkpoints, oldest first."""
    published = (p for p in (run / "checkpoints").glob("step_*") if p.is_dir() and not p.suffix)
    return sorted(published, key=checkpoint_step)  # by number: as text, step_1000000 comes before step_999999


def find_fault(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint, by its manifest; None when every byte is as it was written."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name, wanted in files.items():
            if file_sha256(folder / name) != wanted["sha256"]:
                return f"{name} differs from what was written"
    except (OSError, ValueError, KeyError) as error:
        return f"manifest or file unreadable ({error})"
    return None


def newest_good(run: Path, set_aside: bool) -> Path | None:
    """Find the newest checkpoint that verifies, warning of bad ones.

    set_aside  rename bad ones to .bad; for the run itself only: a reader could meet one that is just being pruned
    returns    None when the run has no checkpoint yet
    raises     UserError when there are some and none verifies: starting over silently would lose a run
    """
    found = list_checkpoints(run)
    for folder in reversed(found):
        fault = find_fault(folder)
        if fault is None:
            return folder
        print(f"{folder} is damaged: {fault}; taking an older one", file=sys.stderr)
        if set_aside:
            shutil.rmtree(folder.with_suffix(".bad"), ignore_errors=True)
            os.replace(folder, folder.with_suffix(".bad"))
            print(f"set aside as {folder.name}.bad", file=sys.stderr)
    bad = found or list((run / "checkpoints").glob("step_*.bad"))  # set aside by an earlier attempt
    if bad:
        raise UserError(f"none of the {len(bad)} checkpoints in {run}/checkpoints verifies; --fresh starts anew")
    return None


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], State]:
    """Read state.json and the optimizer's tensors back."""
    from safetensors.torch import load_file

    tensors: State = {}
    for full_name, tensor in load_file(folder / "optimizer.safetensors").items():
        name, key = full_name.rsplit("/", 1)
        tensors.setdefault(name, {})[key] = tensor
    return json.loads((folder / "state.json").read_text()), tensors


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old text or the new one, never half of it."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    _sync(aside)
    os.replace(aside, path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
