"""Cross-attention over a few tokens, exactly, without its projections: keys and values do not depend on x.

Test: pytest tests/model/test_prepare.py (diffusers' attention with PEFT's LoRA, in float64). With K_h = c Wk_h and
V_h = c Wv_h of head h, the scores are x M_h^T with M_h = K_h Wq_h / sqrt(D), and the output is the sum over h of
softmax(scores) U_h, with U_h = V_h Wo_h, and the bias. So two products with L rows a head take the place of two with D and
of the attention between them. The tables M and U are made once a micro-step, for all layers of one width at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.model.flat import Stack
from toolkit.model.projection import find_kind, get_base, stack_lora, stack_weights

PARTS = ("to_q", "to_k", "to_v", "to_out.0")
# rows of a table, columns of the scores, for which fused_cross.py's kernels are faster: SVD's third level has 40, which
# libraries multiply as they are (H200: 41 us forward and backward, 48 by the kernels; of 10 and 20, 124 and 72, 47 and 39)
MAX_COLUMNS = 32


class CrossTables:
    """The tables of layers of one width, adapted alike."""

    def __init__(self, layers: dict[str, Any]) -> None:
        """layers  diffusers Attention modules by name; their weights become views of stacked ones"""
        self.layers = layers
        attention = list(layers.values())
        self.heads = attention[0].heads
        self.weights, self.lora, self.scales = {}, {}, {}
        for part in PARTS:
            parts = {f"{name}.{part}": layer.get_submodule(part) for name, layer in layers.items()}
            self.weights[part] = stack_weights(list(parts.values()), transposed=part == "to_out.0")
            kind = find_kind(next(iter(parts.values())))
            self.scales[part] = kind[1] if kind else 0.0
            self.lora[part] = stack_lora(parts) if kind else ()

    @property
    def stacks(self) -> list[Stack]:
        """What a FlatAdapter must fill."""
        return [stack for pair in self.lora.values() for stack in pair]

    def build(self, tokens_BLE: Tensor) -> None:
        """Make each layer's tables for the tokens of a micro-batch."""
        clips, tokens = tokens_BLE.shape[:2]
        k, v = (self._project(tokens_BLE.flatten(0, 1), part) for part in ("to_k", "to_v"))
        depth = k.shape[-1] // self.heads
        m, u = self._absorb(k * depth**-0.5, "to_q"), self._absorb(v, "to_out.0")
        m, u = (self._by_clip(table, clips, tokens) for table in (m, u))
        for layer, m_BSC, u_BSC in zip(self.layers.values(), m.unbind(0), u.unbind(0), strict=True):
            layer.processor.tables = (m_BSC, u_BSC)

    def _project(self, tokens_SE: Tensor, part: str) -> Tensor:
        """Keys or values of all layers, (layers, S, C)."""
        tokens = tokens_SE.expand(len(self.layers), -1, -1)
        y = torch.bmm(tokens, self.weights[part].transpose(1, 2))
        if not self.lora[part]:
            return y
        a, b = (stack.value for stack in self.lora[part])
        return torch.baddbmm(y, torch.bmm(tokens, a.transpose(1, 2)), b.transpose(1, 2), alpha=self.scales[part])

    def _absorb(self, x_NSC: Tensor, part: str) -> Tensor:
        """Each head's keys through its part of Wq, or values through its part of Wo: (layers * heads, S, C)."""
        layers, rows, width = x_NSC.shape
        x = x_NSC.view(layers, rows, self.heads, -1).transpose(1, 2).flatten(0, 1)  # (layers * heads, S, D)
        y = torch.bmm(x, self._by_head(self.weights[part], part))
        if not self.lora[part]:
            return y
        a, b = (stack.value for stack in self.lora[part])
        inner, outer = (b, a) if part == "to_q" else (a, b.transpose(1, 2))
        low = torch.bmm(x, self._by_head(inner, part)).view(layers, self.heads * rows, -1)
        return torch.baddbmm(y.view(layers, -1, width), low, outer, alpha=self.scales[part]).view_as(y)

    def _by_head(self, matrix: Tensor, part: str) -> Tensor:
        """(layers * heads, D, width): rows of Wq and its B by head, columns of Wo and its A by head; A alone is copied."""
        rows = matrix if part == "to_q" else matrix.transpose(1, 2)
        return rows.reshape(len(self.layers) * self.heads, -1, rows.shape[-1])

    def _by_clip(self, table: Tensor, clips: int, tokens: int) -> Tensor:
        """(layers, B, heads * L, C)."""
        table = table.view(len(self.layers), self.heads, clips, tokens, -1).transpose(1, 2)
        return table.flatten(2, 3)


class CollapsedAttention:
    """Processor of a cross-attention layer that was given its tables; the context it is called with is not read."""

    tables: tuple[Tensor, Tensor]  # each (B, heads * L, C)
    kernel: Any = None  # none is needed

    def __init__(self, fused: bool) -> None:
        """fused  whether by fused_cross.py's kernels, where they compute"""
        self.fused = fused

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: None = None
    ) -> Tensor:
        """hidden_states  (B * anything, anything, C), clip by clip"""
        assert attention_mask is None, "the SVD UNet attends without a mask"
        m_BSC, u_BSC = self.tables
        x_BNC = hidden_states.reshape(len(m_BSC), -1, hidden_states.shape[-1])
        bias_C = get_base(attn.to_out[0]).bias
        # a compiler makes kernels of its own
        if self.fused and not torch.compiler.is_compiling() and fits(m_BSC, attn.heads):
            from toolkit.model.fused_cross import TableAttention

            y_BNC = TableAttention.apply(x_BNC, m_BSC, u_BSC, bias_C, attn.heads)
        else:
            scores = torch.bmm(x_BNC, m_BSC.transpose(1, 2)).unflatten(-1, (attn.heads, -1))
            y_BNC = torch.baddbmm(bias_C, scores.softmax(-1).flatten(-2), u_BSC)
        return y_BNC.view(hidden_states.shape)


def fits(table_BSC: Tensor, heads: int) -> bool:
    """Whether fused_cross.py's kernels take such a table: its tokens a power of two, for they are halved; its rows few.

    One token's weight is 1, whatever x is.
    """
    columns = table_BSC.shape[1]
    tokens = columns // heads
    return tokens > 1 and tokens & (tokens - 1) == 0 and columns <= MAX_COLUMNS


def group_layers(unet: nn.Module) -> list[dict[str, Any]]:
    """The UNet's cross-attention layers, those of one width that are adapted alike together.

    raises  ValueError where one is adapted otherwise than by plain LoRA
    """
    groups: dict[Any, dict[str, Any]] = {}
    for name, layer in unet.named_modules():
        if name.endswith(".attn2"):
            kinds = tuple(find_kind(layer.get_submodule(part)) for part in PARTS)
            groups.setdefault((layer.to_q.in_features, layer.heads, kinds), {})[name] = layer
    return list(groups.values())
