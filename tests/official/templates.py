"""ComfyUI's official templates, as the pinned package has them, and what a ComfyUI says of their nodes and links."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from .insertion import NODE, Graph, Link, Node, default_widgets, graphs, links, targets, with_cache

PACKAGE = "comfyui_workflow_templates_json"
ANY = ("*", "COMFY_MATCHTYPE_V3")
VIRTUAL = ("Reroute", "PrimitiveNode", "Note", "MarkdownNote")  # nodes of the frontend alone
INPUT = -10  # the node that a subgraph's inputs come from


def available() -> bool:
    return find_spec(PACKAGE) is not None


@cache
def local_templates() -> dict[str, Graph]:
    """Name -> workflow, without the templates whose models run elsewhere (API nodes)."""
    found = {}
    for file in sorted(files(PACKAGE).joinpath("templates").iterdir(), key=lambda file: file.name):
        name = file.name.removesuffix(".json")
        if file.name.endswith(".json") and not name.startswith(("api_", "index")):
            content = json.loads(file.read_text(encoding="utf-8"))
            if "nodes" in content:
                found[name] = content
    return found


def nodes(workflow: Graph) -> Iterator[Node]:
    """All nodes, without those that stand for a subgraph."""
    ids = {graph["id"] for graph in graphs(workflow)[1:]}
    return (node for graph in graphs(workflow) for node in graph["nodes"] if node["type"] not in ids)


def sampling_templates() -> dict[str, Graph]:
    return {name: w for name, w in local_templates().items() if any(any(targets(graph)) for graph in graphs(w))}


def sample(templates: dict[str, Graph], size: int) -> list[str]:
    """Names whose workflows together have as many different things on the way to a sampler as `size` allows."""
    left, chosen = {name: traits(workflow) for name, workflow in templates.items()}, []
    seen: set[str] = set()
    while left and len(chosen) < size:
        name = max(left, key=lambda name: (len(left[name] - seen), name))
        seen |= left.pop(name)
        chosen.append(name)
    return sorted(chosen)


def traits(workflow: Graph) -> set[str]:
    """Nodes that take or give a MODEL, guider, sampler or sigmas, those that feed a sampler, how many and how deep."""
    found = set()
    for level, graph in enumerate(graphs(workflow)):
        by_id, known = {node["id"]: node for node in graph["nodes"]}, links(graph)
        for node in graph["nodes"]:
            slots = [*(node.get("inputs") or []), *(node.get("outputs") or [])]
            if any(slot["type"] in ("MODEL", "GUIDER", "SAMPLER", "SIGMAS") for slot in slots):
                found.add(node["type"] if "-" not in node["type"] else "subgraph")
        placed = list(targets(graph))
        found.add(f"{min(level, 1)} {len(placed)}")
        for node, slot in placed:
            source = by_id.get(known[node["inputs"][slot]["link"]].origin_id, {"type": "input of a subgraph"})
            found.add(f"{source['type'] if '-' not in source['type'] else 'subgraph'} feeds a sampler")
    return found


def absent(workflow: Graph, object_info: dict[str, Any]) -> set[str]:
    """Node types that this ComfyUI does not have."""
    return {node["type"] for node in nodes(workflow)} - set(object_info) - set(VIRTUAL)


class Checker:
    """Compares the links of a workflow with the schemas of the nodes at their ends."""

    def __init__(self, workflow: Graph, object_info: dict[str, Any]):
        self.workflow, self.object_info = workflow, object_info
        self.subgraphs = {graph["id"]: graph for graph in graphs(workflow)[1:]}

    def problems(self) -> set[str]:
        """What is wrong with the links, in words."""
        return {text for graph in graphs(self.workflow) for text in self.of_graph(graph)}

    def of_graph(self, graph: Graph) -> Iterator[str]:
        by_id, known = {node["id"]: node for node in graph["nodes"]}, links(graph)
        for link in known.values():
            source, target = by_id.get(link.origin_id), by_id.get(link.target_id)
            for text in (self.of_source(source, link), self.of_target(target, link)):
                if text:
                    yield f"link {link.id}: {text}"
            given, wanted = self.given_type(graph, link), self.wanted_type(target, link)
            if not fits(given, wanted):
                yield f"link {link.id} gives {given} to {wanted}"
        for node in graph["nodes"]:
            for slot in node.get("inputs") or []:
                if slot.get("link") is not None and slot["link"] not in known:
                    yield f"{node['type']} {node['id']}: {slot['name']} has link {slot['link']}, which is not there"

    def of_source(self, node: Node | None, link: Link) -> str:
        if node is None:  # an input of the subgraph
            return "" if link.origin_id == INPUT else "its origin is not there"
        outputs = node.get("outputs") or []
        if link.origin_slot >= len(outputs) or link.id not in (outputs[link.origin_slot].get("links") or []):
            return f"{node['type']} {node['id']} does not list it"
        return ""

    def of_target(self, node: Node | None, link: Link) -> str:
        if node is None:  # an output of the subgraph
            return "" if link.target_id < 0 else "its target is not there"
        inputs = node.get("inputs") or []
        if link.target_slot >= len(inputs) or inputs[link.target_slot].get("link") != link.id:
            return f"{node['type']} {node['id']} does not have it"
        return ""

    def given_type(self, graph: Graph, link: Link, depth: int = 0) -> str:
        """The type that arrives, followed back to a node whose schema states it."""
        node = next((node for node in graph["nodes"] if node["id"] == link.origin_id), None)
        if depth > 40:
            return "*"
        if node is None:
            return graph["inputs"][link.origin_slot]["type"] if link.origin_id == INPUT else "*"
        if node["type"] in self.subgraphs:
            inner = self.subgraphs[node["type"]]
            if link.origin_slot >= len(inner["outputs"]):
                return "nothing"
            ends = inner["outputs"][link.origin_slot].get("linkIds") or []
            known = links(inner)
            return self.given_type(inner, known[ends[0]], depth + 1) if ends and ends[0] in known else "*"
        if node["type"] == "Reroute":
            return self.first_input(graph, node, depth)
        info = self.object_info.get(node["type"])
        if info is None:  # a primitive, or a node that this ComfyUI does not have
            return link.type
        if link.origin_slot >= len(info["output"]):
            return "nothing" if not grows(info) else "*"
        stated = info["output"][link.origin_slot]
        return self.first_input(graph, node, depth) if stated in ANY else stated

    def first_input(self, graph: Graph, node: Node, depth: int) -> str:
        """Of the linked inputs that take any type, the first one's."""
        known = links(graph)
        for slot in node.get("inputs") or []:
            if slot.get("link") in known and (slot["type"] in ANY or slot["type"] == known[slot["link"]].type):
                found = self.given_type(graph, known[slot["link"]], depth + 1)
                if found not in ("BOOLEAN", "INT"):
                    return found
        return "*"

    def wanted_type(self, node: Node | None, link: Link) -> str:
        info = node and self.object_info.get(node["type"])
        if not info or link.target_slot >= len(node.get("inputs") or []):
            return "*"
        name = node["inputs"][link.target_slot]["name"]
        stated = next((group[name] for group in info["input"].values() if name in group), None)
        if stated is None:
            return "*" if grows(info) else f"no input {name}"
        return "COMBO" if isinstance(stated[0], list) else stated[0]


def grows(info: dict[str, Any]) -> bool:
    """Whether the node has inputs whose number or kind follows from a choice."""
    stated = [spec[0] for group in info["input"].values() for spec in group.values() if isinstance(spec, (list, tuple))]
    return any(isinstance(kind, str) and kind.startswith(("COMFY_AUTOGROW", "COMFY_DYNAMIC")) for kind in stated)


def fits(given: str, wanted: str) -> bool:
    if given in ANY or wanted in ANY or "COMBO" in (given, wanted):
        return True
    return bool(set(str(given).split(",")) & set(str(wanted).split(",")))


def check(workflow: Graph, object_info: dict[str, Any]) -> list[str]:
    """What is wrong with the workflow once Apply Cache is before every sampler and guider, in words."""
    changed = with_cache(workflow, default_widgets(object_info[NODE]))
    checker = Checker(changed, object_info)
    problems = sorted(checker.problems() - Checker(workflow, object_info).problems())
    for before, after in zip(graphs(workflow), graphs(changed)):
        was, now = links(before), links(after)
        nodes = {node["id"]: node for node in after["nodes"]}
        for (target, slot), (new, _) in zip(targets(before), targets(after)):
            old, link = was[target["inputs"][slot]["link"]], now[new["inputs"][slot]["link"]]
            ours, what = nodes[link.origin_id], f"{target['type']} {target['id']}"
            (fed,) = (now[given["link"]] for given in ours["inputs"])
            if ours["type"] != NODE or (fed.origin_id, fed.origin_slot) != (old.origin_id, old.origin_slot):
                problems.append(f"{what} does not get its model through {NODE}")
            if checker.given_type(after, fed) != "MODEL" or checker.wanted_type(new, link) not in ("MODEL", "*"):
                problems.append(f"{what}: {checker.given_type(after, fed)} is no MODEL")
    return problems


def users_of_a_model(workflow: Graph) -> set[str]:
    """Node types that take a MODEL and give none."""
    return {
        node["type"]
        for node in nodes(workflow)
        if any(slot["type"] == "MODEL" and slot.get("link") is not None for slot in node.get("inputs") or [])
        and not any(slot["type"] == "MODEL" for slot in node.get("outputs") or [])
    }
