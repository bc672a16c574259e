"""The size of images that a DiT was trained for."""

from __future__ import annotations

from .dit import DiTConfig

PIXELS = {3: 1, 4: 8}  # of an image, along each side of one value of the model's input


def unlike_size(config: DiTConfig, height: int, width: int) -> str:
    """A warning for inputs of another size than the model was trained for, and what to set instead; else ""."""
    trained, scale = config.input_size, PIXELS.get(config.in_channels, 1)
    if (height, width) == (trained, trained):
        return ""
    work = height * width / trained**2
    costs = f" and at least {work:.0f} times the work" if work >= 2 else ""
    return (
        f"this model was trained for images of {trained * scale} x {trained * scale}, and {width * scale} x "
        f"{height * scale} are sampled: expect poor images{costs}. Set the width and height of Empty Latent Image to "
        f"{trained * scale}."
    )
