"""What the tables of the cache benchmarks conclude from their rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from benchmarks.caching.comparisons import LEVEL, Difference, significant
from benchmarks.caching.curves import value_at


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_what_his_adjusted_p_values_keep(ps):
    """The adjusted value of p is the largest r, of all r up to p, times how many values are r or more."""
    kept = significant({i: Difference(0.0, 0.0, p) for i, p in enumerate(ps)})
    adjusted = [max(r * sum(q >= r for q in ps) for r in ps if r <= p) for p in ps]
    assert kept == {i for i, value in enumerate(adjusted) if value <= LEVEL}


def test_differences_are_paired():
    ours, theirs = [0.1, 0.2, 0.3, 0.45], [0.15, 0.26, 0.33, 0.5]
    found = Difference.of(ours, theirs)
    assert found.mean == pytest.approx(0.0475) and found.beyond == 1
    assert found.p == pytest.approx(ttest_rel(theirs, ours).pvalue)
    assert Difference.of(theirs, ours).beyond == -1 and Difference.of(ours, ours).beyond == 0


def test_errors_between_two_settings_are_geometric_and_none_lies_outside():
    points = {10.0: 0.1, 20.0: 0.001}
    assert value_at(points, 15.0, 0.75) == pytest.approx(0.01)
    assert value_at(points, 20.5, 0.75) == 0.001 and value_at(points, 22.0, 0.75) is None
