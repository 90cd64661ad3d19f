"""Runs launch/train.py with every gradient reduction written down: traced.py OUT.json, then launch/train.py's own flags."""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

reduced: list[int] = []  # elements of each reduction since the last step's end


def count(function: Any) -> Any:
    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(tensor, "numel"):
            reduced.append(tensor.numel())
        return function(tensor, *args, **kwargs)

    return counted


# before DeepSpeed is imported: it takes its own references
for name in ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base"):
    setattr(dist, name, count(getattr(dist, name)))

from launch.train import train  # noqa: E402
from toolkit.cli import main  # noqa: E402
from toolkit.engine.zero import ZeroEngine  # noqa: E402

out, steps = Path(sys.argv.pop(1)), []
step = ZeroEngine.step


def traced_step(engine: ZeroEngine, *arguments: Any) -> float:
    norm = step(engine, *arguments)
    steps.append(reduced[:])
    reduced.clear()
    return norm


ZeroEngine.step = traced_step
main(train)
out.write_text(json.dumps(steps))
