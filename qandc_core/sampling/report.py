"""What a run measured of itself."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..quantization.report import QuantizationReport
from .clock import device_module


@dataclass
class RunReport:
    """One sampling run: wall seconds and computed (else reused) for every step, cache and peak memory in bytes.

    `peak_memory` is the device allocator's peak on a GPU (on MPS what its driver holds at the end) and the process's
    peak on CPU; None where the system has none.
    `factors` are K_t of each step's channels where variance compensation was on. Of a cache: `reuse` is what it reused
    and why, `timeline` a letter per step for each condition (C computed, R held, F forecast, . not evaluated; steps
    that the sampler went back to follow after the last), `not_visited` the steps that the sampler left out, and
    `cache_speedup` how much longer the model calls would have taken had each computed. `quantization` is what Quantize
    measured of the model. `size` are the shapes (C, ...) of a sample's parts; `seed` is None where it is not known.
    """

    sampler: str
    steps: int
    images: int
    cfg_scale: float
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
    denoise: float = 1.0
    size: list[list[int]] = field(default_factory=list)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds)

    @property
    def computed_steps(self) -> int:
        return sum(self.computed)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total_seconds": self.total_seconds, "computed_steps": self.computed_steps}

    def summary(self) -> str:
        reused = len(self.computed) - self.computed_steps - self.not_visited
        left_out = f", {self.not_visited} not visited" if self.not_visited else ""
        memory = "" if self.peak_memory is None else f", peak memory {self.peak_memory / 2**20:.0f} MiB"
        return (
            f"{self.images} images, {self.sampler} {self.steps} steps on {self.device}: {self.total_seconds:.2f} s, "
            f"{self.computed_steps} steps computed and {reused} reused{left_out}, "
            f"cache {self.cache_bytes / 2**20:.1f} MiB{memory}"
        )


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
