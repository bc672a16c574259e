"""Where the computed steps lie and how the others are forecast, at equal computed steps:

    COMFYUI/.venv/bin/python benchmarks/caching/plans.py COMFYUI BASE benchmarks/caching/flow_model.safetensors

BASE is a ComfyUI base directory with the pack in custom_nodes. Calibrated steps are planned from the distances of one
run on noise of its own: for holding ("order 0 plan", executed by order 1), and for the forecast that is executed.
Writes results/caching-plans.json and .md.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import fidelity
import torch

RESULTS = Path(__file__).parents[1] / "results"
IMAGES, SHARES = 6, (1.5, 2, 3)


def main() -> None:
    checkout, base, weights = sys.argv[1:4]
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "comfyui" / "inside"))
    from host import Host

    host = Host(checkout, base)
    fidelity.IMAGES = IMAGES
    policies, optimum = host.module("qandc_core.caching.policies"), host.module("qandc_core.caching.optimum")
    caching = host.module("nodes.comfyui.cache.attach")
    rows = []
    with torch.inference_mode():
        for name, subject in {
            "built-in, ddim, 50 steps": fidelity.built_in(host, "ddim"),
            "built-in, dpmpp_2m, 50 steps": fidelity.built_in(host, "dpmpp_2m"),
            "flow, euler, 50 steps": fidelity.flow(host, weights, "euler", 50),
            "flow, dpmpp_2m, 20 steps": fidelity.flow(host, weights, "dpmpp_2m", 20),
        }.items():
            full = subject.images(subject.patcher, 0)[0]
            distances = fidelity.calibrated(host, subject)
            for share in SHARES:
                count = int(subject.steps / share)
                plans = {"fewer steps": None, "spaced, order 1": (set(), 1)}
                for planned, executed in ((0, 1), (1, 1), (2, 2)):
                    steps = optimum.optimal_schedule(distances, count, order=planned)
                    plans[f"order {planned} plan, order {executed}"] = set(steps), executed
                for plan, chosen in plans.items():
                    if chosen is None:
                        images = subject.images(subject.patcher, 0, count)[0]
                    else:
                        steps, order = chosen
                        placed = policies.ChosenSteps(steps, order=order)
                        policy = placed if steps else policies.StepCount(count, order=order)
                        made = caching.apply_cache(subject.patcher, caching.CacheSettings(policy, "whole prediction"))
                        images = subject.images(made, 0)[0]
                    rows.append({"subject": name, "plan": plan, "computed": count})
                    rows[-1]["errors"] = fidelity.relative_l2(images, full)
                    print(name, plan, count, statistics.mean(rows[-1]["errors"]), file=sys.stderr, flush=True)
    (RESULTS / "caching-plans.json").write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    (RESULTS / "caching-plans.md").write_text(report(rows), encoding="utf-8")


def report(rows: list[dict]) -> str:
    lines = [
        "# Plans for the forecast that is executed",
        "",
        f"Relative L2 to the full run, mean and standard error over {IMAGES} images with their own noise. Made",
        "by `benchmarks/caching/plans.py`.",
        "",
    ]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = {(row["plan"], row["computed"]): row["errors"] for row in rows if row["subject"] == subject}
        counts = list(dict.fromkeys(count for _, count in own))
        lines += [f"## {subject}", "", "| plan | " + " | ".join(f"{n} computed" for n in counts) + " |"]
        lines.append("|---|" + "---|" * len(counts))
        for plan in dict.fromkeys(plan for plan, _ in own):
            found = [own[plan, count] for count in counts]
            texts = (f"{statistics.mean(f):.5f} +- {statistics.stdev(f) / len(f) ** 0.5:.5f}" for f in found)
            lines.append(f"| {plan} | " + " | ".join(texts) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
