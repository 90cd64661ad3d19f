"""Work that the GPU does beside its main work, in a stream of its own: what a step needs, while the one before still runs.

Test: pytest tests/run/test_beside.py. A copy from the host makes the host wait for all that was queued in its stream; here
that is little. So the draws, copies and encoders of the next clip cost nothing where the network is the slower part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Beside:
    """Calls functions beside the main stream of a device; on a CPU it just calls them."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # weights may still be on their way

    def __call__(self, make: Callable[[], Made]) -> Made:
        """What make returns, a dataclass of tensors; it may read only what the main stream never changes."""
        if self.stream is None:
            return make()
        with torch.cuda.stream(self.stream):
            made = make()
        main = torch.cuda.current_stream(self.stream.device)
        main.wait_stream(self.stream)
        for tensor in find_tensors(made):
            tensor.record_stream(main)  # else its memory could be given away in this stream while the main one reads it
        return made


def find_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a dataclass, and in those inside of it."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from find_tensors(getattr(value, field.name))
