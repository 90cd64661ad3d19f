"""The run folder: config.yaml env.json log.jsonl tb/ samples/ checkpoints/ ema/ LATEST, and where a run goes on from.

Test: pytest tests/run. The same command again resumes; a folder made by another recipe is refused, never overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from toolkit.config import RunConfig, diff_configs, dump_config, load_config
from toolkit.engine.plain import State
from toolkit.engine.world import World
from toolkit.errors import UserError
from toolkit.model.formats import PEFT_FILES, find_file
from toolkit.model.sources import NAMED_BASES, fetch_top, is_hub_id
from toolkit.model.tuning import ABOUT_FILE
from toolkit.run.best import Look, count_misses
from toolkit.run.checkpoint import (
    checkpoint_folder,
    checkpoint_step,
    find_best,
    load_checkpoint,
    newest_good,
    point,
    refuse_misfit,
    replace_text,
)
from toolkit.run.ema import cut_snapshots
from toolkit.run.ledger import cut_ledger
from toolkit.run.manifest import MANIFEST, PACKAGES, find_changed
from toolkit.run.skips import cut_skips
from toolkit.run.watchdog import tells_of_hang

# Fields that may change between the start of a run and its resumption: they do not change what is computed.
# The same data may lie elsewhere: its fingerprint is compared, not its place; and a run folder may be copied or renamed.
FREE_FIELDS = ("name", "runs_dir", "log_every_steps", "checkpoint.", "validation.", "data.shards", "data.mix",
               "data.remote", "data.cache_", "data.debug", "data.workers", "data.max_bad_fraction", "engine.kind",
               "engine.deepspeed", "engine.shard_ranks", "engine.hang_timeout_s", "optimizer.max_skipped_steps",
               "model.attention", "model.blocks", "model.memory", "model.compile", "model.cuda_graphs")  # fmt: skip
SOURCES = ("data.shards", "data.mix")  # among these what tells runs apart all the same
_SHARED_DISK_S = 60  # for which a network disk may go on saying that a file is not there
RATE_FILES = ("find_lr.json", "find_lr.svg")  # which launch/find_lr.py leaves for a run to come
_OWN_TEXTS = ("config.yaml", "env.json", "LATEST", "BEST", "*.jsonl")  # which the run alone writes
# what a kill at the very start can leave, beside what is half written, and what is there of a job that was submitted
_OWN_FIRST_FILES = ("lock", "slurm", "code", *RATE_FILES)
COMMIT_FILE = "COMMIT"  # beside the copy of the code that a batch job runs: what the original was
REMEDY = "choose another --name, start anew with --fresh, or go on all the same with --allow_change"
INEXACT = "the run goes on, but not to the last digit as it would have"


@dataclass(frozen=True)
class Resume:
    """Where to go on; the defaults are the very start."""

    step: int = 0  # steps done
    tensors: State | None = None  # the optimizer's, and averages where the recipe has them
    updates: int = 0  # steps that changed something
    skipped_in_a_row: int = 0
    k_next: int = 0  # position of the next clip
    computed_by: str = ""  # kernel, blocks and plan of the steps done
    best: float | None = None  # score of the best look at held-out clips until now
    best_step: int = 0
    misses: int = 0  # looks since that one


def refuse_closed(folder: Path) -> None:
    """Raise UserError where a run folder cannot be made or written to, as far as can be told without trying."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {place}, where {folder} is or shall be; choose another --runs_dir")


def check_folder(config: RunConfig, allow_change: bool = False, remedy: str = REMEDY) -> str:
    """Refuse a run folder that does not belong to this recipe, naming the fields that differ; returns those allowed to.

    remedy  what whoever started it can do
    """
    folder = config.folder
    if (folder / "config.yaml").exists():
        return _check_same_recipe(folder, config, allow_change, remedy)
    if folder.exists() and any(p.name not in _OWN_FIRST_FILES and p.suffix != ".tmp" for p in folder.iterdir()):
        raise UserError(f"{folder} holds files but no run; choose another --name or --runs_dir")
    return ""


def prepare_folder(config: RunConfig, fresh: bool) -> IO[str]:
    """Make the run folder and lock it, so that no second job writes into it. For the main rank.

    fresh    move an existing folder aside (NAME.1, NAME.2, ...) and start anew
    returns  the lock: it holds while this file is open, and the kernel drops it however the process ends
    raises   UserError when another job holds it
    """
    folder = config.folder
    if fresh and folder.exists():
        _lock(folder).close()  # not while another job writes there
        aside = next(p for i in range(1, 10_000) if not (p := folder.with_name(f"{folder.name}.{i}")).exists())
        os.replace(folder, aside)
        print(f"the old run is kept in {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    if any(map(tells_of_hang, (folder / "stacks").glob("*"))):
        shutil.rmtree(folder / "stacks.before", ignore_errors=True)
        os.replace(folder / "stacks", folder / "stacks.before")
    return lock


def record_start(config: RunConfig) -> None:
    """Write down the recipe and the machine of a run that is about to go on. For the main rank, once nothing is refused."""
    folder = config.folder
    for name in _OWN_TEXTS:
        for half in folder.glob(f"{name}*.tmp"):  # of a run that was killed; files of others may be being written now
            half.unlink(missing_ok=True)
    replace_text(folder / "config.yaml", dump_config(config))
    for part in ("checkpoints", "samples", "tb"):
        (folder / part).mkdir(exist_ok=True)
    replace_text(folder / "env.json", json.dumps(describe_host(), indent=2) + "\n")


def await_folder(config: RunConfig, world: World) -> None:
    """Wait until this rank's machine sees the run folder, which a network disk may show late. All ranks call it.

    raises  UserError where it does not appear: the machines of a run need one disk
    """
    world.barrier()
    until_s = time.monotonic() + _SHARED_DISK_S
    while not (config.folder / "env.json").exists():
        if time.monotonic() > until_s:
            raise UserError(
                f"rank {world.rank} on {platform.node()} does not see {config.folder.absolute()}, which rank 0 made; all "
                "machines of a run need one shared disk: choose a --runs_dir on it"
            )
        time.sleep(0.5)


def find_resume(
    config: RunConfig,
    identity: dict[str, Any],
    shapes: Mapping[str, torch.Size],
    look: Look,
    world: World,
    allow_change: bool = False,
) -> Resume:
    """Load the newest good checkpoint; the main rank chooses it, so that all ranks load the same.

    The lists of bad clips and of skipped steps are cut back to it, and snapshots of averages; LATEST names it.

    identity      what must not have changed: the data set's, the base's and the code's fingerprints
    shapes        of what trains, by name
    look          of today's recipe at held-out clips
    allow_change  go on all the same, where the adapter is still the same
    raises        UserError naming what changed
    """
    folder = config.folder
    newest = newest_good(folder, set_aside=True) if world.is_main else None
    step = world.broadcast_int(checkpoint_step(newest) if newest else 0)
    resume = Resume()
    if step:
        resume = _load(config, step, identity, shapes, look, world, allow_change)
    best, best_step = 0.0, 0.0  # of ranks that leave it to the main one
    if world.is_main:
        cut_ledger(folder, resume.k_next)
        cut_skips(folder, resume.step)
        cut_snapshots(folder, resume.step)
        point(folder)
        known = find_best(folder, look)
        if known is None and (other := find_best(folder)) is not None:
            print(
                f"held-out clips, or how they are looked at, are not those of the steps up to {step}: {other.by} "
                f"{other.score:.4f} of step {other.step} is not compared with what comes, in curves neither, and the best "
                "begins anew"
            )
        best, best_step = (known.score, known.step) if known is not None else (math.nan, 0.0)
    # the same on every rank
    best, best_step = world.all_reduce_sum(torch.tensor([best, best_step], dtype=torch.float64, device=world.device))
    return replace(resume, best=None if math.isnan(best) else best, best_step=int(best_step))


def _load(
    config: RunConfig,
    step: int,
    identity: dict[str, Any],
    shapes: Mapping[str, torch.Size],
    look: Look,
    world: World,
    allow_change: bool,
) -> Resume:
    folder, ema = checkpoint_folder(config.folder, step), config.checkpoint.ema
    state, tensors = load_checkpoint(folder, ema)
    changed = [f"{key.replace('_', ' ')} was {state.get(key)}, is {value}"
               for key, value in identity.items() if state.get(key) != value]  # fmt: skip
    if changed and not allow_change:
        raise UserError(
            f"{folder} was made with something else ({'; '.join(changed)}), so the run could not go on exactly; put it "
            "back, go on all the same with --allow_change, or start anew with --fresh or another --name"
        )
    refuse_misfit(folder, tensors, shapes, ema)
    if world.is_main:
        if changed:
            print(f"going on with something else than {folder} was made with: {'; '.join(changed)}")
        _warn_of_versions(folder)
    numbers = state["step"], tensors, state["updates"], state["skipped_in_a_row"], state["k_next"]
    return Resume(*numbers, computed_by=state.get("computed_by", ""), misses=count_misses(state, look))


def _warn_of_versions(folder: Path) -> None:
    """Say so where the libraries that draw, compute and decode are not those that a checkpoint was made with."""
    then = json.loads((folder / MANIFEST).read_text())["versions"]
    changed = [
        f"{name} {then[name]} then, {version(name)} now"
        for name in PACKAGES
        if name in then and then[name] != version(name)
    ]
    if changed:
        print(f"{', '.join(changed)}: {INEXACT}", file=sys.stderr)


def newest_adapter(run: Path) -> Path:
    """Find a run's newest good checkpoint, for inference. Raises UserError when there is none."""
    refuse_no_run(run)
    folder = newest_good(run, set_aside=False)
    if folder is None:
        raise UserError(f"{run} has no checkpoint yet; train it first: launch/train.py --config {run}/config.yaml")
    return folder


def refuse_no_run(run: Path) -> None:
    """Raise UserError for what is no run folder."""
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} is not a run folder (no config.yaml); give a folder such as runs/NAME")


def is_hub_adapter(source: str) -> bool:
    """Whether an adapter can only be meant for the hub: owner/name, or owner/name@revision, and no folder owner is here."""
    return is_hub_id(source) and not Path(source).parent.exists() and Path(source).suffix != ".safetensors"


def find_adapter(source: str | Path, file: str = "") -> Path:
    """Turn what a user names into the adapter's own folder or file, fetched where it is on the hub.

    source  a run, a checkpoint, an exported folder or a file, or as is_hub_adapter has it
    file    of that folder
    raises  UserError where there is no adapter, or it is damaged
    """
    named = str(source)
    if is_hub_adapter(named):
        name, _, revision = named.partition("@")
        try:
            source = fetch_top(name, revision or None) / file
        except UserError as error:
            raise UserError(f"no adapter at {named} on this machine, and {error}") from None
    else:
        source = Path(source).expanduser() / file
    if not source.exists():
        raise UserError(
            f"no adapter at {source}: give a run folder, a checkpoint, an exported folder or file, or a hub id owner/name"
        )
    as_unet = "give it as the UNet (model.unet of a recipe, --unet of interpolate.py)"
    if (source / "unet").is_dir():
        raise UserError(f"{source} holds a whole UNet, such as a merged export, and no adapter; {as_unet}")
    if (source / "config.yaml").exists():
        place = newest_adapter(source)
    elif changed := find_changed(source, PEFT_FILES):
        raise UserError(f"{source} is damaged: {changed} differs from what was written; give another checkpoint")
    else:
        place = source
    if (place / ABOUT_FILE).is_file():
        raise UserError(
            f"{place} holds a whole UNet, of tuning full, and no adapter; {as_unet}, or evaluate it by --run and "
            "--checkpoint"
        )
    find_file(place)
    return place


def describe_host() -> dict[str, Any]:
    """Versions, code and machine of this process."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "code": describe_code(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def describe_code() -> str:
    """The commit of the toolkit, with a mark where files differ from it; without git, its version."""
    noted = Path(__file__).resolve().parents[2] / COMMIT_FILE
    if noted.exists():
        return noted.read_text().strip()
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version("framer-toolkit")


def _lock(folder: Path) -> IO[str]:
    lock = (folder / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise UserError(
            f"another job ({lock.read().strip()}) is writing to {folder}; wait for it, or choose another --name"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"the disk of {folder} knows no locks, so nothing keeps a second job out of it", file=sys.stderr)
    lock.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
    return lock


def _is_moved(field: str, places: tuple[Any, Any]) -> bool:
    """Whether the same weights may lie elsewhere now: once they are read, their fingerprint tells."""
    local = (place is not None and place not in NAMED_BASES and not is_hub_id(place) for place in places)
    return field in ("model.base", "model.unet", "model.controlnet") and all(local)


def _check_same_recipe(folder: Path, config: RunConfig, allow_change: bool, remedy: str) -> str:
    saved = load_config(folder / "config.yaml")
    changed = {name: values for name, values in diff_configs(saved, config).items()
               if not name.startswith(FREE_FIELDS) and not _is_moved(name, values)}  # fmt: skip
    trained = any(p.suffix not in (".tmp", ".old") for p in (folder / "checkpoints").glob("step_*"))
    if not trained and (folder / "LATEST").exists():  # which is there from the first checkpoint on
        raise UserError(
            f"none of the checkpoints that {folder} had is left, so a run could only begin again there, over what is logged "
            "of the old one; put one back, or move the folder away, as --fresh does"
        )
    if not changed or not trained:
        return ""
    rows = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
    if not allow_change:
        raise UserError(f"{folder} was made by another recipe ({rows}); {remedy}")
    if any(name.startswith("lora.") and name != "lora.dropout" for name in changed):
        raise UserError(
            f"{folder} was made by another recipe ({rows}), and an adapter cannot change in the middle of a run, not "
            "even with --allow_change; choose another --name"
        )
    return rows
