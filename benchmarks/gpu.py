"""Everything that can be measured on one GPU, in one command of at most eight minutes:

    python -m benchmarks.gpu

DiT-XL/2 with random weights at 256 and 512 pixels, batches of 1, 8 and 32 with guidance, 50 steps: full precision as
torch runs it, and Q&C's formats, caches and kernels; ceilings of the same card; every matrix product on its own. Writes
speed-<device>.json and speed-<device>.md into benchmarks/results. Needs torch, triton and comfy-kitchen, no network.
On a CPU it runs a small model, to show that it works.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qandc_core.evaluation.experiment import hardware
from qandc_core.evaluation.speed.report import markdown
from qandc_core.evaluation.speed.runs import Setting
from qandc_core.evaluation.speed.table import speed_table
from qandc_core.models.presets import preset

RESULTS = Path(__file__).parent / "results"
SETTINGS = ("256x8", "256x1", "256x32", "512x8", "512x1", "512x32")


def setting(text: str, steps: int) -> Setting:
    pixels, images = text.split("x")
    return Setting(int(pixels), int(images), steps)


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def device_label(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).replace(" ", "-") if device.type == "cuda" else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS if cuda else ["256x2"]), help="pixels x batch")
    parser.add_argument("--model", default="DiT-XL/2" if cuda else "DiT-S/4", help="a size of the DiT paper")
    parser.add_argument("--steps", type=int, default=50 if cuda else 9)
    parser.add_argument("--seconds", type=float, default=450.0, help="begin nothing new after as long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device, began = torch.device("cuda" if cuda else "cpu"), time.perf_counter()

    def note(text: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {text}", file=sys.stderr, flush=True)

    settings = [setting(text, args.steps) for text in args.settings]
    result: dict[str, Any] = {
        "name": args.model,
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": {package: installed(package) for package in ("torch", "triton", "comfy-kitchen")},
        **speed_table(preset(args.model), settings, device, args.seconds, note, quick=not cuda),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"speed-{device_label(device)}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    note(f"{stem}.md")


if __name__ == "__main__":
    main()
