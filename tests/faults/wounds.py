"""Harm that a forked rank does to itself, each by wrapping one function of the toolkit before it trains. No tests in here.

A place is a function's name within the toolkit, such as "run.trainer:save" or "engine.zero:ZeroEngine.backward". Calls are
counted from 1 in each process.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOSS = "run.framer:Framer.compute_loss"  # called once a micro-batch


def wrap(place: str, around: Callable[..., Any]) -> None:
    """Put around(call, function, *arguments) in the place of a function."""
    module, _, name = place.partition(":")
    *owners, last = name.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(f"toolkit.{module}"))
    function, calls = getattr(owner, last), 0

    @functools.wraps(function)
    def wounded(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return around(calls, function, *args, **kwargs)

    setattr(owner, last, wounded)


def send(rank: int, victims: list[int], place: str, call: int, numbers: list[int]) -> None:
    """At one call of a function, send signals to oneself."""

    def strike(count: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if count == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    if rank in victims:
        wrap(place, strike)


def drop(rank: int, place: str) -> None:
    """Have a function do nothing."""
    wrap(place, lambda *_, **__: None)


def stick(rank: int, victims: list[int], place: str, call: int, seconds: float | None) -> None:
    """At one call of a function, sleep; for ever where seconds is None, in a lock that nobody releases."""

    def strike(count: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if count == call:
            if seconds is None:
                lock = threading.Lock()
                lock.acquire()
                lock.acquire()
            else:
                time.sleep(seconds)
        return function(*args, **kwargs)

    if rank in victims:
        wrap(place, strike)


def drag(rank: int, place: str, calls: list[int], seconds: float) -> None:
    """At some calls of a function, take longer, little by little, as a slow disk has a write do."""

    def strike(count: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        until_s = time.monotonic() + seconds * (count in calls)
        while time.monotonic() < until_s:
            time.sleep(0.05)
        return function(*args, **kwargs)

    wrap(place, strike)


def crowd(rank: int, place: str) -> None:
    """At the first call of a function, leave gloo's threads with sums over the ranks that they will not be rid of."""

    def strike(count: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if count == 1:
            sys.setswitchinterval(1000)  # freeing a tensor, they wait for the interpreter, as on a crowded machine
            for _ in range(100):
                dist.all_reduce(torch.ones(1), async_op=True)
        return function(*args, **kwargs)

    wrap(place, strike)


def lose_reader(rank: int) -> None:
    """Let stdout and stderr be a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (1, 2):
        os.dup2(writer, stream)


def trace(rank: int, path: str) -> None:
    """Append positions and keys of every micro-batch to a file, as one row."""

    def note(count: int, function: Callable[..., Any], framer: Any, batch: Any, *timing: Any) -> Any:
        with open(f"{path}.{rank}", "a") as file:
            print(json.dumps([batch.positions, batch.keys]), file=file)
        return function(framer, batch, *timing)

    wrap(LOSS, note)


def poison_clips(rank: int, positions: list[int]) -> None:
    """Give NaN for the frame rate of the clips at some positions: it goes through the network into loss and gradients."""

    def poison(count: int, function: Callable[..., Any], framer: Any, batch: Any, *timing: Any) -> Any:
        for i, position in enumerate(batch.positions):
            if position in positions:
                batch.fps_B[i] = math.nan
        return function(framer, batch, *timing)

    wrap(LOSS, poison)


def overflow_losses(rank: int, positions: list[int]) -> None:
    """Make the losses at some positions infinite, their gradients being as they were."""

    def overflow(count: int, function: Callable[..., Any], framer: Any, batch: Any, *timing: Any) -> Any:
        scores = function(framer, batch, *timing)
        raised_B = scores.loss_B.new_tensor(
            [math.inf if position in positions else 0.0 for position in batch.positions]
        )
        return scores._replace(loss_B=scores.loss_B + raised_B)

    wrap(LOSS, overflow)


def poison_gradient(rank: int, victims: list[int], call: int) -> None:
    """Make one element of one gradient NaN in one backward pass."""

    def poison(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.flatten()[-1] = math.nan
        return gradient

    def strike(count: int, function: Callable[..., Any], engine: Any, loss: Tensor) -> Any:
        parameter = list(engine.parameters.values())[len(engine.parameters) // 2]
        hook = parameter.register_hook(poison) if count == call else None
        function(engine, loss)
        if hook is not None:
            hook.remove()

    if rank in victims:
        wrap("engine.zero:ZeroEngine.backward", strike)


def keep_states(rank: int, folder: str) -> None:
    """Save a digest of this rank's masters, moments and compute weights before and after each step: FOLDER/states.<rank>."""
    from hashlib import sha256

    def digest(engine: Any) -> str:
        total = sha256()
        for parameter in engine.parameters.values():
            total.update(parameter.detach().numpy().tobytes())
        for flat in engine._flats:
            for tensor in (flat, *engine._adam[flat].values()):
                total.update(tensor.detach().numpy().tobytes())
        return total.hexdigest()

    def note(count: int, function: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
        before = digest(engine)
        norm = function(engine, *args, **kwargs)
        with open(f"{folder}/states.{rank}", "a") as file:
            print(json.dumps([before, digest(engine)]), file=file)
        return norm

    wrap("engine.zero:ZeroEngine.step", note)
