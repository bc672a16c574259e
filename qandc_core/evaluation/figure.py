"""One picture that compares runs: images side by side, what differs, and which steps were computed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, LABEL_WIDTH, CAPTION = 12, 260, 22
LEAST_WIDTH = 640  # to which a title is broken into lines where the images are narrower
LEAST_HEIGHT = 60  # of a row of wide images, so that its numbers fit
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; `series` are those of the runs, in their order."""

    paper: Color
    ink: Color
    muted: Color
    warning: Color
    computed: Color
    reused: Color
    series: tuple[Color, ...]


LIGHT = Theme(
    paper=(250, 250, 252),
    ink=(32, 36, 44),
    muted=(100, 106, 118),
    warning=(176, 42, 30),
    computed=(38, 110, 190),
    reused=(205, 216, 230),
    series=((38, 110, 190), (214, 96, 40), (44, 140, 80), (150, 70, 160), (180, 150, 20), (90, 100, 110)),
)
DARK = Theme(
    paper=(24, 24, 28),
    ink=(236, 238, 242),
    muted=(168, 174, 186),
    warning=(255, 138, 122),
    computed=(92, 164, 240),
    reused=(58, 66, 78),
    series=((92, 164, 240), (244, 146, 92), (96, 200, 136), (206, 136, 216), (226, 200, 84), (168, 178, 190)),
)
THEMES = {"light": LIGHT, "dark": DARK}


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


def to_pil(images: Tensor, size: int, theme: Theme | None = None) -> Image.Image:
    """A strip of images (N, 3, H, W) in [-1, 1], each `size` pixels wide; enlarged without smoothing.

    Between them it is white, or the paper of the theme.
    """
    paper = images.new_tensor((255, 255, 255) if theme is None else theme.paper, dtype=torch.float32) / 127.5 - 1
    shown = resized(images, size)
    gap = paper[None, :, None, None].expand(len(shown), 3, shown.shape[-2], 4)
    strip = torch.cat([shown, gap], -1).permute(1, 2, 0, 3).flatten(2)[:, :, :-4]
    pixels = ((strip + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())


def timeline(computed: Sequence[bool], width: int, height: int = 8, theme: Theme = LIGHT) -> Image.Image:
    """A bar of all steps: strong where computed, faint where reused."""
    bar = Image.new("RGB", (width, height), theme.paper)
    draw = ImageDraw.Draw(bar)
    for i, flag in enumerate(computed):
        left, right = width * i // len(computed), width * (i + 1) // len(computed) - 2
        draw.rectangle((left, 0, max(left, right), height - 1), fill=theme.computed if flag else theme.reused)
    return bar


def difference(images: Tensor, reference: Tensor, gain: float) -> Tensor:
    """Absolute difference times `gain`, black where equal."""
    return ((images - reference).abs() * gain - 1).clamp(-1, 1)


def wrapped(text: str, font, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words and, where one is too long, after its dots."""
    lines = [""]
    for word in filter(None, text.split(" ")):
        for number, part in enumerate(re.findall(r"[^.]+\.?|\.", word) if font.getlength(word) > width else [word]):
            longer = lines[-1] + (" " if number == 0 and lines[-1] else "") + part
            if lines[-1] and font.getlength(longer) > width:
                lines.append(part)
            else:
                lines[-1] = longer
    return lines


def comparison_figure(
    rows: Sequence[FigureRow],
    title: str,
    size: int = 72,
    gain: float = 4.0,
    warnings: Sequence[str] = (),
    theme: Theme = LIGHT,
) -> Image.Image:
    """Each row's images; for every row after the first, its difference from the first, enlarged `gain` times.

    `title` may have several lines, each broken where it is too long; `warnings` stand below, in a colour of their own.
    """
    strip_width = max(len(row.images) for row in rows) * (size + 4) - 4
    big, small = ImageFont.load_default(17), ImageFont.load_default(13)
    wide = max(MARGIN + LABEL_WIDTH + strip_width, LEAST_WIDTH)
    heads = [part for line in title.split("\n") for part in wrapped(line, big, wide)]
    longest = max(big.getlength(line) for line in heads)
    width = max(MARGIN * 3 + LABEL_WIDTH + strip_width, MARGIN * 2 + round(longest))
    told = [line for text in warnings for line in wrapped(text, small, width - 2 * MARGIN)]
    differences = [differences_of(row, rows[0], gain) for row in rows]
    heights = [max(row.height(size), min(size, LEAST_HEIGHT)) for row in rows]
    row_heights = [
        height + 16 + MARGIN + (0 if shown is None else row.height(size) + 4)
        for row, height, shown in zip(rows, heights, differences)
    ]
    under = MARGIN + CAPTION * len(heads)
    top, left = MARGIN + under + 18 * len(told), MARGIN * 2 + LABEL_WIDTH
    figure = Image.new("RGB", (width, top + sum(row_heights) + MARGIN), theme.paper)
    draw = ImageDraw.Draw(figure)
    for i, line in enumerate(heads):
        draw.text((MARGIN, MARGIN + CAPTION * i), line, theme.ink, big)
    draw.multiline_text((MARGIN, under + 4), "\n".join(told), theme.warning, small, spacing=4)
    for row, shown, picture, height in zip(rows, differences, heights, row_heights):
        name = wrapped(row.title, big, LABEL_WIDTH - MARGIN)
        draw.multiline_text((MARGIN, top), "\n".join(name), theme.ink, big, spacing=2)
        draw.multiline_text((MARGIN, top + 4 + 20 * len(name)), row.numbers, theme.muted, small, spacing=4)
        figure.paste(to_pil(row.images, size, theme), (left, top))
        if shown is not None:
            figure.paste(to_pil(shown, size, theme), (left, top + picture + 4))
            draw.text((MARGIN, top + picture + row.height(size) - 14), f"difference x {gain:g}", theme.muted, small)
        if row.computed:
            figure.paste(timeline(row.computed, strip_width, theme=theme), (left, top + height - MARGIN - 10))
        top += height
    return figure


def differences_of(row: FigureRow, first: FigureRow, gain: float) -> Tensor | None:
    if row.differences is not None or row is first or not row.compared:
        return row.differences
    return difference(row.images, first.images, gain)
