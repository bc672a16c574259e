"""Apply Cache under what samplers and other packs do to a run: noise, schedules, pieces that move."""

from __future__ import annotations

import pytest

UNIDENTIFIED = "model calls on parts of the sample that could not be identified were computed"


def test_noise_is_seen_whatever_the_sampler_is_called(run):
    """Against the only definition of noise: another seed gives another image from the same start."""
    for kind, result in run("cache_calls")["noise"].items():
        if "adds noise" not in result:
            assert not result["warnings"] and any("F" in line for line in result["timeline"].values()), kind
            continue
        said = any("adds noise between steps; using order 0" in text for text in result["warnings"])
        assert result["finite"], kind
        if result["adds noise"]:  # a Heun step that churns goes up every time, and computes
            assert said or not result["forecast"], (kind, result)
        else:
            assert result["forecast"] and not said, (kind, result)


def letters(result: dict) -> str:
    (line,) = result["timeline"].values()
    return line


@pytest.mark.parametrize("order", [0, 1])
def test_what_ran_is_what_is_reported_on_any_schedule(run, order):
    found = {name: r for name, r in run("cache_calls")["schedules"].items() if name.endswith(f"order {order}")}
    for name, result in found.items():
        lines = result["timeline"].values()
        assert sum(line.count("C") for line in lines) == result["calls"] == sum(result["computed"]), name
        assert result["error"] < 0.5, name
    f = "F" if order else "R"
    plain = f"CRC{f}C{f}C{f}C{f}"
    assert letters(found[f"plain, order {order}"]) == plain
    assert letters(found[f"flipped, order {order}"]) == plain and found[f"flipped, order {order}"]["calls"] == 5
    assert letters(found[f"partial, order {order}"]) == plain[:7]
    left_out = found[f"leaving out, order {order}"]
    assert letters(left_out)[1] == letters(left_out)[5] == "." and left_out["not visited"] == 2
    assert letters(found[f"one step, order {order}"]) == "C"
    assert not found[f"no step, order {order}"]["timeline"] and not found[f"empty, order {order}"]["timeline"]
    again = letters(found[f"restarting, order {order}"])
    assert len(again) == 10 + 6 and "." not in again
    pack = found[f"noisy of a pack, order {order}"]
    assert "F" not in letters(pack) and bool(pack["warnings"]) == bool(order)


def test_the_error_budget_survives_a_restart_and_a_flipped_schedule(run):
    for computed, calls, finite in run("cache_calls")["budget"].values():
        assert computed == calls and finite


def test_a_guider_used_twice(run):
    assert all(run("cache_calls")["used twice"].values())


def test_no_piece_gets_features_of_another(run):
    """Pieces that stay are reused in any order; those that moved are computed."""
    for name, result in run("cache_calls")["pieces"].items():
        assert result["foreign"] == 0 and result["finite"], name
        if "moving False" in name:
            assert result["reused"] > 0 and not result["warnings"], name
    still = [r["reused"] for n, r in run("cache_calls")["pieces"].items() if "moving False" in n]
    assert still == [40, 40, 20, 20, 10, 10, 10, 10]


def test_guidance_on_another_sample_keeps_its_own_or_is_computed(run):
    """A scaled or noised sample still shows the sampler's; one that does not is computed, and that is said once."""
    for name, result in run("cache_calls")["degraded"].items():
        known = name != "unrelated"
        third = "CR" * 5 if known else "C" * 10
        assert result["timeline"] == {"positive": "CR" * 5, "negative": "CR" * 5, "positive #2": third}, name
        assert result["warnings"] == ([] if known else [UNIDENTIFIED]) and result["calls"] == 5 + third.count("C")


def test_context_windows_that_move_keep_their_own(run):
    result = run("cache_calls")["windows that move"]
    assert result["foreign"] == 0 and result["windows"] > 3 and result["steps"] == 10
    assert result["reused"] == result["expected"] > 0
