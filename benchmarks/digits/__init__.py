"""The built-in model of earlier versions, a small DiT that writes digits: some results were measured on it."""

from pathlib import Path

DIGITS = Path(__file__).parent / "digits_dit.safetensors"
