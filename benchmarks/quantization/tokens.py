"""How many inputs of a layer, and how many samples, GPTQ of 4-bit weights needs, on two trained models in real ComfyUI:

    python -m benchmarks.quantization.tokens

Needs out/digits_flow.safetensors, which `python -m benchmarks.caching` trains. Writes quantization-tokens.json and
quantization-tokens.md into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .__main__ import shown
from .start import RESULTS, run_inside

TEXT = """# Inputs and samples that GPTQ needs

Relative error of the outputs of layers in W4A8 on held-out inputs, activations in 8 bits: mean over the layers of a
model, and of its widest layers alone; mean and standard error over {seeds} calibrations with TAP and Apply Cache at
interval {interval}. ComfyUI {comfyui}, float32 on CPU ({machine}, {threads} threads, {seconds:.0f} s in all).
"Nearest" has the same corrected biases, without GPTQ.

The first table keeps inputs of {samples} samples, drawn at random; "X^T X" is of all their inputs. The second has
X^T X of other numbers of samples. A layer that sees one vector for each sample, as modulation does, has fewer inputs
than the first column says. Made by `python -m benchmarks.quantization.tokens`.
"""
TITLES = {"tokens": "inputs kept", "samples": "samples"}


def headings(rows: list[dict]) -> list[tuple[str, str]]:
    """(model, layers) of the columns."""
    return list(dict.fromkeys((row["subject"], layers) for row in rows for layers in row["errors"]))


def table(rows: list[dict], kind: str) -> str:
    columns = headings(rows)
    names = [f"{subject}, {layers}" for subject, layers in columns]
    lines = [f"| {TITLES[kind]} | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for value in dict.fromkeys(row["value"] for row in rows):
        cells = []
        for subject, layers in columns:
            errors = [row["errors"][layers] for row in rows if (row["subject"], row["value"]) == (subject, value)
                      and layers in row["errors"]]  # fmt: skip
            cells.append(shown(errors))
        lines.append(f"| {value} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(data: dict) -> str:
    parts = [TEXT.format(**data)]
    for kind in TITLES:
        parts += [table([row for row in data["rows"] if row["kind"] == kind], kind), ""]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", type=Path, default=Path("out/digits_flow.safetensors"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--redraw", action="store_true", help="only write the tables from the JSON again")
    args = parser.parse_args()
    file = args.out / "quantization-tokens.json"
    if not args.redraw:
        data = run_inside("tokens", {"seeds": args.seeds, "flow": str(args.flow.resolve())}, args.threads)
        file.write_text(json.dumps(data, indent=0) + "\n", encoding="utf-8")
    data = json.loads(file.read_text(encoding="utf-8"))
    (args.out / "quantization-tokens.md").write_text(report(data), encoding="utf-8")
    print(f"wrote quantization-tokens.json and quantization-tokens.md in {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
