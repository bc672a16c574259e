"""One row of the ablation: which parts are switched on, and the model that results."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..caching.attach import apply_cache_to_dit
from ..caching.schedule import optimal_schedule
from ..calibration.candidates import CandidatePool, collect_pool, collect_statistics
from ..calibration.distances import feature_distances
from ..calibration.file import Calibration, fingerprint
from ..calibration.selection import random_select, stratified_select
from ..calibration.tap import tap_select
from ..compensation.correction import VarianceCompensation
from ..compensation.fit import fit_variance_compensation
from ..diffusion.process import SamplingConfig
from ..models.dit import DiT
from ..models.layers import DIT_SKIP
from ..quantization.model import QuantizationConfig, quantize_model

# Seeds of calibration and fitting lie apart from those of the images that are judged.
CALIBRATION_SEED, FIT_SEED = 501, 502
SELECTIONS = ("random", "stratified", "tap", "tap-blocks")


@dataclass(frozen=True)
class Variant:
    """`bits` (weights, activations) None leaves full precision; `interval` 1 caches nothing; `compensation` names the
    VC method; `selection` says how calibration samples are drawn for static activations or GPTQ; `optimal` computes
    as many steps as the interval does, but those that the DP schedule picks.
    """

    name: str
    bits: tuple[int, int] | None = None
    interval: int = 1
    selection: str = "random"
    compensation: str | None = None
    compensation_start: float = 0.0
    static: bool = True
    rounding: str = "nearest"
    reuse: str = "branch"
    order: int = 0
    optimal: bool = False
    sampler: str = "ddpm"
    steps: int = 50

    @property
    def cache(self) -> tuple[Any, ...]:
        """What decides the trajectories that calibration sees."""
        return (self.interval, self.optimal, self.reuse, self.order, self.sampler, self.steps)

    @property
    def needs_calibration(self) -> bool:
        return self.bits is not None and (self.static or self.rounding == "gptq")


@dataclass(frozen=True)
class CalibrationPlan:
    """Sizes of the calibration: pool trajectories, samples drawn, TAP clusters, pairs for variance compensation."""

    trajectories: int = 64
    samples: int = 800
    clusters: int = 100
    pairs: int = 256
    batch: int = 128


def balanced_labels(count: int, classes: int) -> Tensor:
    """Every class in turn, so that any leading part of the list is balanced."""
    return torch.arange(count) % classes


def block_features(model: DiT, pool: CandidatePool, batch: int = 128) -> Tensor:
    """Token means of the input of every block's attention (N, depth * width): what the layers see, not the pixels."""
    from ..caching.attach import cache_bypassed
    from ..calibration.statistics import observed

    blocks: Any = model.blocks
    seen: list[Tensor] = []
    rows = []
    layers = [(f"blocks.{i}.attn.qkv", block.attn.qkv) for i, block in enumerate(blocks)]
    with torch.inference_mode(), cache_bypassed(model), observed(layers, lambda _, x: seen.append(x.mean(1))):
        for at in range(0, len(pool), batch):
            part = pool.subset(torch.arange(at, min(at + batch, len(pool))))
            device = model.pos_embed.device
            model(part.samples.to(device, model.pos_embed.dtype), part.timesteps.to(device), part.labels.to(device))
            rows.append(torch.cat(seen, dim=1).float().cpu())
            seen.clear()
    features = torch.cat(rows)
    return (features - features.mean(0)) / features.std(0).clamp(min=1e-6)


def split_selection(method: str) -> tuple[str, float]:
    """Kind and TAP time scale of a method that select() takes; ValueError for any other."""
    kind, at, scale = method.removesuffix("-computed").partition("@")
    try:
        number = float(scale) if at else 1.0
    except ValueError:
        number = 0.0
    if kind not in SELECTIONS or not 0 < number < float("inf") or (at and not kind.startswith("tap")):
        raise ValueError(
            f"selection must be one of {', '.join(SELECTIONS)}, for tap with @ and a time scale in steps, with "
            f"-computed at the end for computed steps only (tap@5-computed, say); got {method!r}."
        )
    return kind, number


def select(
    method: str, pool: CandidatePool, plan: CalibrationPlan, seed: int = 0, blocks: Tensor | None = None
) -> Tensor:
    """Indices into the pool: random, stratified, tap, or tap-blocks, which clusters the block features `blocks`.

    "@s" sets TAP's time scale to s steps; "-computed" restricts any method to the steps that the cache computes.
    """
    if method.endswith("-computed"):
        kept = pool.computed.nonzero().flatten()
        part = None if blocks is None else blocks[kept]
        return kept[select(method.removesuffix("-computed"), pool.subset(kept), plan, seed, part)]
    kind, scale = split_selection(method)
    if kind == "random":
        return random_select(len(pool), plan.samples, seed)
    if kind == "stratified":
        return stratified_select(pool.steps, plan.samples, seed)
    features = {"tap": pool.features, "tap-blocks": blocks}[kind]
    assert features is not None
    return tap_select(features, pool.steps, plan.samples, plan.clusters, time_scale=scale, seed=seed).indices


@dataclass
class Workbench:
    """Builds accelerated models from one full-precision model; pools and statistics are made once and shared."""

    model: DiT
    sampling: SamplingConfig
    plan: CalibrationPlan
    skip: Sequence[str] = DIT_SKIP
    made: dict[Any, Any] = field(default_factory=dict)

    def config(self, variant: Variant) -> SamplingConfig:
        return replace(self.sampling, sampler=variant.sampler, steps=variant.steps)

    def cached(self, variant: Variant) -> DiT:
        """A full-precision copy with the variant's cache."""
        model = copy.deepcopy(self.model)
        if variant.interval > 1:
            steps = self.schedule(variant) if variant.optimal else None
            apply_cache_to_dit(model, variant.interval, steps=steps, reuse=variant.reuse, order=variant.order)
        return model

    def schedule(self, variant: Variant) -> tuple[int, ...]:
        """The DP-optimal steps, measured on full-precision trajectories."""
        key = ("schedule", variant.interval, variant.sampler, variant.steps)
        if key not in self.made:
            config = self.config(variant)
            labels = balanced_labels(min(16, self.plan.trajectories), self.model.config.num_classes)
            distances = feature_distances(self.model, labels, config, seed=CALIBRATION_SEED)
            self.made[key] = optimal_schedule(distances, len(range(0, variant.steps, variant.interval)))
        return self.made[key]

    def pool(self, variant: Variant) -> CandidatePool:
        key = ("pool", variant.cache)
        if key not in self.made:
            labels = balanced_labels(self.plan.trajectories, self.model.config.num_classes)
            self.made[key] = collect_pool(
                self.cached(variant), labels, self.config(variant), batch_size=self.plan.batch, seed=CALIBRATION_SEED
            )
        return self.made[key]

    def calibrate(self, variant: Variant, pool: CandidatePool, indices: Tensor) -> Calibration:
        config = self.config(variant)
        statistics = collect_statistics(
            self.cached(variant),
            pool.subset(indices),
            cfg_scale=config.cfg_scale,
            skip_patterns=self.skip,
            hessians=variant.rounding == "gptq",
            batch_size=self.plan.batch,
        )
        return Calibration(fingerprint(self.model), statistics, sampling=config)

    def calibration(self, variant: Variant) -> Calibration:
        key = ("calibration", variant.cache, variant.selection, variant.rounding)
        if key not in self.made:
            pool = self.pool(variant)
            blocks = block_features(self.model, pool) if "blocks" in variant.selection else None
            chosen = select(variant.selection, pool, self.plan, blocks=blocks)
            self.made[key] = self.calibrate(variant, pool, chosen)
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
        if variant.compensation is None:
            return None
        labels = balanced_labels(self.plan.pairs, self.model.config.num_classes)
        return fit_variance_compensation(
            self.model, model, labels, self.config(variant), method=variant.compensation,
            start=variant.compensation_start, batch_size=self.plan.batch, seed=FIT_SEED,
        )  # fmt: skip

    def build(self, variant: Variant) -> tuple[DiT, VarianceCompensation | None]:
        model = self.quantize(variant, self.calibration(variant) if variant.needs_calibration else None)
        return model, self.compensate(variant, model)
