"""What docs/workflows.md says of the official templates."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from typing import Any

from .insertion import TARGETS, Graph, graphs, targets
from .templates import PACKAGE, absent, local_templates, nodes, sampling_templates, users_of_a_model

TEXT = """## Official templates

{package} {version} holds {local} templates whose models run on one's own machine.
{sampling} of them sample. In each of these, Apply Cache was put before every sampler and guider, {placed} nodes in all,
{inside} of them inside subgraphs, and links and types were compared with the schemas of ComfyUI {comfyui}. Thirty,
which together have as many kinds of nodes around the sampler as thirty can, are opened in the frontend with the nodes
in place: no node of ours is missing, every sampler's model comes from Apply Cache, and the rest of the prompt is the
template's own.

{rows}

Where it is not put, or changes nothing:

- The second model of DualModelGuider ({second}): it is called inside the run of
  the first model, whose cache covers both.
- {other} templates use a MODEL without sampling ({users}):
  {others}.
- {none} templates use no MODEL: language models, models behind an API, and tools.
- Templates with a cache of their own ({cache}):
  the run warns, and one of the two has to go.

{lacking} of the templates need nodes that ComfyUI {comfyui} does not have. There the frontend shows these nodes, and
only these, as missing; the links to and from Apply Cache are checked all the same.
"""


def section(object_info: dict[str, Any], comfyui: str) -> str:
    local, sampling = local_templates(), sampling_templates()
    others = {name: users_of_a_model(workflow) for name, workflow in local.items() if name not in sampling}
    found = [(name, level > 0, node["type"]) for name, w in sampling.items()
             for level, graph in enumerate(graphs(w)) for node, _ in targets(graph)]  # fmt: skip
    using = sorted(name for name, users in others.items() if users)
    return TEXT.format(
        package=PACKAGE.replace("_", "-"), version=version(PACKAGE), comfyui=comfyui, local=len(local),
        sampling=len(sampling), placed=len(found), inside=sum(inside for _, inside, _ in found), rows=rows(found),
        second=with_node(sampling, "DualModelGuider"), cache=with_node(sampling, "EasyCache"), other=len(using),
        users=", ".join(sorted(set().union(*others.values()))), others=", ".join(using),
        none=len(others) - len(using), lacking=sum(bool(absent(w, object_info)) for w in sampling.values()),
    )  # fmt: skip


def rows(found: list[tuple[str, bool, str]]) -> str:
    placed, inside = Counter(type for *_, type in found), Counter(type for _, inside, type in found if inside)
    in_templates = Counter(type for _, type in {(name, type) for name, _, type in found})
    lines = ["| Before | Templates | Nodes | Of these in subgraphs |", "| --- | --- | --- | --- |"]
    lines += [f"| {type} | {in_templates[type]} | {placed[type]} | {inside[type]} |" for type in TARGETS]
    return "\n".join(lines)


def with_node(templates: dict[str, Graph], type: str) -> str:
    return ", ".join(name for name, workflow in templates.items() if any(n["type"] == type for n in nodes(workflow)))
