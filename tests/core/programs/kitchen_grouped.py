"""Grouped formats on the comfy-kitchen that PYTHONPATH names: runs, compiles, saves, loads. Prints one JSON object."""

import json
from importlib.metadata import version

import comfy_kitchen
import torch
import torch.nn.functional as F
from comfy_kitchen import tensor as kitchen

from qandc_core.quantization.formats import BY_NAME, Format, packed_format
from qandc_core.quantization.formats.grouped import Grouped
from qandc_core.quantization.formats.traced_grouped import LAYOUT, register, traced
from qandc_core.quantization.native import NativeConfig, dequantize, layer_config, quantize_weight


def kitchen_state() -> dict[str, int]:
    """Identity of everything that comfy-kitchen's W4A8 module and its table of operations hold."""
    from comfy_kitchen.tensor import base, w4a8_int8

    held = {f"module {name}": id(value) for name, value in vars(w4a8_int8).items()}
    held |= {f"layout {name}": id(value) for name, value in base.LAYOUTS.items()}
    for op, handlers in base._LAYOUT_DISPATCH_TABLE.items():
        held |= {f"{op} {layout.__name__}": id(handler) for layout, handler in handlers.items()}
    return held


def weight_of(tensors: dict[str, torch.Tensor], shape, dtype=torch.float32):
    """A QuantizedTensor as ComfyUI's loader makes one of a file's tensors."""
    conf = layer_config(tensors)
    params = kitchen.AsymW4A8Int8Layout.Params(
        scale=tensors["weight_s_rel"], s_channel=tensors["weight_s_channel"], codebook=tensors.get("weight_codebook"),
        orig_dtype=dtype, orig_shape=shape, group_size=conf["group_size"], convrot_groupsize=conf["convrot_groupsize"],
    )  # fmt: skip
    return kitchen.QuantizedTensor(tensors["weight"], "AsymW4A8Int8Layout", params)


def check(format: str) -> dict:
    """What holds of a layer in the format beside the same in comfy-kitchen's own layout."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(64, 256) / 16, torch.randn(64), torch.randn(2, 5, 256)
    layer = quantize_weight("layer", weight, bias, NativeConfig(format, "nearest"))
    stock = weight_of(layer.tensors, (64, 256))
    ours = traced(stock)
    found = {}
    with torch.inference_mode():
        found["stock"] = torch.equal(F.linear(x, ours, bias), F.linear(x, stock, bias))
        found["decoded"] = torch.equal(ours.dequantize(), stock.dequantize())
    plain = F.linear(x, ours, bias)  # outside inference mode torch takes linear apart into t and addmm
    found["no bias"] = torch.equal(F.linear(x[0], ours), F.linear(x[0], stock))
    found["error"] = float((plain - F.linear(x, weight, bias)).norm() / F.linear(x, weight, bias).norm())
    with torch.profiler.profile() as watched:
        F.linear(x, ours, bias)
    found["no operator of ours"] = not [e.key for e in watched.key_averages() if e.key.startswith("qandc::")]
    compiled = torch.compile(lambda x: F.linear(x, ours, bias), fullgraph=True, backend="eager")
    decoder = torch.compile(lambda: ours.dequantize(), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        found["compiled"] = torch.equal(compiled(x), F.linear(x, stock, bias))
    with torch.no_grad():
        aot = torch.compile(lambda x: F.linear(x, ours, bias), fullgraph=True, backend="aot_eager")
        found["compiled, aot"] = torch.equal(aot(x), plain) and torch.equal(decoder(), stock.dequantize())
    saved = ours.state_dict("weight")
    again = traced(weight_of({**layer.tensors, **saved}, (64, 256)))
    found["saved"] = all(torch.equal(saved[key].float(), layer.tensors[key].float()) for key in saved)
    found["loaded"] = torch.equal(F.linear(x, again, bias), plain)
    changed = ours.requantize_from_float(weight + 0.5, stochastic_rounding=3)
    found["requantized"] = changed._layout_cls == LAYOUT and bool((changed.dequantize() - weight).mean() > 0.4)
    found["format stays"] = packed_format(ours) is packed_format(stock) is packed_format(changed) is BY_NAME[format]
    found["moved"] = ours.to(torch.bfloat16).dequantize().dtype == torch.bfloat16
    found["engine"] = torch.equal(dequantize(layer.tensors), stock.dequantize())
    return found


def main() -> dict:
    before = kitchen_state()
    register()
    grouped = [format for format in BY_NAME.values() if isinstance(format, Grouped)]
    found = {"version": version("comfy-kitchen"), "file": comfy_kitchen.__file__}
    found["formats"] = {format.name: check(format.name) for format in grouped if format.available()}
    found["refused"] = {format.name: refusal(format) for format in grouped if not format.available()}
    after = kitchen_state()
    found["replaced"] = sorted(name for name in before if after[name] != before[name])
    return found


def refusal(format: Format) -> str:
    try:
        quantize_weight("layer", torch.randn(64, 256), None, NativeConfig(format.name))
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    print("RESULTS " + json.dumps(main()))
