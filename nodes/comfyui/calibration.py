"""Calibration on a MODEL's own trajectories, with its cache on: candidates, TAP, then statistics of the chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...qandc_core.calibration.distances import prediction_distances
from ...qandc_core.calibration.selection import random_select, stratified_select
from ...qandc_core.calibration.statistics import LayerStatistics, merge_rows, observed
from ...qandc_core.calibration.tap import tap_select
from ...qandc_core.quantization.model import DIT_SKIP, named_linears
from .caching import is_reused
from .compensation import preserved_scale
from .dit_model import is_dit
from .runs import WRAPPERS, is_flow, replace_wrapper, scalar, step_at
from .sampling import Progress, Settings, sample_new

KEY = "qandc_calibration"
FEATURES = 16384  # values of a sample that TAP clusters; larger latents are averaged down to this
SELECTIONS = ("tap", "stratified", "random")


@dataclass(frozen=True)
class Plan:
    """How much to sample and how to choose from it."""

    trajectories: int = 32
    batch_size: int = 16
    samples: int = 400
    selection: str = "tap"
    clusters: int = 50
    time_scale: float = 5.0
    computed_only: bool = True
    hessians: bool = False
    seed: int = 501

    def batches(self) -> Iterator[tuple[int, int, int]]:
        """Seed, size and number of the first image of every sampling run."""
        for number, first in enumerate(range(0, self.trajectories, self.batch_size)):
            yield self.seed + number, min(self.batch_size, self.trajectories - first), first


@dataclass
class Candidates:
    """Every sample of every model call: features (N, D), step indices (N,), whether the call computed (N,), and
    where it came from, (N, 3): run, call within the run, image within the batch.
    """

    features: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    computed: list[Tensor] = field(default_factory=list)
    origin: list[Tensor] = field(default_factory=list)
    predictions: list[dict[int, Tensor]] = field(default_factory=list)
    sigmas: Tensor | None = None

    def distances(self) -> Tensor | None:
        """How much each step's prediction differs from earlier ones; None where a cache left some out."""
        if self.sigmas is None or not all(bool(part.all()) for part in self.computed):
            return None
        steps = range(len(self.sigmas) - 1)
        if any(step not in run for run in self.predictions for step in steps):
            return None
        rows = [torch.cat([run[step] for run in self.predictions]) for step in steps]
        return prediction_distances(torch.stack(rows), self.sigmas)

    def choose(self, plan: Plan) -> Tensor:
        """Origins (n, 3) of the chosen samples."""
        features, steps = torch.cat(self.features), torch.cat(self.steps)
        kept = torch.cat(self.computed).nonzero().flatten() if plan.computed_only else torch.arange(len(steps))
        if plan.selection == "tap":
            clusters = min(plan.clusters, plan.samples, len(kept))
            chosen = tap_select(
                features[kept], steps[kept], plan.samples, clusters, time_scale=plan.time_scale, seed=plan.seed
            ).indices
        elif plan.selection == "stratified":
            chosen = stratified_select(steps[kept], plan.samples, plan.seed)
        else:
            chosen = random_select(len(kept), plan.samples, plan.seed)
        return torch.cat(self.origin)[kept[chosen]]


def features_of(x: Tensor) -> Tensor:
    """A sample as TAP sees it (N, D), float32 on CPU."""
    values = x[0].numel()
    if values > FEATURES and x.ndim >= 4:
        side = max(1, int((FEATURES / (values / (x.shape[-1] * x.shape[-2]))) ** 0.5))
        x = F.adaptive_avg_pool2d(x.flatten(1, -3).float(), side)
    return x.flatten(1).float().cpu()


class Collecting:
    """PREDICT_NOISE: notes every candidate."""

    def __init__(self, candidates: Candidates, run: int):
        self.candidates, self.run, self.call = candidates, run, 0
        candidates.predictions.append({})

    def __call__(self, executor, x, timestep, model_options, seed):
        options, sigma = model_options["transformer_options"], scalar(timestep)
        scale = preserved_scale(sigma, is_flow(executor.class_obj.inner_model))
        features = features_of(x * scale)
        out = executor(x, timestep, model_options, seed)
        found, count, step = self.candidates, len(x), step_at(options["sample_sigmas"].tolist(), sigma)
        found.sigmas = options["sample_sigmas"]
        found.predictions[-1].setdefault(step, features_of(out).flatten())
        found.features.append(features)
        found.steps.append(torch.full((count,), step))
        found.computed.append(torch.full((count,), not is_reused(options)))
        image = torch.arange(count)
        found.origin.append(
            torch.stack([torch.full_like(image, self.run), torch.full_like(image, self.call), image], dim=1)
        )
        self.call += 1
        return out


class Observing:
    """PREDICT_NOISE and APPLY_MODEL of the second pass: gathers the inputs of the layers that run on chosen samples."""

    def __init__(self, layers: Sequence[tuple[str, nn.Linear]], statistics: dict[str, LayerStatistics], chosen: Tensor):
        self.layers, self.statistics, self.chosen = layers, statistics, chosen
        self.call, self.images = 0, torch.empty(0, dtype=torch.long)

    def predict_noise(self, executor, x, timestep, model_options, seed):
        self.images = self.chosen[self.chosen[:, 1] == self.call, 2]
        self.call += 1
        return executor(x, timestep, model_options, seed)

    def apply_model(self, executor, x, *args, **kwargs):
        if not len(self.images):
            return executor(x, *args, **kwargs)
        conditions = len(args[4].get("uuids", (None,)))
        count = len(x) // conditions
        rows = torch.cat([self.images + i * count for i in range(conditions)]).to(x.device)

        def observe(name: str, inputs: Tensor) -> None:
            if len(inputs) % len(x) == 0:
                inputs = inputs.reshape(len(x), -1, inputs.shape[-1])[rows]
            if not torch.isfinite(inputs).all():
                raise ValueError(f"The inputs of {name} are not finite on the calibration samples; use another seed.")
            self.statistics[name].update(merge_rows(inputs))

        with observed(self.layers, observe):
            return executor(x, *args, **kwargs)


def calibration_steps(plan: Plan, steps: int) -> int:
    """Sampling steps of both passes together."""
    return 2 * steps * len(list(plan.batches()))


def calibrate(
    patcher, settings: Settings, latent: Tensor, plan: Plan, progress: Progress
) -> tuple[dict[str, LayerStatistics], Tensor | None]:
    """Statistics of every linear layer's input, and the distances between steps; latent (1, ...) gives the shape.

    The same trajectories are sampled twice, first to find candidates and then to observe the chosen, so that a layer
    sees exactly what it sees in use: nothing on steps where the cache skips it. Works on any MODEL.
    """
    layers = list(named_linears(patcher.model.diffusion_model, DIT_SKIP if is_dit(patcher) else ()))
    if not layers:
        raise ValueError("This model has no linear layer in full precision to calibrate; wire the unquantized model.")
    candidates = Candidates()
    for run, (seed, size, first) in enumerate(plan.batches()):
        collecting = patcher.clone()
        replace_wrapper(collecting, WRAPPERS.PREDICT_NOISE, KEY, Collecting(candidates, run))
        sample_new(collecting, settings, latent.expand(size, *latent.shape[1:]), seed, progress.step, first)
    chosen = candidates.choose(plan)
    statistics = {name: LayerStatistics.empty(layer.in_features, plan.hessians) for name, layer in layers}
    for run, (seed, size, first) in enumerate(plan.batches()):
        part = chosen[chosen[:, 0] == run]
        if not len(part):
            continue
        observing, watched = Observing(layers, statistics, part), patcher.clone()
        replace_wrapper(watched, WRAPPERS.PREDICT_NOISE, KEY, observing.predict_noise)
        replace_wrapper(watched, WRAPPERS.APPLY_MODEL, KEY, observing.apply_model)
        sample_new(watched, settings, latent.expand(size, *latent.shape[1:]), seed, progress.step, first)
    unseen = [name for name, s in statistics.items() if s.count == 0]
    if unseen:
        raise ValueError(
            f"No chosen sample lies on a step that runs {unseen[0]} ({len(unseen)} layers in all); choose more samples."
        )
    return statistics, candidates.distances()
