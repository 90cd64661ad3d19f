"""Scores runs and adapters on held-out clips: generated frames against the true ones, beside linear blending and the base.

Test: pytest tests/commands/test_evaluate.py.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from toolkit.commands.contenders import (
    Contender,
    Networks,
    Result,
    judge_windows,
    list_contenders,
    parse_sweep,
    read_sources,
    refuse_other_split,
    run_contenders,
    warn_of_sampling,
    warn_of_trained,
)
from toolkit.commands.report import write_page
from toolkit.config import RunConfig
from toolkit.data.files import try_place
from toolkit.data.remote import is_remote
from toolkit.errors import UserError
from toolkit.metrics import (
    FVD_MIN_FRAMES,
    Features,
    frechet_distance,
    load_video_features,
)
from toolkit.run.checkpoint import replace_text
from toolkit.run.framer import to_signed
from toolkit.run.inference import Source, recipe_sampling
from toolkit.run.judge import (
    DRIFTS,
    Windows,
    blend_window,
    compare,
    describe,
    load_windows,
    main_figure,
    name_videos,
    own_gaps,
    read_lpips,
    rounded,
    window_frames,
)
from toolkit.run.strip import compose_strip, draw_strip

ROOM_BYTES = 16 << 20  # more than figures, pictures and the page with them take


def evaluate_run(
    run: str | Sequence[str] = (),
    clips: int | None = None,
    steps: int | None = None,
    base: str | None = None,
    compiled: bool = False,
    adapters: Sequence[str] = (),
    gaps: Sequence[int] = (),
    sweep: str | None = None,
    lpips: str | None = None,
    out: str | None = None,
    shards: str | None = None,
    fvd: str | None = None,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Score the frames between the ends of held-out windows: linear blend, untuned base and tuned, against the true ones.

    Writes evaluation.json, report.html and samples/strip.png (first | linear | base | tuned | true | last).
    run       a run folder, or several that are judged on the first one's clips
    clips     held-out clips at most; default the recipe's
    steps     sampler steps; default the first one's recipe's
    base      another folder of the runs' base, UNet included
    compiled  worth its minutes for many clips
    adapters  checkpoints or exported adapters, judged beside the runs
    gaps      source frames between the two ends; default the recipe's
    sweep     FIELD=VALUE,VALUE,...: further contenders, of one run or adapter
    lpips     weights for LPIPS, see metrics.load_lpips
    out       folder to write to; default the first run's
    shards    judge on these held-out clips, not the run's own: what tuning cost elsewhere
    fvd       a network of video features, see metrics.load_video_features
    checkpoint  of each run: latest, best, or one such as step_000200
    returns   what evaluation.json holds: clips, psnr_linear, psnr_base, psnr_tuned, ssim_..., of the middle frame at the
              first gap by the recipe's own settings, what was judged on which shards, by which recipe, the first one's,
              how many videos the clips are of, strip and report, two paths; all else by gap under "gaps"
    """
    runs = [run] if isinstance(run, str) else [*run]
    sources = read_sources(runs, adapters, base, checkpoint)
    tuned, source = next(iter(sources.items()))
    config = source.config
    if not runs and out is None:
        raise UserError("adapters alone have no folder for what is written; give --out FOLDER, or --run as well")
    if shards is not None and out is None:
        raise UserError("--shards judges on other clips than the run's own; give --out FOLDER for what is written")
    folder = Path(out or runs[0]).expanduser()
    trained = sources.values()
    if shards is not None:
        sources = {name: own.on_shards(shards) for name, own in sources.items()}
        config = sources[tuned].config
    else:
        refuse_lost_shards(sources)
    refuse_other_split(sources)
    networks = Networks(read_lpips(config, lpips), read_fvd(config, fvd))
    sampling = recipe_sampling(config)
    warn_of_sampling(sources, sampling)
    if checkpoint == "best" and shards is None:
        print(
            "note: held-out clips of these shards chose the best checkpoint, and so flatter it; --shards takes others",
            file=sys.stderr,
        )
    sampling = sampling if steps is None else replace(sampling, steps=steps)
    contenders = list_contenders(sources, sampling, sweep)
    windows = load_windows(config, [*dict.fromkeys(gaps)] or own_gaps(config), clips or config.validation.clips)
    if shards is not None:
        warn_of_trained(trained, config, next(iter(windows.values())).keys)
    if networks.fvd and len(next(iter(windows.values()))) < 2:
        raise UserError(
            "--fvd compares sets of clips, and one is judged; give more --clips, pack more videos, or leave it out"
        )
    make_folder(folder)  # what cannot be written is not worth generating
    results: dict[int, dict[str, Result]] = {}
    for gap, own in windows.items():
        results[gap] = {
            "linear": judge_windows(own, (blend_window(own, i) for i in range(len(own))), networks),
            "true": judge_windows(own, (own.true(i) for i in range(len(own))), replace(networks, lpips=None)),
        }
    for label, gap, result in run_contenders(contenders, windows, networks, compiled):
        results[gap][label] = result
    by_gap = {str(gap): sum_up(results[gap], contenders, own, tuned) for gap, own in windows.items()}
    ranked_by = {gap: main_figure(by_gap[str(gap)]["figures"]["linear"]) for gap in windows}
    gap, own = next(iter(windows.items()))
    report: dict[str, Any] = {
        "judged": {name: str(own.place) for name, own in sources.items()},
        "shards": [*config.data.sources],
        "recipe": config.model_dump(mode="json"),
        "clips": len(own),
        "videos": len({video for key, video in name_videos(config.data, "val").items() if key in own.keys}),
    }
    for metric in ("psnr", "ssim"):
        for name, label in (("linear", "linear"), ("base", "base"), ("tuned", tuned)):
            report[f"{metric}_{name}"] = by_gap[str(gap)]["figures"][label][f"{metric}_middle"]["mean"]
    report |= {
        "strip": str(draw_strip(folder / "samples/strip.png", show_clips(results[gap], own, tuned, range(len(own))))),
        "report": str(folder / "report.html"),
        "sampling": vars(sampling),
        "gaps": by_gap,
    }
    if sweep is not None:
        report["sweep"] = sum_up_sweep(sweep, results, contenders, ranked_by)
    replace_text(folder / "evaluation.json", json.dumps(report, indent=2) + "\n")
    extremes = {str(gap): draw_extremes(results[gap], own, tuned, ranked_by[gap]) for gap, own in windows.items()}
    write_page(folder, [Path(name).expanduser() for name in runs], report, extremes)
    return report


def make_folder(folder: Path) -> None:
    """Make a folder with one for pictures in it. Raises UserError where nothing can be written into them."""
    remedy = "give another folder: --out FOLDER"
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; {remedy}") from None
    closed = next((place for place in (folder, folder / "samples") if not os.access(place, os.W_OK)), None)
    if closed is not None:  # a colleague's run, for one
        raise UserError(f"cannot write to {closed}; {remedy}")
    try_place(folder, ROOM_BYTES, f"free some space, or {remedy}")


def refuse_lost_shards(sources: dict[str, Source]) -> None:
    """Raise UserError where a run's own clips are no longer where it found them."""
    for name, source in sources.items():
        lost = [place for place in source.config.data.sources if not is_remote(place) and not Path(place).is_dir()]
        if lost:
            raise UserError(
                f"{name} was trained on {' + '.join(lost)}, which is not there; start this where it was trained, or say "
                "where the clips are now: --shards FOLDER --out FOLDER"
            )


def read_fvd(config: RunConfig, weights: str | None) -> Features | None:
    """Read what FVD compares by where it is given. Raises UserError where the windows of a recipe are too short for it."""
    if weights is None:
        return None
    if (frames := window_frames(config)) < FVD_MIN_FRAMES:
        raise UserError(
            f"--fvd needs windows of {FVD_MIN_FRAMES} frames or more, and the run's have {frames}; leave it out"
        )
    return load_video_features(Path(weights).expanduser(), window_frames(config))


def sum_up(
    results: dict[str, Result], contenders: dict[str, Contender], windows: Windows, first: str
) -> dict[str, Any]:
    """What evaluation.json holds of a gap: figures, what each contender gains on others, and the figures of each clip.

    Others are the blend, its own base, and the first of those that were trained.
    """
    bases = [label for label, own in contenders.items() if own.base == label]
    tuned = [label for label in contenders if label not in bases]
    scores = {label: results[label].figures for label in ("linear", *bases, *tuned)}
    true = results["true"]
    shown = scores | {"true": {name: true.figures[name] for name in DRIFTS}}
    figures = {label: {name: describe(values_B) for name, values_B in own.items()} for label, own in shown.items()}
    videos = {label: own.features_BD for label, own in results.items() if own.features_BD is not None}
    if "true" in videos:
        for label in scores:
            distance = rounded(frechet_distance(videos[label], videos["true"]))
            figures[label]["fvd"] = {"mean": distance, "low": None, "high": None, "clips": len(windows)}
    return {
        "clips": len(windows),
        "frames_between": windows.frames_BTHWC.shape[1] - 2,
        "keys": windows.keys,
        "figures": figures,
        "by_frame": {
            label: {
                name: [describe(values_B) for values_B in values_BT.unbind(1)]
                for name, values_BT in results[label].of_frames.items()
            }
            for label in scores
        },
        "against": {
            label: {
                other: {name: compare(name, own_B, scores[other][name]) for name, own_B in scores[label].items()}
                for other in dict.fromkeys(("linear", contenders[label].base, first))
                if other != label
            }
            for label in tuned
        },
        "per_clip": {
            label: {name: [rounded(value) for value in values_B.tolist()] for name, values_B in figures.items()}
            for label, figures in scores.items()
        },
    }


def sum_up_sweep(
    sweep: str,
    results: dict[int, dict[str, Result]],
    contenders: dict[str, Contender],
    ranked_by: dict[int, str],
) -> dict[str, Any]:
    """What evaluation.json holds of a sweep: field, values, their labels and bases, and the value to take at each gap.

    ranked_by  the main figure of each gap
    """
    field, values = parse_sweep(sweep)
    labels = {value: f"{field} {value:g}" for value in values}
    recommended = {}
    for gap, own in results.items():
        scores = {value: own[label].figures[ranked_by[gap]] for value, label in labels.items()}
        recommended[str(gap)] = recommend(scores)
    bases = [contenders[label].base for label in labels.values()]
    return {
        "field": field,
        "values": values,
        "labels": [*labels.values()],
        "bases": bases,
        "recommended": recommended,
    }


def recommend(values: dict[float, Tensor]) -> float:
    """The smallest value that is not worse than the best beyond the noise of the clips.

    values  {value: (B,) in dB}; not worse is one whose difference from the best, clip by clip, is 0 within its 95 % interval
    """
    means = {value: own_B[own_B.isfinite()].mean().nan_to_num(-math.inf).item() for value, own_B in values.items()}
    best = max(means, key=means.__getitem__)
    for value in sorted(values):
        low = describe(values[best] - values[value])["low"]
        if value == best or (low is not None and low <= 0):
            return value
    return best


def draw_extremes(results: dict[str, Result], windows: Windows, tuned: str, figure: str) -> Image.Image:
    """Draw the middle frames of the clips in which the tuned network gains most and least on the base, by a figure."""
    gain_B = results[tuned].figures[figure] - results["base"].figures[figure]
    # a clip in which nothing moves has no gain, and is neither
    rows = list(dict.fromkeys([int(gain_B.nan_to_num(-math.inf).argmax()), int(gain_B.nan_to_num(math.inf).argmin())]))
    captions = [
        f"{name} gain, {windows.keys[row]}: "
        + ", ".join(f"{label} {results[label].figures[figure][row]:.2f} dB" for label in ("linear", "base", tuned))
        for name, row in zip(("largest", "smallest"), rows, strict=False)
    ]
    return compose_strip(show_clips(results, windows, tuned, rows), captions)


def show_clips(results: dict[str, Result], windows: Windows, tuned: str, rows: Sequence[int]) -> dict[str, Tensor]:
    """Columns of a strip: the ends of clips, and between them the middle frames."""
    windows_BTCHW = to_signed(windows.frames_BTHWC[rows])
    middles = {label: to_signed(results[label].middle_BHWC[rows]) for label in ("linear", "base", tuned, "true")}
    return {"first": windows_BTCHW[:, 0], **middles, "last": windows_BTCHW[:, -1]}
