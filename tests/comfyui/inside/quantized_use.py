"""Quantized models in use: LoRAs, offloading, second copies, compilation, and what was attached before."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from cache_compile import Graphs, steady_memory
from families import cached
from host import Host, main, relative
from quantized_families import available, load, quantize, save
from stock_models import STOCK, StockModel, run

USED, COMPILED = ("Flux", "SD 3.5", "Wan 2.1", "Lumina 2"), ("Flux", "Wan 2.1")
STRENGTH = 0.3


class Case:
    """A family's model in full precision and quantized, and the samples of both."""

    def __init__(self, host: Host, name: str, format: str):
        self.host, self.model, self.format = host, STOCK[name], format
        self.full = load(host, name)
        self.before = run(self.full, self.model)
        self.lossy, self.report = self.quantized(self.full)
        self.out = run(self.lossy, self.model)

    def quantized(self, patcher, **settings) -> tuple[Any, Any]:
        return quantize(self.host, patcher, self.format, rounding="nearest", **settings)

    def run(self, patcher) -> torch.Tensor:
        return run(patcher, self.model)


def lora_on(patcher, layers: list[str]):
    """A clone with random products of rank 4 on some layers, through core's loader."""
    import comfy.sd

    generator, lora = torch.Generator().manual_seed(7), {}
    for name in layers:
        module = patcher.model.diffusion_model.get_submodule(name)
        up = torch.randn(module.out_features, 4, generator=generator) * 0.5
        down = torch.randn(4, module.in_features, generator=generator) * module.in_features**-0.5
        lora |= {f"diffusion_model.{name}.lora_B.weight": up, f"diffusion_model.{name}.lora_A.weight": down}
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, STRENGTH, 0)
    assert len(patched.patches) == len(layers), "core's loader did not take the LoRA"
    return patched


def error(case: Case) -> dict[str, Any]:
    return {"error": relative(case.out, case.before), "source stays": torch.equal(case.run(case.full), case.before)}


def loras(case: Case) -> dict[str, Any]:
    """A LoRA on every quantized layer, put on after quantizing or before, against the same on the full model."""
    import comfy.sd

    layers = [layer.name for layer in case.report.layers if layer.format != "float"]
    full = lora_on(case.full, layers)
    wanted = case.run(full)
    bystander, _ = case.quantized(case.full)  # while the clone's LoRA is in the weights
    baked, _ = case.quantized(full, loras="bake")
    kept, _ = case.quantized(full, loras="keep")
    found = {
        "effect": relative(wanted, case.before),
        "not on the source": torch.equal(case.run(bystander), case.out),
        "after": relative(case.run(lora_on(case.lossy, layers)), wanted),
        "after, removed": torch.equal(case.run(case.lossy), case.out),
        "baked": relative(case.run(baked), wanted),
        "baked patches": len(baked.patches),
        "kept": relative(case.run(kept), wanted),
        "kept patches": [len(kept.patches), len(layers)],
    }
    saved = comfy.sd.load_diffusion_model(str(save(kept, "kept")))
    found["kept, saved"] = relative(case.run(saved), wanted)
    bare = kept.clone()
    bare.patches = {}
    bare.patches_uuid = None
    return {**found, "kept, removed": torch.equal(case.run(bare), case.out), **error(case)}


def unloading(case: Case) -> dict[str, bool]:
    import comfy.model_management

    clone = case.lossy.clone()
    found = {"clone": torch.equal(case.run(clone), case.out)}
    comfy.model_management.unload_all_models()
    found["clone, unloaded"] = torch.equal(case.run(clone), case.out)
    comfy.model_management.unload_all_models()
    return {**found, "unloaded": torch.equal(case.run(case.lossy), case.out)}


def calls_of(patcher, model: StockModel) -> list[tuple]:
    """The calls of apply_model in a run."""
    calls, watched = [], patcher.clone()

    def note(apply_model, given):
        calls.append((given["input"], given["timestep"], given["c"]))
        return apply_model(given["input"], given["timestep"], **given["c"])

    watched.set_model_unet_function_wrapper(note)
    run(watched, model)
    return calls


def low_vram(case: Case) -> dict[str, Any]:
    """The last call of a run with weights that are cast at every call, without and with a LoRA."""
    import comfy.model_management

    x, t, conditions = calls_of(case.full, case.model)[-1]
    layers = [layer.name for layer in case.report.layers if layer.format != "float"]
    found = {}
    for name, (full, lossy) in {
        "plain": (case.full, case.lossy), "LoRA": (lora_on(case.full, layers), lora_on(case.lossy, layers))
    }.items():  # fmt: skip
        answers = {}
        for kind, patcher, options in (
            ("full", full, {"full_load": True}),
            ("quantized", lossy, {"full_load": True}),
            ("offloaded", lossy, {"lowvram_model_memory": 1}),
        ):
            comfy.model_management.unload_all_models()
            patcher.load(patcher.load_device, **options)
            answers[kind] = patcher.model.apply_model(x, t, **conditions)
            count = sum(hasattr(module, "prev_comfy_cast_weights") for module in patcher.model.modules())
            patcher.detach()
        found[name] = {
            "quantized": relative(answers["quantized"], answers["full"]),
            "offloaded": relative(answers["offloaded"], answers["full"]),
            "layers offloaded": count,
        }
    return {**found, "again": torch.equal(case.run(case.lossy), case.out)}


def second_copy(case: Case) -> dict[str, bool]:
    """What core builds from the model's recipe where it needs another model."""
    function, arguments = case.lossy.cached_patcher_init
    copy = function(*arguments, disable_dynamic=True)
    return {"same": torch.equal(case.run(copy), case.out), "another": copy.model is not case.lossy.model}


def compiled(patcher, backend):
    """A clone whose whole network core compiles."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    clone = patcher.clone()
    set_torch_compile_wrapper(clone, backend=backend, options={"guard_filter_fn": skip_torch_compile_dict})
    torch._dynamo.reset()
    return clone


def compiled_alone(case: Case) -> dict[str, Any]:
    """The difference that compiling makes, and in how many graphs; what a table of all families has the time for."""
    steady_memory()
    graphs = Graphs()
    difference = answer(lambda: relative(case.run(compiled(case.lossy, graphs)), case.out))
    return {"quantized": difference, "graphs": {"quantized": graphs.count}}


def compilation(case: Case) -> dict[str, Any]:
    """Differences from the runs that are not compiled, and how many graphs a network came to."""
    steady_memory()
    graphs = {name: Graphs() for name in ("full", "quantized", "compiled before")}

    def difference(patcher, wanted: torch.Tensor) -> float | str:
        return answer(lambda: relative(case.run(patcher), wanted))

    found = {
        "full": difference(compiled(case.full, graphs["full"]), case.before),
        "quantized": difference(compiled(case.lossy, graphs["quantized"]), case.out),
        "aot_eager": difference(compiled(case.lossy, aot_eager), case.out),
    }
    before, _ = case.quantized(compiled(case.full, graphs["compiled before"]))
    return {
        **found,
        "compiled before": difference(before, case.out),
        "graphs": {name: counted.count for name, counted in graphs.items()},
    }


def aot_eager(graph, inputs):
    """The backend of this name, as a function: torch leaves it out that core passes options."""
    from torch._dynamo.backends.debugging import aot_eager as backend

    return backend(graph, inputs)


def answer(compute: Callable) -> Any:
    try:
        return compute()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:1500]}"


def attachments(case: Case) -> dict[str, Any]:
    """A shift, a wrapper, a guidance function and an option of the input are on the output and at work.

    Another clone of the source that is quantized while the input is loaded gets none of them.
    """
    import comfy.patcher_extension as extension
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux, ModelSamplingSD3

    seen: list[str] = []

    def wrapper(executor, *args, **kwargs):
        seen.append("wrapper")
        return executor(*args, **kwargs)

    def guidance(args):
        seen.append("guidance")
        return args["input"] - (args["uncond"] + 1.5 * (args["cond"] - args["uncond"]))

    if case.full.model.model_type.name == "FLUX":
        (given,) = ModelSamplingFlux().patch(case.full, 2.0, 1.0, 1024, 1024)
    else:
        (given,) = ModelSamplingSD3().patch(case.full, 5.0)
    given.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    given.set_model_sampler_cfg_function(guidance)
    given.model_options["transformer_options"]["test"] = {"held": 1}
    given.set_attachments("test", "attached")
    wanted, called = case.run(given), len(seen)
    lossy, _ = case.quantized(given)
    seen.clear()
    out = case.run(lossy)
    shift = [patcher.get_model_object("model_sampling").shift for patcher in (case.full, given, lossy)]
    return {
        "effect": relative(wanted, case.before), "error": relative(out, wanted), "called": [called, len(seen)],
        "shift": shift, "option": lossy.model_options["transformer_options"].get("test"),
        "attachment": lossy.get_attachment("test"), "input stays": torch.equal(case.run(given), wanted),
        "another clone": relative(case.run(case.quantized(case.full)[0]), case.out),
    }  # fmt: skip


def caches(case: Case) -> dict[str, Any]:
    """Apply Cache before and after Quantize."""
    before, _ = case.quantized(cached(case.host, case.full, 2))
    after = cached(case.host, case.lossy, 2)
    out = case.run(after)
    return {"difference": relative(case.run(before), out), "effect": relative(out, case.out)}


def precisions(case: Case) -> dict[str, Any]:
    """Quantized from weights in other precisions; what is left of a model in float8 is not in float8."""
    import comfy.sd

    path, found = case.full.cached_patcher_init[1][0], {}
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        full = comfy.sd.load_diffusion_model(path, model_options={"dtype": dtype})
        lossy, _ = case.quantized(full)
        loaded = comfy.sd.load_diffusion_model(str(save(lossy, "precision")))
        out, kinds = case.run(lossy), {str(value.dtype) for value in lossy.model.diffusion_model.state_dict().values()}
        found[str(dtype)] = {
            "error": relative(out, case.run(full)), "loaded": relative(case.run(loaded), out), "kinds": sorted(kinds)
        }  # fmt: skip
    return found


def skipping(case: Case) -> dict[str, Any]:
    """Layers that `skip` names stay as they are."""
    names = [layer.name for layer in case.report.layers]
    pattern = names[-1].rpartition(".")[0]
    lossy, report = case.quantized(case.full, skip=(pattern,))
    network = lossy.model.diffusion_model
    held = {name: hasattr(network.get_submodule(name).weight, "_layout_cls") for name in names}
    named = [name for name in names if pattern in name]
    equal = [
        torch.equal(network.get_submodule(n).weight, case.full.model.diffusion_model.get_submodule(n).weight)
        for n in named
    ]
    return {
        "float": sorted(name for name, quantized in held.items() if not quantized) == sorted(named) and all(equal),
        "skipped": len(named), "reported": len(report.layers),
        "error": relative(case.run(lossy), case.before),
    }  # fmt: skip


CHECKS = {
    "LoRA": loras, "unloading": unloading, "low VRAM": low_vram, "second copy": second_copy, "cache": caches,
    "skip": skipping, "precisions": precisions, "compile": compilation, "compiled": compiled_alone,
    "attachments": attachments,
}  # fmt: skip


def checks(host: Host, name: str, kinds: list[str]) -> dict[str, dict]:
    """Format -> check -> what it found, or the error that it ended with."""
    found: dict[str, dict] = {}
    with STOCK[name].sizes():
        for format in available(host):
            case = Case(host, name, format)
            found[format] = {"error": error(case)}
            for kind in kinds:
                try:
                    found[format][kind] = CHECKS[kind](case)
                except Exception:
                    found[format][kind] = {"failed": traceback.format_exc(limit=-4)}
    return found


def kinds_of(name: str) -> list[str]:
    """The checks that argv names, which the host replaces, else all; compiling takes long, not for every family."""
    asked = [kind for kind in CHECKS if kind in sys.argv[3:]]
    return asked or [kind for kind in CHECKS if kind != "compiled" and (kind != "compile" or name in COMPILED)]


if __name__ == "__main__":
    chosen = [name for name in STOCK if name in sys.argv[3:]] or USED
    kinds = {name: kinds_of(name) for name in chosen}
    main({name: lambda host, name=name: checks(host, name, kinds[name]) for name in chosen})
