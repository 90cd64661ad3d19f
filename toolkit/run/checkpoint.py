"""Checkpoints: written aside, hashed, renamed, then pointed to; loading takes the newest that verifies.

Test: pytest tests/run/test_checkpoint.py, tests/faults/test_checkpoints.py. A folder per checkpoint, no pickle in it:
    adapter_model.safetensors, adapter_config.json   PEFT's files, fp32; with tuning full the whole UNet as diffusers has it
    optimizer.safetensors                            fp32 masters and moments by parameter name, whole tensors
    ema.safetensors                                  with checkpoint.ema: averages by parameter name (ema.py)
    state.json                                       optimizer step, what the run was then, its fingerprints
    manifest.json                                    sha256 and size of each of these (manifest.py)
Beside the folder checkpoints/ stand LATEST, the newest one's name, and BEST, the one that scored best on held-out clips: for
people, since a run itself asks the checkpoints.
What is not whole has another name: .tmp while it is written, .old while it is deleted, .bad when it was found damaged.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from toolkit.config import CheckpointConfig
from toolkit.data.files import link_or_copy, share, written_aside
from toolkit.engine.plain import STATE_KEYS, State
from toolkit.errors import UserError
from toolkit.model.tuning import save_tuned, weights_beside
from toolkit.run.best import Look, are_alike, is_better, read_look
from toolkit.run.ema import SNAPSHOT, TRACKS, snapshot_file, write_snapshot
from toolkit.run.manifest import find_fault, write_manifest

_STEP_NAME = re.compile(r"step_\d{6,}")
_OTHER_BYTES = 1 << 20  # of a checkpoint: headers, the JSON files, and what a file system adds


class Scored(NamedTuple):
    """The checkpoint of a run that scored best on its held-out clips."""

    step: int
    by: str  # as validation.best_by
    score: float
    clips: int


def save_checkpoint(
    run: Path,
    step: int,
    tensors: State,
    unet: nn.Module,
    state: dict[str, Any],
    about: dict[str, Any],
    settings: CheckpointConfig,
) -> Path:
    """Publish checkpoints/step_NNNNNN and point LATEST to it; a crash at any moment leaves the older ones whole.

    tensors  what the engine gathered: {parameter name: {master, exp_avg, exp_avg_sq}}, and averages beside these
    state    what goes into state.json beside the step; by its score, if there is one, the best is not pruned
    about    what goes into the adapter's header beside the step
    raises   UserError for a number that is not finite, or too little space; OSError or SafetensorError for a failing disk
    """
    _refuse_non_finite(tensors)
    folder = checkpoint_folder(run, step)
    # The state at a step is a function of the step: one that is whole need not be replaced, and so is never without a name.
    if not folder.is_dir() or find_fault(folder):
        check_space(run, unet, {n: saved["master"].shape for n, saved in tensors.items()}, ema=_has_averages(tensors))
        _publish(folder, tensors, unet, {"step": step, **state}, about | {"step": step})
    _prune(run, settings, point(run))
    return folder


def point(run: Path) -> Scored | None:
    """Have LATEST and BEST say which checkpoints are that now, as after a kill they may not; returns the best."""
    if found := list_checkpoints(run):
        replace_text(run / "LATEST", found[-1].name + "\n")
    best = find_best(run)
    if best is not None:
        replace_text(run / "BEST", json.dumps(best._asdict()) + "\n")
    else:
        (run / "BEST").unlink(missing_ok=True)
    return best


def _publish(folder: Path, tensors: State, unet: nn.Module, state: dict[str, Any], about: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        save_tuned(aside, {name: saved["master"] for name, saved in tensors.items()}, unet, about)
        flat = {f"{name}/{key}": saved[key].contiguous() for name, saved in tensors.items() for key in STATE_KEYS}
        save_file(flat, aside / "optimizer.safetensors")
        if _has_averages(tensors):
            write_snapshot(aside / SNAPSHOT, tensors, state["updates"])
        (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        share(aside)
        write_manifest(aside, folder.parents[1].name, state["step"])
        for path in [*aside.iterdir(), aside]:
            _sync(path)
        if _has_averages(tensors):  # first: no checkpoint is ever without
            snapshot = snapshot_file(folder)
            snapshot.parent.mkdir(exist_ok=True)
            link_or_copy(aside / SNAPSHOT, snapshot)
            _sync(snapshot)
            _sync(snapshot.parent)
        if folder.exists():  # a bad one
            _remove([folder])
        os.replace(aside, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _has_averages(tensors: State) -> bool:
    return all(TRACKS.keys() <= saved.keys() for saved in tensors.values())


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return run / "checkpoints" / f"step_{step:06d}"


def checkpoint_step(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(run: Path) -> list[Path]:
    """List published checkpoints, oldest first."""
    with contextlib.suppress(FileNotFoundError), os.scandir(run / "checkpoints") as entries:
        # in one look: asked one by one, all could be gone meanwhile, pruned by a run that saves on
        published = [Path(e.path) for e in entries if _STEP_NAME.fullmatch(e.name) and e.is_dir()]
        return sorted(published, key=checkpoint_step)  # by number: as text, step_1000000 comes before step_999999
    return []


def newest_good(run: Path, set_aside: bool) -> Path | None:
    """Find the newest checkpoint that verifies, warning of bad ones.

    set_aside  rename bad ones to .bad; for the run itself only
    returns    None when the run has no checkpoint yet
    raises     UserError when there are some and none verifies: starting over silently would lose a run
    """
    found = list_checkpoints(run)
    for folder in reversed(found):
        fault = find_fault(folder)
        if fault is None:
            return folder
        if not folder.exists():  # pruned by the run while it was read here
            return newest_good(run, set_aside)
        print(f"{folder} is damaged: {fault}; taking an older one", file=sys.stderr)
        if set_aside:
            shutil.rmtree(folder.with_suffix(".bad"), ignore_errors=True)
            os.replace(folder, folder.with_suffix(".bad"))
            print(f"set aside as {folder.name}.bad", file=sys.stderr)
    bad = found or list((run / "checkpoints").glob("step_*.bad"))  # set aside by an earlier attempt
    if bad:
        remedy = "--fresh starts anew" if set_aside else "take another run, or a copy of this one"
        raise UserError(f"none of the {len(bad)} checkpoints in {run}/checkpoints verifies; {remedy}")
    return None


def best_checkpoint(run: Path) -> Path:
    """Find the checkpoint that scored best on held-out clips. Raises UserError where there is none, or it is damaged."""
    if (best := find_best(run)) is None:
        raise UserError(f"{run} has no best checkpoint: none that is kept was validated; take the newest")
    folder = checkpoint_folder(run, best.step)
    if fault := find_fault(folder):
        raise UserError(f"{folder}, the best by validation, is damaged: {fault}; take the newest")
    return folder


def load_checkpoint(folder: Path, ema: bool = False) -> tuple[dict[str, Any], State]:
    """Read state.json and the optimizer's tensors back, with the averages where asked; raises UserError without these."""
    from safetensors.torch import load_file

    if ema and not (folder / SNAPSHOT).is_file():
        raise UserError(
            f"checkpoint.ema is on, but {folder} was saved without it, and averages begin with a run; leave it off, or "
            "start anew with --fresh"
        )
    tensors: State = {}
    for file in ("optimizer.safetensors", *[SNAPSHOT] * ema):
        for full_name, tensor in load_file(folder / file).items():
            name, _, key = full_name.rpartition("/")
            tensors.setdefault(name, {})[key] = tensor
    return json.loads((folder / "state.json").read_text()), tensors


def refuse_misfit(folder: Path, tensors: State, shapes: Mapping[str, torch.Size], ema: bool = False) -> None:
    """Raise UserError unless a checkpoint holds master and moments of each parameter that trains, in its shape.

    ema  and averages
    """
    keys = (*STATE_KEYS, *TRACKS) if ema else STATE_KEYS
    wanted = {f"{name}/{key}": tuple(shape) for name, shape in shapes.items() for key in keys}
    found = {f"{name}/{key}": tuple(t.shape) for name, saved in tensors.items() for key, t in saved.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{folder} is of another adapter: {name} has shape {found.get(name, 'none')} there and "
                f"{wanted.get(name, 'none')} in this run; put the run's own checkpoint back, or start anew with --fresh"
            )


def check_space(
    run: Path, unet: nn.Module, shapes: Mapping[str, torch.Size], checkpoints: int = 1, ema: bool = False
) -> None:
    """Raise UserError where the disk of a run folder, which may be still to be made, has no room for more checkpoints.

    shapes  of what trains, by name: its own file holds each number once, the optimizer's three times, in fp32
    ema     averages of them are kept as well
    """
    copies = 1 + len(STATE_KEYS) + ema * len(TRACKS)
    tuned_bytes = 4 * copies * sum(shape.numel() for shape in shapes.values())
    beside_bytes = sum(tensor.nbytes for tensor in weights_beside(unet, shapes).values())
    needed_bytes = checkpoints * (tuned_bytes + beside_bytes + _OTHER_BYTES)
    place = next(p for p in (run.absolute(), *run.absolute().parents) if p.exists())
    if (free_bytes := shutil.disk_usage(place).free) < needed_bytes:
        raise UserError(
            f"{checkpoints} checkpoint{'s' * (checkpoints > 1)} of {needed_bytes / checkpoints / 2**20:,.1f} MiB "
            f"{'do' if checkpoints > 1 else 'does'} not fit on the disk of {run}, which has {free_bytes / 2**20:,.1f} MiB "
            "free; free some space, or choose another --runs_dir"
        )


def clear_leftovers(run: Path) -> None:
    """Delete what a kill left half written or half deleted, and say so. For the run itself, before it saves."""
    for folder in sorted((run / "checkpoints").glob("step_*")):
        if folder.suffix in (".tmp", ".old"):
            print(f"{folder} was left by a run that was killed, and is deleted", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old text or the new one, never half of it, whoever else writes it too."""
    with written_aside(path) as file:
        file.write(text.encode())
    _sync(path.parent)


def _refuse_non_finite(tensors: State) -> None:
    for name, saved in tensors.items():
        for key, tensor in saved.items():
            if not torch.stack(tensor.aminmax()).isfinite().all():  # either is NaN where any number is
                raise UserError(f"{name}/{key} holds NaN or infinity, which is not saved")


def find_best(run: Path, look: Look | None = None) -> Scored | None:
    """Find the checkpoint with the best score, of those that were looked at alike.

    look  like this one; default the look of the newest that has a score
    """
    scored: list[tuple[Scored, Look]] = []
    for folder in list_checkpoints(run):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what verifying is for
            state = json.loads((folder / "state.json").read_text())
            if (score := state["validation_score"]) is not None:
                own = read_look(state)
                one = Scored(checkpoint_step(folder), str(own["by"]), float(score), int(own["validation.clips"]))
                scored.append((one, own))
    best = None
    for one, own in scored:
        comparable = are_alike(own, scored[-1][1] if look is None else look)
        if comparable and (best is None or is_better(one.by, one.score, best.score)):
            best = one
    return best


def _prune(run: Path, settings: CheckpointConfig, best: Scored | None) -> None:
    found, every = list_checkpoints(run), settings.keep_every_steps
    stays = {*found[-settings.keep :], *([checkpoint_folder(run, best.step)] if best else [])}
    stays |= {folder for folder in found if every and checkpoint_step(folder) % every == 0}
    _remove([folder for folder in found if folder not in stays])


def _remove(folders: list[Path]) -> None:
    """Delete published folders: first their names, so that whatever is listed is whole."""
    renamed = [folder.with_name(folder.name + ".old") for folder in folders]
    for folder, old in zip(folders, renamed, strict=True):
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        _sync(folder.parent)
    for old in renamed:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
