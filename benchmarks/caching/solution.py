"""Apply Cache with a good solver against the best plain sampler with as many model calls, by distance to the solution:

    COMFYUI/.venv/bin/python benchmarks/caching/solution.py COMFYUI BASE out/digits_flow.safetensors

BASE is a ComfyUI base directory with the pack in custom_nodes. The solution is dpmpp_2m with 400 steps. Writes
results/caching-solution.json and .md; --report alone writes the .md again.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from pathlib import Path

import fidelity
import torch

RESULTS = Path(__file__).parents[1] / "results"
IMAGES, STEPS, SOLUTION = 12, 50, 400
DRAWS = 4000  # of the bootstrap
CALLS = (15, 20, 25)
PLAIN = (
    "euler", "heun", "dpm_2", "lms", "dpmpp_2m", "ipndm", "ipndm_v", "deis", "res_multistep", "gradient_estimation",
    "uni_pc", "uni_pc_bh2",
)  # fmt: skip
TWO_CALLS = ("heun", "dpm_2")
CACHED = ("dpmpp_2m", "res_multistep")


def main() -> None:
    if sys.argv[1:] == ["--report"]:
        rows = json.loads((RESULTS / "caching-solution.json").read_text(encoding="utf-8"))
        (RESULTS / "caching-solution.md").write_text(report(rows), encoding="utf-8")
        return
    checkout, base, weights = sys.argv[1:4]
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "comfyui" / "inside"))
    from host import Host

    host = Host(checkout, base)
    fidelity.IMAGES = IMAGES
    policies, runs = host.module("qandc_core.caching.policies"), host.module("qandc_core.caching.runs")
    caching = host.module("nodes.comfyui.cache.attach")
    rows: list[dict] = []

    def add(name: str, method: str, calls: int, images, solution) -> None:
        rows.append({"subject": name, "method": method, "calls": calls})
        rows[-1]["errors"] = fidelity.relative_l2(images, solution)
        print(name, method, calls, statistics.mean(rows[-1]["errors"]), file=sys.stderr, flush=True)

    with torch.inference_mode():
        for name, subject in {
            "digits DiT": fidelity.digits(host, "dpmpp_2m"),
            "flow": fidelity.flow(host, weights, "dpmpp_2m", STEPS),
        }.items():
            solution = subject.images(subject.patcher, 0, SOLUTION)[0]
            for sampler in PLAIN:
                subject.sampler = sampler
                for calls in CALLS:
                    steps = calls // 2 if sampler in TWO_CALLS else calls
                    add(name, f"{sampler}, plain", calls, subject.images(subject.patcher, 0, steps)[0], solution)
            for sampler in CACHED:
                subject.sampler = sampler
                add(name, f"{sampler}, plain", STEPS, subject.images(subject.patcher, 0, STEPS)[0], solution)
                known = runs.StepDistances(fidelity.calibrated(host, subject))
                for calls in CALLS:
                    for text, choices in {
                        "as the presets": {"order": 1},
                        "calibrated, order 1": {"order": 1, "distances": known},
                        "calibrated, order 2": {"order": 2, "distances": known},
                    }.items():
                        policy = policies.StepCount(calls, **choices)
                        made = caching.apply_cache(subject.patcher, caching.CacheSettings(policy, "whole prediction"))
                        images = subject.images(made, 0)[0]
                        add(name, f"{sampler} 50 with Apply Cache, {text}", calls, images, solution)
    (RESULTS / "caching-solution.json").write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    (RESULTS / "caching-solution.md").write_text(report(rows), encoding="utf-8")


def report(rows: list[dict]) -> str:
    count = len(rows[0]["errors"])
    lines = [
        "# A good solver with Apply Cache against plain samplers",
        "",
        f"Relative L2 to the solution (dpmpp_2m, {SOLUTION} steps), mean and standard error over {count} images with",
        "their own noise, cfg 1.5. A column is a number of model calls; heun and dpm_2 make two a step. Made by",
        "`benchmarks/caching/solution.py`.",
        "",
    ]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = {(row["method"], row["calls"]): row["errors"] for row in rows if row["subject"] == subject}
        columns = [*CALLS, STEPS]
        lines += [f"## {subject}", "", "| | " + " | ".join(f"{n} calls" for n in columns) + " |"]
        lines.append("|---|" + "---|" * len(columns))
        for method in dict.fromkeys(method for method, _ in own):
            cells = [own.get((method, calls)) for calls in columns]
            lines.append(f"| {method} | " + " | ".join(map(cell, cells)) + " |")
        lines += ["", *halves(own), ""]
    return "\n".join(lines)


def halves(own: dict[tuple[str, int], list[float]]) -> list[str]:
    """Where half of the best plain sampler's error is reached: our error over its, with its 95 % interval."""
    lines = [
        "Error over that of the best plain sampler, which is chosen afterwards, with the 95 % interval of a bootstrap "
        "over the images; is it half or less?",
        "",
        "| | " + " | ".join(f"{n} calls" for n in CALLS) + " |",
        "|---|" + "---|" * len(CALLS),
    ]
    plain = [method for method, _ in own if method.endswith(", plain")]
    for method in dict.fromkeys(method for method, _ in own if "Apply Cache" in method):
        texts = []
        for calls in CALLS:
            best = min((own[name, calls] for name in plain if (name, calls) in own), key=statistics.mean)
            low, middle, high = ratio(own[method, calls], best)
            half = "yes" if high <= 0.5 else "not resolved" if low <= 0.5 else "no"
            texts.append(f"{middle:.2f} ({low:.2f}-{high:.2f}): {half}")
        lines.append(f"| {method} | {' | '.join(texts)} |")
    return lines


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    draw = random.Random(0)
    ratios = []
    for _ in range(DRAWS):
        chosen = draw.choices(range(len(ours)), k=len(ours))
        ratios.append(sum(ours[i] for i in chosen) / sum(theirs[i] for i in chosen))
    ratios.sort()
    return ratios[DRAWS // 40], statistics.mean(ours) / statistics.mean(theirs), ratios[-1 - DRAWS // 40]


def cell(errors: list[float] | None) -> str:
    return (
        ""
        if errors is None
        else f"{statistics.mean(errors):.4f} +- {statistics.stdev(errors) / len(errors) ** 0.5:.4f}"
    )


if __name__ == "__main__":
    main()
