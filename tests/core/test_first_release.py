"""Files of 0.1.0 work for ever: what its code saved loads, and samples what it sampled then.

A tiny DiT, the calibration that its command line made of it (6 steps of ddim, guidance 1.5, `--cache-interval 2
--optimal-steps --pairs 8`), and the images that it sampled: in full precision, and with W8A8, cache and compensation.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qandc_core import apply_cache_to_dit, generate, load_calibration, load_dit, quantize_model
from qandc_core.models.layers import DIT_SKIP
from qandc_core.numerics import relative_error

FOLDER = Path(__file__).parent / "first_release"
RUN = dict(class_labels=[0, 1, 2, 3], steps=6, cfg_scale=1.5, sampler="ddim", seed=7)


@pytest.fixture(scope="module")
def images():
    return load_file(FOLDER / "images.safetensors")


def test_full_precision_samples_as_then(images):
    found, _ = generate(load_dit(FOLDER / "dit.safetensors"), **RUN)
    assert relative_error(found, images["full"]) < 1e-5


def test_a_calibration_file_accelerates_as_then(images, tmp_path):
    model, calibration = load_dit(FOLDER / "dit.safetensors"), load_calibration(FOLDER / "calibration.safetensors")
    calibration.check_model(model)
    quantize_model(model, 8, 8, DIT_SKIP, calibration)
    apply_cache_to_dit(model, steps=calibration.schedule)
    found, report = generate(model, **RUN, compensation=calibration.variance)
    assert report.computed == [step in (0, 4, 5) for step in range(6)] and calibration.schedule == (0, 4, 5)
    assert relative_error(images["fast"], images["full"]) > 1e-2 and relative_error(found, images["fast"]) < 1e-4


def test_a_calibration_file_survives_being_saved_anew(tmp_path):
    old = load_calibration(FOLDER / "calibration.safetensors")
    old.save(tmp_path / "new.safetensors")
    before, after = (load_file(path) for path in (FOLDER / "calibration.safetensors", tmp_path / "new.safetensors"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert load_calibration(tmp_path / "new.safetensors").sampling == old.sampling
