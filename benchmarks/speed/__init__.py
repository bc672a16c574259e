"""Roofline of a DiT step: what the machine reaches, what a step asks of it, what it takes, in numbers and words."""
