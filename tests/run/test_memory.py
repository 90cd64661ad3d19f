"""A plan is chosen by what a step will need. Run: pytest tests/run/test_memory.py"""

import os
import subprocess
import sys
from typing import Any

import psutil
import pytest
import torch

from tests.launching import RECIPE, ROOT, TINY, free_port
from toolkit.bench.counts import CASES, count_sampling
from toolkit.config import RunConfig, load_config
from toolkit.engine.world import World
from toolkit.model.base import describe_encoders
from toolkit.model.encoders import USABLE
from toolkit.model.tiny import build_unet, build_vae
from toolkit.model.unet import SVD_CONFIG
from toolkit.run import memory
from toolkit.run.memory import (
    choose_plan,
    choose_replay,
    count_encoder_bytes,
    count_state_bytes,
    predict_bytes,
    predict_encoding_bytes,
    predict_look_bytes,
)
from toolkit.run.meter import Cost


def make(**changes: Any) -> RunConfig:
    return load_config(RECIPE, TINY | {"model.memory": "auto"} | {k.replace("__", "."): v for k, v in changes.items()})


def test_more_is_more() -> None:
    """More frames, pixels, clips, rank, digits, averages, or DeepSpeed's copies need more; computing again needs less."""
    unet = build_unet().config
    base = predict_bytes(make(), unet, 2, "fast", 1)
    for changes in ({"data__frames": 5, "diffusion__layout": "framer_clip"}, {"data__height": 64},
                    {"engine__micro_batch": 2}, {"lora__rank": 64}, {"engine__precision": "fp32"},
                    {"model__quantize": "int8"}, {"checkpoint__ema": True}):  # fmt: skip
        assert predict_bytes(make(**changes), unet, 2, "fast", 1) > base, changes
    assert predict_bytes(make(engine__kind="plain"), unet, 2, "fast", 1) < base
    assert predict_bytes(make(), unet, 2, "small", 1) < predict_bytes(make(), unet, 2, "balanced", 1) < base
    stock = predict_bytes(make(model__blocks="stock"), unet, 2, "fast", 1)
    assert stock != base and predict_bytes(make(model__quantize="int8"), unet, 2, "fast", 1) > stock


@pytest.mark.parametrize(
    ("engine", "ema", "ranks", "wanted"),
    [
        ({"kind": "plain"}, False, 1, 12 + 4 + 4),
        ({"kind": "zero2"}, False, 1, 12 + 12 + 4),
        ({"kind": "zero2"}, True, 8, 12 / 8 + 12 + 8 + 4),
        ({"kind": "zero2_offload"}, False, 4, 12 + 4),
        ({"kind": "fsdp2", "shard_ranks": 2}, False, 8, 12 / 2 + 8),
    ],
)
def test_state_is_shared_out(engine: dict[str, Any], ema: bool, ranks: int, wanted: float) -> None:
    """Bytes a number: master and moments over the ranks, or none on the device; the others whole on each."""
    changes = {f"engine__{name}": value for name, value in engine.items()}
    assert count_state_bytes(make(checkpoint__ema=ema, **changes), ranks) == wanted


def test_what_was_counted_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step of the same network, wherever its weights lie; that of another network is."""
    unet = dict(build_unet().config)
    counted = predict_bytes(make(), unet, 2, "fast", 1)
    monkeypatch.setattr(memory, "count_step", lambda *given: {"forward": Cost(peak_bytes=7)})
    assert predict_bytes(make(name="other"), unet | {"_name_or_path": "elsewhere"}, 2, "fast", 1) == counted
    assert predict_bytes(make(), unet | {"num_frames": 25}, 2, "fast", 1) < counted


def test_96_frames_fit_a_card_of_40_gb() -> None:
    """At 576x576 the published network, rank 64 on all layers, with its weights, in what may be used of 40e9 bytes."""
    changes = {"diffusion.layout": "framer_clip", "data.frames": 96, "data.height": 576, "data.width": 576}
    config = load_config("launch/recipes/sign_framer.yaml", changes)
    weights_bytes = 2 * 1_524_625_966
    assert weights_bytes + predict_bytes(config, {**SVD_CONFIG, "in_channels": 9}, 8, "small", 1) <= USABLE * 40e9


def test_auto_takes_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte decides; what the recipe names is taken whatever is free."""
    unet = build_unet().config
    fast, balanced = (predict_bytes(make(), unet, 2, plan, 1) / USABLE for plan in ("fast", "balanced"))

    def choose(free_bytes: float, vae: Any = None, **changes: Any) -> str:
        free = psutil.virtual_memory()._replace(available=free_bytes)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        return choose_plan(make(**changes), unet, 2, World(0, 1, torch.device("cpu")), vae)

    assert choose(fast + 1) == "fast" and choose(fast - 1) == choose(balanced + 1) == "balanced"
    assert choose(balanced - 1) == "small"
    assert choose(0, model__memory="fast") == "fast" and choose(1e15, model__memory="small") == "small"
    assert choose(1e15, model__quantize="int8") == "small"  # kept activations would take more than int8 saves
    encoding = predict_encoding_bytes(make(), build_vae().config) / USABLE
    assert choose(fast + 1, build_vae().config) != "fast" and choose(fast + encoding + 1, build_vae().config) == "fast"
    looks = {"validation__figures_every_steps": 5, "validation__max_guidance": 2}
    assert choose(fast + 1, **looks) == "fast"  # a look takes what the step before it has left
    monkeypatch.setattr(memory, "choose_replay", lambda config, device: True)  # and graphs leave nothing
    looking = predict_look_bytes(make(**looks), unet, 2) / USABLE
    assert choose(fast + looking - 1, **looks) != "fast" and choose(fast + looking + 1, **looks) == "fast"


def test_what_a_look_takes() -> None:
    """Nothing where there is none; a pass as it is counted elsewhere, two at once with guidance, or decoding a frame."""
    unet = {**SVD_CONFIG, "in_channels": 9}
    size = {"diffusion.layout": "framer_clip", "data.frames": 5, "data.height": 576, "data.width": 576}
    looks: list[dict[str, Any]] = [{"validation.every_steps": None}, {}, {"validation.figures_every_steps": 9}]
    looks.append(looks[-1] | {"validation.max_guidance": 3, "data.frames": 14})
    none, scored, drawn, guided = (
        predict_look_bytes(load_config("launch/recipes/sign_framer.yaml", size | look), unet, 8) for look in looks
    )
    assert none == 0 and scored == count_sampling(CASES["framer_5_576"], "ours")["forward"].peak_bytes
    assert drawn == 1024 * 4 * 576 * 576  # numbers a pixel, bytes of fp32
    assert guided / scored == pytest.approx(2 * 14 / 5, rel=0.05)


RANKS = """
import os
import sys
import psutil
from toolkit.config import load_config
from toolkit.engine.world import init_world
from toolkit.model.tiny import build_unet
from toolkit.run.memory import choose_plan

config, unet, free = load_config("launch/recipes/tiny_cpu.yaml"), build_unet().config, map(int, sys.argv[1:])
child = os.fork()  # imports take longer than all else here
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
world = init_world()
memory = psutil.virtual_memory()._replace(available=[*free][world.rank])
psutil.virtual_memory = lambda: memory
os.write(1, f"{world.rank} took {choose_plan(config, unet, 2, world)}\\n".encode())
world.close()
if child:
    os.wait()
"""


@pytest.mark.launch
@pytest.mark.parametrize("poor", [0, 1])
def test_every_rank_takes_the_plan_that_fits_them_all(poor: int) -> None:
    """Whichever of two has no room: where weights are sharded, one that computes again would wait for the other's share."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANKS, *(str(0 if rank == poor else 10**15) for rank in range(2))]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | place, capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.splitlines()) == ["0 took small", "1 took small"], done.stderr[-2000:]


def test_published_encoders_take_their_size() -> None:
    """Weights of 98 million in fp32 and 632 million in bf16; what encoding a frame takes goes with its pixels."""
    config = load_config("launch/recipes/sign_576.yaml")
    vae, clip = describe_encoders(config.model)
    assert count_encoder_bytes(config, vae, clip) == pytest.approx(4 * 97.7e6 + 2 * 632.1e6, rel=1e-3)
    half = load_config("launch/recipes/sign_576.yaml", {"data.width": 288})
    assert predict_encoding_bytes(config, vae) == pytest.approx(2 * predict_encoding_bytes(half, vae), rel=0.05)
    assert predict_encoding_bytes(config, vae) == pytest.approx(0.85e9, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "device", "replayed"),
    [
        ({}, "cuda", True),
        ({}, "cpu", False),
        ({"model.cuda_graphs": False}, "cuda", False),
        ({"model.blocks": "stock"}, "cuda", False),
        ({"model.blocks": ["cross", "projections"]}, "cuda", False),
        ({"model.blocks": ["cross", "projections", "passes"]}, "cuda", True),
        ({"lora.dropout": 0.1}, "cuda", False),
        ({"lora.extra_trainable": ["conv_in"]}, "cuda", True),
        ({"lora.extra_trainable": ["mask_token"]}, "cuda", False),
        ({"diffusion.control": True, "model.controlnet": "somewhere"}, "cuda", False),
    ],
    ids=str,
)
def test_what_is_replayed(changes: dict[str, Any], device: str, replayed: bool) -> None:
    """Nothing that draws anew, steers from outside or is read outside of the pass: a graph would not see it change."""
    config = load_config("launch/recipes/sign_framer.yaml", changes)
    assert choose_replay(config, torch.device(device)) == replayed
