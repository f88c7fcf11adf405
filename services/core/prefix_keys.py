"""Names for blocks of KV cache by what is in them: the same key, the same keys and values.

    key_0 = hash(adapter, salt)        key_i = hash(key_{i-1}, tokens of block i)

What a block holds depends on its own tokens, on all before them, and on the adapter, whose digest
is that of its bytes: the same name with new weights gives other keys. The salt keeps tenants apart,
so that nobody learns from the time of an answer what another tenant has asked.

BLAKE2b with 256 bits: tenants are adversaries, and one who found two prompts with one key would
read an answer to the other. Keys never leave the process.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from services.core.types import AdapterDigest

_KEY_BYTES = 32


def root_key(digest: AdapterDigest | None, salt: str) -> bytes:
    """The key before the first block. `digest` None: the base model."""
    parts = (b"" if digest is None else b"a" + digest.encode(), salt.encode())
    sized = b"".join(len(part).to_bytes(8) + part for part in parts)
    return blake2b(sized, digest_size=_KEY_BYTES).digest()


def block_keys(before: bytes, token_ids: Sequence[int], *, block_tokens: int) -> tuple[bytes, ...]:
    """The keys of the full blocks of these tokens, which follow what has the key `before`.

    Token ids are of 32 bits. About a microsecond per block.
    """
    keys: list[bytes] = []
    view = memoryview(array("i", token_ids)).cast("B")
    block_bytes = len(view) // len(token_ids) * block_tokens if token_ids else 1
    for end in range(block_bytes, len(view) + 1, block_bytes):
        block = blake2b(before, digest_size=_KEY_BYTES)
        block.update(view[end - block_bytes : end])
        before = block.digest()
        keys.append(before)
    return tuple(keys)
