"""Results that several processes write at once: units of work that they take in turn, and rows kept under a lock."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Unit = TypeVar("Unit")
Rows = list[dict[str, Any]]


def options(description: str, out: Path) -> argparse.ArgumentParser:
    """What every program here takes that measures in pieces."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("comfyui", nargs="?")
    parser.add_argument("base", nargs="?")
    parser.add_argument("flow", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each on a core of its own")
    parser.add_argument("--only", default="", help="parts of the models' names, separated by semicolons")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--report", action="store_true", help="only write the tables of the JSON file again")
    return parser


def chosen(name: str, parts: str) -> bool:
    """Whether a name has one of the parts, which semicolons separate; any name where there are none."""
    wanted = [part for part in parts.split(";") if part]
    return not wanted or any(part in name for part in wanted)


def machine() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return found[0].split(":")[1].strip()


def machines(rows: Rows) -> str:
    """Of all rows; those of earlier versions, which do not say it, are of the first."""
    return ", ".join(dict.fromkeys(["AMD EPYC", *(row["machine"] for row in rows if "machine" in row)]))


def read(file: Path) -> Rows:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def keep(file: Path, new: Rows, key: Callable[[dict], Hashable]) -> None:
    """Adds the rows and what machine they are of to the file, in the place of rows with the same key."""
    with locked(file.parent):
        rows = {key(row): row for row in read(file)}
        rows |= {key(row): {**row, "machine": machine()} for row in new}
        written = file.with_suffix(".new")
        written.write_text("[" + ",\n".join(map(json.dumps, rows.values())) + "]\n", encoding="utf-8")
        written.replace(file)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    import fcntl  # Linux and macOS

    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def in_turns(units: Sequence[Unit], work: Callable[[Unit], None], jobs: int, seconds: float) -> None:
    """Processes that take the units in turn, each on a core of its own; none is begun after so many seconds.

    They are forked, so that what was loaded before is loaded once. Raises RuntimeError where a unit failed, after the
    others; its error is printed.
    """
    begun, fork = time.perf_counter(), multiprocessing.get_context("fork")
    taken, cores = fork.Value("i", 0), sorted(os.sched_getaffinity(0))

    def turns(core: int) -> None:
        failed = 0
        if jobs > 1:
            os.sched_setaffinity(0, {core})
        while time.perf_counter() - begun < seconds:
            with taken.get_lock():
                number, taken.value = taken.value, taken.value + 1
            if number >= len(units):
                break
            try:
                work(units[number])
                print(units[number], f"{time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
            except Exception:
                failed += 1
                traceback.print_exc()
        if failed:
            sys.exit(f"{failed} failed")

    workers = [fork.Process(target=turns, args=(cores[i % len(cores)],)) for i in range(min(jobs, len(units)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"Some of {len(units)} measurements failed; the errors are above.")
