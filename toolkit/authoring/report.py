"""report.html: one page on which to look at a packed data set, kept and dropped, before training on it.

Test: pytest tests/authoring/test_report.py
"""

import math
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from toolkit.authoring.plan import Reason
from toolkit.data.files import written_aside
from toolkit.page import document, histogram, number, table, text

MAX_PICTURES = 240  # of kept and of dropped clips each: some 4 MB of page


@dataclass(frozen=True)
class Card:
    """One clip of the report: its picture is a JPEG of three frames side by side, its size_bytes 0 if it was dropped.

    reason  None where it was kept
    """

    key: str
    source: str
    start_s: float
    fps: float
    frames: int
    height_px: int
    width_px: int
    motion: float
    split: str
    size_bytes: int
    reason: Reason | None
    picture: bytes
    text: str = ""

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


class Sample:
    """At most `limit` cards of a stream, spread evenly over each group; where there are too many, the largest gives."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.totals: Counter[str] = Counter()
        self.cards: defaultdict[str, list[Card]] = defaultdict(list)
        self.strides: defaultdict[str, int] = defaultdict(lambda: 1)

    def add(self, group: str, card: Card) -> None:
        if self.totals[group] % self.strides[group] == 0:
            self.cards[group].append(card)
        self.totals[group] += 1
        if sum(map(len, self.cards.values())) > self.limit:
            largest = max(self.cards, key=lambda name: len(self.cards[name]))
            self.cards[largest] = self.cards[largest][::2]
            self.strides[largest] *= 2


def write_report(
    path: Path,
    title: str,
    settings: dict[str, str],
    cards: Iterable[Card],
    partly: list[tuple[str, str]],
    skipped: list[tuple[str, str]],
) -> None:
    """Write the page aside, sync and rename it; the same cards give the same bytes.

    settings  options and thresholds, as they shall be read
    cards     every clip, gone through once; only the pictures that are shown are held in memory
    partly    (video, reason) of the videos of which some frames lie in no clip
    skipped   (video, reason) of the videos that gave none
    """
    clips: list[Card] = []
    kept, dropped = Sample(MAX_PICTURES), Sample(MAX_PICTURES)
    for card in cards:
        clips.append(replace(card, picture=b"", text=""))
        if card.reason is None:
            kept.add(card.split, card)
        else:
            dropped.add(card.reason.kind.words, card)
    reasons = [(kind, f"{count:,}", f"{count / len(clips):.1%}") for kind, count in dropped.totals.most_common()]
    body = [
        f"<header><p>Packing report</p><h1>{text(title)}</h1></header>",
        _totals(clips, skipped),
        _verdict(find_doubts(clips)),
        _histograms(clips),
        "<section class=columns>",
        table("Settings", ("option", "value"), settings.items()),
        f"<div class=numbers>{table('Why clips were dropped', ('reason', 'clips', 'of all'), reasons)}</div>",
        "</section>",
        _contact_sheet("Kept clips", kept),
        _contact_sheet("Dropped clips", dropped),
        f"<section>{table('Videos used in part', ('video', 'reason'), partly)}</section>",
        f"<section>{table('Skipped videos', ('video', 'reason'), skipped)}</section>",
    ]
    with written_aside(path) as file:
        # The name of a file need not be Unicode.
        file.write(document(title, "\n".join(body)).encode(errors="backslashreplace"))


def find_doubts(clips: list[Card]) -> list[str]:
    """Say in sentences what about a packing looks wrong and what to do about it; empty where nothing does."""
    kept = [clip for clip in clips if clip.reason is None]
    doubts = []
    if len(kept) < 0.7 * len(clips):
        kind = Counter(clip.reason.kind.words for clip in clips if clip.reason).most_common(1)[0][0]
        doubts.append(
            f"{1 - len(kept) / len(clips):.0%} of the clips were dropped, most for “{kind}”: look at them below, and "
            "move the threshold if they are what you want to train on."
        )
    if len(kept) < 20:
        doubts.append(
            f"Few clips were kept ({len(kept)}), which an adapter soon knows by heart: add videos or cut shorter clips."
        )
    if not kept:
        return doubts
    held_out = sum(clip.split == "val" for clip in kept)
    if not held_out:
        doubts.append("No clip is held out for validation, so nothing will tell learning from memorizing.")
    elif held_out > len(kept) / 2:
        doubts.append(
            f"{held_out / len(kept):.0%} of the clips are held out for validation: lower --holdout, by which whole videos "
            "are, leave out the long ones, or name others in a column split of --captions."
        )
    source, count = Counter(clip.source for clip in kept).most_common(1)[0]
    if count == len(kept) and 0 < held_out < count:
        doubts.append(
            "All clips come from one video, and those held out are a part of it: they will not tell what becomes of other "
            "people, clothes and light; add videos."
        )
    elif count > len(kept) / 2:
        doubts.append(f"{count / len(kept):.0%} of the kept clips come from one video, {source}: add others.")
    slowest, fastest = min(clip.fps for clip in kept), max(clip.fps for clip in kept)
    if fastest > 2 * slowest:
        doubts.append(
            f"Frame rates reach from {number(slowest)} to {number(fastest)} fps, so neighbouring frames lie further "
            "apart in some clips than in others: pack them separately unless that is meant."
        )
    low, middle, high = np.percentile([clip.motion for clip in kept], (5, 50, 95))
    if middle < 10:
        doubts.append(f"Half of the kept clips hardly move (motion up to {middle:.0f} of 255): is there much to learn?")
    elif high - low < 5 and len(kept) > 1:
        doubts.append(f"Nearly all kept clips move alike (motion {low:.0f} to {high:.0f}): other motion will be new.")
    return doubts


def _totals(clips: list[Card], skipped: list[tuple[str, str]]) -> str:
    kept = [clip for clip in clips if clip.reason is None]
    val, dropped = sum(clip.split == "val" for clip in kept), len(clips) - len(kept)
    videos = {clip.source for clip in clips} | {name for name, _ in skipped}
    tiles = (
        ("videos", f"{len(videos):,}", f"{len(skipped):,} skipped"),
        ("clips kept", f"{len(kept):,}", f"{len(kept) - val:,} train, {val:,} val"),
        ("clips dropped", f"{dropped:,}", f"{dropped / max(1, len(clips)):.0%} of {len(clips):,}"),
        ("length kept", _duration(sum(clip.seconds for clip in kept)), f"{sum(clip.frames for clip in kept):,} frames"),
        ("size", _size(sum(clip.size_bytes for clip in kept)), "as packed"),
    )
    return "<dl class=totals>{}</dl>".format(
        "".join(f"<div><dt>{name}</dt><dd>{value}</dd><dd>{note}</dd></div>" for name, value, note in tiles)
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.1f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


def _size(size_bytes: int) -> str:
    power = min(3, int(math.log10(max(size_bytes, 1)) / 3))
    return f"{size_bytes / 1000**power:,.1f} {('B', 'kB', 'MB', 'GB')[power]}"


def _verdict(doubts: list[str]) -> str:
    if not doubts:
        return "<div class=verdict><h2>Nothing looks wrong by the numbers. Now look at the pictures.</h2></div>"
    count = "One thing" if len(doubts) == 1 else f"{len(doubts)} things"
    items = "".join(f"<li>{text(doubt)}</li>" for doubt in doubts)
    return f'<div class="verdict doubtful"><h2>{count} to look at before training</h2><ul>{items}</ul></div>'


def _histograms(clips: list[Card]) -> str:
    quantities = {
        "Frame rate, fps": [clip.fps for clip in clips],
        "Length, s": [clip.seconds for clip in clips],
        "Motion, 1 to 255": [clip.motion for clip in clips],
        "Shorter side, px": [min(clip.height_px, clip.width_px) for clip in clips],
    }
    is_kept = np.array([clip.reason is None for clip in clips], bool)
    plots = "".join(histogram(name, np.array(values, float), is_kept) for name, values in quantities.items())
    legend = "<p class=legend><i class=kept></i>kept<i class=dropped></i>dropped</p>"
    return f"<section><h2>Clips by frame rate, length, motion and size</h2>{legend}<div class=plots>{plots}</div></section>"


def _contact_sheet(title: str, sample: Sample) -> str:
    shown, total = sum(map(len, sample.cards.values())), sample.totals.total()
    if not total:
        return f"<section><h2>{title}</h2><p>none</p></section>"
    note = f"All {total:,} are shown" if shown == total else f"{shown:,} of {total:,} are shown, evenly spread"
    groups = "".join(
        f"<details open><summary>{text(name)} <span>{len(sample.cards[name]):,} of {count:,}</span></summary>"
        f"<div class=sheet>{''.join(map(_figure, sample.cards[name]))}</div></details>"
        for name, count in sample.totals.most_common()
    )
    return f"<section><h2>{title}</h2><p>{note}: first, middle and last frame of each.</p>{groups}</section>"


def _figure(card: Card) -> str:
    facts = f"{card.seconds:.2f} s · {number(card.fps)} fps · {card.width_px} × {card.height_px} px"
    lines = [
        f"<strong>{text(str(card.reason))}</strong>" if card.reason else "",
        f"<b>{text(card.key)}</b>",
        f"<span>{facts} · motion {card.motion:.0f}</span>",
        f"<span>from {card.start_s:.2f} s of {text(card.source)}</span>",
        f"<em>{text(card.text)}</em>" if card.text else "",
    ]
    jpeg = b64encode(card.picture).decode()
    return f'<figure><img alt="" src="data:image/jpeg;base64,{jpeg}"><figcaption>{"".join(lines)}</figcaption></figure>'
