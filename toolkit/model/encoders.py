"""Pixels to latents and tokens, and back, exactly as SVD's inference pipeline does it.

Test: pytest tests/model (against StableVideoDiffusionPipeline). Legend: frames are fp32 in [-1, 1], axes BTCHW in pixels.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from toolkit.model.decode import decode_in_chunks
from toolkit.model.quiet import quiet_libraries

# CLIP's normalisation; SVD's feature extractor holds the standard values.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_SIZE_PX = 224
USABLE = 0.85  # of what a device has free: an allocator rounds and fragments, and libraries take workspace
DECODED_NUMBERS = 1024  # a pixel: what the published decoder holds at its peak
# stabilityai/stable-video-diffusion-img2vid-xt, vae/config.json and image_encoder/config.json
VAE_CONFIG = {"block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
              "layers_per_block": 2, "latent_channels": 4, "scaling_factor": 0.18215, "force_upcast": True}  # fmt: skip
CLIP_CONFIG = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
               "projection_dim": 1024, "image_size": 224, "patch_size": 14, "hidden_act": "gelu"}  # fmt: skip


@torch.no_grad()
def encode_frames(vae: Any, frames_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Encode frames to the VAE's posterior.

    returns  mean_BTCHW, std_BTCHW: fp32, unscaled (not multiplied by the VAE's scaling factor)
    """
    # a frame at a time: the encoder mixes none, and five at once, or of five clips, would take five times the memory
    posteriors = [
        vae.encode(frame_1CHW.to(vae.dtype)).latent_dist for frame_1CHW in frames_BTCHW.flatten(0, 1).split(1)
    ]
    mean, std = (torch.cat([getattr(p, part).float() for p in posteriors]) for part in ("mean", "std"))
    B = len(frames_BTCHW)
    return mean.unflatten(0, (B, -1)), std.unflatten(0, (B, -1))


@torch.no_grad()
def decode_latents(vae: Any, latents_BTCHW: Tensor, chunk_frames: int | None = None) -> Tensor:
    """Decode unscaled latents, clip by clip: frames of two clips must not be mixed in time.

    chunk_frames  frames on the device at once: fewer take longer and give the same; default as many as a GPU has room for
    returns       frames_BTCHW fp32, clamped to [-1, 1]
    source        diffusers, StableVideoDiffusionPipeline.decode_latents
    """
    T = latents_BTCHW.shape[1]
    chunk = min(chunk_frames or find_room(vae, latents_BTCHW), T)
    clips = [
        vae.decode(clip_TCHW, num_frames=T).sample if chunk == T else decode_in_chunks(vae, clip_TCHW, chunk)
        for clip_TCHW in latents_BTCHW.to(vae.dtype)
    ]
    return torch.stack(clips).float().clamp(-1, 1)


def find_room(vae: Any, latents_BTCHW: Tensor) -> int:
    """Frames of a clip that a GPU has room to decode at once, one at least; on a CPU all.

    A training run may hold much of it, which a window of many frames would not fit beside.
    """
    device = latents_BTCHW.device
    if device.type != "cuda":
        return latents_BTCHW.shape[1]
    torch.cuda.empty_cache()  # else what the allocator keeps for later would be taken
    return max(1, int(USABLE * torch.cuda.mem_get_info(device)[0] // count_decoding_bytes(vae, latents_BTCHW)))


def count_decoding_bytes(vae: Any, latents_BTCHW: Tensor) -> int:
    """Peak bytes of decoding, for each frame of a clip."""
    H, W = latents_BTCHW.shape[-2:]
    return DECODED_NUMBERS * vae.dtype.itemsize * H * W * 4 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def embed_stills(image_encoder: Any, stills_B2CHW: Tensor) -> Tensor:
    """Embed the two stills with CLIP, each alone.

    stills_B2CHW  fp32 in [-1, 1], at any size
    returns       embeds_B2D in the encoder's dtype
    source        diffusers, StableVideoDiffusionPipeline._encode_image: antialiased resize to 224 without crop in
                  [-1, 1], then [0, 1], then CLIP's mean and std
    """
    B, N = stills_B2CHW.shape[:2]
    small = _find_resize()(stills_B2CHW.flatten(0, 1).float(), (CLIP_SIZE_PX, CLIP_SIZE_PX))
    mean, std = (torch.tensor(v, device=small.device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = ((small + 1) / 2 - mean) / std
    return image_encoder(pixels.to(image_encoder.dtype)).image_embeds.unflatten(0, (B, N))


@functools.cache
def _find_resize() -> Any:
    """The pipeline's own private helper rather than a copy of it: a test compares with the pipeline at each upgrade."""
    with quiet_libraries():  # its image processor misses torchvision, which is not needed
        from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
    return _resize_with_antialiasing
