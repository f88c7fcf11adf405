"""Names of blocks by what is in them."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.core.prefix_keys import block_keys, root_key
from services.core.types import AdapterDigest

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
A, B = AdapterDigest("sha256:aa"), AdapterDigest("sha256:bb")


def keys(token_ids: list[int], *, digest: AdapterDigest | None = A, salt: str = "t") -> list[bytes]:
    return [*block_keys(root_key(digest, salt), token_ids, block_tokens=4)]


@given(TOKENS)
def test_each_full_block_has_a_key_of_its_own(token_ids: list[int]) -> None:
    found = keys(token_ids)
    assert len(found) == len(token_ids) // 4
    assert len(set(found)) == len(found)


@given(TOKENS, TOKENS)
def test_keys_are_alike_as_far_as_whole_blocks_are(one: list[int], other: list[int]) -> None:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    alike = (min(len(one), len(other)) if same is None else same) // 4
    pairs = [*zip(keys(one), keys(other), strict=False)]
    assert all(a == b for a, b in pairs[:alike])
    assert all(a != b for a, b in pairs[alike:])


@given(TOKENS, st.integers(0, 10))
def test_keys_go_on_where_others_ended(token_ids: list[int], blocks: int) -> None:
    whole = keys(token_ids)
    first = whole[:blocks]
    before = first[-1] if first else root_key(A, "t")
    assert [*first, *block_keys(before, token_ids[len(first) * 4 :], block_tokens=4)] == whole


def test_neither_an_adapter_nor_a_salt_has_a_key_in_common_with_another() -> None:
    tokens = [*range(40)]
    roots = [(A, "t"), (B, "t"), (None, "t"), (A, "u"), (A, ""), (None, "asha256:aat")]
    found = [keys(tokens, digest=digest, salt=salt) for digest, salt in roots]
    assert len({key for each in found for key in each}) == 10 * len(roots)


def test_a_block_elsewhere_has_another_key() -> None:
    found = keys([1, 2, 3, 4] * 3)
    assert all(a != b for a, b in pairwise(found))
