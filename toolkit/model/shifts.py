"""What the time of a clip adds to the channels of every residual block, by one product for all blocks of a width.

Test: pytest tests/model/test_shifts.py. Each block has two such layers, of a few rows each: by themselves they are more than
a hundred kernels, each of which a GPU spends starting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.model.projection import stack_weights


class Shifts:
    """What frozen layers make of the time that they were asked about last."""

    def __init__(self, blocks: Iterable[Any]) -> None:
        """blocks  diffusers' ResnetBlock2D and TemporalResnetBlock; the layers' weights become views of stacked ones"""
        alike: dict[int, list[Any]] = defaultdict(list)
        for block in blocks:
            alike[block.time_emb_proj.out_features].append(block)
        self.groups = [
            (
                own,
                stack_weights([block.time_emb_proj for block in own]),
                # what the convolution before adds to the same channels
                torch.stack([block.time_emb_proj.bias.detach() + block.conv1.bias.detach() for block in own])[:, None],
            )
            for own in alike.values()
        ]
        self.time_FE: Tensor | None = None
        self.shifts_FC: dict[int, Tensor] = {}

    def __call__(self, block: Any, time_FE: Tensor) -> Tensor:
        """
        time_FE  gets no gradient; one pass gives all blocks the same tensor
        returns  what is added to what the block's first convolution makes without its bias, (F, C)
        """
        if time_FE is not self.time_FE:
            active_FE = F.silu(time_FE)
            for blocks, weight_NCE, bias_N1C in self.groups:
                shifts_NFC = torch.baddbmm(bias_N1C, active_FE.expand(len(blocks), -1, -1), weight_NCE.transpose(1, 2))
                self.shifts_FC |= {id(own): shift for own, shift in zip(blocks, shifts_NFC.unbind(), strict=True)}
            self.time_FE = time_FE
        return self.shifts_FC[id(block)]
