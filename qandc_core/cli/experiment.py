from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..calibration.choice import CalibrationConfig
from ..calibration.file import fingerprint
from ..distributed import Distributed
from ..files import save_text, written_whole
from .common import add_candidates, add_model, add_sampling, at_least, device, load, log, sampling

PARTS = ("main", "factors")
PARTS_FOLDER = "unfinished"  # beside the result, until there is one

# As many samples as the paper takes; no run is set aside, for no error of single layers is measured.
CANDIDATES = CalibrationConfig(trajectories=64, samples=800, clusters=100, held_out=0)

SUMMARY = "the ablation: every part of the method on and off"


def add(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_sampling(command)
    command.add_argument("--num-images", type=at_least(4), default=1000, help="images for each main row and seed")
    command.add_argument("--seeds", type=at_least(0), nargs="+", default=[1, 2, 3], help="seeds of the main rows")
    command.add_argument("--batch", type=at_least(1), default=50, help="images sampled at once")
    command.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="tables to make (default all)")
    command.add_argument("--factor-images", type=at_least(4), default=256, help="images for each row of the factors")
    add_candidates(command, CANDIDATES)
    command.add_argument("--pairs", type=at_least(1), default=128, help="pairs of runs for the compensation")
    command.add_argument("--vae", help="folder of a diffusers VAE (ImageNet models)")
    command.add_argument("--inception", help="FID Inception weights (ImageNet models)")
    command.add_argument("--reference", help="ADM reference batch .npz (ImageNet models)")
    command.add_argument("--out", type=Path, default=Path("out/experiment"), help="folder for JSON, table and plot")


def run(args: argparse.Namespace, process: Distributed) -> None:
    for result in evaluate(args, process):
        if process.rank == 0:
            write(args, result)
    if process.rank == 0:
        shutil.rmtree(args.out / PARTS_FOLDER, ignore_errors=True)
        print((args.out / "ablation.md").read_text())


def evaluate(args: argparse.Namespace, process: Distributed) -> Iterator[dict[str, Any]]:
    """The result, again after each part. What is sampled is kept, so that the same command goes on where it stopped."""
    from ..evaluation.experiment import Evaluation, Experiment, hardware, run_factors, run_main
    from ..evaluation.judges import BuiltInJudge, InceptionJudge, Judge
    from ..evaluation.kept import Kept
    from ..evaluation.scores import real_floor
    from ..evaluation.variants import Workbench

    check_judge(args)
    model, config = load(args), sampling(args)
    judge: Judge
    if args.model == "demo":
        judge = BuiltInJudge()
    else:
        judge = InceptionJudge(args.inception, args.vae, args.reference, device(args))
    candidates = replace(CANDIDATES, trajectories=args.trajectories, samples=args.samples, batch_size=args.batch)
    time_batch, repeats = min(64, args.num_images), 3
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "qandc_core", *args.argv]),
        "setup": {
            "model": args.model,
            "hardware": hardware(),
            "sampler": config.sampler,
            "steps": config.steps,
            "cfg_scale": config.cfg_scale,
            "images": args.num_images,
            "seeds": args.seeds,
            "processes": process.world,
            "factor_images": args.factor_images,
            "time_batch": time_batch,
            "time_repeats": repeats,
        },
        "floor": real_floor(judge, args.num_images),
    }
    kept = Kept(args.out / PARTS_FOLDER).under([fingerprint(model), hardware(), asdict(config), asdict(candidates)])
    bench = Workbench(model, config, candidates, args.pairs, kept=kept)
    main = Evaluation(args.num_images, tuple(args.seeds), args.batch)
    if "main" in args.parts:
        result["main"] = run_main(Experiment(bench, judge, main, process, log), time_batch, repeats)
        yield result
    if "factors" in args.parts:
        few = Evaluation(args.factor_images, tuple(args.seeds[:1]), args.batch)
        result["factors"] = run_factors(Experiment(bench, judge, few, process, log))
        yield result


def check_judge(args: argparse.Namespace) -> None:
    """Raises ValueError on files that the model's judge lacks or has no use for."""
    files = (args.vae, args.inception, args.reference)
    if args.model == "demo" and any(files):
        raise ValueError("The built-in model has a judge of its own; leave out --vae, --inception and --reference.")
    if args.model != "demo" and not all(files):
        raise ValueError("An ImageNet model is judged with --vae, --inception and --reference; give all three.")


def write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from ..evaluation.tables import markdown, plot_main

    save_text(json.dumps(result, indent=1), args.out / "ablation.json")
    save_text(markdown(result), args.out / "ablation.md")
    if "main" in result:
        with written_whole(args.out / "ablation.png") as temporary:
            plot_main(result, temporary)
