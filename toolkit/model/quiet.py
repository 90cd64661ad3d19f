"""Keeps diffusers and transformers from burying the run's own lines, on every rank, under their bars and hints.

Test: pytest tests/model/test_base.py
"""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Errors alone are shown inside; afterwards the libraries are as their user had them."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries, hub_is_silent = (diffusers_logging, transformers_logging), are_progress_bars_disabled()
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
        if hub_is_silent:  # transformers' switch is the hub's too
            disable_progress_bars()
