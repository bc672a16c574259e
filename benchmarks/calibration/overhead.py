"""What Calibrate from Runs costs: runs of KSampler with and without it in turns, on a Flux of middling size on the CPU.

    COMFYUI/python benchmarks/calibration/overhead.py CHECKOUT BASE [pairs]

BASE is a ComfyUI base directory with the pack in it, and OMP_NUM_THREADS is 1. A run of 20 steps under guidance, and
one of four without, as distilled models have them: the clock until the image is there, the time of a core that the run
took until then, which hardly depends on what else a machine does, and that with the file, which another thread adds
beside what comes next. Writes results/calibration-overhead.json and calibration-overhead.md.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

WIDTH, HEADS, SIDE = 384, 12, 32
RUNS = ((20, 2.0), (4, 1.0))  # steps, guidance
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "comfyui" / "inside")]
STUDENT = {7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 11: 2.201, 12: 2.179, 15: 2.131, 17: 2.110, 19: 2.093}  # 95 %


def measure(checkout: str, base: str, pairs: int) -> dict[str, Any]:
    from host import Host

    host = Host(checkout, base)
    import torch
    from families import build, conditioning
    from family_configs import flux
    from family_list import FAMILIES

    torch.manual_seed(0)
    family = FAMILIES["Flux"]
    sizes = {"hidden_size": WIDTH, "num_heads": HEADS, "mlp_ratio": 4.0, "depth": 2, "depth_single_blocks": 4}
    patcher = build(type(family)("Flux", flux(image_model="flux", **sizes), family.latent, conds=family.conds))
    node, files = host.module("nodes.calibrate_from_runs"), host.module("nodes.comfyui.files")
    recording = host.module("nodes.comfyui.calibrate.recording")
    added, add_run = [], recording.add_run

    def timed(*args):
        begun = time.perf_counter()
        try:
            return add_run(*args)
        finally:
            added.append(time.perf_counter() - begun)

    recording.add_run = timed

    def run(model, seed: int, steps: int, guidance: float) -> list[float]:
        """Seconds of the clock and of a core until the image is there, and of a core until the file is too."""
        latent = {"samples": torch.zeros(1, 16, SIDE, SIDE)}
        begun = time.perf_counter(), time.thread_time(), time.process_time()
        host.nodes.common_ksampler(
            model, seed, steps, guidance, "euler", "simple", conditioning(family, 1), conditioning(family, 2), latent
        )
        sampled = [time.perf_counter() - begun[0], time.thread_time() - begun[1]]
        recording.settle()
        return [*sampled, time.process_time() - begun[2]]

    found = []
    for steps, guidance in RUNS:
        name = f"overhead {steps}"
        recorded = node.CalibrateFromRuns.execute(patcher, name, True, 8, True, 4.0, 4096, 8, 0).args[0]
        added.clear()
        with torch.inference_mode():
            run(patcher, 0, steps, guidance), run(recorded, 0, steps, guidance)
            times = []
            for seed in range(pairs):  # each first in turn
                order = (patcher, recorded) if seed % 2 else (recorded, patcher)
                took = {model is recorded: run(model, seed, steps, guidance) for model in order}
                times.append([took[False], took[True]])
        size = files.named_path(name).stat().st_size / 2**20
        found.append({"steps": steps, "guidance": guidance, "pairs": times, "adding": added[1:], "file MiB": size})
    return {"runs": found, "threads": torch.get_num_threads()}


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the geometric mean, by Student's distribution of the logarithms."""
    logs = [math.log(ratio) for ratio in ratios]
    near = min(STUDENT, key=lambda degrees: (degrees > len(logs) - 1, abs(degrees - len(logs) + 1)))
    half = STUDENT[near] * stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean(logs) - half), math.exp(mean(logs) + half)


def row(name: str, pairs: list[tuple[float, float]]) -> str:
    plain, slow = zip(*pairs)
    ratios = sorted(b / a for a, b in pairs)
    low, high = interval(ratios)
    geometric = math.exp(mean(map(math.log, ratios)))
    times = " | ".join(f"{median(part):.2f} s ({min(part):.2f}-{max(part):.2f})" for part in (plain, slow))
    return f"| {name} | {times} | {geometric:.3f}x ({low:.3f}-{high:.3f}) | {ratios[0]:.3f}-{ratios[-1]:.3f} |"


def report(result: dict[str, Any]) -> str:
    runs, rows = result["runs"], []
    for found in runs:
        for i, clock in enumerate(("clock", "time of a core", "with the file")):
            name = f"{found['steps']} steps, guidance {found['guidance']:g}, {clock}"
            rows.append(row(name, [(a[i], b[i]) for a, b in found["pairs"]]))
    added = ", ".join(f"{median(found['adding']):.2f} s" for found in runs)
    size, pairs = runs[0]["file MiB"], len(runs[0]["pairs"])
    return f"""# What recording a run costs

KSampler on a Flux of width {WIDTH} (2 double and 4 single blocks, a {SIDE} x {SIDE} latent) with and without Calibrate
from Runs, {pairs} pairs in turns; ComfyUI 0.33.0, float32, {result["machine"]}, {result["threads"]} thread.
Other work ran on the machine, which the clock sees and the time of a core hardly does. Both stop when the image is
there; the last row of each counts the file too ({size:.0f} MiB), which another thread adds beside what comes next, in
{added} of the clock (medians).

| | plain, median (range) | recorded, median (range) | ratio, geometric mean (95 % interval) | range of pairs |
|---|---|---|---|---|
{chr(10).join(rows)}

Made by `benchmarks/calibration/overhead.py`.
"""


def main() -> None:
    checkout, base, *more = sys.argv[1:]  # ComfyUI reads sys.argv later
    found = measure(checkout, base, int(more[0]) if more else 8)
    from qandc_core.evaluation.experiment import cpu_name

    result = {**found, "machine": cpu_name()}
    path = RESULTS / "calibration-overhead.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(result))


if __name__ == "__main__":
    main()
