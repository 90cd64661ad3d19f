"""Charts as SVG, and those of a training run from its log, without TensorBoard.

Test: pytest tests/commands/test_curves.py
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.errors import UserError
from toolkit.page import number, round_up
from toolkit.run.checkpoint import replace_text
from toolkit.run.rows import read_rows

WIDTH, HEIGHT = 380, 256  # of a chart; it is higher where it has many lines
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 366, 30, 176  # of its axes
_COLOURS = ("#2f6db0", "#c2571a", "#3a8f4d", "#8d55b5", "#b08500", "#c0392b", "#5f7d8c", "#cf5c9c")
_IN_A_ROW = 3  # names below a chart, or fewer where they are long
_MOST_POINTS = 200  # of a line: a long log is averaged to so many

Line = list[tuple[float, float | None]]  # of a log: what is not finite is None there
Interval = tuple[float, float | None, float | None]  # mean, and the ends of its interval where there is one


class Point(NamedTuple):
    """A place on a line, with the interval of y where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def chart(
    title: str, lines: Mapping[str, Sequence[Point]], axis: str, marks_at: Mapping[float, str] | None = None
) -> str:
    """Draw lines over a common axis, with bars for intervals, as an SVG element; empty where there is no point.

    lines     by their names
    axis      what x is
    marks_at  what is written at places of x; default round numbers
    """
    lines = {name: line for name, line in lines.items() if line}
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    xs = sorted({point.x for point in points})
    values = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    names = marks_at or {x: f"{x:,.6g}" for x in (xs if len(xs) <= 8 else _ticks(xs[0], xs[-1], 5))}
    y_ticks = _ticks(min(values), max(values), 4)
    x_low, x_high = min(*names, xs[0]), max(*names, xs[-1], xs[0] + 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)

    marks = [_text(_LEFT, 16, title, "start")]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        marks.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#bbb"/>')
        marks.append(_text(_LEFT - 6, y + 4, f"{tick:.6g}", "end"))
    marks += [_text(place(tick, y_ticks[0])[0], _BOTTOM + 16, name, "middle") for tick, name in names.items()]
    marks.append(_text((_LEFT + _RIGHT) / 2, _BOTTOM + 32, axis, "middle"))
    for i, line in enumerate(lines.values()):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y, *_ in line)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, low, high in line if len(line) <= 20 else ():
            left, top = place(x, y)
            marks.append(
                f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="{colour}"><title>{number(y)}</title></circle>'
            )
            if low is not None and high is not None:
                ends = " ".join("{:.1f},{:.1f}".format(*place(x, end)) for end in (low, high))
                marks.append(f'<polyline points="{ends}" stroke="{colour}" stroke-opacity="0.6"/>')
    keys, bottom = _legend(lines, _BOTTOM + 40)
    return _element(title, max(HEIGHT, bottom), [*marks, *keys])


def intervals(title: str, series: Mapping[str, Mapping[str, Interval]], axis: str) -> str:
    """Draw means with their intervals side by side, a row for each name, as an SVG element; empty where there is none.

    series  {what is compared: {row: (mean, low, high)}}
    axis    what the means are; a thicker line stands at 0
    """
    series = {name: rows for name, rows in series.items() if rows}
    rows = list(dict.fromkeys(row for own in series.values() for row in own))
    if not rows:
        return ""
    values = [value for own in series.values() for interval in own.values() for value in interval if value is not None]
    ticks = _ticks(min(0.0, *values), max(0.0, *values), 4)
    left = min(_LEFT + 6 * max(map(len, rows)), WIDTH // 2)
    row_px = 10 + 8 * len(series)
    bottom = _TOP + row_px * len(rows)

    def across(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_RIGHT - left)

    marks = [_text(8, 16, title, "start")]
    for tick in ticks:
        x, dark = across(tick), abs(tick) < 1e-9
        marks.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}" stroke="{"#555" if dark else "#bbb"}" '
            f'stroke-width="{2 if dark else 1}"/>' + _text(x, bottom + 14, f"{tick:.6g}", "middle")
        )
    marks += [_text(left - 8, _TOP + row_px * (i + 0.5) + 4, row, "end") for i, row in enumerate(rows)]
    for i, own in enumerate(series.values()):
        colour = _COLOURS[i % len(_COLOURS)]
        for row, (mean, low, high) in own.items():
            y = _TOP + row_px * rows.index(row) + 9 + 8 * i
            if low is not None and high is not None:
                ends = f"{across(low):.1f},{y} {across(high):.1f},{y}"
                marks.append(f'<polyline points="{ends}" stroke="{colour}" stroke-width="2"/>')
            marks.append(
                f'<circle cx="{across(mean):.1f}" cy="{y}" r="3.5" fill="{colour}"><title>{number(mean)}</title></circle>'
            )
    marks.append(_text((left + _RIGHT) / 2, bottom + 28, axis, "middle"))
    keys, bottom = _legend(series, bottom + 34)
    return _element(title, bottom + 4, [*marks, *keys])


def training_charts(run: Path) -> list[str]:
    """Charts of what a run has logged so far: losses, the figures of its validation, its time, and what the adapter does."""
    rows, looks = read_rows(run / "log.jsonl"), read_rows(run / "validation.jsonl")
    losses = {
        "loss": "loss",
        "zero prediction": "zero_baseline",
        "held-out": "validation_loss",
        "clips trained on": "seen_loss",
    }
    timed = [row for row in rows if "time_s" in row][1:]  # a first step loads, captures and compiles
    figures = dict.fromkeys(name for row in looks for name, value in row.items() if isinstance(value, dict))
    by_title: dict[str, dict[str, Line]] = {
        "loss": {name: [(row["step"], row.get(key)) for row in rows] for name, key in losses.items()},
        "loss by sigma; 1 is what predicting zero scores": compare_by_sigma(rows),
        **{figure: gather(looks, figure) for figure in figures},
        "time of a step by phase, s": gather(timed, "time_s"),
        "adapter norm by block": choose_largest(gather(rows, "adapter_norm")),
        "update ratio by block": choose_largest(gather(rows, "update_ratio")),
    }
    charts = [
        chart(title, {name: thin(line) for name, line in lines.items()}, "step") for title, lines in by_title.items()
    ]
    return [drawn for drawn in charts if drawn]


def gather(rows: Sequence[Mapping[str, Any]], group: str) -> dict[str, Line]:
    """What rows hold by name in a group, as a line over the step for each name."""
    lines: dict[str, Line] = {}
    for row in rows:
        for name, value in row.get(group, {}).items():
            lines.setdefault(name, []).append((row["step"], value))
    return lines


def compare_by_sigma(rows: Sequence[Mapping[str, Any]]) -> dict[str, Line]:
    """The loss of each bin of noise levels, the lowest first, as a share of what predicting zero scores there."""
    losses, zeros = gather(rows, "loss_by_sigma"), gather(rows, "zero_by_sigma")
    return {
        name.partition("_")[2].replace("_", " "): [
            (step, loss / zero if loss is not None and zero else None)
            for (step, loss), (_, zero) in zip(losses[name], zeros[name], strict=True)
        ]
        for name in sorted(losses)
    }


def choose_largest(lines: Mapping[str, Line]) -> dict[str, Line]:
    """Those that end highest, as many as there are colours."""
    highest = sorted(lines, key=lambda name: lines[name][-1][1] or 0.0, reverse=True)[: len(_COLOURS)]
    return {name: line for name, line in lines.items() if name in highest}


def thin(values: Line) -> list[Point]:
    """Points of what is there, averaged to at most _MOST_POINTS."""
    there = [(x, y) for x, y in values if y is not None and math.isfinite(y)]
    size = math.ceil(len(there) / _MOST_POINTS) or 1
    groups = [there[i : i + size] for i in range(0, len(there), size)]
    return [Point(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def write_curves(run: Path) -> Path:
    """Write a run's charts to samples/curves.svg, which any browser shows."""
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}; give one such as runs/NAME")
    charts = training_charts(run)
    if not charts:
        raise UserError(f"{run} has logged no step yet (log.jsonl); train it first")
    path = run / "samples/curves.svg"
    path.parent.mkdir(exist_ok=True)
    replace_text(path, stack_charts(charts))
    return path


def stack_charts(charts: Sequence[str]) -> str:
    """Put charts one below the other, as the text of an SVG file at twice their size."""
    placed, top = [], 0
    for drawn in charts:
        height = int(drawn.split('viewBox="0 0 ', 1)[1].split('"')[0].split()[1])
        placed.append(drawn.replace("<svg ", f'<svg y="{top}" height="{height}" ', 1))
        top += height
    size = f'width="{2 * WIDTH}" height="{2 * top}" viewBox="0 0 {WIDTH} {top}"'
    white = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{white}{"".join(placed)}</svg>\n'


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that reach from low or below to high or above."""
    step = round_up(max((high - low) / count, abs(high) * 1e-3, 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _element(title: str, height: int, marks: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="11" '
        f'role="img" aria-label="{escape(title)}">{"".join(marks)}</svg>'
    )


def _legend(names: Collection[str], top: int) -> tuple[list[str], int]:
    """What each colour stands for, as many side by side as their names allow; and where the last row ends."""
    in_a_row = max(1, min(_IN_A_ROW, (WIDTH - 8) // (20 + 7 * max(map(len, names)))))
    keys = []
    for i, name in enumerate(names):
        left, y = 8 + i % in_a_row * (WIDTH - 8) // in_a_row, top + i // in_a_row * 14
        keys.append(f'<rect x="{left}" y="{y}" width="9" height="9" fill="{_COLOURS[i % len(_COLOURS)]}"/>')
        keys.append(_text(left + 13, y + 9, name, "start"))
    return keys, top + math.ceil(len(names) / in_a_row) * 14


def _text(x: float, y: float, words: str, anchor: str) -> str:
    # the class is for a page's style, which comes before the attribute
    return f'<text class="{anchor}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#555">{escape(words)}</text>'
