from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..files import save_text
from .common import add_guidance, add_model, at_least, load, log, sampling

SUMMARY = "measure computed, reused and quantized steps of a model on this machine"


def add(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument("--steps", type=at_least(2), default=8, help="steps of a run (default 8)")
    command.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddim", help="sampler (default ddim)")
    add_guidance(command)
    command.add_argument(
        "--cache-interval", type=at_least(2), default=2, metavar="N", help="compute every N-th step (default 2)"
    )
    command.add_argument("--images", type=at_least(1), default=8, help="images at once (default 8)")
    command.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the JSON file")


def run(args: argparse.Namespace) -> None:
    from ..evaluation.experiment import hardware
    from ..evaluation.step_times import as_json, in_words, measure_step_times

    model, config = load(args), sampling(args)
    device = model.pos_embed.device
    log(f"bench: {args.images} images, {config.steps} steps of {config.sampler} on {device}")
    labels = [i % model.config.num_classes for i in range(args.images)]
    times = measure_step_times(model, labels, config, args.cache_interval)
    result = {
        "command": " ".join(["python -m qandc_core", *args.argv]), "hardware": hardware(), "images": args.images,
        "guidance": config.cfg_scale, "interval": args.cache_interval, "times": as_json(times),
    }  # fmt: skip
    path = args.out / f"bench-{device.type}.json"
    save_text(json.dumps(result, indent=1), path)
    print("\n".join(in_words(times)))
    print(path)
