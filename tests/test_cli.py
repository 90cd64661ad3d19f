"""Flags are checked before any work. Run: pytest tests/test_cli.py"""

import contextlib
import errno
import gc
import inspect
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, ValidationError, validate_call

from shards.cache import cache
from shards.pack import pack
from shards.synth import synth
from tests.launching import HEAVY, ROOT, run
from toolkit.authoring.plan import PackSettings
from toolkit.authoring.synth import synth as make_videos
from toolkit.cli import importing, in_help, main
from toolkit.config import load_config
from toolkit.run.cache import cache_shards

CALLS: list[tuple] = []


def work(
    folder: str, steps: PositiveInt = 5, fresh: bool = False, out: str | None = None,
    gaps: PositiveInt | tuple[PositiveInt, ...] = (),
) -> str:  # fmt: skip
    """Stands for a long job."""
    CALLS.append((folder, steps, fresh))
    return f"worked in {folder}"


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    CALLS.clear()
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    main(work)


def test_values_arrive_in_their_types(monkeypatch):
    """A folder named 7 stays text, a number is a number, and --fresh false is not fresh."""
    start(monkeypatch, "7", "--steps", "3", "--fresh", "false")
    assert CALLS == [("7", 3, False)]


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (("x", "--fresh"), ("x", 5, True)),
        (("--fresh", "--folder", "x"), ("x", 5, True)),
        (("x", "--nofresh", "--steps", "3"), ("x", 3, False)),
        (("--folder", "-1", "--fresh"), ("-1", 5, True)),
        (("--folder=True", "--fresh"), ("True", 5, True)),
    ],
)
def test_a_switch_needs_no_value(monkeypatch, arguments, call):
    """And a value may begin with a sign, or be called what Fire makes of a flag without one."""
    start(monkeypatch, *arguments)
    assert [call] == CALLS


def test_a_flag_of_several_values_is_given_once(monkeypatch, capsys):
    """Twice, Fire would take the last alone; any other flag may be given again, to replace what a script put before."""
    start(monkeypatch, "x", "--steps", "3", "--steps", "4")
    assert CALLS == [("x", 4, False)]
    with pytest.raises(SystemExit, match="2"):
        start(monkeypatch, "x", "--gaps", "4", "--gaps=8")
    assert "--gaps is given 2 times; give it once, with commas between: --gaps a,b" in capsys.readouterr().err
    assert not CALLS


@pytest.mark.parametrize(
    "arguments", [("x", "--gaps", "4", "8"), ("--folder=x", "8"), ("x", "8", "--fresh"), ("--gaps=4", "x", "8")]
)
def test_a_value_without_a_flag_is_no_other_flag_s(monkeypatch, capsys, arguments):
    """Spaces in place of commas: of --gaps 4 8 the second would be the number of steps."""
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, *arguments)
    assert ended.value.code == 2 and not CALLS
    assert (
        "'8' is a word too many; put what has spaces in quotes, and commas between several" in capsys.readouterr().err
    )


def test_what_fails_inside_is_no_flag(monkeypatch):
    """A value of another one's making that pydantic refuses, in the middle of the work, is not said of a flag."""

    class Clip(BaseModel):
        fps: PositiveInt

    def cut(folder: str, fps: PositiveInt = 5) -> None:
        Clip(fps=0)

    monkeypatch.setattr(sys, "argv", ["job.py", "x"])
    with pytest.raises(ValidationError):
        main(cut)


def test_flags_of_a_part_are_flags(monkeypatch, capsys):
    """As bench.py has it, whose parts are named after it and take flags of their own."""

    @validate_call
    def cut_in_two(rounds: PositiveInt) -> None:
        """Never reached."""

    def cut(folder: str) -> None:
        cut_in_two(rounds=0)

    monkeypatch.setattr(sys, "argv", ["job.py", "x"])
    with pytest.raises(SystemExit, match="2"):
        main(cut)
    assert "--rounds is 0; it should be greater than 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["2024_05", "1.10", "007", "1e3", "None", "[a]", "a,b", "v3"])
def test_a_name_stays_as_it_was_written(monkeypatch, name):
    """Though Fire would read a number, a list or nothing in it; given by place or by flag."""
    start(monkeypatch, name, "--steps", "3")
    start_calls = list(CALLS)
    start(monkeypatch, f"--folder={name}", "--steps", "3")
    assert start_calls == CALLS == [(name, 3, False)]


@pytest.mark.parametrize("text", ["2024_05", "1.10", "007", "1e3", "[a]", "a,b"])
def test_a_text_of_a_recipe_stays_as_it_was_written(monkeypatch, text):
    """Run 1.10 is not run 1.1; numbers and lists are read as such, and both words for nothing are nothing."""
    given: dict[str, Any] = {}

    def train(config: str, fresh: bool = False, **overrides: Any) -> None:
        given.update(overrides)

    flags = [
        "--name",
        text,
        "--data.shards",
        text,
        "--model.revision=" + text,
        "--lora.rank",
        "8",
        "--data.stride",
        "[2,4]",
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "c", *flags])
    main(train)
    rest = {"lora.rank": 8, "data.stride": [2, 4]}
    assert given == {"name": text, "data.shards": text, "model.revision": text} | rest
    texts = ["model.unet", "model.revision"]
    monkeypatch.setattr(sys, "argv", ["train.py", "c", *(f"--{name}=None" for name in texts)])
    main(train)
    model = load_config(ROOT / "launch/recipes/tiny_cpu.yaml", {name: given[name] for name in texts}).model
    assert model.unet is None and model.revision is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("c", "--fersh"), "unknown flag --fersh; did you mean --fresh?"),
        (("c", "--lora.rnak", "8"), "did you mean lora.rank?"),
        (("c", "--rank", "8"), "did you mean lora.rank?"),
        (("c", "--lora.ranks", "8"), "did you mean lora.rank?"),
        (("c", "--optimizer", "{lr: 1}"), "set its fields one by one, such as optimizer.lr"),
        (("c", "--data.shards", "--fresh"), "--data.shards is given without a value"),
    ],
)
def test_a_wrong_flag_beside_a_recipe_s_fields_is_one_line(monkeypatch, capsys, arguments, words):
    """A command's own flags are suggested as well as a recipe's fields."""

    def train(config: str, ranks: int = 1, fresh: bool = False, **overrides: Any) -> None:
        load_config(ROOT / "launch/recipes/tiny_cpu.yaml", overrides)

    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        main(train)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.count("\n") == 1


def test_what_is_returned_is_printed(monkeypatch, capsys):
    """A summary reaches the terminal."""
    start(monkeypatch, "x")
    assert capsys.readouterr().out == "worked in x\n"


def test_help_shows_the_flags_and_does_no_work(monkeypatch, capsys):
    """--help ends with 0; it offers the job's own flags, and nothing of pydantic's."""
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, "--help")
    shown = "".join(capsys.readouterr())
    assert ended.value.code == 0 and CALLS == []
    assert "Stands for a long job." in shown and "--steps=STEPS" in shown and "raw_function" not in shown
    assert "GROUP" not in shown and "FIRE" not in shown and "Optional[]" not in shown and "Type: int" in shown


@pytest.mark.parametrize("arguments", [("x", "--help"), ("--steps", "3", "-h"), ("--help", "--steps", "many")])
def test_help_is_shown_whatever_stands_beside_it(monkeypatch, capsys, arguments):
    """Fire would do the work first, which may take hours."""
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, *arguments)
    assert ended.value.code == 0 and CALLS == [] and "Stands for a long job." in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (str, "text"), (str | None, "text"), (bool, "bool"), (PositiveInt | None, "int"),
        (Annotated[float, Field(ge=0)], "float"), (Literal["euler", "lcm"] | None, "euler|lcm"),
        (FiniteFloat | tuple[FiniteFloat, ...], "float or float,..."),
    ],
)  # fmt: skip
def test_help_names_types_plainly(annotation, words):
    """As people who know no Python read them."""
    assert in_help(annotation) == words


@pytest.mark.launch
def test_help_waits_for_no_library() -> None:
    """What a script says of itself comes before anything is loaded that takes seconds; so for every script there is."""
    scripts = [*ROOT.glob("launch/*.py"), *ROOT.glob("launch/slurm/*.py"), *ROOT.glob("shards/*.py")]
    ask = f"""if True:
        import runpy, sys
        for script in {[str(script) for script in scripts]}:
            sys.argv = [script, "--help"]
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as ended:
                print(ended.code, [name for name in {HEAVY} if name in sys.modules])"""
    assert len(scripts) >= 12 and run([sys.executable, "-c", ask]).stdout == "0 []\n" * len(scripts)


def test_what_is_imported_is_not_searched_for_garbage() -> None:
    """Neither while it loads nor later; and the search goes on afterwards, whatever went wrong."""
    before = gc.get_freeze_count()
    with contextlib.suppress(ImportError), importing():
        assert not gc.isenabled()
        made: list[list] = [[] for _ in range(1000)]
        raise ImportError
    assert gc.isenabled() and len(made) == 1000 and gc.get_freeze_count() >= before + 1000
    gc.unfreeze()


def test_a_rank_is_named_where_there_are_several(monkeypatch, capsys):
    """One process is just the command."""
    for world, name in (("1", "job.py: "), ("2", "job.py (rank 1): ")):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(SystemExit):
            start(monkeypatch, "x", "--steps", "-3")
        assert capsys.readouterr().err.startswith(name)
    monkeypatch.delenv("RANK")
    with pytest.raises(SystemExit):
        start(monkeypatch, "x", "--steps", "-3")
    assert capsys.readouterr().err.startswith("job.py: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("x", "--stepz", "3"), "did you mean --steps"),
        (("x", "--steps", "-3"), "--steps is -3; it should be greater than 0"),
        (("x", "--steps", "abc"), "--steps is 'abc'"),
        (("x", "--gaps", "0"), ": --gaps is 0; it should be greater than 0\n"),
        (("x", "--fresh", "maybe"), "--fresh is 'maybe'"),
        (("x", "--out"), "--out is given without a value; write --out VALUE"),
        (("--folder", "--fresh"), "--folder is given without a value; write --folder VALUE"),
        (("x", "--steps", "--out", "o"), "--steps is given without a value; write --steps VALUE"),
        (("--steps", "3"), "--folder must be given; --help says what is taken"),
        (("x", "--noout"), "unknown flag --noout; did you mean --out?"),
        (
            ("my", "--steps=3", "--fresh=1", "--out", "y", "--gaps=4", "videos"),
            "'videos' is a word too many; put what has",
        ),
    ],
)
def test_a_wrong_flag_is_one_line_and_no_work(monkeypatch, capsys, arguments, words):
    """An unknown flag, a wrong type or a value out of range ends with exit code 2 before the job begins."""
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and CALLS == []
    assert words in error and error.count("\n") == 1


def test_memory_that_is_used_up_is_one_line() -> None:
    """Of the host, which has no four terabytes; a GPU's lack is an error of torch's own kind."""
    code = "import torch; from toolkit.cli import main; main(lambda: torch.empty(1 << 40))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (
        "memory is used up; to train in less take model.memory small" in done.stderr
        and "you tried to allocate" in done.stderr
    )


def test_a_gpu_without_room_is_one_line(monkeypatch, capsys):
    """As above, raised by hand, for want of a GPU."""

    def fill() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has no more.")

    monkeypatch.setattr(sys, "argv", ["job.py"])
    with pytest.raises(SystemExit) as ended:
        main(fill)
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and "memory is used up" in said
        and "allocate 2.00 GiB. GPU 0 has" in said
        and said.count("\n") == 1
    )


def test_a_reader_that_leaves_is_no_error() -> None:
    """As `| head` does: the command ends as one that a closed pipe ends, without a traceback."""
    code = "from toolkit.cli import main; main(lambda: [print('line ' * 20, flush=True) for _ in range(100_000)])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_is_one_line(monkeypatch, capsys, error):
    """Python says it without a file's name, safetensors in words of its own; other errors stay what they are."""

    def fill(folder: str) -> None:
        raise error if folder == "full" else ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["job.py", "full"])
    with pytest.raises(SystemExit) as ended:
        main(fill)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("job.py: the disk is full; ") and said.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["job.py", "other"])
    with pytest.raises(ZeroDivisionError):
        main(fill)


def test_defaults_stand_on_both_sides_alike() -> None:
    """Fire reads them off an entry point, Python off what it calls; settings checked by pydantic have theirs."""

    def defaults(function: Callable[..., Any]) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.values()
        return {it.name: it.default for it in parameters if it.default is not it.empty}

    packing = defaults(pack)
    assert {name: packing[name] for name in PackSettings.model_fields} == PackSettings().model_dump()
    for entry, behind in ((cache, cache_shards), (synth, make_videos)):
        own, called = defaults(entry), defaults(behind)
        assert called and {name: own[name] for name in called} == called
