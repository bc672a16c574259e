"""Times, memory and errors of whole runs and of their steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...caching.schedules import CacheConfig, spaced_steps
from ...models.dit import DiT
from ...models.fused_dit import FusedDiT
from ...sampling.device_loop import DeviceLoop
from ...sampling.noise import ImageNoise
from ...sampling.process import SamplingConfig
from ...sampling.report import peak_memory, reset_peak_memory
from .models import Subject, model_bytes, resize

BURST = 5  # steps timed together, so that waiting for the device between them is not counted


@dataclass(frozen=True)
class Setting:
    """Images of a size in pixels (latents are an eighth), sampled together with guidance."""

    pixels: int
    images: int
    steps: int = 50
    cfg_scale: float = 4.0
    sampler: str = "ddim"

    @property
    def label(self) -> str:
        return f"{self.pixels} px, batch {self.images}"

    def config(self, steps: int | None = None) -> SamplingConfig:
        return SamplingConfig(steps or self.steps, self.cfg_scale, self.sampler)


def schedules(steps: int) -> dict[str, CacheConfig | None]:
    """Without a cache, every third step computed and held, and as many steps where Apply Cache would put them."""
    third = -(-steps // 3)
    spaced = CacheConfig(steps=frozenset(spaced_steps(steps, third)), mode="prediction", order=1)
    return {"all steps": None, "interval 3": CacheConfig(3, mode="prediction"), "chosen steps": spaced}


@dataclass
class Measured:
    """Seconds of a computed step, of a reused one and of whole runs; `extrapolated`: the run was taken to be its steps.

    `error` is the relative L2 distance of the latents to the first subject's, `memory` the peak bytes with the model.
    """

    subject: str
    setting: str
    schedule: str
    steps: int
    computed_steps: int
    computed: float | None = None
    reused: float | None = None
    total: float | None = None
    totals: list[float] = field(default_factory=list)
    extrapolated: bool = False
    error: float | None = None
    memory: int | None = None
    weights: int | None = None
    problem: str = ""

    def line(self) -> str:
        name = f"{self.setting}, {self.subject}, {self.schedule}"
        if self.problem:
            return f"{name}: {self.problem}"
        error = "" if self.error is None else f", error {self.error:.4f}"
        return f"{name}: {self.total:.3f} s, a computed step {1e3 * (self.computed or 0):.2f} ms{error}"


class Bench:
    """Runs subjects in one setting with the same noise and classes."""

    def __init__(self, device: torch.device, setting: Setting, repeats: int = 3, longest: float = 4.0):
        """Runs that would take more than `longest` seconds in all repeats are repeated less, or extrapolated."""
        self.device, self.setting, self.repeats, self.longest = device, setting, repeats, longest
        size = setting.pixels // 8
        self.noise = ImageNoise(0, range(setting.images), (4, size, size)).draw()
        self.labels = torch.arange(setting.images, device=device)
        self.reference: Tensor | None = None

    def measure(
        self,
        subject: Subject,
        model: DiT | FusedDiT,
        schedule: str,
        cache: CacheConfig | None,
        steps: int | None = None,
    ) -> Measured:
        """A row; a subject that fails says why in `problem`."""
        config = self.setting.config(steps)
        row = Measured(subject.name, self.setting.label, schedule, config.steps, config.steps)
        row.weights = model_bytes(model)
        resize(model, self.setting.pixels // 8)
        try:
            self.fill(row, subject, model, config, cache)
        except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
            row.problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return row

    def fill(
        self, row: Measured, subject: Subject, model: DiT | FusedDiT, config: SamplingConfig, cache: CacheConfig | None
    ) -> None:
        before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        reset_peak_memory(self.device)
        graphs = subject.graph and self.device.type == "cuda"
        loop = DeviceLoop(model, self.setting.images, config, cache, graphs=graphs)
        row.computed_steps = sum(loop.computed)
        loop.prepare(self.labels, [self.noise], None)
        row.computed = self.step_seconds(loop, False)
        if not all(loop.computed):
            row.reused = self.step_seconds(loop, True)
        expected = row.computed * sum(loop.computed) + (row.reused or 0.0) * (config.steps - sum(loop.computed))
        runs = min(self.repeats, int(self.longest / expected))
        if runs or self.reference is None:
            row.totals = [self.run_seconds(loop) for _ in range(max(1, runs))]
            row.total = statistics.median(row.totals)
            row.error = self.error(loop.x)
        else:
            row.total, row.extrapolated = expected, True
        if self.device.type == "cuda":
            peak = peak_memory(self.device)
            assert peak is not None
            row.memory = peak - before + model_bytes(model)

    def step_seconds(self, loop: DeviceLoop, reuse: bool) -> float:
        """Median of a step's share of a burst of steps, waiting for the device before and after."""
        program = loop.program(reuse)

        def burst(steps: int) -> float:
            self.wait()
            began = time.perf_counter()
            for _ in range(steps):
                loop.rewind()
                program()
            self.wait()
            return (time.perf_counter() - began) / steps

        first = min(burst(1) for _ in range(2))
        steps = BURST if first < 1.0 else 1
        return statistics.median(burst(steps) for _ in range(self.repeats if steps > 1 else 1))

    def run_seconds(self, loop: DeviceLoop) -> float:
        self.wait()
        began = time.perf_counter()
        loop.run(self.labels, [self.noise])
        self.wait()
        return time.perf_counter() - began

    def error(self, latents: Tensor) -> float:
        """Against the first run that was measured."""
        if self.reference is None:
            self.reference = latents.clone()
        return float((latents - self.reference).norm() / self.reference.norm())

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def fewer_steps(self, subject: Subject, model: DiT | FusedDiT, seconds: float, computed: float) -> Measured:
        """As many steps without a cache as take the given time."""
        steps = max(1, int(seconds / computed))
        return self.measure(subject, model, f"{steps} steps", None, steps)


def measure_setting(
    bench: Bench,
    rows: Sequence[Subject],
    model_of: Callable[[Subject], Any],
    more_time: Callable[[], bool],
    note: Callable[[str], None],
) -> list[Measured]:
    """Every subject with every schedule for as long as there is time; one with steps of its own has no cache."""
    found: list[Measured] = []
    for subject in rows:
        torch.compiler.reset()
        plans = schedules(bench.setting.steps) if subject.steps is None else {"all steps": None}
        for name, cache in plans.items():
            if not more_time():
                note(f"{bench.setting.label}: no time left for {subject.name}, {name}")
                continue
            found.append(bench.measure(subject, model_of(subject), name, cache, subject.steps))
            note(found[-1].line())
    return found
