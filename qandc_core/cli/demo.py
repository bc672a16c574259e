from __future__ import annotations

import argparse

from .common import log


def run(args: argparse.Namespace) -> None:
    from ..evaluation.demo import demo_markdown, run_demo

    result = run_demo(args.out, args.images, args.seed, log)
    print(demo_markdown(result))
    print(f"Pictures: {args.out / 'comparison.png'}    Report: {args.out / 'report.md'}")
