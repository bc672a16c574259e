"""Pictures that nodes show while they run and when they are done."""

from __future__ import annotations

import json
from pathlib import Path

import folder_paths
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...qandc_core.evaluation.figure import wrapped
from ...qandc_core.quantization.formats import ALL
from ...qandc_core.quantization.report import QuantizationReport, percent

PAPER, INK = (250, 250, 252), (32, 36, 44)
BLUE, ORANGE, GRAY = (38, 110, 190), (214, 126, 40), (150, 150, 156)
PALETTE = (BLUE, (60, 150, 90), ORANGE, (150, 80, 170))
COLORS = {**{format.name: color for format, color in zip(ALL, PALETTE)}, "float": GRAY}


def error_bars(errors: dict[str, float]) -> Image.Image:
    """The relative weight error of every layer so far."""
    width, height = 512, 256
    picture = Image.new("RGB", (width, height), PAPER)
    draw, highest = ImageDraw.Draw(picture), max(errors.values()) or 1.0
    for i, error in enumerate(errors.values()):
        left, right = width * i // len(errors), max(width * i // len(errors), width * (i + 1) // len(errors) - 2)
        draw.rectangle((left, height - round((height - 24) * error / highest), right, height), fill=BLUE)
    title = f"relative weight error of {len(errors)} layers, largest {highest:.4f}"
    draw.text((8, 4), title, INK, ImageFont.load_default(14))
    return picture


def report_picture(report: QuantizationReport) -> Image.Image:
    """Picture of a quantization: the error of every layer in the color of its format, and what the bars are.

    The words that stand above it on the node are not repeated. A node is 270 pixels wide unless it was resized, which
    shows these letters at two thirds of their size.
    """
    width, bars, line, font = 400, 120, 26, ImageFont.load_default(20)
    caption = f"Error of each of the {len(report.layers)} layers, first to last; the highest bar is "
    lines = wrapped(f"{caption}{percent(report.worst.error)}", font, width - 16)
    counts = report.counts if len(report.counts) > 1 else {}
    legend = (len(counts) + 1) // 2  # two a line
    picture = Image.new("RGB", (width, bars + line * (len(lines) + legend) + 16), PAPER)
    draw, highest = ImageDraw.Draw(picture), report.worst.error or 1.0
    for i, layer in enumerate(report.layers):
        left, right = (8 + (width - 16) * j // len(report.layers) for j in (i, i + 1))
        top = bars - max(2, round((bars - 12) * layer.error / highest))
        draw.rectangle((left, top, max(left, right - 2), bars), fill=COLORS.get(layer.format, GRAY))
    for i, text in enumerate(lines):
        draw.text((8, bars + 8 + line * i), text, INK, font)
    for i, (name, count) in enumerate(counts.items()):
        left, top = 8 + width // 2 * (i % 2), bars + 8 + line * (len(lines) + i // 2)
        draw.rectangle((left, top + 6, left + 12, top + 18), fill=COLORS.get(name, GRAY))
        draw.text((left + 18, top), f"{count} {name}", INK, font)
    return picture


def to_image(figure: Image.Image) -> Tensor:
    """A picture as an IMAGE (1, H, W, 3)."""
    return torch.from_numpy(np.asarray(figure).astype(np.float32) / 255)[None]


def wanted_theme() -> str:
    """light where ComfyUI's user chose its light colours, else dark, which it begins with."""
    settings = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json")
    try:
        palette = json.loads(settings.read_text(encoding="utf-8")).get("Comfy.ColorPalette")
    except (OSError, ValueError, AttributeError):
        return "dark"
    return "light" if palette == "light" else "dark"
