import pytest

from qandc_core.quantization.estimate import Estimate


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_each_kind_of_work_has_a_pace_of_its_own():
    clock = Clock()
    work = Estimate({"layers": 10, "calls": 4}, clock)
    assert work.left == 0 and work.fraction == 0
    clock.now += 6
    work.did("calls", 1)
    assert work.left == pytest.approx(18) and work.fraction == pytest.approx(0.25)
    clock.now += 30
    work.did("layers", 2)
    assert work.left == pytest.approx(18 + 8 * 15) and work.words() == "about 2 min left"
    for _ in range(4):
        clock.now += 30
        work.did("layers", 2)
    assert work.left == pytest.approx(18) and work.words() == "less than a minute left"
    clock.now += 18
    work.did("calls", 3)
    assert work.left == 0 and work.fraction == 1


def test_more_work_than_expected():
    clock = Clock()
    work = Estimate({"layers": 1}, clock)
    for _ in range(3):
        clock.now += 1
        work.did("layers", 1)
    assert work.left == 0 and work.fraction == 1


def test_no_work_takes_no_time():
    work = Estimate({"layers": 1}, Clock())
    work.did("layers", 1)
    assert (work.left, work.fraction) == (0, 0)
