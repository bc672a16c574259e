from __future__ import annotations

import argparse
from copy import deepcopy
from dataclasses import replace

from ..caching.policies import ChosenSteps, Interval
from ..calibration.choice import SELECTIONS, SURPLUS, CalibrationConfig
from ..calibration.file import Calibration
from ..diffusion.classes import balanced_labels
from ..distributed import Distributed
from .common import (
    CACHE_INTERVAL,
    add_bits,
    add_candidates,
    add_model,
    add_number,
    add_sampling,
    at_least,
    load,
    log,
    positive,
    safetensors,
    sampling,
)

SUMMARY = "calibrate a model with the cache on, and fit the variance compensation"
DEFAULT = CalibrationConfig()
SCHEDULE_LABELS, FIT_SEED = 16, 401  # calibration samples with its own seed and those after it


def add(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_sampling(command)
    add_bits(command)
    add_number(command, "--cache-interval", at_least(1), "compute every N-th step, 1 caches nothing", CACHE_INTERVAL)
    add_candidates(command, DEFAULT)
    add_number(command, "--batch", at_least(1), "trajectories sampled at once", DEFAULT.batch_size)
    command.add_argument(
        "--selection",
        choices=SELECTIONS,
        default=DEFAULT.selection,
        help=f"how calibration samples are chosen (default {DEFAULT.selection})",
    )
    apart = "TAP: distance in steps at which two samples count as different in time"
    add_number(command, "--time-scale", positive, apart, DEFAULT.time_scale, "STEPS")
    command.add_argument("--all-steps", action="store_true", help="also choose samples of steps that the cache reuses")
    add_number(command, "--pairs", at_least(0), "pairs of runs for the compensation, 0 for none", 64)
    command.add_argument(
        "--optimal-steps", action="store_true", help="compute the DP-optimal steps, as many as the interval would"
    )
    command.add_argument(
        "--hessians",
        action=argparse.BooleanOptionalAction,
        default=DEFAULT.hessians,
        help="collect the input Hessian (X^T X) of every layer, which gptq rounding needs",
    )
    command.add_argument("--out", type=safetensors, required=True, help="calibration file to write (.safetensors)")


def run(args: argparse.Namespace, process: Distributed) -> None:
    calibration = calibrated(args, process)
    if process.rank == 0:
        calibration.save(args.out)
        print(args.out)


def calibrated(args: argparse.Namespace, process: Distributed) -> Calibration:
    from ..caching.attach import apply_cache_to_dit
    from ..caching.schedule import optimal_schedule
    from ..calibration.distances import feature_distances
    from ..calibration.run import calibrate
    from ..calibration.trajectories import DiTTrajectories
    from ..compensation.fit import fit_variance_compensation
    from ..models.layers import DIT_SKIP
    from ..quantization.model import QuantizationConfig, quantize_model

    model, config = load(args), sampling(args)
    classes, schedule, fast = model.config.num_classes, None, deepcopy(model)
    settings = replace(
        DEFAULT,
        trajectories=args.trajectories,
        batch_size=args.batch,
        samples=args.samples,
        selection=args.selection,
        time_scale=args.time_scale,
        computed_only=not args.all_steps,
        hessians=args.hessians,
        surplus=SURPLUS,
    )
    if args.optimal_steps:
        few = balanced_labels(SCHEDULE_LABELS, classes)
        distances = process.shared(lambda: feature_distances(model, few, config, seed=settings.seed))
        schedule = optimal_schedule(distances, len(range(0, args.steps, args.cache_interval)))
    if args.cache_interval > 1:
        interval = Interval(args.cache_interval)
        apply_cache_to_dit(fast, interval if schedule is None else ChosenSteps(frozenset(schedule)))
    log(f"Calibrating on {args.trajectories} trajectories with cache interval {args.cache_interval}")
    runs = len(list(settings.batches()))
    if runs < process.world:
        log(f"{runs} batches of trajectories leave {process.world - runs} processes idle; choose a smaller --batch")
    calibration = calibrate(DiTTrajectories(fast, range(classes), config), settings, process=process)
    notes = {"cache_interval": args.cache_interval, "bits": [args.w_bits, args.a_bits], "selection": args.selection}
    calibration = replace(calibration, sampling=config, notes=notes, schedule=schedule)
    if args.pairs:
        log(f"Fitting the variance compensation on {args.pairs} pairs of runs")
        rounding = "gptq" if args.hessians else "nearest"
        codes = QuantizationConfig(rounding=rounding)
        quantize_model(fast, args.w_bits, args.a_bits, DIT_SKIP, calibration, codes, process=process)
        pairs = balanced_labels(args.pairs, classes)
        variance = fit_variance_compensation(model, fast, pairs, config, seed=FIT_SEED, process=process)
        calibration = calibration.with_variance(variance)
    return calibration
