"""Runs on a real SLURM of two nodes: undisturbed, requeued, killed, cancelled. Run: pytest tests/cluster/test_slurm.py"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import yaml

from tests.cluster.conftest import Cluster, wait_until
from tests.commands.test_sweep import do
from tests.launching import RECIPE, ROOT, adapter_bytes, free_port, read_numbers, run
from toolkit.commands.slurm import Resources, submit_array, submit_run
from toolkit.config import dump_config, load_config
from toolkit.errors import UserError
from toolkit.run.checkpoint import checkpoint_step, newest_good
from toolkit.run.folder import COMMIT_FILE, prepare_folder, record_start

TWO_NODES = Resources(nodes=2)
pytestmark = pytest.mark.launch


def submit(cluster: Cluster, overrides: dict[str, Any], allow_change: bool = False) -> tuple[str, Path]:
    """Submit a run of one rank on each of the two nodes; returns the job's number and the run folder."""
    config = load_config(RECIPE, overrides)
    with mock.patch.dict(os.environ, cluster.environment):
        said = submit_run(config, TWO_NODES, signal_s=120, allow_change=allow_change)
    return said.split("submitted job ")[1].split(":")[0], config.folder


def wait_for_steps(cluster: Cluster, job: str, folder: Path, steps: int) -> None:
    wait_until(lambda: len(read_numbers(folder)) >= steps, 120, lambda: (cluster.show(job), read_log(folder, job)))


def read_log(folder: Path, job: str) -> str:
    path = folder / f"slurm/{job}.log"
    return path.read_text() if path.exists() else "no log"


def assert_same(folder: Path, reference: Path) -> None:
    """Every step once, each loss and gradient norm to the bit, and the same adapter."""
    assert read_numbers(folder) == read_numbers(reference)
    assert adapter_bytes(folder, 10) == adapter_bytes(reference, 10)


def test_two_nodes_train_as_two_ranks_do(cluster: Cluster, tiny_run: dict[str, Any], reference_run: Path) -> None:
    """The command line's job ends well, and its losses and adapter are those of two ranks under DeepSpeed's launcher."""
    overrides = tiny_run | {"name": "on_two_nodes"}
    flags = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    with mock.patch.dict(os.environ, cluster.environment):
        command = [
            sys.executable,
            "launch/slurm/submit.py",
            "--config",
            str(RECIPE),
            "--nodes",
            "2",
            "--gpus",
            "0",
            *flags,
        ]
        done = run(command)
    assert done.returncode == 0, done.stderr
    job, folder = done.stdout.split("submitted job ")[1].split(":")[0], Path(tiny_run["runs_dir"]) / "on_two_nodes"
    assert str(folder / f"slurm/{job}.log") in done.stdout and f"scancel {job}" in done.stdout
    shown = cluster.wait(job, "COMPLETED", "FAILED")
    assert shown["JobState"] == "COMPLETED" and shown["NumNodes"] == "2", read_log(folder, job)
    assert f"job {job}: start 1, 2 ranks on n[1-2]" in read_log(folder, job)
    (noted,) = (folder / "code").glob(f"*/{COMMIT_FILE}")
    assert json.loads((folder / "env.json").read_text())["code"] == noted.read_text().strip()
    assert_same(folder, reference_run)


SAY_PLACE = """
import os, torch
from toolkit.engine.world import init_world
world = init_world()
(total,) = world.all_reduce_sum(torch.tensor([10.0**world.rank]))
print(os.environ["SLURMD_NODENAME"], world.rank, os.environ["LOCAL_RANK"], total)
world.close()
"""


def test_srun_places_the_ranks(cluster: Cluster) -> None:
    """Four tasks on two nodes find their ranks and one another; in a job but not by srun, or with no place to meet: none."""
    code = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    python = [sys.executable, "-c", SAY_PLACE]
    srun = ["srun", "--nodes=2", "--ntasks=4", "--overcommit", "--distribution=block", *python]
    said = Cluster(cluster.environment | code | meet).run(*srun)
    assert sorted(said.splitlines()) == [f"n{rank // 2 + 1} {rank} {rank % 2} 1111.0" for rank in range(4)]
    with pytest.raises(AssertionError, match="4 ranks were started without a place to meet"):
        Cluster(cluster.environment | code).run(*srun)
    batch = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "n1"}
    assert Cluster(cluster.environment | code | batch).run(*python) == "n1 0 0 1.0\n"


def test_before_its_time_is_up_it_saves_and_goes_on(
    cluster: Cluster, tiny_run: dict[str, Any], reference_run: Path
) -> None:
    """SLURM's own signal near the limit: saved, queued again, ended; nothing differs from an undisturbed run.

    The second start runs the copy of the code in the run folder, not the checkout, and allows no change any more.
    """
    job, folder = submit(cluster, tiny_run | {"name": "requeued"}, allow_change=True)
    (copy,) = (folder / "code").glob("*/toolkit/__init__.py")
    wait_for_steps(cluster, job, folder, 3)
    assert read_command(folder)[-1] == "--allow_change"
    copy.write_text(copy.read_text() + "print('this is the copy')\n")
    for rank in (0, 1):  # SLURM looks for limits every 30 s, in which so short a run would end; its signal wakes them
        rank_process(folder, rank).suspend()
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    wait_until(lambda: "into the queue again" in read_log(folder, job), 60, lambda: read_log(folder, job))
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    shown = cluster.wait(job, "COMPLETED", "FAILED")
    log = read_log(folder, job)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), log
    first, second = log.split(f"job {job}: start 2")
    assert "it goes into the queue again" in first and "this is the copy" not in first
    assert "this is the copy" in second and "resuming after step" in second
    assert read_command(folder)[-1] == f"{folder}/slurm/config.yaml"
    assert_same(folder, reference_run)


def read_command(folder: Path) -> list[str]:
    """The command line of a run's last start."""
    return json.loads((folder / "env.json").read_text())["command"]


def test_killed_rank_ends_the_job(cluster: Cluster, tiny_run: dict[str, Any], reference_run: Path) -> None:
    """One of two ranks SIGKILLed, while the other cannot notice: the job has failed within 30 s.

    Submitted again it goes on to the same end.
    """
    overrides = tiny_run | {"name": "rank_killed"}
    job, folder = submit(cluster, overrides)
    wait_for_steps(cluster, job, folder, 3)
    rank_process(folder, 0).suspend()
    rank_process(folder, 1).kill()
    killed_s = time.monotonic()
    cluster.wait(job, "FAILED", timeout_s=30)
    print(f"ended {time.monotonic() - killed_s:.1f} s after the kill")
    assert "failed with exit code" in read_log(folder, job)
    assert len(read_numbers(folder)) < 10
    job, _ = submit(cluster, overrides)
    assert cluster.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", read_log(folder, job)
    assert "resuming after step" in read_log(folder, job)
    assert_same(folder, reference_run)


def rank_process(folder: Path, rank: int) -> psutil.Process:
    """The process of a rank that trains in a run folder."""
    config = str(folder / "slurm/config.yaml")
    trainers = [p for p in psutil.process_iter(["cmdline"]) if config in (p.info["cmdline"] or [])]
    (found,) = (p for p in trainers if "train.py" in p.info["cmdline"][1] and p.environ()["SLURM_PROCID"] == str(rank))
    return found


def test_cancelled_job_stays_cancelled(cluster: Cluster, tiny_run: dict[str, Any]) -> None:
    """While it runs, a second job of the run is refused; scancel ends it for good, and it saved its last step."""
    overrides = tiny_run | {"name": "cancelled", "schedule.steps": 1000}
    job, folder = submit(cluster, overrides)
    wait_for_steps(cluster, job, folder, 3)
    with pytest.raises(UserError, match=f"in the queue already: job {job}, running; wait for it"):
        submit(cluster, overrides)
    cluster.run("scancel", job)
    shown = cluster.wait(job, "CANCELLED", timeout_s=40)
    wait_until(lambda: not cluster.run("squeue", "--noheader"), 40)  # no rank is left
    assert cluster.show(job)["JobState"] == "CANCELLED" and shown["Restarts"] == "0"
    newest = newest_good(folder, set_aside=False)
    assert newest is not None and checkpoint_step(newest) == read_numbers(folder)[-1][0]


def test_what_is_refused_changes_nothing(cluster: Cluster, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """By sbatch, or by the lock of a run that goes on elsewhere: one sentence, no job, no new file, and the old recipe."""
    recipe = tiny_run | {"name": "refused", "runs_dir": str(tmp_path)}
    old, new = load_config(RECIPE, recipe), load_config(RECIPE, recipe | {"log_every_steps": 7})
    elsewhere = Resources(partition="nowhere")

    def refuse(words: str, resources: Resources, fresh: bool) -> None:
        before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        with mock.patch.dict(os.environ, cluster.environment), pytest.raises(UserError, match=words):
            submit_run(new, resources, signal_s=60, fresh=fresh)
        assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
        assert not cluster.run("squeue", "--noheader")

    refuse("sbatch refused: .* invalid partition specified: nowhere", elsewhere, fresh=False)
    lock = prepare_folder(old, fresh=False)
    record_start(old)
    for fresh in (False, True):
        refuse("sbatch refused", elsewhere, fresh)
        refuse("another job .* is writing to", Resources(), fresh)
    lock.close()


def test_array_packs_as_one_does(cluster: Cluster, tiny_shards: Path, tmp_path: Path) -> None:
    """Two jobs, each half of the videos: the shards are, byte by byte, those of one command.

    What the job's script says goes before SLURM's own variables, which may say the rest.
    """
    videos, out = tiny_shards.parent / "videos", tmp_path / "shards"
    own = {"SBATCH_JOB_NAME": "other", "SBATCH_EXPORT": "ALL", "SBATCH_ARRAY_INX": "1-9", "SBATCH_ACCOUNT": "mine"}
    with mock.patch.dict(os.environ, cluster.environment | own):
        command = ["shards/pack.py", str(videos), str(out)]
        said = submit_array(command, 2, Resources(gpus=1, time="10"), tmp_path / "arrays")
    job = said.split("submitted array ")[1].split(":")[0]
    shown = cluster.show(f"{job}_1")
    asked = {"JobName": "pack", "Account": "mine", "TresPerNode": "gres:gpu:1", "TimeLimit": "00:10:00", "Requeue": "1"}
    assert {name: shown[name] for name in asked} == asked
    wait_until(lambda: not cluster.run("squeue", "--noheader"), 90)
    logs = {path.name: path.read_text() for path in (tmp_path / "arrays").glob("*.log")}
    assert set(logs) == {f"pack_{job}_1.log", f"pack_{job}_2.log"}
    wanted = sorted(path for path in tiny_shards.iterdir() if path.name.endswith((".tar", ".json")))
    assert wanted
    for path in wanted:
        assert (out / path.name).read_bytes() == path.read_bytes(), (path.name, logs)


def test_array_sweeps_as_one_does(cluster: Cluster, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Two jobs, each one run of a grid of two: who ends last sums up, and the figures are those of one process."""
    settings = tiny_run | {"engine.kind": "plain", "schedule.steps": 2, "validation.sampler_steps": 1}
    grid = {"lora.rank": [2, 4]}
    del settings["lora.rank"]
    recipe, points = tmp_path / "recipe.yaml", tmp_path / "grid.yaml"
    recipe.write_text(dump_config(load_config(RECIPE, settings | {"name": "any", "runs_dir": str(tmp_path / "array")})))
    points.write_text(yaml.safe_dump(grid))
    options = ["--config", str(recipe), "--name", "s", "--grid", str(points), "--gaps", "4", "--ranks", "1"]
    with mock.patch.dict(os.environ, cluster.environment):
        said = submit_array(["launch/sweep.py", *options], 2, Resources(), tmp_path / "arrays")
    assert "submitted array" in said
    wait_until(lambda: not cluster.run("squeue", "--noheader"), 240)
    logs = [path.read_text() for path in (tmp_path / "arrays").glob("*.log")]
    do(settings | {"runs_dir": str(tmp_path / "one")}, str(points), seeds=1, gaps=[4])
    array, one = (json.loads((tmp_path / place / "s/sweep.json").read_text()) for place in ("array", "one"))
    assert array["tables"] == one["tables"] and len(one["tables"][0]["rows"]) == 2, logs
