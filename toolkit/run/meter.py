"""Counts what a computation costs without doing it: operations, bytes moved, FLOPs and peak memory, on meta tensors.

Test: pytest tests/run/test_meter.py. Exact and the same on every machine, so a change of the network's code can be judged
where there is no GPU. What it cannot see is time, fused kernels and an allocator's rounding.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

# what starts no kernel: views, and memory without content
_FREE = {
    "view", "_unsafe_view", "_reshape_alias", "transpose", "t", "permute", "expand", "unsqueeze", "squeeze", "select",
    "slice", "split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "unfold", "diagonal",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip


@dataclass
class Cost:
    """What one phase of a computation costs."""

    ops: int = 0  # operations that would start a kernel
    moved_bytes: int = 0  # read and written by them, each on its own, without caches
    flop: int = 0  # two per multiply-add
    peak_bytes: int = 0  # of tensors alive at once that were made while counting
    ops_by_name: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layout:
    """All that there is to a meta tensor."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class _Seen:
    """What an operation made, with layouts in place of tensors, and what it cost."""

    outputs: Any
    moved_bytes: int
    flop: int


# By operation and what it was given: networks ask the same again and again, and to work out what becomes of a meta tensor
# takes most of the time of counting.
_SEEN: dict[Any, _Seen] = {}


class Meter(TorchDispatchMode):
    """Counts what runs inside `with`, by phase: set `phase` to "backward" before the backward pass."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        """given  tensors that are there before, such as parameters: they take none of the memory counted"""
        super().__init__()
        self.phase = "forward"
        self.costs: dict[str, Cost] = {}
        self.live_bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}
        self._counting = True
        self._patch = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", self._attend)

    def __enter__(self) -> Meter:
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        makes = name not in _FREE and not func._schema.is_mutable  # tensors of its own
        question = (func, _describe(args), _describe(kwargs or {})) if makes else None
        seen = _SEEN.get(question)
        outputs = func(*args, **(kwargs or {})) if seen is None else tree_map_only(_Layout, _Layout.make, seen.outputs)
        made = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._see(tensor)
        if seen is None:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            formula = flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_"), None))  # in place or not
            flop = int(formula(*args, **(kwargs or {}), out_val=outputs)) if formula else 0
            seen = _Seen(
                tree_map_only(Tensor, _layout, outputs),
                sum(map(_whole_bytes, made)) + sum(map(_distinct_bytes, read)),
                flop,
            )
            if makes and made and all(tensor.is_meta for tensor in (*made, *read)):
                _SEEN[question] = seen
        if self._counting and name not in _FREE:
            self._book(name, seen.moved_bytes, seen.flop)
        return outputs

    @property
    def _cost(self) -> Cost:
        return self.costs.setdefault(self.phase, Cost())

    def _book(self, name: str, moved_bytes: int, flop: int) -> None:
        cost = self._cost
        cost.ops += 1
        cost.moved_bytes += moved_bytes
        cost.flop += flop
        cost.ops_by_name[name] = cost.ops_by_name.get(name, 0) + 1

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size_bytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live_bytes += size_bytes
            weakref.finalize(storage, self._forget, key, size_bytes)
        self._cost.peak_bytes = max(self._cost.peak_bytes, self.live_bytes)

    def _forget(self, key: int, size_bytes: int) -> None:
        self._known.discard(key)  # pointers are used again
        self.live_bytes -= size_bytes

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _Attention.apply(self, query, key, value)

    @contextlib.contextmanager
    def as_one(self, name: str, moved_bytes: int, flop: int) -> Iterator[None]:
        """What is made inside takes memory, but counts as one operation of this cost."""
        self._counting = False
        yield
        self._counting = True
        self._book(name, moved_bytes, flop)


class _Attention(torch.autograd.Function):
    """What a flash kernel keeps and moves: on meta tensors torch would make the whole matrix of scores."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        *outer, heads, queries, dim = query.shape
        rows = torch.Size((*outer, heads, queries)).numel()
        ctx.meter, ctx.flop = meter, rows * key.shape[-2] * dim
        moved_bytes = 2 * _whole_bytes(query) + _whole_bytes(key) + _whole_bytes(value) + 4 * rows
        with meter.as_one("flash_attention", moved_bytes, 4 * ctx.flop):
            output = query.new_empty((*outer, queries, heads, dim)).transpose(-3, -2)
            logsumexp = torch.empty((*outer, heads, queries), dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        moved_bytes = 4 * _whole_bytes(query) + 2 * _whole_bytes(key) + 2 * _whole_bytes(value) + 8 * query.numel()
        with ctx.meter.as_one("flash_attention_backward", moved_bytes, 10 * ctx.flop):
            made = [torch.empty_like(tensor) for tensor in (query, key, value)]
            torch.empty(query.shape, dtype=torch.float32, device=query.device)  # the kernel's sum of query gradients
        return None, *made


def _layout(tensor: Tensor) -> _Layout:
    return _Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _describe(given: Any) -> Any:
    """Arguments, with layouts in place of tensors, to look up; a number with its type, since True == 1 == 1.0."""
    if isinstance(given, Tensor):
        return _layout(given)
    if isinstance(given, list | tuple):
        return tuple(map(_describe, given))
    if isinstance(given, dict):
        return tuple((name, _describe(value)) for name, value in given.items())
    return (type(given), given)


def _whole_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _distinct_bytes(tensor: Tensor) -> int:
    """What must be read: along a stride of 0 the same element stands again and again."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return torch.Size(sizes).numel() * tensor.element_size()
