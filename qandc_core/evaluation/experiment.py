"""The ablation of Q&C: every row starts from the same noise and is judged against real images and full precision."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..compensation.correction import VarianceCompensation
from ..diffusion.classes import balanced_labels
from ..diffusion.process import SamplingConfig
from ..distributed import ALONE, Distributed, all_gather_tensors
from ..models.dit import DiT
from ..sampling.clock import Stopwatch
from ..sampling.generate import sample_images
from .judges import Judge
from .kept import Kept
from .scores import Judged, interval, judge, summarize
from .solvers import SOLVERS, scheduler, solve
from .variants import RECOMMENDED, Variant, Workbench

Log = Callable[[str], None]

# What each part adds: (row, the row that it is compared with), the same noise in both.
COMPARED = (
    ("quantization only", "full precision"),
    ("cache only", "full precision"),
    ("naive both", "full precision"),
    ("naive both", "cache only"),
    ("+ VC", "naive both"),
    ("+ TAP", "naive both"),
    ("+ TAP + VC", "naive both"),
    ("+ TAP + VC", "+ VC"),
    ("+ TAP + VC", "full precision"),
)

MAIN_ROWS = (
    Variant("full precision"),
    Variant("quantization only", bits=(8, 8)),
    Variant("cache only", interval=3),
    Variant("naive both", bits=(8, 8), interval=3),
    Variant("+ VC", bits=(8, 8), interval=3, compensation="variance_match"),
    Variant("+ TAP", bits=(8, 8), interval=3, selection="tap"),
    Variant("+ TAP + VC", bits=(8, 8), interval=3, selection="tap", compensation="variance_match"),
)


def factor_rows() -> list[tuple[str, Variant]]:
    """The other factors, one at a time around TAP + VC: (factor, variant)."""
    base = Variant("W8A8, N = 3, DDPM", bits=(8, 8), interval=3, selection="tap", compensation="variance_match")
    ddim = Variant("full precision, DDIM", sampler="ddim")
    return [
        ("reference", Variant("full precision")),
        ("base", base),
        ("bits", replace(base, name="W4A8", bits=(4, 8))),
        ("bits", replace(base, name="W4A8 GPTQ", bits=(4, 8), rounding="gptq")),
        ("bits", replace(base, name="W4A4", bits=(4, 4))),
        ("activations", replace(base, name="W8A8 dynamic per token", static=False)),
        ("activations", replace(base, name="W4A4 dynamic per token", bits=(4, 4), static=False)),
        ("interval", replace(base, name="N = 5", interval=5)),
        ("granularity", replace(base, name="reuse after the gate (blocks)", reuse="block")),
        ("schedule", replace(base, name="DP-optimal steps, as many", optimal=True)),
        ("forecast", replace(base, name="order-1 forecast", order=1)),
        ("forecast", replace(base, name="order-1 forecast, no VC", order=1, compensation=None)),
        ("VC method", replace(base, name="VC off", compensation=None)),
        ("VC method", replace(base, name="VC paper (regularised)", compensation="paper")),
        ("VC method", replace(base, name="VC least squares", compensation="least_squares")),
        ("VC method", replace(base, name="VC variance match, late half", compensation_start=0.5)),
        ("sampler", ddim),
        ("sampler", replace(base, name="DDIM, no VC", sampler="ddim", compensation=None)),
        ("sampler", replace(base, name="DDIM", sampler="ddim")),
        ("sampler", replace(base, name="DDIM, order-1 forecast", sampler="ddim", order=1)),
    ]


@dataclass(frozen=True)
class Evaluation:
    """Number of images for each seed, the seeds, and the batch size."""

    images: int = 1000
    seeds: tuple[int, ...] = (1, 2, 3)
    batch: int = 125


@dataclass(frozen=True)
class Sampler:
    """How the images of a row are made: the accelerated model, its compensation, or a solver of diffusers."""

    model: DiT
    config: SamplingConfig
    compensation: VarianceCompensation | None = None
    solver: str | None = None

    def __call__(self, labels: Tensor, seed: int, first_index: int = 0) -> Tensor:
        config = self.config
        if self.solver is not None:
            chosen = scheduler(self.solver, self.model.config.prediction)
            return solve(self.model, labels, config, chosen, seed, first_index)
        x, _ = sample_images(self.model, labels, config, seed, compensation=self.compensation, first_index=first_index)
        return x


def sample(
    sampler: Sampler, count: int, batch: int, seed: int, run: Distributed = ALONE, kept: Kept | None = None
) -> Tensor:
    """Samples (count, C, H, W) for balanced classes, this process's share of them gathered with the others'."""
    kept, shard = kept or Kept(), run.shard(count, batch)
    labels, parts = balanced_labels(count, sampler.model.config.num_classes), []
    for at in range(shard.start, shard.stop, batch):
        part = labels[at : min(at + batch, shard.stop)]
        made = partial(sampler, part, seed, at)
        parts.append(kept.tensor(f"seed {seed}, images {at} to {at + len(part) - 1}", made).cpu())
    return all_gather_tensors(torch.cat(parts) if parts else torch.empty(0, *sampler.model.config.shape))


class Experiment:
    """Runs rows, keeping the full-precision samples of every (sampler, seed) for comparison, and what was judged."""

    def __init__(self, bench: Workbench, judge: Judge, evaluation: Evaluation, run: Distributed, log: Log):
        self.bench, self.judge, self.evaluation, self.run, self.log = bench, judge, evaluation, run, log
        self.full: dict[Any, Tensor] = {}
        self.judged: dict[str, list[Judged]] = {}

    def full_samples(self, variant: Variant, seed: int) -> Tensor:
        # A run with fewer steps is compared with the full number of steps.
        key = (variant.sampler, self.evaluation.images, seed)
        if key not in self.full:
            config = replace(self.bench.sampling, sampler=variant.sampler)
            self.full[key] = self.samples(Sampler(self.bench.model, config), seed, f"full precision, {variant.sampler}")
        return self.full[key]

    def samples(self, sampler: Sampler, seed: int, made_of: Any) -> Tensor:
        size = self.evaluation
        return sample(sampler, size.images, size.batch, seed, self.run, self.bench.kept.under([made_of, asdict(size)]))

    def row(self, variant: Variant, group: str = "main") -> dict[str, Any]:
        watch, size = Stopwatch(), self.evaluation
        model, compensation = self.bench.build(variant)
        sampler = Sampler(model, self.bench.config(variant), compensation, variant.solver)
        labels, judged = balanced_labels(size.images, model.config.num_classes), []
        for seed in size.seeds:
            full = self.full_samples(variant, seed)
            samples = full if self.is_full(variant) else self.samples(sampler, seed, asdict(variant))
            judged.append(judge(self.judge, samples, labels, full))
        per_seed = [run.scores for run in judged]
        self.judged[variant.name], summary = judged, summarize(per_seed)
        self.log(
            f"{variant.name:32} FD {summary['frechet_distance']['mean']:8.2f}  "
            f"relative L2 {summary['relative_l2']['mean']:.4f}  ({watch.seconds():.0f} s)"
        )
        factors = None if compensation is None else compensation.factor.tolist()
        return {
            "name": variant.name,
            "group": group,
            "variant": asdict(variant),
            "metrics": summary,
            "per_seed": per_seed,
            "factors": factors,
        }

    def is_full(self, variant: Variant) -> bool:
        full = Variant(variant.name, sampler=variant.sampler, steps=self.bench.sampling.steps)
        return variant == full

    def difference(self, name: str, other: str) -> dict[str, Any]:
        """How far the first row lies above the second in every metric: mean, and the 95 % interval of Student's t.

        Paired by image, over all seeds, where each image has a value of its own; else by seed, of which two are needed.
        The reference is left out of PSNR, which is infinite for it.
        """
        first, second = self.judged[name], self.judged[other]
        reference = any(run.scores["relative_l2"][0] == 0 for run in (first[0], second[0]))
        metrics: dict[str, dict[str, float]] = {}
        for key in first[0].scores:
            if key == "psnr" and reference:
                continue
            if key in first[0].values:
                a, b = (torch.cat([run.values[key] for run in runs]) for runs in (first, second))
            else:
                a, b = (
                    torch.tensor([run.scores[key][0] for run in runs], dtype=torch.float64) for runs in (first, second)
                )
            if len(a) > 1:
                metrics[key] = interval(a.double() - b.double())
        return {"row": name, "minus": other, "metrics": metrics}


def unfitted_compensation(config: SamplingConfig, channels: int) -> VarianceCompensation:
    """A correction of every step, for timing: fitting takes minutes, and the cost is the same whatever the factors."""
    sigmas = torch.tensor(config.schedule().sigmas[:-1], dtype=torch.float64)
    shape = (len(sigmas), channels)
    return VarianceCompensation(sigmas, torch.zeros(shape), torch.full(shape, 1.001))


def measure_time(
    bench: Workbench, variants: list[Variant], batch: int = 64, repeats: int = 3
) -> dict[str, dict[str, float]]:
    """Wall seconds of one batch for each variant, interleaved so that a slow spell of the machine hits all alike."""
    built = []
    for variant in variants:
        model, config = bench.build(replace(variant, compensation=None))[0], bench.config(variant)
        correction = unfitted_compensation(config, model.config.in_channels) if variant.compensation else None
        built.append((variant.name, Sampler(model, config, correction, variant.solver)))
    labels = balanced_labels(batch, bench.model.config.num_classes)
    seconds: dict[str, list[float]] = {v.name: [] for v in variants}
    for _ in range(repeats):
        for name, sampler in built:
            watch = Stopwatch()
            sampler(labels, seed=99).cpu()
            seconds[name].append(watch.seconds())
    first = torch.tensor(seconds[variants[0].name])
    return {
        name: {
            "seconds": float(torch.tensor(values).median()),
            "speedup": float((first / torch.tensor(values)).median()),
            "speedup_low": float((first / torch.tensor(values)).min()),
            "speedup_high": float((first / torch.tensor(values)).max()),
        }
        for name, values in seconds.items()
    }


def hardware() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "system": platform.system()}


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run_main(experiment: Experiment, time_batch: int, time_repeats: int) -> dict[str, Any]:
    """Every part of the method on and off, and what is shipped, each beside plain runs of fewer steps in its time."""
    bench, log = experiment.bench, experiment.log

    def timed(variants: list[Variant]) -> dict[str, dict[str, float]]:
        # Clocks differ between processes, but all must sample as many steps.
        kept = bench.kept.under([asdict(v) for v in variants])
        measured = partial(measure_time, bench, variants, time_batch, time_repeats)
        return experiment.run.shared(lambda: kept.json("seconds", measured))

    timing: dict[str, dict[str, float]] = {}

    def plain_beside(group: list[Variant]) -> list[Variant]:
        """Plain runs in the time of the group's last row; all of them are timed."""
        timing.update(timed(group))
        plain = plain_rows(group[0], max(1, round(bench.sampling.steps / timing[group[-1].name]["speedup"])))
        timing.update({name: values for name, values in timed([group[0], *plain]).items() if name not in timing})
        return plain

    parts, shipped = main_rows(bench), shipped_rows(bench)
    shorter, solved = plain_beside(parts), plain_beside(shipped)
    for name, values in timing.items():
        log(f"{name:32} {values['seconds']:.2f} s  {values['speedup']:.2f}x")
    rows = {row.name: row for row in (*parts, *shorter, *shipped, *solved)}
    found = [experiment.row(row) for row in rows.values()]
    beside = [(group[-1], row) for group, plain in ((parts, shorter), (shipped, solved)) for row in plain]
    pairs = [*COMPARED, *((row.name, plain.name) for row, plain in beside)]
    return {"rows": found, "timing": timing, "differences": [experiment.difference(*pair) for pair in pairs]}


def main_rows(bench: Workbench) -> list[Variant]:
    return [replace(v, steps=bench.sampling.steps, sampler=bench.sampling.sampler) for v in MAIN_ROWS]


def shipped_rows(bench: Workbench) -> list[Variant]:
    """Full precision with the sampler of what is shipped, and that."""
    shipped = replace(RECOMMENDED, steps=bench.sampling.steps)
    return [Variant(f"full precision, {shipped.sampler}", sampler=shipped.sampler, steps=shipped.steps), shipped]


def plain_rows(full: Variant, steps: int) -> list[Variant]:
    """Full precision in fewer steps: the same sampler, and the solvers where it adds no noise."""
    rows = [replace(full, name=f"{full.name}, {steps} steps", steps=steps)]
    if full.sampler == "ddim":
        rows += [replace(rows[0], name=f"{solver}, {steps} steps", solver=solver) for solver in SOLVERS]
    return rows


def run_factors(experiment: Experiment) -> list[dict[str, Any]]:
    steps = experiment.bench.sampling.steps
    return [experiment.row(replace(variant, steps=steps), group) for group, variant in factor_rows()]
