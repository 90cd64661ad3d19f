"""How every command line starts: Fire parses it, and an error the user can mend is one line, not a traceback."""

import sys
from collections.abc import Callable
from typing import Any

import fire

from toolkit.errors import UserError


def main(function: Callable[..., Any]) -> None:
    """Run a function on the command line's arguments; a UserError ends it with one line on stderr and exit code 2."""
    try:
        fire.Fire(function)
    except UserError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(2)
