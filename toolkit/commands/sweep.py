"""A grid of training runs, judged side by side: each combination of some fields' values, with several seeds.

Test: pytest tests/commands/test_sweep.py. A run is an ordinary one, started by launch/train.py and judged by
launch/evaluate.py as a person would; what is finished is not done again. In RUNS_DIR/NAME stand the runs, recipes/, and
what came out: sweep.json, sweep.md, sweep.svg. Clips are the unit of every interval: a clip's figure is first averaged over
the seeds.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.commands.curves import intervals, stack_charts
from toolkit.commands.doctor import examine, list_ranks
from toolkit.commands.launcher import default_ranks, program, training_command
from toolkit.commands.report import NAMES
from toolkit.config import RunConfig, dump_config, load_config, parse_yaml, read_yaml
from toolkit.data.index import open_sources
from toolkit.errors import UserError
from toolkit.parallel import parse_part
from toolkit.run.checkpoint import checkpoint_step, find_best, list_checkpoints, replace_text
from toolkit.run.folder import check_folder
from toolkit.run.job import is_finished
from toolkit.run.judge import check_gaps, compare, describe, find_figure, main_figure, own_gaps
from toolkit.run.signals import REQUEUE, STOP_FILE, Requests

SYNTAX = (
    'give fields with lists of values, "{lora.rank: [4, 16]}", or a word with named settings, "{rank: {low: {lora.rank: 4}, '
    'high: {lora.rank: 64}}}", or a YAML file of these'
)
OWN_FIELDS = ("name", "runs_dir", "seed")  # which the sweep sets
MOST_LETTERS = 200  # of a folder's name
OTHERS = ("base", "linear")  # what the tuned network is compared with

Settings = dict[str, Any]  # by dotted field


@dataclass(frozen=True)
class Point:
    """One run of a sweep: a combination of values, with one seed."""

    combination: str
    settings: Settings
    config: RunConfig

    @property
    def evaluation(self) -> Path:
        """What launch/evaluate.py finds; in a folder of its own, so that an evaluation by hand does not replace it."""
        return self.config.folder / "evaluation/evaluation.json"


def run_sweep(
    recipe: str,
    name: str,
    grid: str,
    seeds: int = 1,
    gaps: Sequence[int] = (),
    ranks: int | None = None,
    part: str = "1/1",
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Train and judge what is not finished yet of a sweep, and sum up what there is.

    grid     see SYNTAX
    seeds    runs of each combination, from the recipe's seed on
    gaps     source frames between the two ends, at which all are judged; default those of the recipe
    ranks    processes of a run; default as many as there are GPUs, or two, where its batch can be shared out so
    part     i/N: only the i-th run of every N, as one of N machines; whoever ends sums up what there is by then
    returns  the sweep's folder
    raises   UserError for what some run would refuse, before the first begins; and at the end where some failed.
             SystemExit(REQUEUE) where a signal asked for the end
    """
    turn, of = parse_part(part)
    points = plan_sweep(recipe, name, grid, seeds, overrides or {})
    folder = Path(points[0].config.runs_dir)
    own = points[turn - 1 :: of]
    clips = check_points(points, gaps, ranks)
    todo = [
        point for point in own if not (is_finished(point.config, clips[point.config.name]) and is_judged(point, gaps))
    ]
    print(
        f"{folder}: {len(own)} runs, {len(own) - len(todo)} of them finished and judged; {len(todo)} to go", flush=True
    )
    failed, began_s = [], time.monotonic()
    with Requests() as requests:
        for done, point in enumerate(todo, start=1):
            print(f"\n=== {done} of {len(todo)}: {point.config.name}", flush=True)
            if not (
                train_point(point, clips[point.config.name], ranks, requests) and judge_point(point, gaps, requests)
            ):
                failed.append(point.config.name)
            each_s = (time.monotonic() - began_s) / done
            if done < len(todo):
                print(
                    f"{each_s:.0f} s a run so far: about {each_s * (len(todo) - done) / 60:.0f} min to go", flush=True
                )
    judged = [
        point for point in points if is_finished(point.config, clips[point.config.name]) and is_judged(point, gaps)
    ]
    if judged:
        write_summary(folder, sum_up(judged))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(own)} runs failed, {', '.join(failed)}: their own words stand above; the same command "
            "tries these again"
        )
    if len(judged) < len(points):
        print(f"{len(judged)} of {len(points)} runs are judged; the parts still at work sum up again when they end")
    return folder


def parse_grid(grid: str) -> dict[str, Settings]:
    """Read a grid; returns the settings of each combination, by its name: {"rank-4_objective-v": {field: value}}."""
    text = grid.strip()
    tree = parse_yaml(text, "--grid") if text.startswith("{") else read_yaml(text, "the grid", SYNTAX)
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"--grid {grid} holds no field to vary; {SYNTAX}")
    axes = [_read_axis(str(key), values, list(tree)) for key, values in tree.items()]
    combinations: dict[str, Settings] = {}
    for chosen in product(*(axis.items() for axis in axes)):
        name = "_".join(label for label, _ in chosen)
        merged = {field: value for _, settings in chosen for field, value in settings.items()}
        if len(merged) < sum(len(settings) for _, settings in chosen):
            raise UserError(f"--grid sets a field twice in {name}; let one entry of it vary each field")
        if len(name) > MOST_LETTERS:
            raise UserError(
                f"--grid makes names of over {MOST_LETTERS} letters, as {name}; name its settings; {SYNTAX}"
            )
        combinations[name] = merged
    return combinations


def _read_axis(key: str, values: Any, keys: Sequence[Any]) -> dict[str, Settings]:
    """The choices of one entry of a grid, by their labels."""
    if not isinstance(values, list | dict) or not values:
        raise UserError(f"--grid has {values!r} for {key}, which is no list and no named settings; {SYNTAX}")
    if isinstance(values, dict):
        wrong = next((name for name, settings in values.items() if not isinstance(settings, dict)), None)
        if wrong is not None:
            raise UserError(f"--grid has {values[wrong]!r} for {wrong} of {key}, which sets no field; {SYNTAX}")
        named = [(key, name, settings) for name, settings in values.items()]
    else:
        leaf = key.rpartition(".")[2]
        alone = sum(str(other).rpartition(".")[2] == leaf for other in keys) == 1
        named = [(leaf if alone else key, value, {key: value}) for value in values]
    axis: dict[str, Settings] = {}
    for word, value, settings in named:
        label = f"{_spell(word)}-{_spell(value)}"
        if label in axis:
            raise UserError(
                f"--grid has two choices of {key} that would be called {label}; give them names of their own; {SYNTAX}"
            )
        axis[label] = {str(field): given for field, given in settings.items()}
    return axis


def _spell(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).replace("+", "").strip("-.") or "none"


def plan_sweep(recipe: str, name: str, grid: str, seeds: int, overrides: Mapping[str, Any]) -> list[Point]:
    """List all runs, the seeds of a combination one after another. Raises UserError for what a recipe cannot say."""
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; give 1 or more")
    base = load_config(recipe, {**overrides, "name": name})
    if (base.folder / "config.yaml").exists():
        raise UserError(f"{base.folder} is the folder of a run; choose another --name for the sweep")
    points = []
    for combination, settings in parse_grid(grid).items():
        for field in settings:
            if field in OWN_FIELDS or field in overrides:
                given = "the sweep's own" if field in OWN_FIELDS else "given as a flag as well"
                raise UserError(f"--grid varies {field}, which is {given}; take it out")
        for seed in range(base.seed, base.seed + seeds):
            own = {"name": f"{combination}_seed-{seed}", "runs_dir": str(base.folder), "seed": seed}
            try:
                points.append(Point(combination, settings, load_config(recipe, {**overrides, **settings, **own})))
            except UserError as error:
                raise UserError(f"{combination}: {error}") from None
    return points


def check_points(points: Sequence[Point], gaps: Sequence[int], ranks: int | None) -> dict[str, int]:
    """Raise UserError for what training or judging would refuse, and say how long runs are; returns the clips that each
    trains on, by its name."""
    clips: dict[str, int] = {}
    looked_at: dict[str, int] = {}
    notes: list[str] = []
    for point in points:
        config = point.config
        try:
            if point.combination not in looked_at:  # seeds are alike
                looked_at[point.combination] = len(open_sources(config.data, "train"))
                check_gaps(config, gaps or own_gaps(config))
                found = examine(config, ranks_of(config, ranks))
                notes += [f"note: {note}" for note in found["notes"]]
                if {"lora.rank", "lora.alpha"} & point.settings.keys() == {"lora.rank"}:
                    notes.append(
                        "note: lora.rank varies without lora.alpha, and so alpha / rank, the adapter's scale, as well"
                    )
                print(f"{point.combination}: {found['optimizer_steps']:,} steps, {found['ranks']} processes a run")
            check_folder(config, remedy=f"choose another --name for the sweep, or move {config.folder} away")
        except UserError as error:
            raise UserError(f"{point.combination}: {error}") from None
        clips[config.name] = looked_at[point.combination]
    print("\n".join(dict.fromkeys(notes)), end="\n" * bool(notes), flush=True)
    return clips


def ranks_of(config: RunConfig, ranks: int | None) -> int:
    """Processes of a run: those asked for, or as many as there is room for and its batch can be shared out to."""
    if ranks is not None:
        return ranks
    room = default_ranks()
    return max((count for count in list_ranks(config) if count <= room), default=room)


def train_point(point: Point, clips: int, ranks: int | None, requests: Requests) -> bool:
    """Train a run to its end, or on from where it stopped; returns whether it got there."""
    config = point.config
    if is_finished(config, clips):
        return True
    recipe = Path(config.runs_dir) / f"recipes/{config.name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    replace_text(recipe, dump_config(config))

    def ask(_: subprocess.Popen[bytes]) -> None:
        # no signal: DeepSpeed's launcher would die of it, and leave its ranks
        if (config.folder / "config.yaml").exists():
            (config.folder / STOP_FILE).touch()

    code = follow([*training_command(ranks_of(config, ranks)), "--config", str(recipe)], requests, ask)
    return is_finished(config, clips) or give_up("training", code, requests)


def judge_point(point: Point, gaps: Sequence[int], requests: Requests) -> bool:
    """Evaluate a finished run; returns whether that succeeded."""
    if is_judged(point, gaps):
        return True
    command = [sys.executable, program("launch/evaluate.py"), "--run", str(point.config.folder)]
    command += ["--gaps", ",".join(map(str, gaps))] if gaps else []
    # the newest of a run that ended for want of a better one is not its best
    command += ["--checkpoint", "best"] if point.config.validation.patience is not None else []
    code = follow([*command, "--out", str(point.evaluation.parent)], requests, subprocess.Popen.terminate)
    return is_judged(point, gaps) or give_up("evaluation", code, requests)


def is_judged(point: Point, gaps: Sequence[int]) -> bool:
    """Whether a finished run was evaluated by its recipe, at these gaps, and of it the checkpoint that counts."""
    best = find_best(point.config.folder) if point.config.validation.patience is not None else None
    # not LATEST, before which a kill can come; and not by the clock, which may have been set back meanwhile
    step = checkpoint_step(list_checkpoints(point.config.folder)[-1]) if best is None else best.step
    try:
        told = json.loads(point.evaluation.read_text())
        judged = checkpoint_step(Path(told["judged"]["tuned"]))
    except (FileNotFoundError, ValueError, KeyError):  # none yet, or one that a power cut has spoilt
        return False
    wanted = {str(gap) for gap in gaps or own_gaps(point.config)}
    return judged == step and told.get("recipe") == point.config.model_dump(mode="json") and set(told["gaps"]) == wanted


def follow(command: list[str], requests: Requests, ask: Callable[[subprocess.Popen[bytes]], None]) -> int:
    """Run a command, showing it; returns its exit code. ask: told to end it where a signal asks for the end, each second."""
    print(f"$ {shlex.join(command)}", flush=True)
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if requests.read(None).yields:
                ask(process)


def give_up(stage: str, code: int, requests: Requests) -> bool:
    """Leave where the end was asked for; else say what failed, and go on without it."""
    if code == REQUEUE or requests.read(None).yields:
        print("the sweep was asked to end; the same command goes on", file=sys.stderr)
        raise SystemExit(REQUEUE)
    print(
        f"{stage} ended with exit code {code} before it was done; its own words stand above",
        file=sys.stderr,
        flush=True,
    )
    return False


def sum_up(points: Sequence[Point]) -> dict[str, Any]:
    """Put judged runs side by side: what sweep.json holds.

    returns  {command, combinations: {name: settings}, runs: {run: folder}, tables: [...]}; a table for each gap and set of
             held-out clips: {gap, size_px, keys, rows: {combination: {seeds, figures: {linear, base, tuned: {figure:
             describe}}, against: {base, linear, first: {figure: compare}}}}}; first is the table's first combination, tuned
    """
    tables: dict[str, dict[str, Any]] = {}
    gathered: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for point in points:
        data = point.config.data
        for gap, own in json.loads(point.evaluation.read_text())["gaps"].items():
            same = {"gap": int(gap), "size_px": [data.height, data.width], "keys": own["keys"]}
            key = json.dumps(same)
            tables.setdefault(key, same | {"rows": {}})
            gathered.setdefault((key, point.combination), []).append((point.config.seed, own["per_clip"]))
    for (key, combination), runs in gathered.items():
        first = next((gathered[key, name] for name in tables[key]["rows"]), None)
        tables[key]["rows"][combination] = sum_up_row(runs, first)
    return {
        "command": whole_command(sys.argv),
        "combinations": {point.combination: point.settings for point in points},
        "runs": {point.config.name: str(point.config.folder) for point in points},
        "tables": sorted(tables.values(), key=lambda table: table["gap"]),
    }


def whole_command(words: Sequence[str]) -> str:
    """The command line without --part and its value: what does the sweep on one machine."""
    pairs = pairwise(["python", *words])
    kept = [word for before, word in pairs if "--part" not in (before, word) and not word.startswith("--part=")]
    return shlex.join(["python", *kept])


SeedRuns = Sequence[tuple[int, Mapping[str, Any]]]  # of each seed what evaluation.json holds of each clip, by contender


def sum_up_row(runs: SeedRuns, first: SeedRuns | None = None) -> dict[str, Any]:
    """Figures of a combination, and what it gains, over clips whose figures are means over the seeds.

    first  runs of another combination on the same clips, with which it is compared too
    """
    means = average_seeds(runs)
    others = {other: means[other] for other in OTHERS}
    if first is not None:
        others["first"] = average_seeds(first)["tuned"]
    return {
        "seeds": [seed for seed, _ in runs],
        "figures": {label: {n: describe(own_B) for n, own_B in figures.items()} for label, figures in means.items()},
        "against": {
            other: {
                name: compare(name, own_B, values[name]) for name, own_B in means["tuned"].items() if name in values
            }
            for other, values in others.items()
        },
    }


def average_seeds(runs: SeedRuns) -> dict[str, dict[str, Tensor]]:
    """The mean over the seeds of each clip's figures: {contender: {figure: (B,) fp64}}."""

    def average(contender: str, figure: str) -> Tensor:
        values_SB = torch.tensor(
            [[float("nan") if v is None else v for v in clips[contender][figure]] for _, clips in runs],
            dtype=torch.float64,
        )
        return values_SB.mean(0)

    names = list(runs[0][1]["tuned"])
    return {label: {name: average(label, name) for name in names} for label in ("linear", "base", "tuned")}


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write sweep.json, sweep.md and sweep.svg, and print the tables."""
    text = to_markdown(summary)
    replace_text(folder / "sweep.json", json.dumps(summary, indent=2) + "\n")
    replace_text(folder / "sweep.md", text)
    replace_text(folder / "sweep.svg", stack_charts(list_charts(summary)))
    print(f"\n{text}\nwrote {folder}/sweep.json, sweep.md and sweep.svg")


def to_markdown(summary: dict[str, Any]) -> str:
    """A table for each gap and set of clips, a row for each combination."""
    lines = []
    for table in summary["tables"]:
        figure = figure_of(table)
        head = ["", "seeds", *(NAMES.get(label, label) for label in ("linear", "base", "tuned"))]
        head += [f"gain on {NAMES[other]} [95 %]" for other in OTHERS] + [f"better than {NAMES['base']}"]
        first, *others = table["rows"]
        head += [f"gain on {first} [95 %]"] * bool(others)
        lines += [f"{title_of(table)}; {find_figure(figure).label}, dB", ""]
        lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for name, row in table["rows"].items():
            gain = row["against"]["base"][figure]
            cells = [name, str(len(row["seeds"]))]
            cells += [_show(row["figures"][label][figure], "") for label in ("linear", "base", "tuned")]
            cells += [_show(row["against"][other][figure], "+") for other in OTHERS]
            cells.append(f"{gain['improved']} of {gain['clips']} clips")
            if others:
                cells.append("" if name == first else _show(row["against"]["first"][figure], "+"))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        if len({json.dumps(row["figures"]["linear"][figure]) for row in table["rows"].values()}) > 1:
            lines += [
                "The blend scores differently where other frames are made of a clip: compare gains, not figures.",
                "",
            ]
    lines += [
        "Intervals are over clips, of whose figures the mean over the seeds is taken first. Of twenty settings that change",
        "nothing, one leaves 0 by chance. By:",
        "",
        f"    {summary['command']}",
        "",
    ]
    return "\n".join(lines)


def _show(figure: dict[str, Any], sign: str) -> str:
    if figure["mean"] is None:
        return "-"
    interval = f" [{figure['low']:{sign}.2f}, {figure['high']:{sign}.2f}]" if sign and figure["low"] is not None else ""
    return f"{figure['mean']:{sign}.2f}{interval}"


def title_of(table: dict[str, Any]) -> str:
    height, width = table["size_px"]
    return f"Gap of {table['gap']} source frames, {len(table['keys'])} held-out clips of {height}x{width}"


def figure_of(table: dict[str, Any]) -> str:
    """What a table shows: the main figure, of the middle frame, which every layout makes."""
    return main_figure(*(row["figures"]["linear"] for row in table["rows"].values())) + "_middle"


def list_charts(summary: dict[str, Any]) -> list[str]:
    """For each table the gains of its combinations, with their intervals."""
    charts = []
    for table in summary["tables"]:
        figure = figure_of(table)
        labels = {other: NAMES[other] for other in OTHERS} | {"first": next(iter(table["rows"]))}
        gains = {
            f"on {label}": {
                name: (gain["mean"], gain["low"], gain["high"])
                for name, row in table["rows"].items()
                if other in row["against"] and (gain := row["against"][other][figure])["mean"] is not None
            }
            for other, label in labels.items()
        }
        charts.append(intervals(title_of(table), gains, f"gain in {find_figure(figure).label}, dB"))
    return [drawn for drawn in charts if drawn]
