"""The square pictures of the template browser, large enough to be read on a card of 276 pixels.

A template that runs here shows what it made. Of models whose files are not here no image is shown: their card says
which steps of the run compute, as Apply Cache itself plans them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from qandc_core.caching.policies import CachePolicy, Interval, Speedup
from tests.browser.templates import Node, Template

SIDE, MARGIN, GAP = 640, 36, 8
PAPER, INK, QUIET, COMPUTED, REUSED = "#14202e", "#ffffff", "#9fc9ea", "#4fc3f7", "#35506b"
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")), size)


def fitting(text: str, size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The largest font up to `size` in which the text fits the card."""
    while font(size, bold).getlength(text) > SIDE - 2 * MARGIN:
        size -= 1
    return font(size, bold)


class Card:
    """Lines and pictures from top to bottom; `top` is the place of the next one."""

    def __init__(self, title: str):
        self.image = Image.new("RGB", (SIDE, SIDE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.top = 84  # below the badge that the frontend lays over the corner
        self.line(title, 64, INK, bold=True)

    def line(self, text: str, size: int, color: str = QUIET, bold: bool = False) -> None:
        self.draw.text((MARGIN, self.top), text, color, fitting(text, size, bold))
        self.top += round(size * 1.35)

    def steps(self, computed: Sequence[bool]) -> None:
        """A bar for every step, bright where the model computes."""
        width = (SIDE - 2 * MARGIN) / len(computed)
        for i, bright in enumerate(computed):
            left, right = MARGIN + i * width, MARGIN + (i + 1) * width - min(GAP, width / 4)
            low = self.top if bright else self.top + 48
            self.draw.rounded_rectangle((left, low, right, self.top + 104), 4, COMPUTED if bright else REUSED)
        self.top += 120

    def bar(self, share: float, label: str, color: str) -> None:
        """A bar of this share of the card's width, with its label in it."""
        right = MARGIN + share * (SIDE - 2 * MARGIN)
        self.draw.rounded_rectangle((MARGIN, self.top, right, self.top + 76), 4, color)
        self.draw.text((MARGIN + 16, self.top + 18), label, INK if color == REUSED else PAPER, font(34))
        self.top += 90

    def images(self, pictures: Sequence[Image.Image]) -> None:
        """A row, as wide as the card."""
        side = (SIDE - 2 * MARGIN + GAP) // len(pictures) - GAP
        for i, picture in enumerate(pictures):
            scaled = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            self.image.paste(scaled, (MARGIN + i * (side + GAP), self.top))
        self.top += side + 14


def policy(cache: Node) -> CachePolicy:
    settings = cache["widgets"]
    if settings["policy"] == "interval":
        return Interval(interval=settings["policy.interval"], order=settings["order"])
    return Speedup(settings.get("policy.speedup", 2.0), order=1)


def planned(cache: Node, steps: int) -> list[bool]:
    plan = policy(cache).plan(steps, flow=True, noisy=False)
    return [plan.computes(step) for step in range(steps)]


def lengths(template: Template) -> list[int]:
    """Steps of every sampler that has an Apply Cache of its own."""
    settings = [node["widgets"] for node in template.nodes.values()]
    halves = [each for each in settings if "start_at_step" in each]
    if halves:
        return [min(each["end_at_step"], each["steps"]) - each["start_at_step"] for each in halves]
    return [next(each["steps"] for each in settings if "steps" in each)]


def plan_card(template: Template, title: str, says: str) -> Image.Image:
    """What Apply Cache does in this template, and to what Quantize turns the weights."""
    card = Card(title)
    card.line(says, 34)
    card.top += 24
    caches = [node for node in template.nodes.values() if node["type"] == "QandC_ApplyCache"]
    for cache, steps in zip(caches, lengths(template)):
        computed = planned(cache, steps)
        card.steps(computed)
        card.line(f"{sum(computed)} of {steps} steps computed", 38, INK)
    if caches:
        card.line("the others are " + ("extrapolated" if policy(caches[0]).order else "reused"), 34)
    for node in template.nodes.values():
        if node["type"] == "QandC_Quantize":
            bits = int(node["widgets"].get("format", "W8A8")[1])
            card.bar(1.0, "weights of 16 bits", REUSED)
            card.bar(bits / 16, f"of {bits} bits", COMPUTED)
    return card.image


def result_card(title: str, rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """What the template made: a caption and a row of images for every run."""
    card = Card(title)
    for caption, pictures in rows:
        card.line(caption, 34)
        card.images(pictures)
    return card.image
