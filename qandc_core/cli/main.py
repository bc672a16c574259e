"""Command line: python -m qandc_core demo | generate | calibrate | quantize | experiment | bench."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..distributed import distributed
from . import bench, calibrate, demo, experiment, generate, quantize

COMMANDS = {
    "demo": demo,
    "generate": generate,
    "calibrate": calibrate,
    "quantize": quantize,
    "experiment": experiment,
    "bench": bench,
}
SEVERAL = ("generate", "calibrate", "quantize", "experiment")  # those that torchrun's processes share out


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m qandc_core",
        description="Makes diffusion transformers faster by quantization and caching that work together.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = module.SUMMARY
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        module.add(command)
        command.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with distributed() as process:
            if process.world > 1 and args.command not in SEVERAL:
                raise ValueError("runs in one process; start it without torchrun.")
            args.run(args, process)
    except (ValueError, OSError) as error:
        print(f"qandc_core {args.command}: {error}", file=sys.stderr)
        return 2
    return 0
