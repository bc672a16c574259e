"""One piece of work over several processes: torchrun --nproc-per-node 4 -m qandc_core ... gives what one process gives.

Every process loads the whole model and takes a contiguous share of the work, so that shares put together in the order
of the ranks are in the order of one process. Nothing random depends on the rank. What the processes exchange is on the
CPU, which needs no more than gloo.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
STOPPED = 2  # exit status of a process that ends because another one failed
groups = count()  # that this process has joined
PATIENCE = timedelta(days=7)  # torchrun ends the others when one of them fails; waiting long is no failure


@dataclass(frozen=True)
class Distributed:
    """This process among `world`; rank 0 writes the results."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def shard(self, total: int, batch: int = 1) -> range:
        return shard_range(total, self.rank, self.world, batch)

    def gathered(self, value: T) -> list[T]:
        """The values of all processes in the order of the ranks, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def shared(self, make: Callable[[], T]) -> T:
        """The result of make(), which only rank 0 calls."""
        if self.world == 1:
            return make()
        values = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(values)
        return values[0]  # type: ignore[return-value]

    def reduce(self, value: Tensor, operation: str = "sum") -> Tensor:
        """The elementwise sum, min or max over all processes of a tensor on the CPU, in place."""
        if self.world > 1:
            dist.all_reduce(value, getattr(dist.ReduceOp, operation.upper()))
        return value

    def sent(self, value: Tensor, source: int) -> Tensor:
        """The CPU tensor of rank `source`, which the others receive in theirs."""
        if self.world > 1:
            dist.broadcast(value, source)
        return value


ALONE = Distributed()


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def shard_range(total: int, rank: int, world: int, batch: int = 1) -> range:
    """The contiguous image indices of one rank, cut between batches; the ranks together cover range(total) in order.

    A network rounds differently at another batch size, so equal batches make the features equal bit for bit.
    """
    batches = -(-total // batch)
    start, stop = (min(total, batches * r // world * batch) for r in (rank, rank + 1))
    return range(start, stop)


def owners(costs: Sequence[float], world: int) -> list[int]:
    """The rank that takes each piece of work: the largest first, each to the rank with the least so far."""
    loads, taken = [0.0] * world, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
        taken[piece] = loads.index(min(loads))
        loads[taken[piece]] += costs[piece]
    return taken


@contextmanager
def distributed() -> Iterator[Distributed]:
    """Joins the process group of torchrun (gloo, and NCCL for CUDA tensors); else rank 0 of 1 and no group.

    The first process that fails raises its error; the others, which fail for the same reason or because it is gone,
    exit without a word.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if world == 1:
        yield Distributed(rank(), world, device)
        return
    if cuda:
        torch.cuda.set_device(device)
    if rank():
        logging.getLogger(__package__).setLevel(logging.ERROR)  # rank 0 says it
    shared, number, world = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    store = dist.PrefixStore(f"qandc/{next(groups)}", shared)  # apart from the keys of an earlier group
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=PATIENCE)
    try:
        yield Distributed(number, world, device)
    except Exception as error:
        if failed_first(store, number):
            raise
        raise SystemExit(STOPPED) from error
    dist.destroy_process_group()


def failed_first(store: dist.Store, rank: int) -> bool:
    """True in the first process that asks; False where the store is gone with the process that held it."""
    try:
        return store.compare_set("failed", "", str(rank)) == str(rank).encode()
    except RuntimeError:
        return False


def all_gather_tensors(local: Tensor) -> Tensor:
    """Concatenates every rank's rows (n_rank, ...) in rank order, which for `shard_range` is image order.

    Shards may differ in length. Outside a process group the rows come back as they are.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return local
    length = torch.tensor([len(local)], device=local.device)
    counts = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, length)
    lengths = [int(c) for c in counts]
    # all_gather wants equal shapes.
    padded = local.new_zeros(max(lengths), *local.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths)])
