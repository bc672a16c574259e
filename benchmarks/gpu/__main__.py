"""Everything that is measured on one GPU, in one command, whose last row begins after seven minutes:

    python -m benchmarks.gpu

DiT-XL/2 with random weights at 256 and 512 pixels, batches of 8, 1 and 32 with guidance, 50 steps: full precision as
torch runs it, and Q&C's formats, caches and kernels; ceilings of the same card; every matrix product on its own. Writes
speed-<device>.json and speed-<device>.md into benchmarks/results. Needs torch, triton and comfy-kitchen, no network.
On a CPU it runs a small model, to show that it works.

Where the GPU's machine has torch and triton but no network and takes 64 MiB of files at most, the CUDA wheel of
comfy-kitchen (64.7 MiB) does not fit beside this repository. Unzipped without its kernels for AMD it is 51 MiB:

    unzip -q comfy_kitchen-*.whl -x "comfy_kitchen/backends/hip/*" -d kitchen
    PYTHONPATH=kitchen python -m benchmarks.gpu     # there
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

from benchmarks.speed.runs import Setting
from benchmarks.speed.table import default_run, speed_table
from qandc_core.evaluation.experiment import hardware
from qandc_core.models.presets import preset

from .report import markdown

RESULTS = Path(__file__).parents[1] / "results"


def setting(text: str) -> Setting:
    pixels, images = map(int, text.split("x"))
    return Setting(pixels, images)


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def device_label(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).replace(" ", "-") if device.type == "cuda" else "cpu"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", type=setting, help="pixels x batch, such as 256x8")
    parser.add_argument("--model", help="a size of the DiT paper")
    parser.add_argument("--only", default="", help="parts of the rows' names, separated by semicolons")
    parser.add_argument("--seconds", type=float, default=420.0, help="begin no further row after as long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    args, began = arguments(), time.perf_counter()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model, settings = default_run(device)
    model, settings = args.model or model, args.settings or settings
    packages = ("torch", "triton", "comfy-kitchen")
    about = {
        "name": model,
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "hardware": {**hardware(), "cuda": device.type == "cuda"},
        "versions": {package: installed(package) for package in packages},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"speed-{device_label(device)}"

    def note(text: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {text}", file=sys.stderr, flush=True)

    def save(result: dict[str, Any]) -> None:
        stem.with_suffix(".json").write_text(json.dumps({**about, **result}, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(markdown({**about, **result}), encoding="utf-8")
        note(f"{stem}.md")

    speed_table(preset(model), settings, device, args.seconds, note, save, device.type == "cpu", args.only)


if __name__ == "__main__":
    main()
