"""The calibration file: safetensors with the sections statistics, schedule and variance, and JSON metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..caching.runs import schedule_mismatch
from ..compensation.correction import VarianceCompensation
from ..diffusion.process import SamplingConfig
from ..files import parse_json, read_safetensors, reading, save_tensors
from ..values import check_finite
from .calls import ModelCall, pack_calls, unpack_calls
from .fingerprint import Fingerprint, fingerprint_tensors, same_model
from .recording import Recording, read_recording
from .statistics import BINS, LayerStatistics

__all__ = [
    "FINGERPRINT",
    "Calibration",
    "fingerprint",
    "fingerprint_tensors",
    "load_calibration",
    "read_calibration_header",
]
FORMAT, VERSION = "qandc-calibration", 1
REMEDY = "calibrate again"
FINGERPRINT = "qandc_fingerprint"
TENSORS = ("low", "high", "mean", "histogram", "hessian", "inputs", "held_out")
STORED = {"inputs": "rows"}  # tensors that files name otherwise


def fingerprint(model: nn.Module) -> Fingerprint:
    """Hash of the full-precision weights; a quantized model answers with that of its source."""
    remembered = getattr(model, FINGERPRINT, None)
    return fingerprint_tensors(model.state_dict()) if remembered is None else Fingerprint.of(remembered)


@dataclass(frozen=True)
class Calibration:
    """The result of calibrating one model: layer statistics, computed steps of the cache, variance compensation.

    `distances` (T, T) are what optimal_schedule minimises. `sampling` and `notes` say how it was made. `held_out` are
    calls of the model that no statistics come from. `recording` is there to add runs to it.
    Immutable: `with_variance` makes a new one.
    """

    model: str
    statistics: dict[str, LayerStatistics] = field(default_factory=dict)
    schedule: tuple[int, ...] | None = None
    variance: VarianceCompensation | None = None
    distances: Tensor | None = None
    sampling: SamplingConfig | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    held_out: tuple[ModelCall, ...] = ()
    recording: Recording | None = None

    def check_model(self, model: nn.Module) -> None:
        self.check_fingerprint(fingerprint(model))

    def check_fingerprint(self, found: str) -> None:
        if not same_model(self.model, found):
            raise ValueError(
                f"This calibration was made for another model (fingerprint {self.model[:8]}, this model has "
                f"{found[:8]}); calibrate this model, or load the one that the file was made for."
            )

    def layer(self, name: str) -> LayerStatistics:
        if name not in self.statistics:
            raise ValueError(
                f"The calibration has no statistics for {name}; it was made for other layers, calibrate again."
            )
        return self.statistics[name]

    @property
    def missing_distances(self) -> str:
        """Why there are no distances, and what to do."""
        older = "steps" if "cache" not in self.notes.get("attached", {"cache": ""}) else "cache"
        if self.notes.get("distances", older) == "steps":
            sampler = self.notes.get("sampler", "its sampler")
            return f"{sampler} does not evaluate the model at every step of its schedule; use the default spacing"
        return "it was made with a cache; calibrate without a cache to place steps"

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """Noise levels of the run that it was made on, falling and ending at 0; None in files that do not say."""
        if "sigmas" in self.notes:
            return tuple(self.notes["sigmas"])
        return tuple(self.sampling.schedule().sigmas) if self.sampling is not None else None

    def schedule_mismatch(self, sigmas: Sequence[float]) -> str:
        """How a run at these noise levels, the last included, differs from the one it was made on; "" if not at all.

        Levels within 2 % count as the same. Of a file that does not know its levels the number of steps counts.
        """
        made, steps = self.sigmas, len(sigmas) - 1
        known = len(made) - 1 if made is not None else len(self.distances) if self.distances is not None else steps
        return schedule_mismatch(known, made, steps, sigmas)

    def with_variance(self, variance: VarianceCompensation) -> Calibration:
        return replace(self, variance=variance)

    def save(self, path: str | Path) -> None:
        """Writes the file under a temporary name, then renames it."""
        tensors, held_out = pack_calls(self.held_out)
        for name, layer in self.statistics.items():
            for key in TENSORS:
                value = getattr(layer, key)
                if value is not None:
                    tensors[f"statistics/{name}/{STORED.get(key, key)}"] = value.contiguous()
            tensors[f"statistics/{name}/count"] = torch.tensor([layer.count, layer.reach], dtype=torch.float64)
        if self.schedule is not None:
            tensors["schedule/steps"] = torch.tensor(self.schedule)
        if self.distances is not None:
            tensors["schedule/distances"] = self.distances.contiguous()
        if self.variance is not None:
            for key in ("sigmas", "mean", "factor"):
                tensors[f"variance/{key}"] = getattr(self.variance, key).contiguous()
        if self.recording is not None:
            tensors |= self.recording.tensors()
        header = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "sketch": getattr(self.model, "sketch", ""),
            "variance_method": self.variance.method if self.variance is not None else None,
            "sampling": asdict(self.sampling) if self.sampling is not None else None,
            "notes": self.notes,
            "held_out": held_out,
            **({"recording": self.recording.header()} if self.recording is not None else {}),
        }
        save_tensors(tensors or {"empty": torch.zeros(1)}, path, {"qandc": json.dumps(header)})


def read_calibration_header(path: Path) -> dict[str, Any]:
    """The header of a calibration file, without its tensors. Raises OSError or ValueError on any other file."""
    with reading(path, REMEDY), safe_open(path, "pt") as file:
        return calibration_header(path, file.metadata() or {})


def calibration_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "qandc" not in metadata or (header := parse_json(metadata["qandc"])).get("format") != FORMAT:
        raise ValueError(f"{path} is not a calibration file; expected one written by the calibrate step.")
    return header


def load_calibration(path: str | Path) -> Calibration:
    """Reads a calibration file. Raises FileNotFoundError or ValueError in one sentence."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no calibration file {path}; make one with: python -m qandc_core calibrate.")
    try:
        tensors, metadata = read_safetensors(path)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error.__cause__ or error}); {REMEDY}."
        ) from error
    with reading(path, REMEDY):
        header = calibration_header(path, metadata)
        if header.get("version") != VERSION:
            raise ValueError(
                f"{path} has calibration format {header.get('version')}, this version reads {VERSION}; {REMEDY}."
            )
        try:
            return read_calibration(tensors, header)
        except KeyError as error:
            raise ValueError(f"{path} is damaged, it lacks {error}; {REMEDY}.") from error


def read_calibration(tensors: dict[str, Tensor], header: Mapping[str, Any]) -> Calibration:
    if not isinstance(header["model"], str) or not isinstance(header["notes"], dict):
        raise ValueError("its header is not that of a calibration")
    distances = tensors.get("schedule/distances")
    return Calibration(
        model=Fingerprint(header["model"], header.get("sketch", "")),
        statistics=read_statistics(tensors),
        schedule=read_schedule(tensors, distances),
        distances=distances,
        variance=read_variance(tensors, header["variance_method"]),
        sampling=read_sampling(header["sampling"]),
        notes=header["notes"],
        held_out=unpack_calls(tensors, header.get("held_out", ())),
        recording=read_recording(tensors, header.get("recording")),
    )


def read_schedule(tensors: Mapping[str, Tensor], distances: Tensor | None) -> tuple[int, ...] | None:
    if distances is not None:
        if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
            raise ValueError(f"its step distances are {tuple(distances.shape)}, expected a square matrix")
        check_finite({"schedule/distances": distances})
    if "schedule/steps" not in tensors:
        return None
    steps = tuple(tensors["schedule/steps"].tolist())
    if not steps or any(type(step) is not int or step < 0 for step in steps) or sorted(set(steps)) != list(steps):
        raise ValueError("its computed steps are not rising step numbers")
    return steps


def read_statistics(tensors: dict[str, Tensor]) -> dict[str, LayerStatistics]:
    names = {key.split("/")[1] for key in tensors if key.startswith("statistics/")}
    statistics = {}
    for name in sorted(names):
        count, reach = tensors[f"statistics/{name}/count"].tolist()
        low, high, mean, histogram = (tensors[f"statistics/{name}/{key}"] for key in TENSORS[:4])
        optional = (tensors.get(f"statistics/{name}/{STORED.get(key, key)}") for key in TENSORS[4:])
        layer = LayerStatistics(int(count), low, high, mean, histogram, torch.tensor(reach), *optional)
        check_statistics(name, layer)
        statistics[name] = layer
    return statistics


def check_statistics(name: str, layer: LayerStatistics) -> None:
    """Raises ValueError on shapes that do not belong together, and on bounds or sums that are not finite."""
    width = len(layer.low)
    shapes = {"low": (width,), "high": (width,), "mean": (width,), "histogram": (BINS,), "hessian": (width, width)}
    for key in TENSORS:
        tensor = getattr(layer, key)
        if tensor is None:
            continue
        expected = shapes.get(key, (len(tensor), width))
        if tuple(tensor.shape) != expected or not tensor.is_floating_point():
            raise ValueError(f"{key} of {name} is {tuple(tensor.shape)} of {tensor.dtype}, expected {expected} floats")
        if layer.count or key not in ("low", "high"):  # nothing lies between the bounds of no inputs
            check_finite({f"{key} of {name}": tensor})
    if layer.count < 0 or not 0 < layer.reach < math.inf:
        raise ValueError(f"count and reach of {name} are {layer.count} and {layer.reach}, expected positive numbers")


def read_variance(tensors: dict[str, Tensor], method: str | None) -> VarianceCompensation | None:
    if method is None:
        return None
    parts = {key: tensors[f"variance/{key}"] for key in ("sigmas", "mean", "factor")}
    sigmas, mean, factor = parts.values()
    if sigmas.ndim != 1 or mean.ndim != 2 or mean.shape != factor.shape or len(sigmas) != len(mean) or not len(mean):
        raise ValueError(f"its compensation has the shapes {[tuple(part.shape) for part in parts.values()]}")
    check_finite({f"variance/{key}": part for key, part in parts.items()})
    return VarianceCompensation(sigmas, mean, factor, method)


def read_sampling(values: Mapping[str, Any] | None) -> SamplingConfig | None:
    if values is None:
        return None
    if values["sigmas"] is not None:  # earlier files hold steps and spacing beside them, which say nothing
        ignored = ("steps", "spacing")
        values = {**{k: v for k, v in values.items() if k not in ignored}, "sigmas": tuple(values["sigmas"])}
    config = SamplingConfig(**values)
    config.schedule()  # raises ValueError on steps or noise levels that nobody can sample
    return config
