"""The only place that builds what the UNet reads, for training, validation and inference alike.

Test: pytest tests/diffusion. Channels of the input, in this order: [0:4] noisy latents in the network's own scaling,
[4:8] conditioning latents, [8] mask (0 known frame, 1 frame to generate); then tokens and time ids.
Facts of the layout: aim-uofa/Framer, pipelines/pipeline_stable_video_diffusion_interp_control.py.
"""

import torch
from torch import Tensor

from toolkit.diffusion.layout import Layout


def build_input(x_BTCHW: Tensor, ends_B2CHW: Tensor, mask_token_11C11: Tensor, layout: Layout) -> Tensor:
    """Join noisy latents, conditioning latents and mask to the nine channels.

    x_BTCHW           (B, T, 4, H, W) noisy latents, already divided by sqrt(1 + sigma^2)
    ends_B2CHW        (B, 2, 4, H, W) latents of the first and the last still
    mask_token_11C11  (1, 1, 4, 1, 1) what stands in for the latents of a frame to generate
    returns           (B, T, 9, H, W)
    """
    B, T, C, H, W = x_BTCHW.shape
    mask_BT1HW = x_BTCHW.new_ones(B, T, 1, H, W)
    if layout.name == "spec_middle":
        cond_BTCHW = ends_B2CHW.mean(1, keepdim=True)
    else:
        cond_BTCHW = mask_token_11C11.to(x_BTCHW).expand(B, T, C, H, W).clone()
        # frame by frame: for a mask over the frames the host would wait until a GPU has done all before
        known = [frame for frame, is_known in enumerate(layout.known_T.tolist()) if is_known]
        for frame, end_BCHW in zip(known, ends_B2CHW.unbind(1), strict=True):
            cond_BTCHW[:, frame], mask_BT1HW[:, frame] = end_BCHW.to(x_BTCHW), 0
    return torch.cat([x_BTCHW, cond_BTCHW.to(x_BTCHW), mask_BT1HW], dim=2)


def build_tokens(embeds_B2D: Tensor, mode: str) -> Tensor:
    """Make the cross-attention context of the two stills' CLIP embeddings.

    mode     "first_last": two tokens, as Framer reads them; "first": the first still's, as plain SVD reads one;
             "mean": their average, one token, as the spec has it
    returns  tokens_BND, N = 2 or 1
    """
    if mode == "first_last":
        return embeds_B2D
    if mode == "first":
        return embeds_B2D[:, :1]
    if mode == "mean":
        return embeds_B2D.mean(1, keepdim=True)
    raise ValueError(f"clip_tokens {mode!r}: it must be first_last, first or mean")


def build_time_ids(fps_B: Tensor, motion_B: Tensor, noise_augmentation: float) -> Tensor:
    """Make the micro-conditioning of each clip: [fps - 1, motion bucket, noise augmentation].

    fps - 1: SVD's own pipeline subtracts one before embedding; it is done here only, so train and infer agree.
    returns  ids_B3 fp32
    """
    fps_B, motion_B = fps_B.float(), motion_B.float()  # an integer tensor would cut the noise augmentation to 0
    return torch.stack([fps_B - 1, motion_B, torch.full_like(fps_B, noise_augmentation)], dim=1)


def drop_conditioning(ends_B2CHW: Tensor, tokens_BND: Tensor, uniform_B: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Zero what is known of some clips, so that the network learns the branch without it, which guidance needs.

    uniform_B  a draw in [0, 1) for each clip
    rate       p: r < p loses the tokens, r < 2p both, r < 3p the latents of the ends. Mask and mask token stay, as they do
               in the branch without conditioning
    returns    ends_B2CHW, tokens_BND
    source     pixeli99/SVD_Xtend, train_svd.py
    """
    no_tokens_B = uniform_B < 2 * rate
    no_ends_B = (uniform_B >= rate) & (uniform_B < 3 * rate)
    return ends_B2CHW.masked_fill(no_ends_B.view(-1, 1, 1, 1, 1), 0), tokens_BND.masked_fill(
        no_tokens_B.view(-1, 1, 1), 0
    )


def make_unconditional(ends_B2CHW: Tensor, tokens_BND: Tensor) -> tuple[Tensor, Tensor]:
    """Make the ends and tokens of guidance's other branch: zeros of both, while mask and mask token stay."""
    return torch.zeros_like(ends_B2CHW), torch.zeros_like(tokens_BND)


def guidance_T(minimum: float, maximum: float, layout: Layout) -> Tensor:
    """The guidance scale of each frame that enters the UNet: even steps from minimum to maximum over the whole window."""
    return torch.linspace(minimum, maximum, layout.window)[list(layout.in_window)]


def guide(conditional_BTCHW: Tensor, unconditional_BTCHW: Tensor, scale_T: Tensor) -> Tensor:
    """Classifier-free guidance: unconditional + scale (conditional - unconditional), each frame by its own scale."""
    scale = scale_T.view(-1, 1, 1, 1)
    return unconditional_BTCHW + scale * (conditional_BTCHW - unconditional_BTCHW)
