"""The DiT as a native MODEL: precision, class ids, LoRA, offloading, resolutions, large checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from host import Host, main, relative

CFG, SEED = 4.0, 3


def tiny(host: Host, path: Path, **changes) -> str:
    """A random DiT with 1000 classes and learned variance in the published layout."""
    dit = host.module("qandc_core.models.dit")
    config = dit.DiTConfig(**{"input_size": 8, "hidden_size": 96, "depth": 2, "num_heads": 4, **changes})
    model = dit.DiT(config)
    dit.initialize_weights(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    host.module("qandc_core").save_dit(model, path)
    return str(path)


def load(host: Host, path: str, dtype=None, **kwargs):
    return host.module("nodes.comfyui.model.dit").load_dit_patcher(path, dtype, **kwargs)


def run(host: Host, patcher, labels=(5, 257), side: int = 64, steps: int = 3, height: int | None = None):
    positive, negative = host.module("nodes.class_label").ClassLabel.execute(",".join(map(str, labels)), "none").args
    (latent,) = host.nodes.EmptyLatentImage().generate(side, height or side, len(labels))
    (out,) = host.nodes.common_ksampler(patcher, SEED, steps, CFG, "ddim", "normal", positive, negative, latent)
    return out["samples"]


def ids_and_timesteps_survive(host: Host) -> dict[str, list]:
    """What reaches the embedders in each precision."""
    path, seen = tiny(host, host.base / "tiny.safetensors"), {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        patcher = load(host, path, dtype)
        model, labels, times = patcher.model.diffusion_model, [], []
        model.y_embedder.register_forward_pre_hook(lambda _, args, labels=labels: labels.append(args[0].tolist()))
        model.t_embedder.register_forward_pre_hook(lambda _, args, times=times: times.append(args[0].tolist()))
        out = run(host, patcher, (0, 257, 417, 999), steps=2)
        assert out.isfinite().all()
        seen[name] = [sorted({label for call in labels for label in call}), sorted({t for call in times for t in call})]
    return seen


def half_precision(host: Host) -> dict[str, float]:
    path = tiny(host, host.base / "tiny.safetensors")
    full = run(host, load(host, path, torch.float32))
    return {str(d): relative(run(host, load(host, path, d)), full) for d in (torch.bfloat16, torch.float16)}


def learned_variance_is_dropped(host: Host) -> list[int]:
    return list(run(host, load(host, tiny(host, host.base / "tiny.safetensors"))).shape)


def odd_sizes(host: Host) -> list[int]:
    """Sizes that the patch does not divide are padded and cropped; other sizes get new positions."""
    path = tiny(host, host.base / "tiny.safetensors")
    return [list(run(host, load(host, path), side=s, height=h).shape) for s, h in ((72, 72), (96, 64))]


def lora_equals_merged_weights(host: Host) -> dict[str, float]:
    """A LoRA through core's loader against the same product added to the checkpoint, before and after unloading."""
    import comfy.model_management
    import comfy.sd
    import safetensors.torch

    path = tiny(host, host.base / "tiny.safetensors")
    generator = torch.Generator().manual_seed(2)
    lora, tensors = {}, safetensors.torch.load_file(path)
    for layer in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
        rows, columns = tensors[f"{layer}.weight"].shape
        up, down = torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator)
        lora |= {f"diffusion_model.{layer}.lora_B.weight": up, f"diffusion_model.{layer}.lora_A.weight": down}
        tensors[f"{layer}.weight"] += 0.02 * up @ down
    merged = host.base / "merged.safetensors"
    safetensors.torch.save_file(tensors, merged, {"num_heads": "4"})
    plain = load(host, path)
    before = run(host, plain)
    patched, _ = comfy.sd.load_lora_for_models(plain, None, lora, 0.02, 0)
    with_lora, wanted = run(host, patched), run(host, load(host, str(merged)))
    weights = host.module("nodes.comfyui.quantize.weights")
    baked = weights.patched_tensors(patched)
    comfy.model_management.unload_all_models()
    return {
        "with": relative(with_lora, wanted),
        "baked": max(relative(baked[k], tensors[k]) for k in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight")),
        "baked after unloading": relative(
            weights.patched_tensors(patched)["blocks.1.mlp.fc2.weight"], tensors["blocks.1.mlp.fc2.weight"]
        ),
        "without": relative(run(host, plain), before),
        "effect": relative(with_lora, before),
    }


def low_vram(host: Host) -> dict[str, float]:
    """Weights that are cast at every call, as where the model does not fit the device."""
    import comfy.model_management

    patcher = load(host, tiny(host, host.base / "tiny.safetensors"))
    whole = run(host, patcher)
    comfy.model_management.unload_all_models()
    patcher.load(patcher.load_device, lowvram_model_memory=1)
    offloaded = sum(hasattr(m, "prev_comfy_cast_weights") for m in patcher.model.modules())
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 2.0]), torch.tensor([5, 257])
    low = patcher.model.apply_model(x, t, y=y)
    patcher.detach()
    patcher.load(patcher.load_device, full_load=True)
    high = patcher.model.apply_model(x, t, y=y)
    patcher.detach()
    return {"offloaded": offloaded, "difference": relative(low, high), "again": relative(run(host, patcher), whole)}


def text_conditioning_is_refused(host: Host) -> str:
    patcher = load(host, tiny(host, host.base / "tiny.safetensors"))
    text = [[torch.zeros(1, 77, 768), {}]]
    (latent,) = host.nodes.EmptyLatentImage().generate(64, 64, 1)
    try:
        host.nodes.common_ksampler(patcher, 0, 1, 1.0, "euler", "normal", text, text, latent)
    except ValueError as error:
        return str(error)
    return ""


def easycache_applies(host: Host) -> bool:
    """Core's EasyCache, which needs the hook for diffusion models that not every family has, changes the result."""
    import comfy_extras.nodes_easycache as easycache

    patcher = load(host, "demo")
    fast = easycache.EasyCacheNode.execute(patcher, 0.5, 0.1, 0.95, False).args[0]
    return not torch.equal(run(host, fast, (1, 2), 32, 12), run(host, patcher, (1, 2), 32, 12))


def quantized_file(host: Host) -> str:
    core = host.module("qandc_core")
    model = core.quantize_model(core.load_dit("demo"), 8, 8)
    path = host.base / "quantized.safetensors"
    host.module("qandc_core.checkpoints.quantized").save_quantized(model, path)
    return str(path)


def pictures(host: Host, patcher):
    return run(host, patcher, (1, 2), 32, 4)


def quantized_files_in_half_precision(host: Host) -> dict[str, float]:
    """Where the device computes in half precision natively, so that nothing casts what is left in float32."""
    import comfy.model_management as mm

    path, cast = quantized_file(host), mm.unet_manual_cast
    full = pictures(host, load(host, path))
    mm.unet_manual_cast = lambda *args, **kwargs: None
    try:
        return {str(d): relative(pictures(host, load(host, path, d)), full) for d in (torch.bfloat16, torch.float16)}
    finally:
        mm.unet_manual_cast = cast


def quantized_file_with_lazy_layers(host: Host) -> bool:
    """Under dynamic VRAM core's layers hold no tensors before they are loaded."""
    import comfy.memory_management

    path = quantized_file(host)
    full = pictures(host, load(host, path))
    comfy.memory_management.aimdo_enabled = True
    try:
        patcher = load(host, path)
    finally:
        comfy.memory_management.aimdo_enabled = False
    return torch.equal(pictures(host, patcher), full)


def second_copies(host: Host) -> dict[str, bool]:
    """What core builds from a model's recipe where it needs a copy that is not dynamic."""
    found = {}
    config = host.module("qandc_core.quantization.model").QuantizationConfig()
    plain = load(host, "demo")
    made, _ = host.module("nodes.comfyui.quantize.paper").quantized_patcher(plain, 8, 8, None, config)
    for name, patcher in {"demo": plain, "quantized file": load(host, quantized_file(host)), "quantized": made}.items():
        function, arguments = patcher.cached_patcher_init
        copy = function(*arguments, disable_dynamic=True)
        found[name] = torch.equal(pictures(host, copy), pictures(host, patcher)) and copy.model is not patcher.model
    return found


def bypass_lora_is_refused(host: Host) -> str:
    patcher = load(host, "demo").clone()
    patcher.injections["bypass_lora"] = [object()]
    config = host.module("qandc_core.quantization.model").QuantizationConfig()
    try:
        host.module("nodes.comfyui.quantize.paper").quantized_patcher(patcher, 8, 8, None, config)
    except ValueError as error:
        return str(error)
    return ""


def changes_after_the_method_paper(host: Host) -> dict[str, str]:
    """What a LoRA, a LoRA hook and a merge on either side say."""
    import comfy.hooks
    import comfy.sd
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    config = host.module("qandc_core.quantization.model").QuantizationConfig()
    plain = load(host, tiny(host, host.base / "tiny.safetensors"))
    made, _ = host.module("nodes.comfyui.quantize.paper").quantized_patcher(plain, 8, 8, None, config)
    lora = {f"diffusion_model.blocks.0.attn.qkv.lora_{side}.weight": torch.ones(shape) for side, shape in
            (("B", (288, 1)), ("A", (1, 96)))}  # fmt: skip
    said = {}
    for model, patcher in {"made": made, "clone": made.clone(), "file": load(host, quantized_file(host))}.items():
        for change, attempt in {
            "LoRA": lambda p: comfy.sd.load_lora_for_models(p, None, lora, 0.1, 0),
            "hook": lambda p: p.clone().add_hook_patches(comfy.hooks.WeightHook(), {}),
            "model1": lambda p: ModelMergeSimple().merge(p, plain, 0.5),
            "model2": lambda p: ModelMergeSimple().merge(plain, p, 0.5),
        }.items():
            try:
                attempt(patcher)
                said[f"{model}, {change}"] = ""
            except ValueError as error:
                said[f"{model}, {change}"] = str(error)
    return said


def weak_lora_in_half_precision(host: Host) -> float:
    """Share of a LoRA below the steps of bfloat16 that the method paper gets; no bit of it survives in bfloat16."""
    import comfy.sd

    config = host.module("qandc_core.quantization.model").QuantizationConfig()
    plain = load(host, tiny(host, host.base / "tiny.safetensors", hidden_size=128), torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    up, down = torch.randn(384, 2, generator=generator), torch.randn(2, 128, generator=generator)
    weight = plain.model.diffusion_model.blocks[0].attn.qkv.weight.float()
    up *= 0.005 * weight.norm() / (up @ down).norm()
    lora = {
        "diffusion_model.blocks.0.attn.qkv.lora_B.weight": up,
        "diffusion_model.blocks.0.attn.qkv.lora_A.weight": down,
    }
    patched, _ = comfy.sd.load_lora_for_models(plain, None, lora, 1.0, 0)
    paper = host.module("nodes.comfyui.quantize.paper")
    without, with_lora = (
        paper.quantized_patcher(p, 8, 8, None, config)[0].model.diffusion_model.blocks[0].attn.qkv
        for p in (plain, patched)
    )
    values = [layer.weight_codes().float() * layer.weight_scale[:, None] for layer in (without, with_lora)]
    delta = up @ down
    return float(((values[1] - values[0]) * delta).sum() / delta.square().sum())


def fingerprints_ignore_what_was_sampled(host: Host) -> bool:
    """A LoRA that a clone has patched into the shared weights does not change what a model is known by."""
    import comfy.sd

    patcher = load(host, tiny(host, host.base / "tiny.safetensors"))
    del patcher.model.diffusion_model.qandc_fingerprint
    weights = host.module("nodes.comfyui.quantize.weights")
    before = weights.fingerprint_of(patcher)
    lora = {f"diffusion_model.blocks.0.attn.qkv.lora_{side}.weight": torch.ones(shape) for side, shape in
            (("B", (288, 1)), ("A", (1, 96)))}  # fmt: skip
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 0.1, 0)
    run(host, patched)
    changed = patcher.model.diffusion_model.blocks[0].attn.qkv.weight.clone()
    same = weights.fingerprint_of(patcher) == before
    import comfy.model_management

    comfy.model_management.unload_all_models()
    return same and not torch.equal(patcher.model.diffusion_model.blocks[0].attn.qkv.weight, changed)


if __name__ == "__main__":
    main({
        "ids and timesteps": ids_and_timesteps_survive,
        "half precision": half_precision,
        "learned variance": learned_variance_is_dropped,
        "odd sizes": odd_sizes,
        "LoRA": lora_equals_merged_weights,
        "low VRAM": low_vram,
        "text conditioning": text_conditioning_is_refused,
        "EasyCache applies": easycache_applies,
        "quantized file, half precision": quantized_files_in_half_precision,
        "quantized file, lazy layers": quantized_file_with_lazy_layers,
        "second copies": second_copies,
        "bypass LoRA": bypass_lora_is_refused,
        "changes after the method paper": changes_after_the_method_paper,
        "weak LoRA, method paper": weak_lora_in_half_precision,
        "fingerprints": fingerprints_ignore_what_was_sampled,
    })  # fmt: skip
