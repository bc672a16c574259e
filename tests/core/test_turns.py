"""Runs that take turns: the order of their work, and what is left when one of them fails."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qandc_core.compensation.fit import JointFit, SequentialFit
from qandc_core.compensation.turns import Turns


@given(st.integers(1, 5), st.integers(0, 4))
def test_no_run_passes_a_wait_before_all_have_come_to_it(count, waits):
    turns, order = Turns(), []

    def run(number):
        for stage in range(waits + 1):
            order.append((stage, number))
            if stage < waits:
                turns.wait()

    turns.take([lambda number=number: run(number) for number in range(count)])
    # one run alone does not wait, so its stages follow each other
    assert order == [(stage, number) for stage in range(waits + 1) for number in range(count)]


def test_only_one_runs_at_a_time_in_inference_mode():
    turns, inside, seen = Turns(), [], []

    def run():
        for _ in range(3):
            inside.append(1)
            seen.append((len(inside), torch.is_inference_mode_enabled()))
            inside.pop()
            turns.wait()

    turns.take([run] * 4)
    assert seen == [(1, True)] * 12


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_a_failure_ends_the_others_and_is_raised(error):
    turns, cleaned, threads = Turns(), [], threading.active_count()

    def run(number):
        try:
            turns.wait()
            if number == 1:
                raise error
            turns.wait()
            raise AssertionError("not reached")
        finally:
            cleaned.append(number)

    with pytest.raises(type(error)) as raised:
        turns.take([lambda number=number: run(number) for number in range(3)])
    assert raised.value is error and sorted(cleaned) == [0, 1, 2]
    assert threading.active_count() == threads
    turns.wait()  # nothing takes turns: it returns


def test_a_joint_fit_is_the_fit_of_all_samples_together():
    generator = torch.Generator().manual_seed(0)
    x, xh = (torch.randn(3, 6, 2, 4, 4, generator=generator) for _ in range(2))  # steps, images, channels
    sigmas = [3.0, 2.0, 1.0]
    whole = SequentialFit(3)
    for step, sigma in enumerate(sigmas):
        whole.step(sigma, [(x[step], xh[step])])
    turns, fit = Turns(), SequentialFit(3)
    joint = JointFit(fit, turns.wait)

    def run(images):
        for step, sigma in enumerate(sigmas):
            found = [joint.step(step, sigma, lambda step=step: (x[step][images], xh[step][images])) for _ in range(2)]
            assert torch.equal(found[0][1], found[1][1])  # evaluated again

    turns.take([lambda images=images: run(images) for images in (slice(0, 4), slice(4, 5), slice(5, 6))])
    for ours, theirs in zip(fit.result().factor, whole.result().factor):
        assert torch.allclose(ours, theirs, rtol=1e-6)
