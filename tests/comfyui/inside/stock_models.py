"""Tiny random checkpoints of ComfyUI's model families that its own loader recognizes."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import families
import family_configs as unets
import torch
from family_list import IMAGE, MASK, VIDEO, Family

STEPS, CFG, SEED = 3, 2.0, 11
TEXT, TOKENS = 64, 7
POOLED = {"pooled_output": (1, 768)}  # HunyuanVideo's detection fixes the width


@dataclass(frozen=True)
class StockModel:
    """One family. `family.unet` is what detection has to find in the checkpoint.

    Where detection fixes a width of thousands, `narrow` replaces sizes that the `network` class is given, and
    `full_width` holds shapes that detection is shown instead of the checkpoint's.
    """

    family: Family
    network: str = ""
    narrow: dict[str, Any] = field(default_factory=dict)
    full_width: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @contextmanager
    def sizes(self) -> Iterator[None]:
        """Within it ComfyUI builds and detects the model in these sizes."""
        import comfy.model_detection as detection

        if not self.network:
            yield
            return
        network, detect = pkgutil.resolve_name(self.network), detection.detect_unet_config
        built = narrowed(network.__init__, self.narrow)
        shown = partial(detect_at_full_width, detect, self.full_width)
        with patch.object(network, "__init__", built), patch.object(detection, "detect_unet_config", shown):
            yield


def narrowed(build: Callable, sizes: dict[str, Any]) -> Callable:
    def __init__(self, *args, **config):
        build(self, *args, **{**config, **sizes})

    return __init__


def detect_at_full_width(
    detect: Callable, full_width: dict[str, tuple[int, ...]], state: dict, prefix: str, **metadata
):
    """ComfyUI's detection, which sees tensors of other shapes under some of the names."""
    kept = {prefix + name: state[prefix + name] for name in full_width if prefix + name in state}
    try:
        for name in kept:
            state[name] = torch.empty(full_width[name.removeprefix(prefix)], device="meta")
        return detect(state, prefix, **metadata)
    finally:
        state.update(kept)


def flux(**changes) -> dict:
    return {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": TEXT,
        "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
        "txt_ids_dims": [], **changes,
    }  # fmt: skip


def flux2() -> dict:
    return flux(
        image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, mlp_ratio=3.0, theta=2000,
        axes_dim=[32] * 4, patch_size=1, qkv_bias=False, global_modulation=True, mlp_silu_act=True, ops_bias=False,
        txt_ids_dims=[3], default_ref_method="index", ref_index_scale=10.0,
    )  # fmt: skip


def chroma() -> dict:
    channels = {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}
    config = flux(image_model="chroma", vec_in_dim=None, **channels)
    del config["guidance_embed"]
    return config


def sd35() -> dict:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 128}}
    return {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None, "adm_in_channels": 32,
        "context_embedder_config": embedder, "num_patches": 64, "pos_embed_max_size": 8, "qk_norm": "rms",
        "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [0],
    }  # fmt: skip


def wan() -> dict:
    return {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 128, "out_dim": 16, "num_heads": 1, "ffn_dim": 256,
        "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True,
        "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16,
    }  # fmt: skip


def lumina(**changes) -> dict:
    return {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 2304, "cap_feat_dim": TEXT, "n_layers": 2,
        "qk_norm": True, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512],
        "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0, **changes,
    }  # fmt: skip


def z_image() -> dict:
    return lumina(
        dim=3840, n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0,
        ffn_dim_multiplier=8.0 / 3.0, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
    )  # fmt: skip


def sdxl() -> dict:
    return unets.unet(
        model_channels=320, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4], transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], transformer_depth_middle=10, context_dim=2048,
        use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=2816,
    )  # fmt: skip


# Detection reads the width of every residual block of the way down, and of the first text projection.
SDXL_WIDTHS = {
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    **{
        f"input_blocks.{block}.0.out_layers.3.weight": (width, width, 3, 3)
        for block, width in {1: 320, 2: 320, 4: 640, 5: 640, 7: 1280, 8: 1280}.items()
    },
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
}


def hunyuan_video() -> dict:
    return unets.hunyuan_video(
        vec_in_dim=768, axes_dim=[16, 56, 56], context_in_dim=TEXT, hidden_size=128, mlp_ratio=4.0, num_heads=1
    )


HIDREAM = {
    key: value
    for key, value in unets.hidream().items()
    if key not in ("image_model", "in_channels", "out_channels", "patch_size")
}
CONTEXT = (1, TOKENS, TEXT)
STOCK: dict[str, StockModel] = {
    "Flux": StockModel(Family("Flux", flux(), IMAGE, CONTEXT, {"pooled_output": (1, 32), "guidance": 3.5})),
    "SD 3.5": StockModel(Family("SD3", sd35(), IMAGE, CONTEXT, {"pooled_output": (1, 32)})),
    "Wan 2.1": StockModel(Family("WAN21_T2V", wan(), VIDEO, (1, TOKENS, 4096))),
    "Qwen-Image": StockModel(
        Family(
            "QwenImage", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2}, (1, 16, 1, 8, 8), CONTEXT
        ),
        "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
        {"num_attention_heads": 1, "joint_attention_dim": TEXT},
    ),
    "Lumina 2": StockModel(
        Family("Lumina2", lumina(), IMAGE, CONTEXT),
        "comfy.ldm.lumina.model.NextDiT",
        {"dim": 192, "n_heads": 2, "n_kv_heads": 1, "n_refiner_layers": 1},
        {"cap_embedder.1.weight": (2304, TEXT)},
    ),
    "Z-Image": StockModel(
        Family("ZImage", z_image(), IMAGE, CONTEXT),
        "comfy.ldm.lumina.model.NextDiT",
        {"dim": 256, "n_heads": 2, "n_kv_heads": 2, "n_refiner_layers": 1},
        {"cap_embedder.1.weight": (3840, TEXT)},
    ),
    "LTXV": StockModel(
        Family(
            "LTXV", {"image_model": "ltxv", "num_layers": 2, "attention_head_dim": 8, "cross_attention_dim": 256},
            (1, 128, 3, 4, 4), (1, TOKENS, 4096), {"attention_mask": MASK},
        )
    ),
    "HunyuanVideo": StockModel(Family("HunyuanVideo", hunyuan_video(), VIDEO, CONTEXT, {**POOLED, "guidance": 6.0})),
    "Chroma": StockModel(
        Family("Chroma", chroma(), IMAGE, CONTEXT),
        "comfy.ldm.chroma.model.Chroma",
        {"out_dim": 128, "hidden_dim": 64, "n_layers": 1},
    ),
    "Flux 2": StockModel(Family("Flux2", flux2(), (1, 128, 4, 4), CONTEXT, {"guidance": 3.5})),
    "HiDream-I1": StockModel(
        Family(
            "HiDream", {"image_model": "hidream", "in_channels": 16, "out_channels": 16, "patch_size": 2}, IMAGE,
            (1, unets.TOKENS, unets.TEXT),
            {"pooled_output": (1, 40), "conditioning_llama3": (1, 2, unets.TOKENS, unets.TEXT)},
        ),
        "comfy.ldm.hidream.model.HiDreamImageTransformer2DModel",
        HIDREAM,
    ),
    "AuraFlow": StockModel(
        Family(
            "AuraFlow", {"max_seq": 64, "cond_seq_dim": 2048, "n_double_layers": 2, "n_layers": 4}, (1, 4, 8, 8),
            (1, TOKENS, 2048),
        ),
        "comfy.ldm.aura.mmdit.MMDiT",
        {"dim": 128, "n_heads": 2, "global_conddim": 128},
    ),
    "PixArt sigma": StockModel(
        Family(
            "PixArtSigma", {"image_model": "pixart_sigma", "micro_condition": False, "depth": 2}, (1, 4, 36, 36),
            CONTEXT,
        ),
        "comfy.ldm.pixart.pixartms.PixArtMS",
        {"hidden_size": 96, "num_heads": 2, "caption_channels": TEXT, "model_max_length": TOKENS, "input_size": 8,
         "pe_interpolation": 1},
    ),
}  # fmt: skip
# What templates are run on. SDXL is not among the quantized ones: it has 70 blocks in any size.
SAMPLED: dict[str, StockModel] = {
    **STOCK,
    "SDXL": StockModel(
        Family("SDXL", sdxl(), (1, 4, 16, 16), CONTEXT, {"pooled_output": (1, 1280)}),
        "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel",
        {"model_channels": 32, "context_dim": TEXT},
        SDXL_WIDTHS,
    ),
}


def checkpoint(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a random model under the names that a file of its network has, bfloat16."""
    model = SAMPLED[name]
    with model.sizes():
        network = families.build(model.family).model.diffusion_model
    return {key: value.to(torch.bfloat16).contiguous() for key, value in network.state_dict().items()}


def write(name: str, folder: Path) -> str:
    """Path of the checkpoint as a file."""
    import safetensors.torch

    path = folder / f"{name}.safetensors"
    if not path.exists():
        safetensors.torch.save_file(checkpoint(name), path)
    return str(path)


def configured(patcher, model: StockModel) -> bool:
    """Whether detection found the family and its sizes."""
    found = patcher.model.model_config
    same = all(found.unet_config.get(key) == value for key, value in model.family.unet.items())
    return same and type(found).__name__ == model.family.config


def run(patcher, model: StockModel, steps: int = STEPS) -> torch.Tensor:
    """The samples of a few Euler steps, flat."""
    import comfy.sample

    noise, positive, negative, latent = families.inputs(model.family)
    return families.flat(
        comfy.sample.sample(
            patcher, noise, steps, CFG, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=SEED
        )
    )
