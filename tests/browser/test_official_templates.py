"""Thirty of ComfyUI's official templates in the frontend, with Apply Cache before every sampler and guider."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest

from tests.browser.frontend import Frontend, chromium, open_frontend
from tests.comfyui.checkouts import parameters
from tests.comfyui.server import Server
from tests.official.insertion import NODE, TARGETS, default_widgets, with_cache
from tests.official.templates import absent, available, sample, sampling_templates

pytestmark = [
    pytest.mark.skipif(chromium() is None, reason="no Chromium: install it, or set CHROMIUM to its path"),
    pytest.mark.skipif(not available(), reason="comfyui-workflow-templates-json is not installed"),
]
THIRTY = sample(sampling_templates(), 30) if available() else []


@pytest.fixture(scope="module", params=parameters()[:1])
def server(request, tmp_path_factory) -> Iterator[Server]:
    with Server(request.param, tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture(scope="module")
def object_info(server) -> dict:
    return server.object_info()


@pytest.fixture(scope="module")
def frontend(server) -> Iterator[Frontend]:
    with open_frontend(server.address, width=1280, height=800) as opened:
        yield opened


def expressions(prompt: dict) -> Counter[str]:
    """Every node but Apply Cache as what it computes, in text: its class, and its inputs with links written out.

    The frontend renumbers nodes whose ids occur in two subgraphs, so ids cannot be compared.
    """

    @cache
    def written(key: str) -> str:
        node = prompt[key]
        inputs = {name: linked(value) for name, value in sorted(node["inputs"].items())}
        return hashlib.sha256(f"{node['class_type']} {inputs}".encode()).hexdigest()

    def linked(value):
        while isinstance(value, list) and class_of(prompt, value) == NODE:
            value = prompt[value[0]]["inputs"]["model"]
        return [written(value[0]), value[1]] if class_of(prompt, value) else value

    return Counter(written(key) for key, node in prompt.items() if node["class_type"] != NODE)


def class_of(prompt: dict, value) -> str:
    """The class of the node that an input is linked to; "" for a value."""
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
    return prompt[value[0]]["class_type"] if is_link and value[0] in prompt else ""


@pytest.mark.parametrize("name", THIRTY)
def test_template_with_the_node(frontend, object_info, name):
    workflow = sampling_templates()[name]
    frontend.load(workflow, name)
    plain = frontend.settled_prompt()
    frontend.load(with_cache(workflow, default_widgets(object_info[NODE])), name)
    prompt = frontend.settled_prompt()
    assert set(frontend.missing_nodes()) == absent(workflow, object_info)
    samplers = [node for node in prompt.values() if node["class_type"] in TARGETS]
    assert samplers or not any(node["class_type"] in TARGETS for node in plain.values())
    for node in samplers:
        ours = prompt[node["inputs"][TARGETS[node["class_type"]]][0]]
        assert ours["class_type"] == NODE and prompt[ours["inputs"]["model"][0]]
        assert ours["inputs"]["policy"] == default_widgets(object_info[NODE])[0]
    assert expressions(prompt) == expressions(plain)
    assert frontend.errors == []
