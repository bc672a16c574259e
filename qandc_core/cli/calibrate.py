from __future__ import annotations

import argparse
from dataclasses import replace

from .common import (
    CACHE_INTERVAL,
    add_bits,
    add_candidates,
    add_model,
    add_sampling,
    at_least,
    load,
    log,
    safetensors,
    sampling,
)

SUMMARY = "gather statistics with the cache on, and fit the compensation"


def add(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_sampling(command)
    add_bits(command)
    command.add_argument(
        "--cache-interval", type=at_least(1), default=CACHE_INTERVAL, metavar="N",
        help=f"compute every N-th step, 1 caches nothing (default {CACHE_INTERVAL})",
    )  # fmt: skip
    add_candidates(command)
    command.add_argument(
        "--selection", default=None,
        help="random, stratified, tap or tap-blocks; tap@5 sets a time scale of 5 steps, -computed keeps to computed "
        "steps (default: the best measured)",
    )  # fmt: skip
    command.add_argument("--pairs", type=at_least(0), default=64, help="pairs of runs for the compensation, 0 for none")
    command.add_argument(
        "--optimal-steps", action="store_true", help="compute the DP-optimal steps, as many as the interval would"
    )
    command.add_argument("--hessians", action="store_true", help="keep X^T X of every layer, for gptq rounding")
    command.add_argument("--out", type=safetensors, required=True, help="calibration file to write (.safetensors)")


def run(args: argparse.Namespace) -> None:
    from ..evaluation.demo import RECOMMENDED
    from ..evaluation.variants import CalibrationPlan, Workbench, split_selection

    split_selection(args.selection or RECOMMENDED.selection)  # before minutes of sampling
    model, config = load(args), sampling(args)
    plan = CalibrationPlan(args.trajectories, args.samples, min(100, args.samples), args.pairs)
    bench = Workbench(model, config, plan)
    variant = replace(
        RECOMMENDED, bits=(args.w_bits, args.a_bits), interval=args.cache_interval, sampler=args.sampler,
        steps=args.steps, selection=args.selection or RECOMMENDED.selection, static=True, optimal=args.optimal_steps,
        rounding="gptq" if args.hessians else "nearest",
    )  # fmt: skip
    log(f"Sampling {args.trajectories} trajectories with cache interval {args.cache_interval}")
    calibration = bench.calibration(variant)
    if args.pairs:
        log(f"Fitting the variance compensation on {args.pairs} pairs of runs")
        variance = bench.compensate(variant, bench.quantize(variant, calibration))
        assert variance is not None
        calibration = calibration.with_variance(variance)
    if args.optimal_steps:
        calibration = calibration.with_schedule(bench.schedule(variant))
    notes = {"cache_interval": args.cache_interval, "bits": [args.w_bits, args.a_bits], "selection": variant.selection}
    replace(calibration, notes=notes).save(args.out)
    print(args.out)
