"""Programs that a test starts for real: installed in CI (CI=true), elsewhere the test skips. No tests in here."""

import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest

IN_CI = os.environ.get("CI") == "true"
PATIENCE_S = 300


def require(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Do without where programs are missing, and in CI cannot be installed either."""
    missing = find_missing(programs)
    said = ""
    if missing and IN_CI and os.geteuid() == 0 and shutil.which("apt-get"):
        said = install(packages)
        missing = find_missing(programs)
    if missing:
        do_without(f"{', '.join(missing)} missing here; as root: apt-get install {' '.join(packages)}{said}")


def install(packages: Sequence[str]) -> str:
    """Install Debian packages; returns the last line of what apt-get complained of, in brackets."""
    said: list[str] = []
    for command in (["update"], ["install", "--no-install-recommends", *packages]):
        try:
            done = subprocess.run(
                ["apt-get", "-qq", *command],
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
            )
        except subprocess.TimeoutExpired:
            return f" (apt-get {command[0]}: not within {PATIENCE_S} s)"
        said += done.stderr.splitlines()
    return f" ({said[-1]})" if said else ""


def do_without(reason: str) -> None:
    """Skip a test, but in CI, where everything has to be tried, fail it."""
    (pytest.fail if IN_CI else pytest.skip)(reason)


def find_missing(programs: Sequence[str]) -> list[str]:
    return [name for name in programs if not shutil.which(name, path=search_path())]


def search_path() -> str:
    """Debian keeps daemons where an ordinary user's PATH does not look."""
    return f"{os.environ['PATH']}:/usr/sbin"
