"""The launchers start the same run, and no step of it is shown twice. Run: pytest tests/run/test_launchers.py"""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launching import Launcher, launch, read_numbers, train_here
from toolkit.run.monitor import Monitor


@pytest.mark.launch
@pytest.mark.parametrize(
    ("launcher", "ranks", "tolerance"),
    [("torchrun", 2, 0), ("deepspeed", 1, 1e-2), ("python", 1, 1e-2)],
)
def test_launchers_give_the_same_losses(
    launcher: Launcher, ranks: int, tolerance: float, tiny_run: dict[str, Any], reference_run: Path
) -> None:
    """Three steps each: two ranks by torchrun are two by deepspeed, to the bit; one rank is near, in bf16."""
    name = f"by_{launcher}"
    done = launch(launcher, ranks, tiny_run | {"name": name, "schedule.steps": 3})
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    losses, wanted = (
        [loss for (loss,) in read_numbers(run, "loss")] for run in (Path(tiny_run["runs_dir"]) / name, reference_run)
    )
    print(launcher, ranks, max(abs(a / b - 1) for a, b in zip(losses, wanted, strict=False)))
    assert losses == pytest.approx(wanted[:3], rel=tolerance, abs=0)


def test_no_step_twice_after_a_resume(tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after step 5, resumed after step 4: neither the log nor TensorBoard shows step 5 twice."""
    overrides = tiny_run | {"name": "stopped", "engine.kind": "plain", "engine.micro_batch": 4, "schedule.steps": 6}
    report = Monitor.report

    def stop_after_five(self: Monitor, step: int, *numbers: Any) -> None:
        report(self, step, *numbers)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Monitor, "report", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        train_here(overrides)
    monkeypatch.setattr(Monitor, "report", report)
    folder = train_here(overrides)
    assert len(list((folder / "tb").glob("events*"))) == 3  # of each start, and what lists the recipe
    assert [step for (step,) in read_numbers(folder, "step")] == list(range(1, 7))
    for beside in ("", "zero"):
        board = EventAccumulator(str(folder / "tb" / beside), size_guidance={"scalars": 0}).Reload()
        assert [event.step for event in board.Scalars("loss/train")] == list(range(1, 7))
