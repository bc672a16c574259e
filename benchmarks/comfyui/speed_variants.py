"""What `python -m benchmarks.comfyui` compares: a model through the nodes that make it faster, alone and together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import fidelity
import speed_models

if TYPE_CHECKING:
    from host import Host

EASYCACHE, COMPILE = "EasyCache", "TorchCompileModel"
MAX_LAYER_ERROR = 0.1  # the default of Quantize


@dataclass(frozen=True)
class Variant:
    """Nodes on a model: Quantize to a `format`, TorchCompileModel, then EasyCache or Apply Cache for a `speedup`."""

    format: str = ""
    easycache: bool = False
    speedup: float = 0.0
    compiled: bool = False
    halved: bool = False

    @property
    def name(self) -> str:
        cached = f"Apply Cache {self.speedup:g}x" if self.speedup else EASYCACHE * self.easycache
        parts = [self.format, cached, COMPILE * self.compiled, "half the steps" * self.halved]
        return " + ".join(filter(None, parts)) or "stock"

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


def chosen(only: str, compiles: bool) -> list[Variant]:
    """Stock, and the variants whose names hold one of the parts that `only` separates by semicolons."""
    parts = [part for part in only.split(";") if part]
    found = [v for v in VARIANTS if v == STOCK or not parts or any(part in v.name for part in parts)]
    return [variant for variant in found if compiles or not variant.compiled]


class Workshop:
    """Sends a subject through nodes; quantizes to each format once."""

    def __init__(self, host: Host, subject: speed_models.Subject, options: dict[str, Any]):
        self.host, self.subject = host, subject
        self.calibration = cache(lambda: speed_models.calibration(host, subject, options))
        self.quantized = cache(self.quantize)

    def quantize(self, format: str) -> Any:
        """Without a calibration every layer gets the format, for random weights have no layers worth sparing."""
        limit = MAX_LAYER_ERROR if self.subject.trained else 0.0
        return self.host.node("QandC_Quantize").execute(
            model=self.subject.patcher, format=format, method="native", max_layer_error=limit, max_size_mb=0, skip="",
            loras="bake in", rounding="auto", calibration=self.calibration(),
        ).args[0]  # fmt: skip

    def make(self, variant: Variant) -> Any:
        patcher = self.quantized(variant.format) if variant.format else self.subject.patcher
        if variant.compiled:
            patcher = compiled(patcher)
        if variant.easycache:
            patcher = self.easycache(patcher)
        if variant.speedup:
            policy = {"policy": "speedup", "speedup": variant.speedup}
            patcher = self.host.node("QandC_ApplyCache").execute(patcher, policy, 1).args[0]
        return patcher

    def easycache(self, patcher) -> Any:
        """At the node's defaults. On flow models in float32 it writes into the sampler's tensor, so that is copied."""
        from comfy_extras.nodes_easycache import EasyCacheNode

        if self.host.module("nodes.comfyui.wrappers").is_flow(patcher.model):
            patcher = fidelity.copied_input(patcher)
        return EasyCacheNode.execute(patcher, 0.2, 0.15, 0.95, False).args[0]


def compiled(patcher) -> Any:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    return TorchCompileModel.execute(patcher, "inductor").args[0]
