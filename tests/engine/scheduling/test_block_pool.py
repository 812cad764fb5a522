"""I2: who holds a block, and what can be found."""

import pytest

from engine.scheduling.block_pool import BlockPool

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


def make_cached(pool: BlockPool, *names: bytes) -> list[int]:
    """Blocks with these contents, held by no table, the last name released first."""
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, name)
    pool.release(blocks)
    return blocks


def test_blocks_are_given_out_in_ascending_order_at_first() -> None:
    assert BlockPool(4).allocate(3) == [0, 1, 2]


def test_more_than_there_are_is_refused_and_takes_nothing() -> None:
    pool = BlockPool(2)
    with pytest.raises(RuntimeError, match="3 blocks asked for, 2 available"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_block_without_a_name_becomes_free() -> None:
    pool = BlockPool(2)
    pool.release(pool.allocate(1))
    assert (pool.num_free, pool.num_evictable, pool.num_used) == (2, 0, 0)


def test_a_named_block_becomes_evictable_and_can_be_found() -> None:
    pool = BlockPool(2)
    blocks = make_cached(pool, A)
    assert (pool.num_free, pool.num_evictable) == (1, 1)
    assert pool.find([A, B], 2) == blocks


def test_find_stops_at_the_first_unknown_block() -> None:
    pool = BlockPool(3)
    make_cached(pool, A, C)
    assert len(pool.find([A, B, C], 3)) == 1


def test_find_gives_at_most_so_many_blocks() -> None:
    pool = BlockPool(3)
    make_cached(pool, A, B, C)
    assert len(pool.find([A, B, C], 2)) == 2


def test_a_shared_block_is_used_until_its_last_table_lets_go() -> None:
    pool = BlockPool(2)
    blocks = make_cached(pool, A)
    pool.share(blocks)
    pool.share(blocks)
    pool.release(blocks)
    assert (pool.num_used, pool.ref_count(blocks[0])) == (1, 1)
    pool.release(blocks)
    assert (pool.num_used, pool.num_evictable) == (0, 1)


def test_free_blocks_are_taken_before_content_is_evicted() -> None:
    pool = BlockPool(3)
    make_cached(pool, A)
    pool.allocate(2)
    assert pool.find([A], 1) != []


def test_the_least_recently_used_content_is_evicted_first() -> None:
    pool = BlockPool(2)
    first, second = make_cached(pool, A)[0], make_cached(pool, B)[0]
    pool.share([first])
    pool.release([first])
    assert pool.allocate(1) == [second]
    assert (pool.find([A], 1), pool.find([B], 1)) == ([first], [])


def test_a_sequences_tail_is_evicted_before_its_head() -> None:
    pool = BlockPool(3)
    head, middle, tail = make_cached(pool, A, B, C)
    assert pool.allocate(3) == [tail, middle, head]


def test_the_first_block_with_a_content_keeps_the_name() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, A)
    pool.publish(second, A)
    assert (pool.find([A], 1), pool.hash_of(second)) == ([first], None)


def test_releasing_a_block_that_nobody_holds_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="released more often"):
        BlockPool(1).release([0])


def test_forgotten_content_is_found_no_more_and_its_table_keeps_it() -> None:
    pool = BlockPool(2)
    held = pool.allocate(1)
    pool.publish(held[0], A)
    make_cached(pool, B)
    pool.forget_all()
    assert (pool.find([A], 1), pool.find([B], 1)) == ([], [])
    assert (pool.num_free, pool.num_evictable, pool.num_used) == (1, 0, 1)
