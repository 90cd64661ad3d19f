"""What a killed run left is gone on from, or refused in words. Run: pytest tests/faults/test_kill.py"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forked import Warm, same_run
from tests.launching import adapter_bytes, read_numbers, train_here
from toolkit.errors import UserError
from toolkit.run.checkpoint import list_checkpoints


def test_two_ranks_agree_on_an_older_checkpoint(
    forked: Warm, small_run: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    """With the newest checkpoint torn, both ranks go on from the one before, and end where the whole run ended."""
    run = Path(shutil.copytree(undisturbed, tmp_path / undisturbed.name))
    truncate(run / "checkpoints/step_000008/optimizer.safetensors")
    trial = forked.run(small_run | {"name": undisturbed.name, "runs_dir": str(tmp_path)})
    assert "resuming after step 6" in trial.stdout() and trial.stderr().count("step_000008 is damaged") == 1
    assert same_run(run, undisturbed)


@pytest.fixture(scope="module")
def finished_run(tiny_run: dict[str, Any]) -> dict[str, Any]:
    """Overrides of a finished run of six steps, made in this process, with checkpoints at 2, 4 and 6; read only."""
    overrides = tiny_run | {"name": "finished", "engine.kind": "plain", "engine.micro_batch": 4, "schedule.steps": 6}
    train_here(overrides)
    return overrides


@pytest.fixture
def copied(finished_run: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A copy of the finished run to do harm to: overrides, run folder."""
    folder = shutil.copytree(Path(finished_run["runs_dir"]) / "finished", tmp_path / "finished")
    return finished_run | {"runs_dir": str(tmp_path)}, Path(folder)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip_bit])
@pytest.mark.parametrize("name", ["optimizer.safetensors", "adapter_model.safetensors"])
def test_damaged_newest_checkpoint_gives_way_to_the_one_before(
    copied: tuple[dict[str, Any], Path],
    finished_run: dict[str, Any],
    harm: Callable[[Path], None],
    name: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A kill while writing (an unnamed folder, half a file) or one flipped bit: warned, set aside, computed again."""
    overrides, folder = copied
    harm(folder / "checkpoints/step_000006" / name)
    half_written = folder / "checkpoints/step_000008.tmp"
    half_written.mkdir()
    (half_written / "optimizer.safetensors").write_bytes(b"half")
    train_here(overrides)
    stdout, stderr = capfd.readouterr()
    assert "resuming after step 4" in stdout
    assert f"step_000006 is damaged: {name}" in stderr
    assert (folder / "checkpoints/step_000006.bad").is_dir()
    whole = Path(finished_run["runs_dir"]) / "finished"
    assert adapter_bytes(folder, 6) == adapter_bytes(whole, 6) and read_numbers(folder) == read_numbers(whole)


def test_kill_before_the_first_checkpoint_starts_over(
    copied: tuple[dict[str, Any], Path], finished_run: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Rows in the log, a half-written folder and no checkpoint: from step 0, and the rows are replaced."""
    overrides, folder = copied
    for checkpoint in list_checkpoints(folder):
        shutil.rmtree(checkpoint)
    (folder / "LATEST").unlink()
    (folder / "checkpoints/step_000002.tmp").mkdir()
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    train_here(overrides | {"schedule.steps": 2})
    assert "resuming" not in capfd.readouterr().out
    assert read_numbers(folder) == read_numbers(Path(finished_run["runs_dir"]) / "finished")[:2]


def test_only_damaged_checkpoints_are_refused(copied: tuple[dict[str, Any], Path]) -> None:
    """No good checkpoint left: the run is not begun anew in silence, not even when asked a second time."""
    overrides, folder = copied
    for checkpoint in list_checkpoints(folder):
        flip_bit(checkpoint / "optimizer.safetensors")
    log = (folder / "log.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match="checkpoints.*--fresh starts anew"):
            train_here(overrides)
    assert (folder / "log.jsonl").read_bytes() == log


def test_finished_run_says_so_and_changes_nothing(
    copied: tuple[dict[str, Any], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """The same command after the end: one line, the same log, the same checkpoints."""
    overrides, folder = copied
    kept = {p: p.read_bytes() for part in ("checkpoints", "log.jsonl", "LATEST") for p in files(folder / part)}
    train_here(overrides)
    assert "the run is finished (6 steps); --fresh starts anew" in capfd.readouterr().out
    assert {p: p.read_bytes() for part in ("checkpoints", "log.jsonl", "LATEST") for p in files(folder / part)} == kept


def test_pointers_that_a_kill_left_behind_are_put_right(copied: tuple[dict[str, Any], Path]) -> None:
    """Killed between its last checkpoint and LATEST, a run is finished: started again, it names what there is."""
    overrides, folder = copied
    (folder / "LATEST").write_text("step_000002\n")
    (folder / "BEST").write_text('{"step": 9, "by": "loss", "score": 0.1, "clips": 8}\n')  # which was set aside, say
    train_here(overrides)
    assert (folder / "LATEST").read_text() == "step_000006\n" and not (folder / "BEST").exists()


def test_fresh_keeps_the_old_run_aside(
    copied: tuple[dict[str, Any], Path], finished_run: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """--fresh begins at step 1, whatever the recipe was, and the old folder is whole under NAME.1."""
    overrides, folder = copied
    train_here(overrides | {"schedule.steps": 2, "seed": 1}, fresh=True)
    assert f"the old run is kept in {folder}.1" in capfd.readouterr().out
    old, whole = folder.with_name("finished.1"), Path(finished_run["runs_dir"]) / "finished"
    assert {p.relative_to(old) for p in files(old)} == {p.relative_to(whole) for p in files(whole)}
    assert [step for (step,) in read_numbers(folder, "step")] == [1, 2]
    assert read_numbers(folder) != read_numbers(old)[:2] and read_numbers(old) == read_numbers(whole)


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_fresh_holds_for_the_first_start_of_a_job(
    copied: tuple[dict[str, Any], Path], count: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Started again by torchrun or SLURM, what the same command began goes on; what another did is still set aside."""
    overrides, folder = copied
    monkeypatch.setenv(count, "1")
    train_here(overrides, fresh=True)
    assert "the run is finished" in capfd.readouterr().out and not folder.with_name("finished.1").exists()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--fresh"])
    train_here(overrides | {"schedule.steps": 1}, fresh=True)
    assert "give the command without --fresh from now on" in capfd.readouterr().out
    assert folder.with_name("finished.1").exists() and len(read_numbers(folder)) == 1


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
