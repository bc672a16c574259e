"""What `python -m benchmarks.comfyui` compares: a model through the nodes that make it faster, alone and together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import fidelity
import real_models
import speed_models
import torch

if TYPE_CHECKING:
    from host import Host

EASYCACHE, COMPILE, FP8 = "EasyCache", "TorchCompileModel", "fp8_e4m3fn_fast"
RECORDED = "Calibrate from Runs"
MAX_LAYER_ERROR = 0.1  # the default of Quantize
NEVER_REUSING = {"policy": "error budget", "max_error": 1e-9, "max_reused": 4}  # decides at every step, and computes


@dataclass(frozen=True)
class Variant:
    """Nodes on a model: Quantize to a `format` (or core's loader with fp8), TorchCompileModel, then EasyCache or Apply
    Cache for a `speedup` or with a preset, or Calibrate from Runs. `idle`: a cache that decides at every step and never
    reuses.
    """

    format: str = ""
    easycache: bool = False
    speedup: float = 0.0
    compiled: bool = False
    halved: bool = False
    preset: str = ""
    blocks: bool = False
    idle: bool = False
    recorded: bool = False

    @property
    def name(self) -> str:
        parts = [self.format, self.cached, COMPILE * self.compiled, RECORDED * self.recorded]
        return " + ".join(filter(None, [*parts, "half the steps" * self.halved])) or "stock"

    @property
    def cached(self) -> str:
        if self.easycache:
            return EASYCACHE
        aim = f"{self.speedup:g}x" if self.speedup else self.preset or "never reusing" * self.idle
        return f"Apply Cache {aim}{', blocks' * self.blocks}" if aim else ""

    @property
    def policy(self) -> dict[str, Any] | None:
        """What Apply Cache is set to."""
        if self.speedup:
            return {"policy": "speedup", "speedup": self.speedup}
        return {"policy": self.preset} if self.preset else NEVER_REUSING if self.idle else None

    @property
    def alone(self) -> bool:
        """EasyCache is compiled with the model, and core lets no guard of torch.compile see that it is there."""
        return self.easycache and self.compiled


STOCK = Variant()
VARIANTS = (
    STOCK,
    Variant(halved=True),
    Variant(easycache=True),
    Variant(compiled=True),
    Variant("W8A8"),
    Variant("W8A8", compiled=True),
    Variant("W8A8", easycache=True),
    Variant("W8A8", easycache=True, compiled=True),
    Variant(speedup=2.0),
    Variant(speedup=3.0),
    Variant(speedup=2.0, compiled=True),
    Variant("W8A8", speedup=2.0),
    Variant("W8A8", speedup=3.0),
    Variant("W8A8", speedup=2.0, compiled=True),
    Variant("W8A8", speedup=3.0, compiled=True),
    Variant("W4A8"),
    Variant("W4A8", speedup=2.0),
    Variant("W4A8", speedup=2.0, compiled=True),
)
# Of models in their released sizes, what matters most first: time may end before the last.
REAL_VARIANTS = (
    STOCK,
    Variant(speedup=2.0),
    Variant("W8A8"),
    Variant(FP8),
    Variant("W8A8", speedup=2.0),
    Variant(preset="auto"),
    Variant(speedup=3.0),
    Variant(idle=True),
    Variant(speedup=2.0, blocks=True),
    Variant(easycache=True),
    Variant("W4A8"),
    Variant(recorded=True),
    Variant("W6A8"),
    Variant(compiled=True),
    Variant("W8A8", compiled=True),
    Variant("W8A8", speedup=2.0, compiled=True),
)


def chosen(model: str, only: str, compiles: bool) -> list[Variant]:
    """Stock, and the variants whose names hold one of the parts that `only` separates by semicolons."""
    parts = [part for part in only.split(";") if part]
    given = REAL_VARIANTS if model in real_models.SIZES else VARIANTS
    found = [v for v in given if v == STOCK or not parts or any(part in v.name for part in parts)]
    return [variant for variant in found if compiles or not variant.compiled]


class Workshop:
    """Sends a subject through nodes; quantizes to each format once."""

    def __init__(self, host: Host, subject: speed_models.Subject, options: dict[str, Any]):
        self.host, self.subject = host, subject
        self.calibration = cache(lambda: speed_models.calibration(host, subject, options))
        self.quantized = cache(self.timed)
        self.made: dict[str, dict[str, Any]] = {}  # format -> what Quantize took

    def quantize(self, format: str) -> Any:
        """Without a calibration every layer gets the format, for random weights have no layers worth sparing."""
        if format == FP8:
            return real_models.load(self.subject.size, torch.float8_e4m3fn)
        limit = MAX_LAYER_ERROR if self.subject.trained else 0.0
        return self.host.node("QandC_Quantize").execute(
            model=self.subject.patcher, format=format, method="native", max_layer_error=limit, max_size_mb=0, skip="",
            loras="bake in", rounding="auto", calibration=self.calibration(),
        ).args[0]  # fmt: skip

    def timed(self, format: str) -> Any:
        """The quantized model; notes the seconds and the GPU's memory beyond what was held, which it took."""
        cuda, begun = self.subject.device.type == "cuda", time.perf_counter()
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        found = self.quantize(format)
        peak = torch.cuda.max_memory_allocated() - before if cuda else None
        self.made[format] = {"seconds": time.perf_counter() - begun, "gpu_bytes": peak}
        return found

    def make(self, variant: Variant) -> Any:
        patcher = self.quantized(variant.format) if variant.format else self.subject.patcher
        if variant.compiled:
            patcher = compiled(patcher)
        if variant.easycache:
            patcher = self.easycache(patcher)
        if variant.policy:
            reuse = {"reuse": "blocks"} if variant.blocks else {}
            patcher = self.host.node("QandC_ApplyCache").execute(patcher, variant.policy, 1, **reuse).args[0]
        return self.recorded(patcher) if variant.recorded else patcher

    def recorded(self, patcher) -> Any:
        """At the node's defaults."""
        node = self.host.module("nodes.calibrate_from_runs").CalibrateFromRuns
        return node.execute(patcher, "speed", True, 8, True, 4.0, 4096, 8, 0).args[0]

    def easycache(self, patcher) -> Any:
        """At the node's defaults. On flow models in float32 it writes into the sampler's tensor, so that is copied."""
        from comfy_extras.nodes_easycache import EasyCacheNode

        if self.host.module("nodes.comfyui.wrappers").is_flow(patcher.model):
            patcher = fidelity.copied_input(patcher)
        return EasyCacheNode.execute(patcher, 0.2, 0.15, 0.95, False).args[0]


def compiled(patcher) -> Any:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    return TorchCompileModel.execute(patcher, "inductor").args[0]
