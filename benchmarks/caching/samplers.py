"""Every sampler of ComfyUI at few and many steps: the presets of Apply Cache against runs of as many steps.

    OMP_NUM_THREADS=1 COMFYUI/.venv/bin/python benchmarks/caching/samplers.py COMFYUI BASE FLOW

BASE is a ComfyUI base directory with the pack in custom_nodes, FLOW flow_model.safetensors. Writes
results/caching-samplers.json after each sampler and goes on where it stands, so that --seconds may cut it into pieces,
and --jobs share it out over cores; --report writes caching-samplers.md from it. Left out are names that are the same
on CPU (_gpu) and dpm_adaptive, which chooses its steps itself.

Each image of a batch has its own noise and counts as one seed. A method is a function from a sampler, a number of
steps and a number of computed steps to a model; METHODS takes others.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shared
from comparisons import Difference, significant

if TYPE_CHECKING:
    from fidelity import Subject
    from host import Host

RESULTS = Path(__file__).parents[1] / "results"
STEPS = (4, 6, 8, 12, 20, 30, 50)
LEVELS = ("safe", "balanced", "fast")
IMAGES, CONVERGED = 6, 300  # images of a batch, and steps of dpmpp_2m that count as the solution


def preset(host: Host, patcher: Any, level: str) -> Any:
    """How many steps it computes is counted in the run."""
    import fidelity

    return fidelity.preset(host, patcher, level)


METHODS: dict[str, Callable[[Any, Any, str], Any]] = {"preset": preset}


def errors(images, reference) -> list[float]:
    """Relative L2 of each image."""
    from fidelity import relative_l2

    return [float(f"{error:.4g}") for error in relative_l2(images, reference)]


def measured(host: Host, name: str, subject: Subject, sampler: str, converged, method: str) -> list[dict]:
    """Rows of one sampler on one model: its plain runs, and every preset at every number of steps."""
    subject.sampler = sampler
    noisy = host.module("nodes.comfyui.wrappers").declares_noise(sampler_object(sampler))
    common = {"subject": name, "sampler": sampler, "noisy": noisy}
    runs = Runs(subject)
    rows: list[dict] = []
    for steps in STEPS:
        full, calls_of_all = runs.plain(steps)
        for level in LEVELS:
            found, calls = runs.cached(host, METHODS[method](host, subject.patcher, level), steps, level)
            computed = round(steps * calls / calls_of_all)
            rows.append({**common, "steps": steps, "level": level, "method": method})
            rows[-1] |= {"computed": computed, "calls": calls, "error": errors(found, full)}
            if computed < steps:
                rows[-1]["fewer"] = errors(runs.plain(computed)[0], full)
            if not noisy:
                rows[-1]["converged"] = errors(found, converged)
                rows[-1]["fewer converged"] = errors(runs.plain(computed)[0], converged)
    if not noisy:
        for steps, (images, calls) in runs.known.items():
            rows.append({**common, "steps": steps, "level": "plain", "method": method, "computed": steps})
            rows[-1] |= {"calls": calls, "converged": errors(images, converged)}
    return rows


class Runs:
    """Images and model calls of one sampler; what is the same run again is not run again."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.known: dict[int, tuple[Any, int]] = {}
        self.planned: dict[tuple, tuple[Any, int]] = {}

    def plain(self, steps: int) -> tuple[Any, int]:
        if steps not in self.known:
            self.known[steps] = self.subject.images(self.subject.patcher, 0, steps)
        return self.known[steps]

    def cached(self, host: Host, patcher: Any, steps: int, level: str) -> tuple[Any, int]:
        """A run with a preset. Presets with the same plan make the same images; one that computes all runs too, once
        at the fewest and once at the most steps, and is taken for the plain run between."""
        plan = self.plan(host, steps, level)
        key = steps, frozenset(plan.steps), plan.order
        if key not in self.planned:
            idle = len(plan.steps) == steps and steps not in (STEPS[0], STEPS[-1])
            self.planned[key] = self.plain(steps) if idle else self.subject.images(patcher, 0, steps)
        return self.planned[key]

    def plan(self, host: Host, steps: int, level: str) -> Any:
        wrappers, presets = host.module("nodes.comfyui.wrappers"), host.module("qandc_core.caching.presets")
        sampler = sampler_object(self.subject.sampler)
        name = wrappers.sampler_function_name(sampler).removeprefix("sample_")
        facts = {"sampler": name, "noisy": wrappers.declares_noise(sampler), "guided": True}
        facts["flow"] = wrappers.is_flow(self.subject.patcher.model)
        return presets.Preset(level=level).plan(steps, **facts)


def sampler_object(name: str):
    import comfy.samplers

    return comfy.samplers.sampler_object(name)


def reused(rows: list[dict]) -> list[dict]:
    """The cells in which a preset reuses anything, once where two presets made the same run."""
    found = {}
    for row in rows:
        if "fewer" in row:
            found[row["subject"], row["sampler"], row["steps"], row["computed"]] = row
    return list(found.values())


def differences(rows: list[dict], ours: str, theirs: str) -> list[tuple[dict, Difference]]:
    return [(row, Difference.of(row[ours], row[theirs])) for row in rows if theirs in row]


def judged(found: list[tuple[dict, Difference]]) -> str:
    """How many are better, equal and worse, each by more than twice the standard error."""
    signs = [difference.beyond for _, difference in found]
    return f"{signs.count(1)} / {signs.count(0)} / {signs.count(-1)}" if signs else "-"


def ratio(rows: list[dict]) -> str:
    """Geometric mean of our error over that of fewer steps."""
    logs = [math.log(statistics.mean(row["error"]) / statistics.mean(row["fewer"])) for row in rows]
    return f"{math.exp(statistics.mean(logs)):.2f}" if logs else "-"


def with_best(rows: list[dict]) -> list[dict]:
    """The cells that have a solution, each with the plain run of any sampler that is nearest to it and calls the model
    no more often."""
    plain = [row for row in rows if row["level"] == "plain" and comparable(row)]
    found = []
    for row in reused(rows):
        affordable = [p for p in plain if p["subject"] == row["subject"] and p["calls"] <= row["calls"]]
        if comparable(row) and affordable:
            best = min(affordable, key=lambda p: statistics.mean(p["converged"]))
            found.append({**row, "best": best["converged"], "best sampler": best["sampler"]})
    return found


def comparable(row: dict) -> bool:
    return "converged" in row and "cfg_pp" not in row["sampler"]


TEXT = """# Every sampler against as many steps of it, and of the best one

Presets of Apply Cache on ComfyUI 0.33.0, float32 on CPU ({machine}), {images} images with their own noise each, at
guidance 1.5 and of the built-in model 2. Nothing about the cache was chosen on either model. A cell is a
sampler, a number of steps and a preset that computes fewer; presets with the same steps are one cell. Its error is
the relative L2 distance to the run that computes all steps, and for samplers that add no noise also to the solution
(dpmpp_2m, {converged} steps; CFG++ has another one). It is compared, paired by image, with a run of as many steps of
the same sampler as were computed, and with the best plain run of any sampler with as many model calls or fewer, which
is chosen afterwards. "Better / equal / worse" goes by twice the standard error, which one cell in ten passes by
chance with so few images; what stands after Holm's correction for all cells ({cells}) is said below each model.
"Ratio" is the geometric mean of our error over that of fewer steps, to the full run. Made by
`benchmarks/caching/samplers.py`.
"""


def report(rows: list[dict]) -> str:
    cells = reused(rows)
    known = {cell_of(row): difference for row, difference in differences(cells, "error", "fewer")}
    firm = significant(known)
    parts = [
        TEXT.format(
            machine=shared.machines(rows), images=len(rows[0]["converged"]), converged=CONVERGED, cells=len(known)
        )
    ]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if row["subject"] == subject]
        parts += [f"## {subject}, by steps", "", *by(own, "steps", STEPS), ""]
        better = sum(key in firm and known[key].mean > 0 for key in known if key[0] == subject)
        worse = [row for row in reused(own) if known[cell_of(row)].beyond < 0]
        stands = [row for row in worse if cell_of(row) in firm]
        parts += [f"After the correction {better} cells are better and {len(stands)} worse.", ""]
        if worse:
            parts += ["Worse by more than twice the standard error:", "", *map(line_of, worse), ""]
        samplers = dict.fromkeys(row["sampler"] for row in own)
        parts += [f"## {subject}, by sampler", "", *by(own, "sampler", samplers), ""]
    return "\n".join(parts)


def cell_of(row: dict) -> tuple:
    return row["subject"], row["sampler"], row["steps"], row["computed"]


def line_of(row: dict) -> str:
    difference = Difference.of(row["error"], row["fewer"])
    return (
        f"- {row['sampler']}, {row['steps']} steps, {row['computed']} computed: {statistics.mean(row['error']):.4f} "
        f"against {statistics.mean(row['fewer']):.4f} (p = {difference.p:.2g})"
    )


def by(rows: list[dict], key: str, values) -> list[str]:
    lines = [
        f"| {key} | ratio | to the full run: better / equal / worse than fewer steps | to the solution: than fewer "
        "steps | than the best plain sampler | all computed |",
        "|---|---|---|---|---|---|",
    ]
    best = with_best(rows)
    for value in values:
        own = [row for row in rows if row[key] == value and row["level"] != "plain"]
        if not own:
            continue
        cells = reused(own)
        solved = [row for row in cells if comparable(row)]
        texts = [
            judged(differences(cells, "error", "fewer")),
            judged(differences(solved, "converged", "fewer converged")),
            judged(differences([row for row in best if row[key] == value], "converged", "best")),
        ]
        idle = sum("fewer" not in row for row in own)
        lines.append(f"| {value} | {ratio(cells)} | {' | '.join(texts)} | {idle} of {len(own)} |")
    return lines


def complete(rows: list[dict], unit: tuple[str, str], method: str) -> bool:
    own = [row for row in rows if (row["subject"], row["sampler"], row["method"]) == (*unit, method)]
    return {(row["steps"], row["level"]) for row in own} >= {(steps, level) for steps in STEPS for level in LEVELS}


def row_key(row: dict) -> tuple:
    return row["subject"], row["sampler"], row["method"], row["steps"], row["level"]


def main() -> None:
    parser = shared.options(__doc__, RESULTS / "caching-samplers.json")
    parser.add_argument("--method", default="preset", choices=METHODS)
    args = parser.parse_args()
    if args.report:
        args.out.with_suffix(".md").write_text(report(shared.read(args.out)), encoding="utf-8")
        return
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "comfyui" / "inside"))
    from host import Host

    host = Host(args.comfyui, args.base)
    import comfy.samplers
    import fidelity
    import torch

    fidelity.IMAGES = IMAGES
    made = fidelity.models(host, str(args.flow), "euler", 50)

    @cache
    def converged(name: str):
        made[name].sampler = "dpmpp_2m"
        return made[name].images(made[name].patcher, 0, CONVERGED)[0]

    def work(unit: tuple[str, str]) -> None:
        name, sampler = unit
        found = measured(host, name, made[name], sampler, converged(name), args.method)
        shared.keep(args.out, found, row_key)

    names = [name for name in comfy.samplers.SAMPLER_NAMES if not name.endswith("_gpu") and name != "dpm_adaptive"]
    rows = shared.read(args.out)
    units = [(name, sampler) for name in made if shared.chosen(name, args.only) for sampler in names]
    with torch.inference_mode():
        shared.in_turns([u for u in units if not complete(rows, u, args.method)], work, args.jobs, args.seconds)


if __name__ == "__main__":
    main()
