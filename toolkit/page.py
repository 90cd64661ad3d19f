"""Parts of a self-contained HTML page: escaped text, table, histogram, and the shell that lets nothing else in.

Test: pytest tests/authoring/test_report.py

Every text from outside passes through `text`. The policy in the page's head admits the pictures inside it and the one
style sheet, by its hash: no script, no form, nothing loaded.
"""

import math
import re
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from html import escape

import numpy as np

_LONGEST_TEXT = 300
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # breaks and turns of direction
_BINS = 16


def document(title: str, body: str) -> str:
    """Put a body of our own making into a page; the same body gives the same page."""
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{b64encode(sha256(_CSS.encode()).digest()).decode()}'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
{body}
</body>
</html>
"""


def text(words: str) -> str:
    """Text from outside: on one line, cut, escaped, and kept from turning the direction of what surrounds it."""
    line = " ".join(_CONTROLS.sub(" ", words).split())
    return f"<bdi>{escape(line if len(line) <= _LONGEST_TEXT else line[:_LONGEST_TEXT] + '…')}</bdi>"


def number(value: float) -> str:
    """A number to be read: two decimals at most."""
    return f"{round(float(value), 2):,.10g}"


def table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table with its heading, or the heading and "none"; every cell is text from outside."""
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    if not body:
        return f"<div><h2>{title}</h2><p>none</p></div>"
    names = "".join(f"<th>{name}</th>" for name in head)
    return f"<div><h2>{title}</h2><table><tr>{names}</tr>{body}</table></div>"


def histogram(name: str, values: np.ndarray, is_kept: np.ndarray) -> str:
    """Draw how many clips have which value, dropped clips stacked on kept ones, as an SVG figure.

    A bar stands for the values nearest to a round number, its middle, so that 29.97 and 30 fps share one.

    values   one positive number a clip
    is_kept  bool, one a clip
    """
    if not len(values):
        return f"<figure><figcaption>{name}</figcaption><p>no clips</p></figure>"
    step = round_up(max(np.ptp(values) / _BINS, values.max() / 50, 0.01))
    bins = np.floor(values / step + 0.5).astype(int)
    spare = max(1, (10 - int(np.ptp(bins))) // 2)  # empty bars on either side, so that a single one is no wall
    first = max(0, bins.min() - spare)
    count = bins.max() + 1 + spare - first
    kept, dropped = (np.bincount(bins[chosen] - first, minlength=count) for chosen in (is_kept, ~is_kept))
    tick = max(1, int(round_up((kept + dropped).max() / 3)))
    top = math.ceil((kept + dropped).max() / tick) * tick
    left, right, ceiling, floor = 14 + 7 * len(f"{top:,}"), 316, 8, 136  # of the axes, in a picture of 320 x 156
    bar, clip = (right - left) / count, (floor - ceiling) / top
    marks = []
    for n in range(0, top + 1, tick):
        y = floor - n * clip
        marks.append(f'<line x1="{left}" x2="{right}" y1="{y:.3f}" y2="{y:.3f}"/>')
        marks.append(f'<text class="count" x="{left - 6}" y="{y + 4:.3f}">{n:,}</text>')
    labelled = next(k for k in (1, 2, 5, 10) if count <= 7 * k)
    for i in range(count):
        x, value = left + i * bar, number((first + i) * step)
        if (first + i) % labelled == 0:
            marks.append(f'<text x="{x + bar / 2:.2f}" y="{floor + 17}">{value}</text>')
        for kind, n, below in (("kept", kept[i], 0), ("dropped", dropped[i], kept[i])):
            if n:
                marks.append(
                    f'<rect class="{kind}" x="{x + 0.08 * bar:.2f}" width="{0.84 * bar:.2f}" '
                    f'y="{floor - (below + n) * clip:.3f}" height="{n * clip:.3f}">'
                    f"<title>about {value}: {kept[i]:,} kept, {dropped[i]:,} dropped</title></rect>"
                )
    least, middle, most = (number(np.quantile(values, share)) for share in (0, 0.5, 1))
    spread = f"all {least}" if least == most else f"{least} to {most}, median {middle}"
    return (
        f"<figure><figcaption>{name}<span>{spread}</span></figcaption>"
        f'<svg viewBox="0 0 320 156" role="img" aria-label="{name}: {spread}">{"".join(marks)}</svg></figure>'
    )


def round_up(value: float) -> float:
    """The smallest of ... 0.1, 0.2, 0.5, 1, 2, 5, 10, ... that is not below a positive number."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-9))


_CSS = """
:root { --page: #fafaf8; --panel: #fff; --ink: #1c1f24; --soft: #5b626d; --line: #e1e2e5;
  --kept: #2f6db0; --dropped: #a95b00 }
@media (prefers-color-scheme: dark) {
  :root { --page: #131518; --panel: #1b1e22; --ink: #e6e8eb; --soft: #9ba3ae; --line: #30343a;
    --kept: #6ba8e8; --dropped: #f0a343 }
}
* { box-sizing: border-box; margin: 0 }
body { max-width: 1240px; margin: auto; padding: 32px 20px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
header p, dt, dd, th, section > p, div > p, summary span, figcaption span { color: var(--soft) }
h1 { font-size: 28px; line-height: 1.2; font-weight: 650 }
h2 { font-size: 18px; font-weight: 650 }
section { margin-top: 40px }
.totals { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 20px; margin: 28px 0 }
.totals dt, .totals dd { font-size: 13px }
.totals dt + dd { font-size: 28px; line-height: 1.25; color: var(--ink) }
.verdict { padding: 14px 18px; background: var(--panel); border: 1px solid var(--line);
  border-left: 5px solid var(--kept); border-radius: 6px }
.verdict h2 { font-size: 16px }
.verdict ul { padding-left: 18px; margin-top: 6px }
.doubtful { border-left-color: var(--dropped) }
.legend i { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 2px }
.legend i + i { margin-left: 14px }
i.kept { background: var(--kept) }
i.dropped { background: var(--dropped); margin-left: 14px }
rect.kept { fill: var(--kept) }
rect.dropped { fill: var(--dropped) }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 24px; margin-top: 12px }
.plots figcaption { font-weight: 600 }
.plots span { display: block; font-size: 13px; font-weight: 400 }
svg { display: block; width: 100%; max-width: 380px; margin-top: 8px }
svg line { stroke: var(--line) }
svg text { fill: var(--soft); font-size: 12px; text-anchor: middle }
svg .count, svg .end { text-anchor: end }
svg .start { text-anchor: start }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 40px;
  align-items: start }
table { width: 100%; border-collapse: collapse; margin-top: 8px; font-size: 14px }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { font-weight: 400; font-size: 13px }
td:first-child { width: 45% }
.numbers td + td, .numbers th + th { text-align: right }
details { margin-top: 18px }
summary { padding: 6px 0; border-bottom: 1px solid var(--line); font-weight: 600; cursor: pointer }
summary span { font-weight: 400 }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 22px;
  margin-top: 14px }
.sheet img { display: block; width: 100%; max-height: 112px; object-fit: contain; background: var(--line);
  border-radius: 4px }
.sheet figcaption { margin-top: 6px; font-size: 13px; line-height: 1.4 }
.sheet figcaption > * { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden }
.sheet b { font-weight: 600 }
.sheet strong { color: var(--dropped); font-weight: 600 }
"""
