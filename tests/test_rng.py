"""Every draw is a function of its key alone. Run: pytest tests/test_rng.py"""

import hashlib

import numpy as np
import pytest
import torch

from toolkit.rng import derive_seed, integer, normal_like, permutation, rng, uniform

GOLDEN_SEED = 4770958935390344169
GOLDEN_SEED_0 = 7976484315024171222
GOLDEN_PERMUTATION = [3, 6, 7, 5, 2, 0, 9, 10, 11, 1, 8, 4]


def test_draw_depends_on_the_key_alone() -> None:
    """The same key draws the same numbers, whatever was drawn before, here or from torch's global generator."""
    wanted = {k: torch.randn(5, generator=rng(7, "noise", k)) for k in range(4)}
    torch.manual_seed(99)
    for k in (3, 0, 2, 1, 3):
        torch.randn(11)
        assert torch.equal(torch.randn(5, generator=rng(7, "noise", k)), wanted[k])


def test_drawing_leaves_the_global_generators_alone() -> None:
    """Keyed draws neither read nor move the state of torch's and NumPy's global generators."""
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    torch.randn(3, generator=rng(1, "a"))
    permutation(9, 1, "a")
    normal_like(torch.zeros(2, 3), 1, "a", [0, 1])
    assert torch.equal(torch.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()


def test_each_part_of_the_key_counts() -> None:
    """Other seed, purpose or counter: another seed, and no two of 3,000 keys share one."""
    keys = [(s, p, k) for s in range(10) for p in ("noise", "sigma", "flip") for k in range(100)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= derive_seed(*key) < 2**63 for key in keys)


def test_seed_hash_is_golden() -> None:
    """Seeds by value: a change breaks resuming old runs, so bump RNG_VERSION with it."""
    # by hand: SHA-256 of "version/seed/purpose/counter", first eight bytes, little endian, top bit dropped
    by_hand = int.from_bytes(hashlib.sha256(b"1/1234/noise/56").digest()[:8], "little") >> 1
    assert derive_seed(1234, "noise", 56) == by_hand == GOLDEN_SEED
    assert derive_seed(0, "sigma") == derive_seed(0, "sigma", 0) == GOLDEN_SEED_0


def test_permutation_is_golden() -> None:
    """A permutation by value: the order of old runs rests on it."""
    assert permutation(12, 1234, "order", 5).tolist() == GOLDEN_PERMUTATION


@pytest.mark.parametrize("n", [0, 1, 2, 50, 1000])
def test_permutation_is_one(n: int) -> None:
    """Every index once, and another counter gives another order."""
    assert sorted(permutation(n, 3, "order").tolist()) == list(range(n))
    assert n < 10 or permutation(n, 3, "order").tolist() != permutation(n, 3, "order", 1).tolist()


def test_permutation_has_no_favourite_place() -> None:
    """Over 2,000 counters each of 5 items stands first about 400 times (five standard deviations)."""
    first = np.bincount([permutation(5, 0, "order", k)[0] for k in range(2000)], minlength=5)
    assert abs(first - 400).max() < 5 * (2000 * 0.2 * 0.8) ** 0.5


def test_row_depends_on_its_position_only() -> None:
    """Row b of normal_like is the draw of positions[b], in any batch, order and dtype of the batch."""
    batch = torch.zeros(4, 2, 3, dtype=torch.bfloat16)
    rows = normal_like(batch, 5, "noise", [8, 2, 8, 31])
    assert rows.shape == batch.shape and rows.dtype == torch.float32
    for row, k in zip(rows, [8, 2, 8, 31], strict=True):
        assert torch.equal(row, normal_like(batch[:1], 5, "noise", [k])[0])
        assert torch.equal(row, torch.randn(2, 3, generator=rng(5, "noise", k)))
    assert not torch.equal(rows[0], rows[1])


def test_generator_stands_on_the_device_asked_for() -> None:
    """The CPU unless another is named, so that most draws agree between devices."""
    assert rng(5, "noise").device.type == "cpu" == rng(5, "noise", 0, "cpu").device.type
    with pytest.raises(RuntimeError, match="META"):
        rng(5, "noise", 0, "meta")


def test_draws_are_standard_normal() -> None:
    """200 rows of 500 draws: mean 0 and variance 1 within five standard errors, rows uncorrelated."""
    rows = normal_like(torch.zeros(200, 500), 0, "noise", range(200))
    assert abs(rows.mean()) < 5 / 1e5**0.5 and abs(rows.var() - 1) < 5 * (2 / 1e5) ** 0.5
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 6 / 500**0.5


def test_numbers_from_the_key_alone() -> None:
    """integer and uniform cover their range evenly, repeat for a key, and differ for another seed, purpose or counter."""
    numbers = [integer(7, 1, "window", k) for k in range(7000)]
    assert numbers == [integer(7, 1, "window", k) for k in range(7000)]
    assert set(numbers) == set(range(7)) and max(numbers.count(i) for i in range(7)) < 1150
    shares = [uniform(1, "crop", k) for k in range(4000)]
    assert 0 <= min(shares) < 0.01 and 0.99 < max(shares) < 1 and abs(sum(shares) / 4000 - 0.5) < 0.02
    one = uniform(1, "crop", 0)
    assert one not in (uniform(2, "crop", 0), uniform(1, "flip", 0), uniform(1, "crop", 1))
