"""A grid of runs is ordinary runs, side by side, and none is done twice. Run: pytest tests/commands/test_sweep.py"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

from tests.launching import RECIPE, adapter_bytes, kill_tree, start, train_here
from toolkit.commands import sweep
from toolkit.commands.evaluate import evaluate_run
from toolkit.commands.launcher import training_command
from toolkit.commands.slurm import Resources, submit_array
from toolkit.commands.sweep import (
    list_charts,
    parse_grid,
    plan_sweep,
    ranks_of,
    run_sweep,
    sum_up,
    sum_up_row,
    to_markdown,
)
from toolkit.config import diff_configs, dump_config, flatten_config, load_config
from toolkit.errors import UserError
from toolkit.run.checkpoint import best_checkpoint, list_checkpoints
from toolkit.run.folder import newest_adapter
from toolkit.run.judge import describe
from toolkit.run.signals import REQUEUE

GRID = "{lora.rank: [2, 4]}"
NAMES = ["rank-2_seed-0", "rank-2_seed-1", "rank-4_seed-0", "rank-4_seed-1"]
Follow = Callable[..., int]


def follow_here(command: list[str], *_: Any) -> int:
    """Do in this process what a command of the sweep does in its own: the same training, the same evaluation."""
    flags = dict(zip(command[2::2], command[3::2], strict=True))
    if command[1].endswith("launch/train.py"):
        train_here(flatten_config(load_config(flags["--config"])))
    else:
        assert command[1].endswith("launch/evaluate.py")
        gaps = [int(gap) for gap in flags["--gaps"].split(",")] if "--gaps" in flags else []
        evaluate_run(flags["--run"], gaps=gaps, out=flags["--out"], checkpoint=flags.get("--checkpoint"))
    return 0


def do(settings: dict[str, Any], grid: str = GRID, follow: Follow = follow_here, **options: Any) -> list[str]:
    """Run the sweep; returns what it started, "train NAME" or "evaluate NAME"."""
    started: list[str] = []

    def followed(command: list[str], *rest: Any) -> int:
        flags = dict(zip(command[2::2], command[3::2], strict=True))
        name = Path(flags["--config"]).stem if "--config" in flags else Path(flags["--run"]).name
        started.append(f"{Path(command[1]).stem} {name}")
        return follow(command, *rest)

    with mock.patch.object(sweep, "follow", followed):
        run_sweep(
            str(RECIPE), **{"name": "s", "grid": grid, "seeds": 2, "gaps": [4, 8], "overrides": settings} | options
        )
    return started


@pytest.fixture(scope="module")
def settings(tiny_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Overrides of two steps in this process, but for what the grids vary."""
    return {name: value for name, value in tiny_run.items() if name != "lora.rank"} | {
        "engine.kind": "plain", "engine.precision": "fp32", "engine.micro_batch": 4, "schedule.steps": 2,
        "diffusion.layout": "middle_in_clip", "data.frames": 3, "validation.sampler_steps": 1,
        "runs_dir": str(tmp_path_factory.mktemp("swept")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def parts(settings: dict[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """Two ranks with two seeds at two gaps, in two parts: of each what was started, and the summary by then."""
    folder = Path(settings["runs_dir"]) / "s"
    return [(do(settings, part=part), read(folder)) for part in ("1/2", "2/2")]


@pytest.fixture(scope="module")
def swept(settings: dict[str, Any], parts: list[tuple[list[str], dict[str, Any]]]) -> Path:
    """The folder of that sweep; a test leaves it as it was."""
    return Path(settings["runs_dir"]) / "s"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


def test_each_point_is_an_ordinary_run(settings: dict[str, Any], swept: Path) -> None:
    """A folder for each combination and seed, called by its values; to the bit it is a run begun by hand."""
    folder = swept
    for name in NAMES:
        rank, seed = int(name[5]), int(name[-1])
        own, base = load_config(folder / name / "config.yaml"), load_config(RECIPE, settings | {"name": "s"})
        changed = {field: new for field, (_, new) in diff_configs(base, own).items()}
        expected = {"name": name, "runs_dir": str(folder), "seed": seed, "lora.rank": rank}
        assert changed == {field: value for field, value in expected.items() if flatten_config(base)[field] != value}
    by_hand = train_here(settings | {"name": "by_hand", "lora.rank": 2, "seed": 1})
    assert adapter_bytes(by_hand, 2) == adapter_bytes(folder / NAMES[1], 2) != adapter_bytes(folder / NAMES[0], 2)


def test_what_is_finished_is_not_done_again(settings: dict[str, Any], swept: Path, tmp_path: Path) -> None:
    """Nothing for the same command; a lost evaluation alone; other gaps are judged, and another seed or value is added."""
    folder = swept
    before = read(folder)
    assert do(settings) == [] and read(folder)["tables"] == before["tables"]
    (folder / NAMES[2] / "evaluation/evaluation.json").unlink()
    (folder / NAMES[3] / "evaluation/evaluation.json").write_bytes(bytes(100))  # as a power cut leaves it
    pointer = (folder / NAMES[2] / "LATEST").rename(tmp_path / "LATEST")  # as after a kill just before it is written
    assert do(settings) == [f"evaluate {NAMES[2]}", f"evaluate {NAMES[3]}"]
    pointer.rename(folder / NAMES[2] / "LATEST")
    for file in folder.glob("*/config.yaml"):  # as a start of a finished run does by hand
        file.write_text(file.read_text())
    for place in folder.glob("*/checkpoints/*"):  # a clock that was set back by an hour before the runs were judged
        os.utime(place, (time.time() + 3600,) * 2)
    assert do(settings) == []
    told = folder / NAMES[0] / "evaluation/evaluation.json"
    told.write_text(
        told.read_text().replace("step_000002", "step_000001")
    )  # of a checkpoint that is no more the newest
    assert do(settings) == [f"evaluate {NAMES[0]}"]
    assert do(settings, "{lora.rank: [4, 2, 1]}", seeds=1) == ["train rank-1_seed-0", "evaluate rank-1_seed-0"]
    assert do(settings, "{lora.rank: [1]}", seeds=1, gaps=[]) == ["evaluate rank-1_seed-0"]
    # how it is judged is told by its recipe, which a start writes anew: it has nothing to train
    fewer = settings | {"validation.clips": 1}
    assert do(fewer, "{lora.rank: [1]}", seeds=1, gaps=[]) == ["train rank-1_seed-0", "evaluate rank-1_seed-0"]
    assert [len(table["keys"]) for table in read(folder)["tables"]] == [1]
    assert do(settings) == []
    # what was judged otherwise before stands in no table
    assert do(fewer, part="1/4") == [f"train {NAMES[0]}", f"evaluate {NAMES[0]}"]
    assert [[row["seeds"] for row in table["rows"].values()] for table in read(folder)["tables"]] == [[[0]]] * 2
    assert do(settings) == [f"train {NAMES[0]}", f"evaluate {NAMES[0]}"]
    wrong = "rank-2: .*was made by another recipe .lora.alpha was 4.0, is 8.0"
    with pytest.raises(
        UserError, match=wrong + r".; choose another --name for the sweep, or move \S+/rank-2_seed-0 away$"
    ):
        do(settings | {"lora.alpha": 8})


def test_a_stopped_run_is_gone_on_with(settings: dict[str, Any]) -> None:
    """One that ended after its first step, as by a `stop` file, is named, and the others are done all the same.

    The same command resumes it where it was.
    """

    def stopping(command: list[str], *rest: Any) -> int:
        if command[-1].endswith("rank-2_seed-0.yaml"):
            run = load_config(command[-1]).folder
            real = sweep.Requests.read
            with mock.patch("toolkit.run.signals.Requests.read", lambda self, at: real(self, at)._replace(stop=1.0)):
                assert train_here(flatten_config(load_config(command[-1]))) == run
            return 0
        return follow_here(command, *rest)

    with pytest.raises(UserError, match="1 of 2 runs failed, rank-2_seed-0: "):
        do(settings, follow=stopping, name="stopped", seeds=1)
    folder = Path(settings["runs_dir"]) / "stopped"
    assert list(read(folder)["combinations"]) == ["rank-4"]
    assert [place.name for place in list_checkpoints(folder / NAMES[0])] == ["step_000001"]
    assert do(settings, name="stopped", seeds=1) == [f"train {NAMES[0]}", f"evaluate {NAMES[0]}"]
    assert list(read(folder)["combinations"]) == ["rank-2", "rank-4"]
    assert adapter_bytes(folder / NAMES[0], 2) == adapter_bytes(Path(settings["runs_dir"]) / "s" / NAMES[0], 2)


def test_machines_share_the_runs(settings: dict[str, Any], parts: list[tuple[list[str], dict[str, Any]]]) -> None:
    """Two parts do each run once, between them; each sums up what there is by then, the last one all; an array does so."""
    for (started, _), own in zip(parts, (NAMES[::2], NAMES[1::2]), strict=True):
        assert started == [f"{what} {name}" for name in own for what in ("train", "evaluate")]
    assert [list(summary["runs"]) for _, summary in parts] == [NAMES[::2], NAMES]
    command = ["launch/sweep.py", "--config", str(RECIPE), "--name", "x", "--grid", "grid.yaml"]
    assert f"set -- 8 {' '.join(command)}" in submit_array(command, 8, Resources(), Path("logs"), dry_run=True)


def test_what_stopped_for_want_of_a_better_one_is_judged_at_its_best(settings: dict[str, Any]) -> None:
    """Not at its newest, which is worse by then."""
    looks = {"validation.every_steps": 1, "validation.patience": 1, "schedule.steps": 6, "optimizer.lr": 1.0}
    do(settings | looks, "{lora.rank: [2]}", name="patient", seeds=1, gaps=[])
    run = Path(settings["runs_dir"]) / "patient/rank-2_seed-0"
    judged = json.loads((run / "evaluation/evaluation.json").read_text())["judged"]
    assert judged == {"tuned": str(best_checkpoint(run))} != {"tuned": str(newest_adapter(run))}


def test_a_rank_that_varies_alone_is_remarked_upon(
    settings: dict[str, Any], swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Since the adapter's scale varies with it; not where alpha goes along."""
    remark = "note: lora.rank varies without lora.alpha"
    assert do(settings) == [] and capsys.readouterr().out.count(remark) == 1
    both = {name: value for name, value in settings.items() if name != "lora.alpha"}
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        do(both, "{r: {two: {lora.rank: 2, lora.alpha: 2}}}", follow=lambda *_: 1, part="2/2")
    assert remark not in capsys.readouterr().out


def test_figures_are_those_of_the_clips(swept: Path) -> None:
    """Against NumPy, on what evaluate.py wrote: of each clip the mean over seeds, of these the mean, and how many gain."""
    folder = swept
    summary = read(folder)
    assert [table["gap"] for table in summary["tables"]] == [4, 8] and list(summary["runs"]) == NAMES
    for table in summary["tables"]:
        assert list(table["rows"]) == ["rank-2", "rank-4"] and len(table["keys"]) == 2
        for name, row in table["rows"].items():
            judged = [
                json.loads((folder / f"{name}_seed-{seed}/evaluation/evaluation.json").read_text()) for seed in (0, 1)
            ]
            assert row["seeds"] == [0, 1]
            clips = {
                label: np.mean([own["gaps"][str(table["gap"])]["per_clip"][label]["psnr"] for own in judged], 0)
                for label in ("linear", "base", "tuned")
            }
            for label, values_B in clips.items():
                assert row["figures"][label]["psnr"]["mean"] == pytest.approx(values_B.mean(), abs=1e-4)
            for other in ("base", "linear"):
                gain_B, told = clips["tuned"] - clips[other], row["against"][other]["psnr"]
                assert told["mean"] == pytest.approx(gain_B.mean(), abs=1e-4)
                assert (told["improved"], told["clips"]) == ((gain_B > 0).sum(), 2)
    text = (folder / "sweep.md").read_text()
    assert text == to_markdown(summary) and text.count("| rank-4 | 2 |") == 2 and "2 clips |" in text
    assert (folder / "sweep.svg").read_text().count("<svg ") == 3


def per_clip(tuned: list[Any], base: list[Any], linear: list[Any]) -> dict[str, Any]:
    figures = ("psnr_moving", "psnr_moving_middle", "psnr_middle", "psnr")
    own = {"tuned": tuned, "base": base, "linear": linear}
    return {label: dict.fromkeys(figures, values) for label, values in own.items()}


def test_clips_are_the_unit() -> None:
    """What two seeds score apart and alike on average has no width: seeds are averaged first, and are no clips of their own.

    The interval is that of the clips' means, whatever the order and number of seeds; what nothing moves in does not count.
    """
    apart = [
        (0, per_clip([21.0, 23.0], [20.0, 20.0], [19.0] * 2)),
        (1, per_clip([23.0, 21.0], [20.0, 20.0], [19.0] * 2)),
    ]
    gain = sum_up_row(apart)["against"]["base"]["psnr"]
    assert gain == {"mean": 2.0, "low": 2.0, "high": 2.0, "clips": 2, "improved": 2}
    values = np.random.default_rng(0).normal(size=(3, 12))
    runs = [(seed, per_clip(list(own), [0.0] * 12, [0.5] * 12)) for seed, own in enumerate(values)]
    gain = sum_up_row(runs)["against"]["base"]["psnr"]
    expected = describe(torch.from_numpy(values).mean(0))
    assert {name: gain[name] for name in expected} == expected and gain["improved"] == (values.mean(0) > 0).sum()
    again = sum_up_row(runs[::-1])["against"]["base"]["psnr"]
    assert again == pytest.approx(gain)
    still = sum_up_row([(0, per_clip([21.0, None], [20.0, None], [19.0, None]))])["against"]["base"]["psnr"]
    assert (still["mean"], still["clips"], still["improved"], still["low"]) == (1.0, 1, 1, None)


def test_settings_are_compared_clip_by_clip(settings: dict[str, Any], tmp_path: Path) -> None:
    """With the first of the grid: what is better by as much on every clip is, however far the clips are apart."""
    points = plan_sweep(str(RECIPE), "s", "{lora.rank: [1, 2]}", 2, settings | {"runs_dir": str(tmp_path)})
    tuned = ([20.0, 30.0, 25.0], [22.0, 28.0, 25.0], [20.5, 31.5, 24.5], [22.5, 27.5, 26.5])
    for point, values in zip(points, tuned, strict=True):
        point.evaluation.parent.mkdir(parents=True)
        own = {"keys": list("abc"), "per_clip": per_clip(values, [20.0] * 3, [21.0] * 3)}
        point.evaluation.write_text(json.dumps({"gaps": {"8": own}}))
    summary = sum_up(points)
    first, second = summary["tables"][0]["rows"].values()
    assert "first" not in first["against"]
    gain = second["against"]["first"]["psnr"]
    assert gain == {"mean": 0.5, "low": 0.5, "high": 0.5, "clips": 3, "improved": 3}
    head, _, *rows = [line for line in to_markdown(summary).splitlines() if line.startswith("|")]
    assert [line.split("|")[-2].strip() for line in (head, *rows)] == [
        "gain on rank-1 [95 %]", "", "+0.50 [+0.50, +0.50]",
    ]  # fmt: skip
    assert "gain on rank" not in to_markdown(sum_up(points[:2]))
    (chart,), (alone,) = list_charts(summary), list_charts(sum_up(points[:2]))
    assert "on rank-1" in chart and "on rank-1" not in alone


@pytest.mark.parametrize(("moves", "label"), [((), "middle PSNR"), (("second",), "middle moving PSNR")])
def test_where_nothing_moves_the_whole_frame_is_compared(moves: tuple[str, ...], label: str) -> None:
    """In all rows of a table alike, and only where no clip moves in any of them."""
    clips = [(0, per_clip([21.0], [20.0], [19.0]))]
    row = sum_up_row(clips, first=clips)
    rows = {name: json.loads(json.dumps(row)) for name in ("first", "second")}
    for name in rows.keys() - {*moves}:
        for figures in rows[name]["figures"].values():
            figures["psnr_moving"]["mean"] = figures["psnr_moving_middle"]["mean"] = None
    table = {"gap": 8, "size_px": [32, 32], "keys": ["a"], "rows": rows}
    told = to_markdown({"tables": [table], "command": ""})
    assert f"; {label}, dB" in told and f"gain in {label}, dB" in list_charts({"tables": [table]})[0]


@pytest.mark.parametrize("part", [[], ["--part", "1/3"], ["--part=1/3"]])
def test_the_command_that_is_told_does_it_all(
    settings: dict[str, Any], part: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the share of one machine; other words stay, quoted where a shell needs it."""
    (point,) = plan_sweep(str(RECIPE), "s", "{lora.rank: [1]}", 1, settings | {"runs_dir": str(tmp_path)})
    point.evaluation.parent.mkdir(parents=True)
    point.evaluation.write_text(json.dumps({"gaps": {"8": {"keys": ["a"], "per_clip": per_clip([2.0], [1.0], [1.0])}}}))
    for argv in (["launch/sweep.py", *part, "--grid", GRID], ["launch/sweep.py", "--grid", GRID, *part]):
        monkeypatch.setattr(sys, "argv", argv)
        assert f"\n    python launch/sweep.py --grid '{GRID}'\n" in to_markdown(sum_up([point]))


def test_other_windows_stand_apart(settings: dict[str, Any], tmp_path: Path) -> None:
    """A table for each gap and set of clips; where a blend scores otherwise in one table, a line says so."""
    points = plan_sweep(str(RECIPE), "s", "{lora.rank: [1, 2, 3, 4]}", 1, settings | {"runs_dir": str(tmp_path)})
    for point, keys, gap, linear in zip(
        points, ("ab", "ab", "cd", "ab"), (4, 4, 4, 8), (1.0, 2.0, 1.0, 1.0), strict=True
    ):
        point.evaluation.parent.mkdir(parents=True)
        own = {"keys": list(keys), "per_clip": per_clip([3.0, 3.5], [2.0, 3.0], [linear] * 2)}
        point.evaluation.write_text(json.dumps({"gaps": {str(gap): own}}))
    tables = sum_up(points)["tables"]
    assert [(t["gap"], t["keys"], list(t["rows"])) for t in tables] == [
        (4, ["a", "b"], ["rank-1", "rank-2"]), (4, ["c", "d"], ["rank-3"]), (8, ["a", "b"], ["rank-4"]),
    ]  # fmt: skip
    assert to_markdown(sum_up(points)).count("The blend scores differently") == 1
    assert "The blend scores differently" not in to_markdown(sum_up(points[1:]))


def test_a_grid_is_read_as_meant(tmp_path: Path) -> None:
    """Fields with lists, words with named settings, inline or from a file; names say the values, as folders can."""
    text = (
        "{lora.rank: [4, 16], "
        "objective: {eps: {diffusion.loss_space: epsilon, optimizer.lr: 1.0e-3}, v: {optimizer.lr: 2}}}"
    )
    combinations = parse_grid(text)
    assert list(combinations) == [f"rank-{rank}_objective-{word}" for rank in (4, 16) for word in ("eps", "v")]
    assert combinations["rank-16_objective-eps"] == {
        "lora.rank": 16, "diffusion.loss_space": "epsilon", "optimizer.lr": 0.001,
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(yaml.safe_load(text), sort_keys=False))
    assert parse_grid(str(tmp_path / "grid.yaml")) == combinations
    spelled = parse_grid("{lora.targets: [all, [to_q, to_k], 'attn1\\..*'], optimizer.lr: [1.0e-5, 2e-4]}")
    assert [name for name in spelled if name.endswith("-2e-4")] == [
        "targets-all_lr-2e-4", "targets-to-q-to-k_lr-2e-4", "targets-attn1_lr-2e-4",
    ]  # fmt: skip
    both = parse_grid("{checkpoint.every_steps: [1], validation.every_steps: [2]}")
    assert list(both) == ["checkpoint.every-steps-1_validation.every-steps-2"]


@pytest.mark.parametrize(
    ("grid", "changes", "options", "words"),
    [
        ("{}", {}, {}, "--grid {} holds no field to vary; give fields with lists"),
        ("{lora.rank: []}", {}, {}, r"--grid has \[\] for lora.rank"),
        ("{lora.rank: 4}", {}, {}, "--grid has 4 for lora.rank"),
        ("{rank: {a: 4}}", {}, {}, "--grid has 4 for a of rank, which sets no field"),
        ("{lora.rank: [4, 4]}", {}, {}, "two choices of lora.rank that would be called rank-4"),
        ("{lora.rank: [4], both: {a: {lora.rank: 2}}}", {}, {}, "sets a field twice in rank-4_both-a"),
        ("{lora.rank: [4", {}, {}, "--grid is not YAML"),
        ("nowhere.yaml", {}, {}, "cannot read the grid nowhere.yaml"),
        ("{lora.rnak: [4]}", {}, {}, "unknown key lora.rnak; did you mean lora.rank"),
        ("{lora.rank: [4, 0]}", {}, {}, "rank-0: .*lora.rank is 0: .* greater than or equal to 1"),
        ("{data.frames: [3, 4]}", {}, {}, "frames-4: .*needs an odd number"),
        ("{seed: [1, 2]}", {}, {}, "--grid varies seed, which is the sweep's own"),
        ("{lora.rank: [4]}", {"lora.rank": 2}, {}, "varies lora.rank, which is given as a flag as well"),
        (GRID, {}, {"seeds": 0}, "--seeds is 0; give 1 or more"),
        (GRID, {}, {"name": "a/b"}, "name is 'a/b'"),
        (GRID, {}, {"part": "3/2"}, "part is 3/2"),
        (GRID, {}, {"gaps": [4, 400]}, "rank-2: no held-out clip of .* reaches over a gap of 400"),
        ("{data.frames: [3, 7]}", {}, {}, "frames-7: a gap of 4 source frames cannot be filled"),
        (GRID, {}, {"ranks": 3}, "rank-2: .*cannot be cut into micro-batches"),
        ("{lora.targets: [all, nothing.*]}", {}, {}, "targets-nothing: .*nothing"),
        (GRID, {"data.shards": "nowhere"}, {}, "rank-2: there is no folder nowhere"),
    ],
)  # fmt: skip
def test_what_some_run_would_refuse_is_refused_first(
    settings: dict[str, Any],
    tmp_path: Path,
    grid: str,
    changes: dict[str, Any],
    options: dict[str, Any],
    words: str,
) -> None:
    """In a sentence that names the combination, before anything is started or written."""
    own = {name: value for name, value in settings.items() if name not in grid} | {"runs_dir": str(tmp_path)} | changes

    def never(*_: Any) -> int:
        raise AssertionError("a run was started")

    with pytest.raises(UserError, match=words):
        do(own, grid, never, **options)
    assert not list(tmp_path.iterdir())


def test_no_clips_held_out_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """As above, for data without a validation split; and a sweep does not settle in the folder of a run."""
    shards = Path(settings["data.shards"])
    (tmp_path / "shards").mkdir()
    for file in shards.glob("train-*"):
        (tmp_path / "shards" / file.name).symlink_to(file)
    with pytest.raises(UserError, match="holds no val shards"):
        do(settings | {"data.shards": str(tmp_path / "shards"), "runs_dir": str(tmp_path)})
    config = load_config(RECIPE, settings | {"name": "run", "runs_dir": str(tmp_path)})
    config.folder.mkdir()
    (config.folder / "config.yaml").write_text(dump_config(config))
    with pytest.raises(UserError, match="is the folder of a run; choose another --name"):
        do(settings | {"runs_dir": str(tmp_path)}, name="run")


def test_processes_of_a_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there is room for, and as the batch can be shared out to; one by Python, more by DeepSpeed's launcher."""
    monkeypatch.setattr(sweep, "default_ranks", lambda: 3)
    for engine, micro_batch, ranks in (("plain", 1, 1), ("zero2", 1, 2), ("zero2", 4, 1)):
        config = load_config(RECIPE, settings | {"name": "x", "engine.kind": engine, "engine.micro_batch": micro_batch})
        assert ranks_of(config, None) == ranks and ranks_of(config, 5) == 5
    assert training_command(1)[0] == sys.executable
    first, second = training_command(4), training_command(4)
    assert first[1:3] == ["--num_gpus", "4"] and Path(first[0]).is_file() and Path(first[-1]).is_file()
    assert first[4] != second[4], "two trainings on one machine need a port each"


@pytest.mark.launch
def test_asked_to_end_it_saves_and_goes_on_later(settings: dict[str, Any], tmp_path: Path) -> None:
    """A signal to the sweep alone, as by `kill`: its run saves at the end of the step, and the sweep exits with 75.

    Though DeepSpeed's launcher, which stands between, would die of a signal and leave its ranks at work.
    """
    flags = settings | {
        "runs_dir": str(tmp_path), "engine.kind": "zero2", "engine.micro_batch": 1, "schedule.steps": 500,
        "checkpoint.every_steps": 500,
    }  # fmt: skip
    words = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "launch/sweep.py", "--config", str(RECIPE), "--name", "s", "--grid", "{lora.rank: [2]}"]
    process = start([*command, *words, "--ranks", "2"], ranks=2)
    log = tmp_path / "s/rank-2_seed-0/log.jsonl"
    until_s = time.monotonic() + 120
    while not log.exists() and process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    try:
        said, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        raise  # not waiting for ranks that were left alone, and hold the pipe
    assert process.returncode == REQUEUE, (said, errors)
    assert "the sweep was asked to end; the same command goes on" in errors
    assert "saved; the same command again" in said and list_checkpoints(tmp_path / "s/rank-2_seed-0")
    assert not (tmp_path / "s/sweep.json").exists()
