"""A plan is chosen by what a step will need. Run: pytest tests/run/test_memory.py"""

from typing import Any

import psutil
import pytest
import torch

from tests.launching import RECIPE, TINY
from toolkit.config import RunConfig, load_config
from toolkit.model.tiny import build_unet
from toolkit.model.unet import SVD_CONFIG
from toolkit.run import memory
from toolkit.run.memory import USABLE, choose_plan, choose_replay, predict_bytes
from toolkit.run.meter import Cost

CPU = torch.device("cpu")


def make(**changes: Any) -> RunConfig:
    return load_config(RECIPE, TINY | {"model.memory": "auto"} | {k.replace("__", "."): v for k, v in changes.items()})


def test_more_is_more() -> None:
    """More frames, pixels, clips, rank, digits or averages need more; computing again needs less."""
    unet = build_unet().config
    base = predict_bytes(make(), unet, 2, "fast")
    for changes in ({"data__frames": 5, "diffusion__layout": "framer_clip"}, {"data__height": 64},
                    {"engine__micro_batch": 2}, {"lora__rank": 64}, {"engine__precision": "fp32"},
                    {"model__quantize": "int8"}, {"checkpoint__ema": True}):  # fmt: skip
        assert predict_bytes(make(**changes), unet, 2, "fast") > base, changes
    assert predict_bytes(make(), unet, 2, "small") < base
    stock = predict_bytes(make(model__blocks="stock"), unet, 2, "fast")
    assert stock != base and predict_bytes(make(model__quantize="int8"), unet, 2, "fast") > stock


def test_what_was_counted_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step of the same network, wherever its weights lie; that of another network is."""
    unet = dict(build_unet().config)
    counted = predict_bytes(make(), unet, 2, "fast")
    monkeypatch.setattr(memory, "count_step", lambda *given: {"forward": Cost(peak_bytes=7)})
    assert predict_bytes(make(name="other"), unet | {"_name_or_path": "elsewhere"}, 2, "fast") == counted
    assert predict_bytes(make(), unet | {"num_frames": 25}, 2, "fast") < counted


def test_96_frames_fit_a_card_of_40_gb() -> None:
    """At 576x576 the published network, rank 64 on all layers, with its weights, in what may be used of 40e9 bytes."""
    changes = {"diffusion.layout": "framer_clip", "data.frames": 96, "data.height": 576, "data.width": 576}
    config = load_config("launch/recipes/sign_framer.yaml", changes)
    weights_bytes = 2 * 1_524_625_966
    assert weights_bytes + predict_bytes(config, {**SVD_CONFIG, "in_channels": 9}, 8, "small") <= USABLE * 40e9


def test_auto_takes_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte decides; what the recipe names is taken whatever is free."""
    unet = build_unet().config
    needed = predict_bytes(make(), unet, 2, "fast")

    def choose(free_bytes: float, **changes: Any) -> str:
        free = psutil.virtual_memory()._replace(available=free_bytes)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        return choose_plan(make(**changes), unet, 2, CPU)

    assert choose(needed / USABLE + 1) == "fast" and choose(needed / USABLE - 1) == "small"
    assert choose(0, model__memory="fast") == "fast" and choose(1e15, model__memory="small") == "small"


@pytest.mark.parametrize(
    ("changes", "device", "replayed"),
    [
        ({}, "cuda", True),
        ({}, "cpu", False),
        ({"model.cuda_graphs": False}, "cuda", False),
        ({"model.blocks": "stock"}, "cuda", False),
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
