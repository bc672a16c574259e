"""DiT-XL/2 of random weights, at 256 and 512 pixels."""

from __future__ import annotations

import torch
from host import Host, main
from models import load, run


def random_checkpoint(host: Host, input_size: int) -> str:
    """Every tensor of the published layout, in bfloat16 to halve the file."""
    import safetensors.torch

    dit = host.module("qandc_core.models.dit")
    path = host.base / f"xl_{input_size}.safetensors"
    shapes = dit.DiT(dit.DiTConfig(input_size=input_size), device="meta").state_dict()
    tensors = {key: (0.02 * torch.randn(tensor.shape)).bfloat16() for key, tensor in shapes.items()}
    safetensors.torch.save_file(tensors, path)
    return str(path)


def samples(host: Host, side: int) -> dict[str, object]:
    import comfy.model_management

    path = random_checkpoint(host, side // 8)
    patcher = load(host, path)
    out = run(host, patcher, (207,), side, steps=2)
    comfy.model_management.unload_all_models()
    parameters = sum(p.numel() for p in patcher.model.diffusion_model.parameters())
    return {"shape": list(out.shape), "finite": bool(out.isfinite().all()), "millions": parameters // 10**6}


if __name__ == "__main__":
    main({"256": lambda host: samples(host, 256), "512": lambda host: samples(host, 512)})
