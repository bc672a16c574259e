"""Runs side by side."""

from __future__ import annotations

import pytest
import torch

from qandc_core.evaluation.comparison import (
    COLUMNS,
    ComparedRun,
    comparison_markdown,
    comparison_rows,
    run_comparison,
)
from qandc_core.evaluation.metrics import psnr, relative_l2
from qandc_core.sampling.report import RunReport


def report(seconds: list[float], computed: list[bool], device: str = "cpu", **values) -> RunReport:
    found = RunReport("ddpm", len(seconds), 2, 1.5, device, seconds, computed, **values)
    return found


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_rows_measure_against_the_first_run(images):
    noisy = (images + 0.05).clamp(-1, 1)
    full = ComparedRun("full", images, report([1.0, 1.0], [True, True]))
    fast = ComparedRun("fast", noisy, report([0.5, 0.3], [True, False], cache_bytes=3 * 2**20))
    rows = comparison_rows([full, fast])
    assert rows[0]["speedup"] == "1.00x" and rows[0]["PSNR dB"] == "-"
    assert rows[1]["time s"] == "0.80" and rows[1]["speedup"] == "2.50x"
    assert rows[1]["steps computed"] == "1 of 2" and rows[1]["cache MiB"] == "3.0"
    assert rows[1]["PSNR dB"] == f"{float(psnr(noisy, images).mean()):.2f}"
    assert rows[1]["rel. L2"] == f"{float(relative_l2(noisy, images).mean()):.4f}"


def test_equal_images_are_called_equal(images):
    rows = comparison_rows([ComparedRun("a", images), ComparedRun("b", images.clone())])
    assert rows[1]["PSNR dB"] == "equal" and rows[1]["SSIM"] == "1.0000" and rows[1]["time s"] == "-"


def test_no_speedup_without_a_measured_reference(images):
    rows = comparison_rows([ComparedRun("a", images), ComparedRun("b", images, report([1.0], [True]))])
    assert rows[1]["speedup"] == "-" and rows[1]["time s"] == "1.00"


def test_peak_memory_is_shown_where_it_is_the_run_s_own(images):
    runs = [
        ComparedRun(device, images, report([1.0], [True], device, peak_memory=2**30)) for device in ("cpu", "cuda:0")
    ]
    assert [row["peak MiB"] for row in comparison_rows(runs)] == ["-", "1024"]


def test_small_images_have_no_ssim():
    small = torch.zeros(1, 3, 8, 8)
    assert comparison_rows([ComparedRun("a", small), ComparedRun("b", small + 0.1)])[1]["SSIM"] == "-"


def test_unequal_shapes_are_named(images):
    with pytest.raises(ValueError, match="b has images of the shape .*compare runs of equal size"):
        run_comparison([ComparedRun("a", images), ComparedRun("b", images[:1])])


def test_figure_grows_with_runs_and_shows_what_was_measured(images):
    plain = [ComparedRun(name, images) for name in "ab"]
    measured = [
        ComparedRun("a", images, report([1.0, 1.0], [True, True])),
        ComparedRun("b", images, report([1.0, 0.1], [True, False], factors=[[1.0, 1.0], [1.1, 1.2]])),
    ]
    bare, _ = run_comparison(plain)
    full, table = run_comparison(measured)
    longer, _ = run_comparison([*measured, ComparedRun("c", images)])
    assert bare.height < full.height < longer.height
    assert table.count("\n") == 3 and table.startswith("| " + COLUMNS[0])


def test_a_cached_run_says_what_it_reused_and_when(images):
    cached = report([1.0, 0.1], [True, False], tier="blocks, as chosen", timeline={"positive": "CF", "negative": "CR"})
    cached.cache_speedup, cached.warnings = 1.82, ["no effect at all"]
    plain = ComparedRun("full", images, report([1.0, 1.0], [True, True]))
    _, bare = run_comparison([plain, ComparedRun("fast", images, report([1.0, 0.1], [True, False]))])
    figure, text = run_comparison([plain, ComparedRun("fast", images, cached)])
    assert "fast: reuses blocks, as chosen, model calls 1.82x faster for it; no effect at all" in text
    assert "CF  fast, positive\nCR  fast, negative" in text
    assert text.startswith(bare) and "Steps" not in bare


def test_markdown_has_a_column_for_every_value(images):
    lines = comparison_markdown(comparison_rows([ComparedRun("a", images), ComparedRun("b", images)])).splitlines()
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
