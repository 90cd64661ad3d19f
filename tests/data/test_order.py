"""The order is a pure function, exact for every layout. Run: pytest tests/data/test_order.py"""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.order import GROUP_SHARDS, MixedOrder, Order, Source, rank_micro_batches, step_positions
from toolkit.errors import UserError

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=11)
mixes = st.lists(st.builds(Source, sizes.map(tuple), st.integers(1, 5)), min_size=1, max_size=4)


@given(sizes, st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_each_sample_once_an_epoch(shard_sizes: list[int], seed: int) -> None:
    """Three epochs, each a permutation of all samples."""
    order = Order(shard_sizes, seed)
    n = sum(shard_sizes)
    for epoch in range(3):
        assert sorted(order[k] for k in range(epoch * n, (epoch + 1) * n)) == list(range(n))


@given(sizes, st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_ranks_partition_each_step(
    shard_sizes: list[int], micro: int, accumulation: int, world: int, step: int
) -> None:
    """Ranks share the positions of a step; its micro-batches are the same as those of one rank, in the same order."""
    global_batch = micro * accumulation * world
    ranks = [rank_micro_batches(step, global_batch, micro, rank, world) for rank in range(world)]
    interleaved = [ranks[rank][m] for m in range(accumulation) for rank in range(world)]
    assert interleaved == rank_micro_batches(step, global_batch, micro, 0, 1)
    assert [k for batch in interleaved for k in batch] == list(step_positions(step, global_batch))


def test_random_access_equals_sequence_and_epochs_differ() -> None:
    """order[k] does not depend on what was asked before."""
    sizes, n = [5, 3, 8, 1, 6, 2], 25
    sequence = [Order(sizes, 1)[k] for k in range(3 * n)]
    order = Order(sizes, 1)
    assert [order[k] for k in reversed(range(3 * n))] == sequence[::-1]
    assert len({tuple(sequence[e * n : (e + 1) * n]) for e in range(3)}) == 3
    assert [Order(sizes, 2)[k] for k in range(n)] != sequence[:n]


def test_groups_bound_the_open_shards() -> None:
    """Samples of at most GROUP_SHARDS shards are mixed at a time, yet inside a group they are mixed."""
    order = Order([10] * 12, 3)
    for group in range(3):
        shards = [order[k] // 10 for k in range(group * 40, (group + 1) * 40)]
        assert len(set(shards)) == GROUP_SHARDS and shards != sorted(shards)


def test_order_is_golden() -> None:
    """The order of 300 positions, by hash: a change breaks resuming old runs, so bump ORDER_VERSION with it."""
    order = Order([7, 13, 5, 11, 9, 2, 17], 1234)
    text = " ".join(str(order[k]) for k in range(300)) + " " + " ".join(str(order.substitute(k, 1)) for k in range(20))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "d53be59af479f510"


def test_indivisible_batches_are_refused() -> None:
    """The error says what the global batch must be a multiple of."""
    with pytest.raises(UserError, match="multiple of 6"):
        rank_micro_batches(0, 8, 2, 0, 3)


@given(mixes, st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_mix_is_exact_in_every_block(sources: list[Source], seed: int) -> None:
    """Each block takes of each source as many clips as its weight; each source gives each clip once in its own pass."""
    order, block = MixedOrder(sources, seed), sum(source.weight for source in sources)
    starts = [sum(sum(source.shard_sizes) for source in sources[:i]) for i in range(len(sources) + 1)]
    passes = 2 + max(sum(source.shard_sizes) // source.weight for source in sources)
    drawn = [order[k] for k in range(2 * passes * block)]
    for source, first, last in zip(sources, starts, starts[1:], strict=False):
        for at in range(0, len(drawn), block):
            assert sum(first <= sample < last for sample in drawn[at : at + block]) == source.weight
        own = [sample for sample in drawn if first <= sample < last]
        for at in range(0, len(own) - (last - first) + 1, last - first):
            assert sorted(own[at : at + last - first]) == list(range(first, last))


@given(mixes, st.lists(st.integers(0, 2000), min_size=1, max_size=60), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_mix_is_a_pure_function(sources: list[Source], asked: list[int], seed: int) -> None:
    """order[k] is the same in whatever sequence it is asked for, and a substitute comes from the same source."""
    order = MixedOrder(sources, seed)
    assert [order[k] for k in asked] == [MixedOrder(sources, seed)[k] for k in asked]
    ends = [sum(sum(source.shard_sizes) for source in sources[: i + 1]) for i in range(len(sources))]
    for k in asked:
        source, other = (sum(sample >= end for end in ends) for sample in (order[k], order.substitute(k, 1)))
        assert source == other


@given(sizes, st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_mix_of_one_source_is_its_order(shard_sizes: list[int], weight: int, seed: int) -> None:
    """A run without a mix draws what it always drew, and a weight without another means nothing."""
    mixed, order = MixedOrder([Source(tuple(shard_sizes), weight)], seed), Order(shard_sizes, seed)
    assert [mixed[k] for k in range(60)] == [order[k] for k in range(60)]
    assert [mixed.substitute(k, 2) for k in range(60)] == [order.substitute(k, 2) for k in range(60)]


def test_sources_of_equal_sizes_do_not_walk_in_step() -> None:
    """Two sources of the same shards are permuted differently, and blocks are not all in the same order."""
    order = MixedOrder([Source((10, 10)), Source((10, 10))], 3)
    drawn = [order[k] for k in range(40)]
    first, second = ([s % 20 for s in drawn if s // 20 == source] for source in (0, 1))
    assert sorted(first) == sorted(second) and first != second
    assert len({drawn[k] // 20 for k in range(0, 40, 2)}) == 2


def test_mixed_order_is_golden() -> None:
    """The order of 300 positions of a mix, by hash: a change breaks resuming old runs, so bump ORDER_VERSION with it."""
    order = MixedOrder([Source((7, 13), 3), Source((5, 11, 9), 1), Source((2, 17), 2)], 1234)
    text = " ".join(str(order[k]) for k in range(300)) + " " + " ".join(str(order.substitute(k, 1)) for k in range(20))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "f79266bdc5d8c892"
