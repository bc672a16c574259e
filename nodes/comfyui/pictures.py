"""Pictures that nodes show while they run."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont


def error_bars(errors: dict[str, float], measure: str = "relative weight error") -> Image.Image:
    """The error of every layer so far."""
    width, height = 512, 256
    picture = Image.new("RGB", (width, height), (250, 250, 252))
    draw, highest = ImageDraw.Draw(picture), max(errors.values()) or 1.0
    for i, error in enumerate(errors.values()):
        left, right = width * i // len(errors), max(width * i // len(errors), width * (i + 1) // len(errors) - 2)
        draw.rectangle((left, height - round((height - 24) * error / highest), right, height), fill=(38, 110, 190))
    title = f"{measure} of {len(errors)} layers, largest {highest:.4f}"
    draw.text((8, 4), title, (32, 36, 44), ImageFont.load_default(14))
    return picture
