"""Which samples to calibrate on, compared on the built-in model (hours on two cores):

    python -m benchmarks.calibration --out benchmarks/results

Writes calibration-choice.json and calibration-choice.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from qandc_core import CalibrationConfig, SamplingConfig, load_dit
from qandc_core.evaluation.experiment import hardware
from qandc_core.evaluation.variants import Workbench
from qandc_core.files import save_text

from .choice import ChoiceSizes, calibration_choice, markdown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--draws", type=int, default=8, help="draws for each way to choose calibration samples")
    parser.add_argument("--out", type=Path, default=Path("out/calibration"), help="folder for JSON and table")
    args = parser.parse_args()
    config = CalibrationConfig(trajectories=64, batch_size=50, held_out=0)
    bench = Workbench(load_dit("demo"), SamplingConfig(50, 2.0), config)
    rows = calibration_choice(bench, ChoiceSizes(args.draws), lambda text: print(text, file=sys.stderr, flush=True))
    command = shlex.join(["python", "-m", "benchmarks.calibration", *sys.argv[1:]])
    result = {"command": command, "hardware": hardware(), "rows": rows}
    save_text(json.dumps(result, indent=1), args.out / "calibration-choice.json")
    save_text(markdown(result), args.out / "calibration-choice.md")


if __name__ == "__main__":
    main()
