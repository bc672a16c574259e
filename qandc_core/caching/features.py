"""The features that one sampling run keeps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .calls import SAMPLES, CallLocator, ModelInput, arguments, first_of
from .forecast import coefficients
from .plans import Plan
from .policies import CachePolicy

Key = tuple[Hashable, str]  # condition, branch name
NEAREST = 0.25  # of a step, between the two features of an extrapolation


@dataclass
class CacheRun:
    """Features of one run and where it stands; `conditions` are those of the present call, in their batch order."""

    shape: tuple[int, ...] = ()
    timestep: float = float("-inf")
    step: int = -1
    call: int = 0
    position: float = 0.0
    conditions: tuple[Hashable, ...] = ()
    reusing: bool = False
    begins: bool = False
    computed: list[bool] = field(default_factory=list)
    features: dict[Key, list[tuple[float, Tensor]]] = field(default_factory=dict)
    announced: bool = False  # the loop says when a step begins
    announced_timestep: float | None = None  # of the step that goes on
    locator: CallLocator = field(default_factory=CallLocator)
    numbers: dict[Hashable, int] = field(default_factory=dict)  # of conditions, in the order of their first calls

    def __deepcopy__(self, memo: dict) -> CacheRun:
        return CacheRun()  # a copied model starts its own run

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for history in self.features.values() for _, t in history)


class Schedule(Protocol):
    """Which steps compute, as CacheConfig or the plan of a run says."""

    @property
    def order(self) -> int: ...

    def computes(self, step: int) -> bool: ...

    def keeps(self, step: int) -> bool: ...


class FeatureCache:
    """Locates each model call in the run and answers for every branch: reuse or compute.

    With `offloaded_from`, features wait in main memory and return to that device.
    """

    def __init__(self, config: Schedule, reuse: str = "branch", offloaded_from: torch.device | None = None):
        self.config: Schedule = config
        self.reuse = reuse
        self.offloaded_from = offloaded_from
        self.policy: CachePolicy | None = None  # makes `config` anew for each run that tells its steps
        self.cost = 0.0
        self.enabled = True
        self.run = CacheRun()
        # What attaching changed, as plain data so that a deep copy of the model owns a working cache.
        self.attached: list[tuple[Any, str, Any]] = []
        self.hooks: list[Any] = []

    def reset(self) -> None:
        self.run = CacheRun()

    def computed(self, step: int) -> bool:
        return not self.enabled or self.run.computed[step]

    @property
    def num_bytes(self) -> int:
        return self.run.num_bytes

    @contextmanager
    def step(self, step: int, sigmas: Sequence[float], timestep: float, sampler: str = "") -> Iterator[None]:
        """Calls within are of one step. That saves reading their timestep from the device, which the host waits for."""
        self.begin_step(step, sigmas, sampler)
        self.run.announced_timestep = float(timestep)
        try:
            yield
        finally:
            self.run.announced_timestep = None

    def begin_step(self, step: int = -1, sigmas: Sequence[float] = (), sampler: str = "") -> None:
        """The next call begins a step even at the timestep of the last one; fine noise levels can share a timestep.

        With the noise levels of the run (T + 1,), a policy learns its steps.
        """
        self.run.begins = True
        if self.policy is not None and sigmas:
            if step == 0 or not isinstance(self.config, Plan):
                self.config = self.policy.plan(len(sigmas) - 1, cost=self.cost, sigmas=sigmas, sampler=sampler)
            self.config.begin(step, float(step), sigmas[step], sigmas[step + 1])

    def observe(self, step: int, denoised: Tensor) -> None:
        """The guided clean image (N, C, H, W) of a step; a plan learns from those that computed."""
        if isinstance(self.config, Plan) and self.config.computes(step):
            self.config.observe(float(step), denoised)

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.enabled:
            return
        call = ModelInput.of(module, args, kwargs)
        if self.run.begins or self.run.announced:
            self.locate(call.x, call.timestep)
        else:
            self.follow(call)

    def after_forward(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if self.enabled and not self.run.announced:
            self.run.locator.ended(first_of(SAMPLES, arguments(module, args, kwargs)), out)

    def follow(self, call: ModelInput) -> None:
        """Places a call of a loop that says nothing; see `calls`."""
        locator = self.run.locator
        started, step, key = locator.locate(call)
        if started:
            self.run = CacheRun(locator=locator)
        run = self.run
        if step:
            run.step += 1
            run.computed.append(True)
        condition = run.numbers.setdefault(key, len(run.numbers))
        run.computed[-1] = not self.place(run.step, (condition,))

    def locate(self, x: Tensor, timesteps: Tensor) -> None:
        """For a loop that says when a step begins: a step, a further call of it, or, on a rising timestep or new shape,
        a new run.
        """
        run, announced = self.run, self.run.announced_timestep
        timestep = float(timesteps.reshape(-1)[0]) if announced is None else announced
        if run.step < 0 or timestep > run.timestep or tuple(x.shape) != run.shape:
            run = self.run = CacheRun(shape=tuple(x.shape), announced_timestep=announced)
        run.announced = True
        if run.step < 0 or timestep != run.timestep or run.begins:
            run.step, run.call, run.timestep, run.begins = run.step + 1, 0, timestep, False
            run.computed.append(True)
        else:
            run.call += 1
        run.computed[-1] = not self.place(run.step, (run.call,))

    def place(self, step: int, conditions: Sequence[Hashable], position: float | None = None) -> bool:
        """Begins a call at `step` whose batch holds equal parts for the `conditions`; returns whether it reuses.

        Extrapolation goes by `position`: the step, plus a fraction for a sampler's evaluations within it.
        """
        run = self.run
        run.step, run.conditions = step, tuple(conditions)
        run.position = float(step) if position is None else position
        computes = self.config.computes(step)
        if not computes:
            self.forget_missed(step)
        stored = {condition for condition, _ in run.features}
        run.reusing = not computes and stored.issuperset(run.conditions)
        return run.reusing

    def pass_by(self, step: int, position: float) -> None:
        """Begins a call that computes and keeps nothing, for nobody knows whose features it would be."""
        run = self.run
        run.step, run.position, run.conditions, run.reusing = step, position, (), False

    def forget(self, conditions: Collection[Hashable]) -> None:
        """Drops the features of these conditions."""
        features = self.run.features
        self.run.features = {key: history for key, history in features.items() if key[0] not in conditions}

    def forget_missed(self, step: int) -> None:
        """Drops conditions that the latest computed step did not evaluate, such as those of a strength that is over."""
        latest = next((earlier for earlier in range(step, 0, -1) if self.config.computes(earlier)), 0)
        features = self.run.features
        self.run.features = {key: history for key, history in features.items() if history[-1][0] >= latest}

    def needs(self, step: int) -> bool:
        """True if features computed at `step` may be read later."""
        return bool(self.run.conditions) and self.config.keeps(step)

    def store(self, branch: str, value: Tensor) -> None:
        run = self.run
        if not run.conditions:
            return
        for condition, part in zip(run.conditions, value.chunk(len(run.conditions))):
            history = run.features.setdefault((condition, branch), [])
            # A sampler may evaluate a step more than once; two features so close do not show where they are going.
            if history and history[-1][0] >= min(int(run.position), run.position - NEAREST):
                history.pop()
            history.append((run.position, part.cpu() if self.offloaded_from else part))
            del history[: -1 - self.config.order]

    def holds(self, branch: str) -> bool:
        return all((condition, branch) in self.run.features for condition in self.run.conditions)

    def recall(self, branch: str) -> Tensor:
        parts = [self.forecast(condition, branch) for condition in self.run.conditions]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.to(self.offloaded_from) if self.offloaded_from else whole

    def forecast(self, condition: Hashable, branch: str) -> Tensor:
        """The stored feature, or at order 1 and 2 its extrapolation (`forecast.coefficients`)."""
        history = self.run.features[condition, branch][-1 - self.config.order :]
        value = history[-1][1]
        if len(history) == 1:
            return value
        weights = coefficients([at for at, _ in history], self.run.position)
        if len(history) == 2:
            return torch.lerp(history[0][1], value, weights[-1])
        whole = value.float() * weights[-1]  # in half precision the terms would be rounded before they cancel
        for weight, (_, earlier) in zip(weights[:-1], history[:-1]):
            whole.add_(earlier, alpha=weight)
        return whole.to(value.dtype)

    @property
    def forecasts(self) -> bool:
        """True if a feature of this call would be extrapolated rather than reused as it is."""
        run = self.run
        found = (history for (condition, _), history in run.features.items() if condition in run.conditions)
        return any(map(self.extrapolates, found))

    def extrapolates(self, history: list[tuple[float, Tensor]]) -> bool:
        """True if two features are known and still wanted: a run may go back to order 0."""
        return len(history) > 1 and self.config.order > 0

    def drop(self) -> None:
        """Forgets the features; where the run stands stays."""
        self.run.features.clear()


class CachedBranch:
    """A branch that is skipped on reused steps. `residual` stores output minus input instead of the output."""

    def __init__(self, function: Callable[..., Tensor], name: str, cache: FeatureCache, residual: bool):
        self.function, self.name, self.cache, self.residual = function, name, cache, residual

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        cache = self.cache
        if cache.enabled and cache.run.reusing:
            stored = cache.recall(self.name)
            return x + stored if self.residual else stored
        out = self.function(x, *args, **kwargs)
        if cache.enabled and cache.needs(cache.run.step):
            cache.store(self.name, out - x if self.residual else out)
        return out
