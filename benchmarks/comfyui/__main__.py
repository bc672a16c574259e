"""Times of one model in ComfyUI, as it is, through core's nodes and through ours:

    python -m benchmarks.comfyui --model demo --batch 16 --steps 30
    python -m benchmarks.comfyui --model dit --width 1152 --depth 28
    python -m benchmarks.comfyui --model flux-dev --steps 20 --cfg 1 --warm 4 --seconds 200    # on a GPU

Runs on a GPU where ComfyUI's Python has one, in bfloat16, else on CPU in float32. Adds the run to
comfyui-speed-cpu.json and comfyui-speed-cpu.md in benchmarks/results, or to those of the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qandc_core.evaluation.experiment import cpu_name
from tests.comfyui.checkouts import Checkout, checkouts
from tests.comfyui.inside_programs import PROGRAMS, install_pack

from ..caching.flow_model import WEIGHTS
from .tables import report

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
REAL = ("flux-dev", "z-image", "sdxl", "wan-1.3b")  # real_models.SIZES


def measure(checkout: Checkout, options: dict[str, Any], threads: int) -> Iterator[dict[str, Any]]:
    """What inside_speed.py finds, as it grows; torch.compile begins with an empty cache."""
    kept = {key: value for key, value in options.items() if key != "flow"}  # a path of this machine
    with tempfile.TemporaryDirectory() as base:
        install_pack(Path(base))
        for found in results_of(checkout, Path(base), options, threads):
            machine = f"{threads} threads of {cpu_name()}" if found["device_name"] == "cpu" else found["device_name"]
            yield {"comfyui": checkout.name, "machine": machine, "threads": threads, **kept, **found}


def results_of(checkout: Checkout, base: Path, options: dict[str, Any], threads: int) -> Iterator[dict[str, Any]]:
    folders = [HERE, *(HERE.parent / name for name in ("quantization", "caching")), PROGRAMS]
    given = os.environ.get("PYTHONPATH")
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([*map(str, folders), *([given] if given else [])]),
        **{f"{name}_CACHE_DIR": str(base / name.lower()) for name in ("TORCHINDUCTOR", "TRITON")},
    }
    command = [checkout.python, HERE / "inside_speed.py", checkout.path, base, json.dumps(options)]
    with subprocess.Popen(
        [str(part) for part in command], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    ) as running:
        for line in running.stdout:
            if line.startswith("RESULTS "):
                yield json.loads(line.removeprefix("RESULTS "))
    if running.returncode:
        raise RuntimeError(f"{HERE.name}/inside_speed.py ended with status {running.returncode}.")


def slug(device_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().removeprefix("nvidia ")).strip("-")


def write(file: Path, runs: dict[str, dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(report(runs), encoding="utf-8")
    print(f"wrote {file.with_suffix('.*')}", file=sys.stderr)


def read(file: Path) -> dict[str, dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.comfyui", description=__doc__.splitlines()[0])
    made.add_argument("--model", choices=["demo", "dit", "flow", *REAL], default="demo")
    made.add_argument("--width", type=int, default=1152, help="of the model dit, a multiple of 72; 1152 is DiT-XL/2's")
    made.add_argument("--depth", type=int, default=28, help="blocks of the model dit")
    made.add_argument("--flow", type=Path, default=WEIGHTS)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--steps", type=int, default=30)
    made.add_argument("--cfg", type=float, default=1.5)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--warm", type=int, default=0, help="steps of the untimed runs (default: as many as are timed)")
    made.add_argument("--seconds", type=float, default=1e9, help="begin no further run after as long")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--device", choices=["auto", "cpu"], default="auto")
    made.add_argument("--only", default="", help="parts of the rows' names, separated by semicolons")
    made.add_argument("--no-compile", dest="compiles", action="store_false", help="leave out TorchCompileModel")
    made.add_argument("--arguments", default="", help="for ComfyUI on a GPU, such as '--enable-triton-backend'")
    made.add_argument("--dynamic", action="store_true", help="with dynamic VRAM, ComfyUI's default on NVIDIA")
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--redraw", type=Path, metavar="JSON", help="only write the Markdown of this file again")
    return made


def main() -> None:
    options = vars(parser().parse_args())
    out, threads, redraw = options.pop("out"), options.pop("threads"), options.pop("redraw")
    if redraw:
        return write(redraw, read(redraw))
    command = shlex.join(["python", "-m", "benchmarks.comfyui", *sys.argv[1:]])
    for found in measure(checkouts()[0], {**options, "flow": str(options["flow"].resolve())}, threads):
        file = out / f"comfyui-speed-{slug(found['device_name'])}.json"
        write(file, {**read(file), f"{found['title']}, batch {found['batch']}": {**found, "command": command}})


if __name__ == "__main__":
    main()
