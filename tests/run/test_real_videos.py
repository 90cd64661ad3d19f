"""The whole job on real videos, killed once on the way. Run: pytest tests/run/test_real_videos.py

Skipped where the videos are not there; they are no part of the repository.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.interpolate import interpolate
from tests.launching import kill_when, launch, read_numbers, start, train_command
from toolkit.authoring.pack import pack
from toolkit.commands.evaluate import evaluate_run
from toolkit.data.video import read_frames

STEPS, SIZE_PX = 60, 32


@pytest.fixture(scope="module")
def signed_run(
    real_videos: Path, tiny_base: Path, tiny_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Packed, trained on two DeepSpeed ranks, killed near step 30, and trained to the end: run folder, last stdout."""
    folder = tmp_path_factory.mktemp("signed")
    report = pack(real_videos / "asl", folder / "shards", short_side=48)
    assert report.clips["train"] >= 8 and report.clips["val"] >= 1
    overrides = tiny_run | {
        "name": "signed", "runs_dir": str(folder), "data.shards": str(folder / "shards"), "data.stride": 2,
        "schedule.steps": STEPS, "engine.global_batch": 8, "engine.micro_batch": 4, "checkpoint.every_steps": 10,
        "optimizer.lr": 1e-2, "validation.clips": 2, "validation.sampler_steps": 4,
    }  # fmt: skip
    command = train_command("deepspeed", 2, overrides)
    kill_when(start(command, 2), lambda: len(read_numbers(folder / "signed")) >= STEPS // 2)
    done = launch("deepspeed", 2, overrides)
    assert done.returncode == 0, done.stderr
    return folder / "signed", done.stdout


@pytest.mark.launch
def test_loss_falls_on_real_videos_across_a_kill(signed_run: tuple[Path, str]) -> None:
    """Sixty rows, resumed from a checkpoint, and the last quarter's mean loss is below the first's."""
    run, stdout = signed_run
    assert "resuming after step" in stdout
    losses = [loss for (loss,) in read_numbers(run, "loss")]
    assert [step for (step,) in read_numbers(run, "step")] == list(range(1, STEPS + 1))
    first, last = np.mean(losses[: STEPS // 4]), np.mean(losses[-STEPS // 4 :])
    print(f"mean loss of the first quarter {first:.3f}, of the last {last:.3f}")
    assert last < 0.9 * first


@pytest.mark.launch
def test_real_stills_become_a_video(signed_run: tuple[Path, str], tmp_path: Path) -> None:
    """Five frames of the recipe's size as .mp4, .gif and PNG folder; the first picture is the first still."""
    run, _ = signed_run
    stills = []
    for name, value in (("first", 60), ("last", 180)):
        stills.append(str(tmp_path / f"{name}.png"))
        Image.fromarray(np.full((SIZE_PX, SIZE_PX, 3), value, np.uint8)).save(stills[-1])
    for out in ("ab.mp4", "ab.gif", "ab"):
        interpolate(str(tmp_path / out), str(run), first=stills[0], last=stills[1], frames=5, steps=2)
    assert read_frames((tmp_path / "ab.mp4").read_bytes()).shape == (5, SIZE_PX, SIZE_PX, 3)
    with Image.open(tmp_path / "ab.gif") as gif:
        assert (gif.n_frames, gif.size) == (5, (SIZE_PX, SIZE_PX))
    pictures = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "ab").iterdir())]
    assert len(pictures) == 5 and {p.shape for p in pictures} == {(SIZE_PX, SIZE_PX, 3)}
    assert (pictures[0] == 60).all() and (pictures[-1] == 180).all()


@pytest.mark.launch
def test_evaluation_scores_real_videos(signed_run: tuple[Path, str]) -> None:
    """evaluation.json holds finite scores of blend, base and tuned; the strip of pictures is there."""
    run, _ = signed_run
    report = evaluate_run(str(run))
    assert json.loads((run / "evaluation.json").read_text()) == report
    scores = {f"{metric}_{name}" for metric in ("psnr", "ssim") for name in ("linear", "base", "tuned")}
    assert report.keys() >= scores | {"clips", "strip"} and report["clips"] == 2
    assert all(np.isfinite(report[score]) for score in scores)
    assert report["psnr_tuned"] != report["psnr_base"]
    assert Path(report["strip"]).is_file()
