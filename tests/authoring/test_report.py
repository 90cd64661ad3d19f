"""The report shows all that was packed or an even part, and acts on nothing. Run: pytest tests/authoring/test_report.py"""

import io
import re
import tracemalloc
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from toolkit.authoring.plan import Kind, Reason
from toolkit.authoring.report import MAX_PICTURES, Card, find_doubts, write_report
from toolkit.page import histogram

VOID = {"meta", "img"}
HOSTILE = (
    "<script>alert(1)</script>.mp4",
    "\"'><img src=x onerror=alert(1)>.mkv",
    "</style></title></bdi><a href='http://x'>&amp;",
)


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text; an end tag that ends nothing is an error."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in tags]

    @property
    def pictures(self) -> list[bytes]:
        return [b64decode(image["src"].removeprefix("data:image/jpeg;base64,")) for image in self.of("img")]

    @property
    def text(self) -> str:
        return "".join(self.texts)


def jpeg(number: int) -> bytes:
    """A small picture that no other number has."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 4), (number % 256, number // 256, 90)).save(buffer, "JPEG", comment=str(number))
    return buffer.getvalue()


def make_card(number: int, **fields: object) -> Card:
    """A clip that raises no doubt among others."""
    card = Card(
        key=f"sign_{number:05d}",
        source=f"sign{number:05d}.mkv",
        start_s=0.0,
        fps=30.0,
        frames=60 + number % 7,
        height_px=480,
        width_px=640,
        motion=60.0 + number % 90,
        split="val" if number % 5 == 0 else "train",
        size_bytes=1000,
        reason=None,
        picture=jpeg(number),
        text=f"word {number}",
    )
    return replace(card, **fields)


def dropped_card(number: int, kind: Kind = Kind.NEAR_STATIC) -> Card:
    return make_card(number, reason=Reason(kind, f"{number} is below 9999"), size_bytes=0)


def report(
    folder: Path, cards: list[Card] | Iterator[Card], skipped: tuple = (), partly: tuple = (), **settings: str
) -> Page:
    write_report(folder / "report.html", "videos to shards", settings, cards, list(partly), list(skipped))
    return Page((folder / "report.html").read_text())


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    """Every tag is closed, pictures are inline, and the policy admits them and the one style sheet, by its hash."""
    page = report(tmp_path, [make_card(1), dropped_card(2)], [("a.avi", "0 frames")], clip_seconds="4")
    assert not page.of("script", "link", "a", "iframe", "object", "form", "base")
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset", "href")]
        assert attributes.get("src", "data:").startswith("data:image/jpeg;base64,") or "src" not in attributes
    source = (tmp_path / "report.html").read_text()
    [style] = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
    assert "url(" not in style and "@import" not in style and "http" not in source.replace("http-equiv", "")
    [policy] = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    digest = b64encode(sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"


@given(st.text(max_size=40))
@example(HOSTILE[0])
@example(HOSTILE[1])
@example(HOSTILE[2])
@example("x" * 5000)
@example("\u202egpj.exe\x00\n\x1b[31m")
def test_no_name_and_no_caption_becomes_a_tag(tmp_path_factory: pytest.TempPathFactory, hostile: str) -> None:
    """Whatever stands in whichever field, the tags are those of a page of harmless words, and the words are shown."""
    pages = []
    for words in (hostile, "harmless"):
        fields = {"key": f"k{words}", "source": f"s{words}", "split": f"p{words}", "text": f"t{words}"}
        cards = [make_card(1, **fields), make_card(2, **fields, reason=Reason(Kind.BLURRED, f"r{words}"))]
        folder = tmp_path_factory.getbasetemp()
        partly, skipped = [(f"c{words}", f"d{words}")], [(f"a{words}", f"b{words}")]
        write_report(folder / "report.html", f"n{words}", {f"o{words}": f"v{words}"}, cards, partly, skipped)
        pages.append(Page((folder / "report.html").read_text()))
    assert pages[0].tags == pages[1].tags
    shown = re.sub(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", " ", hostile)
    if len(hostile) < 290:
        visible = " ".join(pages[0].text.split())
        for field in "kstrovabcd":
            assert " ".join(f"{field}{shown}".split()) in visible


def test_names_that_are_no_unicode_are_shown(tmp_path: Path) -> None:
    """A file's name may hold any byte; Python reads such bytes as lone surrogates, which UTF-8 cannot write."""
    page = report(tmp_path, [make_card(1, source="caf\udce9.mp4")], [("\udcff.avi", "no video stream")])
    assert "caf\\udce9.mp4" in page.text and "\\udcff.avi" in page.text


def test_totals_are_those_of_the_cards(tmp_path: Path) -> None:
    """Videos, clips, length, size, reasons and skipped videos add up, and each picture shown is the clip's."""
    kept = [make_card(i, source=f"v{i // 2}.mkv", frames=90) for i in range(40)]
    black = [dropped_card(100 + i, Kind.NEAR_BLACK) for i in range(3)]
    static = [dropped_card(200), dropped_card(201)]
    page = report(tmp_path, [*kept, *black, *static], [("broken.avi", "0 frames")], [("v1.mkv", "stopped at 3 s")])
    tiles = re.sub(r"\s+", " ", " ".join(page.texts[page.texts.index("videos") : page.texts.index("as packed")]))
    assert tiles == (
        "videos 26 1 skipped clips kept 40 32 train, 8 val clips dropped 5 11% of 45 "
        "length kept 2 min 3,600 frames size 40.0 kB"
    )
    reasons = page.texts[page.texts.index("of all") + 1 :][:6]
    assert reasons == ["near-black", "3", "6.7%", "near-static", "2", "4.4%"]
    assert "broken.avi" in page.text and "stopped at 3 s" in page.text
    assert Counter(page.pictures) == Counter(card.picture for card in [*kept, *black, *static])
    for card in [*kept, *black, *static]:
        assert card.key in page.text and card.source in page.text and str(card.reason or card.text) in page.text


@given(
    st.lists(st.tuples(st.floats(0.03, 1000) | st.sampled_from([29.97, 30.0, 480, 1080]), st.booleans()), min_size=1)
)
def test_bars_measured_against_the_axes_are_the_clips(clips: list[tuple[float, bool]]) -> None:
    """Bar heights, read off by the labels as a person does, add up to the clips, and lie where their values do."""
    values, is_kept = np.array([value for value, _ in clips]), np.array([kept for _, kept in clips])
    svg = histogram("Length, s", values, is_kept)
    counts = [
        (float(y) - 4, float(n.replace(",", ""))) for y, n in re.findall(r'"count" x="\S+?" y="(\S+?)">(\S+?)<', svg)
    ]
    labels = [(float(x), float(v.replace(",", ""))) for x, v in re.findall(r'<text x="(\S+?)" y="\S+?">(\S+?)<', svg)]
    px_per_clip = (counts[0][0] - counts[-1][0]) / (counts[-1][1] - counts[0][1])
    value_per_px = (labels[-1][1] - labels[0][1]) / (labels[-1][0] - labels[0][0])
    total, weighted = 0.0, 0.0
    for kind, expected in (("kept", is_kept.sum()), ("dropped", (~is_kept).sum())):
        bars = re.findall(rf'class="{kind}" x="(\S+)" width="(\S+)" y="(\S+)" height="(\S+)"', svg)
        heights = [float(height) / px_per_clip for *_, height in bars]
        assert sum(heights) == pytest.approx(expected, abs=0.01)
        assert all(float(y) > 7.99 and float(y) + float(height) < 136.01 for _, _, y, height in bars)
        middles = [labels[0][1] + (float(x) + float(w) / 2 - labels[0][0]) * value_per_px for x, w, *_ in bars]
        total += sum(heights)
        weighted += sum(np.multiply(middles, heights))
    step = value_per_px * float(re.search(r'width="(\S+)"', svg)[1]) / 0.84
    assert abs(weighted / total - values.mean()) <= 0.52 * step


def test_near_rates_share_a_bar() -> None:
    """29.97 and 30 fps are one rate to a reader; one value alone is one bar among empty ones, not a wall."""
    rates = histogram("Frame rate, fps", np.array([29.97, 30, 29.83, 60]), np.array([True, True, True, False]))
    assert "29.83 to 60, median 29.98" in rates and "all 24" in histogram("x", np.full(3, 24.0), np.ones(3, bool))
    assert "about 30: 3 kept, 0 dropped" in rates and "about 60: 0 kept, 1 dropped" in rates
    [width] = re.findall(r'<rect class="kept" x=\S+ width="(\S+)"', rates.replace("dropped", "other"))
    assert float(width) < 60


def shown_keys(page: Page) -> list[int]:
    return [int(words.removeprefix("sign_")) for words in page.texts if re.fullmatch(r"sign_\d{5}", words)]


@pytest.mark.parametrize("clips", [240, 241, 1000, 4321])
def test_large_data_sets_show_an_even_part(tmp_path: Path, clips: int) -> None:
    """At most 240 pictures of kept clips, at even distances from the first to the last, and the page says so."""
    page = report(tmp_path, (make_card(i, split="train") for i in range(clips)))
    keys = shown_keys(page)
    gaps = set(np.diff(keys))
    assert len(page.pictures) == len(keys) and MAX_PICTURES / 2 <= len(keys) <= MAX_PICTURES
    assert len(gaps) == 1 and keys[0] == 0 and clips - keys[-1] <= max(gaps)
    assert (f"All {clips:,} are shown" if clips <= 240 else f"{len(keys)} of {clips:,} are shown") in page.text
    assert page.pictures == [jpeg(key) for key in keys]


def test_rare_groups_are_shown_whole(tmp_path: Path) -> None:
    """Where a thousand clips hide three of another kind, it is the thousand that are thinned out."""
    cards = [dropped_card(i, Kind.BLURRED if i in (7, 500, 999) else Kind.NEAR_BLACK) for i in range(1000)]
    cards += [make_card(2000 + i, split="val" if i in (1, 2) else "train") for i in range(600)]
    page = report(tmp_path, iter(cards))
    assert {7, 500, 999, 2001, 2002} <= set(shown_keys(page))
    assert "3 of 3" in page.text and "2 of 2" in page.text
    assert sum(key < 2000 for key in shown_keys(page)) <= 240 and sum(key >= 2000 for key in shown_keys(page)) <= 240


def test_pictures_that_are_not_shown_are_not_held(tmp_path: Path) -> None:
    """A generator of cards is gone through once, and 60 MB of pictures never lie in memory together."""
    made, held_bytes = [], []

    def cards() -> Iterator[Card]:
        tracemalloc.start()
        for i in range(3000):
            made.append(i)
            yield make_card(i, picture=bytes(20_000), reason=Reason(Kind.BLURRED, "2 of 9") if i % 2 else None)
        held_bytes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    page = report(tmp_path, cards())
    assert made == list(range(3000)) and 240 <= len(page.pictures) <= 480
    assert held_bytes[0] < 480 * 20_000 + 4e6


def test_the_same_cards_give_the_same_bytes(tmp_path: Path) -> None:
    """No date and no order of a hash table; an older report is replaced, and nothing is left beside it."""
    cards = [make_card(i) if i % 3 else dropped_card(i, list(Kind)[i % 5 % 3]) for i in range(700)]
    path = tmp_path / "report.html"
    report(tmp_path, iter(cards), [("x.avi", "0 frames")], a="1", b="2")
    before = path.read_bytes()
    path.write_text("an older report")
    report(tmp_path, cards, [("x.avi", "0 frames")], a="1", b="2")
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_nothing_at_all_is_a_page_too(tmp_path: Path) -> None:
    """No clips, no settings, nothing dropped or skipped: each part says none."""
    page = report(tmp_path, [])
    assert page.text.count("none\n") + page.text.count("none") >= 5 and page.text.count("no clips") == 4
    assert "Few clips were kept (0)" in page.text and not page.pictures


DOUBTS = {
    "50% of the clips were dropped, most for “near-static”": lambda c: [*c, *(dropped_card(i) for i in range(40))],
    "Few clips were kept (19)": lambda c: c[:19],
    "No clip is held out": lambda c: [replace(card, split="train") for card in c],
    "55% of the clips are held out": lambda c: (
        [replace(x, split="val") for x in c[:22]] + [replace(x, split="train") for x in c[22:]]
    ),
    "All clips come from one video": lambda c: [replace(card, source="a.mkv") for card in c],
    "52% of the kept clips come from one video, a.mkv": lambda c: [replace(x, source="a.mkv") for x in c[:21]] + c[21:],
    "Frame rates reach from 12.5 to 30 fps": lambda c: [replace(c[0], fps=12.5), *c[1:]],
    "Half of the kept clips hardly move": lambda c: [replace(card, motion=4 + card.motion % 5) for card in c],
    "Nearly all kept clips move alike": lambda c: [replace(card, motion=100 + card.motion % 3) for card in c],
}


def test_a_video_that_is_held_out_whole_is_no_part() -> None:
    """As a table may have it, for shards that others are judged on."""
    doubts = find_doubts([make_card(i, source="a.mkv", split="val") for i in range(40)])
    assert [doubt.split(" of ")[0] for doubt in doubts] == ["100%", "100%"]


@pytest.mark.parametrize("words", DOUBTS)
def test_what_looks_wrong_is_said(tmp_path: Path, words: str) -> None:
    """Each doubt alone is the one sentence on the page; a good data set raises none."""
    good = [make_card(i) for i in range(40)]
    assert find_doubts(good) == [] and "Nothing looks wrong" in report(tmp_path, good).text
    [doubt] = find_doubts(DOUBTS[words](good))
    assert doubt.startswith(words)
    text = report(tmp_path, DOUBTS[words](good)).text
    assert "One thing to look at before training" in text and doubt in text
