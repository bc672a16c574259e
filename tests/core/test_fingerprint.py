"""One model is known in every precision, and another is told apart."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qandc_core import SamplingConfig
from qandc_core.calibration.file import Calibration, load_calibration
from qandc_core.calibration.fingerprint import Fingerprint, fingerprint_tensors, same_model

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def weights(seed=0, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    made = {f"blocks.{i}.weight": torch.randn(64, 48, generator=generator) * scale for i in range(40)}
    made |= {f"blocks.{i}.bias": torch.randn(64, generator=generator) * 10 ** (-i / 4) for i in range(40)}
    return {**made, "count": torch.tensor(7), "empty": torch.zeros(0)}


def cast(tensors, *dtypes):
    for dtype in dtypes:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    return tensors


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one", PRECISIONS)
@pytest.mark.parametrize("other", PRECISIONS)
def test_one_file_in_every_pair_of_precisions(stored, one, other):
    source = cast(weights(), stored)
    ours, theirs = (fingerprint_tensors(cast(source, dtype)) for dtype in (one, other))
    assert same_model(ours, theirs) and same_model(theirs, ours)


@given(st.lists(st.floats(-70000, 70000, width=32), min_size=1, max_size=64))
@settings(max_examples=200, deadline=None)
def test_any_values_survive_every_precision(values):
    source = {"w": torch.tensor(values)}
    found = [fingerprint_tensors(cast(source, dtype)) for dtype in PRECISIONS]
    assert all(same_model(a, b) for a in found for b in found)


@pytest.mark.parametrize("one", PRECISIONS)
@pytest.mark.parametrize("other", PRECISIONS)
def test_another_model_is_told_apart_in_every_pair_of_precisions(one, other):
    ours, theirs = fingerprint_tensors(cast(weights(0), one)), fingerprint_tensors(cast(weights(1), other))
    assert not same_model(ours, theirs)


@pytest.mark.parametrize(
    ("precision", "change"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.02)]
)
def test_a_fine_tuned_model_is_told_apart_beyond_the_rounding(precision, change):
    tuned = {k: v * (1 + change) if v.is_floating_point() else v for k, v in weights().items()}
    assert not same_model(fingerprint_tensors(weights()), fingerprint_tensors(cast(tuned, precision)))


def test_other_names_shapes_and_integers():
    source = weights()
    half = cast(source, torch.float16)
    found = fingerprint_tensors(source)
    renamed = {k.replace("blocks.3", "layers.3"): v for k, v in half.items()}
    transposed = {k: v.T if v.ndim == 2 else v for k, v in half.items()}
    for other in (renamed, transposed, {**half, "count": torch.tensor(8)}, {}):
        assert not same_model(found, fingerprint_tensors(other))


def test_fingerprints_of_before_are_compared_by_their_hash():
    found = fingerprint_tensors(weights())
    assert same_model(str(found), found) and same_model(found, str(found)) and len(found) == 32
    assert not same_model("0" * 32, found)
    assert not same_model(str(found), fingerprint_tensors(cast(weights(), torch.float16)))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda f: pickle.loads(pickle.dumps(f))])  # noqa: S301
def test_a_copy_keeps_the_sketch(copied):
    found = fingerprint_tensors(weights())
    again = copied(found)
    assert again == found and again.sketch == found.sketch and json.loads(json.dumps(again)) == found


def test_a_calibration_file_knows_its_model_in_another_precision(tmp_path):
    path = tmp_path / "calibration.safetensors"
    Calibration(fingerprint_tensors(cast(weights(), torch.bfloat16))).save(path)
    found = load_calibration(path)
    found.check_fingerprint(fingerprint_tensors(cast(weights(), torch.float16)))
    with pytest.raises(ValueError, match="made for another model"):
        found.check_fingerprint(fingerprint_tensors(cast(weights(1), torch.float16)))
    assert isinstance(found.model, Fingerprint)


# The schedule that a calibration belongs to.

LEVELS = (14.6, 6.0, 2.5, 0.9, 0.0)


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        (LEVELS, ""),
        ([level * 1.01 for level in LEVELS], ""),
        (LEVELS[1:], "made for 4 steps and this run has 3"),
        ((2.0, 1.5, 1.0, 0.5, 0.0), "another part of the schedule"),
        ((14.6, 8.0, 2.5, 0.9, 0.0), "noise level 6 at step 1, 8 in this run"),
        ((14.6, 6.0, 2.5, 0.9, 0.4), "another part of the schedule"),
    ],
)
def test_a_run_on_another_part_of_the_schedule(levels, words, tmp_path):
    made = Calibration("model", notes={"sigmas": list(LEVELS)})
    made.save(tmp_path / "c.safetensors")
    for calibration in (made, load_calibration(tmp_path / "c.safetensors")):
        found = calibration.schedule_mismatch(levels)
        assert words in found and bool(found) == bool(words)


def test_files_that_do_not_say_their_levels():
    old = Calibration("model", distances=torch.zeros(4, 4))
    assert not old.schedule_mismatch(LEVELS) and old.schedule_mismatch(LEVELS[1:])
    config = SamplingConfig(steps=4)
    ours = Calibration("model", sampling=config)
    assert not ours.schedule_mismatch(config.schedule().sigmas) and ours.schedule_mismatch(LEVELS)


@pytest.mark.parametrize(
    ("notes", "words"),
    [
        ({"distances": "cache"}, "made with a cache; calibrate without a cache"),
        ({"distances": "steps", "sampler": "dpm_adaptive"}, "dpm_adaptive does not evaluate the model at every step"),
        ({}, "made with a cache"),
    ],
)
def test_why_there_are_no_distances(notes, words):
    found = Calibration("model", notes=notes).missing_distances
    assert words in found and "\n" not in found
