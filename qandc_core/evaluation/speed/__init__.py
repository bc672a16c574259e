"""What a machine can do, what a DiT step asks of it, where the time of a step goes, and all that in words."""
