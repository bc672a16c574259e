"""What ComfyUI finds in the pack: nodes, their descriptions, help pages, translations and templates."""

from __future__ import annotations

import json
from urllib.parse import quote

from .server import FOLDER, ROOT

NODES = (
    "QandC_LoadDiT",
    "QandC_ClassLabel",
    "QandC_ApplyCache",
    "QandC_TAPCalibrate",
    "QandC_CalibrateFromRuns",
    "QandC_Quantize",
    "QandC_QuantizeTextEncoder",
    "QandC_SaveTextEncoder",
    "QandC_VarianceCompensate",
    "QandC_Sample",
    "QandC_RunReport",
    "QandC_Compare",
)
FAILURES = ("IMPORT FAILED", "Cannot import", "Error while calling comfy_entrypoint", 'File "')
RECORDED = json.loads((ROOT / "tests" / "nodes" / "object_info.json").read_text(encoding="utf-8"))
TEXTS = ("display_name", "description", "category", "search_aliases", "output_node")
OUTPUTS = ("output", "output_name", "output_tooltips", "output_is_list")
TEMPLATES = sorted(path.stem for path in ROOT.glob("workflows/*.json"))


def inputs_of(schema: dict) -> dict[str, dict]:
    """Options of every input by its name, those inside dynamic inputs included."""
    found = {}
    for group in ("required", "optional"):
        for name, (_, options) in schema.get(group, {}).items():
            found[name] = options
            inner = [choice["inputs"] for choice in options.get("options", []) if isinstance(choice, dict)]
            if "template" in options:
                inner.append(options["template"]["input"])
            for nested in inner:
                found.update({f"{name}.{key}": value for key, value in inputs_of(nested).items()})
    return found


def test_the_log_is_clean(server):
    ours = [line for line in server.startup_log.splitlines() if FOLDER in line]
    assert ours, "the log does not mention the pack"
    assert [line for line in ours if any(failure in line for failure in FAILURES)] == []


def test_all_nodes_are_there_and_no_others(server):
    found = {name for name, node in server.object_info().items() if FOLDER in node["python_module"]}
    assert found == set(NODES)


def test_nodes_are_described(server, subtests):
    for node in NODES:
        with subtests.test(node):
            info = server.object_info(node)[node]
            assert info["category"] == "Q&C"
            assert info["description"].strip() and info["display_name"].strip()
            assert info["search_aliases"]


def test_every_input_and_output_has_a_tooltip(server, subtests):
    for node in NODES:
        with subtests.test(node):
            info = server.object_info(node)[node]
            inputs = inputs_of(info["input"])
            assert inputs
            assert [name for name, options in inputs.items() if not options.get("tooltip", "").strip()] == []
            assert len(info["output_tooltips"]) == len(info["output"])
            assert info["output"] or info["output_node"]
            assert all(tooltip and tooltip.strip() for tooltip in info["output_tooltips"])


def test_recorded_schema_is_the_server_s(server, subtests):
    """The record that the tests without a server go by; choices of samplers and files differ between machines."""
    for node in NODES:
        with subtests.test(node):
            live, recorded = server.object_info(node)[node], RECORDED[node]
            for key in (*TEXTS, *OUTPUTS, "input_order"):
                assert live[key] == recorded[key], key
            assert without_choices(live) == without_choices(recorded)


def without_choices(info: dict) -> dict[str, dict]:
    return {
        name: {key: value for key, value in options.items() if key not in ("options", "template")}
        for name, options in inputs_of(info["input"]).items()
    }


def test_inputs_inside_dynamic_inputs_are_seen(server):
    assert "policy.computed_steps" in inputs_of(server.object_info("QandC_ApplyCache")["QandC_ApplyCache"]["input"])
    assert "images.image" in inputs_of(server.object_info("QandC_Compare")["QandC_Compare"]["input"])


def test_help_pages_are_served(server, subtests):
    for node in NODES:
        with subtests.test(node):
            path = f"/extensions/{FOLDER}/docs/{node}.md"
            assert server.status_of(path) == 200, path
            assert server.get(path).strip()


def test_translations_are_served(server, subtests):
    for language in ("en", "zh"):
        with subtests.test(language):
            assert set(NODES) <= set(server.get_json("/i18n").get(language, {}).get("nodeDefs", {}))


def test_templates_are_listed(server):
    assert sorted(server.get_json("/api/workflow_templates").get(FOLDER, [])) == TEMPLATES


def test_templates_and_their_pictures_are_served(server, subtests):
    for template in TEMPLATES:
        with subtests.test(template):
            for ending in ("json", "jpg"):
                assert server.status_of(f"/api/workflow_templates/{FOLDER}/{quote(template)}.{ending}") == 200, ending
