"""Which images a calibration samples: every prompt, each image once, and those that are held out."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from qandc_core.calibration.choice import CalibrationConfig, spread_over_runs

PLANS = st.builds(
    CalibrationConfig,
    trajectories=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    held_out=st.integers(0, 9),
    prompts=st.integers(1, 12),
    rows=st.integers(1, 3),
    seed=st.sampled_from([0, 501, 2**64 - 2]),
)


def numbers(plan, batch):
    return [(batch.first + i) * plan.prompts + batch.prompt for i in range(batch.size)]


@given(PLANS)
def test_every_image_is_sampled_once_and_every_prompt_is_visited(plan):
    batches = list(plan.batches())
    images = [number for batch in batches for number in numbers(plan, batch)]
    assert sorted(images) == list(range(max(plan.trajectories, plan.prompts)))
    assert {batch.prompt for batch in batches} == set(range(plan.prompts))
    assert all(1 <= batch.size <= plan.batch_size for batch in batches)
    assert [batch.seed for batch in batches] == [(plan.seed + i) % 2**64 for i in range(len(batches))]


@given(PLANS)
def test_prompts_have_as_many_images_as_the_others_and_those_held_out_differ(plan):
    batches = list(plan.batches())
    counts = [sum(batch.size for batch in batches if batch.prompt == prompt) for prompt in range(plan.prompts)]
    assert max(counts) - min(counts) <= 1
    apart = batches[len(batches) - plan.apart :]
    assert all(batch.size == 1 for batch in apart) and plan.apart < max(2, len(batches))
    rows = {(batch.prompt, batch.first % plan.rows) for batch in apart}
    several = plan.held_out and plan.images >= 16 and plan.prompts * plan.rows > 1
    assert len(rows) >= min(2, plan.held_out) or not several


@given(PLANS)
def test_of_one_prompt_the_last_image_alone_is_held_out(plan):
    one = replace(plan, prompts=1, rows=1)
    assert one.apart == (one.held_out > 0 and one.trajectories > 1)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 20), st.integers(1, 3))
def test_held_out_calls_are_shared_out_over_the_runs(calls, count, conditions):
    places = [[run, call, 0, conditions] for run, many in enumerate(calls) for call in range(many)]
    found = [tuple(place) for place in spread_over_runs(torch.tensor(places), count).tolist()]
    assert len(found) == len(set(found)) <= count
    each = [sum(place[0] == run for place in found) for run in range(len(calls))]
    share = count // len(calls)
    assert all(min(share, many * conditions) <= got <= share + 1 for got, many in zip(each, calls))
