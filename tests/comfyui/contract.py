"""What ComfyUI says of the nodes, recorded for the tests that run without it, and the texts that follow from it.

    python -m tests.comfyui.contract

Run it after any change to a schema; the Chinese locale is then brought up to date by hand.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.comfyui.checkouts import checkouts
from tests.comfyui.server import Server

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "tests" / "nodes" / "object_info.json"
FILE_CHOICES = ("model_name", "file")  # inputs whose choices depend on the machine; the first is always there


def recorded(object_info: dict[str, Any]) -> dict[str, Any]:
    """The Q&C nodes, without the files of this machine."""
    found = {name: info for name, info in sorted(object_info.items()) if name.startswith("QandC_")}
    for info in found.values():
        for inputs in info["input"].values():
            for name in FILE_CHOICES:
                if name in inputs:
                    inputs[name][1]["options"] = inputs[name][1]["options"][:1]
    return found


def english(contract: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's nodeDefs.json in the words of the schema."""
    return {
        name.replace(".", "_"): {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": dict(input_texts(info)),
            "outputs": {
                str(i): {"name": output, "tooltip": tooltip}
                for i, (output, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"]))
            },
        }
        for name, info in contract.items()
    }


def input_texts(info: dict[str, Any]):
    inputs = {name: spec for kind in ("required", "optional") for name, spec in info["input"].get(kind, {}).items()}
    order = [name for kind in ("required", "optional") for name in info["input_order"].get(kind, [])]
    for name in order:
        spec = inputs[name]
        yield name, {"name": name, "tooltip": spec[1]["tooltip"]}
        if spec[1].get("control_after_generate"):
            yield "control_after_generate", {"name": "control after generate"}
        if spec[0] == "COMFY_DYNAMICCOMBO_V3":
            for option in spec[1]["options"]:
                for inner, inner_spec in option["inputs"]["required"].items():
                    yield f"{name}_{inner}", {"name": inner, "tooltip": inner_spec[1]["tooltip"]}


def write(path: Path, content: Any, **options: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, **options) + "\n", encoding="utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as base, Server(checkouts()[0], Path(base)) as server:
        contract = recorded(server.object_info())
    write(CONTRACT, contract, indent=1, sort_keys=True)
    write(ROOT / "locales" / "en" / "nodeDefs.json", english(contract), indent=2)
    write(ROOT / "node_list.json", {name: info["description"] for name, info in contract.items()}, indent=2)


if __name__ == "__main__":
    main()
