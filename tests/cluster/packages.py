"""Programs that a test starts for real: installed where that can be done, else the test skips. No tests in here."""

import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest


def require(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Install Debian packages where programs are missing; where that fails, skip the test with the reason."""
    missing = find_missing(programs)
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True}
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        subprocess.run(["apt-get", "install", "-qq", "--no-install-recommends", *packages], **quiet)
        missing = find_missing(programs)
    if missing:
        do_without(f"{', '.join(missing)} missing here; as root: apt-get install {' '.join(packages)}")


def do_without(reason: str) -> None:
    """Skip a test, but in CI (CI=true), where everything has to be tried, fail it."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def find_missing(programs: Sequence[str]) -> list[str]:
    return [name for name in programs if not shutil.which(name, path=search_path())]


def search_path() -> str:
    """Debian keeps daemons where an ordinary user's PATH does not look."""
    return f"{os.environ['PATH']}:/usr/sbin"
