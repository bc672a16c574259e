"""One picture that compares runs: images side by side, what differs, and which steps were computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, LABEL_WIDTH, CAPTION = 12, 260, 22
INK, MUTED, PAPER, WARNING = (32, 36, 44), (110, 116, 128), (250, 250, 252), (176, 42, 30)
LEAST_HEIGHT = 60  # of a row of wide images, so that its numbers fit
COMPUTED, REUSED = (38, 110, 190), (205, 216, 230)


@dataclass(frozen=True)
class FigureRow:
    """Images (N, 3, H, W) in [-1, 1] with a title, a line of numbers, and the step flags of their run.

    `differences` (N, 3, H, W) are drawn below the images; where None, they are computed from the first row's images,
    unless the row is not `compared`.
    """

    title: str
    numbers: str
    images: Tensor
    computed: Sequence[bool] = field(default_factory=tuple)
    differences: Tensor | None = None
    compared: bool = True

    def height(self, size: int) -> int:
        return height_of(self.images, size)


def height_of(images: Tensor, width: int) -> int:
    """Height of a picture of images (..., H, W) that is `width` pixels wide."""
    return max(1, round(width * images.shape[-2] / images.shape[-1]))


def resized(images: Tensor, width: int) -> Tensor:
    """Images (N, 3, H, W) as float in [-1, 1], `width` pixels wide; enlarged without smoothing."""
    x, shape = images.float().clamp(-1, 1), (height_of(images, width), width)
    if x.shape[-2:] == shape:
        return x
    return F.interpolate(x, size=shape, mode="nearest" if x.shape[-1] < width else "area")


def to_pil(images: Tensor, size: int) -> Image.Image:
    """A strip of images (N, 3, H, W) in [-1, 1], each `size` pixels wide; enlarged without smoothing."""
    strip = F.pad(resized(images, size), (0, 4, 0, 0), value=1.0).permute(1, 2, 0, 3).flatten(2)[:, :, :-4]
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


def wrapped(text: str, font, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def comparison_figure(
    rows: Sequence[FigureRow], title: str, size: int = 72, gain: float = 4.0, warnings: Sequence[str] = ()
) -> Image.Image:
    """Each row's images; for every row after the first, its difference from the first, enlarged `gain` times.

    `warnings` stand below the title, in a colour of their own.
    """
    strip_width = max(len(row.images) for row in rows) * (size + 4) - 4
    big, small = ImageFont.load_default(17), ImageFont.load_default(13)
    width = max(MARGIN * 3 + LABEL_WIDTH + strip_width, MARGIN * 2 + round(big.getlength(title)))
    told = [line for text in warnings for line in wrapped(text, small, width - 2 * MARGIN)]
    differences = [differences_of(row, rows[0], gain) for row in rows]
    heights = [max(row.height(size), min(size, LEAST_HEIGHT)) for row in rows]
    row_heights = [
        height + 16 + MARGIN + (0 if shown is None else row.height(size) + 4)
        for row, height, shown in zip(rows, heights, differences)
    ]
    top, left = MARGIN * 2 + CAPTION + 18 * len(told), MARGIN * 2 + LABEL_WIDTH
    figure = Image.new("RGB", (width, top + sum(row_heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(figure)
    draw.text((MARGIN, MARGIN), title, INK, big)
    draw.multiline_text((MARGIN, MARGIN + CAPTION + 4), "\n".join(told), WARNING, small, spacing=4)
    for row, shown, picture, height in zip(rows, differences, heights, row_heights):
        name = wrapped(row.title, big, LABEL_WIDTH - MARGIN)
        draw.multiline_text((MARGIN, top), "\n".join(name), INK, big, spacing=2)
        draw.multiline_text((MARGIN, top + 4 + 20 * len(name)), row.numbers, MUTED, small, spacing=4)
        figure.paste(to_pil(row.images, size), (left, top))
        if shown is not None:
            figure.paste(to_pil(shown, size), (left, top + picture + 4))
            draw.text((MARGIN, top + picture + row.height(size) - 14), f"difference x {gain:g}", MUTED, small)
        if row.computed:
            figure.paste(timeline(row.computed, strip_width), (left, top + height - MARGIN - 10))
        top += height
    return figure


def differences_of(row: FigureRow, first: FigureRow, gain: float) -> Tensor | None:
    if row.differences is not None or row is first or not row.compared:
        return row.differences
    return difference(row.images, first.images, gain)
