"""Defects of core's EasyCache and LazyCache, each shown on core's own classes, that Apply Cache does not have."""

from __future__ import annotations

import pytest

STEPS = list(range(12))
SCHEDULE = [0, 3, 6, 9]
# Networks that never call the hook that EasyCache is.
WITHOUT_HOOK = {
    "SD 3.5", "SD 3.5 with a ControlNet", "PixArt alpha", "PixArt sigma", "HunyuanDiT", "Mochi",
    "Stable Audio", "Stable Audio 3", "ERNIE-Image", "OmniGen2",
}  # fmt: skip
FLOW = ("Flux", "Qwen-Image", "Lumina 2")


@pytest.mark.parametrize("family", FLOW)
def test_easycache_overwrites_the_sample_that_a_skipped_step_is_taken_from(run, family):
    """In float32 a flow model's network gets the very batch that x - sigma v is taken from; Apply Cache leaves it."""
    core, ours = (run("easycache")[f"overwritten input, {family}"][kind] for kind in ("core", "ours"))
    assert core["changed"] == core["skipped"] > 0 and min(core["errors"]) > 1
    assert ours["changed"] == 0 < ours["skipped"] and max(ours["errors"]) < 1e-6


def test_easycache_skips_all_that_follows_a_change_of_area(run):
    """Its reset sets the estimated change to zero, so no threshold is ever reached; Apply Cache keeps its schedule."""
    found = run("easycache")["another area"]
    assert found["core, one area"] == STEPS
    computed = found["core, another area"]
    assert computed == STEPS[: len(computed)] and len(computed) < 9
    assert found["ours, one area"] == found["ours, another area"] == SCHEDULE


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_both_skip_all_that_follows_a_change_of_resolution(run, node):
    """From the second step at the new size on; Apply Cache computes the first one and keeps its schedule."""
    found = run("easycache")["growing"]
    assert found[f"{node}, one size"] == STEPS
    assert found[f"{node}, growing"] == STEPS[:8]
    assert found["ours, growing"] == sorted([*SCHEDULE, 7])


def test_easycache_never_skips_with_areas_of_two_shapes(run):
    """Every other call resets it, though areas of one shape are skipped; Apply Cache reuses both alike."""
    found = run("easycache")["two areas"]
    assert found["core, one shape"]["skipped"] > 0 == found["core, one shape"]["resets"]
    assert found["core, two shapes"] == {"calls": 24, "skipped": 0, "resets": 12}
    assert found["ours, one shape"]["skipped"] == 8 and found["ours, two shapes"]["skipped"] == 16


@pytest.mark.parametrize("guidance", ["skip-layer guidance", "perturbed-attention guidance"])
def test_easycache_turns_off_guidance_that_predicts_a_condition_twice(run, guidance):
    """The second prediction is answered with the first, at defaults and at a threshold that skips no step.

    Apply Cache computes both on computed steps and reuses each one's own.
    """
    found = run("easycache")[guidance]
    assert min(found["no cache"]["differences"]) > 0.01
    for kind in ("core", "core, never"):
        lost = [difference < 1e-5 for difference in found[kind]["differences"][3:]]
        assert lost.count(True) >= 8
    assert found["ours"]["computed"] == [[i in SCHEDULE] * 2 for i in STEPS]
    assert min(found["ours"]["differences"]) > 0.01


def test_easycache_answers_a_context_window_with_what_it_computed_on_another(run):
    """One condition has one entry for all windows, so at a threshold that skips, the last of three windows begins
    with what another computed. Apply Cache holds every window's own.
    """
    core, ours = (run("easycache")["context windows"][kind] for kind in ("core", "ours"))
    assert core["windows"] == ours["windows"] == 3
    assert core["errors"][0][0] is None
    assert all(latest < 1e-6 for _, latest in core["errors"])
    assert sum(own is not None and own > 0.5 for own, _ in core["errors"]) > len(core["errors"]) / 2
    assert len(ours["errors"]) == 24 and all(own < 1e-5 for own, _ in ours["errors"])


def test_easycache_ends_with_an_error_on_context_windows_of_two_sizes(run):
    """As core makes them where it adds a frame to all but the first; Apply Cache samples them."""
    found = run("easycache")["context windows of two sizes"]
    if "absent" in found:
        pytest.skip(found["absent"])
    assert "must match the size of tensor" in found["core"]
    assert found["no cache"] == STEPS and found["ours"] == SCHEDULE


def test_easycache_does_nothing_on_networks_without_its_hook(run):
    """At a threshold that skips steps of all other families; Apply Cache reuses on all of them."""
    present = {name: layers for name, layers in run("easycache")["layers run"].items() if layers}
    idle = {name for name, layers in present.items() if layers["core"] == layers["no cache"]}
    assert idle == WITHOUT_HOOK & present.keys()
    assert all(layers["core"] < layers["no cache"] for name, layers in present.items() if name not in idle)
    assert all(layers["ours"] < 0.5 * layers["no cache"] for layers in present.values())


@pytest.mark.parametrize("sampler", ["heun", "dpm_2"])
@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_both_report_more_skipped_steps_than_there_are(run, node, sampler):
    """And a speedup below zero, for they count evaluations against steps; Apply Cache reports steps of steps."""
    found = run("easycache")[f"reports, {sampler}"]
    core, ours = found[node], found["ours"]
    assert core["skipped"] > core["steps"] == 12 and core["speedup"] < 0
    assert core["skipped"] == found["evaluations"] - core["ran"]
    assert (ours["skipped"], ours["steps"]) == (8, 12)
    assert ours["ran"] / found["evaluations"] == pytest.approx(4 / 12, abs=0.05)


@pytest.mark.parametrize("family", FLOW)
def test_easycache_shrinks_the_velocity_with_every_skipped_step(run, family):
    """v_t = x_t + v_s - x_s, and x_t - x_s = (t - s) v_s, so v_t = (1 + t - s) v_s; Apply Cache holds v_s."""
    found = run("easycache")[f"velocities, {family}"]
    assert found["EasyCache"] and found["ours"]
    for factor, rest, before, sigma in found["EasyCache"]:
        assert rest < 1e-2 and factor == pytest.approx(1 + sigma - before, abs=2e-3)
    for factor, rest, _, _ in found["ours"]:
        assert rest < 1e-6 and factor == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", FLOW)
def test_lazycache_stretches_the_velocity_with_every_skipped_step(run, family):
    """It holds denoised - x = -s v_s, which the sampler at t divides by t: v_t = s / t v_s; Apply Cache holds v_s."""
    found = run("easycache")[f"velocities, {family}"]
    assert found["LazyCache"]
    for factor, rest, before, sigma in found["LazyCache"]:
        assert rest < 1e-6 and factor == pytest.approx(before / sigma, rel=1e-5)
