import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qandc_core.caching.schedule import optimal_schedule
from qandc_core.calibration.distances import relative_distances
from qandc_core.numerics import ratio, ratios, relative_error
from qandc_core.sampling.clock import StepClock, Stopwatch

FINITE = st.floats(0, 1e30)


@given(st.lists(st.tuples(FINITE, st.sampled_from([0.0, 1e-30, 1.0, 7.5])), min_size=1, max_size=5))
def test_the_ratios_of_tensors_are_those_of_numbers(pairs):
    errors, sizes = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs))
    assert ratios(errors, sizes).tolist() == [ratio(error, size) for error, size in pairs]


def test_nothing_lost_from_nothing_is_no_error_and_a_damaged_value_stays_visible():
    zero, one = torch.zeros(2), torch.ones(2)
    assert relative_error(zero, zero) == 0 and relative_error(one, zero) == math.inf
    assert math.isnan(relative_error(torch.tensor([math.nan, 1]), one))
    assert ratios(torch.tensor([math.nan]), torch.tensor([0.0])).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_of_half_precision_are_not_rounded(dtype):
    reference = torch.full((1000,), 300.0, dtype=dtype)  # its norm lies beyond float16
    assert relative_error(reference * 2, reference) == 1


def test_distances_from_a_prediction_that_is_zero_still_place_steps():
    values = torch.stack([torch.zeros(3), torch.zeros(3), torch.ones(3), torch.ones(3)])
    found = relative_distances(values)
    assert found.isfinite().all() and found[0, 1] == 0 and found[2, 3] == 0 and found[2, 1] > 1e6
    assert optimal_schedule(torch.triu(found, diagonal=1), 2) == (0, 2)


def test_the_clocks_agree_on_a_cpu():
    watch, clock = Stopwatch(), StepClock(torch.device("cpu"))
    time.sleep(0.01)
    clock.end()
    assert 0.01 <= clock.latest <= watch.seconds()
