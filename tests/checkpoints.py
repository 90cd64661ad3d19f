"""A network of one adapted layer and checkpoints of it: some 70 kB in some milliseconds. No tests in here."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit.config import CheckpointConfig, LoraConfig
from toolkit.engine.plain import STATE_KEYS, State
from toolkit.model.lora import inject_lora
from toolkit.run.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from toolkit.run.manifest import find_fault

KEEP_ALL = CheckpointConfig(keep=100)
STATE = {"seed": 0}
ABOUT = {"rank": 2}


def make_unet(width: int = 1024) -> nn.Module:
    """A module with one adapted linear layer, as far as a checkpoint is concerned a UNet."""
    unet = nn.Module()
    unet.attn1 = nn.Module()
    unet.attn1.to_q = nn.Linear(width, 8)
    inject_lora(unet, LoraConfig(rank=2, alpha=2, targets=["to_q"]), 0)
    return unet


UNET = make_unet()


def make_tensors(step: int, unet: nn.Module = UNET) -> State:
    """What an engine would gather after a step: numbers that no other step has."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: {key: torch.randn(p.shape, generator=generator) for key in STATE_KEYS}
        for name, p in unet.named_parameters()
        if "lora_" in name
    }


def save(run: Path, step: int, settings: CheckpointConfig = KEEP_ALL, score: float | None = None) -> Path:
    return save_checkpoint(run, *submission(step, score), settings)


def submission(step: int, score: float | None = None, clips: int = 8) -> tuple[Any, ...]:
    """What a trainer hands to a CheckpointWriter."""
    return (
        step,
        make_tensors(step),
        UNET,
        STATE | {"validation_by": "loss", "validation_score": score, "validation_clips": clips},
        ABOUT,
    )


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint verifies and holds, bit for bit, the numbers of the step that its name says."""
    if find_fault(folder) is not None:
        return False
    state, tensors = load_checkpoint(folder)
    wanted = make_tensors(state["step"])
    assert folder.name == f"step_{state['step']:06d}" and tensors.keys() == wanted.keys()
    return all(torch.equal(tensors[name][key], wanted[name][key]) for name in wanted for key in STATE_KEYS)


def names(run: Path) -> list[str]:
    return [folder.name for folder in list_checkpoints(run)]
