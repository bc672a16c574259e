"""One run of somebody else's sampler, recorded while it goes by: layer inputs of chosen samples, held-out calls,
and the prediction of every step.

Nothing is sampled twice and nothing is computed anew: statistics are gathered in the very calls that the sampler
makes. What that costs is bounded in advance. At most one sample in ten of the model calls is looked into, and of it
a quarter of a layer's inputs, drawn at random, enters its sums; bounds are those of all its inputs. X^T X of a layer
may cost more than the layer itself, and inputs of one image at one step resemble each other. In a run of fewer than ten
samples one is looked into all the same, and fewer of its inputs enter: of four samples, four tenths as many.

The run itself only copies what was drawn, as far as that takes no more memory than the statistics will; they are made
of it once the run has ended. Where they fit beside the model, everything stays on its device until then, and nothing
waits for it before.

The host hands every model call to `called`, with the key of the network that it runs on. Clones of a model on several
devices work in threads of their own: each has its own statistics, which add up at the end, and only the choice, a few
integers, is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics import is_out_of_memory
from .calls import ModelCall
from .choice import CalibrationConfig, reduced
from .layer_inputs import HELD_OUT_TOKENS, call_of, of_samples
from .memory import StatisticsPlan, plan_statistics
from .records import PROBE_TOKENS, Drawn, LayerRecord, Room, RunRecord, Waiting
from .state import width_of
from .statistics import observed
from .stream import Strata

SPARSEST = 10  # at most one sample in ten is observed
SHARE, FEWEST, MOST = 4, 64, 1024  # one token in four enters a layer's sums, within these limits per sample
HELD_OUT_A_RUN = 2
PROBES, PROBE_WIDTH = 4, 4096  # layers on which it is measured what a run adds
Layers = Sequence[tuple[str, nn.Module]]


@dataclass(frozen=True)
class RecordingConfig:
    """How many samples of a run are observed, a sample being one image under one condition in a model call, and what is
    kept of them; as in CalibrationConfig. A file that was begun with another `reset` is begun anew.
    """

    samples: int = 8
    hessians: bool = CalibrationConfig.hessians
    memory_gb: float = CalibrationConfig.memory_gb
    tokens: int = CalibrationConfig.tokens
    held_out: int = CalibrationConfig.held_out
    reset: int = 0

    def strata(self, total: int) -> int:
        """Length of the stretches of a run of `total` samples, of each of which one is chosen."""
        return min(max(-(-total // self.samples), SPARSEST), max(total, 1))

    def plan(self, widths: Sequence[int]) -> StatisticsPlan:
        """The memory plan of all layers. Raises ValueError where memory_gb is too little."""
        tokens, held_out = self.tokens if self.hessians else 0, HELD_OUT_TOKENS if self.held_out else 0
        aside = PROBES * PROBE_TOKENS * 2 * min(max(widths, default=0), PROBE_WIDTH)
        return plan_statistics(widths, max(0, int(self.memory_gb * 2**30) - aside), tokens, held_out)


class Draws:
    """Which inputs of a model call are kept, at random: layers with as many inputs keep the same ones."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """At most `count` tokens of x (M, K), and a key for each, float64 on the CPU."""
        if (len(x), count) not in self.made:
            order = torch.randperm(len(x), generator=self.generator)[:count]
            keys = torch.rand(len(order), dtype=torch.float64, generator=self.generator)
            self.made[len(x), count] = order.to(x.device, non_blocking=True), keys
        order, keys = self.made[len(x), count]
        return x[order], keys


class NetworkRecorder:
    """One network, on its device, and the records of its layers; only the thread of that device comes here."""

    def __init__(self, layers: Layers, space: StatisticsPlan, room: Room, seed: int):
        self.layers, self.space, self.room = layers, space, room
        self.generator = torch.Generator().manual_seed(seed)
        self.records: dict[str, LayerRecord] = {}
        self.waiting: dict[str, Waiting] = {}
        self.failed = False
        self.probes = probes({name: width_of(layer) for name, layer in layers})

    def add(self, name: str, drawn: Drawn) -> None:
        """Leaves the sums for the end of the run, until there is no room for what they are of."""
        waiting = self.waiting.setdefault(name, Waiting(drawn.tokens.shape[1], self.space, self.room))
        if name in self.records or not waiting.takes(drawn):
            self.sum_up(name, chain(waiting.emptied(), [drawn]))

    def sum_up(self, name: str, parts: Iterable[Drawn]) -> None:
        for drawn in parts:
            self.record(name, drawn.tokens.shape[1]).add(drawn)

    def record(self, name: str, width: int) -> LayerRecord:
        if name not in self.records:
            self.records[name] = LayerRecord.empty(width, self.space, name in self.probes, self.room)
        return self.records[name]

    def taken_out(self, name: str) -> LayerRecord | None:
        """The record of a layer, on the CPU; None where memory ran out."""
        with self.giving_up():
            self.sum_up(name, self.waiting.pop(name).emptied())
            record = self.records.pop(name)
            self.room.give_back(record.large)
            record.fetch()
            return record
        return None

    @property
    def num_bytes(self) -> int:
        """Size of the layers' sums and inputs."""
        held = [part.large for part in self.records.values()] + [part.large for part in self.waiting.values()]
        return sum(tensor.nbytes for large in held for tensor in large)

    def call(self, sample: int, x: Tensor, t: Tensor, conditions: Mapping[str, Any]) -> ModelCall | None:
        """A copy of one sample's call, on the device where there is room; None where it cannot be stored."""
        found = call_of(sample, x, t, conditions)
        with self.giving_up():
            return None if found is None else found.copied(self.room.take(found.num_bytes))
        return None

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """Where memory runs out within, the image goes on, not recorded and with the memory that this took."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.failed = True
            self.records.clear()
            self.waiting.clear()

    def observer(self, batch: int, chosen: list[int], apart: list[int], part: float) -> Callable[[str, Tensor], None]:
        """observe(name, inputs) of one model call; of what enters the sums of a long run, `part`."""
        draws, draws_apart = Draws(self.generator), Draws(self.generator)

        @torch.inference_mode()
        def observe(name: str, inputs: Tensor) -> None:
            if not inputs.numel() or self.failed:
                return  # an expert to which no token went
            with self.giving_up():
                add(name, inputs)

        def add(name: str, inputs: Tensor) -> None:
            if chosen:
                x = of_samples(inputs, batch, chosen)
                some, keys = draws(x, len(chosen) * tokens_of(len(x) // len(chosen), part))
                low, high = x.aminmax(dim=0)
                self.add(name, Drawn(some, keys, (low, high)))
            if apart and self.space.held_out:
                self.add(name, Drawn(*draws_apart(of_samples(inputs, batch, apart), HELD_OUT_TOKENS)))

        return observe


class Recorder:
    """Records one run of `steps` steps. A seed makes its choices repeatable."""

    def __init__(self, config: RecordingConfig, steps: int, seed: int | None = None):
        self.config, self.steps = config, steps
        self.generator = torch.Generator()
        self.generator.manual_seed(self.generator.seed() if seed is None else seed)
        self.lock = Lock()
        self.places: dict[Hashable, NetworkRecorder] = {}
        self.strata: Strata | None = None
        self.calls: list[tuple[float, ModelCall]] = []
        self.predictions: list[tuple[Tensor, Tensor]] = []
        self.samples = 0

    def expect(self, count: int) -> None:
        """Takes the number of samples of a prediction: the images of a batch, each under every condition. The first
        call counts.
        """
        if self.strata is None and count:
            size, apart = self.config.strata(count * self.steps), 0
            if self.config.held_out:
                apart = max(1, count * self.steps // size // HELD_OUT_A_RUN)
            self.strata = Strata(size, apart, self.generator)

    def predicted(self, sigma: Tensor, denoised: Tensor) -> None:
        """Notes a prediction (N, ...) at noise level sigma, on its device."""
        self.predictions.append((sigma.detach().reshape(-1)[:1], reduced(denoised.detach()).flatten()))

    def called(
        self,
        network: Hashable,
        layers: Callable[[], Layers],
        room: Callable[[], int],
        call: Callable[[], Any],
        x: Tensor,
        t: Tensor,
        conditions: Mapping[str, Any],
    ) -> Any:
        """The result of call(), a model call on x (N, ...) of a network, whose layers and memory are queried once."""
        with self.lock:
            self.expect(len(x))
            chosen, apart = self.strata.take(len(x)) if self.strata is not None else ([], [])
            if chosen or apart:
                place = self.place(network, layers, x.device, room)
                part = self.strata.size / SPARSEST if self.strata is not None else 1.0
                keys = torch.rand(len(apart), dtype=torch.float64, generator=self.generator).tolist()
        if not chosen and not apart:
            return call()
        kept = [(key, place.call(sample, x, t, conditions)) for key, sample in zip(keys, apart)]
        with observed(place.layers, place.observer(len(x), chosen, apart, part)):
            out = call()
        with self.lock:
            self.samples += len(chosen)
            self.calls += [(key, made) for key, made in kept if made is not None]
        return out

    def place(
        self, network: Hashable, layers: Callable[[], Layers], device: torch.device, room: Callable
    ) -> NetworkRecorder:
        if network not in self.places:
            found = layers()
            space = self.config.plan([width_of(layer) for _, layer in found])
            seed = int(torch.randint(2**62, (), generator=self.generator))
            self.places[network] = NetworkRecorder(found, space, Room(device, room()), seed)
        return self.places[network]

    @property
    def num_bytes(self) -> int:
        """Size of all layers' sums and inputs."""
        return sum(place.num_bytes for place in self.places.values())

    def taken(self) -> Recorder:
        """Another recorder with all that was recorded; this one is empty afterwards."""
        found = copy(self)
        self.close()
        return found

    @torch.inference_mode()
    def result(self) -> RunRecord:
        """The recorded run, on the CPU; the recorder is empty afterwards. Raises ValueError where it is incomplete."""
        layers: dict[str, LayerRecord] = {}
        for place in self.places.values():
            while place.waiting:  # nothing waits any more once memory ran out
                name = next(iter(place.waiting))
                record = place.taken_out(name)
                if name in layers and record is not None:
                    layers[name].merge(record)
                elif record is not None:
                    layers[name] = record
        if any(place.failed for place in self.places.values()):
            raise ValueError("memory ran out while it was recorded; lower memory_gb")
        predictions: list[tuple[float, Tensor]] = []
        if self.predictions:
            levels, values = zip(*self.predictions)
            alike = len({part.shape for part in values}) == 1  # brought to the CPU in one piece
            parts = list(torch.stack(values).cpu()) if alike else [part.cpu() for part in values]
            predictions = list(zip(torch.cat(levels).tolist(), parts))
        calls = [(key, call.fetched()) for key, call in self.calls]
        found = RunRecord(layers, calls, predictions, self.samples)
        self.close()
        return found

    def close(self) -> None:
        """Frees what was recorded."""
        self.places, self.calls, self.predictions, self.samples = {}, [], [], 0


def tokens_of(sample: int, part: float = 1.0) -> int:
    """How many of a sample's tokens enter a layer's sums; of those of a long run, a short one takes `part`."""
    return max(FEWEST, int(min(part, 1.0) * min(sample // SHARE, MOST)))


def probes(widths: Mapping[str, int]) -> set[str]:
    """Layers, evenly over the network, on which it is measured what a run adds; wide ones would take too long."""
    middle = sorted(widths.values())[len(widths) // 2] if widths else 0
    narrow = [name for name, width in widths.items() if width <= min(middle, PROBE_WIDTH)]
    return {narrow[(2 * i + 1) * len(narrow) // (2 * PROBES)] for i in range(PROBES)} if narrow else set()
