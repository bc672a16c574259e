"""Apply Cache in every official template that samples, against recorded schemas; tests/comfyui asks a real ComfyUI."""

import copy

import pytest

from tests.nodes.test_workflows import widget_problems
from tests.official.insertion import NODE, TARGETS, default_widgets, graphs, links, with_cache
from tests.official.recorded import recorded
from tests.official.templates import Checker, available, check, nodes, sampling_templates

pytestmark = pytest.mark.skipif(not available(), reason="comfyui-workflow-templates-json is not installed")


def test_apply_cache_goes_before_every_sampler_and_guider():
    found = {name: check(workflow, recorded()) for name, workflow in sampling_templates().items()}
    assert len(found) == 241
    assert not {name: problems for name, problems in found.items() if problems}


def test_the_widgets_of_the_new_node_fit_its_schema():
    values = default_widgets(recorded()[NODE])
    first = recorded()[NODE]["input"]["required"]["policy"][1]["options"][0]
    assert values[0] == first["key"]
    assert widget_problems({"type": NODE, "widgets_values": values}) == []


def test_ids_stay_unique_and_the_template_itself_is_not_changed():
    for name, workflow in sampling_templates().items():
        before = copy.deepcopy(workflow)
        changed = with_cache(workflow, [])
        assert workflow == before, name
        old, new = ids(workflow), ids(changed)
        added = [type for node in nodes(changed) if (type := node["type"]) == NODE]
        assert len(new) - len(set(new)) == len(old) - len(set(old)), name
        assert len(new) - len(old) == len(added) > 0, name


def ids(workflow):
    return [node["id"] for graph in graphs(workflow) for node in graph["nodes"]]


def template(name="flux_schnell"):
    return copy.deepcopy(sampling_templates()[name])


def sampler_and_link(workflow):
    graph = next(g for g in graphs(workflow) if any(node["type"] in TARGETS for node in g["nodes"]))
    node = next(node for node in graph["nodes"] if node["type"] in TARGETS)
    slot = next(i for i, given in enumerate(node["inputs"]) if given["name"] == "model")
    return graph, node, slot, links(graph)[node["inputs"][slot]["link"]]


def vae_into_sampler(workflow):
    graph, _, _, link = sampler_and_link(workflow)
    loader = next(node for node in graph["nodes"] if node["type"] in ("VAELoader", "CheckpointLoaderSimple"))
    link.set(origin_id=loader["id"], origin_slot=[o["type"] for o in loader["outputs"]].index("VAE"))


def nothing_at_the_slot(workflow):
    _, node, slot, _ = sampler_and_link(workflow)
    node["inputs"][slot]["link"] = 10**6


def another_name(workflow):
    _, node, slot, _ = sampler_and_link(workflow)
    node["inputs"][slot]["name"] = "patched_model"


@pytest.mark.parametrize(
    "damage, problem",
    [
        (vae_into_sampler, "gives VAE to MODEL"),
        (nothing_at_the_slot, "which is not there"),
        (another_name, "no input patched_model"),
    ],
)
@pytest.mark.parametrize("name", ["flux_schnell", "image_z_image_turbo", "video_wan2_2_14B_t2v"])
def test_checker_finds_what_is_wrong(name, damage, problem):
    """Damage at the top level and inside subgraphs."""
    workflow = template(name)
    types = {**recorded(), "VAELoader": {"input": {}, "output": ["VAE"]}}
    assert not any(problem in text for text in Checker(workflow, types).problems())
    damage(workflow)
    assert any(problem in text for text in Checker(workflow, types).problems())
