"""Speed and memory of every part, ratios in one run: `python -m benchmarks.speed [--parts ...] [--out FOLDER]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qandc_core.cli.memory import keep_freed_memory
from qandc_core.evaluation.experiment import hardware

from . import ratios, table, tap

PARTS = ("speed", "fused", "cache", "linear", "model", "import", "end-to-end", "tap")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default all)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON and table")
    return parser.parse_args(argv)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts: dict[str, Any] = {
        "speed": lambda: table.bench_speed(device, note),
        "fused": lambda: ratios.bench_fused(device),
        "cache": lambda: ratios.bench_cache(device),
        "linear": lambda: ratios.bench_linear(device),
        "model": lambda: ratios.bench_model(device),
        "import": ratios.bench_import,
        "end-to-end": lambda: ratios.bench_end_to_end(device),
        "tap": tap.benchmark_tap,
    }
    result: dict[str, Any] = {"command": "python -m benchmarks.speed", "hardware": hardware()}
    for name in args.parts:
        note(f"bench: {name}")
        result[name] = parts[name]()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"bench-{device}.json"
    path.write_text(json.dumps(result, indent=1))
    for name in args.parts:
        print(words(name, result[name]))
    print(path)


def words(part: str, result: Any) -> str:
    """Sentences where the part has them, else its numbers."""
    if part == "speed":
        return "\n\n".join("\n".join(step["words"]) for step in result["steps"])
    return f"{part}: {json.dumps(result, indent=1)}"


if __name__ == "__main__":
    keep_freed_memory()  # as the commands of qandc_core do
    main()
