"""Drives the README's commands one after another and sums up what came out: runs/demo/summary.json.

Test: make demo.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from toolkit.commands.launcher import default_ranks, training_command
from toolkit.config import load_config
from toolkit.errors import UserError
from toolkit.run.folder import newest_adapter
from toolkit.run.judge import load_held_out
from toolkit.run.rows import read_rows

RECIPE = "launch/recipes/tiny_cpu.yaml"
WORK = Path(".demo")  # rendered videos, shards, stills
RUN = Path("runs/demo")
LOOK_STEPS = "120"  # half of the recipe's: enough for TensorBoard to show how it goes


def run_demo(videos: str | None) -> None:
    """Run the whole job; every stage is a command printed before it runs."""
    if videos is not None and not Path(videos).is_dir():
        raise UserError(f"VIDEOS={videos} is no folder; give a folder of videos, or leave VIDEOS out for rendered ones")
    if videos is not None and Path(videos).resolve().is_relative_to(WORK.resolve()):
        raise UserError(f"VIDEOS={videos} lies in {WORK}, which the demo makes anew; move the videos elsewhere")
    shutil.rmtree(WORK, ignore_errors=True)
    shards, python = WORK / "shards", sys.executable
    seconds: dict[str, float] = {}
    if videos is None:
        videos = str(WORK / "videos")
        render = [python, "shards/synth.py", videos, "--clips", "96", "--seconds", "1.2"]
        seconds["render"] = _run("render signing figures", render)
    pack = [python, "shards/pack.py", videos, str(shards), "--short_side", "96", "--holdout", "0.15"]
    seconds["pack"] = _run("pack videos", pack)
    seconds["check"] = _run("check shards", [python, "shards/check.py", str(shards)])
    overrides = ["--name", RUN.name, "--runs_dir", str(RUN.parent), "--data.shards", str(shards), "--fresh"]
    overrides += ["--validation.every_steps", LOOK_STEPS, "--validation.figures_every_steps", LOOK_STEPS]
    start = training_command(min(2, default_ranks()))
    seconds["train"] = _run("train a LoRA", [*start, "--config", RECIPE, *overrides])
    seconds["evaluate"] = _run("score it on held-out clips", [python, "launch/evaluate.py", "--run", str(RUN)])
    seconds["interpolate"] = _interpolate()
    summary = summarise(RUN, seconds)
    (RUN / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_summary(summary)


def summarise(run: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Collect a run's figures; loss_first and loss_last are means over the first and the last quarter of the steps."""
    rows = read_rows(run / "log.jsonl")
    quarter = max(1, len(rows) // 4)
    adapter = newest_adapter(run) / "adapter_model.safetensors"
    evaluation = json.loads((run / "evaluation.json").read_text())
    (judged,) = evaluation["gaps"].values()
    moving = {name: judged["figures"][name]["psnr_moving_middle"]["mean"] for name in ("linear", "base", "tuned")}
    return {
        "optimizer_steps": len(rows),
        "loss_first": sum(row["loss"] for row in rows[:quarter]) / quarter,
        "loss_last": sum(row["loss"] for row in rows[-quarter:]) / quarter,
        "zero_baseline": sum(row["zero_baseline"] for row in rows) / len(rows),
        **{f"psnr_{name}": evaluation[f"psnr_{name}"] for name in moving},
        **{f"psnr_moving_{name}": value for name, value in moving.items()},
        "held_out_clips": judged["clips"],
        "clips_improved": judged["against"]["tuned"]["base"]["psnr_moving_middle"]["improved"],
        "trainable_params": _count_parameters(adapter),
        "adapter_mb": round(adapter.stat().st_size / 1e6, 2),
        "seconds": seconds,
        "paths": {
            "adapter": str(adapter.parent),
            "video": str(run / "samples/interpolated.mp4"),
            "strip": evaluation["strip"],
            "tensorboard": str(run / "tb"),
        },
    }


def print_summary(summary: dict[str, Any]) -> None:
    """The table at the end, and where to look."""
    paths, seconds = summary["paths"], summary["seconds"]
    rows = {
        "optimizer steps": f"{summary['optimizer_steps']}",
        "loss, first and last quarter": f"{summary['loss_first']:.4f} -> {summary['loss_last']:.4f}",
        "  of a zero prediction": f"{summary['zero_baseline']:.4f}",
        "PSNR of what moves, middle frame, dB": (
            f"untuned {_show(summary['psnr_moving_base'])} -> tuned {_show(summary['psnr_moving_tuned'])}, better in "
            f"{summary['clips_improved']} of {summary['held_out_clips']} clips"
        ),
        "  of blending the stills": _show(summary["psnr_moving_linear"]),
        "PSNR of the whole frame, dB": f"untuned {_show(summary['psnr_base'])} -> tuned {_show(summary['psnr_tuned'])}",
        "  of blending the stills ": _show(summary["psnr_linear"]),
        "adapter": f"{summary['trainable_params']:,} parameters, {summary['adapter_mb']} MB",
        "seconds": f"{sum(seconds.values()):.0f} ({', '.join(f'{k} {v:.0f}' for k, v in seconds.items())})",
    }
    print("\n" + "\n".join(f"{name:<40}{value}" for name, value in rows.items()))
    print(
        f"\nadapter      {paths['adapter']}\nvideo        {paths['video']}\npictures     {paths['strip']}"
        f"\ntensorboard  {Path(sys.executable).with_name('tensorboard')} --logdir {RUN.parent}"
    )


def _show(figure: float | None) -> str:
    return "none" if figure is None else f"{figure:.2f}"  # where nothing moves


def _interpolate() -> float:
    """Fill the gap between the ends of the first held-out window."""
    config = load_config(RUN / "config.yaml")
    clip = load_held_out(config, 1)[0]
    stills = {name: WORK / f"{name}.png" for name in ("first", "last")}
    for path, frame_HWC in zip(stills.values(), (clip.frames_THWC[0], clip.frames_THWC[-1]), strict=True):
        Image.fromarray(frame_HWC).save(path)
    command = [sys.executable, "launch/interpolate.py", "--run", str(RUN), "--frames", "5", "--fps", "7.5"]
    for name, path in stills.items():
        command += [f"--{name}", str(path)]
    return _run("interpolate between two stills", [*command, "--out", str(RUN / "samples/interpolated.mp4")])


def _run(what: str, command: list[str]) -> float:
    """Run a command, showing it; returns the seconds it took."""
    print(f"\n=== {what}\n$ {' '.join(command)}", flush=True)
    began_s = time.monotonic()
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"the stage '{what}' failed; its own message stands above")
    return round(time.monotonic() - began_s, 1)


def _count_parameters(adapter: Path) -> int:
    from safetensors import safe_open

    with safe_open(adapter, "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
