"""How many runs are enough: what Calibrate from Runs says after each, beside errors on calls that it never saw.

    COMFYUI/.venv/bin/python benchmarks/calibration/enough.py COMFYUI BASE out/digits_flow.safetensors [--seconds 280]

BASE is a ComfyUI base directory with the pack in custom_nodes. A run is one image of a random class through the node
with its defaults; after some of them the model is quantized to W4A8 with GPTQ. Writes results/calibration-enough.json
after each order of runs and goes on where it stands, so that --seconds may cut it into pieces; --report writes
calibration-enough.md from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from host import Host
    from subjects import Study

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
ORDERS = 3
SUBJECTS = ("digits DiT, ddim, 50 steps", "flow, euler, 30 steps")
sys.path[:0] = [
    str(ROOT / folder) for folder in ("tests/comfyui/inside", "benchmarks/caching", "benchmarks/quantization")
]


def prompts(host: Host, name: str, label: int) -> tuple[Any, Any]:
    if name.startswith("digits"):
        return host.module("nodes.class_label").ClassLabel.execute(str(label), "none").args
    import flow_model
    import torch

    classes = torch.tensor([label]), torch.tensor([flow_model.CLASSES])
    positive, negative = ([[flow_model.context(part), {}]] for part in classes)
    return positive, negative


def judged(study: Study, calibration: Any) -> tuple[float, float]:
    """Mean relative error of the layers, and of the whole model's prediction, on calls of runs that are not in it."""
    native = study.host.module("nodes.comfyui.quantize.native")
    settings = native.NativeSettings("W4A8", "gptq")
    _, report = native.quantize_native(study.subject.patcher, settings, study.judged(calibration))
    return statistics.mean(layer.error for layer in report.layers), report.model_error[0]


def growing(study: Study, name: str, order: int) -> list[dict[str, Any]]:
    """A row for each number of runs."""
    import random

    import comfy.sample
    import torch

    host, subject, rows = study.host, study.subject, []
    node, recording = host.module("nodes.calibrate_from_runs"), host.module("nodes.comfyui.calibrate.recording")
    gain, files = host.module("qandc_core.calibration.gain"), host.module("nodes.comfyui.files")
    load = host.module("qandc_core").load_calibration
    file = f"enough {SUBJECTS.index(name)} {order}"
    files.named_path(file).unlink(missing_ok=True)
    recorder = node.CalibrateFromRuns.execute(subject.patcher, file, True, 8, True, 4.0, 4096, 8, 0).args[0]
    draw = random.Random(order)
    for number in range(1, max(RUNS) + 1):
        seed = 1000 * (order + 1) + number
        noise = torch.randn(1, *subject.latent.shape[1:], generator=torch.Generator().manual_seed(seed))
        comfy.sample.sample(
            recorder, noise, subject.steps, subject.cfg, subject.sampler, subject.scheduler,
            *prompts(host, name, draw.randrange(10)), torch.zeros_like(noise), disable_pbar=True, seed=seed,
        )  # fmt: skip
        recording.settle()
        found = load(files.named_path(file))
        history = found.recording.history
        row = {
            "subject": name, "order": order, "runs": number, "samples": found.recording.samples,
            "left": gain.left_to_gain(history), "enough": gain.is_enough(history),
        }  # fmt: skip
        if number in RUNS:
            row["layer error"], row["model error"] = judged(study, found)
        rows.append(row)
        print(row, file=sys.stderr, flush=True)  # noqa: T201
    return rows


def measure(checkout: str, base: str, weights: str, seconds: float) -> None:
    from host import Host

    host, begun, path = Host(checkout, base), time.monotonic(), RESULTS / "calibration-enough.json"
    import torch
    from subjects import studies

    rows = json.loads(path.read_text()) if path.is_file() else []
    done = {(row["subject"], row["order"]) for row in rows}
    for name in SUBJECTS:
        left = [order for order in range(ORDERS) if (name, order) not in done]
        if not left or time.monotonic() - begun > seconds:
            continue
        with torch.inference_mode():
            study = studies(host, weights, only=name)[name]
            for order in left:
                if time.monotonic() - begun < seconds:
                    rows += growing(study, name, order)
                    path.write_text(json.dumps(rows, indent=1) + "\n")


TEXT = """# How many runs are enough

Calibrate from Runs with its defaults, one image of a random class a run, guidance 1.5, ComfyUI 0.33.0, float32 on CPU.
"Layer error" and "model error" are of W4A8 with GPTQ after so many runs: mean relative error of the layers' outputs and
of the whole model's prediction on calls of runs that are not in the calibration. "Left" is what the node says further
runs would lower the layer error by; it says "enough" below 2 %. "Gained" is by how much the layer error after the last
row is lower. Means over {orders} orders of runs, with their range.
Made by `benchmarks/calibration/enough.py`.
"""


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def report(rows: list[dict[str, Any]]) -> str:
    parts = [TEXT.format(orders=len({row["order"] for row in rows}))]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if row["subject"] == subject]
        orders = sorted({row["order"] for row in own})
        first = [next((r["runs"] for r in own if r["order"] == o and r["enough"]), None) for o in orders]
        said = ", ".join("never" if runs is None else str(runs) for runs in first)
        parts += [f'## {subject}\n\nFirst "enough" after runs: {said}.\n']
        last = {row["order"]: row["layer error"] for row in own if row["runs"] == RUNS[-1]}
        lines = [
            "| runs | samples | layer error | model error | left, % | gained, % | says enough |",
            "|---:|---:|---|---|---|---|---:|",
        ]
        for number in RUNS:
            same = [row for row in own if row["runs"] == number]
            layers, models = ([row[f"{kind} error"] for row in same] for kind in ("layer", "model"))
            gained = [100 * (1 - last[row["order"]] / row["layer error"]) for row in same]
            left = [100 * row["left"] for row in same if row["left"] is not None]
            lines.append(
                f"| {number} | {statistics.mean(row['samples'] for row in same):.0f} | "
                f"{spread(layers, 4)} | {spread(models, 4)} | "
                f"{spread(left, 1) if left else '-'} | {spread(gained, 1)} | "
                f"{sum(row['enough'] for row in same)} of {len(same)} |"
            )
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="COMFYUI BASE WEIGHTS")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    sys.argv[1:] = []  # ComfyUI reads them later
    if args.report:
        rows = json.loads((RESULTS / "calibration-enough.json").read_text())
        (RESULTS / "calibration-enough.md").write_text(report(rows))
    else:
        measure(*args.paths, seconds=args.seconds)


if __name__ == "__main__":
    main()
