"""The documents tell the truth: the README's tree, and the commands of all. Run: pytest tests/test_readme.py"""

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml

from toolkit.config import field_names, load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?:^    .*\n)+", README, re.MULTILINE)
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "toolkit/bases").rglob("*.md")]
# indented lines, gone on with where they end in a backslash; in a loop, what is between do and done
LINES = [
    line for path in DOCUMENTS for line in re.findall(r"^ {4,}(.*)$", re.sub(r"\\\n\s*", "", path.read_text()), re.M)
]
COMMANDS = [
    line.split("#")[0].partition("; do ")[2].removesuffix("; done") or line.split("#")[0].strip() for line in LINES
]
COMMANDS = [*dict.fromkeys(c for c in COMMANDS if c.startswith(("python ", "deepspeed ")) and ".py" in c)]


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
    assert listed == present - {"cli.py", "errors.py", "page.py", "parallel.py"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_program_and_flags_it_takes(command):
    """Each command's file exists, its flags are parameters of the entry function or fields of a recipe."""
    words = shlex.split(command)
    programs = [word for word in words if word.endswith(".py")]  # one, or what submits it and itself
    given = words[words.index(programs[0]) + 1 :]  # what stands before is the launcher's own
    known = set(field_names())
    for program in programs:
        spec = importlib.util.spec_from_file_location("entry", ROOT / program)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, Path(program).stem, None)
        if function is None:  # a script of subcommands
            assert program == "docs/tiny_base.py" and hasattr(module, given[0])
            continue
        known |= set(inspect.signature(function).parameters)
        if program == "launch/bench.py":
            bench = importlib.import_module(f"toolkit.bench.{given[0]}")
            known |= set(inspect.signature(getattr(bench, f"bench_{given[0]}")).parameters)
    assert {word[2:] for word in given if word.startswith("--")} <= known
    for word in words:
        if word.startswith(("launch/", "ds_configs/")):
            assert (ROOT / word).exists(), word


def test_the_settings_of_the_findings_are_fields():
    """Each setting that docs/FINDINGS.md compares makes a recipe of tiny_cpu.yaml, each another."""
    (axis,) = yaml.safe_load((ROOT / "docs/findings.yaml").read_text()).values()
    recipes = [load_config(ROOT / "launch/recipes/tiny_cpu.yaml", settings) for settings in axis.values()]
    assert len({recipe.model_dump_json() for recipe in recipes}) == len(axis) > 10


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
