"""The model families of the checks, one entry each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import family_configs as unets
import torch
from family_configs import HEADS, TEXT, TOKENS, WIDTH


@dataclass(frozen=True)
class Family:
    """One tiny model. In `conds` a tuple is the shape of random numbers; anything else is passed as it is."""

    config: str  # the class in comfy.supported_models
    unet: dict[str, Any] | Callable[[], dict]  # a function where it depends on the version
    latent: tuple[int, ...] | list[tuple[int, ...]]  # several shapes are a nested latent
    context: tuple[int, ...] = (1, TOKENS, TEXT)
    conds: dict[str, Any] = field(default_factory=dict)
    state: Callable[[], dict] = dict  # tensors that the model class itself wants from the checkpoint
    parts: dict[str, dict] = field(default_factory=dict)  # arguments of parts that the configuration leaves large
    control: dict[str, list[tuple]] = field(default_factory=dict)  # shapes of what a ControlNet adds after blocks
    patched: bool = False  # something reads and changes a stream after every block


IMAGE, VIDEO = (1, 16, 8, 8), (1, 16, 3, 8, 8)
POOLED, MASK = {"pooled_output": (1, 40)}, torch.ones(1, TOKENS, dtype=torch.long)
LYRICS = {"output_size": WIDTH, "attention_heads": HEADS, "linear_units": 96, "num_blocks": 1}
ADAPTER = {"source_dim": TEXT, "target_dim": TEXT, "model_dim": TEXT, "num_layers": 1, "num_heads": HEADS}
FAMILIES: dict[str, Family] = {
    "SD 1.5": Family("SD15", unets.unet(), (1, 4, 16, 16)),
    "SDXL": Family("SDXL", unets.sdxl(), (1, 4, 16, 16), conds={"pooled_output": (1, 1280)}),
    "SD 3.5": Family("SD3", unets.sd35(), IMAGE, conds=POOLED),
    "Flux": Family("Flux", unets.flux(image_model="flux"), IMAGE, conds={**POOLED, "guidance": 3.5}),
    "Flux 2": Family("Flux2", unets.flux2(), (1, 128, 4, 4), conds={"guidance": 3.5}),
    "Chroma": Family("Chroma", unets.chroma(), IMAGE),
    "Chroma Radiance": Family("ChromaRadiance", unets.radiance, (1, 3, 64, 64)),
    "AuraFlow": Family("AuraFlow", unets.auraflow(), (1, 4, 8, 8)),
    "PixArt alpha": Family("PixArtAlpha", unets.pixart(False), (1, 4, 48, 48), conds={"width": 64, "height": 64}),
    "PixArt sigma": Family("PixArtSigma", unets.pixart(True), (1, 4, 48, 48)),
    "HunyuanDiT": Family(
        "HunyuanDiT1", unets.hunyuan_dit(), (1, 4, 8, 8),
        conds={
            "attention_mask": MASK, "conditioning_mt5xl": (1, TOKENS, TEXT), "attention_mask_mt5xl": MASK,
        },
    ),
    "HunyuanVideo": Family("HunyuanVideo", unets.hunyuan_video(), VIDEO, conds={**POOLED, "guidance": 6.0}),
    "LTXV": Family("LTXV", unets.ltxv(), (1, 128, 3, 4, 4), conds={"attention_mask": MASK}),
    "LTX-AV": Family(
        "LTXAV", unets.ltxav(), [(1, 128, 3, 4, 4), (1, 8, 6, 16)], context=(1, TOKENS, 2 * TEXT)
    ),
    "Mochi": Family("GenmoMochi", unets.mochi(), (1, 12, 3, 8, 8), conds={"attention_mask": MASK}),
    "Wan 2.1": Family("WAN21_T2V", unets.wan(), VIDEO),
    "Wan 2.2": Family("WAN22_T2V", unets.wan(in_dim=48, out_dim=48), (1, 48, 3, 8, 8)),
    "Wan VACE": Family(
        "WAN21_Vace", unets.wan(model_type="vace", vace_in_dim=96, vace_layers=2), VIDEO,
        conds={"vace_frames": [torch.linspace(-1, 1, 6144).reshape(1, 32, 3, 8, 8)]},
    ),
    "Wan Camera": Family(
        "WAN21_Camera", unets.wan(model_type="camera", in_dim=32), VIDEO,
        conds={"camera_conditions": (1, 24, 3, 64, 64)},
    ),
    "Wan S2V": Family(
        "WAN22_S2V", unets.wan(model_type="s2v", num_layers=3, audio_dim=32, audio_inject_layers=[0, 1]), VIDEO,
        conds={"audio_embed": (1, 25, 32, 12)},
    ),
    "Wan HuMo": Family("WAN21_HuMo", unets.wan(model_type="humo"), VIDEO, conds={"audio_embed": (1, 3, 8, 5, 1280)}),
    "Wan SCAIL": Family(
        "WAN21_SCAIL", unets.wan(model_type="scail", in_dim=20), VIDEO,
        conds={"pose_video_latent": (1, 16, 3, 4, 4)},
    ),
    "Wan Dancer": Family(
        "WAN22_WanDancer",
        unets.wan(
            model_type="wandancer", in_dim=36, audio_inject_layers=[0, 1], music_dim=32, music_heads=HEADS,
            music_latent_dim=32,
        ),
        VIDEO, conds={"audio_embed": (1, 40, 35)},
    ),
    "Qwen-Image": Family("QwenImage", unets.qwen_image(), (1, 16, 1, 8, 8)),
    "Lumina 2": Family("Lumina2", unets.lumina(), IMAGE),
    "Z-Image": Family("ZImage", unets.z_image(), IMAGE),
    "HiDream-I1": Family(
        "HiDream", unets.hidream(), IMAGE, conds={**POOLED, "conditioning_llama3": (1, 2, TOKENS, TEXT)}
    ),
    "Cosmos 1": Family("CosmosT2V", unets.cosmos1(), VIDEO),
    "Cosmos Predict2": Family("CosmosT2IPredict2", unets.cosmos_predict2(), VIDEO),
    "Anima": Family(
        "Anima", unets.cosmos_predict2(image_model="anima"), VIDEO, parts={"comfy.ldm.anima.model.LLMAdapter": ADAPTER}
    ),
    "CogVideoX": Family("CogVideoX_T2V", unets.cogvideox(), VIDEO),
    "Kandinsky 5": Family("Kandinsky5", unets.kandinsky5(), VIDEO, conds=POOLED),
    "Kandinsky 5 image": Family(
        "Kandinsky5Image", unets.kandinsky5(visual_embed_dim=64), (1, 16, 1, 8, 8), conds=POOLED
    ),
    "Stable Audio": Family(
        "StableAudio", unets.stable_audio(), (1, 64, 24), context=(1, TOKENS, 768),
        state=partial(unets.seconds, "seconds_start", "seconds_total"),
    ),
    "Stable Audio 3": Family(
        "StableAudio3", unets.stable_audio3(), (1, 256, 24), context=(1, TOKENS, 768),
        state=partial(unets.seconds, "seconds_total", fourier_features_type="expo"),
    ),
    "MiniMax H3": Family("MiniMaxH3", unets.minimax_h3(), [(1, 24, 3, 4, 4), (1, 32, 2, 6)]),
    "ACE-Step": Family(
        "ACEStep", unets.ace_step(), (1, 8, 16, 24), conds={"conditioning_lyrics": torch.arange(TOKENS)[None]},
        parts={"comfy.ldm.ace.model.LyricEncoder": LYRICS},
    ),
    "ERNIE-Image": Family("ErnieImage", unets.ernie(), (1, 128, 4, 4)),
    "Krea 2": Family("Krea2", unets.krea2(), (1, 16, 1, 8, 8), context=(1, TOKENS, 2 * TEXT)),
    "Lens": Family("Lens", unets.lens(), (1, 128, 4, 4), conds={"attention_mask": MASK}),
    "Mage-Flow": Family("MageFlow", unets.mage_flow(), (1, 128, 4, 4)),
    "JoyImage": Family("JoyImage", unets.joyimage(), (1, 16, 1, 8, 8)),
    "HunyuanImage 2.1": Family(
        "HunyuanImage21",
        unets.hunyuan_video(in_channels=64, out_channels=64, patch_size=[1, 1], vec_in_dim=None, axes_dim=[16, 16]),
        (1, 64, 4, 4),
    ),
    "OmniGen2": Family("Omnigen2", unets.omnigen2(), IMAGE, conds={"attention_mask": MASK}),
    "Hunyuan3D 2": Family("Hunyuan3Dv2", unets.hunyuan3d(), (1, 16, 24)),
    "Hunyuan3D 2.1": Family("Hunyuan3Dv2_1", unets.hunyuan3d_21(), (1, 16, 24)),
    "Ideogram 4": Family("Ideogram4", unets.ideogram4(), (1, 128, 4, 4)),
    "PixelDiT": Family("PixelDiTT2I", unets.pixeldit(), (1, 3, 64, 64)),
    "Flux with a ControlNet": Family(
        "Flux", unets.flux(image_model="flux"), IMAGE, conds={**POOLED, "guidance": 3.5},
        control={"input": [(1, 16, WIDTH)] * 2, "output": [(1, 16, WIDTH)] * 2},
    ),
    "SD 3.5 with a ControlNet": Family(
        "SD3", unets.sd35(), IMAGE, conds=POOLED, control={"output": [(1, 16, WIDTH)] * 2}
    ),
    "Qwen-Image with a ControlNet": Family(
        "QwenImage", unets.qwen_image(), (1, 16, 1, 8, 8), control={"input": [(1, 16, WIDTH)] * 2}
    ),
    "Qwen-Image with a block patch": Family("QwenImage", unets.qwen_image(), (1, 16, 1, 8, 8), patched=True),
    "Wan 2.1 with a block patch": Family("WAN21_T2V", unets.wan(), VIDEO, patched=True),
}  # fmt: skip
