"""Q&C: quantization and caching that work together for diffusion transformers (arXiv 2503.02508)."""

from __future__ import annotations

from .caching.attach import apply_cache_to_dit, remove_cache, reset_all_caches
from .caching.policies import ChosenSteps, ErrorBudget, Interval, Speedup, StepCount
from .caching.schedule import optimal_schedule
from .calibration.file import Calibration, load_calibration
from .calibration.tap import TapSelection, tap_select
from .checkpoints import load_dit, save_dit
from .compensation.correction import VarianceCompensation
from .compensation.factors import variance_factors
from .compensation.fit import fit_variance_compensation
from .diffusion.process import SamplingConfig
from .fused.dit import FusedDiT, fuse_dit
from .models import DiT, DiTConfig
from .quantization.model import QuantizationConfig, quantize_model
from .sampling.generate import StepInfo, generate
from .sampling.report import RunReport

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "ChosenSteps",
    "DiT",
    "DiTConfig",
    "ErrorBudget",
    "FusedDiT",
    "Interval",
    "QuantizationConfig",
    "RunReport",
    "SamplingConfig",
    "Speedup",
    "StepCount",
    "StepInfo",
    "TapSelection",
    "VarianceCompensation",
    "apply_cache_to_dit",
    "fit_variance_compensation",
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
