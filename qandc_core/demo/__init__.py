"""The built-in model: a small DiT trained on handwritten digits, the classifier that judges it, and their data."""
