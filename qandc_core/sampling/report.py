"""The report of a sampling run: times, computed steps, memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..quantization.report import QuantizationReport
from .clock import device_module


@dataclass
class RunReport:
    """One sampling run: wall seconds and computed (else reused) for every step, cache and peak memory in bytes.

    `peak_memory` is the device allocator's peak on a GPU (on MPS what its driver holds at the end) and the process's
    peak on CPU; None where the system has none.
    `factors` are K_t of each step's channels where variance compensation was on. With a cache, `reuse` says what was
    reused and why, `timeline` has a letter per step for each condition (C computed, R reused, F extrapolated, . not
    evaluated; steps that the sampler went back to follow after the last), `not_visited` counts the steps that the
    sampler left out, and `cache_speedup` is the speedup of the model calls. `quantization` is the report of Quantize.
    `size` are the shapes (C, ...) of a sample's parts; seed, cfg_scale and denoise are None where they are not known.
    `solver` is the name of the sampler's function and `sigmas` are the noise levels of the run, empty where they are
    not known. `parts` runs are one report where a sample goes through several samplers; `finished` is False where one
    of them was cancelled or failed. `job` names the queued job that measured it. `replay(tick)` samples once more with
    equal inputs and returns what it measured; tick() is called at every step.
    """

    sampler: str
    steps: int
    images: int
    cfg_scale: float | None
    device: str
    seconds: list[float] = field(default_factory=list)
    computed: list[bool] = field(default_factory=list)
    cache_bytes: int = 0
    peak_memory: int | None = None
    label: str = ""
    factors: list[list[float]] = field(default_factory=list)
    reuse: str = ""
    timeline: dict[str, str] = field(default_factory=dict)
    cache_speedup: float | None = None
    warnings: list[str] = field(default_factory=list)
    quantization: QuantizationReport | None = None
    not_visited: int = 0
    seed: int | None = None
    denoise: float | None = 1.0
    size: list[list[int]] = field(default_factory=list)
    solver: str = ""
    sigmas: list[float] = field(default_factory=list)
    parts: int = 1
    finished: bool = True
    job: str = ""
    replay: Callable[[Callable[[], None]], RunReport] | None = field(default=None, repr=False, compare=False)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds)

    @property
    def computed_steps(self) -> int:
        return sum(self.computed)

    def to_dict(self) -> dict[str, Any]:
        known = asdict(replace(self, replay=None)) | {"total_seconds": self.total_seconds}
        del known["replay"]
        return known | {"computed_steps": self.computed_steps}

    @property
    def reused_steps(self) -> int:
        return len(self.computed) - self.computed_steps - self.not_visited

    def summary(self) -> str:
        left_out = f", {self.not_visited} not visited" if self.not_visited else ""
        memory = "" if self.peak_memory is None else f", peak memory {self.peak_memory / 2**20:.0f} MiB"
        return (
            f"{self.images} images, {self.sampler} {self.steps} steps on {self.device}: {self.total_seconds:.2f} s, "
            f"{self.computed_steps} steps computed and {self.reused_steps} reused{left_out}, "
            f"cache {self.cache_bytes / 2**20:.1f} MiB{memory}"
        )


def joined(reports: Sequence[RunReport]) -> RunReport:
    """One report of runs that one sample went through, in their order: times and steps add up, memory is the largest.

    What the runs do not share is the first's (seed, images, label) or the last's (size). Raises ValueError without any.
    """
    if not reports:
        raise ValueError("There is no run to report; expected at least one.")
    if len(reports) == 1:
        return reports[0]
    first, last = reports[0], reports[-1]
    peaks = [report.peak_memory for report in reports if report.peak_memory is not None]
    replays = [report.replay for report in reports]

    def again(tick: Callable[[], None]) -> RunReport:
        return joined([replay(tick) for replay in replays if replay is not None])

    return replace(
        last,
        sampler=together([report.sampler for report in reports]),
        solver=together([report.solver for report in reports]),
        reuse=together([report.reuse for report in reports]),
        seconds=[seconds for report in reports for seconds in report.seconds],
        computed=[computed for report in reports for computed in report.computed],
        factors=[factors for report in reports for factors in report.factors],
        steps=sum(report.steps for report in reports),
        images=first.images,
        label=first.label,
        seed=first.seed,
        denoise=first.denoise,
        cfg_scale=last.cfg_scale if len({report.cfg_scale for report in reports}) == 1 else None,
        cache_bytes=max(report.cache_bytes for report in reports),
        peak_memory=max(peaks, default=None),
        timeline={f"run {i + 1}, {name}": line for i, r in enumerate(reports) for name, line in r.timeline.items()},
        cache_speedup=None,
        warnings=list(dict.fromkeys(text for report in reports for text in report.warnings)),
        quantization=next((r.quantization for r in reports if r.quantization is not None), None),
        not_visited=sum(report.not_visited for report in reports),
        sigmas=levels_of(reports),
        parts=sum(report.parts for report in reports),
        finished=all(report.finished for report in reports),
        replay=again if all(replays) else None,
    )


def levels_of(reports: Sequence[RunReport]) -> list[float]:
    """Noise levels of runs of which each may begin where the last ended; empty where those of one are not known."""
    levels: list[float] = []
    for report in reports:
        again = bool(levels and report.sigmas) and abs(levels[-1] - report.sigmas[0]) <= 1e-4 * abs(levels[-1])
        levels += report.sigmas[1:] if again else report.sigmas
    return levels if all(report.sigmas for report in reports) else []


def together(texts: Sequence[str]) -> str:
    """The different ones."""
    return ", ".join(dict.fromkeys(filter(None, texts)))


def reset_peak_memory(device: torch.device) -> None:
    reset = getattr(device_module(device), "reset_peak_memory_stats", None)
    if reset is not None:
        reset(device)


def peak_memory(device: torch.device) -> int | None:
    """The allocator's peak in bytes since the reset; without one (MPS) what the device's driver holds now."""
    module = device_module(device)
    if hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated(device)
    if hasattr(module, "driver_allocated_memory"):
        return module.driver_allocated_memory()
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
