"""How long work still takes, and words for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qandc_core.sampling.remaining import APART, Estimate, Remaining, about, duration


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


def test_each_kind_of_work_has_a_pace_of_its_own():
    clock = Clock()
    work = Estimate({"layers": 10, "calls": 4}, clock)
    assert work.left == 0 and work.fraction == 0
    clock.time += 6
    work.did("calls", 1)
    assert work.left == pytest.approx(18) and work.fraction == pytest.approx(0.25)
    clock.time += 30
    work.did("layers", 2)
    assert work.left == pytest.approx(18 + 8 * 15) and work.words() == "about 2 minutes left"
    for _ in range(4):
        clock.time += 30
        work.did("layers", 2)
    assert work.left == pytest.approx(18) and work.words() == "about 20 seconds left"
    clock.time += 18
    work.did("calls", 3)
    assert work.left == 0 and work.fraction == 1


def test_more_work_than_expected():
    clock = Clock()
    work = Estimate({"layers": 1}, clock)
    for _ in range(3):
        clock.time += 1
        work.did("layers", 1)
    assert work.left == 0 and work.fraction == 1


def test_no_work_takes_no_time():
    work = Estimate({"layers": 1}, Clock())
    work.did("layers", 1)
    assert (work.left, work.fraction) == (0, 0)
