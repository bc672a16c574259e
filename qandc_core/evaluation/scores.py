"""Every metric of one run with its error, summed up over the seeds, and the interval of a paired difference."""

from __future__ import annotations

from dataclasses import dataclass

import scipy.stats
import torch
from torch import Tensor

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

Score = tuple[float, float | None]  # value and its standard error within the run


def per_image(values: Tensor) -> Score:
    return float(values.double().mean()), standard_error(values)


@dataclass(frozen=True)
class Judged:
    """One run: every metric with its error over the images, and the values (N,) of those that each image has."""

    scores: dict[str, Score]
    values: dict[str, Tensor]


def judge(judge: Judge, samples: Tensor, labels: Tensor, full: Tensor) -> Judged:
    """All metrics of one run; `full` are the full-precision samples with the same noise."""
    images, reference = judge.decode(samples), judge.decode(full)
    seen, real = judge(images), judge.reference
    values = {
        "psnr": psnr(images.clamp(-1, 1), reference.clamp(-1, 1)).clamp(max=100),
        "relative_l2": relative_l2(samples, full),
    }
    distance = FeatureStatistics.of(seen.features).frechet(real.statistics)
    scores: dict[str, Score] = {
        "frechet_distance": (distance, distance_error(seen.features, real.statistics)),
        "inception_score": (inception_score(seen.probabilities).mean, None),
    }
    if seen.spatial is not None and real.spatial is not None:
        scores["spatial_frechet_distance"] = (FeatureStatistics.of(seen.spatial).frechet(real.spatial), None)
    else:
        values["class_accuracy"] = 100.0 * (seen.probabilities.argmax(1) == labels)
    scores |= {name: per_image(found) for name, found in values.items()}
    if real.features is not None:
        both = precision_recall(real.features, seen.features)
        scores |= {"precision": (both.precision, None), "recall": (both.recall, None)}
    return Judged(scores, values)


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


def interval(differences: Tensor, confidence: float = 0.95) -> dict[str, float]:
    """Mean of the values (N,) and the interval that Student's t gives it."""
    mean, error = float(differences.mean()), standard_error(differences) or 0.0
    reach = float(scipy.stats.t.ppf((1 + confidence) / 2, len(differences) - 1)) * error
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


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
