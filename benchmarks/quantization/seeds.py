"""Measurements of the two trained models over seeds that go on where they stopped."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .start import RESULTS, run_inside

SUBJECTS = ("built-in, ddim, 50 steps", "flow, euler, 30 steps")
SHARED = ("rows", "subject", "seed")  # what else a run says is the same for all


def groups(data: dict[str, Any], subject: str) -> dict[str, list[dict[str, Any]]]:
    """Name -> its rows, one for each seed in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(data["runs"], key=lambda run: run["seed"]):
        for row in run["rows"] if run["subject"] == subject else ():
            found.setdefault(row["name"], []).append(row)
    return found


def measured(program: str, name: str, report: Callable[[dict[str, Any]], str], doc: str) -> None:
    """Runs inside_<program>.py for every model and seed that <name>.json lacks, and writes <name>.md."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--flow", type=Path, default=Path("out/digits_flow.safetensors"))
    parser.add_argument("--kitchen", type=Path, help="folder with another comfy-kitchen than the installed one")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", default="", help="part of a model's name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    file = args.out / f"{name}.json"
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": []}
    known = {(run["subject"], run["seed"]) for run in data["runs"]}
    for seed in range(args.first, args.seeds):
        for subject in SUBJECTS:
            if args.only in subject and (subject, seed) not in known:
                options = {"subject": subject, "seed": seed, "flow": str(args.flow.resolve())}
                run = run_inside(program, options, args.threads, kitchen=args.kitchen)
                data |= {key: run.pop(key) for key in list(run) if key not in SHARED}
                data["runs"].append(run)
                file.write_text(json.dumps(data, indent=0) + "\n", encoding="utf-8")
                print(f"{subject}, seed {seed}", file=sys.stderr)
    (args.out / f"{name}.md").write_text(report(data), encoding="utf-8")
    print(report(data))
