"""Words for how long work takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qandc_core.sampling.remaining import APART, Remaining, about, duration


@pytest.mark.parametrize(
    ("seconds", "exact", "rough"),
    [
        (0, "0 s", "about 10 seconds"),
        (44, "44 s", "about 40 seconds"),
        (59.6, "1 min 0 s", "about a minute"),
        (80, "1 min 20 s", "about a minute"),
        (250, "4 min 10 s", "about 4 minutes"),
        (3599.7, "1 h 0 min", "about 60 minutes"),
        (7500, "2 h 5 min", "about 2.1 hours"),
        (90000, "25 h 0 min", "about 25 hours"),
    ],
)
def test_words(seconds, exact, rough):
    assert (duration(seconds), about(seconds)) == (exact, rough)


class Clock:
    time = 0.0

    def __call__(self):
        return self.time


@given(st.integers(1, 100), st.integers(2, 9), st.integers(1, 5), st.integers(0, 1000))
def test_an_estimate_is_the_time_of_the_steps_that_are_left(each, steps, runs, loading):
    """Steps of equal length; loading before each run does not count."""
    clock, told, left = Clock(), [], steps * runs
    estimate = Remaining("work", lambda text: told.append((clock.time, text, left)), clock)
    for _ in range(runs):
        clock.time += loading
        estimate.resume()
        for step in range(steps):
            clock.time += each
            left -= 1
            estimate.step(left, last=step + 1 == steps)
    words = [" for work", *[" left of work"] * (len(told) - 1)]
    assert [text for _, text, _ in told] == [about(each * left) + rest for (_, _, left), rest in zip(told, words)]
    assert told[0][2] == steps * runs - 2 and all(left % steps == 0 for _, _, left in told[1:])
    assert all(later - earlier >= APART for (earlier, *_), (later, *_) in zip(told, told[1:]))
