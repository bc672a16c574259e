import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import qandc_core
from qandc_core import CalibrationConfig, DiT, DiTConfig, SamplingConfig, generate, save_dit
from qandc_core.cli.main import main
from qandc_core.distributed import Distributed
from qandc_core.evaluation import experiment as module
from qandc_core.evaluation import inception
from qandc_core.evaluation.experiment import (
    COMPARED,
    MAIN_ROWS,
    Evaluation,
    Experiment,
    Sampler,
    factor_rows,
    measure_time,
    run_factors,
    run_main,
    sample,
)
from qandc_core.evaluation.judges import BuiltInJudge, InceptionJudge, Judgement, Reference
from qandc_core.evaluation.kept import Kept
from qandc_core.evaluation.metrics import FeatureStatistics
from qandc_core.evaluation.scores import interval, judge, real_floor, summarize
from qandc_core.evaluation.solvers import SOLVERS, scheduler, solve
from qandc_core.evaluation.tables import factor_table, markdown, plot_main
from qandc_core.evaluation.variants import RECOMMENDED, Variant, Workbench, balanced_labels

STEPS = 4
SAMPLING = SamplingConfig(steps=STEPS, cfg_scale=2.0)
PLAN = CalibrationConfig(trajectories=4, samples=10, clusters=3, batch_size=4, held_out=0)
SIZES = Evaluation(images=8, seeds=(1, 2), batch=3)
ALONE = Distributed(0, 1, torch.device("cpu"))
FULL = Variant("full precision", steps=STEPS)
FORA = Variant("cache", interval=3, steps=STEPS)


def silent(_):
    pass


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DiTConfig(
        patch_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=10, learn_sigma=False
    )
    return DiT(config).eval()


@pytest.fixture(scope="module")
def pictures():
    return BuiltInJudge()


def experiment(model, pictures, sizes=SIZES, log=silent):
    return Experiment(Workbench(model, SAMPLING, PLAN, pairs=4), pictures, sizes, ALONE, log)


@pytest.fixture(scope="module")
def shared(model, pictures):
    return experiment(model, pictures)


# --- sampling and rows ------------------------------------------------------------------------------------------------


def test_sample_gives_balanced_classes_whatever_the_batch(model):
    whole, _ = generate(model, balanced_labels(7, 10), STEPS, 2.0, seed=5)
    for batch in (7, 3):
        torch.testing.assert_close(sample(Sampler(model, SAMPLING), 7, batch, 5), whole, rtol=1e-4, atol=1e-4)


def test_the_shards_of_two_processes_are_the_images_of_one(model):
    sampler = Sampler(model, SAMPLING)
    parts = [sample(sampler, 8, 3, 5, Distributed(r, 2, torch.device("cpu"))) for r in range(2)]
    assert [len(p) for p in parts] == [3, 5]
    assert torch.equal(torch.cat(parts), sample(sampler, 8, 3, 5))
    assert sample(sampler, 2, 3, 5, Distributed(0, 2, torch.device("cpu"))).shape == (0, 3, 32, 32)


def test_the_full_precision_row_differs_from_nothing(shared):
    row = shared.row(FULL)
    assert [scores["relative_l2"] for scores in row["per_seed"]] == [(0.0, 0.0)] * 2
    assert row["metrics"]["relative_l2"] == {"mean": 0.0, "standard_error": 0.0}
    assert row["metrics"]["psnr"]["mean"] == 100 and row["factors"] is None
    assert row["variant"] == asdict(FULL) and row["name"] == FULL.name


def test_the_plain_variant_sampled_again_is_full_precision_bit_for_bit(shared):
    built, compensation = shared.bench.build(FULL)
    again = sample(Sampler(built, shared.bench.config(FULL), compensation), SIZES.images, SIZES.batch, 1)
    assert torch.equal(again, shared.full_samples(FULL, 1))


def test_rows_are_deterministic(model, pictures):
    variant = replace(MAIN_ROWS[-1], steps=STEPS)
    first, second = (experiment(model, pictures).row(variant) for _ in range(2))
    assert first == second
    assert 0 < first["metrics"]["relative_l2"]["mean"] < 1
    assert len(first["factors"]) == STEPS and len(first["factors"][0]) == 3


def test_fewer_steps_are_compared_with_all_steps(shared):
    short = shared.row(replace(FULL, name="2 steps", steps=2))
    few = sample(Sampler(shared.bench.model, replace(SAMPLING, steps=2)), SIZES.images, SIZES.batch, 1)
    full = shared.full_samples(FULL, 1)
    error = ((few - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)).mean()
    assert short["per_seed"][0]["relative_l2"][0] == pytest.approx(float(error), rel=1e-5)
    assert error > 0


def test_full_precision_is_sampled_once_for_each_sampler_and_seed(model, pictures, monkeypatch):
    calls = []
    original = module.sample
    monkeypatch.setattr(module, "sample", lambda *args: calls.append(args[1:]) or original(*args))
    run = experiment(model, pictures)
    for variant in (FULL, FORA, replace(FULL, sampler="ddim"), replace(FORA, sampler="ddim")):
        run.row(variant)
    # Two seeds times two samplers, in full precision and with the cache.
    assert len(calls) == 8 and len(run.full) == 4


def test_every_row_is_logged_with_its_numbers(model, pictures):
    lines = []
    run = experiment(model, pictures, replace(SIZES, seeds=(1,)), lines.append)
    row = run.row(FORA)
    assert len(lines) == 1 and lines[0].startswith("cache ")
    assert f"{row['metrics']['relative_l2']['mean']:.4f}" in lines[0]


# --- metrics of a row, against numpy and scipy ------------------------------------------------------------------------


def numpy_frechet(a, b):
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * cross


def brute_precision(real, fake, k=3):
    gaps = np.linalg.norm(real[:, None] - real[None], axis=2)
    radii = np.sort(gaps, axis=1)[:, k]
    return (np.linalg.norm(fake[:, None] - real[None], axis=2) <= radii[None]).any(1).mean()


class FewPictures(BuiltInJudge):
    """200 of the real pictures, so that brute force stays small."""

    def __init__(self):
        super().__init__()
        features = self.reference.features[:200]
        self.reference = Reference(FeatureStatistics.of(features), features)


def test_judge_against_numpy():
    few = FewPictures()
    generator = torch.Generator().manual_seed(0)
    full = torch.rand(60, 3, 32, 32, generator=generator) * 3 - 1.5
    samples, labels = full + 0.3 * torch.randn(full.shape, generator=generator), balanced_labels(60, 10)
    judged = judge(few, samples, labels, full)
    scores = judged.scores
    seen = few(samples)
    features, real = seen.features.double().numpy(), few.reference.features.double().numpy()
    assert scores["frechet_distance"][0] == pytest.approx(numpy_frechet(features, real), rel=1e-3)
    assert scores["frechet_distance"][1] > 0
    p = seen.probabilities.double().numpy()
    divergence = (p * (np.log(p + 1e-300) - np.log(p.mean(0)))).sum(1).mean()
    assert scores["inception_score"] == (pytest.approx(np.exp(divergence), rel=1e-6), None)
    accuracy = 100 * (p.argmax(1) == labels.numpy())
    assert scores["class_accuracy"] == pytest.approx((accuracy.mean(), accuracy.std(ddof=1) / 60**0.5))
    a, b = samples.double().flatten(1).numpy(), full.double().flatten(1).numpy()
    relative = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    assert scores["relative_l2"] == pytest.approx((relative.mean(), relative.std(ddof=1) / 60**0.5))
    a, b = a.clip(-1, 1), b.clip(-1, 1)
    assert scores["psnr"][0] == pytest.approx((10 * np.log10(4 / ((a - b) ** 2).mean(1))).mean())
    assert scores["precision"][0] == pytest.approx(brute_precision(real, features))
    assert scores["recall"][0] == pytest.approx(brute_precision(features, real))


def test_the_judge_knows_its_own_reference(pictures):
    real = pictures.reference
    assert real.features.shape == real.floor_features.shape == (4000, 64)
    assert real.statistics.frechet(FeatureStatistics.of(real.features)) == pytest.approx(0, abs=1e-6)
    noise = pictures(torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert torch.allclose(noise.probabilities.sum(1), torch.ones(200))
    distance = FeatureStatistics.of(noise.features).frechet(real.statistics)
    assert distance > 20 * real_floor(pictures, 4000)["mean"]


def test_the_floor_is_a_distance_of_real_from_real(pictures):
    few, many, all_of_them = (real_floor(pictures, count) for count in (100, 1000, 10**6))
    assert few["mean"] > many["mean"] > all_of_them["mean"] > 0  # FD is biased upwards where images are few
    assert few["standard_error"] > 0 and few["images"] == 100 and all_of_them["images"] == 4000
    exact = FeatureStatistics.of(pictures.reference.floor_features).frechet(pictures.reference.statistics)
    assert all_of_them["mean"] == pytest.approx(exact, rel=1e-4)


def test_no_floor_without_other_real_images():
    class Other:
        reference = Reference(FeatureStatistics.of(torch.randn(3, 2)))

    assert real_floor(Other(), 10) is None


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0, 10)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=50)
def test_summary_is_mean_and_error_over_the_seeds(values):
    summary = summarize([{"metric": pair} for pair in values])["metric"]
    means = [mean for mean, _ in values]
    assert summary["mean"] == pytest.approx(np.mean(means), abs=1e-9)
    within = values[0][1] if len(values) == 1 else np.std(means, ddof=1) / len(means) ** 0.5
    assert summary["standard_error"] == pytest.approx(within, abs=1e-9)


# --- time -------------------------------------------------------------------------------------------------------------


def test_time_is_positive(shared):
    rows = [FULL, FORA, replace(FULL, name="1 step", steps=1)]
    timing = measure_time(shared.bench, rows, batch=4, repeats=3)
    assert list(timing) == [v.name for v in rows]
    for values in timing.values():
        assert values["seconds"] > 0 and 0 < values["speedup_low"] <= values["speedup"] <= values["speedup_high"]
    assert set(timing[FULL.name].values()) - {timing[FULL.name]["seconds"]} == {1.0}
    assert timing["1 step"]["speedup"] > 1


def test_time_is_measured_in_turns_and_paired(shared, monkeypatch):
    clock, calls, generated = iter([1.0, 0.5, 2.0, 0.5, 4.0, 4.0]), [], module.sample_images

    class Clock:
        def seconds(self):
            return next(clock)

    def watched(model, labels, config, *args, **kwargs):
        calls.append((config.steps, len(labels)))
        return generated(model, labels, config, *args, **kwargs)

    monkeypatch.setattr(module, "sample_images", watched)
    monkeypatch.setattr(module, "Stopwatch", Clock)
    timing = measure_time(shared.bench, [FULL, replace(FULL, name="b", steps=2)], batch=5, repeats=3)
    assert calls == [(STEPS, 5), (2, 5)] * 3
    expected = {"seconds": 0.5, "speedup": 2.0, "speedup_low": 1.0, "speedup_high": 4.0}
    assert timing == {FULL.name: {**dict.fromkeys(expected, 1.0), "seconds": 2.0}, "b": expected}


def test_compensated_rows_are_timed_with_a_correction_of_every_step(shared, monkeypatch):
    given, generated = [], module.sample_images

    def watched(*args, compensation=None, **kwargs):
        given.append(compensation)
        return generated(*args, compensation=compensation, **kwargs)

    monkeypatch.setattr(module, "sample_images", watched)
    measure_time(shared.bench, [FORA, replace(FORA, name="+ VC", compensation="variance_match")], batch=2, repeats=1)
    without, correction = given
    assert without is None
    assert len(correction.factor) == STEPS and (correction.factor != 1).all()


# --- the tables -------------------------------------------------------------------------------------------------------


def fixed_time(speedup=2.0):
    values = {"seconds": 1.0, "speedup": speedup, "speedup_low": 0.9 * speedup, "speedup_high": 1.1 * speedup}
    return lambda bench, variants, batch, repeats: {v.name: values for v in variants}


SETUP = {
    "model": "tiny", "hardware": {"device": "none", "threads": 1, "torch": "2"}, "sampler": "ddpm", "steps": STEPS,
    "cfg_scale": 2.0, "images": 8, "seeds": [1, 2], "factor_images": 4, "time_batch": 4, "time_repeats": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def main_result(model, pictures):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure_time", fixed_time())
        return run_main(experiment(model, pictures), 4, 3)


SHIPPED = ["full precision, ddim", RECOMMENDED.name]
SHORT = ["full precision, ddim, 2 steps", "DPM-Solver++ 2M, 2 steps", "UniPC, 2 steps"]


def names_of_main(steps):
    return [*(v.name for v in MAIN_ROWS), f"full precision, {steps} steps", *SHIPPED, *SHORT]


def test_the_main_table_has_plain_runs_in_the_measured_time(main_result):
    rows = {row["name"]: row for row in main_result["rows"]}
    assert list(rows) == names_of_main(2) and set(main_result["timing"]) == set(rows)
    for name, row in rows.items():
        scores = row["metrics"].values()
        assert np.isfinite([[s["mean"], s["standard_error"] or 0] for s in scores]).all()
        assert row["variant"]["steps"] == (2 if name.endswith("2 steps") else STEPS)
        assert row["variant"]["sampler"] == ("ddim" if name in SHIPPED + SHORT else SAMPLING.sampler)
        assert (row["metrics"]["relative_l2"]["mean"] == 0) == (name in ("full precision", SHIPPED[0]))
        assert (row["factors"] is not None) == ("VC" in name)


def test_every_part_is_compared_with_the_row_without_it(main_result):
    pairs = [(found["row"], found["minus"]) for found in main_result["differences"]]
    shorter = (MAIN_ROWS[-1].name, "full precision, 2 steps")
    assert pairs == [*COMPARED, shorter, *((RECOMMENDED.name, name) for name in SHORT)]
    rows = {row["name"]: row["metrics"] for row in main_result["rows"]}
    for found in main_result["differences"]:
        assert ("psnr" in found["metrics"]) == (found["minus"] != "full precision")
        for metric, value in found["metrics"].items():
            expected = rows[found["row"]][metric]["mean"] - rows[found["minus"]][metric]["mean"]
            assert (
                value["mean"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
                and value["low"] <= value["mean"] <= value["high"]
            )


def test_differences_are_paired_by_image_over_all_seeds(model, pictures):
    run = experiment(model, pictures)
    for variant in (FULL, FORA, replace(FORA, name="2", interval=2)):
        run.row(variant)
    found = run.difference("cache", "2")["metrics"]
    for metric in ("psnr", "relative_l2", "class_accuracy"):
        a, b = (torch.cat([judged.values[metric] for judged in run.judged[name]]).numpy() for name in ("cache", "2"))
        assert len(a) == SIZES.images * len(SIZES.seeds)
        expected = scipy.stats.ttest_rel(a.astype(float), b.astype(float)).confidence_interval(0.95)
        if np.isfinite(expected.low):  # of equal differences scipy has none
            assert (found[metric]["low"], found[metric]["high"]) == pytest.approx(tuple(expected), rel=1e-6)
    distances = [[judged.scores["frechet_distance"][0] for judged in run.judged[name]] for name in ("cache", "2")]
    expected = scipy.stats.ttest_rel(*distances).confidence_interval(0.95)
    value = found["frechet_distance"]
    assert (value["low"], value["high"]) == pytest.approx(tuple(expected), rel=1e-4)


def test_one_seed_gives_no_interval_to_what_images_do_not_have(model, pictures):
    run = experiment(model, pictures, replace(SIZES, seeds=(4,)))
    for variant in (FULL, FORA):
        run.row(variant)
    assert set(run.difference("cache", FULL.name)["metrics"]) == {"relative_l2", "class_accuracy"}


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
@settings(deadline=None, max_examples=50)
def test_interval_is_that_of_students_t(values):
    found = interval(torch.tensor(values, dtype=torch.float64))
    mean, spread = np.mean(values), scipy.stats.sem(values)
    expected = scipy.stats.t.interval(0.95, len(values) - 1, mean, spread) if spread > 1e-9 else (mean, mean)
    assert (found["low"], found["high"]) == pytest.approx(expected, abs=1e-6)


# --- solvers ----------------------------------------------------------------------------------------------------------


def tiny_dit(prediction="epsilon"):
    torch.manual_seed(1)
    config = DiTConfig(8, 4, 3, 32, 2, 2, num_classes=6, learn_sigma=False, prediction=prediction)
    net = DiT(config).eval()
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.05)
    return net


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_solving_with_ddim_of_diffusers_is_what_generate_does(prediction, scale):
    from diffusers import DDIMScheduler

    net, labels = tiny_dit(prediction), torch.tensor([5, 0, 3])
    ddim = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, prediction_type=prediction)
    found = solve(net, labels, SamplingConfig(5, scale, "ddim"), ddim, seed=9, first_index=4)
    expected, _ = generate(net, labels, 5, scale, "ddim", seed=9, first_index=4, spacing="leading")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_reach_the_solution_in_fewer_steps_than_ddim(solver):
    net, labels = tiny_dit("sample"), torch.tensor([3, 1])
    truth, _ = generate(net, labels, 1000, 2.0, "ddim", seed=2)
    chosen = scheduler(solver, net.config.prediction)
    solved = solve(net, labels, SamplingConfig(20, 2.0, "ddim"), chosen, seed=2)
    plain, _ = generate(net, labels, 20, 2.0, "ddim", seed=2)
    errors = [float((x - truth).norm() / truth.norm()) for x in (solved, plain)]
    assert errors[0] < 0.5 * errors[1]


# --- going on where a run was cut off ---------------------------------------------------------------------------------


class CutOff(Exception):
    pass


def rows_with(kept, model, pictures, monkeypatch, most=10**6):
    """The rows of three variants, and how many batches were sampled; a run is cut off after `most`."""
    variants = [replace(v, steps=STEPS) for v in (FULL, FORA, MAIN_ROWS[-1])]
    run = Experiment(Workbench(model, SAMPLING, PLAN, pairs=4, kept=kept), pictures, SIZES, ALONE, silent)
    count, sampled = [], Sampler.__call__

    def counted(self, *args):
        if len(count) == most:
            raise CutOff
        count.append(args)
        return sampled(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", counted)
        return [run.row(variant) for variant in variants], len(count)


def test_a_run_that_was_cut_off_goes_on_and_gives_the_same(model, pictures, tmp_path, monkeypatch):
    expected, whole = rows_with(Kept(), model, pictures, monkeypatch)
    kept = Kept(tmp_path)
    for most in (2, 7):
        with pytest.raises(CutOff):
            rows_with(kept, model, pictures, monkeypatch, most)
    found, rest = rows_with(kept, model, pictures, monkeypatch)
    assert found == expected and rest == whole - 9
    monkeypatch.setattr("qandc_core.evaluation.variants.calibrate", None)
    monkeypatch.setattr("qandc_core.evaluation.variants.fit_variance_compensation", None)
    assert rows_with(kept, model, pictures, monkeypatch) == (expected, 0)


def test_what_was_kept_under_other_settings_is_not_taken(tmp_path):
    root = Kept(tmp_path)
    first, second = root.under([SAMPLING.steps, "a"]), root.under([SAMPLING.steps, "b"])
    assert torch.equal(first.tensor("x", lambda: torch.ones(2)), torch.ones(2))
    assert torch.equal(second.tensor("x", lambda: torch.zeros(2)), torch.zeros(2))
    assert torch.equal(root.under([SAMPLING.steps, "a"]).tensor("x", lambda: torch.zeros(2)), torch.ones(2))
    assert first.json("y", lambda: {"z": 1.5}) == first.json("y", lambda: {"z": 2.5}) == {"z": 1.5}


def test_the_main_rows_switch_on_one_part_at_a_time():
    rows = {v.name: v for v in MAIN_ROWS}
    naive = rows["naive both"]
    assert (naive.bits, naive.interval) == (rows["quantization only"].bits, rows["cache only"].interval)
    assert rows["+ VC"] == replace(naive, name="+ VC", compensation="variance_match")
    assert rows["+ TAP"] == replace(naive, name="+ TAP", selection="tap")
    assert rows["+ TAP + VC"] == replace(rows["+ TAP"], name="+ TAP + VC", compensation="variance_match")


def test_markdown_and_plot_show_every_row(main_result, tmp_path):
    floor = {"images": 8, "mean": 1.5, "standard_error": 0.25}
    result = {"command": "python -m qandc_core x", "setup": SETUP, "floor": floor, "main": main_result}
    text = markdown(result)
    table, differences = text.split("## Differences")
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(main_result["rows"])
    for line, row in zip(lines[1:], main_result["rows"]):
        cells = [c.strip() for c in line.strip("|").split("|")]
        assert cells[0] == row["name"] and len(cells) == len(lines[0].strip("|").split("|"))
        assert f"{row['metrics']['frechet_distance']['mean']:.2f} +- " in cells[1]
        assert cells[-1] == "2.00x (1.80-2.20)"
    assert lines[1].count(" - ") == 2  # the reference has no distance from itself
    for pair in main_result["differences"]:
        value = pair["metrics"]["relative_l2"]
        shown = " to ".join(f"{value[key]:.4f}" for key in ("low", "high"))
        line = next(
            line for line in differences.splitlines() if line.startswith(f"| {pair['row']} - {pair['minus']} |")
        )
        assert f" {value['mean']:.4f} ({shown}) " in line
        assert (" - |" in line) == ("psnr" not in pair["metrics"])
    assert "1.50 +- 0.25" in text and "python -m qandc_core x" in text
    plot_main(result, tmp_path / "plot.png")
    assert len(Image.open(tmp_path / "plot.png").convert("L").getcolors()) > 10


def test_the_report_says_where_its_errors_come_from():
    text = markdown({"command": "x", "setup": SETUP})
    assert "seeds 1, 2; errors are standard errors over the seeds" in text
    alone = markdown({"command": "x", "setup": SETUP | {"seeds": [7]}})
    assert "seeds 7; errors are standard errors over the images" in alone


def test_every_factor_row_differs_from_the_base_in_its_factor():
    rows = factor_rows()
    base = next(v for group, v in rows if group == "base")
    names = [v.name for _, v in rows]
    assert len(set(names)) == len(names)
    fields = {
        "bits": {"bits", "rounding"}, "activations": {"static", "bits"}, "interval": {"interval"},
        "schedule": {"optimal"}, "granularity": {"reuse"}, "forecast": {"order", "compensation"},
        "VC method": {"compensation", "compensation_start"}, "sampler": {"sampler", "compensation", "order"},
    }  # fmt: skip
    for group, variant in rows:
        if group in ("reference", "base") or variant.bits is None:
            continue
        changed = {key for key, value in asdict(variant).items() if value != getattr(base, key)} - {"name"}
        assert changed and changed <= fields[group], variant.name


def test_the_factors_run_and_fill_their_table(model, pictures):
    rows = run_factors(experiment(model, pictures, Evaluation(images=4, seeds=(1,), batch=4)))
    assert [(row["group"], row["name"]) for row in rows] == [(group, v.name) for group, v in factor_rows()]
    error = {row["name"]: row["metrics"]["relative_l2"]["mean"] for row in rows}
    assert error["full precision"] == error["full precision, DDIM"] == 0
    assert all(np.isfinite(e) and (e > 0) == (not n.startswith("full precision")) for n, e in error.items())
    assert error["W4A4"] > error["W8A8, N = 3, DDPM"]
    # A reused step is the same before and after the gate only where the gate stands still.
    assert error["reuse after the gate (blocks)"] != error["W8A8, N = 3, DDPM"]
    table = factor_table(rows)
    assert all(f"| {row['group']}: {row['name']} |" in table for row in rows)


# --- ImageNet: the real formats, tiny ---------------------------------------------------------------------------------

SIDE = 75  # the smallest input that InceptionV3 takes
IMAGENET_STEPS, IMAGENET_IMAGES = 3, 6


def tiny_inception():
    torch.manual_seed(0)
    net = inception.Inception(divisor=16)
    for name, value in net.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value)
        elif name.endswith(("bn.weight", "bn.running_var")):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("bn.bias", "bn.running_mean")):
            value.normal_(0, 0.1)
    return net


@pytest.fixture(scope="module")
def small_input():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "SIZE", SIDE)
        yield


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory, small_input):
    """Folder with dit.safetensors, vae/, inception.pth and reference.npz."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("imagenet")
    torch.manual_seed(0)
    save_dit(DiT(DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=2)), folder / "dit.safetensors")
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, scaling_factor=0.18215,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    net = tiny_inception()
    torch.save(net.state_dict(), folder / "inception.pth")
    net.preprocess = inception.preprocess_adm
    real = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    seen = net(torch.from_numpy(real).permute(0, 3, 1, 2))
    pool, spatial = seen.pool.double().numpy(), seen.spatial.double().numpy()
    np.savez(
        folder / "reference.npz", arr_0=real, mu=pool.mean(0), sigma=np.cov(pool, rowvar=False),
        mu_s=spatial.mean(0), sigma_s=np.cov(spatial, rowvar=False),
    )  # fmt: skip
    return folder


def command(folder, out):
    return [
        "experiment", "--model", str(folder / "dit.safetensors"), "--vae", str(folder / "vae"),
        "--inception", str(folder / "inception.pth"), "--reference", str(folder / "reference.npz"),
        "--steps", str(IMAGENET_STEPS), "--num-images", str(IMAGENET_IMAGES), "--seeds", "1", "--batch", "2",
        "--parts", "main", "--trajectories", "4", "--samples", "8", "--pairs", "2",
        "--device", "cpu", "--out", str(out),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def report(imagenet):
    out = imagenet / "single"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure_time", fixed_time(1.5))
        assert main(command(imagenet, out)) == 0
    return json.loads((out / "ablation.json").read_text())


def test_imagenet_experiment_writes_json_table_and_plot(imagenet, report):
    assert [row["name"] for row in report["main"]["rows"]] == names_of_main(2)
    for row in report["main"]["rows"]:
        wanted = {"frechet_distance", "spatial_frechet_distance", "inception_score", "precision", "recall"}
        assert wanted <= set(row["metrics"]) and "class_accuracy" not in row["metrics"]
        assert all(np.isfinite(score["mean"]) for score in row["metrics"].values())
        assert row["metrics"]["frechet_distance"]["mean"] > 0 and row["metrics"]["spatial_frechet_distance"]["mean"] > 0
        assert row["metrics"]["inception_score"]["mean"] >= 1 and 0 <= row["metrics"]["precision"]["mean"] <= 1
    assert report["main"]["rows"][0]["metrics"]["relative_l2"]["mean"] == 0
    assert report["floor"] is None and "factors" not in report
    table = (imagenet / "single" / "ablation.md").read_text()
    assert all(f"| {name} |" in table for name in names_of_main(2))
    assert all(head in table for head in (" FD ", " sFD ", " IS ", " precision ", " recall "))
    assert Image.open(imagenet / "single" / "ablation.png").width > 500
    assert sorted(p.name for p in (imagenet / "single").iterdir()) == ["ablation.json", "ablation.md", "ablation.png"]


def test_the_report_names_the_command_that_made_it(imagenet, report):
    assert report["command"].split()[:4] == ["python", "-m", "qandc_core", "experiment"]
    assert "--num-images 6" in report["command"] and report["setup"]["processes"] == 1


def test_a_part_that_fails_costs_no_finished_part(imagenet, tmp_path, monkeypatch, capsys):
    def failing(experiment):
        raise ValueError("out of luck")

    timing = fixed_time()(None, [FULL], 1, 1)
    first = {"timing": timing, "differences": []}
    monkeypatch.setattr(module, "run_main", lambda run, *_: {"rows": [run.row(FULL)], **first})
    monkeypatch.setattr(module, "run_factors", failing)
    assert main([*command(imagenet, tmp_path), "--parts", "main", "factors"]) == 2
    assert capsys.readouterr().err.endswith("qandc_core experiment: out of luck\n")
    assert json.loads((tmp_path / "ablation.json").read_text())["main"]["rows"][0]["name"] == FULL.name


def test_imagenet_metrics_are_those_of_the_decoded_images(imagenet, report):
    from diffusers import AutoencoderKL

    net = qandc_core.load_dit(imagenet / "dit.safetensors")
    x, _ = generate(net, list(range(IMAGENET_IMAGES)), IMAGENET_STEPS, 4.0, seed=1)
    vae = AutoencoderKL.from_pretrained(imagenet / "vae").eval()
    with torch.inference_mode():
        images = vae.decode(x / 0.18215).sample
    assert images.shape == (IMAGENET_IMAGES, 3, 16, 16)
    loaded = inception.load_inception(imagenet / "inception.pth", inception.preprocess_adm)
    seen = loaded(inception.to_uint8(images))
    metrics = report["main"]["rows"][0]["metrics"]
    data = np.load(imagenet / "reference.npz")
    real = loaded(torch.from_numpy(data["arr_0"]).permute(0, 3, 1, 2))
    for name, a, b in (
        ("frechet_distance", seen.pool, real.pool),
        ("spatial_frechet_distance", seen.spatial, real.spatial),
    ):
        expected = numpy_frechet(a.double().numpy(), b.double().numpy())
        # Batches of another size move pixels by a rounding error, which to_uint8 may turn into a whole level.
        assert metrics[name]["mean"] == pytest.approx(expected, rel=0.02), name
    p = seen.probabilities.double()
    score = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp()
    assert metrics["inception_score"]["mean"] == pytest.approx(float(score), rel=1e-3)


@pytest.fixture(scope="module")
def inception_judge(imagenet):
    device = torch.device("cpu")
    return InceptionJudge(imagenet / "inception.pth", imagenet / "vae", imagenet / "reference.npz", device)


def test_the_reference_statistics_are_those_of_the_file(imagenet, inception_judge):
    data, real = np.load(imagenet / "reference.npz"), inception_judge.reference
    for statistics, mean, covariance in ((real.statistics, "mu", "sigma"), (real.spatial, "mu_s", "sigma_s")):
        assert np.array_equal(statistics.mean.numpy(), data[mean])
        assert np.array_equal(statistics.covariance.numpy(), data[covariance])
    seen = inception_judge.judge_uint8(torch.from_numpy(data["arr_0"]).permute(0, 3, 1, 2))
    assert isinstance(seen, Judgement) and torch.equal(real.features, seen.features)
    # The file's own images lie at distance 0 from its statistics.
    assert FeatureStatistics.of(seen.features).frechet(real.statistics) == pytest.approx(0, abs=1e-6)
    assert FeatureStatistics.of(seen.spatial).frechet(real.spatial) == pytest.approx(0, abs=1e-3)


def test_latents_are_decoded_in_the_units_of_the_vae(imagenet, inception_judge):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(imagenet / "vae").eval()
    latents = torch.randn(9, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, unscaled = vae.decode(latents / 0.18215).sample, vae.decode(latents).sample
    torch.testing.assert_close(inception_judge.decode(latents), expected, rtol=1e-4, atol=1e-5)
    assert (expected - unscaled).abs().max() > 0.01


def test_a_reference_without_images_gives_no_precision(imagenet, inception_judge, tmp_path):
    data = dict(np.load(imagenet / "reference.npz"))
    del data["arr_0"]
    np.savez(tmp_path / "statistics.npz", **data)
    reference = inception_judge.read_reference(tmp_path / "statistics.npz")
    assert reference.features is None and reference.statistics.count == 2


def test_faulty_files_stop_the_experiment_with_one_sentence(imagenet, tmp_path, capsys):
    whole = (imagenet / "reference.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    data = dict(np.load(imagenet / "reference.npz"))
    np.savez(tmp_path / "lacking.npz", **{k: v for k, v in data.items() if k != "sigma_s"})
    np.savez(tmp_path / "wide.npz", **(data | {"mu": np.zeros(2048), "sigma": np.eye(2048)}))
    (tmp_path / "garbage.pth").write_bytes(b"not a state dict" * 100)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    faults = [
        ("--reference", "missing.npz", "no complete .npz file"), ("--reference", "cut.npz", "no complete .npz file"),
        ("--reference", "lacking.npz", "lacks sigma_s"), ("--reference", "wide.npz", "has 2048 features"),
        ("--inception", "missing.pth", "no Inception weights"), ("--inception", "garbage.pth", "garbage.pth"),
        ("--inception", "other.safetensors", "not an InceptionV3 state dict"), ("--vae", "missing", "no diffusers VAE"),
    ]  # fmt: skip
    for option, name, reason in faults:
        assert main([*command(imagenet, tmp_path / "out"), option, str(tmp_path / name)]) == 2, name
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("qandc_core experiment: ") and reason in lines[0], lines
    assert not (tmp_path / "out").exists()


# Clocks of two processes never agree: rank 1 measures another speedup than rank 0.
WORKER = """
import os, sys
import torch
from qandc_core.cli.main import main
from qandc_core.evaluation import experiment, inception

def measure_time(bench, variants, batch, repeats):
    speedup = 1.5 if os.environ["RANK"] == "0" else 3.0
    return {v.name: dict(seconds=1.0, speedup=speedup, speedup_low=speedup, speedup_high=speedup) for v in variants}

if __name__ == "__main__":
    torch.set_num_threads(1)
    experiment.measure_time, inception.SIZE = measure_time, int(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
"""


def test_two_gloo_processes_give_the_metrics_of_one(imagenet, report, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    root = str(Path(qandc_core.__file__).parents[1])
    env = clean | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, str(script), str(SIDE), *command(imagenet, tmp_path / "two")], env=env, check=True, timeout=600
    )
    together = json.loads((tmp_path / "two" / "ablation.json").read_text())
    assert together["setup"]["processes"] == 2
    pairs = list(zip(together["main"]["rows"], report["main"]["rows"], strict=True))
    for two, one in pairs:
        assert two["name"] == one["name"] and two["metrics"] == one["metrics"] and two["factors"] == one["factors"]
    assert len(pairs) == len(names_of_main(2))
