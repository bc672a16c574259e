from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from typing import Any

from .common import device, load, log, sampling


def run(args: argparse.Namespace) -> None:
    from ..evaluation.sharding import distributed

    with distributed() as process:
        for result in evaluate(args, process, log if process.rank == 0 else lambda _: None):
            if process.rank == 0:
                write(args, result)
        if process.rank == 0:
            print((args.out / "ablation.md").read_text())


def evaluate(args: argparse.Namespace, process: Any, log: Any) -> Iterator[dict[str, Any]]:
    """The result, again after each part, so that hours of work are not lost to a later one."""
    from ..evaluation.calibration_choice import ChoiceSizes, calibration_choice
    from ..evaluation.experiment import Evaluation, Experiment, hardware, real_floor, run_factors, run_main
    from ..evaluation.judges import DigitsJudge, InceptionJudge, Judge
    from ..evaluation.variants import CalibrationPlan, Workbench

    if args.model != "demo" and not (args.vae and args.inception and args.reference):
        raise ValueError("An ImageNet model is judged with --vae, --inception and --reference; give all three.")
    model, config = load(args), sampling(args)
    judge: Judge
    if args.model == "demo":
        judge = DigitsJudge()
    else:
        judge = InceptionJudge(args.inception, args.vae, args.reference, device(args))
    plan = CalibrationPlan(args.trajectories, args.samples, min(100, args.samples), args.pairs, args.batch)
    bench = Workbench(model, config, plan)
    time_batch, repeats = min(64, args.num_images), 3
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "qandc_core", *args.argv]),
        "setup": {
            "model": args.model, "hardware": hardware(), "sampler": config.sampler, "steps": config.steps,
            "cfg_scale": config.cfg_scale, "images": args.num_images, "seeds": args.seeds, "processes": process.world,
            "factor_images": args.factor_images, "time_batch": time_batch, "time_repeats": repeats,
        },
        "floor": real_floor(judge, args.num_images),
    }  # fmt: skip
    main = Evaluation(args.num_images, tuple(args.seeds), args.batch)
    if "main" in args.parts:
        result["main"] = run_main(Experiment(bench, judge, main, process, log), time_batch, repeats)
        yield result
    if "factors" in args.parts:
        few = Evaluation(args.factor_images, tuple(args.seeds[:1]), args.batch)
        result["factors"] = run_factors(Experiment(bench, judge, few, process, log))
        yield result
    if "choice" in args.parts:
        result["choice"] = calibration_choice(bench, ChoiceSizes(args.draws), log)
        yield result


def write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from ..evaluation.tables import markdown, plot_main

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ablation.json").write_text(json.dumps(result, indent=1))
    (args.out / "ablation.md").write_text(markdown(result))
    if "main" in result:
        plot_main(result, args.out / "ablation.png")
