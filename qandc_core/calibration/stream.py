"""Selects samples from a stream: how many will come is known roughly, and none comes twice.

A run of a sampler passes once. TAP clusters candidates that it has seen, and samples them again to look into the
layers; here the choice has to stand before a call is made. Two classical schemes do that without knowing what comes:

- **Strata**: of each stretch of consecutive samples of model calls, one is chosen at random beforehand. Each
  has the same chance, and the chosen ones spread evenly over the run, whichever steps a cache skips.
- **Reservoir**: of all inputs of a layer the ones with the lowest random keys are kept (a bottom-k sketch, Cohen and
  Kaplan 2007). They are a uniform sample of all that went by, and those of several runs together are those of the
  union: a file that grows run by run holds exactly what one pass over all runs would have kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Strata:
    """Chooses one of every `size` consecutive items, and in every `apart`-th such stratum holds out a second one.

    Every item is chosen with probability 1 / size and held out with 1 / (size * apart); 0 holds out nothing, and so do
    strata of one.
    """

    def __init__(self, size: int, apart: int, generator: torch.Generator):
        self.size, self.generator = size, generator
        self.apart = apart if size > 1 else 0
        self.at = 0
        self.number = int(torch.randint(max(self.apart, 1), (), generator=generator))
        self.draw()

    def draw(self) -> None:
        """The places of the stratum that begins."""
        first, second = (torch.randperm(self.size, generator=self.generator)[:2].tolist() + [-1])[:2]
        held = self.apart and self.number % self.apart == 0
        self.chosen, self.held = first, second if held else -1

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Which of the next `count` items are chosen, and which are held out."""
        chosen, held = [], []
        for item in range(count):
            if self.at == self.chosen:
                chosen.append(item)
            elif self.at == self.held:
                held.append(item)
            self.at += 1
            if self.at == self.size:
                self.at, self.number = 0, self.number + 1
                self.draw()
        return chosen, held


@dataclass
class Reservoir:
    """The tokens with the lowest keys of all that were added: `memory` (capacity, K) holds them in its first places,
    and `keys` (R,), float64 on the CPU, are theirs.
    """

    memory: Tensor
    keys: Tensor

    @classmethod
    def empty(cls, capacity: int, width: int, device: torch.device | str = "cpu") -> Reservoir:
        memory = torch.empty(capacity, width, dtype=torch.bfloat16, device=device)
        return cls(memory, torch.empty(0, dtype=torch.float64))

    @property
    def tokens(self) -> Tensor:
        return self.memory[: len(self.keys)]

    def add(self, x: Tensor, keys: Tensor) -> None:
        """Tokens x (M, K), each with its key (M,)."""
        capacity, before = len(self.memory), len(self.keys)
        everything = torch.cat([self.keys, keys])
        kept = torch.ones(len(everything), dtype=torch.bool)
        if len(everything) > capacity:
            kept[everything.topk(len(everything) - capacity).indices] = False
        entering = kept[before:].nonzero().flatten()
        if not len(entering):
            return
        free = (~kept[:before]).nonzero().flatten()
        slots = torch.cat([free, torch.arange(before, before + len(entering) - len(free))])
        device = self.memory.device
        self.memory[slots.to(device, non_blocking=True)] = x[entering.to(x.device, non_blocking=True)].to(self.memory)
        grown = torch.cat([self.keys, keys.new_empty(len(slots) - len(free))])
        grown[slots] = keys[entering]
        self.keys = grown
