"""Time and peak memory of TAP: `python -m benchmarks.speed.tap --out tap.json` (Linux, macOS)."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from qandc_core.calibration.tap import affinity, checked_pool, tap_select
from qandc_core.sampling.clock import Stopwatch

DIMENSION = 64
TIMESTEPS = 50
CLUSTERS = 100
SPECTRAL_POINTS = 4000  # plain spectral clustering is dense: its time and memory grow as N^2 and more


def make_pool(num_points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool without clusters, where k-means takes longest."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_points, DIMENSION, generator=generator)
    return features, torch.randint(TIMESTEPS, (num_points,), generator=generator)


def run_tap(num_points: int) -> None:
    tap_select(*make_pool(num_points), num_clusters=CLUSTERS)


def run_spectral_clustering(num_points: int) -> None:
    """scikit-learn's SpectralClustering of the same affinity, every point a landmark."""
    from sklearn.cluster import SpectralClustering

    pool = checked_pool(*make_pool(num_points), alpha=0.5, time_scale=1.0)
    model = SpectralClustering(min(CLUSTERS, num_points // 2), affinity="precomputed", random_state=0)
    model.fit(affinity(pool, pool).double().numpy())


def measure(run: Callable[[int], None], num_points: int) -> tuple[float, float]:
    """Seconds of one run and peak resident MiB of the process, imports and libraries included."""
    import resource

    run(200)  # imports of scipy and scikit-learn are no part of the time
    watch = Stopwatch()
    run(num_points)
    seconds = watch.seconds()
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure_apart(run: Callable[[int], None], num_points: int, repeats: int) -> dict[str, Any]:
    """Repeats of measure, each in a fresh process.

    Peak memory never falls within a process. On Linux an exec'd child inherits its parent's peak as well, a fork
    of the small fork server does not.
    """
    results = []
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, in the server
    for _ in range(repeats):
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            results.append(executor.submit(measure, run, num_points).result())
    seconds = [second for second, _ in results]
    return {
        "num_points": num_points,
        "seconds": statistics.median(seconds),
        "seconds_all": seconds,
        "peak_rss_mib": max(peak for _, peak in results),
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def hardware() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def benchmark_tap(
    sizes: Sequence[int] = (20500, 100000, 200000), repeats: int = 3, spectral_points: int = SPECTRAL_POINTS
) -> dict[str, Any]:
    """Median seconds and peak RSS of tap_select per pool size, and of plain spectral clustering on a small pool.

    "ratio" is the time of the largest pool over that of the smallest.
    """
    pools = [measure_apart(run_tap, size, repeats) for size in sorted(sizes)]
    return {
        "hardware": hardware(),
        "dimension": DIMENSION,
        "timesteps": TIMESTEPS,
        "clusters": CLUSTERS,
        "repeats": repeats,
        "tap": pools,
        "ratio": pools[-1]["seconds"] / pools[0]["seconds"],
        "tap_small": measure_apart(run_tap, spectral_points, repeats),
        "spectral_clustering": measure_apart(run_spectral_clustering, spectral_points, repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20500, 100000, 200000], help="pool sizes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file; without it the result goes to standard output")
    args = parser.parse_args()
    text = json.dumps(benchmark_tap(args.sizes, args.repeats), indent=2) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
