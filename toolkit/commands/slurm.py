"""Puts a training run, or packing and caching in parts, into SLURM's queue: checks, snapshots, renders and submits.

Test: pytest tests/cluster. A job's script is #SBATCH lines, values in quotes, and a fixed body from launch/slurm; no value
reaches a script that does not match a pattern in full.
"""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from toolkit.cli import refuse_wrong_flags
from toolkit.commands.doctor import examine
from toolkit.config import RunConfig, dump_config
from toolkit.errors import UserError
from toolkit.run.checkpoint import list_checkpoints, replace_text
from toolkit.run.folder import COMMIT_FILE, check_folder, describe_code, prepare_folder

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = (
    "toolkit/**/*.py",
    "toolkit/bases/**/*",
    "launch/*.py",
    "launch/recipes/*.yaml",
    "launch/slurm/*",
    "shards/*.py",
    "ds_configs/*.json",
)
ARRAY_PROGRAMS = ("shards/pack.py", "shards/cache.py", "launch/sweep.py")
# All that a job inherits from the shell it was submitted in; tokens and the like stay behind.
EXPORTED = (
    r"HOME|PATH|LD_LIBRARY_PATH|LANG|CUDA_HOME|HF_HOME|HF_HUB_CACHE|HF_HUB_OFFLINE|XDG_CACHE_HOME"
    r"|TORCH_EXTENSIONS_DIR|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR"
    r"|(NCCL|TORCH_NCCL|GLOO|UCX|FI)_[A-Z0-9_]+|(https?|no)_proxy|(HTTPS?|NO)_PROXY"
)

_NAME = (r"[A-Za-z0-9_][A-Za-z0-9_.,@+-]{0,127}", "letters, digits and _ . , @ + - such as gpu_long")
_PATH = (r"/[\w./+=@,:~-]*", "a path of letters, digits and . _ - + = @ , : ~ without spaces")
_WORD = (r"[\w./+=@,:~%-]+", "letters, digits and . _ - + = @ , : ~ % without spaces")
_ALLOWED = {
    "time": (r"\d{1,7}(:\d\d?){0,2}|\d{1,4}-\d\d?(:\d\d?){0,2}", "90 (minutes), 12:00:00 or 2-00:00:00; 0 is no limit"),
    "mem": (r"\d{1,7}[KMGT]?", "64G; 0 is all that a node has"),
    "partition": _NAME,
    "account": _NAME,
    "qos": _NAME,
}
# sbatch obeys these rather than the line of the script where their names differ from the option's
_ENVIRONMENT_NAMES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "requeue": "NO_REQUEUE", "array": "ARRAY_INX"}


@dataclass(frozen=True)
class Resources:
    """What a job asks of SLURM; what is None is left to the cluster, or to SLURM's own SBATCH_* variables."""

    nodes: int = 1
    tasks: int = 1  # per node
    gpus: int = 0  # per node
    cpus: int = 1  # per task
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None  # per node

    def options(self) -> dict[str, str]:
        """As sbatch's options. Raises UserError for a value that is none of SLURM's."""
        named = {name: getattr(self, name) for name in _ALLOWED}
        given = {name: check(f"--{name}", value, *_ALLOWED[name]) for name, value in named.items() if value is not None}
        counts = {"nodes": self.nodes, "ntasks-per-node": self.tasks, "cpus-per-task": self.cpus}
        if self.gpus:
            counts["gpus-per-node"] = self.gpus
        return {name: str(count) for name, count in counts.items()} | given


def submit_run(
    config: RunConfig,
    resources: Resources,
    signal_s: int,
    fresh: bool = False,
    allow_change: bool = False,
    dry_run: bool = False,
) -> str:
    """Submit a run, one rank per task, that saves and queues itself again `signal_s` seconds before its time is up.

    fresh, allow_change  as launch/train.py has them; a run is begun anew once, not at each of its job's starts
    returns              the script where it is a dry run, which writes nothing; else the job and what to do with it
    raises               UserError for what the run would refuse, and when a job of the run is queued or running
    """
    check_time(resources.time, signal_s)
    folder, code = config.folder.absolute(), config.folder.absolute() / "code" / digest_code()
    options = resources.options() | {
        "job-name": config.name, "output": f"{folder}/slurm/%j.log", "signal": f"USR2@{signal_s}", "comment": str(folder),
    }  # fmt: skip
    values = {"PYTHON": sys.executable, "CODE": str(code), "RUN": str(folder)}
    text = render(options, values, "train.sh", ["--allow_change"] if allow_change else [])
    ranks = resources.nodes * resources.tasks
    begun = not fresh and bool(list_checkpoints(config.folder))
    notes = [f"note: {note}" for note in examine(config, ranks, begun)["notes"]]
    changed = "" if fresh else check_folder(config, allow_change)
    if changed:
        notes.append(f"note: going on with another recipe, so not as the run was begun: {changed}")
    if dry_run:
        return text
    require_sbatch()
    live = find_live(folder)
    if live:
        raise UserError(
            f"a job of {config.folder} is in the queue already: {live}; wait for it, or end it with scancel"
        )

    def prepare() -> None:
        prepare_folder(config, fresh).close()
        (folder / "slurm").mkdir(exist_ok=True)
        replace_text(folder / "slurm/config.yaml", dump_config(config))  # the run's own is written by the run
        copy_code(code)

    job = submit(folder / "slurm/job.sh", text, prepare)
    return "\n".join(
        [
            *notes,
            f"submitted job {job}: {config.name} on {resources.nodes} nodes x {resources.tasks} = {ranks} ranks",
            f"log     {folder}/slurm/{job}.log",
            f"watch   squeue --jobs {job}; tensorboard --logdir {config.runs_dir}",
            f"end     scancel {job} (the same command{', without --fresh,' if fresh else ''} goes on later)",
        ]
    )


def submit_array(command: Sequence[str], parts: int, resources: Resources, folder: Path, dry_run: bool = False) -> str:
    """Submit an array of `parts` jobs, of which the i-th runs the command with --part i/parts.

    command  program and arguments, such as [shards/pack.py, VIDEOS, OUT, --clip_seconds, 4]
    folder   for the script, the logs and the snapshot of the code
    returns  the script where it is a dry run, which writes nothing; else the job and what to do with it
    raises   UserError for another program, and for an argument that would need more than quotes
    """
    if not command or command[0] not in ARRAY_PROGRAMS:
        raise UserError(
            f"no program to run in {parts} parts; after the flags give {' or '.join(ARRAY_PROGRAMS)} and its arguments, "
            "such as --parts 8 shards/pack.py VIDEOS OUT"
        )
    if any(re.match("--part(=|$)", word) for word in command):
        raise UserError("--part is given, but the array gives each job its own; leave it out")
    name = Path(command[0]).stem
    refuse_wrong_flags(runpy.run_path(str(ROOT / command[0]))[name], list(command[1:]))
    code = folder.absolute() / "code" / digest_code()
    options = resources.options() | {
        "job-name": name, "output": f"{folder.absolute()}/{name}_%A_%a.log", "array": f"1-{parts}",
    }  # fmt: skip
    words = [check(f"an argument of {command[0]}", word, *_WORD) for word in command]
    values = {"PYTHON": sys.executable, "CODE": str(code)}
    text = render(options, values, "array.sh", [str(parts), *words])
    if dry_run:
        return text
    require_sbatch()
    job = submit(folder.absolute() / f"{name}.sh", text, partial(copy_code, code))
    return (
        f"submitted array {job}: {parts} parts of {' '.join(command)}\nlogs    {folder}/{name}_{job}_*.log\n"
        f"watch   squeue --jobs {job}\nend     scancel {job} (the same command goes on later)"
    )


def check(what: str, value: str, pattern: str, allowed: str) -> str:
    """Give back a value that matches in full. Raises UserError."""
    if not re.fullmatch(pattern, value):
        raise UserError(f"{what} is {value!r}, which a job's script cannot hold; give {allowed}")
    return value


def check_time(time: str | None, signal_s: int) -> None:
    """Refuse a job that would be told to save before it did anything."""
    if time is not None and 0 < time_s(check("--time", time, *_ALLOWED["time"])) <= signal_s:
        raise UserError(
            f"--time {time} ends before --signal_s {signal_s} seconds are left to save; raise --time or lower --signal_s"
        )


def time_s(time: str) -> int:
    """Seconds of SLURM's way to write a time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0 is no limit."""
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if dash or len(numbers) == 3:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def render(options: dict[str, str], values: dict[str, str], body: str, words: Sequence[str] = ()) -> str:
    """Write a job's script: options for sbatch, values for the body, the body from launch/slurm.

    words  arguments that the body finds as "$@"
    """
    exported = ",".join(sorted(name for name in os.environ if re.fullmatch(EXPORTED, name)))
    own = {"chdir": str(Path.cwd()), "open-mode": "append", "export": exported}
    for name, value in (("this folder", own["chdir"]), *values.items()):
        check(name, value, *_PATH)
    lines = [f"#SBATCH --{name}={value}" for name, value in (options | own).items()]
    lines += ["#SBATCH --requeue", *(f"{name}={shlex.quote(value)}" for name, value in values.items())]
    lines += [f"set -- {shlex.join(words)}"] if words else []
    return "\n".join(["#!/bin/bash", *lines, "", (ROOT / "launch/slurm" / body).read_text()])


def require_sbatch() -> None:
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on this machine; submit on a login node of the cluster, or see it with --dry_run"
        )


def find_live(folder: Path) -> str | None:
    """Name the job of a run folder that is queued or running, and its state."""
    for row in ask_slurm(["squeue", "--me", "--noheader", "--format=%i|%T|%k"]).splitlines():
        job, state, comment = row.split("|", 2)
        if comment == str(folder):
            return f"job {job}, {state.lower()}"
    return None


def submit(script: Path, text: str, prepare: Callable[[], None]) -> str:
    """Submit a job, write its script and `prepare` what it needs, and only then let it start; returns its number.

    So what sbatch refuses has changed nothing. What the script says goes before SBATCH_* variables.
    """
    options = re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)
    overruled = {"SBATCH_" + _ENVIRONMENT_NAMES.get(o, o.upper().replace("-", "_")) for o in [*options, "wait"]}
    environment = {name: value for name, value in os.environ.items() if name not in overruled}
    # not asked by --test-only, which also refuses what would have to wait for a node that is down
    answer = ask_slurm(["sbatch", "--parsable", "--hold"], environment, text)
    job = check("the answer of sbatch", answer.strip().split(";")[0], r"\d+", "a cluster whose sbatch prints a number")
    try:
        prepare()
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text)
        ask_slurm(["scontrol", "release", job])
    except BaseException:
        ask_slurm(["scancel", job])
        raise
    return job


def ask_slurm(command: list[str], environment: dict[str, str] | None = None, stdin: str = "") -> str:
    """What a command of SLURM prints. Raises UserError with its own words."""
    done = subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command[0]} refused: {' '.join(done.stderr.split())}")
    return done.stdout


def code_files() -> list[Path]:
    return sorted(path for pattern in SNAPSHOT for path in ROOT.glob(pattern) if path.is_file())


def digest_code() -> str:
    """Name the code as it stands by what it says: twelve hexadecimal digits."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def copy_code(to: Path) -> None:
    """Copy the code as it stands, and note its commit; a folder that exists holds it already, as its name is the digest."""
    if to.exists():
        return
    aside = to.with_name(f"{to.name}.{os.getpid()}.tmp")
    for path in code_files():
        copied = aside / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    (aside / COMMIT_FILE).write_text(describe_code() + "\n")
    try:
        os.replace(aside, to)
    except OSError:  # another command was faster
        if not to.exists():
            raise
        shutil.rmtree(aside)
