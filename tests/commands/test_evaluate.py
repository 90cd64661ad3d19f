"""Runs are judged on equal terms, and what is found can be read. Run: pytest tests/commands/test_evaluate.py"""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from launch.evaluate import evaluate
from tests.authoring.test_report import Page
from tests.faults.test_checkpoints import fill, small_disk
from tests.launching import train_here
from tests.test_metrics import MeanColours, lpips_weights, save_video_network
from toolkit.authoring.pack import pack
from toolkit.authoring.synth import synth
from toolkit.commands import contenders as contenders_module
from toolkit.commands.contenders import Result, list_contenders, parse_sweep, read_sources
from toolkit.commands.evaluate import draw_extremes, evaluate_run, recommend
from toolkit.commands.report import frame_charts, to_text, write_page
from toolkit.config import dump_config, load_config
from toolkit.data.index import open_shards
from toolkit.errors import UserError
from toolkit.metrics import frechet_distance
from toolkit.run.folder import newest_adapter
from toolkit.run.framer import Sampling
from toolkit.run.inference import load_framer, read_source
from toolkit.run.judge import Windows, describe, load_held_out, load_windows, main_figure
from toolkit.run.strip import TILE_PX

SWEEP = "lora_scale=0,0.5,1"


@pytest.fixture(scope="module")
def settings(tiny_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Overrides of two steps of a clip layout in this process, at a rate that shows."""
    return tiny_run | {
        "engine.kind": "plain", "engine.precision": "fp32", "engine.micro_batch": 4, "schedule.steps": 2,
        "diffusion.layout": "framer_clip", "data.frames": 5, "optimizer.lr": 0.01, "checkpoint.every_steps": 1,
        "runs_dir": str(tmp_path_factory.mktemp("judged")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(settings: dict[str, Any]) -> Path:
    """That run's folder; what is written goes elsewhere."""
    return train_here(settings | {"name": "trained"})


@pytest.fixture(scope="module")
def judged(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[tuple]]:
    """The folder of its evaluation at two gaps with a sweep, what was returned, and the adapters of each network loaded."""
    folder, loaded = tmp_path_factory.mktemp("evaluation"), []
    with pytest.MonkeyPatch.context() as patch:

        def counted(source: Any, *rest: Any) -> Any:
            loaded.append(source.adapters)
            return load_framer(source, *rest)

        patch.setattr(contenders_module, "load_framer", counted)
        report = evaluate_run(str(trained), steps=1, gaps=[4, 8], sweep=SWEEP, out=str(folder))
    return folder, report, loaded


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before any weight is read."""
    monkeypatch.setattr("toolkit.run.inference.load_base", lambda *_, **__: 1 / 0)


def test_a_scale_of_zero_is_the_base_and_of_one_the_tuned(judged: tuple[Path, dict[str, Any], list[tuple]]) -> None:
    """To the bit, without being generated twice: three sets of weights are read for six contenders."""
    _, report, loaded = judged
    assert sorted(weight for adapters in loaded for _, weight in adapters) == [0.5, 1.0] and loaded.count(()) == 1
    for own in report["gaps"].values():
        clips, figures = own["per_clip"], own["figures"]
        assert clips["lora_scale 0"] == clips["base"] and clips["lora_scale 1"] == clips["tuned"]
        assert figures["lora_scale 0.5"] not in (figures["base"], figures["tuned"])
        assert list(figures) == ["linear", "base", "tuned", *report["sweep"]["labels"], "true"]


def test_scores_add_up(judged: tuple[Path, dict[str, Any], list[tuple]]) -> None:
    """A mean is that of the clips, a gain the mean difference clip by clip; the head is the first gap's middle frame."""
    _, report, _ = judged
    assert list(report["gaps"]) == ["4", "8"] and report["clips"] == 2
    for own in report["gaps"].values():
        assert own["frames_between"] == 3 and len(own["keys"]) == own["clips"] == 2
        for label, clips in own["per_clip"].items():
            for name, values in clips.items():
                assert own["figures"][label][name]["mean"] == pytest.approx(np.mean(values), abs=1e-3)
        for label, rows in own["by_frame"].items():
            for name, row in rows.items():
                assert np.mean([place["mean"] for place in row]) == pytest.approx(
                    own["figures"][label][name]["mean"], abs=1e-3
                )
                assert len(row) == 3 and row[1] == own["figures"][label][f"{name}_middle"] != row[0]
        for other in ("base", "linear"):
            gain = own["against"]["tuned"][other]["psnr_moving"]
            differences = np.subtract(*(own["per_clip"][label]["psnr_moving"] for label in ("tuned", other)))
            assert gain["mean"] == pytest.approx(differences.mean(), abs=1e-3) != 0
            assert gain["improved"] == (differences > 0).sum() and gain["low"] <= gain["mean"] <= gain["high"]
    for metric in ("psnr", "ssim"):
        for name in ("linear", "base", "tuned"):
            assert report[f"{metric}_{name}"] == report["gaps"]["4"]["figures"][name][f"{metric}_middle"]["mean"]


def test_what_is_written_is_whole(judged: tuple[Path, dict[str, Any], list[tuple]]) -> None:
    """evaluation.json is what was returned; the page is well formed and loads nothing; its pictures show the clips."""
    folder, report, _ = judged
    assert json.loads((folder / "evaluation.json").read_text()) == report
    with Image.open(report["strip"]) as strip:
        assert strip.size == (6 * (TILE_PX + 4), 20 + 2 * (TILE_PX + 4))
    page = Page((folder / "report.html").read_text())
    assert not page.of("script", "link", "iframe") and all(image["src"].startswith("data:") for image in page.of("img"))
    assert len(page.pictures) == 2
    for picture in page.pictures:
        with Image.open(io.BytesIO(picture)) as sheet:
            # a row for the clip that gains most, one for that which gains least
            assert sheet.size == (6 * (TILE_PX + 4), 20 + 2 * (TILE_PX + 4 + 16))
    # six figures, no LPIPS, over the gap and over the scale; three frame by frame, at two gaps; of the training two of
    # losses, time, and two of the adapter
    assert len(page.of("svg")) == 2 * 6 + 2 * 3 + 5
    # three frames of the blend, the base and the tuned network, at a place each
    places = re.findall(r'<circle cx="([\d.]+)"', frame_charts(report, "8")[0])
    assert len(places) == 3 * 3 and len({*places}) == 3
    text = page.text
    for word in (
        "linear blend",
        "untuned base",
        "true frames",
        "Recommended lora_scale",
        "0 lies in the 95 % interval",
    ):
        assert word in text
    table = to_text(report)
    assert "lora_scale 0.5 against" not in table + text  # it has its own table, and charts
    assert table.count("tuned against untuned base: moving PSNR") == table.count("recommended lora_scale: ") == 2


def test_what_each_value_of_a_sweep_gains_is_told(judged: tuple[Path, dict[str, Any], list[tuple]]) -> None:
    """On the terminal and on the page, at each gap, as in evaluation.json; by PSNR of the whole where nothing moves."""
    folder, report, _ = judged
    lines, page = to_text(report).splitlines(), Page((folder / "report.html").read_text()).text
    assert page.count("Gains by lora_scale") == 2
    heads = [i for i, line in enumerate(lines) if line.startswith("lora_scale  moving PSNR against untuned base")]
    for head, own in zip(heads, report["gaps"].values(), strict=True):
        for line, value in zip(lines[head + 1 : head + 4], (0, 0.5, 1), strict=True):
            gain = own["against"][f"lora_scale {value:g}"]["base"]["psnr_moving"]
            cells = (
                f"{value:g}",
                f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] dB",
                f"{gain['improved']} of 2 clips",
            )
            assert line.split() == " ".join(cells).split() and all(cell in page for cell in cells[1:])
    still = json.loads(json.dumps(report))
    for own in still["gaps"].values():
        own["figures"]["linear"]["psnr_moving"]["mean"] = None
        own["against"]["lora_scale 0.5"]["base"]["psnr"] |= {"mean": 9.5, "low": None, "high": None}
    text = to_text(still)
    assert "lora_scale  PSNR against untuned base" in text and re.search(r"\n0.5 +\+9.50 dB +\d of 2 clips\n", text)


@pytest.mark.parametrize(
    ("gains", "shown"),
    [
        ([2, 1, torch.nan], [0, 1]),
        ([-2, torch.nan, -1], [2, 0]),
        ([torch.nan, 3, torch.nan], [1]),
        ([torch.nan] * 3, [0]),
    ],
)
def test_a_still_clip_gains_neither_most_nor_least(gains: list[float], shown: list[int]) -> None:
    """Where nothing moves there is no gain; the pictures are of clips that have one, if any has. Each clip has its shade."""
    frames_BTHWC = torch.tensor([50, 100, 150], dtype=torch.uint8).view(3, 1, 1, 1, 1).expand(3, 3, 16, 16, 3)
    psnr_moving = {
        "linear": 20 + 0 * torch.tensor(gains),
        "base": torch.full((3,), 20.0),
        "tuned": 20 + torch.tensor(gains),
    }
    results = {
        label: Result({"psnr_moving": own_B, "psnr": torch.full((3,), 20.0)}, {}, frames_BTHWC[:, 1], None)
        for label, own_B in (psnr_moving | {"true": torch.ones(3)}).items()
    }
    windows = Windows(2, list("abc"), frames_BTHWC, torch.ones(3), torch.ones(3))
    figure = main_figure({"psnr_moving": describe(psnr_moving["linear"])})
    sheet = draw_extremes(results, windows, "tuned", figure)
    row_px = TILE_PX + 4 + 16
    assert sheet.height == 20 + len(shown) * row_px
    assert [sheet.getpixel((50, 60 + i * row_px)) for i in range(len(shown))] == [(50 + 50 * row,) * 3 for row in shown]


def test_the_command_prints_one_object(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --json stdout is what evaluation.json holds, and nothing else; --plot only draws."""
    out = str(tmp_path)
    evaluate(run=str(trained), steps=1, clips=1, out=out, json=True)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "evaluation.json").read_text())
    assert not (trained / "evaluation.json").exists()
    with pytest.raises(UserError, match="--plot draws what runs have logged; give --run"):
        evaluate(plot=True)
    for flags in ({"out": "elsewhere"}, {"gaps": (4, 8)}, {"json": True}, {"clips": 1}):
        with pytest.raises(UserError, match="--plot draws .*, and no other flag"):
            evaluate(run=str(trained), plot=True, **flags)
    monkeypatch.setenv("HOME", str(trained.parent))
    evaluate(run=f"~/{trained.name}", plot=True)
    assert capsys.readouterr().out == f"wrote {trained}/samples/curves.svg\n"


def test_a_page_of_the_folder_one_is_in_is_named(
    judged: tuple[Path, dict[str, Any], list[tuple]], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the folder's name, as from anywhere else."""
    _, report, _ = judged
    pictures = dict.fromkeys(report["gaps"], Image.new("RGB", (8, 8)))
    pages = []
    for here, place in ((tmp_path, Path(".")), (tmp_path.parent, tmp_path)):
        monkeypatch.chdir(here)
        write_page(place, [trained], report, pictures)
        pages.append((tmp_path / "report.html").read_text())
    monkeypatch.chdir(trained)
    write_page(tmp_path, [Path(".")], report, pictures)
    assert [*pages, (tmp_path / "report.html").read_text()] == [pages[1]] * 3


def test_runs_and_checkpoints_are_judged_on_the_same_clips(
    settings: dict[str, Any], trained: Path, tmp_path: Path
) -> None:
    """Each by its name, with one base for those that are fed alike and one for each that is not, and LPIPS where given."""
    scaled = train_here(settings | {"name": "scaled", "diffusion.scale_conditioning": True, "schedule.steps": 1})
    save_file(lpips_weights(), tmp_path / "alex.safetensors")
    first = trained / "checkpoints/step_000001"
    report = evaluate_run(
        [str(trained), str(scaled)], 1, 1, adapters=[str(first)], lpips=str(tmp_path / "alex.safetensors"), out=str(tmp_path)
    )  # fmt: skip
    (own,) = report["gaps"].values()
    assert list(own["figures"]) == ["linear", "base", "base of scaled", "trained", "scaled", "step_000001", "true"]
    assert {label: list(others) for label, others in own["against"].items()} == {
        "trained": ["linear", "base"], "scaled": ["linear", "base of scaled", "trained"],
        "step_000001": ["linear", "base", "trained"],
    }  # fmt: skip
    psnr = {label: clips["psnr"] for label, clips in own["per_clip"].items()}
    assert len({tuple(values) for values in psnr.values()}) == 6
    assert all(own["figures"][label]["lpips"]["mean"] > 0 for label in psnr)
    assert report["psnr_tuned"] == own["figures"]["trained"]["psnr_middle"]["mean"]


def test_fvd_is_of_whole_windows(settings: dict[str, Any], tmp_path: Path) -> None:
    """The Fréchet distance of what was made from the true windows, with their ends, by a network that is given."""
    long = train_here(settings | {"name": "long", "data.frames": 9, "data.stride": 1, "schedule.steps": 1})
    network = save_video_network(tmp_path / "i3d.pt", MeanColours())
    synth(tmp_path / "videos", clips=8, seconds=0.5, size=32, seed=9, kind="motion")
    others = str(tmp_path / "others")
    pack(tmp_path / "videos", others, holdout=0.5)
    report = evaluate_run(str(long), 3, 1, out=str(tmp_path), fvd=network, shards=others)
    (own,) = report["gaps"].values()
    values = {label: figures["fvd"]["mean"] for label, figures in own["figures"].items() if "fvd" in figures}
    assert list(values) == ["linear", "base", "tuned"] and len({*values.values()}) == 3
    windows = load_windows(load_config(long / "config.yaml", {"data.shards": others}), [8], 3)[8]
    true_BTC = torch.cat([windows.true(i) for i in range(len(windows))]).mean((3, 4))
    blend_BTC = torch.lerp(true_BTC[:, :1], true_BTC[:, -1:], torch.linspace(0, 1, 9).view(9, 1))
    expected = frechet_distance(blend_BTC.flatten(1), true_BTC.flatten(1))
    assert values["linear"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert "FVD" in to_text(report) and "FVD has no interval, and from so few clips" in to_text(report)
    assert "FVD has no interval, and from so few clips" in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match="--fvd compares sets of clips, and one is judged; give more --clips"):
        evaluate_run(str(long), 1, 1, out=str(tmp_path), fvd=network, shards=others)


def test_other_clips_are_judged_on_request(trained: Path, tmp_path: Path) -> None:
    """What a run forgot shows on held-out clips of another folder; its own evaluation is left alone."""
    synth(tmp_path / "videos", clips=4, seconds=0.5, size=32, seed=9, kind="motion")
    pack(tmp_path / "videos", tmp_path / "others", holdout=0.5)
    report = evaluate_run(str(trained), 1, 1, out=str(tmp_path / "out"), shards=str(tmp_path / "others"))
    (own,) = report["gaps"].values()
    elsewhere = load_config(trained / "config.yaml", {"data.shards": str(tmp_path / "others")})
    assert own["keys"] == [clip.key for clip in load_held_out(elsewhere, 1)]
    assert (tmp_path / "out/report.html").exists() and not (trained / "evaluation.json").exists()
    # it need not be where what it was trained on is
    away = Path(shutil.copytree(trained, tmp_path / "away"))
    recipe = (away / "config.yaml").read_text()
    (away / "config.yaml").write_text(recipe.replace(str(load_config(away / "config.yaml").data.shards), "/gone"))
    with pytest.raises(
        UserError, match="tuned was trained on /gone, which is not there; .*: --shards FOLDER --out FOLDER"
    ):
        evaluate_run(str(away), 1, 1)
    again = evaluate_run(str(away), 1, 1, out=str(tmp_path / "out"), shards=str(tmp_path / "others"))
    assert again["gaps"] == report["gaps"]


def test_clips_that_were_trained_on_are_told(
    trained: Path, tiny_shards: Path, tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many and one of them, where another packing holds out videos that the run trains on; if its shards are there."""
    pack(tiny_shards.parent / "videos", tmp_path / "again", holdout=0.5, gop=1)
    own = {row.clip.source for row in open_shards(tiny_shards, "train").rows}
    judged = [row.clip.source for row in open_shards(tmp_path / "again", "val").rows]
    seen = [name for name in judged if name in own]
    assert 0 < len(seen) < len(judged)
    away = Path(shutil.copytree(trained, tmp_path / "away"))
    recipe = (away / "config.yaml").read_text()
    (away / "config.yaml").write_text(recipe.replace(str(tiny_shards), "/gone"))
    shutil.copytree(tiny_shards, tmp_path / "same")
    told = f"warning: {len(seen)} of the {len(judged)} clips are, by name, of videos that were trained on, such as"
    for run, shards, expected in (
        (trained, "again", [f"{told} {seen[0]}"]), (away, "again", []), (trained, "same", []),
    ):  # fmt: skip
        capsys.readouterr()
        with pytest.raises(ZeroDivisionError):  # nothing but the weights is missing
            evaluate_run(str(run), len(judged), out=str(tmp_path / "out"), shards=str(tmp_path / shards))
        assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == expected


def test_a_place_that_cannot_be_written_is_told_first(trained: Path, tmp_path: Path, no_network: None) -> None:
    """And not once all is generated."""
    (tmp_path / "results.json").touch()
    with pytest.raises(UserError, match="cannot write to .*/results.json: .*; give another folder: --out FOLDER"):
        evaluate_run(str(trained), 1, 1, out=str(tmp_path / "results.json"))


def test_a_folder_of_somebody_else_is_told_first(
    trained: Path, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run, or its pictures, that may be read and not written; the answer is made up, since modes do not stop root."""
    for closed in (tmp_path / "run", tmp_path / "run/samples"):
        (tmp_path / "run/samples").mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr("os.access", lambda place, mode, closed=closed: Path(place) != closed)
        with pytest.raises(UserError, match=f"cannot write to {closed}; give another folder: --out FOLDER"):
            evaluate_run(str(trained), out=str(tmp_path / "run"))
    assert not list((tmp_path / "run/samples").iterdir())


def test_a_full_disk_is_told_first(trained: Path, tmp_path: Path, no_network: None) -> None:
    """What took an hour to generate would be lost there."""
    with small_disk(tmp_path / "disk") as disk:
        fill(disk, 1000)
        with pytest.raises(
            UserError, match=f"cannot write to {disk}: .*; free some space, or give another folder: --out"
        ):
            evaluate_run(str(trained), 1, 1, out=str(disk))


def test_values_of_a_sweep_are_those_of_their_labels() -> None:
    """Two that are written alike, in six digits, are one; else the figures of the one stood beside the other as well."""
    field, values = parse_sweep("lora_scale=0.70000004,0.7,1e-7,1,0.123456789")
    assert (field, values) == ("lora_scale", [1e-7, 0.123457, 0.7, 1.0])


def test_a_run_without_adapter_is_its_own_base(trained: Path) -> None:
    """Whole weights have no scale to sweep; the other fields can be."""
    source = replace(read_source(str(trained)), adapters=())
    with pytest.raises(UserError, match="lora_scale is for adapters, and this run trained whole weights"):
        list_contenders({"tuned": source}, Sampling(), SWEEP)
    contenders = list_contenders({"tuned": source}, Sampling(), "sampler_steps=2,4")
    tuned = ["tuned", "sampler_steps 2", "sampler_steps 4"]
    assert list(contenders) == [*tuned, "base", "base, sampler_steps 2", "base, sampler_steps 4"]
    assert [own.sampling.steps for own in contenders.values()] == [25, 2, 4, 25, 2, 4]
    assert [contenders[label].base for label in tuned] == ["base", "base, sampler_steps 2", "base, sampler_steps 4"]


def test_what_the_sampler_does_is_not_put_down_to_tuning(trained: Path, tmp_path: Path) -> None:
    """Each number of steps is compared with the base in as many: what is told is what --steps tells."""
    report = evaluate_run(str(trained), 1, 1, sweep="sampler_steps=1,3", out=str(tmp_path / "sweep"))
    alone = evaluate_run(str(trained), 1, 3, out=str(tmp_path / "alone"))
    (own,), (by_hand,) = report["gaps"].values(), alone["gaps"].values()
    gain = own["against"]["sampler_steps 3"]["base, sampler_steps 3"]
    assert gain == by_hand["against"]["tuned"]["base"] != own["against"]["sampler_steps 1"]["base"]
    told = [line.split() for line in to_text(report).splitlines() if line.startswith("3 ")]
    assert [line[1] for line in told] == [f"{gain['psnr_moving']['mean']:+.2f}"]


def test_recipes_that_sample_otherwise_are_named(
    trained: Path, tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are sampled as the first is, which the order of the runs decides."""
    other = change_recipe(trained, tmp_path, {"validation.sampler_steps": 3, "validation.max_guidance": 2.0})
    with pytest.raises(ZeroDivisionError):
        evaluate_run([str(trained), str(other)])
    steps = load_config(trained / "config.yaml").validation.sampler_steps
    said = (
        f"note: all are sampled by steps {steps}, max_guidance 1.0; other's own recipe has steps 3, max_guidance 2.0\n"
    )
    assert said in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        evaluate_run(str(other), steps=2)
    assert "note" not in capsys.readouterr().err


def test_how_it_computes_makes_no_other_base(trained: Path, tmp_path: Path) -> None:
    """Nor does what training scores: one untuned network stands for both runs."""
    other = change_recipe(trained, tmp_path, {"model.memory": "small", "diffusion.layout": "middle_in_clip"})
    contenders = list_contenders(read_sources([str(trained), str(other)], (), None), Sampling(), None)
    assert list(contenders) == ["trained", "other", "base"]
    other = change_recipe(trained, tmp_path, {"diffusion.clip_tokens": "first"})
    contenders = list_contenders(read_sources([str(trained), str(other)], (), None), Sampling(), None)
    assert list(contenders) == ["trained", "other", "base", "base of other"]


def change_recipe(run: Path, tmp_path: Path, changes: dict[str, Any]) -> Path:
    """A copy of a run whose recipe says something else."""
    other = Path(shutil.copytree(run, tmp_path / "other", dirs_exist_ok=True))
    (other / "config.yaml").write_text(dump_config(load_config(run / "config.yaml", changes)))
    return other


def test_a_checkpoint_that_was_chosen_by_these_clips_is_said_to_be(
    trained: Path, no_network: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best one, not the newest."""
    monkeypatch.setattr("toolkit.run.inference.best_checkpoint", newest_adapter)
    for checkpoint in ("latest", "best"):
        with pytest.raises(ZeroDivisionError):
            evaluate_run(str(trained), checkpoint=checkpoint)
        assert ("chose the best checkpoint" in capsys.readouterr().err) == (checkpoint == "best")


def test_a_checkpoint_of_a_run_can_be_named(trained: Path, tmp_path: Path, no_network: None) -> None:
    """As export.py has it; where there is no such one, it is told before anything is read."""
    (first,) = read_sources([str(trained)], (), None, "step_000001").values()
    (named,) = read_sources((), [str(trained / "checkpoints/step_000001")], None).values()
    assert first.adapters == named.adapters
    assert read_sources([str(trained)], (), None, "latest") == read_sources([str(trained)], (), None)
    for name, message in {
        "step_000007": "has no checkpoint step_000007; it has step_000001, step_000002", "best": "best",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            evaluate_run(str(trained), checkpoint=name)
    with pytest.raises(UserError, match="is not a run folder"):
        evaluate_run(str(tmp_path), checkpoint="best")
    with pytest.raises(UserError, match="--checkpoint is of a run; give --run as well"):
        evaluate_run(adapters=[str(trained)], checkpoint="best", out=str(tmp_path))


def test_what_was_judged_is_told(judged: tuple[Path, dict[str, Any], list[tuple]], trained: Path) -> None:
    """On the terminal, on the page and in evaluation.json: which checkpoint, on which clips, and there by which recipe."""
    folder, report, _ = judged
    config = load_config(trained / "config.yaml")
    place, shards = str(trained / "checkpoints/step_000002"), str(config.data.shards)
    assert report["judged"] == {"tuned": place} and report["shards"] == [shards]
    assert report["recipe"] == config.model_dump(mode="json")
    page = Page((folder / "report.html").read_text()).text
    for told in (to_text(report), page):
        assert f"tuned: {place}" in told and f"clips of {shards}" in told
    assert report["videos"] == report["clips"] > 1 and "of one video are alike" not in to_text(report)
    for videos, said in ((1, "1 video;"), (2, "2 videos;")):
        told = to_text(report | {"clips": 3, "videos": videos})
        assert f"clips of {shards}: 3 of {said} clips of one video are alike" in told
    none = report | {"sweep": report["sweep"] | {"recommended": dict.fromkeys(report["gaps"], 0.0)}}
    assert "recommended lora_scale: 0, the untuned base: no scale is better" in to_text(none)


def test_what_is_drawn_is_the_same_for_all(trained: Path, settings: dict[str, Any]) -> None:
    """A second run of another seed is judged with the first one's noise."""
    other = train_here(settings | {"name": "other_seed", "seed": 5, "schedule.steps": 1})
    sources = read_sources([str(trained), str(other)], (), None)
    assert {own.config.seed for own in sources.values()} == {load_config(trained / "config.yaml").seed}


def test_names_are_never_confused(trained: Path, tmp_path: Path) -> None:
    """Runs go by their names, and by their whole paths where these are the same or already mean another contender."""
    for name, second in (("base", "base"), ("trained", "deep/trained"), ("other", "other")):
        run = Path(shutil.copytree(trained, tmp_path / second))
        named = list(read_sources([str(trained), str(run)], (), None))
        assert named == (["trained", "other"] if name == "other" else [str(trained), str(run)])


def test_a_scale_that_breaks_the_network_is_named(trained: Path, tmp_path: Path) -> None:
    """Of several contenders, the one to be left out."""
    with pytest.raises(
        UserError, match=r"^lora_scale 1e\+30 at a gap of 4: the network's answer is not a finite number"
    ):
        evaluate_run(str(trained), clips=1, steps=1, sweep="lora_scale=1,1e30", out=str(tmp_path))


def test_the_recommended_value_is_the_smallest_within_the_noise() -> None:
    """Not the best itself where a smaller one is as good on these clips; one that is worse on each clip alike is not."""
    best = torch.tensor([20.0, 24.0, 22.0, 28.0])
    noise = torch.tensor([0.3, -0.2, 0.25, -0.3])
    values = {0.0: best - 2 + noise, 0.5: best - 0.5, 0.7: best - 0.02 + noise, 1.0: best}
    assert recommend(values) == 0.7
    assert recommend({value: values[value] for value in (0.5, 1.0)}) == 1.0
    assert recommend(dict.fromkeys((0.0, 0.5, 1.0), best)) == 0.0
    # of one clip no noise is known: the best
    assert recommend({0.0: best[:1] - 0.01, 1.0: best[:1]}) == 1.0
    assert recommend({0.0: best[:1] * torch.nan, 1.0: best[:1]}) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": ()}, "nothing to evaluate; give --run"),
        ({"sweep": "lora_scal=0,1"}, r"--sweep lora_scal: did you mean lora_scale\? What can be swept is lora_"),
        ({"sweep": "guidance=2"}, r"--sweep guidance: did you mean max_guidance\?"),
        ({"sweep": "lora_scale=low,high"}, "--sweep lora_scale=low,high: give numbers with commas between"),
        ({"sweep": "lora_scale"}, "give numbers with commas between"),
        ({"sweep": "lora_scale=1,-0.5"}, "--sweep lora_scale=-0.5: it must be 0, the untuned base, or more"),
        ({"sweep": "sampler_steps=2.5"}, "steps are whole numbers"),
        ({"sweep": "sampler_steps=0"}, "0 sampler steps"),
        ({"sweep": "max_guidance=0.5"}, "between min_guidance 1 and 30"),
        ({"gaps": [4, 6]}, "gap of 6 source frames .* take a multiple of 4, such as"),
        ({"gaps": [4, 400]}, "no held-out clip of .* reaches over a gap of 400 source frames: the longest has"),
        ({"shards": "elsewhere"}, "--shards judges on other clips than the run's own; give --out FOLDER"),
        ({"lpips": "nowhere.safetensors"}, "cannot read LPIPS weights from nowhere.safetensors: .*; make it"),
        ({"fvd": "nowhere.pt"}, "--fvd needs windows of 9 frames or more, and the run's have 5; leave it out"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(trained: Path, no_network: None, options: dict[str, Any], message: str) -> None:
    """In one sentence, before the weights are read; nothing is written."""
    with pytest.raises(UserError, match=message):
        evaluate_run(**{"run": str(trained), **options})
    assert not (trained / "evaluation.json").exists()


def test_adapters_alone_need_a_place(trained: Path, no_network: None) -> None:
    """And none is judged twice; a sweep is of one."""
    first = str(trained / "checkpoints/step_000001")
    with pytest.raises(UserError, match="adapters alone have no folder .*; give --out FOLDER"):
        evaluate_run(adapters=[first])
    for again in (first, f"{first}/"):
        with pytest.raises(UserError, match=f"{first} is given twice"):
            evaluate_run(str(trained), adapters=[first, again])
    with pytest.raises(UserError, match="--sweep is for one run or adapter"):
        evaluate_run(str(trained), adapters=[first], sweep=SWEEP)


def test_runs_of_other_splits_are_refused(
    settings: dict[str, Any], trained: Path, tiny_shards: Path, tmp_path: Path, no_network: None
) -> None:
    """Other frames, sizes, layout or held-out clips: named with both values. The same clips elsewhere are the same."""
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    text = (other / "config.yaml").read_text()
    synth(tmp_path / "videos", clips=4, seconds=0.5, size=32, seed=9)
    pack(tmp_path / "videos", tmp_path / "shards")
    shutil.copytree(tiny_shards, tmp_path / "moved")
    changes = {
        "frames: 5>frames: 7": r"data\.frames is 5 and 7",
        "width: 32>width: 40": r"data\.width is 32 and 40",
        "layout: framer_clip>layout: spec_middle": r"diffusion\.layout is framer_clip and spec_middle",
        f"shards: {tiny_shards}>shards: {tmp_path}/shards": f"the held-out clips of {tiny_shards} and {tmp_path}/sh",
    }
    for change, message in changes.items():
        old, new = change.split(">")
        assert old in text
        (other / "config.yaml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=rf"trained and other cannot be judged together: .*{message}"):
            evaluate_run([str(trained), str(other)])
    (other / "config.yaml").write_text(text.replace(f"shards: {tiny_shards}", f"shards: {tmp_path}/moved"))
    with pytest.raises(ZeroDivisionError):  # nothing but the weights is missing
        evaluate_run([str(trained), str(other)])


def test_nothing_held_out_is_told(trained: Path, tiny_shards: Path, tmp_path: Path, no_network: None) -> None:
    """Shards without a validation split."""
    shards, run = (
        Path(shutil.copytree(tiny_shards, tmp_path / "shards")),
        Path(shutil.copytree(trained, tmp_path / "run")),
    )
    for path in shards.glob("val-*"):
        path.unlink()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_shards), str(shards)))
    with pytest.raises(UserError, match="holds no val shards among its .*; pack with a --holdout above 0"):
        evaluate_run(str(run))
