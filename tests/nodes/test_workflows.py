"""The shipped workflows against the recorded node schemas."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACT = json.loads(Path(__file__).with_name("object_info.json").read_text(encoding="utf-8"))
NOTES = {"MarkdownNote", "Note"}
CORE = {
    "CLIPLoader", "CLIPTextEncode", "CheckpointLoaderSimple", "ConditioningZeroOut", "CreateVideo", "DualCLIPLoader",
    "EmptyHunyuanLatentVideo", "EmptyLTXVLatentVideo", "EmptyLatentImage", "EmptySD3LatentImage", "FluxGuidance",
    "KSampler", "KSamplerAdvanced", "KSamplerSelect", "LTXVConditioning", "LTXVScheduler", "ModelSamplingAuraFlow",
    "ModelSamplingSD3", "ModelSave", "PreviewAny", "PreviewImage", "SamplerCustom", "SaveImage", "SaveVideo",
    "UNETLoader", "VAEDecode", "VAELoader",
}  # fmt: skip
# Choices that depend on what lies in the folders of a machine.
FILES = {("QandC_LoadDiT", "model_name"), ("QandC_TAPCalibrate", "file"), ("QandC_VarianceCompensate", "file")}
DEMO = "built-in demo"
WIDGETS = {"BOOLEAN", "COMBO", "FLOAT", "INT", "STRING"}
DYNAMIC, AUTOGROW = "COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3"
CONTROLS = {"fixed", "increment", "decrement", "randomize"}

FOLDER = ROOT / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def nodes_of(path):
    """All nodes of a UI workflow, those inside its subgraphs included, without the nodes that stand for a subgraph."""
    content = json.loads(path.read_text(encoding="utf-8"))
    subgraphs = (content.get("definitions") or {}).get("subgraphs") or []
    ids = {subgraph["id"] for subgraph in subgraphs}
    nodes = [node for graph in (content, *subgraphs) for node in graph["nodes"]]
    return [node for node in nodes if node["type"] not in ids]


def ours(path):
    return [node for node in nodes_of(path) if node["type"] in CONTRACT]


def twin(path):
    return json.loads((FOLDER / "api" / path.name).read_text(encoding="utf-8"))


def specs(node_type):
    """name -> (kind, options, required) in the order of the node's widgets."""
    schema = CONTRACT[node_type]
    return {
        name: (*schema["input"][section][name], section == "required")
        for section in ("required", "optional")
        for name in schema["input_order"].get(section, [])
    }


def inner_specs(options, key):
    """name -> (kind, options) of what the choice `key` of a dynamic combo adds."""
    chosen = next(choice["inputs"] for choice in options["options"] if choice["key"] == key)
    return {name: tuple(spec) for section in chosen.values() for name, spec in section.items()}


def accepts(kind, options, value):
    """Whether ComfyUI would take the value for an input of this kind."""
    if kind == "COMBO":
        return value in options["options"]
    if kind == DYNAMIC:
        return value in [choice["key"] for choice in options["options"]]
    if kind == "BOOLEAN":
        return isinstance(value, bool)
    if kind == "STRING":
        return isinstance(value, str)
    whole = isinstance(value, int) or kind == "FLOAT" and isinstance(value, float)
    return whole and not isinstance(value, bool) and options["min"] <= value <= options["max"]


def widget_problems(node):
    """What is wrong with the stored widget values of one of our nodes, in words."""
    values, problems = list(node["widgets_values"]), []

    def take(name, kind, options):
        if not values:
            problems.append(f"no value for {name}")
            return None
        value = values.pop(0)
        if (node["type"], name) not in FILES and not accepts(kind, options, value):
            problems.append(f"{name} is {value!r}")
            return None
        if options.get("control_after_generate") and (not values or values.pop(0) not in CONTROLS):
            problems.append(f"no control_after_generate after {name}")
        return value

    for name, (kind, options, _) in specs(node["type"]).items():
        if kind in WIDGETS or kind == DYNAMIC:
            value = take(name, kind, options)
            for inner, spec in inner_specs(options, value).items() if kind == DYNAMIC and value else ():
                take(f"{name}.{inner}", *spec)
    return problems + [f"left over: {values}"] * bool(values)


def prompt_problems(prompt, key):
    """What is wrong with the inputs of one of our nodes in an API workflow, in words."""
    node, problems = prompt[key], []
    given = dict(node["inputs"])

    def check(name, kind, options):
        value = given.pop(name)
        if isinstance(value, list):
            source, slot = value
            if source not in prompt:
                problems.append(f"{name} is linked to node {source}, which is not there")
            elif prompt[source]["class_type"] in CONTRACT:
                offered = CONTRACT[prompt[source]["class_type"]]["output"][slot : slot + 1]
                if offered != [kind]:
                    problems.append(f"{name} takes {kind} and is linked to {offered}")
        elif kind not in WIDGETS and kind != DYNAMIC:
            problems.append(f"{name} takes a link and is {value!r}")
        elif (node["class_type"], name) not in FILES and not accepts(kind, options, value):
            problems.append(f"{name} is {value!r}")
        return value

    for name, (kind, options, required) in specs(node["class_type"]).items():
        if kind == AUTOGROW:
            template = options["template"]
            (inner_kind, inner_options), *_ = [s for section in template["input"].values() for s in section.values()]
            grown = [f"{name}.{template['prefix']}{i}" for i in range(template["max"])]
            present = [slot for slot in grown if slot in given]
            if len(present) < template["min"]:
                problems.append(f"{name} has {len(present)} links, needs {template['min']}")
            for slot in present:
                check(slot, inner_kind, inner_options)
        elif name in given:
            value = check(name, kind, options)
            if kind == DYNAMIC and accepts(kind, options, value):
                for inner, spec in inner_specs(options, value).items():
                    if f"{name}.{inner}" in given:
                        check(f"{name}.{inner}", *spec)
                    else:
                        problems.append(f"{name}.{inner} is missing")
        elif required:
            problems.append(f"{name} is missing")
    return problems + [f"unknown input {name}" for name in given]


def pack():
    """Name and version of the project; read without tomllib, which Python 3.10 lacks."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tuple(re.search(rf'^{key} = "([^"]+)"', text, re.MULTILINE)[1] for key in ("name", "version"))


@each_workflow
def test_workflow_has_its_picture_and_its_api_twin(path):
    assert path.with_suffix(".jpg").is_file()
    assert (FOLDER / "api" / path.name).is_file()


def test_no_picture_or_api_twin_is_alone():
    stems = {path.stem for path in WORKFLOWS}
    assert {path.stem for path in FOLDER.glob("*.jpg")} == stems
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == stems


@each_workflow
def test_workflow_uses_our_nodes_and_a_few_of_core(path):
    types = {node["type"] for node in nodes_of(path)}
    assert types <= set(CONTRACT) | CORE | NOTES
    assert types & set(CONTRACT)
    assert {node["class_type"] for node in twin(path).values()} <= set(CONTRACT) | CORE


@each_workflow
def test_nodes_say_which_pack_they_come_from(path):
    name, version = pack()
    for node in nodes_of(path):
        if node["type"] in CONTRACT:
            found = {key: node["properties"].get(key) for key in ("cnr_id", "ver")}
            assert found == {"cnr_id": name, "ver": version}, node["type"]
        elif node["type"] not in NOTES:
            assert node["properties"].get("cnr_id") == "comfy-core", node["type"]


@each_workflow
def test_nodes_that_load_a_file_say_where_it_is_from(path):
    for node in ours(path):
        if node["type"] == "QandC_LoadDiT" and node["widgets_values"][0] != DEMO:
            models = node["properties"].get("models")
            assert models, "properties.models is missing"
            assert all(model.get(key) for model in models for key in ("name", "url", "directory"))
            assert node["widgets_values"][0] in [model["name"] for model in models]


def nulls(content, path=""):
    """Paths of everything that is null and may not be: only a slot without a link is."""
    parts = list(
        content.items() if isinstance(content, dict) else enumerate(content if isinstance(content, list) else ())
    )
    empty = [f"{path}/{key}" for key, value in parts if value is None and key not in ("link", "links")]
    return empty + [found for key, value in parts for found in nulls(value, f"{path}/{key}")]


@pytest.mark.parametrize("path", [*WORKFLOWS, *sorted(ROOT.glob("subgraphs/*.json"))], ids=lambda path: path.stem)
def test_nothing_is_null_that_was_undefined(path):
    """Frontend 1.58.1 calls `"slot_index": null` invalid and opens no subgraph with `"reroutes": null`."""
    assert nulls(json.loads(path.read_text(encoding="utf-8"))) == []


def loose_ends(subgraph):
    """Inputs and outputs of a subgraph that lead nowhere, and links that no slot of a node has."""
    inputs = {(node["id"], slot.get("link")) for node in subgraph["nodes"] for slot in node.get("inputs", [])}
    outputs = {
        (node["id"], link)
        for node in subgraph["nodes"]
        for slot in node.get("outputs", [])
        for link in slot["links"] or []
    }
    inputs |= {(-20, link) for slot in subgraph["outputs"] for link in slot["linkIds"]}
    outputs |= {(-10, link) for slot in subgraph["inputs"] for link in slot["linkIds"]}
    links = {link["id"] for link in subgraph["links"]}
    slots = [*subgraph["inputs"], *subgraph["outputs"]]
    return [slot["name"] for slot in slots if not slot["linkIds"] or set(slot["linkIds"]) - links] + [
        link["id"]
        for link in subgraph["links"]
        if (link["origin_id"], link["id"]) not in outputs or (link["target_id"], link["id"]) not in inputs
    ]


@pytest.mark.parametrize("path", [*WORKFLOWS, *sorted(ROOT.glob("subgraphs/*.json"))], ids=lambda path: path.stem)
def test_no_subgraph_shows_what_leads_nowhere(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    for subgraph in (content.get("definitions") or {}).get("subgraphs") or []:
        assert loose_ends(subgraph) == [], subgraph["name"]
        shown = [slot["name"] for slot in subgraph["inputs"]]
        assert len(set(shown)) == len(shown), f"{subgraph['name']}: two inputs of one name"
        for node in content["nodes"]:
            if node["type"] == subgraph["id"]:
                assert [slot["name"] for slot in node["inputs"]] == shown, subgraph["name"]
                assert len([slot for slot in node["inputs"] if slot.get("widget")]) == len(node["widgets_values"])


@each_workflow
def test_stored_widget_values_fit_the_nodes(path):
    problems = {f"{node['type']} {node['id']}": widget_problems(node) for node in ours(path)}
    assert not {node: found for node, found in problems.items() if found}


@each_workflow
def test_api_twin_fits_the_nodes(path):
    prompt = twin(path)
    problems = {
        f"{node['class_type']} {key}": prompt_problems(prompt, key)
        for key, node in prompt.items()
        if node["class_type"] in CONTRACT
    }
    assert not {node: found for node, found in problems.items() if found}


CACHE_INPUTS = {"model": ["1", 0], "policy": "interval", "policy.interval": 3, "order": 1}
CACHE_WIDGETS = [1, 0.0, 1.0, "automatic", False]
RUN_INPUTS = {
    "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 1], "latent_image": ["3", 0], "seed": 0, "steps": 50,
    "cfg": 1.5, "sampler_name": "ddpm", "scheduler": "normal", "denoise": 1.0, "label": "",
}  # fmt: skip
GRAPH = {
    "1": {"class_type": "QandC_LoadDiT", "inputs": {}},
    "2": {"class_type": "QandC_ClassLabel", "inputs": {}},
    "3": {"class_type": "EmptyLatentImage", "inputs": {}},
}


@pytest.mark.parametrize(
    "node_type, values, problem",
    [
        ("QandC_ApplyCache", ["speedup", 2.0, *CACHE_WIDGETS], None),
        ("QandC_ApplyCache", ["number of steps", 20, 0, 0.25, 0.75, "blocks", True], None),
        ("QandC_ApplyCache", ["error budget", 0.02, 4, *CACHE_WIDGETS], None),
        ("QandC_ApplyCache", ["interval", 3, *CACHE_WIDGETS], None),
        ("QandC_ApplyCache", ["chosen steps", "0-4, 8", *CACHE_WIDGETS], None),
        ("QandC_ApplyCache", ["interval", 3], "no value for order"),
        ("QandC_ApplyCache", ["interval", 51, *CACHE_WIDGETS], "policy.interval is 51"),
        ("QandC_ApplyCache", ["interval", 3, 1, 0.0, 1.0, "layers", False], "reuse is 'layers'"),
        ("QandC_ApplyCache", ["error budget", 0.02, *CACHE_WIDGETS], "order is 0.0"),
        ("QandC_ApplyCache", ["interval", 3, *CACHE_WIDGETS, 0], r"left over: \[0\]"),
        ("QandC_Sample", [0, "fixed", 50, 1.5, "ddpm", "normal", 1.0, ""], None),
        ("QandC_Sample", [0, 50, 1.5, "ddpm", "normal", 1.0, ""], "no control_after_generate after seed"),
        ("QandC_Sample", [0, "fixed", 50, 1.5, "no sampler", "normal", 1.0, ""], "sampler_name is 'no sampler'"),
        ("QandC_LoadDiT", ["a file.safetensors", "auto", "auto", 0], None),
        ("QandC_Compare", [8, 4, 3, "dark"], None),
        ("QandC_Compare", [8, 4, 51, "dark"], "repeats is 51"),
    ],
)
def test_checker_of_widget_values(node_type, values, problem):
    found = "; ".join(widget_problems({"type": node_type, "widgets_values": values}))
    assert re.search(problem, found) if problem else not found


@pytest.mark.parametrize(
    "node_type, inputs, problem",
    [
        ("QandC_ApplyCache", CACHE_INPUTS, None),
        ("QandC_ApplyCache", {**CACHE_INPUTS, "calibration": ["2", 0]}, "calibration takes QANDC_CALIBRATION and is"),
        ("QandC_ApplyCache", {**CACHE_INPUTS, "policy.interval": 0}, "policy.interval is 0"),
        ("QandC_ApplyCache", {**CACHE_INPUTS, "policy": "error budget"}, "policy.max_reused is missing"),
        ("QandC_ApplyCache", {**CACHE_INPUTS, "policy": "chosen steps"}, "policy.computed_steps is missing"),
        ("QandC_ApplyCache", {**CACHE_INPUTS, "model": ["2", 0]}, "model takes MODEL and is linked to"),
        ("QandC_ApplyCache", {**CACHE_INPUTS, "model": ["9", 0]}, "which is not there"),
        ("QandC_ApplyCache", {**CACHE_INPUTS, "mode": "block"}, "unknown input mode"),
        ("QandC_Sample", RUN_INPUTS, None),
        ("QandC_Sample", {**RUN_INPUTS, "steps": 50.5}, "steps is 50.5"),
        ("QandC_Sample", {k: v for k, v in RUN_INPUTS.items() if k != "label"}, "label is missing"),
        ("QandC_Compare", {"images.image0": ["3", 0], "shown": 8, "difference_gain": 4}, "images has 1 links, needs 2"),
    ],
)
def test_checker_of_prompts(node_type, inputs, problem):
    prompt = {**GRAPH, "4": {"class_type": node_type, "inputs": inputs}}
    found = "; ".join(prompt_problems(prompt, "4"))
    assert re.search(problem, found) if problem else not found
