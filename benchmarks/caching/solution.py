"""Apply Cache with a good solver against the best plain sampler with as many model calls, by distance to the solution:

    COMFYUI/.venv/bin/python benchmarks/caching/solution.py COMFYUI BASE benchmarks/caching/flow_model.safetensors

BASE is a ComfyUI base directory with the pack in custom_nodes. The solution is dpmpp_2m with 400 steps. Writes
results/caching-solution.json after each run and goes on where it stands; --report writes caching-solution.md from it.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import fidelity
import shared
import torch

if TYPE_CHECKING:
    from host import Host

RESULTS = Path(__file__).parents[1] / "results"
IMAGES, STEPS, SOLUTION = 16, 50, 400
DRAWS = 4000  # of the bootstrap
CALLS = (15, 20, 25)
PLAIN = (
    "euler", "heun", "dpm_2", "lms", "dpmpp_2m", "ipndm", "ipndm_v", "deis", "res_multistep", "gradient_estimation",
    "uni_pc", "uni_pc_bh2",
)  # fmt: skip
TWO_CALLS = ("heun", "dpm_2")
CACHED = ("dpmpp_2m", "res_multistep")
WAYS = {  # order, and whether a calibration places the steps
    "as the presets": (1, False),
    "calibrated, order 1": (1, True),
    "calibrated, order 2": (2, True),
}


def row_key(row: dict) -> tuple:
    return row["subject"], row["method"], row["calls"]


def main() -> None:
    parser = shared.options(__doc__ or "", RESULTS / "caching-solution.json")
    args = parser.parse_args()
    if args.report:
        args.out.with_suffix(".md").write_text(report(shared.read(args.out)), encoding="utf-8")
        return
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "comfyui" / "inside"))
    from host import Host

    host = Host(args.comfyui, args.base)
    fidelity.IMAGES = IMAGES
    made = fidelity.models(host, str(args.flow), "dpmpp_2m", STEPS)

    @cache
    def solution(name: str) -> torch.Tensor:
        made[name].sampler = "dpmpp_2m"
        return made[name].images(made[name].patcher, 0, SOLUTION)[0]

    def work(unit: tuple[str, str]) -> None:
        name, sampler = unit
        target, subject = solution(name), made[name]
        subject.sampler = sampler
        for method, calls, images in runs(host, subject, sampler):
            row = {"subject": name, "method": method, "calls": calls, "errors": fidelity.relative_l2(images, target)}
            shared.keep(args.out, [row], row_key)

    done = {row_key(row) for row in shared.read(args.out) if len(row["errors"]) == IMAGES}
    units = [
        (name, sampler)
        for name in made
        for sampler in (*CACHED, *(sampler for sampler in PLAIN if sampler not in CACHED))
        if shared.chosen(name, args.only) and not methods(name, sampler) <= done
    ]
    with torch.inference_mode():
        shared.in_turns(units, work, args.jobs, args.seconds)


def methods(name: str, sampler: str) -> set[tuple]:
    """Keys of a sampler's rows."""
    cached = [f"{sampler} 50 with Apply Cache, {text}" for text in WAYS] if sampler in CACHED else []
    found = {(name, method, calls) for method in (f"{sampler}, plain", *cached) for calls in CALLS}
    return found | ({(name, f"{sampler}, plain", STEPS)} if cached else set())


def runs(host: Host, subject: fidelity.Subject, sampler: str) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Method, model calls and images."""
    policies, stored = host.module("qandc_core.caching.policies"), host.module("qandc_core.caching.runs")
    caching = host.module("nodes.comfyui.cache.attach")
    for calls in CALLS:
        steps = calls // 2 if sampler in TWO_CALLS else calls
        yield f"{sampler}, plain", calls, subject.images(subject.patcher, 0, steps)[0]
    if sampler not in CACHED:
        return
    yield f"{sampler}, plain", STEPS, subject.images(subject.patcher, 0, STEPS)[0]
    known = stored.StepDistances(fidelity.calibrated(host, subject))
    for calls, (text, (order, planned)) in product(CALLS, WAYS.items()):
        policy = policies.StepCount(calls, order=order, distances=known if planned else None)
        made = caching.apply_cache(subject.patcher, caching.CacheSettings(policy, "whole prediction"))
        yield f"{sampler} 50 with Apply Cache, {text}", calls, subject.images(made, 0)[0]


def report(rows: list[dict]) -> str:
    count = len(rows[0]["errors"])
    lines = [
        "# A good solver with Apply Cache against plain samplers",
        "",
        f"Relative L2 to the solution (dpmpp_2m, {SOLUTION} steps), mean and standard error over {count} images with",
        f"their own noise; ComfyUI 0.33.0, float32 on CPU ({shared.machines(rows)}).",
        "A column is a number of model calls; heun and dpm_2 make two a step. Made by",
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
