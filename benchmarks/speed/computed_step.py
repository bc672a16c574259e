"""What 8-bit integers gain per computed step of the built-in model: `python -m benchmarks.speed.computed_step OUT.txt`.

Every round calls all models in turn; the numbers are the median of the rounds' ratios, their range, and the pages that
one call takes from the system. First with the C library as it is, then as commands have it (keep_freed_memory).
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from qandc_core.checkpoints import load_dit
from qandc_core.cli.memory import keep_freed_memory
from qandc_core.evaluation.demo import DEMO_CALIBRATION, DEMO_SAMPLING
from qandc_core.evaluation.experiment import hardware
from qandc_core.evaluation.variants import Variant, Workbench
from qandc_core.files import save_text
from qandc_core.models.dit import DiT

from .ratios import interleaved

VARIANTS = {"W8A8, static": Variant("static", bits=(8, 8)), "W8A8, per token": Variant("", bits=(8, 8), static=False)}


def page_faults(call: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def measured(models: dict[str, DiT], images: int, rounds: int) -> list[str]:
    """A line for each model; with guidance, a step of `images` images calls it with twice as many."""
    config = models["float32"].config
    x, t = torch.randn(2 * images, 3, 32, 32), torch.full((2 * images,), 500)
    labels = torch.cat([torch.arange(images) % config.num_classes, torch.full((images,), config.num_classes)])
    calls = {name: partial(net, x, t, labels) for name, net in models.items()}
    with torch.inference_mode():
        seconds = interleaved(calls, rounds)
        faults = {name: page_faults(call) for name, call in calls.items()}
    lines = [f"{images} images, {torch.get_num_threads()} threads"]
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(seconds["float32"], taken)]
        lines.append(
            f"    {name}: {1e3 * statistics.median(taken):.1f} ms, {statistics.median(ratios):.2f}x "
            f"({min(ratios):.2f} to {max(ratios):.2f}), {faults[name]:,} page faults"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    model, machine = load_dit("demo"), hardware()
    bench = Workbench(model, DEMO_SAMPLING, DEMO_CALIBRATION)
    models = {"float32": model} | {name: bench.build(variant)[0] for name, variant in VARIANTS.items()}
    lines = [
        f"one computed step of the built-in model with guidance, {args.rounds} rounds in turns",
        f"{machine['device']}, torch {torch.__version__}",
    ]
    for text, prepare in (("returned to the system", lambda: None), ("kept", keep_freed_memory)):
        prepare()
        lines += ["", f"Freed memory {text}:"]
        for threads in args.threads:
            torch.set_num_threads(threads)
            for images in args.images:
                lines += measured(models, images, args.rounds)
    save_text("\n".join(lines) + "\n", args.out)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
