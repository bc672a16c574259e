"""Q&C: quantization and caching that work together for diffusion transformers (arXiv 2503.02508)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .caching.attach import apply_cache_to_dit, fresh_caches, remove_cache, reset_all_caches
from .caching.policies import ChosenSteps, ErrorBudget, Interval, Speedup, StepCount
from .caching.presets import Preset
from .caching.schedule import optimal_schedule
from .calibration.choice import CalibrationConfig
from .calibration.file import Calibration, load_calibration
from .calibration.run import calibrate
from .calibration.tap import TapSelection, tap_select
from .calibration.trajectories import DiTTrajectories
from .checkpoints import load_dit, save_dit
from .compensation.correction import VarianceCompensation
from .compensation.factors import variance_factors
from .compensation.fit import fit_variance_compensation
from .diffusion.process import SamplingConfig
from .models import DiT, DiTConfig
from .quantization.model import QuantizationConfig, quantize_model
from .sampling.report import RunReport

if TYPE_CHECKING:
    from .fused.dit import FusedDiT, fuse_dit
    from .sampling.generate import StepInfo, generate

__version__ = "0.1.0"

# Imported where they are used: who reads a calibration needs neither kernels nor a sampling loop.
LATER = {
    "FusedDiT": ".fused.dit",
    "fuse_dit": ".fused.dit",
    "StepInfo": ".sampling.generate",
    "generate": ".sampling.generate",
}

__all__ = [
    "Calibration",
    "CalibrationConfig",
    "ChosenSteps",
    "DiT",
    "DiTConfig",
    "DiTTrajectories",
    "ErrorBudget",
    "FusedDiT",
    "Interval",
    "Preset",
    "QuantizationConfig",
    "RunReport",
    "SamplingConfig",
    "Speedup",
    "StepCount",
    "StepInfo",
    "TapSelection",
    "VarianceCompensation",
    "apply_cache_to_dit",
    "calibrate",
    "fit_variance_compensation",
    "fresh_caches",
    "fuse_dit",
    "generate",
    "load_calibration",
    "load_dit",
    "optimal_schedule",
    "quantize_model",
    "remove_cache",
    "reset_all_caches",
    "save_dit",
    "tap_select",
    "variance_factors",
]


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(LATER[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *LATER]
