"""Steps skipped because a loss or gradient was not finite: listed in skipped.jsonl; too many in a row end the run.

Test: pytest tests/faults/test_nonfinite.py. A broken number on one rank is one on all of them, since the sums of losses and
gradients are shared: so all ranks skip the same steps, and their weights stay as they were, bit by bit. The main rank alone
writes the list.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from torch import Tensor

from toolkit.engine.world import World
from toolkit.errors import UserError, list_some
from toolkit.run.rows import cut_rows, read_rows

NAME = "skipped.jsonl"


class Skips:
    """The skipped steps of a run.

    allowed   skipped steps in a row that the run puts up with
    in_a_row  of them, those just before the step that the run starts at
    """

    def __init__(self, run: Path, allowed: int, in_a_row: int, world: World) -> None:
        self.path = run / NAME
        self.allowed = allowed
        self.in_a_row = in_a_row
        self.world = world

    def note(self, step: int, loss: float, grad_norm: float, own: list[tuple[list[str], Tensor]]) -> None:
        """Count step `step`, from 1, and list the clips that may be at fault. All ranks call it after every step.

        own     keys of this rank's clips and their loss_B, by micro-batch
        raises  UserError on every rank when too many in a row were skipped
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        what = "gradient" if math.isfinite(loss) else "loss"
        # a clip of a finite loss is not to blame for another's; of a gradient alone nobody knows whose it was
        losses = [row for keys, loss_B in own for row in zip(keys, loss_B.tolist(), strict=True)]
        # each once: a step over the end of an epoch may hold a clip twice
        clips = [*dict.fromkeys(key for key, loss in losses if what == "gradient" or not math.isfinite(loss))]
        fault = ""
        texts = self.world.gather_texts(json.dumps(clips))
        if self.world.is_main:
            found = [(rank, clips) for rank, text in enumerate(texts) if (clips := json.loads(text))]
            rows = [{"step": step, "rank": rank, "not_finite": what, "clips": clips} for rank, clips in found]
            with self.path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            print(f"step {step} skipped: its {what} is not finite; the weights stay as they were; clips in {self.path}")
            fault = self._describe_too_many(step)
        fault, *_ = self.world.gather_texts(fault)
        if fault:
            raise UserError(fault)

    def _describe_too_many(self, step: int) -> str:
        if self.in_a_row < self.allowed:
            return ""
        rows = (row for row in read_rows(self.path) if row["step"] > step - self.in_a_row)
        keys = sorted({key for row in rows for key in row["clips"]})
        return (
            f"step {step}: {self.in_a_row} steps in a row were skipped, since their losses or gradients were not finite "
            f"(clips {list_some(keys)}, all in {self.path}); the weights are as they were before these steps; look at "
            "the clips, lower optimizer.lr, or set engine.precision fp32"
        )


def cut_skips(run: Path, step: int) -> None:
    """Drop the rows beyond a step, which a resumed run computes again; for the main rank, before the first step."""
    cut_rows(run / NAME, lambda row: row["step"] <= step)
