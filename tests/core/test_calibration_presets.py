"""Presets of calibration: more effort is more of everything, within the memory that there is."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qandc_core.calibration.choice import CalibrationConfig
from qandc_core.calibration.memory import plan_statistics
from qandc_core.calibration.presets import CUSTOM, EFFORTS, images_at_once, preset_config, preset_recording
from qandc_core.calibration.recorder import RecordingConfig

GIB = 2**30
# widths of the layers in FLUX's blocks, as many as it has
FLUX = [*[3072] * 228, *[12288] * 38, *[15360] * 38]
sizes = {"width": st.integers(8, 16384), "tokens": st.integers(1, 200_000), "steps": st.integers(1, 100)}
machines = st.integers(8 * GIB, 512 * GIB)


def all_efforts(width, tokens, steps, memory):
    return [preset_config(name, CalibrationConfig(seed=3), width, tokens, steps, memory) for name in EFFORTS]


@given(**sizes, memory=machines)
def test_more_effort_is_never_less_of_anything(width, tokens, steps, memory):
    plans = all_efforts(width, tokens, steps, memory)
    for less, more in zip(plans, plans[1:]):
        for name in ("trajectories", "samples", "tokens", "memory_gb"):
            assert getattr(less, name) <= getattr(more, name), name
    for plan in plans:
        assert plan.hessians and plan.seed == 3
        assert plan.trajectories * steps >= plan.samples
        assert plan.memory_gb <= max(1.5, memory / GIB / 4 + 0.1)


@given(**sizes, memory=machines, name=st.sampled_from(list(EFFORTS)))
def test_wider_layers_want_more_samples_and_larger_ones_fewer(width, tokens, steps, memory, name):
    def samples(width, tokens):
        return preset_config(name, CalibrationConfig(), width, tokens, steps, memory).samples

    assert samples(2 * width, tokens) >= samples(width, tokens) >= samples(width, 2 * tokens)


@pytest.mark.parametrize("system, name", [(16, "quick"), (32, "quick"), (32, "standard"), (64, "thorough")])
def test_statistics_of_a_model_of_twelve_billion_fit(system, name):
    plan = preset_config(name, CalibrationConfig(), 3072, 4096, 20, system * GIB)
    found = plan_statistics(FLUX, int(plan.memory_gb * GIB), plan.tokens, 256)
    assert 64 <= found.tokens <= plan.tokens and found.bytes <= system * GIB / 4


def test_custom_leaves_everything_and_other_names_are_refused():
    plan, runs = CalibrationConfig(samples=17), RecordingConfig(samples=3, tokens=99)
    assert preset_config(CUSTOM, plan, 8, 8, 8, GIB) is plan and preset_recording(CUSTOM, runs, GIB) is runs
    assert preset_recording("thorough", runs, 64 * GIB) == replace(runs, samples=16, tokens=8192, memory_gb=16.0)
    with pytest.raises(ValueError, match="preset must be one of custom, quick, standard, thorough"):
        preset_config("fast", plan, 8, 8, 8, GIB)


@given(st.floats(1e6, 1e12), st.integers(2 * GIB, 192 * GIB), st.sampled_from([1, 16, 64]))
def test_images_at_once_leave_a_small_card_to_the_weights(needed, total, most):
    count = images_at_once(needed, total, most)
    assert 1 <= count <= most and count & (count - 1) == 0
    assert count == 1 or count * needed <= min(2 * GIB, total / 8)
    assert 2 * count > most or 2 * count * needed > min(2 * GIB, total // 8)
    assert images_at_once(needed, 2 * total, most) >= count


def test_a_card_of_12_gigabytes_samples_fewer_images_at_once_than_one_of_24():
    flux = 0.35 * GIB  # activations of an image of 1024 x 1024 by ComfyUI's estimate
    assert [images_at_once(flux, size * GIB, 16) for size in (8, 12, 24, 80)] == [2, 4, 4, 4]
