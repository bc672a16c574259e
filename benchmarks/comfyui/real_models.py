"""Models of ComfyUI's own classes in their released sizes, with random weights that are made where the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch


@dataclass(frozen=True)
class Size:
    """`config` names a class of comfy.supported_models, `unet` what its detection finds in the released file. `context`
    and tensors among `conds` are shapes of what text encoders give.
    """

    title: str
    config: str
    unet: dict[str, Any]
    latent: tuple[int, ...]
    context: tuple[int, ...]
    conds: dict[str, Any] = field(default_factory=dict)


FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip
Z_IMAGE = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_layers": 30,
    "qk_norm": True, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 1536, "out_dim": 16, "num_heads": 12, "ffn_dim": 8960,
    "num_layers": 30, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16,
}  # fmt: skip
SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "adm_in_channels": 2816,
    "num_classes": "sequential", "use_spatial_transformer": True, "use_linear_in_transformer": True, "legacy": False,
    "use_temporal_attention": False,
}  # fmt: skip
SIZES = {
    "flux-dev": Size(
        "Flux.1 dev, 1024 x 1024", "Flux", FLUX, (1, 16, 128, 128), (1, 256, 4096),
        {"pooled_output": (1, 768), "guidance": 3.5},
    ),
    "z-image": Size("Z-Image, 1024 x 1024", "ZImage", Z_IMAGE, (1, 16, 128, 128), (1, 128, 2560)),
    "sdxl": Size(
        "SDXL, 1024 x 1024", "SDXL", SDXL, (1, 4, 128, 128), (1, 77, 2048), {"pooled_output": (1, 1280)},
    ),
    "wan-1.3b": Size("Wan 2.1 1.3B, 832 x 480, 33 frames", "WAN21_T2V", WAN, (1, 16, 9, 60, 104), (1, 512, 4096)),
}  # fmt: skip


def load(size: Size, dtype: torch.dtype) -> Any:
    """As Load Diffusion Model loads a file of bfloat16; float8_e4m3fn is its choice fp8_e4m3fn_fast."""
    import comfy.memory_management
    import comfy.sd

    fast = {"dtype": dtype, "fp8_optimizations": True} if dtype.itemsize == 1 else {}
    dynamic = comfy.memory_management.aimdo_enabled  # then ComfyUI takes the tensors as they are, a file's on the host
    tensors = {name: tensor.to("cpu" if dynamic else None, dtype) for name, tensor in random_weights(size)}
    patcher = comfy.sd.load_diffusion_model_state_dict(tensors, model_options=fast)
    found = type(patcher.model.model_config).__name__
    if found != size.config:
        raise RuntimeError(f"ComfyUI took the weights of {size.title} for those of {found}, expected {size.config}.")
    return patcher


def shapes(size: Size) -> dict[str, torch.Size]:
    """Of every tensor of a file."""
    import comfy.memory_management
    import comfy.supported_models

    config = getattr(comfy.supported_models, size.config)(dict(size.unet))
    config.unet_config.update(size.unet)
    config.set_inference_dtype(torch.bfloat16, None)
    with patch.object(comfy.memory_management, "aimdo_enabled", False):  # else layers wait for a file's weights
        model = config.get_model({}, "", device=torch.device("meta"))
    return {name: tensor.shape for name, tensor in model.diffusion_model.state_dict().items()}


def random_weights(size: Size) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a file, in bfloat16: scaled by their inputs, so that the model neither fades out nor overflows,
    and gains around 1.
    """
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    generator = torch.Generator(device).manual_seed(5)
    for name, shape in shapes(size).items():
        gain = len(shape) == 1 and not name.endswith("bias")
        scale = 0.02 if len(shape) < 2 else shape[1:].numel() ** -0.5
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        yield name, values.mul_(scale).add_(gain)


def conditioning(size: Size, seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)

    def value(given: Any) -> Any:
        return torch.randn(given, generator=generator) if isinstance(given, tuple) else given

    return [[value(size.context), {key: value(given) for key, given in size.conds.items()}]]
