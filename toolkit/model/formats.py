"""Adapter files: one form in memory, and its readers and writers for PEFT, diffusers and kohya.

Test: pytest tests/model/test_formats.py. Only safetensors and JSON are read. In memory a tensor is named as the module it
adapts: `<module>.lora_A.weight`, `<module>.lora_B.weight` and, with DoRA, `<module>.lora_magnitude_vector.weight`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from toolkit.errors import UserError, in_words, printable
from toolkit.model.sources import PICKLES

METADATA_KEY = "framer_toolkit"  # of the safetensors header: base, base_signature, step, recipe and more, as JSON
EXTRA_TENSORS = {"conv_in": ("conv_in.weight", "conv_in.bias"), "mask_token": ("mask_token",)}  # trained whole
EXTRA_NAMES = frozenset(name for names in EXTRA_TENSORS.values() for name in names)
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_DIFFUSERS_KEY = "lora_adapter_metadata"  # huggingface/diffusers loaders/lora_base.py
_PEFT_PREFIX = "base_model.model."  # what PeftModel puts before every module name in its files
_KOHYA_PREFIX = "lora_unet_"
_KOHYA_PARTS = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector.weight",
}
_TO_KOHYA_PARTS = {ours: theirs for theirs, ours in _KOHYA_PARTS.items()}
_TEMPORAL = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.temporal_transformer_blocks\.(.+)")
# Fields of PEFT's LoraConfig that are read, or that change nothing once an adapter is trained; any other is refused.
_READ_FIELDS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save"}
_IDLE_FIELDS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "eva_config",
    "qalora_group_size", "loftq_config", "ensure_weight_tying", "runtime_config",
}  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others of PEFT's initialisations change the base too


@dataclass(frozen=True)
class LoraKind:
    """Which linear layers are adapted, and how."""

    ranks: dict[str, int]  # by module name
    alphas: dict[str, float]
    rslora: bool = False
    dora: bool = False

    def scaling(self, module: str) -> float:
        """The factor before B A: alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
        rank = self.ranks[module]
        return self.alphas[module] / (math.sqrt(rank) if self.rslora else rank)

    def to_peft(self) -> dict[str, Any]:
        """PEFT's LoraConfig fields; what most modules share stands in r and lora_alpha, the others in the patterns."""
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (self.ranks, self.alphas))
        return {
            "r": rank,
            "lora_alpha": alpha,
            # ^: PEFT also tries a pattern on the end of a name
            "rank_pattern": {f"^{name}": r for name, r in self.ranks.items() if r != rank},
            "alpha_pattern": {f"^{name}": a for name, a in self.alphas.items() if a != alpha},
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "target_modules": sorted(self.ranks),
        }


@dataclass(frozen=True)
class AdapterFile:
    """An adapter outside of any network."""

    kind: LoraKind
    tensors: dict[str, Tensor]  # named as the module docstring says
    extras: dict[str, Tensor] = field(default_factory=dict)  # EXTRA_TENSORS that were trained, whole
    metadata: dict[str, Any] = field(default_factory=dict)


def linear_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Name the UNet's own linear layers as the stock UNet does, whether they are adapted or not."""
    layers: dict[str, nn.Linear] = {}
    for name, module in unet.named_modules():
        if isinstance(base := getattr(module, "base_layer", None), nn.Linear):
            layers[name] = base
        elif isinstance(module, nn.Linear) and name.removesuffix(".base_layer").split(".lora_")[0] not in layers:
            layers[name] = module
    return layers


def untuned(unet: nn.Module, name: str) -> Tensor:
    """The base's value of a tensor that adapters may replace; model/lora.py keeps it once they do."""
    return getattr(unet, "untuned", {}).get(name, unet.get_parameter(name).detach())


class _Told(BaseModel):
    """What the toolkit writes of a tuned network beside its weights, as far as it is read again."""

    model_config = ConfigDict(extra="allow")
    fps: float = Field(1.0, ge=0.01, le=1000)
    motion: float = Field(0.0, ge=0, allow_inf_nan=False)
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    base: str = ""
    base_signature: list[float] = []
    modules: int = 0
    extras: list[str] = []
    recipe: dict[str, Any] = {}


def check_told(told: dict[str, Any], source: Path) -> dict[str, Any]:
    """Pass on what a tuned network tells of itself. Raises UserError where a value is none that the toolkit writes."""
    try:
        _Told.model_validate(told)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(map(str, fault["loc"])) or "it"
        raise UserError(
            f"what {source} tells of itself is damaged: {name} is {printable(repr(fault['input'])[:80])}; "
            f"{in_words(fault['msg'])}; fetch or export it again"
        ) from None
    return told


def read_adapter(source: Path, unet: nn.Module) -> AdapterFile:
    """Read an adapter of any format: fp32 tensors on the CPU.

    source  folder of PEFT's, diffusers' or kohya's files, or one .safetensors file of diffusers or kohya
    unet    resolves kohya's names, in which dots are underscores, and its deltas
    raises  UserError where it is no adapter, is damaged, or is of a kind that cannot be read
    """
    file = find_file(source)
    if file.name == PEFT_FILES[0]:
        return read_peft(source)
    tensors, header = _read_tensors(file), _read_header(file)
    if any(".lora_down." in name for name in tensors):
        return _read_kohya(source, tensors, header, unet)
    if any(name.endswith((".lora.down.weight", "_lora.down.weight")) for name in tensors):
        # what diffusers' own training scripts write: names from before PEFT
        from diffusers.utils import convert_unet_state_dict_to_peft

        tensors = convert_unet_state_dict_to_peft(tensors)
    if any(".lora_A." in name for name in tensors):
        return _read_diffusers(source, tensors, header)
    raise UserError(f"{file} holds no LoRA that can be read (it has {_example(tensors)}); {_WHAT_IS_READ}")


def read_peft(folder: Path) -> AdapterFile:
    """Read PEFT's two files, which name their modules without help of a UNet."""
    tensors, header = _read_tensors(folder / PEFT_FILES[0]), _read_header(folder / PEFT_FILES[0])
    try:
        config = json.loads((folder / PEFT_FILES[1]).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"no readable adapter in {folder}: {PEFT_FILES[1]}: {error}; {_WHAT_IS_READ}") from None
    return _from_config(folder, config, _inside(tensors, _PEFT_PREFIX), _find_metadata(header, folder))


def read_metadata(source: Path) -> dict[str, Any]:
    """Read only what the toolkit wrote about an adapter of any format; empty for adapters of other programs."""
    return _find_metadata(_read_header(find_file(source)), source)


def write_peft(folder: Path, adapter: AdapterFile) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as huggingface/peft PeftModel.from_pretrained reads them."""
    from peft import LoraConfig

    names = sorted(module for module, tensors in EXTRA_TENSORS.items() if tensors[0] in adapter.extras)
    config = LoraConfig(
        **adapter.kind.to_peft(),
        base_model_name_or_path=adapter.metadata.get("base"),
        # mask_token is a bare parameter, which PEFT has no wrapper for; it loads by its name all the same
        modules_to_save=[name for name in names if name != "mask_token"] or None,
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"])  # a set there, and the same adapter is the same file
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PEFT_FILES[1]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # one header key: safetensors writes several in random order, and the same adapter should be the same file
    _write_tensors(folder / PEFT_FILES[0], _outside(adapter, _PEFT_PREFIX), {METADATA_KEY: _dump(adapter.metadata)})


def write_diffusers(folder: Path, adapter: AdapterFile) -> None:
    """Write pytorch_lora_weights.safetensors, as huggingface/diffusers loaders/peft.py load_lora_adapter reads it."""
    # diffusers drops what has another prefix, so our metadata can stand in the same header key
    about = {f"unet.{key}": value for key, value in adapter.kind.to_peft().items()} | {METADATA_KEY: adapter.metadata}
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / DIFFUSERS_FILE, _outside(adapter, "unet."), {_DIFFUSERS_KEY: _dump(about)})


def write_kohya(file: Path, adapter: AdapterFile, layers_per_block: int, base: dict[str, Tensor]) -> None:
    """Write one file in the naming of kohya-ss/sd-scripts networks/lora.py; DoRA and deltas as LyCORIS names them.

    layers_per_block  of the UNet's config, from which the names of the temporal layers follow
    base              the untuned values of the adapter's extras, which stand in the file as differences
    """
    kind, tensors = adapter.kind, {}
    for name, tensor in adapter.tensors.items():
        module, part = split_name(name)
        theirs = _TO_KOHYA_PARTS[part]
        tensors[f"{_kohya(module, layers_per_block)}.{theirs}"] = tensor[:, None] if theirs == "dora_scale" else tensor
    for module, rank in kind.ranks.items():
        # kohya knows alpha / rank only, so rsLoRA's square root goes into alpha
        tensors[f"{_kohya(module, layers_per_block)}.alpha"] = torch.tensor(kind.scaling(module) * rank)
    for name, tensor in adapter.extras.items():
        tensors[_kohya_delta(name)] = tensor.float() - base[name].to(tensor.device, torch.float32)
    shared = kind.to_peft()
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(shared["r"]),
        "ss_network_alpha": str(shared["lora_alpha"]),
        METADATA_KEY: _dump(adapter.metadata),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_tensors(file, tensors, header)


def refuse_misfit(adapter: AdapterFile, unet: nn.Module, source: Path) -> None:
    """Refuse an adapter unless every tensor of it has its place in the UNet and none is missing."""
    layers, faults = linear_layers(unet), {}
    for module, rank in adapter.kind.ranks.items():
        if rank < 1 or not math.isfinite(adapter.kind.alphas[module]):
            raise UserError(
                f"the adapter in {source} has rank {rank} and alpha {adapter.kind.alphas[module]} in {module}; a rank is at "
                "least 1, and alpha a finite number"
            )
    if adapter.metadata.get("modules", len(adapter.kind.ranks)) != len(adapter.kind.ranks):
        raise UserError(
            f"the adapter in {source} holds {len(adapter.kind.ranks)} of the {adapter.metadata['modules']} modules that "
            "were trained; copy or export it again"
        )
    if lost := set(adapter.metadata.get("extras", ())) - adapter.extras.keys():
        raise UserError(f"the adapter in {source} lacks {min(lost)}, which was trained; copy or export it again")
    for name, tensor in (adapter.tensors | adapter.extras).items():
        if not tensor.isfinite().all():
            raise UserError(f"the adapter in {source} holds NaN or infinity in {name}; take another checkpoint or copy")
    for name, tensor in adapter.tensors.items():
        module, part = split_name(name)
        if (wanted := _shape(layers.get(module), part, adapter.kind.ranks.get(module, 0))) is None:
            faults[name] = "no place for"
        elif wanted != tensor.shape:
            faults[name] = f"shape {tuple(tensor.shape)} where {wanted} belongs:"
    places = dict(unet.named_parameters())
    for name, tensor in adapter.extras.items():
        if name not in places or places[name].shape != tensor.shape:
            faults[name] = f"shape {tuple(tensor.shape)} has no place:"
    parts = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * adapter.kind.dora
    missing = [f"{m}.{p}.weight" for m in adapter.kind.ranks for p in parts if f"{m}.{p}.weight" not in adapter.tensors]
    if not faults and not missing and adapter.tensors:
        return
    total = len(adapter.tensors) + len(adapter.extras)
    examples = {fault.split()[0]: f"{fault} {name}" for name, fault in faults.items()}
    examples |= {"missing": f"missing {missing[0]}"} if missing else {}
    raise UserError(
        f"the adapter in {source} does not fit this UNet: {total - len(faults)} of its {total} tensors do, "
        f"{len(missing)} missing ({'; '.join(examples.values())}); it belongs to another network"
    )


def split_name(name: str) -> tuple[str, str]:
    """Split a tensor's name into the module it adapts and its part, such as lora_A.weight."""
    module, _, part = name.rpartition(".lora_")
    return module, f"lora_{part}"


_WHAT_IS_READ = (
    f"an adapter is a folder with {' and '.join(PEFT_FILES)} (PEFT), a folder with {DIFFUSERS_FILE} (diffusers), "
    f"or a .safetensors file whose names start with unet. (diffusers) or {_KOHYA_PREFIX} (kohya)"
)


def find_file(source: Path) -> Path:
    """The file that holds an adapter's tensors; UserError where there is none that can be read."""
    if source.suffix in PICKLES and not source.is_dir():
        raise UserError(f"{source} is a pickle, which can run code, and is not read; {_WHAT_IS_READ}")
    if source.is_file():
        if source.suffix != ".safetensors":
            raise UserError(f"{source} is not a .safetensors file; {_WHAT_IS_READ}")
        if source.name == PEFT_FILES[0]:
            raise UserError(f"{source} means nothing without {PEFT_FILES[1]}; give its folder, {source.parent}")
        return source
    files = sorted(source.glob("*.safetensors"))
    for name in (PEFT_FILES[0], DIFFUSERS_FILE):
        if source / name in files:
            return source / name
    if len(files) == 1:
        return files[0]
    held = f"it holds {', '.join(p.name for p in sorted(source.iterdir())[:4])}" if source.is_dir() else "no such path"
    raise UserError(f"no readable adapter in {source}: {held}; {_WHAT_IS_READ}")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    with _open(file) as opened:
        return {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118


def _read_header(file: Path) -> dict[str, Any]:
    with _open(file) as opened:
        return {key: _load(text) for key, text in (opened.metadata() or {}).items()}


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise UserError(f"no readable adapter in {file}: {error}; {_WHAT_IS_READ}") from None


def _read_diffusers(source: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> AdapterFile:
    about = header.get(_DIFFUSERS_KEY)
    named = _inside(tensors, "unet.")
    if isinstance(about, dict):  # a file of PeftAdapterMixin.save_lora_adapter has no prefix
        config = {key.removeprefix("unet."): value for key, value in about.items() if key != METADATA_KEY}
        return _from_config(source, config, named, _find_metadata(header, source))
    return _from_tensors(named, {}, _find_metadata(header, source))


def _read_kohya(source: Path, tensors: dict[str, Tensor], header: dict[str, Any], unet: Any) -> AdapterFile:
    layers = linear_layers(unet)
    # diffusers' names for temporal layers too
    modules = {_KOHYA_PREFIX + name.replace(".", "_"): name for name in layers}
    modules |= {_kohya(name, unet.config.layers_per_block): name for name in layers}
    deltas = {_kohya_delta(name): name for name in EXTRA_NAMES}
    named: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, tensor in tensors.items():
        theirs, _, part = name.partition(".")
        module = modules.get(theirs, theirs)
        if name in deltas:
            base = untuned(unet, deltas[name])
            named[deltas[name]] = base.cpu().float() + tensor if base.shape == tensor.shape else tensor
        elif part == "alpha" and tensor.numel() == 1:
            alphas[module] = tensor.item()
        elif part == "dora_scale" and tensor.shape[1:] == (1,):
            named[f"{module}.{_KOHYA_PARTS[part]}"] = tensor[:, 0]
        else:
            named[f"{module}.{_KOHYA_PARTS.get(part, part)}"] = tensor
    return _from_tensors(named, alphas, _find_metadata(header, source))


def _from_config(source: Path, config: Any, named: dict[str, Tensor], metadata: dict[str, Any]) -> AdapterFile:
    from peft.utils.other import get_pattern_key

    _refuse_other_kinds(source, config)
    tensors, extras = _split_extras(named)
    modules = sorted({split_name(name)[0] for name in tensors})
    try:
        ranks, alphas = dict(config.get("rank_pattern") or {}), dict(config.get("alpha_pattern") or {})
        kind = LoraKind(
            {m: _whole(ranks.get(get_pattern_key(ranks, m), config["r"])) for m in modules},
            {m: float(alphas.get(get_pattern_key(alphas, m), config["lora_alpha"])) for m in modules},
            _switch(config.get("use_rslora")),
            _switch(config.get("use_dora")),
        )
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"{source} describes no LoRA that can be read: {error}; {_WHAT_IS_READ}") from None
    return AdapterFile(kind, tensors, extras, metadata)


def _whole(value: Any) -> int:
    if int(value) != value:
        raise ValueError(f"rank {value}")
    return int(value)


def _switch(value: Any) -> bool:
    if value not in (True, False, None):  # bool("false") is True
        raise ValueError(f"{value!r} where true or false belongs")
    return bool(value)


def _from_tensors(named: dict[str, Tensor], alphas: dict[str, float], metadata: dict[str, Any]) -> AdapterFile:
    """Where the file says nothing of ranks and alphas: the ranks are the tensors', and a missing alpha is the rank."""
    tensors, extras = _split_extras(named)
    ranks = {}
    for module in sorted({split_name(name)[0] for name in tensors}):
        down, up = (tensors.get(f"{module}.lora_{part}.weight") for part in "AB")
        ranks[module] = down.shape[0] if down is not None else 0 if up is None else up.shape[-1]
    dora = any(".lora_magnitude_vector." in name for name in tensors)
    kind = LoraKind(ranks, {module: alphas.get(module, float(rank)) for module, rank in ranks.items()}, dora=dora)
    return AdapterFile(kind, tensors, extras, metadata)


def _refuse_other_kinds(source: Path, config: Any) -> None:
    from peft import LoraConfig

    if not isinstance(config, dict) or not {"r", "lora_alpha"} <= config.keys():
        raise UserError(f"{source} describes no LoRA (r and lora_alpha are missing); {_WHAT_IS_READ}")
    if (config.get("peft_type") or "LORA") != "LORA":
        raise UserError(f"{source} holds an adapter of type {config['peft_type']}; only LORA is read")
    plain = LoraConfig().to_dict()
    foreign = sorted(
        key
        for key, value in config.items()
        if key not in _READ_FIELDS | _IDLE_FIELDS and value and value != plain.get(key)
    )
    if config.get("init_lora_weights", True) in _PLAIN_STARTS and "init_lora_weights" in foreign:
        foreign.remove("init_lora_weights")
    if foreign:
        raise UserError(
            f"the adapter in {source} uses {', '.join(foreign)}, which is not supported; "
            "LoRA, rsLoRA, DoRA, rank_pattern and alpha_pattern are"
        )


def _split_extras(named: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return (
        {name: tensor for name, tensor in sorted(named.items()) if name not in EXTRA_NAMES},
        {name: tensor for name, tensor in sorted(named.items()) if name in EXTRA_NAMES},
    )


def _outside(adapter: AdapterFile, prefix: str) -> dict[str, Tensor]:
    """Names as PEFT and diffusers write them: a prefix before, and no .weight after a magnitude."""
    named = adapter.tensors | adapter.extras
    return {prefix + name.replace("magnitude_vector.weight", "magnitude_vector"): t for name, t in named.items()}


def _inside(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {name + ".weight" * name.endswith("magnitude_vector"): tensor for name, tensor in bare.items()}


def _shape(layer: nn.Linear | None, part: str, rank: int) -> tuple[int, ...] | None:
    if layer is None:
        return None
    return {
        "lora_A.weight": (rank, layer.in_features),
        "lora_B.weight": (layer.out_features, rank),
        "lora_magnitude_vector.weight": (layer.out_features,),
    }.get(part)


def _kohya(module: str, layers_per_block: int) -> str:
    """A layer's name there: diffusers' own, dots as underscores, but for temporal layers, which have Stability's names.

    kohya-ss/sd-scripts knows images only, and what ComfyUI knows of SVD's temporal layers under diffusers' names is nothing
    (comfy/utils.py unet_to_diffusers; comfy/lora.py takes Stability's names as well).
    """
    if match := _TEMPORAL.fullmatch(module):
        side, block, attention, rest = match.groups()
        place = int(block or 0) * (layers_per_block + 1) + int(attention)
        stage = {"down": f"input_blocks.{place + 1}", "up": f"output_blocks.{place}", None: "middle_block"}[side]
        module = f"{stage}.1.time_stack.{rest}"
    return _KOHYA_PREFIX + module.replace(".", "_")


def _kohya_delta(name: str) -> str:
    layer = name.removesuffix(".weight").removesuffix(".bias")
    return f"{_KOHYA_PREFIX}{layer.replace('.', '_')}.diff{'_b' * name.endswith('.bias')}"


def _write_tensors(file: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, file, metadata=header)


def _dump(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True)


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # other programs write plain text there
        return text


def _find_metadata(header: dict[str, Any], source: Path) -> dict[str, Any]:
    outer = header if METADATA_KEY in header else header.get(_DIFFUSERS_KEY)
    metadata = outer.get(METADATA_KEY) if isinstance(outer, dict) else None
    return check_told(metadata, source) if isinstance(metadata, dict) else {}


def _example(tensors: dict[str, Tensor]) -> str:
    return f"{len(tensors)} tensors, the first of them {min(tensors)}" if tensors else "no tensor"
