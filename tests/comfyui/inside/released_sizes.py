"""What ComfyUI detects of the benchmark's models in their released sizes, whose tensors need no memory here."""

from __future__ import annotations

import sys
from pathlib import Path

from host import Host, main

sys.path.append(str(Path(__file__).parents[3] / "benchmarks" / "comfyui"))
import real_models  # noqa: E402


def detected(host: Host, size: real_models.Size) -> dict:
    import torch
    from comfy.model_detection import model_config_from_unet

    tensors = {name: torch.empty(shape, device="meta") for name, shape in real_models.shapes(size).items()}
    found = model_config_from_unet(tensors, "")
    other = {key: found.unet_config.get(key) for key, value in size.unet.items() if found.unet_config.get(key) != value}
    return {"class": type(found).__name__, "other": other, "billions": sum(t.numel() for t in tensors.values()) / 1e9}


main({name: lambda host, size=size: detected(host, size) for name, size in real_models.SIZES.items()})
