"""Kernels are measured, and those that fail or err are left out. Run: pytest tests/model/test_kernels.py"""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from toolkit.model.attention import attend_sdpa, pin
from toolkit.model.kernels import CANDIDATES, Size, measure

CPU = torch.device("cpu")
RIGHT = {"flash": pin(SDPBackend.FLASH_ATTENTION), "math": pin(SDPBackend.MATH)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 96, 3, 16), (9, 5, 2, 64), (4, 1, 2, 16)])
def test_what_computes_the_formula_is_timed(size: Size, dtype: torch.dtype) -> None:
    """Both of torch's kernels for the CPU agree with the formula, in both precisions, for many tokens, few and one."""
    seconds = measure(RIGHT, size, dtype, CPU)
    assert seconds.keys() == RIGHT.keys() and all(value > 0 for value in seconds.values())


def test_what_fails_is_left_out() -> None:
    """Of the candidates for a GPU those that have no kernel for the CPU, or are not installed, are passed over."""
    assert measure(CANDIDATES, (2, 16, 2, 16), torch.float32, CPU).keys() == {"flash"}


def test_what_errs_is_left_out() -> None:
    """A wrong output, a wrong gradient and one that is not a number; also where only the last row has it."""

    def off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_sdpa(1.2 * q, k, v)

    def off_backwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_sdpa(q, k.detach() + 0.5 * (k - k.detach()), v)

    def not_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_sdpa(q, k, v) / torch.ones(len(q), 1, 1, 1).index_fill(0, torch.tensor(len(q) - 1), float("nan"))

    wrong = {"off": off, "off backwards": off_backwards, "not a number": not_a_number}
    assert measure(RIGHT | wrong, (4, 16, 2, 16), torch.float32, CPU).keys() == RIGHT.keys()


def test_measuring_draws_nothing_from_torch() -> None:
    """A run's own draws are the same whether its kernel was measured or remembered."""
    before = torch.get_rng_state()
    measure(RIGHT, (2, 16, 2, 16), torch.float32, CPU)
    assert torch.equal(torch.get_rng_state(), before)
