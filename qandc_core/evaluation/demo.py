"""The demonstration: the built-in model in full precision and with Q&C, side by side, with what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..caching.attach import remove_cache
from ..calibration.choice import CalibrationConfig
from ..checkpoints import load_dit
from ..diffusion.process import SamplingConfig
from ..files import save_text, written_whole
from ..sampling.generate import generate
from ..sampling.report import RunReport
from .experiment import hardware
from .figure import FigureRow, comparison_figure
from .judges import DigitsJudge
from .metrics import psnr, relative_l2, ssim
from .variants import Variant, Workbench, balanced_labels

DEMO_SAMPLING = SamplingConfig(steps=50, cfg_scale=1.5)
DEMO_CALIBRATION, DEMO_PAIRS = CalibrationConfig(), 64
RECOMMENDED = Variant(
    "Q&C: W8A8 + cache + TAP + VC",
    bits=(8, 8),
    interval=3,
    selection=DEMO_CALIBRATION.selection,
    time_scale=DEMO_CALIBRATION.time_scale,
    computed_only=DEMO_CALIBRATION.computed_only,
    compensation="variance_match",
)
NAIVE = Variant("naive W8A8 + cache", bits=(8, 8), interval=3)


def run_demo(folder: Path, images: int, seed: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Writes comparison.png, report.md and report.json into `folder`; returns what the JSON holds."""
    model = load_dit("demo")
    bench = Workbench(model, DEMO_SAMPLING, DEMO_CALIBRATION, DEMO_PAIRS)
    judge, labels = DigitsJudge(), balanced_labels(images, 10)
    runs: list[tuple[str, Tensor, RunReport]] = []

    def sample(name: str, run_model: Any, compensation: Any, steps: int) -> RunReport:
        config = replace(DEMO_SAMPLING, steps=steps)
        generate(run_model, labels[:2], 2, config.cfg_scale, config.sampler)  # the first call pays for set-up
        log(f"Sampling {images} images: {name}")
        x, report = generate(
            run_model, labels, steps, config.cfg_scale, config.sampler, seed, compensation=compensation, progress=True
        )
        runs.append((name, x, report))
        return report

    full = sample("full precision", model, None, DEMO_SAMPLING.steps)
    log("Calibrating on the model's own trajectories, with the cache on, and fitting the variance compensation")
    accelerated, compensation = bench.build(RECOMMENDED)
    naive, _ = bench.build(NAIVE)
    sample(NAIVE.name, naive, None, DEMO_SAMPLING.steps)
    fast = sample(RECOMMENDED.name, accelerated, compensation, DEMO_SAMPLING.steps)
    fewer = max(1, round(DEMO_SAMPLING.steps * fast.total_seconds / full.total_seconds))
    sample(f"full precision, {fewer} steps", model, None, fewer)
    remove_cache(accelerated)
    reference = runs[0][1]
    rows = [describe(name, x, report, reference, labels, judge, full) for name, x, report in runs]
    folder.mkdir(parents=True, exist_ok=True)
    shown = min(10, images)
    figure = comparison_figure(
        [FigureRow(r["name"], r["numbers"], x[:shown], report.computed) for r, (_, x, report) in zip(rows, runs)],
        f"Built-in DiT, {DEMO_SAMPLING.sampler} {DEMO_SAMPLING.steps} steps, same starting noise in every row",
    )
    with written_whole(folder / "comparison.png") as temporary:
        figure.save(temporary, "PNG")
    result = {"hardware": hardware(), "images": images, "seed": seed, "rows": rows}
    save_text(json.dumps(result, indent=1), folder / "report.json")
    save_text(demo_markdown(result), folder / "report.md")
    return result


def describe(
    name: str, x: Tensor, report: RunReport, reference: Tensor, labels: Tensor, judge: DigitsJudge, full: RunReport
) -> dict[str, Any]:
    accuracy = 100 * float((judge(x).probabilities.argmax(1) == labels).float().mean())
    speedup = full.total_seconds / report.total_seconds
    row: dict[str, Any] = {
        "name": name,
        "seconds": report.total_seconds,
        "speedup": speedup,
        "computed_steps": report.computed_steps,
        "steps": report.steps,
        "cache_mib": report.cache_bytes / 2**20,
        "class_accuracy": accuracy,
    }
    row["numbers"] = f"{report.total_seconds:.2f} s\n{report.computed_steps} of {report.steps} steps computed"
    if x is not reference:
        a, b = x.clamp(-1, 1), reference.clamp(-1, 1)
        row |= {
            "psnr": float(psnr(a, b).mean()),
            "ssim": float(ssim(a, b).mean()),
            "relative_l2": float(relative_l2(x, reference).mean()),
        }
        row["numbers"] = f"{report.total_seconds:.2f} s, {speedup:.2f}x\nPSNR {row['psnr']:.1f} dB"
    return row


def demo_markdown(result: dict[str, Any]) -> str:
    device = result["hardware"]
    lines = [
        f"{result['images']} images on {device['device']}, {device['threads']} threads. One run: for numbers with "
        "errors see the ablation.",
        "",
        "| | seconds | speedup | steps computed | PSNR dB | SSIM | relative L2 | class accuracy % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        fidelity = (
            [f"{row['psnr']:.1f}", f"{row['ssim']:.3f}", f"{row['relative_l2']:.3f}"] if "psnr" in row else ["-"] * 3
        )
        lines.append(
            f"| {row['name']} | {row['seconds']:.2f} | {row['speedup']:.2f}x "
            f"| {row['computed_steps']} of {row['steps']} | "
            + " | ".join(fidelity)
            + f" | {row['class_accuracy']:.0f} |"
        )
    return "\n".join(lines) + "\n"
