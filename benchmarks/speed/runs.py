"""Times, memory and errors of whole runs and of their steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from qandc_core.caching.schedule import CacheConfig, spaced_steps
from qandc_core.diffusion.noise import ImageNoise
from qandc_core.diffusion.process import SamplingConfig
from qandc_core.fused.dit import FusedDiT
from qandc_core.fused.loop import DeviceLoop
from qandc_core.models.dit import DiT
from qandc_core.numerics import relative_error
from qandc_core.sampling.clock import Stopwatch
from qandc_core.sampling.report import peak_memory, reset_peak_memory

from .models import Subject, model_bytes, resize
from .plain import loop_of

Row = Mapping[str, Any]  # a Measured, as JSON has it
ALL_STEPS, CHOSEN = "all steps", "chosen steps"
Note = Callable[[str], None]
ModelOf = Callable[[Subject], "DiT | FusedDiT"]
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
    spaced = CacheConfig(steps=frozenset(spaced_steps(steps, third)), reuse="prediction", order=1)
    return {ALL_STEPS: None, "interval 3": CacheConfig(3, reuse="prediction"), CHOSEN: spaced}


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
    baseline: bool = False  # full precision without a cache or anything of ours

    def line(self) -> str:
        name = f"{self.setting}, {self.subject}, {self.schedule}"
        if self.problem:
            return f"{name}: {self.problem}"
        error = "" if self.error is None else f", error {self.error:.4f}"
        return f"{name}: {self.total:.3f} s, a computed step {1e3 * (self.computed or 0):.2f} ms{error}"


class Bench:
    """Runs subjects in one setting with the same noise and classes."""

    def __init__(
        self, device: torch.device, setting: Setting, note: Note, repeats: int = 3, longest: float = 4.0
    ):  # fmt: skip
        """Runs that would take more than `longest` seconds in all repeats are repeated less, or extrapolated."""
        self.device, self.setting, self.note, self.repeats, self.longest = device, setting, note, repeats, longest
        size = setting.pixels // 8
        self.noise = ImageNoise(0, range(setting.images), (4, size, size)).draw()
        self.labels = torch.arange(setting.images, device=device)
        self.reference: Tensor | None = None

    def measure(
        self,
        subject: Subject,
        model_of: ModelOf,
        schedule: str,
        cache: CacheConfig | None,
        steps: int | None = None,
    ) -> Row:
        """A row; a subject that fails says why in `problem`."""
        config = self.setting.config(steps)
        row = Measured(subject.name, self.setting.label, schedule, config.steps, config.steps)
        row.baseline = subject.baseline and cache is None and steps is None
        try:
            model = model_of(subject)
            row.weights = model_bytes(model)
            resize(model, self.setting.pixels // 8)
            self.fill(row, subject, model, config, cache)
        except Exception as error:  # of any library: the other rows are still worth measuring
            row.problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        self.note(row.line())
        return asdict(row)

    def fill(
        self, row: Measured, subject: Subject, model: DiT | FusedDiT, config: SamplingConfig, cache: CacheConfig | None
    ) -> None:
        before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        reset_peak_memory(self.device)
        graphs = subject.graph and self.device.type == "cuda"
        loop = loop_of(model, self.setting.images, config, cache, graphs=graphs)
        row.computed_steps = sum(loop.computed)
        loop.prepare(self.labels, [self.noise], None)
        for reuse in {not computes for computes in loop.computed}:
            self.burst(loop, reuse, 2)  # compiles, tunes and captures
        expected = self.burst(loop, False, 1) * sum(loop.computed)
        runs = min(self.repeats, int(self.longest / expected))
        if runs or self.reference is None:
            row.totals = [self.run_seconds(loop) for _ in range(max(1, runs))]
            row.total = statistics.median(row.totals)
            row.error = self.error(loop.x)
        row.computed = self.step_seconds(loop, False)
        if not all(loop.computed):
            row.reused = self.step_seconds(loop, True)
        if row.total is None:
            reused = (row.reused or 0.0) * (config.steps - sum(loop.computed))
            row.total, row.extrapolated = row.computed * sum(loop.computed) + reused, True
        if self.device.type == "cuda":
            peak = peak_memory(self.device)
            assert peak is not None
            row.memory = peak - before + model_bytes(model)

    def step_seconds(self, loop: DeviceLoop, reuse: bool) -> float:
        """Median over bursts of a step's share."""
        steps = BURST if self.burst(loop, reuse, 1) < 1.0 else 1
        return statistics.median(self.burst(loop, reuse, steps) for _ in range(self.repeats if steps > 1 else 1))

    def burst(self, loop: DeviceLoop, reuse: bool, steps: int) -> float:
        """Seconds of one of several steps, waiting for the device before and after all."""
        program = loop.program(reuse)
        watch = Stopwatch(self.device)
        for _ in range(steps):
            loop.rewind()
            program()
        return watch.seconds() / steps

    def run_seconds(self, loop: DeviceLoop) -> float:
        watch = Stopwatch(self.device)
        loop.run(self.labels, [self.noise])
        return watch.seconds()

    def error(self, latents: Tensor) -> float:
        """Against the first run that was measured."""
        if self.reference is None:
            self.reference = latents.clone()
        return relative_error(latents, self.reference)


def measure_subject(
    bench: Bench, subject: Subject, model_of: ModelOf, more_time: Callable[[], bool]
) -> list[Row]:  # fmt: skip
    """A subject with every schedule for as long as there is time; one with steps of its own has no cache."""
    torch.compiler.reset()
    found: list[Row] = []
    for name, cache in (schedules(bench.setting.steps) if subject.steps is None else {ALL_STEPS: None}).items():
        if more_time():
            found.append(bench.measure(subject, model_of, name, cache, subject.steps))
        else:
            bench.note(f"{bench.setting.label}: no time left for {subject.name}, {name}")
    return found


def find(rows: Iterable[Row], subject: str, schedule: str = ALL_STEPS) -> Row | None:
    return next((row for row in rows if (row["subject"], row["schedule"]) == (subject, schedule)), None)


def fastest(rows: Iterable[Row]) -> Row | None:
    """Full precision as fast as torch makes it."""
    able = (row for row in rows if row["baseline"] and not row["problem"])
    return min(able, key=lambda row: row["total"], default=None)
