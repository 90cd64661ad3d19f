"""A tiny base with SVD's classes and roles, made from a seed: what the base that comes with the toolkit was trained from.

Test: pytest tests/model/test_tiny.py. It must learn to interpolate within hours on a CPU, so what can be set by construction
is: residual branches start at zero in some channels, which leaves a linear path through each network, which is wired. The
VAE is then a codec (latents are 2x2 means of colour and a difference of luma, decoded linearly), and the UNet starts as
"at high noise, the answer is the conditioning latents, and for a frame without any the mean of those that are given", by its
last attention. The rest is learned, by branches that are awake in every other channel: toolkit/bases/tiny/README.md.

A linear path must cross GroupNorm and SiLU. It does in groups of three channels (x, -x, K): a large constant K makes the
group's statistics independent of x, and SiLU(x) - SiLU(-x) = x exactly.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit.model.quiet import quiet_libraries
from toolkit.rng import derive_seed

CHANNELS = 96  # three per group of GroupNorm's fixed 32
WIRED = 3 * 5  # of the UNet: four latents, and whether a frame is given
CONSTANT = 32.0  # K; the data on the wired path stay within a few units
DETAIL_GAIN = 2.5  # of a luma difference beside colours: it is the smaller
LATENT_GAIN = 12.0  # latents = 12 x colour: std near 5.5 unscaled and 1 scaled, as SVD's are
SCALING = 0.18215

SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
    "steps_offset": 1,
}


def make_tiny_base(folder: Path, seed: int) -> None:
    """Write unet, vae, image_encoder, scheduler and feature_extractor as a diffusers folder of safetensors."""
    with quiet_libraries():  # it misses torchvision, which is not needed
        from transformers import CLIPImageProcessor

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "tiny_base"))
        parts = {"unet": build_unet(), "vae": build_vae(), "image_encoder": build_image_encoder()}
    for name, part in parts.items():
        part.save_pretrained(folder / name, safe_serialization=True)
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")


def build_image_encoder() -> Any:
    """A CLIP vision tower of random weights: its tokens tell images apart, no more."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=224,
            patch_size=32,
        )
    )


def build_vae() -> Any:
    """An AutoencoderKLTemporalDecoder that halves height and width and is a linear codec by construction."""
    from diffusers import AutoencoderKLTemporalDecoder

    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(CHANNELS, CHANNELS),
        down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=SCALING,
        force_upcast=False,
    )
    zero_residual_branches(vae)
    encoder, decoder = vae.encoder, vae.decoder
    wire_in(encoder.conv_in, torch.cat([torch.eye(3), torch.tensor([[0.299, 0.587, 0.114]])]))
    shrink = encoder.down_blocks[0].downsamplers[0].conv
    _depthwise(shrink, torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]) / 4)
    for channel in (9, 10):  # luma and minus luma
        shrink.weight.data[channel, channel] = DETAIL_GAIN * torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, 0]])
    wire_out(encoder.conv_norm_out, encoder.conv_out, LATENT_GAIN * torch.eye(4))
    encoder.conv_out.bias.data[4:] = -6.0  # log variance: std 0.05 beside latents of std 5.5
    nn.init.dirac_(vae.quant_conv.weight)
    nn.init.zeros_(vae.quant_conv.bias)

    wire_in(decoder.conv_in, torch.eye(4)[:3] / LATENT_GAIN)
    _interpolate(decoder.up_blocks[0].upsamplers[0].conv)
    wire_out(decoder.conv_norm_out, decoder.conv_out, torch.eye(3))
    nn.init.dirac_(decoder.time_conv_out.weight)
    nn.init.zeros_(decoder.time_conv_out.bias)
    return vae


def fit_decoder(vae: Any, pictures_NCHW: torch.Tensor) -> None:
    """Wire the decoder to the linear map that fits pictures best, in the sense of least squares, from their latents.

    Each of 27 inner channels is a 3x3 filter of the latents: one for each tap of the 3x3 filter that follows after
    enlarging, and each colour. Together they are as much as two convolutions around an enlargement can do linearly.
    pictures_NCHW  fp32 in [-1, 1], height and width even
    """
    with torch.no_grad():
        # a hundredth of a step of 255 is what a coefficient may cost: without it some are huge, and cancel
        ridge = 1e-5
        normal = target = torch.zeros((), dtype=torch.float64)
        for picture_CHW in pictures_NCHW:
            latents_1CHW = vae.encode(picture_CHW[None]).latent_dist.mode()
            windows_1CHW = unfold(unfold(latents_1CHW).repeat_interleave(2, 2).repeat_interleave(2, 3))
            inputs = torch.cat([windows_1CHW, torch.ones_like(windows_1CHW[:, :1])], 1)[0].flatten(1).double()
            normal = normal + inputs @ inputs.T
            target = target + inputs @ picture_CHW.flatten(1).double().T
        normal += ridge * normal.diag().mean() * torch.eye(len(normal), dtype=torch.float64)
        *filters, bias_C = torch.linalg.solve(normal, target).float()
        # (latent, its tap, outer tap, colour): unfold puts the taps after the channel
        filters = torch.stack(filters).view(4, 9, 9, 3)
    conv_in, enlarge = vae.decoder.conv_in, vae.decoder.up_blocks[0].upsamplers[0].conv
    nn.init.zeros_(enlarge.weight)
    nn.init.zeros_(enlarge.bias)
    for tap in range(9):
        for colour in range(3):
            inner = 3 * (3 * tap + colour)
            wire(conv_in, inner, filters[:, :, tap, colour].view(4, 3, 3))
            for sign in (0, 1):
                enlarge.weight.data[3 * colour + sign, inner, tap // 3, tap % 3] = 1 - 2 * sign
    for colour in range(3):
        x = 3 * colour
        enlarge.bias.data[[x, x + 1, x + 2]] = torch.stack([bias_C[colour], -bias_C[colour], torch.tensor(CONSTANT)])


def unfold(images_NCHW: torch.Tensor) -> torch.Tensor:
    """The 3x3 neighbourhood of each pixel as channels, nine for each there was, zeros around the picture."""
    n, channels, height, width = images_NCHW.shape
    return nn.functional.unfold(images_NCHW, 3, padding=1).view(n, 9 * channels, height, width)


def build_unet() -> Any:
    """A FramerUNet of two levels, whose raw output starts as minus the scaled conditioning latents, or minus their mean."""
    from toolkit.model.unet import FramerUNet

    unet = FramerUNet(
        in_channels=9,
        out_channels=4,
        block_out_channels=(CHANNELS, CHANNELS),
        layers_per_block=0,  # none on the way down, one on the way up: the upper level is costly
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2,
        up_block_types=("CrossAttnUpBlockSpatioTemporal",) * 2,
        num_attention_heads=1,
        cross_attention_dim=32,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=5,
    )
    zero_residual_branches(unet, WIRED)
    unet.conv_in.weight.data[:, :4] *= 0.1  # at high noise the noisy latents tell nothing
    read = torch.zeros(5, 9)
    read[:4, 4:8] = SCALING * torch.eye(4)
    read[4, 8] = -2.0  # 1 for a frame that is given, -1 for one to make
    wire_in(unet.conv_in, read)
    unet.conv_in.bias.data[WIRED - 3 : WIRED - 1] = torch.tensor([1.0, -1.0])
    # the last resnet joins the path from below with the skip from conv_in: let the wired channels of the skip through
    shortcut = unet.up_blocks[-1].resnets[-1].spatial_res_block.conv_shortcut
    shortcut.weight.data[:WIRED] = 0
    shortcut.weight.data[:, CHANNELS + 2 : CHANNELS + WIRED : 3] = 0  # others need not drown in the constants
    shortcut.weight.data[:WIRED, CHANNELS : CHANNELS + WIRED, 0, 0] = torch.eye(WIRED)
    shortcut.bias.data[:WIRED] = 0
    wire_out(unet.conv_norm_out, unet.conv_out, -torch.eye(4))
    blend_by_attention(unet.up_blocks[-1].attentions[-1])
    return unet


def blend_by_attention(transformer: Any) -> None:
    """Have a transformer's attention along the frames add, to a frame to make, the mean of the frames that are given.

    So what its queries and keys change is which frame is seen where: all that LoRA on them has to learn to interpolate.
    Beside the wired channels, as they come, it has eight of its own: latents of a frame that is given, else zeros; the mean.
    """
    given, mean, end = slice(WIRED, WIRED + 4), slice(WIRED + 4, WIRED + 8), WIRED + 8
    x, minus_x, constants = slice(0, 12, 3), slice(1, 12, 3), slice(2, WIRED, 3)
    is_given, inner = WIRED - 3, 4 * CHANNELS  # GEGLU's gates come after its inner channels
    with torch.no_grad():
        for i in range(WIRED // 3):
            read_linearly(transformer.norm, 3 * i, 3 * i + 1)
        transformer.norm.weight[constants], transformer.norm.bias[constants] = 0, CONSTANT
        transformer.proj_in.weight[:end] = torch.eye(CHANNELS)[:end]
        transformer.proj_in.weight[WIRED:end], transformer.proj_in.bias[:end] = 0, 0
        transformer.proj_in.weight[end:, constants] = 0
        (space,), (time,) = transformer.transformer_blocks, transformer.temporal_transformer_blocks
        for block in (space, time):
            for name, layer in block.named_modules():
                if isinstance(layer, nn.LayerNorm):  # the constants are its mean and its std, but for a little
                    share = WIRED / 3 / CHANNELS
                    layer.weight.fill_(CONSTANT * (share - share**2) ** 0.5)
                    layer.bias.fill_(CONSTANT * share)
                    layer.weight[constants], layer.bias[constants] = 0, 0
                elif name.endswith(("to_out.0", "net.2")):
                    layer.weight[:end] *= 1e-3  # and not zero: DoRA divides by the norms of rows
                    layer.bias[:end] = 0
        transformer.time_pos_embed.linear_2.weight[:end] = 0
        transformer.time_pos_embed.linear_2.bias[:end] = 0

        # inner channel i is x_i / 4 times GELU(4) where a frame is given, and times GELU(0) where not
        gated, shrink = time.ff_in.net[0].proj, time.ff_in.net[2]
        for first in (0, inner):
            gated.weight[first : first + 4], gated.bias[first : first + 4] = 0, 0
        gated.weight[:4, x], gated.weight[:4, minus_x] = torch.eye(4) / 8, -torch.eye(4) / 8
        gated.weight[inner : inner + 4, is_given], gated.bias[inner : inner + 4] = 2, 2
        shrink.weight[:, :4] = 0
        shrink.weight[given, :4] = torch.eye(4)

        attention = time.attn1
        # a score of 3 where one frame is given and the other is not, -3 where they are alike
        strength = (3 * CHANNELS**0.5) ** 0.5
        attention.to_k.weight *= 0.05  # what is in a frame tells little at first
        attention.to_k.weight[0] = 0
        attention.to_q.weight[0] = 0
        attention.to_q.weight[0, is_given], attention.to_k.weight[0, is_given] = strength, -strength
        attention.to_v.weight[:4] = 0
        attention.to_v.weight[:4, given] = torch.eye(4)
        attention.to_out[0].weight[:, :4] = 0
        time_share = 1 - torch.sigmoid(transformer.time_mixer.mix_factor)
        attention.to_out[0].weight[mean, :4] = torch.eye(4) / time_share
        transformer.proj_out.weight[:, :end] = 0
        transformer.proj_out.weight[x, mean], transformer.proj_out.weight[minus_x, mean] = torch.eye(4), -torch.eye(4)


def zero_residual_branches(network: nn.Module, channels: int | None = None) -> None:
    """Zero the last layer of every resnet, attention and transformer branch, so that each passes its input on.

    channels  in the first ones alone: the rest of the network starts as it is drawn, and so learns from the first step
    """
    for name, layer in network.named_modules():
        last = name.endswith((".conv2", ".proj_out")) or (
            name.endswith("to_out.0") and "mid_block.attentions.0.to" in name
        )
        if last and isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter[:channels])


def wire_in(conv: Any, values: torch.Tensor) -> None:
    """Make rows of `values` (data, inputs) the wired channels (x, -x, K) of a 3x3 convolution's output."""
    for i, row in enumerate(values):
        wire(conv, 3 * i, nn.functional.pad(row[:, None, None], (1, 1, 1, 1)))


def wire(conv: Any, first: int, kernel: torch.Tensor) -> None:
    """Make three outputs of a convolution, from the first on, (x, -x, K) of what a kernel (inputs, 3, 3) finds."""
    conv.weight.data[first : first + 3] = torch.stack([kernel, -kernel, torch.zeros_like(kernel)])
    conv.bias.data[first : first + 3] = torch.tensor([0.0, 0.0, CONSTANT])


def wire_out(norm: Any, conv: Any, values: torch.Tensor) -> None:
    """Make output o of norm, SiLU and conv the sum of values[o, i] x data i (outputs, data) of the wired channels."""
    nn.init.zeros_(conv.bias)
    conv.weight.data *= 0.1  # what is not wired starts as a small perturbation
    for i, column in enumerate(values.T):
        x, minus_x, constant = 3 * i, 3 * i + 1, 3 * i + 2
        read_linearly(norm, x, minus_x)
        conv.weight.data[:, [x, minus_x, constant]] = 0
        conv.weight.data[: len(column), x, 1, 1] = column
        conv.weight.data[: len(column), minus_x, 1, 1] = -column


def read_linearly(norm: Any, x: int, minus_x: int) -> None:
    """Undo a norm on two channels of (x, -x, K), whose mean is K / 3 and whose std is K sqrt(2) / 3."""
    norm.weight.data[[x, minus_x]] = CONSTANT * 2**0.5 / 3
    norm.bias.data[[x, minus_x]] = CONSTANT / 3


def _interpolate(conv: Any) -> None:
    """Bilinear interpolation of each channel, for a convolution after nearest-neighbour upsampling."""
    tap = torch.tensor([0.25, 0.5, 0.25])
    _depthwise(conv, tap[:, None] * tap)


def _depthwise(conv: Any, kernel: torch.Tensor) -> None:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    for channel in range(conv.out_channels):
        conv.weight.data[channel, channel] = kernel
