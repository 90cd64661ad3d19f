"""Averages are those of every update's weights, and of any length. Run: pytest tests/run/test_ema.py"""

import functools
import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from launch.interpolate import interpolate
from tests.faults.forked import BACKWARD, Warm, newest, same_run, strike
from tests.launching import read_numbers, train_here
from tests.model.adapters import make_trained
from toolkit.commands.evaluate import evaluate_run
from toolkit.commands.export import export_run
from toolkit.config import load_config
from toolkit.errors import UserError
from toolkit.model.base import load_base
from toolkit.model.flat import NAME, FlatAdapter
from toolkit.model.formats import read_adapter
from toolkit.model.lora import compute_dtypes
from toolkit.run.checkpoint import checkpoint_folder, list_checkpoints, load_checkpoint
from toolkit.run.ema import (
    LARGEST_ERROR,
    TRACKS,
    Averages,
    find_power,
    fit_profile,
    plan_average,
    put_together,
    snapshot_file,
    write_snapshot,
)
from toolkit.run.inference import load_framer, read_source

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
ROUNDING = 2.0**-24  # of a number in fp32


@functools.cache
def power_of(sigma_rel: float) -> float:
    """The power whose profile on [0, 1] has this standard deviation, by halving and by summing over a fine grid."""
    tau = (np.arange(200_000) + 0.5) / 200_000
    low, high = 0.0, 1 / sigma_rel
    for _ in range(50):
        power = (low + high) / 2
        profile = tau**power / (tau**power).sum()
        wide = np.sqrt(profile @ tau**2 - (profile @ tau) ** 2) > sigma_rel
        low, high = (power, high) if wide else (low, power)
    return low


def profile_over(edges: np.ndarray, end: float, sigma_rel: float) -> np.ndarray:
    """What the profile of a length over [0, end] weighs between each two of the edges."""
    return np.diff(np.minimum(edges / end, 1) ** (power_of(sigma_rel) + 1))


def average(weights_SN: np.ndarray, sigma_rel: float) -> np.ndarray:
    """The average itself, of what each update left: update s lasts from s - 1 to s."""
    updates = len(weights_SN)
    return profile_over(np.arange(updates + 1), updates, sigma_rel) @ weights_SN


def bound(weights_SN: np.ndarray, sigma_rel: float, error: float) -> float:
    """How far an average of a profile so far from the wanted one can be off.

    By the inequality of Cauchy and Schwarz for the sum of (difference of profiles) * (weights - c): c falls out because both
    profiles sum to one, and the norm of power p is (p + 1) / sqrt((2 p + 1) t).
    """
    power, spread_N = power_of(sigma_rel), (weights_SN - weights_SN.mean(0)).std(0)
    return float(error * (power + 1) / np.sqrt(2 * power + 1) * spread_N.max())


def rounding(weights_SN: np.ndarray, sigma_rel: float) -> float:
    """What fp32 adds to a track: each update rounds three times, and what was before counts (s / t)^(p + 1) at the end."""
    updates = len(weights_SN)
    return 3 * ROUNDING * np.abs(weights_SN).max() * (updates / (power_of(sigma_rel) + 2) + 1)


def walk(updates: int, keep_every: int, run: Path) -> np.ndarray:
    """Let an adapter wander, and keep snapshots as a run does; every third step is skipped. Returns (updates, n) fp64."""
    unet, parameters = make_trained()
    adapter = FlatAdapter(unet, parameters, compute_dtypes(unet, parameters, torch.float32))
    averages, generator = Averages(adapter), torch.Generator().manual_seed(0)
    rows = []
    for update in range(1, updates + 1):
        adapter.flat.data += 0.1 * torch.randn(adapter.flat.shape, generator=generator) / update**0.5 + 0.02
        rows.append(adapter.flat.detach().double().numpy())
        for _ in range(2 if update % 3 == 0 else 1):
            averages.follow(update)
        if update % keep_every == 0:
            file = snapshot_file(checkpoint_folder(run, update))
            file.parent.mkdir(exist_ok=True)
            write_snapshot(file, adapter.split({NAME: averages.copy()}), update)
    return np.stack(rows)


def flatten(values: dict[str, Tensor], order: Sequence[str]) -> np.ndarray:
    return torch.cat([values[name].flatten() for name in order]).double().numpy()


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Path, list[str]]:
    """What 150 updates left, the last one's place in a run of a snapshot every 15, and the order of the parameters."""
    run = tmp_path_factory.mktemp("walk")
    unet, parameters = make_trained()
    names = list(FlatAdapter(unet, parameters, compute_dtypes(unet, parameters, torch.float32)).shapes)
    return walk(150, 15, run), checkpoint_folder(run, 150), names


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 12**-0.5])
def test_power_has_the_length(sigma_rel: float) -> None:
    """In closed form as by the standard deviation itself; the longest weighs all updates alike."""
    assert find_power(sigma_rel) == pytest.approx(power_of(sigma_rel), abs=2e-3)


def test_tracks_are_averages_of_every_update(walked: tuple[np.ndarray, Path, list[str]]) -> None:
    """At each snapshot, to the rounding of fp32; a step that was skipped counts for nothing."""
    weights_SN, last, names = walked
    for file in sorted((last.parents[1] / "ema").iterdir()):
        so_far = weights_SN[: int(file.stem.removeprefix("step_"))]
        tensors = load_file(file)
        for track, sigma_rel in TRACKS.items():
            found = flatten({name: tensors[f"{name}/{track}"] for name in names}, names)
            tolerance = rounding(so_far, sigma_rel)
            assert np.abs(found - average(so_far, sigma_rel)).max() < tolerance
            assert np.abs(so_far[-1] - average(so_far, sigma_rel)).max() > 1000 * tolerance


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.07, 0.1, 0.15, 0.2])
def test_another_length_is_put_together(walked: tuple[np.ndarray, Path, list[str]], sigma_rel: float) -> None:
    """As near to the average itself as the distance of the profiles allows, and nearer than either track."""
    weights_SN, last, names = walked
    found = flatten(put_together(last, sigma_rel), names)
    direct = average(weights_SN, sigma_rel)
    weights_NK, error = fit_profile(range(15, 151, 15), sigma_rel)
    noise = rounding(weights_SN, 0.05) * weights_NK.abs().sum().item()
    off = np.abs(found - direct).max()
    assert error <= LARGEST_ERROR and off < bound(weights_SN, sigma_rel, error) + noise
    if sigma_rel in TRACKS.values():
        assert off < noise
    else:
        assert off < min(np.abs(average(weights_SN, own) - direct).max() for own in TRACKS.values()) / 3


def test_an_earlier_checkpoint_takes_what_was_kept_until_then(walked: tuple[np.ndarray, Path, list[str]]) -> None:
    """The average at update 90 knows nothing of later ones."""
    weights_SN, last, names = walked
    found = flatten(put_together(last.with_name("step_000090"), 0.08), names)
    _, error = fit_profile(range(15, 91, 15), 0.08)
    assert np.abs(found - average(weights_SN[:90], 0.08)).max() < bound(weights_SN[:90], 0.08, error) + 1e-5


@pytest.mark.parametrize("ends", [[100], [30, 60, 90, 100], [7, 20, 21, 80, 81, 99, 100], [*range(5, 101, 5)]])
@pytest.mark.parametrize("sigma_rel", [0.04, 0.1, 0.17])
def test_weights_are_the_best(ends: list[int], sigma_rel: float) -> None:
    """Of all weights that sum to one, found in closed form as by least squares on a fine grid, with the same distance."""
    edges = np.linspace(0, ends[-1], 20_001)
    width = edges[1]
    columns = np.stack([profile_over(edges, end, own) for end in ends for own in TRACKS.values()], 1) / width
    wanted = profile_over(edges, ends[-1], sigma_rel) / width
    # the last weight is what the others leave of one
    solved = np.linalg.lstsq(columns[:, :-1] - columns[:, -1:], wanted - columns[:, -1], rcond=None)[0]
    best = columns @ np.append(solved, 1 - solved.sum())
    weights_NK, error = fit_profile(ends, sigma_rel)
    ours, norm = columns @ weights_NK.flatten().numpy(), np.linalg.norm(wanted)
    assert weights_NK.sum().item() == pytest.approx(1, abs=1e-9)
    assert np.linalg.norm(ours - best) < 1e-3 * norm
    assert np.linalg.norm(best - wanted) / norm == pytest.approx(error, rel=1e-2, abs=1e-4)


@pytest.fixture(scope="module")
def settings(tiny_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Overrides of six steps in this process, averaged, with a checkpoint of each."""
    return tiny_run | {
        "engine.kind": "plain", "engine.precision": "fp32", "engine.micro_batch": 4, "schedule.steps": 6,
        "diffusion.layout": "middle_in_clip", "checkpoint.every_steps": 1, "checkpoint.ema": True,
        "runs_dir": str(tmp_path_factory.mktemp("averaged")),
    }  # fmt: skip


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora.extra_trainable": ["conv_in", "mask_token"]},
    "full": {"tuning": "full", "full.parameters": "mid_block\\..*|mask_token", "optimizer.lr": 1e-3},
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def run(request: pytest.FixtureRequest, settings: dict[str, Any]) -> Path:
    """The folder of such a run, named after what it trains; read only."""
    return train_here(settings | KINDS[request.param] | {"name": request.param})


@pytest.fixture(scope="module")
def adapted(settings: dict[str, Any]) -> Path:
    """That of a LoRA, for what is the same whatever trains; read only."""
    return train_here(settings | {"name": "adapted"})


def read_masters(run: Path) -> tuple[np.ndarray, list[str]]:
    """What each update of a run left, from a checkpoint of every step, and the order of the parameters."""
    states = {state["updates"]: tensors for state, tensors in map(load_checkpoint, list_checkpoints(run))}
    names = sorted(states[1])
    rows = [flatten({name: states[update][name]["master"] for name in names}, names) for update in sorted(states)]
    return np.stack(rows), names


def read_snapshots(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run / "ema").iterdir())}


def assert_averaged(run: Path, updates: int) -> None:
    """The tracks of a run and a third length are the averages of what its checkpoints hold."""
    weights_SN, names = read_masters(run)
    assert len(weights_SN) == updates
    last = list_checkpoints(run)[-1]
    for sigma_rel in (0.05, 0.08, 0.1):
        _, error = fit_profile(range(1, updates + 1), sigma_rel)
        found, direct = flatten(put_together(last, sigma_rel), names), average(weights_SN, sigma_rel)
        off = np.abs(found - direct).max()
        assert off < bound(weights_SN, sigma_rel, error) + 3 * rounding(weights_SN, sigma_rel)
        assert off < np.abs(direct - weights_SN[-1]).max() / 3


def test_a_run_averages_what_it_trains(run: Path) -> None:
    """Matrices, tensors trained whole, or a UNet's own weights; a snapshot of each checkpoint."""
    assert_averaged(run, 6)
    assert [*read_snapshots(run)] == [f"step_{step:06d}.safetensors" for step in range(1, 7)]


def test_training_is_the_same_without(run: Path, settings: dict[str, Any]) -> None:
    """Losses, weights and moments bit for bit, and nothing else in the folder."""
    kind = KINDS[run.name] | {"name": f"{run.name}_without", "checkpoint.ema": False}
    without = train_here(settings | kind)
    assert read_numbers(without) == read_numbers(run)
    ours, theirs = (checkpoint_folder(own, 6) for own in (run, without))
    assert (ours / "optimizer.safetensors").read_bytes() == (theirs / "optimizer.safetensors").read_bytes()
    assert {p.name for p in ours.iterdir()} - {p.name for p in theirs.iterdir()} == {"ema.safetensors"}
    assert not (without / "ema").exists()


def test_resumes_exactly(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """Thrown back to step two: the same snapshots to the byte, and none of what another recipe left of later steps."""
    back = Path(shutil.copytree(run, tmp_path / run.name))
    for step in (3, 4, 5, 6):
        shutil.rmtree(checkpoint_folder(back, step))
        (back / f"ema/step_{step + 3:06d}.safetensors").write_bytes(b"of another recipe")
    train_here(settings | KINDS[run.name] | {"name": run.name, "runs_dir": str(tmp_path)})
    assert read_snapshots(back) == read_snapshots(run) and read_numbers(back) == read_numbers(run)


@pytest.mark.parametrize("kind", ["zero1", "zero2_offload"])
def test_engines_that_leave_what_trains_whole(forked: Warm, settings: dict[str, Any], kind: str) -> None:
    """Their weights are averaged as the reference's are; those that do not are refused by the recipe."""
    forked.run(settings | {"name": kind, "engine.kind": kind}, ranks=1)
    assert_averaged(Path(settings["runs_dir"]) / kind, 6)


def test_killed_ranks_go_on_exactly(forked: Warm, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Two ranks, killed after a step that was skipped: the run that was not killed, averaged over its seven updates."""
    overrides = tiny_run | {
        "runs_dir": str(tmp_path), "engine.global_batch": 2, "schedule.steps": 8,
        "checkpoint.every_steps": 1, "checkpoint.ema": True,
    }  # fmt: skip
    poison = ("poison_clips", {"positions": [9]})  # of step 5
    forked.run(overrides | {"name": "whole"}, wounds=[poison])
    assert_averaged(tmp_path / "whole", 7)
    killed = forked.start(overrides | {"name": "killed"}, wounds=[poison, strike([0, 1], BACKWARD, 7, signal.SIGKILL)])
    killed.wait()
    step = newest(tmp_path / "killed")
    resumed = forked.run(overrides | {"name": "killed"}, wounds=[poison])
    assert 0 < step < 8 and f"resuming after step {step}" in resumed.stdout()
    assert same_run(tmp_path / "killed", tmp_path / "whole")
    assert read_snapshots(tmp_path / "killed") == read_snapshots(tmp_path / "whole")


def test_snapshots_outlive_their_checkpoints(settings: dict[str, Any], adapted: Path) -> None:
    """Two checkpoints are kept, and all snapshots; the averages are the same."""
    few = train_here(settings | {"name": "few", "checkpoint.keep": 2})
    assert len(list_checkpoints(few)) == 2 and read_snapshots(few) == read_snapshots(adapted)
    ours, theirs = (put_together(checkpoint_folder(own, 6), 0.12) for own in (few, adapted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_exported_is_the_average(run: Path, tmp_path: Path) -> None:
    """As a network for use has it, and as files of every kind, which say so; and at an earlier checkpoint."""
    base = load_base(load_config(run / "config.yaml").model, torch.device("cpu"), "fp32").unet
    average = put_together(checkpoint_folder(run, 6), 0.08)
    source = read_source(str(run)).averaged(0.08)
    loaded = load_framer(source).base.unet.state_dict()
    merged = load_file(export_run(str(run), "merged", str(tmp_path / "merged"), None, "fp32", 0.08) / UNET_FILE)
    raw = load_framer(read_source(str(run))).base.unet.state_dict()
    assert all(torch.equal(loaded[name], merged[name]) for name in merged)
    assert any(not torch.equal(loaded[name], raw[name]) for name in raw)
    about = json.loads((tmp_path / "merged/framer_toolkit.json").read_text())
    assert about["ema"] == 0.08 and "sigma_rel 0.08" in (tmp_path / "merged/README.md").read_text()
    if run.name == "full":
        wanted = base.state_dict() | average
        assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
        return
    for to in ("peft", "diffusers", "kohya"):
        place = export_run(str(run), to, str(tmp_path / to), None, None, 0.08)
        found = read_adapter(place, base)
        assert found.metadata["ema"] == 0.08
        for name, tensor in average.items():
            own = (found.tensors | found.extras)[name.replace(".default.", ".")]
            # kohya holds differences from the base
            assert torch.allclose(own, tensor, rtol=0, atol=1e-6) if to == "kohya" else torch.equal(own, tensor), (
                to,
                name,
            )
    earlier = export_run(str(run), "peft", str(tmp_path / "earlier"), "step_000004", None, 0.1)
    kept = load_file(run / "ema/step_000004.safetensors")
    for name, tensor in read_adapter(earlier, base).tensors.items():
        own = kept[f"{name.replace('.weight', '.default.weight')}/ema_0.1"]
        assert torch.allclose(tensor, own, rtol=0, atol=1e-6)


def test_a_sweep_judges_what_is_exported(adapted: Path, tmp_path: Path) -> None:
    """0 is the run itself, and each length scores as its exported adapter; one of them is recommended."""
    values = [0.05, 0.1, 0.13]
    report = evaluate_run(str(adapted), 2, 1, sweep="ema=0,0.05,0.1,0.13", out=str(tmp_path / "sweep"))
    exported = [str(export_run(str(adapted), "peft", str(tmp_path / f"{v:g}"), None, None, v)) for v in values]
    beside = evaluate_run(clips=2, steps=1, adapters=exported, out=str(tmp_path / "beside"))
    (own,), (other,) = report["gaps"].values(), beside["gaps"].values()
    assert report["sweep"]["labels"] == ["ema 0", "ema 0.05", "ema 0.1", "ema 0.13"]
    assert own["per_clip"]["ema 0"] == own["per_clip"]["tuned"] != own["per_clip"]["ema 0.1"]
    assert all(own["per_clip"][f"ema {v:g}"] == other["per_clip"][f"{v:g}"] for v in values)
    assert [*report["sweep"]["recommended"].values()][0] in [0, *values]


def test_frames_between_two_stills(adapted: Path, tmp_path: Path) -> None:
    """interpolate.py --ema makes what it makes of the exported average, and not what it makes of the run."""
    stills = []
    for i in range(2):
        picture = Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8))
        picture.save(tmp_path / f"{i}.png")
        stills.append(str(tmp_path / f"{i}.png"))
    exported = export_run(str(adapted), "peft", str(tmp_path / "adapter"), None, None, 0.12)
    made = {}
    for name, which in (
        ("run", {"run": str(adapted)}),
        ("ema", {"run": str(adapted), "ema": 0.12}),
        ("exported", {"adapter": str(exported)}),
    ):
        interpolate(str(tmp_path / name), first=stills[0], last=stills[1], steps=1, **which)
        made[name] = [file.read_bytes() for file in sorted((tmp_path / name).iterdir())]
    assert made["ema"] == made["exported"] != made["run"] and len(made["ema"]) == 3


@pytest.mark.parametrize(
    ("sigma_rel", "said"),
    [
        (
            0.2,
            r"ema 0.2 cannot be put together of the 6 snapshots up to step_000006; give a sigma_rel from 0.04 to 0.1",
        ),
        (0.001, "ema 0.001 cannot be put together"),
        (0.3, "ema 0.3 cannot be put together"),
        (1e9, "cannot be put together"),
        (-0.1, "ema -0.1 cannot be put together"),
    ],
)
def test_a_length_that_cannot_be_is_refused(adapted: Path, sigma_rel: float, said: str, tmp_path: Path) -> None:
    """In one sentence that says what can, by each command, before weights are read."""
    for ask in (
        lambda: evaluate_run(str(adapted), sweep=f"ema=0,{sigma_rel}"),
        lambda: export_run(str(adapted), "peft", str(tmp_path / "out"), ema=sigma_rel),
        lambda: interpolate(str(tmp_path / "out"), run=str(adapted), first="a.png", last="b.png", ema=sigma_rel),
    ):
        with pytest.raises(UserError, match=said):
            ask()
    assert not (tmp_path / "out").exists()


def test_what_has_no_averages_is_told(adapted: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """A run without, an exported adapter, several adapters, the first step where it was skipped: a sentence each."""
    without = train_here(settings | {"name": "none", "checkpoint.ema": False, "schedule.steps": 1})
    exported = str(export_run(str(adapted), "kohya", str(tmp_path / "out")))
    for source in (read_source(str(without)), read_source(adapters=[exported])):
        with pytest.raises(UserError, match="has no averages in its run's folder ema, .* train with --checkpoint.ema"):
            source.averaged(0.1)
        assert source.averaged(0) == source
    several = read_source(adapters=[exported, str(checkpoint_folder(adapted, 6))])
    with pytest.raises(UserError, match="ema is for one run or checkpoint, and here are 2"):
        several.averaged(0.1)
    copy = Path(shutil.copytree(adapted, tmp_path / "copy"))
    for file in (copy / "ema").iterdir():
        file.unlink()
    tensors = {name: {key: torch.zeros(2) for key in TRACKS} for name in ("a", "b")}
    write_snapshot(snapshot_file(checkpoint_folder(copy, 6)), tensors, 0)
    with pytest.raises(UserError, match="has no averages"):
        plan_average(checkpoint_folder(copy, 6), 0.1)


def test_averages_begin_with_a_run(settings: dict[str, Any]) -> None:
    """Switched on later they are refused, and nothing is written; switched off the run goes on."""
    two = settings | {"schedule.steps": 2}
    for begun in (False, True):
        overrides = two | {"name": f"begun_{begun}"}
        run = train_here(overrides | {"checkpoint.ema": begun})
        shutil.rmtree(checkpoint_folder(run, 2))
        if begun:
            train_here(overrides | {"checkpoint.ema": False})
            with pytest.raises(UserError, match="has no averages"):
                read_source(str(run)).averaged(0.1)
            continue
        with pytest.raises(UserError, match="checkpoint.ema is on, but .*step_000001 was saved without it, .*--fresh"):
            train_here(overrides)
        assert not (run / "ema").exists()


@pytest.mark.parametrize("place", [10, -10])
def test_a_damaged_snapshot_is_named(adapted: Path, tmp_path: Path, place: int) -> None:
    """A flipped bit in header or numbers; without that file the others do."""
    run = Path(shutil.copytree(adapted, tmp_path / "copy"))
    file, last = run / "ema/step_000003.safetensors", checkpoint_folder(run, 6)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="step_000003.safetensors is damaged: .*; delete it"):
        put_together(last, 0.08)
    file.unlink()
    assert all(tensor.isfinite().all() for tensor in put_together(last, 0.08).values())


def test_space_is_asked_for(settings: dict[str, Any], adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has room for two checkpoints of four copies of what trains, and not for two of six."""
    parameters, usage = read_masters(adapted)[0].shape[1], shutil.disk_usage(adapted)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=2 * (parameters * 4 * 5 + (1 << 20))))
    with pytest.raises(UserError, match="2 checkpoints of .* MiB do not fit on the disk"):
        train_here(settings | {"name": "full_disk"})
    train_here(settings | {"name": "full_disk", "checkpoint.ema": False, "schedule.steps": 1})
