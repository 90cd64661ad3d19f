"""What launch/evaluate.py found, to be read: tables on the terminal, and report.html with curves and pictures.

Test: pytest tests/commands/test_evaluate.py
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from toolkit.commands.curves import Point, chart, training_charts
from toolkit.page import document, table, text
from toolkit.run.checkpoint import replace_text
from toolkit.run.judge import FIGURES, find_figure, main_figure

NAMES = {"linear": "linear blend", "base": "untuned base", "true": "true frames"}
UNITS = (
    "PSNR in dB, flicker and drift in levels of 255, each with half of its 95 % interval; of flicker and drift less is "
    "better, and the true frames drift too"
)
FEW = "FVD has no interval, and from so few clips it compares these contenders at the same gap, and nothing else"
RULE = (
    "the smallest whose moving PSNR is not worse than the best one's beyond the noise of the clips: 0 lies in the 95 % "
    "interval of the difference, taken clip by clip. These clips chose it, and so flatter it; --shards judges it on others"
)


def to_text(report: dict[str, Any]) -> str:
    """The tables of every gap, and below each how often and by how much the tuned networks are better."""
    parts = [*judged_of(report), ""]
    for gap, own in report["gaps"].items():
        head, *rows = [["", *head_of(own)], *rows_of(own)]
        name_width = max(len(row[0]) for row in rows)
        parts.append(title_of(gap, own))
        parts += [f"{row[0]:<{name_width}}" + "".join(f"{cell:>14}" for cell in row[1:]) for row in (head, *rows)]
        parts += [f"{pair}: {gain}" for pair, gain in gains_of(own, swept_by(report))]
        if "sweep" in report:
            swept = sweep_table(report, own)
            widths = [max(map(len, column)) for column in zip(*swept, strict=True)]
            parts += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in swept]
            parts.append(f"recommended {report['sweep']['field']}: {recommended_of(report['sweep'], gap)}")
        parts.append("")
    parts.append(units_of(report))
    if "sweep" in report:
        parts.append(f"recommended is {RULE}")
    return "\n".join(parts)


def write_page(folder: Path, runs: Sequence[Path], report: dict[str, Any], pictures: Mapping[str, Image.Image]) -> None:
    """Write report.html, which needs no other file.

    runs      those whose training is shown
    pictures  by gap, of the clips with the largest and the smallest gain
    """
    name = folder.resolve().name  # of `.` too
    judged = "".join(f"<p>{text(line)}</p>" for line in judged_of(report))
    body = [f"<header><p>Evaluation report</p><h1>{text(name)}</h1>{judged}<p>{units_of(report)}.</p></header>"]
    if "sweep" in report:
        sweep = report["sweep"]
        rows = [(gap, recommended_of(sweep, gap)) for gap in sweep["recommended"]]
        title = f"Recommended {sweep['field']}"
        body.append(f"<section>{table(title, ('gap', sweep['field']), rows)}<p>It is {RULE}.</p></section>")
    body.append(_charts_section("Curves", [*gap_charts(report), *sweep_charts(report)]))
    for gap, own in report["gaps"].items():
        body += [
            "<section>",
            table(title_of(gap, own).capitalize(), ("contender", *head_of(own)), map(tuple, rows_of(own))),
            table("Gains", ("contenders", "mean over the clips"), gains_of(own, swept_by(report))),
        ]
        if "sweep" in report:
            first, *rest = sweep_table(report, own)
            body.append(table(f"Gains by {report['sweep']['field']}", first, rest))
        body.append(f"<h2>Largest and smallest gain on the base</h2>{_picture(pictures[gap])}</section>")
        body.append(_charts_section(f"Frame by frame, gap of {gap}", frame_charts(report, gap)))
    body += [_charts_section(f"Training of {text(run.resolve().name)}", training_charts(run)) for run in runs]
    replace_text(folder / "report.html", document(f"Evaluation of {name}", "\n".join(body)))


def judged_of(report: dict[str, Any]) -> list[str]:
    """What was judged, on which clips."""
    places = [f"{name}: {place}" for name, place in report["judged"].items()]
    of_videos, videos = "", report["videos"]
    if videos < report["clips"]:
        of_videos = (
            f": {report['clips']} of {videos} video{'s' * (videos > 1)}; clips of one video are alike, so for other videos "
            "the intervals are too narrow"
        )
    return [*places, f"clips of {' + '.join(report['shards'])}{of_videos}"]


def recommended_of(sweep: dict[str, Any], gap: str) -> str:
    value = sweep["recommended"][gap]
    is_base = sweep["field"] == "lora_scale" and value == 0
    return "0, the untuned base: no scale is better beyond the noise of these clips" if is_base else f"{value:g}"


def units_of(report: dict[str, Any]) -> str:
    has_fvd = any("fvd" in own["figures"]["linear"] for own in report["gaps"].values())
    return f"{UNITS}; {FEW}" if has_fvd else UNITS


def title_of(gap: str, own: dict[str, Any]) -> str:
    between = own["frames_between"]
    made = "the middle frame" if between == 1 else f"{between} frames between the ends"
    return f"gap of {gap} source frames: {own['clips']} held-out clips, {made}"


def head_of(own: dict[str, Any]) -> list[str]:
    return [find_figure(name).label for name in _columns(own)]


def rows_of(own: dict[str, Any]) -> list[list[str]]:
    """A row for each contender: its name, then its figures."""
    return [
        [NAMES.get(label, label), *(_cell(name, figures.get(name)) for name in _columns(own))]
        for label, figures in own["figures"].items()
    ]


def gains_of(own: dict[str, Any], left_out: Sequence[str] = ()) -> list[tuple[str, str]]:
    """A row for each pair of a tuned network and what it is compared with: the difference in PSNR, and how often."""
    rows = []
    for label, others in own["against"].items():
        for (other, gains), figure in product(others.items(), ("psnr_moving", "psnr")):
            gain, name = gains[figure], find_figure(figure).label
            if gain["mean"] is None or label in left_out:
                continue
            pair = f"{label} against {NAMES.get(other, other)}"
            rows.append((pair, f"{name} {_gain(gain)}, better in {_often(gain)}"))
    return rows


def swept_by(report: dict[str, Any]) -> list[str]:
    """Labels of a sweep's contenders, which have a table and charts of their own."""
    return report.get("sweep", {}).get("labels", [])


def sweep_table(report: dict[str, Any], own: dict[str, Any]) -> list[tuple[str, str, str]]:
    """A head, then a row for each value of a sweep: what it gains on the untuned base, and how often."""
    sweep = report["sweep"]
    figure = main_figure(own["figures"]["linear"])
    pairs = zip(sweep["labels"], sweep["bases"], strict=True)
    gains = [own["against"][label][base][figure] for label, base in pairs]
    rows = [(f"{value:g}", _gain(gain), _often(gain)) for value, gain in zip(sweep["values"], gains, strict=True)]
    return [(sweep["field"], f"{find_figure(figure).label} against {NAMES['base']}", "better in"), *rows]


def gap_charts(report: dict[str, Any]) -> list[str]:
    """Each figure over the gap, where there are several."""
    gaps = report["gaps"]
    if len(gaps) < 2:
        return []
    labels = _unswept(report, next(iter(gaps.values()))["figures"])
    return _charts(
        {label: {int(gap): own["figures"][label] for gap, own in gaps.items()} for label in labels},
        "gap, source frames",
    )


def frame_charts(report: dict[str, Any], gap: str) -> list[str]:
    """Each figure that a frame has, frame by frame between the ends, where there are several."""
    own = report["gaps"][gap]
    places = range(own["frames_between"])
    if len(places) < 2:
        return []
    lines: dict[str, dict[float, dict[str, Any]]] = {
        label: {i + 1: {name: row[i] for name, row in own["by_frame"][label].items()} for i in places}
        for label in _unswept(report, own["by_frame"])
    }
    return _charts(lines, "frame between the ends")


def _unswept(report: dict[str, Any], labels: Iterable[str]) -> list[str]:
    """Those contenders that a sweep's own charts do not show."""
    hidden = [*swept_by(report), *(base for base in report.get("sweep", {}).get("bases", ()) if base != "base")]
    return [label for label in labels if label not in hidden]


def sweep_charts(report: dict[str, Any]) -> list[str]:
    """Each figure over the swept field, a line for each gap."""
    if "sweep" not in report:
        return []
    sweep = report["sweep"]
    by_value = dict(zip(sweep["values"], sweep["labels"], strict=True))
    return _charts(
        {
            f"gap {gap}": {value: own["figures"][label] for value, label in by_value.items()}
            for gap, own in report["gaps"].items()
        },
        sweep["field"],
    )


def _charts(lines: dict[str, dict[float, dict[str, Any]]], axis: str) -> list[str]:
    """A chart for each figure from {line: {x: {figure: its description}}}."""
    charts = []
    for name, figure in FIGURES.items():
        points = {
            NAMES.get(label, label): [
                Point(x, own["mean"], own["low"], own["high"])
                for x, figures in sorted(line.items())
                if (own := figures.get(name)) and own["mean"] is not None
            ]
            for label, line in lines.items()
        }
        charts.append(chart(f"{figure.label} {figure.unit}", points, axis))
    return [drawn for drawn in charts if drawn]


def _columns(own: dict[str, Any]) -> list[str]:
    known = own["figures"]["linear"]
    return [name for name in FIGURES if name in known] + ["psnr_middle"] * (own["frames_between"] > 1)


def _cell(name: str, figure: dict[str, Any] | None) -> str:
    if figure is None or figure["mean"] is None:
        return "-"
    digits = find_figure(name).digits
    half = "" if figure["low"] is None else f" ±{(figure['high'] - figure['low']) / 2:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{half}"


def _gain(gain: dict[str, Any]) -> str:
    interval = "" if gain["low"] is None else f" [{gain['low']:+.2f}, {gain['high']:+.2f}]"
    return f"{gain['mean']:+.2f}{interval} dB"


def _often(gain: dict[str, Any]) -> str:
    return f"{gain['improved']} of {gain['clips']} clips"


def _charts_section(title: str, charts: Sequence[str]) -> str:
    figures = "".join(f"<figure>{drawn}</figure>" for drawn in charts)
    return f"<section><h2>{title}</h2><div class=plots>{figures}</div></section>" if charts else ""


def _picture(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return f'<img alt="" width="100%" src="data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}">'
