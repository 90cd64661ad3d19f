"""The README tells the truth: its tree, its commands, its figures. Run: pytest tests/test_readme.py"""

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest

from toolkit.config import field_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?:^    .*\n)+", README, re.MULTILINE)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if ".py " in line + " "]
COMMANDS = [c for c in COMMANDS if c.startswith(("python ", "deepspeed "))]


def test_every_file_of_the_tree_exists_and_none_is_missing():
    """What the README lists under launch/, shards/, ds_configs/ and toolkit/ is what is there."""
    tree = next(block for block in BLOCKS if "ds_configs/" in block)
    for folder in ("shards", "launch", "ds_configs"):
        line = next(line for line in tree.splitlines() if line.strip().startswith(f"{folder}/"))
        listed = set(re.findall(r"[\w.]+\.(?:py|md|json)", line))
        present = {p.name for p in (ROOT / folder).iterdir() if p.suffix in (".py", ".md", ".json")}
        assert listed == present, folder
    inside = tree[tree.index("toolkit/") : tree.index("tests/")]
    listed = set(re.findall(r"^      ([\w.]+)", inside, re.MULTILINE))
    present = {p.name for p in (ROOT / "toolkit").iterdir() if p.name not in ("__init__.py", "__pycache__")}
    assert listed == present - {"cli.py", "errors.py"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_program_and_flags_it_takes(command):
    """Each command's file exists, its flags are parameters of the entry function or fields of a recipe."""
    words = shlex.split(command)
    program = next(word for word in words if word.endswith(".py"))
    spec = importlib.util.spec_from_file_location("entry", ROOT / program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, Path(program).stem)
    known = set(inspect.signature(function).parameters) | set(field_names())
    assert {word[2:] for word in words if word.startswith("--")} <= known
    for word in words:
        if word.startswith(("launch/", "ds_configs/")):
            assert (ROOT / word).exists(), word


def test_the_commands_of_a_real_run_are_all_there():
    """Pack, train, watch, evaluate, interpolate: the five commands of a real run, and the doctor."""
    for program in ("shards/pack.py", "launch/train.py", "tensorboard", "launch/evaluate.py", "launch/interpolate.py"):
        assert program in README


def test_make_targets_of_the_readme_exist():
    """Every `make X` in the README is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)", README)) - {"s"} <= targets


def test_pictures_of_the_readme_exist():
    """Every picture that the README shows is in the repository."""
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path
