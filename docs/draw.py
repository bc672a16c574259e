"""Draws the wiring pictures of the help pages, and the icon and banner of the registry, as SVG.

    python -m docs.draw

The help panel is as narrow as 218 pixels, so a picture flows from top to bottom, and wires are straight lines in two or
four lanes, in the colours that ComfyUI gives their types.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tests.browser.frontend import FLAGS, chromium

ROOT = Path(__file__).parents[1]
WIDTH, ROW, BOX = 220, 62, 30
FONT = "Inter, 'Noto Sans CJK SC', 'Microsoft YaHei', 'PingFang SC', sans-serif"
MODEL, CONDITIONING, LATENT, IMAGE, OURS = "#b39ddb", "#ffa931", "#ff9cf9", "#64b5f6", "#9ccc65"
CLIP = "#ffd500"
LEFT, RIGHT = 58, 162
FULL, HALF_LEFT, HALF_RIGHT = (6, 214), (6, 106), (114, 214)


@dataclass(frozen=True)
class Box:
    name: str
    row: int
    sides: tuple[int, int] = FULL


@dataclass(frozen=True)
class Wire:
    """From the row `top` down to the row `bottom` at `x`; `label` names the inputs that it reaches."""

    top: int
    bottom: int
    label: str
    color: str = MODEL
    x: int = LEFT


PICTURES: dict[str, tuple[list[Box], list[Wire]]] = {
    "QandC_LoadDiT": (
        [Box("Load DiT", 0, HALF_LEFT), Box("Class Label", 0, HALF_RIGHT), Box("KSampler", 1), Box("VAE Decode", 2)],
        [Wire(0, 1, "model"), Wire(0, 1, "positive,\nnegative", CONDITIONING, RIGHT), Wire(1, 2, "samples", LATENT)],
    ),
    "QandC_ClassLabel": (
        [Box("Load DiT", 0, HALF_LEFT), Box("Class Label", 0, HALF_RIGHT), Box("KSampler", 1)],
        [Wire(0, 1, "model"), Wire(0, 1, "positive,\nnegative", CONDITIONING, RIGHT)],
    ),
    "QandC_ApplyCache": (
        [Box("Load Diffusion Model", 0), Box("Apply Cache", 1), Box("KSampler", 2)],
        [Wire(0, 1, "model"), Wire(1, 2, "model")],
    ),
    "QandC_TAPCalibrate": (
        [Box("Load Diffusion Model", 0), Box("TAP Calibrate", 1, HALF_RIGHT), Box("Quantize", 2), Box("KSampler", 3)],
        [
            Wire(0, 2, "model"), Wire(0, 1, "model", MODEL, RIGHT), Wire(1, 2, "calibration", OURS, RIGHT),
            Wire(2, 3, "model"),
        ],
    ),
    "QandC_Quantize": (
        [
            Box("Load Diffusion Model", 0), Box("TAP Calibrate", 1, HALF_RIGHT), Box("Quantize", 2),
            Box("KSampler", 3, HALF_LEFT), Box("Save Model", 3, HALF_RIGHT),
        ],
        [
            Wire(0, 2, "model"), Wire(0, 1, "model", MODEL, RIGHT), Wire(1, 2, "calibration", OURS, RIGHT),
            Wire(2, 3, "model"), Wire(2, 3, "model", MODEL, RIGHT),
        ],
    ),
    "QandC_QuantizeTextEncoder": (
        [
            Box("Load CLIP", 0), Box("Quantize Text Encoder", 1), Box("CLIP Text Encode", 2, HALF_LEFT),
            Box("Save Text Encoder", 2, HALF_RIGHT),
        ],
        [Wire(0, 1, "clip", CLIP), Wire(1, 2, "clip", CLIP), Wire(1, 2, "clip", CLIP, RIGHT)],
    ),
    "QandC_SaveTextEncoder": (
        [Box("Load CLIP", 0), Box("Quantize Text Encoder", 1), Box("Save Text Encoder", 2)],
        [Wire(0, 1, "clip", CLIP), Wire(1, 2, "clip, filename_prefix", CLIP)],
    ),
    "QandC_VarianceCompensate": (
        [
            Box("Load Diffusion Model", 0), Box("Apply Cache", 1, HALF_LEFT), Box("Quantize", 2, HALF_LEFT),
            Box("Variance Compensate", 3), Box("KSampler", 4),
        ],
        [
            Wire(0, 1, "model"), Wire(1, 2, "model"), Wire(2, 3, "model"), Wire(0, 3, "reference", MODEL, RIGHT),
            Wire(3, 4, "model"),
        ],
    ),
    "QandC_CalibrateFromRuns": (
        [
            Box("Load Diffusion Model", 0), Box("Calibrate from Runs", 1), Box("any sampler", 2, HALF_LEFT),
            Box("Quantize", 2, HALF_RIGHT),
        ],
        [Wire(0, 1, "model"), Wire(1, 2, "model"), Wire(1, 2, "calibration", OURS, RIGHT)],
    ),
    "QandC_RunReport": (
        [
            Box("Apply Cache", 0), Box("Run Report", 1), Box("any sampler", 2, HALF_LEFT),
            Box("Compare", 2, HALF_RIGHT),
        ],
        [Wire(0, 1, "model"), Wire(1, 2, "model"), Wire(1, 2, "reports", OURS, RIGHT)],
    ),
    "QandC_Sample": (
        [
            Box("Apply Cache", 0, HALF_LEFT), Box("CLIP Text Encode", 0, HALF_RIGHT), Box("Sample", 1),
            Box("VAE Decode", 2, HALF_LEFT), Box("Compare", 2, HALF_RIGHT),
        ],
        [
            Wire(0, 1, "model"), Wire(0, 1, "positive,\nnegative", CONDITIONING, RIGHT),
            Wire(1, 2, "samples", LATENT), Wire(1, 2, "reports", OURS, RIGHT),
        ],
    ),
    "QandC_Compare": (
        [
            Box("reference run", 0, HALF_LEFT), Box("run to judge", 0, HALF_RIGHT), Box("Compare", 1),
            Box("Save Image", 2),
        ],
        [
            Wire(0, 1, "image0", IMAGE, 20), Wire(0, 1, "report0", OURS, 64), Wire(0, 1, "image1", IMAGE, 128),
            Wire(0, 1, "report1", OURS, 172), Wire(1, 2, "figure", IMAGE),
        ],
    ),
}  # fmt: skip


def rect(x: float, y: float, width: float, height: float, fill: str, radius: float = 6, stroke: str = "none") -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}" stroke="{stroke}"/>'


def text(x: float, y: float, content: str, size: float, fill: str, anchor: str = "middle", weight: int = 400) -> str:
    return (
        f'<text x="{x}" y="{y}" font-family="{FONT}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}">{escape(content)}</text>'
    )


def svg(width: int, height: int, *parts: str) -> str:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    ]
    return "\n".join([*lines, *parts, "</svg>"]) + "\n"


def wiring(boxes: list[Box], wires: list[Wire], own: str, names: dict[str, str]) -> str:
    """Boxes in rows and their wires; the node `own` stands out."""
    height = max(box.row for box in boxes) * ROW + BOX + 20
    parts = [rect(0, 0, WIDTH, height, "#202225", 8)]
    for wire in wires:
        crowded = any(other is not wire and abs(other.x - wire.x) < 50 for other in wires)
        parts += drawn_wire(wire, *((3, 9) if crowded else (6, 10)))
    for box in boxes:
        parts += drawn_box(box, names.get(box.name, box.name), box.name == own)
    return svg(WIDTH, height, *parts)


def drawn_wire(wire: Wire, gap: int, size: int) -> list[str]:
    """The line, a dot at each end, and the label `gap` pixels to the right of its lower end."""
    top, bottom = wire.top * ROW + BOX + 10, wire.bottom * ROW + 10
    parts = [f'<path d="M{wire.x} {top}V{bottom}" stroke="{wire.color}" stroke-width="2"/>']
    parts += [f'<circle cx="{wire.x}" cy="{y}" r="3.5" fill="{wire.color}"/>' for y in (top, bottom)]
    lines = wire.label.split("\n")
    first = bottom - (ROW - BOX) / 2 + 3.5 - 11 * (len(lines) - 1) / 2
    return parts + [text(wire.x + gap, first + 11 * i, line, size, "#b8bcc4", "start") for i, line in enumerate(lines)]


def drawn_box(box: Box, name: str, mine: bool) -> list[str]:
    """A node; its name shrinks to the box, and a Chinese sign is 1.75 times as wide as a letter."""
    left, right = box.sides
    letters = sum(1 if ord(char) < 0x2E80 else 1.75 for char in name)
    size = round(min(12, 1.75 * (right - left - 8) / letters), 1)
    weight = 600 if mine else 400
    return [
        rect(left, box.row * ROW + 10, right - left, BOX, "#2f5d8a" if mine else "#3a3d42", 6, "#5b6068"),
        text((left + right) / 2, box.row * ROW + BOX / 2 + 14, name, size, "#fff", weight=weight),
    ]


def mark(x: float, y: float, side: float) -> list[str]:
    """The sign of the pack: six steps of a run, of which some are computed and the others reused, in coarse levels."""
    unit = side / 100
    computed, reused = "#4fc3f7", "#35506b"
    bars = [
        (8, 78, computed),
        (23, 66, reused),
        (38, 66, reused),
        (53, 44, computed),
        (68, 32, reused),
        (83, 20, computed),
    ]
    parts = [rect(x, y, side, side, "#14202e", 18 * unit)]
    parts += [
        rect(
            round(x + (left - 0.5) * unit, 2),
            round(y + (90 - tall) * unit, 2),
            round(11 * unit, 2),
            round(tall * unit, 2),
            color,
            2 * unit,
        )
        for left, tall, color in bars
    ]
    return parts


def icon() -> str:
    return svg(400, 400, *mark(0, 0, 400))


def banner() -> str:
    """21:9."""
    return svg(
        1260, 540, rect(0, 0, 1260, 540, "#0d1620", 0), *mark(90, 120, 300),
        text(450, 235, "Q&C", 120, "#ffffff", "start", 700),
        text(453, 310, "Caching and quantization that work together", 36, "#9fc9ea", "start"),
        text(453, 365, "for the diffusion transformers of ComfyUI", 36, "#9fc9ea", "start"),
    )  # fmt: skip


def chinese() -> dict[str, str]:
    """Names of nodes in Chinese: stock nodes as ComfyUI's frontend has them, ours without the part in brackets."""
    stock = json.loads((ROOT / "docs" / "stock_nodes.zh.json").read_text(encoding="utf-8"))
    both = [
        json.loads((ROOT / "locales" / code / "nodeDefs.json").read_text(encoding="utf-8")) for code in ("en", "zh")
    ]
    ours = {
        both[0][key]["display_name"].split(" (")[0]: both[1][key]["display_name"].split(chr(0xFF08))[0]
        for key in both[0]
    }
    return {**stock, **ours}


def pictures() -> dict[Path, str]:
    """Everything that is drawn: where, and what."""
    names = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    drawn = {ROOT / "docs" / "icon.svg": icon(), ROOT / "docs" / "banner.svg": banner()}
    for node in names:
        boxes, wires = PICTURES[node]
        own = names[node]["display_name"].split(" (")[0]
        for file, translated in (("wiring.svg", {}), ("wiring.zh.svg", chinese())):
            drawn[ROOT / "web" / "docs" / node / file] = wiring(boxes, wires, own, translated)
    return drawn


def as_png(path: Path) -> None:
    """The registry shows PNG on every browser; drawn by Chromium, as the pictures of the templates are."""
    from playwright.sync_api import sync_playwright

    width, height = map(int, re.findall(r'(?:width|height)="(\d+)"', path.read_text(encoding="utf-8"))[:2])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(path.as_uri())
        page.screenshot(path=str(path.with_suffix(".png")), omit_background=True)
        browser.close()


def main() -> None:
    for path, content in pictures().items():
        path.write_text(content, encoding="utf-8")
        if path.parent == ROOT / "docs":
            as_png(path)


if __name__ == "__main__":
    main()
