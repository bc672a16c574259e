"""Variance compensation under every order and policy, and the paper's whole chain against plain steps in equal time:

    OMP_NUM_THREADS=1 COMFYUI/.venv/bin/python benchmarks/caching/compensation.py COMFYUI BASE FLOW [--chain] [--jobs 8]
    COMFYUI/.venv/bin/python benchmarks/caching/compensation.py --report

BASE is a ComfyUI base directory with the pack in custom_nodes, FLOW the model that flow_model.py trains. Both go on
where they stand, and --jobs shares them out over cores. W8A8 is the paper's order of things: Apply Cache, TAP on
trajectories that it made, GPTQ, then the compensation. --chain measures the chain in CPU seconds, which other programs
hardly change. Writes results/caching-compensation.json and .md.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import shared

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "caching-compensation.json"
IMAGES, PAIRS, TRAJECTORIES, SAMPLES = 16, 32, 16, 128
FIT_SEED, CALIBRATION_SEED, ROUNDS = 502, 501, 5
SUBJECTS = {
    "built-in, ddpm, 50 steps": ("built-in", "ddpm"),
    "built-in, ddim, 50 steps": ("built-in", "ddim"),
    "flow, euler, 50 steps": ("flow", "euler"),
}
POLICIES = ("interval 3, order 0", "interval 3, order 1", "speedup 2x", "speedup 3x", "fast, calibrated")
QUANTIZED = ("speedup 3x",)  # policies that are also run with W8A8
CHAINED = ("fast, calibrated",)


@dataclass
class Bench:
    """A model, its full images, and what is made of it."""

    host: Any
    subject: Any

    @cached_property
    def full(self):
        return self.subject.images(self.subject.patcher, 0)[0]

    @cached_property
    def distances(self):
        import fidelity

        return self.host.module("qandc_core.caching.runs").StepDistances(fidelity.calibrated(self.host, self.subject))

    @cached_property
    def settings(self):
        s = self.subject
        sampling = self.host.module("nodes.comfyui.settings").Settings
        return sampling(s.positive, s.negative, s.steps, s.cfg, s.sampler, s.scheduler)

    def plan(self, seed: int, images: int, **choices):
        config = self.host.module("qandc_core.calibration.choice").CalibrationConfig
        return config(images, IMAGES, seed=seed, rows=IMAGES, **choices)

    @cached_property
    def latent(self):
        prepared = self.host.module("nodes.comfyui.sampling").prepared
        return prepared(self.subject.patcher, {"samples": self.subject.latent})

    def policies(self) -> dict[str, Callable[[], Any]]:
        policies, presets = (self.host.module(f"qandc_core.caching.{name}") for name in ("policies", "presets"))
        return {
            "interval 3, order 0": lambda: policies.Interval(3),
            "interval 3, order 1": lambda: policies.Interval(3, order=1),
            "speedup 2x": lambda: policies.Speedup(2.0, order=1),
            "speedup 3x": lambda: policies.Speedup(3.0, order=1),
            "fast, calibrated": lambda: presets.Preset(level="fast", distances=self.distances),
        }

    def accelerated(self, policy: str, format: str):
        """The model with its cache, and quantized on what its own trajectories show."""
        caching = self.host.module("nodes.comfyui.cache.attach")
        made = caching.apply_cache(self.subject.patcher, caching.CacheSettings(self.policies()[policy]()))
        if format == "float32":
            return made
        calibrate = self.host.module("nodes.comfyui.calibrate.run").calibrate
        native = self.host.module("nodes.comfyui.quantize.native")
        plan = self.plan(CALIBRATION_SEED, TRAJECTORIES, samples=SAMPLES, held_out=2)
        found = calibrate(made, self.settings, self.latent, plan)
        return native.quantize_native(made, native.NativeSettings(format, "gptq"), found)[0]

    def compensated(self, model):
        module = self.host.module("nodes.comfyui.compensation")
        variance, fitted, _ = module.fit_compensation(
            self.subject.patcher, model, self.settings, self.latent, self.plan(FIT_SEED, PAIRS, held_out=0),
            method="variance_match", start=0.0, end=1.0,
        )  # fmt: skip
        return module.attach_compensation(model, variance, fitted)


def cells(name: str) -> list[tuple[str, str, str]]:
    """The slow ones first."""
    quantized = [(name, policy, "W8A8") for policy in QUANTIZED]
    # held on a sampler that adds noise, as with order 0
    held = {"interval 3, order 1"} if SUBJECTS[name][1] == "ddpm" else set()
    return quantized + [(name, policy, "float32") for policy in POLICIES if policy not in held]


def chains(name: str) -> list[tuple[str, str, None]]:
    """None for a sampler that adds noise, which with fewer steps draws another image."""
    return [] if SUBJECTS[name][1] == "ddpm" else [(name, "chain", None)]


def cell(name: str, policy: str, format: str, bench: Bench, measures) -> dict:
    model = bench.accelerated(policy, format)
    plain, calls = bench.subject.images(model, 0)
    fixed, _ = bench.subject.images(bench.compensated(model), 0)
    row = {"subject": name, "policy": policy, "format": format, "calls": calls, "steps": bench.subject.steps}
    return {**row, "without": measures(plain, bench.full), "with": measures(fixed, bench.full)}


def chain(name: str, bench: Bench, measures) -> dict:
    """The chain with the best policies, in turns with the full run, and plain runs of as many steps as take as long."""
    plain, T = bench.subject.patcher, bench.subject.steps
    models = {"full": plain, "Apply Cache, fast": bench.accelerated("fast, calibrated", "float32")}
    for policy in CHAINED:
        made = bench.accelerated(policy, "W8A8")
        models[f"{policy}, W8A8"] = made
        models[f"{policy}, W8A8, VC"] = bench.compensated(made)
    seconds: dict[str, list[float]] = {label: [] for label in models}
    images = {}
    for _ in range(ROUNDS):
        for label, model in models.items():
            begun = time.process_time()
            images[label], _ = bench.subject.images(model, 0)
            seconds[label].append(time.process_time() - begun)
    rows = []
    for label in list(models)[1:]:
        shares = sorted(own / full for own, full in zip(seconds[label], seconds["full"]))
        steps = max(1, min(T, round(T * statistics.median(shares))))
        fewer, _ = bench.subject.images(plain, 0, steps)
        rows.append({"model": label, "share": shares, "steps in equal time": steps})
        rows[-1] |= {"found": measures(images[label], images["full"]), "plain": measures(fewer, images["full"])}
    return {"subject": name, "chain": rows}


def mean(values: list[float], digits: int = 5) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} +- {error:.{digits}f}"


TEXT = f"""# Variance compensation under every order and policy

Relative L2 to the full run in float32, {IMAGES} images with their own noise, mean and standard error; ComfyUI 0.33.0 on
CPU (MACHINE), guidance 2 for the built-in model and 1.5 for the flow model. The compensation (variance_match) was
fitted on {PAIRS} other pairs under the same cache.
"Difference" is what it takes away, paired by image; in bold where it stands at 5 % after Holm's correction for all
rows. On a sampler that adds noise every policy holds its predictions, whatever order it says. Made by
`benchmarks/caching/compensation.py`.

| | computed | without | with | difference |
|---|---|---|---|---|
"""
CHAIN = f"""
## The paper's chain against plain steps in equal time

Apply Cache, TAP Calibrate, Quantize (W8A8, GPTQ), Variance Compensate: CPU seconds of one thread as a share of the full
run's (median and range of {ROUNDS} turns), and the same sampler with as many steps as take as long. These models are
narrow, and ComfyUI's int8 layers are slower than float32 on them on a CPU; at the width of DiT-XL/2 a quantized step
takes 0.64 of one in float32 (comfyui-speed-cpu.md). For the perceptual distance see caching.md.

| | time | error | PSNR, dB | perceptual | plain steps | their error | PSNR, dB | perceptual |
|---|---|---|---|---|---|---|---|---|
"""


def report(rows: list[dict]) -> str:
    from comparisons import Difference, significant

    found = [row for row in rows if "policy" in row]
    known: dict = {}
    for row in found:
        key = row["subject"], row["policy"], row["format"]
        known[key] = Difference.of(row["with"]["errors"], row["without"]["errors"])
    resolved, lines = significant(known), []
    for subject in SUBJECTS:
        lines.append(f"| **{subject}** | | | | |")
        for row in (row for row in found if row["subject"] == subject):
            key = row["subject"], row["policy"], row["format"]
            mark = "**" if key in resolved else ""
            text = f"{mark}{known[key].mean:+.5f} +- {known[key].error:.5f}{mark}"
            own = f"{mean(row['without']['errors'])} | {mean(row['with']['errors'])}"
            lines.append(f"| {row['policy']}, {row['format']} | {row['calls']} of {row['steps']} | {own} | {text} |")
    chained = []
    for part in (row for row in rows if "chain" in row):
        chained.append(f"| **{part['subject']}** | | | | | | | | |")
        for row in part["chain"]:
            share = row["share"]
            time_ = f"{statistics.median(share):.2f} ({share[0]:.2f}-{share[-1]:.2f})"
            texts = [
                f"{mean(of['errors'])} | {statistics.mean(of['psnr']):.1f} | {statistics.mean(of['perceptual']):.4f}"
                for of in (row["found"], row["plain"])
            ]
            chained.append(f"| {row['model']} | {time_} | {texts[0]} | {row['steps in equal time']} | {texts[1]} |")
    text = TEXT.replace("MACHINE", shared.machines(rows))
    return text + "\n".join(lines) + "\n" + (CHAIN + "\n".join(chained) + "\n" if chained else "")


def row_key(row: dict) -> tuple:
    return row["subject"], row.get("policy", "chain"), row.get("format")


def main() -> None:
    parser = shared.options(__doc__, RESULTS)
    parser.add_argument("--chain", action="store_true", help="measure the whole chain alone")
    args = parser.parse_args()
    if args.report:
        args.out.with_suffix(".md").write_text(report(shared.read(args.out)), encoding="utf-8")
        return
    sys.path.insert(0, str(ROOT / "tests" / "comfyui" / "inside"))
    from host import Host

    host = Host(args.comfyui, args.base)
    import comfy.utils
    import fidelity
    import torch

    comfy.utils.PROGRESS_BAR_ENABLED = False
    measures = fidelity.Measures(host)

    @cache
    def bench(name: str) -> Bench:
        kind, sampler = SUBJECTS[name]
        if kind == "built-in":
            return Bench(host, fidelity.built_in(host, sampler))
        return Bench(host, fidelity.flow(host, str(args.flow), sampler, 50))

    def work(unit: tuple[str, str, str | None]) -> None:
        name, policy, format = unit
        if format is None:
            row = chain(name, bench(name), measures)
        else:
            row = cell(name, policy, format, bench(name), measures)
        shared.keep(args.out, [row], row_key)

    done = {row_key(row) for row in shared.read(args.out)}
    names = [name for name in SUBJECTS if shared.chosen(name, args.only)]
    units = [unit for name in names for unit in (chains(name) if args.chain else cells(name)) if unit not in done]
    with torch.inference_mode():
        shared.in_turns(units, work, args.jobs, args.seconds)


if __name__ == "__main__":
    main()
