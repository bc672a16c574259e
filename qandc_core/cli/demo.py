from __future__ import annotations

import argparse
from pathlib import Path

from ..distributed import Distributed
from .common import at_least, log

SUMMARY = "the built-in model in full precision and with Q&C, side by side"


def add(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the picture and the report")
    command.add_argument("--images", type=at_least(1), default=8, help="images in every row (default 8)")
    command.add_argument("--seed", type=at_least(0), default=0, help="seed of the noise (default 0)")


def run(args: argparse.Namespace, process: Distributed) -> None:
    from ..evaluation.demo import demo_markdown, run_demo

    result = run_demo(args.out, args.images, args.seed, log)
    print(demo_markdown(result))
    print(f"Pictures: {args.out / 'comparison.png'}    Report: {args.out / 'report.md'}")
