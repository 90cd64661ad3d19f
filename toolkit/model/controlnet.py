"""Framer's trajectory ControlNet, and how its residuals steer the stock UNet: by hooks, without a forked model file.

Test: pytest tests/model/test_controlnet.py. Source: aim-uofa/Framer models_diffusers/controlnet_svd.py and
unet_spatio_temporal_condition.py. In a batch, Framer's own classes mix up the clips' tokens (huggingface/diffusers PR
#7268); the stock classes, on which all here is built, do not.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding, zero_module
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.model.sources import fetch, is_hub_id, refuse_local_revision
from toolkit.model.unet import SVD_CONFIG, FramerUNet
from toolkit.model.weights import load_file, load_part

EMBEDDING_CHANNELS = (16, 32, 96, 256)
# controlnet/config.json of wwen1997/framer_512x320, less what serves only the point features that nobody trained
PUBLISHED_CONFIG = SVD_CONFIG | {
    "in_channels": 9,
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": EMBEDDING_CHANNELS,
}
FIT = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")  # what UNet and ControlNet share


class Residuals(NamedTuple):
    """What a ControlNet adds to a UNet; each tensor is (B * T, channels, height, width) of its place."""

    skips: tuple[Tensor, ...]  # in the order in which the encoder makes them, conv_in's first: 12 at full size
    middle: Tensor


class FramerControlNet(UNetSpatioTemporalConditionModel):
    """A second encoder and middle block of the UNet, which also reads heatmaps and ends in 1x1 convolutions."""

    def __init__(
        self,
        conditioning_channels: int = 3,
        conditioning_embedding_out_channels: Sequence[int] = EMBEDDING_CHANNELS,
        with_id_feature: bool = False,
        **unet: Any,
    ) -> None:
        if with_id_feature:
            raise UserError("the ControlNet has with_id_feature, point features, which are not supported; use Framer's")
        super().__init__(**unet)
        self.register_to_config(
            conditioning_channels=conditioning_channels,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
        )
        # without a decoder, the stock forward ends with what the middle block gives
        self.up_blocks = nn.ModuleList()
        self.conv_norm_out = self.conv_act = self.conv_out = nn.Identity()
        widths = self.config.block_out_channels
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            widths[0], conditioning_channels, conditioning_embedding_out_channels
        )
        skip_widths = [widths[0]]
        for width, block in zip(widths, self.down_blocks, strict=True):
            skip_widths += [width] * (len(block.resnets) + len(block.downsamplers or ()))
        self.controlnet_down_blocks = nn.ModuleList(zero_module(nn.Conv2d(w, w, 1)) for w in skip_widths)
        self.controlnet_mid_block = zero_module(nn.Conv2d(widths[-1], widths[-1], 1))

    def forward(
        self,
        input_BTCHW: Tensor,
        timestep_B: Tensor,
        tokens_BND: Tensor,
        ids_B3: Tensor,
        heatmaps_BTCHW: Tensor,
        scale: float = 1.0,
    ) -> Residuals:
        """Compute the residuals for one call of the UNet, from the same inputs and the heatmaps.

        input     (B, T, 9, H, W), as the UNet reads it
        heatmaps  (B, T, 3, H_px, W_px), 0..255, as toolkit/data/trajectory.py draws them
        scale     multiplies every residual; Framer's app: 1.0 for drawn trajectories, 0.5 for found ones
        """
        halvings = len(self.config.conditioning_embedding_out_channels) - 1
        wanted = [size << halvings for size in input_BTCHW.shape[-2:]]
        assert list(heatmaps_BTCHW.shape[-2:]) == wanted, (heatmaps_BTCHW.shape, wanted)
        embedded = self.controlnet_cond_embedding(heatmaps_BTCHW.flatten(0, 1).to(input_BTCHW.dtype))
        skips: list[Tensor] = []

        def join(conv_in: nn.Module, args: Any, output: Tensor) -> Tensor:
            skips.append(output + embedded)
            return skips[0]

        def collect(down_block: nn.Module, args: Any, output: tuple[Tensor, tuple[Tensor, ...]]) -> None:
            skips.extend(output[1])

        with ExitStack() as hooks:
            hooks.enter_context(self.conv_in.register_forward_hook(join))
            for block in self.down_blocks:
                hooks.enter_context(block.register_forward_hook(collect))
            (middle_BTCHW,) = super().forward(input_BTCHW, timestep_B, tokens_BND, ids_B3, return_dict=False)
        return Residuals(
            tuple(conv(skip) * scale for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)),
            self.controlnet_mid_block(middle_BTCHW.flatten(0, 1)) * scale,
        )


# diffusers reads the names of the config off the signature: the stock ones, and this class's own in place of **unet
FramerControlNet.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *list(inspect.signature(FramerControlNet.__init__).parameters.values())[:-1],
        *list(inspect.signature(UNetSpatioTemporalConditionModel.__init__).parameters.values())[1:],
    ]
)


@contextmanager
def steer(unet: FramerUNet, residuals: Residuals) -> Iterator[None]:
    """Add residuals to the UNet's skips and to its middle in every call inside; outside, the UNet is the stock one.

    Gradients flow through the UNet, with and without its gradient checkpointing, also when taken after leaving: the hooks
    sit on whole blocks, and what is recomputed lies inside them.
    """
    skips = residuals.skips
    with ExitStack() as hooks:
        hooks.enter_context(unet.mid_block.register_forward_hook(partial(_add_to_output, residuals.middle)))
        for block in unet.up_blocks:  # the last skips are read first
            skips, own = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            hooks.enter_context(block.register_forward_pre_hook(partial(_add_to_skips, own), with_kwargs=True))
        assert not skips, f"{len(residuals.skips)} residuals are {len(skips)} too many for this UNet"
        yield


def _add_to_output(residual: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + residual.to(output.dtype)


def _add_to_skips(
    residuals: tuple[Tensor, ...], module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    skips = kwargs["res_hidden_states_tuple"]
    steered = tuple(skip + residual.to(skip.dtype) for skip, residual in zip(skips, residuals, strict=True))
    return args, kwargs | {"res_hidden_states_tuple": steered}


def load_controlnet(place: Path, dtype: torch.dtype, unet: FramerUNet) -> FramerControlNet:
    """Load a ControlNet, frozen and in eval mode, on the CPU.

    place   of find_controlnet
    unet    what it shall steer
    raises  UserError where it is incomplete, is no safetensors, or does not fit the UNet
    """
    if place.is_file():
        controlnet = load_file(FramerControlNet, PUBLISHED_CONFIG, place, dtype)
    else:
        controlnet = load_part(FramerControlNet, place, dtype=dtype)
    for name in FIT:
        given, wanted = (_plain(network.config[name]) for network in (controlnet, unet))
        if given != wanted:
            raise UserError(
                f"the ControlNet {place} has {name} {given}, the UNet {wanted}; give the ControlNet of this UNet"
            )
    return controlnet.requires_grad_(False).eval()


def find_controlnet(source: str, revision: str | None = None) -> Path:
    """Find a ControlNet's folder or single file.

    source  its folder, a folder that holds controlnet/, a hub id of such a one, or a .safetensors file of Framer's
    raises  UserError where it is not there
    """
    place = Path(source)
    refuse_local_revision(place, revision)
    if place.is_file():
        if place.suffix != ".safetensors":
            raise UserError(f"{source} is no .safetensors file; other formats are not read, because they can run code")
        return place
    for folder in (place / "controlnet", place):
        if (folder / "config.json").is_file():
            return folder
    if not is_hub_id(source):
        raise UserError(
            f"no ControlNet at {source}: give a folder with its config.json or with controlnet/ in it, a .safetensors file, "
            "or a hub id owner/name, such as wwen1997/framer_512x320"
        )
    return fetch(source, revision, ("controlnet",)) / "controlnet"


def _plain(value: Any) -> Any:
    # a config read from JSON holds lists where one made here holds tuples
    return list(value) if isinstance(value, tuple) else value
