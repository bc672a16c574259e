"""Runs side by side."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from qandc_core.evaluation.comparison import (
    COLUMNS,
    ComparedRun,
    comparison_markdown,
    comparison_rows,
    evenly,
    run_comparison,
)
from qandc_core.evaluation.figure import CAPTION, LEAST_HEIGHT, LIGHT, MARGIN
from qandc_core.evaluation.frames import ImageFrames
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


@pytest.mark.parametrize("other", [torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 24), torch.zeros(3, 3, 8, 8)])
def test_other_sizes_are_told_and_not_measured(images, other):
    plain = [ComparedRun("a", images), ComparedRun("b", images.clone())]
    same, _ = run_comparison(plain)
    figure, table = run_comparison([*plain, ComparedRun("c", other)])
    count, _, height, width = other.shape
    assert f"2 x 16x16, 2 x 16x16, {count} x {width}x{height}" in table.splitlines()[0]
    assert [line.split("|")[-4:-1] for line in table.splitlines() if line.startswith("| c")] == [[" - "] * 3]
    assert "equal" in table
    size = 72  # a row of other images has no difference below it
    row = max(round(size * height / width), LEAST_HEIGHT) + 16 + MARGIN
    grown = figure.height - same.height - row - 22 - CAPTION  # a row of the table and a headline
    assert grown in (18, 36)  # the warning takes one line or two


@pytest.mark.parametrize(
    "change, told",
    [
        ({"seed": 2}, "seed 1, 2"),
        ({"steps": 3}, "steps 2, 3"),
        ({"sampler": "euler"}, "sampler ddpm, euler"),
        ({"cfg_scale": 4.0}, "cfg 1.5, 4.0"),
        ({"denoise": 0.5}, "denoise 1.0, 0.5"),
        ({"size": [[8, 2, 4, 4], [4, 9]]}, "latent 4x2x2, 8x2x4x4 + 4x9"),
    ],
)
def test_other_settings_are_told_in_the_figure_and_the_log(images, caplog, change, told):
    settings = {"seed": 1, "size": [[4, 2, 2]]}
    runs = [ComparedRun(name, images, report([1.0, 1.0], [True, True], **settings)) for name in "ab"]
    alike, quiet = run_comparison(runs)
    assert not caplog.records and "Not the same run" not in quiet
    for key, value in change.items():
        setattr(runs[1].report, key, value)
    figure, table = run_comparison(runs)
    assert table.startswith(f"**Not the same run: {told}.**")
    assert told in caplog.text
    assert [(np.asarray(drawn) == LIGHT.warning).all(-1).any() for drawn in (figure, alike)] == [True, False]


def test_a_run_without_seed_says_nothing_about_it(images):
    runs = [ComparedRun("a", images, report([1.0], [True], seed=1)), ComparedRun("b", images, report([1.0], [True]))]
    assert "seed" not in run_comparison(runs)[1]


# Frames of ComfyUI's IMAGE


def image_batch(channels, count=3, height=20, width=30, seed=0):
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_every_number_of_channels_are_compared(channels):
    batch = image_batch(channels)
    frames, other = ImageFrames(batch), ImageFrames(1 - batch)
    assert frames.shape == (3, 3, 20, 30) and frames[1].shape == (3, 20, 30)
    color = batch[1, ..., :1].expand(-1, -1, 3) if channels < 3 else batch[1, ..., :3]
    if channels in (1, 3):
        assert torch.equal(frames[1], color.movedim(-1, 0) * 2 - 1)
    opaque = torch.cat([batch[..., :-1], torch.ones_like(batch[..., :1])], -1) if channels in (2, 4) else batch
    torch.testing.assert_close(ImageFrames(opaque)[1], color.movedim(-1, 0) * 2 - 1)
    _, table = run_comparison([ComparedRun("a", frames), ComparedRun("b", other), ComparedRun("c", frames)])
    assert "equal" in table and "1.0000" in table


def test_what_differs_in_alpha_alone_differs():
    batch = image_batch(4)
    batch[..., :3], other = 0.5, batch.clone()
    other[..., 3] = 1 - batch[..., 3]
    rows = comparison_rows([ComparedRun("a", ImageFrames(batch)), ComparedRun("b", ImageFrames(other))])
    assert 10 < float(rows[1]["PSNR dB"]) < 30 and float(rows[1]["SSIM"]) < 0.99


@pytest.mark.parametrize("shape", [(2, 8, 8, 5), (0, 8, 8, 3), (8, 8, 3)])
def test_other_images_are_refused_in_a_sentence(shape):
    with pytest.raises(ValueError, match="a has images of the shape .*1 to 4 channels, .N, H, W, C.[.]$"):
        ImageFrames(torch.zeros(shape), "a")


def test_one_equal_image_does_not_make_a_run_equal(images):
    changed = images.clone()
    changed[1] += 0.1
    rows = comparison_rows([ComparedRun("a", images), ComparedRun("b", changed)])
    assert rows[1]["PSNR dB"] == f"{float(psnr(changed, images)[1]):.2f}"


class Counted(ImageFrames):
    """Counts conversions, and the frames that live at once."""

    def __init__(self, batch, log):
        super().__init__(batch)
        self.log = log

    def __getitem__(self, index):
        self.log.append(index)
        return super().__getitem__(index)


def test_progress_rises_to_its_end_and_may_end_the_work():
    log, seen = [], []
    first, second = image_batch(3, count=5), image_batch(3, count=5, seed=1)
    runs = [ComparedRun("a", ImageFrames(first)), ComparedRun("b", Counted(second, log))]
    run_comparison(runs, shown=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 5) for i in range(5)] and log[:5] == [0, 1, 2, 3, 4]

    def cancel(done, total):
        raise KeyboardInterrupt

    log.clear()
    with pytest.raises(KeyboardInterrupt):
        run_comparison(runs, progress=cancel)
    assert log == [0]


def test_a_long_clip_shows_frames_from_first_to_last():
    assert evenly(33, 5) == [0, 8, 16, 24, 32] and evenly(3, 8) == [0, 1, 2] and evenly(9, 1) == [0]


def test_wide_frames_keep_their_shape():
    runs = [ComparedRun(name, ImageFrames(image_batch(3, 1, 48, 96))) for name in "ab"]
    square = [ComparedRun(name, ImageFrames(image_batch(3, 1, 96, 96))) for name in "ab"]
    wide, tall = run_comparison(runs)[0], run_comparison(square)[0]
    assert tall.height - wide.height == 36 + 48 + 36  # rows of at least 60 pixels, differences of 48


def test_memory_is_that_of_a_frame_pair():
    """33 frames of 832x480: beyond its two inputs a comparison may take 1 GiB; it takes about 100 MiB."""
    code = """
import resource, torch
from qandc_core.evaluation.comparison import ComparedRun, run_comparison
from qandc_core.evaluation.frames import ImageFrames
torch.set_num_threads(1)
batch = torch.rand(1, 480, 832, 3).expand(33, -1, -1, -1)
runs = [ComparedRun("a", ImageFrames(batch)), ComparedRun("b", ImageFrames(batch.flip(1)[:1].expand(33, -1, -1, -1)))]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run_comparison(runs)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) < 400


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
    assert table.splitlines()[0] == "**b: 1.82x as fast, one run each, equal images**"
    assert table.splitlines()[2].startswith("| " + COLUMNS[0]) and table.count("\n|") == 4


def test_a_cached_run_says_what_it_reused_and_when(images):
    cached = report([1.0, 0.1], [True, False], reuse="blocks, as chosen", timeline={"positive": "CF", "negative": "CR"})
    cached.cache_speedup, cached.warnings = 1.82, ["no effect at all"]
    plain = ComparedRun("full", images, report([1.0, 1.0], [True, True]))
    _, bare = run_comparison([plain, ComparedRun("fast", images, report([1.0, 0.1], [True, False]))])
    figure, text = run_comparison([plain, ComparedRun("fast", images, cached)])
    assert "fast: reuses blocks, as chosen, model calls 1.82x faster for it; no effect at all" in text
    assert "CF  fast, positive\nCR  fast, negative" in text
    shared = bare.rsplit("\n\n", 1)[0]
    assert text.startswith(shared) and "Steps" not in bare


def test_markdown_has_a_column_for_every_value(images):
    lines = comparison_markdown(comparison_rows([ComparedRun("a", images), ComparedRun("b", images)])).splitlines()
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
