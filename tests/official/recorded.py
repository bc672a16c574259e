"""The schemas around a MODEL as the newest ComfyUI states them, for the test that runs without one.

Written with docs/workflows.md by `python -m tests.comfyui.workflows_table`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .insertion import NODE
from .templates import ANY, nodes, sampling_templates

FILE = Path(__file__).with_name("object_info.json")
CONTRACT = Path(__file__).parents[1] / "nodes" / "object_info.json"


def compact(object_info: dict[str, Any]) -> dict[str, Any]:
    """Types of inputs and outputs of the templates' nodes that give or take a MODEL, or hand on what they are given."""
    types = {node["type"] for workflow in sampling_templates().values() for node in nodes(workflow)} - {NODE}
    found = {type: kinds(object_info[type]) for type in sorted(types & set(object_info))}
    return {type: info for type, info in found.items() if concerns_a_model(info)}


def kinds(info: dict[str, Any]) -> dict[str, Any]:
    inputs = {
        group: {name: [kind if isinstance(kind, str) else "COMBO"] for name, (kind, *_) in specs.items()}
        for group, specs in info["input"].items()
        if group != "hidden"
    }
    return {"input": inputs, "output": info["output"]}


def concerns_a_model(info: dict[str, Any]) -> bool:
    wanted = [kind for specs in info["input"].values() for (kind,) in specs.values()]
    return "MODEL" in wanted or bool({"MODEL", *ANY} & set(info["output"]))


def recorded() -> dict[str, Any]:
    ours = json.loads(CONTRACT.read_text(encoding="utf-8"))
    return {**json.loads(FILE.read_text(encoding="utf-8")), NODE: ours[NODE]}


def write(object_info: dict[str, Any]) -> None:
    FILE.write_text(json.dumps(compact(object_info), indent=0, sort_keys=True) + "\n", encoding="utf-8")
