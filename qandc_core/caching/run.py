"""One sampling run under a cache: which step a prediction belongs to, whose features a model call may reuse, and what
was computed or reused.

A host (ComfyUI's samplers, or any loop) announces each prediction with its noise level and each model call with its
conditions; nothing here knows the host. Three decisions are made, each by what can be known, never by counting:

- **The step** is found in the schedule by the noise level and by the order in which levels come (`steps`). Samplers
  evaluate a step several times, leave steps out, run a schedule backwards, or go up again to add noise.
- **The features** of a call belong to a condition, the part of the sample that it was evaluated on, and its patches
  (`identity`). A call whose part cannot be located, and a condition that is evaluated twice with no difference to tell
  the two apart, is computed.
- **Extrapolation** ends where the sampler adds noise between its predictions, which the samples themselves show
  (`trajectory`).

A run costs the host one wait for each prediction, for the noise level; features are `order` + 1 values for every
condition and part. Nothing outlives the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from .features import FeatureCache
from .frame import CallKeys, Condition, Frame
from .identity import locate
from .steps import Steps, same_level
from .trajectory import NoiseWatch, probe_positions

COMPUTED, REUSED, EXTRAPOLATED, ABSENT = "C", "R", "F", "."
SIDES = {0: "positive", 1: "negative"}
CHURNED = 3  # passes that began between the levels of the schedule; a restart begins at one of them


class SamplingRun:
    """Features by condition, for each device and network; steps by noise level; nothing outlives the run.

    `plan` says which steps compute, `sampler` is its name in messages. `corrects`: the sampler's first evaluation at a
    noise level ends the step before it, as Heun's does.
    """

    def __init__(
        self, plan: Any, sigmas: Sequence[float], sampler: str = "", corrects: bool = False, offload: bool = False
    ):
        self.plan, self.steps, self.sampler = plan, Steps(sigmas), sampler
        self.corrects, self.offload = corrects, offload
        self.total = self.steps.total
        self.caches: dict[tuple[torch.device, Hashable], FeatureCache] = {}
        self.lock = RLock()  # clones of a network on several devices are called in threads
        self.sample: Tensor | None = None  # what the sampler handed over, for calls whose part has to be located
        self.frame: Frame | None = None
        self.watch: NoiseWatch | None = None
        self.positions: Tensor | None = None  # of the values that the watch sees
        self.shape: tuple[int, ...] = ()
        self.waiting: list[Tensor] = []
        self.seen: tuple[Any, list] | None = None
        self.visits: Counter[int] = Counter()
        self.begun: set[int] = set()
        self.met: set[Hashable] = set()  # keys and lines of the present prediction
        self.turns: Counter[Hashable] = Counter()
        self.ambiguous: set[Hashable] = set()
        self.lines: dict[str, dict[int, str]] = {}
        self.names: dict[Hashable, str] = {}
        self.columns: dict[tuple[int, int], int] = {}  # (pass, step) -> column of the timeline
        self.width, self.number, self.churned = self.total, 0, 0
        self.warnings: list[str] = []
        self.step, self.position, self.peak_bytes = 0, 0.0, 0
        self.reused = self.computed_any = False

    def begin_prediction(self, sigma: float) -> None:
        """The sampler asks for a prediction at sigma."""
        if self.steps.locate(sigma):
            self.begin_pass(sigma)
        self.see_noise(sigma)
        at = self.steps.at
        self.step = at - 1 if self.corrects and at and not self.visits[at] and self.visits[at - 1] else at
        self.position = at + self.steps.fraction(sigma)
        self.column()
        if self.step not in self.begun:
            self.begun.add(self.step)
            following = self.steps.sigmas[min(self.step + 1, self.total)] if self.total else 0.0
            self.plan.begin(self.step, self.position, sigma, following)
        self.visits[at] += 1
        self.met.clear()
        self.turns.clear()
        self.frame = None
        self.computed_any = False

    def begin_pass(self, sigma: float) -> None:
        """The sampler went back: what was predicted before does not lead here."""
        self.number += 1
        self.drop()
        self.visits.clear()
        self.begun.clear()
        self.plan.restart()
        if self.watch is not None:
            self.watch.forget()
        # A sampler that churns goes up to a level of its own at every step; Heun++ returns to one of the schedule.
        self.churned += not any(same_level(sigma, level) for level in self.steps.sigmas)
        if self.churned > CHURNED:
            self.end_forecasts()

    def column(self) -> int:
        """Column of the present step in the timeline: its own, or a new one where an earlier pass took it."""
        where = self.number, self.step
        if where not in self.columns:
            taken = self.step in self.columns.values()
            self.columns[where] = self.width if taken else self.step
            self.width += taken
        return self.columns[where]

    def end_prediction(self, denoised: Tensor) -> None:
        """Ends a prediction with the guided result."""
        if self.computed_any:
            self.plan.observe(self.position, denoised)
        self.sample = self.frame = None

    # Noise

    def watch_noise(self, sample: Tensor, free: Tensor | None = None) -> None:
        """From here on samples like this one are watched for noise. `free` masks the values that the sampler sets."""
        positions = probe_positions(sample.numel())
        if free is not None:
            inside = free.expand(sample.shape).flatten().nonzero().flatten().cpu()
            positions = inside[probe_positions(len(inside))]
        self.watch, self.positions, self.shape = NoiseWatch(), positions.to(sample.device), sample.shape

    def values(self, tensor: Tensor) -> Tensor:
        """The values of a sample or a prediction that the watch reads."""
        return tensor.detach().reshape(-1)[self.positions].float()

    def keep_values(self, *tensors: Tensor) -> None:
        """Keeps values of what the sampler was given; they reach the host with the next noise level."""
        if self.watch is not None:
            self.waiting = [self.values(tensor) for tensor in tensors if tensor.shape == self.shape]

    def noise_level(self, sigma: Tensor, sample: Tensor) -> float:
        """The level of a prediction, read in one wait together with the values that show noise."""
        if self.watch is None:
            return float(sigma.reshape(-1)[0])
        if sample.shape != self.shape:  # a sampler that changes the size
            self.watch_noise(sample)
            self.waiting = []
        parts = [sigma.reshape(-1)[:1].float(), self.values(sample), *self.waiting]
        level, *values = torch.cat(parts).double().cpu().split([len(part) for part in parts])
        now, *predicted = (part.numpy() for part in values)
        self.seen = now, predicted
        self.waiting = []
        return float(level)

    def see_noise(self, sigma: float) -> None:
        """Ends extrapolation once the sampler has added noise, which it cannot foresee."""
        if self.watch is None or self.seen is None:
            return
        (now, predicted), self.seen = self.seen, None
        if self.watch.vectors:
            self.watch.predicted(*predicted)
        if self.watch.see(now, sigma):
            self.end_forecasts()

    def end_forecasts(self) -> None:
        if self.watch is not None and self.plan.order:
            order, self.plan.order, self.plan.noisy = self.plan.order, 0, True
            self.warn(f"order {order} is not used with {self.sampler}, which adds noise between steps; using order 0")

    # Model calls

    def identify(self, x: Tensor, conditions: Sequence[Condition], state: Hashable, trusted: bool = True) -> CallKeys:
        """Whose features a call on x (N b, C, ...) of N conditions may use.

        `state` is what they depend on besides: patches, hooked weights, a control. With `trusted`, x is what the frame
        says; otherwise that is compared, and parts that differ are located in the sample.
        """
        shape = tuple(x.shape[1:])
        pieces, batch = self.pieces(x, conditions, trusted)
        lines = []
        for condition, piece in zip(conditions, pieces):
            line = condition, shape, piece
            lines.append((*line, self.turns[line]))
            self.turns[line] += 1
        if None in pieces or any(condition[0] is None for condition in conditions):
            self.warn("model calls on parts of the sample that could not be identified were computed")
            return CallKeys(None, tuple(lines))
        keys = tuple((condition, x.device, shape, piece, state, batch) for condition, piece in zip(conditions, pieces))
        for key in keys:
            if key in self.met:
                self.ambiguous.add(key)
            self.met.add(key)
        if self.ambiguous.intersection(keys):
            self.warn(
                "conditions that were evaluated again, with nothing to distinguish the two evaluations, were computed"
            )
            return CallKeys(None, tuple(lines))
        return CallKeys(keys, tuple(lines))

    def pieces(self, x: Tensor, conditions: Sequence[Condition], trusted: bool) -> tuple[list[Any], tuple]:
        """The piece of each condition. Where the batch was put together anew, its parts also belong to all of it."""
        frame = self.frame
        if frame is not None and frame.holds(conditions, x, trusted):
            return [frame.pieces[condition] for condition in conditions], ()
        if self.sample is None or x.shape[0] % len(conditions):
            return [None] * len(conditions), ()
        whole = self.sample.to(x.device)
        return [locate(part, whole) for part in x.chunk(len(conditions))], tuple(conditions)

    def place(self, x: Tensor, call: CallKeys, network: Hashable = None) -> FeatureCache:
        """Begins a model call; the cache, one for each device and network, answers whether it reuses."""
        home = x.device if self.offload else None
        cache = self.caches.setdefault((x.device, network), FeatureCache(self.plan, offloaded_from=home))
        if call.keys is None:
            cache.pass_by(self.step, self.position)
            cache.forget(self.ambiguous)
        else:
            cache.place(self.step, call.keys, self.position)
        self.reused = cache.run.reusing
        return cache

    def record(self, cache: FeatureCache, call: CallKeys) -> None:
        """A model call has ended; it may have computed after all what it was to reuse."""
        self.reused = cache.run.reusing
        self.computed_any = self.computed_any or not self.reused
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        if not self.total:
            return
        for line in call.lines:
            letters = self.lines.setdefault(self.name(line), {})
            if letters.get(self.column()) != COMPUTED:
                letters[self.column()] = self.action(cache)

    def action(self, cache: FeatureCache) -> str:
        if not cache.run.reusing:
            return COMPUTED
        return EXTRAPOLATED if cache.forecasts else REUSED

    def name(self, line: tuple) -> str:
        """positive, negative, or with a number where a side has several areas, windows or passes."""
        side = line[0][1]
        if line not in self.names:
            base = SIDES.get(side, f"condition {side + 1}")
            others = sum(name.split(" #")[0] == base for name in self.names.values())
            self.names[line] = base if not others else f"{base} #{others + 1}"
        return self.names[line]

    def drop(self, device: torch.device | None = None) -> None:
        """Forgets the features, or those that are on a device."""
        for (place, _), cache in self.caches.items():
            if device in (None, place):
                cache.drop()

    @property
    def num_bytes(self) -> int:
        return sum(cache.num_bytes for cache in self.caches.values())

    @property
    def timeline(self) -> dict[str, str]:
        """Letters by condition and part: C computed, R reused, F extrapolated, . not evaluated; repeated steps last."""
        return {
            name: "".join(letters.get(i, ABSENT) for i in range(self.width)) for name, letters in self.lines.items()
        }

    def actions(self) -> list[str]:
        """One letter per step and repeated step: computed if any condition was, reused, or not visited."""
        columns = list(zip(*self.timeline.values())) if self.lines else [()] * self.width
        return [COMPUTED if COMPUTED in column else max(column, default=ABSENT) for column in columns]

    def computed(self) -> list[bool]:
        """One flag per step: computed for any condition. Steps that were not visited were not computed."""
        return [action == COMPUTED for action in self.actions()]

    @property
    def not_visited(self) -> int:
        return self.actions().count(ABSENT)

    @property
    def reused_any(self) -> bool:
        """True if anything was reused."""
        return any(letter in (REUSED, EXTRAPOLATED) for line in self.lines.values() for letter in line.values())

    def counts(self) -> str:
        """The numbers of computed, reused and unvisited steps in words."""
        actions = self.actions()
        computed, absent, repeated = actions.count(COMPUTED), actions.count(ABSENT), self.width - self.total
        mixed = sum(
            COMPUTED in column and bool({REUSED, EXTRAPOLATED} & {*column}) for column in zip(*self.timeline.values())
        )
        in_part = f" ({mixed} in part)" if mixed else ""
        left_out = f", {absent} not visited" if absent else ""
        again = f", {repeated} of them again after the noise level turned back" if repeated else ""
        reused = len(actions) - computed - absent
        return f"{computed} of {len(actions)} steps computed{in_part}, {reused} reused{left_out}{again}"

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
