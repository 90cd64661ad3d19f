"""A recipe says what runs, and a wrong one is refused by name. Run: pytest tests/test_config.py"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from toolkit.config import (
    LEAN,
    ZERO_STAGES,
    EngineConfig,
    RunConfig,
    diff_configs,
    dump_config,
    field_names,
    load_config,
    load_deepspeed_json,
    parse_yaml,
)
from toolkit.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))
DEEPSPEED_FILES = sorted((ROOT / "ds_configs").glob("*.json"))

# Every option of a run. A new option is a visible change here; a renamed one breaks old recipes.
FIELDS = """
checkpoint.ema
checkpoint.every_steps
checkpoint.keep
checkpoint.keep_every_steps
data.cache_dir
data.cache_gb
data.debug
data.flip
data.frames
data.height
data.max_bad_fraction
data.mix
data.random_crop
data.remote
data.reverse
data.shards
data.stride
data.width
data.workers
diffusion.clip_tokens
diffusion.conditioning_dropout
diffusion.control
diffusion.layout
diffusion.lognormal_mean
diffusion.lognormal_std
diffusion.loss_space
diffusion.min_snr_gamma
diffusion.noise_augmentation
diffusion.noise_sampler
diffusion.parameterization
diffusion.scale_conditioning
engine.deepspeed
engine.global_batch
engine.hang_timeout_s
engine.kind
engine.micro_batch
engine.precision
engine.shard_ranks
full.parameters
log_every_steps
lora.alpha
lora.alpha_pattern
lora.dora
lora.dropout
lora.extra_trainable
lora.init_from
lora.rank
lora.rank_pattern
lora.rslora
lora.targets
model.attention
model.base
model.blocks
model.compile
model.controlnet
model.controlnet_revision
model.cuda_graphs
model.memory
model.quantize
model.revision
model.unet
model.unet_revision
model.variant
name
optimizer.beta1
optimizer.beta2
optimizer.eps
optimizer.lr
optimizer.max_grad_norm
optimizer.max_skipped_steps
optimizer.weight_decay
runs_dir
schedule.epochs
schedule.shape
schedule.steps
schedule.warmup_steps
seed
tuning
validation.best_by
validation.clips
validation.every_steps
validation.figures_every_steps
validation.gaps
validation.lpips
validation.max_guidance
validation.min_guidance
validation.patience
validation.sampler
validation.sampler_steps
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "a", "data": {"shards": "shards/a"}, "lora": {"rank": 8}}))
    return path


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("lora.rnak", "lora.rank"),
        ("lora.rnk", "lora.rank"),
        ("optimizer.learning_rate", "optimizer"),
        ("sed", "seed"),
        ("rank", "lora.rank"),
        ("lorra.rank", "lora"),
        ("engine.micro_batch_size", "engine.micro_batch"),
    ],
)
def test_unknown_key_names_the_nearest(recipe: Path, given: str, nearest: str) -> None:
    """The error repeats the key and names a known one like it, at every level, in the file or on the command line."""
    with pytest.raises(UserError, match=f"unknown key {given.split('.')[0]}.*did you mean {nearest}"):
        load_config(recipe, {given: 1})
    tree: dict[str, Any] = yaml.safe_load(recipe.read_text())
    *section, key = given.split(".")
    (tree.setdefault(section[0], {}) if section else tree)[key] = 1
    recipe.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=f"unknown key {given.split('.')[0]}.*did you mean {nearest}"):
        load_config(recipe)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("lora.rank", 0, "lora.rank is 0: .*greater than or equal to 1"),
        # beyond what the clocks, the dates and the fp32 numbers that they end up in can hold
        ("engine.hang_timeout_s", 1e10, r"hang_timeout_s is 10000000000\.0: .*less than or equal to 1000000000"),
        ("schedule.steps", 10**18, "schedule.steps is 10{18}: .*less than or equal to 1000000000"),
        ("schedule.epochs", 1e300, r"schedule.epochs is 1e\+300: .*less than or equal to 1000000"),
        ("optimizer.eps", 1e-50, "optimizer.eps is 1e-50: .*greater than or equal to 0.0{19}1"),
        ("lora.alpha", 1e300, r"lora.alpha is 1e\+300: .*less than or equal to 1000000"),
        ("lora.rank", "many", "lora.rank is 'many'"),
        ("lora.rank", True, "lora.rank: it is True, as a flag alone is; write a value"),
        ("validation.lpips", True, "validation.lpips: it is True"),
        ("lora.alpha", 0, "lora.alpha"),
        ("optimizer.lr", -1, "optimizer.lr is -1"),
        ("optimizer.lr", float("nan"), "optimizer.lr is nan"),
        ("optimizer.beta2", 1, "optimizer.beta2"),
        ("data.frames", 4, "data.frames is 4: layout middle_in_clip needs an odd number"),
        ("data.frames", 1, "data.frames is 1"),
        ("data.height", 100, "data: height x width is 100x576: both must be multiples of 8"),
        ("engine.micro_batch", 3, "engine: global_batch 8 must be a multiple of micro_batch 3"),
        ("diffusion.layout", "midle", "diffusion.layout is 'midle': .*'spec_middle'"),
        ("diffusion.noise_augmentation", 1.5, "diffusion.noise_augmentation"),
        ("name", "../evil", "name is '../evil'"),
        ("name", "", "name is ''"),
        ("seed", -1, "seed is -1"),
        ("schedule.epochs", None, "neither epochs nor steps"),
        ("data", 3, "data is 3"),
    ],
)
def test_out_of_range_is_refused(recipe: Path, field: str, value: Any, said: str) -> None:
    """The error names the field, the value given and what is allowed."""
    with pytest.raises(UserError, match=said):
        load_config(recipe, {field: value})


@pytest.mark.parametrize("missing", ["name", "data", "data.shards"])
def test_missing_required_is_named(recipe: Path, missing: str) -> None:
    """A recipe without a name or shards says which is missing and how to give it."""
    tree = yaml.safe_load(recipe.read_text())
    *section, key = missing.split(".")
    del (tree[section[0]] if section else tree)[key]
    recipe.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=f"{missing} is missing; .*--{missing}") as caught:
        load_config(recipe)
    flag = re.findall(r"--([\w.]+)", str(caught.value))[0]
    assert load_config(recipe, {flag: "x"}).name in ("a", "x")


@pytest.mark.parametrize("text", ["lora: {rank: 4}\nlora: {alpha: 8}\n", "lora:\n  lora: 1\n  rank: 4\n  rank: 8\n"])
def test_a_key_that_is_given_twice_is_refused(tmp_path: Path, text: str) -> None:
    """Of two sections, or two values, YAML would keep the last alone; the same word elsewhere is no second one."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{text}name: a\ndata: {{shards: a}}\n")
    with pytest.raises(UserError, match="gives (lora|rank) twice, the second time in line [24]; put the two together"):
        load_config(path)
    with pytest.raises(UserError, match="--grid .*gives lora.rank twice"):
        parse_yaml("{lora.rank: [1], lora.rank: [2]}", "--grid")
    assert parse_yaml("{a: {b: 1}, b: {a: 1, b: 2}}", "--grid") == {"a": {"b": 1}, "b": {"a": 1, "b": 2}}


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "name: [", "just words"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    """An empty file, a list, broken YAML and prose are each a sentence, as is a missing file."""
    path = tmp_path / "bad.yaml"
    with pytest.raises(UserError, match="cannot read the recipe"):
        load_config(path)
    path.write_text(text)
    with pytest.raises(UserError, match="is not (a recipe|YAML)") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_overrides_win_by_dotted_name(recipe: Path) -> None:
    """An override replaces one field, makes sections that the file does not name, and leaves the rest."""
    config = load_config(recipe, {"lora.rank": 32, "optimizer.lr": 3e-4, "name": "b", "schedule.steps": 7})
    assert (config.lora.rank, config.optimizer.lr, config.name, config.schedule.steps) == (32, 3e-4, "b", 7)
    assert load_config(recipe, {"schedule.epochs": "null", "schedule.steps": 7}).schedule.epochs is None
    changed = diff_configs(load_config(recipe), config)
    assert changed == {
        "lora.rank": (8, 32), "optimizer.lr": (1e-4, 3e-4), "name": ("a", "b"), "schedule.steps": (None, 7)
    }  # fmt: skip


def test_a_section_with_nothing_under_it_is_that_of_no_word(recipe: Path) -> None:
    """As when all of its fields are commented out; whether one is then set on the command line or not."""
    plain = load_config(recipe, {"lora.rank": 64})
    recipe.write_text("name: a\ndata: {shards: shards/a}\nlora:\nseed:\n")
    assert load_config(recipe) == plain and load_config(recipe, {"lora.rank": 8}).lora.rank == 8


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("[to_q,to_out.0]", ["to_q", "to_out.0"]),
        (["to_q"], ["to_q"]),
        (r"[a-z_]*\.attn1\.to_[qk]", r"[a-z_]*\.attn1\.to_[qk]"),
        ("spatial", "spatial"),
    ],
)
def test_targets_are_a_name_an_expression_or_a_list(recipe: Path, given: Any, read: Any) -> None:
    """A list may come as text, as a command line gives it; an expression that starts with a bracket stays one."""
    assert load_config(recipe, {"lora.targets": given}).lora.targets == read


@pytest.mark.parametrize(
    ("given", "parts"),
    [("lean", LEAN), ("stock", ()), ("[]", ()), ("[projections,cross]", LEAN[:2]), (list(LEAN[:-1]), LEAN[:-1])],
)
def test_blocks_are_a_name_or_a_list_of_parts(recipe: Path, given: Any, parts: tuple[str, ...]) -> None:
    """In one order, however they are named."""
    assert load_config(recipe, {"model.blocks": given}).model.parts == parts


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"lora.dora": True, "lora.dropout": 0.1}, "dora and dropout do not go together"),
        ({"diffusion.control": True}, "diffusion.control is on, but model.controlnet names none"),
        ({"model.quantize": "int8", "engine.kind": "zero3"}, "model.quantize is int8, but engine.kind zero3"),
        (
            {"tuning": "full", "full.parameters": "conv_out.*", "engine.kind": "zero3"},
            "full.parameters is a part of the UNet, but engine.kind zero3 shards the rest of it too",
        ),
        ({"checkpoint.ema": True, "engine.kind": "zero3"}, "checkpoint.ema is on, but engine.kind zero3 shards"),
        ({"checkpoint.ema": True, "engine.kind": "fsdp2"}, "checkpoint.ema is on, but engine.kind fsdp2 shards"),
        ({"diffusion.conditioning_dropout": 0.4}, "conditioning_dropout is 0.4"),
        ({"lora.rank_pattern": {"mid_block.*": 0}}, "lora.rank_pattern.mid_block.* is 0"),
        ({"lora.extra_trainable": ["conv_out"]}, "lora.extra_trainable.0 is 'conv_out': .*'conv_in' or 'mask_token'"),
        ({"lora.rank": 0}, "lora.rank is 0"),
        ({"data.stride": 0}, "data.stride is 0: Input should be greater than or equal to 1 or a valid list$"),
        ({"model.blocks": "lena"}, "model.blocks is 'lena': Input should be 'lean' or 'stock' or a valid list$"),
        ({"model.blocks": "[fused]"}, "fused needs passes; name that too, or leave fused out"),
        ({"model.blocks": "[cross,passes]"}, "passes needs projections; name that too"),
    ],
)
def test_settings_that_contradict_are_refused(recipe: Path, overrides: dict[str, Any], said: str) -> None:
    """What cannot work together, or names nothing, is a sentence."""
    with pytest.raises(UserError, match=said):
        load_config(recipe, overrides)


def test_the_user_s_own_folder_is_found(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~ in a recipe means what it means in a shell, wherever a path can stand."""
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(recipe, {"model.base": "~/svd", "data.shards": "~/x", "lora.init_from": "a/~b"})
    assert (config.model.base, config.data.shards) == ("/home/someone/svd", "/home/someone/x")
    assert config.lora.init_from == "a/~b"
    assert "/home/someone/.cache" not in dump_config(
        config
    )  # a recipe goes to others, in a run's folder and a model card


def test_patterns_are_read_from_the_command_line(recipe: Path) -> None:
    """Fire leaves {attn1.to_q: 3} as text, since it is no Python; it is read as YAML."""
    config = load_config(recipe, {"lora.rank_pattern": "{attn1.to_q: 3}", "lora.alpha_pattern": "{to_v: 0.5}"})
    assert config.lora.rank_pattern == {"attn1.to_q": 3} and config.lora.alpha_pattern == {"to_v": 0.5}


def test_sources_are_one_or_a_mix(recipe: Path) -> None:
    """data.shards or data.mix, from a file or a command line; their order stands, and ~ is expanded."""
    home = str(Path.home())
    assert load_config(recipe).data.sources == {"shards/a": 1}
    for given in ({"b": 3, "~/a": 1}, "{b: 3, ~/a: 1}"):
        sources = load_config(recipe, {"data.shards": None, "data.mix": given}).data.sources
        assert list(sources.items()) == [("b", 3), (f"{home}/a", 1)]
    address = "https://host/train-{000..011}.tar"
    mixed = load_config(recipe, {"data.shards": None, "data.mix": f'{{"{address}": 2}}', "data.remote": "[https]"})
    assert mixed.data.sources == {address: 2} and mixed.data.remote == ["https"]


def test_one_kind_of_source_takes_the_place_of_the_other(recipe: Path, tmp_path: Path) -> None:
    """A mix on the command line, of a recipe's shards, and the other way round."""
    mixed = load_config(recipe, {"data.mix": {"b": 3, "c": 1}})
    assert mixed.data.sources == {"b": 3, "c": 1} and mixed.data.shards is None
    saved = tmp_path / "mixed.yaml"
    saved.write_text(yaml.safe_dump(mixed.model_dump(mode="json")))
    assert load_config(saved, {"data.shards": "a"}).data.sources == {"a": 1}
    assert load_config(saved, {"data.mix": {"d": 1}}).data.sources == {"d": 1}


def test_epochs_on_the_command_line_take_the_place_of_a_recipe_s_steps(recipe: Path, tmp_path: Path) -> None:
    """Which would win unseen, in a recipe and in the config.yaml of a run; given side by side, steps win."""
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_config(load_config(recipe, {"schedule.steps": 7})))
    asked = load_config(saved, {"schedule.epochs": 2}).schedule
    assert (asked.epochs, asked.steps) == (2, None)
    assert load_config(saved, {"schedule.epochs": "null"}).schedule.steps == 7
    assert load_config(saved, {"schedule.epochs": 2, "schedule.steps": 5}).schedule.steps == 5


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data.mix": {"b": 1}, "data.shards": "a"}, "data.shards and data.mix are both given"),
        ({"data.shards": None}, "data.shards is missing; .*--data.mix"),
        ({"data.shards": None, "data.mix": {}}, "data.mix"),
        ({"data.shards": None, "data.mix": {"b": 0}}, "data.mix.b is 0: .*greater than or equal to 1"),
        ({"data.shards": None, "data.mix": {"b": 1001}}, "data.mix.b is 1001"),
        ({"data.shards": None, "data.mix": {"b": 0.5}}, "data.mix.b is 0.5"),
        ({"data.shards": None, "data.mix": "b"}, "data.mix is 'b'"),
        ({"data.remote": ["http"]}, "data.remote.0 is 'http': .*'https', 's3' or 'hf'"),
        ({"data.cache_gb": -1}, "data.cache_gb is -1"),
    ],
)
def test_wrong_sources_are_refused(recipe: Path, overrides: dict[str, Any], said: str) -> None:
    """Exactly one of the two, whole weights from 1 to 1000, and schemes that are read."""
    with pytest.raises(UserError, match=said) as caught:
        load_config(recipe, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [{"rank": 4}, {"rank": 4, "alpha": 4}, {}, "{rank: 4", None, True])
def test_a_whole_section_is_no_override(recipe: Path, value: Any) -> None:
    """It would drop the section's other fields unseen; the answer names one as it is set. A field may hold a mapping."""
    with pytest.raises(UserError, match=r"lora is .*, in place of a whole section .*; set .*, such as lora\.rank"):
        load_config(recipe, {"lora": value})
    assert load_config(recipe, {"lora.rank_pattern": {"attn1": 4}}).lora.rank == 8


def test_none_on_the_command_line_takes_nobody_s_place(recipe: Path) -> None:
    """A mix that is none leaves the shards of the recipe, however none is spelt."""
    for none in ("null", "None", None):
        data = load_config(recipe, {"data.mix": none}).data
        assert (data.shards, data.mix) == ("shards/a", None)


def test_an_override_into_what_is_no_section_names_that(recipe: Path) -> None:
    """And not the field, which is known."""
    recipe.write_text(yaml.safe_dump({"name": "a", "data": {"shards": "shards/a"}, "lora": 8}))
    with pytest.raises(UserError, match="lora.rank is given, but lora is 8 in the recipe; let it hold fields"):
        load_config(recipe, {"lora.rank": 4})
    with pytest.raises(UserError, match="unknown key data.shards.a; did you mean data.shards"):
        load_config(recipe, {"data.shards.a": 4})


def test_override_reaches_an_empty_section(recipe: Path) -> None:
    """`lora:` with nothing under it in the file is an empty section, not an unknown key."""
    recipe.write_text("name: a\ndata: {shards: s}\nlora:\n")
    assert load_config(recipe, {"lora.rank": 4}).lora.rank == 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_resolves_and_its_dump_is_a_recipe(path: Path, tmp_path: Path) -> None:
    """The resolved tree, written and read again, is the same tree and the same text."""
    config = load_config(path, {"optimizer.eps": 1e-12, "lora.targets": r".*\.attn1\.to_q"})
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(config))
    again = load_config(saved)
    assert again == config and diff_configs(config, again) == {}
    leaves = {
        "data.mix" if name.startswith("data.mix.") else name for name in _leaves(yaml.safe_load(saved.read_text()))
    }
    assert set(field_names()) == leaves


def test_recipes_and_deepspeed_files_exist() -> None:
    """The two tests over them are not over nothing."""
    assert {"sign_576.yaml", "tiny_cpu.yaml"} <= {p.name for p in RECIPES}
    assert {p.stem for p in DEEPSPEED_FILES} == set(ZERO_STAGES)


def test_config_is_frozen(recipe: Path) -> None:
    """No part of a run can change its settings."""
    config = load_config(recipe)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.lora.rank = 3


def test_options_are_the_listed_ones() -> None:
    """The list of dotted names in this file is all there is."""
    assert sorted(field_names()) == FIELDS.split()


def test_defaults_are_valid(recipe: Path) -> None:
    """Every default passes the check of its own field, as if the user had given it."""
    config = load_config(recipe)
    assert RunConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("path", DEEPSPEED_FILES, ids=lambda p: p.name)
def test_shipped_deepspeed_files_are_accepted(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is the file of the engine that it is named after, found wherever the program was started."""
    monkeypatch.chdir(tmp_path)
    found = load_deepspeed_json(EngineConfig.model_validate({"kind": path.stem}))
    assert found == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_micro_batch_size_per_gpu", 4),
        ("train_batch_size", 8),
        ("gradient_accumulation_steps", 2),
        ("gradient_clipping", 1.0),
        ("bf16", {"enabled": True}),
        ("optimizer", {"type": "AdamW", "params": {"lr": 1e-4}}),
        ("scheduler", {"type": "WarmupLR"}),
    ],
)
def test_deepspeed_file_cannot_set_what_the_recipe_owns(tmp_path: Path, key: str, value: Any) -> None:
    """A JSON with batch, accumulation, clipping, precision or rate is refused, and the key is named."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: value}))
    with pytest.raises(UserError, match=f"sets {key}, but"):
        load_deepspeed_json(EngineConfig(deepspeed=str(path)))


def test_unreadable_deepspeed_file_is_a_sentence(tmp_path: Path) -> None:
    """Missing and broken files name engine.deepspeed or the file."""
    with pytest.raises(UserError, match="engine.deepspeed"):
        load_deepspeed_json(EngineConfig(deepspeed=str(tmp_path / "none.json")))
    for content, message in ((b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "holds no zero_optimization")):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match=f"bad.json {message}"):
            load_deepspeed_json(EngineConfig(deepspeed=str(tmp_path / "bad.json")))


@pytest.mark.parametrize(
    ("kind", "zero", "message"),
    [
        ("zero2", {"stage": 3}, "sets stage 3, but engine.kind zero2 is stage 2 without offload_optimizer"),
        ("zero3", {}, "sets stage None, but engine.kind zero3 is stage 3"),
        ("zero2", {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "sets stage 2 and offload, but .* zero2 is"),
        ("zero2_offload", {"stage": 2}, "zero2_offload is stage 2 with offload_optimizer"),
        (
            "zero2_offload",
            {"stage": 2, "offload_optimizer": {"device": "nvme"}},
            "is {'device': 'nvme'}, but .* to cpu only",
        ),
        ("zero2_offload", {"stage": 2, "offload_optimizer": "cpu"}, 'is cpu, but .*; set {"device": "cpu"}'),
        (
            "zero3",
            {"stage": 3, "offload_param": {"device": "nvme"}},
            "sets offload_param, but .*allowed in zero_optimization",
        ),
    ],
)
def test_deepspeed_file_must_be_of_the_engine(tmp_path: Path, kind: str, zero: dict[str, Any], message: str) -> None:
    """Another stage, offload where there is none or none where there is, and offload to a disk are refused in a sentence."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UserError, match=message):
        load_deepspeed_json(EngineConfig.model_validate({"kind": kind, "deepspeed": str(path)}))


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        leaf
        for name, value in tree.items()
        for leaf in (
            _leaves(value, f"{prefix}{name}.")
            if isinstance(value, dict) and not name.endswith("_pattern")
            else [prefix + name]
        )
    ]
