"""Every format on ComfyUI's model families, in ComfyUI with several versions of comfy-kitchen:

    python -m benchmarks.quantization.families --kitchen 0.2.31=FOLDER --kitchen 0.2.40=FOLDER

FOLDER holds a comfy-kitchen, such as an unpacked wheel; nothing after "=" is the installed one. Families that
quantization-families.json has are not run again. Writes quantization-families.json and .md into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.comfyui.checkouts import checkouts
from tests.comfyui.inside_programs import install_pack, run_program
from tests.comfyui.test_quantized_families import families

from .start import RESULTS, run_inside

TEXT = """# Quantize on ComfyUI's model families

Each family is ComfyUI's own model class in a tiny, randomly filled file that its own loader recognizes, sampled for
three steps of euler; relative L2 differences. "Error" is the quantized model's against full precision. "Stock" is the
saved file in a ComfyUI without this pack, loaded by UNETLoader, against the saved model. "LoRA after / before":
samples with a LoRA on every quantized layer, put on by Load LoRA after Quantize or baked in before, against full
precision with it; without the LoRA the samples were those of before, bit for bit, in {removed} of {rows} rows.
"Offloaded": the last prediction of a run with all weights cast at every call against weights in place, without / with
the LoRA. "Compiled": by core's wrapper for torch.compile with aot_eager. ComfyUI {comfyui}, CPU ({machine}). Networks
are random: errors compare formats and paths, not the quality of trained models. Made by
`python -m benchmarks.quantization.families`.
"""


def number(value: Any) -> str:
    return "failed" if isinstance(value, str) else f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3f}"


def report(data: dict[str, Any]) -> str:
    removed = sum(row["LoRA"]["removed"] for row in data["rows"])
    parts = [TEXT.format(**{**data, "removed": removed, "rows": len(data["rows"])})]
    for kitchen in sorted({row["kitchen"] for row in data["rows"]}):
        lines = [
            f"## comfy-kitchen {kitchen}",
            "",
            "| | | error | stock | LoRA after / before | offloaded | compiled |",
        ]
        lines.append("|---|---|---:|---:|---:|---:|---:|")
        for row in data["rows"]:
            if row["kitchen"] == kitchen:
                lora = f"{number(row['LoRA']['after'])} / {number(row['LoRA']['baked'])}"
                away = " / ".join(number(row["offloaded"][kind]) for kind in ("plain", "LoRA"))
                cells = [number(row["error"]), number(row["stock"]), lora, away, number(row["compiled"])]
                lines.append(f"| {row['family']} | {row['format']} | {' | '.join(cells)} |")
        parts += ["\n".join(lines), ""]
    return "\n".join(parts)


def measure(names: list[str], kitchen: str, folder: Path | None, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        base = Path(made)
        install_pack(base)
        found = run_inside("families", {"families": names}, threads, base, folder)
        stock = run_program(checkouts()[0], "stock_load", base, folder)
    for row in found["rows"]:
        loaded = stock[f"{row['family']}, {row['format']}"]
        row |= {"kitchen": kitchen, "stock": loaded.get("UNETLoader", loaded.get("failed"))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kitchen", action="append", default=[], help="VERSION=FOLDER")
    parser.add_argument("--at-once", type=int, default=2, help="families of one process")
    parser.add_argument("--processes", type=int, default=100, help="stop after as many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    file = args.out / "quantization-families.json"
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    for version, _, folder in (text.partition("=") for text in args.kitchen):
        known = {row["family"] for row in data["rows"] if row["kitchen"] == version}
        missing = [name for name in families() if name not in known]
        while missing and args.processes > 0:
            names, missing, args.processes = missing[: args.at_once], missing[args.at_once :], args.processes - 1
            found = measure(names, version, Path(folder) if folder else None, args.threads)
            data["rows"] += found["rows"]
            data |= {"comfyui": found["comfyui"], "machine": found["machine"]}
            file.write_text(json.dumps(data, indent=0) + "\n", encoding="utf-8")
            print(f"{version}: {', '.join(names)}", file=sys.stderr)
    (args.out / "quantization-families.md").write_text(report(data), encoding="utf-8")


if __name__ == "__main__":
    main()
