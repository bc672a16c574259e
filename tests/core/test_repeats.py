"""Runs that are measured again in turns, and what Compare says of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qandc_core.evaluation.comparison import ComparedRun, comparison_rows, run_comparison, sampled_in_turns
from qandc_core.evaluation.figure import DARK, LIGHT, MARGIN, THEMES, difference, to_pil
from qandc_core.evaluation.panels import full_size
from qandc_core.evaluation.repeats import MeasuredSpeedup, in_turns
from qandc_core.sampling.report import RunReport, joined

SECONDS = st.lists(st.floats(0.01, 100), min_size=1, max_size=9)


def report(seconds, **values) -> RunReport:
    return RunReport("euler", len(seconds), 1, 1.5, "cpu", list(seconds), [True] * len(seconds), **values)


def images(seed=0, count=2, height=16, width=16):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Turns


def test_rounds_turn_and_the_first_does_not_count():
    order, clock = [], count()

    def run(name):
        def sample():
            order.append(name)
            return float(next(clock))

        return sample

    times = in_turns([run("a"), run("b"), run("c")], 3)
    assert "".join(order) == "abccbaabccba"
    assert times == [[5.0, 6.0, 11.0], [4.0, 7.0, 10.0], [3.0, 8.0, 9.0]]


@given(st.floats(0.0, 0.2), st.floats(1.0, 4.0))
def test_a_machine_that_drifts_slows_both_runs_alike(drift, faster):
    """Each sampling is `drift` slower than the one before; measured one after the other the runs would differ by it."""
    done = count()

    def run(seconds):
        return lambda: seconds * (1 + drift * next(done))

    found = MeasuredSpeedup.of(*in_turns([run(faster), run(1.0)], 6))
    after = [faster * (1 + drift * i) for i in range(7)], [1 + drift * i for i in range(7, 14)]
    apart = MeasuredSpeedup.of(*(times[1:] for times in after))
    assert abs(found.median / faster - 1) <= max(0.01, abs(apart.median / faster - 1) / 2)
    assert found.low <= found.median <= found.high


@given(SECONDS)
def test_equal_times_are_no_speedup(times):
    found = MeasuredSpeedup.of(times, times)
    assert (found.median, found.low, found.high, found.rounds) == (1.0, 1.0, 1.0, len(times))


def test_a_range_stands_beside_every_speedup_of_rounds():
    assert str(MeasuredSpeedup.of([2.0, 3.0, 2.2], [1.0, 1.0, 2.0])) == "2.00x (1.10-3.00)"
    assert str(MeasuredSpeedup.of([2.0], [1.0])) == "2.00x"
    with pytest.raises(ValueError):
        MeasuredSpeedup.of([1.0, 2.0], [1.0])


# Compare


class Replay:
    """Samples again: ticks for every step, and takes as long as `seconds` says, the last for ever."""

    def __init__(self, *seconds):
        self.seconds, self.calls = seconds, 0

    def __call__(self, tick):
        taken = self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1
        for _ in range(2):
            tick()
        return report([taken / 2, taken / 2])


def measured(label, images, replay, seconds=(9.0, 1.0), **values):
    return ComparedRun(label, images, report(seconds, replay=replay, **values))


def test_rounds_replace_the_times_of_the_runs_as_they_were():
    slow, fast = Replay(50.0, 4.0, 4.4, 4.2), Replay(60.0, 2.0, 2.2, 2.0)
    runs = [measured("full", images(), slow), measured("fast", images(1), fast), ComparedRun("other", images(2))]
    seen = []
    again = sampled_in_turns(runs, 3, lambda done, total: seen.append((done, total)))
    assert (slow.calls, fast.calls) == (4, 4) and seen == [(i + 1, 16) for i in range(16)]
    rows = comparison_rows(again)
    assert [row["time s"] for row in rows] == ["4.20", "2.00", "-"]
    assert rows[1]["speedup"] == "2.00x (2.00-2.10)" and rows[2]["speedup"] == "-"
    text = run_comparison(again)[1]
    assert "**fast: 2.00x (2.00-2.10) as fast, range of the rounds, PSNR" in text.splitlines()[0]
    assert "median of 3 interleaved rounds after a warm-up" in text
    single = run_comparison(runs)[1]
    assert "1.00x as fast, one run each" in single and "one run each, the set-up of the first included" in single


def test_a_run_that_cannot_be_sampled_again_keeps_its_time():
    runs = [measured("full", images(), Replay(1.0)), ComparedRun("fast", images(), report([0.5, 0.25]))]
    again = sampled_in_turns(runs, 2)
    assert len(again[0].rounds) == 2 and again[1] == runs[1]
    assert comparison_rows(again)[1]["speedup"] == "1.33x"


def test_cancelling_ends_the_turns():
    def cancel(done, total):
        raise KeyboardInterrupt

    runs = [measured("full", images(), first := Replay(1.0)), measured("fast", images(), second := Replay(1.0))]
    with pytest.raises(KeyboardInterrupt):
        sampled_in_turns(runs, 2, cancel)
    assert (first.calls, second.calls) == (1, 0)


@pytest.mark.parametrize(
    "levels, told",
    [([10.0, 5.0, 0.0], False), ([10.001, 5.0, 0.0], False), ([10.0, 6.0, 0.0], True), ([], False), ([10, 0], True)],
)
def test_other_noise_levels_are_another_run(levels, told):
    first = ComparedRun("a", images(), report([1.0, 1.0], sigmas=[10.0, 5.0, 0.0]))
    other = ComparedRun("b", images(), report([1.0, 1.0], sigmas=levels))
    assert ("noise levels" in run_comparison([first, other])[1]) is told


def test_the_function_that_samples_counts_not_how_a_node_calls_it():
    runs = [
        ComparedRun(name, images(), replace(report([1.0]), sampler=name, solver="euler", denoise=None))
        for name in ("euler, normal", "euler")
    ]
    assert "Not the same run" not in run_comparison(runs)[1]


def test_what_is_said_comes_first_and_remarks_name_runs_that_did_not_end():
    parts = joined([report([1.0], solver="euler"), report([2.0, 2.0], finished=False, solver="heun")])
    text = run_comparison([ComparedRun("a", images(), parts), ComparedRun("b", images())], said=["first of all"])[1]
    assert text.startswith("**first of all**\n\n**b: ")
    assert "a: the run did not end" in text and "a: 2 sampler runs, added up" in text


# Several samplers of one sample


def test_runs_of_one_sample_add_up():
    first = report([1.0, 2.0], seed=3, sigmas=[9.0, 4.0, 2.0], cache_bytes=5, peak_memory=7, job="one", denoise=None)
    last = report([4.0], seed=0, sigmas=[2.0, 0.0], cache_bytes=9, warnings=["w"], timeline={"positive": "C"})
    found = joined([first, last])
    assert found.seconds == [1.0, 2.0, 4.0] and found.steps == 3 and found.parts == 2 and found.computed == [True] * 3
    assert found.sigmas == [9.0, 4.0, 2.0, 0.0] and found.seed == 3 and found.sampler == "euler"
    assert (found.cache_bytes, found.peak_memory, found.warnings) == (9, 7, ["w"])
    assert found.timeline == {"run 2, positive": "C"} and found.replay is None
    assert joined([first]) is first
    with pytest.raises(ValueError, match="no run"):
        joined([])


def test_runs_of_one_sample_are_sampled_again_together():
    first, last = Replay(3.0), Replay(5.0)
    found = joined([report([1.0, 1.0], replay=first), report([1.0, 1.0], replay=last)])
    assert found.replay is not None and found.replay(lambda: None).total_seconds == 8.0
    assert (first.calls, last.calls) == (1, 1)
    assert "replay" not in found.to_dict() and found.to_dict()["total_seconds"] == 4.0


# Pictures


def luminance(color):
    """Relative luminance of sRGB, as WCAG 2 defines it."""
    c = np.array(color) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", THEMES)
def test_text_and_curves_can_be_read(name):
    theme = THEMES[name]
    assert min(contrast(color, theme.paper) for color in (theme.ink, theme.muted, theme.warning)) >= 4.5
    assert min(contrast(color, theme.paper) for color in (*theme.series[:4], theme.computed)) >= 3
    assert contrast(theme.computed, theme.reused) >= 2


def test_a_dark_figure_has_no_light_paper():
    runs = [measured(name, images(i), None, seed=i, factors=[[1.0], [1.1]]) for i, name in enumerate("ab")]
    light, dark = (np.asarray(run_comparison(runs, theme=theme)[0]) for theme in (LIGHT, DARK))
    assert light.shape == dark.shape
    assert (dark == DARK.paper).all(-1).mean() > 0.4 and not (dark == LIGHT.paper).all(-1).any()
    assert (light == LIGHT.paper).all(-1).mean() > 0.4 and (dark == DARK.warning).all(-1).any()


@pytest.mark.parametrize("height, width, times", [(333, 210, 1), (70, 90, 2), (32, 32, 6), (180, 180, 1)])
def test_full_size_is_pixel_for_pixel_or_enlarged_by_a_whole_number(height, width, times):
    a, b = images(3, 1, height, width)[0], images(4, 1, height, width)[0]
    sheet = np.asarray(full_size(["a", "b"], [a, b], 2.0))
    tall, wide = height * times, width * times
    top = sheet.shape[0] - 2 * (tall + MARGIN)
    for i, image in enumerate((a, b)):
        left = MARGIN + i * (wide + MARGIN)
        drawn = sheet[top : top + tall, left : left + wide]
        assert np.array_equal(drawn, np.asarray(to_pil(image[None], width)).repeat(times, 0).repeat(times, 1))
    below = sheet[top + tall + MARGIN : top + 2 * tall + MARGIN, left : left + wide]
    shown = np.asarray(to_pil(difference(b[None], a[None], 2.0), width))
    assert np.array_equal(below, shown.repeat(times, 0).repeat(times, 1))


def test_full_size_takes_images_of_other_sizes():
    sheet = full_size(["a", "b b b b b b"], [images(1, 1, 20, 30)[0], images(1, 1, 40, 50)[0]], 4.0, DARK)
    assert sheet.width == 6 * (30 + 50) + 3 * MARGIN and sheet.height >= 6 * 40 + 2 * MARGIN
