"""How every command line starts: Fire parses it, and an error the user can mend is one line, not a traceback."""

import contextlib
import difflib
import errno
import functools
import gc
import inspect
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import fire
from pydantic import ConfigDict, ValidationError, validate_call

from toolkit.config import field_names, text_fields
from toolkit.errors import UserError, in_one_line, in_words, printable

fire.decorators.FIRE_METADATA = (
    "__fire__"  # what it hangs on a command by this name, its help would offer as a group of commands
)
_FLAG = re.compile("--|-[a-zA-Z]")  # how one begins, as Fire tells it
_FULL_DISK = "the disk is full; what was published so far is whole, so free some space and start the same command again"
_FULL_MEMORY = (
    "memory is used up; to train in less take model.memory small, then model.quantize int8, fewer data.frames or a smaller "
    "data.height and data.width (doctor.py counts what each takes), to interpolate --chunk_frames 2 and --batch 1"
)


def main(function: Callable[..., Any]) -> None:
    """Run a function on the command line's arguments; a user's mistake ends it with one line on stderr and exit code 2.

    function  its annotations are enforced: a flag of the wrong type or out of range is refused before it is called
    """
    checked = validate_call(config=ConfigDict(coerce_numbers_to_str=True))(function)

    @functools.wraps(function)  # what pydantic hangs on its own wrapper, Fire would offer as commands
    def command(*args: Any, **kwargs: Any) -> Any:
        return checked(*args, **kwargs)

    # Fire's help takes a type by its name alone, which it would garble
    shown = [
        p.replace(annotation=type(in_help(p.annotation), (), {}))
        for p in inspect.signature(function).parameters.values()
    ]
    command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    texts = [p.name for p in inspect.signature(function).parameters.values() if p.annotation in (str, str | None)]
    texts += _overrides(function, text_fields)
    fire.decorators.SetParseFns(**dict.fromkeys(texts, str))(command)  # Fire reads 2024_01 as a number
    try:
        # Fire misses a required argument first, and shows what is behind other words only after the work is done
        helps = not {"--help", "-h"}.isdisjoint(sys.argv[1:])
        if not helps:
            refuse_wrong_flags(function, sys.argv[1:])
        fire.Fire(command, ["--", "--help"] if helps else None)
    except ValidationError as error:
        if not error.title.startswith(
            function.__qualname__
        ):  # of no flags, which bench.py has of functions named after it
            raise
        names = list(inspect.signature(function).parameters)  # Fire passes arguments by position
        faults: dict[str, str] = {}
        for e in error.errors():
            name = names[e["loc"][0]] if isinstance(e["loc"][0], int) else e["loc"][0]
            # of a flag that takes one or several, what is wrong with it as one; as several it would be the second complaint
            faults.setdefault(str(name), f"--{name} is {e['input']!r}; {in_words(e['msg'])}")
        _end("; ".join(faults.values()))
    except UserError as error:
        _end(str(error))
    except BrokenPipeError:
        if not _is_read_no_more(sys.stdout.fileno()):  # by a process of ours
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes at its end
        _leave(128 + signal.SIGPIPE)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        _end(f"{error.filename or _FULL_DISK}: {error.strerror}")
    except Exception as error:
        if f"(os error {errno.ENOSPC})" in str(error):  # how safetensors says it
            _end(f"{_FULL_DISK}: {in_one_line(error)}")
        # how PyTorch says it, of a GPU and of the host
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error):
            _end(f"{_FULL_MEMORY}: {in_one_line(error)}")
        raise
    except KeyboardInterrupt:
        print(f"{sys.argv[0]}: stopped; what was published so far is whole", file=sys.stderr)
        _leave(130)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """No search for garbage inside, nor later in what is there then: libraries make a million objects, and all of them stay.

    Else a sixth of the time that PyTorch, diffusers and PEFT take to load goes into looking at them again and again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def in_help(annotation: Any) -> str:
    """Name a type: PositiveInt | None => "int", Literal["a", "b"] => "a|b", tuple[float, ...] => "float,..."."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return in_help(parts[0])
    if kind is Literal:
        return "|".join(map(str, parts))
    if kind in (Union, UnionType):
        return " or ".join(in_help(part) for part in parts if part is not NoneType)
    if kind is tuple:
        return f"{in_help(parts[0])},..."
    return "text" if annotation is str else getattr(annotation, "__name__", str(annotation))


def _is_read_no_more(pipe: int) -> bool:
    """Whether whoever read a pipe has gone, as `| head` does."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _end(message: str) -> NoReturn:
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    text = "\n".join(map(printable, message.splitlines()))
    print(f"{sys.argv[0]}{f' (rank {rank})' if rank else ''}: {text}", file=sys.stderr)
    _leave(2)


def _leave(code: int) -> NoReturn:
    """Exit; where ranks are joined, at once: a thread of gloo that frees a tensor while Python ends would abort with 134."""
    distributed = sys.modules.get("torch.distributed")  # not imported for this: it takes seconds
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def refuse_wrong_flags(function: Callable[..., Any], arguments: list[str]) -> None:
    """Refuse what the function does not take, or not so: Fire itself would say so only after the work is done, or never."""
    _refuse_unknown(function, arguments)
    _refuse_bare(function, arguments)
    _refuse_repeated(function, arguments)
    _refuse_miscounted(function, arguments)


def _refuse_unknown(function: Callable[..., Any], arguments: list[str]) -> None:
    """Refuse a flag that the function does not take."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    flags, fields = [p.name for p in parameters], _overrides(function, field_names)
    parts = {part for name in fields for part in name.split(".")}
    taken = {*flags, *fields, *(f"no{p.name}" for p in parameters if p.annotation is bool)}
    for argument in arguments:
        name = re.match(r"--([\w.-]+)", argument)
        flag = name[1].replace("-", "_") if name else ""
        if name and flag not in taken:
            near = difflib.get_close_matches(flag, flags, 1)
            if fields and (not near or "." in flag or flag in parts):
                continue  # load_config says which field may be meant
            known = f"did you mean --{near[0]}?" if near else f"flags are {', '.join('--' + flag for flag in flags)}"
            raise UserError(f"unknown flag --{flag}; {known}")


def _refuse_bare(function: Callable[..., Any], arguments: list[str]) -> None:
    """Refuse a flag without the value that its parameter needs: Fire makes it True, which passes for a text and a number."""
    valued = [p.name for p in inspect.signature(function).parameters.values() if p.annotation is not bool]
    valued += _overrides(function, text_fields)
    for argument, after in pairwise([*arguments, "--"]):
        flag = argument.removeprefix("--").replace("-", "_")
        if argument.startswith("--") and flag in valued and _FLAG.match(after):
            raise UserError(f"--{flag} is given without a value; write --{flag} VALUE")


def _refuse_repeated(function: Callable[..., Any], arguments: list[str]) -> None:
    """Refuse a flag of several values that is given twice: of each flag Fire keeps the last alone."""
    flags = [name[1].replace("-", "_") for argument in arguments if (name := re.match(r"--([\w-]+)", argument))]
    for flag, parameter in inspect.signature(function).parameters.items():
        kinds = (parameter.annotation, *get_args(parameter.annotation))
        times = flags.count(flag)
        if times > 1 and any(get_origin(kind) is tuple for kind in kinds):
            raise UserError(f"--{flag} is given {times} times; give it once, with commas between: --{flag} a,b")


def _refuse_miscounted(function: Callable[..., Any], arguments: list[str]) -> None:
    """Refuse words without a flag beyond those that must be given, which Fire gives to other flags, and too few of them."""
    given = {argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")}
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    wanted = [p.name for p in parameters if p.default is p.empty and p.name not in given]
    words = [
        word
        for before, word in pairwise(["", *arguments])
        if not _FLAG.match(word) and ("=" in before or not _FLAG.match(before))
    ]
    if len(words) > len(wanted):
        word = words[len(wanted)]
        raise UserError(
            f"{word!r} is a word too many; put what has spaces in quotes, and commas between several values"
        )
    missing = [f"--{name}" for name in wanted[len(words) :]]
    if missing and not any(re.match("-[a-zA-Z]", argument) for argument in arguments):  # short for any of them
        raise UserError(f"{' and '.join(missing)} must be given; --help says what is taken")


def _overrides(function: Callable[..., Any], fields: Callable[[], list[str]]) -> list[str]:
    """Fields of a recipe that a function takes beside its own flags, which are any where it takes any name."""
    parameters = inspect.signature(function).parameters.values()
    return fields() if any(p.kind is p.VAR_KEYWORD for p in parameters) else []


def split(value: object) -> list[Any]:
    """A flag's value as a list: "a,b" => [a, b], (1, 2) => [1, 2], 1 => [1], None => []."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, tuple) else [] if value is None else [value]
