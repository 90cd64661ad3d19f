"""Shared fixtures. Run: pytest tests"""

import os
from pathlib import Path

import pytest


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
