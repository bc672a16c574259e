"""Adapters of every kind on quantized models, through core's own loaders: how exact, and what stays of the weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from host import Host, main, relative
from quantized_families import available, load, quantize
from quantized_lora import FAMILY, block_layers, decoded, same_packed
from stock_models import STOCK, run

RANK, SIZE = 4, 0.3  # |delta| / |W|
SEEDS = {"LoRA": 5}  # of the others one
STRENGTHS = (0.5, -1.0, 0.25)


def drawn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def sides(size: int) -> tuple[int, int]:
    """A small factor of the size and the other one."""
    small = next(factor for factor in (8, 4, 2, 1) if size % factor == 0)
    return small, size // small


def lora(g: torch.Generator, n: int, k: int) -> dict[str, torch.Tensor]:
    return {"lora_B.weight": drawn(g, n, RANK), "lora_A.weight": drawn(g, RANK, k), "alpha": torch.tensor(2.0 * RANK)}


def loha(g: torch.Generator, n: int, k: int) -> dict[str, torch.Tensor]:
    parts = {f"hada_w{i}_{side}": drawn(g, *shape) for i in (1, 2) for side, shape in (("a", (n, 3)), ("b", (3, k)))}
    return {**parts, "alpha": torch.tensor(1.5)}


def lokr(g: torch.Generator, n: int, k: int) -> dict[str, torch.Tensor]:
    (a, c), (b, d) = sides(n), sides(k)
    return {
        "lokr_w1": drawn(g, a, b), "lokr_w2_a": drawn(g, c, RANK), "lokr_w2_b": drawn(g, RANK, d),
        "alpha": torch.tensor(6.0),
    }  # fmt: skip


def full_lokr(g: torch.Generator, n: int, k: int) -> dict[str, torch.Tensor]:
    (a, c), (b, d) = sides(n), sides(k)
    return {"lokr_w1": drawn(g, a, b), "lokr_w2": drawn(g, c, d)}


def dora(g: torch.Generator, n: int, k: int) -> dict[str, torch.Tensor]:
    return {**lora(g, n, k), "dora_scale": drawn(g, n, 1).abs() + 0.5}


def diff(g: torch.Generator, n: int, k: int) -> dict[str, torch.Tensor]:
    return {"diff": drawn(g, n, k)}


def glora(g: torch.Generator, n: int, k: int) -> dict[str, torch.Tensor]:
    shapes = {"a1": (k, RANK), "a2": (RANK, k), "b1": (n, RANK), "b2": (RANK, n)} if n == k else {}
    shapes = shapes or {"a1": (k, RANK), "a2": (RANK, k), "b1": (n, RANK), "b2": (RANK, k)}
    return {f"{name}.weight": drawn(g, *shape) for name, shape in shapes.items()}


KINDS: dict[str, Callable[[torch.Generator, int, int], dict[str, torch.Tensor]]] = {
    "LoRA": lora, "LoHa": loha, "LoKr": lokr, "full LoKr": full_lokr, "DoRA": dora, "diff": diff, "GLoRA": glora,
}  # fmt: skip
SCALED = ("lora_B.weight", "hada_w1_a", "lokr_w1", "diff", "b1.weight")  # the part that the delta is proportional to


def file_of(kind: str, patcher, seed: int, layers: list[str]) -> dict[str, torch.Tensor]:
    """A LoRA file of this kind for the layers, each a share SIZE of the weight."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name in layers:
        weight = decoded(patcher.model.diffusion_model.get_submodule(name).weight)
        parts = KINDS[kind](generator, *weight.shape)
        plain = {part: value for part, value in parts.items() if part != "dora_scale"}
        size = float(delta_of(plain, weight).norm())
        for part in SCALED:
            if part in parts:
                parts[part] = parts[part] * (SIZE * float(weight.norm()) / size)
        if "dora_scale" in parts:
            parts["dora_scale"] = weight.norm(dim=1, keepdim=True) * (
                0.9 + 0.2 * torch.rand(len(weight), 1, generator=generator)
            )
        found |= {f"diffusion_model.{name}.{part}": value for part, value in parts.items()}
    return found


def delta_of(parts: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """What core makes of one layer's adapter at strength 1."""
    import comfy.lora

    patches = comfy.lora.load_lora({f"x.{part}": value for part, value in parts.items()}, {"x": "x.weight"})
    ((_, value),) = patches.items()
    return comfy.lora.calculate_weight([(1.0, value, 1.0, None, None)], weight.clone(), "x.weight") - weight


def on(patcher, file: dict[str, torch.Tensor], strength: float = 1.0):
    """A clone with the file's LoRA, through core's loader."""
    import comfy.sd

    patched, _ = comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)
    assert len(patched.patches) >= len({key.rpartition(".")[0].removesuffix(".lora_A") for key in file}) // 8
    return patched


def errors(host: Host) -> dict[str, Any]:
    """Errors of the layers' answers against full precision with the same adapter, on average: kept on the quantized
    model, and baked in before. Of LoRAs also the errors of samples, each of another network: those of one network with
    several LoRAs share the errors of its weights, which a LoRA that is baked in rounds anew.
    """
    original, model, found = load(host, FAMILY), STOCK[FAMILY], {}
    layers = block_layers(original)
    for kind in KINDS:
        for seed in range(SEEDS.get(kind, 1)):
            full = on(original, file_of("diff", original, 100 + seed, layers)) if seed else original
            file = file_of(kind, original, seed, layers)
            source = on(full, file)
            exact = answers_of(source, layers)
            wanted = run(source, model) if kind == "LoRA" else None
            for format in available(host):
                lossy, _ = quantize(host, full, format, rounding="nearest")
                baked, _ = quantize(host, source, format, rounding="nearest")
                patched, row = on(lossy, file), {}
                for name, patcher in (("kept", patched), ("baked", baked)):
                    answers = answers_of(patcher, layers)
                    row[name] = sum(map(relative, answers, exact)) / len(layers)
                    if wanted is not None:
                        row[f"{name}, samples"] = relative(run(patcher, model), wanted)
                row["beside"] = sum(beside is not None for beside in patched.besides().values())
                found.setdefault(f"{format}, {kind}", []).append({**row, "layers": len(layers)})
    return found


def answers_of(patcher, layers: list[str]) -> list[torch.Tensor]:
    patcher.detach()  # another clone's patches, of the last run
    patcher.load(patcher.load_device, full_load=True)
    found = [answer(patcher, name) for name in layers]
    patcher.detach()
    return found


def effects(host: Host) -> dict[str, dict[str, float]]:
    """Least and largest share, over the layers, of what each adapter does that arrives in the layer's answers."""
    full, found = load(host, FAMILY), {}
    layers = block_layers(full)
    for format in available(host):
        lossy, _ = quantize(host, full, format, rounding="nearest")
        for kind in KINDS:
            file = file_of(kind, full, 5, layers)
            for strength in (1.0, -0.7):
                shares = shares_of(lossy, on(lossy, file, strength), on(full, file, strength), layers)
                found[f"{format}, {kind}, {strength}"] = {"least": min(shares), "most": max(shares)}
        found[f"{format}, two"] = two(lossy, full, layers)
    return found


def two(lossy, full, layers: list[str]) -> dict[str, float]:
    """Of two adapters of different kinds at once."""
    first, second = file_of("LoRA", full, 1, layers), file_of("LoKr", full, 2, layers)
    shares = shares_of(lossy, on(on(lossy, first, 0.8), second, -0.5), on(on(full, first, 0.8), second, -0.5), layers)
    return {"least": min(shares), "most": max(shares)}


def shares_of(plain, patched, full, layers: list[str]) -> list[float]:
    """Projection of the change of each layer's answer on that in full precision."""
    answers = [answers_of(patcher, layers) for patcher in (patched, plain)]
    changes = [exact_change(full, name) for name in layers]
    return [float(((a - b) * c).sum() / c.square().sum()) for a, b, c in zip(*answers, changes)]


def exact_change(full, name: str) -> torch.Tensor:
    """What the patches of a model in full precision add to a layer's answer."""
    import comfy.lora

    key, base = f"diffusion_model.{name}.weight", decoded(full.model.diffusion_model.get_submodule(name).weight)
    return inputs_of(full, name) @ (comfy.lora.calculate_weight(full.patches[key], base.clone(), key) - base).T


def inputs_of(patcher, name: str) -> torch.Tensor:
    layer = patcher.model.diffusion_model.get_submodule(name)
    return torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))


def answer(patcher, name: str) -> torch.Tensor:
    return patcher.model.diffusion_model.get_submodule(name)(inputs_of(patcher, name))


@contextmanager
def rounded_shapes() -> Iterator[list]:
    """Collects the shapes of all tensors that are quantized while it lasts, inputs aside: they are no such tensors."""
    import comfy_kitchen.tensor as kitchen

    found, original = [], kitchen.QuantizedTensor.from_float

    def from_float(tensor, *args, **kwargs):
        found.append(list(tensor.shape))
        return original(tensor, *args, **kwargs)

    with patch.object(kitchen.QuantizedTensor, "from_float", from_float):
        yield found


def strengths(host: Host) -> dict[str, Any]:
    """Samples at several strengths: the codes stay where they are in memory, and nothing is rounded."""
    full, model, found = load(host, FAMILY), STOCK[FAMILY], {}
    layers = block_layers(full)
    file = file_of("LoRA", full, 3, layers)
    wanted, exact = [run(on(full, file, strength), model) for strength in STRENGTHS], run(full, model)
    for format in available(host):
        lossy, _ = quantize(host, full, format, rounding="nearest")
        plain, network = run(lossy, model), lossy.model.diffusion_model
        held = {name: network.get_submodule(name).weight for name in layers}
        places = {name: weight._qdata.data_ptr() for name, weight in held.items()}
        with rounded_shapes() as rounded:
            outputs = [run(on(lossy, file, strength), model) for strength in STRENGTHS]
            now = {name: network.get_submodule(name).weight._qdata.data_ptr() for name in layers}
            again, after = run(on(lossy, file, STRENGTHS[0]), model), run(lossy, model)
        found[format] = {
            "errors": [relative(output, full) for output, full in zip(outputs, wanted)],
            "error without": relative(plain, exact),
            "rounded": rounded, "same place": now == places,
            "again": torch.equal(again, outputs[0]), "after": torch.equal(after, plain),
            "restored": all(same_packed(network.get_submodule(name).weight, held[name]) for name in layers),
            "layouts": sorted({network.get_submodule(name).weight._layout_cls for name in layers}),
            "left": sum(layer.beside is not None for _, layer in lossy.layers()),
        }  # fmt: skip
    return found


def parts_of_weights(host: Host) -> dict[str, float]:
    """Share of LoRAs of to_q, to_k, to_v and of a half of a layer's inputs, which are parts of one weight here."""
    import comfy.lora

    full, found = load(host, FAMILY), {}
    width = full.model.model_config.unet_config["hidden_size"]
    names = [f"transformer.transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")]
    names += ["transformer.single_transformer_blocks.0.proj_out", "transformer.single_transformer_blocks.0.proj_mlp"]
    targets = comfy.lora.model_lora_keys_unet(full.model, {})
    generator, file, layers = torch.Generator().manual_seed(2), {}, set()
    for name in names:
        target = targets[name]
        key, offset = (target, None) if isinstance(target, str) else (target[0], target[1])
        layer = key.removeprefix("diffusion_model.").removesuffix(".weight")
        rows, columns = full.model.diffusion_model.get_submodule(layer).weight.shape
        if offset is not None:
            rows, columns = [(offset[2] if offset[0] == dim else size) for dim, size in enumerate((rows, columns))]
        file[f"{name}.lora_B.weight"] = drawn(generator, rows, RANK) / width
        file[f"{name}.lora_A.weight"] = drawn(generator, RANK, columns)
        layers.add(layer)
    for format in available(host):
        lossy, _ = quantize(host, full, format, rounding="nearest")
        patched = on(lossy, file)
        shares = shares_of(lossy, patched, on(full, file), sorted(layers))
        found[format] = {
            "least": min(shares),
            "most": max(shares),
            "beside": sum(map(bool, patched.besides().values())),
        }
    return found


def fused_activations(host: Host) -> dict[str, float]:
    """Share of a LoRA in a layer that Wan hands to `linear_input_act` with its activation, kept and by the bypass
    loader.
    """
    import comfy.sd

    full, model, found = load(host, "Wan 2.1"), STOCK["Wan 2.1"], {}
    layers = [name for name in block_layers_of(full) if name.endswith("ffn.2")]
    file = file_of("LoRA", full, 4, layers)
    plain, wanted = run(full, model), run(on(full, file), model)
    for format in available(host):
        lossy, _ = quantize(host, full, format, rounding="nearest")
        base = run(lossy, model)
        bypass, _ = comfy.sd.load_bypass_lora_for_models(lossy, None, file, 1.0, 0)
        for name, patcher in (("kept", on(lossy, file)), ("bypass", bypass)):
            change = run(patcher, model) - base
            found[f"{format}, {name}"] = float((change * (wanted - plain)).sum() / (wanted - plain).square().sum())
        found[f"{format}, after"] = relative(run(lossy, model), base)
    return found


def block_layers_of(patcher) -> list[str]:
    return [
        name
        for name, m in patcher.model.diffusion_model.named_modules()
        if "blocks." in name and hasattr(m, "in_features")
    ]


def hooked(host: Host) -> dict[str, Any]:
    """A LoRA hook on top of a LoRA, as a sampler applies it: share of both together, and what is left after it."""
    import comfy.hooks

    full, found = load(host, FAMILY), {}
    layers = block_layers(full)
    for format in available(host):
        lossy, _ = quantize(host, full, format, rounding="nearest")
        for kind, other in (("LoRA", "LoHa"), ("LoRA", "diff"), ("diff", "LoRA"), ("diff", "diff")):
            first, second = file_of(kind, full, 1, layers), file_of(other, full, 2, layers)
            user, exact = on(lossy, first), on(on(full, first), second)
            group = comfy.hooks.HookGroup()
            group.add(hook := comfy.hooks.WeightHook())
            user.load(user.load_device, full_load=True)
            before = [answer(user, name) for name in layers]
            user.add_hook_patches(hook, {key: patches[0][1] for key, patches in on(lossy, second).patches.items()})
            part = found[f"{format}, {other} on {kind}"] = {}
            for turn in ("first", "cached"):
                user.apply_hooks(group)
                now = [answer(user, name) for name in layers]
                user.apply_hooks(None)
                part[turn] = share_of_answers(user, lossy, exact, now, layers)
                part[f"{turn}, restored"] = all(torch.equal(answer(user, n), b) for n, b in zip(layers, before))
            user.detach()
    return found


def share_of_answers(user, lossy, exact, now: list[torch.Tensor], layers: list[str]) -> float:
    """Of what all patches of `exact` do to the answers of the layers without any."""
    user.detach()
    lossy.load(lossy.load_device, full_load=True)
    changes = [(output - answer(lossy, name), exact_change(exact, name)) for name, output in zip(layers, now)]
    lossy.detach()
    user.load(user.load_device, full_load=True)
    return sum(float((a * b).sum()) for a, b in changes) / sum(float(b.square().sum()) for _, b in changes)


CHECKS = {
    "errors": errors, "effects": effects, "strengths": strengths, "parts": parts_of_weights,
    "fused activations": fused_activations, "hooked": hooked,
}  # fmt: skip

if __name__ == "__main__":
    chosen = [name for name in CHECKS if name in sys.argv[3:]] or list(CHECKS)
    main({name: CHECKS[name] for name in chosen})
