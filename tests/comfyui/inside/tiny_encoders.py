"""Tiny random files of ComfyUI's text encoder classes that its own CLIP loaders recognize."""

from __future__ import annotations

import io
import json
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

WIDTH, RANK = 64, 24
T5 = {"d_model": WIDTH, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 24}
LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
CLIP_L = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 12, "num_attention_heads": 2}
CONFIGS = Path("comfy", "text_encoders")


@dataclass(frozen=True)
class TinyEncoder:
    """A network class with the sizes that replace its own, or with the whole configuration of a class without any.

    `full_width`: shapes that detection is shown instead. `tokenizer`: the file carries one.
    """

    network: str
    narrow: dict[str, Any]
    config: Path | None = None
    full_width: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokenizer: bool = False


LLAMAS = "comfy.text_encoders.llama."
T5_WIDTH = {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096)}
ENCODERS = {
    "t5xxl": TinyEncoder("comfy.text_encoders.t5.T5", T5, CONFIGS / "t5_config_xxl.json", T5_WIDTH),
    "umt5xxl": TinyEncoder("comfy.text_encoders.t5.T5", T5, CONFIGS / "umt5_config_xxl.json", T5_WIDTH, True),
    "clip_l": TinyEncoder("comfy.clip_model.CLIPTextModel", CLIP_L, Path("comfy", "sd1_clip_config.json")),
    "qwen25_7b": TinyEncoder(
        LLAMAS + "Qwen25_7BVLI", {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4}
    ),
    "qwen3_4b": TinyEncoder(
        LLAMAS + "Qwen3_4B", LLAMA, None, {"model.layers.0.post_attention_layernorm.weight": (2560,)}
    ),
    "llama": TinyEncoder(LLAMAS + "Llama2", LLAMA),
    "gemma2_2b": TinyEncoder(LLAMAS + "Gemma2_2B", {**LLAMA, "vocab_size": 600}, None, {}, True),
}  # fmt: skip
VISION = "comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer"


@contextmanager
def tiny_encoders() -> Iterator[None]:
    """Within it ComfyUI builds and detects these encoders in tiny sizes."""
    import comfy.sd
    import comfy.text_encoders.hunyuan_video as llama

    with ExitStack() as stack:
        networks = {encoder.network: encoder.narrow for encoder in ENCODERS.values()}
        for path, narrow in networks.items():
            network = pkgutil.resolve_name(path)
            stack.enter_context(patch.object(network, "__init__", narrowed(network.__init__, narrow)))
        vision = pkgutil.resolve_name(VISION)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_layers": 1}
        stack.enter_context(patch.object(vision, "__init__", with_sizes(vision.__init__, sizes)))
        stack.enter_context(patch.object(llama, "LlamaTokenizerFast", SmallTokenizer))
        shown = partial(detected, comfy.sd.detect_te_model)
        stack.enter_context(patch.object(comfy.sd, "detect_te_model", shown))
        yield


def narrowed(build, narrow: dict[str, Any]):
    def __init__(self, config, *args, **kwargs):
        build(self, {**config, **narrow, **({"vocab_size": 600} if config.get("model_type") == "umt5" else {})},
              *args, **kwargs)  # fmt: skip

    return __init__


def with_sizes(build, sizes: dict[str, Any]):
    def __init__(self, *args, **kwargs):
        build(self, *args, **{**kwargs, **sizes})

    return __init__


def detected(detect, state: dict):
    """ComfyUI's detection, which sees the widths of full-size encoders."""
    shown = dict(state)
    for encoder in ENCODERS.values():
        if all(key in state for key in encoder.full_width) and (
            "q_norm" in str(list(state)) or "T5" in encoder.network
        ):
            shown |= {key: torch.empty(shape, device="meta") for key, shape in encoder.full_width.items()}
    return detect(shown)


class SmallTokenizer:
    """In place of Llama's, which takes seconds to read and is not in every checkout."""

    @staticmethod
    def from_pretrained(path, **given):
        from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer

        return SPieceTokenizer(spiece_model(), add_bos=True, add_eos=False)


def write_encoder(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """A file of random weights, with embeddings of low rank so that inputs are correlated as a text's are."""
    import comfy.ops

    encoder = ENCODERS[name]
    path = folder / f"{name}_{str(dtype).removeprefix('torch.')}.safetensors"
    if path.exists():
        return str(path)
    config = json.loads((Path(comfy.ops.__file__).parents[1] / encoder.config).read_text()) if encoder.config else {}
    generator = torch.Generator().manual_seed(sum(name.encode()))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    with tiny_encoders(), torch.inference_mode(False):
        network = pkgutil.resolve_name(encoder.network)(config, dtype, "cpu", comfy.ops.manual_cast)
        tensors = {}
        for key, value in network.state_dict().items():
            if value.dim() < 2:
                made = torch.zeros(value.shape) if key.endswith("bias") else 1 + 0.1 * random(*value.shape)
            elif value.dim() == 2 and ("embed" in key or key.startswith("shared")):
                made = random(len(value), RANK) @ random(RANK, value.shape[1]) / RANK**0.5 + 0.1 * random(*value.shape)
            else:
                made = random(*value.shape) / value.flatten(1).shape[1] ** 0.5
            tensors[key] = (0.3 * made if "SelfAttention.q" in key else made).to(dtype)
    if encoder.tokenizer:
        tensors["spiece_model"] = spiece_model()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return str(path)


@cache
def spiece_model() -> torch.Tensor:
    """A SentencePiece tokenizer of the pack's general prompts."""
    import sentencepiece

    text = Path(__file__).parents[3].joinpath("nodes", "prompts.txt").read_text().splitlines()
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=written, vocab_size=500, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=3,
    )  # fmt: skip
    return torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)
