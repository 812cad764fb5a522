"""The names of blocks."""

from hashlib import sha256

from engine.scheduling.prefix_cache import extend_hashes, max_cached_blocks, root_hash


def chain(token_ids: list[int], block_size: int = 2, salt: str = "") -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, root_hash(salt), token_ids, block_size)
    return hashes


def test_a_name_is_the_sha256_of_parent_and_raw_int32_tokens() -> None:
    root = sha256(b"sluice/prefix-cache/v1\0tenant").digest()
    first = sha256(root + (1).to_bytes(4, "little") + (500).to_bytes(4, "little")).digest()
    assert chain([1, 500], salt="tenant") == [first]


def test_only_full_blocks_have_names() -> None:
    assert [len(chain([7] * count)) for count in range(6)] == [0, 0, 1, 1, 2, 2]


def test_extending_in_pieces_gives_the_same_chain() -> None:
    tokens = list(range(100, 117))
    hashes: list[bytes] = []
    for end in (1, 2, 7, 8, 17):
        extend_hashes(hashes, root_hash("s"), tokens[:end], 3)
    assert hashes == chain(tokens, 3, "s")


def test_an_early_token_changes_every_later_name() -> None:
    assert not set(chain([1, 2, 3, 4])) & set(chain([9, 2, 3, 4]))


def test_salts_share_no_name() -> None:
    assert not set(chain([1, 2, 3, 4], salt="a")) & set(chain([1, 2, 3, 4], salt="b"))


def test_a_salt_with_lone_surrogates_has_a_root() -> None:
    assert root_hash("\ud800") != root_hash("")


def test_at_least_one_token_is_left_to_compute() -> None:
    assert [max_cached_blocks(count, 4) for count in (1, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]
