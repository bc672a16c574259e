"""Every sampler of ComfyUI at few and many steps: the presets of Apply Cache against runs of as many steps.

    COMFYUI/.venv/bin/python benchmarks/caching/samplers.py COMFYUI BASE out/digits_flow.safetensors [--seconds 300]

BASE is a ComfyUI base directory with the pack in custom_nodes. Writes results/caching-samplers.json after each sampler
and goes on where it stands, so that --seconds may cut it into pieces; --report writes caching-samplers.md from it.
Left out are names that are the same on CPU (_gpu) and dpm_adaptive, which chooses its steps itself.

Each image of a batch has its own noise and counts as one seed. A method is a function from a sampler, a number of
steps and a number of computed steps to a model; METHODS takes others.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fidelity import Subject
    from host import Host

RESULTS = Path(__file__).parents[1] / "results"
STEPS = (4, 6, 8, 12, 20, 30, 50)
LEVELS = ("safe", "balanced", "fast")
IMAGES, CONVERGED = 6, 300  # images of a batch, and steps of dpmpp_2m that count as the solution


def preset(host: Host, patcher: Any, level: str) -> Any:
    """The model with a preset of Apply Cache; how many steps it computes is counted in the run."""
    policies, caching = host.module("qandc_core.caching.presets"), host.module("nodes.comfyui.cache.attach")
    return caching.apply_cache(patcher, caching.CacheSettings(policies.Preset(level=level), "automatic"))


METHODS: dict[str, Callable[[Any, Any, str], Any]] = {"preset": preset}


def errors(images, reference) -> list[float]:
    """Relative L2 of each image."""
    from fidelity import relative_l2

    return [float(f"{error:.4g}") for error in relative_l2(images, reference)]


def measured(host: Host, name: str, subject: Subject, sampler: str, converged, method: str) -> list[dict]:
    """Rows of one sampler on one model: its plain runs, and every preset at every number of steps."""
    subject.sampler = sampler
    plain: dict[int, Any] = {}

    def images(steps: int):
        if steps not in plain:
            plain[steps] = subject.images(subject.patcher, 0, steps)
        return plain[steps][0]

    noisy = host.module("nodes.comfyui.wrappers").declares_noise(sampler_object(sampler))
    rows: list[dict] = []
    for steps in STEPS:
        full = images(steps)
        for level in LEVELS:
            found, calls = subject.images(METHODS[method](host, subject.patcher, level), 0, steps)
            computed = round(steps * calls / plain[steps][1])
            row = {"subject": name, "sampler": sampler, "noisy": noisy, "steps": steps, "level": level}
            rows.append({**row, "method": method, "computed": computed, "error": errors(found, full)})
            if computed < steps:
                rows[-1]["fewer"] = errors(images(computed), full)
            if not noisy:
                rows[-1]["converged"] = errors(found, converged)
                rows[-1]["fewer converged"] = errors(images(computed), converged)
    return rows


def sampler_object(name: str):
    import comfy.samplers

    return comfy.samplers.sampler_object(name)


def difference(row: dict, ours: str = "error", theirs: str = "fewer") -> tuple[float, float]:
    """Mean and standard error over the images of how much less we err."""
    pairs = [b - a for a, b in zip(row[ours], row[theirs])]
    return statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5


def judged(rows: list[dict], ours: str = "error", theirs: str = "fewer") -> str:
    """How many cells are better and how many worse than fewer steps, each by more than twice the standard error."""
    found = [difference(row, ours, theirs) for row in rows if theirs in row and row["computed"] < row["steps"]]
    better, worse = sum(mean > 2 * error for mean, error in found), sum(mean < -2 * error for mean, error in found)
    return f"{better} / {len(found) - better - worse} / {worse}"


def ratio(rows: list[dict]) -> str:
    """Geometric mean of our error over that of fewer steps."""
    logs = [
        math.log(statistics.mean(row["error"]) / statistics.mean(row["fewer"])) for row in rows if "fewer" in row
    ]  # fmt: skip
    return f"{math.exp(statistics.mean(logs)):.2f}" if logs else "-"


TEXT = """# Every sampler against as many steps of it

Presets of Apply Cache on ComfyUI 0.33.0, float32 on CPU, guidance 1.5, {images} images with their own noise each. A
cell is a sampler, a number of steps and a preset; its error is the relative L2 distance to the run that computes all
steps, and to the solution (dpmpp_2m, {converged} steps) for samplers that add no noise. "Better / equal / worse"
compares with a run of as many steps of the same sampler as were computed, by paired differences and twice their
standard error; cells in which a preset computes all steps are not counted. "Ratio" is the geometric mean of our error
over that of fewer steps, to the full run. CFG++ has another solution. Rows that are missing were not run. Made by
`benchmarks/caching/samplers.py`.
"""


def report(rows: list[dict]) -> str:
    parts = [TEXT.format(images=len(rows[0]["error"]), converged=CONVERGED)]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if row["subject"] == subject]
        parts += [f"## {subject}, by steps", "", *by(own, "steps", STEPS), ""]
        parts += [
            f"## {subject}, by sampler",
            "",
            *by(own, "sampler", dict.fromkeys(row["sampler"] for row in own)),
            "",
        ]
        worse = [
            row for row in own if "fewer" in row and difference(row)[0] < -2 * difference(row)[1]
        ]  # fmt: skip
        if worse:
            parts += ["Worse than as many steps:", ""]
            parts += [
                f"- {row['sampler']}, {row['steps']} steps, {row['level']} ({row['computed']} computed): "
                f"{statistics.mean(row['error']):.4f} against {statistics.mean(row['fewer']):.4f}"
                for row in worse
            ]
            parts.append("")
    return "\n".join(parts)


def by(rows: list[dict], key: str, values) -> list[str]:
    lines = [
        f"| {key} | ratio | to the full run: better / equal / worse | to the solution | all computed |",
        "|---|---|---|---|---|",
    ]
    for value in values:
        own = [row for row in rows if row[key] == value]
        known = [row for row in own if "converged" in row and "cfg_pp" not in row["sampler"]]
        idle = sum(row["computed"] == row["steps"] for row in own)
        to_solution = judged(known, "converged", "fewer converged") if known else "-"
        lines.append(f"| {value} | {ratio(own)} | {judged(own)} | {to_solution} | {idle} of {len(own)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", nargs="?")
    parser.add_argument("base", nargs="?")
    parser.add_argument("flow", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=RESULTS / "caching-samplers.json")
    parser.add_argument("--method", default="preset", choices=METHODS)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    if args.report:
        args.out.with_suffix(".md").write_text(report(rows), encoding="utf-8")
        return
    begun = time.perf_counter()
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "comfyui" / "inside"))
    from host import Host

    host = Host(args.comfyui, args.base)
    import comfy.samplers
    import fidelity
    import torch

    fidelity.IMAGES = IMAGES
    made = {
        "built-in": lambda: fidelity.built_in(host, "euler"),
        "flow": lambda: fidelity.flow(host, str(args.flow), "euler", 50),
    }
    names = [name for name in comfy.samplers.SAMPLER_NAMES if not name.endswith("_gpu") and name != "dpm_adaptive"]
    with torch.inference_mode():
        for name, make in made.items():
            done = {row["sampler"] for row in rows if row["subject"] == name and row["method"] == args.method}
            left = [sampler for sampler in names if sampler not in done]
            if not left or time.perf_counter() - begun > args.seconds:
                continue
            subject = make()
            subject.sampler = "dpmpp_2m"
            converged = subject.images(subject.patcher, 0, CONVERGED)[0]
            for sampler in left:
                if time.perf_counter() - begun > args.seconds:
                    break
                rows += measured(host, name, subject, sampler, converged, args.method)
                args.out.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]\n", encoding="utf-8")
                print(name, sampler, f"{time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
