"""What a run shows while it goes: log.jsonl, validation.jsonl and TensorBoard. Run: pytest tests/run/test_monitor.py"""

import io
import math
import re
import shutil
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.img_mime_type_detector import from_bytes

from tests.launching import read_numbers, train_here
from toolkit.engine.world import World
from toolkit.rng import rng
from toolkit.run.board import BESIDE, GROUPS, OWN, TAGS
from toolkit.run.monitor import Monitor
from toolkit.run.rows import read_rows
from toolkit.run.scores import Scores
from toolkit.run.signals import STOP_FILE
from toolkit.run.timings import PHASES

STEPS, EVERY, BATCH = 6, 2, 4
MAIN, OTHER = (World(rank, 2, torch.device("cpu")) for rank in (0, 1))


@pytest.fixture(scope="module")
def watched(tiny_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Overrides of six steps of four clips in this process, with a line and a look at every second."""
    return tiny_run | {
        "engine.kind": "plain", "engine.global_batch": BATCH, "engine.micro_batch": 2, "schedule.steps": STEPS,
        "log_every_steps": EVERY, "validation.every_steps": 3, "validation.clips": 2, "checkpoint.every_steps": 1,
        "runs_dir": str(tmp_path_factory.mktemp("watched")), "name": "run",
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(watched: dict[str, Any]) -> Path:
    """The folder of that run; read only."""
    return train_here(watched)


def read_board(run: Path, beside: str = OWN) -> EventAccumulator:
    """What TensorBoard is given of a run, or of what it is compared with."""
    return EventAccumulator(
        str(run / "tb" / beside), size_guidance=dict.fromkeys(("scalars", "histograms", "images"), 0)
    ).Reload()


def count_sessions(run: Path) -> int:
    """How often hyperparameters were written, in all event files."""
    return sum(file.read_bytes().count(SESSION_START_INFO_TAG.encode()) for file in (run / "tb").rglob("events*"))


def read_hparams(board: EventAccumulator, tag: str) -> HParamsPluginData:
    return HParamsPluginData.FromString(board.SummaryMetadata(tag).plugin_data.content)


def read_charts(board: EventAccumulator) -> dict[str, list[str]]:
    """The tags of each chart of custom scalars, as the newest layout has them."""
    content = board.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    return {chart.title: [*chart.multiline.tag] for part in Layout.FromString(content).category for chart in part.chart}


def check_board(run: Path, every: int) -> EventAccumulator:
    """Each number of each row is one point at its step, and there are no others; groups stand at log steps, times at all."""
    groups = {key: (OWN, key) for key in GROUPS} | {key: place for key, place in BESIDE.items() if "by_sigma" in key}
    numbers = {key: (OWN, tag) for key, tag in TAGS.items()}
    numbers |= {key: (beside, TAGS[like]) for key, (beside, like) in BESIDE.items() if like in TAGS}
    wanted = {}
    for row in read_rows(run / "log.jsonl"):
        shown = {place: row[key] for key, place in numbers.items() if key in row}
        for key, (beside, group) in groups.items():
            shown |= {(beside, f"{group}/{name}"): value for name, value in row.get(key, {}).items()}
        ends_s = np.cumsum([*row["time_s"].values()])
        shown |= {(OWN, f"time_stacked_s/{phase}"): end_s for phase, end_s in zip(PHASES, ends_s, strict=True)}
        wanted |= {(*place, row["step"]): value for place, value in shown.items()}
        looks = {"validation_by_sigma", "validation_zero_by_sigma"} if "validation_loss" in row else set()
        own = {key for key in groups if not key.startswith("validation")} if row["step"] % every == 0 else {"time_s"}
        assert groups.keys() & set(row) == own | looks
    boards = {beside: read_board(run, beside) for beside in {OWN, *(beside for beside, *_ in wanted)}}
    points = [
        (beside, tag, event)
        for beside, board in boards.items()
        for tag in board.Tags()["scalars"]
        for event in board.Scalars(tag)
    ]
    found = {(beside, tag, event.step): event.value for beside, tag, event in points}
    assert len(found) == len(points) and found == pytest.approx(wanted, rel=1e-6)
    return boards[OWN]


def test_tensorboard_shows_what_the_log_holds(run: Path) -> None:
    board = check_board(run, EVERY)
    assert [event.step for event in board.Scalars("loss/validation")] == [3, 6]
    numbers = {
        key for row in read_rows(run / "log.jsonl") for key, value in row.items() if isinstance(value, int | float)
    }
    assert {*TAGS} == numbers - {"step", *BESIDE} and {*TAGS.values()} < {*board.Tags()["scalars"]}


def test_what_bounds_the_steps_is_told_in_words(run: Path) -> None:
    """Whenever it changes, and of the whole run at the end; the time left falls to nothing."""
    board, rows = read_board(run), read_rows(run / "log.jsonl")
    told = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("bound/text_summary")]
    bounds = [row["bound"] for row in rows if "bound" in row]
    changes = [bound for bound, before in zip(bounds, [None, *bounds], strict=False) if bound != before]
    assert [text.partition("-bound, ")[0] for text in told[:-1]] == changes
    assert told[-1].startswith("the whole run: ") and "s a step (data " in told[-1]
    assert rows[0]["eta_s"] > 0 and rows[-1]["eta_s"] == 0
    assert board.Scalars("progress/clips_seen")[-1].value == rows[-1]["clips"] == len(rows) * BATCH


@pytest.mark.launch
def test_and_of_two_ranks_under_deepspeed(reference_run: Path) -> None:
    board = check_board(reference_run, 1)
    assert [event.step for event in board.Scalars("loss/train")] == [*range(1, 11)]
    for row in read_rows(reference_run / "log.jsonl"):
        assert len(row["update_ratio"]) == 6 and min(row["update_ratio"].values()) > 0


def test_parts_make_up_the_step(run: Path) -> None:
    """Seconds by phase are those in which the step's clips went by, validation and checkpoints left out."""
    for row in read_rows(run / "log.jsonl"):
        assert [*row["time_s"]] == [*PHASES] and min(row["time_s"].values()) > 0
        assert sum(row["time_s"].values()) * row["clips_per_s"] == pytest.approx(BATCH)
        assert row["data_wait_share"] == pytest.approx(row["time_s"]["data"] * row["clips_per_s"] / BATCH)
        assert "bound" not in row or row["bound"] in ("data", "compute")


def test_losses_by_sigma_are_those_of_the_steps(run: Path) -> None:
    """Weighted by the clips that were drawn into each bin since the last log step, they are the losses of those steps.

    A sixth of all t is in each bin, the smallest t in the first.
    """
    rows, board = read_rows(run / "log.jsonl"), read_board(run)
    for row in (row for row in rows if row["step"] % EVERY == 0):
        last = row["step"] * BATCH
        draws = [torch.rand(1, generator=rng(0, "sigma", k)).item() for k in range(last - EVERY * BATCH, last)]
        clips = np.bincount([int(int(u * 1000) * 6 / 1000) for u in draws], minlength=6)
        names = {int(name[0]) - 1: name for name in row["loss_by_sigma"]}
        assert sorted(names) == [*np.flatnonzero(clips)] and row["loss_by_sigma"].keys() == row["zero_by_sigma"].keys()
        for group, key in (("loss_by_sigma", "loss"), ("zero_by_sigma", "zero_baseline")):
            total = sum(clips[place] * row[group][name] for place, name in names.items())
            steps = [one[key] for one in rows if row["step"] - EVERY < one["step"] <= row["step"]]
            assert total == pytest.approx(BATCH * sum(steps), rel=1e-6)
        spread = {
            tag: event.histogram_value for tag in board.Tags()["histograms"] for event in board.Histograms(tag)
            if event.step == row["step"]
        }  # fmt: skip
        assert spread.pop("histogram/ln_sigma").num == EVERY * BATCH
        assert {tag.removeprefix("histogram/loss/") for tag in spread} == row["loss_by_sigma"].keys()
        for name, loss in row["loss_by_sigma"].items():
            own = spread[f"histogram/loss/{name}"]
            assert own.num == clips[int(name[0]) - 1] and own.sum / own.num == pytest.approx(loss)


def test_charts_are_of_tags_that_are_there(run: Path) -> None:
    """Every tag belongs to what was shown; each loss has its baseline in the same chart, as another run."""
    board = read_board(run)
    tags, charts = board.Tags()["scalars"], read_charts(board)
    zero, seen = (read_board(run, beside).Tags()["scalars"] for beside in ("zero", "trained_on"))
    bins = {name for row in read_rows(run / "log.jsonl") for name in row.get("loss_by_sigma", {})}
    for title, expressions in charts.items():
        drawn = [[tag for tag in tags if re.match(expression, tag)] for expression in expressions]
        if title.startswith("sigma"):
            assert len(expressions) == 2 and {len(own) for own in drawn} <= {0, 1}
            assert [tag for own in drawn for tag in own] == [t for e in expressions for t in zero if re.match(e, t)]
        else:
            assert all(len(own) == 1 for own in drawn), (title, drawn)
    assert re.match(charts["against predicting zero"][0], "loss/train") and "loss/train" in zero
    assert re.match(charts["held-out clips against those trained on"][0], "loss/validation")
    assert seen == ["loss/validation"]
    assert sum(title.startswith("sigma") for title in charts) == 6 >= len(bins)
    assert len(charts["seconds, a phase on another"]) == len(PHASES)


def test_the_recipe_is_listed_once_with_what_it_reached(
    run: Path, watched: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end alone: a run that stopped has none, resumed to the end one, and started when finished still one."""
    board = read_board(run)
    recipe = read_hparams(board, SESSION_START_INFO_TAG).session_start_info.hparams
    assert recipe["lora.rank"].number_value == 4 and recipe["diffusion.layout"].string_value == "spec_middle"
    assert not {"name", "runs_dir", "data.workers", "model.memory"} & {*recipe}
    assert recipe["data.shards"].string_value == watched["data.shards"], "runs on other data are told apart by it"
    metrics = {metric.name.tag for metric in read_hparams(board, EXPERIMENT_TAG).experiment.metric_infos}
    assert metrics == {"loss/train", "loss/validation"} <= set(board.Tags()["scalars"])
    copy = Path(shutil.copytree(run, tmp_path / "finished/run"))
    train_here(watched | {"runs_dir": str(copy.parent)})
    assert count_sessions(copy) == count_sessions(run) == 1
    report = Monitor.report

    def ask_to_stop(self: Monitor, step: int, *numbers: Any) -> None:
        report(self, step, *numbers)
        (self.run / STOP_FILE).touch()

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "report", ask_to_stop)
        train_here(watched | {"runs_dir": str(tmp_path)})
    assert len(read_rows(tmp_path / "run/log.jsonl")) == 2 and count_sessions(tmp_path / "run") == 0
    assert count_sessions(train_here(watched | {"runs_dir": str(tmp_path)})) == 1
    assert read_numbers(tmp_path / "run") == read_numbers(run)


def test_a_finished_run_that_goes_on_is_listed_by_the_recipe_it_ends_with(
    run: Path, watched: dict[str, Any], tmp_path: Path
) -> None:
    """Another rate and more steps beside the losses they led to, not the recipe that it was first finished by."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    longer = {"runs_dir": str(tmp_path), "schedule.steps": watched["schedule.steps"] + 1, "optimizer.lr": 0.5}
    train_here(watched | longer, allow_change=True)
    recipe = read_hparams(read_board(copy), SESSION_START_INFO_TAG).session_start_info.hparams
    assert recipe["optimizer.lr"].number_value == 0.5 and count_sessions(copy) == 1
    assert recipe["schedule.steps"].number_value == longer["schedule.steps"]
    assert len(read_board(copy).Scalars("loss/train")) == longer["schedule.steps"], "what the run wrote before stays"


def test_how_it_ends_is_said(watched: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line names the bound, the last one says where the time went; a finished run says nothing of it."""
    overrides = watched | {"runs_dir": str(tmp_path), "schedule.steps": 3, "log_every_steps": 1}
    train_here(overrides)
    lines = [line for line in capsys.readouterr().out.splitlines() if "-bound" in line]
    assert len(lines) == 3 and lines[-1].startswith(("compute-bound, ", "data-bound, ")), lines
    train_here(overrides)
    assert "-bound" not in capsys.readouterr().out


def test_a_sharded_adapter_is_said_to_have_no_norms(
    watched: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, and the rest is shown."""
    run = train_here(watched | {"runs_dir": str(tmp_path), "schedule.steps": 2, "engine.kind": "fsdp2"})
    said = capsys.readouterr().out
    assert said.count("engine fsdp2 shards the adapter, so its norms are not shown") == 1
    assert (
        re.search(r"^loaded in \d+\.\d s\n(.*\n)*first step in \d+\.\d s$", said, re.M)
        and said.count("first step") == 1
    )
    row = read_rows(run / "log.jsonl")[-1]
    assert "adapter_norm" not in row and "loss_by_sigma" in row
    assert not any("adapter" in title for title in read_charts(read_board(run)))


# ---- figures and pictures, which whoever looks at held-out clips hands in


@pytest.fixture
def monitors(tmp_path: Path) -> Iterator[Any]:
    """Makes monitors of a run of ten steps in a folder, each closing the one before."""
    opened: list[Monitor] = []

    def make(start: int, world: World = MAIN) -> Monitor:
        if opened:
            opened[-1].close()
        opened.append(Monitor(tmp_path, start, 0, 10, 1, 1, [0.5, 123.0], None, {}, {}, world))
        return opened[-1]

    yield make
    opened[-1].close()


def test_the_first_step_is_no_measure_of_those_to_come(
    monitors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads, captures and compiles: ten minutes, where each later step, pauses included, takes two seconds."""
    clock = 100.0
    monkeypatch.setattr("toolkit.run.monitor.time.monotonic", lambda: clock)
    monitor = monitors(4)
    for step, took_s in ((5, 600.0), (6, 1.0), (7, 3.0), (10, 6.0)):
        clock += took_s
        monitor.report(step, Scores(*torch.ones(3, 1).double()), 1.0, 1e-3)
    assert [row["eta_s"] for row in read_rows(tmp_path / "log.jsonl")] == [600 * 5, 4, 2 * 3, 0]


FIGURES = {"psnr": {"linear": 20.0, "tuned": 21.5}, "psnr_moving": {"linear": 15.0, "tuned": 18.0}}


def test_figures_are_kept_and_cut(monitors: Any, tmp_path: Path) -> None:
    """A row a look, a run a contender, a chart a figure; resumed before a look, it is as if that had not been."""
    monitor = monitors(0)
    monitor.report_figures(2, FIGURES)
    monitor.report_figures(4, {"psnr": {"tuned": math.inf}})
    assert read_rows(tmp_path / "validation.jsonl")[-1] == {"step": 4, "psnr": {"tuned": None}}
    monitor.close()
    assert {*FIGURES} < {*read_charts(read_board(tmp_path))}
    time.sleep(1.1)  # files of one second would be read in the order of ".10", ".9"
    again = monitors(3)
    again.report_figures(4, {"psnr": {"linear": 20.0, "tuned": 22.0}})
    again.close()
    assert read_rows(tmp_path / "validation.jsonl") == [
        {"step": 2, **FIGURES}, {"step": 4, "psnr": {"linear": 20.0, "tuned": 22.0}},
    ]  # fmt: skip
    board, blend = read_board(tmp_path), read_board(tmp_path, "linear")
    assert [(e.step, e.value) for e in board.Scalars("validation/psnr")] == [(2, 21.5), (4, 22.0)]
    assert [(e.step, e.value) for e in blend.Scalars("validation/psnr")] == [(2, 20.0), (4, 20.0)]
    assert [(e.step, e.value) for e in blend.Scalars("validation/psnr_moving")] == [(2, 15.0)]
    charts = read_charts(board)
    for tag, expression in zip(("loss_by_sigma", "validation_by_sigma"), charts["sigma 0.5 to 1.2e+02"], strict=True):
        assert re.match(expression, f"{tag}/2_0.5_to_1.2e+02")
    for figure, own in product(FIGURES, (board, blend)):
        assert [tag for tag in own.Tags()["scalars"] if re.match(charts[figure][0], tag)] == [f"validation/{figure}"]


def test_a_comparison_is_cut_back_too(monitors: Any, tmp_path: Path) -> None:
    """What an earlier start said of others beyond the step it goes on from is gone, though this one says nothing of them."""
    monitors(0).report_figures(4, FIGURES)
    time.sleep(1.1)
    monitors(3).close()
    blend = read_board(tmp_path, "linear")
    assert not any(blend.Scalars(tag) for tag in blend.Tags()["scalars"])


def test_pictures_are_shown(monitors: Any, tmp_path: Path) -> None:
    """A picture comes back pixel for pixel; a video as a GIF of its frames, which browsers play."""
    monitor, generator = monitors(0), np.random.default_rng(0)
    pixels = generator.integers(0, 256, (2, 5, 8, 3), dtype=np.uint8)
    for step, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "strip.png")
        monitor.show_strip(step, tmp_path / "strip.png")
    frames_TCHW = torch.zeros(4, 3, 6, 10, dtype=torch.uint8)
    frames_TCHW[[0, 1, 2, 3], 0] = torch.tensor([0, 80, 160, 240], dtype=torch.uint8)[:, None, None]
    monitor.show_video(2, "samples/first clip", frames_TCHW, fps=8)
    monitor.close()
    board = read_board(tmp_path)
    for event, wanted in zip(board.Images("samples/strip"), pixels, strict=True):
        assert (event.width, event.height) == (8, 5)
        assert np.array_equal(Image.open(io.BytesIO(event.encoded_image_string)), wanted)
    (video,) = board.Images("samples/first clip")
    assert from_bytes(video.encoded_image_string) == "image/gif" and (video.width, video.height) == (10, 6)
    gif = Image.open(io.BytesIO(video.encoded_image_string))
    assert gif.n_frames == 4 and gif.info["loop"] == 0 and gif.info["duration"] == pytest.approx(1000 / 8, abs=10)
    for number, red in enumerate((0, 80, 160, 240)):
        gif.seek(number)
        assert gif.convert("RGB").getpixel((3, 3)) == (red, 0, 0)


def test_other_ranks_write_nothing(monitors: Any, tmp_path: Path) -> None:
    monitor = monitors(0, OTHER)
    with monitor.timing("forward"), monitor.paused():
        assert [*monitor.timed(iter([1, 2]))] == [1, 2]
    monitor.report_figures(1, FIGURES)
    monitor.conclude(over=False)
    assert not [*tmp_path.iterdir()]
