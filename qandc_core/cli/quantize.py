from __future__ import annotations

import argparse
from pathlib import Path

from ..distributed import Distributed
from ..quantization.gptq import ROUNDINGS
from .common import add_bits, add_model, load, log, safetensors

SUMMARY = "write a quantized checkpoint"


def add(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_bits(command)
    command.add_argument("--calibration", type=Path, help="calibration file: static activations (default: dynamic)")
    command.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="nearest",
        help="how weights are rounded; gptq needs a calibration with --hessians",
    )
    command.add_argument("--out", type=safetensors, required=True, help="checkpoint to write (.safetensors)")


def run(args: argparse.Namespace, process: Distributed) -> None:
    from ..calibration.file import load_calibration
    from ..checkpoints.quantized import save_quantized
    from ..models.layers import DIT_SKIP
    from ..quantization.model import QuantizationConfig, linear_weight_bytes, quantize_model

    config = QuantizationConfig(rounding=args.rounding)
    model = load(args)
    calibration = load_calibration(args.calibration) if args.calibration else None
    before = linear_weight_bytes(model)
    quantize_model(model, args.w_bits, args.a_bits, DIT_SKIP, calibration, config, process=process)
    if process.rank == 0:
        save_quantized(model, args.out)
        log(f"Linear weights: {before / 2**20:.1f} MiB before, {linear_weight_bytes(model) / 2**20:.1f} MiB after")
        print(args.out)
