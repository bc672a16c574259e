"""What Calibrate from Runs costs: runs of KSampler with and without it in turns, on a Flux of middling size on the CPU.

    COMFYUI/python benchmarks/calibration/overhead.py CHECKOUT BASE [pairs]

BASE is a ComfyUI base directory with the pack in it. Prints one JSON object: median seconds of a run, the ratio of each
pair, and what adding a run to the file takes, in its thread, before the next run is timed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

STEPS, WIDTH = 20, 384
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "comfyui" / "inside"))


def main() -> None:
    from host import Host

    checkout, base, *more = sys.argv[1:]  # ComfyUI reads sys.argv later
    host, pairs = Host(checkout, base), int(more[0]) if more else 6
    import torch
    from families import build, conditioning
    from family_configs import flux
    from family_list import FAMILIES

    torch.manual_seed(0)
    family = FAMILIES["Flux"]
    sizes = {"hidden_size": WIDTH, "num_heads": 12, "mlp_ratio": 4.0, "depth": 2, "depth_single_blocks": 4}
    patcher = build(type(family)("Flux", flux(image_model="flux", **sizes), family.latent, conds=family.conds))
    node, files = host.module("nodes.calibrate_from_runs"), host.module("nodes.comfyui.files")
    growth = host.module("nodes.comfyui.calibrate.recording")
    added, add_run = [], growth.add_run

    def timed(*args):
        begun = time.perf_counter()
        try:
            return add_run(*args)
        finally:
            added.append(time.perf_counter() - begun)

    growth.add_run = timed
    recorded = node.CalibrateFromRuns.execute(patcher, "overhead", True, 8, True, 4.0, 4096, 8, 0).args[0]

    def run(model, seed: int) -> float:
        growth.settle()
        latent = {"samples": torch.zeros(1, 16, 32, 32)}
        begun = time.perf_counter()
        host.nodes.common_ksampler(
            model, seed, STEPS, 2.0, "euler", "simple", conditioning(family, 1), conditioning(family, 2), latent
        )
        return time.perf_counter() - begun

    with torch.inference_mode():
        run(patcher, 0), run(recorded, 0)
        times = [(run(patcher, seed), run(recorded, seed)) for seed in range(pairs)]
    growth.settle()
    plain, slow = zip(*times)
    ratios = sorted(b / a for a, b in times)
    print(json.dumps({  # noqa: T201
        "plain": median(plain), "recorded": median(slow), "ratios": ratios, "median ratio": median(ratios),
        "adding": median(added[1:]), "file MiB": files.named_path("overhead").stat().st_size / 2**20,
        "threads": torch.get_num_threads(), "steps": STEPS, "pairs": pairs,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
