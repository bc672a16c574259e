"""How many runs are enough: what Calibrate from Runs says after each, beside what more runs really gain.

    P=COMFYUI/.venv/bin/python
    $P benchmarks/calibration/enough.py COMFYUI BASE benchmarks/caching/flow_model.safetensors PART SUBJECT ORDER
    $P benchmarks/calibration/enough.py --report PART...

BASE is a ComfyUI base directory with the pack in custom_nodes. A run is one image of a random class through the node
with its defaults; after some of them the model is quantized to W4A8 with GPTQ. SUBJECT is 0 or 1, ORDER a seed of the
runs, or -1 for the calibration of very many that all are compared with. PART is a JSON file that is written after each
run, so that orders may be measured side by side and stopped; --report writes results/calibration-enough.* of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from host import Host
    from subjects import Study

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = (6, 8, 12, 16, 24, 32, 40)
MANY, IMAGES, SAMPLES = 10, 32, 1024  # runs of so many images, of which as many samples are taken as there may be
SUBJECTS = ("built-in, ddim, 50 steps", "flow, euler, 30 steps")
sys.path[:0] = [
    str(ROOT / folder) for folder in ("tests/comfyui/inside", "benchmarks/caching", "benchmarks/quantization")
]


def prompts(host: Host, name: str, label: int) -> tuple[Any, Any]:
    if name.startswith("built-in"):
        return host.module("nodes.class_label").ClassLabel.execute(str(label), "none").args
    import flow_model
    import torch

    classes = torch.tensor([label]), torch.tensor([flow_model.CLASSES])
    positive, negative = ([[flow_model.context(part), {}]] for part in classes)
    return positive, negative


def judged(study: Study, calibration: Any) -> dict[str, float]:
    """Errors on calls of runs that are not in it: the mean relative one of the layers, the same with their inputs left
    in float, and the whole model's.
    """
    native = study.host.module("nodes.comfyui.quantize.native")
    settings = native.NativeSettings("W4A8", "gptq")
    shown = study.judged(calibration)
    _, report = native.quantize_native(study.subject.patcher, settings, shown)
    return {
        "layer error": statistics.mean(layer.error for layer in report.layers),
        "rounding error": statistics.mean(rounding_errors(study, shown)),
        "model error": report.model_error[0],
    }


def rounding_errors(study: Study, calibration: Any) -> list[float]:
    module = study.host.module("qandc_core.quantization.native")
    config = module.NativeConfig("W4A8", "gptq", rounds_inputs=False)
    layers = study.host.module("nodes.comfyui.quantize.layers").calibrated(study.subject.patcher.model.diffusion_model)
    made = (
        module.rounded_layer(name, layer.weight, layer.bias, config, calibration.statistics[name])
        for name, layer in layers
    )
    return [layer.error for layer in made if layer is not None]


def growing(study: Study, name: str, order: int, part: Path) -> None:
    """Writes a row for each number of runs."""
    import random

    import comfy.sample
    import flow_model
    import torch

    host, subject, rows = study.host, study.subject, []
    node, recording = host.module("nodes.calibrate_from_runs"), host.module("nodes.comfyui.calibrate.recording")
    gain, files = host.module("qandc_core.calibration.gain"), host.module("nodes.comfyui.files")
    load, many = host.module("qandc_core").load_calibration, order < 0
    file = f"enough {SUBJECTS.index(name)} {order}"
    files.named_path(file).unlink(missing_ok=True)
    samples, images, last = (SAMPLES, IMAGES, MANY) if many else (8, 1, max(RUNS))
    recorder = node.CalibrateFromRuns.execute(subject.patcher, file, True, samples, True, 4.0, 4096, 8, 0).args[0]
    draw = random.Random(order)
    for number in range(1, last + 1):
        seed = 1000 * (order + 2) + number
        noise = torch.randn(images, *subject.latent.shape[1:], generator=torch.Generator().manual_seed(seed))
        label = (number if many else draw.randrange(flow_model.CLASSES)) % flow_model.CLASSES
        comfy.sample.sample(
            recorder, noise, subject.steps, subject.cfg, subject.sampler, subject.scheduler,
            *prompts(host, name, label), torch.zeros_like(noise),
            disable_pbar=True, seed=seed,
        )  # fmt: skip
        recording.settle()
        found = load(files.named_path(file))
        history = found.recording.history
        left = gain.left_to_gain(history, number)
        row = {
            "subject": name, "order": order, "runs": number, "samples": found.recording.samples,
            "left": left, "enough": left is not None and left < gain.ENOUGH,
        }  # fmt: skip
        if number in (MANY // 2, MANY) if many else number in RUNS:
            row |= judged(study, found)
        rows.append(row)
        part.write_text(json.dumps(rows))
        print(row, file=sys.stderr, flush=True)  # noqa: T201


def measure(checkout: str, base: str, weights: str, part: str, subject: str, order: str) -> None:
    from host import Host

    host = Host(checkout, base)
    import torch
    from subjects import studies

    name = SUBJECTS[int(subject)]
    with torch.inference_mode():
        growing(studies(host, weights, only=name)[name], name, int(order), Path(part))


TEXT = """# How many runs are enough

Calibrate from Runs with its defaults, one image of a random class a run, guidance 2 for the built-in model and 1.5 for
the flow model, ComfyUI 0.33.0, float32 on CPU.
Errors are of W4A8 with GPTQ after so many runs, on calls of runs that are not in the calibration: mean relative error
of the layers' outputs as Quantize reports it, the same without the rounding of inputs to 8 bits ("rounding"), and of
the whole model's prediction. "Says" is by how much the node says more runs would lower the error of GPTQ's rounding; it
says "enough" below 5 %. "Gains" are by how much the three are lower after very many runs ({many} samples). Means over
orders of runs, with their range.
Made by `benchmarks/calibration/enough.py`.
"""


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def report(rows: list[dict[str, Any]]) -> str:
    references = {row["subject"]: row for row in rows if row["order"] < 0 and "layer error" in row}
    parts = [TEXT.format(many=" and ".join(f"{row['samples']:,}" for row in references.values()))]
    for subject, best in references.items():
        own = [row for row in rows if row["subject"] == subject and row["order"] >= 0]
        orders = sorted({row["order"] for row in own})
        first = [next((r["runs"] for r in own if r["order"] == o and r["enough"]), None) for o in orders]
        said = ", ".join("never" if runs is None else str(runs) for runs in first)
        parts += [f'## {subject}\n\n{len(orders)} orders. First "enough" after runs: {said}.\n']
        lines = [
            "| runs | samples | layer error | model error | says, % | gains, % | layers gain, % | model gains, % |",
            "|---:|---:|---|---|---|---|---|---|",
        ]
        for number in RUNS:
            same = [row for row in own if row["runs"] == number and "layer error" in row]
            if not same:
                continue
            layers, models = ([row[f"{kind} error"] for row in same] for kind in ("layer", "model"))
            gained = (
                [100 * (1 - best[f"{kind} error"] / row[f"{kind} error"]) for row in same]
                for kind in ("rounding", "layer", "model")
            )
            left = [100 * row["left"] for row in same if row["left"] is not None]
            lines.append(
                f"| {number} | {statistics.mean(row['samples'] for row in same):.0f} | "
                f"{spread(layers, 4)} | {spread(models, 4)} | {spread(left, 1) if left else '-'} | "
                + " | ".join(spread(values, 1) for values in gained)
                + " |"
            )
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", help="COMFYUI BASE WEIGHTS PART SUBJECT ORDER; parts with --report")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    sys.argv[1:] = []  # ComfyUI reads them later
    if args.report:
        rows = [row for part in sorted(args.arguments) for row in json.loads(Path(part).read_text())]
        (RESULTS / "calibration-enough.json").write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "calibration-enough.md").write_text(report(rows))
    else:
        measure(*args.arguments)


if __name__ == "__main__":
    main()
