"""How much of a LoRA arrives in the weights of a quantized model, and what a quantized model's patcher does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from host import Host, main
from quantized_families import available, load, quantize, save

FAMILY = "Flux"
RELATIVE = {"strong": 0.5, "weak": 0.01}  # |delta| / |W|
SKIP = ("double_blocks",)


def scaled_float8(host: Host) -> str:
    """The family's file with its blocks' layers in core's scaled float8."""
    import safetensors.torch

    path = Path(load(host, FAMILY).cached_patcher_init[1][0])
    tensors = {}
    for key, value in safetensors.torch.load_file(path).items():
        name, _, part = key.rpartition(".")
        tensors[key] = value
        if part == "weight" and "_blocks." in name and value.ndim == 2:
            scale = value.float().abs().max() / 448
            tensors[key], tensors[f"{name}.weight_scale"] = (value.float() / scale).to(torch.float8_e4m3fn), scale
            mark = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{name}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    scaled = path.with_name("scaled.safetensors")
    safetensors.torch.save_file(tensors, scaled)
    return str(scaled)


def sources(host: Host) -> dict:
    import comfy.sd

    plain = load(host, FAMILY)
    path = plain.cached_patcher_init[1][0]
    float8 = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float8_e4m3fn})
    return {"float": plain, "float8": float8, "scaled float8": comfy.sd.load_diffusion_model(scaled_float8(host))}


def decoded(weight) -> torch.Tensor:
    return (weight.dequantize() if hasattr(weight, "_layout_cls") else weight).float().cpu()


def effective(module, weight=None) -> torch.Tensor:
    """The matrix that a layer multiplies by, with what is beside its weight."""
    found = decoded(module.weight if weight is None else weight)
    for extra in (getattr(module, "beside", None), getattr(module, "hooked", None)):
        found = found if extra is None else found + extra.dense().float()
    return found


def with_lora(patcher, layers: list[str], relative: float, bypass: bool = False, whole: bool = False) -> tuple:
    """A clone with a LoRA of this size on each layer, through core's loader, and the change of each weight.

    Core's bypass loader leaves the weights and adds what the LoRA answers to each layer's inputs. `whole`: the file
    holds the change itself instead of its factors.
    """
    import comfy.sd

    generator, lora, deltas = torch.Generator().manual_seed(7), {}, {}
    for name in layers:
        weight = decoded(patcher.model.diffusion_model.get_submodule(name).weight)
        up = torch.randn(weight.shape[0], 4, generator=generator)
        down = torch.randn(4, weight.shape[1], generator=generator)
        up *= relative * weight.norm() / (up @ down).norm()
        deltas[name] = up @ down
        parts = {"diff": up @ down} if whole else {"lora_B.weight": up, "lora_A.weight": down}
        lora |= {f"diffusion_model.{name}.{part}": value for part, value in parts.items()}
    if bypass:
        patched, _ = comfy.sd.load_bypass_lora_for_models(patcher, None, lora, 1.0, 0)
        return patched, deltas
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)
    assert len(patched.patches) == len(layers), "core's loader did not take the LoRA"
    return patched, deltas


def held(patcher, name: str) -> torch.Tensor:
    """The weight that a file of the model holds: its patches are in it."""
    key = f"diffusion_model.{name}.weight"
    return decoded(patcher.patch_weight_to_device(key, device_to=torch.device("cpu"), return_weight=True))


def share(patcher, plain, deltas: dict[str, torch.Tensor], names: list[str]) -> float:
    """Projection of what the LoRA changes in these layers on the LoRA itself: 1 where all of it arrives."""
    changed = sum(float(((held(patcher, n) - held(plain, n)) * deltas[n]).sum()) for n in names)
    return changed / sum(float(deltas[n].square().sum()) for n in names)


def arrives(host: Host) -> dict[str, float]:
    """Source, format, size and way of the LoRA -> its share in quantized layers, in those left out, and in the file."""
    import comfy.sd

    found = {}
    for source, full in sources(host).items():
        # Without a pattern at all some layers of float8 sources would be left out nowhere.
        layers = [name for name, m in full.model.diffusion_model.named_modules() if "_blocks." in name and linear(m)]
        kept = [name for name in layers if SKIP[0] in name]
        packed = [name for name in layers if name not in kept]
        for format in available(host):
            plain, _ = quantize(host, full, format, rounding="nearest", skip=SKIP)
            for size, relative in RELATIVE.items():
                patched, deltas = with_lora(full, layers, relative)
                for how in ("bake", "keep"):
                    lossy, _ = quantize(host, patched, format, rounding="nearest", skip=SKIP, loras=how)
                    key = f"{source}, {format}, {size}, {how}"
                    found[f"{key}: quantized"] = share(lossy, plain, deltas, packed)
                    found[f"{key}: left out"] = share(lossy, plain, deltas, kept)
                    again = comfy.sd.load_diffusion_model(str(save(lossy, "lora")))
                    found[f"{key}: saved"] = share(again, plain, deltas, layers)
                found[f"{source}, {format}, {size}: stock"] = share(patched, full, deltas, layers)
    return found


def linear(module) -> bool:
    return hasattr(module, "comfy_cast_weights") and hasattr(module, "in_features")


def merges(host: Host) -> dict[str, float]:
    """Share of a merge that arrives with a quantized model on either side; 1 is all of it."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    full = load(host, FAMILY)
    names = [n for n, m in full.model.diffusion_model.named_modules() if "_blocks." in n and linear(m)]
    other, deltas = with_lora(full, names, 0.5)
    found = {}
    for format in available(host):
        quantized = {name: quantize(host, p, format, rounding="nearest")[0] for name, p in (("a", full), ("b", other))}
        wanted = {name: 0.5 * delta for name, delta in deltas.items()}
        for key, first, second in (
            ("model2", full, quantized["b"]),
            ("model1", quantized["a"], other),
            ("both", quantized["a"], quantized["b"]),
        ):
            (merged,) = ModelMergeSimple().merge(first, second, 0.5)
            found[f"{format}, {key}"] = share(merged, first, wanted, names)
    return found


def hooks(host: Host) -> dict[str, float | bool]:
    """LoRA hooks on the model, twice so that their cached weights are used, and what is left after them."""
    import comfy.hooks

    full, found = load(host, FAMILY), {}
    names = block_layers(full)
    for format in available(host):
        lossy, _ = quantize(host, full, format, rounding="nearest")
        before = {name: held(lossy, name) for name in names}
        for size, relative in RELATIVE.items():
            patched, deltas = with_lora(lossy, names, relative)
            hook = comfy.hooks.WeightHook()
            group = comfy.hooks.HookGroup()
            group.add(hook)
            user = lossy.clone()
            user.add_hook_patches(hook, {key: patch[0][1] for key, patch in patched.patches.items()})
            for turn in ("first", "cached"):
                user.apply_hooks(group)
                now = {name: effective(user.model.diffusion_model.get_submodule(name)) for name in names}
                found[f"{format}, {size}, {turn}"] = projected({n: now[n] - before[n] for n in names}, deltas)
                user.apply_hooks(None)
                found[f"{format}, {size}, {turn}, restored"] = all(torch.equal(held(user, n), before[n]) for n in names)
    return found


def block_layers(patcher) -> list[str]:
    return [name for name, m in patcher.model.diffusion_model.named_modules() if "_blocks." in name and linear(m)]


def projected(changes: dict[str, torch.Tensor], deltas: dict[str, torch.Tensor]) -> float:
    """Projection of changes on what the LoRA changes: 1 where all of it arrives."""
    found = sum(float((changes[name] * deltas[name]).sum()) for name in deltas)
    return found / sum(float(delta.square().sum()) for delta in deltas.values())


def kept(host: Host) -> dict[str, dict]:
    """A LoRA on a quantized model that is loaded whole, in part, under dynamic VRAM and compiled, and its traces."""
    from cache_compile import Graphs, steady_memory
    from host import relative
    from quantized_use import aot_eager, compiled
    from stock_models import STOCK, run

    steady_memory()
    full, model, found = load(host, FAMILY), STOCK[FAMILY], {}
    names = block_layers(full)
    for format in available(host):
        lossy, _ = quantize(host, full, format, rounding="nearest")
        plain = run(lossy, model)
        for size, amount, whole in [*((*pair, False) for pair in RELATIVE.items()), ("whole matrix", 0.5, True)]:
            patched, deltas = with_lora(lossy, names, amount, whole=whole)
            part = found[f"{format}, {size}"] = loadings(host, lossy, patched, deltas)
            out = run(patched, model)
            wanted = run(with_lora(full, names, amount, whole=whole)[0], model)
            part["samples"], part["samples, without"] = relative(out, wanted), relative(plain, run(full, model))
            for name, backend in (("graphs", Graphs()), ("aot_eager", aot_eager)) if size == "weak" else ():
                part[name] = relative(run(compiled(patched, backend), model), out)
                part[f"{name}, without"] = relative(run(compiled(lossy, backend), model), plain)
    return found


def loadings(host: Host, lossy, patched, deltas: dict[str, torch.Tensor]) -> dict:
    """The share of the LoRA that arrives however the model is loaded, and what it takes and leaves."""
    weights, network = host.module("nodes.comfyui.quantize.weights"), lossy.model.diffusion_model
    lossy.detach()
    base = {name: network.get_submodule(name).weight for name in deltas}

    def share_of(weight_of) -> float:
        modules = {name: network.get_submodule(name) for name in deltas}
        return projected(
            {n: effective(module, weight_of(module)) - decoded(base[n]) for n, module in modules.items()}, deltas
        )

    def layouts() -> list[str]:
        weights = [network.get_submodule(name).weight for name in deltas]
        return sorted({getattr(weight, "_layout_cls", str(weight.dtype)) for weight in weights})

    def dynamic(module) -> torch.Tensor:
        return cast_dynamic(host, patched, module)

    tensors, bytes_before, part = weights.base_tensors(patched), lossy.model_size(), {}
    patched.load(patched.load_device, full_load=True)
    part["whole"] = share_of(lambda module: module.weight)
    part["layouts"] = layouts()
    part["bytes"] = [bytes_before, patched.model_size(), patched.loaded_size(), size_of(patched.model)]
    loaded = weights.base_tensors(patched)
    part["base"] = loaded.keys() == tensors.keys() and all(equal(loaded[key], tensors[key]) for key in tensors)
    patched.detach()
    part["restored"] = all(same_packed(network.get_submodule(name).weight, base[name]) for name in base)

    patched.load(patched.load_device, lowvram_model_memory=1)
    part["low VRAM"] = share_of(cast)
    patched.detach()
    # Not all of it fits: some layers are patched at once and some at every call.
    patched.load(patched.load_device, lowvram_model_memory=patched.model_size() * 2 // 3)
    part["in part"] = share_of(cast)
    part["layouts in part"] = layouts()
    part["bytes in part"] = [patched.loaded_size(), loaded_modules(patched.model)]
    patched.partially_unload(patched.offload_device, 1e9)
    part["bytes unloaded"] = [patched.loaded_size(), loaded_modules(patched.model)]
    part["unloaded"] = share_of(cast)
    patched.detach()
    patched.load(patched.load_device, lowvram_model_memory=1)
    part["dynamic"] = share_of(dynamic)
    patched.detach()
    return part


def size_of(model) -> int:
    import comfy.model_management

    besides = [getattr(module, "beside", None) for module in model.modules()]
    return comfy.model_management.module_size(model) + sum(beside.nbytes for beside in besides if beside is not None)


def loaded_modules(model) -> int:
    """Bytes of the modules whose patches are in them."""
    return sum(size_of(module) for module in model.modules() if getattr(module, "comfy_patched_weights", False))


def cast(module) -> torch.Tensor:
    """The weight that core casts for a call."""
    import comfy.ops

    dtype = torch.float32 if len(module.weight_function) else module.weight.dtype
    weight, _ = comfy.ops.cast_bias_weight(module, dtype=dtype, device=torch.device("cpu"), bias_dtype=dtype)
    return weight


def cast_dynamic(host: Host, patcher, module) -> torch.Tensor:
    """The weight that core makes for a call under dynamic VRAM, with the layer set up as the dynamic patcher does.

    That patcher itself needs a GPU.
    """
    import comfy.memory_management
    import comfy.model_patcher
    import comfy.ops
    import comfy.utils

    key = next(key for key, layer in patcher.layers() if layer is module)
    module.seed_key = key.removesuffix(".weight")
    module.weight_function, module.bias_function = [], []
    module.weight_lowvram_function = comfy.model_patcher.LowVramPatch(key, patcher.patches)
    patcher.settle()
    parts = [module.weight, module.bias]
    buffer = torch.empty(comfy.memory_management.vram_aligned_size(parts), dtype=torch.uint8)
    views = comfy.memory_management.interpret_gathered_like(parts, buffer)
    for view, part in zip(views, parts):
        if part is not None:
            view.copy_(part)
    module._prefetch = {
        "resident": False, "signature": None, "needs_cast": False, "xfer_dest": buffer,
        "cast_geometry": comfy.memory_management.tensors_to_geometries(parts),
    }  # fmt: skip
    dtype = module.weight.dtype
    weight, _ = comfy.ops.resolve_cast_module_with_vbar(
        module, dtype, torch.device("cpu"), dtype, torch.float32, want_requant=True
    )
    del module._prefetch, module.weight_lowvram_function
    module.weight_function = []
    return weight


def same_packed(a, b) -> bool:
    parts, others = a.state_dict(""), b.state_dict("")
    return parts.keys() == others.keys() and all(equal(parts[key], others[key]) for key in parts)


def saving(host: Host) -> dict[str, dict]:
    """What core's patcher hands to a file where weights are cast at every call, as with low VRAM, against the plain."""
    import comfy.model_management

    full, found = load(host, FAMILY), {}
    for format in available(host):
        lossy, report = quantize(host, full, format, rounding="nearest")
        patched, _ = with_lora(lossy, [layer.name for layer in report.layers], 0.5)
        for kind, patcher in (("plain", lossy), ("LoRA", patched)):
            comfy.model_management.unload_all_models()
            patcher.load(patcher.load_device, full_load=True)
            wanted = {key: value.to("cpu") for key, value in patcher.state_dict_for_saving().items()}
            patcher.detach()
            patcher.load(patcher.load_device, lowvram_model_memory=1)
            state = patcher.state_dict_for_saving()
            written = {key: value.to("cpu") for key, value in state.items()}
            patcher.detach()
            same = wanted.keys() == written.keys()
            found[f"{format}, {kind}"] = {
                "same": same and all(equal(written[key], wanted[key]) for key in wanted),
                "offloaded": any(type(value).__name__ == "SavedPiece" for value in state.values()),
                "formats": sorted({mark["format"] for mark in marks(written)}),
            }
    return found


def marks(tensors: dict[str, torch.Tensor]) -> list[dict]:
    return [json.loads(bytes(value.tolist())) for key, value in tensors.items() if key.endswith(".comfy_quant")]


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


CHECKS = {"arrives": arrives, "merges": merges, "hooks": hooks, "saving": saving, "kept": kept}

if __name__ == "__main__":
    chosen = [name for name in CHECKS if name in sys.argv[3:]] or list(CHECKS)
    main({name: CHECKS[name] for name in chosen})
