"""A real SLURM of two nodes on this machine, on ports and with keys of its own. Run: pytest tests/cluster/test_slurm.py

Where it is missing the tests skip with the reason; in CI (CI=true) it is installed, and they fail where that fails.
"""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.cluster.packages import require, search_path
from tests.launching import free_port

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
NODES = ("n1", "n2")

# One CPU a node, so that a job of two ranks fills both. Nothing binds or confines tasks, which containers would not allow.
# The GPUs are a number that SLURM hands out; there is no device behind it.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1_port} CPUs=1 RealMemory=4000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2_port} CPUs=1 RealMemory=4000 Gres=gpu:1
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """Talks to the cluster as a user's shell would."""

    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """A command's stdout; one that fails fails the test, and is shown."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """What scontrol knows of a job: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, timeout_s: float = 150) -> dict[str, str]:
        """Wait until a job is in one of these states; a requeued job is not left to its two minutes of delay."""

        def arrived() -> bool:
            shown = self.show(job)
            if shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime":
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            return shown["JobState"] in states

        wait_until(arrived, timeout_s, lambda: str(self.show(job)))
        return self.show(job)


def wait_until(ready: Callable[[], object], timeout_s: float, why: Callable[[], object] = str) -> None:
    until_s = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < until_s, f"not within {timeout_s} s: {why()}"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require(PROGRAMS, PACKAGES)
    with ExitStack() as stack:
        yield start_cluster(tmp_path_factory.mktemp("slurm"), stack)


def start_cluster(folder: Path, stack: ExitStack) -> Cluster:
    """Start all daemons as this user, in the foreground, to be stopped in turn when the stack is closed."""
    environment = os.environ | {"PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf")}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # what trained in this very process before said of itself
        environment.pop(name, None)
    cluster = Cluster(environment)
    user = cluster.run("id", "-un").strip()
    ports = {f"{name}_port": free_port() for name in ("ctld", *NODES)}
    text = CONF.format(folder=folder, host=socket.gethostname().split(".")[0], user=user, **ports)
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    stack.enter_context(
        daemon(
            environment,
            folder,
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            *(f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")),
            f"--socket={folder}/munge.socket",
        )  # fmt: skip
    )
    wait_until((folder / "munge.socket").exists, 10)
    stack.enter_context(daemon(environment, folder, "slurmctld", "-D"))
    for node in NODES:
        stack.enter_context(daemon(environment, folder, "slurmd", "-D", "-N", node))
    idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    asked = partial(subprocess.run, idle, env=environment, capture_output=True, text=True)
    wait_until(lambda: asked().stdout.strip() == str(len(NODES)), 60, lambda: asked().stderr)
    stack.callback(end_jobs, cluster, user)
    return cluster


def end_jobs(cluster: Cluster, user: str) -> None:
    """Leave no rank of a failed test behind."""
    cluster.run("scancel", f"--user={user}")
    wait_until(lambda: not cluster.run("squeue", "--noheader"), 60)


@contextmanager
def daemon(environment: dict[str, str], folder: Path, *command: str) -> Iterator[None]:
    with (folder / f"{command[0]}.out").open("a") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
