from __future__ import annotations

import argparse
from dataclasses import replace

from .common import load, log, sampling


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
