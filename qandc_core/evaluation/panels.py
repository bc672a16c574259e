"""The parts of a comparison's picture: curves over the steps, the table, lines of text, images at full size."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..sampling.report import RunReport
from .figure import LIGHT, MARGIN, Color, Theme, difference, to_pil, wrapped

PANEL = (420, 170)
LEAST_SIDE = 180  # pixels across of an image that a name fits above


def panels(given: Sequence[RunReport | None], theme: Theme = LIGHT) -> Image.Image | None:
    """Milliseconds of every step, and the factors K_t where variance was compensated."""
    reports = [(i, report) for i, report in enumerate(given) if report is not None]
    times = {i: [1000 * s for s in r.seconds] for i, r in reports if len(r.seconds) > 1}
    factors = {i: [sum(k) / len(k) for k in r.factors] for i, r in reports if len(r.factors) > 1}
    drawn = [curves("ms of every step", times, theme), curves("K_t of every step, mean over channels", factors, theme)]
    found = [panel for panel in drawn if panel is not None]
    if not found:
        return None
    strip = Image.new("RGB", (MARGIN + len(found) * (PANEL[0] + MARGIN), PANEL[1]), theme.paper)
    for i, panel in enumerate(found):
        strip.paste(panel, (MARGIN + i * (PANEL[0] + MARGIN), 0))
    return strip


def curves(title: str, series: dict[int, list[float]], theme: Theme) -> Image.Image | None:
    """Lines over the steps, each in the colour of its run's place in the table."""
    if not series:
        return None
    panel = Image.new("RGB", PANEL, theme.paper)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(12)
    left, top, right, bottom = 54, 24, PANEL[0] - 8, PANEL[1] - 20
    low, high = min(map(min, series.values())), max(map(max, series.values()))
    span = (high - low) or 1.0
    draw.text((left, 4), title, theme.ink, font)
    draw.rectangle((left, top, right, bottom), outline=theme.muted)
    draw.text((2, top - 6), f"{high:.3g}", theme.muted, font)
    draw.text((2, bottom - 8), f"{low:.3g}", theme.muted, font)
    for i, values in series.items():
        points = [
            (left + (right - left) * j / (len(values) - 1), bottom - (bottom - top) * (v - low) / span)
            for j, v in enumerate(values)
        ]
        draw.line(points, fill=color_of(i, theme), width=2)
    return panel


def color_of(i: int, theme: Theme) -> Color:
    return theme.series[i % len(theme.series)]


def draw_table(cells: Sequence[Sequence[str]], theme: Theme = LIGHT) -> Image.Image:
    """Lines of cells, the first of them the head; each other has the colour of its run in front."""
    font = ImageFont.load_default(13)
    widths = [max(round(font.getlength(line[c])) for line in cells) + 22 for c in range(len(cells[0]))]
    table = Image.new("RGB", (MARGIN * 2 + 14 + sum(widths), 22 * len(cells) + MARGIN * 2), theme.paper)
    draw = ImageDraw.Draw(table)
    for r, line in enumerate(cells):
        x, y = MARGIN + 14, MARGIN + 22 * r
        if r:
            draw.rectangle((MARGIN, y + 3, MARGIN + 8, y + 11), fill=color_of(r - 1, theme))
        for text, width in zip(line, widths):
            draw.text((x, y), text, theme.ink if r else theme.muted, font)
            x += width
    return table


def draw_lines(texts: Sequence[str], width: int, theme: Theme = LIGHT) -> Image.Image | None:
    """The texts, broken into lines that fit the width."""
    font = ImageFont.load_default(13)
    lines = [line for text in texts for line in wrapped(text, font, width - 2 * MARGIN - 14)]
    if not lines:
        return None
    panel = Image.new("RGB", (width, 20 * len(lines) + MARGIN), theme.paper)
    draw = ImageDraw.Draw(panel)
    for i, line in enumerate(lines):
        draw.text((MARGIN + 14, 20 * i), line, theme.muted, font)
    return panel


def stack(parts: Sequence[Image.Image], theme: Theme = LIGHT) -> Image.Image:
    """One below the other."""
    figure = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), theme.paper)
    top = 0
    for part in parts:
        figure.paste(part, (0, top))
        top += part.height
    return figure


def full_size(labels: Sequence[str], images: Sequence[Tensor], gain: float, theme: Theme = LIGHT) -> Image.Image:
    """Images (3, H, W) in [-1, 1] beside each other, pixel for pixel, each under its name; below those that have the
    first one's size, their difference from it, enlarged `gain` times. Images narrower than a name are enlarged by a
    whole number.
    """
    font, gap = ImageFont.load_default(17), MARGIN
    times = max(1, *(-(-LEAST_SIDE // image.shape[-1]) for image in images))
    sizes = [(times * image.shape[-2], times * image.shape[-1]) for image in images]
    names = [wrapped(label, font, width) for label, (_, width) in zip(labels, sizes, strict=True)]
    head = gap + 22 * max(map(len, names))
    compared = [image.shape == images[0].shape and i > 0 for i, image in enumerate(images)]
    tallest = max(height for height, _ in sizes)
    below = gap + sizes[0][0] if any(compared) else 0
    sheet = Image.new("RGB", (gap + sum(width + gap for _, width in sizes), head + tallest + below + gap), theme.paper)
    draw, left = ImageDraw.Draw(sheet), gap
    for image, (_, width), name, alike in zip(images, sizes, names, compared):
        draw.multiline_text((left, gap // 2), "\n".join(name), theme.ink, font, spacing=4)
        sheet.paste(to_pil(image[None].cpu(), width), (left, head))
        if alike:
            shown = difference(image[None].cpu(), images[0][None].cpu(), gain)
            sheet.paste(to_pil(shown, width), (left, head + tallest + gap))
        left += width + gap
    if below:
        draw.text((gap, head + tallest + gap), f"difference x {gain:g}", theme.muted, font)
    return sheet
