"""One picture that compares runs: images side by side, what differs, and which steps were computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, LABEL_WIDTH, CAPTION = 12, 260, 22
INK, MUTED, PAPER = (32, 36, 44), (110, 116, 128), (250, 250, 252)
COMPUTED, REUSED = (38, 110, 190), (205, 216, 230)


@dataclass(frozen=True)
class FigureRow:
    """Images (N, 3, H, W) in [-1, 1] with a title, a line of numbers, and the step flags of their run."""

    title: str
    numbers: str
    images: Tensor
    computed: Sequence[bool] = field(default_factory=tuple)


def to_pil(images: Tensor, size: int) -> Image.Image:
    """A strip of images (N, 3, H, W) in [-1, 1], each `size` pixels wide; enlarged without smoothing."""
    x = images.float().clamp(-1, 1)
    if x.shape[-1] != size:
        x = F.interpolate(x, size=(size, size), mode="nearest" if x.shape[-1] < size else "area")
    strip = F.pad(x, (0, 4, 0, 0), value=1.0).permute(1, 2, 0, 3).flatten(2)[:, :, :-4]
    pixels = ((strip + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())


def timeline(computed: Sequence[bool], width: int, height: int = 8) -> Image.Image:
    """A bar of all steps: dark where computed, light where reused."""
    bar = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(bar)
    for i, flag in enumerate(computed):
        left, right = width * i // len(computed), width * (i + 1) // len(computed) - 2
        draw.rectangle((left, 0, max(left, right), height - 1), fill=COMPUTED if flag else REUSED)
    return bar


def difference(images: Tensor, reference: Tensor, gain: float) -> Tensor:
    """Absolute difference times `gain`, black where equal."""
    return ((images - reference).abs() * gain - 1).clamp(-1, 1)


def comparison_figure(rows: Sequence[FigureRow], title: str, size: int = 72, gain: float = 4.0) -> Image.Image:
    """Each row's images; for every row after the first, its difference from the first, enlarged `gain` times."""
    strip_width = len(rows[0].images) * (size + 4) - 4
    big, small = ImageFont.load_default(17), ImageFont.load_default(13)
    width = max(MARGIN * 3 + LABEL_WIDTH + strip_width, MARGIN * 2 + round(big.getlength(title)))
    row_heights = [size + 16 + MARGIN + (size if i else 0) + (4 if i else 0) for i in range(len(rows))]
    figure = Image.new("RGB", (width, MARGIN * 2 + CAPTION + sum(row_heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(figure)
    draw.text((MARGIN, MARGIN), title, INK, big)
    top, left = MARGIN * 2 + CAPTION, MARGIN * 2 + LABEL_WIDTH
    for i, (row, height) in enumerate(zip(rows, row_heights)):
        draw.text((MARGIN, top), row.title, INK, big)
        draw.multiline_text((MARGIN, top + 24), row.numbers, MUTED, small, spacing=4)
        figure.paste(to_pil(row.images, size), (left, top))
        if i:
            figure.paste(to_pil(difference(row.images, rows[0].images, gain), size), (left, top + size + 4))
            draw.text((MARGIN, top + 2 * size - 14), f"difference x {gain:g}", MUTED, small)
        if row.computed:
            figure.paste(timeline(row.computed, strip_width), (left, top + height - MARGIN - 10))
        top += height
    return figure
