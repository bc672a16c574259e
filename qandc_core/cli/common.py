"""What the commands share."""

from __future__ import annotations

import argparse
import sys

import torch

from ..caching.policies import CachePolicy, Interval, Speedup, StepCount
from ..diffusion.process import SamplingConfig
from ..models.dit import DiT


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def device(args: argparse.Namespace) -> torch.device:
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"torch has no device {name} here; leave --device out, or give --device cpu.") from error


def add_policy(command: argparse.ArgumentParser) -> None:
    """Other policies than --cache-interval."""
    group = command.add_mutually_exclusive_group()
    group.add_argument("--speedup", type=float, metavar="X", help="compute as many steps as make it X times faster")
    group.add_argument("--computed-steps", type=int, metavar="N", help="compute N steps, closer together at the end")


def cache_policy(args: argparse.Namespace) -> CachePolicy:
    """Raises ValueError on a number out of range."""
    if args.speedup is not None:
        return Speedup(args.speedup)
    if args.computed_steps is not None:
        return StepCount(args.computed_steps)
    return Interval(args.cache_interval)


def load(args: argparse.Namespace) -> DiT:
    from ..checkpoints import load_dit

    return load_dit(args.model, device=device(args), num_heads=args.num_heads)


def sampling(args: argparse.Namespace) -> SamplingConfig:
    scale = args.cfg if args.cfg is not None else (1.5 if args.model == "demo" else 4.0)
    return SamplingConfig(args.steps, scale, args.sampler)
