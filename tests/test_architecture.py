"""The house rules that a reader relies on, checked on the source. Run: pytest tests/test_architecture.py"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "toolkit").rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "launch").rglob("*.py"), *(ROOT / "shards").glob("*.py")])
SEPARATE = ("data", "model", "diffusion", "engine")  # packages that do not import one another
SHARED = ("rng", "errors", "config")  # modules that all of them may import
ABOVE = ("authoring", "commands", "bench")  # packages that nothing uses but they themselves and what a user starts


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(path: Path) -> set[str]:
    """Full names of everything a file imports, at the top or inside a function."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def parts_of_toolkit(path: Path) -> set[str]:
    """The first names after `toolkit.` of a file's imports: packages or modules."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("toolkit.")}


def test_the_rules_see_files() -> None:
    """A rule over no file would always hold."""
    assert all(any(f"toolkit/{package}/" in name_of(path) for path in MODULES) for package in SEPARATE)
    assert SCRIPTS and "torch.Tensor" in imports_of(ROOT / "toolkit/diffusion/schedule.py")
    assert "diffusion" in parts_of_toolkit(ROOT / "toolkit/run/framer.py")


@pytest.mark.parametrize("package", SEPARATE)
def test_packages_do_not_import_one_another(package: str) -> None:
    """data, model, diffusion and engine import themselves, rng, errors and config; run puts them together."""
    allowed = {package, *SHARED}
    foreign = {name_of(p): parts_of_toolkit(p) - allowed for p in (ROOT / "toolkit" / package).rglob("*.py")}
    assert not {name: parts for name, parts in foreign.items() if parts}


@pytest.mark.parametrize("package", ABOVE)
def test_nothing_in_the_toolkit_stands_on_what_is_above_a_training_run(package: str) -> None:
    """What a training run needs is in run and below; the pipeline reads what a command wrote, not by that command's code."""
    users = {name_of(p) for p in MODULES if package in parts_of_toolkit(p)}
    measuring = () if package == "commands" else ("toolkit/bench/",)  # a benchmark makes itself the clips it reads
    assert users and all(name.startswith((f"toolkit/{package}/", *measuring)) for name in users)


def test_to_author_data_takes_no_network() -> None:
    """Videos become shards without a model: what packs, checks and repairs knows of data alone."""
    allowed = {"authoring", "data", "page", "parallel", *SHARED}
    foreign = {name_of(p): parts_of_toolkit(p) - allowed for p in (ROOT / "toolkit/authoring").rglob("*.py")}
    assert foreign and not {name: parts for name, parts in foreign.items() if parts}


@pytest.mark.parametrize("module", [*SHARED, "metrics"])
def test_shared_modules_stand_below_the_packages(module: str) -> None:
    """What all may import imports errors at most, so no circle can form."""
    assert parts_of_toolkit(ROOT / f"toolkit/{module}.py") <= {"errors"}


def test_diffusion_imports_torch_only() -> None:
    """The maths are pure functions of tensors: no other library, no configuration, no randomness of their own."""
    for path in (ROOT / "toolkit/diffusion").glob("*.py"):
        outside = {name for name in imports_of(path) if name.split(".")[0] not in sys.stdlib_module_names}
        assert all(name.split(".")[0] == "torch" or name.startswith("toolkit.diffusion.") for name in outside), path
        assert not {n for n in outside if n.startswith(("torch.random", "torch.Generator"))}, path


def test_nothing_imports_upwards() -> None:
    """toolkit never imports launch, shards or tests; those two import the standard library, toolkit and Fire."""
    for path in MODULES:
        assert not {n for n in imports_of(path) if n.split(".")[0] in ("launch", "shards", "tests")}, name_of(path)
    for path in SCRIPTS:
        outside = {n.split(".")[0] for n in imports_of(path)} - set(sys.stdlib_module_names)
        assert outside <= {"toolkit", "pydantic"}, name_of(path)


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=name_of)
def test_first_line_says_what_it_is_for(path: Path) -> None:
    """A file that holds anything starts with its docstring, and the first line says something."""
    source = path.read_text()
    if not source.strip():
        assert path.name == "__init__.py"
        return
    assert source.startswith('"""')
    first = ast.get_docstring(ast.parse(source), clean=False).splitlines()[0]
    assert len(first.split()) >= 4, first


def test_randomness_has_one_maker() -> None:
    """Only rng.py makes generators or seeds one; whoever else needs a global generator forks it first."""
    makers = ("manual_seed", "default_rng", "RandomState", "Philox", "PCG64")
    for path in MODULES:
        tree = ast.parse(path.read_text())
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & set(makers)
        if path.name != "rng.py" and used:
            assert used == {"manual_seed"} and "fork_rng" in path.read_text(), name_of(path)
