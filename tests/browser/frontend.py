"""ComfyUI's own frontend in headless Chromium.

Most of what the frontend does it does later: it fits the view when a file has arrived, draws in animation frames, and
lets nodes grow when pictures are there. Nothing here waits for a time, which a busy machine makes too short. Every
method waits for what it caused, and then for `settled`. $QANDC_CPU_THROTTLE, such as 10, makes the page that many times
slower, to try this.
"""

from __future__ import annotations

import json
import os
import shutil
import time
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

LIMIT = 300  # seconds that anything may take on a busy machine
QUIET = 300  # milliseconds in which nothing may change
# What a test may look at: the view as it is drawn, and the places of nodes on the canvas and as HTML.
SEEN = """() => {
  const {ds, visible_area, canvas, graph} = app.canvas, [x, y, width, height] = visible_area
  const drawn = Math.abs(x + ds.offset[0]) + Math.abs(y + ds.offset[1]) < 0.01
    && Math.abs(width * ds.scale - canvas.width) + Math.abs(height * ds.scale - canvas.height) < 1
  const html = [...document.querySelectorAll('[data-node-id]')]
  const whole = [...document.images].every(image => image.complete)
  if (!drawn || !whole || (LiteGraph.vueNodesMode && html.length !== graph._nodes.length)) return null
  return JSON.stringify([ds.scale, [...ds.offset], canvas.width, canvas.height,
    graph._nodes.map(node => [node.id, ...(node.boundingRect ?? node._bounding)]),
    html.map(node => { const {x, y, width, height} = node.getBoundingClientRect(); return [x, y, width, height] })])
}"""
# Timers of the page itself: what it put off for less than `quiet` before this was called is done when it ends.
STEADY = """([look, quiet, limit]) => new Promise((done, failed) => {
  const read = eval(`(${look})`), begun = performance.now()
  let last = null, since = begun, frames = 0
  const again = () => {
    app.canvas.setDirty(true, true)
    const now = read(), time = performance.now()
    if (now === null || now !== last) [last, since, frames] = [now, time, 0]
    if (now !== null && frames++ >= 5 && time - since >= quiet) return setTimeout(done, 0)
    if (time - begun > limit) return failed(new Error(`not steady after ${limit} ms: ${now}`))
    requestAnimationFrame(again)
  }
  setTimeout(again, quiet)
})"""
READY = (
    """() => window.app?.graph && app.canvas && app.api.clientId && app.extensionManager?.workflow?.activeWorkflow"""
)
# Opening a template goes on after its dialog has closed; this counts the graphs that have been loaded.
COUNT_LOADS = """() => { const load = app.loadGraphData; window.loads = 0
  app.loadGraphData = async function (...given) {
    try { return await load.apply(this, given) } finally { window.loads++ } } }"""
# Every node that is in view and was given pictures has them, on the canvas and as HTML.
PICTURES_SHOWN = """() => app.canvas.visible_nodes.every(node => {
  const wanted = app.nodeOutputs[node.id]?.images?.length ?? 0
  const html = document.querySelectorAll(`[data-node-id="${node.id}"] img`)
  const shown = [...(LiteGraph.vueNodesMode ? html : node.imgs ?? [])].filter(image => image.naturalWidth)
  return !wanted || shown.length > 0 })"""
BOX = "() => String(document.querySelectorAll('input[role=combobox]').length)"
RESULTS = "() => [...document.querySelectorAll('[data-testid=result-item]')].map(item => item.textContent).join('\\n')"
HELP_SHOWN = """type => { const page = document.querySelector('.node-help-content')
  const title = LiteGraph.registered_node_types[type].title
  return page?.querySelector('h1')?.innerText === title && [...page.querySelectorAll('img')].every(i => i.complete) }"""

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
        self.requests: set[Any] = set()  # that the server has not answered yet
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.add(request))
        for ended in ("requestfinished", "requestfailed"):
            page.on(ended, lambda request: self.requests.discard(request))

    def steady(self, look: str = SEEN, quiet: int = QUIET) -> None:
        """Waits until what the JavaScript function `look` gives no longer changes and is not null.

        It also waits for the server's answers: what comes with them may change the page.
        """
        deadline = time.monotonic() + LIMIT
        while True:
            asked = {request for request in self.requests if request.url.startswith(self.page.url.split("#")[0])}
            self.page.evaluate(STEADY, [look, quiet, LIMIT * 1000])
            if not asked & self.requests:
                return
            assert time.monotonic() < deadline, f"no answer to {[request.url for request in asked]}"

    def wait_for(self, condition: str, argument: Any = None, limit: float = LIMIT) -> None:
        """Waits until the JavaScript function is true."""
        self.page.wait_for_function(condition, arg=argument, timeout=limit * 1000)

    def load(self, workflow: dict, name: str) -> None:
        self.page.evaluate("([w, name]) => app.loadGraphData(w, true, true, name)", [workflow, name])
        self.steady()

    def open_templates(self, pack: str) -> None:
        """The dialog, at the templates of the pack."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.get_by_text(pack, exact=True).first.evaluate("entry => entry.click()")
        ours = self.page.evaluate("async pack => (await app.api.getWorkflowTemplates())[pack]", pack)
        self.wait_for(
            """ours => { const listed = [...document.querySelectorAll('[data-testid^=template-workflow-]')];
            return listed.length && listed.every(card => ours.includes(card.dataset.testid)) }""",
            [f"template-workflow-{name}" for name in ours],
        )

    def open_template(self, pack: str, name: str) -> None:
        """As users do: Templates, the pack, the card."""
        self.open_templates(pack)
        loads = self.page.evaluate("() => window.loads")
        self.page.get_by_test_id(f"template-workflow-{name}").evaluate("card => card.click()")
        self.page.get_by_test_id("template-workflows-content").wait_for(state="hidden")
        self.wait_for("loads => window.loads > loads", loads)
        self.steady()

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
        while now != last:
            self.steady()
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
        self.steady()
        self.wait_for(PICTURES_SHOWN)
        self.steady()

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

    def boxes(self) -> list[list]:
        """Name, left, top, width and height of every node of the graph that is shown, as it is drawn."""
        return self.page.evaluate(
            """() => { const {graph, ds} = app.canvas
            const box = n => [n.title, ...(n.boundingRect ?? n._bounding)]
            const drawn = n => { const e = document.querySelector(`[data-node-id="${n.id}"]`).getBoundingClientRect()
              return [n.title, e.x / ds.scale - ds.offset[0], e.y / ds.scale - ds.offset[1],
                e.width / ds.scale, e.height / ds.scale] }
            const ends = [['Inputs', graph.inputNode], ['Outputs', graph.outputNode]].filter(([, node]) => node)
            return [...graph._nodes.map(LiteGraph.vueNodesMode ? drawn : box),
              ...ends.map(([name, node]) => [name, ...node.boundingRect])] }"""
        )

    def subgraphs(self) -> list[str]:
        """Ids of the subgraphs that the open graph holds, those inside others too."""
        return self.page.evaluate("() => [...app.graph.subgraphs.keys()]")

    def open_subgraph(self, subgraph: str) -> None:
        """Shows what is inside."""
        self.page.evaluate("id => app.canvas.setGraph(app.graph.subgraphs.get(id))", subgraph)
        self.wait_for("id => app.canvas.graph.id === id", subgraph)
        self.steady()

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
        self.steady()
        return area

    def search(self, *words: str) -> dict[str, list[str]]:
        """What the search box that a double click opens lists for each of the words, best first."""
        self.page.evaluate("() => app.graph.clear()")
        self.page.mouse.move(400, 300)
        box, found = self.page.locator("input[role=combobox]"), {}
        for _ in range(5):  # on a busy machine the two clicks may be taken for two single ones
            self.page.mouse.dblclick(640, 420)
            self.steady(BOX)
            if box.count():
                break
        for word in words:
            for text in ("", word):
                box.fill(text)
                self.steady(RESULTS)
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
        self.wait_for(HELP_SHOWN, node_type)
        self.steady()
        return content.evaluate(
            """e => ({title: e.querySelector("h1")?.innerText, picture: e.querySelector("img")?.naturalWidth ?? 0,
            width: e.getBoundingClientRect().width, needed: Math.max(...[e, ...e.querySelectorAll("*")].map(
                x => x.getBoundingClientRect().right - e.getBoundingClientRect().left))})"""
        )

    def screenshot(self, path: Path, area: dict[str, float] | None = None, quality: int = 82) -> None:
        """Of the page when notices of a job that has ended are gone."""
        self.steady("() => document.querySelector('[data-testid=queue-notification-banner]') ? null : ''", 1000)
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
            page.set_default_timeout(LIMIT * 1000)
            if throttle := os.environ.get("QANDC_CPU_THROTTLE"):
                slower = page.context.new_cdp_session(page)
                slower.send("Emulation.setCPUThrottlingRate", {"rate": float(throttle)})
            frontend = Frontend(page)
            for name, value in {**SETTINGS, "Comfy.Locale": locale, "Comfy.VueNodes.Enabled": nodes_2}.items():
                page.request.post(f"http://{address}/settings/{name}", data=json.dumps(value))
            page.goto(f"http://{address}")
            frontend.wait_for(READY)
            page.evaluate(COUNT_LOADS)
            frontend.steady()
            page.keyboard.press("Escape")
            yield frontend
        finally:
            browser.close()
