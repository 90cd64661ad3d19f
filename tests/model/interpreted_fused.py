"""Runs the kernels of fused.py and fused_cross.py on a CPU, as interpreted.py does those of temporal.py.

Started by test_fused.py, which sets TRITON_INTERPRET.
"""

import sys

import torch

from tests.model.adapters import settings
from tests.model.conftest import make_inputs, make_unet, wake
from tests.model.fused_reference import compare_all
from tests.model.interpreted import report
from toolkit.config import LEAN
from toolkit.model import blocks, fused_cross
from toolkit.model.lora import inject_lora
from toolkit.model.prepare import Plan, prepare_unet


def run_kernels() -> None:
    for case, error in compare_all("cpu"):
        report(case, error)


def run_trial() -> None:
    fused_cross.PROGRAMS = 1  # with as many rows as on a card it would take a minute
    blocks.try_kernels(torch.empty(1))
    report("tried", 0)


def run_blocks() -> None:
    """Residual blocks, a transformer and the network's end in fp32, laid out as on a GPU, beside what a CPU does."""
    for targets in ("all", ["to_q", "time_emb_proj", "time_pos_embed.linear_1"], ["to_q", "to_out.0"]):
        report(f"blocks, {targets}", compare_blocks(targets))
    report("blocks, computed again", compare_blocks(["to_q", "to_out.0"], "small"))


def compare_blocks(targets: str | list[str], plan: Plan = "fast") -> float:
    found = []
    for fuses in (False, True):
        blocks.fuses = lambda weight, fuses=fuses: fuses
        unet = make_unet()
        parameters = inject_lora(unet, settings(targets=targets), 0)
        wake(parameters)
        trainable = prepare_unet(unet, parameters, torch.float32, "sdpa", plan, LEAN)
        inputs = make_inputs()
        trainable.begin(inputs["encoder_hidden_states"])
        block = unet.down_blocks[0]
        x = torch.randn(6, 32, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        temb = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
        tokens = inputs["encoder_hidden_states"].repeat_interleave(3, 0)
        y, _ = block(x, temb, tokens, torch.zeros(2, 3))
        wider = unet.down_blocks[1].resnets[0](y, temb, torch.zeros(2, 3))  # by a shortcut
        y = torch.cat([wider.flatten(), unet.conv_out(unet.conv_act(unet.conv_norm_out(y))).flatten()])
        y.square().mean().backward()
        found.append((y.detach(), trainable.adapter.flat.grad, x.grad))
    errors = [((got - want).abs().max() / want.abs().max()).item() for want, got in zip(*found, strict=True)]
    return max(errors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"kernels": run_kernels, "blocks": run_blocks, "tried": run_trial}[sys.argv[1]]()
