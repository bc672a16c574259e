"""Runs inside a ComfyUI checkout: starts it without its server and loads the pack as ComfyUI does."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch


class Host:
    """ComfyUI, on CPU by default, with the pack of `base`/custom_nodes; call it once, before anything imports comfy.

    With `dynamic` on a GPU with dynamic VRAM, which main.py turns on by default on NVIDIA.
    """

    def __init__(self, checkout: str, base: str, flags: Sequence[str] = ("--cpu",), dynamic: bool = False):
        sys.path.insert(0, checkout)
        sys.argv = ["main.py", *flags, "--base-directory", base]
        if dynamic:
            import comfy_aimdo.control

            comfy_aimdo.control.init()  # its other modules find its library only where they are imported later
        import comfy.options

        comfy.options.enable_args_parsing()
        import nodes

        self.nodes, self.base = nodes, Path(base)
        self.pack = str(Path(base, "custom_nodes", "ComfyUI-QandC"))
        if not asyncio.run(nodes.load_custom_node(self.pack)):
            raise RuntimeError("the pack did not load")
        if dynamic:
            enable_dynamic_vram()

    def module(self, name: str) -> ModuleType:
        """A module of the pack, such as nodes.comfyui.cache.attach or qandc_core.sampling.generate."""
        return importlib.import_module(f"{self.pack.replace('.', '_x_')}.{name}")

    def node(self, node_id: str) -> Any:
        return self.nodes.NODE_CLASS_MAPPINGS[node_id]


def enable_dynamic_vram() -> None:
    import comfy.memory_management
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy_aimdo.control

    if not comfy_aimdo.control.init_devices((device.index, 0) for device in mm.get_all_torch_devices()):
        raise RuntimeError("comfy-aimdo does not work here")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def relative(a, b) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def cancelled(host: Host, call: Callable[[], Any], kind: str, after: int) -> tuple[str, int]:
    """Presses Cancel when call() has done so much work of a kind -> how it ended, and how much was done until then."""
    import comfy.model_management as mm

    work, done = host.module("nodes.comfyui.quantize.work").Work, []
    did = work.did

    def press(self, what, *args):
        done.extend([what] * (what == kind))
        if len(done) == after:
            mm.interrupt_current_processing()
        did(self, what, *args)

    try:
        with patch.object(work, "did", press):
            call()
        return "finished", len(done)
    except mm.InterruptProcessingException:
        return "interrupted", len(done)
    finally:
        mm.interrupt_current_processing(False)


def main(checks: dict[str, Any]) -> None:
    """argv: checkout, base directory. Prints one JSON object: check -> value, or the error it ended with."""
    host = Host(sys.argv[1], sys.argv[2])
    import torch

    torch.manual_seed(0)
    results = {}
    with torch.inference_mode():
        for name, check in checks.items():
            results[name] = check(host)
            print(f"done {name}", file=sys.stderr, flush=True)
    print("RESULTS " + json.dumps(results))
