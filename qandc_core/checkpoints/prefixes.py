"""The DiT within a file that holds it under a prefix, such as a pipeline's or a training checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection

from torch import Tensor

from ..models.layouts import OUTER_MODULES

# Keys whose place in a file shows under which prefix a DiT lies. None of them is quantized in any of our formats.
ANCHORS = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", OUTER_MODULES["x_embedder.proj"] + ".weight")
EMA = re.compile(r"(^|[._-])ema([._-]|\d|$)", re.IGNORECASE)
log = logging.getLogger(__name__)


def strip_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The DiT alone, if the file keeps it under a prefix such as model.diffusion_model. or _orig_mod.

    Of several in one file it is the moving average (EMA) where there is one, else the one with the shortest prefix.
    """
    prefixes = dit_prefixes(tensors)
    if not prefixes:
        return tensors
    averages = [prefix for prefix in prefixes if EMA.search(prefix)]
    chosen = averages[0] if averages else min(prefixes, key=len)
    others = tuple(prefix for prefix in prefixes if prefix.startswith(chosen) and prefix != chosen)
    if len(averages) > 1:
        log.warning("The file holds %d moving averages; using %s.", len(averages), chosen.rstrip("."))
    return {
        key.removeprefix(chosen): value
        for key, value in tensors.items()
        if key.startswith(chosen) and not (others and key.startswith(others))
    }


def dit_prefixes(keys: Collection[str]) -> list[str]:
    """Prefixes under which a file holds a DiT, each ending with a dot or empty, in the order of the file."""
    found = (
        key.removesuffix(anchor) for key in keys for anchor in ANCHORS if key == anchor or key.endswith(f".{anchor}")
    )
    return list(dict.fromkeys(found))
