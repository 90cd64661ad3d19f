"""What `make demo` refuses before it starts, and what it sums up. Run: pytest tests/commands/test_demo.py"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launching import train_here
from toolkit.commands.demo import print_summary, run_demo, summarise
from toolkit.commands.evaluate import evaluate_run
from toolkit.errors import UserError


def test_wrong_videos_are_refused_before_anything_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder, or one in the folder that the demo makes anew, by whatever name: it stays as it was."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / ".demo/mine"
    own.mkdir(parents=True)
    (own / "clip.mp4").write_bytes(b"dear")
    (tmp_path / "elsewhere").symlink_to(own)
    for videos, words in ((".demo/mine", "lies in .demo"), ("elsewhere", "lies in .demo"), ("nowhere", "is no folder")):
        with pytest.raises(UserError, match=f"VIDEOS={videos} {words}"):
            run_demo(videos)
    assert (own / "clip.mp4").read_bytes() == b"dear"


def test_the_summary_holds_what_evaluate_found(
    tiny_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its figures are those of evaluation.json; where nothing moves the table says none in place of a number."""
    run = train_here(
        tiny_run | {"name": "demo", "runs_dir": str(tmp_path), "engine.kind": "plain", "schedule.steps": 4}
    )
    (judged,) = evaluate_run(str(run), 2, 2)["gaps"].values()
    summary = summarise(run, {"train": 3.0})
    for ours, theirs in (("linear", "linear"), ("base", "base"), ("tuned", "tuned")):
        assert summary[f"psnr_moving_{ours}"] == judged["figures"][theirs]["psnr_moving_middle"]["mean"]
    assert summary["held_out_clips"] == 2 and 0 <= summary["clips_improved"] <= 2
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert (summary["loss_first"], summary["loss_last"]) == (losses[0], losses[-1])
    print_summary(summary | {"psnr_moving_base": None, "psnr_moving_tuned": None, "psnr_moving_linear": None})
    assert "untuned none -> tuned none" in capsys.readouterr().out
