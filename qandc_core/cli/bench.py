from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..files import save_text
from .common import log

PARTS = ("speed", "fused", "cache", "linear", "model", "import", "end-to-end", "tap")

SUMMARY = "speed and memory of every part, and in words where the time of a step goes"


def add(command: argparse.ArgumentParser) -> None:
    command.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default all)")
    command.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON and table")


def run(args: argparse.Namespace) -> None:
    import torch

    try:
        from ..evaluation import benchmark
        from ..evaluation.benchmark_tap import benchmark_tap
        from ..evaluation.speed.table import bench_speed
    except ImportError as error:
        raise ValueError("The benchmarks are left out of the registry archive; run them in a clone.") from error
    from ..evaluation.experiment import hardware

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts: dict[str, Any] = {
        "speed": lambda: bench_speed(device, log),
        "fused": lambda: benchmark.bench_fused(device),
        "cache": lambda: benchmark.bench_cache(device),
        "linear": lambda: benchmark.bench_linear(device),
        "model": lambda: benchmark.bench_model(device),
        "import": benchmark.bench_import,
        "end-to-end": lambda: benchmark.bench_end_to_end(device),
        "tap": benchmark_tap,
    }
    result: dict[str, Any] = {"command": "python -m qandc_core bench", "hardware": hardware()}
    for name in args.parts:
        log(f"bench: {name}")
        result[name] = parts[name]()
    path = args.out / f"bench-{device}.json"
    save_text(json.dumps(result, indent=1), path)
    for name in args.parts:
        print(words(name, result[name]))
    print(path)


def words(part: str, result: Any) -> str:
    """Sentences where the part has them, else its numbers."""
    if part == "speed":
        return "\n\n".join("\n".join(step["words"]) for step in result["steps"])
    return f"{part}: {json.dumps(result, indent=1)}"
