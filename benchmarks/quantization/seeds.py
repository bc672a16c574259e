"""Measurements of the two trained models over seeds that go on where they stopped."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ..caching.flow_model import WEIGHTS
from .start import RESULTS, run_inside

SUBJECTS = ("built-in, ddim, 50 steps", "flow, euler, 30 steps")


def groups(data: dict[str, Any], subject: str) -> dict[str, list[dict[str, Any]]]:
    """Name -> its rows, one for each seed in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(data["runs"], key=lambda run: run["seed"]):
        for row in run["rows"] if run["subject"] == subject else ():
            found.setdefault(row["name"], []).append(row)
    return found


def known(data: dict[str, Any]) -> set[tuple[str, int]]:
    return {(run["subject"], run["seed"]) for run in data["runs"]}


def measured(
    program: str, name: str, report: Callable[[dict[str, Any]], str], doc: str, seeds: int = 5, images: int = 8
) -> None:
    """Runs inside_<program>.py for the models and seeds that <name>.json lacks, and writes <name>.md."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--flow", type=Path, default=WEIGHTS)
    parser.add_argument("--kitchen", type=Path, help="folder with another comfy-kitchen than the installed one")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--only", default="", help="part of a model's name")
    parser.add_argument("--images", type=int, default=images, help="for every row and seed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    file, begun = args.out / f"{name}.json", time.perf_counter()
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": []}

    def run(subject: str, seed: int) -> dict[str, Any] | None:
        if time.perf_counter() - begun > args.seconds:
            return None
        options = {"subject": subject, "seeds": [seed], "images": args.images, "seconds": args.seconds}
        return run_inside(program, {**options, "flow": str(args.flow.resolve())}, args.threads, kitchen=args.kitchen)

    wanted = {(subject, seed) for seed in range(args.seeds) for subject in SUBJECTS if args.only in subject}
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(run, *unit) for unit in sorted(wanted - known(data), key=lambda unit: unit[1])]
        for found in (done.result() for done in as_completed(runs)):
            if found is not None:
                data["runs"] += found.pop("runs")
                data |= {key: value for key, value in found.items() if key not in ("subject", "seeds", "seconds")}
                file.write_text(json.dumps(data, indent=0) + "\n", encoding="utf-8")
    (args.out / f"{name}.md").write_text(report(data), encoding="utf-8")
    print(report(data))
