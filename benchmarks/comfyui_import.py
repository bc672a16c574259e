"""How long ComfyUI takes to load the pack, beyond what ComfyUI itself imports.

python benchmarks/comfyui_import.py CHECKOUT [STARTS]      with ComfyUI's own Python
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import asyncio, sys, time
checkout, base = sys.argv[1:]
sys.path.insert(0, checkout)
sys.argv = ["main.py", "--cpu", "--base-directory", base]
import comfy.options
comfy.options.enable_args_parsing()
import comfy_api.v0_0_2, latent_preview, nodes
asyncio.run(nodes.init_builtin_extra_nodes())
started = time.perf_counter()
assert asyncio.run(nodes.load_custom_node(f"{base}/custom_nodes/ComfyUI-QandC"))
print("SECONDS", time.perf_counter() - started)
"""


def one_start(checkout: str, base: str) -> float:
    command = [sys.executable, "-c", PROGRAM, checkout, base]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    return float(done.stdout.split("SECONDS")[1])


def main() -> None:
    checkout, starts = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 7
    with tempfile.TemporaryDirectory() as base:
        Path(base, "custom_nodes").mkdir()
        Path(base, "custom_nodes", "ComfyUI-QandC").symlink_to(ROOT, target_is_directory=True)
        one_start(checkout, base)  # compiles the sources
        seconds = sorted(one_start(checkout, base) for _ in range(starts))
    print(f"{statistics.median(seconds):.3f} s, {seconds[0]:.3f} to {seconds[-1]:.3f} in {starts} starts")


if __name__ == "__main__":
    main()
