"""What a run leaves on the nodes, drawn on the canvas and as HTML ("Nodes 2.0")."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.browser.frontend import chromium, open_frontend
from tests.comfyui.checkouts import Checkout, parameters
from tests.comfyui.server import Server

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium: install it, or set CHROMIUM to its path")
SETTINGS = {"steps": 6, "cfg": 1.5, "sampler_name": "ddim", "scheduler": "normal"}
NODES = {  # name -> type, place, widgets
    "load": ("QandC_LoadDiT", [0, 0], {}),
    "labels": ("QandC_ClassLabel", [0, 300], {"classes": "3,5"}),
    "empty": ("EmptyLatentImage", [0, 600], {"width": 32, "height": 32, "batch_size": 2}),
    "vae": ("VAELoader", [0, 900], {"vae_name": "pixel_space"}),
    "runs": ("QandC_CalibrateFromRuns", [400, 0], {"name": "shown"}),
    "plain": ("QandC_RunReport", [800, 0], {"label": "plain"}),
    "quantize": ("QandC_Quantize", [400, 500], {"format": "W8A8"}),
    "cache": ("QandC_ApplyCache", [800, 500], {"policy": "interval"}),
    "fast": ("QandC_RunReport", [1200, 500], {"label": "fast"}),
    "sample": ("KSampler", [1200, 0], SETTINGS),
    "sample fast": ("KSampler", [1600, 500], SETTINGS),
    "image": ("VAEDecode", [1600, 0], {}),
    "image fast": ("VAEDecode", [2000, 500], {}),
    "compare": ("QandC_Compare", [2000, 0], {}),
}
WIRES = [
    ("load", "MODEL", "runs", "model"), ("runs", "MODEL", "plain", "model"), ("plain", "MODEL", "sample", "model"),
    ("load", "MODEL", "quantize", "model"), ("quantize", "MODEL", "cache", "model"),
    ("cache", "MODEL", "fast", "model"), ("fast", "MODEL", "sample fast", "model"),
    *((source, output, node, slot) for node in ("sample", "sample fast") for source, output, slot in (
        ("labels", "positive", "positive"), ("labels", "negative", "negative"), ("empty", "LATENT", "latent_image"))),
    ("sample", "LATENT", "image", "samples"), ("sample fast", "LATENT", "image fast", "samples"),
    ("vae", "VAE", "image", "vae"), ("vae", "VAE", "image fast", "vae"),
    ("image", "IMAGE", "compare", "images.image0"), ("image fast", "IMAGE", "compare", "images.image1"),
    ("plain", "report", "compare", "reports.report0"), ("fast", "report", "compare", "reports.report1"),
]  # fmt: skip
BUILD = """([nodes, wires]) => {
  app.graph.clear()
  const made = {}
  for (const [name, [type, pos, values]] of Object.entries(nodes)) {
    const node = made[name] = LiteGraph.createNode(type)
    app.graph.add(node)
    node.pos = pos
    for (const widget of node.widgets ?? []) if (widget.name in values) {
      widget.value = values[widget.name]
      widget.callback?.(widget.value, app.canvas, node)
    }
  }
  for (const [from, output, to, input] of wires) {
    const source = made[from].outputs.findIndex(o => o.name === output || o.type === output)
    made[from].connect(source, made[to], made[to].inputs.findIndex(i => i.name === input))
  }
  const unwired = wires.filter(([, , to, input]) => made[to].inputs.find(i => i.name === input)?.link == null)
  return [Object.fromEntries(Object.entries(made).map(([name, node]) => [name, node.id])), unwired]
}"""
# Pixels of each node's words that its place leaves out.
HIDDEN = """() => [...document.querySelectorAll('*')].filter(e => !e.children.length || e.querySelector(':scope > br'))
  .filter(e => /steps? computed|W8A8 layers|samples?: too few/.test(e.textContent) && e.offsetParent).flatMap(e => {
    for (let box = e; box && box !== document.body; box = box.parentElement)
      if (['auto', 'hidden', 'scroll'].includes(getComputedStyle(box).overflowY))
        return [box.scrollHeight - box.clientHeight]
    return [] })"""
# Words of the nodes that are broken, though a line has room for them.
BROKEN = """() => [...document.querySelectorAll('.dom-widget .break-all, [data-node-id] *')].filter(e => e.offsetParent
    && [...e.childNodes].some(n => n.nodeType === 3) || e.matches('.break-all')).flatMap(e => {
  const walker = document.createTreeWalker(e, NodeFilter.SHOW_TEXT), found = []
  for (let text; (text = walker.nextNode());) if (/steps? computed|W8A8 layers|too few|hardly/.test(text.data))
    for (const {0: word, index} of text.data.matchAll(/\\S+/g)) {
      const range = document.createRange()
      range.setStart(text, index)
      range.setEnd(text, index + word.length)
      if (new Set([...range.getClientRects()].map(r => r.top)).size > 1) found.push(word)
    }
  return found })"""
SAID = {
    "runs": r"shown\.safetensors: 1 run, [1-8] samples?: too few to tell",
    "plain": "6 of 6 steps computed",
    "quantize": "[0-9]+ W8A8 layers",
    "cache": "2 of 6 steps computed",
    "fast": "2 of 6 steps computed",
}


@pytest.fixture(scope="module", params=parameters()[:1])
def server(request, tmp_path_factory) -> Iterator[Server]:
    checkout: Checkout = request.param
    with Server(checkout, tmp_path_factory.mktemp("shown")) as running:
        yield running


@pytest.mark.parametrize("nodes_2", [False, True], ids=["on the canvas", "as HTML"])
def test_words_and_pictures_are_on_the_nodes_after_a_run(server, nodes_2):
    (server.base / "output" / "qandc" / "shown.safetensors").unlink(missing_ok=True)
    with open_frontend(server.address, 1280, 800, nodes_2=nodes_2) as frontend:
        ids, unwired = frontend.page.evaluate(BUILD, [NODES, WIRES])
        assert unwired == []
        # All is made anew: of what it has in its cache, ComfyUI shows no pictures.
        frontend.set_widgets({"seed": 10 + nodes_2, "max_layer_error": 0.3 + 0.1 * nodes_2})
        frontend.show_all()
        frontend.run()
        for words in SAID.values():
            # Line breaks of a text are spaces in Nodes 2.0.
            found = frontend.page.get_by_text(re.compile(words.replace(" ", r"\s+")))
            found.filter(visible=True).first.wait_for()
        hidden = frontend.page.evaluate(HIDDEN)
        assert hidden and max(hidden) <= 1, hidden
        assert frontend.page.evaluate(BROKEN) == []
        shown = frontend.page.evaluate(
            """ids => ids.map(id => { const node = app.graph.getNodeById(id);
            const html = document.querySelectorAll(`[data-node-id="${id}"] img`);
            return [...(LiteGraph.vueNodesMode ? html : node.imgs)].map(i => i.naturalWidth) })""",
            [ids["quantize"], ids["compare"]],
        )
        assert [len(widths) for widths in shown] == [1, 1]  # and no picture of the progress beside it
        assert shown[0][0] > 300 and shown[1][0] > 500
        assert frontend.errors == []
