"""The ablation of Q&C: every row starts from the same noise and is judged against real images and full precision."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compensation.correction import VarianceCompensation
from ..diffusion.classes import balanced_labels
from ..diffusion.process import SamplingConfig
from ..distributed import Distributed, all_gather_tensors
from ..models.dit import DiT
from ..sampling.clock import Stopwatch
from ..sampling.generate import sample_images
from .judges import Judge
from .metrics import (
    FeatureStatistics,
    bootstrap_standard_error,
    inception_score,
    precision_recall,
    psnr,
    relative_l2,
    standard_error,
)
from .variants import Variant, Workbench

Log = Callable[[str], None]

MAIN_ROWS = (
    Variant("full precision"),
    Variant("quantization only", bits=(8, 8)),
    Variant("cache only", interval=3),
    Variant("naive both", bits=(8, 8), interval=3),
    Variant("+ VC", bits=(8, 8), interval=3, compensation="variance_match"),
    Variant("+ TAP", bits=(8, 8), interval=3, selection="tap"),
    Variant("+ TAP + VC", bits=(8, 8), interval=3, selection="tap", compensation="variance_match"),
)


def factor_rows() -> list[tuple[str, Variant]]:
    """The other factors, one at a time around TAP + VC: (factor, variant)."""
    base = Variant("W8A8, N = 3, DDPM", bits=(8, 8), interval=3, selection="tap", compensation="variance_match")
    ddim = Variant("full precision, DDIM", sampler="ddim")
    return [
        ("reference", Variant("full precision")),
        ("base", base),
        ("bits", replace(base, name="W4A8", bits=(4, 8))),
        ("bits", replace(base, name="W4A8 GPTQ", bits=(4, 8), rounding="gptq")),
        ("bits", replace(base, name="W4A4", bits=(4, 4))),
        ("activations", replace(base, name="W8A8 dynamic per token", static=False)),
        ("activations", replace(base, name="W4A4 dynamic per token", bits=(4, 4), static=False)),
        ("interval", replace(base, name="N = 5", interval=5)),
        ("granularity", replace(base, name="reuse after the gate (blocks)", reuse="block")),
        ("schedule", replace(base, name="DP-optimal steps, as many", optimal=True)),
        ("forecast", replace(base, name="order-1 forecast", order=1)),
        ("forecast", replace(base, name="order-1 forecast, no VC", order=1, compensation=None)),
        ("VC method", replace(base, name="VC off", compensation=None)),
        ("VC method", replace(base, name="VC paper (regularised)", compensation="paper")),
        ("VC method", replace(base, name="VC least squares", compensation="least_squares")),
        ("VC method", replace(base, name="VC variance match, late half", compensation_start=0.5)),
        ("sampler", ddim),
        ("sampler", replace(base, name="DDIM, no VC", sampler="ddim", compensation=None)),
        ("sampler", replace(base, name="DDIM", sampler="ddim")),
        ("sampler", replace(base, name="DDIM, order-1 forecast", sampler="ddim", order=1)),
    ]


@dataclass(frozen=True)
class Evaluation:
    """Number of images for each seed, the seeds, and the batch size."""

    images: int = 1000
    seeds: tuple[int, ...] = (1, 2, 3)
    batch: int = 125


def sample(
    model: DiT,
    compensation: VarianceCompensation | None,
    config: SamplingConfig,
    count: int,
    batch: int,
    seed: int,
    run: Distributed,
) -> Tensor:
    """Samples (count, C, H, W) for balanced classes, this process's share of them gathered with the others'."""
    labels, parts = balanced_labels(count, model.config.num_classes), []
    shard = run.shard(count, batch)
    for at in range(shard.start, shard.stop, batch):
        part = labels[at : min(at + batch, shard.stop)]
        x, _ = sample_images(model, part, config, seed, compensation=compensation, first_index=at)
        parts.append(x.cpu())
    mine = torch.cat(parts) if parts else torch.empty(0, *generate_shape(model))
    return all_gather_tensors(mine)


def generate_shape(model: DiT) -> tuple[int, int, int]:
    config = model.config
    return (config.in_channels, config.input_size, config.input_size)


Score = tuple[float, float | None]  # value and its standard error within the run


def per_image(values: Tensor) -> Score:
    return float(values.double().mean()), standard_error(values)


def judge(judge: Judge, samples: Tensor, labels: Tensor, full: Tensor) -> dict[str, Score]:
    """All metrics of one run, errors over its images; `full` are the full-precision samples with the same noise."""
    images, reference = judge.decode(samples), judge.decode(full)
    seen, real = judge(images), judge.reference
    finite = psnr(images.clamp(-1, 1), reference.clamp(-1, 1)).clamp(max=100)
    distance = FeatureStatistics.of(seen.features).frechet(real.statistics)
    scores: dict[str, Score] = {
        "frechet_distance": (distance, distance_error(seen.features, real.statistics)),
        "inception_score": (inception_score(seen.probabilities).mean, None),
        "psnr": per_image(finite),
        "relative_l2": per_image(relative_l2(samples, full)),
    }
    if seen.spatial is not None and real.spatial is not None:
        scores["spatial_frechet_distance"] = (FeatureStatistics.of(seen.spatial).frechet(real.spatial), None)
    else:
        scores["class_accuracy"] = per_image(100.0 * (seen.probabilities.argmax(1) == labels))
    if real.features is not None:
        both = precision_recall(real.features, seen.features)
        scores |= {"precision": (both.precision, None), "recall": (both.recall, None)}
    return scores


def distance_error(features: Tensor, real: FeatureStatistics) -> float | None:
    """Bootstrap error of the Frechet distance, where the features are few enough to resample."""
    if features.shape[1] > 128:
        return None
    return bootstrap_standard_error(lambda x: FeatureStatistics.of(x).frechet(real), features, resamples=50)


def summarize(per_seed: list[dict[str, Score]]) -> dict[str, dict[str, float | None]]:
    """Mean over the seeds with its standard error; for a single seed the error within the run."""
    summary: dict[str, dict[str, float | None]] = {}
    for key, (_, within) in per_seed[0].items():
        values = torch.tensor([scores[key][0] for scores in per_seed], dtype=torch.float64)
        error = standard_error(values) if len(values) > 1 else within
        summary[key] = {"mean": float(values.mean()), "standard_error": error}
    return summary


class Experiment:
    """Runs rows, keeping the full-precision samples of every (sampler, seed) for comparison."""

    def __init__(self, bench: Workbench, judge: Judge, evaluation: Evaluation, run: Distributed, log: Log):
        self.bench, self.judge, self.evaluation, self.run, self.log = bench, judge, evaluation, run, log
        self.full: dict[Any, Tensor] = {}

    def full_samples(self, variant: Variant, seed: int) -> Tensor:
        # A run with fewer steps is compared with the full number of steps.
        key = (variant.sampler, self.evaluation.images, seed)
        if key not in self.full:
            config = replace(self.bench.sampling, sampler=variant.sampler)
            size = self.evaluation
            self.full[key] = sample(self.bench.model, None, config, size.images, size.batch, seed, self.run)
        return self.full[key]

    def row(self, variant: Variant, group: str = "main") -> dict[str, Any]:
        watch, size = Stopwatch(), self.evaluation
        model, compensation = self.bench.build(variant)
        config, labels = self.bench.config(variant), balanced_labels(size.images, model.config.num_classes)
        plain = variant.bits is None and variant.interval == 1 and variant.steps == self.bench.sampling.steps
        per_seed = []
        for seed in size.seeds:
            full = self.full_samples(variant, seed)
            samples = full if plain else sample(model, compensation, config, size.images, size.batch, seed, self.run)
            per_seed.append(judge(self.judge, samples, labels, full))
        summary = summarize(per_seed)
        self.log(
            f"{variant.name:32} FD {summary['frechet_distance']['mean']:8.2f}  "
            f"relative L2 {summary['relative_l2']['mean']:.4f}  ({watch.seconds():.0f} s)"
        )
        factors = None if compensation is None else compensation.factor.tolist()
        return {
            "name": variant.name,
            "group": group,
            "variant": asdict(variant),
            "metrics": summary,
            "per_seed": per_seed,
            "factors": factors,
        }


def unfitted_compensation(config: SamplingConfig, channels: int) -> VarianceCompensation:
    """A correction of every step, for timing: fitting takes minutes, and the cost is the same whatever the factors."""
    sigmas = torch.tensor(config.schedule().sigmas[:-1], dtype=torch.float64)
    shape = (len(sigmas), channels)
    return VarianceCompensation(sigmas, torch.zeros(shape), torch.full(shape, 1.001))


def measure_time(
    bench: Workbench, variants: list[Variant], batch: int = 64, repeats: int = 3
) -> dict[str, dict[str, float]]:
    """Wall seconds of one batch for each variant, interleaved so that a slow spell of the machine hits all alike."""
    built = [(v, bench.build(replace(v, compensation=None))[0]) for v in variants]
    labels = balanced_labels(batch, bench.model.config.num_classes)
    seconds: dict[str, list[float]] = {v.name: [] for v in variants}
    for _ in range(repeats):
        for variant, model in built:
            config = bench.config(variant)
            correction = unfitted_compensation(config, model.config.in_channels) if variant.compensation else None
            _, report = sample_images(model, labels, config, seed=99, compensation=correction)
            seconds[variant.name].append(report.total_seconds)
    first = torch.tensor(seconds[variants[0].name])
    return {
        name: {
            "seconds": float(torch.tensor(values).median()),
            "speedup": float((first / torch.tensor(values)).median()),
            "speedup_low": float((first / torch.tensor(values)).min()),
            "speedup_high": float((first / torch.tensor(values)).max()),
        }
        for name, values in seconds.items()
    }


def real_floor(judge: Judge, count: int, draws: int = 3) -> dict[str, float] | None:
    """Frechet distance of `count` other real images, or as many as there are, from the reference, over random draws."""
    features = judge.reference.floor_features
    if features is None:
        return None
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(
        [
            FeatureStatistics.of(features[torch.randperm(len(features), generator=generator)[:count]]).frechet(
                judge.reference.statistics
            )
            for _ in range(draws)
        ]
    )
    return {
        "images": min(count, len(features)),
        "mean": float(values.mean()),
        "standard_error": standard_error(values),
    }


def hardware() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "system": platform.system()}


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run_main(experiment: Experiment, time_batch: int, time_repeats: int) -> dict[str, Any]:
    """The eight main rows; the last, full precision with fewer steps, takes the steps that fit Q&C's measured time."""
    bench, log = experiment.bench, experiment.log
    steps = bench.sampling.steps
    timing = measure_time(
        bench, [replace(v, steps=steps, sampler=bench.sampling.sampler) for v in MAIN_ROWS], time_batch, time_repeats
    )
    for name, values in timing.items():
        log(f"{name:32} {values['seconds']:.2f} s  {values['speedup']:.2f}x")
    # Clocks differ between processes, but all must sample the same number of steps: that of rank 0.
    fewer = int(all_gather_tensors(torch.tensor([max(1, round(steps / timing["+ TAP + VC"]["speedup"]))]))[0])
    rows = [replace(v, steps=steps, sampler=bench.sampling.sampler) for v in MAIN_ROWS]
    rows.append(replace(rows[0], name=f"full precision, {fewer} steps", steps=fewer))
    timing[rows[-1].name] = measure_time(bench, [rows[0], rows[-1]], time_batch, time_repeats)[rows[-1].name]
    return {"rows": [experiment.row(v) for v in rows], "timing": timing}


def run_factors(experiment: Experiment) -> list[dict[str, Any]]:
    steps = experiment.bench.sampling.steps
    return [experiment.row(replace(variant, steps=steps), group) for group, variant in factor_rows()]
