"""What the shards of a model say to each other within a step, through torch.distributed.

NCCL between CUDA devices, gloo between processes on the CPU; both over this machine only. Sums
travel in the type of the engine. Nothing waits for longer than the group's timeout: with gloo a
collective then raises, and so it does at once when a peer is gone. With NCCL it is whoever notices
the loss of a peer that ends the collectives under way, by `abort`.
"""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

from services.worker.engine.api import EngineLostError
from services.worker.engine.parallel_shard import Shard


def check_is_free() -> None:
    """Raises ValueError if this process is in a group already."""
    if dist.is_initialized():
        raise ValueError("this process has a process group already; it can have one only")


class ShardGroup:
    """The process group of all shards. A process can be in one at a time."""

    def __init__(
        self, shard: Shard, meeting_point: Path, *, device: torch.device, timeout_s: float
    ) -> None:
        """Wait for the others at `meeting_point`, a file that they all name.

        `timeout_s`: for that, and of each collective. Raises ValueError, and EngineLostError if
        they do not come.
        """
        check_is_free()
        self.shard = shard
        self.device = device
        for backend in ("GLOO", "NCCL"):  # no other machine may join
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo")
        is_cuda = device.type == "cuda"
        try:
            dist.init_process_group(
                "nccl" if is_cuda else "gloo",
                init_method=f"file://{meeting_point}",
                rank=shard.index,
                world_size=shard.count,
                timeout=timedelta(seconds=timeout_s),
                device_id=device if is_cuda else None,
            )
        except RuntimeError as error:
            name = f"shard {shard.index} of {shard.count}"
            raise EngineLostError(f"{name} did not find the others: {error}") from error
        group = dist.group.WORLD
        assert group is not None
        self._group = group
        self._is_cuda = is_cuda

    def sum(self, y: Tensor) -> Tensor:
        """The sum over all shards, in place. Raises RuntimeError."""
        dist.all_reduce(y)
        return y

    def gather(self, logits: Tensor, vocab_size: int) -> Tensor:
        """`logits [rows, tokens of this shard] -> [rows, vocab]` at shard 0; elsewhere as given.

        Raises RuntimeError.
        """
        width = -(-vocab_size // self.shard.count)
        padded = F.pad(logits, (0, missing)) if (missing := width - logits.shape[1]) else logits
        if self.shard.index > 0:
            dist.gather(padded, dst=0)
            return logits
        parts = [torch.empty_like(padded) for _ in range(self.shard.count)]
        dist.gather(padded, parts, dst=0)
        shards = [Shard(index, self.shard.count).part(vocab_size) for index in range(len(parts))]
        cut = [part[:, : at.stop - at.start] for part, at in zip(parts, shards, strict=True)]
        return torch.cat(cut, dim=1)

    def abort(self) -> None:
        """End what waits for a peer that is gone. From any thread.

        With gloo the peer's closed connection has done so already.
        """
        if self._is_cuda:
            self._group.abort()

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
