"""Kernels are measured, and those that fail or err are left out. Run: pytest tests/model/test_kernels.py"""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from toolkit.model import kernels
from toolkit.model.attention import attend_sdpa, pin
from toolkit.model.kernels import CANDIDATES, attend_triton, by_rows, measure

CPU, SIZE = torch.device("cpu"), (2, 16, 2, 16)
RIGHT = {"flash": by_rows(pin(SDPBackend.FLASH_ATTENTION)), "math": by_rows(pin(SDPBackend.MATH))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [False, True])
def test_what_computes_the_formula_is_timed(frames: bool, dtype: torch.dtype) -> None:
    """Both of torch's kernels for the CPU agree with the formula, in both precisions, for many tokens, few and one."""
    seconds = measure(RIGHT, [(2, 96, 3, 16), (9, 5, 2, 64), (4, 1, 2, 16)], dtype, CPU, frames)
    assert seconds.keys() == RIGHT.keys() and all(value > 0 for value in seconds.values())


def test_what_fails_is_left_out() -> None:
    """Of the candidates for a GPU those that have no kernel for the CPU, or are not installed, are passed over."""
    candidates = {name: by_rows(attend) for name, attend in CANDIDATES.items()} | {"triton": attend_triton}
    assert measure(candidates, [SIZE], torch.float32, CPU).keys() == {"flash"}


def test_what_errs_is_left_out() -> None:
    """A wrong output, a wrong gradient and one that is not a number, be it in the last row or the last size alone."""

    def off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_sdpa(1.2 * q, k, v)

    def off_backwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_sdpa(q, k.detach() + 0.5 * (k - k.detach()), v)

    def not_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_sdpa(q, k, v) / torch.ones(len(q), 1, 1, 1).index_fill(0, torch.tensor(len(q) - 1), float("nan"))

    def off_in_short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_sdpa(q if q.shape[1] > 8 else 1.2 * q, k, v)

    wrong = {
        "off in short ones": off_in_short,
        "off": off,
        "off backwards": off_backwards,
        "not a number": not_a_number,
    }
    candidates = RIGHT | {name: by_rows(attend) for name, attend in wrong.items()}
    assert measure(candidates, [(4, 16, 2, 16), (4, 8, 2, 16)], torch.float32, CPU).keys() == RIGHT.keys()


def test_short_memory_is_no_fault_of_a_kernel() -> None:
    """It ends the measuring, rather than leave a candidate out."""

    def short(qkv: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        measure(RIGHT | {"short": short}, [SIZE], torch.float32, CPU)


def test_of_many_tokens_the_first_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula is never asked for more scores than it has room for."""
    monkeypatch.setattr(kernels, "CHECKED", 16)
    seen: list[int] = []

    def note(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q.shape[1])
        return attend_sdpa(q, k, v)

    measure({"noting": by_rows(note)}, [SIZE], torch.float32, CPU)
    assert seen[0] == 4 and set(seen[1:]) == {16}


def test_measuring_draws_nothing_from_torch() -> None:
    """A run's own draws are the same whether its kernel was measured or remembered."""
    before = torch.get_rng_state()
    measure(RIGHT, [SIZE], torch.float32, CPU)
    assert torch.equal(torch.get_rng_state(), before)
