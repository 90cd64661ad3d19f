"""The run, typed: one frozen tree of pydantic models, read from a YAML recipe and overridden by dotted names.

Test: pytest tests/test_config.py. What each field means stands beside it; `launch/doctor.py` prints the resolved tree.
Each number has one owner: a DeepSpeed JSON holds stage, buckets, overlap and offload, and one that sets more is refused.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from toolkit.errors import UserError

# What a DeepSpeed JSON may hold, under zero_optimization; every other number belongs to the recipe.
DEEPSPEED_KEYS = {
    "stage", "offload_optimizer", "overlap_comm", "contiguous_gradients", "reduce_bucket_size", "allgather_bucket_size",
    "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
}  # fmt: skip
ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3}
_MAX_RECIPE_CHARACTERS = 1 << 16
# section and fields: the first, given on the command line, takes the place of the second in the recipe
_RIVALS = (("data", "mix", "shards"), ("data", "shards", "mix"), ("schedule", "epochs", "steps"))


Place = Annotated[str, AfterValidator(os.path.expanduser)]  # a path, or a hub id; ~ is the user's own folder


def _read_text(value: Any) -> Any:
    """Read a list or mapping that Fire left as text: [to_q,to_k] it reads, [to_q,to_out.0] and {attn1.to_q: 3} not."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        with contextlib.suppress(yaml.YAMLError):  # else an expression such as [a-z].*
            return _load_yaml(value)
    return value


class Section(BaseModel):
    # coerce: a command line turns a run name such as 007 into a number
    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def refuse_flag_alone(cls, value: Any, info: ValidationInfo) -> Any:
        """A flag without its value comes as True, which would pass for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"it is {value}, as a flag alone is; write a value behind it")
        return value


# What makes the network's blocks lean (model/prepare.py):
#   cross        attention to a few tokens, by tables
#   projections  queries, keys, values and their LoRA, in one
#   passes       forward passes that leave frames where they are in memory and compute constants once
#   fused        on a GPU: norms, sums, gates and what reads cross's tables in Triton kernels; what all residual blocks are
#                told of the time, and convolutions along the frames, as few or faster matrix products
#   frames       attention along them, in a Triton kernel, on a GPU
Part = Literal["cross", "projections", "passes", "fused", "frames"]
LEAN: tuple[Part, ...] = get_args(Part)
NEEDS: dict[Part, set[Part]] = {"passes": {"cross", "projections"}, "fused": {"passes"}, "frames": {"passes"}}


# of the model section, which network it is; the other fields say how it computes
NETWORK_FIELDS = ("base", "unet", "revision", "unet_revision", "variant", "controlnet", "controlnet_revision")
# of the diffusion section, where a network and its adapters must agree
FED_BY = ("layout", "clip_tokens", "scale_conditioning", "noise_augmentation")


class ModelConfig(Section):
    # framer | svd | svd-xt | tiny, or a folder or hub id in SVD layout: unet, vae, image_encoder, scheduler
    base: Place = "tiny"
    unet: Place | None = None  # folder, hub id or .safetensors file that replaces the base's UNet
    revision: str | None = None  # hub commit of base
    unet_revision: str | None = None  # hub commit of unet
    variant: Literal["fp16"] | None = None  # read the *.fp16.safetensors files: half the download
    controlnet: Place | None = None  # folder, hub id or .safetensors file of Framer's trajectory ControlNet; frozen
    controlnet_revision: str | None = None  # hub commit of controlnet
    # xformers, sdpa (PyTorch's own choice): that kernel in every layer; auto: on CUDA the fastest of several, measured once
    # on a card, and Triton's along frames
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    # lean: the network in fewer operations; stock: as diffusers and PEFT compute it, and so DoRA, dropout, zero3 and
    # quantized weights always; or a list of those of lean's parts (Part) that shall be on
    blocks: Literal["lean", "stock"] | list[Part] = "lean"
    # fast keeps all activations, balanced computes the largest of them a second time, small most of them; auto takes the
    # first of these that fits
    memory: Literal["auto", "fast", "balanced", "small"] = "auto"
    # int8 keeps the frozen weights in half the memory while training, made whole for each use; for use with memory: small
    quantize: Literal["int8"] | None = None
    compile: bool = False  # lean blocks into fewer kernels, by torch.compile; takes some minutes at the first step
    # on a GPU: the kernels of a training pass launched as one; not with stock blocks, a ControlNet or a trained mask_token
    cuda_graphs: bool = True

    @field_validator("blocks", mode="before")
    @classmethod
    def read_text(cls, value: Any) -> Any:
        return _read_text(value)

    @field_validator("blocks", mode="after")
    @classmethod
    def check_parts(cls, blocks: str | list[Part]) -> str | list[Part]:
        for part in () if isinstance(blocks, str) else blocks:
            if missing := NEEDS.get(part, set()).difference(blocks):
                raise ValueError(f"{part} needs {' and '.join(sorted(missing))}; name that too, or leave {part} out")
        return blocks

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of lean blocks, those that are on."""
        wanted = {"lean": LEAN, "stock": ()}[self.blocks] if isinstance(self.blocks, str) else self.blocks
        return tuple(part for part in LEAN if part in wanted)


class LoraConfig(Section):
    rank: int = Field(64, ge=1, le=1024)
    alpha: float = Field(64, gt=0, le=1e6)
    # Q, K, V and the output of attention: spatial | temporal | cross | self | all; linear: every linear layer of the
    # transformers; or a regular expression over whole module names; or a list of their endings
    targets: str | list[str] = "spatial"
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    dora: bool = False  # train the weights' magnitudes beside their directions
    dropout: float = Field(0.0, ge=0, lt=1)  # of what enters the adapter, while training
    # another rank or alpha for module names that match, as PEFT has it
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = {}
    # start from this adapter: a run, a checkpoint or an exported file of any format, or on the hub owner/name[@revision]
    init_from: Place | None = None
    extra_trainable: list[Literal["conv_in", "mask_token"]] = []  # trained whole, and saved with the adapter

    @field_validator("targets", "extra_trainable", "rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def read_text(cls, value: Any) -> Any:
        return _read_text(value)

    @model_validator(mode="after")
    def check_kinds(self) -> LoraConfig:
        if self.dora and self.dropout:
            raise ValueError(
                "dora and dropout do not go together: dora's magnitudes are of the undropped weights; set one"
            )
        return self


Stride = Annotated[int, Field(ge=1, le=64)]


class FullConfig(Section):
    # of the UNet: all, or a regular expression over whole names of parameters, such as up_blocks\..* ; mask_token is one
    parameters: str = "all"


class DataConfig(Section):
    # folder written by shards/pack.py or cache.py, or an address: https://host/train-{000000..000011}.tar, s3://, hf://
    shards: Place | None = None
    # or several of these, {folder: clips of every sum(weights) clips}; every source is walked through by itself
    mix: Annotated[dict[Place, Annotated[int, Field(ge=1, le=1000)]], Field(min_length=1)] | None = None
    remote: list[Literal["https", "s3", "hf"]] = []  # the kinds of address that may be read from
    cache_dir: str = "~/.cache/framer-toolkit"  # keeps what was read from them; ~ is whoever's who reads
    cache_gb: float = Field(50, ge=0)
    # T: frames of one sample's window, both ends included; even in layout framer_clip only
    frames: int = Field(5, ge=3, le=128)
    # source frames between two frames of the window; of a list, each clip draws one
    stride: Stride | Annotated[list[Stride], Field(min_length=1)] = 4
    height: int = Field(576, ge=16, le=2048)
    width: int = Field(576, ge=16, le=2048)
    flip: bool = False  # mirror half of the clips; off by default, because a mirrored sign can be another sign
    # play half of the clips backwards; off by default, because what falls or pours does so one way
    reverse: bool = False
    random_crop: float = Field(0.0, ge=0, le=0.5)  # a crop is drawn whose sides are up to this share shorter
    workers: int = Field(2, ge=0, le=64)  # decoding processes per rank
    debug: bool = False  # draw the first clips as the network is fed them: samples/batch.png in the run folder
    # more unreadable clips than this share of the data stop the run; one is put up with, but for a share of 0
    max_bad_fraction: float = Field(0.05, ge=0, le=1)

    @field_validator("mix", "remote", "stride", mode="before")
    @classmethod
    def read_text(cls, value: Any) -> Any:
        return _read_text(value)

    @property
    def strides(self) -> tuple[int, ...]:
        """Those that a clip draws from, ascending."""
        return (self.stride,) if isinstance(self.stride, int) else tuple(sorted(set(self.stride)))

    @property
    def sources(self) -> dict[str, int]:
        """Every source and its weight."""
        return {str(self.shards): 1} if self.mix is None else self.mix

    @model_validator(mode="after")
    def check_sizes(self) -> DataConfig:
        if self.height % 8 or self.width % 8:
            raise ValueError(
                f"height x width is {self.height}x{self.width}: both must be multiples of 8, the VAE's factor"
            )
        return self


class DiffusionConfig(Section):
    layout: Literal["spec_middle", "framer_clip", "middle_in_clip"] = "middle_in_clip"
    clip_tokens: Literal["first_last", "first", "mean"] = "first_last"
    scale_conditioning: bool = False  # True: conditioning latents x the VAE's scaling factor, as the spec has it
    # what the raw output means; auto reads it from the base's scheduler, and a value that disagrees with it is refused
    parameterization: Literal["auto", "v", "epsilon"] = "auto"
    noise_sampler: Literal["uniform_t", "lognormal"] = "uniform_t"
    lognormal_mean: float = 0.7
    lognormal_std: float = Field(1.6, gt=0)
    loss_space: Literal["epsilon", "v", "edm"] = "epsilon"
    # gamma of min-SNR, null: off. Errors of the latents count min(SNR, gamma): low noise counts less than epsilon's loss has
    # it, high noise less than v's and edm's have it
    min_snr_gamma: float | None = Field(None, gt=0)
    noise_augmentation: float = Field(0.0, ge=0, le=1)  # std of pixel noise on the two stills; also the third time id
    # p: tokens zeroed in 2p of the clips, end latents in 2p, both in p of them; guidance at inference wants 0.1
    conditioning_dropout: float = Field(0.0, ge=0, le=1 / 3)
    control: bool = False  # train with model.controlnet steering, on trajectories found between the two stills


class OptimizerConfig(Section):
    lr: float = Field(1e-4, gt=0, le=1)
    weight_decay: float = Field(0.01, ge=0, le=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, ge=1e-20)  # what fp32 rounds to zero would divide zeros by zero
    max_grad_norm: float = Field(1.0, gt=0)
    # a step whose loss or gradient is not finite changes nothing; so many in a row end the run
    max_skipped_steps: int = Field(5, ge=1)


class ScheduleConfig(Section):
    shape: Literal["cosine", "constant"] = "cosine"  # after the warmup
    warmup_steps: int = Field(100, ge=0)
    # passes over as many clips as there are, in all sources together (of a mix, by its weights); or give steps
    epochs: float | None = Field(30, gt=0, le=10**6)
    steps: int | None = Field(None, ge=1, le=10**9)  # optimizer steps; wins over epochs


class EngineConfig(Section):
    # zero*: DeepSpeed, sharding the adapter's optimizer state (1), gradients too (2), the frozen base too (3);
    # zero2_offload: the state in the host's memory; fsdp2: PyTorch's own sharding; plain: one process
    kind: Literal["zero2", "zero1", "zero3", "zero2_offload", "fsdp2", "plain"] = "zero2"
    deepspeed: Place | None = None  # JSON with buckets of your own for a zero kind; null: ds_configs/<kind>.json
    shard_ranks: int | None = Field(None, ge=1)  # fsdp2: ranks that share one copy of the state; null: all; fewer: HSDP
    precision: Literal["bf16", "fp32"] = "bf16"  # of the frozen weights and of compute; LoRA masters are fp32
    global_batch: int = Field(8, ge=1)  # clips per optimizer step, whatever the number of processes
    micro_batch: int = Field(1, ge=1)  # clips per forward; accumulation = global_batch / (micro_batch * processes)
    # a run that finishes no step for so long is ended, and says who waits where
    hang_timeout_s: float = Field(600, gt=0, le=10**9)

    @model_validator(mode="after")
    def check_batch(self) -> EngineConfig:
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} must be a multiple of micro_batch {self.micro_batch}")
        return self


class ValidationConfig(Section):
    clips: int = Field(8, ge=1)  # held-out clips that the run and launch/evaluate.py score, of as many videos as can be
    # steps between two losses on them, always at the same noise. null: never
    every_steps: int | None = Field(None, ge=1)
    # steps between two looks at generated frames: figures beside blending and the start, strips, a video. null: never
    figures_every_steps: int | None = Field(None, ge=1)
    # source frames between the two ends of what is filled then, and by launch/evaluate.py; best_by asks the first alone.
    # none: the gap that is trained on, the shortest of several
    gaps: list[Annotated[int, Field(ge=1)]] = []
    lpips: Place | None = None  # weights of LPIPS with AlexNet, as safetensors: then the figures have it too
    # what names the best checkpoint, which is kept: the loss, or a figure of generated frames
    best_by: Literal["loss", "psnr_moving", "psnr", "ssim"] = "loss"
    patience: int | None = Field(None, ge=1)  # so many looks in a row without a better one end the run
    sampler: Literal["euler", "lcm"] = "euler"  # lcm: a few steps, for bases distilled to it
    sampler_steps: int = Field(25, ge=1, le=1000)
    # classifier-free guidance rises over the window from one to the other; 1 and 1 is none, at half the cost
    min_guidance: float = Field(1.0, ge=1, le=30)
    max_guidance: float = Field(1.0, ge=1, le=30)

    @field_validator("gaps", mode="before")
    @classmethod
    def read_text(cls, value: Any) -> Any:
        return _read_text(value)

    @property
    def best_every_steps(self) -> int | None:
        """Steps between two looks that best_by judges."""
        return self.every_steps if self.best_by == "loss" else self.figures_every_steps

    @model_validator(mode="after")
    def check_looks(self) -> ValidationConfig:
        if self.best_every_steps is None and (self.patience is not None or self.best_by != "loss"):
            name = "every_steps" if self.best_by == "loss" else "figures_every_steps"
            raise ValueError(
                f"best_by is {self.best_by} and patience {self.patience}, but nothing is looked at: give {name} too"
            )
        return self


class CheckpointConfig(Section):
    every_steps: int = Field(200, ge=1)
    keep: int = Field(3, ge=2)  # newest checkpoints kept; the best by validation stays beside them
    keep_every_steps: int | None = Field(None, ge=1)  # those of every so many steps stay as well
    # average what trains as well, for launch/evaluate.py --sweep ema=0,0.05,0.1,0.2: each checkpoint leaves in ema/ for good
    # twice what trains in fp32, 106 MB at rank 64 on 128 modules, 12 GB of the whole UNet. Not with zero3 and fsdp2
    ema: bool = False


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # the run folder is runs_dir/name
    runs_dir: Place = "runs"
    seed: int = Field(0, ge=0)
    log_every_steps: int = Field(10, ge=1)
    model: ModelConfig = ModelConfig()
    tuning: Literal["lora", "full"] = "lora"  # adapters beside the UNet's frozen weights, or these weights themselves
    lora: LoraConfig = LoraConfig()
    full: FullConfig = FullConfig()
    data: DataConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name

    @model_validator(mode="after")
    def check_sections(self) -> RunConfig:
        if self.data.shards is None and self.data.mix is None:
            raise ValueError(
                "data.shards is missing; set it in the recipe or with --data.shards, or give several sources: --data.mix"
            )
        if self.data.shards is not None and self.data.mix is not None:
            raise ValueError("data.shards and data.mix are both given; name all sources in data.mix alone")
        layout, frames = self.diffusion.layout, self.data.frames
        if frames % 2 == 0 and layout != "framer_clip":
            raise ValueError(
                f"data.frames is {frames}: layout {layout} needs an odd number, so that a middle frame exists; framer_clip "
                "takes any"
            )
        if self.schedule.steps is None and self.schedule.epochs is None:
            raise ValueError("schedule gives neither epochs nor steps; give one")
        if self.diffusion.control and self.model.controlnet is None:
            raise ValueError("diffusion.control is on, but model.controlnet names none; give one, or switch it off")
        if self.lora.init_from is not None and self.tuning == "full":
            raise ValueError("lora.init_from is for adapters, and tuning full has none; start from a UNet: model.unet")
        if self.model.quantize is not None and self.tuning == "full":
            raise ValueError("model.quantize is for frozen weights, and tuning full trains them; leave one of them out")
        if self.model.quantize is not None and self.engine.kind == "zero3":
            raise ValueError(
                f"model.quantize is {self.model.quantize}, but engine.kind zero3 shards whole weights; take zero2"
            )
        if self.tuning == "full" and self.full.parameters != "all" and self.engine.kind == "zero3":
            raise ValueError(
                "full.parameters is a part of the UNet, but engine.kind zero3 shards the rest of it too, which checkpoints "
                "hold whole; take zero2, or train all"
            )
        if self.checkpoint.ema and self.engine.kind in ("zero3", "fsdp2"):
            raise ValueError(
                f"checkpoint.ema is on, but engine.kind {self.engine.kind} shards what trains, and averages are of the "
                "whole; take zero2, or leave it off"
            )
        return self


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a recipe and apply overrides by dotted name.

    overrides  {"lora.rank": 32}: what the command line gave
    raises     UserError naming the field, what was given and the nearest known name
    """
    tree = read_yaml(path, "the recipe", "recipes are in launch/recipes")
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a recipe: it must hold `section: {{key: value}}`, see launch/recipes")
    tree = {name: value for name, value in tree.items() if value is not None}  # `lora:` with nothing under it
    given_none = ("null", "None")  # as text: recipes say the one, Python the other
    overrides = {name: None if value in given_none else value for name, value in (overrides or {}).items()}
    for section, given, other in _RIVALS:
        own, named = tree.get(section), overrides.get(f"{section}.{given}") is not None
        if named and f"{section}.{other}" not in overrides and isinstance(own, dict):
            own.pop(other, None)
    for name, value in overrides.items():
        _set_dotted(tree, name, value)
    return parse_config(tree, path)


def read_yaml(path: str | Path, what: str, remedy: str) -> Any:
    """Read a file of plain YAML values. Raises UserError, which calls it `what` and ends with the remedy."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_RECIPE_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} {path}: {error}; {remedy}") from None
    if len(text) > _MAX_RECIPE_CHARACTERS:
        raise UserError(f"{path} has over {_MAX_RECIPE_CHARACTERS} characters; {remedy}")
    return parse_yaml(text, path)


def parse_yaml(text: str, source: str | Path) -> Any:
    """Read plain YAML values; source is where they came from, for the error. Raises UserError."""
    try:
        return _load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few lines of them unfold to gigabytes when an error shows them
            raise yaml.YAMLError("it uses an alias; write the value out")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            # YAML keeps the last, and drops the others unseen
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(
                    f"it gives {key.value} twice, the second time in line {key.start_mark.line + 1}; put the two together"
                )
            seen.add(str(key.value))
        return node


def _load_yaml(text: str) -> Any:
    """Read YAML of plain values. Raises yaml.YAMLError, whatever is wrong."""
    try:
        return _Loader(text).get_single_data()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # a date or a number that is none
        raise yaml.YAMLError(str(error)) from None


def parse_config(tree: Any, source: str | Path) -> RunConfig:
    """Check a tree of sections; source is where it came from, for the error. Raises UserError as load_config does."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        said: dict[str, str] = {}  # of a field that may hold several kinds of value, each says what it must be
        for subject, message in map(_explain, error.errors()):
            said[subject] = (
                f"{said[subject]} or {message.removeprefix('Input should be ')}" if subject in said else message
            )
        raise UserError(f"{source}: {'; '.join(map(''.join, said.items()))}") from None


def dump_config(config: RunConfig) -> str:
    """Write the resolved tree as YAML that load_config reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def field_names() -> list[str]:
    """List every dotted field name of the tree."""
    return list(_annotations(RunConfig))


def text_fields() -> list[str]:
    """Dotted names of the fields that hold a text and nothing else, or None."""
    return [name for name, kind in _annotations(RunConfig).items() if _kinds(kind) - {type(None)} == {str}]


def _annotations(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """What each field of the tree may hold, by its dotted name."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        is_section = isinstance(kind, type) and issubclass(kind, Section)
        found |= _annotations(kind, f"{prefix}{name}.") if is_section else {prefix + name: kind}
    return found


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation admits, without what stands beside them in Annotated."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    return {annotation}


def diff_configs(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """List the fields in which two runs differ: {dotted name: (old, new)}."""
    flat_old, flat_new = flatten_config(old), flatten_config(new)
    return {name: (flat_old[name], flat_new[name]) for name in flat_new if flat_old[name] != flat_new[name]}


def load_deepspeed_json(engine: EngineConfig) -> dict[str, Any]:
    """Read what DeepSpeed alone owns, for a zero kind; refuse a file of another kind, or that sets what the recipe owns."""
    own = Path(__file__).resolve().parents[1] / f"ds_configs/{engine.kind}.json"  # wherever the program was started
    path = own if engine.deepspeed is None else Path(engine.deepspeed)
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read engine.deepspeed {path}: {error.strerror}; see ds_configs") from None
    except ValueError as error:  # bytes that are no text, too
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise UserError(f"{path} holds no zero_optimization; see ds_configs/{engine.kind}.json")
    zero = settings["zero_optimization"]
    foreign = sorted(set(settings) - {"zero_optimization"}) + sorted(set(zero) - DEEPSPEED_KEYS)
    if foreign:
        raise UserError(
            f"{path} sets {', '.join(foreign)}, but batch, accumulation, clipping, precision, optimizer and learning rate "
            f"come from the recipe; take {'it' if len(foreign) == 1 else 'them'} out "
            f"(allowed in zero_optimization: {', '.join(sorted(DEEPSPEED_KEYS))})"
        )
    stage, offload = ZERO_STAGES[engine.kind], engine.kind == "zero2_offload"
    if zero.get("stage") != stage or ("offload_optimizer" in zero) != offload:
        raise UserError(
            f"{path} sets stage {zero.get('stage')}{' and offload' * ('offload_optimizer' in zero)}, but engine.kind "
            f"{engine.kind} is stage {stage} {'with' if offload else 'without'} offload_optimizer; change one of them"
        )
    target = zero.get("offload_optimizer")
    if offload and not (isinstance(target, dict) and target.get("device") == "cpu"):
        raise UserError(
            f'{path}: offload_optimizer is {target}, but the state can be moved to cpu only; set {{"device": "cpu"}}'
        )
    return settings


def _set_dotted(tree: dict[str, Any], name: str, value: Any) -> None:
    known = field_names()
    if own := [field for field in known if field.startswith(f"{name}.")]:
        raise UserError(
            f"{name} is {value!r}, in place of a whole section and all that the recipe says there; set its fields one by "
            f"one, such as {own[0]}"
        )
    *sections, key = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            if name in known:
                raise UserError(
                    f"{name} is given, but {section} is {tree!r} in the recipe; let it hold fields, or leave it out"
                )
            raise UserError(_unknown(name))
    tree[key] = value


def flatten_config(section: Section, prefix: str = "") -> dict[str, Any]:
    """All fields of a tree by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in section:
        flat |= flatten_config(value, f"{prefix}{name}.") if isinstance(value, Section) else {prefix + name: value}
    return flat


def _unknown(name: str) -> str:
    known = field_names()
    leaf = {n.split(".")[-1]: n for n in known}
    near = difflib.get_close_matches(name, known, 1) or [
        leaf[n] for n in difflib.get_close_matches(name, list(leaf), 1)
    ]
    return f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else "; `launch/doctor.py` prints every key")


def _explain(error: Any) -> tuple[str, str]:
    """What is wrong, and what it must be, where it is not said already."""
    name = _locate(error["loc"])
    if error["type"] == "extra_forbidden":
        return _unknown(name), ""
    if error["type"] == "missing":
        flag = "data.shards" if name == "data" else name  # of all sections the one that has no defaults
        return f"{name} is missing; set it in the recipe or with --{flag}", ""
    message = error["msg"].removeprefix("Value error, ")
    if not name:  # a check of the whole tree names its fields by itself
        return message, ""
    given = repr(error["input"])
    given = given if len(given) <= 200 else f"{given[:200]}..."
    return f"{name}: " if error["type"] == "value_error" else f"{name} is {given}: ", message


def _locate(place: Sequence[str | int]) -> str:
    """The dotted name of a place in the tree, without pydantic's name for one of several kinds of value."""
    kinds = _annotations(RunConfig)
    for i in range(len(place)):
        name = ".".join(map(str, place[: i + 1]))
        if name in kinds and len(_kinds(kinds[name]) - {type(None)}) > 1:
            return ".".join(map(str, (name, *place[i + 2 :])))
    return ".".join(map(str, place))
