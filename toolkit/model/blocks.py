"""The network's blocks with fewer operations: other forward passes over diffusers' own modules and weights.

Test: pytest tests/model/test_prepare.py (diffusers' forward passes, in float64). Sources: huggingface/diffusers, resnet.py,
transformer_temporal.py, attention.py, activations.py. Left out is what does nothing in SVD's UNet: masks, divisions by 1,
the context copied for each pixel. Constants of the frozen network are computed once; frames stay where they are in memory.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward, TemporalBasicTransformerBlock
from diffusers.models.resnet import AlphaBlender, SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

from toolkit.errors import in_one_line
from toolkit.model.attention import FRAME_DIMS, MAX_FRAMES, Kernel, attend_in_chunks
from toolkit.model.convolution import FrameConvolution
from toolkit.model.flat import Stack
from toolkit.model.projection import TILE, Projection, find_kind
from toolkit.model.shifts import Shifts

PLACES = 128  # frames that a clip may have


class ResBlock(SpatioTemporalResBlock):
    """Convolutions in space, then along the frames, mixed."""

    fused: bool  # whether what a GPU computes otherwise is computed so: norms and sums by kernels, frames by products
    shifts: Shifts | None  # where layers that tell the time are frozen and kernels run
    alpha: float  # the share of the spatial part in the mix
    alpha_tensor: Tensor  # the same number; a compiled module would be another one for each float

    def forward(self, hidden_states: Tensor, temb: Tensor, image_only_indicator: Tensor) -> Tensor:
        """hidden_states  (B * T, C, H, W); temb  (B * T, E); image_only_indicator  (B, T)"""
        clips, frames = image_only_indicator.shape
        space, time = self.spatial_res_block, self.temporal_res_block
        in_space, in_time = self._find_shifts(temb)
        x = _residual(space, hidden_states, *in_space, self.fused)
        x_BCTHW = x.unflatten(0, (clips, frames)).transpose(1, 2)
        if by_kernels(self.fused):  # what time adds to x, less: the mix
            y_BCTHW = _residual(time, x_BCTHW, *in_time, self.fused, 1 - self.alpha)
        else:
            y_BCTHW = mix(self, _residual(time, x_BCTHW, *in_time, self.fused), x_BCTHW)
        return y_BCTHW.transpose(1, 2).flatten(0, 1)

    def _find_shifts(self, temb: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """What the first convolution of either part is given for the time, (F, C), and the bias that it still adds."""
        blocks = self.spatial_res_block, self.temporal_res_block
        if self.shifts is not None and not temb.requires_grad and by_kernels(self.fused):
            return [(self.shifts(block, temb), None) for block in blocks]
        temb = F.silu(temb)
        found: list[tuple[Tensor, Tensor | None]] = []
        for block in blocks:
            shift_FC = block.time_emb_proj(temb)
            # the kernel that adds a shift adds the bias with it; to a shift that has a gradient torch adds, not the kernel
            apart = not self.fused or shift_FC.requires_grad
            found.append((shift_FC, block.conv1.bias) if apart else (shift_FC + block.conv1.bias, None))
        return found


def _residual(
    block: Any, x: Tensor, shift_FC: Tensor, bias_C: Tensor | None, fused: bool, share: float = 1.0
) -> Tensor:
    """x or its shortcut, and a share of what the block adds; other than 1 by kernels only."""
    x, y = keep_and_norm(block.norm1, x, fused, silu=True)
    y = _convolve(block.conv1, y, bias_C, fused)
    y = norm(block.norm2, y, fused, silu=True, shift_FC=shift_FC)
    shortcut = block.conv_shortcut
    if not by_kernels(fused):
        y = _convolve(block.conv2, y, block.conv2.bias, fused)
        return (x if shortcut is None else shortcut(x)) + y
    from toolkit.model.fused import AddScaled

    y, bias_C = _convolve(block.conv2, y, None, fused), block.conv2.bias
    if shortcut is not None:
        x, bias_C = _convolve(shortcut, x, None, fused), bias_C + shortcut.bias
    x_last, y_last = x.movedim(1, -1).contiguous(), y.movedim(1, -1).contiguous()
    return AddScaled.apply(x_last, y_last, bias_C, share).movedim(-1, 1)


def by_kernels(fused: bool) -> bool:
    """Whether sums with what is beside them are kernels of ours: a compiler makes its own, but no better group norms."""
    return fused and not torch.compiler.is_compiling()


def _convolve(conv: Any, x: Tensor, bias_C: Tensor | None, fused: bool) -> Tensor:
    """In space, (F, C, H, W); or along the frames, (B, C, T, H, W), in the two dimensions that libraries do better.

    fused  whether it is along the frames, without a bias, as matrix products, which a GPU does better still
    """
    if x.ndim == 4:
        return F.conv2d(x, conv.weight, bias_C, padding=conv.padding)
    if by_kernels(fused) and bias_C is None:
        x_BTNC = x.movedim(1, -1).flatten(2, 3).contiguous()
        y_BTNC = FrameConvolution.apply(x_BTNC, conv.weight.flatten(2))
        return y_BTNC.unflatten(2, x.shape[3:]).movedim(-1, 1)
    y_BCTN = F.conv2d(x.flatten(3), conv.weight.squeeze(-1), bias_C, padding=conv.padding[:2])
    return y_BCTN.unflatten(3, x.shape[3:])


def norm(layer: nn.GroupNorm, x: Tensor, fused: bool, silu: bool, shift_FC: Tensor | None = None) -> Tensor:
    """Group norm, and SiLU if wanted, of x (N, C, ...), to which shift_FC is added before: a row for each frame."""
    if shift_FC is not None and (not fused or shift_FC.requires_grad):  # to which the kernels give no gradient
        per_clip = shift_FC.unflatten(0, (len(x), -1)).transpose(1, 2)
        x, shift_FC = x + per_clip.view(*per_clip.shape[: x.ndim - 2], *[1] * 2), None
    if not fused:
        y = layer(x)
        return F.silu(y) if silu else y
    (y,) = _norm_by_kernel(layer, x, shift_FC, silu, keep=False)
    return y


def keep_and_norm(layer: nn.GroupNorm, x: Tensor, fused: bool, silu: bool) -> tuple[Tensor, Tensor]:
    """x, for whatever else reads it, and norm's: the kernels add the gradient of the one where they make the other's."""
    if not by_kernels(fused):
        return x, norm(layer, x, fused, silu)
    x, y = _norm_by_kernel(layer, x, None, silu, keep=True)
    return x, y


def _norm_by_kernel(layer: nn.GroupNorm, x: Tensor, shift_FC: Tensor | None, silu: bool, keep: bool) -> list[Tensor]:
    from toolkit.model.fused import GroupNorm

    x_last = x.movedim(1, -1)
    x_NMC = x_last.flatten(1, -2).contiguous()
    found = GroupNorm.apply(x_NMC, shift_FC, layer.weight, layer.bias, layer.num_groups, layer.eps, silu, keep)
    return [y_NMC.view(x_last.shape).movedim(-1, 1) for y_NMC in found]


def add_and_norm(layer: nn.LayerNorm, x: Tensor, added: Tensor | None, fused: bool) -> tuple[Tensor, Tensor]:
    """x + added, if there is something to add, and its layer norm.

    added  of x's size; or (T, 1, C) for x (B, T, N, C), where the kernel gives it no gradient
    """
    trained = added is not None and added.shape != x.shape and added.requires_grad
    if not by_kernels(fused) or trained:
        x = x if added is None else x + added
        return x, layer(x)
    from toolkit.model.fused import AddNorm

    total, y = AddNorm.apply(x, added, layer.weight, layer.bias, layer.eps)
    return total, y


def add(x: Tensor, y: Tensor, fused: bool) -> Tensor:
    """x + y, whose rows may be parts of longer ones."""
    if not by_kernels(fused):
        return x + y
    from toolkit.model.fused import AddScaled

    return AddScaled.apply(x.contiguous(), y, None, 1.0)


class LastNorm(nn.GroupNorm):
    """The network's last norm with the SiLU after it, by the kernels."""

    def forward(self, x: Tensor) -> Tensor:
        return norm(self, x, fused=True, silu=True)


def fuses(weight: Tensor) -> bool:
    """Whether the kernels of fused.py and fused_cross.py run where a network's weights are; Triton needs a C compiler."""
    if not weight.is_cuda or weight.dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return False
    try:
        try_kernels(weight)
    except Exception as error:  # each compiler's own
        print(f"slower without Triton's kernels, which do not run here: {in_one_line(error)}", file=sys.stderr)
        return False
    return True


@torch.enable_grad()
def try_kernels(weight: Tensor) -> None:
    """Run kernels, forward and backward, where a weight is and in its type, in tiles as of SVD; what stops one is raised."""
    from toolkit.model import fused, fused_cross

    rows, ones_C = fused_cross.HEIGHTS[0] * fused_cross.PROGRAMS, weight.new_ones(64)
    x_NMC, table_NSC = weight.new_ones(1, rows, 64).requires_grad_(), weight.new_ones(1, 20, 64).requires_grad_()
    kept_NMC, y_NMC = fused.GroupNorm.apply(x_NMC, ones_C[None], ones_C, ones_C, 32, 1e-5, True, True)
    total_NMC, y_NMC = fused.AddNorm.apply(kept_NMC, y_NMC, ones_C, ones_C, 1e-5)
    y_NMC = fused.AddScaled.apply(total_NMC, y_NMC, ones_C, 0.5)
    y_NMC = fused_cross.TableAttention.apply(y_NMC, table_NSC, table_NSC, ones_C, 10)
    fused.Gated.apply(y_NMC).sum().backward()


class Transformer(TransformerSpatioTemporalModel):
    """Attention in space, then along the frames, mixed."""

    fused: bool  # as a ResBlock's
    alpha: float
    alpha_tensor: Tensor
    place_TNC: Tensor | None  # what is added to tell PLACES frames apart, (T, 1, C), where that is frozen

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        image_only_indicator: Tensor,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        """hidden_states  (B * T, C, H, W); encoder_hidden_states  (B * T, L, E); image_only_indicator  (B, T)"""
        assert not return_dict
        clips, frames = image_only_indicator.shape
        height, width = hidden_states.shape[-2:]
        hidden_states, y = keep_and_norm(self.norm, hidden_states, self.fused, silu=False)
        x_FNC = self.proj_in(y.flatten(2).transpose(1, 2).contiguous())
        del y  # not kept through the blocks
        for space, time in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            x_BTNC = space(x_FNC).unflatten(0, (clips, frames))
            place_TNC = self.place_TNC if self.place_TNC is not None else find_place(self, frames)
            y_BTNC = time(x_BTNC, place_TNC[:frames])
            x_FNC = mix(self, y_BTNC, x_BTNC).flatten(0, 1)
        y = self.proj_out(x_FNC).transpose(1, 2).unflatten(2, (height, width))
        return (hidden_states + y,)  # in this order, for the sum is laid out in memory as its first part


class SpatialBlock(BasicTransformerBlock):
    """A transformer block within each frame."""

    fused: bool

    def forward(self, x_FNC: Tensor) -> Tensor:
        x, y = add_and_norm(self.norm1, x_FNC, None, self.fused)
        x, y = add_and_norm(self.norm2, x, self.attn1(y), self.fused)
        x, y = add_and_norm(self.norm3, x, self.attn2(y), self.fused)
        return add(x, self.ff(y), self.fused)


class TemporalBlock(TemporalBasicTransformerBlock):
    """A transformer block along the frames, on frames that stay where they are."""

    fused: bool

    def forward(self, x_BTNC: Tensor, place_TNC: Tensor) -> Tensor:
        x, y = add_and_norm(self.norm_in, x_BTNC, place_TNC, self.fused)
        x, y = add_and_norm(self.norm1, x, self.ff_in(y), self.fused)
        x, y = add_and_norm(self.norm2, x, self.attn1.processor.along_frames(y), self.fused)
        x, y = add_and_norm(self.norm3, x, self.attn2(y), self.fused)
        return add(x, self.ff(y), self.fused)


class Gated(torch.autograd.Function):
    """h gelu(gate) of h and gate side by side, (..., 2 C) to (..., C), which alone are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        h, gate = x.chunk(2, -1)
        return h * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        h, gate = x.chunk(2, -1)
        x_grad = torch.empty_like(x)
        h_grad, gate_grad = x_grad.chunk(2, -1)
        torch.mul(gradient, F.gelu(gate), out=h_grad)
        torch.ops.aten.gelu_backward.grad_input(gradient * h, gate, grad_input=gate_grad)
        return x_grad


class Gate(GEGLU):
    """The first half of a feed-forward layer."""

    fused: bool

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.proj(hidden_states)
        if self.fused:
            from toolkit.model.fused import Gated as FusedGated

            return FusedGated.apply(x)
        if torch.compiler.is_compiling():  # a compiler chooses by itself what is kept
            h, gate = x.chunk(2, -1)
            return h * F.gelu(gate)
        return Gated.apply(x)


class Feed(FeedForward):
    """A feed-forward layer, as one function where it is frozen and kernels run."""

    wide: tuple[Tensor, ...] | None  # fused.FeedForward's weights and biases

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.wide is None or torch.compiler.is_compiling():
            return super().forward(hidden_states, *args, **kwargs)
        from toolkit.model.fused import FeedForward as Fused

        return Fused.apply(hidden_states, *self.wide)


@torch.no_grad()
def widen(layer: FeedForward) -> tuple[Tensor, ...] | None:
    """What fused.FeedForward takes, of which the last layer's weights become parts; None where a layer is adapted."""
    gate, dropout, out = layer.net
    if type(gate.proj) is not nn.Linear or type(out) is not nn.Linear or dropout.p:
        return None
    out_PH: Tensor = out.weight
    bias_P: Tensor = out.bias
    if more := -out.out_features % TILE:
        out_PH, bias_P = F.pad(out_PH, (0, 0, 0, more)), F.pad(bias_P, (0, more))
        out.weight.data, out.bias.data = out_PH[:-more], bias_P[:-more]
    return gate.proj.weight, gate.proj.bias, out_PH, bias_P


class SelfAttention:
    """Processor of a self-attention layer, its queries, keys and values by one projection where they are adapted alike."""

    def __init__(self, name: str, attn: Any, kernel: Kernel) -> None:
        """name  of the layer in the network"""
        parts = {f"{name}.{part}": attn.get_submodule(part) for part in ("to_q", "to_k", "to_v")}
        alike = len({find_kind(layer) for layer in parts.values()}) == 1
        groups = [parts] if alike else [{part: layer} for part, layer in parts.items()]
        self.qkv = [Projection(group) for group in groups]
        self.out = Projection({f"{name}.to_out.0": attn.to_out[0]})
        self.heads, self.kernel = attn.heads, kernel

    @property
    def stacks(self) -> list[Stack]:
        """What a FlatAdapter must fill."""
        return [stack for projection in (*self.qkv, self.out) for stack in projection.stacks]

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: None = None, attention_mask: None = None
    ) -> Tensor:
        """hidden_states  (rows, N, C)"""
        return self._attend(*self._project(hidden_states))

    def along_frames(self, x_BTNC: Tensor) -> Tensor:
        """Each position attends to itself in all frames."""
        _, frames, _, channels = x_BTNC.shape
        if self.kernel.frames and frames <= MAX_FRAMES and channels // self.heads in FRAME_DIMS:
            y_BTNC = self.kernel.frames(self.heads, *(projection(x_BTNC) for projection in self.qkv))
            return self.out(y_BTNC).squeeze(-2)
        rows = (x.transpose(1, 2).flatten(0, 1) for x in self._project(x_BTNC))  # for one clip no copy
        return self._attend(*rows).unflatten(0, (len(x_BTNC), -1)).transpose(1, 2)

    def _project(self, x: Tensor) -> list[Tensor]:
        return [y.unflatten(-1, (self.heads, -1)) for projection in self.qkv for y in projection(x).unbind(-2)]

    def _attend(self, q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor) -> Tensor:
        return self.out(attend_in_chunks(self.kernel.rows, q_BNHD, k_BNHD, v_BNHD).flatten(-2)).squeeze(-2)


def install_blocks(unet: Any, fused: bool) -> bool:
    """Give a frozen network these forward passes; its attention layers still need SelfAttention and CollapsedAttention.

    fused    whether with what a GPU computes otherwise, where it runs
    returns  whether it does
    """
    assert not any(parameter.requires_grad for parameter in list_frozen(unet)), "other weights than LoRA's train"
    fused = fused and fuses(unet.conv_out.weight)  # the first convolution may train, and in another type
    if fused:
        lay_channels_last(unet)
        unet.conv_norm_out.__class__, unet.conv_act = LastNorm, nn.Identity()
    shifts = make_shifts(unet) if fused else None
    for module in unet.modules():
        if type(module) is SpatioTemporalResBlock:
            assert module.temporal_res_block.conv_shortcut is None
            module.__class__ = ResBlock
            module.__dict__ |= read_mix(module.time_mixer) | {"fused": fused, "shifts": shifts}
        elif type(module) is TransformerSpatioTemporalModel:
            module.__class__ = Transformer
            adapted = any(hasattr(layer, "lora_A") for layer in module.time_pos_embed.modules())
            place_TNC = None if adapted else find_place(module, PLACES).detach()
            module.__dict__ |= read_mix(module.time_mixer) | {"place_TNC": place_TNC, "fused": fused}
        elif type(module) is BasicTransformerBlock:
            assert module.norm_type == "layer_norm"
            module.__class__ = SpatialBlock
            module.fused = fused
        elif type(module) is TemporalBasicTransformerBlock:
            assert module.is_res
            module.__class__ = TemporalBlock
            module.fused = fused
        elif type(module) is FeedForward and fused:
            module.__class__ = Feed
            module.__dict__["wide"] = widen(module)
        elif type(module) is GEGLU:
            module.__class__ = Gate
            module.fused = fused
    return fused


def make_shifts(unet: nn.Module) -> Shifts | None:
    """Those of a network's residual blocks, where no layer that tells them the time is adapted."""
    blocks = [
        part
        for module in unet.modules()
        if isinstance(module, SpatioTemporalResBlock)
        for part in (module.spatial_res_block, module.temporal_res_block)
    ]
    return Shifts(blocks) if all(type(block.time_emb_proj) is nn.Linear for block in blocks) else None


def list_frozen(unet: nn.Module) -> list[nn.Parameter]:
    """What of a network's residual blocks and transformers an adapter does not bring."""
    kinds = SpatioTemporalResBlock | TransformerSpatioTemporalModel
    blocks = [module for module in unet.modules() if isinstance(module, kinds)]
    return [own for block in blocks for name, own in block.named_parameters() if "lora_" not in name]


def lay_channels_last(unet: nn.Module) -> None:
    """Lay the weights of convolutions out as the matrix units want them, and with them all that comes out of these."""
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        elif isinstance(module, nn.Conv3d):  # along the frames, in two dimensions
            weight = module.weight.data.squeeze(-1).contiguous(memory_format=torch.channels_last)
            module.weight.data = weight.unsqueeze(-1)


def find_place(module: TransformerSpatioTemporalModel, frames: int) -> Tensor:
    """What is added to tell frames apart, (T, 1, C)."""
    like = module.proj_in.weight
    waves = module.time_proj(torch.arange(frames, device=like.device))
    place_TC: Tensor = module.time_pos_embed(waves.to(like.dtype))
    return place_TC[:, None]


def read_mix(mixer: AlphaBlender) -> dict[str, Any]:
    """What mix needs, from a mixer, which is never trained."""
    assert mixer.merge_strategy == "learned_with_images" and not mixer.switch_spatial_to_temporal_mix
    alpha = 0.5 if mixer.mix_factor.is_meta else mixer.mix_factor.double().sigmoid().item()
    return {"alpha": alpha, "alpha_tensor": torch.tensor(alpha, device=mixer.mix_factor.device)}


def mix(block: ResBlock | Transformer, time: Tensor, space: Tensor) -> Tensor:
    """alpha space + (1 - alpha) time."""
    if torch.compiler.is_compiling():
        return time + block.alpha_tensor * (space - time)
    return torch.lerp(time, space, block.alpha)
