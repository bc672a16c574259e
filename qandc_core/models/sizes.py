"""The size of images that a DiT was trained for."""

from __future__ import annotations

from .dit import DiTConfig

PIXELS = {3: 1, 4: 8}  # of an image, along each side of one value of the model's input


def unlike_size(config: DiTConfig, height: int, width: int) -> str:
    """A warning for inputs of another size than the model was trained for, and what to set instead; else ""."""
    trained, scale = config.input_size, PIXELS.get(config.in_channels, 1)
    if (height, width) == (trained, trained):
        return ""
    size, work = trained * scale, height * width / trained**2
    costs = f", which takes at least {work:.0f} times the work" if work >= 2 else ""
    # A node shows some 60 characters, so what to do comes first.
    return (
        f"Wrong size: this model is for {size} x {size}. Set Empty Latent Image to that; it was not trained for "
        f"{width * scale} x {height * scale}{costs}."
    )
