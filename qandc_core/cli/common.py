"""Options that several commands have, and what they stand for."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..caching.policies import Interval
from ..calibration.choice import CalibrationConfig
from ..diffusion.process import SamplingConfig
from ..distributed import rank
from ..models.dit import DiT

CACHE_INTERVAL = Interval.interval


def log(text: str) -> None:
    """Progress; of several processes only the first tells it."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


# Kinds of values.


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


def class_id(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be the number of a class, got {value}")
    return value


class_id.__name__ = "int"


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {value}")
    return value


finite.__name__ = "float"


def positive(text: str) -> float:
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {value}")
    return value


positive.__name__ = "float"


def safetensors(text: str) -> Path:
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"must end in .safetensors, got {text}")
    return Path(text)


# Options.


def add_number(
    command: Any, name: str, type: Callable[[str], Any], help: str, default: Any = None, metavar: str = "N"
) -> None:
    """An option with a number; the help names its default."""
    named = help if default is None else f"{help} (default {default})"
    command.add_argument(name, type=type, default=default, metavar=metavar, help=named)


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", default="demo", help='"demo" (the built-in model), a DiT checkpoint file, or a diffusers folder'
    )
    command.add_argument("--num-heads", type=at_least(1), help="attention heads, where the file does not say")
    command.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")


def add_sampling(command: argparse.ArgumentParser) -> None:
    add_number(command, "--steps", at_least(1), "sampling steps", 50)
    command.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm", help="sampler (default ddpm)")
    add_guidance(command)


def add_guidance(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cfg", type=finite, default=None, help="guidance scale (default 2 for the demo model, else 4)"
    )


def add_bits(command: argparse.ArgumentParser) -> None:
    add_number(command, "--w-bits", bits, "bits of the weights, 2 to 8", 8)
    add_number(command, "--a-bits", bits, "bits of the activations, 2 to 8", 8)


def add_candidates(command: argparse.ArgumentParser, default: CalibrationConfig) -> None:
    origin = "sampling runs that the calibration samples are chosen from"
    add_number(command, "--trajectories", at_least(1), origin, default.trajectories)
    add_number(command, "--samples", at_least(1), "calibration samples", default.samples)


# What they stand for.


def device(args: argparse.Namespace) -> torch.device:
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"torch has no device {name} here; leave --device out, or give --device cpu.") from error
    if found.type == "meta":
        raise ValueError("Tensors on the device meta hold no values; leave --device out, or give --device cpu.")
    return found


def load(args: argparse.Namespace) -> DiT:
    from ..checkpoints import load_dit

    return load_dit(args.model, device=device(args), num_heads=args.num_heads)


def sampling(args: argparse.Namespace) -> SamplingConfig:
    scale = args.cfg if args.cfg is not None else (2.0 if args.model == "demo" else 4.0)
    return SamplingConfig(args.steps, scale, args.sampler)
