"""What a run says while it goes: a progress bar with ETA, a line per log step, log.jsonl and TensorBoard.

Test: pytest tests/run. log.jsonl holds one row per optimizer step; on resume, rows beyond the checkpoint are cut off and
TensorBoard is told to purge them, so no step appears twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from toolkit.run.checkpoint import replace_text

Item = TypeVar("Item")


class Monitor:
    """Measures and reports one run from a step and position on; on ranks other than the main one it only measures."""

    def __init__(
        self, run: Path, start: int, position: int, total: int, every: int, clips_per_step: int, is_main: bool
    ) -> None:
        self.every, self.clips_per_step, self.total = every, clips_per_step, total
        self.start, self.position = start, position
        self.wait_s = 0.0
        self.began_s = self.step_began_s = time.monotonic()
        self.is_main = is_main
        if is_main:
            self._open(run, start)

    def _open(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        cut_log(run / "log.jsonl", start)
        self.log = (run / "log.jsonl").open("a")
        self.board = SummaryWriter(str(run / "tb"), purge_step=start + 1)
        self.board.add_custom_scalars(
            {
                "loss": {
                    "against predicting zero": ["Multiline", ["loss/train", "loss/validation", "loss/zero_baseline"]]
                }
            }
        )
        self.bar = tqdm(total=self.total, initial=start, unit="step", dynamic_ncols=True, disable=None)

    def timed(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Pass batches on, counting the time spent waiting for each."""
        while True:
            began_s = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.wait_s += time.monotonic() - began_s
            yield batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not the step's."""
        began_s = time.monotonic()
        yield
        self.step_began_s += time.monotonic() - began_s

    def report(
        self,
        step: int,
        loss: float,
        zero: float,
        grad_norm: float,
        lr: float,
        skipped: int = 0,
        validation: float = math.inf,
    ) -> None:
        """Record optimizer step `step`, counted from 1.

        skipped     steps of the whole run until now that changed nothing
        validation  the loss on held-out clips, where this step took it
        """
        now_s = time.monotonic()
        step_s, self.step_began_s = now_s - self.step_began_s, now_s
        wait_share, self.wait_s = self.wait_s / step_s, 0.0
        if not self.is_main:
            return
        row: dict[str, Any] = {
            "step": step, "clips": self.position + (step - self.start) * self.clips_per_step,
            "loss": loss, "zero_baseline": zero, "grad_norm": grad_norm, "lr": lr, "skipped_steps": skipped,
            "clips_per_s": self.clips_per_step / step_s, "data_wait_share": wait_share, "memory_gib": peak_memory_gib(),
        } | ({"validation_loss": validation} if validation < math.inf else {})  # fmt: skip
        # JSON has no word for what is not finite
        row = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        for tag, key in _BOARD_TAGS.items():
            if row.get(key) is not None:
                self.board.add_scalar(tag, row[key], step)
        self.bar.update()
        if step % self.every == 0 or step == self.total:
            self.bar.write(
                f"step {step:>6,}  clips {row['clips']:>8,}  loss {loss:.4f} (zero {zero:.4f})  gnorm {grad_norm:.3f}  "
                f"lr {lr:.2e}  {row['clips_per_s']:.2f} clips/s  wait {wait_share:.0%}  mem {row['memory_gib']:.1f} GiB  "
                f"eta {self._eta(step, now_s)}" + (f"  held-out {validation:.4f}" if validation < math.inf else ""),
                file=sys.stdout,
            )
            sys.stdout.flush()

    def _eta(self, step: int, now_s: float) -> str:
        left_s = (now_s - self.began_s) / (step - self.start) * (self.total - step)
        return f"{left_s // 3600:.0f}:{left_s // 60 % 60:02.0f}:{left_s % 60:02.0f}"

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            self.board.close()
            self.log.close()


def peak_memory_gib() -> float:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU-only machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a file of rows; what a kill or a power cut left half written is none."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def cut_log(path: Path, step: int) -> None:
    """Drop the rows beyond a step."""
    rows = [row for row in read_log(path) if row["step"] <= step]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


_BOARD_TAGS = {
    "loss/train": "loss",
    "loss/validation": "validation_loss",
    "loss/zero_baseline": "zero_baseline",
    "optimizer/grad_norm": "grad_norm",
    "optimizer/lr": "lr",
    "optimizer/skipped_steps": "skipped_steps",
    "speed/clips_per_s": "clips_per_s",
    "speed/data_wait_share": "data_wait_share",
    "memory/peak_gib": "memory_gib",
}
