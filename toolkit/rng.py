"""The only maker of randomness: (seed, purpose, counter) -> generator.

Test: pytest tests/test_rng.py

Every draw of a run is keyed by what it is for and by the position k of the sample it is for, never by rank,
worker or history. So a run killed and resumed, on any number of ranks, draws the same numbers, and no
generator state is ever saved. The hash is SHA-256: Python's own hash of a string changes with each process.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Bump when the same key would give other numbers; checkpoints store it, and a resume across versions is refused.
RNG_VERSION = 1


def derive_seed(seed: int, purpose: str, counter: int = 0) -> int:
    """Hash a key to an integer in [0, 2**63)."""
    digest = hashlib.sha256(f"{RNG_VERSION}/{seed}/{purpose}/{counter}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def rng(seed: int, purpose: str, counter: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator that depends on the key alone.

    device  the CPU, so that devices agree, for all draws but those too large to be moved: CUDA draws other numbers
    """
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, counter))


def integer(n: int, seed: int, purpose: str, counter: int = 0) -> int:
    """Draw one of range(n) from the key alone, without the microseconds that a generator takes to make."""
    return derive_seed(seed, purpose, counter) % n


def uniform(seed: int, purpose: str, counter: int = 0) -> float:
    """Draw a number in [0, 1) from the key alone."""
    return (derive_seed(seed, purpose, counter) >> 10) / 2**53


def permutation(n: int, seed: int, purpose: str, counter: int = 0) -> np.ndarray:
    """Permute range(n): int64 (n,), the same with every NumPy version.

    NumPy promises stable streams only for its bit generators, so raw Philox words are sorted instead of calling
    Generator.permutation (NumPy compatibility policy).
    """
    words = np.random.Philox(key=derive_seed(seed, purpose, counter)).random_raw(n)
    return np.argsort(words, kind="stable")


def normal_like(batch: Tensor, seed: int | Sequence[int], purpose: str, positions: Sequence[int]) -> Tensor:
    """Draw N(0, 1) fp32 shaped like `batch`, row b from the key (seed, purpose, positions[b]), on batch's device.

    seed  one for all rows, or one per row
    """
    assert len(positions) == len(batch), (len(positions), len(batch))
    seeds = [seed] * len(positions) if isinstance(seed, int) else seed
    keys = zip(seeds, positions, strict=True)
    rows = [torch.randn(batch.shape[1:], generator=rng(own, purpose, k)) for own, k in keys]
    return torch.stack(rows).to(batch.device)
