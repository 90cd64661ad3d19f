"""Draw the pictures of docs/FINDINGS.md from what its commands leave: python docs/figures.py [RUNS].

helps.svg, lora_scale.svg and forgotten.svg; findings.svg is the sweep's own first chart of a gap of 8.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the file runs from any folder
from toolkit.commands.curves import Interval, Point, chart, intervals, stack_charts  # noqa: E402

FIGURE, AXIS = "psnr_moving_middle", "gain in middle moving PSNR, dB"
OTHERS = {"base": "on untuned base", "linear": "on linear blend"}
SCALES = (0.5, 0.7, 0.8, 0.9, 1)


def draw(runs: Path, pictures: Path) -> None:
    """Read the sweep `asl` below runs, with the evaluations in it, and write the three pictures."""
    tables = json.loads((runs / "asl/sweep.json").read_text())["tables"]
    gaps = {f"gap of {table['gap']}": next(iter(table["rows"].values()))["against"] for table in tables}
    helps = intervals("Signing, 10 held-out clips, 3 seeds", compare(gaps), AXIS)
    tuned = {f"seed {seed}": read_gains(runs / "asl/forgotten")[f"rank-32_seed-{seed}"] for seed in range(3)}
    forgotten = intervals("Other motion, 24 held-out clips, gap of 8", compare(tuned), AXIS)
    scaled = {f"signing, seed {seed}": runs / f"asl/scale_{seed}" for seed in range(3)}
    scaled["other motion, seed 0"] = runs / "asl/scale_motion"
    lines = {name: draw_scales(read_gains(folder)) for name, folder in scaled.items()}
    lora_scale = chart("gain on the untuned base, dB", lines, "lora_scale")
    for name, drawn in (("helps", helps), ("forgotten", forgotten), ("lora_scale", lora_scale)):
        (pictures / f"{name}.svg").write_text(stack_charts([drawn]))


def read_gains(folder: Path) -> dict[str, Any]:
    """What each contender gains at a gap of 8, as evaluation.json has it."""
    gains: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())["gaps"]["8"]["against"]
    return gains


def compare(rows: Mapping[str, Any]) -> dict[str, dict[str, Interval]]:
    """{on what: {row: its gain}} of {row: {other: {figure: gain}}}."""
    return {
        label: {name: read_interval(against[other]) for name, against in rows.items()}
        for other, label in OTHERS.items()
    }


def draw_scales(gains: Mapping[str, Any]) -> list[Point]:
    """A line from the untuned base at 0 on."""
    return [Point(0, 0), *(Point(x, *read_interval(gains[f"lora_scale {x:g}"]["base"])) for x in SCALES)]


def read_interval(gains: Mapping[str, Any]) -> Interval:
    return gains[FIGURE]["mean"], gains[FIGURE]["low"], gains[FIGURE]["high"]


if __name__ == "__main__":
    draw(Path(sys.argv[1] if sys.argv[1:] else "runs"), ROOT / "docs/pictures")
