"""Runs small trainings on engines alone, each on ranks forked from one warm process: ranks.py FOLDER, then cases as JSON.

A whole training costs its imports per rank; here they are paid once, and a case takes a second. Per case and rank this writes
FOLDER/<case>.<rank>.json, and the gathered state after the last step as FOLDER/<case>.<rank>.safetensors.
"""

import json
import math
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from toolkit.engine.fsdp2 import Fsdp2Engine  # noqa: E402
from toolkit.engine.plain import AdamSettings, PlainEngine, State  # noqa: E402
from toolkit.engine.zero import ZeroEngine  # noqa: E402

ADAM = AdamSettings(weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, max_grad_norm=0.5)
GLOBAL_BATCH = 8
reductions: list[tuple[str, int]] = []


class Network(nn.Module):
    """A frozen layer with an adapter beside it, and a head; the sizes divide by no number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.base, self.down, self.up = nn.Linear(5, 16), nn.Linear(5, 3, bias=False), nn.Linear(3, 16, bias=False)
        self.head = nn.Linear(16, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.4, generator=generator)
        self.base.requires_grad_(False)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.head(nn.functional.silu(self.base(x_BD) + self.up(self.down(x_BD))))


def build(case: dict[str, Any], network: Network) -> Any:
    adapter = {name: p for name, p in network.named_parameters() if p.requires_grad}
    accumulation = GLOBAL_BATCH // case["micro_batch"] // case["ranks"]
    if case["kind"] == "plain":
        return PlainEngine(adapter, ADAM, accumulation)
    if case["kind"] == "fsdp2":
        return Fsdp2Engine(network, adapter, ADAM, accumulation, case.get("shard_ranks"))
    settings = json.loads((ROOT / f"ds_configs/{case['kind']}.json").read_text())
    return ZeroEngine(network, adapter, ADAM, accumulation, case["micro_batch"], settings)


def train(case: dict[str, Any], rank: int, folder: Path) -> None:
    network = Network()
    engine = build(case, network)
    start = 0
    if "resume" in case:
        start = case["start"]
        engine.scatter(load_state(folder / f"{case['resume']}.0.safetensors"), case.get("updates", start))
    losses, norms, counted = [], [], []
    for step in range(start, case["steps"]):
        reductions.clear()
        x_BD = torch.randn(GLOBAL_BATCH, 5, generator=torch.Generator().manual_seed(step))
        before = engine.gather() if step in case.get("still", []) else None
        reductions.clear()
        loss_sum = torch.zeros(())
        for own_BD in x_BD.split(case["micro_batch"])[rank :: case["ranks"]]:
            loss = (network(own_BD) - own_BD[:, :2]).square().mean()
            if step == case.get("poison") and rank == case["ranks"] - 1:
                hook = network.up.weight.register_hook(poisoned)
                engine.backward(loss)
                hook.remove()
            else:
                engine.backward(loss)
            loss_sum += loss.detach() * len(own_BD) / GLOBAL_BATCH
        norms.append(engine.step(0.02 / (1 + step), skip=step == case.get("skip")))
        counted.append(list(reductions))
        if before is not None:
            after = engine.gather()
            same = all(torch.equal(before[n][k].view(torch.int32), after[n][k].view(torch.int32)) for n in before for k in before[n])
            assert same, "state moved"
        dist.all_reduce(loss_sum)
        losses.append(loss_sum.item())
    state = engine.gather()
    report = {"losses": losses, "norms": norms, "updates": engine.updates, "reductions": counted}
    (folder / f"{case['name']}.{rank}.json").write_text(json.dumps(report))
    save_file({f"{n}/{k}": t for n, saved in state.items() for k, t in saved.items()}, folder / f"{case['name']}.{rank}.safetensors")
    engine.close()


def poisoned(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient.flatten()[5] = math.nan
    return gradient


def load_state(path: Path) -> State:
    state: State = {}
    for full_name, tensor in load_file(path).items():
        name, key = full_name.rsplit("/", 1)
        state.setdefault(name, {})[key] = tensor
    return state


def count(name: str) -> None:
    function = getattr(dist, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        sizes = [t.numel() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        reductions.append((name, max(sizes, default=0)))
        return function(*args, **kwargs)

    setattr(dist, name, counted)


def run_rank(case: dict[str, Any], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case["ranks"])}
    store = dist.FileStore(str(folder / f"{case['name']}.store"), case["ranks"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case["ranks"], timeout=timedelta(seconds=30))
    train(case, rank, folder)
    dist.destroy_process_group()


def main() -> None:
    folder = Path(sys.argv[1])
    import deepspeed  # noqa: F401

    for case in json.loads(sys.argv[2]):
        children = []
        for rank in range(case["ranks"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    run_rank(case, rank, folder)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(case["name"], codes, flush=True)


os.environ.setdefault("DS_ACCELERATOR", "cpu")
for name in ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base", "reduce_scatter_single", "all_gather_into_tensor", "all_gather", "broadcast", "all_gather_single"):
    if hasattr(dist, name):
        count(name)
if __name__ == "__main__":
    main()
