import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from benchmarks.calibration.choice import METHODS
from benchmarks.training.classes import CLASSES
from benchmarks.training.train import PICTURES_CONFIG
from qandc_core import CalibrationConfig, generate, load_dit
from qandc_core.caching.attach import feature_cache
from qandc_core.checkpoints.dit import DEMO
from qandc_core.cli.main import main
from qandc_core.demo import CLASS_NAMES
from qandc_core.demo.judge import WEIGHTS, classify, load_judge
from qandc_core.evaluation import demo
from qandc_core.evaluation.demo import DEMO_SAMPLING, NAIVE, RECOMMENDED, demo_labels, run_demo
from qandc_core.evaluation.variants import balanced_labels

PICTURES, CLASS_COUNT = 120, len(CLASS_NAMES)


# --- the network that judges ------------------------------------------------------------------------------------------


def test_the_judge_recognises_artists_it_never_saw():
    with safe_open(WEIGHTS, "pt") as file:
        found = {name: float(value) for name, value in file.metadata().items()}
    assert found["held_out_artists"] >= 0.8 and found["spoiled"] >= 0.99 and found["known_drawings"] >= 0.99


def test_the_names_are_those_of_the_classes_that_it_was_trained_on():
    assert CLASS_NAMES == tuple(thing.name for thing in CLASSES)
    assert len(set(CLASS_NAMES)) == PICTURES_CONFIG.num_classes


def test_the_judges_recorded_features_are_balanced_classes():
    model, real = load_judge()
    for part in ("reference", "floor"):
        features = real[part]
        assert features.shape[1] == 64 and len(features) >= 2000 and features.isfinite().all()
        found = model.head(features.relu()).argmax(1).bincount(minlength=CLASS_COUNT) / len(features)
        assert (found[:CLASS_COUNT] - 1 / CLASS_COUNT).abs().max() < 0.01
    assert not model.training and not torch.equal(real["reference"], real["floor"])


def test_what_shows_nothing_is_none_of_the_classes():
    model, _ = load_judge()
    noise = torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert (classify(model, noise)[1].argmax(1) == CLASS_COUNT).double().mean() > 0.9


def test_classification_does_not_depend_on_the_batch():
    model, _ = load_judge()
    images = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for few, all_at_once in zip(classify(model, images, batch=3), classify(model, images)):
        torch.testing.assert_close(few, all_at_once, rtol=1e-4, atol=1e-4)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return load_dit("demo")


@pytest.fixture(scope="module")
def pictures(model):
    return generate(model, balanced_labels(PICTURES, CLASS_COUNT), 15, DEMO_SAMPLING.cfg_scale, "ddim", seed=0)[0]


def test_shape_of_the_built_in_model(model):
    assert model.config == PICTURES_CONFIG
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_files_are_small():
    assert DEMO.stat().st_size + WEIGHTS.stat().st_size <= 16 * 2**20


def test_pictures_are_recognised_as_the_class_asked_for(pictures):
    assert pictures.shape == (PICTURES, 3, 32, 32)
    right = classify(load_judge()[0], pictures)[1].argmax(1) == balanced_labels(PICTURES, CLASS_COUNT)
    assert right.double().mean() >= 0.85  # of 120 after 15 steps; docs/results.md has the figure of 50


def test_pictures_have_colours_and_fill_their_range(pictures):
    assert pictures.isfinite().all() and pictures.abs().max() < 2
    assert (pictures.abs() <= 1.2).double().mean() > 0.99
    assert float((pictures - pictures.mean(1, keepdim=True)).square().mean().sqrt()) > 0.2, "grey"


def test_pictures_of_a_class_are_not_all_the_same(pictures):
    for images in pictures.view(-1, CLASS_COUNT, 3 * 32 * 32).transpose(0, 1):
        assert torch.pdist(images).min() > 5


def test_guidance_to_no_class_still_draws_things(model):
    x, _ = generate(model, [model.null_class] * 20, 15, 1.0, "ddim", seed=0)
    assert x.isfinite().all() and len(classify(load_judge()[0], x)[1].argmax(1).unique()) >= 5


# --- the demonstration ------------------------------------------------------------------------------------------------


def test_the_recommended_settings_are_ones_that_were_measured():
    assert f"{RECOMMENDED.selection}@{RECOMMENDED.time_scale:g}-computed" in METHODS and RECOMMENDED.computed_only
    assert RECOMMENDED.bits == NAIVE.bits == (8, 8) and RECOMMENDED.interval == NAIVE.interval
    assert RECOMMENDED.compensation and NAIVE.compensation is None and NAIVE.selection == "random"
    assert RECOMMENDED.steps == NAIVE.steps == DEMO_SAMPLING.steps == 50


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder, images = tmp_path_factory.mktemp("demo"), 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DEMO_CALIBRATION", CalibrationConfig(trajectories=4, samples=40, clusters=10))
        patch.setattr(demo, "DEMO_PAIRS", 4)
        return folder, images, run_demo(folder, images, 0, lambda text: None)


def test_the_demo_has_four_rows_with_speed_and_quality(result):
    _, images, found = result
    full, naive, ours, fewer = found["rows"]
    assert [full["name"], naive["name"], ours["name"]] == ["full precision", NAIVE.name, RECOMMENDED.name]
    assert fewer["name"] == f"full precision, {fewer['steps']} steps" and fewer["steps"] == fewer["computed_steps"]
    assert [(row["steps"], row["computed_steps"]) for row in (full, naive, ours)] == [(50, 50), (50, 13), (50, 13)]
    assert full["speedup"] == 1 and full["cache_mib"] == 0 and "psnr" not in full
    for row in (naive, ours, fewer):
        low, high = row["speedup_range"]
        assert row["seconds"] > 0 and low <= row["speedup"] <= high
        assert row["psnr"] > 5 and 0 < row["ssim"] <= 1 and 0 < row["relative_l2"] < 1
    for row in (naive, fewer):  # sampled once
        assert row["speedup"] == row["speedup_range"][0] == pytest.approx(full["seconds"] / row["seconds"])
    assert found["repeats"] == 5 and ours["speedup_range"][0] < ours["speedup_range"][1]
    assert naive["cache_mib"] > 0 and ours["cache_mib"] > 0
    assert all(0 <= row["class_accuracy"] <= 100 for row in found["rows"])
    assert found["images"] == images and found["seed"] == 0 and found["hardware"]["device"]


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


def test_the_demo_reports_the_images_of_the_library(result, model):
    _, images, found = result
    labels = demo_labels(images)
    assert [CLASS_NAMES[i] for i in labels] == ["cat", "panda", "penguin", "butterfly"]
    x, _ = generate(model, labels, 50, DEMO_SAMPLING.cfg_scale, DEMO_SAMPLING.sampler, seed=0)
    right = classify(load_judge()[0], x)[1].argmax(1) == labels
    assert found["rows"][0]["class_accuracy"] == pytest.approx(100 * float(right.double().mean()))
    assert feature_cache(model) is None


def test_the_demo_command_says_where_its_results_are(tmp_path, monkeypatch, capsys):
    def fake(folder, images, seed, log):
        assert (images, seed) == (3, 5)
        row = {"name": "full precision", "seconds": 1.0, "speedup": 1.0, "computed_steps": 50, "steps": 50}
        row |= {"speedup_range": [1.0, 1.0]}
        return {
            "hardware": {"device": "x", "threads": 1},
            "images": 3,
            "repeats": 3,
            "rows": [{**row, "class_accuracy": 100.0}],
        }

    monkeypatch.setattr(demo, "run_demo", fake)
    assert main(["demo", "--images", "3", "--seed", "5", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "| full precision | 1.00 | 1.00x | 50 of 50 |" in said and str(tmp_path / "out" / "comparison.png") in said


def test_a_missing_built_in_model_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qandc_core.checkpoints.dit.DEMO", tmp_path / "pictures_dit.safetensors")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("qandc_core demo: no DiT checkpoint at") and said.endswith("install the package again")
    assert not (tmp_path / "out").exists()
