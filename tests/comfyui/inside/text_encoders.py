"""Quantize Text Encoder and Save Text Encoder on ComfyUI's encoder classes: errors, files, LoRAs, sources, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from host import Host, main, relative
from host import cancelled as cancelled_work
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_encoders import tiny_encoders, write_encoder

CLIPS = {  # files, the one to quantize last, and the type that Load CLIP is told
    "Flux": (("clip_l", "t5xxl"), "flux"),
    "Wan": (("umt5xxl",), "wan"),
    "Qwen-Image": (("qwen25_7b",), "qwen_image"),
    "Z-Image": (("qwen3_4b",), "lumina2"),
    "HunyuanVideo": (("clip_l", "llama"), "hunyuan_video"),
    "Lumina 2": (("gemma2_2b",), "lumina2"),
}
NEW = ("a lighthouse at dusk, long exposure", 'Neon sign that says "HELLO", rain')
QUICK = "HunyuanVideo"  # 28 layers, where T5 has 168
MINE = "\n".join(f"a {color} {thing}, studio light" for color in ("red", "green", "old")
                 for thing in ("vase on a table", "boat on a lake", "robot in a street", "cat"))  # fmt: skip


def files(host: Host, name: str, dtype: torch.dtype = torch.float32) -> list[str]:
    folder = host.base / "models" / "text_encoders"
    return [write_encoder(encoder, folder, dtype) for encoder in CLIPS[name][0]]


def load(host: Host, name: str, paths: list[str]):
    """As Load CLIP and its siblings load the files."""
    import comfy.sd

    with tiny_encoders():
        return comfy.sd.load_clip(paths, clip_type=getattr(comfy.sd.CLIPType, CLIPS[name][1].upper()))


def encode(clip, prompts=NEW) -> list[torch.Tensor]:
    """All tensors that CLIP Text Encode gives for the prompts."""
    found = []
    for prompt in prompts:
        for cond, extra in clip.encode_from_tokens_scheduled(clip.tokenize(prompt)):
            found += [cond, *(value for value in extra.values() if isinstance(value, torch.Tensor))]
    return [tensor.clone() for tensor in found]


def quantize(host: Host, clip, format="W8A8", prompts=MINE, error=0.0, **given) -> tuple[Any, str, str]:
    """The node's CLIP, file name prefix and text."""
    out = host.node("QandC_QuantizeTextEncoder").execute(clip, format, prompts, error, **given)
    return out.args[0], out.args[1], out.ui["text"][0]


def save(host: Host, clip, prefix: str, encoders="quantized") -> list[str]:
    """The files that Save Text Encoder wrote."""
    import folder_paths

    folder = Path(folder_paths.get_output_directory(), "clip")
    before = set(folder.glob("*"))
    host.node("QandC_SaveTextEncoder").execute(clip, prefix, encoders)
    return sorted(str(path) for path in set(folder.glob("*")) - before)


def available(host: Host) -> list[str]:
    formats = host.module("nodes.comfyui.quantize.formats")
    return [name for name in formats.BY_NAME if formats.supported(name)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def distance(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Mean of the tensors that differ at all: those of clip_l and masks stay."""
    errors = [relative(x, y) for x, y in zip(found, exact) if not torch.equal(x, y)]
    return sum(errors) / max(1, len(errors))


def formats_in(path: str) -> list[str]:
    with safe_open(path, "pt") as file:
        marks = [file.get_tensor(name) for name in file.keys() if name.endswith("comfy_quant")]  # noqa: SIM118
    return sorted({json.loads(bytes(mark.tolist()))["format"] for mark in marks})


def refusal(call, *args, **given) -> str:
    try:
        call(*args, **given)
        return ""
    except ValueError as error:
        return str(error)


def families(host: Host) -> dict[str, dict]:
    """Each family's last encoder in each format: errors, and the file that ComfyUI's own loader loads again."""
    found: dict[str, dict] = {}
    for name in CLIPS:
        paths = files(host, name)
        clip = load(host, name, paths)
        exact = encode(clip)
        found[name] = {"formats": {}}
        for format in available(host)[:: 2 if name == "Wan" else 1]:
            quantized, prefix, text = quantize(host, clip, format)
            nearest, *_ = quantize(host, clip, format, rounding="nearest")
            before = encode(quantized)
            written = save(host, quantized, prefix)
            again = load(host, name, [*paths[:-1], *written])
            found[name]["formats"][format] = {
                "text": text.split("\n\n|")[0], "prefix": prefix, "files": [Path(path).name for path in written],
                "same after loading": equal(encode(again), before), "same twice": equal(encode(quantized), before),
                "sizes": [Path(path).stat().st_size for path in (paths[-1], written[0])],
                "stored": formats_in(written[0]),
                "errors": {"gptq": distance(before, exact), "nearest": distance(encode(nearest), exact)},
            }  # fmt: skip
        found[name]["source as it was"] = equal(encode(clip), exact)
    return found


def half_precision(host: Host) -> dict[str, dict]:
    """Files of 16 bits and fp8, scaled or not: the error, and the quantized file loaded again."""
    found = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        paths = files(host, QUICK, dtype)
        found[str(dtype)] = around(host, paths)
    paths = files(host, QUICK, torch.float16)
    tensors, scaled = load_file(paths[-1]), {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for key, value in tensors.items():
        if value.dim() == 2 and ".layers." in key:
            scale = value.float().abs().max() / 448
            scaled |= {key: (value.float() / scale).to(torch.float8_e4m3fn), f"{key[:-6]}scale_weight": scale[None]}
        else:
            scaled[key] = value
    path = paths[-1].replace(".safetensors", "_scaled.safetensors")
    save_file(scaled, path)
    found["scaled"] = around(host, [paths[0], path])
    return found


def around(host: Host, paths: list[str]) -> dict:
    clip = load(host, QUICK, paths)
    exact = encode(clip)
    quantized, prefix, text = quantize(host, clip)
    before = encode(quantized)
    again = load(host, QUICK, [paths[0], *save(host, quantized, prefix)])
    return {"error": distance(before, exact), "same after loading": equal(encode(again), before), "text": text}


def lora_for(clip, size: float) -> dict[str, tuple]:
    """Patches on every linear layer of llama and clip_l, as Load LoRA adds them."""
    import comfy.weight_adapter

    generator = torch.Generator().manual_seed(3)
    patches = {}
    for key, weight in clip.patcher.model.state_dict().items():
        if weight.dim() == 2 and ".layers." in key:
            up, down = (torch.randn(n, 2, generator=generator) for n in weight.shape)
            scale = size * float(weight.float().norm() / (up @ down.T).norm())
            patches[key] = comfy.weight_adapter.LoRAAdapter(set(), (up * scale, down.T, 2.0, None, None, None))
    return patches


def loras(host: Host) -> dict[str, Any]:
    """A LoRA before the node is in the file and in clip_l; one after it has its effect and goes without a trace."""
    paths = files(host, QUICK)
    clip = load(host, QUICK, paths)
    plain, patched = encode(clip), clip.clone()
    patched.add_patches(lora_for(clip, 0.3), 1.0)
    exact = encode(patched)
    quantized, prefix, _ = quantize(host, patched)
    before = encode(quantized)
    again = load(host, QUICK, [paths[0], *save(host, quantized, prefix)])
    found = {
        "effect": relative(exact[0], plain[0]), "baked": relative(before[0], exact[0]),
        "pooled": torch.equal(before[1], exact[1]) and not torch.equal(before[1], plain[1]),
        "same llama after loading": torch.equal(encode(again)[0], before[0]),
        "source as it was": equal(encode(patched), exact) and equal(encode(clip), plain),
        "left": [key for key in quantized.patcher.patches if key.startswith("llama")],
    }  # fmt: skip
    for format in available(host):
        lossy, prefix, _ = quantize(host, clip, format)
        was, after = encode(lossy), lossy.clone()
        after.add_patches(lora_for(clip, 0.3), 1.0)
        on = encode(after)
        loaded = load(host, QUICK, [paths[0], *save(host, after, prefix)])
        found[format] = {
            "without": relative(was[0], plain[0]), "with": relative(on[0], exact[0]),
            "gone": equal(encode(lossy), was), "saved": relative(encode(loaded)[0], on[0]),
        }  # fmt: skip
    return found


def choices(host: Host) -> dict[str, Any]:
    """skip, include, limits and what cannot be quantized."""
    clip = load(host, QUICK, files(host, QUICK))

    def layers(**given) -> tuple[int, str]:
        quantized, _, text = quantize(host, clip, prompts="", **given)
        weights = [getattr(module, "weight", None) for module in quantized.cond_stage_model.modules()]
        return sum(hasattr(weight, "_layout_cls") for weight in weights), text.split("\n\n|")[0]

    small = load(host, QUICK, files(host, QUICK)[:1])
    narrow, *_ = quantize(host, clip, prompts="")
    return {
        "all": layers(), "skip": layers(skip="layers.0.,nonsense"),
        "limit": layers(error=0.03, format=available(host)[-1]),
        "skip all": refusal(quantize, host, clip, skip="llama"), "none": refusal(quantize, host, clip, error=1e-6),
        "clip_l": refusal(quantize, host, small), "again": refusal(quantize, host, narrow),
        "save": refusal(save, host, clip, "clip/none"),
        "save all": [Path(path).name for path in save(host, clip, "clip/both", "all")],
    }  # fmt: skip


def names(host: Host) -> dict[str, Any]:
    """Names in files of encoders that the loader renames as it reads them, and what it takes them for."""
    import comfy.sd

    saving = host.module("nodes.comfyui.encoders.saving")
    norm = torch.empty(2560, device="meta")
    qwen35 = saving.with_full_names({
        "model.layers.0.linear_attn.A_log": norm, "model.layers.0.input_layernorm.weight": norm,
        "visual.blocks.0.norm1.weight": norm, "model.lm_head.weight": norm,
    })  # fmt: skip
    qwen3 = saving.with_full_names({"model.layers.0.self_attn.q_norm.weight": norm, "model.norm.weight": norm})
    return {"Qwen 3.5": sorted(qwen35), "Qwen 3": sorted(qwen3), "taken for": comfy.sd.detect_te_model(qwen35).name}


def cancelled(host: Host) -> dict[str, Any]:
    """Cancel is pressed while the prompts are read, and while layers are rounded."""
    clip = load(host, QUICK, files(host, QUICK))
    exact, found = encode(clip), {}
    for kind in ("calls", "rounding"):
        ended, _ = cancelled_work(host, lambda: quantize(host, clip), kind, 3)
        hooks = [m for m in clip.cond_stage_model.modules() if m._forward_pre_hooks or m._forward_hooks]
        found[kind] = {"ended": ended, "same": equal(encode(clip), exact), "hooks": len(hooks)}
    return found


def sampled(host: Host) -> dict[str, float]:
    """A tiny Flux samples with the conditioning of the full and of the quantized T5 through KSampler."""
    import families as tiny_models
    from quantized_families import load as load_model
    from stock_models import STOCK

    model, clip = load_model(host, "Flux"), load(host, "Flux", files(host, "Flux"))
    latent = {"samples": tiny_models.inputs(STOCK["Flux"].family)[3]}
    encoder, sampler = (host.nodes.NODE_CLASS_MAPPINGS[name]() for name in ("CLIPTextEncode", "KSampler"))

    def images(used) -> torch.Tensor:
        positive, negative = (encoder.encode(used, text)[0] for text in (NEW[0], ""))
        return sampler.sample(model, 5, 3, 2.0, "euler", "simple", positive, negative, latent)[0]["samples"]

    full = images(clip)
    return {
        format: relative(images(quantize(host, clip, format)[0]), full) for format in available(host)
    } | {"full": relative(images(clip), full)}  # fmt: skip


if __name__ == "__main__":
    main({
        "families": families, "half precision": half_precision, "loras": loras, "choices": choices, "names": names,
        "cancelled": cancelled, "sampled": sampled,
    })  # fmt: skip
