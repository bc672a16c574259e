"""Command line: python -m qandc_core demo | generate | calibrate | quantize | experiment | bench."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import bench, calibrate, demo, experiment, generate, quantize
from .common import add_policy


def at_least(minimum: int):
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be {minimum} or more, got {value}")
        return value

    parse.__name__ = "whole number"
    return parse


def bits(text: str) -> int:
    value = int(text)
    if not 2 <= value <= 8:
        raise argparse.ArgumentTypeError(f"must be between 2 and 8, got {value}")
    return value


def safetensors(text: str) -> Path:
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"must end in .safetensors, got {text}")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m qandc_core",
        description="Makes diffusion transformers faster by quantization and caching that work together.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_demo(commands)
    add_generate(commands)
    add_calibrate(commands)
    add_quantize(commands)
    add_experiment(commands)
    add_bench(commands)
    return top


def add_command(commands, name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", default="demo", help='"demo" (the built-in model), a DiT checkpoint file, or a diffusers folder'
    )
    command.add_argument("--num-heads", type=at_least(1), help="attention heads, where the file does not say")
    command.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")


def add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--steps", type=at_least(1), default=50, help="sampling steps (default 50)")
    command.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm", help="sampler (default ddpm)")
    command.add_argument(
        "--cfg", type=float, default=None, help="guidance scale (default 1.5 for the demo model, else 4)"
    )


def add_cache(command: argparse.ArgumentParser) -> None:
    command.add_argument("--cache-interval", type=at_least(1), default=3, metavar="N",
                         help="compute every N-th step, 1 caches nothing (default 3)")  # fmt: skip


def add_bits(command: argparse.ArgumentParser) -> None:
    command.add_argument("--w-bits", type=bits, default=8, help="bits of the weights, 2 to 8 (default 8)")
    command.add_argument("--a-bits", type=bits, default=8, help="bits of the activations, 2 to 8 (default 8)")


def add_demo(commands) -> None:
    command = add_command(commands, "demo", "the built-in model in full precision and with Q&C, side by side")
    command.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the picture and the report")
    command.add_argument("--images", type=at_least(1), default=20, help="images in every row (default 20)")
    command.add_argument("--seed", type=at_least(0), default=0, help="seed of the noise (default 0)")
    command.set_defaults(run=demo.run)


def add_generate(commands) -> None:
    command = add_command(commands, "generate", "sample images of given classes")
    add_model(command)
    add_sampling(command)
    add_cache(command)
    add_policy(command)
    command.add_argument("--classes", type=int, nargs="+", required=True, help="class ids, one for each image")
    command.add_argument("--seed", type=at_least(0), default=0, help="seed of the noise (default 0)")
    command.add_argument("--calibration", type=Path, help="calibration file; brings its variance compensation")
    command.add_argument("--vae", help="folder of a diffusers VAE, for models that sample latents")
    command.add_argument("--fused", action="store_true",
                         help="sample with fuse_dit(): the same pictures, on a GPU from CUDA graphs")  # fmt: skip
    command.add_argument("--out", type=Path, default=Path("out/images.png"), help="picture to write")
    command.set_defaults(run=generate.run)


def add_calibrate(commands) -> None:
    command = add_command(commands, "calibrate", "gather statistics with the cache on, and fit the compensation")
    add_model(command)
    add_sampling(command)
    add_cache(command)
    add_bits(command)
    command.add_argument("--trajectories", type=at_least(1), default=64, help="runs the candidates come from")
    command.add_argument("--samples", type=at_least(1), default=800, help="candidates that calibrate")
    command.add_argument("--selection", default=None,
                         help="random, stratified, tap or tap-blocks; tap@5 sets a time scale of 5 steps, -computed "
                              "keeps to computed steps (default: the best measured)")  # fmt: skip
    command.add_argument("--pairs", type=at_least(0), default=64, help="pairs of runs for the compensation, 0 for none")
    command.add_argument("--optimal-steps", action="store_true",
                         help="compute the DP-optimal steps, as many as the interval would")  # fmt: skip
    command.add_argument("--hessians", action="store_true", help="keep X^T X of every layer, for gptq rounding")
    command.add_argument("--out", type=safetensors, required=True, help="calibration file to write (.safetensors)")
    command.set_defaults(run=calibrate.run)


def add_quantize(commands) -> None:
    command = add_command(commands, "quantize", "write a quantized checkpoint")
    add_model(command)
    add_bits(command)
    command.add_argument("--calibration", type=Path, help="calibration file: static activations (default: dynamic)")
    command.add_argument("--rounding", choices=("nearest", "gptq"), default="nearest",
                         help="how weights are rounded; gptq needs a calibration with --hessians")  # fmt: skip
    command.add_argument("--out", type=safetensors, required=True, help="checkpoint to write (.safetensors)")
    command.set_defaults(run=quantize.run)


def add_experiment(commands) -> None:
    command = add_command(commands, "experiment", "the ablation: every part of the method on and off")
    add_model(command)
    add_sampling(command)
    command.add_argument("--num-images", type=at_least(4), default=1000, help="images for each main row and seed")
    command.add_argument("--seeds", type=at_least(0), nargs="+", default=[1, 2, 3], help="seeds of the main rows")
    command.add_argument("--batch", type=at_least(1), default=50, help="images sampled at once")
    command.add_argument("--parts", nargs="+", choices=("main", "factors", "choice"),
                         default=["main", "factors", "choice"], help="tables to make (default all)")  # fmt: skip
    command.add_argument("--factor-images", type=at_least(4), default=256, help="images for each row of the factors")
    command.add_argument(
        "--draws", type=at_least(2), default=8, help="draws for each way to choose calibration samples"
    )
    command.add_argument("--trajectories", type=at_least(1), default=64, help="runs the candidates come from")
    command.add_argument("--samples", type=at_least(1), default=800, help="candidates that calibrate")
    command.add_argument("--pairs", type=at_least(1), default=128, help="pairs of runs for the compensation")
    command.add_argument("--vae", help="folder of a diffusers VAE (ImageNet models)")
    command.add_argument("--inception", help="FID Inception weights (ImageNet models)")
    command.add_argument("--reference", help="ADM reference batch .npz (ImageNet models)")
    command.add_argument("--out", type=Path, default=Path("out/experiment"), help="folder for JSON, table and plot")
    command.set_defaults(run=experiment.run)


def add_bench(commands) -> None:
    command = add_command(
        commands, "bench", "speed and memory of every part, and in words where the time of a step goes"
    )
    command.add_argument("--parts", nargs="+", choices=bench.PARTS, default=list(bench.PARTS),
                         help="what to measure (default all)")  # fmt: skip
    command.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON and table")
    command.set_defaults(run=bench.run)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"qandc_core {args.command}: {error}", file=sys.stderr)
        return 2
    return 0
