"""Paired comparisons, many at once: t tests over images with their own noise, corrected by Holm's method."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from scipy.stats import ttest_1samp

LEVEL = 0.05  # of all comparisons of a table together


@dataclass(frozen=True)
class Difference:
    """Of paired errors, theirs minus ours: positive where we err less."""

    mean: float
    error: float  # standard error
    p: float  # two-sided

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Difference:
        pairs = [b - a for a, b in zip(ours, theirs, strict=True)]
        error = statistics.stdev(pairs) / len(pairs) ** 0.5
        return cls(statistics.mean(pairs), error, float(ttest_1samp(pairs, 0.0).pvalue) if error else 1.0)

    @property
    def beyond(self) -> int:
        """1, -1: better or worse by more than twice the standard error; 0: not."""
        return (self.mean > 2 * self.error) - (self.mean < -2 * self.error)


def significant(found: dict[Hashable, Difference]) -> set[Hashable]:
    """The comparisons that stay when all are judged together (Holm 1979)."""
    kept: set[Hashable] = set()
    for rank, key in enumerate(sorted(found, key=lambda key: found[key].p)):
        if found[key].p > LEVEL / (len(found) - rank):
            break
        kept.add(key)
    return kept
