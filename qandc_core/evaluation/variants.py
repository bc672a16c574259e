"""One row of the ablation: which parts are switched on, and the model that results."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from ..caching.attach import apply_cache_to_dit
from ..caching.policies import CachePolicy, ChosenSteps, Interval
from ..caching.schedule import optimal_schedule
from ..calibration.choice import CalibrationConfig
from ..calibration.distances import feature_distances
from ..calibration.file import Calibration, load_calibration
from ..calibration.run import calibrate
from ..calibration.trajectories import DiTTrajectories
from ..compensation.correction import VarianceCompensation
from ..compensation.fit import fit_variance_compensation
from ..diffusion.classes import balanced_labels
from ..diffusion.process import SamplingConfig
from ..models.dit import DiT
from ..models.layers import DIT_SKIP
from ..quantization.model import QuantizationConfig, quantize_model
from .kept import Kept

# Neither shares noise with the other or with the images that are judged; calibration takes a seed for each batch.
CALIBRATION_SEED, FIT_SEED = 503, 502


@dataclass(frozen=True)
class Variant:
    """`bits` (weights, activations) None leaves full precision; `interval` 1 caches nothing; `compensation` names the
    VC method; `selection`, `time_scale` and `computed_only` choose the calibration samples of static activations and
    GPTQ, see CalibrationConfig; `optimal` computes as many steps as the interval does, but those of the DP schedule.
    """

    name: str
    bits: tuple[int, int] | None = None
    interval: int = 1
    selection: str = "random"
    time_scale: float = 1.0
    computed_only: bool = False
    compensation: str | None = None
    compensation_start: float = 0.0
    static: bool = True
    rounding: str = "nearest"
    reuse: str = "branch"
    order: int = 0
    optimal: bool = False
    sampler: str = "ddpm"
    steps: int = 50
    solver: str | None = None  # of SOLVERS, in the place of the sampler; for full precision alone

    @property
    def cache(self) -> tuple[Any, ...]:
        """The settings that determine the calibration trajectories."""
        return (self.interval, self.optimal, self.reuse, self.order, self.sampler, self.steps)

    @property
    def needs_calibration(self) -> bool:
        return self.bits is not None and (self.static or self.rounding == "gptq")


CHOICE = CalibrationConfig()  # of calibration samples, as every command chooses them
# What the demonstration shows. DDIM adds no noise, so that features can be extrapolated, whole blocks of them every 4
# steps at less error than branches that are held for 3.
RECOMMENDED = Variant(
    "Q&C: W8A8 + cache + TAP + VC",
    bits=(8, 8),
    interval=4,
    reuse="block",
    selection=CHOICE.selection,
    time_scale=CHOICE.time_scale,
    computed_only=CHOICE.computed_only,
    compensation="variance_match",
    order=1,
    sampler="ddim",
)


@dataclass
class Workbench:
    """Builds accelerated models from one full-precision model; calibrations are made once and shared.

    `calibration_config` says how much to sample, the variant how to choose from it; `pairs` fit the compensation.
    """

    model: DiT
    sampling: SamplingConfig
    calibration_config: CalibrationConfig
    pairs: int = 256
    skip: Sequence[str] = DIT_SKIP
    kept: Kept = field(default_factory=Kept)
    made: dict[Any, Any] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        return self.model.config.num_classes

    def config(self, variant: Variant) -> SamplingConfig:
        return replace(self.sampling, sampler=variant.sampler, steps=variant.steps)

    def cached(self, variant: Variant) -> DiT:
        """A full-precision copy with the variant's cache."""
        model = copy.deepcopy(self.model)
        if variant.interval > 1:
            apply_cache_to_dit(model, self.policy(variant), reuse=variant.reuse)
        return model

    def policy(self, variant: Variant) -> CachePolicy:
        if variant.optimal:
            return ChosenSteps(frozenset(self.schedule(variant)), order=variant.order)
        return Interval(variant.interval, order=variant.order)

    def schedule(self, variant: Variant) -> tuple[int, ...]:
        """The DP-optimal steps, measured on full-precision trajectories."""
        key = ("schedule", variant.interval, variant.sampler, variant.steps)
        if key not in self.made:
            labels = balanced_labels(min(16, self.calibration_config.trajectories), self.classes)
            distances = feature_distances(self.model, labels, self.config(variant), seed=CALIBRATION_SEED)
            self.made[key] = optimal_schedule(distances, len(range(0, variant.steps, variant.interval)))
        return self.made[key]

    def calibration(self, variant: Variant) -> Calibration:
        config = replace(
            self.calibration_config,
            selection=variant.selection,
            time_scale=variant.time_scale,
            computed_only=variant.computed_only,
            hessians=variant.rounding == "gptq",
            seed=CALIBRATION_SEED,
        )
        key = ("calibration", variant.cache, config)

        def made() -> Calibration:
            host = DiTTrajectories(
                self.cached(variant), range(self.classes), self.config(variant), skip_patterns=self.skip
            )
            return replace(calibrate(host, config), sampling=self.config(variant))

        if key not in self.made:
            kept = self.kept.under([variant.cache, asdict(config)])
            self.made[key] = kept.file("calibration.safetensors", made, Calibration.save, load_calibration)
        return self.made[key]

    def quantize(self, variant: Variant, calibration: Calibration | None) -> DiT:
        """The variant's model: a copy with its cache, quantized with the given calibration."""
        model = self.cached(variant)
        if variant.bits is not None:
            config = QuantizationConfig(static=variant.static, rounding=variant.rounding)
            quantize_model(model, *variant.bits, self.skip, calibration, config)
        return model

    def compensate(self, variant: Variant, model: DiT) -> VarianceCompensation | None:
        """Fits the variant's compensation for its accelerated model."""
        method = variant.compensation
        if method is None:
            return None

        def fitted() -> dict[str, Tensor]:
            found = fit_variance_compensation(
                self.model,
                model,
                balanced_labels(self.pairs, self.classes),
                self.config(variant),
                method=method,
                start=variant.compensation_start,
                seed=FIT_SEED,
                batch_size=self.calibration_config.batch_size,
            )
            return {name: getattr(found, name) for name in ("sigmas", "mean", "factor")}

        kept = self.kept.under(asdict(variant)).tensors("compensation", fitted)
        return VarianceCompensation(**kept, method=method)

    def build(self, variant: Variant) -> tuple[DiT, VarianceCompensation | None]:
        model = self.quantize(variant, self.calibration(variant) if variant.needs_calibration else None)
        return model, self.compensate(variant, model)
