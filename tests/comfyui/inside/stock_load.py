"""ComfyUI without any custom node loads what quantized_families saved and samples it."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from host import relative
from stock_models import STOCK, configured, run


def start(checkout: str, base: str):
    """ComfyUI's nodes; where to find models is set as its main.py does it."""
    sys.path.insert(0, checkout)
    sys.argv = ["main.py", "--cpu", "--base-directory", base, "--disable-all-custom-nodes"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import folder_paths

    import nodes

    output = folder_paths.get_output_directory()
    folder_paths.add_model_folder_path("diffusion_models", str(Path(output, "diffusion_models")))
    return nodes


def check(nodes, key: str, file: str, expected: torch.Tensor) -> dict:
    """Relative differences of both ways to load, and how many layers are quantized."""
    import comfy.sd
    import folder_paths

    model = STOCK[key.split(", ")[0]]
    with model.sizes():
        direct = comfy.sd.load_diffusion_model(folder_paths.get_full_path("diffusion_models", file))
        (loaded,) = nodes.UNETLoader().load_unet(file, "default")
        return {
            "direct": relative(run(direct, model), expected),
            "UNETLoader": relative(run(loaded, model), expected),
            "configured": configured(direct, model) and configured(loaded, model),
            "quantized": sum(hasattr(m.weight, "_layout_cls") for m in direct.model.modules() if hasattr(m, "weight")),
        }


def checks(nodes, base: Path) -> dict:
    from safetensors import safe_open

    found = {}
    with safe_open(base / "quantized.safetensors", "pt") as outputs:
        files = json.loads(outputs.metadata()["files"])
        for key, file in files.items():
            try:
                found[key] = check(nodes, key, file, outputs.get_tensor(key))
            except Exception:
                found[key] = {"failed": traceback.format_exc(limit=-4)}
            print(f"done {key}", file=sys.stderr, flush=True)
    found["packs"] = [name for name in sys.modules if "QandC" in name or "qandc" in name]
    return found


if __name__ == "__main__":
    checkout, base = sys.argv[1:3]
    with torch.inference_mode():
        results = checks(start(checkout, base), Path(base))
    print("RESULTS " + json.dumps(results))
