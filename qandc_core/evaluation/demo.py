"""The demonstration: the built-in model in full precision and with Q&C, side by side, with what was measured.

The two are timed in turns, so that a slow spell of the machine hits both alike; the speedup is the median of the turns.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..caching.attach import remove_cache
from ..calibration.choice import CalibrationConfig
from ..checkpoints import load_dit
from ..compensation.correction import VarianceCompensation
from ..demo import CLASS_NAMES
from ..diffusion.process import SamplingConfig
from ..files import save_text, written_whole
from ..models.dit import DiT
from ..sampling.generate import generate
from ..sampling.report import RunReport
from .experiment import hardware
from .figure import FigureRow, comparison_figure
from .judges import BuiltInJudge
from .metrics import psnr, relative_l2, ssim
from .tables import markdown_table
from .variants import RECOMMENDED, Variant, Workbench

DEMO_SAMPLING = SamplingConfig(50, 2.0, "ddim")  # adds no noise, so that features can be extrapolated
# Small, so that all of it takes less than a minute on two cores.
DEMO_CALIBRATION, DEMO_PAIRS = CalibrationConfig(trajectories=8, samples=100, clusters=25), 10
REPEATS = 5
DIGITS = {"psnr": 1, "ssim": 3, "relative_l2": 3}
SHOWN = ("cat", "panda", "penguin", "butterfly", "apple", "sunflower", "rocket", "house", "heart", "car")
NAIVE = Variant("naive W8A8 + cache", bits=(8, 8), interval=4, reuse="block", sampler=DEMO_SAMPLING.sampler)


@dataclass
class DemoRun:
    """A row of the demonstration: how it samples, its images, and the report of every repeat."""

    name: str
    model: DiT
    steps: int = DEMO_SAMPLING.steps
    compensation: VarianceCompensation | None = None
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    reports: list[RunReport] = field(default_factory=list)

    def sample(self, labels: Tensor, seed: int) -> None:
        config = DEMO_SAMPLING
        self.images, report = generate(
            self.model, labels, self.steps, config.cfg_scale, config.sampler, seed, compensation=self.compensation
        )
        self.reports.append(report)

    @property
    def seconds(self) -> list[float]:
        return [report.total_seconds for report in self.reports]


def demo_labels(images: int) -> Tensor:
    """The things that are shown, in turn."""
    return torch.tensor([CLASS_NAMES.index(SHOWN[i % len(SHOWN)]) for i in range(images)])


def run_demo(folder: Path, images: int, seed: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Writes comparison.png, report.md and report.json into `folder`; returns what the JSON holds."""
    model = load_dit("demo")
    bench = Workbench(model, DEMO_SAMPLING, DEMO_CALIBRATION, DEMO_PAIRS)
    judge, labels = BuiltInJudge(), demo_labels(images)
    log("Calibrating on the model's own trajectories, with the cache on, and fitting the variance compensation")
    accelerated, compensation = bench.build(RECOMMENDED)
    naive, _ = bench.build(NAIVE)
    full, plain = DemoRun("full precision", model), DemoRun(NAIVE.name, naive)
    fast = DemoRun(RECOMMENDED.name, accelerated, compensation=compensation)
    for run in (full, fast, plain):
        generate(run.model, labels[:2], 2, DEMO_SAMPLING.cfg_scale, DEMO_SAMPLING.sampler)  # pays for set-up
    log(f"Sampling {images} images {REPEATS} times in full precision and with Q&C, in turns")
    for _ in range(REPEATS):
        for run in (full, fast):
            run.sample(labels, seed)
    fewer = max(1, round(DEMO_SAMPLING.steps / statistics.median(speedups(full, fast))))
    short = DemoRun(f"full precision, {fewer} steps", model, fewer)
    log(f"Sampling as many with {NAIVE.name}, and in {fewer} steps, about the time of Q&C")
    for run in (plain, short):
        run.sample(labels, seed)
    remove_cache(accelerated)
    runs = (full, plain, fast, short)
    rows = [describe(run, full, labels, judge) for run in runs]
    folder.mkdir(parents=True, exist_ok=True)
    shown = min(len(SHOWN), images)
    figure = comparison_figure(
        [FigureRow(r["name"], r["numbers"], run.images[:shown], run.reports[0].computed) for r, run in zip(rows, runs)],
        f"Built-in DiT, {DEMO_SAMPLING.sampler} {DEMO_SAMPLING.steps} steps, same starting noise in every row",
    )
    with written_whole(folder / "comparison.png") as temporary:
        figure.save(temporary, "PNG")
    result = {"hardware": hardware(), "images": images, "seed": seed, "repeats": REPEATS, "rows": rows}
    save_text(json.dumps(result, indent=1), folder / "report.json")
    save_text(demo_markdown(result), folder / "report.md")
    return result


def speedups(full: DemoRun, run: DemoRun) -> list[float]:
    """Of every turn; of a run that was sampled once against the median of full precision."""
    if len(run.seconds) == len(full.seconds):
        return [a / b for a, b in zip(full.seconds, run.seconds)]
    return [statistics.median(full.seconds) / seconds for seconds in run.seconds]


def describe(run: DemoRun, full: DemoRun, labels: Tensor, judge: BuiltInJudge) -> dict[str, Any]:
    report, x, reference = run.reports[0], run.images, full.images
    accuracy = 100 * float((judge(x).probabilities.argmax(1) == labels).float().mean())
    found = speedups(full, run)
    row: dict[str, Any] = {
        "name": run.name,
        "seconds": statistics.median(run.seconds),
        "speedup": statistics.median(found),
        "speedup_range": [min(found), max(found)],
        "computed_steps": report.computed_steps,
        "steps": report.steps,
        "cache_mib": report.cache_bytes / 2**20,
        "class_accuracy": accuracy,
    }
    row["numbers"] = f"{row['seconds']:.2f} s\n{report.computed_steps} of {report.steps} steps computed"
    if run is not full:
        a, b = x.clamp(-1, 1), reference.clamp(-1, 1)
        row |= {
            "psnr": float(psnr(a, b).mean()),
            "ssim": float(ssim(a, b).mean()),
            "relative_l2": float(relative_l2(x, reference).mean()),
        }
        row["numbers"] = f"{row['seconds']:.2f} s, {times(found)}\nPSNR {row['psnr']:.1f} dB"
    return row


def times(found: Sequence[float]) -> str:
    """Median with the range of several."""
    middle = f"{statistics.median(found):.2f}x"
    return middle if min(found) == max(found) else f"{middle} ({min(found):.2f} to {max(found):.2f})"


def demo_markdown(result: dict[str, Any]) -> str:
    device = result["hardware"]
    about = (
        f"{result['images']} images on {device['device']}, {device['threads']} threads. Full precision and Q&C were "
        f"sampled {result['repeats']} times in turns: median, and range of the speedup; the other rows once."
    )
    head = ["", "seconds", "speedup", "steps computed", "PSNR dB", "SSIM", "relative L2", "class accuracy %"]
    rows = [
        [
            row["name"],
            f"{row['seconds']:.2f}",
            times([row["speedup"], *row["speedup_range"]]),
            f"{row['computed_steps']} of {row['steps']}",
            *(f"{row[key]:.{digits}f}" if key in row else "-" for key, digits in DIGITS.items()),
            f"{row['class_accuracy']:.0f}",
        ]
        for row in result["rows"]
    ]
    return f"{about}\n\n{markdown_table(head, rows)}\n"
