"""File names of quantized models."""

from __future__ import annotations

import re
import time
from pathlib import PurePath


def file_prefix(patcher, format: str) -> str:
    """Folder, model, format and date, as ModelSave's filename_prefix."""
    return f"diffusion_models/{model_name(patcher)}_{format}_{time.strftime('%Y-%m-%d')}"


def model_name(patcher) -> str:
    """The name of the file that the model was loaded from; the network's where no file is known."""
    recipe = getattr(patcher, "cached_patcher_init", None)  # a loader, its arguments, and more
    given = recipe[1] if recipe else ()
    source = next((value for value in given if isinstance(value, (str, PurePath))), "")
    name = PurePath(str(source).replace("\\", "/")).stem or type(patcher.model.diffusion_model).__name__
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
