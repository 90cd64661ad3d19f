"""The adapter: what it touches, what it leaves, how it is scaled and merged. Run: pytest tests/model/test_lora.py"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch.utils.checkpoint import CheckpointError

from tests.model.adapters import ABOUT, KINDS, SIGNATURE, make_trained, output, settings, train_in_appearance
from tests.model.conftest import forward, make_inputs, make_unet, wake
from toolkit.errors import UserError
from toolkit.model.dropout import KeyedDropout, adapter_dropout
from toolkit.model.formats import linear_layers
from toolkit.model.lora import (
    TARGETS,
    dead_targets,
    enable_adapter,
    inject_lora,
    load_adapter,
    lora_parameters,
    match_targets,
    merge_adapters,
    remove_adapters,
    save_adapter,
    set_adapters,
    start_from,
)
from toolkit.model.unet import SVD_CONFIG, FramerUNet
from toolkit.rng import rng

SUFFIXES = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
EXTRAS = ["conv_in.bias", "conv_in.weight", "mask_token"]
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
KIND = pytest.mark.parametrize("kind", KINDS)
BOTH_ENDS = pytest.mark.parametrize("kind", ["plain", "everything"])


@pytest.fixture(scope="session")
def full_size() -> FramerUNet:
    """Framer's UNet in its published size, without weights."""
    with torch.device("meta"):
        return FramerUNet.from_config({**SVD_CONFIG, "in_channels": 9}).to("meta")


@pytest.fixture(scope="session")
def base_output() -> torch.Tensor:
    return output(make_unet())


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved adapter of every kind; read only."""
    folders = {}
    for kind, changes in KINDS.items():
        unet, parameters = make_trained(**changes)
        folders[kind] = tmp_path_factory.mktemp(kind)
        save_adapter(folders[kind], dict(parameters), unet, ABOUT)
    return folders


def snapshot(unet: FramerUNet) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


def same_weights(unet: FramerUNet, other: dict[str, torch.Tensor]) -> bool:
    own = unet.state_dict()
    return own.keys() == other.keys() and all(
        torch.equal(own[n], t) and own[n].dtype == t.dtype for n, t in other.items()
    )


# choosing layers


@pytest.mark.parametrize(
    ("targets", "modules", "parameters"),
    [
        ("spatial", 128, 13_279_232),
        ("temporal", 128, 13_279_232),
        ("all", 256, 26_558_464),
        ("self", 128, 12_779_520),
        ("cross", 128, 13_778_944),
        (
            "linear",
            384,
            63_299_584,
        ),  # the list below, and 64 * 14 C of the ff_in of transformers of 12,480 channels C in all
        (SUFFIXES, 352, 52_117_504),
    ],
    ids=str,
)
def test_counts_at_full_size(full_size: FramerUNet, targets: Any, modules: int, parameters: int) -> None:
    """Every preset, and the list of endings of the existing trainer, at rank 64 on the published configuration."""
    assert len(match_targets(full_size, targets)) == modules
    adapter = inject_lora(full_size, settings(rank=64, targets=targets), 0)
    remove_adapters(full_size)
    assert len(adapter) == 2 * modules and sum(p.numel() for p in adapter.values()) == parameters
    assert {p.dtype for p in adapter.values()} == {torch.float32} and list(adapter) == sorted(adapter)


def test_linear_is_what_transformers_consist_of(full_size: FramerUNet) -> None:
    """Every linear layer below a transformer of diffusers, but for the embedding of a frame's place."""
    theirs = {
        f"{name}.{layer}"
        for name, module in full_size.named_modules()
        if isinstance(module, TransformerSpatioTemporalModel)
        for layer, linear in module.named_modules()
        if isinstance(linear, torch.nn.Linear) and not layer.startswith("time_pos_embed.")
    }
    assert match_targets(full_size, "linear") == sorted(theirs)


@pytest.mark.parametrize("targets", [SUFFIXES, [LAYER], ["0.attn1.to_q"]], ids=str)
def test_endings_choose_what_peft_chooses(targets: list[str]) -> None:
    """A list of name endings adapts the layers that PEFT adapts for the same list."""
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets), make_unet())
    adapted = {n.split(".lora_A.")[0] for n, _ in theirs.named_parameters() if ".lora_A." in n}
    assert match_targets(make_unet(), targets) == sorted(adapted)


def test_expression_selects_what_it_matches(unet: FramerUNet) -> None:
    """A regular expression over whole names adapts those layers and no other of the same ending."""
    chosen = r"(down_blocks|mid_block)\..*\.transformer_blocks\.0\.attn2\.to_v"
    assert match_targets(unet, chosen) == [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    ]


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ("to_q", "'to_q' matches no"),  # a part of a name is no whole name
        (r".*\.attn9\..*", "attn9.* matches no"),
        ("conv_in", "'conv_in' matches no"),  # not linear
        (["to_q", "attn9.to_q"], "'attn9.to_q' matches no"),
        (["o_q"], "'o_q' matches no"),
        ([], "matches no"),
        ("(to_q", "'\\(to_q' is not a regular expression"),
    ],
    ids=str,
)
def test_targets_without_a_match_are_refused(unet: FramerUNet, targets: Any, named: str) -> None:
    """What matches nothing, a member of a list too, is named before anything is injected."""
    with pytest.raises(UserError, match=named):
        inject_lora(unet, settings(targets=targets), 0)
    assert not lora_parameters(unet)


def test_patterns_choose_as_peft_does(unet: FramerUNet) -> None:
    """The first pattern that matches the end of a name gives its rank or alpha, as in PEFT; the others keep the recipe's."""
    patterns: dict[str, Any] = {
        "rank_pattern": {r"attn2\.to_q": 3, "to_q": 2, r".*mid_block.*\.to_v": 5},
        "alpha_pattern": {"to_q": 1.5, r"attn1\.to_v": 20.0},
    }
    inject_lora(unet, settings(**patterns), 0)
    modules = match_targets(make_unet(), "all")
    config = peft.LoraConfig(r=4, lora_alpha=6, **patterns, target_modules=modules)
    theirs = peft.inject_adapter_in_model(config, make_unet())
    ranks = {name: (unet.get_submodule(name).r, unet.get_submodule(name).scaling) for name in modules}
    assert ranks == {name: (theirs.get_submodule(name).r, theirs.get_submodule(name).scaling) for name in modules}
    assert {rank["default"] for rank, _ in ranks.values()} == {2, 3, 4, 5}


@pytest.mark.parametrize(
    ("pattern", "named"),
    [("attn7", "'attn7' matches none of the 32"), ("attn2.to", "'attn2.to' matches none"), ("(", "'\\(' is not a reg")],
)
@pytest.mark.parametrize("what", ["rank_pattern", "alpha_pattern"])
def test_idle_pattern_is_refused(unet: FramerUNet, what: str, pattern: str, named: str) -> None:
    """A pattern that no chosen layer matches, and a broken one, are named."""
    with pytest.raises(UserError, match=f"lora.{what} {named}"):
        inject_lora(unet, settings(targets="spatial", **{what: {pattern: 2}}), 0)


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_dead_targets_get_no_gradient(unet: FramerUNet, frames: int, tokens: int) -> None:
    """Over one key a softmax is constant: exactly the named layers get gradients of rounding size, all others live."""
    modules = match_targets(unet, SUFFIXES)
    parameters = inject_lora(unet, settings(targets=SUFFIXES), 0)
    wake(parameters)
    inputs = make_inputs()
    inputs["sample"] = inputs["sample"][:, :frames]
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :tokens]
    forward(unet, inputs).square().mean().backward()
    largest = {m: max(parameters[f"{m}.lora_{x}.default.weight"].grad.abs().max() for x in "AB") for m in modules}
    silent = [m for m, g in largest.items() if g < 1e-4 * torch.stack([*largest.values()]).median()]
    assert dead_targets(modules, frames, tokens) == silent
    assert len(silent) == {(1, 1): 24, (3, 1): 16, (1, 2): 8, (3, 2): 0}[frames, tokens]


# the start of training


@KIND
def test_fresh_adapter_leaves_the_output_unchanged(unet: FramerUNet, base_output: torch.Tensor, kind: str) -> None:
    """B starts at zero and DoRA at the base's norms: the network is the base to rounding, and trained it is not."""
    parameters = inject_lora(unet, settings(**KINDS[kind]), 0)
    assert (output(unet) - base_output).abs().max() < 1e-6
    train_in_appearance(parameters)
    assert (output(unet) - base_output).abs().max() > 1e-3


def test_fresh_dora_on_a_bf16_base_is_the_base() -> None:
    """The magnitudes are fp32 norms of the bf16 weights, and the forward pass divides by the same: nothing is rescaled."""
    unet, inputs = make_unet(dtype=torch.bfloat16), make_inputs(dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = forward(unet, inputs)
        parameters = inject_lora(unet, settings(dora=True), 0)
        assert torch.equal(forward(unet, inputs), before)
    magnitude = parameters[f"{LAYER}.lora_magnitude_vector.default.weight"]
    weight = unet.get_submodule(LAYER).base_layer.weight
    assert torch.allclose(magnitude, weight.double().square().sum(1).sqrt().float(), rtol=1e-6)


@KIND
def test_equation_by_hand(kind: str) -> None:
    """One layer: W x + b + s B A x, s alpha / rank or alpha / sqrt(rank); DoRA divides W + s B A by its rows' norms."""
    unet, parameters = make_trained(**KINDS[kind])
    layer, x = unet.get_submodule(LAYER), torch.randn(2, 5, 32)
    a, b = (parameters[f"{LAYER}.lora_{m}.default.weight"] for m in "AB")
    weight = layer.base_layer.weight + 6 / (2 if KINDS[kind].get("rslora") else 4) * b @ a
    if KINDS[kind].get("dora"):
        weight = (
            parameters[f"{LAYER}.lora_magnitude_vector.default.weight"][:, None] * weight / weight.norm(dim=1)[:, None]
        )
    assert torch.allclose(layer(x), x @ weight.T + layer.base_layer.bias, atol=1e-5)


def test_start_depends_on_the_seed_alone() -> None:
    """The A matrices come from the seed and their place, not from the global generator, bounded as PEFT's default is."""
    first = inject_lora(make_unet(), settings(targets="spatial"), 3)
    torch.manual_seed(1234)
    again, other = (inject_lora(make_unet(), settings(targets="spatial"), seed) for seed in (3, 4))
    for i, (name, parameter) in enumerate(first.items()):
        assert torch.equal(parameter, again[name])
        if ".lora_A." in name:
            assert not torch.equal(parameter, other[name])
            bound = parameter.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5)
            assert 0.8 * bound < parameter.abs().max() <= bound
            by_hand = torch.empty(parameter.shape).uniform_(-bound, bound, generator=rng(3, "lora_init", i))
            assert torch.allclose(parameter, by_hand, rtol=1e-6)
        else:
            assert not parameter.any()


def test_dora_starts_where_lora_does() -> None:
    """Magnitudes and extras beside them change no draw of A."""
    plain = inject_lora(make_unet(), settings(), 3)
    other = inject_lora(make_unet(), settings(dora=True, extra_trainable=["conv_in"]), 3)
    assert plain.keys() < other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize(
    ("extras", "names"),
    [([], []), (["conv_in"], EXTRAS[:2]), (["mask_token"], EXTRAS[2:]), (["mask_token", "conv_in"], EXTRAS)],
)
def test_extras_train_when_asked(unet: FramerUNet, extras: list[str], names: list[str]) -> None:
    """conv_in and mask_token are among the parameters only when the recipe says so; the base trains nothing else."""
    parameters = inject_lora(unet, settings(extra_trainable=extras), 0)
    assert [name for name in parameters if ".lora_" not in name] == names and list(parameters) == sorted(parameters)
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == set(parameters)
    assert all(parameters[name] is dict(unet.named_parameters())[name] for name in parameters)


@pytest.mark.parametrize("kind", ["plain", "dora", "extras"])
def test_masters_are_fp32_on_a_bf16_base(kind: str) -> None:
    """The base keeps bf16, what trains is fp32, and the two run together under autocast."""
    unet = make_unet(dtype=torch.bfloat16)
    parameters = inject_lora(unet, settings(**KINDS[kind]), 0)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert {p.dtype for n, p in unet.named_parameters() if n not in parameters} == {torch.bfloat16}
    wake(parameters)
    inputs = make_inputs(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        (forward(unet, inputs).float().square().mean() + unet.mask_token.square().sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in parameters.values())


@pytest.mark.parametrize("kind", ["plain", "dora", "extras"])
def test_gradient_flows_to_the_adapter_only(unet: FramerUNet, kind: str) -> None:
    """Every adapter matrix gets a gradient, no weight of the base does; checkpointing changes no gradient."""
    parameters = inject_lora(unet, settings(**KINDS[kind]), 0)
    wake(parameters)
    unet.train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        (forward(unet, make_inputs()).square().mean() + unet.mask_token.square().sum()).backward()
        assert {n for n, p in unet.named_parameters() if p.grad is not None} == set(parameters)
        grads.append({name: p.grad.clone() for name, p in parameters.items()})
    assert all(g.abs().max() > 1e-8 for g in grads[0].values())
    assert all(torch.allclose(grads[0][n], grads[1][n], rtol=1e-5, atol=1e-9) for n in parameters)


# dropout


def test_mask_depends_on_the_sample_alone() -> None:
    """Two samples together or one by one get the same masks; another sample, seed or layer gets another mask."""
    dropout, x = KeyedDropout(0.3, "here"), torch.ones(6, 5, 7)  # two samples of three rows

    def draw(layer: KeyedDropout, seed: int, positions: list[int], x: torch.Tensor) -> torch.Tensor:
        with adapter_dropout(layer, seed, positions):
            return layer(x)

    together = draw(dropout, 0, [8, 31], x)
    apart = torch.cat([draw(dropout, 0, [8], x[:3]), draw(dropout, 0, [31], x[3:])])
    assert torch.equal(together, apart) and torch.equal(together, draw(dropout, 0, [8, 31], x))
    assert not torch.equal(together[:3], together[3:])
    assert not torch.equal(together, draw(dropout, 1, [8, 31], x))
    assert not torch.equal(together, draw(KeyedDropout(0.3, "there"), 0, [8, 31], x))
    assert torch.equal(dropout(x), x)  # outside: the identity


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_mean(p: float) -> None:
    """A share of 1 - p is kept, within five standard errors, and scaled by 1 / (1 - p)."""
    dropout, n = KeyedDropout(p, "layer"), 100_000
    with adapter_dropout(dropout, 0, range(4)):
        y = dropout(torch.ones(4, n // 4))
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)))
    assert abs((y != 0).float().mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_gradient_ignores_grouping_and_recomputation(checkpointing: bool) -> None:
    """Gradients of two clips at once, without checkpointing, equal those of one clip after the other, with or without."""

    def gradients(groups: list[slice], checkpointing: bool, dropout: bool = True) -> dict[str, torch.Tensor]:
        unet = make_unet()
        parameters = inject_lora(unet, settings(dropout=0.4), 0)
        wake(parameters)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        for group in groups:
            inputs = {name: tensor[group] for name, tensor in make_inputs().items()}
            positions = [5, 9][group]
            with adapter_dropout(unet, 7, positions) if dropout else nullcontext():
                forward(unet, inputs).square().sum().backward()
        return {name: p.grad for name, p in parameters.items()}

    wanted = gradients([slice(0, 2)], False)
    found = gradients([slice(0, 1), slice(1, 2)], checkpointing)
    assert all(torch.allclose(wanted[n], found[n], rtol=1e-3, atol=1e-4 * wanted[n].abs().max()) for n in wanted)
    without = gradients([slice(0, 2)], False, dropout=False)
    assert any((wanted[n] - without[n]).abs().max() > 0.1 * wanted[n].abs().max() for n in wanted)


def test_backward_outside_of_the_dropout_is_an_error(unet: FramerUNet) -> None:
    """Recomputed without its masks, a step would train on wrong gradients; torch notices."""
    wake(inject_lora(unet, settings(dropout=0.4), 0))
    unet.enable_gradient_checkpointing()
    with adapter_dropout(unet, 7, [5, 9]):
        loss = forward(unet, make_inputs()).square().sum()
    with pytest.raises(CheckpointError):
        loss.backward()


def test_dropout_is_off_at_inference(base_output: torch.Tensor) -> None:
    """Outside of training an adapter with dropout is the adapter without, in train mode too."""
    with_dropout, without = make_trained(dropout=0.4)[0].train(), make_trained()[0]
    assert torch.equal(output(with_dropout), output(without))


# adapters in use


@BOTH_ENDS
def test_saved_and_loaded_adapter_is_the_same(saved: dict[str, Path], kind: str) -> None:
    """Loading gives the same tensors, the same output and the metadata back, and nothing to train."""
    unet, parameters = make_trained(**KINDS[kind])
    loaded = make_unet()
    assert load_adapter(loaded, saved[kind], SIGNATURE) == ABOUT
    assert torch.equal(output(loaded), output(unet))
    again = dict(loaded.named_parameters())
    assert all(torch.equal(again[name], parameters[name]) for name in parameters)
    assert not any(p.requires_grad for p in loaded.parameters())


@BOTH_ENDS
def test_scale_zero_and_off_are_the_base(saved: dict[str, Path], base_output: torch.Tensor, kind: str) -> None:
    """Scaled by zero, or switched off, every weight acts as the base's, bit for bit; on again, as the adapter's."""
    unet = make_unet()
    base = {name: unet.get_parameter(name).clone() for name in EXTRAS}
    load_adapter(unet, saved[kind], SIGNATURE)
    tuned, values = output(unet), {name: unet.get_parameter(name).clone() for name in EXTRAS}
    for switch_off, switch_on in (
        (lambda: enable_adapter(unet, False), lambda: enable_adapter(unet, True)),
        (lambda: set_adapters(unet, {"default": 0}), lambda: set_adapters(unet, {"default": 1})),
        (lambda: set_adapters(unet, {}), lambda: set_adapters(unet, {"default": 1})),
        (lambda: enable_adapter(unet, False), lambda: set_adapters(unet, {"default": 1})),
    ):
        switch_off()
        assert torch.equal(output(unet), base_output)
        assert all(torch.equal(unet.get_parameter(name), base[name]) for name in EXTRAS)
        switch_on()
        assert torch.equal(output(unet), tuned)
        assert all(torch.equal(unet.get_parameter(name), values[name]) for name in EXTRAS)
        assert not any(p.requires_grad for p in unet.parameters())


def test_switching_off_in_training_keeps_what_was_learned() -> None:
    """Off and on between two steps, as for a comparison with the base, moves no value, no storage and no flag."""
    unet, parameters = make_trained(extra_trainable=["conv_in", "mask_token"])
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in parameters.items()}
    enable_adapter(unet, False)
    assert torch.equal(unet.conv_in.weight, make_unet().conv_in.weight)
    enable_adapter(unet, True)
    for name, parameter in parameters.items():
        assert parameter.requires_grad and parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("kind", ["plain", "rslora", "rank_pattern", "extras"])
def test_scale_multiplies_what_was_trained(saved: dict[str, Path], kind: str) -> None:
    """Scale 0.3 is the base plus 0.3 of every change: of s B A, and of tensors trained whole."""
    changes, unet, (trained, parameters) = KINDS[kind], make_unet(), make_trained(**KINDS[kind])
    load_adapter(unet, saved[kind], SIGNATURE, "other", scale=0.3)
    stock = make_unet()
    for name in (n for n in parameters if ".lora_B." in n):
        module = name.split(".lora_B.")[0]
        a, b = parameters[name.replace("_B.", "_A.")], parameters[name]
        stock.get_submodule(module).weight.data += 0.3 * 6 / len(a) ** (0.5 if "rslora" in changes else 1) * b @ a
    for name in EXTRAS:
        base = stock.get_parameter(name)
        base.data += 0.3 * (trained.get_parameter(name) - base).detach()
        assert torch.allclose(unet.get_parameter(name), base, atol=1e-6)
    assert torch.allclose(output(unet), output(stock), atol=1e-5)


def test_adapters_add_up(saved: dict[str, Path], base_output: torch.Tensor) -> None:
    """Two adapters at once change each layer by the sum of what each does; one of them alone is that one."""
    unet, layer_alone = make_unet(), {}
    x = torch.randn(2, 5, 32)
    for name, kind in (("a", "extras"), ("b", "rslora")):
        alone = make_unet()
        load_adapter(alone, saved[kind], SIGNATURE)
        layer_alone[name] = alone.get_submodule(LAYER)(x) - linear_layers(alone)[LAYER](x)
        load_adapter(unet, saved[kind], SIGNATURE, name)
    tuned_conv = unet.tuned["a"]["conv_in.weight"]
    layer, plain = unet.get_submodule(LAYER), linear_layers(unet)[LAYER](x)
    assert torch.allclose(layer(x), plain + layer_alone["a"] + layer_alone["b"], atol=1e-5)  # both active once loaded
    set_adapters(unet, {"a": 0.5, "b": -2})
    assert torch.allclose(layer(x), plain + 0.5 * layer_alone["a"] - 2 * layer_alone["b"], atol=1e-5)
    base = make_unet().conv_in.weight
    assert torch.allclose(unet.conv_in.weight, base + 0.5 * (tuned_conv - base), atol=1e-6)
    set_adapters(unet, {"b": 1})
    assert torch.equal(layer(x), plain + layer_alone["b"]) or torch.allclose(
        layer(x), plain + layer_alone["b"], atol=1e-6
    )
    assert torch.equal(unet.conv_in.weight, base)
    with pytest.raises(UserError, match="no adapter named c is loaded; loaded are a, b"):
        set_adapters(unet, {"a": 1, "c": 1})
    with pytest.raises(UserError, match="named a is loaded already"):
        load_adapter(unet, saved["plain"], SIGNATURE, "a")


@BOTH_ENDS
def test_removed_adapters_leave_the_stock_network(saved: dict[str, Path], kind: str) -> None:
    """Whatever was loaded, the tree of modules, every weight and every attribute are the untouched UNet's again."""
    unet, stock = make_unet(), make_unet()
    load_adapter(unet, saved[kind], SIGNATURE, "a")
    load_adapter(unet, saved["everything"], SIGNATURE, "b", 0.7)
    remove_adapters(unet)
    assert same_weights(unet, snapshot(stock)) and vars(unet).keys() == vars(stock).keys()
    assert [(n, type(m)) for n, m in unet.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]
    load_adapter(unet, saved[kind], SIGNATURE, "a")  # and it can be used again


@BOTH_ENDS
def test_merged_network_is_the_adapted_one(saved: dict[str, Path], kind: str) -> None:
    """Folded in, two scaled adapters give the same output from plain modules."""
    unet = make_unet()
    load_adapter(unet, saved[kind], SIGNATURE, "a", 0.8)
    load_adapter(unet, saved["dora"], SIGNATURE, "b", 0.5)
    adapted = output(unet)
    merge_adapters(unet)
    assert torch.allclose(output(unet), adapted, atol=1e-5)
    assert [(n, type(m)) for n, m in unet.named_modules()] == [(n, type(m)) for n, m in make_unet().named_modules()]
    assert vars(unet).keys() == vars(make_unet()).keys() and not any(".lora_" in n for n in unet.state_dict())


@pytest.mark.parametrize("kind", ["plain", "rslora", "dora", "rank_pattern"])
def test_merging_agrees_with_peft(saved: dict[str, Path], kind: str) -> None:
    """The weights are those of PEFT's merge_and_unload."""
    unet = make_unet()
    load_adapter(unet, saved[kind], SIGNATURE)
    merge_adapters(unet)
    theirs = peft.PeftModel.from_pretrained(make_unet(), saved[kind]).merge_and_unload().state_dict()
    assert all(torch.allclose(tensor, theirs[name], atol=1e-6) for name, tensor in unet.state_dict().items())


def test_merging_rounds_once(saved: dict[str, Path]) -> None:
    """On a bf16 base the sum is taken in fp32 and rounded at the end, of tensors trained whole too."""
    unet, base = make_unet(dtype=torch.bfloat16), make_unet(dtype=torch.bfloat16)
    load_adapter(unet, saved["extras"], SIGNATURE)
    _, parameters = make_trained(**KINDS["extras"])
    merge_adapters(unet)
    a, b = (parameters[f"{LAYER}.lora_{m}.default.weight"] for m in "AB")
    wanted = (base.get_submodule(LAYER).weight.float() + 1.5 * b @ a).to(torch.bfloat16)
    assert torch.equal(unet.get_submodule(LAYER).weight, wanted)
    assert torch.equal(unet.conv_in.weight, parameters["conv_in.weight"].to(torch.bfloat16))
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


def test_saving_does_not_move_the_training_tensors(tmp_path: Path) -> None:
    """The parameters, their storage and their gradients' flag are what they were before a save."""
    unet, parameters = make_trained(**KINDS["everything"])
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in parameters.items()}
    save_adapter(tmp_path, dict(parameters), unet, ABOUT)
    for name, parameter in parameters.items():
        assert parameter.requires_grad and parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_adapter_of_another_base_is_refused(saved: dict[str, Path], unet: FramerUNet) -> None:
    """The error names the base it was trained on; the UNet is left as it was."""
    with pytest.raises(UserError, match="trained on somewhere/base, .*give the base that it was trained on"):
        load_adapter(unet, saved["plain"], [0.5, 0.25, 0.125])
    assert not lora_parameters(unet)


# starting from an adapter


@BOTH_ENDS
def test_training_starts_from_an_adapter(saved: dict[str, Path], kind: str) -> None:
    """init_from gives the parameters that were saved, in their place, still to be trained."""
    unet = make_unet()
    parameters = inject_lora(unet, settings(**KINDS[kind]), 5)
    pointers = {name: p.data_ptr() for name, p in parameters.items()}
    start_from(unet, parameters, saved[kind], SIGNATURE)
    _, wanted = make_trained(**KINDS[kind])
    assert parameters.keys() == wanted.keys() and all(torch.equal(parameters[n], wanted[n]) for n in wanted)
    assert all(p.requires_grad and p.data_ptr() == pointers[n] for n, p in parameters.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": "spatial"}, "differs in modules: it has .*temporal.* and 31 more"),
        ({"targets": ["to_q", "to_k", "to_v", "to_out.0", "proj_in"]}, "modules: this recipe has .*proj_in and"),
        ({"rank": 8}, "differs in rank: it has .* 4 and .*this recipe has .* 8"),
        ({"rank_pattern": {"to_q": 2}}, "differs in rank"),
        ({"dora": True}, "differs in lora.dora: it has False, this recipe has True"),
        ({"alpha": 12}, "differs in alpha / rank: it has .* 1.5 and .*this recipe has .* 3.0"),
        ({"rslora": True}, "differs in alpha / rank"),
        ({"extra_trainable": ["mask_token"]}, "differs in lora.extra_trainable: this recipe has mask_token"),
    ],
    ids=str,
)
def test_start_that_differs_is_refused(saved: dict[str, Path], unet: FramerUNet, changes: Any, said: str) -> None:
    """Modules, ranks, kind, scaling and extras must be the recipe's; the first that differs is named with both values."""
    parameters = inject_lora(unet, settings(**changes), 5)
    with pytest.raises(UserError, match=said):
        start_from(unet, parameters, saved["plain"], SIGNATURE)


def test_start_from_another_base_is_refused(saved: dict[str, Path], unet: FramerUNet) -> None:
    """What an adapter learned on one base is not where another one starts."""
    parameters = inject_lora(unet, settings(), 5)
    with pytest.raises(
        UserError, match="was trained on somewhere/base, and the weights of the base given here are others"
    ):
        start_from(unet, parameters, saved["plain"], [0.9, *SIGNATURE[1:]])


def test_presets_cover_each_other(unet: FramerUNet) -> None:
    """spatial and temporal, or self and cross, part the attention layers in two."""
    chosen = {name: set(match_targets(unet, name)) for name in TARGETS}
    for one, other in (("spatial", "temporal"), ("self", "cross")):
        assert chosen[one] | chosen[other] == chosen["all"] and not chosen[one] & chosen[other]
