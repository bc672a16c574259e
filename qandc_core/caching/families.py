"""The families whose blocks can be reused: a line for each network class. Add a model here.

A line gives the lists of blocks of a network, by the path of the list, and for each list the streams of its blocks: the
arguments that a block changes and returns, by name or position, in the order in which it returns them. A class that is
not listed is reused as a whole. Empty lists say that a network must not be reused by blocks, and why.
"""

from __future__ import annotations

from torch import nn

Streams = tuple["str | int", ...]  # arguments of a block, by name or position, in the order in which it returns them

# Network class -> its lists of blocks. A subclass is looked up by its own name first. The first dimension of a stream
# holds the conditions of the batch, which GeneralDIT (Cosmos 1) keeps in its fourth.
BLOCKS: dict[str, dict[str, Streams]] = {
    "Flux": {"double_blocks": ("img", "txt"), "single_blocks": ("x",)},
    "Chroma": {"double_blocks": ("img", "txt"), "single_blocks": ("x",)},
    "HunyuanVideo": {"double_blocks": ("img", "txt"), "single_blocks": ("x",)},
    "Hunyuan3Dv2": {"double_blocks": ("img", "txt"), "single_blocks": ("x",)},
    "OpenAISignatureMMDITWrapper": {"joint_blocks": (0, 1)},
    "MMDiT": {"double_layers": ("c", "x"), "single_layers": ("cx",)},
    "PixArtMS": {"blocks": ("x",)},
    "AsymmDiTJoint": {"blocks": ("x", "y")},
    "LTXVModel": {"transformer_blocks": ("x",)},
    "WanModel": {"blocks": ("x",)},
    "CausalWanModel": {},  # its blocks write a cache of their own
    "WanAnimate2Model": {},
    "CogVideoXTransformer3DModel": {"blocks": ("hidden_states", "encoder_hidden_states")},
    "MiniTrainDIT": {"blocks": ("x_B_T_H_W_D",)},
    "NextDiT": {"layers": ("x",)},
    "HiDreamImageTransformer2DModel": {
        "double_stream_blocks": ("image_tokens", "text_tokens"),
        "single_stream_blocks": ("image_tokens",),
    },
    "QwenImageTransformer2DModel": {"transformer_blocks": ("encoder_hidden_states", "hidden_states")},
    "MageFlowTransformer2DModel": {"transformer_blocks": ("encoder_hidden_states", "hidden_states")},
    "LensTransformer2DModel": {"transformer_blocks": ("encoder_hidden_states", "hidden_states")},
    "JoyImageTransformer3DModel": {"double_blocks": ("hidden_states", "encoder_hidden_states")},
    "Kandinsky5": {"visual_transformer_blocks": ("visual_embed",)},
    "SingleStreamDiT": {"blocks": ("x",)},
    "Ideogram4Transformer2DModel": {"layers": ("x",)},
    "ErnieImageModel": {"layers": ("x",)},
    "OmniGen2Transformer2DModel": {"layers": ("hidden_states",)},
    "AudioDiffusionTransformer": {"transformer.layers": ("x",)},
    "ACEStepTransformer2DModel": {"transformer_blocks": ("hidden_states",)},
    "MiniMaxH3Model": {"blocks": ("x",)},
    "PixDiT_T2I": {"patch_blocks": (0, 1), "pixel_blocks": (0,)},
    "PidNet": {},  # weighs the low-resolution image by the stream before each block
    "DiT": {"blocks": ("x",)},
}
# Networks that read a stream between blocks, for audio or faces: there every block keeps its own part. WanDancerModel
# attends to one token of music, which adds the same whatever the stream holds.
READ_BETWEEN = {"WanModel_S2V", "AnimateWanModel"}

# The transformers of diffusers, whose blocks return their streams in this order. reuse="branch" needs blocks that add
# attention (attn1) and MLP (ff) to one stream.
DIFFUSERS: dict[str, dict[str, Streams]] = {
    "DiTTransformer2DModel": {"transformer_blocks": ("hidden_states",)},
    "PixArtTransformer2DModel": {"transformer_blocks": ("hidden_states",)},
    "FluxTransformer2DModel": {
        "transformer_blocks": ("encoder_hidden_states", "hidden_states"),
        "single_transformer_blocks": ("encoder_hidden_states", "hidden_states"),
    },
    "SD3Transformer2DModel": {"transformer_blocks": ("encoder_hidden_states", "hidden_states")},
    "WanTransformer3DModel": {"blocks": ("hidden_states",)},
    "CogVideoXTransformer3DModel": {"transformer_blocks": ("hidden_states", "encoder_hidden_states")},
}
BRANCHED = ("DiTTransformer2DModel", "PixArtTransformer2DModel")


def diffusers_lists(network: nn.Module) -> dict[str, Streams]:
    """The lists of blocks of a transformer of diffusers; empty for one that is not known."""
    known = (DIFFUSERS[base.__name__] for base in type(network).__mro__ if base.__name__ in DIFFUSERS)
    return next(known, {})


def block_lists(network: nn.Module) -> dict[str, Streams]:
    """The lists of blocks of a network, by the path of the list; empty for a network that is not known."""
    known = (BLOCKS[base.__name__] for base in type(network).__mro__ if base.__name__ in BLOCKS)
    return next(known, {})
