"""How many inputs of a layer, and how many samples, GPTQ of 4-bit weights needs, on two trained models in real ComfyUI:

    python -m benchmarks.quantization.tokens

Writes quantization-tokens.json and quantization-tokens.md into benchmarks/results.
"""

from __future__ import annotations

from typing import Any

from .__main__ import shown
from .seeds import measured

TEXT = """# Inputs and samples that GPTQ needs

Relative error of the outputs of layers in W4A8 on held-out inputs, activations in 8 bits: mean over the layers of a
model, and of its widest layers alone; mean and standard error over calibrations with TAP and Apply Cache at
interval {interval}. ComfyUI {comfyui}, float32 on CPU ({machine}).
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


def report(data: dict[str, Any]) -> str:
    rows = [{**row, "subject": run["subject"]} for run in data["runs"] for row in run["rows"]]
    parts = [TEXT.format(**data)]
    for kind in TITLES:
        parts += [table([row for row in rows if row["kind"] == kind], kind), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    measured("tokens", "quantization-tokens", report, __doc__, seeds=3)
