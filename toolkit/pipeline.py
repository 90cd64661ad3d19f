"""FramerPipeline: interpolation as a diffusers pipeline, with the names and habits of StableVideoDiffusionPipeline.

Test: pytest tests/test_pipeline.py. It only translates: the network is fed and sampled by toolkit/run/framer.py, as in
training and on the command line.

    from toolkit import FramerPipeline

    pipe = FramerPipeline.from_pretrained("framer", torch_dtype=torch.bfloat16).to("cuda")
    pipe.load_lora_weights("exported")
    frames = pipe(first, last, num_frames=14, generator=torch.Generator().manual_seed(0)).frames[0]
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    CMStochasticIterativeScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import BaseImageProcessor, CLIPVisionModelWithProjection

from toolkit.config import FED_BY, DiffusionConfig, ModelConfig, RunConfig, parse_config
from toolkit.data.clips import resize_cover
from toolkit.data.stills import to_rgb
from toolkit.diffusion.objective import time_input
from toolkit.model.attention import set_attention
from toolkit.model.base import PRECISIONS, Base, load_base, sign_unet
from toolkit.model.controlnet import FramerControlNet
from toolkit.model.formats import AdapterFile, linear_layers, read_adapter
from toolkit.model.lora import (
    adapted_layers,
    add_adapter,
    delete_adapter,
    enable_adapter,
    merge_adapters,
    remove_adapters,
    set_adapters,
)
from toolkit.model.quiet import quiet_libraries
from toolkit.model.unet import FramerUNet
from toolkit.run.folder import find_adapter
from toolkit.run.framer import Framer, Sampling, Steering, to_signed
from toolkit.run.inference import (
    Told,
    list_differences,
    load_control,
    read_merged,
    read_source,
    recipe_sampling,
    told_of,
)

SAMPLERS = {"EulerDiscreteScheduler": "euler", "LCMScheduler": "lcm", "CMStochasticIterativeScheduler": "lcm"}
TOLD = Told()  # where nobody says otherwise
Images = PIL.Image.Image | list[PIL.Image.Image] | Tensor


@dataclass
class FramerPipelineOutput(BaseOutput):
    """frames: a list of PIL images per clip, or (B, T, H, W, 3) in [0, 1] for "np", or (B, T, 3, H, W) for "pt"."""

    frames: list[list[PIL.Image.Image]] | np.ndarray | Tensor


class FramerPipeline(DiffusionPipeline):
    """Make the frames between a first and a last still.

    scheduler            EulerDiscreteScheduler, or LCMScheduler or CMStochasticIterativeScheduler for distilled bases
    controlnet           a FramerControlNet, for trajectories
    layout, clip_tokens, scale_conditioning, noise_augmentation  how the network is fed; see diffusion in a recipe
    num_frames           of a window, both stills included
    the others           what a call takes where it is not told otherwise
    """

    model_cpu_offload_seq = "image_encoder->unet->vae"
    _callback_tensor_inputs = ["latents"]
    _optional_components = ["feature_extractor", "controlnet"]

    def __init__(
        self,
        vae: AutoencoderKLTemporalDecoder,  # from_pipe reads the classes
        image_encoder: CLIPVisionModelWithProjection,
        unet: FramerUNet,
        scheduler: EulerDiscreteScheduler | LCMScheduler | CMStochasticIterativeScheduler,
        feature_extractor: BaseImageProcessor | None = None,
        controlnet: FramerControlNet | None = None,
        layout: str = "framer_clip",
        num_frames: int = 14,
        clip_tokens: str = "first_last",
        scale_conditioning: bool = False,
        noise_augmentation: float = 0.02,
        num_inference_steps: int = 25,
        min_guidance_scale: float = 1.0,
        max_guidance_scale: float = 3.0,
        fps: float = TOLD.fps,
        motion_bucket_id: float = TOLD.motion,
    ) -> None:
        super().__init__()
        if not hasattr(unet, "mask_token") or unet.config.in_channels != 9:
            raise ValueError(
                f"unet is a {type(unet).__name__} of {unet.config.in_channels} channels; give a FramerUNet of 9, which "
                "FramerPipeline.from_pretrained makes of any SVD UNet"
            )
        if getattr(unet, "peft_config", {}):
            raise ValueError(
                "adapters stand beside the weights; call fuse_lora or unload_lora_weights before from_pipe"
            )
        self.register_modules(
            vae=vae,
            image_encoder=image_encoder,
            unet=unet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            controlnet=controlnet,
        )
        self.register_to_config(
            layout=layout,
            num_frames=num_frames,
            clip_tokens=clip_tokens,
            scale_conditioning=scale_conditioning,
            noise_augmentation=noise_augmentation,
            num_inference_steps=num_inference_steps,
            min_guidance_scale=min_guidance_scale,
            max_guidance_scale=max_guidance_scale,
            fps=fps,
            motion_bucket_id=motion_bucket_id,
        )
        self._make_settings(noise_augmentation)  # raises ValueError for what it does not know
        self.video_processor = VideoProcessor(do_resize=False)
        self._schedule = dict(scheduler.config)  # of the base; a scheduler put in its place later chooses the sampler
        self._signature = sign_unet(unet)
        self._adapters: dict[str, tuple[Path, AdapterFile]] = {}
        self._unfused: dict[str, Tensor] = {}  # weights as they were before fuse_lora
        self._fused: dict[str, float] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        unet: str | Path | None = None,
        *,
        torch_dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        unet_revision: str | None = None,
        variant: str | None = None,
        controlnet: str | Path | None = None,
        controlnet_revision: str | None = None,
        **settings: Any,
    ) -> FramerPipeline:
        """Load a base by name (framer, svd, svd-xt, tiny), from a folder in diffusers layout, or from the hub.

        unet         folder, hub id or .safetensors file that replaces the base's UNet
        torch_dtype  float32, bfloat16 or float16; a VAE whose config says force_upcast stays in float32
        settings     layout, num_frames and the others of the class; default what save_pretrained wrote into a local folder,
                     or what a merged export tells of itself
        raises       UserError, a ValueError: something is missing, extra or damaged; the stock loader drops mask_token
        """
        known = cls._get_signature_keys(cls)[1]
        if unknown := settings.keys() - known:
            raise TypeError(f"from_pretrained knows no {min(unknown)}; settings are {', '.join(sorted(known))}")
        unet, controlnet = (None if place is None else str(place) for place in (unet, controlnet))
        folder, saved, sampler = Path(pretrained_model_name_or_path).expanduser(), {}, "EulerDiscreteScheduler"
        if (folder / "model_index.json").is_file():
            index = json.loads((folder / "model_index.json").read_text())
            if index.get("_class_name") == cls.__name__:
                saved, sampler = {name: index[name] for name in known if name in index}, index["scheduler"][1]
                if controlnet is None and (folder / "controlnet").is_dir():
                    controlnet = str(folder)
        if unet is not None and (about := read_merged(unet, unet_revision)):
            saved |= _follow(parse_config(about["recipe"], unet), about)
        model = ModelConfig(
            base=str(pretrained_model_name_or_path), unet=unet, revision=revision, unet_revision=unet_revision,
            variant=variant, controlnet=controlnet, controlnet_revision=controlnet_revision,
        )  # fmt: skip
        return cls._from_model(model, torch_dtype, sampler, saved | settings)

    @classmethod
    def from_run(cls, run: str | Path, lora_scale: float = 1.0) -> FramerPipeline:
        """Load a run folder's base and newest adapter, fed and sampled as its recipe says.

        A run that was trained with diffusion.control wants trajectories in each call.
        """
        source = read_source(str(run), lora_scale=lora_scale)
        config = source.config
        scheduler = {"euler": "EulerDiscreteScheduler", "lcm": "LCMScheduler"}[config.validation.sampler]
        settings = _follow(config, source.about)
        pipeline = cls._from_model(source.model, PRECISIONS[config.engine.precision], scheduler, settings)
        for path, scale in source.adapters:
            pipeline.load_lora_weights(path, "run")
            pipeline.set_adapters("run", scale)
        return pipeline

    @classmethod
    def _from_model(
        cls, model: ModelConfig, dtype: torch.dtype, scheduler: str, settings: dict[str, Any]
    ) -> FramerPipeline:
        precision = {value: name for name, value in PRECISIONS.items()}.get(dtype)
        if precision is None:
            raise ValueError(f"torch_dtype is {dtype}; it must be torch.float32, torch.bfloat16 or torch.float16")
        if scheduler not in SAMPLERS:
            raise ValueError(f"the scheduler is {scheduler}; this pipeline samples with {', '.join(SAMPLERS)}")
        base = load_base(model, torch.device("cpu"), precision)
        set_attention(base.unet, "sdpa")  # on any device that .to() may choose, and it splits what is too large for it
        control = load_control(model, base, "sdpa") if model.controlnet else None
        with quiet_libraries():  # a scheduler of another kind warns of each setting that it does not have
            made = getattr(diffusers, scheduler).from_config(base.scheduler)
        return cls(base.vae, base.image_encoder, base.unet, made, controlnet=control, **settings)

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        last_image: Images,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        min_guidance_scale: float | None = None,
        max_guidance_scale: float | None = None,
        fps: float | None = None,
        motion_bucket_id: float | None = None,
        noise_aug_strength: float | None = None,
        decode_chunk_size: int | None = None,
        trajectories: np.ndarray | None = None,
        controlnet_conditioning_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> Any:
        """Make the frames of a window; its two ends are the stills themselves, untouched but for scaling and cropping.

        What is None is as the pipeline's config has it.

        image, last_image    PIL image, list of them, or tensor (B, 3, H, W) in [0, 1]: the two stills of each clip
        height, width        multiples of 8; stills of another size are scaled to cover it and cropped. Default: theirs
        num_frames           of the window, both stills included; layout spec_middle makes its middle one alone
        min_, max_guidance_scale  classifier-free guidance rises over the window from one to the other; max 1: none
        fps                  of the window's frames, told as fps - 1
        noise_aug_strength   std of the noise on the stills' pixels; the config's is noise_augmentation
        decode_chunk_size    frames the VAE decodes at once: fewer take longer, give the same; default as many as fit
        trajectories         (P, K, 2): (x, y) of P points at K times from the first still to the last, in pixels of
                             height x width
        generator            one for all clips, or a list with one per clip
        latents              N(0, 1) to start from, (B, T, 4, H / 8, W / 8)
        output_type          "pil", "np", "pt" or "latent" (scaled latents as the network left them)
        callback_on_step_end (pipeline, step, timestep, {"latents": ...}) -> {"latents": ...} after each step
        returns              FramerPipelineOutput, or with return_dict False its frames
        raises               ValueError for what cannot be interpolated
        """
        stills_B2CHW = self._read_stills(image, last_image, height, width)
        sampling = Sampling(
            self._choose("num_inference_steps", num_inference_steps),
            self._choose_sampler(),
            self._choose("min_guidance_scale", min_guidance_scale),
            self._choose("max_guidance_scale", max_guidance_scale),
            decode_chunk_size,
        )
        framer = self._make_framer(
            self._choose("num_frames", num_frames), self._choose("noise_augmentation", noise_aug_strength)
        )
        B, device = len(stills_B2CHW), self._execution_device
        if isinstance(generator, list) and len(generator) != B:
            raise ValueError(f"{len(generator)} generators for {B} clips; give one for all, or one per clip")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs has {min(unknown)}; allowed is latents")
        if trajectories is not None and self.controlnet is None:
            raise ValueError("trajectories are given, but the pipeline has no controlnet that follows them")
        points_PK2 = np.zeros((0, 2, 2)) if trajectories is None else np.asarray(trajectories, float)
        if points_PK2.ndim != 3 or points_PK2.shape[1] < 2 or points_PK2.shape[2] != 2:
            raise ValueError(f"trajectories have the shape {points_PK2.shape}; give (P, K, 2) with K of 2 or more")
        if not np.isfinite(points_PK2).all():
            raise ValueError("trajectories hold a number that is not finite; give (x, y) in pixels")
        height_px, width_px = stills_B2CHW.shape[-2:]
        if len(points_PK2) and not ((points_PK2 >= 0) & (points_PK2 < (width_px, height_px))).all(-1).any():
            raise ValueError(
                f"trajectories have no place inside the {width_px}x{height_px} picture; give (x, y) in its pixels"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type}; it must be pil, np, pt or latent")
        if decode_chunk_size is not None and decode_chunk_size < 1:
            raise ValueError(f"decode_chunk_size is {decode_chunk_size}; give 1 or more, or None for as many as fit")
        self._note_unguided(sampling)

        def draw(shape: Sequence[int]) -> Tensor:
            return randn_tensor(tuple(shape), generator=generator, device=device, dtype=torch.float32)

        stills_B2CHW = stills_B2CHW.to(device)
        augmentation = draw(stills_B2CHW.shape) if framer.settings.noise_augmentation else None
        told = self._choose("fps", fps), self._choose("motion_bucket_id", motion_bucket_id)
        fps_B, motion_B = (torch.full((B,), float(value)) for value in told)
        condition = framer.condition(stills_B2CHW, fps_B, motion_B, augmentation)
        if trajectories is not None:
            steering = [Steering(points_PK2, controlnet_conditioning_scale)] * B
            condition = framer.steer(condition, steering, stills_B2CHW.shape[-2:])
        shape = (B, framer.layout.frames, 4, *condition.ends_B2CHW.shape[-2:])
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}; these stills need {shape}")
        noise_BTCHW = draw(shape) if latents is None else latents.to(device, torch.float32)
        timesteps = time_input(framer.make_sigmas(sampling)[:-1], framer.parameterization, framer.alpha_bar)
        with self.progress_bar(total=sampling.steps) as bar:

            def on_step(step: int, latents_BTCHW: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return latents_BTCHW
                given = dict.fromkeys(callback_on_step_end_tensor_inputs, latents_BTCHW)
                return (callback_on_step_end(self, step, timesteps[step], given) or {}).pop("latents", latents_BTCHW)

            latents_BTCHW = framer.sample(condition, sampling, noise_BTCHW, lambda _: draw(shape), on_step)
        if output_type == "latent":
            frames: Any = latents_BTCHW
        else:
            made_BTCHW = framer.decode(latents_BTCHW, decode_chunk_size)
            between = made_BTCHW if framer.layout.frames == 1 else made_BTCHW[:, 1:-1]
            video_BTCHW = torch.cat([stills_B2CHW[:, :1], between, stills_B2CHW[:, 1:]], dim=1)
            frames = self.video_processor.postprocess_video(video_BTCHW.movedim(2, 1), output_type)
        self.maybe_free_model_hooks()
        return FramerPipelineOutput(frames=frames) if return_dict else frames

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Refused: layer by layer, mask_token would be read while it has no data."""
        raise NotImplementedError("this pipeline cannot offload layer by layer; use enable_model_cpu_offload()")

    # ---- LoRA, as diffusers' own pipelines have it

    def load_lora_weights(
        self, pretrained_model_name_or_path: str | Path, adapter_name: str | None = None, weight_name: str | None = None
    ) -> None:
        """Load an adapter of any format and switch it on beside those that are loaded.

        pretrained_model_name_or_path  run folder, checkpoint, exported folder or file, or on the hub owner/name[@revision]
        adapter_name                   for set_adapters; default adapter_0, adapter_1, ...
        weight_name                    of a file in the folder
        """
        self._refuse_while_fused()
        free = (f"adapter_{i}" for i in itertools.count() if f"adapter_{i}" not in self._adapters)
        name = adapter_name or next(free)
        source = find_adapter(pretrained_model_name_or_path, weight_name or "")
        adapter = read_adapter(source, self.unet)
        add_adapter(self.unet, adapter, source, self._signature, name)
        self._adapters[name] = source, adapter
        if other := list_differences(adapter.metadata, self.config):
            warnings.warn(
                f"{source} was trained with {other}; FramerPipeline.from_run follows the recipe", stacklevel=2
            )

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Activate exactly these loaded adapters; a weight multiplies alpha / rank."""
        self._refuse_while_fused()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        if len(given) != len(names) or len(set(names)) < len(names):
            raise ValueError(
                f"{len(given)} weights for {', '.join(names)}; give each adapter once, and one weight each"
            )
        weights = [1.0 if weight is None else float(weight) for weight in given]
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"weights are {', '.join(map(str, weights))}; give finite numbers")
        set_adapters(self.unet, dict(zip(names, weights, strict=True)))

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that are switched on."""
        return list(getattr(self.unet, "weights", {}))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all loaded adapters, by the part that they are in."""
        return {"unet": list(self._adapters)} if self._adapters else {}

    def enable_lora(self) -> None:
        """Switch the adapters on again as they were."""
        self._refuse_while_fused()
        enable_adapter(self.unet, True)

    def disable_lora(self) -> None:
        """Switch all adapters off: the untuned base bit for bit."""
        self._refuse_while_fused()
        enable_adapter(self.unet, False)

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """Take adapters out of memory; the others stay as they are."""
        self._refuse_while_fused()
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if unknown := set(names) - set(self._adapters):
            raise ValueError(f"no adapter named {min(unknown)} is loaded; loaded are {', '.join(self._adapters)}")
        for name in dict.fromkeys(names):
            delete_adapter(self.unet, name)
            del self._adapters[name]

    def unload_lora_weights(self) -> None:
        """Take all adapters out of memory. What fuse_lora folded into the weights stays in them, as in diffusers."""
        if not self._unfused:
            remove_adapters(self.unet)
        self._adapters, self._unfused = {}, {}

    def fuse_lora(self, *, lora_scale: float = 1.0, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the weights, so that they cost no time; unfuse_lora undoes it exactly.

        lora_scale     multiplies the weight of each
        adapter_names  default the active ones; each as it is weighed, 1 where it is not active
        """
        self._refuse_while_fused()
        active = dict(getattr(self.unet, "weights", {}))
        chosen = active if adapter_names is None else {name: active.get(name, 1.0) for name in adapter_names}
        if not chosen or any(layer.disable_adapters for layer in adapted_layers(self.unet).values()):
            raise ValueError("no adapter is active; call load_lora_weights, or enable_lora, first")
        set_adapters(self.unet, {name: weight * lora_scale for name, weight in chosen.items()})
        self._fused = active  # what unfuse_lora comes back to
        adapted = {
            n: layer
            for n, layer in linear_layers(self.unet).items()
            if hasattr(self.unet.get_submodule(n), "base_layer")
        }
        self._unfused = {f"{name}.weight": layer.weight.detach().cpu().clone() for name, layer in adapted.items()}
        self._unfused |= {name: value.cpu() for name, value in self.unet.untuned.items()}
        merge_adapters(self.unet)

    def unfuse_lora(self) -> None:
        """Bring the weights back bit for bit, with the adapters beside them again."""
        if not self._unfused:
            raise ValueError("no adapter is fused; call fuse_lora first")
        for name, value in self._unfused.items():
            self.unet.get_parameter(name).data.copy_(value)
        self._unfused = {}
        for name, (source, adapter) in self._adapters.items():
            add_adapter(self.unet, adapter, source, self._signature, name)
        set_adapters(self.unet, self._fused)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; adapters are folded in first, or taken out, by their own verbs."""
        if self._adapters and not self._unfused:
            raise ValueError("adapters stand beside the weights; call fuse_lora or unload_lora_weights before you save")
        with quiet_libraries():  # what the base is goes along, whatever scheduler stands for the sampler
            self.register_modules(scheduler=type(self.scheduler).from_config(self._read_schedule()))
        super().save_pretrained(save_directory, *args, **kwargs)

    def _refuse_while_fused(self) -> None:
        if self._unfused:
            raise ValueError("adapters are fused into the weights; call unfuse_lora first")

    def _note_unguided(self, sampling: Sampling) -> None:
        """Say so where guidance leans on a branch that the tuning never saw."""
        off = any(layer.disable_adapters for layer in adapted_layers(self.unet).values())
        if off or not sampling.guided:
            return
        for name, (source, adapter) in self._adapters.items():
            trained = adapter.metadata.get("recipe", {}).get("diffusion", {})
            if name in self.get_active_adapters() and trained.get("conditioning_dropout") == 0:
                warnings.warn(
                    f"guidance above 1, but {source} was trained without diffusion.conditioning_dropout", stacklevel=4
                )

    # ---- from diffusers' world to ours

    def _read_stills(self, first: Images, last: Images, height: int | None, width: int | None) -> Tensor:
        """The stills of all clips, (B, 2, 3, H, W) fp32 in [-1, 1], of one size."""
        ends = [self._read_images(name, images) for name, images in (("image", first), ("last_image", last))]
        if len(ends[0]) != len(ends[1]):
            raise ValueError(f"{len(ends[0])} first and {len(ends[1])} last images; give as many of each")
        own_height, own_width = (size // 8 * 8 for size in ends[0][0].shape[:2])
        height, width = height or own_height, width or own_width
        if height % 8 or width % 8 or not height or not width:
            raise ValueError(f"`height` and `width` have to be divisible by 8 but are {height} and {width}.")
        cut = [torch.from_numpy(np.stack([resize_cover(i[None], height, width)[0] for i in end])) for end in ends]
        return to_signed(torch.stack(cut, dim=1))

    @staticmethod
    def _read_images(name: str, images: Images) -> list[np.ndarray]:
        if isinstance(images, Tensor):
            if images.ndim not in (3, 4) or images.shape[-3] != 3 or not (images.min() >= 0 and images.max() <= 1):
                raise ValueError(f"`{name}` is a tensor of shape {tuple(images.shape)}; give (B, 3, H, W) in [0, 1]")
            pixels = (images.reshape(-1, *images.shape[-3:]).float() * 255).round().to(torch.uint8)
            return list(pixels.movedim(1, -1).cpu().numpy())
        listed = images if isinstance(images, list) else [images]
        if not listed or not all(isinstance(i, PIL.Image.Image) for i in listed):
            raise ValueError(
                f"`{name}` has to be of type `torch.Tensor` or `PIL.Image.Image` or `list[PIL.Image.Image]` but is "
                f"{type(images)}"
            )
        return [to_rgb(i) for i in listed]

    def _choose_sampler(self) -> Any:
        kind = type(self.scheduler).__name__
        if kind not in SAMPLERS:
            raise ValueError(f"the scheduler is {kind}; this pipeline samples with {', '.join(SAMPLERS)}")
        return SAMPLERS[kind]

    def _choose(self, name: str, given: Any) -> Any:
        return self.config[name] if given is None else given

    def _make_settings(self, strength: float) -> DiffusionConfig:
        return DiffusionConfig(**{name: self.config[name] for name in FED_BY} | {"noise_augmentation": strength})

    def _read_schedule(self) -> dict[str, Any]:
        """The base's own schedule, over the range of sigmas that the scheduler in use may have of its own."""
        ranges = {name: self.scheduler.config.get(name) for name in ("sigma_min", "sigma_max")}
        return self._schedule | {name: value for name, value in ranges.items() if value is not None}

    def _make_framer(self, num_frames: int, strength: float) -> Framer:
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.to(torch.float32)  # in float16 its activations overflow
        base = Base(
            name="pipeline",
            unet=self.unet,
            vae=self.vae,
            image_encoder=self.image_encoder,
            scheduler=self._read_schedule(),
            parameterization="epsilon" if self._schedule["prediction_type"] == "epsilon" else "v",
            dtype=self.unet.conv_out.weight.dtype,
            signature=self._signature,
            sources={},
            files=(),
            vae_config=self.vae.config,
        )
        settings = self._make_settings(strength)
        return Framer(base, settings, num_frames, controlnet=self.controlnet, device=self._execution_device)


def _follow(config: RunConfig, about: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's settings by which it feeds and samples as a recipe does; about: what the adapter tells of itself."""
    sampling, told = recipe_sampling(config), told_of(about)
    return {name: getattr(config.diffusion, name) for name in FED_BY} | {
        "num_frames": config.data.frames,
        "num_inference_steps": sampling.steps,
        "min_guidance_scale": sampling.min_guidance,
        "max_guidance_scale": sampling.max_guidance,
        "fps": told.fps,
        "motion_bucket_id": told.motion,
    }
