"""Every template in the frontend that users open it in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.browser.frontend import Frontend, chromium, open_frontend
from tests.browser.make_templates import WINDOW, view
from tests.browser.stock_templates import BLUEPRINTS, STOCK
from tests.browser.templates import TEMPLATES
from tests.comfyui.checkouts import Checkout, parameters
from tests.comfyui.server import Server
from tests.official.templates import Checker

WORKFLOWS = Path(__file__).parents[2] / "workflows"
SUBGRAPHS = Path(__file__).parents[2] / "subgraphs"
BY_NAME = {template.name: template for template in (*TEMPLATES, *STOCK)}
READABLE = 0.6  # the zoom below which the canvas draws no text
SMALL = {"steps": 4, "trajectories": 4, "samples": 16, "clusters": 4, "pairs": 4, "batch_size": 4}

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium: install it, or set CHROMIUM to its path")


@pytest.fixture(scope="module", params=parameters()[:1])
def server(request, tmp_path_factory) -> Iterator[Server]:
    """The newest ComfyUI, with empty files in the place of downloads."""
    checkout: Checkout = request.param
    with Server(checkout, tmp_path_factory.mktemp("browser")) as running:
        for template in BY_NAME.values():
            for folder, name in template.files():
                path = running.base / "models" / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        yield running


@pytest.fixture(scope="module")
def frontend(server) -> Iterator[Frontend]:
    with open_frontend(server.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def object_info(server) -> dict:
    return server.object_info()


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_template_is_written_down():
    assert {path.stem for path in WORKFLOWS.glob("*.json")} == set(BY_NAME)


def wired(nodes: Iterable[tuple[str, dict]]) -> list[tuple[str, list[str]]]:
    """Type of every node, and its inputs that have a wire."""
    return sorted((kind, sorted(k for k, v in inputs.items() if isinstance(v, list | tuple))) for kind, inputs in nodes)


@pytest.mark.parametrize("name", BY_NAME)
def test_api_twin_has_every_wire_that_is_written_down(name):
    written = [(n["type"], n["inputs"]) for n in BY_NAME[name].nodes.values() if n["type"] != "MarkdownNote"]
    twin = read(WORKFLOWS / "api" / f"{name}.json").values()
    assert wired((node["class_type"], node["inputs"]) for node in twin) == wired(written)


def computed(prompt: dict) -> dict:
    """Without titles and what newer frontends add to them, such as the pack of a node."""
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}


@pytest.mark.parametrize("name", BY_NAME)
def test_opens_with_no_node_missing_and_equals_its_api_twin(frontend, name):
    frontend.load(read(WORKFLOWS / f"{name}.json"), name)
    assert frontend.missing_nodes() == []
    assert computed(frontend.prompt()) == computed(read(WORKFLOWS / "api" / f"{name}.json"))
    assert frontend.errors == []


@pytest.mark.parametrize("name", [name for name, template in BY_NAME.items() if template.runs_here])
def test_run_shows_the_comparison(frontend, name):
    frontend.load(read(WORKFLOWS / f"{name}.json"), name)
    frontend.set_widgets(SMALL)
    frontend.run()
    shown = frontend.page.evaluate(
        "() => app.graph._nodes.filter(n => n.type === 'QandC_Compare').map(n => n.imgs?.[0]?.naturalWidth ?? 0)"
    )
    assert shown and min(shown) > 500
    check_sizes(frontend.page.evaluate(RECTANGLES))  # words and pictures on the nodes have grown them
    assert frontend.wires_over_nodes() == []


RECTANGLES = "() => app.graph._nodes.map(n => [n.title, ...(n.boundingRect ?? n._bounding)])"


def lying_on_others(boxes: list[list]) -> list[str]:
    """Of nodes as name, left, top, width and height."""
    return [
        f"{one} lies on {other}"
        for i, (one, x, y, w, h) in enumerate(boxes)
        for other, x2, y2, w2, h2 in boxes[:i]
        if not (x >= x2 + w2 or x2 >= x + w or y >= y2 + h2 or y2 >= y + h)
    ]


def check_sizes(boxes: list[list]) -> None:
    """No node lies on another, and fitted into the window all are large enough to be drawn with text."""
    assert view([box[1:] for box in boxes])["scale"] >= READABLE
    assert lying_on_others(boxes) == []


@pytest.mark.parametrize("name", BY_NAME)
def test_opens_with_text_that_can_be_read_and_nothing_over_another(frontend, name):
    """Loaded as a file, which keeps the view that is stored in it."""
    frontend.load(read(WORKFLOWS / f"{name}.json"), name)
    check_sizes(frontend.page.evaluate(RECTANGLES))
    assert frontend.wires_over_nodes() == []
    assert frontend.open_advanced() == []
    assert frontend.page.evaluate("() => app.canvas.ds.scale") >= READABLE
    assert len(frontend.page.evaluate(RECTANGLES)) <= (8 if BY_NAME[name] in STOCK else 10)


@pytest.fixture
def at_1080p(frontend) -> Iterator[Frontend]:
    """The window of a browser that fills a screen of 1920 x 1080, with the frontend's own limit for text."""
    page, limit = frontend.page, "LiteGraph.Canvas.MinFontSizeForLOD"
    before, size = page.evaluate("limit => app.extensionManager.setting.get(limit)", limit), page.viewport_size
    page.set_viewport_size(dict(zip(("width", "height"), WINDOW)))
    page.evaluate("limit => app.extensionManager.setting.set(limit, 8)", limit)
    frontend.wait_for("() => app.canvas.min_font_size_for_lod === 8 && app.canvas.canvas.width === innerWidth")
    yield frontend
    page.evaluate("([limit, before]) => app.extensionManager.setting.set(limit, before)", [limit, before])
    page.set_viewport_size(size)


@pytest.mark.parametrize("name", BY_NAME)
def test_opens_from_the_dialog_with_all_of_it_in_view_and_text_drawn(at_1080p, name):
    """The dialog fits the graph into the window, whatever view is stored."""
    at_1080p.open_template("ComfyUI-QandC", name)
    scale, coarse, outside = at_1080p.page.evaluate(
        """() => { const {ds, low_quality} = app.canvas, [x, y, width, height] = app.canvas.visible_area;
        return [ds.scale, low_quality, app.graph._nodes.filter(n => { const [l, t, w, h] = n.boundingRect;
          return l < x || t < y || l + w > x + width || t + h > y + height }).map(n => n.title)] }"""
    )
    assert scale >= READABLE and not coarse and outside == []
    assert at_1080p.errors == []


@pytest.fixture
def nodes_2(frontend) -> Iterator[Frontend]:
    """Nodes drawn as HTML, which makes them taller."""
    choose = "drawn => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', drawn)"
    frontend.page.evaluate(choose, True)
    frontend.wait_for("() => LiteGraph.vueNodesMode")
    yield frontend
    frontend.page.evaluate(choose, False)


def test_no_node_lies_on_another_in_nodes_2(nodes_2):
    overlaps = {}
    for name in BY_NAME:
        nodes_2.load(read(WORKFLOWS / f"{name}.json"), name)
        boxes = nodes_2.page.locator("[data-node-id]").evaluate_all(
            """nodes => nodes.map(node => { const {x, y, width, height} = node.getBoundingClientRect();
            return [node.dataset.nodeId, x, y, width, height] })"""
        )
        assert len(boxes) == len(nodes_2.page.evaluate(RECTANGLES)), name
        overlaps[name] = lying_on_others(boxes)
    assert not {name: found for name, found in overlaps.items() if found}


@pytest.fixture(params=[False, True], ids=["on the canvas", "as HTML"])
def either(request, frontend) -> Iterator[Frontend]:
    """Nodes drawn in one way and in the other."""
    if request.param:
        request.getfixturevalue("nodes_2")
    return frontend


def test_no_node_lies_on_another_inside_subgraphs(either):
    """The ends, where wires come in and go out, are nodes too."""
    overlaps, opened = {}, set()
    for name in [*BY_NAME, *(blueprint.name for blueprint in BLUEPRINTS)]:
        either.load(read((WORKFLOWS if name in BY_NAME else SUBGRAPHS) / f"{name}.json"), name)
        for subgraph in either.subgraphs():
            either.open_subgraph(subgraph)
            overlaps[name, subgraph] = lying_on_others(either.boxes())
            opened.add(name)
    assert not {key: found for key, found in overlaps.items() if found}
    assert opened >= {template.name for template in (*STOCK, *BLUEPRINTS)}


def test_the_dialog_lists_them_in_order(frontend):
    frontend.open_templates("ComfyUI-QandC")
    cards = frontend.page.locator("[data-testid^=template-workflow-]")
    cards.nth(len(BY_NAME) - 1).wait_for()  # they are added as they come into view
    listed = cards.evaluate_all("cards => cards.map(card => card.dataset.testid.replace('template-workflow-', ''))")
    frontend.page.keyboard.press("Escape")
    assert listed == sorted(BY_NAME, key=str.lower)


@pytest.mark.parametrize("name", [*BY_NAME, *(blueprint.name for blueprint in BLUEPRINTS)])
def test_links_fit_the_nodes_of_this_comfyui(object_info, name):
    workflow = read((WORKFLOWS if name in BY_NAME else SUBGRAPHS) / f"{name}.json")
    assert Checker(workflow, object_info).problems() == set()


def test_advanced_inputs_open_and_close(frontend):
    """By the entry of the node's menu, without a change of what the node holds or of the room below its inputs."""
    frontend.load(read(WORKFLOWS / "8 Quantize your model.json"), "8 Quantize your model")
    before = frontend.prompt()
    sizes = frontend.page.evaluate(
        """() => app.graph._nodes.filter(n => n.type === 'QandC_TAPCalibrate').flatMap(n => {
        const heights = [n.size[1]], rows = n.widgets.filter(w => w.options?.advanced).length;
        for (const _ of [0, 1]) { n.toggleAdvanced(); heights.push(n.size[1]) }
        return [heights[0], heights[1] - 24 * rows, heights[2], n.hasAdvancedWidgets() && rows] })"""
    )
    assert sizes[0] == sizes[1] == sizes[2] and sizes[3] > 5
    frontend.page.evaluate("() => app.graph._nodes.forEach(n => n.toggleAdvanced?.())")
    assert "TAP Calibrate: hessians" in frontend.open_advanced()
    assert frontend.prompt() == before and frontend.errors == []


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda blueprint: blueprint.name)
def test_blueprint_is_offered_and_opens(frontend, server, blueprint):
    offered = server.get_json("/global_subgraphs").values()
    (ours,) = [entry for entry in offered if entry["name"] == blueprint.name]
    assert ours["info"]["node_pack"] == "custom_nodes.ComfyUI-QandC"
    frontend.load(read(SUBGRAPHS / f"{blueprint.name}.json"), blueprint.name)
    assert frontend.missing_nodes() == []
    (node,) = frontend.serialize()["nodes"]
    assert [slot["type"] for slot in node["outputs"]] == ["MODEL"]
    assert [slot["type"] for slot in node["inputs"] if not slot.get("widget")] == ["MODEL"]
    assert len([slot for slot in node["inputs"] if slot.get("widget")]) == len(blueprint.subgraphs[0].promoted)
