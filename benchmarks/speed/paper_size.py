"""The paper's own model and setting on this machine: `python -m benchmarks.speed.paper_size [--seconds 600]`.

DiT-XL/2 with random weights, 256 px, guidance, DDPM, 20 steps, every fourth computed: float32, W8A8 (activation scales
per token), both kinds of cache, and both together, each by the plain loop and made ready by fuse_dit, in turn, so that
a slow spell of the machine hits all alike.
Writes speed-dit-xl-cpu.json and .md after every round; a run that is stopped there and started again goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qandc_core.caching.attach import apply_cache_to_dit, remove_cache
from qandc_core.cli.memory import keep_freed_memory
from qandc_core.evaluation.experiment import hardware
from qandc_core.files import save_text
from qandc_core.fused.dit import FusedDiT, fuse_dit
from qandc_core.models.dit import DiT, DiTConfig
from qandc_core.models.presets import PRESETS, preset
from qandc_core.quantization.model import NATIVE_SKIP, quantize_model
from qandc_core.sampling.generate import generate

from .models import random_dit

Models = dict[tuple[bool, bool], DiT | FusedDiT]  # by whether it is quantized and whether it is fused

RESULTS = Path(__file__).parents[1] / "results"
STEPS, INTERVAL, CFG_SCALE = 20, 4, 4.0


@dataclass(frozen=True)
class Way:
    """A way to sample; `public` is its speedup in the own table of the method's public re-implementation."""

    name: str
    quantized: bool = False
    reuse: str | None = None
    public: float | None = None
    fused: bool = False


PLAIN = (
    Way("float32"),
    Way("quantized", True, public=1.16),
    Way("cached, branches", reuse="branch"),
    Way("cached, blocks", reuse="block", public=3.83),
    Way("quantized and cached, branches", True, "branch"),
    Way("quantized and cached, blocks", True, "block", public=3.10),
)
WAYS = (*PLAIN, *(replace(way, name=f"{way.name}, fused", public=None, fused=True) for way in PLAIN))


def sample_seconds(models: Models, way: Way, images: int) -> float:
    """Wall seconds of one whole run."""
    model = models[way.quantized, way.fused]
    if way.reuse is not None:
        apply_cache_to_dit(model, INTERVAL, reuse=way.reuse)
    try:
        started = time.perf_counter()
        generate(model, list(range(images)), STEPS, CFG_SCALE, "ddpm")
        return time.perf_counter() - started
    finally:
        if way.reuse is not None:
            remove_cache(model)


def ratios(seconds: dict[str, list[float]], name: str) -> list[float]:
    """float32 / way of every round."""
    return [full / own for full, own in zip(seconds[WAYS[0].name], seconds[name])]


def markdown(result: dict[str, Any]) -> str:
    device, seconds = result["hardware"], result["seconds"]
    rounds = len(seconds[WAYS[0].name])
    lines = [
        f"{result['model']}, random weights, {result['pixels']} px, {result['images']} image(s) with guidance, DDPM "
        f"{STEPS} steps, N = {INTERVAL}; {device['threads']} threads of {device['device']}, torch {device['torch']}; "
        f"{rounds} interleaved round(s), medians with the range. W8A8 takes activation "
        "scales per token and leaves only the timestep embedder in float; a fused row samples with fuse_dit(), which "
        "computes the modulations of all steps at once. Made by "
        f"`{result['command']}`.",
        "",
        "| | seconds | against float32 | the public re-implementation's table |",
        "|---|---|---|---|",
    ]
    for way in WAYS:
        own = ratios(seconds, way.name)
        public = "" if way.public is None else f"{way.public:.2f}x"
        lines.append(
            f"| {way.name} | {statistics.median(seconds[way.name]):.2f} | {statistics.median(own):.2f}x "
            f"({min(own):.2f} to {max(own):.2f}) | {public} |"
        )
    return "\n".join(lines) + "\n"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.paper_size", description=__doc__)
    parser.add_argument("--model", default="DiT-XL/2", choices=PRESETS, help="a size of the DiT paper")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no round that would end later")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    args, began = arguments(argv), time.perf_counter()
    path = args.out / "speed-dit-xl-cpu.json"
    given = sys.argv[1:] if argv is None else argv
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.speed.paper_size", *given]),
        "model": args.model, "pixels": args.pixels, "images": args.images, "hardware": hardware(),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {way.name: [] for way in WAYS}
    if path.is_file():
        seconds = resumed(json.loads(path.read_text()), about)
    models = build(replace(preset(args.model), input_size=args.pixels // 8))
    round_seconds = 0.0
    while (done := len(seconds[WAYS[0].name])) < args.rounds:
        if time.perf_counter() - began + round_seconds > args.seconds:
            print(f"No time for another round; {done} of {args.rounds} are done.", file=sys.stderr)
            break
        started = time.perf_counter()
        found = {way.name: sample_seconds(models, way, args.images) for way in WAYS}
        round_seconds = time.perf_counter() - started
        for name, value in found.items():
            seconds[name].append(value)
        result = {**about, "seconds": seconds}
        args.out.mkdir(parents=True, exist_ok=True)
        save_text(json.dumps(result, indent=1), path)
        save_text(markdown(result), path.with_suffix(".md"))
        print(markdown(result), flush=True)


def resumed(found: dict[str, Any], about: dict[str, Any]) -> dict[str, list[float]]:
    """The rounds of a file; raises ValueError where it is of another machine, setting or set of rows."""
    for key in ("model", "pixels", "images", "hardware"):
        if found[key] != about[key]:
            raise ValueError(f"The result file is of {key} {found[key]}, not {about[key]}; choose another --out.")
    if set(found["seconds"]) != {way.name for way in WAYS}:
        raise ValueError("The result file has other rows; choose another --out.")
    return found["seconds"]


def build(config: DiTConfig) -> Models:
    """The model as it is and quantized, plain and fused, each after a first call, which pays for set-up."""
    full, integers = random_dit(config), random_dit(config)
    quantize_model(integers, 8, 8, NATIVE_SKIP)
    models: Models = {(False, False): full, (True, False): integers}
    models |= {(quantized, True): fuse_dit(model) for quantized, model in ((False, full), (True, integers))}
    for model in models.values():
        generate(model, [0], 1, CFG_SCALE)
    return models


if __name__ == "__main__":
    keep_freed_memory()  # as the commands of qandc_core do
    main()
