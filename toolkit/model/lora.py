"""LoRA on the UNet's linear layers: PEFT injects; this module chooses, draws, scales, merges, saves and loads.

Test: pytest tests/model/test_lora.py. The files are formats.py's; those of a checkpoint are PEFT's own.

Some tensors may be trained whole beside the adapters (`extra_trainable`), so an adapted UNet carries `untuned` {tensor name:
the base's value}, `tuned` {adapter name: {tensor name: its value}}, `weights` {adapter name: scale} of the active ones, and,
while the adapters are off, `set_aside` {tensor name: the value to come back}.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from toolkit.config import LoraConfig
from toolkit.errors import UserError
from toolkit.model.base import same_base
from toolkit.model.dropout import KeyedDropout
from toolkit.model.formats import (
    EXTRA_NAMES,
    EXTRA_TENSORS,
    AdapterFile,
    LoraKind,
    linear_layers,
    read_adapter,
    refuse_misfit,
    write_peft,
)
from toolkit.rng import rng

_QKVO = r"(to_q|to_k|to_v|to_out\.0)"
# matched against whole module names; the dot before transformer_blocks keeps out temporal_transformer_blocks
TARGETS = {
    "spatial": rf".*\.transformer_blocks\.\d+\.attn[12]\.{_QKVO}",
    "temporal": rf".*\.temporal_transformer_blocks\.\d+\.attn[12]\.{_QKVO}",
    "cross": rf".*\.attn2\.{_QKVO}",
    "self": rf".*\.attn1\.{_QKVO}",
    "all": rf".*\.attn[12]\.{_QKVO}",
    "linear": r".*transformer_blocks\..*|.*\.proj_(in|out)",  # of the transformers, what follows attention included
}
_T = TypeVar("_T")
_PARTS = re.compile(r"\.lora_(A|B|magnitude_vector)\.")


def match_targets(unet: nn.Module, targets: str | list[str]) -> list[str]:
    """Name the linear layers that a recipe's lora.targets chooses, sorted.

    targets  spatial, temporal, cross, self, all, linear; a regular expression over whole names; or a list of name endings,
             matched as huggingface/peft does: the whole name, or what follows a dot
    raises   UserError where an expression is invalid, or it or a member of the list matches nothing
    """
    names = sorted(linear_layers(unet))
    if isinstance(targets, str):
        pattern = _compile(TARGETS.get(targets, targets), f"lora.targets {targets!r}")
        chosen = [name for name in names if pattern.fullmatch(name)]
        idle = [] if chosen else [targets]
    else:
        ends = {target: [n for n in names if n == target or n.endswith(f".{target}")] for target in targets}
        chosen = sorted(set().union(*ends.values()))
        idle = [target for target, found in ends.items() if not found] or ([] if chosen else [""])
    if idle:
        raise UserError(
            f"lora.targets {idle[0]!r} matches no linear layer; use {', '.join(TARGETS)}, a regular expression over whole "
            "names, or a list of name endings such as to_q"
        )
    return chosen


def dead_targets(modules: list[str], frames: int, tokens: int) -> list[str]:
    """Name the modules whose LoRA cannot learn, because their softmax runs over one key and is always 1.

    tokens  N, the context tokens of cross-attention; frames  T, what temporal self-attention attends over
    """
    return [
        name
        for name in modules
        if name.endswith((".to_q", ".to_k"))
        and ((tokens == 1 and ".attn2." in name) or (frames == 1 and ".temporal_" in name and ".attn1." in name))
    ]


def inject_lora(unet: Any, settings: LoraConfig, seed: int) -> dict[str, nn.Parameter]:
    """Make the trainable parameters of a recipe in a frozen UNet; its output is unchanged until they are trained.

    seed     of the A matrices (uniform, PEFT's default); B is zero, DoRA's magnitudes are the norms of the base's weights
    returns  {parameter name: fp32 parameter}, sorted; extra_trainable's tensors under their own names
    raises   UserError where targets, rank_pattern or alpha_pattern match nothing
    """
    _inject(unet, choose_kind(unet, settings), "default")
    if settings.dropout:
        for name, layer in adapted_layers(unet).items():
            layer.lora_dropout["default"] = KeyedDropout(settings.dropout, name)
    adapter = lora_parameters(unet)
    _draw_start(adapter, seed)
    return dict(sorted((adapter | _free_extras(unet, settings.extra_trainable)).items()))


def choose_kind(unet: nn.Module, settings: LoraConfig) -> LoraKind:
    """Which layers a recipe adapts, and how; the UNet may be on meta, so a wrong recipe is refused before weights are read.

    raises   UserError where targets, rank_pattern or alpha_pattern match nothing
    """
    modules = match_targets(unet, settings.targets)
    return LoraKind(
        _apply_pattern(modules, settings.rank, settings.rank_pattern, "rank_pattern"),
        _apply_pattern(modules, settings.alpha, settings.alpha_pattern, "alpha_pattern"),
        settings.rslora,
        settings.dora,
    )


def lora_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Name the adapters' parameters as the UNet does, sorted."""
    return {name: p for name, p in sorted(unet.named_parameters()) if _PARTS.search(name)}


def compute_dtypes(unet: nn.Module, parameters: Iterable[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """In which precision a network of this dtype computes with each of inject_lora's parameters: its own.

    But DoRA's all in fp32: a magnitude is divided by the norm of a row, and what that gives is near 1.
    """
    dora = {name for name, layer in adapted_layers(unet).items() if layer.lora_magnitude_vector}
    return {name: torch.float32 if _PARTS.split(name)[0] in dora else dtype for name in parameters}


def save_adapter(folder: Path, tensors: dict[str, Tensor], unet: nn.Module, metadata: dict[str, Any]) -> None:
    """Write the adapter in training as adapter_model.safetensors and adapter_config.json, as PEFT reads them.

    tensors   {parameter name: tensor}, those of inject_lora
    metadata  kept in the safetensors header as JSON
    """
    write_peft(folder, with_values(AdapterFile(_find_kind(unet, "default"), {}, {}, metadata), tensors))


def with_values(adapter: AdapterFile, values: Mapping[str, Tensor]) -> AdapterFile:
    """The same adapter with other tensors, {parameter name: tensor}, those of inject_lora."""
    return replace(
        adapter,
        tensors={_file_name(name): tensor for name, tensor in values.items() if name not in EXTRA_NAMES},
        extras={name: tensor for name, tensor in values.items() if name in EXTRA_NAMES},
    )


def load_adapter(
    unet: Any,
    source: Path,
    signature: list[float],
    name: str = "default",
    scale: float = 1.0,
    values: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Read an adapter of any format into the base it was trained on; see add_adapter.

    values   in place of those in the file, as with_values takes them
    returns  the adapter's metadata, empty for adapters of other programs
    """
    adapter = read_adapter(source, unet)
    if values is not None:
        adapter = with_values(adapter, values)
    add_adapter(unet, adapter, source, signature, name, scale)
    return adapter.metadata


def add_adapter(
    unet: Any, adapter: AdapterFile, source: Path, signature: list[float], name: str = "default", scale: float = 1.0
) -> None:
    """Put an adapter into the base it was trained on, beside those that are there, and switch it on.

    Its matrices stay fp32, whatever the base is in: run the network under torch.autocast, as Framer.predict does.
    source     where it was read, for errors
    signature  of the loaded base; an adapter that names another one is refused
    name       of the adapter, for set_adapters
    scale      multiplies alpha / rank, it does not replace it; zero is the base bit for bit
    raises     UserError where it belongs to another base, does not fit, or has a name that cannot be
    """
    refuse_other_base(adapter.metadata, signature, source)
    refuse_misfit(adapter, unet, source)
    if not re.fullmatch(r"\w[\w-]*", name) or hasattr(nn.ModuleDict(), name):  # PEFT keeps adapters in ModuleDicts
        raise UserError(
            f"an adapter cannot be named {name!r}; letters, digits, _ and - are allowed, and no word of torch's"
        )
    if name in getattr(unet, "peft_config", {}):
        raise UserError(f"an adapter named {name} is loaded already; give {source} another name")
    _inject(unet, adapter.kind, name)
    for full_name, parameter in _parameters_of(unet, name).items():
        parameter.data.copy_(adapter.tensors[_file_name(full_name, name)])
    _remember(unet, adapter.extras)
    unet.tuned[name] = adapter.extras
    set_adapters(unet, {**unet.weights, name: scale})


def delete_adapter(unet: Any, name: str) -> None:
    """Take one adapter out of memory; the others stay as they are, on or off."""
    off = any(layer.disable_adapters for layer in adapted_layers(unet).values())
    weights = {other: weight for other, weight in unet.weights.items() if other != name}
    if list(unet.peft_config) == [name]:
        remove_adapters(unet)
        return
    set_adapters(unet, weights)
    for layer in adapted_layers(unet).values():
        layer.delete_adapter(name)
    del unet.peft_config[name], unet.tuned[name]
    for path, layer in adapted_layers(unet).items():
        if not layer.lora_A:  # only the deleted adapter was here
            _replace(unet, path, layer.get_base_layer())
    if off:
        enable_adapter(unet, False)


def refuse_other_base(metadata: dict[str, Any], signature: Sequence[float], source: Path) -> None:
    """Refuse an adapter that says it was trained on other weights than those with this signature."""
    saved = metadata.get("base_signature")
    if saved is not None and not same_base(saved, signature):
        raise UserError(
            f"the adapter in {source} was trained on {metadata.get('base')}, and the weights of the base given here are "
            "others; give the base that it was trained on"
        )


def set_adapters(unet: Any, weights: dict[str, float]) -> None:
    """Activate exactly these loaded adapters, for inference.

    weights  {adapter name: scale}. Tensors trained whole become base + sum of scale * (tuned - base). With DoRA the scale
             goes to B A alone, as in PEFT: the magnitudes stay, unless the scale is zero.
    raises   UserError for a name that is not loaded
    """
    loaded = getattr(unet, "peft_config", {})
    if unknown := weights.keys() - loaded.keys():
        raise UserError(f"no adapter named {min(unknown)} is loaded; loaded are {', '.join(loaded) or 'none'}")
    # an adapter scaled by zero is left out altogether: the base bit for bit, whatever its kind
    active = {name: weight for name, weight in weights.items() if weight}
    for layer in adapted_layers(unet).values():
        layer.enable_adapters(True)
        layer.set_adapter(list(active), inference_mode=True)
        for name, weight in active.items():
            layer.set_scale(name, weight)
    _remember(unet)
    unet.weights = active
    for name, base in unet.untuned.items():
        unet.get_parameter(name).data.copy_(_mix(base, [(w, unet.tuned[a].get(name, base)) for a, w in active.items()]))
    unet.set_aside = {}


def enable_adapter(unet: Any, enabled: bool) -> None:
    """Switch all adapters off, which gives the untuned base bit for bit, or on again as they were."""
    trainable = {name: p.requires_grad for name, p in lora_parameters(unet).items()}
    for layer in adapted_layers(unet).values():
        layer.enable_adapters(enabled)
    for name, parameter in lora_parameters(unet).items():
        parameter.requires_grad_(trainable[name])  # PEFT's switch freezes them when off, and frees them when on
    _remember(unet)
    if not enabled and not unet.set_aside:
        unet.set_aside = {name: unet.get_parameter(name).detach().clone() for name in unet.untuned}
        _fill(unet, unet.untuned)
    elif enabled:
        _fill(unet, unet.set_aside)
        unet.set_aside = {}


def remove_adapters(unet: Any) -> None:
    """Take every adapter out: the stock UNet again, the base bit for bit."""
    like = unet.conv_out.weight  # where .to() may have taken the network since
    for name, base in getattr(unet, "untuned", {}).items():
        unet.get_parameter(name).data = base.to(like)
    _unwrap(unet)


@torch.no_grad()
def merge_adapters(unet: Any) -> None:
    """Fold the active adapters, as they are scaled, into the base's weights, which leaves the stock UNet's plain modules.

    Computed in fp32, then cast to the weight's dtype. Equations: y = (W + s B A) x, and with DoRA m (W + s B A) x, each row
    divided by its norm before (arXiv 2402.09353, eq. 5).
    """
    for layer in adapted_layers(unet).values():
        if layer.disable_adapters:
            continue
        base = layer.get_base_layer().weight
        merged = base.data.float()
        for name in layer.active_adapters:
            if name not in layer.lora_A:
                continue
            update = layer.scaling[name] * (layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float())
            merged = merged + update
            if name in layer.lora_magnitude_vector:
                norm = torch.linalg.norm(base.data.float() + update, dim=1)
                merged = merged * (layer.lora_magnitude_vector[name].weight.float() / norm)[:, None]
        base.data = merged.to(base.dtype)
    for name in getattr(unet, "untuned", {}):
        parameter = unet.get_parameter(name)
        parameter.data = parameter.data.to(unet.conv_out.weight.dtype)
    _unwrap(unet)


def start_from(
    unet: nn.Module, parameters: dict[str, nn.Parameter], source: Path, signature: Sequence[float] | None
) -> None:
    """Copy an adapter's values, of any format, into freshly injected parameters of the same modules, ranks and scaling.

    parameters  those of inject_lora
    signature   of the loaded base; None of one on meta, which has no values to tell it from others by
    raises      UserError naming what differs, or where the adapter was trained on another base
    """
    adapter = read_adapter(source, unet)
    if signature is not None:
        refuse_other_base(adapter.metadata, signature, source)
    refuse_misfit(adapter, unet, source)
    kind, wanted = adapter.kind, _find_kind(unet, "default")
    for what, theirs, ours in (
        ("modules", set(kind.ranks), set(wanted.ranks)),
        ("rank", set(kind.ranks.items()), set(wanted.ranks.items())),
        ("lora.dora", {kind.dora}, {wanted.dora}),
        ("alpha / rank", _scalings(kind), _scalings(wanted)),
        ("lora.extra_trainable", set(adapter.extras), set(EXTRA_NAMES & parameters.keys())),
    ):
        if theirs != ours:
            own = (("it has", theirs - ours), ("this recipe has", ours - theirs))
            only = ", ".join(f"{whose} {_first(differing)}" for whose, differing in own if differing)
            raise UserError(
                f"lora.init_from {source} differs in {what}: {only}; give the lora section it was trained with"
            )
    values = adapter.tensors | adapter.extras
    for name, parameter in parameters.items():
        parameter.data.copy_(values[_file_name(name)])


def _compile(expression: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise UserError(f"{what} is not a regular expression: {error}") from None


def _apply_pattern(modules: list[str], value: _T, pattern: dict[str, _T], what: str) -> dict[str, _T]:
    """A value for each module: that of the first expression in the pattern that matches it, by PEFT's own rule."""
    from peft.utils.other import get_pattern_key

    for key in pattern:
        _compile(key, f"lora.{what} {key!r}")
    matched = {name: get_pattern_key(pattern, name) for name in modules}  # the name itself where nothing matches
    for key in pattern:
        if not any(get_pattern_key([key], name) == key for name in modules):
            raise UserError(f"lora.{what} {key!r} matches none of the {len(modules)} modules of lora.targets")
    return {name: pattern.get(key, value) for name, key in matched.items()}


def _inject(unet: Any, kind: LoraKind, name: str) -> None:
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        peft.inject_adapter_in_model(peft.LoraConfig(**kind.to_peft()), unet, name)
    for layer in adapted_layers(unet).values():
        # PEFT casts each layer's input to the adapter's fp32; under autocast that only costs memory and a cast back. DoRA
        # needs it: the cast decides in which precision the norms are taken that the fp32 magnitudes are divided by.
        layer.cast_input_dtype_enabled = bool(layer.lora_magnitude_vector)
        if name in layer.lora_magnitude_vector:
            norm = torch.linalg.norm(layer.get_base_layer().weight.detach().float(), dim=1)
            layer.lora_magnitude_vector[name].weight.data = norm
    for parameter in _parameters_of(unet, name).values():
        # masters in fp32 whatever the base's dtype: a bf16 weight loses updates below 2^-9 of its size
        parameter.data = parameter.data.float()
    _remember(unet)


def _draw_start(adapter: dict[str, nn.Parameter], seed: int) -> None:
    # counted over A and B alone, so that a DoRA starts where the LoRA of the same seed does
    for i, (name, parameter) in enumerate(p for p in adapter.items() if ".lora_magnitude_vector." not in p[0]):
        if ".lora_A." in name and not parameter.is_meta:
            start = torch.empty(parameter.shape)
            parameter.data.copy_(nn.init.kaiming_uniform_(start, math.sqrt(5), generator=rng(seed, "lora_init", i)))


def _free_extras(unet: Any, extras: list[Any]) -> dict[str, nn.Parameter]:
    names = [name for extra in extras for name in EXTRA_TENSORS[extra]]
    _remember(unet, names)
    freed = {name: unet.get_parameter(name) for name in names}
    for parameter in freed.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return freed


def _remember(unet: Any, names: Iterable[str] = ()) -> None:
    """Keep the base's values of tensors that are about to change; makes the attributes of the module docstring."""
    if not hasattr(unet, "untuned"):
        unet.untuned, unet.tuned, unet.weights, unet.set_aside = {}, {}, {}, {}
    for name in names:
        unet.untuned.setdefault(name, unet.get_parameter(name).detach().clone())


def _mix(base: Tensor, tuned: list[tuple[float, Tensor]]) -> Tensor:
    moved = [(weight, value.to(base.device)) for weight, value in tuned if value is not base]
    if len(moved) == 1 and moved[0][0] == 1:
        return moved[0][1]  # base + (tuned - base) would round
    return base.float() + sum(weight * (value.float() - base.float()) for weight, value in moved)


def _fill(unet: nn.Module, values: dict[str, Tensor]) -> None:
    # in place: an optimizer may hold the storage
    for name, value in values.items():
        unet.get_parameter(name).data.copy_(value)


def _unwrap(unet: Any) -> None:
    for name, layer in adapted_layers(unet).items():
        _replace(unet, name, layer.get_base_layer())
    for attribute in ("peft_config", "untuned", "tuned", "weights", "set_aside"):
        unet.__dict__.pop(attribute, None)


def _replace(unet: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(unet.get_submodule(parent), child, module)


def adapted_layers(unet: nn.Module) -> dict[str, Any]:
    """PEFT's layers in place of the UNet's own, by the names of those."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def _find_kind(unet: nn.Module, adapter: str) -> LoraKind:
    layers = {name: layer for name, layer in sorted(adapted_layers(unet).items()) if adapter in layer.lora_A}
    return LoraKind(
        {name: layer.r[adapter] for name, layer in layers.items()},
        {name: layer.lora_alpha[adapter] for name, layer in layers.items()},
        any(layer.use_rslora[adapter] for layer in layers.values()),
        any(layer.use_dora[adapter] for layer in layers.values()),
    )


def _parameters_of(unet: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in lora_parameters(unet).items() if name.endswith(f".{adapter}.weight")}


def _file_name(parameter: str, adapter: str = "default") -> str:
    """Name of a parameter in an AdapterFile: without the adapter's name."""
    return re.sub(rf"\.{adapter}\.weight$", ".weight", parameter)


def _scalings(kind: LoraKind) -> set[tuple[str, float]]:
    return {(module, round(kind.scaling(module), 6)) for module in kind.ranks}


def _first(differing: set[Any]) -> str:
    example = min(differing, key=str)
    text = f"{example[0]} {example[1]}" if isinstance(example, tuple) else str(example)
    return text + (f" and {len(differing) - 1} more" if len(differing) > 1 else "")
