"""What is asked of SLURM is refused or becomes a sound script. Run: pytest tests/cluster/test_slurm_scripts.py"""

import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.launching import RECIPE, ROOT, run
from toolkit.commands.slurm import Resources, code_files, copy_code, digest_code, submit_array, submit_run, time_s
from toolkit.config import ModelConfig, RunConfig, dump_config, load_config
from toolkit.errors import UserError
from toolkit.model.base import check_weights
from toolkit.model.sources import TINY_FOLDER
from toolkit.run.folder import COMMIT_FILE

# What a shell, or sbatch's own reading of a line, would take for more than a value.
INJECTIONS = [
    "$(touch pwned)", "`id`", "x;id", "x\n#SBATCH --wrap=id", "x --wrap=id", "a b", "x'y", 'x"y', "x\\y", "x#y", "x\n",
    "", "x|y", "x&", "<x", "x*", "${HOME}", "x\0y",
]  # fmt: skip


@pytest.fixture
def config(tiny_run: dict[str, Any], tmp_path: Path) -> RunConfig:
    return load_config(RECIPE, tiny_run | {"name": "rendered", "runs_dir": str(tmp_path / "runs")})


def directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))


def shell_values(script: str, *names: str) -> list[str]:
    """What a shell takes the values at the head of a script for."""
    lines = [line for line in script.splitlines() if line.startswith(tuple(f"{name}=" for name in names))]
    echo = "\n".join([*lines, *(f'printf "%s\\0" "${name}"' for name in names)])
    done = subprocess.run(["bash", "-c", echo], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def assert_sound(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert script.startswith("#!/bin/bash\n#SBATCH --")


def test_dry_run_prints_a_sound_script_and_writes_nothing(config: RunConfig, tmp_path: Path) -> None:
    """The shell can read it, it asks for what was given, and no file is made, with or without sbatch on the machine."""
    resources = Resources(2, 2, 2, 3, "1-00:00:00", "gpu,long", "asl", "high", "64G")
    script = submit_run(config, resources, signal_s=120, dry_run=True)
    assert_sound(script)
    asked = directives(script)
    expected = {
        "nodes": "2", "ntasks-per-node": "2", "gpus-per-node": "2", "cpus-per-task": "3", "time": "1-00:00:00",
        "partition": "gpu,long", "account": "asl", "qos": "high", "mem": "64G", "signal": "USR2@120", "requeue": "",
        "open-mode": "append", "job-name": "rendered", "output": f"{config.folder}/slurm/%j.log",
        "comment": str(config.folder),
    }  # fmt: skip
    assert {name: asked.get(name) for name in expected} == expected
    assert shell_values(script, "PYTHON", "RUN") == [sys.executable, str(config.folder)]
    assert not list(tmp_path.iterdir())


def test_a_job_whose_time_is_up_before_its_first_step_is_not_queued_for_ever(config: RunConfig, tmp_path: Path) -> None:
    """A start that saved is queued again however often; of those that only loaded, three in a row are the last.

    Programs of SLURM's names stand in for it: on a cluster this would be hours of loading.
    """
    script = submit_run(config, Resources(time="5"), signal_s=120, dry_run=True)
    (config.folder / "slurm").mkdir(parents=True)
    for name, body in (
        ("scontrol", f"echo $1 >> {tmp_path}/asked"),
        ("srun", f"[ $SAVES = 0 ] || touch {config.folder}/requeue; exit 75"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    codes = []
    for saves in (0, 1, 0, 0, 1, 0, 0, 0):
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_PER_TASK": "1", "SLURM_NTASKS": "1"}
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAVES": str(saves), **job}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
        codes.append(done.returncode)
    assert codes == [0, 0, 0, 0, 0, 0, 0, 75], done.stderr
    assert (tmp_path / "asked").read_text().split().count("requeue") == 7
    assert "the third time in a row, so it is not queued again; submit it with more --time" in done.stdout


def test_dry_run_of_the_command_lines(tmp_path: Path) -> None:
    """Both commands print their script; flags after the program are the program's, and reach it as they were."""
    arguments = ["videos/", str(tmp_path / "out"), "--clip_seconds", "2", "--aspects", "1:1,16:9"]
    command = [
        "launch/slurm/submit_array.py",
        "--parts",
        "3",
        "--cpus",
        "2",
        "--logs",
        str(tmp_path / "logs"),
        "--dry_run",
    ]
    done = run([sys.executable, *command, "shards/pack.py", *arguments])
    assert done.returncode == 0, done.stderr
    assert_sound(done.stdout)
    asked = directives(done.stdout)
    assert (asked["array"], asked["cpus-per-task"], asked["chdir"]) == ("1-3", "2", str(ROOT))
    assert f"set -- {shlex.join(['3', 'shards/pack.py', *arguments])}\n" in done.stdout
    assert not list(tmp_path.iterdir())
    refused = run([sys.executable, "launch/slurm/submit.py", "--config", str(RECIPE), "--gpus", "4", "--tasks", "2"])
    assert refused.returncode == 2 and "--tasks 2 goes with --gpus 0 alone" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_arrays_of_the_manual_say_all_that_their_parts_need(tmp_path: Path) -> None:
    """Else each of the parts would refuse its command, after the wait in the queue."""
    pages = (ROOT / page for page in ("README.md", "docs/LAUNCHING.md"))
    shown = [
        words for page in pages for words in re.findall(r"submit_array\.py --parts 8 (.*?)[`\n]", page.read_text())
    ]
    assert len(shown) == 2
    for words in map(shlex.split, shown):
        program = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert submit_array(words[program:], 8, Resources(), tmp_path, dry_run=True)
    with pytest.raises(UserError, match="--name must be given"):
        submit_array(["launch/sweep.py", "--config", "c", "--grid", "g"], 8, Resources(), tmp_path, dry_run=True)


@pytest.mark.parametrize("text", INJECTIONS)
def test_values_that_would_be_more_are_refused(config: RunConfig, tmp_path: Path, text: str) -> None:
    """In every field, in the name of the run's folder, and among a program's arguments: a sentence, and nothing written."""
    attempts: list[Callable[[], str]] = [
        lambda: submit_array(["shards/pack.py", text, "out"], 2, Resources(), tmp_path / "arrays"),
        lambda: submit_array(["shards/pack.py", "v", "o"], 2, Resources(), tmp_path / f"a{text} b"),
    ]
    for field in ("time", "partition", "account", "qos", "mem"):
        resources = Resources(**{field: text})
        attempts.append(lambda resources=resources: submit_run(config, resources, 60))
    moved = config.model_copy(update={"runs_dir": str(tmp_path / "runs") + f"/{text} b"})
    if "\0" not in text:
        attempts.append(lambda: submit_run(moved, Resources(), 60))
    for attempt in attempts:
        with pytest.raises(UserError, match="which a job's script cannot hold; give "):
            attempt()
    assert not list(tmp_path.iterdir())


def test_a_run_is_submitted_again_without_what_it_started_from(config: RunConfig) -> None:
    """Once it has a checkpoint the adapter of lora.init_from may be gone, as for the run; not where it begins anew."""
    lora = config.lora.model_copy(update={"init_from": "gone"})
    config = config.model_copy(update={"lora": lora})
    for begun, fresh, refused in ((False, False, True), (True, False, False), (True, True, True)):
        if begun:
            (config.folder / "checkpoints/step_000002").mkdir(parents=True, exist_ok=True)
            (config.folder / "config.yaml").write_text(dump_config(config))
        with pytest.raises(UserError, match="no adapter at gone") if refused else nullcontext():
            assert_sound(submit_run(config, Resources(), 60, fresh, dry_run=True))


def test_what_could_not_run_is_refused_before_it_is_queued(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that do not divide the batch, too little time to save, no SLURM, another program, flags it does not take."""
    with pytest.raises(UserError, match="a global batch of 4 cannot be cut .* on 3 ranks"):
        submit_run(config, Resources(nodes=3), 60, dry_run=True)
    with pytest.raises(UserError, match="--time 2 ends before --signal_s 120 seconds are left"):
        submit_run(config, Resources(time="2"), 120, dry_run=True)
    assert "#SBATCH --time=0\n" in submit_run(
        config, Resources(time="0"), 120, dry_run=True
    )  # SLURM's word for no limit
    for command in ([], ["launch/train.py", "--config", "x"], ["/bin/sh", "-c", "id"]):
        with pytest.raises(UserError, match="after the flags give shards/pack.py or shards/cache.py"):
            submit_array(command, 2, Resources(), tmp_path, dry_run=True)
    for part in (["--part", "1/2"], ["--part=1/2"]):
        with pytest.raises(UserError, match="--part is given"):
            submit_array(["shards/pack.py", "v", "o", *part], 2, Resources(), tmp_path, dry_run=True)
    with pytest.raises(UserError, match="unknown flag --clip_secs; did you mean --clip_seconds"):
        submit_array(["shards/pack.py", "v", "o", "--clip_secs", "4"], 2, Resources(), tmp_path, dry_run=True)
    for wrong in (
        ["--help"],
        ["--gop"],
        ["--gop", "8", "--overwrite", "--clip_seconds=2", "--help"],
    ):  # in each of the parts
        with pytest.raises(UserError, match="unknown flag --help|--gop is given without a value"):
            submit_array(["shards/pack.py", "v", "o", *wrong], 2, Resources(), tmp_path, dry_run=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on this machine"):
        submit_run(config, Resources(), 60)
    assert not list(tmp_path.iterdir())


def test_the_variables_that_the_manual_tells_a_user_to_set_reach_a_job(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its part on SLURM, and of the networks between machines."""
    manual = (ROOT / "docs/LAUNCHING.md").read_text()
    text = manual.partition("## SLURM")[2].partition("\n## ")[0] + " ".join(re.findall(r"`\w+_SOCKET_IFNAME", manual))
    names = set(re.findall(r"`([A-Z_]{8,})\b", text))
    assert {"TORCHINDUCTOR_CACHE_DIR", "NCCL_SOCKET_IFNAME"} <= names
    for name in names:
        monkeypatch.setenv(name, "x")
    assert names <= set(directives(submit_run(config, Resources(), 60, dry_run=True))["export"].split(","))


def test_secrets_stay_behind(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job inherits the named variables that are set, by name alone, and no others."""
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "NCCL_$(id)", "PYTHONPATH"):
        monkeypatch.setenv(name, "hunter2")
    for name in ("NCCL_SOCKET_IFNAME", "TORCH_NCCL_BLOCKING_WAIT", "UCX_TLS", "FI_PROVIDER", "https_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "x$(id)")
    script = submit_run(config, Resources(), 60, dry_run=True)
    exported = directives(script)["export"].split(",")
    inherited = {"HOME", "PATH", "NCCL_SOCKET_IFNAME", "TORCH_NCCL_BLOCKING_WAIT", "UCX_TLS", "FI_PROVIDER"}
    assert inherited | {"https_proxy", "NO_PROXY"} <= set(exported)
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "NCCL_$(id)", "PYTHONPATH"} & set(exported)
    assert "hunter2" not in script and "$(id)" not in script


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("0", 0),
        ("90", 5400),
        ("2:30", 150),
        ("1:00:05", 3605),
        ("2-12", 216000),
        ("1-1:30", 91800),
        ("1-00:00:01", 86401),
    ],
)
def test_times_are_read_as_sbatch_does(time: str, seconds: int) -> None:
    """By sbatch's manual: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, and all four."""
    assert time_s(time) == seconds


def test_two_commands_copy_the_code_at_once(tmp_path: Path) -> None:
    """Whoever is faster: no process fails, the copy is whole, and nothing else is left."""
    copy = tmp_path / "code" / digest_code()
    together = multiprocessing.get_context("fork")
    start = together.Barrier(4)

    def copy_together() -> None:
        start.wait()
        copy_code(copy)

    processes = [together.Process(target=copy_together) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert list(copy.parent.iterdir()) == [copy]
    copied = {path.relative_to(copy) for path in copy.rglob("*") if path.is_file()}
    assert copied == {Path(COMMIT_FILE), *(path.relative_to(ROOT) for path in code_files())}
    base = TINY_FOLDER.relative_to(ROOT)  # the program looks for it beside itself
    assert (copy / base / "unet/diffusion_pytorch_model.safetensors").is_file() and check_weights(
        ModelConfig(base=str(copy / base))
    ) == []
