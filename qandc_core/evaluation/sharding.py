"""One evaluation over several processes: torchrun --nproc-per-node 4 -m ... gives the numbers of a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Distributed:
    """This process among `world`; rank 0 writes the results."""

    rank: int
    world: int
    device: torch.device

    def shard(self, total: int, batch: int = 1) -> range:
        return shard_range(total, self.rank, self.world, batch)


def shard_range(total: int, rank: int, world: int, batch: int = 1) -> range:
    """The contiguous image indices of one rank, cut between batches; the ranks together cover range(total) in order.

    A network rounds differently at another batch size, so equal batches make the features equal bit for bit.
    """
    batches = -(-total // batch)
    start, stop = (min(total, batches * r // world * batch) for r in (rank, rank + 1))
    return range(start, stop)


@contextmanager
def distributed() -> Iterator[Distributed]:
    """Joins the process group of torchrun (gloo, and NCCL for CUDA tensors); else rank 0 of 1 and no group."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if world == 1:
        yield Distributed(rank, world, device)
        return
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Distributed(rank, world, device)
    finally:
        dist.destroy_process_group()


def all_gather_tensors(local: Tensor) -> Tensor:
    """Concatenates every rank's rows (n_rank, ...) in rank order, which for `shard_range` is image order.

    Shards may differ in length. Outside a process group the rows come back as they are.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return local
    count = torch.tensor([len(local)], device=local.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    lengths = [int(c) for c in counts]
    # all_gather wants equal shapes.
    padded = local.new_zeros(max(lengths), *local.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths)])
