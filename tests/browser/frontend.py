"""ComfyUI's own frontend in headless Chromium."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Settings that a returning user has: no tutorial, no template browser over the canvas.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}

EVERY_NODE = """
const inside = graph => graph._nodes.flatMap(n => [n, ...(n.subgraph ? inside(n.subgraph) : [])]);
"""


def chromium() -> str | None:
    """Path of the browser: $CHROMIUM, or one that is installed."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Frontend:
    def __init__(self, page: Any):
        self.page = page
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def load(self, workflow: dict, name: str, wait: int = 1500) -> None:
        """`wait` is in milliseconds, for what the frontend does after it has loaded a graph."""
        self.page.evaluate("([w, name]) => app.loadGraphData(w, true, true, name)", [workflow, name])
        self.page.wait_for_timeout(wait)

    def open_templates(self, pack: str) -> None:
        """The dialog, at the templates of the pack."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.get_by_text(pack, exact=True).first.evaluate("entry => entry.click()")
        self.page.wait_for_timeout(1500)

    def open_template(self, pack: str, name: str) -> None:
        """As users do: Templates, the pack, the card."""
        self.open_templates(pack)
        self.page.get_by_test_id(f"template-workflow-{name}").evaluate("card => card.click()")
        self.page.get_by_test_id("template-workflows-content").wait_for(state="hidden")
        self.page.wait_for_timeout(2000)

    def missing_nodes(self) -> list[str]:
        """Types that the frontend does not know, inside subgraphs too."""
        return self.page.evaluate(
            """() => { const inside = graph => graph._nodes.flatMap(n => n.subgraph ? inside(n.subgraph) : [n]);
            return inside(app.graph).filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type) }"""
        )

    def prompt(self) -> dict:
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def settled_prompt(self) -> dict:
        """The prompt once it no longer changes: some nodes set widgets a while after they are loaded."""
        last, now = None, self.prompt()
        for _ in range(25):
            if now == last:
                break
            self.page.wait_for_timeout(200)
            last, now = now, self.prompt()
        return now

    def serialize(self) -> dict:
        """The graph as it is saved: what is undefined is left out, which would arrive here as null."""
        return json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def set_widgets(self, values: dict[str, Any]) -> None:
        """Sets every widget of these names, inside subgraphs too."""
        self.page.evaluate(
            "(values) => {"
            + EVERY_NODE
            + """
            for (const node of inside(app.graph)) for (const widget of node.widgets ?? [])
            if (widget.name in values) widget.value = values[widget.name] }""",
            values,
        )

    def run(self, timeout: float = 300) -> None:
        """Presses Run and waits for the end."""
        self.page.evaluate(
            """() => { window.ended = null; for (const kind of ['execution_success', 'execution_error',
            'execution_interrupted']) app.api.addEventListener(kind, e => { window.ended = [kind, e.detail] }) }"""
        )
        self.page.get_by_text("Run", exact=True).first.click()
        self.page.wait_for_function("() => window.ended", timeout=timeout * 1000)
        kind, detail = self.page.evaluate("() => window.ended")
        assert kind == "execution_success", detail
        self.page.wait_for_timeout(1500)

    def wires_over_nodes(self) -> list[str]:
        """Nodes that lie in the way of a wire between two others, as the curves of the canvas run."""
        return self.page.evaluate(
            """() => { const found = new Set(), nodes = app.graph._nodes;
            const boxes = new Map(nodes.map(n => [n, Array.from(n.boundingRect ?? n._bounding)]));
            for (const link of app.graph.links.values()) {
              const from = app.graph.getNodeById(link.origin_id), to = app.graph.getNodeById(link.target_id);
              const [a, b] = [from.getOutputPos(link.origin_slot), to.getInputPos(link.target_slot)];
              const reach = Math.hypot(b[0] - a[0], b[1] - a[1]) * 0.25;
              for (let t = 0; t <= 1; t += 0.01) {
                const [p, q, r, s] = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t ** 3];
                const x = p * a[0] + q * (a[0] + reach) + r * (b[0] - reach) + s * b[0];
                const y = (p + q) * a[1] + (r + s) * b[1];
                for (const [n, [left, top, width, height]] of boxes) if (n !== from && n !== to
                  && x > left && x < left + width && y > top && y < top + height)
                  found.add(`${from.title} -> ${to.title}: ${n.title}`);
              } }
            return [...found] }"""
        )

    def open_advanced(self) -> list[str]:
        """Advanced inputs that are drawn on the canvas, of nodes inside subgraphs too."""
        return self.page.evaluate(
            "() => {"
            + EVERY_NODE
            + """
            return inside(app.graph).filter(n => n.type.startsWith('QandC_')).flatMap(n => (n.widgets ?? [])
              .filter(w => w.options?.advanced && n.isWidgetVisible(w)).map(w => `${n.title}: ${w.name}`)) }"""
        )

    def show_all(self) -> dict[str, float]:
        """Brings the whole graph into view; returns where it lies on the page."""
        area = self.page.evaluate(
            """() => { const b = app.graph._nodes.concat(app.graph._groups).map(n => n.boundingRect ?? n._bounding);
            const left = Math.min(...b.map(r => r[0])), top = Math.min(...b.map(r => r[1]));
            const right = Math.max(...b.map(r => r[0] + r[2])), bottom = Math.max(...b.map(r => r[1] + r[3]));
            const e = app.canvas.canvas.getBoundingClientRect(), side = 70, head = 110;
            const s = Math.min((e.width - side - 30) / (right - left), (e.height - head - 30) / (bottom - top), 1);
            app.canvas.ds.scale = s;
            app.canvas.ds.offset = [side / s - left, head / s - top];
            app.canvas.setDirty(true, true);
            const [width, height] = [(right - left) * s + 24, (bottom - top) * s + 24];
            return {x: e.x + side - 12, y: e.y + head - 12, width, height} }"""
        )
        self.page.wait_for_timeout(6000)  # until notices of the finished job are gone
        return area

    def search(self, *words: str) -> dict[str, list[str]]:
        """What the search box that a double click opens lists for each of the words, best first."""
        self.page.evaluate("() => app.graph.clear()")
        self.page.mouse.move(400, 300)
        box, found = self.page.locator("input[role=combobox]"), {}
        for _ in range(5):  # on a busy machine the two clicks may be taken for two single ones
            self.page.mouse.dblclick(640, 420)
            self.page.wait_for_timeout(2500)
            if box.count():
                break
        for word in words:
            box.fill("")
            self.page.wait_for_timeout(400)
            box.fill(word)
            self.page.wait_for_timeout(1200)
            found[word] = [text.strip() for text in self.page.get_by_test_id("result-item").all_text_contents()]
        self.page.keyboard.press("Escape")
        return found

    def help(self, node_type: str) -> dict[str, Any]:
        """The help of a node, opened by the "i" of the toolbox that appears above a selected node."""
        self.page.evaluate(
            """type => { app.graph.clear(); const node = LiteGraph.createNode(type); app.graph.add(node);
            node.pos = [220, 200]; app.canvas.ds.scale = 0.6; app.canvas.ds.offset = [100, 100];
            app.canvas.selectNode(node) }""",
            node_type,
        )
        content = self.page.locator(".node-help-content")
        if not content.count():
            self.page.get_by_test_id("info-button").click()
        self.page.wait_for_timeout(1500)
        return content.evaluate(
            """e => ({title: e.querySelector("h1")?.innerText, picture: e.querySelector("img")?.naturalWidth ?? 0,
            width: e.getBoundingClientRect().width, needed: Math.max(...[e, ...e.querySelectorAll("*")].map(
                x => x.getBoundingClientRect().right - e.getBoundingClientRect().left))})"""
        )

    def screenshot(self, path: Path, area: dict[str, float] | None = None, quality: int = 82) -> None:
        self.page.screenshot(path=str(path), type="jpeg", quality=quality, clip=area)


@contextmanager
def open_frontend(
    address: str, width: int = 2200, height: int = 1240, locale: str = "en", nodes_2: bool = False
) -> Iterator[Frontend]:
    """`nodes_2` draws nodes as HTML ("Nodes 2.0") instead of on the canvas."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            for name, value in {**SETTINGS, "Comfy.Locale": locale, "Comfy.VueNodes.Enabled": nodes_2}.items():
                page.request.post(f"http://{address}/settings/{name}", data=json.dumps(value))
            page.goto(f"http://{address}")
            page.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=90_000)
            page.wait_for_timeout(2500)
            page.keyboard.press("Escape")
            yield Frontend(page)
        finally:
            browser.close()
