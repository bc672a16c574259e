"""Writes docs/quantized.md from runs on the newest ComfyUI checkout: python -m tests.comfyui.quantized_table

With --parts FOLDER what was found is kept there, and a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from tests.kitchens import unpacked

from .checkouts import Checkout, checkouts
from .families_table import line
from .formats import SINCE
from .inside_programs import REPOSITORY, install_pack, run_program
from .test_quantized_families import families

TABLE = REPOSITORY / "docs" / "quantized.md"
OLDEST, NEWEST = "0.2.31", "0.2.40"  # of ComfyUI 0.33.0, and the latest
USES = ("LoRA", "low VRAM", "compiled")
LONGEST = 3600  # seconds of one program
TEXT = """# Model families under Quantize

Each row is ComfyUI's own model class in a tiny, randomly filled configuration, quantized by Quantize to nearest and
sampled for three steps with euler, simple and cfg 2, on ComfyUI {version} with comfy-kitchen {newest}, eager kernels on
a CPU. The last column says whether layers, sizes, samples and files are the same with {oldest}, else its samples and
file. Numbers are relative L2 differences:

- Samples: from those in full precision. Random networks amplify errors; trained ones are in [results.md](results.md).
- File: what ModelSave wrote, loaded by ComfyUI without this pack (`load_diffusion_model` and the node UNETLoader, the
  larger of two), from the samples of the model that was saved. Saved once more it is the same to the bit on every row.
- LoRA: a LoRA on every quantized layer, put on after Quantize, from full precision with the same LoRA; and baked in.
- Offloaded: the last call with weights that are cast at every call, from the call in full precision. PixArt sigma's
  random network leaves noise in the sample a hundred times as large as its own part of that call.
- Compiled: the whole network by core's torch.compile wrapper with a backend that runs its graphs as they are, from the
  samples without; and in how many graphs. More than one: HiDream-I1 counts the tokens of its experts on the host and
  has 21 in full precision too; in W8A8 of Wan 2.1 and LTXV core multiplies layers behind an activation by
  comfy-kitchen's int8 product that includes it and writes to a log, where torch.compile breaks the graph.
- "-": comfy-kitchen {oldest} has no W6A8.

{rows}

Written by `python -m tests.comfyui.quantized_table`.
"""
COLUMNS = (
    "Family", "Format", "Layers", "Times smaller", "Samples", "File", "LoRA after", "LoRA baked in", "Offloaded",
    "Compiled", "On comfy-kitchen 0.2.31",
)  # fmt: skip


def measured(checkout: Checkout, version: str, parts: Path, used: bool) -> dict[str, Any]:
    """Family and format -> what the programs found on this comfy-kitchen."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        (base / "kitchen").mkdir()
        kitchen = unpacked(version, base / "kitchen")
        install_pack(base)

        def saved_and_loaded() -> dict[str, Any]:
            saved = run_program(checkout, "quantized_families", base, kitchen, longest=LONGEST)
            return {"saved": saved, "stock": run_program(checkout, "stock_load", base, kitchen, longest=LONGEST)}

        def in_use(family: str) -> dict[str, Any]:
            return run_program(checkout, "quantized_use", base, kitchen, (family, *USES), LONGEST)

        found = kept(parts / f"{version}.json", saved_and_loaded)
        for family in families() if used else ():
            found |= kept(parts / f"{version}-{family}.json", lambda family=family: in_use(family))
    return found


def kept(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.exists():
        path.write_text(json.dumps(compute()), encoding="utf-8")
        print(path.stem, flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def saved_cells(found: dict[str, Any], family: str, format: str) -> tuple[str, ...]:
    """What became of the model, and of its file in ComfyUI without this pack."""
    if format not in found["saved"][family]:
        return ()
    saved, stock = found["saved"][family][format], found["stock"][f"{family}, {format}"]
    failed = [part["failed"] for part in (saved, stock) if "failed" in part]
    if failed or saved["saved again"] is not True or not (saved["configured"] and stock["configured"]):
        raise SystemExit(f"no table: {family} in {format} failed {failed}")
    before, after = saved["reported"]
    return (
        ", ".join(f"{count} {format}" for format, count in saved["layers"].items()),
        f"{before / after:.1f}",
        f"{saved['error']:.4f}",
        shown(max(stock["direct"], stock["UNETLoader"])),
    )


def used_cells(used: dict[str, Any]) -> tuple[str, ...]:
    failed = [part["failed"] for part in used.values() if "failed" in part]
    if failed:
        raise SystemExit(f"no table: {failed}")
    compiled = used["compiled"]["quantized"]
    if isinstance(compiled, str):
        raise SystemExit(f"no table: {compiled}")
    return (
        f"{used['LoRA']['after']:.4f}",
        f"{used['LoRA']['baked']:.4f}",
        f"{offloaded:.4f}" if (offloaded := used["low VRAM"]["plain"]["offloaded"]) > 1e-4 else shown(offloaded),
        f"{shown(compiled)} in {used['compiled']['graphs']['quantized']}",
    )


def shown(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


def table(newest: dict[str, Any], oldest: dict[str, Any], version: str) -> str:
    """The document of what was found on the newest and the oldest comfy-kitchen."""
    lines = [line(COLUMNS), line("---" for _ in COLUMNS)]
    for family, format in product(families(), SINCE):
        cells, before = (saved_cells(found, family, format) for found in (newest, oldest))
        same = "the same" if before == cells else ", ".join(before[2:]) or "-"
        lines.append(line((family, format, *cells, *used_cells(newest[family][format]), same)))
    return TEXT.format(version=version, newest=NEWEST, oldest=OLDEST, rows="\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=Path, help="folder that keeps what was found")
    args, newest = parser.parse_args(), checkouts()[0]
    with tempfile.TemporaryDirectory() as parts:
        folder = args.parts or Path(parts)
        folder.mkdir(parents=True, exist_ok=True)
        found = measured(newest, NEWEST, folder, used=True), measured(newest, OLDEST, folder, used=False)
    TABLE.write_text(table(*found, newest.name), encoding="utf-8")
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
