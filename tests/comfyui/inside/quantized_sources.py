"""Quantize on files that are quantized already, made here in the formats that people download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from host import Host, main, relative
from quantized_families import available, load, quantize, save
from stock_models import STOCK, run

FAMILY = "Flux"
# Stored name: layout and the arguments of its quantizer, as the files of ComfyUI's own converters have them.
SOURCES = {
    "float8_e4m3fn": ("TensorCoreFP8E4M3Layout", {}),
    "int8_tensorwise": (
        "TensorWiseINT8Layout", {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
    ),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "asym_w4a8_int8": ("AsymW4A8Int8Layout", {"convrot_groupsize": 64}),
}  # fmt: skip
NAMED = {"int8_tensorwise": ("convrot", "convrot_groupsize"), "asym_w4a8_int8": ("group_size", "convrot_groupsize")}
TARGETS = ("W8A8", "W4A8")


def packed_file(host: Host, stored: str) -> Path:
    """The family's file with the layers of its blocks in a format, as its converter writes them."""
    import safetensors.torch
    from comfy.quant_ops import QuantizedTensor

    layout, choices = SOURCES[stored]
    path = Path(load(host, FAMILY).cached_patcher_init[1][0])
    tensors = {}
    for key, value in safetensors.torch.load_file(path).items():
        name, _, part = key.rpartition(".")
        tensors[key] = value
        if part == "weight" and "_blocks." in name and value.ndim == 2:
            weight = QuantizedTensor.from_float(value.float(), layout, scale="recalculate", **choices)
            config = {"format": stored} | {name: getattr(weight._params, name) for name in NAMED.get(stored, ())}
            tensors |= {part: tensor.contiguous() for part, tensor in weight.state_dict(key).items()}
            tensors[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    made = path.with_name(f"{stored}.safetensors")
    safetensors.torch.save_file(tensors, made)
    return made


def sources(host: Host) -> dict[str, Any]:
    """Source and target -> the report's words and errors against source and original, or the refusal."""
    import comfy.sd
    from comfy.quant_ops import QUANT_ALGOS

    model, found = STOCK[FAMILY], {}
    original = run(load(host, FAMILY), model)
    for stored in SOURCES:
        if stored not in QUANT_ALGOS:
            continue
        source = comfy.sd.load_diffusion_model(str(packed_file(host, stored)))
        before = run(source, model)
        found[stored] = {"lost": relative(before, original)}
        for format in available(host):
            try:
                lossy, report = quantize(host, source, format, rounding="nearest")
            except ValueError as refusal:
                found[stored][format] = str(refusal)
                continue
            out = run(lossy, model)
            again = comfy.sd.load_diffusion_model(str(save(lossy, f"from-{stored}-{format}")))
            found[stored][format] = {
                "sources": report.sources, "layers": report.counts, "summary": report.summary(),
                "against the source": relative(out, before), "against the original": relative(out, original),
                "saved": relative(run(again, model), out), "source stays": torch.equal(run(source, model), before),
            }  # fmt: skip
    return found


class GGMLTensor(torch.Tensor):
    """Bytes that only another pack's layers can read, as the weights of its GGUF loader are."""


def unreadable(host: Host) -> str:
    """What is said of a layer with such a weight."""
    full = load(host, FAMILY)
    module = full.model.diffusion_model.single_blocks[0].linear1
    kept, packed = module.weight, torch.zeros(8, 8, dtype=torch.uint8).as_subclass(GGMLTensor)
    module.weight = torch.nn.Parameter(packed, requires_grad=False)
    try:
        quantize(host, full, "W8A8")
        return ""
    except ValueError as refusal:
        return str(refusal)
    finally:
        module.weight = kept


class Preference(torch.nn.Module):
    """Loads and saves an entry of its own, as the child that later versions of ComfyUI give their attention does."""

    config: torch.Tensor | None = None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.config = state_dict.pop(f"{prefix}config", None)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.config is not None:
            destination[f"{prefix}config"] = self.config


def preferences(host: Host) -> dict[str, Any]:
    """`<attention>.comfy_attention.config` of a file in the model that Quantize makes, and in its own file."""
    import comfy.ldm.flux.layers as flux
    import comfy.sd
    import safetensors.torch

    plain = flux.SelfAttention.__init__

    def with_preference(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self.comfy_attention = Preference()

    path = Path(load(host, FAMILY).cached_patcher_init[1][0])
    said = torch.tensor(list(b'{"attention": "comfy_kitchen_int8"}'), dtype=torch.uint8)
    key = "double_blocks.0.img_attn.comfy_attention.config"
    tensors = {**safetensors.torch.load_file(path), key: said}
    file = path.with_name("preferring.safetensors")
    safetensors.torch.save_file(tensors, file)
    found, flux.SelfAttention.__init__ = {}, with_preference
    try:
        for format in available(host):
            full = comfy.sd.load_diffusion_model(str(file))
            lossy, _ = quantize(host, full, format, rounding="nearest")
            rebuilt = lossy.model.diffusion_model.double_blocks[0].img_attn.comfy_attention.config
            other = lossy.model.diffusion_model.double_blocks[1].img_attn.comfy_attention.config
            saved = safetensors.torch.load_file(save(lossy, f"preferring-{format}"))
            kept = [name for name in saved if name.endswith(".comfy_attention.config")]
            found[format] = {
                "rebuilt": rebuilt is not None and torch.equal(rebuilt, said) and other is None,
                "saved": len(kept) == 1 and kept[0].endswith(key) and torch.equal(saved[kept[0]], said),
            }
    finally:
        flux.SelfAttention.__init__ = plain
    return found


if __name__ == "__main__":
    main({"sources": sources, "unreadable": unreadable, "preferences": preferences})
