"""How every command line starts: Fire parses it, and an error the user can mend is one line, not a traceback."""

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import fire

from toolkit.errors import UserError


def main(function: Callable[..., Any]) -> None:
    """Run a function on the command line's arguments; a UserError ends it with one line on stderr and exit code 2."""
    try:
        refuse_unknown_flags(function, sys.argv[1:])
        fire.Fire(function)
    except UserError as error:
        rank = os.environ.get("RANK")
        print(f"{sys.argv[0]}{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{sys.argv[0]}: stopped; what was published so far is whole", file=sys.stderr)
        sys.exit(130)


def refuse_unknown_flags(function: Callable[..., Any], arguments: list[str]) -> None:
    """Refuse a flag that the function does not take; Fire itself would say so only after the work is done."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return  # the function takes any flag and names the unknown ones by itself
    for argument in arguments:
        name = re.match(r"--([\w.-]+)", argument)
        flag = name[1].replace("-", "_") if name else ""
        if name and flag not in parameters and flag.removeprefix("no") not in parameters and flag != "help":
            near = difflib.get_close_matches(flag, parameters, 1)
            known = f"did you mean --{near[0]}?" if near else f"flags are {', '.join('--' + p for p in parameters)}"
            raise UserError(f"unknown flag --{flag}; {known}")
