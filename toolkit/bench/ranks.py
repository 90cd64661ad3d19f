"""What measurements on several ranks share: an adapter of the published shapes without its network, and real processes.

Test: pytest tests/bench/test_ranks.py. The adapter alone makes steps whose time is the engine's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.config import DataConfig, EngineConfig, LoraConfig, RunConfig
from toolkit.engine.world import World, init_world
from toolkit.errors import UserError
from toolkit.model.flat import FlatAdapter
from toolkit.model.lora import inject_lora
from toolkit.model.unet import SVD_CONFIG, FramerUNet
from toolkit.rng import rng
from toolkit.run.job import make_engine

ACCUMULATION, LR = 4, 1e-4
TOKENS = 8


class AdapterAlone(nn.Module):
    """The LoRA matrices that the published description trains, under their names in the network, each a layer."""

    def __init__(self, lora_rank: int, device: torch.device) -> None:
        """lora_rank  64 gives 13,279,232 parameters in 256 tensors"""
        super().__init__()
        generator = rng(0, "bench_adapter")
        for name, parameter in inject_lora(
            build_unet_on_meta(), LoraConfig(rank=lora_rank, alpha=lora_rank), 0
        ).items():
            outputs, inputs = parameter.shape
            *path, last, _ = name.split(".")
            parent: nn.Module = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            layer = nn.Linear(inputs, outputs, bias=False, device=device)
            layer.weight.data.copy_(torch.randn(outputs, inputs, generator=generator) * 0.02)
            parent.add_module(last, layer)
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        self.pairs = tuple(zip(layers[::2], layers[1::2], strict=True))  # in a tuple, so not registered twice
        self.flat: Any = None  # set where an engine of ours trains it

    def forward(self, k: int) -> Tensor:
        """Loss of micro-batch k: what the pairs make of a few tokens of noise, squared."""
        if self.flat is not None:
            self.flat.spread(self.flat())
        dtype, device = self.pairs[0][0].weight.dtype, self.pairs[0][0].weight.device
        noise_NI = torch.randn(TOKENS, 2048, generator=rng(0, "bench_tokens", k)).to(device, dtype)
        outputs = [b(a(noise_NI[:, : a.in_features])) for a, b in self.pairs]
        return torch.stack([output.float().square().mean() for output in outputs]).sum()


def build_unet_on_meta() -> FramerUNet:
    """The published network, frozen, shapes without values."""
    with torch.device("meta"):
        unet = FramerUNet.from_config({**SVD_CONFIG, "in_channels": 9})
    return unet.requires_grad_(False)


def make_engine_of(kind: str, adapter: AdapterAlone) -> Any:
    """The engine that a recipe of that engine.kind would give the adapter to."""
    config = RunConfig(name="bench", data=DataConfig(shards=""), engine=EngineConfig(kind=kind))
    parameters = dict(adapter.named_parameters())
    flat = FlatAdapter(adapter, parameters, dict.fromkeys(parameters, torch.float32))
    object.__setattr__(adapter, "flat", flat)  # beside the network, not a part of it
    return make_engine(config, adapter, flat, ACCUMULATION)


def take_step(adapter: Callable[[int], Tensor], engine: Any, number: int, world: World) -> Tensor:
    """One optimizer step, number 0, 1, ..., of ACCUMULATION micro-batches; returns this rank's mean loss."""
    losses = []
    for j in range(ACCUMULATION):
        loss = adapter((number * ACCUMULATION + j) * world.size + world.rank)
        engine.backward(loss)
        losses.append(loss.detach())
    engine.step(LR)
    return torch.stack(losses).mean()


def run_on_ranks(module: str, ranks: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Start a module's main() on real ranks in a temporary folder; returns what the main rank wrote.

    settings  keywords of its `measure`, as JSON
    raises    UserError when a rank fails, after what it said
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += ["--module", module, folder, json.dumps(settings)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise UserError(f"a rank of {module} failed; what it said stands above")
        return json.loads((Path(folder) / "report.json").read_text())


def answer(measure: Callable[..., dict[str, Any]]) -> None:
    """Be one of the ranks that run_on_ranks started: leave what the main rank measures where it looks for it.

    measure  of the world, the temporary folder and the settings
    """
    folder, world = Path(sys.argv[1]), init_world()
    report = measure(world, folder, **json.loads(sys.argv[2]))
    if world.is_main:
        (folder / "report.json").write_text(json.dumps(report))
    world.close()
