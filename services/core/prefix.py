"""Blocks of KV cache that outlive their request, for the next one that begins with the same tokens.

A full block is known by its key (`services.core.prefix_keys`), which stands for all tokens up to
its end, so blocks form chains, and chains with a common beginning a tree. Rules:

- A block of a prompt is listed as soon as it is computed through all layers, so the next request
  with the same beginning has it while the first one still runs; blocks of the output are listed
  when the request ends well.
- A block has one user per sequence that holds it. Whoever uses a block uses all before it.
  Without a user it is idle: it stays in memory that nobody needs, as idle adapters do, and can be
  had at any time. Leaves go first, never a block before those that follow it.
- Where two sequences compute the same at once, the first to end a block lists it; the other keeps
  its own copies, which are free or, beyond what is listed, listed when it ends.
- A request fails when its numbers are not finite. Nothing of its adapter stays listed then: what
  it computed, or what it began with, may be bad.
- What was listed for an adapter that is dropped, or that failed, is never found again. Blocks that
  are in use then are free with their last user.

Which leaf goes: each has a chance to be used by the next request,

    chance = (uses - 1 + again) / (requests since it was computed + 1),

where `again` is the share of all blocks so far that were used a second time: hyperbolic caching
(Blankstein et al., USENIX ATC 2017) with what is known of newcomers. A block that is computed again
after it went has its uses of before, as long as its key is remembered: else one that goes too soon
each time would never be known for what it is. Leaves are kept by the order of magnitude of their
uses, in order of last use; the first of each are compared, so a choice costs the same however many
there are. Whether a leaf or an adapter goes is decided in `services.core.memory`.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from services.core.snapshots import PrefixCounts
from services.core.types import AdapterDigest

_MAGNITUDES: Final = 8  # 1 use, 2-3, 4-7, … 128 and more
_Family = dict[bytes, "CachedBlock"]


@dataclass(slots=True, eq=False)
class CachedBlock:
    """One listed block of the pool. `parent` is the block before it; None: it is a first one."""

    key: bytes
    block: int
    digest: AdapterDigest | None
    parent: "CachedBlock | None"
    born: int  # requests seen by then
    last_used_s: float
    users: int = 0
    children: int = 0
    uses: int = 1
    is_listed: bool = True

    @property
    def is_leaf(self) -> bool:
        """True if it may go next."""
        return self.is_listed and not self.users and not self.children


class PrefixCache:
    """The listed blocks. The pool counts all of them as held by the KV cache."""

    def __init__(self, *, remembered_max: int) -> None:
        self.used_blocks = 0  # with a user, those that are not listed any more included
        self.idle_blocks = 0
        self._families: dict[AdapterDigest | None, _Family] = {}
        self._unlisted: dict[int, CachedBlock] = {}  # by block; in use
        self._leaves = [OrderedDict[bytes, CachedBlock]() for _ in range(_MAGNITUDES)]
        self._gone = OrderedDict[bytes, tuple[int, int]]()  # uses and birth, the oldest first
        self._gone_max = remembered_max
        self._requests = 0
        self._listed_ever = self._used_again = 0
        self._queried_tokens = self._hit_tokens = self._evicted_blocks = 0

    @property
    def counts(self) -> PrefixCounts:
        """What the cache came to so far."""
        return PrefixCounts(self._queried_tokens, self._hit_tokens, self._evicted_blocks)

    def note_request(self) -> None:
        """Another request was admitted: so time is counted here."""
        self._requests += 1

    def note_start(self, *, context_tokens: int, hit_tokens: int) -> None:
        """A request begins, so many tokens of which need not be computed."""
        self._queried_tokens += context_tokens
        self._hit_tokens += hit_tokens

    def find(
        self, digest: AdapterDigest | None, keys: Sequence[bytes], *, begin: int, end: int
    ) -> list[CachedBlock]:
        """The listed blocks of these keys from `begin` on, up to the first that is missing."""
        found: list[CachedBlock] = []
        family = self._families.get(digest)
        if family is not None:
            for key in keys[begin:end]:
                block = family.get(key)
                if block is None:
                    break
                found.append(block)
        return found

    def use(self, blocks: Sequence[CachedBlock], *, now: float) -> None:
        """Another sequence begins with these; it has what is before them."""
        for block in blocks:
            assert block.is_listed
            if block.is_leaf:
                self._remove_leaf(block)
            if block.users == 0:
                self.idle_blocks -= 1
                self.used_blocks += 1
            self._used_again += block.uses == 1
            block.users += 1
            block.uses += 1
            block.last_used_s = now

    def list_used(
        self,
        held: list[CachedBlock],
        blocks: Sequence[int],
        *,
        digest: AdapterDigest | None,
        keys: Sequence[bytes],
        now: float,
    ) -> None:
        """A running sequence that uses `held` has computed these blocks behind them, full.

        Those that are listed now are added to `held`. `keys` are those of `blocks`, in order.
        """
        parent = held[-1] if held else None
        if parent is not None and not parent.is_listed:
            return
        for key, block in zip(keys, blocks, strict=False):
            if key in self._families.get(digest, ()):
                break
            parent = self._list(key, block, digest=digest, parent=parent, now=now)
            parent.users = 1
            self.used_blocks += 1
            held.append(parent)

    def leave(
        self,
        held: Sequence[CachedBlock],
        blocks: Sequence[int],
        *,
        digest: AdapterDigest | None,
        keys: Sequence[bytes],
        now: float,
    ) -> list[int]:
        """A sequence leaves what it used and what it computed. Returns blocks that are free now.

        `blocks` are its own, behind `held`; the first of them are full and have these `keys`.
        """
        free: list[int] = []
        parent = held[-1] if held else None
        listed = keys[: len(blocks)] if parent is None or parent.is_listed else ()
        for key, block in zip(listed, blocks, strict=False):
            known = self._families.get(digest, {}).get(key)
            if known is None:
                known = self._list(key, block, digest=digest, parent=parent, now=now)
                self.idle_blocks += 1
                self._add_leaf(known)
            else:
                free.append(block)
            parent = known
        free += blocks[len(listed) :]
        for one in reversed(held):
            free += self._end_use(one, now)
        return free

    def drop(self, digest: AdapterDigest | None) -> list[int]:
        """Nothing of this adapter is found again. Returns blocks that are free now."""
        free: list[int] = []
        for block in self._families.pop(digest, {}).values():
            if block.is_leaf:
                self._remove_leaf(block)
            block.is_listed = False
            if block.users:
                self._unlisted[block.block] = block
            else:
                self.idle_blocks -= 1
                free.append(block.block)
        return free

    def next_leaf(self, *, by_age: bool) -> CachedBlock | None:
        """The idle block that would go next: the oldest one, or that with the lowest chance."""
        firsts = [next(iter(leaves.values())) for leaves in self._leaves if leaves]
        if by_age:
            return min(firsts, key=lambda leaf: leaf.last_used_s, default=None)
        return min(firsts, key=self.chance, default=None)

    def chance(self, block: CachedBlock) -> float:
        """Chance that the next request uses it, see the top of this module."""
        again = (self._used_again + 1) / (self._listed_ever + 2)
        return (block.uses - 1 + again) / (self._requests - block.born + 1)

    def evict(self, leaf: CachedBlock) -> int:
        """It goes; the block before it may be a leaf then. Returns its block, which is free."""
        assert leaf.is_leaf
        self._remove_leaf(leaf)
        family = self._families[leaf.digest]
        del family[leaf.key]
        if not family:
            del self._families[leaf.digest]
        leaf.is_listed = False
        self.idle_blocks -= 1
        self._evicted_blocks += 1
        self._gone[leaf.key] = (leaf.uses, leaf.born)
        if len(self._gone) > self._gone_max:
            self._gone.popitem(last=False)
        parent = leaf.parent
        if parent is not None:
            parent.children -= 1
            if parent.is_leaf:
                # Last used with the leaf that has gone, it is next; else it has been wanted since.
                self._add_leaf(parent, is_next=parent.last_used_s <= leaf.last_used_s)
        return leaf.block

    def held_blocks(self) -> Iterator[int]:
        """Every block that is here, used or idle."""
        for family in self._families.values():
            for block in family.values():
                yield block.block
        yield from self._unlisted

    def check_integrity(self, users: dict[int, int]) -> None:
        """Assert that counts are sound. `users`: by block, as sequences say."""
        listed = [block for family in self._families.values() for block in family.values()]
        every = [*listed, *self._unlisted.values()]
        assert {one.block: one.users for one in every if one.users} == users
        assert self.used_blocks == len(users)
        assert self.idle_blocks == sum(one.users == 0 for one in listed)
        children: dict[int, int] = {}
        for digest, family in self._families.items():
            assert family
            for key, one in family.items():
                assert (one.key, one.digest, one.is_listed) == (key, digest, True)
                if one.parent is not None:
                    assert family[one.parent.key] is one.parent, "the block before it is listed"
                    assert one.parent.users >= one.users, "it is used with all before it"
                    children[id(one.parent)] = children.get(id(one.parent), 0) + 1
        assert all(one.children == children.get(id(one), 0) for one in listed)
        leaves = [leaf for leaves in self._leaves for leaf in leaves.values()]
        assert {id(leaf) for leaf in leaves} == {id(one) for one in listed if one.is_leaf}
        assert all(one.users and not one.is_listed for one in self._unlisted.values())

    def _list(
        self,
        key: bytes,
        block: int,
        *,
        digest: AdapterDigest | None,
        parent: CachedBlock | None,
        now: float,
    ) -> CachedBlock:
        listed = CachedBlock(key, block, digest, parent, born=self._requests, last_used_s=now)
        self._families.setdefault(digest, {})[key] = listed
        before = self._gone.pop(key, None)
        if before is None:
            self._listed_ever += 1
        else:
            self._used_again += before[0] == 1
            listed.uses, listed.born = before[0] + 1, before[1]
        if parent is not None:
            if parent.is_leaf:
                self._remove_leaf(parent)
            parent.children += 1
        return listed

    def _end_use(self, block: CachedBlock, now: float) -> list[int]:
        """One user less. Returns its block if it is free now."""
        block.users -= 1
        block.last_used_s = now
        if block.users:
            return []
        self.used_blocks -= 1
        if not block.is_listed:
            del self._unlisted[block.block]
            return [block.block]
        self.idle_blocks += 1
        if block.is_leaf:
            self._add_leaf(block)
        return []

    def _add_leaf(self, block: CachedBlock, *, is_next: bool = False) -> None:
        leaves = self._leaves_like(block)
        leaves[block.key] = block
        if is_next:
            leaves.move_to_end(block.key, last=False)

    def _remove_leaf(self, block: CachedBlock) -> None:
        del self._leaves_like(block)[block.key]

    def _leaves_like(self, block: CachedBlock) -> "OrderedDict[bytes, CachedBlock]":
        return self._leaves[min(_MAGNITUDES, block.uses.bit_length()) - 1]
