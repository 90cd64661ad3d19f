"""Charts show what was logged, where it belongs. Run: pytest tests/commands/test_curves.py"""

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from toolkit.commands.curves import Point, chart, intervals, stack_charts, thin, training_charts, write_curves
from toolkit.errors import UserError

SVG = "{http://www.w3.org/2000/svg}"


def lines_of(drawn: str) -> list[list[tuple[float, float]]]:
    """The lines of a chart, as places in the picture."""
    lines = ElementTree.fromstring(drawn).iter(f"{SVG}polyline")
    return [[tuple(map(float, place.split(","))) for place in line.get("points").split()] for line in lines]


def texts_of(drawn: str) -> list[str]:
    return [text.text for text in ElementTree.fromstring(drawn).iter(f"{SVG}text")]


def values_of(drawn: str) -> list[float]:
    """What the dots of a chart say when pointed at, line after line."""
    return [float(dot.findtext(f"{SVG}title")) for dot in ElementTree.fromstring(drawn).iter(f"{SVG}circle")]


def test_lines_lie_on_their_axes() -> None:
    """Places are affine in x and y, up is more, and the numbers at the axes reach round all of them."""
    drawn = chart("a < b", {"one": [Point(0, 1.5), Point(4, 2.0)], "two & three": [Point(2, 3.0)]}, "step")
    (a, b), (c,) = lines_of(drawn)
    assert a[0] < c[0] < b[0] and c[0] == pytest.approx((a[0] + b[0]) / 2, abs=0.1)
    assert a[1] > b[1] > c[1] and (a[1] - b[1]) * 2 == pytest.approx(b[1] - c[1], abs=0.3)
    texts = texts_of(drawn)
    assert {"a < b", "one", "two & three", "step", "0", "2", "4", "1.5", "3"} <= set(texts)


def test_intervals_are_bars() -> None:
    """From low to high at the point's own place; a point without one has none."""
    drawn = chart("", {"one": [Point(0, 2.0, 1.0, 3.0), Point(1, 2.0)]}, "step")
    line, bar = lines_of(drawn)
    assert {place[0] for place in bar} == {line[0][0]}
    assert line[0][1] == pytest.approx((bar[0][1] + bar[1][1]) / 2, abs=0.1) and bar[0][1] > bar[1][1]


def test_flat_lines_and_single_points_are_drawn() -> None:
    """Nothing is divided by no range; nothing at all is no chart."""
    for line in ([Point(3, 0.0)], [Point(0, 7.0), Point(1, 7.0)], [Point(1, -1e6)]):
        for x, y in lines_of(chart("", {"flat": line}, ""))[0]:
            assert 0 <= x <= 380 and 0 <= y <= 256
    assert chart("", {"none": []}, "") == ""


def test_long_logs_are_averaged() -> None:
    """Each point of a thinned line is the mean of its share; what is missing or not finite does not count."""
    values = [(float(i), i % 2 + 0.0) for i in range(1000)] + [(1000.0, None), (1001.0, math.nan)]
    points = thin(values)
    assert len(points) == 200 and points[0] == Point(2.0, 0.4) and points[-1] == Point(997.0, 0.6)
    assert thin([(1, None)]) == [] and thin([(1, 5.0)]) == [Point(1, 5.0)]


def test_a_run_is_drawn_from_its_log(tmp_path: Path) -> None:
    """The losses and their baseline in one chart, a chart for each figure of its validation; all in one file."""
    with pytest.raises(UserError, match=f"there is no run folder {tmp_path}/nope; give one such as runs/NAME"):
        write_curves(tmp_path / "nope")
    with pytest.raises(UserError, match="has logged no step yet"):
        write_curves(tmp_path)
    rows = [
        {"step": i, "loss": 1 / i, "zero_baseline": 1.0}
        | ({"validation_loss": 0.5, "seen_loss": 0.4} if i == 4 else {})
        for i in (1, 2, 4)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    (drawn,) = training_charts(tmp_path)
    assert [len(line) for line in lines_of(drawn)] == [3, 3, 1, 1]
    assert {"loss", "zero prediction", "held-out", "clips trained on"} <= set(texts_of(drawn))
    row = {"step": 2, "psnr_moving": {"linear": 20.0, "tuned": 21.0}, "ssim": {"tuned": None}}
    (tmp_path / "validation.jsonl").write_text(json.dumps(row) + "\n")
    assert [len(lines_of(drawn)) for drawn in training_charts(tmp_path)] == [4, 2]
    written = write_curves(tmp_path)
    assert written == tmp_path / "samples/curves.svg"
    inner = [element for element in ElementTree.parse(written).getroot() if element.tag == f"{SVG}svg"]
    assert [element.get("y") for element in inner] == ["0", "256"]


def test_what_is_logged_beside_the_loss_is_drawn(tmp_path: Path) -> None:
    """By noise level as a share of what zero scores, the time but for the first step's, and the adapter's largest blocks."""
    blocks = {f"down_blocks.{i}.temporal": float(i) for i in range(12)}
    rows = [
        {"step": 1, "time_s": {"data": 60.0, "encode": 70.0}},
        {
            "step": 2, "time_s": {"data": 0.1, "encode": 0.2},
            "loss_by_sigma": {"2_1_to_9": 3.0}, "zero_by_sigma": {"2_1_to_9": 4.0},
            "adapter_norm": dict.fromkeys(blocks, 9.0), "update_ratio": dict.fromkeys(blocks, 9.0),
        },
        {
            "step": 3, "time_s": {"data": 0.3, "encode": 0.4},
            "loss_by_sigma": {"1_below_1": 1.0, "2_1_to_9": 2.0}, "zero_by_sigma": {"1_below_1": 2.0, "2_1_to_9": 8.0},
            "adapter_norm": blocks, "update_ratio": blocks,
        },
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row | {"loss": 1.0}) + "\n" for row in rows))
    _, by_sigma, time, norm, ratio = training_charts(tmp_path)
    assert texts_of(by_sigma)[-2:] == ["below 1", "1 to 9"] and values_of(by_sigma) == [0.5, 0.75, 0.25]
    assert texts_of(time)[-2:] == ["data", "encode"] and values_of(time) == [0.1, 0.3, 0.2, 0.4]
    assert texts_of(norm)[-8:] == texts_of(ratio)[-8:] == [f"down_blocks.{i}.temporal" for i in range(4, 12)]
    assert texts_of(norm)[0] == "adapter norm by block" and len(lines_of(norm)) == len(lines_of(ratio)) == 8


@pytest.mark.parametrize("is_chart", [True, False])
def test_names_below_a_chart_keep_apart(is_chart: bool) -> None:
    """However many and long they are, none covers another or leaves the picture, at six and a half pixels a letter."""
    for count, letters in ((1, 50), (3, 14), (3, 30), (4, 16), (8, 22), (9, 4)):
        names = [f"{i}".rjust(letters, "n") for i in range(count)]
        drawn = (
            chart("", {name: [Point(0, i)] for i, name in enumerate(names)}, "")
            if is_chart
            else intervals("", {name: {"row": (1.0, None, None)} for name in names}, "")
        )
        root = ElementTree.fromstring(drawn)
        _, _, width, height = map(float, root.get("viewBox").split())
        keys = [(float(key.get("x")), float(key.get("y"))) for key in root.iter(f"{SVG}rect")]
        assert len(keys) == count and max(y for _, y in keys) + 12 <= height
        for x, y in keys:
            ends = [other for other, row in keys if row == y and other > x] + [width]
            assert x + 13 + 6.5 * letters <= min(ends)


def test_means_lie_beside_each_other() -> None:
    """Places are affine in the value, with 0 among the marks; a bar reaches from low to high on the height of its dot."""
    series = {
        "on a": {"one": (1.0, 0.5, 2.0), "two": (-1.0, None, None)},
        "on b": {"one": (3.0, None, None)},
        "none": {},
    }
    root = ElementTree.fromstring(intervals("a < b", series, "dB"))
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter(f"{SVG}circle")]
    (bar,) = lines_of(intervals("a < b", series, "dB"))
    one, two, other = dots
    assert one[0] - two[0] == pytest.approx(other[0] - one[0], abs=0.2) and one[0] > two[0]
    assert bar[0][0] == pytest.approx((3 * one[0] + two[0]) / 4, abs=0.1) and bar[1][0] == pytest.approx(
        (one[0] + other[0]) / 2, abs=0.1
    )
    assert bar[0][1] == bar[1][1] == one[1] != other[1] and len({y for _, y in dots}) == 3
    assert {"a < b", "one", "two", "on a", "on b", "dB", "0"} <= set(texts_of(intervals("a < b", series, "dB")))
    (zero,) = [float(line.get("x1")) for line in root.iter(f"{SVG}line") if line.get("stroke-width") == "2"]
    assert zero == pytest.approx((one[0] + two[0]) / 2, abs=0.1)
    assert intervals("", {"on a": {}}, "dB") == ""
    for value in (-7.5, 7.5):  # all on one side of it
        assert "0" in texts_of(intervals("", {"on a": {"one": (value, None, None)}}, "dB"))


def test_charts_of_any_height_are_put_below_each_other() -> None:
    """None covers another, and the file is as high as all of them."""
    charts = [intervals("", {"on a": {str(i): (1.0, None, None) for i in range(n)}}, "") for n in (1, 5)]
    charts.append(chart("", {"one": [Point(-2, 1.0)]}, "rate", {-2: "1e-2"}))
    assert "1e-2" in texts_of(charts[-1])
    root = ElementTree.fromstring(stack_charts(charts))
    tops, heights = ([int(own.get(name)) for own in root if own.tag == f"{SVG}svg"] for name in ("y", "height"))
    assert tops == [0, heights[0], heights[0] + heights[1]] and heights[1] > heights[0]
    assert root.get("viewBox").endswith(f" {sum(heights)}")
