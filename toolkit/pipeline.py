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
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from toolkit.config import DiffusionConfig, ModelConfig
from toolkit.data.clips import resize_cover
from toolkit.diffusion.objective import time_input
from toolkit.engine.world import init_world
from toolkit.model.attention import set_attention
from toolkit.model.base import PRECISIONS, Base, load_base, sign_unet
from toolkit.model.formats import linear_layers
from toolkit.model.lora import enable_adapter, load_adapter, merge_adapters, remove_adapters, set_adapters
from toolkit.run.folder import find_adapter
from toolkit.run.framer import Framer, Sampling, Steering, to_signed
from toolkit.run.inference import load_control, read_source
from toolkit.run.pretrain import find_base

SAMPLERS = {"EulerDiscreteScheduler": "euler", "LCMScheduler": "lcm", "CMStochasticIterativeScheduler": "lcm"}
FED_BY = ("layout", "clip_tokens", "scale_conditioning")  # where a recipe and a pipeline must agree
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
    """

    model_cpu_offload_seq = "image_encoder->unet->vae"
    _callback_tensor_inputs = ["latents"]
    _optional_components = ["feature_extractor", "controlnet"]

    def __init__(
        self,
        vae: Any,
        image_encoder: Any,
        unet: Any,
        scheduler: Any,
        feature_extractor: Any = None,
        controlnet: Any = None,
        layout: str = "framer_clip",
        num_frames: int = 14,
        clip_tokens: str = "first_last",
        scale_conditioning: bool = False,
        noise_augmentation: float = 0.02,
    ) -> None:
        super().__init__()
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
        )
        self.video_processor = VideoProcessor(do_resize=False)
        self._schedule = dict(scheduler.config)  # of the base; a scheduler put in its place later chooses the sampler
        self._signature = sign_unet(unet)
        self._adapters: dict[str, Path] = {}
        self._unfused: dict[str, Tensor] = {}  # weights as they were before fuse_lora
        self._fused: dict[str, float] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        unet: str | None = None,
        *,
        torch_dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        unet_revision: str | None = None,
        variant: str | None = None,
        controlnet: str | None = None,
        controlnet_revision: str | None = None,
        **settings: Any,
    ) -> FramerPipeline:
        """Load a base by name (framer, svd, svd-xt, tiny), from a folder in diffusers layout, or from the hub.

        unet         folder, hub id or .safetensors file that replaces the base's UNet
        torch_dtype  float32, bfloat16 or float16; a VAE whose config says force_upcast stays in float32
        settings     layout, num_frames and the others of the class; default what save_pretrained wrote
        raises       UserError where something is missing, extra or damaged; the stock loader would drop mask_token
        """
        folder, saved = Path(pretrained_model_name_or_path), {}
        if (folder / "model_index.json").is_file():
            index = json.loads((folder / "model_index.json").read_text())
            if index.get("_class_name") == cls.__name__:
                saved = {name: index[name] for name in cls._get_signature_keys(cls)[1] if name in index}
                if controlnet is None and (folder / "controlnet").is_dir():
                    controlnet = str(folder)
        model = ModelConfig(
            base=str(pretrained_model_name_or_path), unet=unet, revision=revision, unet_revision=unet_revision,
            variant=variant, controlnet=controlnet, controlnet_revision=controlnet_revision,
        )  # fmt: skip
        return cls._from_model(model, torch_dtype, saved | settings)

    @classmethod
    def from_run(cls, run: str | Path, lora_scale: float = 1.0) -> FramerPipeline:
        """Load a run folder's base and newest adapter, fed as its recipe says."""
        source = read_source(str(run), lora_scale=lora_scale)
        config = source.config
        settings = {name: getattr(config.diffusion, name) for name in (*FED_BY, "noise_augmentation")}
        dtype = PRECISIONS[config.engine.precision]
        pipeline = cls._from_model(config.model, dtype, settings | {"num_frames": config.data.frames})
        for path, scale in source.adapters:
            pipeline.load_lora_weights(path, "run")
            pipeline.set_adapters("run", scale)
        return pipeline

    @classmethod
    def _from_model(cls, model: ModelConfig, dtype: torch.dtype, settings: dict[str, Any]) -> FramerPipeline:
        from diffusers import EulerDiscreteScheduler

        precision = {value: name for name, value in PRECISIONS.items()}[dtype]
        base = load_base(find_base(model, init_world(join=False)), torch.device("cpu"), precision)
        set_attention(base.unet, "sdpa")  # on any device that .to() may choose, and it splits what is too large for it
        control = load_control(model, base, "sdpa") if model.controlnet else None
        scheduler = EulerDiscreteScheduler.from_config(base.scheduler)
        return cls(base.vae, base.image_encoder, base.unet, scheduler, controlnet=control, **settings)

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        last_image: Images,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 25,
        min_guidance_scale: float = 1.0,
        max_guidance_scale: float = 3.0,
        fps: float = 7,
        motion_bucket_id: float = 127,
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

        image, last_image    PIL image, list of them, or tensor (B, 3, H, W) in [0, 1]: the two stills of each clip
        height, width        multiples of 8; stills of another size are scaled to cover it and cropped. Default: theirs
        num_frames           both stills included; default the pipeline's. In layout spec_middle always 3
        min_, max_guidance_scale  classifier-free guidance rises over the window from one to the other; max 1: none
        fps                  of the result, told as fps - 1
        noise_aug_strength   std of the noise on the stills' pixels; default the pipeline's noise_augmentation
        decode_chunk_size    frames the VAE decodes at once; default all
        trajectories         (P, K, 2): (x, y) in pixels of P points at K times from the first still to the last
        generator            one for all clips, or a list with one per clip
        latents              N(0, 1) to start from, (B, T, 4, H / 8, W / 8)
        output_type          "pil", "np", "pt" or "latent" (scaled latents as the network left them)
        callback_on_step_end (pipeline, step, timestep, {"latents": ...}) -> {"latents": ...} after each step
        returns              FramerPipelineOutput, or with return_dict False its frames
        raises               ValueError for what cannot be interpolated
        """
        stills_B2CHW = self._read_stills(image, last_image, height, width)
        sampling = Sampling(
            num_inference_steps, self._choose_sampler(), min_guidance_scale, max_guidance_scale, decode_chunk_size
        )
        framer = self._make_framer(num_frames or self.config.num_frames, noise_aug_strength)
        B, device = len(stills_B2CHW), self._execution_device
        if isinstance(generator, list) and len(generator) != B:
            raise ValueError(f"{len(generator)} generators for {B} clips; give one for all, or one per clip")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs has {min(unknown)}; allowed is latents")
        if trajectories is not None and self.controlnet is None:
            raise ValueError("trajectories are given, but the pipeline has no controlnet that follows them")

        def draw(shape: Sequence[int]) -> Tensor:
            return randn_tensor(tuple(shape), generator=generator, device=device, dtype=torch.float32)

        stills_B2CHW = stills_B2CHW.to(device)
        augmentation = draw(stills_B2CHW.shape) if framer.settings.noise_augmentation else None
        fps_B, motion_B = (torch.full((B,), float(value)) for value in (fps, motion_bucket_id))
        condition = framer.condition(stills_B2CHW, fps_B, motion_B, augmentation)
        if trajectories is not None:
            steering = Steering(np.asarray(trajectories, float), controlnet_conditioning_scale)
            condition = framer.steer(condition, steering, stills_B2CHW.shape[-2:])
        shape = (B, framer.layout.frames, 4, *condition.ends_B2CHW.shape[-2:])
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}; these stills need {shape}")
        noise_BTCHW = draw(shape) if latents is None else latents.to(device, torch.float32)
        timesteps = time_input(framer.make_sigmas(num_inference_steps)[:-1], framer.parameterization, framer.alpha_bar)
        with self.progress_bar(total=num_inference_steps) as bar:

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

        pretrained_model_name_or_path  run folder, checkpoint, exported folder or file
        adapter_name                   for set_adapters; default adapter_0, adapter_1, ...
        weight_name                    of a file in the folder
        """
        self._refuse_while_fused()
        free = (f"adapter_{i}" for i in itertools.count() if f"adapter_{i}" not in self._adapters)
        name = adapter_name or next(free)
        source = find_adapter(Path(pretrained_model_name_or_path) / (weight_name or ""))
        about = load_adapter(self.unet, source, self._signature, name)
        self._adapters[name] = source
        trained = about.get("recipe", {}).get("diffusion", {})
        other = [key for key in FED_BY if key in trained and _feeding(trained[key]) != _feeding(self.config[key])]
        if other:
            said = ", ".join(f"{key} {trained[key]} (the pipeline has {self.config[key]})" for key in other)
            warnings.warn(f"{source} was trained with {said}; FramerPipeline.from_run follows the recipe", stacklevel=2)

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: float | list[float] | None = None) -> None:
        """Activate exactly these loaded adapters; a weight multiplies alpha / rank."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        if len(given) != len(names):
            raise ValueError(f"{len(given)} weights for {len(names)} adapters; give one each")
        weights = [1.0 if weight is None else float(weight) for weight in given]
        set_adapters(self.unet, dict(zip(names, weights, strict=True)))

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that are switched on."""
        return list(getattr(self.unet, "weights", {}))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all loaded adapters, by the part that they are in."""
        return {"unet": list(self._adapters)} if self._adapters else {}

    def enable_lora(self) -> None:
        """Switch the adapters on again as they were."""
        enable_adapter(self.unet, True)

    def disable_lora(self) -> None:
        """Switch all adapters off: the untuned base bit for bit."""
        enable_adapter(self.unet, False)

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """Take adapters out of memory; the others stay as they are."""
        self._refuse_while_fused()
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if unknown := set(names) - set(self._adapters):
            raise ValueError(f"no adapter named {min(unknown)} is loaded; loaded are {', '.join(self._adapters)}")
        weights = {name: weight for name, weight in self.unet.weights.items() if name not in names}
        self._adapters = {name: source for name, source in self._adapters.items() if name not in names}
        remove_adapters(self.unet)
        self._inject_again(weights)

    def unload_lora_weights(self) -> None:
        """Take all adapters out of memory. What fuse_lora folded into the weights stays in them, as in diffusers."""
        if not self._unfused:
            remove_adapters(self.unet)
        self._adapters, self._unfused = {}, {}

    def fuse_lora(self, *, lora_scale: float = 1.0, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the weights, so that they cost no time; unfuse_lora undoes it exactly.

        lora_scale     multiplies the weight of each
        adapter_names  default the active ones as they are weighed
        """
        self._refuse_while_fused()
        if adapter_names is not None:
            self.set_adapters(adapter_names)
        self._fused = dict(getattr(self.unet, "weights", {}))
        if not self._fused:
            raise ValueError("no adapter is active; call load_lora_weights first")
        set_adapters(self.unet, {name: weight * lora_scale for name, weight in self._fused.items()})
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
        self._restore()
        self._inject_again(self._fused)

    def _restore(self) -> None:
        for name, value in self._unfused.items():
            self.unet.get_parameter(name).data.copy_(value)
        self._unfused = {}

    def _inject_again(self, weights: dict[str, float]) -> None:
        for name, source in self._adapters.items():
            load_adapter(self.unet, source, self._signature, name)
        if self._adapters:
            set_adapters(self.unet, weights)

    def _refuse_while_fused(self) -> None:
        if self._unfused:
            raise ValueError("adapters are fused into the weights; call unfuse_lora first")

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
            if images.ndim not in (3, 4) or images.shape[-3] != 3 or images.min() < 0 or images.max() > 1:
                raise ValueError(f"`{name}` is a tensor of shape {tuple(images.shape)}; give (B, 3, H, W) in [0, 1]")
            pixels = (images.reshape(-1, *images.shape[-3:]).float() * 255).round().to(torch.uint8)
            return list(pixels.movedim(1, -1).cpu().numpy())
        listed = images if isinstance(images, list) else [images]
        if not listed or not all(isinstance(i, PIL.Image.Image) for i in listed):
            raise ValueError(
                f"`{name}` has to be of type `torch.Tensor` or `PIL.Image.Image` or `list[PIL.Image.Image]` but is "
                f"{type(images)}"
            )
        return [np.asarray(i.convert("RGB")) for i in listed]

    def _choose_sampler(self) -> Any:
        kind = type(self.scheduler).__name__
        if kind not in SAMPLERS:
            raise ValueError(f"the scheduler is {kind}; this pipeline samples with {', '.join(SAMPLERS)}")
        return SAMPLERS[kind]

    def _make_framer(self, num_frames: int, noise_aug_strength: float | None) -> Framer:
        strength = self.config.noise_augmentation if noise_aug_strength is None else noise_aug_strength
        settings = DiffusionConfig(**{name: self.config[name] for name in FED_BY}, noise_augmentation=strength)
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.to(torch.float32)  # in float16 its activations overflow
        ranges = {name: self.scheduler.config.get(name) for name in ("sigma_min", "sigma_max")}
        base = Base(
            name="pipeline",
            unet=self.unet,
            vae=self.vae,
            image_encoder=self.image_encoder,
            scheduler=self._schedule | {name: value for name, value in ranges.items() if value is not None},
            parameterization="epsilon" if self._schedule["prediction_type"] == "epsilon" else "v",
            dtype=self.unet.conv_out.weight.dtype,
            signature=self._signature,
            sources={},
            files=(),
        )
        return Framer(base, settings, num_frames, controlnet=self.controlnet, device=self._execution_device)


def _feeding(value: Any) -> Any:
    # the two clip layouts feed the network alike; they differ in what training scores
    return "framer_clip" if value == "middle_in_clip" else value
