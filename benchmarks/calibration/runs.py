"""Calibrating on runs as they go by, against choices from a pool that was kept: layer errors on held-out runs.

    python -m benchmarks.calibration.runs --out benchmarks/results [--model FILE]

All choices take the same number of samples (a sample: one image under one condition at one step) from the same runs.
`runs` takes of each run one of so many rows in a row, as Calibrate from Runs does; the others see the whole pool.
Then the number of runs grows: the layer error against what `left_to_gain` estimates from the runs alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qandc_core import SamplingConfig, load_dit
from qandc_core.calibration.gain import DAMPING, Moment, left_to_gain, lowered
from qandc_core.calibration.recorder import probes
from qandc_core.calibration.selection import random_select, stratified_select
from qandc_core.calibration.statistics import LayerStatistics, merge_tokens, observed
from qandc_core.calibration.stream import Strata
from qandc_core.calibration.tap import tap_select
from qandc_core.evaluation.experiment import hardware
from qandc_core.evaluation.metrics import standard_error
from qandc_core.evaluation.variants import balanced_labels
from qandc_core.files import save_text
from qandc_core.models.dit import DiT
from qandc_core.models.layers import named_linears
from qandc_core.quantization.model import NATIVE_SKIP
from qandc_core.quantization.native import NativeConfig, rounded_layer

from .pool import CandidatePool, collect_pool

METHODS = ("random", "stratified", "tap", "tap@5", "runs")
FORMATS = ("W8A8", "W4A8")
POOL_SEED, TEST_SEED, TOKENS = 501, 601, 4096


@dataclass(frozen=True)
class Rows:
    """Every row of the model calls of some runs, in the order in which a run makes them: steps, then conditions."""

    pool: CandidatePool
    at: Tensor  # (N,) places in the pool
    unconditional: Tensor  # (N,)
    runs: Tensor  # (N,) number of the run
    steps: Tensor

    @classmethod
    def of(cls, pool: CandidatePool) -> Rows:
        images = int((pool.steps == 0).sum())
        at = torch.arange(len(pool))  # the pool of one batch is step after step
        run = at % images
        order = torch.argsort(run * (int(pool.steps.max()) + 1) + pool.steps, stable=True).repeat_interleave(2)
        return cls(pool, order, torch.arange(len(order)) % 2 == 1, run[order], pool.steps[order])

    def inputs(self, model: DiT, chosen: Tensor) -> Iterator[dict[str, Tensor]]:
        """What each layer sees on the chosen rows, a batch at a time."""
        for part in chosen.split(128):
            rows, seen = self.at[part], dict[str, Tensor]()

            def note(name: str, x: Tensor, seen: dict[str, Tensor] = seen) -> None:
                seen[name] = merge_tokens(x)

            labels = torch.where(self.unconditional[part], model.null_class, self.pool.labels[rows])
            layers = named_linears(model, NATIVE_SKIP)
            with torch.inference_mode(), observed(layers, note):
                model(self.pool.samples[rows], self.pool.timesteps[rows], labels)
            yield seen


def choose(method: str, rows: Rows, count: int, draw: int) -> Tensor:
    """Indices of `count` rows, or as many as the strata of the runs give."""
    kind, _, scale = method.partition("@")
    if kind == "random":
        return random_select(len(rows.at), count, draw)
    if kind == "stratified":
        return stratified_select(rows.steps, count, draw)
    if kind == "tap":
        found = tap_select(
            rows.pool.features[rows.at], rows.steps, count, min(50, count), time_scale=float(scale or 1), seed=draw
        )
        return found.indices
    generator = torch.Generator().manual_seed(draw)
    runs = [(rows.runs == run).nonzero().flatten() for run in range(int(rows.runs.max()) + 1)]
    size = -(-len(rows.at) // count)
    return torch.cat([run[Strata(size, 0, generator).take(len(run))[0]] for run in runs])


def statistics_of(model: DiT, rows: Rows, chosen: Tensor) -> dict[str, LayerStatistics]:
    found: dict[str, LayerStatistics] = {}
    for seen in rows.inputs(model, chosen):
        for name, x in seen.items():
            found.setdefault(name, LayerStatistics.empty(x.shape[1], hessian=True)).update(x)
    return found


def held_out(model: DiT, rows: Rows, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of every layer drawn from all rows of runs that calibrate nothing."""
    generator, kept = torch.Generator().manual_seed(seed), dict[str, list[Tensor]]()
    batches = -(-len(rows.at) // 128)
    for seen in rows.inputs(model, torch.arange(len(rows.at))):
        for name, x in seen.items():
            picked = torch.randperm(len(x), generator=generator)[: -(-TOKENS // batches)]
            kept.setdefault(name, []).append(x[picked])
    return {name: torch.cat(parts) for name, parts in kept.items()}


def layer_error(model: DiT, statistics: dict[str, LayerStatistics], test: dict[str, Tensor], format: str) -> float:
    """Mean over layers of the relative error of their outputs on held-out inputs."""
    config, errors = NativeConfig(format), []
    for name, layer in named_linears(model, NATIVE_SKIP):
        known = statistics[name]
        known.held_out = test[name]
        made = rounded_layer(name, layer.weight, layer.bias, config, known)
        if made is not None:
            errors.append(made.error)
    return sum(errors) / len(errors)


@torch.inference_mode()
def compare_choices(model: DiT, rows: Rows, test: dict[str, Tensor], counts: list[int], draws: int) -> list[dict]:
    results = []
    for count in counts:
        for method in METHODS:
            errors: dict[str, list[float]] = {format: [] for format in FORMATS}
            for draw in range(draws):
                statistics = statistics_of(model, rows, choose(method, rows, count, draw))
                for format in FORMATS:
                    errors[format].append(layer_error(model, statistics, test, format))
            for format, values in errors.items():
                found = torch.tensor(values, dtype=torch.float64)
                row = {
                    "samples": count, "method": method, "format": format, "draws": draws,
                    "error": float(found.mean()), "se": standard_error(found),
                }  # fmt: skip
                results.append(row)
                print(row, file=sys.stderr, flush=True)  # noqa: T201
    return results


@torch.inference_mode()
def grow(model: DiT, rows: Rows, test: dict[str, Tensor], size: int, seeds: int, format: str) -> list[dict[str, Any]]:
    """The layer error after k runs, and what the runs themselves say is left to gain."""
    count, results = int(rows.runs.max()) + 1, []
    watched = probes({name: layer.in_features for name, layer in named_linears(model, NATIVE_SKIP)})
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        order, total, history = torch.randperm(count, generator=generator).tolist(), dict(), list[float]()
        for number, run in enumerate(order, 1):
            members = (rows.runs == run).nonzero().flatten()
            chosen = members[Strata(size, 0, generator).take(len(members))[0]]
            inputs: dict[str, Tensor] = {}
            for seen in rows.inputs(model, chosen):
                inputs |= seen
            differences = []
            for name, x in inputs.items():
                known = total.setdefault(name, LayerStatistics.empty(x.shape[1], hessian=True))
                before = moment_of(known) if number > 1 and name in watched else None
                known.update(x)
                if before is not None:
                    differences.append(lowered(before, moment_of(known), x[:256]))
            history += [sum(differences) / len(differences)] if differences else []
            if number in (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128):
                error = layer_error(model, total, test, format)
                results.append({"seed": seed, "runs": number, "error": error, "left": left_to_gain(history, number)})
    return results


def moment_of(layer: LayerStatistics) -> Moment:
    assert layer.hessian is not None
    return layer.hessian.clone(), DAMPING + layer.sampling_damping


def growth_table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds: error left above that of all runs, as a part of it, beside the estimate."""
    rows, best = [], {r["seed"]: r["error"] for r in results}
    for runs in sorted({r["runs"] for r in results}):
        same = [r for r in results if r["runs"] == runs]
        above = [1 - best[r["seed"]] / r["error"] for r in same]
        left = [r["left"] for r in same if r["left"] is not None]
        rows.append({
            "runs": runs, "error": sum(r["error"] for r in same) / len(same), "above": sum(above) / len(above),
            "estimate": sum(left) / len(left) if left else None,
        })  # fmt: skip
    return rows


def markdown(result: dict[str, Any]) -> str:
    machine = result["hardware"]
    lines = [
        "# Calibrating on runs as they go by", "", f"`{result['command']}`", "",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}. {result['setting']}", "",
        "| samples | method | W8A8 layer error | W4A8 layer error |", "|---|---|---|---|",
    ]  # fmt: skip
    by = {(r["samples"], r["method"], r["format"]): r for r in result["choices"]}
    for samples, method in dict.fromkeys((r["samples"], r["method"]) for r in result["choices"]):
        cells = [by[samples, method, format] for format in FORMATS]
        lines.append(
            f"| {samples} | {method} | " + " | ".join(f"{c['error']:.5f} +- {c['se']:.5f}" for c in cells) + " |"
        )
    if not result["growth"]:
        return "\n".join(lines) + "\n"
    lines += ["", result["growth_setting"], ""]
    lines += [
        "| runs | W4A8 layer error | error above that of all runs | estimated from the runs |",
        "|---|---|---|---|",
    ]
    for r in result["growth"]:
        estimate = "" if r["estimate"] is None else f"{100 * r['estimate']:.1f} %"
        lines.append(f"| {r['runs']} | {r['error']:.5f} | {100 * r['above']:.1f} % | {estimate} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration.runs", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--draws", type=int, default=8, help="of each choice; 0 leaves the comparison out")
    parser.add_argument("--seeds", type=int, default=4, help="orders of growing runs; 0 leaves them out")
    parser.add_argument("--name", default="calibration-runs")
    parser.add_argument("--out", type=Path, default=Path("out/calibration"))
    args = parser.parse_args()
    model, config = load_dit(args.model), SamplingConfig(50, args.cfg)
    classes = model.config.num_classes
    pool = collect_pool(model, balanced_labels(args.runs, classes), config, batch_size=args.runs, seed=POOL_SEED)
    apart = collect_pool(model, balanced_labels(16, classes), config, batch_size=16, seed=TEST_SEED)
    rows, test = Rows.of(pool), held_out(model, Rows.of(apart))
    choices = compare_choices(model, rows, test, [args.runs, 4 * args.runs], args.draws) if args.draws else []
    growth = growth_table(grow(model, rows, test, 25, args.seeds, "W4A8")) if args.seeds else []
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.calibration.runs", *sys.argv[1:]]),
        "hardware": hardware(),
        "setting": f"{args.model}: {args.runs} runs of 50 steps, ddpm, guidance {args.cfg:g}; GPTQ; errors on inputs "
        f"of 16 other runs; means of {args.draws} draws with standard errors over draws.",
        "growth_setting": f"Four samples of each run; means of {args.seeds} orders of the runs:",
        "choices": choices, "growth": growth,
    }  # fmt: skip
    save_text(json.dumps(result, indent=1), args.out / f"{args.name}.json")
    save_text(markdown(result), args.out / f"{args.name}.md")


if __name__ == "__main__":
    main()
