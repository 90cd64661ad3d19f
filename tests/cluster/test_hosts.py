"""Two network namespaces stand for two hosts that share a disk. Run: pytest tests/cluster/test_hosts.py

Needs a root who may make namespaces, and iproute2; without them the tests skip with the reason, and in CI (CI=true) fail.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.packages import do_without, require
from tests.launching import ROOT, kill_tree, read_numbers, start, train_command

NETWORK = "10.177.0"
SHORT = {"schedule.steps": 3}
SSH_PROGRAMS, SSH_PACKAGES = ("sshd", "ssh", "ssh-keygen", "pdsh"), ("openssh-server", "openssh-client", "pdsh")
SSHD_CONFIG = """\
HostKey {key}
AuthorizedKeysFile {key}.pub
StrictModes no
PidFile none
SetEnv OMP_NUM_THREADS=1
"""
SSH_CONFIG = """\
IdentityFile {key}
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


@dataclass(frozen=True)
class Host:
    """A namespace with a name and an address of its own; processes in it see no other network."""

    name: str
    address: str

    def command(self, *command: str) -> list[str]:
        """A command line that runs another one on this host, under its host name."""
        rename = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.name, *rename, *command]

    def sent_bytes(self) -> int:
        counter = f"/sys/class/net/{self.name}/statistics/tx_bytes"
        return int(subprocess.run(self.command("cat", counter), capture_output=True, check=True).stdout)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@contextmanager
def system_folder(folder: Path) -> Iterator[None]:
    """A folder of the machine's own; where it was missing it is taken away again, unless others use it by then."""
    was_there = folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        yield
    finally:
        if not was_there:
            with suppress(OSError):
                folder.rmdir()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    require(("ip", "unshare"), ("iproute2", "util-linux"))
    pair = tuple(Host(f"fr{side}{os.getpid()}", f"{NETWORK}.{i}") for i, side in enumerate("ab", 1))
    with ExitStack() as stack:
        for host in pair:
            added = subprocess.run(["ip", "netns", "add", host.name], capture_output=True, text=True)
            if added.returncode:  # not root, or root of a container
                do_without(f"no network namespaces here: {added.stderr.strip()}")
            stack.callback(ip, "netns", "del", host.name)
        stack.enter_context(system_folder(Path("/etc/netns")))
        for host in pair:
            etc = Path("/etc/netns") / host.name  # `ip netns exec` lays it over /etc
            etc.mkdir()
            stack.callback(shutil.rmtree, etc)
            (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{h.address} {h.name}\n" for h in pair))
            ip("-n", host.name, "link", "set", "lo", "up")
        a, b = pair
        ip("link", "add", a.name, "netns", a.name, "type", "veth", "peer", "name", b.name, "netns", b.name)
        for host in pair:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.name)
            ip("-n", host.name, "link", "set", host.name, "up")
        yield pair


@pytest.fixture(scope="module")
def ssh_hosts(hosts: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    """The two hosts, each with an /etc/ssh of its own and an sshd that lets root of either in by one key."""
    require(SSH_PROGRAMS, SSH_PACKAGES)
    key = tmp_path_factory.mktemp("ssh") / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    daemons = []
    with system_folder(Path("/run/sshd")):
        for host in hosts:
            folder = Path("/etc/netns") / host.name / "ssh"
            folder.mkdir()
            (folder / "sshd_config").write_text(SSHD_CONFIG.format(key=key))
            (folder / "ssh_config").write_text(SSH_CONFIG.format(key=key))
            daemons.append(start(host.command("/usr/sbin/sshd", "-D", "-e"), ranks=2))
        yield hosts
        for process in daemons:
            kill_tree(process.pid)
            process.communicate()


def run_on(hosts: Sequence[Host], commands: list[list[str]], timeout_s: float = 150) -> None:
    """Start a command on each host, and see both end well."""
    started = [start(host.command(*command), ranks=2) for host, command in zip(hosts, commands, strict=True)]
    try:
        for process in started:
            output = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, output
    finally:
        for process in started:
            kill_tree(process.pid)


def training(name: str, run: dict[str, Any]) -> list[str]:
    """launch/train.py with its flags."""
    command = train_command("python", 1, run | SHORT | {"name": name})
    return command[command.index("launch/train.py") :]


def documented(start: str, places: dict[str, str]) -> list[str]:
    """The launcher's part of the command in docs/LAUNCHING.md that begins so, with other words in some places."""
    lines = (ROOT / "docs/LAUNCHING.md").read_text().replace("\\\n", " ").splitlines()
    line = next(line.strip() for line in lines if line.strip().startswith(start))
    program, *words = line[: line.index("launch/train.py")].split()
    for word, here in places.items():
        words = [re.sub(rf"\b{word}\b", here, other) for other in words]
    return [str(Path(sys.executable).parent / program), *words]


def with_hostfile(hosts: Sequence[Host], folder: Path, rest: str) -> list[str]:
    """The launcher's part of a documented deepspeed command; writes its hostfile, one slot a host."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    places = {"node1": hosts[0].name, "hosts": str(hostfile)}
    return documented(f"deepspeed --hostfile hosts --master_addr node1 {rest}", places)


@pytest.mark.launch
def test_torchrun_on_two_hosts_is_two_ranks_on_one(
    hosts: tuple[Host, Host], tiny_run: dict[str, Any], reference_run: Path
) -> None:
    """The documented command, one rank a host, meeting at a host's name: the losses of two ranks on one host, to the bit."""
    before = [host.sent_bytes() for host in hosts]
    launcher = documented("torchrun --nnodes 2", {"node1": hosts[0].name, "8": "1"})
    run_on(hosts, [[*launcher, *training("torchrun_2", tiny_run)]] * 2)
    folder = Path(tiny_run["runs_dir"]) / "torchrun_2"
    assert read_numbers(folder) == read_numbers(reference_run)[:3]
    adapter = (folder / "checkpoints/step_000003/adapter_model.safetensors").stat().st_size
    for host, sent_bytes in zip(hosts, before, strict=True):  # the gradients went over the wire between them
        assert host.sent_bytes() - sent_bytes > 3 * adapter


@pytest.mark.launch
def test_deepspeed_hostfile_on_two_hosts_is_two_ranks_on_one(
    hosts: tuple[Host, Host], tiny_run: dict[str, Any], reference_run: Path, tmp_path: Path
) -> None:
    """The documented command without ssh, one slot a host, started on each: the losses of one host, to the bit."""
    first = with_hostfile(hosts, tmp_path, "--no_ssh")
    assert first[-2:] == ["--node_rank", "0"]
    run_on(hosts, [[*first[:-1], str(rank), *training("hostfile", tiny_run)] for rank in (0, 1)])
    assert read_numbers(Path(tiny_run["runs_dir"]) / "hostfile") == read_numbers(reference_run)[:3]


@pytest.mark.launch
def test_deepspeed_starts_other_hosts_over_ssh(
    ssh_hosts: tuple[Host, Host], tiny_run: dict[str, Any], reference_run: Path, tmp_path: Path
) -> None:
    """The documented command on one host: pdsh and ssh start both, and the losses are those again, to the bit."""
    run_on(ssh_hosts[:1], [[*with_hostfile(ssh_hosts, tmp_path, "launch"), *training("by_ssh", tiny_run)]])
    assert read_numbers(Path(tiny_run["runs_dir"]) / "by_ssh") == read_numbers(reference_run)[:3]


@pytest.mark.launch
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_host_that_cannot_be_resolved_is_one_sentence(rank: str, tiny_run: dict[str, Any]) -> None:
    """MASTER_ADDR names no host: each rank says so, in one line, and ends with exit code 2."""
    place = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    meeting = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29400"}
    command = [sys.executable, *training("nowhere", tiny_run)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | place | meeting, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if "no-such-host.invalid" in line]
    assert len(said) == 1 and f"(rank {rank})" in said[0] and "Traceback" not in done.stderr
