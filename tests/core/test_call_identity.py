"""Which part of the sample a call was given, and which patches it ran with."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qandc_core.caching.frame import Frame
from qandc_core.caching.identity import WHOLE, area, is_changed, locate, signature
from qandc_core.caching.policies import Plan
from qandc_core.caching.run import SamplingRun

seeds = st.integers(0, 2**31)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gather(whole, piece):
    for dim, indices in zip((0, *range(2, whole.ndim)), piece):
        whole = whole if indices is None else whole.index_select(dim, torch.tensor(list(indices)))
    return whole


@st.composite
def cuts(draw):
    """A sample of 3 to 5 dimensions, and any choice of indices along each but the channels."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    whole = noise(sizes[0], draw(st.integers(1, 4)), *sizes[1:], seed=draw(seeds))
    chosen = [draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6)) for size in sizes]
    return whole, chosen


@given(cuts())
@settings(deadline=None, max_examples=200)
def test_any_windows_tiles_rolls_and_strides_are_found(cut):
    whole, chosen = cut
    piece = locate(gather(whole, chosen), whole)
    found = [list(range(n)) for n in (whole.shape[0], *whole.shape[2:])]
    if piece != WHOLE:
        found = [every if indices is None else list(indices) for every, indices in zip(found, piece)]
    assert found == chosen


@given(cuts(), st.floats(1e-6, 1e3))
@settings(deadline=None)
def test_what_was_changed_has_no_place(cut, change):
    whole, chosen = cut
    part = gather(whole, chosen)
    changed = part + change * noise(*part.shape, seed=1)
    assert torch.equal(changed, part) or locate(changed, whole) is None


@given(cuts())
@settings(deadline=None)
def test_what_stands_in_two_places_has_none(cut):
    whole, chosen = cut
    assert locate(gather(whole, chosen), torch.cat([whole, whole])) in (None, WHOLE)
    assert locate(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8)) is None


@given(st.integers(1, 8), st.integers(1, 8), st.data())
@settings(deadline=None)
def test_an_area_of_the_conditions_is_the_piece_that_is_found(height, width, data):
    top, left = data.draw(st.integers(0, 8 - height)), data.draw(st.integers(0, 8 - width))
    whole = noise(2, 4, 8, 8)
    part = whole[:, :, top : top + height, left : left + width]
    assert locate(part, whole) == area((height, width), (top, left), (8, 8))


def test_a_changed_sample_is_told_from_another():
    whole = noise(2, 4, 8, 8)
    assert all(is_changed(x, whole) for x in (0.9 * whole, whole + 0.3 * noise(2, 4, 8, 8, seed=1)))
    others = (whole.roll(1, -1), whole.roll(1, 0), noise(2, 4, 8, 8, seed=1), whole.flip(-1), whole[:1])
    assert not any(is_changed(x, whole) for x in others)


def test_nothing_is_found_across_channels_or_dimensions():
    whole = noise(1, 4, 8, 8)
    assert locate(whole[:, :2], whole) is None and locate(whole[0], whole) is None
    assert locate(torch.full_like(whole, float("nan")), whole) is None


def guidance(scale, other=None):
    def replace(x):
        return x * scale if other is None else other

    return replace


def test_closures_made_anew_are_the_same_patch_and_their_values_tell_them_apart():
    layers = {"dit": {("double_block", 1): guidance(0.5)}}
    again = {"dit": {("double_block", 1): guidance(0.5)}}
    assert signature(layers) == signature(again)
    others = [guidance(0.7), guidance(0.5, torch.ones(1)), len, None]
    found = {signature({"dit": {("double_block", 1): other}}) for other in others}
    found |= {signature({"dit": {("double_block", 2): guidance(0.5)}}), signature({}), signature(layers)}
    assert len(found) == 7


# A run over pieces in any order


def pieces_run(seed, moving, swapped, reps=12):
    """Euler over frames in overlapping windows: what every window was given, in a run that reuses every other step."""
    generator = torch.Generator().manual_seed(seed)
    run = SamplingRun(Plan(reps, 0, set(range(0, reps, 2))), [float(s) for s in range(reps, -1, -1)])
    x, wrong, reused = noise(14, 3, 4, 4, seed=seed), 0, 0
    for step in range(reps):
        run.begin_prediction(float(reps - step))
        run.sample = x
        starts = [(step % 4 if moving else 0) + first for first in (0, 3, 6)]
        order = torch.randperm(3, generator=generator).tolist() if swapped else range(3)
        denoised = torch.zeros_like(x)
        for at in order:
            frames = slice(starts[at], starts[at] + 4)
            call = run.identify(x[frames], [("prompt", 0)], ())
            cache = run.place(x, call)
            label = torch.full((4, 3, 4, 4), float(starts[at]))
            value = cache.recall("denoised") if cache.run.reusing else label
            if not cache.run.reusing and cache.needs(run.step):
                cache.store("denoised", label)
            wrong += not torch.equal(value, label)
            reused += cache.run.reusing
            run.record(cache, call)
            denoised[frames] += value
        run.end_prediction(denoised)
        x = x + 0.1 * (x - denoised)
    return wrong, reused, run


@given(seeds, st.booleans(), st.booleans())
@settings(deadline=None, max_examples=30)
def test_a_window_never_gets_features_of_another(seed, moving, swapped):
    wrong, reused, run = pieces_run(seed, moving, swapped)
    assert wrong == 0
    assert reused == 0 if moving else reused == 3 * 6
    assert set("".join(run.timeline.values())) == (set("C.") if moving else set("CR"))
    assert not run.warnings


def run_of(steps, *, order=0, sigmas=None):
    return SamplingRun(Plan(len(steps), order, set(steps)), sigmas or [float(s) for s in range(len(steps), -1, -1)])


def one_call(run, sigma, x, given_x, conditions=(("prompt", 0),), state=(), value=1.0):
    run.begin_prediction(sigma)
    run.sample = x
    call = run.identify(given_x, list(conditions), state)
    cache = run.place(given_x, call)
    if not cache.run.reusing and cache.needs(run.step):
        cache.store("denoised", torch.full((len(conditions),), value))
    run.record(cache, call)
    run.end_prediction(x)
    return cache.run.reusing


def test_a_changed_sample_is_computed_and_said_once():
    run = SamplingRun(Plan(6, 0, {0}), [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    x = noise(1, 3, 4, 4)
    assert not any(one_call(run, 6.0 - i, x, x + 1) for i in range(6))
    assert run.warnings == ["model calls on parts of the sample that could not be identified were computed"]
    assert run.timeline == {"positive": "CCCCCC"} and run.num_bytes == 0


def test_a_condition_without_an_id_is_computed():
    run = SamplingRun(Plan(3, 0, {0}), [3.0, 2.0, 1.0, 0.0])
    x = noise(1, 3, 4, 4)
    assert not any(one_call(run, 3.0 - i, x, x, [(None, 0)]) for i in range(3)) and len(run.warnings) == 1


def test_a_condition_evaluated_again_needs_a_difference():
    """Once it was seen that nothing tells the two apart, both compute; with other patches both reuse."""
    for states, reuse in (((1, 2), True), ((1, 1), False)):
        run = SamplingRun(Plan(3, 0, {0}), [3.0, 2.0, 1.0, 0.0])
        x, found = noise(1, 3, 4, 4), []
        for step in range(3):
            run.begin_prediction(3.0 - step)
            run.sample = x
            for number, state in enumerate(states):
                call = run.identify(x, [("prompt", 0)], state)
                cache = run.place(x, call)
                if not cache.run.reusing and cache.needs(run.step):
                    cache.store("denoised", torch.full((1,), float(number)))
                found.append(cache.recall("denoised").item() == number if cache.run.reusing else None)
                run.record(cache, call)
            run.end_prediction(x)
        assert found == [None, None, *[True if reuse else None] * 4]
        assert len(run.warnings) == (not reuse)


def test_tiles_that_a_pack_batched_anew_keep_their_place():
    """Tiles of both conditions in one batch, in another order at every step."""
    run = SamplingRun(Plan(4, 0, {0}), [4.0, 3.0, 2.0, 1.0, 0.0])
    whole, conditions = noise(1, 3, 4, 8), [("a", 0), ("b", 1)]
    tiles = {0: whole[..., :4], 1: whole[..., 4:]}
    for step in range(4):
        run.begin_prediction(4.0 - step)
        run.sample = whole
        run.frame = Frame(dict.fromkeys(conditions, ()), dict.fromkeys(conditions, whole))
        for at in (0, 1) if step % 2 else (1, 0):
            x = torch.cat([tiles[at], tiles[at]])
            call = run.identify(x, conditions, (), trusted=False)
            cache = run.place(x, call)
            if not cache.run.reusing:
                cache.store("denoised", torch.tensor([at, at + 10.0]))
            assert cache.run.reusing == (step > 0)
            assert cache.recall("denoised").tolist() == [at, at + 10]
        run.end_prediction(whole)


def test_a_frame_whose_input_was_rolled_is_not_believed():
    run = SamplingRun(Plan(2, 0, {0}), [2.0, 1.0, 0.0])
    whole, condition = noise(1, 3, 4, 8), ("a", 0)
    run.begin_prediction(2.0)
    run.sample, run.frame = whole, Frame({condition: ()}, {condition: whole})
    assert run.identify(whole.roll(1, -1), [condition], (), trusted=False).keys[0][3] == (None, None, (7, *range(7)))
    assert run.identify(whole, [condition], (), trusted=False).keys[0][3] == ()
