import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from benchmarks.calibration.choice import METHODS
from qandc_core import CalibrationConfig, generate, load_dit
from qandc_core.caching.attach import feature_cache
from qandc_core.checkpoints.dit import DEMO
from qandc_core.cli.main import main
from qandc_core.demo.classifier import WEIGHTS, classify, load_classifier
from qandc_core.evaluation import demo
from qandc_core.evaluation.demo import DEMO_SAMPLING, NAIVE, RECOMMENDED, run_demo
from qandc_core.evaluation.variants import balanced_labels

needs_model = pytest.mark.skipif(not DEMO.is_file(), reason=f"{DEMO.name} is not trained yet: qandc_core.demo.train")
DIGITS = 200


# --- the classifier that judges ---------------------------------------------------------------------------------------


def test_the_classifier_knew_97_percent_of_the_digits_held_out_from_it():
    with safe_open(WEIGHTS, "pt") as file:
        accuracy, metadata = file.get_tensor("real.held_out_accuracy"), file.metadata()
    assert accuracy.shape == (1,) and 0.97 <= float(accuracy) <= 1
    assert "MIT" in metadata["data"]


def test_the_classifiers_recorded_features_are_balanced_digits():
    model, real = load_classifier()
    for part in ("held_out", "training"):
        features = real[part]
        assert features.shape[1] == 64 and len(features) >= 2000 and features.isfinite().all()
        found = model.head(features.relu()).argmax(1).bincount(minlength=10) / len(features)
        assert (found - 0.1).abs().max() < 0.03, "MNIST has between 9 and 11 % of every digit"
    assert not model.training and not torch.equal(real["held_out"], real["training"])


def test_classification_does_not_depend_on_the_batch():
    model, _ = load_classifier()
    images = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for few, all_at_once in zip(classify(model, images, batch=3), classify(model, images)):
        torch.testing.assert_close(few, all_at_once, rtol=1e-4, atol=1e-4)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return load_dit("demo")


@pytest.fixture(scope="module")
def digits(model):
    return generate(model, balanced_labels(DIGITS, 10), 20, 2.0, "ddim", seed=0)[0]


@needs_model
def test_shape_of_the_built_in_model(model):
    config = model.config
    assert (config.input_size, config.in_channels, config.num_classes, config.learn_sigma) == (32, 3, 10, False)
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    assert all(p.isfinite().all() for p in model.parameters())


@needs_model
def test_the_file_is_small():
    assert DEMO.stat().st_size <= 16 * 2**20


@needs_model
def test_digits_are_recognised_as_the_class_asked_for(digits):
    assert digits.shape == (DIGITS, 3, 32, 32)
    classifier, _ = load_classifier()
    _, probabilities = classify(classifier, digits)
    right = probabilities.argmax(1) == balanced_labels(DIGITS, 10)
    assert right.double().mean() >= 0.95
    assert right.view(-1, 10).double().mean(0).min() >= 0.75, "a digit that the model cannot write"


@needs_model
def test_digits_look_like_the_training_data(digits):
    # The model overshoots the range at a few strokes, as much without guidance as with it.
    assert digits.isfinite().all() and digits.abs().max() < 2
    assert (digits.abs() <= 1.3).double().mean() > 0.99
    # Ink on black, grey in three equal channels, as the data.
    assert (digits < -0.8).double().mean() > 0.6 and (digits > 0.8).double().mean() > 0.03
    assert float((digits - digits.mean(1, keepdim=True)).square().mean().sqrt()) < 0.1


@needs_model
def test_digits_of_a_class_are_not_all_the_same(digits):
    flat = digits.view(-1, 10, 3 * 32 * 32).transpose(0, 1)
    for images in flat:
        assert torch.pdist(images).min() > 1


@needs_model
def test_guidance_to_no_class_still_draws_digits(model):
    x, _ = generate(model, [model.null_class] * 20, 20, 1.0, "ddim", seed=0)
    classifier, _ = load_classifier()
    _, probabilities = classify(classifier, x)
    assert x.isfinite().all() and len(probabilities.argmax(1).unique()) >= 5


# --- the demonstration ------------------------------------------------------------------------------------------------


def test_the_recommended_settings_are_ones_that_were_measured():
    assert f"{RECOMMENDED.selection}@{RECOMMENDED.time_scale:g}-computed" in METHODS and RECOMMENDED.computed_only
    assert RECOMMENDED.bits == (8, 8) and RECOMMENDED.interval == 3
    assert RECOMMENDED.compensation and NAIVE.compensation is None and NAIVE.selection == "random"
    assert RECOMMENDED.steps == NAIVE.steps == DEMO_SAMPLING.steps == 50


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder, images = tmp_path_factory.mktemp("demo"), 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DEMO_CALIBRATION", CalibrationConfig(trajectories=4, samples=40, clusters=10))
        patch.setattr(demo, "DEMO_PAIRS", 4)
        return folder, images, run_demo(folder, images, 0, lambda text: None)


@needs_model
def test_the_demo_has_four_rows_with_speed_and_quality(result):
    _, images, found = result
    full, naive, ours, fewer = found["rows"]
    assert [full["name"], naive["name"], ours["name"]] == ["full precision", NAIVE.name, RECOMMENDED.name]
    assert fewer["name"] == f"full precision, {fewer['steps']} steps" and fewer["steps"] == fewer["computed_steps"]
    assert [(row["steps"], row["computed_steps"]) for row in (full, naive, ours)] == [(50, 50), (50, 17), (50, 17)]
    assert full["speedup"] == 1 and full["cache_mib"] == 0 and "psnr" not in full
    for row in (naive, ours, fewer):
        assert row["seconds"] > 0 and row["speedup"] == pytest.approx(full["seconds"] / row["seconds"])
        assert row["psnr"] > 5 and 0 < row["ssim"] <= 1 and 0 < row["relative_l2"] < 1
    assert naive["cache_mib"] > 0 and ours["cache_mib"] > 0
    assert all(0 <= row["class_accuracy"] <= 100 for row in found["rows"])
    assert found["images"] == images and found["seed"] == 0 and found["hardware"]["device"]


@needs_model
def test_the_demo_writes_picture_and_reports(result):
    folder, images, found = result
    assert sorted(p.name for p in folder.iterdir()) == ["comparison.png", "report.json", "report.md"]
    assert json.loads((folder / "report.json").read_text()) == found
    lines = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[1:]] == [row["name"] for row in found["rows"]]
    for line, row in zip(lines[1:], found["rows"]):
        assert f"{row['computed_steps']} of {row['steps']}" in line and f"{row['speedup']:.2f}x" in line
    picture = Image.open(folder / "comparison.png")
    assert picture.width > images * 72 and picture.height > 7 * 72
    assert np.asarray(picture).std() > 20


@needs_model
def test_the_demo_reports_the_images_of_the_library(result, model):
    _, images, found = result
    x, _ = generate(model, balanced_labels(images, 10), 50, DEMO_SAMPLING.cfg_scale, DEMO_SAMPLING.sampler, seed=0)
    classifier, _ = load_classifier()
    right = classify(classifier, x)[1].argmax(1) == balanced_labels(images, 10)
    assert found["rows"][0]["class_accuracy"] == pytest.approx(100 * float(right.double().mean()))
    assert feature_cache(model) is None


@needs_model
def test_the_demo_command_says_where_its_results_are(tmp_path, monkeypatch, capsys):
    def fake(folder, images, seed, log):
        assert (images, seed) == (3, 5)
        row = {"name": "full precision", "seconds": 1.0, "speedup": 1.0, "computed_steps": 50, "steps": 50}
        return {"hardware": {"device": "x", "threads": 1}, "images": 3, "rows": [{**row, "class_accuracy": 100.0}]}

    monkeypatch.setattr(demo, "run_demo", fake)
    assert main(["demo", "--images", "3", "--seed", "5", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "| full precision | 1.00 | 1.00x | 50 of 50 |" in said and str(tmp_path / "out" / "comparison.png") in said


def test_a_missing_built_in_model_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qandc_core.checkpoints.dit.DEMO", tmp_path / "digits_dit.safetensors")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("qandc_core demo: no DiT checkpoint at") and said.endswith("install the package again")
    assert not (tmp_path / "out").exists()
