"""What a run says while it goes: a progress bar with ETA, a line per log step, log.jsonl and TensorBoard.

Test: pytest tests/run/test_monitor.py. log.jsonl holds one row per optimizer step, validation.jsonl one per look at held-out
clips; on resume, rows beyond the checkpoint are cut off and TensorBoard is told to purge them, so no step appears twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from toolkit.engine.world import World
from toolkit.run.best import Look, digest
from toolkit.run.board import FIGURES, Board
from toolkit.run.health import AdapterHealth
from toolkit.run.rows import cut_rows, read_rows
from toolkit.run.scores import Scores, join_scores, name_bins, split_by_sigma
from toolkit.run.timings import PAUSE, Spent, Timings
from toolkit.run.validate import Losses, name_overfitting

Item = TypeVar("Item")
LOG, FIGURES_LOG = "log.jsonl", f"{FIGURES}.jsonl"
BOUND = "bound"  # what it is called in a row, and on TensorBoard, where a sentence says it whenever it changes


class Monitor:
    """Measures and reports one run from a step and position on; on ranks other than the main one it does nothing.

    every   steps from one line and look at the adapter to the next
    edges   of the bins of sigma
    health  of the adapter, where it lies whole on the main rank
    recipe  settings that bear on the result, by their dotted names
    look    what losses on held-out clips depend on beside the weights
    """

    def __init__(
        self,
        run: Path,
        start: int,
        position: int,
        total: int,
        every: int,
        clips_per_step: int,
        edges: Sequence[float],
        health: AdapterHealth | None,
        recipe: Mapping[str, Any],
        look: Look,
        world: World,
    ) -> None:
        self.run, self.every, self.clips_per_step, self.total = run, every, clips_per_step, total
        self.start, self.step, self.position = start, start, position
        self.edges, self.health, self.recipe = edges, health, recipe
        self.scores: list[Scores] = []  # since the last line
        self.spent, self.all_spent = Spent(), Spent()  # since the last line, and before it
        self.warm = False  # a first step has been timed
        self.look = digest(look)
        self.bound: str | None = None  # what bounded the steps of the line before
        self.is_main = world.is_main
        if not self.is_main:
            return
        from tqdm import tqdm

        for name in (LOG, FIGURES_LOG):
            # at 0, what a start looked at that was killed before its first save
            cut_rows(run / name, lambda row: row["step"] <= (start or -1))
        self.looks = [
            (row["step"], row["validation_loss"], row["seen_loss"]) for row in read_rows(run / LOG)
            if None not in (row.get("validation_loss"), row.get("seen_loss"))
            and row.get("validation_look", self.look) == self.look  # older rows did not say
        ]  # fmt: skip
        self.named = name_overfitting(self.looks) is not None  # overfitting, which is said once
        self.log = (run / LOG).open("a")
        figures = {name for row in read_rows(run / FIGURES_LOG) for name in row if name != "step"}
        blocks = health.blocks if health is not None else ()
        self.board = Board(run / "tb", start, name_bins(edges), blocks, sorted(figures))
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, disable=None)
        self.timed_from = start, time.monotonic()  # a step, and when it was done, by which the time left is told
        self.timings = Timings(world.device)

    def timing(self, phase: str) -> contextlib.AbstractContextManager[Any]:
        """Book what happens in here as one of timings.PHASES."""
        return self.timings.phase(phase) if self.is_main else contextlib.nullcontext()

    def paused(self) -> contextlib.AbstractContextManager[Any]:
        """Time in here is not the step's."""
        return self.timing(PAUSE)

    def timed(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Pass batches on, booking the time spent waiting for each."""
        while True:
            with self.timing("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def report(
        self,
        step: int,
        scores: Scores,
        grad_norm: float,
        lr: float,
        skipped: int = 0,
        bad_clips: int = 0,
        validation: Losses | None = None,
    ) -> None:
        """Record optimizer step `step`, counted from 1, with the times of the newest step that are known (see timings.py).

        scores      of the clips of all ranks
        skipped     steps of the whole run until now that changed nothing
        bad_clips   different clips that it has replaced until now
        validation  losses on held-out clips, where this step took them
        """
        if not self.is_main:
            return
        self.step = step
        own, known = self.timings.end_step()
        self._book(known)
        self.scores.append(scores)
        row: dict[str, Any] = {
            "step": step, "clips": self.position + (step - self.start) * self.clips_per_step,
            "loss": scores.loss_B.mean().item(), "zero_baseline": scores.zero_B.mean().item(),
            "grad_norm": grad_norm, "lr": lr, "skipped_steps": skipped, "bad_clips": bad_clips,
            "clips_per_s": self.clips_per_step / own.total_s, "data_wait_share": own.parts_s["data"] / own.total_s,
            "memory_gib": peak_memory_gib(), "eta_s": self._left_s(),
        }  # fmt: skip
        if step == self.start + 1:  # it starts loader workers, captures and compiles, which later ones do not
            self._say(f"first step in {own.total_s:.1f} s")
            self.board.drop_recipe()
            self.timed_from = step, time.monotonic()
        if validation is not None:
            row |= {
                "validation_look": self.look, "validation_loss": validation.held_out, "seen_loss": validation.seen,
                "validation_by_sigma": validation.by_sigma, "validation_zero_by_sigma": validation.zero_by_sigma,
            }  # fmt: skip
            self.looks.append((step, validation.held_out, validation.seen))
        if known.steps:
            row["time_s"] = known.parts_s
        is_due = step % self.every == 0 or step == self.total
        if is_due:
            row |= self._look(step)
        row = without_infinities(row)
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        self.board.add_row(step, row)
        self.bar.update()
        if is_due:
            self._print(row)
        if validation is not None and (said := name_overfitting(self.looks)) and not self.named:
            self._say(said)
            self.named = True

    def report_figures(self, step: int, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Record how contenders do on held-out clips after a step: {figure: {contender: value}}."""
        if self.is_main:
            with (self.run / FIGURES_LOG).open("a") as file:
                file.write(json.dumps(without_infinities({"step": step, **figures})) + "\n")
            self.board.add_figures(step, figures)

    def show_strip(self, step: int, strip: Path) -> None:
        """Show pictures of held-out clips, a PNG file."""
        if self.is_main:
            self.board.add_picture(step, "samples/strip", strip)

    def show_video(self, step: int, tag: str, frames_TCHW: Tensor, fps: float) -> None:
        """Show uint8 frames moving."""
        if self.is_main:
            self.board.add_video(step, tag, frames_TCHW, fps)

    def conclude(self, over: bool) -> None:
        """After the last step: say what bounded the steps, and list the recipe of a run that is finished, or over, now."""
        if not self.is_main or self.step == self.start:
            return
        self.all_spent += self.spent
        if self.all_spent.steps:
            print(self.all_spent.describe())
            self.board.add_text(self.step, BOUND, f"the whole run: {self.all_spent.describe()}")
        if over or self.step == self.total:
            self.board.add_recipe(self.recipe)

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            self.board.close()
            self.log.close()

    def _book(self, spent: Spent) -> None:
        """Sum up what steps took, but for the first, which loads, captures and compiles."""
        if self.warm:
            self.spent += spent
        self.warm = self.warm or spent.steps > 0

    def _look(self, step: int) -> dict[str, Any]:
        """What a row holds beside, at a log step, of the steps since the last."""
        scores, self.scores = join_scores(self.scores), []
        self.board.add_histogram(step, "histogram/ln_sigma", scores.sigma_B.log())
        by_sigma = split_by_sigma(scores, self.edges)
        for name, own in by_sigma.items():
            self.board.add_histogram(step, f"histogram/loss/{name}", own.loss_B)
        bound = self.spent.find_bound()
        if bound is not None and bound != self.bound:
            self.board.add_text(step, BOUND, self.spent.describe())
            self.bound = bound
        self.all_spent, self.spent = self.all_spent + self.spent, Spent()
        return {
            "loss_by_sigma": {name: own.loss_B.mean().item() for name, own in by_sigma.items()},
            "zero_by_sigma": {name: own.zero_B.mean().item() for name, own in by_sigma.items()},
            **(self.health.measure() if self.health is not None else {}),
            **({BOUND: bound} if bound is not None else {}),
        }

    def _print(self, row: Mapping[str, Any]) -> None:
        numbers = {key: math.nan if row[key] is None else row[key] for key in ("loss", "zero_baseline", "grad_norm")}
        self._say(
            f"step {row['step']:>6,}  clips {row['clips']:>8,}  loss {numbers['loss']:.4f} (zero "
            f"{numbers['zero_baseline']:.4f})  gnorm {numbers['grad_norm']:.3f}  lr {row['lr']:.2e}  "
            f"{row['clips_per_s']:.2f} clips/s  wait {row['data_wait_share']:.0%}"
            + (f"  {row[BOUND]}-bound" if BOUND in row else "")
            + f"  mem {row['memory_gib']:.1f} GiB  eta {timedelta(seconds=round(row['eta_s']))}"
            + (
                f"  held-out {row['validation_loss']:.4f} (trained on {row['seen_loss']:.4f})"
                if None not in (row.get("validation_loss"), row.get("seen_loss"))
                else ""
            )
        )

    def _say(self, line: str) -> None:
        """Print above the bar, at once."""
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _left_s(self) -> float:
        step, then_s = self.timed_from
        return (time.monotonic() - then_s) / (self.step - step) * (self.total - self.step)


def peak_memory_gib() -> float:
    """Peak memory of this process: reserved on the GPU, or resident on a CPU-only machine.

    What is allocated leaves out the activations of passes that are replayed as CUDA graphs, whose memory stays reserved.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def without_infinities(value: Any) -> Any:
    """The same with None for each number that is not finite, for which JSON has no word."""
    if isinstance(value, Mapping):
        return {key: without_infinities(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
