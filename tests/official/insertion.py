"""Puts Apply Cache before every sampler and guider of a workflow as the frontend saves it, inside subgraphs too.

A workflow is a graph of nodes and links; `definitions.subgraphs` holds more of them, whose inputs come from the node
-10. A link of the top level is a list, one of a subgraph a dictionary, with the same fields. The link that fed the
sampler keeps its id and its origin and now ends at the new node, so nothing else has to know: neither the origin's
outputs, nor a subgraph's inputs, nor the points that a link is led through.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

Graph = dict[str, Any]
Node = dict[str, Any]
FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
NODE = "QandC_ApplyCache"
# What samples a MODEL, and the input that its run belongs to. A guider's second model is called inside the run of the
# first and has no cache of its own.
TARGETS = {
    "KSampler": "model",
    "KSamplerAdvanced": "model",
    "SamplerCustom": "model",
    "BasicGuider": "model",
    "CFGGuider": "model",
    "DualCFGGuider": "model",
    "DualModelGuider": "model",
    "LTXVDualCFGGuider": "model",
}


@dataclass(frozen=True)
class Link:
    """A link of either form; `set` changes it where it lies."""

    stored: list | dict

    def __getattr__(self, field: str) -> Any:
        if field not in FIELDS:
            raise AttributeError(field)
        return self.stored[FIELDS.index(field) if isinstance(self.stored, list) else field]

    def set(self, **values: Any) -> None:
        for field, value in values.items():
            self.stored[FIELDS.index(field) if isinstance(self.stored, list) else field] = value


def graphs(workflow: Graph) -> list[Graph]:
    """The top level and the definition of every subgraph."""
    return [workflow, *((workflow.get("definitions") or {}).get("subgraphs") or [])]


def links(graph: Graph) -> dict[int, Link]:
    return {link.id: link for link in map(Link, graph.get("links") or [])}


def targets(graph: Graph) -> Iterator[tuple[Node, int]]:
    """Each sampler or guider of one graph, and the place of its model input."""
    for node in graph["nodes"]:
        for slot, given in enumerate(node.get("inputs") or []):
            if given["name"] == TARGETS.get(node["type"]) and given.get("link") is not None:
                yield node, slot


def with_cache(workflow: Graph, widgets_values: list) -> Graph:
    """A copy with a node of its own, holding these widget values, before each target."""
    changed = copy.deepcopy(workflow)
    node_ids, link_ids = new_ids(changed)
    for graph in graphs(changed):
        for node, slot in list(targets(graph)):
            insert(graph, node, slot, next(node_ids), next(link_ids), widgets_values)
    changed["last_node_id"], changed["last_link_id"] = next(node_ids), next(link_ids)
    for graph in graphs(changed)[1:]:
        graph.setdefault("state", {}).update(lastNodeId=next(node_ids), lastLinkId=next(link_ids))
    return changed


def new_ids(workflow: Graph) -> tuple[Iterator[int], Iterator[int]]:
    """Ids of nodes and of links that no graph of the workflow uses; the frontend wants them unique over all."""
    every = graphs(workflow)
    nodes = [int(node["id"]) for graph in every for node in graph["nodes"]]
    used = [link for graph in every for link in links(graph)]
    return count(max([*nodes, workflow.get("last_node_id") or 0]) + 1), count(
        max([*used, workflow.get("last_link_id") or 0]) + 1
    )


def insert(graph: Graph, target: Node, slot: int, node_id: int, link_id: int, widgets_values: list) -> None:
    given = target["inputs"][slot]
    old = links(graph)[given["link"]]
    values = [link_id, node_id, 0, target["id"], slot, "MODEL"]
    graph["links"].append(values if isinstance(old.stored, list) else dict(zip(FIELDS, values)))
    graph["nodes"].append(
        {
            "id": node_id, "type": NODE, "mode": 0, "order": target.get("order", 0),
            "pos": [place(target["pos"], 0), place(target["pos"], 1) - 90], "size": [270, 130],
            "flags": {"collapsed": True},
            "inputs": [{"name": "model", "type": "MODEL", "link": old.id}],
            "outputs": [{"name": "MODEL", "type": "MODEL", "links": [link_id]}],
            "properties": {"cnr_id": "qandc", "Node name for S&R": NODE}, "widgets_values": list(widgets_values),
        }
    )  # fmt: skip
    old.set(target_id=node_id, target_slot=0)
    given["link"] = link_id


def place(position: list | dict, axis: int) -> float:
    """Old workflows store a position as {"0": x, "1": y}."""
    return position[axis] if isinstance(position, list) else position[str(axis)]


def default_widgets(info: dict[str, Any]) -> list:
    """The values that the frontend gives a new node, in the order in which it saves them."""
    return [value for group in ("required", "optional") for name in info["input_order"].get(group, [])
            for value in defaults(info["input"][group][name])]  # fmt: skip


def defaults(spec: list) -> list:
    kind, options = spec
    if kind == "COMFY_DYNAMICCOMBO_V3":
        first = options["options"][0]
        inner = [value for group in first["inputs"].values() for spec in group.values() for value in defaults(spec)]
        return [first["key"], *inner]
    if kind == "COMBO":
        return [options.get("default", options["options"][0])]
    return [options["default"]] if kind in ("BOOLEAN", "FLOAT", "INT", "STRING") else []
