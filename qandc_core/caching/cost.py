"""The cost of a reused step relative to a computed one, counted on the network so that no plan depends on a clock.

Nearly all time of a transformer goes into matmuls over its tokens, and a matmul's time grows with its weight. So a step
that reuses the blocks costs about the share of the weights that lie outside them. Softmax attention has no weight and
lies inside: the share is too high rather than too low, and a promised speedup is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

PER_IMAGE = ("adaLN", "t_embedder", "y_embedder", "norm")  # run on one row of an image, not on each of its tokens


def reuse_cost(network: nn.Module, cached: Iterable[nn.Module]) -> float:
    """Share of the matmul weights outside the `cached` modules, 0..1; 1 for a network without matmuls."""
    inside = {id(module) for owner in cached for module in owner.modules()}
    total = kept = 0
    for name, module in network.named_modules():
        weight = 0 if any(part in name for part in PER_IMAGE) else matmul_weight(module)
        total += weight
        kept += weight * (id(module) in inside)
    return (total - kept) / total if total else 1.0


def matmul_weight(layer: Any) -> int:
    """Multiplications for one token, whatever form the weight is stored in."""
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return layer.in_features * layer.out_features
    weight = getattr(layer, "weight", None)
    return weight.numel() if hasattr(layer, "kernel_size") and isinstance(weight, Tensor) else 0
