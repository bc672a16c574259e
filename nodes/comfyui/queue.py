"""ComfyUI's server and its queue, as far as nodes ask about them: what runs now, for which node.

Everything here answers None or nothing without a server, as in tests and scripts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Graph = Mapping[str, Mapping[str, Any]]  # node id -> class_type and inputs, as POST /prompt takes it


@dataclass(frozen=True)
class Prompt:
    """A queued prompt: its id, its graph, and the id of the workflow that it was made of ("" where unknown)."""

    id: str
    graph: Graph
    workflow: str = ""


def running_server() -> Any:
    """ComfyUI's PromptServer, or None; importing its module would start what a script never wanted."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def running_prompts() -> list[Prompt]:
    """The job that the queue works on now."""
    queue = getattr(running_server(), "prompt_queue", None)
    items = list(getattr(queue, "currently_running", {}).values())
    return [Prompt(item[1], item[2], workflow_of(item[3])) for item in items]


def workflow_of(extra_data: Mapping[str, Any]) -> str:
    information = extra_data.get("extra_pnginfo") or {}
    workflow = information.get("workflow") or {} if isinstance(information, Mapping) else {}
    return str(workflow.get("id") or "") if isinstance(workflow, Mapping) else ""


def executing() -> tuple[Prompt, str, int] | None:
    """The prompt, node and place in a list of inputs that this thread executes."""
    module = sys.modules.get("comfy_execution.utils")
    context = module.get_executing_context() if module is not None else None
    if context is None:
        return None
    prompt = next((prompt for prompt in running_prompts() if prompt.id == context.prompt_id), None)
    return prompt or Prompt(context.prompt_id, {}), str(context.node_id), context.list_index or 0


def downstream(graph: Graph, node: str) -> set[str]:
    """The nodes that depend on this one, itself not among them."""
    found: set[str] = set()
    while True:
        known = found | {node}
        new = {key for key, spec in graph.items() if key not in known and known & set(sources(spec))}
        if not new:
            return found
        found |= new


def sources(spec: Mapping[str, Any]) -> list[str]:
    """The nodes that a node's inputs come from."""
    return [str(value[0]) for value in spec.get("inputs", {}).values() if isinstance(value, list) and len(value) == 2]
