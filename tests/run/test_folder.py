"""One job per run folder, and no good run moved for a faulty recipe. Run: pytest tests/run/test_folder.py"""

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.checkpoints import save
from tests.launching import RECIPE, train_here
from toolkit.config import load_config
from toolkit.data.index import open_shards
from toolkit.engine.world import World
from toolkit.errors import UserError
from toolkit.run.folder import await_folder, check_folder, prepare_folder, record_start
from toolkit.run.job import check_clips
from toolkit.run.watchdog import Watchdog


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_job_is_refused_while_the_first_lives(tmp_path: Path, fresh: bool) -> None:
    """The lock holds as long as the first job's file is open, also against --fresh, and goes with it."""
    config = load_config(RECIPE, {"runs_dir": str(tmp_path)})
    lock = prepare_folder(config, fresh=False)
    with pytest.raises(UserError, match=rf"another job \(process {os.getpid()} on .*\) is writing"):
        prepare_folder(config, fresh)
    lock.close()
    prepare_folder(config, fresh).close()


def test_stacks_of_a_hang_outlast_starts_that_do_not_hang(tmp_path: Path) -> None:
    """One that ends well leaves none, and one that was killed no more than the names of its ranks."""
    config = load_config(RECIPE, {"runs_dir": str(tmp_path)})
    for start in ("hung", "killed", "ended", "killed"):
        prepare_folder(config, fresh=False).close()
        watchdog = Watchdog(config.folder, 0, 1, timeout_s=60)
        with watchdog:
            report = config.folder / "stacks/rank_00000.txt"
            left = report.read_text() + "at toolkit/run/trainer.py:1\n" * (start == "hung")
        assert not report.exists()
        if start != "ended":
            report.write_text(left)
    assert "trainer.py" in (config.folder / "stacks.before/rank_00000.txt").read_text()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_a_disk_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """Some network disks know none; any other error is no reason to go on without a lock."""
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(number, os.strerror(number))))
    config = load_config(RECIPE, {"runs_dir": str(tmp_path)})
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            prepare_folder(config, fresh=False)
    else:
        prepare_folder(config, fresh=False).close()
        assert "nothing keeps a second job out" in capsys.readouterr().err


def test_a_machine_waits_for_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank goes on when its disk shows what rank 0 made, however late; where it never does, all need one disk."""
    config = load_config(RECIPE, {"runs_dir": str(tmp_path)})
    rank_3 = World(3, 1, torch.device("cpu"))
    config.folder.mkdir()
    threading.Timer(0.7, (config.folder / "env.json").touch).start()
    await_folder(config, rank_3)
    assert (config.folder / "env.json").exists()
    (config.folder / "env.json").unlink()
    monkeypatch.setattr("toolkit.run.folder._SHARED_DISK_S", 0)
    with pytest.raises(UserError, match=rf"rank 3 on .* does not see {config.folder}.*need one shared disk"):
        await_folder(config, rank_3)


def test_a_kill_at_the_very_start_leaves_a_usable_folder(tmp_path: Path) -> None:
    """A lock and half a config.yaml are no foreign files."""
    config = load_config(RECIPE, {"runs_dir": str(tmp_path)})
    config.folder.mkdir()
    for name in ("lock", "config.yaml.0123456789abcdef.tmp"):
        (config.folder / name).touch()
    check_folder(config)
    (config.folder / "thesis.docx").touch()
    with pytest.raises(UserError, match="holds files but no run"):
        check_folder(config)


@pytest.mark.parametrize("harm", ["a file", "another's"])
def test_a_closed_place_is_refused_before_anything_is_loaded(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """A file, and a folder of somebody else; that answer is made up, since modes do not stop root."""
    monkeypatch.setattr("toolkit.run.job.load_base", lambda *_, **__: pytest.fail("loaded all the same"))
    place = tmp_path / "runs"
    if harm == "a file":
        place.touch()
    else:
        place.mkdir()
        monkeypatch.setattr("os.access", lambda path, mode: Path(path) != place)
    with pytest.raises(UserError, match=f"cannot write to {place}, .*; choose another --runs_dir"):
        train_here(tiny_run | {"runs_dir": str(place), "name": "a"})


@pytest.mark.parametrize("allow_change", [False, True])
def test_another_adapter_to_start_from_is_refused(tmp_path: Path, allow_change: bool) -> None:
    """As soon as there is a checkpoint, after which it is read no more: taken in silence, it would be taken for trained."""
    config, other, without = (
        load_config(RECIPE, {"runs_dir": str(tmp_path)} | start)
        for start in ({"lora.init_from": "a"}, {"lora.init_from": "b"}, {})
    )
    prepare_folder(config, fresh=False).close()
    record_start(config)
    assert check_folder(other) == ""
    (config.folder / "checkpoints/step_000002").mkdir()
    assert check_folder(config) == ""
    for changed, new in ((other, "'b'"), (without, "None")):
        with pytest.raises(UserError, match=rf"another recipe \(lora.init_from was 'a', is {new}\)"):
            check_folder(changed, allow_change)


@pytest.mark.parametrize("changes", [{}, {"lora.rank": 1}])
def test_a_run_without_its_checkpoints_is_not_begun_again(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Deleted by hand, they leave a log that another start would cut to nothing, by whatever recipe."""
    config = load_config(RECIPE, {"runs_dir": str(tmp_path)})
    prepare_folder(config, fresh=False).close()
    record_start(config)
    check_folder(config)
    save(config.folder, 2)
    check_folder(config)
    os.replace(config.folder / "checkpoints", tmp_path / "elsewhere")
    for allow_change in (False, True):
        with pytest.raises(UserError, match="none of the checkpoints that .* had is left"):
            check_folder(load_config(RECIPE, {"runs_dir": str(tmp_path)} | changes), allow_change)
    os.replace(tmp_path / "elsewhere", config.folder / "checkpoints")
    check_folder(config)


def test_a_renamed_folder_is_the_same_run(tmp_path: Path) -> None:
    """Copied or renamed, a run goes on under its new name as if nothing was changed; for nothing is."""
    config = load_config(RECIPE, {"runs_dir": str(tmp_path)})
    prepare_folder(config, fresh=False).close()
    record_start(config)
    save(config.folder, 2)
    os.replace(config.folder, tmp_path / "renamed")
    assert check_folder(load_config(RECIPE, {"runs_dir": str(tmp_path), "name": "renamed"})) == ""


def test_what_is_no_adapters_shape_may_change(tmp_path: Path) -> None:
    """With --allow_change, as README.md has it: dropout in the middle of a run that overfits; not what the adapter means."""
    config, dropped, scaled = (
        load_config(RECIPE, {"runs_dir": str(tmp_path)} | changes)
        for changes in ({}, {"lora.dropout": 0.1}, {"lora.alpha": 1})
    )
    prepare_folder(config, fresh=False).close()
    record_start(config)
    save(config.folder, 2)
    with pytest.raises(UserError, match="with --allow_change"):
        check_folder(dropped)
    assert check_folder(dropped, allow_change=True) == "lora.dropout was 0.0, is 0.1"
    with pytest.raises(UserError, match="not even with --allow_change"):
        check_folder(scaled, allow_change=True)


def test_what_a_kill_left_half_written_goes(tmp_path: Path) -> None:
    """Of the files that the run alone writes; another program may be writing its own at this moment."""
    config = load_config(RECIPE, {"runs_dir": str(tmp_path)})
    prepare_folder(config, fresh=False).close()
    own = [f"{name}.0123.tmp" for name in ("config.yaml", "env.json", "LATEST", "BEST", "log.jsonl", "skipped.jsonl")]
    for name in (*own, "LATEST.tmp", "evaluation.json.0123.tmp"):
        (config.folder / name).touch()
    record_start(config)
    assert [path.name for path in config.folder.glob("*.tmp")] == ["evaluation.json.0123.tmp"]


def test_fresh_with_a_faulty_recipe_moves_nothing(tiny_run, tmp_path: Path) -> None:
    """--fresh with a target that matches nothing is refused while the old run still stands in its place."""
    config = load_config(RECIPE, tiny_run | {"runs_dir": str(tmp_path), "name": "old"})
    prepare_folder(config, fresh=False).close()
    with pytest.raises(UserError, match="matches no linear layer"):
        train_here(tiny_run | {"runs_dir": str(tmp_path), "name": "old", "lora.targets": "nothing"}, fresh=True)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_clips_too_short_for_the_window_are_refused_at_the_start(tiny_shards: Path) -> None:
    """Twelve clips of 15 frames cannot give windows of 5 frames at stride 4: said before anything is loaded."""
    config = load_config(RECIPE, {"data.shards": str(tiny_shards), "data.frames": 5, "data.stride": 4})
    with pytest.raises(UserError, match="holds 0 training clips of 17 frames or more"):
        check_clips(config, open_shards(tiny_shards, "train"))


def test_the_same_data_may_lie_elsewhere(
    tiny_run: dict[str, Any], tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run goes on when its shards were moved, and is refused, its folder as it was, when others lie where they lay."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_shards, moved)
    overrides = tiny_run | {"name": "moved", "runs_dir": str(tmp_path), "engine.kind": "plain", "schedule.steps": 2}
    train_here(overrides)
    train_here(overrides | {"data.shards": str(moved)})
    assert "the run is finished" in capsys.readouterr().out
    index = moved / "train-000000.index.json"
    index.write_text(index.read_text().replace('"start_s": 0.0', '"start_s": 1.0'))
    records = [tmp_path / "moved" / name for name in ("config.yaml", "env.json", "log.jsonl", "LATEST")]
    before = [path.read_bytes() for path in records]
    with pytest.raises(UserError, match="data fingerprint"):
        train_here(overrides | {"data.shards": str(moved), "log_every_steps": 2})
    assert [path.read_bytes() for path in records] == before
