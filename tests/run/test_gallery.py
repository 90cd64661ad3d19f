"""Generated frames are judged while a run goes on, as evaluate does at its end. Run: pytest tests/run/test_gallery.py"""

import json
import re
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save_file

from tests.launching import RECIPE, adapter_bytes, launch, read_numbers, train_here
from tests.run.test_monitor import read_board, read_charts
from tests.test_metrics import lpips_weights
from toolkit.commands.evaluate import evaluate_run
from toolkit.config import load_config
from toolkit.engine.world import World
from toolkit.errors import UserError
from toolkit.run.cache import cache_shards
from toolkit.run.checkpoint import best_checkpoint, list_checkpoints
from toolkit.run.framer import NotFinite
from toolkit.run.gallery import Gallery
from toolkit.run.judge import make_window, own_gaps
from toolkit.run.manifest import write_manifest
from toolkit.run.rows import read_rows

LOOKS = {"validation.figures_every_steps": 2, "validation.clips": 2, "validation.sampler_steps": 2}


@pytest.fixture(scope="module")
def plain(tiny_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Overrides of three steps in this process, of clips of five frames."""
    return tiny_run | {
        "engine.kind": "plain", "engine.precision": "fp32", "engine.global_batch": 2, "schedule.steps": 3,
        "data.frames": 5, "diffusion.layout": "middle_in_clip", "model.memory": "fast", "checkpoint.every_steps": 1,
        "lora.alpha": 32, "optimizer.lr": 0.1, "runs_dir": str(tmp_path_factory.mktemp("gallery")), "name": "shown",
    }  # fmt: skip


@pytest.fixture(scope="module")
def shown(plain: dict[str, Any]) -> Path:
    """The folder of that run, judged before it, after two steps and at the end; read only."""
    return train_here(plain | LOOKS)


def test_training_is_the_same_without_it(plain: dict[str, Any], shown: Path) -> None:
    """Losses, norms and the adapter are those of a run that never generated anything, to the bit."""
    run = train_here(plain | {"name": "alone"})
    assert read_numbers(run) == read_numbers(shown)
    assert adapter_bytes(run, 3) == adapter_bytes(shown, 3)


def test_figures_are_those_of_evaluate(shown: Path, tmp_path: Path) -> None:
    """At the end each figure of blending, start and tuned is what evaluate finds for linear, base and tuned."""
    rows = read_rows(shown / "validation.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 3]
    copy = Path(shutil.copytree(shown, tmp_path / "shown"))
    (judged,) = evaluate_run(str(copy))["gaps"].values()
    for ours, theirs in (("linear", "linear"), ("start", "base"), ("tuned", "tuned")):
        for name, values in judged["figures"][theirs].items():
            assert rows[-1][name][ours] == pytest.approx(values["mean"], rel=1e-3, abs=1e-3), (ours, name)
    assert all(row["psnr"].keys() == {"linear", "start", "tuned"} for row in rows)
    untuned = judged["figures"]["base"]["psnr"]["mean"]
    assert rows[0]["psnr"]["tuned"] == pytest.approx(untuned, rel=1e-3), "before the first step nothing is tuned"
    assert rows[-1]["psnr"]["start"] == rows[0]["psnr"]["start"]
    assert abs(rows[-1]["psnr"]["tuned"] - rows[-1]["psnr"]["start"]) > 0.01, "nothing was tuned, so nothing is shown"
    for name in ("lighting_luma", "lighting_colour"):  # which a blend follows by definition: the true frames tell
        assert rows[-1][name]["true"] == pytest.approx(judged["figures"]["true"][name]["mean"], abs=1e-3) != 0


def test_what_no_weight_changes_is_scored_by_the_rank_that_reports_it(plain: dict[str, Any]) -> None:
    """The blend and the true frames, by the main rank alone: the others would score them for nobody."""
    config = load_config(RECIPE, plain | LOOKS)
    main, other = (Gallery(config, None, World(rank, 2, torch.device("cpu"))) for rank in (0, 1))
    assert main.baselines["psnr"]["linear"] > 0 and main.baselines["lighting_luma"]["true"] > 0
    assert not other.baselines


def test_several_gaps_and_lpips(plain: dict[str, Any], tmp_path: Path) -> None:
    """Each gap's figures are those of evaluate, LPIPS as well; the first gap's go by their own names."""
    save_file(lpips_weights(), tmp_path / "alex.safetensors")
    lpips = str(tmp_path / "alex.safetensors")
    changes = {"data.frames": 3, "validation.gaps": "[4,2,6]", "validation.lpips": lpips, "schedule.steps": 1}
    run = train_here(plain | LOOKS | changes | {"name": "gaps"})
    _, row = read_rows(run / "validation.jsonl")
    judged = evaluate_run(str(run), lpips=lpips)["gaps"]
    assert [*judged] == ["4", "2", "6"]
    wanted = {
        name + ("" if gap == "4" else f"_gap_{gap}"): own["figures"]["tuned"][name]["mean"]
        for gap, own in judged.items()
        for name in own["figures"]["tuned"]
    }
    assert {name: row[name]["tuned"] for name in row.keys() - {"step"}} == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    assert row["lpips_gap_6"]["tuned"] > 0 and row["psnr"]["linear"] != row["psnr_gap_2"]["linear"]
    charts = read_charts(read_board(run))
    assert {"psnr_moving", "psnr_moving_gap_2"} < {*charts}
    for beside in ("", "linear", "start"):
        tags = read_board(run, beside).Tags()["scalars"]
        assert [tag for tag in tags if re.match(charts["psnr_moving"][0], tag)] == ["validation/psnr_moving"]
    assert "validation/lighting_luma" in read_board(run, "true").Tags()["scalars"]


def test_best_may_be_a_figure(plain: dict[str, Any], shown: Path, tmp_path: Path) -> None:
    """The step whose figure is highest is the best and is kept, whatever the loss says; no better one ends the run."""
    overrides = plain | LOOKS | {"runs_dir": str(tmp_path), "checkpoint.keep": 2, "schedule.steps": 8}
    looks = {"validation.best_by": "psnr", "validation.figures_every_steps": 1, "validation.patience": 3}
    run = train_here(overrides | looks)
    psnr = {row["step"]: row["psnr"]["tuned"] for row in read_rows(run / "validation.jsonl") if row["step"]}
    best = max(psnr, key=psnr.__getitem__)
    assert json.loads((run / "BEST").read_text()) == {"step": best, "by": "psnr", "score": psnr[best], "clips": 2}
    assert max(psnr) == min(best + 3, 8) and best_checkpoint(run).name == f"step_{best:06d}"


@pytest.mark.parametrize("windows", [(0, 1), (1,)])
def test_a_number_that_is_none_ends_no_run(
    plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch, windows: tuple[int, ...]
) -> None:
    """Where a window comes out without a finite number there are no figures, and no best by the windows that are left.

    The run goes on, and what it learned is saved.
    """

    def breaks(framer: Any, own: Any, i: int, *rest: Any) -> Any:
        if i in windows:
            raise NotFinite("the network's answer is not a finite number")
        return make_window(framer, own, i, *rest)

    monkeypatch.setattr("toolkit.run.gallery.make_window", breaks)
    run = train_here(plain | LOOKS | {"name": f"broken_{len(windows)}", "schedule.steps": 2})
    rows = read_rows(run / "validation.jsonl")
    assert [row["psnr"]["tuned"] for row in rows] == [None, None] and rows[0]["psnr"]["linear"] > 0
    assert (run / "checkpoints/step_000002").is_dir()


def test_what_a_look_would_refuse_is_refused_at_the_start(
    plain: dict[str, Any], tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights are read, and before --fresh sets the old run aside: no held-out clips, a sampler that cannot be."""
    run = train_here(plain | {"name": "old", "schedule.steps": 1})
    monkeypatch.setattr("toolkit.run.job.load_base", lambda *_, **__: 1 / 0)
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    for path in shards.glob("val-*"):
        path.unlink()
    for changes, words in (
        ({"data.shards": str(shards)}, "val"),
        ({"validation.gaps": "[400]"}, "reaches over a gap of 400"),
        ({"validation.lpips": "nowhere.safetensors"}, "cannot read LPIPS weights from nowhere.safetensors"),
        ({"validation.sampler": "lcm", "validation.sampler_steps": 50}, "sampler_steps|steps"),
    ):
        with pytest.raises(UserError, match=words):
            train_here(plain | LOOKS | {"name": "old"} | changes, fresh=True)
    assert not run.with_name("old.1").exists() and (run / "checkpoints/step_000001").is_dir()


def test_pictures_are_kept_and_on_the_board(shown: Path) -> None:
    """At each look a strip of first, linear, start, tuned, true and last, and the frames of one window moving."""
    strips = sorted((shown / "samples").glob("step_*.png"))
    assert [strip.name for strip in strips] == ["step_000002.png", "step_000003.png"]
    with Image.open(strips[0]) as strip:
        assert strip.width // strip.height == 6 * 196 // (20 + 2 * 196)
    board = read_board(shown)
    assert [image.step for image in board.Images("samples/strip")] == [2, 3]
    moving = board.Images("samples/linear_start_tuned_true")
    assert [image.step for image in moving] == [2, 3] and moving[0].encoded_image_string.startswith(b"GIF")


def test_one_middle_frame_moves_as_long_as_all(plain: dict[str, Any], shown: Path) -> None:
    """The moving picture of a layout that shows three of a window's five frames lasts as long, so its frames stay longer."""

    def read_durations_ms(run: Path) -> list[int]:
        with Image.open(
            BytesIO(read_board(run).Images("samples/linear_start_tuned_true")[0].encoded_image_string)
        ) as gif:
            return [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]

    few = train_here(plain | LOOKS | {"name": "few", "diffusion.layout": "spec_middle", "schedule.steps": 1})
    three_ms, five_ms = read_durations_ms(few), read_durations_ms(shown)
    assert (len(three_ms), len(five_ms)) == (3, 5)
    assert 2 * three_ms[0] == pytest.approx(4 * five_ms[0], abs=40)  # from the first to the last; a GIF counts in 10 ms


def test_a_resumed_run_shows_the_same(plain: dict[str, Any], shown: Path, tmp_path: Path) -> None:
    """Thrown back to the first step and resumed: the same figures, still beside the start's, and the same pictures."""
    run = Path(shutil.copytree(shown, tmp_path / "shown"))
    for step in (2, 3):
        shutil.rmtree(run / f"checkpoints/step_{step:06d}")
        (run / f"samples/step_{step:06d}.png").unlink()
    train_here(plain | LOOKS | {"runs_dir": str(tmp_path)})
    assert read_rows(run / "validation.jsonl") == read_rows(shown / "validation.jsonl")
    for name in ("step_000002.png", "step_000003.png"):
        assert (run / "samples" / name).read_bytes() == (shown / "samples" / name).read_bytes()


def test_a_start_of_other_windows_is_not_shown(plain: dict[str, Any], shown: Path, tmp_path: Path) -> None:
    """Resumed with another sampler or gap: neither figures nor pictures stand beside a start that was looked at otherwise.

    An older toolkit did not say how it looked: then the start stays.
    """
    (own,) = own_gaps(load_config(RECIPE, plain))
    older = shown / "samples/start.safetensors"
    for number, (changes, stays) in enumerate((
        ({"validation.sampler_steps": 3}, False),
        ({"validation.gaps": f"[{2 * own}]"}, False),
        ({"validation.gaps": f"[{own}]", "validation.lpips": None}, True),
        ({}, True),
    )):  # fmt: skip
        run = Path(shutil.copytree(shown, tmp_path / str(number) / "shown"))
        if not changes:
            save_file(load_file(older), run / "samples/start.safetensors")
        shutil.rmtree(run / "checkpoints/step_000003")
        train_here(plain | LOOKS | changes | {"runs_dir": str(run.parent)})
        beside = {"linear", "start", "tuned"} if stays else {"linear", "tuned"}
        assert [{*row["psnr"]} for row in read_rows(run / "validation.jsonl")][2:] == [beside], changes
        tag = "samples/linear_start_tuned_true" if stays else "samples/linear_tuned_true"
        assert [image.step for image in read_board(run).Images(tag)][-1] == 3
        with Image.open(run / "samples/step_000003.png") as strip:
            assert strip.width // strip.height == (6 if stays else 5) * 196 // (20 + 2 * 196)


def test_the_best_is_chosen_anew_at_another_gap(plain: dict[str, Any], tmp_path: Path) -> None:
    """A figure at a wider gap is lower: its looks are compared with one another, and not with those before the resume.

    Nor do looks that were missed before count against those after.
    """
    overrides = plain | LOOKS | {"runs_dir": str(tmp_path), "validation.best_by": "psnr", "optimizer.lr": 1e-4}
    overrides |= {"validation.figures_every_steps": 1, "validation.gaps": "[4]"}
    run = train_here(overrides)
    for step in (2, 3):
        shutil.rmtree(run / f"checkpoints/step_{step:06d}")
    (begun,) = list_checkpoints(run)
    state = json.loads((begun / "state.json").read_text())
    (begun / "state.json").write_text(json.dumps(state | {"validation_misses": 1}))
    (begun / "manifest.json").unlink()
    write_manifest(begun, run.name, 1)
    train_here(overrides | {"validation.gaps": "[12]", "validation.patience": 1})
    psnr = {row["step"]: row["psnr"]["tuned"] for row in read_rows(run / "validation.jsonl")}
    assert psnr[1] > psnr[2], "a wider gap that is no harder shows nothing"
    assert max(psnr) == 3, "a first look cannot be one too many"
    best = max((step for step in psnr if step > 1), key=psnr.__getitem__)
    assert best_checkpoint(run).name == f"step_{best:06d}"
    assert json.loads((run / "BEST").read_text())["score"] == psnr[best]


def test_cached_clips_show_the_same(
    plain: dict[str, Any], shown: Path, tiny_shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """With cached clips, whose training needs no VAE, one is loaded to look; the start's figures are the same."""
    cache_shards(str(tiny_shards), str(tiny_base), str(tmp_path / "cached"), precision="fp32", height=32, width=32)
    run = train_here(plain | LOOKS | {"name": "cached", "data.shards": str(tmp_path / "cached"), "schedule.steps": 1})
    assert read_rows(run / "validation.jsonl")[0] == read_rows(shown / "validation.jsonl")[0]


@pytest.mark.launch
def test_ranks_share_the_windows_out(plain: dict[str, Any], tiny_shards: Path, tmp_path: Path) -> None:
    """Two ranks find for three clips at three gaps the figures of one rank, though one has a window less to fill."""
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    for path in tiny_shards.glob("train-000000.*"):
        shutil.copy(path, shards / path.name.replace("train-000000", "val-000001"))
    changes = plain | LOOKS | {"validation.clips": 3, "schedule.steps": 1, "data.shards": str(shards)}
    changes |= {"data.frames": 3, "validation.gaps": "[4,6,2]"}  # nine windows
    one = train_here(changes | {"name": "one"})
    done = launch("torchrun", 2, changes | {"name": "two", "engine.kind": "zero2"})
    assert done.returncode == 0, done.stderr
    for found, wanted in zip(
        *(read_rows(run / "validation.jsonl") for run in (one.with_name("two"), one)), strict=True
    ):
        for name in wanted.keys() - {"step"}:
            assert found[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-3)
