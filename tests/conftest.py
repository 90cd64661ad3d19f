"""Shared fixtures. Run: pytest tests"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if "FRAMER_GPU" not in os.environ:  # which `make gpu` sets, for the tests marked so
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared bit by bit here is the CPU
# A shell without a terminal starts what stands before an & deaf to Ctrl-C, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.faults.forked import Warm  # noqa: E402
from tests.launching import TINY, launch  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the toolkit keeps for the next start is kept for these tests alone, who shall see what it counts now."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """The folder of real videos (asl/, general/), which is no part of the repository; without it the test skips."""
    beside_repository = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FRAMER_REAL_VIDEOS", beside_repository))
    if not (folder / "asl").is_dir():
        pytest.skip(f"no real videos in {folder}; set FRAMER_REAL_VIDEOS to a folder that holds asl/ and general/")
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base as it is built, not pretrained; read only."""
    from toolkit.model.tiny import make_tiny_base

    folder = tmp_path_factory.mktemp("base") / "tiny"
    make_tiny_base(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rendered clips of half a second, 32 x 32, packed; read only."""
    from toolkit.authoring.pack import pack
    from toolkit.authoring.synth import synth

    folder = tmp_path_factory.mktemp("tiny")
    synth(folder / "videos", clips=12, seconds=0.5, size=32, seed=1)
    pack(folder / "videos", folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="session")
def tiny_run(tiny_base: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Overrides of the tiny recipe for a run of a second a step or less; name and runs_dir are the test's own."""
    runs_dir = tmp_path_factory.mktemp("runs")
    return TINY | {"model.base": str(tiny_base), "data.shards": str(tiny_shards), "runs_dir": str(runs_dir)}


@pytest.fixture(scope="session")
def reference_run(tiny_run: dict[str, Any]) -> Path:
    """The run folder of two DeepSpeed ranks that were never disturbed: ten steps in bf16; read only."""
    done = launch("deepspeed", 2, tiny_run | {"name": "reference"})
    assert done.returncode == 0, done.stderr
    return Path(tiny_run["runs_dir"]) / "reference"


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Starts trainings on forked ranks."""
    warm = Warm(tmp_path_factory.mktemp("forked"))
    yield warm
    warm.close()
