"""Measurements that several processes share out: no row is lost, none is measured twice, and a failure is told."""

import json

import pytest

from benchmarks.caching import shared


def by_number(row):
    return row["number"]


@pytest.mark.parametrize("jobs", [1, 3])
def test_processes_take_each_unit_once_and_keep_all_rows(tmp_path, jobs):
    file = tmp_path / "rows.json"
    shared.keep(file, [{"number": 3, "from": "before"}, {"number": 99}], by_number)
    log = tmp_path / "log"

    def work(number):
        with log.open("a") as lines:
            lines.write(f"{number}\n")
        shared.keep(file, [{"number": number}], by_number)

    shared.in_turns(range(20), work, jobs, 60)
    assert sorted(map(int, log.read_text().split())) == list(range(20))
    rows = shared.read(file)
    assert sorted(map(by_number, rows)) == [*range(20), 99]
    assert [by_number(row) for row in rows[:2]] == [3, 99] and "from" not in rows[0]
    assert all(row["machine"] == shared.machine() for row in rows)


def test_the_others_are_measured_where_one_fails_and_none_begins_after_the_time(tmp_path):
    file = tmp_path / "rows.json"

    def work(number):
        shared.keep(file, [{"number": 12 // number}], by_number)

    with pytest.raises(RuntimeError, match="measurements failed"):
        shared.in_turns([0, 1, 2], work, 1, 60)
    assert [row["number"] for row in shared.read(file)] == [12, 6]
    shared.in_turns([3], work, 2, 0)
    assert len(json.loads(file.read_text())) == 2


def test_names_are_chosen_by_their_parts():
    assert shared.chosen("flow, euler", "") and shared.chosen("flow, euler", "ddim;euler")
    assert not shared.chosen("flow, euler", "ddim")
