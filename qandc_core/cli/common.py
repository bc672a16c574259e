"""What the commands share."""

from __future__ import annotations

import argparse
import sys

import torch

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


def load(args: argparse.Namespace) -> DiT:
    from ..checkpoints import load_dit

    return load_dit(args.model, device=device(args), num_heads=args.num_heads)


def sampling(args: argparse.Namespace) -> SamplingConfig:
    scale = args.cfg if args.cfg is not None else (1.5 if args.model == "demo" else 4.0)
    return SamplingConfig(args.steps, scale, args.sampler)
