"""The report of a quantization: formats, sizes and measured errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .budget import FLOAT, stored_bytes
from .formats import ALL
from .native import NativeLayer


@dataclass(frozen=True)
class LayerReport:
    """A layer's format by its name or float, its relative error, and its bytes before and after."""

    name: str
    format: str
    error: float
    before: int
    after: int


def layer_reports(
    quantized: Mapping[str, NativeLayer | None], before: Mapping[str, int], prefix: str = ""
) -> list[LayerReport]:
    """A report of every layer, of those that stay float (None) too; `before` are their bytes."""
    return [
        LayerReport(f"{prefix}{name}", FLOAT, 0.0, before[name], before[name])
        if layer is None
        else LayerReport(f"{prefix}{name}", layer.format, layer.error, before[name], stored_bytes(layer))
        for name, layer in quantized.items()
    ]


def mean_error(errors: Sequence[float]) -> tuple[float, float, int]:
    """Mean, standard error (NaN of a single one) and number of relative errors."""
    values = torch.tensor(errors, dtype=torch.float64)
    spread = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), spread, len(values)


@dataclass(frozen=True)
class QuantizationReport:
    """A model's layers in the format asked for, `seconds` that it took and the `backend` that multiplies.

    `subject` is what was quantized, and `sample` what it was measured on, in words.

    `model_error` is the mean relative error of the whole model's prediction, its standard error (NaN of one call) and
    the number of held-out calls; None without any. `sources` counts layers that were packed before, by their format:
    all errors are against what those decode to.
    """

    format: str
    layers: list[LayerReport]
    seconds: float
    backend: str
    model_error: tuple[float, float, int] | None = None
    sources: dict[str, int] = field(default_factory=dict)
    subject: str = "model"
    sample: str = "sample"

    @property
    def size_before(self) -> int:
        return sum(layer.before for layer in self.layers)

    @property
    def size_after(self) -> int:
        return sum(layer.after for layer in self.layers)

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers by format, coarsest first and float last, those that occur."""
        found = Counter(layer.format for layer in self.layers)
        order = (*(format.name for format in reversed(ALL)), FLOAT)
        return {format: found[format] for format in order if found[format]}

    @property
    def worst(self) -> LayerReport:
        return max(self.layers, key=lambda layer: layer.error)

    def headline(self) -> str:
        """The essentials: sizes, error, the worst layer and the backend."""
        if self.model_error is not None:
            error = f"{percent(self.model_error[0])} error of the {self.subject}"
        else:
            error = (
                f"{percent(sum(layer.error for layer in self.layers) / len(self.layers))} error of a layer on average"
            )
        counts = ", ".join(f"{count} {format}" for format, count in self.counts.items())
        return (
            f"{sizes(self.size_before, self.size_after)}, {error}\n{counts} layers\n"
            f"Worst layer {self.worst.name}, {percent(self.worst.error)}\nKernels: {self.backend}"
            + "".join(f"\n{words}" for words in self.source_words())
        )

    def summary(self) -> str:
        first, *others = (f"{count} {format}" for format, count in self.counts.items())
        number, format = first.split()
        noun = "layer" if number == "1" else "layers"
        parts = [
            ", ".join([f"{number} {noun} {format}", *others]),
            sizes(self.size_before, self.size_after),
            *self.model_error_words(),
            *self.source_words(),
            f"worst layer {self.worst.name} {self.worst.error:.2g}",
            f"{self.seconds:.0f} s",
            f"multiplied by {self.backend}",
        ]
        return "; ".join(parts)

    def model_error_words(self) -> list[str]:
        if self.model_error is None:
            return []
        mean, spread, calls = self.model_error
        within = "" if math.isnan(spread) else f" +- {spread:.1g}"
        samples = self.sample if calls == 1 else f"{self.sample}s"
        return [f"error of the whole {self.subject} {mean:.2g}{within} on {calls} held-out {samples}"]

    def source_words(self) -> list[str]:
        if not self.sources:
            return []
        before = ", ".join(f"{count} {format}" for format, count in self.sources.items())
        return [f"from layers in {before}, which errors are against: what those lost before comes on top"]

    def misses(self, max_model_error: float | None) -> list[str]:
        """A sentence where the model's error is above what was asked for, which is met by a simulation."""
        if max_model_error is None or self.model_error is None or self.model_error[0] <= 1.1 * max_model_error:
            return []
        return [
            f"the model's error is {self.model_error[0]:.2g}, above max_model_error = {max_model_error:g}; ask for "
            "less or choose a finer format"
        ]

    def table(self, worst: int = 10) -> str:
        """Markdown: the layers with the largest errors."""
        rows = sorted(self.layers, key=lambda layer: -layer.error)[:worst]
        lines = ["| layer | format | relative error | MiB before | MiB after |", "|---|---|---:|---:|---:|"]
        lines += [
            f"| {layer.name} | {layer.format} | {layer.error:.2g} "
            f"| {layer.before / 2**20:.2f} | {layer.after / 2**20:.2f} |"
            for layer in rows
        ]
        return "\n".join(lines)


def percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def sizes(before: int, after: int) -> str:
    """Both in the unit that suits the larger."""
    unit, name = (2**30, "GiB") if before >= 2**30 else (2**20, "MiB")
    return f"{before / unit:.1f} -> {after / unit:.1f} {name}"
