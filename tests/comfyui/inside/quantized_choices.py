"""What Quantize makes of its inputs: layers, limits, patterns, calibrations; and memory that runs out."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import families
import torch
from family_list import FAMILIES
from host import Host, main
from host import cancelled as cancelled_work
from quantized_families import available, calibrate, load, slug
from stock_models import STOCK

BUILT = ("SDXL", "Chroma", "Wan VACE", "Lumina 2", "HiDream-I1", "Cosmos 1", "Anima", "Hunyuan3D 2.1", "LTX-AV")


def chosen(host: Host) -> dict[str, dict[str, list[str]]]:
    """Family -> kinds of layers that are quantized, and kinds that stay; numbers are left out of the names."""
    layers, found = host.module("nodes.comfyui.quantize.layers"), {}
    for name in BUILT:
        try:
            network = families.build(FAMILIES[name]).model.diffusion_model
        except (AttributeError, TypeError, ModuleNotFoundError, KeyError):
            continue  # not in this version
        taken = {name for name, _ in layers.quantizable(network)}
        kinds = {True: set(), False: set()}
        for layer in layers.all_linears(network):
            kinds[layer in taken].add(re.sub(r"\.\d+", ".N", layer))
        found[name] = {"quantized": sorted(kinds[True]), "stay": sorted(kinds[False])}
    return found


def node(host: Host, model, format="W8A8", error=0.0, size=0, skip="", include="", calibration=None):
    """The node's output model, its formats by layer, and its text."""
    out = host.node("QandC_Quantize").execute(
        model, format, "native", error, size, skip, "bake in", "auto", calibration, include
    )
    lossy = out.args[0]
    weights = {name: m.weight for name, m in lossy.model.diffusion_model.named_modules() if hasattr(m, "weight")}
    packed = {name: weight for name, weight in weights.items() if hasattr(weight, "_layout_cls")}
    return lossy, packed, out.ui["text"][0]


def kinds(packed: dict) -> dict[str, int]:
    return dict(Counter("int8" if "INT8" in weight._layout_cls else "four bits" for weight in packed.values()))


def patterns(host: Host) -> dict[str, str]:
    """skip and include -> what the node says, and how many layers it quantizes."""
    full, found = load(host, "Flux"), {}
    for skip, include in (("", ""), ("IMG_MOD, single", ""), ("", "time_in,imgin"), ("double_blocks.0", "")):
        _, packed, text = node(host, full, skip=skip, include=include)
        found[f"{skip}/{include}"] = {"layers": len(packed), "text": text.split("\n\n|")[0], "names": sorted(packed)}
    return found


def limits(host: Host) -> dict:
    """max_size_mb and max_layer_error through the node -> number of layers in each format."""
    full, found = load(host, "Flux"), {}
    for format in available(host):
        for size in (0, 2, 10**5):
            found[f"{format}, {size} MiB"] = kinds(node(host, full, format, size=size)[1])
        for error in (0.02, 1e-6):
            try:
                found[f"{format}, {error}"] = kinds(node(host, full, format, error=error)[1])
            except ValueError as refusal:
                found[f"{format}, {error}"] = str(refusal)
    return found


def model_errors(host: Host) -> dict[str, dict]:
    """Limit of the whole model's error -> what came of it, from the coarsest format on; without one, of each format."""
    full, found = load(host, "Flux"), {}
    calibration, quantized = calibrate(host, full, STOCK["Flux"]), host.module("nodes.comfyui.wrappers").QUANTIZATION

    def result(format: str, limit: float = 0.0) -> dict:
        out = host.node("QandC_Quantize").execute(
            full, format, "native", 0.0, 0, "", "bake in", "auto", calibration, "", max_model_error=limit
        )
        report = out.args[0].model_options["transformer_options"][quantized]
        return {
            "error": report.model_error[0], "size": report.size_after, "layers": report.counts, "prefix": out.args[1],
        }  # fmt: skip

    for format in available(host):
        found[format] = result(format)
    if "W4A8" in found:
        for share in (0.6, 0.25):
            limit = share * found["W4A8"]["error"]
            found[f"within {share}"] = {"limit": limit, **result("W4A8", limit)}
        blind = replace(calibration, held_out=())
        try:
            host.node("QandC_Quantize").execute(
                full, "W4A8", "native", 0.0, 0, "", "bake in", "auto", blind, "", max_model_error=0.1
            )
        except ValueError as error:
            found["blind"] = str(error)
    return found


def cancelled(host: Host) -> dict:
    """Cancel is pressed when the fourth layer is done -> how many were until the end."""
    full = load(host, "Flux")
    before = {name: value.clone() for name, value in full.model.state_dict().items()}
    ended, done = cancelled_work(host, lambda: node(host, full), "rounding", 4)
    after = full.model.state_dict()
    same = after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    return {"ended": ended, "done": done, "same": same, "layers": len(node(host, full)[1])}


def another_calibration(host: Host) -> str:
    Calibration = host.module("qandc_core.calibration.file").Calibration
    try:
        node(host, load(host, "Flux"), calibration=Calibration("of another model", {}))
        return ""
    except ValueError as error:
        return str(error)


def blinded(patcher) -> None:
    """Gives every block one input, far above all others, that its weights ignore: rounding each token loses the rest.

    Weights and their rounding stay as harmless as before.
    """
    network = patcher.model.diffusion_model
    layers = [
        (mod.lin.bias, [attention.qkv.weight, mlp[0].weight])
        for block in network.double_blocks
        for mod, attention, mlp in (
            (block.img_mod, block.img_attn, block.img_mlp), (block.txt_mod, block.txt_attn, block.txt_mlp)
        )
    ]  # fmt: skip
    layers += [(block.modulation.lin.bias, [block.linear1.weight]) for block in network.single_blocks]
    for bias, weights in layers:
        for (shift, _, gate), weight in zip(bias.data.view(len(weights), 3, -1), weights):
            shift[0] = 1e4
            gate.fill_(30.0)
            weight.data[:, 0] = 0


def far_off(host: Host) -> dict[str, str]:
    """What is said of a model whose layers round well and whose answers do not, and of the same model before."""
    found = {}
    for name in ("harmless", "blinded"):
        full = load(host, "Flux")
        if name == "blinded":
            blinded(full)
        held_out = replace(calibrate(host, full, STOCK["Flux"]), statistics={})
        try:
            node(host, full, skip="mod", calibration=held_out)
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    return found


def memory(host: Host) -> dict[str, str]:
    """What comes of an error while ComfyUI builds the second model, by the error."""
    full, found = load(host, "Flux"), {}
    for error in (torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError("no memory"), TypeError("odd")):
        with patch.object(type(full.model), "__init__", side_effect=error):
            try:
                node(host, full)
            except Exception as raised:
                found[type(error).__name__] = type(raised).__name__
    return found


def compiled_elsewhere(host: Host) -> dict[str, bool]:
    """A W4A8 model of ours compiles; comfy-kitchen's functions and core's loader of such files are what they were."""
    import comfy.sd
    from comfy_kitchen.tensor import w4a8_int8
    from quantized_families import save

    if "W4A8" not in available(host):
        return {}
    before = dict(vars(w4a8_int8))
    lossy, packed, _ = node(host, load(host, "Flux"), "W4A8")
    stock = comfy.sd.load_diffusion_model(str(save(lossy, slug("untouched"))))
    layouts = {
        getattr(m.weight, "_layout_cls", "") for m in stock.model.diffusion_model.modules() if hasattr(m, "weight")
    }
    return {
        "kitchen": dict(vars(w4a8_int8)) == before,
        "stock": "AsymW4A8Int8Layout" in layouts and not any("QandC" in layout for layout in layouts),
        "ours": all("QandC" in weight._layout_cls for weight in packed.values()),
    }


if __name__ == "__main__":
    main({
        "chosen": chosen, "patterns": patterns, "limits": limits, "another calibration": another_calibration,
        "cancelled": cancelled, "far off": far_off, "model errors": model_errors, "memory": memory,
        "untouched": compiled_elsewhere,
    })  # fmt: skip
