from __future__ import annotations

import argparse
import json

from .common import load, log, sampling


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
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"bench-{device.type}.json"
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print("\n".join(in_words(times)))
    print(path)
