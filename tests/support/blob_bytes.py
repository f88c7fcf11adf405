"""Adapter blobs of any size, right or wrong, for tests of how they travel."""

import numpy as np

from services.common.adapter_container import LoraRows, digest_of, encode


def make_blob(*, layer_bytes: int = 2**20, layers: int = 3, seed: int = 0) -> bytes:
    """A well-formed blob; `layer_bytes` is a multiple of 4."""
    random = np.random.default_rng(seed)
    side_bytes = layer_bytes // 2
    rows = [
        LoraRows(
            layer=layer,
            module="q_proj",
            rank=1,
            scale=2.0,
            in_features=side_bytes // 2,
            out_features=side_bytes // 2,
            a_rows=random.bytes(side_bytes),
            bt_rows=random.bytes(side_bytes),
        )
        for layer in range(layers)
    ]
    return encode(rows, dtype="BF16")


def flipped(blob: bytes, position: int) -> bytes:
    """The blob with one bit wrong."""
    damaged = bytearray(blob)
    damaged[position] ^= 1
    return bytes(damaged)


def hex_of(blob: bytes) -> str:
    """The digest of a blob as the name of its file."""
    return digest_of(blob).removeprefix("sha256:")
